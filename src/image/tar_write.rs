//! Writes tar archives: in ustar format, with pax extended headers for names and numbers that do not fit, and for extended attributes
//! (POSIX.1-2017, pax, "pax Interchange Format").

use std::io::{self, Read, Write};

use anyhow::{Result, ensure};
use husk_protocol::tree::{About, Special};

/// The size of a header, to which contents are padded.
pub(super) const RECORD_BYTES: usize = 512;
/// The maximum length of a name and a link target in a header.
const NAME_MAX_BYTES: usize = 100;
/// The maximum user or group ID (seven octal digits), size and time (eleven).
const OWNER_MAX: u64 = 0o7_777_777;
const NUMBER_MAX: u64 = 0o77_777_777_777;
/// The prefix of an extended attribute's name, which tar programs have in common.
const ATTRIBUTE_PREFIX: &[u8] = b"SCHILY.xattr.";

/// Writes a file of `size_bytes` that anybody can read, from 1970. Fails if `content` is shorter.
pub fn file(name: &str, size_bytes: u64, content: impl Read, out: &mut impl Write) -> Result<()> {
    let about = About { mode: 0o644, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 };
    head(Type::of(b'0'), name.as_bytes(), b"", size_bytes, &about, &[], out)?;
    let copied_bytes = io::copy(&mut content.take(size_bytes), out)?;
    ensure!(copied_bytes == size_bytes, "{name} is shorter than {size_bytes} bytes");
    pad(size_bytes, out)?;
    Ok(())
}

/// Writes what follows a content of `size_bytes`.
pub(super) fn pad(size_bytes: u64, out: &mut impl Write) -> io::Result<()> {
    let rest_bytes = size_bytes.wrapping_neg() % RECORD_BYTES as u64;
    io::copy(&mut io::repeat(0).take(rest_bytes), out).map(drop)
}

/// Writes the end of an archive.
pub fn end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[0; 2 * RECORD_BYTES])?;
    out.flush()
}

/// The type of an entry, and the numbers of a device.
#[derive(Clone, Copy)]
pub(super) struct Type {
    flag: u8,
    device: [u32; 2],
}

impl Type {
    /// The type with this flag, which is not a device.
    pub(super) fn of(flag: u8) -> Type {
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

/// The name and value of an extended attribute.
pub(super) type Attribute = (Vec<u8>, Vec<u8>);

/// Writes the headers of an entry.
pub(super) fn head(
    kind: Type,
    name: &[u8],
    link: &[u8],
    size_bytes: u64,
    of: &About,
    attributes: &[Attribute],
    out: &mut impl Write,
) -> io::Result<()> {
    let mut extended = Vec::new();
    for (keyword, value) in [("path", name), ("linkpath", link)] {
        if value.len() > NAME_MAX_BYTES {
            extend(&mut extended, keyword.as_bytes(), value);
        }
    }
    let (uid, gid, mtime_s) = (u64::from(of.uid), u64::from(of.gid), of.mtime_s);
    let numbers = [("size", size_bytes, NUMBER_MAX), ("uid", uid, OWNER_MAX), ("gid", gid, OWNER_MAX)];
    for (keyword, value, max) in numbers.into_iter().filter(|(_, value, max)| value > max) {
        let _ = max;
        extend(&mut extended, keyword.as_bytes(), value.to_string().as_bytes());
    }
    if !(0..=NUMBER_MAX as i64).contains(&mtime_s) {
        extend(&mut extended, b"mtime", mtime_s.to_string().as_bytes());
    }
    for (name, value) in attributes {
        extend(&mut extended, &[ATTRIBUTE_PREFIX, name].concat(), value);
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
fn extend(extended: &mut Vec<u8>, keyword: &[u8], value: &[u8]) {
    let rest = keyword.len() + value.len() + " =\n".len();
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    extended.extend_from_slice(&[len.to_string().as_bytes(), b" ", keyword, b"=", value, b"\n"].concat());
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
    use std::fs;

    use super::*;

    #[test]
    fn a_record_includes_its_own_length() {
        for (len, start) in [(1, "10 path=".len()), (90, 100), (91, 102), (989, 999)] {
            let mut line = Vec::new();
            extend(&mut line, b"path", &vec![b'x'; len]);
            let text = String::from_utf8(line).unwrap();
            let (length, _) = text.split_once(' ').unwrap();
            assert_eq!(length.parse(), Ok(text.len()), "{start}");
        }
    }

    #[test]
    fn large_numbers_use_an_extended_header() {
        let mut out = Vec::new();
        let of = About::from(&fs::metadata("/proc/self/exe").unwrap());
        head(Type::of(b'0'), b"big", b"", NUMBER_MAX + 1, &of, &[], &mut out).unwrap();
        assert!(out.starts_with(b"pax\0") && out.windows(20).any(|bytes| bytes == b"size=8589934592\n\0\0\0\0"));
    }
}
