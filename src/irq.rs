//! From a device to the guest's interrupt controller: a line that is raised by writing an eventfd (irqfd).

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// An interrupt line of the machine, edge-triggered. KVM raises it whenever the eventfd is written (KVM_IRQFD), so a
/// device may do so from any thread, with one system call and without knowing of KVM.
#[derive(Debug)]
pub struct IrqLine {
    event: EventFd,
    gsi: u32,
}

impl IrqLine {
    /// A line to I/O APIC pin `gsi`, not yet known to KVM.
    pub fn new(gsi: u32) -> std::io::Result<IrqLine> {
        Ok(IrqLine { event: EventFd::new(EFD_NONBLOCK)?, gsi })
    }

    /// The I/O APIC pin.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// The eventfd, to be given to KVM_IRQFD.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Raises the interrupt. A counter that is full already has an interrupt under way, so a failed write is no loss.
    pub fn raise(&self) {
        let _ = self.event.write(1);
    }

    /// A second handle on the same line.
    pub fn try_clone(&self) -> std::io::Result<IrqLine> {
        Ok(IrqLine { event: self.event.try_clone()?, gsi: self.gsi })
    }
}
