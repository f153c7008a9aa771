/* The block driver: see block.h. */
#include "block.h"

void block_start(unsigned nth, struct virtio *disk, struct queue *queue)
{
    if (!virtio_find(VIRTIO_BLOCK, nth, disk)) {
        print("no disk\n");
        exit_with(EXIT_MISSING);
    }
    CHECK(virtio_start(disk, FEATURE(F_BLOCK_READ_ONLY) | FEATURE(F_BLOCK_FLUSH) | FEATURE(F_BLOCK_DISCARD) |
                                 FEATURE(F_BLOCK_WRITE_ZEROES) | FEATURE(F_RING_INDIRECT_DESC)));
    queue_start(disk, 0, 64, queue);
    virtio_ready(disk);
}

u64 block_capacity(const struct virtio *disk)
{
    return read32(disk->config) | (u64)read32(disk->config + 4) << 32;
}

u8 block_request(struct queue *queue, u32 type, u64 sector, volatile void *data, u32 len, u32 *used_len)
{
    static struct block_header header;
    static volatile u8 status;
    bool from_device = type == BLOCK_IN || type == BLOCK_GET_ID;
    header = (struct block_header){type, 0, sector};
    status = BLOCK_UNTOUCHED;
    set_descriptor(queue, 0, &header, sizeof header, DESC_NEXT, len ? 1 : 2);
    set_descriptor(queue, 1, data, len, DESC_NEXT | (from_device ? DESC_WRITE : 0), 2);
    set_descriptor(queue, 2, &status, 1, DESC_WRITE, 0);
    queue_offer(queue, 0);
    queue_ring(queue);
    struct used_entry entry;
    if (!queue_wait(queue, &entry))
        return BLOCK_UNTOUCHED;
    CHECK(entry.id == 0);
    if (used_len)
        *used_len = entry.len;
    return status;
}
