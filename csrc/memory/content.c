/* SPDX-License-Identifier: Apache-2.0
 *
 * The content of memory and files: walked over, digested, dumped, loaded.
 *
 * The digest. Content is cut into 4 KiB blocks, whatever the page size, so that machines on huge and on ordinary pages
 * compare equal. A block that is not all zero contributes mix(mix(index + C) ^ crc32c(block)); contributions are added modulo
 * 2^64, and the sum is mixed with the size. The mixer is a bijection that spreads every bit (the finalizer of splitmix64).
 * Sums commute and zero blocks contribute nothing: hence absent memory need not be visited. It finds accidents, not attackers.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/runtime.h"
#include "memory/internal.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

/* ---- walking over content ---- */

typedef int visit_fn(void *context, uint64_t offset, const uint8_t *data, uint64_t bytes);

struct origin { /* where offset 0 is: at an address, or in another process, where these are not NULL, else in a file */
    int fd;
    uint64_t file_offset;
    const uint8_t *address;
    const struct pc_remote *remote;
};

/* Shows `visit` everything that may not be zero, in order, in pieces that begin at a multiple of BLOCK_BYTES; zeros follow the
 * last byte of an odd size up to the block's end. */
static int walk(const struct origin *origin, uint64_t size_bytes, uint64_t page_bytes, const uint64_t *present, visit_fn *visit,
                void *context)
{
    uint64_t pages = size_bytes / page_bytes + (size_bytes % page_bytes != 0), first = 0, stop_page;
    uint8_t *chunk = NULL;
    int result = 0;

    if (!origin->address) {
        chunk = aligned_alloc(BLOCK_BYTES, CHUNK_BYTES);
        if (!chunk)
            return -ENOMEM;
    }
    while (!result && (first = pc_bitmap_next(present, pages, first, 1)) < pages) {
        stop_page = pc_bitmap_next(present, pages, first, 0);
        for (uint64_t offset = first * page_bytes, stop = pc_least(stop_page * page_bytes, size_bytes), bytes;
             offset < stop && !result; offset += bytes) {
            bytes = pc_least(CHUNK_BYTES, stop - offset);
            if (origin->address) {
                result = visit(context, offset, origin->address + offset, bytes);
                continue;
            }
            result = origin->remote ? pc_remote_read(origin->remote, offset, chunk, bytes)
                                    : pc_read_full(origin->fd, origin->file_offset + offset, chunk, bytes,
                                                   origin->file_offset + size_bytes, page_bytes);
            if (result)
                break;
            if (bytes % BLOCK_BYTES)
                memset(chunk + bytes, 0, BLOCK_BYTES - bytes % BLOCK_BYTES);
            result = visit(context, offset, chunk, pc_round_up(bytes, BLOCK_BYTES));
        }
        first = stop_page;
    }
    free(chunk);
    return result;
}

static int walk_file(int fd, uint64_t file_offset, uint64_t bytes, uint64_t page_bytes, visit_fn *visit, void *context)
{
    struct origin origin = {.fd = fd, .file_offset = file_offset};
    uint64_t *present = pc_map_new(bytes / page_bytes + 1);
    int result;

    if (!present)
        return -ENOMEM;
    result = pc_range_present(fd, file_offset, file_offset, bytes, page_bytes, present);
    if (!result)
        result = walk(&origin, bytes, page_bytes, present, visit, context);
    free(present);
    return result;
}

static int walk_memory(const struct pc_memory *memory, visit_fn *visit, void *context)
{
    struct origin origin = {.fd = memory->fd,
                            .address = memory->kind == PC_MEMORY_ANON ? memory->base : NULL,
                            .remote = memory->remote};
    uint64_t *present = pc_map_new(memory->size_bytes / memory->page_bytes);
    int result;

    if (!present)
        return -ENOMEM;
    result = pc_memory_present(memory, present);
    if (!result)
        result = walk(&origin, memory->size_bytes, memory->page_bytes, present, visit, context);
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
    uint64_t sum = 0;
    int result;

    if (!page_bytes || page_bytes % BLOCK_BYTES || size_bytes > INT64_MAX)
        return -EINVAL;
    result = pc_file_holds(fd, size_bytes, page_bytes);
    if (!result)
        result = walk_file(fd, 0, size_bytes, page_bytes, digest_visit, &sum);
    if (!result)
        *digest = digest_end(sum, size_bytes);
    return result;
}

/* ---- copies ---- */

struct target { /* where offset 0 comes to be: in a file, or at an address where that is not NULL */
    int fd;
    uint64_t file_offset;
    uint8_t *address;
};

static int write_run(const struct target *target, uint64_t offset, const uint8_t *data, uint64_t bytes)
{
    uint64_t before, page = pc_page_bytes();
    uint8_t *to;

    if (!target->address)
        return pc_pwrite_all(target->fd, data, bytes, target->file_offset + offset);
    to = target->address + offset;
    /* One system call instead of a fault for each page. Where it fails the faults do it. */
    before = (uint64_t)(uintptr_t)to % page;
    (void)madvise(to - before, pc_round_up(bytes + before, page), MADV_POPULATE_WRITE);
    memcpy(to, data, bytes);
    return 0;
}

/* Writes the blocks that are not zero. */
static int copy_visit(void *context, uint64_t offset, const uint8_t *data, uint64_t bytes)
{
    int result = 0;

    for (uint64_t at = 0, from; at < bytes && !result;) {
        while (at < bytes && pc_is_zero(data + at, BLOCK_BYTES))
            at += BLOCK_BYTES;
        from = at;
        while (at < bytes && !pc_is_zero(data + at, BLOCK_BYTES))
            at += BLOCK_BYTES;
        if (at > from)
            result = write_run(context, offset + from, data + from, at - from);
    }
    return result;
}

static int write_zeros(int fd, uint64_t start, uint64_t stop)
{
    uint8_t *zeros = calloc(1, CHUNK_BYTES);
    int result = zeros ? 0 : -ENOMEM;

    for (uint64_t bytes; start < stop && !result; start += bytes) {
        bytes = pc_least(CHUNK_BYTES, stop - start);
        result = pc_pwrite_all(fd, zeros, bytes, start);
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
        old = pc_least(old, stop);
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
    struct target target = {.fd = fd, .file_offset = file_offset};
    int result;

    if (file_offset > INT64_MAX || memory->size_bytes > INT64_MAX - file_offset)
        return -EFBIG;
    result = make_hole(fd, file_offset, file_offset + memory->size_bytes);
    return result ? result : walk_memory(memory, copy_visit, &target);
}

int pc_memory_load(struct pc_memory *memory, int fd, uint64_t file_offset, uint64_t bytes)
{
    /* A memfd takes it without page faults. hugetlbfs has no write(2), anonymous memory no file. */
    struct target target = {.fd = memory->fd, .address = memory->kind == PC_MEMORY_MEMFD ? NULL : memory->base};
    int result;

    if (bytes > memory->size_bytes || file_offset > INT64_MAX || bytes > INT64_MAX - file_offset ||
        (memory->kind != PC_MEMORY_MEMFD && !memory->base))
        return -EINVAL;
    if (!bytes)
        return 0;
    result = pc_file_holds(fd, file_offset + bytes, memory->page_bytes);
    if (!result)
        result = pc_memory_discard(memory, (uintptr_t)memory->base, pc_round_up(bytes, memory->page_bytes));
    return result ? result : walk_file(fd, file_offset, bytes, memory->page_bytes, copy_visit, &target);
}
