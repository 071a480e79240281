/* SPDX-License-Identifier: Apache-2.0
 *
 * A connection as the stream of a data channel; and joined to a plain socket by a thread, for a data channel in another process.
 */
#include "tls/stream.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/runtime.h"
#include "tls/connection.h"

#define RELAY_BYTES (128 * 1024)

/* ---- the stream ---- */

static ssize_t stream_read(struct pc_stream *stream, void *buffer, size_t bytes, bool wait)
{
    return pc_tls_receive(stream->state, buffer, bytes, wait);
}

static ssize_t stream_write(struct pc_stream *stream, const struct iovec *parts, int count, bool wait)
{
    return pc_tls_send(stream->state, parts, count, wait);
}

static bool stream_pending(const struct pc_stream *stream)
{
    return pc_tls_pending(stream->state);
}

static const char *stream_why(const struct pc_stream *stream)
{
    return pc_tls_why(stream->state);
}

static void stream_interrupt(struct pc_stream *stream)
{
    pc_tls_interrupt(stream->state);
}

static void stream_end(struct pc_stream *stream)
{
    (void)pc_tls_close_notify(stream->state);
}

static void stream_free(struct pc_stream *stream)
{
    pc_tls_free(stream->state);
}

static const struct pc_stream_layer layer = {
    .pending = stream_pending, .why = stream_why, .interrupt = stream_interrupt, .end = stream_end, .free = stream_free};

int pc_stream_open(struct pc_stream *stream, int fd, struct pc_tls *tls, bool urgent)
{
    int error = pc_stream_tcp(stream, fd, urgent);

    if (!error && tls && !tls->established)
        error = -ENOTCONN;
    if (error) {
        if (tls)
            pc_tls_free(tls);
        close(fd);
        stream->fd = -1;
        return error;
    }
    if (tls) {
        tls->fd = fd; /* it may be a duplicate of that of the handshake */
        stream->read = stream_read;
        stream->write = stream_write;
        stream->layer = &layer;
        stream->state = tls;
    }
    return 0;
}

/* ---- the relay ---- */

struct way { /* bytes that one side has given and the other has not taken */
    uint8_t *bytes;
    size_t start, end;
    bool ended; /* nothing more comes */
};

struct relay {
    struct pc_stream stream;
    int plain;
    bool urgent;
    struct way in, out; /* from the peer, to the peer */
};

/* 0, or -errno: the relay ends. */
static int carry_in(struct relay *relay)
{
    struct way *in = &relay->in;
    ssize_t count;

    if (in->start == in->end && !in->ended) {
        in->start = in->end = 0;
        count = relay->stream.read(&relay->stream, in->bytes, RELAY_BYTES, false);
        if (count < 0)
            return count == -EAGAIN ? 0 : (int)count;
        in->end = (size_t)count;
        in->ended = !count;
        if (!count)
            (void)shutdown(relay->plain, SHUT_WR);
    }
    while (in->start < in->end) {
        count = send(relay->plain, in->bytes + in->start, in->end - in->start, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (count < 0)
            return errno == EAGAIN ? 0 : -errno;
        in->start += (size_t)count;
    }
    return 0;
}

static int carry_out(struct relay *relay)
{
    struct way *out = &relay->out;
    struct iovec part;
    ssize_t count;

    if (out->start == out->end && !out->ended) {
        out->start = out->end = 0;
        count = recv(relay->plain, out->bytes, RELAY_BYTES, MSG_DONTWAIT);
        if (count < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        out->end = (size_t)count;
        out->ended = !count;
        if (!count)
            pc_stream_end(&relay->stream);
    }
    while (out->start < out->end) {
        part = (struct iovec){.iov_base = out->bytes + out->start, .iov_len = out->end - out->start};
        count = relay->stream.write(&relay->stream, &part, 1, false);
        if (count < 0)
            return count == -EAGAIN ? 0 : (int)count;
        out->start += (size_t)count;
    }
    return 0;
}

static bool is_full(const struct way *way)
{
    return way->start < way->end;
}

/* A socket of which nothing is wanted now is left out: poll reports its end whatever is asked, and again at once. */
static struct pollfd wait_for(int fd, bool in, bool out)
{
    return (struct pollfd){.fd = in || out ? fd : -1, .events = (short)((in ? POLLIN : 0) | (out ? POLLOUT : 0))};
}

static void *relay_thread(void *argument)
{
    struct relay *relay = argument;

    pc_thread_name(relay->urgent ? "pc-relay" : "pc-bulk-relay", 0);
    if (relay->urgent)
        pc_thread_prompt(false);
    else
        pc_thread_background();
    while (!carry_in(relay) && !carry_out(relay) && !relay->out.ended) {
        bool hears = !is_full(&relay->in) && !relay->in.ended;
        struct pollfd ready[] = {wait_for(relay->plain, !is_full(&relay->out), is_full(&relay->in)),
                                 wait_for(relay->stream.fd, hears, is_full(&relay->out))};

        if (poll(ready, 2, hears && pc_stream_pending(&relay->stream) ? 0 : -1) < 0 && errno != EINTR)
            break;
    }
    pc_stream_close(&relay->stream);
    close(relay->plain);
    pc_buffer_free(relay->in.bytes, RELAY_BYTES);
    pc_buffer_free(relay->out.bytes, RELAY_BYTES);
    free(relay);
    return NULL;
}

int pc_tls_relay(int fd, struct pc_tls *tls, int urgent)
{
    struct relay *relay = calloc(1, sizeof(*relay));
    struct pc_stream stream;
    pthread_t thread;
    int pair[2], error = pc_stream_open(&stream, fd, tls, urgent);

    if (!error && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) {
        error = -errno;
        pc_stream_close(&stream);
    }
    if (error) {
        free(relay);
        return error;
    }
    if (relay) {
        *relay = (struct relay){.stream = stream, .plain = pair[0], .urgent = urgent};
        relay->in.bytes = pc_buffer_new(RELAY_BYTES);
        relay->out.bytes = pc_buffer_new(RELAY_BYTES);
    }
    error = relay && relay->in.bytes && relay->out.bytes ? pc_thread_start(&thread, relay_thread, relay) : -ENOMEM;
    if (!error) {
        pthread_detach(thread);
        return pair[1];
    }
    if (relay) {
        pc_buffer_free(relay->in.bytes, RELAY_BYTES);
        pc_buffer_free(relay->out.bytes, RELAY_BYTES);
    }
    free(relay);
    pc_stream_close(&stream);
    close(pair[0]);
    close(pair[1]);
    return error;
}
