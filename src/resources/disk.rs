//! Opens and locks disks: raw files, qcow2 files and block devices.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::fs::{self, AtFlags, OFlags, StatxFlags};

use crate::backend::disk::{Alignment, Backing, PlainDisk, Qcow2Disk, Refusal, UringDisk};
use crate::config::{Aio, BackingConfig, Cache, DISK_BLOCK_BYTES, DiskConfig, Format, Rate};
use crate::sys;

/// The physical block size of a file: that of the page cache and of most disks.
const PHYSICAL_BLOCK_BYTES: u32 = 4096;
/// The largest physical block size that is passed on.
const PHYSICAL_BLOCK_BYTES_MAX: u32 = 1 << 20;
/// linux/magic.h.
const TMPFS_MAGIC: fs::FsWord = 0x0102_1994;

/// An open, locked disk: no other process writes to it, and none reads it while it is open for writing.
#[derive(Debug)]
pub struct DiskFile {
    /// The image that requests operate on. It holds the lock.
    pub image: DiskImage,
    /// The path, for messages.
    pub path: PathBuf,
    /// The size, a nonzero multiple of 512.
    pub capacity_bytes: u64,
    /// Whether it is read-only.
    pub readonly: bool,
    /// The logical block size; the capacity is a multiple of it.
    pub block_bytes: u32,
    /// The physical block size, at least the logical one.
    pub physical_block_bytes: u32,
    /// The serial number.
    pub id: Option<String>,
    /// How a raw image is accessed.
    pub aio: Aio,
    /// The number of queues: 1 for qcow2.
    pub queues: u16,
    /// The guest's rate limits.
    pub rate: Rate,
}

/// A disk image, by format.
#[derive(Debug)]
pub enum DiskImage {
    /// The content of the disk.
    Raw(PlainDisk),
    /// A qcow2 image. The tables read so far are valid.
    Qcow2(Box<Qcow2Disk>),
}

/// Opens the disk that `config` describes, and locks it: shared if it is read-only, exclusively if not (flock(2)).
///
/// Fails with one line that names the disk and what is wrong with it.
pub fn open(config: &DiskConfig) -> Result<DiskFile> {
    let DiskConfig { path, readonly, id, cache, aio, queues, backing, rate, .. } = config;
    let name = path.display();
    // Without O_NONBLOCK, opening a FIFO blocks until the other end is opened.
    let opened = File::options().read(true).write(!readonly).custom_flags(libc::O_NONBLOCK).open(path);
    let file = match opened {
        Err(error) if error.kind() == ErrorKind::IsADirectory => bail!("disk {name} is a directory"),
        Err(error) if !readonly && matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
            return Err(
                anyhow!(error).context(format!("open disk {name} for writing (add `,ro` to open it read-only)"))
            );
        }
        opened => opened.with_context(|| format!("open disk {name}"))?,
    };
    let block_device = is_block_device(&file, path)?;
    clear_nonblock(&file).with_context(|| format!("open disk {name}"))?;
    lock(&file, path, *readonly)?;
    let direct = match cache {
        Cache::Writeback => None,
        Cache::None => Some(direct_alignment(&file, block_device).with_context(|| format!("disk {name}"))?),
    };
    let (block_bytes, physical_block_bytes) = block_sizes(config, &file, block_device, direct)?;
    if config.format.is_none() && config.format() == Format::Raw {
        warn_of_format(&file, path, "format");
    }
    let (image, capacity_bytes) = match config.format() {
        Format::Raw => {
            // The metadata of a block device does not contain its size.
            let capacity_bytes = (&file).seek(SeekFrom::End(0)).with_context(|| format!("size of disk {name}"))?;
            let image = match direct {
                None => PlainDisk::new(file, block_device),
                Some(alignment) => {
                    bypass_cache(&file).with_context(|| format!("disk {name}"))?;
                    PlainDisk::direct(file, block_device, alignment)
                }
            };
            if *aio == Aio::IoUring {
                let refused = || format!("disk {name} cannot use io_uring on this host: remove aio=io_uring");
                UringDisk::check(&image).with_context(refused)?;
            }
            (DiskImage::Raw(image), capacity_bytes)
        }
        Format::Qcow2 => {
            ensure!(*aio == Aio::Auto, "disk {name} is a qcow2 image, which has no aio=: remove it");
            ensure!(*queues == 1, "disk {name} is a qcow2 image, which has a single queue: remove num_queues=");
            ensure!(direct.is_none(), "disk {name} is a qcow2 image, which needs the page cache: remove cache=none");
            ensure!(!block_device, "disk {name} is a block device, and qcow2 needs a file that can grow");
            let backing = open_backing(backing)?;
            let image = Qcow2Disk::open(file, *readonly, backing)
                .map_err(|refusal| anyhow!("disk {name} {}", refusal.of(path)))?;
            let capacity_bytes = image.capacity_bytes();
            (DiskImage::Qcow2(Box::new(image)), capacity_bytes)
        }
    };
    ensure!(capacity_bytes > 0, "disk {name} is empty");
    ensure!(
        capacity_bytes.is_multiple_of(block_bytes.into()),
        "disk {name} has {capacity_bytes} bytes, which is not a multiple of {block_bytes}"
    );
    let (path, readonly, id) = (path.clone(), *readonly, id.clone());
    let (aio, queues, rate) = (*aio, *queues, *rate);
    Ok(DiskFile { image, path, capacity_bytes, readonly, block_bytes, physical_block_bytes, id, aio, queues, rate })
}

/// The logical and physical block sizes: as configured, or those of the block device; for a file 512 bytes, or what
/// direct I/O demands, and those of a page.
fn block_sizes(config: &DiskConfig, file: &File, block_device: bool, direct: Option<Alignment>) -> Result<(u32, u32)> {
    let name = config.path.display();
    let (logical, physical) = if block_device {
        let logical = sys::disk::block_bytes(file);
        let sizes = logical.and_then(|logical| Ok((logical, sys::disk::physical_block_bytes(file)?)));
        sizes.with_context(|| format!("block size of disk {name}"))?
    } else {
        (direct.map_or(0, |direct| direct.offset_bytes), PHYSICAL_BLOCK_BYTES)
    };
    // The guest must not use smaller blocks than the device, nor larger ones than drivers support.
    let default_bytes = logical.clamp(*DISK_BLOCK_BYTES.start(), *DISK_BLOCK_BYTES.end());
    let block_bytes = config.block_bytes.unwrap_or(default_bytes);
    if let Some(direct) = direct {
        let least = direct.offset_bytes;
        ensure!(block_bytes >= least, "disk {name} needs blocks of {least} bytes without a cache: remove cache=none");
    }
    Ok((block_bytes, physical.clamp(block_bytes, PHYSICAL_BLOCK_BYTES_MAX)))
}

/// What direct I/O on `file` demands (STATX_DIOALIGN), if its file system supports that.
fn direct_alignment(file: &File, block_device: bool) -> Result<Alignment> {
    let refusal = "is on a file system without direct I/O, such as tmpfs: remove cache=none";
    // tmpfs accepts O_DIRECT since Linux 6.6, but is nothing but a cache.
    ensure!(block_device || fs::fstatfs(file)?.f_type != TMPFS_MAGIC, refusal);
    let stat = fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        let (memory_bytes, offset_bytes) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        ensure!(memory_bytes.is_power_of_two() && offset_bytes.is_power_of_two(), refusal);
        return Ok(Alignment { memory_bytes, offset_bytes });
    }
    // Not reported before Linux 6.1, and not by all file systems.
    let block_bytes = if block_device { sys::disk::block_bytes(file)? } else { PHYSICAL_BLOCK_BYTES };
    Ok(Alignment { memory_bytes: block_bytes, offset_bytes: block_bytes })
}

/// Turns on O_DIRECT, after the file's contents have been looked at.
fn bypass_cache(file: &File) -> Result<()> {
    let set = || fs::fcntl_setfl(file, fs::fcntl_getfl(file)? | OFlags::DIRECT);
    set().context("cannot be accessed directly: remove cache=none")
}

/// Opens the backing files of a qcow2 image for reading, the last one first, and locks them: others can read them, and nobody
/// can write to them.
fn open_backing(chain: &[BackingConfig]) -> Result<Option<Backing>> {
    let mut below = None;
    for config in chain.iter().rev() {
        let (path, name) = (&config.path, config.path.display());
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.with_context(|| format!("open backing file {name}"))?;
        let block_device = is_block_device(&file, path)?;
        lock(&file, path, true)?;
        if config.format.is_none() && config.format() == Format::Raw {
            warn_of_format(&file, path, "backing_format");
        }
        below = Some(match (config.format(), below) {
            (Format::Raw, None) => Backing::raw(file).with_context(|| format!("open backing file {name}"))?,
            (Format::Raw, Some(_)) => {
                bail!("backing file {name} is raw and has none itself: remove the `backing=` after it")
            }
            (Format::Qcow2, _) if block_device => {
                bail!("backing file {name} is a block device, and a qcow2 backing file must be a regular file")
            }
            (Format::Qcow2, below) => Backing::qcow2(file, below).map_err(|refusal| match refusal {
                Refusal::NotQcow2 => {
                    anyhow!(
                        "backing file {name} is not a qcow2 image (add `,backing_format=raw` after it if it is raw)"
                    )
                }
                refusal => anyhow!("backing file {name} {}", refusal.of(path)),
            })?,
        });
    }
    Ok(below)
}

/// Clears O_NONBLOCK, with which io_uring fails requests that would block.
fn clear_nonblock(file: &File) -> Result<()> {
    Ok(fs::fcntl_setfl(file, fs::fcntl_getfl(file)? - OFlags::NONBLOCK)?)
}

/// Whether `file` is a block device. Fails if it is no disk.
fn is_block_device(file: &File, path: &Path) -> Result<bool> {
    let name = path.display();
    let kind = file.metadata().with_context(|| format!("open disk {name}"))?.file_type();
    ensure!(!kind.is_dir(), "disk {name} is a directory");
    ensure!(kind.is_block_device() || kind.is_file(), "disk {name} is neither a file nor a block device");
    Ok(kind.is_block_device())
}

fn lock(file: &File, path: &Path, readonly: bool) -> Result<()> {
    let name = path.display();
    match if readonly { file.try_lock_shared() } else { file.try_lock() } {
        Err(TryLockError::WouldBlock) => bail!("disk {name} is in use by another process"),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("lock disk {name}")),
        Ok(()) => Ok(()),
    }
}

/// Warns if a file that is used as raw by default looks like another format. It is only a warning: a guest may have
/// written those bytes. `option` is the one that sets the format.
fn warn_of_format(file: &File, path: &Path, option: &str) {
    let name = path.display();
    match format_by_contents(file) {
        Some("qcow2") => log::warn!(
            "disk {name} looks like a qcow2 image but is used as raw: add `,{option}=qcow2` if it is one, or `,{option}=raw`"
        ),
        Some(format) => log::warn!(
            "disk {name} looks like {format} but is used as raw: convert it with `qemu-img convert -O qcow2 {name} \
             NEW.qcow2`, or add `,{option}=raw`"
        ),
        None => {}
    }
}

/// The image format detected by signature in `file`; `None` for raw or unreadable files.
fn format_by_contents(file: &File) -> Option<&'static str> {
    let mut start = [0; 512];
    let len = file.read_at(&mut start, 0).unwrap_or(0);
    let start = &start[..len];
    let begins = |mark: &[u8], at: usize| start.get(at..).is_some_and(|bytes| bytes.starts_with(mark));
    // A fixed-size VHD has its only signature at the end.
    let ends_as_vhd = || {
        let mut end = [0; 8];
        let at = file.metadata().ok()?.len().checked_sub(512)?;
        file.read_exact_at(&mut end, at).ok()?;
        (&end == b"conectix").then_some("VHD")
    };
    match () {
        () if begins(b"QFI\xfb", 0) => Some("qcow2"),
        () if begins(b"KDMV", 0) || begins(b"COWD", 0) || begins(b"# Disk DescriptorFile", 0) => Some("VMDK"),
        () if begins(&[0x7f, 0x10, 0xda, 0xbe], 64) => Some("VDI"),
        () if begins(b"vhdxfile", 0) => Some("VHDX"),
        () if begins(b"conectix", 0) => Some("VHD"),
        () if begins(b"QED\0", 0) => Some("QED"),
        () => ends_as_vhd(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;
    use crate::test_log::logged;

    fn image(len_bytes: u64) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(len_bytes).unwrap();
        image
    }

    fn config(path: &Path, readonly: bool) -> DiskConfig {
        DiskConfig { readonly, id: Some("blue".to_owned()), ..DiskConfig::of(path.to_owned()) }
    }

    fn refusal(path: &Path, readonly: bool) -> String {
        format!("{:#}", open(&config(path, readonly)).unwrap_err())
    }

    #[test]
    fn a_disk_has_the_size_of_its_image_beyond_two_tib_too() {
        let image = image((3 << 40) + 512);
        let disk = open(&config(image.path(), false)).unwrap();
        assert_eq!((disk.capacity_bytes, disk.readonly), ((3 << 40) + 512, false));
        assert!(matches!(disk.image, DiskImage::Raw(_)));
        assert_eq!(disk.id.as_deref(), Some("blue"));
    }

    #[test]
    fn bad_disks_are_rejected_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("none.img");
        assert_eq!(
            refusal(&missing, false),
            format!("open disk {}: No such file or directory (os error 2)", missing.display())
        );
        for readonly in [false, true] {
            assert_eq!(refusal(dir.path(), readonly), format!("disk {} is a directory", dir.path().display()));
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
        // Root bypasses file permissions, but not for this file.
        let root = File::options().write(true).open(image.path()).is_ok();
        let path = if root { Path::new("/sys/kernel/uevent_seqnum") } else { image.path() };
        assert!(refusal(path, false).contains("(add `,ro` to open it read-only): "), "{}", refusal(path, false));
        assert!(open(&config(image.path(), true)).is_ok());
    }

    /// Opens a disk that was just closed: a process forked by another test holds the lock until it calls exec.
    fn open_once_free(path: &Path, readonly: bool) -> DiskFile {
        let mut opened = open(&config(path, readonly));
        while opened.as_ref().is_err_and(|error| error.to_string().ends_with(" is in use by another process")) {
            std::thread::yield_now();
            opened = open(&config(path, readonly));
        }
        opened.unwrap()
    }

    #[test]
    fn a_disk_in_use_is_rejected_unless_both_are_read_only() {
        let image = image(512);
        let in_use = format!("disk {} is in use by another process", image.path().display());
        let writer = open(&config(image.path(), false)).unwrap();
        assert_eq!([refusal(image.path(), false), refusal(image.path(), true)], [in_use.clone(), in_use.clone()]);
        drop(writer);
        let _readers = [open_once_free(image.path(), true), open_once_free(image.path(), true)];
        assert_eq!(refusal(image.path(), false), in_use);
    }

    /// Creates a qcow2 image over `base`, or returns `None` with a visible message.
    fn overlay(base: &Path, top: &Path) -> Option<PathBuf> {
        let (base, top) = (base.to_str().unwrap(), top.to_str().unwrap());
        let words = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, top, "1M"];
        match Command::new("qemu-img").args(words).status() {
            Ok(status) => assert!(status.success(), "{words:?}"),
            Err(_) => eprintln!("SKIPPED: needs qemu-img (Debian package qemu-utils)"),
        }
        Path::new(top).exists().then(|| top.into())
    }

    #[test]
    fn a_backing_file_is_shared_by_readers_and_not_opened_for_writing() {
        let (base, dir) = (image(1 << 20), tempfile::tempdir().unwrap());
        let Some(first) = overlay(base.path(), &dir.path().join("first.qcow2")) else { return };
        let Some(second) = overlay(base.path(), &dir.path().join("second.qcow2")) else { return };
        let over = |top: &Path, chain: &[&Path]| {
            let backing = chain.iter().map(|path| BackingConfig { path: path.to_path_buf(), format: None }).collect();
            open(&DiskConfig { backing, ..config(top, false) }).map_err(|error| format!("{error:#}"))
        };
        let _machines = [over(&first, &[base.path()]).unwrap(), over(&second, &[base.path()]).unwrap()];
        let in_use = format!("disk {} is in use by another process", base.path().display());
        assert_eq!(refusal(base.path(), false), in_use);
        assert!(open(&config(base.path(), true)).is_ok());
        drop(_machines);
        let _writer = open_once_free(base.path(), false);
        assert_eq!(over(&first, &[base.path()]).unwrap_err(), in_use);
    }

    #[test]
    fn a_backing_file_is_named_relative_to_its_image_and_with_its_own_options() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        File::create(at("base.img")).unwrap().set_len(1 << 20).unwrap();
        let Some(top) = overlay(Path::new("base.img"), &at("top.qcow2")) else { return };
        let line = refusal(&top, true);
        assert!(line.ends_with(&format!("add `,backing={}`", at("base.img").display())), "{line}");
        let backing = BackingConfig { path: at("base.img"), format: Some(Format::Qcow2) };
        let line = open(&DiskConfig { backing: vec![backing], ..config(&top, true) }).unwrap_err().to_string();
        assert!(line.contains("is not a qcow2 image (add `,backing_format=raw` after it"), "{line}");
    }

    #[test]
    fn a_chain_of_backing_files_is_named_from_the_first_to_the_last() {
        let (base, dir) = (image(1 << 20), tempfile::tempdir().unwrap());
        let (middle, top) = (dir.path().join("middle.qcow2"), dir.path().join("top.qcow2"));
        let (Some(middle), Some(top)) = (overlay(base.path(), &middle), overlay(&middle, &top)) else { return };
        let line = |chain: &[&Path]| {
            let backing = chain.iter().map(|path| BackingConfig { path: path.to_path_buf(), format: None }).collect();
            let opened = open(&DiskConfig { backing, ..config(&top, true) });
            opened.map(|disk| disk.capacity_bytes.to_string()).unwrap_or_else(|error| format!("{error:#}"))
        };
        let (base, base_name, middle_name) = (base.path(), base.path().display(), middle.display());
        assert_eq!(line(&[&middle, base]), "1048576");
        let named = |name: &dyn std::fmt::Display| {
            format!("has a backing file, which is used only if you name it: add `,backing={name}")
        };
        assert!(line(&[]).contains(&named(&middle_name)), "{}", line(&[]));
        assert!(line(&[&middle]).starts_with(&format!("backing file {middle_name} {}", named(&base_name))));
        assert_eq!(
            line(&[&middle, base, base]),
            format!("backing file {base_name} is raw and has none itself: remove the `backing=` after it")
        );
        assert!(line(&[Path::new("/none")]).starts_with("open backing file /none: No such file"));
        assert!(line(&[dir.path()]).ends_with("is a directory"));
    }

    #[test]
    fn the_block_size_is_configurable_and_divides_the_capacity() {
        let image = image(1 << 20);
        let with = |block_bytes| open(&DiskConfig { block_bytes, ..config(image.path(), false) });
        assert_eq!(with(None).unwrap().block_bytes, 512);
        assert_eq!(with(Some(4096)).unwrap().block_bytes, 4096);
        image.as_file().set_len((1 << 20) + 512).unwrap();
        let line = format!("{:#}", with(Some(4096)).unwrap_err());
        assert!(line.ends_with(" has 1049088 bytes, which is not a multiple of 4096"), "{line}");
    }

    /// Requires `qemu-img` to create these formats, some of which have a signature only at the end.
    #[test]
    fn a_disk_that_looks_like_another_format_is_raw_with_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        let formats = [
            ("qcow2", "", "looks like a qcow2 image but is used as raw: add `,format=qcow2`"),
            ("vmdk", "", "looks like VMDK"),
            ("vdi", "", "looks like VDI"),
            ("vhdx", "", "looks like VHDX"),
            ("vpc", "subformat=dynamic", "looks like VHD"),
            ("vpc", "subformat=fixed", "looks like VHD"),
            ("raw", "", ""),
        ];
        for (index, (format, options, warning)) in formats.into_iter().enumerate() {
            let path = dir.path().join(format!("{index}.img"));
            let name = path.to_str().unwrap();
            let mut words = vec!["create", "-q", "-f", format, name, "4M"];
            if !options.is_empty() {
                words.extend(["-o", options]);
            }
            match Command::new("qemu-img").args(&words).status() {
                Ok(status) => assert!(status.success(), "{words:?}"),
                Err(_) => return eprintln!("SKIPPED: needs qemu-img (Debian package qemu-utils)"),
            }
            let file = File::options().write(true).open(&path).unwrap();
            file.set_len(file.metadata().unwrap().len().next_multiple_of(512)).unwrap();
            let warnings = |format| {
                let disk = open(&DiskConfig { format, ..config(&path, false) }).unwrap();
                assert!(matches!(disk.image, DiskImage::Raw(_)));
                logged(&format!("disk {name} "))
            };
            assert_eq!(warnings(Some(Format::Raw)), [""; 0], "the format was given");
            let lines = warnings(None);
            assert_eq!(lines.len(), usize::from(!warning.is_empty()), "{lines:?}");
            assert!(lines.iter().all(|line| line.contains(warning)), "{lines:?}");
        }
    }

    #[test]
    fn a_disk_that_needs_the_page_cache_refuses_to_do_without() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(4096).unwrap();
        let refused = |disk: DiskConfig| format!("{:#}", open(&disk).unwrap_err());
        let uncached = |path: &Path| DiskConfig { cache: Cache::None, ..config(path, false) };
        assert!(refused(uncached(&path)).ends_with("such as tmpfs: remove cache=none"));
        let qcow2 = |disk: DiskConfig| refused(DiskConfig { format: Some(Format::Qcow2), ..disk });
        let name = image(4096);
        assert!(qcow2(DiskConfig { aio: Aio::Threads, ..config(name.path(), false) }).ends_with("remove it"));
        assert!(qcow2(DiskConfig { queues: 2, ..config(name.path(), false) }).ends_with("remove num_queues="));
        match open(&uncached(name.path())) {
            Ok(disk) => {
                let DiskImage::Raw(raw) = &disk.image else { panic!("{disk:?}") };
                assert!(raw.is_direct() && disk.block_bytes >= 512 && disk.physical_block_bytes == 4096);
                drop(disk);
                assert!(qcow2(uncached(name.path())).ends_with("remove cache=none"));
            }
            Err(error) => eprintln!("SKIPPED: no direct access to temporary files here: {error:#}"),
        }
    }
}
