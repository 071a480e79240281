/* SPDX-License-Identifier: Apache-2.0
 *
 * The source's page server.
 *
 * An urgent channel has a thread that answers requests in the order they come, at once, even for a page that is on its
 * way in bulk: the destination drops the second copy, and a fault never waits for what is queued in a bulk
 * connection. A bulk channel has a thread that claims runs of pages not yet sent, from a cursor that all bulk threads
 * share and every request moves to the page after its own: what the machine touches next is most likely near. (One that was
 * made ahead of a fault moves it further, as more such requests will follow.)
 *
 * From pc_pageserver_serve on the machine is paused for good, so that memory is read without a lock and sent straight
 * from where it lies. Before that it may be pushed (precopy), in rounds: each run is copied first, and zeros, checksum and
 * content are those of the copy. A page that was written meanwhile goes again: the dirty log names it after the push.
 * Pages that are absent (never touched) are known to be zero without being read; those that turn out
 * to be all zero are sent as a run of zeros.
 *
 *   pageserver.c  blocks, channels and their threads, the public calls
 *   answer.c      urgent channels
 *   push.c        bulk channels
 *   release.c     memory given back
 *   compress.c    whether a run goes compressed, and how
 *   batch.c       frames on their way out
 *
 * Nothing of a lower priority delays an answer: an urgent thread takes no lock once the server serves. `sent`
 * is changed by atomic or, a block's `unsent` follows it; what an urgent thread wants pushed next it leaves in `push_from`, for the
 * next bulk thread to find; what it is sending it says in atomic words. Bulk threads share the cursor and the bandwidth under
 * push_lock, which is held for the search of a run, never over a send.
 *
 * Giving memory back (pc_pageserver_release) takes three steps. A page that the destination has is marked `released`: no thread
 * reads it any more. Then, unless a send still points at it, its memory goes, and it is `discarded`; else that is left to
 * a later call. A sender *pins* what it is about to read and then looks at `released`; a release sets `released` and
 * then looks at the pins, all of it sequentially consistent: so one of the two sees the other.
 *
 * `lock` is for what happens to blocks and channels as a whole: adding, attaching, disconnecting. A channel's thread takes it
 * never, so that it can be joined under it.
 */
#ifndef PC_SERVER_H
#define PC_SERVER_H

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "core/bits.h"
#include "core/clock.h"
#include "core/codec.h"
#include "core/events.h"
#include "core/runtime.h"
#include "core/stream.h"
#include "core/summary.h"
#include "core/util.h"
#include "core/view.h"
#include "postcopy/engine.h"
#include "tls/stream.h"

#define RUN_BYTES (256 * 1024)        /* what a bulk thread claims at a time, at least one page */
#define REQUESTS_PER_TURN 64           /* answered with one write */
#define MAX_RUN_PAGES (RUN_BYTES / 1024)
#define NO_PLACE UINT64_MAX

/* Block and page in one word, so that they change together. */
#define PLACE_PAGE_BITS 44
#define PLACE_PAGES_MAX (UINT64_C(1) << PLACE_PAGE_BITS)
#define PLACE(block, page) ((uint64_t)(block) << 52 | (page))
#define PLACE_BLOCK(place) ((uint32_t)((place) >> 52))
#define PLACE_PAGE(place) ((place) & (PLACE_PAGES_MAX - 1))
#define PLACE_RUN(block, page, pages) (PLACE(block, page) | ((pages)-1) << PLACE_PAGE_BITS)
#define PLACE_RUN_PAGES(place) (((place) >> PLACE_PAGE_BITS & 0xff) + 1)
_Static_assert(MAX_RUN_PAGES <= 256 && PC_MAX_BLOCKS <= 4096, "a run is one word");

#define BLOCK_MAPS 7
struct source_block {
    struct pc_memory memory;
    uint64_t page_bytes; /* the unit of transfer; may differ from the memory's own page */
    uint64_t pages, words;
    uint64_t unsent; /* atomic: pages that are not in `sent`, or more for a moment */
    uint64_t *present; /* all maps are in one buffer, which this one begins */
    uint64_t *sent, *demanded;
    struct pc_summary sent_words;   /* those of `sent` that are full */
    uint64_t *released;             /* atomic: not read any more, since the destination has said that it is placed */
    uint64_t *released_before;      /* released before the present connections were made: no request for it crosses that */
    uint64_t *discarded, *pinned;   /* under release_lock; `pinned` is scratch */
    uint64_t postponed_first, postponed_end; /* where released pages were pinned, or kept by the kernel; under release_lock */
};

struct run {
    uint32_t block;
    uint64_t first_page, pages;
};

/* compress.c: what a bulk channel knows of the ways to send a run. */
enum way { WAY_RAW, WAY_LZ4, WAY_ZSTD, WAYS };
struct sums {
    uint64_t runs, ns, drained_bytes, wire_bytes, content_bytes;
};
struct choice {
    struct pc_codec codec;
    uint8_t *out; /* compressed frames of one run */
    size_t out_bytes, out_used;
    enum way way, best; /* of this run; of the last that was measured */
    double ns[WAYS];    /* for a byte of content, as it goes on and on; 0: not known */
    uint32_t wait[WAYS], interval[WAYS]; /* runs until a way is tried again, and the next time */
    struct sums sums;   /* since `way` was taken */
    uint64_t sent_ns, queued_bytes; /* when the last run had been sent, and what of it was in the socket */
    uint64_t run_content_bytes, run_wire_bytes, run_ns; /* of this run: its content, the same as it goes out, and the time it took to make */
};

struct channel {
    struct pc_pageserver *server;
    uint32_t index;
    int kind;
    struct pc_stream stream;
    uint64_t busy_poll_ns;
    uint8_t *staging; /* where pages of a block without a mapping are read to */
    size_t staging_bytes;
    struct batch *batch;
    struct choice choice; /* bulk */
    int wake_fd;     /* bulk: an eventfd, from its first connection until the server is freed; under push_lock */
    uint64_t pushed; /* bulk: the last push that it has ended; atomic */
    uint64_t pins[REQUESTS_PER_TURN]; /* atomic: what the batch on its way out points at, as PLACE_RUN */
    uint32_t pin_count;               /* atomic */
    uint64_t repetitions;
    bool has_reported; /* why it ends */
    pthread_t thread;
    bool started; /* under server->lock */
    bool running; /* atomic */
};

struct pc_pageserver {
    pthread_mutex_t lock;
    pthread_cond_t connectable; /* `disconnecting` has ended */
    bool disconnecting;         /* under lock: its caller alone works on the channels */
    struct pc_events events;
    struct source_block *blocks[PC_MAX_BLOCKS];
    uint32_t block_count; /* atomic */
    struct pc_view view;  /* of the pages that are sent */
    struct channel urgent[PC_MAX_SHARDS];
    struct channel bulk[PC_MAX_BULK_CHANNELS];

    pthread_mutex_t push_lock;
    pthread_cond_t push_changed; /* CLOCK_MONOTONIC */
    bool serving, stopping; /* atomic, changed under push_lock */
    uint64_t pushes;        /* how many there were, the one that is running included; atomic, changed under push_lock */
    bool last_push;         /* it began when the server was serving: none follows it; under push_lock */
    bool push_stopped;      /* the present push is to end where it is, to be gone on with by the next one; under push_lock */
    uint64_t push_from;         /* atomic: where the push is to go on, as PLACE, or NO_PLACE */
    uint32_t cursor_block;
    uint64_t cursor_page;
    uint64_t bandwidth, next_free_ns, bandwidth_changes;

    pthread_mutex_t release_lock;

    uint32_t compression; /* atomic: a set of enum pc_compression, and COMPRESSION_ADAPTIVE */
    bool unreadable_reported; /* atomic */
    struct pc_pageserver_stats count;
};

#define ADD(server, field, n) ((void)__atomic_fetch_add(&(server)->count.field, (uint64_t)(n), __ATOMIC_RELAXED))

/* batch.c: a batch of frames on its way out: headers, and parts that point at them and at pages. */
struct batch {
    uint8_t headers[MAX_RUN_PAGES + REQUESTS_PER_TURN][PC_FRAME_HEADER_BYTES];
    struct iovec parts[2 * (MAX_RUN_PAGES + REQUESTS_PER_TURN)];
    int frame_count, part_count;
    uint64_t bytes;
    size_t staged;
    bool authenticated; /* the connection finds every damage itself: no checksum */
};

/* compress.c: the bulk channel's thread. A run: begun, each frame of content added, sent, and then accounted. */
#define COMPRESSION_ADAPTIVE 0x80000000u
void pc_run_begin(struct channel *channel);
void pc_run_add(struct channel *channel, struct batch *batch, struct pc_frame frame, const uint8_t *content, uint64_t bytes);
void pc_run_sent(struct channel *channel);
void pc_choice_free(struct choice *choice);

/* The payload is pointed at until it is sent. */
void pc_batch_add(struct batch *batch, struct pc_frame frame, const void *payload, uint64_t bytes);
/* Sends and empties it. 0 or -errno. Blocks for as long as the destination does not read. */
int pc_batch_send(struct batch *batch, struct channel *channel);
/* Content of pages: where they lie, or read into the channel's staging buffer at batch->staged. NULL with -errno in
 * *error when they cannot be read; the text says why. */
const uint8_t *pc_page_content(struct channel *channel, struct batch *batch, const struct source_block *block, uint64_t page,
                               uint64_t pages, int *error, char *text, size_t text_bytes);

/* answer.c, push.c: all that a channel's thread does. The reason of its end as -errno, with the text for a person. */
int pc_channel_answer(struct channel *channel, char *text, size_t text_bytes);
/* The next run of pages that have not been sent, marked as sent. False when there is none. Under push_lock. */
bool pc_claim_run(struct pc_pageserver *server, struct run *run);
int pc_channel_push(struct channel *channel, char *text, size_t text_bytes);

const struct pc_view *pc_pageserver_view(const struct pc_pageserver *server);
/* pageserver.c. Waits until the server serves: true, or false when it is being stopped. Without a lock once it does. */
bool pc_pageserver_wait_serving(struct pc_pageserver *server);
/* A page's content cannot be had, and no other connection would serve it. Reported once between two disconnections: events wait in
 * memory for who takes them, and a peer may ask as often as it likes. Whether it was now. */
bool pc_pageserver_unreadable(struct channel *channel, int code, const char *text);

/* ---- pins ---- */

/* By the channel's thread. A thread that looks at released pages after this sees those of a release that does not see the pin. */
static inline void pin(struct channel *channel, uint32_t block, uint64_t first_page, uint64_t pages)
{
    uint32_t count = __atomic_load_n(&channel->pin_count, __ATOMIC_RELAXED);

    __atomic_store_n(&channel->pins[count], PLACE_RUN(block, first_page, pages), __ATOMIC_SEQ_CST);
    __atomic_store_n(&channel->pin_count, count + 1, __ATOMIC_SEQ_CST);
}

static inline void unpin_all(struct channel *channel)
{
    __atomic_store_n(&channel->pin_count, 0, __ATOMIC_SEQ_CST);
}

/* Says that a page is sent; whether it was before. */
static inline bool set_sent(struct source_block *block, uint64_t page)
{
    uint64_t word = page / 64, bit = UINT64_C(1) << (page % 64);
    uint64_t before = __atomic_fetch_or(&block->sent[word], bit, __ATOMIC_SEQ_CST);

    if ((before | bit) == pc_bits_mask(word, 0, block->pages))
        pc_summary_fill(&block->sent_words, word);
    return before & bit;
}

/* After a pin. */
static inline bool is_released(const struct source_block *block, uint64_t page)
{
    return pc_bits_test(block->released, page);
}

/* ---- what every thread may ask ---- */

/* Blocks are only added, and each is whole before it counts. */
static inline uint32_t block_count(const struct pc_pageserver *server)
{
    return __atomic_load_n(&server->block_count, __ATOMIC_ACQUIRE);
}

static inline bool is_serving(const struct pc_pageserver *server)
{
    return __atomic_load_n(&server->serving, __ATOMIC_ACQUIRE);
}

static inline bool is_stopping(const struct pc_pageserver *server)
{
    return __atomic_load_n(&server->stopping, __ATOMIC_ACQUIRE);
}

static inline bool is_running(const struct channel *channel)
{
    return __atomic_load_n(&channel->running, __ATOMIC_ACQUIRE);
}

#define CHANNELS (PC_MAX_SHARDS + PC_MAX_BULK_CHANNELS)

static inline struct channel *channel_number(struct pc_pageserver *server, uint32_t number)
{
    return number < PC_MAX_SHARDS ? &server->urgent[number] : &server->bulk[number - PC_MAX_SHARDS];
}

#endif
