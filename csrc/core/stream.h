/* SPDX-License-Identifier: Apache-2.0
 *
 * The stream under a data channel: a bare TCP socket, or something between it and the frames (TLS), without the pager or the page
 * server knowing.
 *
 * `fd` is for poll(2) only. A stream is used by one thread at a time; what any thread may call says so.
 */
#ifndef PC_STREAM_H
#define PC_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

struct pc_stream;

/* What is between the frames and the socket. */
struct pc_stream_layer {
    bool (*pending)(const struct pc_stream *stream);
    const char *(*why)(const struct pc_stream *stream);
    void (*interrupt)(struct pc_stream *stream);
    void (*end)(struct pc_stream *stream);
    void (*free)(struct pc_stream *stream);
};

struct pc_stream {
    int fd;
    /* Bytes read (at least 1), 0 at the orderly end, or -errno; -EAGAIN only when `wait` is false. */
    ssize_t (*read)(struct pc_stream *stream, void *buffer, size_t bytes, bool wait);
    /* Bytes written (at least 1), or -errno; -EAGAIN only when `wait` is false: then the same bytes are given again, and more may
     * follow them. */
    ssize_t (*write)(struct pc_stream *stream, const struct iovec *parts, int count, bool wait);
    const struct pc_stream_layer *layer; /* NULL: nothing */
    void *state;                         /* of the layer */
};

/* Takes a connected stream socket; does not own it until it has returned 0. `urgent` sets what keeps a small message
 * from waiting: no Nagle, and the interactive band of the host's queueing discipline; otherwise little unsent data is
 * kept in the socket. */
int pc_stream_tcp(struct pc_stream *stream, int fd, bool urgent);
/* How much of what was written has not been sent yet, as far as the kernel says. */
uint64_t pc_stream_unsent(const struct pc_stream *stream);
/* Whether a read may have bytes although the socket is not readable. */
bool pc_stream_pending(const struct pc_stream *stream);
/* What the last failure of a read or write means to a person, or `otherwise`, where the layer knows nothing better. */
const char *pc_stream_why(const struct pc_stream *stream, const char *otherwise);
void pc_stream_shutdown(struct pc_stream *stream); /* any thread: a blocked read or write returns at once */
void pc_stream_end(struct pc_stream *stream);      /* nothing follows, and the peer learns it now */
void pc_stream_close(struct pc_stream *stream);

/* Reads exactly `bytes`: 0, -ENODATA when the stream ended before the first byte, -EPIPE when it ended inside, -errno. */
int pc_stream_read_all(struct pc_stream *stream, void *buffer, size_t bytes);
#define PC_STREAM_CUT_TEXT "the connection ended inside a frame" /* what -EPIPE of a read means to a person */
/* Writes everything; `parts` is used up. 0 or -errno. */
int pc_stream_write_all(struct pc_stream *stream, struct iovec *parts, int count);

#endif
