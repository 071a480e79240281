/* SPDX-License-Identifier: Apache-2.0
 *
 * Pushes of a page server while the machine runs (precopy): round by round, of memory that is written meanwhile.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/server_rig.h"

#define PAGES 512

/* What one push brings: how often each page, and the end. */
static void receive_push(const struct rig *rig, int fd, uint8_t *times)
{
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    struct pc_frame frame;

    CHECK(content != NULL);
    for (;;) {
        CHECK(receive_frame(fd, &frame));
        if (frame.type == PC_FRAME_END)
            break;
        CHECK(frame.type == PC_FRAME_PAGES || frame.type == PC_FRAME_ZERO);
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        CHECK_EQ(pc_crc32c(0, content, frame.payload_bytes), frame.payload_crc);
        for (uint64_t i = 0; i < frame.pages; i++) {
            times[frame.first_page + i]++;
            /* Zeros are those of the content, and not of the memory a moment later. */
            CHECK(frame.type == PC_FRAME_ZERO || !pc_is_zero(content + i * rig->page_bytes, rig->page_bytes));
        }
    }
    free(content);
}

static void expect_times(const uint8_t *times, uint64_t first, uint64_t end, uint8_t expected)
{
    for (uint64_t page = first; page < end; page++)
        if (times[page] != expected)
            FAIL("page %llu was sent %d times, should be %d", (unsigned long long)page, times[page], expected);
}

static void set_present(struct rig *rig, uint64_t pages)
{
    uint64_t present[PAGES / 64] = {0};

    pc_bitmap_set_range(present, 0, pages);
    CHECK_EQ(pc_pageserver_set_present(rig->server, 0, present), 0);
}

static int set_stale(struct rig *rig, uint64_t first, uint64_t pages)
{
    uint64_t stale[PAGES / 64] = {0};

    pc_bitmap_set_range(stale, first, pages);
    return pc_pageserver_set_stale(rig->server, 0, stale);
}

static void rounds_send_what_is_stale(void)
{
    struct rig rig;
    uint8_t times[PAGES] = {0};
    uint64_t words[PAGES / 64] = {0};
    int fds[2];

    open_server_alone(&rig, PC_MEMORY_MEMFD, PAGES, 0);
    set_present(&rig, 256);
    fds[0] = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK(!speaks(fds[0], SERVED_MS)); /* nothing before the first push */
    CHECK_EQ(pc_pageserver_push(rig.server), 0);
    receive_push(&rig, fds[0], times);
    expect_times(times, 0, 256, 1);
    expect_times(times, 256, PAGES, 0);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, NULL);
    CHECK_EQ(server_stats(&rig).sent_pages, 256);
    CHECK_EQ(pc_pageserver_set_present(rig.server, 0, words), -EBUSY); /* the destination knows another one */
    CHECK_EQ(pc_pageserver_add_block(rig.server, &rig.source[0], rig.page_bytes), -EBUSY);
    CHECK_EQ(pc_pageserver_set_stale(rig.server, 1, words), -EINVAL);

    CHECK_EQ(set_stale(&rig, 200, 100), 0); /* 44 of them were absent */
    CHECK_EQ(set_stale(&rig, 200, 10), 0);  /* said twice is not two pages */
    CHECK_EQ(server_stats(&rig).sent_pages, 200);
    CHECK_EQ(pc_pageserver_push(rig.server), 0);
    receive_push(&rig, fds[0], times);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, NULL);
    expect_times(times, 0, 200, 1);
    expect_times(times, 200, 256, 2);
    expect_times(times, 256, 300, 1);
    expect_times(times, 300, PAGES, 0);
    CHECK_EQ(server_stats(&rig).sent_pages, 300);

    /* A channel that comes between two pushes joins the next; a push of nothing has an end too. */
    fds[1] = client(&rig, PC_CHANNEL_BULK, 1);
    CHECK(!speaks(fds[1], SERVED_MS));
    CHECK_EQ(pc_pageserver_push(rig.server), 0);
    for (int i = 0; i < 2; i++) {
        receive_push(&rig, fds[i], times);
        EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, i, NULL);
    }
    expect_times(times, 256, 300, 1);

    CHECK_EQ(set_stale(&rig, 5, 1), 0);
    CHECK_EQ(pc_pageserver_serve(rig.server), 0);
    CHECK_EQ(pc_pageserver_serve(rig.server), 0);
    CHECK_EQ(set_stale(&rig, 5, 1), -EBUSY); /* nothing changes any more */
    CHECK(!speaks(fds[0], SERVED_MS));       /* serving is not pushing */
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (int i = 0; i < 2; i++)
        receive_push(&rig, fds[i], times);
    expect_times(times, 5, 6, 2);
    /* And one that comes after the last push began joins that one. */
    close(fds[0]);
    expect_server_down(&rig, PC_CHANNEL_BULK, 0, 0, "closed");
    fds[0] = client(&rig, PC_CHANNEL_BULK, 0);
    receive_push(&rig, fds[0], times);
    CHECK(!speaks(fds[0], SERVED_MS));
    close(fds[0]);
    close(fds[1]);
    close_server_alone(&rig);
}

/* A channel at rest notices both: what its destination does, and the next push. */
static void a_channel_between_two_pushes(void)
{
    struct rig rig;
    uint8_t times[PAGES] = {0};
    int fd;

    open_server_alone(&rig, PC_MEMORY_ANON, PAGES, 0);
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    close(fd); /* before any push */
    expect_server_down(&rig, PC_CHANNEL_BULK, 0, 0, "closed");
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK(send_bytes(fd, "?", 1));
    expect_server_down(&rig, PC_CHANNEL_BULK, 0, EBADMSG, "spoke");
    close(fd);
    CHECK_EQ(pc_pageserver_push(rig.server), 0); /* of no channel: over at once */
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK_EQ(pc_pageserver_push(rig.server), 0);
    receive_push(&rig, fd, times);
    expect_times(times, 0, PAGES, 1);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, NULL);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    CHECK(!receive_bytes(fd, times, 1));
    close(fd);
    close_server_alone(&rig);
}

/* During a push nothing of it can be changed, and it can be stopped. */
static void a_push_that_is_stopped(void)
{
    struct rig rig;
    uint8_t times[PAGES] = {0};
    int fd;

    open_server_alone(&rig, PC_MEMORY_ANON, PAGES, 1024); /* the second run is due in minutes */
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK_EQ(pc_pageserver_push(rig.server), 0);
    CHECK_EQ(pc_pageserver_push(rig.server), -EBUSY);
    CHECK_EQ(pc_pageserver_serve(rig.server), -EBUSY);
    CHECK_EQ(pc_pageserver_start(rig.server), -EBUSY);
    CHECK_EQ(set_stale(&rig, 0, 1), -EBUSY);
    WAIT_UNTIL(server_stats(&rig).sent_pages > 64); /* the second run waits for its turn */
    CHECK_EQ(pc_pageserver_stop_push(rig.server), 0);
    receive_push(&rig, fd, times);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, NULL);
    CHECK(server_stats(&rig).sent_pages < PAGES);
    CHECK_EQ(set_stale(&rig, 0, 1), 0);
    memset(times, 0, 1); /* whether it was sent or not, once more */
    CHECK_EQ(pc_pageserver_set_bandwidth(rig.server, 0), 0);
    CHECK_EQ(pc_pageserver_push(rig.server), 0);
    receive_push(&rig, fd, times);
    expect_times(times, 0, PAGES, 1);
    close(fd);
    close_server_alone(&rig);
}

/* ---- memory that is written meanwhile ----------------------------------------------------------------------------- */

struct writer {
    const struct rig *rig;
    atomic_bool end;
    pthread_t thread;
};

/* Words of pages become something, and nothing again, as fast as can be. */
static void *write_on(void *argument)
{
    struct writer *writer = argument;
    uint64_t *words = writer->rig->source[0].base, count = writer->rig->source[0].size_bytes / sizeof(*words);
    uint64_t per_page = writer->rig->page_bytes / sizeof(*words);

    for (uint64_t i = 0; !atomic_load(&writer->end); i++) {
        __atomic_store_n(&words[i * 511 % count], i, __ATOMIC_RELAXED);
        __atomic_store_n(&words[i % (count / per_page) * per_page], i & 1, __ATOMIC_RELAXED); /* of a page that is zero else */
    }
    return NULL;
}

static void torn_pages_are_whole_frames(int kind)
{
    struct writer writer = {0};
    struct rig rig;
    uint64_t pages = kind == PC_MEMORY_HUGETLB ? 8 : PAGES;
    int fds[2];

    open_server_alone(&rig, kind, pages, 0);
    memset(rig.source[0].base, 0, rig.source[0].size_bytes);
    writer.rig = &rig;
    for (int i = 0; i < 2; i++)
        fds[i] = client(&rig, PC_CHANNEL_BULK, (uint32_t)i);
    CHECK_EQ(pthread_create(&writer.thread, NULL, write_on, &writer), 0);
    for (int round = 0; round < 6; round++) {
        uint8_t times[PAGES] = {0};

        CHECK_EQ(pc_pageserver_push(rig.server), 0);
        for (int i = 0; i < 2; i++) {
            receive_push(&rig, fds[i], times);
            EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, i, NULL);
        }
        expect_times(times, 0, pages, 1);
        CHECK_EQ(set_stale(&rig, 0, pages), 0);
    }
    atomic_store(&writer.end, true);
    CHECK_EQ(pthread_join(writer.thread, NULL), 0);
    for (int i = 0; i < 2; i++)
        close(fds[i]);
    close_server_alone(&rig);
}
OF_EACH_KIND(torn_pages_are_whole_frames)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_CASE(rounds_send_what_is_stale);
    RUN_CASE(a_channel_between_two_pushes);
    RUN_CASE(a_push_that_is_stopped);
    RUN_KINDS(torn_pages_are_whole_frames);
    return test_end();
}
