/* A virtio driver over MMIO (virtio 1.2 §4.2) and PCI (§4.1) with split virtqueues (§2.7), as small as one can be. */
#pragma once

#include "guest.h"

enum {
    VIRTIO_MMIO_BASE = 0xd0000000,
    VIRTIO_MMIO_STRIDE = 0x1000,
    VIRTIO_FIRST_GSI = 6,
    VIRTIO_SLOTS = 18,
    VIRTIO_MAGIC = 0x74726976,
};

/* Device types (§5). */
enum {
    VIRTIO_ANY = 0,
    VIRTIO_NETWORK = 1,
    VIRTIO_BLOCK = 2,
    VIRTIO_ENTROPY = 4,
    VIRTIO_BALLOON = 5,
    VIRTIO_VSOCK = 19,
    VIRTIO_FOLDER = 26,
};

/* Registers of MMIO (§4.2.2). */
enum {
    REG_VERSION = 0x004,
    REG_DEVICE_ID = 0x008,
    REG_DEVICE_FEATURES = 0x010,
    REG_DEVICE_FEATURES_SEL = 0x014,
    REG_DRIVER_FEATURES = 0x020,
    REG_DRIVER_FEATURES_SEL = 0x024,
    REG_QUEUE_SEL = 0x030,
    REG_QUEUE_NUM_MAX = 0x034,
    REG_QUEUE_NUM = 0x038,
    REG_QUEUE_READY = 0x044,
    REG_QUEUE_NOTIFY = 0x050,
    REG_INTERRUPT_STATUS = 0x060,
    REG_INTERRUPT_ACK = 0x064,
    REG_STATUS = 0x070,
    REG_QUEUE_DESC = 0x080,
    REG_QUEUE_DRIVER = 0x090,
    REG_QUEUE_DEVICE = 0x0a0,
    REG_CONFIG = 0x100,
};

enum {
    STATUS_ACKNOWLEDGE = 1,
    STATUS_DRIVER = 2,
    STATUS_DRIVER_OK = 4,
    STATUS_FEATURES_OK = 8,
    STATUS_NEEDS_RESET = 0x40,
};

#define FEATURE(bit) (1ull << (bit))
enum { F_RING_INDIRECT_DESC = 28, F_RING_EVENT_IDX = 29, F_VERSION_1 = 32 };

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };

enum { QUEUE_SIZE_MAX = 256 };

struct descriptor {
    u64 address;
    u32 len;
    u16 flags, next;
};

struct available {
    u16 flags;
    volatile u16 index;
    u16 ring[QUEUE_SIZE_MAX];
    /* Follows the last entry only if the queue has its full size: see used_event(). */
    u16 used_event;
};

struct used_entry {
    u32 id, len;
};

struct used {
    u16 flags;
    volatile u16 index;
    struct used_entry ring[QUEUE_SIZE_MAX];
    u16 available_event;
};

struct virtio {
    /* The registers of MMIO, or PCI's common configuration. */
    u64 base;
    /* Of MMIO. */
    u32 gsi;
    u64 features;
    u32 type;
    /* The device-specific configuration. */
    u64 config;
    bool is_pci;
    /* Of PCI: where the doorbells, the MSI-X table and its control register are, the configuration registers in memory, and the
     * BAR. */
    u64 doorbells, msix_table, msix_control, function;
    u32 bar;
};

struct queue {
    struct virtio *device;
    u16 number, size;
    struct descriptor table[QUEUE_SIZE_MAX] __attribute__((aligned(4096)));
    struct available available __attribute__((aligned(4096)));
    struct used used __attribute__((aligned(4096)));
    /* The next used entry to check. */
    u16 seen;
};

/* Finds device number `nth` of this type, in address order. A machine has all its devices on one bus, either MMIO or PCI. */
bool virtio_find(u32 type, unsigned nth, struct virtio *device);

/* Reset, then up to FEATURES_OK with VERSION_1 and those `features` that are offered. Returns whether the device accepted them. */
bool virtio_start(struct virtio *device, u64 features);

/* Sets up queue `number` with `size` entries, or the device's maximum. Its memory is cleared. */
void queue_start(struct virtio *device, u16 number, u16 size, struct queue *queue);

/* DRIVER_OK. */
void virtio_ready(struct virtio *device);

u8 virtio_status(const struct virtio *device);

/* Single steps of the above, in any order and with any values: for guests that break the rules. */
void virtio_set_status(const struct virtio *device, u8 status);
u64 virtio_offered(const struct virtio *device);
void virtio_accept(const struct virtio *device, u64 features);
/* 0 if there is no such queue. */
u32 queue_size_max(const struct virtio *device, u16 number);
void queue_place(const struct virtio *device, u16 number, u32 size, u64 table, u64 available, u64 used);

/* On PCI: the doorbell of queue n is at offset 4 * n, in every machine of husk. */
enum { DOORBELL_BYTES = 4 };

static inline void virtio_ring(const struct virtio *device, u16 number)
{
    if (device->is_pci)
        write16(device->doorbells + DOORBELL_BYTES * number, number);
    else
        write32(device->base + REG_QUEUE_NOTIFY, number);
}

/* Makes the chain that starts at descriptor `head` available, without ringing the doorbell. */
void queue_offer(struct queue *queue, u16 head);

static inline void queue_ring(struct queue *queue) { virtio_ring(queue->device, queue->number); }

/* With the event index: rings the doorbell if the device requested that for an entry from `old` on. Returns whether it rang. */
bool queue_ring_if_asked(struct queue *queue, u16 old);

/* Delivers the queue's interrupts to this vCPU as `vector`; on PCI by the first entry of the MSI-X table. */
void queue_interrupts(const struct queue *queue, u8 vector);

/* Takes the next used entry if there is one. */
bool queue_take(struct queue *queue, struct used_entry *entry);

/* Polls for the next used entry; false if the device needs a reset instead. A timeout is a failure. */
bool queue_wait(struct queue *queue, struct used_entry *entry);

/* Where the driver says which used entry is to raise the next interrupt, and where the device says which available
 * entry is to ring the doorbell (§2.7.10). */
static inline volatile u16 *used_event(struct queue *queue) { return &queue->available.ring[queue->size]; }
static inline volatile u16 *available_event(struct queue *queue)
{
    return (volatile u16 *)&queue->used.ring[queue->size];
}

static inline void set_descriptor(struct queue *queue, u16 at, const volatile void *buffer, u32 len, u16 flags, u16 next)
{
    queue->table[at] = (struct descriptor){(u64)buffer, len, flags, next};
}
