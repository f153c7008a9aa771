//! The hard links and the extended attributes of what is sent of a root file system.

use std::collections::HashMap;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{lgetxattr, llistxattr};
use rustix::io::Errno;

use super::{ATTRIBUTE_MAX_BYTES, PATH_MAX_BYTES, failure};

/// The maximum size of the names of a file's attributes, and of a value, in Linux (xattr(7)).
const KERNEL_MAX_BYTES: usize = 64 << 10;

/// What overlayfs says about its own directories.
const OVERLAYS: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// The files sent so far that have more than one name.
#[derive(Default)]
pub struct Links {
    sent: HashMap<(u64, u64), Vec<Vec<u8>>>,
}

/// What a name is to the file.
pub enum Name {
    /// The only one.
    Only,
    /// The first of several.
    First,
    /// Another one for the file at this path, which was sent.
    Another(Vec<Vec<u8>>),
}

impl Links {
    /// What the name at `path`, below the directory that is sent, is to the file with this `metadata`.
    pub fn name(&self, path: &Path, metadata: &Metadata) -> Name {
        match self.sent.get(&key(metadata)) {
            Some(first) => Name::Another(first.clone()),
            None if metadata.nlink() > 1 && path.as_os_str().len() <= PATH_MAX_BYTES => Name::First,
            None => Name::Only,
        }
    }

    /// Notes that a file with several names was sent.
    pub fn note(&mut self, path: &Path, metadata: &Metadata) {
        self.sent.insert(key(metadata), path.iter().map(|name| name.as_bytes().to_vec()).collect());
    }
}

fn key(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// The names and values of the extended attributes of the file or link at `path`, without overlayfs's own. Fails if one is too long to be
/// sent.
pub fn attributes(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; KERNEL_MAX_BYTES];
    let len = match llistxattr(path, &mut names) {
        Err(Errno::NOTSUP) => 0,
        len => len?,
    };
    let names = names.get(..len).unwrap_or_default().split(|byte| *byte == 0);
    let is_own = |name: &&[u8]| !name.is_empty() && !OVERLAYS.iter().any(|overlay| name.starts_with(overlay));
    let mut attributes = Vec::new();
    for name in names.filter(is_own) {
        let mut value = vec![0; KERNEL_MAX_BYTES];
        match lgetxattr(path, name, &mut value) {
            // It is gone, or for others.
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS) => continue,
            len => value.truncate(len?),
        }
        if value.len() > ATTRIBUTE_MAX_BYTES {
            let name = String::from_utf8_lossy(name);
            return Err(failure(format!("its extended attribute {name} has more than {ATTRIBUTE_MAX_BYTES} bytes")));
        }
        attributes.push((name.to_vec(), value));
    }
    Ok(attributes)
}
