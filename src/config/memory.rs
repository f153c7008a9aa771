//! The host's pages that back guest memory.

use serde::{Deserialize, Serialize};

/// The size of the pages that back guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Transparent huge pages: 2 MiB where the host has them available, and small pages elsewhere.
    #[default]
    #[serde(rename = "thp")]
    Transparent,
    /// Pages of 2 MiB from the host's pool (vm.nr_hugepages).
    #[serde(rename = "2M")]
    Size2M,
    /// Pages of 1 GiB from the host's pool.
    #[serde(rename = "1G")]
    Size1G,
    /// Small pages.
    #[serde(rename = "off")]
    Off,
}

impl HugePages {
    pub(super) fn is_default(&self) -> bool {
        *self == HugePages::default()
    }

    /// The size of a page from the host's pool in bytes, if guest memory consists of those.
    pub fn pool_page_bytes(self) -> Option<u64> {
        match self {
            HugePages::Transparent | HugePages::Off => None,
            HugePages::Size2M => Some(2 << 20),
            HugePages::Size1G => Some(1 << 30),
        }
    }
}

/// How guest memory is backed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backing {
    /// The size of the pages.
    pub huge_pages: HugePages,
    /// Whether all memory is allocated before the guest starts.
    pub prefault: bool,
}
