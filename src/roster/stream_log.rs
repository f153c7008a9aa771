//! What a machine's process writes, kept byte by byte for `husk logs`: two files of records, the older of which goes when
//! the newer one is full.
//!
//! A record is a head of 16 bytes, little-endian (nanoseconds since 1970: 8, length: 4, stream: 1, zeroes: 3), and the bytes.
//! Who follows a machine's streams over its control socket gets the same records.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::private_file;

/// Length of a record's head.
pub const HEAD_BYTES: usize = 16;
/// Longest content of a record. Longer writes are several records.
pub const CONTENT_MAX_BYTES: usize = 64 << 10;
/// As much of a machine's output as is kept where nobody says how much.
pub const DEFAULT_MAX_BYTES: u64 = 16 << 20;
/// Less than this is no log: a record and its head have to fit.
pub const MIN_BYTES: u64 = 4 * CONTENT_MAX_BYTES as u64;

/// Which of the process's streams a record is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output; of a process with a terminal all that it shows; of a machine of parts its console.
    Output,
    /// Standard error.
    Errors,
}

const STREAMS: [Stream; 2] = [Stream::Output, Stream::Errors];

/// A record's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// Length of what follows, in bytes.
    pub len_bytes: u32,
    /// Whose it is.
    pub stream: Stream,
}

impl Head {
    /// The head as it is written.
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..8].copy_from_slice(&self.time_ns.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len_bytes.to_le_bytes());
        bytes[12] = self.stream as u8;
        bytes
    }

    /// The head that `bytes` are, if they are one.
    pub fn from_bytes(bytes: [u8; HEAD_BYTES]) -> Option<Head> {
        let [t0, t1, t2, t3, t4, t5, t6, t7, l0, l1, l2, l3, stream, 0, 0, 0] = bytes else { return None };
        let len_bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        if len_bytes as usize > CONTENT_MAX_BYTES {
            return None;
        }
        let time_ns = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
        Some(Head { time_ns, len_bytes, stream: *STREAMS.get(usize::from(stream))? })
    }
}

/// `bytes`, written now, as records.
pub fn records(stream: Stream, bytes: &[u8]) -> Vec<u8> {
    let time_ns = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64);
    let mut records = Vec::with_capacity(bytes.len() + HEAD_BYTES);
    for content in bytes.chunks(CONTENT_MAX_BYTES) {
        records.extend_from_slice(&Head { time_ns, len_bytes: content.len() as u32, stream }.to_bytes());
        records.extend_from_slice(content);
    }
    records
}

/// The writing side. When the disk is full, what comes is not kept until there is room again.
#[derive(Debug)]
pub struct StreamLog {
    path: PathBuf,
    file: File,
    file_bytes: u64,
    file_max_bytes: u64,
    told_of_failure: bool,
}

impl StreamLog {
    /// Starts a log at `path` that takes at most `max_bytes` on the disk, or goes on with the one that is there.
    pub fn open(path: PathBuf, max_bytes: u64) -> io::Result<StreamLog> {
        let file = private_file().append(true).create(true).open(&path)?;
        let file_bytes = file.metadata()?.len();
        Ok(StreamLog { path, file, file_bytes, file_max_bytes: max_bytes.max(MIN_BYTES) / 2, told_of_failure: false })
    }

    /// Adds records, as [`records`] makes them.
    pub fn append(&mut self, records: &[u8]) {
        if let Err(error) = self.try_append(records) {
            // Half a record would garble all that follows.
            let _ = self.file.set_len(self.file_bytes);
            if !std::mem::replace(&mut self.told_of_failure, true) {
                log::warn!("write {}: {error}; output is not kept until there is room", self.path.display());
            }
        }
    }

    fn try_append(&mut self, records: &[u8]) -> io::Result<()> {
        if self.file_bytes > 0 && self.file_bytes + records.len() as u64 > self.file_max_bytes {
            self.file = rotate(&self.path)?;
            self.file_bytes = 0;
        }
        self.file.write_all(records)?;
        self.file_bytes += records.len() as u64;
        self.told_of_failure = false;
        Ok(())
    }
}

/// Makes the file at `path` the old one, in place of the one before, and starts it anew.
pub fn rotate(path: &Path) -> io::Result<File> {
    match fs::rename(path, old(path)) {
        // That was done before, and there was no room for the next.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        renamed => renamed?,
    }
    private_file().append(true).create(true).open(path)
}

fn old(path: &Path) -> PathBuf {
    path.with_extension("old")
}

/// The reading side: all records that there are, and those that come.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    file: Option<File>,
    inode: Option<u64>,
    /// What was read, and how much of it was taken.
    bytes: Vec<u8>,
    taken_bytes: usize,
}

impl LogReader {
    /// Begins with the oldest record of the log at `path`.
    pub fn open(path: &Path) -> LogReader {
        let mut reader =
            LogReader { path: path.to_owned(), file: None, inode: None, bytes: Vec::new(), taken_bytes: 0 };
        if !reader.turn_to(&old(path)) {
            reader.turn_to(path);
        }
        reader
    }

    fn turn_to(&mut self, path: &Path) -> bool {
        self.file = File::open(path).ok();
        self.inode = self.file.as_ref().and_then(|file| file.metadata().ok()).map(|metadata| metadata.ino());
        self.forget();
        self.file.is_some()
    }

    fn forget(&mut self) {
        self.bytes.clear();
        self.taken_bytes = 0;
    }

    /// The next record, if there is one by now. What is no record ends the file that it is in.
    pub fn read(&mut self) -> io::Result<Option<(Head, Vec<u8>)>> {
        loop {
            if let Some(record) = self.take() {
                return Ok(Some(record));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn take(&mut self) -> Option<(Head, Vec<u8>)> {
        let (head, rest) = self.bytes.get(self.taken_bytes..)?.split_first_chunk::<HEAD_BYTES>()?;
        let Some(head) = Head::from_bytes(*head) else {
            self.forget();
            self.file = None;
            return None;
        };
        let content = rest.get(..head.len_bytes as usize)?.to_vec();
        self.taken_bytes += HEAD_BYTES + content.len();
        Some((head, content))
    }

    /// Reads on, in the next file where this one has come to its end. False if there is nothing to be read.
    fn fill(&mut self) -> io::Result<bool> {
        // Asked before this one is read to its end: to one that is not the current one any more nothing is added afterwards.
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
            // Half a record is read again: on a full disk it is taken back, and another may come in its place.
            file.seek_relative(-(self.bytes.len() as i64))?;
            self.bytes.clear();
        }
        if current.is_none() || current == self.inode {
            return Ok(false);
        }
        // Whoever is slower than two files are filled begins again with the older one that is left.
        let next = if previous.is_none() || previous == self.inode { self.path.clone() } else { old(&self.path) };
        Ok(self.turn_to(&next))
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    fs::metadata(path).map(|metadata| metadata.ino()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(max_bytes: u64) -> (tempfile::TempDir, PathBuf, StreamLog) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("streams.log");
        let log = StreamLog::open(path.clone(), max_bytes).unwrap();
        (folder, path, log)
    }

    fn rest(reader: &mut LogReader) -> Vec<(Stream, Vec<u8>)> {
        std::iter::from_fn(|| reader.read().unwrap()).map(|(head, content)| (head.stream, content)).collect()
    }

    #[test]
    fn bytes_come_back_as_they_were_and_from_the_stream_that_they_were_of() {
        let (_folder, path, mut log) = log(DEFAULT_MAX_BYTES);
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
        let max_bytes = MIN_BYTES;
        let (folder, path, mut log) = log(max_bytes);
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
        let sizes: u64 = fs::read_dir(&folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(sizes <= max_bytes, "{sizes}");
        let late = rest(&mut LogReader::open(&path)).concat_contents();
        assert!(late.len() as u64 > max_bytes / 4 && text.as_bytes().ends_with(&late));
    }

    #[test]
    fn a_log_goes_on_where_it_was() {
        let (_folder, path, mut first) = log(DEFAULT_MAX_BYTES);
        first.append(&records(Stream::Output, b"one"));
        drop(first);
        StreamLog::open(path.clone(), DEFAULT_MAX_BYTES).unwrap().append(&records(Stream::Output, b"two"));
        assert_eq!(rest(&mut LogReader::open(&path)).concat_contents(), b"onetwo");
    }

    #[test]
    fn what_is_no_record_is_not_read() {
        let (_folder, path, mut log) = log(DEFAULT_MAX_BYTES);
        log.append(&records(Stream::Output, b"good"));
        fs::write(&path, [fs::read(&path).unwrap(), vec![0xff; 40]].concat()).unwrap();
        assert_eq!(rest(&mut LogReader::open(&path)).concat_contents(), b"good");
        for bytes in [[1; HEAD_BYTES], [0xff; HEAD_BYTES]] {
            assert_eq!(Head::from_bytes(bytes), None);
        }
    }

    #[test]
    fn half_a_record_that_is_taken_back_is_not_missed() {
        let (_folder, path, mut log) = log(DEFAULT_MAX_BYTES);
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
    fn a_file_that_could_not_be_started_is_started_when_there_is_room() {
        let (folder, path, mut log) = log(MIN_BYTES);
        let content = vec![7; MIN_BYTES as usize / 4];
        (0..2).for_each(|_| log.append(&records(Stream::Output, &content)));
        // As it is when there was room for the name and none for the file.
        fs::rename(&path, folder.path().join("streams.old")).unwrap();
        log.append(&records(Stream::Output, b"later"));
        assert!(rest(&mut LogReader::open(&path)).concat_contents().ends_with(b"later"));
    }

    #[test]
    fn a_full_disk_costs_the_log_and_nothing_else() {
        let mut log = StreamLog::open("/dev/full".into(), DEFAULT_MAX_BYTES).unwrap();
        log.append(&records(Stream::Output, b"lost"));
        assert!(log.told_of_failure);
    }
}
