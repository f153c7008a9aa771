//! Generates the stream for files and directories.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use super::{About, Copied, DEPTH_MAX, Entry, NOT_COPIED, PIECE_BYTES, Writer, about, failure, words};

/// The maximum size of a file that does not report its size.
const UNTOLD_MAX_BYTES: u64 = 64 << 20;

/// Sends the file or directory at `path`; with `follow`, a link at `path` is followed. A path that ends in `/.` means
/// the contents of the directory. Errors are also reported to the receiver.
pub fn send(path: &Path, follow: bool, out: &mut impl Write, progress: &mut impl FnMut(u64)) -> io::Result<Copied> {
    let mut sender = Sender { out: Writer::new(out), copied: Copied::default(), progress };
    let sent = top_name(path).and_then(|name| {
        let follow = follow || name == ".";
        sender.walk(path, name.as_bytes(), follow, 0)
    });
    let last = match &sent {
        Ok(()) => Entry::End,
        Err(error) => Entry::Failed(error.to_string().chars().take(1024).collect()),
    };
    sender.out.say(&last)?;
    sender.out.flush()?;
    sent.map(|()| sender.copied)
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
}

impl<W: Write, P: FnMut(u64)> Sender<'_, W, P> {
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
            return self.skip_special(path, depth);
        }
        if kind.is_symlink() {
            let target = match fs::read_link(path) {
                Err(error) => return self.skip(path, depth, "read", &error),
                Ok(target) => target,
            };
            self.copied.entries += 1;
            return self.out.say(&Entry::Link(name, target.into_os_string().into_vec(), About::from(&metadata)));
        }
        if kind.is_file() {
            return self.file(path, name, follow, depth);
        }
        if depth >= DEPTH_MAX {
            return Err(failure(format!("{}: too many nested directories", path.display())));
        }
        self.copied.entries += 1;
        self.out.say(&Entry::Directory(name, About::from(&metadata)))?;
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
            self.walk(&path.join(&name), name.as_bytes(), false, depth + 1)?;
        }
        self.out.say(&Entry::Leave)
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
        self.copied.entries += 1;
        self.out.say(&Entry::File(name, About::from(&metadata), size_bytes))?;
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
}
