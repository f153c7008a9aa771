//! Podman: an engine without a daemon, run by root or by a user.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustix::process::{Resource, Rlimit, getrlimit};

use super::super::result::{self, Walls};
use super::program::{Program, major, which};
use super::{Contender, Ground, Job, Launch, Unable, bench_id, engine, ground, is_root, oci, sample, words};
use crate::resources::net::TUN_PATH;
use crate::resources::programs;
use crate::sandbox::cgroup::pen;

/// Whose engine it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Root's.
    Own,
    /// A user's.
    Rootless,
}

/// Podman, as whoever runs the bench.
pub struct Podman {
    mode: Mode,
    program: Program,
}

const FOLDER: &str = "podman";
/// What Podman limits itself to, of processes.
const LIMIT_MAX: u64 = 1 << 15;

impl Podman {
    /// Looks for it. In the mode that is not this user's it is absent.
    pub fn find(mode: Mode) -> Podman {
        let program = match (mode, is_root()) {
            (Mode::Own, false) => Program::missing("husk bench is not run by root", Some("sudo husk bench ...")),
            (Mode::Rootless, true) => Program::missing("husk bench is run by root", Some("husk bench ..., as a user")),
            (Mode::Rootless, false) if !which("newuidmap") => Program::missing(
                "there is no newuidmap, by which a user has a container's users",
                Some("sudo apt-get install uidmap"),
            ),
            _ => with_its_runtime(
                Program::find("podman", &["--version"], "sudo apt-get install podman"),
                oci::refuses_host,
                runtime,
            ),
        };
        Podman { mode, program }
    }
}

/// Podman, unless the runtime that it uses refuses this host.
fn with_its_runtime(program: Program, refuses: impl Fn(&str) -> bool, runtime: impl Fn() -> Option<String>) -> Program {
    // Only crun is known to, so that elsewhere nobody waits for the answer.
    if program.version.is_err() || !refuses(oci::CRUN) {
        return program;
    }
    match runtime().filter(|name| refuses(name)) {
        Some(name) => Program::missing(&format!("its runtime is {name}, which {}", oci::REFUSES), Some(oci::UNIFY)),
        None => program,
    }
}

/// What podman runs containers with, by its own word.
fn runtime() -> Option<String> {
    let ask = ["10", "podman", "info", "--format", "{{.Host.OCIRuntime.Name}}"];
    let said = programs::output("timeout", &ask).inspect_err(|error| log::info!("{error:#}"));
    Some(said.ok()?.trim().to_owned())
}

/// Where it keeps what is gone with the next boot. It takes no path of more than 50 bytes.
fn run_folder(folder: &Path) -> PathBuf {
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = if is_root() { "/run".into() } else { session.unwrap_or("/tmp".into()) };
    base.join(folder.file_name().unwrap_or_default())
}

/// Podman with a storage of the bench's own, so that nothing of the user's is touched.
fn line(folder: &Path, arguments: &[&str]) -> Vec<String> {
    let at = |name: &str| folder.join(FOLDER).join(name).display().to_string();
    let run = run_folder(folder).display().to_string();
    let mut line = words(&["podman", "--root", &at("root"), "--runroot", &run, "--tmpdir", &at("tmp")]);
    line.extend(words(&["--network-config-dir", &at("networks"), "--events-backend", "none"]));
    if is_root() {
        line.extend(words(&["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"]));
    }
    line.extend(words(arguments));
    line
}

/// The bench's own limits, as far as Podman has them itself: it would want higher ones, and a root that lacks CAP_SYS_RESOURCE
/// cannot raise any.
fn limits() -> Vec<String> {
    let kinds = [("nofile", Resource::Nofile), ("nproc", Resource::Nproc)];
    let limit = |(name, kind)| {
        let Rlimit { current, maximum } = getrlimit(kind);
        let limited = |limit: Option<u64>| limit.unwrap_or(u64::MAX).min(LIMIT_MAX);
        format!("{name}={}:{}", limited(current), limited(maximum))
    };
    kinds.into_iter().map(limit).flat_map(|limit| words(&["--ulimit", &limit])).collect()
}

fn output(line: &[String]) -> Result<String> {
    let words: Vec<&str> = line.iter().map(String::as_str).collect();
    let (program, arguments) = words.split_first().unwrap_or((&"", &[]));
    programs::output(program, arguments)
}

impl Podman {
    fn command_line(&self, ground: &Ground, scratch: Option<&Path>, job: &Job) -> Vec<String> {
        let root = format!("{}:O", ground.root.display());
        let mut line = line(&ground.folder, &["run"]);
        line.extend(engine::flags(ground, self.name(), scratch, job));
        line.extend(limits());
        if is_root() {
            line.extend(words(&["--cgroup-parent", &format!("/{}-podman", ground.id())]));
        }
        if self.mode == Mode::Own && job.port.is_some() {
            line.extend(words(&["--network", &ground.id()]));
        }
        line.extend(words(&["--rootfs", &root]));
        line.extend(job.command.iter().cloned());
        line
    }

    /// Why a user's container has no network here: podman has slirp4netns make one of a tap device, and from 5 on passt's pasta.
    fn network_obstacle(&self) -> Option<String> {
        if self.mode == Mode::Own {
            return None;
        }
        let (program, package) = network_program(self.program.version.as_deref().unwrap_or_default());
        if !which(program) {
            return Some(format!("there is no program {program}: type `sudo apt-get install {package}`"));
        }
        let tap = File::options().read(true).write(true).open(TUN_PATH).err();
        tap.map(|error| format!("{program} cannot open {TUN_PATH} ({error}): type `sudo chmod 666 {TUN_PATH}`"))
    }
}

/// What makes a user's network for this version of podman, and the package that has it.
fn network_program(version: &str) -> (&'static str, &'static str) {
    if major(version) < 5 { ("slirp4netns", "slirp4netns") } else { ("pasta", "passt") }
}

impl Contender for Podman {
    fn name(&self) -> &str {
        match self.mode {
            Mode::Own => "podman",
            Mode::Rootless => "podman-rootless",
        }
    }

    fn walls(&self) -> Walls {
        Walls::Container
    }

    fn about(&self, ground: &Ground) -> result::Contender {
        let mut notes =
            vec!["its root is an overlay over the image's files (--rootfs), in a storage of its own".to_owned()];
        notes.extend(self.limits_not_applied(ground));
        self.program.about(self.name(), Walls::Container, self.command_line(ground, None, &sample()), notes)
    }

    fn prepare(&mut self, ground: &Ground) -> Result<()> {
        // The storage is made by whoever uses it first.
        output(&line(&ground.folder, &["ps", "--quiet"])).map(drop)
    }

    fn launch(&self, ground: &Ground, job: &Job) -> Result<Launch> {
        if let Some(obstacle) = self.network_obstacle().filter(|_| job.port.is_some()) {
            return Err(Unable(obstacle).into());
        }
        if self.mode == Mode::Own && job.port.is_some() && !has_network(&ground.folder) {
            // Like its usual one, whose bridge would stay for ever.
            output(&line(&ground.folder, &["network", "create", "--disable-dns", &ground.id()]))?;
        }
        let (id, bench) = (ground.instance(self.name(), job), ground.folder.clone());
        // One that ran to its end is gone already.
        let remove = move || output(&line(&bench, &["rm", "--force", "--ignore", "--time", "0", &id])).map(drop);
        engine::launch(ground, self.name(), job, |scratch| self.command_line(ground, scratch, job), remove)
    }

    /// Its monitor is nobody's child, and the container is the monitor's.
    fn more_processes(&self, ground: &Ground, job: &Job) -> Vec<u32> {
        let id = ground.instance(self.name(), job);
        let format = "{{.State.Pid}} {{.State.ConmonPid}}";
        let text = output(&line(&ground.folder, &["inspect", "--format", format, &id])).unwrap_or_default();
        text.split_whitespace().filter_map(|word| word.parse().ok()).filter(|&process| process > 0).collect()
    }

    fn limits_not_applied(&self, _ground: &Ground) -> Option<String> {
        let has_none = self.mode == Mode::Rootless && !Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        has_none.then(|| "its limits of processor time and memory were not applied: this host has the first version of control groups".to_owned())
    }

    fn clean_up(&mut self, ground: &Ground) -> Result<()> {
        remove_all(&ground.folder)
    }
}

/// Whether the bench's own network has been made.
fn has_network(folder: &Path) -> bool {
    let id = bench_id(folder);
    output(&line(folder, &["network", "exists", &id])).is_ok()
}

fn remove_all(folder: &Path) -> Result<()> {
    if !folder.join(FOLDER).exists() {
        return Ok(());
    }
    output(&line(folder, &["rm", "--all", "--force", "--time", "0"]))?;
    let id = bench_id(folder);
    pen::remove_left_behind(&format!("{id}-podman"))?;
    if has_network(folder) {
        output(&line(folder, &["network", "rm", &id]))?;
    }
    if !is_root() {
        // A container's users own what it wrote; and a process that holds the user's namespaces goes with `migrate`.
        let (run, storage) =
            (run_folder(folder).display().to_string(), folder.join(FOLDER).join("root").display().to_string());
        output(&line(
            folder,
            &["unshare", "rm", "-rf", &format!("{run}/overlay-containers"), &format!("{run}/vfs-containers"), &storage],
        ))?;
        output(&line(folder, &["system", "migrate"]))?;
    }
    ground::clear(&run_folder(folder))?;
    ground::clear(&folder.join(FOLDER))
}

/// Ends the containers of a killed bench.
pub fn end_left_behind(folder: &Path) {
    if which("podman")
        && let Err(error) = remove_all(folder)
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
        let why = |runtime: Option<&str>| {
            let said = || runtime.map(str::to_owned);
            with_its_runtime(podman(), on_hybrid, said).version.map_err(|missing| missing.why)
        };
        assert_eq!(why(Some("crun")).unwrap_err(), format!("its runtime is crun, which {}", oci::REFUSES));
        assert!(why(Some("runc")).is_ok() && why(None).is_ok());
        let elsewhere = with_its_runtime(podman(), |_| false, || panic!("nobody asks"));
        assert_eq!(elsewhere, podman());
        let missing = Program::missing("there is none", None);
        assert_eq!(with_its_runtime(missing.clone(), on_hybrid, || panic!("nobody asks")), missing);
    }

    #[test]
    fn a_user_s_network_is_made_by_what_the_version_uses() {
        for (version, program) in [("4.3.1", "slirp4netns"), ("5.4.2", "pasta"), ("10.0.0-dev", "pasta")] {
            assert_eq!(network_program(version).0, program, "{version}");
        }
    }
}
