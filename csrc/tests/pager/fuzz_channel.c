/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: a data channel at the destination, of a source that says anything. The first byte chooses the kind of channel and which
 * compression was accepted; then each RECORD_BYTES are a frame, whose checksums and sizes are made right unless the record says
 * otherwise, since no fuzzer guesses them. Each page of a frame is filled with one byte. Whatever comes: the channel ends with a line
 * of text, a page that was placed has the content that an undamaged frame had for it, and no other page was placed.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/codec.h"
#include "postcopy/engine.h"
#include "postcopy/uffd.h"

#define RECORD_BYTES 10u
#define RECORDS_MAX  24u
#define BLOCKS       2u
#define PAGES_MAX    9u
#define PAGE         4096u
#define HANG_S       60

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static const uint64_t block_pages[BLOCKS] = {PAGES_MAX, 3};
static char error[PC_ERROR_BYTES];

#define REQUIRE(condition)                                                                                              \
    do {                                                                                                                \
        if (!(condition)) {                                                                                             \
            (void)fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #condition, error);  \
            abort();                                                                                                    \
        }                                                                                                               \
    } while (0)

struct stream {
    uint8_t *data;
    size_t bytes;
    uint8_t allowed[BLOCKS][PAGES_MAX][32]; /* a bit for each byte that a page may be filled with */
};

/* how: 1, 2 payload: as it is, LZ4, Zstandard, or of another size than it says; 4: damaged header; 8: damaged payload; 16: cut off
 * within; 32: a page far away */
static bool add_frame(struct stream *stream, const uint8_t record[RECORD_BYTES])
{
    static struct pc_codec codec;
    static uint8_t content[(PAGES_MAX + 1) * PAGE], payload[sizeof(content)];
    const uint8_t how = record[0];
    struct pc_frame frame = {.type = record[1] % 7,
                             .flags = record[2] & 15,
                             .block = record[3] % 4,
                             .first_page = record[4] % 16,
                             .pages = record[5] % (PAGES_MAX + 2),
                             .request_id = (uint32_t)record[9] << 24 | record[9]};
    const uint32_t packing = how & 2 ? (how & 1 ? 0 : PC_COMPRESSION_ZSTD) : how & 1 ? PC_COMPRESSION_LZ4 : 0;
    size_t content_bytes = frame.type == PC_FRAME_PAGES ? (frame.pages <= PAGES_MAX ? frame.pages : PAGES_MAX) * (size_t)PAGE
                           : frame.type == PC_FRAME_ERROR ? record[7] : 0;
    size_t payload_bytes = content_bytes, cut;
    uint8_t *at = stream->data + stream->bytes;

    memset(content, record[6], content_bytes);
    memcpy(payload, content, content_bytes);
    if (how & 32)
        frame.first_page |= (uint64_t)record[8] << 56 | (uint64_t)record[7] << 32;
    if (packing && content_bytes && pc_compression_available(packing, NULL, 0)) {
        payload_bytes = pc_codec_compress(&codec, packing, content, content_bytes, payload, sizeof(payload));
        REQUIRE(payload_bytes);
        frame.flags = (uint8_t)((frame.flags & PC_FRAME_DEMAND) | (packing == PC_COMPRESSION_LZ4 ? PC_FRAME_LZ4 : PC_FRAME_ZSTD));
        frame.content_bytes = (uint32_t)content_bytes;
    }
    if ((how & 3) == 3) { /* sizes that do not fit, and bytes that were not made by a compressor */
        payload_bytes = payload_bytes + record[7] < sizeof(payload) ? payload_bytes + record[7] : payload_bytes;
        frame.content_bytes = (uint32_t)record[8] * 256;
    }
    frame.payload_bytes = (uint32_t)payload_bytes;
    frame.payload_crc = payload_bytes ? pc_crc32c(0, payload, payload_bytes) : 0;
    pc_frame_encode(&frame, at);
    memcpy(at + PC_FRAME_HEADER_BYTES, payload, payload_bytes);
    cut = PC_FRAME_HEADER_BYTES + payload_bytes;
    if (how & 4)
        at[record[8] % PC_FRAME_HEADER_BYTES] ^= (uint8_t)(1u << record[7] % 8);
    if (how & 8 && payload_bytes)
        at[PC_FRAME_HEADER_BYTES + record[8] * 64u % payload_bytes] ^= (uint8_t)(1u << record[7] % 8);
    if (how & 16)
        cut = record[8] * 64u % cut;
    stream->bytes += cut;
    if (how & 16)
        return false;
    if (!(how & 12) && (frame.type == PC_FRAME_PAGES || frame.type == PC_FRAME_ZERO) && frame.block < BLOCKS)
        for (uint64_t page = frame.first_page; page < frame.first_page + frame.pages && page < block_pages[frame.block]; page++) {
            uint8_t fill = frame.type == PC_FRAME_ZERO ? 0 : record[6];

            stream->allowed[frame.block][page][fill / 8] |= (uint8_t)(1u << fill % 8);
        }
    return true;
}

/* Until the channel has ended. */
static void wait_for_the_end(struct pc_pager *pager)
{
    struct pollfd readable = {.fd = pc_pager_event_fd(pager), .events = POLLIN};
    struct pc_event event;

    for (;;) {
        (void)poll(&readable, 1, -1);
        while (pc_pager_next_event(pager, &event) == 1) {
            REQUIRE(memchr(event.text, '\0', sizeof(event.text)));
            REQUIRE(event.type != PC_EVENT_CHANNEL_DOWN || event.text[0]);
            if (event.type == PC_EVENT_CHANNEL_DOWN)
                return;
        }
    }
}

static void check_pages(struct pc_pager *pager, const struct pc_memory *memory, uint32_t block, const struct stream *stream)
{
    uint8_t page[PAGE];
    uint64_t received[1] = {0};

    REQUIRE(pc_pager_received(pager, block, received) == 0);
    REQUIRE(!(received[0] >> block_pages[block]));
    for (uint64_t i = 0; i < block_pages[block]; i++) {
        if (!(received[0] >> i & 1))
            continue;
        REQUIRE(pread(memory->fd, page, PAGE, (off_t)(i * PAGE)) == PAGE);
        REQUIRE(stream->allowed[block][i][page[0] / 8] >> page[0] % 8 & 1);
        REQUIRE(!memcmp(page, page + 1, PAGE - 1));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct stream stream;
    static int usable = -1;
    struct pc_memory memory[BLOCKS];
    struct pc_pager *pager;
    int pair[2], shard;

    if (usable < 0) {
        struct pc_uffd_api api;

        usable = pc_uffd_probe(PC_UFFD_ANY, &api) == 0 && pc_page_bytes() == PAGE;
        if (!usable)
            (void)fprintf(stderr, "channels are not tried: this host has no userfaultfd, or no pages of %u bytes\n", PAGE);
        stream.data = malloc(RECORDS_MAX * (PC_FRAME_HEADER_BYTES + (PAGES_MAX + 1) * PAGE));
        REQUIRE(stream.data);
    }
    if (!usable || !bytes)
        return 0;
    stream.bytes = 0;
    memset(stream.allowed, 0, sizeof(stream.allowed));
    for (size_t at = 1, count = 0; at + RECORD_BYTES <= bytes && count < RECORDS_MAX; at += RECORD_BYTES, count++)
        if (!add_frame(&stream, data + at))
            break;

    alarm(HANG_S);
    REQUIRE(pc_pager_new(-1, &pager) == 0);
    if (data[0] & 2)
        (void)pc_pager_accept_compression(pager, data[0] >> 2 & 3);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        REQUIRE(pc_memory_create(PC_MEMORY_MEMFD, block_pages[i] * PAGE, &memory[i], error, sizeof(error)) == 0);
        REQUIRE(pc_pager_add_block(pager, &memory[i], -1) == (int)i);
    }
    shard = pc_pager_add_shard(pager, PC_UFFD_ANY, 0, error, sizeof(error));
    REQUIRE(shard >= 0);
    for (uint32_t i = 0; i < BLOCKS; i++)
        REQUIRE(pc_pager_arm(pager, (uint32_t)shard, i, 0, block_pages[i], error, sizeof(error)) == 0);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    REQUIRE((data[0] & 1 ? pc_pager_attach_urgent(pager, (uint32_t)shard, pair[1], NULL) : pc_pager_attach_bulk(pager, 0, pair[1], NULL)) == 0);
    for (size_t sent = 0; sent < stream.bytes;) {
        ssize_t count = send(pair[0], stream.data + sent, stream.bytes - sent, MSG_NOSIGNAL);

        if (count < 0)
            break; /* the pager has had enough */
        sent += (size_t)count;
    }
    (void)shutdown(pair[0], SHUT_WR);
    wait_for_the_end(pager);
    REQUIRE(pc_pager_disconnect(pager) == 0);
    for (uint32_t i = 0; i < BLOCKS; i++)
        check_pages(pager, &memory[i], i, &stream);
    REQUIRE(pc_pager_leave(pager) == 0);
    close(pair[0]);
    for (uint32_t i = 0; i < BLOCKS; i++)
        pc_memory_destroy(&memory[i]);
    alarm(0);
    return 0;
}
