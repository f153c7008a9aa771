//! Identifies a file given as an image: a disk with an operating system, a prepared root file system, or an archive for
//! the image store.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// The kind of a file, according to its first blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A disk: a partition table, or a file system that an operating system can write to.
    Disk,
    /// An EROFS image: a root file system without a process configuration.
    Root {
        /// The file system's UUID.
        uuid: [u8; 16],
    },
    /// Anything else, or no file at all.
    Other,
}

/// The signatures of disks, and their offsets.
const DISKS: [(u64, &[u8]); 4] = [
    (0x1fe, b"\x55\xaa"),    // a partition table, including the protective one of a GPT
    (0x438, b"\x53\xef"),    // ext2, ext3, ext4
    (0, b"XFSB"),            // XFS
    (0x1_0040, b"_BHRfS_M"), // Btrfs
];
const EROFS: (u64, &[u8]) = (0x400, b"\xe2\xe1\xf5\xe0");
const EROFS_UUID_AT: u64 = 0x430;

/// Identifies the file at `path`. A qcow2 disk is recognized only by its name, since a guest may write anything to a
/// raw one.
pub fn identify(path: &Path) -> Kind {
    let Ok(file) = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path) else { return Kind::Other };
    let Ok(kind) = file.metadata().map(|metadata| metadata.file_type()) else { return Kind::Other };
    if kind.is_block_device() {
        return Kind::Disk;
    }
    if !kind.is_file() {
        return Kind::Other;
    }
    let has = |(at, bytes): (u64, &[u8])| {
        let mut found = vec![0; bytes.len()];
        file.read_exact_at(&mut found, at).is_ok() && found == bytes
    };
    let is_qcow2 = path.extension().is_some_and(|extension| extension == "qcow2");
    match () {
        () if has(EROFS) => {
            let mut uuid = [0; 16];
            file.read_exact_at(&mut uuid, EROFS_UUID_AT).map_or(Kind::Other, |()| Kind::Root { uuid })
        }
        () if is_qcow2 || DISKS.into_iter().any(has) => Kind::Disk,
        () => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_identified_by_its_first_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let of = |at: usize, magic: &[u8]| {
            let mut bytes = vec![0; 128 << 10];
            bytes[at..at + magic.len()].copy_from_slice(magic);
            std::fs::write(&path, bytes).unwrap();
            identify(&path)
        };
        for (at, magic) in DISKS {
            assert_eq!(of(at as usize, magic), Kind::Disk);
        }
        assert_eq!(of(EROFS.0 as usize, EROFS.1), Kind::Root { uuid: [0; 16] });
        assert_eq!(of(257, b"ustar"), Kind::Other);
        std::fs::write(&path, "short").unwrap();
        assert_eq!(identify(&path), Kind::Other);
        assert_eq!(identify(dir.path()), Kind::Other);
        assert_eq!(identify(&dir.path().join("none")), Kind::Other);
    }
}
