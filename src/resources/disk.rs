//! From a disk's path to an open, locked image: raw files, qcow2 files and block devices.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::backend::disk::Qcow2Disk;
use crate::backend::rate::Rate;
use crate::config::{DiskConfig, Format};
use crate::virtio::block_request::SECTOR_BYTES;

/// A disk that is open, and ours alone: nobody else writes to it, and nobody else reads it while we write.
#[derive(Debug)]
pub struct DiskFile {
    /// What requests are made of. The lock lasts as long as it does.
    pub image: Image,
    /// Where it was found, for messages.
    pub path: PathBuf,
    /// Its size, a multiple of 512 and not 0.
    pub capacity_bytes: u64,
    /// Whether it is open for reading only.
    pub readonly: bool,
    /// What the guest reads as its serial number.
    pub id: Option<String>,
    /// What the guest may read and write in a second.
    pub rate: Rate,
}

/// An image, by its format.
#[derive(Debug)]
pub enum Image {
    /// The disk's bytes as they are.
    Raw {
        /// The file that has them.
        file: File,
        /// Whether it is a block device.
        block_device: bool,
    },
    /// A qcow2 image, its tables found to be in order as far as they were read.
    Qcow2(Box<Qcow2Disk>),
}

/// Opens the disk that `config` describes, and locks it: shared if it is read-only, exclusively if not (flock(2)).
///
/// Fails with one line that names the disk and what is wrong with it.
pub fn open(config: &DiskConfig) -> Result<DiskFile> {
    let DiskConfig { path, readonly, id, format: _, rate } = config;
    let name = path.display();
    // Without O_NONBLOCK, opening a named pipe waits for its other end. It makes no difference to disks.
    let opened = File::options().read(true).write(!readonly).custom_flags(libc::O_NONBLOCK).open(path);
    let file = match opened {
        Err(error) if error.kind() == ErrorKind::IsADirectory => bail!("disk {name} is a directory"),
        Err(error) if !readonly && matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
            return Err(anyhow!(error).context(format!("open disk {name} for writing (add `,ro` to only read it)")));
        }
        opened => opened.with_context(|| format!("open disk {name}"))?,
    };
    let kind = file.metadata().with_context(|| format!("open disk {name}"))?.file_type();
    ensure!(!kind.is_dir(), "disk {name} is a directory");
    let block_device = kind.is_block_device();
    ensure!(block_device || kind.is_file(), "disk {name} is neither a file nor a block device");
    let locked = if *readonly { file.try_lock_shared() } else { file.try_lock() };
    match locked {
        Err(TryLockError::WouldBlock) => bail!("disk {name} is in use by another process"),
        Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("lock disk {name}")),
        Ok(()) => {}
    }
    let (image, capacity_bytes) = match config.format() {
        Format::Raw => {
            // A block device's metadata have no size.
            let capacity_bytes = (&file).seek(SeekFrom::End(0)).with_context(|| format!("size of disk {name}"))?;
            (Image::Raw { file, block_device }, capacity_bytes)
        }
        Format::Qcow2 => {
            ensure!(!block_device, "disk {name} is a block device, and qcow2 needs a file that can grow");
            let image = Qcow2Disk::open(file, *readonly).map_err(|refusal| anyhow!("disk {name} {refusal}"))?;
            let capacity_bytes = image.capacity_bytes();
            (Image::Qcow2(Box::new(image)), capacity_bytes)
        }
    };
    ensure!(capacity_bytes > 0, "disk {name} is empty");
    ensure!(
        capacity_bytes.is_multiple_of(SECTOR_BYTES),
        "disk {name} has {capacity_bytes} bytes, which is not a multiple of {SECTOR_BYTES}"
    );
    Ok(DiskFile { image, path: path.clone(), capacity_bytes, readonly: *readonly, id: id.clone(), rate: *rate })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    fn image(len_bytes: u64) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(len_bytes).unwrap();
        image
    }

    fn config(path: &Path, readonly: bool) -> DiskConfig {
        let id = Some("blue".to_owned());
        DiskConfig { path: path.to_owned(), readonly, id, format: None, rate: Rate::default() }
    }

    fn refusal(path: &Path, readonly: bool) -> String {
        format!("{:#}", open(&config(path, readonly)).unwrap_err())
    }

    #[test]
    fn a_disk_has_the_size_of_its_image_beyond_two_tib_too() {
        let image = image((3 << 40) + 512);
        let disk = open(&config(image.path(), false)).unwrap();
        assert_eq!((disk.capacity_bytes, disk.readonly), ((3 << 40) + 512, false));
        assert!(matches!(disk.image, Image::Raw { block_device: false, .. }));
        assert_eq!(disk.id.as_deref(), Some("blue"));
    }

    #[test]
    fn bad_disks_are_refused_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("none.img");
        assert_eq!(
            refusal(&missing, false),
            format!("open disk {}: No such file or directory (os error 2)", missing.display())
        );
        for readonly in [false, true] {
            assert_eq!(refusal(folder.path(), readonly), format!("disk {} is a directory", folder.path().display()));
            assert_eq!(
                refusal(Path::new("/dev/null"), readonly),
                "disk /dev/null is neither a file nor a block device"
            );
        }
        assert!(refusal(image(0).path(), false).ends_with(" is empty"));
        assert!(refusal(image(1000).path(), true).ends_with(" has 1000 bytes, which is not a multiple of 512"));
    }

    #[test]
    fn a_disk_that_is_only_readable_suggests_ro() {
        let image = image(512);
        image.as_file().set_permissions(PermissionsExt::from_mode(0o400)).unwrap();
        // Root may write to any file, but not to this one.
        let root = File::options().write(true).open(image.path()).is_ok();
        let path = if root { Path::new("/sys/kernel/uevent_seqnum") } else { image.path() };
        assert!(refusal(path, false).contains("(add `,ro` to only read it): "), "{}", refusal(path, false));
        assert!(open(&config(image.path(), true)).is_ok());
    }

    #[test]
    fn a_disk_in_use_is_refused_unless_both_only_read() {
        let image = image(512);
        let in_use = format!("disk {} is in use by another process", image.path().display());
        let writer = open(&config(image.path(), false)).unwrap();
        assert_eq!([refusal(image.path(), false), refusal(image.path(), true)], [in_use.clone(), in_use.clone()]);
        drop(writer);
        let _readers = [open(&config(image.path(), true)).unwrap(), open(&config(image.path(), true)).unwrap()];
        assert_eq!(refusal(image.path(), false), in_use);
    }
}
