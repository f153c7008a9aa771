//! Where a machine of `husk run` stores the changes to its root file system.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::Run;
use crate::guest::{RootFs, WritableLayer};
use crate::image::ext4::Journal;
use crate::image::{Store, scratch};
use crate::state_dir::{LAYER, MachineDir};

/// The default size of a persistent disk, which is sparse.
const DEFAULT_DISK_BYTES: u64 = 10 << 30;

impl Run {
    /// Where the writable layer of the machine is, if it stays and has one of its own.
    pub(super) fn own_layer(&self, dir: &MachineDir) -> Option<PathBuf> {
        let has_one = self.lifecycle.stays() && !self.machine.read_only;
        dir.kept().filter(|_| has_one).map(Path::to_owned)
    }

    /// Gives an image, which must be `pinned` if that is given, its writable layer, the one in the directory `layer` if the machine
    /// stays. Returns the identity of the image.
    pub(super) fn prepare_layer(
        &self,
        root_fs: &mut RootFs,
        layer: Option<PathBuf>,
        pinned: Option<&str>,
    ) -> Result<Option<String>> {
        let RootFs::Image { identity, writable, root, .. } = root_fs else { return Ok(None) };
        let id = identity.map(|byte| format!("{byte:02x}")).concat();
        ensure!(
            pinned.is_none_or(|pinned| pinned == id),
            "{} is another image than the one that the machine has changed: remove the machine with `husk rm`",
            root.display()
        );
        *writable = self.writable_layer(*identity, layer)?;
        Ok(Some(id))
    }

    /// The writable layer for the image `identity`.
    fn writable_layer(&self, identity: [u8; 16], layer: Option<PathBuf>) -> Result<WritableLayer> {
        let size_bytes = self.scratch.unwrap_or(DEFAULT_DISK_BYTES);
        Ok(match (&self.keep, layer) {
            (Some(name), _) => WritableLayer::Disk(Store::open_default()?.kept_disk(name, size_bytes, identity)?),
            (None, Some(dir)) => WritableLayer::Disk(scratch::of_machine(&dir.join(LAYER), size_bytes, identity)?),
            (None, None) if self.scratch.is_some() => {
                // A restarted guest finds the data that its predecessor left.
                let journal = if self.lifecycle.may_restart() { Journal::Yes } else { Journal::No };
                WritableLayer::Disk(Store::open_default()?.scratch(size_bytes, journal)?)
            }
            (None, None) if self.machine.read_only => WritableLayer::None,
            (None, None) => WritableLayer::Memory,
        })
    }
}
