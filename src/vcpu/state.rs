//! A vCPU's state: saved while it is paused between two instructions, and set before it runs.

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// IA32_TSC_DEADLINE (Intel SDM volume 3, §11.5.4.1). It can be set only when the local APIC's timer is in that mode.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// The number of MSRs that KVM reads and writes at once (KVM API, KVM_GET_MSRS).
const MSRS_PER_CALL: usize = 256;

/// Everything that KVM keeps for a vCPU (KVM API, 4.12 and following).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// The answers to CPUID.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Whether it runs, is halted, or waits for a startup IPI.
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    /// `None` if the host's processor has no XSAVE.
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Those that KVM lists and reads.
    msrs: Vec<kvm_msr_entry>,
    /// Exceptions and interrupts under way.
    events: kvm_vcpu_events,
    /// The frequency of the time stamp counter.
    tsc_khz: u32,
}

impl VcpuState {
    /// Saves the state of a vCPU that has completed its last exit; `msrs` are those that KVM lists. Called on its thread.
    ///
    /// The order is KVM's: reading the MP state delivers pending events of the APIC.
    pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<VcpuState> {
        Ok(VcpuState {
            mp_state: fd.get_mp_state().context("KVM_GET_MP_STATE")?,
            cpuid: fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_CPUID2")?.as_slice().to_vec(),
            regs: fd.get_regs().context("KVM_GET_REGS")?,
            sregs: fd.get_sregs().context("KVM_GET_SREGS")?,
            xsave: fd.get_xsave().context("KVM_GET_XSAVE")?,
            xcrs: fd.get_xcrs().ok(),
            debug_regs: fd.get_debug_regs().context("KVM_GET_DEBUGREGS")?,
            lapic: fd.get_lapic().context("KVM_GET_LAPIC")?,
            msrs: save_msrs(fd, msrs)?,
            events: fd.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?,
            tsc_khz: fd.get_tsc_khz().context("KVM_GET_TSC_KHZ")?,
        })
    }

    /// Sets the state of a new vCPU. Fails if this host's KVM does not accept it.
    ///
    /// The order follows dependencies: CPUID determines which registers exist; the special registers enable the local APIC
    /// and choose its mode; its timer mode precedes the deadline; pending events come last, since the others clear them.
    pub fn restore(&self, fd: &VcpuFd) -> Result<()> {
        fd.set_cpuid2(&CpuId::from_entries(&self.cpuid)?).context("KVM_SET_CPUID2")?;
        if fd.get_tsc_khz().is_ok_and(|khz| khz != self.tsc_khz) {
            let context = || format!("KVM_SET_TSC_KHZ: the time stamp counter ran at {} kHz", self.tsc_khz);
            fd.set_tsc_khz(self.tsc_khz).with_context(context)?;
        }
        fd.set_mp_state(self.mp_state).context("KVM_SET_MP_STATE")?;
        fd.set_regs(&self.regs).context("KVM_SET_REGS")?;
        fd.set_sregs(&self.sregs).context("KVM_SET_SREGS")?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs).context("KVM_SET_XCRS")?;
        }
        set_xsave(fd, &self.xsave)?;
        fd.set_debug_regs(&self.debug_regs).context("KVM_SET_DEBUGREGS")?;
        fd.set_lapic(&self.lapic).context("KVM_SET_LAPIC")?;
        restore_msrs(fd, &self.msrs)?;
        fd.set_vcpu_events(&self.events).context("KVM_SET_VCPU_EVENTS")
    }
}

/// KVM reads as many as it can, and stops at the first that it cannot read: that one is left out.
fn save_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let (mut saved, mut left) = (Vec::<kvm_msr_entry>::with_capacity(indices.len()), indices);
    while !left.is_empty() {
        let (now, _) = left.split_at(left.len().min(MSRS_PER_CALL));
        let entries: Vec<_> = now.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries)?;
        let read = fd.get_msrs(&mut msrs).context("KVM_GET_MSRS")?;
        saved.extend(msrs.as_slice().iter().take(read).copied());
        let refused = usize::from(read < now.len());
        left = left.get(read + refused..).unwrap_or_default();
    }
    // The deadline is set last: other MSRs are the clock that it is compared with.
    saved.sort_by_key(|msr| msr.index == MSR_IA32_TSC_DEADLINE);
    Ok(saved)
}

fn restore_msrs(fd: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<()> {
    let mut left = msrs;
    while !left.is_empty() {
        let (now, _) = left.split_at(left.len().min(MSRS_PER_CALL));
        let set = fd.set_msrs(&Msrs::from_entries(now)?).context("KVM_SET_MSRS")?;
        let refused = now.get(set);
        if let Some(msr) = refused {
            // Some can be read and not written. Those that read as zero have that value in a new vCPU.
            ensure!(msr.data == 0, "KVM_SET_MSRS: KVM refused {:#x} for MSR {:#x}", msr.data, msr.index);
        }
        left = left.get(set + usize::from(refused.is_some())..).unwrap_or_default();
    }
    Ok(())
}

#[allow(unsafe_code)]
fn set_xsave(fd: &VcpuFd, xsave: &kvm_xsave) -> Result<()> {
    // SAFETY: KVM reads 4096 bytes, the size of the structure, unless the process was permitted to use larger states
    // (arch_prctl(2), ARCH_REQ_XCOMP_GUEST_PERM), which husk never requests.
    unsafe { fd.set_xsave(xsave) }.context("KVM_SET_XSAVE")
}
