/* SPDX-License-Identifier: Apache-2.0
 *
 * The destination's pager.
 *
 * How a missing page comes
 * ------------------------
 * The machine touches a page that is not there; its thread goes to sleep on a userfaultfd. That userfaultfd belongs to a
 * *shard*, whose fault thread reads the event, sends one request on the shard's urgent channel, receives the answer on
 * the same channel, and places the page with UFFDIO_COPY, which wakes the machine's thread. One thread does all of it:
 * a second one in the path would cost a wake-up, and a wake-up costs more than everything else together. Meanwhile each
 * bulk channel has a thread that receives and places what the source pushes.
 *
 * The life of a page
 * ------------------
 * Four bitmaps for each RAM block, changed only by atomic or:
 *
 *   requested  a fault was seen; the request has been sent, or will be when the shard has a channel again
 *   claimed    one thread has taken it on itself to place this page, or the page is zero: whoever comes second drops
 *              what it has. Content reaches a page once, so a late duplicate can never overwrite what the machine wrote.
 *   known      the content is there, or is known to be zero. Never cleared. `missing` counts the pages without it.
 *   zero       known, and zero: nothing was placed. A fault on it is answered here with UFFDIO_ZEROPAGE.
 *
 * A fault sets `requested`, then looks at `known`; a placement sets `known`, then looks at `requested`. Both are
 * sequentially consistent, so at least one of the two sees the other, and no thread is forgotten.
 *
 * Why UFFDIO_COPY, for memfd too
 * ------------------------------
 * Filling an alias mapping and then exposing the page with UFFDIO_CONTINUE saves no copy, since a frame is verified
 * before any of it is placed, and costs a page fault in the alias. COPY takes half the time (docs/measurements.md) and is
 * atomic: content and page appear together. CONTINUE is for pages that are in the page cache already although nobody
 * here has mapped them: a hole which another process read through its own mapping fills with zeros.
 *
 * After a page is known, a *missing* fault on it means that somebody threw it away: zeros are right. ZEROPAGE is atomic
 * against a placement that is being made visible, so that the answer to any fault on a known page is: CONTINUE for a minor
 * fault, ZEROPAGE for a missing one, and WAKE when the kernel says EEXIST, since EEXIST wakes nobody.
 *
 * Locks
 * -----
 * shard->lock guards what other threads share with a fault thread: its ranges, the faults it waits for, its
 * histograms, the channel that is handed to it. It is never held over a system call that can wait for the machine or the
 * network. The registry of blocks and shards only grows, and is published with release stores. watch_lock guards who waits
 * for ranges of pages; no other lock is held with it.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "events.h"
#include "postcopy.h"
#include "runtime.h"
#include "states.h"
#include "stream.h"
#include "uffd_abi.h"
#include "util.h"

#define EVENTS_PER_READ 64
/* A thread with a signal pending does not wait in a fault that a system call raised, but raises it again and again. After so
 * many repetitions in a row the fault thread rests between two reads of the userfaultfd, or it would burn a processor for as
 * long as the page takes; meanwhile a new fault waits so much longer. */
#define REPEATS_BEFORE_REST 64
#define REST_NS 500000
#define RECEIVE_BYTES (PC_FRAME_HEADER_BYTES + PC_FRAME_MAX_PAYLOAD_BYTES)
#define SMALL_RECEIVE_BYTES (64 * 1024)
#define FILL_WINDOW 128 /* requests for missing pages that may be under way without a fault */
#define FILL_REQUEST ((uint32_t)PC_PAGER_REQUEST_AHEAD) /* nobody waits for it; the answer brings the bit back */
#define MAX_SEGMENTS 64

struct segment { /* part of a block guarded by one shard */
    uint64_t first_page, pages;
    uint32_t shard;
};

struct block {
    struct pc_memory memory;
    uint64_t pages, words;
    uint64_t *requested, *claimed, *known, *zero;
    struct pc_states states; /* where the last three are, when they are to outlive this pager */
    struct segment segments[MAX_SEGMENTS];
    uint32_t segment_count; /* published after the segment */
};

struct range { /* what one shard guards, found by address */
    uint64_t address, bytes;
    uint64_t first_page;
    uint32_t block;
};

struct pending { /* a thread of the machine that waits */
    uint64_t page;
    uint64_t event_ns, sent_ns; /* sent_ns 0: its request has not been sent by this fault */
    uint32_t block;
    int32_t tid;
    int slot; /* -1: not a tracked thread */
};

struct wish { /* pages of a block that are to be asked for ahead of any fault */
    uint64_t page, end;
    uint32_t block;
};

struct watch { /* somebody waits for all pages of a range; those below `page` are known */
    uint64_t page, end;
    int64_t ticket;
    uint32_t block;
    int fd;
};

struct shard {
    struct pc_pager *pager;
    uint32_t index;
    int uffd, control_fd;
    uint64_t busy_poll_ns;
    uint32_t repeats; /* faults in a row that were known already; the fault thread's own */
    struct pc_uffd_api api;
    pthread_t thread;
    bool started;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct range *ranges;
    uint32_t range_count;
    struct pending *pending;
    size_t pending_count, pending_capacity;
    struct pc_histogram stages[PC_STAGES];
    struct pc_stream next; /* handed over by attach */
    bool has_next, want_disconnect, stop;
    bool connected;
    uint64_t fill_limit;
    struct wish *wishes;
    size_t wish_count, wish_capacity; /* the count is read without the lock */

    /* The fault thread's own. */
    struct pc_stream stream;
    uint8_t *receive;
    size_t receive_start, receive_end;
    uint8_t *send;
    size_t send_bytes, send_done, send_capacity;
    uint32_t next_request;
    uint32_t fill_range;
    uint64_t fill_page, fill_under_way, fill_left;
    size_t wish_turn;
};

struct bulk {
    struct pc_pager *pager;
    uint32_t index;
    struct pc_stream stream;
    uint8_t *buffer;
    pthread_t thread;
    bool started, running; /* under pager->lock; running ends with the thread */
};

struct pc_pager {
    pthread_mutex_t lock; /* adding blocks, shards and channels */
    struct pc_events events;
    struct block *blocks[PC_MAX_BLOCKS];
    uint32_t block_count;
    struct shard *shards[PC_MAX_SHARDS];
    uint32_t shard_count;
    struct bulk bulks[PC_MAX_BULK_CHANNELS];
    void *zero_page; /* as large as the largest page of a block that has no ZEROPAGE */
    size_t zero_page_bytes;
    int32_t tids[PC_MAX_TRACKED_THREADS];
    uint64_t blocked_ns[PC_MAX_TRACKED_THREADS];
    pthread_mutex_t watch_lock;
    struct watch *watches;
    size_t watch_count, watch_capacity; /* the count is read without the lock */
    int64_t last_ticket;
    uint64_t missing; /* pages not known; COMPLETE is announced by who takes the last one */
    uint32_t completed;
    struct pc_pager_stats count; /* only its counters, each by atomic add */
};

#define ADD(pager, field, n) ((void)__atomic_fetch_add(&(pager)->count.field, (uint64_t)(n), __ATOMIC_RELAXED))

/* ---- bitmaps ------------------------------------------------------------------------------------------------------ */

static bool test_bit(const uint64_t *words, uint64_t bit)
{
    return __atomic_load_n(&words[bit / 64], __ATOMIC_SEQ_CST) >> (bit % 64) & 1;
}

static bool test_and_set_bit(uint64_t *words, uint64_t bit)
{
    uint64_t mask = UINT64_C(1) << (bit % 64);

    return __atomic_fetch_or(&words[bit / 64], mask, __ATOMIC_SEQ_CST) & mask;
}

/* The bits of word `word` that belong to [first, first + count). */
static uint64_t word_mask(uint64_t word, uint64_t first, uint64_t count)
{
    uint64_t low = word * 64, end = first + count, mask = ~UINT64_C(0);

    if (first > low)
        mask &= ~UINT64_C(0) << (first - low);
    if (end < low + 64)
        mask &= ~UINT64_C(0) >> (low + 64 - end);
    return mask;
}

static bool any_set(const uint64_t *words, uint64_t first, uint64_t count)
{
    for (uint64_t word = first / 64; word * 64 < first + count; word++)
        if (__atomic_load_n(&words[word], __ATOMIC_SEQ_CST) & word_mask(word, first, count))
            return true;
    return false;
}

static void set_range(uint64_t *words, uint64_t first, uint64_t count)
{
    for (uint64_t word = first / 64; word * 64 < first + count; word++)
        (void)__atomic_fetch_or(&words[word], word_mask(word, first, count), __ATOMIC_SEQ_CST);
}

static void clear_range(uint64_t *words, uint64_t first, uint64_t count)
{
    for (uint64_t word = first / 64; word * 64 < first + count; word++)
        (void)__atomic_fetch_and(&words[word], ~word_mask(word, first, count), __ATOMIC_SEQ_CST);
}

/* The first page of [page, end) that is in neither map; `end` when there is none. */
static uint64_t next_in_neither(const uint64_t *one, const uint64_t *other, uint64_t page, uint64_t end)
{
    for (uint64_t word = page / 64; page < end; page = ++word * 64) {
        uint64_t taken = __atomic_load_n(&one[word], __ATOMIC_SEQ_CST) | __atomic_load_n(&other[word], __ATOMIC_SEQ_CST);
        uint64_t left = ~taken & word_mask(word, page, end - page);

        if (left)
            return word * 64 + (uint64_t)__builtin_ctzll(left);
    }
    return end;
}

/* ---- placing ------------------------------------------------------------------------------------------------------ */

static uint64_t page_address(const struct block *block, uint64_t page)
{
    return (uint64_t)(uintptr_t)block->memory.base + page * block->memory.page_bytes;
}

static void wake(const struct shard *shard, uint64_t address, uint64_t bytes)
{
    (void)pc_uffd_wake(shard->uffd, address, bytes);
}

/* The shard that guards `page`, and how many of the next `pages` it guards as well. */
static struct shard *find_shard(struct pc_pager *pager, const struct block *block, uint64_t page, uint64_t *pages)
{
    uint32_t count = __atomic_load_n(&block->segment_count, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < count; i++) {
        const struct segment *segment = &block->segments[i];

        if (page - segment->first_page < segment->pages) {
            uint64_t rest = segment->pages - (page - segment->first_page);

            if (*pages > rest)
                *pages = rest;
            return pager->shards[segment->shard];
        }
    }
    return NULL;
}

static void end_watch(struct pc_pager *pager, size_t index)
{
    close(pager->watches[index].fd);
    pager->watches[index] = pager->watches[pager->watch_count - 1];
    __atomic_store_n(&pager->watch_count, pager->watch_count - 1, __ATOMIC_SEQ_CST);
}

/* Pages have become known: tells those who waited for the last one of their range. Whoever begins to watch first counts
 * itself, then looks at `known`; here it is the other way round, so that one of the two sees the other. */
static void tell_watches(struct pc_pager *pager)
{
    if (!__atomic_load_n(&pager->watch_count, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&pager->watch_lock);
    for (size_t i = pager->watch_count; i-- > 0;) {
        struct watch *watch = &pager->watches[i];
        const uint64_t *known = pager->blocks[watch->block]->known;
        uint64_t one = 1;

        watch->page = next_in_neither(known, known, watch->page, watch->end);
        if (watch->page == watch->end) {
            (void)!write(watch->fd, &one, sizeof(one));
            end_watch(pager, i);
        }
    }
    pthread_mutex_unlock(&pager->watch_lock);
}

static void no_longer_missing(struct pc_pager *pager, uint64_t pages)
{
    if (pages)
        tell_watches(pager);
    if (pages && __atomic_sub_fetch(&pager->missing, pages, __ATOMIC_SEQ_CST) == 0 &&
        !__atomic_exchange_n(&pager->completed, 1, __ATOMIC_SEQ_CST))
        pc_events_push(&pager->events, PC_EVENT_COMPLETE, 0, 0, 0, "every page is here");
}

/* Under the lock. */
static bool waited_for(const struct shard *shard, uint32_t block, uint64_t page)
{
    for (size_t i = 0; i < shard->pending_count; i++)
        if (shard->pending[i].block == block && shard->pending[i].page == page)
            return true;
    return false;
}

/* Accounts the threads that waited for these pages; they have been woken. received_ns is 0 when the pages did not come
 * in answer to a request. */
static void settle_pending(struct shard *shard, uint32_t block, uint64_t first, uint64_t pages, uint64_t received_ns)
{
    uint64_t placed_ns = pc_now_ns();

    pthread_mutex_lock(&shard->lock);
    for (size_t i = 0; i < shard->pending_count;) {
        struct pending *fault = &shard->pending[i];

        if (fault->block != block || fault->page - first >= pages) {
            i++;
            continue;
        }
        pc_histogram_add(&shard->stages[PC_STAGE_TOTAL], placed_ns - fault->event_ns);
        if (fault->sent_ns && received_ns > fault->sent_ns) {
            pc_histogram_add(&shard->stages[PC_STAGE_SENT], fault->sent_ns - fault->event_ns);
            pc_histogram_add(&shard->stages[PC_STAGE_RECEIVED], received_ns - fault->sent_ns);
            pc_histogram_add(&shard->stages[PC_STAGE_PLACED], placed_ns - received_ns);
        }
        if (fault->slot >= 0)
            (void)__atomic_fetch_add(&shard->pager->blocked_ns[fault->slot], placed_ns - fault->event_ns,
                                     __ATOMIC_RELAXED);
        *fault = shard->pending[--shard->pending_count];
    }
    pthread_mutex_unlock(&shard->lock);
}

/* Answers a fault on a page that is known: see the head of this file. */
static int show_known(struct shard *shard, const struct block *block, uint64_t page, bool minor)
{
    uint64_t address = page_address(block, page), bytes = block->memory.page_bytes, done;
    int error;

    do {
        if (minor)
            error = pc_uffd_continue(shard->uffd, address, bytes, 0, &done);
        else if (block->memory.kind == PC_MEMORY_HUGETLB)
            error = pc_uffd_copy(shard->uffd, address, shard->pager->zero_page, bytes, 0, &done);
        else
            error = pc_uffd_zeropage(shard->uffd, address, bytes, 0, &done);
    } while (error == -EAGAIN);
    /* Whatever else the kernel says, let the thread look again: if the page still is not there, it faults anew. */
    if (error)
        wake(shard, address, bytes);
    /* EFAULT from CONTINUE: thrown away again since the fault, which comes back as a missing one. */
    return error == -EEXIST || (minor && error == -EFAULT) ? 0 : error;
}

/* Changes a page in the page cache without going through the machine's mapping. */
static int overwrite_page(const struct block *block, uint64_t page, const uint8_t *content)
{
    uint64_t bytes = block->memory.page_bytes;
    void *alias;

    if (block->memory.kind != PC_MEMORY_HUGETLB)
        return pc_pwrite_all(block->memory.fd, content, bytes, page * bytes);
    /* hugetlbfs has no write(2). */
    alias = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, block->memory.fd, (off_t)(page * bytes));
    if (alias == MAP_FAILED)
        return -errno;
    memcpy(alias, content, bytes);
    return munmap(alias, bytes) ? -errno : 0;
}

/* The page is in the page cache although this pager has not placed it: its content is not ours (zeros, most likely, see
 * the head of this file), and nobody has it mapped through the userfaultfd. Overwrite it, then expose it. */
static int place_over(struct shard *shard, const struct block *block, uint64_t page, const uint8_t *content)
{
    uint64_t address = page_address(block, page), bytes = block->memory.page_bytes, done;
    int error = 0;

    if (block->memory.fd >= 0) {
        error = overwrite_page(block, page, content);
        if (!error) {
            do
                error = pc_uffd_continue(shard->uffd, address, bytes, 0, &done);
            while (error == -EAGAIN);
            if (error == -EEXIST)
                error = 0;
        }
    } else {
        error = -EEXIST; /* anonymous memory is nobody else's: a page there is a mistake worth stopping for */
    }
    wake(shard, address, bytes);
    return error;
}

/* Places claimed pages that all belong to one shard. After an error *placed of them are there, and are not to be placed again:
 * the machine may have written to them. */
static int place_run(struct shard *shard, struct block *block, uint64_t first, uint64_t pages, const uint8_t *content,
                     uint64_t *placed)
{
    uint64_t page_bytes = block->memory.page_bytes, bytes = pages * page_bytes, at = 0;

    while (at < bytes) {
        uint64_t done = 0;
        int error = pc_uffd_copy(shard->uffd, page_address(block, first) + at, content + at, bytes - at, 0, &done);

        at += done;
        if (!error || at >= bytes)
            break;
        if (error == -EEXIST) {
            error = place_over(shard, block, first + at / page_bytes, content + at);
            if (!error)
                at += page_bytes;
        } else if (error == -EAGAIN) {
            /* The mapping is changing, or the kernel stopped half way: go on from where it stopped. */
            if (!done)
                (void)sched_yield();
            error = 0;
        }
        if (error) {
            *placed = at / page_bytes;
            return error;
        }
    }
    *placed = pages;
    return 0;
}

static int fatal(struct pc_pager *pager, int error, const char *what, uint32_t block, uint64_t page)
{
    pc_events_push(&pager->events, PC_EVENT_FATAL, 0, 0, -error, "%s page %llu of RAM block %u: %s", what,
                   (unsigned long long)page, block, strerror(-error));
    return error;
}

/* Takes what a frame brought: claims each page and places the ones that nobody had. */
static int take_pages(struct pc_pager *pager, const struct pc_frame *frame, const uint8_t *content, uint64_t received_ns)
{
    struct block *block = pager->blocks[frame->block];
    uint64_t page = frame->first_page, end = page + frame->pages;
    int error = 0;

    while (page < end && !error) {
        uint64_t word = page / 64, mask = word_mask(word, page, end - page), mine, count, placed = 0;

        /* All counting before no_longer_missing: who hears COMPLETE reads final figures. */
        mine = mask & ~__atomic_fetch_or(&block->claimed[word], mask, __ATOMIC_SEQ_CST);
        if (mask & ~mine)
            ADD(pager, duplicate_pages, __builtin_popcountll(mask & ~mine));
        while (mine && !error) {
            uint64_t first = word * 64 + (uint64_t)__builtin_ctzll(mine), shifted = mine >> (first % 64), done = 0;
            struct shard *shard;

            count = ~shifted ? (uint64_t)__builtin_ctzll(~shifted) : 64;
            shard = find_shard(pager, block, first, &count);
            if (shard)
                error = place_run(shard, block, first, count,
                                  content + (first - frame->first_page) * block->memory.page_bytes, &done);
            else
                error = -ENOENT;
            if (done) {
                set_range(block->known, first, done);
                if (any_set(block->requested, first, done))
                    settle_pending(shard, frame->block, first, done, frame->flags & PC_FRAME_DEMAND ? received_ns : 0);
                placed += done;
                mine &= ~word_mask(word, first, done);
            }
            if (error) {
                /* Somebody else may bring what this frame could not. */
                (void)__atomic_fetch_and(&block->claimed[word], ~mine, __ATOMIC_SEQ_CST);
                (void)fatal(pager, error, "cannot place", frame->block, first + done);
            }
        }
        if (frame->flags & PC_FRAME_DEMAND)
            ADD(pager, demand_pages, placed);
        else
            ADD(pager, background_pages, placed);
        no_longer_missing(pager, placed);
        page = (word + 1) * 64;
    }
    return error;
}

/* The pages are zero: nothing is placed but for those that somebody waits for. */
static int take_zeros(struct pc_pager *pager, uint32_t index, uint64_t page, uint64_t pages, uint64_t received_ns)
{
    struct block *block = pager->blocks[index];
    uint64_t end = page + pages, news = 0, duplicates = 0;
    int error = 0;

    while (page < end) {
        uint64_t word = page / 64, mask = word_mask(word, page, end - page), mine, waiting;

        mine = mask & ~__atomic_fetch_or(&block->claimed[word], mask, __ATOMIC_SEQ_CST);
        duplicates += (uint64_t)__builtin_popcountll(mask & ~mine);
        news += (uint64_t)__builtin_popcountll(mine);
        (void)__atomic_fetch_or(&block->zero[word], mine, __ATOMIC_SEQ_CST);
        (void)__atomic_fetch_or(&block->known[word], mine, __ATOMIC_SEQ_CST);
        waiting = mine & __atomic_load_n(&block->requested[word], __ATOMIC_SEQ_CST);
        for (; waiting; waiting &= waiting - 1) {
            uint64_t first = word * 64 + (uint64_t)__builtin_ctzll(waiting), one = 1;
            struct shard *shard = find_shard(pager, block, first, &one);

            bool waited;
            int result;

            if (!shard)
                continue;
            pthread_mutex_lock(&shard->lock);
            waited = waited_for(shard, index, first);
            pthread_mutex_unlock(&shard->lock);
            if (!waited) {
                /* Requested, but by no thread: memory that is zero is to cost nothing. Should there be one that could not
                 * be accounted, it faults anew and finds the page known. */
                wake(shard, page_address(block, first), block->memory.page_bytes);
                continue;
            }
            result = show_known(shard, block, first, false);
            if (result && !error)
                error = fatal(pager, result, "cannot show zero", index, first);
            settle_pending(shard, index, first, 1, received_ns);
        }
        page = (word + 1) * 64;
    }
    ADD(pager, zero_pages, news);
    if (duplicates)
        ADD(pager, duplicate_pages, duplicates);
    no_longer_missing(pager, news);
    return error;
}

/* A verified header against what this pager knows; then the payload. 0, or -EBADMSG with the reason. */
static int check_frame(struct pc_pager *pager, const struct pc_frame *frame, char *error, size_t error_bytes)
{
    const struct block *block;

    if (frame->type == PC_FRAME_END)
        return 0;
    if (frame->type != PC_FRAME_PAGES && frame->type != PC_FRAME_ZERO && frame->type != PC_FRAME_ERROR)
        return pc_fail(EBADMSG, error, error_bytes, "a frame of type %u does not belong here", frame->type);
    if (frame->block >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE))
        return pc_fail(EBADMSG, error, error_bytes, "a frame names RAM block %u, which there is not", frame->block);
    block = pager->blocks[frame->block];
    if (frame->first_page >= block->pages || frame->pages > block->pages - frame->first_page)
        return pc_fail(EBADMSG, error, error_bytes, "a frame names pages %llu+%u of RAM block %u, which has %llu",
                        (unsigned long long)frame->first_page, frame->pages, frame->block,
                        (unsigned long long)block->pages);
    if (frame->type == PC_FRAME_PAGES && frame->payload_bytes != frame->pages * block->memory.page_bytes)
        return pc_fail(EBADMSG, error, error_bytes, "a frame of %u pages carries %u bytes", frame->pages,
                        frame->payload_bytes);
    return 0;
}

static int take_frame(struct pc_pager *pager, const struct pc_frame *frame, const uint8_t *payload, int kind,
                      uint32_t channel, char *error, size_t error_bytes)
{
    uint64_t received_ns = pc_now_ns();

    if (frame->payload_bytes && pc_crc32c(0, payload, frame->payload_bytes) != frame->payload_crc)
        return pc_fail(EBADMSG, error, error_bytes, "the content of a frame of %u pages is damaged (CRC32C differs)",
                        frame->pages);
    switch (frame->type) {
    case PC_FRAME_PAGES:
        return take_pages(pager, frame, payload, received_ns);
    case PC_FRAME_ZERO:
        return take_zeros(pager, frame->block, frame->first_page, frame->pages,
                          frame->flags & PC_FRAME_DEMAND ? received_ns : 0);
    case PC_FRAME_END:
        if (kind != PC_CHANNEL_BULK)
            return pc_fail(EBADMSG, error, error_bytes, "a frame of type %u does not belong here", frame->type);
        pc_events_push(&pager->events, PC_EVENT_BULK_END, kind, (int)channel, 0, "every page has been offered");
        return 0;
    default: /* PC_FRAME_ERROR: the channel is fine, the page is not to be had */
        pc_events_push(&pager->events, PC_EVENT_FATAL, kind, (int)channel, EIO,
                       "the source cannot serve page %llu of RAM block %u: %.*s",
                       (unsigned long long)frame->first_page, frame->block,
                       (int)(frame->payload_bytes < 120 ? frame->payload_bytes : 120), (const char *)payload);
        return 0;
    }
}

/* ---- the fault thread --------------------------------------------------------------------------------------------- */

static void queue_request(struct shard *shard, uint32_t block, uint64_t page, uint32_t id_bits)
{
    struct pc_frame frame = {.type = PC_FRAME_REQUEST,
                             .block = (uint16_t)block,
                             .first_page = page,
                             .pages = 1,
                             .request_id = (shard->next_request++ & ~FILL_REQUEST) | id_bits};

    if (shard->send_bytes + PC_FRAME_HEADER_BYTES > shard->send_capacity) {
        size_t capacity = shard->send_capacity * 2;
        uint8_t *larger = realloc(shard->send, capacity);

        if (!larger) {
            (void)fatal(shard->pager, -ENOMEM, "cannot request", block, page);
            return;
        }
        shard->send = larger;
        shard->send_capacity = capacity;
    }
    pc_frame_encode(&frame, shard->send + shard->send_bytes);
    shard->send_bytes += PC_FRAME_HEADER_BYTES;
    ADD(shard->pager, requests, 1);
}

static int thread_slot(struct pc_pager *pager, int32_t tid)
{
    if (tid > 0)
        for (int slot = 0; slot < PC_MAX_TRACKED_THREADS; slot++)
            if (__atomic_load_n(&pager->tids[slot], __ATOMIC_RELAXED) == tid)
                return slot;
    return -1;
}

/* True when the fault is new; false when the same thread waits for the same page already. Under the lock. */
static bool add_pending(struct shard *shard, uint32_t block, uint64_t page, int32_t tid, uint64_t now_ns, bool sending)
{
    struct pending *fault;

    for (size_t i = 0; i < shard->pending_count; i++)
        if (shard->pending[i].page == page && shard->pending[i].block == block && shard->pending[i].tid == tid)
            return false;
    if (shard->pending_count == shard->pending_capacity) {
        size_t capacity = shard->pending_capacity ? shard->pending_capacity * 2 : 64;
        struct pending *larger = realloc(shard->pending, capacity * sizeof(*larger));

        if (!larger)
            return true; /* only the accounting of this fault is lost: the request is what matters */
        shard->pending = larger;
        shard->pending_capacity = capacity;
    }
    fault = &shard->pending[shard->pending_count++];
    *fault = (struct pending){.page = page, .block = block, .tid = tid, .slot = thread_slot(shard->pager, tid)};
    fault->event_ns = now_ns;
    fault->sent_ns = sending ? now_ns : 0; /* corrected when the request has left */
    return true;
}

static void take_fault(struct shard *shard, const struct uffd_msg *message, uint64_t now_ns)
{
    struct pc_pager *pager = shard->pager;
    uint64_t address = message->arg.pagefault.address, page = 0;
    bool minor = message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR, known, fresh;
    int32_t tid = (int32_t)message->arg.pagefault.feat.ptid;
    struct block *block = NULL;
    uint32_t index = 0;

    ADD(pager, faults, 1);
    pthread_mutex_lock(&shard->lock);
    for (uint32_t i = 0; i < shard->range_count; i++) {
        const struct range *range = &shard->ranges[i];

        if (address - range->address < range->bytes) {
            index = range->block;
            block = pager->blocks[index];
            page = range->first_page + (address - range->address) / block->memory.page_bytes;
            break;
        }
    }
    if (!block) {
        /* Disarmed since: the kernel answers the fault by itself once the thread looks again. */
        pthread_mutex_unlock(&shard->lock);
        wake(shard, address & ~(pc_page_bytes() - 1), pc_page_bytes());
        return;
    }
    fresh = !test_and_set_bit(block->requested, page);
    known = test_bit(block->known, page);
    if (!known) {
        /* A page that a bulk thread has claimed is a moment from being known; asking for it would bring it twice. */
        bool sending = fresh && shard->connected && !test_bit(block->claimed, page);

        if (!add_pending(shard, index, page, tid, now_ns, sending)) {
            ADD(pager, repeated_faults, 1);
            shard->repeats++;
        } else {
            shard->repeats = 0;
            if (!fresh)
                ADD(pager, repeated_faults, 1);
        }
        if (sending)
            queue_request(shard, index, page, 0);
    }
    pthread_mutex_unlock(&shard->lock);
    if (known) {
        int error = show_known(shard, block, page, minor);

        if (!test_bit(block->zero, page))
            ADD(pager, repeated_faults, 1);
        if (error && error != -ENOENT && error != -ESRCH)
            (void)fatal(pager, error, "cannot show", index, page);
    }
}

/* Takes as many events as one read gives; the loop comes back for more. */
static void drain_events(struct shard *shard)
{
    struct uffd_msg messages[EVENTS_PER_READ];
    ssize_t got = read(shard->uffd, messages, sizeof(messages));
    uint64_t now_ns;

    if (got <= 0)
        return; /* EAGAIN: the fault went away before it was read */
    now_ns = pc_now_ns();
    ADD(shard->pager, event_reads, 1);
    for (size_t i = 0; i < (size_t)got / sizeof(*messages); i++)
        if (messages[i].event == UFFD_EVENT_PAGEFAULT)
            take_fault(shard, &messages[i], now_ns);
}

static void close_stream(struct shard *shard, int error, const char *text)
{
    struct pc_pager *pager = shard->pager;

    pthread_mutex_lock(&shard->lock);
    shard->connected = false;
    for (size_t i = 0; i < shard->pending_count; i++)
        shard->pending[i].sent_ns = 0;
    pthread_mutex_unlock(&shard->lock);
    pc_stream_close(&shard->stream);
    shard->receive_start = shard->receive_end = 0;
    shard->send_bytes = shard->send_done = 0;
    if (text)
        pc_events_push(&pager->events, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, (int)shard->index, -error, "%s", text);
}

static void flush_requests(struct shard *shard)
{
    size_t queued = shard->send_bytes;

    while (shard->stream.fd >= 0 && shard->send_done < shard->send_bytes) {
        struct iovec part = {.iov_base = shard->send + shard->send_done, .iov_len = shard->send_bytes - shard->send_done};
        ssize_t sent = shard->stream.write(&shard->stream, &part, 1, false);

        if (sent == -EAGAIN)
            return; /* poll tells when there is room */
        if (sent < 0) {
            close_stream(shard, (int)sent, strerror((int)-sent));
            return;
        }
        ADD(shard->pager, bytes_sent, sent);
        shard->send_done += (size_t)sent;
    }
    if (queued) {
        uint64_t now_ns = pc_now_ns();

        shard->send_bytes = shard->send_done = 0;
        pthread_mutex_lock(&shard->lock);
        for (size_t i = shard->pending_count; i-- > 0;) {
            struct pending *fault = &shard->pending[i];

            if (fault->sent_ns == fault->event_ns)
                fault->sent_ns = now_ns;
        }
        pthread_mutex_unlock(&shard->lock);
    }
}

static void receive_frames(struct shard *shard)
{
    char text[PC_ERROR_BYTES] = "";
    size_t room;
    ssize_t got;
    int error = 0;

    if (shard->receive_start == shard->receive_end)
        shard->receive_start = shard->receive_end = 0;
    room = RECEIVE_BYTES - shard->receive_end;
    if (room < SMALL_RECEIVE_BYTES && shard->receive_start) {
        memmove(shard->receive, shard->receive + shard->receive_start, shard->receive_end - shard->receive_start);
        shard->receive_end -= shard->receive_start;
        shard->receive_start = 0;
        room = RECEIVE_BYTES - shard->receive_end;
    }
    /* Small reads first: untouched parts of the buffer cost nothing, and 4 KiB pages never need them. */
    if (shard->receive_end - shard->receive_start < SMALL_RECEIVE_BYTES && room > SMALL_RECEIVE_BYTES)
        room = SMALL_RECEIVE_BYTES;
    got = shard->stream.read(&shard->stream, shard->receive + shard->receive_end, room, false);
    if (got == -EAGAIN)
        return;
    if (got <= 0) {
        if (!got && shard->receive_end > shard->receive_start)
            close_stream(shard, -EPIPE, PC_STREAM_CUT_TEXT);
        else
            close_stream(shard, (int)got, got ? strerror((int)-got) : "the source closed the connection");
        return;
    }
    ADD(shard->pager, bytes_received, got);
    shard->receive_end += (size_t)got;
    while (!error && shard->receive_end - shard->receive_start >= PC_FRAME_HEADER_BYTES) {
        const uint8_t *at = shard->receive + shard->receive_start;
        struct pc_frame frame;

        error = pc_frame_decode(at, &frame, text, sizeof(text));
        if (!error)
            error = check_frame(shard->pager, &frame, text, sizeof(text));
        if (error || shard->receive_end - shard->receive_start < PC_FRAME_HEADER_BYTES + (size_t)frame.payload_bytes)
            break;
        error = take_frame(shard->pager, &frame, at + PC_FRAME_HEADER_BYTES, PC_CHANNEL_URGENT, shard->index, text,
                           sizeof(text));
        shard->receive_start += PC_FRAME_HEADER_BYTES + (size_t)frame.payload_bytes;
        if (frame.flags & PC_FRAME_DEMAND && frame.request_id & FILL_REQUEST && shard->fill_under_way)
            shard->fill_under_way--;
    }
    if (error == -EBADMSG)
        ADD(shard->pager, frames_refused, 1);
    if (error)
        close_stream(shard, error, text[0] ? text : strerror(-error));
}

/* False: no memory. Under the lock. */
static bool add_wish(struct shard *shard, uint32_t block, uint64_t page, uint64_t end)
{
    if (shard->wish_count) {
        struct wish *last = &shard->wishes[shard->wish_count - 1];

        if (last->block == block && last->page <= page && page <= last->end) {
            if (last->end < end)
                last->end = end;
            return true;
        }
    }
    if (shard->wish_count == shard->wish_capacity) {
        size_t capacity = shard->wish_capacity ? shard->wish_capacity * 2 : 16;
        struct wish *larger = realloc(shard->wishes, capacity * sizeof(*larger));

        if (!larger)
            return false;
        shard->wishes = larger;
        shard->wish_capacity = capacity;
    }
    shard->wishes[shard->wish_count] = (struct wish){.page = page, .end = end, .block = block};
    __atomic_store_n(&shard->wish_count, shard->wish_count + 1, __ATOMIC_RELAXED);
    return true;
}

/* A page that somebody wished for and nobody has asked for. One page of each wish in turn: a small one must not wait for a
 * large one that came before. False when there is none. */
static bool take_wish(struct shard *shard, uint32_t *index, uint64_t *page)
{
    bool found = false;

    /* No lock on the path of a fault when there is nothing: whoever wishes pokes this thread afterwards. */
    if (!__atomic_load_n(&shard->wish_count, __ATOMIC_RELAXED))
        return false;
    pthread_mutex_lock(&shard->lock);
    while (shard->wish_count && !found) {
        struct wish *wish = &shard->wishes[++shard->wish_turn % shard->wish_count];
        const struct block *block = shard->pager->blocks[wish->block];

        *index = wish->block;
        *page = next_in_neither(block->claimed, block->requested, wish->page, wish->end);
        found = *page < wish->end && !test_and_set_bit(block->requested, *page);
        wish->page = *page + 1;
        if (wish->page >= wish->end) {
            *wish = shard->wishes[shard->wish_count - 1];
            __atomic_store_n(&shard->wish_count, shard->wish_count - 1, __ATOMIC_RELAXED);
        }
    }
    pthread_mutex_unlock(&shard->lock);
    return found;
}

/* Requests pages that nobody waits for, a window at a time, so that a fault never stands behind more than a window. */
static void fill(struct shard *shard)
{
    struct pc_pager *pager = shard->pager;
    uint32_t index;
    uint64_t wished;

    while (shard->stream.fd >= 0 && shard->fill_under_way < FILL_WINDOW && take_wish(shard, &index, &wished)) {
        queue_request(shard, index, wished, FILL_REQUEST);
        shard->fill_under_way++;
    }
    /* Without a channel nothing: what cannot be sent now must not be marked as requested. */
    while (shard->stream.fd >= 0 && shard->fill_left && shard->fill_under_way < FILL_WINDOW) {
        struct range range;
        struct block *block;
        uint64_t pages, page;
        bool more;

        pthread_mutex_lock(&shard->lock);
        more = shard->fill_range < shard->range_count;
        if (more)
            range = shard->ranges[shard->fill_range];
        pthread_mutex_unlock(&shard->lock);
        if (!more)
            break;
        block = pager->blocks[range.block];
        pages = range.bytes / block->memory.page_bytes;
        if (shard->fill_page >= pages) {
            shard->fill_range++;
            shard->fill_page = 0;
            continue;
        }
        page = range.first_page + shard->fill_page++;
        if (test_bit(block->claimed, page) || test_and_set_bit(block->requested, page))
            continue;
        queue_request(shard, range.block, page, FILL_REQUEST);
        shard->fill_under_way++;
        shard->fill_left--;
    }
}

/* Takes the mark `requested` from the pages of a range that no thread waits for, and wishes for them. Under the lock. */
static void forget_requests(struct shard *shard, const struct range *range)
{
    struct block *block = shard->pager->blocks[range->block];
    uint64_t end = range->first_page + range->bytes / block->memory.page_bytes;

    for (uint64_t word = range->first_page / 64; word * 64 < end; word++) {
        uint64_t lost = __atomic_load_n(&block->requested[word], __ATOMIC_SEQ_CST) &
                        ~__atomic_load_n(&block->claimed[word], __ATOMIC_SEQ_CST) &
                        word_mask(word, range->first_page, end - range->first_page);

        for (; lost; lost &= lost - 1) {
            uint64_t page = word * 64 + (uint64_t)__builtin_ctzll(lost);

            if (waited_for(shard, range->block, page))
                continue;
            clear_range(block->requested, page, 1);
            if (!add_wish(shard, range->block, page, page + 1))
                shard->fill_left++; /* without memory for the wish: any missing page instead of this one */
        }
    }
}

/* A new channel: everything that was asked for and did not come is asked for again, what threads wait for first. */
static void adopt_stream(struct shard *shard)
{
    struct pc_pager *pager = shard->pager;

    shard->stream = shard->next;
    shard->has_next = false;
    shard->connected = true;
    for (size_t i = 0; i < shard->pending_count; i++) {
        struct pending *fault = &shard->pending[i];
        bool first = true;

        for (size_t j = 0; j < i && first; j++)
            first = shard->pending[j].block != fault->block || shard->pending[j].page != fault->page;
        if (first && !test_bit(pager->blocks[fault->block]->known, fault->page)) {
            queue_request(shard, fault->block, fault->page, 0);
            fault->sent_ns = fault->event_ns;
        }
    }
    /* Whatever else was asked for on the old channel nobody waits for: it is asked for again, but after those. */
    for (uint32_t i = 0; i < shard->range_count; i++)
        forget_requests(shard, &shard->ranges[i]);
    shard->fill_under_way = 0;
    shard->fill_range = 0;
    shard->fill_page = 0;
}

/* What other threads asked of this one. False: stop. */
static bool take_control(struct shard *shard)
{
    uint64_t drained;
    bool go_on, drop;

    (void)!read(shard->control_fd, &drained, sizeof(drained));
    pthread_mutex_lock(&shard->lock);
    drop = shard->want_disconnect || (shard->has_next && shard->stream.fd >= 0);
    pthread_mutex_unlock(&shard->lock);
    if (drop && shard->stream.fd >= 0)
        close_stream(shard, 0, NULL);
    pthread_mutex_lock(&shard->lock);
    if (shard->want_disconnect && shard->has_next) {
        pc_stream_close(&shard->next);
        shard->has_next = false;
    }
    shard->want_disconnect = false;
    if (shard->has_next)
        adopt_stream(shard);
    if (shard->fill_limit) {
        shard->fill_left = shard->fill_limit;
        shard->fill_limit = 0;
        shard->fill_range = 0;
        shard->fill_page = 0;
    }
    go_on = !shard->stop;
    pthread_cond_broadcast(&shard->changed);
    pthread_mutex_unlock(&shard->lock);
    return go_on;
}

static void *fault_thread(void *argument)
{
    struct shard *shard = argument;
    uint64_t spin_until_ns = 0;

    pc_thread_name("pc-fault", shard->index);
    pc_thread_prompt(shard->busy_poll_ns != 0);
    for (;;) {
        struct pollfd fds[3] = {
            {.fd = shard->uffd, .events = POLLIN},
            {.fd = shard->control_fd, .events = POLLIN},
            {.fd = shard->stream.fd, .events = (short)(POLLIN | (shard->send_bytes ? POLLOUT : 0))},
        };
        bool spinning = spin_until_ns && pc_now_ns() < spin_until_ns;
        int ready;

        if (shard->repeats >= REPEATS_BEFORE_REST) {
            const struct timespec rest = {.tv_nsec = REST_NS};

            shard->repeats = REPEATS_BEFORE_REST - 1; /* one read, and if that brings another repetition, one more rest */
            fds[0].fd = -1;
            ready = ppoll(fds, 3, &rest, NULL);
        } else {
            ready = poll(fds, 3, spinning ? 0 : -1);
        }
        if (ready <= 0)
            continue;
        if (fds[1].revents && !take_control(shard))
            break;
        if (fds[0].revents & POLLIN)
            drain_events(shard);
        /* take_control may have put another stream there: what was polled no longer counts then. */
        if (fds[2].revents && fds[2].fd == shard->stream.fd && !fds[1].revents)
            receive_frames(shard);
        fill(shard);
        flush_requests(shard);
        if (shard->busy_poll_ns)
            spin_until_ns = pc_now_ns() + shard->busy_poll_ns;
    }
    if (shard->stream.fd >= 0)
        close_stream(shard, 0, NULL);
    return NULL;
}

/* ---- the bulk threads --------------------------------------------------------------------------------------------- */

static void *bulk_thread(void *argument)
{
    struct bulk *bulk = argument;
    struct pc_pager *pager = bulk->pager;
    char text[PC_ERROR_BYTES] = "";
    int error;

    pc_thread_name("pc-bulk-in", bulk->index);
    pc_thread_background();
    for (;;) {
        uint8_t header[PC_FRAME_HEADER_BYTES];
        struct pc_frame frame;

        error = pc_stream_read_all(&bulk->stream, header, sizeof(header));
        if (error == -EPIPE)
            (void)pc_fail(EPIPE, text, sizeof(text), PC_STREAM_CUT_TEXT);
        if (error)
            break;
        error = pc_frame_decode(header, &frame, text, sizeof(text));
        if (!error)
            error = check_frame(pager, &frame, text, sizeof(text));
        if (!error && frame.payload_bytes) {
            error = pc_stream_read_all(&bulk->stream, bulk->buffer, frame.payload_bytes);
            /* An end between header and payload is no orderly one either. */
            if (error == -EPIPE || error == -ENODATA)
                error = pc_fail(EPIPE, text, sizeof(text), PC_STREAM_CUT_TEXT);
        }
        if (error)
            break;
        ADD(pager, bytes_received, sizeof(header) + frame.payload_bytes);
        error = take_frame(pager, &frame, bulk->buffer, PC_CHANNEL_BULK, bulk->index, text, sizeof(text));
        if (error)
            break;
    }
    if (error == -EBADMSG)
        ADD(pager, frames_refused, 1);
    pc_stream_shutdown(&bulk->stream); /* the peer learns at once; the descriptor stays until the thread is joined */
    /* Before the event: who hears it may attach the next connection at once, and must not be told that this one is busy. */
    pthread_mutex_lock(&pager->lock);
    bulk->running = false;
    pthread_mutex_unlock(&pager->lock);
    pc_events_push(&pager->events, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, (int)bulk->index,
                   error == -ENODATA ? 0 : -error, "%s",
                   error == -ENODATA ? "the source closed the connection"
                   : text[0]         ? text
                                     : strerror(-error));
    return NULL;
}

/* ---- the public face ---------------------------------------------------------------------------------------------- */

int pc_pager_new(struct pc_pager **out)
{
    struct pc_pager *pager = calloc(1, sizeof(*pager));
    int error;

    if (!pager)
        return -ENOMEM;
    error = pc_events_init(&pager->events);
    if (error) {
        free(pager);
        return error;
    }
    pthread_mutex_init(&pager->lock, NULL);
    pthread_mutex_init(&pager->watch_lock, NULL);
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++) {
        pager->bulks[i].pager = pager;
        pager->bulks[i].index = i;
        pager->bulks[i].stream.fd = -1;
    }
    *out = pager;
    return 0;
}

static uint64_t count_known(const struct block *block)
{
    uint64_t known = 0;

    for (uint64_t word = 0; word < block->words; word++)
        known += (uint64_t)__builtin_popcountll(__atomic_load_n(&block->known[word], __ATOMIC_RELAXED));
    return known;
}

static uint64_t *new_bitmap(uint64_t words)
{
    return pc_buffer_new(words * sizeof(uint64_t));
}

static void free_block(struct block *block)
{
    size_t bytes = block->words * sizeof(uint64_t);

    pc_buffer_free(block->requested, bytes);
    if (block->states.base) {
        pc_states_unmap(&block->states);
    } else {
        pc_buffer_free(block->claimed, bytes);
        pc_buffer_free(block->known, bytes);
        pc_buffer_free(block->zero, bytes);
    }
    free(block);
}

static int make_states(struct block *block)
{
    block->claimed = new_bitmap(block->words);
    block->known = new_bitmap(block->words);
    block->zero = new_bitmap(block->words);
    return block->claimed && block->known && block->zero ? 0 : -ENOMEM;
}

static int adopt_states(struct block *block, int fd)
{
    int error = pc_states_map(fd, block->pages, &block->states);

    if (error)
        return error;
    block->claimed = block->states.claimed;
    block->known = block->states.known;
    block->zero = block->states.zero;
    for (uint64_t word = 0; word < block->words; word++)
        if (block->claimed[word] & ~block->known[word])
            return -EUCLEAN; /* nobody has settled them */
    return 0;
}

static int add_block(struct pc_pager *pager, const struct pc_memory *memory, int states_fd)
{
    struct block *block;
    int index = -ENOSPC, error;

    if (!memory->base || !memory->page_bytes || !memory->size_bytes || memory->size_bytes % memory->page_bytes ||
        memory->page_bytes > PC_FRAME_MAX_PAYLOAD_BYTES) /* no frame could ever bring such a page */
        return -EINVAL;
    block = calloc(1, sizeof(*block));
    if (!block)
        return -ENOMEM;
    block->memory = *memory;
    block->pages = memory->size_bytes / memory->page_bytes;
    block->words = pc_bitmap_words(block->pages);
    block->requested = new_bitmap(block->words);
    error = !block->requested ? -ENOMEM : states_fd < 0 ? make_states(block) : adopt_states(block, states_fd);
    if (error) {
        free_block(block);
        return error;
    }
    pthread_mutex_lock(&pager->lock);
    if (memory->kind == PC_MEMORY_HUGETLB && memory->page_bytes > pager->zero_page_bytes) {
        void *zero_page = pc_buffer_new(memory->page_bytes);

        if (zero_page) {
            pc_buffer_free(pager->zero_page, pager->zero_page_bytes);
            pager->zero_page = zero_page;
            pager->zero_page_bytes = memory->page_bytes;
        } else {
            index = -ENOMEM;
        }
    }
    if (index == -ENOSPC && pager->block_count < PC_MAX_BLOCKS) {
        index = (int)pager->block_count;
        pager->blocks[index] = block;
        (void)__atomic_fetch_add(&pager->missing, block->pages - count_known(block), __ATOMIC_SEQ_CST);
        __atomic_store_n(&pager->completed, 0, __ATOMIC_SEQ_CST); /* said too early, or of fewer blocks: to be said again */
        __atomic_store_n(&pager->block_count, pager->block_count + 1, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&pager->lock);
    if (index < 0)
        free_block(block);
    return index;
}

int pc_pager_add_block(struct pc_pager *pager, const struct pc_memory *memory)
{
    return add_block(pager, memory, -1);
}

int pc_pager_add_block_with_states(struct pc_pager *pager, const struct pc_memory *memory, int states_fd)
{
    return states_fd < 0 ? -EBADF : add_block(pager, memory, states_fd);
}

int pc_pager_set_zero(struct pc_pager *pager, uint32_t block, const uint64_t *zero_words)
{
    uint64_t from = 0;

    if (block >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE))
        return -EINVAL;
    for (;;) {
        uint64_t pages = pager->blocks[block]->pages, end;
        int error;

        from = pc_bitmap_next(zero_words, pages, from, 1);
        if (from >= pages)
            return 0;
        end = pc_bitmap_next(zero_words, pages, from, 0);
        error = take_zeros(pager, block, from, end - from, 0);
        if (error)
            return error;
        from = end;
    }
}

uint64_t pc_pager_features(uint64_t available)
{
    return available & (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS |
                        UFFD_FEATURE_MINOR_HUGETLBFS | UFFD_FEATURE_THREAD_ID);
}

static void free_shard(struct shard *shard)
{
    if (shard->uffd >= 0)
        close(shard->uffd);
    if (shard->control_fd >= 0)
        close(shard->control_fd);
    pc_buffer_free(shard->receive, RECEIVE_BYTES);
    free(shard->send);
    free(shard->pending);
    free(shard->wishes);
    free(shard->ranges);
    pthread_cond_destroy(&shard->changed);
    pthread_mutex_destroy(&shard->lock);
    free(shard);
}

/* Starts the fault thread of a userfaultfd, which is the shard's from now on. Its index, or an error with its line. */
static int start_shard(struct pc_pager *pager, int uffd, const struct pc_uffd_api *api, uint32_t busy_poll_us, char *error,
                       size_t error_bytes)
{
    struct shard *shard = calloc(1, sizeof(*shard));
    int result = 0;

    if (!shard) {
        close(uffd);
        return pc_fail(ENOMEM, error, error_bytes, "no memory for a shard");
    }
    pthread_mutex_init(&shard->lock, NULL);
    pthread_cond_init(&shard->changed, NULL);
    shard->pager = pager;
    shard->uffd = uffd;
    shard->api = *api;
    shard->control_fd = shard->stream.fd = -1;
    shard->busy_poll_ns = (uint64_t)busy_poll_us * 1000;
    shard->send_capacity = EVENTS_PER_READ * PC_FRAME_HEADER_BYTES;
    shard->send = malloc(shard->send_capacity);
    shard->receive = pc_buffer_new(RECEIVE_BYTES);
    if (!shard->send || !shard->receive) {
        free_shard(shard);
        return pc_fail(ENOMEM, error, error_bytes, "no memory for a shard");
    }
    shard->control_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (shard->control_fd < 0) {
        result = -errno;
        free_shard(shard);
        return pc_fail(-result, error, error_bytes, "cannot make an eventfd: %s", strerror(-result));
    }
    pthread_mutex_lock(&pager->lock);
    if (pager->shard_count < PC_MAX_SHARDS) {
        shard->index = pager->shard_count;
        result = pc_thread_start(&shard->thread, fault_thread, shard);
        if (!result) {
            shard->started = true;
            pager->shards[shard->index] = shard;
            __atomic_store_n(&pager->shard_count, pager->shard_count + 1, __ATOMIC_RELEASE);
        }
    } else {
        result = -ENOSPC;
    }
    pthread_mutex_unlock(&pager->lock);
    if (result) {
        free_shard(shard);
        return pc_fail(-result, error, error_bytes, "cannot start a fault thread: %s", strerror(-result));
    }
    return (int)shard->index;
}

int pc_pager_add_shard(struct pc_pager *pager, int how, uint32_t busy_poll_us, char *error, size_t error_bytes)
{
    struct pc_uffd_api api;
    int result = pc_uffd_probe(how, &api);

    if (!result)
        result = pc_uffd_open(api.how, pc_pager_features(api.features), &api);
    if (result < 0)
        return pc_fail(-result, error, error_bytes, "cannot open a userfaultfd: %s", strerror(-result));
    return start_shard(pager, result, &api, busy_poll_us, error, error_bytes);
}

int pc_pager_adopt_shard(struct pc_pager *pager, int uffd, uint64_t features, uint32_t busy_poll_us, char *error,
                         size_t error_bytes)
{
    const struct pc_uffd_api api = {.features = features};
    int flags = fcntl(uffd, F_GETFL);

    if (flags < 0)
        return pc_fail(errno, error, error_bytes, "no userfaultfd: %s", strerror(errno));
    if (!(flags & O_NONBLOCK)) { /* poll(2) says POLLERR of a blocking one, for ever */
        close(uffd);
        return pc_fail(EINVAL, error, error_bytes, "the userfaultfd is a blocking one: open it with O_NONBLOCK");
    }
    return start_shard(pager, uffd, &api, busy_poll_us, error, error_bytes);
}

static struct shard *get_shard(struct pc_pager *pager, uint32_t index)
{
    return index < __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE) ? pager->shards[index] : NULL;
}

int pc_pager_arm(struct pc_pager *pager, uint32_t shard_index, uint32_t block_index, uint64_t first_page, uint64_t pages,
                 char *error, size_t error_bytes)
{
    const uint64_t needed = UINT64_C(1) << PC_UFFD_IOCTL_COPY | UINT64_C(1) << PC_UFFD_IOCTL_WAKE;
    struct shard *shard = get_shard(pager, shard_index);
    struct block *block;
    struct segment *segment;
    struct range *ranges;
    uint64_t mode = PC_UFFD_MISSING, ioctls = 0;
    int result;

    if (!shard || block_index >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE))
        return pc_fail(EINVAL, error, error_bytes, "there is no such shard or RAM block");
    block = pager->blocks[block_index];
    if (!pages || first_page >= block->pages || pages > block->pages - first_page)
        return pc_fail(EINVAL, error, error_bytes, "RAM block %u has no pages %llu+%llu", block_index,
                        (unsigned long long)first_page, (unsigned long long)pages);
    if ((block->memory.kind == PC_MEMORY_MEMFD && shard->api.features & UFFD_FEATURE_MINOR_SHMEM) ||
        (block->memory.kind == PC_MEMORY_HUGETLB && shard->api.features & UFFD_FEATURE_MINOR_HUGETLBFS))
        mode |= PC_UFFD_MINOR;

    pthread_mutex_lock(&pager->lock);
    for (uint32_t i = 0; i < block->segment_count; i++)
        if (first_page < block->segments[i].first_page + block->segments[i].pages &&
            block->segments[i].first_page < first_page + pages) {
            pthread_mutex_unlock(&pager->lock);
            return pc_fail(EBUSY, error, error_bytes, "pages %llu+%llu of RAM block %u are armed already",
                            (unsigned long long)first_page, (unsigned long long)pages, block_index);
        }
    if (block->segment_count == MAX_SEGMENTS) {
        pthread_mutex_unlock(&pager->lock);
        return pc_fail(ENOSPC, error, error_bytes, "RAM block %u is armed in too many parts", block_index);
    }
    segment = &block->segments[block->segment_count];
    *segment = (struct segment){.first_page = first_page, .pages = pages, .shard = shard_index};
    __atomic_store_n(&block->segment_count, block->segment_count + 1, __ATOMIC_RELEASE);
    /* The range before the registration: the first fault may come before this thread is back from the kernel. */
    pthread_mutex_lock(&shard->lock);
    ranges = realloc(shard->ranges, (shard->range_count + 1) * sizeof(*ranges));
    if (ranges) {
        shard->ranges = ranges;
        ranges[shard->range_count++] = (struct range){.address = page_address(block, first_page),
                                                      .bytes = pages * block->memory.page_bytes,
                                                      .first_page = first_page,
                                                      .block = block_index};
    }
    pthread_mutex_unlock(&shard->lock);
    result = ranges ? pc_uffd_register(shard->uffd, page_address(block, first_page), pages * block->memory.page_bytes,
                                       mode, &ioctls)
                    : -ENOMEM;
    if (!result && (ioctls & needed) != needed) {
        (void)pc_uffd_unregister(shard->uffd, page_address(block, first_page), pages * block->memory.page_bytes);
        result = -EOPNOTSUPP;
    }
    if (result) {
        pthread_mutex_lock(&shard->lock);
        if (ranges)
            shard->range_count--;
        pthread_mutex_unlock(&shard->lock);
        __atomic_store_n(&block->segment_count, block->segment_count - 1, __ATOMIC_RELEASE);
    } else if (block->states.base) {
        /* Faults that an earlier pager has read, and those that it has not, happen again. */
        wake(shard, page_address(block, first_page), pages * block->memory.page_bytes);
    }
    pthread_mutex_unlock(&pager->lock);
    return result ? pc_fail(-result, error, error_bytes, "cannot register RAM block %u with a userfaultfd: %s", block_index,
                             strerror(-result))
                  : 0;
}

static void poke(struct shard *shard)
{
    uint64_t one = 1;

    (void)!write(shard->control_fd, &one, sizeof(one));
}

int pc_pager_attach_urgent(struct pc_pager *pager, uint32_t shard_index, int fd)
{
    struct shard *shard = get_shard(pager, shard_index);
    struct pc_stream stream;
    int error = shard ? pc_stream_tcp(&stream, fd, true) : -EINVAL;

    if (error) {
        close(fd);
        return error;
    }
    pthread_mutex_lock(&shard->lock);
    if (shard->has_next)
        pc_stream_close(&shard->next); /* attached twice in a row: the later one counts */
    shard->next = stream;
    shard->has_next = true;
    pthread_mutex_unlock(&shard->lock);
    poke(shard);
    return 0;
}

/* Joins a bulk thread that has ended or been shut down, and frees what it had. */
static void reap_bulk(struct bulk *bulk)
{
    if (bulk->started)
        pthread_join(bulk->thread, NULL);
    bulk->started = false;
    pc_stream_close(&bulk->stream);
    pc_buffer_free(bulk->buffer, PC_FRAME_MAX_PAYLOAD_BYTES);
    bulk->buffer = NULL;
}

int pc_pager_attach_bulk(struct pc_pager *pager, uint32_t channel, int fd)
{
    struct pc_stream stream;
    struct bulk *bulk;
    int error = channel < PC_MAX_BULK_CHANNELS ? pc_stream_tcp(&stream, fd, false) : -EINVAL;

    if (error) {
        close(fd);
        return error;
    }
    bulk = &pager->bulks[channel];
    pthread_mutex_lock(&pager->lock);
    if (bulk->running) {
        error = -EBUSY;
    } else {
        reap_bulk(bulk);
        bulk->buffer = pc_buffer_new(PC_FRAME_MAX_PAYLOAD_BYTES);
        bulk->stream = stream;
        error = bulk->buffer ? pc_thread_start(&bulk->thread, bulk_thread, bulk) : -ENOMEM;
        if (error) {
            bulk->stream.fd = -1;
            pc_buffer_free(bulk->buffer, PC_FRAME_MAX_PAYLOAD_BYTES);
            bulk->buffer = NULL;
        } else {
            bulk->started = bulk->running = true;
        }
    }
    pthread_mutex_unlock(&pager->lock);
    if (error)
        close(fd);
    return error;
}

int pc_pager_track_thread(struct pc_pager *pager, uint32_t slot, int32_t tid)
{
    if (slot >= PC_MAX_TRACKED_THREADS)
        return -EINVAL;
    __atomic_store_n(&pager->tids[slot], tid, __ATOMIC_RELAXED);
    return 0;
}

int64_t pc_pager_request_missing(struct pc_pager *pager, uint64_t limit)
{
    uint64_t missing = __atomic_load_n(&pager->missing, __ATOMIC_SEQ_CST);
    uint32_t shards = __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < shards && limit; i++) {
        struct shard *shard = pager->shards[i];

        pthread_mutex_lock(&shard->lock);
        shard->fill_limit = limit;
        pthread_mutex_unlock(&shard->lock);
        poke(shard);
    }
    return (int64_t)(missing < limit ? missing : limit);
}

int64_t pc_pager_request_range(struct pc_pager *pager, uint32_t index, uint64_t first_page, uint64_t pages)
{
    struct block *block;
    uint64_t page = first_page, end, missing = 0;
    bool wished = true;

    if (index >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE))
        return -EINVAL;
    block = pager->blocks[index];
    if (first_page > block->pages || pages > block->pages - first_page)
        return -EINVAL;
    end = first_page + pages;
    for (uint64_t word = page / 64; word * 64 < end && pages; word++)
        missing += (uint64_t)__builtin_popcountll(~__atomic_load_n(&block->known[word], __ATOMIC_SEQ_CST) &
                                                  word_mask(word, first_page, pages));
    while (missing && (page = next_in_neither(block->claimed, block->requested, page, end)) < end) {
        uint64_t part = end - page;
        struct shard *shard = find_shard(pager, block, page, &part);

        if (!shard) { /* not armed */
            page++;
            continue;
        }
        pthread_mutex_lock(&shard->lock);
        wished = add_wish(shard, index, page, page + part) && wished;
        pthread_mutex_unlock(&shard->lock);
        poke(shard);
        page += part;
    }
    return wished ? (int64_t)missing : -ENOMEM;
}

int64_t pc_pager_watch(struct pc_pager *pager, uint32_t block, uint64_t first_page, uint64_t pages, int event_fd)
{
    const uint64_t *known;
    struct watch *watch;
    int64_t ticket = -ENOMEM;
    int fd;

    if (block >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE) || first_page > pager->blocks[block]->pages ||
        pages > pager->blocks[block]->pages - first_page)
        return -EINVAL;
    fd = fcntl(event_fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    pthread_mutex_lock(&pager->watch_lock);
    if (pager->watch_count == pager->watch_capacity) {
        size_t capacity = pager->watch_capacity ? pager->watch_capacity * 2 : 16;
        struct watch *larger = realloc(pager->watches, capacity * sizeof(*larger));

        if (larger) {
            pager->watches = larger;
            pager->watch_capacity = capacity;
        }
    }
    if (pager->watch_count < pager->watch_capacity) {
        known = pager->blocks[block]->known;
        watch = &pager->watches[pager->watch_count];
        *watch = (struct watch){.page = first_page, .end = first_page + pages, .block = block, .fd = fd};
        __atomic_store_n(&pager->watch_count, pager->watch_count + 1, __ATOMIC_SEQ_CST);
        watch->page = next_in_neither(known, known, watch->page, watch->end);
        if (watch->page == watch->end) {
            ticket = 0;
            end_watch(pager, pager->watch_count - 1);
        } else {
            ticket = watch->ticket = ++pager->last_ticket;
        }
    } else {
        close(fd);
    }
    pthread_mutex_unlock(&pager->watch_lock);
    return ticket;
}

void pc_pager_unwatch(struct pc_pager *pager, int64_t ticket)
{
    pthread_mutex_lock(&pager->watch_lock);
    for (size_t i = 0; i < pager->watch_count; i++)
        if (pager->watches[i].ticket == ticket) {
            end_watch(pager, i);
            break;
        }
    pthread_mutex_unlock(&pager->watch_lock);
}

int pc_pager_event_fd(struct pc_pager *pager)
{
    return pager->events.fd;
}

int pc_pager_next_event(struct pc_pager *pager, struct pc_event *event)
{
    return pc_events_next(&pager->events, event);
}

int pc_pager_stats(struct pc_pager *pager, struct pc_pager_stats *stats)
{
    uint32_t blocks = __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE);
    uint32_t shards = __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE);
    uint64_t now_ns = pc_now_ns();

    memset(stats, 0, sizeof(*stats));
    for (uint32_t i = 0; i < blocks; i++) {
        const struct block *block = pager->blocks[i];
        uint64_t known = count_known(block);

        stats->total_pages += block->pages;
        stats->total_bytes += block->memory.size_bytes;
        stats->resident_pages += known;
        stats->resident_bytes += known * block->memory.page_bytes;
    }
    for (uint32_t i = 0; i < shards; i++) {
        struct shard *shard = pager->shards[i];

        pthread_mutex_lock(&shard->lock);
        stats->pending_faults += shard->pending_count;
        for (size_t j = 0; j < shard->pending_count; j++)
            if (now_ns > shard->pending[j].event_ns && now_ns - shard->pending[j].event_ns > stats->oldest_pending_ns)
                stats->oldest_pending_ns = now_ns - shard->pending[j].event_ns;
        pthread_mutex_unlock(&shard->lock);
    }
#define TAKE(field) stats->field = __atomic_load_n(&pager->count.field, __ATOMIC_RELAXED)
    TAKE(demand_pages);
    TAKE(background_pages);
    TAKE(zero_pages);
    TAKE(duplicate_pages);
    TAKE(requests);
    TAKE(faults);
    TAKE(repeated_faults);
    TAKE(event_reads);
    TAKE(bytes_received);
    TAKE(bytes_sent);
    TAKE(frames_refused);
#undef TAKE
    return 0;
}

int pc_pager_latency(struct pc_pager *pager, int stage, struct pc_histogram *histogram)
{
    uint32_t shards = __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE);

    if (stage < 0 || stage >= PC_STAGES)
        return -EINVAL;
    memset(histogram, 0, sizeof(*histogram));
    for (uint32_t i = 0; i < shards; i++) {
        struct shard *shard = pager->shards[i];

        pthread_mutex_lock(&shard->lock);
        pc_histogram_merge(histogram, &shard->stages[stage]);
        pthread_mutex_unlock(&shard->lock);
    }
    return 0;
}

int pc_pager_blocktime(struct pc_pager *pager, uint64_t *blocktime_ns, uint32_t slots)
{
    uint32_t shards = __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE);
    uint64_t now_ns = pc_now_ns();

    if (slots > PC_MAX_TRACKED_THREADS)
        slots = PC_MAX_TRACKED_THREADS;
    for (uint32_t slot = 0; slot < slots; slot++)
        blocktime_ns[slot] = __atomic_load_n(&pager->blocked_ns[slot], __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < shards; i++) {
        struct shard *shard = pager->shards[i];

        pthread_mutex_lock(&shard->lock);
        for (size_t j = 0; j < shard->pending_count; j++) {
            const struct pending *fault = &shard->pending[j];

            if (fault->slot >= 0 && (uint32_t)fault->slot < slots && now_ns > fault->event_ns)
                blocktime_ns[fault->slot] += now_ns - fault->event_ns;
        }
        pthread_mutex_unlock(&shard->lock);
    }
    return (int)slots;
}

int pc_pager_received(struct pc_pager *pager, uint32_t block, uint64_t *words)
{
    if (block >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE))
        return -EINVAL;
    for (uint64_t word = 0; word < pager->blocks[block]->words; word++)
        words[word] = __atomic_load_n(&pager->blocks[block]->known[word], __ATOMIC_SEQ_CST);
    return 0;
}

int pc_pager_disconnect(struct pc_pager *pager)
{
    uint32_t shards = __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++)
        pc_stream_shutdown(&pager->bulks[i].stream);
    for (uint32_t i = 0; i < shards; i++) {
        struct shard *shard = pager->shards[i];

        pthread_mutex_lock(&shard->lock);
        shard->want_disconnect = true;
        poke(shard);
        while (shard->want_disconnect)
            pthread_cond_wait(&shard->changed, &shard->lock);
        pthread_mutex_unlock(&shard->lock);
    }
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++)
        reap_bulk(&pager->bulks[i]);
    return 0;
}

static void unregister_all(struct shard *shard)
{
    pthread_mutex_lock(&shard->lock);
    for (uint32_t i = 0; i < shard->range_count; i++)
        (void)pc_uffd_unregister(shard->uffd, shard->ranges[i].address, shard->ranges[i].bytes);
    shard->range_count = 0;
    pthread_mutex_unlock(&shard->lock);
}

int pc_pager_disarm(struct pc_pager *pager)
{
    uint32_t shards = __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE);

    if (__atomic_load_n(&pager->missing, __ATOMIC_SEQ_CST))
        return -EBUSY;
    for (uint32_t i = 0; i < shards; i++)
        unregister_all(pager->shards[i]);
    return 0;
}

/* Makes every page that is missing a poisoned one: whoever touches it gets SIGBUS (or EFAULT), nobody gets zeros. */
static int poison_missing(struct pc_pager *pager, struct shard *shard)
{
    for (uint32_t i = 0; i < shard->range_count; i++) {
        const struct range *range = &shard->ranges[i];
        const struct block *block = pager->blocks[range->block];
        uint64_t page = range->first_page, end = page + range->bytes / block->memory.page_bytes;

        while (page < end) {
            uint64_t first = pc_bitmap_next(block->known, end, page, 0), bytes, at = 0;

            if (first >= end)
                break;
            page = pc_bitmap_next(block->known, end, first, 1);
            bytes = (page - first) * block->memory.page_bytes;
            while (at < bytes) {
                uint64_t done = 0;
                int error = pc_uffd_poison(shard->uffd, page_address(block, first) + at, bytes - at, 0, &done);

                at += done;
                if (error == -ESRCH)
                    return 0; /* of another process, which has ended: nobody is left to see zeros */
                if (error == -EEXIST)
                    at += block->memory.page_bytes;
                else if (error && error != -EAGAIN)
                    return error;
            }
        }
        wake(shard, range->address, range->bytes);
    }
    return 0;
}

int pc_pager_free(struct pc_pager *pager)
{
    uint32_t shards = pager->shard_count;
    bool missing = __atomic_load_n(&pager->missing, __ATOMIC_SEQ_CST) > 0;

    (void)pc_pager_disconnect(pager);
    for (uint32_t i = 0; i < shards && missing; i++)
        if (poison_missing(pager, pager->shards[i]))
            return -EBUSY; /* kept whole, on purpose: see the header */
    for (uint32_t i = 0; i < shards; i++) {
        struct shard *shard = pager->shards[i];

        if (!missing)
            unregister_all(shard);
        pthread_mutex_lock(&shard->lock);
        shard->stop = true;
        pthread_mutex_unlock(&shard->lock);
        poke(shard);
        pthread_join(shard->thread, NULL);
        if (shard->has_next)
            pc_stream_close(&shard->next);
        free_shard(shard);
    }
    for (uint32_t i = 0; i < pager->block_count; i++)
        free_block(pager->blocks[i]);
    pc_buffer_free(pager->zero_page, pager->zero_page_bytes);
    pc_events_destroy(&pager->events);
    for (size_t i = pager->watch_count; i-- > 0;)
        close(pager->watches[i].fd);
    free(pager->watches);
    pthread_mutex_destroy(&pager->watch_lock);
    pthread_mutex_destroy(&pager->lock);
    free(pager);
    return 0;
}
