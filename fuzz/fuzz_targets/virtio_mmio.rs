//! Arbitrary reads and writes of a guest to a complete block device: registers, rings and requests.
//!
//! Covers: virtio/mmio.rs virtio/session.rs virtio/block/mod.rs virtio/worker.rs
#![no_main]

use std::cell::OnceCell;
use std::fs::{self, File};
use std::path::Path;

use husk::backend::disk::{Blocking, PlainDisk};
use husk::bus::Device;
use husk::config::Rate;
use husk::irq::IrqLine;
use husk::memory::{self, GuestMemory};
use husk::sys;
use husk::virtio::block::request::DiskShape;
use husk::virtio::{MmioTransport, Transport, block, mmio::register::*};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const CAPACITY_BYTES: u64 = 64 << 10;
/// The memory that the input can write to, from address 0.
const MEMORY_BYTES: u64 = 64 << 10;
/// The size of a step: action, width, address and value. An input is a sequence of steps.
const STEP_BYTES: usize = 8;
/// The maximum number of steps: longer sequences find nothing more.
const STEPS_MAX: usize = 256;

thread_local! {
    static HOST: OnceCell<(GuestMemory, File)> = const { OnceCell::new() };
}

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    HOST.with(|cell| {
        let (memory, file) = cell.get_or_init(|| {
            let file = sys::memory_file(c"fuzz").expect("a file in memory can be had");
            file.set_len(CAPACITY_BYTES).expect("memory can be had");
            (memory::reserve(1).expect("1 MiB can be had"), file)
        });
        memory.write_slice(&[0; MEMORY_BYTES as usize], GuestAddress(0)).expect("it is memory");
        let mut transport = transport(memory, file);
        for step in bytes.chunks_exact(STEP_BYTES).take(STEPS_MAX) {
            transport = take(step, transport, memory, file);
        }
    });
});

fn transport(memory: &GuestMemory, file: &File) -> MmioTransport {
    let disk = Blocking::new(PlainDisk::new(file.try_clone().expect("a descriptor can be had"), false));
    let shape = DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: false, block_bytes: 512, physical_block_bytes: 4096 };
    let device = block::device_on(vec![Box::new(disk)], shape, "fuzz", "fuzz", Rate::default());
    let (device, _) = device.expect("a descriptor can be had");
    let irq = IrqLine::new(6).expect("a descriptor can be had");
    MmioTransport::new(device, memory.clone(), irq).expect("a thread can be had")
}

fn take(step: &[u8], transport: MmioTransport, memory: &GuestMemory, file: &File) -> MmioTransport {
    let [what, width, place_low, place_high, value @ ..] = step else { return transport };
    let place = u64::from(u16::from_le_bytes([*place_low, *place_high]));
    let width = usize::from(width % 9);
    let mut data = [0xff; 8];
    data[..value.len()].copy_from_slice(value);
    let data = &mut data[..width];
    match what % 8 {
        0 => transport.read(place, data),
        1 => transport.write(place, data),
        // A 32-bit access to a register.
        2 => transport.write(place % 0x110 & !3, value),
        3 => transport.write(QUEUE_NOTIFY, &[0; 4]),
        4 => drop(memory.write_slice(value, GuestAddress(place))),
        5 => transport.pause(),
        6 => transport.resume(),
        _ => {
            transport.pause();
            let state = transport.save();
            drop(transport);
            let other = self::transport(memory, file);
            other.restore(&state).expect("what was saved can be restored");
            assert_eq!(other.save(), state);
            other.resume();
            return other;
        }
    }
    transport
}

/// Writes the initial corpus: a driver that starts the device and reads a sector.
fn write_seeds() {
    let mut bytes = Vec::new();
    let mut step = |what: u8, place: u64, value: u32| {
        bytes.extend([what, 4]);
        bytes.extend((place as u16).to_le_bytes());
        bytes.extend(value.to_le_bytes());
    };
    for status in [1, 3] {
        step(2, STATUS, status);
    }
    for (select, features) in [(0, 1 << 9 | 3 << 28), (1, 1)] {
        step(2, DRIVER_FEATURES_SEL, select);
        step(2, DRIVER_FEATURES, features);
    }
    step(2, STATUS, 11);
    let (table, available, used, header, data) = (0x1000, 0x2000, 0x3000, 0x4000, 0x5000);
    for (register, value) in [
        (QUEUE_NUM, 16),
        (QUEUE_DESC_LOW, table),
        (QUEUE_DRIVER_LOW, available),
        (QUEUE_DEVICE_LOW, used),
        (QUEUE_READY, 1),
        (STATUS, 15),
    ] {
        step(2, register, value);
    }
    for (at, (address, len, flags, next)) in
        (0..).zip([(header, 16, 1, 1), (data, 512, 3, 2), (header + 16, 1, 2, 0u32)])
    {
        step(4, u64::from(table) + 16 * at, address);
        step(4, u64::from(table) + 16 * at + 8, len);
        step(4, u64::from(table) + 16 * at + 12, flags | next << 16);
    }
    step(4, u64::from(available), 1 << 16);
    step(3, 0, 0);
    step(7, 0, 0);
    step(0, STATUS, 0);
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/virtio_mmio"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    fs::write(corpus.join("read"), &bytes).expect("the corpus can be written");
}
