/* SPDX-License-Identifier: Apache-2.0
 *
 * The three shared bitmaps of a RAM block, and the journals of the shards that it is armed with: see states.c.
 */
#ifndef PC_STATES_H
#define PC_STATES_H

#include <stdint.h>

#include "postcopy/core.h"
#include "uffd/uffd_abi.h"

/* What a fault thread has read from its userfaultfd. The kernel writes the events here, in a read(2) that it also finishes for a thread that
 * is being killed; an event of memory that was taken away is erased when it is in the maps, and applied again by the next pager where
 * it is not. That changes nothing where it was. One page, so that it can be locked. */
#define PC_JOURNAL_EVENTS 64
#define PC_JOURNAL_EXTENTS 64
struct pc_journal_extent { /* of addresses; end 0: none */
    uint64_t start, end;
};
struct pc_journal {
    struct uffd_msg events[PC_JOURNAL_EVENTS];
    struct pc_journal_extent early[PC_JOURNAL_EXTENTS];      /* what was taken away of memory that is not armed yet */
    struct pc_journal_extent registered[PC_JOURNAL_EXTENTS]; /* by the first pager: another one registers nothing that has left since */
};

struct pc_states {
    void *base;
    uint64_t bytes;
    uint64_t *claimed, *received, *zero; /* within base */
    struct pc_journal *journals; /* within base, PC_MAX_SHARDS of them */
};

/* Maps what pc_states_new has made for as many pages; pc_buffer_free(base, bytes) undoes it. 0, -EINVAL when it is something else, or -errno. */
int pc_states_map(int fd, uint64_t pages, struct pc_states *states);

/* The pager that has claimed pages of private memory is dead: none of them is under way. */
void pc_states_unclaim(const struct pc_states *states, uint64_t pages);

/* A memfd that stays as large as it is (memory.c). The descriptor, or -errno. */
int pc_memfd_new(const char *name, uint64_t size_bytes, unsigned int flags);
/* Maps one of that size; undone by pc_buffer_free. 0, -EINVAL when it is something else, or -errno. */
int pc_memfd_map(int fd, uint64_t bytes, void **base);
/* With which a memfd may begin: what it is, and how many of what it is made for. */
struct pc_memfd_head {
    uint64_t magic, count;
};
int pc_memfd_new_of(const char *name, uint64_t size_bytes, struct pc_memfd_head head);
/* How many; 0, -EINVAL when it is something else, or -errno. What it says is a stranger's. */
int pc_memfd_count(int fd, uint64_t magic, uint64_t *count);

#endif
