//! Keeps the time stamp counters of a restored machine's vCPUs in step (KVM API, KVM_VCPU_TSC_CTRL).
//!
//! A vCPU's counter is the host's plus an offset. The vCPUs are saved and restored one after another: if each of them got the
//! value that was read, they would differ by the time in between. The first one gets its value, so that time stands still
//! while the machine is saved, and the others an offset that differs from the first one's as it did. Writing the counter
//! itself would not do: KVM ignores a value that is within a second of what a new machine's counter has.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_device_attr, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{_IOC_WRITE, ioctl_expr};

/// IA32_TIME_STAMP_COUNTER (Intel SDM volume 3, §18.17).
pub const MSR_IA32_TSC: u32 = 0x10;
/// Requests to KVM: reading and writing an attribute of a vCPU, here the offset.
const GET_DEVICE_ATTR: u32 = request(0xe2);
const SET_DEVICE_ATTR: u32 = request(0xe1);

const fn request(number: u32) -> u32 {
    ioctl_expr(_IOC_WRITE, KVMIO, number, size_of::<kvm_device_attr>() as u32) as u32
}

/// The offset of a vCPU's counter. `None` before Linux 5.16.
pub fn offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    access(fd, GET_DEVICE_ATTR, &mut offset).ok()?;
    Some(offset)
}

fn access(fd: &VcpuFd, request: u32, offset: &mut u64) -> io::Result<()> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(offset).expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: KVM reads the structure, and reads or writes the eight bytes at its address; both outlive the call.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &raw const attribute) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The offsets of the first vCPU that was restored: when it was saved, and now.
#[derive(Debug, Default)]
pub struct InStep(Cell<Option<(u64, u64)>>);

impl InStep {
    /// Sets the counter of a vCPU that was saved with this `value` and this `offset`. Returns whether it could: otherwise the value
    /// is to be written.
    pub fn set(&self, fd: &VcpuFd, value: u64, saved: Option<u64>) -> Result<bool> {
        let Some((saved, current)) = saved.zip(offset(fd)) else { return Ok(false) };
        let (first_saved, first_now) = match self.0.get() {
            Some(first) => first,
            None => (saved, current.wrapping_add(value.wrapping_sub(read(fd)?))),
        };
        self.0.set(Some((first_saved, first_now)));
        let mut offset = first_now.wrapping_add(saved.wrapping_sub(first_saved));
        access(fd, SET_DEVICE_ATTR, &mut offset).context("KVM_SET_DEVICE_ATTR (time stamp counter)")?;
        Ok(true)
    }
}

fn read(fd: &VcpuFd) -> Result<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index: MSR_IA32_TSC, ..Default::default() }])?;
    fd.get_msrs(&mut msrs).context("KVM_GET_MSRS (time stamp counter)")?;
    Ok(msrs.as_slice().first().context("KVM has no time stamp counter")?.data)
}
