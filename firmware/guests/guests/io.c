/* Port I/O and MMIO of every width, on holes and on a virtio device's registers: `do=ports`, `do=holes`, `do=registers`. */
#include "cpu.h"
#include "guest.h"
#include "virtio.h"

enum {
    /* Between the last virtio device and the I/O APIC. */
    MMIO_HOLE = 0xd8000000,
    REGISTERS_END = 0x200,
};

static void ports(void)
{
    CHECK(in8(PORT_HOLE) == 0xff);
    CHECK(in16(PORT_HOLE) == 0xffff);
    CHECK(in32(PORT_HOLE) == 0xffffffff);
    /* Across the end of the serial port's registers, and at the end of the port space. */
    CHECK(in32(PORT_SERIAL + 6) == 0xffffffff);
    CHECK(in32(0xfffc) == 0xffffffff);
    out8(PORT_HOLE, 1);
    out16(PORT_HOLE, 1);
    out32(PORT_HOLE, 1);
    /* The scratch register holds what was written. */
    for (unsigned i = 0; i < 256; i += 85) {
        out8(PORT_SERIAL + 7, i);
        CHECK(in8(PORT_SERIAL + 7) == i);
    }
    u8 bytes[8] = {0};
    u8 *to = bytes;
    u64 count = sizeof bytes;
    asm volatile("rep insb" : "+D"(to), "+c"(count) : "d"(PORT_HOLE) : "memory");
    CHECK(to == bytes + sizeof bytes && count == 0);
    for (unsigned i = 0; i < sizeof bytes; i++)
        CHECK(bytes[i] == 0xff);
    const char *from = "written by a string instruction\n";
    count = 32;
    asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(PORT_SERIAL) : "memory");
}

static void holes(void)
{
    u64 places[] = {MMIO_HOLE, MMIO_HOLE + 1, MMIO_HOLE + 0xffd, 0xcffffffd, 0xc0000000};
    for (unsigned i = 0; i < sizeof places / sizeof *places; i++) {
        u64 at = places[i];
        CHECK(read8(at) == 0xff);
        CHECK(read16(at) == 0xffff);
        CHECK(read32(at) == 0xffffffff);
        CHECK(read64(at) == ~0ull);
        write8(at, 0);
        write16(at, 0);
        write32(at, 0);
        write64(at, 0);
        CHECK(read64(at) == ~0ull);
    }
}

/* Reads every register with every width and offset, then writes every one: the machine must continue in any case. */
static void registers(void)
{
    struct virtio device;
    if (!virtio_find(VIRTIO_ANY, 0, &device)) {
        print("no virtio device\n");
        exit_with(EXIT_MISSING);
    }
    CHECK(read32(device.base) == VIRTIO_MAGIC);
    for (u64 at = device.base; at < device.base + REGISTERS_END; at++) {
        read8(at);
        read16(at);
        read32(at);
        read64(at);
    }
    for (u64 at = device.base; at < device.base + REGISTERS_END; at++) {
        write8(at, at);
        write16(at, 0xffff);
        write32(at, 0xffffffff);
        write64(at, 0x8000000080000000);
    }
    CHECK(virtio_start(&device, 0));
    CHECK(read32(device.base) == VIRTIO_MAGIC);
}

int guest_main(void)
{
    if (told_to("ports"))
        ports();
    else if (told_to("holes"))
        holes();
    else if (told_to("registers"))
        registers();
    else
        return EXIT_BAD_COMMAND_LINE;
    print("done\n");
    return EXIT_OK;
}
