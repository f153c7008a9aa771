/* A virtio block driver (virtio 1.2 §5.2) that executes one request at a time. */
#pragma once

#include "virtio.h"

enum { SECTOR = 512 };

/* Feature bits (§5.2.3). */
enum { F_BLOCK_READ_ONLY = 5, F_BLOCK_FLUSH = 9, F_BLOCK_MQ = 12, F_BLOCK_DISCARD = 13, F_BLOCK_WRITE_ZEROES = 14 };

enum block_type {
    BLOCK_IN = 0,
    BLOCK_OUT = 1,
    BLOCK_FLUSH = 4,
    BLOCK_GET_ID = 8,
    BLOCK_DISCARD = 11,
    BLOCK_WRITE_ZEROES = 13,
};

/* The values of the status byte; the last is the driver's own. */
enum { BLOCK_OK = 0, BLOCK_IOERR = 1, BLOCK_UNSUPPORTED = 2, BLOCK_UNTOUCHED = 0xee };

struct block_header {
    u32 type, reserved;
    u64 sector;
};

/* Discard and write-zeroes (§5.2.6). */
struct block_segment {
    u64 sector;
    u32 sectors, flags;
};

/* Finds disk number `nth` and starts it with all features that this driver supports and queue 0 of 64 entries.
 * Ends the guest if there is no such disk. */
void block_start(unsigned nth, struct virtio *disk, struct queue *queue);

/* Sectors on the disk. */
u64 block_capacity(const struct virtio *disk);

/* One request with one data buffer of `len` bytes (or none, for 0). Returns the status byte, or BLOCK_UNTOUCHED where the
 * device asks for a reset. `used_len`, unless NULL, becomes the length that the device reports as written. */
u8 block_request(struct queue *queue, u32 type, u64 sector, volatile void *data, u32 len, u32 *used_len);
