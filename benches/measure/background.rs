//! The cost of commands that manage machines in the background, with minimal guests.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{Target, median, report};

const MACHINES: usize = 20;

/// Starts machines one after the other, lists them, and removes them at once.
pub fn machines() -> Result<()> {
    let runtime = tempfile::tempdir().context("create a temporary directory")?;
    let husk = |words: &[&str]| -> Result<Duration> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.args(words).env("XDG_RUNTIME_DIR", runtime.path()).stdin(Stdio::null()).stderr(Stdio::null());
        let started = Instant::now();
        let output = command.output().context("start husk")?;
        ensure!(output.status.success(), "{words:?}: {}", output.status);
        Ok(started.elapsed())
    };
    let millis = |times: Vec<Duration>| median(times.iter().map(|time| time.as_secs_f64() * 1e3).collect());
    let names: Vec<String> = (0..MACHINES).map(|n| format!("bench-{n}")).collect();
    let mut starts = Vec::new();
    for name in &names {
        let flags = ["boot", "-d", "--name", name, "--memory", "64M", "--cmdline", "do=halt", "--kernel"];
        starts.push(husk(&[&flags[..], &[husk_guests::POWER]].concat())?);
    }
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let lists = (0..MACHINES).map(|_| husk(&["ps"])).collect::<Result<Vec<_>>>()?;
    let pauses = all.iter().map(|name| husk(&["pause", name])).collect::<Result<Vec<_>>>()?;
    let end = husk(&[&["rm", "--force"], &all[..]].concat())?;
    report("husk boot -d, from start to exit", millis(starts), "ms", Target::Below(8.0));
    report("husk ps with 20 machines", millis(lists), "ms", Target::None);
    report("husk pause", millis(pauses), "ms", Target::None);
    report("husk rm --force, per machine", end.as_secs_f64() * 1e3 / MACHINES as f64, "ms", Target::None);
    Ok(())
}
