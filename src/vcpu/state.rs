//! A vCPU's state: saved while it is paused between two instructions, and set before it runs.

use std::fmt;

use anyhow::{Context, Result, ensure};
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::cpuid;
use super::tsc::{self, InStep, MSR_IA32_TSC};

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
    /// Its offset from the host's, if KVM tells.
    tsc_offset: Option<u64>,
    /// What KVM keeps for a guest that runs virtual machines of its own. `None` if this one cannot.
    nested: Option<NestedState>,
}

#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct NestedState(Box<KvmNestedStateBuffer>);

impl fmt::Debug for NestedState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.size)
    }
}

impl VcpuState {
    /// Saves the state of a vCPU that has completed its last exit; `msrs` are those that KVM lists. Called on its thread.
    ///
    /// The order is KVM's: reading the MP state delivers pending events of the APIC.
    pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<VcpuState> {
        let mp_state = fd.get_mp_state().context("KVM_GET_MP_STATE")?;
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_CPUID2")?;
        Ok(VcpuState {
            mp_state,
            cpuid: cpuid.as_slice().to_vec(),
            regs: fd.get_regs().context("KVM_GET_REGS")?,
            sregs: fd.get_sregs().context("KVM_GET_SREGS")?,
            xsave: fd.get_xsave().context("KVM_GET_XSAVE")?,
            xcrs: fd.get_xcrs().ok(),
            debug_regs: fd.get_debug_regs().context("KVM_GET_DEBUGREGS")?,
            lapic: fd.get_lapic().context("KVM_GET_LAPIC")?,
            msrs: save_msrs(fd, msrs)?,
            events: fd.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?,
            tsc_khz: fd.get_tsc_khz().context("KVM_GET_TSC_KHZ")?,
            tsc_offset: tsc::offset(fd),
            nested: cpuid::can_nest(&cpuid).then(|| save_nested(fd)).transpose()?,
        })
    }

    /// Fails if the guest needs another processor than this host has, with a line that says in what. `offered` are the answers to
    /// CPUID of a new guest; KVM may add some of its own, so it is asked for the result.
    pub fn ensure_suits(&self, fd: &VcpuFd, offered: &CpuId) -> Result<()> {
        fd.set_cpuid2(offered).context("KVM_SET_CPUID2")?;
        let offered = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_CPUID2")?;
        cpuid::ensure_compatible(&self.cpuid, &offered)
    }

    /// Sets the state of a new vCPU. Fails if this host's KVM does not accept it. `in_step` is shared by the machine's vCPUs.
    ///
    /// The order follows dependencies: CPUID determines which registers exist; the special registers
    /// enable the local APIC and choose its mode; its timer mode and the time stamp counter precede the deadline; a guest that
    /// runs virtual machines needs its special registers and MSRs before their state, with which some of them are fixed; pending
    /// events come last, since setting registers clears them.
    pub fn restore(&self, fd: &VcpuFd, in_step: &InStep) -> Result<()> {
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
        let (counter, others): (Vec<_>, Vec<_>) = self.msrs.iter().copied().partition(|msr| msr.index == MSR_IA32_TSC);
        let value = counter.first().map_or(0, |msr| msr.data);
        if !in_step.set(fd, value, self.tsc_offset)? {
            restore_msrs(fd, &counter)?;
        }
        restore_msrs(fd, &others)?;
        if let Some(NestedState(state)) = &self.nested {
            ensure!(state.size as usize <= size_of_val(&**state), "the state of its virtual machines is too large");
            fd.set_nested_state(state).context("KVM_SET_NESTED_STATE")?;
        }
        fd.set_vcpu_events(&self.events).context("KVM_SET_VCPU_EVENTS")
    }
}

fn save_nested(fd: &VcpuFd) -> Result<NestedState> {
    let mut state = Box::new(KvmNestedStateBuffer::empty());
    fd.nested_state(&mut state).context("KVM_GET_NESTED_STATE")?;
    Ok(NestedState(state))
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
