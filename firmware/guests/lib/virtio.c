/* The virtio driver: see virtio.h. */
#include "virtio.h"

#include "cpu.h"

bool virtio_find(u32 type, unsigned nth, struct virtio *device)
{
    for (unsigned slot = 0; slot < VIRTIO_SLOTS; slot++) {
        u64 base = VIRTIO_MMIO_BASE + (u64)slot * VIRTIO_MMIO_STRIDE;
        if (read32(base) != VIRTIO_MAGIC)
            continue;
        CHECK(read32(base + REG_VERSION) == 2);
        if ((type == VIRTIO_ANY || read32(base + REG_DEVICE_ID) == type) && nth-- == 0) {
            *device = (struct virtio){base, VIRTIO_FIRST_GSI + slot, 0};
            return true;
        }
    }
    return false;
}

bool virtio_start(struct virtio *device, u64 features)
{
    u64 base = device->base;
    write32(base + REG_STATUS, 0);
    u64 start = rdtsc();
    while (read32(base + REG_STATUS) != 0)
        CHECK(!waited_too_long(start));
    write32(base + REG_STATUS, STATUS_ACKNOWLEDGE);
    write32(base + REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    u64 offered = 0;
    for (u32 half = 0; half < 2; half++) {
        write32(base + REG_DEVICE_FEATURES_SEL, half);
        offered |= (u64)read32(base + REG_DEVICE_FEATURES) << 32 * half;
    }
    device->features = offered & (features | FEATURE(F_VERSION_1));
    for (u32 half = 0; half < 2; half++) {
        write32(base + REG_DRIVER_FEATURES_SEL, half);
        write32(base + REG_DRIVER_FEATURES, device->features >> 32 * half);
    }
    write32(base + REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    return virtio_status(device) & STATUS_FEATURES_OK;
}

static void write_address(u64 at, const volatile void *address)
{
    write32(at, (u64)address);
    write32(at + 4, (u64)address >> 32);
}

void queue_start(struct virtio *device, u16 number, u16 size, struct queue *queue)
{
    u64 base = device->base;
    memset(queue, 0, sizeof *queue);
    write32(base + REG_QUEUE_SEL, number);
    CHECK(read32(base + REG_QUEUE_READY) == 0);
    u32 max = read32(base + REG_QUEUE_NUM_MAX);
    CHECK(max > 0);
    queue->device = device;
    queue->number = number;
    queue->size = size < max ? size : max;
    write32(base + REG_QUEUE_NUM, queue->size);
    write_address(base + REG_QUEUE_DESC, queue->table);
    write_address(base + REG_QUEUE_DRIVER, &queue->available);
    write_address(base + REG_QUEUE_DEVICE, &queue->used);
    write32(base + REG_QUEUE_READY, 1);
    CHECK(read32(base + REG_QUEUE_READY) == 1);
}

void virtio_ready(struct virtio *device)
{
    write32(device->base + REG_STATUS,
            STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
}

u8 virtio_status(const struct virtio *device) { return read32(device->base + REG_STATUS); }

void queue_offer(struct queue *queue, u16 head)
{
    u16 index = queue->available.index;
    queue->available.ring[index % queue->size] = head;
    asm volatile("" ::: "memory");
    queue->available.index = index + 1;
}

bool queue_take(struct queue *queue, struct used_entry *entry)
{
    if (queue->used.index == queue->seen)
        return false;
    asm volatile("" ::: "memory");
    *entry = queue->used.ring[queue->seen++ % queue->size];
    return true;
}

bool queue_wait(struct queue *queue, struct used_entry *entry)
{
    u64 start = rdtsc();
    for (unsigned polls = 0; !queue_take(queue, entry); polls++) {
        /* Reading the status causes an exit, so it is read only occasionally. */
        if (polls % 1024 == 1023 && virtio_status(queue->device) & STATUS_NEEDS_RESET)
            return false;
        CHECK(!waited_too_long(start));
    }
    return true;
}
