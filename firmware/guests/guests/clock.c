/* Time: kvm-clock, the APIC timer with TSC deadline, and endless reports of pauses, selected by `do=`. `do=gaps` first writes to
 * `mib=` MiB of memory, and reports for how long it did not run. */
#include "cpu.h"
#include "guest.h"

enum {
    TIMER_VECTOR = 0x40,
    MSR_TSC_DEADLINE = 0x6e0,
    TIMER_DEADLINE_MODE = 2 << 17,
    DIVIDE_BY_1 = 0xb,
};

enum {
    /* Memory that is not the guest's own. */
    CONTENT = 32 << 20,
    PAGE = 4096,
    GAP_NS = 1000000,
};

static volatile unsigned fired;

static void on_timer(struct interrupt_frame *frame)
{
    (void)frame;
    fired++;
    end_of_interrupt();
}

_Noreturn static void gaps(void)
{
    u64 end = CONTENT + (argument_number("mib", 0) << 20);
    for (u64 page = CONTENT; page < end; page += PAGE)
        write64(page, page + 1);
    print("watching\n");
    for (u64 last = clock_ns();;) {
        u64 now = clock_ns();
        if (now - last > GAP_NS) {
            print("gap %u us\n", (now - last) / 1000);
            now = clock_ns();
        }
        last = now;
    }
}

int guest_main(void)
{
    if (told_to("gaps")) {
        if (!clock_start())
            return EXIT_MISSING;
        gaps();
    }
    if (told_to("kvm-clock")) {
        if (!clock_start())
            return EXIT_MISSING;
        u64 last = clock_ns();
        for (unsigned i = 0; i < 1000; i++) {
            u64 now = clock_ns();
            CHECK(now >= last);
            last = now;
        }
        print("clock %u ns\n", last);
        return EXIT_OK;
    }
    if (told_to("pauses")) {
        if (!clock_start())
            return EXIT_MISSING;
        print("watching\n");
        for (;;)
            if (clock_was_stopped())
                print("paused\n");
    }
    bool deadline = told_to("deadline-timer");
    if (!deadline && !told_to("apic-timer"))
        return EXIT_BAD_COMMAND_LINE;
    if (deadline && !(cpuid(1, 0).ecx & 1 << 24))
        return EXIT_MISSING;
    interrupts_start();
    handle(TIMER_VECTOR, on_timer);
    write32(LAPIC + LAPIC_TIMER_DIVIDE, DIVIDE_BY_1);
    write32(LAPIC + LAPIC_TIMER, TIMER_VECTOR | (deadline ? TIMER_DEADLINE_MODE : 0));
    for (unsigned i = 0; i < 10; i++) {
        u64 at = rdtsc() + 1000000;
        if (deadline)
            asm volatile("wrmsr" ::"c"(MSR_TSC_DEADLINE), "a"((u32)at), "d"((u32)(at >> 32)) : "memory");
        else
            write32(LAPIC + LAPIC_TIMER_COUNT, 1000000);
        while (fired == i)
            wait_for_interrupt();
        CHECK(!deadline || rdtsc() >= at);
    }
    print("timer fired %u times\n", (u64)fired);
    return EXIT_OK;
}
