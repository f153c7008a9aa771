//! Generates the stream for files and directories.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags, lgetxattr, major, minor, statx};

use super::links::{self, Links, Name};
use super::{About, Copied, DEPTH_MAX, Entry, NOT_COPIED, PIECE_BYTES, Special, Writer, about, failure, words};

/// The maximum size of a file that does not report its size.
const UNTOLD_MAX_BYTES: u64 = 64 << 20;

/// Sends the file or directory at `path`; with `follow`, a link at `path` is followed. A path that ends in `/.` means
/// the contents of the directory. Errors are also reported to the receiver.
pub fn send(path: &Path, follow: bool, out: &mut impl Write, progress: &mut impl FnMut(u64)) -> io::Result<Copied> {
    let sender = Sender::new(out, progress, What::Files);
    let name = top_name(path);
    let follow = follow || name.as_ref().is_ok_and(|name| name == ".");
    sender.send(path, name, follow)
}

/// Sends the contents of the root directory `path` with devices and pipes, without what is mounted in it.
pub fn send_root(path: &Path, out: &mut impl Write) -> io::Result<Copied> {
    let what = What::Root { mount: mount_of(path)? };
    Sender::new(out, &mut |_| {}, what).send(&path.join("."), Ok(".".into()), true)
}

/// Sends the contents of `upper`, the upper directory of an overlay over `image`, with what it says of files that are gone. Without
/// `contents`, files are empty.
pub fn send_changes(upper: &Path, image: &Path, contents: bool, out: &mut impl Write) -> io::Result<Copied> {
    let what = What::Changes { image: image.to_owned(), contents };
    Sender::new(out, &mut |_| {}, what).send(&upper.join("."), Ok(".".into()), true)
}

impl<W: Write, P: FnMut(u64)> Sender<'_, W, P> {
    fn send(mut self, path: &Path, name: io::Result<OsString>, follow: bool) -> io::Result<Copied> {
        let sent = name.and_then(|name| self.walk(path, name.as_bytes(), follow, 0));
        let last = match &sent {
            Ok(()) => Entry::End,
            Err(error) => Entry::Failed(error.to_string().chars().take(1024).collect()),
        };
        self.out.say(&last)?;
        self.out.flush()?;
        sent.map(|()| self.copied)
    }
}

fn top_name(path: &Path) -> io::Result<OsString> {
    let contents = path.as_os_str().as_bytes().ends_with(b"/.") || path == Path::new(".");
    match path.file_name() {
        _ if contents => Ok(OsString::from(".")),
        Some(name) => Ok(name.to_owned()),
        // A path such as `..` must be resolved to get a name.
        None => {
            let real = path.canonicalize().map_err(|error| about("read", path, &error))?;
            Ok(real.file_name().unwrap_or(OsStr::new(".")).to_owned())
        }
    }
}

struct Sender<'a, W, P> {
    out: Writer<&'a mut W>,
    copied: Copied,
    progress: &'a mut P,
    what: What,
    links: Links,
}

/// What is sent.
enum What {
    /// Files, directories and links.
    Files,
    /// Everything on this mount.
    Root { mount: Option<u64> },
    /// The upper directory of an overlay.
    Changes { image: PathBuf, contents: bool },
}

/// What husk's init has made in a root file system, as far as it is not mounted there.
const MADE_BY_INIT: [&str; 6] = ["dev", "etc/hostname", "etc/hosts", "etc/resolv.conf", "proc", "sys"];

impl<'a, W: Write, P: FnMut(u64)> Sender<'a, W, P> {
    fn new(out: &'a mut W, progress: &'a mut P, what: What) -> Sender<'a, W, P> {
        Sender { out: Writer::new(out), copied: Copied::default(), progress, what, links: Links::default() }
    }

    fn walk(&mut self, path: &Path, name: &[u8], follow: bool, depth: usize) -> io::Result<()> {
        // Links are followed only in the path given by the user.
        let metadata = if follow { fs::metadata(path) } else { fs::symlink_metadata(path) };
        let metadata = match metadata {
            Err(error) => return self.skip(path, depth, "read", &error),
            Ok(metadata) => metadata,
        };
        let kind = metadata.file_type();
        let name = name.to_vec();
        if !kind.is_dir() && !kind.is_file() && !kind.is_symlink() {
            return self.special(path, name, &metadata, depth);
        }
        if kind.is_symlink() {
            let target = match fs::read_link(path) {
                Err(error) => return self.skip(path, depth, "read", &error),
                Ok(target) => target,
            };
            let entry = Entry::Link(name, target.into_os_string().into_vec(), About::from(&metadata));
            return self.say(path, depth, &entry);
        }
        if kind.is_file() {
            return self.file(path, name, follow, depth);
        }
        if depth >= DEPTH_MAX {
            return Err(failure(format!("{}: too many nested directories", path.display())));
        }
        self.say(path, depth, &Entry::Directory(name, About::from(&metadata)))?;
        if self.is_opaque(path) {
            self.out.say(&Entry::Opaque)?;
        }
        let names = fs::read_dir(path).and_then(|entries| {
            entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<Vec<_>>>()
        });
        let mut names = match names {
            Err(error) => {
                self.skip(path, depth, "read", &error)?;
                Vec::new()
            }
            Ok(names) => names,
        };
        // Required by the receiver.
        names.sort();
        for name in names {
            let inner = path.join(&name);
            if !self.is_left_out(&inner) {
                self.walk(&inner, name.as_bytes(), false, depth + 1)?;
            }
        }
        self.out.say(&Entry::Leave)
    }

    /// Whether something in the directory that is sent is not part of it.
    fn is_left_out(&self, path: &Path) -> bool {
        match &self.what {
            What::Files => false,
            What::Root { mount } => mount_of(path).is_ok_and(|found| found != *mount),
            What::Changes { image, .. } => {
                let Some(inner) = inner(path) else { return false };
                // A directory that has changed because of that only has not changed.
                let is_made = |inner: &Path| MADE_BY_INIT.iter().any(|made| inner == Path::new(made));
                let only_made = || {
                    let names = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.file_name());
                    let mut names = names.peekable();
                    names.peek().is_some() && names.all(|name| is_made(&inner.join(name)))
                };
                is_made(inner) || inner == Path::new("etc") && image.join(inner).is_dir() && only_made()
            }
        }
    }

    /// Sends an entry, after what is to be said about it.
    fn say(&mut self, path: &Path, depth: usize, entry: &Entry) -> io::Result<()> {
        if depth > 0 {
            let is_in = |image: &Path| inner(path).is_some_and(|inner| image.join(inner).symlink_metadata().is_ok());
            if matches!(&self.what, What::Changes { image, .. } if is_in(image)) {
                self.out.say(&Entry::InImage)?;
            }
            if self.is_whole() {
                self.say_attributes(path)?;
            }
        }
        self.copied.entries += 1;
        self.out.say(entry)
    }

    /// Whether links and attributes are sent as well.
    fn is_whole(&self) -> bool {
        !matches!(self.what, What::Files | What::Changes { contents: false, .. })
    }

    fn say_attributes(&mut self, path: &Path) -> io::Result<()> {
        match links::attributes(path) {
            Ok(attributes) => {
                attributes.into_iter().try_for_each(|(name, value)| self.out.say(&Entry::Attribute(name, value)))
            }
            Err(error) => {
                self.copied.skipped.push(format!("the attributes of {}: {}", path.display(), words(&error)));
                Ok(())
            }
        }
    }

    /// Whether a directory hides that of the image (Documentation/filesystems/overlayfs.rst).
    fn is_opaque(&self, path: &Path) -> bool {
        let mut value = [0; 1];
        matches!(self.what, What::Changes { .. })
            && lgetxattr(path, "trusted.overlay.opaque", &mut value) == Ok(1)
            && value == *b"y"
    }

    /// Sends a special file, or skips it.
    fn special(&mut self, path: &Path, name: Vec<u8>, metadata: &Metadata, depth: usize) -> io::Result<()> {
        let (kind, device) = (metadata.file_type(), metadata.rdev());
        if matches!(self.what, What::Changes { .. }) && kind.is_char_device() && device == 0 {
            return self.out.say(&Entry::Gone(name));
        }
        let special = match &self.what {
            What::Files => None,
            _ if kind.is_char_device() => Some(Special::Character(major(device), minor(device))),
            _ if kind.is_block_device() => Some(Special::Block(major(device), minor(device))),
            _ if kind.is_fifo() => Some(Special::Pipe),
            // A socket is of no use without the process that has made it.
            _ => return Ok(()),
        };
        let Some(special) = special else { return self.skip_special(path, depth) };
        self.say(path, depth, &Entry::Special(name, special, About::from(metadata)))
    }

    /// Skips an unreadable entry of a directory, like Docker: it may be gone, not be accessible to this user, or be one
    /// of the files in /proc that cannot be read. For the path given by the user this is an error.
    fn skip(&mut self, path: &Path, depth: usize, action: &str, error: &io::Error) -> io::Result<()> {
        if depth == 0 {
            return Err(about(action, path, error));
        }
        self.copied.skipped.push(format!("{}: {}", path.display(), words(error)));
        Ok(())
    }

    /// Skips special files.
    fn skip_special(&mut self, path: &Path, depth: usize) -> io::Result<()> {
        let text = format!("{}: {NOT_COPIED}", path.display());
        if depth == 0 {
            return Err(failure(text));
        }
        self.copied.skipped.push(text);
        Ok(())
    }

    fn file(&mut self, path: &Path, name: Vec<u8>, follow: bool, depth: usize) -> io::Result<()> {
        let told = |error: &io::Error| about("read", path, error);
        let opened = open(path, follow).and_then(|file| file.metadata().map(|metadata| (file, metadata)));
        let (mut file, metadata) = match opened {
            Err(error) => return self.skip(path, depth, "open", &error),
            Ok(opened) => opened,
        };
        if !metadata.is_file() {
            // It was replaced in the meantime.
            return self.skip_special(path, depth);
        }
        if matches!(self.what, What::Changes { contents: false, .. }) {
            self.say(path, depth, &Entry::File(name, About::from(&metadata), 0))?;
            return self.out.piece(&[]);
        }
        let known = match inner(path).filter(|_| self.is_whole()) {
            Some(inner) => self.links.name(inner, &metadata),
            None => Name::Only,
        };
        if let Name::Another(first) = known {
            return self.say(path, depth, &Entry::Same(name, first));
        }
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        let begun = (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece).and_then(|_| {
            Ok(match piece.len() as u64 {
                // Files in /proc and /sys report a size of zero or a page.
                all if all < PIECE_BYTES as u64 => all,
                some if metadata.len() > some => metadata.len(),
                _ => counted_bytes(path, follow)?,
            })
        });
        let size_bytes = match begun {
            Err(error) => return self.skip(path, depth, "read", &error),
            Ok(size_bytes) => size_bytes,
        };
        if let (Name::First, Some(inner)) = (known, inner(path)) {
            self.links.note(inner, &metadata);
            self.out.say(&Entry::Linked)?;
        }
        self.say(path, depth, &Entry::File(name, About::from(&metadata), size_bytes))?;
        loop {
            self.out.piece(&piece)?;
            if piece.is_empty() {
                return Ok(());
            }
            self.copied.bytes += piece.len() as u64;
            (self.progress)(self.copied.bytes);
            piece.clear();
            (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece).map_err(|error| told(&error))?;
        }
    }
}

/// The path below the directory that is sent, which ends in `/.`: what follows that.
fn inner(path: &Path) -> Option<&Path> {
    let bytes = path.as_os_str().as_bytes();
    let at = bytes.windows(3).position(|bytes| bytes == b"/./")?;
    bytes.get(at + 3..).map(|inner| Path::new(OsStr::from_bytes(inner)))
}

/// The mount that a file is on. `None` where the kernel does not say (before Linux 5.8).
fn mount_of(path: &Path) -> io::Result<Option<u64>> {
    let found = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::MNT_ID)?;
    Ok((found.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(found.stx_mnt_id))
}

/// Counts the bytes of a file that does not report its size, up to the limit: a process's `pagemap` would take hours.
fn counted_bytes(path: &Path, follow: bool) -> io::Result<u64> {
    let file = open(path, follow)?;
    let bytes = io::copy(&mut file.take(UNTOLD_MAX_BYTES), &mut io::sink())?;
    if bytes == UNTOLD_MAX_BYTES {
        return Err(failure(format!("it gives no size, and has {} MiB or more", UNTOLD_MAX_BYTES >> 20)));
    }
    Ok(bytes)
}

/// Opens a file, but not a link or a FIFO, which would block, that has replaced it in the meantime.
fn open(path: &Path, follow: bool) -> io::Result<File> {
    let flags = if follow { OFlags::NONBLOCK } else { OFlags::NONBLOCK | OFlags::NOFOLLOW };
    OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_left_out_of_a_directory_with_the_reason() {
        let mut bytes = Vec::new();
        let copied = send(Path::new("/proc/self"), true, &mut bytes, &mut |_| {}).unwrap();
        assert!(copied.entries > 100, "{copied:?}");
        // Write-only, not mapped at 0, and as large as the address space.
        for (name, why) in [("clear_refs", "Invalid argument"), ("mem", "Input/output error"), ("pagemap", "64 MiB")] {
            let is_told = |text: &String| text.starts_with(&format!("/proc/self/{name}: ")) && text.contains(why);
            assert!(copied.skipped.iter().any(is_told), "{name}: {:?}", copied.skipped);
        }
        let error = send(Path::new("/proc/self/mem"), false, &mut Vec::new(), &mut |_| {}).unwrap_err().to_string();
        assert_eq!(error, "read /proc/self/mem: Input/output error");
    }

    /// The entries that `send` writes, without what differs between hosts.
    fn sent(send: impl FnOnce(&mut Vec<u8>) -> io::Result<Copied>) -> Vec<String> {
        let mut bytes = Vec::new();
        send(&mut bytes).unwrap();
        let mut entries = crate::tree::Entries::new(&bytes[..], false);
        let mut said = Vec::new();
        while let Some(entry) = entries.next_entry().unwrap() {
            let name = entry.name().map(|name| String::from_utf8_lossy(name).into_owned()).unwrap_or_default();
            said.push(match &entry {
                Entry::File(..) => {
                    let mut len = 0;
                    entries
                        .content(|piece| {
                            len += piece.len();
                            Ok(())
                        })
                        .unwrap();
                    format!("file {name} {len}")
                }
                Entry::Directory(..) => format!("dir {name}"),
                Entry::Special(_, special, _) => format!("{special:?} {name}"),
                Entry::Gone(..) => format!("gone {name}"),
                other => format!("{other:?}"),
            });
        }
        said
    }

    #[test]
    fn changes_say_what_is_in_the_image_and_what_is_gone() {
        use rustix::fs::{FileType, Mode, mknodat};
        let place = crate::tree::tests::Place::new("changes");
        let (upper, image) = (place.0.join("upper"), place.0.join("image"));
        for dir in ["image/etc", "image/srv", "upper/etc", "upper/dev", "upper/srv", "upper/new"] {
            fs::create_dir_all(place.0.join(dir)).unwrap();
        }
        for file in ["image/srv/old", "upper/srv/old", "upper/srv/new", "upper/etc/hosts"] {
            fs::write(place.0.join(file), "words").unwrap();
        }
        mknodat(CWD, upper.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        mknodat(CWD, upper.join("srv/gone"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        let expected = [
            "dir .",
            "dir new",
            "Leave",
            "Pipe pipe",
            "InImage",
            "dir srv",
            "gone gone",
            "file new 5",
            "InImage",
            "file old 5",
            "Leave",
            "Leave",
        ];
        assert_eq!(sent(|out| send_changes(&upper, &image, true, out)), expected);
        let listed = sent(|out| send_changes(&upper, &image, false, out));
        assert_eq!(listed, expected.map(|word| word.replace(" 5", " 0")));
        // Once more than its own files are changed, so is the directory.
        fs::write(upper.join("etc/other"), "").unwrap();
        let listed = sent(|out| send_changes(&upper, &image, false, out));
        assert_eq!(listed[..5], ["dir .", "InImage", "dir etc", "file other 0", "Leave"]);
    }

    #[test]
    fn a_root_has_its_special_files_and_nothing_that_is_mounted_in_it() {
        use rustix::fs::{FileType, Mode, mknodat};
        let place = crate::tree::tests::Place::new("root");
        fs::create_dir(place.0.join("srv")).unwrap();
        fs::write(place.0.join("srv/file"), "x").unwrap();
        mknodat(CWD, place.0.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let expected = ["dir .", "Pipe pipe", "dir srv", "file file 1", "Leave", "Leave"];
        assert_eq!(sent(|out| send_root(&place.0, out)), expected);
        // /proc is a mount.
        let is_proc = |path: &str| {
            let mut out = Vec::new();
            let what = What::Root { mount: mount_of(Path::new("/")).unwrap() };
            Sender::new(&mut out, &mut |_| {}, what).is_left_out(Path::new(path))
        };
        assert!(is_proc("/./proc") && !is_proc("/./usr"));
    }
}
