/* SPDX-License-Identifier: Apache-2.0
 *
 * Pages that are here: memory in several parts at addresses that are told late, image files, staging, what is prefetched, and a
 * pager that leaves.
 *
 * Linked with --wrap of preadv2(2), by which a case decides what the page cache has, what a disk says and when; and of pc_local_stage, after
 * which it may have a thread wait that still has its claim.
 */
#include <sys/uio.h>

#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

ssize_t __real_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags);
ssize_t __wrap_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags);

static atomic_bool uncached;          /* the page cache has nothing */
static atomic_int broken;             /* a disk says this */
static atomic_bool slow;              /* a disk says nothing, until this is false again */
static atomic_int reading;            /* reads that wait for it */
static atomic_ulong pages_read;       /* by readers */
static atomic_ulong order[MAX_PAGES]; /* in which order, as offsets */

ssize_t __wrap_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    if (offset < 0) /* a userfaultfd */
        return __real_preadv2(fd, parts, count, offset, flags);
    if (flags & RWF_NOWAIT && atomic_load(&uncached)) {
        errno = EAGAIN;
        return -1;
    }
    if (!(flags & RWF_NOWAIT)) {
        atomic_store(&order[atomic_fetch_add(&pages_read, 1) % MAX_PAGES], (unsigned long)offset);
        atomic_fetch_add(&reading, 1);
        WAIT_UNTIL(!atomic_load(&slow));
        atomic_fetch_sub(&reading, 1);
        if (atomic_load(&broken)) {
            errno = atomic_load(&broken);
            return -1;
        }
    }
    return __real_preadv2(fd, parts, count, offset, flags);
}

int __real_pc_local_stage(struct pc_pager *pager, uint32_t index, uint64_t first, uint64_t pages, const uint8_t *content);
int __wrap_pc_local_stage(struct pc_pager *pager, uint32_t index, uint64_t first, uint64_t pages, const uint8_t *content);

static atomic_bool stays_claimed;
static atomic_int staged; /* runs of pages */

int __wrap_pc_local_stage(struct pc_pager *pager, uint32_t index, uint64_t first, uint64_t pages, const uint8_t *content)
{
    int error = __real_pc_local_stage(pager, index, first, pages, content);

    atomic_fetch_add(&staged, 1);
    WAIT_UNTIL(!atomic_load(&stays_claimed));
    return error;
}

/* ---- images ------------------------------------------------------------------------------------------------------- */

#define OFFSET 12288 /* of the first block in the image */

/* An image of all blocks, one behind the other: what is absent is a hole. */
static int make_image(const struct rig *rig)
{
    int fd = temporary_file(0);
    uint8_t *content = malloc(rig->page_bytes);
    uint64_t at = OFFSET;

    CHECK(content != NULL);
    for (uint32_t i = 0; i < rig->blocks; i++)
        for (uint64_t page = 0; page < rig->pages[i]; page++, at += rig->page_bytes) {
            if (content_of(i, page) == ABSENT)
                continue;
            make_page(i, page, rig->page_bytes, content);
            CHECK_EQ(pwrite(fd, content, rig->page_bytes, (off_t)at), rig->page_bytes);
        }
    CHECK_SYS(ftruncate(fd, (off_t)at));
    free(content);
    return fd;
}

static void set_local(const struct rig *rig, int fd)
{
    uint64_t at = OFFSET;

    for (uint32_t i = 0; i < rig->blocks; at += rig->pages[i++] * rig->page_bytes)
        if (pc_pager_set_local(rig->pager, i, fd, at, NULL, message, sizeof(message)))
            FAIL("%s", message);
}

static void touch_all(struct rig *rig)
{
    static struct visit visits[MAX_BLOCKS * MAX_PAGES];
    struct toucher touchers[2];
    size_t count = shuffled(rig, -1, visits);

    start_toucher(&touchers[0], rig, 0, visits, count);
    for (size_t i = 0; i < count / 2; i++) {
        struct visit other = visits[i];

        visits[i] = visits[count - 1 - i];
        visits[count - 1 - i] = other;
    }
    start_toucher(&touchers[1], rig, 1, visits, count);
    join_toucher(&touchers[0]);
    join_toucher(&touchers[1]);
}

/* Two blocks of an image; every page by demand, and nothing is asked of anyone. */
static void serve_image(int kind, bool cached)
{
    const uint64_t pages[] = {scaled(kind, 700), scaled(kind, 300)};
    struct pc_pager_stats stats;
    struct rig rig;
    int fd;

    open_pager(&rig, kind, 2, pages);
    fd = make_image(&rig);
    set_local(&rig, fd);
    close(fd);
    atomic_store(&uncached, !cached);
    arm_all(&rig, 0);
    touch_all(&rig);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    wait_pending(&rig, 0);
    stats = pager_stats(&rig);
    CHECK_EQ(stats.local_pages, count_content(&rig, DATA));
    CHECK_EQ(stats.demand_pages, count_content(&rig, DATA));
    CHECK_EQ(stats.zero_pages, all_pages(&rig) - count_content(&rig, DATA));
    CHECK_EQ(stats.requests, 0);
    CHECK_EQ(stats.prefetched_pages, 0);
    if (cached)
        CHECK_EQ(stats.local_waits, 0);
    else
        CHECK(stats.local_waits >= count_content(&rig, DATA) && stats.local_waits <= all_pages(&rig));
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    check_content(&rig);
    close_rig(&rig);
}

static void an_image_in_the_page_cache(int kind)
{
    serve_image(kind, true);
}
OF_EACH_KIND(an_image_in_the_page_cache)

static void an_image_on_a_disk(int kind)
{
    serve_image(kind, false);
}
OF_EACH_KIND(an_image_on_a_disk)

/* Some pages are here, the others at the source; each comes from where it is. */
static void part_of_a_block(void)
{
    const uint64_t pages[] = {640};
    uint64_t here[MAX_PAGES / 64] = {0};
    struct visit visits[MAX_PAGES];
    struct toucher toucher;
    struct rig rig;
    uint64_t local = 0;
    int fd;

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    open_server(&rig, 0);
    for (uint64_t page = 0; page < pages[0]; page++)
        if (mix(test_.seed ^ page / 8) & 1) {
            pc_bitmap_set_range(here, page, 1);
            local += content_of(0, page) == DATA;
        }
    fd = make_image(&rig);
    CHECK_EQ(pc_pager_set_local(rig.pager, 0, fd, OFFSET, here, message, sizeof(message)), 0);
    close(fd);
    tell_page_map(&rig);
    arm_all(&rig, 0);
    connect_urgent(&rig, 0, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    start_toucher(&toucher, &rig, -1, visits, shuffled(&rig, -1, visits));
    join_toucher(&toucher);
    CHECK_EQ(pc_pager_prefetch_all(rig.pager), 0);
    CHECK(pc_pager_request_missing(rig.pager, UINT64_MAX) >= 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(&rig).local_pages, local);
    CHECK_EQ(server_stats(&rig).requests, pager_stats(&rig).requests);
    CHECK(pager_stats(&rig).requests <= pages[0] - local);
    check_content(&rig);
    close_rig(&rig);
}

/* A read that does not end delays who waits for it and nobody else. */
static void a_slow_disk(void)
{
    const uint64_t pages[] = {64};
    struct toucher waiting, other;
    struct rig rig;
    uint64_t page = 3, first = 0;
    int fd;

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    fd = make_image(&rig);
    set_local(&rig, fd);
    CHECK_EQ(pc_pager_set_readers(rig.pager, 1, 1), -EBUSY);
    arm_all(&rig, 0);
    atomic_store(&slow, true);
    atomic_store(&uncached, true);
    first = next_data_page(&rig, &page);
    touch_one(&waiting, &rig, 0, first);
    WAIT_UNTIL(atomic_load(&reading) == 1);
    atomic_store(&uncached, false);
    for (int i = 0; i < 5; i++) {
        touch_one(&other, &rig, 0, next_data_page(&rig, &page));
        join_toucher(&other);
    }
    wait_pending(&rig, 1);
    CHECK_EQ(pc_pager_prefetch_all(rig.pager), 0); /* behind demand: it does not begin */
    pc_sleep_ns(SERVED_MS * UINT64_C(1000000));
    CHECK_EQ(atomic_load(&reading), 1);
    CHECK_EQ(pager_stats(&rig).prefetched_pages, 0);
    atomic_store(&slow, false);
    join_toucher(&waiting);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    close(fd);
    close_rig(&rig);
}

/* What cannot be read is an error that is told, never zeros; who waits is served when there is a file again. */
static void a_broken_image(void)
{
    const uint64_t pages[] = {64};
    struct toucher toucher[3];
    struct pc_event event;
    struct rig rig;
    int fd, empty = temporary_file(0);

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    CHECK_EQ(pc_pager_set_local(rig.pager, 0, empty, 0, NULL, message, sizeof(message)), -ENODATA);
    CHECK_EQ(pc_pager_set_local(rig.pager, 1, empty, 0, NULL, message, sizeof(message)), -EINVAL);
    CHECK_EQ(pc_pager_set_local(rig.pager, 0, -1, 0, NULL, message, sizeof(message)), -ENODATA);
    fd = make_image(&rig);
    set_local(&rig, fd);
    CHECK_EQ(pc_pager_set_local(rig.pager, 0, fd, 0, NULL, message, sizeof(message)), -EINVAL); /* another place */
    arm_all(&rig, 0);
    CHECK_SYS(ftruncate(fd, OFFSET));
    touch_one(&toucher[0], &rig, 0, 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, 0, 0, &event);
    CHECK_EQ(event.error, ENODATA);
    CHECK(strstr(event.text, "ends before") != NULL);
    atomic_store(&uncached, true);
    atomic_store(&broken, EIO);
    touch_one(&toucher[1], &rig, 0, 5);
    touch_one(&toucher[2], &rig, 0, 6);
    if (content_of(0, 5) == DATA || content_of(0, 6) == DATA || content_of(0, 5) == ZEROED || content_of(0, 6) == ZEROED) {
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, 0, 0, &event);
        CHECK_EQ(event.error, EIO);
    }
    CHECK_EQ(pc_pager_prefetch_all(rig.pager), 0); /* it ends by the error */
    WAIT_UNTIL(!pc_pager_prefetching(rig.pager));
    CHECK_EQ(atomic_load(&toucher[0].done), 0);
    close(fd);
    atomic_store(&broken, 0);
    fd = make_image(&rig);
    set_local(&rig, fd);
    for (int i = 0; i < 3; i++)
        join_toucher(&toucher[i]);
    CHECK_EQ(pc_pager_prefetch_all(rig.pager), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    check_content(&rig);
    close(fd);
    close(empty);
    close_rig(&rig);
}

/* ---- addresses ---------------------------------------------------------------------------------------------------- */

struct parts { /* one block that lies in three parts: the second below the first, and a third elsewhere */
    uint8_t *low, *high, *apart;
    uint64_t first, second, third; /* pages of each */
};

#define UNGATED 0
#define GATED (UINT64_C(1) << 3) /* EVENT_REMOVE */

/* A pager with one block without an address, and memory that a userfaultfd (returned) is opened for. */
static int open_parts(struct rig *rig, struct parts *parts, const struct pc_memory *memory, uint64_t features)
{
    uint64_t bytes = memory->page_bytes;
    int uffd;

    need_uffd();
    memset(rig, 0, sizeof(*rig));
    rig->kind = memory->kind;
    rig->page_bytes = bytes;
    rig->blocks = 1;
    rig->pages[0] = memory->size_bytes / bytes;
    *parts = (struct parts){.first = rig->pages[0] / 2, .second = rig->pages[0] / 4};
    parts->third = rig->pages[0] - parts->first - parts->second;
    parts->low = CHECK_SYS(mmap(NULL, (parts->first + parts->second) * bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    parts->high = parts->low + parts->second * bytes;
    parts->apart =
        CHECK_SYS(mmap(NULL, parts->third * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    CHECK_EQ(pc_pager_new(-1, &rig->pager), 0);
    rig->from_pager = (struct inbox){.owner = rig->pager, .fd = pc_pager_event_fd(rig->pager), .next = next_pager_event};
    CHECK_EQ(pc_pager_add_block(rig->pager, memory, -1), 0);
    uffd = pc_uffd_open(PC_UFFD_ANY, features, NULL);
    if (uffd < 0)
        SKIP("uffd-features", "no userfaultfd with features %#llx: %s", (unsigned long long)features, strerror(-uffd));
    return uffd;
}

static void arm_parts(const struct rig *rig, const struct parts *parts, int uffd, uint64_t features)
{
    const struct {
        uint64_t first, pages;
        const uint8_t *at;
    } all[] = {{parts->first, parts->second, parts->low},
               {0, parts->first, parts->high},
               {parts->first + parts->second, parts->third, parts->apart}};

    CHECK_EQ(pc_pager_adopt_shard(rig->pager, CHECK_SYS(fcntl(uffd, F_DUPFD_CLOEXEC, 0)), features, 0, message, sizeof(message)), 0);
    for (int i = 0; i < 3; i++)
        if (pc_pager_arm_at(rig->pager, 0, 0, all[i].first, all[i].pages, (uint64_t)(uintptr_t)all[i].at, message, sizeof(message)))
            FAIL("%s", message);
}

static const uint8_t *part_page(const struct rig *rig, const struct parts *parts, uint64_t page)
{
    if (page < parts->first)
        return parts->high + page * rig->page_bytes;
    if (page < parts->first + parts->second)
        return parts->low + (page - parts->first) * rig->page_bytes;
    return parts->apart + (page - parts->first - parts->second) * rig->page_bytes;
}

struct looker { /* a thread that looks at every page of the parts */
    const struct rig *rig;
    const struct parts *parts;
    uint64_t from;
    pthread_t thread;
};

static void *look(void *argument)
{
    const struct looker *looker = argument;

    for (uint64_t i = 0, page; i < looker->rig->pages[0]; i++) {
        page = (looker->from + i * 7) % looker->rig->pages[0];
        if (!is_page(0, page, looker->rig->page_bytes, part_page(looker->rig, looker->parts, page)))
            FAIL("page %llu differs", (unsigned long long)page);
    }
    return NULL;
}

static void look_at_parts(const struct rig *rig, const struct parts *parts)
{
    struct looker lookers[3];

    for (uint64_t i = 0; i < 3; i++) {
        lookers[i] = (struct looker){.rig = rig, .parts = parts, .from = i * rig->pages[0] / 3};
        CHECK_EQ(pthread_create(&lookers[i].thread, NULL, look, &lookers[i]), 0);
    }
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_join(lookers[i].thread, NULL), 0);
}

static const struct pc_memory nowhere = {.size_bytes = 1000 * 4096, .page_bytes = 4096, .kind = PC_MEMORY_ANON, .fd = -1};

static void parts_of_an_image(void)
{
    struct parts parts;
    struct rig rig;
    int uffd = open_parts(&rig, &parts, &nowhere, GATED), fd = make_image(&rig);

    set_local(&rig, fd);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 0, 1, message, sizeof(message)), -EINVAL);
    arm_parts(&rig, &parts, uffd, GATED);
    CHECK_EQ(pc_pager_arm_at(rig.pager, 0, 0, 0, 1, 4096, message, sizeof(message)), -EBUSY);
    look_at_parts(&rig, &parts);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    look_at_parts(&rig, &parts);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    CHECK_LEAKS();
    close(uffd);
    close(fd);
}

/* The same placed in the background alone, by runs that cross the edges of parts. */
static void parts_in_the_background(void)
{
    struct parts parts;
    struct rig rig;
    int uffd = open_parts(&rig, &parts, &nowhere, UNGATED), fd = make_image(&rig);

    CHECK_EQ(pc_pager_set_readers(rig.pager, 1, 0), -EINVAL);
    CHECK_EQ(pc_pager_set_readers(rig.pager, 1, 3), 0);
    set_local(&rig, fd);
    CHECK_EQ(pc_pager_prefetch_all(rig.pager), 0); /* before there is any memory */
    arm_parts(&rig, &parts, uffd, UNGATED);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    WAIT_UNTIL(!pc_pager_prefetching(rig.pager));
    CHECK_EQ(pager_stats(&rig).prefetched_pages, count_content(&rig, DATA));
    CHECK_EQ(pager_stats(&rig).faults, 0);
    look_at_parts(&rig, &parts);
    CHECK_EQ(pager_stats(&rig).demand_pages, 0);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    close(uffd);
    close(fd);
}

/* ---- working sets ------------------------------------------------------------------------------------------------- */

/* The order of first touch is logged; replayed it leaves no fault, zero pages included. */
static void a_working_set(void)
{
    const uint64_t pages[] = {600};
    static uint64_t touched[MAX_PAGES];
    struct visit visits[MAX_PAGES];
    struct pc_page_run runs[MAX_PAGES];
    struct toucher toucher;
    struct rig rig;
    size_t count;
    int fd, log = pc_touches_new(pages[0]);

    CHECK(log >= 0);
    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    fd = make_image(&rig);
    set_local(&rig, fd);
    CHECK_EQ(pc_pager_record_touches(rig.pager, fd), -EINVAL);
    CHECK_EQ(pc_pager_record_touches(rig.pager, log), 0);
    CHECK_EQ(pc_pager_record_touches(rig.pager, log), -EBUSY);
    arm_all(&rig, 0);
    count = shuffled(&rig, -1, visits) / 2;
    start_toucher(&toucher, &rig, -1, visits, count);
    join_toucher(&toucher);
    CHECK_EQ(pc_touches_read(log, NULL, 0), count);
    CHECK_EQ(pc_touches_read(log, touched, 10), 10);
    CHECK_EQ(pc_touches_read(log, touched, MAX_PAGES), count);
    CHECK_EQ(pc_touches_read(fd, touched, MAX_PAGES), -EINVAL);
    for (size_t i = 0; i < count; i++) {
        CHECK_EQ(touched[i], visits[i].page);
        runs[i] = (struct pc_page_run){.first_page = touched[i], .pages = 1};
    }
    CHECK_EQ(pc_pager_prefetch_all(rig.pager), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    close_rig(&rig);

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    CHECK_EQ(pc_pager_set_readers(rig.pager, 1, 1), 0); /* of several, each has its own turn */
    set_local(&rig, fd);
    arm_all(&rig, 0);
    atomic_store(&pages_read, 0);
    runs[count] = (struct pc_page_run){.first_page = 599, .pages = 2};
    CHECK_EQ(pc_pager_prefetch_runs(rig.pager, runs, count + 1), -EINVAL);
    CHECK_EQ(pc_pager_prefetch_runs(rig.pager, runs, count), 0);
    WAIT_UNTIL(!pc_pager_prefetching(rig.pager));
    CHECK_EQ(pager_stats(&rig).set_pages, count);
    CHECK_EQ(pager_stats(&rig).set_hits, count);
    CHECK_EQ(pager_stats(&rig).prefetched_pages, count);
    for (size_t i = 0, at = 0; i < count; i++) /* those with content, or with zeros that were written, are read in that order */
        if (content_of(0, touched[i]) != ABSENT)
            CHECK_EQ(atomic_load(&order[at++]), OFFSET + touched[i] * rig.page_bytes);
    start_toucher(&toucher, &rig, -1, visits, count);
    join_toucher(&toucher);
    CHECK_EQ(pager_stats(&rig).faults, 0);
    CHECK_EQ(pc_pager_prefetch_all(rig.pager), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    check_content(&rig);
    close(fd);
    close(log);
    close_rig(&rig);
}

/* More touches than there is room for are not logged, and harm nothing. */
static void a_full_log(void)
{
    const uint64_t pages[] = {100};
    uint64_t touched[MAX_PAGES];
    struct rig rig;
    int fd, log = pc_touches_new(7);

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    fd = make_image(&rig);
    set_local(&rig, fd);
    CHECK_EQ(pc_pager_record_touches(rig.pager, log), 0);
    arm_all(&rig, 0);
    touch_all(&rig);
    CHECK_EQ(pc_touches_read(log, touched, MAX_PAGES), 7);
    close(fd);
    close(log);
    close_rig(&rig);
}

/* Demand, the prefetch of everything and a working set at once, on memory that is thrown away meanwhile: each page is right. */
static void *remove_some(void *argument)
{
    struct looker *looker = argument;

    for (uint64_t page = 0; page < looker->parts->third; page += 5)
        CHECK_SYS(madvise((void *)(uintptr_t)(looker->parts->apart + page * looker->rig->page_bytes), looker->rig->page_bytes,
                          MADV_DONTNEED));
    return NULL;
}

static void everything_at_once(void)
{
    struct pc_page_run runs[] = {{.first_page = 0, .pages = 300}, {.first_page = 100, .pages = 800}, {.first_page = 999, .pages = 1}};
    struct parts parts;
    struct rig rig;
    struct looker looker[2];
    int uffd = open_parts(&rig, &parts, &nowhere, GATED), fd = make_image(&rig);

    CHECK_EQ(pc_pager_set_readers(rig.pager, 2, 3), 0);
    set_local(&rig, fd);
    atomic_store(&uncached, test_below(2));
    arm_parts(&rig, &parts, uffd, GATED);
    looker[0] = (struct looker){.rig = &rig, .parts = &parts};
    CHECK_EQ(pthread_create(&looker[0].thread, NULL, remove_some, &looker[0]), 0);
    CHECK_EQ(pc_pager_prefetch_all(rig.pager), 0);
    CHECK_EQ(pc_pager_prefetch_runs(rig.pager, runs, 3), 0);
    CHECK_EQ(pc_pager_prefetch_runs(rig.pager, runs + 1, 1), 0);
    for (uint64_t page = 0; page < parts.first + parts.second; page++)
        CHECK(is_page(0, page * 7 % (parts.first + parts.second), rig.page_bytes,
                      part_page(&rig, &parts, page * 7 % (parts.first + parts.second))));
    CHECK_EQ(pthread_join(looker[0].thread, NULL), 0);
    for (uint64_t page = 0; page < parts.third; page++) {
        const uint8_t *at = parts.apart + page * rig.page_bytes;

        CHECK(page % 5 ? is_page(0, parts.first + parts.second + page, rig.page_bytes, at) : pc_is_zero(at, rig.page_bytes));
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    wait_pending(&rig, 0);
    CHECK_EQ(pc_pager_prefetch_stop(rig.pager), 0);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    close(uffd);
    close(fd);
}

/* ---- staging ------------------------------------------------------------------------------------------------------ */

static uint64_t data_bytes(int fd)
{
    struct stat status;

    CHECK_SYS(fstat(fd, &status));
    return (uint64_t)status.st_blocks * 512;
}

static int make_staging(const struct rig *rig)
{
    int fd = CHECK_SYS(memfd_create("staging", MFD_CLOEXEC));

    CHECK_SYS(ftruncate(fd, (off_t)(rig->pages[0] * rig->page_bytes)));
    return fd;
}

/* Every page that has content is pushed, but for those in `but`. */
static void push_all(struct rig *rig, int fd, uint64_t step, uint64_t offset)
{
    for (uint64_t page = offset; page < rig->pages[0]; page += step)
        if (content_of(0, page) == DATA)
            serve_page(rig, fd, 0, page);
}

static uint64_t count_received(const struct rig *rig)
{
    uint64_t words[MAX_PAGES / 64];

    CHECK_EQ(pc_pager_received(rig->pager, 0, words), 0);
    return pc_bitmap_count(words, rig->pages[0]);
}

/* Precopy to a machine that has no memory yet: what comes waits in the memfd, some of it is forgotten and comes again or is asked for, and
 * all of it is placed when there is memory. */
static void staged_before_there_is_memory(void)
{
    uint64_t zero[MAX_PAGES / 64] = {0}, stale[MAX_PAGES / 64] = {0};
    struct parts parts;
    struct pc_frame frame;
    struct rig rig;
    int uffd = open_parts(&rig, &parts, &nowhere, GATED), fd = make_staging(&rig), bulk, urgent;
    uint64_t data = count_content(&rig, DATA), forgotten = 0;
    struct looker looker = {.rig = &rig, .parts = &parts};

    for (uint64_t page = 0; page < rig.pages[0]; page++) {
        if (content_of(0, page) != DATA)
            pc_bitmap_set_range(zero, page, 1);
        else if (page % 9 == 0)
            pc_bitmap_set_range(stale, page, 1), forgotten++;
    }
    CHECK_EQ(pc_pager_stage(rig.pager, 0, uffd), -EINVAL);
    CHECK_EQ(pc_pager_stage(rig.pager, 0, fd), 0);
    CHECK_EQ(pc_pager_stage(rig.pager, 0, fd), -EBUSY);
    CHECK_EQ(pc_pager_set_local(rig.pager, 0, fd, 0, NULL, message, sizeof(message)), -EBUSY);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0);
    bulk = script_bulk(&rig, 0);
    push_all(&rig, bulk, 1, 0);
    WAIT_UNTIL(count_received(&rig) == rig.pages[0]);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_COMPLETE);
    CHECK_EQ(pager_stats(&rig).resident_pages, rig.pages[0] - data);
    CHECK_EQ(data_bytes(fd), data * rig.page_bytes);
    CHECK_EQ(pc_pager_request_missing(rig.pager, UINT64_MAX), 0);
    CHECK_EQ(pc_pager_forget(rig.pager, 0, stale), 0);
    CHECK_EQ(count_received(&rig), rig.pages[0] - forgotten);
    CHECK_EQ(data_bytes(fd), (data - forgotten) * rig.page_bytes);
    push_all(&rig, bulk, 18, 0); /* half of them in another round, the rest after the pause, by demand */

    WAIT_UNTIL(data_bytes(fd) > (data - forgotten) * rig.page_bytes);
    arm_parts(&rig, &parts, uffd, GATED);
    CHECK_EQ(pc_pager_forget(rig.pager, 0, stale), -EBUSY);
    urgent = script_urgent(&rig, 0);
    CHECK_EQ(pthread_create(&looker.thread, NULL, look, &looker), 0);
    while (!find_event(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, 0, NULL))
        if (speaks(urgent, 1)) {
            CHECK(receive_frame(urgent, &frame));
            CHECK(frame.first_page % 9 == 0); /* the others are here */
            serve_page(&rig, urgent, 0, frame.first_page);
        }
    CHECK_EQ(pthread_join(looker.thread, NULL), 0);
    WAIT_UNTIL(!pc_pager_prefetching(rig.pager));
    CHECK_EQ(data_bytes(fd), 0);
    CHECK(pager_stats(&rig).local_pages >= data - forgotten);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    look_at_parts(&rig, &parts);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    CHECK_LEAKS();
    close(uffd);
    close(fd);
    close(bulk);
    close(urgent);
}

/* Pages arrive while the memory they belong to is armed: none is left behind in the memfd. */
struct pusher {
    struct rig *rig;
    int fd;
    uint64_t offset;
};

static void *push(void *argument)
{
    struct pusher *pusher = argument;

    push_all(pusher->rig, pusher->fd, 2, pusher->offset);
    return NULL;
}

static void staged_while_it_is_armed(void)
{
    uint64_t zero[MAX_PAGES / 64] = {0};
    struct pusher pushers[2];
    struct parts parts;
    pthread_t threads[2];
    struct rig rig;
    int uffd = open_parts(&rig, &parts, &nowhere, GATED), fd = make_staging(&rig);

    for (uint64_t page = 0; page < rig.pages[0]; page++)
        if (content_of(0, page) != DATA)
            pc_bitmap_set_range(zero, page, 1);
    CHECK_EQ(pc_pager_stage(rig.pager, 0, fd), 0);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0);
    for (uint32_t i = 0; i < 2; i++) {
        pushers[i] = (struct pusher){.rig = &rig, .fd = script_bulk(&rig, i), .offset = i};
        CHECK_EQ(pthread_create(&threads[i], NULL, push, &pushers[i]), 0);
    }
    WAIT_UNTIL(data_bytes(fd) > test_below(200) * rig.page_bytes);
    arm_parts(&rig, &parts, uffd, GATED);
    look_at_parts(&rig, &parts);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    WAIT_UNTIL(!pc_pager_prefetching(rig.pager));
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
        close(pushers[i].fd);
    }
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    close(uffd);
    close(fd);
}

/* The sweep that arming begins comes by while a page is staged and still claimed. No thread asks for it: the background alone places it. */
static void staged_and_still_claimed(void)
{
    uint64_t zero[MAX_PAGES / 64] = {0}, page = 0;
    struct parts parts;
    struct rig rig;
    int uffd = open_parts(&rig, &parts, &nowhere, GATED), fd = make_staging(&rig), bulk;

    page = next_data_page(&rig, &page);
    pc_bitmap_set_range(zero, 0, rig.pages[0]);
    pc_bitmap_clear_range(zero, page, 1);
    CHECK_EQ(pc_pager_stage(rig.pager, 0, fd), 0);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0);
    atomic_store(&stays_claimed, true);
    atomic_store(&staged, 0);
    bulk = script_bulk(&rig, 0);
    serve_page(&rig, bulk, 0, page);
    WAIT_UNTIL(atomic_load(&staged));
    arm_parts(&rig, &parts, uffd, GATED);
    WAIT_UNTIL(!pc_pager_prefetching(rig.pager));
    atomic_store(&stays_claimed, false);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(&rig).faults, 0);
    CHECK(is_page(0, page, rig.page_bytes, part_page(&rig, &parts, page)));
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    close(bulk);
    close(uffd);
    close(fd);
}

/* ---- leaving ------------------------------------------------------------------------------------------------------ */

/* A pager leaves while threads wait and others are served; the next one has the same userfaultfd and states, and goes on. Staged pages that
 * were not placed are the next one's too. */
static void leaving(bool staging)
{
    struct parts parts;
    struct rig rig;
    struct looker looker = {.rig = &rig, .parts = &parts};
    int uffd = open_parts(&rig, &parts, &nowhere, GATED), fd = staging ? make_staging(&rig) : make_image(&rig);
    int states = pc_states_new(rig.pages[0]), image = make_image(&rig);
    uint8_t *content = malloc(rig.page_bytes);

    CHECK(content != NULL);
    CHECK(states >= 0);
    for (uint64_t page = 0; page < rig.pages[0] && staging; page++)
        if (content_of(0, page) != ABSENT) {
            make_page(0, page, rig.page_bytes, content);
            CHECK_EQ(pwrite(fd, content, rig.page_bytes, (off_t)(page * rig.page_bytes)), rig.page_bytes);
        }
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    for (int turn = 0; turn < 5; turn++) {
        uint64_t zero[MAX_PAGES / 64] = {0}, more;

        CHECK_EQ(pc_pager_new(-1, &rig.pager), 0);
        rig.from_pager = (struct inbox){.owner = rig.pager, .fd = pc_pager_event_fd(rig.pager), .next = next_pager_event};
        CHECK_EQ(pc_pager_add_block(rig.pager, &nowhere, states), 0);
        for (uint64_t page = 0; page < rig.pages[0]; page++)
            if (content_of(0, page) == ABSENT)
                pc_bitmap_set_range(zero, page, 1);
        if (staging) {
            CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0);
            CHECK_EQ(pc_pager_stage(rig.pager, 0, fd), 0);
            CHECK_EQ(count_received(&rig), rig.pages[0]);
        } else {
            set_local(&rig, fd);
        }
        atomic_store(&uncached, turn % 2);
        arm_parts(&rig, &parts, uffd, GATED);
        if (!turn)
            CHECK_EQ(pthread_create(&looker.thread, NULL, look, &looker), 0);
        if (turn == 4)
            break;
        more = pager_stats(&rig).resident_pages + test_below(100);
        WAIT_UNTIL(pager_stats(&rig).resident_pages >= (more < rig.pages[0] ? more : rig.pages[0]));
        CHECK_EQ(pc_pager_leave(rig.pager), 0);
    }
    CHECK_EQ(pthread_join(looker.thread, NULL), 0);
    look_at_parts(&rig, &parts);
    CHECK_EQ(pc_pager_prefetch_all(rig.pager), 0);
    WAIT_UNTIL(pager_stats(&rig).resident_pages == rig.pages[0]);
    CHECK_EQ(pc_pager_leave(rig.pager), 0); /* and nothing has been unregistered by that */
    CHECK_SYS(madvise(parts.low, rig.page_bytes, MADV_NORMAL));
    CHECK_LEAKS();
    free(content);
    close(states);
    close(image);
    close(uffd);
    close(fd);
}

static void leaves_an_image(void)
{
    leaving(false);
}

static void leaves_what_is_staged(void)
{
    leaving(true);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(an_image_in_the_page_cache);
    RUN_KINDS(an_image_on_a_disk);
    RUN_CASE(part_of_a_block);
    RUN_CASE(a_slow_disk);
    RUN_CASE(a_broken_image);
    RUN_CASE(parts_of_an_image);
    RUN_CASE(parts_in_the_background);
    RUN_CASE(a_working_set);
    RUN_CASE(a_full_log);
    RUN_CASE(everything_at_once);
    RUN_CASE(staged_before_there_is_memory);
    RUN_CASE(staged_while_it_is_armed);
    RUN_CASE(staged_and_still_claimed);
    RUN_CASE(leaves_an_image);
    RUN_CASE(leaves_what_is_staged);
    return test_end();
}
