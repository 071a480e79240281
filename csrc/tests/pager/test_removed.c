/* SPDX-License-Identifier: Apache-2.0
 *
 * The pager and memory that is thrown away: by the machine itself, unseen, and by the owner of a userfaultfd that tells of it
 * (REMOVE, UNMAP), before, while and after it comes.
 *
 * Linked with --wrap: what the pager asks of the kernel goes through the functions below, by which a case holds a placement at the
 * instant in which it wants it, or answers in the kernel's place.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

int __real_pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int __wrap_pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);

static _Atomic(void *) watched;   /* a placement on this page is held, or on one of the next */
#define WATCHED_PAGES 3
static atomic_int entered, go_on; /* before the placement: how many were, and may go on */
static atomic_int placed, leave;  /* after it */
static atomic_int refusals;       /* so many placements get EAGAIN, and no event ends it */

int __wrap_pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes)
{
    uint64_t at = (uint64_t)(uintptr_t)atomic_load(&watched);
    bool held = at && address - at < WATCHED_PAGES * bytes; /* frames of these tests have one page */
    int result;

    if (atomic_load(&refusals) > 0 && atomic_fetch_sub(&refusals, 1) > 0) {
        *done_bytes = 0;
        return -EAGAIN;
    }
    if (held) {
        int number = atomic_fetch_add(&entered, 1);

        WAIT_UNTIL(atomic_load(&go_on) > number);
    }
    result = __real_pc_uffd_copy(uffd, address, source, bytes, mode, done_bytes);
    if (held) {
        atomic_store(&placed, 1);
        WAIT_UNTIL(atomic_load(&leave));
    }
    return result;
}

static void throw_away(const struct rig *rig, uint64_t page, uint64_t pages)
{
    CHECK_SYS(madvise(dest_page(rig, 0, page), pages * rig->page_bytes,
                      rig->kind == PC_MEMORY_ANON ? MADV_DONTNEED : MADV_REMOVE));
}

static bool zero_here(const struct rig *rig, uint64_t page)
{
    return pc_is_zero(dest_page(rig, 0, page), rig->page_bytes);
}

/* ---- thrown away unseen ---- */

static void *touch_discard_touch(void *argument)
{
    const struct rig *rig = argument;

    CHECK(is_page(0, 0, rig->page_bytes, dest_page(rig, 0, 0)));
    throw_away(rig, 0, 1);
    CHECK(zero_here(rig, 0));
    return NULL;
}

/* Between the placement and the moment from which the pager knows of it the machine throws the page away and touches it again. */
static void discarded_while_it_is_placed(int kind)
{
    const uint64_t pages[] = {scaled(kind, 64)};
    struct pc_frame frame;
    struct rig rig;
    pthread_t thread;
    int fd, bulk_fd;

    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    atomic_store(&watched, dest_page(&rig, 0, 0));
    atomic_store(&go_on, INT32_MAX);
    CHECK_EQ(pthread_create(&thread, NULL, touch_discard_touch, &rig), 0);
    CHECK(receive_frame(fd, &frame));
    serve_page(&rig, bulk_fd, 0, 0);
    WAIT_UNTIL(atomic_load(&placed));
    WAIT_UNTIL(pager_stats(&rig).faults >= 2);
    atomic_store(&leave, 1);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    wait_pending(&rig, 0);
    CHECK_EQ(pager_stats(&rig).requests, 1);
    close(fd);
    close(bulk_fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}
OF_EACH_KIND(discarded_while_it_is_placed)

/* The same without a hook: on one processor the thread that is woken runs before the one that placed. */
static void *touch_discard_many(void *argument)
{
    const struct rig *rig = argument;

    for (uint64_t page = 0; page < rig->pages[0]; page++) {
        (void)*(volatile uint8_t *)dest_page(rig, 0, page);
        throw_away(rig, page, 1);
        CHECK_EQ(*(volatile uint8_t *)dest_page(rig, 0, page), 0);
    }
    return NULL;
}

static void discards_on_one_processor(int kind)
{
    const uint64_t pages[] = {scaled(kind, 1000)};
    struct pc_frame frame;
    struct rig rig;
    pthread_t thread;
    cpu_set_t one;
    int fd, bulk_fd;

    CPU_ZERO(&one);
    CPU_SET((size_t)sched_getcpu(), &one);
    CHECK_SYS(sched_setaffinity(0, sizeof(one), &one));
    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    CHECK_EQ(pthread_create(&thread, NULL, touch_discard_many, &rig), 0);
    for (uint64_t page = 0; page < pages[0]; page++) {
        CHECK(receive_frame(fd, &frame));
        CHECK_EQ(frame.first_page, page);
        serve_page(&rig, bulk_fd, 0, page);
    }
    CHECK_EQ(pthread_join(thread, NULL), 0);
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}
OF_EACH_KIND(discards_on_one_processor)

/* ---- a userfaultfd that tells ---- */

#define EVENT_REMOVE (UINT64_C(1) << 3)
#define MISSING_SHMEM (UINT64_C(1) << 5)
#define EVENT_UNMAP (UINT64_C(1) << 6)
#define MISSING_HUGETLBFS (UINT64_C(1) << 4)

static int open_uffd(uint64_t features)
{
    int uffd = pc_uffd_open(PC_UFFD_ANY, features, NULL);

    if (uffd < 0)
        SKIP("uffd-features", "no userfaultfd with features %#llx: %s", (unsigned long long)features, strerror(-uffd));
    return uffd;
}

/* As somebody else's: few features, and neither THREAD_ID nor minor faults. */
static void open_foreign(struct rig *rig, int kind, uint64_t small_pages, uint64_t events)
{
    const uint64_t pages[] = {scaled(kind, small_pages)};
    uint64_t features = events | (kind == PC_MEMORY_MEMFD ? MISSING_SHMEM : kind == PC_MEMORY_HUGETLB ? MISSING_HUGETLBFS : 0);
    int uffd;

    open_pager(rig, kind, 1, pages);
    uffd = open_uffd(features);
    if (pc_pager_adopt_shard(rig->pager, uffd, features, 0, message, sizeof(message)))
        FAIL("%s", message);
    arm(rig, 0, 0, 0, pages[0]);
}

/* Everything that was not thrown away comes; then nothing is missing. */
static void serve_the_rest(struct rig *rig, int fd)
{
    for (uint64_t page = 0; page < rig->pages[0]; page++)
        serve_page(rig, fd, 0, page);
    EXPECT_EVENT(&rig->from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig->from_pager, PC_EVENT_FATAL);
}

/* Whatever comes later, what was thrown away is zero; what the machine writes there afterwards stays. */
static void removed_pages_are_zero(int kind)
{
    struct pc_frame frame;
    struct toucher toucher;
    struct rig rig;
    uint64_t last;
    int fd, bulk_fd;

    open_foreign(&rig, kind, 256, EVENT_REMOVE);
    last = rig.pages[0] - 1;
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    throw_away(&rig, 0, 1); /* has never been there */
    CHECK(zero_here(&rig, 0));
    *dest_page(&rig, 0, 0) = 7;
    CHECK(!speaks(fd, SERVED_MS)); /* nobody was asked */
    touch_one(&toucher, &rig, 0, last); /* comes, and is thrown away */
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, last);
    serve_page(&rig, fd, 0, last);
    join_toucher(&toucher);
    throw_away(&rig, last, 1);
    CHECK(zero_here(&rig, last));
    *dest_page(&rig, 0, last) = 8;
    serve_the_rest(&rig, bulk_fd);
    CHECK_EQ(*dest_page(&rig, 0, 0), 7);
    CHECK_EQ(*dest_page(&rig, 0, last), 8);
    for (uint64_t page = 1; page < last; page++)
        CHECK(is_page(0, page, rig.page_bytes, dest_page(&rig, 0, page)));
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}
OF_EACH_KIND(removed_pages_are_zero)

static void *read_zero(void *argument)
{
    CHECK(zero_here(argument, 0));
    return NULL;
}

/* A thread waits for a page that is thrown away by another. */
static void removed_under_a_fault(int kind)
{
    struct pc_frame frame;
    struct rig rig;
    pthread_t thread;
    int fd;

    open_foreign(&rig, kind, 64, EVENT_REMOVE);
    fd = script_urgent(&rig, 0);
    CHECK_EQ(pthread_create(&thread, NULL, read_zero, &rig), 0);
    CHECK(receive_frame(fd, &frame));
    throw_away(&rig, 0, 1);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    wait_pending(&rig, 0);
    serve_the_rest(&rig, fd); /* the answer is late */
    CHECK(zero_here(&rig, 0));
    close(fd);
    close_rig(&rig);
}
OF_EACH_KIND(removed_under_a_fault)

struct remover {
    struct rig *rig;
    uint64_t page, pages;
    atomic_bool done;
    pthread_t thread;
};

static void *remove_pages(void *argument)
{
    struct remover *remover = argument;

    throw_away(remover->rig, remover->page, remover->pages);
    atomic_store(&remover->done, true);
    return NULL;
}

/* Two bulk threads and the fault thread of another shard have decided to place a page each, at the same time; before they do, all three are
 * thrown away, which cannot be done before the last of those placements is. */
static void removed_between_decision_and_placement(int kind)
{
    struct remover remover = {0};
    struct rig rig;
    int fds[WATCHED_PAGES];

    open_foreign(&rig, kind, 64, EVENT_REMOVE);
    CHECK_EQ(add_shard(&rig, 0), 1);
    remover.rig = &rig;
    remover.pages = WATCHED_PAGES;
    atomic_store(&watched, dest_page(&rig, 0, 0));
    atomic_store(&leave, 1);
    for (int i = 0; i < WATCHED_PAGES; i++) {
        fds[i] = i < 2 ? script_bulk(&rig, 2 * (uint32_t)i) : script_urgent(&rig, 1); /* each has a lane of its own */
        serve_page(&rig, fds[i], 0, (uint64_t)i);
    }
    WAIT_UNTIL(atomic_load(&entered) == WATCHED_PAGES);
    CHECK_EQ(pthread_create(&remover.thread, NULL, remove_pages, &remover), 0);
    for (int i = 1; i <= WATCHED_PAGES; i++) {
        pc_sleep_ns(SERVED_MS * 1000000);
        CHECK(!atomic_load(&remover.done));
        atomic_store(&go_on, i < WATCHED_PAGES ? i : INT32_MAX);
    }
    CHECK_EQ(pthread_join(remover.thread, NULL), 0);
    atomic_store(&watched, NULL);
    serve_the_rest(&rig, fds[0]);
    for (uint64_t page = 0; page < WATCHED_PAGES; page++)
        CHECK(zero_here(&rig, page));
    CHECK_EQ(pager_stats(&rig).removed_pages, WATCHED_PAGES);
    for (int i = 0; i < WATCHED_PAGES; i++)
        close(fds[i]);
    close_rig(&rig);
}
OF_EACH_KIND(removed_between_decision_and_placement)

/* Page after page is thrown away, and touched, while everything comes: nobody hangs, nothing old is seen. */
static void *remove_many(void *argument)
{
    const struct rig *rig = argument;

    for (uint64_t round = 0; round < 3; round++)
        for (uint64_t page = 0; page < rig->pages[0]; page += 2) {
            throw_away(rig, page, 1);
            CHECK(zero_here(rig, page));
        }
    return NULL;
}

static void removals_beside_arrivals(int kind)
{
    struct pc_frame frame;
    struct toucher toucher;
    struct visit *visits;
    struct rig rig;
    pthread_t thread;
    size_t count = 0;
    int fd, bulk_fds[3];

    open_foreign(&rig, kind, 600, EVENT_REMOVE);
    visits = calloc(rig.pages[0], sizeof(*visits));
    CHECK(visits != NULL);
    for (uint64_t page = 1; page < rig.pages[0]; page += 2)
        visits[count++].page = page;
    fd = script_urgent(&rig, 0);
    for (uint32_t i = 0; i < 3; i++)
        bulk_fds[i] = script_bulk(&rig, i);
    CHECK_EQ(pthread_create(&thread, NULL, remove_many, &rig), 0);
    start_toucher(&toucher, &rig, -1, visits, count);
    for (uint64_t page = 0; page < rig.pages[0]; page++) {
        while (speaks(fd, 0)) {
            CHECK(receive_frame(fd, &frame));
            serve_page(&rig, fd, 0, frame.first_page);
        }
        serve_page(&rig, bulk_fds[page % 3], 0, page);
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    join_toucher(&toucher);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    free(visits);
    close(fd);
    for (int i = 0; i < 3; i++)
        close(bulk_fds[i]);
    close_rig(&rig);
}
OF_EACH_KIND(removals_beside_arrivals)

/* Only whole pages are: half a huge page was not thrown away. (The kernel tells whole ones only, as it takes whole ones only.) */
static void everything_may_be_unmapped(void)
{
    struct rig rig;
    int fd;

    open_foreign(&rig, PC_MEMORY_ANON, 64, EVENT_REMOVE | EVENT_UNMAP);
    fd = script_urgent(&rig, 0);
    CHECK_SYS(munmap(dest_page(&rig, 0, 32), 32 * rig.page_bytes));
    serve_the_rest(&rig, fd);
    for (uint64_t page = 0; page < 32; page++)
        CHECK(is_page(0, page, rig.page_bytes, dest_page(&rig, 0, page)));
    close(fd);
    close_rig(&rig);
}

/* EAGAIN that no event ends: later, then. */
static void refused_for_a_while(int kind)
{
    struct toucher toucher;
    struct pc_frame frame;
    struct rig rig;
    int fd, bulk_fd;

    open_foreign(&rig, kind, 64, EVENT_REMOVE);
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    touch_one(&toucher, &rig, 0, 0);
    CHECK(receive_frame(fd, &frame));
    atomic_store(&refusals, 5);
    serve_page(&rig, fd, 0, 0);
    join_toucher(&toucher);
    CHECK(atomic_load(&refusals) <= 0);
    atomic_store(&refusals, 5);
    serve_the_rest(&rig, bulk_fd);
    CHECK_EQ(pager_stats(&rig).duplicate_pages, 1);
    /* And an end is possible meanwhile. */
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}
OF_EACH_KIND(refused_for_a_while)

static void disconnected_while_refused(void)
{
    struct rig rig;
    int fd, bulk_fd;

    open_foreign(&rig, PC_MEMORY_ANON, 64, EVENT_REMOVE);
    atomic_store(&refusals, INT32_MAX);
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    serve_page(&rig, fd, 0, 0);
    serve_page(&rig, bulk_fd, 0, 1);
    while (atomic_load(&refusals) > INT32_MAX - 4)
        (void)sched_yield();
    CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
    atomic_store(&refusals, 0);
    close(fd);
    close(bulk_fd);
    fd = script_urgent(&rig, 0);
    serve_the_rest(&rig, fd);
    check_content(&rig);
    close(fd);
    close_rig(&rig);
}

/* ---- what may be adopted ---- */

static void expect_refused(struct rig *rig, int uffd, uint64_t features, const char *text)
{
    CHECK(pc_pager_adopt_shard(rig->pager, uffd, features, 0, message, sizeof(message)) < 0);
    if (!strstr(message, text))
        FAIL("refused with \"%s\" rather than \"%s\"", message, text);
}

static void only_what_can_be_served_is_adopted(void)
{
    const uint64_t pages[] = {16};
    struct rig rig;
    int uffd;

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    expect_refused(&rig, -1, 0, "no userfaultfd");
    expect_refused(&rig, CHECK_SYS(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)), 0, "is no userfaultfd");
    uffd = open_uffd(0);
    CHECK_SYS(fcntl(uffd, F_SETFL, 0));
    expect_refused(&rig, uffd, 0, "blocking");
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd >= 0) /* where the system call is allowed */
        expect_refused(&rig, uffd, 0, "UFFDIO_API");
    expect_refused(&rig, open_uffd(UINT64_C(1) << 1), 0, "forks"); /* whatever is said of it */
    expect_refused(&rig, open_uffd(UINT64_C(1) << 2), 0, "memory that moves");
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

/* Whoever shares the descriptor's open file takes O_NONBLOCK away: faults are served all the same. */
static void made_blocking_by_others(void)
{
    const uint64_t pages[] = {16};
    struct toucher toucher;
    struct pc_frame frame;
    struct rig rig;
    int fd, uffd, shared;

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    uffd = open_uffd(0);
    shared = CHECK_SYS(fcntl(uffd, F_DUPFD_CLOEXEC, 0));
    if (pc_pager_adopt_shard(rig.pager, uffd, 0, 0, message, sizeof(message)))
        FAIL("%s", message);
    arm(&rig, 0, 0, 0, 16);
    fd = script_urgent(&rig, 0);
    CHECK_SYS(fcntl(shared, F_SETFL, 0));
    touch_one(&toucher, &rig, 0, 0);
    CHECK(receive_frame(fd, &frame));
    serve_page(&rig, fd, 0, 0);
    join_toucher(&toucher);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    close(fd);
    close(shared);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

/* Without THREAD_ID nobody knows how many threads the events of one page are: many wait, all are woken. */
static void many_threads_without_names(int kind)
{
    struct toucher touchers[40], other;
    struct pc_frame frame;
    struct rig rig;
    int fd;

    open_foreign(&rig, kind, 64, 0);
    fd = script_urgent(&rig, 0);
    for (int i = 0; i < 40; i++)
        touch_one(&touchers[i], &rig, 0, 0);
    WAIT_UNTIL(pager_stats(&rig).faults >= 40);
    touch_one(&other, &rig, 0, 1);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 0);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 1);
    serve_page(&rig, fd, 0, 1);
    join_toucher(&other);
    serve_page(&rig, fd, 0, 0);
    for (int i = 0; i < 40; i++)
        join_toucher(&touchers[i]);
    CHECK_EQ(pager_stats(&rig).requests, 2);
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}
OF_EACH_KIND(many_threads_without_names)

/* A hole that others filled before it was armed, where the kernel would not tell of it: its zeros are not the machine's. */
static void filled_before_without_minor_faults(int kind)
{
    const uint64_t pages[] = {scaled(kind, 64)};
    uint64_t features = kind == PC_MEMORY_HUGETLB ? MISSING_HUGETLBFS : MISSING_SHMEM;
    struct toucher toucher;
    struct pc_frame frame;
    struct rig rig;
    volatile uint8_t *alias;
    int fd, uffd;

    open_pager(&rig, kind, 1, pages);
    alias = CHECK_SYS(mmap(NULL, rig.dest[0].size_bytes, PROT_READ, MAP_SHARED, rig.dest[0].fd, 0));
    for (uint64_t page = 0; page < pages[0]; page++)
        CHECK_EQ(alias[page * rig.page_bytes], 0);
    CHECK_SYS(munmap((void *)(uintptr_t)alias, rig.dest[0].size_bytes));
    uffd = open_uffd(features);
    if (pc_pager_adopt_shard(rig.pager, uffd, features, 0, message, sizeof(message)))
        FAIL("%s", message);
    arm(&rig, 0, 0, 0, pages[0]);
    fd = script_urgent(&rig, 0);
    touch_one(&toucher, &rig, 0, 0);
    CHECK(receive_frame(fd, &frame));
    serve_page(&rig, fd, 0, 0);
    join_toucher(&toucher);
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

static void filled_before_without_minor_faults_memfd(void)
{
    filled_before_without_minor_faults(PC_MEMORY_MEMFD);
}

static void filled_before_without_minor_faults_hugetlb(void)
{
    filled_before_without_minor_faults(PC_MEMORY_HUGETLB);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(discarded_while_it_is_placed);
    RUN_KINDS(discards_on_one_processor);
    RUN_KINDS(removed_pages_are_zero);
    RUN_KINDS(removed_under_a_fault);
    RUN_KINDS(removed_between_decision_and_placement);
    RUN_KINDS(removals_beside_arrivals);
    RUN_CASE(everything_may_be_unmapped);
    RUN_KINDS(refused_for_a_while);
    RUN_CASE(disconnected_while_refused);
    RUN_CASE(only_what_can_be_served_is_adopted);
    RUN_CASE(made_blocking_by_others);
    RUN_KINDS(many_threads_without_names);
    RUN_CASE(filled_before_without_minor_faults_memfd);
    RUN_CASE(filled_before_without_minor_faults_hugetlb);
    return test_end();
}
