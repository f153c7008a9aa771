// The guest side of the memory tests: uses a requested amount of memory for a requested time. Static; nothing but libc.
//
// Serves PORT with one process per connection: reads a number of MiB and a newline, touches that much memory, replies
// `done`, and keeps the memory until the peer closes the connection. A process killed by the OOM killer does not reply.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    PORT = 1003,
    MIB = 1 << 20,
    PAGE_BYTES = 4096,
};

// Makes this process the OOM killer's first choice.
static void be_the_first_to_go(void)
{
    int fd = open("/proc/self/oom_score_adj", O_WRONLY);
    if (fd < 0 || write(fd, "1000", 4) != 4)
        _exit(1);
    close(fd);
}

static void serve(int fd)
{
    static const char done[] = "done\n";
    char line[32] = "";
    for (size_t len = 0; len < sizeof(line) - 1 && !strchr(line, '\n'); len++)
        if (read(fd, line + len, 1) != 1)
            _exit(1);
    size_t bytes = strtoul(line, NULL, 10) * MIB;
    be_the_first_to_go();
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        _exit(1);
    for (size_t at = 0; at < bytes; at += PAGE_BYTES)
        memory[at] = 1;
    if (write(fd, done, sizeof(done) - 1) != sizeof(done) - 1)
        _exit(1);
    while (read(fd, line, 1) > 0)
        ;
    _exit(0);
}

int main(void)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = PORT};
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 8) < 0) {
        perror("memory");
        return 1;
    }
    signal(SIGCHLD, SIG_IGN);
    puts("serving=memory");
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd >= 0 && fork() == 0)
            serve(fd);
        close(fd);
    }
}
