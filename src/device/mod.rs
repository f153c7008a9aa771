//! Platform devices other than virtio: those needed before a kernel has loaded drivers, and to end the machine.

mod power;
mod serial;

pub use power::Power;
pub use serial::{Serial, SerialState};
