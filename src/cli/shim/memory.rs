//! Notices at once that processes of containers were killed because memory was short, by the marks of their directories.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};

use crate::oci::oom;
use crate::oci::state::Dir;

/// The directories that are watched. Its descriptor is readable when something has changed.
#[derive(Debug)]
pub struct Watch {
    inotify: OwnedFd,
    /// The IDs of containers by their watches.
    known: Mutex<HashMap<i32, String>>,
}

impl Watch {
    pub fn new() -> Result<Watch> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).context("inotify")?;
        Ok(Watch { inotify, known: Mutex::default() })
    }

    /// Watches the directory `dir` of the container `id`, until it is removed.
    pub fn add(&self, id: &str, dir: &Dir) -> Result<()> {
        // What is noticed before it is known would be lost.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = inotify::add_watch(&self.inotify, dir.path(), WatchFlags::CREATE | WatchFlags::ONLYDIR);
        known.insert(watch.with_context(|| format!("watch {}", dir.path().display()))?, id.to_owned());
        Ok(())
    }

    /// The containers that were marked since the last call.
    pub fn marked(&self) -> Vec<String> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let (mut reader, mut marked) = (Reader::new(&self.inotify, &mut buffer), Vec::new());
        while let Ok(event) = reader.next() {
            if event.events().contains(ReadFlags::IGNORED) {
                known.remove(&event.wd());
            } else if event.file_name().is_some_and(oom::is_mark) {
                marked.extend(known.get(&event.wd()).cloned());
            }
        }
        marked
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::oom::Mark;
    use crate::oci::state::Root;

    #[test]
    fn a_mark_is_noticed_once_until_its_directory_is_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let root = Root::new(Some(temporary.path().to_owned())).unwrap();
        let (watch, dirs) = (Watch::new().unwrap(), ["a", "b"].map(|id| root.create(id).unwrap()));
        for (id, dir) in ["a", "b"].iter().zip(&dirs) {
            watch.add(id, dir).unwrap();
        }
        std::fs::write(dirs[0].path().join("start"), "").unwrap();
        assert!(watch.marked().is_empty());
        Mark::of(&dirs[1]).unwrap().set().unwrap();
        assert_eq!(watch.marked(), ["b"]);
        Mark::of(&dirs[1]).unwrap().set().unwrap();
        assert!(watch.marked().is_empty());
        dirs.iter().for_each(|dir| dir.remove().unwrap());
        assert!(watch.marked().is_empty() && watch.known.lock().unwrap().is_empty());
        assert!(watch.add("a", &dirs[0]).is_err());
    }
}
