/* The workload of scripts/shares: operations on a directory, each printed as `NAME RATE`, per second or in MiB per second. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, CHUNK = 1 << 20 };

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void check(long result, const char *what)
{
    if (result >= 0)
        return;
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static void report(const char *name, double amount, double since)
{
    printf("%s %.1f\n", name, amount / (now() - since));
    fflush(stdout);
}

static const char *name_of(int number)
{
    static char name[32];
    snprintf(name, sizeof name, "file-%d", number);
    return name;
}

static void make(int number)
{
    int file = open(name_of(number), O_CREAT | O_EXCL | O_WRONLY, 0644);
    check(file, "create");
    check(write(file, "content\n", 8), "write");
    close(file);
}

static void inspect(int number)
{
    struct stat found;
    check(stat(name_of(number), &found), "stat");
}

static void use(int number)
{
    char bytes[16];
    int file = open(name_of(number), O_RDONLY);
    check(file, "open");
    check(read(file, bytes, sizeof bytes) - 8, "read");
    close(file);
}

static void delete(int number) { check(unlink(name_of(number)), "unlink"); }

static void each(const char *name, int files, void (*act)(int))
{
    double since = now();
    for (int i = 0; i < files; i++)
        act(i);
    report(name, files, since);
}

static void list(int files, int times)
{
    double since = now();
    for (int i = 0; i < times; i++) {
        DIR *dir = opendir(".");
        int found = 0;
        while (readdir(dir))
            found++;
        closedir(dir);
        check(found - files, "readdir");
    }
    report("list", (double)files * times, since);
}

/* Moves `len` bytes at a time: in order, or anywhere. */
static void move(const char *name, int mib, size_t len, int writes, int anywhere)
{
    static char bytes[CHUNK];
    int file = open("large", O_RDWR | O_CREAT, 0644);
    check(file, "open");
    long places = ((long)mib << 20) / (long)len, count = anywhere ? places / 16 : places;
    unsigned seed = 1;
    double since = now();
    for (long i = 0; i < count; i++) {
        off_t at = (off_t)len * (anywhere ? rand_r(&seed) % places : i);
        ssize_t moved = writes ? pwrite(file, bytes, len, at) : pread(file, bytes, len, at);
        check(moved - (ssize_t)len, name);
    }
    if (writes)
        check(fsync(file), "fsync");
    report(name, count * (double)len / (1 << 20), since);
    close(file);
}

int main(int argc, char **argv)
{
    int files = argc > 2 ? atoi(argv[2]) : 1000, mib = argc > 3 ? atoi(argv[3]) : 64;
    check(argc > 1 ? chdir(argv[1]) : -1, "chdir");
    each("create", files, make);
    each("stat", files, inspect);
    each("open", files, use);
    list(files, 5);
    each("unlink", files, delete);
    move("write", mib, CHUNK, 1, 0);
    move("read", mib, CHUNK, 0, 0);
    move("random-write", mib, BLOCK, 1, 1);
    move("random-read", mib, BLOCK, 0, 1);
    check(unlink("large"), "unlink");
}
