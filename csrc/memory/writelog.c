/* SPDX-License-Identifier: Apache-2.0
 *
 * The write log: which pages of another process's memory are written, seen through its own userfaultfd.
 *
 * That userfaultfd was opened by others, without WP_ASYNC, so each first write to a protected page is a fault that waits for an
 * answer. The thread here gives it: it lifts the protection of the page, and the writer goes on. What was written is then seen in
 * the page tables: a page that is there and not protected was written since it was protected, or has come since. `collect` names
 * such pages and protects them; a write after that is in the next answer, one before it is in the content that the caller reads
 * afterwards.
 *
 * Page tables do not show that a page was given back (MADV_DONTNEED: a balloon). An event tells of it, before it happens: it happens
 * from the moment on in which that was read. So a page that was told of stays in `removed` until a look finds it gone; then it is
 * named. (One that was there and is no more would be too few: it may have come and been read by the caller in between.)
 *
 * Looking takes some nanoseconds a page, so that is not done where nothing can have changed: in a chunk of pages that all were there
 * and protected after the last look, of which none was lifted or told of since. The thread notes and then lifts, and reads events and
 * notes them, under `lock`; `collect` takes the notes under it before it looks. What was done before is in them, then; what comes
 * later is in the next ones. A thread that has written, or given back, has waited for the log's thread before.
 *
 * While such an event has not been read, and for a moment after, no protection changes (EAGAIN): the thread keeps what it could not
 * lift and reads on; `collect` tries again.
 *
 * The end. Unregistering lifts every protection, but wakes no thread that waits to write, so all are woken. A thread that had begun to
 * give memory back may send its event only then, and would wait for ever: the kernel's EAGAIN says that there is one.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core/bits.h"
#include "core/clock.h"
#include "core/runtime.h"
#include "memory/internal.h"
#include "postcopy/uffd.h"

#define EVENTS 64    /* of one read */
#define PENDING 256  /* faults whose answer the kernel refuses for the moment; of more, all that wait are woken and fault again */
#define REGIONS 2048 /* of one scan */
#define CHUNK_PAGES 512
#define RETRY_MS 1
#define PATIENCE_NS UINT64_C(5000000000) /* for memory that is being given back */

struct pc_write_log {
    const struct pc_remote *remote;
    int uffd, wake_fd;
    pthread_t thread;
    bool started;
    bool ending;        /* atomic */
    int error;          /* atomic: why nothing is known any more, as -errno; 0: all is well */
    uint64_t pages, words, chunks, chunk_words;
    uint64_t *maps;                    /* of pages: */
    uint64_t *there;                   /* at this look */
    uint64_t *removed, *taken;         /* told to be given back and not yet seen to be gone: under `lock`, and for this look */
    uint64_t *chunk_maps;              /* of chunks: */
    uint64_t *lifted;                  /* a page of it, since the last look: under `lock` */
    uint64_t *whole, *due;             /* all was there and protected after the last look; to be looked at */
    pthread_mutex_t lock;
    struct pc_pagemap_region *regions;
};

/* ---- the thread ---- */

struct waiting {
    uint64_t address[PENDING];
    uint32_t count;
    bool more; /* than fit: wake all */
};

/* Sets the bits of a range of addresses, each of which stands for so many pages. Under `lock`. */
static void note(const struct pc_write_log *log, uint64_t *map, uint64_t pages, uint64_t start, uint64_t end)
{
    const struct pc_remote *remote = log->remote;
    const uint64_t unit = pages * remote->page_bytes;

    for (uint32_t i = 0; i < remote->count; i++) {
        const struct pc_remote_extent *extent = &remote->extents[i];
        uint64_t from = start > extent->address ? start : extent->address, to = pc_least(end, extent->address + extent->bytes);

        if (from < to) {
            uint64_t first = (from - extent->address + extent->first_byte) / unit;

            pc_bitmap_set_range(map, first, (to - 1 - extent->address + extent->first_byte) / unit + 1 - first);
        }
    }
}

static void wake_all(const struct pc_write_log *log)
{
    for (uint32_t i = 0; i < log->remote->count; i++)
        (void)pc_uffd_wake(log->uffd, log->remote->extents[i].address, log->remote->extents[i].bytes);
}

static void unregister_all(const struct pc_write_log *log, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        (void)pc_uffd_unregister(log->uffd, log->remote->extents[i].address, log->remote->extents[i].bytes);
    wake_all(log);
}

/* Nothing is known from here on, and the process runs on without us. */
static void give_up(struct pc_write_log *log, int error)
{
    __atomic_store_n(&log->error, error, __ATOMIC_RELEASE);
    unregister_all(log, log->remote->count);
}

/* Reads what there is, at most one read. How many events, or -errno. */
static int read_events(struct pc_write_log *log, struct waiting *waiting)
{
    struct pc_uffd_event events[EVENTS];
    int count;

    pthread_mutex_lock(&log->lock); /* before the read, after which the thread that gives memory back goes on */
    count = pc_uffd_read(log->uffd, events, EVENTS);
    for (int i = 0; i < count; i++) {
        const struct pc_uffd_event *event = &events[i];

        if (event->type == PC_UFFD_EVENT_REMOVE || event->type == PC_UFFD_EVENT_UNMAP)
            note(log, log->removed, 1, event->address, event->end);
        else if (event->type == PC_UFFD_EVENT_FORK)
            close(event->uffd);
        else if (event->type == PC_UFFD_EVENT_PAGEFAULT && waiting->count < PENDING)
            waiting->address[waiting->count++] = event->address - event->address % log->remote->page_bytes;
        else if (event->type == PC_UFFD_EVENT_PAGEFAULT)
            waiting->more = true;
    }
    pthread_mutex_unlock(&log->lock);
    return count;
}

/* Lets threads go on that wait to write; what cannot be answered now stays. */
static int answer(struct pc_write_log *log, struct waiting *waiting)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < waiting->count; i++) {
        int error;

        pthread_mutex_lock(&log->lock);
        note(log, log->lifted, CHUNK_PAGES, waiting->address[i], waiting->address[i] + log->remote->page_bytes);
        error = pc_uffd_writeprotect(log->uffd, waiting->address[i], log->remote->page_bytes, 0);
        pthread_mutex_unlock(&log->lock);
        if (error == -EAGAIN)
            waiting->address[kept++] = waiting->address[i];
        else if (error && error != -ENOENT) /* it has left the memory meanwhile, and its waiters with it */
            return error;
    }
    waiting->count = kept;
    if (waiting->more && !kept) {
        waiting->more = false;
        wake_all(log);
    }
    return 0;
}

static void *log_thread(void *argument)
{
    struct pc_write_log *log = argument;
    struct waiting waiting = {.count = 0};
    uint64_t until_ns = 0;

    pc_thread_name("pc-write-log", 0);
    pc_thread_prompt(false);
    for (;;) {
        struct pollfd ready[] = {{.fd = log->uffd, .events = POLLIN}, {.fd = log->wake_fd, .events = POLLIN}};
        bool ending = __atomic_load_n(&log->ending, __ATOMIC_ACQUIRE), known = !__atomic_load_n(&log->error, __ATOMIC_RELAXED);
        int error = 0;

        (void)poll(ready, ending ? 1 : 2, ending || waiting.count || waiting.more ? RETRY_MS : -1);
        if (ready[0].revents & POLLERR) /* it is a blocking one now: the other process, which shares it, has made it one */
            (void)fcntl(log->uffd, F_SETFL, fcntl(log->uffd, F_GETFL) | O_NONBLOCK);
        while ((error = read_events(log, &waiting)) == EVENTS && waiting.count < PENDING)
            ;
        if (error > 0 || error == -EAGAIN || error == -EINTR)
            error = 0;
        if (!error && known)
            error = answer(log, &waiting);
        if (error && known)
            give_up(log, error);
        if (!known || error)
            waiting.count = waiting.more = 0; /* all were woken */
        if (!ending)
            continue;
        /* Until no thread is about to say that it gives memory back. */
        until_ns = until_ns ? until_ns : pc_now_ns() + PATIENCE_NS;
        if (pc_uffd_writeprotect(log->uffd, log->remote->extents[0].address, log->remote->page_bytes, 0) != -EAGAIN ||
            pc_now_ns() > until_ns)
            return NULL;
    }
}

/* ---- beside it ---- */

/* Patient while memory is given back. 0 or -errno. */
static int protect(const struct pc_write_log *log, uint64_t address, uint64_t bytes)
{
    uint64_t until_ns = 0;
    int error;

    while ((error = pc_uffd_writeprotect(log->uffd, address, bytes, PC_UFFD_PROTECT)) == -EAGAIN) {
        const struct timespec moment = {.tv_nsec = 50000};

        until_ns = until_ns ? until_ns : pc_now_ns() + PATIENCE_NS;
        if (pc_now_ns() > until_ns)
            return -ETIMEDOUT;
        (void)nanosleep(&moment, NULL);
    }
    return error;
}

static int register_all(struct pc_write_log *log, char *error, size_t error_bytes)
{
    for (uint32_t i = 0; i < log->remote->count; i++) {
        const struct pc_remote_extent *extent = &log->remote->extents[i];
        int result = pc_uffd_register(log->uffd, extent->address, extent->bytes, PC_UFFD_WP, NULL);

        if (!result)
            continue;
        unregister_all(log, i);
        return pc_fail(-result, error, error_bytes, "write log: the memory of process %d cannot be registered: %s", log->remote->pid,
                       result == -EBUSY ? "a part of it is registered with another userfaultfd" : strerror(-result));
    }
    return 0;
}

/* Looks at a part of the memory: sets `there`, adds what was written to `words`, and protects that unless all is stopped. */
static int look(struct pc_write_log *log, uint64_t first_byte, uint64_t bytes, uint64_t *words, bool stopped)
{
    const uint64_t page_bytes = log->remote->page_bytes;
    uint64_t address, part = pc_remote_part(log->remote, first_byte, bytes, &address), origin = address - first_byte;
    struct pc_pagemap_query query = {
        .start = address,
        .end = address + part,
        .inverted = PC_PAGE_PFNZERO, /* the zero page, which a read maps, is none of its own */
        .all_of = PC_PAGE_PFNZERO,
        .any_of = PC_PAGE_PRESENT | PC_PAGE_SWAPPED,
        .returned = PC_PAGE_WRITTEN,
    };

    while (query.start < query.end) {
        uint64_t walk_end = 0;
        int64_t got = pc_pagemap_scan(log->remote->pagemap, &query, log->regions, REGIONS, &walk_end);

        if (got == -EINTR)
            continue;
        if (got < 0)
            return (int)got;
        if (walk_end <= query.start)
            return -EIO;
        for (int64_t i = 0; i < got; i++) {
            const struct pc_pagemap_region *region = &log->regions[i];
            uint64_t first = (region->start - origin) / page_bytes, pages = (region->end - region->start) / page_bytes;
            int error = 0;

            pc_bitmap_set_range(log->there, first, pages);
            if (!(region->categories & PC_PAGE_WRITTEN))
                continue;
            pc_bitmap_set_range(words, first, pages);
            error = stopped ? 0 : protect(log, region->start, region->end - region->start);
            if (error)
                return error;
        }
        query.start = walk_end;
    }
    return part < bytes ? look(log, first_byte + part, bytes - part, words, stopped) : 0;
}

/* What was noted, and which chunks are to be looked at for it. */
static void take_notes(struct pc_write_log *log)
{
    uint64_t *removed;

    pthread_mutex_lock(&log->lock);
    removed = log->removed;
    log->removed = log->taken;
    log->taken = removed;
    for (uint64_t word = 0; word < log->chunk_words; word++) {
        log->due[word] = log->lifted[word] | ~log->whole[word];
        log->lifted[word] = 0;
    }
    pthread_mutex_unlock(&log->lock);
    for (uint64_t page = 0; (page = pc_bitmap_next(removed, log->pages, page, 1)) < log->pages; page += CHUNK_PAGES - page % CHUNK_PAGES)
        pc_bitmap_set_range(log->due, page / CHUNK_PAGES, 1);
}

/* Of what was told to be given back, that which is gone is named, and the rest waits for another look. */
static void name_removed(struct pc_write_log *log, uint64_t *words)
{
    pthread_mutex_lock(&log->lock);
    for (uint64_t word = 0; word < log->words; word++) {
        if (!log->taken[word])
            continue;
        words[word] |= log->taken[word] & ~log->there[word];
        log->removed[word] |= log->taken[word] & log->there[word];
        log->taken[word] = 0;
    }
    pthread_mutex_unlock(&log->lock);
}

/* All of a run of chunks is as it was (`due` is 0), or is looked at. */
static int visit(struct pc_write_log *log, uint64_t first_chunk, uint64_t end_chunk, bool due, uint64_t *words, bool stopped)
{
    uint64_t first = first_chunk * CHUNK_PAGES, end = pc_least(end_chunk * CHUNK_PAGES, log->pages);
    int error;

    if (!due) {
        pc_bitmap_set_range(log->there, first, end - first);
        return 0;
    }
    error = look(log, first * log->remote->page_bytes, (end - first) * log->remote->page_bytes, words, stopped);
    for (uint64_t chunk = first_chunk; !error && chunk < end_chunk; chunk++, first += CHUNK_PAGES) {
        uint64_t last = pc_least(first + CHUNK_PAGES, log->pages);

        pc_bitmap_clear_range(log->whole, chunk, 1);
        if (!stopped && pc_bitmap_next(log->there, last, first, 0) >= last)
            pc_bitmap_set_range(log->whole, chunk, 1);
    }
    return error;
}

static int collect(struct pc_write_log *log, uint64_t *words, bool stopped)
{
    int error = 0;

    memset(log->there, 0, log->words * sizeof(*log->there));
    take_notes(log);
    for (uint64_t chunk = 0, end; !error && chunk < log->chunks; chunk = end) {
        bool due = pc_bits_test(log->due, chunk);

        end = pc_bitmap_next(log->due, log->chunks, chunk, !due);
        error = visit(log, chunk, end, due, words, stopped);
    }
    if (!error)
        name_removed(log, words);
    if (__atomic_load_n(&log->error, __ATOMIC_ACQUIRE)) /* after the look: what was unregistered meanwhile shows nothing */
        error = log->error;
    return error || !pc_remote_has_ended(log->remote) ? error : -ESRCH;
}

/* From here on its writes are seen. */
static int begin(struct pc_write_log *log, char *error, size_t error_bytes)
{
    uint64_t *scratch = pc_buffer_new(log->words * sizeof(*scratch));
    int result = scratch ? pc_thread_start(&log->thread, log_thread, log) : -ENOMEM;

    log->started = !result;
    if (!result) {
        wake_all(log); /* one that died may have left some who wait */
        result = collect(log, scratch, false);
    }
    pc_buffer_free(scratch, log->words * sizeof(*scratch));
    if (!log->started)
        unregister_all(log, log->remote->count);
    return result ? pc_fail(-result, error, error_bytes, "write log: the memory of process %d cannot be write-protected: %s",
                            log->remote->pid, strerror(-result))
                  : 0;
}

int pc_write_log_new(int uffd, const struct pc_remote *remote, struct pc_write_log **out, char *error, size_t error_bytes)
{
    struct pc_write_log *log = calloc(1, sizeof(*log));
    int result;

    if (!log)
        return pc_fail(ENOMEM, error, error_bytes, "write log: %s", strerror(ENOMEM));
    log->remote = remote;
    log->pages = remote->size_bytes / remote->page_bytes;
    log->words = pc_bitmap_words(log->pages);
    log->chunks = (log->pages + CHUNK_PAGES - 1) / CHUNK_PAGES;
    log->chunk_words = pc_bitmap_words(log->chunks);
    pc_lock_init(&log->lock);
    log->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    log->uffd = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
    result = log->wake_fd < 0 || log->uffd < 0 ? -errno : 0;
    log->maps = pc_buffer_new(3 * log->words * sizeof(uint64_t));
    log->chunk_maps = calloc(3 * log->chunk_words, sizeof(uint64_t));
    log->regions = malloc(REGIONS * sizeof(*log->regions));
    if (!result && (!log->maps || !log->chunk_maps || !log->regions))
        result = -ENOMEM;
    if (result) {
        (void)pc_fail(-result, error, error_bytes, "write log: %s", strerror(-result));
    } else {
        log->there = log->maps;
        log->removed = log->maps + log->words;
        log->taken = log->removed + log->words;
        log->lifted = log->chunk_maps;
        log->whole = log->lifted + log->chunk_words;
        log->due = log->whole + log->chunk_words;
        result = register_all(log, error, error_bytes);
        if (!result)
            result = begin(log, error, error_bytes);
    }
    if (result)
        pc_write_log_free(log);
    else
        *out = log;
    return result;
}

int64_t pc_write_log_collect(struct pc_write_log *log, uint64_t *words, int stopped)
{
    uint64_t before = pc_bitmap_count(words, log->pages);
    int error = collect(log, words, stopped);

    return error ? error : (int64_t)(pc_bitmap_count(words, log->pages) - before);
}

void pc_write_log_free(struct pc_write_log *log)
{
    const uint64_t one = 1;

    if (log->started) {
        unregister_all(log, log->remote->count);
        __atomic_store_n(&log->ending, true, __ATOMIC_RELEASE);
        (void)!write(log->wake_fd, &one, sizeof(one));
        pthread_join(log->thread, NULL);
    }
    if (log->uffd >= 0)
        close(log->uffd);
    if (log->wake_fd >= 0)
        close(log->wake_fd);
    if (log->maps)
        pc_buffer_free(log->maps, 3 * log->words * sizeof(uint64_t));
    pthread_mutex_destroy(&log->lock);
    free(log->chunk_maps);
    free(log->regions);
    free(log);
}
