//! The machine: vCPUs, devices and memory, built paused, and the orders in which they start and stop.

pub mod layout;
pub mod outcome;
pub mod timings;

use crate::bus::Bus;

/// The guest's two address spaces, as its vCPUs see them. Frozen when the machine is built.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub memory: Bus,
}
