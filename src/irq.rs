//! Interrupt lines: raised by writing an eventfd (irqfd).

use crate::sys::event;
use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line. KVM raises it whenever the eventfd is written (KVM_IRQFD), so a device can do so
/// from any thread, with one system call and without depending on KVM.
#[derive(Debug)]
pub struct IrqLine {
    event: EventFd,
    gsi: u32,
}

impl IrqLine {
    /// Creates a line for I/O APIC pin `gsi`, not yet registered with KVM.
    pub fn new(gsi: u32) -> std::io::Result<IrqLine> {
        Ok(IrqLine { event: event::create()?, gsi })
    }

    /// The I/O APIC pin.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// The eventfd to register with KVM_IRQFD.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Raises the interrupt. If the counter is full an interrupt is already pending, so a failed write loses nothing.
    pub fn raise(&self) {
        let _ = self.event.write(1);
    }

    /// A second handle to the same line.
    pub fn try_clone(&self) -> std::io::Result<IrqLine> {
        Ok(IrqLine { event: self.event.try_clone()?, gsi: self.gsi })
    }
}
