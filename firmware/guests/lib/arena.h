/* What guests that break the rules have in common: the host looks at husk before and after each of them (tests/hostile). */
#pragma once

#include "virtio.h"

enum {
    /* Memory that a device may overwrite: 32 MiB, far from the guest itself. */
    ARENA = 16 << 20,
    ARENA_BYTES = 32 << 20,
    DEVICES_MAX = 32,
};

/* All virtio devices of the machine. */
extern struct virtio devices[DEVICES_MAX];
extern unsigned device_count;

/* Finds the devices, and seeds chance() from `seed=`. Prints "armed" and waits for the host's word. */
void arm(void);

/* Prints the word and waits for the host's. */
void say_and_wait(const char *word);

/* Checks that every device can be reset and started, and that the entropy device works. Prints "spent", and ends with exit code
 * 0 at the host's word. */
_Noreturn void spend(void);

/* How often to do something: `rounds=`, or this. */
u64 rounds(u64 otherwise);

/* A number below `bound`, the same sequence for the same seed. */
u64 chance(u64 bound);

/* A random element of an array. */
#define ONE_OF(array) ((array)[chance(sizeof(array) / sizeof *(array))])

/* An address: within the arena, at its pages or not; at or across the end of memory; in the device hole; beyond everything; or
 * where 64 bits end. */
u64 some_address(void);

/* A length that is usual, odd, or up to 4 GiB, but never between 1 MiB and 2 GiB. */
u32 some_len(void);

/* The end of memory. */
u64 memory_end(void);

/* Resets a device, restores its PCI registers, and starts it with `features` up to, but without, DRIVER_OK. */
void restart(struct virtio *device, u64 features);
