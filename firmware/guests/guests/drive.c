/* A disk or a network at full speed: a driver at CPL 3, which KVM runs natively even where it emulates CPL 0. It polls the used
 * ring, and rings the doorbell when the device asks for it (event index), as a good driver does.
 * `type=` read, write, or send for frames that nobody receives; `size=` bytes of a request; `order=` random or sequential,
 * `depth=` requests in flight, `count=` requests in total. With `queues=2` a second vCPU does the same with the disk's second
 * queue, in its other half. */
#include "block.h"
#include "cpu.h"

enum {
    SIZE_DEFAULT = 4096,
    REQUEST_MAX = 128 << 10,
    DEPTH_MAX = 64,
    DESCRIPTORS_EACH = 3,
    BUFFERS = 16 << 20,
    QUEUES_MAX = 2,
    /* Of a network: its queue, the header before each frame, and a protocol that no host speaks (IEEE 802, experimental). */
    TX = 1,
    FRAME_HEADER = 12,
    PROTOCOL = 0xb588,
};

/* A queue and the vCPU that drives it. */
struct lane {
    struct queue queue;
    struct block_header headers[DEPTH_MAX];
    volatile u8 statuses[DEPTH_MAX];
    u8 ring3_stack[8192] __attribute__((aligned(16)));
    u64 first_block, random, issued, completed, doorbells;
    volatile bool ready, done;
};

static struct virtio device;
static struct lane lanes[QUEUES_MAX];
static struct queue rx;
static u64 queues, count, depth, size, blocks;
static u32 type;
static bool random_order, sends;

static u8 *buffer(const struct lane *lane, unsigned slot)
{
    return (u8 *)BUFFERS + ((lane - lanes) * DEPTH_MAX + slot) * size;
}

static u64 next_block(struct lane *lane)
{
    if (!random_order)
        return lane->first_block + lane->issued % blocks;
    lane->random ^= lane->random << 13;
    lane->random ^= lane->random >> 7;
    lane->random ^= lane->random << 17;
    return lane->first_block + lane->random % blocks;
}

static void issue(struct lane *lane, unsigned slot)
{
    if (!sends) {
        lane->headers[slot] = (struct block_header){type, 0, next_block(lane) * (size / SECTOR)};
        lane->statuses[slot] = BLOCK_UNTOUCHED;
    }
    lane->issued++;
    queue_offer(&lane->queue, slot * DESCRIPTORS_EACH);
}

static void drive(struct lane *lane)
{
    struct queue *queue = &lane->queue;
    for (unsigned slot = 0; slot < depth; slot++)
        issue(lane, slot);
    lane->doorbells += queue_ring_if_asked(queue, 0);
    while (lane->completed < count) {
        struct used_entry entry;
        u16 old = queue->available.index;
        while (queue_take(queue, &entry)) {
            unsigned slot = entry.id / DESCRIPTORS_EACH;
            CHECK(slot < depth && (sends || lane->statuses[slot] == BLOCK_OK));
            lane->completed++;
            if (lane->issued < count)
                issue(lane, slot);
        }
        if (queue->available.index == old) {
            asm volatile("pause");
            continue;
        }
        /* No interrupt for entries already seen: the event index stays behind. */
        *used_event(queue) = queue->seen - 1;
        lane->doorbells += queue_ring_if_asked(queue, old);
    }
    lane->done = true;
}

static void drive_first(void)
{
    struct lane *last = &lanes[queues - 1];
    u64 start = clock_ns();
    /* The second vCPU waits for this one. */
    lanes[0].ready = true;
    drive(&lanes[0]);
    while (!last->done)
        asm volatile("pause");
    u64 ns = clock_ns() - start;
    print("requests %u ns %u doorbells %u\n", queues * count, ns, lanes[0].doorbells + lanes[1].doorbells);
    exit_with(EXIT_OK);
}

static void drive_second(void)
{
    lanes[1].ready = true;
    while (!lanes[0].ready)
        asm volatile("pause");
    drive(&lanes[1]);
    for (;;)
        asm volatile("pause");
}

static void enter_second(void) { enter_ring3(drive_second, lanes[1].ring3_stack + sizeof lanes[1].ring3_stack - 8); }

static void start_second(void)
{
    u64 start = rdtsc();
    interrupts_start();
    start_processor(1, enter_second);
    while (!lanes[1].ready)
        CHECK(!waited_too_long(start));
}

static bool argument_is(const char *name, const char *text)
{
    const char *value = argument(name);
    return value && same_text(value, text);
}

static void start_disk(void)
{
    /* Without the flush feature each write would be made durable before completion. */
    CHECK(virtio_start(&device, FEATURE(F_RING_EVENT_IDX) | FEATURE(F_BLOCK_FLUSH) | FEATURE(F_BLOCK_MQ)));
    blocks = block_capacity(&device) / (size / SECTOR) / queues;
    CHECK(blocks > 0);
    for (struct lane *lane = lanes; lane < lanes + queues; lane++) {
        queue_start(&device, lane - lanes, QUEUE_SIZE_MAX, &lane->queue);
        lane->first_block = (lane - lanes) * blocks;
        lane->random = 88172645463325252;
        for (unsigned slot = 0; slot < depth; slot++) {
            u16 at = slot * DESCRIPTORS_EACH;
            u16 written = type == BLOCK_IN ? DESC_WRITE : 0;
            set_descriptor(&lane->queue, at, &lane->headers[slot], sizeof lane->headers[slot], DESC_NEXT, at + 1);
            set_descriptor(&lane->queue, at + 1, buffer(lane, slot), size, DESC_NEXT | written, at + 2);
            set_descriptor(&lane->queue, at + 2, &lane->statuses[slot], 1, DESC_WRITE, 0);
        }
    }
}

static void start_network(void)
{
    struct lane *lane = &lanes[0];
    CHECK(virtio_start(&device, FEATURE(F_RING_EVENT_IDX)));
    queue_start(&device, 0, QUEUE_SIZE_MAX, &rx);
    queue_start(&device, TX, QUEUE_SIZE_MAX, &lane->queue);
    for (unsigned slot = 0; slot < depth; slot++) {
        u8 *frame = buffer(lane, slot) + FRAME_HEADER;
        memset(buffer(lane, slot), 0, size);
        memset(frame, 0xff, 6);
        frame[6] = 2;
        *(u16 *)(frame + 12) = PROTOCOL;
        set_descriptor(&lane->queue, slot * DESCRIPTORS_EACH, buffer(lane, slot), size, 0, 0);
    }
}

static bool read_command_line(void)
{
    queues = argument_number("queues", 1);
    count = argument_number("count", 10000);
    depth = argument_number("depth", 1);
    size = argument_number("size", SIZE_DEFAULT);
    type = argument_is("type", "write") ? BLOCK_OUT : BLOCK_IN;
    sends = argument_is("type", "send");
    random_order = !argument_is("order", "sequential");
    return queues > 0 && queues <= (sends ? 1 : QUEUES_MAX) && depth > 0 && depth <= DEPTH_MAX && count >= depth &&
           size >= SECTOR && size <= REQUEST_MAX;
}

int guest_main(void)
{
    if (!read_command_line())
        return EXIT_BAD_COMMAND_LINE;
    if (!clock_start() || !virtio_find(sends ? VIRTIO_NETWORK : VIRTIO_BLOCK, 0, &device))
        return EXIT_MISSING;
    if (sends)
        start_network();
    else
        start_disk();
    CHECK(device.features & FEATURE(F_RING_EVENT_IDX));
    for (struct lane *lane = lanes; lane < lanes + queues; lane++) {
        CHECK(lane->queue.size >= depth * DESCRIPTORS_EACH);
        *used_event(&lane->queue) = 0xffff;
    }
    virtio_ready(&device);
    map_memory(4);
    if (queues > 1)
        start_second();
    enter_ring3(drive_first, lanes[0].ring3_stack + sizeof lanes[0].ring3_stack - 8);
}
