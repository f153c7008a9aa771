//! Messages of containerd's task service for shims (containerd.task.v2), and what they contain, with the fields that a shim needs.

use prost::Message;

pub const SERVICE: &str = "containerd.task.v2.Task";

/// `google.protobuf.Timestamp`
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Timestamp {
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

impl Timestamp {
    pub fn now() -> Timestamp {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        // Both fit until the year 292 billion.
        Timestamp { seconds: since_1970.as_secs().cast_signed(), nanos: since_1970.subsec_nanos().cast_signed() }
    }
}

/// `google.protobuf.Any`
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Any {
    #[prost(string, tag = "1")]
    pub type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// `containerd.types.Mount`
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub kind: String,
    #[prost(string, tag = "2")]
    pub source: String,
    /// Relative to the root file system.
    #[prost(string, tag = "3")]
    pub target: String,
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// An empty answer.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Empty {}

/// A request that only names a process: all but those below.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Named {
    #[prost(string, tag = "1")]
    pub id: String,
    /// The further process of the container; empty for its first.
    #[prost(string, tag = "2")]
    pub exec_id: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Create {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub bundle: String,
    #[prost(message, repeated, tag = "3")]
    pub rootfs: Vec<Mount>,
    #[prost(bool, tag = "4")]
    pub terminal: bool,
    #[prost(string, tag = "5")]
    pub stdin: String,
    #[prost(string, tag = "6")]
    pub stdout: String,
    #[prost(string, tag = "7")]
    pub stderr: String,
    #[prost(string, tag = "8")]
    pub checkpoint: String,
    #[prost(message, optional, tag = "10")]
    pub options: Option<Any>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Exec {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(bool, tag = "3")]
    pub terminal: bool,
    #[prost(string, tag = "4")]
    pub stdin: String,
    #[prost(string, tag = "5")]
    pub stdout: String,
    #[prost(string, tag = "6")]
    pub stderr: String,
    /// `process` of config.json.
    #[prost(message, optional, tag = "7")]
    pub spec: Option<Any>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Resize {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(uint32, tag = "3")]
    pub width: u32,
    #[prost(uint32, tag = "4")]
    pub height: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Kill {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(uint32, tag = "3")]
    pub signal: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct CloseIo {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    #[prost(bool, tag = "3")]
    pub stdin: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Update {
    #[prost(string, tag = "1")]
    pub id: String,
    /// `linux.resources` of config.json.
    #[prost(message, optional, tag = "2")]
    pub resources: Option<Any>,
}

/// `containerd.v1.types.Status`
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Status {
    Unknown = 0,
    Created = 1,
    Running = 2,
    Stopped = 3,
    Paused = 4,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct State {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub bundle: String,
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    #[prost(enumeration = "Status", tag = "4")]
    pub status: i32,
    #[prost(string, tag = "5")]
    pub stdin: String,
    #[prost(string, tag = "6")]
    pub stdout: String,
    #[prost(string, tag = "7")]
    pub stderr: String,
    #[prost(bool, tag = "8")]
    pub terminal: bool,
    #[prost(uint32, tag = "9")]
    pub exit_status: u32,
    #[prost(message, optional, tag = "10")]
    pub exited_at: Option<Timestamp>,
    #[prost(string, tag = "11")]
    pub exec_id: String,
}

/// The answer of `Create` and of `Start`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Pid {
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Deleted {
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    #[prost(uint32, tag = "2")]
    pub exit_status: u32,
    #[prost(message, optional, tag = "3")]
    pub exited_at: Option<Timestamp>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Waited {
    #[prost(uint32, tag = "1")]
    pub exit_status: u32,
    #[prost(message, optional, tag = "2")]
    pub exited_at: Option<Timestamp>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Pids {
    #[prost(message, repeated, tag = "1")]
    pub processes: Vec<Pid>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Stats {
    #[prost(message, optional, tag = "1")]
    pub stats: Option<Any>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Connected {
    #[prost(uint32, tag = "1")]
    pub shim_pid: u32,
    #[prost(uint32, tag = "2")]
    pub task_pid: u32,
}

/// `io.containerd.cgroups.v2.Metrics`
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Metrics {
    #[prost(message, optional, tag = "1")]
    pub pids: Option<PidsStat>,
    #[prost(message, optional, tag = "2")]
    pub cpu: Option<CpuStat>,
    #[prost(message, optional, tag = "4")]
    pub memory: Option<MemoryStat>,
    #[prost(message, optional, tag = "8")]
    pub memory_events: Option<MemoryEvents>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct PidsStat {
    #[prost(uint64, tag = "1")]
    pub current: u64,
    #[prost(uint64, tag = "2")]
    pub limit: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct CpuStat {
    #[prost(uint64, tag = "1")]
    pub usage_usec: u64,
    #[prost(uint64, tag = "2")]
    pub user_usec: u64,
    #[prost(uint64, tag = "3")]
    pub system_usec: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct MemoryStat {
    #[prost(uint64, tag = "13")]
    pub inactive_file: u64,
    #[prost(uint64, tag = "32")]
    pub usage: u64,
    #[prost(uint64, tag = "33")]
    pub usage_limit: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct MemoryEvents {
    #[prost(uint64, tag = "5")]
    pub oom_kill: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_bytes_that_containerd_sends() {
        let request =
            Create::decode(&b"\x0a\x01c\x12\x02/b\x1a\x07\x0a\x05btrfs\x20\x01\x2a\x01i\x32\x01o\x3a\x01e"[..]);
        let mounts = vec![Mount { kind: "btrfs".into(), ..Mount::default() }];
        let expected = Create {
            id: "c".into(),
            bundle: "/b".into(),
            rootfs: mounts,
            terminal: true,
            stdin: "i".into(),
            stdout: "o".into(),
            stderr: "e".into(),
            ..Create::default()
        };
        assert_eq!(request.unwrap(), expected);
        let ended = Deleted { pid: 7, exit_status: 137, exited_at: Some(Timestamp { seconds: 1, nanos: 2 }) };
        assert_eq!(ended.encode_to_vec(), b"\x08\x07\x10\x89\x01\x1a\x04\x08\x01\x10\x02");
        assert!(Timestamp::now().seconds > 1_700_000_000);
    }
}
