/* The ways in which a machine ends, or does not, selected by `do=`. */
#include "cpu.h"
#include "guest.h"

enum { EVENT_GSI = 5, EVENT_VECTOR = 0x40 };

/* The power button, reported by the generic event device's interrupt. */
static void on_event(struct interrupt_frame *frame)
{
    (void)frame;
    end_of_interrupt();
    print("power button\n");
    power_off();
}

static void triple_fault(void)
{
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) empty = {0, 0};
    asm volatile("lidt %0; ud2" ::"m"(empty));
}

int guest_main(void)
{
    if (told_to("exit"))
        return argument_number("code", EXIT_OK);
    print("ready\n");
    if (told_to("poweroff"))
        power_off();
    if (told_to("reset"))
        out8(PORT_RESET, 1);
    if (told_to("keyboard-reset"))
        out8(PORT_I8042_COMMAND, 0xfe);
    if (told_to("panic"))
        out8(PORT_PVPANIC, 1);
    if (told_to("triple-fault"))
        triple_fault();
    if (told_to("wild-jump"))
        /* There is no memory to execute: KVM fails on the instruction. */
        ((void (*)(void))0xd8000000)();
    if (told_to("mark")) {
        out8(PORT_MARKER, argument_number("marker", 1));
        return EXIT_OK;
    }
    if (told_to("spin"))
        for (;;)
            asm volatile("");
    if (told_to("halt"))
        stop();
    if (told_to("wait-for-button")) {
        interrupts_start();
        handle(EVENT_VECTOR, on_event);
        route(EVENT_GSI, EVENT_VECTOR);
        print("listening\n");
        for (;;)
            wait_for_interrupt();
    }
    /* The machine may take a moment to act on a reset. */
    if (told_to("reset") || told_to("keyboard-reset") || told_to("panic"))
        stop();
    print("do= is unknown\n");
    return EXIT_BAD_COMMAND_LINE;
}
