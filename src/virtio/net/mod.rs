//! From the guest's network interface to the host's, and back: the network device (virtio 1.2 §5.1).
//!
//! ```text
//! guest's tx ring ─ header, frame ─> checked ─> backend: passt's socket or a tap device
//! guest's rx ring <─ header, frame ── as many of its buffers as that takes ── backend
//! ```

mod link;

#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vm_memory::{Bytes, GuestAddress};

use super::queue::{self, Chain, Virtqueue};
use super::{ConfigSpace, Left, QueueHandler, RingError, VirtioDevice};
use crate::backend::disk::GuestBuffers;
use crate::backend::net::{self, FLAG_DATA_VALID, HEADER_BYTES, Header, NetBackend};
use crate::backend::rate::{Limiter, Rate};
use crate::resources::net::Network;

pub use link::{NetCounts, NetLink};

/// Device ID (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 1;
/// The device's queues, by index (virtio 1.2 §5.1.2): to the guest, from the guest.
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// What one turn of the worker moves at most in one direction, before it looks at its stop event again.
const TURN_BYTES: usize = 4 << 20;
/// What a frame counts in a turn beside its data, so that a turn has an end in any case.
const FRAME_COST_BYTES: usize = 16 << 10;
/// Ethernet's, for a back end that says nothing of it.
const MTU_BYTES: u16 = 1500;

/// A network device on what was opened as `network`, and what the rest of husk has of it.
pub fn device(network: Network) -> io::Result<(VirtioDevice, NetLink)> {
    let Network { backend, name, mac, mtu_bytes, rate } = network;
    let (device, link) = device_on(backend, &name, mac, mtu_bytes)?;
    if !rate.is_unlimited() {
        link.set_rate(rate);
    }
    Ok((device, link))
}

/// A network device on any back end. `name` is for the log; without an MTU there is Ethernet's.
pub fn device_on(
    backend: Box<dyn NetBackend>,
    name: &str,
    mac: [u8; 6],
    mtu_bytes: Option<u16>,
) -> io::Result<(VirtioDevice, NetLink)> {
    let own = [VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS];
    let features = own.iter().fold(backend.features(), |features, bit| features | 1 << bit);
    let config = Arc::new(ConfigSpace::new(config(mac, mtu_bytes.unwrap_or(MTU_BYTES)), 0..0));
    let [(rx, rx_rate), (tx, tx_rate)] = [Limiter::new(Rate::default())?, Limiter::new(Rate::default())?];
    let link = NetLink::new(config.clone(), [rx_rate, tx_rate]);
    let device = VirtioDevice {
        device_type: DEVICE_TYPE,
        name: name.to_owned(),
        features,
        queue_sizes: QUEUE_SIZES.to_vec(),
        config,
        handler: Box::new(Net::new(backend, name, link.clone(), [rx, tx])),
    };
    Ok((device, link))
}

/// `struct virtio_net_config` (virtio 1.2 §5.1.4), in its order, as far as its features go.
fn config(mac: [u8; 6], mtu_bytes: u16) -> Vec<u8> {
    let mut bytes = mac.to_vec();
    bytes.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    bytes.extend(1_u16.to_le_bytes()); // max_virtqueue_pairs
    bytes.extend(mtu_bytes.to_le_bytes());
    bytes
}

/// The device's side of its queues. A pause finds no frame half done: what the back end has for the guest stays there.
struct Net {
    backend: Box<dyn NetBackend>,
    name: String,
    link: NetLink,
    /// By queue.
    limits: [Limit; 2],
    features: u64,
    /// The back end's other side is gone for good.
    is_over: bool,
    chain: Chain,
    /// The buffers that one frame takes; kept, so that it costs no allocation.
    taken: Vec<Chain>,
    used: Vec<(u16, u32)>,
}

/// What a direction may carry, and whether its next frame, which could not go on for another reason, has been counted.
struct Limit {
    limiter: Limiter,
    has_admitted: bool,
}

impl Limit {
    /// Whether the next frame may pass; asked again about the same one, it counts once.
    fn admits(&mut self, frame_bytes: usize) -> bool {
        self.has_admitted = self.has_admitted || self.limiter.admit(frame_bytes as u64);
        self.has_admitted
    }

    /// The next frame is another one.
    fn pass(&mut self) {
        self.has_admitted = false;
    }
}

/// What became of a frame for the guest.
enum Placed {
    Whole,
    /// The driver has to make more buffers available, and rings when it does.
    NoBuffers,
    /// The driver's buffer is shorter than it promised, and the frame lost.
    TooShort,
}

/// What became of a frame of the guest's.
enum Sent {
    Whole,
    Dropped,
    /// There is no room for it now.
    Later,
}

impl Net {
    fn new(backend: Box<dyn NetBackend>, name: &str, link: NetLink, limiters: [Limiter; 2]) -> Net {
        Net {
            backend,
            name: name.to_owned(),
            link,
            limits: limiters.map(|limiter| Limit { limiter, has_admitted: false }),
            features: 0,
            is_over: false,
            chain: Chain::default(),
            taken: Vec::new(),
            used: Vec::new(),
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features >> feature & 1 != 0
    }

    /// Takes the guest's frames until there are none, or this turn's work is done, or the host has to take some first.
    fn take(&mut self, tx: &mut Virtqueue) -> Result<Left, RingError> {
        // Also when the guest has nothing more to send: the host waits for the rest of what it has.
        if matches!(self.backend.flush(), Err(error) if error.kind() == ErrorKind::WouldBlock) {
            return Ok(Left::Waiting);
        }
        let mut frame = GuestBuffers::new(tx.memory().clone());
        let mut turn_bytes = 0;
        while turn_bytes < TURN_BYTES {
            if !tx.pop(&mut self.chain)? {
                return Ok(Left::Nothing);
            }
            frame.clear();
            let header = self.read(tx, &mut frame);
            let frame_bytes = frame.len_bytes() as usize;
            if !self.limits[TX].admits(frame_bytes) {
                tx.put_back();
                return Ok(Left::Waiting);
            }
            match self.send(header, &mut frame) {
                Sent::Whole => self.link.counters().count_from_guest(frame_bytes),
                Sent::Dropped => self.link.counters().count_dropped_from_guest(),
                Sent::Later => {
                    tx.put_back();
                    return Ok(Left::Waiting);
                }
            }
            self.limits[TX].pass();
            tx.push(self.chain.head(), 0)?;
            turn_bytes += FRAME_COST_BYTES + frame_bytes;
        }
        Ok(Left::More)
    }

    /// The header and the frame in `self.chain`; no header where it asks for what was not negotiated, or not all of it is
    /// memory.
    fn read(&self, tx: &Virtqueue, frame: &mut GuestBuffers) -> Option<Header> {
        let header = queue::read_front(tx.memory(), self.chain.readable()).map(Header::decode)?;
        for range in queue::part(self.chain.readable(), HEADER_BYTES as u64, u64::MAX) {
            frame.push(range.address, range.len_bytes).ok()?;
        }
        header.checked(self.features, usize::try_from(frame.len_bytes()).ok()?)
    }

    fn send(&mut self, header: Option<Header>, frame: &mut GuestBuffers) -> Sent {
        let Some(header) = header.filter(|_| self.link.is_up() && !self.is_over) else { return Sent::Dropped };
        match self.backend.send(&header, frame) {
            Ok(()) => Sent::Whole,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Sent::Later,
            Err(error) => {
                if net::is_end(&error) {
                    self.end(&error);
                }
                Sent::Dropped
            }
        }
    }

    /// Gives the guest frames until there are none, or it has too few buffers left, or this turn's work is done.
    fn deliver(&mut self, rx: &mut Virtqueue) -> Result<Left, RingError> {
        let (merge, trusting) = (self.has(VIRTIO_NET_F_MRG_RXBUF), self.accepts_checked());
        let mut turn_bytes = 0;
        while turn_bytes < TURN_BYTES {
            if self.is_over {
                return Ok(Left::Waiting);
            }
            let found = self.backend.receive();
            if let Err(error) = &found {
                self.end(error);
            }
            let Some((mut header, frame)) = self.backend.frame().filter(|_| matches!(found, Ok(true))) else {
                return Ok(Left::Waiting);
            };
            if !trusting {
                header.flags &= !FLAG_DATA_VALID;
            }
            let frame_bytes = frame.len();
            if !self.limits[RX].admits(frame_bytes) {
                return Ok(Left::Waiting);
            }
            let placed = match self.link.is_up() {
                true => place(rx, &mut self.taken, &mut self.used, merge, header, frame)?,
                false => Placed::TooShort,
            };
            match placed {
                Placed::Whole => self.link.counters().count_to_guest(frame_bytes),
                Placed::TooShort => self.link.counters().count_dropped_to_guest(),
                Placed::NoBuffers => return Ok(Left::Waiting),
            }
            self.limits[RX].pass();
            self.backend.consume();
            turn_bytes += FRAME_COST_BYTES + frame_bytes;
        }
        Ok(Left::More)
    }

    /// Whether the driver knows of checksums that were looked at already.
    fn accepts_checked(&self) -> bool {
        self.has(virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM)
    }

    /// The other side is gone: the guest sees its link go down, for good.
    fn end(&mut self, error: &io::Error) {
        self.is_over = true;
        self.link.lose();
        log::warn!("{}: the network is gone: {error}", self.name);
    }
}

/// Puts a frame into as many of the driver's buffers as it takes, or with no merging into one.
fn place(
    rx: &mut Virtqueue,
    taken: &mut Vec<Chain>,
    used: &mut Vec<(u16, u32)>,
    merge: bool,
    header: Header,
    frame: &[u8],
) -> Result<Placed, RingError> {
    let wanted_bytes = (HEADER_BYTES + frame.len()) as u64;
    let (mut count, mut room_bytes) = (0, 0);
    while room_bytes < wanted_bytes && (merge || count == 0) {
        if count == taken.len() {
            taken.push(Chain::default());
        }
        if !rx.pop(&mut taken[count])? {
            // Asked for before what is here is left again, so that it rings for one more.
            if rx.enable_notification()? {
                rx.disable_notification()?;
                continue;
            }
            (0..count).for_each(|_| rx.put_back());
            return Ok(Placed::NoBuffers);
        }
        // One that a driver offers again and again while it is looked at has no end.
        if count == usize::from(rx.size()) {
            return Err(RingError::Chain("more receive buffers than the queue has"));
        }
        room_bytes += queue::len_bytes(taken[count].writable());
        count += 1;
    }
    if room_bytes < wanted_bytes {
        rx.put_back();
        return Ok(Placed::TooShort);
    }
    // No more than the queue has.
    let header = Header { buffers: count as u16, ..header }.encode();
    let mut pieces = [&header[..], frame];
    used.clear();
    for chain in &taken[..count] {
        used.push((chain.head(), fill(rx, chain, &mut pieces)?));
    }
    rx.push_together(used)?;
    Ok(Placed::Whole)
}

/// Writes what is left of `pieces` to a chain's writable part, as far as both go. Returns how many bytes that is.
fn fill(rx: &Virtqueue, chain: &Chain, pieces: &mut [&[u8]; 2]) -> Result<u32, RingError> {
    let mut filled_bytes = 0;
    for range in chain.writable() {
        let mut done = 0;
        for piece in pieces.iter_mut() {
            let (now, later) = piece.split_at(piece.len().min((range.len_bytes - done) as usize));
            let address = GuestAddress(range.address.0.saturating_add(done.into()));
            let written = rx.memory().write_slice(now, address);
            written.map_err(|_| RingError::Chain("a receive buffer outside of memory"))?;
            *piece = later;
            done += now.len() as u32;
        }
        filled_bytes += done;
    }
    Ok(filled_bytes)
}

impl QueueHandler for Net {
    fn start(&mut self, features: u64) {
        self.features = features;
        // What waited in the guest's queue may be another frame by now.
        self.limits[TX].pass();
        if let Err(error) = self.backend.accept(features) {
            self.end(&error);
        }
    }

    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Left, RingError> {
        match (index, queues.get_mut(index)) {
            (RX, Some(rx)) => self.deliver(rx),
            (TX, Some(tx)) => self.take(tx),
            _ => Ok(Left::Nothing),
        }
    }

    fn wake_fds(&self) -> Vec<BorrowedFd<'_>> {
        [self.backend.fd()].into_iter().chain(self.limits.iter().map(|limit| limit.limiter.wake_fd())).collect()
    }
}
