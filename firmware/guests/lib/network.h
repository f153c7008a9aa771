/* A driver of a network device that knows one question: who has 10.9.0.1? The host of tests/hostile does. */
#pragma once

#include "arena.h"

enum {
    RX = 0,
    TX = 1,
    RX_RING = 64,
    TX_RING = 256,
    HEADER = 12,
    RX_BUFFER = 2048,
    RX_AREA = ARENA,
    TX_AREA = ARENA + (16 << 20),
};

struct network {
    struct virtio device;
    struct queue rx, tx;
    /* Received so far. */
    unsigned answers;
};

/* Up to DRIVER_OK, with the device started but without buffers. */
void network_start_queues(struct network *network);

/* Makes the whole receive ring available. */
void network_offer_buffers(struct network *network);

/* Both after a reset, with these features. */
void network_start(struct network *network, u64 features);

/* Takes the device's frames, counts answers, and returns the buffers. */
void network_take(struct network *network);

/* Sends the chain at descriptor 0. False if the device needs a reset. */
bool network_send_chain(struct network *network);

/* Writes the question to TX_AREA, with its header. Returns the length of both. */
u32 network_write_question(struct network *network);

/* Sends the question. False if the device needs a reset. */
bool network_ask(struct network *network);

/* Asks until there is an answer, and fails without one: started with these features, the network is as good as ever. */
void network_check(struct network *network, u64 features);
