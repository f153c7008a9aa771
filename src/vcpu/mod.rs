//! A vCPU's thread and its states: paused, running, ended.
//!
//! A thread starts paused and does what it is told by [`VcpuThread`]: the guest runs between `resume` and `pause`.

pub mod cpuid;
mod exit;
pub mod setup;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::console::output::Output;
use crate::exit_latch::ExitLatch;
use crate::sandbox;

use exit::{End, Step};

/// How long a vCPU may take to answer a kick before it is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// What a vCPU thread is told.
enum Command {
    Resume,
    Pause,
    Stop,
}

/// A vCPU paused at the boundary of an instruction has nothing left to do for its last exit.
struct Paused;

/// The guest's two address spaces, as its vCPUs see them. Frozen when the machine is built.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub memory: Bus,
    /// What the serial port prints to: a vCPU that has filled it waits for room outside of the device.
    pub console: Arc<Output>,
}

/// A vCPU's thread, as the machine holds it. Its methods are called on the machine's thread.
pub struct VcpuThread {
    commands: Sender<Command>,
    answers: Receiver<Paused>,
    thread: JoinHandle<()>,
    buses: Arc<Buses>,
}

/// Makes the kick known to this process; to be called before the first [`VcpuThread::start`].
pub fn prepare_kicks() -> io::Result<()> {
    Ok(register_signal_handler(SIGRTMIN(), exit::on_kick)?)
}

impl VcpuThread {
    /// Starts a thread for vCPU `index`, paused.
    pub fn start(index: u32, fd: VcpuFd, buses: Arc<Buses>, exit_latch: Arc<ExitLatch>) -> io::Result<VcpuThread> {
        let (commands, inbox) = channel();
        let (outbox, answers) = channel();
        let (called, waits_for_console, has_run) = (None, false, false);
        let vcpu =
            Vcpu { index, fd, buses: buses.clone(), exit_latch, inbox, outbox, called, waits_for_console, has_run };
        let thread = sandbox::spawn(&format!("vcpu{index}"), move || vcpu.live())?;
        Ok(VcpuThread { commands, answers, thread, buses })
    }

    /// Lets the guest run on this vCPU. Returns at once.
    pub fn resume(&self) {
        // A thread that has ended said so through `ExitLatch`.
        let _ = self.commands.send(Command::Resume);
    }

    /// Asks the vCPU to leave the guest; [`VcpuThread::wait_paused`] says when it has.
    pub fn ask_to_pause(&self) {
        let _ = self.commands.send(Command::Pause);
        self.kick();
    }

    /// Waits until the vCPU has left the guest, or its thread has ended.
    pub fn wait_paused(&self) {
        while let Err(RecvTimeoutError::Timeout) = self.answers.recv_timeout(KICK_AGAIN) {
            self.kick();
        }
    }

    /// Whether the vCPU leaves the guest by itself after it was asked to.
    #[cfg(test)]
    pub fn has_paused_within(&self, timeout: Duration) -> bool {
        self.answers.recv_timeout(timeout).is_ok()
    }

    /// Asks the thread to end; [`VcpuThread::join`] says when it has.
    pub fn ask_to_stop(&self) {
        let _ = self.commands.send(Command::Stop);
        self.kick();
    }

    /// Waits until the thread has ended.
    pub fn join(self) {
        loop {
            match self.answers.recv_timeout(KICK_AGAIN) {
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => self.kick(),
                Ok(Paused) => {}
            }
        }
        // A panic on the thread has ended the process or been printed; there is nothing to add.
        let _ = self.thread.join();
    }

    /// Has the thread look at what it was told, wherever it is: in the guest, in a device, or waiting for the console. It is
    /// repeated until it is answered, since a real-time signal may fail to be queued.
    fn kick(&self) {
        let _ = self.thread.kill(SIGRTMIN());
        self.buses.console.wake();
    }
}

/// What the thread itself holds.
struct Vcpu {
    index: u32,
    fd: VcpuFd,
    buses: Arc<Buses>,
    exit_latch: Arc<ExitLatch>,
    inbox: Receiver<Command>,
    outbox: Sender<Paused>,
    /// Whether a pause has something to come after.
    has_run: bool,
    /// What was found in the inbox while the vCPU waited.
    called: Option<Command>,
    /// Whether the guest runs on only when the console has room.
    waits_for_console: bool,
}

impl Vcpu {
    fn live(mut self) {
        // Goes before the descriptor does: who waits for the thread's end kicks it to the last.
        let _aim = exit::aim_kicks_at(&mut self.fd);
        // Paused: waits for a word.
        while let Ok(command) = self.inbox.recv() {
            match command {
                Command::Stop => return,
                Command::Pause => self.say_paused(),
                Command::Resume => {
                    if std::mem::replace(&mut self.has_run, true) {
                        self.tell_guest_of_pause();
                    }
                    if !self.run() {
                        return;
                    }
                }
            }
        }
    }

    /// Has the guest's watchdogs know that this vCPU did not run, which they would take for a processor that hangs
    /// (KVM_KVMCLOCK_CTRL). A guest that does not use KVM's clock cannot be told.
    fn tell_guest_of_pause(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Runs the guest until told to pause (true), or until told to stop, the machine has ended, or the guest can run no more
    /// (false).
    fn run(&mut self) -> bool {
        loop {
            let end = match self.next_command() {
                Some(Command::Stop) => return false,
                Some(Command::Pause) => match exit::finish(&mut self.fd, &self.buses) {
                    None => {
                        self.say_paused();
                        return true;
                    }
                    end => end,
                },
                Some(Command::Resume) | None if self.waits_for_console => {
                    self.wait_for_console();
                    None
                }
                // A machine that reset or powered off executes nothing more, not even until the main thread stops it.
                Some(Command::Resume) | None if self.exit_latch.is_declared() => return false,
                Some(Command::Resume) | None => self.step(),
            };
            if let Some(why) = end {
                self.exit_latch.declare(why.reason(self.index));
                return false;
            }
        }
    }

    /// What the thread is told, if it is told something. That who tells it has gone is a word to stop.
    fn next_command(&mut self) -> Option<Command> {
        self.called.take().or_else(|| match self.inbox.try_recv() {
            Ok(command) => Some(command),
            Err(TryRecvError::Disconnected) => Some(Command::Stop),
            Err(TryRecvError::Empty) => None,
        })
    }

    /// Runs the guest up to its next exit. Returns why it can run no more, if so.
    fn step(&mut self) -> Option<End> {
        match exit::step(&mut self.fd, &self.buses) {
            Step::Continue | Step::Interrupted => {}
            Step::WaitForConsole => self.waits_for_console = true,
            Step::End(why) => return Some(why),
        }
        None
    }

    /// Waits until the console has room, or until the thread is told something.
    fn wait_for_console(&mut self) {
        let buses = self.buses.clone();
        buses.console.wait_for_room(|| {
            self.called = self.next_command();
            self.called.is_some()
        });
        self.waits_for_console = buses.console.is_full();
    }

    fn say_paused(&self) {
        // Who asked may have gone; then nobody waits.
        let _ = self.outbox.send(Paused);
    }
}
