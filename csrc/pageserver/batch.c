/* SPDX-License-Identifier: Apache-2.0
 *
 * Frames on their way out of the page server, and the content of pages.
 */
#include <errno.h>

#include "pageserver/server.h"

void pc_batch_add(struct batch *batch, struct pc_frame frame, const void *payload, uint64_t bytes)
{
    uint8_t *header = batch->headers[batch->frame_count++];

    frame.payload_bytes = (uint32_t)bytes;
    frame.payload_crc = bytes && !batch->authenticated ? pc_crc32c(0, payload, bytes) : 0;
    pc_frame_encode(&frame, header);
    batch->parts[batch->part_count++] = (struct iovec){.iov_base = header, .iov_len = PC_FRAME_HEADER_BYTES};
    if (bytes)
        batch->parts[batch->part_count++] = (struct iovec){.iov_base = (void *)(uintptr_t)payload, .iov_len = bytes};
    batch->bytes += PC_FRAME_HEADER_BYTES + bytes;
}

int pc_batch_send(struct batch *batch, struct channel *channel)
{
    int error = pc_stream_write_all(&channel->stream, batch->parts, batch->part_count);

    unpin_all(channel); /* the kernel has copied what it took */
    if (!error)
        ADD(channel->server, bytes_sent, batch->bytes);
    batch->frame_count = batch->part_count = 0;
    batch->bytes = 0;
    batch->staged = 0;
    return error;
}

const uint8_t *pc_page_content(struct channel *channel, struct batch *batch, const struct source_block *block,
                                   uint64_t page, uint64_t pages, int *error, char *text, size_t text_bytes)
{
    uint64_t offset = page * block->page_bytes, bytes = pages * block->page_bytes, file_bytes;
    uint8_t *staging;

    *error = 0;
    if (block->memory.base)
        return (const uint8_t *)block->memory.base + offset;
    if (batch->staged + bytes > channel->staging_bytes) {
        *error = pc_fail(ENOBUFS, text, text_bytes, "pages of %llu bytes are too large to stage", (unsigned long long)bytes);
        return NULL;
    }
    staging = channel->staging + batch->staged;
    batch->staged += bytes;
    if (block->memory.remote) {
        *error = pc_remote_read(block->memory.remote, offset, staging, bytes);
        if (*error)
            (void)pc_fail(-*error, text, text_bytes, "the memory of the machine's process cannot be read: %s",
                          *error == -ESRCH ? "it has ended" : strerror(-*error));
        return *error ? NULL : staging;
    }
    /* The last page of a file may be a part of one: the rest of it is zeros. */
    file_bytes = offset < block->memory.size_bytes ? block->memory.size_bytes - offset : 0;
    if (file_bytes > bytes)
        file_bytes = bytes;
    memset(staging + file_bytes, 0, bytes - file_bytes);
    *error = pc_pread_all(block->memory.fd, staging, file_bytes, offset);
    if (*error == -ENODATA)
        *error = pc_fail(EIO, text, text_bytes, "the file of the memory has become shorter than %llu bytes",
                         (unsigned long long)block->memory.size_bytes);
    else if (*error)
        (void)pc_fail(EIO, text, text_bytes, "the file of the memory cannot be read: %s", strerror(-*error));
    return *error ? NULL : staging;
}
