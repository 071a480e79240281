/* SPDX-License-Identifier: Apache-2.0
 *
 * The page server as its callers see it: blocks, channels and their threads. server.h has the essay.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "pageserver/server.h"

/* ---- channels' threads ---- */

bool pc_pageserver_wait_serving(struct pc_pageserver *server)
{
    if (!is_serving(server) && !is_stopping(server)) {
        pthread_mutex_lock(&server->push_lock);
        while (!is_serving(server) && !is_stopping(server))
            pthread_cond_wait(&server->push_changed, &server->push_lock);
        pthread_mutex_unlock(&server->push_lock);
    }
    return !is_stopping(server);
}

bool pc_pageserver_unreadable(struct channel *channel, int code, const char *text)
{
    struct pc_pageserver *server = channel->server;

    if (__atomic_exchange_n(&server->unreadable_reported, true, __ATOMIC_RELAXED))
        return false;
    pc_events_push(&server->events, PC_EVENT_FATAL, channel->kind, (int)channel->index, code, "%s", text);
    return true;
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
    error = urgent ? pc_channel_answer(channel, text, sizeof(text)) : pc_channel_push(channel, text, sizeof(text));
    unpin_all(channel);
    pc_stream_end(&channel->stream);
    /* Before the event: its reader may attach the next connection at once, which must not fail because this one is busy. */
    __atomic_store_n(&channel->running, false, __ATOMIC_RELEASE);
    if (!channel->has_reported)
        pc_events_push(&server->events, PC_EVENT_CHANNEL_DOWN, channel->kind, (int)channel->index,
                       error == -ENODATA || error == -ECANCELED ? 0 : -error, "%s",
                       error == -ENODATA     ? "the destination closed the connection"
                       : error == -ECANCELED ? "stopped"
                       : text[0]             ? text
                                             : pc_stream_why(&channel->stream, strerror(-error)));
    return NULL;
}

/* ---- blocks ---- */

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
    server->push_from = NO_PLACE;
    for (uint32_t i = 0; i < CHANNELS; i++) {
        struct channel *channel = channel_number(server, i);

        channel->server = server;
        channel->kind = i < PC_MAX_SHARDS ? PC_CHANNEL_URGENT : PC_CHANNEL_BULK;
        channel->index = i < PC_MAX_SHARDS ? i : i - PC_MAX_SHARDS;
        channel->stream.fd = -1;
        channel->wake_fd = -1;
    }
    *out = server;
    return 0;
}

static size_t maps_bytes(const struct source_block *block)
{
    return (BLOCK_MAPS * block->words + pc_summary_size(block->words)) * sizeof(uint64_t);
}

static void free_block(struct source_block *block)
{
    pc_buffer_free(block->present, maps_bytes(block));
    free(block);
}

int pc_pageserver_add_block(struct pc_pageserver *server, const struct pc_memory *memory, uint64_t page_bytes)
{
    struct source_block *block;
    int index = -ENOSPC;

    if ((!memory->base && !memory->remote && memory->fd < 0) || !memory->size_bytes || page_bytes < 1024 ||
        page_bytes > PC_FRAME_MAX_PAYLOAD_BYTES || page_bytes & (page_bytes - 1) ||
        ((memory->base || memory->remote) && memory->size_bytes % page_bytes) || memory->size_bytes / page_bytes >= PLACE_PAGES_MAX)
        return -EINVAL;
    block = calloc(1, sizeof(*block));
    if (!block)
        return -ENOMEM;
    block->memory = *memory;
    block->page_bytes = page_bytes;
    block->pages = (memory->size_bytes + page_bytes - 1) / page_bytes;
    block->words = pc_bitmap_words(block->pages);
    block->present = pc_buffer_new(maps_bytes(block)); /* costs nothing until it is written to */
    if (!block->present) {
        free_block(block);
        return -ENOMEM;
    }
    block->sent = block->present + block->words;
    block->demanded = block->sent + block->words;
    block->released = block->demanded + block->words;
    block->released_before = block->released + block->words;
    block->discarded = block->released_before + block->words;
    block->pinned = block->discarded + block->words;
    pc_summary_init(&block->sent_words, block->words, block->pinned + block->words);
    /* Until set_present says otherwise every page may have content. */
    pc_bitmap_set_range(block->present, 0, block->pages);
    block->unsent = block->pages;
    pthread_mutex_lock(&server->lock);
    pthread_mutex_lock(&server->push_lock);
    if (is_serving(server) || server->pushes) {
        index = -EBUSY;
    } else if (block_count(server) < PC_MAX_BLOCKS) {
        index = (int)block_count(server);
        server->blocks[index] = block;
        pc_view_add(&server->view, block->sent, block->pages, page_bytes);
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
    int error = 0;

    pthread_mutex_lock(&server->push_lock);
    if (index >= block_count(server)) {
        error = -EINVAL;
    } else if (is_serving(server) || server->pushes) {
        error = -EBUSY;
    } else {
        block = server->blocks[index];
        ADD(server, zero_pages, -pc_bitmap_count(block->sent, block->pages));
        for (uint64_t word = 0; word < block->words; word++) {
            uint64_t valid = pc_bits_mask(word, 0, block->pages);

            block->present[word] = present_words[word] & valid;
            __atomic_store_n(&block->sent[word], ~present_words[word] & valid, __ATOMIC_RELAXED); /* the destination knows these from the page map */
        }
        block->unsent = block->pages - pc_bitmap_count(block->sent, block->pages);
        pc_summary_make(&block->sent_words, block->sent, block->pages);
        ADD(server, zero_pages, block->pages - block->unsent);
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
        if (pc_bits_word(server->blocks[index]->released, word) & ~received_words[word])
            error = -ENODATA;
    if (!error) {
        struct source_block *block = server->blocks[index];

        for (uint64_t word = 0; word < block->words; word++) {
            uint64_t valid = pc_bits_mask(word, 0, block->pages);

            /* What is absent is known to the destination from the page map, received or not. */
            __atomic_store_n(&block->sent[word], (received_words[word] | ~block->present[word]) & valid, __ATOMIC_RELAXED);
            /* An answer that was lost on its way was none: asking again is no repetition. */
            block->demanded[word] &= received_words[word];
            block->released_before[word] = pc_bits_word(block->released, word);
        }
        block->unsent = block->pages - pc_bitmap_count(block->sent, block->pages);
        pc_summary_make(&block->sent_words, block->sent, block->pages);
    }
    pthread_mutex_unlock(&server->push_lock);
    pthread_mutex_unlock(&server->lock);
    return error;
}

/* ---- pushing ---- */

/* Under push_lock. A channel that is lost has ended its push. */
static bool is_pushing(const struct pc_pageserver *server)
{
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++)
        if (is_running(&server->bulk[i]) && __atomic_load_n(&server->bulk[i].pushed, __ATOMIC_ACQUIRE) != server->pushes)
            return true;
    return false;
}

int pc_pageserver_set_stale(struct pc_pageserver *server, uint32_t index, const uint64_t *stale_words)
{
    int error = 0;

    pthread_mutex_lock(&server->push_lock);
    if (index >= block_count(server)) {
        error = -EINVAL;
    } else if (is_serving(server) || is_pushing(server)) {
        error = -EBUSY;
    } else {
        struct source_block *block = server->blocks[index];

        /* In the pause: of the own maps, which take a page fault each 4 KiB at their first use, nothing is looked at that need not be. */
        for (uint64_t word = 0; word < block->words; word++) {
            uint64_t again = stale_words[word] ? stale_words[word] & block->sent[word] : 0;

            if (!again)
                continue;
            pc_summary_clear(&block->sent_words, word);
            ADD(server, sent_pages, -pc_bits_popcount(again & block->present[word]));
            ADD(server, zero_pages, -pc_bits_popcount(again & ~block->present[word]));
            block->unsent += pc_bits_popcount(again);
            block->present[word] |= again;
            pc_atomic_clear(block->sent, word, again);
        }
    }
    pthread_mutex_unlock(&server->push_lock);
    return error;
}

/* Under push_lock. */
static void begin_push(struct pc_pageserver *server)
{
    const uint64_t one = 1;

    server->last_push = is_serving(server);
    server->push_stopped = false;
    __atomic_store_n(&server->pushes, server->pushes + 1, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++)
        if (server->bulk[i].wake_fd >= 0)
            (void)!write(server->bulk[i].wake_fd, &one, sizeof(one));
}

int pc_pageserver_push(struct pc_pageserver *server)
{
    int error = 0;

    pthread_mutex_lock(&server->push_lock);
    if (is_pushing(server))
        error = -EBUSY;
    else
        begin_push(server);
    pthread_mutex_unlock(&server->push_lock);
    return error;
}

int pc_pageserver_stop_push(struct pc_pageserver *server)
{
    pthread_mutex_lock(&server->push_lock);
    server->push_stopped = !is_serving(server);
    pthread_cond_broadcast(&server->push_changed);
    pthread_mutex_unlock(&server->push_lock);
    return 0;
}

/* Under push_lock. */
static int serve(struct pc_pageserver *server)
{
    if (is_serving(server))
        return 0;
    if (is_pushing(server))
        return -EBUSY;
    __atomic_store_n(&server->serving, true, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&server->push_changed);
    return 0;
}

int pc_pageserver_serve(struct pc_pageserver *server)
{
    int error;

    pthread_mutex_lock(&server->push_lock);
    error = serve(server);
    pthread_mutex_unlock(&server->push_lock);
    return error;
}

int pc_pageserver_start(struct pc_pageserver *server)
{
    int error;

    pthread_mutex_lock(&server->push_lock);
    error = serve(server);
    if (!error && !server->last_push)
        begin_push(server);
    pthread_mutex_unlock(&server->push_lock);
    return error;
}

/* ---- channels ---- */

/* Joins a thread that has ended or been shut down, and frees what its channel had. Its caller has the lock, or `disconnecting`. */
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
    pc_choice_free(&channel->choice);
}

/* In which push a new bulk channel takes part first. */
static int join_push(struct channel *channel)
{
    struct pc_pageserver *server = channel->server;
    int error = 0;

    pthread_mutex_lock(&server->push_lock);
    if (channel->wake_fd < 0)
        channel->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (channel->wake_fd < 0)
        error = -errno;
    __atomic_store_n(&channel->pushed, server->last_push ? 0 : server->pushes, __ATOMIC_RELEASE);
    __atomic_store_n(&channel->running, !error, __ATOMIC_RELEASE); /* under the lock: a push that begins now includes it */
    pthread_mutex_unlock(&server->push_lock);
    return error;
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
    channel->batch->authenticated = channel->stream.layer != NULL;
    error = channel->kind == PC_CHANNEL_BULK ? join_push(channel) : 0;
    if (error)
        return error;
    channel->repetitions = 0;
    channel->has_reported = false;
    __atomic_store_n(&channel->running, true, __ATOMIC_RELEASE);
    error = pc_thread_start(&channel->thread, channel_thread, channel);
    channel->started = !error;
    if (error)
        __atomic_store_n(&channel->running, false, __ATOMIC_RELAXED);
    return error;
}

static int attach(struct pc_pageserver *server, struct channel *channel, int fd, struct pc_tls *tls, uint32_t busy_poll_us)
{
    struct pc_stream stream;
    int error = pc_stream_open(&stream, fd, tls, channel && channel->kind == PC_CHANNEL_URGENT);

    if (error)
        return error;
    if (!channel) {
        pc_stream_close(&stream);
        return -EINVAL;
    }
    pthread_mutex_lock(&server->lock);
    if (server->disconnecting || is_running(channel)) {
        error = -EBUSY;
    } else {
        reap(channel);
        channel->stream = stream;
        channel->busy_poll_ns = (uint64_t)busy_poll_us * 1000;
        error = start(channel);
        if (error) {
            channel->stream.fd = -1;
            reap(channel);
        }
    }
    pthread_mutex_unlock(&server->lock);
    if (error)
        pc_stream_close(&stream);
    return error;
}

int pc_pageserver_attach_urgent(struct pc_pageserver *server, uint32_t shard, int fd, struct pc_tls *tls, uint32_t busy_poll_us)
{
    return attach(server, shard < PC_MAX_SHARDS ? &server->urgent[shard] : NULL, fd, tls, busy_poll_us);
}

int pc_pageserver_attach_bulk(struct pc_pageserver *server, uint32_t channel, int fd, struct pc_tls *tls)
{
    return attach(server, channel < PC_MAX_BULK_CHANNELS ? &server->bulk[channel] : NULL, fd, tls, 0);
}

int pc_pageserver_set_bandwidth(struct pc_pageserver *server, uint64_t max_bandwidth_bytes_per_s)
{
    pthread_mutex_lock(&server->push_lock);
    server->bandwidth = max_bandwidth_bytes_per_s;
    server->next_free_ns = 0;
    server->bandwidth_changes++; /* a thread that waits for the old rate waits no longer */
    pthread_cond_broadcast(&server->push_changed);
    pthread_mutex_unlock(&server->push_lock);
    return 0;
}

int pc_pageserver_set_compression(struct pc_pageserver *server, uint32_t how, int adaptive)
{
    if (how & ~(uint32_t)(PC_COMPRESSION_LZ4 | PC_COMPRESSION_ZSTD) || (!adaptive && how & (how - 1)))
        return -EINVAL;
    if (pc_compression_available(how, NULL, 0) != how)
        return -ENOENT;
    __atomic_store_n(&server->compression, how | (how && adaptive ? COMPRESSION_ADAPTIVE : 0), __ATOMIC_RELAXED);
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
    const uint64_t *count = (const uint64_t *)&server->count;

    _Static_assert(sizeof(*stats) % sizeof(*count) == 0, "counters and nothing else");
    for (size_t i = 0; i < sizeof(*stats) / sizeof(*count); i++)
        ((uint64_t *)stats)[i] = __atomic_load_n(&count[i], __ATOMIC_RELAXED);
    return 0;
}

int pc_pageserver_bins(struct pc_pageserver *server, uint8_t *bins, uint32_t count)
{
    return (int)pc_view_bins(&server->view, bins, count);
}

const struct pc_view *pc_pageserver_view(const struct pc_pageserver *server)
{
    return &server->view;
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
    server->disconnecting = true; /* so that no thread waits for the lock while threads are joined */
    pthread_mutex_unlock(&server->lock);
    set_stopping(server, true);
    for (uint32_t i = 0; i < CHANNELS; i++)
        pc_stream_shutdown(&channel_number(server, i)->stream);
    for (uint32_t i = 0; i < CHANNELS; i++)
        reap(channel_number(server, i));
    set_stopping(server, false);
    __atomic_store_n(&server->unreadable_reported, false, __ATOMIC_RELAXED);
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
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++)
        if (server->bulk[i].wake_fd >= 0)
            close(server->bulk[i].wake_fd);
    pc_events_destroy(&server->events);
    pthread_cond_destroy(&server->push_changed);
    pthread_cond_destroy(&server->connectable);
    pthread_mutex_destroy(&server->push_lock);
    pthread_mutex_destroy(&server->release_lock);
    pthread_mutex_destroy(&server->lock);
    free(server);
}
