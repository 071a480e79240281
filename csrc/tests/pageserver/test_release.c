/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory that the page server gives back when the destination has it.
 */
#include <poll.h>

#include "tests/support/huge_pool.h"
#include "tests/support/server_rig.h"

static uint64_t source_resident(const struct rig *rig)
{
    uint64_t sum = 0, bytes;

    for (uint32_t i = 0; i < rig->blocks; i++) {
        CHECK_EQ(pc_memory_resident(&rig->source[i], &bytes), 0);
        sum += bytes;
    }
    return sum;
}

static uint64_t discarded_pages(const struct rig *rig)
{
    uint64_t words[MAX_PAGES / 64] = {0};

    CHECK_EQ(pc_pageserver_released(rig->server, 0, NULL, words), 0);
    return pc_bitmap_count(words, MAX_PAGES);
}

/* The first half is released: its memory is gone, nobody gets it any more, and everybody gets the rest. */
static void released_memory_is_given_back(int kind)
{
    uint64_t present[MAX_PAGES / 64] = {0}, half[MAX_PAGES / 64] = {0}, words[MAX_PAGES / 64] = {0}, pages = scaled(kind, 900);
    uint64_t first = pages / 2, before, page, seen = 0;
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    struct pc_frame frame;
    struct rig rig;
    int fd;

    CHECK(content != NULL);
    open_server_alone(&rig, kind, pages, 0);
    pc_bitmap_set_range(half, 0, first);
    CHECK_EQ(pc_memory_present(&rig.source[0], present), 0);
    CHECK_EQ(pc_pageserver_set_present(rig.server, 0, present), 0);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, half), -EBUSY); /* the machine still runs */
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK_EQ(pc_pageserver_release(rig.server, 1, 0, 1, half), -EINVAL);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages + 1, half), -EINVAL);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, pages + 1, 0, half), -EINVAL);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, UINT64_MAX, 2, half), -EINVAL);
    before = source_resident(&rig);
    CHECK_EQ(before, pc_bitmap_count(present, pages) * rig.page_bytes);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, half), 0);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, half), 0); /* twice is once */
    for (page = 0; page < first; page++)
        seen += present[page / 64] >> (page % 64) & 1;
    CHECK(seen > 0);
    CHECK_EQ(source_resident(&rig), before - seen * rig.page_bytes);
    CHECK_EQ(server_stats(&rig).released_bytes, seen * rig.page_bytes);
    CHECK_EQ(pc_pageserver_released(rig.server, 0, words, NULL), 0);
    CHECK(!memcmp(words, half, sizeof(half)));
    CHECK_EQ(discarded_pages(&rig), first);

    /* A request that crossed the acknowledgement ends its connection. */
    fd = client(&rig, PC_CHANNEL_URGENT, 0);
    CHECK(request(fd, 0, 0, 1, 5));
    expect_server_down(&rig, PC_CHANNEL_URGENT, 0, ESTALE, "page 0 of RAM block 0 was asked for and acknowledged");
    CHECK(!receive_frame(fd, &frame));
    close(fd);

    /* The next one begins with the received map, which has to have what was released. */
    memset(words, 0, sizeof(words));
    pc_bitmap_set_range(words, 1, pages - 1);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    CHECK_EQ(pc_pageserver_set_received(rig.server, 0, words), -ENODATA);
    CHECK_EQ(pc_pageserver_set_received(rig.server, 0, half), 0);
    fd = client(&rig, PC_CHANNEL_URGENT, 0);
    CHECK(request(fd, 0, 0, 1, 6)); /* from a destination that does not keep its word */
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.type, PC_FRAME_ERROR);
    CHECK_EQ(frame.flags, PC_FRAME_DEMAND);
    CHECK_EQ(frame.first_page, 0);
    CHECK_EQ(frame.request_id, 6);
    CHECK(receive_bytes(fd, content, frame.payload_bytes));
    CHECK(frame.payload_bytes < PC_ERROR_BYTES);
    content[frame.payload_bytes] = 0;
    CHECK(strstr((char *)content, "given back"));
    for (page = first; content_of(0, page) != DATA; page++) {
    }
    CHECK(request(fd, 0, page, 1, 7));
    expect_answer(fd, rig.page_bytes, &frame, content);
    CHECK_EQ(frame.first_page, page);
    close(fd);
    seen = 1;
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    for (;;) {
        CHECK(receive_frame(fd, &frame));
        if (frame.type == PC_FRAME_END)
            break;
        CHECK(frame.first_page >= first);
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        for (uint64_t i = 0; i < frame.pages; i++)
            CHECK(frame.type == PC_FRAME_ZERO ? content_of(0, frame.first_page + i) != DATA
                                              : is_page(0, frame.first_page + i, rig.page_bytes, content + i * rig.page_bytes));
        seen += frame.pages;
    }
    for (page = 0; page < first; page++)
        before -= (present[page / 64] >> (page % 64) & 1) * rig.page_bytes;
    CHECK_EQ(seen, before / rig.page_bytes);
    close(fd);
    free(content);
    close_server_alone(&rig);
}
OF_EACH_KIND(released_memory_is_given_back)

/* Pages of transfer that are a part of a page of memory, or several: only whole pages of memory can go. */
static void released_pages_of_other_sizes(void)
{
    struct pc_memory memory = make_memory(PC_MEMORY_MEMFD, 8);
    uint64_t map[1] = {7}, gone[1] = {0}, bytes;
    struct pc_pageserver *server;

    for (int large = 0; large < 2; large++) {
        memset(memory.base, 1, memory.size_bytes);
        CHECK_EQ(pc_pageserver_new(0, &server), 0);
        CHECK_EQ(pc_pageserver_add_block(server, &memory, large ? 4 * pc_page_bytes() : pc_page_bytes() / 4), 0);
        CHECK_EQ(pc_pageserver_start(server), 0);
        if (large) {
            map[0] = 2;
            CHECK_EQ(pc_pageserver_release(server, 0, 0, 2, map), 0);
            CHECK_EQ(pc_memory_resident(&memory, &bytes), 0);
            CHECK_EQ(bytes, 4 * pc_page_bytes());
            CHECK_EQ(((uint8_t *)memory.base)[4 * pc_page_bytes() - 1], 1);
            CHECK_EQ(((uint8_t *)memory.base)[4 * pc_page_bytes()], 0);
        } else {
            CHECK_EQ(pc_pageserver_release(server, 0, 0, 3, map), 0); /* three quarters */
            CHECK_EQ(pc_memory_resident(&memory, &bytes), 0);
            CHECK_EQ(bytes, memory.size_bytes);
            map[0] = 1;
            CHECK_EQ(pc_pageserver_release(server, 0, 3, 1, map), 0); /* and the last one */
            CHECK_EQ(pc_memory_resident(&memory, &bytes), 0);
            CHECK_EQ(bytes, memory.size_bytes - pc_page_bytes());
            map[0] = 0x7ff; /* of pages 5 to 15 the last eight are whole */
            CHECK_EQ(pc_pageserver_release(server, 0, 5, 11, map), 0);
            CHECK_EQ(pc_memory_resident(&memory, &bytes), 0);
            CHECK_EQ(bytes, memory.size_bytes - 3 * pc_page_bytes());
            CHECK_EQ(pc_pageserver_released(server, 0, NULL, gone), 0);
            CHECK_EQ(gone[0], 0xff0f);
            CHECK_EQ(((uint8_t *)memory.base)[2 * pc_page_bytes() - 1], 1);
        }
        pc_pageserver_free(server);
    }
    pc_memory_destroy(&memory);
    CHECK_LEAKS();
}

/* As `client`, with sockets that hold little; `served` is the server's end. */
static int narrow_client(struct rig *rig, int kind, int *served)
{
    int pair[2], bytes = 16384;

    tcp_pair(pair);
    be_patient(pair[0]);
    CHECK_SYS(setsockopt(pair[0], SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes)));
    CHECK_SYS(setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)));
    CHECK_EQ(kind == PC_CHANNEL_URGENT ? pc_pageserver_attach_urgent(rig->server, 0, pair[1], NULL, 0)
                                       : pc_pageserver_attach_bulk(rig->server, 0, pair[1], NULL),
             0);
    *served = pair[1];
    return pair[0];
}

/* Until nothing moves any more: the peer is deaf, and the socket is full, which a thread that has no processor does not make it. */
static void wait_stalled(const struct rig *rig, int served)
{
    struct pollfd room = {.fd = served, .events = POLLOUT};
    uint64_t before;

    do {
        before = server_stats(rig).sent_pages;
        (void)nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
        CHECK(!(room.revents & (POLLERR | POLLHUP | POLLNVAL)));
    } while (CHECK_SYS(poll(&room, 1, 0)) || !before || server_stats(rig).sent_pages != before);
}

/* What stands in a send when it is released arrives whole, and its memory goes afterwards. */
static void what_is_under_way_is_kept(int kind)
{
    uint64_t all[MAX_PAGES / 64], pages = scaled(kind, MAX_PAGES), answers = 0;
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    struct pc_frame frame;
    struct rig rig;
    int fd, served;

    CHECK(content != NULL);
    memset(all, 0, sizeof(all));
    pc_bitmap_set_range(all, 0, pages);
    open_server_alone(&rig, kind, pages, 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    fd = narrow_client(&rig, PC_CHANNEL_BULK, &served);
    wait_stalled(&rig, served);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, all), 0);
    CHECK(discarded_pages(&rig) < pages);
    CHECK(source_resident(&rig) > 0);
    for (;;) {
        CHECK(receive_frame(fd, &frame));
        if (frame.type == PC_FRAME_END)
            break;
        if (frame.type == PC_FRAME_PAGES) {
            CHECK(receive_bytes(fd, content, frame.payload_bytes));
            for (uint64_t i = 0; i < frame.pages; i++)
                CHECK(is_page(0, frame.first_page + i, rig.page_bytes, content + i * rig.page_bytes));
        }
    }
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, 0, all), 0); /* nothing new, but what was late */
    CHECK_EQ(discarded_pages(&rig), pages);
    CHECK_EQ(source_resident(&rig), 0);
    close(fd);
    close_server_alone(&rig);

    open_server_alone(&rig, kind, pages, 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    fd = narrow_client(&rig, PC_CHANNEL_URGENT, &served);
    CHECK(request(fd, 0, 0, (uint32_t)pages, 1));
    wait_stalled(&rig, served);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, all), 0);
    CHECK(discarded_pages(&rig) < pages);
    /* Huge pages are so few that all of them stand in one send; of the others, what was not looked at ends the connection. */
    while ((kind != PC_MEMORY_HUGETLB || answers < pages) && receive_frame(fd, &frame)) {
        CHECK_EQ(frame.first_page, answers);
        CHECK(frame.type == PC_FRAME_PAGES || frame.type == PC_FRAME_ZERO);
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        CHECK_EQ(frame.type == PC_FRAME_PAGES, content_of(0, frame.first_page) == DATA);
        CHECK(frame.type == PC_FRAME_ZERO || is_page(0, frame.first_page, rig.page_bytes, content));
        answers++;
    }
    CHECK(kind == PC_MEMORY_HUGETLB ? answers == pages : answers > 0 && answers < pages);
    if (kind != PC_MEMORY_HUGETLB)
        expect_server_down(&rig, PC_CHANNEL_URGENT, 0, ESTALE, "acknowledged");
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, 0, all), 0);
    CHECK_EQ(discarded_pages(&rig), pages);
    close(fd);
    free(content);
    close_server_alone(&rig);
}
OF_EACH_KIND(what_is_under_way_is_kept)

static void recover_both(struct rig *rig, int knives[3])
{
    CHECK_EQ(pc_pager_disconnect(rig->pager), 0);
    CHECK_EQ(pc_pageserver_disconnect(rig->server), 0);
    while (find_event(&rig->from_pager, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
    }
    while (find_event(&rig->from_server, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
    }
    for (uint32_t i = 0; i < rig->blocks; i++) {
        uint64_t received[MAX_PAGES / 64] = {0};

        CHECK_EQ(pc_pager_received(rig->pager, i, received), 0);
        CHECK_EQ(pc_pageserver_set_received(rig->server, i, received), 0);
    }
    for (int i = 0; i < 3; i++)
        reconnect(rig, i, &knives[i]);
}

/* Faults, push, acknowledgements a moment later and cuts, all at once: every page is right, and at the end the source is empty. */
static void released_as_it_arrives(int kind)
{
    const uint64_t pages[] = {scaled(kind, 1000), scaled(kind, 400)};
    uint64_t before[2][MAX_PAGES / 64] = {{0}}, now[MAX_PAGES / 64];
    struct visit visits[2 * MAX_PAGES];
    struct toucher touchers[4];
    int knives[3], rounds = 0, recoveries = 0;
    struct rig rig;

    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 8000000);
    tell_page_map(&rig);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(add_shard(&rig, 0), i);
        arm(&rig, i, i, 0, pages[i]);
        connect_urgent(&rig, i, &knives[i]);
    }
    connect_bulk(&rig, 0, &knives[2]);
    atomic_store(&rig.leashed, true);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (int t = 0; t < 4; t++) {
        size_t count = shuffled(&rig, -1, visits);

        start_toucher(&touchers[t], &rig, t, visits, count);
    }
    while (pager_stats(&rig).resident_pages < all_pages(&rig)) {
        if (atomic_load(&rig.allowance) < 4)
            atomic_fetch_add(&rig.allowance, 4);
        for (uint32_t i = 0; i < 2; i++) {
            memset(now, 0, sizeof(now));
            CHECK_EQ(pc_pager_received(rig.pager, i, now), 0);
            CHECK_EQ(pc_pageserver_release(rig.server, i, 0, pages[i], before[i]), 0);
            memcpy(before[i], now, sizeof(now));
        }
        /* Without the moment that an engine waits requests do cross; and the network fails too. */
        if (find_event(&rig.from_server, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL) || ++rounds % 40 == 1) {
            recover_both(&rig, knives);
            recoveries++;
        }
        (void)sched_yield();
    }
    atomic_store(&rig.leashed, false);
    for (int t = 0; t < 4; t++)
        join_toucher(&touchers[t]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    EXPECT_NO_EVENT(&rig.from_server, PC_EVENT_FATAL);
    CHECK_EQ(pager_stats(&rig).frames_refused, 0);
    CHECK(recoveries > 0);
    CHECK(kind == PC_MEMORY_HUGETLB || server_stats(&rig).released_bytes > 0); /* those are few, and may all come at once */
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    check_content(&rig);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    for (uint32_t i = 0; i < 2; i++) {
        pc_bitmap_set_range(before[i], 0, pages[i]);
        CHECK_EQ(pc_pageserver_release(rig.server, i, 0, pages[i], before[i]), 0);
    }
    CHECK_EQ(source_resident(&rig), 0);
    for (int i = 0; i < 3; i++)
        close(knives[i]);
    close_rig(&rig);
}
OF_EACH_KIND(released_as_it_arrives)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(released_memory_is_given_back);
    RUN_CASE(released_pages_of_other_sizes);
    RUN_KINDS(what_is_under_way_is_kept);
    RUN_KINDS(released_as_it_arrives);
    return test_end();
}
