//! The entry point: parses arguments, dispatches the command and prints its error.

use std::ffi::OsString;
use std::time::Instant;

use clap::Parser;
use husk::cli::{self, Cli, argv};

fn main() -> ! {
    let started = Instant::now();
    let exit = match argv::read().map(parse) {
        Ok(Ok(cli)) => cli.run(started).unwrap_or_else(|error| cli::report(&error)),
        Ok(Err(error)) => cli::report_usage(&error),
        Err(error) => cli::report(&error),
    };
    log::logger().flush();
    exit.leave()
}

fn parse(words: &[OsString]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from([OsString::from("husk")].iter().chain(words))
}
