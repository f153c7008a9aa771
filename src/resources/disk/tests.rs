//! Tests of opening disks. What they share with those of backing files and formats is here.

use std::os::unix::fs::PermissionsExt;

use super::*;

pub(super) fn image(len_bytes: u64) -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(len_bytes).unwrap();
    image
}

pub(super) fn config(path: &Path, readonly: bool) -> DiskConfig {
    DiskConfig { readonly, id: Some("blue".to_owned()), ..DiskConfig::of(path.to_owned()) }
}

pub(super) fn refusal(path: &Path, readonly: bool) -> String {
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
        assert_eq!(refusal(Path::new("/dev/null"), readonly), "disk /dev/null is neither a file nor a block device");
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
pub(super) fn open_once_free(path: &Path, readonly: bool) -> DiskFile {
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

#[test]
fn a_disk_that_is_given_twice_is_not_in_use_by_another_process() {
    let image = image(512);
    let line = open_all(&[config(image.path(), false), config(image.path(), true)]).unwrap_err().to_string();
    assert_eq!(line, format!("disk {} is given twice: remove one, or add `,ro` to both", image.path().display()));
    assert_eq!(open_all(&[config(image.path(), true), config(image.path(), true)]).unwrap().len(), 2);
}
