//! The mark of a container of which its guest's kernel has killed processes because memory was short: a file in its directory, made
//! when the guest reports it, and before its process on the host ends.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, open, openat};

use super::state::Dir;

const FILE: &str = "oom";

/// Where the mark of a container is made, by a process whose root directory may be another one then.
#[derive(Debug)]
pub struct Mark(OwnedFd);

impl Mark {
    /// That of the container `dir`.
    pub fn of(dir: &Dir) -> Result<Mark> {
        let opened = open(dir.path(), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        opened.map(Mark).with_context(|| format!("open {}", dir.path().display()))
    }

    /// Marks the container.
    pub fn set(&self) -> Result<()> {
        // For reading: whoever is not root may not write to a file that is only readable.
        let flags = OFlags::CREATE | OFlags::RDONLY | OFlags::CLOEXEC;
        openat(&self.0, FILE, flags, Mode::RUSR).map(drop).context("note that memory was short")
    }
}

/// Whether the container `dir` is marked.
pub fn is_marked(dir: &Dir) -> bool {
    dir.path().join(FILE).exists()
}

/// Whether the file `name` of a container's directory is its mark.
pub fn is_mark(name: &CStr) -> bool {
    name.to_bytes() == FILE.as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::state::Root;

    #[test]
    fn a_container_is_marked_once_and_for_all() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = Root::new(Some(temporary.path().to_owned())).unwrap().create("a").unwrap();
        let mark = Mark::of(&dir).unwrap();
        assert!(!is_marked(&dir));
        mark.set().unwrap();
        mark.set().unwrap();
        assert!(is_marked(&dir));
        dir.remove().unwrap();
        assert!(mark.set().is_err());
    }
}
