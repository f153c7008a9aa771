/* A disk at full speed: a driver at CPL 3, which KVM runs natively even where it emulates CPL 0. It polls the used ring,
 * and rings the doorbell when the device asks for it (event index), as a good driver does.
 * `type=` read or write, `order=` random or sequential, `depth=` requests in flight, `count=` requests in total. */
#include "block.h"
#include "cpu.h"

enum {
    BLOCK = 4096,
    DEPTH_MAX = 64,
    DESCRIPTORS_EACH = 3,
};

static struct virtio disk;
static struct queue queue;
static struct block_header headers[DEPTH_MAX];
static volatile u8 statuses[DEPTH_MAX];
static u8 buffers[DEPTH_MAX][BLOCK] __attribute__((aligned(4096)));
static u8 ring3_stack[8192] __attribute__((aligned(16)));
static u64 count, depth, blocks, issued, doorbells;
static u32 type;
static bool random_order;

static u64 next_block(void)
{
    static u64 state = 88172645463325252;
    if (!random_order)
        return issued % blocks;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % blocks;
}

static void issue(unsigned slot)
{
    headers[slot] = (struct block_header){type, 0, next_block() * (BLOCK / SECTOR)};
    statuses[slot] = BLOCK_UNTOUCHED;
    issued++;
    queue_offer(&queue, slot * DESCRIPTORS_EACH);
}

/* Rings the doorbell if the device requested a notification for an entry from `old` on (virtio 1.2 §2.7.10). */
static void ring_if_asked(u16 old)
{
    barrier();
    u16 new = queue.available.index, event = *available_event(&queue);
    if ((u16)(new - event - 1) < (u16)(new - old)) {
        doorbells++;
        queue_ring(&queue);
    }
}

static void drive(void)
{
    u64 completed = 0, start = clock_ns();
    for (unsigned slot = 0; slot < depth; slot++)
        issue(slot);
    ring_if_asked(0);
    while (completed < count) {
        struct used_entry entry;
        u16 old = queue.available.index;
        while (queue_take(&queue, &entry)) {
            unsigned slot = entry.id / DESCRIPTORS_EACH;
            CHECK(slot < depth && statuses[slot] == BLOCK_OK);
            completed++;
            if (issued < count)
                issue(slot);
        }
        if (queue.available.index == old) {
            asm volatile("pause");
            continue;
        }
        /* No interrupt for entries already seen: the event index stays behind. */
        *used_event(&queue) = queue.seen - 1;
        ring_if_asked(old);
    }
    u64 ns = clock_ns() - start;
    print("requests %u ns %u doorbells %u\n", completed, ns, doorbells);
    exit_with(EXIT_OK);
}

static bool argument_is(const char *name, const char *text)
{
    const char *value = argument(name);
    return value && same_text(value, text);
}

int guest_main(void)
{
    count = argument_number("count", 10000);
    depth = argument_number("depth", 1);
    type = argument_is("type", "write") ? BLOCK_OUT : BLOCK_IN;
    random_order = !argument_is("order", "sequential");
    if (depth == 0 || depth > DEPTH_MAX || count < depth)
        return EXIT_BAD_COMMAND_LINE;
    if (!clock_start() || !virtio_find(VIRTIO_BLOCK, 0, &disk))
        return EXIT_MISSING;
    /* Without the flush feature each write would be made durable before completion. */
    CHECK(virtio_start(&disk, FEATURE(F_RING_EVENT_IDX) | FEATURE(F_BLOCK_FLUSH)));
    CHECK(disk.features & FEATURE(F_RING_EVENT_IDX));
    queue_start(&disk, 0, QUEUE_SIZE_MAX, &queue);
    CHECK(queue.size >= depth * DESCRIPTORS_EACH);
    blocks = block_capacity(&disk) / (BLOCK / SECTOR);
    CHECK(blocks > 0);
    for (unsigned slot = 0; slot < depth; slot++) {
        u16 at = slot * DESCRIPTORS_EACH;
        set_descriptor(&queue, at, &headers[slot], sizeof headers[slot], DESC_NEXT, at + 1);
        set_descriptor(&queue, at + 1, buffers[slot], BLOCK, DESC_NEXT | (type == BLOCK_IN ? DESC_WRITE : 0), at + 2);
        set_descriptor(&queue, at + 2, &statuses[slot], 1, DESC_WRITE, 0);
    }
    *used_event(&queue) = 0xffff;
    virtio_ready(&disk);
    map_memory(4);
    enter_ring3(drive, ring3_stack + sizeof ring3_stack - 8);
}
