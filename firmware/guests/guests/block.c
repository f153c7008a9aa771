/* All requests that a driver can make of a disk: `do=` selects the request, `disk=` the disk. */
#include "block.h"
#include "cpu.h"

enum {
    /* Sectors in the buffers. */
    SPAN = 64,
    BLOCK_VECTOR = 0x40,
    BLOCK_ID_LEN = 20,
    /* A record of the journal: blocks of 4 KiB, in flight at once. */
    RECORD_BLOCKS = 4,
    RECORD_BLOCK = 4096,
};

static struct virtio disk;
static struct queue queue;
static u8 written[SPAN * SECTOR] __attribute__((aligned(4096))), read[SPAN * SECTOR] __attribute__((aligned(4096)));

static void fill(u8 *to, u64 len, u64 seed)
{
    for (u64 *at = (u64 *)to; (u8 *)at < to + len; at++)
        *at = seed = seed * 6364136223846793005 + 1442695040888963407;
}

static bool same(const u8 *a, const u8 *b, u64 len)
{
    for (u64 i = 0; i < len; i += 8)
        if (*(const u64 *)(a + i) != *(const u64 *)(b + i))
            return false;
    return true;
}

static bool all_zero(const u8 *bytes, u64 len)
{
    for (u64 i = 0; i < len; i += 8)
        if (*(const u64 *)(bytes + i))
            return false;
    return true;
}

static void round_trip(void)
{
    u64 places[] = {0, 8, block_capacity(&disk) - SPAN};
    for (unsigned i = 0; i < 3; i++) {
        u32 used_len;
        fill(written, sizeof written, i + 1);
        CHECK(block_request(&queue, BLOCK_OUT, places[i], written, sizeof written, &used_len) == BLOCK_OK);
        CHECK(used_len == 1);
        memset(read, 0xaa, sizeof read);
        CHECK(block_request(&queue, BLOCK_IN, places[i], read, sizeof read, &used_len) == BLOCK_OK);
        CHECK(used_len == sizeof read + 1);
        CHECK(same(written, read, sizeof read));
    }
    CHECK(block_request(&queue, BLOCK_FLUSH, 0, NULL, 0, NULL) == BLOCK_OK);
}

/* Data in buffers of odd lengths, and a split header: framing is up to the driver (virtio 1.2 §2.7.4.1). */
static void scattered(void)
{
    struct block_header header = {BLOCK_OUT, 0, 3};
    volatile u8 status = BLOCK_UNTOUCHED;
    struct used_entry entry;
    fill(written, 2 * SECTOR, 9);
    for (int reading = 0; reading < 2; reading++) {
        u8 *data = reading ? read : written;
        u16 flags = DESC_NEXT | (reading ? DESC_WRITE : 0);
        header.type = reading ? BLOCK_IN : BLOCK_OUT;
        set_descriptor(&queue, 0, &header, 5, DESC_NEXT, 1);
        set_descriptor(&queue, 1, (u8 *)&header + 5, sizeof header - 5, DESC_NEXT, 2);
        set_descriptor(&queue, 2, data, 1, flags, 3);
        set_descriptor(&queue, 3, data + 1, 510, flags, 4);
        set_descriptor(&queue, 4, data + 511, 513, flags, 5);
        set_descriptor(&queue, 5, &status, 1, DESC_WRITE, 0);
        queue_offer(&queue, 0);
        queue_ring(&queue);
        CHECK(queue_wait(&queue, &entry));
        CHECK(entry.id == 0 && status == BLOCK_OK);
    }
    CHECK(same(written, read, 2 * SECTOR));
}

/* The same in an indirect table (§2.7.5.3). */
static void indirect(void)
{
    CHECK(disk.features & FEATURE(F_RING_INDIRECT_DESC));
    struct block_header header = {BLOCK_IN, 0, 0};
    volatile u8 status = BLOCK_UNTOUCHED;
    struct used_entry entry;
    struct descriptor table[3] = {
        {(u64)&header, sizeof header, DESC_NEXT, 1},
        {(u64)read, SECTOR, DESC_NEXT | DESC_WRITE, 2},
        {(u64)&status, 1, DESC_WRITE, 0},
    };
    fill(written, SECTOR, 5);
    CHECK(block_request(&queue, BLOCK_OUT, 0, written, SECTOR, NULL) == BLOCK_OK);
    set_descriptor(&queue, 7, table, sizeof table, DESC_INDIRECT, 0);
    queue_offer(&queue, 7);
    queue_ring(&queue);
    CHECK(queue_wait(&queue, &entry));
    CHECK(entry.id == 7 && status == BLOCK_OK && same(written, read, SECTOR));
}

static void get_id(void)
{
    u32 used_len;
    memset(read, 0xff, BLOCK_ID_LEN);
    CHECK(block_request(&queue, BLOCK_GET_ID, 0, read, BLOCK_ID_LEN, &used_len) == BLOCK_OK);
    CHECK(used_len == BLOCK_ID_LEN + 1);
    read[BLOCK_ID_LEN] = 0;
    print("id %s\n", (char *)read);
}

static void past_the_end(void)
{
    u64 capacity = block_capacity(&disk);
    u64 starts[] = {capacity, capacity - 1, 1ull << 54, 1ull << 55, ~0ull, ~0ull - 1};
    for (unsigned i = 0; i < sizeof starts / sizeof *starts; i++)
        for (u32 type = BLOCK_IN; type <= BLOCK_OUT; type++) {
            CHECK(block_request(&queue, type, starts[i], read, 2 * SECTOR, NULL) == BLOCK_IOERR);
        }
    CHECK(block_request(&queue, BLOCK_IN, capacity - 1, read, SECTOR, NULL) == BLOCK_OK);
}

/* Well-framed but invalid requests: each is completed, and none stops the queue. */
static void refused(void)
{
    CHECK(block_request(&queue, BLOCK_IN, 0, read, SECTOR - 1, NULL) == BLOCK_IOERR);
    CHECK(block_request(&queue, BLOCK_OUT, 0, written, SECTOR + 1, NULL) == BLOCK_IOERR);
    CHECK(block_request(&queue, 0x5a5a5a5a, 0, read, SECTOR, NULL) == BLOCK_UNSUPPORTED);
    struct block_segment absurd = {0, 0xffffffff, 0};
    if (disk.features & FEATURE(F_BLOCK_DISCARD)) {
        CHECK(block_request(&queue, BLOCK_DISCARD, 0, &absurd, sizeof absurd, NULL) == BLOCK_IOERR);
        CHECK(block_request(&queue, BLOCK_DISCARD, 0, &absurd, sizeof absurd - 1, NULL) != BLOCK_OK);
        absurd = (struct block_segment){~0ull, 8, 0};
        CHECK(block_request(&queue, BLOCK_DISCARD, 0, &absurd, sizeof absurd, NULL) == BLOCK_IOERR);
        absurd = (struct block_segment){0, 8, 0xfffffffe};
        CHECK(block_request(&queue, BLOCK_DISCARD, 0, &absurd, sizeof absurd, NULL) == BLOCK_UNSUPPORTED);
    }
    CHECK(block_request(&queue, BLOCK_IN, 0, read, SECTOR, NULL) == BLOCK_OK);
}

/* Discarded or zeroed sectors read as zeroes (raw files punch a hole), and adjacent ones are unchanged. */
static void zeroed(u32 type, unsigned feature)
{
    CHECK(disk.features & FEATURE(feature));
    fill(written, sizeof written, type);
    CHECK(block_request(&queue, BLOCK_OUT, 0, written, sizeof written, NULL) == BLOCK_OK);
    struct block_segment segment = {8, 16, 0};
    CHECK(block_request(&queue, type, 0, &segment, sizeof segment, NULL) == BLOCK_OK);
    CHECK(block_request(&queue, BLOCK_IN, 0, read, sizeof read, NULL) == BLOCK_OK);
    CHECK(same(read, written, 8 * SECTOR));
    CHECK(type == BLOCK_DISCARD || all_zero(read + 8 * SECTOR, 16 * SECTOR));
    CHECK(same(read + 24 * SECTOR, written + 24 * SECTOR, sizeof read - 24 * SECTOR));
}

static void read_only(void)
{
    CHECK(disk.features & FEATURE(F_BLOCK_READ_ONLY));
    struct block_segment segment = {0, 8, 0};
    CHECK(block_request(&queue, BLOCK_IN, 0, read, SECTOR, NULL) == BLOCK_OK);
    CHECK(block_request(&queue, BLOCK_OUT, 0, written, SECTOR, NULL) == BLOCK_IOERR);
    CHECK(block_request(&queue, BLOCK_DISCARD, 0, &segment, sizeof segment, NULL) != BLOCK_OK);
    CHECK(block_request(&queue, BLOCK_WRITE_ZEROES, 0, &segment, sizeof segment, NULL) != BLOCK_OK);
    CHECK(block_request(&queue, BLOCK_IN, 0, written, SECTOR, NULL) == BLOCK_OK);
    CHECK(same(read, written, SECTOR));
}

static volatile unsigned interrupts;

static void on_block(struct interrupt_frame *frame)
{
    (void)frame;
    interrupts++;
    write32(disk.base + REG_INTERRUPT_ACK, read32(disk.base + REG_INTERRUPT_STATUS));
    end_of_interrupt();
}

/* Waits for each read with HLT: a lost interrupt would make the guest hang. */
static void by_interrupt(void)
{
    struct block_header header = {BLOCK_IN, 0, 0};
    volatile u8 status;
    struct used_entry entry;
    unsigned count = argument_number("count", 100);
    interrupts_start();
    handle(BLOCK_VECTOR, on_block);
    route(disk.gsi, BLOCK_VECTOR);
    for (unsigned i = 0; i < count; i++) {
        status = BLOCK_UNTOUCHED;
        set_descriptor(&queue, 0, &header, sizeof header, DESC_NEXT, 1);
        set_descriptor(&queue, 1, read, SECTOR, DESC_NEXT | DESC_WRITE, 2);
        set_descriptor(&queue, 2, &status, 1, DESC_WRITE, 0);
        queue_offer(&queue, 0);
        queue_ring(&queue);
        unsigned before = interrupts;
        while (!queue_take(&queue, &entry))
            wait_for_interrupt();
        CHECK(status == BLOCK_OK);
        while (interrupts == before && i == 0)
            wait_for_interrupt();
    }
    CHECK(interrupts > 0 && interrupts <= count);
    print("interrupts %u\n", (u64)interrupts);
}

/* Writes data that the host can check: sector n starts with n, followed by a repeated byte. Ends without a flush. */
static void stamp(void)
{
    u64 sectors = argument_number("sectors", SPAN);
    for (u64 sector = 0; sector < sectors; sector++) {
        memset(written, 0x5a, SECTOR);
        *(u64 *)written = sector;
        CHECK(block_request(&queue, BLOCK_OUT, sector, written, SECTOR, NULL) == BLOCK_OK);
    }
}

/* Writes a record at `sector`, a block per request, and waits until all are complete. */
static void write_record(u64 sector)
{
    static struct block_header headers[RECORD_BLOCKS];
    static volatile u8 statuses[RECORD_BLOCKS];
    for (unsigned i = 0; i < RECORD_BLOCKS; i++) {
        headers[i] = (struct block_header){BLOCK_OUT, 0, sector + i * (RECORD_BLOCK / SECTOR)};
        statuses[i] = BLOCK_UNTOUCHED;
        set_descriptor(&queue, 3 * i, &headers[i], sizeof headers[i], DESC_NEXT, 3 * i + 1);
        set_descriptor(&queue, 3 * i + 1, written + i * RECORD_BLOCK, RECORD_BLOCK, DESC_NEXT, 3 * i + 2);
        set_descriptor(&queue, 3 * i + 2, &statuses[i], 1, DESC_WRITE, 0);
        queue_offer(&queue, 3 * i);
    }
    queue_ring(&queue);
    struct used_entry entry;
    for (unsigned i = 0; i < RECORD_BLOCKS; i++)
        CHECK(queue_wait(&queue, &entry));
    for (unsigned i = 0; i < RECORD_BLOCKS; i++)
        CHECK(statuses[i] == BLOCK_OK);
}

/* Appends records until the disk is full: record n consists of bytes n, and each sector of it starts with n and ends with ~n.
 * Prints n once a flush has followed. */
static void journal(void)
{
    u64 sectors = RECORD_BLOCKS * RECORD_BLOCK / SECTOR;
    for (u64 number = 1; number * sectors <= block_capacity(&disk); number++) {
        memset(written, number, sectors * SECTOR);
        for (u64 i = 0; i < sectors; i++) {
            *(u64 *)(written + i * SECTOR) = number;
            *(u64 *)(written + (i + 1) * SECTOR - 8) = ~number;
        }
        write_record((number - 1) * sectors);
        CHECK(block_request(&queue, BLOCK_FLUSH, 0, NULL, 0, NULL) == BLOCK_OK);
        print("durable %u\n", number);
    }
}

int guest_main(void)
{
    block_start(argument_number("disk", 0), &disk, &queue);
    print("capacity %u\n", block_capacity(&disk));
    if (told_to("round-trip"))
        round_trip();
    else if (told_to("scattered"))
        scattered();
    else if (told_to("indirect"))
        indirect();
    else if (told_to("get-id"))
        get_id();
    else if (told_to("past-the-end"))
        past_the_end();
    else if (told_to("refused"))
        refused();
    else if (told_to("discard"))
        zeroed(BLOCK_DISCARD, F_BLOCK_DISCARD);
    else if (told_to("write-zeroes"))
        zeroed(BLOCK_WRITE_ZEROES, F_BLOCK_WRITE_ZEROES);
    else if (told_to("read-only"))
        read_only();
    else if (told_to("interrupt"))
        by_interrupt();
    else if (told_to("stamp"))
        stamp();
    else if (told_to("journal"))
        journal();
    else if (told_to("hold")) {
        print("ready\n");
        stop();
    } else
        return EXIT_BAD_COMMAND_LINE;
    print("done\n");
    return EXIT_OK;
}
