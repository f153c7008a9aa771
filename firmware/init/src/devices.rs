//! Finds devices that the machine has got while it was saved.

use std::fs;
use std::path::Path;

/// The driver of devices that are not on PCI. It has seen all of their places at boot, and left alone those without a device.
const MMIO_DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// Makes the kernel look for functions on all PCI buses.
const PCI_RESCAN: &str = "/sys/bus/pci/rescan";

/// Lets the kernel find them. They are behind those that it knows. A device that it does not find is missed where it is used.
pub fn find_added() {
    let known = (0..).take_while(|index| Path::new(MMIO_DRIVER).join(mmio_name(*index)).exists()).count();
    if known == 0 {
        let _ = fs::write(PCI_RESCAN, "1");
        return;
    }
    let bind = Path::new(MMIO_DRIVER).join("bind");
    // The first place without a device is the end.
    let _ = (known..).try_for_each(|index| fs::write(&bind, mmio_name(index)));
}

/// The name of the place `index`, which ACPI describes (`LNRO0005`).
fn mmio_name(index: usize) -> String {
    format!("LNRO0005:{index:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_named_as_linux_does() {
        assert_eq!([mmio_name(0), mmio_name(17)], ["LNRO0005:00", "LNRO0005:11"]);
    }
}
