/* SPDX-License-Identifier: Apache-2.0
 *
 * What is in memory and in files.
 *
 * Looking must not touch. A read through a mapping fills a hole of a memfd with a page, takes a fault where a userfaultfd is
 * registered, and makes eight gibibytes of an idle machine resident. So what is there is learnt from the side: SEEK_DATA and
 * SEEK_HOLE on files and memfds, the page tables (PAGEMAP_SCAN, /proc/self/pagemap) for anonymous memory; and content that has a
 * file descriptor is read with pread(2), which leaves holes alone.
 *
 * hugetlbfs knows no holes: SEEK_DATA calls everything data. There the page tables tell what this mapping has used, the inode how
 * much is allocated in all, and only when these differ (pages written through another mapping) the rest is read.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory/internal.h"
#include "postcopy/uffd.h"

#define PAGEMAP_PRESENT ((uint64_t)1 << 63)
#define PAGEMAP_SWAPPED ((uint64_t)1 << 62)

int pc_read_full(int fd, uint64_t offset, void *buffer, uint64_t bytes, uint64_t end, uint64_t slack)
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

static void set_bytes(uint64_t *words, uint64_t start, uint64_t stop, uint64_t page_bytes)
{
    if (stop > start)
        pc_bitmap_set_range(words, start / page_bytes, (stop - 1) / page_bytes - start / page_bytes + 1);
}

int pc_file_holds(int fd, uint64_t end, uint64_t slack)
{
    off_t file_bytes = lseek(fd, 0, SEEK_END);

    if (file_bytes < 0)
        return -errno;
    return (uint64_t)file_bytes < end && end - (uint64_t)file_bytes >= slack ? -ENODATA : 0;
}

int pc_range_present(int fd, uint64_t origin, uint64_t first_byte, uint64_t bytes, uint64_t page_bytes, uint64_t *words)
{
    uint64_t end = first_byte + bytes;
    off_t data, hole;

    for (uint64_t at = first_byte; at < end; at = (uint64_t)hole) {
        data = lseek(fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno != ENXIO && errno != EINVAL && errno != ENOTSUP)
            return -errno;
        if (data < 0 && errno != ENXIO) { /* a file system that does not tell has data everywhere */
            set_bytes(words, at - origin, end - origin, page_bytes);
            return 0;
        }
        if (data < 0 || (uint64_t)data >= end)
            return 0;
        hole = lseek(fd, data, SEEK_HOLE);
        if (hole < 0 && errno != ENXIO)
            return -errno;
        if (hole < 0) /* the file was cut off just now; reading will say so */
            hole = (off_t)end;
        set_bytes(words, (uint64_t)data - origin, pc_least((uint64_t)hole, end) - origin, page_bytes);
    }
    return 0;
}

int pc_file_present(int fd, uint64_t size_bytes, uint64_t page_bytes, uint64_t *present_words)
{
    int error = page_bytes && size_bytes <= INT64_MAX ? pc_file_holds(fd, size_bytes, page_bytes) : -EINVAL;

    return error ? error : pc_range_present(fd, 0, 0, size_bytes, page_bytes, present_words);
}

/* By PAGEMAP_SCAN. -ENOTTY on kernels before 6.7. Page 0 is at `origin`. */
static int scan_mapping(int pagemap, uint64_t origin, uint64_t address, uint64_t bytes, uint64_t page_bytes, uint64_t *words)
{
    struct pc_pagemap_region regions[256];
    struct pc_pagemap_query query = {
        .start = address,
        .end = address + bytes,
        /* Present or swapped out, but not the shared zero page that a read of a hole maps. */
        .inverted = PC_PAGE_PFNZERO,
        .all_of = PC_PAGE_PFNZERO,
        .any_of = PC_PAGE_PRESENT | PC_PAGE_SWAPPED,
    };

    while (query.start < query.end) {
        uint64_t walk_end = 0;
        int64_t got = pc_pagemap_scan(pagemap, &query, regions, PC_ARRAY_LENGTH(regions), &walk_end);

        if (got == -EINTR)
            continue;
        if (got < 0)
            return (int)got;
        for (int64_t i = 0; i < got; i++)
            set_bytes(words, regions[i].start - origin, regions[i].end - origin, page_bytes);
        if (walk_end <= query.start)
            return -EIO;
        query.start = walk_end;
    }
    return 0;
}

/* By /proc/self/pagemap: the same, except that it cannot tell the zero page. */
static int read_pagemap(int pagemap, uint64_t origin, uint64_t address, uint64_t bytes, uint64_t page_bytes, uint64_t *words)
{
    uint64_t entries[512], system_page = pc_page_bytes(), offset = address - origin;

    for (uint64_t page = 0; page < bytes / system_page;) {
        uint64_t n = pc_least(PC_ARRAY_LENGTH(entries), bytes / system_page - page);
        ssize_t got = pread(pagemap, entries, n * sizeof(entries[0]),
                            (off_t)((address / system_page + page) * sizeof(entries[0])));

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got ? -errno : -EIO;
        n = (uint64_t)got / sizeof(entries[0]);
        for (uint64_t i = 0; i < n; i++)
            if (entries[i] & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED))
                set_bytes(words, offset + (page + i) * system_page, offset + (page + i + 1) * system_page, page_bytes);
        page += n;
    }
    return 0;
}

uint64_t pc_unknown_bytes(uint64_t size_bytes, uint64_t page_bytes, const uint64_t *words, uint64_t *first, uint64_t between)
{
    uint64_t pages = size_bytes / page_bytes, page = pc_bitmap_next(words, pages, *first / page_bytes, 0), end = page, next = page;

    *first = page * page_bytes;
    while (next < pages && (next == page || next - end < between)) {
        end = pc_bitmap_next(words, pages, next, 1);
        next = pc_bitmap_next(words, pages, end, 0);
    }
    return (end - page) * page_bytes;
}

int pc_mapping_present(int pagemap, uint64_t origin, uint64_t address, uint64_t bytes, uint64_t page_bytes, uint64_t *words)
{
    int result = scan_mapping(pagemap, origin, address, bytes, page_bytes, words);

    if (result == -ENOTTY || result == -EINVAL)
        result = read_pagemap(pagemap, origin, address, bytes, page_bytes, words);
    return result;
}

/* Pages in the page tables of this process. Without /proc: -errno. (mincore(2) is no substitute: it calls a page that was
 * swapped out absent, and its content would be taken for zeros.) */
static int mapping_present(const struct pc_memory *memory, uint64_t *words)
{
    uint64_t base = (uint64_t)(uintptr_t)memory->base, first = 0, bytes;
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    int result = 0;

    if (pagemap < 0)
        return -errno;
    for (; !result && (bytes = pc_unknown_bytes(memory->size_bytes, memory->page_bytes, words, &first, PC_MAPPED_BETWEEN));
         first += bytes)
        result = pc_mapping_present(pagemap, base, base + first, bytes, memory->page_bytes, words);
    close(pagemap);
    return result;
}

/* What the memory file holds. */
static int memfd_present(const struct pc_memory *memory, uint64_t *words)
{
    uint64_t first = 0, bytes;
    int result = pc_file_holds(memory->fd, memory->size_bytes, memory->page_bytes);

    for (; !result && (bytes = pc_unknown_bytes(memory->size_bytes, memory->page_bytes, words, &first, 1)); first += bytes)
        result = pc_range_present(memory->fd, 0, first, bytes, memory->page_bytes, words);
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
            uint64_t bytes = pc_least(CHUNK_BYTES, stop - offset);

            result = pc_read_full(memory->fd, offset, chunk, bytes, memory->size_bytes, 0);
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
    if (memory->remote)
        return pc_remote_present(memory->remote, present_words);
    switch (memory->kind) {
    case PC_MEMORY_MEMFD:
        return memfd_present(memory, present_words);
    case PC_MEMORY_HUGETLB:
        return huge_present(memory, present_words);
    case PC_MEMORY_ANON:
        return memory->base ? mapping_present(memory, present_words) : -EINVAL;
    default:
        return -EINVAL;
    }
}

/* The end, at most `limit`, of the data that begins at a page, or -errno. `behind`: how many pages from `limit` on are known to be data:
 * SEEK_HOLE looks at those too, each in a quarter of the time that a system call takes. */
static int64_t data_end(const struct pc_memory *memory, uint64_t page, uint64_t limit, uint64_t behind)
{
    uint64_t unit = memory->page_bytes;
    off_t hole;

    if (behind / 4 > limit - page) {
        do
            page++;
        while (page < limit && lseek(memory->fd, (off_t)(page * unit), SEEK_DATA) == (off_t)(page * unit));
        return (int64_t)page;
    }
    hole = lseek(memory->fd, (off_t)(page * unit), SEEK_HOLE);
    if (hole < 0)
        return errno == ENXIO ? -ENODATA : -errno; /* it was cut off just now */
    return (int64_t)pc_least(pc_round_up((uint64_t)hole, unit) / unit, limit);
}

int pc_memory_present_more(const struct pc_memory *memory, uint64_t *present, uint64_t *more)
{
    uint64_t pages = memory->size_bytes / memory->page_bytes, page = 0;
    uint64_t known = 0, unknown = 0; /* the next pages that are known, [known, unknown), as long as they are beyond `page` */
    int error = memory->kind == PC_MEMORY_MEMFD ? pc_file_holds(memory->fd, memory->size_bytes, memory->page_bytes) : -EINVAL;

    while (!error && (page = pc_bitmap_next(present, pages, page, 0)) < pages) {
        off_t data = lseek(memory->fd, (off_t)(page * memory->page_bytes), SEEK_DATA);
        int64_t end;

        if (data < 0)
            return errno == ENXIO ? 0 : -errno;
        page = (uint64_t)data / memory->page_bytes;
        if (page >= pages)
            return 0;
        if (pc_bitmap_next(present, page + 1, page, 1) == page)
            continue;
        if (known <= page) {
            known = pc_bitmap_next(present, pages, page, 1);
            unknown = pc_bitmap_next(present, pages, known, 0);
        }
        end = data_end(memory, page, known, unknown - known);
        if (end < 0)
            return (int)end;
        pc_bitmap_set_range(present, page, (uint64_t)end - page);
        pc_bitmap_set_range(more, page, (uint64_t)end - page);
        page = (uint64_t)end;
    }
    return error;
}

int pc_memory_resident(const struct pc_memory *memory, uint64_t *resident_bytes)
{
    uint64_t pages = memory->size_bytes / memory->page_bytes, *words;
    struct stat stat;
    int result;

    if (memory->kind != PC_MEMORY_ANON && !memory->remote) {
        if (fstat(memory->fd, &stat))
            return -errno;
        *resident_bytes = (uint64_t)stat.st_blocks * 512;
        return 0;
    }
    words = pc_map_new(pages);
    if (!words)
        return -ENOMEM;
    result = pc_memory_present(memory, words);
    if (!result)
        *resident_bytes = pc_bitmap_count(words, pages) * memory->page_bytes;
    free(words);
    return result;
}
