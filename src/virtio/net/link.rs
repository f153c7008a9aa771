//! The interface of a network device to other threads: its link state, limits and counters.

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

/// The offset of `status` in `struct virtio_net_config` (virtio 1.2 §5.1.4).
const STATUS_OFFSET: usize = 6;

/// A handle to a device's link. Clones share state and may be used on any thread.
#[derive(Clone)]
pub struct NetLink(Arc<LinkState>);

struct LinkState {
    /// In queue order.
    rates: [RateControl; 2],
    config: Arc<ConfigSpace>,
    /// Whether the link was set down by the user.
    is_cut: AtomicBool,
    /// Whether the back end has failed.
    is_lost: AtomicBool,
    /// Held while the resulting state is shown to the driver, so that the latest state is shown last.
    showing: Mutex<()>,
    /// Signaled when another thread has changed it.
    news: Timer,
    counters: Counters,
    by_kernel: Mutex<ByKernel>,
}

/// Traffic while the host's kernel served the queues, according to its counters of the tap device.
#[derive(Default)]
struct ByKernel {
    counts: Option<TapCounts>,
    passed: Passed,
    /// The tap device's counters at the last update of `passed`, while the kernel serves the queues.
    seen: Option<Passed>,
}

impl ByKernel {
    /// Updates `passed`. It stays unchanged once the device is gone.
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

/// A device's traffic since it was created, from the guest's perspective, as shown by `ip -s link` there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetCounts {
    /// Bytes of frames received by the guest.
    pub rx_bytes: u64,
    /// Frames received by the guest.
    pub rx_packets: u64,
    /// Frames to the guest dropped here.
    pub rx_dropped: u64,
    /// Bytes of frames sent by the guest.
    pub tx_bytes: u64,
    /// Frames sent by the guest.
    pub tx_packets: u64,
    /// Frames from the guest dropped here.
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

    /// Sets the link up or down. The driver is notified; while the link is down frames are dropped.
    pub fn set_up(&self, up: bool) {
        self.0.is_cut.store(!up, Ordering::SeqCst);
        self.show();
        self.0.news.ring();
    }

    /// Whether the link is up.
    pub fn is_up(&self) -> bool {
        !self.0.is_cut.load(Ordering::Relaxed) && !self.0.is_lost.load(Ordering::Relaxed)
    }

    /// The rate limits per direction; frames count as operations.
    pub fn rate(&self) -> Rate {
        let [rate, _] = &self.0.rates;
        rate.rate()
    }

    /// Sets the rate limits. Frames beyond them wait, in both directions.
    pub fn set_rate(&self, rate: Rate) {
        self.0.rates.iter().for_each(|control| control.set(rate));
    }

    /// Whether the host's kernel processes the frames (vhost-net) instead of this process.
    pub fn is_served_by_kernel(&self) -> bool {
        self.by_kernel().seen.is_some()
    }

    /// The counters so far. Drops are unknown for frames that the kernel processes.
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

    /// Sets the counters to use while the kernel processes the frames.
    pub(super) fn count_by(&self, counts: TapCounts) {
        self.by_kernel().counts = Some(counts);
    }

    /// Records whether the kernel processes the frames from now on.
    pub(super) fn set_served_by_kernel(&self, served: bool) {
        let mut by_kernel = self.by_kernel();
        by_kernel.look();
        by_kernel.seen = served.then(|| by_kernel.counts.as_ref().and_then(TapCounts::read).unwrap_or_default());
    }

    /// Readable when the link was set up or down.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.0.news.as_fd()
    }

    fn by_kernel(&self) -> MutexGuard<'_, ByKernel> {
        self.0.by_kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the back end as failed, which takes the link down regardless of the user's setting.
    pub(super) fn lose(&self) {
        self.0.is_lost.store(true, Ordering::SeqCst);
        self.show();
    }

    /// Marks the back end as working again.
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

/// Written only by the device's thread.
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

/// With a single writer there is no race between the load and the store, which are cheaper than a locked addition.
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}
