/* SPDX-License-Identifier: Apache-2.0
 *
 * The pager under pressure: a peer that says the same again and again, memory that is short, many who look at it and attach
 * to it at once. What a peer can cost is bounded; what was short is had later; nobody who waits is forgotten.
 *
 * Linked with --wrap, as test_pager_removed.c is.
 */
#include "tests/support/rig.h"

int __real_pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int __wrap_pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int __real_pc_uffd_zeropage(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int __wrap_pc_uffd_zeropage(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);

static atomic_int copy_error, zeropage_error; /* what the kernel says instead of doing it */
static atomic_bool hold;                      /* a copy is held before it says so */
static atomic_int held, refused;

int __wrap_pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes)
{
    if (!atomic_load(&copy_error))
        return __real_pc_uffd_copy(uffd, address, source, bytes, mode, done_bytes);
    atomic_fetch_add(&held, 1);
    while (atomic_load(&hold))
        pc_sleep_ns(100000);
    atomic_fetch_add(&refused, 1);
    *done_bytes = 0;
    return -atomic_load(&copy_error);
}

int __wrap_pc_uffd_zeropage(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes)
{
    if (!atomic_load(&zeropage_error))
        return __real_pc_uffd_zeropage(uffd, address, bytes, mode, done_bytes);
    atomic_fetch_add(&refused, 1);
    *done_bytes = 0;
    return -atomic_load(&zeropage_error);
}

static void serve_all(struct rig *rig, int fd)
{
    for (uint64_t page = 0; page < rig->pages[0]; page++)
        serve_page(rig, fd, 0, page);
    EXPECT_EVENT(&rig->from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
}

/* ---- a peer that repeats itself ---- */

static bool send_end(int fd)
{
    return send_frame(fd, (struct pc_frame){.type = PC_FRAME_END}, NULL, 0);
}

static void one_end_a_channel(void)
{
    const uint64_t pages[] = {16};
    struct pc_event event;
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    for (int i = 0; i < 2; i++) { /* each connection may say it once */
        fd = script_bulk(&rig, 0);
        CHECK(send_end(fd));
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, NULL);
        CHECK(!speaks(fd, SERVED_MS));
        CHECK(send_end(fd));
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 0, &event);
        CHECK_EQ(event.error, EBADMSG);
        CHECK(strstr(event.text, "second time") != NULL);
        EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_BULK_END);
        close(fd);
    }
    CHECK_EQ(pager_stats(&rig).frames_refused, 2);
    fd = script_bulk(&rig, 0);
    serve_all(&rig, fd);
    close(fd);
    close_rig(&rig);
}

/* What the source cannot serve is reported once for each channel; for a page that is here it means nothing. */
static void errors_are_reported_once(void)
{
    const uint64_t pages[] = {16};
    struct pc_frame frame = {.type = PC_FRAME_ERROR, .flags = PC_FRAME_DEMAND, .first_page = 0, .pages = 1};
    struct pc_event event;
    struct rig rig;
    int fd, bulk_fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    serve_page(&rig, fd, 0, 0);
    CHECK(is_page(0, 0, rig.page_bytes, dest_page(&rig, 0, 0)));
    for (int i = 0; i < 100; i++)
        CHECK(send_frame(fd, frame, "no", 2) && send_frame(bulk_fd, frame, "no", 2));
    serve_page(&rig, fd, 0, 1);
    serve_page(&rig, bulk_fd, 0, 2);
    CHECK(is_page(0, 1, rig.page_bytes, dest_page(&rig, 0, 1)));
    CHECK(is_page(0, 2, rig.page_bytes, dest_page(&rig, 0, 2)));
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    frame.pages = 16; /* the first of them are here */
    for (int i = 0; i < 100; i++) {
        CHECK(send_frame(fd, frame, "no", 2) && send_frame(bulk_fd, frame, "no", 2));
        if (i % 10 == 0)
            collect(&rig.from_pager); /* read at once or not: it is not reported again */
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, PC_CHANNEL_URGENT, 0, &event);
    CHECK_EQ(event.error, EIO);
    CHECK(strstr(event.text, "cannot serve page") != NULL);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, PC_CHANNEL_BULK, 0, NULL); /* before all pages are here */
    serve_all(&rig, fd);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}

/* However often channels come and go and say their end: what nobody has read stays a few events, and the last word is among them. */
static void events_are_bounded(void)
{
    const uint64_t pages[] = {16};
    struct rig rig;
    int fd, bulk_fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    for (int i = 0; i < 600; i++) {
        int pair[2], result;

        close(script_urgent(&rig, 0));
        tcp_pair(pair);
        do /* the one before may not have ended yet */
            result = pc_pager_attach_bulk(rig.pager, 1, CHECK_SYS(fcntl(pair[1], F_DUPFD_CLOEXEC, 0)), NULL);
        while (result == -EBUSY);
        CHECK_EQ(result, 0);
        CHECK(send_end(pair[0]));
        close(pair[0]);
        close(pair[1]);
    }
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    for (uint64_t page = 0; page < pages[0]; page++)
        serve_page(&rig, page % 2 ? fd : bulk_fd, 0, page);
    check_content(&rig);
    collect(&rig.from_pager);
    CHECK(rig.from_pager.count <= 5);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 1, NULL);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 1, NULL);
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}

#define FLOOD_PAGES (UINT64_C(4) << 20)

/* Frames of 40 bytes that each name millions of pages, all of them here: a fault is seen in between. */
static void a_turn_is_bounded(void)
{
    const uint64_t pages[] = {1};
    enum { FRAMES = 1500 };
    struct pc_frame frame = {.type = PC_FRAME_ZERO, .block = 1, .pages = FLOOD_PAGES};
    uint8_t *flood = malloc(FRAMES * PC_FRAME_HEADER_BYTES);
    struct toucher toucher;
    struct pc_pager_stats stats;
    struct pc_memory large;
    struct rig rig;
    int pair[2];

    CHECK(flood != NULL);
    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK_EQ(pc_memory_create(PC_MEMORY_MEMFD, FLOOD_PAGES * rig.page_bytes, &large, message, sizeof(message)), 0);
    CHECK_EQ(pc_pager_add_block(rig.pager, &large, -1), 1);
    arm_all(&rig, 0);
    for (int i = 0; i < FRAMES; i++)
        pc_frame_encode(&frame, flood + i * PC_FRAME_HEADER_BYTES);
    tcp_pair(pair);
    be_patient(pair[0]);
    CHECK(send_bytes(pair[0], flood, FRAMES * PC_FRAME_HEADER_BYTES)); /* all of it before the first is read */
    CHECK_EQ(pc_pager_attach_urgent(rig.pager, 0, pair[1], NULL), 0);
    while (!pager_stats(&rig).duplicate_pages)
        (void)sched_yield();
    touch_one(&toucher, &rig, 0, 0);
    do
        CHECK_EQ(pc_pager_stats(rig.pager, &stats), 0);
    while (!stats.pending_faults);
    CHECK(stats.duplicate_pages < (FRAMES - 1) * FLOOD_PAGES);
    CHECK(receive_frame(pair[0], &frame)); /* and its request has left */
    CHECK_EQ(frame.first_page, 0);
    close(pair[0]);
    free(flood);
    _exit(0); /* with the flood still under way */
}

/* ---- as many as were wanted ---- */

static void a_limit_is_for_all_shards(void)
{
    const uint64_t pages[] = {300, 300};
    struct pc_frame frame;
    struct rig rig;
    int fds[2], count = 0;

    open_pager(&rig, PC_MEMORY_MEMFD, 2, pages);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(add_shard(&rig, 0), i);
        arm(&rig, i, i, 0, 300);
        fds[i] = script_urgent(&rig, i);
    }
    CHECK_EQ(pc_pager_request_missing(rig.pager, 10), 10);
    for (int i = 0; i < 2; i++)
        while (speaks(fds[i], SERVED_MS)) {
            CHECK(receive_frame(fds[i], &frame));
            count++;
        }
    CHECK_EQ(count, 10);
    CHECK_EQ(pager_stats(&rig).requests, 10);
    /* The next ones are others. */
    CHECK_EQ(pc_pager_request_missing(rig.pager, 7), 7);
    for (int i = 0; i < 2; i++)
        while (speaks(fds[i], SERVED_MS)) {
            CHECK(receive_frame(fds[i], &frame));
            count++;
        }
    CHECK_EQ(count, 17);
    close(fds[0]);
    close(fds[1]);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

/* ---- memory that is short ---- */

static void short_for(int error, bool urgent)
{
    const uint64_t pages[] = {64};
    struct toucher toucher;
    struct pc_frame frame;
    struct pc_event event;
    struct rig rig;
    int fd, bulk_fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    touch_one(&toucher, &rig, 0, 0);
    CHECK(receive_frame(fd, &frame));
    atomic_store(&copy_error, error);
    serve_page(&rig, urgent ? fd : bulk_fd, 0, 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, urgent ? PC_CHANNEL_URGENT : PC_CHANNEL_BULK, 0, &event);
    CHECK_EQ(event.error, error);
    CHECK(strstr(event.text, "cannot place page 0 of RAM block 0") != NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    atomic_store(&copy_error, 0);
    /* That channel alone, and it can be had again; who waits asks again. */
    close(urgent ? fd : bulk_fd);
    if (urgent) {
        fd = script_urgent(&rig, 0);
        CHECK(receive_frame(fd, &frame));
        CHECK_EQ(frame.first_page, 0);
    } else {
        bulk_fd = script_bulk(&rig, 0);
    }
    serve_page(&rig, urgent ? fd : bulk_fd, 0, 0);
    join_toucher(&toucher);
    serve_all(&rig, urgent ? bulk_fd : fd);
    check_content(&rig);
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}

static void no_memory_for_an_answer(void)
{
    short_for(ENOMEM, true);
}

static void no_memory_for_a_push(void)
{
    short_for(ENOMEM, false);
}

static void no_range_for_a_push(void)
{
    short_for(ENOENT, false);
}

/* A thread that faults on a page which is just being placed asks for nothing. When that fails, it must. */
static void asked_for_when_a_push_fails(void)
{
    const uint64_t pages[] = {64};
    struct toucher touchers[2];
    struct pc_frame frame;
    struct rig rig;
    int fd, bulk_fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    atomic_store(&hold, true);
    atomic_store(&copy_error, ENOMEM);
    serve_page(&rig, bulk_fd, 0, 0);
    WAIT_UNTIL(atomic_load(&held) >= 1);
    touch_one(&touchers[0], &rig, 0, 0);
    touch_one(&touchers[1], &rig, 0, 0);
    wait_pending(&rig, 2);
    CHECK(!speaks(fd, SERVED_MS));
    atomic_store(&hold, false);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 0);
    CHECK(!speaks(fd, SERVED_MS)); /* once */
    atomic_store(&copy_error, 0);
    serve_page(&rig, fd, 0, 0);
    join_toucher(&touchers[0]);
    join_toucher(&touchers[1]);
    serve_all(&rig, fd);
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}

/* The answer came while a bulk thread had the page, and was dropped; then the page could not be placed. It is asked for again. */
static void asked_for_again_when_the_answer_was_dropped(void)
{
    const uint64_t pages[] = {64};
    struct toucher touchers[2];
    struct pc_frame frame;
    struct rig rig;
    int fd, bulk_fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    bulk_fd = script_bulk(&rig, 0);
    touch_one(&touchers[0], &rig, 0, 0);
    touch_one(&touchers[1], &rig, 0, 0);
    CHECK(receive_frame(fd, &frame));
    wait_pending(&rig, 2);
    atomic_store(&hold, true);
    atomic_store(&copy_error, ENOMEM);
    serve_page(&rig, bulk_fd, 0, 0);
    WAIT_UNTIL(atomic_load(&held) >= 1);
    serve_page(&rig, fd, 0, 0);
    while (pager_stats(&rig).duplicate_pages < 1)
        pc_sleep_ns(100000);
    CHECK(!speaks(fd, SERVED_MS));
    atomic_store(&hold, false);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 0);
    CHECK(!speaks(fd, SERVED_MS)); /* once */
    atomic_store(&copy_error, 0);
    serve_page(&rig, fd, 0, 0);
    join_toucher(&touchers[0]);
    join_toucher(&touchers[1]);
    serve_all(&rig, fd);
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}

/* Zeros for which there is no memory are shown later; meanwhile the thread waits rather than faulting again and again. */
static void no_memory_for_zeros(int error)
{
    const uint64_t pages[] = {64};
    uint64_t zero[1] = {2};
    struct toucher toucher;
    struct rig rig;
    uint64_t faults;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0);
    arm_all(&rig, 0);
    atomic_store(&zeropage_error, error);
    touch_one(&toucher, &rig, 0, 1);
    WAIT_UNTIL(atomic_load(&refused) >= 6);
    CHECK_EQ(atomic_load(&toucher.done), 0);
    faults = pager_stats(&rig).faults;
    CHECK_EQ(pager_stats(&rig).pending_faults, 1);
    atomic_store(&zeropage_error, 0);
    join_toucher(&toucher);
    CHECK_EQ(faults, 1);
    wait_pending(&rig, 0);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

static void no_memory_for_zeros_now(void)
{
    no_memory_for_zeros(ENOMEM);
}

static void zeros_are_refused_for_now(void)
{
    no_memory_for_zeros(EAGAIN);
}

/* What cannot heal ends the pager's work, once. */
static void what_cannot_heal_is_fatal(void)
{
    const uint64_t pages[] = {64};
    struct pc_event event;
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    atomic_store(&copy_error, EINVAL);
    for (int i = 0; i < 3; i++) {
        fd = script_bulk(&rig, 0);
        serve_page(&rig, fd, 0, 0);
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 0, NULL);
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, 0, 0, &event);
        CHECK_EQ(event.error, EINVAL);
        close(fd);
    }
    atomic_store(&copy_error, 0);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

/* ---- many at once ---- */

struct crowd {
    struct rig *rig;
    atomic_bool *enough;
    pthread_t thread;
};

static void *look(void *argument)
{
    struct crowd *crowd = argument;
    uint64_t blocked_ns[PC_MAX_TRACKED_THREADS];
    struct pc_histogram histogram;

    while (!atomic_load(crowd->enough)) {
        (void)pager_stats(crowd->rig);
        CHECK_EQ(pc_pager_latency(crowd->rig->pager, PC_STAGE_TOTAL, &histogram), 0);
        CHECK_EQ(pc_pager_blocktime(crowd->rig->pager, blocked_ns, 4), 4);
        (void)pc_pager_request_missing(crowd->rig->pager, 3);
    }
    return NULL;
}

/* Several threads attach while others disconnect: every descriptor ends up closed or in use, nothing is used twice. */
static void *attach(void *argument)
{
    struct crowd *crowd = argument;

    while (!atomic_load(crowd->enough)) {
        int pair[2];

        for (uint32_t i = 0; i < 2; i++) {
            tcp_pair(pair);
            (void)(i ? pc_pager_attach_bulk(crowd->rig->pager, i, pair[1], NULL)
                     : pc_pager_attach_urgent(crowd->rig->pager, 0, pair[1], NULL));
            CHECK(send_end(pair[0]));
            close(pair[0]);
        }
    }
    return NULL;
}

static void *disconnect(void *argument)
{
    struct crowd *crowd = argument;

    for (int i = 0; i < 200; i++)
        CHECK_EQ(pc_pager_disconnect(crowd->rig->pager), 0);
    return NULL;
}

static void attached_beside_disconnecting(void)
{
    const uint64_t pages[] = {64};
    struct crowd crowds[5];
    atomic_bool enough = false;
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    for (int i = 0; i < 5; i++) {
        crowds[i] = (struct crowd){.rig = &rig, .enough = &enough};
        CHECK_EQ(pthread_create(&crowds[i].thread, NULL, i < 2 ? attach : i == 2 ? look : disconnect, &crowds[i]), 0);
    }
    CHECK_EQ(pthread_join(crowds[3].thread, NULL), 0);
    CHECK_EQ(pthread_join(crowds[4].thread, NULL), 0);
    atomic_store(&enough, true);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_join(crowds[i].thread, NULL), 0);
    CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
    fd = script_urgent(&rig, 0);
    serve_all(&rig, fd);
    check_content(&rig);
    close(fd);
    close_rig(&rig);
}

/* Who looks, and asks for more, beside everything else; with no bulk channel at all. */
static void looked_at_all_the_time(void)
{
    const uint64_t pages[] = {900};
    struct visit visits[MAX_PAGES];
    struct toucher touchers[3];
    struct crowd crowds[2];
    atomic_bool enough = false;
    struct rig rig;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    open_server(&rig, 0);
    arm_all(&rig, 0);
    connect_urgent(&rig, 0, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (int i = 0; i < 2; i++) {
        crowds[i] = (struct crowd){.rig = &rig, .enough = &enough};
        CHECK_EQ(pthread_create(&crowds[i].thread, NULL, look, &crowds[i]), 0);
    }
    for (int i = 0; i < 3; i++)
        start_toucher(&touchers[i], &rig, i, visits, shuffled(&rig, -1, visits));
    for (int i = 0; i < 3; i++)
        join_toucher(&touchers[i]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    atomic_store(&enough, true);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pthread_join(crowds[i].thread, NULL), 0);
    CHECK_EQ(pager_stats(&rig).requests, all_pages(&rig));
    check_content(&rig);
    close_rig(&rig);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN_CASE(one_end_a_channel);
    RUN_CASE(errors_are_reported_once);
    RUN_CASE(events_are_bounded);
    RUN_CASE(a_turn_is_bounded);
    RUN_CASE(a_limit_is_for_all_shards);
    RUN_CASE(no_memory_for_an_answer);
    RUN_CASE(no_memory_for_a_push);
    RUN_CASE(no_range_for_a_push);
    RUN_CASE(asked_for_when_a_push_fails);
    RUN_CASE(asked_for_again_when_the_answer_was_dropped);
    RUN_CASE(no_memory_for_zeros_now);
    RUN_CASE(zeros_are_refused_for_now);
    RUN_CASE(what_cannot_heal_is_fatal);
    RUN_CASE(attached_beside_disconnecting);
    RUN_CASE(looked_at_all_the_time);
    return test_end();
}
