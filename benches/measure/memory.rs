//! The cost of an idle machine: memory beyond the guest's own, and CPU time.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk::config::MachineConfig;
use husk::machine::Machine;
use husk::resources;
use husk::timings::Timings;

use crate::{Target, boot, peer, report};

/// The default memory of a machine.
const GUEST_MIB: u64 = 512;

/// How long an idle guest is observed. The scheduler counts nanoseconds.
const OBSERVATION: Duration = Duration::from_secs(10);

/// After this time a machine counts as idle. husk returns memory that its start needed after half a second.
const UNTIL_IDLE: Duration = Duration::from_secs(2);

/// The proportional set size of all mappings that are not guest memory, while the guest halts.
pub fn overhead() -> Result<()> {
    let husk = beyond_guest_mib(boot(husk_guests::POWER, "do=halt"))?;
    report("memory beyond the guest's own", husk, "MiB", Target::Below(3.0));
    if let Some(firecracker) = peer::firecracker(husk_guests::POWER, "do=halt", GUEST_MIB)? {
        let firecracker = beyond_guest_mib(firecracker)?;
        report("  of Firecracker", firecracker, "MiB", Target::None);
        report("  husk / Firecracker", husk / firecracker, "", Target::None);
    }
    Ok(())
}

fn beyond_guest_mib(command: Command) -> Result<f64> {
    let maps = with_idle_guest(command, |vmm| {
        thread::sleep(UNTIL_IDLE);
        let maps = |pid| std::fs::read_to_string(format!("/proc/{pid}/smaps"));
        Ok(family(vmm.id())?.into_iter().map(maps).collect::<std::io::Result<String>>()?)
    })?;
    let (guest_kib, other_kib) = split(&maps);
    ensure!(guest_kib > 0, "no mapping is as large as the guest's memory");
    Ok(other_kib as f64 / 1024.0)
}

/// CPU time of all threads of a machine, while its guest halts, and while it is paused with a guest that would spin.
pub fn idle() -> Result<()> {
    let halts = with_idle_guest(boot(husk_guests::POWER, "do=halt"), |husk| processor_share(&family(husk.id())?))?;
    report("processor time of a guest that halts", halts * 100.0, "%", Target::Below(0.1));
    let config = MachineConfig {
        kernel: husk_guests::POWER.into(),
        cmdline: "do=spin".into(),
        memory_mib: 64,
        ..MachineConfig::default()
    };
    let timings = Arc::new(Timings::new(Instant::now()));
    let (resources, _outside) = resources::open(&config)?;
    let mut machine = Machine::build(&config, resources, timings, || Ok(()), &|| false)?;
    machine.resume();
    thread::sleep(Duration::from_millis(100));
    machine.pause();
    report(
        "processor time of a paused machine",
        processor_share(&[std::process::id()])? * 100.0,
        "%",
        Target::Below(0.1),
    );
    Ok(())
}

/// A process and its children: those of a machine.
pub fn family(process: u32) -> Result<Vec<u32>> {
    let is_child = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains(&format!("\nPPid:\t{process}\n"))
    };
    let processes = std::fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(std::iter::once(process).chain(processes.filter(is_child)).collect())
}

/// Returns the fraction of a CPU that `processes` use.
fn processor_share(processes: &[u32]) -> Result<f64> {
    let sum_ns = || processes.iter().map(|process| processor_ns(*process)).sum::<Result<u64>>();
    let (started, before_ns) = (Instant::now(), sum_ns()?);
    thread::sleep(OBSERVATION);
    Ok((sum_ns()? - before_ns) as f64 / 1e9 / started.elapsed().as_secs_f64())
}

/// Calls `observe` with a machine whose guest has halted.
fn with_idle_guest<T>(mut command: Command, observe: impl FnOnce(&Child) -> Result<T>) -> Result<T> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut vmm = command.spawn()?;
    let mut line = String::new();
    let mut output = BufReader::new(vmm.stdout.take().context("no standard output")?);
    // A VMM may print lines of its own before.
    let printed = loop {
        line.clear();
        match output.read_line(&mut line) {
            Ok(count) if count > 0 && !line.ends_with("ready\n") => {}
            printed => break printed,
        }
    };
    let observed = observe(&vmm);
    vmm.kill()?;
    vmm.wait()?;
    printed?;
    ensure!(line.ends_with("ready\n"), "the guest printed {line:?}");
    observed
}

/// Returns the CPU time of all threads (proc(5), schedstat: the first number).
fn processor_ns(process: u32) -> Result<u64> {
    let mut sum_ns = 0;
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let stat = std::fs::read_to_string(thread?.path().join("schedstat"))?;
        sum_ns += stat.split_whitespace().next().context("schedstat is empty")?.parse::<u64>()?;
    }
    Ok(sum_ns)
}

/// Returns the proportional set sizes of guest memory and of other mappings, in KiB (proc_pid_smaps(5)).
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
