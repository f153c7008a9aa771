/* Startup code and helpers: the command line, the memory map, the console and exits. */
#include "guest.h"

#include <stdarg.h>

#include "cpu.h"

enum {
    /* Offsets in the zero page (zero-page.rst). */
    ZERO_PAGE_EXT_COMMAND_LINE = 0x0c8,
    ZERO_PAGE_E820_COUNT = 0x1e8,
    ZERO_PAGE_RAMDISK = 0x218,
    ZERO_PAGE_RAMDISK_BYTES = 0x21c,
    ZERO_PAGE_COMMAND_LINE = 0x228,
    ZERO_PAGE_E820_TABLE = 0x2d0,
    ARGUMENT_MAX = 64,
    /* SLP_EN | SLP_TYP 5 (ACPI 6.5 §4.8.3.7). */
    SLEEP_CONTROL_S5 = 1 << 5 | 5 << 2,
};

static const u8 *zero_page;
static const char *command_line;

void guest_start(const u8 *boot_parameters)
{
    zero_page = boot_parameters;
    command_line = (const char *)((u64)read32((u64)zero_page + ZERO_PAGE_COMMAND_LINE) |
                                  (u64)read32((u64)zero_page + ZERO_PAGE_EXT_COMMAND_LINE) << 32);
    cpu_start();
    exit_with(guest_main());
}

static void print_number(u64 value, unsigned base)
{
    char digits[20];
    unsigned count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (count)
        out8(PORT_SERIAL, digits[--count]);
}

static void print_text(const char *text)
{
    while (*text)
        out8(PORT_SERIAL, *text++);
}

void print(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    for (; *format; format++) {
        if (*format != '%') {
            out8(PORT_SERIAL, *format);
            continue;
        }
        switch (*++format) {
        case 's': print_text(va_arg(values, const char *)); break;
        case 'c': out8(PORT_SERIAL, va_arg(values, int)); break;
        case 'u': print_number(va_arg(values, u64), 10); break;
        case 'x': print_number(va_arg(values, u64), 16); break;
        }
    }
    va_end(values);
}

_Noreturn void stop(void)
{
    for (;;)
        asm volatile("cli; hlt");
}

_Noreturn void exit_with(u8 code)
{
    out8(PORT_EXIT, code);
    /* HLT is not allowed at CPL 3. */
    for (;;)
        asm volatile("pause");
}

_Noreturn void power_off(void)
{
    out8(PORT_SLEEP_CONTROL, SLEEP_CONTROL_S5);
    stop();
}

_Noreturn void check_failed(const char *file, unsigned line, const char *claim)
{
    print("%s:%u: %s does not hold\n", file, (u64)line, claim);
    exit_with(EXIT_CHECK_FAILED);
}

const char *whole_command_line(void) { return command_line; }

const char *initial_ram_disk(unsigned *len)
{
    *len = read32((u64)zero_page + ZERO_PAGE_RAMDISK_BYTES);
    return (const char *)(u64)read32((u64)zero_page + ZERO_PAGE_RAMDISK);
}

const char *argument(const char *name)
{
    static char value[ARGUMENT_MAX];
    const char *found = NULL;
    for (const char *word = command_line; *word;) {
        const char *at = word, *expected = name;
        while (*expected && *at == *expected)
            at++, expected++;
        if (!*expected && *at == '=')
            found = at + 1;
        while (*word && *word != ' ')
            word++;
        while (*word == ' ')
            word++;
    }
    if (!found)
        return NULL;
    unsigned len = 0;
    for (; found[len] && found[len] != ' ' && len < ARGUMENT_MAX - 1; len++)
        value[len] = found[len];
    value[len] = 0;
    return value;
}

u64 argument_number(const char *name, u64 otherwise)
{
    const char *digits = argument(name);
    if (!digits)
        return otherwise;
    u64 value = 0;
    for (; *digits >= '0' && *digits <= '9'; digits++)
        value = value * 10 + (*digits - '0');
    if (*digits) {
        print("%s= wants a number\n", name);
        exit_with(EXIT_BAD_COMMAND_LINE);
    }
    return value;
}

bool told_to(const char *what)
{
    const char *told = argument("do");
    return told && same_text(told, what);
}

bool same_text(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

void *memset(void *to, int value, size_t len)
{
    void *at = to;
    asm volatile("rep stosb" : "+D"(at), "+c"(len) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t len)
{
    void *at = to;
    asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(len)::"memory");
    return to;
}

const struct e820_entry *memory_map(unsigned *count)
{
    *count = read8((u64)zero_page + ZERO_PAGE_E820_COUNT);
    return (const struct e820_entry *)(zero_page + ZERO_PAGE_E820_TABLE);
}
