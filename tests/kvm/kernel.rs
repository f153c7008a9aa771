//! Kernel formats: unified kernel images, and unsupported kernel parameters.

use std::fs;
use std::path::{Path, PathBuf};

use crate::husk::{Ran, boot};
use crate::sample;
use husk_guests as guests;

/// A unified kernel image of a guest that prints its parameters; `None` with a visible message without gzip.
fn unified(dir: &Path, sections: &[(&str, &[u8])]) -> Option<PathBuf> {
    let payload = sample::packed(&fs::read(guests::LOADED).unwrap(), "gzip -n -9")?;
    let bzimage = sample::bzimage(&payload);
    let path = dir.join("guest.efi");
    fs::write(&path, sample::unified(&[sections, &[(".linux", &bzimage)]].concat())).unwrap();
    Some(path)
}

/// The guest's command line and initramfs.
fn given(ran: &Ran) -> (String, String) {
    let text = ran.expect(0);
    let line = |start: &str| text.lines().find_map(|line| line.strip_prefix(start)).unwrap_or_default().to_owned();
    (line("command line: "), line("initial RAM disk: "))
}

#[test]
fn a_unified_image_boots_with_its_own_initrd_and_command_line() {
    needs_kvm!();
    let dir = tempfile::tempdir().unwrap();
    let sections: [(&str, &[u8]); 2] = [(".cmdline", b"root=UUID=1 ro\n"), (".initrd", b"of the image")];
    let Some(image) = unified(dir.path(), &sections) else { return };
    let (cmdline, initrd) = given(&boot(image.to_str().unwrap(), "rw").run());
    assert!(cmdline.starts_with("console=ttyS0 ") && cmdline.ends_with(" root=UUID=1 ro rw"), "{cmdline}");
    assert!(!cmdline.contains("/dev/vda"), "{cmdline}");
    assert_eq!(initrd, "of the image");
}

#[test]
fn the_users_initrd_replaces_the_images() {
    needs_kvm!();
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = unified(dir.path(), &[(".initrd", b"of the image")]) else { return };
    let initrd = dir.path().join("initrd");
    fs::write(&initrd, "of the user").unwrap();
    let (_, given) = given(&boot(image.to_str().unwrap(), "").flag("--initrd", &initrd).run());
    assert_eq!(given, "of the user");
}

#[test]
fn a_truncated_image_is_reported_in_one_line() {
    needs_kvm!();
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = unified(dir.path(), &[(".initrd", b"of the image")]) else { return };
    let bytes = fs::read(&image).unwrap();
    fs::write(&image, &bytes[..bytes.len() - 1024]).unwrap();
    let ran = boot(image.to_str().unwrap(), "").run();
    assert!(ran.expect_line(1).contains("the unified kernel image is truncated: .linux is incomplete"));
}

#[test]
fn a_parameter_that_hides_devices_causes_a_warning() {
    needs_kvm!();
    for word in ["acpi=off", "noapic"] {
        let line = boot(guests::LOADED, word).run();
        line.expect(0);
        assert!(line.stderr.contains(&format!("the kernel parameter {word} hides")), "{}", line.stderr);
    }
    assert_eq!(boot(guests::LOADED, "acpi=force -- acpi=off").run().stderr, "");
}

#[test]
fn nesting_is_available_or_rejected_in_one_line() {
    needs_kvm!();
    let machine = tempfile::NamedTempFile::new().unwrap();
    fs::write(&machine, r#"{"nested": true}"#).unwrap();
    let ran = boot(guests::LOADED, "").flag("--config", machine.path()).run();
    if ran.code != Some(0) {
        assert!(ran.expect_line(1).contains("remove --nested"), "{}", ran.stderr);
    }
}
