//! The interrupt routing table: lines to pins of the I/O APIC, and messages; and eventfds that guests connect at run time.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::irq::{EventRouting, MsiMessage};
use crate::layout;

/// Connects eventfds with a virtual machine while it runs.
pub struct Routing {
    fd: Arc<VmFd>,
    /// By interrupt number, which is [`layout::GSI_COUNT`] or higher.
    messages: Mutex<BTreeMap<u32, MsiMessage>>,
    /// By address.
    doorbells: Mutex<BTreeMap<u64, EventFd>>,
}

impl Routing {
    /// Creates the routing of a machine in which no message has been set.
    pub fn new(fd: Arc<VmFd>) -> Routing {
        Routing { fd, messages: Mutex::default(), doorbells: Mutex::default() }
    }
}

impl EventRouting for Routing {
    /// KVM replaces the table as a whole, so concurrent calls wait for each other.
    fn set_message(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let before = messages.insert(gsi, message);
        let table = table(&messages).map_err(io::Error::other)?;
        self.fd.set_gsi_routing(&table).map_err(|error| {
            // KVM rejects the whole table.
            match before {
                Some(before) => messages.insert(gsi, before),
                None => messages.remove(&gsi),
            };
            error.into()
        })
    }

    fn connect_message(&self, gsi: u32, event: &EventFd) -> io::Result<()> {
        Ok(self.fd.register_irqfd(event, gsi)?)
    }

    fn disconnect_message(&self, gsi: u32, event: &EventFd) -> io::Result<()> {
        Ok(self.fd.unregister_irqfd(event, gsi)?)
    }

    fn connect_doorbell(&self, address: u64, doorbell: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap_or_else(PoisonError::into_inner);
        let at = IoEventAddress::Mmio(address);
        // KVM would refuse a second one.
        if let Some(old) = doorbells.remove(&address) {
            self.fd.unregister_ioevent(&old, &at, NoDatamatch)?;
        }
        // Without a value to compare, KVM need not decode the instruction on processors that report the address.
        self.fd.register_ioevent(doorbell, &at, NoDatamatch)?;
        doorbells.insert(address, doorbell.try_clone()?);
        Ok(())
    }

    fn disconnect_doorbell(&self, address: u64, doorbell: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap_or_else(PoisonError::into_inner);
        self.fd.unregister_ioevent(doorbell, &IoEventAddress::Mmio(address), NoDatamatch)?;
        doorbells.remove(&address);
        Ok(())
    }
}

/// The table of a machine without messages.
pub fn lines() -> Result<KvmIrqRouting> {
    table(&BTreeMap::new())
}

/// The complete table: line `n` to pin `n` of the I/O APIC, and `messages`.
fn table(messages: &BTreeMap<u32, MsiMessage>) -> Result<KvmIrqRouting> {
    let to_ioapic = |gsi| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin: gsi },
        },
        ..Default::default()
    };
    let to_message = |(gsi, message): (&u32, &MsiMessage)| kvm_irq_routing_entry {
        gsi: *gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    };
    let entries: Vec<_> = (0..layout::GSI_COUNT).map(to_ioapic).chain(messages.iter().map(to_message)).collect();
    KvmIrqRouting::from_entries(&entries).context("create the interrupt routing table")
}
