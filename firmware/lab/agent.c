// The lab's PID 1 once the job's disk is the root (started by firmware/lab/init): runs the one command in /lab, carries
// its output to the host, reports how it ended and switches the machine off. Static; nothing but libc. The AMD machine
// (QEMU) has a virtio port for the output; in the Intel one (Bochs) a byte goes to an I/O port. `agent keep` there is
// the word by which the machine is kept as it is (firmware/lab/bochs.c).
//
// Output goes through a pipe and not straight to the port, because a port cannot be opened a second time, which
// /dev/stdout and /dev/stderr come down to; and a process that the command leaves behind must not keep us waiting.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum {
    HOST_OUTPUT = 3, // the port that is the host's standard output (both: opened by init)
    HOST_STATUS = 4,
    EXIT_PORT = 0xf4, // QEMU's isa-debug-exit
    OUTPUT_PORT = 0xe9, // Bochs' ports
    SHUTDOWN_PORT = 0x8900,
    ARGUMENTS_BYTES = 1 << 20,
};

// Whether this is the Intel machine: the kernel's command line says so, and hands it to its first process.
static int in_bochs(void)
{
    const char *processor = getenv("lab");
    return processor && strcmp(processor, "intel") == 0;
}

static void switch_off(void)
{
    if (iopl(3) != 0)
        return;
    if (in_bochs()) {
        for (const char *letter = "Shutdown"; *letter; letter++)
            outb(*letter, SHUTDOWN_PORT);
    } else {
        outb(0, EXIT_PORT);
    }
}

static void leave(const char *format, ...)
{
    char line[256];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    // The disk first: the host reads files from it as soon as it knows the status.
    sync();
    if (write(HOST_STATUS, line, length) < 0)
        perror("lab agent: status");
    // A serial line transmits it slowly.
    tcdrain(HOST_STATUS);
    switch_off();
    for (;;)
        pause();
}

// Reads a file of strings, each ended by a NUL, into a NULL-ended vector.
static char **read_strings(const char *path)
{
    static char bytes[ARGUMENTS_BYTES];
    static char *strings[ARGUMENTS_BYTES / 16];
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? -1 : read(file, bytes, sizeof bytes);
    if (length <= 0)
        leave("failed no command in %s\n", path);
    size_t count = 0;
    for (char *at = bytes; at < bytes + length && count + 1 < sizeof strings / sizeof *strings; at += strlen(at) + 1)
        strings[count++] = at;
    return strings;
}

static ssize_t send(const char *bytes, size_t count)
{
    if (!in_bochs())
        return write(HOST_OUTPUT, bytes, count);
    // Not for the command, which would inherit the right.
    if (iopl(3) != 0)
        return -1;
    outsb(OUTPUT_PORT, bytes, count);
    iopl(0);
    return count;
}

// Copies available output to the host; false at its end.
static int carry(int from)
{
    static char bytes[1 << 16];
    ssize_t length = read(from, bytes, sizeof bytes);
    if (length < 0)
        return errno == EINTR;
    for (ssize_t done = 0; done < length;) {
        ssize_t written = send(bytes + done, length - done);
        if (written < 0 && errno != EINTR)
            leave("failed cannot write to the host: %s\n", strerror(errno));
        done += written > 0 ? written : 0;
    }
    return length > 0;
}

static void run(char **arguments, const char *terminal, int output)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    unsetenv("lab");
    int input = open(terminal ? terminal : "/dev/null", O_RDWR);
    if (terminal) {
        ioctl(input, TIOCSCTTY, 1);
        output = input;
    }
    dup2(input, STDIN_FILENO);
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    close_range(STDERR_FILENO + 1, ~0U, 0);
    if (chdir(arguments[0]) != 0)
        perror(arguments[0]);
    execvp(arguments[1], arguments + 1);
    int error = errno;
    fprintf(stderr, "lab: %s: %s\n", arguments[1], strerror(error));
    _exit(error == ENOENT ? 127 : 126);
}

int main(int count, char **words)
{
    if (count > 1 && strcmp(words[1], "keep") == 0)
        return send("", 1) != 1;
    // The working directory, then the command.
    char **arguments = read_strings("/lab/command");
    const char *terminal = access("/lab/terminal", F_OK) == 0 ? "/dev/ttyS0" : NULL;

    sigset_t child_ended;
    sigemptyset(&child_ended);
    sigaddset(&child_ended, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child_ended, NULL);
    int signals = signalfd(-1, &child_ended, SFD_CLOEXEC | SFD_NONBLOCK);
    int pipe_ends[2];
    if (signals < 0 || pipe2(pipe_ends, O_CLOEXEC) != 0)
        leave("failed %s\n", strerror(errno));
    fcntl(pipe_ends[0], F_SETPIPE_SZ, 1 << 20);

    pid_t command = fork();
    if (command < 0)
        leave("failed cannot fork: %s\n", strerror(errno));
    if (command == 0)
        run(arguments, terminal, pipe_ends[1]);
    close(pipe_ends[1]);

    struct pollfd wanted[] = {{.fd = pipe_ends[0], .events = POLLIN}, {.fd = signals, .events = POLLIN}};
    for (int status = 0, ended = 0; !ended;) {
        poll(wanted, 2, -1);
        if (wanted[0].revents && !carry(pipe_ends[0]))
            wanted[0].fd = -1;
        if (!wanted[1].revents)
            continue;
        struct signalfd_siginfo event;
        while (read(signals, &event, sizeof event) > 0)
            ;
        for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
            if (pid != command)
                continue;
            ended = 1;
            // The command's output is in the pipe by now; no other process may keep filling it.
            kill(-1, SIGKILL);
            fcntl(pipe_ends[0], F_SETFL, O_NONBLOCK);
            while (carry(pipe_ends[0]))
                ;
            leave("exit %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
        }
    }
}
