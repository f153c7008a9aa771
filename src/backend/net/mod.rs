//! The host's side of a network device: where a guest's frames go, and where those for it come from.

mod header;
mod stream;
mod tap;

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

use crate::memory::GuestBuffers;

pub use header::{FLAG_DATA_VALID, HEADER_BYTES, Header};
pub use stream::StreamNet;
pub use tap::{Passed, TapCounts, TapNet};

/// The shortest frame that has all of its Ethernet header.
pub const FRAME_BYTES_MIN: usize = 14;
/// The longest frame: a packet of 64 KiB less one, behind an Ethernet header with a VLAN tag.
pub const FRAME_BYTES_MAX: usize = 65535 + 18;

/// What a back end holds at most, in bytes: frames for the guest that came together, and the rest of one of the guest's.
pub const BUDGET_BYTES: u64 = (stream::BUFFER_BYTES + 2 * FRAME_BYTES_MAX) as u64;

/// Takes a guest's frames and has frames for it. It belongs to one thread at a time and never waits.
pub trait NetBackend: Send {
    /// Which of the device's features it has a part in (virtio 1.2 §5.1.3): who computes checksums and cuts segments.
    fn features(&self) -> u64;

    /// The driver accepted `features`: frames for the guest leave no more to it than these say.
    fn accept(&mut self, features: u64) -> io::Result<()>;

    /// Lets frames for the guest come here, as they do at first, or only to the other back ends of the same network. What
    /// waits here may be lost then. Called again and again, it is done once. With no others it has nothing to do.
    fn set_enabled(&mut self, _enabled: bool) -> io::Result<()> {
        Ok(())
    }

    /// Sends `frame`, which lies in guest memory, and uses it up. `header` was checked against the features.
    ///
    /// `WouldBlock` means that nothing was sent, and that [`NetBackend::fd`] becomes writable when it can be. After
    /// [`is_end`] there is nobody left; any other error is about this frame only.
    ///
    /// A frame that was sent may yet have a part here, for [`NetBackend::flush`].
    fn send(&mut self, header: &Header, frame: &mut GuestBuffers) -> io::Result<()>;

    /// Sends what is left of a frame. Errors are as for [`NetBackend::send`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Looks for a frame for the guest and returns whether there is one. Every error is the end.
    fn receive(&mut self) -> io::Result<bool>;

    /// The frame that was found, with what of it is left to the guest. It stays until [`NetBackend::consume`].
    fn frame(&self) -> Option<(Header, &[u8])>;

    /// The frame has been taken, or is of no use.
    fn consume(&mut self);

    /// /dev/vhost-net, open and unused, where the kernel may take frames straight between [`NetBackend::fd`] and a guest's
    /// queues. Returned once.
    fn take_vhost(&mut self) -> Option<File> {
        None
    }

    /// Becomes readable with a frame after there was none, and writable with room after there was none.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// Whether an error from a backend says that its other side is gone.
pub fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected | UnexpectedEof)
        || error.raw_os_error() == Some(libc::EBADFD)
}
