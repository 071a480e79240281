/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of the pager share: its records, which thread may touch them, and the invariants between them. How the whole
 * works is described at the head of pager.c.
 *
 * Threads: the *fault thread* of each shard (urgent.c), the *bulk threads* (bulk.c), the *readers* (local.c), and the *callers* of
 * postcopy/engine.h. What a record does not mark as shared belongs to the thread that its comment names.
 */
#ifndef PC_PAGER_H
#define PC_PAGER_H

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/bits.h"
#include "core/clock.h"
#include "core/codec.h"
#include "core/events.h"
#include "core/runtime.h"
#include "core/stream.h"
#include "core/util.h"
#include "memory/states.h"
#include "pager/metrics.h"
#include "postcopy/engine.h"
#include "postcopy/uffd.h"
#include "tls/stream.h"

#define PENDING_MAX 16384 /* threads of one shard that wait, as far as they are accounted */
#define PENDING_BUCKET_BITS 12
#define PENDING_BUCKETS (1u << PENDING_BUCKET_BITS)
#define MAX_SEGMENTS 64
#define MAX_RANGES (PC_MAX_BLOCKS * MAX_SEGMENTS)
#define RECEIVE_BYTES (PC_FRAME_HEADER_BYTES + PC_FRAME_MAX_PAYLOAD_BYTES)
#define SEND_BYTES (4096 * PC_FRAME_HEADER_BYTES)
#define GATE_LANES 5 /* the shard's own thread has the first; the others are shared by bulk threads and readers */
#define REQUEST_AHEAD ((uint32_t)PC_PAGER_REQUEST_AHEAD) /* no thread waits for it; the answer brings the bit back */

/* What work costs, in estimated nanoseconds: a turn of the fault thread's loop does a bounded amount. */
#define WORD_NS 4 /* 64 pages looked at in the maps */
#define PLACE_NS 600
#define BYTES_PER_NS 8
/* A placement that the kernel refused for the moment is tried again after this, twice as late each time. */
#define RETRY_NS 100000
#define RETRY_MAX_NS 10000000
/* Of how many repetitions of a fault one counts, see urgent.c: where events do not tell threads apart, it may be another thread. */
#define PC_REPEAT_WEIGHT 16

/* ---- memory: written by callers under pc_pager.lock, read by all ---- */

struct segment { /* part of a block, in one piece of its process's memory and guarded by one shard */
    uint64_t first_page, pages;
    uint64_t address;
    uint32_t shard;
};

struct local { /* where pages of a block can be read here (local.c) */
    uint64_t *pages; /* atomic: which; published after the rest. NULL: none */
    uint64_t offset; /* of the block's content in the file */
    int fd;
    int now;      /* atomic: flags for preadv2(2) with which it does not wait for a disk */
    bool staging; /* what arrives for pages that are not armed is written there */
};

/* The maps change by atomic instructions only; the head of pager.c says what they mean. */
struct block {
    struct pc_memory memory;
    uint64_t pages;
    uint64_t missing; /* atomic: pages not received, or some more for a moment */
    uint64_t *requested, *claimed, *received, *zero, *lost;
    uint64_t maps_bytes; /* of one buffer, which `requested` begins and which has those that are not in `states`: */
    struct pc_states states; /* claimed, received and zero, when they are to outlive this pager */
    struct local local;
    struct segment segments[MAX_SEGMENTS];
    uint32_t segment_count; /* published after the segment */
};

struct range { /* what one shard guards, found by address */
    uint64_t address, bytes; /* no bytes: not any more */
    uint64_t first_page, pages;
    uint32_t block;
};

/* ---- a shard ---- */

struct fault { /* a thread of the machine that waits */
    uint64_t page;
    uint64_t event_ns, sent_ns; /* sent_ns 0: its request has not been sent by this fault */
    uint32_t block;
    int32_t tid; /* 0: unknown */
    int slot;    /* -1: not a tracked thread */
    uint16_t next_by_page, next_by_tid, older, newer; /* numbers of entries; a free one has the next free in `newer` */
    bool minor;
    bool unrequested; /* no request for its page is under way: there was no channel, no room, or the page was claimed */
    bool unresolved;  /* its page is received, and the kernel could not resolve the fault yet */
};

struct pending { /* the table of them, faults.c; 0 is the number of no entry */
    struct fault faults[PENDING_MAX + 1];
    uint16_t by_page[PENDING_BUCKETS], by_tid[PENDING_BUCKETS];
    uint64_t marks[PENDING_BUCKETS / 64]; /* atomic, set by other threads: faults on such pages are to be looked at */
    uint16_t queued[SEND_BYTES / PC_FRAME_HEADER_BYTES]; /* whose requests are in shard.send */
    uint32_t queued_count, count;
    uint16_t used, free;
};

enum command_kind { COMMAND_ATTACH, COMMAND_PREFETCH, COMMAND_RUNS, COMMAND_DISCONNECT, COMMAND_STOP };

struct command { /* from a caller to a fault thread, which owns it from then on */
    struct command *next;
    enum command_kind kind;
    struct pc_stream stream; /* attach */
    uint64_t page, end;      /* prefetch: pages of a block; `page` moves on */
    uint32_t block;
    sem_t *done; /* disconnect */
    uint64_t run_count, run_next; /* runs: pages of this shard, in the order in which they are wanted; of the next one `page` have been looked at */
    struct pc_page_run runs[];
};

struct channel { /* what urgent and bulk have in common; its thread's own */
    struct shard *own; /* the shard whose fault thread this is; NULL: a bulk thread, or a caller */
    int kind;
    uint32_t index;
    uint64_t ended;      /* the last push that it has ended */
    bool local;          /* no connection: what is placed was read on this host (local.c) */
    bool error_reported; /* that the source could not serve a page of it: once */
};

struct progress { /* of one frame, in one turn */
    uint64_t done;    /* pages of it that are dealt with */
    uint64_t work_ns; /* left of this turn */
    uint64_t fresh;   /* pages that have become received */
    char text[PC_ERROR_BYTES];
};

struct cursor { /* a walk once around all that a shard guards */
    uint32_t range;
    uint64_t page; /* from the range's first page on */
    uint64_t left; /* pages to look at until all have been */
};

/* What faults show of the pages to come (streams.c): */
#define STREAMS 16
#define STREAM_HISTORY 32

struct stream { /* pages at equal distances */
    uint64_t page;  /* the last one that was reached */
    int64_t stride; /* 0: there is none */
    uint64_t asked; /* bit i: page + (i + 1) * stride was requested for it */
    uint32_t block;
    uint32_t depth, reach; /* how many pages ahead are wanted, and have been looked at */
    uint32_t used;
};

struct streams {
    struct stream all[STREAMS];
    uint64_t history[STREAM_HISTORY]; /* faults that belong to none: place + 1; a ring */
    uint32_t faults, clock, latest;
    bool busy; /* one of them may want pages */
};

struct shard {
    struct pc_pager *pager;
    uint32_t index;
    int uffd, control_fd;
    int poll_fd; /* epoll(7) of what its thread waits for */
    uint64_t busy_poll_ns;
    struct pc_uffd_api api;
    bool gated; /* its userfaultfd tells what is taken away */
    /* The gate, where it does. Who places a page holds a lane from looking at `received` until it has set it; who reads an event, changes the
     * ranges or the journal holds all lanes. So no placement that was decided before an event is read happens after that read, from which on
     * the thread that takes the memory away goes on; until then the kernel refuses all of them (EAGAIN). Lanes are taken in ascending order;
     * placers do not wait for each other, and each lane inherits priority, as no lock for readers and writers does. */
    pthread_mutex_t gate[GATE_LANES];
    struct pc_journal *journal; /* what is read of it, removed.c; with the gate closed: `own_journal`, or in the states of the block armed first */
    struct pc_journal own_journal;
    bool disarmed; /* with the gate closed: nothing is armed any more, and what is taken away does not matter here */
    pthread_t thread;

    /* Shared, atomic: from other threads to the fault thread. */
    struct command *commands;
    struct range *ranges;    /* MAX_RANGES of them; never moved, never used again */
    uint32_t range_count;    /* published after the range */
    bool recheck;            /* pages that threads wait for have been received, or may be requested again */
    bool answers_dropped;    /* set before `recheck`: answers to requests may have been */
    bool sweep_again;        /* more missing pages may be requested */
    bool journal_full;       /* nothing is read before more memory is armed */

    /* The fault thread's own from here on. Who waits (faults.c): */
    struct pc_shard_metrics *metrics;
    struct pending *pending;
    bool overflowed;  /* threads wait that found no place there */
    bool send_full;   /* faults are unrequested only for want of room in `send` */
    uint32_t repeats; /* faults in a row that were pending already */
    uint64_t retry_at_ns, retry_ns; /* something could not be placed or resolved for the moment; 0: nothing */
    uint64_t unpollable_until_ns;
    bool unpollable_reported;
    bool may_block; /* the userfaultfd may have become a blocking one: another process has it too */
    uint32_t uffd_watched, stream_watched; /* for what epoll(7) looks at them; 0: not at all */
    uint32_t busy_turns;
    bool fair; /* its thread is no real-time one, see pc_local_schedule */

    /* Its channel (urgent.c): */
    struct pc_stream stream;
    struct channel channel;
    uint8_t *receive;
    size_t receive_start, receive_end;
    struct progress frame; /* of the first frame in `receive` */
    bool frame_checked;    /* its payload */
    bool frames_left;      /* more of them than the turn could take */
    bool stalled;          /* it waits for retry_at_ns */
    uint64_t useless_ns, read_at_ns;
    uint8_t *page; /* what is read of a local source */
    uint8_t *send;
    size_t send_bytes, send_done;
    uint32_t next_request;

    /* What is requested before a fault (prefetch.c): */
    struct streams streams;
    struct command *runs, **runs_end; /* a list; where its end is to be linked */
    struct command *prefetches; /* the last of a ring; the first is next */
    struct cursor lost, sweep;
    bool lost_first;
    bool ahead_left; /* pages to look at, more than the turn could */
    uint64_t ahead_in_flight;
};

/* ---- the pager ---- */

struct watch { /* a caller waits for all pages of a range; those below `page` are received */
    uint64_t page, end;
    int64_t ticket;
    uint32_t block;
    int fd;
};

struct bulk {
    struct pc_pager *pager;
    struct channel channel;
    struct pc_stream stream;
    uint8_t *buffer, *content; /* what is received; what it is when it was compressed, from the first such frame on */
    struct pc_codec codec;
    pthread_t thread;
    bool started;         /* under channel_lock */
    bool running, ending; /* atomic; the thread clears the first and obeys the second */
};

struct pc_pager {
    pthread_mutex_t lock; /* adding blocks, shards and ranges */
    struct pc_events events;
    struct block *blocks[PC_MAX_BLOCKS];
    uint32_t block_count; /* published after the block */
    struct shard *shards[PC_MAX_SHARDS];
    uint32_t shard_count; /* published after the shard */
    void *zero_page;      /* as large as any page, for memory that has no ZEROPAGE */

    pthread_mutex_t channel_lock; /* attaching and disconnecting */
    pthread_cond_t disconnected;
    bool disconnecting;
    struct bulk bulks[PC_MAX_BULK_CHANNELS];
    struct command *finished; /* for callers to free: a fault thread frees nothing */

    pthread_mutex_t watch_lock;
    struct watch *watches;
    size_t watch_count, watch_capacity; /* the count is read without the lock */
    int64_t last_ticket;

    uint64_t missing;    /* atomic: the sum of those of the blocks, or some more for a moment; the thread that makes it 0 announces COMPLETE */
    uint64_t sweep_left; /* atomic: missing pages that all shards together may request */
    uint64_t pushes; /* atomic: how many the source may have begun */
    struct readers *readers; /* local.c */
    struct touches *touches; /* the log of first touches, or NULL; published */
    uint32_t accepted_compression; /* atomic: a set of enum pc_compression */
    uint32_t prefetch;             /* atomic: enum pc_prefetch, and pages << 8 */
    bool asks_again;               /* atomic: see pc_pager_ask_again */
    struct pc_metrics metrics;
};

#define COUNT(pager, field, n) ((void)__atomic_fetch_add(&(pager)->metrics.map->count.field, (uint64_t)(n), __ATOMIC_RELAXED))

static inline uint32_t pc_block_count(const struct pc_pager *pager)
{
    return __atomic_load_n(&pager->block_count, __ATOMIC_ACQUIRE);
}

static inline uint32_t pc_shard_count(const struct pc_pager *pager)
{
    return __atomic_load_n(&pager->shard_count, __ATOMIC_ACQUIRE);
}

static inline struct shard *pc_shard_at(struct pc_pager *pager, uint32_t index)
{
    return index < pc_shard_count(pager) ? pager->shards[index] : NULL;
}

/* Whether a block has these pages, of which there may be none. */
static inline bool pc_block_has(const struct pc_pager *pager, uint32_t block, uint64_t first_page, uint64_t pages)
{
    return block < pc_block_count(pager) && first_page <= pager->blocks[block]->pages &&
           pages <= pager->blocks[block]->pages - first_page;
}

static inline uint32_t pc_range_count(const struct shard *shard)
{
    return __atomic_load_n(&shard->range_count, __ATOMIC_ACQUIRE);
}

/* So many pages have just been set in `received`. */
static inline void pc_count_received(struct block *block, uint64_t pages)
{
    (void)__atomic_fetch_sub(&block->missing, pages, __ATOMIC_SEQ_CST);
}

/* What has an armed page; NULL: it is not armed. *pages is cut to what follows in the same segment. */
static inline const struct segment *pc_find_segment(const struct block *block, uint64_t page, uint64_t *pages)
{
    uint32_t count = __atomic_load_n(&block->segment_count, __ATOMIC_SEQ_CST);

    for (uint32_t i = 0; i < count; i++) {
        const struct segment *segment = &block->segments[i];
        uint64_t at = page - segment->first_page;

        if (at < segment->pages) {
            if (*pages > segment->pages - at)
                *pages = segment->pages - at;
            return segment;
        }
    }
    return NULL;
}

/* Of an armed page; what follows it in the same segment follows it there. */
static inline uint64_t pc_page_address(const struct block *block, uint64_t page)
{
    uint64_t one = 1;
    const struct segment *segment = pc_find_segment(block, page, &one);

    if (!segment)
        return 0;
    return segment->address + (page - segment->first_page) * block->memory.page_bytes;
}

/* Which pages are staged, or NULL. */
static inline const uint64_t *pc_staged(const struct block *block)
{
    const uint64_t *local = __atomic_load_n(&block->local.pages, __ATOMIC_ACQUIRE);

    return local && block->local.staging ? local : NULL;
}

/* Whether the content of a page that is missing can be read here. */
static inline bool pc_is_local(const struct block *block, uint64_t page)
{
    const uint64_t *local = __atomic_load_n(&block->local.pages, __ATOMIC_ACQUIRE);

    return local && pc_bits_test(local, page);
}

/* Whether a page may be requested: it is missing, not local and not requested. */
static inline bool pc_is_wanted(const struct block *block, uint64_t page)
{
    return !pc_bits_test(block->claimed, page) && !pc_bits_test(block->requested, page) && !pc_is_local(block, page);
}

static inline void pc_wake_pages(const struct shard *shard, const struct block *block, uint64_t first, uint64_t pages)
{
    (void)pc_uffd_wake(shard->uffd, pc_page_address(block, first), pages * block->memory.page_bytes);
}

static inline void pc_spend(struct progress *progress, uint64_t ns)
{
    progress->work_ns -= progress->work_ns < ns ? progress->work_ns : ns;
}

/* The memory may be another process's: pages may come and go there of which this pager is not told. */
static inline bool pc_is_adopted(const struct shard *shard)
{
    return !shard->api.how;
}

/* The kernel refused, and has woken no thread: the same again, later. */
static inline bool pc_is_temporary(int error)
{
    return error == -EAGAIN || error == -ENOMEM;
}

/* pager.c */
void pc_pager_fatal(struct pc_pager *pager, int error, const char *what, uint32_t block, uint64_t page); /* any thread */

/* registry.c: callers, but the first two. */
/* The shard that guards `page`, and how many of the next `pages` it guards as well; NULL when none does. Any thread. */
struct shard *pc_find_shard(struct pc_pager *pager, const struct block *block, uint64_t page, uint64_t *pages);
/* Whether a page that is in the page cache, and not in the page tables, faults too. Any thread. */
bool pc_has_minor_faults(const struct shard *shard, const struct block *block);
void pc_block_free(struct block *block);
void pc_shard_free(struct shard *shard);
void pc_shard_unregister(struct pc_pager *pager, struct shard *shard);
int pc_shard_poison(struct pc_pager *pager, struct shard *shard);

/* placement.c: fault threads, bulk threads and readers. */
/* Places zeros, of huge pages one: *done bytes. 0 or -errno. */
int pc_fill_zeros(struct shard *shard, const struct block *block, uint64_t page, uint64_t pages, uint64_t *done);
/* Resolves a fault on a received page. After an error that is temporary no thread has been woken. */
int pc_resolve(struct shard *shard, const struct block *block, uint64_t page, bool minor);
void pc_announce_received(struct pc_pager *pager, uint64_t pages);
/* The pages are zero. Goes on at progress->done, and stops there when the turn's work is used up. Callers too. */
void pc_place_zeros(struct pc_pager *pager, const struct channel *channel, uint32_t index, uint64_t first, uint64_t pages,
                    uint64_t received_ns, struct progress *progress);
/* Decodes a header and checks it against what this pager has. 0, or -EBADMSG with a line in progress->text; so the next. */
int pc_decode_header(struct pc_pager *pager, const uint8_t *header, struct pc_frame *frame, struct progress *progress);
int pc_check_payload(const struct pc_frame *frame, const uint8_t *payload, struct progress *progress);
/* Does what a whole, checked frame says, as far as the turn's work reaches. 0, -EAGAIN (the same frame again, later), or
 * an error that ends the channel, with a line in progress->text. */
int pc_handle_frame(struct pc_pager *pager, struct channel *channel, const struct pc_frame *frame, const uint8_t *payload,
                    struct progress *progress);

/* removed.c. Where a shard has no gate the first four do nothing. */
void pc_gate_enter(struct shard *shard, const struct channel *channel); /* to place pages, until it leaves */
void pc_gate_leave(struct shard *shard, const struct channel *channel);
void pc_gate_close(struct shard *shard); /* when nothing is being placed; nothing is until it is opened */
void pc_gate_open(struct shard *shard);
/* With the gate closed, but for those that callers use to arm. */
/* Fault thread. Puts into the maps what the first events of the journal say was taken away; how many say so. */
size_t pc_apply_removals(struct shard *shard, size_t count);
/* Arming, in this order. Before anything is armed: which journal it is. */
void pc_journal_open(struct shard *shard, const struct block *block);
/* Whether an earlier pager has registered this range: what has left the userfaultfd since is not ours any more. */
bool pc_journal_knows(const struct shard *shard, const struct range *range);
void pc_journal_registered(struct shard *shard, const struct range *range);
void pc_journal_apply(struct shard *shard); /* with the gate closed: what has been taken away of the range that was added */
void pc_journal_ends(struct shard *shard); /* closes the gate itself: the pager arms nothing more, and what is armed stays so */
void pc_journal_disarmed(struct shard *shard); /* with the gate closed: all of it has been unregistered */
void pc_drain_removals(struct shard *shard); /* the fault thread, last of all */

/* faults.c: the shard's fault thread, but the first. */
void pc_recheck_page(struct shard *shard, uint32_t block, uint64_t page); /* any thread: the faults on it are looked at, soon */
bool pc_read_events(struct shard *shard);
void pc_uffd_unpollable(struct shard *shard);
/* Accounts and forgets the threads that waited for these pages; they have been woken. */
void pc_finish_faults(struct shard *shard, uint32_t block, uint64_t first, uint64_t pages, uint64_t received_ns);
bool pc_resolve_zero(struct shard *shard, uint32_t index, uint64_t page, uint64_t received_ns);
void pc_recheck_pending(struct shard *shard);
void pc_requests_sent(struct shard *shard);
void pc_requests_lost(struct shard *shard);
void pc_request_pending(struct shard *shard);
void pc_request_again(struct shard *shard);
void pc_retry_later(struct shard *shard);

/* urgent.c */
struct command *pc_command_new(struct pc_pager *pager, enum command_kind kind, uint64_t runs); /* callers, as the next */
void pc_command_send(struct shard *shard, struct command *command);
void pc_command_push(struct command **stack, struct command *command); /* any thread, as the next two */
void pc_commands_free(struct command **stack);
void pc_shard_notify(struct shard *shard); /* its loop takes another turn */
/* Fault thread. False: there is no room. */
bool pc_queue_request(struct shard *shard, uint32_t block, uint64_t page, uint32_t id_bits);
bool pc_loop_init(struct shard *shard); /* before the thread; false and errno */
void *pc_fault_thread(void *shard);

/* streams.c: the shard's fault thread. */
/* A fault on a page of the source's, which is `missing`, or was known to be there. `counted`: as a hit. */
void pc_streams_note(struct shard *shard, uint32_t block, uint64_t page, bool missing, bool counted);
/* The next page that is wanted ahead of a fault, which the caller requests. False: there is none. */
bool pc_streams_next(struct shard *shard, uint32_t *index, uint64_t *page);

/* prefetch.c: the shard's fault thread. */
void pc_prefetch_add(struct shard *shard, struct command *command);
void pc_prefetch_add_runs(struct shard *shard, struct command *command);
void pc_cursor_restart(const struct shard *shard, struct cursor *cursor);
void pc_request_ahead(struct shard *shard);

/* local.c: fault thread. Gives itself the scheduling class that its work needs now: where it may have changed. */
void pc_local_schedule(struct shard *shard);
/* Fault thread. Serves a fault on a local page at once; false: it has not. */
bool pc_local_serve(struct shard *shard, uint32_t index, uint64_t page);
/* Fault thread. Leaves a local page that a thread waits for to the readers; false: there is no room. */
bool pc_local_request(struct pc_pager *pager, uint32_t index, uint64_t page);
/* Any thread that has claimed these pages, which were not armed a moment ago: stages their content. 0, and the claims are to be taken back,
 * then pc_local_staged called; or -errno. */
int pc_local_stage(struct pc_pager *pager, uint32_t index, uint64_t first, uint64_t pages, const uint8_t *content);
void pc_local_staged(struct pc_pager *pager, const struct block *block);
/* Callers. Memory with staged pages has been armed. */
void pc_local_armed(struct pc_pager *pager, const struct block *block);
void pc_local_forget(struct block *block, const uint64_t *stale_words);
void pc_local_block_free(struct block *block);
struct readers *pc_readers_new(void); /* NULL without memory */
void pc_readers_end(struct pc_pager *pager); /* they place nothing from here on */
void pc_readers_free(struct pc_pager *pager);
void pc_touch(struct pc_pager *pager, uint32_t block, uint64_t page); /* any thread */

/* bulk.c: callers with channel_lock, or while `disconnecting` is theirs. */
void pc_bulk_reap(struct bulk *bulk);

/* watch.c: any thread. */
void pc_watches_notify(struct pc_pager *pager);

#endif
