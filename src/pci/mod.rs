//! PCI: one bus with a host bridge and the functions of virtio devices, which vCPUs access through configuration ports,
//! ECAM and a window of memory addresses.
//!
//! Conventional PCI (PCI Local Bus Specification 3.0) suffices for virtio: a guest reads fewer registers than of PCI
//! Express functions. Functions have one memory BAR each, whose address a guest may change, and message-signaled
//! interrupts (MSI-X) but no interrupt pins.

mod config;
mod msix;
mod ports;
mod window;

use std::sync::Arc;

pub use config::{ConfigSpace, ConfigState, Identity};
pub use msix::{Msix, MsixState, NO_VECTOR};
pub use ports::Ports;
pub use window::{Ecam, Window};

use crate::layout;

/// Bits of an offset in ECAM that select the register of a function (PCI Express Base Specification 5.0, §7.2.2).
const REGISTER_BITS: u32 = 12;
/// The bits below those of the device number: function and register.
const DEVICE_SHIFT: u32 = REGISTER_BITS + 3;
/// The registers of conventional PCI. The extended ones, which follow, read as zeroes, which means: no capabilities.
const CONFIG_BYTES: u64 = 256;

/// A device with one function and one memory BAR.
///
/// Called on vCPU threads, concurrently: a function guards its own state. Offsets and widths are the guest's; an invalid
/// access must be ignored (writes) or leave `data` unchanged, which contains all-ones, and must never panic.
pub trait Function: Send + Sync {
    /// Fills `data` from the configuration registers at `offset`; the access does not cross a double word.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the configuration registers at `offset`; the access does not cross a double word.
    fn write_config(&self, offset: u64, data: &[u8]);
    /// The address of the BAR, while the function responds to accesses to it.
    fn bar_address(&self) -> Option<u64>;
    /// The size of the BAR.
    fn bar_bytes(&self) -> u64;
    /// Fills `data` from `offset` in the BAR.
    fn read_bar(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` in the BAR.
    fn write_bar(&self, offset: u64, data: &[u8]);
}

/// The functions on the bus, in the order of their device numbers, which start at 1. It never changes.
#[derive(Clone, Default)]
pub struct Functions(Arc<Vec<Arc<dyn Function>>>);

impl Functions {
    /// Creates the bus with at most [`layout::PCI_FUNCTIONS_MAX`] functions.
    pub fn new(functions: Vec<Arc<dyn Function>>) -> Functions {
        debug_assert!(functions.len() <= layout::PCI_FUNCTIONS_MAX);
        Functions(Arc::new(functions))
    }

    /// Reads the configuration register at `address`: bus, device, function and register as in ECAM. Without a function
    /// there, `data` is left unchanged.
    fn read_config(&self, address: u64, data: &mut [u8]) {
        let register = address & ((1 << REGISTER_BITS) - 1);
        if crosses_double_word(register, data.len()) {
            return;
        }
        match self.target(address) {
            Some(_) if register >= CONFIG_BYTES => data.fill(0),
            Some(Target::HostBridge) => config::read_host_bridge(register, data),
            Some(Target::Function(function)) => function.read_config(register, data),
            None => {}
        }
    }

    /// Writes the configuration register at `address`.
    fn write_config(&self, address: u64, data: &[u8]) {
        let register = address & ((1 << REGISTER_BITS) - 1);
        let writable = register < CONFIG_BYTES && !crosses_double_word(register, data.len());
        if let (true, Some(Target::Function(function))) = (writable, self.target(address)) {
            function.write_config(register, data);
        }
    }

    fn target(&self, address: u64) -> Option<Target<'_>> {
        if address >> REGISTER_BITS & 0b111 != 0 {
            return None;
        }
        match (address >> DEVICE_SHIFT) as usize {
            0 => Some(Target::HostBridge),
            device => self.0.get(device - 1).map(|function| Target::Function(&**function)),
        }
    }

    /// The function whose BAR contains all of `len` bytes at `address`, and the offset in the BAR.
    fn at(&self, address: u64, len: usize) -> Option<(&dyn Function, u64)> {
        let within = |function: &Arc<dyn Function>| {
            let offset = address.checked_sub(function.bar_address()?)?;
            (offset.checked_add(len as u64)? <= function.bar_bytes()).then_some(offset)
        };
        // Where husk puts them: no search unless a guest has moved some.
        let slot = (address.checked_sub(layout::PCI_WINDOW)? / layout::PCI_BAR_BYTES) as usize;
        let mut candidates = self.0.get(slot).into_iter().chain(self.0.iter());
        candidates.find_map(|function| Some((&**function, within(function)?)))
    }
}

/// What responds to a configuration access.
enum Target<'a> {
    HostBridge,
    Function(&'a dyn Function),
}

/// Whether an access is none that a bus can make: of 1, 2 or 4 bytes within a double word. Larger ones do not exist.
fn crosses_double_word(register: u64, len: usize) -> bool {
    !matches!(len, 1 | 2 | 4) || register % 4 + len as u64 > 4
}
