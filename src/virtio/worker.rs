//! From a doorbell to the handler: the thread that serves a device's queues.
//!
//! The thread lives as long as the device, but works only while it is lent the handler and the queues: it gives them back
//! when it is told to stop, or when a ring is broken. What the handler gives away meanwhile is not listened to. The thread
//! is made with the device and not at its first use, because a thread inherits the system calls left to the thread that
//! makes it, and a driver starts its device from a vCPU thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::log_rate::LogRate;
use super::{Interrupt, Notifiers, Progress, QueueHandler, Virtqueue};
use crate::sandbox;

/// The handler and the queues of a device that runs: what its worker owns for the length of a run.
pub struct ActiveQueues {
    /// The device's code.
    pub handler: Box<dyn QueueHandler>,
    /// All of the device's queues, in order.
    pub queues: Vec<Virtqueue>,
}

/// Marks of epoll events that are no doorbell's index.
const STOP: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;

/// What the worker has to say to the driver, and to the person who reads the log.
pub struct Reports {
    name: String,
    needs_reset: AtomicBool,
    interrupt: Arc<dyn Interrupt>,
    log_rate: Mutex<LogRate>,
}

impl Reports {
    /// Reports of the device called `name`.
    pub fn new(name: &str, interrupt: Arc<dyn Interrupt>) -> Reports {
        Reports { name: name.to_owned(), needs_reset: AtomicBool::new(false), interrupt, log_rate: Mutex::default() }
    }

    /// The way to the driver.
    pub fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.interrupt
    }

    /// Whether the device gave up until its driver resets it (DEVICE_NEEDS_RESET, virtio 1.2 §2.1.2).
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Sets or clears that, without a word to the driver.
    pub fn set_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// The device cannot go on until its driver resets it: says so to both.
    pub fn fail(&self, why: &dyn std::fmt::Display) {
        self.set_needs_reset(true);
        self.interrupt.config_changed();
        if self.log_rate.lock().unwrap_or_else(PoisonError::into_inner).allows() {
            log::warn!("{}: device needs a reset: {why}", self.name);
        }
    }
}

/// A device's thread. Dropping it stops and joins it.
pub struct Worker {
    stop: EventFd,
    lend: Option<Sender<ActiveQueues>>,
    back: Receiver<ActiveQueues>,
    running: bool,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Makes the thread, which then waits to be lent something. Doorbell `i` is queue `i`'s.
    pub fn new(name: &str, doorbells: Arc<Vec<EventFd>>, reports: Arc<Reports>) -> io::Result<Worker> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        watch(&epoll, stop.as_raw_fd(), STOP, EventSet::IN)?;
        for (index, doorbell) in (0..).zip(doorbells.iter()) {
            watch_doorbell(&epoll, doorbell, index)?;
        }
        let notifiers = Notifiers { doorbells, interrupt: reports.interrupt.clone() };
        let (lend, active) = channel::<ActiveQueues>();
        let (give_back, back) = channel();
        let thread = sandbox::spawn(name, move || {
            for mut active in active {
                run(&epoll, &notifiers, &mut active, &reports);
                if give_back.send(active).is_err() {
                    return;
                }
            }
        })?;
        Ok(Worker { stop, lend: Some(lend), back, running: false, thread: Some(thread) })
    }

    /// Lends the handler and the queues to the thread, which looks at every queue once. Not to be called while it runs.
    pub fn start(&mut self, active: ActiveQueues) {
        debug_assert!(!self.running);
        self.running = self.lend.as_ref().is_some_and(|lend| lend.send(active).is_ok());
    }

    /// Waits until everything in flight is completed and takes back what was lent. `None` when nothing was.
    pub fn stop(&mut self) -> Option<ActiveQueues> {
        if !std::mem::take(&mut self.running) {
            return None;
        }
        // The counter was 0, so that neither call can block or fail.
        let _ = self.stop.write(1);
        let active = self.back.recv().ok();
        let _ = self.stop.read();
        active
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
        self.lend = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One run: until the stop event or a broken ring, and then until nothing is in flight.
fn run(epoll: &Epoll, notifiers: &Notifiers, active: &mut ActiveQueues, reports: &Reports) {
    let served = loop {
        match serve_until_change(epoll, notifiers, active) {
            Ok(Until::Stopped) => break Ok(()),
            Ok(Until::OffloadChanged) => {}
            Err(error) => break Err(error),
        }
    };
    let drained = active.handler.drain(&mut active.queues).map_err(anyhow::Error::from);
    let signalled = signal(&mut active.queues, &*reports.interrupt);
    if let Err(error) = served.and(drained).and(signalled) {
        reports.fail(&error);
    }
}

/// Why serving came to an end.
enum Until {
    /// The stop event.
    Stopped,
    /// A queue is to be offloaded, or taken back.
    OffloadChanged,
}

/// The part of a run in which no queue is offloaded or taken back.
fn serve_until_change(epoll: &Epoll, notifiers: &Notifiers, active: &mut ActiveQueues) -> anyhow::Result<Until> {
    let ActiveQueues { handler, queues } = active;
    handler.update_offload(queues, notifiers)?;
    let wake_fds: Vec<RawFd> = handler.wake_fds().iter().map(|fd| fd.as_raw_fd()).collect();
    let is_offloaded: Vec<bool> = queues.iter().map(Virtqueue::is_offloaded).collect();
    let offloaded = || {
        (0..)
            .zip(notifiers.doorbells.iter())
            .zip(&is_offloaded)
            .filter(|(_, is_offloaded)| **is_offloaded)
            .map(|(bell, _)| bell)
    };
    // Their doorbells are the kernel's to hear.
    offloaded().for_each(|(_, doorbell)| unwatch(epoll, doorbell.as_raw_fd()));
    let served = wake_fds
        .iter()
        .try_for_each(|fd| watch(epoll, *fd, WAKE, EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED))
        .map_err(anyhow::Error::from)
        .and_then(|()| serve(epoll, active, &*notifiers.interrupt));
    wake_fds.iter().for_each(|fd| unwatch(epoll, *fd));
    offloaded().try_for_each(|(index, doorbell)| watch_doorbell(epoll, doorbell, index))?;
    served
}

/// Gives every queue that has something to do its turn, until the stop event, or until a queue is to be offloaded or taken back.
fn serve(epoll: &Epoll, active: &mut ActiveQueues, interrupt: &dyn Interrupt) -> anyhow::Result<Until> {
    let mut events = [EpollEvent::default(); 16];
    // Doorbells that rang before this run are not remembered, so each queue is looked at once.
    let mut due = vec![true; active.queues.len()];
    loop {
        for (index, due) in due.iter_mut().enumerate().filter(|(_, due)| **due) {
            *due = turn(index, active, interrupt)?;
        }
        if !active.handler.offload_is_current()? {
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
fn turn(index: usize, active: &mut ActiveQueues, interrupt: &dyn Interrupt) -> anyhow::Result<bool> {
    let ActiveQueues { handler, queues } = active;
    if queues[index].is_offloaded() {
        return Ok(false);
    }
    queues[index].disable_notification()?;
    let left = handler.process(index, queues)?;
    signal(queues, interrupt)?;
    match left {
        Progress::Drained => Ok(queues[index].enable_notification()?),
        Progress::More => Ok(true),
        Progress::Blocked => Ok(false),
    }
}

/// One interrupt for all that was pushed since the last time, where the driver wants it.
fn signal(queues: &mut [Virtqueue], interrupt: &dyn Interrupt) -> anyhow::Result<()> {
    for (index, queue) in queues.iter_mut().enumerate() {
        if queue.needs_interrupt()? {
            interrupt.queue_used(index);
        }
    }
    Ok(())
}

/// Edge-triggered, so that the counter need not be read: every write is an event, whatever the counter says.
fn watch_doorbell(epoll: &Epoll, doorbell: &EventFd, index: u64) -> io::Result<()> {
    watch(epoll, doorbell.as_raw_fd(), index, EventSet::IN | EventSet::EDGE_TRIGGERED)
}

fn unwatch(epoll: &Epoll, fd: RawFd) {
    // It fails where it is not watched, which is as good.
    let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}

fn watch(epoll: &Epoll, fd: RawFd, mark: u64, events: EventSet) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, mark))
}
