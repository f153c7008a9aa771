//! Puts the virtio devices of a new machine on their bus, and gives each its addresses, interrupts and doorbells.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::irq::IrqLine;
use crate::kvm::Vm;
use crate::layout::{self, VirtioBus};
use crate::memory::GuestMemory;
use crate::pci::{Ecam, Function, Functions, Ports, Window};
use crate::vcpu::Buses;
use crate::virtio::mmio::register;
use crate::virtio::pci::{Slot, interrupt_count};
use crate::virtio::{MmioTransport, PciTransport, Transport, Vacant, VirtioDevice};

/// Creates the transports of `devices`, in their order on the bus.
pub fn attach(
    vm: &Vm,
    buses: &mut Buses,
    memory: &GuestMemory,
    bus: VirtioBus,
    devices: Vec<VirtioDevice>,
) -> Result<Vec<Arc<dyn Transport>>> {
    match bus {
        VirtioBus::Mmio { .. } => {
            attach_ports(buses, Functions::default())?;
            attach_vacant(buses, devices.len())?;
            devices
                .into_iter()
                .enumerate()
                .map(|(index, device)| attach_mmio(vm, buses, memory, index, device))
                .collect()
        }
        VirtioBus::Pci => attach_pci(vm, buses, memory, devices),
    }
}

/// Fills the places behind `count` devices.
fn attach_vacant(buses: &mut Buses, count: usize) -> Result<()> {
    let vacant = layout::VIRTIO_MMIO_MAX.saturating_sub(count) as u64;
    if vacant == 0 {
        return Ok(());
    }
    let (base, _) = layout::virtio_mmio_slot(count);
    Ok(buses.memory.insert(base, vacant * layout::VIRTIO_MMIO_STRIDE, Arc::new(Vacant))?)
}

fn attach_mmio(
    vm: &Vm,
    buses: &mut Buses,
    memory: &GuestMemory,
    index: usize,
    device: VirtioDevice,
) -> Result<Arc<dyn Transport>> {
    let (base, gsi) = layout::virtio_mmio_slot(index);
    let irq = IrqLine::new(gsi)?;
    vm.connect_irq(&irq)?;
    let transport = Arc::new(MmioTransport::new(device, memory.clone(), irq)?);
    for (queue, doorbell) in transport.doorbells().iter().enumerate() {
        vm.connect_doorbell(base + register::QUEUE_NOTIFY, queue as u32, doorbell)?;
    }
    buses.memory.insert(base, layout::VIRTIO_MMIO_STRIDE, transport.clone())?;
    Ok(transport)
}

fn attach_pci(
    vm: &Vm,
    buses: &mut Buses,
    memory: &GuestMemory,
    devices: Vec<VirtioDevice>,
) -> Result<Vec<Arc<dyn Transport>>> {
    let routing = Arc::new(vm.routing());
    let mut first_gsi = layout::GSI_COUNT;
    let mut transports = Vec::new();
    for (index, device) in devices.into_iter().enumerate() {
        let bar_address = layout::PCI_WINDOW + index as u64 * layout::PCI_BAR_BYTES;
        let slot = Slot { bar_address: u32::try_from(bar_address)?, first_gsi, routing: routing.clone() };
        first_gsi += interrupt_count(&device);
        transports.push(Arc::new(PciTransport::new(device, memory.clone(), slot).context("add a PCI function")?));
    }
    let functions = Functions::new(transports.iter().map(|transport| transport.clone() as Arc<dyn Function>).collect());
    attach_ports(buses, functions.clone())?;
    buses.memory.insert(layout::PCI_ECAM, layout::PCI_ECAM_BYTES, Arc::new(Ecam(functions.clone())))?;
    let window = Window { functions, base: layout::PCI_WINDOW };
    buses.memory.insert(layout::PCI_WINDOW, layout::PCI_WINDOW_BYTES, Arc::new(window))?;
    Ok(transports.into_iter().map(|transport| transport as Arc<dyn Transport>).collect())
}

fn attach_ports(buses: &mut Buses, functions: Functions) -> Result<()> {
    let ports = Arc::new(Ports::new(functions));
    Ok(buses.ports.insert(layout::PCI_PORTS.into(), layout::PCI_PORTS_LEN, ports)?)
}
