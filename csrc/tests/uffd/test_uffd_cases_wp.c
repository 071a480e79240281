/* SPDX-License-Identifier: Apache-2.0
 *
 * Write protection by userfaultfd, by kind of memory: see test_uffd_cases.c for the names.
 */
#include <sys/ioctl.h>
#include <sys/wait.h>

#include "tests/support/huge_pool.h"
#include "tests/support/uffd_kinds.h"
#include "tests/support/uffd_table.h"

#define PAGES 6

static int protect(const struct area *area, uint64_t page, uint64_t pages, uint64_t mode)
{
    return pc_uffd_writeprotect(area->uffd, address_of(area, page), pages * area->unit, mode);
}

/* An area of present pages, page i full of i + 1. */
static struct area arm_filled(enum kind kind, uint64_t mode, uint64_t features)
{
    struct area area = arm(kind, PAGES, mode | PC_UFFD_MISSING, features);

    for (uint64_t page = 0; page < PAGES; page++)
        CHECK_EQ(copy(&area, page, (int)page + 1, 0), 0);
    return area;
}

static void wp_traps_once(enum kind kind)
{
    struct area area = arm_filled(kind, PC_UFFD_WP, 0);
    struct worker worker = {.area = &area, .page = 2, .write = true, .value = 0xEE};

    CHECK_EQ(protect(&area, 1, 3, PC_UFFD_PROTECT), 0);
    CHECK_PAGE(&area, 2, 3); /* reading is free */
    area.base[0] = 9;        /* and so is a neighbour that is not protected */
    start(&worker, touch);
    CHECK_FAULT(&area, 2, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_WP);
    CHECK_BLOCKED(&worker);
    CHECK_PAGE(&area, 2, 3); /* the time to save the old content */
    CHECK_EQ(protect(&area, 2, 1, 0), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(area.base[2 * area.unit], 0xEE);
    area.base[2 * area.unit] = 0xED; /* not once more */
    worker = (struct worker){.area = &area, .page = 3, .write = true, .value = 0xEF};
    start(&worker, touch); /* the rest is still protected */
    CHECK_FAULT(&area, 3, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_WP);
    CHECK_EQ(pc_uffd_unregister(area.uffd, address_of(&area, 0), area.bytes), 0); /* lifts it, and wakes */
    CHECK_ENDS(&worker);
    CHECK_EQ(area.base[3 * area.unit], 0xEF);
    area.base[area.unit] = 1;
}

static void wp_dontwake(enum kind kind)
{
    struct area area = arm_filled(kind, PC_UFFD_WP, 0);
    struct worker worker = {.area = &area, .page = 2, .write = true, .value = 0xEE};

    /* Protecting wakes nobody, so that not to wake is no choice. */
    CHECK_EQ(protect(&area, 2, 1, PC_UFFD_PROTECT | PC_UFFD_PROTECT_DONTWAKE), -EINVAL);
    CHECK_EQ(protect(&area, 2, 1, 4), -EINVAL);
    CHECK_EQ(protect(&area, 2, 1, PC_UFFD_PROTECT), 0);
    start(&worker, touch);
    CHECK_FAULT(&area, 2, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_WP);
    CHECK_EQ(protect(&area, 2, 1, PC_UFFD_PROTECT_DONTWAKE), 0);
    CHECK_BLOCKED(&worker);
    CHECK_EQ(pc_uffd_wake(area.uffd, address_of(&area, 2), area.unit), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(area.base[2 * area.unit], 0xEE);
}

static void wp_needs_its_registration(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, features_of(kind, PC_UFFD_WP));

    CHECK_EQ(protect(&area, 0, 1, PC_UFFD_PROTECT), -ENOENT);
    CHECK_EQ(copy(&area, 0, 1, PC_UFFD_FILL_WP), -EINVAL);
    CHECK_EQ(copy(&area, 0, 1, 0), 0); /* nothing was placed by the refused one */
}

static void wp_copied_page(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING | PC_UFFD_WP, 0);
    struct worker worker = {.area = &area, .page = 1, .write = true, .value = 0xEE};

    start(&worker, touch);
    CHECK_FAULT(&area, 1, PC_UFFD_FAULT_WRITE); /* missing first */
    CHECK_EQ(copy(&area, 1, 7, PC_UFFD_FILL_WP), 0);
    CHECK_FAULT(&area, 1, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_WP); /* the same write, again */
    CHECK_PAGE(&area, 1, 7);
    CHECK_EQ(protect(&area, 1, 1, 0), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(area.base[area.unit], 0xEE);
}

static void wp_continued_page(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING | PC_UFFD_MINOR | PC_UFFD_WP, 0);
    struct worker worker = {.area = &area, .page = 1, .write = true, .value = 0xEE};

    memset(area.alias + area.unit, 7, area.unit);
    start(&worker, touch);
    CHECK_FAULT(&area, 1, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_MINOR);
    CHECK_EQ(pc_uffd_continue(area.uffd, address_of(&area, 1), area.unit, PC_UFFD_FILL_WP, NULL), 0);
    CHECK_FAULT(&area, 1, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_WP);
    CHECK_PAGE(&area, 1, 7);
    area.alias[2 * area.unit - 1] = 8; /* protection is the mapping's, not the page's */
    CHECK_EQ(area.base[2 * area.unit - 1], 8);
    CHECK_EQ(protect(&area, 1, 1, 0), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(area.base[area.unit], 0xEE);
    CHECK_EQ(area.alias[area.unit], kind == PRIVATE ? 7 : 0xEE);
}

/* ---- holes ---- */

static void write_into_a_protected_hole(enum kind kind, uint64_t features, bool trapped)
{
    struct area area = arm(kind, PAGES, PC_UFFD_WP, features);
    struct worker worker = {.area = &area, .page = 1, .write = true, .value = 0xEE};

    CHECK_EQ(protect(&area, 0, PAGES, PC_UFFD_PROTECT), 0);
    start(&worker, touch);
    if (trapped) {
        CHECK_FAULT(&area, 1, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_WP);
        CHECK_EQ(protect(&area, 1, 1, 0), 0);
    }
    CHECK_ENDS(&worker);
    CHECK(!readable(area.uffd, 0));
    CHECK_EQ(area.base[area.unit], 0xEE);
    CHECK_EQ(area.base[2 * area.unit - 1], 0);
}

static void wp_hole_is_not_seen(enum kind kind)
{
    write_into_a_protected_hole(kind, 0, false);
}

static void wp_hole_is_seen(enum kind kind)
{
    write_into_a_protected_hole(kind, 0, true);
}

static void wp_unpopulated(enum kind kind)
{
    write_into_a_protected_hole(kind, UFFD_FEATURE_WP_UNPOPULATED, true);
}

/* ---- fork ---- */

/* The bare system calls: fork(3) of TSan's runtime holds locks which the thread needs that reads the event, and its _exit(2)
 * waits for a second. */
static void fork_and_write(struct worker *worker)
{
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);

    if (!child) {
        volatile uint8_t *at = worker->area->base + worker->page * worker->area->unit;

        *at = worker->value;
        (void)syscall(SYS_exit_group, *at);
    }
    CHECK(child > 0);
    CHECK_EQ(waitpid(child, &worker->status, 0), child);
    CHECK(WIFEXITED(worker->status));
}

static void wp_fork_without_event(enum kind kind)
{
    struct area area = arm_filled(kind, PC_UFFD_WP, 0);
    struct worker worker = {.area = &area, .page = 2, .write = true, .value = 0xEE};

    CHECK_EQ(protect(&area, 0, PAGES, PC_UFFD_PROTECT), 0);
    start(&worker, fork_and_write); /* nobody protects the child's memory */
    CHECK_ENDS(&worker);
    CHECK_EQ(WEXITSTATUS(worker.status), 0xEE);
    CHECK(!readable(area.uffd, 0));
    /* A shared page has changed behind our back; a private one is as it was. */
    CHECK_EQ(area.base[2 * area.unit], kind == MEMFD || kind == HUGETLB ? 0xEE : 3);
    worker = (struct worker){.area = &area, .page = 2, .write = true, .value = 0xED};
    start(&worker, touch); /* ours is still protected */
    CHECK_FAULT(&area, 2, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_WP);
    CHECK_EQ(protect(&area, 2, 1, 0), 0);
    CHECK_ENDS(&worker);
}

static void wp_fork_with_event(enum kind kind)
{
    struct area area = arm_filled(kind, PC_UFFD_WP, UFFD_FEATURE_EVENT_FORK), inherited = area;
    struct worker worker = {.area = &area, .page = 2, .write = true, .value = 0xEE};

    CHECK_EQ(protect(&area, 0, PAGES, PC_UFFD_PROTECT), 0);
    start(&worker, fork_and_write);
    inherited.uffd = next_event(area.uffd, PC_UFFD_EVENT_FORK).uffd;
    CHECK(inherited.uffd >= 0);
    CHECK_FAULT(&inherited, 2, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_WP);
    CHECK(!readable(area.uffd, 0)); /* each memory has its own */
    CHECK_PAGE(&area, 2, 3);
    CHECK_EQ(protect(&inherited, 2, 1, 0), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(WEXITSTATUS(worker.status), 0xEE);
    worker = (struct worker){.area = &area, .page = 2, .write = true, .value = 0xED};
    start(&worker, touch); /* lifted there, not here */
    CHECK_FAULT(&area, 2, PC_UFFD_FAULT_WRITE | PC_UFFD_FAULT_WP);
    CHECK_EQ(protect(&area, 2, 1, 0), 0);
    CHECK_ENDS(&worker);
}

/* ---- without events ---- */

struct region {
    uint64_t start, end, categories;
};
struct scan { /* struct pm_scan_arg of Linux 6.7 */
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t inverted, all_of, any_of, returned;
};
#define SCAN _IOWR('f', 16, struct scan)
#define SCAN_PROTECTS 1 /* PM_SCAN_WP_MATCHING */
#define SCAN_CHECKS 2   /* PM_SCAN_CHECK_WPASYNC */
#define WRITTEN 2       /* PAGE_IS_WRITTEN */
_Static_assert(SCAN == 0xC0606610, "PAGEMAP_SCAN");

/* Bit i: page i was written since it was protected; and protects it again. */
static uint64_t written(const struct area *area)
{
    struct region regions[PAGES];
    struct scan scan = {
        .size = sizeof(scan),
        .flags = SCAN_PROTECTS | SCAN_CHECKS,
        .start = address_of(area, 0),
        .end = address_of(area, PAGES),
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = PAGES,
        .all_of = WRITTEN,
        .returned = WRITTEN,
    };
    int pagemap = CHECK_SYS(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)), count;
    uint64_t pages = 0;

    memset(regions, 0, sizeof(regions)); /* sanitizers do not know that the kernel writes here */
    count = ioctl(pagemap, SCAN, &scan);
    if (count < 0 && errno == ENOTTY)
        SKIP("pagemap-scan", "PAGEMAP_SCAN came with Linux 6.7");
    CHECK_SYS(count);
    CHECK_EQ(scan.walk_end, scan.end);
    for (int i = 0; i < count; i++)
        for (uint64_t at = regions[i].start; at < regions[i].end; at += area->unit)
            pages |= (uint64_t)1 << (at - address_of(area, 0)) / area->unit;
    close(pagemap);
    return pages;
}

static void wp_async(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_WP, UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED);

    for (uint64_t page = 0; page < 4; page++) /* 4 and 5 remain holes */
        memset(area.base + page * area.unit, 1, area.unit);
    CHECK_EQ(protect(&area, 0, PAGES, PC_UFFD_PROTECT), 0);
    CHECK_EQ(written(&area), 0);
    area.base[area.unit] = 2; /* this thread would hang if anything asked for a handler */
    area.base[4 * area.unit + 1] = 2;
    CHECK_EQ(*(volatile uint8_t *)(area.base + 2 * area.unit), 1); /* reading is not writing */
    CHECK_EQ(written(&area), 1 << 1 | 1 << 4);
    CHECK_EQ(written(&area), 0); /* the scan has protected them */
    area.base[area.unit] = 3;
    area.base[3 * area.unit] = 3;
    CHECK_EQ(written(&area), 1 << 1 | 1 << 3);
    CHECK(!readable(area.uffd, 0));
    CHECK_EQ(area.base[area.unit], 3);
    CHECK_EQ(area.base[2 * area.unit - 1], 1);
}

ON_ALL(wp_traps_once)
ON_ALL(wp_dontwake)
ON_ALL(wp_needs_its_registration)
ON_ALL(wp_copied_page)
ON_FILES(wp_continued_page)
ON_KIND(wp_hole_is_not_seen, anon, ANON)
ON_FILES(wp_hole_is_seen)
ON_ALL(wp_unpopulated)
ON_ALL(wp_fork_without_event)
ON_ALL(wp_fork_with_event)
ON_ALL(wp_async)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_ALL(wp_traps_once);
    RUN_ALL(wp_dontwake);
    RUN_ALL(wp_needs_its_registration);
    RUN_ALL(wp_copied_page);
    RUN_FILES(wp_continued_page);
    RUN(anon_wp_hole_is_not_seen);
    RUN_FILES(wp_hole_is_seen);
    RUN_ALL(wp_unpopulated);
    RUN_ALL(wp_fork_without_event);
    RUN_ALL(wp_fork_with_event);
    RUN_ALL(wp_async);
    return test_end();
}
