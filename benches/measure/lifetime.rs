//! The whole life of a machine: from the start of the command to the guest's first byte and to the command's exit.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::{Target, boot, median, peer, report};

const RUNS: usize = 200;
const MEMORY_MIB: u64 = 128;
/// What the guest prints.
const BYTE: u8 = b'!';
/// husk's exit code for a guest that resets.
const RESET: i32 = 80;

/// One run, in milliseconds.
pub struct Life {
    pub to_byte: f64,
    pub to_exit: f64,
}

/// A guest that prints one byte and resets the machine; in Firecracker, too, if there is one.
pub fn tiny_guest() -> Result<()> {
    let mut husk = boot(husk_guests::BRIEF, "quiet");
    husk.args(["--memory", &format!("{MEMORY_MIB}M")]);
    let mut firecracker = peer::firecracker(husk_guests::BRIEF, "quiet", MEMORY_MIB)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        ours.push(live(&mut husk)?);
        if let Some(firecracker) = &mut firecracker {
            theirs.push(live(firecracker)?);
        }
    }
    let of = |lives: &[Life], part: fn(&Life) -> f64| median(lives.iter().map(part).collect());
    report("husk boot, from start to the guest's first byte", of(&ours, |life| life.to_byte), "ms", Target::None);
    report("husk boot, from start to exit", of(&ours, |life| life.to_exit), "ms", Target::Below(4.0));
    if firecracker.is_some() {
        report("Firecracker, from start to the first byte", of(&theirs, |life| life.to_byte), "ms", Target::None);
        report("Firecracker, from start to exit", of(&theirs, |life| life.to_exit), "ms", Target::None);
        // Of adjacent runs, because most of the noise affects both.
        let ratio = |part: fn(&Life) -> f64| median(ours.iter().zip(&theirs).map(|(h, f)| part(h) / part(f)).collect());
        report("husk / Firecracker, to the first byte", ratio(|life| life.to_byte), "", Target::Below(0.5));
        report("husk / Firecracker, to exit", ratio(|life| life.to_exit), "", Target::Below(0.5));
    }
    Ok(())
}

/// Runs a VMM to its end. Firecracker exits with 0.
pub fn live(command: &mut Command) -> Result<Life> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let millis = || start.elapsed().as_secs_f64() * 1e3;
    let mut child = command.spawn().with_context(|| format!("start {}", command.get_program().display()))?;
    let mut output = child.stdout.take().context("no standard output")?;
    let (mut printed, mut buffer) = (Vec::new(), [0; 4096]);
    // A VMM may print lines of its own before.
    while !printed.contains(&BYTE) {
        let count = output.read(&mut buffer)?;
        ensure!(count > 0, "the guest never spoke: {}", String::from_utf8_lossy(&printed));
        printed.extend_from_slice(&buffer[..count]);
    }
    let to_byte = millis();
    let status = child.wait()?;
    let to_exit = millis();
    ensure!([Some(0), Some(RESET)].contains(&status.code()), "{status}");
    Ok(Life { to_byte, to_exit })
}
