/* SPDX-License-Identifier: Apache-2.0
 *
 * Pushed pages that are compressed: what is placed is what was there; and a source that lies about it.
 */
#include "core/codec.h"
#include "tests/support/rig.h"

static void need_libraries(void)
{
    const uint32_t both = PC_COMPRESSION_LZ4 | PC_COMPRESSION_ZSTD;

    if (pc_compression_available(both, message, sizeof(message)) != both)
        SKIP("compression", "%s", message);
}

/* Half of the pages become such as compress. */
static void fill_with_text(const struct pc_memory *memory, uint64_t pages)
{
    for (uint64_t page = 0; page < pages; page += 2)
        for (uint64_t i = 0; i < memory->page_bytes; i++)
            ((uint8_t *)memory->base)[page * memory->page_bytes + i] = (uint8_t)"the page is compressed "[(i * i / 64 + page) % 23];
}

static void is_placed_as_it_was(int kind, uint32_t how, int adaptive)
{
    const uint64_t pages[] = {scaled(kind, 4096)};
    struct pc_pageserver_stats stats;
    struct rig rig;

    need_libraries();
    open_pager(&rig, kind, 1, pages);
    open_server(&rig, 0);
    fill_with_text(&rig.source[0], pages[0]);
    arm_all(&rig, 0);
    CHECK_EQ(pc_pageserver_set_compression(rig.server, how, adaptive), 0);
    connect_urgent(&rig, 0, NULL);
    connect_bulk(&rig, 0, NULL);
    connect_bulk(&rig, 1, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK(!memcmp(rig.source[0].base, rig.dest[0].base, pages[0] * rig.page_bytes));
    EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, NULL);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 1, NULL);
    stats = server_stats(&rig);
    WAIT_UNTIL(pager_stats(&rig).bytes_received == stats.bytes_sent); /* the ends of the push too */
    CHECK_EQ(pager_stats(&rig).frames_refused, 0);
    if (!adaptive) {
        CHECK(stats.compressed_bytes > 0);
        CHECK(stats.compressed_bytes <= stats.uncompressed_bytes - stats.uncompressed_bytes / 16);
        CHECK(stats.uncompressed_bytes <= stats.background_pages * rig.page_bytes); /* what is random goes as it is */
    }
    close_rig(&rig);
}

static void lz4(void)
{
    is_placed_as_it_was(PC_MEMORY_MEMFD, PC_COMPRESSION_LZ4, 0);
}

static void zstd(void)
{
    is_placed_as_it_was(PC_MEMORY_ANON, PC_COMPRESSION_ZSTD, 0);
}

static void adaptive(void)
{
    is_placed_as_it_was(PC_MEMORY_MEMFD, PC_COMPRESSION_LZ4 | PC_COMPRESSION_ZSTD, 1);
}

/* On a wire of two megabytes a second every compressor is worth it; the bandwidth is that of the wire. */
static void adaptive_compresses_where_the_wire_is_slow(void)
{
    const uint64_t pages[] = {3072};
    struct pc_pageserver_stats stats;
    struct rig rig;

    need_libraries();
    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    open_server(&rig, 4 << 20);
    memset(rig.source[0].base, 'c', rig.source[0].size_bytes);
    arm_all(&rig, 0);
    CHECK_EQ(pc_pageserver_set_compression(rig.server, PC_COMPRESSION_LZ4 | PC_COMPRESSION_ZSTD, 1), 0);
    connect_bulk(&rig, 0, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, NULL);
    CHECK(!memcmp(rig.source[0].base, rig.dest[0].base, pages[0] * rig.page_bytes));
    stats = server_stats(&rig);
    CHECK(stats.uncompressed_bytes > pages[0] * rig.page_bytes / 2);
    close_rig(&rig);
}

static void only_one_way_unless_adaptive(void)
{
    struct pc_pageserver *server;

    need_libraries();
    CHECK_EQ(pc_pageserver_new(0, &server), 0);
    CHECK_EQ(pc_pageserver_set_compression(server, PC_COMPRESSION_LZ4 | PC_COMPRESSION_ZSTD, 0), -EINVAL);
    CHECK_EQ(pc_pageserver_set_compression(server, 4, 1), -EINVAL);
    CHECK_EQ(pc_pageserver_set_compression(server, 0, 0), 0);
    pc_pageserver_free(server);
}

/* ---- lies --------------------------------------------------------------------------------------------------------- */

#define PAGES 4
#define ROOM 65536

struct lie {
    struct pc_frame frame;
    uint8_t payload[ROOM];
    const char *text;
};

/* PAGES pages, honestly compressed. */
static void honest(struct lie *lie, const struct rig *rig, uint32_t how)
{
    struct pc_codec codec = {0};
    uint64_t bytes = PAGES * rig->page_bytes;
    uint8_t *content = malloc(bytes);

    CHECK(content != NULL);
    memset(content, 'x', bytes);
    for (uint64_t i = 0; i < bytes; i += 41)
        content[i] = (uint8_t)i;
    lie->frame = (struct pc_frame){.type = PC_FRAME_PAGES,
                                   .flags = how == PC_COMPRESSION_LZ4 ? PC_FRAME_LZ4 : PC_FRAME_ZSTD,
                                   .pages = PAGES,
                                   .content_bytes = (uint32_t)bytes};
    lie->frame.payload_bytes = (uint32_t)pc_codec_compress(&codec, how, content, bytes, lie->payload, ROOM / 2);
    CHECK(lie->frame.payload_bytes > 0);
    lie->text = "decompress";
    pc_codec_free(&codec);
    free(content);
}

/* The lie of that number about an honest frame; false: there are no more. */
static bool make_lie(struct lie *lie, const struct rig *rig, uint32_t how, int number)
{
    struct pc_frame *frame = &lie->frame;
    uint32_t page_bytes = (uint32_t)rig->page_bytes, length;

    honest(lie, rig, how);
    length = frame->payload_bytes;
    switch (number) {
    case 0: /* cut */
        frame->payload_bytes -= 1;
        return true;
    case 1:
        frame->payload_bytes = 1;
        return true;
    case 2: /* longer than it is */
        memset(lie->payload + length, 0, 16);
        frame->payload_bytes += 16;
        return true;
    case 3: /* decompresses to more than its pages */
        frame->pages--;
        frame->content_bytes -= page_bytes;
        return true;
    case 4: /* and to less */
        frame->pages++;
        frame->content_bytes += page_bytes;
        return true;
    case 5: /* noise */
        for (uint32_t i = 0; i < length; i++)
            lie->payload[i] = (uint8_t)test_random();
        return true;
    case 6: /* the other library's */
        frame->flags ^= PC_FRAME_LZ4 | PC_FRAME_ZSTD;
        return true;
    case 7:
        frame->flags |= PC_FRAME_LZ4 | PC_FRAME_ZSTD;
        lie->text = "cannot be compressed";
        return true;
    case 8:
        frame->type = PC_FRAME_ZERO;
        lie->text = "cannot be compressed";
        return true;
    case 9:
        frame->flags |= PC_FRAME_DEMAND;
        lie->text = "cannot be compressed";
        return true;
    case 10:
        frame->flags = 0;
        lie->text = "of content";
        return true;
    case 11: /* not smaller than its content */
        frame->payload_bytes = frame->content_bytes;
        lie->text = "of content";
        return true;
    case 12:
        frame->content_bytes = 0;
        lie->text = "of content";
        return true;
    case 13:
        frame->content_bytes = PC_FRAME_MAX_PAYLOAD_BYTES + 4096;
        lie->text = "of content";
        return true;
    case 14: /* pages of another size */
        frame->content_bytes *= 2;
        lie->text = "carries";
        return true;
    case 15: /* more than the block has */
        frame->pages = PC_FRAME_MAX_PAYLOAD_BYTES / page_bytes;
        frame->content_bytes = PC_FRAME_MAX_PAYLOAD_BYTES;
        lie->text = "names pages";
        return true;
    case 16: /* Zstandard: two frames; LZ4: something behind the block */
        memcpy(lie->payload + length, lie->payload, length);
        frame->payload_bytes *= 2;
        frame->pages *= 2;
        frame->content_bytes *= 2;
        return true;
    default: /* Zstandard 0.7, which some libraries still read, and a frame to skip */
        if (how == PC_COMPRESSION_LZ4 || number > 18)
            return false;
        lie->payload[0] = number == 17 ? 0x27 : 0x50;
        if (number == 18)
            memcpy(lie->payload + 1, "\x2A\x4D\x18", 3);
        return true;
    }
}

static void lies_are_never_seen(void)
{
    const uint64_t pages[] = {64};
    struct lie *lie = malloc(sizeof(*lie));
    uint64_t refused = 0;
    struct pc_event event;
    struct rig rig;
    int fd;

    CHECK(lie != NULL);
    need_libraries();
    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    for (uint32_t how = PC_COMPRESSION_LZ4; how <= PC_COMPRESSION_ZSTD; how++)
        for (int number = 0; make_lie(lie, &rig, how, number); number++) {
            CHECK(lie->frame.payload_bytes <= ROOM);
            fd = script_bulk(&rig, 0);
            (void)send_frame(fd, lie->frame, lie->payload, lie->frame.payload_bytes);
            if (!find_event(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 0, PATIENCE_MS, &event))
                FAIL("lie %d did not end the channel", number);
            if (event.error != EBADMSG || !strstr(event.text, lie->text))
                FAIL("lie %d gave error %d, %s", number, event.error, event.text);
            CHECK_EQ(pager_stats(&rig).frames_refused, ++refused);
            CHECK_EQ(pager_stats(&rig).resident_pages, 0);
            CHECK_EQ(resident_bytes(&rig), 0);
            close(fd);
        }
    /* A fault thread decompresses nothing, though the frame is in order. */
    honest(lie, &rig, PC_COMPRESSION_LZ4);
    fd = script_urgent(&rig, 0);
    (void)send_frame(fd, lie->frame, lie->payload, lie->frame.payload_bytes);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, &event);
    CHECK(strstr(event.text, "does not belong here"));
    CHECK_EQ(resident_bytes(&rig), 0);
    close(fd);
    /* And the honest frame is placed. */
    fd = script_bulk(&rig, 0);
    CHECK(send_frame(fd, lie->frame, lie->payload, lie->frame.payload_bytes));
    WAIT_UNTIL(pager_stats(&rig).resident_pages == PAGES);
    CHECK_EQ(*dest_page(&rig, 0, 1), (uint8_t)(rig.page_bytes % 41 ? 'x' : rig.page_bytes));
    close(fd);
    free(lie);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN_CASE(lz4);
    RUN_CASE(zstd);
    RUN_CASE(adaptive);
    RUN_CASE(adaptive_compresses_where_the_wire_is_slow);
    RUN_CASE(only_one_way_unless_adaptive);
    RUN_CASE(lies_are_never_seen);
    return test_end();
}
