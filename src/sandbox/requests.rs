//! Numbers of requests that ioctl(2) takes, for the filters of system calls: the kernel compares them with its second argument.

/// Requests to KVM (linux/kvm.h).
pub mod kvm {
    use std::mem::size_of;

    use kvm_bindings::{
        kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_device_attr, kvm_ioeventfd, kvm_irq_routing, kvm_irqchip,
        kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msr_list, kvm_msrs, kvm_nested_state, kvm_regs, kvm_sregs,
        kvm_vcpu_events, kvm_xcrs, kvm_xsave,
    };
    use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

    const fn number(direction: u32, number: u32, size_bytes: usize) -> u32 {
        ioctl_expr(direction, 0xae, number, size_bytes as u32) as u32
    }

    pub const GET_MSR_INDEX_LIST: u32 = number(_IOC_READ | _IOC_WRITE, 0x02, size_of::<kvm_msr_list>());
    pub const GET_SUPPORTED_CPUID: u32 = number(_IOC_READ | _IOC_WRITE, 0x05, size_of::<kvm_cpuid2>());
    pub const GET_IRQCHIP: u32 = number(_IOC_READ | _IOC_WRITE, 0x62, size_of::<kvm_irqchip>());
    pub const SET_GSI_ROUTING: u32 = number(_IOC_WRITE, 0x6a, size_of::<kvm_irq_routing>());
    pub const IRQFD: u32 = number(_IOC_WRITE, 0x76, size_of::<kvm_irqfd>());
    pub const IOEVENTFD: u32 = number(_IOC_WRITE, 0x79, size_of::<kvm_ioeventfd>());
    pub const GET_CLOCK: u32 = number(_IOC_READ, 0x7c, size_of::<kvm_clock_data>());
    pub const RUN: u32 = number(_IOC_NONE, 0x80, 0);
    pub const GET_REGS: u32 = number(_IOC_READ, 0x81, size_of::<kvm_regs>());
    pub const GET_SREGS: u32 = number(_IOC_READ, 0x83, size_of::<kvm_sregs>());
    pub const GET_MSRS: u32 = number(_IOC_READ | _IOC_WRITE, 0x88, size_of::<kvm_msrs>());
    pub const GET_LAPIC: u32 = number(_IOC_READ, 0x8e, size_of::<kvm_lapic_state>());
    pub const GET_CPUID2: u32 = number(_IOC_READ | _IOC_WRITE, 0x91, size_of::<kvm_cpuid2>());
    pub const GET_MP_STATE: u32 = number(_IOC_READ, 0x98, size_of::<kvm_mp_state>());
    pub const GET_VCPU_EVENTS: u32 = number(_IOC_READ, 0x9f, size_of::<kvm_vcpu_events>());
    pub const GET_DEBUGREGS: u32 = number(_IOC_READ, 0xa1, size_of::<kvm_debugregs>());
    pub const GET_TSC_KHZ: u32 = number(_IOC_NONE, 0xa3, 0);
    pub const GET_XSAVE: u32 = number(_IOC_READ, 0xa4, size_of::<kvm_xsave>());
    pub const GET_XCRS: u32 = number(_IOC_READ, 0xa6, size_of::<kvm_xcrs>());
    pub const GET_NESTED_STATE: u32 = number(_IOC_READ | _IOC_WRITE, 0xbe, size_of::<kvm_nested_state>());
    pub const GET_DEVICE_ATTR: u32 = number(_IOC_WRITE, 0xe2, size_of::<kvm_device_attr>());
    pub const KVMCLOCK_CTRL: u32 = number(_IOC_NONE, 0xad, 0);
}

/// Requests to vhost-net (linux/vhost.h).
pub mod vhost {
    use std::mem::size_of;

    use ::vhost::vhost_kern::vhost_binding::{vhost_memory, vhost_vring_addr, vhost_vring_file, vhost_vring_state};
    use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

    const fn number(direction: u32, number: u32, size_bytes: usize) -> u32 {
        ioctl_expr(direction, 0xaf, number, size_bytes as u32) as u32
    }

    pub const GET_FEATURES: u32 = number(_IOC_READ, 0x00, size_of::<u64>());
    pub const SET_FEATURES: u32 = number(_IOC_WRITE, 0x00, size_of::<u64>());
    pub const SET_OWNER: u32 = number(_IOC_NONE, 0x01, 0);
    pub const SET_MEM_TABLE: u32 = number(_IOC_WRITE, 0x03, size_of::<vhost_memory>());
    pub const SET_VRING_NUM: u32 = number(_IOC_WRITE, 0x10, size_of::<vhost_vring_state>());
    pub const SET_VRING_ADDR: u32 = number(_IOC_WRITE, 0x11, size_of::<vhost_vring_addr>());
    pub const SET_VRING_BASE: u32 = number(_IOC_WRITE, 0x12, size_of::<vhost_vring_state>());
    pub const GET_VRING_BASE: u32 = number(_IOC_READ | _IOC_WRITE, 0x12, size_of::<vhost_vring_state>());
    pub const SET_VRING_KICK: u32 = number(_IOC_WRITE, 0x20, size_of::<vhost_vring_file>());
    pub const SET_VRING_CALL: u32 = number(_IOC_WRITE, 0x21, size_of::<vhost_vring_file>());
    pub const SET_VRING_ERR: u32 = number(_IOC_WRITE, 0x22, size_of::<vhost_vring_file>());
    pub const NET_SET_BACKEND: u32 = number(_IOC_WRITE, 0x30, size_of::<vhost_vring_file>());
}
