/* Helpers shared by all guests: ports and memory, the serial console, the command line, and exits. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum {
    PORT_I8042_COMMAND = 0x64,
    PORT_SERIAL = 0x3f8,
    PORT_PVPANIC = 0x505,
    PORT_SLEEP_CONTROL = 0x600,
    PORT_RESET = 0x602,
    PORT_MARKER = 0x603,
    PORT_EXIT = 0x604,
    /* No device answers here. */
    PORT_HOLE = 0x2f0,
};

enum {
    EXIT_OK = 0,
    EXIT_CHECK_FAILED = 90,
    EXIT_EXCEPTION = 91,
    EXIT_BAD_COMMAND_LINE = 92,
    /* The machine lacks something the guest requires: a device, or a clock. */
    EXIT_MISSING = 93,
};

static inline void out8(u16 port, u8 value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
static inline void out16(u16 port, u16 value) { asm volatile("outw %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
static inline void out32(u16 port, u32 value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory"); }

static inline u8 in8(u16 port)
{
    u8 value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline u16 in16(u16 port)
{
    u16 value;
    asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline u32 in32(u16 port)
{
    u32 value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

/* Device memory: one access of exactly this width, at exactly this place in the program. */
#define MMIO(bits)                                                                                                     \
    static inline u##bits read##bits(u64 address)                                                                      \
    {                                                                                                                  \
        u##bits value;                                                                                                 \
        asm volatile("mov %1, %0" : "=r"(value) : "m"(*(volatile u##bits *)address) : "memory");                       \
        return value;                                                                                                  \
    }                                                                                                                  \
    static inline void write##bits(u64 address, u##bits value)                                                         \
    {                                                                                                                  \
        asm volatile("mov %1, %0" : "=m"(*(volatile u##bits *)address) : "r"(value) : "memory");                       \
    }
MMIO(8)
MMIO(16)
MMIO(32)
MMIO(64)
#undef MMIO

static inline u64 rdtsc(void)
{
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}

static inline void barrier(void) { asm volatile("mfence" ::: "memory"); }

/* The guest's main function, which returns its exit code. */
int guest_main(void);

/* Formats %s, %c, %u (u64) and %x (u64) onto the serial port. */
void print(const char *format, ...);

/* Ends husk with this exit code. */
_Noreturn void exit_with(u8 code);

/* ACPI S5 through the sleep control register. */
_Noreturn void power_off(void);

/* Hangs with interrupts disabled. */
_Noreturn void stop(void);

const char *whole_command_line(void);

/* The initramfs, below 4 GiB, and its length in bytes; 0 if there is none. */
const char *initial_ram_disk(unsigned *len);

/* The text after the last `name=` on the command line, up to the next blank, or NULL. The result is valid until the next
 * call. */
const char *argument(const char *name);
u64 argument_number(const char *name, u64 otherwise);

/* Whether the command line contains `do=what`. */
bool told_to(const char *what);

bool same_text(const char *a, const char *b);
void *memset(void *to, int value, size_t len);
void *memcpy(void *to, const void *from, size_t len);

struct e820_entry {
    u64 base;
    u64 len;
    u32 type;
} __attribute__((packed));
enum { E820_RAM = 1 };

/* The memory map of the zero page. */
const struct e820_entry *memory_map(unsigned *count);

/* Checks a condition: if it is false, the guest reports it and ends. */
#define CHECK(claim)                                                                                                   \
    do {                                                                                                               \
        if (!(claim))                                                                                                  \
            check_failed(__FILE__, __LINE__, #claim);                                                                  \
    } while (0)
_Noreturn void check_failed(const char *file, unsigned line, const char *claim);
