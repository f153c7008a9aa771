//! Identifies, unpacks and loads an arbitrary kernel file into guest memory, or rejects it.
//!
//! Covers: boot decompress.rs
#![no_main]

use std::cell::OnceCell;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use husk::boot::{self, Kernel, KernelImage, Part};
use husk::layout::VirtioBus;
use husk::memory::{self, GuestMemory};
use husk::sys;
use libfuzzer_sys::fuzz_target;

#[path = "../../src/boot/sample.rs"]
mod sample;

const MEMORY_MIB: u64 = 64;

thread_local! {
    static MEMORY: OnceCell<GuestMemory> = const { OnceCell::new() };
}

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    let Ok(KernelImage { kernel, initrd, cmdline }) = KernelImage::identify(file(bytes)) else { return };
    let initrd = initrd.unwrap_or_else(|| Part::whole(file(&[0x5a; 5000])).expect("it was just made"));
    load(&kernel, &initrd, &cmdline);
    if let Kernel::BzImage(image) = kernel
        && image.can_be_unpacked()
    {
        let mut unpacked = file(&[]);
        if image.unpack(&mut unpacked, &mut |_| ()).is_ok()
            && let Ok(kernel) = Kernel::elf(unpacked)
        {
            load(&kernel, &initrd, &cmdline);
        }
    }
});

fn load(kernel: &Kernel, initrd: &Part, cmdline: &str) {
    MEMORY.with(|cell| {
        let memory = cell.get_or_init(|| memory::reserve(MEMORY_MIB).expect("64 MiB can be had"));
        if let Ok(entry) = boot::load(memory, kernel, Some(initrd), cmdline, 2, VirtioBus::Pci) {
            assert!(entry.instruction >= 1 << 20, "{entry:x?}");
            assert!(entry.instruction < MEMORY_MIB << 20, "{entry:x?}");
        }
    });
}

fn file(bytes: &[u8]) -> File {
    let mut file = sys::memory_file(c"fuzz").expect("a file in memory can be had");
    file.write_all(bytes).expect("memory can be written");
    file
}

/// Writes the initial corpus: a small kernel of each kind. Called before the corpus is read.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/kernel_image"));
    let write = |name: &str, bytes: &[u8]| fs::write(corpus.join(name), bytes).expect("the corpus can be written");
    fs::create_dir_all(corpus).expect("the corpus can be made");

    let kernel = sample::kernel(2048);
    write("elf", &kernel);
    let segment = sample::Segment { address: 1 << 20, bytes: b"text", memory_bytes: 4096 };
    let note = sample::note(b"Xen\0", 18, &(1u32 << 20).to_le_bytes());
    write("elf-pvh", &sample::elf(1 << 20, &[segment], Some(&note)));
    write("bzimage-lzo", &sample::bzimage(sample::LZO));
    let bzimage = sample::bzimage(sample::LZO);
    let sections: [(&str, &[u8]); 4] =
        [(".cmdline", b"quiet"), (".initrd", b"070701"), (".profile", b"ID=a"), (".linux", &bzimage)];
    write("unified", &sample::unified(&sections));
    for packer in sample::PACKERS {
        if let Some(payload) = sample::packed(&kernel, packer) {
            let name = packer.split(' ').next().unwrap_or_default();
            write(&format!("bzimage-{name}"), &sample::bzimage(&payload));
        }
    }
}
