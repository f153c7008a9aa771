//! The words of a kernel's command line that husk knows: those that it puts before the user's, and those that hide its devices.

/// The words that precede the user's: what boots a stock kernel, and a purpose-built one, to a result or a shell fast.
///
/// `first_disk_readonly` is `None` where there is no disk. A later word wins over an earlier one, so the user's do.
pub fn default_cmdline(has_initrd: bool, first_disk_readonly: Option<bool>) -> String {
    let mut words = vec![
        // The serial port is the terminal.
        "console=ttyS0",
        // Every byte on it is an exit: a stock kernel's 20 KiB of messages cost more than most of its work.
        // Warnings and panics still come; `loglevel=7` brings the rest back.
        "quiet",
        // A panic resets at once, and husk reports it. Without this the kernel stops in a loop for ever.
        "panic=-1",
        // By the reset register. Linux would else ask EFI first, because the platform is hardware-reduced, and then the BIOS.
        "reboot=acpi",
        // Crypto drivers are tested by who builds the kernel, not at each boot.
        "cryptomgr.notests",
        // The PCI bus is empty. A look at its ports is all of the search: `pci=off` leaves that out, and has every kernel with
        // PCI complain of it as an error.
        "pci=conf1,noearly",
        // Nothing here does DMA that a 64-bit device address cannot reach. Above 4 GiB of memory Linux would clear
        // 64 MiB for bounce buffers.
        "swiotlb=noforce",
    ];
    // What is *not* here is told by ACPI: no i8042, CMOS clock, VGA, PIT or PIC to probe and wait for.
    if !has_initrd && let Some(readonly) = first_disk_readonly {
        words.push("root=/dev/vda");
        words.push(if readonly { "ro" } else { "rw" });
    }
    words.join(" ")
}

/// The word of `cmdline`, if there is one, that has the kernel find no disk, no network and no more than one processor:
/// ACPI is what tells of them, and their interrupts arrive by I/O APIC and local APIC.
pub fn hides_devices(cmdline: &str) -> Option<&str> {
    // Behind `--` are init's words.
    let words = cmdline.split(' ').take_while(|word| *word != "--");
    let mut acpi = None;
    for word in words {
        match word.split_once('=').unwrap_or((word, "")) {
            // The last two leave the I/O APIC out, too.
            ("noapic" | "nolapic" | "disableapic" | "nosmp", "") | ("maxcpus", "0") => return Some(word),
            ("pci", options) if options.split(',').any(|option| option == "noacpi") => return Some(word),
            ("acpi", _) => acpi = Some(word),
            _ => {}
        }
    }
    acpi.filter(|word| matches!(*word, "acpi=off" | "acpi=ht" | "acpi=noirq"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;

    #[test]
    fn the_disk_is_root_only_without_an_initrd() {
        assert!(default_cmdline(false, Some(false)).ends_with(" root=/dev/vda rw"));
        assert!(default_cmdline(false, Some(true)).ends_with(" root=/dev/vda ro"));
        assert!(!default_cmdline(true, Some(false)).contains("root="));
        assert!(!default_cmdline(false, None).contains("root="));
        assert!(default_cmdline(false, Some(true)).len() < layout::CMDLINE_MAX_BYTES);
    }

    #[test]
    fn a_word_that_hides_the_devices_is_found_and_a_later_one_wins() {
        for (cmdline, word) in [
            ("quiet acpi=off", Some("acpi=off")),
            ("acpi=noirq quiet", Some("acpi=noirq")),
            ("acpi=off acpi=force", None),
            ("acpi=force acpi=off", Some("acpi=off")),
            ("noapic", Some("noapic")),
            ("pci=nommconf,noacpi", Some("pci=nommconf,noacpi")),
            ("pci=conf1,noearly maxcpus=1", None),
            ("maxcpus=0", Some("maxcpus=0")),
            ("quiet -- acpi=off", None),
            ("xacpi=off acpi=offline acpi_osi=off", None),
            ("", None),
        ] {
            assert_eq!(hides_devices(cmdline), word, "{cmdline}");
        }
    }
}
