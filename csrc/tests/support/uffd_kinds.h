/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of userfaultfd by kind of memory share: the kinds, areas of them, threads which may block. Every helper ends
 * the case when something of its own fails.
 */
#ifndef PC_UFFD_KINDS_H
#define PC_UFFD_KINDS_H

#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "core/util.h"
#include "postcopy/memory.h"
#include "postcopy/uffd.h"
#include "tests/support/test.h"
#include "uffd/uffd_abi.h"

#define STILL_BLOCKED_MS 50 /* waited for what must not happen */
#define MAYBE static __attribute__((unused))

enum kind { ANON, MEMFD, PRIVATE, HUGETLB };

struct area {
    enum kind kind;
    int uffd;
    int fd;         /* of the file behind it, or -1 */
    uint8_t *base;  /* the memory under test */
    uint8_t *alias; /* a second, shared mapping of the file that is never registered, or NULL */
    uint64_t unit;  /* bytes of a page of this kind */
    uint64_t pages;
    uint64_t bytes;
    uint64_t ioctls; /* what the last registration has offered */
};

#define HUGE_POOL_PAGES 12 /* what the largest case takes */

/* ---- areas ---- */

MAYBE int open_uffd(uint64_t features)
{
    struct pc_uffd_api api;
    int fd = pc_uffd_probe(PC_UFFD_ANY, &api);

    if (fd)
        SKIP("uffd", "no userfaultfd: %s", strerror(-fd));
    if (features & ~api.features)
        SKIP("uffd-features", "this kernel lacks the userfaultfd features %#" PRIx64, features & ~api.features);
    fd = pc_uffd_open(PC_UFFD_ANY, features, NULL);
    if (fd == -EPERM && features & UFFD_FEATURE_EVENT_FORK)
        SKIP("uffd-kernel", "EVENT_FORK needs CAP_SYS_PTRACE");
    if (fd < 0)
        FAIL("pc_uffd_open: %s", strerror(-fd));
    return fd;
}

/* The memory alone, nothing in it, no userfaultfd. */
MAYBE struct area make_area(enum kind kind, uint64_t pages)
{
    struct area area = {.kind = kind, .uffd = -1, .fd = -1, .unit = pc_page_bytes(), .pages = pages};
    int protection = PROT_READ | PROT_WRITE;

    if (kind == HUGETLB) {
        area.unit = pc_huge_page_bytes();
        if (area.unit != 2 << 20)
            SKIP("hugetlb", "the default huge page is not 2 MiB");
    }
    area.bytes = area.unit * pages;
    if (kind == ANON) {
        area.base = CHECK_SYS((uint8_t *)mmap(NULL, area.bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    } else {
        area.fd = CHECK_SYS(memfd_create("test", MFD_CLOEXEC | (kind == HUGETLB ? MFD_HUGETLB : 0)));
        CHECK_SYS(ftruncate(area.fd, (off_t)area.bytes));
        area.base = mmap(NULL, area.bytes, protection, kind == PRIVATE ? MAP_PRIVATE : MAP_SHARED, area.fd, 0);
        if (area.base == MAP_FAILED && kind == HUGETLB && errno == ENOMEM)
            SKIP("hugetlb", "no %" PRIu64 " free huge pages: run as root, or sysctl vm.nr_hugepages=%d", pages, HUGE_POOL_PAGES);
        CHECK(area.base != MAP_FAILED);
        area.alias = CHECK_SYS((uint8_t *)mmap(NULL, area.bytes, protection, MAP_SHARED, area.fd, 0));
    }
    if (kind != HUGETLB) { /* one page means one page here */
        CHECK(!madvise(area.base, area.bytes, MADV_NOHUGEPAGE) || errno == EINVAL);
        CHECK(!area.alias || !madvise(area.alias, area.bytes, MADV_NOHUGEPAGE) || errno == EINVAL);
    }
    return area;
}

MAYBE uint64_t address_of(const struct area *area, uint64_t page)
{
    return (uint64_t)(uintptr_t)(area->base + page * area->unit);
}

MAYBE void register_area(struct area *area, uint64_t mode)
{
    CHECK_EQ(pc_uffd_register(area->uffd, address_of(area, 0), area->bytes, mode, &area->ioctls), 0);
}

/* The features which registering this kind of memory so needs. */
MAYBE uint64_t features_of(enum kind kind, uint64_t mode)
{
    uint64_t features = 0;

    if (mode & PC_UFFD_WP)
        features |= kind == ANON ? UFFD_FEATURE_PAGEFAULT_FLAG_WP : UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    if (kind == HUGETLB)
        features |= UFFD_FEATURE_MISSING_HUGETLBFS | (mode & PC_UFFD_MINOR ? UFFD_FEATURE_MINOR_HUGETLBFS : 0);
    else if (kind != ANON)
        features |= UFFD_FEATURE_MISSING_SHMEM | (mode & PC_UFFD_MINOR ? UFFD_FEATURE_MINOR_SHMEM : 0);
    return features;
}

/* An area with nothing in it, registered with a userfaultfd of its own. */
MAYBE struct area arm(enum kind kind, uint64_t pages, uint64_t mode, uint64_t features)
{
    int uffd = open_uffd(features | features_of(kind, mode));
    struct area area = make_area(kind, pages);

    area.uffd = uffd;
    register_area(&area, mode);
    return area;
}

/* One page full of `value`, of the area's page size. Never returned: a case is a process. */
MAYBE uint8_t *page_of(const struct area *area, int value)
{
    uint8_t *page = CHECK_SYS((uint8_t *)mmap(NULL, area->unit, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

    memset(page, value, area->unit);
    return page;
}

MAYBE int copy(const struct area *area, uint64_t page, int value, uint64_t mode)
{
    uint8_t *from = page_of(area, value);
    uint64_t done = 99;
    int result = pc_uffd_copy(area->uffd, address_of(area, page), from, area->unit, mode, &done);

    CHECK_EQ(done, result ? 0 : area->unit);
    CHECK_SYS(munmap(from, area->unit));
    return result;
}

/* Looks at a page on which a write may be waiting. TSan takes the write that has faulted for one that is done, and this for a
 * race with it; hence no instrumentation, and no memcmp, which it intercepts. */
__attribute__((unused, noinline, no_sanitize("thread"))) static bool page_is(const uint8_t *page, uint64_t bytes, int value)
{
    const volatile uint64_t *words = (const volatile uint64_t *)(const volatile void *)page;

    for (uint64_t i = 0; i < bytes / sizeof(*words); i++)
        if (words[i] != (uint64_t)value * 0x0101010101010101)
            return false;
    return true;
}

#define CHECK_PAGE(area, page, value) CHECK(page_is((area)->base + (page) * (area)->unit, (area)->unit, value))

/* ---- events ---- */

MAYBE bool readable(int fd, int timeout_ms)
{
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    int n;

    do
        n = poll(&poll_fd, 1, timeout_ms);
    while (n < 0 && errno == EINTR);
    return n == 1 && poll_fd.revents == POLLIN;
}

MAYBE struct pc_uffd_event next_event(int uffd, int type)
{
    struct pc_uffd_event event;

    CHECK(readable(uffd, 5000));
    CHECK_EQ(pc_uffd_read(uffd, &event, 1), 1);
    CHECK_EQ(event.type, type);
    return event;
}

/* The next one is a fault on this page with these flags. */
#define CHECK_FAULT(area, page, flags_)                                                                                \
    do {                                                                                                               \
        struct pc_uffd_event event_ = next_event((area)->uffd, PC_UFFD_EVENT_PAGEFAULT);                               \
        CHECK_EQ(event_.address, address_of(area, page));                                                              \
        CHECK_EQ(event_.flags, flags_);                                                                                \
    } while (0)

/* ---- threads which may block ---- */

struct worker {
    pthread_t thread;
    void (*work)(struct worker *worker);
    const struct area *area;
    uint64_t page;
    bool write;
    uint8_t value; /* to be written, and then what was read */
    int status;    /* of a child */
};

MAYBE void *worker_main(void *argument)
{
    struct worker *worker = argument;

    worker->work(worker);
    return NULL;
}

MAYBE void touch(struct worker *worker)
{
    volatile uint8_t *at = worker->area->base + worker->page * worker->area->unit;

    if (worker->write)
        *at = worker->value;
    worker->value = *at;
}

MAYBE void start(struct worker *worker, void (*work)(struct worker *))
{
    worker->work = work;
    CHECK_EQ(pthread_create(&worker->thread, NULL, worker_main, worker), 0);
}

MAYBE bool ended(struct worker *worker, uint64_t timeout_ms)
{
    struct timespec until;

    CHECK_SYS(clock_gettime(CLOCK_REALTIME, &until));
    until.tv_sec += (time_t)(timeout_ms / 1000);
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    return pthread_timedjoin_np(worker->thread, NULL, &until) == 0;
}

#define CHECK_BLOCKED(worker) CHECK(!ended(worker, STILL_BLOCKED_MS))
#define CHECK_ENDS(worker) CHECK(ended(worker, 5000))

#endif
