//! The virtio PCI transport, without legacy interface (virtio 1.2 §4.1): a function with the registers of a device in its
//! BAR, a doorbell per queue, and a message-signaled interrupt per queue.

pub mod common;
mod doorbells;
mod identity;
mod interrupt;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use self::common::CommonConfig;
use self::doorbells::Doorbells;
use self::interrupt::PciInterrupt;
use super::session::{DeviceSession, SessionState};
use super::{ConfigSpace, Transport, TransportState, VirtioDevice};
use crate::irq::EventRouting;
use crate::layout;
use crate::memory::GuestMemory;
use crate::pci::{self, Function, Msix, MsixState};
use crate::sys::event;

/// The offsets of the structures in the BAR.
pub mod bar {
    /// Common configuration (§4.1.4.3).
    pub const COMMON: u64 = 0x0000;
    /// Its size.
    pub const COMMON_BYTES: u64 = 60;
    /// ISR status (§4.1.4.5): a byte.
    pub const ISR: u64 = 0x1000;
    /// Device-specific configuration (§4.1.4.6).
    pub const DEVICE: u64 = 0x2000;
    /// Doorbells (§4.1.4.4): that of queue `n` is at `NOTIFY + 4 * n`.
    pub const NOTIFY: u64 = 0x3000;
    /// The table of MSI-X.
    pub const MSIX_TABLE: u64 = 0x4000;
    /// The pending bits of MSI-X.
    pub const MSIX_PENDING: u64 = 0x5000;
    /// The distance between structures, which is the maximum size of each.
    pub const STRIDE: u64 = 0x1000;
}

/// The distance between two doorbells: each queue's can be found by its address alone.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Vendor-specific capability (PCI Local Bus Specification 3.0, appendix H), which virtio's are.
const CAPABILITY_VENDOR: u8 = 0x09;
/// The capability of MSI-X.
const CAPABILITY_MSIX: u8 = 0x11;

/// `cfg_type` of virtio's capabilities (§4.1.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum CapabilityType {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    /// A window from configuration space to the BAR (§4.1.4.9).
    Window = 5,
}

/// The version of [`PciState`] that this code reads and writes.
const STATE_VERSION: u32 = 1;

/// The saved state of a transport: see [`Transport::save`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciState {
    /// Version of this structure.
    pub version: u32,
    /// Device ID of the device behind the transport.
    pub device_type: u32,
    /// Configuration space.
    pub config: pci::ConfigState,
    /// Selector registers.
    pub common: CommonConfig,
    /// Messages, their sources, and what is pending.
    pub msix: MsixState,
    /// ISR status.
    pub isr: u8,
    /// The state of the device and its driver.
    pub session: SessionState,
}

/// A virtio device on the PCI bus. Dropping it stops the device.
pub struct PciTransport {
    interrupt: Arc<PciInterrupt>,
    config: Arc<ConfigSpace>,
    doorbells: Arc<Vec<EventFd>>,
    /// The BAR's address, or `NOWHERE`: read by every access to the window without a lock.
    bar_address: AtomicU64,
    registers: Mutex<Registers>,
}

/// No address of a BAR, which is a multiple of its size.
const NOWHERE: u64 = u64::MAX;

struct Registers {
    space: pci::ConfigSpace,
    msix_at: u64,
    window_at: u64,
    common: CommonConfig,
    msix: Msix,
    doorbells: Doorbells,
    session: DeviceSession,
    /// Whether the device was restored and has not been resumed since.
    restored: bool,
}

/// What a function needs of the virtual machine.
pub struct Slot {
    /// The BAR's first address.
    pub bar_address: u32,
    /// The first of its interrupt numbers: one per queue, and one for changes of the configuration.
    pub first_gsi: u32,
    /// Connects its interrupts and doorbells.
    pub routing: Arc<dyn EventRouting>,
}

/// The number of interrupts of a device.
pub fn interrupt_count(device: &VirtioDevice) -> u32 {
    device.queue_count() as u32 + 1
}

impl PciTransport {
    /// Creates the transport for `device`, whose buffers are in `memory`, at `slot`.
    ///
    /// Fails if the host has run out of file descriptors or threads, or KVM refuses to connect a doorbell.
    pub fn new(device: VirtioDevice, memory: GuestMemory, slot: Slot) -> io::Result<PciTransport> {
        let events = |count| (0..count).map(|_| event::create()).collect::<io::Result<Vec<_>>>().map(Arc::new);
        let doorbells = events(device.queue_count())?;
        let interrupts = events(interrupt_count(&device) as usize)?;
        let interrupt = Arc::new(PciInterrupt::new(interrupts.clone()));
        let config = device.config.clone();
        let msix = Msix::new(interrupts, slot.first_gsi, slot.routing.clone());
        let mut space =
            pci::ConfigSpace::new(identity::of(device.device_type), slot.bar_address, layout::PCI_BAR_BYTES as u32);
        let (msix_at, window_at) = add_capabilities(&mut space, &msix);
        let session = DeviceSession::new(device, Arc::new(memory), doorbells.clone(), interrupt.clone())?;
        let common = CommonConfig::default();
        let mut registers = Registers {
            space,
            msix_at,
            window_at,
            common,
            msix,
            doorbells: Doorbells::new(doorbells.clone(), slot.routing),
            session,
            restored: false,
        };
        registers.place_doorbells()?;
        Ok(PciTransport {
            interrupt,
            config,
            doorbells,
            bar_address: AtomicU64::new(registers.decoded_address()),
            registers: Mutex::new(registers),
        })
    }

    /// Follows a change of the command register or the BAR.
    fn update_address(&self, registers: &mut Registers) {
        self.bar_address.store(registers.decoded_address(), Ordering::Release);
        if let Err(error) = registers.place_doorbells() {
            // Doorbells that KVM does not handle arrive in `write_bar`.
            log::debug!("connect the doorbells of a PCI function: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transport for PciTransport {
    fn doorbells(&self) -> &[EventFd] {
        &self.doorbells
    }

    fn pause(&self) {
        self.lock().session.pause();
    }

    fn resume(&self) {
        let mut registers = self.lock();
        registers.session.resume();
        // An interrupt may have been on its way when the machine was saved, and drivers must handle spurious ones.
        if std::mem::take(&mut registers.restored) {
            self.interrupt.raise_all();
        }
    }

    fn save(&self) -> TransportState {
        let mut registers = self.lock();
        // Draining raises interrupts, so the session is saved first.
        let session = registers.session.save();
        TransportState::Pci(PciState {
            version: STATE_VERSION,
            device_type: registers.session.device_type(),
            config: registers.space.save(),
            common: registers.common.clone(),
            msix: registers.msix.save(),
            isr: self.interrupt.isr(),
            session,
        })
    }

    fn restore(&self, state: &TransportState) -> Result<()> {
        let TransportState::Pci(state) = state else { bail!("device state is of another transport than PCI") };
        let mut registers = self.lock();
        ensure!(state.version == STATE_VERSION, "device state has version {}, not {STATE_VERSION}", state.version);
        let device_type = registers.session.device_type();
        ensure!(state.device_type == device_type, "device state is for type {}, not {device_type}", state.device_type);
        ensure!(registers.msix.fits(&state.msix), "device state has other interrupts");
        registers.session.restore(&state.session)?;
        registers.common = state.common.clone();
        registers.space.restore(&state.config);
        self.update_address(&mut registers);
        self.interrupt.set_isr(state.isr);
        registers.msix.restore(&state.msix);
        registers.restored = true;
        Ok(())
    }
}

/// Adds the capabilities. Returns the offsets of message control, and of the window's capability.
fn add_capabilities(space: &mut pci::ConfigSpace, msix: &Msix) -> (u64, u64) {
    let body = msix.capability(bar::MSIX_TABLE as u32, bar::MSIX_PENDING as u32);
    let msix_at = space.add_capability(CAPABILITY_MSIX, &body, &Msix::WRITABLE) as u64 + 2;
    let mut add = |kind: CapabilityType, offset: u64, len: u64, rest: &[u8], writable: &[u8]| {
        let mut body = vec![(16 + rest.len()) as u8, kind as u8, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((len as u32).to_le_bytes());
        body.extend(rest);
        space.add_capability(CAPABILITY_VENDOR, &body, writable) as u64
    };
    add(CapabilityType::Common, bar::COMMON, bar::COMMON_BYTES, &[], &[]);
    add(CapabilityType::Isr, bar::ISR, 1, &[], &[]);
    add(CapabilityType::Device, bar::DEVICE, bar::STRIDE, &[], &[]);
    add(CapabilityType::Notify, bar::NOTIFY, bar::STRIDE, &NOTIFY_MULTIPLIER.to_le_bytes(), &[]);
    // The guest sets the BAR, the offset and the length, and reads or writes the data.
    let writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let window_at = add(CapabilityType::Window, 0, 0, &[0; 4], &writable);
    (msix_at, window_at)
}

/// Offsets in the window's capability: of the BAR's index, the offset, the length and the data.
mod window {
    pub const BAR: usize = 4;
    pub const OFFSET: usize = 8;
    pub const LENGTH: usize = 12;
    pub const DATA: usize = 16;
}

impl Registers {
    /// The BAR's address, unless it is not in the window.
    fn bar_address(&self) -> Option<u64> {
        let within = layout::PCI_WINDOW..layout::PCI_WINDOW + layout::PCI_WINDOW_BYTES;
        Some(u64::from(self.space.bar_register())).filter(|address| within.contains(address))
    }

    /// The BAR's address while the function responds to accesses there, or [`NOWHERE`].
    fn decoded_address(&self) -> u64 {
        self.bar_address().filter(|_| self.space.responds()).unwrap_or(NOWHERE)
    }

    /// Moves the doorbells to where the BAR is.
    fn place_doorbells(&mut self) -> io::Result<()> {
        let responds = self.space.responds();
        // A guest that looks for the BAR's size writes ones. The doorbells stay: connecting them takes long.
        if !responds && self.space.bar_register() == self.space.bar_size_mask() {
            return Ok(());
        }
        self.doorbells.place(self.bar_address().map(|address| address + bar::NOTIFY), responds)
    }

    /// The offset in the BAR that an access of `len` bytes to the configuration space at `offset` refers to, if it is one to
    /// the window's data and its registers describe such an access (§4.1.4.9).
    fn through_window(&self, offset: u64, len: usize) -> Option<u64> {
        let data_at = self.window_at + window::DATA as u64;
        if !(data_at..data_at + 4).contains(&offset) {
            return None;
        }
        let at = self.window_at as usize;
        let [bar] = self.space.register(at + window::BAR);
        let bar_offset = u32::from_le_bytes(self.space.register(at + window::OFFSET));
        let described = u32::from_le_bytes(self.space.register(at + window::LENGTH));
        (bar == 0 && matches!(described, 1 | 2 | 4) && described as usize == len).then_some(bar_offset.into())
    }
}

impl Function for PciTransport {
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        if let Some(offset) = registers.through_window(offset, data.len()) {
            drop(registers);
            return self.read_bar(offset, data);
        }
        registers.space.read(offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        if let Some(offset) = registers.through_window(offset, data.len()) {
            drop(registers);
            return self.write_bar(offset, data);
        }
        registers.space.write(offset, data);
        let control = u16::from_le_bytes(registers.space.register(registers.msix_at as usize));
        registers.msix.set_control(control);
        self.update_address(&mut registers);
    }

    fn bar_address(&self) -> Option<u64> {
        Some(self.bar_address.load(Ordering::Acquire)).filter(|address| *address != NOWHERE)
    }

    fn bar_bytes(&self) -> u64 {
        layout::PCI_BAR_BYTES
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        let at = offset % bar::STRIDE;
        match offset - at {
            bar::COMMON => {
                let Registers { common, msix, session, .. } = &*self.lock();
                common.read(at, data, msix, session, &self.config);
            }
            bar::ISR => {
                if let (0, [isr]) = (at, data) {
                    *isr = self.interrupt.take_isr();
                }
            }
            bar::DEVICE => self.config.read(at, data),
            bar::MSIX_TABLE => self.lock().msix.read_table(at, data),
            bar::MSIX_PENDING => self.lock().msix.read_pending(at, data),
            _ => {}
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        let at = offset % bar::STRIDE;
        match offset - at {
            bar::COMMON => {
                let Registers { common, msix, session, .. } = &mut *self.lock();
                if common.write(at, data, msix, session) {
                    self.interrupt.set_isr(0);
                }
            }
            bar::DEVICE => self.config.write(at, data),
            // Not reached if KVM handles the doorbell.
            bar::NOTIFY => {
                if let Some(doorbell) = self.doorbells.get((at / u64::from(NOTIFY_MULTIPLIER)) as usize) {
                    let _ = doorbell.write(1);
                }
            }
            bar::MSIX_TABLE => self.lock().msix.write_table(at, data),
            _ => {}
        }
    }
}
