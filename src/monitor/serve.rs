//! The monitor process: confines itself, builds the machine, and serves its supervisor until the machine has ended.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::time::{ClockId, clock_gettime};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::message::{self, Call, Event, PACKET_BYTES_MAX, Reply, Usage};
use crate::config::MachineConfig;
use crate::exit_latch::ExitReason;
use crate::kvm::Vm;
use crate::machine::Machine;
use crate::memory;
use crate::resources::{Resources, attendant};
use crate::sandbox::{self, Confinement, Layers, ThreadRole};
use crate::sys::mapping::Pages;
use crate::sys::resident::IdleTrim;
use crate::sys::shared::SharedFlag;
use crate::sys::violation::Report;
use crate::sys::{arguments, event, fork, socket};
use crate::timings::Timings;
use crate::virtio::block;

/// How long a kernel may keep printing after a panic before the machine is ended.
const PANIC_GRACE: Duration = Duration::from_secs(1);
/// How long the virtual machine is kept after its end, so that its release delays nothing. A slow reader of the console may
/// take hours, and the memory is free in that time.
const RELEASE_AFTER: Duration = Duration::from_millis(100);

/// Where this process reports events, if it is a monitor.
static EVENTS: OnceLock<UnixDatagram> = OnceLock::new();

/// What a monitor process is given.
pub(super) struct Given {
    pub resources: Resources,
    pub calls: Arc<UnixDatagram>,
    pub events: UnixDatagram,
    pub asks: UnixDatagram,
    /// Where the serial port prints.
    pub console: File,
    /// In place of the standard streams.
    pub null: OwnedFd,
    /// Set when a signal has arrived before the machine is built, which may take long if its memory is allocated.
    pub interrupted: Option<Arc<SharedFlag>>,
}

/// Runs this process as the monitor, and exits.
pub(super) fn run(
    config: &MachineConfig,
    given: Given,
    layers: Layers,
    lacks: Vec<String>,
    timings: Arc<Timings>,
) -> ! {
    // Its sockets stay open until a failure was told: the supervisor kills this process when they are closed.
    let calls = given.calls.clone();
    match prepare(config, given, layers, lacks, &timings) {
        Ok(mut server) => server.run().unwrap_or_else(|error| fail(&format!("{error:#}"))),
        Err(error) => refuse(&calls, &error),
    }
    fork::exit_now(0)
}

/// Ends this process, and thereby the machine. The supervisor is told why.
fn fail(reason: &str) -> ! {
    let reason = ExitReason::MonitorFailed(message::shortened(reason));
    let _ = report(&Event::Ended(Some(reason), Vec::new()));
    fork::exit_now(1)
}

/// Replies to the first call that there is no machine.
fn refuse(calls: &UnixDatagram, error: &anyhow::Error) {
    // If the supervisor is gone, nobody needs to know.
    if message::receive::<Call>(calls).is_ok() {
        let _ = message::send(calls, &Reply::Failed(message::shortened(&format!("{error:#}"))));
    }
}

/// Confines this process and builds the machine.
fn prepare(
    config: &MachineConfig,
    given: Given,
    layers: Layers,
    lacks: Vec<String>,
    timings: &Arc<Timings>,
) -> Result<Server> {
    let Given { resources, calls, events, asks, console, null, interrupted } = given;
    let report_to = events.as_raw_fd();
    let _ = EVENTS.set(events);
    attendant::ask_through(asks);
    let stdio = [rustix::stdio::dup2_stdin, rustix::stdio::dup2_stdout, rustix::stdio::dup2_stderr];
    stdio.iter().try_for_each(|replace| replace(&null)).context("close the standard streams of the monitor process")?;
    rustix::thread::set_name(c"monitor").context("name the monitor process")?;
    panic::set_hook(Box::new(|panic| {
        // abort(3) does not end the first process of a namespace.
        fail(&panic.to_string().replace('\n', " "))
    }));
    arguments::forget_environment();
    let confinement = Confinement::begin(layers, lacks)?;
    if config.sandbox {
        sandbox::enable_filters(report_to, fail).context("handle SIGSYS")?;
    }
    let is_interrupted = || interrupted.as_ref().is_some_and(|flag| flag.is_set());
    let mut lacks = Vec::new();
    let confine = || confinement.complete().map(|found| lacks = found);
    let machine = Machine::build(config, resources, timings.clone(), confine, &is_interrupted)?;
    let printed = start_console(&machine, console)?;
    Server::new(machine, calls, printed, lacks, config.huge_pages.pages())
}

/// Starts the thread that prints the serial port's output. Returns an event that it signals at its end.
fn start_console(machine: &Machine, console: File) -> Result<Arc<EventFd>> {
    let (output, exit_latch) = (machine.console_output().clone(), machine.exit_latch().clone());
    let printed = Arc::new(event::create().context("watch the console")?);
    let done = printed.clone();
    let print = move || {
        output.print_to(console, |error| exit_latch.declare(ExitReason::of_failed_output(&error)));
        let _ = done.write(1);
    };
    sandbox::spawn_confined(ThreadRole::Console, "console", print).context("start the console thread")?;
    Ok(printed)
}

/// The event sources of the main thread.
#[derive(Debug, Clone, Copy)]
enum Token {
    Call,
    Exit,
    InputWanted,
    Printed,
}

const TOKENS: [Token; 4] = [Token::Call, Token::Exit, Token::InputWanted, Token::Printed];

struct Server {
    /// `None` when it has ended.
    machine: Option<Machine>,
    /// The virtual machine after that, and when it is released.
    ended: Option<(Arc<Vm>, Instant)>,
    calls: Arc<UnixDatagram>,
    _printed: Arc<EventFd>,
    epoll: Epoll,
    /// What the sandbox lacks; `None` after the first call, whose reply tells it.
    lacks: Option<Vec<String>>,
    /// Those of guest memory that is not of a file.
    pages: Pages,
    trim: IdleTrim,
}

impl Server {
    fn new(
        machine: Machine,
        calls: Arc<UnixDatagram>,
        printed: Arc<EventFd>,
        lacks: Vec<String>,
        pages: Pages,
    ) -> Result<Server> {
        let epoll = Epoll::new().context("epoll")?;
        let sources = [
            (calls.as_raw_fd(), Token::Call),
            (machine.exit_latch().event().as_raw_fd(), Token::Exit),
            (machine.input_wanted().as_raw_fd(), Token::InputWanted),
            (printed.as_raw_fd(), Token::Printed),
        ];
        for (fd, token) in sources {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token as u64)).context("epoll")?;
        }
        // The first call looks up the function in the vDSO, with a system call that is not allowed later.
        let _ = clock_gettime(ClockId::ProcessCPUTime);
        sandbox::confine_this_thread(ThreadRole::Main);
        let trim = IdleTrim::start();
        let (machine, ended, lacks) = (Some(machine), None, Some(lacks));
        Ok(Server { machine, ended, calls, _printed: printed, epoll, lacks, pages, trim })
    }

    /// Returns when the machine has ended and its output is printed.
    fn run(&mut self) -> Result<()> {
        loop {
            let ended = self.machine.as_ref().and_then(|machine| machine.exit_latch().reason());
            if ended.is_some() {
                self.end(ended)?;
            }
            let mut events = [EpollEvent::default(); TOKENS.len()];
            let count = match self.epoll.wait(self.timeout_ms(), &mut events) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error).context("epoll"),
                waited => waited.unwrap_or(0),
            };
            self.check_deadlines(count > 0);
            for event in events.iter().take(count) {
                match TOKENS.get(event.data() as usize) {
                    Some(Token::Call) => self.answer()?,
                    Some(Token::Exit) => drop(self.machine.as_ref().map(|machine| machine.exit_latch().event().read())),
                    Some(Token::InputWanted) => {
                        let _ = self.machine.as_ref().map(|machine| machine.input_wanted().read());
                        report(&Event::InputWanted)?;
                    }
                    Some(Token::Printed) if self.machine.is_none() => return report(&Event::ConsoleClosed),
                    // Its reader is gone, and the machine is about to end.
                    Some(Token::Printed) | None => {}
                }
            }
        }
    }

    /// The time until something must be done: the process is trimmed, a guest whose kernel has panicked is given up, or the
    /// virtual machine is released.
    fn timeout_ms(&self) -> i32 {
        let panicked_at = self.machine.as_ref().and_then(|machine| machine.exit_latch().panicked_at());
        let release_at = self.ended.as_ref().map(|(_, at)| *at);
        let at = [self.trim.at(), panicked_at.map(|at| at + PANIC_GRACE), release_at].into_iter().flatten().min();
        // Rounded up, so that the time has come when the wait ends.
        at.map_or(-1, |at| at.saturating_duration_since(Instant::now()).as_millis() as i32 + 1)
    }

    fn check_deadlines(&mut self, has_events: bool) {
        if let Some(machine) = &self.machine
            && machine.exit_latch().panicked_at().is_some_and(|at| at.elapsed() >= PANIC_GRACE)
        {
            machine.exit_latch().give_up_on_panic();
        }
        self.ended.take_if(|(_, at)| Instant::now() >= *at);
        self.trim.check(has_events);
    }

    /// Ends the machine and closes its files, and reports that before its memory is released.
    fn end(&mut self, reason: Option<ExitReason>) -> Result<()> {
        let Some(machine) = self.machine.take() else { return Ok(()) };
        let marks = machine.timings().marks();
        let vm = machine.end();
        self.ended = Some((vm, Instant::now() + RELEASE_AFTER));
        report(&Event::Ended(reason, marks))
    }

    /// Answers the next call. Fails if the supervisor is gone.
    fn answer(&mut self) -> Result<()> {
        let call: Call = message::receive(&self.calls).context("the supervisor is gone")?;
        if matches!(call, Call::End) {
            self.end(None)?;
            return Ok(message::send(&self.calls, &Reply::Done)?);
        }
        let reply = self.perform(call).unwrap_or_else(|error| Reply::Failed(message::shortened(&format!("{error:#}"))));
        let reply = match self.lacks.take() {
            Some(lacks) => Reply::Started(lacks.iter().map(|lack| message::shortened(lack)).collect()),
            None => reply,
        };
        Ok(message::send(&self.calls, &reply)?)
    }

    fn perform(&mut self, call: Call) -> Result<Reply> {
        let machine = self.machine.as_mut().context("the machine has ended")?;
        let controls = machine.controls();
        match call {
            Call::Resume => machine.resume(),
            Call::ResumeUnplugged => {
                controls.links.iter().for_each(|link| link.set_up(false));
                machine.resume();
            }
            Call::Pause => machine.pause(),
            Call::PressPowerButton => machine.press_power_button(),
            Call::OfferInput(bytes) => return Ok(Reply::Accepted(machine.offer_input(&bytes))),
            Call::SetMemoryTarget(memory_mib) => {
                controls.balloon.as_ref().context("the machine has no balloon")?.set_target_mib(memory_mib)?
            }
            Call::SetDiskRate(index, rate) => controls.disks.get(index).context("no such disk")?.rate.set(rate.into()),
            Call::SetNetworkRate(index, rate) => {
                controls.links.get(index).context("no such network")?.set_rate(rate.into())
            }
            Call::SetLinks(up) => controls.links.iter().for_each(|link| link.set_up(up)),
            Call::Usage => return Ok(Reply::Usage(Box::new(usage(machine)))),
            Call::Save => {
                let [state, memory, used] = receive_files(&self.calls)?;
                save(machine, state)?;
                memory::write_to(machine.memory(), &memory, Some(&used))?;
            }
            Call::SaveChanges => {
                let [state, memory, used, changed] = receive_files(&self.calls)?;
                save(machine, state)?;
                memory::write_changes(machine.memory(), &memory, &used, &changed)?;
            }
            Call::Track => {
                let [memory] = receive_files(&self.calls)?;
                memory::track(machine.memory(), &memory, self.pages)?;
            }
            Call::End => bail!("it is handled elsewhere"),
        }
        Ok(Reply::Done)
    }
}

fn receive_files<const N: usize>(calls: &UnixDatagram) -> Result<[File; N]> {
    socket::receive_fds(calls).map(|files| files.map(File::from)).context("receive the files")
}

/// Writes the state of the machine to a file.
fn save(machine: &mut Machine, mut state: File) -> Result<()> {
    machine.pause();
    let is_unsettled = |disk: &block::DiskHandle| disk.counters.is_unsettled.load(Ordering::Relaxed);
    ensure!(!machine.controls().disks.iter().any(is_unsettled), "a disk cannot be written: see the log");
    state.write_all(&machine.save()?.encode()?).context("write the state of the machine")
}

fn usage(machine: &Machine) -> Usage {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    let controls = machine.controls();
    let disks = |counter: fn(&block::Counters) -> &AtomicU64| {
        controls.disks.iter().map(|disk| counter(&disk.counters).load(Ordering::Relaxed)).sum()
    };
    Usage {
        cpu: Duration::new(used.tv_sec.unsigned_abs(), u32::try_from(used.tv_nsec).unwrap_or(0)),
        target_mib: controls.balloon.as_ref().map(|balloon| balloon.target_mib()),
        disk_bytes: (disks(|counters| &counters.read_bytes), disks(|counters| &counters.written_bytes)),
        network_bytes: (
            controls.links.iter().map(|link| link.counts().rx_bytes).sum(),
            controls.links.iter().map(|link| link.counts().tx_bytes).sum(),
        ),
        vhost_interfaces: controls.links.iter().filter(|link| link.is_served_by_kernel()).count() as u32,
        memory_ranges: machine.memory_ranges(),
    }
}

/// Reports an event to the supervisor, waiting for room.
fn report(event: &Event) -> Result<()> {
    let events = EVENTS.get().context("not a monitor")?;
    message::send(events, event).context("report to the supervisor")
}

/// Sends a line for the log to the supervisor, if this process is a monitor. Never waits: a line for which there is no room
/// is lost. Any thread.
pub fn forward_log(record: &log::Record) -> bool {
    let Some(events) = EVENTS.get() else { return false };
    let text = message::shortened(&record.args().to_string());
    if let Ok(packet) = message::encode(&Event::Log(record.level() as usize, text)) {
        let _ = socket::send_now(events, &packet);
    }
    true
}

/// The next event that a monitor has reported through `events`, without waiting. A violation is an end.
pub(super) fn receive_event(events: &UnixDatagram) -> io::Result<Event> {
    let mut packet = [0; PACKET_BYTES_MAX];
    let packet = match events.recv(&mut packet)? {
        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        len => packet.get(..len).unwrap_or_default(),
    };
    match Report::parse(packet) {
        Some(Report { call, thread }) => Ok(Event::Ended(Some(ExitReason::Violation { thread, call }), Vec::new())),
        None => message::decode(packet),
    }
}
