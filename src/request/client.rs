//! A command's side of the control socket: one request, and the answer or the connection.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use husk_protocol::frame::{self, Reader};

use super::{Reply, Request, VERSION, Versioned};

/// A request that was made.
#[derive(Debug)]
pub struct Asked {
    stream: UnixStream,
}

/// Asks, and waits for the answer.
pub fn ask(path: &Path, request: &Request) -> Result<Reply> {
    begin(path, request)?.reply().map(|(reply, _)| reply)
}

/// Asks, and leaves the answer for later.
pub fn begin(path: &Path, request: &Request) -> Result<Asked> {
    let mut stream = connect(path)?;
    let mut bytes = Vec::new();
    frame::write(&Versioned { version: VERSION, request: request.clone() }, &mut bytes)?;
    stream.write_all(&bytes).context("send a request to the machine")?;
    Ok(Asked { stream })
}

impl AsRawFd for Asked {
    /// Readable when there is an answer.
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Asked {
    /// The answer, and the connection, to which some requests give a meaning when they are granted.
    pub fn reply(mut self) -> Result<(Reply, UnixStream)> {
        let mut reader = Reader::default();
        loop {
            if let Some(reply) = reader.take::<Reply>()? {
                return Ok((reply, self.stream));
            }
            // A byte at a time: what follows an answer is not to be read here.
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
