//! Parses the formats of sparse files in tar.

use std::io::Read;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use super::header::{self, Header, RECORD_BYTES};
use super::pax;

/// Each takes sixteen bytes of memory.
const MAX_PARTS: usize = 1 << 20;

/// A sparse file's size, and its parts in the archive.
pub struct Map {
    pub size_bytes: u64,
    pub parts: Vec<Range<u64>>,
}

impl Map {
    /// Creates the map from alternating offsets and lengths.
    pub fn from_numbers(size_bytes: u64, numbers: &[u64]) -> Result<Map> {
        let (pairs, odd) = numbers.as_chunks();
        ensure!(odd.is_empty(), "a sparse file has a region without a length");
        let parts = pairs.iter().map(|&[offset, len]| part(offset, len)).collect::<Result<Vec<_>>>()?;
        Ok(Map { size_bytes, parts })
    }

    /// Rejects parts out of order or beyond the end, or with a total that differs from the content's size.
    pub fn check(&self, content_bytes: u64) -> Result<()> {
        let mut end = 0;
        let mut total_bytes: u64 = 0;
        for part in &self.parts {
            ensure!(part.start >= end && part.end <= self.size_bytes, "a sparse file has an invalid map");
            end = part.end;
            // The parts do not overlap, so the total does not exceed the size.
            total_bytes += part.end - part.start;
        }
        ensure!(total_bytes == content_bytes, "a sparse file has an invalid map");
        Ok(())
    }
}

fn part(offset: u64, len: u64) -> Result<Range<u64>> {
    Ok(offset..offset.checked_add(len).context("a sparse file has a region that is too large")?)
}

/// GNU's oldest format: four parts in the header, and more in the records after it.
pub fn read_gnu(header: &Header, reader: &mut impl Read) -> Result<Map> {
    let (in_header, mut more, size) = header.gnu_sparse();
    let size_bytes = u64::try_from(header::number(size)?)?;
    let mut parts = Vec::new();
    let mut take = |field: &[u8]| -> Result<()> {
        for pair in field.chunks_exact(24) {
            // Unused entries are empty.
            if pair[0] == 0 || pair[12] == 0 {
                break;
            }
            let (offset, len) = (header::number(&pair[..12])?, header::number(&pair[12..])?);
            parts.push(part(u64::try_from(offset)?, u64::try_from(len)?)?);
        }
        ensure!(parts.len() <= MAX_PARTS, "a sparse file has too many regions");
        Ok(())
    };
    take(in_header)?;
    while more {
        let mut record = [0; RECORD_BYTES];
        reader.read_exact(&mut record)?;
        take(&record[..504])?;
        more = record[504] != 0;
    }
    Ok(Map { size_bytes, parts })
}

/// GNU's newest format: decimal numbers, one per line, at the start of the content, padded to a record.
pub fn read_content(content: &mut impl Read, size_bytes: u64) -> Result<Map> {
    let mut lines = Lines { content, record: [0; RECORD_BYTES], at: RECORD_BYTES };
    let count = usize::try_from(lines.number()?)?;
    ensure!(count <= MAX_PARTS, "a sparse file has too many regions");
    let mut parts = Vec::new();
    for _ in 0..count {
        let (offset, len) = (lines.number()?, lines.number()?);
        parts.push(part(offset, len)?);
    }
    Ok(Map { size_bytes, parts })
}

struct Lines<'a, R> {
    content: &'a mut R,
    record: [u8; RECORD_BYTES],
    at: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> Result<u64> {
        let mut digits = Vec::new();
        loop {
            if self.at == RECORD_BYTES {
                self.content.read_exact(&mut self.record)?;
                self.at = 0;
            }
            let byte = self.record[self.at];
            self.at += 1;
            match byte {
                b'\n' => return pax::decimal(&digits),
                b'0'..=b'9' if digits.len() < 20 => digits.push(byte),
                _ => bail!("a sparse file has an invalid map"),
            }
        }
    }
}
