/* SPDX-License-Identifier: Apache-2.0
 *
 * Drives a fuzz target where there is no libFuzzer (gcc): replays every file it is given, then mutates them. It takes the
 * options of libFuzzer's that our builds use, -runs=N (0: replay only), -max_total_time=SECONDS, -seed=N and
 * -artifact_prefix=PATH. Without coverage to guide it this finds less than libFuzzer, but it needs nothing, it is the same
 * in every run, and it runs wherever the unit tests do.
 *
 * The input under test is kept in a file mapped shared: whatever kills the process, the kernel still writes it out.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_INPUT_BYTES 65536u
#define MAX_CORPUS 4096u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerInitialize(int *argc, char ***argv) __attribute__((weak));

struct input {
    uint8_t *data;
    size_t bytes;
};

static struct input corpus[MAX_CORPUS];
static size_t corpus_count;
static uint64_t random_state = 1;
static uint8_t *artifact; /* the input being tried, in its file */
static char artifact_path[4096];
static int artifact_fd = -1;

static uint64_t random_u64(void)
{
    /* xorshift64*: good enough to pick bytes, and the same everywhere */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * UINT64_C(0x2545f4914f6cdd1d);
}

static size_t random_below(size_t limit)
{
    return limit ? (size_t)(random_u64() % limit) : 0;
}

static void add_input(const uint8_t *data, size_t bytes)
{
    struct input *input;

    if (corpus_count == MAX_CORPUS)
        return;
    input = &corpus[corpus_count];
    input->data = malloc(bytes ? bytes : 1);
    if (!input->data)
        abort();
    if (bytes)
        memcpy(input->data, data, bytes);
    input->bytes = bytes;
    corpus_count++;
}

static int read_file(const char *path)
{
    static uint8_t buffer[MAX_INPUT_BYTES];
    size_t bytes;
    FILE *file = fopen(path, "rb");

    if (!file) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return -1;
    }
    bytes = fread(buffer, 1, sizeof buffer, file);
    fclose(file);
    add_input(buffer, bytes);
    return 0;
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name); /* in no locale's order: runs must be the same everywhere */
}

static int read_path(const char *path)
{
    struct stat st;
    struct dirent **entries;
    int count, status = 0;

    if (stat(path, &st)) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return -1;
    }
    if (!S_ISDIR(st.st_mode))
        return read_file(path);
    count = scandir(path, &entries, NULL, by_name);
    if (count < 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return -1;
    }
    for (int i = 0; i < count; i++) {
        char name[4096];
        int length = snprintf(name, sizeof name, "%s/%s", path, entries[i]->d_name);

        if (length > 0 && (size_t)length < sizeof name && entries[i]->d_name[0] != '.' && !stat(name, &st) &&
            S_ISREG(st.st_mode))
            status |= read_file(name);
        free(entries[i]);
    }
    free(entries);
    return status;
}

static int open_artifact(const char *prefix)
{
    int length = snprintf(artifact_path, sizeof artifact_path, "%scrash-%ld", prefix, (long)getpid());

    if (length < 0 || (size_t)length >= sizeof artifact_path)
        return -1;
    artifact_fd = open(artifact_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (artifact_fd < 0 || ftruncate(artifact_fd, MAX_INPUT_BYTES))
        return -1;
    artifact = mmap(NULL, MAX_INPUT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, artifact_fd, 0);
    return artifact == MAP_FAILED ? -1 : 0;
}

static void try_input(const uint8_t *data, size_t bytes)
{
    /* A heap copy of just this size, so that ASan sees a read of one byte too many. */
    uint8_t *copy = malloc(bytes ? bytes : 1);

    if (!copy)
        abort();
    if (bytes) {
        memcpy(copy, data, bytes);
        memcpy(artifact, data, bytes);
    }
    if (ftruncate(artifact_fd, (off_t)bytes))
        abort();
    (void)LLVMFuzzerTestOneInput(copy, bytes);
    if (ftruncate(artifact_fd, MAX_INPUT_BYTES)) /* mapped pages past the end of the file would raise SIGBUS */
        abort();
    free(copy);
}

/* Values at which lengths and counts go wrong. */
static const uint64_t edges[] = {0,          1,          0x7f,        0x80,         0xff,       0x7fff,    0x8000,
                                 0xffff,     0x7fffffff, 0x80000000u, 0xffffffffu,  0x400000,   0x3fffff,  0x400001,
                                 UINT64_MAX, INT64_MAX,  1ull << 63,  1ull << 32,   1ull << 12, 1ull << 20};

static size_t mutate(uint8_t *data, size_t bytes)
{
    for (size_t rounds = 1 + random_below(5); rounds; rounds--) {
        size_t at = random_below(bytes), width, length;
        uint64_t value;

        switch (random_below(8)) {
        case 0: /* flip a bit */
            if (bytes)
                data[at] ^= (uint8_t)(1u << random_below(8));
            break;
        case 1: /* another byte */
            if (bytes)
                data[at] = (uint8_t)random_u64();
            break;
        case 2: /* an edge value, in a little-endian field of 1 to 8 bytes */
            width = (size_t)1 << random_below(4);
            value = edges[random_below(sizeof edges / sizeof edges[0])];
            if (bytes >= width)
                memcpy(data + random_below(bytes - width + 1), &value, width);
            break;
        case 3: /* cut */
            bytes = random_below(bytes + 1);
            break;
        case 4: /* grow */
            length = random_below(64);
            for (; length && bytes < MAX_INPUT_BYTES; length--)
                data[bytes++] = (uint8_t)random_u64();
            break;
        case 5: /* take a part out */
            length = random_below(bytes - at + 1);
            if (bytes) {
                memmove(data + at, data + at + length, bytes - at - length);
                bytes -= length;
            }
            break;
        case 6: /* repeat a part at the end */
            length = random_below(bytes - at + 1);
            if (length > MAX_INPUT_BYTES - bytes)
                length = MAX_INPUT_BYTES - bytes;
            memcpy(data + bytes, data + at, length);
            bytes += length;
            break;
        default: /* a little more or less */
            if (bytes)
                data[at] = (uint8_t)(data[at] + random_below(9) - 4);
            break;
        }
    }
    return bytes;
}

static double now_s(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
    static uint8_t buffer[MAX_INPUT_BYTES];
    uint64_t runs = UINT64_MAX, done = 0;
    double limit_s = 0, begin_s = now_s();
    const char *prefix = "./";
    int status = 0;

    for (int i = 1; i < argc; i++) {
        if (!strncmp(argv[i], "-runs=", 6))
            runs = strtoull(argv[i] + 6, NULL, 10);
        else if (!strncmp(argv[i], "-seed=", 6))
            random_state = strtoull(argv[i] + 6, NULL, 10) * 2 + 1; /* never the generator's fixed point, 0 */
        else if (!strncmp(argv[i], "-max_total_time=", 16))
            limit_s = strtod(argv[i] + 16, NULL);
        else if (!strncmp(argv[i], "-artifact_prefix=", 17))
            prefix = argv[i] + 17;
        else if (argv[i][0] == '-')
            fprintf(stderr, "%s: not known here, ignored\n", argv[i]);
        else
            status |= read_path(argv[i]);
    }
    if (status)
        return 2;
    if (runs == UINT64_MAX && limit_s <= 0) {
        fprintf(stderr, "give -runs=N or -max_total_time=SECONDS\n");
        return 2;
    }
    if (open_artifact(prefix)) {
        fprintf(stderr, "%s: %s\n", artifact_path, strerror(errno));
        return 2;
    }
    if (LLVMFuzzerInitialize)
        (void)LLVMFuzzerInitialize(&argc, &argv);
    fprintf(stderr, "%zu inputs given; what is tried lies in %s\n", corpus_count, artifact_path);
    add_input(buffer, 0);
    for (size_t i = 0; i < corpus_count; i++)
        try_input(corpus[i].data, corpus[i].bytes);
    while (done < runs && (limit_s <= 0 || (done & 255) != 0 || now_s() - begin_s < limit_s)) {
        const struct input *from = &corpus[random_below(corpus_count)];
        size_t bytes = from->bytes;

        if (bytes)
            memcpy(buffer, from->data, bytes);
        try_input(buffer, mutate(buffer, bytes));
        done++;
    }
    for (size_t i = 0; i < corpus_count; i++)
        free(corpus[i].data);
    munmap(artifact, MAX_INPUT_BYTES);
    close(artifact_fd);
    unlink(artifact_path);
    printf("%zu inputs replayed, %llu new ones tried in %.1f s\n", corpus_count, (unsigned long long)done,
           now_s() - begin_s);
    return 0;
}
