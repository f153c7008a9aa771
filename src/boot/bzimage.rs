//! Parses bzImages (boot.rst): locates the packed kernel or, if it cannot be unpacked here, loads the image to unpack
//! itself.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Context, Result, bail, ensure};
use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use super::part::Part;
use super::zero_page::HEADER_MAGIC;
use super::{Loaded, Protocol};
use crate::decompress::{self, Compression};
use crate::layout;
use crate::memory::GuestMemory;

/// The offset of the setup header in a bzImage and in the zero page.
const HEADER_OFFSET: u64 = 0x1f1;
/// The offset of [`HEADER_MAGIC`]: the byte before it is the length of the rest of the header.
const MAGIC_OFFSET: usize = 0x202;
const SECTOR_BYTES: u64 = 512;
/// The meaning of `setup_sects` 0.
const SETUP_SECTORS_DEFAULT: u8 = 4;
/// Protocol 2.08, the first with `payload_offset` and `payload_length`.
const VERSION_WITH_PAYLOAD: u16 = 0x0208;
/// Protocol 2.12, the first with `xloadflags`.
const VERSION_WITH_XLOADFLAGS: u16 = 0x020c;
/// The offset of the 64-bit entry point in the protected-mode code.
const ENTRY_64_OFFSET: u64 = 0x200;
/// The size of the unpacked size field at the end of the payload.
const SIZE_BYTES: u64 = 4;
/// Larger than any unpacked kernel.
const UNPACKED_MAX_BYTES: u64 = 1 << 30;
/// Better than any kernel's compression ratio; otherwise a crafted image could make the host write zeroes for a long
/// time.
const RATIO_MAX: u64 = 64;

/// An opened bzImage with a valid header.
#[derive(Debug)]
pub struct BzImage {
    image: Part,
    header: setup_header,
    /// The offset of the protected-mode code.
    code_offset: u64,
    code_bytes: u64,
    payload: Option<Payload>,
}

/// The packed kernel: an ELF image and its relocations.
#[derive(Debug)]
struct Payload {
    offset: u64,
    len: u64,
    compression: Compression,
    unpacked_bytes: u64,
}

/// Whether `image` has a setup header.
pub fn is_bzimage(image: &Part) -> Result<bool> {
    let mut magic = [0; 4];
    let len = image.read_at(&mut magic, MAGIC_OFFSET as u64).context("read kernel")?;
    Ok(len == magic.len() && u32::from_le_bytes(magic) == HEADER_MAGIC)
}

impl AsRawFd for BzImage {
    fn as_raw_fd(&self) -> RawFd {
        self.image.file().as_raw_fd()
    }
}

impl BzImage {
    /// Reads and validates the setup header.
    pub fn open(image: Part) -> Result<BzImage> {
        let header = read_header(&image)?;
        ensure!(
            header.loadflags & LOADED_HIGH != 0,
            "a zImage, which loads below 1 MiB, is not supported: use a bzImage"
        );
        let setup_sectors = if header.setup_sects == 0 { SETUP_SECTORS_DEFAULT } else { header.setup_sects };
        let code_offset = (u64::from(setup_sectors) + 1) * SECTOR_BYTES;
        let code_bytes = u64::from(header.syssize) * 16;
        let (says, has) = (code_offset + code_bytes, image.len_bytes());
        ensure!(has >= says, "the bzImage is truncated: header says {says} bytes, file has {has}");
        let mut image = BzImage { image, header, code_offset, code_bytes, payload: None };
        image.payload = image.find_payload()?;
        Ok(image)
    }

    /// Whether husk can unpack the kernel.
    pub fn can_be_unpacked(&self) -> bool {
        self.payload.is_some()
    }

    /// The size of the unpacked kernel; 0 if it cannot be unpacked.
    pub fn unpacked_bytes(&self) -> u64 {
        self.payload.as_ref().map_or(0, |payload| payload.unpacked_bytes)
    }

    /// The file that contains the image.
    pub fn file(&self) -> &File {
        self.image.file()
    }

    /// Reads the whole image.
    pub fn reader(&self) -> impl Read {
        self.image.reader(0, u64::MAX)
    }

    /// Unpacks [`unpacked_bytes`](BzImage::unpacked_bytes) to `output`, or fails. `progress` is called with the number
    /// of bytes written so far, at least a few times per second.
    pub fn unpack(&self, output: &mut dyn Write, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let Some(payload) = &self.payload else { bail!("the bzImage uses an unknown compression format") };
        let packed = self.image.reader(payload.offset, payload.len);
        decompress::unpack(payload.compression, packed, payload.unpacked_bytes, output, progress)
            .with_context(|| format!("decompress the kernel in the bzImage ({})", payload.compression))
    }

    fn find_payload(&self) -> Result<Option<Payload>> {
        let (start, len) = (u64::from(self.header.payload_offset), u64::from(self.header.payload_length));
        if self.header.version < VERSION_WITH_PAYLOAD || len == 0 {
            return Ok(None);
        }
        ensure!(start + len <= self.code_bytes, "the bzImage is corrupted: its payload ends beyond its code");
        let offset = self.code_offset + start;
        let mut magic = [0; 6];
        let mut size = [0; SIZE_BYTES as usize];
        if len < magic.len() as u64 + SIZE_BYTES {
            return Ok(None);
        }
        self.image.read_exact_at(&mut magic, offset)?;
        let Some(compression) = Compression::identify(&magic) else { return Ok(None) };
        // Linux's build appends the unpacked size to every payload; gzip's trailer already is that size.
        self.image.read_exact_at(&mut size, offset + len - SIZE_BYTES)?;
        let unpacked_bytes = u64::from(u32::from_le_bytes(size));
        ensure!(
            unpacked_bytes <= UNPACKED_MAX_BYTES && unpacked_bytes / RATIO_MAX <= len,
            "the bzImage is corrupted: {len} bytes of payload claim to decompress to {unpacked_bytes}"
        );
        let size_behind = if compression == Compression::Gzip { 0 } else { SIZE_BYTES };
        Ok(Some(Payload { offset, len: len - size_behind, compression, unpacked_bytes }))
    }
}

fn read_header(image: &Part) -> Result<setup_header> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    // The smallest kernel is longer than the longest header.
    image.read_exact_at(bytes, HEADER_OFFSET).context("the bzImage is truncated: its header is incomplete")?;
    let magic_at = MAGIC_OFFSET - HEADER_OFFSET as usize;
    let end = bytes.get(magic_at - 1).map_or(0, |jump| magic_at + usize::from(*jump));
    // The header is followed by code.
    bytes.iter_mut().skip(end).for_each(|byte| *byte = 0);
    Ok(header)
}

/// Loads the protected-mode code of `image`, which unpacks the kernel itself.
pub fn load(memory: &GuestMemory, image: &BzImage) -> Result<Loaded> {
    let header = image.header;
    if header.version < VERSION_WITH_XLOADFLAGS || header.xloadflags & XLF_KERNEL_64 == 0 {
        bail!("the bzImage uses an unknown compression format, and has no 64-bit entry point to decompress itself");
    }
    // The memory used before the kernel has read its memory map.
    let needed = u64::from(header.init_size).max(image.code_bytes);
    let address = runtime_start(&header)?;
    let end = address.checked_add(needed).context("the bzImage is corrupted: it wraps around the address space")?;
    let fits = memory.check_range(GuestAddress(address), usize::try_from(needed)?) && end <= layout::MMIO_HOLE_START;
    ensure!(
        fits,
        "the kernel needs memory up to {} MiB to decompress itself: increase --memory",
        end.div_ceil(1 << 20)
    );
    image.image.copy_to(memory, address, image.code_offset, image.code_bytes).context("read bzImage")?;
    let header = setup_header { code32_start: u32::try_from(address)?, ..header };
    Ok(Loaded {
        protocol: Protocol::Linux64,
        instruction: address + ENTRY_64_OFFSET,
        kernel_end: end,
        initrd_address_max: header.initrd_addr_max.into(),
        cmdline_max_bytes: layout::CMDLINE_MAX_BYTES.min(header.cmdline_size as usize + 1),
        header,
    })
}

/// The address where the kernel runs (boot.rst, `init_size`). A kernel loaded below moves there, so a lower load
/// address saves no memory; a kernel loaded there stays.
fn runtime_start(header: &setup_header) -> Result<u64> {
    let (preferred, alignment) = (header.pref_address, u64::from(header.kernel_alignment));
    ensure!(alignment.is_power_of_two(), "the bzImage is corrupted: invalid alignment of {alignment} bytes");
    ensure!(
        preferred >= layout::HIGH_MEMORY_START && preferred.is_multiple_of(alignment),
        "the bzImage is corrupted: invalid load address {preferred:#x}"
    );
    Ok(preferred)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::boot::sample::{self, LZO};
    use crate::boot::{Kernel, KernelImage};
    use crate::memory;

    const MIB: u64 = 1 << 20;
    const KERNEL_BYTES: u32 = 256 << 10;

    fn open(bytes: &[u8]) -> Result<BzImage> {
        match KernelImage::identify(sample::file(bytes))?.kernel {
            Kernel::BzImage(image) => Ok(image),
            Kernel::Elf(_) => panic!("an ELF image"),
        }
    }

    fn unpack(image: &BzImage) -> Result<Vec<u8>> {
        let mut output = Vec::new();
        image.unpack(&mut output, &mut |_| ())?;
        Ok(output)
    }

    #[test]
    fn every_compression_is_unpacked() {
        let kernel = sample::kernel(KERNEL_BYTES);
        for packer in sample::PACKERS {
            let Some(payload) = sample::packed(&kernel, packer) else { continue };
            let image = open(&sample::bzimage(&payload)).unwrap();
            assert!(image.can_be_unpacked(), "{packer}");
            assert!(unpack(&image).unwrap() == kernel, "{packer}");
        }
    }

    #[test]
    fn a_bzimage_in_a_unified_image_is_unpacked() {
        let kernel = sample::kernel(KERNEL_BYTES);
        let payload = sample::packed(&kernel, sample::PACKERS[0]).expect("gzip is part of every Debian");
        for bzimage in [sample::bzimage(&payload), sample::bzimage(LZO)] {
            let unified = open(&sample::unified(&[(".initrd", b"070701"), (".linux", &bzimage)])).unwrap();
            let mut bytes = Vec::new();
            unified.reader().read_to_end(&mut bytes).unwrap();
            assert!(bytes == bzimage, "what it is known by in the cache");
            if unified.can_be_unpacked() {
                assert!(unpack(&unified).unwrap() == kernel);
                continue;
            }
            let memory = memory::reserve(64).unwrap();
            load(&memory, &unified).unwrap();
            assert_eq!(memory.read_obj::<u32>(GuestAddress(16 * MIB)).unwrap(), u32::from_le_bytes(*b"code"));
        }
    }

    #[test]
    fn a_damaged_payload_is_detected() {
        let kernel = sample::kernel(KERNEL_BYTES);
        for packer in sample::PACKERS {
            let Some(payload) = sample::packed(&kernel, packer) else { continue };
            let mut bytes = sample::bzimage(&payload);
            // The middle of the payload: detected by each format's checksum or structure, except lz4's, which has
            // neither.
            let at = 1024 + sample::PAYLOAD_OFFSET as usize + payload.len() / 2;
            bytes[at] ^= 0x10;
            let result = unpack(&open(&bytes).unwrap());
            assert!(result.is_err() || packer.starts_with("lz4") || packer.starts_with("zstd"), "{packer}");
            let mut cut = payload[..payload.len() / 2].to_vec();
            cut.extend((kernel.len() as u32).to_le_bytes());
            let error = unpack(&open(&sample::bzimage(&cut)).unwrap()).unwrap_err();
            assert!(format!("{error:#}").starts_with("decompress the kernel in the bzImage ("), "{packer}: {error:#}");
        }
    }

    #[test]
    fn a_payload_with_the_wrong_size_is_rejected() {
        let kernel = sample::kernel(KERNEL_BYTES);
        for packer in sample::PACKERS {
            let Some(mut payload) = sample::packed(&kernel, packer) else { continue };
            let at = payload.len() - 4;
            for claim in [kernel.len() as u32 - 1, kernel.len() as u32 + 1] {
                sample::put(&mut payload, at, &claim.to_le_bytes());
                assert!(unpack(&open(&sample::bzimage(&payload)).unwrap()).is_err(), "{packer}");
            }
        }
    }

    #[test]
    fn an_invalid_header_is_rejected() {
        let whole = sample::bzimage(LZO);
        let error = |at: usize, field: &[u8]| {
            let mut bytes = whole.clone();
            sample::put(&mut bytes, at, field);
            format!("{:#}", open(&bytes).unwrap_err())
        };
        assert_eq!(error(0x211, &[0]), "a zImage, which loads below 1 MiB, is not supported: use a bzImage");
        let says = 1024 + 0x1000 * 16;
        let expected = format!("the bzImage is truncated: header says {says} bytes, file has {}", whole.len());
        assert_eq!(error(0x1f4, &0x1000u32.to_le_bytes()), expected);
        assert!(error(0x248, &u32::MAX.to_le_bytes()).contains("ends beyond its code"));
        assert!(error(0x24c, &u32::MAX.to_le_bytes()).contains("ends beyond its code"));
        for len in 0x206..whole.len() {
            assert!(open(&whole[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        for claim in [u32::MAX, 1 << 20] {
            let mut payload = b"\x1f\x8b\x08...".to_vec();
            payload.extend(claim.to_le_bytes());
            let error = open(&sample::bzimage(&payload)).unwrap_err().to_string();
            assert_eq!(error, format!("the bzImage is corrupted: 10 bytes of payload claim to decompress to {claim}"));
        }
    }

    fn load_into(memory_mib: u64, bytes: &[u8]) -> Result<(GuestMemory, Loaded)> {
        let image = open(bytes)?;
        assert!(!image.can_be_unpacked());
        let memory = memory::reserve(memory_mib)?;
        let loaded = load(&memory, &image)?;
        Ok((memory, loaded))
    }

    #[test]
    fn an_unsupported_compression_unpacks_itself() {
        let (memory, loaded) = load_into(64, &sample::bzimage(LZO)).unwrap();
        assert_eq!((loaded.protocol, loaded.instruction), (Protocol::Linux64, 16 * MIB + 0x200));
        assert_eq!(loaded.kernel_end, 20 * MIB, "init_size counts");
        assert_eq!(memory.read_obj::<u32>(GuestAddress(16 * MIB)).unwrap(), u32::from_le_bytes(*b"code"));
        assert_eq!((loaded.initrd_address_max, loaded.cmdline_max_bytes), (0x7fff_ffff, 2048));
        let (version, code32_start) = (loaded.header.version, loaded.header.code32_start);
        assert_eq!((version, code32_start), (0x020f, 16 << 20));
    }

    #[test]
    fn a_self_unpacking_kernel_needs_enough_memory() {
        load_into(20, &sample::bzimage(LZO)).unwrap();
        let Err(error) = load_into(19, &sample::bzimage(LZO)) else { panic!("loaded") };
        assert!(error.to_string().starts_with("the kernel needs memory up to 20 MiB to decompress itself"), "{error}");
    }

    #[test]
    fn an_invalid_load_address_is_rejected() {
        for place in [0, 1, 0xf_0000, 0x10_0000, (16 << 20) + 4096, u64::MAX, 3 << 30, !0x1f_ffff] {
            let mut bytes = sample::bzimage(LZO);
            sample::put(&mut bytes, 0x258, &place.to_le_bytes());
            assert!(load_into(64, &bytes).is_err(), "{place:#x}");
        }
    }

    #[test]
    fn an_invalid_alignment_is_rejected() {
        for alignment in [0u32, 3, 0x30_0000] {
            let mut bytes = sample::bzimage(LZO);
            sample::put(&mut bytes, 0x230, &alignment.to_le_bytes());
            assert!(load_into(64, &bytes).is_err());
        }
    }

    #[test]
    fn a_32_bit_kernel_is_rejected() {
        let mut bytes = sample::bzimage(LZO);
        bytes[0x236] = 0;
        let Err(error) = load_into(64, &bytes) else { panic!("loaded") };
        assert!(error.to_string().contains("no 64-bit entry"));
    }

    #[test]
    fn bytes_after_a_short_header_are_ignored() {
        let mut bytes = sample::bzimage(LZO);
        // Up to xloadflags and cmdline_size.
        bytes[0x201] = 0x3c - 2;
        let header = open(&bytes).unwrap().header;
        let (cmdline_size, pref_address) = (header.cmdline_size, header.pref_address);
        assert_eq!((cmdline_size, pref_address), (2047, 0));
    }
}
