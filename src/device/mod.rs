//! Devices that are not virtio: what a kernel needs before it has drivers, and to end.

mod pci;
mod power;
mod serial;

pub use pci::PciPorts;
pub use power::Power;
pub use serial::Serial;
