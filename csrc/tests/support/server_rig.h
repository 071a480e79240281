/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of the page server share: a server alone in a rig, the test being the destination.
 */
#ifndef PC_SERVER_RIG_H
#define PC_SERVER_RIG_H

#include "tests/support/rig.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

/* A server with one block of memory and nobody connected. */
static void open_server_alone(struct rig *rig, int kind, uint64_t pages, uint64_t bandwidth)
{
    memset(rig, 0, sizeof(*rig));
    rig->kind = kind;
    rig->page_bytes = kind_page_bytes(kind);
    rig->blocks = 1;
    rig->pages[0] = pages;
    open_server(rig, bandwidth);
}

static void close_server_alone(struct rig *rig)
{
    pc_pageserver_free(rig->server);
    pc_memory_destroy(&rig->source[0]);
    CHECK_LEAKS();
}

/* The destination's end of an urgent or a bulk channel. */
static int client(struct rig *rig, int kind, uint32_t channel)
{
    int pair[2];

    tcp_pair(pair);
    be_patient(pair[0]);
    CHECK_EQ(kind == PC_CHANNEL_URGENT ? pc_pageserver_attach_urgent(rig->server, channel, pair[1], NULL, 0)
                                       : pc_pageserver_attach_bulk(rig->server, channel, pair[1], NULL),
             0);
    return pair[0];
}

static bool request(int fd, uint32_t block, uint64_t first, uint32_t pages, uint32_t id)
{
    return send_frame(
        fd,
        (struct pc_frame){
            .type = PC_FRAME_REQUEST, .block = (uint16_t)block, .first_page = first, .pages = pages, .request_id = id},
        NULL, 0);
}

/* One answer, checked against what the block holds. */
static void expect_answer(int fd, uint64_t page_bytes, struct pc_frame *frame, uint8_t *content)
{
    CHECK(receive_frame(fd, frame));
    CHECK(frame->type == PC_FRAME_PAGES || frame->type == PC_FRAME_ZERO);
    CHECK_EQ(frame->type == PC_FRAME_PAGES, content_of(0, frame->first_page) == DATA);
    if (frame->type == PC_FRAME_PAGES) {
        CHECK_EQ(frame->payload_bytes, frame->pages * page_bytes);
        CHECK(receive_bytes(fd, content, frame->payload_bytes));
        CHECK_EQ(pc_crc32c(0, content, frame->payload_bytes), frame->payload_crc);
        for (uint64_t i = 0; i < frame->pages; i++)
            CHECK(is_page(0, frame->first_page + i, page_bytes, content + i * page_bytes));
    }
}

static void expect_server_down(struct rig *rig, int kind, int channel, int error, const char *text)
{
    struct pc_event event;

    EXPECT_EVENT(&rig->from_server, PC_EVENT_CHANNEL_DOWN, kind, channel, &event);
    if (event.error != error || !strstr(event.text, text))
        FAIL("error %d, %s; should be %d, %s", event.error, event.text, error, text);
}

#pragma GCC diagnostic pop

#endif
