/* vsock packets that a driver must not send: `do=garbage`, lies about `do=credit`, a `do=flood` of connections. */
#include "arena.h"
#include "cpu.h"

enum {
    RX = 0,
    TX = 1,
    PACKET = 4096,
    RX_BUFFERS = 64,
    HOST_CID = 2,
    STREAM = 1,
    /* Where a program of the host listens. */
    PORT = 5000,
    HEADER = 44,
};

enum { REQUEST = 1, RESPONSE = 2, RESET = 3, SHUTDOWN = 4, DATA = 5, CREDIT_UPDATE = 6, CREDIT_REQUEST = 7 };

struct header {
    u64 src_cid, dst_cid;
    u32 src_port, dst_port, len;
    u16 type, op;
    u32 flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

static struct virtio device;
static struct queue rx, tx;
static u8 received[RX_BUFFERS][PACKET] __attribute__((aligned(PACKET)));
static u8 packet[PACKET] __attribute__((aligned(PACKET)));
static u64 answers[16];

static void start(bool with_buffers)
{
    restart(&device, 0);
    queue_start(&device, RX, RX_BUFFERS, &rx);
    queue_start(&device, TX, 64, &tx);
    virtio_ready(&device);
    for (unsigned i = 0; with_buffers && i < RX_BUFFERS; i++) {
        set_descriptor(&rx, i, received[i], PACKET, DESC_WRITE, 0);
        queue_offer(&rx, i);
    }
    queue_ring(&rx);
}

static struct header good(u16 op, u32 port, u32 len)
{
    u64 cid = read32(device.config);
    return (struct header){cid, HOST_CID, port, PORT, len, STREAM, op, 0, 256 << 10, 0};
}

/* Counts the device's packets by operation, and returns their buffers. */
static void take(void)
{
    struct used_entry entry;
    bool any = false;
    while (queue_take(&rx, &entry)) {
        CHECK(entry.id < RX_BUFFERS && entry.len >= HEADER);
        answers[((struct header *)received[entry.id])->op % 16]++;
        queue_offer(&rx, entry.id);
        any = true;
    }
    if (any)
        queue_ring(&rx);
}

/* Sends the packet, which claims to be as long as its header says. False if the device needs a reset. */
static bool send(struct header header, u32 actual_len)
{
    struct used_entry entry;
    memcpy(packet, &header, sizeof header);
    set_descriptor(&tx, 0, packet, actual_len, 0, 0);
    queue_offer(&tx, 0);
    queue_ring(&tx);
    u64 start = rdtsc();
    for (unsigned polls = 0; !queue_take(&tx, &entry); polls++) {
        take();
        if (polls % 256 == 255 && virtio_status(&device) & STATUS_NEEDS_RESET)
            return false;
        CHECK(!waited_too_long(start));
    }
    return true;
}

/* Sends a packet whose answer is one of this kind. */
static void send_for(u16 answer, struct header header, u32 actual_len)
{
    u64 before = answers[answer], start = rdtsc();
    CHECK(send(header, actual_len));
    while (take(), answers[answer] == before)
        CHECK(!waited_too_long(start));
}

static void connect(u32 port) { send_for(RESPONSE, good(REQUEST, port, 0), HEADER); }

static void garbage(void)
{
    static const u64 cids[] = {0, 1, 2, 3, 4, 0xffffffff, 1ull << 32, ~0ull};
    static const u32 words[] = {0, 1, 2, 3, 4, 43, 4096, 0x7fffffff, 0x80000000, 0xffffffff};
    start(true);
    for (u64 round = 0, count = rounds(2000); round < count; round++) {
        struct header header = good(chance(10), 1000 + chance(4), ONE_OF(words));
        if (chance(4) == 0)
            header.src_cid = ONE_OF(cids);
        if (chance(4) == 0)
            header.dst_cid = ONE_OF(cids);
        if (chance(4) == 0)
            header.type = chance(4);
        if (chance(4) == 0)
            header.dst_port = ONE_OF(words);
        header.flags = ONE_OF(words);
        header.buf_alloc = ONE_OF(words);
        header.fwd_cnt = ONE_OF(words);
        CHECK(send(header, HEADER + chance(PACKET - HEADER)));
    }
    /* The last answers may still be on their way. */
    u64 end = rdtsc();
    while (take(), answers[RESET] == 0)
        CHECK(!waited_too_long(end));
    /* No header at all. */
    for (u32 len = 1; len < HEADER; len += 14) {
        start(true);
        CHECK(!send(good(REQUEST, 1, 0), len));
    }
}

static void credit(void)
{
    /* More than the host has room for: its reader does not read. */
    start(true);
    connect(1000);
    u64 resets = answers[RESET];
    u32 len = PACKET - HEADER;
    for (unsigned i = 0; i < 1000 && answers[RESET] == resets; i++)
        CHECK(send(good(DATA, 1000, len), PACKET));
    CHECK(answers[RESET] > resets);
    /* Bytes taken that were never sent, and a count that runs backwards. */
    static const u32 counts[] = {1, 0x7fffffff, 1000000};
    for (unsigned i = 0; i < sizeof counts / sizeof *counts; i++) {
        connect(2000 + i);
        struct header lie = good(CREDIT_UPDATE, 2000 + i, 0);
        lie.fwd_cnt = counts[i];
        send_for(RESET, lie, HEADER);
    }
    /* A length that the chain does not have. */
    connect(3000);
    send_for(RESET, good(DATA, 3000, 0xffffffff), PACKET);
    /* Room of 4 GiB, of none, and again, with requests for credit. */
    connect(4000);
    for (u64 round = 0, count = rounds(500); round < count; round++) {
        struct header update = good(chance(2) ? CREDIT_UPDATE : CREDIT_REQUEST, 4000, 0);
        update.buf_alloc = chance(2) ? 0xffffffff : 0;
        CHECK(send(update, HEADER));
    }
    send_for(CREDIT_UPDATE, good(CREDIT_REQUEST, 4000, 0), HEADER);
}

static void flood(void)
{
    /* Answers that are not taken hold up further packets. */
    start(false);
    u64 count = rounds(1000);
    memcpy(packet, &(struct header){.src_cid = good(0, 0, 0).src_cid, .dst_cid = HOST_CID, .type = STREAM, .op = DATA}, HEADER);
    set_descriptor(&tx, 0, packet, HEADER, 0, 0);
    for (u64 i = 0; i < count; i++) {
        /* Never more than the queue has room for. */
        u64 waited = rdtsc();
        while ((u16)(tx.available.index - tx.used.index) >= tx.size)
            if (rdtsc() - waited > 1 << 28)
                goto held_up;
        queue_offer(&tx, 0);
        queue_ring(&tx);
    }
    CHECK(!"the device takes packets without end");
held_up:
    /* More connections than there can be, all of them kept. */
    start(true);
    for (u64 i = 0; i < count; i++)
        CHECK(send(good(REQUEST, 10000 + i, 0), HEADER));
    u64 begun = rdtsc();
    while (answers[RESPONSE] + answers[RESET] < count) {
        take();
        CHECK(!waited_too_long(begun));
    }
    CHECK(answers[RESPONSE] > 100 && answers[RESET] > 100);
    print("connections %u refusals %u\n", answers[RESPONSE], answers[RESET]);
}

int guest_main(void)
{
    arm();
    if (!virtio_find(VIRTIO_VSOCK, 0, &device))
        return EXIT_MISSING;
    if (told_to("garbage"))
        garbage();
    else if (told_to("credit"))
        credit();
    else if (told_to("flood"))
        flood();
    else
        return EXIT_BAD_COMMAND_LINE;
    spend();
}
