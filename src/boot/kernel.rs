//! From an opened file to what kind of kernel it is.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};

use super::bzimage::{self, BzImage};
use super::elf;

/// An opened kernel image, by what its first bytes say. That all of it is well-formed shows when it is loaded.
#[derive(Debug)]
pub enum Kernel {
    /// An ELF image, `vmlinux`.
    Elf(File),
    /// A bzImage: an ELF image that is packed, behind a program that unpacks it.
    BzImage(BzImage),
}

impl Kernel {
    /// An ELF image whose headers are checked here and now.
    pub fn elf(file: File) -> Result<Kernel> {
        elf::parse(&file)?;
        Ok(Kernel::Elf(file))
    }

    /// Looks at `file`'s first bytes, and at all of a bzImage's header.
    pub fn identify(file: File) -> Result<Kernel> {
        let mut magic = [0; 4];
        match file.read_at(&mut magic, 0).context("read kernel")? {
            4 if magic == *b"\x7fELF" => Ok(Kernel::Elf(file)),
            _ if bzimage::is_bzimage(&file)? => Ok(Kernel::BzImage(BzImage::open(file)?)),
            0 => bail!("the kernel file is empty"),
            _ => bail!("not a kernel: neither an ELF vmlinux nor a bzImage"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::sample;

    #[test]
    fn a_file_that_is_no_kernel_is_called_so() {
        let error = |bytes: &[u8]| Kernel::identify(sample::file(bytes)).unwrap_err().to_string();
        assert_eq!(error(b""), "the kernel file is empty");
        for bytes in [b"#!/bin/sh\n".as_slice(), b"\x7fEL", &[0; 4096]] {
            assert_eq!(error(bytes), "not a kernel: neither an ELF vmlinux nor a bzImage");
        }
    }
}
