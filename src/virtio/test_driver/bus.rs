//! The buses of a [`Driver`](super::Driver). On PCI its accesses, which are to MMIO registers, become accesses to the
//! common configuration, so that every test of a device can run on both.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::Device;
use crate::irq::{EventRouting, IrqLine, MsiMessage};
use crate::layout;
use crate::memory::GuestMemory;
use crate::pci::Function;
use crate::virtio::mmio::register::*;
use crate::virtio::pci::common::field;
use crate::virtio::pci::{Slot, bar};
use crate::virtio::{MmioTransport, PciTransport, Transport, TransportState, VirtioDevice};

/// The bus that a device is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    Mmio,
    Pci,
}

/// Every bus.
pub const BUSES: [Bus; 2] = [Bus::Mmio, Bus::Pci];

/// A device on a bus, with the registers of MMIO.
pub trait OnBus: Device + Transport {
    /// Takes the interrupts that the guest has received since the last call.
    fn take_interrupts(&self) -> u64;
}

impl Bus {
    /// Puts a device on the bus.
    pub fn attach(self, device: VirtioDevice, memory: GuestMemory) -> Box<dyn OnBus> {
        match self {
            Bus::Mmio => {
                let irq = IrqLine::new(6).unwrap();
                Box::new(OnMmio(MmioTransport::new(device, memory, irq.try_clone().unwrap()).unwrap(), irq))
            }
            Bus::Pci => Box::new(OnPci::new(device, memory)),
        }
    }
}

struct OnMmio(MmioTransport, IrqLine);

impl OnBus for OnMmio {
    fn take_interrupts(&self) -> u64 {
        self.1.event().read().unwrap_or(0)
    }
}

impl Device for OnMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

/// Takes the place of KVM: keeps what is connected.
#[derive(Default)]
pub struct TestRouting {
    pub messages: Mutex<BTreeMap<u32, MsiMessage>>,
    pub connected: Mutex<BTreeMap<u32, EventFd>>,
    pub doorbells: Mutex<BTreeMap<u64, EventFd>>,
}

impl EventRouting for TestRouting {
    fn set_message(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        // As KVM refuses destinations that do not exist.
        if message.address >> 32 & 0xff != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.messages.lock().unwrap().insert(gsi, message);
        Ok(())
    }
    fn connect_message(&self, gsi: u32, event: &EventFd) -> io::Result<()> {
        let before = self.connected.lock().unwrap().insert(gsi, event.try_clone()?);
        assert!(before.is_none(), "KVM connects an eventfd once");
        Ok(())
    }
    fn disconnect_message(&self, gsi: u32, _event: &EventFd) -> io::Result<()> {
        self.connected.lock().unwrap().remove(&gsi).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
    fn connect_doorbell(&self, address: u64, doorbell: &EventFd) -> io::Result<()> {
        self.doorbells.lock().unwrap().insert(address, doorbell.try_clone()?);
        Ok(())
    }
    fn disconnect_doorbell(&self, address: u64, doorbell: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        doorbell.write(1)?;
        let same = doorbells.get(&address).is_some_and(|other| other.read().is_ok());
        if !same {
            doorbell.read()?;
            return Err(io::ErrorKind::NotFound.into());
        }
        doorbells.remove(&address);
        Ok(())
    }
}

/// A device on PCI, and the selectors of MMIO.
struct OnPci {
    transport: PciTransport,
    routing: Arc<TestRouting>,
}

/// The offset of message control in configuration space: the first capability.
pub const MESSAGE_CONTROL: u64 = 0x42;

impl OnPci {
    fn new(device: VirtioDevice, memory: GuestMemory) -> OnPci {
        let routing = Arc::new(TestRouting::default());
        let bar_address = layout::PCI_WINDOW as u32;
        let slot = Slot { bar_address, first_gsi: layout::GSI_COUNT, routing: routing.clone() };
        let transport = PciTransport::new(device, memory, slot).unwrap();
        // A driver of a function that nobody has used enables its interrupts; each source has a vector of its own.
        transport.write_config(MESSAGE_CONTROL, &0x8000_u16.to_le_bytes());
        for vector in 0..=transport.doorbells().len() as u64 {
            let at = bar::MSIX_TABLE + 16 * vector;
            transport.write_bar(at, &0xfee0_0000_u64.to_le_bytes());
            transport.write_bar(at + 8, &(0x20 + vector).to_le_bytes());
        }
        OnPci { transport, routing }
    }

    fn get<const N: usize>(&self, field: u64) -> [u8; N] {
        let mut data = [0xff; N];
        self.transport.read_bar(bar::COMMON + field, &mut data);
        data
    }

    fn put(&self, field: u64, value: u64, len: usize) {
        self.transport.write_bar(bar::COMMON + field, &value.to_le_bytes()[..len]);
    }

    /// The value of a register of MMIO.
    fn read_register(&self, offset: u64) -> Option<u32> {
        let half = |field| Some(u16::from_le_bytes(self.get(field)).into());
        let byte = |field| Some(self.get::<1>(field)[0].into());
        match offset {
            DEVICE_FEATURES => Some(u32::from_le_bytes(self.get(field::DEVICE_FEATURE))),
            QUEUE_NUM_MAX => half(field::QUEUE_SIZE),
            QUEUE_READY => half(field::QUEUE_ENABLE),
            STATUS => byte(field::DEVICE_STATUS),
            CONFIG_GENERATION => byte(field::CONFIG_GENERATION),
            INTERRUPT_STATUS => {
                let mut isr = [0xff];
                self.transport.read_bar(bar::ISR, &mut isr);
                Some(isr[0].into())
            }
            _ => None,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let value = u64::from(value);
        match offset {
            DEVICE_FEATURES_SEL => self.put(field::DEVICE_FEATURE_SELECT, value, 4),
            DRIVER_FEATURES_SEL => self.put(field::DRIVER_FEATURE_SELECT, value, 4),
            DRIVER_FEATURES => self.put(field::DRIVER_FEATURE, value, 4),
            QUEUE_SEL => self.put(field::QUEUE_SELECT, value, 2),
            QUEUE_NUM => self.put(field::QUEUE_SIZE, value, 2),
            QUEUE_READY => {
                let [select, ..] = self.get::<2>(field::QUEUE_SELECT);
                self.put(field::QUEUE_MSIX_VECTOR, select.into(), 2);
                self.put(field::QUEUE_ENABLE, value, 2);
            }
            QUEUE_NOTIFY => self.transport.write_bar(bar::NOTIFY + 4 * value, &[0; 2]),
            STATUS => {
                self.put(field::CONFIG_MSIX_VECTOR, self.transport.doorbells().len() as u64, 2);
                self.put(field::DEVICE_STATUS, value, 1);
            }
            QUEUE_DESC_LOW | QUEUE_DESC_HIGH => self.put(field::QUEUE_DESC + (offset - QUEUE_DESC_LOW), value, 4),
            QUEUE_DRIVER_LOW | QUEUE_DRIVER_HIGH => {
                self.put(field::QUEUE_DRIVER + (offset - QUEUE_DRIVER_LOW), value, 4)
            }
            QUEUE_DEVICE_LOW | QUEUE_DEVICE_HIGH => {
                self.put(field::QUEUE_DEVICE + (offset - QUEUE_DEVICE_LOW), value, 4)
            }
            _ => {}
        }
    }
}

impl OnBus for OnPci {
    fn take_interrupts(&self) -> u64 {
        self.routing.connected.lock().unwrap().values().map(|event| event.read().unwrap_or(0)).sum()
    }
}

impl Device for OnPci {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            self.transport.read_bar(bar::DEVICE + at, data);
        } else if let (Some(value), Ok(data)) = (self.read_register(offset), <&mut [u8; 4]>::try_from(data)) {
            *data = value.to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            self.transport.write_bar(bar::DEVICE + at, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

macro_rules! delegate {
    ($wrapper:ty, $field:tt) => {
        impl Transport for $wrapper {
            fn doorbells(&self) -> &[EventFd] {
                self.$field.doorbells()
            }
            fn pause(&self) {
                self.$field.pause();
            }
            fn resume(&self) {
                self.$field.resume();
            }
            fn save(&self) -> TransportState {
                self.$field.save()
            }
            fn restore(&self, state: &TransportState) -> anyhow::Result<()> {
                self.$field.restore(state)
            }
        }
    };
}
delegate!(OnMmio, 0);
delegate!(OnPci, transport);

impl TransportState {
    /// The part that does not depend on the transport.
    pub fn session(&mut self) -> &mut crate::virtio::session::SessionState {
        match self {
            TransportState::Mmio(state) => &mut state.session,
            TransportState::Pci(state) => &mut state.session,
        }
    }
}
