/* A network device with which the guest answers numbered UDP datagrams of the host: a stream in which the host sends the next one
 * when it has the answer, and the same again when there is none for a while, since networks lose datagrams. */
#pragma once

#include "virtio.h"

enum { DATAGRAMS_PORT = 4000 };

/* Starts the device, whose receive queue interrupts this vCPU with `vector`. Returns false if the machine has none. */
bool datagrams_start(u8 vector);

/* For the interrupt's handler: takes what has arrived and answers it. A number must be the one after the last, or the last one
 * again. */
void datagrams_take(void);

/* The last number. */
u64 datagrams_count(void);
