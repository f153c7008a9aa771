//! From arguments to an exit code: parse, dispatch, print the error once.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use husk::cli::{self, Cli};

fn main() -> ExitCode {
    let started = Instant::now();
    let exit = match Cli::try_parse() {
        Ok(cli) => cli.run(started).unwrap_or_else(|error| cli::report(&error)),
        Err(error) => cli::report_usage(&error),
    };
    log::logger().flush();
    exit.into()
}
