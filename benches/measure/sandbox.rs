//! The cost of the sandbox: machines with and without it in turn, from the start of the command to the end, and the throughput of
//! a disk and a network. It is the whole command each time, with both of its processes and all filters.

use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use husk::sys::namespaces;
use rustix::thread::UnshareFlags;

use crate::lifetime::{Life, live};
use crate::{Target, boot, median, output_of, report};

/// Pairs of starts, and of transfers: the medians of what is compared must be exact to 1%.
const STARTS: usize = 300;
const TRANSFERS: usize = 101;
const FILE_BYTES: usize = 64 << 20;
const DEPTH: u32 = 32;
/// The size of frames with virtio's header, and their number: an Ethernet frame of full size, and what a driver with TSO sends.
const FRAMES: [(u32, u32); 2] = [(1514 + 12, 50_000), (65_000, 10_000)];

/// Runs each of `pairs` with the sandbox and without it, the one first that was second before.
fn in_turn<T>(pairs: usize, mut run: impl FnMut(&str) -> Result<T>) -> Result<Vec<[T; 2]>> {
    let pair = |n: usize| {
        if n.is_multiple_of(2) {
            return Ok([run("on")?, run("off")?]);
        }
        let off = run("off")?;
        Ok([run("on")?, off])
    };
    (0..pairs).map(pair).collect()
}

/// The start and the end of a machine.
pub fn starts() -> Result<()> {
    let lives = in_turn(STARTS, |sandbox| {
        let mut command = boot(husk_guests::BRIEF, "quiet");
        live(command.args(["--memory", "128M", "--sandbox", sandbox]))
    })?;
    for (name, part) in [("first byte", (|life| life.to_byte) as fn(&Life) -> f64), ("exit", |life| life.to_exit)] {
        let of = |which: usize| median(lives.iter().map(|pair| part(&pair[which])).collect());
        report(&format!("start to {name}, sandboxed"), of(0), "ms", Target::None);
        report(&format!("start to {name}, --sandbox off"), of(1), "ms", Target::None);
        let differences = lives.iter().map(|[on, off]| part(on) - part(off)).collect();
        report("  difference", median(differences), "ms", Target::Below(1.0));
    }
    Ok(())
}

/// The throughput of a driver at CPL 3 that polls: cached reads of a disk, and frames to a tap device.
pub fn throughput() -> Result<()> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = dir.path().join("disk.img");
    File::create_new(&path)?.write_all(&vec![0x5a; FILE_BYTES])?;
    let disk = path.to_str().context("the path is not UTF-8")?;
    for aio in ["auto", "io_uring"] {
        for (size, requests) in [(4 << 10, 40_000), (128 << 10, 4_000)] {
            let name = format!("{} KiB reads, aio={aio}", size >> 10);
            compare(&name, "read", size, requests, &["--disk", &format!("{disk},aio={aio}")])?;
        }
    }
    // A network of this thread's own, which ends with it.
    let send = || {
        if let Err(error) = namespaces::unshare(UnshareFlags::NEWNET) {
            println!("frames to a tap device: skipped, only root makes networks: {error}");
            return Ok(());
        }
        ip("tuntap add tap0 mode tap vnet_hdr multi_queue")?;
        ip("link set tap0 up")?;
        FRAMES.into_iter().try_for_each(|(size, frames)| {
            let name = format!("frames of {size} bytes to a tap device");
            compare(&name, "send", size, frames, &["--network", "tap=tap0,vhost=off"])
        })
    };
    thread::spawn(send).join().map_err(|_| anyhow!("the thread panicked"))?
}

fn compare(name: &str, kind: &str, size: u32, requests: u32, device: &[&str]) -> Result<()> {
    let words = format!("type={kind} size={size} depth={DEPTH} count={requests}");
    let times_us = in_turn(TRANSFERS, |sandbox| {
        let mut command = boot(husk_guests::DRIVE, &words);
        command.args(device).args(["--sandbox", sandbox]);
        let text = output_of(command)?;
        let ns = text.split_once("ns ").and_then(|(_, rest)| rest.split_whitespace().next()?.parse::<f64>().ok());
        Ok(ns.with_context(|| format!("no time in {text:?}"))? / f64::from(requests) / 1e3)
    })?;
    let of = |which: usize| median(times_us.iter().map(|pair| pair[which]).collect());
    report(&format!("{name}, sandboxed"), of(0), "us", Target::None);
    report(&format!("{name}, --sandbox off"), of(1), "us", Target::None);
    let ratios = times_us.iter().map(|[on, off]| off / on).collect();
    report("  throughput with / without the sandbox", median(ratios), "", Target::Above(0.98));
    Ok(())
}

fn ip(words: &str) -> Result<()> {
    let status = Command::new("ip").args(words.split(' ')).status().context("start ip")?;
    ensure!(status.success(), "ip {words}: {status}");
    Ok(())
}
