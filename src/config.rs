//! What a machine is asked to be: plain data, from flags or from a file, checked once by [`MachineConfig::validate`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A machine as its user describes it. Nothing here is opened or looked up on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// The guest kernel: an ELF `vmlinux` or a bzImage.
    pub kernel: PathBuf,
    /// Initial RAM disk, handed to the kernel as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The user's words of the kernel command line; they follow the default ones, so that they win.
    #[serde(default)]
    pub cmdline: String,
    /// Whether husk's own words precede the user's.
    #[serde(default = "yes")]
    pub default_cmdline: bool,
    /// Number of vCPUs.
    #[serde(default = "one")]
    pub cpus: u32,
    /// Guest memory in MiB.
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u64,
    /// Disks in the order the guest sees them: the first is `/dev/vda`.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
}

/// A disk image or block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Raw image file or block device.
    pub path: PathBuf,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// What the guest reads as the disk's serial number (at most 20 bytes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

fn yes() -> bool {
    true
}
fn one() -> u32 {
    1
}
fn default_memory_mib() -> u64 {
    512
}
