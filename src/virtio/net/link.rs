//! What the rest of husk has of a network device that runs on a thread of its own: its link and its counts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use crate::backend::rate::{Rate, RateControl};
use crate::virtio::ConfigSpace;

/// Where `status` stands in `struct virtio_net_config` (virtio 1.2 §5.1.4).
const STATUS_OFFSET: usize = 6;

/// A handle on a device's link. All of its copies are of the same one, and may be used from any thread.
#[derive(Clone)]
pub struct NetLink(Arc<Shared>);

struct Shared {
    /// In the order of the queues.
    rates: [RateControl; 2],
    config: Arc<ConfigSpace>,
    /// Whether somebody wants it down.
    is_cut: AtomicBool,
    /// Whether the host's side is gone.
    is_lost: AtomicBool,
    /// Held while the driver is shown what the two come to, so that it is shown the latest last.
    showing: Mutex<()>,
    counters: Counters,
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
    pub(super) fn new(config: Arc<ConfigSpace>, rates: [RateControl; 2]) -> NetLink {
        NetLink(Arc::new(Shared {
            rates,
            config,
            is_cut: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            showing: Mutex::new(()),
            counters: Counters::default(),
        }))
    }

    /// Pulls the cable out, or puts it back. The driver is told; frames meanwhile are lost, as on a cable.
    pub fn set_up(&self, up: bool) {
        self.0.is_cut.store(!up, Ordering::SeqCst);
        self.show();
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

    /// What went through so far.
    pub fn counts(&self) -> NetCounts {
        let Counters { rx_bytes, rx_packets, rx_dropped, tx_bytes, tx_packets, tx_dropped } = &self.0.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounts {
            rx_bytes: read(rx_bytes),
            rx_packets: read(rx_packets),
            rx_dropped: read(rx_dropped),
            tx_bytes: read(tx_bytes),
            tx_packets: read(tx_packets),
            tx_dropped: read(tx_dropped),
        }
    }

    /// The host's side is gone, and with it the link, whatever is wanted of it.
    pub(super) fn lose(&self) {
        self.0.is_lost.store(true, Ordering::SeqCst);
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
