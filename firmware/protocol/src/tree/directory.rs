//! An open directory. All operations in it take a single name and follow no links, so they cannot be redirected by
//! concurrent changes of its parents.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::{about, failure};

/// The directory, and its path for messages.
pub struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

/// It need not be readable.
const FLAGS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Directory {
    /// Opens a directory given by the user, following links.
    pub fn open(path: &Path) -> io::Result<Directory> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let fd = fs::openat(CWD, path, FLAGS, Mode::empty()).map_err(|error| about("open", path, &error.into()))?;
        Ok(Directory { fd, path: path.to_owned() })
    }

    /// The path of `name` in it.
    pub fn path_of(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    fn named<T>(&self, action: &str, name: &OsStr, done: Result<T, Errno>) -> io::Result<T> {
        done.map_err(|error| about(action, &self.path_of(name), &error.into()))
    }

    /// Creates a directory, or opens an existing one. Returns it, and whether it is new.
    pub fn make_dir(&self, name: &OsStr, mode: u32) -> io::Result<(Directory, bool)> {
        let made = fs::mkdirat(&self.fd, name, Mode::from_raw_mode(mode));
        let is_new = made.is_ok();
        if made != Err(Errno::EXIST) {
            self.named("create", name, made)?;
        }
        match self.enter(name) {
            Err(Errno::NOTDIR | Errno::LOOP) => self.named("create", name, Err(Errno::EXIST)),
            entered => Ok((self.named("open", name, entered)?, is_new)),
        }
    }

    fn enter(&self, name: &OsStr) -> Result<Directory, Errno> {
        let fd = fs::openat(&self.fd, name, FLAGS | OFlags::NOFOLLOW, Mode::empty())?;
        Ok(Directory { fd, path: self.path_of(name) })
    }

    /// Creates a file, replacing a file or a link. Returns it, and the status of a replaced file.
    pub fn make_file(&self, name: &OsStr) -> io::Result<(File, Option<Stat>)> {
        let previous = self.clear(name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(self.named("create", name, made)?);
        Ok((file, previous.filter(|found| FileType::from_raw_mode(found.st_mode).is_file())))
    }

    /// Creates a symbolic link, replacing a file or a link.
    pub fn make_link(&self, name: &OsStr, target: &[u8]) -> io::Result<()> {
        self.clear(name)?;
        self.named("create", name, fs::symlinkat(OsStr::from_bytes(target), &self.fd, name))
    }

    /// Creates a hard link to the file at `names`, relative to `root`, replacing a file or a link.
    pub fn make_same(&self, name: &OsStr, root: &Directory, names: &[Vec<u8>]) -> io::Result<()> {
        let Some((file, dirs)) = names.split_last() else {
            return Err(failure("the sender sent a hard link to nothing"));
        };
        let mut inner = None;
        for dir in dirs {
            let from: &Directory = inner.as_ref().unwrap_or(root);
            let dir = OsStr::from_bytes(dir);
            inner = Some(from.named("link to", dir, from.enter(dir))?);
        }
        let (from, file) = (inner.as_ref().unwrap_or(root), OsStr::from_bytes(file));
        let found = from.named("link to", file, fs::statat(&from.fd, file, AtFlags::SYMLINK_NOFOLLOW))?;
        if FileType::from_raw_mode(found.st_mode).is_dir() {
            return Err(failure(format!("link to {}: not a regular file", from.path_of(file).display())));
        }
        self.clear(name)?;
        self.named("create", name, fs::linkat(&from.fd, file, &self.fd, name, AtFlags::empty()))
    }

    /// Changes the owner of `name`, which may be a link.
    pub fn own(&self, name: &OsStr, uid: u32, gid: u32) -> io::Result<()> {
        let (uid, gid) = (fs::Uid::from_raw(uid), fs::Gid::from_raw(gid));
        let done = fs::chownat(&self.fd, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW);
        self.named("change the owner of", name, done)
    }

    /// The directory as a file, whose owner, mode and times can be changed.
    pub fn as_file(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = fs::openat(&self.fd, ".", flags, Mode::empty());
        opened.map(File::from).map_err(|error| about("open", &self.path, &error.into()))
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes an existing file or link, but nothing else. Returns its status.
    fn clear(&self, name: &OsStr) -> io::Result<Option<Stat>> {
        let found = match fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(None),
            found => self.named("replace", name, found)?,
        };
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile | FileType::Symlink => {}
            FileType::Directory => return self.named("replace", name, Err(Errno::ISDIR)),
            _ => {
                return Err(failure(format!(
                    "replace {}: it is a device, pipe or socket",
                    self.path_of(name).display()
                )));
            }
        }
        self.named("replace", name, fs::unlinkat(&self.fd, name, AtFlags::empty()))?;
        Ok(Some(found))
    }
}

/// Copies owner and permissions of the replaced file, as far as permitted.
pub fn take_after(file: &File, previous: &Stat) -> io::Result<()> {
    let now = fs::fstat(file)?;
    if (now.st_uid, now.st_gid) != (previous.st_uid, previous.st_gid) {
        let _ = fchown(file, Some(previous.st_uid), Some(previous.st_gid));
    }
    // Setuid and setgid were meant for other content.
    file.set_permissions(Permissions::from_mode(previous.st_mode & 0o777))
}

/// The maximum number of nested links (the kernel's, path_resolution(7)).
const LINKS_MAX: usize = 40;

/// Resolves the user's links at `path` to a file, or to the name of a new one. Links of other users in world-writable
/// directories are rejected, as by the kernel (proc(5), protected_symlinks).
pub fn through_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        let told = |error: Errno| about("open", &path, &error.into());
        let link = match fs::openat(CWD, &path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(path),
            link => link.map_err(told)?,
        };
        let found = fs::fstat(&link).map_err(told)?;
        if !FileType::from_raw_mode(found.st_mode).is_symlink() {
            return Ok(path);
        }
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let around = fs::stat(parent).map_err(told)?;
        let is_everybodys = around.st_mode & 0o1002 == 0o1002;
        if is_everybodys && found.st_uid != geteuid().as_raw() && found.st_uid != around.st_uid {
            return Err(told(Errno::ACCESS));
        }
        let target = fs::readlinkat(&link, "", Vec::new()).map_err(told)?;
        path = parent.join(OsStr::from_bytes(target.as_bytes()));
    }
    Err(about("open", &path, &Errno::LOOP.into()))
}
