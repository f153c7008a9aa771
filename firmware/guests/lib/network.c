/* A driver of a network device: see network.h. */
#include "network.h"

#include "cpu.h"

enum {
    ARP_FRAME = 42,
    ARP = 0x0608,
    ARP_REPLY = 0x0200,
};

struct ethernet {
    u8 to[6], from[6];
    u16 type;
} __attribute__((packed));

/* Of Ethernet and IPv4 (RFC 826). */
struct arp {
    struct ethernet ethernet;
    u16 hardware, protocol;
    u8 hardware_len, protocol_len;
    u16 operation;
    u8 from[6], from_ip[4], to[6], to_ip[4];
} __attribute__((packed));

void network_offer_buffers(struct network *network)
{
    struct queue *rx = &network->rx;
    for (unsigned i = 0; i < rx->size; i++) {
        set_descriptor(rx, i, (u8 *)RX_AREA + i * RX_BUFFER, RX_BUFFER, DESC_WRITE, 0);
        queue_offer(rx, i);
    }
    queue_ring(rx);
}

void network_start_queues(struct network *network)
{
    queue_start(&network->device, RX, RX_RING, &network->rx);
    queue_start(&network->device, TX, TX_RING, &network->tx);
    virtio_ready(&network->device);
}

void network_start(struct network *network, u64 features)
{
    restart(&network->device, features);
    network_start_queues(network);
    network_offer_buffers(network);
}

void network_take(struct network *network)
{
    struct queue *rx = &network->rx;
    struct used_entry entry;
    bool any = false;
    while (queue_take(rx, &entry)) {
        CHECK(entry.id < rx->size && entry.len <= RX_BUFFER);
        struct arp *arp = (void *)((u8 *)RX_AREA + entry.id * RX_BUFFER + HEADER);
        network->answers += entry.len >= HEADER + ARP_FRAME && arp->ethernet.type == ARP && arp->operation == ARP_REPLY;
        queue_offer(rx, entry.id);
        any = true;
    }
    if (any)
        queue_ring(rx);
}

bool network_send_chain(struct network *network)
{
    struct used_entry entry;
    queue_offer(&network->tx, 0);
    queue_ring(&network->tx);
    if (!queue_wait(&network->tx, &entry))
        return false;
    CHECK(entry.id == 0 && entry.len == 0);
    return true;
}

u32 network_write_question(struct network *network)
{
    struct arp arp = {.ethernet = {.type = ARP}, .hardware = 0x0100, .protocol = 0x0008, .hardware_len = 6, .protocol_len = 4,
                      .operation = 0x0100, .from_ip = {10, 9, 0, 2}, .to_ip = {10, 9, 0, 1}};
    memset(arp.ethernet.to, 0xff, 6);
    for (unsigned i = 0; i < 6; i++)
        arp.from[i] = arp.ethernet.from[i] = read8(network->device.config + i);
    memset((void *)TX_AREA, 0, HEADER);
    memcpy((u8 *)TX_AREA + HEADER, &arp, sizeof arp);
    return HEADER + sizeof arp;
}

bool network_ask(struct network *network)
{
    set_descriptor(&network->tx, 0, (void *)TX_AREA, network_write_question(network), 0, 0);
    return network_send_chain(network);
}

void network_check(struct network *network, u64 features)
{
    network_start(network, features);
    unsigned before = network->answers;
    u64 begun = rdtsc();
    for (u64 asked = 0; network_take(network), network->answers == before;) {
        CHECK(!waited_too_long(begun));
        /* What is lost is asked again. */
        if (rdtsc() - asked > 1 << 28) {
            CHECK(network_ask(network));
            asked = rdtsc();
        }
    }
}
