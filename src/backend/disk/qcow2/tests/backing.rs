//! Images with backing files, which QEMU created.

use super::*;

/// The size of the last backing file, which ends within a cluster of every size, before the disk does.
const BASE_BYTES: usize = 40 * MIB as usize + 512 * 77;

/// Creates `top.qcow2` over `base`, whose format is `format`.
fn overlay(base: &Path, format: &str, top: &str, options: &str) -> PathBuf {
    let path = base.with_file_name(top);
    let mut words = vec!["create", "-q", "-f", "qcow2", "-F", format, "-b", base.to_str().unwrap()];
    words.extend(["-o", options, path.to_str().unwrap()]);
    let size = SIZE.to_string();
    words.push(&size);
    qemu_img(&words);
    path
}

/// Creates a raw file of random bytes, and returns its path and what a disk over it contains.
fn base(dir: &Path) -> (PathBuf, Vec<u8>) {
    let (path, mut content) = (dir.join("base.img"), bytes(3, BASE_BYTES));
    std::fs::write(&path, &content).unwrap();
    content.resize(SIZE as usize, 0);
    (path, content)
}

fn over(path: &Path, readonly: bool, backing: Option<Backing>) -> Result<Qcow2Disk, Refusal> {
    Qcow2Disk::open(File::options().read(true).write(!readonly).open(path).unwrap(), readonly, backing)
}

fn raw(path: &Path) -> Option<Backing> {
    Some(Backing::raw(File::open(path).unwrap()).unwrap())
}

fn qcow2(path: &Path, backing: Option<Backing>) -> Option<Backing> {
    Some(Backing::qcow2(File::open(path).unwrap(), backing).unwrap())
}

#[test]
fn an_image_over_a_backing_file_behaves_like_a_raw_disk() {
    let Some(dir) = dir() else { return };
    let (base, expected) = base(dir.path());
    for options in ["cluster_size=65536", "cluster_size=512,refcount_bits=64", "cluster_size=2M", "compat=0.10"] {
        let top = overlay(&base, "raw", "disk.qcow2", options);
        same_as(options, &top, || over(&top, false, raw(&base)).unwrap(), expected.clone());
        assert!(std::fs::read(&base).unwrap() == expected[..BASE_BYTES], "{options}: the backing file was modified");
    }
}

#[test]
fn an_image_over_a_chain_behaves_like_a_raw_disk() {
    let Some(dir) = dir() else { return };
    let (base, mut expected) = base(dir.path());
    let middle = overlay(&base, "raw", "middle.qcow2", "cluster_size=4096");
    let mut disk = Disk::new(over(&middle, false, raw(&base)).unwrap());
    disk.write(5 * MIB + 512, &bytes(4, 3 * MIB as usize));
    expected[5 * MIB as usize + 512..][..3 * MIB as usize].copy_from_slice(&bytes(4, 3 * MIB as usize));
    drop(disk);
    let top = overlay(&middle, "qcow2", "disk.qcow2", "cluster_size=65536");
    same_as("a chain", &top, || over(&top, false, qcow2(&middle, raw(&base))).unwrap(), expected);
}

#[test]
fn compressed_clusters_of_a_backing_file_are_read() {
    let Some(dir) = dir() else { return };
    let (base, expected) = base(dir.path());
    for compression in ["zlib", "zstd"] {
        let packed = dir.path().join("packed.qcow2");
        let options = format!("compression_type={compression}");
        let (from, to) = (base.to_str().unwrap(), packed.to_str().unwrap());
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, from, to]);
        let top = overlay(&packed, "qcow2", "disk.qcow2", "cluster_size=4096");
        same_as(compression, &top, || over(&top, false, qcow2(&packed, None)).unwrap(), expected.clone());
    }
}

#[test]
fn what_was_discarded_does_not_reappear_from_the_backing_file() {
    let Some(dir) = dir() else { return };
    let (base, expected) = base(dir.path());
    for options in ["cluster_size=65536", "compat=0.10"] {
        let top = overlay(&base, "raw", "disk.qcow2", options);
        let mut disk = Disk::new(over(&top, false, raw(&base)).unwrap());
        let (written, mib) = (bytes(9, MIB as usize), MIB as usize);
        disk.write(MIB, &written);
        disk.run(Operation::Discard { len_bytes: MIB }, MIB, &[]).unwrap();
        let now = disk.read(MIB, mib);
        // Version 2 cannot represent zeroes over a backing file, so nothing is discarded.
        assert!(now == if options == "compat=0.10" { written } else { vec![0; mib] }, "{options}");
        disk.run(Operation::WriteZeroes { len_bytes: MIB, unmap: true }, 2 * MIB, &[]).unwrap();
        disk.run(Operation::WriteZeroes { len_bytes: MIB, unmap: false }, 3 * MIB, &[]).unwrap();
        drop(disk);
        let content = contents(&top);
        assert!(content[2 * mib..4 * mib].iter().all(|byte| *byte == 0), "{options}");
        assert!(content[mib..2 * mib] == now && content[4 * mib..] == expected[4 * mib..], "{options}");
    }
}

/// Zeroing a large part of a disk takes no space for data.
#[test]
fn zeroes_over_a_backing_file_are_entries() {
    let Some(dir) = dir() else { return };
    let (base, _) = base(dir.path());
    let top = overlay(&base, "raw", "disk.qcow2", "cluster_size=65536");
    let mut disk = Disk::new(over(&top, false, raw(&base)).unwrap());
    disk.run(Operation::WriteZeroes { len_bytes: SIZE, unmap: false }, 0, &[]).unwrap();
    drop(disk);
    assert!(std::fs::metadata(&top).unwrap().len() < MIB);
    assert!(contents(&top).iter().all(|byte| *byte == 0));
}

#[test]
fn a_backing_file_is_used_exactly_if_the_image_has_one_and_it_is_given() {
    let Some(dir) = dir() else { return };
    let (base, _) = base(dir.path());
    let line = |path: &Path, backing| over(path, true, backing).unwrap_err().to_string();
    let top = overlay(&base, "raw", "top.qcow2", "cluster_size=65536");
    let option = |name: &Path| {
        format!("has a backing file, which is used only if you name it: add `,backing={}", name.display())
    };
    assert_eq!(line(&top, None), option(&base) + "`");
    // The format is part of the option if it does not follow from the name.
    let image = dir.path().join("image");
    std::fs::copy(overlay(&base, "raw", "middle.qcow2", "compat=0.10"), &image).unwrap();
    let above = overlay(&image, "qcow2", "above.qcow2", "compat=0.10");
    assert_eq!(line(&above, None), option(&image) + ",backing_format=qcow2`");
    assert!(Backing::qcow2(File::open(&image).unwrap(), None).is_err(), "it has a backing file, too");
    let alone = create(dir.path(), "cluster_size=65536");
    assert_eq!(line(&alone, raw(&base)), "has no backing file: remove `,backing=`");
}

/// Whoever made the image chose the name.
#[test]
fn the_name_of_a_backing_file_is_printed_safely() {
    let Some(dir) = dir() else { return };
    let (base, _) = base(dir.path());
    let path = overlay(&base, "raw", "top.qcow2", "cluster_size=65536");
    let good = std::fs::read(&path).unwrap();
    let name_at = u64::from_be_bytes(*good[8..].first_chunk().unwrap()) as usize;
    let line = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut image = good.clone();
        change(&mut image);
        std::fs::write(&path, &image).unwrap();
        let line = over(&path, true, None).unwrap_err().to_string();
        assert!(!line.contains(|c: char| c.is_control()) && line.len() < 4096, "{line:?}");
        line
    };
    assert!(line(&|image| image[name_at..][..4].copy_from_slice(b"\x1b]0;")).contains("\u{fffd}]0;"));
    line(&|image| image[name_at..][..4].copy_from_slice(b"\n\xff\0\r"));
    // The position, the length of the name, of the header, and of an extension.
    for range in [8..16, 16..20, 100..104, 116..120] {
        line(&|image| image[range.clone()].fill(0xff));
    }
}
