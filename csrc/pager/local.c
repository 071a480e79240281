/* SPDX-License-Identifier: Apache-2.0
 *
 * Local pages: those whose content can be read here, from an image file or from what was staged, and need no request.
 *
 * A local page that is missing has neither `claimed` nor `received`; it becomes a page by the same rules as one that a frame brings
 * (placement.c), for what is read here is given to placement as a frame. Three ways lead there:
 *
 *   the fault thread   reads what the page cache has without waiting (RWF_NOWAIT) and places it at once: no other thread takes part
 *   demand readers     read pages that it has not and that threads wait for, in the order of the faults: a slow disk delays no other fault
 *   background readers read and place runs of pages that no thread waits for: first the working set, in its order, then a *sweep* over all
 *                      local pages. Before each run they wait until no demand is left
 *
 * Where the image is in the page cache already, machines share it there; nothing is mapped, so that a file which is cut short is an
 * error here and never a SIGBUS.
 *
 * Staging: what arrives for a page that is not armed, as its machine has no memory yet, is written to a memfd and is local from then
 * on. The thread that stages sets the page's bit in local.pages, takes back its claim, then looks for segments; arming publishes the
 * segment, then has the sweep look at local.pages and at claims: one of the two sees the other. A staged page is removed from the memfd
 * when it is received, so that the memfd itself tells a later pager what is staged.
 *
 * Owns local.pages, the readers and what they are to do, and the log of first touches.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "memory/states.h"
#include "pager/pager.h"

#define BATCH_BYTES (256 * 1024) /* of a background read: it stays in a processor's own cache until it is placed */
#define MAX_REQUESTS PENDING_MAX
#define TOUCHES_MAGIC UINT64_C(0x31736568637574) /* "tuches1", little endian */
#define TOUCHES_MAX (UINT32_MAX * UINT64_C(64))
#define TOUCHED (UINT64_C(1) << 63)             /* an entry that has been written */

enum reader_kind { DEMAND, BACKGROUND, READER_KINDS };

struct reader {
    struct pc_pager *pager;
    uint8_t *buffer;
    pthread_t thread;
    uint32_t index;
};

struct request {
    uint64_t page;
    uint32_t block;
};

#define PIECE_RUNS 64
struct piece { /* of background work: at most BATCH_BYTES, or one page */
    struct pc_page_run runs[PIECE_RUNS];
    uint32_t count;
    bool set; /* of a working set */
};

struct readers {
    bool ending; /* atomic; set under both locks */
    uint32_t wanted[READER_KINDS], started[READER_KINDS]; /* threads; under pc_pager.lock */
    struct reader threads[READER_KINDS][PC_MAX_READERS];

    pthread_mutex_t lock; /* of what is demanded; fault threads take it, for microseconds */
    pthread_cond_t demanded, none_demanded;
    uint32_t first, count, serving; /* a ring; `serving` of them are being read. Both are read without the lock */
    struct request requests[MAX_REQUESTS];

    pthread_mutex_t background_lock; /* of what is prefetched */
    pthread_cond_t work;
    struct pc_page_run *runs;
    uint64_t run_count, run_next, run_done; /* run_done pages of run_next are dealt with */
    bool all;                 /* the sweep is for all local pages, not only those that are staged */
    bool sweeping, sweep_again;
    uint32_t sweep_block;
    uint64_t sweep_page;
    uint32_t busy; /* threads with a piece; read without the lock */
};

struct touches { /* in a memfd */
    struct pc_memfd_head head; /* its capacity */
    uint64_t count;
    uint64_t entries[];
};

static uint64_t touches_bytes(uint64_t capacity)
{
    return sizeof(struct touches) + capacity * sizeof(uint64_t);
}

static bool is_ending(const struct readers *readers)
{
    return __atomic_load_n(&readers->ending, __ATOMIC_SEQ_CST);
}

static uint64_t *local_pages(const struct block *block)
{
    return __atomic_load_n(&block->local.pages, __ATOMIC_ACQUIRE);
}

/* ---- reading and placing ------------------------------------------------------------------------------------------ */

/* 0, -errno, -ENODATA where the file ends before; with RWF_NOWAIT -EAGAIN when not all of it is in the page cache. */
static int read_pages(const struct block *block, uint64_t first, uint64_t pages, uint8_t *buffer, int flags)
{
    uint64_t bytes = pages * block->memory.page_bytes, from = block->local.offset + first * block->memory.page_bytes, done = 0;

    while (done < bytes) {
        struct iovec part = {.iov_base = buffer + done, .iov_len = bytes - done};
        ssize_t got = preadv2(block->local.fd, &part, 1, (off_t)(from + done), flags);

        if (!got)
            return -ENODATA;
        if (got < 0 && errno != EINTR)
            return -errno;
        if (got > 0)
            done += (uint64_t)got;
    }
    return 0;
}

static void report_unreadable(struct pc_pager *pager, uint32_t index, uint64_t first, uint64_t pages, int error)
{
    pc_events_push(&pager->events, PC_EVENT_FATAL, 0, 0, -error, "cannot read pages %llu+%llu of RAM block %u from their file: %s",
                   (unsigned long long)first, (unsigned long long)pages, index,
                   error == -ENODATA ? "it ends before them" : strerror(-error));
}

struct placed { /* pages that were not there before */
    uint64_t pages, zeros;
};

/* Places those pages of what was read that no other thread has claimed: 0, or why it could not. */
static int place(struct pc_pager *pager, struct channel *channel, uint32_t index, uint64_t first, uint64_t pages,
                 const uint8_t *content, uint8_t flags, struct placed *placed)
{
    uint64_t page_bytes = pager->blocks[index]->memory.page_bytes;
    int error = 0;

    for (uint64_t at = 0, end; at < pages && !error; at = end) {
        bool zero = pc_is_zero(content + at * page_bytes, page_bytes);
        struct pc_frame frame = {.type = zero ? PC_FRAME_ZERO : PC_FRAME_PAGES,
                                 .flags = flags,
                                 .block = (uint16_t)index,
                                 .first_page = first + at};
        struct progress progress;

        for (end = at + 1; end < pages && pc_is_zero(content + end * page_bytes, page_bytes) == zero;)
            end++;
        frame.pages = (uint32_t)(end - at);
        progress.done = progress.fresh = 0;
        progress.work_ns = UINT64_MAX;
        error = pc_handle_frame(pager, channel, &frame, content + at * page_bytes, &progress);
        *(zero ? &placed->zeros : &placed->pages) += progress.fresh;
    }
    return error;
}

/* The same by a reader: what the kernel refuses for the moment as often as it takes. */
static int place_patiently(const struct reader *reader, uint32_t index, uint64_t first, uint64_t pages, uint8_t flags,
                           bool without_memory, struct placed *placed)
{
    struct channel channel = {.index = reader->index, .local = true};
    uint64_t wait_ns = RETRY_NS;

    for (;;) {
        /* What is placed already counts as a duplicate then, and is left alone. */
        int error = place(reader->pager, &channel, index, first, pages, reader->buffer, flags, placed);

        if (error != -EAGAIN && !(error == -ENOMEM && without_memory))
            return error;
        if (is_ending(reader->pager->readers))
            return -ECANCELED;
        pc_sleep_ns(wait_ns);
        if (wait_ns < (flags & PC_FRAME_DEMAND ? 4 * RETRY_NS : RETRY_MAX_NS))
            wait_ns *= 2;
    }
}

/* The fault thread is a real-time thread where other threads of this pager want the processor: those that prefetch, or a network's. Where
 * there are none it is of the fair class: in a virtual machine each switch from or to a real-time thread programs a timer, which is a fifth
 * of a fault on a page of the page cache. */
void pc_local_schedule(struct shard *shard)
{
    bool alone = shard->stream.fd < 0 && !__atomic_load_n(&shard->pager->readers->busy, __ATOMIC_RELAXED);

    if (shard->busy_poll_ns || shard->fair == alone)
        return;
    shard->fair = alone;
    pc_thread_prompt(alone);
}

bool pc_local_serve(struct shard *shard, uint32_t index, uint64_t page)
{
    const struct block *block = shard->pager->blocks[index];
    struct channel channel = {.own = shard, .local = true};
    struct placed placed = {0};

    pc_local_schedule(shard);
    if (read_pages(block, page, 1, shard->page, __atomic_load_n(&block->local.now, __ATOMIC_RELAXED)) ||
        place(shard->pager, &channel, index, page, 1, shard->page, PC_FRAME_DEMAND, &placed))
        return false;
    return placed.pages || placed.zeros; /* else another thread is about to */
}

/* ---- demand ------------------------------------------------------------------------------------------------------- */

bool pc_local_request(struct pc_pager *pager, uint32_t index, uint64_t page)
{
    struct readers *readers = pager->readers;
    bool room;

    pthread_mutex_lock(&readers->lock);
    room = readers->count < MAX_REQUESTS;
    if (room) {
        readers->requests[(readers->first + readers->count) % MAX_REQUESTS] = (struct request){.page = page, .block = index};
        __atomic_store_n(&readers->count, readers->count + 1, __ATOMIC_RELAXED);
        pthread_cond_broadcast(&readers->demanded); /* a signal may wake none of several: glibc bug 25847, up to 2.40 */
    }
    pthread_mutex_unlock(&readers->lock);
    if (room)
        COUNT(pager, local_waits, 1);
    return room;
}

static void serve_request(struct reader *reader, const struct request *request)
{
    struct pc_pager *pager = reader->pager;
    struct block *block = pager->blocks[request->block];
    struct placed placed = {0};
    int error;

    if (pc_bits_test(block->claimed, request->page)) /* the thread that has claimed it sees that it is requested */
        return;
    error = read_pages(block, request->page, 1, reader->buffer, 0);
    if (error) {
        report_unreadable(pager, request->block, request->page, 1, error);
        return; /* pc_pager_set_local has it requested again */
    }
    error = place_patiently(reader, request->block, request->page, 1, PC_FRAME_DEMAND, true, &placed);
    if (error == -ENOENT) /* its memory has gone; should it be back one day, a fault begins anew */
        pc_atomic_clear_bit(block->requested, request->page);
}

static void *demand_thread(void *argument)
{
    struct reader *reader = argument;
    struct readers *readers = reader->pager->readers;

    pc_thread_name("pc-read", reader->index);
    pc_thread_prompt(false);
    pthread_mutex_lock(&readers->lock);
    for (;;) {
        struct request request;

        while (!readers->count && !is_ending(readers))
            pthread_cond_wait(&readers->demanded, &readers->lock);
        if (is_ending(readers))
            break;
        request = readers->requests[readers->first];
        readers->first = (readers->first + 1) % MAX_REQUESTS;
        __atomic_store_n(&readers->serving, readers->serving + 1, __ATOMIC_RELAXED);
        __atomic_store_n(&readers->count, readers->count - 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&readers->lock);
        serve_request(reader, &request);
        pthread_mutex_lock(&readers->lock);
        __atomic_store_n(&readers->serving, readers->serving - 1, __ATOMIC_RELAXED);
        if (!readers->serving && !readers->count)
            pthread_cond_broadcast(&readers->none_demanded);
    }
    pthread_mutex_unlock(&readers->lock);
    return NULL;
}

/* ---- background --------------------------------------------------------------------------------------------------- */

static void wait_for_demand(struct readers *readers)
{
    if (!__atomic_load_n(&readers->count, __ATOMIC_RELAXED) && !__atomic_load_n(&readers->serving, __ATOMIC_RELAXED))
        return;
    pthread_mutex_lock(&readers->lock);
    while ((readers->count || readers->serving) && !is_ending(readers))
        pthread_cond_wait(&readers->none_demanded, &readers->lock);
    pthread_mutex_unlock(&readers->lock);
}

/* Those pages of a word that are local and missing, and that no thread waits for. */
static uint64_t idle_word(const struct block *block, const uint64_t *local, uint64_t word)
{
    return pc_bits_word(local, word) & ~(pc_bits_word(block->claimed, word) | pc_bits_word(block->requested, word));
}

/* The first run of such pages in [from, end), in one segment and at most `limit` long; *pages 0: there is none. */
static uint64_t next_idle(const struct block *block, uint64_t from, uint64_t end, uint64_t limit, uint64_t *pages)
{
    const uint64_t *local = local_pages(block);

    *pages = 0;
    for (uint64_t word = from / 64; local && from < end; from = ++word * 64) {
        uint64_t idle = idle_word(block, local, word) & pc_bits_mask(word, from, end - from);

        for (; idle; idle &= idle - 1) {
            uint64_t first = pc_bits_lowest(word, idle), guarded = end - first < limit ? end - first : limit, at;

            if (!pc_find_segment(block, first, &guarded))
                continue;
            for (at = 1; at < guarded && idle_word(block, local, (first + at) / 64) >> ((first + at) % 64) & 1;)
                at++;
            *pages = at;
            return first;
        }
    }
    return end;
}

static void punch_staged(const struct block *block, uint64_t from, uint64_t end)
{
    uint64_t page_bytes = block->memory.page_bytes;

    if (from < end)
        (void)fallocate(block->local.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(from * page_bytes),
                        (off_t)((end - from) * page_bytes));
}

/* Removes those pages of [first, first + pages) that `which` names from the memfd in which they were staged. */
static void drop_staged(struct block *block, const uint64_t *which, uint64_t first, uint64_t pages)
{
    uint64_t *local = local_pages(block), from = 0, until = 0; /* a run that is to be removed */

    for (uint64_t word = first / 64; word * 64 < first + pages; word++) {
        uint64_t gone = pc_bits_word(local, word) & pc_bits_word(which, word) & pc_bits_mask(word, first, pages);

        if (gone)
            pc_atomic_clear(local, word, gone);
        for (; gone; gone &= gone - 1) {
            uint64_t page = pc_bits_lowest(word, gone);

            if (page != until) {
                punch_staged(block, from, until);
                from = page;
            }
            until = page + 1;
        }
    }
    punch_staged(block, from, until);
}

static uint64_t batch_pages(const struct block *block)
{
    uint64_t pages = BATCH_BYTES / block->memory.page_bytes;

    return pages ? pages : 1;
}

/* A working set may be nothing but single pages in no order: as many of them as make up a piece of the usual size. A piece costs two turns
 * at the lock, and now and then the processor (pc_background_pause). */
static bool next_of_runs(struct readers *readers, const struct pc_pager *pager, struct piece *piece)
{
    uint64_t room = 0;

    piece->count = 0;
    piece->set = true;
    while (readers->run_next < readers->run_count && piece->count < PIECE_RUNS) {
        const struct pc_page_run *run = &readers->runs[readers->run_next];
        struct pc_page_run *part = &piece->runs[piece->count];

        if (!piece->count)
            room = batch_pages(pager->blocks[run->block]);
        else if (run->block != piece->runs[0].block || !room)
            break;
        *part = (struct pc_page_run){.first_page = run->first_page + readers->run_done,
                                     .pages = run->pages - (uint32_t)readers->run_done,
                                     .block = run->block};
        if (part->pages > room)
            part->pages = (uint32_t)room;
        room -= part->pages;
        piece->count++;
        readers->run_done += part->pages;
        if (readers->run_done == run->pages) {
            readers->run_next++;
            readers->run_done = 0;
        }
    }
    return piece->count;
}

static bool next_of_sweep(struct readers *readers, struct pc_pager *pager, struct piece *piece)
{
    while (readers->sweeping) {
        struct block *block;
        uint64_t first = 0, pages = 0;

        if (readers->sweep_block == pc_block_count(pager)) {
            readers->sweeping = readers->sweep_again;
            readers->sweep_again = false;
            readers->sweep_block = 0;
            readers->sweep_page = 0;
            continue;
        }
        block = pager->blocks[readers->sweep_block];
        if (local_pages(block) && (readers->all || block->local.staging))
            first = next_idle(block, readers->sweep_page, block->pages, batch_pages(block), &pages);
        if (pages) {
            piece->runs[0] = (struct pc_page_run){.first_page = first, .pages = (uint32_t)pages, .block = readers->sweep_block};
            piece->count = 1;
            piece->set = false;
            readers->sweep_page = first + pages;
            return true;
        }
        if (pc_staged(block)) /* those that the fault thread has placed */
            drop_staged(block, block->received, 0, block->pages);
        readers->sweep_block++;
        readers->sweep_page = 0;
    }
    return false;
}

/* Ends what is prefetched; with the lock. */
static void stop_prefetch(struct readers *readers)
{
    free(readers->runs);
    readers->runs = NULL;
    readers->run_count = readers->run_next = readers->run_done = 0;
    readers->all = false;
}

/* Places the zero pages of a working set that nothing is placed for otherwise. How many. */
static uint64_t place_zero_pages(struct pc_pager *pager, const struct pc_page_run *run)
{
    const struct block *block = pager->blocks[run->block];
    uint64_t page_bytes = block->memory.page_bytes, end = run->first_page + run->pages, count = 0, page = run->first_page;

    while (page < end && !is_ending(pager->readers)) {
        uint64_t first = pc_bits_next(block->zero, end, page, true), pages, done = 0;
        struct shard *shard;
        int error;

        if (first == end)
            break;
        page = pc_bits_next(block->zero, end, first, false);
        pages = page - first;
        shard = pc_find_shard(pager, block, first, &pages);
        if (!shard) {
            page = first + 1;
            continue;
        }
        error = pc_fill_zeros(shard, block, first, pages, &done);
        count += done / page_bytes;
        page = first + done / page_bytes;
        if (error == -EEXIST)
            page++; /* the machine has it already */
        else if (error == -EAGAIN && !done)
            pc_sleep_ns(RETRY_NS);
        else if (error && error != -EAGAIN)
            break;
    }
    return count;
}

/* 0, or why no more is to be prefetched: the file, the host's memory, or the machine has failed. */
static int do_run(struct reader *reader, const struct pc_page_run *run, bool set)
{
    struct pc_pager *pager = reader->pager;
    struct readers *readers = pager->readers;
    struct block *block = pager->blocks[run->block];
    uint64_t end = run->first_page + run->pages, page = run->first_page, zeros = 0;
    struct placed placed = {0};
    int error = 0;

    while (page < end && !error && !is_ending(readers)) {
        uint64_t pages, first;

        wait_for_demand(readers);
        first = next_idle(block, page, end, run->pages, &pages);
        if (!pages)
            break;
        page = first + pages;
        error = read_pages(block, first, pages, reader->buffer, 0);
        if (error)
            report_unreadable(pager, run->block, first, pages, error);
        else
            error = place_patiently(reader, run->block, first, pages, 0, block->local.staging, &placed);
        if (error == -ENOENT)
            error = 0; /* its memory has gone */
    }
    if (set && !error)
        zeros = place_zero_pages(pager, run);
    if (set) {
        COUNT(pager, set_pages, run->pages);
        COUNT(pager, set_hits, placed.pages + zeros);
    }
    if (zeros)
        COUNT(pager, prefetched_pages, zeros);
    if (block->local.staging)
        drop_staged(block, block->received, run->first_page, run->pages);
    return error;
}

static void do_piece(struct reader *reader, const struct piece *piece)
{
    struct readers *readers = reader->pager->readers;
    int error = 0;

    for (uint32_t i = 0; i < piece->count && !error && !is_ending(readers); i++)
        error = do_run(reader, &piece->runs[i], piece->set);
    if (error) {
        pthread_mutex_lock(&readers->background_lock);
        stop_prefetch(readers);
        pthread_mutex_unlock(&readers->background_lock);
    }
}

static void *background_thread(void *argument)
{
    struct reader *reader = argument;
    struct pc_pager *pager = reader->pager;
    struct readers *readers = pager->readers;
    struct pc_background background = {0};

    pc_thread_name("pc-prefetch", reader->index);
    pc_thread_background();
    pthread_mutex_lock(&readers->background_lock);
    for (;;) {
        struct piece piece;

        if (is_ending(readers))
            break;
        if (!next_of_runs(readers, pager, &piece) && !next_of_sweep(readers, pager, &piece)) {
            pthread_cond_wait(&readers->work, &readers->background_lock);
            continue;
        }
        __atomic_store_n(&readers->busy, readers->busy + 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&readers->background_lock);
        do_piece(reader, &piece);
        pc_background_pause(&background, __atomic_load_n(&pager->metrics.map->count.faults, __ATOMIC_RELAXED));
        pthread_mutex_lock(&readers->background_lock);
        __atomic_store_n(&readers->busy, readers->busy - 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&readers->background_lock);
    return NULL;
}

/* Has the sweep look at all of it once more; with the lock. */
static void sweep(struct readers *readers)
{
    readers->sweep_again = readers->sweeping;
    readers->sweeping = true;
    pthread_cond_broadcast(&readers->work);
}

static void sweep_again(struct pc_pager *pager)
{
    pthread_mutex_lock(&pager->readers->background_lock);
    sweep(pager->readers);
    pthread_mutex_unlock(&pager->readers->background_lock);
}

/* ---- the threads -------------------------------------------------------------------------------------------------- */

struct readers *pc_readers_new(void)
{
    struct readers *readers = pc_buffer_new(sizeof(*readers));

    if (!readers)
        return NULL;
    pc_lock_init(&readers->lock);
    pthread_cond_init(&readers->demanded, NULL);
    pthread_cond_init(&readers->none_demanded, NULL);
    pthread_mutex_init(&readers->background_lock, NULL);
    pthread_cond_init(&readers->work, NULL);
    readers->wanted[DEMAND] = 2;
    readers->wanted[BACKGROUND] = 2; /* while one reads, the other places */
    return readers;
}

/* With pc_pager.lock. 0 or -errno; those that could be started run. */
static int start_readers(struct pc_pager *pager, enum reader_kind kind)
{
    struct readers *readers = pager->readers;
    int error = 0;

    while (!error && readers->started[kind] < readers->wanted[kind]) {
        struct reader *reader = &readers->threads[kind][readers->started[kind]];

        *reader = (struct reader){.pager = pager, .index = readers->started[kind], .buffer = pc_buffer_new(PC_FRAME_MAX_PAYLOAD_BYTES)};
        error = !reader->buffer ? -ENOMEM : pc_thread_start(&reader->thread, kind == DEMAND ? demand_thread : background_thread, reader);
        if (error)
            pc_buffer_free(reader->buffer, PC_FRAME_MAX_PAYLOAD_BYTES);
        else
            readers->started[kind]++;
    }
    return error;
}

static int start_background(struct pc_pager *pager)
{
    int error;

    pthread_mutex_lock(&pager->lock);
    error = start_readers(pager, BACKGROUND);
    pthread_mutex_unlock(&pager->lock);
    return error;
}

void pc_readers_end(struct pc_pager *pager)
{
    struct readers *readers = pager->readers;

    pthread_mutex_lock(&readers->lock);
    pthread_mutex_lock(&readers->background_lock);
    __atomic_store_n(&readers->ending, true, __ATOMIC_SEQ_CST);
    pthread_cond_broadcast(&readers->demanded);
    pthread_cond_broadcast(&readers->none_demanded);
    pthread_cond_broadcast(&readers->work);
    pthread_mutex_unlock(&readers->background_lock);
    pthread_mutex_unlock(&readers->lock);
    for (int kind = 0; kind < READER_KINDS; kind++)
        while (readers->started[kind]) {
            struct reader *reader = &readers->threads[kind][--readers->started[kind]];

            pthread_join(reader->thread, NULL);
            pc_buffer_free(reader->buffer, PC_FRAME_MAX_PAYLOAD_BYTES);
        }
}

void pc_readers_free(struct pc_pager *pager)
{
    struct readers *readers = pager->readers;
    struct touches *touches = pager->touches;

    stop_prefetch(readers);
    pthread_cond_destroy(&readers->demanded);
    pthread_cond_destroy(&readers->none_demanded);
    pthread_cond_destroy(&readers->work);
    pthread_mutex_destroy(&readers->lock);
    pthread_mutex_destroy(&readers->background_lock);
    pc_buffer_free(readers, sizeof(*readers));
    if (touches)
        pc_buffer_free(touches, touches_bytes(touches->head.count));
}

int pc_pager_set_readers(struct pc_pager *pager, uint32_t demand, uint32_t background)
{
    struct readers *readers = pager->readers;
    int error = 0;

    if (!demand || !background || demand > PC_MAX_READERS || background > PC_MAX_READERS)
        return -EINVAL;
    pthread_mutex_lock(&pager->lock);
    if (readers->started[DEMAND] || readers->started[BACKGROUND]) {
        error = -EBUSY;
    } else {
        readers->wanted[DEMAND] = demand;
        readers->wanted[BACKGROUND] = background;
    }
    pthread_mutex_unlock(&pager->lock);
    return error;
}

int pc_pager_prefetch_all(struct pc_pager *pager)
{
    int error = start_background(pager);

    if (error)
        return error;
    pthread_mutex_lock(&pager->readers->background_lock);
    pager->readers->all = true;
    sweep(pager->readers);
    pthread_mutex_unlock(&pager->readers->background_lock);
    return 0;
}

int pc_pager_prefetch_runs(struct pc_pager *pager, const struct pc_page_run *runs, uint64_t count)
{
    struct readers *readers = pager->readers;
    struct pc_page_run *all;
    uint64_t left;
    int error;

    for (uint64_t i = 0; i < count; i++)
        if (!runs[i].pages || !pc_block_has(pager, runs[i].block, runs[i].first_page, runs[i].pages))
            return -EINVAL;
    error = start_background(pager);
    if (error || !count)
        return error;
    pthread_mutex_lock(&readers->background_lock);
    left = readers->run_count - readers->run_next;
    all = count < UINT32_MAX && left < UINT32_MAX ? calloc(left + count, sizeof(*all)) : NULL;
    if (all) {
        if (left)
            memcpy(all, readers->runs + readers->run_next, left * sizeof(*all));
        memcpy(all + left, runs, count * sizeof(*all));
        free(readers->runs);
        readers->runs = all;
        readers->run_count = left + count;
        readers->run_next = 0;
        pthread_cond_broadcast(&readers->work);
    }
    pthread_mutex_unlock(&readers->background_lock);
    return all ? 0 : -ENOMEM;
}

int pc_pager_prefetch_stop(struct pc_pager *pager)
{
    pthread_mutex_lock(&pager->readers->background_lock);
    stop_prefetch(pager->readers);
    pthread_mutex_unlock(&pager->readers->background_lock);
    return 0;
}

int pc_pager_prefetching(struct pc_pager *pager)
{
    struct readers *readers = pager->readers;
    int result;

    pthread_mutex_lock(&readers->background_lock);
    result = readers->run_next < readers->run_count || readers->sweeping || readers->busy;
    pthread_mutex_unlock(&readers->background_lock);
    return result;
}

/* ---- sources ------------------------------------------------------------------------------------------------------ */

void pc_local_block_free(struct block *block)
{
    pc_buffer_free(block->local.pages, pc_bitmap_words(block->pages) * sizeof(uint64_t));
    if (block->local.fd >= 0)
        close(block->local.fd);
}

/* Whether a file has everything up to `end`; also where it is a block device. */
static bool reaches(int fd, uint64_t end)
{
    off_t size = lseek(fd, 0, SEEK_END);

    return size >= 0 && (uint64_t)size >= end;
}

/* Sets *from and *end to the next part of a file that may hold data, at or after *from. False: there is none before `limit`. */
static bool next_data(int fd, uint64_t *from, uint64_t *end, uint64_t limit)
{
    off_t data = lseek(fd, (off_t)*from, SEEK_DATA), hole;

    if (data < 0 && errno == ENXIO)
        return false;
    if (data >= 0)
        *from = (uint64_t)data;
    hole = data < 0 ? -1 : lseek(fd, data, SEEK_HOLE);
    *end = hole < 0 || (uint64_t)hole > limit ? limit : (uint64_t)hole; /* of a file system that cannot tell: all of it */
    return *from < limit;
}

/* The holes of a file are zero. 0, or -ENODATA when it ends too early. */
static int zero_holes(struct pc_pager *pager, uint32_t index, int fd, uint64_t offset, const uint64_t *words)
{
    const struct block *block = pager->blocks[index];
    const struct channel none = {0};
    uint64_t page_bytes = block->memory.page_bytes, limit = offset + block->memory.size_bytes, at = offset;

    while (at < limit) {
        uint64_t data = at, end = limit, first, pages;

        if (!next_data(fd, &data, &end, limit))
            data = end = limit;
        if (!reaches(fd, limit)) /* after the holes were looked for: its end looks like one */
            return -ENODATA;
        first = (at - offset + page_bytes - 1) / page_bytes;
        pages = (data - offset) / page_bytes;
        while (first < pages) {
            uint64_t from = words ? pc_bits_next(words, pages, first, true) : first;
            struct progress progress = {.work_ns = UINT64_MAX};

            first = words ? pc_bits_next(words, pages, from, false) : pages;
            if (from < first)
                pc_place_zeros(pager, &none, index, from, first - from, 0, &progress);
        }
        at = end;
    }
    return 0;
}

/* Flags with which preadv2(2) does not wait for a disk. tmpfs does not know them, and has none. */
static int flags_now(int fd)
{
    struct statfs file_system;

    return !fstatfs(fd, &file_system) && file_system.f_type == TMPFS_MAGIC ? 0 : RWF_NOWAIT;
}

/* Gives a block its file, which becomes the block's, with pc_pager.lock. 0 or -errno, and the file is closed. */
static int give_file(struct pc_pager *pager, struct block *block, int fd, uint64_t offset, bool staging)
{
    int error = start_readers(pager, DEMAND);
    uint64_t *pages = NULL;

    if (!error && block->local.pages && (staging || block->local.staging))
        error = -EBUSY;
    else if (!error && block->local.pages && block->local.offset != offset)
        error = -EINVAL; /* a thread may be reading */
    else if (!error && block->local.pages && dup3(fd, block->local.fd, O_CLOEXEC) < 0)
        error = -errno;
    if (!error && !block->local.pages) {
        pages = pc_buffer_new(pc_bitmap_words(block->pages) * sizeof(uint64_t));
        error = pages ? 0 : -ENOMEM;
    }
    if (!error)
        __atomic_store_n(&block->local.now, flags_now(fd), __ATOMIC_RELAXED);
    if (error || !pages) {
        close(fd);
        return error;
    }
    block->local.fd = fd;
    block->local.offset = offset;
    block->local.staging = staging;
    __atomic_store_n(&block->local.pages, pages, __ATOMIC_RELEASE);
    return 0;
}

int pc_pager_set_local(struct pc_pager *pager, uint32_t index, int fd, uint64_t offset, const uint64_t *words, char *error,
                       size_t error_bytes)
{
    struct block *block = index < pc_block_count(pager) ? pager->blocks[index] : NULL;
    uint32_t shards = pc_shard_count(pager);
    int own, result;

    if (!block || offset > INT64_MAX - block->memory.size_bytes)
        return pc_fail(EINVAL, error, error_bytes, "there is no such RAM block, or no such place in a file");
    if (!reaches(fd, offset + block->memory.size_bytes))
        return pc_fail(ENODATA, error, error_bytes, "the file ends before RAM block %u does, which has %llu bytes from %llu on", index,
                       (unsigned long long)block->memory.size_bytes, (unsigned long long)offset);
    own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return pc_fail(errno, error, error_bytes, "the file cannot be used: %s", strerror(errno));
    pthread_mutex_lock(&pager->lock);
    result = give_file(pager, block, own, offset, false);
    pthread_mutex_unlock(&pager->lock);
    if (!result)
        result = zero_holes(pager, index, block->local.fd, offset, words);
    if (result)
        return pc_fail(-result, error, error_bytes, "RAM block %u cannot be read from the file: %s", index, strerror(-result));
    for (uint64_t word = 0; word < pc_bitmap_words(block->pages); word++)
        (void)pc_atomic_set(block->local.pages, word, pc_bits_mask(word, 0, block->pages) & (words ? words[word] : ~UINT64_C(0)));
    for (uint32_t i = 0; i < shards; i++) { /* what threads wait for is requested again: here, now */
        __atomic_store_n(&pager->shards[i]->answers_dropped, true, __ATOMIC_SEQ_CST);
        __atomic_store_n(&pager->shards[i]->recheck, true, __ATOMIC_SEQ_CST);
        pc_shard_notify(pager->shards[i]);
    }
    pc_local_armed(pager, block);
    return 0;
}

int pc_pager_stage(struct pc_pager *pager, uint32_t index, int fd)
{
    struct block *block = index < pc_block_count(pager) ? pager->blocks[index] : NULL;
    uint64_t from = 0, end;
    int own, error;

    if (!block || !reaches(fd, block->memory.size_bytes))
        return -EINVAL;
    own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return -errno;
    error = start_background(pager);
    pthread_mutex_lock(&pager->lock);
    if (!error)
        error = give_file(pager, block, own, 0, true);
    else
        close(own);
    pthread_mutex_unlock(&pager->lock);
    if (error)
        return error;
    for (; next_data(block->local.fd, &from, &end, block->memory.size_bytes); from = end)
        for (uint64_t page = (from + block->memory.page_bytes - 1) / block->memory.page_bytes; page < end / block->memory.page_bytes; page++)
            (void)pc_atomic_test_and_set_bit(block->local.pages, page);
    sweep_again(pager);
    return 0;
}

int pc_local_stage(struct pc_pager *pager, uint32_t index, uint64_t first, uint64_t pages, const uint8_t *content)
{
    struct block *block = pager->blocks[index];
    uint64_t *local = local_pages(block), page_bytes = block->memory.page_bytes;
    int error;

    if (!local || !block->local.staging)
        return -ENOENT;
    error = pc_pwrite_all(block->local.fd, content, pages * page_bytes, first * page_bytes);
    if (error)
        return error;
    for (uint64_t word = first / 64; word * 64 < first + pages; word++)
        (void)pc_atomic_set(local, word, pc_bits_mask(word, first, pages));
    return 0;
}

void pc_local_staged(struct pc_pager *pager, const struct block *block)
{
    if (__atomic_load_n(&block->segment_count, __ATOMIC_SEQ_CST)) /* it may have been armed meanwhile, and swept already */
        sweep_again(pager);
}

void pc_local_armed(struct pc_pager *pager, const struct block *block)
{
    struct readers *readers = pager->readers;

    pthread_mutex_lock(&readers->background_lock);
    if (block->local.staging || readers->all)
        sweep(readers);
    pthread_mutex_unlock(&readers->background_lock);
}

void pc_local_forget(struct block *block, const uint64_t *stale_words)
{
    if (pc_staged(block))
        drop_staged(block, stale_words, 0, block->pages);
}

/* ---- first touches ------------------------------------------------------------------------------------------------ */

int pc_touches_new(uint64_t pages)
{
    if (!pages || pages > TOUCHES_MAX)
        return -EINVAL;
    return pc_memfd_new_of("postcopy-touches", touches_bytes(pages), (struct pc_memfd_head){.magic = TOUCHES_MAGIC, .count = pages});
}

static int map_touches(int fd, struct touches **touches)
{
    uint64_t capacity;
    void *base;
    int error = pc_memfd_count(fd, TOUCHES_MAGIC, &capacity);

    if (!error)
        error = capacity && capacity <= TOUCHES_MAX ? pc_memfd_map(fd, touches_bytes(capacity), &base) : -EINVAL;
    if (!error)
        *touches = base;
    return error;
}

int pc_pager_record_touches(struct pc_pager *pager, int fd)
{
    struct touches *touches = NULL;
    int error = map_touches(fd, &touches);

    pthread_mutex_lock(&pager->lock);
    if (!error && pager->touches) {
        pc_buffer_free(touches, touches_bytes(touches->head.count));
        error = -EBUSY;
    }
    if (!error)
        __atomic_store_n(&pager->touches, touches, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&pager->lock);
    return error;
}

void pc_touch(struct pc_pager *pager, uint32_t block, uint64_t page)
{
    struct touches *touches = __atomic_load_n(&pager->touches, __ATOMIC_ACQUIRE);
    uint64_t at;

    if (!touches || __atomic_load_n(&touches->count, __ATOMIC_RELAXED) >= touches->head.count)
        return;
    at = __atomic_fetch_add(&touches->count, 1, __ATOMIC_RELAXED);
    if (at < touches->head.count)
        __atomic_store_n(&touches->entries[at], TOUCHED | (uint64_t)block << 40 | page, __ATOMIC_RELEASE);
}

int64_t pc_touches_read(int fd, uint64_t *out, uint64_t capacity)
{
    struct touches *touches;
    uint64_t count, copied = 0;
    int error = map_touches(fd, &touches);

    if (error)
        return error;
    count = __atomic_load_n(&touches->count, __ATOMIC_ACQUIRE);
    if (count > touches->head.count)
        count = touches->head.count;
    for (uint64_t i = 0; i < count && (!out || copied < capacity); i++) {
        uint64_t entry = __atomic_load_n(&touches->entries[i], __ATOMIC_ACQUIRE);

        if (!(entry & TOUCHED)) /* being written, or its writer was killed */
            continue;
        if (out)
            out[copied] = entry & ~TOUCHED;
        copied++;
    }
    pc_buffer_free(touches, touches_bytes(touches->head.count));
    return (int64_t)copied;
}
