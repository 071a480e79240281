/* SPDX-License-Identifier: Apache-2.0
 *
 * The header in front of everything on a data channel. Decoding is the border between the network and the engine: what
 * passes here may be used without looking again, except that only the receiver knows how many blocks and pages there are and how
 * large a page is.
 */
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>

#include "core/util.h"
#include "postcopy/core.h"

#define PC_FRAME_COMPRESSED (PC_FRAME_LZ4 | PC_FRAME_ZSTD)

struct wire { /* little endian */
    uint32_t magic;
    uint8_t type, flags;
    uint16_t block;
    uint64_t first_page;
    uint32_t pages, request_id, payload_bytes, payload_crc, content_bytes, header_crc;
};
_Static_assert(sizeof(struct wire) == PC_FRAME_HEADER_BYTES, "no padding");

static uint32_t header_crc(const struct wire *wire)
{
    return pc_crc32c(0, wire, offsetof(struct wire, header_crc));
}

void pc_frame_encode(const struct pc_frame *frame, uint8_t *header)
{
    struct wire wire = {
        .magic = htole32(PC_FRAME_MAGIC),
        .type = frame->type,
        .flags = frame->flags,
        .block = htole16(frame->block),
        .first_page = htole64(frame->first_page),
        .pages = htole32(frame->pages),
        .request_id = htole32(frame->request_id),
        .payload_bytes = htole32(frame->payload_bytes),
        .payload_crc = htole32(frame->payload_crc),
        .content_bytes = htole32(frame->content_bytes),
    };

    wire.header_crc = htole32(header_crc(&wire));
    memcpy(header, &wire, sizeof(wire));
}

int pc_frame_decode(const uint8_t *header, struct pc_frame *frame, char *error, size_t error_bytes)
{
    struct wire wire;
    struct pc_frame got;
    uint8_t compressed;

    memcpy(&wire, header, sizeof(wire));

#define REFUSE(...) return pc_fail(EBADMSG, error, error_bytes, __VA_ARGS__)
    /* The magic first, though the checksum covers it: "not a frame" and "a damaged frame" have different causes. */
    if (le32toh(wire.magic) != PC_FRAME_MAGIC)
        REFUSE("frame: bad magic 0x%08" PRIx32 ", this is not a frame", le32toh(wire.magic));
    if (le32toh(wire.header_crc) != header_crc(&wire))
        REFUSE("frame: header checksum is 0x%08" PRIx32 ", should be 0x%08" PRIx32, le32toh(wire.header_crc), header_crc(&wire));
    got = (struct pc_frame){
        .type = wire.type,
        .flags = wire.flags,
        .block = le16toh(wire.block),
        .pages = le32toh(wire.pages),
        .first_page = le64toh(wire.first_page),
        .request_id = le32toh(wire.request_id),
        .payload_bytes = le32toh(wire.payload_bytes),
        .payload_crc = le32toh(wire.payload_crc),
        .content_bytes = le32toh(wire.content_bytes),
    };
    compressed = got.flags & PC_FRAME_COMPRESSED;
    if (got.type < PC_FRAME_REQUEST || got.type > PC_FRAME_ERROR)
        REFUSE("frame: unknown type %u", got.type);
    if (got.flags & ~(PC_FRAME_DEMAND | PC_FRAME_COMPRESSED))
        REFUSE("frame: unknown flags 0x%02x", got.flags);
    if ((got.flags & PC_FRAME_DEMAND) && (got.type == PC_FRAME_REQUEST || got.type == PC_FRAME_END))
        REFUSE("frame: type %u cannot answer a request", got.type);
    if (compressed && (compressed == PC_FRAME_COMPRESSED || got.type != PC_FRAME_PAGES || got.flags & PC_FRAME_DEMAND))
        REFUSE("frame: type %u with flags 0x%02x cannot be compressed", got.type, got.flags);
    if (!compressed != !got.content_bytes || got.content_bytes > PC_FRAME_MAX_PAYLOAD_BYTES ||
        (compressed && got.payload_bytes >= got.content_bytes))
        REFUSE("frame: %" PRIu32 " bytes of content in a payload of %" PRIu32, got.content_bytes, got.payload_bytes);
    if (got.type == PC_FRAME_END) {
        if (got.pages)
            REFUSE("frame: end with %" PRIu32 " pages", got.pages);
    } else {
        if (!got.pages)
            REFUSE("frame: type %u without pages", got.type);
        if (got.first_page + got.pages < got.first_page)
            REFUSE("frame: %" PRIu32 " pages from page %" PRIu64 " on are past every block", got.pages, got.first_page);
    }
    if (got.payload_bytes > PC_FRAME_MAX_PAYLOAD_BYTES)
        REFUSE("frame: payload of %" PRIu32 " bytes is too long", got.payload_bytes);
    if (got.type == PC_FRAME_PAGES) {
        uint32_t content_bytes = compressed ? got.content_bytes : got.payload_bytes;

        if (!got.payload_bytes || content_bytes % got.pages)
            REFUSE("frame: %" PRIu32 " pages in %" PRIu32 " bytes", got.pages, content_bytes);
    } else if (got.type != PC_FRAME_ERROR && got.payload_bytes) {
        REFUSE("frame: type %u with a payload of %" PRIu32 " bytes", got.type, got.payload_bytes);
    }
    if (!got.payload_bytes && got.payload_crc)
        REFUSE("frame: a payload checksum without payload");
#undef REFUSE
    *frame = got;
    return 0;
}
