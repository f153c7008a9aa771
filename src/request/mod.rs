//! The control protocol between commands and a running machine: one request per connection, over the `control` socket
//! in the machine's directory.
//!
//! Any process that can open the socket may send any request, so only the owner can open it. Messages use the same
//! framing as those to the guest's init, and a request starts with [`VERSION`].

pub mod attach;
pub mod client;
pub mod detach;
pub mod server;

use husk_protocol::WindowSize;
use husk_protocol::frame::Message;
use serde::{Deserialize, Serialize};

/// The protocol version. Any change of a message increments it.
pub const VERSION: u16 = 6;

/// A request with its protocol version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versioned {
    /// The client's [`VERSION`].
    pub version: u16,
    /// The request.
    pub request: Request,
}

/// A request to a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Stop gracefully, and by force after the timeout. Acknowledged immediately; use [`Request::Wait`] to wait for the
    /// end.
    Stop {
        /// The guest's grace period.
        timeout_ms: u64,
    },
    /// Send this signal to the process; SIGKILL ends the machine at once.
    Kill {
        /// The signal number.
        signal: u8,
    },
    /// Execute the program of a process that waits in its container. Answered when it is running or has failed to start.
    Go,
    /// Answered when the machine has ended for good.
    Wait,
    /// Pause the vCPUs.
    Pause,
    /// Resume the vCPUs.
    Unpause,
    /// Report the machine's resource usage.
    Stats,
    /// Turn the connection into the machine's streams: output records to the client, in the format of the log, and
    /// input from it.
    Attach,
    /// Set the size of the attached terminal.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
    /// Take a snapshot. Answered when it is complete.
    Snapshot {
        /// The absolute path of its directory.
        path: Vec<u8>,
        /// What it is like.
        options: SnapshotOptions,
    },
    /// Change the limits.
    Update(Update),
    /// Rename the machine.
    Rename {
        /// The new name.
        name: String,
    },
    /// Turn the connection into the input of the machine's process: its end is the end of that, and is answered by the end of the
    /// connection.
    Feed,
}

/// What a snapshot is like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOptions {
    /// What the machine does then.
    pub then: AfterSnapshot,
    /// Whether it contains the machine's writable disks.
    pub with_disks: bool,
    /// Whether the machine, which goes on, remembers what changes from now on.
    pub track: bool,
    /// The snapshot since which it saves only the changes of memory.
    pub base: Option<Base>,
}

/// An earlier snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The absolute path of its directory.
    pub path: Vec<u8>,
    /// Its ID.
    pub id: String,
}

impl SnapshotOptions {
    /// A whole snapshot without disks.
    pub fn new(then: AfterSnapshot) -> SnapshotOptions {
        SnapshotOptions { then, with_disks: false, track: false, base: None }
    }
}

/// What a machine does after a snapshot is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AfterSnapshot {
    /// It goes on.
    Continue,
    /// It ends.
    Stop,
    /// It ends, and the snapshot belongs to it, to be continued when it is started again.
    Suspend,
}

/// A new value of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    /// Remove the limit.
    Lifted,
    /// Limit to this amount per second.
    PerSecond(u64),
}

/// New limits. Limits that are not specified remain unchanged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// Memory of the guest, in MiB.
    pub memory_mib: Option<u64>,
    /// CPU time of the whole machine, in thousandths of a CPU.
    pub millicpus: Option<u32>,
    /// The machine's CPU weight relative to other processes.
    pub cpu_shares: Option<u32>,
    /// Bytes per second of each disk.
    pub disk_bytes_per_second: Option<Limit>,
    /// Requests per second of each disk.
    pub disk_ops_per_second: Option<Limit>,
    /// Bytes per second of each network interface, in each direction.
    pub network_bytes_per_second: Option<Limit>,
    /// Packets per second of each network interface, in each direction.
    pub network_packets_per_second: Option<Limit>,
    /// Whether the links of all network interfaces are up.
    pub link_up: Option<bool>,
}

impl Request {
    /// The request that reports a terminal's size.
    pub fn resize(WindowSize { rows, columns }: WindowSize) -> Request {
        Request::Resize { rows, columns }
    }
}

impl Message for Versioned {
    // Two paths, and some margin.
    const MAX_BYTES: usize = 16 << 10;
}

/// A machine's reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// The request was performed or started.
    Done,
    /// The request was refused, for this reason: one line.
    Refused(String),
    /// The machine has ended with this exit code.
    Ended(u8),
    /// Resource usage.
    Stats(Stats),
}

impl Message for Reply {
    const MAX_BYTES: usize = 64 << 10;
}

/// The host resources that a machine has used since it started, or currently uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// CPU time of the whole machine.
    pub cpu_us: u64,
    /// The time over which CPU time accumulated: the lifetime of the machine's husk process.
    pub elapsed_us: u64,
    /// Memory that the guest has touched and not returned.
    pub guest_memory_bytes: u64,
    /// Memory that husk itself uses for the machine.
    pub own_memory_bytes: u64,
    /// Memory that the guest may use.
    pub memory_limit_bytes: u64,
    /// Bytes read from disks.
    pub block_read_bytes: u64,
    /// Bytes written to disks.
    pub block_written_bytes: u64,
    /// Bytes received by the guest.
    pub net_received_bytes: u64,
    /// Bytes sent by the guest.
    pub net_sent_bytes: u64,
    /// The number of network interfaces that vhost-net currently serves.
    pub net_vhost_interfaces: u32,
}
