/* SPDX-License-Identifier: Apache-2.0
 *
 * The header in front of everything on a data channel. Decoding is the border between the network and the engine: what
 * passes here may be used without looking again, except that only the receiver knows how many blocks and pages there are and how
 * large a page is.
 */
#include <errno.h>
#include <inttypes.h>

#include "core/util.h"
#include "postcopy/core.h"

enum {
    AT_MAGIC = 0,
    AT_TYPE = 4,
    AT_FLAGS = 5,
    AT_BLOCK = 6,
    AT_FIRST_PAGE = 8,
    AT_PAGES = 16,
    AT_REQUEST_ID = 20,
    AT_PAYLOAD_BYTES = 24,
    AT_PAYLOAD_CRC = 28,
    AT_RESERVED = 32,
    AT_HEADER_CRC = 36
};
_Static_assert(AT_HEADER_CRC + 4 == PC_FRAME_HEADER_BYTES, "frame header");

void pc_frame_encode(const struct pc_frame *frame, uint8_t *header)
{
    pc_put_le32(header + AT_MAGIC, PC_FRAME_MAGIC);
    header[AT_TYPE] = frame->type;
    header[AT_FLAGS] = frame->flags;
    pc_put_le16(header + AT_BLOCK, frame->block);
    pc_put_le64(header + AT_FIRST_PAGE, frame->first_page);
    pc_put_le32(header + AT_PAGES, frame->pages);
    pc_put_le32(header + AT_REQUEST_ID, frame->request_id);
    pc_put_le32(header + AT_PAYLOAD_BYTES, frame->payload_bytes);
    pc_put_le32(header + AT_PAYLOAD_CRC, frame->payload_crc);
    pc_put_le32(header + AT_RESERVED, 0);
    pc_put_le32(header + AT_HEADER_CRC, pc_crc32c(0, header, AT_HEADER_CRC));
}

int pc_frame_decode(const uint8_t *header, struct pc_frame *frame, char *error, size_t error_bytes)
{
    uint32_t magic = pc_get_le32(header + AT_MAGIC);
    uint32_t header_crc = pc_get_le32(header + AT_HEADER_CRC);
    uint32_t computed_crc;
    struct pc_frame got;

#define REFUSE(...) return pc_fail(EBADMSG, error, error_bytes, __VA_ARGS__)
    /* The magic first, though the checksum covers it: "not a frame" and "a damaged frame" have different causes. */
    if (magic != PC_FRAME_MAGIC)
        REFUSE("frame: bad magic 0x%08" PRIx32 ", this is not a frame", magic);
    computed_crc = pc_crc32c(0, header, AT_HEADER_CRC);
    if (header_crc != computed_crc)
        REFUSE("frame: header checksum is 0x%08" PRIx32 ", should be 0x%08" PRIx32, header_crc, computed_crc);
    got = (struct pc_frame){
        .type = header[AT_TYPE],
        .flags = header[AT_FLAGS],
        .block = pc_get_le16(header + AT_BLOCK),
        .pages = pc_get_le32(header + AT_PAGES),
        .first_page = pc_get_le64(header + AT_FIRST_PAGE),
        .request_id = pc_get_le32(header + AT_REQUEST_ID),
        .payload_bytes = pc_get_le32(header + AT_PAYLOAD_BYTES),
        .payload_crc = pc_get_le32(header + AT_PAYLOAD_CRC),
    };
    if (got.type < PC_FRAME_REQUEST || got.type > PC_FRAME_ERROR)
        REFUSE("frame: unknown type %u", got.type);
    if (got.flags & ~PC_FRAME_DEMAND)
        REFUSE("frame: unknown flags 0x%02x", got.flags);
    if ((got.flags & PC_FRAME_DEMAND) && (got.type == PC_FRAME_REQUEST || got.type == PC_FRAME_END))
        REFUSE("frame: type %u cannot answer a request", got.type);
    if (pc_get_le32(header + AT_RESERVED))
        REFUSE("frame: reserved field is not zero");
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
        if (!got.payload_bytes || got.payload_bytes % got.pages)
            REFUSE("frame: %" PRIu32 " pages in %" PRIu32 " bytes", got.pages, got.payload_bytes);
    } else if (got.type != PC_FRAME_ERROR && got.payload_bytes) {
        REFUSE("frame: type %u with a payload of %" PRIu32 " bytes", got.type, got.payload_bytes);
    }
    if (!got.payload_bytes && got.payload_crc)
        REFUSE("frame: a payload checksum without payload");
#undef REFUSE
    *frame = got;
    return 0;
}
