//! The host's pages that back guest memory.

use serde::{Deserialize, Serialize};

use super::MachineConfig;
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

    /// Whether the pages are from the host's pool.
    pub fn is_pool(self) -> bool {
        matches!(self, HugePages::Size2M | HugePages::Size1G)
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

impl MachineConfig {
    /// Whether the guest reports free pages, which are then returned to the host. Pages that were allocated in advance or
    /// belong to the host's pool are kept.
    pub fn reports_free_pages(&self) -> bool {
        self.balloon && !self.prefault && !matches!(self.huge_pages.pages(), Pages::Pool(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_that_the_host_can_reuse_are_reported() {
        let default = MachineConfig::default();
        assert!(default.reports_free_pages());
        assert!(MachineConfig { huge_pages: HugePages::Off, ..default.clone() }.reports_free_pages());
        for kept in [
            MachineConfig { balloon: false, ..default.clone() },
            MachineConfig { prefault: true, ..default.clone() },
            MachineConfig { huge_pages: HugePages::Size2M, ..default },
        ] {
            assert!(!kept.reports_free_pages(), "{kept:?}");
        }
    }
}
