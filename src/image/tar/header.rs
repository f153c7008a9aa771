//! Parses tar headers: POSIX ustar, and the number extensions of GNU and star.

use anyhow::{Context, Result, ensure};

/// The size of a record, the unit of an archive.
pub const RECORD_BYTES: usize = 512;

/// A header with a valid checksum.
pub struct Header {
    record: [u8; RECORD_BYTES],
}

impl Header {
    /// Parses a record as a header.
    pub fn parse(record: [u8; RECORD_BYTES]) -> Result<Header> {
        let header = Header { record };
        let expected = octal(header.field::<148, 8>()).ok().context("it is not a tar archive")?;
        let counted = |is_signed: bool| -> i64 {
            let bytes = record.iter().enumerate();
            let value = |byte: u8| if is_signed { i64::from(byte as i8) } else { i64::from(byte) };
            bytes.map(|(at, &byte)| value(if (148..156).contains(&at) { b' ' } else { byte })).sum()
        };
        // Some old programs summed signed bytes.
        ensure!([counted(false), counted(true)].contains(&(expected as i64)), "a header has a wrong checksum");
        Ok(header)
    }

    fn field<const AT: usize, const LEN: usize>(&self) -> &[u8] {
        const { assert!(AT + LEN <= RECORD_BYTES) };
        &self.record[AT..AT + LEN]
    }

    pub fn kind(&self) -> u8 {
        self.record[156]
    }

    /// The path, including the ustar prefix.
    pub fn path(&self) -> Vec<u8> {
        let name = text(self.field::<0, 100>());
        let prefix = text(self.field::<345, 155>());
        // GNU's magic differs, and its headers use that field otherwise.
        if self.field::<257, 6>() == b"ustar\0" && !prefix.is_empty() {
            [prefix, b"/", name].concat()
        } else {
            name.to_vec()
        }
    }

    pub fn link(&self) -> Vec<u8> {
        text(self.field::<157, 100>()).to_vec()
    }

    pub fn mode(&self) -> Result<u16> {
        Ok((number(self.field::<100, 8>()).context("its mode")? & 0o7777) as u16)
    }

    pub fn uid(&self) -> Result<u32> {
        u32::try_from(number(self.field::<108, 8>())?).context("its owner")
    }

    pub fn gid(&self) -> Result<u32> {
        u32::try_from(number(self.field::<116, 8>())?).context("its group")
    }

    pub fn size_bytes(&self) -> Result<u64> {
        u64::try_from(number(self.field::<124, 12>())?).context("its size")
    }

    pub fn mtime_seconds(&self) -> Result<i64> {
        number(self.field::<136, 12>()).context("its time")
    }

    pub fn major(&self) -> Result<u32> {
        u32::try_from(number(self.field::<329, 8>())?).context("its device number")
    }

    pub fn minor(&self) -> Result<u32> {
        u32::try_from(number(self.field::<337, 8>())?).context("its device number")
    }

    /// GNU's sparse map: four parts, whether more follow, and the file's size.
    pub fn gnu_sparse(&self) -> (&[u8], bool, &[u8]) {
        (self.field::<386, 96>(), self.record[482] != 0, self.field::<483, 12>())
    }
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Parses a number in octal or, with the first bit set, in two's complement binary.
pub fn number(field: &[u8]) -> Result<i64> {
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => {
            // The second bit is the sign.
            let start = if first & 0x40 != 0 { i128::from(*first) - 256 } else { i128::from(first & 0x7f) };
            let value = rest.iter().try_fold(start, |value, &byte| {
                let value = value << 8 | i128::from(byte);
                i64::try_from(value).is_ok().then_some(value)
            });
            value.and_then(|value| i64::try_from(value).ok()).context("the number is too large")
        }
        field => i64::try_from(octal(field)?).context("the number is too large"),
    }
}

fn octal(field: &[u8]) -> Result<u64> {
    let is_space = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !is_space(byte)).unwrap_or(field.len());
    let digits = field[start..].split(is_space).next().unwrap_or_default();
    digits.iter().try_fold(0u64, |value, &digit| {
        ensure!(matches!(digit, b'0'..=b'7'), "not a number");
        // Twelve octal digits cannot overflow.
        Ok(value << 3 | u64::from(digit - b'0'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        for (field, value) in [
            (&b"0000644\0"[..], 0o644),
            (b"  644 \0 ", 0o644),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"777777777777", 0o777_777_777_777),
            (b"\x80\0\0\0\0\0\x01\0", 256),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", -2),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", i64::MAX),
        ] {
            assert_eq!(number(field).unwrap(), value, "{field:?}");
        }
        for field in [
            &b"12x\0"[..],
            b"9",
            b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        ] {
            assert!(number(field).is_err(), "{field:?}");
        }
    }

    #[test]
    fn text_is_not_an_archive() {
        assert!(Header::parse([b'a'; RECORD_BYTES]).is_err());
        let mut record = [0; RECORD_BYTES];
        record[148..156].copy_from_slice(b"0000401\0");
        assert!(Header::parse(record).is_err());
        record[148..156].copy_from_slice(b"0000400\0");
        assert!(Header::parse(record).is_ok());
    }
}
