//! The file system device (virtio 1.2 §5.11): passes requests to the process that serves the folder, and replies back.
//!
//! Nothing of a request is read here but its length, and of its header the number that a reply repeats, for a reply in place of
//! a server that is gone.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::log_rate::LogRate;
use super::queue::{self, Chain, GuestRange, Virtqueue};
use super::{ConfigSpace, Progress, QueueGroup, QueueHandler, RingError, VirtioDevice};
use crate::config::MAX_TAG_BYTES;
use crate::fs::link::{Link, Message, SLOT_BYTES, SLOTS};
use crate::memory::GuestMemory;
use crate::resources::share::SharedFolder;

/// Device ID (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 26;
/// The sizes of the queue for what must not wait, and of the one for requests.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
/// The number of request queues.
const REQUEST_QUEUES: u32 = 1;
/// The number of requests passed on before the worker checks its stop event.
const REQUESTS_PER_TURN: usize = 16;
/// How long a pause waits for the server, which may wait for the host's disk. After that, requests stay with it.
const PATIENCE: Duration = if cfg!(test) { Duration::from_secs(1) } else { Duration::from_secs(5) };
/// Where a request has its number, and the size of a reply's header (linux/fuse.h).
const UNIQUE_AT: u64 = 8;
const REPLY_HEADER_BYTES: u32 = 16;

/// Creates the device for a folder that is served.
pub fn device(folder: SharedFolder) -> io::Result<VirtioDevice> {
    let SharedFolder { tag, ends } = folder;
    let name = format!("share {tag}");
    let mut config = tag.into_bytes();
    config.resize(MAX_TAG_BYTES, 0);
    config.extend(REQUEST_QUEUES.to_le_bytes());
    let link = ends.connect()?;
    link.socket().set_read_timeout(Some(PATIENCE))?;
    let handler = FileSystem {
        name: name.clone(),
        link: Some(link),
        chain: Chain::default(),
        in_flight: Default::default(),
        abandoned: [false; SLOTS],
        free_slots: (0..SLOTS as u32).rev().collect(),
        log_rate: LogRate::default(),
    };
    Ok(VirtioDevice {
        device_type: DEVICE_TYPE,
        name,
        features: 0,
        feature_needs: &[],
        config: Arc::new(ConfigSpace::new(config, 0..0)),
        queue_groups: vec![QueueGroup { sizes: QUEUE_SIZES.to_vec(), handler: Box::new(handler) }],
    })
}

/// The device side of the queues.
struct FileSystem {
    name: String,
    /// `None` when the server is gone.
    link: Option<Link>,
    chain: Chain,
    /// By slot.
    in_flight: [Option<InFlight>; SLOTS],
    /// The slots of requests from before a reset, which the server still has.
    abandoned: [bool; SLOTS],
    /// The one used last is at the end.
    free_slots: Vec<u32>,
    log_rate: LogRate,
}

/// A request that is with the server.
struct InFlight {
    queue: usize,
    head: u16,
    unique: [u8; 8],
    /// Where the reply goes.
    room: Vec<GuestRange>,
    room_bytes: u32,
}

impl FileSystem {
    /// Passes on the request in `self.chain`, or replies to it with an error.
    fn begin(&mut self, index: usize, queue: &mut Virtqueue) -> Result<(), RingError> {
        let room_bytes = queue::len_bytes(self.chain.writable()).min(SLOT_BYTES as u64) as u32;
        let unique = queue::part(self.chain.readable(), UNIQUE_AT, u64::MAX).collect::<Vec<_>>();
        let request = InFlight {
            queue: index,
            head: self.chain.head(),
            unique: queue::read_front(queue.memory(), &unique).unwrap_or_default(),
            room: self.chain.writable().to_vec(),
            room_bytes,
        };
        let Some(slot) = self.free_slots.last().copied() else { return refuse(queue, &request, libc::EIO) };
        let Some(link) = &self.link else { return refuse(queue, &request, libc::ENOTCONN) };
        let copied = link.slot(slot).ok().and_then(|to| copy_in(queue.memory(), self.chain.readable(), &to));
        let Some(len_bytes) = copied else { return refuse(queue, &request, libc::EIO) };
        match link.send(Message { slot, len_bytes, room_bytes }) {
            Ok(()) => {
                self.free_slots.pop();
                if let Some(place) = self.in_flight.get_mut(slot as usize) {
                    *place = Some(request);
                }
                Ok(())
            }
            // The reason is found when its messages are read, of which its end is one.
            Err(_) => refuse(queue, &request, libc::ENOTCONN),
        }
    }

    /// Completes the requests to which the server has replied. With `waits`, all that are in flight, unless it takes too long.
    fn reap(&mut self, queues: &mut [Virtqueue], waits: bool) -> Result<(), RingError> {
        let begin = Instant::now();
        // A server can end while it has no request.
        while !waits || self.is_busy() && begin.elapsed() < PATIENCE {
            let Some(link) = &self.link else { break };
            let message = if waits { link.receive() } else { link.receive_now() };
            let completed = match message {
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
                Ok(message) => self.complete(message, queues)?,
            };
            if let Err(error) = completed {
                self.give_up(&error, queues)?;
            }
        }
        Ok(())
    }

    fn is_busy(&self) -> bool {
        self.in_flight.iter().any(Option::is_some)
    }

    /// Completes the request in a slot. The inner result says whether the server keeps to the rules.
    fn complete(&mut self, message: Message, queues: &mut [Virtqueue]) -> Result<io::Result<()>, RingError> {
        let Message { slot, len_bytes, .. } = message;
        if self.abandoned.get_mut(slot as usize).is_some_and(std::mem::take) {
            self.free_slots.push(slot);
            return Ok(Ok(()));
        }
        let place = self.in_flight.get_mut(slot as usize);
        let Some((place, link)) = place.zip(self.link.as_ref()) else { return Ok(Err(ErrorKind::InvalidData.into())) };
        let Some(request) = place.take_if(|request| len_bytes <= request.room_bytes) else {
            return Ok(Err(ErrorKind::InvalidData.into()));
        };
        let Some(queue) = queues.get_mut(request.queue) else { return Ok(Ok(())) };
        let copied = link.slot(slot).map(|from| copy_out(queue.memory(), &from, &request.room, len_bytes));
        self.free_slots.push(slot);
        queue.push(request.head, copied.unwrap_or(0))?;
        Ok(Ok(()))
    }

    /// The server is gone, or breaks rules: nothing is passed to it any more, and its requests fail.
    fn give_up(&mut self, why: &io::Error, queues: &mut [Virtqueue]) -> Result<(), RingError> {
        if self.link.take().is_some() && self.log_rate.allows() {
            let gone = why.kind() == ErrorKind::UnexpectedEof;
            let why = if gone { "its process has ended".to_owned() } else { why.to_string() };
            log::error!("{}: the folder is served no more: {why}", self.name);
        }
        for (slot, place) in (0..).zip(&mut self.in_flight) {
            if let Some(request) = place.take() {
                self.free_slots.push(slot);
                if let Some(queue) = queues.get_mut(request.queue) {
                    refuse(queue, &request, libc::ENOTCONN)?;
                }
            }
        }
        Ok(())
    }
}

impl QueueHandler for FileSystem {
    fn start(&mut self, _features: u64) {}

    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        // All queues are processed when the server has sent something; the first one's turn finds its end when nothing is in flight.
        if index == 0 || self.is_busy() || self.abandoned.contains(&true) {
            self.reap(queues, false)?;
        }
        for _ in 0..REQUESTS_PER_TURN {
            if self.free_slots.is_empty() {
                return Ok(Progress::Blocked);
            }
            let Some(queue) = queues.get_mut(index) else { return Ok(Progress::Drained) };
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            self.begin(index, queue)?;
        }
        Ok(Progress::More)
    }

    fn wake_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.link.iter().map(AsFd::as_fd).collect()
    }

    /// There is always room for a message of each slot.
    fn waits_for_room(&self) -> bool {
        false
    }

    fn drain(&mut self, queues: &mut [Virtqueue]) -> Result<(), RingError> {
        self.reap(queues, true)?;
        if self.is_busy() && self.log_rate.allows() {
            log::warn!("{}: the host's file system has not answered for {} s", self.name, PATIENCE.as_secs());
        }
        Ok(())
    }

    /// The server may still work on requests in its slots, which are not those of guest memory: their replies go nowhere.
    fn reset(&mut self) {
        for (place, is_abandoned) in self.in_flight.iter_mut().zip(&mut self.abandoned) {
            *is_abandoned |= place.take().is_some();
        }
    }
}

/// Completes a request with an error in place of the server's reply.
fn refuse(queue: &mut Virtqueue, request: &InFlight, error: i32) -> Result<(), RingError> {
    if request.room_bytes < REPLY_HEADER_BYTES {
        return queue.push(request.head, 0);
    }
    let [len, error] = [REPLY_HEADER_BYTES, error.wrapping_neg() as u32].map(u32::to_le_bytes);
    let reply = [len.as_slice(), &error, &request.unique].concat();
    let is_written = queue::write_front(queue.memory(), &request.room, &reply);
    queue.push(request.head, if is_written { REPLY_HEADER_BYTES } else { 0 })
}

/// Copies `ranges` of guest memory to a slot. `None` if they are larger than it, or not memory.
fn copy_in(memory: &GuestMemory, ranges: &[GuestRange], to: &VolatileSlice<'_>) -> Option<u32> {
    let mut done = 0;
    for GuestRange { address, len_bytes } in ranges {
        for slice in GuestMemoryBackend::get_slices(memory, *address, *len_bytes as usize) {
            let slice = slice.ok()?;
            let place = to.subslice(done, slice.len()).ok()?;
            slice.copy_to_volatile_slice(place);
            done += slice.len();
        }
    }
    u32::try_from(done).ok()
}

/// Copies `len_bytes` from a slot to `ranges` of guest memory, up to the first bad address. Returns how many were copied.
fn copy_out(memory: &GuestMemory, from: &VolatileSlice<'_>, ranges: &[GuestRange], len_bytes: u32) -> u32 {
    let mut done = 0;
    for GuestRange { address, len_bytes } in queue::part(ranges, 0, len_bytes.into()) {
        for slice in GuestMemoryBackend::get_slices(memory, address, len_bytes as usize) {
            let Ok(slice) = slice else { return done as u32 };
            let Ok(piece) = from.subslice(done, slice.len()) else { return done as u32 };
            piece.copy_to_volatile_slice(slice);
            done += slice.len();
        }
    }
    done as u32
}

#[cfg(test)]
mod tests;
