// The guest side of the vsock tests, using plain AF_VSOCK sockets. Static; nothing but libc.
//
//   vsock serve               serves three ports: ECHO echoes all data, HALF receives to the end of the stream and then
//                             replies with the number of bytes, STOP ends the program
//   vsock call PORT MIB       sends MIB MiB to the host's PORT, shuts down that direction, and prints the number of
//                             bytes received
//   vsock many PORT COUNT     opens COUNT connections to the host's PORT, each of which must echo a different number
//   vsock refused PORT        prints the error of connecting to the host's PORT
#define _GNU_SOURCE
#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    ECHO = 1000, // the ports of `vsock serve`
    HALF = 1001,
    STOP = 1002,
    PIECE_BYTES = 64 << 10,
};

static char piece[PIECE_BYTES];

static void fail(const char *what)
{
    printf("failed=%s: %s\n", what, strerror(errno));
    exit(1);
}

static int stream(void)
{
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0)
        fail("socket");
    return fd;
}

static int call_host(unsigned port)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
    int fd = stream();
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0)
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

static int listen_at(unsigned port)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = stream();
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 128) < 0)
        fail("listen");
    return fd;
}

static void write_all(int fd, const char *bytes, size_t count)
{
    while (count) {
        ssize_t done = write(fd, bytes, count);
        if (done < 0)
            fail("write");
        bytes += done;
        count -= done;
    }
}

// Creates block `index` of the data: it starts with its index, and each other word depends on its position, so that
// reordered data is detected.
static void make_piece(char *bytes, uint64_t index)
{
    for (uint64_t at = 0; at < PIECE_BYTES; at += 8) {
        uint64_t word = at ? at * 0x9e3779b97f4a7c15u : index;
        memcpy(bytes + at, &word, 8);
    }
}

// Receives all data. Returns its length, or -1 if it is not as expected.
static long long take_all(int fd)
{
    static char expected[PIECE_BYTES];
    long long total = 0;
    for (ssize_t got; (got = read(fd, piece, PIECE_BYTES - total % PIECE_BYTES)) != 0; total += got) {
        if (got < 0)
            fail("read");
        if (total % PIECE_BYTES == 0)
            make_piece(expected, total / PIECE_BYTES);
        if (memcmp(piece, expected + total % PIECE_BYTES, got))
            return -1;
    }
    return total;
}

static void echo(int fd)
{
    for (ssize_t got; (got = read(fd, piece, sizeof(piece))) > 0;)
        write_all(fd, piece, got);
}

static void half(int fd)
{
    dprintf(fd, "%lld\n", take_all(fd));
}

static void serve(void)
{
    struct pollfd ports[] = {{listen_at(ECHO), POLLIN, 0}, {listen_at(HALF), POLLIN, 0}, {listen_at(STOP), POLLIN, 0}};
    printf("serving=yes\n");
    fflush(stdout);
    for (;;) {
        if (poll(ports, 3, -1) < 0)
            fail("poll");
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        for (int i = 0; i < 3; i++) {
            if (!ports[i].revents)
                continue;
            int fd = accept(ports[i].fd, NULL, NULL);
            if (fd < 0)
                fail("accept");
            if (i == 2)
                exit(0);
            if (fork() == 0) {
                (i == 0 ? echo : half)(fd);
                _exit(0);
            }
            close(fd);
        }
    }
}

static void call(unsigned port, unsigned mib)
{
    int fd = call_host(port);
    if (fd < 0)
        fail("connect");
    pid_t sender = fork();
    if (sender == 0) {
        for (uint64_t index = 0; index < mib * (1048576 / PIECE_BYTES); index++) {
            make_piece(piece, index);
            write_all(fd, piece, sizeof(piece));
        }
        shutdown(fd, SHUT_WR);
        _exit(0);
    }
    printf("received=%lld\n", take_all(fd));
    waitpid(sender, NULL, 0);
}

static void many(unsigned port, int count)
{
    int fds[count];
    for (int i = 0; i < count; i++)
        if ((fds[i] = call_host(port)) < 0)
            fail("connect");
    for (int i = 0; i < count; i++)
        write_all(fds[i], (char *)&i, sizeof(i));
    int good = 0;
    for (int i = count - 1; i >= 0; i--) {
        int word = -1;
        good += recv(fds[i], &word, sizeof(word), MSG_WAITALL) == sizeof(word) && word == i;
    }
    printf("echoed=%d\n", good);
}

int main(int count, char **words)
{
    const char *job = count > 1 ? words[1] : "";
    unsigned port = count > 2 ? strtoul(words[2], NULL, 10) : 0;
    unsigned number = count > 3 ? strtoul(words[3], NULL, 10) : 0;
    if (!strcmp(job, "serve"))
        serve();
    else if (!strcmp(job, "call"))
        call(port, number);
    else if (!strcmp(job, "many"))
        many(port, number);
    else if (!strcmp(job, "refused"))
        printf("refused=%s\n", call_host(port) < 0 ? strerrorname_np(errno) : "no");
    return 0;
}
