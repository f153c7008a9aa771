//! The state of a whole machine besides its memory, and the order in which it is saved and restored.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Machine;
use crate::boot;
use crate::device::SerialState;
use crate::kvm::VmState;
use crate::layout;
use crate::memory::GuestMemory;
use crate::vcpu::{VcpuState, VcpuThread};
use crate::virtio::TransportState;

/// The state of a machine's devices, interrupt controller and vCPUs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// The virtio devices, in their order on the bus.
    pub transports: Vec<TransportState>,
    /// The serial port.
    pub serial: SerialState,
    /// The interrupt controller and the clock.
    pub vm: VmState,
    /// The vCPUs, in order.
    pub vcpus: Vec<VcpuState>,
}

impl MachineState {
    /// Encodes the state in postcard's format, which is decoded ten times as fast as JSON.
    pub fn encode(&self) -> Result<Vec<u8>> {
        postcard::to_allocvec(self).context("encode the state of the machine")
    }

    /// Decodes a state of any origin. Its values are checked where they are used.
    pub fn decode(bytes: &[u8]) -> Result<MachineState> {
        let (state, rest) = postcard::take_from_bytes(bytes).context("decode the state of the machine")?;
        ensure!(rest.is_empty(), "the state of the machine is longer than it says");
        Ok(state)
    }
}

impl Machine {
    /// The guest's memory. It changes unless the machine is paused.
    pub fn memory(&self) -> &GuestMemory {
        self.vm.memory()
    }

    /// Pauses the machine and saves its state. Its memory does not change before [`Machine::resume`].
    ///
    /// Devices come first: as they complete what is in flight, they raise interrupts, which the interrupt controller passes
    /// to the vCPUs.
    pub fn save(&mut self) -> Result<MachineState> {
        self.pause();
        let transports = self.transports.iter().map(|transport| transport.save()).collect();
        let serial = self.console.serial.save();
        let vm = self.vm.save()?;
        let msrs = self.vm.listed_msrs()?;
        let save = |(index, vcpu): (usize, &VcpuThread)| vcpu.save(&msrs).with_context(|| format!("save vCPU {index}"));
        let vcpus = self.vcpus.iter().enumerate().map(save).collect::<Result<_>>()?;
        Ok(MachineState { transports, serial, vm, vcpus })
    }

    /// Restores the state of the devices and the interrupt controller of a machine that has never run; its vCPUs were created
    /// with their state. The last `added_devices` are new to the guest. It gets a new generation ID, and is told.
    pub(super) fn restore(&mut self, state: &MachineState, added_devices: usize) -> Result<()> {
        let (found, expected) = (state.transports.len(), self.transports.len().saturating_sub(added_devices));
        ensure!(found == expected, "the saved machine has {found} devices, this one {expected}");
        // Devices raise again what may have been on its way, which needs the interrupt controller in its last state.
        self.vm.restore(&state.vm)?;
        for (index, (transport, state)) in self.transports.iter().zip(&state.transports).enumerate() {
            transport.restore(state).with_context(|| format!("restore device {index}"))?;
        }
        self.console.serial.restore(&state.serial)?;
        boot::write_generation_id(self.vm.memory())?;
        self.vm.pulse(layout::GENERATION_GSI)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::MachineConfig;
    use crate::console::output::Output;
    use crate::exit_latch::ExitReason;
    use crate::machine::tests::tiny;
    use crate::memory;
    use crate::resources::{self, Resources, SnapshotFiles, Source};
    use crate::sys;
    use crate::timings::Timings;

    const WAIT: Duration = Duration::from_secs(60);

    struct Bench {
        config: MachineConfig,
        machine: Machine,
        output: Arc<Output>,
    }

    /// A machine with this guest, or `None` with a visible message if KVM is unavailable.
    fn bench(kernel: &str, cmdline: &str, cpus: u32) -> Option<Bench> {
        Some(Bench::of(MachineConfig { cpus, ..tiny(kernel, cmdline)? }))
    }

    fn bench_with_memory(kernel: &str, cmdline: &str, memory_mib: u64) -> Option<Bench> {
        Some(Bench::of(MachineConfig { memory_mib, ..tiny(kernel, cmdline)? }))
    }

    fn build(config: &MachineConfig, resources: Resources) -> Result<Machine> {
        Machine::build(config, resources, Arc::new(Timings::new(Instant::now())), || Ok(()), &|| false)
    }

    fn restore(config: &MachineConfig, state: Vec<u8>, memory: File) -> Result<Machine> {
        let source =
            Source::Snapshot(SnapshotFiles { state, memory, touched: None, shares: Vec::new(), added_devices: 0 });
        let (resources, _outside) = resources::open_for(config, source).unwrap();
        build(config, resources)
    }

    impl Bench {
        fn of(config: MachineConfig) -> Bench {
            let (resources, _outside) = resources::open(&config).unwrap();
            let machine = build(&config, resources).unwrap();
            let output = machine.console.output.clone();
            Bench { config, machine, output }
        }

        /// Saves the machine, ends it, and continues with another one.
        fn renew(self) -> (Bench, Vec<u8>) {
            let Bench { config, mut machine, output } = self;
            let state = machine.save().unwrap();
            let encoded = state.encode().unwrap();
            let file = sys::memory_file(c"memory").unwrap();
            memory::write_to(machine.memory(), &file, None).unwrap();
            drop(machine);
            let printed = output.take_now();
            let mut machine = restore(&config, encoded.clone(), file).unwrap();
            let again = machine.save().unwrap().encode().unwrap();
            let same = |name: &str| {
                let [one, other] = [&encoded, &again]
                    .map(|bytes| serde_json::to_value(MachineState::decode(bytes).unwrap()).unwrap()[name].to_string());
                assert_eq!(one, other, "{name}");
            };
            ["transports", "serial"].into_iter().for_each(same);
            let output = machine.console.output.clone();
            machine.resume();
            (Bench { config, machine, output }, printed)
        }

        /// Adds what the guest prints to `printed`, until `is_enough`.
        #[track_caller]
        fn read_until(&self, printed: &mut Vec<u8>, is_enough: impl Fn(&[u8]) -> bool) {
            let start = Instant::now();
            while !is_enough(printed) {
                let reason = self.machine.exit_latch.reason();
                assert!(start.elapsed() < WAIT, "{reason:?}: {}", String::from_utf8_lossy(printed));
                std::thread::sleep(Duration::from_millis(1));
                printed.extend(self.output.take_now());
            }
        }

        #[track_caller]
        fn assert_ends(&self) {
            let start = Instant::now();
            while self.machine.exit_latch.reason().is_none() {
                assert!(start.elapsed() < WAIT);
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(self.machine.exit_latch.reason(), Some(ExitReason::Reported(0)));
        }
    }

    #[test]
    fn a_restored_guest_continues_where_it_was_saved() {
        let Some(mut bench) = bench(husk_guests::SERIAL, "do=flood bytes=200000", 1) else { return };
        bench.machine.resume();
        let mut printed = Vec::new();
        for count in [1_000, 50_000, 150_000] {
            bench.read_until(&mut printed, |printed| printed.len() > count);
            let (next, rest) = bench.renew();
            printed.extend(rest);
            bench = next;
        }
        bench.read_until(&mut printed, |printed| printed.len() >= 200_000);
        bench.assert_ends();
        printed.extend(bench.output.take_now());
        assert_eq!(printed.len(), 200_000);
        let line: Vec<u8> = (b'!'..).take(63).chain([b'\n']).collect();
        assert!(printed.chunks(64).all(|chunk| line.starts_with(chunk)), "bytes are lost or repeated");
    }

    #[test]
    fn a_restored_guest_gets_its_interrupts() {
        let Some(mut bench) = bench(husk_guests::SERIAL, "do=echo wait=interrupt", 1) else { return };
        bench.machine.resume();
        let mut printed = Vec::new();
        bench.read_until(&mut printed, |printed| printed.ends_with(b"ready\n"));
        for letter in b'a'..b'f' {
            assert_eq!(bench.machine.offer_input(&[letter]), 1);
            bench.read_until(&mut printed, |printed| printed.ends_with(&[letter]));
            bench.machine.pause();
            // It is in the FIFO, with its interrupt pending.
            assert_eq!(bench.machine.offer_input(&[letter.to_ascii_uppercase()]), 1);
            let (next, rest) = bench.renew();
            printed.extend(rest);
            bench = next;
            bench.read_until(&mut printed, |printed| printed.ends_with(&[letter.to_ascii_uppercase()]));
        }
        assert_eq!(bench.machine.offer_input(&[4]), 1);
        bench.assert_ends();
    }

    #[test]
    fn timers_and_secondary_processors_continue() {
        for (kernel, cmdline, cpus) in [
            (husk_guests::CLOCK, "do=apic-timer", 1),
            (husk_guests::CLOCK, "do=deadline-timer", 1),
            (husk_guests::PROCESSORS, "cpus=4", 4),
        ] {
            for delay in [0, 1, 3, 10] {
                let Some(mut bench) = bench(kernel, cmdline, cpus) else { return };
                bench.machine.resume();
                std::thread::sleep(Duration::from_millis(delay));
                bench.machine.pause();
                // On a fast host it may have ended already.
                if bench.machine.exit_latch.reason().is_none() {
                    bench = bench.renew().0;
                }
                bench.assert_ends();
            }
        }
    }

    #[test]
    fn a_restored_guest_is_told_of_another_generation() {
        let Some(mut bench) = bench(husk_guests::POWER, "do=wait-for-button", 1) else { return };
        bench.machine.resume();
        let mut printed = Vec::new();
        bench.read_until(&mut printed, |printed| printed.ends_with(b"listening\n"));
        for _ in 0..3 {
            bench = bench.renew().0;
            printed.clear();
            bench.read_until(&mut printed, |printed| printed.ends_with(b"\n"));
            assert_eq!(printed, b"another generation\n");
        }
        bench.machine.press_power_button();
        bench.read_until(&mut printed, |printed| printed.ends_with(b"power button\n"));
    }

    #[test]
    fn memory_that_a_restored_guest_returns_reads_as_zeroes() {
        // It says so itself, and returns pages everywhere between 16 and 48 MiB (firmware/guests/lib/arena.h).
        const RETURNED: u64 = 16 << 20;
        let Some(mut bench) = bench_with_memory(husk_guests::PAGES, "do=pages", 64) else { return };
        bench.machine.resume();
        let mut printed = Vec::new();
        bench.read_until(&mut printed, |printed| printed.ends_with(b"armed\n"));
        bench.machine.pause();
        bench.machine.vm.memory().write_slice(&vec![0xaa; 32 << 20], GuestAddress(RETURNED)).unwrap();
        let (bench, _) = bench.renew();
        assert_eq!(bench.machine.offer_input(b"\n"), 1);
        bench.read_until(&mut printed, |printed| printed.ends_with(b"spent\n"));
        assert_eq!(bench.machine.offer_input(b"\n"), 1);
        bench.assert_ends();
    }

    #[test]
    fn pages_in_the_balloon_stay_there_until_the_guest_takes_them_back() {
        let Some(mut bench) = bench_with_memory(husk_guests::PAGES, "do=keep", 64) else { return };
        bench.machine.resume();
        let mut printed = Vec::new();
        for word in ["armed\n", "inflated\n", "spent\n"] {
            bench.read_until(&mut printed, |printed| printed.ends_with(word.as_bytes()));
            bench = bench.renew().0;
            assert_eq!(bench.machine.offer_input(b"\n"), 1);
        }
        bench.assert_ends();
    }

    /// A saved state that the test changes.
    fn json(machine: &mut Machine) -> serde_json::Value {
        serde_json::to_value(machine.save().unwrap()).unwrap()
    }

    fn encode(state: serde_json::Value) -> Vec<u8> {
        serde_json::from_value::<MachineState>(state).unwrap().encode().unwrap()
    }

    #[test]
    fn time_stamp_counters_stand_still_and_stay_in_step() {
        let Some(mut bench) = bench(husk_guests::PROCESSORS, "cpus=4", 4) else { return };
        // Of the first vCPU, in microseconds, and the differences of the others from it.
        let counters = |state: &serde_json::Value| {
            let vcpus = state["vcpus"].as_array().unwrap();
            let offsets: Option<Vec<u64>> = vcpus.iter().map(|vcpu| vcpu["tsc_offset"].as_u64()).collect();
            let msrs: Vec<kvm_bindings::kvm_msr_entry> = serde_json::from_value(vcpus[0]["msrs"].clone()).unwrap();
            let counter = msrs.iter().find(|msr| msr.index == 0x10).unwrap().data;
            let steps = offsets.map(|all| all.iter().map(|offset| offset.wrapping_sub(all[0])).collect::<Vec<_>>());
            (counter * 1000 / vcpus[0]["tsc_khz"].as_u64().unwrap(), steps)
        };
        let mut before = json(&mut bench.machine);
        // As if its guest had changed it.
        if let Some(offset) = before["vcpus"][2]["tsc_offset"].as_u64() {
            before["vcpus"][2]["tsc_offset"] = offset.wrapping_sub(12_345).into();
        }
        let file = sys::memory_file(c"memory").unwrap();
        memory::write_to(bench.machine.memory(), &file, None).unwrap();
        drop(bench.machine);
        const ASIDE: Duration = Duration::from_secs(3);
        std::thread::sleep(ASIDE);
        bench.machine = restore(&bench.config, encode(before.clone()), file).unwrap();
        let ((before_us, steps), (after_us, steps_after)) = (counters(&before), counters(&json(&mut bench.machine)));
        // It has only just been built.
        if before_us > 600_000_000 {
            eprintln!("SKIPPED: KVM on this host gives guests the host's time stamp counter");
            return;
        }
        assert!(before_us <= after_us && after_us - before_us < ASIDE.as_micros() as u64, "{before_us} {after_us}");
        match steps {
            None => eprintln!("SKIPPED: KVM on this host does not tell the offsets of time stamp counters"),
            steps => assert_eq!(steps_after, steps),
        }
    }

    #[test]
    fn a_guest_that_can_run_guests_is_restored() {
        let Some(mut bench) = bench(husk_guests::SERIAL, "do=echo wait=interrupt", 1) else { return };
        bench.config.nested = true;
        let (resources, _outside) = resources::open(&bench.config).unwrap();
        match build(&bench.config, resources) {
            Err(error) if format!("{error:#}").contains("remove --nested") => {
                eprintln!("SKIPPED: KVM on this host does not support nested virtualization");
                return;
            }
            machine => bench.machine = machine.unwrap(),
        }
        bench.output = bench.machine.console.output.clone();
        bench.machine.resume();
        let mut printed = Vec::new();
        bench.read_until(&mut printed, |printed| printed.ends_with(b"ready\n"));
        bench.machine.pause();
        assert!(json(&mut bench.machine)["vcpus"][0]["nested"].is_array());
        (bench, _) = bench.renew();
        assert_eq!(bench.machine.offer_input(&[4]), 1);
        bench.assert_ends();
    }

    #[test]
    fn a_processor_without_features_that_the_guest_uses_is_rejected() {
        let Some(mut bench) = bench(husk_guests::SERIAL, "do=prompt", 1) else { return };
        let mut state = json(&mut bench.machine);
        let leaves = state["vcpus"][0]["cpuid"].take();
        let mut leaves: Vec<kvm_bindings::kvm_cpuid_entry2> = serde_json::from_value(leaves).unwrap();
        leaves.iter_mut().filter(|leaf| leaf.function == 1).for_each(|leaf| leaf.edx |= 1 << 30);
        state["vcpus"][0]["cpuid"] = serde_json::to_value(leaves).unwrap();
        let file = sys::memory_file(c"memory").unwrap();
        file.set_len(32 << 20).unwrap();
        let error = restore(&bench.config, encode(state), file).map(drop).unwrap_err();
        let words = "lacks features that the guest had when it was saved: ia64";
        assert!(format!("{error:#}").ends_with(words), "{error:#}");
    }

    #[test]
    fn the_state_of_another_machine_is_rejected() {
        let Some(Bench { config, mut machine, .. }) = bench(husk_guests::SERIAL, "do=prompt", 2) else { return };
        let state = machine.save().unwrap();
        let encoded = state.encode().unwrap();
        let refused = |config: &MachineConfig, memory_bytes: u64, words: &str| {
            let file = sys::memory_file(c"memory").unwrap();
            file.set_len(memory_bytes).unwrap();
            let error = restore(config, encoded.clone(), file).map(drop).unwrap_err();
            assert!(format!("{error:#}").contains(words), "{error:#}");
        };
        refused(&config, 31 << 20, "has 32505856 bytes, not 33554432");
        refused(&MachineConfig { cpus: 1, ..config.clone() }, 32 << 20, "has 2 vCPUs, not 1");
        let without_balloon = MachineConfig { balloon: !config.balloon, ..config.clone() };
        refused(&without_balloon, 32 << 20, "devices");
    }
}
