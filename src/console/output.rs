//! Copies serial output to standard output through a bounded buffer and a thread.
//!
//! A vCPU prints one byte at a time; the thread writes one line at a time. If the output is read slowly the buffer
//! fills up, and the vCPU waits outside of the device until there is room or it is interrupted. Nothing is lost, and a
//! machine whose output is not read can be paused and ended as usual.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The maximum amount buffered, in addition to what each writer adds in one call.
const BUFFER_MAX_BYTES: usize = 64 << 10;
/// How long to wait for the rest of a line: not noticeable, but it saves a system call per byte.
const LINE_WAIT: Duration = Duration::from_millis(1);

/// The buffer between the devices that print and the thread that writes.
#[derive(Debug, Default)]
pub struct Output {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    closed: bool,
}

impl State {
    fn is_full(&self) -> bool {
        self.bytes.len() >= BUFFER_MAX_BYTES && !self.closed
    }
}

impl Output {
    /// Adds `bytes`, even to a full buffer, without blocking: the caller must wait while [`Output::is_full`]. After
    /// [`Output::close`] they are dropped.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        let was_empty = state.bytes.is_empty();
        state.bytes.extend_from_slice(bytes);
        let wake = was_empty || bytes.contains(&b'\n') || state.is_full();
        drop(state);
        if wake {
            self.changed.notify_all();
        }
    }

    /// Whether the caller must wait before it adds more.
    pub fn is_full(&self) -> bool {
        self.lock().is_full()
    }

    /// Waits for room, or until `is_called` returns true; it is checked again after each [`Output::wake`].
    pub fn wait_for_room(&self, mut is_called: impl FnMut() -> bool) {
        let mut state = self.lock();
        while state.is_full() && !is_called() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes waiting threads check `is_called`, whose condition must already be set.
    pub fn wake(&self) {
        // Takes the lock, so that a thread cannot be between its check and its wait.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Waits for room until `deadline` and returns whether there is some.
    pub fn has_room_by(&self, deadline: Instant) -> bool {
        let state = self.lock();
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(state, left, |state| state.is_full());
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_full()
    }

    /// Ends the output and releases all waiting threads. Buffered bytes can still be taken.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits for the next bytes to print; `None` when closed and empty.
    pub fn take(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        while state.bytes.is_empty() {
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.closed && !state.bytes.contains(&b'\n') {
            let rest_of_line = |s: &mut State| !s.closed && !s.bytes.contains(&b'\n');
            let waited = self.changed.wait_timeout_while(state, LINE_WAIT, rest_of_line);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let bytes = std::mem::take(&mut state.bytes);
        drop(state);
        self.changed.notify_all();
        Some(bytes)
    }

    /// The console thread: prints everything until closed. If `sink` fails, `broken` is called once with the error and the rest
    /// is dropped.
    pub fn print_to(&self, mut sink: impl Write, broken: impl FnOnce(io::Error)) {
        while let Some(bytes) = self.take() {
            if let Err(error) = sink.write_all(&bytes).and_then(|()| sink.flush()) {
                self.close();
                return broken(error);
            }
        }
    }

    /// Takes what is buffered, without waiting.
    #[cfg(test)]
    pub fn take_now(&self) -> Vec<u8> {
        let bytes = std::mem::take(&mut self.lock().bytes);
        self.changed.notify_all();
        bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn a_slow_reader_loses_nothing() {
        let output = Arc::new(Output::default());
        let writer = {
            let output = output.clone();
            thread::spawn(move || {
                for n in 0..300_000u32 {
                    output.wait_for_room(|| false);
                    output.push(&[n as u8]);
                }
                output.close();
            })
        };
        let mut got = Vec::new();
        while let Some(bytes) = output.take() {
            assert!(bytes.len() <= BUFFER_MAX_BYTES);
            got.extend(bytes);
        }
        writer.join().unwrap();
        assert!(got.iter().enumerate().all(|(n, byte)| *byte == n as u8));
        assert_eq!(got.len(), 300_000);
    }

    #[test]
    fn closing_releases_a_waiting_writer() {
        let output = Arc::new(Output::default());
        output.push(&vec![0; BUFFER_MAX_BYTES]);
        let writer = {
            let output = output.clone();
            thread::spawn(move || output.wait_for_room(|| false))
        };
        thread::sleep(Duration::from_millis(20));
        output.close();
        writer.join().unwrap();
        output.push(b"more");
        assert_eq!(output.take().map(|b| b.len()), Some(BUFFER_MAX_BYTES));
        assert_eq!(output.take(), None);
    }

    #[test]
    fn a_waiting_writer_can_be_interrupted_without_data_loss() {
        let (output, called) = (Arc::new(Output::default()), Arc::new(AtomicBool::new(false)));
        output.push(&vec![b'x'; BUFFER_MAX_BYTES + 1]);
        let writer = {
            let (output, called) = (output.clone(), called.clone());
            thread::spawn(move || output.wait_for_room(|| called.load(Ordering::SeqCst)))
        };
        output.wake();
        thread::sleep(Duration::from_millis(20));
        assert!(!writer.is_finished(), "nobody called it");
        called.store(true, Ordering::SeqCst);
        output.wake();
        writer.join().unwrap();
        assert!(!output.has_room_by(Instant::now() + Duration::from_millis(1)));
        assert_eq!(output.take().map(|bytes| bytes.len()), Some(BUFFER_MAX_BYTES + 1));
        assert!(output.has_room_by(Instant::now()));
    }

    #[test]
    fn a_broken_sink_is_reported_once() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (output, calls) = (Output::default(), AtomicUsize::new(0));
        output.push(b"one\n");
        output.print_to(Broken, |_| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        output.push(b"two\n");
        assert_eq!(calls.into_inner(), 1);
        assert_eq!(output.take(), None);
    }
}
