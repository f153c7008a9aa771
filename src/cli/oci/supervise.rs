//! The processes on the host of a container that makes its machine. The first is the container's for its engine: it has the container's network namespace,
//! cgroup, streams and root directory, passes signals on, and exits as the container's process does. The second, its child, runs the
//! machine.
//!
//! They are two because engines enter the namespaces of a container's process to reach its files (`podman cp`), and one that runs a
//! machine needs the host's.

use std::os::fd::{AsFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use husk_protocol::{Container, Process, ToHost};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::channel::Channel;
use super::create::{PREPARED, PROCEED};
use super::member::Member;
use super::{Flags, console};
use crate::cli::exit::Exit;
use crate::cli::run::machine;
use crate::cli::run::session::{self, Ended, Start};
use crate::config::MachineConfig;
use crate::console::stream_log;
use crate::exit_latch::ExitReason;
use crate::fs;
use crate::guest::GuestSpec;
use crate::guest::network::{InterfaceSetup, NetworkSetup};
use crate::guest::streams::Attached;
use crate::oci::cgroup;
use crate::oci::config::Config;
use crate::oci::machine::Shape;
use crate::oci::oom::Mark;
use crate::oci::pod;
use crate::oci::share::Files;
use crate::oci::state::{Dir, ProcessId, Root, State};
use crate::oci::{guest, share, warm};
use crate::resources::guest_kernel::GuestKernel;
use crate::resources::{self, interface};
use crate::snapshot::Snapshot;
use crate::state_dir::record::Record;
use crate::state_dir::{self, MachineDir, StateDir};
use crate::supervisor::{self, ControlEndpoint};
use crate::sys::SignalFd;
use crate::timings::Timings;

#[derive(Debug, Args)]
pub(super) struct Supervise {
    /// The descriptor of the connection with the process that creates the container.
    #[arg(long)]
    channel: RawFd,

    /// Whether this process runs the machine.
    #[arg(long)]
    machine: bool,

    /// Whether this process leaves its session.
    #[arg(long)]
    session: bool,

    /// Whether standard input is a terminal that was opened for the container.
    #[arg(long)]
    terminal: bool,

    id: String,
}

impl Supervise {
    pub(super) fn run(self, flags: &Flags) -> Result<Exit> {
        let mut channel = Channel::inherited(self.channel)?;
        let ended =
            if self.machine { self.run_machine(flags, &mut channel) } else { self.represent(flags, &mut channel) };
        ended.or_else(|error| channel.fail(error))
    }

    /// Is the container's process for its engine.
    fn represent(&self, flags: &Flags, channel: &mut Channel) -> Result<Exit> {
        let signals = supervisor::block_signals(true)?;
        if self.session {
            console::lead_session(self.terminal)?;
        }
        let root = flags.root()?;
        let (dir, state) = root.wait_for(&self.id, std::process::id())?;
        let config = dir.config()?;
        enter_network(&config)?;
        if let Some(pod) = &state.pod {
            enter_cgroup(&config, &dir, &state)?;
            return Member { root: &root, dir: &dir, config: &config, pod }.run(channel, &self.id);
        }
        let (container, binds) = guest::container(&self.id, &config, &state.bundle, None)?;
        let words =
            ["--root".into(), root.path().into(), "supervise".into(), "--machine".into(), self.id.clone().into()];
        let mut child = channel.share(words.to_vec())?;
        // The cgroup may not allow the machine's devices, which that process opens before it follows.
        let view = enter_cgroup(&config, &dir, &state)
            .and_then(|()| share::separate())
            .and_then(|()| share::enter(&state.rootfs, &binds, &container.mounts));
        let view = view.context("set up the container's process");
        if let Err(error) = view {
            let _ = child.kill().and_then(|()| child.wait());
            return Err(error);
        }
        pass_signals_on(&signals, &mut child, self.session)
    }

    fn run_machine(&self, flags: &Flags, channel: &mut Channel) -> Result<Exit> {
        let signals = supervisor::block_signals(true)?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("PR_SET_PDEATHSIG")?;
        let parent = rustix::process::getppid().map_or(0, |parent| parent.as_raw_nonzero().get().unsigned_abs());
        let (dir, mut state) = flags.root()?.wait_for(&self.id, parent)?;
        let config = dir.config()?;
        let (container, binds) = guest::container(&self.id, &config, &state.bundle, None)?;
        let process = config.process.as_ref().context("process is missing")?;
        let process = guest::process(process, config.linux.seccomp.as_ref())?;
        share::separate()?;
        share::assemble(&dir.share(), &self.id, Files::copy(&state.rootfs, &binds)?)?;
        dir.wait_until(|state| state.is_placed)?;
        channel.say(PREPARED)?;
        if channel.hear()? != PROCEED {
            // The creator has given up, and says why.
            return Ok(Exit::Failure);
        }
        let machine_dir = StateDir::at(state.machines.clone())?.create(None)?;
        state = State { machine: Some(machine_dir.id()), ..dir.state()? };
        dir.write(&state)?;
        let run = Machine { dir: &dir, config: &config, channel, signals: &signals };
        run.run(machine_dir, &state, container, process)
    }
}

/// The process of the container `id` for its engine, by its command line, if nothing else says which it is. Only this user's are asked for.
pub fn find(root: &Root, id: &str) -> Vec<ProcessId> {
    let own = rustix::process::geteuid().as_raw();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_it = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let owner = std::fs::metadata(format!("/proc/{pid}")).map(|found| found.uid());
        owner.is_ok_and(|owner| owner == own) && is_command_of(&line, root.path(), id)
    };
    pids.filter(is_it).filter_map(ProcessId::of).collect()
}

/// Whether `line`, with a NUL byte after each word, is what [`Creation`](super::create) starts for the container `id`.
fn is_command_of(line: &[u8], root: &Path, id: &str) -> bool {
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let [_, b"oci", b"--root", path, b"supervise", rest @ ..] = &words[..] else { return false };
    let id = id.as_bytes();
    let is_id = match rest {
        [b"--session", word, channel, ..] | [word, channel, ..] => *word == id && channel.starts_with(b"--channel="),
        _ => false,
    };
    *path == root.as_os_str().as_bytes() && is_id
}

/// Puts this process into the container's cgroup on the host.
fn enter_cgroup(config: &Config, dir: &Dir, state: &State) -> Result<()> {
    let memory_mib = Shape::of(config)?.memory_mib;
    let has_cgroup = !state.no_cgroup && cgroup::provide(&config.linux, state.systemd_cgroup, memory_mib)?;
    dir.write(&State { has_cgroup, is_placed: true, ..dir.state()? })
}

/// Puts this process into the container's network namespace.
fn enter_network(config: &Config) -> Result<()> {
    if let Some(network) = config.namespace("network") {
        if network.path.as_os_str().is_empty() {
            crate::sys::namespaces::unshare(UnshareFlags::NEWNET).context("create a network namespace")?;
        } else {
            let what = || format!("enter the network namespace {}", network.path.display());
            let file =
                rustix::fs::open(&network.path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).with_context(what)?;
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).with_context(what)?;
        }
    }
    Ok(())
}

/// What a terminal sends to all processes in its foreground, so that the child has it already.
const OF_TERMINALS: [i32; 5] = [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP, libc::SIGWINCH, libc::SIGCONT];

/// Passes signals on to the child until it has ended, and returns how. `is_leader` says that nobody else has the terminal's.
pub fn pass_signals_on(signals: &SignalFd, child: &mut Child, is_leader: bool) -> Result<Exit> {
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("the machine's process has no PID")?;
    let ended = pidfd_open(id, PidfdFlags::empty()).context("watch the machine's process")?;
    loop {
        let mut fds = [PollFd::new(signals, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for the machine's process"),
        }
        while let Some(signal) = signals.read().context("read a signal")? {
            if is_leader || !OF_TERMINALS.contains(&signal) {
                // It may just have ended.
                crate::sys::process::send_signal(id, signal);
            }
        }
        if let Some(status) = child.try_wait().context("wait for the machine's process")? {
            return Ok(status.into());
        }
    }
}

/// The machine of a container.
struct Machine<'a> {
    dir: &'a Dir,
    config: &'a Config,
    channel: &'a Channel,
    signals: &'a SignalFd,
}

impl Machine<'_> {
    fn run(&self, dir: MachineDir, state: &State, container: Container, process: Process) -> Result<Exit> {
        let shape = Shape::of(self.config)?;
        let kernel = shape.kernel()?;
        let mut spec = GuestSpec::with_container(self.dir.share(), container, process);
        spec.connect(self.network()?);
        let config = shape.config(&spec, &kernel, &dir.file(state_dir::VSOCK))?;
        config.validate()?;
        let labels = [("io.husk.oci.id".to_owned(), state.id.clone())].into();
        let image = state.rootfs.display().to_string();
        let record = Record { labels, ..Record::new(dir.id(), image, spec.command(), config.clone()) };
        let mut endpoint = ControlEndpoint::open(dir, record, stream_log::DEFAULT_MAX_BYTES)?;
        endpoint.report_creation_to(self.channel.try_clone()?);
        let is_sandbox = pod::is_sandbox(self.config);
        let mark = Mark::of(self.dir)?;
        if !is_sandbox {
            endpoint.mark_out_of_memory_by(move || mark.set());
        }
        let warm = warm::find(&shape, &config, spec.network());
        let refused = "the warm machine cannot be used, renew it with `husk oci warm`";
        let start = |warm, endpoint: &mut ControlEndpoint| self.start(&spec, &kernel, &config, warm, endpoint);
        let ended = session::start_or_boot(warm, refused, &mut endpoint, start);
        let was_created = endpoint.is_created();
        // Those of a pod are told apart. Its sandbox has no limit, and is meant if it was killed by its kernel.
        let was_killed = |ended: &Ended| ended.process == Some(ToHost::Signaled(libc::SIGKILL as u8));
        if is_sandbox && endpoint.ran_out_of_memory() && ended.as_ref().is_ok_and(was_killed) {
            Mark::of(self.dir)?.set()?;
        }
        let code = ended.as_ref().map_or(1, |ended| ended.code());
        endpoint.close(code, None)?;
        let ended = ended?;
        match (&ended.reason, was_created) {
            (_, false) => Err(reason(&ended)),
            // Whoever has asked for that knows it; the streams are the container's.
            (ExitReason::Killed(signal), true) if ended.process.is_none() => {
                Ok(Exit::Signal(u8::try_from(*signal).unwrap_or(u8::MAX)))
            }
            (_, true) => Ok(ended.exit()),
        }
    }

    /// Runs the machine, from a warm one or by booting.
    fn start(
        &self,
        spec: &GuestSpec,
        kernel: &GuestKernel,
        config: &MachineConfig,
        warm: Option<Snapshot>,
        endpoint: &mut ControlEndpoint,
    ) -> Result<Ended> {
        let (source, start) = match warm {
            Some(snapshot) => session::begin(spec, snapshot, Attached::default())?,
            None => {
                let source = machine::boot_source(kernel, spec.initramfs(kernel, config.virtio_bus())?)?;
                (source, Start::Contained { stdin: true, terminal: spec.on_terminal() })
            }
        };
        let opened = resources::open_for(config, source)?;
        self.follow_to_cgroup(opened.1.servers().iter().map(fs::process::Process::id))?;
        session::run(config, opened, start, endpoint, self.signals, &Arc::new(Timings::new(Instant::now())))
    }

    /// Moves this process and its children to the container's cgroup, where its parent is.
    fn follow_to_cgroup(&self, children: impl Iterator<Item = u32>) -> Result<()> {
        let cgroup = self.dir.state()?.cgroup(self.config)?;
        cgroup.map_or(Ok(()), |cgroup| cgroup.add(children.chain([std::process::id()])))
    }

    /// The interfaces of this network namespace, unless it is the host's.
    fn network(&self) -> Result<NetworkSetup> {
        if self.config.namespace("network").is_none() {
            return Ok(NetworkSetup::default());
        }
        let interfaces = interface::list()?.into_iter().map(InterfaceSetup::taken_over).collect();
        Ok(NetworkSetup::new(interfaces, &[]))
    }
}

/// Why there is no container.
fn reason(ended: &Ended) -> anyhow::Error {
    match &ended.process {
        Some(ToHost::Failed { message, .. }) => anyhow::anyhow!(message.clone()),
        _ => {
            let last = ended.last_words().join("; ");
            anyhow::anyhow!("the machine has ended before the container was created: {}; {last}", ended.reason)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_of_a_container_is_known_by_its_command_line() {
        let is = |line: &str| is_command_of(line.replace(' ', "\0").as_bytes(), Path::new("/run/husk-oci"), "a");
        assert!(is("husk oci --root /run/husk-oci supervise --session a --channel=5 "));
        assert!(!is("husk oci --root /run/husk-oci supervise --machine a --channel=5 "));
        assert!(is("husk oci --root /run/husk-oci supervise a --channel=5 --terminal "));
        for other in ["b", "--session b", "b a"] {
            assert!(!is(&format!("husk oci --root /run/husk-oci supervise {other} --channel=5 ")), "{other}");
        }
        assert!(!is("husk oci --root /run/other supervise a --channel=5 ") && !is("husk oci") && !is(""));
    }
}
