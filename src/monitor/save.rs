//! Saves a machine, as its supervisor sees it: the files that the monitor writes, and how long that may take.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::message::Call;
use super::{Monitor, REPLY_TIMEOUT, STATE_BYTES_MAX, done, used_pages, wait};
use crate::sys::{self, socket};

/// How often a monitor that saves its machine is looked at.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

impl Monitor {
    /// Pauses the guest, saves the machine's memory to `memory`, an empty file, and returns its state. The guest stays paused.
    ///
    /// The state is the monitor's word: a guest that has taken it over can put anything there.
    pub fn save(&mut self, memory: &File) -> Result<Vec<u8>> {
        let state = sys::memory_file(c"state").context("create a file for the state of the machine")?;
        self.pause()?;
        let ranges = self.usage()?.memory_ranges;
        let used = used_pages::of(self.pid, &ranges).context("find out which memory the guest uses")?;
        self.send(&Call::Save)?;
        let sent = socket::send_with_fds(&self.calls, &[0], [state.as_fd(), memory.as_fd(), used.as_fd()]);
        sent.map_err(|error| self.lost(error))?;
        self.await_saved(memory)?;
        let len_bytes = state.metadata()?.len();
        ensure!(len_bytes <= STATE_BYTES_MAX, "the state of the machine has {len_bytes} bytes");
        let mut bytes = vec![0; usize::try_from(len_bytes)?];
        state.read_exact_at(&mut bytes, 0).context("read the state of the machine")?;
        Ok(bytes)
    }

    /// Waits as long as the monitor makes progress with writing `memory`.
    fn await_saved(&mut self, memory: &File) -> Result<()> {
        let (mut written, mut since) = (0, Instant::now());
        loop {
            let deadline = Some(Instant::now() + PROGRESS_INTERVAL);
            let [replied, reported] =
                wait(&self.calls, &self.events, deadline).context("wait for the monitor process")?;
            if replied {
                return self.reply(None).and_then(done);
            }
            if reported {
                self.handle_events();
            }
            let now_written = memory.metadata()?.blocks();
            if now_written != written {
                (written, since) = (now_written, Instant::now());
            } else if since.elapsed() > REPLY_TIMEOUT || self.has_ended {
                return Err(self.lost(ErrorKind::TimedOut.into()));
            }
        }
    }
}
