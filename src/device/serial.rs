//! The 16550 UART at COM1: kernel messages and the console's input.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{Serial as Uart, SerialEvents, SerialState as UartState};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Device;
use crate::console::output::Output;
use crate::exit_latch::ExitLatch;
use crate::irq::IrqLine;
use crate::sys::event;
use crate::timings::{Step, Timings};

/// The interrupt enable register and its bit "received data available" (16550 data sheet).
const IER_OFFSET: u8 = 1;
const IER_RECEIVED_DATA: u8 = 1 << 0;
/// The interrupt identification register: bit 0 is set while no interrupt is pending.
const IIR_NONE: u8 = 1 << 0;
/// The line control register: bit 7 maps the divisor in place of the first two registers.
const LCR_OFFSET: u8 = 3;
const LCR_DLAB: u8 = 1 << 7;
/// The modem control register: OUT2 enables interrupts, LOOP loops the output back.
const MCR_OFFSET: u8 = 4;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

/// The prefix of Linux's panic messages.
const PANIC_MARK: &[u8] = b"Kernel panic - not syncing: ";
/// The maximum length of a line that is searched for it.
const LINE_MAX_BYTES: usize = 512;

/// The serial port. Registers are accessed on vCPU threads, input by the thread that reads the terminal.
pub struct Serial {
    port: Mutex<Port>,
    irq: IrqLine,
    output: Arc<Output>,
    exit_latch: Arc<ExitLatch>,
    timings: Arc<Timings>,
}

/// The saved state of the port: its registers by the names of the 16550 data sheet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "they are the registers")]
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// Input that the guest has not read.
    pub in_buffer: Vec<u8>,
    /// The start of the current line of output, in which a panic is recognized.
    pub line: Vec<u8>,
}

struct Port {
    uart: Uart<Interrupt, InputSide, Vec<u8>>,
    line_control: u8,
    interrupt_enable: u8,
    modem_control: u8,
    line: Vec<u8>,
}

struct Interrupt(IrqLine);

impl Trigger for Interrupt {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.raise();
        Ok(())
    }
}

/// Notifies the input thread that the guest can accept more.
struct InputSide {
    starved: AtomicBool,
    wanted: Arc<EventFd>,
}

impl InputSide {
    fn call(&self) {
        if self.starved.swap(false, Ordering::Relaxed) {
            // A full counter has already woken the reader.
            let _ = self.wanted.write(1);
        }
    }
}

impl SerialEvents for InputSide {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.call();
    }
}

impl Serial {
    /// Creates a port that interrupts through `irq` and prints to `output`. The returned event is readable when the
    /// guest can accept input that [`Serial::offer_input`] had to refuse.
    pub fn new(
        irq: IrqLine,
        output: Arc<Output>,
        exit_latch: Arc<ExitLatch>,
        timings: Arc<Timings>,
    ) -> std::io::Result<(Serial, Arc<EventFd>)> {
        let wanted = Arc::new(event::create()?);
        let events = InputSide { starved: AtomicBool::new(false), wanted: wanted.clone() };
        let port = Port {
            uart: Uart::with_events(Interrupt(irq.try_clone()?), events, Vec::new()),
            line_control: 0,
            interrupt_enable: 0,
            modem_control: 0,
            line: Vec::with_capacity(LINE_MAX_BYTES),
        };
        Ok((Serial { port: Mutex::new(port), irq, output, exit_latch, timings }, wanted))
    }

    /// Passes `bytes` to the guest and returns how many were accepted: none while no driver has opened the port, since
    /// they would be lost.
    pub fn offer_input(&self, bytes: &[u8]) -> usize {
        let mut port = self.lock();
        let taken = if port.listens() { port.uart.enqueue_raw_bytes(bytes).unwrap_or(0) } else { 0 };
        port.uart.events().starved.store(taken < bytes.len(), Ordering::Relaxed);
        taken
    }

    /// Saves the port's registers and the bytes that the guest has not read. No vCPU may run.
    pub fn save(&self) -> SerialState {
        let port = self.lock();
        let uart = port.uart.state();
        SerialState {
            baud_divisor_low: uart.baud_divisor_low,
            baud_divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            in_buffer: uart.in_buffer,
            line: port.line.clone(),
        }
    }

    /// Sets a saved state. No vCPU may run. Fails without any change if there are more bytes than the port holds.
    pub fn restore(&self, state: &SerialState) -> anyhow::Result<()> {
        ensure!(state.line.len() <= LINE_MAX_BYTES, "the saved serial port has a line of {} bytes", state.line.len());
        let uart = UartState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        };
        let mut port = self.lock();
        let irq = Interrupt(self.irq.try_clone().context("duplicate an eventfd")?);
        let events = InputSide { starved: AtomicBool::new(true), wanted: port.uart.events().wanted.clone() };
        let Ok(uart) = Uart::from_state(&uart, irq, events, Vec::new()) else {
            bail!("the saved serial port has {} bytes of input", state.in_buffer.len());
        };
        port.uart = uart;
        port.line_control = state.line_control;
        port.interrupt_enable = state.interrupt_enable;
        port.modem_control = state.modem_control;
        port.line.clone_from(&state.line);
        // Its interrupt may have been on its way. One more does no harm: the guest reads what it is for.
        if state.interrupt_identification & IIR_NONE == 0 || !state.in_buffer.is_empty() {
            self.irq.raise();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_register(&self, offset: u8, value: u8) {
        let mut port = self.lock();
        port.write(offset, value);
        let printed = std::mem::take(port.uart.writer_mut());
        if printed.is_empty() {
            return;
        }
        let panic = printed.iter().find_map(|byte| port.watch(*byte));
        drop(port);
        self.timings.mark(Step::FirstOutput);
        if let Some(words) = panic {
            self.exit_latch.note_panic_words(words);
        }
        self.output.push(&printed);
    }
}

impl Port {
    fn write(&mut self, offset: u8, value: u8) {
        // Only the console or an interrupt could fail, and neither can here.
        let _ = self.uart.write(offset, value);
        match offset {
            IER_OFFSET if self.line_control & LCR_DLAB == 0 => self.interrupt_enable = value,
            LCR_OFFSET => self.line_control = value,
            MCR_OFFSET => self.modem_control = value,
            _ => return,
        }
        if self.listens() {
            self.uart.events().call();
        }
    }

    /// Whether a driver has opened the port. Earlier bytes would be discarded by its initialization.
    fn listens(&self) -> bool {
        self.interrupt_enable & IER_RECEIVED_DATA != 0 && self.modem_control & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
    }

    /// Tracks the output line by line, and returns the message of a kernel panic.
    fn watch(&mut self, byte: u8) -> Option<String> {
        if byte != b'\n' {
            if self.line.len() < LINE_MAX_BYTES {
                self.line.push(byte);
            }
            return None;
        }
        let at = self.line.windows(PANIC_MARK.len()).position(|w| w == PANIC_MARK);
        let words = at.and_then(|at| self.line.get(at + PANIC_MARK.len()..)).map(|words| {
            String::from_utf8_lossy(words).chars().filter(|c| !c.is_control()).collect::<String>().trim().to_owned()
        });
        self.line.clear();
        words
    }
}

impl Device for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            *value = self.lock().uart.read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            self.write_register(offset, *value);
        }
    }

    fn is_behind(&self) -> bool {
        self.output.is_full()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::exit_latch::ExitReason;

    fn serial() -> (Serial, Arc<EventFd>, Arc<ExitLatch>, Arc<Output>) {
        let exit_latch = Arc::new(ExitLatch::new().unwrap());
        let output = Arc::new(Output::default());
        let timings = Arc::new(Timings::new(Instant::now()));
        let (serial, wanted) =
            Serial::new(IrqLine::new(4).unwrap(), output.clone(), exit_latch.clone(), timings).unwrap();
        (serial, wanted, exit_latch, output)
    }

    fn open(serial: &Serial) {
        serial.write(u64::from(MCR_OFFSET), &[MCR_OUT2]);
        serial.write(u64::from(IER_OFFSET), &[IER_RECEIVED_DATA]);
    }

    #[test]
    fn input_waits_for_a_driver() {
        let (serial, wanted, ..) = serial();
        assert_eq!(serial.offer_input(b"hello"), 0);
        assert!(wanted.read().is_err(), "nobody listens yet");
        open(&serial);
        assert_eq!(wanted.read().unwrap(), 1);
        assert_eq!(serial.offer_input(b"hello"), 5);
        let mut got = Vec::new();
        for _ in 0..5 {
            let mut byte = [0];
            serial.read(0, &mut byte);
            got.extend(byte);
        }
        assert_eq!(got, b"hello");
    }

    #[test]
    fn input_continues_when_the_fifo_is_drained() {
        let (serial, wanted, ..) = serial();
        open(&serial);
        let taken = serial.offer_input(&[b'x'; 1000]);
        assert!((1..1000).contains(&taken));
        for _ in 0..taken {
            assert!(wanted.read().is_err());
            serial.read(0, &mut [0]);
        }
        assert_eq!(wanted.read().unwrap(), 1);
    }

    #[test]
    fn a_probe_in_loopback_takes_no_input() {
        let (serial, ..) = serial();
        open(&serial);
        serial.write(u64::from(MCR_OFFSET), &[MCR_OUT2 | MCR_LOOP]);
        assert_eq!(serial.offer_input(b"x"), 0);
    }

    #[test]
    fn the_divisor_latch_does_not_enable_input() {
        let (serial, ..) = serial();
        serial.write(u64::from(MCR_OFFSET), &[MCR_OUT2]);
        serial.write(u64::from(LCR_OFFSET), &[LCR_DLAB]);
        serial.write(u64::from(IER_OFFSET), &[IER_RECEIVED_DATA]);
        assert_eq!(serial.offer_input(b"x"), 0);
    }

    #[test]
    fn a_panic_message_is_recorded() {
        let (serial, _, exit_latch, _) = serial();
        for byte in b"[    0.5] Kernel panic - not syncing: VFS: no root\r\n" {
            serial.write(0, &[*byte]);
        }
        exit_latch.declare(ExitReason::Reset);
        assert_eq!(exit_latch.reason(), Some(ExitReason::Panicked(Some("VFS: no root".into()))));
    }

    #[test]
    fn odd_widths_are_ignored() {
        let (serial, _, _, output) = serial();
        serial.write(0, b"ab");
        let mut data = [0xff; 4];
        serial.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
        output.close();
        assert_eq!(output.take(), None);
    }
}
