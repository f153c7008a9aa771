/* Breaks the rules of negotiation and of queues, on every device and either bus: `do=features` that are not offered, `do=places`
 * of rings, `do=chains`, `do=chaos`, `do=resets` in the middle of I/O, `do=doorbells`, and `do=race`, a second vCPU that changes
 * descriptors in use. */
#include "arena.h"
#include "block.h"
#include "cpu.h"

enum {
    PAGE = 4096,
    QUEUES_MAX = 6,
    STATUS_RUNS = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK,
};

static struct queue queue;
static struct descriptor indirect[4] __attribute__((aligned(PAGE)));
static u8 data[PAGE] __attribute__((aligned(PAGE)));

/* Whether the device accepts exactly these features. */
static bool accepts(const struct virtio *device, u64 features)
{
    virtio_set_status(device, 0);
    virtio_set_status(device, STATUS_ACKNOWLEDGE);
    virtio_set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    virtio_accept(device, features);
    virtio_set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    return virtio_status(device) & STATUS_FEATURES_OK;
}

static void features(void)
{
    for (unsigned i = 0; i < device_count; i++) {
        u64 offered = virtio_offered(&devices[i]);
        CHECK(accepts(&devices[i], offered) && accepts(&devices[i], FEATURE(F_VERSION_1)));
        CHECK(!accepts(&devices[i], 0) && !accepts(&devices[i], ~0ull));
        for (unsigned bit = 0; bit < 64; bit++) {
            bool accepted = accepts(&devices[i], FEATURE(F_VERSION_1) | FEATURE(bit)), is_offered = offered >> bit & 1;
            /* Some features of a network device need others. */
            CHECK(accepted == is_offered || (is_offered && devices[i].type == VIRTIO_NETWORK));
        }
    }
}

/* Starts a device whose queue `number` is placed like this. Returns whether it needs a reset. */
static bool refuses(struct virtio *device, u16 number, u32 size, u64 table, u64 available, u64 used)
{
    restart(device, 0);
    queue_place(device, number, size, table, available, used);
    virtio_ready(device);
    virtio_ring(device, number);
    return virtio_status(device) & STATUS_NEEDS_RESET;
}

static void places_of(struct virtio *device, u16 number, u32 max)
{
    u64 good[] = {ARENA, ARENA + 8 * PAGE, ARENA + 16 * PAGE}, end = memory_end();
    const u32 sizes[] = {0, 3, max - 1, max + 1, 2 * max, 0x8000, 0x8001, 0xffff};
    /* The last starts within memory, and ends beyond it. */
    const u64 bad[] = {end, 0xd0000000, 1ull << 40, 1ull << 63, ~0xfffull, ~0xfull, end - 16};
    memset((void *)ARENA, 0, 32 * PAGE);
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++)
        CHECK(refuses(device, number, sizes[i], good[0], good[1], good[2]));
    for (unsigned which = 0; which < 3; which++)
        for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
            u64 places[] = {good[0], good[1], good[2]};
            places[which] = bad[i];
            CHECK(refuses(device, number, max, places[0], places[1], places[2]));
            /* Misaligned. */
            places[which] = good[which] + 1;
            CHECK(refuses(device, number, max, places[0], places[1], places[2]));
        }
    /* All at the same place, which only harms the guest. */
    CHECK(!refuses(device, number, max, good[0], good[0], good[0]));
}

static void places(void)
{
    for (unsigned i = 0; i < device_count; i++)
        for (u16 number = 0; number < QUEUES_MAX; number++) {
            restart(&devices[i], 0);
            u32 max = queue_size_max(&devices[i], number);
            if (max)
                places_of(&devices[i], number, max);
        }
}

/* The queue on which a device waits for the driver's requests. */
static u16 request_queue(const struct virtio *device) { return device->type == VIRTIO_VSOCK ? 1 : 0; }

/* Whether the device needs a reset after `head` has become available. */
static bool breaks_at(u16 head)
{
    struct used_entry entry;
    queue_offer(&queue, head);
    queue_ring(&queue);
    return !queue_wait(&queue, &entry);
}

static void begin(struct virtio *device)
{
    restart(device, FEATURE(F_RING_INDIRECT_DESC));
    queue_start(device, request_queue(device), 16, &queue);
    virtio_ready(device);
    /* As good a chain as any: the devices differ in what they expect. */
    set_descriptor(&queue, 0, data, 64, DESC_NEXT, 1);
    set_descriptor(&queue, 1, data + 64, 64, DESC_NEXT | DESC_WRITE, 2);
    set_descriptor(&queue, 2, data + 128, 1, DESC_WRITE, 0);
}

static void chains_of(struct virtio *device)
{
    static const u16 nexts[] = {16, 17, 255, 0x7fff, 0xffff};
    static const u32 lens[] = {1, 15, 17, 0xffffffff};
    for (unsigned i = 0; i < sizeof nexts / sizeof *nexts; i++) {
        begin(device);
        CHECK(breaks_at(nexts[i]));
        begin(device);
        queue.table[1].next = nexts[i];
        CHECK(breaks_at(0));
    }
    for (u16 next = 0; next < 2; next++) {
        begin(device);
        queue.table[1].flags = queue.table[0].flags;
        queue.table[1].next = next;
        CHECK(breaks_at(0));
    }
    begin(device);
    queue.table[2].flags = 0;
    CHECK(breaks_at(0));
    for (unsigned i = 0; i < sizeof lens / sizeof *lens; i++) {
        begin(device);
        set_descriptor(&queue, 0, indirect, lens[i], DESC_INDIRECT, 0);
        CHECK(breaks_at(0));
    }
    /* A table in a table, one with a successor, one outside of memory, and an empty one. */
    begin(device);
    indirect[0] = (struct descriptor){(u64)indirect, sizeof *indirect, DESC_INDIRECT, 0};
    set_descriptor(&queue, 0, indirect, sizeof indirect, DESC_INDIRECT, 0);
    CHECK(breaks_at(0));
    begin(device);
    set_descriptor(&queue, 0, indirect, sizeof indirect, DESC_INDIRECT | DESC_NEXT, 1);
    CHECK(breaks_at(0));
    begin(device);
    set_descriptor(&queue, 0, (void *)(1ull << 40), sizeof indirect, DESC_INDIRECT, 0);
    CHECK(breaks_at(0));
    begin(device);
    set_descriptor(&queue, 0, indirect, 0, DESC_INDIRECT, 0);
    CHECK(breaks_at(0));
    /* An index that is further ahead than the queue is long. */
    begin(device);
    queue.available.index = 4242;
    CHECK(breaks_at(0));
}

static void chains(void)
{
    for (unsigned i = 0; i < device_count; i++)
        chains_of(&devices[i]);
}

static void random_descriptor(u64 at)
{
    struct descriptor *to = (void *)at;
    *to = (struct descriptor){some_address(), some_len(), chance(8), chance(64)};
    if (to->flags & DESC_INDIRECT) {
        to->address &= ~0xfull;
        if (chance(2))
            to->len = 16 * chance(300);
    }
    /* Often a request that a disk understands. */
    if (chance(2) && to->address >= ARENA && to->address < ARENA + ARENA_BYTES - PAGE) {
        static const u32 types[] = {BLOCK_IN, BLOCK_OUT, BLOCK_FLUSH, BLOCK_GET_ID, BLOCK_DISCARD, BLOCK_WRITE_ZEROES, 99};
        static const u64 sectors[] = {0, 1, 2047, 2048, 1ull << 40, 1ull << 55, 1ull << 63, ~0ull};
        *(struct block_header *)(to->address & ~0xfull) = (struct block_header){ONE_OF(types), 0, ONE_OF(sectors)};
    }
}

/* Places a queue somewhere, usually where it is possible, with something to do. */
static void random_queue(const struct virtio *device, u16 number)
{
    u32 max = queue_size_max(device, number), size = chance(8) ? 1u << chance(9) : chance(0x10000);
    u64 places[3];
    for (unsigned i = 0; i < 3; i++)
        places[i] = chance(16) ? ARENA + (chance(64) << 12) : some_address();
    for (unsigned i = 0; i < 8; i++) {
        u64 table = ARENA + (chance(64) << 12);
        random_descriptor(table + 16 * chance(64));
        random_descriptor(places[0] >= ARENA && places[0] < ARENA + ARENA_BYTES ? places[0] + 16 * i : table);
    }
    if (places[1] >= ARENA && places[1] < ARENA + ARENA_BYTES) {
        struct available *available = (void *)places[1];
        for (unsigned i = 0; i < 16; i++)
            available->ring[i] = chance(16) ? chance(8) : chance(0x10000);
        available->index = chance(8) ? chance(16) : chance(0x10000);
        available->flags = chance(2);
    }
    if (max)
        queue_place(device, number, size, places[0], places[1], places[2]);
}

/* Random queues with random contents, and doorbells and resets at any time. */
static void chaos(void)
{
    for (u64 round = 0, count = rounds(2000); round < count; round++) {
        struct virtio *device = &devices[chance(device_count)];
        if (chance(4) == 0)
            restart(device, chance(4) ? virtio_offered(device) : 0);
        /* The memory that a balloon is told to take could be the guest's own. */
        for (u16 number = device->type == VIRTIO_BALLOON; number < QUEUES_MAX; number++)
            if (chance(2))
                random_queue(device, number);
        if (chance(4))
            virtio_set_status(device, STATUS_RUNS);
        for (unsigned i = 0; i < 4; i++)
            virtio_ring(device, chance(QUEUES_MAX));
        if (chance(8) == 0)
            virtio_set_status(device, chance(256));
        if (!device->is_pci && chance(8) == 0)
            write32(device->base + REG_QUEUE_READY, chance(2));
    }
}

/* The disk, which is the first device, with many requests under way. */
static void resets(void)
{
    struct virtio *disk = &devices[0];
    static struct block_header header;
    static volatile u8 status;
    CHECK(disk->type == VIRTIO_BLOCK);
    for (u64 round = 0, count = rounds(100); round < count; round++) {
        restart(disk, FEATURE(F_BLOCK_FLUSH));
        queue_start(disk, 0, 64, &queue);
        virtio_ready(disk);
        header = (struct block_header){chance(2) ? BLOCK_IN : BLOCK_OUT, 0, chance(64)};
        bool reads = header.type == BLOCK_IN;
        set_descriptor(&queue, 0, &header, sizeof header, DESC_NEXT, 1);
        set_descriptor(&queue, 1, (void *)ARENA, 256 << 10, DESC_NEXT | (reads ? DESC_WRITE : 0), 2);
        set_descriptor(&queue, 2, &status, 1, DESC_WRITE, 0);
        for (u64 requests = 1 + chance(60); requests; requests--)
            queue_offer(&queue, 0);
        queue_ring(&queue);
        for (u64 wait = chance(2000); wait; wait--)
            asm volatile("pause");
        virtio_set_status(disk, 0);
        CHECK(virtio_status(disk) == 0);
        /* From here on nothing of the device's may be seen. */
        u16 used = queue.used.index;
        u64 *word = (u64 *)(ARENA + chance(1000) * 8);
        *word = round;
        for (unsigned wait = 0; wait < 2000; wait++)
            asm volatile("pause");
        CHECK(queue.used.index == used && *word == round);
    }
}

/* Notifications of queues that exist or not, running or not, and reads that take locks. */
static void doorbells(void)
{
    for (u64 round = 0, count = rounds(20000); round < count; round++) {
        struct virtio *device = &devices[chance(device_count)];
        if (round % 1000 == 0) {
            restart(device, 0);
            virtio_ready(device);
        }
        virtio_ring(device, chance(4) ? chance(QUEUES_MAX) : chance(0x400));
        read32(device->config + chance(64));
        write32(device->config + chance(64), chance(1ull << 32));
        virtio_status(device);
    }
}

static volatile bool racing, over, ended;
static u8 ring3_stack[8192] __attribute__((aligned(16)));

/* At CPL 3, which KVM runs natively even where it emulates CPL 0. */
static void change_all(void)
{
    u64 at = 1;
    while (!over) {
        at = at * 6364136223846793005 + 1442695040888963407;
        unsigned which = at >> 33 & 3;
        queue.table[which].len = at >> 40 & 1 ? 64 : 0xffffffff;
        queue.table[which].flags = at >> 42 & 7;
        queue.table[which].next = at >> 45 & 31;
        queue.table[which].address = at >> 50 & 3 ? ARENA + 64 * which : ~0ull - 16;
        queue.available.ring[at >> 52 & 15] = at >> 56 & 31;
        write32(ARENA, at >> 60);
        racing = true;
    }
    ended = true;
    for (;;)
        asm volatile("pause");
}

static void race_there(void) { enter_ring3(change_all, ring3_stack + sizeof ring3_stack - 8); }

static void race(void)
{
    map_memory(4);
    interrupts_start();
    start_processor(1, race_there);
    u64 start = rdtsc();
    while (!racing)
        CHECK(!waited_too_long(start));
    for (u64 round = 0, count = rounds(1000); round < count; round++) {
        struct virtio *device = &devices[round % device_count];
        /* What a changing table does to the balloon's memory is known: it takes the guest's own. */
        if (device->type == VIRTIO_BALLOON)
            continue;
        begin(device);
        for (unsigned i = 0; i < 32 && !(virtio_status(device) & STATUS_NEEDS_RESET); i++) {
            queue_offer(&queue, chance(4));
            queue_ring(&queue);
        }
        virtio_set_status(device, 0);
    }
    over = true;
    start = rdtsc();
    while (!ended)
        CHECK(!waited_too_long(start));
}

int guest_main(void)
{
    arm();
    if (told_to("features"))
        features();
    else if (told_to("places"))
        places();
    else if (told_to("chains"))
        chains();
    else if (told_to("chaos"))
        chaos();
    else if (told_to("resets"))
        resets();
    else if (told_to("doorbells"))
        doorbells();
    else if (told_to("race"))
        race();
    else
        return EXIT_BAD_COMMAND_LINE;
    spend();
}
