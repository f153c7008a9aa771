//! Block I/O from a guest driver at CPL 3 through the whole block device to a file, compared with plain system calls and
//! a loop around io_uring on the same file: through the host's page cache, and without it (O_DIRECT).
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, cqueue, opcode, types};

use crate::{Target, boot, exits, median, output_of, report, wakeup};

const BLOCK: usize = 4096;
const FILE_BLOCKS: u64 = 16 << 10;
/// Requests of a run, from the page cache and from the disk.
const CACHED_REQUESTS: u64 = 40_000;
const UNCACHED_REQUESTS: u64 = 8_000;
const RUNS: usize = 5;
const DEPTH: u32 = 32;

/// A buffer that direct I/O accepts.
#[repr(align(4096))]
struct Buffer([u8; BLOCK]);

/// What a request does, in which order, and whether the host caches the file.
#[derive(Clone, Copy)]
struct Load {
    kind: &'static str,
    order: &'static str,
    cached: bool,
}

impl Load {
    fn requests(self) -> u64 {
        if self.cached { CACHED_REQUESTS } else { UNCACHED_REQUESTS }
    }

    fn name(self) -> String {
        format!("4 KiB {} {}{}", self.order, self.kind, if self.cached { "" } else { ", uncached" })
    }
}

/// 4 KiB reads and writes, random and sequential, at queue depth 1 and 32, cached and not.
pub fn block_device() -> Result<()> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = dir.path().join("disk.img");
    let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
    for _ in 0..FILE_BLOCKS {
        file.write_all(&[0x5a; BLOCK])?;
    }
    file.sync_all()?;
    let direct = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path);
    for (file, cached) in [(Ok(file), true), (direct, false)] {
        let file = file.context("open the file without a cache: set CARGO_TARGET_DIR to a directory on a disk")?;
        for kind in ["read", "write"] {
            for order in ["random", "sequential"] {
                measure(&file, &path, Load { kind, order, cached })?;
            }
            two_queues(&path, Load { kind, order: "random", cached })?;
        }
    }
    Ok(())
}

/// A second vCPU that drives a second queue, compared with one of each. All four threads are busy, so that the second
/// queue can only be faster on a host with as many processors.
fn two_queues(path: &Path, load: Load) -> Result<()> {
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        one.push(device_time(path, load, DEPTH, 1)?.as_secs_f64() * 1e6);
        two.push(device_time(path, load, DEPTH, 2)?.as_secs_f64() * 1e6);
    }
    let (one, two) = (median(one), median(two));
    let name = load.name();
    report(&format!("{name}, 2 vCPUs with a queue each, depth {DEPTH}"), two, "us", Target::None);
    report("  rate as a multiple of one with one", one / two, "", Target::None);
    Ok(())
}

fn measure(file: &File, path: &Path, load: Load) -> Result<()> {
    let name = load.name();
    let (mut plain, mut ring, mut deep, mut single, mut floor) = <(Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
    for _ in 0..RUNS {
        let call = plain_time(file, load)?;
        plain.push(call.as_secs_f64() * 1e6);
        ring.push(ring_time(file, load)?.as_secs_f64() * 1e6);
        deep.push(device_time(path, load, DEPTH, 1)?.as_secs_f64() * 1e6);
        single.push(device_time(path, load, 1, 1)?.as_secs_f64() * 1e6);
        floor.push((exits::doorbell()? + wakeup::one_way()? + call).as_secs_f64() * 1e6);
    }
    let (plain, ring, deep, single) = (median(plain), median(ring), median(deep), median(single));
    let floor = median(floor);
    report(&format!("{name}, system call"), plain, "us", Target::None);
    report(&format!("{name}, io_uring, depth {DEPTH}"), ring, "us", Target::None);
    report(&format!("{name}, husk, depth {DEPTH}"), deep, "us", Target::None);
    report("  rate as a share of io_uring's", ring / deep * 100.0, "%", Target::Above(90.0));
    report("  rate as a share of system calls'", plain / deep * 100.0, "%", Target::Above(70.0));
    report(&format!("{name}, husk, depth 1"), single, "us", Target::None);
    report("  time as a share of kick, wakeup and call", single / floor * 100.0, "%", Target::Below(120.0));
    Ok(())
}

/// The same sequence of blocks as the guest's.
fn blocks(order: &str) -> impl Iterator<Item = u64> {
    let is_random = order == "random";
    let mut state = 88_172_645_463_325_252u64;
    (0..).map(move |request: u64| {
        if !is_random {
            return request % FILE_BLOCKS;
        }
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % FILE_BLOCKS
    })
}

/// The time per request of a loop of pread or pwrite.
fn plain_time(file: &File, load: Load) -> Result<Duration> {
    let mut buffer = Buffer([0x5a; BLOCK]);
    let start = Instant::now();
    for block in blocks(load.order).take(load.requests() as usize) {
        let offset_bytes = block * BLOCK as u64;
        match load.kind {
            "read" => file.read_exact_at(&mut buffer.0, offset_bytes)?,
            _ => file.write_all_at(&buffer.0, offset_bytes)?,
        }
    }
    Ok(start.elapsed() / load.requests() as u32)
}

/// The time per request of a loop that keeps a ring of depth [`DEPTH`] full.
fn ring_time(file: &File, load: Load) -> Result<Duration> {
    let mut ring = IoUring::new(DEPTH)?;
    ring.submitter().register_files(&[file.as_raw_fd()])?;
    let mut buffers: Vec<Buffer> = (0..DEPTH).map(|_| Buffer([0x5a; BLOCK])).collect();
    let mut free: Vec<usize> = (0..DEPTH as usize).collect();
    let mut blocks = blocks(load.order).take(load.requests() as usize);
    let mut done = 0;
    let start = Instant::now();
    while done < load.requests() {
        while let Some(slot) = free.pop() {
            let Some(block) = blocks.next() else { break };
            let (fd, buffer) = (types::Fixed(0), buffers[slot].0.as_mut_ptr());
            let offset_bytes = block * BLOCK as u64;
            let entry = match load.kind {
                "read" => opcode::Read::new(fd, buffer, BLOCK as u32).offset(offset_bytes).build(),
                _ => opcode::Write::new(fd, buffer, BLOCK as u32).offset(offset_bytes).build(),
            };
            // SAFETY: the buffers live longer than the loop, which waits for all requests.
            unsafe { ring.submission().push(&entry.user_data(slot as u64))? };
        }
        ring.submit_and_wait(1)?;
        let completions: Vec<cqueue::Entry> = ring.completion().collect();
        for completion in completions {
            ensure!(completion.result() == BLOCK as i32, "a request failed: {}", completion.result());
            free.push(completion.user_data() as usize);
            done += 1;
        }
    }
    Ok(start.elapsed() / load.requests() as u32)
}

/// The time per request of a guest with a driver on each of as many vCPUs as `queues`, measured by the guest's clock.
fn device_time(path: &Path, load: Load, depth: u32, queues: u32) -> Result<Duration> {
    let Load { kind, order, cached } = load;
    let count = load.requests() / u64::from(queues);
    let words = format!("type={kind} order={order} depth={depth} count={count} queues={queues}");
    let mut command = boot(husk_guests::DRIVE, &words);
    command.arg("--cpus").arg(queues.to_string());
    let mut disk = path.as_os_str().to_owned();
    disk.push(format!(",num_queues={queues}"));
    disk.push(if cached { "" } else { ",cache=none" });
    // MEASURE_DISK_OPTIONS=,aio=threads compares ways of accessing the file.
    disk.push(std::env::var_os("MEASURE_DISK_OPTIONS").unwrap_or_default());
    command.arg("--disk").arg(disk);
    let text = output_of(command)?;
    let number = |name: &str| -> Result<u64> {
        let (_, rest) = text.split_once(name).with_context(|| format!("no {name}in {text:?}"))?;
        Ok(rest.split_whitespace().next().unwrap_or_default().parse()?)
    };
    Ok(Duration::from_nanos(number("ns ")? / number("requests ")?))
}
