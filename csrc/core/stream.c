/* SPDX-License-Identifier: Apache-2.0 */
#include "core/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* Unsent bytes a bulk socket may hold. What the kernel has queued cannot be overtaken by a later decision (a moved
 * pivot, a lower bandwidth), and an autotuned buffer grows to many megabytes. */
#define BULK_NOTSENT_BYTES (256 * 1024)
#define PRIORITY_INTERACTIVE 6 /* the most a process without CAP_NET_ADMIN may set, see socket(7) */

static ssize_t tcp_read(struct pc_stream *stream, void *buffer, size_t bytes, bool wait)
{
    ssize_t got;

    do
        got = recv(stream->fd, buffer, bytes, wait ? 0 : MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : got;
}

static ssize_t tcp_write(struct pc_stream *stream, const struct iovec *parts, int count, bool wait)
{
    struct msghdr message = {.msg_iov = (struct iovec *)(uintptr_t)parts,
                             .msg_iovlen = (size_t)(count < IOV_MAX ? count : IOV_MAX)};
    ssize_t sent;

    /* MSG_NOSIGNAL: the peer's death is a result, not a SIGPIPE for a process that may be a VMM. */
    do
        sent = sendmsg(stream->fd, &message, MSG_NOSIGNAL | (wait ? 0 : MSG_DONTWAIT));
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : sent;
}

int pc_stream_tcp(struct pc_stream *stream, int fd, bool urgent)
{
    int type = 0;
    socklen_t length = sizeof(type);
    int one = 1, lowat = BULK_NOTSENT_BYTES, flags = fcntl(fd, F_GETFL);

    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length))
        return -errno;
    if (type != SOCK_STREAM)
        return -EPROTOTYPE;
    /* A socket that comes from an event loop is non-blocking, and a read that is to wait would not. */
    if (flags < 0 || (flags & O_NONBLOCK && fcntl(fd, F_SETFL, flags & ~O_NONBLOCK)))
        return -errno;
    /* Every option may fail: a Unix socket pair in a test has none of them, and works. */
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (urgent) {
        int priority = PRIORITY_INTERACTIVE, tos = IPTOS_LOWDELAY;

        (void)setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &priority, sizeof(priority));
        if (setsockopt(fd, IPPROTO_IP, IP_TOS, &tos, sizeof(tos)))
            (void)setsockopt(fd, IPPROTO_IPV6, IPV6_TCLASS, &tos, sizeof(tos));
    } else {
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &lowat, sizeof(lowat));
    }
    *stream = (struct pc_stream){.fd = fd, .read = tcp_read, .write = tcp_write};
    return 0;
}

uint64_t pc_stream_unsent(const struct pc_stream *stream)
{
    int unsent = 0;

    return ioctl(stream->fd, SIOCOUTQNSD, &unsent) || unsent < 0 ? 0 : (uint64_t)unsent;
}

bool pc_stream_pending(const struct pc_stream *stream)
{
    return stream->layer && stream->layer->pending(stream);
}

const char *pc_stream_why(const struct pc_stream *stream, const char *otherwise)
{
    const char *why = stream->layer ? stream->layer->why(stream) : "";

    return why[0] ? why : otherwise;
}

void pc_stream_shutdown(struct pc_stream *stream)
{
    if (stream->fd < 0)
        return;
    if (stream->layer)
        stream->layer->interrupt(stream);
    else
        (void)shutdown(stream->fd, SHUT_RDWR);
}

void pc_stream_end(struct pc_stream *stream)
{
    if (stream->layer)
        stream->layer->end(stream);
    (void)shutdown(stream->fd, SHUT_RDWR);
}

void pc_stream_close(struct pc_stream *stream)
{
    int fd = stream->fd;

    if (fd >= 0 && stream->layer) {
        stream->layer->end(stream);
        stream->layer->free(stream);
    }
    if (fd >= 0)
        close(fd);
    *stream = (struct pc_stream){.fd = -1};
}

int pc_stream_read_all(struct pc_stream *stream, void *buffer, size_t bytes)
{
    size_t have = 0;

    while (have < bytes) {
        ssize_t got = stream->read(stream, (uint8_t *)buffer + have, bytes - have, true);

        if (got < 0)
            return (int)got;
        if (got == 0)
            return have ? -EPIPE : -ENODATA;
        have += (size_t)got;
    }
    return 0;
}

int pc_stream_write_all(struct pc_stream *stream, struct iovec *parts, int count)
{
    while (count > 0) {
        ssize_t sent = stream->write(stream, parts, count, true);

        if (sent < 0)
            return (int)sent;
        for (; count > 0 && (size_t)sent >= parts->iov_len; parts++, count--)
            sent -= (ssize_t)parts->iov_len;
        if (count > 0) {
            parts->iov_base = (uint8_t *)parts->iov_base + sent;
            parts->iov_len -= (size_t)sent;
        }
    }
    return 0;
}
