//! Loads the kernel, initrd and command line into guest memory, and determines the first vCPU's [`EntryPoint`].
//!
//! This is specific to x86. It is called once, before any vCPU runs, on the loader thread. Kernel and initrd are
//! untrusted: each is read once, directly to its location in guest memory, and everything in them is validated against
//! guest memory before use.

mod acpi;
mod bzimage;
mod cmdline;
mod dsdt;
mod elf;
mod generation;
mod initrd;
mod kernel;
mod memory_map;
pub(crate) mod part;
mod pvh;
mod reset_vector;
#[cfg(test)]
pub(crate) mod sample;
mod unified;
mod zero_page;

use anyhow::{Context, Result};
use linux_loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress};

pub use bzimage::BzImage;
pub use generation::write as write_generation_id;
pub use kernel::{Kernel, KernelImage};
pub use part::Part;
pub use unified::Unified;

use crate::layout::{self, VirtioBus};
use crate::memory::GuestMemory;

/// The boot protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// The 64-bit boot protocol (boot.rst): long mode, the first 4 GiB identity-mapped, RSI holds the zero page's
    /// address.
    Linux64,
    /// PVH: 32-bit protected mode without paging, EBX holds the `hvm_start_info`'s address.
    Pvh,
}

/// The entry point of the first vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryPoint {
    /// The protocol, which determines the vCPU's initial state.
    pub protocol: Protocol,
    /// Guest physical address of the first instruction.
    pub instruction: u64,
    /// Guest physical address of the zero page or of the `hvm_start_info`.
    pub info: u64,
}

/// A range of guest physical addresses from `start` to `end` (exclusive).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    start: u64,
    end: u64,
}

impl Extent {
    fn len(&self) -> u64 {
        self.end - self.start
    }
}

/// The result of a loader.
struct Loaded {
    protocol: Protocol,
    instruction: u64,
    /// The end of the memory used by the kernel before it has read its memory map.
    kernel_end: u64,
    /// The highest address of the initrd's last byte.
    initrd_address_max: u64,
    /// The maximum length of the command line, including the final NUL.
    cmdline_max_bytes: usize,
    /// The initial setup header.
    header: setup_header,
}

/// Writes kernel, initrd, command line, ACPI tables, generation ID and reset vector into fresh (all-zero) guest memory.
///
/// `memory` must have the layout of [`layout::memory_ranges`]. The tables describe `cpus` processors with the local
/// APIC IDs `0..cpus`, and the virtio devices on `bus`. Fails with a one-line error if the file is not a valid kernel or does not fit. A [`Kernel::BzImage`] unpacks itself in the guest: pass the ELF
/// image it contains if husk can unpack it.
pub fn load(
    memory: &GuestMemory,
    kernel: &Kernel,
    initrd: Option<&Part>,
    cmdline: &str,
    cpus: u32,
    bus: VirtioBus,
) -> Result<EntryPoint> {
    let loaded = match kernel {
        Kernel::Elf(file) => elf::load(memory, file),
        Kernel::BzImage(image) => bzimage::load(memory, image),
    }
    .context("load kernel")?;
    let initrd = initrd
        .map(|initrd| initrd::load(memory, initrd, loaded.kernel_end, loaded.initrd_address_max))
        .transpose()
        .context("load initrd")?;
    cmdline::check(cmdline, loaded.cmdline_max_bytes)?;
    cmdline::write(memory, cmdline)?;
    write(memory, layout::ACPI_ADDRESS, &acpi::tables(cpus, bus)?).context("write ACPI tables")?;
    generation::write(memory)?;
    reset_vector::write(memory)?;
    let info = match loaded.protocol {
        Protocol::Pvh => pvh::write(memory, initrd)?,
        Protocol::Linux64 => zero_page::write(memory, loaded.header, cmdline.len(), initrd)?,
    };
    Ok(EntryPoint { protocol: loaded.protocol, instruction: loaded.instruction, info })
}

/// Writes `bytes` at guest physical address `address`.
fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Result<()> {
    memory.write_slice(bytes, GuestAddress(address)).with_context(|| {
        format!("{} bytes at {address:#x} are outside guest memory; a machine needs at least 2 MiB", bytes.len())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    const MIB: u64 = 1 << 20;

    fn kernel(note: Option<&[u8]>) -> Kernel {
        let text = sample::Segment { address: MIB, bytes: b"text", memory_bytes: 0x1000 };
        KernelImage::identify(sample::file(&sample::elf(MIB, &[text], note))).unwrap().kernel
    }

    #[test]
    fn a_kernel_without_note_is_entered_by_the_64_bit_protocol() {
        let memory = memory::reserve(32).unwrap();
        let initrd = Part::whole(sample::file(&[7; 10])).unwrap();
        let entry = load(&memory, &kernel(None), Some(&initrd), "quiet", 2, VirtioBus::Mmio { slots: 1 }).unwrap();
        let info = layout::ZERO_PAGE_ADDRESS;
        assert_eq!(entry, EntryPoint { protocol: Protocol::Linux64, instruction: MIB, info });
        let read = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(read(0xf_fff0).to_le_bytes(), [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb], "out 0x602, 1");
        assert_eq!(read(layout::ACPI_ADDRESS).to_le_bytes(), *b"RSD PTR ");
        assert_eq!(read(layout::CMDLINE_ADDRESS).to_le_bytes(), *b"quiet\0\0\0");
        assert_eq!(read(read(info + 0x218) & 0xffff_ffff), u64::from_le_bytes([7; 8]));
    }

    #[test]
    fn a_kernel_with_note_is_entered_by_pvh() {
        let memory = memory::reserve(32).unwrap();
        let note = sample::note(b"Xen\0", 18, &(MIB as u32 + 1).to_le_bytes());
        let entry = load(&memory, &kernel(Some(&note)), None, "", 1, VirtioBus::Mmio { slots: 0 }).unwrap();
        let info = layout::PVH_INFO_ADDRESS;
        assert_eq!(entry, EntryPoint { protocol: Protocol::Pvh, instruction: MIB + 1, info });
    }

    #[test]
    fn an_error_names_the_file() {
        let memory = memory::reserve(32).unwrap();
        let empty = Part::whole(sample::file(b"")).unwrap();
        let error = load(&memory, &kernel(None), Some(&empty), "", 1, VirtioBus::Mmio { slots: 0 }).unwrap_err();
        assert_eq!(format!("{error:#}"), "load initrd: the initrd is empty");
        let error = load(&memory, &kernel(None), None, &"a".repeat(3000), 1, VirtioBus::Mmio { slots: 0 }).unwrap_err();
        assert!(error.to_string().starts_with("the kernel command line of 3000 bytes is too long"));
    }
}
