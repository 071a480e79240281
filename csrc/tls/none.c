/* SPDX-License-Identifier: Apache-2.0
 *
 * The room without OpenSSL's headers at build time: there is no context, and so nothing else.
 */
#include <errno.h>
#include <unistd.h>

#include "core/util.h"
#include "postcopy/tls.h"
#include "tls/stream.h"

int pc_tls_available(char *error, size_t error_bytes)
{
    return pc_fail(ENOENT, error, error_bytes,
                   "no TLS: this postcopy was built without OpenSSL; Debian: apt-get install libssl-dev, then build it again");
}

int pc_tls_context_new(int server, const void *ca, size_t ca_bytes, const void *certificate, size_t certificate_bytes, const void *key,
                       size_t key_bytes, struct pc_tls_context **context, char *error, size_t error_bytes)
{
    (void)server, (void)ca, (void)ca_bytes, (void)certificate, (void)certificate_bytes, (void)key, (void)key_bytes, (void)context;
    return pc_tls_available(error, error_bytes);
}

int64_t pc_tls_context_not_after(const struct pc_tls_context *context)
{
    (void)context;
    return 0;
}

void pc_tls_context_free(struct pc_tls_context *context)
{
    (void)context;
}

int pc_tls_new(struct pc_tls_context *context, int fd, const char *hostname, const void *session, size_t session_bytes,
               struct pc_tls **tls)
{
    (void)context, (void)fd, (void)hostname, (void)session, (void)session_bytes, (void)tls;
    return -ENOENT;
}

void pc_tls_free(struct pc_tls *tls)
{
    (void)tls;
}

int pc_tls_handshake(struct pc_tls *tls)
{
    (void)tls;
    return -ENOENT;
}

int64_t pc_tls_read(struct pc_tls *tls, void *buffer, size_t bytes)
{
    (void)tls, (void)buffer, (void)bytes;
    return -ENOENT;
}

int64_t pc_tls_write(struct pc_tls *tls, const void *data, size_t bytes)
{
    (void)tls, (void)data, (void)bytes;
    return -ENOENT;
}

int pc_tls_pending(const struct pc_tls *tls)
{
    (void)tls;
    return 0;
}

int pc_tls_close_notify(struct pc_tls *tls)
{
    (void)tls;
    return -ENOENT;
}

const char *pc_tls_why(const struct pc_tls *tls)
{
    (void)tls;
    return "";
}

int pc_tls_peer(const struct pc_tls *tls, struct pc_tls_peer *peer)
{
    (void)tls, (void)peer;
    return -ENOENT;
}

size_t pc_tls_session(const struct pc_tls *tls, void *out, size_t cap)
{
    (void)tls, (void)out, (void)cap;
    return 0;
}

int pc_tls_relay(int fd, struct pc_tls *tls, int urgent)
{
    (void)tls, (void)urgent;
    close(fd);
    return -ENOENT;
}

int pc_stream_open(struct pc_stream *stream, int fd, struct pc_tls *tls, bool urgent)
{
    int error = tls ? -ENOENT : pc_stream_tcp(stream, fd, urgent);

    if (error) {
        close(fd);
        stream->fd = -1;
    }
    return error;
}
