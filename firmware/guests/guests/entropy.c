/* Random bytes: a few, too many at once, and by interrupt (`do=read`, `do=large`, `do=interrupt`). */
#include "cpu.h"
#include "virtio.h"

enum {
    ENTROPY_VECTOR = 0x41,
    LARGE = 1 << 20,
};

static struct virtio device;
static struct queue queue;
static volatile unsigned interrupts;
static u8 bytes[LARGE] __attribute__((aligned(4096)));

static void on_entropy(struct interrupt_frame *frame)
{
    (void)frame;
    interrupts++;
    write32(device.base + REG_INTERRUPT_ACK, read32(device.base + REG_INTERRUPT_STATUS));
    end_of_interrupt();
}

static u32 ask(u32 len)
{
    struct used_entry entry;
    set_descriptor(&queue, 0, bytes, len, DESC_WRITE, 0);
    queue_offer(&queue, 0);
    queue_ring(&queue);
    CHECK(queue_wait(&queue, &entry));
    CHECK(entry.id == 0 && entry.len <= len);
    return entry.len;
}

int guest_main(void)
{
    if (!virtio_find(VIRTIO_ENTROPY, 0, &device))
        return EXIT_MISSING;
    CHECK(virtio_start(&device, 0));
    queue_start(&device, 0, 8, &queue);
    virtio_ready(&device);
    if (told_to("read")) {
        CHECK(ask(64) == 64);
        u64 first = *(u64 *)bytes;
        CHECK(first != *(u64 *)(bytes + 8));
        CHECK(ask(64) == 64);
        CHECK(first != *(u64 *)bytes);
        print("random %x\n", *(u64 *)bytes);
    } else if (told_to("large")) {
        u32 given = ask(LARGE);
        CHECK(given > 0);
        print("given %u\n", (u64)given);
    } else if (told_to("interrupt")) {
        unsigned count = argument_number("count", 100);
        interrupts_start();
        handle(ENTROPY_VECTOR, on_entropy);
        route(device.gsi, ENTROPY_VECTOR);
        for (unsigned i = 0; i < count; i++) {
            struct used_entry entry;
            set_descriptor(&queue, 0, bytes, 8, DESC_WRITE, 0);
            queue_offer(&queue, 0);
            queue_ring(&queue);
            /* The interrupt for this buffer may arrive before the HLT, but must not be lost. */
            while (interrupts <= i)
                wait_for_interrupt();
            CHECK(queue_take(&queue, &entry) && entry.len == 8);
        }
        CHECK(interrupts == count);
        print("interrupts %u\n", (u64)interrupts);
    } else
        return EXIT_BAD_COMMAND_LINE;
    print("done\n");
    return EXIT_OK;
}
