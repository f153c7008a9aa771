//! The memory addresses of the bus: ECAM, and the window in which guests place BARs.

use super::Functions;
use crate::bus::Device;

/// The enhanced configuration access mechanism: the configuration registers of all functions as memory (PCI Express
/// Base Specification 5.0, §7.2.2).
pub struct Ecam(pub Functions);

impl Device for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_config(offset, data);
    }
}

/// The window of addresses for BARs. `base` is the address of the window's start.
pub struct Window {
    /// The functions whose BARs may be there.
    pub functions: Functions,
    /// The first address of the window.
    pub base: u64,
}

impl Device for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((function, offset)) = self.functions.at(self.base + offset, data.len()) {
            function.read_bar(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.functions.at(self.base + offset, data.len()) {
            function.write_bar(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::layout;
    use crate::pci::Function;

    /// A function whose registers contain its number.
    struct Fake(u8, AtomicU64);

    impl Function for Fake {
        fn read_config(&self, _offset: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write_config(&self, _offset: u64, data: &[u8]) {
            let at = if data[0] == 0 { u64::MAX } else { layout::PCI_WINDOW + u64::from(data[0]) * 0x1000 };
            self.1.store(at, Ordering::SeqCst);
        }
        fn bar_address(&self) -> Option<u64> {
            Some(self.1.load(Ordering::SeqCst)).filter(|at| *at != u64::MAX)
        }
        fn bar_bytes(&self) -> u64 {
            layout::PCI_BAR_BYTES
        }
        fn read_bar(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write_bar(&self, _offset: u64, _data: &[u8]) {}
    }

    fn bus() -> (Ecam, Window) {
        let fake = |number: u8| -> Arc<dyn Function> {
            let at = layout::PCI_WINDOW + u64::from(number - 1) * layout::PCI_BAR_BYTES;
            Arc::new(Fake(number, AtomicU64::new(at)))
        };
        let functions = Functions::new(vec![fake(1), fake(2)]);
        (Ecam(functions.clone()), Window { functions, base: layout::PCI_WINDOW })
    }

    fn read<const N: usize>(device: &dyn Device, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        device.read(offset, &mut data);
        data
    }

    #[test]
    fn ecam_finds_functions_by_device_number() {
        let (ecam, _) = bus();
        assert_eq!(read(&ecam, 0), [0x36, 0x1b, 0x08, 0x00], "the host bridge");
        assert_eq!((read(&ecam, 1 << 15), read(&ecam, 2 << 15)), ([1], [2]));
        assert_eq!(read(&ecam, 3 << 15), [0xff; 4], "no such device");
        assert_eq!(read(&ecam, 1 << 15 | 1 << 12), [0xff; 4], "no such function");
        assert_eq!(read(&ecam, 1 << 15 | 0x100), [0; 4], "no extended capabilities");
        assert_eq!(read(&ecam, 1 << 20), [0xff; 4], "no such bus");
    }

    #[test]
    fn accesses_across_a_double_word_are_ignored() {
        let (ecam, _) = bus();
        assert_eq!((read(&ecam, 1 << 15 | 3), read(&ecam, 1 << 15 | 1)), ([0xff; 2], [0xff; 4]));
        assert_eq!((read(&ecam, 1 << 15), read(&ecam, 1 << 15)), ([0xff; 8], [0xff; 3]));
    }

    #[test]
    fn the_window_finds_functions_wherever_the_guest_puts_them() {
        let (ecam, window) = bus();
        assert_eq!((read(&window, 0), read(&window, 5)), ([1], [6]));
        assert_eq!(read(&window, layout::PCI_BAR_BYTES), [2]);
        assert_eq!(read(&window, layout::PCI_BAR_BYTES - 1), [0xff; 2], "across the end");
        assert_eq!(read(&window, 2 * layout::PCI_BAR_BYTES), [0xff; 2]);
        ecam.write(1 << 15, &[0x80]);
        assert_eq!((read(&window, 0), read(&window, 0x8_0000)), ([0xff], [1]));
        ecam.write(1 << 15, &[0]);
        assert_eq!(read(&window, 0x8_0000), [0xff], "it does not respond");
    }
}
