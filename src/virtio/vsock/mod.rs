//! The vsock device (virtio 1.2 §5.10), streams only.
//!
//! ```text
//! guest's tx ring ─ packet ─> switch ─> connection ─ sendmsg ─> Unix socket PATH_<port>, or a client of PATH
//! guest's rx ring <─ packet ─ switch <─ connection <─ recvmsg ─ the same; due connections have their turns one by one
//! ```

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::queue::{self, Chain, Virtqueue};
use super::{ConfigSpace, Progress, QueueGroup, QueueHandler, RingError, StateMismatch, VirtioDevice};
use crate::memory::GuestBuffers;
use crate::resources::vsock::VsockSocket;

mod budget;
mod connection;
mod credit;
mod host;
pub mod packet;
mod switch;

#[cfg(test)]
mod tests;

pub use budget::BUDGET_BYTES;
use host::Host;
use packet::{HEADER_BYTES, Header};
use switch::Switch;

/// Device ID (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 19;
/// VIRTIO_VSOCK_F_STREAM (virtio 1.2 §5.10.3).
const F_STREAM: u64 = 1;
/// The queue indexes (virtio 1.2 §5.10.2): to the guest, from the guest, events.
const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// `struct virtio_vsock_event` with VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.2 §5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// The maximum amount transferred in each direction in one turn of the worker, before it checks its stop event again.
const TURN_BYTES: u64 = 4 << 20;
/// The cost of a packet in a turn in addition to its data, so that every turn ends.
const PACKET_COST_BYTES: u64 = 16 << 10;

/// Creates a vsock device with the host side `socket`.
pub fn device(socket: VsockSocket) -> io::Result<VirtioDevice> {
    let cid = u64::from(socket.cid);
    let switch = Switch::new(Host::new(socket)?);
    Ok(VirtioDevice {
        device_type: DEVICE_TYPE,
        name: "virtio-vsock".to_owned(),
        features: F_STREAM,
        feature_needs: &[],
        // `struct virtio_vsock_config` (virtio 1.2 §5.10.4).
        config: Arc::new(ConfigSpace::new(cid.to_le_bytes().to_vec(), 0..0)),
        queue_groups: vec![QueueGroup {
            sizes: QUEUE_SIZES.to_vec(),
            handler: Box::new(Vsock { switch, chain: Chain::default(), held_up: false, moved: Moved::Settled }),
        }],
    })
}

/// The device side of the queues. Connections outlive runs: every packet is processed completely before a pause.
struct Vsock {
    switch: Switch,
    chain: Chain,
    /// Whether the guest's packets wait until it has taken some from the device.
    held_up: bool,
    moved: Moved,
}

/// Whether the guest knows that its connections did not move with it to this device. No packet passes before: the guest
/// would take the end of a connection for the peer's, and would reset new connections together with the lost ones.
enum Moved {
    /// The guest must be told.
    Untold,
    /// It was told when the queue of events had this index. It returns the buffer of an event that it has handled.
    Told(u16),
    /// It knows, or the device was not restored.
    Settled,
}

impl Vsock {
    /// Tells the guest of a restored device that all of its connections are lost.
    fn tell(&mut self, events: &mut Virtqueue) -> Result<Progress, RingError> {
        match self.moved {
            Moved::Settled => {}
            Moved::Told(index) => {
                if events.notify_of_next()? != index {
                    self.moved = Moved::Settled;
                    // The other queues have their turns.
                    self.switch.ring();
                }
            }
            Moved::Untold => {
                if !events.pop(&mut self.chain)? {
                    return Ok(Progress::Drained);
                }
                if !queue::write_front(events.memory(), self.chain.writable(), &TRANSPORT_RESET) {
                    return Err(RingError::Chain("an event buffer with no room in memory"));
                }
                self.moved = Moved::Told(events.notify_of_next()?);
                events.push(self.chain.head(), TRANSPORT_RESET.len() as u32)?;
            }
        }
        // The guest's other buffers are kept for later events.
        Ok(Progress::Blocked)
    }

    /// Processes the guest's packets until there are none, the turn's budget is used up, or the guest must take some
    /// first.
    fn take(&mut self, tx: &mut Virtqueue) -> Result<Progress, RingError> {
        let mut buffers = GuestBuffers::new(tx.memory().clone());
        let mut turn_bytes = 0;
        while turn_bytes < TURN_BYTES {
            self.held_up = self.switch.is_full();
            if self.held_up {
                return Ok(Progress::Blocked);
            }
            if !tx.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            let packet = self.chain.readable();
            let header = Header::read(tx.memory(), packet);
            let header = header.ok_or(RingError::Chain("a packet with no header in memory"))?;
            self.switch.receive(&header, packet, &mut buffers);
            tx.push(self.chain.head(), 0)?;
            turn_bytes += PACKET_COST_BYTES + u64::from(header.len_bytes);
        }
        Ok(Progress::More)
    }

    /// Delivers packets to the guest until there are none (`Waiting`: for the host), there are no more buffers
    /// (`Nothing`), or the turn's budget is used up.
    fn deliver(&mut self, rx: &mut Virtqueue) -> Result<Progress, RingError> {
        let mut buffers = GuestBuffers::new(rx.memory().clone());
        let mut turn_bytes = 0;
        while turn_bytes < TURN_BYTES {
            if !self.switch.has_packets() {
                return Ok(Progress::Blocked);
            }
            if !rx.pop(&mut self.chain)? {
                return Ok(Progress::Drained);
            }
            turn_bytes += PACKET_COST_BYTES;
            let Some(header) = self.switch.next(self.chain.writable(), &mut buffers)? else {
                rx.put_back();
                continue;
            };
            if !header.write(rx.memory(), self.chain.writable()) {
                return Err(RingError::Chain("a receive buffer outside of memory"));
            }
            rx.push(self.chain.head(), HEADER_BYTES as u32 + header.len_bytes)?;
            turn_bytes += u64::from(header.len_bytes);
            if self.held_up && !self.switch.is_full() {
                self.held_up = false;
                self.switch.ring();
            }
        }
        Ok(Progress::More)
    }
}

impl QueueHandler for Vsock {
    fn start(&mut self, _features: u64) {}

    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        let [rx, tx, events] = queues else { return Ok(Progress::Drained) };
        match index {
            EVENTS => self.tell(events),
            _ if !matches!(self.moved, Moved::Settled) => Ok(Progress::Blocked),
            RX => {
                let more = self.switch.poll();
                let left = self.deliver(rx)?;
                Ok(if more { Progress::More } else { left })
            }
            TX => {
                let left = self.take(tx)?;
                // Responses are delivered at once. If there are no buffers for them, the doorbell of the other queue is
                // needed.
                Ok(match self.deliver(rx)? {
                    Progress::More => Progress::More,
                    Progress::Drained if rx.enable_notification()? => Progress::More,
                    _ => left,
                })
            }
            _ => Ok(Progress::Drained),
        }
    }

    fn wake_fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.switch.wake_fd()]
    }

    fn reset(&mut self) {
        self.switch.clear();
        self.held_up = false;
        self.moved = Moved::Settled;
    }

    /// There is no state: connections do not move to another device, and the guest is told so after every move.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateMismatch> {
        if !state.is_empty() {
            return Err(StateMismatch);
        }
        self.reset();
        self.moved = Moved::Untold;
        Ok(())
    }
}
