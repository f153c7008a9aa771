/* A disk or a network at full speed: a driver at CPL 3, which KVM runs natively even where it emulates CPL 0. It polls the used
 * ring, and rings the doorbell when the device asks for it (event index), as a good driver does.
 * `type=` read, write, or send for frames that nobody receives; `size=` bytes of a request; `order=` random or sequential,
 * `depth=` requests in flight, `count=` requests in total. */
#include "block.h"
#include "cpu.h"

enum {
    SIZE_DEFAULT = 4096,
    REQUEST_MAX = 128 << 10,
    DEPTH_MAX = 64,
    DESCRIPTORS_EACH = 3,
    BUFFERS = 16 << 20,
    /* Of a network: its queue, the header before each frame, and a protocol that no host speaks (IEEE 802, experimental). */
    TX = 1,
    FRAME_HEADER = 12,
    PROTOCOL = 0xb588,
};

static struct virtio device;
static struct queue queue, rx;
static struct block_header headers[DEPTH_MAX];
static volatile u8 statuses[DEPTH_MAX];
static u8 ring3_stack[8192] __attribute__((aligned(16)));
static u64 count, depth, size, blocks, issued, doorbells;
static u32 type;
static bool random_order, sends;

static u8 *buffer(unsigned slot) { return (u8 *)BUFFERS + slot * size; }

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
    if (!sends) {
        headers[slot] = (struct block_header){type, 0, next_block() * (size / SECTOR)};
        statuses[slot] = BLOCK_UNTOUCHED;
    }
    issued++;
    queue_offer(&queue, slot * DESCRIPTORS_EACH);
}

static void drive(void)
{
    u64 completed = 0, start = clock_ns();
    for (unsigned slot = 0; slot < depth; slot++)
        issue(slot);
    doorbells += queue_ring_if_asked(&queue, 0);
    while (completed < count) {
        struct used_entry entry;
        u16 old = queue.available.index;
        while (queue_take(&queue, &entry)) {
            unsigned slot = entry.id / DESCRIPTORS_EACH;
            CHECK(slot < depth && (sends || statuses[slot] == BLOCK_OK));
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
        doorbells += queue_ring_if_asked(&queue, old);
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

static void start_disk(void)
{
    /* Without the flush feature each write would be made durable before completion. */
    CHECK(virtio_start(&device, FEATURE(F_RING_EVENT_IDX) | FEATURE(F_BLOCK_FLUSH)));
    queue_start(&device, 0, QUEUE_SIZE_MAX, &queue);
    blocks = block_capacity(&device) / (size / SECTOR);
    CHECK(blocks > 0);
    for (unsigned slot = 0; slot < depth; slot++) {
        u16 at = slot * DESCRIPTORS_EACH;
        set_descriptor(&queue, at, &headers[slot], sizeof headers[slot], DESC_NEXT, at + 1);
        set_descriptor(&queue, at + 1, buffer(slot), size, DESC_NEXT | (type == BLOCK_IN ? DESC_WRITE : 0), at + 2);
        set_descriptor(&queue, at + 2, &statuses[slot], 1, DESC_WRITE, 0);
    }
}

static void start_network(void)
{
    CHECK(virtio_start(&device, FEATURE(F_RING_EVENT_IDX)));
    queue_start(&device, 0, QUEUE_SIZE_MAX, &rx);
    queue_start(&device, TX, QUEUE_SIZE_MAX, &queue);
    for (unsigned slot = 0; slot < depth; slot++) {
        u8 *frame = buffer(slot) + FRAME_HEADER;
        memset(buffer(slot), 0, size);
        memset(frame, 0xff, 6);
        frame[6] = 2;
        *(u16 *)(frame + 12) = PROTOCOL;
        set_descriptor(&queue, slot * DESCRIPTORS_EACH, buffer(slot), size, 0, 0);
    }
}

int guest_main(void)
{
    count = argument_number("count", 10000);
    depth = argument_number("depth", 1);
    size = argument_number("size", SIZE_DEFAULT);
    type = argument_is("type", "write") ? BLOCK_OUT : BLOCK_IN;
    sends = argument_is("type", "send");
    random_order = !argument_is("order", "sequential");
    if (depth == 0 || depth > DEPTH_MAX || count < depth || size < SECTOR || size > REQUEST_MAX)
        return EXIT_BAD_COMMAND_LINE;
    if (!clock_start() || !virtio_find(sends ? VIRTIO_NETWORK : VIRTIO_BLOCK, 0, &device))
        return EXIT_MISSING;
    if (sends)
        start_network();
    else
        start_disk();
    CHECK(device.features & FEATURE(F_RING_EVENT_IDX));
    CHECK(queue.size >= depth * DESCRIPTORS_EACH);
    *used_event(&queue) = 0xffff;
    virtio_ready(&device);
    map_memory(4);
    enter_ring3(drive, ring3_stack + sizeof ring3_stack - 8);
}
