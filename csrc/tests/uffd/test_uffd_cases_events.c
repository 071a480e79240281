/* SPDX-License-Identifier: Apache-2.0
 *
 * Events of userfaultfd by kind of memory, and what can be seen in memory after each: see test_uffd_cases.c for the names.
 */
#include <sys/ioctl.h>
#include <sys/utsname.h>
#include <sys/wait.h>

#include "tests/support/huge_pool.h"
#include "tests/support/uffd_kinds.h"
#include "tests/support/uffd_table.h"

#define PAGES 6
#define MANY 64

static bool is_shared(enum kind kind)
{
    return kind == MEMFD || kind == HUGETLB;
}

/* ---- fork ---- */

/* The bare system calls: fork(3) of TSan's runtime holds locks which the thread needs that reads the event, and its _exit(2)
 * waits for a second. */
static void fork_and_read(struct worker *worker)
{
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);

    if (!child)
        (void)syscall(SYS_exit_group, *(volatile uint8_t *)(worker->area->base + worker->page * worker->area->unit));
    CHECK(child > 0);
    CHECK_EQ(waitpid(child, &worker->status, 0), child);
    CHECK(WIFEXITED(worker->status));
}

static void event_fork(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_EVENT_FORK), inherited = area;
    struct worker worker = {.area = &area, .page = 2};

    start(&worker, fork_and_read);
    inherited.uffd = next_event(area.uffd, PC_UFFD_EVENT_FORK).uffd;
    CHECK(inherited.uffd >= 0);
    CHECK_FAULT(&inherited, 2, 0);
    CHECK(!readable(area.uffd, 0));
    if (is_shared(kind)) { /* one page for both, whichever side fills it; but only the child's userfaultfd wakes the child */
        CHECK_EQ(copy(&area, 2, 5, 0), 0);
        CHECK_BLOCKED(&worker);
        CHECK_EQ(copy(&inherited, 2, 6, 0), -EEXIST);
        CHECK_EQ(pc_uffd_wake(inherited.uffd, address_of(&area, 2), area.unit), 0);
    } else {
        CHECK_EQ(copy(&area, 2, 6, 0), 0);
        CHECK_EQ(copy(&inherited, 2, 5, 0), 0);
    }
    CHECK_ENDS(&worker);
    CHECK_EQ(WEXITSTATUS(worker.status), 5);
    CHECK_PAGE(&area, 2, is_shared(kind) ? 5 : 6);
    CHECK_EQ(copy(&inherited, 3, 1, 0), -ESRCH); /* that memory has died */
}

static void fork_without_event(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, 0);
    struct worker worker = {.area = &area, .page = 2};

    start(&worker, fork_and_read); /* nobody asks: the child sees zeros for what had to come */
    CHECK_ENDS(&worker);
    CHECK_EQ(WEXITSTATUS(worker.status), 0);
    CHECK(!readable(area.uffd, 0));
    /* Of shared memory the child has filled the hole. */
    CHECK_EQ(copy(&area, 2, 7, 0), is_shared(kind) ? -EEXIST : 0);
}

/* ---- mremap ---- */

struct moved {
    struct worker worker;
    uint8_t *to;
};

static void remap(struct worker *worker)
{
    const struct area *area = worker->area;
    struct moved *moved = (struct moved *)(void *)worker;

    CHECK(mremap(area->base, area->bytes, area->bytes, MREMAP_MAYMOVE | MREMAP_FIXED, moved->to) == moved->to);
}

static uint8_t *place_for(const struct area *area)
{
    uint8_t *place = CHECK_SYS((uint8_t *)mmap(NULL, area->bytes + area->unit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

    return place + (area->unit - (uintptr_t)place % area->unit) % area->unit;
}

static void event_remap(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_EVENT_REMAP), after = area;
    struct moved moved = {.worker = {.area = &area}, .to = place_for(&area)};
    struct worker worker = {.area = &after, .page = 2};
    struct pc_uffd_event event;

    after.base = moved.to;
    CHECK_EQ(copy(&area, 1, 4, 0), 0);
    start(&moved.worker, remap);
    CHECK(readable(area.uffd, 5000));
    CHECK_BLOCKED(&moved.worker);
    event = next_event(area.uffd, PC_UFFD_EVENT_REMAP);
    CHECK_EQ(event.address, address_of(&area, 0));
    CHECK_EQ(event.end, address_of(&after, 0));
    CHECK_EQ(event.bytes, area.bytes);
    CHECK_ENDS(&moved.worker);
    CHECK_EQ(copy(&area, 2, 1, 0), -ENOENT);
    CHECK_PAGE(&after, 1, 4);
    start(&worker, touch); /* what was missing is missing there, and registered */
    CHECK_FAULT(&after, 2, 0);
    CHECK_EQ(copy(&after, 2, 5, 0), 0);
    CHECK_ENDS(&worker);
    CHECK_PAGE(&after, 2, 5);
}

static void remap_without_event(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, 0), after = area;
    struct moved moved = {.worker = {.area = &area}, .to = place_for(&area)};

    after.base = moved.to;
    CHECK_EQ(copy(&area, 1, 4, 0), 0);
    remap(&moved.worker);
    CHECK_EQ(copy(&after, 2, 1, 0), -ENOENT); /* silently no longer registered */
    CHECK_PAGE(&after, 1, 4);
    CHECK_PAGE(&after, 2, 0);
    CHECK(!readable(area.uffd, 0));
}

/* ---- madvise ---- */

static void dontneed(struct worker *worker)
{
    CHECK_SYS(madvise(worker->area->base + worker->page * worker->area->unit, worker->area->unit, MADV_DONTNEED));
}

static void punch(struct worker *worker)
{
    CHECK_SYS(madvise(worker->area->base + worker->page * worker->area->unit, worker->area->unit, MADV_REMOVE));
}

static void expect_remove(struct worker *worker, void (*work)(struct worker *))
{
    const struct area *area = worker->area;
    struct pc_uffd_event event;

    start(worker, work);
    event = next_event(area->uffd, PC_UFFD_EVENT_REMOVE);
    CHECK_EQ(event.address, address_of(area, worker->page));
    CHECK_EQ(event.end, address_of(area, worker->page + 1));
    CHECK_EQ(event.bytes, area->unit);
    CHECK_ENDS(worker);
}

/* What was thrown away may not come back: its owner has been promised zeros. */
static void remove_answered_by_zeros(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_EVENT_REMOVE);
    struct worker worker = {.area = &area, .page = 2}, reader = worker;

    reader.value = 0xEE;
    for (uint64_t page = 1; page < 4; page++)
        CHECK_EQ(copy(&area, page, 7, 0), 0);
    expect_remove(&worker, is_shared(kind) ? punch : dontneed);
    start(&reader, touch);
    CHECK_FAULT(&area, 2, 0);
    if (kind == HUGETLB)
        CHECK_EQ(copy(&area, 2, 0, 0), 0);
    else
        CHECK_EQ(pc_uffd_zeropage(area.uffd, address_of(&area, 2), area.unit, 0, NULL), 0);
    CHECK_ENDS(&reader);
    CHECK_EQ(reader.value, 0);
    CHECK_PAGE(&area, 1, 7);
    CHECK_PAGE(&area, 2, 0);
    CHECK_PAGE(&area, 3, 7);
}

/* MADV_DONTNEED of a file's shared page unmaps it only. Registered for MISSING, there is no fault when it comes back with its
 * content; with MINOR too, there is one, and CONTINUE answers it. */
static void dontneed_keeps_shared_pages(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_EVENT_REMOVE | features_of(kind, PC_UFFD_MINOR));
    struct worker worker = {.area = &area, .page = 2}, reader = worker;

    CHECK_EQ(copy(&area, 2, 7, 0), 0);
    expect_remove(&worker, dontneed);
    CHECK_PAGE(&area, 2, 7);
    register_area(&area, PC_UFFD_MISSING | PC_UFFD_MINOR);
    expect_remove(&worker, dontneed);
    start(&reader, touch);
    CHECK_FAULT(&area, 2, PC_UFFD_FAULT_MINOR);
    CHECK_EQ(pc_uffd_continue(area.uffd, address_of(&area, 2), area.unit, 0, NULL), 0);
    CHECK_ENDS(&reader);
    CHECK_EQ(reader.value, 7);
}

/* ---- munmap ---- */

static void unmap(struct worker *worker)
{
    CHECK_SYS(munmap(worker->area->base + worker->page * worker->area->unit, 2 * worker->area->unit));
}

static void event_unmap(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_EVENT_UNMAP);
    struct worker worker = {.area = &area, .page = 2}, reader = {.area = &area, .page = 4};
    struct pc_uffd_event event;

    for (uint64_t page = 1; page < 4; page++)
        CHECK_EQ(copy(&area, page, (int)page, 0), 0);
    start(&worker, unmap);
    CHECK(readable(area.uffd, 5000));
    CHECK_BLOCKED(&worker);
    event = next_event(area.uffd, PC_UFFD_EVENT_UNMAP);
    CHECK_EQ(event.address, address_of(&area, 2));
    CHECK_EQ(event.end, address_of(&area, 4));
    CHECK_EQ(event.bytes, 2 * area.unit);
    CHECK_ENDS(&worker);
    CHECK_EQ(copy(&area, 2, 1, 0), -ENOENT);
    CHECK_PAGE(&area, 1, 1);
    start(&reader, touch); /* both sides of the gap are as they were */
    CHECK_FAULT(&area, 4, 0);
    CHECK_EQ(copy(&area, 4, 4, 0), 0);
    CHECK_ENDS(&reader);
    CHECK_EQ(reader.value, 4);
}

static void munmap_under_a_fault(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, 0);
    struct worker worker = {.area = &area, .page = 2};
    uint8_t *fresh = area.base + 2 * area.unit;
    int protection = PROT_READ | PROT_WRITE;

    start(&worker, touch);
    CHECK_FAULT(&area, 2, 0);
    CHECK_SYS(munmap(fresh, area.unit));
    CHECK_EQ(copy(&area, 2, 1, 0), -ENOENT);
    /* Something for the sleeper to find; else it would end by SIGSEGV. */
    CHECK(mmap(fresh, area.unit, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == fresh);
    *fresh = 0x3C;
    CHECK_BLOCKED(&worker);
    CHECK_EQ(pc_uffd_wake(area.uffd, address_of(&area, 2), area.unit), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(worker.value, 0x3C);
}

/* ---- while an event is unread ---- */

/* The result field says -EAGAIN since 6.15 (and in stable kernels); before, it was left alone. */
static void check_field(int64_t field)
{
    struct utsname name;
    unsigned major = 0, minor = 0;

    CHECK_SYS(uname(&name));
    CHECK_EQ(sscanf(name.release, "%u.%u", &major, &minor), 2);
    if (major > 6 || (major == 6 && minor >= 15) || field)
        CHECK_EQ(field, -EAGAIN);
}

#define CHECK_AGAIN(request, argument)                                                                                 \
    do {                                                                                                               \
        CHECK_EQ(ioctl(area.uffd, request, argument), -1);                                                             \
        CHECK_EQ(errno, EAGAIN);                                                                                       \
    } while (0)

static void eagain_while_an_event_is_unread(enum kind kind)
{
    uint64_t mode = PC_UFFD_MISSING | PC_UFFD_WP | (kind == ANON ? 0 : PC_UFFD_MINOR);
    struct area area = arm(kind, PAGES, mode, UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_POISON);
    struct uffdio_range range = {.start = address_of(&area, 1), .len = area.unit};
    struct uffdio_copy copying = {.dst = range.start, .src = (uintptr_t)page_of(&area, 1), .len = range.len};
    struct uffdio_move moving = {.dst = range.start, .src = copying.src, .len = range.len};
    struct uffdio_zeropage zeroing = {.range = range};
    struct uffdio_continue continuing = {.range = range};
    struct uffdio_poison poisoning = {.range = range};
    struct uffdio_writeprotect protecting = {.range = range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    struct worker worker = {.area = &area, .page = 3};
    struct pc_uffd_api api;

    start(&worker, dontneed);
    CHECK(readable(area.uffd, 5000));
    CHECK_AGAIN(UFFDIO_COPY, &copying);
    check_field(copying.copy);
    CHECK_AGAIN(UFFDIO_ZEROPAGE, &zeroing);
    check_field(zeroing.zeropage);
    CHECK_AGAIN(UFFDIO_CONTINUE, &continuing);
    check_field(continuing.mapped);
    CHECK_AGAIN(UFFDIO_POISON, &poisoning);
    check_field(poisoning.updated);
    CHECK_AGAIN(UFFDIO_WRITEPROTECT, &protecting);
    CHECK_EQ(pc_uffd_probe(PC_UFFD_ANY, &api), 0);
    if (api.features & UFFD_FEATURE_MOVE) { /* Linux 6.8 */
        CHECK_AGAIN(UFFDIO_MOVE, &moving);
        check_field(moving.move);
    }
    CHECK_EQ(pc_uffd_wake(area.uffd, range.start, range.len), 0); /* this does not care */
    CHECK_BLOCKED(&worker);
    (void)next_event(area.uffd, PC_UFFD_EVENT_REMOVE);
    CHECK_ENDS(&worker);
    copying.copy = 0;
    CHECK_SYS(ioctl(area.uffd, UFFDIO_COPY, &copying)); /* now it does, and none of the others has left anything behind */
    CHECK_EQ(copying.copy, area.unit);
    CHECK_PAGE(&area, 1, 1);
}

/* ---- faults ---- */

static void touch_inside(struct worker *worker)
{
    worker->value = *(volatile uint8_t *)(worker->area->base + worker->page * worker->area->unit + 1234);
}

static void exact_address(enum kind kind)
{
    for (int exact = 0; exact < 2; exact++) {
        struct area area = arm(kind, PAGES, PC_UFFD_MISSING, exact ? UFFD_FEATURE_EXACT_ADDRESS : 0);
        struct worker worker = {.area = &area, .page = 1};

        start(&worker, touch_inside);
        CHECK_EQ(next_event(area.uffd, PC_UFFD_EVENT_PAGEFAULT).address, address_of(&area, 1) + (exact ? 1234 : 0));
        CHECK_EQ(copy(&area, 1, 1, 0), 0);
        CHECK_ENDS(&worker);
        CHECK_SYS(munmap(area.base, area.bytes));
        if (area.alias) { /* huge pages are few */
            CHECK_SYS(munmap(area.alias, area.bytes));
            close(area.fd);
        }
    }
}

/* So many faults wait, says the kernel. */
static unsigned pending(int uffd)
{
    char path[64], line[128];
    unsigned count = 0;
    FILE *info;

    (void)snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", uffd);
    info = fopen(path, "re");
    CHECK(info);
    while (fgets(line, sizeof(line), info))
        (void)sscanf(line, "pending: %u", &count);
    (void)fclose(info);
    return count;
}

static void many_pending(enum kind kind)
{
    struct area area = arm(kind, kind == HUGETLB ? 4 : MANY, PC_UFFD_MISSING, 0);
    struct worker workers[MANY];
    struct pc_uffd_event events[MANY];
    uint64_t waiting[MANY] = {0};

    for (uint64_t i = 0; i < MANY; i++) {
        workers[i] = (struct worker){.area = &area, .page = i % area.pages};
        start(&workers[i], touch);
    }
    while (pending(area.uffd) != MANY)
        (void)sched_yield();
    CHECK_EQ(pc_uffd_read(area.uffd, events, MANY), MANY);
    for (uint64_t i = 0; i < MANY; i++) {
        CHECK_EQ(events[i].type, PC_UFFD_EVENT_PAGEFAULT);
        waiting[(events[i].address - address_of(&area, 0)) / area.unit]++;
    }
    for (uint64_t page = 0; page < area.pages; page++) {
        CHECK_EQ(waiting[page], MANY / area.pages); /* each of them its own event, also on one page */
        CHECK_EQ(copy(&area, page, (int)page + 1, 0), 0);
    }
    for (uint64_t i = 0; i < MANY; i++) {
        CHECK_ENDS(&workers[i]);
        CHECK_EQ(workers[i].value, i % area.pages + 1);
    }
    CHECK_EQ(pc_uffd_read(area.uffd, events, MANY), 0);
}

/* ---- the table ---- */

ON_ALL(event_fork)
ON_ALL(fork_without_event)
ON_ALL(event_remap)
ON_ALL(remap_without_event)
ON_ALL(remove_answered_by_zeros)
ON_KIND(dontneed_keeps_shared_pages, memfd, MEMFD)
ON_KIND(dontneed_keeps_shared_pages, hugetlb, HUGETLB)
ON_ALL(event_unmap)
ON_ALL(munmap_under_a_fault)
ON_ALL(eagain_while_an_event_is_unread)
ON_ALL(exact_address)
ON_ALL(many_pending)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_ALL(event_fork);
    RUN_ALL(fork_without_event);
    RUN_ALL(event_remap);
    RUN_ALL(remap_without_event);
    RUN_ALL(remove_answered_by_zeros);
    RUN(memfd_dontneed_keeps_shared_pages);
    RUN(hugetlb_dontneed_keeps_shared_pages);
    RUN_ALL(event_unmap);
    RUN_ALL(munmap_under_a_fault);
    RUN_ALL(eagain_while_an_event_is_unread);
    RUN_ALL(exact_address);
    RUN_ALL(many_pending);
    return test_end();
}
