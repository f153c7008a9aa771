//! Runs the host's administration tools.

use std::io::{self, ErrorKind};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Directories of administration tools that are not in the search path of unprivileged users.
const MORE_DIRS: &str = ":/usr/sbin:/sbin";

/// Runs a program that must succeed, and returns its output.
pub fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let path = std::env::var("PATH").unwrap_or_default() + MORE_DIRS;
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.with_context(|| format!("run {program}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), words.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program that must succeed.
pub fn run(program: &str, arguments: &[&str]) -> Result<()> {
    output(program, arguments).map(drop)
}

/// Whether the error means that the program is not installed.
pub fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::NotFound)
}
