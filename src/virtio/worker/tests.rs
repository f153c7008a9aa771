//! Tests of devices with several workers, and of the threads on which handlers are called.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};
use std::time::Duration;

use crate::virtio::mmio::register::{QUEUE_READY, QUEUE_SEL, STATUS};
use crate::virtio::test_driver::{BUFFERS, Driver, WRITE, wait_for};
use crate::virtio::{
    Chain, ConfigSpace, Progress, QueueGroup, QueueHandler, RingError, StateMismatch, VirtioDevice, Virtqueue,
};

/// The calls of a handler's methods, each with its thread.
type Calls = Arc<Mutex<Vec<(&'static str, ThreadId)>>>;

/// A handler of one queue. It waits for `gate` before it completes a chain, and fails to restore a state that contains
/// the byte `refuses`.
#[derive(Default)]
struct Gated {
    gate: Option<Receiver<()>>,
    state: Vec<u8>,
    refuses: Option<u8>,
    wake: Option<UnixDatagram>,
    waits_for_room: bool,
    calls: Calls,
}

impl Gated {
    fn record(&self, name: &'static str) {
        self.calls.lock().unwrap().push((name, thread::current().id()));
    }
}

impl QueueHandler for Gated {
    fn start(&mut self, _features: u64) {
        self.record("start");
    }

    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError> {
        self.record("process");
        assert_eq!((index, queues.len()), (0, 1), "the index is relative to the group");
        let mut chain = Chain::default();
        while queues[0].pop(&mut chain)? {
            self.record("pop");
            // Returns an error at once if the sender was dropped.
            let _ = self.gate.as_ref().map(Receiver::recv);
            queues[0].push(chain.head(), 1)?;
        }
        Ok(Progress::Drained)
    }

    fn wake_fds(&self) -> Vec<BorrowedFd<'_>> {
        self.wake.iter().map(AsFd::as_fd).collect()
    }

    fn waits_for_room(&self) -> bool {
        self.waits_for_room
    }

    fn drain(&mut self, _queues: &mut [Virtqueue]) -> Result<(), RingError> {
        self.record("drain");
        Ok(())
    }

    fn reset(&mut self) {
        self.record("reset");
        self.state.clear();
    }

    fn save(&self) -> Vec<u8> {
        self.record("save");
        self.state.clone()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateMismatch> {
        self.record("restore");
        if self.refuses.is_some_and(|refused| state.contains(&refused)) {
            return Err(StateMismatch);
        }
        self.state = state.to_vec();
        Ok(())
    }
}

impl Drop for Gated {
    fn drop(&mut self) {
        self.record("drop");
    }
}

/// Creates a device with one queue and one worker for each of `handlers`.
fn device_of(handlers: Vec<Gated>) -> VirtioDevice {
    let group = |handler| QueueGroup { sizes: vec![8], handler: Box::new(handler) };
    VirtioDevice {
        device_type: 63,
        name: "test".to_owned(),
        features: 0,
        feature_needs: &[],
        config: Arc::new(ConfigSpace::new(Vec::new(), 0..0)),
        queue_groups: handlers.into_iter().map(group).collect(),
    }
}

/// Creates a handler, and the sender that opens its gate.
fn gated() -> (Sender<()>, Gated) {
    let (open, gate) = channel();
    let mut handler = Gated::default();
    handler.gate = Some(gate);
    (open, handler)
}

/// Starts a device with two queues, the first of which has a request that waits for the returned sender.
fn first_is_busy() -> (Driver, Sender<()>) {
    let (open, slow) = gated();
    let calls = slow.calls.clone();
    let mut driver = Driver::new(device_of(vec![slow, Gated::default()]));
    driver.start();
    let head = driver.chain(0, &[(BUFFERS, 1, WRITE)]);
    driver.offer(0, head);
    driver.notify(0);
    wait_for(|| calls.lock().unwrap().iter().any(|(name, _)| *name == "pop"));
    (driver, open)
}

#[test]
fn a_group_is_served_while_another_one_is_busy() {
    let (mut driver, open) = first_is_busy();
    assert_eq!(driver.transact(1, &[(BUFFERS, 1, WRITE)]), 1);
    assert_eq!(driver.used_index(0), 0);
    open.send(()).unwrap();
    assert_eq!(driver.used(0), (0, 1));
}

#[test]
fn a_queue_taken_out_of_use_stops_no_other_group() {
    let (driver, open) = first_is_busy();
    driver.write(QUEUE_SEL, 1);
    driver.write(QUEUE_READY, 0);
    assert_eq!((driver.read(QUEUE_READY), driver.used_index(0)), (0, 0));
    drop(open);
    driver.transport.pause();
    assert_eq!(driver.used_index(0), 1, "a pause waits for all workers");
}

#[test]
fn a_handler_is_called_and_dropped_on_its_worker_alone() {
    let handler = Gated::default();
    let calls = handler.calls.clone();
    let mut driver = Driver::new(device_of(vec![handler]));
    driver.start();
    assert_eq!(driver.transact(0, &[(BUFFERS, 1, WRITE)]), 1);
    let state = driver.transport.save();
    driver.transport.restore(&state).unwrap();
    driver.write(STATUS, 0);
    drop(driver);
    let calls = calls.lock().unwrap();
    for name in ["start", "process", "drain", "save", "restore", "reset", "drop"] {
        assert!(calls.iter().any(|(called, _)| *called == name), "{name}");
    }
    let worker = calls[0].1;
    assert_ne!(worker, thread::current().id());
    assert!(calls.iter().all(|(_, thread)| *thread == worker), "{calls:?}");
}

#[test]
fn a_reset_of_a_device_that_was_never_started_waits_for_no_thread() {
    let handler = Gated::default();
    let calls = handler.calls.clone();
    let driver = Driver::new(device_of(vec![handler]));
    driver.write(STATUS, 0);
    drop(driver);
    assert_eq!(calls.lock().unwrap().iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["drop"]);
}

#[test]
fn all_groups_are_restored_or_none() {
    let mut particular = Gated::default();
    particular.refuses = Some(9);
    let driver = Driver::new(device_of(vec![Gated::default(), particular]));
    let mut state = driver.transport.save();
    assert_eq!(state.session().handlers, [Vec::<u8>::new(), Vec::new()]);
    state.session().handlers = vec![vec![1], vec![2]];
    driver.transport.restore(&state).unwrap();
    let restored = driver.transport.save();
    for refused in [vec![vec![3], vec![9]], vec![vec![3]], vec![vec![3]; 3]] {
        state.session().handlers = refused;
        assert!(driver.transport.restore(&state).is_err());
        assert_eq!(driver.transport.save(), restored);
    }
    driver.write(STATUS, 0);
    assert_eq!(driver.transport.save().session().handlers, [Vec::<u8>::new(), Vec::new()]);
}

#[test]
fn a_message_that_the_other_side_takes_wakes_only_a_handler_that_waits_for_room() {
    for waits_for_room in [true, false] {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let mut handler = Gated::default();
        (handler.wake, handler.waits_for_room) = (Some(ours.try_clone().unwrap()), waits_for_room);
        let calls = handler.calls.clone();
        let count = || calls.lock().unwrap().iter().filter(|(name, _)| *name == "process").count();
        let mut driver = Driver::new(device_of(vec![handler]));
        driver.start();
        wait_for(|| count() > 0);
        // The events that descriptors have when they begin to be watched.
        thread::sleep(Duration::from_millis(50));
        let before = count();
        ours.send(b"request").unwrap();
        theirs.recv(&mut [0; 16]).unwrap();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(count() > before, waits_for_room);
        let before = count();
        theirs.send(b"reply").unwrap();
        wait_for(|| count() > before);
    }
}
