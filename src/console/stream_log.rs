//! The log of a process's output for `husk logs`, kept byte by byte: two files of records, the older of which is
//! removed when the newer one is full.
//!
//! A record is a 16-byte header, little-endian (nanoseconds since 1970: 8, length: 4, stream and flag: 1, check: 3),
//! and the bytes. The check lets a reader find the next header after a damaged part. Clients attached to a machine's
//! control socket receive the same records.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::sys::private_file;

/// The size of a record's header.
pub const HEAD_BYTES: usize = 16;
/// The maximum content of a record. Longer writes are split.
pub const CONTENT_MAX_BYTES: usize = 64 << 10;
/// The default size limit of a log.
pub const DEFAULT_MAX_BYTES: u64 = 16 << 20;
/// The minimum size limit: each file has room for two headers and a few lines.
pub const MIN_BYTES: u64 = 4 << 10;
/// If the start of a longer line is lost, reading resumes in the middle of it.
const LINE_MAX_BYTES: usize = 16 << 10;
/// A flag next to the stream: the content continues a line of the same stream from an earlier record.
const CONTINUES: u8 = 1 << 1;

/// The stream of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output; with a terminal, all of its output; for `husk boot`, the console.
    Output,
    /// Standard error.
    Errors,
}

const STREAMS: [Stream; 2] = [Stream::Output, Stream::Errors];

/// A record's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// The length of the content in bytes.
    pub len_bytes: u32,
    /// The stream of the content.
    pub stream: Stream,
    /// Whether the content continues a line from an earlier record.
    pub continues: bool,
}

impl Head {
    /// Serializes the header.
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..8].copy_from_slice(&self.time_ns.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len_bytes.to_le_bytes());
        bytes[12] = self.stream as u8 | if self.continues { CONTINUES } else { 0 };
        let check = check_of(&bytes[..13]);
        bytes[13..].copy_from_slice(&check);
        bytes
    }

    /// Parses a header; `None` if it is invalid.
    pub fn from_bytes(bytes: [u8; HEAD_BYTES]) -> Option<Head> {
        let [t0, t1, t2, t3, t4, t5, t6, t7, l0, l1, l2, l3, stream, check @ ..] = bytes;
        let len_bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        let of_stream = *STREAMS.get(usize::from(stream & !CONTINUES))?;
        if len_bytes as usize > CONTENT_MAX_BYTES || check != check_of(bytes.get(..13)?) {
            return None;
        }
        let time_ns = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
        Some(Head { time_ns, len_bytes, stream: of_stream, continues: stream & CONTINUES != 0 })
    }
}

/// FNV-1a, folded to 24 bits as its authors recommend (RFC 9923): a false header passes once in 16 million.
fn check_of(bytes: &[u8]) -> [u8; 3] {
    let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    let [low, middle, high, _] = ((hash >> 24) ^ (hash & 0x00ff_ffff)).to_le_bytes();
    [low, middle, high]
}

/// Splits `bytes`, written now, into records.
pub fn records(stream: Stream, bytes: &[u8]) -> Vec<u8> {
    let time_ns = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64);
    let mut records = Vec::with_capacity(bytes.len() + HEAD_BYTES);
    for content in bytes.chunks(CONTENT_MAX_BYTES) {
        records
            .extend_from_slice(&Head { time_ns, len_bytes: content.len() as u32, stream, continues: false }.to_bytes());
        records.extend_from_slice(content);
    }
    records
}

/// The writer. While the disk is full, output is dropped.
#[derive(Debug)]
pub struct StreamLog {
    path: PathBuf,
    file: File,
    file_bytes: u64,
    file_max_bytes: u64,
    /// For each stream, whether the last record ended a line.
    is_at_line_start: [bool; STREAMS.len()],
    told_of_failure: bool,
}

impl StreamLog {
    /// Starts a log at `path` with a limit of `max_bytes` on the disk, or continues an existing one.
    pub fn open(path: PathBuf, max_bytes: u64) -> io::Result<StreamLog> {
        let file = private_file().append(true).create(true).open(&path)?;
        let file_bytes = file.metadata()?.len();
        let file_max_bytes = max_bytes.max(MIN_BYTES) / 2;
        let is_at_line_start = [true; STREAMS.len()];
        Ok(StreamLog { path, file, file_bytes, file_max_bytes, is_at_line_start, told_of_failure: false })
    }

    /// Adds records created by [`records`].
    pub fn append(&mut self, records: &[u8]) {
        for record in self.fitted(records) {
            if let Err(error) = self.try_append(&record) {
                // A partial record would corrupt everything after it.
                let _ = self.file.set_len(self.file_bytes);
                if !std::mem::replace(&mut self.told_of_failure, true) {
                    log::warn!(
                        "write {}: {error}; output is not logged until there is free space",
                        self.path.display()
                    );
                }
            }
        }
    }

    /// Splits the content into records that fit into a file, marking those that continue a line.
    fn fitted(&mut self, mut records: &[u8]) -> Vec<Vec<u8>> {
        let content_max_bytes = CONTENT_MAX_BYTES.min(self.file_max_bytes as usize - HEAD_BYTES);
        let mut fitted = Vec::new();
        while let Some((head, rest)) = records.split_first_chunk::<HEAD_BYTES>() {
            let Some(head) = Head::from_bytes(*head) else { break };
            let (content, rest) = rest.split_at_checked(head.len_bytes as usize).unwrap_or((rest, &[]));
            for content in content.chunks(content_max_bytes) {
                let at_start = self.is_at_line_start.get_mut(head.stream as usize);
                let continues = at_start.is_some_and(|at| !std::mem::replace(at, content.ends_with(b"\n")));
                let head = Head { len_bytes: content.len() as u32, continues, ..head };
                fitted.push([&head.to_bytes(), content].concat());
            }
            records = rest;
        }
        fitted
    }

    fn try_append(&mut self, record: &[u8]) -> io::Result<()> {
        if self.file_bytes > 0 && self.file_bytes + record.len() as u64 > self.file_max_bytes {
            self.file = rotate(&self.path)?;
            self.file_bytes = 0;
        }
        self.file.write_all(record)?;
        self.file_bytes += record.len() as u64;
        self.told_of_failure = false;
        Ok(())
    }
}

/// Renames the file at `path` to the old log, replacing that, and starts a new one.
pub fn rotate(path: &Path) -> io::Result<File> {
    match fs::rename(path, old(path)) {
        // Already renamed when there was no room for the new file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        renamed => renamed?,
    }
    private_file().append(true).create(true).open(path)
}

fn old(path: &Path) -> PathBuf {
    path.with_extension("old")
}

/// The reader, which returns existing records and then new ones.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    file: Option<File>,
    inode: Option<u64>,
    /// Data that was read, and how much of it was consumed.
    bytes: Vec<u8>,
    taken_bytes: usize,
    damaged_bytes: u64,
    /// For each stream, the maximum number of bytes still to skip until a line starts.
    to_line_start_bytes: [usize; STREAMS.len()],
}

impl LogReader {
    /// Starts with the oldest complete line in the log at `path`.
    pub fn open(path: &Path) -> LogReader {
        let mut reader = LogReader {
            path: path.to_owned(),
            file: None,
            inode: None,
            bytes: Vec::new(),
            taken_bytes: 0,
            damaged_bytes: 0,
            to_line_start_bytes: [0; STREAMS.len()],
        };
        if !reader.turn_to_oldest(&old(path)) {
            reader.turn_to(path);
        }
        reader
    }

    /// The number of bytes skipped so far because they were not valid records.
    pub fn damaged_bytes(&self) -> u64 {
        self.damaged_bytes
    }

    fn turn_to(&mut self, path: &Path) -> bool {
        self.file = File::open(path).ok();
        self.inode = self.file.as_ref().and_then(|file| file.metadata().ok()).map(|metadata| metadata.ino());
        self.bytes.clear();
        self.taken_bytes = 0;
        self.file.is_some()
    }

    /// Switches to the oldest file.
    fn turn_to_oldest(&mut self, path: &Path) -> bool {
        let is_there = self.turn_to(path);
        // If lines are as long as files, a partial line is better than none.
        let file_bytes = self.file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len());
        self.to_line_start_bytes = [LINE_MAX_BYTES.min(file_bytes as usize / 2); STREAMS.len()];
        is_there
    }

    /// The next record, if there is one yet.
    pub fn read(&mut self) -> io::Result<Option<(Head, Vec<u8>)>> {
        loop {
            match self.take() {
                Some((head, content)) => {
                    let content = self.without_line_rest(&head, content);
                    if !content.is_empty() {
                        return Ok(Some((head, content)));
                    }
                }
                None if !self.fill()? => return Ok(None),
                None => {}
            }
        }
    }

    /// The next complete record of the data that was read. Skips bytes that are not a valid header.
    fn take(&mut self) -> Option<(Head, Vec<u8>)> {
        loop {
            let (head, rest) = self.bytes.get(self.taken_bytes..)?.split_first_chunk::<HEAD_BYTES>()?;
            let Some(head) = Head::from_bytes(*head) else {
                self.taken_bytes += 1;
                self.damaged_bytes += 1;
                continue;
            };
            let content = rest.get(..head.len_bytes as usize)?.to_vec();
            self.taken_bytes += HEAD_BYTES + content.len();
            return Some((head, content));
        }
    }

    /// Removes the rest of a line whose start is no longer in any file.
    fn without_line_rest(&mut self, head: &Head, content: Vec<u8>) -> Vec<u8> {
        let Some(left_bytes) = self.to_line_start_bytes.get_mut(head.stream as usize) else { return content };
        if *left_bytes == 0 || !head.continues {
            *left_bytes = 0;
            return content;
        }
        match content.iter().position(|byte| *byte == b'\n').filter(|end| end < left_bytes) {
            Some(end) => {
                *left_bytes = 0;
                content.get(end + 1..).unwrap_or_default().to_vec()
            }
            None => {
                let left_out_bytes = content.len().min(*left_bytes);
                *left_bytes -= left_out_bytes;
                content.get(left_out_bytes..).unwrap_or_default().to_vec()
            }
        }
    }

    /// Reads more, from the next file if this one has ended. Returns false if there is nothing to read.
    fn fill(&mut self) -> io::Result<bool> {
        // Checked before this file is read to its end: a file that is no longer the current one does not grow
        // afterwards.
        let (current, previous) = (inode_of(&self.path), inode_of(&old(&self.path)));
        self.bytes.drain(..self.taken_bytes);
        self.taken_bytes = 0;
        if let Some(file) = &mut self.file {
            let mut buffer = vec![0; CONTENT_MAX_BYTES];
            let count = file.read(&mut buffer)?;
            self.bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
            if count > 0 {
                return Ok(true);
            }
            // A partial record is read again: on a full disk it is removed, and another one may take its place.
            file.seek_relative(-(self.bytes.len() as i64))?;
            self.bytes.clear();
        }
        if current.is_none() || current == self.inode {
            return Ok(false);
        }
        if previous.is_none() || previous == self.inode {
            return Ok(self.turn_to(&self.path.clone()));
        }
        // A reader slower than the time to fill two files continues with the older remaining file.
        Ok(self.turn_to_oldest(&old(&self.path)))
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    fs::metadata(path).map(|metadata| metadata.ino()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(max_bytes: u64) -> (tempfile::TempDir, PathBuf, StreamLog) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("streams.log");
        let log = StreamLog::open(path.clone(), max_bytes).unwrap();
        (dir, path, log)
    }

    fn rest(reader: &mut LogReader) -> Vec<(Stream, Vec<u8>)> {
        std::iter::from_fn(|| reader.read().unwrap()).map(|(head, content)| (head.stream, content)).collect()
    }

    #[test]
    fn bytes_are_read_back_with_their_stream() {
        let (_dir, path, mut log) = log(DEFAULT_MAX_BYTES);
        let mut reader = LogReader::open(&path);
        assert_eq!(rest(&mut reader), []);
        log.append(&records(Stream::Output, b"a\0\xff\n"));
        log.append(&records(Stream::Errors, b"b"));
        assert_eq!(rest(&mut reader), [(Stream::Output, b"a\0\xff\n".to_vec()), (Stream::Errors, b"b".to_vec())]);
        let long = vec![7; CONTENT_MAX_BYTES + 1];
        log.append(&records(Stream::Output, &long));
        assert_eq!(rest(&mut reader).concat_contents(), long);
        assert_eq!(rest(&mut LogReader::open(&path)).len(), 4);
    }

    trait Contents {
        fn concat_contents(&self) -> Vec<u8>;
    }

    impl Contents for Vec<(Stream, Vec<u8>)> {
        fn concat_contents(&self) -> Vec<u8> {
            self.iter().flat_map(|(_, content)| content.clone()).collect()
        }
    }

    #[test]
    fn a_log_stays_within_its_size_and_a_reader_that_keeps_up_loses_nothing() {
        let max_bytes = 256 << 10;
        let (dir, path, mut log) = log(max_bytes);
        let mut reader = LogReader::open(&path);
        let mut read = Vec::new();
        for n in 0..20_000_u32 {
            log.append(&records(Stream::Output, format!("line {n} {:>80}\n", "").as_bytes()));
            if n % 100 == 0 {
                read.extend(rest(&mut reader).concat_contents());
            }
        }
        read.extend(rest(&mut reader).concat_contents());
        let text = String::from_utf8(read).unwrap();
        assert!(text.lines().enumerate().all(|(n, line)| line.starts_with(&format!("line {n} "))));
        assert_eq!(text.lines().count(), 20_000);
        let sizes: u64 = fs::read_dir(&dir).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(sizes <= max_bytes, "{sizes}");
        let late = rest(&mut LogReader::open(&path)).concat_contents();
        assert!(late.len() as u64 > max_bytes / 4 && text.as_bytes().ends_with(&late));
        assert!(late.starts_with(b"line "));
    }

    #[test]
    fn a_reopened_log_is_continued() {
        let (_dir, path, mut first) = log(DEFAULT_MAX_BYTES);
        first.append(&records(Stream::Output, b"one"));
        drop(first);
        StreamLog::open(path.clone(), DEFAULT_MAX_BYTES).unwrap().append(&records(Stream::Output, b"two"));
        assert_eq!(rest(&mut LogReader::open(&path)).concat_contents(), b"onetwo");
    }

    #[test]
    fn a_log_keeps_its_size_and_starts_with_a_line() {
        let text: String = (1..=50_000).map(|n| format!("{n}\n")).collect();
        for max_bytes in [MIN_BYTES, 10_000, 64 << 10, 1 << 20] {
            for write_bytes in [1_000, 4_096, 65_536, text.len()] {
                let (dir, path, mut log) = log(max_bytes);
                for bytes in text.as_bytes().chunks(write_bytes) {
                    log.append(&records(Stream::Output, bytes));
                }
                let sizes: u64 = fs::read_dir(&dir).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
                assert!(sizes <= max_bytes, "{sizes} of {max_bytes}");
                let kept = String::from_utf8(rest(&mut LogReader::open(&path)).concat_contents()).unwrap();
                assert!(
                    text.ends_with(&kept) && kept.len() as u64 > max_bytes.min(text.len() as u64) / 4,
                    "{}",
                    kept.len()
                );
                let first = kept.lines().next().unwrap();
                assert!(text.starts_with(&kept) || text.contains(&format!("\n{first}\n")), "{first}");
            }
        }
    }

    #[test]
    fn an_endless_line_starts_anywhere_and_streams_have_separate_lines() {
        let (_dir, path, mut log) = log(MIN_BYTES);
        (0..100).for_each(|_| log.append(&records(Stream::Output, &[b'x'; 500])));
        (0..3).for_each(|_| log.append(&records(Stream::Errors, b"whole\n")));
        let kept = rest(&mut LogReader::open(&path));
        assert!(kept.iter().any(|(stream, _)| *stream == Stream::Errors));
        assert!(kept.iter().any(|(stream, _)| *stream == Stream::Output), "half a line is worth more than none");
        let (_dir, path, mut log) = self::log(1 << 20);
        (0..10_000).for_each(|_| log.append(&records(Stream::Output, &[b'x'; 500])));
        assert!(rest(&mut LogReader::open(&path)).concat_contents().len() > 400_000);
    }

    #[test]
    fn damaged_parts_are_skipped() {
        for damage in [vec![0; 40], vec![0xff; 40], vec![b'1'; 40]] {
            let (_dir, path, mut log) = log(DEFAULT_MAX_BYTES);
            (1..=9).for_each(|n| log.append(&records(Stream::Output, format!("line {n}\n").as_bytes())));
            let mut bytes = fs::read(&path).unwrap();
            bytes[33..73].copy_from_slice(&damage);
            fs::write(&path, bytes).unwrap();
            let mut reader = LogReader::open(&path);
            let kept = String::from_utf8(rest(&mut reader).concat_contents()).unwrap();
            assert_eq!(kept, "line 1\nline 5\nline 6\nline 7\nline 8\nline 9\n");
            assert_eq!(reader.damaged_bytes(), 3 * 23);
        }
        let (_dir, path, mut log) = log(DEFAULT_MAX_BYTES);
        log.append(&records(Stream::Output, b"good"));
        fs::write(&path, [fs::read(&path).unwrap(), vec![0xff; 40]].concat()).unwrap();
        let mut reader = LogReader::open(&path);
        assert_eq!(rest(&mut reader).concat_contents(), b"good");
        assert!(reader.damaged_bytes() > 0);
        for bytes in [[0; HEAD_BYTES], [1; HEAD_BYTES], [0xff; HEAD_BYTES]] {
            assert_eq!(Head::from_bytes(bytes), None);
        }
    }

    #[test]
    fn a_partial_record_may_be_replaced() {
        let (_dir, path, mut log) = log(DEFAULT_MAX_BYTES);
        log.append(&records(Stream::Output, b"one"));
        let half = &records(Stream::Output, &[0xff; 500])[..300];
        fs::write(&path, [fs::read(&path).unwrap(), half.to_vec()].concat()).unwrap();
        let mut reader = LogReader::open(&path);
        assert_eq!(rest(&mut reader).concat_contents(), b"one");
        log.file.set_len(log.file_bytes).unwrap();
        assert_eq!(rest(&mut reader).concat_contents(), b"");
        log.append(&records(Stream::Output, &[b'x'; 400]));
        assert_eq!(rest(&mut reader).concat_contents(), [b'x'; 400]);
    }

    #[test]
    fn a_file_that_could_not_be_created_is_created_later() {
        let (dir, path, mut log) = log(256 << 10);
        let content = vec![7; 64 << 10];
        (0..2).for_each(|_| log.append(&records(Stream::Output, &content)));
        // The state if there was room for the name but not for the file.
        fs::rename(&path, dir.path().join("streams.old")).unwrap();
        log.append(&records(Stream::Output, b"later"));
        assert!(rest(&mut LogReader::open(&path)).concat_contents().ends_with(b"later"));
    }

    #[test]
    fn a_full_disk_loses_only_log_output() {
        let mut log = StreamLog::open("/dev/full".into(), DEFAULT_MAX_BYTES).unwrap();
        log.append(&records(Stream::Output, b"lost"));
        assert!(log.told_of_failure);
    }
}
