/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: a TLS connection whose two ends are real, with the input in the middle: it delivers, withholds, damages, inserts and cuts
 * what they send, and has them write, change keys and close. Whatever it does: bytes arrive as they were written and in their order, or
 * the connection has failed with a line of text; an orderly end is one that the other end has said; no call goes on for ever.
 */
#include <openssl/ssl.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "tests/support/tls_pair.h"
#include "tls/connection.h"

#define QUEUE_BYTES (1u << 20)
#define STEP_BYTES  3u
#define STEPS_MAX   200u
#define HANG_S      60

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

#define REQUIRE(condition)                                                                                              \
    do {                                                                                                                \
        if (!(condition)) {                                                                                             \
            (void)fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);                         \
            abort();                                                                                                    \
        }                                                                                                               \
    } while (0)

enum { SERVER, CLIENT };

struct end {
    struct pc_tls *tls;
    int fd, wire;        /* its socket, and our end of it */
    const char *hears;   /* a name that the other end's certificate has */
    bool done, failed;
    bool closing, ended; /* it has said that nothing follows; it has been told so */
    uint64_t written, read; /* bytes; the content of each follows from its place */
    uint8_t *queue;      /* what it has sent and was not delivered yet */
    size_t queued;
};

static uint8_t byte_at(uint64_t place)
{
    return (uint8_t)(place * 167 + (place >> 8));
}

static void check_failure(struct end *end, int64_t result)
{
    const char *why = pc_tls_why(end->tls);

    REQUIRE(result == -EPIPE || result == -EPROTO || result == -ECONNRESET);
    REQUIRE(why[0] && strlen(why) < PC_ERROR_BYTES);
    for (; *why; why++)
        REQUIRE((unsigned char)*why >= ' ' && *why != 0x7f);
    end->failed = true;
}

/* What it has sent since is in our queue. */
static void collect(struct end *end)
{
    ssize_t got;

    while (end->queued < QUEUE_BYTES && (got = recv(end->wire, end->queue + end->queued, QUEUE_BYTES - end->queued, MSG_DONTWAIT)) > 0)
        end->queued += (size_t)got;
}

static void deliver(struct end *from, struct end *to, size_t bytes)
{
    ssize_t sent;

    if (bytes > from->queued)
        bytes = from->queued;
    sent = bytes ? send(to->wire, from->queue, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
    if (sent <= 0)
        return;
    from->queued -= (size_t)sent;
    memmove(from->queue, from->queue + sent, from->queued);
}

/* One call: of the handshake, or of a read. Whether it has come further. */
static bool drive(struct end *end, const struct end *other)
{
    uint8_t buffer[5000];
    int64_t result;

    if (end->failed || end->ended)
        return false;
    if (!end->done) {
        int wants = pc_tls_handshake(end->tls);

        if (wants < 0)
            check_failure(end, wants);
        end->done = !wants;
        if (end->done) {
            struct pc_tls_peer peer;

            REQUIRE(pc_tls_peer(end->tls, &peer) == 0);
            REQUIRE(peer.subject[0] && strstr(peer.names, end->hears));
        }
        return wants == 0;
    }
    result = pc_tls_read(end->tls, buffer, sizeof(buffer));
    if (result == -EAGAIN) {
        REQUIRE(!pc_tls_pending(end->tls));
        return false;
    }
    if (result < 0) {
        check_failure(end, result);
        return false;
    }
    if (!result) {
        REQUIRE(other->closing && end->read == other->written);
        end->ended = true;
        return false;
    }
    REQUIRE(end->read + (uint64_t)result <= other->written);
    for (int64_t i = 0; i < result; i++)
        REQUIRE(buffer[i] == byte_at(end->read + (uint64_t)i));
    end->read += (uint64_t)result;
    return true;
}

static void write_some(struct end *end, size_t bytes)
{
    uint8_t buffer[65536];
    int64_t result;

    if (!end->done || end->failed || end->closing || !bytes)
        return;
    for (size_t i = 0; i < bytes; i++)
        buffer[i] = byte_at(end->written + i);
    result = pc_tls_write(end->tls, buffer, bytes);
    if (result >= 0) {
        REQUIRE(result > 0 && (size_t)result <= bytes);
        end->written += (uint64_t)result;
    } else if (result == -EAGAIN) {
        end->written += bytes; /* some may be on their way; nothing else is written behind them */
        end->closing = false;
        end->failed = true;
    } else {
        check_failure(end, result);
    }
}

static void exchange(struct end ends[2])
{
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < 2; i++) {
            while (drive(&ends[i], &ends[!i]))
                more = true;
            collect(&ends[i]);
            if (ends[i].queued && !ends[!i].failed && !ends[!i].ended) {
                size_t before = ends[i].queued;

                deliver(&ends[i], &ends[!i], before);
                more |= ends[i].queued != before;
            }
        }
    }
}

static size_t step(struct end ends[2], const uint8_t *at, const uint8_t *end_of_data)
{
    struct end *end = &ends[at[0] >> 4 & 1], *other = &ends[!(at[0] >> 4 & 1)];
    size_t number = at[1] | (size_t)at[2] << 8, inserted;

    switch (at[0] & 15) {
    case 0:
        (void)drive(end, other);
        collect(end);
        break;
    case 1:
        deliver(end, other, number ? number : SIZE_MAX);
        break;
    case 2:
        write_some(end, number);
        collect(end);
        break;
    case 3: /* damaged on its way */
        if (end->queued)
            end->queue[number % end->queued] ^= (uint8_t)(1u << at[2] % 8);
        break;
    case 4: /* bytes that it has not sent, before what it has */
        inserted = (size_t)(end_of_data - at) - STEP_BYTES;
        inserted = inserted < at[1] ? inserted : at[1];
        if (end->queued + inserted <= QUEUE_BYTES) {
            memmove(end->queue + inserted, end->queue, end->queued);
            memcpy(end->queue, at + STEP_BYTES, inserted);
            end->queued += inserted;
        }
        return STEP_BYTES + inserted;
    case 5: /* lost on its way */
        number = number < end->queued ? number : end->queued;
        end->queued -= number;
        memmove(end->queue, end->queue + number, end->queued);
        break;
    case 6: /* cut */
        (void)shutdown(end->wire, SHUT_WR);
        break;
    case 7:
        if (end->done && !end->failed && !end->closing) {
            int result = pc_tls_close_notify(end->tls);

            end->closing = true;
            REQUIRE(result == 0 || result == -EAGAIN || result == -EPIPE || result == -EPROTO || result == -ECONNRESET);
        }
        collect(end);
        break;
    case 8: /* new keys, as often as it likes */
        if (end->done && !end->failed && !end->closing)
            for (size_t i = 0; i < at[1] % 40u; i++)
                if (SSL_key_update(end->tls->openssl, at[2] & 1 ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED) == 1)
                    (void)SSL_do_handshake(end->tls->openssl);
        break;
    default:
        exchange(ends);
        break;
    }
    return STEP_BYTES;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct site site;
    static uint8_t session[8192];
    static size_t session_bytes;
    static int usable = -1;
    struct end ends[2] = {0};

    if (usable < 0) {
        char error[PC_ERROR_BYTES];

        usable = !pc_tls_available(error, sizeof(error));
        if (usable)
            site = open_site();
        else
            (void)fprintf(stderr, "TLS is not tried: %s\n", error);
    }
    if (!usable || !bytes)
        return 0;
    alarm(HANG_S);
    for (int i = 0; i < 2; i++) {
        int pair[2];

        REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
        ends[i].fd = pair[0];
        ends[i].wire = pair[1];
        ends[i].hears = i == SERVER ? "dns:client.example" : "dns:" SERVER_NAME;
        ends[i].queue = malloc(QUEUE_BYTES);
        REQUIRE(ends[i].queue);
    }
    REQUIRE(pc_tls_new(site.server, ends[SERVER].fd, NULL, NULL, 0, &ends[SERVER].tls) == 0);
    REQUIRE(pc_tls_new(site.client, ends[CLIENT].fd, SERVER_NAME, data[0] & 1 ? session : NULL, data[0] & 1 ? session_bytes : 0,
                       &ends[CLIENT].tls) == 0);
    if (data[0] & 2)
        exchange(ends);
    for (size_t at = 1, steps = 0; at + STEP_BYTES <= bytes && steps < STEPS_MAX; steps++)
        at += step(ends, data + at, data + bytes);
    exchange(ends);
    for (int i = 0; i < 2; i++) { /* and the end of both */
        (void)shutdown(ends[i].wire, SHUT_WR);
        while (drive(&ends[i], &ends[!i])) {
        }
        REQUIRE(ends[i].failed || ends[i].ended);
    }
    if (ends[CLIENT].done && pc_tls_session(ends[CLIENT].tls, NULL, 0) <= sizeof(session))
        session_bytes = pc_tls_session(ends[CLIENT].tls, session, sizeof(session));
    for (int i = 0; i < 2; i++) {
        pc_tls_free(ends[i].tls);
        close(ends[i].fd);
        close(ends[i].wire);
        free(ends[i].queue);
    }
    alarm(0);
    return 0;
}
