/* Starts `cpus=` vCPUs one after another; each reports its ID and counts. */
#include "cpu.h"
#include "guest.h"

enum { ROUNDS = 1000 };

static volatile u32 counted, apic_id, extended_apic_id;

static void count(void)
{
    for (unsigned i = 0; i < ROUNDS; i++)
        asm volatile("lock incl %0" : "+m"(counted));
    apic_id = cpuid(1, 0).ebx >> 24;
    struct cpuid topology = cpuid(0xb, 0);
    extended_apic_id = topology.ebx ? topology.edx : apic_id;
    asm volatile("lock incl %0" : "+m"(counted));
}

int guest_main(void)
{
    unsigned cpus = argument_number("cpus", 2);
    interrupts_start();
    /* The guest has none of its own: the host's interrupt it, so that the other vCPUs run while it waits (scripts/test). */
    asm volatile("sti");
    print("first processor %u\n", (u64)(cpuid(1, 0).ebx >> 24));
    for (unsigned cpu = 1; cpu < cpus; cpu++) {
        counted = 0;
        u64 start = rdtsc();
        start_processor(cpu, count);
        while (counted < ROUNDS + 1)
            CHECK(!waited_too_long(start));
        CHECK(apic_id == cpu && extended_apic_id == cpu);
        print("processor %u counted\n", (u64)cpu);
    }
    print("logical processors %u\n", (u64)(cpuid(1, 0).ebx >> 16 & 0xff));
    return EXIT_OK;
}
