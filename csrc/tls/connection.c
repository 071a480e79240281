/* SPDX-License-Identifier: Apache-2.0
 *
 * A connection: records between OpenSSL and a socket.
 *
 * OpenSSL reads from and writes to the socket through a BIO of our own. What it reads, it reads in large pieces, from which it takes
 * record after record; what it writes is collected and goes out with one system call, at the end of our call or when the buffer is
 * full. Whether the socket is waited for is the call's choice, not the descriptor's.
 *
 * What OpenSSL holds after a read that found the socket empty is less than a record: there is nothing to be had before more bytes
 * come. So `dry` and SSL_has_pending together tell whether a read is worth a try.
 *
 * A record that was made is never made again: where the socket does not take it, its bytes stay in `out`, and the writer is told
 * to come again (`owed`). A read never waits for room, and a write never for bytes: TLS 1.3 has no renegotiation, and a peer that
 * makes either necessary all the same is none of ours.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "core/runtime.h"
#include "core/util.h"
#include "tls/connection.h"

#define RECORD_BYTES 16384           /* of content, at most */
#define RECORD_MORE 320              /* what a record may add to it, and more */
#define OUT_BYTES (8 * (RECORD_BYTES + RECORD_MORE))
#define SEND_AT_ONCE (4 * RECORD_BYTES) /* made by a call that does not wait */
/* Tickets and new keys that a peer may send without data between them: a read does not work for it without end. */
#define MESSAGES_MAX 32
#define FIRST_TYPE 20 /* change cipher spec, alert, handshake, data: what a record begins with */
#define LAST_TYPE 23

_Static_assert(SEND_AT_ONCE + 5 * RECORD_MORE <= OUT_BYTES, "it fits whatever the socket takes");

/* The first failure is the last: its -errno, which every call gives from then on. */
static int broken(struct pc_tls *tls, int error)
{
    if (!tls->broken) {
        tls->broken = error;
        if (!tls->why[0])
            (void)pc_fail(-error, tls->why, sizeof(tls->why), "%s", strerror(-error));
    }
    return tls->broken;
}

/* ---- the socket ---- */

static bool is_interrupted(const struct pc_tls *tls)
{
    return __atomic_load_n(&tls->interrupted, __ATOMIC_SEQ_CST);
}

/* How many bytes the socket has taken; 0: none now; -errno. */
static ssize_t send_some(struct pc_tls *tls, const void *data, size_t bytes, bool wait)
{
    ssize_t sent;
    int error;

    do {
        /* Either this sees `interrupted`, or pc_tls_interrupt sees `writing`. */
        __atomic_store_n(&tls->writing, true, __ATOMIC_SEQ_CST);
        if (is_interrupted(tls))
            wait = false;
        /* MSG_NOSIGNAL: the peer's death is a result, not a SIGPIPE for a process that may be a VMM. */
        sent = send(tls->fd, data, bytes, MSG_NOSIGNAL | (wait ? 0 : MSG_DONTWAIT));
        error = errno;
        __atomic_store_n(&tls->writing, false, __ATOMIC_SEQ_CST);
    } while (sent < 0 && error == EINTR);
    return sent >= 0 ? sent : error == EAGAIN ? 0 : broken(tls, -error);
}

/* 0; -EAGAIN when not all was taken, and `wait` is false; -errno. */
static int flush(struct pc_tls *tls, bool wait)
{
    while (tls->out_start < tls->out_end) {
        ssize_t sent = send_some(tls, tls->out + tls->out_start, tls->out_end - tls->out_start, wait);

        if (sent < 0)
            return (int)sent;
        if (!sent)
            return wait ? broken(tls, -EPIPE) : -EAGAIN; /* where it should wait: it was interrupted */
        tls->out_start += (size_t)sent;
    }
    tls->out_start = tls->out_end = 0;
    return 0;
}

static int bio_write(BIO *bio, const char *data, size_t bytes, size_t *written)
{
    struct pc_tls *tls = pc_openssl.BIO_get_data(bio);

    pc_openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY);
    *written = bytes;
    if (tls->last && !tls->out_end) {
        ssize_t sent = send_some(tls, data, bytes, tls->wait_to_write);

        if (sent < 0) {
            tls->socket_error = -tls->broken;
            return 0;
        }
        data += sent;
        bytes -= (size_t)sent;
        if (!bytes)
            return 1;
    }
    if (bytes > OUT_BYTES - tls->out_end)
        (void)flush(tls, tls->wait_to_write);
    /* A call that does not wait never makes more than there is room for: it is answers to the peer, which does not read them. */
    if (bytes > OUT_BYTES - tls->out_end) {
        if (!tls->broken)
            (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), "the peer asks for new keys and does not read the answers");
        tls->socket_error = tls->broken ? -tls->broken : EPROTO;
        return 0;
    }
    memcpy(tls->out + tls->out_end, data, bytes);
    tls->out_end += bytes;
    return 1;
}

static int bio_read(BIO *bio, char *buffer, size_t bytes, size_t *read_bytes)
{
    struct pc_tls *tls = pc_openssl.BIO_get_data(bio);
    ssize_t got;

    pc_openssl.BIO_clear_flags(bio, BIO_FLAGS_RWS | BIO_FLAGS_SHOULD_RETRY);
    do
        got = is_interrupted(tls) ? 0 : recv(tls->fd, buffer, bytes, tls->wait_to_read ? 0 : MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    /* Where we have ended it: for OpenSSL it goes on, or it would tell the peer of a failure. */
    if ((got < 0 && errno == EAGAIN) || (!got && is_interrupted(tls))) {
        tls->dry = true;
        pc_openssl.BIO_set_flags(bio, BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY);
        return 0;
    }
    if (got <= 0) {
        tls->ended = !got;
        tls->socket_error = got ? errno : 0;
        return 0;
    }
    if (!tls->heard && (buffer[0] < FIRST_TYPE || buffer[0] > LAST_TYPE)) {
        char begin[17] = "";

        for (ssize_t i = 0; i < got && i < 16; i++)
            begin[i] = buffer[i] > ' ' && buffer[i] <= '~' ? buffer[i] : '.';
        tls->socket_error = -pc_fail(EPROTO, tls->why, sizeof(tls->why), "the other end does not use TLS (it began with \"%s\"): give --tls DIR on both hosts", begin);
        return 0;
    }
    tls->heard = true;
    tls->dry = false;
    *read_bytes = (size_t)got;
    return 1;
}

static long bio_control(BIO *bio, int command, long number, void *argument)
{
    const struct pc_tls *tls = pc_openssl.BIO_get_data(bio);

    (void)number;
    (void)argument;
    return command == BIO_CTRL_EOF ? tls->ended : command == BIO_CTRL_FLUSH;
}

BIO_METHOD *pc_tls_new_bio_method(void)
{
    BIO_METHOD *method = pc_openssl.BIO_meth_new(BIO_TYPE_SOURCE_SINK, "postcopy");

    if (!method || !pc_openssl.BIO_meth_set_write_ex(method, bio_write) || !pc_openssl.BIO_meth_set_read_ex(method, bio_read) ||
        !pc_openssl.BIO_meth_set_ctrl(method, bio_control))
        return NULL;
    return method;
}

void pc_tls_interrupt(struct pc_tls *tls)
{
    __atomic_store_n(&tls->interrupted, true, __ATOMIC_SEQ_CST);
    /* A thread that waits for bytes returns when no more are read. The other direction stays open for the close, unless a thread waits
     * there: then there is half a record in it. */
    (void)shutdown(tls->fd, __atomic_load_n(&tls->writing, __ATOMIC_SEQ_CST) ? SHUT_RDWR : SHUT_RD);
}

/* ---- what OpenSSL answered ---- */

void pc_tls_count_message(int sent, int version, int type, const void *data, size_t bytes, SSL *openssl, void *argument)
{
    struct pc_tls *tls;

    (void)version;
    (void)data;
    (void)bytes;
    (void)argument;
    if (sent || type != SSL3_RT_HANDSHAKE)
        return;
    tls = pc_openssl.SSL_get_ex_data(openssl, 0);
    /* As if the connection had ended: with the next record OpenSSL returns, whatever else it has read. */
    if (tls->established && ++tls->messages > MESSAGES_MAX)
        pc_openssl.SSL_set_shutdown(openssl, SSL_RECEIVED_SHUTDOWN);
}

enum { AGAIN = 1 };

static int judge(struct pc_tls *tls)
{
    unsigned long queued = pc_openssl.ERR_peek_error();
    bool of_openssl = queued && ERR_GET_REASON(queued) != SSL_R_UNEXPECTED_EOF_WHILE_READING;
    int kind = pc_openssl.SSL_get_error(tls->openssl, 0);

    if (tls->established && tls->messages > MESSAGES_MAX)
        return broken(tls, pc_fail(EPROTO, tls->why, sizeof(tls->why), "the peer sent more than %d messages of TLS in a row", MESSAGES_MAX));
    if (kind == SSL_ERROR_WANT_READ)
        return tls->dry ? -EAGAIN : AGAIN;
    if (kind == SSL_ERROR_ZERO_RETURN) {
        tls->closed = true;
        return 0;
    }
    if (tls->socket_error)
        return broken(tls, -tls->socket_error);
    if (of_openssl || !tls->ended) {
        pc_tls_explain(tls);
        (void)broken(tls, -EPROTO);
        (void)flush(tls, false); /* the alert that says why */
        return tls->broken;
    }
    return broken(tls, pc_fail(EPIPE, tls->why, sizeof(tls->why),
                               tls->established ? "the connection was cut: it ended without the end that TLS has"
                                                : "the connection ended during the TLS handshake"));
}

/* Why a call of OpenSSL has failed: AGAIN, when it wants to be called again at once; 0 for an orderly end; else -errno. OpenSSL's queue
 * of errors is the thread's, and empty whenever none of its calls has just failed. */
static int why_not(struct pc_tls *tls)
{
    int result = judge(tls);

    pc_openssl.ERR_clear_error();
    return result;
}

static void begin(struct pc_tls *tls, bool wait_to_read, bool wait_to_write)
{
    tls->wait_to_read = wait_to_read;
    tls->wait_to_write = wait_to_write;
    tls->socket_error = 0;
}

/* ---- the calls ---- */

int pc_tls_handshake(struct pc_tls *tls)
{
    int error = tls->broken;

    pc_openssl.ERR_clear_error(); /* what others left in a thread that is not the data plane's */
    while (!error && !tls->established) {
        begin(tls, false, false);
        if (pc_openssl.SSL_do_handshake(tls->openssl) == 1) {
            tls->established = true;
        } else {
            error = why_not(tls);
            if (error == AGAIN)
                error = 0;
            else if (!error)
                error = broken(tls, pc_fail(EPIPE, tls->why, sizeof(tls->why), "the connection ended during the TLS handshake"));
        }
    }
    if (error && error != -EAGAIN)
        return error;
    if (flush(tls, false))
        return tls->broken ? tls->broken : PC_TLS_WRITABLE;
    return error ? PC_TLS_READABLE : 0;
}

ssize_t pc_tls_receive(struct pc_tls *tls, void *buffer, size_t bytes, bool wait)
{
    size_t done = 0;

    if (!tls->established)
        return tls->broken ? tls->broken : -ENOTCONN;
    if (tls->out_end)
        (void)flush(tls, false);
    begin(tls, wait, false);
    while (done < bytes && !tls->broken && !tls->closed) {
        size_t got = 0;
        int error;

        if (pc_openssl.SSL_read_ex(tls->openssl, (uint8_t *)buffer + done, bytes - done, &got)) {
            done += got;
            tls->wait_to_read = false;
            if (!pc_openssl.SSL_has_pending(tls->openssl))
                break;
            continue;
        }
        error = why_not(tls);
        if (error == -EAGAIN) {
            if (done)
                break;
            return is_interrupted(tls) ? 0 : -EAGAIN;
        }
    }
    if (done) {
        tls->messages = 0;
        return (ssize_t)done;
    }
    return tls->broken;
}

/* Where the caller is in the parts of a write. */
struct place {
    const struct iovec *parts;
    int count;
    size_t at; /* in the first */
};

static void move_on(struct place *place, size_t bytes)
{
    place->at += bytes;
    while (place->count && place->at >= place->parts->iov_len) {
        place->at -= place->parts->iov_len;
        place->parts++;
        place->count--;
    }
}

/* What the next records are made of: content where it lies, as long as it fills them; else small parts, copied together into one. */
static const void *gather(const struct place *place, uint8_t *record, size_t *bytes)
{
    struct place next = *place;
    size_t have = 0, here = next.parts->iov_len - next.at;

    if (here >= RECORD_BYTES || place->count == 1) {
        *bytes = here > RECORD_BYTES ? here - here % RECORD_BYTES : here;
        return (const uint8_t *)next.parts->iov_base + next.at;
    }
    while (next.count && have < RECORD_BYTES) {
        here = next.parts->iov_len - next.at;
        if (here > RECORD_BYTES - have)
            here = RECORD_BYTES - have;
        memcpy(record + have, (const uint8_t *)next.parts->iov_base + next.at, here);
        have += here;
        move_on(&next, here);
    }
    *bytes = have;
    return record;
}

/* A key is good for some 2^24 records (RFC 8446, 5.5), which OpenSSL does not count. The next record after this begins the next key. */
static void count_records(struct pc_tls *tls, size_t bytes)
{
    tls->records += (bytes + RECORD_BYTES - 1) / RECORD_BYTES;
    if (tls->records < PC_TLS_KEY_RECORDS)
        return;
    if (pc_openssl.SSL_key_update(tls->openssl, SSL_KEY_UPDATE_NOT_REQUESTED))
        tls->records = 0;
    else /* within a message of the peer's: after the next record then */
        pc_openssl.ERR_clear_error();
}

ssize_t pc_tls_send(struct pc_tls *tls, const struct iovec *parts, int count, bool wait)
{
    struct place place = {.parts = parts, .count = count};
    uint8_t record[RECORD_BYTES];
    size_t done = tls->owed, all = 0;
    int error = tls->broken ? tls->broken : tls->established ? flush(tls, wait) : -ENOTCONN;

    if (error)
        return error;
    tls->owed = 0;
    if (done)
        return (ssize_t)done; /* what was owed has gone */
    begin(tls, false, wait);
    for (int i = 0; i < count; i++)
        all += parts[i].iov_len;
    move_on(&place, 0); /* past parts that are empty */
    while (place.count && (wait || done < SEND_AT_ONCE)) {
        size_t bytes, sent;
        const void *data = gather(&place, record, &bytes);

        if (!wait && bytes > SEND_AT_ONCE - done)
            bytes = SEND_AT_ONCE - done;
        tls->last = done + bytes == all && bytes <= RECORD_BYTES;
        if (!pc_openssl.SSL_write_ex(tls->openssl, data, bytes, &sent)) {
            error = why_not(tls);
            if (error == AGAIN)
                continue;
            if (error == -EAGAIN && !tls->broken)
                error = pc_fail(EPROTO, tls->why, sizeof(tls->why), "the peer sent a part of a message of TLS, and not the rest");
            return broken(tls, error ? error : -EPIPE);
        }
        count_records(tls, sent);
        done += sent;
        move_on(&place, sent);
    }
    tls->last = false;
    error = flush(tls, wait);
    if (error == -EAGAIN)
        tls->owed = done;
    return error ? error : (ssize_t)done;
}

int64_t pc_tls_read(struct pc_tls *tls, void *buffer, size_t bytes)
{
    pc_openssl.ERR_clear_error();
    return pc_tls_receive(tls, buffer, bytes, false);
}

int64_t pc_tls_write(struct pc_tls *tls, const void *data, size_t bytes)
{
    struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = bytes};

    pc_openssl.ERR_clear_error();
    return pc_tls_send(tls, &part, 1, false);
}

int pc_tls_pending(const struct pc_tls *tls)
{
    return tls->broken || tls->closed || (!tls->dry && pc_openssl.SSL_has_pending(tls->openssl));
}

int pc_tls_close_notify(struct pc_tls *tls)
{
    int error = tls->broken ? tls->broken : tls->established ? flush(tls, false) : -ENOTCONN;

    if (error)
        return error;
    if (!tls->notified) {
        begin(tls, false, false);
        tls->notified = pc_openssl.SSL_shutdown(tls->openssl) >= 0;
        pc_openssl.ERR_clear_error();
        if (!tls->notified)
            return broken(tls, -EPIPE);
    }
    return flush(tls, false);
}

const char *pc_tls_why(const struct pc_tls *tls)
{
    return tls->why;
}

/* ---- its life ---- */

/* It has the secret that the next handshake begins with. */
static void forget_session(struct pc_tls *tls)
{
    if (tls->session)
        explicit_bzero(tls->session, tls->session_bytes);
    free(tls->session);
}

int pc_tls_keep_session(SSL *openssl, SSL_SESSION *session)
{
    struct pc_tls *tls = pc_openssl.SSL_get_ex_data(openssl, 0);
    int bytes = pc_openssl.i2d_SSL_SESSION(session, NULL);
    uint8_t *kept = bytes > 0 ? malloc(sizeof(tls->identity) + (size_t)bytes) : NULL, *end;

    if (kept) {
        memcpy(kept, tls->identity, sizeof(tls->identity));
        end = kept + sizeof(tls->identity);
        forget_session(tls);
        tls->session_bytes = sizeof(tls->identity) + (size_t)pc_openssl.i2d_SSL_SESSION(session, &end);
        tls->session = kept;
    }
    return 0; /* it stays OpenSSL's */
}

size_t pc_tls_session(const struct pc_tls *tls, void *out, size_t cap)
{
    if (tls->session_bytes && cap)
        memcpy(out, tls->session, tls->session_bytes < cap ? tls->session_bytes : cap);
    return tls->session_bytes;
}

SSL_TICKET_RETURN pc_tls_use_ticket(SSL *openssl, SSL_SESSION *session, const unsigned char *key_name, size_t key_name_bytes,
                                    SSL_TICKET_STATUS status, void *argument)
{
    (void)openssl;
    (void)key_name;
    (void)key_name_bytes;
    (void)argument;
    if ((status != SSL_TICKET_SUCCESS && status != SSL_TICKET_SUCCESS_RENEW) || !pc_tls_still_valid(session))
        return SSL_TICKET_RETURN_IGNORE_RENEW;
    return status == SSL_TICKET_SUCCESS ? SSL_TICKET_RETURN_USE : SSL_TICKET_RETURN_USE_RENEW;
}

/* A session that was made with other credentials, or for another name, is not used: what it was checked against has changed. */
static void offer_session(struct pc_tls *tls, const uint8_t *session, size_t bytes)
{
    const uint8_t *encoded;
    SSL_SESSION *found;

    if (bytes <= sizeof(tls->identity) || memcmp(session, tls->identity, sizeof(tls->identity)))
        return;
    encoded = session + sizeof(tls->identity);
    found = pc_openssl.d2i_SSL_SESSION(NULL, &encoded, (long)(bytes - sizeof(tls->identity)));
    if (found) {
        if (pc_tls_still_valid(found))
            (void)pc_openssl.SSL_set_session(tls->openssl, found);
        pc_openssl.SSL_SESSION_free(found);
    }
}

static bool set_name(struct pc_tls *tls)
{
    unsigned char both[2][sizeof(tls->identity)];

    if (!pc_openssl.EVP_Digest(tls->hostname, strlen(tls->hostname), both[1], NULL, pc_openssl.EVP_sha256(), NULL))
        return false;
    memcpy(both[0], tls->context->identity, sizeof(both[0]));
    if (!pc_openssl.EVP_Digest(both, sizeof(both), tls->identity, NULL, pc_openssl.EVP_sha256(), NULL))
        return false;
    if (tls->context->server || pc_openssl.X509_VERIFY_PARAM_set1_ip_asc(pc_openssl.SSL_get0_param(tls->openssl), tls->hostname))
        return true;
    /* A name is a DNS name of the certificate: a subject is any text that a CA lets through, and is no name where there is none. */
    pc_openssl.SSL_set_hostflags(tls->openssl, X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    return pc_openssl.SSL_set1_host(tls->openssl, tls->hostname) &&
           pc_openssl.SSL_ctrl(tls->openssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name, tls->hostname);
}

int pc_tls_new(struct pc_tls_context *context, int fd, const char *hostname, const void *session, size_t session_bytes,
               struct pc_tls **out)
{
    size_t length = hostname ? strlen(hostname) : 0;
    struct pc_tls *tls;
    BIO *bio;

    if (length >= sizeof(tls->hostname) || !length != !!context->server)
        return -EINVAL;
    tls = calloc(1, sizeof(*tls));
    if (!tls)
        return -ENOMEM;
    (void)__atomic_fetch_add(&context->references, 1, __ATOMIC_RELAXED);
    tls->context = context;
    tls->fd = fd;
    memcpy(tls->hostname, hostname ? hostname : "", length);
    pc_openssl.ERR_clear_error();
    tls->out = pc_buffer_new(OUT_BYTES);
    tls->openssl = pc_openssl.SSL_new(context->openssl);
    bio = pc_openssl.BIO_new(pc_tls_bio_method);
    if (bio) {
        pc_openssl.BIO_set_data(bio, tls);
        pc_openssl.BIO_set_init(bio, 1);
    }
    if (tls->openssl && bio)
        pc_openssl.SSL_set_bio(tls->openssl, bio, bio);
    else if (bio)
        pc_openssl.BIO_free(bio);
    if (!tls->openssl || !bio || !tls->out || !pc_openssl.SSL_set_ex_data(tls->openssl, 0, tls) || !set_name(tls)) {
        pc_tls_free(tls);
        return -ENOMEM;
    }
    if (context->server)
        pc_openssl.SSL_set_accept_state(tls->openssl);
    else
        pc_openssl.SSL_set_connect_state(tls->openssl);
    offer_session(tls, session, session_bytes);
    pc_openssl.ERR_clear_error();
    *out = tls;
    return 0;
}

void pc_tls_free(struct pc_tls *tls)
{
    if (tls->openssl)
        pc_openssl.SSL_free(tls->openssl);
    pc_openssl.ERR_clear_error();
    pc_buffer_free(tls->out, OUT_BYTES);
    forget_session(tls);
    pc_tls_context_free(tls->context);
    free(tls);
}
