//! SHA-256 digests of content, and their validation in untrusted input, so that they can be used as file names.

use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

use anyhow::{Context, Error, Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

const PREFIX: &str = "sha256:";

/// The SHA-256 of a content, written `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// The hexadecimal digits, used as a file name.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The first digits, for display.
    pub fn short(&self) -> String {
        self.0.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
    }

    /// The digest with these digits.
    pub fn from_hex(hex: &str) -> Option<Digest> {
        let digits = hex.as_bytes();
        // According to the specification there are no capital letters, so that a digest has a unique name.
        let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if digits.len() != 64 || !digits.iter().all(is_digit) {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(hex.get(at..at + 2)?, 16).ok()?;
        }
        Some(Digest(bytes))
    }

    /// The first half, for fields of sixteen bytes.
    pub fn first_half(&self) -> [u8; 16] {
        std::array::from_fn(|at| self.0[at])
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest> {
        let hex = text.strip_prefix(PREFIX);
        let shown = || format!("{:?} is not a SHA-256 digest", text.chars().take(80).collect::<String>());
        hex.and_then(Digest::from_hex).with_context(shown)
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Digest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A hash computation.
#[derive(Clone, Default)]
pub struct Hasher {
    hash: Sha256,
    len_bytes: u64,
}

impl Hasher {
    /// Adds to what is hashed.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.len_bytes += bytes.len() as u64;
    }

    /// The number of bytes hashed.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The digest of the data.
    pub fn digest(self) -> Digest {
        Digest(self.hash.finalize().into())
    }
}

/// Hashes what is written.
impl Write for Hasher {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.update(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A reader that hashes everything read through it.
pub struct Hashing<R> {
    reader: R,
    hasher: Hasher,
}

impl<R: Read> Hashing<R> {
    /// Hashes everything read from `reader`.
    pub fn new(reader: R) -> Hashing<R> {
        Hashing { reader, hasher: Hasher::default() }
    }

    /// The hash of what was read.
    pub fn into_hasher(self) -> Hasher {
        self.hasher
    }

    /// Fails unless all data read has this digest.
    pub fn verify(self, digest: Digest) -> Result<()> {
        let found = self.hasher.digest();
        ensure!(found == digest, "its digest is {found}, not {digest}");
        Ok(())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.reader.read(buffer)?;
        self.hasher.update(&buffer[..len]);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_digest_is_rejected() {
        let digest = Digest::of(b"");
        assert_eq!(digest.hex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        let hex = digest.hex();
        for text in [
            hex.clone(),
            format!("sha512:{hex}"),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha256:{hex}0"),
            format!("sha256:../{}", &hex[3..]),
            format!("sha256:é{}", &hex[2..]),
            "sha256:".into(),
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    #[test]
    fn content_is_verified_while_reading() {
        let mut reader = Hashing::new(&b"abc"[..]);
        io::copy(&mut reader, &mut io::sink()).unwrap();
        assert_eq!(reader.hasher.len_bytes(), 3);
        assert!(reader.verify(Digest::of(b"abc")).is_ok());
        assert!(Hashing::new(&b"abc"[..]).verify(Digest::of(b"abc")).is_err(), "nothing was read");
    }
}
