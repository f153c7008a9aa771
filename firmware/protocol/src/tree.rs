//! Files and folders as a stream of bytes: what `husk cp` sends into a machine, and has sent out of it.
//!
//! Entries are frames in the order of a walk; a folder's are between its own and a `Leave`, and a file's content follows it in
//! pieces. The reader trusts nothing: a name is one name, what is there already is entered only if it is a folder, and
//! nothing is written through a link that the stream made.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::frame::{self, Message, Reader};

/// As much of a file as one piece has.
const PIECE_BYTES: usize = 256 << 10;
/// Folders in each other, at most: fewer than a path can have.
const DEPTH_MAX: usize = 1024;

/// What a stream is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// A folder; what is in it follows, up to its `Leave`.
    Folder(Vec<u8>, About),
    /// A file; its `Piece`s follow, the last of which is empty.
    File(Vec<u8>, About),
    /// So many bytes of a file follow, as they are.
    Piece(u32),
    /// A symbolic link, and where it leads.
    Link(Vec<u8>, Vec<u8>, About),
    /// A folder that is made where it is missing, and else stays as it is; what is to be in it follows, up to its `Leave`.
    Enter(Vec<u8>),
    /// Another name for a file that the stream has made, by its path below the first folder. Only for a machine, from its host.
    Same(Vec<u8>, Vec<Vec<u8>>),
    /// The folder is complete.
    Leave,
    /// The sender cannot go on, for this reason.
    Failed(String),
    /// This was all.
    End,
}

impl Message for Entry {
    const MAX_BYTES: usize = 16 << 10;
}

/// What there is to know of a file beside its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Permissions, with the bits above them.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was changed, in seconds since 1970.
    pub mtime_s: i64,
    /// And nanoseconds.
    pub mtime_ns: u32,
}

/// Writes a stream, entry by entry, for who has other entries than a folder's of this machine.
pub struct Writer<W> {
    out: W,
}

impl<W: Write> Writer<W> {
    /// Writes to `out`, which is best buffered.
    pub fn new(out: W) -> Writer<W> {
        Writer { out }
    }

    /// Says what comes next.
    pub fn say(&mut self, entry: &Entry) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame::write(entry, &mut bytes).map_err(|error| failure(error.to_string()))?;
        self.out.write_all(&bytes)
    }

    /// The next bytes of the file that was said last, or its end.
    pub fn piece(&mut self, bytes: &[u8]) -> io::Result<()> {
        for bytes in bytes.chunks(PIECE_BYTES).filter(|_| !bytes.is_empty()) {
            self.say(&Entry::Piece(bytes.len() as u32))?;
            self.out.write_all(bytes)?;
        }
        if bytes.is_empty() { self.say(&Entry::Piece(0)) } else { Ok(()) }
    }

    /// Writes out what is held back.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// What was copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copied {
    /// Files, links and folders.
    pub entries: u64,
    /// Of their contents.
    pub bytes: u64,
    /// What was left out: devices, pipes and sockets.
    pub skipped: Vec<PathBuf>,
}

fn failure(words: impl Into<String>) -> io::Error {
    io::Error::other(words.into())
}

/// What `error` says, about what was done with `path`.
fn about(action: &str, path: &Path, error: &io::Error) -> io::Error {
    let text = error.to_string();
    // Without the number that stands behind the words.
    let words = text.split(" (os error").next().unwrap_or_default();
    io::Error::new(error.kind(), format!("{action} {}: {words}", path.display()))
}

/// Sends what is at `path`, and what is in it. A path that ends in `/.` is what is in the folder, and not the folder.
/// What goes wrong is told to the reader, too.
pub fn send(path: &Path, out: &mut impl Write, progress: &mut impl FnMut(u64)) -> io::Result<Copied> {
    let mut sender = Sender { out: Writer::new(out), copied: Copied::default(), progress };
    let contents = path.as_os_str().as_bytes().ends_with(b"/.") || path == Path::new(".");
    let name = match path.file_name() {
        _ if contents => OsString::from("."),
        Some(name) => name.to_owned(),
        // A path like `..` has a name all the same.
        None => path.canonicalize()?.file_name().unwrap_or(OsStr::new(".")).to_owned(),
    };
    let sent = sender.walk(path, name.as_bytes(), 0);
    let last = match &sent {
        Ok(()) => Entry::End,
        Err(error) => Entry::Failed(error.to_string().chars().take(1024).collect()),
    };
    sender.out.say(&last)?;
    sender.out.flush()?;
    sent.map(|()| sender.copied)
}

struct Sender<'a, W, P> {
    out: Writer<&'a mut W>,
    copied: Copied,
    progress: &'a mut P,
}

impl<W: Write, P: FnMut(u64)> Sender<'_, W, P> {
    fn walk(&mut self, path: &Path, name: &[u8], depth: usize) -> io::Result<()> {
        // What a user names may be a link to what they mean; what is found in it is what it is.
        let metadata = if depth == 0 && name == b"." { fs::metadata(path) } else { fs::symlink_metadata(path) };
        let metadata = metadata.map_err(|error| about("read", path, &error))?;
        let kind = metadata.file_type();
        let name = name.to_vec();
        if !kind.is_dir() && !kind.is_file() && !kind.is_symlink() {
            self.copied.skipped.push(path.to_owned());
            return Ok(());
        }
        self.copied.entries += 1;
        if kind.is_symlink() {
            let target = fs::read_link(path).map_err(|error| about("read", path, &error))?;
            return self.out.say(&Entry::Link(name, target.into_os_string().into_vec(), About::from(&metadata)));
        }
        if kind.is_file() {
            return self.file(path, name);
        }
        if depth >= DEPTH_MAX {
            return Err(failure(format!("{}: too many folders in each other", path.display())));
        }
        self.out.say(&Entry::Folder(name, About::from(&metadata)))?;
        let mut names = fs::read_dir(path)
            .and_then(|entries| {
                entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<Vec<_>>>()
            })
            .map_err(|error| about("read", path, &error))?;
        names.sort();
        for name in names {
            self.walk(&path.join(&name), name.as_bytes(), depth + 1)?;
        }
        self.out.say(&Entry::Leave)
    }

    fn file(&mut self, path: &Path, name: Vec<u8>) -> io::Result<()> {
        let mut file = File::open(path).map_err(|error| about("open", path, &error))?;
        let metadata = file.metadata().map_err(|error| about("read", path, &error))?;
        self.out.say(&Entry::File(name, About::from(&metadata)))?;
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = file.read(&mut piece).map_err(|error| about("read", path, &error))?;
            self.out.piece(piece.get(..count).unwrap_or_default())?;
            if count == 0 {
                return Ok(());
            }
            self.copied.bytes += count as u64;
            (self.progress)(self.copied.bytes);
        }
    }
}

impl From<&fs::Metadata> for About {
    fn from(metadata: &fs::Metadata) -> About {
        About {
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime_s: metadata.mtime(),
            mtime_ns: metadata.mtime_nsec() as u32,
        }
    }
}

/// What a receiver takes from its sender.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trust {
    /// Gives files the owners that they had; otherwise they are this process's, and run as nobody else.
    pub owners: bool,
    /// Makes further names for files.
    pub names: bool,
}

/// Makes what a stream describes: in `to` where that is a folder, or else under that name.
pub fn receive(input: &mut impl Read, to: &Path, trust: Trust, progress: &mut impl FnMut(u64)) -> io::Result<Copied> {
    let mut receiver = Receiver { input, reader: Reader::default(), copied: Copied::default(), trust, progress };
    receiver.receive(to)?;
    Ok(receiver.copied)
}

struct Receiver<'a, R, P> {
    input: &'a mut R,
    reader: Reader,
    copied: Copied,
    trust: Trust,
    progress: &'a mut P,
}

impl<R: Read, P: FnMut(u64)> Receiver<'_, R, P> {
    /// The next entry. Frames are short, and are read byte by byte no further than they go: a piece's bytes follow.
    fn next(&mut self) -> io::Result<Entry> {
        loop {
            match self.reader.take::<Entry>() {
                Ok(Some(Entry::Failed(why))) => return Err(failure(why)),
                Ok(Some(entry)) => return Ok(entry),
                Ok(None) => {}
                Err(error) => return Err(failure(format!("the sender says what makes no sense: {error}"))),
            }
            let mut bytes = [0; 1];
            self.input.read_exact(&mut bytes).map_err(|_| failure("the sender has gone before it had sent all"))?;
            self.reader.push(&bytes);
        }
    }

    fn receive(&mut self, to: &Path) -> io::Result<()> {
        let first = self.next()?;
        let path = match &first {
            Entry::Folder(name, _) | Entry::File(name, _) | Entry::Link(name, ..) | Entry::Enter(name) => {
                destination(to, name, &first)?
            }
            Entry::End => return Ok(()),
            _ => return Err(failure("the sender says what makes no sense")),
        };
        let mut folders: Vec<(PathBuf, Option<About>)> = Vec::new();
        self.make(first, path, &mut folders)?;
        while let Some((folder, about)) = folders.last().cloned() {
            match self.next()? {
                Entry::Leave => {
                    if let Some(about) = about {
                        self.finish(&folder, about, None)?;
                    }
                    folders.pop();
                }
                entry => {
                    let name = match &entry {
                        Entry::Folder(name, _) | Entry::File(name, _) | Entry::Link(name, ..) => name,
                        Entry::Enter(name) | Entry::Same(name, _) => name,
                        _ => return Err(failure("the sender says what makes no sense")),
                    };
                    let path = folder.join(one_name(name)?);
                    self.make(entry, path, &mut folders)?;
                }
            }
        }
        match self.next()? {
            Entry::End => Ok(()),
            _ => Err(failure("the sender says what makes no sense")),
        }
    }

    fn make(&mut self, entry: Entry, path: PathBuf, folders: &mut Vec<(PathBuf, Option<About>)>) -> io::Result<()> {
        self.copied.entries += u64::from(!matches!(entry, Entry::Enter(_)));
        match entry {
            Entry::Folder(..) | Entry::Enter(_) if folders.len() >= DEPTH_MAX => {
                Err(failure("the sender sends too many folders in each other"))
            }
            Entry::Folder(_, about) => {
                make_folder(&path, folders.is_empty(), 0o700)?;
                folders.push((path, Some(about)));
                Ok(())
            }
            Entry::Enter(_) => {
                make_folder(&path, folders.is_empty(), 0o755)?;
                folders.push((path, None));
                Ok(())
            }
            Entry::Same(_, names) => {
                let root = folders.first().map_or(Path::new("/"), |(root, _)| root);
                self.make_same(&path, root, &names)
            }
            Entry::File(_, about) => self.make_file(&path, about),
            Entry::Link(_, target, about) => {
                make_room(&path)?;
                symlink(OsStr::from_bytes(&target), &path).map_err(|error| self::about("make", &path, &error))?;
                self.own(&path, about)
            }
            _ => Ok(()),
        }
    }

    /// Gives the file that `names` lead to, below `root`, another name. No link is followed.
    fn make_same(&self, path: &Path, root: &Path, names: &[Vec<u8>]) -> io::Result<()> {
        if !self.trust.names {
            return Err(failure("the sender wants another name for a file, which is not for it to say"));
        }
        let mut file = root.to_owned();
        for (place, name) in names.iter().enumerate() {
            file.push(one_name(name)?);
            let found = fs::symlink_metadata(&file).map_err(|error| about("link to", &file, &error))?;
            let last = place + 1 == names.len();
            if found.is_dir() == last {
                return Err(failure(format!("link to {}: it is no file", file.display())));
            }
        }
        if names.is_empty() {
            return Err(failure("the sender wants another name for no file"));
        }
        make_room(path)?;
        fs::hard_link(&file, path).map_err(|error| about("make", path, &error))
    }

    fn make_file(&mut self, path: &Path, about: About) -> io::Result<()> {
        make_room(path)?;
        let made = File::options().write(true).create_new(true).mode(0o600).open(path);
        let mut file = made.map_err(|error| self::about("make", path, &error))?;
        let mut piece = Vec::new();
        loop {
            let Entry::Piece(count) = self.next()? else { return Err(failure("the sender says what makes no sense")) };
            let count = count as usize;
            match count {
                0 => return self.finish(path, about, Some(&file)),
                1..=PIECE_BYTES => piece.resize(count, 0),
                _ => return Err(failure("the sender sends too long a piece")),
            }
            self.input.read_exact(&mut piece).map_err(|_| failure("the sender has gone before it had sent all"))?;
            file.write_all(&piece).map_err(|error| self::about("write", path, &error))?;
            self.copied.bytes += count as u64;
            (self.progress)(self.copied.bytes);
        }
    }

    /// Gives a file or a folder that is complete its owner, mode and time.
    fn finish(&self, path: &Path, about: About, file: Option<&File>) -> io::Result<()> {
        self.own(path, about)?;
        // Who gets a file of another's has no use for bits that make it run as its owner.
        let mode = if self.trust.owners { about.mode & 0o7777 } else { about.mode & 0o777 };
        let opened;
        let file = match file {
            Some(file) => file,
            None => {
                opened = File::open(path).map_err(|error| self::about("open", path, &error))?;
                &opened
            }
        };
        let since = Duration::new(about.mtime_s.max(0).unsigned_abs(), about.mtime_ns.min(999_999_999));
        let time = SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH);
        // File systems that keep no such times, or not all of them, keep the file.
        let _ = file.set_times(FileTimes::new().set_modified(time));
        file.set_permissions(Permissions::from_mode(mode)).map_err(|error| self::about("change", path, &error))
    }

    fn own(&self, path: &Path, about: About) -> io::Result<()> {
        if !self.trust.owners {
            return Ok(());
        }
        lchown(path, Some(about.uid), Some(about.gid)).map_err(|error| self::about("change the owner of", path, &error))
    }
}

/// Where the first entry goes: `to` may be the folder that it is put in, or its own name.
fn destination(to: &Path, name: &[u8], first: &Entry) -> io::Result<PathBuf> {
    let is_folder = fs::metadata(to).is_ok_and(|metadata| metadata.is_dir());
    if name == b"." {
        return Ok(to.to_owned());
    }
    if is_folder {
        return Ok(to.join(one_name(name)?));
    }
    let is_kept_apart = matches!(first, Entry::Folder(..) | Entry::Enter(_));
    if to.as_os_str().as_bytes().ends_with(b"/") && !is_kept_apart {
        return Err(failure(format!("{}: there is no such folder", to.display())));
    }
    if is_kept_apart && fs::symlink_metadata(to).is_ok() {
        return Err(failure(format!("{}: a file is there, which cannot become a folder", to.display())));
    }
    Ok(to.to_owned())
}

/// A name that leads nowhere but to an entry of its folder.
fn one_name(name: &[u8]) -> io::Result<&OsStr> {
    let bad = name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0);
    if bad { Err(failure("the sender sends a name that is none")) } else { Ok(OsStr::from_bytes(name)) }
}

/// Makes a folder, or takes one that is there. Only the user's own, the first, may be a link to one.
fn make_folder(path: &Path, may_be_link: bool, mode: u32) -> io::Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let found = if may_be_link { fs::metadata(path) } else { fs::symlink_metadata(path) };
            match found {
                Ok(found) if found.is_dir() => Ok(()),
                _ => Err(about("make", path, &error)),
            }
        }
        made => made.map_err(|error| about("make", path, &error)),
    }
}

/// Removes a file or a link that is in the way.
fn make_room(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(|error| about("replace", path, &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of this test's own, gone with it.
    struct Place(PathBuf);

    impl Place {
        fn new(test: &str) -> Place {
            let path = std::env::temp_dir().join(format!("husk-tree-{}-{test}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).unwrap();
            Place(path)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn sent(path: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        send(path, &mut bytes, &mut |_| {}).unwrap();
        bytes
    }

    fn received(mut bytes: &[u8], to: &Path) -> io::Result<Copied> {
        receive(&mut bytes, to, Trust::default(), &mut |_| {})
    }

    fn stream(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = Vec::new();
        entries.iter().for_each(|entry| frame::write(entry, &mut bytes).unwrap());
        bytes
    }

    const ABOUT: About = About { mode: 0o755, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 };

    #[test]
    fn a_tree_arrives_as_it_was() {
        let place = Place::new("arrives");
        let from = place.0.join("from");
        fs::create_dir_all(from.join("sub/empty")).unwrap();
        fs::write(from.join("sub/big"), vec![7; PIECE_BYTES + 1]).unwrap();
        fs::write(from.join("none"), "").unwrap();
        fs::set_permissions(from.join("none"), Permissions::from_mode(0o4640)).unwrap();
        symlink("sub/big", from.join("link")).unwrap();
        symlink("/nowhere", from.join("sub/dangling")).unwrap();
        let to = place.0.join("to");
        let copied = received(&sent(&from), &to).unwrap();
        assert_eq!((copied.entries, copied.bytes), (7, PIECE_BYTES as u64 + 1));
        assert_eq!(fs::read(to.join("sub/big")).unwrap(), vec![7; PIECE_BYTES + 1]);
        assert_eq!(fs::read_link(to.join("sub/dangling")).unwrap(), Path::new("/nowhere"));
        assert!(to.join("sub/empty").is_dir());
        assert_eq!(fs::metadata(to.join("none")).unwrap().mode() & 0o7777, 0o640, "it would run as its owner");
        let times = [&from, &to].map(|root| fs::metadata(root.join("sub")).unwrap().modified().unwrap());
        assert_eq!(times[0], times[1]);
        // Once more, over what is there: into the folder, and then its contents only.
        received(&sent(&from), &to).unwrap();
        assert!(to.join("from/sub/big").exists());
        received(&sent(&from.join(".")), &to).unwrap();
        assert!(to.join("sub/big").exists() && !to.join("from/from").exists());
    }

    #[test]
    fn a_file_goes_to_a_folder_or_to_a_name() {
        let place = Place::new("file");
        let (file, folder) = (place.0.join("a"), place.0.join("d"));
        fs::write(&file, "x").unwrap();
        fs::create_dir(&folder).unwrap();
        received(&sent(&file), &folder).unwrap();
        received(&sent(&file), &folder.join("b")).unwrap();
        assert_eq!(
            (fs::read(folder.join("a")).unwrap(), fs::read(folder.join("b")).unwrap()),
            (b"x".to_vec(), b"x".to_vec())
        );
        let missing = format!("{}/none/", place.0.display());
        assert!(received(&sent(&file), Path::new(&missing)).unwrap_err().to_string().contains("no such folder"));
        assert!(received(&sent(&folder), &file).unwrap_err().to_string().contains("cannot become a folder"));
    }

    #[test]
    fn nothing_is_written_outside_or_through_a_link() {
        let place = Place::new("escape");
        let (outside, inside) = (place.0.join("outside"), place.0.join("inside"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "precious").unwrap();
        let file = |name: &[u8]| [Entry::File(name.to_vec(), ABOUT), Entry::Piece(0)];
        let folder = |name: &[u8]| Entry::Folder(name.to_vec(), ABOUT);
        let link = Entry::Link(b"link".to_vec(), outside.clone().into_os_string().into_vec(), ABOUT);
        for name in [&b"../outside/file"[..], b"..", b".", b"", b"a/b", b"/etc/x", b"a\0b"] {
            let entries = [vec![folder(b"x")], file(name).to_vec(), vec![Entry::Leave, Entry::End]].concat();
            assert!(received(&stream(&entries), &inside).unwrap_err().to_string().contains("a name that is none"));
        }
        // A folder where the stream has made a link, and a file where it leads.
        let entries = [vec![folder(b"x"), link.clone(), folder(b"link")], file(b"file").to_vec()].concat();
        assert!(received(&stream(&entries), &inside).is_err());
        let over = [vec![folder(b"x"), link], file(b"link").to_vec(), vec![Entry::Leave, Entry::End]].concat();
        received(&stream(&over), &inside).unwrap();
        assert_eq!(fs::read(outside.join("file")).unwrap(), b"precious");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_is_entered_stays_as_it_is() {
        let place = Place::new("enter");
        let to = place.0.join("to");
        fs::create_dir_all(to.join("there")).unwrap();
        fs::set_permissions(to.join("there"), Permissions::from_mode(0o711)).unwrap();
        let enter = |name: &str| Entry::Enter(name.into());
        let file = |name: &str| vec![Entry::File(name.into(), ABOUT), Entry::Piece(0)];
        let entries = [
            vec![enter("."), enter("there")],
            file("a"),
            vec![Entry::Leave, enter("new")],
            file("b"),
            vec![Entry::Leave, Entry::Leave, Entry::End],
        ];
        let copied = received(&stream(&entries.concat()), &to).unwrap();
        assert_eq!(copied.entries, 2);
        assert_eq!(fs::metadata(to.join("there")).unwrap().mode() & 0o777, 0o711);
        assert!(to.join("there/a").exists() && to.join("new/b").exists());
    }

    #[test]
    fn another_name_for_a_file_is_made_for_who_is_trusted_and_through_no_link() {
        let place = Place::new("same");
        let (to, outside) = (place.0.join("to"), place.0.join("outside"));
        fs::create_dir_all(to.join("d")).unwrap();
        fs::write(to.join("d/a"), "x").unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "x").unwrap();
        symlink(&outside, to.join("link")).unwrap();
        let same = |names: &[&str]| {
            let names = names.iter().map(|name| name.as_bytes().to_vec()).collect();
            stream(&[Entry::Enter(b".".to_vec()), Entry::Same(b"b".to_vec(), names), Entry::Leave, Entry::End])
        };
        let trusted = |bytes: Vec<u8>| {
            receive(&mut bytes.as_slice(), &to, Trust { names: true, ..Trust::default() }, &mut |_| {})
        };
        assert!(received(&same(&["d", "a"]), &to).unwrap_err().to_string().contains("not for it to say"));
        for names in [&["link", "secret"][..], &["..", "outside", "secret"], &["d"], &[], &["d", "none"], &["d/a"]] {
            assert!(trusted(same(names)).is_err(), "{names:?}");
        }
        assert!(!to.join("b").exists());
        trusted(same(&["d", "a"])).unwrap();
        assert_eq!(fs::metadata(to.join("b")).unwrap().nlink(), 2);
    }

    #[test]
    fn a_sender_that_lies_stops_or_fails_is_an_error() {
        let place = Place::new("lies");
        let to = place.0.join("to");
        let folder = || Entry::Folder(b"d".to_vec(), ABOUT);
        for entries in [
            vec![],
            vec![Entry::Leave],
            vec![folder()],
            vec![folder(), Entry::End],
            vec![folder(), Entry::Piece(1)],
            vec![folder(), Entry::Leave, Entry::Leave],
            vec![Entry::File(b"f".to_vec(), ABOUT), Entry::Piece(u32::MAX)],
            vec![Entry::File(b"f".to_vec(), ABOUT), Entry::Piece(100)],
            vec![Entry::Failed("it is gone".into())],
        ] {
            assert!(received(&stream(&entries), &to).is_err(), "{entries:?}");
            let _ = fs::remove_dir_all(&to);
            let _ = fs::remove_file(&to);
        }
        let deep: Vec<Entry> = (0..=DEPTH_MAX).map(|_| folder()).collect();
        assert!(received(&stream(&deep), &to).is_err());
        let mut told = Vec::new();
        assert!(send(&place.0.join("missing"), &mut told, &mut |_| {}).is_err());
        assert!(received(&told, &to).unwrap_err().to_string().contains("No such file"));
    }
}
