//! OCI runtimes without an engine: crun and runc.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::super::report::{self, Isolation};
use super::network::VethPair;
use super::program::Program;
use super::setup;
use super::{Contender, ENVIRONMENT, Fixture, Job, Launch, SCRATCH, command, example_job, is_root, strings, work_dir};
use crate::resources::programs;

/// The name of crun, also that of its package.
pub const CRUN: &str = "crun";
/// The name of runc, also that of its package.
pub const RUNC: &str = "runc";

/// The default capabilities of Docker and Podman (capabilities(7)).
const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// The period of the CPU quota.
const PERIOD_US: u64 = 100_000;

/// Why a runtime cannot be used on this host.
pub const UNSUPPORTED: &str = "does not support hosts with hybrid control groups (v1 and v2)";
/// How to make it usable.
pub const UNIFIED_HIERARCHY: &str = "boot the host with systemd.unified_cgroup_hierarchy=1";

/// An OCI runtime.
pub struct Runtime {
    name: &'static str,
    program: Program,
}

impl Runtime {
    /// Detects it.
    pub fn find(name: &'static str) -> Runtime {
        let program = Program::find(name, &["--version"], &format!("sudo apt-get install {name}"));
        if program.version.is_ok() && is_unsupported_here(name) {
            return Runtime { name, program: Program::missing(&format!("it {UNSUPPORTED}"), Some(UNIFIED_HIERARCHY)) };
        }
        Runtime { name, program }
    }

    /// Builds a command line of the runtime with its state directory.
    fn line(&self, fixture: &Fixture, arguments: &[&str]) -> Vec<String> {
        let state = fixture.dir.join(self.name).display().to_string();
        let mut line = strings(&[self.name, "--root", &state]);
        line.extend(strings(arguments));
        line
    }
}

impl Contender for Runtime {
    fn name(&self) -> &str {
        self.name
    }

    fn isolation(&self) -> Isolation {
        Isolation::Container
    }

    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo {
        let mut notes: Vec<String> = setup::root_note().into_iter().collect();
        if is_root() {
            notes.push(
                "its root overlay is mounted before the measurement, and there is no seccomp filter; engines do both"
                    .into(),
            );
        }
        notes.extend(self.unenforced_limits(fixture));
        let job = example_job();
        let line = self.line(fixture, &["run", "--bundle", "BUNDLE", &fixture.instance_name(self.name, &job)]);
        self.program.describe(self.name, Isolation::Container, line, notes)
    }

    fn prepare(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        let veth = VethPair::create(fixture, job)?;
        let dir = fixture.instance_dir(self.name, job)?;
        let bundle = Bundle {
            id: &fixture.instance_name(self.name, job),
            root: &setup::root(fixture, &dir)?,
            scratch: setup::scratch(job, &dir)?.as_deref(),
            network: veth.as_ref().map(VethPair::path).as_deref(),
            user: (!is_root()).then(user),
        }
        .config(fixture, job);
        let path = dir.join("config.json");
        fs::write(&path, serde_json::to_vec(&bundle)?).with_context(|| format!("write {}", path.display()))?;
        let id = fixture.instance_name(self.name, job);
        let bundle = dir.display().to_string();
        let command = command(&self.line(fixture, &["run", "--bundle", &bundle, &id]))?;
        let address = job.port.zip(veth.as_ref()).map(|(port, veth)| veth.address(port));
        let delete = self.line(fixture, &["delete", "--force", &id]);
        let state = fixture.dir.join(self.name).join(&id);
        let clean_up = move || {
            // Containers that have ended are already deleted.
            if state.exists() {
                run(&delete)?;
            }
            veth.map_or(Ok(()), |veth| veth.remove())?;
            work_dir::remove(&dir)
        };
        Ok(Launch { command, passes_exit_code: true, address, clean_up: Some(Box::new(clean_up)) })
    }

    fn unenforced_limits(&self, _fixture: &Fixture) -> Option<String> {
        (!is_root()).then(|| "CPU and memory limits are not enforced: not running as root".to_owned())
    }

    fn clean_up(&mut self, fixture: &Fixture) -> Result<()> {
        work_dir::remove(&fixture.dir.join(self.name))
    }
}

/// Whether the runtime cannot run containers on this host: crun does not support hybrid cgroup hierarchies with
/// controllers in v2.
pub fn is_unsupported_here(name: &str) -> bool {
    name == CRUN && is_hybrid()
}

fn is_hybrid() -> bool {
    fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers").is_ok_and(|names| !names.trim().is_empty())
}

fn run(line: &[String]) -> Result<()> {
    let (program, arguments) = line.split_first().context("an empty command line")?;
    programs::run(program, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Deletes the containers of a killed run.
pub fn remove_leftovers(dir: &Path) {
    for runtime in [CRUN, RUNC] {
        let state = dir.join(runtime);
        for id in fs::read_dir(&state).into_iter().flatten().flatten().map(|entry| entry.file_name()) {
            let (state, id) = (state.display().to_string(), id.to_string_lossy());
            if let Err(error) = programs::run(runtime, &["--root", &state, "delete", "--force", &id]) {
                log::warn!("{error:#}");
            }
        }
    }
}

fn user() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// The variable parts of a container configuration (OCI runtime specification 1.0.2, config.md).
struct Bundle<'a> {
    id: &'a str,
    root: &'a Path,
    scratch: Option<&'a Path>,
    network: Option<&'a Path>,
    /// The host's user and group that root is mapped to, in a user namespace.
    user: Option<(u32, u32)>,
}

impl Bundle<'_> {
    fn config(&self, fixture: &Fixture, job: &Job) -> Value {
        let environment: Vec<String> = ENVIRONMENT.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let capabilities = CAPABILITIES;
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": { "uid": 0, "gid": 0 },
                "args": job.command,
                "env": environment,
                "cwd": "/",
                "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            },
            "root": { "path": self.root, "readonly": self.user.is_some() },
            "hostname": "husk-bench",
            "mounts": self.mounts(),
            "linux": self.linux(fixture),
        })
    }

    /// The mounts of `runc spec`, without cgroups.
    fn mounts(&self) -> Vec<Value> {
        let mount = |kind: &str, at: &str, options: &[&str]| json!({ "destination": at, "type": kind, "source": kind, "options": options });
        let mut mounts = vec![
            mount("proc", "/proc", &[]),
            mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("devpts", "/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("tmpfs", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
            mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        ];
        if self.user.is_some() {
            mounts.push(mount("tmpfs", "/tmp", &["nosuid", "nodev", "mode=1777"]));
        }
        if let Some(scratch) = self.scratch {
            mounts
                .push(json!({ "destination": SCRATCH, "type": "bind", "source": scratch, "options": ["bind", "rw"] }));
        }
        mounts
    }

    fn linux(&self, fixture: &Fixture) -> Value {
        let mut namespaces: Vec<Value> =
            ["pid", "ipc", "uts", "mount"].iter().map(|kind| json!({ "type": kind })).collect();
        namespaces.push(match self.network {
            Some(path) => json!({ "type": "network", "path": path }),
            None => json!({ "type": "network" }),
        });
        let mut linux = json!({
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        });
        match self.user {
            Some((user, group)) => {
                namespaces.push(json!({ "type": "user" }));
                linux["uidMappings"] = json!([{ "containerID": 0, "hostID": user, "size": 1 }]);
                linux["gidMappings"] = json!([{ "containerID": 0, "hostID": group, "size": 1 }]);
            }
            None => {
                linux["cgroupsPath"] = json!(format!("/{}", self.id));
                linux["resources"] = resources(fixture);
            }
        }
        linux["namespaces"] = Value::Array(namespaces);
        linux
    }
}

fn resources(fixture: &Fixture) -> Value {
    json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        "cpu": { "quota": u64::from(fixture.millicpus()) * PERIOD_US / 1000, "period": PERIOD_US },
        "memory": { "limit": fixture.limits.memory_mib << 20 },
    })
}
