//! The host's own tools, run for what they do or for what they print.

use std::io::{self, ErrorKind};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where tools are that are root's, and where a user who is not root may not look.
const MORE_DIRS: &str = ":/usr/sbin:/sbin";

/// Runs a program that has to succeed, and returns what it printed.
pub fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let path = std::env::var("PATH").unwrap_or_default() + MORE_DIRS;
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.with_context(|| format!("run {program}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), words.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The same, for what it does.
pub fn run(program: &str, arguments: &[&str]) -> Result<()> {
    output(program, arguments).map(drop)
}

/// Whether the host does not have the program that failed so.
pub fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::NotFound)
}
