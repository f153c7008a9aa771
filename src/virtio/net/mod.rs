//! The network device (virtio 1.2 §5.1).
//!
//! ```text
//! guest's tx ring ─ header, frame ─> checked ─> backend: passt's socket or a tap device
//! guest's rx ring <─ header, frame ── as many of its buffers as that takes ── backend
//! ```
//!
//! There may be several queue pairs, each with its own back end; the control queue sets how many are in use. If the
//! kernel supports everything that is configured, the rings are offloaded to it (`vhost.rs`).

mod control;
mod features;
mod limit;
mod link;
mod pair;
mod vhost;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use self::limit::Place;
use self::pair::{Common, Pair, TX};
use self::vhost::Vhost;
use super::log_rate::LogRate;
use super::queue::{Chain, GuestRange, Virtqueue};
use super::{ConfigSpace, Notifiers, Progress, QueueGroup, QueueHandler, RingError, StateMismatch, VirtioDevice};
use crate::backend::net::{self as backend, NetBackend};
use crate::backend::rate::Limiter;
use crate::config::Rate;
use crate::resources::net::Network;
use crate::sys::timer::Timer;

pub use link::{NetCounts, NetLink};

/// Device ID (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 1;
/// The sizes of a pair's queues, and of the control queue.
const PAIR_SIZES: [u16; 2] = [256, 256];
const CONTROL_SIZE: u16 = 64;
/// The maximum number of commands processed in a turn.
const COMMANDS_PER_TURN: usize = 32;
/// How often a driver may change the number of pairs: each change makes the host's kernel wait for all of its CPUs,
/// under its global network lock.
const CHANGES_PER_SECOND: u64 = 20;
/// The default MTU, Ethernet's.
const MTU_BYTES: u16 = 1500;

/// The maximum memory that a guest can make an interface with this many queue pairs use, in bytes: the chains for a
/// frame, each of which may be as long as the queue, both for reading and writing, and the back ends' buffers.
pub fn budget_bytes(pairs: u32) -> u64 {
    let [queue_size, _] = PAIR_SIZES.map(u64::from);
    queue_size * 2 * queue_size * size_of::<GuestRange>() as u64 + u64::from(pairs) * backend::BUDGET_BYTES
}

/// Creates a network device for an opened network, and a handle to its link.
pub fn device(network: Network) -> io::Result<(VirtioDevice, NetLink)> {
    let Network { backends, name, mac, mtu_bytes, rate, counts } = network;
    let (device, link) = device_on(backends, &name, mac, mtu_bytes)?;
    if let Some(counts) = counts {
        link.count_by(counts);
    }
    if !rate.is_unlimited() {
        link.set_rate(rate);
    }
    Ok((device, link))
}

/// Creates a network device with a queue pair for each of `backends`, which must all be connected to the same network.
/// `name` is used in logs; without an MTU, Ethernet's is used. Fails with no back ends or with 256 or more.
pub fn device_on(
    backends: Vec<Box<dyn NetBackend>>,
    name: &str,
    mac: [u8; 6],
    mtu_bytes: Option<u16>,
) -> io::Result<(VirtioDevice, NetLink)> {
    let (Some(first), Ok(pairs)) = (backends.first(), u8::try_from(backends.len())) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let own = [VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS];
    let several = [VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ];
    let own = own.iter().chain(several.iter().filter(|_| pairs > 1));
    let features = own.fold(first.features(), |features, bit| features | 1 << bit);
    let mut queue_sizes = PAIR_SIZES.repeat(pairs.into());
    queue_sizes.extend((pairs > 1).then_some(CONTROL_SIZE));
    let config = Arc::new(ConfigSpace::new(config(mac, pairs.into(), mtu_bytes.unwrap_or(MTU_BYTES)), 0..0));
    let [(rx, rx_rate), (tx, tx_rate)] = [Limiter::new(Rate::default())?, Limiter::new(Rate::default())?];
    let link = NetLink::new(config.clone(), [rx_rate, tx_rate])?;
    let device = VirtioDevice {
        device_type: DEVICE_TYPE,
        name: name.to_owned(),
        features,
        feature_needs: features::NEEDS,
        config,
        queue_groups: vec![QueueGroup {
            sizes: queue_sizes,
            handler: Box::new(Net::new(backends, Common::new(name, link.clone(), [rx, tx]))?),
        }],
    };
    Ok((device, link))
}

/// `struct virtio_net_config` (virtio 1.2 §5.1.4), up to the fields of the offered features.
fn config(mac: [u8; 6], pairs: u16, mtu_bytes: u16) -> Vec<u8> {
    let mut bytes = mac.to_vec();
    bytes.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    bytes.extend(pairs.to_le_bytes()); // max_virtqueue_pairs
    bytes.extend(mtu_bytes.to_le_bytes());
    bytes
}

/// The device side of the queues.
struct Net {
    /// In queue order; at least one.
    pairs: Vec<Pair>,
    /// The number of pairs that the driver uses, starting with the first. The others are idle.
    in_use: usize,
    /// The notifications of the pairs in use while the host's kernel serves them.
    offloaded: Option<Notifiers>,
    /// Whether the driver has enabled all queues of the pairs in use.
    is_complete: bool,
    common: Common,
    /// For each direction, the pairs delayed by the limiter, so that they take turns.
    lines: [VecDeque<usize>; 2],
    command: Chain,
    changes: Limiter,
    /// Signaled to make all queues be checked.
    news: Timer,
    log_rate: LogRate,
}

impl Net {
    fn new(backends: Vec<Box<dyn NetBackend>>, common: Common) -> io::Result<Net> {
        let changes = Rate { ops_per_second: Some(CHANGES_PER_SECOND), ..Rate::default() };
        let mut net = Net {
            pairs: backends.into_iter().map(Pair::new).collect::<io::Result<_>>()?,
            in_use: 1,
            offloaded: None,
            is_complete: false,
            common,
            lines: Default::default(),
            command: Chain::default(),
            changes: Limiter::new(changes)?.0,
            news: Timer::new()?,
            log_rate: LogRate::default(),
        };
        net.use_pairs(1)?;
        Ok(net)
    }

    /// Whether the driver supports multiple pairs and the control queue.
    fn is_multiqueue(&self) -> bool {
        self.common.has(VIRTIO_NET_F_MQ) && self.common.has(VIRTIO_NET_F_CTRL_VQ)
    }

    /// The index of the control queue, after all pairs that the driver supports (virtio 1.2 §5.1.2).
    fn control_index(&self) -> Option<usize> {
        let pairs = if self.common.has(VIRTIO_NET_F_MQ) { self.pairs.len() } else { 1 };
        self.common.has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs)
    }

    /// Whether the host's kernel should serve the queues. It does not enforce limits, count frames or know about links,
    /// and it passes on the tap device's checksum state even if the driver does not support that.
    fn is_for_kernel(&self) -> bool {
        let mut in_use = self.pairs.iter().take(self.in_use);
        let link = &self.common.link;
        in_use.all(Pair::is_for_kernel)
            && self.is_complete
            && self.common.has(VIRTIO_NET_F_GUEST_CSUM)
            && link.is_up()
            && link.rate().is_unlimited()
    }

    fn look_whether_complete(&mut self, queues: &[Virtqueue]) {
        self.is_complete = queues.iter().take(2 * self.in_use).all(Virtqueue::is_ready);
    }

    /// Offloads the queues of all pairs in use to the kernel. If that fails, it is not tried again.
    fn offload(&mut self, queues: &mut [Virtqueue], notifiers: &Notifiers) -> Result<(), RingError> {
        // First, since the kernel may raise an interrupt immediately.
        notifiers.share(true);
        self.offloaded = Some(notifiers.clone());
        self.lines.iter_mut().for_each(VecDeque::clear);
        self.common.link.set_served_by_kernel(true);
        let features = self.common.features;
        let mut in_use = self.pairs.iter_mut().take(self.in_use).enumerate();
        if let Err(error) = in_use.try_for_each(|(index, pair)| pair.offload(2 * index, queues, features, notifiers)) {
            log::warn!("{}: vhost-net is not used: {error:#}", self.common.name);
            self.take_back(queues)?;
            self.pairs.iter_mut().for_each(|pair| pair.vhost = None);
        }
        Ok(())
    }

    /// Takes the queues back from the kernel. The driver is notified to check all of them, because the kernel's last
    /// notification may have been missed.
    fn take_back(&mut self, queues: &mut [Virtqueue]) -> Result<(), RingError> {
        let Some(notifiers) = self.offloaded.take() else { return Ok(()) };
        let pairs = self.pairs.iter_mut().zip(queues.chunks_exact_mut(2));
        let outcomes: Vec<_> = pairs.map(|(pair, queues)| pair.take_back(queues)).collect();
        self.common.link.set_served_by_kernel(false);
        (0..2 * self.in_use).for_each(|index| notifiers.queue_used(index));
        notifiers.share(false);
        outcomes.into_iter().collect()
    }

    /// Returns the buffers of frames in flight to the driver.
    fn settle(&mut self, queues: &mut [Virtqueue]) -> Result<(), RingError> {
        let mut pairs = self.pairs.iter_mut().zip(queues.chunks_exact_mut(2));
        pairs.try_for_each(|(pair, queues)| pair.settle(&mut self.common, &mut queues[TX]))
    }

    /// Executes the commands in the control queue.
    fn obey(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        for _ in 0..COMMANDS_PER_TURN {
            let Some(control) = queues.get_mut(index) else { return Ok(Progress::Drained) };
            if !control.pop(&mut self.command)? {
                return Ok(Progress::Drained);
            }
            let pairs = control::pairs_asked_for(control.memory(), &self.command);
            let pairs = pairs.filter(|pairs| self.is_multiqueue() && (1..=self.pairs.len()).contains(pairs));
            // A request without an effect is not rate-limited.
            if pairs.is_some_and(|pairs| pairs != self.in_use) && !self.changes.admit(0) {
                control.put_back();
                return Ok(Progress::Blocked);
            }
            if pairs.is_some_and(|pairs| pairs != self.in_use) {
                self.take_back(queues)?;
                self.settle(queues)?;
            }
            let done = pairs.is_some_and(|pairs| self.try_to_use(pairs));
            self.look_whether_complete(queues);
            let Some(control) = queues.get_mut(index) else { return Ok(Progress::Drained) };
            let written_bytes = control::answer(control.memory(), &self.command, done)?;
            control.push(self.command.head(), written_bytes)?;
        }
        Ok(Progress::More)
    }

    /// Processes a turn of `pair`, which is in use, in `direction`.
    fn turn(&mut self, pair: usize, direction: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        let (Some(served), Some(queue)) = (self.pairs.get_mut(pair), queues.get_mut(2 * pair + direction)) else {
            return Ok(Progress::Drained);
        };
        let (left, place) = served.turn(direction, &mut self.common, queue)?;
        let line = &mut self.lines[direction];
        if place != Place::AsBefore {
            line.retain(|other| *other != pair);
        }
        if place != Place::None && !line.contains(&pair) {
            line.push_back(pair);
        }
        Ok(left)
    }

    fn try_to_use(&mut self, pairs: usize) -> bool {
        let used = self.use_pairs(pairs);
        if let Err(error) = &used
            && self.log_rate.allows()
        {
            log::warn!("{}: the host does not support {pairs} queue pairs: {error}", self.common.name);
        }
        used.is_ok()
    }

    /// Switches to the first `count` pairs. On an error the previous ones stay in use.
    fn use_pairs(&mut self, count: usize) -> io::Result<()> {
        let mut enable =
            |count| (0..).zip(&mut self.pairs).try_for_each(|(index, pair)| pair.set_enabled(index < count));
        if let Err(error) = enable(count) {
            let _ = enable(self.in_use);
            return Err(error);
        }
        self.lines.iter_mut().for_each(VecDeque::clear);
        if self.in_use != count {
            self.in_use = count;
            self.news.ring();
        }
        Ok(())
    }
}

impl QueueHandler for Net {
    fn start(&mut self, features: u64) {
        self.common.features = features;
        self.pairs.iter_mut().for_each(Pair::forget_queue);
        let count = if self.is_multiqueue() { self.in_use } else { 1 };
        if self.common.is_over() {
            return;
        }
        let accepted = self.pairs.iter_mut().try_for_each(|pair| pair.backend.accept(features));
        if let Err(error) = accepted.and_then(|()| self.use_pairs(count)) {
            self.common.end(&error);
        }
    }

    fn update_offload(&mut self, queues: &mut [Virtqueue], notifiers: &Notifiers) -> Result<(), RingError> {
        self.look_whether_complete(queues);
        match (self.is_for_kernel(), self.offloaded.is_some()) {
            (true, false) => self.offload(queues, notifiers),
            (false, true) => self.take_back(queues),
            _ => Ok(()),
        }
    }

    fn offload_is_current(&mut self) -> Result<bool, RingError> {
        let is_given_away = self.offloaded.is_some();
        if is_given_away && self.pairs.iter().flat_map(|pair| &pair.vhost).any(Vhost::has_refused) {
            return Err(RingError::Kernel("found a ring or a descriptor that makes no sense".into()));
        }
        Ok(self.is_for_kernel() == is_given_away)
    }

    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        if self.control_index() == Some(index) {
            return self.obey(index, queues);
        }
        let (pair, direction) = (index / 2, index % 2);
        if pair >= self.in_use || self.offloaded.is_some() {
            return Ok(Progress::Blocked);
        }
        let longest = self.lines[direction].front().copied();
        if let Some(other) = longest.filter(|other| *other != pair) {
            // It also has a regular turn, which determines the notifications that it needs.
            if self.turn(other, direction, queues)? != Progress::Blocked {
                self.news.ring();
            }
        }
        self.turn(pair, direction, queues)
    }

    fn wake_fds(&self) -> Vec<BorrowedFd<'_>> {
        let own = [self.news.as_fd(), self.common.link.wake_fd()];
        let limiters = self.common.limiters.iter().chain([&self.changes]).map(Limiter::wake_fd);
        // Otherwise each frame would be signaled here as well.
        let (ours, kernels) = if self.offloaded.is_some() { (0, self.in_use) } else { (self.pairs.len(), 0) };
        let backends = self.pairs.iter().take(ours).map(|pair| pair.backend.fd());
        let vhosts = self.pairs.iter().take(kernels).flat_map(|pair| &pair.vhost).map(Vhost::wake_fd);
        backends.chain(vhosts).chain(limiters).chain(own).collect()
    }

    fn drain(&mut self, queues: &mut [Virtqueue]) -> Result<(), RingError> {
        self.take_back(queues)?;
        self.settle(queues)
    }

    fn reset(&mut self) {
        self.common.forget_end();
        self.try_to_use(1);
    }

    fn save(&self) -> Vec<u8> {
        (self.in_use as u16).to_le_bytes().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateMismatch> {
        let count = state.try_into().map(|bytes| usize::from(u16::from_le_bytes(bytes))).map_err(|_| StateMismatch)?;
        if !(1..=self.pairs.len()).contains(&count) {
            return Err(StateMismatch);
        }
        self.use_pairs(count).map_err(|_| StateMismatch)
    }
}
