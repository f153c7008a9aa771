//! The protocol between husk and the init of its guests: a [`Spec`] in the initial RAM disk, then sessions over vsock.
//!
//! A session is one process: a control connection, and a connection for each of its streams. Each connection begins
//! with a [`Hello`]; on the control connection [frames](frame) follow, on the others the stream's bytes as they are.
//! For the machine's own process the guest connects to the host; for one more process the host connects to the guest:
//! first for control, and for the streams once the guest has [admitted](ToHost::Admitted) the session. Both use port
//! [`PORT`].
//!
//! Connections do not survive when a machine is saved and restored. The guest of a restored machine connects its main
//! session again, and first says whether it has [resumed](ToHost::Resumed) a process or [waits](ToHost::Waiting) for one.
//! Either way the host answers with what belongs to this machine and to no other: an [`Identity`]. All other sessions end.
//!
//! Both sides treat received data as untrusted: sizes are checked before memory is allocated, and invalid data ends the
//! session, never the process.

mod container;
pub mod frame;
mod hello;
mod session;
mod spec;
pub mod tree;

pub use container::{Capabilities, Container, Credentials, Device, Joined, Mount, MountSource};
pub use hello::{HELLO_BYTES, Hello, Role};
pub use session::{CallFilter, Process, Renewal, Rights, ToGuest, ToHost, WindowSize};
pub use spec::{
    FIXED_PATH, Identity, Interface, InterfaceAddress, Limit, Overlay, Preload, Root, Route, Run, SPEC_PATH, Share,
    Spec, Start, Tmpfs,
};

/// The vsock port that either side listens on.
pub const PORT: u32 = 1024;
/// The path of init's own program within the guest, which implements `husk cp` and `husk top`, among others: the first argument is one
/// of those below, the second a path if nothing else is said.
pub const INIT_PROGRAM: &str = "/proc/1/exe";
/// Sends the file at the path to standard output with [`tree::send`].
pub const COPY_FROM: &str = "copy-from";
/// The same, following a link at the path.
pub const COPY_FROM_BEHIND_LINK: &str = "copy-from-behind-link";
/// Writes a stream from standard input to the path with [`tree::receive`].
pub const COPY_TO: &str = "copy-to";
/// The same, preserving the files' owners.
pub const COPY_TO_KEEPING_OWNERS: &str = "copy-to-keeping-owners";
/// Prints a line for each process, of the container whose ID is the second argument if there is one, with tabs between user, PID, PID
/// of the parent, CPU time in hundredths of a second, start in seconds since 1970, terminal and command.
pub const LIST_PROCESSES: &str = "list-processes";
/// Prints files of the cgroup of a container: the second argument is its ID, all others are names of files. Each line begins with
/// the name of its file and a space.
pub const READ_CGROUP: &str = "read-cgroup";
/// Writes files of the cgroup of a container: the second argument is its ID, all others are `NAME=VALUE`.
pub const WRITE_CGROUP: &str = "write-cgroup";
/// Sends the whole root file system to standard output with [`tree::send_root`]. The path has no meaning.
pub const COPY_ROOT: &str = "copy-root";
/// Sends what has changed in it since the image, with [`tree::send_changes`].
pub const COPY_CHANGES: &str = "copy-changes";
/// The same without the content of files.
pub const LIST_CHANGES: &str = "list-changes";
/// Waits until it is terminated: the process of a machine that was started for its files only.
pub const IDLE: &str = "idle";
/// The session of the machine's main process.
pub const MAIN_SESSION: u64 = 0;
/// The protocol version. Any change of a message increments it. husk embeds the init that it communicates with, so a
/// mismatch is always an error.
pub const VERSION: u16 = 18;
/// The maximum number of bytes of a stream that are on their way: written by the guest, and not yet in the host's socket.
/// A machine that is restored sends as many of its outputs again, on connections that begin with the position of their first byte
/// in the stream (little-endian).
pub const IN_FLIGHT_BYTES_MAX: usize = 256 << 10;
/// The size of that position.
pub const POSITION_BYTES: usize = size_of::<u64>();

/// Why a message is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// It belongs to another protocol.
    Magic,
    /// It has another version of the protocol.
    Version(u16),
    /// An unknown value.
    Role(u8),
    /// It exceeds the maximum size of such a message.
    TooLong(usize),
    /// It is not a message of the expected type.
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
