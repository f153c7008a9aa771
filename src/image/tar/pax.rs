//! Parses extended headers, POSIX's and GNU's, which override fields of the next entry's header.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::header::Header;
use super::sparse::Map;
use crate::image::erofs;
use crate::image::tree::{Attributes, Xattr};

/// The prefix of extended attributes.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// The extended headers of the next entry. Like in Go, and so in Docker, only the last POSIX header applies, and GNU's
/// long names override its names in either order.
#[derive(Default)]
pub struct Extended {
    pax: Pax,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    seen: bool,
}

/// The content of a POSIX header. An empty value removes an earlier one, so that the entry's own header applies.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size_bytes: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
    sparse: Sparse,
}

/// The three formats of sparse files in pax headers.
#[derive(Default)]
struct Sparse {
    major: Option<u64>,
    name: Option<Vec<u8>>,
    size_bytes: Option<u64>,
    /// Alternating offsets and lengths.
    numbers: Vec<u64>,
}

impl Extended {
    /// Whether there was no extended header.
    pub fn is_empty(&self) -> bool {
        !self.seen
    }

    /// Sets GNU's long name.
    pub fn set_path(&mut self, bytes: &[u8]) {
        self.seen = true;
        self.long_path = text(until_nul(bytes));
    }

    /// Sets GNU's long link target.
    pub fn set_link(&mut self, bytes: &[u8]) {
        self.seen = true;
        self.long_link = text(until_nul(bytes));
    }

    /// Parses records of `LENGTH KEYWORD=VALUE\n`, where the length includes the whole record.
    pub fn read_pax(&mut self, bytes: &[u8]) -> Result<()> {
        self.seen = true;
        // Replaces an earlier header: thousands of them do not take more memory than one.
        self.pax = Pax::default();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (keyword, value, after) = record(rest).context("a malformed extended header")?;
            self.pax.take(keyword, value).with_context(|| format!("extended header {}", super::shown(keyword)))?;
            rest = after;
        }
        Ok(())
    }

    /// The path, if it is overridden.
    pub fn take_path(&mut self) -> Option<Vec<u8>> {
        let Pax { path, sparse, .. } = &mut self.pax;
        sparse.name.take().or_else(|| self.long_path.take()).or_else(|| path.take())
    }

    /// The link target, if it is overridden.
    pub fn take_link(&mut self) -> Option<Vec<u8>> {
        self.long_link.take().or_else(|| self.pax.link.take())
    }

    /// The content size, if it is overridden.
    pub fn size_bytes(&self) -> Option<u64> {
        self.pax.size_bytes
    }

    /// The attributes, with overrides applied to the header.
    pub fn attributes(&mut self, header: &Header) -> Result<Attributes> {
        let (mtime_seconds, mtime_nanoseconds) = match self.pax.mtime {
            Some(mtime) => mtime,
            None => (header.mtime_seconds()?, 0),
        };
        let uid = self.pax.uid.map_or_else(|| header.uid(), Ok)?;
        let gid = self.pax.gid.map_or_else(|| header.gid(), Ok)?;
        let xattrs = std::mem::take(&mut self.pax.xattrs);
        let xattrs = xattrs.into_iter().map(|(name, value)| Xattr { name, value }).collect();
        Ok(Attributes { mode: header.mode()?, uid, gid, mtime_seconds, mtime_nanoseconds, xattrs })
    }

    /// The size of a sparse file whose map is at the start of its content.
    pub fn sparse_map_in_content(&self) -> Option<u64> {
        self.pax.sparse.size_bytes.filter(|_| self.pax.sparse.major() >= 1)
    }

    /// The map of a sparse file, if it is in the header.
    pub fn sparse_map(&self) -> Result<Option<Map>> {
        let sparse = &self.pax.sparse;
        let Some(size_bytes) = sparse.size_bytes.filter(|_| sparse.major() == 0) else { return Ok(None) };
        Map::from_numbers(size_bytes, &sparse.numbers).map(Some)
    }
}

impl Pax {
    fn take(&mut self, keyword: &[u8], value: &[u8]) -> Result<()> {
        match keyword {
            b"path" => self.path = text(value),
            b"linkpath" => self.link = text(value),
            b"size" => self.size_bytes = number(value)?,
            b"uid" => self.uid = number(value)?.map(u32::try_from).transpose()?,
            b"gid" => self.gid = number(value)?.map(u32::try_from).transpose()?,
            b"mtime" => self.mtime = if value.is_empty() { None } else { Some(time(value)?) },
            b"GNU.sparse.major" => self.sparse.major = number(value)?,
            b"GNU.sparse.name" => self.sparse.name = text(value),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size_bytes = number(value)?,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse.numbers.push(decimal(value)?),
            b"GNU.sparse.map" => {
                let numbers = value.split(|&byte| byte == b',').filter(|number| !number.is_empty());
                self.sparse.numbers = numbers.map(decimal).collect::<Result<_>>()?;
            }
            _ => {
                if let Some(name) = keyword.strip_prefix(XATTR_PREFIX) {
                    self.take_xattr(name, value);
                }
            }
        }
        Ok(())
    }

    /// For attributes, an empty value is valid.
    fn take_xattr(&mut self, name: &[u8], value: &[u8]) {
        if erofs::keeps_xattr(name) {
            self.xattrs.insert(name.into(), value.into());
        } else {
            log::debug!("extended attribute {} has an unsupported namespace", super::shown(name));
        }
    }
}

impl Sparse {
    fn major(&self) -> u64 {
        self.major.unwrap_or(0)
    }
}

/// The first record's keyword and value, and the rest.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|&byte| byte == b' ')?;
    let len = usize::try_from(decimal(bytes.get(..space)?).ok()?).ok()?;
    let text = bytes.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = text.iter().position(|&byte| byte == b'=')?;
    Some((&text[..equals], &text[equals + 1..], &bytes[len..]))
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn text(value: &[u8]) -> Option<Vec<u8>> {
    (!value.is_empty()).then(|| value.to_vec())
}

fn number(value: &[u8]) -> Result<Option<u64>> {
    if value.is_empty() { Ok(None) } else { decimal(value).map(Some) }
}

/// Parses an unsigned decimal number.
pub fn decimal(digits: &[u8]) -> Result<u64> {
    let text = std::str::from_utf8(digits).context("not a number")?;
    ensure!(text.bytes().all(|byte| byte.is_ascii_digit()), "not a number");
    text.parse().context("not a number")
}

/// Parses seconds since 1970, possibly negative and with a fraction, into seconds and nanoseconds.
fn time(value: &[u8]) -> Result<(i64, u32)> {
    let (is_negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let mut parts = digits.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(decimal(parts.next().unwrap_or_default())?)?;
    let fraction = parts.next().unwrap_or_default();
    ensure!(fraction.iter().all(u8::is_ascii_digit), "not a number");
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    Ok(match (is_negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_its_stated_length() {
        let (keyword, value, rest) = record(b"15 path=a=b\nc/\n12 x=12345\n").unwrap();
        assert_eq!((keyword, value, rest), (&b"path"[..], &b"a=b\nc/"[..], &b"12 x=12345\n"[..]));
        for wrong in [
            &b""[..],
            b"5 a=b",
            b"99 a=b\n",
            b"3 a=b\n",
            b"-6 a=b\n",
            b"6 ab\n",
            b" 6 a=b\n",
            b"0 a=b\n",
            b"99999999999999999999 a=b\n",
        ] {
            assert!(record(wrong).is_none(), "{:?}", wrong.escape_ascii().to_string());
        }
    }

    fn pax(records: &[(&str, &str)]) -> Vec<u8> {
        let records = records.iter().map(|(keyword, value)| {
            let rest = format!(" {keyword}={value}\n");
            let len = (rest.len()..).find(|len| len.to_string().len() + rest.len() == *len).unwrap();
            format!("{len}{rest}")
        });
        records.collect::<String>().into_bytes()
    }

    /// A file's header with owner, size and time.
    fn header() -> Header {
        let mut record = [0; 512];
        for (at, field) in
            [(0, &b"own"[..]), (108, b"0000007"), (116, b"0000010"), (124, b"5"), (136, b"11"), (156, b"0")]
        {
            record[at..at + field.len()].copy_from_slice(field);
        }
        record[148..156].fill(b' ');
        let sum: u32 = record.iter().map(|&byte| u32::from(byte)).sum();
        record[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        Header::parse(record).unwrap()
    }

    #[test]
    fn an_empty_value_reverts_to_the_header() {
        let own = Attributes { uid: 7, gid: 8, mtime_seconds: 9, ..Attributes::default() };
        let full = [
            ("path", "p"),
            ("linkpath", "l"),
            ("uid", "1"),
            ("gid", "2"),
            ("size", "3"),
            ("mtime", "4.5"),
            ("atime", "5"),
        ];
        let empty = full.map(|(keyword, _)| (keyword, ""));
        for records in [&empty[..], &[full, empty].concat()] {
            let mut extended = Extended::default();
            extended.read_pax(&pax(records)).unwrap();
            assert_eq!((extended.take_path(), extended.take_link(), extended.size_bytes()), (None, None, None));
            assert_eq!(extended.attributes(&header()).unwrap(), own);
        }
        let sparse = ["major", "minor", "name", "size", "realsize", "map"].map(|name| format!("GNU.sparse.{name}"));
        let mut extended = Extended::default();
        extended.read_pax(&pax(&sparse.each_ref().map(|name| (name.as_str(), "")))).unwrap();
        assert!(extended.sparse_map_in_content().is_none() && extended.sparse_map().unwrap().is_none());
        extended.read_pax(&pax(&[("SCHILY.xattr.user.empty", "")])).unwrap();
        assert_eq!(extended.attributes(&header()).unwrap().xattrs.len(), 1, "an attribute may be empty");
    }

    #[test]
    fn gnu_long_names_override_pax_in_either_order() {
        let both = pax(&[("path", "pax"), ("linkpath", "pax-link")]);
        for pax_first in [true, false] {
            let mut extended = Extended::default();
            if pax_first {
                extended.read_pax(&both).unwrap();
            }
            extended.set_path(b"long\0rest");
            extended.set_link(b"long-link\0");
            if !pax_first {
                extended.read_pax(&both).unwrap();
            }
            assert_eq!(extended.take_path().unwrap(), b"long", "{pax_first}");
            assert_eq!(extended.take_link().unwrap(), b"long-link", "{pax_first}");
        }
        let mut extended = Extended::default();
        extended.read_pax(&both).unwrap();
        extended.set_path(b"\0");
        assert_eq!(extended.take_path().unwrap(), b"pax", "an empty long name is none");
    }

    #[test]
    fn repeated_extended_headers_do_not_accumulate() {
        let mut extended = Extended::default();
        for n in 0..1000 {
            let name = format!("SCHILY.xattr.user.{n}");
            let records = [(name.as_str(), "value"), ("GNU.sparse.offset", "1"), ("GNU.sparse.numbytes", "1")];
            extended.read_pax(&pax(&records)).unwrap();
        }
        assert_eq!(extended.pax.sparse.numbers.len(), 2);
        let xattrs = extended.attributes(&header()).unwrap().xattrs;
        assert_eq!(xattrs.iter().map(|xattr| &*xattr.name).collect::<Vec<_>>(), [b"user.999"]);
    }

    #[test]
    fn times_have_nanoseconds_and_may_be_before_1970() {
        for (text, expected) in [
            ("0", (0, 0)),
            ("1700000000.5", (1_700_000_000, 500_000_000)),
            ("1.123456789999", (1, 123_456_789)),
            ("-1.25", (-2, 750_000_000)),
            ("-3", (-3, 0)),
        ] {
            assert_eq!(time(text.as_bytes()).unwrap(), expected, "{text}");
        }
        assert!(time(b"1.x").is_err() && time(b"").is_err() && time(b"99999999999999999999").is_err());
    }
}
