//! What commands ask of a machine that runs, and what its husk answers: one request a connection, over the `control`
//! socket in the machine's directory.
//!
//! Who may open the socket may ask anything: it is its owner's alone. Messages are frames as they are with the guest's
//! init, the first of which begins with [`VERSION`].

pub mod attach;
pub mod client;
pub mod server;

use husk_protocol::WindowSize;
use husk_protocol::frame::Message;
use serde::{Deserialize, Serialize};

/// What a change of any message here changes.
pub const VERSION: u16 = 2;

/// A request with the version that it is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versioned {
    /// [`VERSION`] of who asks.
    pub version: u16,
    /// What is asked.
    pub request: Request,
}

/// What is asked of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// End in order, and by force after this time. Answered at once; the end is [`Request::Wait`]'s.
    Stop {
        /// How long the guest has.
        timeout_ms: u64,
    },
    /// Send the process this signal; SIGKILL ends the machine at once.
    Kill {
        /// Its number.
        signal: u8,
    },
    /// Answered when the machine has ended for good.
    Wait,
    /// Hold the vCPUs.
    Pause,
    /// Let them go on.
    Unpause,
    /// How much the machine uses of the host.
    Stats,
    /// From here on the connection carries the streams: to the client records as the log has them, from it input.
    Attach,
    /// The terminal that is attached has this size.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters in a line.
        columns: u16,
    },
    /// Keep other limits from now on.
    Update(Update),
    /// Have another name.
    Rename {
        /// Which.
        name: String,
    },
}

/// What a limit is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    /// There is to be none.
    Lifted,
    /// This much in a second.
    PerSecond(u64),
}

/// Limits to be changed; those of which nothing is said stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// What the guest is to have, in MiB.
    pub memory_mib: Option<u64>,
    /// Thousandths of a processor that the whole machine may use.
    pub millicpus: Option<u32>,
    /// The machine's part of processors that others want too.
    pub cpu_shares: Option<u32>,
    /// Bytes a second of each disk.
    pub disk_bytes_per_second: Option<Limit>,
    /// Requests a second of each disk.
    pub disk_ops_per_second: Option<Limit>,
    /// Bytes a second of each network interface, in each direction.
    pub network_bytes_per_second: Option<Limit>,
    /// Packets a second of each network interface, in each direction.
    pub network_packets_per_second: Option<Limit>,
    /// Whether the cables of all network interfaces are in.
    pub link_up: Option<bool>,
}

impl Request {
    /// The request that tells of a terminal's size.
    pub fn resize(WindowSize { rows, columns }: WindowSize) -> Request {
        Request::Resize { rows, columns }
    }
}

impl Message for Versioned {
    const MAX_BYTES: usize = 4 << 10;
}

/// What a machine's husk answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done, or begun.
    Done,
    /// It cannot be done, for this reason: one line.
    Refused(String),
    /// The machine has ended with this exit code.
    Ended(u8),
    /// What it uses.
    Stats(Stats),
}

impl Message for Reply {
    const MAX_BYTES: usize = 64 << 10;
}

/// What a machine has used of the host since it was started, or uses now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Processor time of the whole machine.
    pub cpu_us: u64,
    /// Since when that counts: how long the machine's husk has lived.
    pub elapsed_us: u64,
    /// Memory that the guest has touched and not given back.
    pub guest_memory_bytes: u64,
    /// Memory that husk itself takes for the machine.
    pub own_memory_bytes: u64,
    /// Memory that the guest may use.
    pub memory_limit_bytes: u64,
    /// Read from disks.
    pub block_read_bytes: u64,
    /// Written to disks.
    pub block_written_bytes: u64,
    /// Received by the guest.
    pub net_received_bytes: u64,
    /// Sent by the guest.
    pub net_sent_bytes: u64,
    /// How many network interfaces the host's kernel serves now, by vhost-net.
    pub net_vhost_interfaces: u32,
}
