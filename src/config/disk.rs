//! A disk's configuration, from `--disk` or a configuration file, opened by `resources/disk/`.

use std::ops::RangeInclusive;
use std::path::{Display, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Invalid, Rate};

/// Length of a disk's serial number (virtio 1.2 §5.2.6, VIRTIO_BLK_T_GET_ID).
pub const MAX_DISK_ID_BYTES: usize = 20;
/// The allowed block sizes, powers of two: those that all drivers support.
pub const DISK_BLOCK_BYTES: RangeInclusive<u32> = 512..=4096;

/// The maximum number of queues of a disk.
pub const MAX_DISK_QUEUES: u16 = 16;

/// Where a process finds its own open files (proc(5)).
pub const OWN_FILES: &str = "/proc/self/fd";

/// The name of a disk in messages: its path, unless the file has none.
pub fn disk_name(path: &Path) -> Display<'_> {
    if is_nameless(path) { Path::new("(temporary)").display() } else { path.display() }
}

fn is_nameless(path: &Path) -> bool {
    path.starts_with(OWN_FILES)
}

/// A disk image or block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Image file or block device.
    pub path: PathBuf,
    /// Whether it is read-only.
    #[serde(default)]
    pub readonly: bool,
    /// The serial number (at most 20 bytes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The format, unless it follows from the name: see [`DiskConfig::format`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The logical block size, 512 to 4096 bytes; by default 512 or that of the block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_bytes: Option<u32>,
    /// Whether the host caches the disk.
    #[serde(default, skip_serializing_if = "Cache::is_default")]
    pub cache: Cache,
    /// How the host's file is accessed.
    #[serde(default, skip_serializing_if = "Aio::is_default")]
    pub aio: Aio,
    /// The files that a qcow2 image reads where it has no data of its own: its backing file, the backing file of that one, and
    /// so on. They are read-only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<BackingConfig>,
    /// The number of queues, each with a thread of its own.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
    /// The guest's rate limits.
    #[serde(default, skip_serializing_if = "Rate::is_unlimited")]
    pub rate: Rate,
}

/// A backing file. What an image says about its backing file is never used, since whoever created the image could make husk
/// read any file of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingConfig {
    /// Image file, or a block device if it is raw.
    pub path: PathBuf,
    /// The format, unless it follows from the name, as for a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
}

impl DiskConfig {
    /// Whether the disk's file has no name, so that it is lost with the process that has it.
    pub fn is_nameless(&self) -> bool {
        is_nameless(&self.path)
    }

    /// The disk's path for other processes than the one with the ID `pid`, which has the disk open.
    pub fn path_in(&self, pid: u32) -> PathBuf {
        match self.path.strip_prefix(OWN_FILES) {
            Ok(number) => Path::new("/proc").join(pid.to_string()).join("fd").join(number),
            Err(_) => self.path.clone(),
        }
    }
}

impl BackingConfig {
    /// The configured format, as [`DiskConfig::format`].
    pub fn format(&self) -> Format {
        self.format.unwrap_or_else(|| Format::by_name(&self.path))
    }
}

/// The maximum number of a disk's backing files: each may be read for a request, and has tables in memory.
pub const MAX_BACKING_FILES: usize = 8;

/// The format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The plain content of the disk.
    Raw,
    /// QEMU's copy-on-write format: unused clusters take no space, and clusters may be compressed.
    Qcow2,
}

/// The host's cache of a disk, as QEMU's `cache=`. In both modes a flush makes writes durable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// The host's page cache.
    #[default]
    Writeback,
    /// None: the host's disk is accessed directly (O_DIRECT).
    None,
}

impl Cache {
    /// Whether it is the default.
    pub fn is_default(&self) -> bool {
        *self == Cache::default()
    }
}

/// How a raw image or block device is accessed, as QEMU's `aio=`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    /// With io_uring where the host allows it, except for requests that are faster without it.
    #[default]
    Auto,
    /// With io_uring, always.
    IoUring,
    /// With blocking system calls on the disk's thread.
    Threads,
}

impl Aio {
    /// Whether it is the default.
    pub fn is_default(&self) -> bool {
        *self == Aio::default()
    }
}

impl Format {
    fn by_name(path: &Path) -> Format {
        match path.extension() {
            Some(extension) if extension == "qcow2" => Format::Qcow2,
            _ => Format::Raw,
        }
    }
}

impl DiskConfig {
    /// A writable disk with defaults.
    pub fn of(path: PathBuf) -> DiskConfig {
        DiskConfig {
            path,
            readonly: false,
            id: None,
            format: None,
            block_bytes: None,
            cache: Cache::default(),
            aio: Aio::default(),
            backing: Vec::new(),
            queues: 1,
            rate: Rate::default(),
        }
    }

    /// The configured format; by default qcow2 if the name ends in `.qcow2`, and raw otherwise.
    ///
    /// The content is never probed: a guest could write the header of a crafted image to its raw disk, which would then
    /// be used at the next start.
    pub fn format(&self) -> Format {
        self.format.unwrap_or_else(|| Format::by_name(&self.path))
    }

    /// Validates the disk in position `number`, counted from one, except what concerns the other disks.
    pub(super) fn validate(&self, number: usize) -> Result<(), Invalid> {
        if self.path.as_os_str().is_empty() {
            return Err(Invalid::NoDiskPath(number));
        }
        if !self.rate.makes_sense() {
            return Err(Invalid::DiskRate(number));
        }
        if let Some(bytes) = self.block_bytes
            && !(bytes.is_power_of_two() && DISK_BLOCK_BYTES.contains(&bytes))
        {
            return Err(Invalid::DiskBlocks(number, bytes));
        }
        if !self.backing.is_empty() && self.format() == Format::Raw {
            return Err(Invalid::BackingOfRaw(number));
        }
        if self.backing.len() > MAX_BACKING_FILES {
            return Err(Invalid::TooManyBackingFiles(number));
        }
        if self.backing.iter().any(|backing| backing.path.as_os_str().is_empty()) {
            return Err(Invalid::NoBackingPath(number));
        }
        if !(1..=MAX_DISK_QUEUES).contains(&self.queues) {
            return Err(Invalid::DiskQueues(number, self.queues));
        }
        match &self.id {
            Some(id) if !is_id(id) => Err(Invalid::DiskId(id.clone())),
            _ => Ok(()),
        }
    }
}

fn one() -> u16 {
    1
}

fn is_one(count: &u16) -> bool {
    *count == 1
}

/// Whether a guest reads this serial number back unchanged.
fn is_id(id: &str) -> bool {
    id.bytes().all(|byte| byte.is_ascii_graphic()) && (1..=MAX_DISK_ID_BYTES).contains(&id.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> DiskConfig {
        DiskConfig::of("disk.img".into())
    }

    #[test]
    fn a_disk_limit_is_not_zero() {
        let with = |bytes_per_second, burst_bytes| {
            let rate = Rate { bytes_per_second, burst_bytes, ..Rate::default() };
            DiskConfig { rate, ..disk() }.validate(2)
        };
        assert_eq!((with(None, None), with(Some(1), Some(1))), (Ok(()), Ok(())));
        assert_eq!((with(Some(0), None), with(None, Some(1))), (Err(Invalid::DiskRate(2)), Err(Invalid::DiskRate(2))));
    }

    #[test]
    fn block_sizes_are_supported_by_drivers() {
        let with = |bytes| DiskConfig { block_bytes: Some(bytes), ..disk() }.validate(2);
        assert_eq!([512, 1024, 2048, 4096].map(with), [Ok(()), Ok(()), Ok(()), Ok(())]);
        for bytes in [0, 1, 256, 513, 3072, 8192, 1 << 31, u32::MAX] {
            assert_eq!(with(bytes), Err(Invalid::DiskBlocks(2, bytes)));
        }
    }

    #[test]
    fn only_qcow2_images_have_a_few_backing_files() {
        let with = |path: &str, backing: &[&str]| {
            let backing = backing.iter().map(|path| BackingConfig { path: path.into(), format: None }).collect();
            DiskConfig { backing, ..DiskConfig::of(path.into()) }.validate(2)
        };
        assert_eq!((with("a.qcow2", &["b.img"]), with("a.qcow2", &["b"; 8])), (Ok(()), Ok(())));
        assert_eq!(with("a.img", &["b.img"]), Err(Invalid::BackingOfRaw(2)));
        assert_eq!(with("a.qcow2", &["b"; 9]), Err(Invalid::TooManyBackingFiles(2)));
        assert_eq!(with("a.qcow2", &["b", ""]), Err(Invalid::NoBackingPath(2)));
    }

    #[test]
    fn a_disk_has_at_least_one_queue_and_not_too_many() {
        let with = |queues| DiskConfig { queues, ..disk() }.validate(2);
        assert_eq!([1, 16].map(with), [Ok(()), Ok(())]);
        assert_eq!([0, 17].map(with), [Err(Invalid::DiskQueues(2, 0)), Err(Invalid::DiskQueues(2, 17))]);
    }

    #[test]
    fn a_disk_without_a_name_is_not_called_by_a_number() {
        let disk = DiskConfig::of(format!("{OWN_FILES}/7").into());
        assert!(disk.is_nameless());
        assert_eq!(disk_name(&disk.path).to_string(), "(temporary)");
        assert_eq!(disk.path_in(12), Path::new("/proc/12/fd/7"));
        let named = DiskConfig::of("/proc/self/fdisk.img".into());
        assert!(!named.is_nameless());
        assert_eq!((disk_name(&named.path).to_string(), named.path_in(1)), ("/proc/self/fdisk.img".into(), named.path));
    }

    #[test]
    fn the_format_follows_from_the_name_by_default() {
        let format = |path: &str, format| DiskConfig { path: path.into(), format, ..disk() }.format();
        for name in ["disk.img", "qcow2", "a.qcow2.bak", "/dev/vda"] {
            assert_eq!(format(name, None), Format::Raw, "{name}");
        }
        assert_eq!(format("/a/b.qcow2", None), Format::Qcow2);
        assert_eq!(format("b.qcow2", Some(Format::Raw)), Format::Raw);
        assert_eq!(format("b.img", Some(Format::Qcow2)), Format::Qcow2);
    }
}
