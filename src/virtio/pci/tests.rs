//! Tests of the transport that are not of a device: see `contract.rs` for those.

use super::common::field::*;
use super::*;
use crate::irq::MsiMessage;
use crate::memory;
use crate::virtio::rng;
use crate::virtio::test_driver::{MESSAGE_CONTROL, TestRouting};

const FIRST_GSI: u32 = 24;
const BAR: u64 = layout::PCI_WINDOW + layout::PCI_BAR_BYTES;

/// A function on the bus of `routing`.
fn function_at(bar_address: u64, routing: &Arc<TestRouting>) -> PciTransport {
    let slot = Slot { bar_address: bar_address as u32, first_gsi: FIRST_GSI, routing: routing.clone() };
    PciTransport::new(rng::device(), memory::reserve(4).unwrap(), slot).unwrap()
}

/// An entropy device, whose only queue is source 0; source 1 are changes of the configuration.
fn function() -> (PciTransport, Arc<TestRouting>) {
    let routing = Arc::new(TestRouting::default());
    (function_at(BAR, &routing), routing)
}

fn config<const N: usize>(function: &PciTransport, offset: u64) -> [u8; N] {
    let mut data = [0xff; N];
    function.read_config(offset, &mut data);
    data
}

fn read<const N: usize>(function: &PciTransport, offset: u64) -> [u8; N] {
    let mut data = [0xff; N];
    function.read_bar(offset, &mut data);
    data
}

/// Writes an entry of the table, double word by double word as drivers do.
fn write_entry(function: &PciTransport, vector: u64, message: MsiMessage, masked: bool) {
    let words = [message.address as u32, (message.address >> 32) as u32, message.data, masked.into()];
    for (at, word) in (0..).step_by(4).zip(words) {
        function.write_bar(bar::MSIX_TABLE + 16 * vector + at, &word.to_le_bytes());
    }
}

const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_1000, data: 0x4023 };

/// A function with both sources at vector 0, which is unmasked.
fn with_vector() -> (PciTransport, Arc<TestRouting>) {
    let (function, routing) = function();
    function.write_config(MESSAGE_CONTROL, &0x8000_u16.to_le_bytes());
    write_entry(&function, 0, MESSAGE, false);
    for field in [CONFIG_MSIX_VECTOR, QUEUE_MSIX_VECTOR] {
        function.write_bar(bar::COMMON + field, &[0, 0]);
    }
    (function, routing)
}

fn connected(routing: &TestRouting) -> Vec<u32> {
    routing.connected.lock().unwrap().keys().copied().collect()
}

/// Raises an interrupt of the queue, as its worker does.
fn raise(function: &PciTransport) {
    use crate::virtio::Interrupt;
    function.interrupt.queue_used(0);
}

/// The capabilities, in order: ID, offset.
fn capabilities(function: &PciTransport) -> Vec<(u8, u64)> {
    let mut list = Vec::new();
    let [mut at] = config(function, 0x34);
    while at != 0 {
        let [id, next] = config(function, at.into());
        list.push((id, u64::from(at)));
        at = next;
    }
    list
}

#[test]
fn a_driver_finds_the_device_and_its_structures() {
    let (function, _) = function();
    assert_eq!(config(&function, 0), [0xf4, 0x1a, 0x44, 0x10], "virtio, entropy");
    assert_eq!(config(&function, 8), [1, 0, 0, 0xff], "no legacy interface");
    let list = capabilities(&function);
    assert_eq!(list[0], (CAPABILITY_MSIX, MESSAGE_CONTROL - 2));
    assert_eq!(config(&function, MESSAGE_CONTROL), [1, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0], "two vectors, in BAR 0");
    let structures = list[1..].iter().map(|(id, at)| {
        assert_eq!(*id, CAPABILITY_VENDOR);
        let [len, kind, bar, ..] = config::<6>(&function, at + 2);
        let place = [8, 12].map(|field| u32::from_le_bytes(config(&function, at + field)));
        (len, kind, bar, place)
    });
    let expected = [
        (16, 1, 0, [0, 60]),
        (16, 3, 0, [0x1000, 1]),
        (16, 4, 0, [0x2000, 0x1000]),
        (20, 2, 0, [0x3000, 0x1000]),
        (20, 5, 0, [0, 0]),
    ];
    assert_eq!(structures.collect::<Vec<_>>(), expected);
    let notify_at = list[4].1;
    assert_eq!(config(&function, notify_at + 16), NOTIFY_MULTIPLIER.to_le_bytes());
}

#[test]
fn fields_have_their_widths() {
    let (function, _) = function();
    assert_eq!(read(&function, NUM_QUEUES), [1, 0]);
    assert_eq!((read(&function, QUEUE_SIZE), read(&function, QUEUE_NOTIFY_OFF)), ([64, 0], [0, 0]));
    assert_eq!(read(&function, QUEUE_MSIX_VECTOR), [0xff, 0xff]);
    function.write_bar(QUEUE_DESC, &0x1234_5678_9abc_def0_u64.to_le_bytes());
    assert_eq!(
        (read(&function, QUEUE_DESC), read(&function, QUEUE_DESC + 4)),
        (0x9abc_def0_u32.to_le_bytes(), 0x1234_5678_u32.to_le_bytes())
    );
    function.write_bar(QUEUE_DESC + 4, &7_u32.to_le_bytes());
    assert_eq!(read(&function, QUEUE_DESC), 0x7_9abc_def0_u64.to_le_bytes());
    let odd = [(DEVICE_STATUS, 4), (NUM_QUEUES, 4), (QUEUE_SIZE, 1), (QUEUE_DESC + 2, 4), (QUEUE_DESC + 4, 8), (60, 4)];
    for (field, len) in odd {
        let mut data = [0xff; 8];
        function.read_bar(field, &mut data[..len]);
        function.write_bar(field, &[0; 8][..len]);
        assert_eq!(data, [0xff; 8], "{len} bytes at {field:#x}");
    }
    function.write_bar(QUEUE_SELECT, &[1, 0]);
    assert_eq!((read(&function, QUEUE_SIZE), read(&function, QUEUE_DESC)), ([0, 0], [0xff; 8]), "there is no queue 1");
    function.write_bar(QUEUE_MSIX_VECTOR, &[1, 0]);
    assert_eq!(read(&function, QUEUE_MSIX_VECTOR), [0xff, 0xff]);
    assert_eq!(read(&function, CONFIG_MSIX_VECTOR), [0xff, 0xff], "its source is not a queue");
}

#[test]
fn an_unmasked_vector_sends_its_message() {
    let (function, routing) = with_vector();
    assert_eq!(connected(&routing), [FIRST_GSI, FIRST_GSI + 1]);
    let messages = routing.messages.lock().unwrap().clone();
    assert!(messages.values().all(|message| *message == MESSAGE), "{messages:?}");
    raise(&function);
    assert_eq!(routing.connected.lock().unwrap()[&FIRST_GSI].read().unwrap(), 1);
    let moved = MsiMessage { data: 0x4024, ..MESSAGE };
    write_entry(&function, 0, moved, false);
    assert_eq!(routing.messages.lock().unwrap()[&FIRST_GSI], moved);
}

#[test]
fn a_masked_vector_is_pending_until_it_is_unmasked() {
    type Mask = fn(&PciTransport, bool);
    let masks: [(&str, Mask); 2] = [
        ("of the vector", |function, masked| {
            function.write_bar(bar::MSIX_TABLE + 12, &u32::from(masked).to_le_bytes())
        }),
        ("of the function", |function, masked| {
            let control: u16 = if masked { 0xc000 } else { 0x8000 };
            function.write_config(MESSAGE_CONTROL, &control.to_le_bytes());
        }),
    ];
    for (name, mask) in masks {
        let (function, routing) = with_vector();
        mask(&function, true);
        assert_eq!(connected(&routing), [0; 0], "{name}");
        assert_eq!(read(&function, bar::MSIX_PENDING), [0; 8]);
        raise(&function);
        for _ in 0..2 {
            assert_eq!(read(&function, bar::MSIX_PENDING), [1, 0, 0, 0, 0, 0, 0, 0], "{name}");
        }
        mask(&function, false);
        // KVM sends what it finds in the counter.
        assert_eq!(routing.connected.lock().unwrap()[&FIRST_GSI].read().unwrap(), 1, "{name}");
        assert_eq!(read(&function, bar::MSIX_PENDING), [0; 8], "{name}");
    }
}

#[test]
fn a_source_without_vector_sends_nothing_and_forgets() {
    let (function, routing) = with_vector();
    function.write_bar(QUEUE_MSIX_VECTOR, &[2, 0]);
    assert_eq!(read(&function, QUEUE_MSIX_VECTOR), [0xff, 0xff], "there are only two vectors");
    assert_eq!(connected(&routing), [FIRST_GSI + 1]);
    raise(&function);
    assert_eq!(read(&function, bar::MSIX_PENDING), [0; 8]);
    function.write_bar(QUEUE_MSIX_VECTOR, &[0, 0]);
    assert!(routing.connected.lock().unwrap()[&FIRST_GSI].read().is_err(), "an interrupt of another vector");
}

#[test]
fn a_reset_takes_the_vectors_without_a_call_to_kvm() {
    let (function, routing) = with_vector();
    function.write_bar(DEVICE_STATUS, &[0]);
    assert_eq!((read(&function, QUEUE_MSIX_VECTOR), read(&function, CONFIG_MSIX_VECTOR)), ([0xff; 2], [0xff; 2]));
    assert_eq!(connected(&routing), [FIRST_GSI, FIRST_GSI + 1], "nothing raises them");
    function.write_bar(QUEUE_MSIX_VECTOR, &[1, 0]);
    assert_eq!(connected(&routing), [FIRST_GSI + 1], "the new vector is masked");
}

#[test]
fn a_message_that_cannot_be_sent_is_not_replaced_by_an_older_one() {
    let (function, routing) = with_vector();
    write_entry(&function, 0, MsiMessage { address: 0xff_fee0_1000, ..MESSAGE }, false);
    assert_eq!(connected(&routing), [0; 0]);
    write_entry(&function, 0, MESSAGE, false);
    assert_eq!(connected(&routing), [FIRST_GSI, FIRST_GSI + 1]);
}

#[test]
fn odd_accesses_to_the_table_are_ignored() {
    let (function, _) = with_vector();
    let before: [u8; 16] = std::array::from_fn(|at| read::<4>(&function, bar::MSIX_TABLE + at as u64 / 4 * 4)[at % 4]);
    for (offset, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (14, 4), (32, 4), (0xff8, 8)] {
        let mut data = [0xff; 8];
        function.read_bar(bar::MSIX_TABLE + offset, &mut data[..len]);
        function.write_bar(bar::MSIX_TABLE + offset, &[0xaa; 8][..len]);
        assert_eq!(data, [0xff; 8], "{len} bytes at {offset}");
    }
    let after: [u8; 16] = std::array::from_fn(|at| read::<4>(&function, bar::MSIX_TABLE + at as u64 / 4 * 4)[at % 4]);
    assert_eq!(after, before);
    function.write_bar(bar::MSIX_PENDING, &[0xff; 8]);
    assert_eq!(read(&function, bar::MSIX_PENDING), [0; 8], "read-only");
}

#[test]
fn doorbells_follow_the_bar() {
    let (function, routing) = function();
    let doorbells = || routing.doorbells.lock().unwrap().keys().copied().collect::<Vec<_>>();
    assert_eq!((function.bar_address(), doorbells()), (Some(BAR), vec![BAR + bar::NOTIFY]));
    // A guest looks for the size.
    function.write_config(0x04, &[0, 0]);
    function.write_config(0x10, &[0xff; 4]);
    assert_eq!((function.bar_address(), doorbells()), (None, vec![BAR + bar::NOTIFY]));
    // Then it moves the function.
    let moved = layout::PCI_WINDOW + 0x10_0000;
    function.write_config(0x10, &(moved as u32).to_le_bytes());
    assert_eq!((function.bar_address(), doorbells()), (None, vec![]));
    function.write_config(0x04, &[6, 0]);
    assert_eq!((function.bar_address(), doorbells()), (Some(moved), vec![moved + bar::NOTIFY]));
    // Out of the window, where nothing responds.
    function.write_config(0x10, &0x10_0000_u32.to_le_bytes());
    assert_eq!((function.bar_address(), doorbells()), (None, vec![]));
}

#[test]
fn functions_at_one_address_separate_again() {
    let routing = Arc::new(TestRouting::default());
    let (first, second) = (function_at(BAR, &routing), function_at(BAR + 0x8000, &routing));
    second.write_config(0x10, &(BAR as u32).to_le_bytes());
    assert_eq!((first.bar_address(), second.bar_address()), (Some(BAR), Some(BAR)));
    second.write_config(0x10, &(BAR as u32 + 0x1_0000).to_le_bytes());
    assert_eq!(second.bar_address(), Some(BAR + 0x1_0000));
    let doorbells: Vec<u64> = routing.doorbells.lock().unwrap().keys().copied().collect();
    assert_eq!(doorbells, [BAR + 0x1_0000 + bar::NOTIFY]);
    // Nobody has BAR's in the kernel any more, so that they arrive here.
    first.write_bar(bar::NOTIFY, &[0, 0]);
    assert!(first.doorbells()[0].read().is_ok());
}

#[test]
fn a_function_takes_the_address_of_one_that_does_not_respond() {
    let routing = Arc::new(TestRouting::default());
    let (first, second) = (function_at(BAR, &routing), function_at(BAR + 0x8000, &routing));
    first.write_config(0x04, &[0, 0]);
    second.write_config(0x10, &(BAR as u32).to_le_bytes());
    assert_eq!((first.bar_address(), second.bar_address()), (None, Some(BAR)));
    let rings = |function: &PciTransport| {
        routing.doorbells.lock().unwrap()[&(BAR + bar::NOTIFY)].write(1).unwrap();
        function.doorbells()[0].read().is_ok()
    };
    assert!(rings(&second), "not the first one's");
    // They exchange their addresses.
    first.write_config(0x10, &(BAR as u32 + 0x8000).to_le_bytes());
    first.write_config(0x04, &[6, 0]);
    let doorbells: Vec<u64> = routing.doorbells.lock().unwrap().keys().copied().collect();
    assert_eq!((rings(&second), doorbells), (true, vec![BAR + bar::NOTIFY, BAR + 0x8000 + bar::NOTIFY]));
}

#[test]
fn a_queue_that_is_polled_after_a_reset_sends_nothing() {
    let (function, routing) = with_vector();
    for status in [0, 1, 3] {
        function.write_bar(DEVICE_STATUS, &[status]);
    }
    function.write_bar(DRIVER_FEATURE_SELECT, &1_u32.to_le_bytes());
    function.write_bar(DRIVER_FEATURE, &1_u32.to_le_bytes());
    function.write_bar(DEVICE_STATUS, &[11]);
    assert_eq!(connected(&routing), [FIRST_GSI, FIRST_GSI + 1]);
    function.write_bar(DEVICE_STATUS, &[15]);
    assert_eq!(connected(&routing), [0; 0]);
}

#[test]
fn a_doorbell_that_kvm_does_not_handle_rings() {
    let (function, _) = function();
    function.write_bar(bar::NOTIFY, &[0, 0]);
    assert_eq!(function.doorbells()[0].read().unwrap(), 1);
    function.write_bar(bar::NOTIFY + 4, &[0, 0]);
    function.write_bar(bar::NOTIFY + 0xffc, &[0, 0, 0, 0]);
    assert!(function.doorbells()[0].read().is_err());
}

#[test]
fn the_bar_can_be_accessed_through_configuration_space() {
    let (function, _) = function();
    let window_at = capabilities(&function)[5].1;
    let set = |field: u64, value: u32| function.write_config(window_at + field, &value.to_le_bytes());
    set(8, NUM_QUEUES as u32);
    set(12, 2);
    assert_eq!(config(&function, window_at + 16), [1, 0]);
    set(8, DEVICE_STATUS as u32);
    set(12, 1);
    function.write_config(window_at + 16, &[1]);
    assert_eq!(read(&function, DEVICE_STATUS), [1]);
    function.write_config(window_at + 4, &[1]);
    assert_ne!(config(&function, window_at + 16), [1], "there is no BAR 1");
    function.write_config(window_at + 4, &[0]);
    set(8, u32::MAX);
    set(12, 4);
    assert_eq!(config(&function, window_at + 16), [0xff; 4], "beyond the BAR");
}

#[test]
fn polling_drivers_read_why_the_device_has_interrupted() {
    let (function, _) = function();
    raise(&function);
    assert_eq!((read(&function, bar::ISR), read(&function, bar::ISR)), ([1], [0]));
    assert_eq!(read(&function, bar::ISR + 1), [0xff]);
}

#[test]
fn a_moved_function_with_pending_interrupts_is_restored() {
    let (function, _) = with_vector();
    function.write_bar(bar::MSIX_TABLE + 12, &[1, 0, 0, 0]);
    raise(&function);
    function.write_config(0x10, &0xd020_0000_u32.to_le_bytes());
    let state = function.save();
    let (other, routing) = self::function();
    other.restore(&state).unwrap();
    assert_eq!((other.save(), other.bar_address()), (state, Some(0xd020_0000)));
    assert_eq!(routing.doorbells.lock().unwrap().keys().copied().collect::<Vec<_>>(), [0xd020_3000]);
    assert_eq!(read(&other, bar::MSIX_PENDING), [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_state_of_another_function_is_rejected() {
    let (function, _) = function();
    let TransportState::Pci(good) = function.save() else { panic!() };
    let change = |change: fn(&mut PciState)| {
        let mut state = good.clone();
        change(&mut state);
        function.restore(&TransportState::Pci(state)).is_err()
    };
    assert!(change(|state| state.version = 2));
    assert!(change(|state| state.device_type = 2));
    assert!(change(|state| state.session.queues.clear()));
    assert!(!change(|_| {}));
    let json = serde_json::to_value(function.save()).unwrap();
    for part in ["table", "vectors", "pending"] {
        let mut other = json.clone();
        other["pci"]["msix"][part].as_array_mut().unwrap().pop();
        assert!(function.restore(&serde_json::from_value(other).unwrap()).is_err(), "{part}");
    }
}
