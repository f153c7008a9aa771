/* A guest of `husk run` whose init breaks the rules of husk's protocol (firmware/protocol). The command is what it does:
 * messages in a `do=jumble`, `do=noise`, `do=lengths` that lie, `do=silence`, a `do=flood` of output, of `do=hellos` or of
 * `do=questions`, and `do=words` for a terminal. */
#include "cpu.h"
#include "virtio.h"

enum {
    RX = 0,
    TX = 1,
    BUFFERS = 32,
    PACKET = 4096,
    HOST_CID = 2,
    STREAM = 1,
    PORT = 1024,
    FIRST_PORT = 5000,
    HEADER = 44,
    SHUTDOWN_BOTH = 3,
    LINKS = 700,
    CPIO_HEADER = 110,
};

enum { REQUEST = 1, RESPONSE = 2, RESET = 3, SHUTDOWN = 4, DATA = 5 };
enum { CONTROL = 0, STDIN = 1, STDOUT = 2, STDERR = 3 };
/* Messages of the guest. */
enum { ADMITTED = 0, STARTED = 1, FAILED = 2, EXITED = 3, SIGNALED = 4, ASK_TIME = 5 };

struct header {
    u64 src_cid, dst_cid;
    u32 src_port, dst_port, len;
    u16 type, op;
    u32 flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

/* A connection to the host. */
struct link {
    bool open, ended;
    u32 sent, alloc, forwarded, received;
};

static struct virtio device;
static struct queue rx, tx;
static u8 received[BUFFERS][PACKET] __attribute__((aligned(PACKET)));
static u8 packet[PACKET] __attribute__((aligned(PACKET)));
static struct link links[LINKS];
static unsigned link_count;

/* Receives what there is, and returns the buffers. */
static void take(void)
{
    struct used_entry entry;
    bool any = false;
    while (queue_take(&rx, &entry)) {
        struct header *header = (void *)received[entry.id];
        unsigned number = header->dst_port - FIRST_PORT;
        CHECK(number < LINKS);
        struct link *link = &links[number];
        link->alloc = header->buf_alloc;
        link->forwarded = header->fwd_cnt;
        if (header->op == RESPONSE)
            link->open = true;
        else if (header->op == RESET || header->op == SHUTDOWN)
            link->ended = true;
        else if (header->op == DATA)
            link->received += header->len;
        queue_offer(&rx, entry.id);
        any = true;
    }
    if (any)
        queue_ring(&rx);
}

static void send(struct link *link, u16 op, const void *data, u32 len)
{
    struct used_entry entry;
    struct header header = {read32(device.config), HOST_CID, FIRST_PORT + (link - links), PORT, len, STREAM, op,
                            op == SHUTDOWN ? SHUTDOWN_BOTH : 0, 1 << 20, link->received};
    memcpy(packet, &header, sizeof header);
    memcpy(packet + HEADER, data, len);
    set_descriptor(&tx, 0, packet, HEADER + len, 0, 0);
    queue_offer(&tx, 0);
    queue_ring(&tx);
    while (!queue_take(&tx, &entry))
        take();
}

/* Sends all of it, or as much as the host takes before it ends the connection. */
static void send_data(struct link *link, const void *data, u32 len)
{
    const u8 *at = data;
    while (len && !link->ended) {
        u32 room = link->alloc - (link->sent - link->forwarded), step = len < PACKET - HEADER ? len : PACKET - HEADER;
        if (step > room)
            step = room;
        if (step) {
            send(link, DATA, at, step);
            link->sent += step;
            at += step;
            len -= step;
        }
        take();
    }
}

/* Connects, and sends these bytes first. */
static struct link *connect(const void *hello, u32 len)
{
    CHECK(link_count < LINKS);
    struct link *link = &links[link_count++];
    send(link, REQUEST, NULL, 0);
    u64 start = rdtsc();
    while (take(), !link->open && !link->ended)
        CHECK(!waited_too_long(start));
    send_data(link, hello, len);
    return link;
}

static struct link *join(u8 role)
{
    const u8 hello[16] = {'h', 'u', 's', 'k', PROTOCOL_VERSION, 0, role};
    return connect(hello, sizeof hello);
}

static void say(struct link *control, u8 message, u8 value)
{
    const u8 bytes[] = {message == ADMITTED || message == ASK_TIME ? 1 : 2, 0, 0, 0, message, value};
    send_data(control, bytes, 4 + bytes[0]);
}

/* Waits for the host, which ends the machine. */
static _Noreturn void wait_for_end(void)
{
    for (;;)
        take();
}

/* The first end counts. Output follows it, and the host has the last word. */
static void jumble(struct link *control)
{
    static const u8 messages[] = {EXITED, STARTED, ADMITTED, SIGNALED, ASK_TIME, EXITED, STARTED, ASK_TIME};
    for (unsigned i = 0; i < sizeof messages; i++)
        say(control, messages[i], 3 + i);
    struct link *output = join(STDOUT), *errors = join(STDERR);
    send_data(output, "output\n", 7);
    send_data(errors, "errors\n", 7);
    u32 before = control->received;
    send(output, SHUTDOWN, NULL, 0);
    send(errors, SHUTDOWN, NULL, 0);
    /* At least the length of a message. */
    while (control->received < before + 4)
        take();
    exit_with(77);
}

static _Noreturn void flood(struct link *control)
{
    static u8 noise[2048];
    for (unsigned i = 0; i < sizeof noise; i++)
        noise[i] = i % 64 == 63 ? '\n' : 'x';
    say(control, STARTED, 1);
    struct link *output = join(STDOUT), *errors = join(STDERR);
    for (;;) {
        send_data(output, noise, sizeof noise);
        if (errors->alloc - (errors->sent - errors->forwarded) >= sizeof noise)
            send_data(errors, noise, sizeof noise);
    }
}

static void hellos(struct link *control)
{
    static const u8 some[][16] = {"GET / HTTP/1.1\r", {'h', 'u', 's', 'k', PROTOCOL_VERSION + 1}, {'h', 'u', 's', 'k', PROTOCOL_VERSION, 0, 200},
                                  {'h', 'u', 's', 'k', PROTOCOL_VERSION, 0, STDOUT, 0, 1},
                                  {'h', 'u', 's', 'k', PROTOCOL_VERSION - 1, 0, CONTROL}};
    /* More than there can be at a time, each of which the host closes. */
    for (unsigned i = 0; i < 600; i++) {
        struct link *link = connect(some[i % 5], sizeof *some);
        u64 start = rdtsc();
        while (take(), !link->ended)
            CHECK(!waited_too_long(start));
        send(link, RESET, NULL, 0);
    }
    /* And some that say a part, and keep a place. */
    for (unsigned i = 0; i < 5; i++)
        connect(some[4], 3);
    say(control, STARTED, 1);
    say(control, EXITED, 5);
    struct link *output = join(STDOUT), *errors = join(STDERR);
    send(output, SHUTDOWN, NULL, 0);
    send(errors, SHUTDOWN, NULL, 0);
    wait_for_end();
}

static void questions(struct link *control)
{
    say(control, STARTED, 1);
    for (;;)
        say(control, ASK_TIME, 0);
}

/* What the host's user is told must not move their cursor, or look like the host's own words. */
static void words(struct link *control)
{
    static const u8 failed[] = {37, 0, 0, 0, FAILED, 34, 'n', 'o', '\n', 'h', 'u', 's', 'k', ':', ' ', 'a', 'l', 'l', ' ', 'i',
                                's', ' ', 'w', 'e', 'l', 'l', 0x1b, ']', '0', ';', 'o', 'w', 'n', 'e', 'd', 7, 13, 'x', 'y', 'z', 126};
    send_data(control, failed, sizeof failed);
    struct link *output = join(STDOUT), *errors = join(STDERR);
    send(output, SHUTDOWN, NULL, 0);
    send(errors, SHUTDOWN, NULL, 0);
    u32 before = control->received;
    while (control->received < before + 4)
        take();
    exit_with(77);
}

static u32 hex(const char *digits)
{
    u32 value = 0;
    for (unsigned i = 0; i < 8; i++)
        value = value << 4 | (digits[i] <= '9' ? digits[i] - '0' : (digits[i] | 32) - 'a' + 10);
    return value;
}

/* Whether the command contains these words: init's configuration is the file `spec` of the initramfs (newc: cpio(5)). */
static bool asked_to(const char *task)
{
    unsigned len, size = 0, task_len = 0;
    const char *archive = initial_ram_disk(&len);
    CHECK(archive);
    while (task[task_len])
        task_len++;
    for (unsigned at = 0; at + CPIO_HEADER + 5 < len; at += size) {
        u32 content = hex(archive + at + 54), name = hex(archive + at + 94);
        u32 start = (at + CPIO_HEADER + name + 3) & ~3u;
        if (same_text(archive + at + CPIO_HEADER, "spec"))
            for (unsigned from = start; from + task_len <= start + content; from++) {
                unsigned same = 0;
                while (same < task_len && archive[from + same] == task[same])
                    same++;
                if (same == task_len)
                    return true;
            }
        size = ((start + content + 3) & ~3u) - at;
    }
    return false;
}

int guest_main(void)
{
    if (!virtio_find(VIRTIO_VSOCK, 0, &device))
        return EXIT_MISSING;
    CHECK(virtio_start(&device, 0));
    queue_start(&device, RX, BUFFERS, &rx);
    queue_start(&device, TX, BUFFERS, &tx);
    virtio_ready(&device);
    for (unsigned i = 0; i < BUFFERS; i++) {
        set_descriptor(&rx, i, received[i], PACKET, DESC_WRITE, 0);
        queue_offer(&rx, i);
    }
    queue_ring(&rx);
    struct link *control = join(CONTROL);
    if (asked_to("do=jumble"))
        jumble(control);
    else if (asked_to("do=noise"))
        send_data(control, (const void *)guest_main, 4096);
    else if (asked_to("do=lengths"))
        send_data(control, "\xff\xff\xff\xff", 4);
    else if (asked_to("do=silence"))
        send_data(control, "\x00\x10\x00\x00", 4);
    else if (asked_to("do=flood"))
        flood(control);
    else if (asked_to("do=hellos"))
        hellos(control);
    else if (asked_to("do=questions"))
        questions(control);
    else if (asked_to("do=words"))
        words(control);
    else
        return EXIT_BAD_COMMAND_LINE;
    wait_for_end();
}
