//! What a device may do in a second: plain data, that `backend/rate.rs` keeps to.

use serde::{Deserialize, Serialize};

/// Limits on what passes in a second, each none unless given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rate {
    /// Bytes a second, in both directions together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Bytes that may pass at once after a pause; a tenth of a second's unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_bytes: Option<u64>,
    /// Operations a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops_per_second: Option<u64>,
    /// Operations that may pass at once after a pause; a tenth of a second's unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_ops: Option<u64>,
}

impl Rate {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.bytes_per_second.is_none() && self.ops_per_second.is_none()
    }

    /// Whether each limit lets something pass, and each burst has a limit that it belongs to.
    pub fn makes_sense(&self) -> bool {
        let sensible = |limit: Option<u64>, burst: Option<u64>| match (limit, burst) {
            (Some(0), _) | (_, Some(0)) | (None, Some(_)) => false,
            (Some(_), _) | (None, None) => true,
        };
        sensible(self.bytes_per_second, self.burst_bytes) && sensible(self.ops_per_second, self.burst_ops)
    }
}
