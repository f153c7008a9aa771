// PID 1 of the lab's machine after firmware/lab/init has mounted the job's disk as the root: runs the command in
// /lab/command, forwards its output to the host, reports its exit status and powers the machine off. Statically linked
// with libc only. The output goes to a virtio port of the AMD machine (QEMU), and to an I/O port of the Intel machine
// (Bochs). There, `agent keep` saves the machine's state (firmware/lab/bochs.c).
//
// The command writes to a pipe instead of the port for two reasons: a port cannot be opened again through /dev/stdout,
// and processes that outlive the command must not delay the end.
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
    HOST_OUTPUT = 3, // opened by init, as is the next one
    HOST_STATUS = 4,
    EXIT_PORT = 0xf4, // QEMU's isa-debug-exit
    OUTPUT_PORT = 0xe9, // Bochs'
    SHUTDOWN_PORT = 0x8900, // Bochs'
    ARGUMENTS_BYTES = 1 << 20,
};

// Whether this is the Intel machine. The kernel passes unknown parameters of its command line to PID 1's environment.
static int in_bochs(void)
{
    const char *processor = getenv("lab");
    return processor && strcmp(processor, "intel") == 0;
}

static void power_off(void)
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

static void report_and_power_off(const char *format, ...)
{
    char line[256];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    // Before the status: the host reads files from the disk once it has that.
    sync();
    if (write(HOST_STATUS, line, length) < 0)
        perror("lab agent: status");
    // The serial port of the Intel machine transmits it slowly.
    tcdrain(HOST_STATUS);
    power_off();
    for (;;)
        pause();
}

// Reads a file of NUL-terminated strings into a NULL-terminated array.
static char **read_strings(const char *path)
{
    static char bytes[ARGUMENTS_BYTES];
    static char *strings[ARGUMENTS_BYTES / 16];
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? -1 : read(file, bytes, sizeof bytes);
    if (length <= 0)
        report_and_power_off("failed no command in %s\n", path);
    size_t count = 0;
    for (char *at = bytes; at < bytes + length && count + 1 < sizeof strings / sizeof *strings; at += strlen(at) + 1)
        strings[count++] = at;
    return strings;
}

static ssize_t send(const char *bytes, size_t count)
{
    if (!in_bochs())
        return write(HOST_OUTPUT, bytes, count);
    // Dropped again at once, because the command would inherit it.
    if (iopl(3) != 0)
        return -1;
    outsb(OUTPUT_PORT, bytes, count);
    iopl(0);
    return count;
}

// Copies available output to the host; false at its end.
static int forward(int from)
{
    static char bytes[1 << 16];
    ssize_t length = read(from, bytes, sizeof bytes);
    if (length < 0)
        return errno == EINTR;
    for (ssize_t done = 0; done < length;) {
        ssize_t written = send(bytes + done, length - done);
        if (written < 0 && errno != EINTR)
            report_and_power_off("failed cannot write to the host: %s\n", strerror(errno));
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

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "keep") == 0)
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
        report_and_power_off("failed %s\n", strerror(errno));
    fcntl(pipe_ends[0], F_SETPIPE_SZ, 1 << 20);

    pid_t command = fork();
    if (command < 0)
        report_and_power_off("failed cannot fork: %s\n", strerror(errno));
    if (command == 0)
        run(arguments, terminal, pipe_ends[1]);
    close(pipe_ends[1]);

    struct pollfd polled[] = {{.fd = pipe_ends[0], .events = POLLIN}, {.fd = signals, .events = POLLIN}};
    for (int status = 0, ended = 0; !ended;) {
        poll(polled, 2, -1);
        if (polled[0].revents && !forward(pipe_ends[0]))
            polled[0].fd = -1;
        if (!polled[1].revents)
            continue;
        struct signalfd_siginfo event;
        while (read(signals, &event, sizeof event) > 0)
            ;
        for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
            if (pid != command)
                continue;
            ended = 1;
            // The command's output is in the pipe by now; no other process may go on writing to it.
            kill(-1, SIGKILL);
            fcntl(pipe_ends[0], F_SETFL, O_NONBLOCK);
            while (forward(pipe_ends[0]))
                ;
            report_and_power_off("exit %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
        }
    }
}
