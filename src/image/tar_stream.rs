//! Writes the stream of `husk cp`, `export` and `commit` as a tar archive.
//!
//! The archive is created on the host and not in the guest, so that it contains only the requested name.

use std::collections::HashMap;
use std::io::{Read, Write};

use anyhow::{Context, Result, bail, ensure};
use husk_protocol::tree::{About, Copied, Entries, Entry};

use super::tar::shown;
use super::tar_write::{Attribute, Type, end, head, pad};

/// The marks of an image's layer (OCI image specification, layer.md): a file or directory that is gone, and a directory that hides the one
/// below.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The maximum size of a file's extended attributes, and of their names (xattr(7)).
const ATTRIBUTES_MAX_BYTES: usize = 64 << 10;
const ATTRIBUTE_NAME_MAX_BYTES: usize = 255;

/// The maximum size of the paths of all files with several names, and what each is counted for at least.
const LINKED_MAX_BYTES: usize = 64 << 20;
const LINKED_MIN_BYTES: usize = 128;

/// What an archive is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Files that a user has asked for.
    Files,
    /// A root file system.
    Root,
    /// The changes of one, as a layer of an image.
    Layer,
}

/// Writes an archive of the guest's stream to `out` under the name `name`; `.` stands for a directory's contents.
pub fn receive(input: impl Read, name: &[u8], content: Content, out: &mut impl Write) -> Result<Copied> {
    let mut archive = Archive {
        entries: Entries::new(input, false),
        name,
        content,
        copied: Copied::default(),
        path: Vec::new(),
        outer: Vec::new(),
        marks: Marks::default(),
        linked: Linked::default(),
        out,
    };
    while let Some(entry) = archive.entries.next_entry()? {
        match entry.name() {
            Some(own) => archive.add(own, &entry)?,
            None => archive.mark(entry)?,
        }
    }
    end(archive.out)?;
    Ok(archive.copied)
}

struct Archive<'a, R, W> {
    entries: Entries<R>,
    name: &'a [u8],
    content: Content,
    copied: Copied,
    /// The path of the current directory with a trailing slash, and its length before each nested directory.
    path: Vec<u8>,
    outer: Vec<usize>,
    marks: Marks,
    linked: Linked,
    out: &'a mut W,
}

/// What the guest has said about the next entry.
#[derive(Default)]
struct Marks {
    attributes: Vec<Attribute>,
    is_linked: bool,
}

/// The files so far that may have more names, with what is said about them. A hard link to anything else could lead out of the directory
/// where the archive is unpacked.
#[derive(Default)]
struct Linked {
    files: HashMap<Vec<u8>, About>,
    bytes: usize,
}

impl Linked {
    fn note(&mut self, path: &[u8], about: &About) -> Result<()> {
        self.bytes += path.len().max(LINKED_MIN_BYTES);
        ensure!(self.bytes <= LINKED_MAX_BYTES, "there are too many hard links");
        self.files.insert(path.to_vec(), *about);
        Ok(())
    }
}

impl<R: Read, W: Write> Archive<'_, R, W> {
    /// Takes what has no name of its own.
    fn mark(&mut self, entry: Entry) -> Result<()> {
        match entry {
            Entry::Leave => self.path.truncate(self.outer.pop().unwrap_or(0)),
            Entry::InImage if self.content == Content::Layer => {}
            Entry::Opaque if self.content == Content::Layer => {
                whiteout(&[&self.path, OPAQUE].concat(), self.out)?;
            }
            Entry::Linked if self.content != Content::Files => self.marks.is_linked = true,
            Entry::Attribute(name, value) if self.content != Content::Files => {
                let attributes = &mut self.marks.attributes;
                let size_bytes = |(name, value): &Attribute| name.len() + value.len();
                let bytes = attributes.iter().map(size_bytes).sum::<usize>() + name.len() + value.len();
                let is_named = (1..=ATTRIBUTE_NAME_MAX_BYTES).contains(&name.len()) && !name.contains(&0);
                ensure!(is_named && bytes <= ATTRIBUTES_MAX_BYTES, "the guest sent invalid attributes");
                attributes.push((name, value));
            }
            _ => bail!("the guest sent invalid data"),
        }
        Ok(())
    }

    /// Writes an entry, whose name in the guest is `own`.
    fn add(&mut self, own: &[u8], entry: &Entry) -> Result<()> {
        ensure!(
            self.content != Content::Layer || !own.starts_with(WHITEOUT),
            "{}: a layer cannot contain a file of this name",
            shown(&[&self.path, own].concat())
        );
        let is_first = self.outer.is_empty();
        let outside_bytes = self.path.len();
        self.path.extend_from_slice(if is_first { self.name } else { own });
        ensure!(self.name != b"." || entry.is_dir() || !is_first, "the guest did not send a directory");
        let marks = std::mem::take(&mut self.marks);
        match entry {
            Entry::Directory(_, about) => {
                self.path.push(b'/');
                self.head(Type::of(b'5'), b"", 0, about, &marks)?;
                // The names in a root file system do not begin with `./`.
                if is_first && self.content != Content::Files {
                    self.path.clear();
                }
                self.outer.push(outside_bytes);
            }
            Entry::File(_, about, size_bytes) => {
                if marks.is_linked {
                    self.linked.note(&self.path, about)?;
                }
                self.head(Type::of(b'0'), b"", *size_bytes, about, &marks)?;
                copy_content(&mut self.entries, *size_bytes, self.out).with_context(|| shown(&self.path))?;
                self.copied.bytes += size_bytes;
            }
            Entry::Link(_, target, about) => self.head(Type::of(b'2'), target, 0, about, &marks)?,
            Entry::Same(_, names) => {
                let first = names.join(&b'/');
                let about = *self.linked.files.get(&first).context("the guest sent a hard link to nothing")?;
                self.head(Type::of(b'1'), &first, 0, &about, &marks)?;
            }
            Entry::Special(_, special, about) if self.content != Content::Files => {
                self.head(Type::from(*special), b"", 0, about, &marks)?;
            }
            Entry::Gone(name) if self.content == Content::Layer && !is_first => {
                whiteout(&[&self.path[..outside_bytes], WHITEOUT, name].concat(), self.out)?;
            }
            _ => bail!("the guest sent invalid data"),
        }
        if !entry.is_dir() {
            self.path.truncate(outside_bytes);
        }
        self.copied.entries += 1;
        Ok(())
    }

    fn head(&mut self, kind: Type, link: &[u8], size_bytes: u64, about: &About, marks: &Marks) -> Result<()> {
        Ok(head(kind, &self.path, link, size_bytes, about, &marks.attributes, self.out)?)
    }
}

/// Writes a file's content with its initial size: data appended since is omitted. A truncated file is an error, because
/// the missing part could be arbitrarily large.
fn copy_content(entries: &mut Entries<impl Read>, size_bytes: u64, out: &mut impl Write) -> Result<()> {
    let mut missing_bytes = size_bytes;
    entries.content(|piece| {
        let wanted = usize::try_from(missing_bytes).unwrap_or(usize::MAX).min(piece.len());
        missing_bytes -= wanted as u64;
        out.write_all(piece.get(..wanted).unwrap_or_default())
    })?;
    ensure!(missing_bytes == 0, "the file shrank while it was copied");
    Ok(pad(size_bytes, out)?)
}

/// Writes a mark of a layer, an empty file.
fn whiteout(name: &[u8], out: &mut impl Write) -> std::io::Result<()> {
    let about = About { mode: 0o644, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 };
    head(Type::of(b'0'), name, b"", 0, &about, &[], out)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::Path;
    use std::process::{Command, Stdio};

    use husk_protocol::tree::{self, Special, Writer};

    use super::*;
    use crate::image::tar_write::RECORD_BYTES;

    /// Unpacks an archive with the system's tar.
    fn unpacked(archive: &[u8], to: &Path) {
        fs::create_dir_all(to).unwrap();
        let mut tar = Command::new("tar").args(["-x", "-p", "-C"]).arg(to).stdin(Stdio::piped()).spawn().unwrap();
        tar.stdin.take().unwrap().write_all(archive).unwrap();
        assert!(tar.wait().unwrap().success());
    }

    fn sent(path: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        tree::send(path, false, &mut bytes, &mut |_| {}).unwrap();
        bytes
    }

    fn archived(stream: &[u8], name: &str) -> Result<Vec<u8>> {
        let mut archive = Vec::new();
        receive(stream, name.as_bytes(), Content::Files, &mut archive)?;
        Ok(archive)
    }

    #[test]
    fn tar_unpacks_the_stream_under_the_requested_name() {
        let place = tempfile::tempdir().unwrap();
        let (from, to) = (place.path().join("from"), place.path().join("to"));
        let long = "n".repeat(200);
        fs::create_dir_all(from.join(&long).join(&long)).unwrap();
        fs::write(from.join(&long).join(&long).join("deep"), vec![7; 1_000_000]).unwrap();
        fs::write(from.join("none"), "").unwrap();
        fs::set_permissions(from.join("none"), Permissions::from_mode(0o2751)).unwrap();
        symlink("t".repeat(300), from.join("link")).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        File::options().write(true).open(from.join("none")).unwrap().set_modified(old).unwrap();
        let archive = archived(&sent(&from), "asked").unwrap();
        assert!(archive.len().is_multiple_of(RECORD_BYTES));
        unpacked(&archive, &to);
        let at = |name: &str| to.join("asked").join(name);
        assert_eq!(fs::read(at(&long).join(&long).join("deep")).unwrap(), vec![7; 1_000_000]);
        assert_eq!(fs::read_link(at("link")).unwrap(), Path::new(&"t".repeat(300)));
        let none = fs::metadata(at("none")).unwrap();
        assert_eq!((none.mode() & 0o7777, none.mtime(), none.len()), (0o2751, 1_000_000_000, 0));
        // Its contents, without the directory itself.
        unpacked(&archived(&sent(&from.join(".")), ".").unwrap(), &place.path().join("contents"));
        assert!(place.path().join("contents/none").exists());
    }

    #[test]
    fn a_guest_controls_neither_names_nor_links_nor_padding() {
        let about = About { mode: 0o644, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 };
        let stream = |entries: &[Entry]| {
            let mut out = Writer::new(Vec::new());
            entries.iter().for_each(|entry| out.say(entry).unwrap());
            out.into_inner()
        };
        let file = |name: &[u8], size_bytes| vec![Entry::File(name.to_vec(), about, size_bytes), Entry::Piece(0)];
        for name in [&b".ssh/authorized_keys"[..], b"..", b"/etc/passwd"] {
            let archive = archived(&stream(&[file(name, 0), vec![Entry::End]].concat()), "app.log").unwrap();
            assert!(archive.starts_with(b"app.log\0"));
            let inside = [vec![Entry::Directory(name.to_vec(), about)], file(name, 0)].concat();
            assert!(archived(&stream(&inside), "logs").is_err());
        }
        let dir = || Entry::Directory(b"d".to_vec(), about);
        let link = || Entry::Link(b"x".to_vec(), b"/etc".to_vec(), about);
        for (entries, name) in [
            (vec![dir(), link(), Entry::Directory(b"x".to_vec(), about)], "d"),
            (file(b".", 0), "."),
            (vec![link(), Entry::End], "."),
            (file(b"f", u64::MAX), "f"),
            (vec![Entry::Enter(b"d".to_vec())], "d"),
            (vec![dir(), Entry::Same(b"a".to_vec(), vec![b"x".to_vec()])], "d"),
            (vec![dir()], "d"),
        ] {
            assert!(archived(&stream(&entries), name).is_err(), "{entries:?}");
        }
    }

    #[test]
    fn changes_become_a_layer_and_a_root_a_whole_archive() {
        let about = About { mode: 0o644, uid: 7, gid: 8, mtime_s: 0, mtime_ns: 0 };
        let dir = |name: &[u8]| Entry::Directory(name.to_vec(), about);
        let pipe = Entry::Special(b"pipe".to_vec(), Special::Pipe, about);
        let null = Entry::Special(b"null".to_vec(), Special::Character(1, 3), about);
        let changes = [
            dir(b"."),
            Entry::InImage,
            dir(b"etc"),
            Entry::Opaque,
            Entry::Gone(b"group".to_vec()),
            null.clone(),
            pipe.clone(),
            Entry::Leave,
            Entry::Leave,
            Entry::End,
        ];
        let archive = |entries: &[Entry], content| {
            let mut out = Writer::new(Vec::new());
            entries.iter().for_each(|entry| out.say(entry).unwrap());
            let mut archive = Vec::new();
            receive(out.into_inner().as_slice(), b".", content, &mut archive).map(|_| archive)
        };
        let list = |archive: &[u8]| {
            let mut tar =
                Command::new("tar").args(["-t", "-v"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            tar.stdin.take().unwrap().write_all(archive).unwrap();
            String::from_utf8(tar.wait_with_output().unwrap().stdout).unwrap()
        };
        let listed = list(&archive(&changes, Content::Layer).unwrap());
        let names: Vec<&str> = listed.lines().filter_map(|line| line.split(' ').next_back()).collect();
        assert_eq!(names, ["./", "etc/", "etc/.wh..wh..opq", "etc/.wh.group", "etc/null", "etc/pipe"], "{listed}");
        assert!(
            listed.contains("crw-r--r-- 7/8") && listed.contains("1,3") && listed.contains("prw-r--r--"),
            "{listed}"
        );
        for content in [Content::Files, Content::Root] {
            assert!(archive(&changes, content).is_err(), "{content:?}");
        }
        let root = [dir(b"."), null, pipe, Entry::Leave, Entry::End];
        assert!(archive(&root, Content::Root).is_ok() && archive(&root, Content::Files).is_err());
        let hostile = [dir(b"."), dir(b".wh.x"), Entry::Leave, Entry::Leave, Entry::End];
        assert!(archive(&hostile, Content::Layer).unwrap_err().to_string().contains("of this name"));
    }

    #[test]
    fn files_of_proc_and_sys_have_their_actual_content() {
        for path in ["/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled"] {
            let Ok(content) = fs::read(path) else { continue };
            let place = tempfile::tempdir().unwrap();
            unpacked(&archived(&sent(Path::new(path)), "file").unwrap(), place.path());
            assert_eq!(fs::read(place.path().join("file")).unwrap(), content);
        }
    }

    #[test]
    fn hard_links_and_attributes_of_a_root_are_kept_and_lead_only_to_files_in_it() {
        let place = tempfile::tempdir().unwrap();
        let (from, to) = (place.path().join("from"), place.path().join("to"));
        fs::create_dir_all(from.join("sub")).unwrap();
        fs::write(from.join("a"), "content").unwrap();
        fs::hard_link(from.join("a"), from.join("sub/b")).unwrap();
        fs::hard_link(from.join("a"), from.join("z")).unwrap();
        let name = "user.husk";
        let is_supported =
            rustix::fs::setxattr(from.join("a"), name, b"a\n=b", rustix::fs::XattrFlags::empty()).is_ok();
        let mut stream = Vec::new();
        tree::send_root(&from, &mut stream).unwrap();
        let mut archive = Vec::new();
        receive(stream.as_slice(), b".", Content::Root, &mut archive).unwrap();
        unpacked(&archive, &to);
        assert_eq!(fs::metadata(to.join("a")).unwrap().nlink(), 3);
        assert_eq!(fs::read(to.join("sub/b")).unwrap(), b"content");
        let record = b"31 SCHILY.xattr.user.husk=a\n=b\n";
        assert_eq!(
            archive.windows(record.len()).filter(|bytes| bytes == record).count(),
            3 * usize::from(is_supported)
        );

        let about = About { mode: 0o644, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 };
        let file = |name: &[u8]| [Entry::File(name.to_vec(), about, 0), Entry::Piece(0)];
        let same = |names: &[&[u8]]| Entry::Same(b"z".to_vec(), names.iter().map(|name| name.to_vec()).collect());
        let received = |entries: &[Entry], content| {
            let mut out = Writer::new(Vec::new());
            out.say(&Entry::Directory(b".".to_vec(), about)).unwrap();
            entries.iter().chain([&Entry::Leave, &Entry::End]).for_each(|entry| out.say(entry).unwrap());
            receive(out.into_inner().as_slice(), b".", content, &mut Vec::new())
        };
        let linked = |last: Entry| [&[Entry::Linked][..], &file(b"a"), &[last]].concat();
        assert_eq!(received(&linked(same(&[b"a"])), Content::Layer).unwrap().entries, 3);
        let link = Entry::Link(b"x".to_vec(), b"/etc".to_vec(), about);
        let many = vec![Entry::Attribute(b"user.a".to_vec(), vec![0; 8 << 10]); 9];
        for (entries, content) in [
            (linked(same(&[b"a"])), Content::Files),
            (linked(same(&[b"..", b"a"])), Content::Root),
            (linked(same(&[])), Content::Root),
            ([&file(b"a")[..], &[same(&[b"a"])]].concat(), Content::Root),
            (vec![Entry::Linked, link, same(&[b"x"])], Content::Root),
            (vec![Entry::Attribute(Vec::new(), Vec::new())], Content::Root),
            (many, Content::Root),
        ] {
            assert!(received(&entries, content).is_err(), "{entries:?}");
        }
    }
}
