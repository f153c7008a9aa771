/* A machine under load that notices whatever is lost, late or done twice. Processor 0 writes blocks of the disk and reads them
 * back, several requests in flight, by interrupts with the event index, and prints numbers in order. Processor 1 waits in HLT: it
 * echoes serial input, answers datagrams, and counts the ticks of a timer that it sets each time, and messages of processor 0.
 * Processor 2 waits for its SIPI until the end, which is an EOT on the serial port. */
#include "block.h"
#include "cpu.h"
#include "datagrams.h"

enum {
    BLOCK = 4096,
    SECTORS_EACH = BLOCK / SECTOR,
    /* Of a sector. */
    WORDS = SECTOR / 8,
    BLOCKS_MAX = 1024,
    DEPTH = 12,
    DESCRIPTORS_EACH = 3,
    REQUESTS_EACH_LINE = 64,
    BLOCK_VECTOR = 0x40,
    SERIAL_VECTOR,
    TIMER_VECTOR,
    MESSAGE_VECTOR,
    NETWORK_VECTOR,
    /* Of the APIC's timer: 1 ms. */
    TICK = 1000000,
    DIVIDE_BY_1 = 0xb,
    /* 16550 registers, from PORT_SERIAL. */
    INTERRUPT_ENABLE = 1,
    MODEM_CONTROL = 4,
    LINE_STATUS = 5,
    DATA_READY = 1,
    SERIAL_GSI = 4,
    EOT = 4,
};

static struct request {
    struct block_header header;
    u64 block, number;
    bool in_flight;
    volatile u8 status;
} requests[DEPTH];

static struct virtio disk;
static struct queue queue;
static u64 buffers[DEPTH][BLOCK / 8] __attribute__((aligned(BLOCK)));
/* Of each block: the number of its last complete write, and whether a request is in flight. */
static u64 latest[BLOCKS_MAX];
static bool busy[BLOCKS_MAX];
static u64 blocks, in_flight, completed, writes, lines;
static volatile u64 interrupts, ticks, messages;
static volatile bool ended, echoing, third_runs;

static u64 chance(u64 bound)
{
    static u64 state = 88172645463325252;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state >> 11) % bound;
}

/* The content of a block, which the host can check: each sector has the number of the write, its own number, and then one
 * word that depends on both. By string instructions, which are fast even where KVM emulates CPL 0. */
static u64 word(u64 sector, u64 number) { return number * 6364136223846793005 + sector; }

static void fill(u64 *words, u64 block, u64 number)
{
    for (u64 sector = block * SECTORS_EACH; sector < (block + 1) * SECTORS_EACH; sector++) {
        u64 count = WORDS - 2;
        *words++ = number;
        *words++ = sector;
        asm volatile("rep stosq" : "+D"(words), "+c"(count) : "a"(word(sector, number)) : "memory");
    }
}

static bool is_filled(const u64 *words, u64 block, u64 number)
{
    for (u64 sector = block * SECTORS_EACH; sector < (block + 1) * SECTORS_EACH; sector++) {
        u64 count = WORDS - 2;
        bool same;
        if (*words++ != number || *words++ != sector)
            return false;
        asm volatile("repe scasq" : "+D"(words), "+c"(count), "=@cce"(same) : "a"(word(sector, number)) : "memory");
        if (!same)
            return false;
    }
    return true;
}

static void offer(unsigned slot, u32 type, u64 block)
{
    struct request *request = &requests[slot];
    u16 at = slot * DESCRIPTORS_EACH;
    CHECK(!request->in_flight);
    request->header = (struct block_header){type, 0, type == BLOCK_FLUSH ? 0 : block * SECTORS_EACH};
    request->status = BLOCK_UNTOUCHED;
    request->block = block;
    request->in_flight = true;
    set_descriptor(&queue, at, &request->header, sizeof request->header, DESC_NEXT, type == BLOCK_FLUSH ? at + 2 : at + 1);
    set_descriptor(&queue, at + 1, buffers[slot], BLOCK, DESC_NEXT | (type == BLOCK_IN ? DESC_WRITE : 0), at + 2);
    set_descriptor(&queue, at + 2, &request->status, 1, DESC_WRITE, 0);
    request->number = type == BLOCK_OUT ? ++writes : 0;
    fill(buffers[slot], block, request->number);
    if (type != BLOCK_FLUSH)
        busy[block] = true;
    in_flight++;
    queue_offer(&queue, at);
}

static void complete(const struct used_entry *entry)
{
    unsigned slot = entry->id / DESCRIPTORS_EACH;
    CHECK(slot < DEPTH && entry->id % DESCRIPTORS_EACH == 0);
    struct request *request = &requests[slot];
    u32 type = request->header.type;
    CHECK(request->in_flight);
    CHECK(request->status == BLOCK_OK);
    CHECK(entry->len == (type == BLOCK_IN ? BLOCK + 1 : 1));
    if (type == BLOCK_IN)
        CHECK(is_filled(buffers[slot], request->block, latest[request->block]));
    if (type == BLOCK_OUT)
        latest[request->block] = request->number;
    if (type != BLOCK_FLUSH)
        busy[request->block] = false;
    request->in_flight = false;
    in_flight--;
    completed++;
}

static void offer_any(unsigned slot)
{
    u64 block = chance(blocks);
    while (busy[block])
        block = (block + 1) % blocks;
    if (chance(32) == 0)
        offer(slot, BLOCK_FLUSH, 0);
    else
        offer(slot, latest[block] && chance(2) ? BLOCK_IN : BLOCK_OUT, block);
}

static void take_all(void)
{
    struct used_entry entry;
    while (queue_take(&queue, &entry))
        complete(&entry);
}

/* Processor 0 gets no other interrupt than the disk's: if that is lost, it sleeps for ever. */
static void sleep_until_used(void)
{
    *used_event(&queue) = queue.seen;
    barrier();
    if (queue.used.index == queue.seen)
        wait_for_interrupt();
}

/* Each message is sent once the one before it has arrived, so that no two become one. */
static void send_message(void)
{
    CHECK(messages <= lines);
    if (messages != lines)
        return;
    print("%u\n", ++lines);
    write32(LAPIC + LAPIC_ICR_HIGH, 1 << 24);
    write32(LAPIC + LAPIC_ICR_LOW, MESSAGE_VECTOR);
}

static void load(void)
{
    while (in_flight || !ended) {
        u16 old = queue.available.index;
        u64 before = completed;
        take_all();
        for (unsigned slot = 0; slot < DEPTH && !ended; slot++)
            if (!requests[slot].in_flight)
                offer_any(slot);
        queue_ring_if_asked(&queue, old);
        if (before / REQUESTS_EACH_LINE != completed / REQUESTS_EACH_LINE)
            send_message();
        if (in_flight)
            sleep_until_used();
    }
}

/* Returns the sum of the numbers of all blocks. */
static u64 read_back(void)
{
    u64 sum = 0;
    for (u64 block = 0; block < blocks; block++)
        if (latest[block]) {
            u16 old = queue.available.index;
            sum += latest[block];
            offer(0, BLOCK_IN, block);
            queue_ring_if_asked(&queue, old);
            for (take_all(); in_flight; take_all())
                sleep_until_used();
        }
    return sum;
}

static void on_disk(struct interrupt_frame *frame)
{
    (void)frame;
    interrupts++;
    if (!disk.is_pci)
        write32(disk.base + REG_INTERRUPT_ACK, read32(disk.base + REG_INTERRUPT_STATUS));
    end_of_interrupt();
}

static void on_serial(struct interrupt_frame *frame)
{
    (void)frame;
    while (in8(PORT_SERIAL + LINE_STATUS) & DATA_READY) {
        u8 byte = in8(PORT_SERIAL);
        if (byte == EOT)
            ended = true;
        if (!ended)
            out8(PORT_SERIAL, byte);
    }
    end_of_interrupt();
}

static void on_tick(struct interrupt_frame *frame)
{
    (void)frame;
    ticks++;
    write32(LAPIC + LAPIC_TIMER_COUNT, TICK);
    end_of_interrupt();
}

static void on_message(struct interrupt_frame *frame)
{
    (void)frame;
    messages++;
    end_of_interrupt();
}

static void on_datagrams(struct interrupt_frame *frame)
{
    (void)frame;
    datagrams_take();
    end_of_interrupt();
}

static void second(void)
{
    interrupts_start();
    route(SERIAL_GSI, SERIAL_VECTOR);
    datagrams_start(NETWORK_VECTOR);
    /* DTR, RTS and OUT2, which enables the interrupt. */
    out8(PORT_SERIAL + MODEM_CONTROL, 0x0b);
    out8(PORT_SERIAL + INTERRUPT_ENABLE, 1);
    write32(LAPIC + LAPIC_TIMER_DIVIDE, DIVIDE_BY_1);
    write32(LAPIC + LAPIC_TIMER, TIMER_VECTOR);
    write32(LAPIC + LAPIC_TIMER_COUNT, TICK);
    echoing = true;
    for (;;)
        wait_for_interrupt();
}

static void third(void) { third_runs = true; }

#define AWAIT(claim)                                                                                                   \
    do {                                                                                                               \
        u64 start = rdtsc();                                                                                           \
        while (!(claim))                                                                                               \
            CHECK(!waited_too_long(start));                                                                            \
    } while (0)

static void start_disk(void)
{
    CHECK(virtio_start(&disk, FEATURE(F_RING_EVENT_IDX) | FEATURE(F_BLOCK_FLUSH)));
    CHECK(disk.features & FEATURE(F_RING_EVENT_IDX));
    queue_start(&disk, 0, 64, &queue);
    blocks = block_capacity(&disk) / SECTORS_EACH;
    blocks = blocks < BLOCKS_MAX ? blocks : BLOCKS_MAX;
    CHECK(blocks > DEPTH);
    queue_interrupts(&queue, BLOCK_VECTOR);
    virtio_ready(&disk);
}

int guest_main(void)
{
    if (!virtio_find(VIRTIO_BLOCK, 0, &disk))
        return EXIT_MISSING;
    interrupts_start();
    handle(BLOCK_VECTOR, on_disk);
    handle(SERIAL_VECTOR, on_serial);
    handle(TIMER_VECTOR, on_tick);
    handle(MESSAGE_VECTOR, on_message);
    handle(NETWORK_VECTOR, on_datagrams);
    start_disk();
    start_processor(1, second);
    AWAIT(echoing);
    load();
    u64 sum = read_back();
    CHECK(interrupts > 0);
    AWAIT(messages == lines);
    u64 before = ticks;
    AWAIT(ticks > before);
    start_processor(2, third);
    AWAIT(third_runs);
    print("end\nrequests %u writes %u sum %u interrupts %u ticks %u datagrams %u\n", completed, writes, sum, interrupts, ticks,
          datagrams_count());
    return EXIT_OK;
}
