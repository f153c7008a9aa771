//! Rate limits of a device: plain data, enforced by `backend/rate.rs`.

use serde::{Deserialize, Serialize};

/// Limits per second, each optional.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rate {
    /// Bytes per second, in both directions together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// The burst in bytes after an idle period; by default the amount of a tenth of a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_bytes: Option<u64>,
    /// Operations per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops_per_second: Option<u64>,
    /// The burst in operations after an idle period; by default the amount of a tenth of a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst_ops: Option<u64>,
}

impl Rate {
    /// Whether there are no limits.
    pub fn is_unlimited(&self) -> bool {
        self.bytes_per_second.is_none() && self.ops_per_second.is_none()
    }

    /// Whether each limit is nonzero and each burst belongs to a limit.
    pub fn makes_sense(&self) -> bool {
        let sensible = |limit: Option<u64>, burst: Option<u64>| match (limit, burst) {
            (Some(0), _) | (_, Some(0)) | (None, Some(_)) => false,
            (Some(_), _) | (None, None) => true,
        };
        sensible(self.bytes_per_second, self.burst_bytes) && sensible(self.ops_per_second, self.burst_ops)
    }
}
