//! Creates virtual machines: the KVM calls, in the order that makes them fast.

mod routing;
mod state;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    CpuId, KVM_CAP_DISABLE_QUIRKS, KVM_MAX_CPUID_ENTRIES, KVM_X86_QUIRK_LINT0_REENABLED, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::irq::IrqLine;
use crate::layout;
use crate::memory::GuestMemory;
pub use routing::Routing;
pub use state::VmState;

/// The KVM capabilities that husk requires, with their names for messages.
pub const REQUIRED_CAPABILITIES: [(Cap, &str); 7] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "in-kernel interrupt controller"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::MpState, "multiprocessor state"),
];

/// A virtual machine with memory and an interrupt controller, but no vCPUs yet.
///
/// The memory stays mapped as long as the machine exists: KVM accesses it by address.
pub struct Vm {
    fd: Arc<VmFd>,
    kvm: Arc<Kvm>,
    memory: GuestMemory,
}

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Vm {
    /// Creates a virtual machine with `memory`.
    ///
    /// The memory slots are set before the interrupt controller is created: afterwards each of them would wait for an
    /// SRCU grace period started by the controller's bus registrations, which costs ten times as much as everything
    /// else.
    pub fn new(kvm: Arc<Kvm>, memory: &GuestMemory) -> Result<Vm> {
        for (capability, name) in REQUIRED_CAPABILITIES {
            ensure!(kvm.check_extension(capability), "KVM on this host lacks {name} (see `husk doctor`)");
        }
        let fd = create_vm(&kvm)?;
        for (slot, region) in memory.iter().enumerate() {
            let guest_address = region.start_addr().raw_value();
            let host_address = region.get_host_address(vm_memory::MemoryRegionAddress(0))? as u64;
            set_memory_slot(&fd, slot as u32, guest_address, region.len(), host_address)
                .with_context(|| format!("give KVM {} MiB of guest memory", region.len() >> 20))?;
        }
        fd.set_tss_address(layout::TSS_ADDRESS as usize).context("KVM_SET_TSS_ADDR")?;
        fd.set_identity_map_address(layout::IDENTITY_MAP_ADDRESS).context("KVM_SET_IDENTITY_MAP_ADDR")?;
        fd.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        retire_pic(&fd)?;
        Ok(Vm { fd: Arc::new(fd), kvm, memory: memory.clone() })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Makes writes to `line` raise its interrupt in the guest.
    pub fn connect_irq(&self, line: &IrqLine) -> Result<()> {
        self.fd.register_irqfd(line.event(), line.gsi()).with_context(|| format!("KVM_IRQFD for line {}", line.gsi()))
    }

    /// Raises the interrupt of line `gsi` once, before it returns. The interrupt controller and the vCPUs' state exist.
    pub fn pulse(&self, gsi: u32) -> Result<()> {
        [true, false].into_iter().try_for_each(|level| self.fd.set_irq_line(gsi, level)).context("KVM_IRQ_LINE")
    }

    /// Makes a guest's 32-bit write of `value` to `address` signal `doorbell` without leaving the kernel.
    pub fn connect_doorbell(&self, address: u64, value: u32, doorbell: &EventFd) -> Result<()> {
        self.fd
            .register_ioevent(doorbell, &IoEventAddress::Mmio(address), value)
            .with_context(|| format!("KVM_IOEVENTFD at {address:#x}"))
    }

    /// Connects eventfds while the machine runs. Called once: each table of messages replaces the others.
    pub fn routing(&self) -> Routing {
        Routing::new(self.fd.clone())
    }

    /// Adds vCPU `index`, which is also its local APIC ID.
    pub fn create_vcpu(&self, index: u32) -> Result<VcpuFd> {
        self.fd.create_vcpu(u64::from(index)).with_context(|| format!("KVM_CREATE_VCPU {index}"))
    }

    /// The MSRs that KVM lists as part of a vCPU's state.
    pub fn listed_msrs(&self) -> Result<Arc<[u32]>> {
        Ok(self.kvm.get_msr_index_list().context("KVM_GET_MSR_INDEX_LIST")?.as_slice().into())
    }

    /// Whether KVM supports the local APIC timer's TSC deadline mode.
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }
}

/// The CPUID leaves that KVM supports on this host. Takes 0.3 ms; call it in parallel with other work.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")
}

/// KVM_CREATE_VM returns EINTR when a signal is pending, which is not a failure.
fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.context("KVM_CREATE_VM"),
        }
    }
}

/// Disables the in-kernel PIC, which does not exist according to the ACPI tables.
///
/// KVM creates it anyway, unmasked and with vectors starting at 0, connects lines 0 to 15 to it, and lets the first
/// vCPU's LINT0 accept its interrupts: a line raised before the guest's kernel has set up its APIC would arrive as an
/// exception. This must precede any irqfd, each of which would have to be rerouted, and any vCPU, which takes LINT0's
/// reset value (masked, Intel SDM volume 3, §11.4.7.1) when it is created.
fn retire_pic(fd: &VmFd) -> Result<()> {
    fd.set_gsi_routing(&routing::lines()?).context("KVM_SET_GSI_ROUTING")?;
    let quirk = u64::from(KVM_X86_QUIRK_LINT0_REENABLED);
    let cap = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS, args: [quirk, 0, 0, 0], ..Default::default() };
    fd.enable_cap(&cap).context("KVM_CAP_DISABLE_QUIRKS (LINT0)")
}

#[allow(unsafe_code)]
fn set_memory_slot(fd: &VmFd, slot: u32, guest_address: u64, len_bytes: u64, host_address: u64) -> Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: guest_address,
        memory_size: len_bytes,
        userspace_addr: host_address,
    };
    // SAFETY: `host_address` is the start of a mapping of `len_bytes` that `Vm` keeps until the VM is destroyed; the
    // regions of one `GuestMemory` do not overlap, so no other slot has these addresses.
    unsafe { fd.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")
}
