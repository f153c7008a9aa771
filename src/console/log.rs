//! A size-limited log of the serial port, and its last lines, which explain why a machine failed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::stream_log;
use super::terminal;
use crate::foreign;
use crate::sys::private_file;

/// The size of the tail kept for error messages.
const TAIL_MAX_BYTES: usize = 16 << 10;
/// At this size the file becomes the old log and a new one is started.
const FILE_MAX_BYTES: usize = 1 << 20;

/// The log of a guest whose console is not connected to a terminal. While the disk is full, output is dropped.
pub struct Log {
    path: PathBuf,
    file: File,
    file_bytes: usize,
    tail: Tail,
    echo: bool,
    told_of_failure: bool,
}

/// The end of the log.
#[derive(Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// The last `count` lines, reduced to printable characters.
    pub fn lines(&self, count: usize) -> Vec<String> {
        let bytes: Vec<u8> = self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines.iter().skip(lines.len().saturating_sub(count)).map(|line| printable(line)).collect()
    }

    fn push(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(bytes.iter().skip(bytes.len().saturating_sub(TAIL_MAX_BYTES)));
        let surplus = tail.len().saturating_sub(TAIL_MAX_BYTES);
        tail.drain(..surplus);
    }
}

/// Prevents a guest's output from affecting the terminal.
fn printable(text: &str) -> String {
    text.replace(|c| foreign::is_command(c) && c != '\t', "")
}

impl Log {
    /// Starts a log in a new file at `path`; with `echo` it is copied to standard error.
    pub fn create(path: PathBuf, echo: bool) -> io::Result<Log> {
        let file = private_file().write(true).create(true).truncate(true).open(&path)?;
        Ok(Log { path, file, file_bytes: 0, tail: Tail::default(), echo, told_of_failure: false })
    }

    /// A handle to the log's end.
    pub fn tail(&self) -> Tail {
        self.tail.clone()
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file_bytes >= FILE_MAX_BYTES {
            self.file = stream_log::rotate(&self.path)?;
            self.file_bytes = 0;
        }
        self.file.write_all(bytes)?;
        self.file_bytes += bytes.len();
        self.told_of_failure = false;
        Ok(())
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        if let Err(error) = self.append(bytes)
            && !std::mem::replace(&mut self.told_of_failure, true)
        {
            log::warn!("write {}: {error}; messages are not logged until there is free space", self.path.display());
        }
        if self.echo {
            let text = String::from_utf8_lossy(bytes);
            let lines: Vec<String> = text.split('\n').map(printable).collect();
            // An unreadable log must not end a machine.
            let _ = io::stderr().write_all(terminal::on_screen(&lines.join("\n")).as_bytes());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_flood_leaves_two_small_files_and_its_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::create(dir.path().join("console.log"), false).unwrap();
        let tail = log.tail();
        for n in 0..400_000 {
            log.write_all(format!("line {n}\r\n").as_bytes()).unwrap();
        }
        let sizes: Vec<u64> = fs::read_dir(&dir).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().sum::<u64>() < 3 << 20, "{sizes:?}");
        assert_eq!(tail.lines(2), ["line 399998", "line 399999"]);
    }

    #[test]
    fn a_full_disk_loses_log_output_but_not_the_tail() {
        let mut log = Log::create("/dev/full".into(), false).unwrap();
        log.write_all(b"lost\n").unwrap();
        assert_eq!(log.tail().lines(1), ["lost"]);
    }

    #[test]
    fn the_tail_of_the_log_is_safe_to_print() {
        let tail = Tail::default();
        tail.push(b"\x1b[2Jone\x07\n\n\xfftwo\tx");
        assert_eq!(tail.lines(9), ["[2Jone", "\u{fffd}two\tx"]);
    }
}
