//! The host side of a network device: transmits the guest's frames, and receives frames for it.

mod attempts;
mod header;
mod stream;
mod tap;
mod unsolicited;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use crate::memory::GuestBuffers;

pub use attempts::{ATTEMPT_BYTES_MAX, Attempt, Attempts};
pub use header::{FLAG_DATA_VALID, HEADER_BYTES, Header};
pub use stream::StreamNet;
pub use tap::{Passed, TapCounts, TapNet};
pub use unsolicited::{FRONT_BYTES, expects_response};

/// The minimum frame length: an Ethernet header.
pub const FRAME_BYTES_MIN: usize = 14;
/// The maximum frame length: a packet of 64 KiB minus one after an Ethernet header with a VLAN tag.
pub const FRAME_BYTES_MAX: usize = 65535 + 18;

/// The maximum memory of a back end, in bytes: received frames, and the guest's.
pub const BUDGET_BYTES: u64 = (stream::BUFFER_BYTES + stream::IN_FLIGHT_BUDGET_BYTES) as u64;

/// Transmits and receives a guest's frames. It is used by one thread at a time and never blocks.
pub trait NetBackend: Send {
    /// The device features it provides (virtio 1.2 §5.1.3): checksum and segmentation offloads.
    fn features(&self) -> u64;

    /// Sets the `features` accepted by the driver, which limit the work left to the guest in frames for it.
    fn accept(&mut self, features: u64) -> io::Result<()>;

    /// Enables or disables frames for the guest on this back end; initially enabled. When disabled, only the other back
    /// ends of the same network receive frames, and waiting ones may be lost. Idempotent. A single back end need not do
    /// anything.
    fn set_enabled(&mut self, _enabled: bool) -> io::Result<()> {
        Ok(())
    }

    /// Accepts `frame`, which is in guest memory, and consumes it. `header` has been validated. It may be sent later, with
    /// [`NetBackend::kick`], and its buffers belong to the back end while it is in flight.
    ///
    /// `WouldBlock` means that nothing was accepted, and that [`NetBackend::fd`] becomes writable when something can be.
    /// After an error for which [`is_end`] is true there is no peer; any other error concerns only this frame.
    fn send(&mut self, header: &Header, frame: &mut GuestBuffers) -> io::Result<()>;

    /// Sends the accepted frames. `WouldBlock` means that some are left, and that [`NetBackend::fd`] becomes writable when
    /// more can be sent. After another error the frames that were not begun are lost.
    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// The number of frames in flight: accepted ones, always the last, whose buffers are still needed.
    fn in_flight(&self) -> usize {
        0
    }

    /// Copies what is left of the frames in flight, so that there are none. Later calls of [`NetBackend::kick`] send it.
    fn settle(&mut self) {}

    /// Checks for a frame for the guest and returns whether there is one. Every error is permanent.
    fn receive(&mut self) -> io::Result<bool>;

    /// The received frame with its header. It stays until [`NetBackend::consume`].
    fn frame(&self) -> Option<(Header, &[u8])>;

    /// Drops the received frame.
    fn consume(&mut self);

    /// An unused, open /dev/vhost-net, if the kernel may transfer frames directly between [`NetBackend::fd`] and the
    /// guest's queues. Returned once.
    fn take_vhost(&mut self) -> Option<File> {
        None
    }

    /// Becomes readable when the first frame arrives, and writable when there is room again.
    fn fd(&self) -> BorrowedFd<'_>;

    /// All of its descriptors, before its first use.
    fn fds(&self) -> Vec<RawFd> {
        vec![self.fd().as_raw_fd()]
    }
}

/// Whether an error of a back end means that its other side is gone.
pub fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected | UnexpectedEof)
        || error.raw_os_error() == Some(libc::EBADFD)
}
