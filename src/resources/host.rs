//! Facts about the host, for `husk doctor` and before a machine starts. Nothing here changes the host.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Result, bail};
use kvm_ioctls::{Cap, Kvm};

use super::passt;

/// The only version of the KVM API (Documentation/virt/kvm/api.rst, KVM_GET_API_VERSION).
pub const KVM_API_VERSION: i32 = 12;

/// How many times its memory, with swap, a host may give a single machine.
const OVERCOMMIT_MAX: u64 = 4;

/// Required capabilities.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "irqchip"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "CPUID"),
    (Cap::SetTssAddr, "TSS address"),
    (Cap::SetIdentityMapAddr, "identity map address"),
    (Cap::MpState, "MP state"),
];

/// Optional capabilities that a guest benefits from.
const WANTED: &[(Cap, &str)] = &[
    (Cap::TscDeadlineTimer, "TSC deadline timer"),
    (Cap::AdjustClock, "clock adjustment"),
    (Cap::GetTscKhz, "TSC frequency"),
    (Cap::VcpuEvents, "vCPU events"),
    (Cap::Xsave, "XSAVE"),
    (Cap::Xcrs, "XCRs"),
];

/// CPUID leaf 1, ECX: x2APIC (Intel SDM, CPUID).
const CPUID_1_ECX_X2APIC: u32 = 1 << 21;

/// The facts about a host.
#[derive(Debug, Clone)]
pub struct Host {
    /// The processor, from /proc/cpuinfo.
    pub processor: Processor,
    /// The loaded KVM module; there can be only one.
    pub module: Option<KvmModule>,
    /// /dev/kvm.
    pub kvm_device: Access,
    /// KVM's properties, if its device could be opened.
    pub kvm: Option<KvmAnswers>,
    /// Whether this user may create user namespaces.
    pub user_namespaces: bool,
    /// The cgroup hierarchy.
    pub cgroups: Cgroups,
    /// /dev/net/tun.
    pub tap: Access,
    /// /dev/vhost-net.
    pub vhost: Access,
    /// What is missing for user-mode networking.
    pub user_network: Option<passt::Missing>,
    /// The memory available for guests without swapping.
    pub memory_available_mib: Option<u64>,
}

/// A processor's name and virtualization features.
#[derive(Debug, Clone, Default)]
pub struct Processor {
    /// Marketing name.
    pub model: String,
    /// Long mode, i.e. an x86-64 processor.
    pub long_mode: bool,
    /// VMX is supported and visible to this kernel.
    pub vmx: bool,
    /// SVM is supported and visible to this kernel.
    pub svm: bool,
    /// Whether it is an Intel processor.
    pub intel: bool,
    /// Whether this kernel runs in a virtual machine.
    pub hypervisor: bool,
}

/// The KVM implementation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmModule {
    /// VMX.
    Intel,
    /// SVM.
    Amd,
    /// Pagetable Virtual Machine: without hardware virtualization, so only kernels that support it can run.
    Pvm,
}

/// Whether a device can be opened for reading and writing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// It can be opened.
    Open,
    /// The device does not exist.
    Missing,
    /// The user lacks permission.
    Denied {
        /// Whether this user may read.
        readable: bool,
        /// Whether this user may write.
        writable: bool,
        /// Whether members of a group other than root have both permissions.
        group_may: bool,
    },
    /// Opening it failed with another error.
    Failed(String),
}

/// KVM's properties.
#[derive(Debug, Clone)]
pub struct KvmAnswers {
    /// KVM_GET_API_VERSION.
    pub api_version: i32,
    /// Required capabilities that are missing.
    pub missing: Vec<&'static str>,
    /// Optional capabilities that are missing.
    pub unavailable: Vec<&'static str>,
    /// KVM_CAP_NR_VCPUS.
    pub recommended_vcpus: usize,
    /// KVM_CAP_MAX_VCPUS.
    pub max_vcpus: usize,
    /// The error of KVM_CREATE_VM, if any.
    pub create_error: Option<String>,
}

/// The cgroup setup of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroups {
    /// cgroup v2 only.
    V2 {
        /// Whether this user may create child cgroups.
        delegated: bool,
    },
    /// v1 for limits, with v2 mounted as well.
    Hybrid,
    /// v1 only.
    V1,
    /// Not mounted.
    None,
}

/// Warns about a host on which most kernels hang.
pub fn warn_of_pvm() {
    if runs_only_pvm_guests() {
        log::warn!("KVM on this host is the PVM module: only PVM-aware kernels boot, others hang (see `husk doctor`)");
    }
}

/// Whether the host's KVM runs only kernels that support PVM. Checks a single path, which is cheap enough for every
/// boot.
pub fn runs_only_pvm_guests() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

/// Collects all facts about this host. Takes about 20 ms, mostly for creating and closing a virtual machine.
pub fn probe() -> Host {
    Host { kvm: Kvm::new().ok().as_ref().map(ask_kvm), ..probe_files(Path::new("/")) }
}

/// Collects facts from files below `root`.
fn probe_files(root: &Path) -> Host {
    Host {
        processor: processor(&read(root, "proc/cpuinfo")),
        module: module(root),
        kvm_device: access(&root.join("dev/kvm")),
        kvm: None,
        user_namespaces: user_namespaces(root),
        cgroups: cgroups(root),
        tap: access(&root.join("dev/net/tun")),
        vhost: access(&root.join("dev/vhost-net")),
        user_network: passt::check().err(),
        memory_available_mib: memory_available_mib(&read(root, "proc/meminfo")),
    }
}

/// The content of a file; empty if it cannot be read, which has the same meaning.
fn read(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap_or_default()
}

/// The value of `key`, followed by spaces and a colon, in /proc/cpuinfo and /proc/meminfo.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == key).map(|(_, v)| v.trim())
}

fn processor(cpuinfo: &str) -> Processor {
    let flags: Vec<&str> = field(cpuinfo, "flags").unwrap_or_default().split_whitespace().collect();
    Processor {
        model: field(cpuinfo, "model name").unwrap_or("unknown").to_owned(),
        long_mode: flags.contains(&"lm"),
        vmx: flags.contains(&"vmx"),
        svm: flags.contains(&"svm"),
        intel: field(cpuinfo, "vendor_id") == Some("GenuineIntel"),
        hypervisor: flags.contains(&"hypervisor"),
    }
}

fn module(root: &Path) -> Option<KvmModule> {
    let modules = [("kvm_pvm", KvmModule::Pvm), ("kvm_intel", KvmModule::Intel), ("kvm_amd", KvmModule::Amd)];
    modules.into_iter().find(|(name, _)| root.join("sys/module").join(name).exists()).map(|(_, module)| module)
}

fn access(path: &Path) -> Access {
    let Err(error) = OpenOptions::new().read(true).write(true).open(path) else { return Access::Open };
    match error.kind() {
        ErrorKind::NotFound => Access::Missing,
        ErrorKind::PermissionDenied => Access::Denied {
            readable: File::open(path).is_ok(),
            writable: OpenOptions::new().write(true).open(path).is_ok(),
            group_may: fs::metadata(path).is_ok_and(|meta| meta.gid() != 0 && meta.mode() & 0o060 == 0o060),
        },
        _ => Access::Failed(error.to_string()),
    }
}

fn ask_kvm(kvm: &Kvm) -> KvmAnswers {
    let lacks = |caps: &[(Cap, &'static str)]| -> Vec<&'static str> {
        caps.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect()
    };
    let mut unavailable = lacks(WANTED);
    if !offers_x2apic(kvm) {
        unavailable.push("x2APIC");
    }
    KvmAnswers {
        api_version: kvm.get_api_version(),
        missing: lacks(NEEDED),
        unavailable,
        recommended_vcpus: kvm.get_nr_vcpus(),
        max_vcpus: kvm.get_max_vcpus(),
        create_error: kvm.create_vm().err().map(|error| io::Error::from_raw_os_error(error.errno()).to_string()),
    }
}

fn offers_x2apic(kvm: &Kvm) -> bool {
    let Ok(cpuid) = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES) else { return false };
    cpuid.as_slice().iter().any(|entry| entry.function == 1 && entry.ecx & CPUID_1_ECX_X2APIC != 0)
}

fn user_namespaces(root: &Path) -> bool {
    let number = |path| read(root, path).trim().parse::<u64>().ok();
    // The first one exists in every kernel; Debian's and Ubuntu's kernels have additional switches.
    number("proc/sys/user/max_user_namespaces").is_some_and(|most| most > 0)
        && number("proc/sys/kernel/unprivileged_userns_clone") != Some(0)
        && number("proc/sys/kernel/apparmor_restrict_unprivileged_userns").is_none_or(|restricted| restricted == 0)
}

fn cgroups(root: &Path) -> Cgroups {
    let mount = root.join("sys/fs/cgroup");
    if mount.join("cgroup.controllers").exists() {
        let own = read(root, "proc/self/cgroup");
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        // Write permission is what delegation means; nothing is written.
        let control = mount.join(own).join("cgroup.subtree_control");
        return Cgroups::V2 { delegated: OpenOptions::new().write(true).open(control).is_ok() };
    }
    if mount.join("unified/cgroup.procs").exists() {
        Cgroups::Hybrid
    } else if mount.join("memory").exists() || mount.join("cpu").exists() {
        Cgroups::V1
    } else {
        Cgroups::None
    }
}

/// Fails if a guest with `memory_mib` of memory is a mistake on this host: its kernel would take gigabytes for its page structures alone.
/// More than the host has is fine to some extent: few guests use all they have, and what they do not use returns to the host.
pub fn check_memory(memory_mib: u64) -> Result<()> {
    match memory_total_mib(&read(Path::new("/"), "proc/meminfo")) {
        Some(total_mib) if memory_mib > total_mib.saturating_mul(OVERCOMMIT_MAX) => {
            bail!("{memory_mib} MiB of memory: this host has {total_mib} MiB, including swap, use --memory with less")
        }
        _ => Ok(()),
    }
}

/// The memory of a host and its swap.
fn memory_total_mib(meminfo: &str) -> Option<u64> {
    let kib = |key| field(meminfo, key)?.strip_suffix(" kB")?.parse::<u64>().ok();
    Some(kib("MemTotal")?.saturating_add(kib("SwapTotal").unwrap_or(0)) >> 10)
}

fn memory_available_mib(meminfo: &str) -> Option<u64> {
    let kib: u64 = field(meminfo, "MemAvailable")?.strip_suffix(" kB")?.parse().ok()?;
    Some(kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> Host {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        probe_files(root.path())
    }

    #[test]
    fn an_empty_host_has_no_features() {
        let host = host(&[]);
        assert_eq!((host.module, host.kvm_device, host.tap), (None, Access::Missing, Access::Missing));
        assert_eq!((host.cgroups, host.memory_available_mib), (Cgroups::None, None));
        assert!(!host.user_namespaces && !host.processor.long_mode);
    }

    #[test]
    fn a_processor_is_known_by_its_flags() {
        let cpuinfo =
            "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: fpu lm vmx hypervisor\n";
        let processor = host(&[("proc/cpuinfo", cpuinfo)]).processor;
        assert_eq!(processor.model, "Xeon");
        assert!(processor.intel && processor.long_mode && processor.vmx && processor.hypervisor && !processor.svm);
    }

    #[test]
    fn the_pvm_module_is_distinguished_from_hardware_kvm() {
        assert_eq!(host(&[("sys/module/kvm_pvm/x", "")]).module, Some(KvmModule::Pvm));
        assert_eq!(host(&[("sys/module/kvm_amd/x", "")]).module, Some(KvmModule::Amd));
        assert_eq!(host(&[("sys/module/kvm/x", "")]).module, None);
    }

    #[test]
    fn cgroup_hierarchies_are_distinguished() {
        let v2 = [("sys/fs/cgroup/cgroup.controllers", "cpu memory"), ("proc/self/cgroup", "0::/user\n")];
        assert_eq!(host(&v2).cgroups, Cgroups::V2 { delegated: false });
        let delegated = [&v2[..], &[("sys/fs/cgroup/user/cgroup.subtree_control", "")]].concat();
        assert_eq!(host(&delegated).cgroups, Cgroups::V2 { delegated: true });
        let v1 = ("sys/fs/cgroup/memory/tasks", "");
        assert_eq!(host(&[v1]).cgroups, Cgroups::V1);
        assert_eq!(host(&[v1, ("sys/fs/cgroup/unified/cgroup.procs", "")]).cgroups, Cgroups::Hybrid);
    }

    #[test]
    fn any_setting_can_forbid_user_namespaces() {
        let most = ("proc/sys/user/max_user_namespaces", "95000\n");
        assert!(host(&[most]).user_namespaces);
        assert!(!host(&[("proc/sys/user/max_user_namespaces", "0\n")]).user_namespaces);
        assert!(!host(&[most, ("proc/sys/kernel/unprivileged_userns_clone", "0\n")]).user_namespaces);
        assert!(!host(&[most, ("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")]).user_namespaces);
    }

    #[test]
    fn many_times_the_memory_of_a_host_with_its_swap_is_refused() {
        assert_eq!(memory_total_mib("MemTotal:  2097152 kB\nSwapTotal: 1048576 kB\n"), Some(3072));
        assert_eq!((memory_total_mib("MemTotal: 1024 kB\n"), memory_total_mib("")), (Some(1), None));
        check_memory(1).unwrap();
        let total_mib = memory_total_mib(&read(Path::new("/"), "proc/meminfo")).unwrap();
        check_memory(2 * total_mib).unwrap();
        let error = check_memory(u64::MAX).unwrap_err().to_string();
        assert!(error.contains("MiB, including swap, use --memory with less"), "{error}");
    }

    #[test]
    fn available_memory_is_read_in_kib() {
        assert_eq!(memory_available_mib("MemTotal: 9 kB\nMemAvailable:    2097152 kB\n"), Some(2048));
    }
}
