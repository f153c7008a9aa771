/* The serial console: `do=flood` (`bytes=`), `do=prompt`, `do=echo` up to an EOT (`wait=poll`, `wait=interrupt`, or
 * `wait=bare`: polling with interrupts enabled, and no controller configured to deliver any). */
#include "cpu.h"
#include "guest.h"

enum {
    /* 16550 registers, from PORT_SERIAL. */
    INTERRUPT_ENABLE = 1,
    MODEM_CONTROL = 4,
    LINE_STATUS = 5,
    DATA_READY = 1,
    SERIAL_GSI = 4,
    SERIAL_VECTOR = 0x40,
    EOT = 4,
    LINE = 64,
};

static volatile bool ended;
static volatile u64 received;

static void take_input(void)
{
    while (!ended && in8(PORT_SERIAL + LINE_STATUS) & DATA_READY) {
        u8 byte = in8(PORT_SERIAL);
        if (byte == EOT) {
            ended = true;
            return;
        }
        received++;
        out8(PORT_SERIAL, byte);
    }
}

static void on_serial(struct interrupt_frame *frame)
{
    (void)frame;
    take_input();
    end_of_interrupt();
}

static void flood(u64 bytes)
{
    char line[LINE];
    for (unsigned i = 0; i < LINE - 1; i++)
        line[i] = '!' + i;
    line[LINE - 1] = '\n';
    while (bytes) {
        u64 count = bytes < LINE ? bytes : LINE;
        const char *from = line;
        bytes -= count;
        asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(PORT_SERIAL) : "memory");
    }
}

int guest_main(void)
{
    if (told_to("flood")) {
        flood(argument_number("bytes", 1 << 20));
        return EXIT_OK;
    }
    if (told_to("prompt")) {
        print("login: ");
        stop();
    }
    const char *wait = argument("wait");
    if (!wait)
        return EXIT_BAD_COMMAND_LINE;
    bool by_interrupt = same_text(wait, "interrupt"), bare = same_text(wait, "bare");
    if (!told_to("echo"))
        return EXIT_BAD_COMMAND_LINE;
    if (by_interrupt) {
        interrupts_start();
        handle(SERIAL_VECTOR, on_serial);
        route(SERIAL_GSI, SERIAL_VECTOR);
    }
    /* DTR, RTS and OUT2, which enables the interrupt: otherwise the port receives no input, polled or not. */
    out8(PORT_SERIAL + MODEM_CONTROL, 0x0b);
    out8(PORT_SERIAL + INTERRUPT_ENABLE, 1);
    print("ready\n");
    if (bare)
        asm volatile("sti");
    while (!ended)
        if (by_interrupt)
            wait_for_interrupt();
        else
            take_input();
    print("\nreceived %u bytes\n", received);
    return EXIT_OK;
}
