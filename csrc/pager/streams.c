/* SPDX-License-Identifier: Apache-2.0
 *
 * Streams: pages that threads touch at equal distances, as faults show them; what the next ones will be is requested ahead of them.
 *
 * A stream knows the last page that was reached, its stride, and how many pages ahead of that are to be under way (its *depth*). A fault
 * at its edge, or on one of its pages that is still under way, moves it on: adaptive streams then double their depth. A fault a little
 * beyond the edge was not foreseen: the depth is halved. What faults show of a stream that is placed in time is its edge only, so that
 * pages in between count as reached when a later one is.
 *
 * Where streams come from is the policy (pc_pager_set_prefetch): forward and both begin one or two at each fault that belongs to none;
 * adaptive begins one where the last faults of the shard vote for a stride: a fault at p, and earlier ones at p - stride and p - 2 *
 * stride. All threads vote together: where KVM faults asynchronously a fault has the id of a worker, not of its vCPU, and faults of other
 * threads in between do no harm to a vote.
 *
 * Owns a shard's streams and its history of faults. All of it runs on the shard's fault thread, in bounded time, and takes no memory.
 */
#include <errno.h>
#include <stdlib.h>

#include "pager/pager.h"

#define DEPTH_MIN 2
#define DEPTH_BYTES (256 * 1024) /* of an adaptive stream: 64 pages of 4 KiB */
/* A stride of so many pages at most needs three faults, a longer one four: among many faults on random pages three are on one line by chance. */
#define NEAR_STRIDE 8
#define FAR_STRIDE 4096

/* One number for a page of a block, as in the log of first touches. */
static uint64_t place_of(uint32_t block, uint64_t page)
{
    return (uint64_t)block << 40 | page;
}

static bool has_faulted(const struct streams *streams, uint64_t place)
{
    bool found = false;

    for (uint32_t i = 0; i < STREAM_HISTORY; i++) /* all of them: without a branch, which would cost more */
        found |= streams->history[i] == place + 1;
    return found && place + 1; /* not below the first page */
}

/* The stride for which the last faults vote with this one; 0: none. The latest ones are asked first. */
static int64_t vote(const struct streams *streams, uint64_t place)
{
    for (uint32_t i = 1; i <= STREAM_HISTORY; i++) {
        uint64_t before = streams->history[(streams->faults - i) % STREAM_HISTORY];
        int64_t stride = (int64_t)(place + 1 - before);

        if (!before || !stride || labs(stride) > FAR_STRIDE || !has_faulted(streams, place - 2 * (uint64_t)stride))
            continue;
        if (labs(stride) <= NEAR_STRIDE || has_faulted(streams, place - 3 * (uint64_t)stride))
            return stride;
    }
    return 0;
}

static void begin(struct shard *shard, uint32_t block, uint64_t page, int64_t stride, uint32_t depth)
{
    struct streams *streams = &shard->streams;
    uint32_t oldest = 0;

    for (uint32_t i = 1; i < STREAMS; i++)
        if (streams->all[i].used < streams->all[oldest].used)
            oldest = i;
    streams->all[oldest] = (struct stream){.page = page, .stride = stride, .block = block, .depth = depth, .used = ++streams->clock};
    streams->latest = oldest;
    streams->busy = true;
}

/* How many strides ahead of a stream a page is; UINT64_MAX: more than `most`, or it is none of its pages. */
static uint64_t steps_to(const struct stream *stream, uint32_t block, uint64_t page, uint64_t most)
{
    uint64_t distance = stream->stride > 0 ? page - stream->page : stream->page - page; /* huge where it lies on the other side */
    uint64_t stride = (uint64_t)labs(stream->stride), steps;

    if (!stride || stream->block != block || distance > most * stride)
        return UINT64_MAX;
    steps = stride == 1 ? distance : distance / stride;
    return steps * stride == distance ? steps : UINT64_MAX;
}

/* A hit that is counted already: not again by the stream that has asked for the page, which need not be the one that follows it. */
static void count_no_more(struct streams *streams, uint32_t block, uint64_t page)
{
    for (uint32_t i = 0; i < STREAMS; i++) {
        uint64_t steps = steps_to(&streams->all[i], block, page, 64);

        if (steps - 1 < 64)
            streams->all[i].asked &= ~(UINT64_C(1) << (steps - 1));
    }
}

/* Whether a page is of this stream, which then goes on from there. */
static bool follow(struct shard *shard, struct stream *stream, uint32_t block, uint64_t page, bool adaptive)
{
    uint64_t steps = steps_to(stream, block, page, stream->reach + 1 + stream->depth), most;

    if (steps == UINT64_MAX)
        return false;
    most = DEPTH_BYTES / shard->pager->blocks[block]->memory.page_bytes;
    stream->used = ++shard->streams.clock;
    if (!steps)
        return true;
    if (steps <= stream->reach + 1) {
        uint64_t passed = steps < 64 ? (UINT64_C(1) << steps) - 1 : UINT64_MAX;

        COUNT(shard->pager, prefetch_hits, pc_bits_popcount(stream->asked & passed));
        stream->asked = steps < 64 ? stream->asked >> steps : 0;
        stream->reach -= (uint32_t)steps < stream->reach ? (uint32_t)steps : stream->reach;
        if (adaptive && stream->depth < most)
            stream->depth = 2 * stream->depth < most ? 2 * stream->depth : (uint32_t)most;
    } else {
        stream->asked = stream->reach = 0;
        if (adaptive && stream->depth > DEPTH_MIN)
            stream->depth /= 2;
    }
    stream->page = page;
    return true;
}

void pc_streams_note(struct shard *shard, uint32_t block, uint64_t page, bool missing, bool counted)
{
    uint32_t policy = __atomic_load_n(&shard->pager->prefetch, __ATOMIC_RELAXED), pages = policy >> 8;
    struct streams *streams = &shard->streams;
    int how = (int)(policy & 0xFF);

    if (how == PC_PREFETCH_NONE)
        return;
    if (counted)
        count_no_more(streams, block, page);
    for (uint32_t i = 0; i < STREAMS; i++) {
        if (follow(shard, &streams->all[i], block, page, how == PC_PREFETCH_ADAPTIVE)) {
            streams->latest = i;
            streams->busy = true;
            return;
        }
    }
    if (!missing)
        return;
    if (how == PC_PREFETCH_ADAPTIVE) {
        int64_t stride = vote(streams, place_of(block, page));

        if (stride)
            begin(shard, block, page, stride, DEPTH_MIN);
        else
            streams->history[streams->faults++ % STREAM_HISTORY] = place_of(block, page) + 1;
    } else {
        if (how == PC_PREFETCH_BOTH && pages / 2)
            begin(shard, block, page, -1, pages / 2);
        begin(shard, block, page, 1, how == PC_PREFETCH_BOTH ? pages - pages / 2 : pages);
    }
}

/* The next page of a stream that is wanted ahead, which this marks as asked for. False: there is none. */
static bool next_of(struct shard *shard, struct stream *stream, uint64_t *page)
{
    struct block *block = shard->pager->blocks[stream->block];

    while (stream->reach < stream->depth) {
        uint64_t one = 1;

        *page = stream->page + (uint64_t)stream->stride * (stream->reach + 1);
        if (*page >= block->pages || pc_find_shard(shard->pager, block, *page, &one) != shard) {
            stream->depth = stream->reach; /* the end of the block, or of what this thread may request */
            return false;
        }
        stream->reach++;
        if (!pc_is_wanted(block, *page))
            continue;
        stream->asked |= UINT64_C(1) << (stream->reach - 1);
        return true;
    }
    return false;
}

bool pc_streams_next(struct shard *shard, uint32_t *index, uint64_t *page)
{
    struct streams *streams = &shard->streams;

    for (uint32_t i = 0; i < STREAMS && streams->busy; i++) {
        struct stream *stream = &streams->all[(streams->latest + i) % STREAMS];

        if (stream->stride && next_of(shard, stream, page)) {
            *index = stream->block;
            return true;
        }
    }
    streams->busy = false;
    return false;
}

int pc_pager_set_prefetch(struct pc_pager *pager, int how, uint32_t pages)
{
    bool counts = how == PC_PREFETCH_FORWARD || how == PC_PREFETCH_BOTH;

    if (how < PC_PREFETCH_NONE || how > PC_PREFETCH_ADAPTIVE || (counts ? !pages || pages > PC_PREFETCH_MAX_PAGES : pages))
        return -EINVAL;
    __atomic_store_n(&pager->prefetch, (uint32_t)how | pages << 8, __ATOMIC_RELAXED);
    return 0;
}
