//! Files and folders as a tar archive, for who copies them to a pipe: ustar, and where that has no room for a name or a number an
//! extended header before it (POSIX.1-2017, pax, "pax Interchange Format").

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Headers are as long, and contents are filled up to a multiple of it.
const RECORD_BYTES: usize = 512;
/// Longest name, and target of a link, in a header.
const NAME_MAX_BYTES: usize = 100;
/// Largest owner's number, of seven octal digits; and largest size and time, of eleven.
const OWNER_MAX: u64 = 0o7_777_777;
const NUMBER_MAX: u64 = 0o77_777_777_777;

/// Folders in each other, at most: fewer than a path can have.
const DEPTH_MAX: usize = 1024;

/// Writes what is at `path`, and what is in it, under its own name; of a path that ends in `/.` under the name `.`. Returns what
/// was left out: devices, pipes and sockets.
pub fn send(path: &Path, out: &mut impl Write) -> io::Result<Vec<PathBuf>> {
    let contents = path.as_os_str().as_bytes().ends_with(b"/.") || path == Path::new(".");
    let name = match path.file_name() {
        _ if contents => OsStr::new(".").to_owned(),
        Some(name) => name.to_owned(),
        // A path like `..` has a name all the same, and the root has none.
        None => path.canonicalize()?.file_name().unwrap_or(OsStr::new(".")).to_owned(),
    };
    let mut left_out = Vec::new();
    walk(path, name.as_bytes(), out, &mut left_out, 0)?;
    // The end of an archive.
    out.write_all(&[0; 2 * RECORD_BYTES])?;
    out.flush()?;
    Ok(left_out)
}

fn about(path: &Path, error: &io::Error) -> io::Error {
    let text = error.to_string();
    let words = text.split(" (os error").next().unwrap_or_default();
    io::Error::new(error.kind(), format!("read {}: {words}", path.display()))
}

fn walk(path: &Path, name: &[u8], out: &mut impl Write, left_out: &mut Vec<PathBuf>, depth: usize) -> io::Result<()> {
    let metadata = if depth == 0 && name == b"." { fs::metadata(path) } else { fs::symlink_metadata(path) };
    let metadata = metadata.map_err(|error| about(path, &error))?;
    let kind = metadata.file_type();
    if kind.is_symlink() {
        let target = fs::read_link(path).map_err(|error| about(path, &error))?;
        return head(b'2', name, target.as_os_str().as_bytes(), 0, &metadata, out);
    }
    if kind.is_file() {
        return file(path, name, out);
    }
    if !kind.is_dir() {
        left_out.push(path.to_owned());
        return Ok(());
    }
    if depth >= DEPTH_MAX {
        return Err(io::Error::other(format!("{}: too many folders in each other", path.display())));
    }
    head(b'5', &[name, b"/"].concat(), b"", 0, &metadata, out)?;
    let entries = fs::read_dir(path).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let mut names: Vec<_> =
        entries.map_err(|error| about(path, &error))?.iter().map(|entry| entry.file_name()).collect();
    names.sort();
    for inner in names {
        walk(&path.join(&inner), &[name, b"/", inner.as_bytes()].concat(), out, left_out, depth + 1)?;
    }
    Ok(())
}

/// A file as it is while it is read: one that grows has the size that it had, one that shrinks ends in zeroes.
fn file(path: &Path, name: &[u8], out: &mut impl Write) -> io::Result<()> {
    let mut file = File::open(path).map_err(|error| about(path, &error))?;
    let metadata = file.metadata().map_err(|error| about(path, &error))?;
    let size_bytes = metadata.len();
    head(b'0', name, b"", size_bytes, &metadata, out)?;
    let copied_bytes = io::copy(&mut (&mut file).take(size_bytes), out).map_err(|error| about(path, &error))?;
    let missing_bytes = size_bytes.next_multiple_of(RECORD_BYTES as u64).saturating_sub(copied_bytes);
    io::copy(&mut io::repeat(0).take(missing_bytes), out).map(drop)
}

/// The headers of an entry.
fn head(kind: u8, name: &[u8], link: &[u8], size_bytes: u64, of: &Metadata, out: &mut impl Write) -> io::Result<()> {
    let mut extended = Vec::new();
    for (keyword, value) in [("path", name), ("linkpath", link)] {
        if value.len() > NAME_MAX_BYTES {
            extend(&mut extended, keyword, value);
        }
    }
    let (uid, gid, mtime_s) = (u64::from(of.uid()), u64::from(of.gid()), of.mtime());
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
        out.write_all(&header(b'x', b"pax", b"", len_bytes as u64, 0o644, [0, 0], 0))?;
        extended.resize(len_bytes.next_multiple_of(RECORD_BYTES), 0);
        out.write_all(&extended)?;
    }
    out.write_all(&header(kind, name, link, size_bytes, of.mode() & 0o7777, [uid, gid], mtime_s))
}

/// A line of an extended header: its own length in decimal digits, which count too, a keyword and a value.
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

/// A header, with as much of names and numbers as it has room for.
fn header(
    kind: u8,
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
    // Where each field begins (POSIX.1-2017, pax, "ustar Interchange Format"). The sum counts as if it were spaces.
    for (at, field) in [
        (0, name.get(..NAME_MAX_BYTES).unwrap_or(name).to_vec()),
        (100, octal(mode.into(), OWNER_MAX, 7)),
        (108, octal(uid, OWNER_MAX, 7)),
        (116, octal(gid, OWNER_MAX, 7)),
        (124, octal(size_bytes, NUMBER_MAX, 11)),
        (136, octal(mtime_s, NUMBER_MAX, 11)),
        (148, b"        ".to_vec()),
        (156, vec![kind]),
        (157, link.get(..NAME_MAX_BYTES).unwrap_or(link).to_vec()),
        (257, b"ustar\x0000".to_vec()),
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
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::{Command, Stdio};

    use super::*;

    /// What the system's tar makes of an archive, in a folder of the test's own.
    fn unpacked(archive: &[u8], to: &Path) {
        fs::create_dir_all(to).unwrap();
        let mut tar = Command::new("tar").args(["-x", "-p", "-C"]).arg(to).stdin(Stdio::piped()).spawn().unwrap();
        tar.stdin.take().unwrap().write_all(archive).unwrap();
        assert!(tar.wait().unwrap().success());
    }

    #[test]
    fn tar_unpacks_what_was_sent() {
        let place = std::env::temp_dir().join(format!("husk-init-tar-{}", std::process::id()));
        let _ = fs::remove_dir_all(&place);
        let (from, to) = (place.join("from"), place.join("to"));
        let long = "n".repeat(200);
        fs::create_dir_all(from.join(&long).join(&long)).unwrap();
        fs::write(from.join(&long).join(&long).join("deep"), vec![7; 100_000]).unwrap();
        fs::write(from.join("none"), "").unwrap();
        fs::set_permissions(from.join("none"), Permissions::from_mode(0o2751)).unwrap();
        symlink("t".repeat(300), from.join("link")).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        File::options().write(true).open(from.join("none")).unwrap().set_modified(old).unwrap();
        nix::unistd::mkfifo(&from.join("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let mut archive = Vec::new();
        assert_eq!(send(&from, &mut archive).unwrap(), [from.join("pipe")]);
        assert!(archive.len().is_multiple_of(RECORD_BYTES));
        unpacked(&archive, &to);
        assert_eq!(fs::read(to.join("from").join(&long).join(&long).join("deep")).unwrap(), vec![7; 100_000]);
        assert_eq!(fs::read_link(to.join("from/link")).unwrap(), Path::new(&"t".repeat(300)));
        let none = fs::metadata(to.join("from/none")).unwrap();
        assert_eq!((none.mode() & 0o7777, none.mtime(), none.len()), (0o2751, 1_000_000_000, 0));
        // What is in it, and not itself.
        let mut contents = Vec::new();
        send(&from.join("."), &mut contents).unwrap();
        unpacked(&contents, &place.join("contents"));
        assert!(place.join("contents/none").exists());
        assert!(
            send(&from.join("missing"), &mut contents)
                .unwrap_err()
                .to_string()
                .ends_with("missing: No such file or directory")
        );
        fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn a_line_counts_its_own_length() {
        for (len, start) in [(1, "10 path=".len()), (90, 100), (91, 102), (989, 999)] {
            let mut line = Vec::new();
            extend(&mut line, "path", &vec![b'x'; len]);
            let text = String::from_utf8(line).unwrap();
            let (said, _) = text.split_once(' ').unwrap();
            assert_eq!(said.parse(), Ok(text.len()), "{start}");
        }
    }

    #[test]
    fn numbers_that_are_too_large_stand_in_an_extended_header() {
        let mut out = Vec::new();
        let of = fs::metadata("/proc/self/exe").unwrap();
        head(b'0', b"big", b"", NUMBER_MAX + 1, &of, &mut out).unwrap();
        assert!(out.starts_with(b"pax\0") && out.windows(20).any(|bytes| bytes == b"size=8589934592\n\0\0\0\0"));
    }
}
