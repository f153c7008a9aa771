//! Loads an ELF `vmlinux`, with the PVH entry point if it has the note, and the 64-bit boot protocol otherwise.
//!
//! The headers are validated against guest memory before anything is loaded.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use linux_loader::elf::{EI_CLASS, EI_DATA, ELFDATA2LSB, ET_REL, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::seek_hole::SeekHole;

use super::zero_page::header_for_elf;
use super::{Extent, Loaded, Protocol};
use crate::layout;
use crate::memory::GuestMemory;

/// The size of a section header, and the positions of the section's offset and size in it (gABI, section header).
const SECTION_HEADER_BYTES: usize = 64;
const SH_OFFSET: usize = 24;
const SH_SIZE: usize = 32;
/// `EI_CLASS` of a 64-bit image.
const ELFCLASS64: u8 = 2;
/// `e_machine` of x86-64.
const EM_X86_64: u16 = 62;
/// A kernel has about five program headers.
const PROGRAM_HEADERS_MAX: usize = 128;
/// A kernel's notes take about 500 bytes.
const NOTES_MAX_BYTES: u64 = 64 << 10;
/// The names of an image's sections take about 2 KiB.
const SECTION_NAMES_MAX_BYTES: u64 = 64 << 10;
/// The section with the packed kernel in a bzImage's decompressor (arch/x86/boot/compressed in Linux).
const PACKED_KERNEL_SECTION: &[u8] = b"\0.rodata..compressed\0";
/// The type of the Xen note with the PVH entry point (Xen's `public/elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// The highest initrd address that kernels state in `initrd_addr_max`, which is not in an ELF image.
const INITRD_ADDRESS_MAX: u64 = 0x7fff_ffff;

/// The contents of the ELF headers.
#[derive(Debug)]
pub struct ElfImage {
    entry: u64,
    pvh_entry: Option<u32>,
    segments: Vec<Segment>,
}

#[derive(Debug)]
struct Segment {
    file_offset: u64,
    file_bytes: u64,
    memory: Extent,
}

/// Parses the headers of `file`. Fails if it is not a complete x86-64 ELF image that could be a kernel.
pub fn parse(file: &File) -> Result<ElfImage> {
    let file_bytes = file.metadata()?.len();
    let mut header = Elf64_Ehdr::default();
    file.read_exact_at(header.as_mut_slice(), 0).context("read ELF header")?;
    let ident = header.e_ident;
    ensure!(ident.starts_with(b"\x7fELF"), "not an ELF image");
    if ident[EI_CLASS] != ELFCLASS64
        || u32::from(ident[EI_DATA]) != u32::from(ELFDATA2LSB)
        || header.e_machine != EM_X86_64
    {
        bail!("an ELF image, but not for 64-bit x86");
    }
    ensure!(
        header.e_type != ET_REL,
        "an unlinked object file, not a kernel: use vmlinux at the top of the kernel build tree, or arch/x86/boot/bzImage"
    );
    ensure!(
        !section_names(file, &header).is_some_and(|names| contains(&names, PACKED_KERNEL_SECTION)),
        "the decompressor of a bzImage (arch/x86/boot/compressed/vmlinux), not a kernel: use vmlinux at the top of the \
         kernel build tree, or arch/x86/boot/bzImage"
    );
    let count = usize::from(header.e_phnum);
    ensure!(usize::from(header.e_phentsize) == size_of::<Elf64_Phdr>(), "ELF program headers have the wrong size");
    ensure!(count <= PROGRAM_HEADERS_MAX, "{count} ELF program headers are too many for a kernel");
    let mut program_headers = vec![Elf64_Phdr::default(); count];
    for (index, program_header) in program_headers.iter_mut().enumerate() {
        let offset = header.e_phoff.checked_add((index * size_of::<Elf64_Phdr>()) as u64);
        let offset = offset.context("ELF program headers beyond the end of the file")?;
        file.read_exact_at(program_header.as_mut_slice(), offset).context("read ELF program headers")?;
    }

    let mut image = ElfImage { entry: header.e_entry, pvh_entry: None, segments: Vec::new() };
    for program_header in &program_headers {
        match program_header.p_type {
            PT_LOAD if program_header.p_memsz != 0 => image.segments.push(segment(program_header, file_bytes)?),
            PT_NOTE if image.pvh_entry.is_none() => image.pvh_entry = pvh_note(file, program_header)?,
            _ => {}
        }
    }
    image.check()?;
    Ok(image)
}

/// The names of the sections, each between NULs, if the image has them. They do not affect loading.
fn section_names(file: &File, header: &Elf64_Ehdr) -> Option<Vec<u8>> {
    let mut section = [0; SECTION_HEADER_BYTES];
    let at = u64::from(header.e_shstrndx) * SECTION_HEADER_BYTES as u64;
    file.read_exact_at(&mut section, header.e_shoff.checked_add(at)?).ok()?;
    let field = |at: usize| Some(u64::from_le_bytes(*section.get(at..)?.first_chunk()?));
    let mut names = vec![0; usize::try_from(field(SH_SIZE)?.min(SECTION_NAMES_MAX_BYTES)).ok()?];
    file.read_exact_at(&mut names, field(SH_OFFSET)?).ok()?;
    Some(names)
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|window| window == word)
}

fn segment(header: &Elf64_Phdr, file_bytes: u64) -> Result<Segment> {
    let in_file = header.p_offset.checked_add(header.p_filesz).is_some_and(|end| end <= file_bytes);
    ensure!(
        in_file,
        "the ELF image is truncated: a segment ends at byte {} of {file_bytes}",
        header.p_offset.saturating_add(header.p_filesz)
    );
    ensure!(header.p_filesz <= header.p_memsz, "an ELF segment is larger in the file than in memory");
    let start = header.p_paddr;
    let end = start.checked_add(header.p_memsz).context("an ELF segment wraps around the address space")?;
    Ok(Segment { file_offset: header.p_offset, file_bytes: header.p_filesz, memory: Extent { start, end } })
}

/// The PVH entry point in a note segment.
fn pvh_note(file: &File, header: &Elf64_Phdr) -> Result<Option<u32>> {
    let mut notes = vec![0; usize::try_from(header.p_filesz.min(NOTES_MAX_BYTES))?];
    file.read_exact_at(&mut notes, header.p_offset).context("read ELF notes")?;
    // gABI: names and values are aligned to 4 bytes, or to 8 where the segment is.
    let align = if header.p_align == 8 { 8 } else { 4 };
    let mut rest = notes.as_slice();
    while let Some((note, after)) = Note::split(rest, align) {
        if note.name == b"Xen\0" && note.kind == XEN_ELFNOTE_PHYS32_ENTRY {
            // Linux writes the 32-bit address as a 64-bit value.
            let entry = note.value.first_chunk().context("a PVH note without an address")?;
            return Ok(Some(u32::from_le_bytes(*entry)));
        }
        rest = after;
    }
    Ok(None)
}

struct Note<'a> {
    kind: u32,
    name: &'a [u8],
    value: &'a [u8],
}

impl<'a> Note<'a> {
    /// Splits the first note off `bytes`; `None` if there is no complete one.
    fn split(bytes: &'a [u8], align: usize) -> Option<(Note<'a>, &'a [u8])> {
        let word = |n: usize| Some(u32::from_le_bytes(*bytes.get(n * 4..)?.first_chunk()?));
        let (name_bytes, value_bytes, kind) = (word(0)? as usize, word(1)? as usize, word(2)?);
        let name_at = size_of::<Elf64_Nhdr>();
        let value_at = (name_at + name_bytes).next_multiple_of(align);
        let name = bytes.get(name_at..name_at + name_bytes)?;
        let value = bytes.get(value_at..value_at + value_bytes)?;
        let after = bytes.get((value_at + value_bytes).next_multiple_of(align)..).unwrap_or_default();
        Some((Note { kind, name, value }, after))
    }
}

impl ElfImage {
    /// The entry point and protocol.
    fn entry(&self) -> (Protocol, u64) {
        match self.pvh_entry {
            Some(entry) => (Protocol::Pvh, entry.into()),
            None => (Protocol::Linux64, self.entry),
        }
    }

    fn check(&mut self) -> Result<()> {
        self.segments.sort_by_key(|segment| segment.memory.start);
        let Some(first) = self.segments.first() else { bail!("an ELF image without loadable segments") };
        // Below are the command line, the tables and the initial page tables.
        ensure!(
            first.memory.start >= layout::HIGH_MEMORY_START,
            "an ELF image that loads at {:#x}, below 1 MiB, is not a kernel",
            first.memory.start
        );
        let apart = self.segments.windows(2).all(|pair| matches!(pair, [a, b] if a.memory.end <= b.memory.start));
        ensure!(apart, "ELF segments overlap");
        let (_, entry) = self.entry();
        let inside = self.segments.iter().any(|segment| (segment.memory.start..segment.memory.end).contains(&entry));
        ensure!(inside, "the ELF entry point {entry:#x} is not in any segment");
        Ok(())
    }

    fn end(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.memory.end)
    }
}

/// Loads `file` to its physical addresses.
pub fn load(memory: &GuestMemory, file: &File) -> Result<Loaded> {
    let image = parse(file)?;
    let mut file = file.try_clone()?;
    for segment in &image.segments {
        let (address, len) = (GuestAddress(segment.memory.start), usize::try_from(segment.memory.len())?);
        if !memory.check_range(address, len) {
            bail!("the kernel needs memory up to {} MiB: increase --memory", image.end().div_ceil(1 << 20));
        }
        read(memory, &mut file, segment).context("read ELF segment")?;
    }
    let (protocol, instruction) = image.entry();
    Ok(Loaded {
        protocol,
        instruction,
        kernel_end: image.end(),
        initrd_address_max: INITRD_ADDRESS_MAX,
        cmdline_max_bytes: layout::CMDLINE_MAX_BYTES,
        header: header_for_elf(),
    })
}

/// Reads a segment. Holes in the file and the part beyond its data are skipped, since the memory is already zero. A
/// third of an unpacked kernel consists of holes, which then cost neither time nor memory.
fn read(memory: &GuestMemory, file: &mut File, segment: &Segment) -> Result<()> {
    let file_end = segment.file_offset + segment.file_bytes;
    let mut at = segment.file_offset;
    while at < file_end {
        let Some(start) = file.seek_data(at)?.filter(|start| *start < file_end) else { break };
        let end = file.seek_hole(start)?.map_or(file_end, |hole| hole.min(file_end));
        let address = GuestAddress(segment.memory.start + (start - segment.file_offset));
        file.seek(SeekFrom::Start(start))?;
        memory.read_exact_volatile_from(address, file, usize::try_from(end - start)?)?;
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::boot::sample::{self, Segment as Part};
    use crate::memory;

    const MIB: u64 = 1 << 20;

    fn kernel(note: Option<&[u8]>) -> Vec<u8> {
        let text = Part { address: MIB, bytes: b"text", memory_bytes: 0x1000 };
        let data = Part { address: 2 * MIB, bytes: b"data", memory_bytes: 0x4321 };
        sample::elf(MIB + 2, &[text, data], note)
    }

    fn load_bytes(bytes: &[u8], memory_mib: u64) -> Result<(GuestMemory, Loaded)> {
        let memory = memory::reserve(memory_mib).unwrap();
        let loaded = load(&memory, &sample::file(bytes))?;
        Ok((memory, loaded))
    }

    fn error(bytes: &[u8]) -> String {
        let Err(error) = load_bytes(bytes, 32) else { panic!("loaded") };
        format!("{error:#}")
    }

    #[test]
    fn segments_are_loaded_at_their_physical_addresses() {
        let (memory, loaded) = load_bytes(&kernel(None), 32).unwrap();
        let mut text = [0; 5];
        memory.read_slice(&mut text, GuestAddress(MIB)).unwrap();
        assert_eq!(&text, b"text\0");
        assert_eq!(memory.read_obj::<u32>(GuestAddress(2 * MIB)).unwrap(), u32::from_le_bytes(*b"data"));
        assert_eq!((loaded.protocol, loaded.instruction), (Protocol::Linux64, MIB + 2));
        assert_eq!(loaded.kernel_end, 2 * MIB + 0x4321, "memory beyond the file's bytes is the kernel's too");
    }

    #[test]
    fn holes_in_the_file_are_zeroes_in_memory() {
        let mut bytes = vec![1; 300 << 10];
        bytes[64 << 10..200 << 10].fill(0);
        let part = Part { address: MIB, bytes: &bytes, memory_bytes: MIB };
        let image = sample::elf(MIB, &[part], None);
        // The headers shift everything relative to page boundaries: these are the zeroes in the file.
        let (start, end) = (68 << 10, 196 << 10);
        let file = sample::file(&image[..start]);
        file.write_all_at(&image[end..], end as u64).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 < image.len() as u64, "there is a hole");
        let memory = memory::reserve(32).unwrap();
        load(&memory, &file).unwrap();
        let mut loaded = vec![0xff; bytes.len()];
        memory.read_slice(&mut loaded, GuestAddress(MIB)).unwrap();
        assert!(loaded == bytes);
    }

    /// Appends a table of section names to `image`.
    fn with_section_names(image: &[u8], names: &[u8]) -> Vec<u8> {
        let mut image = image.to_vec();
        let names_at = image.len() as u64;
        image.extend(names);
        let header_at = image.len() as u64;
        let mut header = [0; SECTION_HEADER_BYTES];
        sample::put(&mut header, SH_OFFSET, &names_at.to_le_bytes());
        sample::put(&mut header, SH_SIZE, &(names.len() as u64).to_le_bytes());
        image.extend(header);
        sample::put(&mut image, 40, &header_at.to_le_bytes());
        image
    }

    #[test]
    fn other_files_of_a_kernel_build_are_identified() {
        let decompressor = with_section_names(&kernel(None), b"\0.head.text\0.rodata..compressed\0.text\0");
        assert!(error(&decompressor).contains("arch/x86/boot/compressed/vmlinux"));
        load_bytes(&with_section_names(&kernel(None), b"\0.text\0.rodata\0.init.rodata..compressed\0"), 32).unwrap();
        let mut object = kernel(None);
        object[16] = 1;
        assert!(error(&object).starts_with("an unlinked object file"));
        // Invalid names are no reason to reject a kernel.
        for (at, value) in [(SH_OFFSET, u64::MAX), (SH_SIZE, u64::MAX)] {
            let mut lying = with_section_names(&kernel(None), b"\0.text\0");
            let header_at = lying.len() - SECTION_HEADER_BYTES;
            sample::put(&mut lying, header_at + at, &value.to_le_bytes());
            load_bytes(&lying, 32).unwrap();
        }
    }

    #[test]
    fn a_segment_may_be_above_the_hole() {
        let part = Part { address: 4 << 30, bytes: b"high", memory_bytes: 4 };
        let (memory, _) = load_bytes(&sample::elf(4 << 30, &[part], None), 6 << 10).unwrap();
        assert_eq!(memory.read_obj::<u32>(GuestAddress(4 << 30)).unwrap(), u32::from_le_bytes(*b"high"));
    }

    #[test]
    fn the_pvh_note_is_found_after_others() {
        let entry = (MIB + 1) as u32;
        for value in [entry.to_le_bytes().to_vec(), u64::from(entry).to_le_bytes().to_vec()] {
            let notes = [
                sample::note(b"GNU\0", 18, &[1; 7]),
                sample::note(b"Xen\0", 6, b"linux\0"),
                sample::note(b"Xen\0", 18, &value),
            ];
            let (_, loaded) = load_bytes(&kernel(Some(&notes.concat())), 32).unwrap();
            assert_eq!((loaded.protocol, loaded.instruction), (Protocol::Pvh, MIB + 1));
        }
    }

    #[test]
    fn notes_with_an_invalid_length_end_the_search() {
        let mut note = sample::note(b"Xen\0", 18, &[0; 4]);
        for (at, len) in [(0, u32::MAX), (4, u32::MAX), (0, 0x7fff_fffd), (4, 9)] {
            let mut lying = note.clone();
            lying[at..at + 4].copy_from_slice(&len.to_le_bytes());
            let (_, loaded) = load_bytes(&kernel(Some(&lying)), 32).unwrap();
            assert_eq!(loaded.protocol, Protocol::Linux64, "{at} {len:#x}");
        }
        note.truncate(13);
        assert_eq!(load_bytes(&kernel(Some(&note)), 32).unwrap().1.protocol, Protocol::Linux64);
    }

    #[test]
    fn every_truncation_is_rejected() {
        let whole = kernel(Some(&sample::note(b"Xen\0", 18, &(MIB as u32).to_le_bytes())));
        load_bytes(&whole, 32).unwrap();
        for len in 0..whole.len() {
            assert!(load_bytes(&whole[..len], 32).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn segments_at_invalid_addresses_are_rejected() {
        let one = |address, memory_bytes| sample::elf(address, &[Part { address, bytes: b"text", memory_bytes }], None);
        assert!(error(&one(0x7000, 4)).contains("below 1 MiB"));
        assert!(error(&one(MIB, 3)).contains("larger in the file than in memory"));
        assert!(error(&one(u64::MAX - 3, 5)).contains("wraps"));
        assert!(error(&one(31 * MIB, MIB + 1)).contains("needs memory up to 33 MiB"));
        assert!(error(&one(40 * MIB, 4)).contains("--memory"));
        assert!(error(&sample::elf(MIB, &[], None)).contains("without loadable segments"));
        let part = |address| Part { address, bytes: b"text", memory_bytes: 0x1000 };
        assert!(error(&sample::elf(MIB, &[part(MIB + 0xfff), part(MIB)], None)).contains("overlap"));
        assert!(error(&sample::elf(MIB + 0x1000, &[part(MIB)], None)).contains("not in any segment"));
    }

    #[test]
    fn a_segment_across_the_hole_is_rejected() {
        let part = Part { address: MIB, bytes: b"text", memory_bytes: 4 << 30 };
        assert!(load_bytes(&sample::elf(MIB, &[part], None), 6 << 10).is_err());
    }

    #[test]
    fn images_for_other_architectures_are_rejected() {
        for (at, value) in [(4, 1), (5, 2), (18, 40)] {
            let mut image = kernel(None);
            image[at] = value;
            assert_eq!(error(&image), "an ELF image, but not for 64-bit x86");
        }
    }
}
