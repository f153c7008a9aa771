//! What husk and the init in its guests say to each other: a [`Spec`] in the initial RAM disk, then sessions over vsock.
//!
//! A session is one process: a control connection, and a connection for each of its streams. Each connection begins
//! with a [`Hello`]; on the control connection [frames](frame) follow, on the others the stream's bytes as they are.
//! For the machine's own process the guest connects to the host; for one more process the host connects to the guest: first
//! for control, and for the streams once the guest has [admitted](ToHost::Admitted) the session. Both use port [`PORT`].
//!
//! Either side takes what the other says as foreign: sizes are bounded before memory is taken, and what is not understood
//! ends the session, never the reader.

pub mod frame;
mod hello;
mod session;
mod spec;
pub mod tree;

pub use hello::{HELLO_BYTES, Hello, Role};
pub use session::{Process, ToGuest, ToHost, WindowSize};
pub use spec::{FIXED_PATH, Interface, InterfaceAddress, Limit, Overlay, Root, SPEC_PATH, Spec, Start, Tmpfs};

/// The vsock port that either side listens on.
pub const PORT: u32 = 1024;
/// Where init's own program is for a process of the guest, which it serves `husk cp` with: the first argument is one of
/// those below, the second a path.
pub const INIT_PROGRAM: &str = "/proc/1/exe";
/// Sends what is at the path to standard output, as [`tree::send`] does.
pub const COPY_FROM: &str = "copy-from";
/// The same, and a link at the path is what it leads to.
pub const COPY_FROM_BEHIND_LINK: &str = "copy-from-behind-link";
/// Puts what comes on standard input to the path, as [`tree::receive`] does.
pub const COPY_TO: &str = "copy-to";
/// The same, and files keep their owners.
pub const COPY_TO_KEEPING_OWNERS: &str = "copy-to-keeping-owners";
/// The session of the machine's own process.
pub const MAIN_SESSION: u64 = 0;
/// What a change of any message here changes. husk carries the init that it speaks to, so that they differ only by mistake.
pub const VERSION: u16 = 4;

/// Why a message is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// It is not this protocol at all.
    Magic,
    /// It is another version of it.
    Version(u16),
    /// A number in it names nothing.
    Role(u8),
    /// It claims to be longer than such a message may be.
    TooLong(usize),
    /// Its bytes are no message of the type expected.
    Content,
}

impl core::fmt::Display for Malformed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Malformed::Magic => write!(f, "not husk's protocol"),
            Malformed::Version(version) => write!(f, "protocol version {version}, expected {VERSION}"),
            Malformed::Role(role) => write!(f, "unknown connection role {role}"),
            Malformed::TooLong(bytes) => write!(f, "a message of {bytes} bytes is too long"),
            Malformed::Content => write!(f, "unknown message"),
        }
    }
}

impl std::error::Error for Malformed {}
