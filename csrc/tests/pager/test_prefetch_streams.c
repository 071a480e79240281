/* SPDX-License-Identifier: Apache-2.0
 *
 * What is requested ahead of faults: a sequence of faults in, requests out, in their order. The test is the source.
 */
#include "tests/support/rig.h"

#define PAGES 1000

struct script {
    struct rig rig;
    int fd;
    struct pc_frame unanswered[256]; /* with those that were requested ahead and are kept */
    size_t count;
};

static void open_script(struct script *script, int how, uint32_t pages)
{
    const uint64_t blocks[] = {PAGES};

    open_pager(&script->rig, PC_MEMORY_MEMFD, 1, blocks);
    arm_all(&script->rig, 0);
    CHECK_EQ(pc_pager_set_prefetch(script->rig.pager, how, pages), 0);
    script->fd = script_urgent(&script->rig, 0);
    script->count = 0;
}

static void answer(struct script *script, const struct pc_frame *request)
{
    struct pc_frame frame = *request;
    bool data = content_of(frame.block, frame.first_page) == DATA;
    uint8_t *content = malloc(script->rig.page_bytes);

    CHECK(content != NULL);
    make_page(frame.block, frame.first_page, script->rig.page_bytes, content);
    frame.type = data ? PC_FRAME_PAGES : PC_FRAME_ZERO;
    frame.flags = PC_FRAME_DEMAND;
    CHECK(send_frame(script->fd, frame, content, data ? script->rig.page_bytes : 0));
    free(content);
}

/* What was kept, and that it has arrived. */
static void answer_kept(struct script *script)
{
    uint64_t before = pager_stats(&script->rig).resident_pages, kept = script->count;

    while (script->count)
        answer(script, &script->unanswered[--script->count]);
    WAIT_UNTIL(pager_stats(&script->rig).resident_pages == before + kept);
}

/* The requests that come now: page numbers, with ! for one that a thread waits for. They are kept. */
static void expect(struct script *script, const char *requests)
{
    char *at = (char *)(uintptr_t)requests;

    while (*at) {
        uint64_t page = strtoull(at, &at, 10);
        struct pc_frame *frame = &script->unanswered[script->count++];
        bool waits = *at == '!';

        CHECK(script->count < 256);
        CHECK(receive_frame(script->fd, frame));
        CHECK_EQ(frame->first_page, page);
        CHECK_EQ(frame->pages, 1);
        CHECK_EQ(!(frame->request_id & PC_PAGER_REQUEST_AHEAD), waits);
        while (*at == '!' || *at == ' ')
            at++;
    }
}

static void expect_ahead(struct script *script, uint64_t first, uint64_t end)
{
    for (uint64_t page = first; page < end; page++) {
        char text[32];

        (void)snprintf(text, sizeof(text), "%llu", (unsigned long long)page);
        expect(script, text);
    }
}

/* A thread touches a page; what is requested then, which is answered. */
static void touched(struct script *script, uint64_t page, const char *requests)
{
    struct toucher toucher;

    touch_one(&toucher, &script->rig, 0, page);
    expect(script, requests);
    answer_kept(script);
    join_toucher(&toucher);
}

static void close_script(struct script *script)
{
    CHECK(!speaks(script->fd, SERVED_MS)); /* no more than was expected */
    close(script->fd);
    CHECK_EQ(pc_pager_free(script->rig.pager), 0);
}

/* ---- policies ------------------------------------------------------------------------------------------------------ */

static void policies_are_checked(void)
{
    const uint64_t pages[] = {4};
    struct rig rig;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK_EQ(pc_pager_set_prefetch(rig.pager, -1, 0), -EINVAL);
    CHECK_EQ(pc_pager_set_prefetch(rig.pager, PC_PREFETCH_ADAPTIVE + 1, 0), -EINVAL);
    CHECK_EQ(pc_pager_set_prefetch(rig.pager, PC_PREFETCH_NONE, 1), -EINVAL);
    CHECK_EQ(pc_pager_set_prefetch(rig.pager, PC_PREFETCH_ADAPTIVE, 1), -EINVAL);
    CHECK_EQ(pc_pager_set_prefetch(rig.pager, PC_PREFETCH_FORWARD, 0), -EINVAL);
    CHECK_EQ(pc_pager_set_prefetch(rig.pager, PC_PREFETCH_BOTH, PC_PREFETCH_MAX_PAGES + 1), -EINVAL);
    CHECK_EQ(pc_pager_set_prefetch(rig.pager, PC_PREFETCH_BOTH, PC_PREFETCH_MAX_PAGES), 0);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

static void none(void)
{
    struct script script;

    open_script(&script, PC_PREFETCH_NONE, 0);
    for (uint64_t page = 100; page < 105; page++) {
        char only[32];

        (void)snprintf(only, sizeof(only), "%llu!", (unsigned long long)page);
        touched(&script, page, only);
    }
    CHECK_EQ(pager_stats(&script.rig).prefetched_pages, 0);
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 0);
    close_script(&script);
}

static void forward(void)
{
    struct script script;

    open_script(&script, PC_PREFETCH_FORWARD, 4);
    touched(&script, 100, "100! 101 102 103 104");
    touched(&script, 105, "105! 106 107 108 109"); /* at the edge: all four were reached */
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 4);
    touched(&script, 300, "300! 301 302 303 304");
    touched(&script, 299, "299!"); /* what is behind it is here; nothing says that it was asked for because of this fault */
    touched(&script, 112, "112! 113 114 115 116"); /* two pages were left out */
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 4);
    touched(&script, 997, "997! 998 999"); /* and no further */
    close_script(&script);
}

static void both(void)
{
    struct script script;

    open_script(&script, PC_PREFETCH_BOTH, 5);
    touched(&script, 100, "100! 101 102 103 99 98");
    touched(&script, 104, "104! 105 106 107");
    touched(&script, 97, "97! 96 95");
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 5);
    touched(&script, 1, "1! 2 3 4 0"); /* not below the first page */
    close_script(&script);
}

/* ---- what the faults show ------------------------------------------------------------------------------------------- */

static void adaptive_forward(void)
{
    struct script script;

    open_script(&script, PC_PREFETCH_ADAPTIVE, 0);
    touched(&script, 100, "100!");
    touched(&script, 101, "101!");
    touched(&script, 102, "102! 103 104");
    touched(&script, 105, "105! 106 107 108 109"); /* the stream goes on at its edge: twice as deep */
    touched(&script, 110, "110! 111 112 113 114 115 116 117 118");
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 6);
    touched(&script, 123, "123! 124 125 126 127"); /* beyond it: half as deep */
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 6);
    touched(&script, 128, "128! 129 130 131 132 133 134 135 136");
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 10);
    touched(&script, 500, "500!"); /* somewhere else */
    touched(&script, 137, "137! 138 139 140 141 142 143 144 145 146 147 148 149 150 151 152 153");
    close_script(&script);
}

static void adaptive_backward(void)
{
    struct script script;

    open_script(&script, PC_PREFETCH_ADAPTIVE, 0);
    touched(&script, 8, "8!");
    touched(&script, 7, "7!");
    touched(&script, 6, "6! 5 4");
    touched(&script, 3, "3! 2 1 0"); /* not below the first page */
    close_script(&script);
}

static void strides(void)
{
    struct script script;

    open_script(&script, PC_PREFETCH_ADAPTIVE, 0);
    touched(&script, 200, "200!");
    touched(&script, 207, "207!");
    touched(&script, 214, "214! 221 228");
    touched(&script, 235, "235! 242 249 256 263");
    touched(&script, 900, "900!"); /* backward, and longer: it takes four */
    touched(&script, 850, "850!");
    touched(&script, 800, "800!");
    touched(&script, 750, "750! 700 650");
    touched(&script, 270, "270! 277 284 291 298 305 312 319 326"); /* the first one goes on meanwhile */
    touched(&script, 600, "600! 550 500 450 400");
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 2 + 4 + 2);
    close_script(&script);
}

/* Faults of several threads, of which each has an order of its own. */
static void interleaved(void)
{
    struct script script;

    open_script(&script, PC_PREFETCH_ADAPTIVE, 0);
    touched(&script, 100, "100!");
    touched(&script, 613, "613!");
    touched(&script, 101, "101!");
    touched(&script, 612, "612!");
    touched(&script, 102, "102! 103 104");
    touched(&script, 611, "611! 610 609");
    touched(&script, 105, "105! 106 107 108 109");
    touched(&script, 608, "608! 607 606 605 604");
    close_script(&script);
}

/* No three of them are on a line with a short stride, no four on one with a long stride. */
static void random_pages_cost_nothing(void)
{
    static const uint64_t at[] = {17, 802, 333, 90, 951, 480, 5, 674, 229, 560, 845, 128, 411, 723, 60, 987};
    struct script script;
    char only[32];

    open_script(&script, PC_PREFETCH_ADAPTIVE, 0);
    for (size_t i = 0; i < sizeof(at) / sizeof(at[0]); i++) {
        (void)snprintf(only, sizeof(only), "%llu!", (unsigned long long)at[i]);
        touched(&script, at[i], only);
    }
    CHECK_EQ(pager_stats(&script.rig).demand_pages + pager_stats(&script.rig).zero_pages, sizeof(at) / sizeof(at[0]));
    close_script(&script);
}

/* Pages that are here, or known to be zero, are passed over; a fault on a zero page shows where a thread is. */
static void known_pages_are_left_out(void)
{
    uint64_t zero[(PAGES + 63) / 64] = {0};
    struct script script;

    open_script(&script, PC_PREFETCH_ADAPTIVE, 0);
    pc_bitmap_set_range(zero, 103, 1);
    pc_bitmap_set_range(zero, 105, 2);
    /* Content is what the page number says: the toucher of a zero page reads it itself. */
    CHECK_EQ(pc_pager_set_zero(script.rig.pager, 0, zero), 0);
    touched(&script, 100, "100!");
    touched(&script, 101, "101!");
    touched(&script, 102, "102! 104");
    CHECK_EQ(*(volatile uint8_t *)dest_page(&script.rig, 0, 105), 0); /* the edge */
    expect(&script, "107 108 109");
    answer_kept(&script);
    touched(&script, 110, "110! 111 112 113 114 115 116 117 118");
    close_script(&script);
}

/* ---- pages that are under way ---------------------------------------------------------------------------------------- */

static void late(void)
{
    struct toucher toucher, other;
    struct script script;

    open_script(&script, PC_PREFETCH_ADAPTIVE, 0);
    touched(&script, 100, "100!");
    touched(&script, 101, "101!");
    touch_one(&toucher, &script.rig, 0, 102);
    expect(&script, "102! 103 104");
    /* A thread reaches a page before its answer: it waits, is requested no second time, and more is requested ahead. */
    touch_one(&other, &script.rig, 0, 103);
    expect(&script, "105 106 107");
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 1);
    wait_pending(&script.rig, 2);
    answer_kept(&script);
    join_toucher(&toucher);
    join_toucher(&other);
    touched(&script, 108, "108! 109 110 111 112 113 114 115 116");
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 5);
    close_script(&script);
}

/* A thread waits for a page that one stream has asked for, and another one, which crosses it, goes on from there: it is one hit. */
static void late_where_streams_cross(void)
{
    struct toucher toucher, other;
    struct script script;

    open_script(&script, PC_PREFETCH_BOTH, 8);
    touched(&script, 100, "100! 101 102 103 104 99 98 97 96");
    touch_one(&toucher, &script.rig, 0, 110);
    expect(&script, "110! 111 112 113 114 109 108 107 106");
    touch_one(&other, &script.rig, 0, 106);
    wait_pending(&script.rig, 2);
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 1);
    answer_kept(&script);
    join_toucher(&toucher);
    join_toucher(&other);
    touched(&script, 105, "105!"); /* the edge of the former: 109, 108 and 107 were reached */
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 4);
    close_script(&script);
}

/* The one behind the deepest stream that there can be, which was requested for another reason. */
static void late_at_the_edge(void)
{
    struct toucher toucher, other;
    struct script script;

    open_script(&script, PC_PREFETCH_FORWARD, 64);
    touch_one(&toucher, &script.rig, 0, 100);
    expect(&script, "100!");
    expect_ahead(&script, 101, 165);
    answer_kept(&script);
    join_toucher(&toucher);
    CHECK_EQ(pc_pager_request_range(script.rig.pager, 0, 165, 1), 1);
    expect(&script, "165");
    touch_one(&other, &script.rig, 0, 165);
    expect_ahead(&script, 166, 230);
    CHECK_EQ(pager_stats(&script.rig).prefetch_hits, 65);
    answer_kept(&script);
    join_toucher(&other);
    close_script(&script);
}

/* Requested on another channel as what is waited for. */
static void late_on_a_channel_that_is_lost(void)
{
    struct toucher toucher;
    struct script script;

    open_script(&script, PC_PREFETCH_FORWARD, 2);
    touch_one(&toucher, &script.rig, 0, 100);
    expect(&script, "100! 101 102");
    answer(&script, &script.unanswered[0]);
    join_toucher(&toucher);
    touch_one(&toucher, &script.rig, 0, 101);
    expect(&script, "103");
    close(script.fd);
    EXPECT_EVENT(&script.rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
    script.fd = script_urgent(&script.rig, 0);
    script.count = 0;
    expect(&script, "101! 102 103");
    answer_kept(&script);
    join_toucher(&toucher);
    close_script(&script);
}

/* Of a source that does not answer what was requested ahead no more than a window is asked. */
static void unanswered(void)
{
    struct toucher toucher;
    struct script script;
    struct pc_frame frame;
    size_t ahead = 0;

    open_script(&script, PC_PREFETCH_FORWARD, 2);
    for (uint64_t page = 1; page < PAGES && ahead < 500; page += 3) {
        touch_one(&toucher, &script.rig, 0, page);
        do {
            CHECK(receive_frame(script.fd, &frame));
            ahead += frame.first_page != page;
        } while (frame.first_page != page);
        answer(&script, &frame);
        join_toucher(&toucher);
    }
    CHECK(ahead > 100 && ahead < 250);
    close(script.fd);
    CHECK_EQ(pc_pager_free(script.rig.pager), 0);
}

/* ---- a working set ---------------------------------------------------------------------------------------------------- */

static void runs(void)
{
    const uint64_t pages[] = {300, 100};
    const struct pc_page_run set[] = {{50, 3, 1}, {250, 2, 0}, {10, 2, 0}, {0, 1, 1}, {251, 3, 0}}, later = {20, 1, 0};
    const struct pc_page_run outside[] = {{99, 2, 1}, {0, 0, 0}, {0, 1, 2}};
    struct toucher toucher;
    struct script script;

    open_pager(&script.rig, PC_MEMORY_MEMFD, 2, pages);
    (void)add_shard(&script.rig, 0);
    arm(&script.rig, 0, 0, 0, 253); /* 253 is not armed, and not requested */
    arm(&script.rig, 0, 1, 0, 100);
    for (size_t i = 0; i < 3; i++)
        CHECK_EQ(pc_pager_request_runs(script.rig.pager, &outside[i], 1), -EINVAL);
    CHECK_EQ(pc_pager_request_runs(script.rig.pager, set, 0), 0);
    CHECK_EQ(pc_pager_request_runs(script.rig.pager, set, 5), 0); /* before there is a channel */
    CHECK_EQ(pc_pager_request_runs(script.rig.pager, &later, 1), 0);
    CHECK_EQ(pc_pager_request_range(script.rig.pager, 0, 30, 2), 2);
    script.count = 0;
    script.fd = script_urgent(&script.rig, 0);
    expect(&script, "50 51 52 250 251 10 11 0 252 20 30 31");
    CHECK_EQ(script.unanswered[2].block, 1);
    CHECK_EQ(script.unanswered[3].block, 0);
    CHECK_EQ(script.unanswered[7].block, 1);
    answer_kept(&script);
    touch_one(&toucher, &script.rig, 0, 250);
    join_toucher(&toucher);
    touch_one(&toucher, &script.rig, 1, 52);
    join_toucher(&toucher);
    CHECK_EQ(pager_stats(&script.rig).demand_pages, 0);
    CHECK_EQ(pager_stats(&script.rig).prefetched_pages + pager_stats(&script.rig).zero_pages, 12);
    close_script(&script);
}

/* ---- beside all else ---------------------------------------------------------------------------------------------------- */

/* Two fault threads with streams, the push, and callers that change the policy and ask for a set: every page comes once. */
static void while_pages_are_pushed(void)
{
    static const uint32_t policies[][2] = {{PC_PREFETCH_ADAPTIVE, 0}, {PC_PREFETCH_BOTH, 9}, {PC_PREFETCH_NONE, 0}, {PC_PREFETCH_FORWARD, 4}};
    const uint64_t pages[] = {1000, 700};
    const struct pc_page_run set[] = {{600, 64, 1}, {300, 64, 0}, {20, 5, 1}};
    struct visit random[2 * MAX_PAGES], forward[MAX_PAGES], backward[MAX_PAGES];
    struct toucher touchers[3];
    struct pc_pager_stats stats;
    struct rig rig;

    open_pager(&rig, PC_MEMORY_MEMFD, 2, pages);
    open_server(&rig, 0);
    tell_page_map(&rig);
    for (uint32_t shard = 0; shard < 2; shard++) { /* the half of each block */
        CHECK_EQ(add_shard(&rig, 0), shard);
        connect_urgent(&rig, shard, NULL);
        for (uint32_t block = 0; block < 2; block++)
            arm(&rig, shard, block, shard * pages[block] / 2, pages[block] / 2);
    }
    connect_bulk(&rig, 0, NULL);
    for (uint64_t i = 0; i < pages[0]; i++) {
        forward[i] = (struct visit){.block = 0, .page = i};
        backward[i] = (struct visit){.block = 0, .page = pages[0] - 1 - i};
    }
    start_toucher(&touchers[0], &rig, 0, random, shuffled(&rig, -1, random));
    start_toucher(&touchers[1], &rig, 1, forward, pages[0]);
    start_toucher(&touchers[2], &rig, 2, backward, pages[0]);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (int i = 0; i < 40; i++) {
        CHECK_EQ(pc_pager_set_prefetch(rig.pager, (int)policies[i % 4][0], policies[i % 4][1]), 0);
        CHECK_EQ(pc_pager_request_runs(rig.pager, set, 3), 0);
        pc_sleep_ns(100000);
    }
    for (int i = 0; i < 3; i++)
        join_toucher(&touchers[i]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    stats = pager_stats(&rig);
    CHECK_EQ(stats.demand_pages + stats.prefetched_pages + stats.background_pages + stats.zero_pages, pages[0] + pages[1]);
    CHECK(stats.prefetch_hits <= stats.requests);
    close_rig(&rig);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN_CASE(policies_are_checked);
    RUN_CASE(none);
    RUN_CASE(forward);
    RUN_CASE(both);
    RUN_CASE(adaptive_forward);
    RUN_CASE(adaptive_backward);
    RUN_CASE(strides);
    RUN_CASE(interleaved);
    RUN_CASE(random_pages_cost_nothing);
    RUN_CASE(known_pages_are_left_out);
    RUN_CASE(late);
    RUN_CASE(late_where_streams_cross);
    RUN_CASE(late_at_the_edge);
    RUN_CASE(late_on_a_channel_that_is_lost);
    RUN_CASE(unanswered);
    RUN_CASE(while_pages_are_pushed);
    RUN_CASE(runs);
    return test_end();
}
