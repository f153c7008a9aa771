//! The host side of a network device: transmits the guest's frames, and receives frames for it.

mod attempts;
mod header;
mod stream;
mod tap;
mod unsolicited;

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

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

/// The maximum memory of a back end, in bytes: received frames, and the rest of one of the guest's.
pub const BUDGET_BYTES: u64 = (stream::BUFFER_BYTES + 2 * FRAME_BYTES_MAX) as u64;

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

    /// Sends `frame`, which is in guest memory, and consumes it. `header` has been validated.
    ///
    /// `WouldBlock` means that nothing was sent, and that [`NetBackend::fd`] becomes writable when it can be. After an
    /// error for which [`is_end`] is true there is no peer; any other error concerns only this frame.
    ///
    /// A part of a frame that was sent may remain in the back end, for [`NetBackend::flush`].
    fn send(&mut self, header: &Header, frame: &mut GuestBuffers) -> io::Result<()>;

    /// Sends the rest of a frame. Errors are the same as for [`NetBackend::send`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

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
}

/// Whether an error of a back end means that its other side is gone.
pub fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected | UnexpectedEof)
        || error.raw_os_error() == Some(libc::EBADFD)
}
