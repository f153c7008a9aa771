//! husk and QEMU's microvm side by side: the same kernel and initial RAM disk, to PID 1 and to power-off, in turn.
//!
//! Times are wall-clock times of this process: from the start of a VMM to the first line of the guest's PID 1, and to
//! the exit of the VMM. `scripts/versus` runs it where KVM runs real kernels.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The first line that the guest's init prints.
const PID1: &str = "pid1=up";
/// Makes either guest quiet and stops it at once. husk's own parameters are left out, so that both have the same.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests pci=off swiotlb=noforce -- none";

/// What both VMMs boot, from the environment of `scripts/versus`.
struct Parts {
    husk: String,
    qemu: String,
    kernel: String,
    initrd: String,
    memory_mib: String,
    cpus: String,
    runs: usize,
}

/// One run of a VMM.
#[derive(Clone, Copy)]
struct Run {
    to_pid1: Duration,
    to_exit: Duration,
}

/// A duration of a run.
type Part = fn(&Run) -> Duration;

fn main() -> ExitCode {
    let parts = match parts() {
        Ok(parts) => parts,
        Err(missing) => {
            eprintln!("versus: {missing} is not set; scripts/versus sets it and runs this");
            return ExitCode::from(2);
        }
    };
    let vmms = [("husk", husk(&parts)), ("qemu microvm", qemu(&parts))];
    let mut runs: [Vec<Run>; 2] = Default::default();
    println!("{:<16}{:>6}{:>16}{:>16}", "VMM", "run", "to PID 1 (ms)", "to exit (ms)");
    // The first round warms the page cache for both. It is not counted.
    for round in 0..=parts.runs {
        for ((name, command), runs) in vmms.iter().zip(&mut runs) {
            let run = match measure(command) {
                Ok(run) => run,
                Err(error) => {
                    eprintln!("versus: {name}: {error}");
                    return ExitCode::FAILURE;
                }
            };
            if round > 0 {
                runs.push(run);
                println!("{name:<16}{round:>6}{:>16.1}{:>16.1}", millis(run.to_pid1), millis(run.to_exit));
            }
        }
    }
    report(&runs)
}

fn parts() -> Result<Parts, &'static str> {
    let get = |name: &'static str| std::env::var(name).map_err(|_| name);
    let runs = get("VERSUS_RUNS")?.parse().map_err(|_| "VERSUS_RUNS")?;
    Ok(Parts {
        husk: get("VERSUS_HUSK")?,
        qemu: get("VERSUS_QEMU")?,
        kernel: get("VERSUS_KERNEL")?,
        initrd: get("VERSUS_INITRD")?,
        memory_mib: get("VERSUS_MEMORY_MIB")?,
        cpus: get("VERSUS_CPUS")?,
        runs,
    })
}

fn husk(parts: &Parts) -> Vec<String> {
    let Parts { husk, kernel, initrd, memory_mib, cpus, .. } = parts;
    let memory = format!("{memory_mib}M");
    words(&[
        husk,
        "boot",
        "--kernel",
        kernel,
        "--initrd",
        initrd,
        "--memory",
        &memory,
        "--cpus",
        cpus,
        "--bare-cmdline",
        "--cmdline",
        CMDLINE,
    ])
}

/// QEMU's minimal microvm configuration, with the same entropy device as husk. Its qboot firmware is faster than its
/// SeaBIOS, which also puts the ACPI tables where QEMU then puts the initial RAM disk.
fn qemu(parts: &Parts) -> Vec<String> {
    let Parts { qemu, kernel, initrd, memory_mib, cpus, .. } = parts;
    let machine = "microvm,x-option-roms=off,isa-serial=on,rtc=off,pit=off,pic=off,auto-kernel-cmdline=off";
    words(&[
        qemu,
        "-M",
        machine,
        "-bios",
        "qboot.rom",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-m",
        memory_mib,
        "-smp",
        cpus,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
        "-device",
        "virtio-rng-device",
        "-kernel",
        kernel,
        "-initrd",
        initrd,
        "-append",
        CMDLINE,
    ])
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Runs a VMM to its end. Fails if the guest does not reach PID 1 or does not power off.
fn measure(command: &[String]) -> Result<Run, String> {
    let [program, arguments @ ..] = command else { return Err("no program".to_owned()) };
    let start = Instant::now();
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    let mut to_pid1 = None;
    let mut said = String::new();
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
        if line.trim() == PID1 {
            to_pid1.get_or_insert_with(|| start.elapsed());
        }
        said.push_str(&line);
        said.push('\n');
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    let to_exit = start.elapsed();
    match to_pid1 {
        Some(to_pid1) if status.success() => Ok(Run { to_pid1, to_exit }),
        _ => Err(format!("exited with {status} and printed:\n{said}")),
    }
}

/// Prints medians, and ratios of adjacent runs, because most of the noise affects both.
fn report([husk, qemu]: &[Vec<Run>; 2]) -> ExitCode {
    let parts: [(&str, Part); 2] = [("to PID 1", |run| run.to_pid1), ("to exit", |run| run.to_exit)];
    let mut faster = true;
    for (name, part) in parts {
        let ratio = median(husk.iter().zip(qemu).map(|(h, q)| part(h).as_secs_f64() / part(q).as_secs_f64()).collect());
        let time = |runs: &[Run]| median(runs.iter().map(|run| millis(part(run))).collect());
        println!("{name}: husk {:.1} ms, qemu microvm {:.1} ms, husk/qemu {ratio:.2}", time(husk), time(qemu));
        faster &= ratio < 1.0;
    }
    println!("husk is {}", if faster { "faster" } else { "not faster" });
    if faster { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
