//! Opens an arbitrary qcow2 image and executes requests on it, unless it is rejected.
#![no_main]

use std::cell::OnceCell;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use husk::backend::disk::{BlockingDisk, Operation, Qcow2Disk, Request};
use husk::memory::GuestBuffers;
use husk::memory::{self, GuestMemory};
use husk::sys;
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

/// More than the metadata before the data of a valid image of this size.
const IMAGE_BYTES_MAX: usize = 64 << 10;

thread_local! {
    static MEMORY: OnceCell<Arc<GuestMemory>> = const { OnceCell::new() };
}

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    let Some((readonly, bytes)) = bytes.split_first() else { return };
    let bytes = &bytes[..bytes.len().min(IMAGE_BYTES_MAX)];
    let mut file = sys::memory_file(c"fuzz").expect("a file in memory can be had");
    file.write_all(bytes).expect("memory can be had");
    // An attacker can make a sparse file long at no cost.
    file.set_len(1 << 20).expect("memory can be had");
    let again = file.try_clone().expect("descriptors can be had");
    let Ok(mut disk) = open(file, readonly % 2 == 1) else { return };
    let capacity = disk.capacity_bytes() / 512 * 512;
    MEMORY.with(|cell| {
        let memory = cell.get_or_init(|| Arc::new(memory::reserve(1).expect("1 MiB can be had")));
        for at in [0, 512, capacity / 2 / 512 * 512, capacity.saturating_sub(8192)] {
            for operation in operations() {
                ask(&mut disk, memory, operation, at, capacity);
            }
        }
    });
    drop(disk);
    // The image must still be valid.
    open(again, readonly % 2 == 1).expect("it was an image");
});

fn open(file: File, readonly: bool) -> Result<Qcow2Disk, ()> {
    Qcow2Disk::open(file, readonly).map_err(|refusal| assert!(!refusal.to_string().contains('\n'), "{refusal}"))
}

fn operations() -> [Operation; 7] {
    const LEN: u64 = 4096;
    [
        Operation::Read,
        Operation::Write,
        Operation::Flush,
        Operation::Discard { len_bytes: LEN },
        Operation::WriteZeroes { len_bytes: LEN, unmap: false },
        Operation::WriteZeroes { len_bytes: LEN, unmap: true },
        Operation::Read,
    ]
}

fn ask(disk: &mut Qcow2Disk, memory: &Arc<GuestMemory>, operation: Operation, offset_bytes: u64, capacity: u64) {
    // The device validates ranges before requests reach the disk.
    if offset_bytes + 4096 > capacity {
        return;
    }
    let mut buffers = GuestBuffers::new(memory.clone());
    if matches!(operation, Operation::Read | Operation::Write) {
        for (at, len) in [(0x1000, 1024), (0x8000, 3072)] {
            buffers.push(GuestAddress(at), len).expect("it is memory");
        }
    }
    let _ = disk.execute(&mut Request { token: 3, operation, offset_bytes, buffers });
}

/// Writes the initial corpus: valid images, if `qemu-img` is installed to create them.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/qcow2_image"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    for (name, options) in [
        ("small", "cluster_size=512"),
        ("larger", "cluster_size=4096"),
        ("old", "cluster_size=512,compat=0.10"),
        ("wide", "cluster_size=512,refcount_bits=64"),
        ("lazy", "cluster_size=1024,lazy_refcounts=on,refcount_bits=1"),
    ] {
        let image = corpus.join(format!("{name}.partial"));
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", options])
            .arg(&image)
            .arg("200K")
            .status();
        if made.is_ok_and(|status| status.success()) {
            let bytes = [vec![0], fs::read(&image).expect("it was made")].concat();
            fs::write(corpus.join(name), bytes).expect("the corpus can be written");
            fs::remove_file(image).expect("it was made");
        }
    }
}
