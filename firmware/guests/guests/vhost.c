/* Breaks the rings of a network device while the host's kernel serves them (vhost-net): `do=chains` that are impossible, `do=jumps`
 * of indices, `do=headers` that lie, `do=resets` in the middle of frames, `do=doorbells`, and `do=race`, a second vCPU that
 * changes descriptors in use. Before and after, the network answers. */
#include "cpu.h"
#include "network.h"

enum {
    PAGE = 4096,
    /* Without it the kernel does not serve the queues. */
    F_GUEST_CHECKSUM = 1,
    F_MERGEABLE = 15,
    QUEUES = 2,
};

static const u64 FEATURES =
    FEATURE(F_GUEST_CHECKSUM) | FEATURE(F_MERGEABLE) | FEATURE(F_RING_INDIRECT_DESC) | FEATURE(F_RING_EVENT_IDX);

static struct network network;
static struct descriptor indirect[4] __attribute__((aligned(PAGE)));

/* Starts the device, with a descriptor for the chain to break: a question, or a buffer for the answer to one. */
static void begin(u16 direction)
{
    restart(&network.device, FEATURES);
    network_start_queues(&network);
    if (direction == TX) {
        set_descriptor(&network.tx, 0, (void *)TX_AREA, network_write_question(&network), 0, 0);
        network_offer_buffers(&network);
    } else {
        set_descriptor(&network.rx, 0, (void *)RX_AREA, RX_BUFFER, DESC_WRITE, 0);
    }
}

/* Whether the device needs a reset after `head` has become available. It reads a receive queue only when there is a frame. */
static bool breaks_at(u16 direction, u16 head)
{
    struct queue *queue = direction == TX ? &network.tx : &network.rx;
    queue_offer(queue, head);
    queue_ring(queue);
    u64 start = rdtsc();
    for (u64 asked = 0; !(virtio_status(&network.device) & STATUS_NEEDS_RESET);) {
        struct used_entry entry;
        if (queue_take(queue, &entry))
            return false;
        CHECK(!waited_too_long(start));
        if (direction == RX && rdtsc() - asked > 1 << 28) {
            network_ask(&network);
            asked = rdtsc();
        }
    }
    return true;
}

static void chains_of(u16 direction)
{
    struct queue *queue = direction == TX ? &network.tx : &network.rx;
    u16 way = direction == TX ? 0 : DESC_WRITE, size = direction == TX ? TX_RING : RX_RING;
    const u16 nexts[] = {size, size + 1, 0x7fff, 0xffff};
    const u64 nowhere[] = {memory_end(), memory_end() - 16, 1ull << 40, 1ull << 63, ~0ull - 16};
    static const u32 lens[] = {0, 1, 15, 17, 0xffffffff};
    for (unsigned i = 0; i < sizeof nexts / sizeof *nexts; i++) {
        begin(direction);
        CHECK(breaks_at(direction, nexts[i]));
        begin(direction);
        queue->table[0].flags |= DESC_NEXT;
        queue->table[0].next = nexts[i];
        CHECK(breaks_at(direction, 0));
    }
    /* Endless. */
    begin(direction);
    queue->table[0].flags |= DESC_NEXT;
    CHECK(breaks_at(direction, 0));
    /* In the other direction. */
    begin(direction);
    queue->table[0].flags ^= DESC_WRITE;
    CHECK(breaks_at(direction, 0));
    for (unsigned i = 0; i < sizeof nowhere / sizeof *nowhere; i++) {
        begin(direction);
        queue->table[0].address = nowhere[i];
        CHECK(breaks_at(direction, 0));
        begin(direction);
        set_descriptor(queue, 0, (void *)nowhere[i], sizeof indirect, DESC_INDIRECT, 0);
        CHECK(breaks_at(direction, 0));
    }
    for (unsigned i = 0; i < sizeof lens / sizeof *lens; i++) {
        begin(direction);
        set_descriptor(queue, 0, indirect, lens[i], DESC_INDIRECT, 0);
        CHECK(breaks_at(direction, 0));
    }
    /* A table in a table, and one without an end: the kernel reads a table in order, whatever its descriptors say is next. */
    begin(direction);
    indirect[0] = (struct descriptor){(u64)indirect, sizeof *indirect, DESC_INDIRECT, 0};
    set_descriptor(queue, 0, indirect, sizeof indirect, DESC_INDIRECT, 0);
    CHECK(breaks_at(direction, 0));
    begin(direction);
    for (unsigned i = 0; i < sizeof indirect / sizeof *indirect; i++)
        indirect[i] = (struct descriptor){TX_AREA, 64, way | DESC_NEXT, 0};
    set_descriptor(queue, 0, indirect, sizeof indirect, DESC_INDIRECT, 0);
    CHECK(breaks_at(direction, 0));
}

/* Indices that are further ahead than the queue is long, or behind. */
static void jumps(void)
{
    static const u16 steps[] = {TX_RING + 1, 4242, 0x8000, 0xfffe};
    for (u16 direction = 0; direction < QUEUES; direction++)
        for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++) {
            begin(direction);
            struct queue *queue = direction == TX ? &network.tx : &network.rx;
            queue->available.index += steps[i];
            CHECK(breaks_at(direction, 0));
        }
}

/* The kernel sends or drops a frame, or tries to send it until the device is reset. */
static void headers(void)
{
    static const u16 words[] = {0, 1, 2, 12, 14, 34, 54, 60, 1460, 0x7fff, 0x8000, 0xffff};
    static const u8 bytes[] = {0, 1, 2, 3, 4, 5, 0x80, 0x81, 0xff};
    struct used_entry entry;
    for (u64 round = 0, count = rounds(2000); round < count; round++) {
        network_start(&network, FEATURES);
        u32 len = network_write_question(&network);
        ((u8 *)TX_AREA)[0] = ONE_OF(bytes);
        ((u8 *)TX_AREA)[1] = ONE_OF(bytes);
        for (unsigned at = 2; at < HEADER; at += 2)
            *(u16 *)((u8 *)TX_AREA + at) = ONE_OF(words);
        set_descriptor(&network.tx, 0, (void *)TX_AREA, chance(4) ? len : HEADER + chance(1 << 16), 0, 0);
        queue_offer(&network.tx, 0);
        queue_ring(&network.tx);
        u64 start = rdtsc();
        while (!queue_take(&network.tx, &entry) && rdtsc() - start < 1 << 25)
            asm volatile("pause");
        CHECK(!(virtio_status(&network.device) & STATUS_NEEDS_RESET));
    }
}

/* Resets while the kernel sends and receives. */
static void resets(void)
{
    for (u64 round = 0, count = rounds(100); round < count; round++) {
        network_start(&network, FEATURES);
        set_descriptor(&network.tx, 0, (void *)TX_AREA, network_write_question(&network), 0, 0);
        for (u64 frames = 1 + chance(TX_RING); frames; frames--)
            queue_offer(&network.tx, 0);
        queue_ring(&network.tx);
        for (u64 wait = chance(20000); wait; wait--)
            asm volatile("pause");
        virtio_set_status(&network.device, 0);
        CHECK(virtio_status(&network.device) == 0);
        /* From here on nothing of the kernel's may be seen. */
        u16 sent = network.tx.used.index, received = network.rx.used.index;
        memset((void *)RX_AREA, 0x5a, RX_RING * RX_BUFFER);
        for (unsigned wait = 0; wait < 2000; wait++)
            asm volatile("pause");
        CHECK(network.tx.used.index == sent && network.rx.used.index == received);
        for (u64 at = RX_AREA; at < RX_AREA + RX_RING * RX_BUFFER; at += 8)
            CHECK(*(u64 *)at == 0x5a5a5a5a5a5a5a5a);
    }
}

/* Notifications of queues with and without frames, and of those that do not exist. */
static void doorbells(void)
{
    for (u64 round = 0, count = rounds(20000); round < count; round++) {
        if (round % 500 == 0)
            network_start(&network, FEATURES);
        if (chance(8) == 0)
            CHECK(network_ask(&network));
        virtio_ring(&network.device, chance(4) ? chance(QUEUES) : chance(0x400));
        network_take(&network);
    }
}

static volatile bool racing, over, ended;
static u8 ring3_stack[8192] __attribute__((aligned(16)));

/* At CPL 3, which KVM runs natively even where it emulates CPL 0. */
static void change_all(void)
{
    struct queue *queues[] = {&network.rx, &network.tx};
    u64 at = 1;
    while (!over) {
        at = at * 6364136223846793005 + 1442695040888963407;
        struct queue *queue = queues[at >> 32 & 1];
        struct descriptor *descriptor = &queue->table[at >> 33 & 3];
        descriptor->len = at >> 40 & 1 ? 64 : 0xffffffff;
        descriptor->flags = at >> 42 & 7;
        descriptor->next = at >> 45 & 31;
        descriptor->address = at >> 50 & 3 ? TX_AREA + 64 * (at >> 33 & 3) : ~0ull - 16;
        queue->available.ring[at >> 52 & 15] = at >> 56 & 31;
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
        network_start(&network, FEATURES);
        for (unsigned i = 0; i < 32 && !(virtio_status(&network.device) & STATUS_NEEDS_RESET); i++) {
            queue_offer(&network.tx, chance(4));
            queue_ring(&network.tx);
        }
        virtio_set_status(&network.device, 0);
    }
    over = true;
    start = rdtsc();
    while (!ended)
        CHECK(!waited_too_long(start));
}

int guest_main(void)
{
    if (!virtio_find(VIRTIO_NETWORK, 0, &network.device))
        return EXIT_MISSING;
    network_check(&network, FEATURES);
    arm();
    if (told_to("chains"))
        for (u16 direction = 0; direction < QUEUES; direction++)
            chains_of(direction);
    else if (told_to("jumps"))
        jumps();
    else if (told_to("headers"))
        headers();
    else if (told_to("resets"))
        resets();
    else if (told_to("doorbells"))
        doorbells();
    else if (told_to("race"))
        race();
    else
        return EXIT_BAD_COMMAND_LINE;
    network_check(&network, FEATURES);
    spend();
}
