//! The disks inside of a snapshot. Each machine writes to copies of its own, files without a name that end with the machine, however
//! it ends: the snapshot stays as it is, and its machines run side by side.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::SnapshotWriter;
use crate::config::{MachineConfig, OWN_FILES};
use crate::image::{Progress, Store};
use crate::resources::disk::copy;
use crate::sys::disk;

/// The disks inside of a snapshot, open for reading, with their indices.
pub struct DisksOfSnapshot {
    dir: PathBuf,
    files: Vec<(usize, File)>,
}

/// A machine's copies of them.
pub struct OwnDisks {
    /// From the snapshot's files to those of the machine.
    copies: Vec<(File, File)>,
}

impl DisksOfSnapshot {
    pub(super) fn new(dir: &Path, files: Vec<(usize, File)>) -> DisksOfSnapshot {
        DisksOfSnapshot { dir: dir.to_owned(), files }
    }

    /// Creates a machine's own disks, still empty, and puts them into its configuration, which is that of the snapshot. Their paths
    /// are valid only in this process, and only as long as the result exists.
    pub fn own(self, config: &mut MachineConfig) -> Result<OwnDisks> {
        let mut copies = Vec::new();
        for (index, file) in self.files {
            let own = nameless_file(&self.dir).context("create a file for a disk")?;
            let disk = config.disks.get_mut(index).context("the snapshot has no such disk")?;
            disk.path = format!("{OWN_FILES}/{}", own.as_raw_fd()).into();
            copies.push((file, own));
        }
        Ok(OwnDisks { copies })
    }

    /// Copies them into another snapshot.
    pub(super) fn copy_to(&self, writer: &mut SnapshotWriter) -> Result<()> {
        let copy = |(index, file): &(usize, File)| copy::copy(file, &writer.disk(*index)?, &|| false, &|_| {});
        self.files.iter().try_for_each(copy).context("copy a disk of the snapshot")
    }
}

impl OwnDisks {
    /// Gives them the content that they have in the snapshot, again if the machine is started again. Fails if it `is_cancelled`.
    pub fn fill(&self, is_cancelled: &dyn Fn() -> bool) -> Result<()> {
        let allocated_bytes = |(from, _): &(File, File)| Ok(disk::allocated_bytes(&from.metadata()?));
        let total_bytes = self.copies.iter().map(allocated_bytes).sum::<io::Result<u64>>()?;
        let bar = Progress::on_terminal().bar("Copying disks", total_bytes);
        let mut before_bytes = 0;
        for copied in &self.copies {
            let (from, to) = copied;
            to.set_len(0)?;
            let copied_all = copy::copy(from, to, is_cancelled, &|bytes| bar.set(before_bytes + bytes));
            copied_all.context("copy a disk of the snapshot")?;
            before_bytes += allocated_bytes(copied)?;
        }
        Ok(())
    }
}

/// A file without a name: next to the snapshot, so that they can share their blocks, or else in the image store.
fn nameless_file(dir: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
    options.open(dir).or_else(|_| Store::open_default()?.nameless_file())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::super::{DisksInside, Snapshot, portable, tests};
    use super::*;
    use crate::config::{DiskConfig, Format};

    fn with_disks(disks: Vec<DiskConfig>) -> MachineConfig {
        MachineConfig { disks, ..tests::description().config }
    }

    #[test]
    fn machines_of_a_snapshot_have_disks_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        let mut writer = SnapshotWriter::create(&path).unwrap();
        writer.memory().set_len(32 << 20).unwrap();
        writer.disk(1).unwrap().write_all_at(b"saved", 0).unwrap();
        let disks = ["/dev/null", "/x.qcow2"].map(|path| DiskConfig::of(path.into()));
        let disks = [DiskConfig { readonly: true, ..disks[0].clone() }, disks[1].clone()];
        let (config, moved) = portable(&with_disks(disks.to_vec()), DisksInside::Writable, None).unwrap();
        assert_eq!(moved, [(1, "/x.qcow2".into())]);
        writer.finish(&super::super::Description { config, ..tests::description() }, b"{}").unwrap();
        let own = || {
            let Snapshot { description: super::super::Description { mut config, .. }, disks, .. } =
                Snapshot::open(&path).unwrap();
            let own = disks.own(&mut config).unwrap();
            own.fill(&|| false).unwrap();
            (config, own)
        };
        let ((one, _one), (other, _other)) = (own(), own());
        assert_eq!((one.disks[0].path.to_str(), one.disks[1].format()), (Some("/dev/null"), Format::Qcow2));
        fs::write(&one.disks[1].path, "other").unwrap();
        fs::remove_dir_all(&path).unwrap();
        assert_eq!([one, other].map(|config| fs::read(&config.disks[1].path).unwrap()), [*b"other", *b"saved"]);
    }

    #[test]
    fn a_file_of_another_name_is_no_disk_of_a_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        for name in ["../disk-0", "disk-1", "memory", "disk-0"] {
            let mut writer = SnapshotWriter::create(&path).unwrap();
            writer.memory().set_len(32 << 20).unwrap();
            writer.disk(0).unwrap();
            let config = with_disks(vec![DiskConfig::of(name.into())]);
            writer.finish(&super::super::Description { config, ..tests::description() }, b"{}").unwrap();
            let opened = Snapshot::open(&path).map(drop);
            assert_eq!(opened.is_ok(), name == "disk-0", "{name}: {opened:?}");
            fs::remove_dir_all(&path).unwrap();
        }
    }
}
