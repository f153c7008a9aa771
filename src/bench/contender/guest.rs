//! The guest that all VMMs other than husk boot: husk's kernel, the root as a disk, and the workload program as init.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::super::report::{self, Isolation, Unavailable};
use super::super::workload;
use super::network::Tap;
use super::program::{self, Program};
use super::setup::{self, LimitScope};
use super::{Fixture, Job, Launch, Unsupported, WORKLOAD, command, example_job};
use crate::image::Store;
use crate::resources::guest_kernel::Choice;
use crate::sys;

/// The longest x86 command line, including its NUL (COMMAND_LINE_SIZE).
const CMDLINE_MAX_BYTES: usize = 2048;
/// The kernel with all drivers built in.
const KERNEL: &str = "micro";

/// The files of a guest.
#[derive(Debug, Clone, Copy)]
pub struct GuestFiles<'a> {
    /// The kernel, an ELF image.
    pub kernel: &'a Path,
    /// The disk with the root file system.
    pub root: &'a Path,
    /// A writable scratch disk.
    pub scratch: Option<&'a Path>,
}

/// Marks a VMM as unavailable without KVM or a guest kernel.
pub fn require_kernel(program: Program) -> Program {
    let needed = || -> Result<(), Unavailable> {
        let missing = |install: Option<&str>| {
            let install = install.map(str::to_owned);
            move |error: anyhow::Error| Unavailable { reason: format!("{error:#}"), install }
        };
        kernel().map_err(missing(Some("scripts/kernel micro")))?;
        program::kvm()
    };
    Program { version: program.version.and_then(|version| needed().map(|()| version)) }
}

fn kernel() -> Result<PathBuf> {
    Choice::Made(KERNEL).find().map(|kernel| kernel.path)
}

/// Describes a VMM whose command lines `line` builds.
pub fn describe(
    program: &Program,
    name: &str,
    fixture: &Fixture,
    line: impl FnOnce(&GuestFiles, &Job) -> Result<Vec<String>>,
) -> report::ContenderInfo {
    let kernel = kernel().unwrap_or_default();
    let files = GuestFiles { kernel: &kernel, root: &fixture.disk, scratch: None };
    let line = line(&files, &example_job()).unwrap_or_default();
    let mut info =
        program.describe(name, Isolation::Machine, line, LimitScope::Machine.note(fixture).into_iter().collect());
    info.kernel = info.unavailable.is_none().then(|| kernel.display().to_string());
    info
}

/// Prepares an instance of a VMM whose command lines `line` builds.
pub fn launch(
    name: &str,
    fixture: &Fixture,
    job: &Job,
    address: Option<SocketAddr>,
    line: impl FnOnce(&GuestFiles, &Job) -> Result<Vec<String>>,
) -> Result<Launch> {
    let kernel = kernel()?;
    let scratch = Scratch::create(fixture, name, job)?;
    let scratch_path = scratch.as_ref().map(|scratch| scratch.path.clone());
    let files = GuestFiles { kernel: &kernel, root: &fixture.disk, scratch: scratch_path.as_deref() };
    let mut command = command(&line(&files, job)?)?;
    let cgroup = LimitScope::Machine.cgroup(fixture, name, job);
    sys::process::begin_in(&mut command, setup::procs_files(cgroup.as_ref())?, None)
        .context("join the control groups")?;
    let clean_up = move || {
        cgroup.map_or(Ok(()), |cgroup| cgroup.remove())?;
        scratch.map_or(Ok(()), Scratch::remove)
    };
    Ok(Launch { command, passes_exit_code: false, address, clean_up: Some(Box::new(clean_up)) })
}

/// Like [`launch`], for a VMM that supports only tap devices. `line` receives one if the job has a port.
pub fn launch_with_tap(
    name: &str,
    fixture: &Fixture,
    job: &Job,
    line: impl FnOnce(&GuestFiles, Option<&Tap>, &Job) -> Result<Vec<String>>,
) -> Result<Launch> {
    let tap = Tap::create(fixture, job)?;
    let address = job.port.zip(tap.as_ref()).map(|(port, tap)| tap.address(port));
    let launch = launch(name, fixture, job, address, |files, job| line(files, tap.as_ref(), job))?;
    Ok(launch.then_clean_up(move || tap.map_or(Ok(()), |tap| tap.remove())))
}

/// Guest settings that become part of the kernel command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestOptions<'a> {
    /// How the workload program stops the machine so that the VMM exits: `reset` or `power-off`.
    pub end: &'a str,
    /// Kernel parameters specific to the VMM.
    pub platform: &'a str,
    /// Whether there is a scratch disk.
    pub scratch: bool,
    /// The guest's address and gateway, if it has a network: `10.0.0.2/24,10.0.0.1`.
    pub network: Option<&'a str>,
}

/// Builds the kernel command line. Everything after `--` is passed to init, the workload program's `guest` command
/// (`firmware/workload`).
pub fn cmdline(options: GuestOptions, job: &Job) -> Result<String> {
    let mut line = format!("console=ttyS0 quiet panic=-1 cryptomgr.notests swiotlb=noforce {}", options.platform);
    line.push_str(&format!(" root=/dev/vda rootfstype=erofs ro init={WORKLOAD} -- guest --end {}", options.end));
    if options.scratch {
        line.push_str(" --scratch");
    }
    if let Some(network) = options.network {
        line.push_str(&format!(" --net {network}"));
    }
    for word in &job.command {
        line.push(' ');
        line.push_str(&workload::escape(word));
    }
    if line.len() >= CMDLINE_MAX_BYTES {
        return Err(
            Unsupported(format!("the kernel command line would have {} bytes, which is too long", line.len())).into()
        );
    }
    Ok(line)
}

/// A scratch disk in the run's store.
#[derive(Debug)]
struct Scratch {
    store: Store,
    name: String,
    path: PathBuf,
}

impl Scratch {
    /// Creates a disk with an empty file system of the size that the job requests.
    fn create(fixture: &Fixture, contender: &str, job: &Job) -> Result<Option<Scratch>> {
        let Some(size_mib) = job.scratch_mib else { return Ok(None) };
        let store = Store::open(&fixture.store)?;
        let name = format!("{contender}-{}", job.instance);
        let mut identity = [0; 16];
        sys::getrandom(&mut identity).context("get random bytes")?;
        let path = store.kept_disk(&name, size_mib << 20, identity)?.path;
        Ok(Some(Scratch { store, name, path }))
    }

    /// Removes the disk.
    fn remove(self) -> Result<()> {
        self.store.remove_kept_disk(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: GuestOptions = GuestOptions { end: "power-off", platform: "", scratch: false, network: None };

    fn job(command: &[&str]) -> Job {
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        Job { command, scratch_mib: None, port: None, instance: 0 }
    }

    #[test]
    fn the_command_comes_last() {
        let network = Some("10.0.2.15/24,10.0.2.2");
        let options = GuestOptions { end: "reset", platform: "reboot=t", scratch: true, network };
        assert_eq!(
            cmdline(options, &job(&["/bin/x", "-v"])).unwrap(),
            "console=ttyS0 quiet panic=-1 cryptomgr.notests swiotlb=noforce reboot=t root=/dev/vda rootfstype=erofs ro \
             init=/.husk-bench/work -- guest --end reset --scratch --net 10.0.2.15/24,10.0.2.2 /bin/x -v"
        );
        assert!(cmdline(PLAIN, &job(&["x"])).unwrap().ends_with(" -- guest --end power-off x"));
    }

    #[test]
    fn words_with_special_characters_are_encoded() {
        let line = cmdline(PLAIN, &job(&["sh", "-c", "echo 'a \"b\"' 100%"])).unwrap();
        assert!(line.ends_with(" sh -c echo%20%27a%20%22b%22%27%20100%25"), "{line}");
    }

    #[test]
    fn a_command_that_is_too_long_is_rejected() {
        assert!(cmdline(PLAIN, &job(&["x".repeat(CMDLINE_MAX_BYTES).as_str()])).unwrap_err().is::<Unsupported>());
    }
}
