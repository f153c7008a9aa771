//! `husk logs`: prints the output of a machine that runs in the background or stays.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::exit::Exit;
use super::time;
use crate::console::stream_log::{Head, LogReader};
use crate::request::attach;
use crate::state_dir::{self, MachineEntry, StateDir};

const EXAMPLES: &str = "\
Examples:
  husk logs web
  husk logs -f --tail 100 web
  husk logs --since 10m --timestamps web
  husk logs --kernel web            (messages of the guest kernel and of husk)

The standard output and standard error of the machine are printed to standard output and standard error.";

/// The polling interval of `--follow`.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Logs {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// Follow log output
    #[arg(short, long)]
    follow: bool,

    /// Number of lines to show from the end of the logs
    #[arg(short = 'n', long, value_name = "LINES|all", value_parser = tail)]
    tail: Option<usize>,

    /// Show logs since a timestamp (2026-01-31T12:00:00Z) or relative time (10m)
    #[arg(long, value_name = "TIME", value_parser = time::timestamp_ns)]
    since: Option<u64>,

    /// Show logs until a timestamp or relative time
    #[arg(long, value_name = "TIME", value_parser = time::timestamp_ns)]
    until: Option<u64>,

    /// Show timestamps
    #[arg(short, long)]
    timestamps: bool,

    /// Show messages of the guest kernel and of husk instead of the output
    #[arg(long, conflicts_with_all = ["follow", "tail", "since", "until", "timestamps"])]
    kernel: bool,
}

impl Logs {
    /// Prints existing output and, with `--follow`, new output.
    pub fn run(self) -> Result<Exit> {
        let entry = StateDir::open()?.find(&self.machine)?;
        if self.kernel {
            return print_kernel(&entry);
        }
        let record = entry.record()?;
        ensure!(
            record.detached || record.keep,
            "machine {} runs in the foreground without a name and has no logs: its output is on the terminal it was started from",
            entry.name()
        );
        let path = entry.file(state_dir::STREAMS_LOG);
        let mut reader = LogReader::open(&path);
        let mut last = match self.tail {
            Some(count) => last_lines(&mut reader, count)?,
            None => VecDeque::new(),
        };
        let mut at_line_start = true;
        loop {
            // Checked before the log is read to its end, so that nothing written before the machine's end is missed.
            let alive = self.follow && StateDir::open()?.find(&entry.id).is_ok_and(|entry| entry.alive);
            while let Some((head, content)) = next(&mut last, &mut reader)? {
                if self.is_wanted(&head) && !content.is_empty() {
                    let is_read = match self.timestamps {
                        true => attach::write(head.stream, &with_timestamps(&head, &content, &mut at_line_start))?,
                        false => attach::write(head.stream, &content)?,
                    };
                    if !is_read {
                        return Ok(Exit::Success);
                    }
                }
            }
            if !alive {
                let damaged_bytes = reader.damaged_bytes();
                ensure!(damaged_bytes == 0, "{damaged_bytes} bytes of the log are corrupted and were skipped");
                return Ok(Exit::Success);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    fn is_wanted(&self, head: &Head) -> bool {
        self.since.is_none_or(|since| head.time_ns >= since) && self.until.is_none_or(|until| head.time_ns <= until)
    }
}

/// Parses the number of lines to print.
fn tail(text: &str) -> Result<usize, String> {
    match text {
        "all" => Ok(usize::MAX),
        text => text.parse().map_err(|_| format!("{text:?} is not a number of lines: use one such as 100, or all")),
    }
}

/// A record: header and content.
type Record = (Head, Vec<u8>);

/// The next record: first those in `last`, then new ones.
fn next(last: &mut VecDeque<Record>, reader: &mut LogReader) -> Result<Option<Record>> {
    match last.pop_front() {
        Some(record) => Ok(Some(record)),
        None => reader.read().context("read the log"),
    }
}

/// Reads to the end of the log, and returns its last `count` lines. The same reader continues afterwards, since a
/// second one could miss records written in between.
fn last_lines(reader: &mut LogReader, count: usize) -> Result<VecDeque<Record>> {
    // Each with the number of lines that end in it.
    let (mut last, mut ends) = (VecDeque::<(Record, usize)>::new(), 0);
    while let Some((head, content)) = reader.read().context("read the log")? {
        let ends_here = content.iter().filter(|byte| **byte == b'\n').count();
        ends += ends_here;
        last.push_back(((head, content), ends_here));
        while let Some((_, first)) = last.front()
            && ends - first > count
        {
            ends -= first;
            last.pop_front();
        }
    }
    let is_ended = last.back().is_none_or(|((_, content), _)| content.ends_with(b"\n"));
    let mut skip = (ends + usize::from(!is_ended)).saturating_sub(count);
    let rest = |((head, content), _): (Record, usize)| (head, skip_lines(&content, &mut skip).to_vec());
    Ok(last.into_iter().map(rest).collect())
}

/// The rest of `content` after the lines still to be skipped.
fn skip_lines<'a>(content: &'a [u8], skip: &mut usize) -> &'a [u8] {
    let mut rest = content;
    while *skip > 0 && !rest.is_empty() {
        match rest.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                *skip -= 1;
                rest = rest.get(end + 1..).unwrap_or_default();
            }
            None => rest = &[],
        }
    }
    rest
}

/// Adds a timestamp before each line that starts in `content`.
fn with_timestamps(head: &Head, content: &[u8], at_line_start: &mut bool) -> Vec<u8> {
    let stamp = time::rfc3339(head.time_ns);
    let mut text = Vec::with_capacity(content.len() + stamp.len());
    for line in content.split_inclusive(|byte| *byte == b'\n') {
        if std::mem::replace(at_line_start, line.ends_with(b"\n")) {
            text.extend_from_slice(stamp.as_bytes());
            text.push(b' ');
        }
        text.extend_from_slice(line);
    }
    text
}

fn print_kernel(entry: &MachineEntry) -> Result<Exit> {
    for name in ["console.old", state_dir::CONSOLE_LOG, "husk.old", state_dir::HUSK_LOG] {
        let Ok(mut file) = File::open(entry.file(name)) else { continue };
        match io::copy(&mut file, &mut io::stdout().lock()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            copied => drop(copied.context("print the log")?),
        }
    }
    match io::stdout().flush() {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        flushed => flushed.context("print the log")?,
    }
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::stream_log::{self, Stream, StreamLog};

    #[test]
    fn the_tail_starts_at_a_line() {
        let mut skip = 2;
        assert_eq!(skip_lines(b"one\ntw", &mut skip), b"");
        assert_eq!(skip_lines(b"o\nthree\nfour", &mut skip), b"three\nfour");
        assert_eq!(skip_lines(b"\n", &mut skip), b"\n");
    }

    #[test]
    fn the_tail_has_the_requested_length_while_the_log_grows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("streams.log");
        let mut log = StreamLog::open(path.clone(), 8 << 10).unwrap();
        let mut write = |range: std::ops::Range<u32>| {
            range.for_each(|n| log.append(&stream_log::records(Stream::Output, format!("{n}\n").as_bytes())));
        };
        let text = |records: VecDeque<Record>| -> String {
            records.iter().map(|(_, content)| String::from_utf8_lossy(content).into_owned()).collect()
        };
        write(0..300);
        let mut reader = LogReader::open(&path);
        let mut last = last_lines(&mut reader, 3).unwrap();
        // The older file is removed; what was read of it does not reduce what is shown.
        write(300..450);
        let printed: VecDeque<Record> = std::iter::from_fn(|| next(&mut last, &mut reader).unwrap()).collect();
        assert_eq!(text(printed), (297..450).map(|n| format!("{n}\n")).collect::<String>());
        assert_eq!(text(last_lines(&mut LogReader::open(&path), 0).unwrap()), "");
        log.append(&stream_log::records(Stream::Output, b"no end"));
        assert_eq!(text(last_lines(&mut LogReader::open(&path), 2).unwrap()), "449\nno end");
        assert!(text(last_lines(&mut LogReader::open(&path), usize::MAX).unwrap()).lines().count() > 150);
    }

    #[test]
    fn each_line_has_its_time_once() {
        let head = Head { time_ns: 0, len_bytes: 0, stream: Stream::Output, continues: false };
        let mut at_start = true;
        let text =
            [b"a\nb".as_slice(), b"c\n", b"d"].map(|content| with_timestamps(&head, content, &mut at_start)).concat();
        let stamp = "1970-01-01T00:00:00.000000000Z";
        assert_eq!(String::from_utf8(text).unwrap(), format!("{stamp} a\n{stamp} bc\n{stamp} d"));
    }
}
