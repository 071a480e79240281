/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: frame headers. The input is the 36 bytes before the checksum, which is set right here, since no fuzzer guesses it; a
 * byte behind them, if there is one, damages it. What is accepted must keep its promises and encode to the same bytes again.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "postcopy/core.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(int condition)
{
    if (!condition)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    uint8_t *header, again[PC_FRAME_HEADER_BYTES];
    uint32_t crc;
    char error[48]; /* shorter than some reasons */
    struct pc_frame frame;
    int result;

    if (bytes < PC_FRAME_HEADER_BYTES - 4)
        return 0;
    header = malloc(PC_FRAME_HEADER_BYTES); /* to the byte, for AddressSanitizer */
    require(header != NULL);
    memcpy(header, data, PC_FRAME_HEADER_BYTES - 4);
    crc = htole32(pc_crc32c(0, header, 36) ^ (bytes > 36 ? data[36] : 0));
    memcpy(header + 36, &crc, sizeof(crc));
    memset(error, 'x', sizeof(error));
    error[0] = '\0';
    result = pc_frame_decode(header, &frame, error, sizeof(error));
    if (result) {
        require(result == -EBADMSG && error[0] && memchr(error, '\0', sizeof(error)));
    } else {
        require(frame.type >= PC_FRAME_REQUEST && frame.type <= PC_FRAME_ERROR);
        const int compressed = frame.flags & (PC_FRAME_LZ4 | PC_FRAME_ZSTD);

        require(!(frame.flags & ~(PC_FRAME_DEMAND | PC_FRAME_LZ4 | PC_FRAME_ZSTD)));
        require(!compressed == !frame.content_bytes && frame.content_bytes <= PC_FRAME_MAX_PAYLOAD_BYTES);
        require(!compressed || (frame.type == PC_FRAME_PAGES && frame.payload_bytes < frame.content_bytes));
        require(!frame.pages == (frame.type == PC_FRAME_END));
        require(frame.payload_bytes <= PC_FRAME_MAX_PAYLOAD_BYTES);
        require(frame.first_page + frame.pages >= frame.first_page || frame.type == PC_FRAME_END);
        if (frame.type == PC_FRAME_PAGES)
            require(frame.payload_bytes && (compressed ? frame.content_bytes : frame.payload_bytes) % frame.pages == 0);
        pc_frame_encode(&frame, again);
        require(!memcmp(again, header, sizeof(again)));
    }
    free(header);
    return 0;
}
