//! A queue pair of a network device: one receive and one transmit queue with a back end.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::{Bytes, GuestAddress};

use super::NetLink;
use super::limit::{Limit, Place};
use super::vhost::{Ring, Vhost};
use crate::backend::net::{self, FLAG_DATA_VALID, HEADER_BYTES, Header, NetBackend};
use crate::backend::rate::Limiter;
use crate::memory::GuestBuffers;
use crate::virtio::log_rate::LogRate;
use crate::virtio::queue::{self, Chain, Virtqueue};
use crate::virtio::{Notifiers, Progress, RingError};

/// The directions, in the order of a pair's queues (virtio 1.2 §5.1.2): to the guest, from the guest.
pub const RX: usize = 0;
pub const TX: usize = 1;
/// The maximum amount transferred in one direction in a turn of the worker, before it checks its stop event again.
const TURN_BYTES: usize = 4 << 20;
/// The cost of a frame in a turn in addition to its data, so that every turn ends.
const FRAME_COST_BYTES: usize = 16 << 10;

/// State shared by all pairs of a device.
pub struct Common {
    pub name: String,
    pub link: NetLink,
    /// The rate limits per direction, across all pairs.
    pub limiters: [Limiter; 2],
    /// Features accepted by the driver.
    pub features: u64,
    /// No frames pass until the driver resets the device.
    is_over: bool,
    /// The other side of the back end is gone, so a reset does not help.
    is_gone: bool,
    log_rate: LogRate,
    chain: Chain,
    /// The buffers of one frame; reused to avoid allocations.
    taken: Vec<Chain>,
    used: Vec<(u16, u32)>,
}

impl Common {
    pub fn new(name: &str, link: NetLink, limiters: [Limiter; 2]) -> Common {
        Common {
            name: name.to_owned(),
            link,
            limiters,
            features: 0,
            is_over: false,
            is_gone: false,
            log_rate: LogRate::default(),
            chain: Chain::default(),
            taken: Vec::new(),
            used: Vec::new(),
        }
    }

    pub fn has(&self, feature: u32) -> bool {
        self.features >> feature & 1 != 0
    }

    /// Handles a failure of the host side: the guest's link goes down, permanently if the other side is gone.
    pub fn end(&mut self, error: &io::Error) {
        self.is_over = true;
        self.is_gone |= net::is_end(error);
        self.link.lose();
        if self.log_rate.allows() {
            let what = if self.is_gone { "is gone" } else { "fails" };
            log::warn!("{}: the network {what}: {error}", self.name);
        }
    }

    /// Recovers from a failure when the driver resets the device, unless the other side is gone.
    pub fn forget_end(&mut self) {
        if std::mem::replace(&mut self.is_over, self.is_gone) && !self.is_gone {
            self.link.find();
        }
    }

    /// Whether frames no longer pass.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// The header and the frame in `self.chain`. `None` if the header was not negotiated or if parts are outside of
    /// memory.
    fn read(&self, tx: &Virtqueue, frame: &mut GuestBuffers) -> Option<Header> {
        let header = queue::read_front(tx.memory(), self.chain.readable()).map(Header::decode)?;
        for range in queue::part(self.chain.readable(), HEADER_BYTES as u64, u64::MAX) {
            frame.push(range.address, range.len_bytes).ok()?;
        }
        header.checked(self.features, usize::try_from(frame.len_bytes()).ok()?)
    }
}

/// The device side of a receive and a transmit queue. Every frame is processed completely before a pause: frames for
/// the guest stay in the back end.
pub struct Pair {
    pub backend: Box<dyn NetBackend>,
    /// The heads of chains whose frames were accepted and not returned to the driver, in order.
    sending: VecDeque<u16>,
    /// The vhost back end, if the host's kernel may serve the queues.
    pub vhost: Option<Vhost>,
    /// By direction.
    limits: [Limit; 2],
}

/// The result of delivering a frame to the guest.
enum Placed {
    Whole,
    /// The driver must make more buffers available, and will ring the doorbell.
    NoBuffers,
    /// The driver's buffer is too short, and the frame is dropped.
    TooShort,
}

/// The result of passing a guest's frame to the back end.
enum Sent {
    Accepted,
    Dropped,
    /// There is no room for it now.
    Later,
}

impl Pair {
    pub fn new(mut backend: Box<dyn NetBackend>) -> io::Result<Pair> {
        let vhost = backend.take_vhost().map(Vhost::new).transpose()?;
        Ok(Pair { backend, sending: VecDeque::new(), vhost, limits: Default::default() })
    }

    /// Whether the kernel may take over: it is allowed to, and there is no state here that it would miss.
    pub fn is_for_kernel(&self) -> bool {
        self.vhost.is_some() && self.backend.frame().is_none()
    }

    /// Offloads the pair's queues, the first of which has the index `first` in the device, to the kernel. After an
    /// error they must be taken back.
    pub fn offload(
        &mut self,
        first: usize,
        queues: &mut [Virtqueue],
        features: u64,
        notifiers: &Notifiers,
    ) -> anyhow::Result<()> {
        let (Some(vhost), Some([rx, tx])) = (&mut self.vhost, queues.get_mut(first..first + 2)) else {
            anyhow::bail!("there is no such pair");
        };
        let Some([rx_bell, tx_bell]) = notifiers.doorbells().get(first..first + 2) else {
            anyhow::bail!("the pair has no doorbells");
        };
        let memory = rx.memory().clone();
        let rings = [(rx, rx_bell, first + RX), (tx, tx_bell, first + TX)].map(|(queue, doorbell, index)| Ring {
            registers: queue.offload(),
            doorbell,
            used_event: notifiers.used_event(index),
        });
        vhost.start(self.backend.fd(), features, &memory, &rings)
    }

    /// Takes the queues back at the kernel's position. After an error the pair is not offloaded again.
    pub fn take_back(&mut self, queues: &mut [Virtqueue]) -> Result<(), RingError> {
        let mut outcome = Ok(());
        for (direction, queue) in queues.iter_mut().enumerate().filter(|(_, queue)| queue.is_offloaded()) {
            let stopped = self.vhost.as_mut().map_or(Ok(None), |vhost| vhost.stop(direction, queue.memory()));
            if let Err(error) = &stopped {
                // Closing its descriptor stops the kernel in any case.
                self.vhost = None;
                outcome = Err(RingError::Kernel(format!("does not say how far it came: {error:#}")));
            }
            queue.take_back(stopped.unwrap_or(None));
        }
        outcome
    }

    /// Forgets the previous driver's queue: the frame waiting in it may have been replaced, and if the ring was broken,
    /// buffers could not be returned.
    pub fn forget_queue(&mut self) {
        self.limits[TX].pass();
        self.backend.settle();
        self.sending.clear();
    }

    /// Returns all buffers of accepted frames to the driver.
    pub fn settle(&mut self, common: &mut Common, tx: &mut Virtqueue) -> Result<(), RingError> {
        self.backend.settle();
        self.complete(common, tx)
    }

    /// Processes a turn in `direction`. Returns its outcome for `queue`, and its position among the pairs that wait for
    /// the limiter.
    pub fn turn(
        &mut self,
        direction: usize,
        common: &mut Common,
        queue: &mut Virtqueue,
    ) -> Result<(Progress, Place), RingError> {
        self.limits[direction].begin_turn();
        let left = if direction == RX { self.deliver(common, queue)? } else { self.take(common, queue)? };
        Ok((left, self.limits[direction].place()))
    }

    /// Enables or disables frames for the guest on this pair. When disabled, waiting frames are dropped.
    pub fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        self.backend.set_enabled(enabled)?;
        if !enabled {
            self.backend.consume();
            self.limits = Default::default();
        }
        Ok(())
    }

    /// Sends the guest's frames until there are none, the turn's budget is used up, or the host must accept some first.
    fn take(&mut self, common: &mut Common, tx: &mut Virtqueue) -> Result<Progress, RingError> {
        // Also if the guest has nothing more to send: some of its frames may be in flight.
        if !self.kick(common, tx)? {
            return Ok(Progress::Blocked);
        }
        let accepted = self.accept(common, tx);
        self.kick(common, tx)?;
        accepted
    }

    /// Passes the guest's frames to the back end, which sends them at the next kick at the latest.
    fn accept(&mut self, common: &mut Common, tx: &mut Virtqueue) -> Result<Progress, RingError> {
        let mut frame = GuestBuffers::new(tx.memory().clone());
        let mut turn_bytes = 0;
        while turn_bytes < TURN_BYTES {
            if !tx.pop(&mut common.chain)? {
                return Ok(Progress::Drained);
            }
            frame.clear();
            let header = common.read(tx, &mut frame);
            let frame_bytes = frame.len_bytes() as usize;
            if !self.limits[TX].admits(&mut common.limiters[TX], frame_bytes) {
                tx.put_back();
                return Ok(Progress::Blocked);
            }
            let head = common.chain.head();
            match self.send(common, header, &mut frame) {
                Sent::Accepted => {
                    common.link.counters().count_from_guest(frame_bytes);
                    self.sending.push_back(head);
                    self.complete(common, tx)?;
                }
                Sent::Dropped => {
                    common.link.counters().count_dropped_from_guest();
                    tx.push(head, 0)?;
                }
                Sent::Later => {
                    tx.put_back();
                    return Ok(Progress::Blocked);
                }
            }
            self.limits[TX].pass();
            turn_bytes += FRAME_COST_BYTES + frame_bytes;
        }
        Ok(Progress::More)
    }

    fn send(&mut self, common: &mut Common, header: Option<Header>, frame: &mut GuestBuffers) -> Sent {
        let Some(header) = header.filter(|_| common.link.is_up() && !common.is_over) else { return Sent::Dropped };
        match self.backend.send(&header, frame) {
            Ok(()) => Sent::Accepted,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Sent::Later,
            Err(error) => {
                if net::is_end(&error) {
                    common.end(&error);
                }
                Sent::Dropped
            }
        }
    }

    /// Makes the back end send the accepted frames. Returns whether it can accept more.
    fn kick(&mut self, common: &mut Common, tx: &mut Virtqueue) -> Result<bool, RingError> {
        let kicked = self.backend.kick();
        self.complete(common, tx)?;
        match kicked {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) if net::is_end(&error) => common.end(&error),
            _ => {}
        }
        Ok(true)
    }

    /// Returns the buffers of frames that are no longer in flight to the driver.
    fn complete(&mut self, common: &mut Common, tx: &mut Virtqueue) -> Result<(), RingError> {
        let done = self.sending.len().saturating_sub(self.backend.in_flight());
        if done > 0 {
            common.used.clear();
            common.used.extend(self.sending.drain(..done).map(|head| (head, 0)));
            tx.push_together(&common.used)?;
        }
        Ok(())
    }

    /// Delivers frames to the guest until there are none, there are too few buffers, or the turn's budget is used up.
    fn deliver(&mut self, common: &mut Common, rx: &mut Virtqueue) -> Result<Progress, RingError> {
        let (merge, trusting) = (common.has(VIRTIO_NET_F_MRG_RXBUF), common.has(VIRTIO_NET_F_GUEST_CSUM));
        let mut turn_bytes = 0;
        while turn_bytes < TURN_BYTES {
            if common.is_over {
                return Ok(Progress::Blocked);
            }
            let found = self.backend.receive();
            if let Err(error) = &found {
                common.end(error);
            }
            let Some((mut header, frame)) = self.backend.frame().filter(|_| matches!(found, Ok(true))) else {
                return Ok(Progress::Blocked);
            };
            if !trusting {
                header.flags &= !FLAG_DATA_VALID;
            }
            let frame_bytes = frame.len();
            if !self.limits[RX].admits(&mut common.limiters[RX], frame_bytes) {
                return Ok(Progress::Blocked);
            }
            let placed = match common.link.is_up() {
                true => place(rx, &mut common.taken, &mut common.used, merge, header, frame)?,
                false => Placed::TooShort,
            };
            match placed {
                Placed::Whole => common.link.counters().count_to_guest(frame_bytes),
                Placed::TooShort => common.link.counters().count_dropped_to_guest(),
                Placed::NoBuffers => return Ok(Progress::Blocked),
            }
            self.limits[RX].pass();
            self.backend.consume();
            turn_bytes += FRAME_COST_BYTES + frame_bytes;
        }
        Ok(Progress::More)
    }
}

/// Writes a frame to as many of the driver's buffers as it needs, or without merging to one.
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
            // Enabled before the buffers here are given up again, so that the driver rings for one more.
            if rx.enable_notification()? {
                rx.disable_notification()?;
                continue;
            }
            (0..count).for_each(|_| rx.put_back());
            return Ok(Placed::NoBuffers);
        }
        // A driver could make the same buffer available repeatedly while it is processed, without end.
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
    // Limited by the queue size.
    let header = Header { buffers: count as u16, ..header }.encode();
    let mut pieces = [&header[..], frame];
    used.clear();
    for chain in &taken[..count] {
        used.push((chain.head(), fill(rx, chain, &mut pieces)?));
    }
    rx.push_together(used)?;
    Ok(Placed::Whole)
}

/// Writes the rest of `pieces` to a chain's writable part, as far as it fits. Returns the number of bytes.
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
