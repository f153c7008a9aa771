//! The state that KVM keeps for a whole virtual machine: the I/O APIC and the clock.

use anyhow::{Context, Result};
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};

use super::Vm;

/// The state of a virtual machine besides its vCPUs, memory and devices. The PIC is not connected, and there is no PIT.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    ioapic: kvm_irqchip,
    /// Nanoseconds of kvm-clock.
    clock: u64,
}

impl Vm {
    /// Saves the state. No vCPU may run.
    pub fn save(&self) -> Result<VmState> {
        let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        self.fd.get_irqchip(&mut ioapic).context("KVM_GET_IRQCHIP")?;
        Ok(VmState { ioapic, clock: self.fd.get_clock().context("KVM_GET_CLOCK")?.clock })
    }

    /// Sets the state. The vCPUs exist, and none runs.
    pub fn restore(&self, state: &VmState) -> Result<()> {
        let ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..state.ioapic };
        self.fd.set_irqchip(&ioapic).context("KVM_SET_IRQCHIP")?;
        self.fd.set_clock(&kvm_clock_data { clock: state.clock, ..Default::default() }).context("KVM_SET_CLOCK")
    }
}
