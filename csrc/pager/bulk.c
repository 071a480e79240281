/* SPDX-License-Identifier: Apache-2.0
 *
 * The bulk receivers: what the source pushes in the background, received and placed by a thread for each channel.
 *
 * Owns the bulk channels, their buffers and threads. A bulk thread runs with lower priority and shares nothing with the fault
 * threads but the maps, and the gate where a shard has one. A thread ends with its channel; it is joined by the next attach, or by
 * pc_pager_disconnect.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "pager/pager.h"

/* All of a frame; what the kernel refuses for the moment as often as it takes. */
static int handle_whole_frame(struct bulk *bulk, const struct pc_frame *frame, const uint8_t *payload, struct progress *progress)
{
    uint64_t wait_ns = RETRY_NS;

    for (progress->done = 0;;) {
        uint64_t before = progress->done;
        int error;

        progress->work_ns = UINT64_MAX;
        error = pc_handle_frame(bulk->pager, &bulk->channel, frame, payload, progress);
        if (error != -EAGAIN)
            return error;
        if (__atomic_load_n(&bulk->ending, __ATOMIC_SEQ_CST))
            return -ECANCELED;
        wait_ns = progress->done > before ? RETRY_NS : wait_ns < RETRY_MAX_NS ? wait_ns * 2 : RETRY_MAX_NS;
        pc_sleep_ns(wait_ns);
    }
}

/* Its sizes fit together and into the block (pc_decode_header). */
static int handle_compressed(struct bulk *bulk, struct pc_frame *frame, struct progress *progress)
{
    uint32_t how = frame->flags & PC_FRAME_LZ4 ? PC_COMPRESSION_LZ4 : PC_COMPRESSION_ZSTD;
    int error;

    if (!(__atomic_load_n(&bulk->pager->accepted_compression, __ATOMIC_SEQ_CST) & how))
        return pc_fail(EBADMSG, progress->text, sizeof(progress->text), "a frame is compressed in a way that was not accepted (%s)",
                       how == PC_COMPRESSION_LZ4 ? "lz4" : "zstd");
    if (!bulk->content)
        bulk->content = pc_buffer_new(PC_FRAME_MAX_PAYLOAD_BYTES);
    if (!bulk->content)
        return -ENOMEM;
    error = pc_codec_decompress(&bulk->codec, how, bulk->buffer, frame->payload_bytes, bulk->content, frame->content_bytes);
    if (error == -EBADMSG)
        return pc_fail(EBADMSG, progress->text, sizeof(progress->text), "%u bytes of a frame do not decompress to its %u pages",
                       frame->payload_bytes, frame->pages);
    if (error)
        return error;
    frame->payload_bytes = frame->content_bytes;
    frame->content_bytes = 0;
    return handle_whole_frame(bulk, frame, bulk->content, progress);
}

/* One frame from the wire to the memory. 0, or why the channel ends: -ENODATA at its orderly end. */
static int receive_frame(struct bulk *bulk, struct progress *progress)
{
    uint8_t header[PC_FRAME_HEADER_BYTES];
    struct pc_frame frame;
    int error = pc_stream_read_all(&bulk->stream, header, sizeof(header));

    if (!error)
        error = pc_decode_header(bulk->pager, header, &frame, progress);
    if (!error && frame.payload_bytes) {
        error = pc_stream_read_all(&bulk->stream, bulk->buffer, frame.payload_bytes);
        if (error == -ENODATA) /* an end between header and payload is no orderly one either */
            error = -EPIPE;
    }
    if (error == -EPIPE)
        (void)pc_fail(EPIPE, progress->text, sizeof(progress->text), "%s", pc_stream_why(&bulk->stream, PC_STREAM_CUT_TEXT));
    if (error)
        return error;
    COUNT(bulk->pager, bytes_received, sizeof(header) + frame.payload_bytes);
    error = pc_check_payload(&frame, bulk->buffer, progress);
    if (!error && frame.content_bytes)
        return handle_compressed(bulk, &frame, progress);
    return error ? error : handle_whole_frame(bulk, &frame, bulk->buffer, progress);
}

static void *bulk_thread(void *argument)
{
    struct bulk *bulk = argument;
    struct pc_pager *pager = bulk->pager;
    struct progress progress = {0};
    struct pc_background background = {0};
    int error;

    pc_thread_name("pc-bulk-in", bulk->channel.index);
    pc_thread_background();
    do {
        error = receive_frame(bulk, &progress);
        pc_background_pause(&background, __atomic_load_n(&pager->metrics.map->count.faults, __ATOMIC_RELAXED));
    } while (!error);
    if (error == -EBADMSG)
        COUNT(pager, frames_refused, 1);
    pc_stream_end(&bulk->stream); /* the peer learns at once; the descriptor stays until the thread is joined */
    /* Before the event: its reader may attach the next connection at once, and must not be refused because this one is busy. */
    __atomic_store_n(&bulk->running, false, __ATOMIC_SEQ_CST);
    pc_events_push(&pager->events, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, (int)bulk->channel.index,
                   error == -ENODATA ? 0 : -error, "%s",
                   error == -ENODATA  ? "the source closed the connection"
                   : progress.text[0] ? progress.text
                                      : pc_stream_why(&bulk->stream, strerror(-error)));
    return NULL;
}

/* Joins a bulk thread that has ended or been shut down, and frees what it had. */
void pc_bulk_reap(struct bulk *bulk)
{
    if (bulk->started)
        pthread_join(bulk->thread, NULL);
    bulk->started = bulk->channel.error_reported = false;
    bulk->channel.ended = 0;
    pc_stream_close(&bulk->stream);
    pc_buffer_free(bulk->buffer, PC_FRAME_MAX_PAYLOAD_BYTES);
    pc_buffer_free(bulk->content, PC_FRAME_MAX_PAYLOAD_BYTES);
    bulk->buffer = bulk->content = NULL;
    pc_codec_free(&bulk->codec);
}

int pc_pager_attach_bulk(struct pc_pager *pager, uint32_t channel, int fd, struct pc_tls *tls)
{
    struct pc_stream stream;
    struct bulk *bulk;
    int error = pc_stream_open(&stream, fd, tls, false);

    if (error)
        return error;
    if (channel >= PC_MAX_BULK_CHANNELS) {
        pc_stream_close(&stream);
        return -EINVAL;
    }
    bulk = &pager->bulks[channel];
    pthread_mutex_lock(&pager->channel_lock);
    if (pager->disconnecting || __atomic_load_n(&bulk->running, __ATOMIC_SEQ_CST)) {
        error = -EBUSY;
        pc_stream_close(&stream);
    } else {
        pc_bulk_reap(bulk);
        bulk->buffer = pc_buffer_new(PC_FRAME_MAX_PAYLOAD_BYTES);
        bulk->stream = stream;
        __atomic_store_n(&bulk->ending, false, __ATOMIC_SEQ_CST);
        __atomic_store_n(&bulk->running, true, __ATOMIC_SEQ_CST);
        error = bulk->buffer ? pc_thread_start(&bulk->thread, bulk_thread, bulk) : -ENOMEM;
        bulk->started = !error;
        if (error) {
            __atomic_store_n(&bulk->running, false, __ATOMIC_SEQ_CST);
            pc_bulk_reap(bulk);
        }
    }
    pthread_mutex_unlock(&pager->channel_lock);
    return error;
}
