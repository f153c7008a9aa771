//! From files and directories to the stream that describes them.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use super::{About, Copied, DEPTH_MAX, Entry, PIECE_BYTES, Writer, about, failure};

/// Sends what is at `path`, and what is in it; with `follow`, what a link at `path` leads to. A path that ends in `/.`
/// is what is in the directory, and not the directory. What goes wrong is told to the reader, too.
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
        // A path like `..` has a name all the same.
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
        // What a user names may be a link to what they mean; what is found in it is what it is.
        let metadata = if follow { fs::metadata(path) } else { fs::symlink_metadata(path) };
        let metadata = match metadata {
            Err(error) if is_gone(&error) && depth > 0 => return self.skip(path, depth),
            found => found.map_err(|error| about("read", path, &error))?,
        };
        let kind = metadata.file_type();
        let name = name.to_vec();
        if !kind.is_dir() && !kind.is_file() && !kind.is_symlink() {
            return self.skip(path, depth);
        }
        if kind.is_symlink() {
            let target = match fs::read_link(path) {
                Err(error) if is_gone(&error) && depth > 0 => return self.skip(path, depth),
                target => target.map_err(|error| about("read", path, &error))?,
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
            Err(error) if is_gone(&error) && depth > 0 => Vec::new(),
            names => names.map_err(|error| about("read", path, &error))?,
        };
        // The order that a reader insists on.
        names.sort();
        for name in names {
            self.walk(&path.join(&name), name.as_bytes(), false, depth + 1)?;
        }
        self.out.say(&Entry::Leave)
    }

    /// Leaves something out that was found in a directory. What the user asked for is not left out without an error.
    fn skip(&mut self, path: &Path, depth: usize) -> io::Result<()> {
        if depth == 0 {
            return Err(failure(format!("{}: not a file, directory or symbolic link", path.display())));
        }
        self.copied.skipped.push(path.to_owned());
        Ok(())
    }

    fn file(&mut self, path: &Path, name: Vec<u8>, follow: bool, depth: usize) -> io::Result<()> {
        let told = |error: &io::Error| about("read", path, error);
        let mut file = match open(path, follow) {
            Err(error) if is_gone(&error) && depth > 0 => return self.skip(path, depth),
            opened => opened.map_err(|error| about("open", path, &error))?,
        };
        let metadata = file.metadata().map_err(|error| told(&error))?;
        if !metadata.is_file() {
            // It was another a moment ago.
            return self.skip(path, depth);
        }
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece).map_err(|error| told(&error))?;
        let size_bytes = match piece.len() as u64 {
            // Files of /proc and /sys have other sizes than they say: none, or a page.
            all if all < PIECE_BYTES as u64 => all,
            some if metadata.len() > some => metadata.len(),
            _ => {
                open(path, follow).and_then(|mut again| io::copy(&mut again, &mut io::sink())).map_err(|e| told(&e))?
            }
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

/// Whether something is not there any more that was listed: others go on working in a directory while it is copied.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// Opens a file, and nothing that has come in its place meanwhile: no link, and no pipe that would have to be waited
/// for.
fn open(path: &Path, follow: bool) -> io::Result<File> {
    let flags = if follow { OFlags::NONBLOCK } else { OFlags::NONBLOCK | OFlags::NOFOLLOW };
    OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
}
