/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory that is given back as the destination says that it has its pages. server.h says how this and the senders keep apart.
 */
#include <errno.h>

#include "pageserver/server.h"

/* First page from `from` on, below `to`, that can (`ready`) or cannot be discarded now; `to` when there is none. */
static uint64_t next_ready(const struct source_block *block, uint64_t from, uint64_t to, bool ready)
{
    for (uint64_t word = from / 64; from < to; from = ++word * 64) {
        uint64_t found = pc_bits_word(block->released, word) & ~block->discarded[word] & ~block->pinned[word];

        found = (ready ? found : ~found) & pc_bits_mask(word, from, to - from);
        if (found)
            return pc_bits_lowest(word, found);
    }
    return to;
}

/* These pages cannot be given back now: a later call looks at them again. */
static void postpone(struct source_block *block, uint64_t first, uint64_t end)
{
    block->postponed_first = first < block->postponed_first ? first : block->postponed_first;
    block->postponed_end = end > block->postponed_end ? end : block->postponed_end;
}

/* Sets `pinned` for what the channels send of a block, and postpones it. */
static void look_at_pins(struct pc_pageserver *server, uint32_t index)
{
    struct source_block *block = server->blocks[index];

    for (uint32_t i = 0; i < CHANNELS; i++) {
        const struct channel *channel = channel_number(server, i);
        uint32_t count = __atomic_load_n(&channel->pin_count, __ATOMIC_SEQ_CST);

        /* One that is replaced meanwhile belongs to a batch that has looked at `released` since: nothing is missed. */
        for (uint32_t j = 0; j < count; j++) {
            uint64_t place = __atomic_load_n(&channel->pins[j], __ATOMIC_SEQ_CST), first = PLACE_PAGE(place);

            if (PLACE_BLOCK(place) != index)
                continue;
            pc_bitmap_set_range(block->pinned, first, PLACE_RUN_PAGES(place));
            postpone(block, first, first + PLACE_RUN_PAGES(place));
        }
    }
}

/* Discards what is released in [from, to) and no longer pinned: whole pages of the memory, which may be larger than those of
 * transfer. Under release_lock. */
static int give_back(struct pc_pageserver *server, uint32_t index, uint64_t from, uint64_t to)
{
    struct source_block *block = server->blocks[index];
    uint64_t group = block->memory.page_bytes > block->page_bytes ? block->memory.page_bytes / block->page_bytes : 1;
    int error = 0;

    if (block->postponed_first < block->postponed_end) {
        from = block->postponed_first < from ? block->postponed_first : from;
        to = block->postponed_end > to ? block->postponed_end : to;
    }
    block->postponed_first = block->pages;
    block->postponed_end = 0;
    look_at_pins(server, index);
    from -= from % group;
    to = to + group - 1 - (to + group - 1) % group; /* the block is whole pages of memory */
    for (uint64_t page = from, end; (page = next_ready(block, page, to, true)) < to; page = end) {
        uint64_t first = (page + group - 1) / group * group;
        int refused;

        end = next_ready(block, page, to, false);
        if (end / group * group <= first)
            continue;
        refused = pc_memory_discard(&block->memory, (uint64_t)(uintptr_t)block->memory.base + first * block->page_bytes,
                                    (end / group * group - first) * block->page_bytes);
        if (refused) {
            error = error ? error : refused;
            postpone(block, page, end);
            continue;
        }
        for (uint64_t word = first / 64; word * 64 < end / group * group; word++) {
            uint64_t bits = pc_bits_mask(word, first, end / group * group - first);

            block->discarded[word] |= bits;
            ADD(server, released_bytes, pc_bits_popcount(bits & block->present[word]) * block->page_bytes);
        }
    }
    if (block->postponed_first < block->postponed_end) /* all pins are in there */
        pc_bitmap_clear_range(block->pinned, block->postponed_first, block->postponed_end - block->postponed_first);
    return error;
}

int pc_pageserver_release(struct pc_pageserver *server, uint32_t index, uint64_t first_page, uint64_t pages,
                          const uint64_t *words)
{
    struct source_block *block;
    int error = 0;

    if (index >= block_count(server))
        return -EINVAL;
    if (!is_serving(server))
        return -EBUSY;
    block = server->blocks[index];
    if (first_page > block->pages || pages > block->pages - first_page)
        return -EINVAL;
    if (!block->memory.base || (block->memory.kind != PC_MEMORY_MEMFD && block->memory.kind != PC_MEMORY_ANON &&
                                block->memory.kind != PC_MEMORY_HUGETLB))
        return -ENOTSUP; /* a file of its own */
    pthread_mutex_lock(&server->release_lock);
    for (uint64_t at = 0, end; (at = pc_bitmap_next(words, pages, at, 1)) < pages; at = end) {
        uint64_t from = first_page + at, to;

        end = pc_bitmap_next(words, pages, at, 0);
        to = first_page + end;
        for (uint64_t word = from / 64; word * 64 < to; word++)
            (void)pc_atomic_set(block->released, word, pc_bits_mask(word, from, to - from));
    }
    error = give_back(server, index, first_page, first_page + pages);
    pthread_mutex_unlock(&server->release_lock);
    return error;
}

int pc_pageserver_released(struct pc_pageserver *server, uint32_t index, uint64_t *released_words, uint64_t *discarded_words)
{
    struct source_block *block;

    if (index >= block_count(server))
        return -EINVAL;
    block = server->blocks[index];
    pthread_mutex_lock(&server->release_lock);
    if (released_words)
        pc_bits_copy(released_words, block->released, block->words);
    if (discarded_words)
        memcpy(discarded_words, block->discarded, block->words * sizeof(uint64_t));
    pthread_mutex_unlock(&server->release_lock);
    return 0;
}
