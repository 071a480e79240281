/* SPDX-License-Identifier: Apache-2.0
 *
 * The source's page server.
 *
 * An urgent channel has a thread that answers requests in the order they come, at once, even for a page that is on its
 * way in bulk: the destination drops whichever comes second, and a fault never waits for what stands in a bulk
 * connection. A bulk channel has a thread that claims runs of pages not yet sent, from a cursor that all bulk threads
 * share and every request moves to the page after its own: what the machine touches next is most likely near.
 *
 * The machine is paused for good when the server is started, so that memory is read without a lock and sent straight
 * from where it lies. Pages that are absent (never touched) are known to be zero without being read; those that turn out
 * to be all zero are told as a run of nothing.
 *
 * Nothing of a lower priority stands in the way of an answer: an urgent thread takes no lock once the server serves. `sent`
 * is changed by atomic or, a block's `unsent` follows it; what an urgent thread wants pushed next it leaves in `pivot`, for the
 * next bulk thread to find; what it is sending it says in atomic words. Bulk threads share the cursor and the bandwidth under
 * push_lock, which is held for the search of a run, never over a send.
 *
 * Giving memory back (pc_pageserver_release) takes three steps. A page that the destination has is marked `released`: nobody
 * reads it any more. Then, unless a send still points at it, its memory goes, and it is `discarded`; else that is left to
 * a later call. A sender *pins* what it is about to read and then looks at `released`; a release sets `released` and
 * then looks at the pins, all of it sequentially consistent: so one of the two sees the other.
 *
 * `lock` is for what happens to blocks and channels as a whole: adding, attaching, disconnecting. A channel's thread takes it
 * never, so that it can be joined under it.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/events.h"
#include "core/runtime.h"
#include "core/stream.h"
#include "core/util.h"
#include "pageserver/pageserver.h"
#include "postcopy/engine.h"

#define RUN_BYTES (256 * 1024)        /* what a bulk thread claims at a time, at least one page */
#define REQUESTS_PER_TURN 64           /* answered with one write */
#define REQUEST_BYTES (REQUESTS_PER_TURN * PC_FRAME_HEADER_BYTES)
#define MAX_RUN_PAGES (RUN_BYTES / 1024)
#define BURST_NS UINT64_C(20000000)    /* bandwidth not used for this long is lost */
#define REPETITIONS_MAX 4096           /* answered to one connection at real-time priority */
#define NO_PIVOT UINT64_MAX

/* Block and page in one word, so that they change together. */
#define PLACE_PAGE_BITS 44
#define PLACE_PAGES_MAX (UINT64_C(1) << PLACE_PAGE_BITS)
#define PLACE(block, page) ((uint64_t)(block) << 52 | (page))
#define PLACE_BLOCK(place) ((uint32_t)((place) >> 52))
#define PLACE_PAGE(place) ((place) & (PLACE_PAGES_MAX - 1))
#define PLACE_RUN(block, page, pages) (PLACE(block, page) | ((pages)-1) << PLACE_PAGE_BITS)
#define PLACE_RUN_PAGES(place) (((place) >> PLACE_PAGE_BITS & 0xff) + 1)
_Static_assert(MAX_RUN_PAGES <= 256 && PC_MAX_BLOCKS <= 4096, "a run is one word");

struct source_block {
    struct pc_memory memory;
    uint64_t page_bytes; /* the unit of transfer; may differ from the memory's own page */
    uint64_t pages, words;
    uint64_t unsent; /* atomic: pages that are not in `sent`, or more for a moment */
    uint64_t *present, *sent, *demanded;
    uint64_t *released;             /* atomic: not read any more, since the destination has said that it is placed */
    uint64_t *settled;              /* released before the present connections were made: no request for it crosses that */
    uint64_t *discarded, *pinned;   /* under release_lock; `pinned` is scratch */
    uint64_t late_first, late_end;  /* where released pages were pinned, or kept by the kernel; under release_lock */
};

struct run {
    uint32_t block;
    uint64_t first_page, pages;
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
    uint64_t pins[REQUESTS_PER_TURN]; /* atomic: what the batch on its way out points at, as PLACE_RUN */
    uint32_t pin_count;               /* atomic */
    uint64_t repetitions;
    bool has_told; /* why it ends */
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
    struct channel urgent[PC_MAX_SHARDS];
    struct channel bulk[PC_MAX_BULK_CHANNELS];

    pthread_mutex_t push_lock;
    pthread_cond_t push_changed; /* CLOCK_MONOTONIC */
    bool serving, stopping; /* atomic, changed under push_lock */
    uint64_t pivot;         /* atomic: where the push is to go on, as PLACE, or NO_PIVOT */
    uint32_t cursor_block;
    uint64_t cursor_page;
    uint64_t bandwidth, next_free_ns, bandwidth_changes;

    pthread_mutex_t release_lock;
    struct run pins_seen[PC_MAX_SHARDS * REQUESTS_PER_TURN + PC_MAX_BULK_CHANNELS];

    bool unreadable_told; /* atomic */
    struct pc_pageserver_stats count;
};

#define ADD(server, field, n) ((void)__atomic_fetch_add(&(server)->count.field, (uint64_t)(n), __ATOMIC_RELAXED))

/* A batch of frames on its way out: headers, and parts that point at them and at pages. */
struct batch {
    uint8_t headers[MAX_RUN_PAGES + REQUESTS_PER_TURN][PC_FRAME_HEADER_BYTES];
    struct iovec parts[2 * (MAX_RUN_PAGES + REQUESTS_PER_TURN)];
    int frame_count, part_count;
    uint64_t bytes;
    size_t staged;
};

static void batch_add(struct batch *batch, const struct pc_frame *frame, const void *payload)
{
    uint8_t *header = batch->headers[batch->frame_count++];

    pc_frame_encode(frame, header);
    batch->parts[batch->part_count++] = (struct iovec){.iov_base = header, .iov_len = PC_FRAME_HEADER_BYTES};
    if (frame->payload_bytes)
        batch->parts[batch->part_count++] =
            (struct iovec){.iov_base = (void *)(uintptr_t)payload, .iov_len = frame->payload_bytes};
    batch->bytes += PC_FRAME_HEADER_BYTES + (uint64_t)frame->payload_bytes;
}

/* By the channel's thread. Whoever looks at released pages after this sees those of a release that does not see the pin. */
static void pin(struct channel *channel, uint32_t block, uint64_t first_page, uint64_t pages)
{
    uint32_t count = __atomic_load_n(&channel->pin_count, __ATOMIC_RELAXED);

    __atomic_store_n(&channel->pins[count], PLACE_RUN(block, first_page, pages), __ATOMIC_SEQ_CST);
    __atomic_store_n(&channel->pin_count, count + 1, __ATOMIC_SEQ_CST);
}

static void unpin_all(struct channel *channel)
{
    __atomic_store_n(&channel->pin_count, 0, __ATOMIC_SEQ_CST);
}

static int batch_send(struct batch *batch, struct channel *channel)
{
    int error = pc_stream_write_all(&channel->stream, batch->parts, batch->part_count);

    unpin_all(channel); /* the kernel has copied what it took */
    if (!error)
        ADD(channel->server, bytes_sent, batch->bytes);
    batch->frame_count = batch->part_count = 0;
    batch->bytes = 0;
    batch->staged = 0;
    return error;
}

static bool test_bit(const uint64_t *words, uint64_t bit)
{
    return __atomic_load_n(&words[bit / 64], __ATOMIC_RELAXED) >> (bit % 64) & 1;
}

/* After a pin. */
static bool is_released(const struct source_block *block, uint64_t page)
{
    return __atomic_load_n(&block->released[page / 64], __ATOMIC_SEQ_CST) >> (page % 64) & 1;
}

/* pc_bitmap_next for a zero, in a bitmap that other threads change meanwhile. */
static uint64_t next_clear(const uint64_t *words, uint64_t bits, uint64_t from)
{
    for (uint64_t word = from / 64; from < bits; from = ++word * 64) {
        uint64_t clear = ~__atomic_load_n(&words[word], __ATOMIC_RELAXED) & ~UINT64_C(0) << (from % 64);

        if (clear) {
            uint64_t bit = word * 64 + (uint64_t)__builtin_ctzll(clear);

            return bit < bits ? bit : bits;
        }
    }
    return bits;
}

static bool test_and_set_bit(uint64_t *words, uint64_t bit)
{
    uint64_t mask = UINT64_C(1) << (bit % 64);

    return __atomic_fetch_or(&words[bit / 64], mask, __ATOMIC_SEQ_CST) & mask;
}

/* Blocks are only added, and each is whole before it counts. */
static uint32_t block_count(const struct pc_pageserver *server)
{
    return __atomic_load_n(&server->block_count, __ATOMIC_ACQUIRE);
}

/* Content of pages: where they lie, or read into the channel's staging buffer at batch->staged. NULL with -errno in
 * *error when they cannot be read; the text says why. */
static const uint8_t *page_content(struct channel *channel, struct batch *batch, const struct source_block *block,
                                   uint64_t page, uint64_t pages, int *error, char *text, size_t text_bytes)
{
    uint64_t offset = page * block->page_bytes, bytes = pages * block->page_bytes, file_bytes;
    uint8_t *staging;

    *error = 0;
    if (block->memory.base)
        return (const uint8_t *)block->memory.base + offset;
    if (batch->staged + bytes > channel->staging_bytes) {
        *error = pc_fail(ENOBUFS, text, text_bytes, "pages of %llu bytes are too large to stage", (unsigned long long)bytes);
        return NULL;
    }
    staging = channel->staging + batch->staged;
    batch->staged += bytes;
    /* The last page of a file may be a part of one: the rest of it is zeros. */
    file_bytes = offset < block->memory.size_bytes ? block->memory.size_bytes - offset : 0;
    if (file_bytes > bytes)
        file_bytes = bytes;
    memset(staging + file_bytes, 0, bytes - file_bytes);
    *error = pc_pread_all(block->memory.fd, staging, file_bytes, offset);
    if (*error == -ENODATA)
        *error = pc_fail(EIO, text, text_bytes, "the image file has become shorter than %llu bytes",
                         (unsigned long long)block->memory.size_bytes);
    else if (*error)
        (void)pc_fail(EIO, text, text_bytes, "the image file cannot be read: %s", strerror(-*error));
    return *error ? NULL : staging;
}

static void frame_payload(struct pc_frame *frame, const void *payload, uint64_t bytes)
{
    frame->payload_bytes = (uint32_t)bytes;
    frame->payload_crc = bytes ? pc_crc32c(0, payload, bytes) : 0;
}

/* ---- urgent ------------------------------------------------------------------------------------------------------- */

static void mark_sent(struct pc_pageserver *server, struct source_block *block, uint64_t page)
{
    if (!test_and_set_bit(block->sent, page)) {
        (void)__atomic_fetch_sub(&block->unsent, 1, __ATOMIC_RELAXED);
        ADD(server, sent_pages, 1);
    }
}

/* The page was given back, or is about to be. A request that was under way when the page came by push and was acknowledged
 * is nobody's fault: this connection ends, and the next one begins with both sides knowing. A page that was released before
 * this connection began cannot be asked for by a destination that keeps its word, and not be had by one that does not. */
static int refuse_released(struct channel *channel, struct batch *batch, struct pc_frame *frame, char *text,
                           size_t text_bytes)
{
    static const char reason[] = "it was acknowledged as placed, and its memory has been given back";

    if (!test_bit(channel->server->blocks[frame->block]->settled, frame->first_page))
        return pc_fail(ESTALE, text, text_bytes, "page %llu of RAM block %u was asked for and acknowledged at the same time",
                       (unsigned long long)frame->first_page, frame->block);
    frame->type = PC_FRAME_ERROR;
    frame_payload(frame, reason, sizeof(reason) - 1);
    batch_add(batch, frame, reason);
    return 0;
}

/* No other connection would serve the page. Told once between two disconnections: events wait in memory for who takes them,
 * and a peer may ask as often as it likes. */
static bool tell_unreadable(struct channel *channel, int code, const char *text)
{
    struct pc_pageserver *server = channel->server;

    if (__atomic_exchange_n(&server->unreadable_told, true, __ATOMIC_RELAXED))
        return false;
    pc_events_push(&server->events, PC_EVENT_FATAL, channel->kind, (int)channel->index, code, "%s", text);
    return true;
}

static int answer_page(struct channel *channel, struct batch *batch, const struct pc_frame *request, uint64_t page,
                       char *why, size_t why_bytes)
{
    struct pc_pageserver *server = channel->server;
    struct source_block *block = server->blocks[request->block];
    struct pc_frame frame = {.flags = PC_FRAME_DEMAND,
                             .block = request->block,
                             .first_page = page,
                             .pages = 1,
                             .request_id = request->request_id};
    char text[PC_ERROR_BYTES];
    const uint8_t *content = NULL;
    int error = 0;

    if (test_and_set_bit(block->demanded, page)) {
        ADD(server, repeated_requests, 1);
        /* First requests end with the machine's pages, repetitions never: no peer may have a real-time thread for as
         * long as it likes. */
        if (++channel->repetitions == REPETITIONS_MAX)
            pc_thread_prompt(true);
    }
    if (test_bit(block->present, page)) {
        if (!block->memory.base && batch->staged + block->page_bytes > channel->staging_bytes) {
            error = batch_send(batch, channel);
            if (error)
                return error;
        }
        if (block->memory.base) {
            pin(channel, request->block, page, 1);
            if (is_released(block, page))
                return refuse_released(channel, batch, &frame, why, why_bytes);
        }
        content = page_content(channel, batch, block, page, 1, &error, text, sizeof(text));
        if (error) {
            frame.type = PC_FRAME_ERROR;
            frame_payload(&frame, text, strlen(text));
            batch_add(batch, &frame, text);
            tell_unreadable(channel, -error, text);
            return batch_send(batch, channel); /* now: `text` lives on this stack */
        }
    }
    if (content && !pc_is_zero(content, block->page_bytes)) {
        frame.type = PC_FRAME_PAGES;
        frame_payload(&frame, content, block->page_bytes);
        ADD(server, demand_pages, 1);
    } else {
        frame.type = PC_FRAME_ZERO;
        content = NULL;
        ADD(server, zero_pages, 1);
    }
    batch_add(batch, &frame, content);
    mark_sent(server, block, page);
    return 0;
}

static int answer_request(struct channel *channel, struct batch *batch, const uint8_t *header, char *text,
                          size_t text_bytes)
{
    struct pc_pageserver *server = channel->server;
    struct pc_frame request;
    struct source_block *block;
    int error = pc_frame_decode(header, &request, text, text_bytes);

    if (error)
        return error;
    if (request.type != PC_FRAME_REQUEST)
        return pc_fail(EBADMSG, text, text_bytes, "a frame of type %u does not belong here", request.type);
    if (request.block >= block_count(server))
        return pc_fail(EBADMSG, text, text_bytes, "a request names RAM block %u, which there is not", request.block);
    block = server->blocks[request.block];
    if (request.first_page >= block->pages || request.pages > block->pages - request.first_page)
        return pc_fail(EBADMSG, text, text_bytes, "a request names pages %llu+%u of RAM block %u, which has %llu",
                       (unsigned long long)request.first_page, request.pages, request.block,
                       (unsigned long long)block->pages);
    ADD(server, requests, 1);
    for (uint64_t page = request.first_page; !error && page < request.first_page + request.pages; page++) {
        error = answer_page(channel, batch, &request, page, text, text_bytes);
        if (!error && batch->frame_count >= REQUESTS_PER_TURN)
            error = batch_send(batch, channel);
    }
    __atomic_store_n(&server->pivot, PLACE(request.block, request.first_page + request.pages), __ATOMIC_RELAXED);
    return error;
}

static bool is_serving(const struct pc_pageserver *server)
{
    return __atomic_load_n(&server->serving, __ATOMIC_ACQUIRE);
}

static bool is_stopping(const struct pc_pageserver *server)
{
    return __atomic_load_n(&server->stopping, __ATOMIC_ACQUIRE);
}

/* Waits until the server is started: true, or false when it is being stopped. Without a lock once it is. */
static bool wait_serving(struct pc_pageserver *server)
{
    if (!is_serving(server) && !is_stopping(server)) {
        pthread_mutex_lock(&server->push_lock);
        while (!is_serving(server) && !is_stopping(server))
            pthread_cond_wait(&server->push_changed, &server->push_lock);
        pthread_mutex_unlock(&server->push_lock);
    }
    return !is_stopping(server);
}

/* read(2) that looks for busy_poll_ns before it sleeps. */
static ssize_t read_busy(struct channel *channel, void *buffer, size_t bytes)
{
    uint64_t until_ns = channel->busy_poll_ns ? pc_now_ns() + channel->busy_poll_ns : 0;

    while (until_ns && pc_now_ns() < until_ns) {
        ssize_t got = channel->stream.read(&channel->stream, buffer, bytes, false);

        if (got != -EAGAIN)
            return got;
    }
    return channel->stream.read(&channel->stream, buffer, bytes, true);
}

static int serve_urgent(struct channel *channel, char *text, size_t text_bytes)
{
    struct batch *batch = channel->batch;
    uint8_t requests[REQUEST_BYTES];
    size_t have = 0, at;
    int error = 0;

    for (;;) {
        ssize_t got = read_busy(channel, requests + have, sizeof(requests) - have);

        if (got == 0 && have)
            return pc_fail(EPIPE, text, text_bytes, PC_STREAM_CUT_TEXT);
        if (got <= 0)
            return got < 0 ? (int)got : -ENODATA;
        ADD(channel->server, bytes_received, got);
        have += (size_t)got;
        if (have >= PC_FRAME_HEADER_BYTES && !wait_serving(channel->server))
            return -ECANCELED;
        for (at = 0; !error && have - at >= PC_FRAME_HEADER_BYTES; at += PC_FRAME_HEADER_BYTES)
            error = answer_request(channel, batch, requests + at, text, text_bytes);
        if (!error && batch->frame_count)
            error = batch_send(batch, channel);
        if (error)
            return error;
        have -= at;
        memmove(requests, requests + at, have);
    }
}

/* ---- bulk --------------------------------------------------------------------------------------------------------- */

/* The next run of pages that nobody has sent, marked as sent. False when there is none. Under push_lock. */
static bool claim_run(struct pc_pageserver *server, struct run *run)
{
    uint64_t pivot = __atomic_exchange_n(&server->pivot, NO_PIVOT, __ATOMIC_RELAXED);

    if (pivot != NO_PIVOT) {
        server->cursor_block = PLACE_BLOCK(pivot);
        server->cursor_page = PLACE_PAGE(pivot);
    }
    /* From the cursor to the end of its block, the blocks behind it, and round to what lies before the cursor. */
    for (uint32_t turn = 0; turn <= block_count(server); turn++) {
        struct source_block *block;
        uint64_t page;

        if (server->cursor_block >= block_count(server))
            server->cursor_block = 0;
        block = server->blocks[server->cursor_block];
        while (__atomic_load_n(&block->unsent, __ATOMIC_RELAXED) &&
               (page = next_clear(block->sent, block->pages, server->cursor_page)) < block->pages) {
            uint64_t limit = RUN_BYTES / block->page_bytes ? RUN_BYTES / block->page_bytes : 1;

            run->block = server->cursor_block;
            run->first_page = page;
            run->pages = 0;
            /* An urgent thread may take a page in between: the run ends there. */
            while (run->pages < limit && page < block->pages && !test_and_set_bit(block->sent, page)) {
                run->pages++;
                page++;
            }
            server->cursor_page = page;
            if (run->pages) {
                (void)__atomic_fetch_sub(&block->unsent, run->pages, __ATOMIC_RELAXED);
                ADD(server, sent_pages, run->pages);
                return true;
            }
        }
        server->cursor_block++;
        server->cursor_page = 0;
    }
    return false;
}

/* Waits until `bytes` may be sent. Under push_lock. */
static void pace(struct pc_pageserver *server, uint64_t bytes)
{
    uint64_t now_ns = pc_now_ns(), changes = server->bandwidth_changes, start_ns;

    if (!server->bandwidth)
        return;
    if (server->next_free_ns + BURST_NS < now_ns)
        server->next_free_ns = now_ns - BURST_NS;
    start_ns = server->next_free_ns;
    server->next_free_ns += (uint64_t)((double)bytes * 1e9 / (double)server->bandwidth);
    while (!is_stopping(server) && changes == server->bandwidth_changes && pc_now_ns() < start_ns) {
        struct timespec until = {.tv_sec = (time_t)(start_ns / 1000000000u), .tv_nsec = (long)(start_ns % 1000000000u)};

        (void)pthread_cond_timedwait(&server->push_changed, &server->push_lock, &until);
    }
}

/* Sends a run as frames of content and of nothing, alternating as the pages do. */
static int push_run(struct channel *channel, struct batch *batch, const struct run *run, char *text, size_t text_bytes)
{
    struct pc_pageserver *server = channel->server;
    const struct source_block *block = server->blocks[run->block];
    const uint8_t *content;
    uint64_t at = 0;
    int error;

    if (block->memory.base)
        pin(channel, run->block, run->first_page, run->pages);
    content = page_content(channel, batch, block, run->first_page, run->pages, &error, text, text_bytes);
    if (!content) {
        channel->has_told = tell_unreadable(channel, -error, text);
        return error;
    }
    while (at < run->pages) {
        const uint8_t *begin = content + at * block->page_bytes;
        struct pc_frame frame = {.block = (uint16_t)run->block, .first_page = run->first_page + at};
        uint64_t pages = 1;
        bool zero;

        if (is_released(block, run->first_page + at)) {
            at++; /* it was asked for while this run waited for its bandwidth, and is there */
            continue;
        }
        zero = pc_is_zero(begin, block->page_bytes);
        while (at + pages < run->pages && !is_released(block, run->first_page + at + pages) &&
               pc_is_zero(begin + pages * block->page_bytes, block->page_bytes) == zero)
            pages++;
        frame.type = zero ? PC_FRAME_ZERO : PC_FRAME_PAGES;
        frame.pages = (uint32_t)pages;
        if (!zero)
            frame_payload(&frame, begin, pages * block->page_bytes);
        batch_add(batch, &frame, zero ? NULL : begin);
        if (zero)
            ADD(server, zero_pages, pages);
        else
            ADD(server, background_pages, pages);
        at += pages;
    }
    return batch_send(batch, channel);
}

static int push(struct channel *channel, char *text, size_t text_bytes)
{
    struct batch *batch = channel->batch;
    struct pc_pageserver *server = channel->server;
    struct pc_frame end = {.type = PC_FRAME_END};
    uint8_t unexpected;
    int error = 0;

    if (!wait_serving(server))
        return -ECANCELED;
    for (;;) {
        struct run run;
        bool found;

        pthread_mutex_lock(&server->push_lock);
        found = !is_stopping(server) && claim_run(server, &run);
        if (found)
            pace(server, run.pages * server->blocks[run.block]->page_bytes);
        pthread_mutex_unlock(&server->push_lock);
        if (is_stopping(server))
            return -ECANCELED;
        if (!found)
            break;
        error = push_run(channel, batch, &run, text, text_bytes);
        if (error)
            return error;
    }
    batch_add(batch, &end, NULL);
    error = batch_send(batch, channel);
    if (error)
        return error;
    pc_events_push(&server->events, PC_EVENT_BULK_END, PC_CHANNEL_BULK, (int)channel->index, 0,
                   "every page has been offered");
    /* The destination says nothing here: this is the wait for its end. */
    error = pc_stream_read_all(&channel->stream, &unexpected, 1);
    return error ? error : pc_fail(EBADMSG, text, text_bytes, "the destination spoke on a bulk channel");
}

static void *channel_thread(void *argument)
{
    struct channel *channel = argument;
    struct pc_pageserver *server = channel->server;
    bool urgent = channel->kind == PC_CHANNEL_URGENT;
    char text[PC_ERROR_BYTES] = "";
    int error;

    pc_thread_name(urgent ? "pc-serve" : "pc-bulk-out", channel->index);
    if (urgent)
        pc_thread_prompt(channel->busy_poll_ns != 0);
    else
        pc_thread_background();
    error = urgent ? serve_urgent(channel, text, sizeof(text)) : push(channel, text, sizeof(text));
    unpin_all(channel);
    pc_stream_shutdown(&channel->stream);
    /* Before the event: who hears it may attach the next connection at once, and must not be told that this one is busy. */
    __atomic_store_n(&channel->running, false, __ATOMIC_RELEASE);
    if (!channel->has_told)
        pc_events_push(&server->events, PC_EVENT_CHANNEL_DOWN, channel->kind, (int)channel->index,
                       error == -ENODATA || error == -ECANCELED ? 0 : -error, "%s",
                       error == -ENODATA     ? "the destination closed the connection"
                       : error == -ECANCELED ? "stopped"
                       : text[0]             ? text
                                             : strerror(-error));
    return NULL;
}

/* ---- the public face ---------------------------------------------------------------------------------------------- */

#define CHANNELS (PC_MAX_SHARDS + PC_MAX_BULK_CHANNELS)

static struct channel *channel_number(struct pc_pageserver *server, uint32_t number)
{
    return number < PC_MAX_SHARDS ? &server->urgent[number] : &server->bulk[number - PC_MAX_SHARDS];
}

static bool is_running(const struct channel *channel)
{
    return __atomic_load_n(&channel->running, __ATOMIC_ACQUIRE);
}

static void init_channel(struct pc_pageserver *server, struct channel *channel, int kind, uint32_t index)
{
    channel->server = server;
    channel->kind = kind;
    channel->index = index;
    channel->stream.fd = -1;
}

int pc_pageserver_new(uint64_t max_bandwidth_bytes_per_s, struct pc_pageserver **out)
{
    struct pc_pageserver *server = calloc(1, sizeof(*server));
    pthread_condattr_t clock;
    int error;

    if (!server)
        return -ENOMEM;
    error = pc_events_init(&server->events);
    if (error) {
        free(server);
        return error;
    }
    pthread_mutex_init(&server->lock, NULL);
    pthread_mutex_init(&server->push_lock, NULL);
    pthread_mutex_init(&server->release_lock, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&server->push_changed, &clock);
    pthread_cond_init(&server->connectable, NULL);
    pthread_condattr_destroy(&clock);
    server->bandwidth = max_bandwidth_bytes_per_s;
    server->pivot = NO_PIVOT;
    for (uint32_t i = 0; i < PC_MAX_SHARDS; i++)
        init_channel(server, &server->urgent[i], PC_CHANNEL_URGENT, i);
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++)
        init_channel(server, &server->bulk[i], PC_CHANNEL_BULK, i);
    *out = server;
    return 0;
}

static void free_block(struct source_block *block)
{
    size_t bytes = block->words * sizeof(uint64_t);

    pc_buffer_free(block->present, bytes);
    pc_buffer_free(block->sent, bytes);
    pc_buffer_free(block->demanded, bytes);
    pc_buffer_free(block->released, bytes);
    pc_buffer_free(block->settled, bytes);
    pc_buffer_free(block->discarded, bytes);
    pc_buffer_free(block->pinned, bytes);
    free(block);
}

int pc_pageserver_add_block(struct pc_pageserver *server, const struct pc_memory *memory, uint64_t page_bytes)
{
    struct source_block *block;
    int index = -ENOSPC;

    if ((!memory->base && memory->fd < 0) || !memory->size_bytes || page_bytes < 1024 ||
        page_bytes > PC_FRAME_MAX_PAYLOAD_BYTES || page_bytes & (page_bytes - 1) ||
        (memory->base && memory->size_bytes % page_bytes) || memory->size_bytes / page_bytes >= PLACE_PAGES_MAX)
        return -EINVAL;
    block = calloc(1, sizeof(*block));
    if (!block)
        return -ENOMEM;
    block->memory = *memory;
    block->page_bytes = page_bytes;
    block->pages = (memory->size_bytes + page_bytes - 1) / page_bytes;
    block->words = pc_bitmap_words(block->pages);
    block->present = pc_buffer_new(block->words * sizeof(uint64_t));
    block->sent = pc_buffer_new(block->words * sizeof(uint64_t));
    block->demanded = pc_buffer_new(block->words * sizeof(uint64_t));
    block->released = pc_buffer_new(block->words * sizeof(uint64_t)); /* these cost nothing until they are written to */
    block->settled = pc_buffer_new(block->words * sizeof(uint64_t));
    block->discarded = pc_buffer_new(block->words * sizeof(uint64_t));
    block->pinned = pc_buffer_new(block->words * sizeof(uint64_t));
    if (!block->present || !block->sent || !block->demanded || !block->released || !block->settled || !block->discarded ||
        !block->pinned) {
        free_block(block);
        return -ENOMEM;
    }
    /* Until set_present says otherwise every page may have content. */
    pc_bitmap_set_range(block->present, 0, block->pages);
    block->unsent = block->pages;
    pthread_mutex_lock(&server->lock);
    pthread_mutex_lock(&server->push_lock);
    if (is_serving(server)) {
        index = -EBUSY;
    } else if (block_count(server) < PC_MAX_BLOCKS) {
        index = (int)block_count(server);
        server->blocks[index] = block;
        __atomic_store_n(&server->block_count, (uint32_t)index + 1, __ATOMIC_RELEASE);
        ADD(server, total_pages, block->pages);
    }
    pthread_mutex_unlock(&server->push_lock);
    pthread_mutex_unlock(&server->lock);
    if (index < 0)
        free_block(block);
    return index;
}

int pc_pageserver_set_present(struct pc_pageserver *server, uint32_t index, const uint64_t *present_words)
{
    struct source_block *block;
    uint64_t absent = 0;
    int error = 0;

    pthread_mutex_lock(&server->push_lock);
    if (index >= block_count(server)) {
        error = -EINVAL;
    } else if (is_serving(server)) {
        error = -EBUSY;
    } else {
        block = server->blocks[index];
        ADD(server, zero_pages, -pc_bitmap_count(block->sent, block->pages));
        for (uint64_t word = 0; word < block->words; word++) {
            uint64_t valid = word + 1 < block->words || block->pages % 64 == 0 ? ~UINT64_C(0)
                                                                               : (UINT64_C(1) << (block->pages % 64)) - 1;

            block->present[word] = present_words[word] & valid;
            block->sent[word] = ~present_words[word] & valid; /* the page map has told these already */
        }
        absent = pc_bitmap_count(block->sent, block->pages);
        block->unsent = block->pages - absent;
        ADD(server, zero_pages, absent);
    }
    pthread_mutex_unlock(&server->push_lock);
    return error;
}

int pc_pageserver_set_received(struct pc_pageserver *server, uint32_t index, const uint64_t *received_words)
{
    int error = 0;

    pthread_mutex_lock(&server->lock);
    for (uint32_t i = 0; i < CHANNELS; i++)
        if (is_running(channel_number(server, i)))
            error = -EBUSY;
    pthread_mutex_lock(&server->push_lock);
    if (!error && index >= block_count(server))
        error = -EINVAL;
    for (uint64_t word = 0; !error && word < server->blocks[index]->words; word++)
        if (__atomic_load_n(&server->blocks[index]->released[word], __ATOMIC_SEQ_CST) & ~received_words[word])
            error = -ENODATA;
    if (!error) {
        struct source_block *block = server->blocks[index];

        for (uint64_t word = 0; word < block->words; word++) {
            uint64_t valid = word + 1 < block->words || block->pages % 64 == 0 ? ~UINT64_C(0)
                                                                               : (UINT64_C(1) << (block->pages % 64)) - 1;

            /* What is absent is known to the destination from the page map, received or not. */
            block->sent[word] = (received_words[word] | ~block->present[word]) & valid;
            /* An answer that was lost on its way was none: asking again is no repetition. */
            block->demanded[word] &= received_words[word];
            block->settled[word] = __atomic_load_n(&block->released[word], __ATOMIC_SEQ_CST);
        }
        block->unsent = block->pages - pc_bitmap_count(block->sent, block->pages);
    }
    pthread_mutex_unlock(&server->push_lock);
    pthread_mutex_unlock(&server->lock);
    return error;
}

/* ---- giving memory back ------------------------------------------------------------------------------------------- */

static uint64_t bits_of_word(uint64_t word, uint64_t first, uint64_t end)
{
    uint64_t from = first > word * 64 ? first - word * 64 : 0, to = end - word * 64;

    return ~UINT64_C(0) << from & (to < 64 ? (UINT64_C(1) << to) - 1 : ~UINT64_C(0));
}

/* First page from `from` on, below `to`, that can (`ready`) or cannot be discarded now; `to` when there is none. */
static uint64_t next_ready(const struct source_block *block, uint64_t from, uint64_t to, bool ready)
{
    for (uint64_t word = from / 64; from < to; from = ++word * 64) {
        uint64_t found = __atomic_load_n(&block->released[word], __ATOMIC_SEQ_CST) & ~block->discarded[word] &
                         ~block->pinned[word];

        found = (ready ? found : ~found) & bits_of_word(word, from, to);
        if (found)
            return word * 64 + (uint64_t)__builtin_ctzll(found);
    }
    return to;
}

/* Sets `pinned` for what the channels send of a block; how many entries of pins_seen say where. */
static size_t look_at_pins(struct pc_pageserver *server, uint32_t index)
{
    size_t seen = 0;

    for (uint32_t i = 0; i < CHANNELS; i++) {
        const struct channel *channel = channel_number(server, i);
        uint32_t count = __atomic_load_n(&channel->pin_count, __ATOMIC_SEQ_CST);

        /* One that is replaced meanwhile belongs to a batch that has looked at `released` since: nothing is missed. */
        for (uint32_t j = 0; j < count && seen < PC_ARRAY_LENGTH(server->pins_seen); j++) {
            uint64_t place = __atomic_load_n(&channel->pins[j], __ATOMIC_SEQ_CST);

            if (PLACE_BLOCK(place) == index)
                server->pins_seen[seen++] = (struct run){
                    .block = index, .first_page = PLACE_PAGE(place), .pages = PLACE_RUN_PAGES(place)};
        }
    }
    for (size_t i = 0; i < seen; i++)
        pc_bitmap_set_range(server->blocks[index]->pinned, server->pins_seen[i].first_page, server->pins_seen[i].pages);
    return seen;
}

/* Discards what is released in [from, to) and no longer pinned: whole pages of the memory, which may be larger than those of
 * transfer. Under release_lock. */
static int give_back(struct pc_pageserver *server, uint32_t index, uint64_t from, uint64_t to)
{
    struct source_block *block = server->blocks[index];
    uint64_t group = block->memory.page_bytes > block->page_bytes ? block->memory.page_bytes / block->page_bytes : 1;
    size_t seen = look_at_pins(server, index);
    int error = 0;

    if (block->late_first < block->late_end) {
        from = block->late_first < from ? block->late_first : from;
        to = block->late_end > to ? block->late_end : to;
    }
    block->late_first = block->pages;
    block->late_end = 0;
    for (size_t i = 0; i < seen; i++) {
        uint64_t first = server->pins_seen[i].first_page, end = first + server->pins_seen[i].pages;

        block->late_first = first < block->late_first ? first : block->late_first;
        block->late_end = end > block->late_end ? end : block->late_end;
    }
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
            block->late_first = page < block->late_first ? page : block->late_first;
            block->late_end = end > block->late_end ? end : block->late_end;
            continue;
        }
        for (uint64_t word = first / 64; word * 64 < end / group * group; word++) {
            uint64_t bits = bits_of_word(word, first, end / group * group);

            block->discarded[word] |= bits;
            ADD(server, released_bytes, (uint64_t)__builtin_popcountll(bits & block->present[word]) * block->page_bytes);
        }
    }
    for (size_t i = 0; i < seen; i++)
        pc_bitmap_clear_range(block->pinned, server->pins_seen[i].first_page, server->pins_seen[i].pages);
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
        return -ENOTSUP; /* somebody's file */
    pthread_mutex_lock(&server->release_lock);
    for (uint64_t at = 0, end; (at = pc_bitmap_next(words, pages, at, 1)) < pages; at = end) {
        uint64_t from = first_page + at, to;

        end = pc_bitmap_next(words, pages, at, 0);
        to = first_page + end;
        for (uint64_t word = from / 64; word * 64 < to; word++)
            (void)__atomic_fetch_or(&block->released[word], bits_of_word(word, from, to), __ATOMIC_SEQ_CST);
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
    for (uint64_t word = 0; word < block->words; word++) {
        if (released_words)
            released_words[word] = __atomic_load_n(&block->released[word], __ATOMIC_SEQ_CST);
        if (discarded_words)
            discarded_words[word] = block->discarded[word];
    }
    pthread_mutex_unlock(&server->release_lock);
    return 0;
}

/* Joins a thread that has ended or been shut down, and frees what its channel had. By whoever has the lock, or `disconnecting`. */
static void reap(struct channel *channel)
{
    if (channel->started)
        pthread_join(channel->thread, NULL);
    channel->started = false;
    pc_stream_close(&channel->stream);
    pc_buffer_free(channel->staging, channel->staging_bytes);
    channel->staging = NULL;
    channel->staging_bytes = 0;
    free(channel->batch);
    channel->batch = NULL;
}

/* All that the channel will need, before it is one. */
static int start(struct channel *channel)
{
    int error;

    channel->staging_bytes = PC_FRAME_MAX_PAYLOAD_BYTES;
    channel->staging = pc_buffer_new(channel->staging_bytes);
    channel->batch = calloc(1, sizeof(*channel->batch));
    if (!channel->staging || !channel->batch)
        return -ENOMEM;
    channel->repetitions = 0;
    channel->has_told = false;
    __atomic_store_n(&channel->running, true, __ATOMIC_RELAXED);
    error = pc_thread_start(&channel->thread, channel_thread, channel);
    channel->started = !error;
    if (error)
        __atomic_store_n(&channel->running, false, __ATOMIC_RELAXED);
    return error;
}

static int attach(struct channel *channel, int fd, uint64_t busy_poll_ns)
{
    struct pc_pageserver *server = channel->server;
    struct pc_stream stream;
    int error = pc_stream_tcp(&stream, fd, channel->kind == PC_CHANNEL_URGENT);

    if (error) {
        close(fd);
        return error;
    }
    pthread_mutex_lock(&server->lock);
    if (server->disconnecting || is_running(channel)) {
        error = -EBUSY;
    } else {
        reap(channel);
        channel->stream = stream;
        channel->busy_poll_ns = busy_poll_ns;
        error = start(channel);
        if (error) {
            channel->stream.fd = -1;
            reap(channel);
        }
    }
    pthread_mutex_unlock(&server->lock);
    if (error)
        close(fd);
    return error;
}

int pc_pageserver_attach_urgent(struct pc_pageserver *server, uint32_t shard, int fd, uint32_t busy_poll_us)
{
    if (shard >= PC_MAX_SHARDS) {
        close(fd);
        return -EINVAL;
    }
    return attach(&server->urgent[shard], fd, (uint64_t)busy_poll_us * 1000);
}

int pc_pageserver_attach_bulk(struct pc_pageserver *server, uint32_t channel, int fd)
{
    if (channel >= PC_MAX_BULK_CHANNELS) {
        close(fd);
        return -EINVAL;
    }
    return attach(&server->bulk[channel], fd, 0);
}

int pc_pageserver_start(struct pc_pageserver *server)
{
    pthread_mutex_lock(&server->push_lock);
    __atomic_store_n(&server->serving, true, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&server->push_changed);
    pthread_mutex_unlock(&server->push_lock);
    return 0;
}

int pc_pageserver_set_bandwidth(struct pc_pageserver *server, uint64_t max_bandwidth_bytes_per_s)
{
    pthread_mutex_lock(&server->push_lock);
    server->bandwidth = max_bandwidth_bytes_per_s;
    server->next_free_ns = 0;
    server->bandwidth_changes++; /* who waits for the old rate waits no longer */
    pthread_cond_broadcast(&server->push_changed);
    pthread_mutex_unlock(&server->push_lock);
    return 0;
}

int pc_pageserver_event_fd(struct pc_pageserver *server)
{
    return server->events.fd;
}

int pc_pageserver_next_event(struct pc_pageserver *server, struct pc_event *event)
{
    return pc_events_next(&server->events, event);
}

int pc_pageserver_stats(struct pc_pageserver *server, struct pc_pageserver_stats *stats)
{
#define TAKE(field) stats->field = __atomic_load_n(&server->count.field, __ATOMIC_RELAXED)
    TAKE(total_pages);
    TAKE(sent_pages);
    TAKE(demand_pages);
    TAKE(background_pages);
    TAKE(zero_pages);
    TAKE(requests);
    TAKE(repeated_requests);
    TAKE(bytes_sent);
    TAKE(bytes_received);
    TAKE(released_bytes);
#undef TAKE
    return 0;
}

static void set_stopping(struct pc_pageserver *server, bool stopping)
{
    pthread_mutex_lock(&server->push_lock);
    __atomic_store_n(&server->stopping, stopping, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&server->push_changed);
    pthread_mutex_unlock(&server->push_lock);
}

int pc_pageserver_disconnect(struct pc_pageserver *server)
{
    pthread_mutex_lock(&server->lock);
    while (server->disconnecting)
        pthread_cond_wait(&server->connectable, &server->lock);
    server->disconnecting = true; /* so that nobody waits for the lock while threads are joined */
    pthread_mutex_unlock(&server->lock);
    set_stopping(server, true);
    for (uint32_t i = 0; i < CHANNELS; i++)
        pc_stream_shutdown(&channel_number(server, i)->stream);
    for (uint32_t i = 0; i < CHANNELS; i++)
        reap(channel_number(server, i));
    set_stopping(server, false);
    __atomic_store_n(&server->unreadable_told, false, __ATOMIC_RELAXED);
    pthread_mutex_lock(&server->lock);
    server->disconnecting = false;
    pthread_cond_broadcast(&server->connectable);
    pthread_mutex_unlock(&server->lock);
    return 0;
}

void pc_pageserver_free(struct pc_pageserver *server)
{
    (void)pc_pageserver_disconnect(server);
    for (uint32_t i = 0; i < block_count(server); i++)
        free_block(server->blocks[i]);
    pc_events_destroy(&server->events);
    pthread_cond_destroy(&server->push_changed);
    pthread_cond_destroy(&server->connectable);
    pthread_mutex_destroy(&server->push_lock);
    pthread_mutex_destroy(&server->release_lock);
    pthread_mutex_destroy(&server->lock);
    free(server);
}

pthread_mutex_t *pc_pageserver_push_lock(struct pc_pageserver *server)
{
    return &server->push_lock;
}
