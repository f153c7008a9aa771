//! Rate-limited logging to standard error, so that a guest cannot flood the terminal.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::console::terminal;
use crate::foreign;
use crate::monitor;
use crate::sandbox::task;
use crate::state_dir::husk_log;

/// The maximum number of lines per second; the rest are only counted.
const LINES_PER_SECOND: u32 = 50;

static LOGGER: Logger = Logger { rate: Mutex::new(Rate { started: None, lines: 0, suppressed: 0 }) };

/// Sends the log to standard error: warnings and errors, and one more level for each step of `verbosity` (the number of
/// `--verbose` flags). Must be called once, before other threads are started.
pub fn init(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}

struct Logger {
    rate: Mutex<Rate>,
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        if monitor::forward_log(record) || task::forward_log(record) {
            return;
        }
        // The lock is held while writing, so that lines of different threads do not mix.
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let Admission { admitted, suppressed_before } = rate.admit(Instant::now());
        let mut text = suppressed_line(suppressed_before);
        if admitted {
            text.push_str(&line(record));
        }
        // Threads that log, such as vCPUs, must not block on a reader.
        if !text.is_empty() && !terminal::say(&text, Duration::ZERO) {
            rate.suppressed += suppressed_before + u64::from(admitted);
        }
        husk_log::keep_small();
    }

    fn flush(&self) {
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let suppressed = std::mem::take(&mut rate.suppressed);
        if suppressed > 0 {
            terminal::say(&suppressed_line(suppressed), Duration::ZERO);
        }
    }
}

fn suppressed_line(count: u64) -> String {
    if count == 0 { String::new() } else { format!("husk: suppressed {count} lines\n") }
}

fn line(record: &Record) -> String {
    let level = match record.level() {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let mut line = format!("husk: {level}: ");
    let _ = write!(line, "{}", record.args());
    // It may contain a guest's bytes: no escape sequences or line breaks are passed on.
    let mut line = foreign::line(&line).into_owned();
    line.push('\n');
    line
}

/// Counts lines per second.
struct Rate {
    started: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

struct Admission {
    admitted: bool,
    /// Lines suppressed in earlier seconds, to be reported now.
    suppressed_before: u64,
}

impl Rate {
    fn admit(&mut self, now: Instant) -> Admission {
        let mut suppressed_before = 0;
        if self.started.is_none_or(|started| now.duration_since(started) >= Duration::from_secs(1)) {
            suppressed_before = std::mem::take(&mut self.suppressed);
            self.started = Some(now);
            self.lines = 0;
        }
        let admitted = self.lines < LINES_PER_SECOND;
        if admitted {
            self.lines += 1;
        } else {
            self.suppressed += 1;
        }
        Admission { admitted, suppressed_before }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_limited_and_the_rest_counted_once() {
        let mut rate = Rate { started: None, lines: 0, suppressed: 0 };
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| rate.admit(start).admitted).count();
        assert_eq!(admitted, LINES_PER_SECOND as usize);

        let later = rate.admit(start + Duration::from_secs(1));
        assert!(later.admitted);
        assert_eq!(later.suppressed_before, 1000 - u64::from(LINES_PER_SECOND));
        assert_eq!(rate.admit(start + Duration::from_secs(3)).suppressed_before, 0);
    }

    #[test]
    fn a_record_stays_one_line_without_escape_sequences() {
        let record = Record::builder().level(Level::Warn).args(format_args!("a\nb\x1b[2J")).build();
        assert_eq!(line(&record), "husk: warning: a\u{fffd}b\u{fffd}[2J\n");
    }
}
