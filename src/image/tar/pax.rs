//! From extended headers, POSIX's and GNU's, to what they say in place of the next entry's header.

use anyhow::{Context, Result, ensure};

use super::header::Header;
use super::sparse::Map;
use crate::image::erofs;
use crate::image::tree::{Attributes, Xattr};

/// What stands before a name of an extended attribute.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What extended headers said so far.
#[derive(Default)]
pub struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size_bytes: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<Xattr>,
    sparse: Sparse,
    seen: bool,
}

/// What the three formats of sparse files in pax headers say.
#[derive(Default)]
struct Sparse {
    major: u64,
    name: Option<Vec<u8>>,
    size_bytes: Option<u64>,
    /// Offsets and lengths in turn.
    numbers: Vec<u64>,
}

impl Extended {
    /// Whether there was no extended header.
    pub fn is_empty(&self) -> bool {
        !self.seen
    }

    pub fn set_path(&mut self, bytes: &[u8]) {
        self.seen = true;
        self.path = Some(until_nul(bytes));
    }

    pub fn set_link(&mut self, bytes: &[u8]) {
        self.seen = true;
        self.link = Some(until_nul(bytes));
    }

    /// Takes records of `LENGTH KEYWORD=VALUE\n`, where the length is that of the whole record.
    pub fn read_pax(&mut self, bytes: &[u8]) -> Result<()> {
        self.seen = true;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (keyword, value, after) = record(rest).context("a malformed extended header")?;
            self.take(keyword, value).with_context(|| format!("extended header {}", super::shown(keyword)))?;
            rest = after;
        }
        Ok(())
    }

    fn take(&mut self, keyword: &[u8], value: &[u8]) -> Result<()> {
        match keyword {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size_bytes = Some(decimal(value)?),
            b"uid" => self.uid = Some(u32::try_from(decimal(value)?)?),
            b"gid" => self.gid = Some(u32::try_from(decimal(value)?)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => self.sparse.major = decimal(value)?,
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size_bytes = Some(decimal(value)?),
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

    fn take_xattr(&mut self, name: &[u8], value: &[u8]) {
        if !erofs::keeps_xattr(name) {
            log::debug!("extended attribute {} is of no namespace that can be kept", super::shown(name));
            return;
        }
        self.xattrs.retain(|xattr| &*xattr.name != name);
        self.xattrs.push(Xattr { name: name.into(), value: value.into() });
    }

    /// The path, if it does not stand in the header.
    pub fn take_path(&mut self) -> Option<Vec<u8>> {
        let path = self.path.take();
        self.sparse.name.take().or(path)
    }

    pub fn take_link(&mut self) -> Option<Vec<u8>> {
        self.link.take()
    }

    pub fn size_bytes(&self) -> Option<u64> {
        self.size_bytes
    }

    /// The header's attributes, where nothing was said in their place.
    pub fn attributes(&mut self, header: &Header) -> Result<Attributes> {
        let (mtime_seconds, mtime_nanoseconds) = match self.mtime {
            Some(mtime) => mtime,
            None => (header.mtime_seconds()?, 0),
        };
        let uid = self.uid.map_or_else(|| header.uid(), Ok)?;
        let gid = self.gid.map_or_else(|| header.gid(), Ok)?;
        let xattrs = std::mem::take(&mut self.xattrs);
        Ok(Attributes { mode: header.mode()?, uid, gid, mtime_seconds, mtime_nanoseconds, xattrs })
    }

    /// The size of a sparse file whose map stands in its content.
    pub fn sparse_map_in_content(&self) -> Option<u64> {
        self.sparse.size_bytes.filter(|_| self.sparse.major >= 1)
    }

    /// The map of a sparse file, if it stands here.
    pub fn sparse_map(&self) -> Result<Option<Map>> {
        let Some(size_bytes) = self.sparse.size_bytes.filter(|_| self.sparse.major == 0) else { return Ok(None) };
        Map::from_numbers(size_bytes, &self.sparse.numbers).map(Some)
    }
}

/// The first record's keyword and value, and what follows it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|&byte| byte == b' ')?;
    let len = usize::try_from(decimal(bytes.get(..space)?).ok()?).ok()?;
    let text = bytes.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = text.iter().position(|&byte| byte == b'=')?;
    Some((&text[..equals], &text[equals + 1..], &bytes[len..]))
}

fn until_nul(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
}

/// A decimal number without a sign.
pub fn decimal(digits: &[u8]) -> Result<u64> {
    let text = std::str::from_utf8(digits).context("no number")?;
    ensure!(text.bytes().all(|byte| byte.is_ascii_digit()), "no number");
    text.parse().context("no number")
}

/// Seconds since 1970, with a fraction, maybe before it; as seconds and the nanoseconds after them.
fn time(value: &[u8]) -> Result<(i64, u32)> {
    let (is_negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let mut parts = digits.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(decimal(parts.next().unwrap_or_default())?)?;
    let fraction = parts.next().unwrap_or_default();
    ensure!(fraction.iter().all(u8::is_ascii_digit), "no number");
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
    fn a_record_is_as_long_as_it_says() {
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
