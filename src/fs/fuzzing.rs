//! Entry points for fuzzing the requests of a guest, on a folder of its own, and what a snapshot says of one: for `fuzz/`.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, open};

use super::link::{Ends, Link, Message};
use super::worker::Worker;
use super::{Options, Server, saved};
use crate::sandbox;

/// A server on a thread, and its guest.
pub struct Guest(Link);

impl Guest {
    /// A guest with the folder `dir`, which it may change.
    pub fn new(dir: &Path) -> io::Result<Guest> {
        let (server, descriptors) = server(dir)?;
        let server = Arc::new(server);
        let (ours, theirs) = Ends::pair()?;
        let link = Arc::new(theirs.connect()?);
        // It has a working directory of its own.
        sandbox::spawn("share", move || Worker::new(server, link, descriptors).map(|worker| worker.run()))?;
        Ok(Guest(ours.connect()?))
    }

    /// Sends a request, and returns the length of its reply, for which there is `room_bytes`.
    pub fn send(&self, request: &[u8], room_bytes: u32) -> io::Result<u32> {
        self.0.slot(0)?.copy_from(request);
        self.0.send(Message { slot: 0, len_bytes: request.len() as u32, room_bytes })?;
        Ok(self.0.receive()?.len_bytes)
    }
}

/// What a snapshot says of the folder `dir` whose server has just started: a beginning for [`restore`].
pub fn known(dir: &Path) -> anyhow::Result<Vec<u8>> {
    let (server, descriptors) = server(dir)?;
    saved::save(&server, saved::Identity::of(File::open(dir)?)?, &descriptors)
}

/// Makes a server of the folder `dir` know what `bytes` say.
pub fn restore(dir: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let (server, descriptors) = server(dir)?;
    saved::restore(&server, saved::Identity::of(File::open(dir)?)?, &descriptors, bytes)
}

fn server(dir: &Path) -> io::Result<(Server, OwnedFd)> {
    let as_path = |path: &Path| open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let options = Options::default();
    Ok((Server::new(as_path(dir)?, options, false, 512)?, as_path(Path::new("/proc/self/fd"))?))
}
