//! Identifies a kernel file and what it contains.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Context, Result, bail, ensure};

use super::bzimage::{self, BzImage};
use super::elf;
use super::part::Part;
use super::unified::Unified;

/// The contents of a kernel file.
#[derive(Debug)]
pub struct KernelImage {
    /// The kernel.
    pub kernel: Kernel,
    /// The initramfs in a unified kernel image.
    pub initrd: Option<Part>,
    /// The command line in a unified kernel image; may be empty.
    pub cmdline: String,
}

/// An opened kernel image, identified by its first bytes. It is fully validated when it is loaded.
#[derive(Debug)]
pub enum Kernel {
    /// An ELF image, `vmlinux`.
    Elf(File),
    /// A bzImage: a packed ELF image after a decompressor.
    BzImage(BzImage),
}

impl KernelImage {
    /// Reads the start of `file`, the complete header of a bzImage, and the sections of a unified kernel image.
    pub fn identify(file: File) -> Result<KernelImage> {
        let part = Part::whole(file)?;
        let alone = |kernel| KernelImage { kernel, initrd: None, cmdline: String::new() };
        let mut magic = [0; 4];
        match part.read_at(&mut magic, 0).context("read kernel")? {
            4 if magic == *b"\x7fELF" => return Ok(alone(Kernel::Elf(part.into_file()))),
            // With an EFI stub it is also a PE file.
            _ if bzimage::is_bzimage(&part)? => return Ok(alone(Kernel::BzImage(BzImage::open(part)?))),
            0 => bail!("the kernel file is empty"),
            _ => {}
        }
        let Some(Unified { linux, initrd, cmdline }) = Unified::parse(part.file())? else {
            bail!("not a kernel: expected an ELF vmlinux, a bzImage or a unified kernel image")
        };
        ensure!(bzimage::is_bzimage(&linux)?, "the .linux of the unified kernel image is not a bzImage");
        Ok(KernelImage { kernel: Kernel::BzImage(BzImage::open(linux)?), initrd, cmdline })
    }
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Kernel::Elf(file) => file.as_raw_fd(),
            Kernel::BzImage(image) => image.as_raw_fd(),
        }
    }
}

impl Kernel {
    /// An ELF image, whose headers are validated here.
    pub fn elf(file: File) -> Result<Kernel> {
        elf::parse(&file)?;
        Ok(Kernel::Elf(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::sample;

    #[test]
    fn a_file_that_is_not_a_kernel_is_rejected() {
        let error = |bytes: &[u8]| KernelImage::identify(sample::file(bytes)).unwrap_err().to_string();
        assert_eq!(error(b""), "the kernel file is empty");
        for bytes in [b"#!/bin/sh\n".as_slice(), b"\x7fEL", &[0; 4096]] {
            assert_eq!(error(bytes), "not a kernel: expected an ELF vmlinux, a bzImage or a unified kernel image");
        }
    }

    #[test]
    fn a_unified_image_is_its_parts() {
        let bzimage = sample::bzimage(sample::LZO);
        let sections: [(&str, &[u8]); 3] = [(".cmdline", b"quiet"), (".initrd", b"070701"), (".linux", &bzimage)];
        let image = KernelImage::identify(sample::file(&sample::unified(&sections))).unwrap();
        assert!(matches!(image.kernel, Kernel::BzImage(_)));
        assert_eq!((image.initrd.unwrap().len_bytes(), image.cmdline.as_str()), (6, "quiet"));
        let error = KernelImage::identify(sample::file(&sample::unified(&[(".linux", b"kernel")]))).unwrap_err();
        assert_eq!(error.to_string(), "the .linux of the unified kernel image is not a bzImage");
    }
}
