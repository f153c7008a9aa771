//! The interrupts of a device on PCI, raised by vCPU and worker threads without locks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::Interrupt;

/// ISR status (virtio 1.2 §4.1.4.5): a queue has used buffers.
const QUEUE: u8 = 1 << 0;
/// ISR status: the configuration or the device status changed.
const CONFIGURATION: u8 = 1 << 1;

/// The eventfds of a device's interrupts, which [`Msix`](crate::pci::Msix) connects with KVM: one per queue, and the
/// last one for changes of the configuration.
pub struct PciInterrupt {
    events: Arc<Vec<EventFd>>,
    /// For drivers that poll instead of using MSI-X.
    isr: AtomicU8,
}

impl PciInterrupt {
    /// Creates the interrupts that write to `events`, at least one.
    pub fn new(events: Arc<Vec<EventFd>>) -> PciInterrupt {
        PciInterrupt { events, isr: AtomicU8::new(0) }
    }

    /// ISR status.
    pub fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    /// Reads and clears ISR status.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// Sets ISR status.
    pub fn set_isr(&self, isr: u8) {
        self.isr.store(isr, Ordering::SeqCst);
    }

    /// Raises every interrupt, without a cause.
    pub fn raise_all(&self) {
        self.events.iter().for_each(|event| self.raise(0, Some(event)));
    }

    fn raise(&self, cause: u8, event: Option<&EventFd>) {
        self.isr.fetch_or(cause, Ordering::SeqCst);
        // If the counter is full an interrupt is already pending, so a failed write loses nothing.
        let _ = event.map(|event| event.write(1));
    }
}

impl Interrupt for PciInterrupt {
    fn queue_used(&self, index: usize) {
        self.raise(QUEUE, self.events.get(index));
    }

    fn config_changed(&self) {
        self.raise(CONFIGURATION, self.events.last());
    }

    fn used_event(&self, index: usize) -> &EventFd {
        &self.events[index]
    }

    /// Each queue has an interrupt of its own, which any agent may raise.
    fn share(&self, _shared: bool) {}
}
