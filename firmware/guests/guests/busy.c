/* Starts `cpus=` vCPUs, reports it, and keeps all of them busy forever. */
#include "cpu.h"
#include "guest.h"

static volatile u32 started;

static void spin(void)
{
    asm volatile("lock incl %0" : "+m"(started));
    for (;;)
        asm volatile("" ::: "memory");
}

int guest_main(void)
{
    unsigned cpus = argument_number("cpus", 2);
    interrupts_start();
    for (unsigned cpu = 1; cpu < cpus; cpu++) {
        u64 start = rdtsc();
        start_processor(cpu, spin);
        while (started < cpu)
            CHECK(!waited_too_long(start));
    }
    print("busy\n");
    spin();
    return EXIT_OK;
}
