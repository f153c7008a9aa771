//! MSI-X: a table of messages, which the guest writes, and the interrupts that send them (PCI Local Bus Specification
//! 3.0, §6.8.2).
//!
//! Each source of interrupts has an eventfd. While its vector is unmasked, KVM sends the vector's message at every
//! write to it. Otherwise the eventfd is disconnected from KVM and its counter is the pending bit: when it is connected
//! again, KVM sends what is pending. So raising an interrupt is the same system call in every state, without a lock, and
//! also an agent that only knows the eventfd, such as vhost, keeps the rules of masks and pending bits.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::irq::{EventRouting, MsiMessage};

/// The vector of a source that raises no interrupts (virtio 1.2 §4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
/// The size of an entry of the table (§6.8.2, figure 6-11).
const TABLE_ENTRY_BYTES: u64 = 16;
/// The capability's bytes after its header: message control, and the places of table and pending bits.
const CONFIG_BYTES: usize = 10;

/// Message control (§6.8.2.3): enables MSI-X.
const ENABLE: u16 = 1 << 15;
/// Message control: masks all vectors.
const FUNCTION_MASK: u16 = 1 << 14;
/// Vector control (§6.8.2.9): masks this vector.
const ENTRY_MASKED: u32 = 1 << 0;

/// An entry of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    /// All vectors are masked at first.
    const RESET: Entry = Entry { address: 0, data: 0, control: ENTRY_MASKED };

    fn to_bytes(self) -> [u8; TABLE_ENTRY_BYTES as usize] {
        let mut bytes = [0; TABLE_ENTRY_BYTES as usize];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; TABLE_ENTRY_BYTES as usize]) -> Entry {
        let [a, b, c, d, e, f, g, h, data @ .., i, j, k, l] = bytes;
        Entry {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            data: u32::from_le_bytes(data),
            control: u32::from_le_bytes([i, j, k, l]) & ENTRY_MASKED,
        }
    }

    fn message(self) -> MsiMessage {
        MsiMessage { address: self.address, data: self.data }
    }
}

/// A source of interrupts, and what KVM knows of it.
struct Source {
    gsi: u32,
    vector: u16,
    /// The message that KVM has.
    message: Option<MsiMessage>,
    /// Whether KVM sends it.
    connected: bool,
}

/// The saved state of a function's interrupts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    control: u16,
    table: Vec<Entry>,
    vectors: Vec<u16>,
    pending: Vec<bool>,
}

/// A function's interrupts. The function guards it with a lock.
pub struct Msix {
    /// Message control, with the bits that the guest can write.
    control: u16,
    table: Vec<Entry>,
    sources: Vec<Source>,
    events: Arc<Vec<EventFd>>,
    routing: Arc<dyn EventRouting>,
}

impl Msix {
    /// Creates the interrupts of a function whose sources write to `events` and have the interrupt numbers from
    /// `first_gsi`. There are as many vectors as sources, at most 2048.
    pub fn new(events: Arc<Vec<EventFd>>, first_gsi: u32, routing: Arc<dyn EventRouting>) -> Msix {
        let source = |gsi| Source { gsi, vector: NO_VECTOR, message: None, connected: false };
        let count = events.len();
        Msix {
            control: 0,
            table: vec![Entry::RESET; count],
            sources: (first_gsi..).take(count).map(source).collect(),
            events,
            routing,
        }
    }

    /// The capability: message control, then the offsets of the table and of the pending bits in BAR 0. The guest can
    /// write the upper two bits of message control.
    pub fn capability(&self, table_offset: u32, pending_offset: u32) -> [u8; CONFIG_BYTES] {
        let size = self.table.len().saturating_sub(1) as u16;
        let mut bytes = [0; CONFIG_BYTES];
        bytes[..2].copy_from_slice(&size.to_le_bytes());
        bytes[2..6].copy_from_slice(&table_offset.to_le_bytes());
        bytes[6..].copy_from_slice(&pending_offset.to_le_bytes());
        bytes
    }

    /// The bits of message control that a guest can write, for the first bytes of the capability.
    pub const WRITABLE: [u8; 2] = (ENABLE | FUNCTION_MASK).to_le_bytes();

    /// Sets message control after a guest's write to it.
    pub fn set_control(&mut self, control: u16) {
        let control = control & (ENABLE | FUNCTION_MASK);
        if control != self.control {
            self.control = control;
            self.update(|_| true);
        }
    }

    /// The vector of source `index`; [`NO_VECTOR`] if it has none.
    pub fn vector(&self, index: usize) -> u16 {
        self.sources.get(index).map_or(NO_VECTOR, |source| source.vector)
    }

    /// Sets the vector of source `index`. Vectors that do not exist become [`NO_VECTOR`]. What the source had pending for
    /// another vector is forgotten.
    pub fn set_vector(&mut self, index: usize, vector: u16) {
        let vector = if usize::from(vector) < self.table.len() { vector } else { NO_VECTOR };
        let Some(source) = self.sources.get_mut(index) else { return };
        if source.vector != vector {
            if !source.connected {
                let _ = self.events.get(index).map(EventFd::read);
            }
            source.vector = vector;
            self.update_source(index);
        }
    }

    /// Takes the vectors from all sources when the device is reset. Nothing writes to the eventfds until the device runs
    /// again, so KVM is not told: disconnecting each takes as long as a grace period of RCU. See [`Msix::settle`].
    pub fn reset_vectors(&mut self) {
        self.sources.iter_mut().for_each(|source| source.vector = NO_VECTOR);
    }

    /// Disconnects the sources that have not got vectors since a reset. Called before the device runs.
    pub fn settle(&mut self) {
        self.update(|vector| vector == NO_VECTOR);
    }

    /// Fills `data` from `offset` in the table. Only aligned accesses of 4 and 8 bytes are valid (§6.8.2).
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        if let Some((index, at)) = self.entry(offset, data.len())
            && let Some(bytes) = self.table[index].to_bytes().get(at..at + data.len())
        {
            data.copy_from_slice(bytes);
        }
    }

    /// Writes `data` at `offset` in the table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let Some((index, at)) = self.entry(offset, data.len()) else { return };
        let mut bytes = self.table[index].to_bytes();
        if let Some(part) = bytes.get_mut(at..at + data.len()) {
            part.copy_from_slice(data);
            self.table[index] = Entry::from_bytes(bytes);
            self.update(|vector| usize::from(vector) == index);
        }
    }

    /// Fills `data` from `offset` in the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let is_pending = |bit: &u64| self.is_pending((at * 8 + bit) as usize);
            *byte = (0..8).filter(is_pending).fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    /// Saves what the guest has set, and what is pending.
    pub fn save(&self) -> MsixState {
        MsixState {
            control: self.control,
            table: self.table.clone(),
            vectors: self.sources.iter().map(|source| source.vector).collect(),
            pending: self
                .sources
                .iter()
                .zip(self.events.iter())
                .map(|(source, event)| has_pending(source, event))
                .collect(),
        }
    }

    /// Whether `state` may be restored: it was saved with as many sources.
    pub fn fits(&self, state: &MsixState) -> bool {
        let lens = [state.table.len(), state.vectors.len(), state.pending.len()];
        lens.iter().all(|len| *len == self.sources.len())
    }

    /// Restores a state that [fits](Msix::fits).
    pub fn restore(&mut self, state: &MsixState) {
        self.set_control(0);
        self.table.clone_from(&state.table);
        for (index, (vector, pending)) in state.vectors.iter().zip(&state.pending).enumerate() {
            self.set_vector(index, *vector);
            let _ = self.events.get(index).map(EventFd::read);
            if *pending {
                let _ = self.events.get(index).map(|event| event.write(1));
            }
        }
        self.set_control(state.control);
    }

    /// The entry with a valid access of `len` bytes at `offset`, and the offset in it.
    fn entry(&self, offset: u64, len: usize) -> Option<(usize, usize)> {
        let (index, at) = ((offset / TABLE_ENTRY_BYTES) as usize, (offset % TABLE_ENTRY_BYTES) as usize);
        (matches!(len, 4 | 8) && at.is_multiple_of(len) && index < self.table.len()).then_some((index, at))
    }

    fn is_pending(&self, vector: usize) -> bool {
        let mut sources = self.sources.iter().zip(self.events.iter());
        sources.any(|(source, event)| usize::from(source.vector) == vector && has_pending(source, event))
    }

    /// Tells KVM what has changed for the sources whose vectors are `affected`.
    fn update(&mut self, affected: impl Fn(u16) -> bool) {
        for index in 0..self.sources.len() {
            if affected(self.sources[index].vector) {
                self.update_source(index);
            }
        }
    }

    fn update_source(&mut self, index: usize) {
        let (Some(source), Some(event)) = (self.sources.get_mut(index), self.events.get(index)) else { return };
        let sends = self.control & (ENABLE | FUNCTION_MASK) == ENABLE;
        let entry =
            self.table.get(usize::from(source.vector)).filter(|entry| sends && entry.control & ENTRY_MASKED == 0);
        if let Err(error) = source.connect(event, entry.map(|entry| entry.message()), &*self.routing) {
            // The guest chose a message that the host's KVM cannot send.
            log::debug!("interrupt {} cannot be sent: {error}", source.gsi);
        }
    }
}

impl Source {
    /// Makes KVM send `message`, or nothing, at each write to `event`.
    fn connect(&mut self, event: &EventFd, message: Option<MsiMessage>, routing: &dyn EventRouting) -> io::Result<()> {
        let Some(message) = message else { return self.disconnect(event, routing) };
        if self.message != Some(message) {
            self.message = None;
            if let Err(error) = routing.set_message(self.gsi, message) {
                self.disconnect(event, routing)?;
                return Err(error);
            }
            self.message = Some(message);
        }
        if !self.connected {
            routing.connect_message(self.gsi, event)?;
            self.connected = true;
        }
        Ok(())
    }

    fn disconnect(&mut self, event: &EventFd, routing: &dyn EventRouting) -> io::Result<()> {
        if std::mem::take(&mut self.connected) { routing.disconnect_message(self.gsi, event) } else { Ok(()) }
    }
}

/// Whether the source has raised an interrupt that was not sent.
fn has_pending(source: &Source, event: &EventFd) -> bool {
    if source.connected || source.vector == NO_VECTOR {
        return false;
    }
    // Reading is the only way to know, and clears it.
    let count = event.read().unwrap_or(0);
    count > 0 && event.write(1).is_ok()
}
