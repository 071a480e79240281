/* SPDX-License-Identifier: Apache-2.0
 *
 * Urgent channels: requests answered in the order they come. No lock is taken here once the server serves.
 */
#include <errno.h>

#include "pageserver/server.h"

#define REQUEST_BYTES (REQUESTS_PER_TURN * PC_FRAME_HEADER_BYTES)
#define REPETITIONS_MAX 4096 /* answered to one connection at real-time priority */
#define OUT_OF_THE_WAY_BYTES (4 * 1024 * 1024)

/* Where the push goes on after a request: behind the page that a thread waits for, which touches that next. What follows a page that was
 * requested ahead is most likely requested too: pushed beside that it would be sent twice, so the push keeps out of its way. */
static void move_push(struct pc_pageserver *server, const struct pc_frame *request)
{
    const struct source_block *block = server->blocks[request->block];
    uint64_t page = request->first_page + request->pages;

    if (request->request_id & PC_PAGER_REQUEST_AHEAD)
        page += OUT_OF_THE_WAY_BYTES / block->page_bytes;
    __atomic_store_n(&server->push_from, PLACE(request->block, page < block->pages ? page : block->pages), __ATOMIC_RELAXED);
}

static void mark_sent(struct pc_pageserver *server, struct source_block *block, uint64_t page)
{
    if (!set_sent(block, page)) {
        (void)__atomic_fetch_sub(&block->unsent, 1, __ATOMIC_RELAXED);
        ADD(server, sent_pages, 1);
    }
}

/* The page was given back, or is about to be. A request that was under way when the page came by push and was acknowledged
 * is no error of either side: this connection ends, and the next one begins with both sides knowing. A page that was released before
 * this connection began cannot be asked for by a destination that keeps its word, and not be had by one that does not. */
static int refuse_released(struct channel *channel, struct batch *batch, struct pc_frame *frame, char *text,
                           size_t text_bytes)
{
    static const char reason[] = "it was acknowledged as placed, and its memory has been given back";

    if (!pc_bits_test(channel->server->blocks[frame->block]->released_before, frame->first_page))
        return pc_fail(ESTALE, text, text_bytes, "page %llu of RAM block %u was asked for and acknowledged at the same "
                       "time", (unsigned long long)frame->first_page, frame->block);
    frame->type = PC_FRAME_ERROR;
    pc_batch_add(batch, *frame, reason, sizeof(reason) - 1);
    return 0;
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

    if (pc_atomic_test_and_set_bit(block->demanded, page)) {
        ADD(server, repeated_requests, 1);
        /* First requests end with the machine's pages, repetitions never: no peer may have a real-time thread for as
         * long as it likes. */
        if (++channel->repetitions == REPETITIONS_MAX)
            pc_thread_prompt(true);
    }
    if (pc_bits_test(block->present, page)) {
        if (!block->memory.base && batch->staged + block->page_bytes > channel->staging_bytes) {
            error = pc_batch_send(batch, channel);
            if (error)
                return error;
        }
        if (block->memory.base) {
            pin(channel, request->block, page, 1);
            if (is_released(block, page))
                return refuse_released(channel, batch, &frame, why, why_bytes);
        }
        content = pc_page_content(channel, batch, block, page, 1, &error, text, sizeof(text));
        if (error) {
            frame.type = PC_FRAME_ERROR;
            pc_batch_add(batch, frame, text, strlen(text));
            pc_pageserver_unreadable(channel, -error, text);
            return pc_batch_send(batch, channel); /* now: `text` lives on this stack */
        }
    }
    if (content && !pc_is_zero(content, block->page_bytes)) {
        frame.type = PC_FRAME_PAGES;
        pc_batch_add(batch, frame, content, block->page_bytes);
        ADD(server, demand_pages, 1);
    } else {
        frame.type = PC_FRAME_ZERO;
        pc_batch_add(batch, frame, NULL, 0);
        ADD(server, zero_pages, 1);
    }
    mark_sent(server, block, page);
    return 0;
}

/* *waited_for: whether the batch has a page that a thread waits for. It goes out before pages that were requested ahead are made ready. */
static int answer_request(struct channel *channel, struct batch *batch, const uint8_t *header, bool *waited_for, char *text,
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
    if (request.request_id & PC_PAGER_REQUEST_AHEAD && *waited_for && batch->frame_count)
        error = pc_batch_send(batch, channel);
    *waited_for = !(request.request_id & PC_PAGER_REQUEST_AHEAD);
    for (uint64_t page = request.first_page; !error && page < request.first_page + request.pages; page++) {
        error = answer_page(channel, batch, &request, page, text, text_bytes);
        if (!error && batch->frame_count >= REQUESTS_PER_TURN)
            error = pc_batch_send(batch, channel);
    }
    move_push(server, &request);
    return error;
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

int pc_channel_answer(struct channel *channel, char *text, size_t text_bytes)
{
    struct batch *batch = channel->batch;
    uint8_t requests[REQUEST_BYTES];
    bool waited_for = false;
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
        if (have >= PC_FRAME_HEADER_BYTES && !pc_pageserver_wait_serving(channel->server))
            return -ECANCELED;
        for (at = 0; !error && have - at >= PC_FRAME_HEADER_BYTES; at += PC_FRAME_HEADER_BYTES)
            error = answer_request(channel, batch, requests + at, &waited_for, text, text_bytes);
        if (!error && batch->frame_count)
            error = pc_batch_send(batch, channel);
        if (error)
            return error;
        have -= at;
        memmove(requests, requests + at, have);
    }
}
