//! Time from opening /dev/kvm to the first instruction, and from a kernel file to guest memory.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use husk::boot::{self, KernelImage};
use husk::config::MachineConfig;
use husk::layout::VirtioBus;
use husk::machine::Machine;
use husk::timings::{Step, Timings};
use husk::{memory, resources};

use crate::{Target, median, report};

const RUNS: usize = 100;
const KERNEL_MIB: usize = 64;

/// One vCPU and 128 MiB, up to the first KVM_RUN, with a kernel of three instructions.
pub fn first_run() -> Result<()> {
    let config = MachineConfig { kernel: husk_guests::EXIT.into(), memory_mib: 128, ..MachineConfig::default() };
    let mut to_first_run_ms = Vec::new();
    for _ in 0..RUNS {
        let timings = Arc::new(Timings::new(Instant::now()));
        let (resources, _outside) = resources::open(&config)?;
        let mut machine = Machine::build(&config, resources, timings.clone(), || Ok(()), &|| false)?;
        machine.resume();
        let reached = timings.reached(Step::FirstInstruction).context("the machine did not start")?;
        to_first_run_ms.push(reached.as_secs_f64() * 1e3);
    }
    report("open of /dev/kvm to first KVM_RUN, median", median(to_first_run_ms), "ms", Target::Below(1.5));
    Ok(())
}

/// Loads a large ELF kernel from the page cache, compared with a plain read of the same file into fresh memory.
pub fn kernel_load() -> Result<()> {
    let mut file = tempfile::tempfile()?;
    file.write_all(&elf_of(KERNEL_MIB << 20))?;
    let (mut loads, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        let kernel = KernelImage::identify(file.try_clone()?)?.kernel;
        let memory = memory::reserve(256)?;
        let start = Instant::now();
        boot::load(&memory, &kernel, None, "", 1, VirtioBus::Mmio { slots: 1 })?;
        loads.push(megabytes_per_second(start));
        reads.push(plain_read(&file)?);
    }
    let (load, read) = (median(loads), median(reads));
    report("kernel load", load, "MB/s", Target::None);
    report("kernel load, share of a plain read", load / read * 100.0, "%", Target::None);
    Ok(())
}

fn plain_read(mut file: &File) -> Result<f64> {
    use std::io::Seek;
    file.rewind()?;
    let start = Instant::now();
    let mut bytes = Vec::with_capacity(KERNEL_MIB << 20);
    file.take(KERNEL_MIB as u64 * (1 << 20)).read_to_end(&mut bytes)?;
    Ok(megabytes_per_second(start))
}

fn megabytes_per_second(start: Instant) -> f64 {
    (KERNEL_MIB << 20) as f64 / 1e6 / start.elapsed().as_secs_f64()
}

/// An ELF64 executable with one segment at 16 MiB (System V ABI, object files).
fn elf_of(len_bytes: usize) -> Vec<u8> {
    const ADDRESS: u64 = 16 << 20;
    const HEADERS: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2u16, 62].map(u16::to_le_bytes).concat());
    elf.extend(1u32.to_le_bytes());
    elf.extend([ADDRESS, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    elf.extend([1u32, 5].map(u32::to_le_bytes).concat());
    let len = len_bytes as u64;
    elf.extend([HEADERS, ADDRESS, ADDRESS, len, len, 0x1000].map(u64::to_le_bytes).concat());
    elf.resize(HEADERS as usize + len_bytes, 0x90);
    elf
}
