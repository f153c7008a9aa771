//! The machine: vCPUs, devices and memory. It is built paused; this module defines the order in which its parts start
//! and stop.

mod build;
mod host_memory;
mod state;
mod virtio_bus;

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::console::output::Output;
use crate::device::Serial;
use crate::exit_latch::ExitLatch;
use crate::irq::IrqLine;
use crate::kvm::Vm;
use crate::memory::Region;
use crate::timings::{Step, Timings};
use crate::vcpu::VcpuThread;
use crate::virtio::net::NetLink;
use crate::virtio::{Transport, balloon, block};
pub use state::MachineState;

/// A machine, paused when built. It is owned by one thread; vCPUs, workers and the console have their own threads.
pub struct Machine {
    vcpus: Vec<VcpuThread>,
    transports: Vec<Arc<dyn Transport>>,
    controls: Controls,
    console: Console,
    power_button: IrqLine,
    exit_latch: Arc<ExitLatch>,
    timings: Arc<Timings>,
    // Declared last, so that it outlives everything that uses its memory and descriptors.
    vm: Arc<Vm>,
}

/// Handles to a machine's devices: their statistics and rate limits. Clones share state, can be used from any thread
/// and may outlive the machine.
#[derive(Clone, Default)]
pub struct Controls {
    /// The disks, in configuration order.
    pub disks: Vec<block::DiskHandle>,
    /// The links of the network interfaces, in configuration order.
    pub links: Vec<NetLink>,
    /// The balloon, if there is one.
    pub balloon: Option<balloon::BalloonHandle>,
}

/// The host side of the serial port: its output and input.
struct Console {
    serial: Arc<Serial>,
    output: Arc<Output>,
    input_wanted: Arc<EventFd>,
}

impl Machine {
    /// Resumes the guest: first the workers, each of which checks every queue once because earlier doorbells are not
    /// part of the state; then the vCPUs. Does nothing if the machine is running.
    pub fn resume(&mut self) {
        for transport in &self.transports {
            transport.resume();
        }
        self.timings.mark(Step::FirstInstruction);
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
    }

    /// Pauses the guest: first the vCPUs, so that no new requests are made; then the workers, which complete pending
    /// requests. On return no guest instruction runs and no request is in flight. Does nothing if the machine is
    /// paused.
    pub fn pause(&mut self) {
        for vcpu in &self.vcpus {
            vcpu.request_pause();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_paused();
        }
        for transport in &self.transports {
            transport.pause();
        }
    }

    /// Presses the power button. The guest decides how to react.
    pub fn press_power_button(&self) {
        self.power_button.raise();
    }

    /// Handles to the machine's devices.
    pub fn controls(&self) -> &Controls {
        &self.controls
    }

    /// The addresses of guest memory in this process, of each region.
    pub fn memory_ranges(&self) -> Vec<Range<u64>> {
        let range = |region: &Region| {
            let start = region.get_host_address(MemoryRegionAddress(0)).map_or(0, |address| address as u64);
            start..start + region.len()
        };
        self.vm.memory().iter().map(range).collect()
    }

    /// The startup steps reached so far, and the clock that timestamps them.
    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    /// The serial port's output, to be read by one thread.
    pub fn console_output(&self) -> &Arc<Output> {
        &self.console.output
    }

    /// Offers `bytes` to the serial port and returns how many it accepted.
    pub fn offer_input(&self, bytes: &[u8]) -> usize {
        self.console.serial.offer_input(bytes)
    }

    /// Readable when the guest may accept input again. Read it before offering input.
    pub fn input_wanted(&self) -> &EventFd {
        &self.console.input_wanted
    }

    /// The latch in which the machine's end is declared.
    pub fn exit_latch(&self) -> &Arc<ExitLatch> {
        &self.exit_latch
    }

    /// Stops the vCPUs, then drains and stops the workers, so that every completed write has been performed.
    fn stop(&mut self) {
        // Later output is discarded.
        self.console.output.close();
        for vcpu in &self.vcpus {
            vcpu.request_stop();
        }
        for vcpu in self.vcpus.drain(..) {
            vcpu.join();
        }
        for transport in self.transports.drain(..) {
            transport.pause();
        }
    }
}

impl Machine {
    /// Ends the machine and closes its files. Returns its virtual machine, whose release takes the kernel some milliseconds,
    /// for which nobody need wait.
    pub fn end(self) -> Arc<Vm> {
        self.vm.clone()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::config::MachineConfig;
    use crate::resources;

    /// Returns a machine that prints endlessly, or `None` with a visible message if KVM is unavailable.
    fn talker() -> Option<(Machine, Arc<Output>)> {
        machine(husk_guests::SERIAL, "do=flood bytes=1000000000")
    }

    /// The configuration of a machine with a tiny guest, or `None` with a visible message if KVM is unavailable.
    pub(super) fn tiny(kernel: &str, cmdline: &str) -> Option<MachineConfig> {
        if let Err(error) = resources::open_kvm() {
            assert!(std::env::var_os("HUSK_TEST_REQUIRE_KVM").is_none(), "{error:#}");
            eprintln!("SKIPPED: this test needs KVM: {error:#}");
            return None;
        }
        let (kernel, cmdline) = (kernel.into(), cmdline.into());
        Some(MachineConfig { kernel, cmdline, memory_mib: 32, ..MachineConfig::default() })
    }

    fn machine(kernel: &str, cmdline: &str) -> Option<(Machine, Arc<Output>)> {
        let config = tiny(kernel, cmdline)?;
        let (resources, _outside) = resources::open(&config).unwrap();
        let timings = Arc::new(Timings::new(Instant::now()));
        let machine = Machine::build(&config, resources, timings, || Ok(()), &|| false).unwrap();
        let output = machine.console.output.clone();
        Some((machine, output))
    }

    /// Counts the bytes printed within `wait`.
    fn printed(output: &Output, wait: Duration) -> usize {
        thread::sleep(wait);
        output.take_now().len()
    }

    #[test]
    fn a_paused_machine_stops_and_a_resumed_one_continues() {
        const WAIT: Duration = Duration::from_millis(50);
        let Some((mut machine, output)) = talker() else { return };
        assert_eq!(printed(&output, WAIT), 0, "a machine is built paused");
        for _ in 0..5 {
            machine.resume();
            machine.resume();
            // Retries, because the host may be busy.
            assert!((0..200).any(|_| printed(&output, WAIT) > 0), "resumed");
            machine.pause();
            machine.pause();
            output.take_now();
            assert_eq!(printed(&output, WAIT), 0, "paused");
        }
    }

    /// Waits until the console buffer is full.
    #[track_caller]
    fn await_full(output: &Output) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !output.is_full() {
            assert!(Instant::now() < deadline, "the guest prints no more");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_machine_whose_console_is_full_is_paused_and_loses_nothing() {
        let Some((mut machine, output)) = talker() else { return };
        let mut printed = Vec::new();
        for _ in 0..3 {
            machine.resume();
            await_full(&output);
            machine.pause();
            machine.resume();
            machine.pause();
            assert!(output.is_full(), "nobody has taken any of it");
            printed.extend(output.take_now());
        }
        // Pauses at arbitrary points of an instruction that prints many bytes.
        for _ in 0..50 {
            machine.resume();
            thread::sleep(Duration::from_micros(300));
            machine.pause();
            printed.extend(output.take_now());
        }
        let expected = |at: usize| if at % 64 == 63 { b'\n' } else { b'!' + (at % 64) as u8 };
        assert_eq!(printed.iter().enumerate().find(|(at, byte)| **byte != expected(*at)), None);
    }

    #[test]
    fn one_kick_is_enough_at_any_point() {
        let Some((mut machine, output)) = talker() else { return };
        for _ in 0..300 {
            machine.resume();
            thread::sleep(Duration::from_micros(100));
            machine.vcpus[0].request_pause();
            assert!(machine.vcpus[0].has_paused_within(Duration::from_secs(20)), "the kick was lost");
            output.take_now();
        }
        machine.resume();
        await_full(&output);
        machine.vcpus[0].request_pause();
        assert!(machine.vcpus[0].has_paused_within(Duration::from_secs(20)), "it waits for room");
    }

    #[test]
    fn a_guest_is_notified_only_of_pauses() {
        let Some((mut machine, output)) = machine(husk_guests::CLOCK, "do=pauses") else { return };
        let mut received = Vec::new();
        let mut wait_for = |expected: &str| {
            for _ in 0..2000 {
                received.extend(output.take_now());
                if received == expected.as_bytes() {
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
            panic!("{} instead of {expected}", String::from_utf8_lossy(&received));
        };
        machine.resume();
        wait_for("watching\n");
        for pauses in 1..4 {
            machine.pause();
            machine.resume();
            // Resuming a running machine is not a pause.
            machine.resume();
            wait_for(&format!("watching\n{}", "paused\n".repeat(pauses)));
        }
    }

    #[test]
    fn stopping_is_idempotent_and_releases_a_waiting_vcpu() {
        let Some((mut machine, output)) = talker() else { return };
        machine.resume();
        // The output is not read, so the vCPU blocks until there is room.
        await_full(&output);
        machine.stop();
        machine.stop();
        assert_eq!(machine.exit_latch().reason(), None);
    }
}
