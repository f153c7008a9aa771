//! Block I/O from a guest driver at CPL 3 through the whole block device to a file, compared with pread and pwrite on
//! the same file.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::{Target, boot, median, output_of, report};

const BLOCK: usize = 4096;
const FILE_BLOCKS: u64 = 16 << 10;
const REQUESTS: u64 = 40_000;
const RUNS: usize = 5;

/// 4 KiB reads and writes, random and sequential, at queue depth 1 and 32.
pub fn block_device() -> Result<()> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = dir.path().join("disk.img");
    let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
    for _ in 0..FILE_BLOCKS {
        file.write_all(&[0x5a; BLOCK])?;
    }
    for kind in ["read", "write"] {
        for order in ["random", "sequential"] {
            measure(&file, &path, kind, order)?;
        }
    }
    Ok(())
}

fn measure(file: &File, path: &Path, kind: &str, order: &str) -> Result<()> {
    let (mut plain, mut deep, mut single) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        plain.push(plain_rate(file, kind, order)?);
        deep.push(device_rate(path, kind, order, 32)?);
        single.push(device_rate(path, kind, order, 1)?);
    }
    let (plain, deep, single) = (median(plain), median(deep), median(single));
    report(&format!("4 KiB {order} {kind}s, plain system calls"), plain, "kIOPS", Target::None);
    for (depth, rate, target) in [(32, deep, Target::Above(70.0)), (1, single, Target::None)] {
        report(&format!("4 KiB {order} {kind}s, queue depth {depth}"), rate, "kIOPS", Target::None);
        report("  share of plain system calls", rate / plain * 100.0, "%", target);
    }
    Ok(())
}

/// Returns the rate of a loop of pread or pwrite, in thousands of requests per second.
fn plain_rate(file: &File, kind: &str, order: &str) -> Result<f64> {
    let mut buffer = [0x5a; BLOCK];
    let mut state = 88_172_645_463_325_252u64;
    let start = Instant::now();
    for request in 0..REQUESTS {
        let block = if order == "random" {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % FILE_BLOCKS
        } else {
            request % FILE_BLOCKS
        };
        let offset_bytes = block * BLOCK as u64;
        match kind {
            "read" => file.read_exact_at(&mut buffer, offset_bytes)?,
            _ => file.write_all_at(&buffer, offset_bytes)?,
        }
    }
    Ok(REQUESTS as f64 / 1e3 / start.elapsed().as_secs_f64())
}

/// Returns the rate of a guest driver, measured by the guest's clock.
fn device_rate(path: &Path, kind: &str, order: &str, depth: u32) -> Result<f64> {
    let words = format!("type={kind} order={order} depth={depth} count={REQUESTS}");
    let mut command = boot(husk_guests::DRIVE, &words);
    command.arg("--disk").arg(path);
    let text = output_of(command)?;
    let number = |name: &str| -> Result<f64> {
        let (_, rest) = text.split_once(name).with_context(|| format!("no {name}in {text:?}"))?;
        Ok(rest.split_whitespace().next().unwrap_or_default().parse()?)
    };
    Ok(number("requests ")? / 1e3 / (number("ns ")? / 1e9))
}
