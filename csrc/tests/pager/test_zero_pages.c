/* SPDX-License-Identifier: Apache-2.0
 *
 * Pages without content: never touched at the source, filled with zeros by another process, thrown away by the machine.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

static void known_zero_needs_nobody(int kind)
{
    const uint64_t pages[] = {scaled(kind, 200)};
    uint64_t zero[MAX_PAGES / 64] = {0}, half = pages[0] / 2;
    struct rig rig;
    int fd;

    open_pager(&rig, kind, 1, pages);
    pc_bitmap_set_range(zero, 0, half);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 1, zero), -EINVAL);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0); /* said twice is not two pages */
    CHECK_EQ(pager_stats(&rig).zero_pages, half);
    CHECK_EQ(pager_stats(&rig).resident_pages, half);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    for (uint64_t page = 0; page < half; page++) {
        uint8_t *at = dest_page(&rig, 0, page);

        CHECK(page % 2 || pc_is_zero(at, rig.page_bytes));
        at[page] = 1;
        CHECK_EQ(at[page], 1);
    }
    CHECK(!speaks(fd, SERVED_MS));
    CHECK_EQ(pager_stats(&rig).requests, 0);
    CHECK(pager_stats(&rig).faults >= half);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_COMPLETE);
    /* The last half by a frame, while somebody waits for a page of it. */
    {
        struct pc_frame zeros = {.type = PC_FRAME_ZERO, .first_page = half, .pages = (uint32_t)(pages[0] - half)}, got;
        uint64_t page = pages[0] - 1;

        while (page > half && content_of(0, page) == DATA)
            page--;
        if (content_of(0, page) != DATA) {
            struct toucher toucher;

            touch_one(&toucher, &rig, 0, page);
            CHECK(receive_frame(fd, &got));
            CHECK_EQ(got.first_page, page);
            CHECK(send_frame(fd, zeros, NULL, 0));
            join_toucher(&toucher);
        } else {
            CHECK(send_frame(fd, zeros, NULL, 0));
        }
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    for (uint64_t page = half; page < pages[0]; page++)
        CHECK(pc_is_zero(dest_page(&rig, 0, page), rig.page_bytes));
    close(fd);
    close_rig(&rig);
}
OF_EACH_KIND(known_zero_needs_nobody)

/* Everything after the machine has stopped needing it: memory that is disarmed reads what is there and zeros elsewhere,
 * without anybody having touched the zeros before. */
static void disarmed_zeros(int kind)
{
    const uint64_t pages[] = {scaled(kind, 256)};
    struct rig rig;

    open_pager(&rig, kind, 1, pages);
    open_server(&rig, 0);
    arm_all(&rig, 0);
    connect_bulk(&rig, 0, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    CHECK_EQ(resident_bytes(&rig), count_content(&rig, DATA) * rig.page_bytes);
    check_content(&rig);
    close_rig(&rig);
}
OF_EACH_KIND(disarmed_zeros)

/* ---- holes that somebody else has filled -------------------------------------------------------------------------- */

static void hole_filled_elsewhere(int kind)
{
    const uint64_t pages[] = {scaled(kind, 256)};
    struct toucher touchers[2];
    struct pc_frame frame;
    struct rig rig;
    volatile uint8_t *alias;
    uint64_t page;
    int fd, bulk_fd;

    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    alias = CHECK_SYS(mmap(NULL, rig.dest[0].size_bytes, PROT_READ, MAP_SHARED, rig.dest[0].fd, 0));
    for (page = 0; page < pages[0]; page++)
        CHECK_EQ(alias[page * rig.page_bytes], 0); /* the page cache has a page of zeros now */
    CHECK_EQ(resident_bytes(&rig), rig.dest[0].size_bytes);
    fd = script_urgent(&rig, 0);
    touch_one(&touchers[0], &rig, 0, 0);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 0);
    touch_one(&touchers[1], &rig, 0, 0);
    wait_pending(&rig, 2);
    CHECK(!speaks(fd, SERVED_MS));
    CHECK_EQ(atomic_load(&touchers[0].done), 0);
    serve_page(&rig, fd, 0, 0);
    join_toucher(&touchers[0]);
    join_toucher(&touchers[1]);
    CHECK_EQ(pager_stats(&rig).requests, 1);

    /* By push, with a thread waiting for a page which turns out to be zero. */
    page = pages[0] - 1;
    while (page > 1 && content_of(0, page) == DATA)
        page--;
    touch_one(&touchers[0], &rig, 0, page);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, page);
    bulk_fd = script_bulk(&rig, 0);
    for (page = 1; page < pages[0]; page++) {
        if (content_of(0, page) == DATA)
            serve_page(&rig, bulk_fd, 0, page);
        else
            CHECK(send_frame(bulk_fd, (struct pc_frame){.type = PC_FRAME_ZERO, .first_page = page, .pages = 1}, NULL, 0));
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    join_toucher(&touchers[0]);
    check_content(&rig);
    for (page = 0; page < pages[0]; page++)
        CHECK(is_page(0, page, rig.page_bytes, (const uint8_t *)(uintptr_t)alias + page * rig.page_bytes));
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK_SYS(munmap((void *)(uintptr_t)alias, rig.dest[0].size_bytes));
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}

static void hole_filled_elsewhere_memfd(void)
{
    hole_filled_elsewhere(PC_MEMORY_MEMFD);
}

static void hole_filled_elsewhere_hugetlb(void)
{
    hole_filled_elsewhere(PC_MEMORY_HUGETLB);
}

/* A page thrown away after it had come is zero from then on (a balloon), not missing and not old. */
static void thrown_away_pages_are_zero(int kind)
{
    const uint64_t pages[] = {scaled(kind, 64)};
    struct rig rig;

    open_pager(&rig, kind, 1, pages);
    open_server(&rig, 0);
    arm_all(&rig, 0);
    connect_urgent(&rig, 0, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    check_content(&rig);
    CHECK_SYS(madvise(rig.dest[0].base, rig.dest[0].size_bytes, kind == PC_MEMORY_ANON ? MADV_DONTNEED : MADV_REMOVE));
    for (uint64_t page = 0; page < pages[0]; page++) {
        CHECK(page % 2 || pc_is_zero(dest_page(&rig, 0, page), rig.page_bytes));
        *dest_page(&rig, 0, page) = 1;
        CHECK_EQ(*dest_page(&rig, 0, page), 1);
    }
    CHECK_EQ(pager_stats(&rig).requests, pages[0]);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    close_rig(&rig);
}
OF_EACH_KIND(thrown_away_pages_are_zero)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(disarmed_zeros);
    RUN_KINDS(known_zero_needs_nobody);
    RUN_CASE(hole_filled_elsewhere_memfd);
    RUN_CASE(hole_filled_elsewhere_hugetlb);
    RUN_KINDS(thrown_away_pages_are_zero);
    return test_end();
}
