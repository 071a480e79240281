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
 * bulk channel, if there is any, has a thread that receives and places what the source pushes.
 *
 * The life of a page
 * ------------------
 * Bitmaps for each RAM block, changed only by atomic instructions:
 *
 *   requested  a fault was seen, or the page was asked for ahead; the request has been sent, or will be when the shard can
 *   claimed    one thread has taken it on itself to place this page, or the page is zero: whoever comes second drops
 *              what it has. Content reaches a page once, so a late duplicate can never overwrite what the machine wrote.
 *              Taken back where the page could not be placed.
 *   known      the content is there, or is known to be zero. Never cleared. `missing` counts the pages without it.
 *   zero       known, and zero: nothing was placed. A fault on it is answered here with UFFDIO_ZEROPAGE.
 *   again      asked for in vain (on a channel that was lost), while no thread waits for it: to be asked for ahead. The fault
 *              thread's own
 *
 * A fault sets `requested`, then looks at `known`; a placement sets `known`, then looks at `requested`. Both are
 * sequentially consistent, so at least one of the two sees the other, and no thread is forgotten. Whoever places a page that was
 * requested, and is not the fault thread itself, wakes it once more after `known` is set: between the placement and `known` the
 * machine may have thrown the page away and touched it anew, a fault which the placement has not woken and for which nothing is
 * sent.
 *
 * Why UFFDIO_COPY, for memfd too
 * ------------------------------
 * Filling an alias mapping and then exposing the page with UFFDIO_CONTINUE saves no copy, since a frame is verified
 * before any of it is placed, and costs a page fault in the alias. COPY takes half the time (docs/measurements.md) and is
 * atomic: content and page appear together. CONTINUE is for pages that are in the page cache already although nobody
 * here has mapped them: a hole which another process read through its own mapping fills with zeros. (Where the kernel has no
 * minor faults nothing would tell of such a hole: what is in the page cache is thrown away before such memory is armed.)
 *
 * After a page is known, a *missing* fault on it means that somebody threw it away: zeros are right. ZEROPAGE is atomic
 * against a placement that is being made visible, so that the answer to any fault on a known page is: CONTINUE for a minor
 * fault, ZEROPAGE for a missing one, and WAKE when the kernel says EEXIST, since EEXIST wakes nobody.
 *
 * Memory that is taken away (REMOVE, UNMAP)
 * -----------------------------------------
 * A userfaultfd of somebody else may tell what its process throws away. Such a page is known and zero from then on, whatever
 * arrives later. The kernel lets the process go on as soon as the event has been *read*, and refuses placements (EAGAIN) as long as
 * it has not; so a placement that was decided before the read must not happen after it. Hence the gate: a placement holds it from
 * looking at `known` to setting it, the fault thread holds it from the read until what it read is in the maps. It is the one lock
 * between bulk and fault thread, only for shards with such events, held for one run of pages at a time, and inherits priority.
 * EAGAIN is never retried on the spot: it may be that only reading ends it, or that it ends without any event; the fault thread
 * goes back to its loop, where it reads, and tries again then or after a moment.
 *
 * Who owns what
 * -------------
 * Nothing of lower priority may stand in the way of a fault. All that a shard keeps of its faults and its channel belongs to its
 * fault thread, which takes no lock and no memory on its way: other threads leave *orders* in a list that is pushed to and emptied
 * by single atomic instructions, its tables have their size from the beginning, and its counters are read as they are
 * (metrics.h). Three locks it may meet, all with priority inheritance and held for microseconds: the gate, that of the events
 * (rare), and watch_lock (only while somebody watches).
 *
 * What the peer may cost
 * ----------------------
 * A turn of the fault thread's loop does a bounded piece of work, then looks at the userfaultfd again; a frame that is not done is
 * gone on with in the next turn. A channel that brings only what is here already is read slower and slower. Tables are bounded: a
 * request waits until there is room for it, and threads that find no place among those that wait are woken when there is.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "pager/metrics.h"
#include "core/clock.h"
#include "core/events.h"
#include "core/runtime.h"
#include "core/stream.h"
#include "core/util.h"
#include "memory/states.h"
#include "postcopy/engine.h"
#include "postcopy/uffd.h"
#include "uffd/uffd_abi.h"

#define EVENTS_PER_READ 64
/* A thread with a signal pending does not wait in a fault that a system call raised, but raises it again and again. After so
 * many repetitions in a row the fault thread rests between two reads of the userfaultfd, or it would burn a processor for as
 * long as the page takes; meanwhile a new fault waits so much longer. */
#define REPEATS_BEFORE_REST 64
/* Where events do not tell threads apart, a repetition may as well be another thread: that many more are needed. */
#define REPEAT_WEIGHT 16
#define REST_NS 500000
#define RECEIVE_BYTES (PC_FRAME_HEADER_BYTES + PC_FRAME_MAX_PAYLOAD_BYTES)
#define SMALL_RECEIVE_BYTES (64 * 1024)
#define SEND_BYTES (4096 * PC_FRAME_HEADER_BYTES)
#define SEND_AHEAD_BYTES (SEND_BYTES / 2) /* the other half is kept for faults */
#define PENDING_MAX 16384 /* threads of one shard that wait, as far as they are accounted */
#define FILL_WINDOW 128 /* requests for missing pages that may be under way without a fault */
#define FILL_REQUEST ((uint32_t)PC_PAGER_REQUEST_AHEAD) /* nobody waits for it; the answer brings the bit back */
#define MAX_SEGMENTS 64
#define MAX_RANGES (PC_MAX_BLOCKS * MAX_SEGMENTS)

/* What a turn may do for a channel, in nanoseconds as the costs below estimate them. */
#define TURN_NS 200000
#define FRAME_NS 100
#define WORD_NS 4 /* 64 pages looked at in the maps */
#define PLACE_NS 600
#define BYTES_PER_NS 8
#define AHEAD_WORDS 2048 /* words of the maps that a turn may look at for pages to ask for */
/* So much work in a row that brought nothing new, and the channel is read at a sixteenth of the processor's time. */
#define USELESS_NS 5000000
#define USELESS_WEIGHT 16
/* A placement that the kernel refused for the moment is tried again after this, twice as late each time. */
#define RETRY_NS 100000
#define RETRY_MAX_NS 10000000
#define DEAF_NS 100000000 /* a userfaultfd that cannot be polled is looked at so often */

struct segment { /* part of a block guarded by one shard */
    uint64_t first_page, pages; /* no pages: arming it has failed */
    uint32_t shard;
};

struct block {
    struct pc_memory memory;
    uint64_t pages, words;
    uint64_t *requested, *claimed, *known, *zero, *again;
    struct pc_states states; /* where claimed, known and zero are, when they are to outlive this pager */
    struct segment segments[MAX_SEGMENTS];
    uint32_t segment_count; /* published after the segment */
};

struct range { /* what one shard guards, found by address */
    uint64_t address, bytes; /* no bytes: not any more */
    uint64_t first_page, pages;
    uint32_t block;
};

struct pending { /* a thread of the machine that waits */
    uint64_t page;
    uint64_t event_ns, sent_ns; /* sent_ns 0: its request has not been sent by this fault */
    uint32_t block;
    int32_t tid; /* 0: unknown */
    int slot;    /* -1: not a tracked thread */
    bool minor;
    bool unsent;  /* no request for its page is on its way: there was no channel, no room, or somebody had claimed the page */
    bool unshown; /* known, and the kernel could not show it yet */
};

enum order_kind { ORDER_ATTACH, ORDER_WISH, ORDER_DISCONNECT, ORDER_STOP };

struct order { /* what another thread wants of a fault thread */
    struct order *next;
    enum order_kind kind;
    struct pc_stream stream; /* attach */
    uint64_t page, end;      /* wish: pages of a block that are to be asked for ahead of any fault; `page` moves on */
    uint32_t block;
    sem_t *done; /* disconnect */
};

struct watch { /* somebody waits for all pages of a range; those below `page` are known */
    uint64_t page, end;
    int64_t ticket;
    uint32_t block;
    int fd;
};

struct channel { /* what both kinds have */
    struct shard *own; /* the shard whose fault thread this is; NULL: a bulk thread */
    int kind;
    uint32_t index;
    bool ended;      /* has said that every page was offered */
    bool error_told; /* the source could not serve a page of it, once */
};

struct progress { /* of one frame, in one turn */
    uint64_t done;    /* pages of it that are dealt with */
    uint64_t work_ns; /* left of this turn */
    uint64_t news;    /* pages that became known */
};

struct shard {
    struct pc_pager *pager;
    uint32_t index;
    int uffd, control_fd;
    uint64_t busy_poll_ns;
    struct pc_uffd_api api;
    bool gated; /* its userfaultfd tells what is taken away */
    pthread_mutex_t gate;
    pthread_t thread;

    /* From other threads. */
    struct order *orders;
    struct range *ranges; /* MAX_RANGES of them; never moved, never used again */
    uint32_t range_count; /* published after the range */
    bool settle;          /* pages that threads wait for have become known, or free to be asked for */
    bool in_vain;         /* set before `settle`: answers to requests may have been dropped */
    bool fill_again;      /* more missing pages may be asked for */

    /* The fault thread's own. */
    struct pc_shard_metrics *metrics;
    struct pending *pending; /* PENDING_MAX of them */
    size_t pending_count;
    bool overflowed; /* threads wait that found no place there */
    bool unsent;     /* there are such that only want room */
    uint32_t repeats; /* faults in a row that were known already */
    uint64_t retry_at_ns, retry_ns; /* something could not be placed or shown for the moment; 0: nothing */
    uint64_t deaf_until_ns;
    bool deaf_told;
    struct pc_stream stream;
    struct channel channel;
    uint8_t *receive;
    size_t receive_start, receive_end;
    bool frame_checked, frames_left, stalled; /* the first frame's payload; more of them than the turn could take; see retry */
    struct progress frame;
    uint64_t useless_ns, read_at_ns;
    uint8_t *send;
    size_t send_bytes, send_done;
    uint32_t next_request;
    struct order *wishes; /* the last of a ring; the first is next */
    uint32_t again_range, fill_range;
    uint64_t again_page, fill_page; /* from the range's first page on */
    uint64_t fill_lap;              /* pages to look at until all have been */
    uint64_t fill_under_way;
    bool again_left, again_turn, ahead_left;
};

struct bulk {
    struct pc_pager *pager;
    struct channel channel;
    struct pc_stream stream;
    uint8_t *buffer;
    pthread_t thread;
    bool started;         /* under channel_lock */
    bool running, ending; /* atomic; the thread clears the first and obeys the second */
};

struct pc_pager {
    pthread_mutex_t lock; /* adding blocks, shards and ranges */
    struct pc_events events;
    struct block *blocks[PC_MAX_BLOCKS];
    uint32_t block_count;
    struct shard *shards[PC_MAX_SHARDS];
    uint32_t shard_count;
    pthread_mutex_t channel_lock; /* attaching and disconnecting */
    pthread_cond_t disconnected;
    bool disconnecting;
    struct bulk bulks[PC_MAX_BULK_CHANNELS];
    struct order *spent; /* orders that are done with, for others to free: a fault thread frees nothing */
    void *zero_page;     /* as large as any page, for memory that has no ZEROPAGE */
    pthread_mutex_t watch_lock;
    struct watch *watches;
    size_t watch_count, watch_capacity; /* the count is read without the lock */
    int64_t last_ticket;
    uint64_t missing;   /* pages not known; COMPLETE is announced by who takes the last one */
    uint64_t fill_left; /* that may be asked for although nobody waits for them, by all shards together */
    uint32_t completed;
    struct pc_metrics_map *metrics;
};

#define ADD(pager, field, n) ((void)__atomic_fetch_add(&(pager)->metrics->count.field, (uint64_t)(n), __ATOMIC_RELAXED))

/* ---- bitmaps ------------------------------------------------------------------------------------------------------ */

static uint64_t get_word(const uint64_t *words, uint64_t word)
{
    return __atomic_load_n(&words[word], __ATOMIC_SEQ_CST);
}

static bool test_bit(const uint64_t *words, uint64_t bit)
{
    return get_word(words, bit / 64) >> (bit % 64) & 1;
}

static bool test_and_set_bit(uint64_t *words, uint64_t bit)
{
    uint64_t mask = UINT64_C(1) << (bit % 64);

    return __atomic_fetch_or(&words[bit / 64], mask, __ATOMIC_SEQ_CST) & mask;
}

static void clear_bit(uint64_t *words, uint64_t bit)
{
    (void)__atomic_fetch_and(&words[bit / 64], ~(UINT64_C(1) << (bit % 64)), __ATOMIC_SEQ_CST);
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

static uint64_t lowest(uint64_t word, uint64_t bits)
{
    return word * 64 + (uint64_t)__builtin_ctzll(bits);
}

static uint64_t count_bits(uint64_t bits)
{
    return (uint64_t)__builtin_popcountll(bits);
}

static bool any_set(const uint64_t *words, uint64_t first, uint64_t count)
{
    for (uint64_t word = first / 64; word * 64 < first + count; word++)
        if (get_word(words, word) & word_mask(word, first, count))
            return true;
    return false;
}

/* The first page of [page, end) that is in neither map; `end` when there is none. Looks at *budget words at most, and takes from it
 * what it has looked at: when that is used up, where it stopped. */
static uint64_t next_in_neither(const uint64_t *one, const uint64_t *other, uint64_t page, uint64_t end, uint64_t *budget)
{
    for (uint64_t word = page / 64; page < end && *budget; page = ++word * 64) {
        uint64_t left = ~(get_word(one, word) | get_word(other, word)) & word_mask(word, page, end - page);

        --*budget;
        if (left)
            return lowest(word, left);
    }
    return page < end ? page : end;
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

static void poke(struct shard *shard)
{
    uint64_t one = 1;

    (void)!write(shard->control_fd, &one, sizeof(one));
}

/* Has the fault thread look at all who wait. */
static void have_settled(struct shard *shard)
{
    if (!__atomic_exchange_n(&shard->settle, true, __ATOMIC_SEQ_CST))
        poke(shard);
}

/* The shard that guards `page`, and how many of the next `pages` it guards as well. */
static struct shard *find_shard(struct pc_pager *pager, const struct block *block, uint64_t page, uint64_t *pages)
{
    uint32_t count = __atomic_load_n(&block->segment_count, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < count; i++) {
        const struct segment *segment = &block->segments[i];
        uint64_t guarded = __atomic_load_n(&segment->pages, __ATOMIC_RELAXED);

        if (page - segment->first_page < guarded) {
            uint64_t rest = guarded - (page - segment->first_page);

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

/* Moves a watch over what is known; true when nothing is left of it. */
static bool watch_is_over(const struct pc_pager *pager, struct watch *watch)
{
    const uint64_t *known = pager->blocks[watch->block]->known;
    uint64_t no_limit = UINT64_MAX;

    watch->page = next_in_neither(known, known, watch->page, watch->end, &no_limit);
    return watch->page == watch->end;
}

/* Pages have become known: tells those who waited for the last one of their range. Whoever begins to watch first counts
 * itself, then looks at `known`; here it is the other way round, so that one of the two sees the other. */
static void tell_watches(struct pc_pager *pager)
{
    if (!__atomic_load_n(&pager->watch_count, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&pager->watch_lock);
    for (size_t i = pager->watch_count; i-- > 0;) {
        uint64_t one = 1;

        if (watch_is_over(pager, &pager->watches[i])) {
            (void)!write(pager->watches[i].fd, &one, sizeof(one));
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

static int fatal(struct pc_pager *pager, int error, const char *what, uint32_t block, uint64_t page)
{
    pc_events_push(&pager->events, PC_EVENT_FATAL, 0, 0, -error, "%s page %llu of RAM block %u: %s", what,
                   (unsigned long long)page, block, strerror(-error));
    return error;
}

/* Whether what the kernel refused may work later: memory that is short now, an address range that is not armed or not there. */
static bool may_heal(int error)
{
    return error == -ENOMEM || error == -ENOSPC || error == -ENOENT || error == -EAGAIN;
}

/* Answers a fault on a page that is known: see the head of this file. After -EAGAIN and -ENOMEM nobody has been woken: later. */
static int show_known(struct shard *shard, const struct block *block, uint64_t page, bool minor)
{
    uint64_t address = page_address(block, page), bytes = block->memory.page_bytes, done;
    int error;

    if (minor)
        error = pc_uffd_continue(shard->uffd, address, bytes, 0, &done);
    else if (block->memory.kind == PC_MEMORY_HUGETLB)
        error = pc_uffd_copy(shard->uffd, address, shard->pager->zero_page, bytes, 0, &done);
    else
        error = pc_uffd_zeropage(shard->uffd, address, bytes, 0, &done);
    if (error == -EAGAIN || error == -ENOMEM)
        return error;
    /* Whatever else the kernel says, let the thread look again: if the page still is not there, it faults anew. */
    if (error)
        wake(shard, address, bytes);
    /* EFAULT from CONTINUE: thrown away again since the fault, which comes back as a missing one. ENOENT, ESRCH: the memory, or its
     * process, has gone. */
    return error == -EEXIST || (minor && error == -EFAULT) || error == -ENOENT || error == -ESRCH ? 0 : error;
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

/* The page is in the page cache although no pager has placed it: its content is not ours (zeros, most likely, see
 * the head of this file), and nobody has it mapped through the userfaultfd. Overwrite it, then expose it. Until it is exposed
 * this may be repeated. */
static int place_over(struct shard *shard, const struct block *block, uint64_t page, const uint8_t *content)
{
    uint64_t address = page_address(block, page), bytes = block->memory.page_bytes, done;
    int error = -EEXIST; /* anonymous memory is nobody else's: a page there is a mistake worth stopping for */

    if (block->memory.fd >= 0) {
        error = overwrite_page(block, page, content);
        if (!error)
            error = pc_uffd_continue(shard->uffd, address, bytes, 0, &done);
        if (error == -EAGAIN)
            return error;
        if (error == -EEXIST)
            error = 0;
    }
    wake(shard, address, bytes);
    return error;
}

/* Places claimed pages that all belong to one shard. After an error *placed of them are there, and are not to be placed again:
 * the machine may have written to them. -EAGAIN: not now. */
static int place_run(struct shard *shard, struct block *block, uint64_t first, uint64_t pages, const uint8_t *content,
                     uint64_t *placed)
{
    uint64_t page_bytes = block->memory.page_bytes, bytes = pages * page_bytes, at = 0;
    int error = 0;

    while (at < bytes && !error) {
        uint64_t done = 0;

        error = pc_uffd_copy(shard->uffd, page_address(block, first) + at, content + at, bytes - at, 0, &done);
        at += done;
        if (error == -EEXIST && at < bytes) {
            error = place_over(shard, block, first + at / page_bytes, content + at);
            if (!error)
                at += page_bytes;
        } else if (error == -EAGAIN && done) {
            error = 0; /* the kernel stopped half way: go on from where it stopped */
        }
    }
    if (error == -ENOENT) /* the range has left the userfaultfd: who waited there is to look again */
        wake(shard, page_address(block, first) + at, page_bytes);
    *placed = at / page_bytes;
    return at < bytes ? error : 0;
}

static void settle_pending(struct shard *shard, uint32_t block, uint64_t first, uint64_t pages, uint64_t received_ns);

/* Pages of a shard have become known by placing. */
static void placed_known(struct shard *shard, const struct channel *channel, uint32_t index, uint64_t first, uint64_t pages,
                         uint64_t received_ns)
{
    const struct block *block = shard->pager->blocks[index];

    if (!any_set(block->requested, first, pages))
        return;
    if (shard == channel->own) {
        settle_pending(shard, index, first, pages, received_ns);
        return;
    }
    wake(shard, page_address(block, first), pages * block->memory.page_bytes);
    if (__atomic_load_n(&shard->metrics->pending, __ATOMIC_SEQ_CST))
        have_settled(shard);
}

/* Places those pages of one word of the maps that this thread has claimed: *mine, from which what is dealt with is taken. How many
 * were placed in *placed. */
static int place_word(struct pc_pager *pager, const struct channel *channel, const struct pc_frame *frame, const uint8_t *content,
                      uint64_t word, uint64_t *mine, uint64_t received_ns, uint64_t *placed)
{
    struct block *block = pager->blocks[frame->block];
    int error = 0;

    while (*mine && !error) {
        uint64_t first = lowest(word, *mine), shifted = *mine >> (first % 64), done = 0;
        uint64_t count = ~shifted ? (uint64_t)__builtin_ctzll(~shifted) : 64;
        struct shard *shard = find_shard(pager, block, first, &count);

        if (!shard)
            return -ENOENT;
        if (shard->gated) {
            uint64_t removed;

            pthread_mutex_lock(&shard->gate);
            removed = *mine & get_word(block->known, word);
            if (removed) { /* taken away since they were claimed: look again at what is left */
                pthread_mutex_unlock(&shard->gate);
                *mine &= ~removed;
                continue;
            }
        }
        error = place_run(shard, block, first, count, content + (first - frame->first_page) * block->memory.page_bytes, &done);
        if (done)
            (void)__atomic_fetch_or(&block->known[word], word_mask(word, first, done), __ATOMIC_SEQ_CST);
        if (shard->gated)
            pthread_mutex_unlock(&shard->gate);
        if (done) {
            placed_known(shard, channel, frame->block, first, done, received_ns);
            *placed += done;
            *mine &= ~word_mask(word, first, done);
        }
    }
    return error;
}

/* Gives back a claim: somebody else may bring what this thread could not place. Who waits for it meanwhile has not asked for it; or
 * asked before, and when the content is not kept for another try, the answer may have been dropped for it. */
static void unclaim(struct pc_pager *pager, const struct channel *channel, uint32_t index, uint64_t word, uint64_t pages, bool kept)
{
    struct block *block = pager->blocks[index];

    (void)__atomic_fetch_and(&block->claimed[word], ~pages, __ATOMIC_SEQ_CST);
    for (uint64_t wanted = pages & get_word(block->requested, word); wanted; wanted &= wanted - 1) {
        uint64_t one = 1;
        struct shard *shard = find_shard(pager, block, lowest(word, wanted), &one);

        if (!shard)
            continue;
        if (!kept && shard != channel->own) /* its own channel ends by this: all of it is asked for again on the next one */
            __atomic_store_n(&shard->in_vain, true, __ATOMIC_SEQ_CST);
        have_settled(shard);
    }
}

static void spend(struct progress *progress, uint64_t ns)
{
    progress->work_ns -= progress->work_ns < ns ? progress->work_ns : ns;
}

/* Takes what a frame brought: claims each page and places the ones that nobody had. Goes on at progress->done, and stops there when
 * the turn's work is used up, or at -EAGAIN. Any other error has a line in `text`. */
static int take_pages(struct pc_pager *pager, const struct channel *channel, const struct pc_frame *frame,
                      const uint8_t *content, uint64_t received_ns, struct progress *progress, char *text, size_t text_bytes)
{
    struct block *block = pager->blocks[frame->block];
    uint64_t end = frame->first_page + frame->pages;
    int error = 0;

    while (progress->done < frame->pages && progress->work_ns && !error) {
        uint64_t page = frame->first_page + progress->done, word = page / 64, mask = word_mask(word, page, end - page);
        uint64_t placed = 0, claimed, mine, duplicates;

        claimed = mask & ~__atomic_fetch_or(&block->claimed[word], mask, __ATOMIC_SEQ_CST);
        mine = claimed;
        error = place_word(pager, channel, frame, content, word, &mine, received_ns, &placed);
        if (error) {
            uint64_t failed = lowest(word, mine);

            unclaim(pager, channel, frame->block, word, mine, error == -EAGAIN);
            mask &= (UINT64_C(1) << (failed % 64)) - 1; /* what is dealt with */
            progress->done = failed - frame->first_page;
            if (error != -EAGAIN) {
                (void)pc_fail(-error, text, text_bytes, "cannot place page %llu of RAM block %u: %s",
                              (unsigned long long)failed, frame->block, strerror(-error));
                if (!may_heal(error))
                    (void)fatal(pager, error, "cannot place", frame->block, failed);
            }
        } else {
            progress->done = (word + 1) * 64 - frame->first_page;
        }
        /* All counting before no_longer_missing: who hears COMPLETE reads final figures. */
        duplicates = count_bits(mask & ~claimed);
        if (duplicates)
            ADD(pager, duplicate_pages, duplicates);
        if (frame->flags & PC_FRAME_DEMAND)
            ADD(pager, demand_pages, placed);
        else
            ADD(pager, background_pages, placed);
        no_longer_missing(pager, placed);
        progress->news += placed;
        spend(progress, WORD_NS + placed * (PLACE_NS + block->memory.page_bytes / BYTES_PER_NS));
    }
    return error;
}

static bool show_zero(struct shard *shard, uint32_t index, uint64_t page, uint64_t received_ns);

/* Pages that have become known to be zero, by another thread or the shard's own: nothing is placed but for those that somebody waits
 * for. */
static void zeros_known(struct pc_pager *pager, const struct channel *channel, uint32_t index, uint64_t word, uint64_t waiting,
                        uint64_t received_ns)
{
    const struct block *block = pager->blocks[index];

    for (; waiting; waiting &= waiting - 1) {
        uint64_t page = lowest(word, waiting), one = 1;
        struct shard *shard = find_shard(pager, block, page, &one);

        if (!shard || (shard == channel->own && show_zero(shard, index, page, received_ns)))
            continue;
        /* Requested, but by no thread of which this one knows: memory that is zero is to cost nothing. Should there be one all the
         * same, it faults anew and finds the page known. */
        wake(shard, page_address(block, page), block->memory.page_bytes);
        if (shard != channel->own && __atomic_load_n(&shard->metrics->pending, __ATOMIC_SEQ_CST))
            have_settled(shard);
    }
}

/* The pages are zero. Goes on and stops as take_pages does. */
static void take_zeros(struct pc_pager *pager, const struct channel *channel, uint32_t index, uint64_t first, uint64_t pages,
                       uint64_t received_ns, struct progress *progress)
{
    struct block *block = pager->blocks[index];
    uint64_t end = first + pages, news = 0, duplicates = 0;

    while (progress->done < pages && progress->work_ns) {
        uint64_t page = first + progress->done, word = page / 64, mask = word_mask(word, page, end - page), mine = 0, fresh = 0;
        uint64_t waiting = 0;

        if (mask & ~get_word(block->claimed, word)) {
            mine = mask & ~__atomic_fetch_or(&block->claimed[word], mask, __ATOMIC_SEQ_CST);
            (void)__atomic_fetch_or(&block->zero[word], mine, __ATOMIC_SEQ_CST);
            fresh = mine & ~__atomic_fetch_or(&block->known[word], mine, __ATOMIC_SEQ_CST);
            waiting = mine & get_word(block->requested, word);
            zeros_known(pager, channel, index, word, waiting, received_ns);
        }
        duplicates += count_bits(mask & ~mine);
        news += count_bits(fresh);
        spend(progress, WORD_NS + count_bits(waiting) * PLACE_NS);
        progress->done = (word + 1) * 64 - first;
    }
    ADD(pager, zero_pages, news);
    if (duplicates)
        ADD(pager, duplicate_pages, duplicates);
    progress->news += news;
    no_longer_missing(pager, news);
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

static int check_payload(const struct pc_frame *frame, const uint8_t *payload, char *error, size_t error_bytes)
{
    if (frame->payload_bytes && pc_crc32c(0, payload, frame->payload_bytes) != frame->payload_crc)
        return pc_fail(EBADMSG, error, error_bytes, "the content of a frame of %u pages is damaged (CRC32C differs)",
                        frame->pages);
    return 0;
}

/* The source cannot serve pages. That concerns nobody when they are here; otherwise it is told, once for each channel, and the
 * channel, by which other pages still come, goes on. */
static void take_error(struct pc_pager *pager, struct channel *channel, const struct pc_frame *frame, const uint8_t *payload,
                       struct progress *progress)
{
    const uint64_t *known = pager->blocks[frame->block]->known;
    uint64_t words = UINT64_MAX, end = frame->first_page + frame->pages;
    uint64_t page = next_in_neither(known, known, frame->first_page, end, &words);

    progress->done = frame->pages;
    spend(progress, (UINT64_MAX - words) * WORD_NS);
    if (page == end || channel->error_told)
        return;
    channel->error_told = true;
    pc_events_push(&pager->events, PC_EVENT_FATAL, channel->kind, (int)channel->index, EIO,
                   "the source cannot serve page %llu of RAM block %u: %.*s", (unsigned long long)page, frame->block,
                   (int)(frame->payload_bytes < 120 ? frame->payload_bytes : 120), (const char *)payload);
}

/* Does what a whole, checked frame says, as far as the turn's work reaches. 0, -EAGAIN (the same frame again, later), or
 * an error that ends the channel, with a line in `text`. */
static int take_frame(struct pc_pager *pager, struct channel *channel, const struct pc_frame *frame, const uint8_t *payload,
                      struct progress *progress, char *text, size_t text_bytes)
{
    uint64_t received_ns = frame->flags & PC_FRAME_DEMAND ? pc_now_ns() : 0;

    spend(progress, FRAME_NS);
    switch (frame->type) {
    case PC_FRAME_PAGES:
        return take_pages(pager, channel, frame, payload, received_ns, progress, text, text_bytes);
    case PC_FRAME_ZERO:
        take_zeros(pager, channel, frame->block, frame->first_page, frame->pages, received_ns, progress);
        return 0;
    case PC_FRAME_END:
        if (channel->kind != PC_CHANNEL_BULK)
            return pc_fail(EBADMSG, text, text_bytes, "a frame of type %u does not belong here", frame->type);
        if (channel->ended)
            return pc_fail(EBADMSG, text, text_bytes, "the source says a second time that every page was offered");
        channel->ended = true;
        pc_events_push(&pager->events, PC_EVENT_BULK_END, channel->kind, (int)channel->index, 0, "every page has been offered");
        return 0;
    default:
        take_error(pager, channel, frame, payload, progress);
        return 0;
    }
}

/* ---- the fault thread: who waits ---------------------------------------------------------------------------------- */

/* Before `known` is looked at: whoever makes a page known looks here afterwards. */
static void publish_pending(struct shard *shard)
{
    uint64_t oldest_ns = 0;

    for (size_t i = 0; i < shard->pending_count; i++)
        if (!oldest_ns || shard->pending[i].event_ns < oldest_ns)
            oldest_ns = shard->pending[i].event_ns;
    __atomic_store_n(&shard->metrics->oldest_ns, oldest_ns, __ATOMIC_RELAXED);
    __atomic_store_n(&shard->metrics->pending, shard->pending_count, __ATOMIC_SEQ_CST);
}

static struct pending *waiting_for(const struct shard *shard, uint32_t block, uint64_t page)
{
    for (size_t i = 0; i < shard->pending_count; i++)
        if (shard->pending[i].block == block && shard->pending[i].page == page)
            return &shard->pending[i];
    return NULL;
}

static int thread_slot(struct pc_pager *pager, int32_t tid)
{
    if (tid > 0)
        for (int slot = 0; slot < PC_MAX_TRACKED_THREADS; slot++)
            if (__atomic_load_n(&pager->metrics->tids[slot], __ATOMIC_RELAXED) == tid)
                return slot;
    return -1;
}

/* A tracked thread waits no longer. */
static void account_blocked(struct shard *shard, const struct pending *fault, uint64_t now_ns)
{
    struct pc_metrics_map *metrics = shard->pager->metrics;

    if (fault->slot < 0)
        return;
    __atomic_store_n(&metrics->blocked_since_ns[fault->slot], 0, __ATOMIC_RELAXED);
    (void)__atomic_fetch_add(&metrics->blocked_ns[fault->slot], now_ns - fault->event_ns, __ATOMIC_RELAXED);
}

/* A thread that has been woken, accounted and forgotten. received_ns is 0 when its page did not come in answer to a request. */
static void end_pending(struct shard *shard, struct pending *fault, uint64_t placed_ns, uint64_t received_ns)
{
    struct pc_histogram *stages = shard->metrics->stages;

    pc_histogram_add(&stages[PC_STAGE_TOTAL], placed_ns - fault->event_ns);
    if (fault->sent_ns && received_ns > fault->sent_ns) {
        pc_histogram_add(&stages[PC_STAGE_SENT], fault->sent_ns - fault->event_ns);
        pc_histogram_add(&stages[PC_STAGE_RECEIVED], received_ns - fault->sent_ns);
        pc_histogram_add(&stages[PC_STAGE_PLACED], placed_ns - received_ns);
    }
    account_blocked(shard, fault, placed_ns);
    *fault = shard->pending[--shard->pending_count];
    if (shard->overflowed && shard->pending_count < PENDING_MAX / 2) {
        uint32_t count = __atomic_load_n(&shard->range_count, __ATOMIC_ACQUIRE);

        shard->overflowed = false;
        for (uint32_t i = 0; i < count; i++)
            wake(shard, shard->ranges[i].address, shard->ranges[i].pages *
                                                      shard->pager->blocks[shard->ranges[i].block]->memory.page_bytes);
    }
}

/* Accounts the threads that waited for these pages; they have been woken. */
static void settle_pending(struct shard *shard, uint32_t block, uint64_t first, uint64_t pages, uint64_t received_ns)
{
    uint64_t placed_ns = pc_now_ns();
    size_t before = shard->pending_count;

    for (size_t i = 0; i < shard->pending_count;) {
        struct pending *fault = &shard->pending[i];

        if (fault->block != block || fault->page - first >= pages)
            i++;
        else
            end_pending(shard, fault, placed_ns, received_ns);
    }
    if (shard->pending_count != before)
        publish_pending(shard);
}

/* The kernel says that not now: the loop comes back, after the next events or after a moment. */
static void retry_later(struct shard *shard)
{
    if (shard->retry_at_ns)
        return;
    shard->retry_ns = !shard->retry_ns ? RETRY_NS : shard->retry_ns < RETRY_MAX_NS ? shard->retry_ns * 2 : RETRY_MAX_NS;
    shard->retry_at_ns = pc_now_ns() + shard->retry_ns;
}

/* Shows a page of zeros to those who wait for it. False: nobody does. */
static bool show_zero(struct shard *shard, uint32_t index, uint64_t page, uint64_t received_ns)
{
    struct pending *fault = waiting_for(shard, index, page);
    int error;

    if (!fault)
        return false;
    error = show_known(shard, shard->pager->blocks[index], page, false);
    if (error == -EAGAIN || error == -ENOMEM) {
        fault->unshown = true;
        retry_later(shard);
        return true;
    }
    if (error)
        (void)fatal(shard->pager, error, "cannot show zero", index, page);
    settle_pending(shard, index, page, 1, received_ns);
    return true;
}

/* What its one thread waited for before is not waited for any more: it was interrupted there. */
static void replace_pending(struct shard *shard, struct pending *fault, uint64_t now_ns)
{
    account_blocked(shard, fault, now_ns);
    if (fault->unsent) {
        struct pending was = *fault, *other;

        fault->block = UINT32_MAX;
        other = waiting_for(shard, was.block, was.page);
        if (other)
            other->unsent = true;
        else
            clear_bit(shard->pager->blocks[was.block]->requested, was.page); /* nobody will ask for it */
    }
}

/* The entry of a fault, NULL when there is no room. *again: it was there. */
static struct pending *add_pending(struct shard *shard, uint32_t block, uint64_t page, int32_t tid, uint64_t now_ns, bool *again)
{
    struct pending *fault = NULL;

    *again = false;
    for (size_t i = 0; i < shard->pending_count && !fault; i++) {
        struct pending *other = &shard->pending[i];

        if (other->tid != tid || (!tid && (other->page != page || other->block != block)))
            continue;
        if (other->page == page && other->block == block) {
            *again = true;
            return other;
        }
        fault = other; /* a thread waits for one page at a time */
        replace_pending(shard, fault, now_ns);
    }
    if (!fault) {
        if (shard->pending_count == PENDING_MAX) {
            shard->overflowed = true;
            return NULL;
        }
        fault = &shard->pending[shard->pending_count++];
    }
    *fault = (struct pending){.page = page, .block = block, .tid = tid, .slot = thread_slot(shard->pager, tid)};
    fault->event_ns = now_ns;
    if (fault->slot >= 0)
        __atomic_store_n(&shard->pager->metrics->blocked_since_ns[fault->slot], now_ns, __ATOMIC_RELAXED);
    publish_pending(shard);
    return fault;
}

/* False: no room. */
static bool queue_request(struct shard *shard, uint32_t block, uint64_t page, uint32_t id_bits)
{
    struct pc_frame frame = {.type = PC_FRAME_REQUEST,
                             .block = (uint16_t)block,
                             .first_page = page,
                             .pages = 1,
                             .request_id = (shard->next_request++ & ~FILL_REQUEST) | id_bits};

    if (shard->send_bytes + PC_FRAME_HEADER_BYTES > SEND_BYTES)
        return false;
    pc_frame_encode(&frame, shard->send + shard->send_bytes);
    shard->send_bytes += PC_FRAME_HEADER_BYTES;
    ADD(shard->pager, requests, 1);
    return true;
}

/* Requests for a thread that waits, unless somebody is placing the page: asking would bring it twice. */
static void request_for(struct shard *shard, struct pending *fault)
{
    struct block *block = shard->pager->blocks[fault->block];

    fault->unsent = true;
    if (shard->stream.fd < 0 || test_bit(block->claimed, fault->page))
        return;
    if (!queue_request(shard, fault->block, fault->page, 0)) {
        shard->unsent = true;
        return;
    }
    fault->unsent = false;
    fault->sent_ns = fault->event_ns; /* corrected when the request has left */
}

/* Requests what threads wait for and what has not been requested when they came. */
static void send_unsent(struct shard *shard)
{
    shard->unsent = false;
    if (shard->stream.fd < 0)
        return;
    /* The mark is taken off and set again, so that of several threads that wait for one page the first asks. */
    for (size_t i = 0; i < shard->pending_count; i++)
        if (shard->pending[i].unsent)
            clear_bit(shard->pager->blocks[shard->pending[i].block]->requested, shard->pending[i].page);
    for (size_t i = 0; i < shard->pending_count; i++) {
        struct pending *fault = &shard->pending[i];

        if (!fault->unsent)
            continue;
        fault->unsent = false;
        if (test_and_set_bit(shard->pager->blocks[fault->block]->requested, fault->page))
            continue;
        /* Made known while the mark was off, its placer has told nobody. */
        if (test_bit(shard->pager->blocks[fault->block]->known, fault->page))
            __atomic_store_n(&shard->settle, true, __ATOMIC_SEQ_CST);
        else
            request_for(shard, fault);
    }
}

static void ask_again(struct shard *shard);

/* Lets go of those whose pages have become known by other threads, or could not be shown before; asks for what may be asked
 * for again. */
static void settle_known(struct shard *shard)
{
    uint64_t now_ns = pc_now_ns();
    size_t before = shard->pending_count;
    bool unsent = false;

    __atomic_store_n(&shard->settle, false, __ATOMIC_SEQ_CST);
    for (size_t i = 0; i < shard->pending_count;) {
        struct pending *fault = &shard->pending[i];
        const struct block *block = shard->pager->blocks[fault->block];
        int error = 0;

        if (!test_bit(block->known, fault->page)) {
            unsent = unsent || fault->unsent;
            i++;
            continue;
        }
        if (fault->unshown || test_bit(block->zero, fault->page))
            error = show_known(shard, block, fault->page, fault->minor);
        else
            wake(shard, page_address(block, fault->page), block->memory.page_bytes);
        if (error == -EAGAIN || error == -ENOMEM) {
            fault->unshown = true;
            retry_later(shard);
            i++;
            continue;
        }
        if (error)
            (void)fatal(shard->pager, error, "cannot show", fault->block, fault->page);
        end_pending(shard, fault, now_ns, 0);
    }
    if (shard->pending_count != before)
        publish_pending(shard);
    if (__atomic_exchange_n(&shard->in_vain, false, __ATOMIC_SEQ_CST))
        ask_again(shard);
    else if (unsent)
        send_unsent(shard);
}

/* ---- the fault thread: events ------------------------------------------------------------------------------------- */

static const struct range *find_range(const struct shard *shard, uint64_t address)
{
    uint32_t count = __atomic_load_n(&shard->range_count, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < count; i++)
        if (address - shard->ranges[i].address < __atomic_load_n(&shard->ranges[i].bytes, __ATOMIC_RELAXED))
            return &shard->ranges[i];
    return NULL;
}

static void take_known_fault(struct shard *shard, uint32_t index, uint64_t page, int32_t tid, bool minor, uint64_t now_ns)
{
    struct pc_pager *pager = shard->pager;
    const struct block *block = pager->blocks[index];
    int error = show_known(shard, block, page, minor);

    if (!test_bit(block->zero, page))
        ADD(pager, repeated_faults, 1);
    if (error == -EAGAIN || error == -ENOMEM) {
        bool again;
        struct pending *fault = add_pending(shard, index, page, tid, now_ns, &again);

        if (fault) {
            fault->minor = minor;
            fault->unshown = true;
        }
        retry_later(shard);
    } else if (error) {
        (void)fatal(pager, error, "cannot show", index, page);
    }
}

static void take_fault(struct shard *shard, const struct uffd_msg *message, uint64_t now_ns)
{
    struct pc_pager *pager = shard->pager;
    uint64_t address = message->arg.pagefault.address, page;
    bool minor = message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR, fresh, again;
    int32_t tid = shard->api.features & UFFD_FEATURE_THREAD_ID ? (int32_t)message->arg.pagefault.feat.ptid : 0;
    const struct range *range = find_range(shard, address);
    struct pending *fault;
    struct block *block;

    ADD(pager, faults, 1);
    if (!range)
        return; /* not armed yet, or not any more: arming and unregistering wake who waits there */
    block = pager->blocks[range->block];
    page = range->first_page + (address - range->address) / block->memory.page_bytes;
    if (message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) { /* somebody else has registered for that: nothing is missing */
        (void)pc_uffd_writeprotect(shard->uffd, page_address(block, page), block->memory.page_bytes, 0);
        return;
    }
    if (test_bit(block->known, page)) {
        take_known_fault(shard, range->block, page, tid, minor, now_ns);
        return;
    }
    fresh = !test_and_set_bit(block->requested, page);
    fault = add_pending(shard, range->block, page, tid, now_ns, &again);
    if (!fresh)
        ADD(pager, repeated_faults, 1);
    if (again)
        shard->repeats += tid ? REPEAT_WEIGHT : 1;
    else
        shard->repeats = 0;
    if (!fault) {
        if (fresh) /* nobody would ask for it; its thread comes back */
            clear_bit(block->requested, page);
        return;
    }
    fault->minor = minor;
    if (fresh)
        request_for(shard, fault);
    if (test_bit(block->known, page))
        __atomic_store_n(&shard->settle, true, __ATOMIC_SEQ_CST);
}

/* Memory that has been taken away is zero from now on: what is missing of it will never be asked for, what is under way for it
 * will be dropped. With the gate held. */
static void take_removal(struct shard *shard, uint64_t start, uint64_t end)
{
    struct pc_pager *pager = shard->pager;
    uint32_t count = __atomic_load_n(&shard->range_count, __ATOMIC_ACQUIRE);
    uint64_t news = 0;

    for (uint32_t i = 0; i < count; i++) {
        const struct range *range = &shard->ranges[i];
        struct block *block = pager->blocks[range->block];
        uint64_t page_bytes = block->memory.page_bytes, bytes = __atomic_load_n(&range->bytes, __ATOMIC_RELAXED);
        uint64_t low = start > range->address ? start - range->address : 0, high, first, pages;

        if (!bytes || end <= range->address || low >= bytes)
            continue;
        high = end - range->address < bytes ? end - range->address : bytes;
        /* Of a page of which only a part was taken away, as may happen with huge ones, nothing is. */
        low = (low + page_bytes - 1) / page_bytes;
        high /= page_bytes;
        if (low >= high)
            continue;
        first = range->first_page + low;
        pages = high - low;
        for (uint64_t word = first / 64; word * 64 < first + pages; word++) {
            uint64_t fresh = word_mask(word, first, pages) & ~get_word(block->known, word);

            if (!fresh)
                continue;
            (void)__atomic_fetch_or(&block->claimed[word], fresh, __ATOMIC_SEQ_CST);
            (void)__atomic_fetch_or(&block->zero[word], fresh, __ATOMIC_SEQ_CST);
            fresh &= ~__atomic_fetch_or(&block->known[word], fresh, __ATOMIC_SEQ_CST);
            news += count_bits(fresh);
        }
        /* Who waits there: with an entry it is shown zeros, without one it comes again. */
        __atomic_store_n(&shard->settle, true, __ATOMIC_SEQ_CST);
        if (any_set(block->requested, first, pages))
            wake(shard, page_address(block, first), pages * page_bytes);
    }
    ADD(pager, zero_pages, news);
    no_longer_missing(pager, news);
}

/* Takes as many events as one read gives; the loop comes back for more. */
static void drain_events(struct shard *shard)
{
    struct uffd_msg messages[EVENTS_PER_READ];
    uint64_t now_ns;
    size_t count;
    ssize_t got;

    if (shard->gated)
        pthread_mutex_lock(&shard->gate);
    got = read(shard->uffd, messages, sizeof(messages));
    count = got > 0 ? (size_t)got / sizeof(*messages) : 0; /* EAGAIN: the fault went away before it was read */
    /* The kernel gives faults before events that came first. */
    for (size_t i = 0; i < count; i++)
        if (messages[i].event == UFFD_EVENT_REMOVE || messages[i].event == UFFD_EVENT_UNMAP)
            take_removal(shard, messages[i].arg.remove.start, messages[i].arg.remove.end);
    if (shard->gated)
        pthread_mutex_unlock(&shard->gate);
    if (!count)
        return;
    now_ns = pc_now_ns();
    ADD(shard->pager, event_reads, 1);
    for (size_t i = 0; i < count; i++)
        if (messages[i].event == UFFD_EVENT_PAGEFAULT)
            take_fault(shard, &messages[i], now_ns);
    if (shard->gated && shard->retry_at_ns)
        shard->retry_at_ns = now_ns; /* what had to wait may have waited for this */
}

/* poll(2) on a userfaultfd says POLLERR when it is a blocking one. Whoever else has the descriptor may have made it so. */
static void mend_uffd(struct shard *shard)
{
    int flags = fcntl(shard->uffd, F_GETFL);

    if (flags >= 0 && !(flags & O_NONBLOCK) && !fcntl(shard->uffd, F_SETFL, flags | O_NONBLOCK))
        return;
    shard->deaf_until_ns = pc_now_ns() + DEAF_NS;
    if (shard->deaf_told)
        return;
    shard->deaf_told = true;
    pc_events_push(&shard->pager->events, PC_EVENT_FATAL, 0, 0, EBADF, "the userfaultfd of shard %u cannot be waited for",
                   shard->index);
}

/* ---- the fault thread: its channel -------------------------------------------------------------------------------- */

static void close_stream(struct shard *shard, int error, const char *text)
{
    for (size_t i = 0; i < shard->pending_count; i++)
        shard->pending[i].sent_ns = 0;
    pc_stream_close(&shard->stream);
    shard->receive_start = shard->receive_end = 0;
    shard->frame_checked = shard->frames_left = shard->stalled = false;
    shard->useless_ns = shard->read_at_ns = 0;
    shard->send_bytes = shard->send_done = 0;
    if (text)
        pc_events_push(&shard->pager->events, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, (int)shard->index, -error, "%s", text);
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
        for (size_t i = shard->pending_count; i-- > 0;) {
            struct pending *fault = &shard->pending[i];

            if (fault->sent_ns == fault->event_ns)
                fault->sent_ns = now_ns;
        }
        if (shard->unsent) {
            send_unsent(shard);
            shard->ahead_left = true; /* a turn at once: there is something to send */
        }
    }
}

static void receive_bytes(struct shard *shard)
{
    size_t room;
    ssize_t got;

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
}

/* The first frame that was received, if it is there as a whole. 1, 0, or an error with its line. */
static int next_frame(struct shard *shard, struct pc_frame *frame, const uint8_t **payload, char *text, size_t text_bytes)
{
    const uint8_t *at = shard->receive + shard->receive_start;
    size_t have = shard->receive_end - shard->receive_start;
    int error;

    if (have < PC_FRAME_HEADER_BYTES)
        return 0;
    error = pc_frame_decode(at, frame, text, text_bytes);
    if (!error)
        error = check_frame(shard->pager, frame, text, text_bytes);
    if (error)
        return error;
    *payload = at + PC_FRAME_HEADER_BYTES;
    if (have < PC_FRAME_HEADER_BYTES + (size_t)frame->payload_bytes)
        return 0;
    if (shard->frame_checked)
        return 1;
    error = check_payload(frame, *payload, text, text_bytes);
    if (error)
        return error;
    spend(&shard->frame, frame->payload_bytes / BYTES_PER_NS);
    shard->frame.done = 0;
    shard->frame_checked = true;
    return 1;
}

/* Takes the frames that were received, as many as a turn may. */
static void take_frames(struct shard *shard)
{
    struct progress *progress = &shard->frame;
    char text[PC_ERROR_BYTES] = "";
    uint64_t spent_ns;
    int result = 0;

    progress->work_ns = TURN_NS;
    progress->news = 0;
    shard->stalled = false;
    while (progress->work_ns) {
        struct pc_frame frame;
        const uint8_t *payload = NULL;

        result = next_frame(shard, &frame, &payload, text, sizeof(text));
        if (result <= 0)
            break;
        result = take_frame(shard->pager, &shard->channel, &frame, payload, progress, text, sizeof(text));
        if (result || (frame.type != PC_FRAME_END && progress->done < frame.pages))
            break; /* the rest of it later */
        shard->frame_checked = false;
        shard->receive_start += PC_FRAME_HEADER_BYTES + (size_t)frame.payload_bytes;
        if (frame.flags & PC_FRAME_DEMAND && frame.request_id & FILL_REQUEST && shard->fill_under_way)
            shard->fill_under_way--;
    }
    shard->frames_left = !progress->work_ns;
    spent_ns = TURN_NS - progress->work_ns;
    shard->useless_ns = progress->news ? 0 : shard->useless_ns + spent_ns;
    if (shard->useless_ns > USELESS_NS)
        shard->read_at_ns = pc_now_ns() + USELESS_WEIGHT * spent_ns;
    if (result == -EAGAIN) {
        shard->stalled = true;
        shard->frames_left = false;
        retry_later(shard);
    } else if (result < 0) {
        if (result == -EBADMSG)
            ADD(shard->pager, frames_refused, 1);
        close_stream(shard, result, text[0] ? text : strerror(-result));
    } else if (progress->news) {
        shard->retry_ns = 0;
    }
}

/* ---- the fault thread: asking ahead of faults --------------------------------------------------------------------- */

static void push_order(struct order **stack, struct order *order)
{
    order->next = __atomic_load_n(stack, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(stack, &order->next, order, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
    }
}

static void free_orders(struct order **stack)
{
    struct order *order = __atomic_exchange_n(stack, NULL, __ATOMIC_SEQ_CST);

    while (order) {
        struct order *next = order->next;

        if (order->kind == ORDER_ATTACH)
            pc_stream_close(&order->stream);
        free(order);
        order = next;
    }
}

/* One page of each wish in turn: a small one must not wait for a large one that came before. */
static bool next_wished(struct shard *shard, uint64_t *words, uint32_t *index, uint64_t *page)
{
    while (shard->wishes && *words) {
        struct order *last = shard->wishes, *wish = last->next;
        struct block *block = shard->pager->blocks[wish->block];
        uint64_t before = *words;
        bool found;

        *index = wish->block;
        *page = next_in_neither(block->claimed, block->requested, wish->page, wish->end, words);
        /* It stops at a page that is to be asked for, or because it may look no further. */
        found = *page < wish->end && (*words || !test_bit(block->claimed, *page)) && !test_and_set_bit(block->requested, *page);
        wish->page = found ? *page + 1 : *page;
        if (*words == before)
            --*words;
        if (wish->page >= wish->end) {
            if (wish == last)
                shard->wishes = NULL;
            else
                last->next = wish->next;
            push_order(&shard->pager->spent, wish);
        } else {
            shard->wishes = wish;
        }
        if (found)
            return true;
    }
    return false;
}

/* Pages that were asked for on a channel that was lost. */
static bool next_again(struct shard *shard, uint64_t *words, uint32_t *index, uint64_t *page)
{
    uint32_t count = __atomic_load_n(&shard->range_count, __ATOMIC_ACQUIRE);

    for (; shard->again_range < count; shard->again_range++, shard->again_page = 0) {
        const struct range *range = &shard->ranges[shard->again_range];
        struct block *block = shard->pager->blocks[range->block];

        while (shard->again_page < range->pages) {
            uint64_t from = range->first_page + shard->again_page, word = from / 64;
            uint64_t left = get_word(block->again, word) & word_mask(word, from, range->pages - shard->again_page);

            if (!*words)
                return false;
            --*words;
            if (!left) {
                shard->again_page = (word + 1) * 64 - range->first_page;
                continue;
            }
            *index = range->block;
            *page = lowest(word, left);
            shard->again_page = *page + 1 - range->first_page;
            clear_bit(block->again, *page);
            if (!test_bit(block->claimed, *page) && !test_and_set_bit(block->requested, *page))
                return true;
        }
    }
    shard->again_left = false;
    return false;
}

/* One of the pages that may be asked for by all shards together. */
static bool take_fill(struct pc_pager *pager)
{
    uint64_t left = __atomic_load_n(&pager->fill_left, __ATOMIC_RELAXED);

    while (left)
        if (__atomic_compare_exchange_n(&pager->fill_left, &left, left - 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return true;
    return false;
}

/* Any missing page, from where the last one was found on, once around. */
static bool next_missing(struct shard *shard, uint64_t *words, uint32_t *index, uint64_t *page)
{
    uint32_t count = __atomic_load_n(&shard->range_count, __ATOMIC_ACQUIRE);

    while (shard->fill_lap && *words && __atomic_load_n(&shard->pager->fill_left, __ATOMIC_RELAXED)) {
        const struct range *range = &shard->ranges[shard->fill_range];
        struct block *block;
        uint64_t from, end;

        if (shard->fill_range >= count) {
            shard->fill_range = 0;
            continue;
        }
        if (shard->fill_page >= range->pages) {
            --*words;
            shard->fill_range++;
            shard->fill_page = 0;
            continue;
        }
        block = shard->pager->blocks[range->block];
        from = range->first_page + shard->fill_page;
        end = range->first_page + range->pages;
        *index = range->block;
        *page = next_in_neither(block->claimed, block->requested, from, end, words);
        shard->fill_page = *page - range->first_page;
        shard->fill_lap -= *page - from < shard->fill_lap ? *page - from : shard->fill_lap;
        if (*page == end || test_bit(block->claimed, *page) || test_bit(block->requested, *page))
            continue;
        if (!take_fill(shard->pager))
            return false;
        if (!test_and_set_bit(block->requested, *page))
            return true;
        (void)__atomic_fetch_add(&shard->pager->fill_left, 1, __ATOMIC_RELAXED);
    }
    return false;
}

static void fill_from_here(struct shard *shard)
{
    uint32_t count = __atomic_load_n(&shard->range_count, __ATOMIC_ACQUIRE);

    shard->fill_lap = 0;
    for (uint32_t i = 0; i < count; i++)
        shard->fill_lap += shard->ranges[i].pages;
}

/* Requests pages that nobody waits for, a window at a time, so that a fault never stands behind more than a window. */
static void ask_ahead(struct shard *shard)
{
    uint64_t words = AHEAD_WORDS, page;
    uint32_t index;

    shard->ahead_left = false;
    /* Without a channel nothing: what cannot be sent now must not be marked as requested. */
    while (shard->stream.fd >= 0 && shard->fill_under_way < FILL_WINDOW && shard->send_bytes < SEND_AHEAD_BYTES) {
        bool found = false;

        if (shard->again_left && (shard->again_turn || !shard->wishes))
            found = next_again(shard, &words, &index, &page);
        shard->again_turn = !shard->again_turn;
        if (!found && !next_wished(shard, &words, &index, &page) && !next_missing(shard, &words, &index, &page)) {
            if (words && shard->again_left)
                continue;
            shard->ahead_left = !words;
            break;
        }
        (void)queue_request(shard, index, page, FILL_REQUEST); /* there is room */
        shard->fill_under_way++;
    }
}

/* Takes the mark `requested` from the pages that have not come, to ask for them again. A few hundred microseconds for 64 GiB, once
 * for each channel that was lost. */
static void forget_requests(struct shard *shard)
{
    uint32_t count = __atomic_load_n(&shard->range_count, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < count; i++) {
        const struct range *range = &shard->ranges[i];
        struct block *block = shard->pager->blocks[range->block];
        uint64_t end = range->first_page + range->pages;

        for (uint64_t word = range->first_page / 64; word * 64 < end; word++) {
            uint64_t lost = get_word(block->requested, word) & word_mask(word, range->first_page, range->pages);

            if (!lost)
                continue;
            lost &= ~get_word(block->claimed, word);
            (void)__atomic_fetch_or(&block->again[word], lost, __ATOMIC_SEQ_CST);
            (void)__atomic_fetch_and(&block->requested[word], ~lost, __ATOMIC_SEQ_CST);
        }
    }
    shard->again_range = 0;
    shard->again_page = 0;
    shard->again_left = true;
}

/* ---- the fault thread: its loop ----------------------------------------------------------------------------------- */

/* Everything that was asked for and did not come is asked for again, what threads wait for first. */
static void ask_again(struct shard *shard)
{
    forget_requests(shard);
    for (size_t i = 0; i < shard->pending_count; i++) {
        struct pending *fault = &shard->pending[i];

        clear_bit(shard->pager->blocks[fault->block]->again, fault->page);
        fault->unsent = true;
    }
    send_unsent(shard);
}

static void adopt_stream(struct shard *shard, const struct pc_stream *stream)
{
    if (shard->stream.fd >= 0)
        close_stream(shard, 0, NULL);
    shard->stream = *stream;
    shard->channel.error_told = false;
    ask_again(shard);
    shard->fill_under_way = 0;
    fill_from_here(shard);
}

static void take_order(struct shard *shard, struct order *order, bool *go_on)
{
    switch (order->kind) {
    case ORDER_ATTACH:
        adopt_stream(shard, &order->stream);
        order->stream.fd = -1;
        push_order(&shard->pager->spent, order);
        break;
    case ORDER_WISH:
        order->next = shard->wishes ? shard->wishes->next : order;
        if (shard->wishes)
            shard->wishes->next = order;
        shard->wishes = order;
        break;
    case ORDER_DISCONNECT: /* who gave it waits for it, and has it on its stack */
        if (shard->stream.fd >= 0)
            close_stream(shard, 0, NULL);
        (void)sem_post(order->done);
        break;
    default:
        *go_on = false;
    }
}

/* What other threads asked of this one. False: stop. */
static bool take_orders(struct shard *shard)
{
    struct order *order, *first = NULL;
    uint64_t drained;
    bool go_on = true;

    (void)!read(shard->control_fd, &drained, sizeof(drained));
    order = __atomic_exchange_n(&shard->orders, NULL, __ATOMIC_SEQ_CST);
    while (order) { /* the last one came first */
        struct order *next = order->next;

        order->next = first;
        first = order;
        order = next;
    }
    while (first) {
        order = first;
        first = first->next;
        take_order(shard, order, &go_on);
    }
    if (__atomic_exchange_n(&shard->fill_again, false, __ATOMIC_SEQ_CST))
        fill_from_here(shard);
    return go_on;
}

static void sooner(uint64_t *deadline_ns, uint64_t at_ns)
{
    if (at_ns && (!*deadline_ns || at_ns < *deadline_ns))
        *deadline_ns = at_ns;
}

/* Waits for {userfaultfd, orders, channel}. How many of the three are ready; 0 when a time has come. */
static int wait_for_work(struct shard *shard, struct pollfd fds[3], uint64_t spin_until_ns)
{
    uint64_t now_ns = shard->retry_at_ns || shard->read_at_ns || shard->deaf_until_ns || spin_until_ns ? pc_now_ns() : 0;
    uint64_t deadline_ns = 0;
    struct timespec timeout = {0};
    bool reading = !shard->frames_left && !shard->stalled;
    short wanted = 0;

    if (shard->read_at_ns && now_ns >= shard->read_at_ns)
        shard->read_at_ns = 0;
    if (shard->deaf_until_ns && now_ns >= shard->deaf_until_ns)
        shard->deaf_until_ns = 0;
    if (reading && !shard->read_at_ns)
        wanted = POLLIN;
    if (shard->send_bytes)
        wanted |= POLLOUT;
    fds[0] = (struct pollfd){.fd = shard->deaf_until_ns ? -1 : shard->uffd, .events = POLLIN};
    fds[1] = (struct pollfd){.fd = shard->control_fd, .events = POLLIN};
    fds[2] = (struct pollfd){.fd = wanted ? shard->stream.fd : -1, .events = wanted};
    sooner(&deadline_ns, shard->retry_at_ns);
    sooner(&deadline_ns, shard->read_at_ns);
    sooner(&deadline_ns, shard->deaf_until_ns);
    if (shard->repeats >= REPEATS_BEFORE_REST * REPEAT_WEIGHT) {
        shard->repeats -= REPEAT_WEIGHT; /* one read, and if that brings another repetition, one more rest */
        fds[0].fd = -1;
        sooner(&deadline_ns, (now_ns ? now_ns : (now_ns = pc_now_ns())) + REST_NS);
    } else if (spin_until_ns && now_ns < spin_until_ns) {
        deadline_ns = now_ns;
    }
    if ((shard->frames_left && !shard->read_at_ns) || shard->ahead_left || __atomic_load_n(&shard->settle, __ATOMIC_RELAXED))
        return poll(fds, 3, 0);
    if (!deadline_ns)
        return poll(fds, 3, -1);
    if (deadline_ns > now_ns)
        timeout = (struct timespec){.tv_sec = (time_t)((deadline_ns - now_ns) / 1000000000),
                                    .tv_nsec = (long)((deadline_ns - now_ns) % 1000000000)};
    return ppoll(fds, 3, &timeout, NULL);
}

static void *fault_thread(void *argument)
{
    struct shard *shard = argument;
    uint64_t spin_until_ns = 0;

    pc_thread_name("pc-fault", shard->index);
    pc_thread_prompt(shard->busy_poll_ns != 0);
    for (;;) {
        struct pollfd fds[3];
        bool due = false;

        if (wait_for_work(shard, fds, spin_until_ns) < 0)
            continue;
        if (fds[1].revents && !take_orders(shard))
            break;
        if (fds[0].revents & POLLIN)
            drain_events(shard);
        else if (fds[0].revents)
            mend_uffd(shard);
        if (shard->retry_at_ns && pc_now_ns() >= shard->retry_at_ns) {
            due = true;
            shard->retry_at_ns = 0;
        }
        if (due || __atomic_load_n(&shard->settle, __ATOMIC_RELAXED))
            settle_known(shard);
        /* take_orders may have put another stream there, even under the same number; then a read that finds nothing does no harm. */
        if (fds[2].revents && fds[2].events & POLLIN && fds[2].fd == shard->stream.fd) {
            receive_bytes(shard);
            take_frames(shard);
        } else if ((shard->frames_left && !shard->read_at_ns) || (shard->stalled && due)) {
            take_frames(shard);
        }
        ask_ahead(shard);
        flush_requests(shard);
        if (!shard->retry_at_ns)
            shard->retry_ns = 0;
        if (shard->busy_poll_ns)
            spin_until_ns = pc_now_ns() + shard->busy_poll_ns;
    }
    if (shard->stream.fd >= 0)
        close_stream(shard, 0, NULL);
    return NULL;
}

/* ---- the bulk threads --------------------------------------------------------------------------------------------- */

/* All of a frame; what the kernel refuses for the moment as often as it takes. */
static int take_whole_frame(struct bulk *bulk, const struct pc_frame *frame, char *text, size_t text_bytes)
{
    struct progress progress = {.work_ns = UINT64_MAX};
    uint64_t wait_ns = RETRY_NS;

    for (;;) {
        struct timespec wait = {.tv_nsec = (long)wait_ns};
        uint64_t before = progress.done;
        int error = take_frame(bulk->pager, &bulk->channel, frame, bulk->buffer, &progress, text, text_bytes);

        if (error != -EAGAIN)
            return error;
        if (__atomic_load_n(&bulk->ending, __ATOMIC_SEQ_CST))
            return -ECANCELED;
        wait_ns = progress.done > before ? RETRY_NS : wait_ns < RETRY_MAX_NS ? wait_ns * 2 : RETRY_MAX_NS;
        (void)nanosleep(&wait, NULL);
        progress.work_ns = UINT64_MAX;
    }
}

static void *bulk_thread(void *argument)
{
    struct bulk *bulk = argument;
    struct pc_pager *pager = bulk->pager;
    char text[PC_ERROR_BYTES] = "";
    int error;

    pc_thread_name("pc-bulk-in", bulk->channel.index);
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
        error = check_payload(&frame, bulk->buffer, text, sizeof(text));
        if (!error)
            error = take_whole_frame(bulk, &frame, text, sizeof(text));
        if (error)
            break;
    }
    if (error == -EBADMSG)
        ADD(pager, frames_refused, 1);
    pc_stream_shutdown(&bulk->stream); /* the peer learns at once; the descriptor stays until the thread is joined */
    /* Before the event: who hears it may attach the next connection at once, and must not be told that this one is busy. */
    __atomic_store_n(&bulk->running, false, __ATOMIC_SEQ_CST);
    pc_events_push(&pager->events, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, (int)bulk->channel.index,
                   error == -ENODATA ? 0 : -error, "%s",
                   error == -ENODATA ? "the source closed the connection"
                   : text[0]         ? text
                                     : strerror(-error));
    return NULL;
}

/* ---- the public face ---------------------------------------------------------------------------------------------- */

static int new_pager(struct pc_metrics_map *metrics, struct pc_pager **out)
{
    struct pc_pager *pager = calloc(1, sizeof(*pager));
    int error = pager ? pc_events_init(&pager->events) : -ENOMEM;

    if (error) {
        free(pager);
        pc_metrics_unmap(metrics);
        return error;
    }
    pc_metrics_none_waits(metrics);
    pager->metrics = metrics;
    pthread_mutex_init(&pager->lock, NULL);
    pthread_mutex_init(&pager->channel_lock, NULL);
    pthread_cond_init(&pager->disconnected, NULL);
    pc_lock_init(&pager->watch_lock);
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++) {
        pager->bulks[i].pager = pager;
        pager->bulks[i].channel = (struct channel){.kind = PC_CHANNEL_BULK, .index = i};
        pager->bulks[i].stream.fd = -1;
    }
    *out = pager;
    return 0;
}

int pc_pager_new(struct pc_pager **pager)
{
    struct pc_metrics_map *metrics = pc_metrics_private();

    return metrics ? new_pager(metrics, pager) : -ENOMEM;
}

int pc_pager_new_with_metrics(int metrics_fd, struct pc_pager **pager)
{
    struct pc_metrics_map *metrics;
    int error = pc_metrics_map(metrics_fd, &metrics);

    return error ? error : new_pager(metrics, pager);
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
    pc_buffer_free(block->again, bytes);
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
    block->known = block->states.received;
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
    block->again = new_bitmap(block->words);
    error = !block->requested || !block->again ? -ENOMEM : states_fd < 0 ? make_states(block) : adopt_states(block, states_fd);
    if (error) {
        free_block(block);
        return error;
    }
    pthread_mutex_lock(&pager->lock);
    /* Once, and large enough for any: a fault thread may be reading it. */
    if (memory->kind == PC_MEMORY_HUGETLB && !pager->zero_page) {
        pager->zero_page = pc_buffer_new(PC_FRAME_MAX_PAYLOAD_BYTES);
        if (!pager->zero_page)
            index = -ENOMEM;
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
    const struct channel nobody = {0};
    uint64_t from = 0;

    if (block >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE))
        return -EINVAL;
    for (;;) {
        struct progress progress = {.work_ns = UINT64_MAX};
        uint64_t pages = pager->blocks[block]->pages, end;

        from = pc_bitmap_next(zero_words, pages, from, 1);
        if (from >= pages)
            return 0;
        end = pc_bitmap_next(zero_words, pages, from, 0);
        take_zeros(pager, &nobody, block, from, end - from, 0, &progress);
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
    free_orders(&shard->orders);
    while (shard->wishes) {
        struct order *wish = shard->wishes->next;

        if (wish == shard->wishes)
            shard->wishes = NULL;
        else
            shard->wishes->next = wish->next;
        free(wish);
    }
    if (shard->uffd >= 0)
        close(shard->uffd);
    if (shard->control_fd >= 0)
        close(shard->control_fd);
    pc_buffer_free(shard->receive, RECEIVE_BYTES);
    pc_buffer_free(shard->send, SEND_BYTES);
    pc_buffer_free(shard->pending, PENDING_MAX * sizeof(*shard->pending));
    pc_buffer_free(shard->ranges, MAX_RANGES * sizeof(*shard->ranges));
    pthread_mutex_destroy(&shard->gate);
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
    pc_lock_init(&shard->gate);
    shard->pager = pager;
    shard->uffd = uffd;
    shard->api = *api;
    shard->control_fd = shard->stream.fd = -1;
    shard->busy_poll_ns = (uint64_t)busy_poll_us * 1000;
    shard->gated = api->features & (UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP);
    shard->channel = (struct channel){.own = shard, .kind = PC_CHANNEL_URGENT};
    shard->send = pc_buffer_new(SEND_BYTES);
    shard->receive = pc_buffer_new(RECEIVE_BYTES);
    shard->pending = pc_buffer_new(PENDING_MAX * sizeof(*shard->pending));
    shard->ranges = pc_buffer_new(MAX_RANGES * sizeof(*shard->ranges));
    if (!shard->send || !shard->receive || !shard->pending || !shard->ranges) {
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
        shard->index = shard->channel.index = pager->shard_count;
        shard->metrics = &pager->metrics->shards[shard->index];
        result = pc_thread_start(&shard->thread, fault_thread, shard);
        if (!result) {
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
    api.features = pc_pager_features(api.features); /* what it has, not what the kernel could */
    return start_shard(pager, result, &api, busy_poll_us, error, error_bytes);
}

/* What a descriptor must be before a fault thread can live with it. 0, or an error with its line. */
static int check_uffd(int uffd, uint64_t features, char *error, size_t error_bytes)
{
    struct pollfd readable = {.fd = uffd, .events = POLLIN};
    int flags = fcntl(uffd, F_GETFL);

    if (flags < 0)
        return pc_fail(errno, error, error_bytes, "no userfaultfd: %s", strerror(errno));
    if (!(flags & O_NONBLOCK)) /* poll(2) says POLLERR of a blocking one, for ever */
        return pc_fail(EINVAL, error, error_bytes, "the userfaultfd is a blocking one: open it with O_NONBLOCK");
    /* Without UFFDIO_API no other ioctl is taken; nothing but a userfaultfd takes this one. */
    if (pc_uffd_wake(uffd, 0, 0) == -ENOTTY)
        return pc_fail(EINVAL, error, error_bytes, "the descriptor is no userfaultfd");
    if (poll(&readable, 1, 0) == 1 && readable.revents & (POLLERR | POLLNVAL))
        return pc_fail(EINVAL, error, error_bytes, "the userfaultfd has not been set up: UFFDIO_API comes first");
    if (features & (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP))
        return pc_fail(EOPNOTSUPP, error, error_bytes,
                       "the userfaultfd tells of %s, which a pager cannot follow: open it without that event",
                       features & UFFD_FEATURE_EVENT_FORK ? "forks" : "memory that moves");
    if (features & UFFD_FEATURE_SIGBUS)
        return pc_fail(EOPNOTSUPP, error, error_bytes, "the userfaultfd raises SIGBUS instead of telling of faults");
    return 0;
}

int pc_pager_adopt_shard(struct pc_pager *pager, int uffd, uint64_t features, uint32_t busy_poll_us, char *error,
                         size_t error_bytes)
{
    const struct pc_uffd_api api = {.features = features};
    int result = check_uffd(uffd, features, error, error_bytes);

    if (result) {
        if (result != -EBADF)
            close(uffd);
        return result;
    }
    return start_shard(pager, uffd, &api, busy_poll_us, error, error_bytes);
}

static struct shard *get_shard(struct pc_pager *pager, uint32_t index)
{
    return index < __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE) ? pager->shards[index] : NULL;
}

/* Without minor faults nothing tells of a page that is in the page cache without having been placed: the machine would see it as it
 * is. Whatever is there of pages that have not come, others have put there: away with it. (What they put there later is seen; such a
 * kernel, before 5.13, needs memory that nobody else has mapped.) 0 or -errno. */
static int drop_unplaced(const struct block *block, uint64_t first, uint64_t pages)
{
    uint64_t end = first + pages, page = first;

    while (page < end && block->memory.fd >= 0) {
        uint64_t from = pc_bitmap_next(block->known, end, page, 0);

        if (from >= end)
            break;
        page = pc_bitmap_next(block->known, end, from, 1);
        if (fallocate(block->memory.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(from * block->memory.page_bytes),
                      (off_t)((page - from) * block->memory.page_bytes)))
            return -errno;
    }
    return 0;
}

int pc_pager_arm(struct pc_pager *pager, uint32_t shard_index, uint32_t block_index, uint64_t first_page, uint64_t pages,
                 char *error, size_t error_bytes)
{
    const uint64_t needed = UINT64_C(1) << PC_UFFD_IOCTL_COPY | UINT64_C(1) << PC_UFFD_IOCTL_WAKE;
    struct shard *shard = get_shard(pager, shard_index);
    struct block *block;
    struct segment *segment;
    struct range *range;
    uint64_t mode = PC_UFFD_MISSING, ioctls = 0, bytes;
    int result = 0;

    if (!shard || block_index >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE))
        return pc_fail(EINVAL, error, error_bytes, "there is no such shard or RAM block");
    block = pager->blocks[block_index];
    if (!pages || first_page >= block->pages || pages > block->pages - first_page)
        return pc_fail(EINVAL, error, error_bytes, "RAM block %u has no pages %llu+%llu", block_index,
                        (unsigned long long)first_page, (unsigned long long)pages);
    bytes = pages * block->memory.page_bytes;
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
    if (block->segment_count == MAX_SEGMENTS || shard->range_count == MAX_RANGES) {
        pthread_mutex_unlock(&pager->lock);
        return pc_fail(ENOSPC, error, error_bytes, "RAM block %u is armed in too many parts", block_index);
    }
    if (!(mode & PC_UFFD_MINOR))
        result = drop_unplaced(block, first_page, pages);
    if (result) {
        pthread_mutex_unlock(&pager->lock);
        return pc_fail(-result, error, error_bytes, "cannot empty RAM block %u: %s", block_index, strerror(-result));
    }
    segment = &block->segments[block->segment_count];
    *segment = (struct segment){.first_page = first_page, .pages = pages, .shard = shard_index};
    __atomic_store_n(&block->segment_count, block->segment_count + 1, __ATOMIC_RELEASE);
    /* The range before the registration: the first fault may come before this thread is back from the kernel. */
    range = &shard->ranges[shard->range_count];
    *range = (struct range){.address = page_address(block, first_page),
                            .bytes = bytes,
                            .first_page = first_page,
                            .pages = pages,
                            .block = block_index};
    __atomic_store_n(&shard->range_count, shard->range_count + 1, __ATOMIC_RELEASE);
    result = pc_uffd_register(shard->uffd, range->address, bytes, mode, &ioctls);
    if (!result && (ioctls & needed) != needed) {
        (void)pc_uffd_unregister(shard->uffd, range->address, bytes);
        result = -EOPNOTSUPP;
    }
    if (result) { /* somebody may be reading both: they stay, empty */
        __atomic_store_n(&range->bytes, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&segment->pages, 0, __ATOMIC_RELAXED);
    } else {
        /* Faults that an earlier pager has read, those that it has not, and those that came before this: they happen again. */
        wake(shard, range->address, bytes);
    }
    pthread_mutex_unlock(&pager->lock);
    return result ? pc_fail(-result, error, error_bytes, "cannot register RAM block %u with a userfaultfd: %s", block_index,
                             strerror(-result))
                  : 0;
}

/* Gives a fault thread an order, which is the pager's from then on. */
static void post(struct shard *shard, struct order *order)
{
    push_order(&shard->orders, order);
    poke(shard);
}

static struct order *new_order(struct pc_pager *pager, enum order_kind kind)
{
    struct order *order;

    free_orders(&pager->spent);
    order = calloc(1, sizeof(*order));
    if (order) {
        order->kind = kind;
        order->stream.fd = -1;
    }
    return order;
}

int pc_pager_attach_urgent(struct pc_pager *pager, uint32_t shard_index, int fd)
{
    struct shard *shard = get_shard(pager, shard_index);
    struct order *order = shard ? new_order(pager, ORDER_ATTACH) : NULL;
    int error = !shard ? -EINVAL : !order ? -ENOMEM : pc_stream_tcp(&order->stream, fd, true);

    pthread_mutex_lock(&pager->channel_lock);
    if (!error && pager->disconnecting)
        error = -EBUSY;
    if (!error)
        post(shard, order);
    pthread_mutex_unlock(&pager->channel_lock);
    if (error) {
        free(order);
        close(fd);
    }
    return error;
}

/* Joins a bulk thread that has ended or been shut down, and frees what it had. */
static void reap_bulk(struct bulk *bulk)
{
    if (bulk->started)
        pthread_join(bulk->thread, NULL);
    bulk->started = bulk->channel.ended = bulk->channel.error_told = false;
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
    pthread_mutex_lock(&pager->channel_lock);
    if (pager->disconnecting || __atomic_load_n(&bulk->running, __ATOMIC_SEQ_CST)) {
        error = -EBUSY;
    } else {
        reap_bulk(bulk);
        bulk->buffer = pc_buffer_new(PC_FRAME_MAX_PAYLOAD_BYTES);
        bulk->stream = stream;
        __atomic_store_n(&bulk->ending, false, __ATOMIC_SEQ_CST);
        __atomic_store_n(&bulk->running, true, __ATOMIC_SEQ_CST);
        error = bulk->buffer ? pc_thread_start(&bulk->thread, bulk_thread, bulk) : -ENOMEM;
        bulk->started = !error;
        if (error) {
            __atomic_store_n(&bulk->running, false, __ATOMIC_SEQ_CST);
            bulk->stream.fd = -1;
            pc_buffer_free(bulk->buffer, PC_FRAME_MAX_PAYLOAD_BYTES);
            bulk->buffer = NULL;
        }
    }
    pthread_mutex_unlock(&pager->channel_lock);
    if (error)
        close(fd);
    return error;
}

int pc_pager_track_thread(struct pc_pager *pager, uint32_t slot, int32_t tid)
{
    return pc_metrics_set_thread(pager->metrics, slot, tid);
}

int64_t pc_pager_request_missing(struct pc_pager *pager, uint64_t limit)
{
    uint64_t missing = __atomic_load_n(&pager->missing, __ATOMIC_SEQ_CST);
    uint32_t shards = __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE);

    __atomic_store_n(&pager->fill_left, limit, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < shards && limit; i++) {
        __atomic_store_n(&pager->shards[i]->fill_again, true, __ATOMIC_SEQ_CST);
        poke(pager->shards[i]);
    }
    return (int64_t)(missing < limit ? missing : limit);
}

int64_t pc_pager_request_range(struct pc_pager *pager, uint32_t index, uint64_t first_page, uint64_t pages)
{
    struct block *block;
    uint64_t page = first_page, end, missing = 0, no_limit = UINT64_MAX;

    if (index >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE))
        return -EINVAL;
    block = pager->blocks[index];
    if (first_page > block->pages || pages > block->pages - first_page)
        return -EINVAL;
    end = first_page + pages;
    for (uint64_t word = page / 64; word * 64 < end && pages; word++)
        missing += count_bits(~get_word(block->known, word) & word_mask(word, first_page, pages));
    while (missing && (page = next_in_neither(block->claimed, block->requested, page, end, &no_limit)) < end) {
        uint64_t part = end - page;
        struct shard *shard = find_shard(pager, block, page, &part);
        struct order *wish;

        if (!shard) { /* not armed */
            page++;
            continue;
        }
        wish = new_order(pager, ORDER_WISH);
        if (!wish)
            return -ENOMEM;
        wish->block = index;
        wish->page = page;
        wish->end = page + part;
        post(shard, wish);
        page += part;
    }
    return (int64_t)missing;
}

int64_t pc_pager_watch(struct pc_pager *pager, uint32_t block, uint64_t first_page, uint64_t pages, int event_fd)
{
    struct watch *watch, *larger = NULL, *unused;
    int64_t ticket;
    size_t capacity;
    int fd;

    if (block >= __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE) || first_page > pager->blocks[block]->pages ||
        pages > pager->blocks[block]->pages - first_page)
        return -EINVAL;
    fd = fcntl(event_fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    /* No memory is asked for under a lock that a fault thread may want. */
    pthread_mutex_lock(&pager->watch_lock);
    while (pager->watch_count == pager->watch_capacity) {
        capacity = pager->watch_capacity ? pager->watch_capacity * 2 : 16;
        pthread_mutex_unlock(&pager->watch_lock);
        larger = calloc(capacity, sizeof(*larger));
        if (!larger) {
            close(fd);
            return -ENOMEM;
        }
        pthread_mutex_lock(&pager->watch_lock);
        unused = larger;
        if (capacity > pager->watch_capacity) {
            for (size_t i = 0; i < pager->watch_count; i++)
                larger[i] = pager->watches[i];
            unused = pager->watches;
            pager->watches = larger;
            pager->watch_capacity = capacity;
        }
        pthread_mutex_unlock(&pager->watch_lock);
        free(unused);
        pthread_mutex_lock(&pager->watch_lock);
    }
    watch = &pager->watches[pager->watch_count];
    *watch = (struct watch){.page = first_page, .end = first_page + pages, .block = block, .fd = fd};
    __atomic_store_n(&pager->watch_count, pager->watch_count + 1, __ATOMIC_SEQ_CST);
    if (watch_is_over(pager, watch)) {
        ticket = 0;
        end_watch(pager, pager->watch_count - 1);
    } else {
        ticket = watch->ticket = ++pager->last_ticket;
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

    pc_metrics_read_stats(pager->metrics, stats);
    for (uint32_t i = 0; i < blocks; i++) {
        const struct block *block = pager->blocks[i];
        uint64_t known = count_known(block);

        stats->total_pages += block->pages;
        stats->total_bytes += block->memory.size_bytes;
        stats->resident_pages += known;
        stats->resident_bytes += known * block->memory.page_bytes;
    }
    return 0;
}

int pc_pager_latency(struct pc_pager *pager, int stage, struct pc_histogram *histogram)
{
    return pc_metrics_read_latency(pager->metrics, stage, histogram);
}

int pc_pager_blocktime(struct pc_pager *pager, uint64_t *blocktime_ns, uint32_t slots)
{
    return pc_metrics_read_blocktime(pager->metrics, blocktime_ns, slots);
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
    struct order orders[PC_MAX_SHARDS];
    sem_t done;

    pthread_mutex_lock(&pager->channel_lock);
    while (pager->disconnecting)
        pthread_cond_wait(&pager->disconnected, &pager->channel_lock);
    pager->disconnecting = true; /* nothing is attached meanwhile: the channels are this thread's */
    pthread_mutex_unlock(&pager->channel_lock);
    sem_init(&done, 0, 0);
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++) {
        __atomic_store_n(&pager->bulks[i].ending, true, __ATOMIC_SEQ_CST);
        pc_stream_shutdown(&pager->bulks[i].stream);
    }
    for (uint32_t i = 0; i < shards; i++) {
        orders[i] = (struct order){.kind = ORDER_DISCONNECT, .done = &done};
        post(pager->shards[i], &orders[i]);
    }
    for (uint32_t i = 0; i < shards; i++)
        while (sem_wait(&done) && errno == EINTR) {
        }
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++)
        reap_bulk(&pager->bulks[i]);
    sem_destroy(&done);
    pthread_mutex_lock(&pager->channel_lock);
    pager->disconnecting = false;
    pthread_cond_broadcast(&pager->disconnected);
    pthread_mutex_unlock(&pager->channel_lock);
    return 0;
}

static void unregister_all(struct pc_pager *pager, struct shard *shard)
{
    pthread_mutex_lock(&pager->lock);
    for (uint32_t i = 0; i < shard->range_count; i++) {
        if (!shard->ranges[i].bytes)
            continue;
        (void)pc_uffd_unregister(shard->uffd, shard->ranges[i].address, shard->ranges[i].bytes);
        __atomic_store_n(&shard->ranges[i].bytes, 0, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&pager->lock);
}

int pc_pager_disarm(struct pc_pager *pager)
{
    uint32_t shards = __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE);

    if (__atomic_load_n(&pager->missing, __ATOMIC_SEQ_CST))
        return -EBUSY;
    for (uint32_t i = 0; i < shards; i++)
        unregister_all(pager, pager->shards[i]);
    return 0;
}

/* Makes every page that is missing a poisoned one: whoever touches it gets SIGBUS (or EFAULT), nobody gets zeros. */
static int poison_missing(struct pc_pager *pager, struct shard *shard)
{
    for (uint32_t i = 0; i < shard->range_count; i++) {
        const struct range *range = &shard->ranges[i];
        const struct block *block = pager->blocks[range->block];
        uint64_t page = range->first_page, end = page + (range->bytes ? range->pages : 0);

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
                else if (error == -EAGAIN && !done)
                    (void)nanosleep(&(struct timespec){.tv_nsec = RETRY_NS}, NULL); /* the fault thread reads what it is about */
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
        struct order stop = {.kind = ORDER_STOP};

        if (!missing)
            unregister_all(pager, shard);
        post(shard, &stop);
        pthread_join(shard->thread, NULL);
        free_shard(shard);
    }
    free_orders(&pager->spent);
    for (uint32_t i = 0; i < pager->block_count; i++)
        free_block(pager->blocks[i]);
    pc_buffer_free(pager->zero_page, PC_FRAME_MAX_PAYLOAD_BYTES);
    pc_events_destroy(&pager->events);
    for (size_t i = pager->watch_count; i-- > 0;)
        close(pager->watches[i].fd);
    free(pager->watches);
    pthread_mutex_destroy(&pager->watch_lock);
    pthread_mutex_destroy(&pager->channel_lock);
    pthread_cond_destroy(&pager->disconnected);
    pthread_mutex_destroy(&pager->lock);
    pc_metrics_unmap(pager->metrics);
    free(pager);
    return 0;
}
