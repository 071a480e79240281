/* SPDX-License-Identifier: Apache-2.0
 *
 * A source that cannot be trusted: frames that are damaged, senseless or cut are never seen by the machine, and end their channel.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

enum damage {
    BAD_MAGIC,
    BAD_HEADER_CRC,
    BAD_TYPE,
    BAD_FLAGS,
    BAD_PAYLOAD_CRC,
    NO_SUCH_BLOCK,
    NO_SUCH_PAGES,
    TOO_MANY_PAGES,
    WRONG_SIZE,
    TOO_LONG,
    A_REQUEST,
    AN_END, /* urgent only: on a bulk channel it belongs there */
    CUT_IN_HEADER,
    CUT_AFTER_HEADER,
    CUT_IN_PAYLOAD,
    CLOSED,
    DAMAGES
};

static const struct {
    int error;
    const char *text;
} damages[DAMAGES] = {
    [BAD_MAGIC] = {EBADMSG, "magic"},
    [BAD_HEADER_CRC] = {EBADMSG, "header checksum"},
    [BAD_TYPE] = {EBADMSG, "unknown type"},
    [BAD_FLAGS] = {EBADMSG, "unknown flags"},
    [BAD_PAYLOAD_CRC] = {EBADMSG, "CRC32C"},
    [NO_SUCH_BLOCK] = {EBADMSG, "names RAM block 1,"},
    [NO_SUCH_PAGES] = {EBADMSG, "names pages"},
    [TOO_MANY_PAGES] = {EBADMSG, "names pages"},
    [WRONG_SIZE] = {EBADMSG, "carries"},
    [TOO_LONG] = {EBADMSG, "too long"},
    [A_REQUEST] = {EBADMSG, "type 1 does not belong here"},
    [AN_END] = {EBADMSG, "type 4 does not belong here"},
    [CUT_IN_HEADER] = {EPIPE, "inside a frame"},
    [CUT_AFTER_HEADER] = {EPIPE, "inside a frame"},
    [CUT_IN_PAYLOAD] = {EPIPE, "inside a frame"},
    [CLOSED] = {0, "closed"},
};

/* A frame with the right content of `page`, but for one thing. */
static void send_damaged(const struct rig *rig, int fd, enum damage damage, uint64_t page)
{
    uint8_t *bytes = malloc(PC_FRAME_HEADER_BYTES + rig->page_bytes), *content = bytes + PC_FRAME_HEADER_BYTES;
    size_t length = PC_FRAME_HEADER_BYTES + rig->page_bytes;
    struct pc_frame frame = {.type = PC_FRAME_PAGES,
                             .flags = PC_FRAME_DEMAND,
                             .first_page = page,
                             .pages = 1,
                             .payload_bytes = (uint32_t)rig->page_bytes};
    uint64_t pages = rig->pages[0];

    CHECK(bytes != NULL);
    make_page(0, page, rig->page_bytes, content);
    frame.payload_crc = pc_crc32c(0, content, rig->page_bytes);
    if (damage == BAD_TYPE)
        frame.type = 6;
    else if (damage == BAD_FLAGS)
        frame.flags = 0x82;
    else if (damage == BAD_PAYLOAD_CRC)
        content[test_below(rig->page_bytes)] ^= (uint8_t)(1u << test_below(8));
    else if (damage == NO_SUCH_BLOCK)
        frame.block = 1;
    else if (damage == NO_SUCH_PAGES)
        frame.first_page = pages + test_below(UINT64_C(1) << 62);
    else if (damage == TOO_MANY_PAGES)
        frame = (struct pc_frame){.type = PC_FRAME_ZERO, .first_page = page, .pages = UINT32_MAX};
    else if (damage == WRONG_SIZE)
        frame.payload_bytes /= 2;
    else if (damage == TOO_LONG)
        frame.payload_bytes = PC_FRAME_MAX_PAYLOAD_BYTES + 1;
    else if (damage == A_REQUEST)
        frame = (struct pc_frame){.type = PC_FRAME_REQUEST, .first_page = page, .pages = 1};
    else if (damage == AN_END)
        frame = (struct pc_frame){.type = PC_FRAME_END};
    pc_frame_encode(&frame, bytes);
    if (damage == BAD_MAGIC)
        bytes[0] ^= 0x20;
    else if (damage == BAD_HEADER_CRC)
        bytes[8] ^= 1; /* another page of the same block: only the checksum can tell */
    else if (damage == CUT_IN_HEADER)
        length = 1 + test_below(PC_FRAME_HEADER_BYTES - 1);
    else if (damage == CUT_AFTER_HEADER)
        length = PC_FRAME_HEADER_BYTES;
    else if (damage == CUT_IN_PAYLOAD)
        length = PC_FRAME_HEADER_BYTES + 1 + test_below(rig->page_bytes - 1);
    else if (damage == CLOSED)
        length = 0;
    (void)send_bytes(fd, bytes, length); /* the pager may have had enough before the end */
    if (damage >= CUT_IN_HEADER)
        CHECK_SYS(shutdown(fd, SHUT_WR));
    free(bytes);
}

static void expect_requests(int fd, uint64_t one, uint64_t other)
{
    struct pc_frame first, second;

    CHECK(receive_frame(fd, &first) && receive_frame(fd, &second));
    CHECK_EQ(first.type, PC_FRAME_REQUEST);
    CHECK_EQ(first.pages, 1);
    CHECK((first.first_page == one && second.first_page == other) ||
          (first.first_page == other && second.first_page == one));
}

static void expect_damage(struct rig *rig, enum damage damage, int kind, int channel)
{
    struct pc_event event;

    if (!find_event(&rig->from_pager, PC_EVENT_CHANNEL_DOWN, kind, channel, PATIENCE_MS, &event))
        FAIL("damage %d did not end the channel", damage);
    if (event.error != damages[damage].error || !strstr(event.text, damages[damage].text))
        FAIL("damage %d gave error %d, %s", damage, event.error, event.text);
}

static uint64_t other_data_page(const struct rig *rig)
{
    for (uint64_t page = rig->pages[0] - 1; page; page--)
        if (content_of(0, page) == DATA)
            return page;
    return 2;
}

static void damage_is_never_seen(int kind)
{
    const uint64_t pages[] = {scaled(kind, 256)};
    struct toucher touchers[2];
    struct pc_event event;
    uint64_t other, refused = 0;
    struct rig rig;
    int fd, bulk_fd;

    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    other = other_data_page(&rig);
    touch_one(&touchers[0], &rig, 0, 0);
    touch_one(&touchers[1], &rig, 0, other);
    wait_pending(&rig, 2);
    CHECK_EQ(pager_stats(&rig).requests, 0);
    for (enum damage damage = 0; damage < DAMAGES; damage++) {
        fd = script_urgent(&rig, 0);
        expect_requests(fd, 0, other);
        send_damaged(&rig, fd, damage, 0);
        expect_damage(&rig, damage, PC_CHANNEL_URGENT, 0);
        refused += damages[damage].error == EBADMSG;
        CHECK_EQ(pager_stats(&rig).frames_refused, refused);
        close(fd);
    }
    fd = script_urgent(&rig, 0);
    expect_requests(fd, 0, other);
    for (enum damage damage = 0; damage < DAMAGES; damage++) {
        if (damage == AN_END)
            continue;
        bulk_fd = script_bulk(&rig, 3);
        send_damaged(&rig, bulk_fd, damage, 0);
        expect_damage(&rig, damage, PC_CHANNEL_BULK, 3);
        refused += damages[damage].error == EBADMSG;
        CHECK_EQ(pager_stats(&rig).frames_refused, refused);
        close(bulk_fd);
    }
    CHECK_EQ(atomic_load(&touchers[0].done) + atomic_load(&touchers[1].done), 0);
    CHECK_EQ(resident_bytes(&rig), 0);
    CHECK_EQ(pager_stats(&rig).resident_pages, 0);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);

    /* What the source cannot serve is said, and is not the channel's end. */
    CHECK(send_frame(fd,
                     (struct pc_frame){.type = PC_FRAME_ERROR, .flags = PC_FRAME_DEMAND, .first_page = other, .pages = 1},
                     "the disk is on fire", 19));
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, PC_CHANNEL_URGENT, 0, &event);
    CHECK_EQ(event.error, EIO);
    CHECK(strstr(event.text, "the disk is on fire") != NULL);
    CHECK(!speaks(fd, SERVED_MS));
    CHECK_EQ(atomic_load(&touchers[1].done), 0);
    serve_page(&rig, fd, 0, 0);
    serve_page(&rig, fd, 0, other);
    join_toucher(&touchers[0]);
    join_toucher(&touchers[1]);
    CHECK_EQ(pager_stats(&rig).frames_refused, refused);
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}
OF_EACH_KIND(damage_is_never_seen)

/* Frames that arrive a byte at a time, and many in one piece. */
static void frames_cut_by_tcp(void)
{
    const uint64_t pages[] = {64};
    struct toucher toucher;
    struct pc_frame frame, all = {.type = PC_FRAME_PAGES, .pages = 1};
    uint8_t page[65536], wire[PC_FRAME_HEADER_BYTES];
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK(rig.page_bytes <= sizeof(page));
    arm_all(&rig, 0);
    touch_one(&toucher, &rig, 0, 0);
    fd = script_urgent(&rig, 0);
    CHECK(receive_frame(fd, &frame));
    make_page(0, 0, rig.page_bytes, page);
    frame.type = PC_FRAME_PAGES;
    frame.flags = PC_FRAME_DEMAND;
    frame.payload_bytes = (uint32_t)rig.page_bytes;
    frame.payload_crc = pc_crc32c(0, page, rig.page_bytes);
    pc_frame_encode(&frame, wire);
    for (size_t i = 0; i < sizeof(wire); i++)
        CHECK(send_bytes(fd, wire + i, 1));
    for (size_t i = 0; i < rig.page_bytes; i += 97)
        CHECK(send_bytes(fd, page + i, i + 97 < rig.page_bytes ? 97 : rig.page_bytes - i));
    join_toucher(&toucher);
    for (uint64_t i = 1; i < pages[0]; i++) {
        make_page(0, i, rig.page_bytes, page);
        all.first_page = i;
        CHECK(send_frame(fd, all, page, rig.page_bytes));
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    check_content(&rig);
    close(fd);
    close_rig(&rig);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(damage_is_never_seen);
    RUN_CASE(frames_cut_by_tcp);
    return test_end();
}
