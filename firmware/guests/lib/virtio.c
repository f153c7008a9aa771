/* The virtio driver: see virtio.h. */
#include "virtio.h"

#include "cpu.h"
#include "pci.h"

enum {
    /* PCI's common configuration (§4.1.4.3). */
    COMMON_DEVICE_FEATURE_SELECT = 0x00,
    COMMON_DEVICE_FEATURE = 0x04,
    COMMON_DRIVER_FEATURE_SELECT = 0x08,
    COMMON_DRIVER_FEATURE = 0x0c,
    COMMON_STATUS = 0x14,
    COMMON_QUEUE_SELECT = 0x16,
    COMMON_QUEUE_SIZE = 0x18,
    COMMON_QUEUE_VECTOR = 0x1a,
    COMMON_QUEUE_ENABLE = 0x1c,
    COMMON_QUEUE_DESC = 0x20,
    COMMON_QUEUE_DRIVER = 0x28,
    COMMON_QUEUE_DEVICE = 0x30,
    /* Capabilities of virtio (§4.1.4). */
    CAPABILITY_VENDOR = 0x09,
    CAPABILITY_MSIX = 0x11,
    CAPABILITY_COMMON = 1,
    CAPABILITY_NOTIFY = 2,
    CAPABILITY_DEVICE = 4,
    MSIX_CONTROL = 2,
    MSIX_ENABLE = 1 << 15,
};

static bool find_mmio(unsigned slot, struct virtio *device)
{
    u64 base = VIRTIO_MMIO_BASE + (u64)slot * VIRTIO_MMIO_STRIDE;
    if (read32(base) != VIRTIO_MAGIC)
        return false;
    CHECK(read32(base + REG_VERSION) == 2);
    *device = (struct virtio){.base = base, .gsi = VIRTIO_FIRST_GSI + slot, .type = read32(base + REG_DEVICE_ID),
                              .config = base + REG_CONFIG};
    /* Without one, it is a place for a device that there is not (§4.2.3.1.1). */
    return device->type != 0;
}

static bool find_pci(unsigned slot, struct virtio *device)
{
    u64 function = pci_function(slot);
    if (read16(function) != PCI_VENDOR_VIRTIO)
        return false;
    u32 bar = read32(function + PCI_BAR0);
    *device = (struct virtio){.type = read16(function + PCI_DEVICE_ID) - PCI_DEVICE_VIRTIO, .is_pci = true,
                              .function = function, .bar = bar};
    for (u8 at = read8(function + PCI_CAPABILITIES); at; at = read8(function + at + 1)) {
        u8 id = read8(function + at), kind = read8(function + at + 3);
        u64 place = bar + read32(function + at + (id == CAPABILITY_MSIX ? 4 : 8));
        if (id == CAPABILITY_MSIX) {
            device->msix_table = place;
            device->msix_control = function + at + MSIX_CONTROL;
        } else if (id == CAPABILITY_VENDOR && kind == CAPABILITY_COMMON)
            device->base = place;
        else if (id == CAPABILITY_VENDOR && kind == CAPABILITY_NOTIFY)
            device->doorbells = place;
        else if (id == CAPABILITY_VENDOR && kind == CAPABILITY_DEVICE)
            device->config = place;
    }
    CHECK(device->base && device->doorbells && device->msix_table);
    return true;
}

bool virtio_find(u32 type, unsigned nth, struct virtio *device)
{
    /* The host bridge, without which the bus reads as all-ones. */
    bool is_pci = read32(pci_function(0)) != 0xffffffff;
    for (unsigned slot = is_pci ? 1 : 0; slot < (is_pci ? PCI_SLOTS : VIRTIO_SLOTS); slot++) {
        struct virtio found;
        if (!(is_pci ? find_pci(slot, &found) : find_mmio(slot, &found)))
            continue;
        if ((type == VIRTIO_ANY || found.type == type) && nth-- == 0) {
            *device = found;
            return true;
        }
    }
    return false;
}

void virtio_set_status(const struct virtio *device, u8 status)
{
    if (device->is_pci)
        write8(device->base + COMMON_STATUS, status);
    else
        write32(device->base + REG_STATUS, status);
}

u8 virtio_status(const struct virtio *device)
{
    return device->is_pci ? read8(device->base + COMMON_STATUS) : read32(device->base + REG_STATUS);
}

u64 virtio_offered(const struct virtio *device)
{
    u64 select = device->base + (device->is_pci ? COMMON_DEVICE_FEATURE_SELECT : REG_DEVICE_FEATURES_SEL);
    u64 features = device->base + (device->is_pci ? COMMON_DEVICE_FEATURE : REG_DEVICE_FEATURES);
    u64 offered = 0;
    for (u32 half = 0; half < 2; half++) {
        write32(select, half);
        offered |= (u64)read32(features) << 32 * half;
    }
    return offered;
}

void virtio_accept(const struct virtio *device, u64 accepted)
{
    u64 select = device->base + (device->is_pci ? COMMON_DRIVER_FEATURE_SELECT : REG_DRIVER_FEATURES_SEL);
    u64 features = device->base + (device->is_pci ? COMMON_DRIVER_FEATURE : REG_DRIVER_FEATURES);
    for (u32 half = 0; half < 2; half++) {
        write32(select, half);
        write32(features, accepted >> 32 * half);
    }
}

bool virtio_start(struct virtio *device, u64 features)
{
    virtio_set_status(device, 0);
    u64 start = rdtsc();
    while (virtio_status(device) != 0)
        CHECK(!waited_too_long(start));
    virtio_set_status(device, STATUS_ACKNOWLEDGE);
    virtio_set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    device->features = virtio_offered(device) & (features | FEATURE(F_VERSION_1));
    virtio_accept(device, device->features);
    virtio_set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    return virtio_status(device) & STATUS_FEATURES_OK;
}

static void select_queue(const struct virtio *device, u16 number)
{
    if (device->is_pci)
        write16(device->base + COMMON_QUEUE_SELECT, number);
    else
        write32(device->base + REG_QUEUE_SEL, number);
}

u32 queue_size_max(const struct virtio *device, u16 number)
{
    select_queue(device, number);
    return device->is_pci ? read16(device->base + COMMON_QUEUE_SIZE) : read32(device->base + REG_QUEUE_NUM_MAX);
}

static void write_address(u64 at, u64 address)
{
    write32(at, address);
    write32(at + 4, address >> 32);
}

void queue_place(const struct virtio *device, u16 number, u32 size, u64 table, u64 available, u64 used)
{
    u64 base = device->base;
    select_queue(device, number);
    if (device->is_pci)
        write16(base + COMMON_QUEUE_SIZE, size);
    else
        write32(base + REG_QUEUE_NUM, size);
    write_address(base + (device->is_pci ? COMMON_QUEUE_DESC : REG_QUEUE_DESC), table);
    write_address(base + (device->is_pci ? COMMON_QUEUE_DRIVER : REG_QUEUE_DRIVER), available);
    write_address(base + (device->is_pci ? COMMON_QUEUE_DEVICE : REG_QUEUE_DEVICE), used);
    if (device->is_pci)
        write16(base + COMMON_QUEUE_ENABLE, 1);
    else
        write32(base + REG_QUEUE_READY, 1);
}

void queue_start(struct virtio *device, u16 number, u16 size, struct queue *queue)
{
    memset(queue, 0, sizeof *queue);
    u32 max = queue_size_max(device, number);
    CHECK(max > 0);
    queue->device = device;
    queue->number = number;
    queue->size = size < max ? size : max;
    queue_place(device, number, queue->size, (u64)queue->table, (u64)&queue->available, (u64)&queue->used);
    u64 ready = device->base + (device->is_pci ? COMMON_QUEUE_ENABLE : REG_QUEUE_READY);
    CHECK((device->is_pci ? read16(ready) : read32(ready)) == 1);
}

void virtio_ready(struct virtio *device)
{
    virtio_set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
}

void queue_offer(struct queue *queue, u16 head)
{
    u16 index = queue->available.index;
    queue->available.ring[index % queue->size] = head;
    asm volatile("" ::: "memory");
    queue->available.index = index + 1;
}

bool queue_ring_if_asked(struct queue *queue, u16 old)
{
    barrier();
    u16 new = queue->available.index, event = *available_event(queue);
    bool asked = (u16)(new - event - 1) < (u16)(new - old);
    if (asked)
        queue_ring(queue);
    return asked;
}

void queue_interrupts(const struct queue *queue, u8 vector)
{
    const struct virtio *device = queue->device;
    if (!device->is_pci) {
        route(device->gsi, vector);
        return;
    }
    write64(device->msix_table, LAPIC | (read32(LAPIC + LAPIC_ID) >> 24) << 12);
    write32(device->msix_table + 8, vector);
    write32(device->msix_table + 12, 0);
    write16(device->msix_control, MSIX_ENABLE);
    select_queue(device, queue->number);
    write16(device->base + COMMON_QUEUE_VECTOR, 0);
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
