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
 *   requested  a fault was seen, or the page is prefetched; the request has been sent, or will be when the shard can
 *   claimed    one thread places this page, or the page is zero: a second writer drops its copy. Content reaches a page
 *              once, so a late duplicate can never overwrite what the machine wrote. Taken back where the page could not
 *              be placed.
 *   received   the content is there, or is known to be zero. Cleared only before the machine runs (precopy): pc_pager_forget.
 *              `missing` counts the pages without it.
 *   zero       received, and zero: nothing was placed. A fault on it is answered here with UFFDIO_ZEROPAGE.
 *   lost       requested on a channel that was lost, and to be requested again ahead of any fault. The fault thread's own
 *   local      its content can be read here, and is never requested (local.c); of no meaning for a page that is claimed
 *
 * A fault sets `requested`, then looks at `received`; a placement sets `received`, then looks at `requested`. Both are
 * sequentially consistent, so at least one of the two sees the other, and no thread is forgotten. A thread that places a page
 * that was requested, and is not the fault thread itself, wakes the page once more after `received` is set: between the placement
 * and `received` the machine may have thrown the page away and touched it anew, a fault which the placement has not woken and for
 * which nothing is sent.
 *
 * Why UFFDIO_COPY, for memfd too
 * ------------------------------
 * Filling an alias mapping and then exposing the page with UFFDIO_CONTINUE saves no copy, since a frame is verified
 * before any of it is placed, and costs a page fault in the alias. COPY takes half the time (docs/performance.md) and is
 * atomic: content and page appear together. CONTINUE is for pages that are in the page cache already although no thread
 * here has mapped them: a hole which another process read through its own mapping fills with zeros. (Where the kernel has no
 * minor faults nothing would tell of such a hole: what is in the page cache is thrown away before such memory is armed.)
 *
 * After a page is received, a *missing* fault on it means that it was thrown away: zeros are right. ZEROPAGE is atomic
 * against a placement that is being made visible, so that the answer to any fault on a received page is: CONTINUE for a minor
 * fault, ZEROPAGE for a missing one, and WAKE when the kernel says EEXIST, since EEXIST wakes no thread.
 *
 * Memory that is taken away (REMOVE, UNMAP)
 * -----------------------------------------
 * A userfaultfd of another process may report what that process throws away. Such a page is received and zero from then on, whatever
 * arrives later. The kernel lets the process go on as soon as the event has been *read*, and refuses placements (EAGAIN) as long as
 * it has not; so a placement that was decided before the read must not happen after it. Hence the gate: a placement holds a lane of it
 * from looking at `received` to setting it, the fault thread holds all lanes from the read until what it read is in the maps. It is the
 * one lock between bulk and fault thread, only for shards with such events, and held for one run of pages at a time.
 * Memory that is a file is thrown away by a hole first, of which nothing tells: a page that is placed between that and the event is
 * removed when the event is read.
 * What is read goes straight into a journal that outlives the pager (removed.c): the process goes on once its event was read, also when
 * the pager dies at that instant.
 * EAGAIN is never retried on the spot: it may be that only reading ends it, or that it ends without any event; the fault thread
 * goes back to its loop, where it reads, and tries again then or after a moment.
 *
 * Who owns what
 * -------------
 * Nothing of lower priority may stand in the way of a fault. All that a shard keeps of its faults and its channel belongs to its
 * fault thread, which takes no lock and no memory on its way: other threads leave *commands* in a list that is pushed to and emptied
 * by single atomic instructions, its tables have their size from the beginning, and its counters are read as they are
 * (metrics.h). Four locks it may meet, all with priority inheritance and held for microseconds: the gate, that of the events
 * (rare), watch_lock (only while there is a watch), and that of the readers (a local page that is not in the page cache).
 *
 * What the peer may cost
 * ----------------------
 * A turn of the fault thread's loop does a bounded piece of work, then looks at the userfaultfd again; a frame that is not done is
 * continued in the next turn. A channel that brings only what is here already is read slower and slower. Tables are bounded: a
 * request waits until there is room for it, and threads that find no place in the pending table are woken when there is.
 *
 * The files
 * ---------
 * pager.h (all records and their owners), registry.c (blocks, shards, arming), faults.c (events, waiting threads), removed.c (memory that
 * was taken away), urgent.c (the fault thread's loop and channel), prefetch.c (requests before a fault), placement.c (frames become pages),
 * local.c (pages that are on this host), bulk.c, watch.c, metrics.c.
 * This file makes, asks and frees a pager as a whole: callers only.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pager/pager.h"

void pc_pager_fatal(struct pc_pager *pager, int error, const char *what, uint32_t block, uint64_t page)
{
    pc_events_push(&pager->events, PC_EVENT_FATAL, 0, 0, -error, "%s page %llu of RAM block %u: %s", what,
                   (unsigned long long)page, block, error == -ESRCH ? "the process that it belongs to has ended" : strerror(-error));
}

static int new_pager(const struct pc_metrics *metrics, struct pc_pager **out)
{
    struct pc_pager *pager = calloc(1, sizeof(*pager));
    struct readers *readers = pager ? pc_readers_new() : NULL;
    int error = readers ? pc_events_init(&pager->events) : -ENOMEM;

    if (pager)
        pager->readers = readers;
    if (error) {
        if (readers)
            pc_readers_free(pager);
        free(pager);
        pc_buffer_free(metrics->map, sizeof(*metrics->map));
        return error;
    }
    pc_metrics_none_waits(metrics->map);
    pager->metrics = *metrics;
    pager->pushes = 1;
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

int pc_pager_new(int metrics_fd, struct pc_pager **pager)
{
    struct pc_metrics metrics = {.fd = -1}; /* that of the map stays the caller's */
    int error = 0;

    if (metrics_fd >= 0)
        error = pc_metrics_map(metrics_fd, &metrics.map);
    else if (!(metrics.map = pc_buffer_new(sizeof(*metrics.map))))
        error = -ENOMEM;
    return error ? error : new_pager(&metrics, pager);
}

int pc_pager_set_zero(struct pc_pager *pager, uint32_t block, const uint64_t *zero_words)
{
    const struct channel none = {0};
    uint64_t pages, end = 0;

    if (block >= pc_block_count(pager))
        return -EINVAL;
    pages = pager->blocks[block]->pages;
    for (;;) {
        struct progress progress = {.work_ns = UINT64_MAX};
        uint64_t first = pc_bits_next(zero_words, pages, end, true);

        if (first == pages)
            return 0;
        end = pc_bits_next(zero_words, pages, first, false);
        pc_place_zeros(pager, &none, block, first, end - first, 0, &progress);
    }
}

int pc_pager_forget(struct pc_pager *pager, uint32_t index, const uint64_t *stale_words)
{
    struct block *block;
    uint64_t stale, forgotten = 0, zeros = 0;
    int error = 0;

    if (index >= pc_block_count(pager))
        return -EINVAL;
    block = pager->blocks[index];
    stale = pc_bits_count(stale_words, 0, block->pages);
    pthread_mutex_lock(&pager->watch_lock);
    if (pager->watch_count) /* of the pages that it has passed it looks at none again */
        error = -EBUSY;
    pthread_mutex_unlock(&pager->watch_lock);
    if (!block->memory.base && block->memory.fd < 0 && __atomic_load_n(&block->segment_count, __ATOMIC_SEQ_CST))
        error = -EBUSY; /* what is placed there cannot be discarded from here */
    if (error || !stale)
        return error;
    /* As if all of them were forgotten, then what is not: `missing` is never less than what is missing. */
    (void)__atomic_fetch_add(&pager->missing, stale, __ATOMIC_SEQ_CST);
    (void)__atomic_fetch_add(&block->missing, stale, __ATOMIC_SEQ_CST);
    for (uint64_t word = 0; word < pc_bitmap_words(block->pages); word++) {
        uint64_t here = stale_words[word] & pc_bits_mask(word, 0, block->pages) & pc_bits_word(block->received, word);

        if (!here)
            continue;
        /* A thread that waited for one of them has been woken: nothing waits for what is received, so no request is lost. And none of them
         * is placed by anyone before `claimed`, the last of it, is cleared. */
        here &= __atomic_fetch_and(&block->received[word], ~here, __ATOMIC_SEQ_CST);
        zeros += pc_bits_popcount(here & __atomic_fetch_and(&block->zero[word], ~here, __ATOMIC_SEQ_CST));
        pc_atomic_clear(block->requested, word, here);
        pc_atomic_clear(block->claimed, word, here);
        forgotten += pc_bits_popcount(here);
    }
    pc_local_forget(block, stale_words);
    COUNT(pager, zero_pages, -zeros);
    pc_count_received(block, stale - forgotten);
    pc_announce_received(pager, stale - forgotten);
    return 0;
}

int pc_pager_expect_push(struct pc_pager *pager)
{
    (void)__atomic_fetch_add(&pager->pushes, 1, __ATOMIC_SEQ_CST);
    return 0;
}

int pc_pager_accept_compression(struct pc_pager *pager, uint32_t accepted)
{
    if (accepted & ~(uint32_t)(PC_COMPRESSION_LZ4 | PC_COMPRESSION_ZSTD))
        return -EINVAL;
    if (pc_compression_available(accepted, NULL, 0) != accepted)
        return -ENOENT;
    __atomic_store_n(&pager->accepted_compression, accepted, __ATOMIC_SEQ_CST);
    return 0;
}

int pc_pager_track_thread(struct pc_pager *pager, uint32_t slot, int32_t tid)
{
    return pc_metrics_track_thread(&pager->metrics, slot, tid);
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
    uint32_t blocks = pc_block_count(pager);

    (void)pc_metrics_stats(&pager->metrics, stats);
    for (uint32_t i = 0; i < blocks; i++) {
        const struct block *block = pager->blocks[i];
        uint64_t received = block->pages - __atomic_load_n(&block->missing, __ATOMIC_SEQ_CST);

        stats->total_pages += block->pages;
        stats->total_bytes += block->memory.size_bytes;
        stats->resident_pages += received;
        stats->resident_bytes += received * block->memory.page_bytes;
    }
    return 0;
}

int pc_pager_latency(struct pc_pager *pager, int stage, struct pc_histogram *histogram)
{
    return pc_metrics_latency(&pager->metrics, stage, histogram);
}

int pc_pager_blocktime(struct pc_pager *pager, uint64_t *blocktime_ns, uint32_t slots)
{
    return pc_metrics_blocktime(&pager->metrics, blocktime_ns, slots);
}

struct pc_metrics *pc_pager_metrics(struct pc_pager *pager)
{
    return &pager->metrics;
}

int pc_pager_bins(struct pc_pager *pager, uint8_t *bins, uint32_t count)
{
    return pc_metrics_bins(&pager->metrics, bins, count);
}

int pc_pager_received(struct pc_pager *pager, uint32_t block, uint64_t *words)
{
    const uint64_t *staged;

    if (block >= pc_block_count(pager))
        return -EINVAL;
    /* Before `received`: a page that leaves the one is in the other already. */
    staged = pc_staged(pager->blocks[block]);
    for (uint64_t word = 0; word < pc_bitmap_words(pager->blocks[block]->pages); word++) {
        words[word] = staged ? pc_bits_word(staged, word) : 0;
        words[word] |= pc_bits_word(pager->blocks[block]->received, word);
    }
    return 0;
}

int pc_pager_disconnect(struct pc_pager *pager)
{
    uint32_t shards = pc_shard_count(pager);
    struct command commands[PC_MAX_SHARDS];
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
        commands[i] = (struct command){.kind = COMMAND_DISCONNECT, .done = &done};
        pc_command_send(pager->shards[i], &commands[i]);
    }
    for (uint32_t i = 0; i < shards; i++)
        while (sem_wait(&done) && errno == EINTR) {
        }
    for (uint32_t i = 0; i < PC_MAX_BULK_CHANNELS; i++)
        pc_bulk_reap(&pager->bulks[i]);
    sem_destroy(&done);
    pthread_mutex_lock(&pager->channel_lock);
    pager->disconnecting = false;
    pthread_cond_broadcast(&pager->disconnected);
    pthread_mutex_unlock(&pager->channel_lock);
    return 0;
}

/* After channels and readers: ends the fault threads, and frees all there is. */
static int free_pager(struct pc_pager *pager)
{
    for (uint32_t i = 0; i < pager->shard_count; i++) {
        struct shard *shard = pager->shards[i];
        struct command stop = {.kind = COMMAND_STOP};

        pc_command_send(shard, &stop);
        pthread_join(shard->thread, NULL);
        pc_shard_free(shard);
    }
    pc_commands_free(&pager->finished);
    for (uint32_t i = 0; i < pager->block_count; i++)
        pc_block_free(pager->blocks[i]);
    pc_readers_free(pager);
    pc_buffer_free(pager->zero_page, PC_FRAME_MAX_PAYLOAD_BYTES);
    pc_events_destroy(&pager->events);
    for (size_t i = pager->watch_count; i-- > 0;)
        close(pager->watches[i].fd);
    free(pager->watches);
    pthread_mutex_destroy(&pager->watch_lock);
    pthread_mutex_destroy(&pager->channel_lock);
    pthread_cond_destroy(&pager->disconnected);
    pthread_mutex_destroy(&pager->lock);
    pc_buffer_free(pager->metrics.map, sizeof(*pager->metrics.map));
    free(pager);
    return 0;
}

int pc_pager_free(struct pc_pager *pager)
{
    bool missing;

    (void)pc_pager_disconnect(pager);
    pc_readers_end(pager);
    missing = __atomic_load_n(&pager->missing, __ATOMIC_SEQ_CST) > 0;
    for (uint32_t i = 0; i < pager->shard_count && missing; i++)
        if (pc_shard_poison(pager, pager->shards[i]))
            return -EBUSY; /* kept whole, on purpose: see the header */
    for (uint32_t i = 0; i < pager->shard_count && !missing; i++)
        pc_shard_unregister(pager, pager->shards[i]);
    return free_pager(pager);
}

int pc_pager_leave(struct pc_pager *pager)
{
    (void)pc_pager_disconnect(pager);
    pc_readers_end(pager);
    return free_pager(pager);
}
