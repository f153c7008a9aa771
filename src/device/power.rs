//! Ports that end the machine: sleep, reset, panic and exit, and the boot marker.

use std::sync::Arc;

use crate::bus::{Bus, BusError, Device};
use crate::exit_latch::{ExitLatch, ExitReason};
use crate::layout;
use crate::timings::{Step, Timings};

/// SLP_EN, bit 5 of the sleep control register (ACPI 6.5 §4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
/// SLP_TYPx, bits 2 to 4 of the same register.
const SLEEP_TYPE_MASK: u8 = 0b111 << 2;
/// The keyboard controller's command that pulses the processor's reset line.
const I8042_RESET: u8 = 0xfe;
/// pvpanic: "the guest panicked", bit 0 (QEMU's pvpanic specification).
const PVPANIC_PANICKED: u8 = 1 << 0;
/// pvpanic: "the guest panicked and handles the crash itself", bit 1.
const PVPANIC_CRASH_LOADED: u8 = 1 << 1;

/// The ports, each one byte wide. Stateless except for what they report to [`ExitLatch`] and [`Timings`].
pub struct Power {
    exit_latch: Arc<ExitLatch>,
    timings: Arc<Timings>,
}

/// One of the ports of [`Power`], as a device on the bus.
struct Port {
    number: u16,
    power: Arc<Power>,
}

impl Power {
    /// Creates a device that reports to `exit_latch` and `timings`.
    pub fn new(exit_latch: Arc<ExitLatch>, timings: Arc<Timings>) -> Power {
        Power { exit_latch, timings }
    }

    /// Adds all the ports to the bus.
    pub fn attach(self, ports: &mut Bus) -> Result<(), BusError> {
        let power = Arc::new(self);
        let numbers = [
            layout::I8042_COMMAND_PORT,
            layout::PVPANIC_PORT,
            layout::SLEEP_CONTROL_PORT,
            layout::SLEEP_STATUS_PORT,
            layout::RESET_PORT,
            layout::MARKER_PORT,
            layout::EXIT_PORT,
        ];
        for number in numbers {
            ports.insert(u64::from(number), 1, Arc::new(Port { number, power: power.clone() }))?;
        }
        Ok(())
    }

    fn write(&self, port: u16, value: u8) {
        match (port, value) {
            (layout::SLEEP_CONTROL_PORT, v)
                if v & SLEEP_ENABLE != 0 && (v & SLEEP_TYPE_MASK) >> 2 == layout::SLEEP_TYPE_S5 =>
            {
                self.exit_latch.declare(ExitReason::PoweredOff);
            }
            (layout::RESET_PORT, layout::RESET_VALUE) | (layout::I8042_COMMAND_PORT, I8042_RESET) => {
                self.exit_latch.declare(ExitReason::Reset);
            }
            (layout::PVPANIC_PORT, v) if v & PVPANIC_PANICKED != 0 => self.exit_latch.note_panic(),
            (layout::MARKER_PORT, _) => self.timings.mark(Step::Pid1),
            (layout::EXIT_PORT, code) => self.exit_latch.declare(ExitReason::Reported(code)),
            _ => {}
        }
    }

    /// The value read from a port: the keyboard controller is not busy, both pvpanic events are supported, and
    /// everything else is 0.
    fn read(port: u16) -> u8 {
        match port {
            layout::PVPANIC_PORT => PVPANIC_PANICKED | PVPANIC_CRASH_LOADED,
            _ => 0,
        }
    }
}

impl Device for Port {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(Power::read(self.number));
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let [value] = data {
            self.power.write(self.number, *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn outcome_of(port: u16, data: &[u8]) -> Option<ExitReason> {
        let exit_latch = Arc::new(ExitLatch::new().unwrap());
        let mut bus = Bus::default();
        Power::new(exit_latch.clone(), Arc::new(Timings::new(Instant::now()))).attach(&mut bus).unwrap();
        bus.write(u64::from(port), data);
        exit_latch.reason()
    }

    #[test]
    fn each_port_ends_the_machine_with_its_reason() {
        assert_eq!(outcome_of(layout::SLEEP_CONTROL_PORT, &[0x34]), Some(ExitReason::PoweredOff));
        assert_eq!(outcome_of(layout::RESET_PORT, &[1]), Some(ExitReason::Reset));
        assert_eq!(outcome_of(layout::I8042_COMMAND_PORT, &[0xfe]), Some(ExitReason::Reset));
        assert_eq!(outcome_of(layout::EXIT_PORT, &[42]), Some(ExitReason::Reported(42)));
    }

    #[test]
    fn other_values_and_widths_are_ignored() {
        assert_eq!(outcome_of(layout::SLEEP_CONTROL_PORT, &[0x14]), None, "sleep not enabled");
        assert_eq!(outcome_of(layout::SLEEP_CONTROL_PORT, &[0x24]), None, "another sleep state");
        assert_eq!(outcome_of(layout::RESET_PORT, &[2]), None);
        assert_eq!(outcome_of(layout::RESET_PORT, &[1, 0]), None);
        assert_eq!(outcome_of(layout::I8042_COMMAND_PORT, &[0xaa]), None);
        assert_eq!(outcome_of(layout::PVPANIC_PORT, &[1]), None, "a panicking kernel may still print");
    }
}
