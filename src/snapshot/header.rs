//! The header of a snapshot's state: which husk can read it, and whether it is whole.

use anyhow::{Result, bail, ensure};
use crc32fast::Hasher;

use super::DESCRIPTION_BYTES_MAX;
use crate::monitor::STATE_BYTES_MAX;

/// The size of a header.
pub const HEADER_BYTES: usize = 36;
/// The part of it that the checksum covers.
const CHECKED_BYTES: usize = 32;
const MAGIC: [u8; 8] = *b"husksnap";
/// The version of the format, of the description and of the state. Any change of them increments it.
const VERSION: u32 = 5;
/// The architecture of the guest, by its number in ELF (EM_X86_64).
const X86_64: u32 = 62;

/// A header, little-endian: magic (8 bytes), version (4), architecture (4), size of the description (8), size of the state (8),
/// CRC-32 of all this and of what follows the header (4). It finds damage, and is computed at each start: who can write to a
/// snapshot can write a checksum of any kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    description_bytes: u64,
    state_bytes: u64,
    checksum: u32,
}

impl Header {
    /// The header of a description and a state.
    pub fn of(description: &[u8], state: &[u8]) -> Header {
        let mut header =
            Header { description_bytes: description.len() as u64, state_bytes: state.len() as u64, checksum: 0 };
        header.checksum = header.checksum_of([description, state]);
        header
    }

    /// Serializes the header.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let (checked, checksum) = bytes.split_at_mut(CHECKED_BYTES);
        checked.copy_from_slice(&self.checked());
        checksum.copy_from_slice(&self.checksum.to_le_bytes());
        bytes
    }

    /// Parses a header. Fails with what is wrong about the snapshot.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Header> {
        let (words, rest) = bytes.as_chunks::<8>();
        let ([magic, kind, description_bytes, state_bytes], [c0, c1, c2, c3]) = (words, rest) else {
            bail!("not a snapshot of husk")
        };
        let [v0, v1, v2, v3, a0, a1, a2, a3] = *kind;
        let (version, architecture) = (u32::from_le_bytes([v0, v1, v2, v3]), u32::from_le_bytes([a0, a1, a2, a3]));
        ensure!(*magic == MAGIC, "not a snapshot of husk");
        ensure!(
            version == VERSION,
            "it has version {version} of the format, and husk {} reads version {VERSION}: restore it with the husk that has \
             written it, or take a new snapshot",
            env!("CARGO_PKG_VERSION")
        );
        ensure!(architecture == X86_64, "its architecture, number {architecture} of ELF, is not x86-64");
        Ok(Header {
            description_bytes: u64::from_le_bytes(*description_bytes),
            state_bytes: u64::from_le_bytes(*state_bytes),
            checksum: u32::from_le_bytes([*c0, *c1, *c2, *c3]),
        })
    }

    /// The size of what follows the header.
    pub fn content_bytes(&self) -> Result<usize> {
        let fits = self.description_bytes <= DESCRIPTION_BYTES_MAX && self.state_bytes <= STATE_BYTES_MAX;
        ensure!(fits, "it is damaged: its header has impossible sizes");
        Ok(usize::try_from(self.description_bytes + self.state_bytes)?)
    }

    /// Splits what follows the header into the description and the state. Fails if a byte of them or of the header has changed.
    pub fn split<'a>(&self, content: &'a [u8]) -> Result<(&'a [u8], &'a [u8])> {
        let parts = content.split_at_checked(usize::try_from(self.description_bytes)?);
        let whole = parts.filter(|(description, state)| self.checksum_of([description, state]) == self.checksum);
        whole.ok_or_else(|| anyhow::anyhow!("it is damaged: the checksum of its file `state` is wrong"))
    }

    fn checked(self) -> [u8; CHECKED_BYTES] {
        let kind = u64::from(X86_64) << 32 | u64::from(VERSION);
        let words = [u64::from_le_bytes(MAGIC), kind, self.description_bytes, self.state_bytes];
        let mut bytes = [0; CHECKED_BYTES];
        bytes.as_chunks_mut::<8>().0.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
        bytes
    }

    fn checksum_of(self, content: [&[u8]; 2]) -> u32 {
        let mut hasher = Hasher::new();
        hasher.update(&self.checked());
        content.iter().for_each(|part| hasher.update(part));
        hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_a_round_trip() {
        let header = Header::of(b"description", b"state");
        let parsed = Header::parse(&header.to_bytes()).unwrap();
        assert_eq!(parsed, header);
        assert_eq!(parsed.split(b"descriptionstate").unwrap(), (&b"description"[..], &b"state"[..]));
        assert!(parsed.split(b"descriptionstatE").is_err() && parsed.split(b"").is_err());
    }

    #[test]
    fn another_version_or_architecture_is_named() {
        let refused = |at: usize, value: u8| {
            let mut bytes = Header::of(b"", b"").to_bytes();
            bytes[at] = value;
            Header::parse(&bytes).unwrap_err().to_string()
        };
        assert!(refused(0, 0).contains("not a snapshot"));
        assert!(refused(8, 9).contains(&format!("version 9 of the format, and husk 0.1.0 reads version {VERSION}: ")));
        assert!(refused(12, 183).contains("number 183 of ELF"));
        let mut large = Header::of(b"", b"");
        large.state_bytes = u64::MAX;
        assert!(large.content_bytes().unwrap_err().to_string().contains("impossible sizes"));
    }
}
