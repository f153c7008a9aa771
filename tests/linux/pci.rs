//! Linux guests whose devices are on PCI.

use crate::disk::{disk, holds_what_was_written};
use crate::{boot, guests};

#[test]
fn synced_data_is_on_a_disk_on_pci() {
    let guests = guests!();
    for kernel in ["stock", "micro"] {
        let dir = tempfile::tempdir().unwrap();
        let image = disk(dir.path(), 64 << 20, true);
        let flags = ["--disk", &image, "--cpus", "2", "--transport", "pci"];
        let ended = boot(&guests.join(kernel), "vmlinux", "write", &flags);
        holds_what_was_written(&image, &ended, kernel);
    }
}

#[test]
fn a_guest_moves_a_disk_to_another_address() {
    let guests = guests!();
    for kernel in ["stock", "micro"] {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [first, second] = [0, 1].map(|index| disk(dirs[index].path(), 64 << 20, true));
        let flags = ["--disk", &first, "--disk", &second, "--transport", "pci"];
        // The kernel moves its registers to the next multiple of 1 MiB.
        let job = "pci=resource_alignment=20@00:02.0 -- write_second";
        let ended = boot(&guests.join(kernel), "vmlinux", job, &flags);
        assert_eq!(ended.values().get("bar"), Some(&"0x00000000d0100000"), "{kernel}: {}", ended.output);
        holds_what_was_written(&second, &ended, kernel);
    }
}

#[test]
fn a_machine_with_more_disks_than_interrupt_lines_has_them_on_pci() {
    const DISKS: usize = 24;
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let images: Vec<String> = (0..DISKS).map(|index| format!("{}/{index}.img", dir.path().display())).collect();
    let mut flags = Vec::new();
    for image in &images {
        std::fs::File::create(image).unwrap().set_len(1 << 20).unwrap();
        flags.extend(["--disk", image]);
    }
    let ended = boot(&guests.join("micro"), "vmlinux", "disks", &flags);
    assert_eq!(ended.expect(0, "many disks").values()["disks"], DISKS.to_string());
}
