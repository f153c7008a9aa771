//! Creates files and directories from a stream, only in the location and under the name chosen by the receiver.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{XattrFlags, fsetxattr};

use super::directory::{Directory, take_after, through_links};
use super::entries::check_name;
use super::{About, Copied, Entries, Entry, NOT_COPIED, about, failure, words};

/// What a receiver accepts from its sender.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    /// The name of the copied file; `.` for the contents of a directory. If absent, the sender chooses.
    pub name: Option<OsString>,
    /// Whether it must be a directory.
    pub must_be_dir: bool,
    /// Whether new files get the original owners; otherwise they belong to this process's user, without setuid.
    pub owners: bool,
    /// Whether the sender may also change modes and owners of existing files, and create hard links.
    pub trusted: bool,
    /// Whether extended attributes are taken, as they are sent of a [whole](super::send_root) directory.
    pub attributes: bool,
}

/// Extended attributes: their names and values.
type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// Creates what a stream describes: within `to` if that is a directory, or else under that name.
pub fn receive(input: &mut impl Read, to: &Path, terms: Terms, progress: &mut impl FnMut(u64)) -> io::Result<Copied> {
    let entries = Entries::new(input, terms.trusted);
    let (open, next, copied) = (Vec::new(), Vec::new(), Copied::default());
    let mut receiver = Receiver { entries, open, next, copied, terms, progress };
    receiver.receive(to)?;
    Ok(receiver.copied)
}

struct Receiver<'a, R, P> {
    entries: Entries<&'a mut R>,
    open: Vec<Open>,
    /// Those of the next entry.
    next: Attributes,
    copied: Copied,
    terms: Terms,
    progress: &'a mut P,
}

/// An incomplete directory, and its final metadata.
struct Open {
    dir: Directory,
    becomes: Option<About>,
    attributes: Attributes,
}

/// The destination of the first entry.
enum Place {
    /// This existing directory.
    Itself(Directory),
    /// A name in this directory.
    In(Directory, OsString),
}

impl<R: Read, P: FnMut(u64)> Receiver<'_, R, P> {
    fn receive(&mut self, to: &Path) -> io::Result<()> {
        let Some(first) = self.entries.next_entry()? else { return Ok(()) };
        if self.terms.must_be_dir && !first.is_dir() {
            return Err(failure("the sender did not send a directory"));
        }
        if let Entry::Link(_, target, _) = &first {
            self.copied.link = Some(PathBuf::from(OsString::from_vec(target.clone())));
        }
        match self.place(to, &first)? {
            Place::Itself(dir) => {
                self.copied.entries += u64::from(matches!(first, Entry::Directory(..)));
                self.open.push(Open { dir, becomes: None, attributes: Vec::new() });
            }
            Place::In(dir, name) => {
                let made = self.make(&dir, &name, first)?;
                self.open.extend(made);
            }
        }
        while let Some(entry) = self.entries.next_entry()? {
            if self.is_about_next(&entry) {
                continue;
            }
            // Depth was validated when the entry was read.
            let Some(outer) = self.open.pop() else { return Err(failure("the sender sent invalid data")) };
            if entry == Entry::Leave {
                self.complete(&outer)?;
                continue;
            }
            let name = OsStr::from_bytes(entry.name().unwrap_or_default()).to_owned();
            let inner = match &entry {
                Entry::Same(_, names) => self.make_same(&outer.dir, &name, names).map(|()| None),
                _ => self.make(&outer.dir, &name, entry),
            }?;
            self.open.push(outer);
            self.open.extend(inner);
        }
        Ok(())
    }

    /// Whether an entry says something about the next one, which is kept in mind.
    fn is_about_next(&mut self, entry: &Entry) -> bool {
        match entry {
            Entry::Attribute(name, value) if self.terms.attributes => self.next.push((name.clone(), value.clone())),
            Entry::Linked if self.terms.attributes => {}
            _ => return false,
        }
        true
    }

    /// The destination of the first entry: `to` may be the directory to create it in, its name, or a link of the user
    /// to either.
    fn place(&self, to: &Path, first: &Entry) -> io::Result<Place> {
        let name = self.terms.name.as_ref().map_or(first.name().unwrap_or_default(), |name| name.as_bytes());
        let is_contents = name == b".";
        if is_contents && !first.is_dir() {
            return Err(failure("the sender did not send a directory"));
        }
        if fs::metadata(to).is_ok_and(|found| found.is_dir()) {
            let dir = Directory::open(to)?;
            if is_contents {
                return Ok(Place::Itself(dir));
            }
            check_name(name)?;
            return Ok(Place::In(dir, OsStr::from_bytes(name).to_owned()));
        }
        if first.is_dir() && fs::symlink_metadata(to).is_ok() {
            return Err(failure(format!("{}: a file exists, which cannot be replaced with a directory", to.display())));
        }
        if to.as_os_str().as_bytes().ends_with(b"/") && !first.is_dir() {
            return Err(failure(format!("{}: no such directory", to.display())));
        }
        let to = if matches!(first, Entry::File(..)) { through_links(to)? } else { to.to_owned() };
        let missing = || failure(format!("{}: no such directory", to.display()));
        let name = to.file_name().ok_or_else(missing)?.to_owned();
        Ok(Place::In(Directory::open(to.parent().unwrap_or(Path::new("")))?, name))
    }

    /// Creates the entry `name` in `dir`. Returns it if contents follow.
    fn make(&mut self, dir: &Directory, name: &OsStr, entry: Entry) -> io::Result<Option<Open>> {
        self.copied.entries += u64::from(!matches!(entry, Entry::Enter(_)));
        let attributes = std::mem::take(&mut self.next);
        match entry {
            Entry::Directory(_, about) => {
                let (dir, is_new) = dir.make_dir(name, 0o700)?;
                Ok(Some(Open { dir, becomes: (is_new || self.terms.trusted).then_some(about), attributes }))
            }
            Entry::Enter(_) => Ok(Some(Open { dir: dir.make_dir(name, 0o755)?.0, becomes: None, attributes })),
            Entry::File(_, about, _) => {
                let file = self.make_file(dir, name, about)?;
                self.set_attributes(&file, &dir.path_of(name), &attributes);
                Ok(None)
            }
            Entry::Special(..) if self.terms.attributes => {
                self.copied.skipped.push(format!("{}: {NOT_COPIED}", dir.path_of(name).display()));
                Ok(None)
            }
            Entry::Link(_, target, about) => {
                dir.make_link(name, &target)?;
                if self.terms.owners {
                    dir.own(name, about.uid, about.gid)?;
                }
                Ok(None)
            }
            _ => Err(failure("the sender sent invalid data")),
        }
    }

    fn make_same(&mut self, dir: &Directory, name: &OsStr, names: &[Vec<u8>]) -> io::Result<()> {
        if !self.terms.trusted {
            return Err(failure("the sender sent a hard link, which it must not"));
        }
        names.iter().try_for_each(|name| check_name(name))?;
        // They are those of the file.
        self.next.clear();
        self.copied.entries += 1;
        let root = self.open.first().map_or(dir, |root| &root.dir);
        dir.make_same(name, root, names)
    }

    /// Sets extended attributes, as far as the file system has them.
    fn set_attributes(&mut self, file: &File, path: &Path, attributes: &Attributes) {
        for (name, value) in attributes {
            if let Err(error) = fsetxattr(file, name.as_slice(), value, XattrFlags::empty()) {
                let (path, name) = (path.display(), String::from_utf8_lossy(name));
                self.copied.skipped.push(format!("{path}: the attribute {name}: {}", words(&error.into())));
            }
        }
    }

    fn make_file(&mut self, dir: &Directory, name: &OsStr, about: About) -> io::Result<File> {
        let (mut file, previous) = dir.make_file(name)?;
        let (copied, progress) = (&mut self.copied, &mut *self.progress);
        let path = dir.path_of(name);
        self.entries.content(|piece| {
            file.write_all(piece).map_err(|error| self::about("write", &path, &error))?;
            copied.bytes += piece.len() as u64;
            progress(copied.bytes);
            Ok(())
        })?;
        let finished = match previous.filter(|_| !self.terms.trusted) {
            Some(previous) => {
                set_time(&file, about);
                take_after(&file, &previous)
            }
            None => self.finish(&file, about),
        };
        finished.map_err(|error| self::about("change", &path, &error))?;
        Ok(file)
    }

    fn complete(&mut self, open: &Open) -> io::Result<()> {
        let Some(becomes) = open.becomes else { return Ok(()) };
        let dir = open.dir.as_file()?;
        let finished = self.finish(&dir, becomes);
        self.set_attributes(&dir, open.dir.path(), &open.attributes);
        finished.map_err(|error| about("change", open.dir.path(), &error))
    }

    /// Sets the owner, mode and time of a complete file or directory.
    fn finish(&self, file: &File, about: About) -> io::Result<()> {
        if self.terms.owners {
            fchown(file, Some(about.uid), Some(about.gid))?;
        }
        set_time(file, about);
        // Setuid and setgid make no sense with another owner.
        let mode = if self.terms.owners { about.mode & 0o7777 } else { about.mode & 0o777 };
        file.set_permissions(Permissions::from_mode(mode))
    }
}

/// Ignores file systems that do not support these timestamps.
fn set_time(file: &File, about: About) {
    let since = Duration::new(about.mtime_s.max(0).unsigned_abs(), about.mtime_ns.min(999_999_999));
    let time = SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH);
    let _ = file.set_times(FileTimes::new().set_modified(time));
}
