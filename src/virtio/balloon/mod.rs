//! From pages that a guest does not need to memory that the host has back: the balloon device (virtio 1.2 §5.5).
//!
//! Memory goes back in two ways. The guest reports what is free, of itself and again and again (free page reporting), and
//! uses it when it likes. And the host has a target: the guest fills its balloon with pages until it has no more than that.
//! In both the host takes the pages away, and gives zeroed ones when they are next touched, so that the guest need not say
//! when it takes pages back (VIRTIO_BALLOON_F_MUST_TELL_HOST is not offered).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::log_rate::LogRate;
use super::queue::{self, Chain, Virtqueue};
use super::{ConfigSpace, Progress, QueueGroup, QueueHandler, RingError, VirtioDevice};
use crate::config::MIN_MEMORY_MIB;
use crate::memory;
use crate::sys::timer::Timer;

pub mod statistics;

#[cfg(test)]
mod tests;

use statistics::{Board, Statistics};

/// Device ID (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 5;

// Feature bits, virtio 1.2 §5.5.3.
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

/// Inflate, deflate, statistics, free page hints (which are not offered), reporting (virtio 1.2 §5.5.2). Linux does without
/// reporting where it has fewer than 32 descriptors.
const QUEUE_SIZES: [u16; 5] = [64, 64, 16, 64, 64];

/// Page frame numbers count in these, whatever the guest's pages are (virtio 1.2 §5.5.6).
const PAGE_BYTES: u64 = 4096;
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;
/// Offset of `actual` in `struct virtio_balloon_config` (virtio 1.2 §5.5.4); `num_pages` is before it.
const ACTUAL: usize = 4;
const CONFIG_BYTES: usize = 8;

/// As many page numbers as are read of one request; Linux sends 256. What is beyond stays with the guest, to no harm.
const REQUEST_PAGES_MAX: u64 = 4096;
/// As much as is taken of one report; Linux sends 128 MiB.
const REPORT_BYTES_MAX: u64 = 1 << 30;
/// What one turn of the worker gives back at most, before it looks at its stop event again.
const TURN_BYTES: u64 = 1 << 30;
/// What a page of its own counts in a turn: giving it back costs as much as a large range does.
const PAGE_COST_BYTES: u64 = TURN_BYTES / REQUEST_PAGES_MAX;

/// A balloon device in a machine of `memory_mib` MiB, and the host's hand on it. The guest is to have `target_mib` of them.
///
/// With `deflates_on_oom` the guest takes pages back when it would have to end a process for lack of memory. Without it the
/// target is a limit, within which the guest sees all of its memory.
pub fn device(memory_mib: u64, target_mib: u64, deflates_on_oom: bool) -> io::Result<(VirtioDevice, BalloonHandle)> {
    let config = Arc::new(ConfigSpace::new(vec![0; CONFIG_BYTES], ACTUAL..CONFIG_BYTES));
    let shared = Arc::new(BalloonState {
        board: Board::default(),
        wanted: AtomicBool::new(false),
        wake: Timer::new()?,
        returned_bytes: AtomicU64::new(0),
    });
    let control = BalloonHandle { memory_mib, config: config.clone(), shared: shared.clone() };
    control.write_target(target_mib.min(memory_mib));
    let oom = if deflates_on_oom { F_DEFLATE_ON_OOM } else { 0 };
    let device = VirtioDevice {
        device_type: DEVICE_TYPE,
        name: "virtio-balloon".to_owned(),
        features: F_STATS_VQ | F_REPORTING | oom,
        feature_needs: &[],
        config,
        queue_groups: vec![QueueGroup { sizes: QUEUE_SIZES.to_vec(), handler: Box::new(Handler::new(shared)) }],
    };
    Ok((device, control))
}

/// What the device and the host's hand have in common.
#[derive(Debug)]
struct BalloonState {
    board: Board,
    /// Whether somebody waits for statistics newer than those on the board.
    wanted: AtomicBool,
    wake: Timer,
    returned_bytes: AtomicU64,
}

/// The host's hand on a guest's balloon, to be used from any thread, whether the machine runs or not.
#[derive(Clone)]
pub struct BalloonHandle {
    memory_mib: u64,
    config: Arc<ConfigSpace>,
    shared: Arc<BalloonState>,
}

/// A size that the machine cannot have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{wanted_mib} MiB of memory: this machine can have {MIN_MEMORY_MIB} to {memory_mib} MiB")]
pub struct BadTarget {
    /// What was asked for.
    pub wanted_mib: u64,
    /// What the machine was started with.
    pub memory_mib: u64,
}

impl BalloonHandle {
    /// Has the guest give memory up, or take it back, until it has `memory_mib`. It does so in its own time, and not below
    /// what it cannot do without; [`BalloonHandle::present_mib`] tells how far it is.
    pub fn set_target_mib(&self, memory_mib: u64) -> Result<(), BadTarget> {
        if !(MIN_MEMORY_MIB..=self.memory_mib).contains(&memory_mib) {
            return Err(BadTarget { wanted_mib: memory_mib, memory_mib: self.memory_mib });
        }
        self.write_target(memory_mib);
        Ok(())
    }

    fn write_target(&self, memory_mib: u64) {
        // At most 2^30 pages: a machine has no more than 4 TiB.
        let pages = self.memory_mib.saturating_sub(memory_mib).saturating_mul(PAGES_PER_MIB);
        self.config.update(0, &u32::try_from(pages).unwrap_or(u32::MAX).to_le_bytes());
    }

    /// What the guest is to have, in MiB.
    pub fn target_mib(&self) -> u64 {
        self.memory_mib - self.read_mib(0)
    }

    /// What the guest has, in MiB: the machine's memory less what it says to be in its balloon.
    pub fn present_mib(&self) -> u64 {
        self.memory_mib - self.read_mib(ACTUAL)
    }

    /// A count of pages in the configuration, in MiB of the machine's memory.
    fn read_mib(&self, offset: usize) -> u64 {
        let mut pages = [0; 4];
        self.config.read(offset as u64, &mut pages);
        (u64::from(u32::from_le_bytes(pages)) / PAGES_PER_MIB).min(self.memory_mib)
    }

    /// Asks the guest for new statistics. It answers in its own time, if it does.
    pub fn ask_for_statistics(&self) {
        self.shared.wanted.store(true, Ordering::Release);
        self.shared.wake.ring();
    }

    /// The last statistics that the guest sent; none before its driver runs.
    pub fn statistics(&self) -> Option<Statistics> {
        self.shared.board.read()
    }

    /// How much memory the guest has given back since the machine started. What it gave twice counts twice.
    pub fn returned_bytes(&self) -> u64 {
        self.shared.returned_bytes.load(Ordering::Relaxed)
    }
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The device's side of its queues. It keeps no chain: what a driver has offered and not got back is still available when
/// the device is saved.
struct Handler {
    shared: Arc<BalloonState>,
    features: u64,
    chain: Chain,
    bytes: Vec<u8>,
    pages: Vec<u32>,
    log_rate: LogRate,
}

impl Handler {
    fn new(shared: Arc<BalloonState>) -> Handler {
        let log_rate = LogRate::default();
        Handler { shared, features: 0, chain: Chain::default(), bytes: Vec::new(), pages: Vec::new(), log_rate }
    }

    /// What queue `index` is for. A queue whose feature was not accepted is not there, and Linux then gives its number to the
    /// next one where others leave a gap (virtio 1.2 §5.5.2): what follows the statistics is for reports in either case,
    /// since free page hints are not offered.
    fn role(&self, index: usize) -> Option<Role> {
        match index {
            0 => Some(Role::Inflate),
            1 => Some(Role::Deflate),
            2 if self.features & F_STATS_VQ != 0 => Some(Role::Statistics),
            _ if self.features & F_REPORTING != 0 => Some(Role::Reporting),
            _ => None,
        }
    }

    /// Gives back the pages whose numbers are in `self.chain`. Returns what that counts in a turn.
    fn inflate(&mut self, queue: &Virtqueue) -> u64 {
        read_chain(&self.chain, queue, REQUEST_PAGES_MAX * 4, &mut self.bytes);
        let (numbers, _) = self.bytes.as_chunks();
        self.pages.clear();
        self.pages.extend(numbers.iter().map(|number| u32::from_le_bytes(*number)));
        // A driver takes pages as they come, and puts the last one first: in order, many make one range.
        self.pages.sort_unstable();
        self.pages.dedup();
        let mut cost_bytes = 0;
        for run in self.pages.chunk_by(|page, next| page.checked_add(1) == Some(*next)) {
            let Some(first) = run.first() else { continue };
            let len_bytes = run.len() as u64 * PAGE_BYTES;
            self.shared.give_back(queue, u64::from(*first) * PAGE_BYTES, len_bytes, &mut self.log_rate);
            cost_bytes += len_bytes + PAGE_COST_BYTES;
        }
        cost_bytes
    }

    /// Gives back the ranges in `self.chain`, which the driver lends for as long.
    fn report(&mut self, queue: &Virtqueue) -> u64 {
        let mut cost_bytes = 0;
        for range in queue::part(self.chain.writable(), 0, REPORT_BYTES_MAX) {
            let len_bytes = u64::from(range.len_bytes);
            self.shared.give_back(queue, range.address.0, len_bytes, &mut self.log_rate);
            cost_bytes += len_bytes + PAGE_COST_BYTES;
        }
        cost_bytes
    }

    /// Reads the guest's statistics, and leaves the buffer that they came in available until new ones are wanted: giving
    /// it back is how they are asked for (virtio 1.2 §5.5.6.3).
    fn take_statistics(&mut self, queue: &mut Virtqueue) -> Result<Progress, RingError> {
        if !queue.pop(&mut self.chain)? {
            return Ok(Progress::Drained);
        }
        if self.shared.wanted.swap(false, Ordering::AcqRel) {
            queue.push(self.chain.head(), 0)?;
            return Ok(Progress::More);
        }
        read_chain(&self.chain, queue, statistics::BYTES_MAX, &mut self.bytes);
        let in_order = self.shared.board.write(&self.bytes);
        if !in_order && self.log_rate.allows() {
            log::warn!("virtio-balloon: statistics of {} bytes make no sense", queue::len_bytes(self.chain.readable()));
        }
        queue.put_back();
        Ok(Progress::Blocked)
    }
}

impl BalloonState {
    fn give_back(&self, queue: &Virtqueue, address: u64, len_bytes: u64, log_rate: &mut LogRate) {
        match memory::give_back(queue.memory(), GuestAddress(address), len_bytes) {
            Ok(()) => drop(self.returned_bytes.fetch_add(len_bytes, Ordering::Relaxed)),
            Err(error) if log_rate.allows() => {
                log::warn!("virtio-balloon: {len_bytes} bytes at {address:#x} cannot be given back: {error}");
            }
            Err(_) => {}
        }
    }
}

/// Reads the readable part of `chain` into `bytes`, up to `len_bytes_max`, as far as its addresses are good.
fn read_chain(chain: &Chain, queue: &Virtqueue, len_bytes_max: u64, bytes: &mut Vec<u8>) {
    bytes.clear();
    for range in queue::part(chain.readable(), 0, len_bytes_max) {
        let before = bytes.len();
        bytes.resize(before + range.len_bytes as usize, 0);
        if queue.memory().read_slice(&mut bytes[before..], range.address).is_err() {
            bytes.truncate(before);
            return;
        }
    }
}

impl QueueHandler for Handler {
    fn start(&mut self, features: u64) {
        self.features = features;
    }

    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        let (Some(queue), Some(role)) = (queues.get_mut(index), self.role(index)) else { return Ok(Progress::Blocked) };
        if role == Role::Statistics {
            return self.take_statistics(queue);
        }
        let mut turn_bytes = 0;
        while turn_bytes < TURN_BYTES {
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            turn_bytes += PAGE_COST_BYTES;
            turn_bytes += match role {
                Role::Inflate => self.inflate(queue),
                Role::Reporting => self.report(queue),
                // The guest finds new pages where it took some back.
                Role::Deflate | Role::Statistics => 0,
            };
            queue.push(self.chain.head(), 0)?;
        }
        Ok(Progress::More)
    }

    fn wake_fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.shared.wake.as_fd()]
    }

    fn reset(&mut self) {
        self.shared.board.clear();
        self.shared.wanted.store(false, Ordering::Release);
    }
}
