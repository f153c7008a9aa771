//! Arbitrary reads and writes of a guest to a complete network device on PCI: configuration space, BAR, MSI-X and rings.
//!
//! Covers: pci virtio/pci virtio/session.rs
#![no_main]

#[path = "../routing.rs"]
mod routing;

use std::cell::OnceCell;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use husk::backend::net::StreamNet;
use husk::bus::Device;
use husk::layout;
use husk::memory::{self, GuestMemory};
use husk::pci::{Ecam, Function, Functions, Ports, Window};
use husk::virtio::pci::{Slot, bar, common::field};
use husk::virtio::{PciTransport, Transport, net};
use libfuzzer_sys::fuzz_target;
use routing::Routing;
use vm_memory::{Bytes, GuestAddress};

/// The memory that the input can write to, from address 0.
const MEMORY_BYTES: u64 = 64 << 10;
/// The size of a step: action, width, address and value. An input is a sequence of steps.
const STEP_BYTES: usize = 8;
/// The maximum number of steps: longer sequences find nothing more.
const STEPS_MAX: usize = 256;
/// The device's registers in ECAM: those of device 1.
const CONFIG: u64 = 1 << 15;

thread_local! {
    static MEMORY: OnceCell<GuestMemory> = const { OnceCell::new() };
}

/// A function and the three ways to reach it.
struct Machine {
    transport: Arc<PciTransport>,
    ports: Ports,
    ecam: Ecam,
    window: Window,
}

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    MEMORY.with(|cell| {
        let memory = cell.get_or_init(|| memory::reserve(1).expect("1 MiB can be had"));
        memory.write_slice(&[0; MEMORY_BYTES as usize], GuestAddress(0)).expect("it is memory");
        let mut machine = machine(memory);
        for step in bytes.chunks_exact(STEP_BYTES).take(STEPS_MAX) {
            machine = take(step, machine, memory);
        }
    });
});

fn machine(memory: &GuestMemory) -> Machine {
    let (ours, _peer) = UnixStream::pair().expect("a socket can be had");
    let backend = Box::new(StreamNet::new(ours).expect("a descriptor can be had"));
    let (device, _) = net::device_on(vec![backend], "fuzz", [2, 0, 0, 0, 0, 1], None).expect("a descriptor can be had");
    let bar_address = layout::PCI_WINDOW as u32;
    let slot = Slot { bar_address, first_gsi: layout::GSI_COUNT, routing: Arc::new(Routing) };
    let transport = Arc::new(PciTransport::new(device, memory.clone(), slot).expect("a thread can be had"));
    let functions = Functions::new(vec![transport.clone() as Arc<dyn Function>]);
    Machine {
        transport,
        ports: Ports::new(functions.clone()),
        ecam: Ecam(functions.clone()),
        window: Window { functions, base: layout::PCI_WINDOW },
    }
}

fn take(step: &[u8], machine: Machine, memory: &GuestMemory) -> Machine {
    let [what, width, place_low, place_high, value @ ..] = step else { return machine };
    let place = u64::from(u16::from_le_bytes([*place_low, *place_high]));
    let width = usize::from(width % 9);
    let mut data = [0xff; 8];
    data[..value.len()].copy_from_slice(value);
    let data = &mut data[..width];
    match what % 10 {
        0 => machine.window.read(place, data),
        1 => machine.window.write(place, data),
        2 => machine.ecam.read(CONFIG + place % 0x1100, data),
        3 => machine.ecam.write(CONFIG + place % 0x1100, data),
        4 => machine.ports.read(place % 8, data),
        5 => machine.ports.write(place % 8, data),
        6 => drop(memory.write_slice(value, GuestAddress(place))),
        7 => machine.transport.pause(),
        8 => machine.transport.resume(),
        _ => {
            machine.transport.pause();
            let state = machine.transport.save();
            drop(machine);
            let other = self::machine(memory);
            other.transport.restore(&state).expect("what was saved can be restored");
            assert_eq!(other.transport.save(), state);
            other.transport.resume();
            return other;
        }
    }
    machine
}

/// Writes the initial corpus: a driver that finds the function, enables its interrupts and starts the device.
fn write_seeds() {
    let mut bytes = Vec::new();
    let mut step = |what: u8, width: u8, place: u64, value: u32| {
        bytes.extend([what, width]);
        bytes.extend((place as u16).to_le_bytes());
        bytes.extend(value.to_le_bytes());
    };
    step(5, 4, 0, 1 << 31 | 1 << 11);
    step(4, 4, 4, 0);
    for (register, width, value) in
        [(0x04, 2, 0), (0x10, 4, !0), (0x10, 4, 0xd000_0000), (0x04, 2, 6), (0x42, 2, 0xc000)]
    {
        step(3, width, register, value);
    }
    for vector in 0..3 {
        for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x20 + vector), (12, 0)] {
            step(1, 4, bar::MSIX_TABLE + 16 * u64::from(vector) + at, value);
        }
    }
    step(3, 2, 0x42, 0x8000);
    for (register, width, value) in [
        (field::DEVICE_STATUS, 1, 3),
        (field::DRIVER_FEATURE_SELECT, 4, 1),
        (field::DRIVER_FEATURE, 4, 1),
        (field::DEVICE_STATUS, 1, 11),
        (field::CONFIG_MSIX_VECTOR, 2, 0),
    ] {
        step(1, width, register, value);
    }
    for queue in 0..2 {
        let base = 0x1000 + 0x4000 * queue;
        for (register, width, value) in [
            (field::QUEUE_SELECT, 2, queue),
            (field::QUEUE_SIZE, 2, 16),
            (field::QUEUE_MSIX_VECTOR, 2, 1 + queue),
            (field::QUEUE_DESC, 4, base),
            (field::QUEUE_DRIVER, 4, base + 0x1000),
            (field::QUEUE_DEVICE, 4, base + 0x2000),
            (field::QUEUE_ENABLE, 2, 1),
        ] {
            step(1, width, register, value);
        }
    }
    step(1, 1, field::DEVICE_STATUS, 15);
    step(1, 4, bar::NOTIFY + 4, 1);
    step(9, 0, 0, 0);
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/virtio_pci"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    fs::write(corpus.join("start"), &bytes).expect("the corpus can be written");
}
