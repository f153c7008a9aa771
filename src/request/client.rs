//! The client side of the control socket: sends one request and receives the reply or takes over the connection.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use husk_protocol::frame::{self, Reader};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{Reply, Request, VERSION, Versioned};

/// A request that was sent and not answered yet.
#[derive(Debug)]
pub struct PendingRequest {
    stream: UnixStream,
}

/// Sends a request and waits for the reply.
pub fn send(path: &Path, request: &Request) -> Result<Reply> {
    begin(path, request)?.reply().map(|(reply, _)| reply)
}

/// Sends a request without waiting for the reply.
pub fn begin(path: &Path, request: &Request) -> Result<PendingRequest> {
    let mut stream = connect(path)?;
    let mut bytes = Vec::new();
    frame::write(&Versioned { version: VERSION, request: request.clone() }, &mut bytes)?;
    stream.write_all(&bytes).context("send a request to the machine")?;
    Ok(PendingRequest { stream })
}

impl AsRawFd for PendingRequest {
    /// Readable when the reply has arrived.
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl PendingRequest {
    /// Whether the reply arrives within this time.
    pub fn is_answered_within(&self, time: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
        match poll(&mut fds, Some(&time.try_into()?)) {
            Err(Errno::INTR) => Ok(false),
            polled => Ok(polled.context("wait for the machine's response")? > 0),
        }
    }

    /// The reply, and the connection, which some requests take over.
    pub fn reply(mut self) -> Result<(Reply, UnixStream)> {
        let mut reader = Reader::default();
        loop {
            if let Some(reply) = reader.take::<Reply>()? {
                return Ok((reply, self.stream));
            }
            // Byte by byte, because anything after the reply belongs to the caller.
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => bail!("the machine has exited"),
                Ok(_) => reader.push(&byte),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("read the machine's response"),
            }
        }
    }
}

fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => anyhow::anyhow!("the machine is not running"),
        _ => anyhow::Error::new(error).context(format!("connect to {}", path.display())),
    })
}
