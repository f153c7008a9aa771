//! husk and other VMMs side by side: the same kernel and initial RAM disk, to PID 1 and to power-off, in turn.
//!
//! Times are wall-clock times of this process: from the start of a VMM to the first line of the guest's PID 1, and to
//! the exit of the VMM. `scripts/versus` runs it where KVM runs real kernels. In the lab's Intel machine the clock
//! advances by 1 ms per million instructions, so one run is enough; VM exits are counted as well.

mod exits;

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The first line that the guest's init prints.
const PID1: &str = "pid1=up";
/// Makes the guest quiet and stops it at once. husk's own parameters are left out, so that all have the same.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests pci=off swiotlb=noforce -- none";

/// What all VMMs boot, from the environment of `scripts/versus`.
struct Parts {
    kernel: String,
    initrd: String,
    memory_mib: String,
    cpus: String,
    runs: usize,
    /// Whether the clock counts instructions.
    counted: bool,
}

/// A VMM and its command line.
struct Vmm {
    name: &'static str,
    command: Vec<String>,
    /// Whether the VMM exits when the guest powers off. If not, it is killed when the guest has reached PID 1.
    ends: bool,
}

/// One run of a VMM.
#[derive(Clone, Copy)]
struct Run {
    to_pid1: Duration,
    to_exit: Option<Duration>,
}

/// A duration of a run, if it has been measured.
type Part = fn(&Run) -> Option<Duration>;

fn main() -> ExitCode {
    let measured = parts().and_then(|parts| {
        let vmms = vmms(&parts)?;
        compare(&parts, &vmms)
    });
    match measured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("versus: {error}");
            ExitCode::from(2)
        }
    }
}

/// Boots all VMMs in turn, and returns whether husk was the fastest.
fn compare(parts: &Parts, vmms: &[Vmm]) -> Result<bool, String> {
    let unit = if parts.counted { "M instr." } else { "ms" };
    let mut runs = vec![Vec::new(); vmms.len()];
    println!("{:<18}{:>6}{:>22}{:>22}", "VMM", "run", format!("to PID 1 ({unit})"), format!("to exit ({unit})"));
    // The first round warms the page cache for all. It is not measured, but its VM exits are counted, because counting
    // takes time.
    for round in 0..=parts.runs {
        for (vmm, runs) in vmms.iter().zip(&mut runs) {
            let exits = (round == 0 && parts.counted).then(exits::Count::start).transpose()?;
            let run = measure(vmm).map_err(|error| format!("{}: {error}", vmm.name))?;
            if let Some(exits) = exits {
                println!("{:<18} exits {}", vmm.name, exits.finish()?);
            }
            if round > 0 {
                runs.push(run);
                let to_exit = run.to_exit.map_or("-".to_owned(), |time| format!("{:.1}", millis(time)));
                println!("{:<18}{round:>6}{:>22.1}{to_exit:>22}", vmm.name, millis(run.to_pid1));
            }
        }
    }
    Ok(report(vmms, &runs, unit))
}

fn setting(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|_| format!("{name} is not set; scripts/versus sets it and runs this"))
}

fn parts() -> Result<Parts, String> {
    Ok(Parts {
        kernel: setting("VERSUS_KERNEL")?,
        initrd: setting("VERSUS_INITRD")?,
        memory_mib: setting("VERSUS_MEMORY_MIB")?,
        cpus: setting("VERSUS_CPUS")?,
        runs: setting("VERSUS_RUNS")?.parse().map_err(|_| "VERSUS_RUNS is no number")?,
        counted: std::env::var_os("VERSUS_COUNTED").is_some(),
    })
}

/// husk, QEMU's microvm, and those whose programs were given.
fn vmms(parts: &Parts) -> Result<Vec<Vmm>, String> {
    let mut vmms = vec![
        Vmm { name: "husk", command: husk(parts, &setting("VERSUS_HUSK")?), ends: true },
        Vmm { name: "QEMU microvm", command: qemu(parts, &setting("VERSUS_QEMU")?), ends: true },
    ];
    if let Ok(program) = setting("VERSUS_FIRECRACKER") {
        // It does not exit at power-off.
        vmms.push(Vmm { name: "Firecracker", command: firecracker(parts, &program)?, ends: false });
    }
    if let Ok(program) = setting("VERSUS_CLOUD_HYPERVISOR") {
        vmms.push(Vmm { name: "Cloud Hypervisor", command: cloud_hypervisor(parts, &program), ends: true });
    }
    Ok(vmms)
}

fn husk(parts: &Parts, husk: &str) -> Vec<String> {
    let Parts { kernel, initrd, memory_mib, cpus, .. } = parts;
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

/// Its serial console is its standard output. It reads its configuration from a file.
fn firecracker(parts: &Parts, firecracker: &str) -> Result<Vec<String>, String> {
    let Parts { kernel, initrd, memory_mib, cpus, .. } = parts;
    let path = std::env::temp_dir().join("versus-firecracker.json");
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{kernel}", "initrd_path": "{initrd}", "boot_args": "{CMDLINE}"}},
            "drives": [], "machine-config": {{"vcpu_count": {cpus}, "mem_size_mib": {memory_mib}}}}}"#
    );
    std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(words(&[firecracker, "--no-api", "--config-file", &path.display().to_string()]))
}

fn cloud_hypervisor(parts: &Parts, cloud_hypervisor: &str) -> Vec<String> {
    let Parts { kernel, initrd, memory_mib, cpus, .. } = parts;
    let (cpus, memory) = (format!("boot={cpus}"), format!("size={memory_mib}M"));
    words(&[
        cloud_hypervisor,
        "--kernel",
        kernel,
        "--initramfs",
        initrd,
        "--cpus",
        &cpus,
        "--memory",
        &memory,
        "--serial",
        "tty",
        "--console",
        "off",
        "--cmdline",
        CMDLINE,
    ])
}

/// QEMU's minimal microvm configuration, with the same entropy device as husk. Its qboot firmware is faster than its
/// SeaBIOS, which also puts the ACPI tables where QEMU then puts the initial RAM disk.
fn qemu(parts: &Parts, qemu: &str) -> Vec<String> {
    let Parts { kernel, initrd, memory_mib, cpus, .. } = parts;
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
fn measure(vmm: &Vmm) -> Result<Run, String> {
    let [program, arguments @ ..] = &*vmm.command else { return Err("no program".to_owned()) };
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
            if !vmm.ends {
                let _ = child.kill();
            }
        }
        said.push_str(&line);
        said.push('\n');
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    let to_exit = vmm.ends.then(|| start.elapsed());
    match to_pid1 {
        Some(to_pid1) if status.success() || !vmm.ends => Ok(Run { to_pid1, to_exit }),
        _ => Err(format!("exited with {status} and printed:\n{said}")),
    }
}

/// Prints medians, and ratios of adjacent runs, because most of the noise affects both.
fn report(vmms: &[Vmm], runs: &[Vec<Run>], unit: &str) -> bool {
    let [husk, others @ ..] = runs else { return false };
    let parts: [(&str, Part); 2] = [("to PID 1", |run| Some(run.to_pid1)), ("to exit", |run| run.to_exit)];
    let mut faster = true;
    for (name, part) in parts {
        let value = |runs: &[Run]| median(runs.iter().filter_map(part).map(millis).collect());
        println!("{name}: husk {:.1} {unit}", value(husk));
        for (vmm, other) in vmms.iter().skip(1).zip(others) {
            let pairs =
                husk.iter().zip(other).filter_map(|(h, o)| Some(part(h)?.as_secs_f64() / part(o)?.as_secs_f64()));
            let ratio = median(pairs.collect());
            if !ratio.is_nan() {
                println!("{name}: {} {:.1} {unit}, husk's share {ratio:.2}", vmm.name, value(other));
                faster &= ratio < 1.0;
            }
        }
    }
    println!("husk is {}", if faster { "the fastest" } else { "not the fastest" });
    faster
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
