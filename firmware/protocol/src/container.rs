//! A container in a machine: a process with a root file system and namespaces of its own, as the OCI's runtime
//! specification describes it.

use serde::{Deserialize, Serialize};

/// What a container's process finds. The root file system and what is mounted from the host lie in the machine's share
/// ([`crate::Root::Share`]); their paths begin there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its ID, by which other processes are started in it.
    pub id: String,
    /// Its root file system.
    pub root: String,
    /// Whether that is read-only.
    pub readonly: bool,
    /// The namespaces of its own (CLONE_NEW…): PID, mount, IPC, UTS and cgroup. All others are the machine's, apart from those in
    /// `joined`.
    pub namespaces: u32,
    /// The namespaces that it shares with containers that are there already.
    pub joined: Vec<Joined>,
    /// The host name, unless it is empty.
    pub hostname: String,
    /// The domain name, unless it is empty.
    pub domainname: String,
    /// Mounts, in order.
    pub mounts: Vec<Mount>,
    /// Device nodes besides the usual ones.
    pub devices: Vec<Device>,
    /// Paths that are made inaccessible.
    pub masked_paths: Vec<Vec<u8>>,
    /// Paths that are made read-only.
    pub readonly_paths: Vec<Vec<u8>>,
    /// Kernel parameters, as sysctl(8) names them, and their values.
    pub sysctls: Vec<(String, String)>,
    /// The limits of its processes together: files of cgroup v2 and what is written to them, such as `pids.max` and `30`.
    pub limits: Vec<(String, String)>,
}

/// Namespaces of another container of the same machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The container's ID.
    pub container: String,
    /// The namespaces (CLONE_NEW…).
    pub namespaces: u32,
}

/// A mount in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The mount point, created if it does not exist. Links lead to what they name in the container.
    pub target: Vec<u8>,
    /// What is mounted.
    pub source: MountSource,
    /// The flags of mount(2).
    pub flags: u64,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A folder or file in the machine's share, with all that is mounted in it.
    Share(String),
    /// A file system without a device.
    FileSystem {
        /// `tmpfs`
        kind: String,
        /// Its options, such as `size=64m,mode=1777`.
        options: String,
        /// What it is called in lists of mounts: `shm`.
        name: String,
    },
    /// A tmpfs that all containers with a mount of this name share.
    Memory {
        /// A name of letters and digits.
        name: String,
        /// The options of the container that is the first.
        options: String,
    },
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its path.
    pub path: Vec<u8>,
    /// The type and permissions (`st_mode`).
    pub mode: u32,
    /// The major number.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// Who a process is, in numbers, and its capabilities: nothing is looked up in the root file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// The user ID.
    pub uid: u32,
    /// The group ID.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The file mode creation mask.
    pub umask: Option<u32>,
    /// The capabilities.
    pub capabilities: Capabilities,
    /// The adjustment of its out-of-memory score.
    pub oom_score_adj: Option<i32>,
}

/// The capabilities of a process in five sets, a bit for each capability (capabilities(7)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// What no program can exceed.
    pub bounding: u64,
    /// What is in effect.
    pub effective: u64,
    /// What is preserved across execve(2) by programs that have it.
    pub inheritable: u64,
    /// What can be in effect.
    pub permitted: u64,
    /// What is preserved across execve(2).
    pub ambient: u64,
}
