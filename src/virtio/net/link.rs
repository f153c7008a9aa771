//! What the rest of husk has of a network device that runs on a thread of its own: its link and its counts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use crate::backend::net::{Passed, TapCounts};
use crate::backend::rate::RateControl;
use crate::config::Rate;
use crate::sys::timer::Timer;
use crate::virtio::ConfigSpace;

/// Where `status` stands in `struct virtio_net_config` (virtio 1.2 §5.1.4).
const STATUS_OFFSET: usize = 6;

/// A handle on a device's link. All of its copies are of the same one, and may be used from any thread.
#[derive(Clone)]
pub struct NetLink(Arc<LinkState>);

struct LinkState {
    /// In the order of the queues.
    rates: [RateControl; 2],
    config: Arc<ConfigSpace>,
    /// Whether somebody wants it down.
    is_cut: AtomicBool,
    /// Whether the host's side does not go on.
    is_lost: AtomicBool,
    /// Held while the driver is shown what the two come to, so that it is shown the latest last.
    showing: Mutex<()>,
    /// Rings when somebody has changed it.
    news: Timer,
    counters: Counters,
    by_kernel: Mutex<ByKernel>,
}

/// What went through while the host's kernel served the queues, by its own count of the tap device.
#[derive(Default)]
struct ByKernel {
    counts: Option<TapCounts>,
    passed: Passed,
    /// The device's own count when `passed` was last brought up to it, while the kernel serves the queues.
    seen: Option<Passed>,
}

impl ByKernel {
    /// Brings `passed` up to now. It stays as it is once the device is gone.
    fn look(&mut self) {
        let (Some(seen), Some(now)) = (self.seen, self.counts.as_ref().and_then(TapCounts::read)) else { return };
        let Passed { out_bytes, out_packets, in_bytes, in_packets } = &mut self.passed;
        *out_bytes += now.out_bytes.saturating_sub(seen.out_bytes);
        *out_packets += now.out_packets.saturating_sub(seen.out_packets);
        *in_bytes += now.in_bytes.saturating_sub(seen.in_bytes);
        *in_packets += now.in_packets.saturating_sub(seen.in_packets);
        self.seen = Some(now);
    }
}

/// What went through a device since it was made, seen from the guest as `ip -s link` there shows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetCounts {
    /// Bytes of frames that the guest was given.
    pub rx_bytes: u64,
    /// Frames that the guest was given.
    pub rx_packets: u64,
    /// Frames for the guest that were lost here.
    pub rx_dropped: u64,
    /// Bytes of frames that the guest sent.
    pub tx_bytes: u64,
    /// Frames that the guest sent.
    pub tx_packets: u64,
    /// Frames of the guest's that were lost here.
    pub tx_dropped: u64,
}

impl NetLink {
    pub(super) fn new(config: Arc<ConfigSpace>, rates: [RateControl; 2]) -> io::Result<NetLink> {
        Ok(NetLink(Arc::new(LinkState {
            rates,
            config,
            is_cut: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            showing: Mutex::new(()),
            news: Timer::new()?,
            counters: Counters::default(),
            by_kernel: Mutex::default(),
        })))
    }

    /// Pulls the cable out, or puts it back. The driver is told; frames meanwhile are lost, as on a cable.
    pub fn set_up(&self, up: bool) {
        self.0.is_cut.store(!up, Ordering::SeqCst);
        self.show();
        self.0.news.ring();
    }

    /// Whether frames go through.
    pub fn is_up(&self) -> bool {
        !self.0.is_cut.load(Ordering::Relaxed) && !self.0.is_lost.load(Ordering::Relaxed)
    }

    /// What may go through in a second, in each direction; frames count as operations.
    pub fn rate(&self) -> Rate {
        let [rate, _] = &self.0.rates;
        rate.rate()
    }

    /// Sets that anew. What is too much waits, on either side.
    pub fn set_rate(&self, rate: Rate) {
        self.0.rates.iter().for_each(|control| control.set(rate));
    }

    /// Whether the host's kernel moves the frames (vhost-net), and not this process.
    pub fn is_served_by_kernel(&self) -> bool {
        self.by_kernel().seen.is_some()
    }

    /// What went through so far. Of what the kernel moves its drops are not known.
    pub fn counts(&self) -> NetCounts {
        let Counters { rx_bytes, rx_packets, rx_dropped, tx_bytes, tx_packets, tx_dropped } = &self.0.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut by_kernel = self.by_kernel();
        by_kernel.look();
        let by_kernel = by_kernel.passed;
        NetCounts {
            rx_bytes: read(rx_bytes).wrapping_add(by_kernel.out_bytes),
            rx_packets: read(rx_packets).wrapping_add(by_kernel.out_packets),
            rx_dropped: read(rx_dropped),
            tx_bytes: read(tx_bytes).wrapping_add(by_kernel.in_bytes),
            tx_packets: read(tx_packets).wrapping_add(by_kernel.in_packets),
            tx_dropped: read(tx_dropped),
        }
    }

    /// What counts while the kernel moves the frames.
    pub(super) fn count_by(&self, counts: TapCounts) {
        self.by_kernel().counts = Some(counts);
    }

    /// From now on the kernel moves the frames, or no longer.
    pub(super) fn set_served_by_kernel(&self, served: bool) {
        let mut by_kernel = self.by_kernel();
        by_kernel.look();
        by_kernel.seen = served.then(|| by_kernel.counts.as_ref().and_then(TapCounts::read).unwrap_or_default());
    }

    /// Becomes readable when somebody cuts the link or mends it.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.0.news.as_fd()
    }

    fn by_kernel(&self) -> MutexGuard<'_, ByKernel> {
        self.0.by_kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host's side does not go on, and with it the link, whatever is wanted of it.
    pub(super) fn lose(&self) {
        self.0.is_lost.store(true, Ordering::SeqCst);
        self.show();
    }

    /// The host's side is there again.
    pub(super) fn find(&self) {
        self.0.is_lost.store(false, Ordering::SeqCst);
        self.show();
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.0.counters
    }

    fn show(&self) {
        let _showing = self.0.showing.lock().unwrap_or_else(PoisonError::into_inner);
        let status = if self.is_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        self.0.config.update(STATUS_OFFSET, &status.to_le_bytes());
    }
}

/// Written by the device's thread alone.
#[derive(Default)]
pub(super) struct Counters {
    rx_bytes: AtomicU64,
    rx_packets: AtomicU64,
    rx_dropped: AtomicU64,
    tx_bytes: AtomicU64,
    tx_packets: AtomicU64,
    tx_dropped: AtomicU64,
}

impl Counters {
    pub(super) fn count_to_guest(&self, frame_bytes: usize) {
        add(&self.rx_bytes, frame_bytes as u64);
        add(&self.rx_packets, 1);
    }

    pub(super) fn count_dropped_to_guest(&self) {
        add(&self.rx_dropped, 1);
    }

    pub(super) fn count_from_guest(&self, frame_bytes: usize) {
        add(&self.tx_bytes, frame_bytes as u64);
        add(&self.tx_packets, 1);
    }

    pub(super) fn count_dropped_from_guest(&self) {
        add(&self.tx_dropped, 1);
    }
}

/// With one writer there is nothing to be lost between the load and the store, which cost less than one locked addition.
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}
