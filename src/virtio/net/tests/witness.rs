//! A back end that never receives a frame.

use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::memory::GuestBuffers;

/// A back end that records its calls and returns no frames. Clones share state.
#[derive(Clone)]
pub(super) struct Witness {
    socket: Arc<UnixStream>,
    features: u64,
    pub(super) sent: Arc<Mutex<Vec<(Header, u64)>>>,
    pub(super) accepted: Arc<Mutex<Vec<u64>>>,
    pub(super) enabled: Arc<AtomicBool>,
    /// Whether enabling it fails.
    pub(super) refuses: Arc<AtomicBool>,
    /// Whether it rejects the features that the driver accepted.
    pub(super) refuses_features: Arc<AtomicBool>,
}

impl Witness {
    /// Creates one that offers these offloads.
    pub(super) fn new(features: u64) -> Witness {
        let socket = Arc::new(UnixStream::pair().unwrap().0);
        let (sent, accepted, enabled, refuses, refuses_features) = Default::default();
        Witness { socket, features, sent, accepted, enabled, refuses, refuses_features }
    }
}

impl NetBackend for Witness {
    fn features(&self) -> u64 {
        self.features
    }

    fn accept(&mut self, features: u64) -> io::Result<()> {
        self.accepted.lock().unwrap().push(features & self.features);
        if self.refuses_features.load(Ordering::SeqCst) { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
    }

    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        if enabled && self.refuses.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.enabled.store(enabled, Ordering::SeqCst);
        Ok(())
    }

    fn send(&mut self, header: &Header, frame: &mut GuestBuffers) -> io::Result<()> {
        self.sent.lock().unwrap().push((*header, frame.len_bytes()));
        Ok(())
    }

    fn receive(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    fn frame(&self) -> Option<(Header, &[u8])> {
        None
    }

    fn consume(&mut self) {}

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
