//! Properties of the host that affect results, collected before the first run.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::report::Host;
use crate::sys::processor;

/// Collects properties of the host whose root is `root` (`/`). `dir` is the work directory. What cannot be read is
/// omitted or `unknown`.
pub fn collect(root: &Path, dir: &Path) -> Host {
    let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let line = |path: &str| Some(text(path).trim().to_owned()).filter(|text| !text.is_empty());
    let unknown = || "unknown".to_owned();
    let cpuinfo = text("proc/cpuinfo");
    Host {
        kernel: line("proc/sys/kernel/osrelease").unwrap_or_else(unknown),
        processor: field(&cpuinfo, "model name").map_or_else(unknown, str::to_owned),
        cpus: cpuinfo.lines().filter(|line| line.starts_with("processor")).count() as u32,
        memory_mib: meminfo_kib(&text("proc/meminfo"), "MemTotal").unwrap_or(0) >> 10,
        kvm: kvm(root),
        hypervisor: hypervisor(root, &cpuinfo),
        emulator: emulator(root, &cpuinfo, &processor::hypervisor_signature()),
        governor: line("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        clocksource: line("sys/devices/system/clocksource/clocksource0/current_clocksource").unwrap_or_else(unknown),
        huge_pages: line("sys/kernel/mm/transparent_hugepage/enabled").as_deref().and_then(chosen),
        file_system: file_system(&text("proc/self/mountinfo"), dir).unwrap_or_else(unknown),
        mitigations: mitigations(&root.join("sys/devices/system/cpu/vulnerabilities")),
        load: text("proc/loadavg").split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
    }
}

/// Returns the value of `key` in /proc/meminfo, in KiB.
pub fn meminfo_kib(meminfo: &str, key: &str) -> Option<u64> {
    field(meminfo, key)?.split_whitespace().next()?.parse().ok()
}

fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim())
}

fn kvm(root: &Path) -> String {
    let modules = ["kvm_pvm", "kvm_intel", "kvm_amd"];
    let module = modules.into_iter().find(|module| root.join("sys/module").join(module).exists());
    module.unwrap_or("none").to_owned()
}

/// Returns the hypervisor's name from DMI, if the CPU flags indicate one.
fn hypervisor(root: &Path, cpuinfo: &str) -> Option<String> {
    has_hypervisor(cpuinfo).then(|| dmi(root, "sys_vendor").unwrap_or_else(|| "unknown hypervisor".to_owned()))
}

/// Returns the emulator of the host's processor. QEMU's TCG has a signature of its own, while its DMI strings are the
/// same with KVM; Bochs emulates a real processor without a hypervisor.
fn emulator(root: &Path, cpuinfo: &str, signature: &str) -> Option<String> {
    let is_tcg = has_hypervisor(cpuinfo) && signature == "TCGTCGTCGTCG";
    let is_bochs = dmi(root, "bios_vendor").is_some_and(|vendor| vendor.contains("Bochs"));
    let emulators = [(is_tcg, "QEMU TCG"), (is_bochs && !has_hypervisor(cpuinfo), "Bochs")];
    emulators.into_iter().find(|(is_it, _)| *is_it).map(|(_, name)| name.to_owned())
}

fn has_hypervisor(cpuinfo: &str) -> bool {
    field(cpuinfo, "flags").is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"))
}

/// Returns a string of the firmware's DMI tables.
fn dmi(root: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(root.join("sys/class/dmi/id").join(name)).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Returns the word in brackets.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// Returns the type of the file system that contains `dir`, from the mount with the longest matching path
/// (proc_pid_mountinfo(5)).
fn file_system(mountinfo: &str, dir: &Path) -> Option<String> {
    let mount = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let point = left.split(' ').nth(4)?.to_owned();
        Some((point, right.split(' ').next()?.to_owned()))
    };
    let above = mountinfo.lines().filter_map(mount).filter(|(point, _)| dir.starts_with(point));
    above.max_by_key(|(point, _)| point.len()).map(|(_, kind)| kind)
}

fn mitigations(dir: &Path) -> BTreeMap<String, String> {
    let Ok(entries) = fs::read_dir(dir) else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let text = fs::read_to_string(entry.path()).ok()?;
            Some((entry.file_name().to_string_lossy().into_owned(), text.trim().to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_mount_above_a_directory_is_its_file_system() {
        let mounts = "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n30 22 0:25 / /tmp rw shared:5 - tmpfs tmpfs rw\n";
        assert_eq!(file_system(mounts, Path::new("/tmp/bench")).unwrap(), "tmpfs");
        assert_eq!(file_system(mounts, Path::new("/tmpfiles")).unwrap(), "ext4");
    }

    #[test]
    fn the_choice_is_the_word_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise".into()));
        assert_eq!(chosen("nothing"), None);
    }

    #[test]
    fn this_host_has_a_kernel_processors_and_memory() {
        let host = collect(Path::new("/"), Path::new("/"));
        assert!(host.cpus > 0 && host.memory_mib > 0 && host.kernel.contains('.'), "{host:?}");
    }

    #[test]
    fn an_emulated_processor_is_told_from_a_virtual_one() {
        let dir = tempfile::tempdir().unwrap();
        let (guest, hardware) = ("flags\t\t: fpu hypervisor svm\n", "flags\t\t: fpu vmx\n");
        let emulator = |cpuinfo, signature| emulator(dir.path(), cpuinfo, signature);
        assert_eq!(emulator(guest, "TCGTCGTCGTCG").as_deref(), Some("QEMU TCG"));
        assert_eq!(emulator(guest, "KVMKVMKVM"), None);
        assert_eq!(emulator(hardware, "TCGTCGTCGTCG"), None, "without a hypervisor, the leaf is another one's");
        let dmi = dir.path().join("sys/class/dmi/id");
        fs::create_dir_all(&dmi).unwrap();
        fs::write(dmi.join("bios_vendor"), "The Bochs Project\n").unwrap();
        assert_eq!(emulator(hardware, "").as_deref(), Some("Bochs"));
    }

    #[test]
    fn missing_host_information_is_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let host = collect(dir.path(), Path::new("/"));
        assert_eq!((host.kernel.as_str(), host.kvm.as_str(), host.cpus), ("unknown", "none", 0));
    }
}
