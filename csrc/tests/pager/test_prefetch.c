/* SPDX-License-Identifier: Apache-2.0
 *
 * Pages requested before a fault: as many as allowed, ranges, and what watches say of them. Faults never wait behind them.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

/* ---- pages that nobody touches ------------------------------------------------------------------------------------ */

static void request_missing(int kind)
{
    const uint64_t pages[] = {scaled(kind, 900), scaled(kind, 300)};
    uint64_t few = kind == PC_MEMORY_HUGETLB ? 2 : 10;
    struct rig rig;
    int knives[2];

    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 0);
    CHECK_EQ(add_shard(&rig, 0), 0);
    CHECK_EQ(add_shard(&rig, 0), 1);
    arm(&rig, 0, 0, 0, pages[0]);
    arm(&rig, 1, 1, 0, pages[1]);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    connect_urgent(&rig, 0, &knives[0]);
    CHECK_EQ(pc_pager_request_missing(rig.pager, 0), 0);
    /* As many as one asks for. */
    CHECK_EQ(pc_pager_request_missing(rig.pager, few), (int64_t)few);
    WAIT_UNTIL(pager_stats(&rig).resident_pages >= few);
    /* The rest; the second shard gets its channel only now, the first one loses its own. */
    CHECK(pc_pager_request_missing(rig.pager, UINT64_MAX) >= (int64_t)(all_pages(&rig) - few));
    WAIT_UNTIL(pager_stats(&rig).resident_pages >= pages[0] / 2);
    CHECK_SYS(shutdown(knives[0], SHUT_RDWR));
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
    connect_urgent(&rig, 1, &knives[1]);
    reconnect(&rig, 0, &knives[0]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(&rig).faults, 0);
    CHECK_EQ(pager_stats(&rig).resident_pages, all_pages(&rig));
    CHECK(pager_stats(&rig).requests >= all_pages(&rig));
    CHECK_EQ(resident_bytes(&rig), count_content(&rig, DATA) * rig.page_bytes);
    check_content(&rig);
    CHECK_EQ(pc_pager_request_missing(rig.pager, UINT64_MAX), 0);
    close(knives[0]);
    close(knives[1]);
    close_rig(&rig);
}
OF_EACH_KIND(request_missing)

/* No more than a window of requests is under way without a fault, however many faults are served meanwhile. */
static void filling_leaves_room_for_faults(void)
{
    const uint64_t pages[] = {1000};
    uint64_t asked = 0, faulted = 0;
    struct toucher toucher;
    struct pc_frame frame;
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    CHECK_EQ(pc_pager_request_missing(rig.pager, UINT64_MAX), 1000);
    while (speaks(fd, SERVED_MS)) {
        CHECK(receive_frame(fd, &frame));
        CHECK_EQ(frame.first_page, asked); /* in order */
        asked++;
    }
    CHECK(asked > 1 && asked < 500);
    for (uint64_t page = 999; page > 800; page--) {
        if (content_of(0, page) != DATA)
            continue;
        touch_one(&toucher, &rig, 0, page);
        CHECK(receive_frame(fd, &frame));
        CHECK_EQ(frame.first_page, page);
        frame.type = PC_FRAME_PAGES;
        frame.flags = PC_FRAME_DEMAND;
        {
            uint8_t *content = malloc(rig.page_bytes);

            CHECK(content != NULL);
            make_page(0, page, rig.page_bytes, content);
            CHECK(send_frame(fd, frame, content, rig.page_bytes));
            free(content);
        }
        join_toucher(&toucher);
        faulted++;
    }
    CHECK(faulted > 20);
    if (speaks(fd, SERVED_MS)) {
        CHECK(receive_frame(fd, &frame));
        FAIL("page %llu was asked for although %llu answers are due", (unsigned long long)frame.first_page,
             (unsigned long long)asked);
    }
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

/* ---- ranges ahead of the faults ------------------------------------------------------------------------------------ */

static int new_eventfd(void)
{
    return CHECK_SYS(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
}

static void expect_notified(int fd)
{
    uint64_t count = 0;

    CHECK(speaks(fd, PATIENCE_MS));
    CHECK_EQ(read(fd, &count, sizeof(count)), sizeof(count));
    CHECK_EQ(count, 1);
}

/* Ranges that overlap, from several threads, beside faults: each page once, and every waiter is notified. */
struct ranger {
    struct rig *rig;
    uint32_t block;
    uint64_t first, pages;
    pthread_t thread;
};

static void *want_range(void *argument)
{
    struct ranger *ranger = argument;
    struct pc_pager *pager = ranger->rig->pager;
    uint64_t known[MAX_PAGES / 64];
    int fd = new_eventfd();
    int64_t ticket;

    CHECK(pc_pager_request_range(pager, ranger->block, ranger->first, ranger->pages) >= 0);
    ticket = pc_pager_watch(pager, ranger->block, ranger->first, ranger->pages, fd);
    CHECK(ticket >= 0);
    if (ticket)
        expect_notified(fd);
    CHECK_EQ(pc_pager_received(pager, ranger->block, known), 0);
    CHECK(pc_bitmap_next(known, ranger->first + ranger->pages, ranger->first, 0) >= ranger->first + ranger->pages);
    CHECK_EQ(pc_pager_request_range(pager, ranger->block, ranger->first, ranger->pages), 0);
    CHECK_EQ(pc_pager_watch(pager, ranger->block, ranger->first, ranger->pages, fd), 0);
    CHECK(!speaks(fd, 0));
    close(fd);
    return NULL;
}

static void ranges(int kind)
{
    const uint64_t pages[] = {scaled(kind, 900), scaled(kind, 300)};
    struct visit *visits = malloc((pages[0] + pages[1]) * sizeof(*visits));
    struct ranger rangers[12];
    struct toucher toucher;
    struct rig rig;

    CHECK(visits != NULL);
    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 0);
    CHECK_EQ(add_shard(&rig, 0), 0);
    CHECK_EQ(add_shard(&rig, 0), 1);
    /* A block of two shards: a range may lie on both sides of the border. */
    arm(&rig, 0, 0, 0, pages[0] / 2);
    arm(&rig, 1, 0, pages[0] / 2, pages[0] - pages[0] / 2);
    arm(&rig, 1, 1, 0, pages[1]);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (size_t i = 0; i < 12; i++) {
        struct ranger *ranger = &rangers[i];

        ranger->rig = &rig;
        ranger->block = i % 3 == 2;
        ranger->first = test_below(pages[ranger->block]);
        ranger->pages = 1 + test_below(pages[ranger->block] - ranger->first);
        CHECK_EQ(pthread_create(&ranger->thread, NULL, want_range, ranger), 0);
    }
    start_toucher(&toucher, &rig, -1, visits, shuffled(&rig, -1, visits));
    free(visits);
    connect_urgent(&rig, 0, NULL);
    connect_urgent(&rig, 1, NULL);
    for (size_t i = 0; i < 12; i++)
        CHECK_EQ(pthread_join(rangers[i].thread, NULL), 0);
    join_toucher(&toucher);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(&rig).requests, all_pages(&rig));
    CHECK_EQ(pager_stats(&rig).duplicate_pages, 0);
    check_content(&rig);
    close_rig(&rig);
}
OF_EACH_KIND(ranges)

/* With the test as the source: what is asked for, how much at a time, in what order, and again after a lost channel. */
static void ranges_leave_room_for_faults(void)
{
    const uint64_t pages[] = {1000};
    uint8_t asked[1000] = {0};
    uint64_t count = 0, known = 0;
    struct toucher toucher;
    struct pc_frame frame;
    struct rig rig;
    int fd, notified = new_eventfd();
    int64_t ticket;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    (void)add_shard(&rig, 0);
    arm(&rig, 0, 0, 0, 900);
    CHECK_EQ(pc_pager_request_range(rig.pager, 1, 0, 1), -EINVAL);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 0, 1001), -EINVAL);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 1001, 0), -EINVAL);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, UINT64_MAX, 2), -EINVAL);
    CHECK_EQ(pc_pager_watch(rig.pager, 0, 999, 2, notified), -EINVAL);
    CHECK_EQ(pc_pager_watch(rig.pager, 0, 0, 1, -1), -EBADF);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 1000, 0), 0);
    CHECK_EQ(pc_pager_watch(rig.pager, 0, 1000, 0, notified), 0);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 950, 10), 10); /* not armed: not there, and not to be asked for */
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 100, 500), 500); /* no channel yet */
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 650, 50), 50);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 300, 400), 400);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 310, 20), 20);
    ticket = pc_pager_watch(rig.pager, 0, 698, 2, notified);
    CHECK(ticket > 0);
    pc_pager_unwatch(rig.pager, ticket); /* nobody is notified */
    pc_pager_unwatch(rig.pager, ticket);
    fd = script_urgent(&rig, 0);
    while (speaks(fd, SERVED_MS)) {
        CHECK(receive_frame(fd, &frame));
        CHECK(frame.request_id & PC_PAGER_REQUEST_AHEAD);
        CHECK(frame.first_page >= 100 && frame.first_page < 700);
        CHECK_EQ(frame.pages, 1);
        CHECK(!asked[frame.first_page]++);
        count++;
    }
    CHECK(count > 1 && count < 300);
    CHECK(asked[100] && asked[300] && asked[650]); /* none of them waits for the others */
    /* A fault beside a full window goes at once. */
    touch_one(&toucher, &rig, 0, 850);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 850);
    CHECK(!(frame.request_id & PC_PAGER_REQUEST_AHEAD));
    /* The channel is lost, and again while what was lost is requested: the fault first, then all of the ranges, each page once. */
    for (int loss = 0; loss < 3; loss++) {
        close(fd);
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
        fd = script_urgent(&rig, 0);
        CHECK(receive_frame(fd, &frame));
        CHECK_EQ(frame.first_page, 850);
        for (int i = 0; i < 60 && loss < 2; i++)
            CHECK(receive_frame(fd, &frame));
    }
    memset(asked, 0, sizeof(asked));
    serve_page(&rig, fd, 0, 850);
    join_toucher(&toucher);
    ticket = pc_pager_watch(rig.pager, 0, 100, 600, notified);
    CHECK(ticket > 0);
    while (known < 600) {
        uint8_t *content = malloc(rig.page_bytes);

        CHECK(content != NULL);
        CHECK(!speaks(notified, 0));
        CHECK(receive_frame(fd, &frame));
        CHECK(frame.first_page >= 100 && frame.first_page < 700);
        CHECK(!asked[frame.first_page]++);
        frame.flags = PC_FRAME_DEMAND;
        make_page(0, frame.first_page, rig.page_bytes, content);
        frame.type = content_of(0, frame.first_page) == DATA ? PC_FRAME_PAGES : PC_FRAME_ZERO;
        CHECK(send_frame(fd, frame, content, frame.type == PC_FRAME_PAGES ? rig.page_bytes : 0));
        free(content);
        known++;
    }
    expect_notified(notified);
    CHECK(!speaks(fd, SERVED_MS));
    ticket = pc_pager_watch(rig.pager, 0, 0, 1000, notified); /* left behind */
    CHECK(ticket > 0);
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    CHECK(!speaks(notified, 0));
    close(notified);
}

/* A source that does not answer what was asked for ahead: a thread that needs it waits, which is seen, and with the next channel its page
 * is asked for as any other that is waited for. */
static void a_late_page_is_waited_for_and_asked_for_anew(void)
{
    const uint64_t pages[] = {1000};
    struct toucher toucher;
    struct pc_frame frame;
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 100, 1), 1);
    CHECK(receive_frame(fd, &frame));
    CHECK(frame.request_id & PC_PAGER_REQUEST_AHEAD);
    touch_one(&toucher, &rig, 0, 100);
    wait_pending(&rig, 1);
    CHECK(pager_stats(&rig).oldest_pending_ns > 0);
    close(fd);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
    fd = script_urgent(&rig, 0);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 100);
    CHECK(!(frame.request_id & PC_PAGER_REQUEST_AHEAD));
    serve_page(&rig, fd, 0, 100);
    join_toucher(&toucher);
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

/* A source that answers in an order of its own is told, once, that a thread waits. */
static void of_a_late_page_the_source_is_told(void)
{
    const uint64_t pages[] = {1000};
    struct toucher touchers[2];
    struct pc_frame frame;
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK_EQ(pc_pager_ask_again(rig.pager), 0);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 100, 30), 30);
    for (uint64_t page = 100; page < 130; page++) {
        CHECK(receive_frame(fd, &frame));
        CHECK(frame.request_id & PC_PAGER_REQUEST_AHEAD);
    }
    for (int i = 0; i < 2; i++)
        touch_one(&touchers[i], &rig, 0, 129);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 129);
    CHECK_EQ(frame.request_id & (PC_PAGER_REQUEST_AHEAD | PC_PAGER_REQUEST_AGAIN), PC_PAGER_REQUEST_AGAIN);
    wait_pending(&rig, 2);
    CHECK(!speaks(fd, SERVED_MS));
    CHECK_EQ(pager_stats(&rig).requests, 30);
    serve_page(&rig, fd, 0, 129);
    for (int i = 0; i < 2; i++)
        join_toucher(&touchers[i]);
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(request_missing);
    RUN_CASE(filling_leaves_room_for_faults);
    RUN_KINDS(ranges);
    RUN_CASE(ranges_leave_room_for_faults);
    RUN_CASE(a_late_page_is_waited_for_and_asked_for_anew);
    RUN_CASE(of_a_late_page_the_source_is_told);
    return test_end();
}
