/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests before a fault: pages that no thread waits for yet. They come from five places, in this order:
 *
 *   streams            what faults have shown (streams.c); they may have half as many again under way as all others
 *   runs               a working set, in its order
 *   prefetch requests  ranges that a caller asked for, one page of each in turn: a small one must not wait for a large one
 *   lost               pages that were requested on a channel that was lost, in turn with the former
 *   the sweep          any missing page, as many as a caller allows all shards together; when there is nothing of the former
 *
 * A window of them is under way at a time, so that a fault never stands behind more than a window, and a turn of the loop looks at
 * a bounded part of the maps. Without a channel nothing is requested: what cannot be sent now must not be marked.
 *
 * Owns the ring of prefetch requests and the cursors of each shard; all of it runs on the shard's fault thread, which alone sets
 * `requested` for the shard's pages. The functions of postcopy/engine.h below run on callers and leave commands.
 */
#include <errno.h>
#include <stdlib.h>

#include "pager/pager.h"

#define WINDOW 128        /* requests that may be under way without a fault */
#define STREAM_WINDOW 192 /* with those of streams */
#define TURN_WORDS 2048   /* of the maps that a turn may look at */
#define SEND_AHEAD_BYTES (SEND_BYTES / 2) /* the other half is kept for faults */

void pc_prefetch_add(struct shard *shard, struct command *command)
{
    command->next = shard->prefetches ? shard->prefetches->next : command;
    if (shard->prefetches)
        shard->prefetches->next = command;
    shard->prefetches = command;
}

void pc_prefetch_add_runs(struct shard *shard, struct command *command)
{
    command->next = NULL;
    *(shard->runs ? shard->runs_end : &shard->runs) = command;
    shard->runs_end = &command->next;
}

void pc_cursor_restart(const struct shard *shard, struct cursor *cursor)
{
    uint32_t count = pc_range_count(shard);

    cursor->left = 0;
    for (uint32_t i = 0; i < count; i++)
        cursor->left += shard->ranges[i].pages;
}

/* Moves *page to the first one before `end` that is missing, not local and not requested, of all or of those in `only`. False: there is
 * none, or *words, from which each word looked at is taken, are used up. */
static bool find_wanted(const struct block *block, const uint64_t *only, uint64_t *page, uint64_t end, uint64_t *words)
{
    const uint64_t *local = __atomic_load_n(&block->local.pages, __ATOMIC_ACQUIRE);

    while (*page < end && *words) {
        uint64_t word = *page / 64, wanted = pc_bits_mask(word, *page, end - *page);

        wanted &= ~(pc_bits_word(block->claimed, word) | pc_bits_word(block->requested, word));
        if (only)
            wanted &= pc_bits_word(only, word);
        if (local)
            wanted &= ~pc_bits_word(local, word);
        --*words;
        if (wanted) {
            *page = pc_bits_lowest(word, wanted);
            return true;
        }
        *page = (word + 1) * 64 < end ? (word + 1) * 64 : end;
    }
    return false;
}

static bool next_prefetch(struct shard *shard, uint64_t *words, uint32_t *index, uint64_t *page)
{
    bool found = false;

    while (shard->prefetches && *words && !found) {
        struct command *last = shard->prefetches, *first = last->next;

        found = find_wanted(shard->pager->blocks[first->block], NULL, &first->page, first->end, words);
        if (found) {
            *index = first->block;
            *page = first->page++;
        }
        shard->prefetches = first;
        if (first->page < first->end)
            continue;
        shard->prefetches = first == last ? NULL : last;
        last->next = first->next;
        pc_command_push(&shard->pager->finished, first);
    }
    return found;
}

static bool next_of_runs(struct shard *shard, uint64_t *words, uint32_t *index, uint64_t *page)
{
    while (shard->runs && *words) {
        struct command *first = shard->runs;
        const struct pc_page_run *run = &first->runs[first->run_next];

        *page = run->first_page + first->page;
        if (find_wanted(shard->pager->blocks[run->block], NULL, page, run->first_page + run->pages, words)) {
            *index = run->block;
            first->page = *page + 1 - run->first_page;
            return true;
        }
        first->page = *page - run->first_page;
        if (first->page < run->pages)
            continue;
        first->page = 0;
        if (++first->run_next < first->run_count)
            continue;
        shard->runs = first->next;
        pc_command_push(&shard->pager->finished, first);
    }
    return false;
}

static bool next_at_cursor(struct shard *shard, struct cursor *cursor, bool lost, uint64_t *words, uint32_t *index, uint64_t *page)
{
    while (cursor->left && *words) {
        const struct range *range = &shard->ranges[cursor->range];
        const struct block *block;
        uint64_t from;
        bool found;

        if (cursor->range >= pc_range_count(shard) || cursor->page >= range->pages) {
            cursor->range = cursor->range >= pc_range_count(shard) ? 0 : cursor->range + 1;
            cursor->page = 0;
            --*words;
            continue;
        }
        block = shard->pager->blocks[range->block];
        from = *page = range->first_page + cursor->page;
        found = find_wanted(block, lost ? block->lost : NULL, page, range->first_page + range->pages, words);
        cursor->page = *page - range->first_page;
        cursor->left -= *page - from < cursor->left ? *page - from : cursor->left;
        *index = range->block;
        if (found)
            return true;
    }
    return false;
}

/* One of the pages that all shards together may request in a sweep. */
static bool take_sweep(struct pc_pager *pager)
{
    uint64_t left = __atomic_load_n(&pager->sweep_left, __ATOMIC_RELAXED);

    while (left)
        if (__atomic_compare_exchange_n(&pager->sweep_left, &left, left - 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return true;
    return false;
}

static bool next_ahead(struct shard *shard, uint64_t *words, uint32_t *index, uint64_t *page)
{
    if (pc_streams_next(shard, index, page))
        return true;
    if (shard->ahead_in_flight >= WINDOW)
        return false;
    shard->lost_first = !shard->lost_first;
    return next_of_runs(shard, words, index, page) || (shard->lost_first && next_at_cursor(shard, &shard->lost, true, words, index, page)) ||
           next_prefetch(shard, words, index, page) || next_at_cursor(shard, &shard->lost, true, words, index, page) ||
           (__atomic_load_n(&shard->pager->sweep_left, __ATOMIC_RELAXED) &&
            next_at_cursor(shard, &shard->sweep, false, words, index, page) && take_sweep(shard->pager));
}

void pc_request_ahead(struct shard *shard)
{
    uint64_t words = TURN_WORDS, page;
    uint32_t index;

    shard->ahead_left = false;
    while (shard->stream.fd >= 0 && shard->ahead_in_flight < STREAM_WINDOW && shard->send_bytes < SEND_AHEAD_BYTES) {
        if (!next_ahead(shard, &words, &index, &page)) {
            shard->ahead_left = !words;
            break;
        }
        (void)pc_atomic_test_and_set_bit(shard->pager->blocks[index]->requested, page);
        (void)pc_queue_request(shard, index, page, REQUEST_AHEAD); /* there is room */
        shard->ahead_in_flight++;
    }
}

int pc_pager_ask_again(struct pc_pager *pager)
{
    __atomic_store_n(&pager->asks_again, true, __ATOMIC_RELAXED);
    return 0;
}

int64_t pc_pager_request_missing(struct pc_pager *pager, uint64_t limit)
{
    uint64_t missing = __atomic_load_n(&pager->missing, __ATOMIC_SEQ_CST);
    uint32_t shards = pc_shard_count(pager);

    __atomic_store_n(&pager->sweep_left, limit, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < shards && limit; i++) {
        __atomic_store_n(&pager->shards[i]->sweep_again, true, __ATOMIC_SEQ_CST);
        pc_shard_notify(pager->shards[i]);
    }
    return shards ? (int64_t)(missing < limit ? missing : limit) : 0;
}

int64_t pc_pager_request_range(struct pc_pager *pager, uint32_t index, uint64_t first_page, uint64_t pages)
{
    struct block *block;
    uint64_t end = first_page + pages, missing;
    uint32_t segments;

    if (!pc_block_has(pager, index, first_page, pages))
        return -EINVAL;
    block = pager->blocks[index];
    missing = pages - pc_bits_count(block->received, first_page, pages);
    segments = missing ? __atomic_load_n(&block->segment_count, __ATOMIC_ACQUIRE) : 0;
    for (uint32_t i = 0; i < segments; i++) {
        const struct segment *segment = &block->segments[i];
        uint64_t low = segment->first_page, high = low + segment->pages;
        uint64_t no_limit = UINT64_MAX;
        struct command *command;

        low = low > first_page ? low : first_page;
        high = high < end ? high : end;
        if (!find_wanted(block, NULL, &low, high, &no_limit))
            continue;
        command = pc_command_new(pager, COMMAND_PREFETCH, 0);
        if (!command)
            return -ENOMEM;
        command->block = index;
        command->page = low;
        command->end = high;
        pc_command_send(pager->shards[segment->shard], command);
    }
    return (int64_t)missing;
}

/* Of the runs what one shard guards, into `out` where that is not NULL: how many runs that is. */
static uint64_t runs_of_shard(const struct pc_pager *pager, uint32_t shard, const struct pc_page_run *runs, uint64_t count,
                              struct pc_page_run *out, uint64_t room)
{
    uint64_t found = 0;

    for (uint64_t i = 0; i < count; i++) {
        const struct block *block = pager->blocks[runs[i].block];
        uint32_t segments = __atomic_load_n(&block->segment_count, __ATOMIC_ACQUIRE);

        for (uint32_t j = 0; j < segments; j++) {
            const struct segment *segment = &block->segments[j];
            uint64_t low = runs[i].first_page > segment->first_page ? runs[i].first_page : segment->first_page;
            uint64_t run_end = runs[i].first_page + runs[i].pages, end = segment->first_page + segment->pages;
            uint64_t high = run_end < end ? run_end : end;

            if (segment->shard != shard || low >= high)
                continue;
            if (out && found < room)
                out[found] = (struct pc_page_run){.first_page = low, .pages = (uint32_t)(high - low), .block = runs[i].block};
            found++;
        }
    }
    return found;
}

int pc_pager_request_runs(struct pc_pager *pager, const struct pc_page_run *runs, uint64_t count)
{
    uint32_t shards = pc_shard_count(pager);

    for (uint64_t i = 0; i < count; i++)
        if (!runs[i].pages || !pc_block_has(pager, runs[i].block, runs[i].first_page, runs[i].pages))
            return -EINVAL;
    for (uint32_t i = 0; i < shards; i++) {
        uint64_t room = runs_of_shard(pager, i, runs, count, NULL, 0), found;
        struct command *command = room ? pc_command_new(pager, COMMAND_RUNS, room) : NULL;

        if (!room)
            continue;
        if (!command)
            return -ENOMEM;
        found = runs_of_shard(pager, i, runs, count, command->runs, room);
        command->run_count = found < room ? found : room; /* more has been armed meanwhile */
        pc_command_send(pager->shards[i], command);
    }
    return 0;
}
