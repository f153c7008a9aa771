/* The ways in which a machine ends, or does not, selected by `do=`. */
#include "cpu.h"
#include "guest.h"

enum { EVENT_GSI = 5, EVENT_VECTOR = 0x40, GENERATION_GSI = 3, GENERATION_VECTOR = 0x41, GENERATION_ADDRESS = 0xff000 };

static u64 generation[2];

/* The power button, reported by the generic event device's interrupt. */
static void on_event(struct interrupt_frame *frame)
{
    (void)frame;
    end_of_interrupt();
    print("power button\n");
    power_off();
}

/* The machine was restored, and shares its past with others. */
static void on_generation(struct interrupt_frame *frame)
{
    (void)frame;
    end_of_interrupt();
    u64 now[2] = {read64(GENERATION_ADDRESS), read64(GENERATION_ADDRESS + 8)};
    print(now[0] != generation[0] && now[1] != generation[1] ? "another generation\n" : "the same generation\n");
    generation[0] = now[0];
    generation[1] = now[1];
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
        generation[0] = read64(GENERATION_ADDRESS);
        generation[1] = read64(GENERATION_ADDRESS + 8);
        CHECK(generation[0] && generation[1]);
        handle(GENERATION_VECTOR, on_generation);
        route(GENERATION_GSI, GENERATION_VECTOR);
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
