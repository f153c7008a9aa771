//! The control connection's messages, in both directions, and the process that they are about.

use serde::{Deserialize, Serialize};

use crate::frame::Message;
use crate::spec::Limit;

/// A process to be started in the guest. What it leaves open, the guest's files decide: user names, the path searched.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The program, by path or by name, and its arguments. The same string is argument 0.
    pub args: Vec<Vec<u8>>,
    /// `NAME=VALUE` each. PATH, HOSTNAME, HOME and, with a terminal, TERM are added where they are missing.
    pub env: Vec<Vec<u8>>,
    /// The working directory; empty is `/`. The machine's own process has it made where it is missing.
    pub working_dir: Vec<u8>,
    /// As a user types it: `NAME`, `UID`, and either with `:GROUP` or `:GID`; empty is root.
    pub user: String,
    /// The terminal that it gets, if it gets one.
    pub terminal: Option<WindowSize>,
    /// Whether standard input is a stream of the session; without it there is nothing to read.
    pub stdin: bool,
    /// Whether it has no streams at all: what it writes goes nowhere, and its session may end before it.
    pub detached: bool,
    /// Resource limits, in the order in which they are set.
    pub limits: Vec<Limit>,
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// What the host says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Start this process; once in a session that the host opened, and there only. It starts when the session is
    /// [admitted](ToHost::Admitted) and its streams have come.
    Start(Process),
    /// Send the process this signal.
    Signal(u8),
    /// The person's terminal has another size now.
    Resize(WindowSize),
    /// All that the process wrote has arrived: the session is over, and with the main one the machine.
    Finish,
    /// The guest did not run for a while, or the host's wall clock was set: [ask](ToHost::AskTime) for the time. In the main
    /// session only.
    CheckClock,
    /// The host's wall clock: nanoseconds since 1970, when it answered.
    Time(u64),
}

impl Message for ToGuest {
    // What Linux takes as arguments and environment of one program by default, and some.
    const MAX_BYTES: usize = 2 << 20;
}

/// What the guest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// The session that the host opened has its turn: there is room for its process, and its streams may come.
    Admitted,
    /// The process runs under this number.
    Started(u32),
    /// There is no process, for this reason; the code is what a shell would give.
    Failed {
        /// One line.
        message: String,
        /// 125 to 127.
        code: u8,
    },
    /// The process ended by itself.
    Exited(u8),
    /// A signal of this number ended the process.
    Signaled(u8),
    /// Say what time it is: the answer is a [`ToGuest::Time`].
    AskTime,
}

impl Message for ToHost {
    const MAX_BYTES: usize = 8 << 10;
}
