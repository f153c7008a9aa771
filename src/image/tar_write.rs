//! Writes tar archives, above all of a stream from `husk cp`, `export` or `commit`: in ustar format, with pax extended headers for names and numbers
//! that do not fit (POSIX.1-2017, pax, "pax Interchange Format").
//!
//! The archive is created on the host and not in the guest, so that it contains only the requested name.

use std::io::{self, Read, Write};

use anyhow::{Context, Result, ensure};
use husk_protocol::tree::{About, Copied, Entries, Entry, Special};

use super::tar::shown;

/// The size of a header, to which contents are padded.
const RECORD_BYTES: usize = 512;
/// The maximum length of a name and a link target in a header.
const NAME_MAX_BYTES: usize = 100;
/// The maximum user or group ID (seven octal digits), size and time (eleven).
const OWNER_MAX: u64 = 0o7_777_777;
const NUMBER_MAX: u64 = 0o77_777_777_777;

/// The marks of an image's layer (OCI image specification, layer.md): a file or directory that is gone, and a directory that hides the one
/// below.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

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
    let mut entries = Entries::new(input, false);
    let mut copied = Copied::default();
    // The path of the current directory with a trailing slash, and its length before each nested directory.
    let (mut path, mut outer) = (Vec::new(), Vec::new());
    while let Some(entry) = entries.next_entry()? {
        let Some(own) = entry.name() else {
            match entry {
                Entry::Leave => path.truncate(outer.pop().unwrap_or(0)),
                Entry::InImage if content == Content::Layer => {}
                Entry::Opaque if content == Content::Layer => mark(&[&path, OPAQUE].concat(), out)?,
                _ => anyhow::bail!("the guest sent invalid data"),
            }
            continue;
        };
        ensure!(
            content != Content::Layer || !own.starts_with(WHITEOUT),
            "{}: a layer cannot contain a file of this name",
            shown(&[&path, own].concat())
        );
        let outside_bytes = path.len();
        path.extend_from_slice(if outer.is_empty() { name } else { own });
        ensure!(name != b"." || entry.is_dir() || !outer.is_empty(), "the guest did not send a directory");
        match &entry {
            Entry::Directory(_, about) => {
                path.push(b'/');
                head(Type::of(b'5'), &path, b"", 0, about, out)?;
                // The names in a root file system do not begin with `./`.
                if outer.is_empty() && content != Content::Files {
                    path.clear();
                }
                outer.push(outside_bytes);
            }
            Entry::File(_, about, size_bytes) => {
                head(Type::of(b'0'), &path, b"", *size_bytes, about, out)?;
                copy_content(&mut entries, *size_bytes, out).with_context(|| shown(&path))?;
                copied.bytes += size_bytes;
                path.truncate(outside_bytes);
            }
            Entry::Link(_, target, about) => {
                head(Type::of(b'2'), &path, target, 0, about, out)?;
                path.truncate(outside_bytes);
            }
            Entry::Special(_, special, about) if content != Content::Files => {
                head(Type::from(*special), &path, b"", 0, about, out)?;
                path.truncate(outside_bytes);
            }
            Entry::Gone(name) if content == Content::Layer && !outer.is_empty() => {
                path.truncate(outside_bytes);
                mark(&[&path, WHITEOUT, name].concat(), out)?;
            }
            _ => anyhow::bail!("the guest sent invalid data"),
        }
        copied.entries += 1;
    }
    end(out)?;
    Ok(copied)
}

/// Writes a file of `size_bytes` that anybody can read, from 1970. Fails if `content` is shorter.
pub fn file(name: &str, size_bytes: u64, content: impl Read, out: &mut impl Write) -> Result<()> {
    let about = About { mode: 0o644, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 };
    head(Type::of(b'0'), name.as_bytes(), b"", size_bytes, &about, out)?;
    let copied_bytes = io::copy(&mut content.take(size_bytes), out)?;
    ensure!(copied_bytes == size_bytes, "{name} is shorter than {size_bytes} bytes");
    let rest_bytes = size_bytes.wrapping_neg() % RECORD_BYTES as u64;
    io::copy(&mut io::repeat(0).take(rest_bytes), out)?;
    Ok(())
}

/// Writes the end of an archive.
pub fn end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[0; 2 * RECORD_BYTES])?;
    out.flush()
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
    let rest_bytes = size_bytes.wrapping_neg() % RECORD_BYTES as u64;
    io::copy(&mut io::repeat(0).take(rest_bytes), out)?;
    Ok(())
}

/// Writes a mark of a layer, an empty file.
fn mark(name: &[u8], out: &mut impl Write) -> io::Result<()> {
    head(Type::of(b'0'), name, b"", 0, &About { mode: 0o644, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 }, out)
}

/// The type of an entry, and the numbers of a device.
#[derive(Clone, Copy)]
struct Type {
    flag: u8,
    device: [u32; 2],
}

impl Type {
    fn of(flag: u8) -> Type {
        Type { flag, device: [0; 2] }
    }
}

impl From<Special> for Type {
    fn from(special: Special) -> Type {
        match special {
            Special::Character(major, minor) => Type { flag: b'3', device: [major, minor] },
            Special::Block(major, minor) => Type { flag: b'4', device: [major, minor] },
            Special::Pipe => Type::of(b'6'),
        }
    }
}

/// Writes the headers of an entry.
fn head(kind: Type, name: &[u8], link: &[u8], size_bytes: u64, of: &About, out: &mut impl Write) -> io::Result<()> {
    let mut extended = Vec::new();
    for (keyword, value) in [("path", name), ("linkpath", link)] {
        if value.len() > NAME_MAX_BYTES {
            extend(&mut extended, keyword, value);
        }
    }
    let (uid, gid, mtime_s) = (u64::from(of.uid), u64::from(of.gid), of.mtime_s);
    let numbers = [("size", size_bytes, NUMBER_MAX), ("uid", uid, OWNER_MAX), ("gid", gid, OWNER_MAX)];
    for (keyword, value, max) in numbers.into_iter().filter(|(_, value, max)| value > max) {
        let _ = max;
        extend(&mut extended, keyword, value.to_string().as_bytes());
    }
    if !(0..=NUMBER_MAX as i64).contains(&mtime_s) {
        extend(&mut extended, "mtime", mtime_s.to_string().as_bytes());
    }
    if !extended.is_empty() {
        let len_bytes = extended.len();
        out.write_all(&header(Type::of(b'x'), b"pax", b"", len_bytes as u64, 0o644, [0, 0], 0))?;
        extended.resize(len_bytes.next_multiple_of(RECORD_BYTES), 0);
        out.write_all(&extended)?;
    }
    out.write_all(&header(kind, name, link, size_bytes, of.mode & 0o7777, [uid, gid], mtime_s))
}

/// Appends a record of an extended header: its own length in decimal (including the length field), a keyword and a
/// value.
fn extend(extended: &mut Vec<u8>, keyword: &str, value: &[u8]) {
    let rest = keyword.len() + value.len() + " =\n".len();
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    extended.extend_from_slice(format!("{len} {keyword}=").as_bytes());
    extended.extend_from_slice(value);
    extended.push(b'\n');
}

/// A ustar header, with names and numbers truncated if necessary.
fn header(
    kind: Type,
    name: &[u8],
    link: &[u8],
    size_bytes: u64,
    mode: u32,
    owners: [u64; 2],
    mtime_s: i64,
) -> [u8; RECORD_BYTES] {
    let octal = |value: u64, max: u64, digits: usize| format!("{:0digits$o}\0", value.min(max)).into_bytes();
    let [uid, gid] = owners;
    let mtime_s = u64::try_from(mtime_s).unwrap_or(0);
    let mut header = [0; RECORD_BYTES];
    // The offset of each field (POSIX.1-2017, pax, "ustar Interchange Format"). The checksum is computed with spaces in
    // its place.
    for (at, field) in [
        (0, name.get(..NAME_MAX_BYTES).unwrap_or(name).to_vec()),
        (100, octal(mode.into(), OWNER_MAX, 7)),
        (108, octal(uid, OWNER_MAX, 7)),
        (116, octal(gid, OWNER_MAX, 7)),
        (124, octal(size_bytes, NUMBER_MAX, 11)),
        (136, octal(mtime_s, NUMBER_MAX, 11)),
        (148, b"        ".to_vec()),
        (156, vec![kind.flag]),
        (157, link.get(..NAME_MAX_BYTES).unwrap_or(link).to_vec()),
        (257, b"ustar\x0000".to_vec()),
        (329, octal(kind.device[0].into(), OWNER_MAX, 7)),
        (337, octal(kind.device[1].into(), OWNER_MAX, 7)),
    ] {
        if let Some(place) = header.get_mut(at..at + field.len()) {
            place.copy_from_slice(&field);
        }
    }
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    if let Some(place) = header.get_mut(148..156) {
        place.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::Path;
    use std::process::{Command, Stdio};

    use husk_protocol::tree::{self, Writer};

    use super::*;

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
    fn a_record_includes_its_own_length() {
        for (len, start) in [(1, "10 path=".len()), (90, 100), (91, 102), (989, 999)] {
            let mut line = Vec::new();
            extend(&mut line, "path", &vec![b'x'; len]);
            let text = String::from_utf8(line).unwrap();
            let (length, _) = text.split_once(' ').unwrap();
            assert_eq!(length.parse(), Ok(text.len()), "{start}");
        }
    }

    #[test]
    fn large_numbers_use_an_extended_header() {
        let mut out = Vec::new();
        let of = About::from(&fs::metadata("/proc/self/exe").unwrap());
        head(Type::of(b'0'), b"big", b"", NUMBER_MAX + 1, &of, &mut out).unwrap();
        assert!(out.starts_with(b"pax\0") && out.windows(20).any(|bytes| bytes == b"size=8589934592\n\0\0\0\0"));
    }
}
