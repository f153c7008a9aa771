//! The configuration of the vsock device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::DEFAULT_CID;

/// The vsock device, which connects the guest (AF_VSOCK) with the host (AF_UNIX).
///
/// A host program connects to `socket`, writes `CONNECT <port>` and a newline, and is connected to that port of the
/// guest after reading `OK <port>` and a newline. The guest's connections to port P of the host (CID 2) arrive at the
/// socket whose path is `socket` with `_P` appended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The path on which husk listens as long as the machine exists.
    pub socket: PathBuf,
    /// The guest's CID. It has no meaning outside of the machine, so several machines may use the same one.
    #[serde(default = "default_cid")]
    pub cid: u32,
}

fn default_cid() -> u32 {
    DEFAULT_CID
}
