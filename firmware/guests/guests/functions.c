/* PCI configuration that no driver writes: `do=table` of MSI-X, `do=config` registers, `do=bars` that move while another vCPU
 * uses them. */
#include "arena.h"
#include "cpu.h"
#include "pci.h"

enum {
    MSIX_ENABLE = 1 << 15,
    MSIX_MASK = 1 << 14,
    MSIX_ENTRY = 16,
    COMMON_CONFIG_VECTOR = 0x10,
    COMMON_QUEUE_SELECT = 0x16,
    COMMON_QUEUE_VECTOR = 0x1a,
    VECTOR = 0x60,
    INTERRUPTS_FROM = 32,
    INTERRUPTS = 256,
};

static volatile u64 interrupts;
static struct queue queue;
static u8 bytes[64];

static void count(struct interrupt_frame *frame)
{
    (void)frame;
    interrupts++;
    end_of_interrupt();
}

/* A request of the entropy device, whose interrupt is the table's business. */
static void request(struct virtio *entropy)
{
    struct used_entry entry;
    set_descriptor(&queue, 0, bytes, sizeof bytes, DESC_WRITE, 0);
    queue_offer(&queue, 0);
    virtio_ring(entropy, 0);
    CHECK(queue_wait(&queue, &entry));
}

/* Messages that a host can send, or not; none of them resets a processor. */
static u64 some_message_address(void)
{
    static const u64 addresses[] = {0, 0xfee00000, 0xfee01000, 0xfeeff000, 0xfee0000c, 0xfec00000, 0x1000000, 0xffffffff,
                                    0xfee00000ull << 32, ~0ull, 1ull << 63 | 0xfee00000};
    return ONE_OF(addresses);
}

static u32 some_message_data(void)
{
    static const u32 data[] = {VECTOR, 0, 0x10, 0x1f, 0x20, 0xfe, 0x100 | VECTOR, 0x4000 | VECTOR, 0x8000 | VECTOR,
                               0xffff0000 | VECTOR};
    return ONE_OF(data);
}

static void table(struct virtio *entropy)
{
    static const u16 vectors[] = {0, 1, 2, 0x7ff, 0xfffe, 0xffff};
    u64 control = entropy->msix_control;
    interrupts_start();
    for (unsigned vector = INTERRUPTS_FROM; vector < INTERRUPTS; vector++)
        handle(vector, count);
    restart(entropy, 0);
    queue_start(entropy, 0, 8, &queue);
    virtio_ready(entropy);
    for (u64 round = 0, end = rounds(2000); round < end; round++) {
        u64 at = entropy->msix_table + chance(4) * MSIX_ENTRY;
        switch (chance(8)) {
        case 0: write64(at, some_message_address()); break;
        case 1: write32(at + 8, some_message_data()); break;
        case 2: write32(at + 12, chance(4)); break;
        case 3: write64(at + 8, some_message_data()); break;
        case 4: write16(control, chance(4) << 14 | chance(0x4000)); break;
        case 5: write16(entropy->base + COMMON_QUEUE_VECTOR, ONE_OF(vectors)); break;
        case 6: write8(at + chance(16), chance(256)); break;
        case 7: read64(entropy->msix_table + chance(0x2000)); break;
        }
        if (chance(4) == 0)
            write16(entropy->base + COMMON_CONFIG_VECTOR, ONE_OF(vectors));
        request(entropy);
        asm volatile("sti; nop; cli");
    }
    /* After all of this a proper message arrives. */
    restart(entropy, 0);
    queue_start(entropy, 0, 8, &queue);
    write64(entropy->msix_table, LAPIC);
    write32(entropy->msix_table + 8, VECTOR);
    write32(entropy->msix_table + 12, 0);
    write16(control, MSIX_ENABLE);
    write16(entropy->base + COMMON_QUEUE_SELECT, 0);
    write16(entropy->base + COMMON_QUEUE_VECTOR, 0);
    virtio_ready(entropy);
    asm volatile("sti; nop; cli");
    interrupts = 0;
    request(entropy);
    u64 start = rdtsc();
    while (!interrupts) {
        asm volatile("sti; nop; cli");
        CHECK(!waited_too_long(start));
    }
    write16(control, 0);
}

static void config(void)
{
    for (u64 round = 0, end = rounds(20000); round < end; round++) {
        struct virtio *device = &devices[chance(device_count)];
        /* Functions that exist, and the whole bus. */
        u64 at = chance(4) ? device->function + chance(0x110) : PCI_ECAM + chance(0x100000 - 8);
        u64 value = chance(2) ? chance(1ull << 32) : ~0ull;
        switch (chance(10)) {
        case 0: read8(at); break;
        case 1: read16(at); break;
        case 2: read32(at); break;
        case 3: read64(at); break;
        case 4: write8(at, value); break;
        case 5: write16(at, value); break;
        case 6: write32(at, value); break;
        case 7: write64(at, value); break;
        case 8:
            out32(PORT_PCI_ADDRESS, chance(2) ? 0x80000000 | chance(0x10000) : value);
            out32(PORT_PCI_DATA + chance(4), value);
            in16(PORT_PCI_DATA + chance(4));
            break;
        case 9: out8(PORT_PCI_ADDRESS + chance(4), value); break;
        }
        if (round % 64 == 0)
            restart(device, 0);
    }
}

static volatile bool hammering, over, ended;
static u8 ring3_stack[8192] __attribute__((aligned(16)));

/* All of the window, at CPL 3: natively. */
static void hammer(void)
{
    u64 at = 1;
    while (!over) {
        at = at * 6364136223846793005 + 1442695040888963407;
        u64 address = PCI_WINDOW + (at >> 40 & 0x3fffc);
        if (at >> 39 & 1)
            read32(address);
        else
            write32(address, at >> 30 & 0xff);
        hammering = true;
    }
    ended = true;
    for (;;)
        asm volatile("pause");
}

static void hammer_there(void) { enter_ring3(hammer, ring3_stack + sizeof ring3_stack - 8); }

static void bars(void)
{
    map_memory(4);
    interrupts_start();
    start_processor(1, hammer_there);
    u64 start = rdtsc();
    while (!hammering)
        CHECK(!waited_too_long(start));
    for (u64 round = 0, end = rounds(1000); round < end; round++) {
        struct virtio *device = &devices[chance(device_count)];
        /* Onto each other, onto memory, interrupt controllers, the bus itself, and the end of the window. */
        const u32 places[] = {PCI_WINDOW, PCI_WINDOW + 0x8000, 0, ARENA, LAPIC, 0xfec00000, PCI_ECAM, PCI_ECAM - 0x8000,
                              0xffff8000, device->bar};
        write32(device->function + PCI_BAR0, ONE_OF(places));
        write16(device->function + PCI_COMMAND, chance(4) ? PCI_COMMAND_MEMORY : 0);
    }
    over = true;
    start = rdtsc();
    while (!ended)
        CHECK(!waited_too_long(start));
}

int guest_main(void)
{
    struct virtio entropy;
    arm();
    if (!virtio_find(VIRTIO_ENTROPY, 0, &entropy) || !entropy.is_pci)
        return EXIT_MISSING;
    if (told_to("table"))
        table(&entropy);
    else if (told_to("config"))
        config();
    else if (told_to("bars"))
        bars();
    else
        return EXIT_BAD_COMMAND_LINE;
    spend();
}
