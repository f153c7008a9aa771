//! The contract of all virtio devices, tested on each of them through [`contract`].

use std::cell::RefCell;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Mutex;

use vm_memory::{Bytes, GuestAddress};

use super::block::request::DiskShape;
use super::mmio::register::*;
use super::test_driver::{BUFFERS, BUSES, Bus, Driver, INDIRECT, NEXT, WRITE, wait_for};
use super::{
    Chain, ConfigSpace, F_EVENT_IDX, F_VERSION_1, Progress, QueueGroup, QueueHandler, RingError, TransportState,
    VirtioDevice, Virtqueue, balloon, block, net, rng, vsock,
};
use crate::backend::disk::{Blocking, DiskBackend, PlainDisk, Shortcuts, UringDisk};
use crate::backend::net::{NetBackend, StreamNet};
use crate::config::Rate;
use crate::config::VsockConfig;
use crate::resources;
use crate::test_log::logged;

/// Tests every rule on the devices created by `make_device`.
pub fn contract(make_device: impl Fn() -> VirtioDevice) {
    for bus in BUSES {
        stopping_twice_is_stopping_once(bus, &make_device);
        save_then_restore_is_identity(bus, &make_device);
        reset_forgets(bus, &make_device);
        features_have_what_they_need(bus, &make_device);
        garbage_on_registers_never_panics(bus, &make_device);
        garbage_on_rings_never_panics(bus, &make_device);
    }
}

fn started(bus: Bus, make_device: &impl Fn() -> VirtioDevice) -> Driver {
    let mut driver = Driver::on(bus, make_device());
    driver.start();
    driver
}

fn stopping_twice_is_stopping_once(bus: Bus, make_device: &impl Fn() -> VirtioDevice) {
    let driver = started(bus, make_device);
    driver.transport.pause();
    let once = driver.transport.save();
    driver.transport.pause();
    assert_eq!(driver.transport.save(), once);
    driver.transport.resume();
    driver.transport.resume();
    assert_eq!(driver.transport.save(), once);
    let fresh = Driver::on(bus, make_device());
    fresh.transport.pause();
    fresh.transport.resume();
    assert_eq!(fresh.read(STATUS), 0);
}

fn save_then_restore_is_identity(bus: Bus, make_device: &impl Fn() -> VirtioDevice) {
    for driver in [Driver::on(bus, make_device()), started(bus, make_device)] {
        driver.write(QUEUE_SEL, 1);
        driver.write(DEVICE_FEATURES_SEL, 1);
        let state = driver.transport.save();
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<TransportState>(&json).unwrap(), state);
        let other = driver.moved_to(make_device());
        assert_eq!(other.transport.save(), state);
        other.transport.resume();
        assert_eq!(other.transport.save(), state);
        assert_eq!(other.read(DEVICE_FEATURES), 1);
    }
}

fn reset_forgets(bus: Bus, make_device: &impl Fn() -> VirtioDevice) {
    let fresh = Driver::on(bus, make_device()).transport.save();
    let driver = started(bus, make_device);
    driver.write(QUEUE_SEL, 7);
    driver.transport.write(CONFIG, &[0xa5; 64]);
    driver.write(STATUS, 0);
    assert_eq!(driver.transport.save(), fresh);
    driver.write(STATUS, 0);
    assert_eq!(driver.transport.save(), fresh);
}

fn features_have_what_they_need(bus: Bus, make_device: &impl Fn() -> VirtioDevice) {
    let device = make_device();
    let needs: Vec<_> = device.feature_needs.iter().filter(|need| device.features & need.feature != 0).collect();
    let all = device.features | F_VERSION_1;
    let driver = Driver::on(bus, device);
    assert_eq!(driver.negotiate(all), 11, "what is offered may be accepted");
    for need in needs {
        assert_eq!(driver.negotiate(need.feature | F_VERSION_1), 3, "{need:?}");
        assert_eq!(driver.negotiate(all & !need.any_of), 3, "{need:?}");
        let mut state = driver.transport.save();
        let session = state.session();
        (session.status, session.driver_features) = (11, need.feature | F_VERSION_1);
        assert!(driver.transport.restore(&state).is_err(), "{need:?}");
    }
    // Whatever its status says: a saved driver may claim to run without a check of its features.
    for status in [11, 15, 7, 4] {
        let mut state = driver.transport.save();
        let session = state.session();
        (session.status, session.driver_features) = (status, all | 1 << 63);
        assert!(driver.transport.restore(&state).is_err(), "status {status}");
        let session = state.session();
        (session.driver_features, session.driver_features_beyond) = (all, true);
        assert!(driver.transport.restore(&state).is_err(), "status {status}");
    }
}

fn garbage_on_registers_never_panics(bus: Bus, make_device: &impl Fn() -> VirtioDevice) {
    let mut random = Random(7);
    for _ in 0..20 {
        let driver = started(bus, make_device);
        for _ in 0..500 {
            let offset = random.below(0x180);
            let offset = if random.below(4) == 0 { offset } else { offset & !3 };
            let value = random.small_or_wild();
            let len = if random.below(4) == 0 { random.below(9) as usize } else { 4 };
            let mut data = vec![0xff; len];
            driver.transport.read(offset, &mut data);
            driver.transport.write(offset, &value.to_le_bytes()[..len]);
        }
        driver.transport.pause();
        let _ = driver.moved_to(make_device()).transport.save();
    }
}

fn garbage_on_rings_never_panics(bus: Bus, make_device: &impl Fn() -> VirtioDevice) {
    let mut random = Random(11);
    for _ in 0..100 {
        let mut driver = started(bus, make_device);
        for queue in 0..driver.transport.doorbells().len() as u32 {
            let size = driver.size(queue);
            for index in 0..size {
                let address = if random.below(8) == 0 { random.next() } else { BUFFERS - 64 + random.below(1 << 21) };
                let len = if random.below(8) == 0 { random.next() as u32 } else { random.below(0x2000) as u32 };
                let next = if random.below(8) == 0 { random.next() as u16 } else { index + 1 };
                let flags = [NEXT, WRITE, NEXT | WRITE, NEXT, INDIRECT, random.next() as u16];
                let flags = flags[random.below(flags.len() as u64) as usize];
                driver.descriptor(queue, index, address, len, flags, next);
                driver.descriptor_at(BUFFERS + 16 * random.below(64), address, len, flags, next);
                let request = [random.below(16) as u32, 0, random.below(64) as u32, 0];
                driver.memory.write_obj(request, GuestAddress(BUFFERS + 16 * random.below(1 << 12))).unwrap();
            }
            for _ in 0..random.below(32) {
                let head = random.below(u64::from(size) + 1) as u16;
                driver.offer(queue, head);
                driver.notify(queue);
            }
            if random.below(4) == 0 {
                driver.set_available_index(queue, random.next() as u16);
                driver.notify(queue);
            }
        }
        driver.transport.pause();
        driver.start();
    }
}

/// xorshift64, with the same sequence in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn small_or_wild(&mut self) -> u64 {
        if self.below(2) == 0 { self.below(16) } else { self.next() }
    }
}

#[test]
fn the_entropy_device_keeps_the_contract() {
    contract(rng::device);
}

#[test]
fn the_block_device_keeps_the_contract() {
    let shape = DiskShape { capacity_bytes: 1 << 20, readonly: false, block_bytes: 512, physical_block_bytes: 4096 };
    let slow = Rate { ops_per_second: Some(1000), ..Rate::default() };
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(shape.capacity_bytes).unwrap();
        PlainDisk::new(file, false)
    };
    let device = |disk: Box<dyn DiskBackend>| block::device_on(vec![disk], shape, "disk", "", slow).unwrap().0;
    contract(|| device(Box::new(Blocking::new(file()))));
    for shortcuts in [Shortcuts::Allowed, Shortcuts::Never] {
        contract(|| device(Box::new(UringDisk::new(file(), shortcuts).unwrap())));
    }
    contract(|| {
        let file = file();
        let disk = |_| Box::new(UringDisk::new(file.clone(), Shortcuts::Never).unwrap()) as Box<dyn DiskBackend>;
        block::device_on((0..3).map(disk).collect(), shape, "disk", "", slow).unwrap().0
    });
}

#[test]
fn the_socket_device_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    contract(|| {
        let socket = dir.path().join("v.sock");
        // The previous socket may still exist: the contract moves a driver between devices.
        let _ = std::fs::remove_file(&socket);
        vsock::device(resources::vsock::open(&VsockConfig { socket, cid: 3 }).unwrap()).unwrap()
    });
}

#[test]
fn the_balloon_keeps_the_contract() {
    contract(|| {
        let options =
            balloon::Options { memory_mib: 64, target_mib: 64, deflates_on_oom: true, reports_free_pages: true };
        balloon::device(options).unwrap().0
    });
}

#[test]
fn the_network_device_keeps_the_contract() {
    let peers = RefCell::new(Vec::new());
    contract(|| {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        for len in [60_usize, 1514, 9000, 60_000] {
            peer.write_all(&[&(len as u32).to_be_bytes()[..], &vec![1; len]].concat()).unwrap();
        }
        let device =
            net::device_on(vec![Box::new(StreamNet::new(ours).unwrap())], "net", [2, 0, 0, 0, 0, 1], None).unwrap().0;
        // The guest may send anything at any rate without losing the peer.
        peer.set_nonblocking(true).unwrap();
        peers.borrow_mut().push(peer);
        device
    });
}

#[test]
fn the_network_device_with_several_pairs_keeps_the_contract() {
    let peers = RefCell::new(Vec::new());
    contract(|| {
        let backend = |_| -> Box<dyn NetBackend> {
            let (ours, mut peer) = UnixStream::pair().unwrap();
            peer.write_all(&[&1514_u32.to_be_bytes()[..], &[1; 1514]].concat()).unwrap();
            peers.borrow_mut().push(peer);
            Box::new(StreamNet::new(ours).unwrap())
        };
        net::device_on((0..3).map(backend).collect(), "net", [2, 0, 0, 0, 0, 1], None).unwrap().0
    });
}

/// A device that holds its requests until it is drained, or until a turn with `release` set.
#[derive(Default)]
struct HoldingHandler {
    chains: Arc<Mutex<Vec<u16>>>,
    release: bool,
}

impl QueueHandler for HoldingHandler {
    fn start(&mut self, _features: u64) {}

    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        let mut chain = Chain::default();
        while queues[index].pop(&mut chain)? {
            self.chains.lock().unwrap().push(chain.head());
        }
        if self.release {
            self.drain(queues)?;
        }
        Ok(Progress::Drained)
    }

    fn drain(&mut self, queues: &mut [Virtqueue]) -> Result<(), RingError> {
        self.chains.lock().unwrap().drain(..).try_for_each(|head| queues[0].push(head, 1))
    }
}

fn device_around(handler: impl QueueHandler + 'static) -> VirtioDevice {
    VirtioDevice {
        device_type: 63,
        name: "test".to_owned(),
        features: 0,
        feature_needs: &[],
        config: Arc::new(ConfigSpace::new(vec![1, 2, 3, 4], 2..4)),
        queue_groups: vec![QueueGroup { sizes: vec![8], handler: Box::new(handler) }],
    }
}

#[test]
fn a_device_that_holds_requests_keeps_the_contract() {
    contract(|| device_around(HoldingHandler::default()));
}

/// Returns a driver with three requests that the device has taken but not completed.
fn three_in_flight(bus: Bus) -> Driver {
    let handler = HoldingHandler::default();
    let chains = handler.chains.clone();
    let mut driver = Driver::on(bus, device_around(handler));
    driver.start();
    for _ in 0..3 {
        let head = driver.chain(0, &[(BUFFERS, 1, WRITE)]);
        driver.offer(0, head);
    }
    driver.notify(0);
    wait_for(|| chains.lock().unwrap().len() == 3);
    assert_eq!(driver.used_index(0), 0);
    driver
}

#[test]
fn a_pause_completes_what_is_in_flight_and_interrupts() {
    for bus in BUSES {
        let driver = three_in_flight(bus);
        driver.transport.pause();
        assert_eq!(driver.used_index(0), 3);
        assert_eq!(driver.read(INTERRUPT_STATUS), 1);
        assert_eq!(driver.take_interrupts(), 1, "one interrupt for three requests");
    }
}

#[test]
fn a_reset_completes_what_is_in_flight_and_nothing_after() {
    for bus in BUSES {
        let driver = three_in_flight(bus);
        driver.write(STATUS, 0);
        assert_eq!(driver.used_index(0), 3);
        assert_eq!(driver.read(INTERRUPT_STATUS), 0);
        driver.memory.write_slice(&[0; 0x1_0000], GuestAddress(0x1_0000)).unwrap();
        driver.transport.pause();
        assert_eq!(driver.used_index(0), 0, "written after the reset");
    }
}

#[test]
fn a_restored_device_starts_where_the_saved_one_left() {
    for bus in BUSES {
        let mut driver = three_in_flight(bus);
        driver.transport.pause();
        // Made available while the device is stopped, with no later doorbell.
        for _ in 0..2 {
            let head = driver.chain(0, &[(BUFFERS, 1, WRITE)]);
            driver.offer(0, head);
        }
        let mut driver = driver.moved_to(device_around(HoldingHandler { release: true, ..HoldingHandler::default() }));
        assert_eq!(driver.used_index(0), 3);
        driver.transport.resume();
        let heads: Vec<u16> = (0..5).map(|_| driver.used(0).0).collect();
        assert_eq!(heads, [0, 1, 2, 3, 4]);
    }
}

#[test]
fn a_restored_interrupt_is_raised_again() {
    for bus in BUSES {
        let driver = three_in_flight(bus);
        driver.transport.pause();
        let driver = driver.moved_to(device_around(HoldingHandler::default()));
        assert_eq!(driver.take_interrupts(), 0);
        driver.transport.resume();
        // On PCI, changes of the configuration have an interrupt of their own, which is raised as well.
        assert!(driver.take_interrupts() > 0, "{bus:?}");
        assert_eq!(driver.read(INTERRUPT_STATUS), 1);
    }
}

fn releasing() -> VirtioDevice {
    device_around(HoldingHandler { release: true, ..HoldingHandler::default() })
}

#[test]
fn interrupts_that_the_driver_does_not_want_are_not_raised() {
    for bus in BUSES {
        for (mask, name) in [(F_VERSION_1, "flag"), (F_EVENT_IDX, "used_event")] {
            let mut driver = Driver::on(bus, releasing());
            driver.start_with(mask);
            if driver.event_idx {
                driver.set_used_event(0, 1);
            } else {
                driver.set_available_flags(0, 1);
            }
            driver.transact(0, &[(BUFFERS, 1, WRITE)]);
            driver.transport.pause();
            assert_eq!(driver.take_interrupts(), 0, "{name}");
            driver.transport.resume();
            driver.set_available_flags(0, 0);
            driver.transact(0, &[(BUFFERS, 1, WRITE)]);
            driver.transport.pause();
            assert_eq!(driver.take_interrupts(), 1, "{name}");
        }
    }
}

#[test]
fn broken_rings_are_repaired_by_a_reset() {
    type Break = (&'static str, fn(&mut Driver));
    let breaks: [Break; 8] = [
        ("index beyond the ring", |driver| driver.set_available_index(0, 9)),
        ("head beyond the table", |_| {}),
        ("next beyond the table", |driver| driver.descriptor(0, 0, BUFFERS, 1, NEXT, 8)),
        ("a chain without an end", |driver| driver.descriptor(0, 0, BUFFERS, 1, NEXT, 0)),
        ("readable behind writable", |driver| {
            driver.chain(0, &[(BUFFERS, 1, WRITE), (BUFFERS, 1, 0)]);
        }),
        ("a table of odd length", |driver| driver.descriptor(0, 0, BUFFERS, 17, INDIRECT, 0)),
        ("a table outside of memory", |driver| driver.descriptor(0, 0, 1 << 50, 16, INDIRECT, 0)),
        ("a table in a table", |driver| {
            driver.descriptor(0, 0, BUFFERS, 16, INDIRECT, 0);
            driver.descriptor_at(BUFFERS, BUFFERS, 16, INDIRECT, 0);
        }),
    ];
    for (name, break_ring) in breaks {
        let mut driver = Driver::new(VirtioDevice { name: name.to_owned(), ..releasing() });
        driver.start();
        break_ring(&mut driver);
        if name != "index beyond the ring" {
            driver.offer(0, if name == "head beyond the table" { 8 } else { 0 });
        }
        driver.notify(0);
        driver.wait_for_needs_reset();
        wait_for(|| driver.read(INTERRUPT_STATUS) == 2);
        assert_eq!(driver.read(STATUS), 0x4f, "{name}");
        // Nothing is served, even across a pause.
        driver.transport.pause();
        assert_eq!(logged(&format!("{name}: device needs a reset: ")).len(), 1, "{name}");
        driver.transport.resume();
        driver.notify(0);
        assert_eq!(driver.used_index(0), 0, "{name}");
        driver.start();
        assert_eq!(driver.transact(0, &[(BUFFERS, 1, WRITE)]), 1, "{name}");
    }
}

#[test]
fn a_table_of_descriptors_is_followed() {
    let mut driver = Driver::new(releasing());
    driver.start();
    driver.descriptor(0, 0, BUFFERS, 32, INDIRECT, 0);
    driver.descriptor_at(BUFFERS, BUFFERS + 0x1000, 1, NEXT, 1);
    driver.descriptor_at(BUFFERS + 16, BUFFERS + 0x1000, 1, WRITE, 0);
    driver.offer(0, 0);
    driver.notify(0);
    assert_eq!(driver.used(0), (0, 1));
}

#[test]
fn a_busy_driver_does_not_prevent_a_stop() {
    let mut driver = Driver::new(rng::device());
    driver.start();
    let size = driver.size(0);
    for _ in 0..size {
        let head = driver.chain(0, &[(BUFFERS, 64 << 10, WRITE)]);
        driver.offer(0, head);
    }
    let (memory, ended) = (driver.memory.clone(), Arc::new(Mutex::new(false)));
    let available = GuestAddress(0x1_4002);
    let (still, flag) = (Arc::clone(&ended), std::sync::atomic::Ordering::SeqCst);
    let feeder = std::thread::spawn(move || {
        while !*still.lock().unwrap() {
            let used: u16 = memory.load(GuestAddress(0x1_8002), flag).unwrap();
            memory.store(used.wrapping_add(size), available, flag).unwrap();
        }
    });
    driver.notify(0);
    wait_for(|| driver.used_index(0) > size);
    driver.transport.pause();
    *ended.lock().unwrap() = true;
    feeder.join().unwrap();
    assert_eq!(driver.read(STATUS), 15);
}
