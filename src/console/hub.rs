//! From what a machine in the background writes to its log, and to those who are attached to it now.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::roster::stream_log::{self, Stream, StreamLog};

/// How long one who is attached may not read before they are let go: nobody who looks on is to hold the machine up.
const WATCHER_PATIENCE: Duration = Duration::from_secs(5);

/// The log and the watchers. Each stream of the machine writes from its own thread.
#[derive(Debug)]
pub struct Hub {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    log: StreamLog,
    watchers: Vec<UnixStream>,
}

impl Hub {
    /// A hub that writes to `log`.
    pub fn new(log: StreamLog) -> Hub {
        Hub { inner: Mutex::new(Inner { log, watchers: Vec::new() }) }
    }

    /// Writes `bytes` to the log and to each watcher, as records. It waits for watchers, as long as it takes to lose patience.
    pub fn write(&self, stream: Stream, bytes: &[u8]) {
        let records = stream_log::records(stream, bytes);
        let mut inner = self.lock();
        inner.log.append(&records);
        inner.watchers.retain_mut(|watcher| watcher.write_all(&records).is_ok());
    }

    /// Adds a watcher, who is sent what comes from now on.
    pub fn attach(&self, watcher: UnixStream) -> io::Result<()> {
        watcher.set_nonblocking(false)?;
        watcher.set_write_timeout(Some(WATCHER_PATIENCE))?;
        self.lock().watchers.push(watcher);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream of a hub, as something to write to.
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

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::roster::stream_log::{DEFAULT_MAX_BYTES, HEAD_BYTES, LogReader};

    #[test]
    fn a_watcher_has_what_comes_and_the_log_has_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("streams.log");
        let hub = Arc::new(Hub::new(StreamLog::open(path.clone(), DEFAULT_MAX_BYTES).unwrap()));
        hub.write(Stream::Output, b"before");
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs).unwrap();
        HubStream(hub.clone(), Stream::Errors).write_all(b"after").unwrap();
        let mut record = [0; HEAD_BYTES + 5];
        ours.read_exact(&mut record).unwrap();
        assert_eq!(&record[HEAD_BYTES..], b"after");
        drop(ours);
        // Nobody reads any more: once it is noticed, they are gone.
        hub.write(Stream::Output, b"x");
        assert!(hub.lock().watchers.is_empty());
        let mut reader = LogReader::open(&path);
        let kept: Vec<u8> = std::iter::from_fn(|| reader.read().unwrap()).flat_map(|(_, content)| content).collect();
        assert_eq!(kept, b"beforeafterx");
    }
}
