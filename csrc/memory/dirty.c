/* SPDX-License-Identifier: Apache-2.0
 *
 * The dirty log: which pages of a machine's memory were written since it was last asked.
 *
 * The memory is registered with a userfaultfd for write-protection, with WP_ASYNC: the kernel lifts the protection of a page at the
 * first write by itself, wakes nothing and sends no event. PAGEMAP_SCAN then tells which pages are there without protection, that
 * is, were written, and protects them again in the same step; the next write of any thread is seen by the next scan. (Linux 6.7;
 * KVM's own page tables follow these. As no fault ever waits, a userfaultfd for faults of user mode only is as good.)
 *
 * A page that is in no page table was not written, with one exception: shared memory is taken out of them when it is swapped out, and
 * leaves no trace there unless it was protected. So for a memfd the scan takes an empty entry for a written page too, and the file
 * says which of those it holds. That scan protects empty entries by filling them, and makes page tables for it: hence it looks only
 * at parts of the memory of which the file holds something, and a sparse machine costs what is in it. In a part that it has looked at
 * before every empty entry was protected: one that is not has been written to since, and is in the log also when the file does not hold
 * the page any more. (Who gives back what he has just filled with zeros expects to find zeros, and not what was there before.)
 *
 * What a page table does not show is marked: in a map that `collect` takes at the same time, before it scans. A writer marks after it
 * has written, so that a mark which is taken too early is of a write that the scan's caller reads.
 *
 * Of another process it is the same, by a userfaultfd of that process and the file of its page tables. A scan of these does not say
 * when it has ended, it finds nothing then: reading them does.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <unistd.h>

#include "core/bits.h"
#include "core/runtime.h"
#include "memory/internal.h"
#include "postcopy/uffd.h"
#include "uffd/uffd_abi.h"

#define REGIONS 2048 /* of one scan */
#define PART_BYTES (UINT64_C(16) << 20)
#define NEEDED                                                                                                                  \
    (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC)
#define EVENTS /* nobody would read them, and who causes one waits */                                                          \
    (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP)

struct logged {
    struct pc_memory memory;
    uint64_t address; /* in the process that writes */
    uint64_t *marks; /* atomic */
    uint64_t words;
    uint64_t *known; /* parts that have been looked at, of a memfd; behind the marks */
    uint64_t parts;
};

struct pc_dirty_log {
    int uffd, pagemap;
    uint32_t count; /* atomic: published after the memory */
    struct logged memories[PC_DIRTY_LOG_MEMORIES];
};

static uint64_t maps_bytes(const struct logged *logged)
{
    return (logged->words + pc_bitmap_words(logged->parts)) * sizeof(uint64_t);
}

int pc_dirty_log_new(struct pc_dirty_log **out)
{
    struct pc_dirty_log *log = calloc(1, sizeof(*log));

    if (!log)
        return -ENOMEM;
    log->uffd = log->pagemap = -1;
    *out = log;
    return 0;
}

int pc_dirty_log_new_of(int uffd, int pagemap, struct pc_dirty_log **out, char *error, size_t error_bytes)
{
    uint64_t features = NEEDED;
    struct pc_dirty_log *log;
    int result = pc_uffd_features(uffd, &features); /* taken for right where /proc does not tell */

    if (result == -EINVAL || result == -EBADF)
        return pc_fail(EINVAL, error, error_bytes, "dirty log: the descriptor is no userfaultfd");
    if ((features & NEEDED) != NEEDED || features & EVENTS)
        return pc_fail(EINVAL, error, error_bytes, "dirty log: the userfaultfd has other features than it must: %#llx",
                       (unsigned long long)features);
    result = pc_dirty_log_new(&log);
    if (result)
        return pc_fail(-result, error, error_bytes, "dirty log: no memory for it");
    log->uffd = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
    log->pagemap = log->uffd < 0 ? -1 : fcntl(pagemap, F_DUPFD_CLOEXEC, 0);
    if (log->pagemap >= 0) {
        *out = log;
        return 0;
    }
    result = errno;
    pc_dirty_log_free(log);
    return pc_fail(result, error, error_bytes, "dirty log: %s", strerror(result));
}

/* The process, or the program that it was, whose page tables are looked at. */
static bool has_ended(const struct pc_dirty_log *log, const struct logged *logged)
{
    uint64_t entry;

    return pread(log->pagemap, &entry, sizeof(entry), (off_t)(logged->address / pc_page_bytes() * sizeof(entry))) == 0;
}

/* Whether memory that is registered is in the page tables that the log looks at: 0, or -EPERM, where they are another process's. */
static int look_for(const struct pc_dirty_log *log, const struct logged *logged)
{
    struct pc_pagemap_query query = {.start = logged->address,
                                     .end = logged->address + logged->memory.page_bytes,
                                     .all_of = PC_PAGE_WPALLOWED,
                                     .returned = PC_PAGE_WPALLOWED};
    struct pc_pagemap_region region;
    uint64_t walk_end;
    int64_t found = pc_pagemap_scan(log->pagemap, &query, &region, 1, &walk_end);

    if (!found)
        return has_ended(log, logged) ? -ESRCH : -EPERM;
    return found < 0 ? (int)found : 0;
}

/* Write-protects what was written of a part of a memory, and adds it to `words` unless that is NULL. `known`: all of it was protected
 * before. */
static int scan_part(const struct pc_dirty_log *log, const struct logged *logged, uint64_t first_byte, uint64_t bytes, bool known,
                     struct pc_pagemap_region *regions, uint64_t *words)
{
    const struct pc_memory *memory = &logged->memory;
    const uint64_t base = logged->address, there = PC_PAGE_PRESENT | PC_PAGE_SWAPPED;
    bool evictable = memory->kind == PC_MEMORY_MEMFD;
    struct pc_pagemap_query query = {
        .start = base + first_byte,
        .end = base + first_byte + bytes,
        .flags = PC_SCAN_WP_MATCHING | PC_SCAN_CHECK_WPASYNC,
        .all_of = PC_PAGE_WRITTEN,
        .any_of = evictable ? 0 : there,
        .returned = PC_PAGE_WRITTEN | there,
    };

    while (query.start < query.end) {
        uint64_t walk_end = 0;
        int64_t got = pc_pagemap_scan(log->pagemap, &query, regions, REGIONS, &walk_end);

        if (got == -EINTR)
            continue;
        if (got < 0)
            return (int)got;
        if (walk_end <= query.start)
            return -EIO;
        for (int64_t i = 0; i < got && words; i++) {
            uint64_t first = regions[i].start - base, end = regions[i].end - base, page = first / memory->page_bytes;
            int error = 0;

            if (known || regions[i].categories & there)
                pc_bitmap_set_range(words, page, (end - 1) / memory->page_bytes + 1 - page);
            else
                error = pc_range_present(memory->fd, 0, first, end - first, memory->page_bytes, words);
            if (error)
                return error;
        }
        query.start = walk_end;
    }
    return 0;
}

/* Where the next part begins, from `first` on, that has to be looked at. */
static uint64_t next_part(const struct logged *logged, uint64_t first)
{
    const struct pc_memory *memory = &logged->memory;
    uint64_t known = pc_bitmap_next(logged->known, logged->parts, first / PART_BYTES, 1) * PART_BYTES;
    off_t data;

    if (memory->kind != PC_MEMORY_MEMFD || known == first)
        return first;
    data = lseek(memory->fd, (off_t)first, SEEK_DATA);
    if (data < 0) /* where the file has nothing, nothing was written */
        return errno == ENXIO ? known : first;
    return pc_least(known, (uint64_t)data - (uint64_t)data % PART_BYTES);
}

/* The same for all of a memory. */
static int scan(const struct pc_dirty_log *log, const struct logged *logged, uint64_t *words)
{
    const struct pc_memory *memory = &logged->memory;
    struct pc_pagemap_region *regions = malloc(REGIONS * sizeof(*regions));
    bool in_parts = memory->kind == PC_MEMORY_MEMFD;
    int error = regions ? 0 : -ENOMEM;

    for (uint64_t first = 0, bytes; !error && (first = next_part(logged, first)) < memory->size_bytes; first += bytes) {
        bool known = in_parts && pc_bits_test(logged->known, first / PART_BYTES);

        bytes = in_parts ? PART_BYTES : memory->size_bytes;
        error = scan_part(log, logged, first, pc_least(bytes, memory->size_bytes - first), known, regions, words);
        if (!error && in_parts)
            pc_bitmap_set_range(logged->known, first / PART_BYTES, 1);
    }
    free(regions);
    return !error && has_ended(log, logged) ? -ESRCH : error;
}

/* What the first memory of a log needs. 0, or an error with its line. */
static int open_files(struct pc_dirty_log *log, char *error, size_t error_bytes)
{
    struct pc_uffd_api api;
    int result = pc_uffd_probe(PC_UFFD_ANY, &api);

    if (!result && (api.features & NEEDED) != NEEDED)
        return pc_fail(EOPNOTSUPP, error, error_bytes,
                       "dirty log: this kernel cannot tell what is written (WP_ASYNC of userfaultfd, Linux 6.7)");
    if (!result)
        result = log->uffd = pc_uffd_open(api.how, NEEDED, &api);
    if (result < 0)
        return pc_fail(-result, error, error_bytes, "dirty log: cannot open a userfaultfd: %s", strerror(-result));
    log->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (log->pagemap >= 0)
        return 0;
    result = errno;
    close(log->uffd);
    log->uffd = -1;
    return pc_fail(result, error, error_bytes, "dirty log: cannot open /proc/self/pagemap: %s", strerror(result));
}

/* From here on its writes are seen. */
static int protect(const struct pc_dirty_log *log, const struct logged *logged, char *error, size_t error_bytes)
{
    uint64_t bytes = logged->memory.size_bytes;
    int result = pc_uffd_register(log->uffd, logged->address, bytes, PC_UFFD_WP, NULL);

    if (result == -EBUSY)
        return pc_fail(EBUSY, error, error_bytes, "dirty log: a part of the memory is registered with another userfaultfd");
    /* (Of an address that is not registered this changes nothing.) */
    if (result && pc_uffd_writeprotect(log->uffd, logged->address, logged->memory.page_bytes, 0) == -ESRCH)
        return pc_fail(ESRCH, error, error_bytes, "dirty log: the process has ended");
    if (result)
        return pc_fail(-result, error, error_bytes, "dirty log: cannot register the memory with a userfaultfd: %s",
                       strerror(-result));
    result = look_for(log, logged);
    if (!result)
        result = scan(log, logged, NULL);
    if (!result)
        return 0;
    (void)pc_uffd_unregister(log->uffd, logged->address, bytes);
    if (result == -ENOTTY)
        return pc_fail(EOPNOTSUPP, error, error_bytes, "dirty log: this kernel has no PAGEMAP_SCAN (Linux 6.7)");
    return pc_fail(-result, error, error_bytes, "dirty log: cannot write-protect the memory: %s", strerror(-result));
}

int pc_dirty_log_add(struct pc_dirty_log *log, const struct pc_memory *memory, char *error, size_t error_bytes)
{
    return pc_dirty_log_add_at(log, memory, (uint64_t)(uintptr_t)memory->base, error, error_bytes);
}

int pc_dirty_log_add_at(struct pc_dirty_log *log, const struct pc_memory *memory, uint64_t address, char *error, size_t error_bytes)
{
    struct logged *logged = &log->memories[log->count];
    int result;

    if (log->count == PC_DIRTY_LOG_MEMORIES)
        return pc_fail(ENOSPC, error, error_bytes, "dirty log: it has %d memories already", PC_DIRTY_LOG_MEMORIES);
    if (!address || !memory->page_bytes || !memory->size_bytes || memory->size_bytes % memory->page_bytes)
        return pc_fail(EINVAL, error, error_bytes, "dirty log: the memory is not mapped");
    result = log->uffd < 0 ? open_files(log, error, error_bytes) : 0;
    if (result)
        return result;
    logged->memory = *memory;
    logged->address = address;
    logged->words = pc_bitmap_words(memory->size_bytes / memory->page_bytes);
    logged->parts = (memory->size_bytes + PART_BYTES - 1) / PART_BYTES;
    logged->marks = pc_buffer_new(maps_bytes(logged));
    if (!logged->marks)
        return pc_fail(ENOMEM, error, error_bytes, "dirty log: no memory for the map of its marks");
    logged->known = logged->marks + logged->words;
    result = protect(log, logged, error, error_bytes);
    if (result) {
        pc_buffer_free(logged->marks, maps_bytes(logged));
        return result;
    }
    __atomic_store_n(&log->count, log->count + 1, __ATOMIC_RELEASE);
    return (int)log->count - 1;
}

int64_t pc_dirty_log_collect(struct pc_dirty_log *log, uint32_t index, uint64_t *words)
{
    const struct logged *logged;
    uint64_t pages, before;
    int error;

    if (index >= __atomic_load_n(&log->count, __ATOMIC_ACQUIRE))
        return -EINVAL;
    logged = &log->memories[index];
    pages = logged->memory.size_bytes / logged->memory.page_bytes;
    before = pc_bitmap_count(words, pages);
    for (uint64_t word = 0; word < logged->words; word++)
        if (pc_bits_word(logged->marks, word))
            words[word] |= __atomic_exchange_n(&logged->marks[word], 0, __ATOMIC_SEQ_CST);
    error = scan(log, logged, words);
    return error ? error : (int64_t)(pc_bitmap_count(words, pages) - before);
}

void pc_dirty_log_mark(struct pc_dirty_log *log, uint64_t address, uint64_t bytes)
{
    uint32_t count = __atomic_load_n(&log->count, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < count; i++) {
        const struct logged *logged = &log->memories[i];
        uint64_t base = logged->address, unit = logged->memory.page_bytes, first, pages;
        uint64_t from = address > base ? address : base, to = pc_least(address + bytes, base + logged->memory.size_bytes);

        if (from >= to)
            continue;
        first = (from - base) / unit;
        pages = (to - base - 1) / unit + 1 - first;
        for (uint64_t word = first / 64; word * 64 < first + pages; word++)
            (void)pc_atomic_set(logged->marks, word, pc_bits_mask(word, first, pages));
    }
}

void pc_dirty_log_free(struct pc_dirty_log *log)
{
    for (uint32_t i = 0; i < log->count; i++) {
        const struct logged *logged = &log->memories[i];

        (void)pc_uffd_unregister(log->uffd, logged->address, logged->memory.size_bytes);
        pc_buffer_free(logged->marks, maps_bytes(logged));
    }
    if (log->uffd >= 0)
        close(log->uffd);
    if (log->pagemap >= 0)
        close(log->pagemap);
    free(log);
}
