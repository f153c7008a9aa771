//! Those that are compared: each knows how to find itself on the host and how to start an instance.

mod bwrap;
mod cloud_hypervisor;
mod docker;
mod engine;
mod firecracker;
mod guest;
mod host;
mod husk;
mod network;
mod oci;
mod podman;
mod program;
mod qemu;
mod setup;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::fixture;
use super::report::{self, Isolation, Limits};

/// Where the work program stands in every contender's root.
pub const WORKLOAD: &str = "/.husk-bench/work";
/// Where an instance finds its scratch disk, when its job wants one.
pub const SCRATCH: &str = "/scratch";

/// What was prepared once, for all contenders and all jobs.
#[derive(Debug, Default)]
pub struct Fixture {
    /// The bench's own directory, on a real disk; removed at the end.
    pub dir: PathBuf,
    /// The image's root as files, with the work program in it.
    pub root: PathBuf,
    /// The same root as an EROFS disk, from `store`.
    pub disk: PathBuf,
    /// A store of husk's own (`HUSK_DATA`), in which the same root has the name `husk-bench`.
    pub store: PathBuf,
    /// husk itself.
    pub husk: PathBuf,
    /// What every instance may use.
    pub limits: Limits,
}

impl Fixture {
    /// A name for an instance of a contender, that nothing else on this host has.
    fn instance(&self, contender: &str, job: &Job) -> String {
        format!("{}-{contender}-{}", self.id(), job.instance)
    }

    /// The bench's own name, that of its directory.
    fn id(&self) -> String {
        bench_id(&self.dir)
    }

    /// A directory for what an instance needs of its own.
    fn instance_dir(&self, contender: &str, job: &Job) -> Result<PathBuf> {
        let dir = self.dir.join("instances").join(format!("{contender}-{}", job.instance));
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }

    /// As many processors as can use all of the time that an instance may have.
    fn vcpus(&self) -> u32 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "husk has 32 at most")]
        let vcpus = self.limits.cpus.ceil().clamp(1.0, 255.0) as u32;
        vcpus
    }

    /// Processor time in thousandths of a processor.
    fn millicpus(&self) -> u32 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "husk has 32 at most")]
        let millicpus = (self.limits.cpus * 1000.0).round().clamp(1.0, 255_000.0) as u32;
        millicpus
    }
}

/// What an instance is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Program and arguments, in the root.
    pub command: Vec<String>,
    /// Whether it wants a disk of its own at [`SCRATCH`], and how large.
    pub scratch_mib: Option<u64>,
    /// Whether it listens on this TCP port, which has to be reached from here.
    pub port: Option<u16>,
    /// A number that no other instance of this bench has: for names and files.
    pub instance: u32,
}

/// An instance that is ready to be started.
pub struct Launch {
    /// Starts it, in the foreground, with its output on standard output. The instance is over when this process is.
    pub command: Command,
    /// Whether the process's exit code is the command's own. If not, the work program says its own on the console.
    pub passes_exit_code: bool,
    /// Where its port is reached, if its job has one.
    pub address: Option<std::net::SocketAddr>,
    /// Removes what the start and the run leave behind; to be called when the process is over, or did not start.
    pub clean_up: Option<Box<dyn FnOnce() -> Result<()> + Send>>,
}

impl Launch {
    /// Has `more` removed too, whether or not the rest could be.
    fn then_clean_up(mut self, more: impl FnOnce() -> Result<()> + Send + 'static) -> Launch {
        let rest = self.clean_up.take();
        self.clean_up = Some(Box::new(move || {
            let rest = rest.map_or(Ok(()), |clean_up| clean_up());
            rest.and(more())
        }));
        self
    }
}

/// A job that a contender cannot do on this host: a reason to leave it out, and no failure.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unsupported(pub String);

/// One of those that are compared.
pub trait Contender: Send {
    /// As `--against` and the results name it.
    fn name(&self) -> &str;
    /// What separates its instances from the host.
    fn isolation(&self) -> Isolation;
    /// What the results say about it: version, kernel, notes, or why it is absent. Asked once, before the first run.
    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo;
    /// Whether an instance is over when its kernel crashes. Some monitors start a machine anew that resets, and it would crash without end.
    fn exits_on_kernel_crash(&self) -> bool {
        true
    }
    /// Makes what its instances share, once: a bundle, an image in an engine's store. `clean_up` takes it away again.
    fn prepare(&mut self, fixture: &Fixture) -> Result<()>;
    /// An instance for the job. Quick: what takes long belongs to `prepare`; where an instance needs files of its own (a
    /// scratch disk), they are made here, which no measure counts. What it cannot do at all is an error of the type [`Unsupported`].
    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch>;
    /// Every process of an instance whose [`Launch::command`] has this process ID, for what it uses of memory: descendants are
    /// found by the caller; this adds those that are no descendants (of an engine's daemon).
    fn extra_processes(&self, _fixture: &Fixture, _job: &Job) -> Vec<u32> {
        Vec::new()
    }
    /// What the results say where its instances are not held to the memory that they may have, by their walls or by this host.
    fn unenforced_limits(&self, _fixture: &Fixture) -> Option<String> {
        None
    }
    /// Removes what `prepare` made. To be called at the end, whatever happened.
    fn clean_up(&mut self, fixture: &Fixture) -> Result<()>;
}

/// Everyone who is looked for on this host, in the order of the results; [`Contender::about`] says who is absent.
pub fn find() -> Vec<Box<dyn Contender>> {
    let mut contenders: Vec<Box<dyn Contender>> = vec![
        Box::new(host::Host),
        Box::new(bwrap::Bwrap::find()),
        Box::new(oci::Runtime::find(oci::CRUN)),
        Box::new(oci::Runtime::find(oci::RUNC)),
        Box::new(podman::Podman::find(podman::Mode::Rootful)),
        Box::new(podman::Podman::find(podman::Mode::Rootless)),
        Box::new(docker::Docker::find()),
        Box::new(qemu::Qemu::find()),
        Box::new(firecracker::Firecracker::find()),
        Box::new(cloud_hypervisor::CloudHypervisor::find()),
    ];
    contenders.extend(husk::Husk::find().into_iter().map(|husk| Box::new(husk) as Box<dyn Contender>));
    contenders
}

/// The own name of the bench that has this directory.
pub fn bench_id(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Ends the instances that a killed bench has left in its directory, as far as their own programs have to do it. The directory itself, control
/// groups and mounts are the caller's.
pub fn remove_leftovers(dir: &Path) {
    oci::remove_leftovers(dir);
    podman::remove_leftovers(dir);
    docker::remove_leftovers(dir);
    network::remove_leftovers(dir);
}

/// Takes away what a bench made for instances that then could not be started.
pub fn remove_networks(dir: &Path) {
    network::remove_leftovers(dir);
}

/// Whether this process is root's.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The environment of every command, as OCI engines have it.
const ENVIRONMENT: [(&str, &str); 2] =
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root")];

/// What [`Contender::about`] shows of a command line in place of the work's own.
fn example_job() -> Job {
    Job { command: vec!["COMMAND".to_owned()], scratch_mib: None, port: None, instance: 0 }
}

/// A command line, word by word.
fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The command of a command line.
fn command(words: &[String]) -> Result<Command> {
    let (program, arguments) = words.split_first().context("an empty command line")?;
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}

#[cfg(test)]
pub(super) mod tests {
    use super::guest::GuestFiles;
    use super::network::Tap;
    use super::*;

    pub fn fixture() -> Fixture {
        let path = PathBuf::from;
        Fixture {
            dir: path("/g/husk-bench-0a1b2c"),
            root: path("/g/root"),
            disk: path("/g/root.erofs"),
            store: path("/g/store"),
            husk: path("/bin/husk"),
            limits: Limits { cpus: 1.5, memory_mib: 256, cpuset: None },
        }
    }

    pub fn files() -> GuestFiles<'static> {
        GuestFiles {
            kernel: Path::new("/k/vmlinux"),
            root: Path::new("/g/root.erofs"),
            scratch: Some(Path::new("/g/scratch")),
        }
    }

    pub fn tap() -> Tap {
        Tap::of(&fixture().id(), job(&[]).instance)
    }

    pub fn job(command: &[&str]) -> Job {
        Job { command: strings(command), scratch_mib: Some(64), port: None, instance: 3 }
    }

    #[test]
    fn everything_is_cleaned_up_whatever_could_not_be() {
        let launch = |rest: fn() -> Result<()>| {
            let clean_up: Box<dyn FnOnce() -> Result<()> + Send> = Box::new(rest);
            let command = Command::new("true");
            Launch { command, passes_exit_code: true, address: None, clean_up: Some(clean_up) }
        };
        for (rest, said) in
            [((|| Ok(())) as fn() -> Result<()>, None), (|| anyhow::bail!("it is held"), Some("it is held"))]
        {
            let (tell, told) = std::sync::mpsc::channel();
            let launch = launch(rest).then_clean_up(move || Ok(tell.send(())?));
            let cleaned = launch.clean_up.unwrap()();
            assert_eq!(cleaned.err().map(|error| error.to_string()).as_deref(), said);
            assert_eq!(told.recv(), Ok(()));
        }
    }
}
