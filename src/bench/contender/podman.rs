//! Podman: a daemonless engine, rootful or rootless.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustix::process::{Resource, Rlimit, getrlimit};

use super::super::report::{self, Isolation};
use super::program::{Program, major, which};
use super::{Contender, Fixture, Job, Launch, Unsupported, engine, example_job, is_root, oci, strings, work_dir};
use crate::resources::net::TUN_PATH;
use crate::resources::programs;
use crate::sandbox::cgroup::child;

/// The mode of Podman.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Run by root.
    Rootful,
    /// Run by another user.
    Rootless,
}

/// Podman in one mode.
pub struct Podman {
    mode: Mode,
    program: Program,
}

const SUBDIR: &str = "podman";
/// Podman's own default limit of processes.
const LIMIT_MAX: u64 = 1 << 15;

impl Podman {
    /// Detects it. The mode of other users is reported as unavailable.
    pub fn find(mode: Mode) -> Podman {
        let program = match (mode, is_root()) {
            (Mode::Rootful, false) => {
                Program::missing("husk bench is not running as root", Some("sudo husk bench ..."))
            }
            (Mode::Rootless, true) => {
                Program::missing("husk bench is running as root", Some("husk bench ..., as a user"))
            }
            (Mode::Rootless, false) if !which("newuidmap") => Program::missing(
                "newuidmap is not installed, which rootless containers need",
                Some("sudo apt-get install uidmap"),
            ),
            _ => with_its_runtime(
                Program::find("podman", &["--version"], "sudo apt-get install podman"),
                oci::is_unsupported_here,
                runtime,
            ),
        };
        Podman { mode, program }
    }
}

/// Marks Podman as unavailable if its runtime does not support this host.
fn with_its_runtime(
    program: Program,
    is_unsupported: impl Fn(&str) -> bool,
    runtime: impl Fn() -> Option<String>,
) -> Program {
    // `podman info` is slow, and only crun has such a restriction.
    if program.version.is_err() || !is_unsupported(oci::CRUN) {
        return program;
    }
    match runtime().filter(|name| is_unsupported(name)) {
        Some(name) => Program::missing(
            &format!("its runtime is {name}, which {}", oci::UNSUPPORTED),
            Some(oci::UNIFIED_HIERARCHY),
        ),
        None => program,
    }
}

/// Returns the name of the configured OCI runtime.
fn runtime() -> Option<String> {
    let ask = ["10", "podman", "info", "--format", "{{.Host.OCIRuntime.Name}}"];
    let printed = programs::output("timeout", &ask).inspect_err(|error| log::info!("{error:#}"));
    Some(printed.ok()?.trim().to_owned())
}

/// Returns the runtime directory. Podman rejects paths longer than 50 bytes.
fn run_dir(dir: &Path) -> PathBuf {
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = if is_root() { "/run".into() } else { session.unwrap_or("/tmp".into()) };
    base.join(dir.file_name().unwrap_or_default())
}

/// Builds a podman command line with its own storage, so that the user's storage is not touched.
fn line(dir: &Path, arguments: &[&str]) -> Vec<String> {
    let at = |name: &str| dir.join(SUBDIR).join(name).display().to_string();
    let run = run_dir(dir).display().to_string();
    let mut line = strings(&["podman", "--root", &at("root"), "--runroot", &run, "--tmpdir", &at("tmp")]);
    line.extend(strings(&["--network-config-dir", &at("networks"), "--events-backend", "none"]));
    if is_root() {
        line.extend(strings(&["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"]));
    }
    line.extend(strings(arguments));
    line
}

/// Limits that are not above those of this process. Podman's defaults may be higher, and without CAP_SYS_RESOURCE
/// limits cannot be raised.
fn limits() -> Vec<String> {
    let kinds = [("nofile", Resource::Nofile), ("nproc", Resource::Nproc)];
    let limit = |(name, kind)| {
        let Rlimit { current, maximum } = getrlimit(kind);
        let limited = |limit: Option<u64>| limit.unwrap_or(u64::MAX).min(LIMIT_MAX);
        format!("{name}={}:{}", limited(current), limited(maximum))
    };
    kinds.into_iter().map(limit).flat_map(|limit| strings(&["--ulimit", &limit])).collect()
}

fn output(line: &[String]) -> Result<String> {
    let words: Vec<&str> = line.iter().map(String::as_str).collect();
    let (program, arguments) = words.split_first().unwrap_or((&"", &[]));
    programs::output(program, arguments)
}

impl Podman {
    fn command_line(&self, fixture: &Fixture, scratch: Option<&Path>, job: &Job) -> Vec<String> {
        let root = format!("{}:O", fixture.root.display());
        let mut line = line(&fixture.dir, &["run"]);
        line.extend(engine::flags(fixture, self.name(), scratch, job));
        line.extend(limits());
        if is_root() {
            line.extend(strings(&["--cgroup-parent", &format!("/{}-podman", fixture.id())]));
        }
        if self.mode == Mode::Rootful && job.port.is_some() {
            line.extend(strings(&["--network", &fixture.id()]));
        }
        line.extend(strings(&["--rootfs", &root]));
        line.extend(job.command.iter().cloned());
        line
    }

    /// Returns why rootless containers have no network here. Podman uses slirp4netns, and pasta since version 5; both
    /// need a tap device.
    fn network_problem(&self) -> Option<String> {
        if self.mode == Mode::Rootful {
            return None;
        }
        let (program, package) = network_program(self.program.version.as_deref().unwrap_or_default());
        if !which(program) {
            return Some(format!("{program} is not installed: type `sudo apt-get install {package}`"));
        }
        let tap = File::options().read(true).write(true).open(TUN_PATH).err();
        tap.map(|error| format!("{program} cannot open {TUN_PATH} ({error}): type `sudo chmod 666 {TUN_PATH}`"))
    }
}

/// Returns the program that sets up rootless networks in this version of Podman, and its package.
fn network_program(version: &str) -> (&'static str, &'static str) {
    if major(version) < 5 { ("slirp4netns", "slirp4netns") } else { ("pasta", "passt") }
}

impl Contender for Podman {
    fn name(&self) -> &str {
        match self.mode {
            Mode::Rootful => "podman",
            Mode::Rootless => "podman-rootless",
        }
    }

    fn isolation(&self) -> Isolation {
        Isolation::Container
    }

    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo {
        let mut notes = vec!["its root is an overlay on the image's files (--rootfs), in separate storage".to_owned()];
        notes.extend(self.unenforced_limits(fixture));
        self.program.describe(
            self.name(),
            Isolation::Container,
            self.command_line(fixture, None, &example_job()),
            notes,
        )
    }

    fn prepare(&mut self, fixture: &Fixture) -> Result<()> {
        // The first command initializes the storage.
        output(&line(&fixture.dir, &["ps", "--quiet"])).map(drop)
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        if let Some(problem) = self.network_problem().filter(|_| job.port.is_some()) {
            return Err(Unsupported(problem).into());
        }
        if self.mode == Mode::Rootful && job.port.is_some() && !has_network(&fixture.dir) {
            // Equivalent to Podman's default network, whose bridge would persist after the run.
            output(&line(&fixture.dir, &["network", "create", "--disable-dns", &fixture.id()]))?;
        }
        let (id, bench) = (fixture.instance_name(self.name(), job), fixture.dir.clone());
        // Containers that have ended are already removed.
        let remove = move || output(&line(&bench, &["rm", "--force", "--ignore", "--time", "0", &id])).map(drop);
        engine::launch(fixture, self.name(), job, |scratch| self.command_line(fixture, scratch, job), remove)
    }

    /// The monitor (conmon) is detached, and the container is a child of the monitor.
    fn extra_processes(&self, fixture: &Fixture, job: &Job) -> Vec<u32> {
        let id = fixture.instance_name(self.name(), job);
        let format = "{{.State.Pid}} {{.State.ConmonPid}}";
        let text = output(&line(&fixture.dir, &["inspect", "--format", format, &id])).unwrap_or_default();
        text.split_whitespace().filter_map(|word| word.parse().ok()).filter(|&process| process > 0).collect()
    }

    fn unenforced_limits(&self, _fixture: &Fixture) -> Option<String> {
        let has_none = self.mode == Mode::Rootless && !Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        has_none.then(|| "CPU and memory limits are not enforced: this host uses control groups v1".to_owned())
    }

    fn clean_up(&mut self, fixture: &Fixture) -> Result<()> {
        remove_all(&fixture.dir)
    }
}

/// Whether the run's network exists.
fn has_network(dir: &Path) -> bool {
    let id = work_dir::id_of(dir);
    output(&line(dir, &["network", "exists", &id])).is_ok()
}

fn remove_all(dir: &Path) -> Result<()> {
    if !dir.join(SUBDIR).exists() {
        return Ok(());
    }
    output(&line(dir, &["rm", "--all", "--force", "--time", "0"]))?;
    let id = work_dir::id_of(dir);
    child::remove_left_behind(&format!("{id}-podman"))?;
    if has_network(dir) {
        output(&line(dir, &["network", "rm", &id]))?;
    }
    if !is_root() {
        // Files in the storage belong to subordinate users; `system migrate` stops the process that holds the user
        // namespace.
        let (run, storage) = (run_dir(dir).display().to_string(), dir.join(SUBDIR).join("root").display().to_string());
        output(&line(
            dir,
            &["unshare", "rm", "-rf", &format!("{run}/overlay-containers"), &format!("{run}/vfs-containers"), &storage],
        ))?;
        output(&line(dir, &["system", "migrate"]))?;
    }
    work_dir::remove(&run_dir(dir))?;
    work_dir::remove(&dir.join(SUBDIR))
}

/// Removes the containers of a killed run.
pub fn remove_leftovers(dir: &Path) {
    if which("podman")
        && let Err(error) = remove_all(dir)
    {
        log::warn!("{error:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_whose_runtime_refuses_the_host_is_absent_for_that_reason() {
        let podman = || Program { version: Ok("4.3.1".into()) };
        let on_hybrid = |name: &str| name == "crun";
        let reason = |runtime: Option<&str>| {
            let printed = || runtime.map(str::to_owned);
            with_its_runtime(podman(), on_hybrid, printed).version.map_err(|missing| missing.reason)
        };
        assert_eq!(reason(Some("crun")).unwrap_err(), format!("its runtime is crun, which {}", oci::UNSUPPORTED));
        assert!(reason(Some("runc")).is_ok() && reason(None).is_ok());
        let elsewhere = with_its_runtime(podman(), |_| false, || panic!("not queried"));
        assert_eq!(elsewhere, podman());
        let missing = Program::missing("there is none", None);
        assert_eq!(with_its_runtime(missing.clone(), on_hybrid, || panic!("not queried")), missing);
    }

    #[test]
    fn the_rootless_network_helper_depends_on_the_version() {
        for (version, program) in [("4.3.1", "slirp4netns"), ("5.4.2", "pasta"), ("10.0.0-dev", "pasta")] {
            assert_eq!(network_program(version).0, program, "{version}");
        }
    }
}
