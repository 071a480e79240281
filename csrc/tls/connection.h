/* SPDX-License-Identifier: Apache-2.0
 *
 * A connection, as the files of this room share it.
 */
#ifndef PC_TLS_CONNECTION_H
#define PC_TLS_CONNECTION_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "postcopy/core.h"
#include "postcopy/tls.h"
#include "tls/library.h"

#define PC_TLS_KEY_RECORDS (1u << 23) /* written with one key */

struct pc_tls {
    struct pc_tls_context *context;
    SSL *openssl;
    int fd;
    bool wait_to_read, wait_to_write; /* whether the present call may */
    bool last;        /* what OpenSSL writes is the last record of a call: it goes straight to the socket */
    bool dry;         /* the last look at the socket found nothing: what OpenSSL holds is no whole record */
    bool ended;       /* the socket has */
    bool established, closed, notified; /* the handshake is done; the peer has said that nothing follows; we have */
    bool heard;       /* a first byte */
    bool interrupted, writing; /* atomic, see pc_tls_interrupt */
    int socket_error; /* of the present call */
    int broken;       /* why nothing more can be done: -errno; 0 as long as it can */
    unsigned messages; /* received since the last data, of those that are OpenSSL's own */
    uint8_t *out;     /* records that the socket has not taken yet */
    size_t out_start, out_end;
    size_t owed;      /* bytes that are in `out` and whose writer was told to come again */
    uint64_t records; /* written with the present key, see PC_TLS_KEY_RECORDS */
    unsigned char identity[32]; /* what a session has to belong to */
    uint8_t *session;
    size_t session_bytes;
    char hostname[256];
    char why[PC_ERROR_BYTES];
};

/* pc_tls_read and pc_tls_write that wait for the socket where `wait` says so; then none of them is -EAGAIN. */
ssize_t pc_tls_receive(struct pc_tls *tls, void *buffer, size_t bytes, bool wait);
ssize_t pc_tls_send(struct pc_tls *tls, const struct iovec *parts, int count, bool wait);
/* Any thread: a call that waits returns at once, and none waits any more. */
void pc_tls_interrupt(struct pc_tls *tls);

/* peer.c */
/* What OpenSSL's queue of errors says, as a line for a person. */
void pc_tls_explain(struct pc_tls *tls);
/* Whether the certificate of the peer that a session was made with is still valid. A session that is not resumed costs a whole
 * handshake, in which the certificate is checked, and refused with an alert that says why. */
bool pc_tls_still_valid(const SSL_SESSION *session);
int pc_tls_verified(int valid, X509_STORE_CTX *openssl);

#endif
