//! Kernel parameters known to husk: the default ones, and those that would hide its devices.

use crate::layout::VirtioBus;

/// The default parameters, with which both a stock and a purpose-built kernel boot quickly to a result or a shell.
///
/// `first_disk_readonly` is `None` if there is no disk. Later parameters take precedence, so the user's do.
pub fn default_cmdline(has_initrd: bool, first_disk_readonly: Option<bool>) -> String {
    let mut words = vec![
        // The serial port is the console.
        "console=ttyS0",
        // Every byte on it causes an exit: a stock kernel's 20 KiB of messages would take longer than most of its other
        // work. Warnings and panics are still printed; `loglevel=7` restores the rest.
        "quiet",
        // Resets immediately after a panic, which husk reports. Otherwise the kernel would loop forever.
        "panic=-1",
        // Uses the ACPI reset register. Otherwise Linux tries EFI first, because the platform is hardware-reduced, and
        // then the BIOS.
        "reboot=acpi",
        // Crypto drivers are tested when a kernel is built, not at each boot.
        "cryptomgr.notests",
        // The bus, which may be empty, is reached through ports, without a search for other mechanisms. `pci=off` would
        // skip even that, but makes every kernel with PCI log an error.
        "pci=conf1,noearly",
        // No device has DMA restrictions below 64 bits. With more than 4 GiB of memory Linux would allocate and clear
        // 64 MiB for bounce buffers.
        "swiotlb=noforce",
    ];
    // Other parameters are unnecessary because of ACPI: there is no i8042, CMOS clock, VGA, PIT or PIC to probe and
    // wait for.
    if !has_initrd && let Some(readonly) = first_disk_readonly {
        words.push("root=/dev/vda");
        words.push(if readonly { "ro" } else { "rw" });
    }
    words.join(" ")
}

/// Returns the parameter in `cmdline`, if any, that hides disks and networks, which are on `bus`, and perhaps all but one
/// processor: they are described by ACPI, and their interrupts are messages, or go through the I/O APIC and local APIC.
pub fn hides_devices(cmdline: &str, bus: VirtioBus) -> Option<&str> {
    // Arguments after `--` are passed to init.
    let words = cmdline.split(' ').take_while(|word| *word != "--");
    let mut acpi = None;
    for word in words {
        match word.split_once('=').unwrap_or((word, "")) {
            // The last two disable the I/O APIC as well.
            ("noapic" | "nolapic" | "disableapic" | "nosmp", "") | ("maxcpus", "0") => return Some(word),
            ("pci", options) if options.split(',').any(|option| option == "noacpi") => return Some(word),
            ("pci", options)
                if bus == VirtioBus::Pci && options.split(',').any(|option| matches!(option, "off" | "nomsi")) =>
            {
                return Some(word);
            }
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
    fn a_parameter_that_hides_devices_is_found_unless_overridden() {
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
            assert_eq!(hides_devices(cmdline, VirtioBus::Mmio { slots: 1 }), word, "{cmdline}");
            assert_eq!(hides_devices(cmdline, VirtioBus::Pci), word, "{cmdline}");
        }
        for word in ["pci=off", "pci=conf1,nomsi"] {
            assert_eq!(hides_devices(word, VirtioBus::Mmio { slots: 1 }), None);
            assert_eq!(hides_devices(word, VirtioBus::Pci), Some(word));
        }
    }
}
