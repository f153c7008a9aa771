//! Initializes a vCPU for the kernel's entry point: first CPUID, then special registers, MSRs and general registers.

use anyhow::{Context, Result, ensure};
use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::cpuid::{self, Vendor};
use crate::boot::{EntryPoint, Protocol};
use crate::layout;
use crate::memory::GuestMemory;

/// Control register bits (Intel SDM volume 3, §2.5).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// Extended feature enable register (Intel SDM volume 3, §2.2.1).
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Page table entries: present, writable; in a page directory also: a 2 MiB page (Intel SDM volume 3, §4.5).
const PAGE_TABLE: u64 = 0b11;
const LARGE_PAGE: u64 = PAGE_TABLE | 1 << 7;

/// MSRs (Intel SDM volume 4, table 2-2).
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Selectors of the boot protocol (boot.rst: `__BOOT_CS` 0x10, `__BOOT_DS` 0x18) and of the task register.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Writes the tables that the first vCPU's registers refer to: a descriptor table and, for a kernel entered in long
/// mode, page tables that identity-map the first 4 GiB. Called once, after the kernel is loaded.
pub fn write_boot_tables(memory: &GuestMemory, protocol: Protocol) -> Result<()> {
    let unused = Descriptor::default();
    let table = [unused, unused, code(protocol), DATA, TASK].map(|d| descriptor_bytes(d).to_le_bytes()).concat();
    memory.write_slice(&table, GuestAddress(layout::GDT_ADDRESS)).context("write the GDT")?;
    if protocol == Protocol::Linux64 {
        write_page_tables(memory).context("write the page tables")?;
    }
    Ok(())
}

/// Prepares `vcpu` to run: the first one starts at `entry`; the others have no entry and wait for a startup IPI.
pub fn prepare(vcpu: &VcpuFd, cpuid: &CpuId, entry: Option<EntryPoint>) -> Result<()> {
    vcpu.set_cpuid2(cpuid).context("KVM_SET_CPUID2")?;
    set_msrs(vcpu, cpuid::vendor(cpuid))?;
    if let Some(entry) = entry {
        let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
        enter_protected_mode(&mut sregs, entry.protocol);
        vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
        vcpu.set_regs(&registers(entry)).context("KVM_SET_REGS")?;
    }
    Ok(())
}

fn registers(entry: EntryPoint) -> kvm_regs {
    let regs = kvm_regs { rip: entry.instruction, rsp: layout::BOOT_STACK_TOP, rflags: 1 << 1, ..Default::default() };
    match entry.protocol {
        Protocol::Linux64 => kvm_regs { rsi: entry.info, ..regs },
        Protocol::Pvh => kvm_regs { rbx: entry.info, ..regs },
    }
}

fn enter_protected_mode(sregs: &mut kvm_sregs, protocol: Protocol) {
    let data = segment(DATA, DATA_SELECTOR);
    sregs.cs = segment(code(protocol), CODE_SELECTOR);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK, TASK_SELECTOR);
    sregs.gdt.base = layout::GDT_ADDRESS;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    if protocol == Protocol::Linux64 {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLE_ADDRESS;
        sregs.cr4 |= CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
}

/// A segment descriptor with its access byte and flags; base 0, limit 4 GiB except for the task segment (Intel SDM
/// volume 3, §3.4.5).
#[derive(Debug, Clone, Copy, Default)]
struct Descriptor {
    access: u8,
    flags: u8,
    limit: u32,
}

/// A data segment: readable, writable, accessed.
const DATA: Descriptor = Descriptor { access: 0x93, flags: 0xc, limit: 0xf_ffff };
/// A busy task state segment of minimum size.
const TASK: Descriptor = Descriptor { access: 0x8b, flags: 0x0, limit: 0x67 };

/// A code segment: readable, executable, accessed; 64-bit, or 32-bit for PVH.
fn code(protocol: Protocol) -> Descriptor {
    let flags = match protocol {
        Protocol::Linux64 => 0xa,
        Protocol::Pvh => 0xc,
    };
    Descriptor { access: 0x9b, flags, limit: 0xf_ffff }
}

fn segment(descriptor: Descriptor, selector: u16) -> kvm_segment {
    let Descriptor { access, flags, limit } = descriptor;
    let granular = flags >> 3 & 1;
    kvm_segment {
        base: 0,
        // KVM expects the limit in bytes.
        limit: if granular == 1 { limit << 12 | 0xfff } else { limit },
        selector,
        type_: access & 0xf,
        s: access >> 4 & 1,
        dpl: access >> 5 & 3,
        present: access >> 7,
        avl: flags & 1,
        l: flags >> 1 & 1,
        db: flags >> 2 & 1,
        g: granular,
        ..Default::default()
    }
}

fn write_page_tables(memory: &GuestMemory) -> Result<()> {
    const PAGE: u64 = 0x1000;
    let pml4 = layout::PAGE_TABLE_ADDRESS;
    let pdpt = pml4 + PAGE;
    let write = |value: u64, address: u64| memory.write_obj(value, GuestAddress(address));
    write(pdpt | PAGE_TABLE, pml4)?;
    for gib in 0..4 {
        let directory = pdpt + PAGE * (1 + gib);
        write(directory | PAGE_TABLE, pdpt + 8 * gib)?;
        let entries: Vec<u8> = (0..512u64).flat_map(|n| (gib << 30 | n << 21 | LARGE_PAGE).to_le_bytes()).collect();
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}

/// Sets the MSRs whose reset values would mislead a kernel. Must follow CPUID, which determines the MSRs that KVM
/// accepts.
fn set_msrs(vcpu: &VcpuFd, vendor: Vendor) -> Result<()> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    // All memory is write-back. Without this Linux treats it as uncached and is slow.
    let mut msrs = vec![entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)];
    if vendor == Vendor::Intel {
        // Firmware sets this bit; without it Linux considers Intel's fast string instructions disabled. The other bits
        // come from KVM, which reports that BTS and PEBS are unavailable; otherwise a guest's perf would use them and
        // fault.
        let misc_enable = get_msr(vcpu, MSR_IA32_MISC_ENABLE)?;
        msrs.push(entry(MSR_IA32_MISC_ENABLE, misc_enable | MISC_ENABLE_FAST_STRING));
    }
    let set = vcpu.set_msrs(&Msrs::from_entries(&msrs)?).context("KVM_SET_MSRS")?;
    ensure!(set == msrs.len(), "KVM_SET_MSRS: KVM refused MSR {:#x}", msrs.get(set).map_or(0, |msr| msr.index));
    Ok(())
}

fn get_msr(vcpu: &VcpuFd, index: u32) -> Result<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }])?;
    let read = vcpu.get_msrs(&mut msrs).context("KVM_GET_MSRS")?;
    let value = msrs.as_slice().first().filter(|_| read == 1);
    value.map(|msr| msr.data).with_context(|| format!("KVM_GET_MSRS: KVM refused MSR {index:#x}"))
}

fn descriptor_bytes(descriptor: Descriptor) -> u64 {
    let Descriptor { access, flags, limit } = descriptor;
    let limit = u64::from(limit);
    (limit & 0xffff) | (limit >> 16) << 48 | u64::from(access) << 40 | u64::from(flags) << 52
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::{self, Vm};
    use crate::{memory, resources};

    #[test]
    fn descriptors_have_the_bits_of_the_boot_protocol() {
        assert_eq!(descriptor_bytes(code(Protocol::Linux64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor_bytes(code(Protocol::Pvh)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor_bytes(DATA), 0x00cf_9300_0000_ffff);
        assert_eq!(segment(DATA, DATA_SELECTOR).limit, 0xffff_ffff);
        assert_eq!(segment(TASK, TASK_SELECTOR).limit, 0x67);
    }

    #[test]
    fn a_kernel_starts_with_a_stack_beside_what_it_is_given() {
        for protocol in [Protocol::Linux64, Protocol::Pvh] {
            let regs = registers(EntryPoint { protocol, instruction: 1 << 20, info: 0 });
            let stack = regs.rsp - 0xe00..regs.rsp;
            assert_eq!(regs.rsp % 16, 0);
            assert!(stack.start >= layout::ZERO_PAGE_ADDRESS + 0x1000 && stack.end <= layout::PAGE_TABLE_ADDRESS);
        }
    }

    #[test]
    fn an_intel_processor_has_fast_strings_but_neither_bts_nor_pebs() {
        const BTS_AND_PEBS_UNAVAILABLE: u64 = 1 << 11 | 1 << 12;
        let kvm = match resources::open_kvm() {
            Ok(kvm) => std::sync::Arc::new(kvm),
            Err(error) => {
                assert!(std::env::var_os("HUSK_TEST_REQUIRE_KVM").is_none(), "{error:#}");
                eprintln!("SKIPPED: this test needs KVM: {error:#}");
                return;
            }
        };
        let memory = memory::reserve(32).unwrap();
        let supported = kvm::supported_cpuid(&kvm).unwrap();
        let vm = Vm::new(kvm, &memory).unwrap();
        for (index, name, enabled) in [(0, b"GenuineIntel", 1), (1, b"AuthenticAMD", 0)] {
            let mut cpuid = supported.clone();
            let [ebx, edx, ecx] = [0, 4, 8].map(|at| u32::from_le_bytes(*name[at..].first_chunk().unwrap()));
            for leaf in cpuid.as_mut_slice().iter_mut().filter(|leaf| leaf.function == 0) {
                (leaf.ebx, leaf.edx, leaf.ecx) = (ebx, edx, ecx);
            }
            let vcpu = vm.create_vcpu(index).unwrap();
            // KVM sets these bits itself, except with PVM.
            let unavailable =
                kvm_msr_entry { index: MSR_IA32_MISC_ENABLE, data: BTS_AND_PEBS_UNAVAILABLE, ..Default::default() };
            assert_eq!(vcpu.set_msrs(&Msrs::from_entries(&[unavailable]).unwrap()).unwrap(), 1);
            prepare(&vcpu, &cpuid, None).unwrap();
            let value = get_msr(&vcpu, MSR_IA32_MISC_ENABLE).unwrap();
            assert_eq!(value, BTS_AND_PEBS_UNAVAILABLE | enabled, "{value:#x}");
        }
    }

    #[test]
    fn the_first_four_gib_are_identity_mapped() {
        let memory = memory::reserve(32).unwrap();
        write_boot_tables(&memory, Protocol::Linux64).unwrap();
        let entry = |table: u64, n: u64| memory.read_obj::<u64>(GuestAddress((table & !0xfff) + 8 * n)).unwrap();
        for address in [0, 0x20_0000, 0x1234_5678, 0xd000_0000, 0xffff_ffff_u64] {
            let pdpt = entry(layout::PAGE_TABLE_ADDRESS, 0);
            let directory = entry(pdpt, address >> 30);
            let page = entry(directory, address >> 21 & 0x1ff);
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
            assert_eq!([pdpt & 0b11, directory & 0b11, page & 0b1000_0011], [0b11, 0b11, 0b1000_0011]);
        }
    }
}
