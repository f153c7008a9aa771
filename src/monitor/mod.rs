//! A machine's monitor: the process that runs its vCPUs and devices, confined, as its supervisor sees it.
//!
//! ```text
//! supervisor: Resources, Outside ─ start ─> Monitor ─ Call ─> serve.rs ─> Machine     Reply ─>
//!             attendant <─ what needs the host: connections, helper processes ─┘      Event ─> ExitLatch, log
//! ```
//!
//! The supervisor is the process that the user started. It owns everything that has a path or a name on the host, and the
//! streams of the machine. The monitor gets open files, and loses the ability to get anything else before its guest runs.

pub mod message;
pub mod release;
mod save;
mod serve;
mod used_pages;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::config::{MachineConfig, Rate};
use crate::exit_latch::{ExitLatch, ExitReason};
use crate::resources::attendant::Attendant;
use crate::resources::memory_use::MemoryUse;
use crate::resources::{Outside, Resources};
use crate::sandbox::cgroup::CgroupLimits;
use crate::sandbox::{Layers, task};
use crate::sys::fork::{Files, Split};
use crate::sys::shared::SharedFlag;
use crate::sys::{SignalFd, socket};
use crate::timings::Timings;
use message::{Call, Event, Reply};

pub use message::Usage;
pub use save::PROGRESS_INTERVAL;
pub use serve::forward_log;

/// How long a monitor may take to reply. A pause waits for requests in flight, which may be on a slow disk.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for the end of a machine that was killed.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum size of a machine's state.
pub const STATE_BYTES_MAX: u64 = 16 << 20;
/// Why calls are refused meanwhile.
pub const BEING_SAVED: &str = "the machine is being saved: try again";
/// The number of events handled before other things have their turn.
const EVENTS_PER_TURN: usize = 64;

/// A monitor process. Used by one thread. Dropping it kills the process: after the end of its machine nothing is left to do
/// there but what the kernel does.
pub struct Monitor {
    pid: u32,
    calls: UnixDatagram,
    events: UnixDatagram,
    attendant: Option<Attendant>,
    outside: Outside,
    /// Makes the monitor go on with what memory it has allocated so far.
    interrupted: Option<Arc<SharedFlag>>,
    exit_latch: Arc<ExitLatch>,
    timings: Arc<Timings>,
    input_wanted: bool,
    has_ended: bool,
    console_is_closed: bool,
    /// Whether guest memory is from the host's pool, which the next machine may need.
    has_pool_pages: bool,
    /// Set while it saves the machine, and reads no calls.
    save: Option<save::Save>,
}

impl Monitor {
    /// Starts the process that builds the machine `config` from `resources`. Its serial port prints to `console`. Nothing
    /// of the guest runs before [`Monitor::start_guest`], which also reports whether the machine was built.
    pub fn start(
        config: &MachineConfig,
        resources: Resources,
        mut outside: Outside,
        console: OwnedFd,
        timings: Arc<Timings>,
    ) -> Result<Monitor> {
        let exit_latch = Arc::new(ExitLatch::new()?);
        let pair = || socket::message_pair().context("create a socket for the monitor process");
        let ((calls, called), (events, reported), (asked, asks)) = (pair()?, pair()?, pair()?);
        let null: OwnedFd = File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?.into();
        let sockets = [called.as_raw_fd(), reported.as_raw_fd(), asks.as_raw_fd()];
        let given = [resources.fds(), sockets.into(), vec![console.as_raw_fd(), null.as_raw_fd()]].concat();
        let files = Files { given, shared: outside.shared_fds() };
        let interrupted =
            config.prefault.then(|| SharedFlag::new().map(Arc::new)).transpose().context("share a flag")?;
        let given = serve::Given {
            resources,
            calls: Arc::new(called),
            events: reported,
            asks,
            console: console.into(),
            null,
            interrupted: interrupted.clone(),
        };
        if !config.sandbox {
            log::warn!("--sandbox off: a guest that takes over the process that runs it has the rights of this user");
        }
        let layers = Layers::new(config.sandbox);
        let pid = match layers.split(given, &files).context("start the monitor process")? {
            (Split::Child(given), lacks) => serve::run(config, given, layers, lacks, timings),
            (Split::Parent(pid), _) => pid,
        };
        outside.cgroup_limits.include(pid);
        release::started(pid);
        let attendant = Attendant::start(asked, &outside).context("start a thread")?;
        events.set_nonblocking(true).context("set up the monitor's socket")?;
        Ok(Monitor {
            pid,
            calls,
            events,
            attendant,
            outside,
            interrupted,
            exit_latch,
            timings,
            input_wanted: false,
            has_ended: false,
            console_is_closed: false,
            has_pool_pages: config.huge_pages.is_pool(),
            save: None,
        })
    }

    /// Waits until the machine is built, and starts the guest, with its network links up or down. Fails if it cannot be built. One of `signals` cuts the allocation
    /// of its memory short. Returns what the sandbox lacks.
    pub fn start_guest(&mut self, signals: &SignalFd, links_up: bool) -> Result<Vec<String>> {
        self.send(if links_up { &Call::Resume } else { &Call::ResumeUnplugged })?;
        if let Some(interrupted) = &self.interrupted {
            let [replied, signaled] =
                wait(&self.calls, &signals.as_fd(), None).context("wait for the monitor process")?;
            interrupted.swap(signaled && !replied);
        }
        match self.reply(None)? {
            Reply::Started(lacks) => Ok(lacks),
            other => done(other).and_then(|()| bail!("the monitor process replied with something else")),
        }
    }

    /// Resumes the guest after a pause.
    pub fn resume(&mut self) -> Result<()> {
        self.perform(&Call::Resume)
    }

    /// Pauses the guest. On return none of its instructions run, and none of its requests are in flight.
    pub fn pause(&mut self) -> Result<()> {
        self.perform(&Call::Pause)
    }

    /// Presses the power button. The guest decides how to react.
    pub fn press_power_button(&mut self) -> Result<()> {
        self.perform(&Call::PressPowerButton)
    }

    /// Sets the memory of the guest. It gives it up at its own pace.
    pub fn set_memory_target(&mut self, memory_mib: u64) -> Result<()> {
        self.perform(&Call::SetMemoryTarget(memory_mib))
    }

    /// Sets the rate limits of disk `index`.
    pub fn set_disk_rate(&mut self, index: usize, rate: Rate) -> Result<()> {
        self.perform(&Call::SetDiskRate(index, rate.into()))
    }

    /// Sets the rate limits of network interface `index`.
    pub fn set_network_rate(&mut self, index: usize, rate: Rate) -> Result<()> {
        self.perform(&Call::SetNetworkRate(index, rate.into()))
    }

    /// Sets the links of all network interfaces up or down.
    pub fn set_links(&mut self, up: bool) -> Result<()> {
        self.perform(&Call::SetLinks(up))
    }

    /// Offers `bytes` to the serial port and returns how many it accepted.
    pub fn offer_input(&mut self, bytes: &[u8]) -> usize {
        let bytes = bytes.get(..bytes.len().min(message::INPUT_BYTES_MAX)).unwrap_or_default();
        match self.call(&Call::OfferInput(bytes.to_vec())) {
            Ok(Reply::Accepted(count)) => count.min(bytes.len()),
            _ => 0,
        }
    }

    /// The machine's resource usage. While it is saved, that from when it was paused.
    pub fn usage(&mut self) -> Result<Usage> {
        if let Some(save) = &self.save {
            return Ok(save.usage.clone());
        }
        match self.call(&Call::Usage)? {
            Reply::Usage(usage) => Ok(*usage),
            Reply::Failed(reason) => bail!(reason),
            _ => bail!("the monitor process replied with something else"),
        }
    }

    /// The use of host memory of this process and the monitor, whose [`Usage`] was just reported.
    pub fn memory_use(&self, usage: &Usage) -> io::Result<MemoryUse> {
        let mut used = MemoryUse::of(self.pid, &usage.memory_ranges)?;
        used.husk += MemoryUse::of(std::process::id(), &[])?.husk;
        // One that has ended uses none.
        let servers = self.outside.servers().iter().filter_map(|server| MemoryUse::of(server.id(), &[]).ok());
        servers.for_each(|server| used.husk += server.husk);
        Ok(used)
    }

    /// A record of the pages of guest memory that were touched (`memory/touched.rs`).
    pub fn touched_pages(&mut self) -> Result<Vec<u8>> {
        let usage = self.usage()?;
        used_pages::touched(self.pid, &usage.memory_ranges).context("read which memory the guest has touched")
    }

    /// The cgroup limits of the machine, which can be changed while it runs.
    pub fn cgroup_limits(&mut self) -> &mut CgroupLimits {
        &mut self.outside.cgroup_limits
    }

    /// What the machine has on the host.
    pub fn outside(&self) -> &Outside {
        &self.outside
    }

    /// The startup steps. Those reached in the monitor are known after its end.
    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    /// The latch in which the machine's end is declared, by either process.
    pub fn exit_latch(&self) -> &Arc<ExitLatch> {
        &self.exit_latch
    }

    /// Whether the serial port may accept input again, since the last call.
    pub fn take_input_wanted(&mut self) -> bool {
        std::mem::take(&mut self.input_wanted)
    }

    /// Whether the monitor has written all output of the serial port, after the end.
    pub fn console_is_closed(&self) -> bool {
        self.console_is_closed
    }

    /// Handles what the monitor has reported, as much as fits a turn. Called when the descriptor of `self` is readable.
    pub fn handle_events(&mut self) {
        for _ in 0..EVENTS_PER_TURN {
            match serve::receive_event(&self.events) {
                Ok(event) => self.handle(event),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.note_death(&error),
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Log(level, text) => task::log_as_told(level, &text),
            Event::InputWanted => self.input_wanted = true,
            Event::ConsoleClosed => self.console_is_closed = true,
            Event::Ended(reason, marks) => {
                self.has_ended = true;
                self.timings.adopt(&marks);
                if let Some(reason) = reason {
                    self.exit_latch.declare(reason);
                }
            }
        }
    }

    /// The monitor cannot be talked to: its sockets are closed, because it has exited or was killed, or it does not keep to the
    /// protocol. It is ended.
    fn note_death(&mut self, error: &io::Error) {
        release::kill(self.pid);
        if !self.has_ended {
            let signal = release::reap(self.pid).and_then(|status| status.terminating_signal());
            self.exit_latch.declare(match error.kind() {
                ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                    ExitReason::MonitorDied { signal }
                }
                _ => ExitReason::MonitorFailed(error.to_string()),
            });
        }
        (self.has_ended, self.console_is_closed) = (true, true);
        self.save = None;
    }

    /// Ends the machine and closes its files, if it has not ended.
    pub fn end(&mut self) {
        if self.save.is_some() {
            // It would go on writing. The guest is paused, and its disks are settled.
            self.note_death(&ErrorKind::TimedOut.into());
        }
        if !self.has_ended {
            let ended = self.send(&Call::End).and_then(|()| self.reply(Some(END_TIMEOUT)));
            if !matches!(ended, Ok(Reply::Done)) {
                self.note_death(&ErrorKind::InvalidData.into());
            }
        }
        self.handle_events();
    }

    fn perform(&mut self, call: &Call) -> Result<()> {
        self.call(call).and_then(done)
    }

    fn call(&mut self, call: &Call) -> Result<Reply> {
        self.send(call)?;
        self.reply(Some(REPLY_TIMEOUT))
    }

    /// There is always room: the monitor has read the previous call before it replied.
    fn send(&mut self, call: &Call) -> Result<()> {
        ensure!(self.save.is_none(), BEING_SAVED);
        let sent = message::encode(call).and_then(|packet| socket::send_now(&self.calls, &packet));
        sent.map_err(|error| self.lost(error))
    }

    /// Handles events until the monitor replies.
    fn reply(&mut self, timeout: Option<Duration>) -> Result<Reply> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let [replied, reported] =
                wait(&self.calls, &self.events, deadline).context("wait for the monitor process")?;
            if !replied && !reported {
                return Err(self.lost(ErrorKind::TimedOut.into()));
            }
            // A reply first: it tells more than that the monitor has exited.
            if replied {
                return message::receive(&self.calls).map_err(|error| self.lost(error));
            }
            if reported {
                self.handle_events();
            }
        }
    }

    /// The monitor is gone, does not respond, or does not keep to the protocol: it is ended.
    fn lost(&mut self, error: io::Error) -> anyhow::Error {
        self.handle_events();
        self.note_death(&error);
        match self.exit_latch.reason() {
            Some(reason) => anyhow!(error).context(reason.to_string()),
            None => anyhow!(error).context("talk to the monitor process"),
        }
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        release::kill(self.pid);
        // KVM's recovery thread is a member of the cgroup, which can be removed only after the release.
        if self.has_pool_pages || self.outside.cgroup_limits.has_groups() {
            release::reap(self.pid);
        }
        if let Some(attendant) = self.attendant.take() {
            attendant.stop();
        }
    }
}

fn done(reply: Reply) -> Result<()> {
    match reply {
        Reply::Done => Ok(()),
        Reply::Failed(reason) => bail!(reason),
        _ => bail!("the monitor process replied with something else"),
    }
}

/// Waits until one of the descriptors is readable, or until `deadline`. Returns which are.
fn wait(one: &impl AsFd, other: &impl AsFd, deadline: Option<Instant>) -> io::Result<[bool; 2]> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(one, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(fds.map(|fd| !fd.revents().is_empty())),
        }
    }
}
