/* SPDX-License-Identifier: Apache-2.0
 *
 * Connections that break, after any number of bytes and again and again: what was lost is requested or pushed again, and
 * nothing is placed twice.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

static void cut_again_and_again(int kind, bool with_bulk)
{
    const uint64_t pages[] = {scaled(kind, 1000), scaled(kind, 400)};
    int knives[3], channels = with_bulk ? 3 : 2, cuts = 0;
    struct visit visits[2 * MAX_PAGES];
    struct toucher touchers[4];
    struct rig rig;
    size_t count;

    open_pager(&rig, kind, 2, pages);
    open_server(&rig, with_bulk ? 2000000 : 0);
    /* On a leash, so that a slow cutter (a sanitizer, a busy machine) still finds something to cut. */
    atomic_store(&rig.leashed, true);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(add_shard(&rig, 0), i);
        arm(&rig, i, i, 0, pages[i]);
        connect_urgent(&rig, i, &knives[i]);
    }
    if (with_bulk)
        connect_bulk(&rig, 0, &knives[2]);
    for (int t = 0; t < 4; t++) {
        count = shuffled(&rig, -1, visits);
        start_toucher(&touchers[t], &rig, t, visits, t < 2 ? count : count / 2);
    }
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (;;) {
        uint64_t resident = pager_stats(&rig).resident_pages, until = resident + 1 + test_below(all_pages(&rig) / 40 + 1);
        int channel = (int)test_below((uint64_t)channels), kind_of = channel < 2 ? PC_CHANNEL_URGENT : PC_CHANNEL_BULK;

        if (until > all_pages(&rig))
            break;
        while (pager_stats(&rig).resident_pages < until) {
            if (atomic_load(&rig.allowance) <= 0)
                atomic_fetch_add(&rig.allowance, 1);
            (void)sched_yield();
        }
        cuts++;
        if (test_below(4)) {
            CHECK_SYS(shutdown(knives[channel], SHUT_RDWR));
            EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, kind_of, channel % 2, NULL);
            EXPECT_EVENT(&rig.from_server, PC_EVENT_CHANNEL_DOWN, kind_of, channel % 2, NULL);
            reconnect(&rig, channel, &knives[channel]);
        } else {
            if (test_below(2))
                CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
            CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
            CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
            while (find_event(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
            }
            while (find_event(&rig.from_server, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
            }
            for (int i = 0; i < channels; i++)
                reconnect(&rig, i, &knives[i]);
        }
    }
    atomic_store(&rig.leashed, false);
    for (int t = 0; t < 4; t++)
        join_toucher(&touchers[t]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    EXPECT_NO_EVENT(&rig.from_server, PC_EVENT_FATAL);
    CHECK(cuts > 3);
    CHECK_EQ(pager_stats(&rig).frames_refused, 0);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    check_content(&rig);
    for (int i = 0; i < channels; i++)
        close(knives[i]);
    close_rig(&rig);
}

static void urgent_cuts(int kind)
{
    cut_again_and_again(kind, false);
}
OF_EACH_KIND(urgent_cuts)

static void cuts_with_bulk(int kind)
{
    cut_again_and_again(kind, true);
}
OF_EACH_KIND(cuts_with_bulk)

/* Runs that were in flight when a connection broke are offered again, since the source hears what has arrived: nobody touches
 * anything here, nothing is asked for, and everything comes. */
static void push_again_what_was_lost(int kind)
{
    const uint64_t pages[] = {scaled(kind, 1000), scaled(kind, 400)};
    uint64_t *received[2];
    int knives[3], cuts = 0;
    struct rig rig;

    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 20000000);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(add_shard(&rig, 0), i);
        arm(&rig, i, i, 0, pages[i]);
        connect_urgent(&rig, i, &knives[i]);
        received[i] = calloc(pc_bitmap_words(pages[i]), sizeof(uint64_t));
        CHECK(received[i] != NULL);
    }
    connect_bulk(&rig, 0, &knives[2]);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK_EQ(pc_pageserver_set_received(rig.server, 0, received[0]), -EBUSY);
    while (cuts < 5) {
        uint64_t resident = pager_stats(&rig).resident_pages, until = resident + 1 + test_below(all_pages(&rig) / 20 + 1);

        if (until >= all_pages(&rig))
            break;
        while (pager_stats(&rig).resident_pages < until)
            (void)sched_yield();
        cuts++;
        CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
        CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
        while (find_event(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
        }
        while (find_event(&rig.from_server, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
        }
        for (uint32_t i = 0; i < 2; i++) {
            CHECK_EQ(pc_pager_received(rig.pager, i, received[i]), 0);
            CHECK_EQ(pc_pageserver_set_received(rig.server, i, received[i]), 0);
        }
        CHECK_EQ(pc_pageserver_set_received(rig.server, 2, received[0]), -EINVAL);
        for (int i = 0; i < 3; i++)
            reconnect(&rig, i, &knives[i]);
    }
    CHECK(cuts > 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK_EQ(pager_stats(&rig).requests, 0);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    check_content(&rig);
    for (int i = 0; i < 3; i++)
        close(knives[i]);
    for (int i = 0; i < 2; i++)
        free(received[i]);
    close_rig(&rig);
}
OF_EACH_KIND(push_again_what_was_lost)

/* A data connection that ends after `cut` bytes of a frame: nothing of the frame is seen, what was asked for is asked for again,
 * and a page that came whole is never asked for again. */
#define CUT_BYTES (PC_FRAME_HEADER_BYTES + pc_page_bytes())

static void answers_cut_everywhere(void)
{
    const uint64_t pages[] = {12000};
    uint8_t *frame = malloc(CUT_BYTES);
    uint64_t page = 0;
    struct rig rig;

    CHECK(frame != NULL);
    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK_EQ(add_shard(&rig, 0), 0);
    arm(&rig, 0, 0, 0, pages[0]);
    for (uint64_t cut = 0; cut <= CUT_BYTES; cut++) {
        struct pc_frame header = {.type = PC_FRAME_PAGES, .flags = PC_FRAME_DEMAND, .pages = 1}, asked;
        int fd = script_urgent(&rig, 0);
        struct toucher toucher;
        struct pc_event event;

        page = next_data_page(&rig, &page);
        touch_one(&toucher, &rig, 0, page);
        CHECK(receive_frame(fd, &asked) && asked.first_page == page);
        make_page(0, page, rig.page_bytes, frame + PC_FRAME_HEADER_BYTES);
        header.first_page = page;
        header.request_id = asked.request_id;
        header.payload_bytes = (uint32_t)rig.page_bytes;
        header.payload_crc = pc_crc32c(0, frame + PC_FRAME_HEADER_BYTES, rig.page_bytes);
        pc_frame_encode(&header, frame);
        CHECK(send_bytes(fd, frame, cut));
        close(fd);
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, &event);
        if (cut < CUT_BYTES) {
            CHECK_EQ(atomic_load(&toucher.done), 0);
            if (cut)
                CHECK_EQ(event.error, EPIPE);
            fd = script_urgent(&rig, 0);
            CHECK(receive_frame(fd, &asked) && asked.first_page == page);
            serve_page(&rig, fd, 0, page);
            join_toucher(&toucher);
            close(fd);
            EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
        } else {
            join_toucher(&toucher);
        }
        CHECK_EQ(pager_stats(&rig).duplicate_pages, 0);
    }
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK_EQ(pager_stats(&rig).frames_refused, 0);
    free(frame);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    pc_memory_destroy(&rig.dest[0]);
}

static void pushes_cut_everywhere(void)
{
    const uint64_t pages[] = {12000};
    uint8_t *frame = malloc(CUT_BYTES);
    uint64_t page = 0, whole = 0;
    struct rig rig;

    CHECK(frame != NULL);
    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK_EQ(add_shard(&rig, 0), 0);
    arm(&rig, 0, 0, 0, pages[0]);
    for (uint64_t cut = 0; cut <= CUT_BYTES; cut++) {
        struct pc_frame header = {.type = PC_FRAME_PAGES, .pages = 1};
        int fd = script_bulk(&rig, 0);
        struct pc_event event;

        page = next_data_page(&rig, &page);
        make_page(0, page, rig.page_bytes, frame + PC_FRAME_HEADER_BYTES);
        header.first_page = page;
        header.payload_bytes = (uint32_t)rig.page_bytes;
        header.payload_crc = pc_crc32c(0, frame + PC_FRAME_HEADER_BYTES, rig.page_bytes);
        pc_frame_encode(&header, frame);
        CHECK(send_bytes(fd, frame, cut));
        close(fd);
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 0, &event);
        CHECK_EQ(event.error, cut && cut < CUT_BYTES ? EPIPE : 0);
        whole += cut == CUT_BYTES;
        CHECK_EQ(pager_stats(&rig).resident_pages, whole);
    }
    CHECK_EQ(whole, 1);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    free(frame);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    pc_memory_destroy(&rig.dest[0]);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
#ifdef RIG_TLS /* what a cut is to the pager does not depend on TLS: only that each is one */
    RUN_CASE(cuts_with_bulk_memfd);
    RUN_CASE(push_again_what_was_lost_anon);
    (void)urgent_cuts_memfd, (void)answers_cut_everywhere;
    return test_end();
#endif
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(urgent_cuts);
    RUN_KINDS(cuts_with_bulk);
    RUN_KINDS(push_again_what_was_lost);
    RUN_CASE(answers_cut_everywhere);
    RUN_CASE(pushes_cut_everywhere);
    return test_end();
}
