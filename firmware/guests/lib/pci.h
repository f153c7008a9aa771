/* The configuration registers of PCI functions, as memory (ECAM) and through ports. */
#pragma once

#include "guest.h"

enum {
    PCI_ECAM = 0xe0000000,
    /* The addresses in which a machine's BARs are. */
    PCI_WINDOW = 0xd0000000,
    PCI_SLOTS = 32,
    PCI_VENDOR_VIRTIO = 0x1af4,
    /* Plus the device's type (virtio 1.2 §4.1.2). */
    PCI_DEVICE_VIRTIO = 0x1040,
    PORT_PCI_ADDRESS = 0xcf8,
    PORT_PCI_DATA = 0xcfc,
};

/* Offsets of registers (PCI Local Bus Specification 3.0, §6.1). */
enum { PCI_DEVICE_ID = 0x02, PCI_COMMAND = 0x04, PCI_BAR0 = 0x10, PCI_CAPABILITIES = 0x34 };
enum { PCI_COMMAND_MEMORY = 1 << 1, PCI_COMMAND_MASTER = 1 << 2 };

/* The registers of the function in this slot. */
static inline u64 pci_function(unsigned slot) { return PCI_ECAM + ((u64)slot << 15); }
