//! Opens and locks the backing files of qcow2 disks.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, anyhow, bail};

use super::format::warn_of_format;
use super::{is_block_device, lock};
use crate::backend::disk::{Backing, Refusal};
use crate::config::{BackingConfig, Format, disk_name};

/// Opens the backing files of a qcow2 image for reading, the last one first, and locks them: others can read them, and nobody
/// can write to them.
pub(super) fn open(chain: &[BackingConfig]) -> Result<Option<Backing>> {
    let mut below = None;
    for config in chain.iter().rev() {
        let (path, name) = (&config.path, disk_name(&config.path));
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

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::super::tests::{config, image, open_once_free, refusal};
    use super::*;
    use crate::config::DiskConfig;
    use crate::resources::disk::open as open_disk;

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
            open_disk(&DiskConfig { backing, ..config(top, false) }).map_err(|error| format!("{error:#}"))
        };
        let _machines = [over(&first, &[base.path()]).unwrap(), over(&second, &[base.path()]).unwrap()];
        let in_use = format!("disk {} is in use by another process", base.path().display());
        assert_eq!(refusal(base.path(), false), in_use);
        assert!(open_disk(&config(base.path(), true)).is_ok());
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
        let line = open_disk(&DiskConfig { backing: vec![backing], ..config(&top, true) }).unwrap_err().to_string();
        assert!(line.contains("is not a qcow2 image (add `,backing_format=raw` after it"), "{line}");
    }

    #[test]
    fn a_chain_of_backing_files_is_named_from_the_first_to_the_last() {
        let (base, dir) = (image(1 << 20), tempfile::tempdir().unwrap());
        let (middle, top) = (dir.path().join("middle.qcow2"), dir.path().join("top.qcow2"));
        let (Some(middle), Some(top)) = (overlay(base.path(), &middle), overlay(&middle, &top)) else { return };
        let line = |chain: &[&Path]| {
            let backing = chain.iter().map(|path| BackingConfig { path: path.to_path_buf(), format: None }).collect();
            let opened = open_disk(&DiskConfig { backing, ..config(&top, true) });
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
}
