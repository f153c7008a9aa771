//! States of machines that nobody has saved: each is refused, or a device has it, runs with it, and can be saved and restored
//! again. Diff snapshots with any pages: what they are merged to has exactly these.
//!
//! Covers: machine/state.rs virtio/session.rs virtio/mmio.rs virtio/pci pci device/serial.rs snapshot/merge.rs
#![no_main]

#[path = "../routing.rs"]
mod routing;

use std::cell::OnceCell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use husk::backend::disk::{Blocking, PlainDisk};
use husk::backend::net::{NetBackend, StreamNet};
use husk::bus::Device;
use husk::config::Rate;
use husk::console::output::Output;
use husk::device::{Serial, SerialState};
use husk::exit_latch::ExitLatch;
use husk::irq::IrqLine;
use husk::layout;
use husk::machine::MachineState;
use husk::memory::{self, GuestMemory};
use husk::snapshot;
use husk::sys;
use husk::timings::Timings;
use husk::virtio::block::request::DiskShape;
use husk::virtio::mmio::register::{DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_NOTIFY, STATUS};
use husk::virtio::pci::Slot;
use husk::virtio::{MmioTransport, PciTransport, Transport, TransportState, VirtioDevice, balloon, block, net, rng};
use libfuzzer_sys::fuzz_target;
use routing::Routing;
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

const CAPACITY_BYTES: u64 = 64 << 10;
/// The memory that the input fills, from address 0, where the rings of a mutated state are.
const MEMORY_BYTES: usize = 8 << 10;
/// The size of a change: which value, how, and a value.
const CHANGE_BYTES: usize = 8;
/// The maximum number of changes: more of them find nothing more.
const CHANGES_MAX: usize = 16;
const DEVICES: usize = 4;
/// The kinds of input besides devices: the serial port, and a diff snapshot.
const SERIAL: usize = 2 * DEVICES;
const DIFF: usize = 2 * DEVICES + 1;
const DIFF_PAGES: usize = 64;
const PAGE_BYTES: usize = 4096;

thread_local! {
    static HOST: OnceCell<Host> = const { OnceCell::new() };
}

/// What devices are made of, and what they save before and after a driver has started them.
struct Host {
    memory: GuestMemory,
    disk: File,
    states: Vec<Value>,
    serial: Value,
}

/// A device on a bus. The last bit of a kind is the bus.
enum OnBus {
    Mmio(MmioTransport),
    Pci(PciTransport),
}

impl OnBus {
    fn transport(&self) -> &dyn Transport {
        match self {
            OnBus::Mmio(transport) => transport,
            OnBus::Pci(transport) => transport,
        }
    }
}

impl Host {
    fn new() -> Host {
        let disk = sys::memory_file(c"fuzz").expect("a file in memory can be had");
        disk.set_len(CAPACITY_BYTES).expect("memory can be had");
        let memory = memory::reserve(1).expect("1 MiB can be had");
        let mut host = Host { memory, disk, states: Vec::new(), serial: value(&serial().save()) };
        host.states = (0..2 * DEVICES).map(|kind| host.state(kind)).collect();
        host
    }

    fn device(&self, kind: usize) -> VirtioDevice {
        match kind / 2 {
            0 => {
                let file = self.disk.try_clone().expect("a descriptor can be had");
                let disk = Blocking::new(PlainDisk::new(file, false));
                let (capacity_bytes, block_bytes, physical_block_bytes) = (CAPACITY_BYTES, 512, 4096);
                let shape = DiskShape { capacity_bytes, readonly: false, block_bytes, physical_block_bytes };
                block::device_on(vec![Box::new(disk)], shape, "fuzz", "fuzz", Rate::default()).expect("it can be had").0
            }
            1 => {
                let backend = || {
                    let (ours, _peer) = UnixStream::pair().expect("a socket can be had");
                    Box::new(StreamNet::new(ours).expect("a descriptor can be had")) as Box<dyn NetBackend>
                };
                let backends = vec![backend(), backend()];
                net::device_on(backends, "fuzz", [2, 0, 0, 0, 0, 1], None).expect("a descriptor can be had").0
            }
            2 => {
                let options =
                    balloon::Options { memory_mib: 1, target_mib: 1, deflates_on_oom: true, reports_free_pages: true };
                balloon::device(options).expect("a descriptor can be had").0
            }
            _ => rng::device(),
        }
    }

    fn attach(&self, kind: usize) -> OnBus {
        let (device, memory) = (self.device(kind), self.memory.clone());
        if kind.is_multiple_of(2) {
            let irq = IrqLine::new(6).expect("a descriptor can be had");
            return OnBus::Mmio(MmioTransport::new(device, memory, irq).expect("a thread can be had"));
        }
        let bar_address = layout::PCI_WINDOW as u32;
        let slot = Slot { bar_address, first_gsi: layout::GSI_COUNT, routing: Arc::new(Routing) };
        OnBus::Pci(PciTransport::new(device, memory, slot).expect("a thread can be had"))
    }

    /// What a device has saved once a driver has accepted VERSION_1.
    fn state(&self, kind: usize) -> Value {
        let device = self.attach(kind);
        if let OnBus::Mmio(registers) = &device {
            let write = |register, value: u32| registers.write(register, &value.to_le_bytes());
            write(STATUS, 3);
            write(DRIVER_FEATURES_SEL, 1);
            write(DRIVER_FEATURES, 1);
            write(STATUS, 11);
        }
        value(&device.transport().save())
    }

    /// Restores a device of this kind, and runs it for a moment.
    fn run(&self, kind: usize, state: &TransportState) {
        let device = self.attach(kind);
        let transport = device.transport();
        if transport.restore(state).is_err() {
            return;
        }
        transport.resume();
        if let OnBus::Mmio(registers) = &device {
            (0..3_u32).for_each(|queue| registers.write(QUEUE_NOTIFY, &queue.to_le_bytes()));
        }
        transport.pause();
        let state = transport.save();
        let other = self.attach(kind);
        other.transport().restore(&state).expect("what was saved can be restored");
        assert_eq!(other.transport().save(), state);
    }
}

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    // A text, as it is read from a file.
    let _ = MachineState::decode(bytes);
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let (kind, changes) = (usize::from(*kind) % (DIFF + 1), bytes.chunks_exact(CHANGE_BYTES).take(CHANGES_MAX));
    if kind == DIFF {
        return merge(bytes);
    }
    HOST.with(|cell| {
        let host = cell.get_or_init(Host::new);
        let mut content = [0; MEMORY_BYTES];
        content.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        host.memory.write_slice(&content, GuestAddress(0)).expect("it is memory");
        let mut state = host.states.get(kind).unwrap_or(&host.serial).clone();
        changes.for_each(|step| change(&mut state, step));
        if kind < SERIAL {
            serde_json::from_value(state).into_iter().for_each(|state| host.run(kind, &state));
        } else {
            serde_json::from_value(state).into_iter().for_each(|state| run_serial(&state));
        }
    });
});

fn serial() -> Serial {
    let irq = IrqLine::new(4).expect("a descriptor can be had");
    let exit_latch = Arc::new(ExitLatch::new().expect("a descriptor can be had"));
    let timings = Arc::new(Timings::new(Instant::now()));
    Serial::new(irq, Arc::new(Output::default()), exit_latch, timings).expect("a descriptor can be had").0
}

fn run_serial(state: &SerialState) {
    let port = serial();
    if port.restore(state).is_ok() {
        let saved = port.save();
        let other = serial();
        other.restore(&saved).expect("what was saved can be restored");
        assert_eq!(other.save(), saved);
        let _ = port.offer_input(b"input");
        for offset in 0..8 {
            port.read(offset, &mut [0]);
            port.write(offset, b"\n");
        }
    }
}

/// Merges a diff snapshot: a bitmap of changed pages, and a byte for each page.
fn merge(bytes: &[u8]) {
    let Some((bits, values)) = bytes.split_at_checked(DIFF_PAGES / 8) else { return };
    let file = || sys::memory_file(c"fuzz").expect("a file in memory can be had");
    let (changed, diff, whole) = (file(), file(), file());
    changed.write_all_at(bits, 0).expect("memory can be had");
    whole.write_all_at(&[1; DIFF_PAGES * PAGE_BYTES], 0).expect("memory can be had");
    diff.set_len((DIFF_PAGES * PAGE_BYTES) as u64).expect("memory can be had");
    for (page, value) in values.iter().enumerate().take(DIFF_PAGES).filter(|(_, value)| **value != 0) {
        diff.write_all_at(&[*value; PAGE_BYTES], (page * PAGE_BYTES) as u64).expect("memory can be had");
    }
    snapshot::apply(&changed, &diff, &whole).expect("files of the right size can be merged");
    let mut merged = vec![0; DIFF_PAGES * PAGE_BYTES];
    whole.read_exact_at(&mut merged, 0).expect("it is as long as before");
    for (page, content) in merged.chunks_exact(PAGE_BYTES).enumerate() {
        let is_changed = bits[page / 8] >> (page % 8) & 1 == 1;
        let expected = if is_changed { values.get(page).copied().unwrap_or(0) } else { 1 };
        assert!(content.iter().all(|byte| *byte == expected), "page {page}");
    }
}

fn value(state: &impl serde::Serialize) -> Value {
    serde_json::to_value(state).expect("it is plain data")
}

/// Changes one of the values in `state`.
fn change(state: &mut Value, step: &[u8]) {
    let [which, which_high, how, shift, number @ ..] = step else { return };
    let mut left = usize::from(u16::from_le_bytes([*which, *which_high]));
    let count = count(state);
    left %= count.max(1);
    let number = number.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)) << (shift % 64);
    if let Some(found) = nth(state, &mut left) {
        match (found, how % 4) {
            (Value::Array(values), 0) => drop(values.pop()),
            (Value::Array(values), 1) => values.extend(values.last().cloned()),
            (Value::Array(values), _) => values.resize(number as usize % 1000, Value::from(number as u8)),
            (Value::Bool(flag), _) => *flag = !*flag,
            (found, 3) => *found = Value::Null,
            (found, _) => *found = Value::from(number),
        }
    }
}

fn count(value: &Value) -> usize {
    match value {
        Value::Object(fields) => fields.values().map(count).sum(),
        Value::Array(values) => 1 + values.iter().map(count).sum::<usize>(),
        _ => 1,
    }
}

/// The array, number or flag with this index.
fn nth<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
    if let Value::Object(fields) = value {
        return fields.values_mut().find_map(|field| nth(field, left));
    }
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(values) => values.iter_mut().find_map(|value| nth(value, left)),
        _ => None,
    }
}

/// Writes the initial corpus: a change of every value of every device to some numbers, and a text.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/snapshot"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let host = Host::new();
    for kind in 0..2 * DEVICES + 1 {
        let values = count(host.states.get(kind).unwrap_or(&host.serial)) as u16;
        let change = |which: u16, how: u8, number: u8| {
            let [low, high] = which.to_le_bytes();
            [low, high, how, 0, 0, 0, 0, number]
        };
        for (name, how, number) in [("zero", 2, 0), ("driver", 2, 15), ("longer", 1, 0), ("shorter", 0, 0)] {
            // As many as an input may have, from a place that differs.
            let first = u16::from(how) * 5 + u16::from(number);
            let changes = (0..CHANGES_MAX as u16).flat_map(|step| change((first + step) % values, how, number));
            let bytes: Vec<u8> = [kind as u8].into_iter().chain(changes).collect();
            fs::write(corpus.join(format!("{name}{kind}")), bytes).expect("the corpus can be written");
        }
    }
    let bits = [0b1010_0001; DIFF_PAGES / 8];
    let values: Vec<u8> = (0..DIFF_PAGES as u8).map(|page| page % 3 * page).collect();
    fs::write(corpus.join("diff"), [&[DIFF as u8], &bits[..], &values].concat()).expect("the corpus can be written");
    let text = br#"{"transports":[],"serial":{},"vm":{"clock":0},"vcpus":[]}"#;
    fs::write(corpus.join("text"), text).expect("the corpus can be written");
}
