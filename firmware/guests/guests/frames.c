/* Frames that a driver must not send: `do=headers` that lie, `do=lengths` from nothing to 4 GiB, `do=receive` buffers of any
 * size and place, `do=commands` of the control queue. Before and after, the network answers. */
#include "cpu.h"
#include "network.h"

enum {
    F_MULTIQUEUE = 22,
    F_CONTROL = 17,
    CONFIG_PAIRS = 8,
    CONTROL_MULTIQUEUE = 4,
    PAIRS_SET = 0,
    COMMAND_DONE = 0,
    COMMAND_FAILED = 1,
};

struct header {
    u8 flags, segments;
    u16 headers_len, segment_len, checksum_start, checksum_offset, buffers;
} __attribute__((packed));

static const u8 tcp4[] = {2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 9, 0, 2,
                          10, 9, 0, 1, 0x40, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0};

static struct network network;
static struct queue control;

/* Starts the device with some of its features: it refuses those that need others. */
static void start_with_any(void)
{
    u64 offered = virtio_offered(&network.device);
    restart(&network.device, 0);
    while (!virtio_start(&network.device, offered & (chance(1ull << 32) | (chance(2) ? ~0ull : 0))))
        ;
    network_start_queues(&network);
    network_offer_buffers(&network);
}

static struct header some_header(void)
{
    static const u16 words[] = {0, 1, 2, 11, 12, 14, 33, 34, 53, 54, 55, 60, 1460, 0x7fff, 0x8000, 0xfffd, 0xfffe, 0xffff};
    static const u8 flags[] = {0, 1, 2, 3, 4, 0x80, 0xff}, segments[] = {0, 1, 2, 3, 4, 5, 0x80, 0x81, 0x84, 0xff};
    return (struct header){ONE_OF(flags), ONE_OF(segments), ONE_OF(words), ONE_OF(words),
                           ONE_OF(words), ONE_OF(words), ONE_OF(words)};
}

/* Whatever a header says, its frame is sent or dropped, and returned. */
static void headers(void)
{
    static const u32 lens[] = {0, 1, 13, 14, 15, 52, 53, 54, 60, 1514, 9000, 65535, 65553, 65554};
    for (u64 round = 0, count = rounds(5000); round < count; round++) {
        if (round % 200 == 0)
            start_with_any();
        struct header header = some_header();
        memcpy((void *)TX_AREA, &header, sizeof header);
        memcpy((u8 *)TX_AREA + HEADER, tcp4, sizeof tcp4);
        if (chance(2))
            ((u8 *)TX_AREA)[HEADER + chance(sizeof tcp4)] = chance(256);
        /* In pieces, the first of which may end within the header. */
        u32 left = HEADER + ONE_OF(lens);
        u64 at = TX_AREA;
        for (u16 piece = 0; left; piece++) {
            u32 len = piece == 3 || chance(2) ? left : chance(left < 20 ? left : 20) + 1;
            left -= len;
            set_descriptor(&network.tx, piece, (void *)at, len, left ? DESC_NEXT : 0, piece + 1);
            at += len;
        }
        CHECK(network_send_chain(&network));
        network_take(&network);
    }
}

/* Frames of nothing to many times 4 GiB, of which most are no memory. */
static void lengths(void)
{
    static const u32 lens[] = {0, 1, 11, 12, 13, 25, 26, 27, 65535, 65547, 65565, 65566, 65600, 65612, 1 << 20,
                               0x7fffffff, 0xfffffff0, 0xffffffff};
    for (u64 round = 0, count = rounds(2000); round < count; round++) {
        if (round % 200 == 0)
            start_with_any();
        unsigned pieces = chance(4) ? 1 + chance(3) : TX_RING;
        u32 len = ONE_OF(lens);
        for (unsigned i = 0; i < pieces; i++) {
            u64 address = chance(4) ? TX_AREA : some_address();
            u16 flags = i + 1 < pieces ? DESC_NEXT : 0;
            set_descriptor(&network.tx, i, (void *)address, chance(2) ? len : ONE_OF(lens), flags, i + 1);
        }
        CHECK(network_send_chain(&network));
        network_take(&network);
    }
    /* A frame that only the device may write is none. */
    set_descriptor(&network.tx, 0, (void *)TX_AREA, 100, DESC_WRITE, 0);
    CHECK(network_send_chain(&network));
}

/* Buffers that are too small, none, nowhere, or not to be written. */
static void receive(void)
{
    static const u32 lens[] = {0, 1, 2, 11, 12, 13, 60, 1526, 4096, 65600, 1 << 20, 0xffffffff};
    struct used_entry entry;
    unsigned received = 0;
    u64 count = rounds(100);
    for (u64 round = 0; round < count; round++) {
        restart(&network.device, 0);
        virtio_start(&network.device, chance(2) ? ~0ull : 0);
        network_start_queues(&network);
        bool is_mild = chance(2), has_one_len = chance(2);
        u32 len = ONE_OF(lens);
        for (unsigned i = 0; i < network.rx.size; i++) {
            u64 address = is_mild || chance(16) ? RX_AREA + chance(64) * 4096 : some_address();
            u16 flags = (is_mild || chance(16) ? DESC_WRITE : 0) | (chance(2) && i + 1u < network.rx.size ? DESC_NEXT : 0);
            set_descriptor(&network.rx, i, (void *)address, has_one_len ? len : ONE_OF(lens), flags, i + 1);
            queue_offer(&network.rx, chance(8) ? i : chance(network.rx.size));
        }
        queue_ring(&network.rx);
        for (unsigned i = 0; i < 4 && network_ask(&network); i++) {
            u64 start = rdtsc();
            while (rdtsc() - start < 1 << 20)
                if (queue_take(&network.rx, &entry)) {
                    CHECK(entry.id < network.rx.size);
                    received++;
                }
        }
    }
    /* Unless there were too few rounds to be sure of one. */
    CHECK(received > 0 || count < 30);
}

/* Only a request for as many pairs as there are is granted, and only if it has the right length. */
static void commands(void)
{
    static const u16 counts[] = {0, 1, 2, 3, 0x7fff, 0x8000, 0xffff};
    static const u32 rooms[] = {1, 2, 4096}, lens[] = {0, 1, 2, 3, 4, 5, 64, 0x10000};
    u8 *command = (void *)TX_AREA, *answer = (void *)RX_AREA;
    u16 pairs = read16(network.device.config + CONFIG_PAIRS);
    CHECK(pairs == 2);
    for (u64 round = 0, count = rounds(2000); round < count; round++) {
        if (round % 100 == 0) {
            restart(&network.device, FEATURE(F_MULTIQUEUE) | FEATURE(F_CONTROL));
            queue_start(&network.device, 2 * pairs, 64, &control);
            network_start_queues(&network);
        }
        u16 wanted = ONE_OF(counts);
        /* A change of their number is limited to 20 in a second. */
        if (wanted == pairs && chance(16))
            wanted = 1;
        u8 bytes[] = {chance(4) ? CONTROL_MULTIQUEUE : chance(256), chance(4) ? PAIRS_SET : chance(256), wanted, wanted >> 8};
        memcpy(command, bytes, sizeof bytes);
        u32 len = chance(2) ? sizeof bytes : ONE_OF(lens), room = ONE_OF(rooms);
        bool is_good = len == sizeof bytes && bytes[0] == CONTROL_MULTIQUEUE && bytes[1] == PAIRS_SET && wanted && wanted <= pairs;
        *answer = 0xee;
        set_descriptor(&control, 0, command, len, DESC_NEXT, 1);
        set_descriptor(&control, 1, answer, room, DESC_WRITE, 0);
        queue_offer(&control, 0);
        queue_ring(&control);
        struct used_entry entry;
        CHECK(queue_wait(&control, &entry) && entry.len == 1);
        CHECK(*answer == (is_good ? COMMAND_DONE : COMMAND_FAILED));
    }
    /* Without room for an answer, and with room that is no memory. */
    struct used_entry entry;
    set_descriptor(&control, 0, command, 4, 0, 0);
    queue_offer(&control, 0);
    queue_ring(&control);
    CHECK(queue_wait(&control, &entry) && entry.len == 0);
    set_descriptor(&control, 0, (void *)(1ull << 40), 4, DESC_NEXT, 1);
    set_descriptor(&control, 1, (void *)(1ull << 40), 1, DESC_WRITE, 0);
    queue_offer(&control, 0);
    queue_ring(&control);
    CHECK(!queue_wait(&control, &entry));
}

int guest_main(void)
{
    if (!virtio_find(VIRTIO_NETWORK, 0, &network.device))
        return EXIT_MISSING;
    /* The host may start what serves the network only now. */
    network_check(&network, 0);
    arm();
    if (told_to("headers"))
        headers();
    else if (told_to("lengths"))
        lengths();
    else if (told_to("receive"))
        receive();
    else if (told_to("commands"))
        commands();
    else
        return EXIT_BAD_COMMAND_LINE;
    network_check(&network, 0);
    spend();
}
