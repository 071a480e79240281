/* SPDX-License-Identifier: Apache-2.0
 *
 * The three shared bitmaps of a RAM block: see states.c.
 */
#ifndef PC_STATES_H
#define PC_STATES_H

#include <stdint.h>

struct pc_states {
    void *base;
    uint64_t bytes;
    uint64_t *claimed, *received, *zero; /* within base */
};

/* Maps what pc_states_new has made for as many pages; pc_buffer_free(base, bytes) undoes it. 0, -EINVAL when it is something else, or -errno. */
int pc_states_map(int fd, uint64_t pages, struct pc_states *states);

/* A memfd that stays as large as it is (memory.c). The descriptor, or -errno. */
int pc_memfd_new(const char *name, uint64_t size_bytes, unsigned int flags);
/* Maps one of that size; undone by pc_buffer_free. 0, -EINVAL when it is something else, or -errno. */
int pc_memfd_map(int fd, uint64_t bytes, void **base);

#endif
