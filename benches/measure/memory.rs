//! What a running machine costs its host beyond the guest's own memory.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::{Aim, boot, report};

/// A machine's memory unless its user says otherwise.
const GUEST_MIB: u64 = 512;

/// The proportional set size of every mapping that is not guest memory, of a machine whose guest halts.
pub fn beyond_the_guest() -> Result<()> {
    let mut command = boot(husk_guests::POWER, "do=halt");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut husk = command.spawn()?;
    let mut line = String::new();
    let said = BufReader::new(husk.stdout.take().context("no standard output")?).read_line(&mut line);
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", husk.id()));
    husk.kill()?;
    husk.wait()?;
    said?;
    ensure!(line == "ready\n", "the guest said {line:?}");
    let (guest_kib, other_kib) = split(&maps?);
    ensure!(guest_kib > 0, "no mapping is as large as the guest's memory");
    report("memory beyond the guest's own", other_kib as f64 / 1024.0, "MiB", Aim::Below(5.0));
    Ok(())
}

/// The proportional set size in KiB of mappings as large as the guest, and of the others (proc(5), smaps).
fn split(maps: &str) -> (u64, u64) {
    let (mut guest_kib, mut other_kib, mut is_guest) = (0, 0, false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(value)) = (words.next(), words.next().and_then(|word| word.parse::<u64>().ok())) else {
            continue;
        };
        match name {
            "Size:" => is_guest = value >= GUEST_MIB << 10,
            "Pss:" if is_guest => guest_kib += value,
            "Pss:" => other_kib += value,
            _ => {}
        }
    }
    (guest_kib, other_kib)
}
