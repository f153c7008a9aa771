//! The command lines of the VMMs, and of a container, each started as its makers recommend, with the sandbox that is its default.

use std::process::{Command, Stdio};

use crate::restored::{self, Answers};
use crate::{PID1, Parts, setting};

/// Makes the guest quiet and stops it at once. husk's own parameters are left out, so that all have the same.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests pci=off swiotlb=noforce -- none";

/// What a row is compared with: husk's row of the same kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The boot of the same guest in each VMM.
    Boot,
    /// The same guest in each VMM, saved and restored.
    Restore,
    /// A command in an image. These differ too much to be compared.
    Run,
}

/// A VMM and its command line.
pub struct Vmm {
    pub name: &'static str,
    pub version: String,
    pub command: Vec<String>,
    pub kind: Kind,
    /// How a saved guest is made to answer.
    pub answers: Option<Answers>,
}

/// husk, QEMU's microvm, and those whose programs were given.
pub fn all(parts: &Parts) -> Result<Vec<Vmm>, String> {
    let (husk_program, qemu_program) = (setting("VERSUS_HUSK")?, setting("VERSUS_QEMU")?);
    let mut vmms = vec![
        vmm("husk", &husk_program, husk(parts, &husk_program)),
        vmm("QEMU microvm", &qemu_program, qemu(parts, &qemu_program)),
    ];
    if let Ok(program) = setting("VERSUS_FIRECRACKER") {
        vmms.push(vmm("Firecracker", &program, firecracker(parts, &program)?));
    }
    if let Ok(program) = setting("VERSUS_CLOUD_HYPERVISOR") {
        vmms.push(vmm("Cloud Hypervisor", &program, cloud_hypervisor(parts, &program)));
    }
    if let Ok(root) = setting("VERSUS_ROOT") {
        vmms.push(Vmm { kind: Kind::Run, ..vmm("husk run", &husk_program, husk_run(parts, &husk_program, &root)) });
        let warm = make_warm(parts, &husk_program, &root)?;
        let command = words(&[&husk_program, "run", "--network", "none", "--from", &warm, "echo", PID1]);
        vmms.push(Vmm { kind: Kind::Run, ..vmm("husk run, warm", &husk_program, command) });
        let (crun, bundle) = (setting("VERSUS_CRUN")?, setting("VERSUS_BUNDLE")?);
        let command = words(&[&crun, "run", "--bundle", &bundle, "versus"]);
        vmms.push(Vmm { kind: Kind::Run, ..vmm("crun run", &crun, command) });
    }
    if std::env::var_os("VERSUS_RESTORE").is_some() {
        vmms.extend(restored::all(parts, &husk_program)?);
    }
    Ok(vmms)
}

pub fn vmm(name: &'static str, program: &str, command: Vec<String>) -> Vmm {
    Vmm { name, version: version(program), command, kind: Kind::Boot, answers: None }
}

/// The first word of `--version` that starts with a number, as in `QEMU emulator version 7.2.22` and `Firecracker v1.2.3`.
fn version(program: &str) -> String {
    let output = Command::new(program).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&output);
    let is_version = |word: &&str| word.trim_start_matches('v').starts_with(|first: char| first.is_ascii_digit());
    let word = text.split_whitespace().find(is_version).unwrap_or("unknown");
    word.trim_start_matches('v').to_owned()
}

pub fn husk(parts: &Parts, husk: &str) -> Vec<String> {
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

/// A command in an image, whose first line counts as PID 1's.
fn husk_run(parts: &Parts, husk: &str, root: &str) -> Vec<String> {
    machine(parts, husk, "run", &[root, "echo", PID1])
}

/// Saves the same machine just before its command, and returns the directory.
fn make_warm(parts: &Parts, husk: &str, root: &str) -> Result<String, String> {
    let dir = std::env::temp_dir().join("versus-warm");
    let _ = std::fs::remove_dir_all(&dir);
    let dir = dir.display().to_string();
    let words = machine(parts, husk, "warm", &["--output", &dir, root, "echo"]);
    let status = Command::new(husk).args(words.iter().skip(1)).stdout(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(dir),
        Ok(status) => Err(format!("husk warm: {status}")),
        Err(error) => Err(format!("{husk}: {error}")),
    }
}

fn machine(parts: &Parts, husk: &str, command: &str, rest: &[&str]) -> Vec<String> {
    let Parts { kernel, memory_mib, cpus, .. } = parts;
    let memory = format!("{memory_mib}M");
    let flags = [command, "--kernel", kernel, "--memory", &memory, "--cpus", cpus, "--network", "none"];
    words(&[&[husk], &flags[..], rest].concat())
}

/// It exits when the guest resets through the keyboard controller, but not when it powers off. Its serial console is its
/// standard output. It reads its configuration from a file.
fn firecracker(parts: &Parts, firecracker: &str) -> Result<Vec<String>, String> {
    let path = firecracker_config(parts, "reboot")?;
    Ok(words(&[firecracker, "--no-api", "--config-file", &path]))
}

/// Writes the configuration of a guest that does `job`, and returns its path.
pub fn firecracker_config(parts: &Parts, job: &str) -> Result<String, String> {
    let Parts { kernel, initrd, memory_mib, cpus, .. } = parts;
    let cmdline = CMDLINE.replace("-- none", &format!("reboot=k -- {job}"));
    let path = std::env::temp_dir().join(format!("versus-firecracker-{job}.json"));
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{kernel}", "initrd_path": "{initrd}", "boot_args": "{cmdline}"}},
            "drives": [], "machine-config": {{"vcpu_count": {cpus}, "mem_size_mib": {memory_mib}}}}}"#
    );
    std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path.display().to_string())
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

pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
