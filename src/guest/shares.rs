//! Folders and files of the host that husk's init mounts.

use std::path::PathBuf;

use crate::config::{SHARED_FILE, ShareConfig};

/// What is shared, and where the guest finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// For the machine.
    pub config: ShareConfig,
    /// For its init.
    pub mount: husk_protocol::Share,
}

impl Share {
    /// The share with this `index` of a machine: of the folder `source`, or the file if it `is_file`, at the path `target` of
    /// the guest.
    pub fn new(index: usize, source: PathBuf, is_file: bool, target: Vec<u8>, readonly: bool) -> Share {
        let tag = format!("husk{index}");
        let file = is_file.then(|| SHARED_FILE.to_owned());
        Share {
            mount: husk_protocol::Share { tag: tag.clone(), file, path: target, readonly, copies: false, owned: false },
            config: ShareConfig { readonly, ..ShareConfig::of(source, tag) },
        }
    }
}
