//! Keeps the time stamp counters of a restored machine's vCPUs in step (KVM API, KVM_VCPU_TSC_CTRL).
//!
//! A vCPU's counter is the host's plus an offset. The vCPUs are saved and restored one after another: if each of them got the
//! value that was read, they would differ by the time in between. The first one gets its value, so that time stands still
//! while the machine is saved, and the others an offset that differs from the first one's as it did.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{_IOC_WRITE, ioctl_expr};

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
    /// Sets the counter of a vCPU whose offset was `saved`, if there is one to be in step with. Otherwise its own value is to be
    /// set, followed by [`InStep::lead`].
    pub fn follow(&self, fd: &VcpuFd, saved: Option<u64>) -> Result<bool> {
        let Some(((first_saved, first_now), saved)) = self.0.get().zip(saved) else { return Ok(false) };
        let mut offset = first_now.wrapping_add(saved.wrapping_sub(first_saved));
        access(fd, SET_DEVICE_ATTR, &mut offset).context("KVM_SET_DEVICE_ATTR (time stamp counter)")?;
        Ok(true)
    }

    /// Makes others follow a vCPU whose offset was `saved`, and whose counter has its value.
    pub fn lead(&self, fd: &VcpuFd, saved: Option<u64>) {
        self.0.set(saved.zip(offset(fd)));
    }
}
