/* SPDX-License-Identifier: Apache-2.0
 *
 * Bulk channels: pages that have not been sent yet, in runs, at no more than the bandwidth, push by push.
 */
#include <errno.h>
#include <poll.h>
#include <unistd.h>

#include "pageserver/server.h"

#define BURST_NS UINT64_C(20000000) /* bandwidth not used for this long is lost */

/* The first page from `from` on that has not been sent; as many as the block has when there is none. */
static uint64_t next_unsent(const struct source_block *block, uint64_t from)
{
    while (from < block->pages) {
        uint64_t word = from / 64, unsent = ~pc_bits_word(block->sent, word) & pc_bits_mask(word, from, block->pages - from);

        if (unsent)
            return pc_bits_lowest(word, unsent);
        from = pc_summary_next(&block->sent_words, word + 1) * 64;
    }
    return block->pages;
}

bool pc_claim_run(struct pc_pageserver *server, struct run *run)
{
    uint64_t push_from = __atomic_exchange_n(&server->push_from, NO_PLACE, __ATOMIC_RELAXED);

    if (push_from != NO_PLACE) {
        server->cursor_block = PLACE_BLOCK(push_from);
        server->cursor_page = PLACE_PAGE(push_from);
    }
    /* From the cursor to the end of its block, the blocks behind it, and round to what lies before the cursor. */
    for (uint32_t turn = 0; turn <= block_count(server); turn++) {
        struct source_block *block;
        uint64_t page;

        if (server->cursor_block >= block_count(server))
            server->cursor_block = 0;
        block = server->blocks[server->cursor_block];
        while (__atomic_load_n(&block->unsent, __ATOMIC_RELAXED) &&
               (page = next_unsent(block, server->cursor_page)) < block->pages) {
            uint64_t limit = RUN_BYTES / block->page_bytes ? RUN_BYTES / block->page_bytes : 1;

            run->block = server->cursor_block;
            run->first_page = page;
            run->pages = 0;
            /* An urgent thread may take a page in between: the run ends there. */
            while (run->pages < limit && page < block->pages && !set_sent(block, page)) {
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

/* Waits until `bytes` may be sent. A push that is stopped does not wait for its last runs; the next one waits longer for them. Under
 * push_lock. */
static void pace(struct pc_pageserver *server, uint64_t bytes)
{
    uint64_t now_ns = pc_now_ns(), changes = server->bandwidth_changes, start_ns;

    if (!server->bandwidth)
        return;
    if (server->next_free_ns + BURST_NS < now_ns)
        server->next_free_ns = now_ns - BURST_NS;
    start_ns = server->next_free_ns;
    server->next_free_ns += (uint64_t)((double)bytes * 1e9 / (double)server->bandwidth);
    while (!is_stopping(server) && !server->push_stopped && changes == server->bandwidth_changes && pc_now_ns() < start_ns) {
        struct timespec until = pc_timespec(start_ns);

        (void)pthread_cond_timedwait(&server->push_changed, &server->push_lock, &until);
    }
}

/* What compression has saved of a run that was paced when the bandwidth had changed so often: bandwidth is that of the wire. */
static void give_back(struct pc_pageserver *server, uint64_t bytes, uint64_t changes)
{
    if (!bytes)
        return;
    pthread_mutex_lock(&server->push_lock);
    if (server->bandwidth && changes == server->bandwidth_changes) {
        uint64_t ns = (uint64_t)((double)bytes * 1e9 / (double)server->bandwidth);

        server->next_free_ns -= ns < server->next_free_ns ? ns : server->next_free_ns;
    }
    pthread_mutex_unlock(&server->push_lock);
}

/* A copy of memory that may be written meanwhile. By words that are loaded once each: checksum and content are those of the copy. */
static const uint8_t *copy_live(struct channel *channel, const uint8_t *memory, uint64_t bytes)
{
    const uint64_t *from = (const uint64_t *)(const void *)memory;
    uint64_t *to = (uint64_t *)(void *)channel->staging;

    for (uint64_t i = 0; i < bytes / sizeof(*to); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    return channel->staging;
}

/* Sends a run as frames of content and of nothing, alternating as the pages do. */
static int push_run(struct channel *channel, struct batch *batch, const struct run *run, char *text, size_t text_bytes)
{
    struct pc_pageserver *server = channel->server;
    const struct source_block *block = server->blocks[run->block];
    bool live = !is_serving(server);
    const uint8_t *content;
    uint64_t at = 0;
    int error;

    if (block->memory.base && !live)
        pin(channel, run->block, run->first_page, run->pages);
    content = pc_page_content(channel, batch, block, run->first_page, run->pages, &error, text, text_bytes);
    if (!content) {
        channel->has_reported = pc_pageserver_unreadable(channel, -error, text);
        return error;
    }
    if (block->memory.base && live)
        content = copy_live(channel, content, run->pages * block->page_bytes);
    pc_run_begin(channel);
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
        if (zero) {
            pc_batch_add(batch, frame, NULL, 0);
            ADD(server, zero_pages, pages);
        } else {
            pc_run_add(channel, batch, frame, begin, pages * block->page_bytes);
            ADD(server, background_pages, pages);
        }
        at += pages;
    }
    error = pc_batch_send(batch, channel);
    if (!error)
        pc_run_sent(channel);
    return error;
}

/* Sends what has not been sent, by turns with the other channels, and that this was all. */
static int push(struct channel *channel, char *text, size_t text_bytes)
{
    struct pc_pageserver *server = channel->server;
    const struct choice *choice = &channel->choice;
    struct pc_background background = {0};
    int error = 0;

    /* What was before this push was no time of sending, and what was queued then has left meanwhile. */
    channel->choice.sent_ns = pc_now_ns();
    channel->choice.queued_bytes = pc_stream_unsent(&channel->stream);
    while (!error) {
        struct run run;
        uint64_t changes;
        bool found;

        pthread_mutex_lock(&server->push_lock);
        found = !is_stopping(server) && !server->push_stopped && pc_claim_run(server, &run);
        if (found)
            pace(server, run.pages * server->blocks[run.block]->page_bytes);
        changes = server->bandwidth_changes;
        pthread_mutex_unlock(&server->push_lock);
        if (is_stopping(server))
            return -ECANCELED;
        if (!found)
            break;
        error = push_run(channel, channel->batch, &run, text, text_bytes);
        if (!error)
            give_back(server, choice->run_content_bytes - choice->run_wire_bytes, changes);
        pc_background_pause(&background, __atomic_load_n(&server->count.requests, __ATOMIC_RELAXED));
    }
    if (error)
        return error;
    pc_batch_add(channel->batch, (struct pc_frame){.type = PC_FRAME_END}, NULL, 0);
    return pc_batch_send(channel->batch, channel);
}

/* Waits until there is a push that this channel has not ended: its number in *number. Else why the connection ends; the destination
 * says nothing here but that. */
static int wait_push(struct channel *channel, uint64_t *number, char *text, size_t text_bytes)
{
    struct pc_pageserver *server = channel->server;
    struct pollfd ready[] = {{.fd = channel->stream.fd, .events = POLLIN}, {.fd = channel->wake_fd, .events = POLLIN}};

    for (;;) {
        uint64_t wakes;
        uint8_t unexpected;
        ssize_t got;

        if (is_stopping(server))
            return -ECANCELED;
        *number = __atomic_load_n(&server->pushes, __ATOMIC_ACQUIRE);
        if (*number != channel->pushed)
            return 0;
        /* Before the wait, and without one: what made the socket readable may be TLS's own. */
        got = channel->stream.read(&channel->stream, &unexpected, 1, false);
        if (got != -EAGAIN)
            return got > 0 ? pc_fail(EBADMSG, text, text_bytes, "the destination spoke on a bulk channel") : got < 0 ? (int)got : -ENODATA;
        if (poll(ready, 2, -1) < 0 && errno != EINTR)
            return -errno;
        if (ready[1].revents)
            (void)!read(channel->wake_fd, &wakes, sizeof(wakes));
    }
}

int pc_channel_push(struct channel *channel, char *text, size_t text_bytes)
{
    for (;;) {
        uint64_t number;
        int error = wait_push(channel, &number, text, text_bytes);

        if (!error)
            error = push(channel, text, text_bytes);
        if (error)
            return error;
        __atomic_store_n(&channel->pushed, number, __ATOMIC_RELEASE); /* before the event: its reader may push again */
        pc_events_push(&channel->server->events, PC_EVENT_BULK_END, PC_CHANNEL_BULK, (int)channel->index, 0,
                       "every page has been offered");
    }
}
