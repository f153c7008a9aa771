/* Prints what the boot loader has provided: the command line, and the initramfs as text. */
#include "guest.h"

int guest_main(void)
{
    print("command line: %s\n", whole_command_line());
    unsigned len;
    const char *text = initial_ram_disk(&len);
    print("initial RAM disk: ");
    for (unsigned i = 0; i < len; i++)
        print("%c", text[i]);
    print("\n");
    return EXIT_OK;
}
