//! A vCPU thread and its states: paused, running, ended.
//!
//! A thread starts paused and follows the commands of [`VcpuThread`]: the guest runs between `resume` and `pause`.

pub mod cpuid;
mod exit;
pub mod setup;
mod state;
mod tsc;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::console::output::Output;
use crate::exit_latch::ExitLatch;
use crate::sandbox::{self, ThreadRole};

use exit::{End, Step};
pub use state::VcpuState;
pub use tsc::InStep;

/// The time after which an unanswered kick is repeated.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// Commands to a vCPU thread.
enum Command {
    Resume,
    Pause,
    /// Save the state with these MSRs, while the vCPU is paused.
    Save(Arc<[u32]>, Sender<Result<VcpuState>>),
    Stop,
}

/// Sent by a vCPU that is paused at an instruction boundary, with its last exit completed.
struct Paused;

/// The guest's address spaces as seen by its vCPUs. Immutable once the machine is built.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub memory: Bus,
    /// The serial port's output: a vCPU that has filled it waits for room outside of the device.
    pub console: Arc<Output>,
}

/// The machine's handle to a vCPU thread. Its methods are called on the machine's thread.
pub struct VcpuThread {
    commands: Sender<Command>,
    answers: Receiver<Paused>,
    thread: JoinHandle<()>,
    buses: Arc<Buses>,
}

/// Installs the signal handler for kicks. Must be called before the first [`VcpuThread::start`].
pub fn prepare_kicks() -> io::Result<()> {
    Ok(register_signal_handler(SIGRTMIN(), exit::on_kick)?)
}

impl VcpuThread {
    /// Starts a thread for vCPU `index`, paused.
    pub fn start(index: u32, fd: VcpuFd, buses: Arc<Buses>, exit_latch: Arc<ExitLatch>) -> io::Result<VcpuThread> {
        let (commands, inbox) = channel();
        let (outbox, answers) = channel();
        let vcpu = Vcpu {
            index,
            fd,
            buses: buses.clone(),
            exit_latch,
            inbox,
            outbox,
            has_run: false,
            pending_command: None,
            waits_for_console: false,
        };
        let thread =
            sandbox::spawn_confined(ThreadRole::Vcpu, &format!("vcpu{index}"), move || vcpu.follow_commands())?;
        Ok(VcpuThread { commands, answers, thread, buses })
    }

    /// Resumes the guest on this vCPU. Returns immediately.
    pub fn resume(&self) {
        // A thread that has ended has reported it through `ExitLatch`.
        let _ = self.commands.send(Command::Resume);
    }

    /// Asks the vCPU to leave the guest; [`VcpuThread::wait_paused`] waits for it.
    pub fn request_pause(&self) {
        let _ = self.commands.send(Command::Pause);
        self.kick();
    }

    /// Waits until the vCPU has left the guest or its thread has ended.
    pub fn wait_paused(&self) {
        while let Err(RecvTimeoutError::Timeout) = self.answers.recv_timeout(KICK_AGAIN) {
            self.kick();
        }
    }

    /// Whether the vCPU leaves the guest within `timeout` after the request, without another kick.
    #[cfg(test)]
    pub fn has_paused_within(&self, timeout: Duration) -> bool {
        self.answers.recv_timeout(timeout).is_ok()
    }

    /// Saves the state of the vCPU, which is paused, with the MSRs `msrs`. Fails if it cannot run any further.
    pub fn save(&self, msrs: &Arc<[u32]>) -> Result<VcpuState> {
        let (sender, reply) = channel();
        let _ = self.commands.send(Command::Save(msrs.clone(), sender));
        reply.recv().context("the vCPU has ended")?
    }

    /// Asks the thread to end; [`VcpuThread::join`] waits for it.
    pub fn request_stop(&self) {
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
        // A panic on the thread has already been reported or has aborted the process.
        let _ = self.thread.join();
    }

    /// Makes the thread check its commands, whether it is in the guest, in a device or waiting for the console. Kicks
    /// are repeated until the thread responds, since queuing a real-time signal may fail.
    fn kick(&self) {
        let _ = self.thread.kill(SIGRTMIN());
        self.buses.console.wake();
    }
}

/// The state owned by the thread.
struct Vcpu {
    index: u32,
    fd: VcpuFd,
    buses: Arc<Buses>,
    exit_latch: Arc<ExitLatch>,
    inbox: Receiver<Command>,
    outbox: Sender<Paused>,
    /// Whether the vCPU has run since it was last paused.
    has_run: bool,
    /// A command received while the vCPU was waiting for the console.
    pending_command: Option<Command>,
    /// Whether the guest must not run before the console has room.
    waits_for_console: bool,
}

impl Vcpu {
    /// Runs the thread until a stop command or the end of the guest.
    fn follow_commands(mut self) {
        // Dropped before the descriptor, since the thread may be kicked until it exits.
        let _aim = exit::aim_kicks_at(&mut self.fd);
        // The vCPU is paused while the thread waits here.
        while let Ok(command) = self.inbox.recv() {
            match command {
                Command::Stop => return,
                Command::Pause => self.report_paused(),
                Command::Save(msrs, reply) => drop(reply.send(VcpuState::save(&self.fd, &msrs))),
                Command::Resume => {
                    if std::mem::replace(&mut self.has_run, true) {
                        self.notify_guest_of_pause();
                    }
                    if !self.run() {
                        return;
                    }
                }
            }
        }
    }

    /// Notifies the guest's watchdogs that this vCPU was stopped, so that they do not report a hung processor
    /// (KVM_KVMCLOCK_CTRL). Has no effect on a guest that does not use kvm-clock.
    fn notify_guest_of_pause(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Runs the guest until a pause command (true), or until a stop command, the machine's end or an exit after which
    /// the vCPU cannot run (false).
    fn run(&mut self) -> bool {
        loop {
            let end = match self.next_command() {
                Some(Command::Stop) => return false,
                Some(Command::Pause) => match exit::complete_last(&mut self.fd, &self.buses) {
                    None => {
                        self.report_paused();
                        return true;
                    }
                    end => end,
                },
                // Only a paused vCPU has a state to save: dropping the request reports that.
                Some(Command::Save(..)) => None,
                Some(Command::Resume) | None if self.waits_for_console => {
                    self.wait_for_console();
                    None
                }
                // After a reset or power-off no instruction may run, even before the main thread stops this thread.
                Some(Command::Resume) | None if self.exit_latch.is_declared() => return false,
                Some(Command::Resume) | None => self.step(),
            };
            if let Some(why) = end {
                self.exit_latch.declare(why.reason(self.index));
                return false;
            }
        }
    }

    /// The pending command, if any. A disconnected sender means stop.
    fn next_command(&mut self) -> Option<Command> {
        self.pending_command.take().or_else(|| match self.inbox.try_recv() {
            Ok(command) => Some(command),
            Err(TryRecvError::Disconnected) => Some(Command::Stop),
            Err(TryRecvError::Empty) => None,
        })
    }

    /// Runs the guest until its next exit. Returns the reason if the vCPU cannot run any further.
    fn step(&mut self) -> Option<End> {
        match exit::step(&mut self.fd, &self.buses) {
            Step::Continue | Step::Interrupted => {}
            Step::WaitForConsole => self.waits_for_console = true,
            Step::End(why) => return Some(why),
        }
        None
    }

    /// Waits until the console has room or a command arrives.
    fn wait_for_console(&mut self) {
        let buses = self.buses.clone();
        buses.console.wait_for_room(|| {
            self.pending_command = self.next_command();
            self.pending_command.is_some()
        });
        self.waits_for_console = buses.console.is_full();
    }

    /// Confirms that the vCPU is paused.
    fn report_paused(&self) {
        // The receiver may be gone, in which case the confirmation is not needed.
        let _ = self.outbox.send(Paused);
    }
}
