//! Opens an arbitrary qcow2 image, alone, over a backing file, or as one, and executes requests on it, unless it is rejected.
//!
//! Covers: backend/disk/qcow2
#![no_main]

use std::cell::OnceCell;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use husk::backend::disk::{Backing, BlockingDisk, Operation, Qcow2Disk, Request};
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

/// How an image is used, chosen by the first byte of the input.
#[derive(Clone, Copy, PartialEq)]
enum Use {
    Alone,
    Readonly,
    OverRaw,
    /// Over itself, which is a chain of two images if it has a backing file.
    OverItself,
}

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let choice = [Use::Alone, Use::Readonly, Use::OverRaw, Use::OverItself][usize::from(choice % 4)];
    let bytes = &bytes[..bytes.len().min(IMAGE_BYTES_MAX)];
    let file = image(bytes);
    let again = file.try_clone().expect("descriptors can be had");
    let Ok(mut disk) = open(file, bytes, choice) else { return };
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
    open(again, bytes, choice).expect("it was an image");
});

/// A file with this content.
fn image(bytes: &[u8]) -> File {
    let mut file = sys::memory_file(c"fuzz").expect("a file in memory can be had");
    file.write_all(bytes).expect("memory can be had");
    // An attacker can make a sparse file long at no cost.
    file.set_len(1 << 20).expect("memory can be had");
    file
}

fn open(file: File, bytes: &[u8], choice: Use) -> Result<Qcow2Disk, ()> {
    let check = |refusal: husk::backend::disk::Refusal| {
        let line = refusal.to_string();
        assert!(!line.contains(char::is_control), "{line:?}");
    };
    let raw = || Backing::raw(image(bytes)).expect("its size can be had");
    let backing = match choice {
        Use::Alone | Use::Readonly => None,
        Use::OverRaw => Some(raw()),
        Use::OverItself => Some(Backing::qcow2(image(bytes), Some(raw())).map_err(check)?),
    };
    Qcow2Disk::open(file, choice == Use::Readonly, backing).map_err(check)
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
    for (name, choice, options) in [
        ("small", Use::Alone, "cluster_size=512"),
        ("larger", Use::Alone, "cluster_size=4096"),
        ("old", Use::Alone, "cluster_size=512,compat=0.10"),
        ("wide", Use::Alone, "cluster_size=512,refcount_bits=64"),
        ("lazy", Use::Alone, "cluster_size=1024,lazy_refcounts=on,refcount_bits=1"),
        // The backing file is not opened.
        ("over-raw", Use::OverRaw, "cluster_size=512,backing_file=base,backing_fmt=raw"),
        ("over-itself", Use::OverItself, "cluster_size=4096,backing_file=base,backing_fmt=qcow2"),
    ] {
        let words = ["create", "-q", "-u", "-f", "qcow2", "-o", options];
        seed(corpus, name, choice, &words, &["200K"]);
    }
    // Compressible, so that there are clusters of both types.
    let text = corpus.join("text.partial");
    fs::write(&text, b"text".repeat(8 << 10)).expect("the corpus can be written");
    for (name, kind) in [("deflate", "zlib"), ("zstd", "zstd")] {
        let options = format!("cluster_size=4096,compression_type={kind}");
        let text = text.to_str().expect("it is text");
        let words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, text];
        seed(corpus, name, Use::Alone, &words, &[]);
    }
    let _ = fs::remove_file(text);
}

/// Writes the image that `qemu-img` makes, given these words before and after its path.
fn seed(corpus: &Path, name: &str, choice: Use, before: &[&str], after: &[&str]) {
    let image = corpus.join(format!("{name}.partial"));
    let made = Command::new("qemu-img").args(before).arg(&image).args(after).status();
    if made.is_ok_and(|status| status.success()) {
        let bytes = [vec![choice as u8], fs::read(&image).expect("it was made")].concat();
        fs::write(corpus.join(name), bytes).expect("the corpus can be written");
        fs::remove_file(image).expect("it was made");
    }
}
