//! The thread that serves queues of a device.
//!
//! The thread owns the handler, and is the only one to call it; other threads send commands. It lives as long as the
//! device, and serves queues only from a start to the next stop, or until a ring is broken.  The thread is made with
//! the device and not at its first use, because a thread inherits the system call filter of its creator, and a driver
//! starts its device from a vCPU thread.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::log_rate::LogRate;
use super::{Interrupt, Notifiers, Progress, QueueHandler, StateMismatch, Virtqueue};
use crate::sandbox;

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

/// What the thread is asked to do with its handler, one after the other.
enum Command {
    /// Serve these queues for a driver that accepted these features, until the stop event.
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
    /// `None` once it is being dropped.
    commands: Option<Sender<Command>>,
    stopped: Receiver<Vec<Virtqueue>>,
    is_running: bool,
    /// Whether the handler may have state that a reset discards.
    has_driver: bool,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Creates the thread, which waits for commands, for the queues that `notifiers` refers to.
    pub fn new(
        name: &str,
        mut handler: Box<dyn QueueHandler>,
        notifiers: Notifiers,
        reports: Arc<Reports>,
    ) -> io::Result<Worker> {
        let queues = notifiers.queues.clone();
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        watch(&epoll, stop.as_raw_fd(), STOP, EventSet::IN)?;
        for (index, doorbell) in (0..).zip(notifiers.doorbells()) {
            watch_doorbell(&epoll, doorbell, index)?;
        }
        let (commands, inbox) = channel();
        let (give_back, stopped) = channel();
        let thread = sandbox::spawn(name, move || {
            for command in inbox {
                // An answer that is no longer waited for is no loss.
                let _ = match command {
                    Command::Start(mut queues, features) => {
                        handler.start(features);
                        run(&epoll, &notifiers, &mut *handler, &mut queues, &reports);
                        give_back.send(queues).ok()
                    }
                    Command::Reset(answer) => {
                        handler.reset();
                        answer.send(()).ok()
                    }
                    Command::Save(answer) => answer.send(handler.save()).ok(),
                    Command::Restore(state, answer) => answer.send(handler.restore(&state)).ok(),
                };
            }
        })?;
        let commands = Some(commands);
        Ok(Worker { queues, stop, commands, stopped, is_running: false, has_driver: false, thread: Some(thread) })
    }

    /// The range of the device's queues that it serves.
    pub fn queues(&self) -> Range<usize> {
        self.queues.clone()
    }

    /// Whether it was started and not stopped since.
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

    /// Has the thread stop, if it runs, without waiting for it as [`Worker::stop`] does.
    pub fn request_stop(&self) {
        if self.is_running {
            // The counter is far from its limit, so that it cannot block or fail.
            let _ = self.stop.write(1);
        }
    }

    /// Waits until everything in flight is completed, and takes back the queues. `None` where it does not run.
    pub fn stop(&mut self) -> Option<Vec<Virtqueue>> {
        self.request_stop();
        if !std::mem::take(&mut self.is_running) {
            return None;
        }
        let queues = self.stopped.recv().ok();
        let _ = self.stop.read();
        queues
    }

    /// Has the handler forget its driver. Not to be called while the thread runs.
    pub fn reset(&mut self) {
        if std::mem::take(&mut self.has_driver) {
            self.ask(Command::Reset);
        }
    }

    /// What the handler keeps between two runs. Not to be called while the thread runs.
    pub fn save(&self) -> Vec<u8> {
        self.ask(Command::Save).unwrap_or_default()
    }

    /// Puts back what [`Worker::save`] returned. Fails, with nothing changed, where it does not fit the handler. Not to
    /// be called while the thread runs.
    pub fn restore(&mut self, state: &[u8]) -> Result<(), StateMismatch> {
        self.has_driver = true;
        self.ask(|answer| Command::Restore(state.to_vec(), answer)).unwrap_or(Err(StateMismatch))
    }

    /// Whether the thread is there to take it.
    fn send(&self, command: Command) -> bool {
        self.commands.as_ref().is_some_and(|commands| commands.send(command).is_ok())
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Option<T> {
        let (to, answer) = channel();
        self.send(command(to)).then(|| answer.recv().ok()).flatten()
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

/// One run: until the stop event or a broken ring, and then until nothing is in flight.
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
    let signalled = signal(queues, notifiers);
    if let Err(error) = served.and(drained).and(signalled) {
        reports.fail(&error);
    }
}

/// Why the queues are no longer served.
enum Until {
    /// The stop event was signaled.
    Stopped,
    /// A queue is to be offloaded, or taken back.
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
    // Their doorbells are handled by the kernel.
    offloaded().for_each(|(_, doorbell)| unwatch(epoll, doorbell.as_raw_fd()));
    let served = wake_fds
        .iter()
        .try_for_each(|fd| watch(epoll, *fd, WAKE, EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED))
        .map_err(anyhow::Error::from)
        .and_then(|()| serve(epoll, notifiers, handler, queues));
    wake_fds.iter().for_each(|fd| unwatch(epoll, *fd));
    offloaded().try_for_each(|(index, doorbell)| watch_doorbell(epoll, doorbell, index))?;
    served
}

/// Serves all queues with pending work in turns, until the stop event or until a queue is to be offloaded or taken
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
    loop {
        for (index, due) in due.iter_mut().enumerate().filter(|(_, due)| **due) {
            *due = turn(index, handler, queues, notifiers)?;
        }
        if !handler.offload_is_current()? {
            return Ok(Until::OffloadChanged);
        }
        let timeout_ms = if due.contains(&true) { 0 } else { -1 };
        let count = match epoll.wait(timeout_ms, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            count => count?,
        };
        for event in events.iter().take(count) {
            match event.data() {
                STOP => return Ok(Until::Stopped),
                WAKE => due.fill(true),
                index => due.iter_mut().skip(index as usize).take(1).for_each(|due| *due = true),
            }
        }
    }
}

/// One queue's turn: returns whether it is due another one.
fn turn(
    index: usize,
    handler: &mut dyn QueueHandler,
    queues: &mut [Virtqueue],
    notifiers: &Notifiers,
) -> anyhow::Result<bool> {
    if queues[index].is_offloaded() {
        return Ok(false);
    }
    queues[index].disable_notification()?;
    let left = handler.process(index, queues)?;
    signal(queues, notifiers)?;
    match left {
        Progress::Drained => Ok(queues[index].enable_notification()?),
        Progress::More => Ok(true),
        Progress::Blocked => Ok(false),
    }
}

/// One interrupt for all that was pushed since the last time, where the driver wants it.
fn signal(queues: &mut [Virtqueue], notifiers: &Notifiers) -> anyhow::Result<()> {
    for (index, queue) in queues.iter_mut().enumerate() {
        if queue.needs_interrupt()? {
            notifiers.queue_used(index);
        }
    }
    Ok(())
}

/// Edge-triggered, so the counter need not be read: every write is an event, whatever its value.
fn watch_doorbell(epoll: &Epoll, doorbell: &EventFd, index: u64) -> io::Result<()> {
    watch(epoll, doorbell.as_raw_fd(), index, EventSet::IN | EventSet::EDGE_TRIGGERED)
}

fn unwatch(epoll: &Epoll, fd: RawFd) {
    // Fails if it is not watched, which is fine.
    let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}

fn watch(epoll: &Epoll, fd: RawFd, mark: u64, events: EventSet) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, mark))
}
