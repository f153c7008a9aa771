//! The balloon device (virtio 1.2 §5.5), which returns unused guest memory to the host.
//!
//! Memory is returned in two ways. The guest repeatedly reports free pages (free page reporting), and may use them
//! again at any time. And the host sets a target: the guest inflates its balloon until it has no more memory than that.
//! In both cases the host discards the pages and provides zeroed ones on the next access, so that the guest need not
//! say when it takes pages back (VIRTIO_BALLOON_F_MUST_TELL_HOST is not offered).

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

/// Inflate, deflate, statistics, free page hints (not offered), reporting (virtio 1.2 §5.5.2). Linux does not use
/// reporting with fewer than 32 descriptors.
const QUEUE_SIZES: [u16; 5] = [64, 64, 16, 64, 64];

/// The unit of page frame numbers, regardless of the guest's page size (virtio 1.2 §5.5.6).
const PAGE_BYTES: u64 = 4096;
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;
/// The offset of `actual` in `struct virtio_balloon_config` (virtio 1.2 §5.5.4); `num_pages` is before it.
const ACTUAL: usize = 4;
const CONFIG_BYTES: usize = 8;

/// The maximum number of page numbers read from one request; Linux sends 256. The rest are ignored, which is harmless.
const REQUEST_PAGES_MAX: u64 = 4096;
/// The maximum size of one report; Linux sends 128 MiB.
const REPORT_BYTES_MAX: u64 = 1 << 30;
/// The maximum amount returned in one turn of the worker, before it checks its stop event again.
const TURN_BYTES: u64 = 1 << 30;
/// The cost of a single page in a turn: returning it takes as long as returning a large range.
const PAGE_COST_BYTES: u64 = TURN_BYTES / REQUEST_PAGES_MAX;

/// What a balloon does.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The machine's memory in MiB.
    pub memory_mib: u64,
    /// The initial target in MiB.
    pub target_mib: u64,
    /// Whether the guest deflates the balloon before it would kill a process for lack of memory. Otherwise the target is
    /// a hard limit, while the guest still sees all of its memory.
    pub deflates_on_oom: bool,
    /// Whether the guest reports free pages, which are then returned to the host.
    pub reports_free_pages: bool,
}

/// Creates a balloon device and its handle.
pub fn device(options: Options) -> io::Result<(VirtioDevice, BalloonHandle)> {
    let Options { memory_mib, target_mib, deflates_on_oom, reports_free_pages } = options;
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
    let reporting = if reports_free_pages { F_REPORTING } else { 0 };
    let device = VirtioDevice {
        device_type: DEVICE_TYPE,
        name: "virtio-balloon".to_owned(),
        features: F_STATS_VQ | reporting | oom,
        feature_needs: &[],
        config,
        queue_groups: vec![QueueGroup { sizes: QUEUE_SIZES.to_vec(), handler: Box::new(Handler::new(shared)) }],
    };
    Ok((device, control))
}

/// State shared by the device and its handle.
#[derive(Debug)]
struct BalloonState {
    board: Board,
    /// Whether statistics newer than those on the board were requested.
    wanted: AtomicBool,
    wake: Timer,
    returned_bytes: AtomicU64,
}

/// A handle to a guest's balloon, usable on any thread, whether the machine is running or not.
#[derive(Clone)]
pub struct BalloonHandle {
    memory_mib: u64,
    config: Arc<ConfigSpace>,
    shared: Arc<BalloonState>,
}

/// A target that is out of range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{wanted_mib} MiB of memory: this machine can have {MIN_MEMORY_MIB} to {memory_mib} MiB")]
pub struct BadTarget {
    /// The requested target.
    pub wanted_mib: u64,
    /// The memory that the machine was started with.
    pub memory_mib: u64,
}

impl BalloonHandle {
    /// Makes the guest give up or take back memory until it has `memory_mib`. It does so at its own pace, and not below
    /// what it needs; [`BalloonHandle::present_mib`] reports the progress.
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

    /// The target, in MiB.
    pub fn target_mib(&self) -> u64 {
        self.memory_mib - self.read_mib(0)
    }

    /// The guest's current memory, in MiB: the machine's memory minus the reported size of the balloon.
    pub fn present_mib(&self) -> u64 {
        self.memory_mib - self.read_mib(ACTUAL)
    }

    /// A page count in the configuration, converted to MiB of the machine's memory.
    fn read_mib(&self, offset: usize) -> u64 {
        let mut pages = [0; 4];
        self.config.read(offset as u64, &mut pages);
        (u64::from(u32::from_le_bytes(pages)) / PAGES_PER_MIB).min(self.memory_mib)
    }

    /// Requests new statistics from the guest, which answers asynchronously, if at all.
    pub fn ask_for_statistics(&self) {
        self.shared.wanted.store(true, Ordering::Release);
        self.shared.wake.ring();
    }

    /// The latest statistics; `None` before the guest's driver is running.
    pub fn statistics(&self) -> Option<Statistics> {
        self.shared.board.read()
    }

    /// The amount of memory that the guest has returned since the machine started. Memory returned twice counts twice.
    pub fn returned_bytes(&self) -> u64 {
        self.shared.returned_bytes.load(Ordering::Relaxed)
    }
}

/// The purpose of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The device side of the queues. It does not hold chains: those not yet returned to the driver are still available
/// when the device is saved.
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

    /// The role of queue `index`. Queues of features that were not accepted do not exist, and Linux then assigns their
    /// number to the next queue while others leave a gap (virtio 1.2 §5.5.2): the queue after statistics is for reports
    /// in either case, since free page hints are not offered.
    fn role(&self, index: usize) -> Option<Role> {
        match index {
            0 => Some(Role::Inflate),
            1 => Some(Role::Deflate),
            2 if self.features & F_STATS_VQ != 0 => Some(Role::Statistics),
            _ if self.features & F_REPORTING != 0 => Some(Role::Reporting),
            _ => None,
        }
    }

    /// Returns the pages whose numbers are in `self.chain` to the host. Returns the cost in this turn.
    fn inflate(&mut self, queue: &Virtqueue) -> u64 {
        read_chain(&self.chain, queue, REQUEST_PAGES_MAX * 4, &mut self.bytes);
        let (numbers, _) = self.bytes.as_chunks();
        self.pages.clear();
        self.pages.extend(numbers.iter().map(|number| u32::from_le_bytes(*number)));
        // A driver takes pages as they come, with the last one first: sorted, many of them form one range.
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

    /// Returns the ranges in `self.chain` to the host. The driver does not use them until the chain is returned.
    fn report(&mut self, queue: &Virtqueue) -> u64 {
        let mut cost_bytes = 0;
        for range in queue::part(self.chain.writable(), 0, REPORT_BYTES_MAX) {
            let len_bytes = u64::from(range.len_bytes);
            self.shared.give_back(queue, range.address.0, len_bytes, &mut self.log_rate);
            cost_bytes += len_bytes + PAGE_COST_BYTES;
        }
        cost_bytes
    }

    /// Reads the guest's statistics, and keeps their buffer available until new ones are requested by returning it
    /// (virtio 1.2 §5.5.6.3).
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
            Ok(bytes) => drop(self.returned_bytes.fetch_add(bytes, Ordering::Relaxed)),
            Err(error) if log_rate.allows() => {
                log::warn!("virtio-balloon: {len_bytes} bytes at {address:#x} cannot be given back: {error}");
            }
            Err(_) => {}
        }
    }
}

/// Reads the readable part of `chain` into `bytes`, up to `len_bytes_max` or the first bad address.
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
                // The guest gets new pages in place of those it took back.
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
