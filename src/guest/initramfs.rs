//! Builds the initramfs from init, its configuration and the kernel modules: a cpio archive in memory.

use std::fs::File;
use std::io::Write;

use anyhow::{Context, Result};
use husk_protocol::{SPEC_PATH, Spec};

use super::INIT;
use crate::resources::modules::Module;
use crate::sys;

const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
/// Names and contents are aligned to this many bytes.
const ALIGNMENT: usize = 4;
/// The name of the last entry (buffer-format.rst).
const TRAILER: &str = "TRAILER!!!";

/// The path of a module in the initramfs.
pub fn module_path(module: &Module) -> String {
    format!("/modules/{}.ko", module.name)
}

/// Writes the archive to an unnamed file.
pub fn make(spec: &Spec, modules: &[Module]) -> Result<File> {
    let spec = spec.to_bytes().context("encode the configuration of init")?;
    let mut archive = Archive::default();
    archive.dir("dev");
    archive.file("init", INIT, 0o755);
    archive.file(SPEC_PATH.trim_start_matches('/'), &spec, 0o600);
    if !modules.is_empty() {
        archive.dir("modules");
    }
    for module in modules {
        archive.file(module_path(module).trim_start_matches('/'), &module.content, 0o600);
    }
    let mut file = sys::memory_file(c"husk-initramfs").context("create a file in memory")?;
    file.write_all(&archive.finish()).context("write the initrd")?;
    Ok(file)
}

/// A cpio archive in the `newc` format, which the kernel unpacks (buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn dir(&mut self, name: &str) {
        self.entry(name, &[], S_IFDIR | 0o755);
    }

    fn file(&mut self, name: &str, content: &[u8], permissions: u32) {
        self.entry(name, content, S_IFREG | permissions);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, &[], 0);
        self.bytes
    }

    fn entry(&mut self, name: &str, content: &[u8], mode: u32) {
        self.entries += 1;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let (owner, time, device, checksum) = (0, 0, 0, 0);
        // Files in an initramfs are far smaller than 4 GiB, or the machine would not have enough memory for it.
        let (content_len, name_len) = (content.len() as u32, name.len() as u32 + 1);
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.entries,
            mode,
            owner,
            owner,
            links,
            time,
            content_len,
            device,
            device,
            device,
            device,
            name_len,
            checksum,
        ] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use std::process::{Command, Stdio};

    use husk_protocol::{Overlay, Root, Start};

    use super::*;

    #[test]
    fn cpio_extracts_the_archive() {
        let spec = Spec {
            modules: Vec::new(),
            root: Root::Image { device: "/dev/vda".into(), overlay: Overlay::Memory },
            start: Start::Init { args: Vec::new(), hostname: "box".into() },
        };
        let module = Module { name: "a".into(), content: b"\x7fELF?".to_vec() };
        let file = make(&spec, &[module]).unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.len() < 1600 << 10, "{} bytes without modules are too many", bytes.len());

        let dir = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("cpio");
        cpio.args(["--extract", "--quiet"]).current_dir(&dir).stdin(Stdio::piped());
        let mut child = cpio.spawn().expect("scripts/deps test installs cpio");
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(child.wait().unwrap().success());
        let at = |name: &str| dir.path().join(name);
        assert_eq!(Spec::from_bytes(&std::fs::read(at("spec")).unwrap()), Ok(spec));
        assert_eq!(std::fs::read(at("modules/a.ko")).unwrap(), b"\x7fELF?");
        assert!(std::fs::read(at("init")).unwrap() == INIT);
        assert_eq!(std::fs::metadata(at("init")).unwrap().permissions().mode() & 0o777, 0o755);
        assert!(at("dev").is_dir());
    }
}
