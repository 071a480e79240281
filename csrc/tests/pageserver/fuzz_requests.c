/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: an urgent channel at the source, of a destination that asks for anything. Each RECORD_BYTES of the input are a frame,
 * whose checksum is made right unless the record says otherwise. Each answer is to the next page that was asked for, in the order of
 * the requests up to the first that makes no sense: its content is the page's, and that of a page that was given back is never sent.
 */
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "postcopy/engine.h"

#define RECORD_BYTES 8u
#define RECORDS_MAX  64u
#define BLOCKS       2u
#define PAGES_MAX    9u
#define RELEASED     4u /* of block 0 */
#define HANG_S       60

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static const uint64_t block_pages[BLOCKS] = {PAGES_MAX, 3};
static struct pc_memory memory[BLOCKS];
static struct pc_pageserver *server;
static char error[PC_ERROR_BYTES];

#define REQUIRE(condition)                                                                                              \
    do {                                                                                                                \
        if (!(condition)) {                                                                                             \
            (void)fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #condition, error);  \
            abort();                                                                                                    \
        }                                                                                                               \
    } while (0)

/* What a page is filled with: page 1 of each block is zero. */
static uint8_t fill_of(uint32_t block, uint64_t page)
{
    return page == 1 ? 0 : (uint8_t)(16 * (block + 1) + page);
}

static void open_server(void)
{
    const uint64_t released = UINT64_C(1) << RELEASED;

    REQUIRE(pc_pageserver_new(0, &server) == 0);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        REQUIRE(pc_memory_create(PC_MEMORY_ANON, block_pages[i] * pc_page_bytes(), &memory[i], error, sizeof(error)) == 0);
        for (uint64_t page = 0; page < block_pages[i]; page++)
            memset((uint8_t *)memory[i].base + page * pc_page_bytes(), fill_of(i, page), pc_page_bytes());
        REQUIRE(pc_pageserver_add_block(server, &memory[i], pc_page_bytes()) == (int)i);
    }
    REQUIRE(pc_pageserver_serve(server) == 0);
    REQUIRE(pc_pageserver_release(server, 0, 0, PAGES_MAX, &released) == 0);
}

struct asked {
    uint32_t block, id;
    uint64_t page;
};

/* Whether what follows is still understood. */
static bool add_request(const uint8_t record[RECORD_BYTES], uint8_t *out, size_t *bytes, struct asked *asked, size_t *count)
{
    const uint8_t how = record[0];
    struct pc_frame frame = {.type = how & 1 ? record[7] % 7 : PC_FRAME_REQUEST,
                             .flags = how & 2 ? record[7] : 0,
                             .block = record[1] % 4,
                             .first_page = record[2] % 16,
                             .pages = record[3] % (PAGES_MAX + 3),
                             .request_id = (uint32_t)record[4] << 24 | record[5]};
    bool fits;

    if (how & 4)
        frame.first_page |= (uint64_t)record[6] << 56;
    if (how & 8)
        frame.pages |= (uint32_t)record[6] << 24;
    pc_frame_encode(&frame, out + *bytes);
    fits = pc_frame_decode(out + *bytes, &frame, error, sizeof(error)) == 0 && frame.type == PC_FRAME_REQUEST && frame.block < BLOCKS &&
           frame.first_page < block_pages[frame.block] && frame.pages <= block_pages[frame.block] - frame.first_page;
    if (how & 16) {
        out[*bytes + record[7] % PC_FRAME_HEADER_BYTES] ^= (uint8_t)(1u << record[6] % 8);
        fits = false;
    }
    if (how & 32) {
        *bytes += record[7] % PC_FRAME_HEADER_BYTES;
        return false;
    }
    *bytes += PC_FRAME_HEADER_BYTES;
    for (uint64_t page = frame.first_page; fits && page < frame.first_page + frame.pages; page++)
        asked[(*count)++] = (struct asked){.block = frame.block, .id = frame.request_id, .page = page};
    return fits;
}

static bool receive(int fd, void *data, size_t bytes)
{
    ssize_t got = bytes ? recv(fd, data, bytes, MSG_WAITALL) : 0;

    REQUIRE(got == (ssize_t)bytes || got == 0 || (got < 0 && errno == ECONNRESET)); /* a cut is between two answers */
    return got == (ssize_t)bytes;
}

static void check_answers(int fd, const struct asked *asked, size_t count)
{
    static uint8_t payload[PC_FRAME_MAX_PAYLOAD_BYTES];
    uint8_t header[PC_FRAME_HEADER_BYTES];
    struct pc_frame frame;

    for (size_t i = 0; receive(fd, header, sizeof(header)); i++) {
        REQUIRE(i < count);
        REQUIRE(pc_frame_decode(header, &frame, error, sizeof(error)) == 0);
        REQUIRE(receive(fd, payload, frame.payload_bytes) || !frame.payload_bytes);
        REQUIRE(frame.flags == PC_FRAME_DEMAND && frame.pages == 1 && frame.request_id == asked[i].id);
        REQUIRE(frame.block == asked[i].block && frame.first_page == asked[i].page);
        if (frame.block == 0 && frame.first_page == RELEASED) {
            REQUIRE(frame.type == PC_FRAME_ERROR);
            continue;
        }
        REQUIRE(frame.type == (fill_of(frame.block, frame.first_page) ? PC_FRAME_PAGES : PC_FRAME_ZERO));
        for (size_t byte = 0; byte < frame.payload_bytes; byte++)
            REQUIRE(payload[byte] == fill_of(frame.block, frame.first_page));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct asked asked[RECORDS_MAX * PAGES_MAX];
    static uint8_t requests[RECORDS_MAX * PC_FRAME_HEADER_BYTES];
    size_t request_bytes = 0, count = 0, records = 0;
    struct pollfd readable;
    struct pc_event event = {0};
    bool understood = true;
    int pair[2];

    if (!server)
        open_server();
    for (size_t at = 0; at + RECORD_BYTES <= bytes && records < RECORDS_MAX && understood; at += RECORD_BYTES, records++)
        understood = add_request(data + at, requests, &request_bytes, asked, &count);
    alarm(HANG_S);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    REQUIRE(pc_pageserver_attach_urgent(server, 0, pair[1], NULL, 0) == 0);
    (void)send(pair[0], requests, request_bytes, MSG_NOSIGNAL); /* which fit into the socket */
    (void)shutdown(pair[0], SHUT_WR);
    check_answers(pair[0], asked, count);
    close(pair[0]);
    readable = (struct pollfd){.fd = pc_pageserver_event_fd(server), .events = POLLIN};
    while (event.type != PC_EVENT_CHANNEL_DOWN) {
        (void)poll(&readable, 1, -1);
        while (event.type != PC_EVENT_CHANNEL_DOWN && pc_pageserver_next_event(server, &event) == 1)
            REQUIRE(event.type == PC_EVENT_CHANNEL_DOWN && event.text[0] && memchr(event.text, '\0', sizeof(event.text)));
    }
    alarm(0);
    return 0;
}
