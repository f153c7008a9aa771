//! The virtio MMIO transport, version 2 (virtio 1.2 §4.2.2).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::session::{DeviceSession, SessionState};
use super::{ConfigSpace, Interrupt, Transport, TransportState, VirtioDevice};
use crate::bus::Device;
use crate::irq::IrqLine;
use crate::memory::GuestMemory;
use crate::sys::event;

/// Offsets of the registers (virtio 1.2 §4.2.2, table 4.1).
pub mod register {
    /// "virt".
    pub const MAGIC_VALUE: u64 = 0x000;
    /// 2.
    pub const VERSION: u64 = 0x004;
    /// The device's type.
    pub const DEVICE_ID: u64 = 0x008;
    /// The device's vendor.
    pub const VENDOR_ID: u64 = 0x00c;
    /// 32 bits of the offered features.
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// Selects which 32 bits.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// 32 bits of the accepted features.
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// Selects which 32 bits.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// Selects the queue that the queue registers refer to.
    pub const QUEUE_SEL: u64 = 0x030;
    /// The maximum size of the queue; 0 if it does not exist.
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    /// The queue's size.
    pub const QUEUE_NUM: u64 = 0x038;
    /// Whether the queue is in use.
    pub const QUEUE_READY: u64 = 0x044;
    /// The doorbell, handled by ioeventfds that match the queue index.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// Why the interrupt was raised.
    pub const INTERRUPT_STATUS: u64 = 0x060;
    /// Clears bits of InterruptStatus.
    pub const INTERRUPT_ACK: u64 = 0x064;
    /// Device status.
    pub const STATUS: u64 = 0x070;
    /// The descriptor table's address.
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    /// Its upper half.
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    /// The available ring's address.
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    /// Its upper half.
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    /// The used ring's address.
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    /// Its upper half.
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    /// Length of a shared memory region.
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    /// Its upper half.
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    /// Address of a shared memory region.
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    /// Its upper half.
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    /// Counts changes of the configuration.
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// The configuration space.
    pub const CONFIG: u64 = 0x100;
}
use register::*;

/// "virt".
pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// The version without legacy interface.
pub(super) const VERSION_2: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"husk");
/// InterruptStatus: a queue has used buffers.
const USED_BUFFER: u32 = 1 << 0;
/// InterruptStatus: the configuration or the device status changed.
const CONFIGURATION_CHANGE: u32 = 1 << 1;

/// The version of [`MmioState`] that this code reads and writes.
const STATE_VERSION: u32 = 1;

/// The saved state of a transport: see [`Transport::save`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState {
    /// Version of this structure.
    pub version: u32,
    /// Device ID of the device behind the transport.
    pub device_type: u32,
    /// The transport's selector registers.
    pub selectors: Selectors,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// The state of the device and its driver.
    pub session: SessionState,
}

/// Registers that select a part of another register.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selectors {
    /// DeviceFeaturesSel.
    pub device_features: u32,
    /// DriverFeaturesSel.
    pub driver_features: u32,
    /// QueueSel.
    pub queue: u32,
}

/// A virtio device on the memory-mapped bus. Dropping it stops the device.
pub struct MmioTransport {
    interrupt: Arc<MmioInterrupt>,
    config: Arc<ConfigSpace>,
    doorbells: Arc<Vec<EventFd>>,
    registers: Mutex<Registers>,
}

struct Registers {
    selectors: Selectors,
    session: DeviceSession,
}

/// The part of the interrupt that is shared by vCPU and worker threads, without locks.
struct MmioInterrupt {
    status: AtomicU32,
    /// Whether the line is also raised by an agent that cannot set the status, such as vhost.
    shared: AtomicBool,
    line: IrqLine,
}

impl MmioInterrupt {
    /// InterruptStatus. While the line is shared it always reports used buffers. That is correct whenever it matters,
    /// and otherwise one of the spurious notifications that drivers must handle (virtio 1.2 §2.7.7.1): they check the
    /// ring, find nothing used and continue.
    fn status(&self) -> u32 {
        let used = if self.shared.load(Ordering::SeqCst) { USED_BUFFER } else { 0 };
        self.status.load(Ordering::SeqCst) | used
    }

    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        self.line.raise();
    }
}

impl Interrupt for MmioInterrupt {
    fn queue_used(&self, _index: usize) {
        self.raise(USED_BUFFER);
    }

    fn config_changed(&self) {
        self.raise(CONFIGURATION_CHANGE);
    }

    fn used_event(&self, _index: usize) -> &EventFd {
        self.line.event()
    }

    fn share(&self, shared: bool) {
        self.shared.store(shared, Ordering::SeqCst);
    }
}

impl MmioTransport {
    /// Creates the transport for `device`, whose buffers are in `memory` and whose interrupts are raised on `irq`.
    ///
    /// Fails if the host has run out of file descriptors or threads.
    pub fn new(device: VirtioDevice, memory: GuestMemory, irq: IrqLine) -> io::Result<MmioTransport> {
        let interrupt =
            Arc::new(MmioInterrupt { status: AtomicU32::new(0), shared: AtomicBool::new(false), line: irq });
        let doorbells = (0..device.queue_count()).map(|_| event::create()).collect::<io::Result<Vec<_>>>()?;
        let doorbells = Arc::new(doorbells);
        let config = device.config.clone();
        let session = DeviceSession::new(device, Arc::new(memory), doorbells.clone(), interrupt.clone())?;
        let registers = Mutex::new(Registers { selectors: Selectors::default(), session });
        Ok(MmioTransport { interrupt, config, doorbells, registers })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transport for MmioTransport {
    /// To be registered with KVM_IOEVENTFD at [`register::QUEUE_NOTIFY`] with the queue's index as datamatch, 4 bytes.
    fn doorbells(&self) -> &[EventFd] {
        &self.doorbells
    }

    fn pause(&self) {
        self.lock().session.pause();
    }

    fn resume(&self) {
        self.lock().session.resume();
        // The edge may have been lost when the machine was saved.
        if self.interrupt.status.load(Ordering::SeqCst) != 0 {
            self.interrupt.line.raise();
        }
    }

    fn save(&self) -> TransportState {
        let mut registers = self.lock();
        TransportState::Mmio(MmioState {
            version: STATE_VERSION,
            device_type: registers.session.device_type(),
            selectors: registers.selectors.clone(),
            // Draining raises interrupts, so the session is saved first.
            session: registers.session.save(),
            interrupt_status: self.interrupt.status.load(Ordering::SeqCst),
        })
    }

    fn restore(&self, state: &TransportState) -> Result<()> {
        let TransportState::Mmio(state) = state else { bail!("device state is of another transport than MMIO") };
        let mut registers = self.lock();
        ensure!(state.version == STATE_VERSION, "device state has version {}, not {STATE_VERSION}", state.version);
        let device_type = registers.session.device_type();
        ensure!(state.device_type == device_type, "device state is for type {}, not {device_type}", state.device_type);
        registers.session.restore(&state.session)?;
        registers.selectors = state.selectors.clone();
        self.interrupt.status.store(state.interrupt_status, Ordering::SeqCst);
        Ok(())
    }
}

impl Device for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.config.read(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && let Some(value) = self.read_register(offset)
        {
            *data = value.to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.config.write(offset, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

impl MmioTransport {
    fn read_register(&self, offset: u64) -> Option<u32> {
        // The register that is read at every interrupt takes no lock.
        if offset == INTERRUPT_STATUS {
            return Some(self.interrupt.status());
        }
        let Registers { selectors, session } = &*self.lock();
        let queue = session.queue(selectors.queue);
        Some(match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => VERSION_2,
            DEVICE_ID => session.device_type(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => session.device_features(selectors.device_features),
            QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.size_max.into()),
            QUEUE_READY => queue.is_some_and(|queue| queue.ready).into(),
            STATUS => session.status(),
            // No device has shared memory, which a length of -1 indicates.
            SHM_LEN_LOW | SHM_LEN_HIGH | SHM_BASE_LOW | SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.config.generation(),
            _ => return None,
        })
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            // Not reached if KVM handles the doorbell.
            QUEUE_NOTIFY => {
                if let Some(doorbell) = self.doorbells.get(value as usize) {
                    let _ = doorbell.write(1);
                }
                return;
            }
            INTERRUPT_ACK => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
                return;
            }
            _ => {}
        }
        let Registers { selectors, session } = &mut *self.lock();
        match offset {
            DEVICE_FEATURES_SEL => selectors.device_features = value,
            DRIVER_FEATURES => session.set_driver_features(selectors.driver_features, value),
            DRIVER_FEATURES_SEL => selectors.driver_features = value,
            QUEUE_SEL => selectors.queue = value,
            QUEUE_READY => session.set_queue_ready(selectors.queue, value & 1 != 0),
            STATUS => {
                session.set_status(value);
                if value == 0 {
                    *selectors = Selectors::default();
                    self.interrupt.status.store(0, Ordering::SeqCst);
                }
            }
            _ => {
                if let Some(queue) = session.queue_to_set_up(selectors.queue) {
                    match offset {
                        // Queue sizes have at most 16 bits; 0 is rejected when the queue is activated.
                        QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
                        QUEUE_DESC_LOW => set_low(&mut queue.descriptor_table, value),
                        QUEUE_DESC_HIGH => set_high(&mut queue.descriptor_table, value),
                        QUEUE_DRIVER_LOW => set_low(&mut queue.available_ring, value),
                        QUEUE_DRIVER_HIGH => set_high(&mut queue.available_ring, value),
                        QUEUE_DEVICE_LOW => set_low(&mut queue.used_ring, value),
                        QUEUE_DEVICE_HIGH => set_high(&mut queue.used_ring, value),
                        _ => {}
                    }
                }
            }
        }
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register >> 32 << 32 | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_driver::{BUFFERS, Driver, WRITE};
    use crate::virtio::{F_VERSION_1, rng};

    fn driver() -> Driver {
        Driver::new(rng::device())
    }

    #[test]
    fn registers_describe_the_device() {
        let driver = driver();
        let expected =
            [(0x000, 0x7472_6976), (0x004, 2), (0x008, 4), (0x034, 64), (0x0fc, 0), (0x0b0, !0), (0x0b4, !0)];
        for (offset, value) in expected {
            assert_eq!(driver.read(offset), value, "at {offset:#x}");
        }
        driver.write(QUEUE_SEL, 1);
        assert_eq!((driver.read(QUEUE_NUM_MAX), driver.read(QUEUE_READY)), (0, 0), "there is no queue 1");
        driver.write(DEVICE_FEATURES_SEL, 2);
        assert_eq!(driver.read(DEVICE_FEATURES), 0);
    }

    #[test]
    fn odd_widths_and_offsets_are_ignored() {
        let mut driver = driver();
        driver.start();
        for len in (0..=8).filter(|len| *len != 4) {
            let mut data = vec![0xff; len];
            for offset in (0..0x100).chain([u64::MAX - 3]) {
                driver.transport.write(offset, &vec![0; len]);
                driver.transport.read(offset, &mut data);
                assert!(data.iter().all(|byte| *byte == 0xff), "{len} bytes at {offset:#x}");
            }
        }
        driver.write(STATUS + 1, 0);
        assert_eq!(driver.read(STATUS), 15);
    }

    #[test]
    fn a_driver_cannot_clear_status_bits_except_by_a_reset() {
        let mut driver = driver();
        driver.start();
        for value in [1, 3, 11, 14, 4, 0x40] {
            driver.write(STATUS, value);
            assert_eq!(driver.read(STATUS), 15, "after {value}");
        }
        driver.write(STATUS, 0);
        assert_eq!(driver.read(STATUS), 0);
    }

    #[test]
    fn the_status_follows_the_specified_order() {
        let driver = driver();
        for (value, status) in [(2, 0), (8, 0), (4, 0), (0x40, 0), (0x30, 0), (1, 1), (2, 1), (9, 1), (3, 3), (7, 3)] {
            driver.write(STATUS, value);
            assert_eq!(driver.read(STATUS), status, "after {value}");
        }
        driver.write(STATUS, 0x83);
        driver.write(STATUS, 0x8f);
        assert_eq!(driver.read(STATUS), 0x83, "a failed driver starts over");
    }

    #[test]
    fn invalid_sets_of_features_are_rejected() {
        let driver = driver();
        assert_eq!(driver.negotiate(0), 3, "without VERSION_1");
        assert_eq!(driver.negotiate(F_VERSION_1 | 1), 3, "not offered");
        driver.write(STATUS, 7);
        assert_eq!(driver.read(STATUS), 3, "DRIVER_OK without FEATURES_OK");
        assert_eq!(driver.negotiate(F_VERSION_1), 11);
        driver.write(STATUS, 0);
        driver.write(DRIVER_FEATURES_SEL, 2);
        driver.write(DRIVER_FEATURES, 1);
        driver.write(STATUS, 1);
        driver.write(STATUS, 3);
        driver.write(DRIVER_FEATURES_SEL, 1);
        driver.write(DRIVER_FEATURES, 1);
        driver.write(STATUS, 11);
        assert_eq!(driver.read(STATUS), 3, "a feature above 63");
    }

    #[test]
    fn features_and_queues_are_immutable_once_negotiated() {
        let mut driver = driver();
        driver.start();
        let before = driver.transport.save();
        for offset in [QUEUE_NUM, QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW, DRIVER_FEATURES, 0x084, 0x0a4] {
            driver.write(offset, 0x1234_5678);
        }
        assert_eq!(driver.transport.save(), before);
    }

    #[test]
    fn a_disabled_queue_is_not_touched() {
        let mut driver = driver();
        driver.start();
        driver.write(QUEUE_READY, 0);
        assert_eq!(driver.read(QUEUE_READY), 0);
        let head = driver.chain(0, &[(BUFFERS, 8, WRITE)]);
        driver.offer(0, head);
        driver.notify(0);
        driver.transport.pause();
        assert_eq!((driver.used_index(0), driver.read(STATUS)), (0, 15));
    }

    #[test]
    fn doorbells_of_missing_queues_are_ignored() {
        let mut driver = driver();
        driver.start();
        for queue in [1, 0x1_0000, u32::MAX] {
            driver.notify(queue);
        }
        assert_eq!(driver.transact(0, &[(BUFFERS, 8, WRITE)]), 8);
    }

    #[test]
    fn an_interrupt_is_raised_shown_and_acknowledged() {
        let mut driver = driver();
        driver.start();
        driver.transact(0, &[(BUFFERS, 8, WRITE)]);
        crate::virtio::test_driver::wait_for(|| driver.take_interrupts() > 0);
        assert_eq!(driver.read(INTERRUPT_STATUS), 1);
        driver.write(INTERRUPT_ACK, 2);
        assert_eq!(driver.read(INTERRUPT_STATUS), 1);
        driver.write(INTERRUPT_ACK, 1);
        assert_eq!(driver.read(INTERRUPT_STATUS), 0);
    }

    #[test]
    fn invalid_rings_are_repaired_by_a_reset() {
        for (offset, value) in [
            (QUEUE_NUM, 0),
            (QUEUE_NUM, 63),
            (QUEUE_NUM, 128),
            (QUEUE_NUM, 0x1_0040),
            (QUEUE_DESC_LOW, 0x1_0008),
            (QUEUE_DRIVER_LOW, 0x1_4001),
            (QUEUE_DEVICE_LOW, 0x1_8002),
            (QUEUE_DESC_LOW, 0x3f_fff0),
            (QUEUE_DEVICE_LOW + 4, 0xffff_ffff),
            (QUEUE_DRIVER_LOW, 0),
        ] {
            let mut driver = driver();
            driver.negotiate(F_VERSION_1);
            driver.set_up_queue(0, 64);
            driver.write(QUEUE_READY, 0);
            driver.write(offset, value);
            driver.write(QUEUE_READY, 1);
            driver.write(STATUS, 15);
            driver.wait_for_needs_reset();
            assert_eq!(driver.read(STATUS), 0x4f, "{value:#x} at {offset:#x}");
            crate::virtio::test_driver::wait_for(|| driver.take_interrupts() > 0);
            assert_eq!(driver.read(INTERRUPT_STATUS), 2);
            driver.start();
            assert_eq!(driver.transact(0, &[(BUFFERS, 8, WRITE)]), 8);
        }
    }

    #[test]
    fn a_state_of_another_device_or_version_is_rejected() {
        let driver = driver();
        let TransportState::Mmio(good) = driver.transport.save() else { panic!() };
        let change = |change: fn(&mut MmioState)| {
            let mut state = good.clone();
            change(&mut state);
            driver.transport.restore(&TransportState::Mmio(state)).is_err()
        };
        assert!(change(|state| state.version = 2));
        assert!(change(|state| state.device_type = 2));
        assert!(change(|state| state.session.queues[0].size_max = 128));
        assert!(change(|state| state.session.queues.clear()));
        assert!(change(|state| state.session.config.push(0)));
        assert!(change(|state| (state.session.status, state.session.driver_features) = (8, 1)));
        assert!(!change(|_| {}));
    }
}
