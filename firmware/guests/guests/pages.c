/* Tells the balloon lies: `do=pages` outside of memory, many times, in endless requests; statistics that are none. Or the truth:
 * `do=keep` waits with pages in the balloon. */
#include "arena.h"

enum {
    F_STATISTICS = 1,
    F_REPORTING = 5,
    INFLATE = 0,
    DEFLATE = 1,
    STATISTICS = 2,
    REPORTING = 3,
    PAGE = 4096,
    NUMBERS = 1024,
    ACTUAL = 4,
};

static struct queue queues[REPORTING + 1];
static u32 numbers[NUMBERS] __attribute__((aligned(PAGE)));

static void start(struct virtio *balloon)
{
    restart(balloon, FEATURE(F_STATISTICS) | FEATURE(F_REPORTING));
    for (u16 number = 0; number <= REPORTING; number++)
        queue_start(balloon, number, 16, &queues[number]);
    virtio_ready(balloon);
}

/* A request of one buffer, which must be answered: a balloon has no errors. */
static void tell(u16 number, u64 address, u32 len, u16 flags)
{
    struct queue *queue = &queues[number];
    struct used_entry entry;
    queue->table[0] = (struct descriptor){address, len, flags, 0};
    queue_offer(queue, 0);
    queue_ring(queue);
    CHECK(queue_wait(queue, &entry));
}

static u32 some_number(void)
{
    const u32 pages[] = {memory_end() / PAGE, memory_end() / PAGE + 1, 0xd0000, 0xfee00, 0x100000, 0x7fffffff, 0xffffffff};
    return chance(2) ? ONE_OF(pages) : ARENA / PAGE + chance(256);
}

static void pages(struct virtio *balloon)
{
    for (u64 round = 0, count = rounds(200); round < count; round++) {
        for (unsigned i = 0; i < 32; i++)
            numbers[chance(NUMBERS)] = some_number();
        tell(INFLATE, (u64)numbers, 4 * chance(NUMBERS) + chance(4), chance(2) * DESC_WRITE);
        tell(DEFLATE, (u64)numbers, 4 * chance(NUMBERS), 0);
        /* No request of 4 GiB can be in a memory of 64 MiB. */
        tell(INFLATE, 1ull << 40, 0xffffffff, 0);
        tell(DEFLATE, some_address(), some_len(), chance(2) * DESC_WRITE);
        tell(REPORTING, some_address(), some_len(), DESC_WRITE);
        write32(balloon->config + chance(16), chance(1ull << 32));
    }
}

/* What was taken reads as zeroes, and what was not is as before. */
static void check_content(void)
{
    memset((void *)ARENA, 0x55, 4 * PAGE);
    numbers[0] = ARENA / PAGE + 1;
    numbers[1] = memory_end() / PAGE;
    tell(INFLATE, (u64)numbers, 8, 0);
    CHECK(read32(ARENA + PAGE) == 0 && read32(ARENA + 2 * PAGE - 4) == 0);
    CHECK(read32(ARENA + PAGE - 4) == 0x55555555 && read32(ARENA + 2 * PAGE) == 0x55555555);
}

static void statistics(void)
{
    struct queue *queue = &queues[STATISTICS];
    for (u64 round = 0, count = rounds(200); round < count; round++) {
        queue->table[0] = (struct descriptor){some_address(), some_len(), chance(2) * DESC_WRITE, 0};
        queue_offer(queue, 0);
        queue_ring(queue);
    }
}

static bool all_are(u64 address, u64 len, u32 value)
{
    for (u64 at = address; at < address + len; at += 4)
        if (read32(at) != value)
            return false;
    return true;
}

/* Every other page is in the balloon while the guest waits; then those return, and the other ones take their place. */
static void keep(void)
{
    u32 len = sizeof numbers;
    memset((void *)ARENA, 0x55, 2 * NUMBERS * PAGE);
    for (unsigned i = 0; i < NUMBERS; i++)
        numbers[i] = ARENA / PAGE + 2 * i;
    tell(INFLATE, (u64)numbers, len, 0);
    say_and_wait("inflated");
    for (unsigned i = 0; i < NUMBERS; i++) {
        CHECK(all_are((u64)numbers[i] * PAGE, PAGE, 0));
        CHECK(all_are((u64)numbers[i] * PAGE + PAGE, PAGE, 0x55555555));
    }
    tell(DEFLATE, (u64)numbers, len, 0);
    memset((void *)ARENA, 0x66, 2 * NUMBERS * PAGE);
    for (unsigned i = 0; i < NUMBERS; i++)
        numbers[i]++;
    tell(INFLATE, (u64)numbers, len, 0);
    for (unsigned i = 0; i < NUMBERS; i++) {
        CHECK(all_are((u64)numbers[i] * PAGE - PAGE, PAGE, 0x66666666));
        CHECK(all_are((u64)numbers[i] * PAGE, PAGE, 0));
    }
}

int guest_main(void)
{
    struct virtio balloon;
    arm();
    if (!virtio_find(VIRTIO_BALLOON, 0, &balloon))
        return EXIT_MISSING;
    start(&balloon);
    if (told_to("keep")) {
        keep();
        spend();
    }
    /* Not 0, which is the guest's own. */
    for (unsigned i = 0; i < NUMBERS; i++)
        numbers[i] = some_number();
    pages(&balloon);
    check_content();
    statistics();
    spend();
}
