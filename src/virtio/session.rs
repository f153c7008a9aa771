//! A device's lifecycle (virtio 1.2 §3.1), from negotiation to running and reset, for any transport.

use std::io;
use std::sync::Arc;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use vmm_sys_util::eventfd::EventFd;

use super::queue::QueueRegisters;
use super::worker::{Reports, Worker};
use super::{
    COMMON_FEATURES, ConfigSpace, F_EVENT_IDX, F_VERSION_1, FeatureNeed, Interrupt, Notifiers, QueueGroup,
    StateMismatch, VirtioDevice, Virtqueue,
};
use crate::memory::GuestMemory;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// The saved state of a device: everything the driver has set, and the device's progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionState {
    /// Device status (virtio 1.2 §2.1).
    pub status: u32,
    /// Features written by the driver; they take effect with FEATURES_OK.
    pub driver_features: u64,
    /// Whether the driver wrote a feature bit above 63, which no device offers.
    pub driver_features_beyond: bool,
    /// Every queue, in order.
    pub queues: Vec<QueueRegisters>,
    /// The bytes of the configuration space that the driver may write.
    pub config: Vec<u8>,
    /// The configuration's generation.
    pub config_generation: u32,
    /// The state of each queue group's handler: see [`QueueHandler::save`](super::QueueHandler::save).
    pub handlers: Vec<Vec<u8>>,
}

/// A device and its driver. The transport guards it with a lock and translates register accesses into calls.
pub struct DeviceSession {
    device_type: u32,
    features: u64,
    feature_needs: &'static [FeatureNeed],
    config: Arc<ConfigSpace>,
    memory: Arc<GuestMemory>,
    reports: Arc<Reports>,
    /// One per queue group, in order.
    workers: Vec<Worker>,
    status: u32,
    driver_features: u64,
    driver_features_beyond: bool,
    queues: Vec<QueueRegisters>,
    paused: bool,
}

impl DeviceSession {
    /// Creates a device in its power-on state, not paused, with its worker threads.
    pub fn new(
        device: VirtioDevice,
        memory: Arc<GuestMemory>,
        doorbells: Arc<Vec<EventFd>>,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<DeviceSession> {
        let reports = Arc::new(Reports::new(&device.name, interrupt));
        let sizes: Vec<u16> = device.queue_groups.iter().flat_map(|group| group.sizes.clone()).collect();
        let workers = workers(&device.name, device.queue_groups, &doorbells, &reports)?;
        Ok(DeviceSession {
            device_type: device.device_type,
            features: device.features | COMMON_FEATURES,
            feature_needs: device.feature_needs,
            config: device.config,
            memory,
            workers,
            reports,
            status: 0,
            driver_features: 0,
            driver_features_beyond: false,
            queues: sizes.iter().map(|size| QueueRegisters::new(*size)).collect(),
            paused: false,
        })
    }

    /// Device ID (virtio 1.2 §5).
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// Bits `32 * select` and up of the features offered.
    pub fn device_features(&self, select: u32) -> u32 {
        match select {
            0 => self.features as u32,
            1 => (self.features >> 32) as u32,
            _ => 0,
        }
    }

    /// Bits `32 * select` and up of the features accepted.
    pub fn driver_features(&self, select: u32) -> u32 {
        match select {
            0 => self.driver_features as u32,
            1 => (self.driver_features >> 32) as u32,
            _ => 0,
        }
    }

    /// Sets the accepted features. Ignored after FEATURES_OK.
    pub fn set_driver_features(&mut self, select: u32, value: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let (low, high) = (self.driver_features & 0xffff_ffff, self.driver_features >> 32 << 32);
        match select {
            0 => self.driver_features = high | u64::from(value),
            1 => self.driver_features = low | u64::from(value) << 32,
            _ => self.driver_features_beyond |= value != 0,
        }
    }

    /// Device status as the driver reads it.
    pub fn status(&self) -> u32 {
        self.status | if self.reports.needs_reset() { NEEDS_RESET } else { 0 }
    }

    /// Sets the device status: 0 resets the device, other values may only add bits, in the specified order.
    ///
    /// A reset is complete on return: the device no longer accesses guest memory.
    pub fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let clears_bits = self.status & !value != 0;
        if clears_bits || self.status & FAILED != 0 {
            return;
        }
        for (step, needs) in [(ACKNOWLEDGE, 0), (DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)]
        {
            let in_order = self.status & needs == needs;
            let acceptable =
                step != FEATURES_OK || !self.driver_features_beyond && self.are_acceptable(self.driver_features);
            if value & step != 0 && in_order && acceptable {
                self.status |= step;
            }
        }
        self.status |= value & FAILED;
        self.listen();
        self.start();
    }

    /// Subscribes the driver to configuration changes once it has set DRIVER_OK.
    fn listen(&self) {
        let runs = self.status & DRIVER_OK != 0;
        self.config.listen(runs.then(|| self.reports.interrupt().clone()));
    }

    /// Whether `features` are acceptable: all of them offered, all dependencies met, and VERSION_1 included.
    fn are_acceptable(&self, features: u64) -> bool {
        let unknown = features & !self.features;
        unknown == 0 && features & F_VERSION_1 != 0 && self.feature_needs.iter().all(|need| need.is_met_by(features))
    }

    /// The number of queues.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Queue `index`, read-only.
    pub fn queue(&self, index: u32) -> Option<&QueueRegisters> {
        self.queues.get(index as usize)
    }

    /// Queue `index` for configuration, which is allowed only before the driver has enabled it and while the device is
    /// not running.
    pub fn queue_to_set_up(&mut self, index: u32) -> Option<&mut QueueRegisters> {
        let locked = self.status & DRIVER_OK != 0;
        self.queues.get_mut(index as usize).filter(|queue| !locked && !queue.ready)
    }

    /// Enables or disables queue `index`. Disabling is allowed while the device is running.
    pub fn set_queue_ready(&mut self, index: u32, ready: bool) {
        if ready {
            if let Some(queue) = self.queue_to_set_up(index) {
                queue.ready = true;
            }
        } else if self.queue(index).is_some_and(|queue| queue.ready) {
            self.stop_serving(index as usize);
            self.queues.iter_mut().skip(index as usize).take(1).for_each(|queue| queue.ready = false);
            self.start();
        }
    }

    /// Pauses the device until [`DeviceSession::resume`], after completing requests in flight.
    pub fn pause(&mut self) {
        self.paused = true;
        self.stop();
    }

    /// Resumes the device. It checks every queue once.
    pub fn resume(&mut self) {
        self.paused = false;
        self.start();
    }

    /// Saves the device's state. A running device is stopped temporarily.
    pub fn save(&mut self) -> SessionState {
        self.stop();
        let state = SessionState {
            status: self.status(),
            driver_features: self.driver_features,
            driver_features_beyond: self.driver_features_beyond,
            queues: self.queues.clone(),
            config: self.config.driver_bytes(),
            config_generation: self.config.generation(),
            handlers: self.workers.iter().map(Worker::save).collect(),
        };
        self.start();
        state
    }

    /// Restores `state` and leaves the device paused.
    ///
    /// Fails without any change if the state belongs to another device. Rings are validated when the device resumes.
    pub fn restore(&mut self, state: &SessionState) -> Result<()> {
        let sizes = |queues: &[QueueRegisters]| queues.iter().map(|queue| queue.size_max).collect::<Vec<_>>();
        ensure!(sizes(&state.queues) == sizes(&self.queues), "the saved device has other queues");
        let accepted = state.status & (FEATURES_OK | DRIVER_OK) != 0;
        let features = state.driver_features;
        ensure!(
            !accepted || !state.driver_features_beyond && self.are_acceptable(features),
            "the saved driver uses features that it cannot: {features:#x}"
        );
        ensure!(state.config.len() == self.config.driver_bytes().len(), "the saved device has another configuration");
        self.stop();
        if let Err(mismatch) = self.restore_handlers(&state.handlers) {
            self.start();
            return Err(mismatch.into());
        }
        self.pause();
        self.status = state.status & !NEEDS_RESET;
        self.reports.set_needs_reset(state.status & NEEDS_RESET != 0);
        self.driver_features = state.driver_features;
        self.driver_features_beyond = state.driver_features_beyond;
        self.queues.clone_from(&state.queues);
        self.config.set_driver_bytes(&state.config);
        self.config.set_generation(state.config_generation);
        self.listen();
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
        self.reports.set_needs_reset(false);
        self.status = 0;
        self.listen();
        self.driver_features = 0;
        self.driver_features_beyond = false;
        self.queues.iter_mut().for_each(|queue| *queue = QueueRegisters::new(queue.size_max));
        self.config.reset();
        self.workers.iter_mut().for_each(Worker::reset);
    }

    /// Restores every handler, or none.
    fn restore_handlers(&mut self, states: &[Vec<u8>]) -> Result<(), StateMismatch> {
        if states.len() != self.workers.len() {
            return Err(StateMismatch);
        }
        let before: Vec<_> = self.workers.iter().map(Worker::save).collect();
        let restored = self.workers.iter_mut().zip(states).try_for_each(|(worker, state)| worker.restore(state));
        if restored.is_err() {
            // Cannot fail: each worker gets the state that it has just returned.
            self.workers.iter_mut().zip(&before).for_each(|(worker, state)| drop(worker.restore(state)));
        }
        restored
    }

    /// Starts every worker that is not running, if the device is not paused, the driver is ready, and no reset is
    /// needed.
    fn start(&mut self) {
        if self.paused || self.status() & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK {
            return;
        }
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        for worker in self.workers.iter_mut().filter(|worker| !worker.is_running()) {
            let registers = self.queues.get(worker.queues()).unwrap_or_default();
            let queues = registers.iter().map(|queue| Virtqueue::new(queue, &self.memory, event_idx));
            match queues.collect() {
                Ok(queues) => worker.start(queues, self.driver_features),
                Err(error) => return self.reports.fail(&error),
            }
        }
    }

    /// Stops all workers.
    fn stop(&mut self) {
        self.workers.iter().for_each(Worker::request_stop);
        (0..self.queues.len()).for_each(|index| self.stop_serving(index));
    }

    /// Stops the worker that serves queue `index`, if it is running.
    fn stop_serving(&mut self, index: usize) {
        let Some(worker) = self.workers.iter_mut().find(|worker| worker.queues().contains(&index)) else { return };
        let registers = self.queues.get_mut(worker.queues()).unwrap_or_default();
        worker.stop().iter().flatten().zip(registers).for_each(|(queue, registers)| queue.leave(registers));
    }
}

/// Creates a worker for each queue group of a device.
fn workers(
    name: &str,
    groups: Vec<QueueGroup>,
    doorbells: &Arc<Vec<EventFd>>,
    reports: &Arc<Reports>,
) -> io::Result<Vec<Worker>> {
    let mut first = 0;
    let make = |group: QueueGroup| {
        let queues = first..first + group.sizes.len();
        first = queues.end;
        let notifiers = Notifiers { all_doorbells: doorbells.clone(), queues, interrupt: reports.interrupt().clone() };
        Worker::new(name, group.handler, notifiers, reports.clone())
    };
    groups.into_iter().map(make).collect()
}
