/* Touches both ends of every range in the memory map, and prints the total size. */
#include "cpu.h"
#include "guest.h"

/* The guest is loaded at 2 MiB; memory up to the next boundary is not touched. */
enum { FIRST_FREE = 0x400000 };

static u64 mark(u64 address) { return ~address * 0x9e3779b97f4a7c15; }

int guest_main(void)
{
    unsigned count;
    const struct e820_entry *map = memory_map(&count);
    u64 total = 0, end = 0;
    for (unsigned i = 0; i < count; i++) {
        print("%s %x %x\n", map[i].type == E820_RAM ? "ram" : "reserved", map[i].base, map[i].len);
        if (map[i].type != E820_RAM)
            continue;
        total += map[i].len;
        if (map[i].base + map[i].len > end)
            end = map[i].base + map[i].len;
    }
    map_memory(end <= 4ull << 30 ? 4 : (end + (1 << 30) - 1) >> 30);
    /* All marks are written before the first is read, so that aliased memory is detected. */
    for (int reading = 0; reading < 2; reading++)
        for (unsigned i = 0; i < count; i++) {
            u64 first = map[i].base < FIRST_FREE ? FIRST_FREE : map[i].base, last = map[i].base + map[i].len - 8;
            if (map[i].type != E820_RAM || last < first)
                continue;
            u64 addresses[] = {first, (first + (last - first) / 2) & ~7ull, last};
            for (unsigned j = 0; j < 3; j++)
                if (reading)
                    CHECK(read64(addresses[j]) == mark(addresses[j]));
                else
                    write64(addresses[j], mark(addresses[j]));
        }
    print("memory %u KiB, end %x\n", total >> 10, end);
    return EXIT_OK;
}
