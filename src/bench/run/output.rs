//! Parses an instance's output: messages of the workload program, interleaved with those of the kernel and others.
//!
//! A guest is untrusted, so everything kept here is bounded.

use std::time::{Duration, Instant};

use super::TaskTiming;

/// The prefix of the workload program's messages. Kernel messages may precede it on the same line.
const MARKER: &[u8] = b"work: ";
/// Longer lines are truncated at the front.
const LINE_MAX: usize = 4096;
/// How much output is kept for error messages.
const TAIL_MAX: usize = 64 << 10;
/// Far more than there are tasks.
const TIMINGS_MAX: usize = 256;
const FAILURES_MAX: usize = 64;

/// A message of the workload program.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Message {
    Ready,
    Tick,
    Begin(String),
    End(String, u64),
    Fail(String),
    Exit(i32),
}

impl Message {
    /// Returns the first message in a line.
    fn find(line: &[u8]) -> Option<Message> {
        let places = line.windows(MARKER.len()).enumerate().filter(|(_, window)| *window == MARKER);
        let mut behind = places.filter_map(|(at, _)| std::str::from_utf8(line.get(at + MARKER.len()..)?).ok());
        behind.find_map(Message::parse)
    }

    fn parse(words: &str) -> Option<Message> {
        let words = words.trim_end();
        let (first, rest) = words.split_once(' ').unwrap_or((words, ""));
        match (first, rest) {
            ("ready", "") => Some(Message::Ready),
            ("tick", "") => Some(Message::Tick),
            ("begin", name) => is_name(name).then(|| Message::Begin(name.to_owned())),
            ("end", rest) => {
                let (name, amount) = rest.split_once(' ')?;
                Some(Message::End(Some(name).filter(|name| is_name(name))?.to_owned(), amount.parse().ok()?))
            }
            ("fail", reason) if !reason.is_empty() => Some(Message::Fail(reason.replace(char::is_control, " "))),
            ("exit", code) => code.parse::<u8>().ok().map(|code| Message::Exit(code.into())),
            _ => None,
        }
    }
}

fn is_name(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// Collects the messages of an instance.
#[derive(Debug, Default)]
pub struct OutputParser {
    /// When the first byte arrived.
    pub first_output: Option<Instant>,
    /// When the `ready` message arrived.
    pub ready: Option<Instant>,
    /// The completed tasks.
    pub timings: Vec<TaskTiming>,
    /// Reported failures and protocol errors.
    pub failures: Vec<String>,
    /// The reported exit code.
    pub exit: Option<i32>,
    /// The number of ticks.
    pub ticks: u64,
    /// The longest time between two ticks.
    longest_gap: Duration,
    last_tick: Option<Instant>,
    /// The task in progress, and when its message was complete.
    current: Option<(String, Instant)>,
    line: Vec<u8>,
    /// When the marker of the current line arrived.
    marker_at: Option<Instant>,
    tail: Vec<u8>,
}

impl OutputParser {
    /// Processes bytes that were read at a given time.
    pub fn feed(&mut self, bytes: &[u8], at: Instant) {
        if bytes.is_empty() {
            return;
        }
        self.first_output.get_or_insert(at);
        self.keep_tail(bytes);
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.grow_line(part, at);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                if let Some(marker_at) = self.marker_at.take()
                    && let Some(word) = Message::find(&line)
                {
                    self.handle(word, marker_at, at);
                }
            }
        }
    }

    /// Keeps output for error messages.
    pub fn keep_tail(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        // Trimmed only at twice the limit, to avoid moving the data on every call.
        if self.tail.len() > 2 * TAIL_MAX {
            self.tail.drain(..self.tail.len() - TAIL_MAX);
        }
    }

    fn grow_line(&mut self, part: &[u8], at: Instant) {
        // The marker may span two reads.
        let from = self.line.len().saturating_sub(MARKER.len());
        self.line.extend_from_slice(part);
        if self.marker_at.is_none()
            && self.line.get(from..).is_some_and(|new| new.windows(MARKER.len()).any(|w| w == MARKER))
        {
            self.marker_at = Some(at);
        }
        if self.line.len() > LINE_MAX {
            self.line.drain(..self.line.len() - LINE_MAX / 2);
        }
    }

    /// Handles a message. Slow consoles need time to transmit a line, so a task starts when its line is complete, and
    /// ends when the marker of its end message arrives.
    fn handle(&mut self, word: Message, marker_at: Instant, whole_at: Instant) {
        match word {
            Message::Ready => self.ready = self.ready.or(Some(marker_at)),
            Message::Tick => {
                let gap = self.last_tick.map_or(Duration::ZERO, |last| marker_at.saturating_duration_since(last));
                self.longest_gap = self.longest_gap.max(gap);
                self.last_tick = Some(marker_at);
                self.ticks = self.ticks.saturating_add(1);
            }
            Message::Begin(name) => {
                if let Some((before, _)) = self.current.replace((name, whole_at)) {
                    self.add_failure(format!("{before}: did not finish"));
                }
            }
            Message::End(name, amount) => self.end(name, amount, marker_at),
            Message::Fail(reason) => {
                self.current = None;
                self.add_failure(reason);
            }
            Message::Exit(code) => self.exit = Some(code),
        }
    }

    fn end(&mut self, name: String, amount: u64, at: Instant) {
        match self.current.take() {
            Some((current, began)) if current == name => {
                let seconds = at.saturating_duration_since(began).as_secs_f64();
                if self.timings.iter().any(|timing| timing.name == name) || self.timings.len() >= TIMINGS_MAX {
                    self.add_failure(format!("{name}: ran more than once"));
                } else {
                    self.timings.push(TaskTiming { name, amount, seconds });
                }
            }
            _ => self.add_failure(format!("{name}: finished without having started")),
        }
    }

    /// Records a failure.
    pub fn add_failure(&mut self, failure: String) {
        if self.failures.len() < FAILURES_MAX {
            self.failures.push(failure);
        }
    }

    /// Returns the task in progress.
    pub fn unfinished(&self) -> Option<&str> {
        self.current.as_ref().map(|(name, _)| name.as_str())
    }

    /// Resets the longest stall; the current one counts from the last tick.
    pub fn reset_stall(&mut self) {
        self.longest_gap = Duration::ZERO;
    }

    /// Returns the longest time without a tick.
    pub fn longest_stall(&self, now: Instant) -> Duration {
        let open = self.last_tick.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.longest_gap.max(open)
    }

    /// Returns the end of the output, safe to print on a terminal.
    pub fn tail(&self) -> String {
        let tail = self.tail.get(self.tail.len().saturating_sub(TAIL_MAX)..).unwrap_or_default();
        String::from_utf8_lossy(tail)
            .replace("\r\n", "\n")
            .replace(|c: char| c.is_control() && c != '\n' && c != '\t', "\u{fffd}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds pieces of output that arrive one second apart.
    fn handle(pieces: &[&[u8]]) -> OutputParser {
        let (mut output, start) = (OutputParser::default(), Instant::now());
        for (second, piece) in (0..).zip(pieces) {
            output.feed(piece, start + Duration::from_secs(second));
        }
        output
    }

    #[test]
    fn work_lasts_from_the_end_of_one_line_to_the_start_of_the_other() {
        let output = handle(&[b"work: beg", b"in fork", b"\r\n", b"noise\n", b"wor", b"k: e", b"nd fork 12", b"\r\n"]);
        assert_eq!(output.timings, [TaskTiming { name: "fork".into(), amount: 12, seconds: 3.0 }]);
        assert_eq!(output.failures, [""; 0]);
    }

    #[test]
    fn markers_are_found_after_kernel_messages() {
        let output = handle(&[b"[    0.5] clocksource: work: never mind work: ready\r\n[ 1.0] reboot: work: exit 7\n"]);
        assert!(output.ready.is_some());
        assert_eq!(output.exit, Some(7));
    }

    #[test]
    fn other_lines_are_ignored() {
        for line in [
            "work: end fork",
            "work: end fork 1 2",
            "work: end fork -1",
            "work: end fo\u{1b}rk 1",
            "work: exit 256",
            "work: exit",
            "work: readyness",
            "work: begin",
            "work:ready",
            "work: end fork 99999999999999999999999",
        ] {
            assert_eq!(Message::find(format!("{line}\n").as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn invalid_markers_are_a_failure() {
        let failures = |text: &[&[u8]]| {
            let output = handle(text);
            assert_eq!(output.timings, []);
            output.failures
        };
        assert_eq!(failures(&[b"work: end fork 1\n"]), ["fork: finished without having started"]);
        let words = "fork: did not finish";
        assert_eq!(failures(&[b"work: begin fork\n", b"work: begin exec\n"]), [words]);
        assert_eq!(failures(&[b"work: begin fork\n", b"work: fail fork no \x1b[31mmemory\n"]), ["fork no  [31mmemory"]);
        let twice: &[&[u8]] = &[b"work: begin fork\n", b"work: end fork 1\nwork: begin fork\n", b"work: end fork 1\n"];
        assert_eq!(handle(twice).failures, ["fork: ran more than once"]);
    }

    #[test]
    fn endless_output_is_bounded() {
        let mut output = OutputParser::default();
        let now = Instant::now();
        for _ in 0..1000 {
            output.feed(&[b'x'; 4096], now);
            output.feed(b"work: end a 1\nwork: fail x y\nwork: begin b\n", now);
        }
        output.feed(&[b'y'; 1 << 20], now);
        assert!(output.line.capacity() < 4 << 20 && output.line.len() <= LINE_MAX);
        assert!(output.tail.len() <= 2 * TAIL_MAX && output.tail().len() == TAIL_MAX);
        assert_eq!(output.failures.len(), FAILURES_MAX);
        output.feed(b"\nwork: ready\n", now);
        assert!(output.ready.is_some(), "what comes then is understood");
    }

    #[test]
    fn a_silence_counts_from_the_last_tick_to_now() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut output = OutputParser::default();
        assert_eq!(output.longest_stall(at(9)), Duration::ZERO);
        for second in [0, 1, 5, 6] {
            output.feed(b"work: tick\n", at(second));
        }
        assert_eq!(output.longest_stall(at(7)), Duration::from_secs(4));
        output.reset_stall();
        assert_eq!(output.longest_stall(at(7)), Duration::from_secs(1));
        assert_eq!(output.longest_stall(at(60)), Duration::from_secs(54), "it may never tick again");
        assert_eq!(output.ticks, 4);
    }

    #[test]
    fn the_tail_is_safe_to_print() {
        assert_eq!(handle(&[b"a\x1b[2J\r\nb\t\xff\n"]).tail(), "a\u{fffd}[2J\nb\t\u{fffd}\n");
    }
}
