//! Computes the host memory that a machine needs: the guest's memory plus the maximum that a guest can make each
//! component use. Each device states its own budget; they are added up here.

use crate::backend::disk::{BOUNCE_BYTES, Qcow2Disk, UringDisk};
use crate::config::{Attachment, DiskConfig, Format, MachineConfig, NetworkConfig};
use crate::layout;
use crate::resources::{net as interface, passt};
use crate::sys::mapping::Pages;
use crate::virtio::{block, net, vsock};

/// Memory for husk itself (3 MiB), the kernel memory it uses (1 MiB) and the page cache that an active disk needs.
const ITSELF_BYTES: u64 = 32 << 20;
const MIB: u64 = 1 << 20;

impl MachineConfig {
    /// The host memory in MiB that is sufficient for the machine: the guest's memory, the host's and KVM's page tables
    /// for it (up to 1/512 each), husk itself and the budgets of its devices.
    pub fn host_memory_needed_mib(&self) -> u64 {
        let beside_bytes = ITSELF_BYTES + self.device_budgets_bytes();
        self.backed_mib() + self.memory_mib.div_ceil(128) + beside_bytes.div_ceil(MIB)
    }

    /// Guest memory in whole pages of the host.
    fn backed_mib(&self) -> u64 {
        let Pages::Pool(page_bytes) = self.huge_pages.pages() else { return self.memory_mib };
        let ranges = layout::memory_ranges(self.memory_mib.saturating_mul(MIB));
        ranges.iter().map(|(_, len_bytes)| len_bytes.next_multiple_of(page_bytes)).sum::<u64>() / MIB
    }

    /// The sum of the devices' budgets in bytes: the most that a guest can make them use, in this process and in the
    /// kernel, beyond what every machine uses.
    pub fn device_budgets_bytes(&self) -> u64 {
        let disks: u64 = self.disks.iter().map(disk_bytes).sum();
        let networks: u64 = self.networks.iter().map(|network| network_bytes(network, self.cpus)).sum();
        let sockets = self.vsock.as_ref().map_or(0, |_| vsock::BUDGET_BYTES);
        disks + networks + sockets
    }
}

fn disk_bytes(disk: &DiskConfig) -> u64 {
    let queue_bytes = match disk.format() {
        Format::Raw => block::BUDGET_BYTES + UringDisk::BUDGET_BYTES + BOUNCE_BYTES as u64,
        Format::Qcow2 => block::BUDGET_BYTES + Qcow2Disk::BUDGET_BYTES,
    };
    let images = disk.backing.iter().filter(|backing| backing.format() == Format::Qcow2).count();
    u64::from(disk.queues) * queue_bytes + images as u64 * Qcow2Disk::BUDGET_BYTES
}

fn network_bytes(network: &NetworkConfig, cpus: u32) -> u64 {
    match network.to {
        Attachment::User(_) => net::budget_bytes(1) + passt::BUDGET_BYTES,
        Attachment::Tap { .. } | Attachment::Bridge { .. } | Attachment::Interface { .. } => {
            net::budget_bytes(interface::pairs(cpus))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BackingConfig, HugePages, UserNetwork, VsockConfig};

    #[test]
    fn device_budgets_are_part_of_the_needed_host_memory() {
        let bare = MachineConfig { memory_mib: 512, ..MachineConfig::default() };
        assert_eq!(bare.host_memory_needed_mib(), 512 + 4 + 32);
        let huge = MachineConfig { huge_pages: HugePages::Size1G, ..bare.clone() };
        assert_eq!(huge.host_memory_needed_mib(), 1024 + 4 + 32);
        let disk = DiskConfig::of("disk.img".into());
        let tap = || NetworkConfig::of(Attachment::Tap { name: "tap0".into() });
        let with_disk = MachineConfig { disks: vec![disk.clone()], ..bare.clone() };
        let image = DiskConfig { format: Some(Format::Qcow2), ..disk.clone() };
        let with_disks = MachineConfig { disks: vec![disk; 3], ..bare.clone() };
        let backing = vec![BackingConfig { path: "b.qcow2".into(), format: None }];
        let overlay = DiskConfig { backing, ..image.clone() };
        let with_overlay = MachineConfig { disks: vec![overlay], ..bare.clone() };
        let queues = DiskConfig { queues: 3, ..DiskConfig::of("disk.img".into()) };
        let with_queues = MachineConfig { disks: vec![queues], ..bare.clone() };
        let with_image = MachineConfig { disks: vec![image], ..bare.clone() };
        let with_tap = MachineConfig { networks: vec![tap()], ..bare.clone() };
        let with_taps = MachineConfig { networks: vec![tap()], cpus: 8, ..bare.clone() };
        let user = NetworkConfig::of(Attachment::User(UserNetwork::default()));
        let with_passt = MachineConfig { networks: vec![user], ..bare.clone() };
        let sockets = VsockConfig { socket: "v.sock".into(), cid: 3 };
        let with_sockets = MachineConfig { vsock: Some(sockets), ..bare };
        let needed = |config: &MachineConfig| config.host_memory_needed_mib() - (512 + 4 + 32);
        assert_eq!([needed(&with_disk), needed(&with_disks), needed(&with_queues)], [5, 15, 15]);
        assert!(needed(&with_image) >= 2 + 22, "tables, and a cluster that is being unpacked");
        assert_eq!(needed(&with_overlay), 2 * needed(&with_image) - 2, "each image has its own");
        assert!(needed(&with_tap) >= 1 && needed(&with_taps) > needed(&with_tap));
        assert!(needed(&with_passt) > 32, "passt itself and its socket");
        assert_eq!(needed(&with_sockets), vsock::BUDGET_BYTES.div_ceil(MIB));
        assert!((8..32).contains(&needed(&with_sockets)), "{}", needed(&with_sockets));
    }
}
