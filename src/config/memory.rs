//! The host's pages that back guest memory.

use serde::{Deserialize, Serialize};

use crate::sys::mapping::Pages;

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

    /// The pages to map.
    pub fn pages(self) -> Pages {
        match self {
            HugePages::Transparent => Pages::Transparent,
            HugePages::Size2M => Pages::Pool(2 << 20),
            HugePages::Size1G => Pages::Pool(1 << 30),
            HugePages::Off => Pages::Small,
        }
    }
}
