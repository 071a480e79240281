/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory of machines: made, asked what is in it, written to files and read from them.
 *
 * Looking must not touch. A read through a mapping fills a hole of a memfd with a page, takes a fault where a userfaultfd is
 * registered, and makes eight gibibytes of an idle machine resident. So what is there is learnt from the side: SEEK_DATA and
 * SEEK_HOLE on files and memfds, the page tables (PAGEMAP_SCAN, /proc/self/pagemap) for anonymous memory; and content that has a
 * file descriptor is read with pread(2), which leaves holes alone.
 *
 * hugetlbfs knows no holes: SEEK_DATA calls everything data. There the page tables tell what this mapping has used, the inode how
 * much is allocated in all, and only when these differ (pages written through another mapping) the rest is read.
 *
 * The digest. Content is cut into 4 KiB blocks, whatever the page size, so that machines on huge and on ordinary pages
 * compare equal. A block that is not all zero contributes mix(mix(index + C) ^ crc32c(block)); contributions are added modulo
 * 2^64, and the sum is mixed with the size. The mixer is a bijection that spreads every bit (the finalizer of splitmix64).
 * Sums commute and zero blocks contribute nothing: hence absent memory need not be visited. It finds accidents, not attackers.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/util.h"
#include "memory/states.h"
#include "postcopy/core.h"
#include "postcopy/memory.h"
#include "uffd/pagemap_abi.h"

/* Newer than the C library's headers in use. */
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U /* Linux 6.3 */
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

#define PAGEMAP_PRESENT ((uint64_t)1 << 63)
#define PAGEMAP_SWAPPED ((uint64_t)1 << 62)

#define BLOCK_BYTES ((uint64_t)4096)        /* of the digest, and the finest hole left in a dump */
#define CHUNK_BYTES ((uint64_t)256 * 1024)  /* read at once: fits the second level cache */

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint64_t round_up(uint64_t value, uint64_t unit)
{
    return value % unit ? value + (unit - value % unit) : value;
}

/* ---- the host ---- */

/* A small file of /proc or /sys as a string; its length or -errno. */
static int read_text(const char *path, char *text, size_t cap)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t used = 0;
    int result = 0;

    if (fd < 0)
        return -errno;
    while (used < cap - 1) {
        ssize_t got = read(fd, text + used, cap - 1 - used);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            result = -errno;
        if (got <= 0)
            break;
        used += (size_t)got;
    }
    close(fd);
    text[used] = '\0';
    return result ? result : (int)used;
}

/* The number after `key` at the start of a line; false when there is none. */
static bool number_after(const char *text, const char *key, uint64_t *value)
{
    size_t length = strlen(key);

    for (const char *line = text; line; line = strchr(line, '\n')) {
        if (*line == '\n')
            line++;
        if (!strncmp(line, key, length)) {
            char *end;

            errno = 0;
            *value = strtoull(line + length, &end, 10);
            return end != line + length && !errno;
        }
    }
    return false;
}

/* The smallest limit of a control group (the path after the last ':' of a line of /proc/self/cgroup) and those above it. */
static uint64_t group_limit_bytes(const char *line, const char *root, const char *file)
{
    char group[PATH_MAX], path[PATH_MAX + 64], value[64];
    const char *begin = strchr(line, '/');
    uint64_t limit = UINT64_MAX, one;
    char *end;

    if (!begin || strcspn(line, "\n") < (size_t)(begin - line))
        return limit;
    (void)snprintf(group, sizeof(group), "%.*s", (int)strcspn(begin, "\n"), begin);
    for (;;) {
        (void)snprintf(path, sizeof(path), "%s%s/%s", root, group, file);
        if (read_text(path, value, sizeof(value)) > 0 && number_after(value, "", &one))
            limit = least(limit, one); /* "max" is no number */
        end = strrchr(group, '/');
        if (!end)
            return limit;
        *end = '\0';
    }
}

/* What the control groups that this process is in allow, of either version; UINT64_MAX without a limit. In a container
 * /proc/meminfo shows the host, and going past this limit is not an error but the end of the process. */
static uint64_t cgroup_limit_bytes(void)
{
    uint64_t limit = UINT64_MAX;
    char text[PATH_MAX];
    const char *line;

    if (read_text("/proc/self/cgroup", text, sizeof(text)) < 0)
        return limit;
    line = !strncmp(text, "0::", 3) ? text : strstr(text, "\n0::");
    if (line)
        limit = group_limit_bytes(line + 1, "/sys/fs/cgroup", "memory.max");
    line = strstr(text, ":memory:"); /* version 1: alone in its hierarchy, as everywhere where it is still used */
    if (line)
        limit = least(limit, group_limit_bytes(line, "/sys/fs/cgroup/memory", "memory.limit_in_bytes"));
    return limit;
}

static const char *human(uint64_t bytes, char *out, size_t cap)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    size_t unit = 0;
    double value = (double)bytes;

    for (; value >= 1024 && unit + 1 < PC_ARRAY_LENGTH(units); unit++)
        value /= 1024;
    (void)snprintf(out, cap, "%.*f %s", value < 10 && unit ? 1 : 0, value, units[unit]);
    return out;
}

uint64_t pc_page_bytes(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

uint64_t pc_huge_page_bytes(void)
{
    char text[8192];
    uint64_t kib;

    if (read_text("/proc/meminfo", text, sizeof(text)) < 0 || !number_after(text, "Hugepagesize:", &kib))
        return 0;
    return kib * 1024;
}

static int check_huge_pool(uint64_t bytes, uint64_t page_bytes, char *error, size_t error_bytes)
{
    uint64_t total = 0, unused = 0, reserved = 0, surplus = 0, overcommit = 0, usable, wanted = bytes / page_bytes;
    char text[8192];
    int result = read_text("/proc/meminfo", text, sizeof(text));

    if (result < 0)
        return pc_fail(-result, error, error_bytes, "hugetlb: cannot read /proc/meminfo: %s", strerror(-result));
    (void)number_after(text, "HugePages_Total:", &total);
    (void)number_after(text, "HugePages_Free:", &unused);
    (void)number_after(text, "HugePages_Rsvd:", &reserved);
    (void)number_after(text, "HugePages_Surp:", &surplus);
    if (read_text("/proc/sys/vm/nr_overcommit_hugepages", text, sizeof(text)) > 0)
        (void)number_after(text, "", &overcommit);
    usable = unused > reserved ? unused - reserved : 0;
    if (wanted > usable + (overcommit > surplus ? overcommit - surplus : 0))
        return pc_fail(ENOMEM, error, error_bytes,
                       "hugetlb: %" PRIu64 " huge pages of %" PRIu64 " KiB wanted, %" PRIu64
                       " are free; remedy: sysctl vm.nr_hugepages=%" PRIu64,
                       wanted, page_bytes / 1024, usable, total - surplus + wanted - usable);
    return 0;
}

int pc_memory_check(int kind, uint64_t total_bytes, char *error, size_t error_bytes)
{
    uint64_t page_bytes, available = 0, swap = 0;
    char text[8192], want[32], have[32];
    int result;

    if (kind != PC_MEMORY_MEMFD && kind != PC_MEMORY_ANON && kind != PC_MEMORY_HUGETLB)
        return pc_fail(EINVAL, error, error_bytes, "memory: unknown kind %d", kind);
    page_bytes = kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
    if (!page_bytes)
        return pc_fail(ENOTSUP, error, error_bytes, "hugetlb: this kernel has no huge pages");
    if (!total_bytes)
        return pc_fail(EINVAL, error, error_bytes, "memory: a size of 0 bytes");
    if (total_bytes % page_bytes)
        return pc_fail(EINVAL, error, error_bytes, "memory: %" PRIu64 " bytes are not a multiple of the page size, %" PRIu64,
                       total_bytes, page_bytes);
    if (kind == PC_MEMORY_HUGETLB)
        return check_huge_pool(total_bytes, page_bytes, error, error_bytes);
    result = read_text("/proc/meminfo", text, sizeof(text));
    if (result < 0)
        return pc_fail(-result, error, error_bytes, "memory: cannot read /proc/meminfo: %s", strerror(-result));
    if (!number_after(text, "MemAvailable:", &available))
        (void)number_after(text, "MemTotal:", &available);
    (void)number_after(text, "SwapFree:", &swap);
    available = (available + swap) * 1024;
    if (total_bytes > available)
        return pc_fail(ENOMEM, error, error_bytes, "memory: %s wanted, this host has %s available",
                       human(total_bytes, want, sizeof(want)), human(available, have, sizeof(have)));
    available = cgroup_limit_bytes();
    if (total_bytes > available)
        return pc_fail(ENOMEM, error, error_bytes, "memory: %s wanted, the control group of this process allows %s",
                       human(total_bytes, want, sizeof(want)), human(available, have, sizeof(have)));
    return 0;
}

/* ---- making and unmaking ---- */

/* A memfd that stays as large as it is: every process that maps it may rely on not getting SIGBUS, whoever else holds it. */
int pc_memfd_new(const char *name, uint64_t size_bytes, unsigned int flags)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_NOEXEC_SEAL | flags);
    int error;

    if (fd < 0 && errno == EINVAL) /* before 6.3 */
        fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | flags);
    if (fd < 0)
        return -errno;
    if (!ftruncate(fd, (off_t)size_bytes) && !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return fd;
    error = errno;
    close(fd);
    return -error;
}

int pc_memory_create(int kind, uint64_t size_bytes, struct pc_memory *memory, char *error, size_t error_bytes)
{
    int protection = PROT_READ | PROT_WRITE, code;
    char size[32];
    int result = pc_memory_check(kind, size_bytes, error, error_bytes);

    *memory = (struct pc_memory){.size_bytes = size_bytes, .kind = kind, .fd = -1};
    if (result)
        return result;
    memory->page_bytes = kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
    if (kind == PC_MEMORY_ANON) {
        /* NORESERVE: the size was checked against what is there; the kernel's guess would refuse sparse machines. */
        memory->base = mmap(NULL, size_bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    } else {
        memory->fd = pc_memfd_new("postcopy", size_bytes, kind == PC_MEMORY_HUGETLB ? MFD_HUGETLB : 0);
        if (memory->fd < 0) {
            code = -memory->fd;
            memory->fd = -1;
            return pc_fail(code, error, error_bytes, "memory: cannot make a memfd of %s: %s",
                           human(size_bytes, size, sizeof(size)), strerror(code));
        }
        /* For huge pages this reserves them all: if somebody took them since the check, it fails here and not with
         * SIGBUS in the middle of a machine's run. */
        memory->base = mmap(NULL, size_bytes, protection, MAP_SHARED, memory->fd, 0);
    }
    if (memory->base == MAP_FAILED) {
        code = errno;
        memory->base = NULL;
        pc_memory_destroy(memory);
        if (kind == PC_MEMORY_HUGETLB && code == ENOMEM)
            return pc_fail(code, error, error_bytes,
                           "hugetlb: cannot reserve %" PRIu64 " huge pages; remedy: a larger sysctl vm.nr_hugepages",
                           size_bytes / pc_huge_page_bytes());
        return pc_fail(code, error, error_bytes, "memory: cannot map %s: %s", human(size_bytes, size, sizeof(size)),
                       strerror(code));
    }
    /* No transparent huge pages: one page written would install 512, of which 511 have no content yet. EINVAL: this
     * kernel has none. */
    if (kind != PC_MEMORY_HUGETLB && madvise(memory->base, size_bytes, MADV_NOHUGEPAGE) && errno != EINVAL)
        goto fail;
    /* A forked child must not share, nor copy on write, what a userfaultfd of its parent fills. */
    if (madvise(memory->base, size_bytes, MADV_DONTFORK))
        goto fail;
    return 0;
fail:
    code = errno;
    pc_memory_destroy(memory);
    return pc_fail(code, error, error_bytes, "memory: madvise: %s", strerror(code));
}

void pc_memory_destroy(struct pc_memory *memory)
{
    if (memory->base)
        (void)munmap(memory->base, memory->size_bytes);
    if (memory->fd >= 0)
        close(memory->fd);
    memory->base = NULL;
    memory->fd = -1;
}

int pc_memory_map(int fd, uint64_t size_bytes, uint64_t page_bytes, int kind, struct pc_memory *memory)
{
    int error;

    *memory = (struct pc_memory){.size_bytes = size_bytes, .page_bytes = page_bytes, .kind = kind};
    memory->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (memory->fd < 0)
        return -errno;
    memory->base = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory->fd, 0);
    if (memory->base == MAP_FAILED) {
        error = errno;
        memory->base = NULL;
    } else if ((!madvise(memory->base, size_bytes, MADV_NOHUGEPAGE) || errno == EINVAL) &&
               !madvise(memory->base, size_bytes, MADV_DONTFORK)) {
        return 0; /* why these: pc_memory_create */
    } else {
        error = errno;
    }
    pc_memory_destroy(memory);
    return -error;
}

int pc_memory_discard(const struct pc_memory *memory, uint64_t address, uint64_t bytes)
{
    uint64_t offset = address - (uint64_t)(uintptr_t)memory->base;
    int result = memory->fd < 0
                     ? madvise((void *)(uintptr_t)address, bytes, MADV_DONTNEED)
                     : fallocate(memory->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes);

    return result ? -errno : 0;
}

/* ---- reading and writing in full ---- */

/* Fills `buffer` from a file of which `end` bytes count. The file may end inside the last `slack` bytes of them, which then
 * read as zeros (an image need not be a whole number of pages); -ENODATA when it is shorter: it shrank. */
static int read_full(int fd, uint64_t offset, void *buffer, uint64_t bytes, uint64_t end, uint64_t slack)
{
    uint8_t *at = buffer;

    while (bytes) {
        ssize_t got = pread(fd, at, bytes, (off_t)offset);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        if (!got) {
            if (end - offset >= slack)
                return -ENODATA;
            memset(at, 0, bytes);
            return 0;
        }
        at += got;
        offset += (uint64_t)got;
        bytes -= (uint64_t)got;
    }
    return 0;
}

static int write_full(int fd, uint64_t offset, const void *data, uint64_t bytes)
{
    const uint8_t *at = data;

    while (bytes) {
        ssize_t put = pwrite(fd, at, bytes, (off_t)offset);

        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return -errno;
        if (!put)
            return -EIO;
        at += put;
        offset += (uint64_t)put;
        bytes -= (uint64_t)put;
    }
    return 0;
}

/* The next range of data at or after *start and before `end`: 1, 0 when there is none, -errno. A file system that does not
 * tell has data everywhere. */
static int next_data(int fd, uint64_t *start, uint64_t *stop, uint64_t end)
{
    off_t data, hole;

    if (*start >= end)
        return 0;
    data = lseek(fd, (off_t)*start, SEEK_DATA);
    if (data < 0 && errno == ENXIO)
        return 0;
    if (data < 0 && errno != EINVAL && errno != ENOTSUP)
        return -errno;
    if (data < 0) {
        *stop = end;
        return 1;
    }
    if ((uint64_t)data >= end)
        return 0;
    hole = lseek(fd, data, SEEK_HOLE);
    /* ENXIO: the file was cut off just now; reading will say so. */
    if (hole < 0 && errno != ENXIO)
        return -errno;
    *start = (uint64_t)data;
    *stop = hole < 0 ? end : least((uint64_t)hole, end);
    return 1;
}

/* ---- what is there ---- */

static void set_bytes(uint64_t *words, uint64_t start, uint64_t stop, uint64_t page_bytes)
{
    if (stop > start)
        pc_bitmap_set_range(words, start / page_bytes, (stop - 1) / page_bytes - start / page_bytes + 1);
}

int pc_file_present(int fd, uint64_t size_bytes, uint64_t page_bytes, uint64_t *present_words)
{
    uint64_t start = 0, stop;
    off_t file_bytes;
    int result;

    if (!page_bytes || size_bytes > INT64_MAX)
        return -EINVAL;
    file_bytes = lseek(fd, 0, SEEK_END);
    if (file_bytes < 0)
        return -errno;
    if ((uint64_t)file_bytes < size_bytes && size_bytes - (uint64_t)file_bytes >= page_bytes)
        return -ENODATA;
    while ((result = next_data(fd, &start, &stop, size_bytes)) > 0) {
        set_bytes(present_words, start, stop, page_bytes);
        start = stop;
    }
    return result;
}

/* By PAGEMAP_SCAN. -ENOTTY on kernels before 6.7. */
static int scan_mapping(int pagemap, uint64_t address, uint64_t bytes, uint64_t page_bytes, uint64_t *words)
{
    struct page_region regions[256];
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .start = address,
        .end = address + bytes,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = PC_ARRAY_LENGTH(regions),
        /* Present or swapped out, but not the shared zero page that a read of a hole maps. */
        .category_inverted = PAGE_IS_PFNZERO,
        .category_mask = PAGE_IS_PFNZERO,
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    };

    while (scan.start < scan.end) {
        int got = ioctl(pagemap, PAGEMAP_SCAN, &scan);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        for (int i = 0; i < got; i++)
            set_bytes(words, regions[i].start - address, regions[i].end - address, page_bytes);
        if (scan.walk_end <= scan.start)
            return -EIO;
        scan.start = scan.walk_end;
    }
    return 0;
}

/* By /proc/self/pagemap: the same, except that it cannot tell the zero page. */
static int read_pagemap(int pagemap, uint64_t address, uint64_t bytes, uint64_t page_bytes, uint64_t *words)
{
    uint64_t entries[512], system_page = pc_page_bytes();

    for (uint64_t page = 0; page < bytes / system_page;) {
        uint64_t n = least(PC_ARRAY_LENGTH(entries), bytes / system_page - page);
        ssize_t got = pread(pagemap, entries, n * sizeof(entries[0]),
                            (off_t)((address / system_page + page) * sizeof(entries[0])));

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got ? -errno : -EIO;
        n = (uint64_t)got / sizeof(entries[0]);
        for (uint64_t i = 0; i < n; i++)
            if (entries[i] & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED))
                set_bytes(words, (page + i) * system_page, (page + i + 1) * system_page, page_bytes);
        page += n;
    }
    return 0;
}

/* Pages in the page tables of this process. Without /proc: -errno. (mincore(2) is no substitute: it calls a page that was
 * swapped out absent, and its content would be taken for zeros.) */
static int mapping_present(const struct pc_memory *memory, uint64_t *words)
{
    uint64_t address = (uint64_t)(uintptr_t)memory->base;
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    int result;

    if (pagemap < 0)
        return -errno;
    result = scan_mapping(pagemap, address, memory->size_bytes, memory->page_bytes, words);
    if (result == -ENOTTY || result == -EINVAL)
        result = read_pagemap(pagemap, address, memory->size_bytes, memory->page_bytes, words);
    close(pagemap);
    return result;
}

static int huge_present(const struct pc_memory *memory, uint64_t *words)
{
    uint64_t pages = memory->size_bytes / memory->page_bytes, allocated;
    struct stat stat;
    uint8_t *chunk;
    int result = 0;

    if (fstat(memory->fd, &stat))
        return -errno;
    allocated = (uint64_t)stat.st_blocks * 512 / memory->page_bytes;
    if (!allocated)
        return 0;
    /* Best effort: what the page tables do not tell is read. */
    if (memory->base && !mapping_present(memory, words) && pc_bitmap_count(words, pages) >= allocated)
        return 0;
    chunk = aligned_alloc(BLOCK_BYTES, CHUNK_BYTES);
    if (!chunk)
        return -ENOMEM;
    for (uint64_t page = pc_bitmap_next(words, pages, 0, 0); page < pages && !result;
         page = pc_bitmap_next(words, pages, page + 1, 0)) {
        uint64_t start = page * memory->page_bytes, stop = start + memory->page_bytes;

        for (uint64_t offset = start; offset < stop && !result;) {
            uint64_t bytes = least(CHUNK_BYTES, stop - offset);

            result = read_full(memory->fd, offset, chunk, bytes, memory->size_bytes, 0);
            if (!result && !pc_is_zero(chunk, bytes)) {
                pc_bitmap_set_range(words, page, 1);
                break;
            }
            offset += bytes;
        }
    }
    free(chunk);
    return result;
}

int pc_memory_present(const struct pc_memory *memory, uint64_t *present_words)
{
    switch (memory->kind) {
    case PC_MEMORY_MEMFD:
        return pc_file_present(memory->fd, memory->size_bytes, memory->page_bytes, present_words);
    case PC_MEMORY_HUGETLB:
        return huge_present(memory, present_words);
    case PC_MEMORY_ANON:
        return memory->base ? mapping_present(memory, present_words) : -EINVAL;
    default:
        return -EINVAL;
    }
}

static uint64_t *new_map(uint64_t bits)
{
    return calloc(pc_bitmap_words(bits) + 1, sizeof(uint64_t)); /* + 1: never a request for nothing */
}

int pc_memory_resident(const struct pc_memory *memory, uint64_t *resident_bytes)
{
    uint64_t pages = memory->size_bytes / memory->page_bytes, *words;
    struct stat stat;
    int result;

    if (memory->kind != PC_MEMORY_ANON) {
        if (fstat(memory->fd, &stat))
            return -errno;
        *resident_bytes = (uint64_t)stat.st_blocks * 512;
        return 0;
    }
    words = new_map(pages);
    if (!words)
        return -ENOMEM;
    result = pc_memory_present(memory, words);
    if (!result)
        *resident_bytes = pc_bitmap_count(words, pages) * memory->page_bytes;
    free(words);
    return result;
}

/* ---- walking over content ---- */

typedef int visit_fn(void *context, uint64_t offset, const uint8_t *data, uint64_t bytes);

/* Shows `visit` everything that may not be zero, in order, in pieces that begin at a multiple of BLOCK_BYTES; zeros follow the
 * last byte of an odd size up to the block's end. `address`: read here instead of from `fd`. */
static int walk(int fd, const uint8_t *address, uint64_t size_bytes, uint64_t page_bytes, const uint64_t *present,
                visit_fn *visit, void *context)
{
    uint64_t pages = size_bytes / page_bytes + (size_bytes % page_bytes != 0), first = 0, stop_page;
    uint8_t *chunk = NULL;
    int result = 0;

    if (!address) {
        chunk = aligned_alloc(BLOCK_BYTES, CHUNK_BYTES);
        if (!chunk)
            return -ENOMEM;
    }
    while (!result && (first = pc_bitmap_next(present, pages, first, 1)) < pages) {
        stop_page = pc_bitmap_next(present, pages, first, 0);
        for (uint64_t offset = first * page_bytes, stop = least(stop_page * page_bytes, size_bytes), bytes;
             offset < stop && !result; offset += bytes) {
            bytes = least(CHUNK_BYTES, stop - offset);
            if (address) {
                result = visit(context, offset, address + offset, bytes);
                continue;
            }
            result = read_full(fd, offset, chunk, bytes, size_bytes, page_bytes);
            if (result)
                break;
            if (bytes % BLOCK_BYTES)
                memset(chunk + bytes, 0, BLOCK_BYTES - bytes % BLOCK_BYTES);
            result = visit(context, offset, chunk, round_up(bytes, BLOCK_BYTES));
        }
        first = stop_page;
    }
    free(chunk);
    return result;
}

static int walk_memory(const struct pc_memory *memory, visit_fn *visit, void *context)
{
    const uint8_t *address = memory->kind == PC_MEMORY_ANON ? memory->base : NULL;
    uint64_t *present = new_map(memory->size_bytes / memory->page_bytes);
    int result;

    if (!present)
        return -ENOMEM;
    result = pc_memory_present(memory, present);
    if (!result)
        result = walk(memory->fd, address, memory->size_bytes, memory->page_bytes, present, visit, context);
    free(present);
    return result;
}

/* ---- digest ---- */

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9;
    x ^= x >> 27;
    x *= 0x94D049BB133111EB;
    return x ^ x >> 31;
}

static int digest_visit(void *context, uint64_t offset, const uint8_t *data, uint64_t bytes)
{
    uint64_t *sum = context;

    for (uint64_t at = 0; at < bytes; at += BLOCK_BYTES) {
        uint64_t index = (offset + at) / BLOCK_BYTES;

        if (!pc_is_zero(data + at, BLOCK_BYTES))
            *sum += mix(mix(index + 0x9E3779B97F4A7C15) ^ pc_crc32c(0, data + at, BLOCK_BYTES));
    }
    return 0;
}

static uint64_t digest_end(uint64_t sum, uint64_t size_bytes)
{
    return mix(sum ^ mix(size_bytes));
}

int pc_memory_digest(const struct pc_memory *memory, uint64_t *digest)
{
    uint64_t sum = 0;
    int result = walk_memory(memory, digest_visit, &sum);

    if (!result)
        *digest = digest_end(sum, memory->size_bytes);
    return result;
}

int pc_file_digest(int fd, uint64_t size_bytes, uint64_t page_bytes, uint64_t *digest)
{
    uint64_t sum = 0, *present;
    int result;

    if (!page_bytes || page_bytes % BLOCK_BYTES || size_bytes > INT64_MAX)
        return -EINVAL;
    present = new_map(size_bytes / page_bytes + 1);
    if (!present)
        return -ENOMEM;
    result = pc_file_present(fd, size_bytes, page_bytes, present);
    if (!result)
        result = walk(fd, NULL, size_bytes, page_bytes, present, digest_visit, &sum);
    if (!result)
        *digest = digest_end(sum, size_bytes);
    free(present);
    return result;
}

/* ---- dump ---- */

struct dump {
    int fd;
    uint64_t file_offset;
};

static int dump_visit(void *context, uint64_t offset, const uint8_t *data, uint64_t bytes)
{
    const struct dump *dump = context;
    uint64_t at = 0;

    while (at < bytes) {
        uint64_t from;
        int result;

        while (at < bytes && pc_is_zero(data + at, BLOCK_BYTES))
            at += BLOCK_BYTES;
        from = at;
        while (at < bytes && !pc_is_zero(data + at, BLOCK_BYTES))
            at += BLOCK_BYTES;
        result = write_full(dump->fd, dump->file_offset + offset + from, data + from, at - from);
        if (result)
            return result;
    }
    return 0;
}

static int write_zeros(int fd, uint64_t start, uint64_t stop)
{
    uint8_t *zeros = calloc(1, CHUNK_BYTES);
    int result = zeros ? 0 : -ENOMEM;

    for (uint64_t bytes; start < stop && !result; start += bytes) {
        bytes = least(CHUNK_BYTES, stop - start);
        result = write_full(fd, start, zeros, bytes);
    }
    free(zeros);
    return result;
}

/* Makes the range read as zeros, without blocks where the file system can, and the file long enough to have it. */
static int make_hole(int fd, uint64_t start, uint64_t stop)
{
    struct stat stat;
    uint64_t old;

    if (fstat(fd, &stat))
        return -errno;
    if (S_ISREG(stat.st_mode)) {
        old = (uint64_t)stat.st_size;
        if (old < stop && ftruncate(fd, (off_t)stop))
            return -errno;
        if (old <= start)
            return 0;
        old = least(old, stop);
    } else if (S_ISBLK(stat.st_mode)) {
        old = stop;
    } else {
        return -ESPIPE;
    }
    if (!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start, (off_t)(old - start)))
        return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL)
        return -errno;
    return write_zeros(fd, start, old);
}

int pc_memory_dump(const struct pc_memory *memory, int fd, uint64_t file_offset)
{
    struct dump dump = {.fd = fd, .file_offset = file_offset};
    int result;

    if (file_offset > INT64_MAX || memory->size_bytes > INT64_MAX - file_offset)
        return -EFBIG;
    result = make_hole(fd, file_offset, file_offset + memory->size_bytes);
    return result ? result : walk_memory(memory, dump_visit, &dump);
}

/* ---- load ---- */

/* Gives back what is in the first `bytes` of the memory, so that they read as zeros. */
static int clear_memory(const struct pc_memory *memory, uint64_t bytes)
{
    int result = memory->kind == PC_MEMORY_ANON
                     ? madvise(memory->base, bytes, MADV_DONTNEED)
                     : fallocate(memory->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes);

    return result ? -errno : 0;
}

static int load_run(const struct pc_memory *memory, uint64_t offset, const uint8_t *data, uint64_t bytes)
{
    uint8_t *to = (uint8_t *)memory->base + offset;
    uint64_t before, page = pc_page_bytes();

    /* A memfd takes it without page faults. hugetlbfs has no write(2), anonymous memory no file. */
    if (memory->kind == PC_MEMORY_MEMFD)
        return write_full(memory->fd, offset, data, bytes);
    /* One system call instead of a fault for each page. Where it fails the faults do it. */
    before = (uint64_t)(uintptr_t)to % page;
    (void)madvise(to - before, round_up(bytes + before, page), MADV_POPULATE_WRITE);
    memcpy(to, data, bytes);
    return 0;
}

int pc_memory_load(struct pc_memory *memory, int fd, uint64_t file_offset, uint64_t bytes)
{
    uint64_t end, start = file_offset, stop;
    uint8_t *chunk;
    off_t file_bytes;
    int result;

    if (bytes > memory->size_bytes || file_offset > INT64_MAX || bytes > INT64_MAX - file_offset ||
        (memory->kind != PC_MEMORY_MEMFD && !memory->base))
        return -EINVAL;
    if (!bytes)
        return 0;
    end = file_offset + bytes;
    file_bytes = lseek(fd, 0, SEEK_END);
    if (file_bytes < 0)
        return -errno;
    if ((uint64_t)file_bytes < end && end - (uint64_t)file_bytes >= memory->page_bytes)
        return -ENODATA;
    result = clear_memory(memory, round_up(bytes, memory->page_bytes));
    if (result)
        return result;
    chunk = aligned_alloc(BLOCK_BYTES, CHUNK_BYTES);
    if (!chunk)
        return -ENOMEM;
    while ((result = next_data(fd, &start, &stop, end)) > 0) {
        uint64_t skew = (start - file_offset) % BLOCK_BYTES;

        start -= skew; /* blocks of the memory, wherever the file's data begins */
        while (start < stop && result >= 0) {
            uint64_t n = least(CHUNK_BYTES, end - start), whole = round_up(n, BLOCK_BYTES), at = 0;

            n = least(n, round_up(stop - start, BLOCK_BYTES));
            whole = least(whole, round_up(n, BLOCK_BYTES));
            result = read_full(fd, start, chunk, n, end, memory->page_bytes);
            if (result)
                break;
            memset(chunk + n, 0, whole - n);
            while (at < whole && !result) {
                uint64_t from;

                while (at < whole && pc_is_zero(chunk + at, BLOCK_BYTES))
                    at += BLOCK_BYTES;
                from = at;
                while (at < whole && !pc_is_zero(chunk + at, BLOCK_BYTES))
                    at += BLOCK_BYTES;
                if (at > from)
                    result = load_run(memory, start - file_offset + from, chunk + from, at - from);
            }
            start += n;
        }
        if (result < 0)
            break;
        if (start < stop)
            start = stop;
    }
    free(chunk);
    return result;
}

/* ---- bytes ---- */

void pc_bytes_copy(uint64_t to_address, uint64_t from_address, uint64_t bytes)
{
    memcpy((void *)(uintptr_t)to_address, (const void *)(uintptr_t)from_address, bytes);
}
