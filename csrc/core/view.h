/* SPDX-License-Identifier: Apache-2.0
 *
 * Which parts of a machine's memory are there, as a picture of a few bins: of the maps of all of its blocks, which other threads change
 * meanwhile. Looking takes microseconds, whatever the memory's size.
 */
#ifndef PC_VIEW_H
#define PC_VIEW_H

#include <stdint.h>

#define PC_VIEW_MAPS 64
#define PC_VIEW_FULL 63 /* of a bin: all of it is there; 0: nothing */

struct pc_view_map { /* of one block; a bit is a page that is there */
    const uint64_t *words;
    uint64_t pages, page_bytes;
    uint64_t offset; /* of the block's first byte in the whole memory */
};

struct pc_view {
    uint32_t count; /* published after the map */
    struct pc_view_map maps[PC_VIEW_MAPS];
};

/* The next block. One caller at a time; there is room, and the words outlive the view. */
void pc_view_add(struct pc_view *view, const uint64_t *words, uint64_t pages, uint64_t page_bytes);
uint64_t pc_view_bytes(const struct pc_view *view);
/* Fills as many bins of equal size, in the order of the blocks, as there are pages, at most `count`; how many. A bin of many pages is
 * estimated by an even sample of them. Any thread. */
uint32_t pc_view_bins(const struct pc_view *view, uint8_t *bins, uint32_t count);

#endif
