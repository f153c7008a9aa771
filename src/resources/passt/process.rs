//! The passt process of a machine, which may be started at any time.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a passt that has closed its socket has to exit.
const REAP_TIMEOUT: Duration = Duration::from_millis(100);
/// The maximum length of passt's error output.
const STDERR_MAX_BYTES: u64 = 16 << 10;

/// The passt process of one machine.
pub(super) enum Process {
    /// Not started yet: the command, and passt's end of the socket. Nothing else owns a descriptor, so that a copy of this
    /// process can close them.
    Planned(Command, UnixStream),
    /// Started.
    Running(Running),
    /// Not started, and why.
    Failed(String),
}

impl Process {
    /// A process that will execute `program` with `arguments` and serve `socket`.
    pub fn new(program: &str, arguments: Vec<String>, socket: UnixStream) -> Process {
        let mut command = Command::new(program);
        command.args(arguments).stdout(Stdio::null());
        // The terminal's signals are meant for the machine.
        command.process_group(0);
        Process::Planned(command, socket)
    }

    /// Sends frames in passt's place, before it is started. There is room for a few.
    pub fn send_early(&mut self, frames: &[u8]) {
        if let Process::Planned(_, socket) = self {
            // If the machine's end is closed, it needs no frames.
            let _ = socket.write_all(frames);
        }
    }

    /// The ID of the process, if it was started.
    #[cfg(test)]
    pub fn id(&self) -> Option<u32> {
        match self {
            Process::Running(running) => Some(running.child.id()),
            Process::Planned(..) | Process::Failed(_) => None,
        }
    }

    /// Starts the process, unless it was started before. If that fails, its socket is closed.
    pub fn start(&mut self) -> Result<()> {
        let Process::Planned(command, socket) = self else { return Ok(()) };
        let started = Running::spawn(command, socket);
        // This drops our copies of passt's ends, so that its exit is noticed.
        match started {
            Ok(running) => {
                *self = Process::Running(running);
                Ok(())
            }
            Err(error) => {
                *self = Process::Failed(error.to_string());
                Err(error).context("start passt")
            }
        }
    }

    /// Waits up to `timeout` for passt to fail, and returns its error if it does.
    pub fn await_failure(&mut self, timeout: Duration) -> Result<()> {
        let Process::Running(running) = self else { return Ok(()) };
        let started = Instant::now();
        while started.elapsed() < timeout {
            if running.child.try_wait().context("wait for passt")?.is_some() {
                bail!("passt did not start: {}", running.last_error());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Terminates passt if it is still running, and returns its error output.
    pub fn end(&mut self) -> String {
        match self {
            Process::Planned(..) => "it was not started".into(),
            Process::Failed(reason) => reason.clone(),
            Process::Running(running) => {
                running.end();
                running.last_error()
            }
        }
    }

    /// Why passt has closed its socket, from its signal or its error output. Terminates it if it is still running.
    pub fn reason_of_end(&mut self) -> String {
        let Process::Running(running) = self else { return format!("passt did not start: {}", self.end()) };
        match running.await_signal() {
            Some(signal) => format!("passt was terminated by signal {signal}"),
            None => format!("passt exited: {}", self.end()),
        }
    }
}

/// A started process. Dropping it terminates passt.
pub(super) struct Running {
    child: Child,
    /// Its standard error.
    stderr: UnixStream,
}

impl Running {
    fn spawn(command: &mut Command, socket: &UnixStream) -> io::Result<Running> {
        command.stdin(OwnedFd::from(socket.try_clone()?));
        let (stderr, theirs) = UnixStream::pair()?;
        for end in [&stderr, &theirs] {
            // Unread output is lost; passt does not block on it.
            end.set_nonblocking(true)?;
        }
        let child = command.stderr(OwnedFd::from(theirs)).spawn()?;
        Ok(Running { child, stderr })
    }

    /// The last non-empty line of the error output.
    fn last_error(&mut self) -> String {
        let mut bytes = Vec::new();
        // Ends with an error if passt is still running.
        let _ = (&mut self.stderr).take(STDERR_MAX_BYTES).read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().rfind(|line| !line.trim().is_empty() && !line.contains("syslog"));
        line.unwrap_or("it printed no error").trim().to_owned()
    }

    /// Terminates and reaps the process, if it is still running.
    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The signal that terminated passt, if one did. Its socket is closed slightly earlier than it can be reaped.
    fn await_signal(&mut self) -> Option<i32> {
        let started = Instant::now();
        while started.elapsed() < REAP_TIMEOUT {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(1)),
                Ok(Some(status)) => return status.signal(),
                Err(_) => return None,
            }
        }
        None
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It would exit by itself, but would not be reaped.
        self.end();
    }
}
