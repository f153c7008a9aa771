//! The entry point: parses arguments, dispatches the command and prints its error.

use std::time::Instant;

use husk::cli::{self, Cli, argv};

fn main() -> ! {
    let started = Instant::now();
    let exit = match argv::read().map(Cli::parse_words) {
        Ok(Ok(cli)) => cli.run(started).unwrap_or_else(|error| cli::report(&error)),
        Ok(Err(error)) => cli::report_usage(&error),
        Err(error) => cli::report(&error),
    };
    log::logger().flush();
    exit.leave()
}
