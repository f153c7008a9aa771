//! The doorbells of a device on PCI, which move with its BAR.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::NOTIFY_MULTIPLIER;
use crate::irq::EventRouting;

/// The doorbells, and where KVM has them.
pub struct Doorbells {
    events: Arc<Vec<EventFd>>,
    routing: Arc<dyn EventRouting>,
    /// The address of the first one.
    address: Option<u64>,
}

impl Doorbells {
    /// Creates doorbells that are nowhere.
    pub fn new(events: Arc<Vec<EventFd>>, routing: Arc<dyn EventRouting>) -> Doorbells {
        Doorbells { events, routing, address: None }
    }

    /// Moves the doorbells to `address`. If the function does not respond they leave another address, but are not
    /// connected: a guest moves functions while they do not respond, perhaps to each other's addresses.
    ///
    /// If another function moves to their address meanwhile, KVM signals its doorbells instead. These can still be rung:
    /// KVM passes on what it does not handle.
    pub fn place(&mut self, address: Option<u64>, responds: bool) -> io::Result<()> {
        if self.address == address {
            return Ok(());
        }
        if let Some(old) = self.address.take() {
            // Fails for those that could not be connected.
            let _ = self.each(old, |routing, at, event| routing.disconnect_doorbell(at, event));
        }
        if let Some(new) = address.filter(|_| responds) {
            // Kept even if connecting one fails, so that the others are disconnected later.
            self.address = address;
            self.each(new, |routing, at, event| routing.connect_doorbell(at, event))?;
        }
        Ok(())
    }

    /// Calls `change` with the address of each doorbell. Returns the first error, after trying all.
    fn each(
        &self,
        address: u64,
        change: impl Fn(&dyn EventRouting, u64, &EventFd) -> io::Result<()>,
    ) -> io::Result<()> {
        let at = |index: usize| address + index as u64 * u64::from(NOTIFY_MULTIPLIER);
        let results = self.events.iter().enumerate().map(|(index, event)| change(&*self.routing, at(index), event));
        results.fold(Ok(()), io::Result::and)
    }
}
