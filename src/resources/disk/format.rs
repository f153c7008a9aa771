//! Detects the format of a disk image, only to warn of one that was not configured.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::config::disk_name;

/// Warns if a file that is used as raw by default looks like another format. It is only a warning: a guest may have
/// written those bytes. `option` is the one that sets the format.
pub(super) fn warn_of_format(file: &File, path: &Path, option: &str) {
    let name = disk_name(path);
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
    use std::process::Command;

    use super::super::tests::config;
    use super::super::{DiskImage, open};
    use super::*;
    use crate::config::{DiskConfig, Format};
    use crate::test_log::logged;

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
}
