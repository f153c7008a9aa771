//! Saves a machine, as its supervisor sees it: the files that the monitor writes, and how long that may take. Meanwhile the
//! supervisor does other things; the monitor does not, and calls are refused.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::message::{Call, Usage};
use super::{Monitor, REPLY_TIMEOUT, STATE_BYTES_MAX, done, message, used_pages, wait};
use crate::sys::{self, socket};

/// How often a monitor that saves its machine must be looked at.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// A save in progress.
pub(super) struct Save {
    state: File,
    memory: File,
    /// That of the paused machine.
    pub(super) usage: Usage,
    /// How much of the memory was written when it was last looked at.
    blocks: u64,
    since: Instant,
}

impl Monitor {
    /// Pauses the guest, and begins to save the machine's memory to `memory`, an empty file; with `changed`, an empty file for a
    /// bitmap, only the pages that have changed since its memory was that of a file. The guest stays paused, even after a failure. Until [`Monitor::saved`] returns a state or an error, other calls are refused.
    pub fn begin_save(&mut self, memory: &File, changed: Option<&File>) -> Result<()> {
        let state = sys::memory_file(c"state").context("create a file for the state of the machine")?;
        self.pause()?;
        let usage = self.usage()?;
        let used = used_pages::of(self.pid, &usage.memory_ranges).context("find out which memory the guest uses")?;
        let memory = memory.try_clone().context("duplicate a file descriptor")?;
        let (state_fd, memory_fd, used_fd) = (state.as_fd(), memory.as_fd(), used.as_fd());
        let sent = if let Some(changed) = changed {
            self.send(&Call::SaveChanges)?;
            socket::send_with_fds(&self.calls, &[0], [state_fd, memory_fd, used_fd, changed.as_fd()])
        } else {
            self.send(&Call::Save)?;
            socket::send_with_fds(&self.calls, &[0], [state_fd, memory_fd, used_fd])
        };
        sent.map_err(|error| self.lost(error))?;
        self.save = Some(Save { state, memory, usage, blocks: 0, since: Instant::now() });
        Ok(())
    }

    /// The state of the machine, once it and its memory are saved. Must be called when [`Monitor::calls_fd`] is readable, and every
    /// [`PROGRESS_INTERVAL`]: a monitor that makes no progress is ended.
    ///
    /// The state is the monitor's word: a guest that has taken it over can put anything there.
    pub fn saved(&mut self) -> Result<Option<Vec<u8>>> {
        let [replied, _] =
            wait(&self.calls, &self.events, Some(Instant::now())).context("wait for the monitor process")?;
        let Some(save) = &mut self.save else { bail!("the machine has ended meanwhile") };
        if !replied {
            let blocks = save.memory.metadata()?.blocks();
            if blocks != save.blocks {
                (save.blocks, save.since) = (blocks, Instant::now());
            } else if save.since.elapsed() > REPLY_TIMEOUT || self.has_ended {
                return Err(self.lost(ErrorKind::TimedOut.into()));
            }
            return Ok(None);
        }
        let state = save.state.try_clone().context("duplicate a file descriptor")?;
        // Input was refused meanwhile.
        (self.save, self.input_wanted) = (None, true);
        message::receive(&self.calls).map_err(|error| self.lost(error)).and_then(done)?;
        let len_bytes = state.metadata()?.len();
        ensure!(len_bytes <= STATE_BYTES_MAX, "the state of the machine has {len_bytes} bytes");
        let mut bytes = vec![0; usize::try_from(len_bytes)?];
        state.read_exact_at(&mut bytes, 0).context("read the state of the machine")?;
        Ok(Some(bytes))
    }

    /// Maps the memory of the machine, whose guest is paused, from the file to which it was just saved, so that its changes are
    /// known. The file must not change as long as the machine runs.
    pub fn track(&mut self, memory: &File) -> Result<()> {
        self.send(&Call::Track)?;
        let sent = socket::send_with_fds(&self.calls, &[0], [memory.as_fd()]);
        sent.map_err(|error| self.lost(error))?;
        self.reply(Some(REPLY_TIMEOUT)).and_then(done)
    }

    /// The descriptor that is readable when the machine is saved.
    pub fn calls_fd(&self) -> RawFd {
        self.calls.as_raw_fd()
    }
}
