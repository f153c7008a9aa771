/* Measures the cost of exits: port I/O, MMIO and a doorbell, from CPL 0 and from CPL 3, `count=` times each. */
#include "cpu.h"
#include "virtio.h"

enum { MMIO_HOLE = 0xd8000000 };

static struct virtio device;
static struct queue queue;
static u64 count;
static u8 ring3_stack[8192] __attribute__((aligned(16)));

static void measure(const char *ring)
{
    u64 start = clock_ns();
    for (u64 i = 0; i < count; i++)
        in8(PORT_HOLE);
    u64 ports = clock_ns();
    for (u64 i = 0; i < count; i++)
        read32(MMIO_HOLE);
    u64 mmio = clock_ns();
    for (u64 i = 0; i < count; i++)
        queue_ring(&queue);
    u64 doorbells = clock_ns();
    print("port %s %u\n", ring, (ports - start) / count);
    print("mmio %s %u\n", ring, (mmio - ports) / count);
    print("doorbell %s %u\n", ring, (doorbells - mmio) / count);
}

static void in_ring3(void)
{
    measure("cpl3");
    exit_with(EXIT_OK);
}

int guest_main(void)
{
    count = argument_number("count", 10000);
    if (!clock_start() || !virtio_find(VIRTIO_ENTROPY, 0, &device))
        return EXIT_MISSING;
    CHECK(virtio_start(&device, 0));
    queue_start(&device, 0, 8, &queue);
    virtio_ready(&device);
    measure("cpl0");
    map_memory(4);
    enter_ring3(in_ring3, ring3_stack + sizeof ring3_stack - 8);
}
