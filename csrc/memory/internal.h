/* SPDX-License-Identifier: Apache-2.0
 *
 * Private to csrc/memory.
 *
 *   memory.c   memory is made, mapped, given back
 *   host.c     how much of it this host can give
 *   present.c  what is in it, without touching it
 *   content.c  digest, dump and load
 *   states.c   a state for each page that outlives its pager
 *   dirty.c    which pages were written
 *   remote.c   memory of another process, read
 *   writelog.c which pages of that were written
 */
#ifndef PC_MEMORY_INTERNAL_H
#define PC_MEMORY_INTERNAL_H

#include <stdbool.h>
#include <stdlib.h>

#include "core/util.h"
#include "postcopy/core.h"
#include "postcopy/memory.h"

#define BLOCK_BYTES ((uint64_t)4096)       /* of the digest, and the finest hole left in a dump */
#define CHUNK_BYTES ((uint64_t)256 * 1024) /* read at once: fits the second level cache */

static inline uint64_t pc_least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t pc_round_up(uint64_t value, uint64_t unit)
{
    return value % unit ? value + (unit - value % unit) : value;
}

static inline uint64_t *pc_map_new(uint64_t bits)
{
    return calloc(pc_bitmap_words(bits) + 1, sizeof(uint64_t)); /* + 1: never a request for nothing */
}

/* host.c: "1.5 GiB" */
const char *pc_human(uint64_t bytes, char *out, size_t cap);

/* present.c */
/* Fills `buffer` from a file of which `end` bytes count. The file may end inside the last `slack` bytes of them, which then
 * read as zeros (an image need not be a whole number of pages); -ENODATA when it is shorter: it shrank. */
int pc_read_full(int fd, uint64_t offset, void *buffer, uint64_t bytes, uint64_t end, uint64_t slack);
/* Whether a file has `end` bytes, but for some of the last `slack`: 0, or -ENODATA. */
int pc_file_holds(int fd, uint64_t end, uint64_t slack);
/* Sets the bit of every page of [first_byte, first_byte + bytes) of a file that may hold data; page 0 begins at `origin`. 0 or -errno. */
int pc_range_present(int fd, uint64_t origin, uint64_t first_byte, uint64_t bytes, uint64_t page_bytes, uint64_t *words);
/* The next bytes, from *first on, of pages whose bit is not set, with fewer than `between` at a time whose bit is: how many, 0 for none.
 * Looking at a page again that is known costs less than another call. */
uint64_t pc_unknown_bytes(uint64_t size_bytes, uint64_t page_bytes, const uint64_t *words, uint64_t *first, uint64_t between);
#define PC_MAPPED_BETWEEN 512 /* in page tables: one of them */
/* Sets the bit of every page that the page tables of an address range hold, but for the zero page. Page 0 is at `origin`. */
int pc_mapping_present(int pagemap, uint64_t origin, uint64_t address, uint64_t bytes, uint64_t page_bytes, uint64_t *words);

/* remote.c */
struct pc_remote {
    int pid, pidfd, pagemap;
    uint32_t count;
    int incomplete;
    uint64_t size_bytes, page_bytes;
    struct pc_remote_extent extents[PC_REMOTE_EXTENTS];
};
/* The part of [first_byte, first_byte + bytes) in its first extent: where that is, and how long. */
uint64_t pc_remote_part(const struct pc_remote *remote, uint64_t first_byte, uint64_t bytes, uint64_t *address);
bool pc_remote_has_ended(const struct pc_remote *remote);
int pc_remote_present(const struct pc_remote *remote, uint64_t *words);

#endif
