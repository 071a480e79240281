/* SPDX-License-Identifier: Apache-2.0
 *
 * Precopy at the destination: pages are forgotten and come again, round by round, before the machine runs.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

static void fill(uint64_t words[MAX_PAGES / 64], uint64_t first, uint64_t pages)
{
    memset(words, 0, MAX_PAGES / 8);
    pc_bitmap_set_range(words, first, pages);
}

/* As ProcessPager and Pager do it: the maps, then the content. */
static int forget(const struct rig *rig, uint32_t block, const uint64_t *words)
{
    int result = pc_pager_forget(rig->pager, block, words);

    return result ? result : pc_memory_discard_pages(&rig->dest[block], words);
}

static void expect_complete(struct rig *rig)
{
    EXPECT_EVENT(&rig->from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(rig).resident_pages, all_pages(rig));
}

static void send_page(const struct rig *rig, int fd, uint64_t page, uint8_t value)
{
    uint8_t *content = malloc(rig->page_bytes);

    CHECK(content != NULL);
    memset(content, value, rig->page_bytes);
    CHECK(send_frame(fd, (struct pc_frame){.type = PC_FRAME_PAGES, .first_page = page, .pages = 1}, content, rig->page_bytes));
    free(content);
}

static void send_end(int fd)
{
    CHECK(send_frame(fd, (struct pc_frame){.type = PC_FRAME_END}, NULL, 0));
}

static void *read_byte(void *argument)
{
    return (void *)(uintptr_t)*(volatile uint8_t *)argument;
}

/* What comes after a page was forgotten is placed, what comes before is not kept: of content and of zeros, whatever it was before. */
static void forgotten_pages_come_again(int kind)
{
    const uint64_t pages[] = {scaled(kind, 200)};
    uint64_t words[MAX_PAGES / 64], received[MAX_PAGES / 64] = {0};
    struct rig rig;
    struct pc_frame frame;
    pthread_t thread;
    void *seen;
    int fd, urgent;

    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    fill(words, 3, pages[0] - 3);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, words), 0); /* armed already */
    fd = script_bulk(&rig, 0);
    urgent = script_urgent(&rig, 0);
    for (uint64_t page = 0; page < 3; page++)
        send_page(&rig, fd, page, 1);
    expect_complete(&rig);
    CHECK_EQ(pc_pager_forget(rig.pager, 1, words), -EINVAL);

    fill(words, 2, 2); /* one with content, one that is zero */
    CHECK_EQ(forget(&rig, 0, words), 0);
    CHECK_EQ(pager_stats(&rig).resident_pages, pages[0] - 2);
    CHECK_EQ(pager_stats(&rig).zero_pages, pages[0] - 4);
    CHECK_EQ(forget(&rig, 0, words), 0); /* said twice is not two pages */
    CHECK_EQ(pager_stats(&rig).resident_pages, pages[0] - 2);
    CHECK_EQ(pc_pager_received(rig.pager, 0, received), 0);
    CHECK_EQ(received[0] & 0x1f, 0x13);
    CHECK_EQ(pc_pager_disarm(rig.pager), -EBUSY);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_COMPLETE);

    send_page(&rig, fd, 3, 2);
    CHECK(send_frame(fd, (struct pc_frame){.type = PC_FRAME_ZERO, .first_page = 2, .pages = 1}, NULL, 0));
    expect_complete(&rig);
    send_page(&rig, fd, 3, 9); /* a duplicate is one again */
    WAIT_UNTIL(pager_stats(&rig).duplicate_pages == 1);
    CHECK(pc_is_zero(dest_page(&rig, 0, 2), rig.page_bytes));
    CHECK_EQ(*dest_page(&rig, 0, 3), 2);
    CHECK_EQ(*dest_page(&rig, 0, 1), 1);

    /* A thread that wants one requests it, though it may have been requested before. */
    fill(words, 0, pages[0]);
    CHECK_EQ(forget(&rig, 0, words), 0);
    CHECK_EQ(pager_stats(&rig).resident_pages, 0);
    CHECK_EQ(resident_bytes(&rig), 0);
    for (int round = 0; round < 2; round++) {
        CHECK_EQ(pthread_create(&thread, NULL, read_byte, dest_page(&rig, 0, 1)), 0);
        CHECK(receive_frame(urgent, &frame));
        CHECK_EQ(frame.first_page, 1);
        send_page(&rig, urgent, 1, (uint8_t)(7 + round));
        CHECK_EQ(pthread_join(thread, &seen), 0);
        CHECK_EQ((uintptr_t)seen, 7 + round);
        fill(words, 1, 1);
        CHECK_EQ(forget(&rig, 0, words), 0);
    }
    CHECK(send_frame(fd, (struct pc_frame){.type = PC_FRAME_ZERO, .pages = (uint32_t)pages[0]}, NULL, 0));
    expect_complete(&rig);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    close(fd);
    close(urgent);
    close_rig(&rig);
}
OF_EACH_KIND(forgotten_pages_come_again)

/* A watch would not know any more what it has passed. */
static void not_while_watched(void)
{
    const uint64_t pages[] = {64};
    uint64_t words[MAX_PAGES / 64];
    struct rig rig;
    int event_fd = CHECK_SYS(eventfd(0, EFD_CLOEXEC));
    int64_t ticket;

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    arm_all(&rig, 0);
    fill(words, 0, 32);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, words), 0);
    ticket = pc_pager_watch(rig.pager, 0, 0, 64, event_fd);
    CHECK(ticket > 0);
    CHECK_EQ(pc_pager_forget(rig.pager, 0, words), -EBUSY);
    CHECK_EQ(pager_stats(&rig).resident_pages, 32);
    pc_pager_unwatch(rig.pager, ticket);
    CHECK_EQ(pc_pager_forget(rig.pager, 0, words), 0);
    fill(words, 0, 64);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, words), 0);
    expect_complete(&rig);
    close(event_fd);
    close_rig(&rig);
}

/* ---- a peer that does not keep to the rounds ---------------------------------------------------------------------- */

static void one_end_for_each_push(void)
{
    const uint64_t pages[] = {64};
    struct pc_event event;
    struct rig rig;
    int fds[2];

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    arm_all(&rig, 0);
    for (uint32_t i = 0; i < 2; i++)
        fds[i] = script_bulk(&rig, i);
    for (int push = 0; push < 3; push++) {
        for (int i = 0; i < 2; i++) {
            send_end(fds[i]);
            EXPECT_EVENT(&rig.from_pager, PC_EVENT_BULK_END, PC_CHANNEL_BULK, i, NULL);
        }
        CHECK_EQ(pc_pager_expect_push(rig.pager), 0);
    }
    send_end(fds[0]);
    send_page(&rig, fds[0], 5, 5); /* out of turn, and of no harm */
    WAIT_UNTIL(pager_stats(&rig).resident_pages == 1);
    send_end(fds[0]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 0, &event);
    CHECK_EQ(event.error, EBADMSG);
    CHECK(strstr(event.text, "second time") != NULL);
    CHECK_EQ(pager_stats(&rig).frames_refused, 1);
    send_end(fds[1]); /* the other one has its own */
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 1, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN);
    close(fds[0]);
    close(fds[1]);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    pc_memory_destroy(&rig.dest[0]);
}

struct flood {
    int fd;
    uint32_t pages;
    atomic_bool end;
    pthread_t thread;
};

static void *send_on(void *argument)
{
    struct flood *flood = argument;
    static const uint8_t content[4096] = {1};

    while (!atomic_load(&flood->end))
        for (uint32_t page = 0; page < flood->pages; page++)
            if (!send_frame(flood->fd, (struct pc_frame){.type = page % 2 ? PC_FRAME_ZERO : PC_FRAME_PAGES, .first_page = page, .pages = 1},
                            content, page % 2 ? 0 : sizeof(content)))
                return NULL;
    return NULL;
}

/* A source that pushes while pages are forgotten: which content stays is undefined, but every page is counted once. */
static void pages_pushed_while_they_are_forgotten(int kind)
{
    const uint64_t pages[] = {256};
    struct flood flood = {.pages = 256};
    uint64_t words[MAX_PAGES / 64];
    struct rig rig;

    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    flood.fd = script_bulk(&rig, 0);
    CHECK_EQ(pthread_create(&flood.thread, NULL, send_on, &flood), 0);
    for (int round = 0; round < 200; round++) {
        uint64_t first = test_below(pages[0]);

        fill(words, first, test_below(pages[0] - first) + 1);
        CHECK_EQ(forget(&rig, 0, words), 0);
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    WAIT_UNTIL(pager_stats(&rig).resident_pages == pages[0]);
    atomic_store(&flood.end, true);
    CHECK_EQ(pthread_join(flood.thread, NULL), 0);
    WAIT_UNTIL(pc_pager_disarm(rig.pager) == 0); /* none is missing, by the count either */
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    close(flood.fd);
    close_rig(&rig);
}

static void pages_pushed_while_they_are_forgotten_memfd(void)
{
    pages_pushed_while_they_are_forgotten(PC_MEMORY_MEMFD);
}

/* ---- all of it ---------------------------------------------------------------------------------------------------- */

struct machine { /* that is all writes */
    struct rig *rig;
    atomic_bool paused;
    uint64_t seed;
    pthread_t thread;
};

static void *run_machine(void *argument)
{
    struct machine *machine = argument;
    const struct rig *rig = machine->rig;
    uint64_t x = machine->seed;

    while (!atomic_load(&machine->paused)) {
        uint32_t block;
        uint64_t word;

        x = x * 6364136223846793005u + 1442695040888963407u;
        block = (uint32_t)(x >> 60) % rig->blocks;
        word = (x >> 20) % (rig->source[block].size_bytes / sizeof(word));
        __atomic_store_n((uint64_t *)rig->source[block].base + word, x & 1 ? x : 0, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* Ends a round at both sides: what was written since the last one. */
static void end_round(struct rig *rig, struct pc_dirty_log *log)
{
    for (uint32_t i = 0; i < rig->blocks; i++) {
        uint64_t stale[MAX_PAGES / 64] = {0};

        CHECK(pc_dirty_log_collect(log, i, stale) >= 0);
        CHECK_EQ(forget(rig, i, stale), 0);
        CHECK_EQ(pc_pageserver_set_stale(rig->server, i, stale), 0);
    }
    CHECK_EQ(pc_pager_expect_push(rig->pager), 0);
}

/* Precopy in rounds under a machine that writes, then postcopy for the rest: the twin is one, page for page. */
static void hybrid(int kind)
{
    const uint64_t pages[] = {scaled(kind, 512), scaled(kind, 128)};
    struct machine machine = {0};
    struct pc_dirty_log *log;
    struct rig rig;

    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 0);
    machine.rig = &rig;
    machine.seed = test_random();
    CHECK_EQ(pc_dirty_log_new(&log), 0);
    for (uint32_t i = 0; i < rig.blocks; i++) {
        int result = pc_dirty_log_add(log, &rig.source[i], message, sizeof(message));

        if (result == -EOPNOTSUPP)
            SKIP("wp-async", "%s", message);
        CHECK_EQ(result, i);
    }
    CHECK_EQ(pthread_create(&machine.thread, NULL, run_machine, &machine), 0);
    arm_all(&rig, 0);
    tell_page_map(&rig);
    connect_urgent(&rig, 0, NULL);
    for (uint32_t i = 0; i < 2; i++)
        connect_bulk(&rig, i, NULL);
    for (int round = 0; round < 5; round++) {
        CHECK_EQ(pc_pageserver_push(rig.server), 0);
        if (round == 3)
            CHECK_EQ(pc_pageserver_stop_push(rig.server), 0);
        for (int i = 0; i < 2; i++) {
            EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, i, NULL);
            EXPECT_EVENT(&rig.from_pager, PC_EVENT_BULK_END, PC_CHANNEL_BULK, i, NULL);
        }
        end_round(&rig, log);
    }
    atomic_store(&machine.paused, true);
    CHECK_EQ(pthread_join(machine.thread, NULL), 0);
    while (find_event(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, 0, NULL)) { /* of rounds */
    }
    end_round(&rig, log);
    CHECK_EQ(pc_pageserver_serve(rig.server), 0);
    for (uint32_t i = 0; i < rig.blocks; i++) /* before anything is pushed, backwards: on demand */
        for (uint64_t page = pages[i]; page-- > pages[i] - 5;)
            CHECK(!memcmp(dest_page(&rig, i, page), (uint8_t *)rig.source[i].base + page * rig.page_bytes, rig.page_bytes));
    CHECK_EQ(pc_pageserver_push(rig.server), 0);
    WAIT_UNTIL(pager_stats(&rig).resident_pages == all_pages(&rig));
    pc_dirty_log_free(log);
    WAIT_UNTIL(pc_pager_disarm(rig.pager) == 0); /* a page is counted as here before it is not counted as missing any more */
    for (uint32_t i = 0; i < rig.blocks; i++)
        CHECK(!memcmp(rig.dest[i].base, rig.source[i].base, rig.dest[i].size_bytes));
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN);
    close_rig(&rig);
}
OF_EACH_KIND(hybrid)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(forgotten_pages_come_again);
    RUN_CASE(not_while_watched);
    RUN_CASE(one_end_for_each_push);
    RUN_CASE(pages_pushed_while_they_are_forgotten_memfd);
    RUN_KINDS(hybrid);
    return test_end();
}
