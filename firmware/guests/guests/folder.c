/* Speaks FUSE (linux/fuse.h) to a shared folder by itself, without a kernel that keeps to its rules: `do=garbage` sends requests of every
 * kind with names and numbers that lead elsewhere, `do=flood` makes and looks up files without end. */
#include "arena.h"
#include "cpu.h"

enum {
    URGENT = 0,
    REQUESTS = 1,
    QUEUE = 128,
    AT_ONCE = 32,
    ARGUMENTS = 4096,
    ROOM = 8192,
    ROOT = 1,
    READ_WRITE = 2,
};

enum {
    LOOKUP = 1,
    FORGET = 2,
    OPEN = 14,
    READ = 15,
    FSYNC = 20,
    INIT = 26,
    FSYNCDIR = 30,
    CREATE = 35,
    DESTROY = 38,
    BATCH_FORGET = 42,
    FALLOCATE = 43,
    COPY_FILE_RANGE = 47,
    SYNCFS = 50,
    OPCODES = 60,
};

enum { NO_ENTRY = -2, TOO_MANY_FILES = -23 };

struct request {
    u32 len, opcode;
    u64 unique, node;
    u32 uid, gid, pid, extensions;
    u8 arguments[ARGUMENTS];
} __attribute__((packed));
enum { HEADER = 40 };

struct reply {
    u32 len;
    int32_t error;
    u64 unique;
    u8 body[ROOM];
} __attribute__((packed));
enum { REPLY_HEADER = 16, ENTRY = 128 };

static struct virtio device;
static struct queue urgent, queue;
static struct request requests[AT_ONCE] __attribute__((aligned(4096)));
static struct reply replies[AT_ONCE] __attribute__((aligned(4096)));
/* The last numbers that the server has told. */
static u64 last_node = ROOT, last_handle;
/* How often a file in `d` was read, and a request of garbage did something. */
static u64 walks, successes;

static const char *const names[] = {"..", ".", "", "/", "/etc/passwd", "../secret", "d/secret", "d/../../secret",
                                    "d", "secret", "link", "a", "b", "c"};

static u32 put(struct request *request, u32 at, const void *bytes, u32 len)
{
    memcpy(request->arguments + at, bytes, len);
    return at + len;
}

static u32 put_name(struct request *request, u32 at, const char *name)
{
    u32 len = 0;
    while (name[len])
        len++;
    return put(request, at, name, len + 1);
}

/* Offers request `at`, with its arguments of `len` bytes in a descriptor of their own. */
static void offer(unsigned at, u32 opcode, u64 node, u32 len, u32 room)
{
    struct request *request = &requests[at];
    request->len = HEADER + len;
    request->opcode = opcode;
    request->unique = at + 1;
    request->node = node;
    u16 head = at * 3;
    bool has_room = opcode != FORGET && opcode != BATCH_FORGET;
    set_descriptor(&queue, head, request, HEADER, DESC_NEXT, head + 1);
    set_descriptor(&queue, head + 1, request->arguments, len, has_room ? DESC_NEXT : 0, head + 2);
    set_descriptor(&queue, head + 2, &replies[at], room, DESC_WRITE, 0);
    replies[at].error = 0;
    queue_offer(&queue, head);
}

/* Sends request 0 and returns its error. */
static int32_t ask(u32 opcode, u64 node, u32 len)
{
    struct used_entry entry;
    offer(0, opcode, node, len, sizeof replies[0]);
    queue_ring(&queue);
    CHECK(queue_wait(&queue, &entry) && entry.id == 0);
    CHECK(entry.len >= REPLY_HEADER && entry.len == replies[0].len && replies[0].unique == 1);
    return replies[0].error;
}

static u64 told(const struct reply *reply, unsigned at) { return *(const u64 *)(reply->body + at); }

static void mount(void)
{
    u32 fields[16] = {7, 38, 1 << 17, ~0u & ~(1u << 30)};
    CHECK(ask(INIT, 0, put(&requests[0], 0, fields, sizeof fields)) == 0);
}

static void start(void)
{
    restart(&device, 0);
    queue_start(&device, URGENT, QUEUE, &urgent);
    queue_start(&device, REQUESTS, QUEUE, &queue);
    virtio_ready(&device);
    mount();
}

/* The host replaces `d` by a link to a folder outside, whose file has this content, and by a folder again. */
static bool is_secret(const struct reply *reply)
{
    for (unsigned at = 0; at < 16; at++)
        if (told(reply, at) == *(const u64 *)"SECRET!!")
            return true;
    return false;
}

static void walk(void)
{
    if (ask(LOOKUP, ROOT, put_name(&requests[0], 0, "d")))
        return;
    if (ask(LOOKUP, told(&replies[0], 0), put_name(&requests[0], 0, "secret")))
        return;
    u64 file = told(&replies[0], 0);
    if (ask(OPEN, file, put(&requests[0], 0, (u32[]){0, 0}, 8)))
        return;
    u64 fields[5] = {told(&replies[0], 0), 0, 4096};
    if (ask(READ, file, put(&requests[0], 0, fields, sizeof fields)))
        return;
    CHECK(!is_secret(&replies[0]));
    walks++;
}

static u64 some_number(void)
{
    static const u64 odd[] = {0, 1, 8, 4096, 1 << 20, 1 << 30, 0xffffffff, 1ull << 40, 1ull << 63, ~0ull};
    switch (chance(3)) {
    case 0: return last_handle - chance(8);
    case 1: return last_node - chance(8);
    default: return ONE_OF(odd);
    }
}

/* Not those that the server has no reason to refuse, and that take as much of the host's disk or time as they say. */
static u32 some_opcode(void)
{
    u32 opcode;
    do
        opcode = chance(3) ? chance(OPCODES) : (u32[]){LOOKUP, OPEN, CREATE, READ}[chance(4)];
    while (opcode == FALLOCATE || opcode == COPY_FILE_RANGE || opcode == FSYNC || opcode == FSYNCDIR || opcode == SYNCFS ||
           opcode == INIT || opcode == DESTROY);
    return opcode;
}

static void offer_garbage(unsigned at)
{
    struct request *request = &requests[at];
    u32 len = 0;
    for (u64 words = chance(8); words; words--)
        len = put(request, len, (u64[]){some_number()}, 8);
    for (u64 words = chance(3); words; words--)
        len = put_name(request, len, ONE_OF(names));
    if (!chance(8))
        len = ARGUMENTS;
    if (!chance(4))
        request->uid = request->gid = chance(2) ? 1000 : ~0u;
    u64 node = chance(4) ? last_node - chance(last_node < 16 ? last_node : 16) : some_number();
    offer(at, some_opcode(), node, len, chance(8) ? sizeof replies[at] : chance(32));
    if (!chance(8))
        request->len = some_number();
    /* Data from anywhere, and replies into the arena or to where no memory is. */
    if (!chance(8))
        set_descriptor(&queue, at * 3 + 1, (void *)some_address(), some_len(), DESC_NEXT, at * 3 + 2);
    if (!chance(8))
        set_descriptor(&queue, at * 3 + 2, (void *)some_address(), some_len(), DESC_WRITE, 0);
}

static void garbage(void)
{
    for (u64 round = 0, count = rounds(300); round < count; round++) {
        for (unsigned at = 0; at < AT_ONCE; at++)
            offer_garbage(at);
        queue_ring(&queue);
        for (unsigned taken = 0; taken < AT_ONCE; taken++) {
            struct used_entry entry;
            CHECK(queue_wait(&queue, &entry) && entry.id % 3 == 0 && entry.id / 3 < AT_ONCE);
            const struct reply *reply = &replies[entry.id / 3];
            u32 opcode = requests[entry.id / 3].opcode;
            if (entry.len < REPLY_HEADER || reply->error)
                continue;
            CHECK(!is_secret(reply));
            successes++;
            if ((opcode == LOOKUP || opcode == CREATE) && entry.len >= REPLY_HEADER + ENTRY)
                last_node = told(reply, 0);
            if (opcode == OPEN)
                last_handle = told(reply, 0);
        }
        memset(requests, 0, sizeof requests);
        walk();
        /* As after a reboot: what was known before is forgotten. */
        if (round % 16 == 15)
            start(), last_node = ROOT;
    }
    print("walks %u successes %u\n", walks, successes);
}

static void flood(void)
{
    u64 files = 0, count = rounds(3000);
    for (u64 at = 0; at < count; at++) {
        char name[] = "file-0000000";
        for (u64 rest = at, place = sizeof name - 2; rest; rest /= 10)
            name[place--] = '0' + rest % 10;
        u32 len = put(&requests[0], 0, (u32[]){READ_WRITE, 0100600, 0, 0}, 16);
        int32_t error = ask(CREATE, ROOT, put_name(&requests[0], len, name));
        CHECK(error == 0 || error == TOO_MANY_FILES);
        files += error == 0;
        for (unsigned again = 0; again < 3; again++)
            ask(LOOKUP, ROOT, put_name(&requests[0], 0, name));
    }
    CHECK(ask(LOOKUP, ROOT, put_name(&requests[0], 0, "none")) == NO_ENTRY);
    print("files %u\n", files);
}

int guest_main(void)
{
    arm();
    if (!virtio_find(VIRTIO_FOLDER, 0, &device))
        return EXIT_MISSING;
    start();
    if (told_to("garbage"))
        garbage();
    else if (told_to("flood"))
        flood();
    else
        return EXIT_BAD_COMMAND_LINE;
    start();
    spend();
}
