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
        for (uint64_t offset = first * page_bytes, stop = pc_least(stop_page * page_bytes, size_bytes), bytes;
             offset < stop && !result; offset += bytes) {
            bytes = pc_least(CHUNK_BYTES, stop - offset);
            if (address) {
                result = visit(context, offset, address + offset, bytes);
                continue;
            }
            result = pc_read_full(fd, offset, chunk, bytes, size_bytes, page_bytes);
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

static int walk_memory(const struct pc_memory *memory, visit_fn *visit, void *context)
{
    const uint8_t *address = memory->kind == PC_MEMORY_ANON ? memory->base : NULL;
    uint64_t *present = pc_map_new(memory->size_bytes / memory->page_bytes);
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
    present = pc_map_new(size_bytes / page_bytes + 1);
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
        result = pc_pwrite_all(dump->fd, data + from, at - from, dump->file_offset + offset + from);
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
    struct dump dump = {.fd = fd, .file_offset = file_offset};
    int result;

    if (file_offset > INT64_MAX || memory->size_bytes > INT64_MAX - file_offset)
        return -EFBIG;
    result = make_hole(fd, file_offset, file_offset + memory->size_bytes);
    return result ? result : walk_memory(memory, dump_visit, &dump);
}

/* ---- load ---- */

static int load_run(const struct pc_memory *memory, uint64_t offset, const uint8_t *data, uint64_t bytes)
{
    uint8_t *to = (uint8_t *)memory->base + offset;
    uint64_t before, page = pc_page_bytes();

    /* A memfd takes it without page faults. hugetlbfs has no write(2), anonymous memory no file. */
    if (memory->kind == PC_MEMORY_MEMFD)
        return pc_pwrite_all(memory->fd, data, bytes, offset);
    /* One system call instead of a fault for each page. Where it fails the faults do it. */
    before = (uint64_t)(uintptr_t)to % page;
    (void)madvise(to - before, pc_round_up(bytes + before, page), MADV_POPULATE_WRITE);
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
    result = pc_memory_discard(memory, (uintptr_t)memory->base, pc_round_up(bytes, memory->page_bytes));
    if (result)
        return result;
    chunk = aligned_alloc(BLOCK_BYTES, CHUNK_BYTES);
    if (!chunk)
        return -ENOMEM;
    while ((result = pc_next_data(fd, &start, &stop, end)) > 0) {
        uint64_t skew = (start - file_offset) % BLOCK_BYTES;

        start -= skew; /* blocks of the memory, wherever the file's data begins */
        while (start < stop && result >= 0) {
            uint64_t n = pc_least(CHUNK_BYTES, end - start), whole = pc_round_up(n, BLOCK_BYTES), at = 0;

            n = pc_least(n, pc_round_up(stop - start, BLOCK_BYTES));
            whole = pc_least(whole, pc_round_up(n, BLOCK_BYTES));
            result = pc_read_full(fd, start, chunk, n, end, memory->page_bytes);
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
