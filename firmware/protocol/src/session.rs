//! Messages of the control connection, in both directions.

use serde::{Deserialize, Serialize};

use crate::container::{Container, Credentials};
use crate::frame::Message;
use crate::hello::Role;
use crate::spec::{Identity, Limit, Overlay, Run};

/// A process to be started in the guest. User names and PATH are resolved with the guest's files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The program, by path or by name, and its arguments. It is also argument 0.
    pub args: Vec<Vec<u8>>,
    /// `NAME=VALUE` each. PATH, HOSTNAME, HOME and, with a terminal, TERM are added if missing.
    pub env: Vec<Vec<u8>>,
    /// The working directory; empty means `/`. It is created for the main process if it does not exist.
    pub working_dir: Vec<u8>,
    /// The user as given: `NAME` or `UID`, optionally with `:GROUP` or `:GID`; empty is root.
    pub user: String,
    /// The size of its terminal, if it has one.
    pub terminal: Option<WindowSize>,
    /// Whether standard input is a stream of the session; otherwise it is empty.
    pub stdin: bool,
    /// Whether it has no streams: its output is discarded, and its session may end before the process.
    pub detached: bool,
    /// Resource limits, in the order they are set.
    pub limits: Vec<Limit>,
    /// What it may do.
    pub rights: Rights,
    /// Who it is in numbers, instead of `user`, with the environment as it is given, except that HOME is added.
    #[serde(default)]
    pub credentials: Option<Credentials>,
    /// The ID of the [container](crate::Container) that it is started in.
    #[serde(default)]
    pub container: Option<String>,
}

/// What a process may do, apart from what its user may.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    /// More groups, by name or GID, as listed in the guest's files.
    pub groups: Vec<String>,
    /// The capabilities that neither it nor its children can get, a bit for each (capabilities(7)).
    pub dropped_capabilities: u64,
    /// Whether executing a program never gives it more rights.
    pub no_new_privileges: bool,
    /// Decides on its system calls and those of its children, if there is one.
    #[serde(default)]
    pub filter: Option<CallFilter>,
    /// The maximum number of processes and threads of all processes with such a limit together.
    pub processes_max: Option<u32>,
}

/// A system call filter, as seccomp(2) takes it for SECCOMP_SET_MODE_FILTER.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallFilter {
    /// SECCOMP_FILTER_FLAG_…
    pub flags: u64,
    /// Its instructions (`struct sock_filter`), of [`CallFilter::INSTRUCTION_BYTES`] each.
    pub program: Vec<u8>,
}

impl CallFilter {
    /// The size of an instruction.
    pub const INSTRUCTION_BYTES: usize = 8;
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// What every restored machine needs, since it has the clock and the random numbers of the one that was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// The host's wall clock, in nanoseconds since 1970.
    pub time_ns: u64,
    /// Random bytes that no other machine gets.
    pub entropy: [u8; 32],
}

/// Messages from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Start this process; sent once, and only in a session opened by the host. It starts when the session is
    /// [admitted](ToHost::Admitted) and its streams are connected.
    Start(Box<Process>),
    /// Send the process this signal.
    Signal(u8),
    /// The size of the user's terminal has changed.
    Resize(WindowSize),
    /// All output of the process has arrived: ends the session, and with the main session the machine.
    Finish,
    /// The guest was stopped, or the host's wall clock was set: [ask](ToHost::AskTime) for the time. Only in the main
    /// session.
    CheckClock,
    /// The host's wall clock at the time of the response, in nanoseconds since 1970.
    Time(u64),
    /// The machine was restored. The answer to [`ToHost::Resumed`], which is answered by [`ToHost::Renewed`].
    Renew {
        /// The time and random numbers.
        renewal: Renewal,
        /// What the machine is called and how it is connected from now on, which may be the same as before.
        identity: Box<Identity>,
        /// Whether to reset all connections to others: the network has forgotten them, or they belong to the machine that was
        /// saved.
        cut: bool,
    },
    /// Start the main process, with this writable layer above the image. The answer to [`ToHost::Waiting`]. A disk with that layer, and
    /// the run's shares, are devices that the guest has not seen before.
    Begin(Renewal, Overlay, Box<Run>),
    /// Execute the program of the container that was created in this session.
    Go,
    /// Create one more container with this first process; sent once, instead of [`ToGuest::Start`]. The answer is
    /// [`ToHost::Created`]. When the session ends, the container does.
    Create(Box<Container>, Box<Process>),
}

impl Message for ToGuest {
    // Linux's default limit for arguments and environment together, with some margin.
    const MAX_BYTES: usize = 2 << 20;
}

/// Messages from the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// The session opened by the host is admitted: its streams may be connected.
    Admitted,
    /// The process is running with this PID.
    Started(u32),
    /// The process did not start, for this reason; the code is the same as a shell's.
    Failed {
        /// One line.
        message: String,
        /// 125 to 127.
        code: u8,
    },
    /// The process exited with this code.
    Exited(u8),
    /// The process was killed by this signal.
    Signaled(u8),
    /// Request the time, which is answered by [`ToGuest::Time`].
    AskTime,
    /// The machine was restored, and the main session goes on. How the process ended follows even if the host was told
    /// before.
    Resumed {
        /// The PID of the process, if it has not exited.
        pid: Option<u32>,
        /// Its input if it is open, and its outputs of which something may not have arrived. They are connected already.
        streams: Vec<Role>,
    },
    /// The machine was [renewed](ToGuest::Renew): it has its identity, or still the one of the machine that was saved, for
    /// this reason in one line.
    Renewed(Result<(), String>),
    /// The machine is prepared, and the main process may [begin](ToGuest::Begin).
    Waiting,
    /// The container of the session is created. Its process has this PID, and executes its program when it is told
    /// [to go](ToGuest::Go).
    Created(u32),
    /// The kernel has killed one or more processes because memory was short: of the machine in the main session, and of its container in
    /// another one, whose process has ended.
    OutOfMemory,
}

impl Message for ToHost {
    const MAX_BYTES: usize = 8 << 10;
}
