//! The connection between a command and the process that it starts for a container: lines in both directions.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use anyhow::{Context, Error, Result, bail};
use rustix::io::{FdFlags, fcntl_setfd};

use super::console;
use crate::cli::exit::Exit;
use crate::sys::process::take_descriptor;

/// How the line begins that says why the process has failed.
const FAILED: &str = "failed ";

/// One end of the connection.
pub struct Channel {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Channel {
    fn new(stream: UnixStream) -> Result<Channel> {
        let lines = BufReader::new(stream.try_clone().context("duplicate a file descriptor")?);
        Ok(Channel { stream, lines })
    }

    /// Starts husk with `words`, on `terminal` if there is one and otherwise with this process's streams.
    pub fn spawn(words: Vec<OsString>, terminal: Option<File>) -> Result<(Child, Channel)> {
        let (ours, theirs) = UnixStream::pair().context("create a socket pair")?;
        let owns_terminal = terminal.is_some();
        let [stdin, stdout, stderr] = console::streams(terminal)?;
        let mut command = with(&theirs, words)?;
        command.args(owns_terminal.then_some("--terminal")).stdin(stdin).stdout(stdout).stderr(stderr);
        let child = command.spawn().context("start husk for the container")?;
        Ok((child, Channel::new(ours)?))
    }

    /// Starts husk with `words` and this end of the connection as well.
    pub fn share(&self, words: Vec<OsString>) -> Result<Child> {
        let child = with(&self.stream, words)?.spawn().context("start husk for the machine")?;
        fcntl_setfd(&self.stream, FdFlags::CLOEXEC)?;
        Ok(child)
    }

    /// The end that this process was started with, by its number.
    pub fn inherited(number: RawFd) -> Result<Channel> {
        Channel::new(take_descriptor(number)?.into())
    }

    /// Another descriptor of this end.
    pub fn try_clone(&self) -> Result<UnixStream> {
        self.stream.try_clone().context("duplicate a file descriptor")
    }

    /// Says a word.
    pub fn say(&self, word: &str) -> Result<()> {
        (&self.stream).write_all(format!("{word}\n").as_bytes()).context("write to the other process of the container")
    }

    /// Sends something before any word.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        (&self.stream).write_all(bytes).context("write to the other process of the container")
    }

    /// Reads what is sent before any word.
    pub fn reader(&mut self) -> &mut BufReader<UnixStream> {
        &mut self.lines
    }

    /// Reads the next word; nothing if the other side is gone.
    pub fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        self.lines.read_line(&mut line).context("read from the other process of the container")?;
        Ok(line.trim_end().to_owned())
    }

    /// Reads the next word, which is to be `word`. Fails with the reason that the process says, or with `ended` if it
    /// says something else or nothing.
    pub fn expect(&mut self, word: &str, ended: &'static str) -> Result<()> {
        match self.hear()? {
            said if said == word => Ok(()),
            said => match said.strip_prefix(FAILED) {
                Some(why) => bail!("{why}"),
                None => bail!(ended),
            },
        }
    }

    /// Says why this process fails. If nobody waits for that any more, it belongs to the container's output.
    pub fn fail(&self, error: Error) -> Result<Exit> {
        let text = format!("{error:#}").replace('\n', " ");
        self.say(&format!("{FAILED}{text}")).map(|()| Exit::Failure).or(Err(error))
    }
}

/// husk with `words`, and with `stream` by its number.
fn with(stream: &UnixStream, words: Vec<OsString>) -> Result<Command> {
    fcntl_setfd(stream.as_fd(), FdFlags::empty()).context("pass a descriptor")?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("husk").arg("oci").args(words).arg(format!("--channel={}", stream.as_raw_fd()));
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_a_failure_arrives_in_one_line() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, theirs) = (Channel::new(ours).unwrap(), Channel::new(theirs).unwrap());
        theirs.say("ready").unwrap();
        assert_eq!(theirs.fail(anyhow::anyhow!("a\nb").context("c")).unwrap(), Exit::Failure);
        ours.expect("ready", "ended").unwrap();
        assert_eq!(ours.expect("created", "ended").unwrap_err().to_string(), "c: a b");
        drop(theirs);
        assert_eq!(ours.expect("created", "ended").unwrap_err().to_string(), "ended");
        let (_, alone) = UnixStream::pair().unwrap();
        assert!(Channel::new(alone).unwrap().fail(anyhow::anyhow!("x")).is_err());
    }
}
