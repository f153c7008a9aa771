//! The thread that serves the queues of a device.
//!
//! The thread owns the handler and is the only one that calls it; other threads send commands. It exists as long as the
//! device, but serves queues only between a start and the next stop, or until a ring is broken. It is created with the
//! device and not on first use: a driver starts its device from a vCPU thread, and a new thread would inherit that
//! thread's system call filter.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::log_rate::LogRate;
use super::{Interrupt, Notifiers, Progress, QueueHandler, StateMismatch, Virtqueue};
use crate::sandbox::{self, ThreadRole};
use crate::sys::event;

use idle_poll::IdlePoll;

mod idle_poll;
#[cfg(test)]
mod tests;

/// Epoll tokens other than doorbell indexes.
const STOP: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;

/// Reports device failures to the driver and the log.
pub struct Reports {
    name: String,
    needs_reset: AtomicBool,
    interrupt: Arc<dyn Interrupt>,
    log_rate: Mutex<LogRate>,
}

impl Reports {
    /// Creates the reports of the device `name`.
    pub fn new(name: &str, interrupt: Arc<dyn Interrupt>) -> Reports {
        Reports { name: name.to_owned(), needs_reset: AtomicBool::new(false), interrupt, log_rate: Mutex::default() }
    }

    /// The interrupt that notifies the driver.
    pub fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.interrupt
    }

    /// Whether the device has failed and needs a reset (DEVICE_NEEDS_RESET, virtio 1.2 §2.1.2).
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Sets or clears that state without notifying the driver.
    pub fn set_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// Marks the device as failed until its driver resets it. Notifies the driver and logs the reason.
    pub fn fail(&self, why: &dyn std::fmt::Display) {
        self.set_needs_reset(true);
        self.interrupt.config_changed();
        if self.log_rate.lock().unwrap_or_else(PoisonError::into_inner).allows() {
            log::warn!("{}: device needs a reset: {why}", self.name);
        }
    }
}

/// A command to the thread. Commands are executed in order.
enum Command {
    /// Serve these queues, for a driver that accepted these features, until the stop event is signaled.
    Start(Vec<Virtqueue>, u64),
    /// [`QueueHandler::reset`].
    Reset(Sender<()>),
    /// [`QueueHandler::save`].
    Save(Sender<Vec<u8>>),
    /// [`QueueHandler::restore`].
    Restore(Vec<u8>, Sender<Result<(), StateMismatch>>),
}

/// A thread that owns a handler and serves some of a device's queues. Dropping it stops and joins it.
pub struct Worker {
    queues: Range<usize>,
    stop: EventFd,
    /// `None` while this is being dropped.
    commands: Option<Sender<Command>>,
    stopped: Receiver<Vec<Virtqueue>>,
    is_running: bool,
    /// Whether the handler may have driver state, which a reset must discard.
    has_driver: bool,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Creates the thread for the queues that `notifiers` refers to. It waits for commands.
    pub fn new(
        name: &str,
        mut handler: Box<dyn QueueHandler>,
        notifiers: Notifiers,
        reports: Arc<Reports>,
    ) -> io::Result<Worker> {
        let queues = notifiers.queues.clone();
        let stop = event::create()?;
        let epoll = Epoll::new()?;
        watch(&epoll, stop.as_raw_fd(), STOP, EventSet::IN)?;
        for (index, doorbell) in (0..).zip(notifiers.doorbells()) {
            watch_doorbell(&epoll, doorbell, index)?;
        }
        let (commands, inbox) = channel();
        let (returned, stopped) = channel();
        let thread = sandbox::spawn_confined(ThreadRole::Worker, name, move || {
            for command in inbox {
                // The receiver may be gone, in which case the result is not needed.
                let _ = match command {
                    Command::Start(mut queues, features) => {
                        handler.start(features);
                        run(&epoll, &notifiers, &mut *handler, &mut queues, &reports);
                        returned.send(queues).ok()
                    }
                    Command::Reset(reply) => {
                        handler.reset();
                        reply.send(()).ok()
                    }
                    Command::Save(reply) => reply.send(handler.save()).ok(),
                    Command::Restore(state, reply) => reply.send(handler.restore(&state)).ok(),
                };
            }
        })?;
        let commands = Some(commands);
        Ok(Worker { queues, stop, commands, stopped, is_running: false, has_driver: false, thread: Some(thread) })
    }

    /// The range of the device's queues that this worker serves.
    pub fn queues(&self) -> Range<usize> {
        self.queues.clone()
    }

    /// Whether it was started and has not been stopped since.
    pub fn is_running(&self) -> bool {
        self.is_running
    }

    /// Starts serving `queues`, which must be those of [`Worker::queues`], with the `features` accepted by the driver.
    /// The thread checks every queue once. Returns immediately. Must not be called while it is running.
    pub fn start(&mut self, queues: Vec<Virtqueue>, features: u64) {
        debug_assert!(!self.is_running);
        self.is_running = self.send(Command::Start(queues, features));
        self.has_driver = true;
    }

    /// Requests a stop if the worker is running, without waiting for it like [`Worker::stop`].
    pub fn request_stop(&self) {
        if self.is_running {
            // The counter is far below its maximum, so this neither blocks nor fails.
            let _ = self.stop.write(1);
        }
    }

    /// Stops serving queues: waits until all requests in flight are complete, and returns the queues. `None` if the
    /// worker is not running.
    pub fn stop(&mut self) -> Option<Vec<Virtqueue>> {
        self.request_stop();
        if !std::mem::take(&mut self.is_running) {
            return None;
        }
        let queues = self.stopped.recv().ok();
        let _ = self.stop.read();
        queues
    }

    /// Makes the handler discard all driver state. Must not be called while the worker is running.
    pub fn reset(&mut self) {
        if std::mem::take(&mut self.has_driver) {
            self.call(Command::Reset);
        }
    }

    /// Saves the handler's state between two runs. Must not be called while the worker is running.
    pub fn save(&self) -> Vec<u8> {
        self.call(Command::Save).unwrap_or_default()
    }

    /// Restores the state returned by [`Worker::save`]. Fails without any change if it does not match the handler. Must
    /// not be called while the worker is running.
    pub fn restore(&mut self, state: &[u8]) -> Result<(), StateMismatch> {
        self.has_driver = true;
        self.call(|reply| Command::Restore(state.to_vec(), reply)).unwrap_or(Err(StateMismatch))
    }

    /// Sends a command. Returns false if the thread has exited.
    fn send(&self, command: Command) -> bool {
        self.commands.as_ref().is_some_and(|commands| commands.send(command).is_ok())
    }

    /// Sends a command and waits for its result. Returns `None` if the thread has exited.
    fn call<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Option<T> {
        let (sender, reply) = channel();
        self.send(command(sender)).then(|| reply.recv().ok()).flatten()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Serves the queues until the stop event is signaled or a ring is broken, and then completes all requests in flight.
fn run(
    epoll: &Epoll,
    notifiers: &Notifiers,
    handler: &mut dyn QueueHandler,
    queues: &mut [Virtqueue],
    reports: &Reports,
) {
    let served = loop {
        match serve_until_change(epoll, notifiers, handler, queues) {
            Ok(Until::Stopped) => break Ok(()),
            Ok(Until::OffloadChanged) => {}
            Err(error) => break Err(error),
        }
    };
    let drained = handler.drain(queues).map_err(anyhow::Error::from);
    let signaled = signal(queues, notifiers);
    if let Err(error) = served.and(drained).and(signaled) {
        reports.fail(&error);
    }
}

/// Why serving the queues ended.
enum Until {
    /// The stop event was signaled.
    Stopped,
    /// A queue must be offloaded or taken back.
    OffloadChanged,
}

/// Serves the queues while their offload state stays the same.
fn serve_until_change(
    epoll: &Epoll,
    notifiers: &Notifiers,
    handler: &mut dyn QueueHandler,
    queues: &mut [Virtqueue],
) -> anyhow::Result<Until> {
    handler.update_offload(queues, notifiers)?;
    let wake_fds: Vec<RawFd> = handler.wake_fds().iter().map(|fd| fd.as_raw_fd()).collect();
    let is_offloaded: Vec<bool> = queues.iter().map(Virtqueue::is_offloaded).collect();
    let offloaded = || {
        (0..)
            .zip(notifiers.doorbells())
            .zip(&is_offloaded)
            .filter(|(_, is_offloaded)| **is_offloaded)
            .map(|(bell, _)| bell)
    };
    // The kernel handles the doorbells of offloaded queues.
    offloaded().for_each(|(_, doorbell)| unwatch(epoll, doorbell.as_raw_fd()));
    let room = if handler.waits_for_room() { EventSet::OUT } else { EventSet::empty() };
    let served = wake_fds
        .iter()
        .try_for_each(|fd| watch(epoll, *fd, WAKE, EventSet::IN | room | EventSet::EDGE_TRIGGERED))
        .map_err(anyhow::Error::from)
        .and_then(|()| serve(epoll, notifiers, handler, queues));
    wake_fds.iter().for_each(|fd| unwatch(epoll, *fd));
    offloaded().try_for_each(|(index, doorbell)| watch_doorbell(epoll, doorbell, index))?;
    served
}

/// Serves all queues with pending work in turns, until the stop event is signaled or a queue must be offloaded or taken
/// back.
fn serve(
    epoll: &Epoll,
    notifiers: &Notifiers,
    handler: &mut dyn QueueHandler,
    queues: &mut [Virtqueue],
) -> anyhow::Result<Until> {
    let mut events = [EpollEvent::default(); 16];
    // Doorbells from before this run are unknown, so each queue is checked once.
    let mut due = vec![true; queues.len()];
    let mut poll = IdlePoll::default();
    loop {
        for (index, due) in due.iter_mut().enumerate().filter(|(_, due)| **due) {
            *due = turn(index, handler, queues, notifiers, &mut poll)?;
        }
        if !handler.offload_is_current()? {
            return Ok(Until::OffloadChanged);
        }
        let timeout_ms = if due.contains(&true) { 0 } else { -1 };
        let count = match epoll.wait(timeout_ms, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            count => count?,
        };
        poll.woken();
        for event in events.iter().take(count) {
            match event.data() {
                STOP => return Ok(Until::Stopped),
                WAKE => due.fill(true),
                index => due.iter_mut().skip(index as usize).take(1).for_each(|due| *due = true),
            }
        }
    }
}

/// Processes one queue for a turn. Returns whether it needs another turn.
fn turn(
    index: usize,
    handler: &mut dyn QueueHandler,
    queues: &mut [Virtqueue],
    notifiers: &Notifiers,
    poll: &mut IdlePoll,
) -> anyhow::Result<bool> {
    if queues[index].is_offloaded() {
        return Ok(false);
    }
    queues[index].disable_notification()?;
    let left = handler.process(index, queues)?;
    signal(queues, notifiers)?;
    match left {
        Progress::Drained if handler.may_poll() && poll.wait(|| queues[index].has_available()) => Ok(true),
        Progress::Drained => Ok(queues[index].enable_notification()?),
        Progress::More => Ok(true),
        Progress::Blocked => Ok(false),
    }
}

/// Interrupts the driver once per queue for all chains pushed since the last call, if the driver wants that.
fn signal(queues: &mut [Virtqueue], notifiers: &Notifiers) -> anyhow::Result<()> {
    for (index, queue) in queues.iter_mut().enumerate() {
        if queue.needs_interrupt()? {
            notifiers.queue_used(index);
        }
    }
    Ok(())
}

/// Watches a doorbell edge-triggered, so that its counter need not be read: every write is an event.
fn watch_doorbell(epoll: &Epoll, doorbell: &EventFd, index: u64) -> io::Result<()> {
    watch(epoll, doorbell.as_raw_fd(), index, EventSet::IN | EventSet::EDGE_TRIGGERED)
}

fn unwatch(epoll: &Epoll, fd: RawFd) {
    // Fails if the descriptor is not being watched, which is harmless.
    let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}

fn watch(epoll: &Epoll, fd: RawFd, mark: u64, events: EventSet) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, mark))
}
