//! The machine's main thread: waits for the machine's end, signals, keys and requests, and handles them in the order
//! they occur.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::drain::{self, Printer};
use super::endpoint::ControlEndpoint;
use super::health::Prober;
use super::requests;
use super::snapshot::{Save, Snapshot};
use crate::config::MachineConfig;
use crate::console::input::Input;
use crate::console::keys::{self, Command};
use crate::console::log::Log;
use crate::console::terminal::{self, RawTerminal};
use crate::exit_latch::ExitReason;
use crate::fs::process::Process;
use crate::guest::session::Session;
use crate::guest::signal;
use crate::monitor::Monitor;
use crate::request::Reply;
use crate::request::server::Caller;
use crate::resources::passt::Starter;
use crate::resources::{Outside, Resources};
use crate::snapshot::touched;
use crate::state_dir;
use crate::sys::SignalFd;
use crate::sys::resident::IdleTrim;
use crate::sys::timer::ClockJumps;
use crate::timings::{Step, Timings};
use husk_protocol::ToHost;

/// The event sources of the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    Exit,
    Monitor,
    Signal,
    Keys,
    Session,
    ControlEndpoint,
    Passt,
    ClockJump,
    Snapshot,
    Health,
}

const TOKENS: [Token; 10] = [
    Token::Exit,
    Token::Monitor,
    Token::Signal,
    Token::Keys,
    Token::Session,
    Token::ControlEndpoint,
    Token::Passt,
    Token::ClockJump,
    Token::Snapshot,
    Token::Health,
];

/// What this process's standard streams and signals are connected to.
pub enum Stdio<'a> {
    /// The serial port. The first termination signal presses the power button, the second ends the machine. Any other
    /// signal that terminates a process ends the machine immediately.
    Console,
    /// The guest's process, with or without a terminal. Signals are forwarded to it. The serial port prints to the log.
    Session {
        /// The process's session. It outlives the machine so that the exit status can be read afterwards.
        session: &'a mut Session,
        /// Whether all keys typed on the terminal go to the process.
        takes_keys: bool,
        /// The destination of kernel messages.
        log: Log,
        /// If the guest waits for a process instead: where the machine is saved when it does.
        save: Option<&'a Save>,
        /// The snapshot that the guest has begun in, if it is to get a record of the memory that is touched.
        recorded: Option<&'a Path>,
    },
}

/// Blocks the signals that [`run`] handles and, for a session, also those that are only forwarded to the process. Must
/// be called on the first thread before others are started.
pub fn block_signals(for_session: bool) -> Result<SignalFd> {
    let session = if for_session { &[libc::SIGWINCH, libc::SIGCONT][..] } else { &[] };
    SignalFd::block(&[&signal::that_end_a_process(), session].concat()).context("block signals")
}

/// Blocks all signals that can be passed on, for a process that stands for another one. Those that the C library uses cannot, and
/// SIGPIPE and SIGCHLD are this process's own.
pub fn block_all_signals() -> Result<SignalFd> {
    const OWN: [i32; 6] = [libc::SIGKILL, libc::SIGSTOP, libc::SIGPIPE, libc::SIGCHLD, 32, 33];
    let all: Vec<i32> = (1..=libc::SIGRTMAX()).filter(|signal| !OWN.contains(signal)).collect();
    SignalFd::block(&all).context("block signals")
}

/// Builds the machine `config` from what was opened for it, and runs it until it ends, with this process's streams connected
/// as `stdio` says. Serves requests at `endpoint`.
pub fn run(
    config: &MachineConfig,
    opened: (Resources, Outside),
    timings: Arc<Timings>,
    signals: &SignalFd,
    stdio: Stdio,
    endpoint: &mut ControlEndpoint,
) -> Result<ExitReason> {
    let (mut session, wants_terminal, log, save, recorded) = match stdio {
        Stdio::Console => (None, true, None, None, None),
        Stdio::Session { session, takes_keys, log, save, recorded } => {
            (Some(session), takes_keys, Some(log), save, recorded)
        }
    };
    let (console, sink) = drain::console(log, endpoint)?;
    let (resources, outside) = opened;
    let mut monitor = Monitor::start(config, resources, outside, console, timings)?;
    let printer = Printer::start(sink, monitor.exit_latch())?;
    let wants_terminal = wants_terminal && !endpoint.is_detached();
    let terminal = if wants_terminal { RawTerminal::enter().context("set up the terminal")? } else { None };
    let on_terminal = terminal.is_some();
    let mut supervisor = Supervisor::new(&mut monitor, signals, session.as_deref_mut(), endpoint, on_terminal)?;
    (supervisor.save, supervisor.recorded) = (save, recorded);
    let reason = supervisor.run()?;
    monitor.timings().mark(Step::End);
    monitor.end();
    let printed = drain::print(&mut monitor, printer, session, signals, endpoint, &reason);
    drop(terminal);
    printed.map(|()| reason)
}

pub(super) struct Supervisor<'a> {
    pub(super) monitor: &'a mut Monitor,
    pub(super) epoll: Epoll,
    signals: &'a SignalFd,
    /// The session that the standard streams and signals belong to, if they do not belong to the serial port.
    pub(super) session: Option<&'a mut Session>,
    /// Where requests from other commands arrive.
    pub(super) endpoint: &'a mut ControlEndpoint,
    pub(super) input: Option<Input>,
    /// Inputs that resume when the current one ends, most recent last.
    pub(super) earlier_inputs: Vec<Input>,
    /// Detects that the host's wall clock was set or that the host was suspended.
    clock_jumps: ClockJumps,
    button_pressed: bool,
    on_terminal: bool,
    trim: IdleTrim,
    save: Option<&'a Save>,
    recorded: Option<&'a Path>,
    /// Who has asked for the program of a process that waits in its container.
    pub(super) starter: Option<Caller>,
    /// The snapshot that is being taken.
    pub(super) snapshot: Option<Snapshot>,
    /// The IDs of snapshots since which it is known what has changed in memory.
    pub(super) bases: Vec<String>,
    /// Checks the health of the machine, once it is running.
    pub(super) prober: Option<Prober>,
    /// Whether read-only folders may still be filled.
    is_filling: bool,
    /// Whether the machine's network links are down until it differs from the one that was saved.
    is_unplugged: bool,
}

impl<'a> Supervisor<'a> {
    fn new(
        monitor: &'a mut Monitor,
        signals: &'a SignalFd,
        session: Option<&'a mut Session>,
        endpoint: &'a mut ControlEndpoint,
        on_terminal: bool,
    ) -> Result<Supervisor<'a>> {
        let epoll = Epoll::new().context("epoll")?;
        watch(&epoll, monitor.exit_latch().event().as_raw_fd(), Token::Exit)?;
        watch(&epoll, monitor.as_raw_fd(), Token::Monitor)?;
        watch(&epoll, signals.as_raw_fd(), Token::Signal)?;
        monitor.outside().starters().try_for_each(|starter| watch(&epoll, starter.as_raw_fd(), Token::Passt))?;
        let input = match &session {
            Some(session) => {
                watch(&epoll, session.as_raw_fd(), Token::Session)?;
                None
            }
            None if endpoint.is_detached() => None,
            None => Input::from_stdin(on_terminal),
        };
        watch(&epoll, endpoint.as_raw_fd(), Token::ControlEndpoint)?;
        let clock_jumps = ClockJumps::new().context("watch the clock")?;
        watch(&epoll, clock_jumps.as_fd().as_raw_fd(), Token::ClockJump)?;
        let (earlier_inputs, button_pressed) = (Vec::new(), false);
        let bases = endpoint.restored_from.take().into_iter().collect();
        let is_unplugged = session.as_ref().is_some_and(|session| session.is_double());
        Ok(Supervisor {
            monitor,
            epoll,
            signals,
            session,
            endpoint,
            input,
            earlier_inputs,
            clock_jumps,
            button_pressed,
            on_terminal,
            trim: IdleTrim::start(),
            save: None,
            recorded: None,
            starter: None,
            snapshot: None,
            bases,
            prober: None,
            is_filling: true,
            is_unplugged,
        })
    }

    /// Returns when the machine has ended.
    fn run(mut self) -> Result<ExitReason> {
        let reason = self.serve();
        let snapshot = self.end_snapshot();
        reason.and_then(|reason| snapshot.map(|()| reason))
    }

    fn serve(&mut self) -> Result<ExitReason> {
        match self.monitor.start_guest(self.signals, !self.is_unplugged) {
            Ok(lacks) => self.endpoint.note_sandbox(lacks),
            Err(error) => return self.monitor.exit_latch().reason().ok_or(error),
        }
        self.feed()?;
        self.endpoint.remove_stale();
        loop {
            self.note_start()?;
            // It may have been reported while a call was waiting for its reply.
            if self.monitor.take_input_wanted() {
                self.feed()?;
            }
            if let Some(reason) = self.monitor.exit_latch().reason() {
                return Ok(reason);
            }
            let mut events = [EpollEvent::default(); TOKENS.len()];
            let count = match self.epoll.wait(self.timeout_ms(), &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                Err(e) => return Err(e).context("wait for events"),
            };
            self.trim.check(count > 0);
            for event in events.iter().take(count) {
                match TOKENS.get(event.data() as usize) {
                    Some(Token::Exit) => drop(self.monitor.exit_latch().event().read()),
                    Some(Token::Signal) => self.on_signal()?,
                    Some(Token::Keys) => self.on_keys()?,
                    Some(Token::Monitor) => self.monitor.handle_events(),
                    Some(Token::Session) => {
                        if let Some(session) = &mut self.session {
                            session.on_ready(self.monitor.exit_latch())?;
                            if session.take_out_of_memory() {
                                self.endpoint.note_out_of_memory()?;
                            }
                        }
                        self.save_if_waiting()?;
                        self.record_touched();
                    }
                    Some(Token::ControlEndpoint) => requests::answer(self),
                    // Not on the device's thread, so that only this one starts processes.
                    Some(Token::Passt) => self.monitor.outside().starters().for_each(Starter::start_if_needed),
                    Some(Token::Health) => {
                        if let Some(prober) = &self.prober {
                            self.endpoint.note_health(prober.take(), prober.in_start_period())?;
                        }
                    }
                    Some(Token::ClockJump) if self.clock_jumps.take() => self.check_guest_clock(),
                    Some(Token::ClockJump | Token::Snapshot) | None => {}
                }
            }
            self.continue_snapshot()?;
        }
    }

    /// Makes the guest set its wall clock to the host's, if husk's init is running.
    pub(super) fn check_guest_clock(&mut self) {
        if let Some(session) = &mut self.session {
            session.check_clock();
        }
    }

    /// Saves a machine that waits for its process, if it is to be saved then.
    fn save_if_waiting(&mut self) -> Result<()> {
        let Some(save) = self.save.take_if(|_| self.session.as_ref().is_some_and(|session| session.is_waiting()))
        else {
            return Ok(());
        };
        self.save_and_end(save)
    }

    /// Records for later runs which memory this one has touched, once its process has ended.
    fn record_touched(&mut self) {
        let has_ended = self.session.as_ref().is_some_and(|session| session.end().is_some());
        let Some(path) = self.recorded.take_if(|_| has_ended) else { return };
        let record = self.monitor.touched_pages();
        if let Err(error) = record.and_then(|record| touched::write(path, &record)) {
            log::debug!("record the memory that was touched: {error:#}");
        }
    }

    /// Reports that the machine is running, once it is, including its process if it has one, and connects it to its networks.
    fn note_start(&mut self) -> Result<()> {
        if self.session.as_ref().is_some_and(|session| session.is_created()) {
            self.endpoint.note_created();
            self.answer_starter();
        }
        if self.session.as_ref().is_some_and(|session| !session.has_started()) {
            return Ok(());
        }
        let is_double = self.session.as_ref().is_some_and(|session| session.is_double());
        if !is_double && std::mem::take(&mut self.is_unplugged) {
            self.monitor.set_links(true)?;
        }
        if std::mem::take(&mut self.is_filling) {
            // Init has said that it has filled those that are to be.
            self.monitor.outside().servers().iter().for_each(Process::seal);
        }
        self.endpoint.note_running()?;
        self.start_prober()
    }

    /// Answers who has asked for the program of a container, once it is running or has failed to start.
    fn answer_starter(&mut self) {
        let reply = self.session.as_ref().and_then(|session| match session.end() {
            Some(ToHost::Failed { message, .. }) => Some(Reply::Refused(message.clone())),
            _ => session.has_started().then_some(Reply::Done),
        });
        if let Some(reply) = reply
            && let Some(caller) = self.starter.take()
        {
            self.endpoint.server.answer(caller, &reply);
        }
    }

    /// Starts the health checks, if there are any and they have not been started.
    fn start_prober(&mut self) -> Result<()> {
        let record = &self.endpoint.record;
        let (Some(check), Some(process), None) = (&record.health_check, &record.process, &self.prober) else {
            return Ok(());
        };
        let prober = Prober::start(check.clone(), process, self.endpoint.file(state_dir::VSOCK))?;
        watch(&self.epoll, prober.as_raw_fd(), Token::Health)?;
        self.prober = Some(prober);
        Ok(())
    }

    /// The maximum time to wait, in milliseconds: unlimited, unless the process has not been trimmed, a session is over and
    /// the guest may not exit by itself, or a stop request has a timeout.
    fn timeout_ms(&self) -> i32 {
        let left = self.trim.at().map(|at| at.saturating_duration_since(Instant::now()));
        // Rounded up, so that the time has come when the wait ends.
        let trim_ms = left.map_or(-1, |left| left.as_millis() as i32 + 1);
        let exit_latch = self.monitor.exit_latch();
        let session_ms = self.session.as_ref().map_or(-1, |session| session.timeout_ms(exit_latch));
        let timeouts = [trim_ms, session_ms, self.endpoint.timeout_ms(exit_latch), self.snapshot_timeout_ms()];
        timeouts.into_iter().filter(|timeout_ms| *timeout_ms >= 0).min().unwrap_or(-1)
    }

    fn on_signal(&mut self) -> Result<()> {
        let Some(signal) = self.signals.read().context("read a signal")? else { return Ok(()) };
        // Whoever asks for the machine's end, such as a host that shuts down, does not want it to be restarted.
        self.endpoint.end_requested |= signal::is_termination(signal);
        if let Some(session) = &mut self.session {
            session.on_signal(signal, self.monitor.exit_latch());
        } else if self.button_pressed || !signal::is_termination(signal) {
            self.monitor.exit_latch().declare(ExitReason::Killed(signal));
        } else {
            self.press_power_button();
        }
        Ok(())
    }

    pub(super) fn press_power_button(&mut self) {
        self.button_pressed = true;
        if !self.press_when_saved() {
            let _ = self.monitor.press_power_button();
        }
        self.say("husk: pressed the machine's power button; a second signal kills the machine\n");
    }

    fn on_keys(&mut self) -> Result<()> {
        let commands = self.input.as_mut().map(Input::read).unwrap_or_default();
        for command in commands {
            match command {
                Command::Quit => self.monitor.exit_latch().declare(ExitReason::Quit),
                Command::PowerButton if self.press_when_saved() => {}
                Command::PowerButton => drop(self.monitor.press_power_button()),
                Command::Help => self.say(keys::HELP),
            }
        }
        self.feed()
    }

    /// Forwards as much input to the guest as it accepts, and watches for more only while there is room. Input that is
    /// unwanted or has ended causes no wakeups.
    pub(super) fn feed(&mut self) -> Result<()> {
        while let Some(input) = &mut self.input {
            while input.feed(|bytes| self.monitor.offer_input(bytes)) {
                if input.watch(&self.epoll, Token::Keys as u64).context("watch standard input")? {
                    return Ok(());
                }
                // A file that cannot be watched contains no terminal escape sequences.
                input.read();
            }
            input.unwatch(&self.epoll).context("stop watching standard input")?;
            if !input.is_over() {
                break;
            }
            self.input = self.earlier_inputs.pop();
        }
        Ok(())
    }

    /// Prints a message to the user's terminal, if there is one.
    fn say(&self, words: &str) {
        if self.on_terminal || io::IsTerminal::is_terminal(&io::stderr()) {
            terminal::say(words, Duration::ZERO);
        }
    }
}

pub(super) fn watch(epoll: &Epoll, fd: RawFd, token: Token) -> Result<()> {
    epoll
        .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token as u64))
        .with_context(|| format!("watch {token:?}"))
}

pub(super) fn unwatch(epoll: &Epoll, fd: RawFd) -> Result<()> {
    epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()).context("stop watching")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signals_of_a_session_are_blocked_until_they_are_read() {
        let blocked = |for_session| {
            // Of its own, since another test may run on this thread.
            let of_thread = move || {
                let _signals = block_signals(for_session).unwrap();
                std::fs::read_to_string("/proc/thread-self/status").unwrap()
            };
            let status = std::thread::spawn(of_thread).join().unwrap();
            let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
            u64::from_str_radix(mask.trim(), 16).unwrap()
        };
        let has = |mask: u64, signal: i32| mask >> (signal - 1) & 1 == 1;
        for (for_session, mask) in [(true, blocked(true)), (false, blocked(false))] {
            assert!(has(mask, libc::SIGTERM) && has(mask, libc::SIGALRM) && has(mask, 40), "{mask:x}");
            assert!(has(mask, libc::SIGWINCH) == for_session && has(mask, libc::SIGCONT) == for_session, "{mask:x}");
            assert!(!has(mask, libc::SIGSEGV) && !has(mask, libc::SIGTSTP), "{mask:x}");
        }
    }
}
