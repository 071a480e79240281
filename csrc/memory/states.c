/* SPDX-License-Identifier: Apache-2.0
 *
 * What has become of each page, where it outlives the pager that wrote it.
 *
 * A pager may be killed at any instruction. What the next one must know is in a sealed memfd: for each page whether it was
 * claimed, is received, is zero (pager.c says what the words mean). Once the machine may run bits are only ever set, one atomic or
 * each, so there is no half-written state. (Before that pages may be forgotten, pc_pager_forget: a pager that dies meanwhile ends its
 * migration, which has lost nothing yet.) But between `claimed` and `received` lies the placement itself, and a pager that died there
 * leaves pages of which the map alone does not tell whether they were placed.
 *
 * Private memory: nothing needs to be known. Such a page is fetched again, and UFFDIO_COPY says EEXIST where it is there, placed before
 * and perhaps written to; only what was never placed is placed then. (What its process threw away in between is in the journal, see
 * states.h.) So its claims are taken back, from any process: pc_states_unclaim.
 *
 * Pages of shared memory are settled by looking at the machine's page table. UFFDIO_COPY puts content and page table entry there together, in
 * one step that a SIGKILL does not interrupt, and only it (or CONTINUE, after the content) does so, as every access by anyone else
 * to a page that is not received waits. Hence: an entry is there, mapped or swapped out, and the page was placed.
 *
 * There is none: anonymous memory was not placed. Shared memory is taken out of a page table without a trace when it is swapped out,
 * or when the mapping is zapped; the page cache decides then. Nothing in it either: not placed. Something in it: the page was
 * placed and the machine may have written to it since, or another process has filled the hole. Nothing tells these apart, and
 * the first would be overwritten by old content if it was fetched again. So that is refused: the page stays claimed, no pager takes such
 * states, and a thread that wants the page waits.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "core/bits.h"
#include "core/runtime.h"
#include "core/util.h"
#include "memory/states.h"
#include "postcopy/core.h"
#include "postcopy/memory.h"

#define MAGIC UINT64_C(0x3273657461747370) /* "pstates2", little endian */
#define HEADER_BYTES 4096
#define PAGEMAP_THERE (UINT64_C(3) << 62) /* present, or swapped out */

_Static_assert(sizeof(struct pc_journal) == HEADER_BYTES, "a journal is a page");

static uint64_t journals_at(uint64_t pages)
{
    uint64_t end = HEADER_BYTES + 3 * pc_bitmap_words(pages) * sizeof(uint64_t);

    return (end + HEADER_BYTES - 1) / HEADER_BYTES * HEADER_BYTES;
}

static uint64_t file_bytes(uint64_t pages)
{
    return journals_at(pages) + PC_MAX_SHARDS * sizeof(struct pc_journal);
}

int pc_states_new(uint64_t pages)
{
    if (!pages || pages > UINT64_MAX / 64)
        return -EINVAL;
    return pc_memfd_new_of("postcopy-states", file_bytes(pages), (struct pc_memfd_head){.magic = MAGIC, .count = pages});
}

int pc_states_map(int fd, uint64_t pages, struct pc_states *states)
{
    uint64_t words = pc_bitmap_words(pages), count;
    int error = pc_memfd_count(fd, MAGIC, &count);
    void *base;

    if (!error)
        error = count == pages ? pc_memfd_map(fd, file_bytes(pages), &base) : -EINVAL;
    if (error)
        return error;
    states->base = base;
    states->bytes = file_bytes(pages);
    states->claimed = (uint64_t *)base + HEADER_BYTES / sizeof(uint64_t);
    states->received = states->claimed + words;
    states->zero = states->received + words;
    states->journals = (struct pc_journal *)((uint8_t *)base + journals_at(pages));
    return 0;
}

void pc_states_unclaim(const struct pc_states *states, uint64_t pages)
{
    for (uint64_t word = 0; word < pc_bitmap_words(pages); word++) {
        uint64_t doubtful = states->claimed[word] & ~states->received[word];

        if (doubtful)
            pc_atomic_clear(states->claimed, word, doubtful);
    }
}

int pc_states_received(int fd, uint64_t pages, uint64_t *words)
{
    struct pc_states states;
    int error = pc_states_map(fd, pages, &states);

    if (error)
        return error;
    pc_bits_copy(words, states.received, pc_bitmap_words(pages));
    pc_buffer_free(states.base, states.bytes);
    return 0;
}

int64_t pc_states_count(int fd, uint64_t pages)
{
    struct pc_states states;
    int64_t received;
    int error = pc_states_map(fd, pages, &states);

    if (error)
        return error;
    received = (int64_t)pc_bits_count(states.received, 0, pages);
    pc_buffer_free(states.base, states.bytes);
    return received;
}

/* Sets *there when the calling process's page table has something for [address, address + bytes). A huge page is there when
 * its first small one is. */
static int in_page_table(int pagemap_fd, uint64_t address, bool *there)
{
    uint64_t entry;
    int error = pc_pread_all(pagemap_fd, &entry, sizeof(entry), address / pc_page_bytes() * sizeof(entry));

    *there = !error && (entry & PAGEMAP_THERE);
    return error;
}

/* Whether a file has something at [offset, offset + bytes), in memory or swapped out. hugetlbfs, which is never swapped, says so of
 * everything. */
static int in_file(int fd, uint64_t offset, uint64_t bytes, bool *there)
{
    off_t data = lseek(fd, (off_t)offset, SEEK_DATA);

    *there = data >= 0 && (uint64_t)data < offset + bytes;
    return data < 0 && errno != ENXIO ? -errno : 0;
}

int64_t pc_states_settle(int fd, const struct pc_memory *memory)
{
    uint64_t pages = memory->size_bytes / memory->page_bytes;
    struct pc_states states;
    int64_t in_doubt = 0;
    bool lost = false;
    int pagemap_fd, error = pc_states_map(fd, pages, &states);

    if (error)
        return error;
    pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap_fd < 0)
        error = -errno;
    for (uint64_t word = 0; word < pc_bitmap_words(pages) && !error; word++) {
        uint64_t doubtful = states.claimed[word] & ~states.received[word];

        for (; doubtful && !error; doubtful &= doubtful - 1) {
            uint64_t page = pc_bits_lowest(word, doubtful), bit = doubtful & -doubtful;
            bool there = false, unknown = false;

            error = in_page_table(pagemap_fd, (uint64_t)(uintptr_t)memory->base + page * memory->page_bytes, &there);
            if (!error && !there && memory->kind == PC_MEMORY_MEMFD && memory->fd >= 0)
                error = in_file(memory->fd, page * memory->page_bytes, memory->page_bytes, &unknown);
            if (error)
                break;
            in_doubt++;
            lost = lost || unknown;
            if (unknown)
                continue;
            if (there)
                (void)pc_atomic_set(states.received, word, bit);
            else
                pc_atomic_clear(states.claimed, word, bit);
        }
    }
    if (pagemap_fd >= 0)
        close(pagemap_fd);
    pc_buffer_free(states.base, states.bytes);
    return error ? error : lost ? -ENOTRECOVERABLE : in_doubt;
}
