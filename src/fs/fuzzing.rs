//! Entry point for fuzzing the requests of a guest, on a folder of its own: for `fuzz/`.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, open};

use super::link::{Ends, Link, Message};
use super::worker::Worker;
use super::{Cache, Options, Server};
use crate::sandbox;

/// A server on a thread, and its guest.
pub struct Guest(Link);

impl Guest {
    /// A guest with the folder `dir`, which it may change.
    pub fn new(dir: &Path) -> io::Result<Guest> {
        let as_path = |path: &Path| open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let (root, descriptors) = (as_path(dir)?, as_path(Path::new("/proc/self/fd"))?);
        let options = Options { readonly: false, cache: Cache::Auto };
        let server = Arc::new(Server::new(root, options, false, 512)?);
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
