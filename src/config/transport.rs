//! How a guest finds its virtio devices.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::MachineConfig;
use crate::layout::{self, VirtioBus};

/// The transport of the virtio devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// MMIO, unless there are more devices than interrupt lines for it.
    #[default]
    Auto,
    /// Registers at fixed addresses, described by ACPI. Boots fastest.
    Mmio,
    /// A PCI bus with message-signaled interrupts, each of which takes two VM exits less.
    Pci,
}

impl Transport {
    pub(super) fn is_default(&self) -> bool {
        *self == Transport::default()
    }
}

impl FromStr for Transport {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Transport, &'static str> {
        match text {
            "auto" => Ok(Transport::Auto),
            "mmio" => Ok(Transport::Mmio),
            "pci" => Ok(Transport::Pci),
            _ => Err("use auto, mmio or pci"),
        }
    }
}

impl MachineConfig {
    /// The number of virtio devices, including the entropy device, which every machine has.
    pub fn device_count(&self) -> usize {
        let lists = self.disks.len() + self.networks.len() + self.shares.len();
        1 + lists + usize::from(self.vsock.is_some()) + usize::from(self.balloon)
    }

    /// The bus of the virtio devices.
    pub fn virtio_bus(&self) -> VirtioBus {
        match self.transport {
            Transport::Pci => VirtioBus::Pci,
            Transport::Auto if self.device_count() > layout::VIRTIO_MMIO_MAX => VirtioBus::Pci,
            Transport::Auto | Transport::Mmio if self.spare_slots => VirtioBus::Mmio { slots: layout::VIRTIO_MMIO_MAX },
            Transport::Auto | Transport::Mmio => VirtioBus::Mmio { slots: self.device_count() },
        }
    }

    /// Whether the bus has room for the machine's devices.
    pub(super) fn devices_fit(&self) -> bool {
        let devices_max = match self.transport {
            Transport::Mmio => layout::VIRTIO_MMIO_MAX,
            Transport::Auto | Transport::Pci => layout::PCI_FUNCTIONS_MAX,
        };
        self.device_count() <= devices_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskConfig, Invalid, VsockConfig};

    fn with_disks(count: usize, transport: Transport) -> MachineConfig {
        let disk: DiskConfig = serde_json::from_str(r#"{"path": "disk.img"}"#).unwrap();
        MachineConfig { kernel: "vmlinux".into(), disks: vec![disk; count], transport, ..MachineConfig::default() }
    }

    #[test]
    fn a_machine_with_more_devices_than_interrupt_lines_has_a_pci_bus() {
        // Each has an entropy device and a balloon as well.
        assert_eq!(with_disks(16, Transport::Auto).virtio_bus(), VirtioBus::Mmio { slots: 18 });
        assert_eq!(with_disks(17, Transport::Auto).virtio_bus(), VirtioBus::Pci);
        assert_eq!(with_disks(0, Transport::Pci).virtio_bus(), VirtioBus::Pci);
        let with_room = MachineConfig { spare_slots: true, ..with_disks(1, Transport::Auto) };
        assert_eq!((with_room.device_count(), with_room.virtio_bus()), (3, VirtioBus::Mmio { slots: 18 }));
    }

    #[test]
    fn every_bus_has_room_for_a_number_of_devices() {
        let vsock = Some(VsockConfig { socket: "v.sock".into(), cid: 3 });
        for (transport, disks_max, error) in [
            (Transport::Mmio, 16, Invalid::TooManyMmioDevices(17, 0)),
            (Transport::Pci, 29, Invalid::TooManyDevices(30, 0)),
            (Transport::Auto, 29, Invalid::TooManyDevices(30, 0)),
        ] {
            assert_eq!(with_disks(disks_max, transport).validate(), Ok(()));
            assert_eq!(with_disks(disks_max + 1, transport).validate(), Err(error));
            let full = MachineConfig { vsock: vsock.clone(), ..with_disks(disks_max, transport) };
            assert!(full.validate().is_err());
            assert_eq!(MachineConfig { balloon: false, ..full }.validate(), Ok(()));
        }
    }

    #[test]
    fn a_transport_is_parsed_and_named_alike() {
        for (word, transport) in [("auto", Transport::Auto), ("mmio", Transport::Mmio), ("pci", Transport::Pci)] {
            assert_eq!(word.parse(), Ok(transport));
            assert_eq!(serde_json::to_string(&transport).unwrap(), format!("{word:?}"));
        }
        assert_eq!("isa".parse::<Transport>(), Err("use auto, mmio or pci"));
    }
}
