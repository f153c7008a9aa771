//! From a pair's rings to its back end, and back: one receive and one transmit queue of a network device.

use std::io::{self, ErrorKind};

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::{Bytes, GuestAddress};

use super::NetLink;
use super::vhost::{Ring, Vhost};
use crate::backend::net::{self, FLAG_DATA_VALID, HEADER_BYTES, Header, NetBackend};
use crate::backend::rate::Limiter;
use crate::memory::GuestBuffers;
use crate::virtio::log_rate::LogRate;
use crate::virtio::queue::{self, Chain, Virtqueue};
use crate::virtio::{Notifiers, Progress, RingError};

/// The directions, as a pair's queues stand (virtio 1.2 §5.1.2): to the guest, from the guest.
pub const RX: usize = 0;
pub const TX: usize = 1;
/// What one turn of the worker moves at most in one direction, before it looks at its stop event again.
const TURN_BYTES: usize = 4 << 20;
/// What a frame counts in a turn beside its data, so that a turn has an end in any case.
const FRAME_COST_BYTES: usize = 16 << 10;

/// What all pairs of a device have together.
pub struct Common {
    pub name: String,
    pub link: NetLink,
    /// What may pass in each direction, through whichever pair.
    pub limiters: [Limiter; 2],
    /// Accepted by the driver.
    pub features: u64,
    /// Nothing goes through any more, until the driver resets the device.
    is_over: bool,
    /// The back end's other side is gone, so that a reset is of no use.
    is_gone: bool,
    log_rate: LogRate,
    chain: Chain,
    /// The buffers that one frame takes; kept, so that it costs no allocation.
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

    /// The host does not go on: the guest sees its link go down, for good where the other side is gone.
    pub fn end(&mut self, error: &io::Error) {
        self.is_over = true;
        self.is_gone |= net::is_end(error);
        self.link.lose();
        if self.log_rate.allows() {
            let what = if self.is_gone { "is gone" } else { "fails" };
            log::warn!("{}: the network {what}: {error}", self.name);
        }
    }

    /// The driver begins anew: so does the host, if there is anybody left.
    pub fn forget_end(&mut self) {
        if std::mem::replace(&mut self.is_over, self.is_gone) && !self.is_gone {
            self.link.find();
        }
    }

    /// Whether nothing goes through any more.
    pub fn is_over(&self) -> bool {
        self.is_over
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
}

/// The device's side of a receive and a transmit queue. A pause finds no frame half done: what the back end has for the
/// guest stays there.
pub struct Pair {
    pub backend: Box<dyn NetBackend>,
    /// The host's kernel, where it may serve the queues.
    pub vhost: Option<Vhost>,
    /// By direction.
    limits: [Limit; 2],
}

/// How a direction of a pair stands with its limiter.
#[derive(Default)]
struct Limit {
    /// The next frame, which could not go on for another reason, has been counted with so many bytes.
    admitted_bytes: Option<usize>,
    /// In the last turn a frame was admitted, or the last one was refused.
    admitted_any: bool,
    refused: bool,
}

impl Limit {
    /// Whether the next frame may pass. PendingRequest again it counts once, and by what it has grown: a guest may put a longer one in
    /// its place while it waits.
    fn admits(&mut self, limiter: &mut Limiter, frame_bytes: usize) -> bool {
        let admits = match self.admitted_bytes {
            Some(before) => {
                limiter.charge(frame_bytes.saturating_sub(before) as u64);
                true
            }
            None => limiter.admit(frame_bytes as u64),
        };
        self.admitted_bytes = admits.then(|| self.admitted_bytes.unwrap_or_default().max(frame_bytes));
        self.admitted_any |= admits;
        self.refused = !admits;
        admits
    }

    /// The next frame is another one.
    fn pass(&mut self) {
        self.admitted_bytes = None;
    }
}

/// Where a pair stands in the line of those that a limiter refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It waits for nothing there.
    None,
    /// Where it was, or behind the others: it got nothing.
    AsBefore,
    /// Behind the others: it had its share.
    Last,
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

impl Pair {
    pub fn new(mut backend: Box<dyn NetBackend>) -> io::Result<Pair> {
        let vhost = backend.take_vhost().map(Vhost::new).transpose()?;
        Ok(Pair { backend, vhost, limits: Default::default() })
    }

    /// Whether the kernel can take over: it may, and nothing is held here that it would not know of.
    pub fn is_for_kernel(&self) -> bool {
        self.vhost.is_some() && self.backend.frame().is_none()
    }

    /// Gives the pair's queues, the first of which is number `first` of the device's, to the kernel. After an error they are
    /// to be taken back.
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

    /// Takes them back from where the kernel left them. After an error the kernel serves the pair no more.
    pub fn take_back(&mut self, queues: &mut [Virtqueue]) -> Result<(), RingError> {
        let mut outcome = Ok(());
        for (direction, queue) in queues.iter_mut().enumerate().filter(|(_, queue)| queue.is_offloaded()) {
            let stopped = self.vhost.as_mut().map_or(Ok(None), |vhost| vhost.stop(direction, queue.memory()));
            if let Err(error) = &stopped {
                // With its descriptor closed it has stopped in any case.
                self.vhost = None;
                outcome = Err(RingError::Kernel(format!("does not say how far it came: {error:#}")));
            }
            queue.take_back(stopped.unwrap_or(None));
        }
        outcome
    }

    /// What waited in the guest's queue may be another frame by now.
    pub fn forget_waiting(&mut self) {
        self.limits[TX].pass();
    }

    /// A turn in `direction`. Returns its outcome for `queue`, and its place among those that wait for the limiter.
    pub fn turn(
        &mut self,
        direction: usize,
        common: &mut Common,
        queue: &mut Virtqueue,
    ) -> Result<(Progress, Place), RingError> {
        let limit = &mut self.limits[direction];
        (limit.admitted_any, limit.refused) = (false, false);
        let left = if direction == RX { self.deliver(common, queue)? } else { self.take(common, queue)? };
        let place = match &self.limits[direction] {
            Limit { refused: false, .. } => Place::None,
            Limit { admitted_any: true, .. } => Place::Last,
            _ => Place::AsBefore,
        };
        Ok((left, place))
    }

    /// Lets frames for the guest come to this pair, or to the others only: then what waits here is lost.
    pub fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        self.backend.set_enabled(enabled)?;
        if !enabled {
            self.backend.consume();
            self.limits = Default::default();
        }
        Ok(())
    }

    /// Takes the guest's frames until there are none, or this turn's work is done, or the host has to take some first.
    fn take(&mut self, common: &mut Common, tx: &mut Virtqueue) -> Result<Progress, RingError> {
        // Also when the guest has nothing more to send: the host waits for the rest of what it has.
        if matches!(self.backend.flush(), Err(error) if error.kind() == ErrorKind::WouldBlock) {
            return Ok(Progress::Blocked);
        }
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
            match self.send(common, header, &mut frame) {
                Sent::Whole => common.link.counters().count_from_guest(frame_bytes),
                Sent::Dropped => common.link.counters().count_dropped_from_guest(),
                Sent::Later => {
                    tx.put_back();
                    return Ok(Progress::Blocked);
                }
            }
            self.limits[TX].pass();
            tx.push(common.chain.head(), 0)?;
            turn_bytes += FRAME_COST_BYTES + frame_bytes;
        }
        Ok(Progress::More)
    }

    fn send(&mut self, common: &mut Common, header: Option<Header>, frame: &mut GuestBuffers) -> Sent {
        let Some(header) = header.filter(|_| common.link.is_up() && !common.is_over) else { return Sent::Dropped };
        match self.backend.send(&header, frame) {
            Ok(()) => Sent::Whole,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Sent::Later,
            Err(error) => {
                if net::is_end(&error) {
                    common.end(&error);
                }
                Sent::Dropped
            }
        }
    }

    /// Gives the guest frames until there are none, or it has too few buffers left, or this turn's work is done.
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
            // PendingRequest for before what is here is left again, so that it rings for one more.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Rate;

    #[test]
    fn a_frame_that_grows_while_it_waits_is_counted_as_what_it_has_become() {
        let rate = Rate { bytes_per_second: Some(1000), burst_bytes: Some(100), ..Rate::default() };
        let (mut limiter, _control) = Limiter::new(rate).unwrap();
        let mut limit = Limit::default();
        for _ in 0..20 {
            assert!(limit.admits(&mut limiter, 14), "the same one counts once");
        }
        assert!(limit.admits(&mut limiter, 60_000) && limit.admits(&mut limiter, 14));
        limit.pass();
        assert!(!limit.admits(&mut limiter, 14), "a minute's worth has passed");
    }
}
