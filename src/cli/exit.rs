//! The exit codes of all commands.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use crate::exit_latch::ExitReason;
use crate::monitor::release;

/// The result of a command, for its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Success. For a machine: it was powered off or saved, or the user detached.
    Success,
    /// A failure of husk or the host.
    Failure,
    /// An invalid command line or configuration.
    Usage,
    /// `husk run` did not start the process: husk, the host or the image failed. The code is Docker's, so that it is
    /// distinct from the command's.
    NotRun,
    /// The guest requested a reset.
    Reset,
    /// The guest's kernel panicked.
    Panicked,
    /// A triple fault.
    TripleFault,
    /// KVM could not continue the guest.
    KvmError,
    /// The sandbox stopped the monitor process.
    Violation,
    /// The machine was ended by this signal.
    Signal(u8),
    /// The status that the guest wrote to its exit port.
    Reported(u8),
}

impl Exit {
    /// The process's exit code.
    pub const fn code(self) -> u8 {
        match self {
            Exit::Success => 0,
            Exit::Failure => 1,
            Exit::Usage => 2,
            Exit::NotRun => 125,
            Exit::Violation => 128 + libc::SIGSYS as u8,
            Exit::Reset => 80,
            Exit::Panicked => 81,
            Exit::TripleFault => 82,
            Exit::KvmError => 83,
            Exit::Signal(number) => 128u8.saturating_add(number),
            Exit::Reported(code) => code,
        }
    }

    /// Exits with this code. The kernel releases the rest of the machine after that.
    pub fn leave(self) -> ! {
        release::exit(self.code())
    }
}

/// How another process of husk has ended that ran the machine.
impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Exit {
        let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
        match status.signal() {
            Some(signal) => Exit::Signal(byte(signal)),
            None => status.code().map_or(Exit::Failure, |code| Exit::Reported(byte(code))),
        }
    }
}

impl From<&ExitReason> for Exit {
    fn from(reason: &ExitReason) -> Exit {
        match reason {
            ExitReason::PoweredOff | ExitReason::Quit | ExitReason::Saved => Exit::Success,
            ExitReason::Reset => Exit::Reset,
            ExitReason::Reported(code) => Exit::Reported(*code),
            ExitReason::Panicked(_) => Exit::Panicked,
            ExitReason::TripleFault { .. } => Exit::TripleFault,
            ExitReason::KvmError { .. } => Exit::KvmError,
            ExitReason::SessionLost(_) | ExitReason::MonitorFailed(_) | ExitReason::OutputFailed(_) => Exit::Failure,
            ExitReason::MonitorDied { signal: None } => Exit::Failure,
            ExitReason::Violation { .. } => Exit::Violation,
            ExitReason::Killed(signal) | ExitReason::MonitorDied { signal: Some(signal) } => {
                Exit::Signal(u8::try_from(*signal).unwrap_or(u8::MAX))
            }
        }
    }
}

/// The exit codes as `--help` shows them.
pub const EXIT_CODES: &str = "\
Exit codes:
    0    the guest powered off, Ctrl-A x was pressed, or `husk snapshot --stop` has saved the machine
    1    husk or the host failed
    2    the command line or the configuration is invalid
   80    the guest reset (rebooted)
   81    the guest kernel panicked
   82    the guest triple-faulted
   83    KVM failed to run the guest
  125    husk run: husk, the host or the image failed before the command started
  128+n  the machine was terminated by signal n
  159    the sandbox stopped husk's own monitor process, which the guest may have taken over
  Any other code was written by the guest to its exit port (0x604).";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_code_is_in_the_help() {
        use Exit::*;
        for exit in [Success, Failure, Usage, NotRun, Reset, Panicked, TripleFault, KvmError, Violation] {
            let code = format!("{:>5}    ", exit.code());
            assert!(EXIT_CODES.lines().any(|line| line.starts_with(&code)), "{exit:?}");
        }
    }

    #[test]
    fn signals_count_from_128_as_in_a_shell() {
        assert_eq!(Exit::from(&ExitReason::Killed(15)).code(), 143);
        assert_eq!(Exit::Signal(200).code(), 255);
    }
}
