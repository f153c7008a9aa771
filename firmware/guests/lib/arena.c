/* The frame of a guest that breaks the rules: see arena.h. */
#include "arena.h"

#include "block.h"
#include "cpu.h"
#include "pci.h"

enum {
    /* 16550 registers, from PORT_SERIAL. */
    INTERRUPT_ENABLE = 1,
    LINE_CONTROL = 3,
    MODEM_CONTROL = 4,
    LINE_STATUS = 5,
    DATA_READY = 1,
};

struct virtio devices[DEVICES_MAX];
unsigned device_count;
static u64 state;

/* The port may have been left in any state: with its divisor selected, or looped back. */
void say_and_wait(const char *word)
{
    out8(PORT_SERIAL + LINE_CONTROL, 3);
    out8(PORT_SERIAL + INTERRUPT_ENABLE, 1);
    /* DTR, RTS and OUT2, without which the port receives no input. */
    out8(PORT_SERIAL + MODEM_CONTROL, 0x0b);
    while (in8(PORT_SERIAL + LINE_STATUS) & DATA_READY)
        in8(PORT_SERIAL);
    print("%s\n", word);
    while (!(in8(PORT_SERIAL + LINE_STATUS) & DATA_READY))
        asm volatile("pause");
    in8(PORT_SERIAL);
}

/* The host opens what it needs for some requests when it has the first of them. */
static void warm_disk(void)
{
    static struct queue queue;
    struct virtio disk;
    if (!virtio_find(VIRTIO_BLOCK, 0, &disk))
        return;
    block_start(0, &disk, &queue);
    CHECK(block_request(&queue, BLOCK_IN, 0, (void *)ARENA, 64 << 10, NULL) == BLOCK_OK);
    CHECK(block_request(&queue, BLOCK_FLUSH, 0, NULL, 0, NULL) == BLOCK_OK);
    virtio_set_status(&disk, 0);
}

void arm(void)
{
    state = argument_number("seed", 1) * 88172645463325252 + 1;
    while (device_count < DEVICES_MAX && virtio_find(VIRTIO_ANY, device_count, &devices[device_count]))
        device_count++;
    CHECK(device_count > 0);
    warm_disk();
    say_and_wait("armed");
}

/* A request that can only succeed. */
static void check_entropy(struct virtio *device)
{
    static struct queue queue;
    static u8 bytes[16];
    struct used_entry entry;
    queue_start(device, 0, 8, &queue);
    virtio_ready(device);
    set_descriptor(&queue, 0, bytes, sizeof bytes, DESC_WRITE, 0);
    queue_offer(&queue, 0);
    queue_ring(&queue);
    CHECK(queue_wait(&queue, &entry) && entry.len == sizeof bytes);
}

/* Moves all functions away. One whose place another had taken would return to it without its doorbells in KVM, which then take
 * an exit to husk. */
static void leave_places(void)
{
    for (unsigned i = 0; i < device_count; i++)
        if (devices[i].is_pci) {
            write16(devices[i].function + PCI_COMMAND, 0);
            write32(devices[i].function + PCI_BAR0, 0);
        }
}

void spend(void)
{
    leave_places();
    for (unsigned i = 0; i < device_count; i++) {
        struct virtio *device = &devices[i];
        restart(device, 0);
        if (device->type == VIRTIO_ENTROPY)
            check_entropy(device);
        virtio_ready(device);
        CHECK(!(virtio_status(device) & STATUS_NEEDS_RESET));
        restart(device, 0);
        virtio_set_status(device, 0);
    }
    say_and_wait("spent");
    exit_with(EXIT_OK);
}

u64 rounds(u64 otherwise) { return argument_number("rounds", otherwise); }

u64 chance(u64 bound)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state >> 11) % bound;
}

u64 some_address(void)
{
    static const u64 beyond[] = {VIRTIO_MMIO_BASE, 0xc0000000, 0xfee00000, 1ull << 32, 1ull << 40, 1ull << 63};
    switch (chance(10)) {
    case 0: return memory_end() - chance(64);
    case 1: return ONE_OF(beyond) + chance(64);
    case 2: return ~0ull - chance(64);
    case 3: return ARENA + chance(ARENA_BYTES / 2);
    default: return ARENA + (chance(256) << 12);
    }
}

u32 some_len(void)
{
    static const u32 lens[] = {0, 1, 15, 16, 17, 44, 64, 511, 512, 513, 4096, 65536, 1 << 20,
                               0x80000000, 0xfffffe00, 0xfffffff0, 0xffffffff};
    return ONE_OF(lens);
}

u64 memory_end(void)
{
    static u64 end;
    unsigned count;
    const struct e820_entry *map = memory_map(&count);
    for (unsigned i = 0; !end && i < count; i++)
        if (map[i].type == E820_RAM && map[i].base <= ARENA && map[i].base + map[i].len >= ARENA + ARENA_BYTES)
            end = map[i].base + map[i].len;
    CHECK(end);
    return end;
}

void restart(struct virtio *device, u64 features)
{
    if (device->is_pci) {
        write32(device->function + PCI_BAR0, device->bar);
        write16(device->function + PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
    }
    CHECK(virtio_start(device, features));
}
