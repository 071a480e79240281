/* SPDX-License-Identifier: Apache-2.0
 *
 * The write log: which pages of another process's memory are written, seen through its own userfaultfd.
 *
 * That userfaultfd was opened by others, without WP_ASYNC, so each first write to a protected page is a fault that waits for an
 * answer. The thread here gives it: it lifts the protection of the page, and the writer goes on. What was written is then seen in
 * the page tables: a page that is there and not protected was written since it was protected, or has come since; one that was there
 * and is no more was given back (MADV_DONTNEED: a balloon). So nothing is noted in between, no lock is taken, and nothing can be lost
 * there. `collect` names such pages and protects them; a write after that is in the next answer, one before it is in the content
 * that the caller reads afterwards. (An event tells of memory that is given back, but before it happens: it may be there still when
 * `collect` looks, and is gone at the next look.)
 *
 * While such an event has not been read, and for a moment after, no protection changes (EAGAIN): the thread keeps what it could not
 * lift and reads on; `collect` tries again.
 *
 * The end. Unregistering lifts every protection, but wakes nobody who waits for a write, so all are woken. One who had begun to
 * give memory back may tell only then, and would wait for ever: the kernel's EAGAIN says that there is one.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/runtime.h"
#include "memory/internal.h"
#include "postcopy/uffd.h"

#define EVENTS 64    /* of one read */
#define PENDING 256  /* faults whose answer the kernel refuses for the moment; of more, all that wait are woken and fault again */
#define REGIONS 2048 /* of one scan */
#define RETRY_MS 1
#define PATIENCE_NS UINT64_C(5000000000) /* for memory that is being given back */

struct pc_write_log {
    const struct pc_remote *remote;
    int uffd, wake_fd;
    pthread_t thread;
    bool started;
    bool ending;        /* atomic */
    int error;          /* atomic: why nothing is known any more, as -errno; 0: all is well */
    uint64_t words;
    uint64_t *maps;              /* two of them: */
    uint64_t *there, *was_there; /* pages, at this look and the last one */
    struct pc_pagemap_region *regions;
};

/* ---- the thread ---- */

struct waiting {
    uint64_t address[PENDING];
    uint32_t count;
    bool more; /* than fit: wake all */
};

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
    int count = pc_uffd_read(log->uffd, events, EVENTS);

    for (int i = 0; i < count; i++) {
        const struct pc_uffd_event *event = &events[i];

        if (event->type == PC_UFFD_EVENT_FORK)
            close(event->uffd);
        else if (event->type == PC_UFFD_EVENT_PAGEFAULT && waiting->count < PENDING)
            waiting->address[waiting->count++] = event->address - event->address % log->remote->page_bytes;
        else if (event->type == PC_UFFD_EVENT_PAGEFAULT)
            waiting->more = true;
    }
    return count;
}

/* Answers those who wait; what cannot be answered now stays. */
static int answer(struct pc_write_log *log, struct waiting *waiting)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < waiting->count; i++) {
        int error = pc_uffd_writeprotect(log->uffd, waiting->address[i], log->remote->page_bytes, 0);

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
        if (ready[0].revents & POLLERR) /* someone has made it blocking: it is shared with the other process */
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
        /* Until nobody is about to say that memory is given back. */
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

/* Looks at a part that lies in one piece: sets `there`, adds what was written to `words`, and protects that unless all is stopped. */
static int look(struct pc_write_log *log, const struct pc_remote_extent *extent, uint64_t *words, bool stopped)
{
    const uint64_t origin = extent->address - extent->first_byte, page_bytes = log->remote->page_bytes;
    struct pc_pagemap_query query = {
        .start = extent->address,
        .end = extent->address + extent->bytes,
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
    return 0;
}

static int collect(struct pc_write_log *log, uint64_t *words, bool stopped)
{
    uint64_t *there = log->was_there;
    int error = 0;

    log->was_there = log->there;
    log->there = there;
    memset(there, 0, log->words * sizeof(*there));
    for (uint32_t i = 0; !error && i < log->remote->count; i++)
        error = look(log, &log->remote->extents[i], words, stopped);
    for (uint64_t word = 0; !error && word < log->words; word++)
        words[word] |= log->was_there[word] & ~there[word];
    if (__atomic_load_n(&log->error, __ATOMIC_ACQUIRE)) /* after the look: what was unregistered meanwhile shows nothing */
        error = log->error;
    return error;
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
    log->words = pc_bitmap_words(remote->size_bytes / remote->page_bytes);
    log->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    log->uffd = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
    result = log->wake_fd < 0 || log->uffd < 0 ? -errno : 0;
    log->maps = pc_buffer_new(2 * log->words * sizeof(uint64_t));
    log->regions = malloc(REGIONS * sizeof(*log->regions));
    if (!result && (!log->maps || !log->regions))
        result = -ENOMEM;
    if (result) {
        (void)pc_fail(-result, error, error_bytes, "write log: %s", strerror(-result));
    } else {
        log->there = log->maps;
        log->was_there = log->maps + log->words;
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
    uint64_t pages = log->remote->size_bytes / log->remote->page_bytes, before = pc_bitmap_count(words, pages);
    int error = collect(log, words, stopped);

    return error ? error : (int64_t)(pc_bitmap_count(words, pages) - before);
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
        pc_buffer_free(log->maps, 2 * log->words * sizeof(uint64_t));
    free(log->regions);
    free(log);
}
