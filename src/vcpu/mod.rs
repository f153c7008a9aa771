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

use crate::machine::Buses;
use crate::machine::outcome::Ending;
use crate::sandbox;

use exit::Step;

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

/// A vCPU's thread, as the machine holds it. Its methods are called on the machine's thread.
pub struct VcpuThread {
    commands: Sender<Command>,
    answers: Receiver<Paused>,
    thread: JoinHandle<()>,
}

/// Makes the kick known to this process; to be called before the first [`VcpuThread::start`].
pub fn prepare_kicks() -> io::Result<()> {
    extern "C" fn interrupt_only(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    Ok(register_signal_handler(SIGRTMIN(), interrupt_only)?)
}

impl VcpuThread {
    /// Starts a thread for vCPU `index`, paused.
    pub fn start(index: u32, fd: VcpuFd, buses: Arc<Buses>, ending: Arc<Ending>) -> io::Result<VcpuThread> {
        let (commands, inbox) = channel();
        let (outbox, answers) = channel();
        let vcpu = Vcpu { index, fd, buses, ending, inbox, outbox, has_run: false };
        let thread = sandbox::spawn(&format!("vcpu{index}"), move || vcpu.live())?;
        Ok(VcpuThread { commands, answers, thread })
    }

    /// Lets the guest run on this vCPU. Returns at once.
    pub fn resume(&self) {
        // A thread that has ended said so through `Ending`.
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

    /// Interrupts KVM_RUN. A signal that comes just before KVM_RUN interrupts nothing, so a kick is repeated until it
    /// is answered, which needs neither a lock nor a shared view of `kvm_run`.
    fn kick(&self) {
        let _ = self.thread.kill(SIGRTMIN());
    }
}

/// What the thread itself holds.
struct Vcpu {
    index: u32,
    fd: VcpuFd,
    buses: Arc<Buses>,
    ending: Arc<Ending>,
    inbox: Receiver<Command>,
    outbox: Sender<Paused>,
    /// Whether a pause has something to come after.
    has_run: bool,
}

impl Vcpu {
    fn live(mut self) {
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

    /// Runs the guest until told to pause (true) or to stop, or until it can run no more (false).
    fn run(&mut self) -> bool {
        loop {
            match exit::step(&mut self.fd, &self.buses) {
                Step::Continue => continue,
                Step::Interrupted => {}
                Step::End(why) => {
                    self.ending.declare(why.outcome(self.index));
                    return false;
                }
            }
            match self.inbox.try_recv() {
                Ok(Command::Pause) => {
                    exit::finish(&mut self.fd);
                    self.say_paused();
                    return true;
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Ok(Command::Resume) | Err(TryRecvError::Empty) => {}
            }
        }
    }

    fn say_paused(&self) {
        // Who asked may have gone; then nobody waits.
        let _ = self.outbox.send(Paused);
    }
}
