//! Distributes the output of a machine in the background to its log and to attached clients. Each client has a bounded
//! backlog and its own thread, so that clients do not block each other and the hub's lock is never held while waiting.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::output::Output;
use super::stream_log::{self, Stream, StreamLog};
use crate::sandbox;

/// How long an attached client that does not read may block the machine before it is disconnected.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long clients have to read the rest if another process is waiting for the machine's end.
const FORCED_DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// The log and the clients. Each stream of the machine is written from its own thread.
#[derive(Debug)]
pub struct Hub {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    log: StreamLog,
    watchers: Vec<Arc<Watcher>>,
}

/// An attached client.
#[derive(Debug)]
struct Watcher {
    backlog: Arc<Output>,
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Watcher {
    fn start(stream: UnixStream) -> io::Result<Watcher> {
        stream.set_nonblocking(false)?;
        let (backlog, to) = (Arc::new(Output::default()), stream.try_clone()?);
        let from = backlog.clone();
        let write = move || {
            from.print_to(&to, |_| {});
            let _ = to.shutdown(Shutdown::Write);
        };
        let thread = sandbox::spawn("watcher", write)?;
        Ok(Watcher { backlog, stream, thread })
    }

    /// Disconnects the client, even while its thread is writing.
    fn let_go(&self) {
        self.backlog.close();
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Hub {
    /// Creates a hub that writes to `log`.
    pub fn new(log: StreamLog) -> Hub {
        Hub { inner: Mutex::new(Inner { log, watchers: Vec::new() }) }
    }

    /// Writes `bytes` as records to the log and to each client. Waits for clients whose backlog is full, up to the
    /// timeout; other threads are not blocked by that.
    pub fn write(&self, stream: Stream, bytes: &[u8]) {
        let records = stream_log::records(stream, bytes);
        let mut inner = self.lock();
        inner.log.append(&records);
        inner.watchers.retain(|watcher| !watcher.thread.is_finished());
        inner.watchers.iter().for_each(|watcher| watcher.backlog.push(&records));
        let slow: Vec<_> = inner.watchers.iter().filter(|watcher| watcher.backlog.is_full()).cloned().collect();
        drop(inner);
        let deadline = Instant::now() + WRITE_TIMEOUT;
        slow.iter().filter(|watcher| !watcher.backlog.has_room_by(deadline)).for_each(|watcher| watcher.let_go());
    }

    /// Adds a client, which receives output from now on. Does not block.
    pub fn attach(&self, watcher: UnixStream) -> io::Result<()> {
        let watcher = Arc::new(Watcher::start(watcher)?);
        self.lock().watchers.push(watcher);
        Ok(())
    }

    /// Waits until the clients have received all output, up to the timeout, which is short if `in_a_hurry`, and
    /// disconnects them.
    pub fn close(&self, in_a_hurry: bool) {
        let watchers = std::mem::take(&mut self.lock().watchers);
        watchers.iter().for_each(|watcher| watcher.backlog.close());
        let deadline = Instant::now() + if in_a_hurry { FORCED_DRAIN_TIMEOUT } else { WRITE_TIMEOUT };
        while watchers.iter().any(|watcher| !watcher.thread.is_finished()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        watchers.iter().for_each(|watcher| watcher.let_go());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream of a hub, as a writer.
#[derive(Debug)]
pub struct HubStream(pub Arc<Hub>, pub Stream);

impl Write for HubStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(self.1, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard output or standard error, with a copy of what is written there in a hub.
#[derive(Debug)]
pub struct Copied<W>(pub HubStream, pub W);

impl<W: Write> Write for Copied<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_all(bytes)?;
        self.1.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::console::stream_log::{DEFAULT_MAX_BYTES, HEAD_BYTES, LogReader};

    #[test]
    fn a_client_receives_new_output_and_the_log_has_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("streams.log");
        let hub = Arc::new(Hub::new(StreamLog::open(path.clone(), DEFAULT_MAX_BYTES).unwrap()));
        hub.write(Stream::Output, b"before");
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs).unwrap();
        HubStream(hub.clone(), Stream::Errors).write_all(b"after").unwrap();
        let mut record = [0; HEAD_BYTES + 5];
        ours.read_exact(&mut record).unwrap();
        assert_eq!(&record[HEAD_BYTES..], b"after");
        drop(ours);
        // The client has closed its end: it is dropped once that is noticed.
        hub.write(Stream::Output, b"x");
        while !hub.lock().watchers.iter().all(|watcher| watcher.thread.is_finished()) {
            thread::sleep(Duration::from_millis(1));
        }
        hub.write(Stream::Output, b"y");
        assert!(hub.lock().watchers.is_empty());
        let mut reader = LogReader::open(&path);
        let kept: Vec<u8> = std::iter::from_fn(|| reader.read().unwrap()).flat_map(|(_, content)| content).collect();
        assert_eq!(kept, b"beforeafterxy");
    }

    #[test]
    fn what_is_printed_is_also_in_the_log() {
        let (dir, hub) = hub();
        let mut printed = Vec::new();
        Copied(HubStream(hub, Stream::Errors), &mut printed).write_all(b"words").unwrap();
        let (head, content) = LogReader::open(&dir.path().join("streams.log")).read().unwrap().unwrap();
        assert_eq!(
            (head.stream, content.as_slice(), printed.as_slice()),
            (Stream::Errors, &b"words"[..], &b"words"[..])
        );
    }

    fn hub() -> (tempfile::TempDir, Arc<Hub>) {
        let dir = tempfile::tempdir().unwrap();
        let log = StreamLog::open(dir.path().join("streams.log"), DEFAULT_MAX_BYTES).unwrap();
        (dir, Arc::new(Hub::new(log)))
    }

    #[test]
    fn a_client_that_does_not_read_is_disconnected_without_blocking_others() {
        let (_dir, hub) = hub();
        let (mut asleep, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs).unwrap();
        let writer = {
            let hub = hub.clone();
            thread::spawn(move || (0..40).for_each(|_| hub.write(Stream::Output, &[b'x'; 64 << 10])))
        };
        // The writer waits for the stopped client for seconds.
        while !hub.lock().watchers.iter().any(|watcher| watcher.backlog.is_full()) {
            thread::yield_now();
        }
        let started = Instant::now();
        let (_awake, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs).unwrap();
        assert!(started.elapsed() < WRITE_TIMEOUT / 2, "{:?}", started.elapsed());
        asleep.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        thread::sleep(WRITE_TIMEOUT + Duration::from_secs(1));
        let mut rest = Vec::new();
        asleep.read_to_end(&mut rest).expect("it is told that it was let go");
        assert!(rest.len() < 40 * (64 << 10));
        hub.close(true);
        writer.join().unwrap();
    }

    #[test]
    fn a_reading_client_receives_everything_before_the_end() {
        let (_dir, hub) = hub();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs).unwrap();
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            ours.read_to_end(&mut bytes).map(|_| bytes)
        });
        (0..10).for_each(|_| hub.write(Stream::Output, &[b'x'; 60 << 10]));
        hub.close(false);
        assert_eq!(reader.join().unwrap().unwrap().len(), 10 * ((60 << 10) + HEAD_BYTES));
    }
}
