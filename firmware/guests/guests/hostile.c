/* A driver that violates every rule of the ring in turn, and expects a working disk after each reset. */
#include "block.h"
#include "cpu.h"

enum {
    OUTSIDE = 0xc8000000,
    QUEUE_SIZE = 64,
};

static struct virtio disk;
static struct queue queue;
static struct block_header header;
static volatile u8 status;
static u8 data[8192] __attribute__((aligned(4096)));
static struct descriptor table[4096] __attribute__((aligned(4096)));

/* A well-formed read of one sector, to be corrupted. */
static void good_chain(void)
{
    header = (struct block_header){BLOCK_IN, 0, 0};
    status = BLOCK_UNTOUCHED;
    set_descriptor(&queue, 0, &header, sizeof header, DESC_NEXT, 1);
    set_descriptor(&queue, 1, data, SECTOR, DESC_NEXT | DESC_WRITE, 2);
    set_descriptor(&queue, 2, &status, 1, DESC_WRITE, 0);
}

static void good_table(void)
{
    good_chain();
    memcpy(table, queue.table, 3 * sizeof *table);
    set_descriptor(&queue, 0, table, 3 * sizeof *table, DESC_INDIRECT, 0);
}

/* Restarts the device and performs a read. */
static void recover(void)
{
    block_start(0, &disk, &queue);
    CHECK(block_request(&queue, BLOCK_IN, 0, data, SECTOR, NULL) == BLOCK_OK);
}

/* Submits the corrupted chain at `head` and reports the outcome: a completion or a needed reset, but not silence. */
static void tell(const char *name, u16 head)
{
    struct used_entry entry;
    queue_offer(&queue, head);
    queue_ring(&queue);
    if (queue_wait(&queue, &entry))
        print("%s: used %u, status %x\n", name, (u64)entry.len, (u64)status);
    else
        print("%s: needs reset\n", name);
    recover();
}

/* The same for a chain that cannot be mistaken for a valid one. */
static void refuse(const char *name, u16 head)
{
    tell(name, head);
    CHECK(status != BLOCK_OK);
}

static void chains(void)
{
    good_chain();
    queue.table[0].next = 0;
    refuse("descriptor points at itself", 0);
    good_chain();
    queue.table[1].next = 0;
    refuse("two descriptors point at each other", 0);
    good_chain();
    queue.table[1].next = QUEUE_SIZE;
    refuse("next outside the table", 0);
    good_chain();
    queue.table[0].next = 0xffff;
    refuse("next far outside the table", 0);
    good_chain();
    refuse("head outside the table", QUEUE_SIZE);
    good_chain();
    refuse("head far outside the table", 0xffff);
    good_chain();
    queue.table[0].flags = 0;
    refuse("header alone", 0);
    good_chain();
    queue.table[0].len = 15;
    refuse("short header", 0);
    good_chain();
    queue.table[0].len = 0;
    queue.table[1].len = 0;
    queue.table[2].len = 0;
    refuse("empty buffers", 0);
    good_chain();
    queue.table[0].flags |= DESC_WRITE;
    refuse("header that may be written", 0);
    good_chain();
    queue.table[2].flags = 0;
    refuse("status that may not be written", 0);
    good_chain();
    queue.table[1].flags &= ~DESC_WRITE;
    /* An empty read, if it is interpreted that way. */
    tell("read into what may not be written", 0);
}

static void addresses(void)
{
    u64 places[] = {OUTSIDE, 1ull << 40, 1ull << 63, ~0ull, ~0ull - 15};
    for (unsigned i = 0; i < sizeof places / sizeof *places; i++)
        for (unsigned at = 0; at < 3; at++) {
            good_chain();
            queue.table[at].address = places[i];
            refuse("buffer outside memory", 0);
        }
    good_chain();
    queue.table[1].len = 0xffffffff;
    refuse("buffer of 4 GiB", 0);
    good_chain();
    queue.table[1].len = 0xfffffe00;
    refuse("aligned buffer of 4 GiB", 0);
}

static void indirect_tables(void)
{
    static const u32 lengths[] = {0, 1, 15, 17, 0xfffffff0, 0xffffffff};
    for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        good_table();
        queue.table[0].len = lengths[i];
        /* With an invalid length the chain in the table may still be valid: a completion is as correct as an error. */
        print("%u bytes, ", (u64)lengths[i]);
        tell("indirect table", 0);
    }
    good_table();
    queue.table[0].address = OUTSIDE;
    refuse("indirect table outside memory", 0);
    good_table();
    table[1] = (struct descriptor){(u64)table, sizeof table[0], DESC_INDIRECT, 0};
    refuse("indirect table in an indirect table", 0);
    good_table();
    table[1].next = 0;
    refuse("loop in an indirect table", 0);
    good_table();
    table[1].next = 3;
    refuse("next outside the indirect table", 0);
    /* A chain longer than any queue. */
    good_table();
    for (unsigned i = 1; i < 4095; i++)
        table[i] = (struct descriptor){(u64)data, 1, DESC_NEXT | DESC_WRITE, i + 1};
    table[4095] = (struct descriptor){(u64)&status, 1, DESC_WRITE, 0};
    queue.table[0].len = sizeof table;
    refuse("chain of 4096 descriptors", 0);
}

static void rings(void)
{
    struct used_entry entry;
    good_chain();
    queue.available.index = QUEUE_SIZE * 4;
    queue_ring(&queue);
    CHECK(!queue_wait(&queue, &entry));
    print("available index too far ahead: needs reset\n");
    recover();

    for (unsigned i = 0; i < 3; i++) {
        static const u32 registers[] = {REG_QUEUE_DESC, REG_QUEUE_DRIVER, REG_QUEUE_DEVICE};
        CHECK(virtio_start(&disk, 0));
        memset(&queue, 0, sizeof queue);
        queue.device = &disk;
        queue.size = QUEUE_SIZE;
        write32(disk.base + REG_QUEUE_SEL, 0);
        write32(disk.base + REG_QUEUE_NUM, QUEUE_SIZE);
        u64 areas[] = {(u64)queue.table, (u64)&queue.available, (u64)&queue.used};
        areas[i] = OUTSIDE;
        for (unsigned j = 0; j < 3; j++) {
            write32(disk.base + registers[j], areas[j]);
            write32(disk.base + registers[j] + 4, areas[j] >> 32);
        }
        write32(disk.base + REG_QUEUE_READY, 1);
        virtio_ready(&disk);
        good_chain();
        queue_offer(&queue, 0);
        queue_ring(&queue);
        recover();
        print("ring %u outside memory\n", (u64)i);
    }

    static const u32 sizes[] = {0, 3, 0x8000, 0x10000, 0xffffffff};
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        CHECK(virtio_start(&disk, 0));
        write32(disk.base + REG_QUEUE_SEL, 0);
        write32(disk.base + REG_QUEUE_NUM, sizes[i]);
        write32(disk.base + REG_QUEUE_READY, 1);
        virtio_ready(&disk);
        write32(disk.base + REG_QUEUE_NOTIFY, 0);
        recover();
        print("queue of %u entries\n", (u64)sizes[i]);
    }
}

/* Accesses registers out of order and out of range. */
static void protocol(void)
{
    CHECK(virtio_start(&disk, 0));
    write32(disk.base + REG_QUEUE_NOTIFY, 0);
    write32(disk.base + REG_QUEUE_NOTIFY, 0xffffffff);
    write32(disk.base + REG_QUEUE_SEL, 0xffffffff);
    CHECK(read32(disk.base + REG_QUEUE_NUM_MAX) == 0);
    write32(disk.base + REG_QUEUE_NUM, 16);
    write32(disk.base + REG_QUEUE_READY, 1);
    write32(disk.base + REG_STATUS, 0xff);
    recover();
    print("registers out of order\n");

    /* A feature that is not offered must not be accepted (virtio 1.2 §3.1.1). */
    write32(disk.base + REG_STATUS, 0);
    write32(disk.base + REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    for (u32 half = 0; half < 2; half++) {
        write32(disk.base + REG_DRIVER_FEATURES_SEL, half);
        write32(disk.base + REG_DRIVER_FEATURES, 0xffffffff);
    }
    write32(disk.base + REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    CHECK(!(virtio_status(&disk) & STATUS_FEATURES_OK));
    recover();
    print("features that are not offered\n");

    /* Reset with requests in flight: completions arrive only before the status reads 0. */
    for (unsigned i = 0; i < 50; i++) {
        for (unsigned j = 0; j < 16; j++) {
            good_chain();
            queue.table[1].len = sizeof data;
            queue_offer(&queue, 0);
        }
        queue_ring(&queue);
        write32(disk.base + REG_STATUS, 0);
        while (virtio_status(&disk))
            ;
        u16 completed = queue.used.index;
        memset(data, 0x77, sizeof data);
        for (unsigned j = 0; j < 2000; j++)
            asm volatile("pause");
        CHECK(queue.used.index == completed);
        for (unsigned j = 0; j < sizeof data; j += 512)
            CHECK(data[j] == 0x77);
        recover();
    }
    print("reset with requests under way\n");

    for (unsigned i = 0; i < 10000; i++)
        write32(disk.base + REG_QUEUE_NOTIFY, 0);
    recover();
    print("doorbell without a request\n");
}

int guest_main(void)
{
    recover();
    if (told_to("chains"))
        chains();
    else if (told_to("addresses"))
        addresses();
    else if (told_to("indirect"))
        indirect_tables();
    else if (told_to("rings"))
        rings();
    else if (told_to("protocol"))
        protocol();
    else
        return EXIT_BAD_COMMAND_LINE;
    print("done\n");
    return EXIT_OK;
}
