//! Interrupt lines and messages, raised by writing an eventfd (irqfd), and doorbells (ioeventfd).

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

/// A message-signaled interrupt: a write of `data` to `address`, which the local APICs interpret (Intel SDM volume 3,
/// §11.11).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// The address.
    pub address: u64,
    /// The data.
    pub data: u32,
}

/// Connects eventfds with a virtual machine while it runs, for devices whose interrupts and doorbells the guest assigns.
/// Called on vCPU threads and on the main thread.
pub trait EventRouting: Send + Sync {
    /// Sets the message that interrupt `gsi` sends.
    fn set_message(&self, gsi: u32, message: MsiMessage) -> std::io::Result<()>;
    /// Makes writes to `event`, and one before if it has not been read, send the message of `gsi`.
    fn connect_message(&self, gsi: u32, event: &EventFd) -> std::io::Result<()>;
    /// Ends that. Later writes stay in the eventfd's counter.
    fn disconnect_message(&self, gsi: u32, event: &EventFd) -> std::io::Result<()>;
    /// Makes writes of the guest to `address`, of any value and width, signal `doorbell` without leaving the kernel, in
    /// place of another doorbell that is there.
    fn connect_doorbell(&self, address: u64, doorbell: &EventFd) -> std::io::Result<()>;
    /// Ends that. Fails if `doorbell` is not there.
    fn disconnect_doorbell(&self, address: u64, doorbell: &EventFd) -> std::io::Result<()>;
}
