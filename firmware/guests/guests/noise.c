/* Accesses to everything that is not memory, at every width and alignment: `do=registers` of devices, `do=ports`, `do=holes`
 * of the address space, `do=cpuid`, `do=msrs`. */
#include "arena.h"
#include "cpu.h"
#include "pci.h"

enum {
    MMIO_REGISTERS_END = 0x200,
    BAR_STRUCTURES = 7,
    BAR_STRUCTURE = 0x1000,
    BAR_STRUCTURE_END = 0x60,
    HOLE = 0xc0000000,
    HOLE_END = 0xfec00000,
    GENERAL_PROTECTION = 13,
    WIDTHS = 4,
};

static const u64 values[] = {0, 1, 2, 3, 7, 0xf, 0x40, 0x80, 0xff, 0xffff, 0x10000, 0x80000000, 0xffffffff, ~0ull, 1ull << 63};

static void read_at(u64 at, unsigned width)
{
    switch (width % WIDTHS) {
    case 0: read8(at); break;
    case 1: read16(at); break;
    case 2: read32(at); break;
    case 3: read64(at); break;
    }
}

static void write_at(u64 at, unsigned width, u64 value)
{
    switch (width % WIDTHS) {
    case 0: write8(at, value); break;
    case 1: write16(at, value); break;
    case 2: write32(at, value); break;
    case 3: write64(at, value); break;
    }
}

/* Every width at every offset, or one in `part=` of these, read before and after something is written. */
static void sweep(u64 from, u64 to)
{
    u64 part = argument_number("part", 1);
    for (u64 at = from; at < to; at++)
        for (unsigned width = 0; width < WIDTHS; width++) {
            if (chance(part))
                continue;
            read_at(at, width);
            write_at(at, width, ONE_OF(values));
            read_at(at, width);
        }
}

static void registers(void)
{
    for (unsigned i = 0; i < device_count; i++) {
        struct virtio *device = &devices[i];
        restart(device, virtio_offered(device));
        if (!device->is_pci)
            sweep(device->base, device->base + MMIO_REGISTERS_END);
        for (unsigned nth = 0; device->is_pci && nth < BAR_STRUCTURES; nth++)
            sweep(device->bar + nth * BAR_STRUCTURE, device->bar + nth * BAR_STRUCTURE + BAR_STRUCTURE_END);
    }
}

/* Whether an access of up to 4 bytes may end the machine, which is what it is for. */
static bool ends(u16 port)
{
    return (port <= PORT_I8042_COMMAND && port + 4 > PORT_I8042_COMMAND) || (port <= PORT_PVPANIC && port + 4 > PORT_PVPANIC) ||
           (port <= PORT_EXIT && port + 4 > PORT_SLEEP_CONTROL);
}

static void ports(void)
{
    static u32 buffer[4];
    for (u64 round = 0, count = rounds(20000); round < count; round++) {
        /* Those of devices, or any. */
        u16 port = chance(2) ? chance(0x1000) : chance(0x10000);
        if (ends(port))
            continue;
        u64 repeats = sizeof buffer / sizeof *buffer;
        void *at = buffer;
        u32 value = ONE_OF(values);
        switch (chance(8)) {
        case 0: in8(port); break;
        case 1: in16(port); break;
        case 2: in32(port); break;
        case 3: out8(port, value); break;
        case 4: out16(port, value); break;
        case 5: out32(port, value); break;
        case 6: asm volatile("rep insl" : "+D"(at), "+c"(repeats) : "d"(port) : "memory"); break;
        case 7: asm volatile("rep outsl" : "+S"(at), "+c"(repeats) : "d"(port) : "memory"); break;
        }
    }
}

static void holes(void)
{
    for (u64 round = 0, count = rounds(20000); round < count; round++) {
        u64 at = HOLE + chance(HOLE_END - HOLE - 8);
        /* Most of it is empty: prefer what is near devices. */
        if (chance(2))
            at = devices[chance(device_count)].config + chance(0x2000) - 0x1000;
        unsigned width = chance(WIDTHS);
        if (chance(2))
            read_at(at, width);
        else
            write_at(at, width, ONE_OF(values));
    }
}

static void leaves(void)
{
    static const u32 bases[] = {0, 0x40000000, 0x40000100, 0x80000000, 0xc0000000, 0xffffff00};
    for (u64 round = 0, count = rounds(5000); round < count; round++)
        cpuid(ONE_OF(bases) + chance(64), chance(64));
    CHECK(cpuid(0x40000000, 0).ebx);
}

static u64 refused;

/* RDMSR and WRMSR have two bytes. */
static void skip(struct interrupt_frame *frame)
{
    refused++;
    frame->rip += 2;
}

/* Writes to what does not belong to the guest's own paging and segments. */
static bool is_own(u32 msr) { return msr == 0x1b || msr == 0x174 || msr >= 0xc0000080; }

static void msrs(void)
{
    static const u32 bases[] = {0, 0x170, 0x1a0, 0x200, 0x2f0, 0x400, 0x480, 0x600, 0x800, 0x830, 0xc80,
                                0x40000000, 0x40000100, 0x4b564d00, 0xc0000080, 0xc0000100, 0xc0010000, 0xffffffc0};
    handle(GENERAL_PROTECTION, skip);
    for (u64 round = 0, count = rounds(5000); round < count; round++) {
        u32 msr = ONE_OF(bases) + chance(64), low = ONE_OF(values), high = ONE_OF(values);
        /* Of the local APIC: its commands may reset this processor, and of KVM: they enable asynchronous page faults. */
        bool harmless = !is_own(msr) && !(msr >= 0x800 && msr < 0x900) && !(msr >> 24 == 0x4b);
        if (harmless && chance(2))
            asm volatile("wrmsr" ::"c"(msr), "a"(low), "d"(high) : "memory");
        else
            asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr) : "memory");
    }
    CHECK(refused > 0);
}

int guest_main(void)
{
    arm();
    if (told_to("registers"))
        registers();
    else if (told_to("ports"))
        ports();
    else if (told_to("holes"))
        holes();
    else if (told_to("cpuid"))
        leaves();
    else if (told_to("msrs"))
        msrs();
    else
        return EXIT_BAD_COMMAND_LINE;
    spend();
}
