//! The contenders. Each can detect whether it is available and start an instance.

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

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::fixture::Fixture;
use super::report::{self, Isolation};
use super::work_dir;

/// The path of the workload program in every contender's root.
pub const WORKLOAD: &str = "/.husk-bench/work";
/// The mount point of an instance's scratch disk.
pub const SCRATCH: &str = "/scratch";

/// What an instance runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// The program and its arguments, in the root.
    pub command: Vec<String>,
    /// The size of the scratch disk at [`SCRATCH`], if the job needs one.
    pub scratch_mib: Option<u64>,
    /// The TCP port that must be reachable from the host, if the job listens on one.
    pub port: Option<u16>,
    /// A number that is unique among the instances of this run; used in names.
    pub instance: u32,
}

/// An instance that is ready to start.
pub struct Launch {
    /// Runs the instance in the foreground with its output on standard output. The instance ends with this process.
    pub command: Command,
    /// Whether the process exits with the command's exit code. Otherwise, the workload program prints it.
    pub passes_exit_code: bool,
    /// The address of the job's port, if it has one.
    pub address: Option<std::net::SocketAddr>,
    /// Removes what the instance leaves behind. To be called after the process has ended or failed to start.
    pub clean_up: Option<Box<dyn FnOnce() -> Result<()> + Send>>,
}

impl Launch {
    /// Adds a cleanup step that runs even if the previous ones fail.
    fn then_clean_up(mut self, more: impl FnOnce() -> Result<()> + Send + 'static) -> Launch {
        let rest = self.clean_up.take();
        self.clean_up = Some(Box::new(move || {
            let rest = rest.map_or(Ok(()), |clean_up| clean_up());
            rest.and(more())
        }));
        self
    }
}

/// The contender does not support a job on this host. The job is skipped and does not count as failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unsupported(pub String);

/// A contender.
pub trait Contender: Send {
    /// The name used by `--contenders` and in the report.
    fn name(&self) -> &str;
    /// How its instances are isolated from the host.
    fn isolation(&self) -> Isolation;
    /// Returns the version, kernel and notes for the report, or why it is unavailable. Called once, before the first
    /// round.
    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo;
    /// Whether an instance exits when its kernel crashes. Some VMMs reboot the machine instead, which would then crash
    /// forever.
    fn exits_on_kernel_crash(&self) -> bool {
        true
    }
    /// Creates what its instances share, such as an image in an engine's store. Undone by `clean_up`.
    fn prepare(&mut self, fixture: &Fixture) -> Result<()>;
    /// Prepares an instance for the job. This must be quick; slow steps belong in `prepare`. Files of the instance are
    /// created here and are not part of any metric. Returns [`Unsupported`] if the contender cannot run the job at all.
    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch>;
    /// Returns the processes of an instance that are not descendants of [`Launch::command`], such as children of an
    /// engine's daemon. Their memory is added to that of the descendants.
    fn extra_processes(&self, _fixture: &Fixture, _job: &Job) -> Vec<u32> {
        Vec::new()
    }
    /// Returns a note for the report if memory limits are not enforced, either by design or on this host.
    fn unenforced_limits(&self, _fixture: &Fixture) -> Option<String> {
        None
    }
    /// Removes what `prepare` created. Always called at the end.
    fn clean_up(&mut self, fixture: &Fixture) -> Result<()>;
}

/// Returns all contenders in report order; [`Contender::describe`] tells which are unavailable.
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

/// Stops the instances that a killed run left behind, as far as this needs the contenders' own programs. The caller
/// removes the directory, control groups and mounts.
pub fn remove_leftovers(dir: &Path) {
    oci::remove_leftovers(dir);
    podman::remove_leftovers(dir);
    docker::remove_leftovers(dir);
    network::remove_leftovers(dir);
}

/// Removes networks of instances that could not be started.
pub fn remove_networks(dir: &Path) {
    network::remove_leftovers(dir);
}

/// Whether this process runs as root.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The environment of every command, as OCI engines set it.
const ENVIRONMENT: [(&str, &str); 2] =
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root")];

/// A placeholder job for the command line shown by [`Contender::describe`].
fn example_job() -> Job {
    Job { command: vec!["COMMAND".to_owned()], scratch_mib: None, port: None, instance: 0 }
}

/// Converts a list of arguments to owned strings.
fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Builds a command from a program and its arguments.
fn command(words: &[String]) -> Result<Command> {
    let (program, arguments) = words.split_first().context("an empty command line")?;
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}

#[cfg(test)]
pub(super) mod tests {
    use super::guest::GuestFiles;
    use std::path::PathBuf;

    use super::super::report::Limits;
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
    fn cleanup_continues_after_a_failure() {
        let launch = |rest: fn() -> Result<()>| {
            let clean_up: Box<dyn FnOnce() -> Result<()> + Send> = Box::new(rest);
            let command = Command::new("true");
            Launch { command, passes_exit_code: true, address: None, clean_up: Some(clean_up) }
        };
        for (rest, printed) in
            [((|| Ok(())) as fn() -> Result<()>, None), (|| anyhow::bail!("it is held"), Some("it is held"))]
        {
            let (sender, receiver) = std::sync::mpsc::channel();
            let launch = launch(rest).then_clean_up(move || Ok(sender.send(())?));
            let cleaned = launch.clean_up.unwrap()();
            assert_eq!(cleaned.err().map(|error| error.to_string()).as_deref(), printed);
            assert_eq!(receiver.recv(), Ok(()));
        }
    }
}
