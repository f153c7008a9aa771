//! Evaluates a host's facts: what they mean for guests, and how to fix problems.

use super::{Check, Status};
use crate::config::MAX_CPUS;
use crate::foreign;
use crate::resources::host::{Access, Cgroups, Host, KVM_API_VERSION, KvmAnswers, KvmModule, Processor};
use crate::resources::passt;
use crate::sandbox;

/// The default machine's memory, plus what the host needs.
const COMFORTABLE_MEMORY_MIB: u64 = 1024;

/// All checks, from the processor upwards. A check that depends on a failed one is omitted, since the cause is already
/// reported.
pub fn all(host: &Host) -> Vec<Check> {
    let mut checks = vec![processor(&host.processor), nesting(&host.processor), module(host), kvm_device(host)];
    if let Some(kvm) = &host.kvm {
        checks.extend([api(kvm), needed(kvm), wanted(kvm), vcpus(kvm), machine(kvm)]);
    }
    let lacks = sandbox::probe().unwrap_or_else(|error| vec![foreign::one_line(&format!("{error:#}"))]);
    let lacks: Vec<String> = lacks.iter().map(|layer| foreign::one_line(layer)).collect();
    let may_unshare = !lacks.iter().any(|layer| layer.starts_with("namespaces"));
    checks.extend([memory(host), user_namespaces(host, may_unshare), cgroups(host.cgroups)]);
    checks.extend([tap(&host.tap), vhost(&host.vhost), sandbox(&lacks), user_network(host.user_network)]);
    checks
}

fn ok(name: &'static str, detail: impl Into<String>) -> Check {
    Check { name, status: Status::Ok, detail: detail.into(), remedy: None }
}

fn warn(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check { name, status: Status::Warn, detail: detail.into(), remedy: Some(remedy.into()) }
}

fn fail(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check { name, status: Status::Fail, detail: detail.into(), remedy: Some(remedy.into()) }
}

fn processor(processor: &Processor) -> Check {
    if processor.long_mode {
        ok("processor", format!("x86-64, {}", processor.model))
    } else {
        fail("processor", format!("not an x86-64 processor: {}", processor.model), "use an x86-64 host")
    }
}

fn nesting(processor: &Processor) -> Check {
    let detail = if processor.hypervisor {
        "this host is a virtual machine: guest exits are slower"
    } else {
        "none: this host runs on bare metal"
    };
    ok("nesting", detail)
}

/// How to enable hardware virtualization.
fn load_module(processor: &Processor) -> &'static str {
    match (processor.vmx, processor.svm, processor.hypervisor) {
        (true, _, _) => "sudo modprobe kvm_intel",
        (_, true, _) => "sudo modprobe kvm_amd",
        (_, _, true) => "enable nested virtualization in the hypervisor that runs this host, or use another host",
        _ if processor.intel => "enable Intel VT-x in the firmware (BIOS/UEFI) setup, then: sudo modprobe kvm_intel",
        _ => "enable AMD-V (SVM) in the firmware (BIOS/UEFI) setup, then: sudo modprobe kvm_amd",
    }
}

fn module(host: &Host) -> Check {
    const NAME: &str = "KVM module";
    match host.module {
        Some(KvmModule::Intel) => ok(NAME, "kvm_intel (VMX)"),
        Some(KvmModule::Amd) => ok(NAME, "kvm_amd (SVM)"),
        Some(KvmModule::Pvm) => {
            let load = load_module(&host.processor);
            let unload = if load.starts_with("sudo") { "sudo modprobe -r kvm_pvm && " } else { "" };
            let detail = "kvm_pvm: only runs PVM-aware guest kernels, a stock kernel would hang";
            fail(NAME, detail, format!("{unload}{load}"))
        }
        // If KVM is built in, there is no vendor module; the device is what matters.
        None if host.kvm.is_some() => ok(NAME, "built into the kernel"),
        None => fail(NAME, "neither kvm_intel nor kvm_amd is loaded", load_module(&host.processor)),
    }
}

fn kvm_device(host: &Host) -> Check {
    const NAME: &str = "/dev/kvm";
    match &host.kvm_device {
        Access::Open => ok(NAME, "readable and writable"),
        Access::Missing if host.module.is_some() => fail(
            NAME,
            "missing, although KVM is loaded",
            "in a container: start it with --device /dev/kvm; elsewhere: sudo mknod /dev/kvm c 10 232",
        ),
        Access::Missing => fail(NAME, "missing", load_module(&host.processor)),
        Access::Denied { readable, writable, group_may } => {
            let can = |may| if may { "" } else { "not " };
            let detail = format!("{}readable and {}writable by this user", can(*readable), can(*writable));
            fail(NAME, detail, join_group(NAME, *group_may))
        }
        Access::Failed(error) => fail(NAME, format!("cannot be opened: {error}"), load_module(&host.processor)),
    }
}

fn api(kvm: &KvmAnswers) -> Check {
    if kvm.api_version == KVM_API_VERSION {
        ok("KVM API", format!("version {KVM_API_VERSION}"))
    } else {
        let detail = format!("version {}, not {KVM_API_VERSION}", kvm.api_version);
        fail("KVM API", detail, "boot a host kernel from 2007 or later")
    }
}

fn needed(kvm: &KvmAnswers) -> Check {
    if kvm.missing.is_empty() {
        ok("capabilities", "all required ones are available")
    } else {
        fail("capabilities", format!("missing: {}", kvm.missing.join(", ")), "boot host kernel 4.13 or later")
    }
}

fn wanted(kvm: &KvmAnswers) -> Check {
    if kvm.unavailable.is_empty() {
        ok("extras", "TSC deadline timer, x2APIC, clock and state calls")
    } else {
        let detail = format!("not available: {}", kvm.unavailable.join(", "));
        warn("extras", detail, "guests run without them; a newer host kernel or processor may provide them")
    }
}

fn vcpus(kvm: &KvmAnswers) -> Check {
    let most = kvm.max_vcpus.min(MAX_CPUS as usize);
    ok("vCPUs", format!("{} recommended, {most} maximum", kvm.recommended_vcpus.min(most)))
}

fn machine(kvm: &KvmAnswers) -> Check {
    match &kvm.create_error {
        None => ok("machine", "created successfully"),
        Some(error) => fail(
            "machine",
            format!("KVM_CREATE_VM: {error}"),
            "stop other hypervisors (VirtualBox, VMware), then try again",
        ),
    }
}

fn memory(host: &Host) -> Check {
    match host.memory_available_mib {
        None => warn("memory", "unknown: /proc/meminfo has no MemAvailable", "mount -t proc proc /proc"),
        Some(mib) if mib < COMFORTABLE_MEMORY_MIB => {
            warn("memory", format!("{mib} MiB available"), "free some memory, or boot with --memory 64M")
        }
        Some(mib) => ok("memory", format!("{mib} MiB available")),
    }
}

/// `may_unshare` says whether this process could make one.
fn user_namespaces(host: &Host, may_unshare: bool) -> Check {
    if host.user_namespaces && may_unshare {
        ok("user namespaces", "allowed")
    } else if host.user_namespaces {
        let remedy =
            "run husk outside of the container or namespace that it is in, or allow that to create user namespaces";
        warn("user namespaces", "allowed by this host's settings, but not to this process", remedy)
    } else {
        let remedy = "sudo sysctl -w user.max_user_namespaces=65536 kernel.unprivileged_userns_clone=1 \
                      kernel.apparmor_restrict_unprivileged_userns=0 (skip the ones that do not exist)";
        warn("user namespaces", "not allowed for this user", remedy)
    }
}

fn cgroups(cgroups: Cgroups) -> Check {
    let v2 = "boot the host with systemd.unified_cgroup_hierarchy=1";
    match cgroups {
        Cgroups::V2 { delegated: true } => ok("cgroups", "version 2, delegated to this user"),
        Cgroups::V2 { delegated: false } => warn(
            "cgroups",
            "version 2, not delegated to this user",
            "systemd-run --user --scope -p Delegate=yes husk ...",
        ),
        Cgroups::Hybrid => warn("cgroups", "version 1, with an empty version 2 hierarchy (hybrid)", v2),
        Cgroups::V1 => warn("cgroups", "version 1", v2),
        Cgroups::None => warn("cgroups", "not mounted", "sudo mount -t cgroup2 none /sys/fs/cgroup"),
    }
}

fn tap(access: &Access) -> Check {
    const NAME: &str = "/dev/net/tun";
    match access {
        Access::Open => ok(NAME, "readable and writable"),
        Access::Missing => warn(NAME, "missing: no tap devices", "sudo modprobe tun"),
        Access::Denied { .. } => warn(NAME, "permission denied: no tap devices", "sudo chmod 666 /dev/net/tun"),
        Access::Failed(error) => warn(NAME, format!("cannot be opened: {error}"), "sudo modprobe tun"),
    }
}

fn vhost(access: &Access) -> Check {
    const NAME: &str = "/dev/vhost-net";
    let load = "sudo modprobe vhost_net";
    match access {
        Access::Open => ok(NAME, "readable and writable"),
        Access::Missing => warn(NAME, "missing: networking on tap devices is slower", load),
        Access::Denied { group_may, .. } => {
            let detail = "permission denied: networking on tap devices is slower";
            warn(NAME, detail, join_group(NAME, *group_may))
        }
        Access::Failed(error) => warn(NAME, format!("cannot be opened: {error}"), load),
    }
}

/// How to get access to a device that group members can open, or could open after a change.
fn join_group(device: &str, group_may: bool) -> String {
    let open = format!("sudo chgrp kvm {device} && sudo chmod 660 {device} && ");
    format!("{}sudo usermod -aG kvm $USER, then log in again", if group_may { "" } else { &open })
}

/// The layers of the sandbox.
fn sandbox(lacks: &[String]) -> Check {
    const NAME: &str = "sandbox";
    let remedy = match &*lacks.join("; ") {
        "" => return ok(NAME, "all layers: namespaces, an empty root, Landlock, no privileges, system call filters"),
        lacks if lacks.contains("Landlock") && !lacks.contains("namespaces") => {
            "boot with landlock in the lsm= parameter"
        }
        _ => "sudo sysctl user.max_user_namespaces=10000 (in a container: allow it to create user namespaces)",
    };
    warn(NAME, format!("without {}", lacks.join("; ")), remedy)
}

fn user_network(missing: Option<passt::Missing>) -> Check {
    const NAME: &str = "passt";
    match missing {
        None => ok(NAME, "installed: user-mode networking is available"),
        Some(passt::Missing::Passt) => warn(
            NAME,
            "not installed: no user-mode networking, which `husk run` uses by default",
            "sudo apt-get install passt",
        ),
        Some(passt::Missing::Route) => warn(
            NAME,
            "no default route: no user-mode networking, which `husk run` uses by default",
            "connect this host to a network",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Host {
        Host {
            processor: Processor { long_mode: true, svm: true, ..Processor::default() },
            module: Some(KvmModule::Amd),
            kvm_device: Access::Open,
            kvm: Some(KvmAnswers {
                api_version: 12,
                missing: vec![],
                unavailable: vec![],
                recommended_vcpus: 4,
                max_vcpus: 1024,
                create_error: None,
            }),
            user_namespaces: true,
            cgroups: Cgroups::V2 { delegated: true },
            tap: Access::Open,
            vhost: Access::Open,
            user_network: None,
            memory_available_mib: Some(4096),
        }
    }

    fn failing(host: &Host) -> Vec<Check> {
        all(host).into_iter().filter(|check| check.status == Status::Fail).collect()
    }

    #[test]
    fn a_good_host_passes_every_check() {
        assert!(all(&good()).iter().all(|check| check.status == Status::Ok));
    }

    #[test]
    fn a_namespace_that_cannot_be_made_is_not_called_allowed() {
        assert_eq!(user_namespaces(&good(), true).status, Status::Ok);
        let check = user_namespaces(&good(), false);
        assert!(check.status == Status::Warn && check.detail.contains("not to this process"), "{check:?}");
    }

    #[test]
    fn optional_features_never_fail() {
        let host = Host {
            user_namespaces: false,
            cgroups: Cgroups::None,
            tap: Access::Missing,
            vhost: Access::Missing,
            user_network: Some(passt::Missing::Passt),
            memory_available_mib: Some(100),
            ..good()
        };
        assert_eq!(failing(&host), []);
        assert_eq!(all(&host).iter().filter(|check| check.status == Status::Warn).count(), 6);
    }

    #[test]
    fn pvm_fails_although_its_device_opens() {
        let host = Host { module: Some(KvmModule::Pvm), ..good() };
        let [check] = &failing(&host)[..] else { panic!() };
        assert_eq!(check.remedy.as_deref(), Some("sudo modprobe -r kvm_pvm && sudo modprobe kvm_amd"));

        let nested = Processor { hypervisor: true, svm: false, ..good().processor };
        let [check] = &failing(&Host { processor: nested, ..host })[..] else { panic!() };
        assert!(check.remedy.as_ref().is_some_and(|remedy| remedy.contains("nested virtualization")));
    }

    #[test]
    fn a_missing_device_names_what_is_missing_below_it() {
        let host = Host { module: None, kvm_device: Access::Missing, kvm: None, ..good() };
        let remedies: Vec<_> = failing(&host).into_iter().filter_map(|check| check.remedy).collect();
        assert_eq!(remedies, ["sudo modprobe kvm_amd"; 2]);

        let [in_container] = &failing(&Host { module: Some(KvmModule::Amd), ..host.clone() })[..] else { panic!() };
        assert!(in_container.remedy.as_ref().is_some_and(|remedy| remedy.contains("--device /dev/kvm")));

        let dark = Processor { svm: false, intel: true, ..good().processor };
        let [module, _] = &failing(&Host { processor: dark, ..host })[..] else { panic!() };
        assert!(module.remedy.as_ref().is_some_and(|remedy| remedy.contains("VT-x") && remedy.contains("kvm_intel")));
    }

    #[test]
    fn a_denied_device_names_the_group_to_join() {
        let denied = |group_may| {
            let kvm_device = Access::Denied { readable: true, writable: false, group_may };
            failing(&Host { kvm_device, kvm: None, ..good() })
        };
        let [check] = &denied(true)[..] else { panic!() };
        assert_eq!(check.detail, "readable and not writable by this user");
        assert_eq!(check.remedy.as_deref(), Some("sudo usermod -aG kvm $USER, then log in again"));
        let [check] = &denied(false)[..] else { panic!() };
        assert!(check.remedy.as_ref().is_some_and(|remedy| remedy.starts_with("sudo chgrp kvm /dev/kvm")));
    }

    #[test]
    fn each_missing_kvm_feature_fails_with_a_remedy() {
        let lacks: [fn(&mut KvmAnswers); 3] =
            [|kvm| kvm.api_version = 11, |kvm| kvm.missing.push("irqfd"), |kvm| kvm.create_error = Some("busy".into())];
        for lack in lacks {
            let mut host = good();
            host.kvm.as_mut().map(lack);
            let [check] = &failing(&host)[..] else { panic!() };
            assert!(check.remedy.is_some(), "{check:?}");
        }
    }
}
