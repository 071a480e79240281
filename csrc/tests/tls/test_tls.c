/* SPDX-License-Identifier: Apache-2.0
 *
 * TLS connections: who is let in, what is told apart, and that no byte is lost, doubled or waited for in vain. Most cases carry the bytes
 * between the two ends themselves, so that they can cut and delay them where they like.
 */
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <time.h>

#include "core/stream.h"
#include "tests/support/tls_pair.h"
#include "tls/connection.h"
#include "tls/stream.h"

#define DATA_BYTES (300 * 1024)

/* ---- a wire in the hands of the test ---- */

struct wire {
    struct pc_tls *ends[2];
    int inner[2], outer[2]; /* sockets of the ends, and the other sides of them, which are the test's */
};

static struct wire open_wire(struct pc_tls_context *server, struct pc_tls_context *client, const char *name)
{
    struct wire wire;

    for (int i = 0; i < 2; i++) {
        int pair[2];

        CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
        wire.inner[i] = pair[0];
        wire.outer[i] = pair[1];
    }
    CHECK_EQ(pc_tls_new(server, wire.inner[0], NULL, NULL, 0, &wire.ends[0]), 0);
    CHECK_EQ(pc_tls_new(client, wire.inner[1], name, NULL, 0, &wire.ends[1]), 0);
    return wire;
}

static void close_wire(struct wire *wire)
{
    for (int i = 0; i < 2; i++) {
        pc_tls_free(wire->ends[i]);
        close(wire->inner[i]);
        if (wire->outer[i] >= 0)
            close(wire->outer[i]);
    }
}

/* What an end has sent. */
static size_t take(const struct wire *wire, int from, void *buffer, size_t bytes)
{
    ssize_t got = recv(wire->outer[from], buffer, bytes, MSG_DONTWAIT);

    return got > 0 ? (size_t)got : 0;
}

static void give(const struct wire *wire, int to, const void *data, size_t bytes)
{
    while (bytes) {
        ssize_t sent = CHECK_SYS(send(wire->outer[to], data, bytes, MSG_NOSIGNAL));

        data = (const uint8_t *)data + sent;
        bytes -= (size_t)sent;
    }
}

/* What is on its way arrives. Whether there was anything. */
static bool carry(const struct wire *wire)
{
    uint8_t bytes[65536];
    bool any = false;

    for (int from = 0; from < 2; from++)
        for (size_t got; (got = take(wire, from, bytes, sizeof(bytes))); any = true)
            give(wire, !from, bytes, got);
    return any;
}

static int wire_handshake(const struct wire *wire)
{
    int results[2] = {1, 1};
    bool any = true;

    while (any) {
        for (int i = 0; i < 2; i++)
            if (results[i] > 0)
                results[i] = pc_tls_handshake(wire->ends[i]);
        any = carry(wire);
    }
    return results[0] ? results[0] : results[1];
}

static struct wire connected(const struct site *site)
{
    struct wire wire = open_wire(site->server, site->client, SERVER_NAME);

    if (wire_handshake(&wire))
        FAIL("server: %s; client: %s", pc_tls_why(wire.ends[0]), pc_tls_why(wire.ends[1]));
    return wire;
}

/* The session that the server has given, which reading finds. */
static size_t take_session(const struct wire *wire, uint8_t *session, size_t cap)
{
    uint8_t byte;

    CHECK_EQ(pc_tls_read(wire->ends[1], &byte, 1), -EAGAIN);
    CHECK(!pc_tls_pending(wire->ends[1]));
    return pc_tls_session(wire->ends[1], session, cap);
}

static void fill(uint8_t *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        data[i] = (uint8_t)test_random();
}

/* ---- who is let in ---- */

static void both_learn_who_the_other_is(void)
{
    struct site site = open_site();
    struct wire wire = connected(&site);
    struct pc_tls_peer peer;

    CHECK_EQ(pc_tls_peer(wire.ends[0], &peer), 0);
    CHECK(!strcmp(peer.subject, "CN=the client,O=a test\\, only"));
    CHECK(!strcmp(peer.names, "dns:client.example\nuri:postcopy:host/client\n"));
    CHECK(!strcmp(peer.cipher, "TLS_AES_128_GCM_SHA256"));
    CHECK_EQ(strlen(peer.fingerprint), 64);
    CHECK(peer.not_after_s > (int64_t)time(NULL) && peer.not_after_s <= (int64_t)time(NULL) + DAY_S);
    CHECK_EQ(peer.resumed, 0);
    CHECK_EQ(pc_tls_peer(wire.ends[1], &peer), 0);
    CHECK(!strcmp(peer.names, "dns:" SERVER_NAME "\nip:127.0.0.1\nip:::1\n"));
    close_wire(&wire);
    close_site(&site);
}

/* Names that could be read as two, and those that are too long, are none. */
static void names_that_deceive_are_left_out(void)
{
    struct site site = open_site();
    struct identity other = make_identity(&(struct wish){.name = "a", .names = "DNS:good.example,URI:urn:x y,DNS:last.example", .usage = "clientAuth",
                                                         .from_s = -DAY_S, .until_s = DAY_S, .ca = &site.ca});
    struct pc_tls_context *client = context_of(0, &site.ca, &other);
    struct wire wire = open_wire(site.server, client, SERVER_NAME);
    struct pc_tls_peer peer;

    CHECK_EQ(wire_handshake(&wire), 0);
    CHECK_EQ(pc_tls_peer(wire.ends[0], &peer), 0);
    CHECK(!strcmp(peer.names, "dns:good.example\ndns:last.example\n"));
    close_wire(&wire);
    pc_tls_context_free(client);
    free_identity(&other);
    close_site(&site);
}

enum refuser { SERVER, CLIENT };

/* One end has another certificate, or trusts another CA; the end that refuses says why, and the other learns it. */
static void refuse(const struct site *site, struct pc_tls_context *server, struct pc_tls_context *client, const char *name, enum refuser refuser,
                   const char *why, const char *why_there)
{
    struct wire wire = open_wire(server ? server : site->server, client ? client : site->client, name);
    uint8_t byte;

    (void)wire_handshake(&wire);
    CHECK_EQ(pc_tls_handshake(wire.ends[refuser]), -EPROTO);
    if (!strstr(pc_tls_why(wire.ends[refuser]), why))
        FAIL("\"%s\" does not say \"%s\"", pc_tls_why(wire.ends[refuser]), why);
    (void)carry(&wire);
    if (pc_tls_handshake(wire.ends[!refuser]) == 0) /* a client is done before the server has seen its certificate */
        CHECK_EQ(pc_tls_read(wire.ends[!refuser], &byte, 1), -EPROTO);
    if (!strstr(pc_tls_why(wire.ends[!refuser]), why_there))
        FAIL("\"%s\" does not say \"%s\"", pc_tls_why(wire.ends[!refuser]), why_there);
    CHECK_EQ(pc_tls_read(wire.ends[refuser], &byte, 1), -EPROTO);
    CHECK_EQ(pc_tls_write(wire.ends[refuser], &byte, 1), -EPROTO);
    close_wire(&wire);
    if (server)
        pc_tls_context_free(server);
    if (client)
        pc_tls_context_free(client);
}

static struct pc_tls_context *variant(const struct site *site, int server, const struct wish *changed, const struct identity *trusted)
{
    struct wish wish = *changed;
    struct identity own;
    struct pc_tls_context *context;

    wish.name = server ? "the server" : "the client";
    wish.names = server ? "DNS:" SERVER_NAME : "DNS:client.example";
    wish.usage = wish.usage ? wish.usage : server ? "serverAuth" : "clientAuth";
    wish.from_s = wish.from_s ? wish.from_s : -DAY_S;
    wish.until_s = wish.until_s ? wish.until_s : DAY_S;
    wish.ca = wish.ca ? wish.ca : &site->ca;
    own = make_identity(&wish);
    context = context_of(server, trusted ? trusted : &site->ca, &own);
    free_identity(&own);
    return context;
}

static void who_is_not_let_in(void)
{
    struct site site = open_site();
    struct identity other = make_identity(&(struct wish){.name = "another CA", .from_s = -DAY_S, .until_s = DAY_S});
    struct wish expired = {.until_s = -60}, early = {.from_s = 3600}, of_other = {.ca = &other}, server_only = {.usage = "serverAuth"};

    refuse(&site, NULL, NULL, "other.example", CLIENT, "is not for other.example, but for dns:" SERVER_NAME, "it does not accept the certificate here");
    refuse(&site, NULL, NULL, "127.0.0.2", CLIENT, "is not for 127.0.0.2", "it does not accept the certificate here");
    refuse(&site, variant(&site, 1, &expired, NULL), NULL, SERVER_NAME, CLIENT, "has expired (", "the certificate here has expired");
    refuse(&site, NULL, variant(&site, 0, &expired, NULL), SERVER_NAME, SERVER, "(CN=the client,O=a test\\, only) has expired (", "has expired");
    refuse(&site, NULL, variant(&site, 0, &early, NULL), SERVER_NAME, SERVER, "compare the clocks", "the certificate here");
    refuse(&site, variant(&site, 1, &of_other, NULL), NULL, SERVER_NAME, CLIENT, "not signed by the CA that is trusted here", "does not know the CA");
    refuse(&site, NULL, variant(&site, 0, &of_other, NULL), SERVER_NAME, SERVER, "not signed by the CA that is trusted here", "does not know the CA");
    refuse(&site, NULL, variant(&site, 0, &server_only, NULL), SERVER_NAME, SERVER, "is not one of a TLS client", "the certificate here");
    free_identity(&other);
    close_site(&site);
}

static void addresses_are_names(void)
{
    struct site site = open_site();
    const char *names[] = {"127.0.0.1", "::1", SERVER_NAME};

    for (size_t i = 0; i < 3; i++) {
        struct wire wire = open_wire(site.server, site.client, names[i]);

        CHECK_EQ(wire_handshake(&wire), 0);
        close_wire(&wire);
    }
    close_site(&site);
}

/* A client without a certificate is none of ours: OpenSSL's own. */
static void a_client_without_a_certificate(void)
{
    struct site site = open_site();
    int pair[2];
    struct pc_tls *server;
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    SSL *client = SSL_new(context);

    CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair));
    CHECK_EQ(pc_tls_new(site.server, pair[0], NULL, NULL, 0, &server), 0);
    CHECK(SSL_set_fd(client, pair[1]));
    CHECK(SSL_connect(client) < 0);
    CHECK_EQ(pc_tls_handshake(server), PC_TLS_READABLE);
    (void)SSL_connect(client);
    CHECK_EQ(pc_tls_handshake(server), -EPROTO);
    CHECK(!strcmp(pc_tls_why(server), "the peer has sent no certificate"));
    pc_tls_free(server);
    SSL_free(client);
    SSL_CTX_free(context);
    close(pair[0]);
    close(pair[1]);
    close_site(&site);
}

static void plain_bytes_are_told(void)
{
    struct site site = open_site();

    for (int end = 0; end < 2; end++) {
        struct wire wire = open_wire(site.server, site.client, SERVER_NAME);

        CHECK_EQ(pc_tls_handshake(wire.ends[end]), PC_TLS_READABLE);
        give(&wire, end, "POSTCOPY\n", 9); /* fewer than the header of a record has to be enough */
        CHECK_EQ(pc_tls_handshake(wire.ends[end]), -EPROTO);
        CHECK(!strcmp(pc_tls_why(wire.ends[end]), "the other end does not use TLS (it began with \"POSTCOPY.\"): give --tls DIR on both hosts"));
        close_wire(&wire);
    }
    close_site(&site);
}

static void bad_credentials_are_named(void)
{
    struct site site = open_site();
    struct pem ca = certificate_pem(&site.ca), certificate = certificate_pem(&site.identities[0]), key = key_pem(&site.identities[0], NULL),
               other = key_pem(&site.identities[1], NULL), locked = key_pem(&site.identities[0], "secret");
    struct pem none = {.text = NULL}, half = {.text = certificate.text, .bytes = certificate.bytes / 2};
    const struct {
        struct pem ca, certificate, key;
        const char *why;
    } cases[] = {
        {key, certificate, key, "the CA's certificate cannot be read"},
        {none, certificate, key, "the CA's certificate cannot be read"},
        {half, certificate, key, "the CA's certificate cannot be read"},
        {ca, half, key, "the certificate cannot be used"},
        {ca, key, key, "the certificate cannot be used"},
        {ca, certificate, certificate, "the private key cannot be used"},
        {ca, certificate, other, "the private key"},
        {ca, certificate, locked, "the private key cannot be used"},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct pc_tls_context *context;
        char line[PC_ERROR_BYTES] = "";

        CHECK_EQ(pc_tls_context_new(1, cases[i].ca.text, cases[i].ca.bytes, cases[i].certificate.text, cases[i].certificate.bytes,
                                    cases[i].key.text, cases[i].key.bytes, &context, line, sizeof(line)), -EINVAL);
        if (strncmp(line, cases[i].why, strlen(cases[i].why)))
            FAIL("\"%s\" does not begin with \"%s\"", line, cases[i].why);
        CHECK(!strstr(line, "no reason given"));
    }
    free(ca.text), free(certificate.text), free(key.text), free(other.text), free(locked.text);
    close_site(&site);
}

/* ---- sessions ---- */

static int resumed_with(struct pc_tls_context *server, struct pc_tls_context *client, const char *name, const uint8_t *session, size_t bytes)
{
    struct wire wire = open_wire(server, client, name);
    struct pc_tls_peer peers[2];

    pc_tls_free(wire.ends[1]);
    CHECK_EQ(pc_tls_new(client, wire.inner[1], name, session, bytes, &wire.ends[1]), 0);
    CHECK_EQ(wire_handshake(&wire), 0);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pc_tls_peer(wire.ends[i], &peers[i]), 0);
    CHECK_EQ(peers[0].resumed, peers[1].resumed);
    CHECK(!strcmp(peers[0].subject, "CN=the client,O=a test\\, only") && !strcmp(peers[1].subject, "CN=the server,O=a test\\, only"));
    close_wire(&wire);
    return peers[0].resumed;
}

static void sessions_are_resumed_where_nothing_has_changed(void)
{
    struct site site = open_site();
    struct wire wire = connected(&site);
    uint8_t session[16384];
    size_t bytes = take_session(&wire, session, sizeof(session));
    struct wish same = {.from_s = -DAY_S};
    struct pc_tls_context *renewed_server = context_of(1, &site.ca, &site.identities[0]), *renewed_client = variant(&site, 0, &same, NULL);

    CHECK(bytes > 0 && bytes <= sizeof(session));
    for (int again = 0; again < 3; again++) /* for as many connections as there are */
        CHECK_EQ(resumed_with(site.server, site.client, SERVER_NAME, session, bytes), 1);
    CHECK_EQ(resumed_with(site.server, site.client, "127.0.0.1", session, bytes), 0); /* it was not checked against that name */
    CHECK_EQ(resumed_with(site.server, renewed_client, SERVER_NAME, session, bytes), 0);
    CHECK_EQ(resumed_with(renewed_server, site.client, SERVER_NAME, session, bytes), 0);
    CHECK_EQ(resumed_with(site.server, site.client, SERVER_NAME, session, bytes - 1), 0);
    CHECK_EQ(resumed_with(site.server, site.client, SERVER_NAME, session, 7), 0);
    CHECK_EQ(resumed_with(site.server, site.client, SERVER_NAME, session, 0), 0);
    pc_tls_context_free(renewed_server);
    pc_tls_context_free(renewed_client);
    close_wire(&wire);
    close_site(&site);
}

static int expired(const ASN1_TIME *time)
{
    (void)time;
    return -1;
}

/* Then the session is not resumed: a whole handshake looks at the certificate (which is good here, but for the clock of this test). */
static void no_session_is_resumed_whose_certificate_has_expired(void)
{
    struct site site = open_site();
    struct wire wire = connected(&site);
    __typeof__(pc_openssl.X509_cmp_current_time) clock = pc_openssl.X509_cmp_current_time;
    uint8_t session[16384];
    size_t bytes = take_session(&wire, session, sizeof(session));

    for (int end = 0; end < 2; end++) { /* which of the two finds that */
        struct wire again = open_wire(site.server, site.client, SERVER_NAME);
        struct pc_tls_peer peer;

        pc_tls_free(again.ends[1]);
        if (end)
            pc_openssl.X509_cmp_current_time = expired;
        CHECK_EQ(pc_tls_new(site.client, again.inner[1], SERVER_NAME, session, bytes, &again.ends[1]), 0);
        pc_openssl.X509_cmp_current_time = end ? clock : expired;
        CHECK_EQ(wire_handshake(&again), 0);
        pc_openssl.X509_cmp_current_time = clock;
        for (int i = 0; i < 2; i++) {
            CHECK_EQ(pc_tls_peer(again.ends[i], &peer), 0);
            CHECK_EQ(peer.resumed, 0);
        }
        close_wire(&again);
        CHECK_EQ(resumed_with(site.server, site.client, SERVER_NAME, session, bytes), 1);
    }
    close_wire(&wire);
    close_site(&site);
}

/* ---- where bytes are cut ---- */

#define MESSAGE_BYTES 200

/* Every record arrives byte by byte: a part of one is neither data, nor an end, nor worth another try. */
static void records_cut_at_every_byte(void)
{
    struct site site = open_site();

    for (int end = 0; end < 2; end++) {
        struct wire wire = connected(&site);
        uint8_t sent[MESSAGE_BYTES], cipher[4096], got[MESSAGE_BYTES + 1];
        size_t bytes;

        fill(sent, sizeof(sent));
        for (int i = 0; i < 2; i++)
            CHECK_EQ(pc_tls_read(wire.ends[i], got, 1), -EAGAIN); /* what TLS says of its own after the handshake */
        CHECK_EQ(pc_tls_write(wire.ends[!end], sent, sizeof(sent)), sizeof(sent));
        bytes = take(&wire, !end, cipher, sizeof(cipher));
        CHECK(bytes > sizeof(sent));
        for (size_t i = 0; i < bytes; i++) {
            CHECK_EQ(pc_tls_read(wire.ends[end], got, sizeof(got)), -EAGAIN);
            CHECK(!pc_tls_pending(wire.ends[end]));
            give(&wire, end, &cipher[i], 1);
        }
        CHECK_EQ(pc_tls_read(wire.ends[end], got, sizeof(got)), sizeof(sent));
        CHECK(!memcmp(sent, got, sizeof(sent)));
        CHECK(!pc_tls_pending(wire.ends[end]));
        CHECK_EQ(pc_tls_close_notify(wire.ends[!end]), 0);
        (void)carry(&wire);
        CHECK_EQ(pc_tls_read(wire.ends[end], got, sizeof(got)), 0);
        CHECK_EQ(pc_tls_read(wire.ends[end], got, sizeof(got)), 0);
        CHECK_EQ(pc_tls_write(wire.ends[end], sent, sizeof(sent)), sizeof(sent)); /* the other direction goes on */
        (void)carry(&wire);
        CHECK_EQ(pc_tls_read(wire.ends[!end], got, sizeof(got)), sizeof(sent));
        close_wire(&wire);
    }
    close_site(&site);
}

/* The connection ends inside a record, or between two: cut, and what came before is there. */
static void ends_cut_at_every_byte(void)
{
    struct site site = open_site();
    size_t total = 1;

    for (size_t cut = 0; cut <= total; cut += 1 + test_below(3)) {
        struct wire wire = connected(&site);
        uint8_t sent[MESSAGE_BYTES], cipher[4096], got[MESSAGE_BYTES + 1];
        ssize_t result;

        fill(sent, sizeof(sent));
        CHECK_EQ(pc_tls_write(wire.ends[0], sent, sizeof(sent) / 2), sizeof(sent) / 2);
        CHECK_EQ(pc_tls_write(wire.ends[0], sent + sizeof(sent) / 2, sizeof(sent) / 2), sizeof(sent) / 2);
        total = take(&wire, 0, cipher, sizeof(cipher));
        if (cut > total)
            cut = total;
        give(&wire, 1, cipher, cut);
        close(wire.outer[1]);
        wire.outer[1] = -1;
        result = pc_tls_read(wire.ends[1], got, sizeof(got));
        CHECK_EQ(result, cut < total / 2 ? -EPIPE : (ssize_t)(cut < total ? sizeof(sent) / 2 : sizeof(sent)));
        CHECK(result < 0 || !memcmp(sent, got, (size_t)result));
        CHECK(pc_tls_pending(wire.ends[1]) || poll(&(struct pollfd){.fd = wire.inner[1], .events = POLLIN}, 1, 0) == 1);
        CHECK_EQ(pc_tls_read(wire.ends[1], got, sizeof(got)), -EPIPE);
        CHECK(strstr(pc_tls_why(wire.ends[1]), "was cut"));
        close_wire(&wire);
    }
    close_site(&site);
}

static void damage_is_found(void)
{
    struct site site = open_site();
    struct wire wire = connected(&site);
    uint8_t sent[MESSAGE_BYTES] = {0}, cipher[4096], got[MESSAGE_BYTES];
    size_t bytes;

    CHECK_EQ(pc_tls_write(wire.ends[0], sent, sizeof(sent)), sizeof(sent));
    bytes = take(&wire, 0, cipher, sizeof(cipher));
    cipher[5 + test_below(bytes - 5)] ^= (uint8_t)(1 << test_below(8));
    give(&wire, 1, cipher, bytes);
    CHECK_EQ(pc_tls_read(wire.ends[1], got, sizeof(got)), -EPROTO);
    CHECK(strstr(pc_tls_why(wire.ends[1]), "TLS failed: "));
    (void)carry(&wire);
    CHECK_EQ(pc_tls_read(wire.ends[0], got, sizeof(got)), -EPROTO); /* by the alert */
    close_wire(&wire);
    close_site(&site);
}

/* A handshake may end anywhere; some hundred places of it. */
static void handshakes_cut_anywhere(void)
{
    struct site site = open_site();
    bool done = false;

    for (size_t cut = 0; !done; cut += 1 + test_below(40)) {
        struct wire wire = open_wire(site.server, site.client, SERVER_NAME);
        int results[2] = {1, 1};
        size_t left = cut;
        bool any = true;

        while (any) {
            any = false;
            for (int i = 0; i < 2; i++)
                if (results[i] > 0)
                    results[i] = pc_tls_handshake(wire.ends[i]);
            for (int from = 0; from < 2; from++) {
                uint8_t bytes[8192];
                size_t got = take(&wire, from, bytes, left < sizeof(bytes) ? left : sizeof(bytes));

                give(&wire, !from, bytes, got);
                left -= got;
                any = any || got;
            }
        }
        done = results[0] == 0;
        for (int i = 0; i < 2; i++)
            CHECK_SYS(shutdown(wire.outer[i], SHUT_WR));
        for (int i = 0; i < 2 && !done; i++)
            if (results[i] > 0) {
                CHECK_EQ(pc_tls_handshake(wire.ends[i]), -EPIPE);
                CHECK(!strcmp(pc_tls_why(wire.ends[i]), "the connection ended during the TLS handshake"));
            }
        close_wire(&wire);
    }
    close_site(&site);
}

/* ---- what TLS says of its own ---- */

/* A peer that does as it likes, on OpenSSL itself. */
struct stranger {
    SSL_CTX *context;
    SSL *ssl;
    struct pc_tls *ours;
    int pair[2];
};

static struct stranger open_stranger(const struct site *site)
{
    struct stranger stranger = {.context = SSL_CTX_new(TLS_client_method())};

    CHECK(SSL_CTX_use_certificate(stranger.context, site->identities[1].certificate));
    CHECK(SSL_CTX_use_PrivateKey(stranger.context, site->identities[1].key));
    stranger.ssl = SSL_new(stranger.context);
    CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, stranger.pair));
    CHECK_EQ(pc_tls_new(site->server, stranger.pair[0], NULL, NULL, 0, &stranger.ours), 0);
    CHECK(SSL_set_fd(stranger.ssl, stranger.pair[1]));
    CHECK(SSL_connect(stranger.ssl) < 0);
    CHECK_EQ(pc_tls_handshake(stranger.ours), PC_TLS_READABLE);
    CHECK_EQ(SSL_connect(stranger.ssl), 1);
    CHECK_EQ(pc_tls_handshake(stranger.ours), 0);
    return stranger;
}

static void close_stranger(struct stranger *stranger)
{
    pc_tls_free(stranger->ours);
    SSL_free(stranger->ssl);
    SSL_CTX_free(stranger->context);
    close(stranger->pair[0]);
    close(stranger->pair[1]);
}

static void change_keys(const struct stranger *stranger, int times, int how)
{
    for (int i = 0; i < times; i++)
        CHECK(SSL_key_update(stranger->ssl, how) && SSL_do_handshake(stranger->ssl) == 1);
}

static void keys_may_change(void)
{
    struct site site = open_site();
    struct stranger stranger = open_stranger(&site);
    char got[16];

    for (int round = 0; round < 40; round++) {
        change_keys(&stranger, 3, round % 2 ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED);
        CHECK_EQ(pc_tls_read(stranger.ours, got, sizeof(got)), -EAGAIN); /* no data, and no wait for it */
        CHECK(!pc_tls_pending(stranger.ours));
        CHECK_EQ(SSL_write(stranger.ssl, "hello", 5), 5);
        CHECK_EQ(pc_tls_read(stranger.ours, got, sizeof(got)), 5);
        CHECK_EQ(pc_tls_write(stranger.ours, "there", 5), 5);
        CHECK_EQ(SSL_read(stranger.ssl, got, sizeof(got)), 5);
        CHECK(!memcmp(got, "there", 5));
    }
    close_stranger(&stranger);
    close_site(&site);
}

static void a_flood_of_keys_ends_the_connection(void)
{
    struct site site = open_site();

    for (int apart = 0; apart < 2; apart++) { /* in one read, and each in one of its own */
        struct stranger stranger = open_stranger(&site);
        char got[16];
        int64_t result = -EAGAIN;

        if (!apart) {
            change_keys(&stranger, 100, SSL_KEY_UPDATE_REQUESTED); /* as many as its socket takes */
            CHECK_EQ(SSL_write(stranger.ssl, "hello", 5), 5);
            result = pc_tls_read(stranger.ours, got, sizeof(got));
        }
        for (int i = 0; i < 100 && result == -EAGAIN; i++) {
            change_keys(&stranger, 1, SSL_KEY_UPDATE_NOT_REQUESTED);
            result = pc_tls_read(stranger.ours, got, sizeof(got));
        }
        CHECK_EQ(result, -EPROTO);
        CHECK(!strcmp(pc_tls_why(stranger.ours), "the peer sent more than 32 messages of TLS in a row"));
        close_stranger(&stranger);
    }
    close_site(&site);
}

/* A peer that asks for new keys and never reads the answers gets no more of them, also from a thread that may wait. */
static void a_read_waits_for_no_room(void)
{
    struct site site = open_site();

    for (int wait = 0; wait < 2; wait++) {
        struct stranger stranger = open_stranger(&site);
        char got[16];
        ssize_t result;

        CHECK_SYS(setsockopt(stranger.pair[0], SOL_SOCKET, SO_SNDBUF, &(int){1}, sizeof(int)));
        do {
            change_keys(&stranger, 1, SSL_KEY_UPDATE_REQUESTED);
            CHECK_EQ(SSL_write(stranger.ssl, "hello", 5), 5);
            result = pc_tls_receive(stranger.ours, got, sizeof(got), wait);
        } while (result == 5);
        CHECK_EQ(result, -EPROTO);
        CHECK(!strcmp(pc_tls_why(stranger.ours), "the peer asks for new keys and does not read the answers"));
        close_stranger(&stranger);
    }
    close_site(&site);
}

static int enlarge_ticket(SSL *ssl, void *argument)
{
    static const char much[20000];

    (void)argument;
    return SSL_SESSION_set1_ticket_appdata(SSL_get_session(ssl), much, sizeof(much));
}

static SSL_TICKET_RETURN use_ticket(SSL *ssl, SSL_SESSION *session, const unsigned char *name, size_t bytes, SSL_TICKET_STATUS status,
                                    void *argument)
{
    (void)ssl, (void)session, (void)name, (void)bytes, (void)status, (void)argument;
    return SSL_TICKET_RETURN_IGNORE;
}

/* A server whose ticket is two records long: between them a write is neither possible nor worth a wait. */
static void a_write_waits_for_no_bytes(void)
{
    struct site site = open_site();

    for (int how = 0; how < 3; how++) { /* both records; one, and a write that does not wait; one, and a write that does */
        struct wire wire = open_wire(site.server, site.client, SERVER_NAME);
        SSL_CTX *context = SSL_CTX_new(TLS_server_method());
        SSL *server = NULL;
        struct iovec part = {.iov_base = (char[]){"hello"}, .iov_len = 5};
        uint8_t cipher[65536], byte;
        size_t bytes, first;

        CHECK(SSL_CTX_use_certificate(context, site.identities[0].certificate) && SSL_CTX_use_PrivateKey(context, site.identities[0].key));
        CHECK(SSL_CTX_set_session_ticket_cb(context, enlarge_ticket, use_ticket, NULL) && SSL_CTX_set_num_tickets(context, 1));
        CHECK((server = SSL_new(context)) && SSL_set_fd(server, wire.inner[0]));
        CHECK_SYS(fcntl(wire.inner[0], F_SETFL, O_NONBLOCK));
        CHECK_EQ(pc_tls_handshake(wire.ends[1]), PC_TLS_READABLE);
        CHECK(carry(&wire) && SSL_accept(server) < 0 && carry(&wire));
        CHECK_EQ(pc_tls_handshake(wire.ends[1]), 0);
        CHECK(carry(&wire));
        CHECK_EQ(SSL_accept(server), 1);
        bytes = take(&wire, 0, cipher, sizeof(cipher));
        first = 5 + ((size_t)cipher[3] << 8 | cipher[4]);
        CHECK(first < bytes);
        give(&wire, 1, cipher, how ? first : bytes);
        CHECK_EQ(pc_tls_read(wire.ends[1], &byte, 1), -EAGAIN);
        CHECK(!pc_tls_pending(wire.ends[1]));
        CHECK_EQ(pc_tls_send(wire.ends[1], &part, 1, how == 2), how ? -EPROTO : 5);
        CHECK(!strcmp(pc_tls_why(wire.ends[1]), how ? "the peer sent a part of a message of TLS, and not the rest" : ""));
        CHECK(how || pc_tls_session(wire.ends[1], NULL, 0) > 20000);
        SSL_free(server);
        SSL_CTX_free(context);
        close_wire(&wire);
    }
    close_site(&site);
}

/* A key is left before it has made more records than it is good for. */
static void keys_are_renewed_in_time(void)
{
    enum { RECORDS = 10, BEFORE = 4, BYTES = 100, OVERHEAD = 5 + 1 + 16, KEY_UPDATE_BYTES = 5 };
    struct site site = open_site();

    for (int from = 0; from < 2; from++) {
        struct wire wire = connected(&site);
        uint8_t sent[BYTES], got[BYTES], cipher[RECORDS * (BYTES + 2 * OVERHEAD)];
        size_t bytes, record = 0, updates = 0;

        (void)take_session(&wire, NULL, 0);
        wire.ends[from]->records = PC_TLS_KEY_RECORDS - BEFORE;
        for (int i = 0; i < RECORDS; i++) {
            memset(sent, i, sizeof(sent));
            CHECK_EQ(pc_tls_write(wire.ends[from], sent, sizeof(sent)), sizeof(sent));
        }
        CHECK_EQ(wire.ends[from]->records, RECORDS - BEFORE);
        bytes = take(&wire, from, cipher, sizeof(cipher));
        for (size_t at = 0; at < bytes; record++) {
            size_t length = 5 + ((size_t)cipher[at + 3] << 8 | cipher[at + 4]);

            if (length == KEY_UPDATE_BYTES + OVERHEAD) {
                CHECK_EQ(record, BEFORE);
                updates++;
            }
            at += length;
        }
        CHECK_EQ(updates, 1);
        give(&wire, !from, cipher, bytes);
        for (int i = 0; i < RECORDS; i++) {
            memset(sent, i, sizeof(sent));
            CHECK_EQ(pc_tls_read(wire.ends[!from], got, sizeof(got)), sizeof(got));
            CHECK(!memcmp(sent, got, sizeof(got)));
        }
        close_wire(&wire);
    }
    close_site(&site);
}

/* ---- amounts ---- */

/* Random pieces both ways over sockets that take little: nothing is lost, doubled, or waits although it could go on. */
static void every_byte_arrives_once(void)
{
    struct site site = open_site();
    struct pc_tls *ends[2];
    int pair[2];
    uint8_t *sent[2], *got[2];
    size_t written[2] = {0}, read[2] = {0};

    tcp_pair(pair);
    for (int i = 0; i < 2; i++) {
        CHECK_SYS(setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &(int){16384}, sizeof(int)));
        sent[i] = malloc(DATA_BYTES);
        got[i] = malloc(DATA_BYTES);
        CHECK(sent[i] && got[i]);
        fill(sent[i], DATA_BYTES);
    }
    tls_ends(&site, pair, ends);
    while (read[0] < DATA_BYTES || read[1] < DATA_BYTES) {
        int end = (int)test_below(2);
        int64_t result;

        if (test_below(2) && written[end] < DATA_BYTES) {
            size_t most = DATA_BYTES - written[end], some = 1 + test_below(test_below(2) ? 100 : 200000);

            result = pc_tls_write(ends[end], sent[end] + written[end], some < most ? some : most);
            if (result > 0)
                written[end] += (size_t)result;
        } else if (read[end] < DATA_BYTES) {
            size_t most = DATA_BYTES - read[end], some = 1 + test_below(test_below(2) ? 100 : 50000);

            result = pc_tls_read(ends[end], got[end] + read[end], some < most ? some : most);
            if (result > 0)
                read[end] += (size_t)result;
            else
                CHECK(!pc_tls_pending(ends[end]));
        } else {
            continue;
        }
        if (result <= 0 && result != -EAGAIN)
            FAIL("%lld: %s", (long long)result, pc_tls_why(ends[end]));
        CHECK(read[!end] <= written[end] + 65536);
    }
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(written[i], DATA_BYTES);
        CHECK(!memcmp(sent[i], got[!i], DATA_BYTES));
        CHECK_EQ(pc_tls_read(ends[i], &(uint8_t){0}, 1), -EAGAIN);
    }
    for (int i = 0; i < 2; i++) {
        pc_tls_free(ends[i]);
        close(pair[i]);
        free(sent[i]);
        free(got[i]);
    }
    close_site(&site);
}

/* ---- streams ---- */

static void open_streams(const struct site *site, struct pc_stream streams[2])
{
    struct pc_tls *ends[2];
    int pair[2];

    tcp_pair(pair);
    tls_ends(site, pair, ends);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pc_stream_open(&streams[i], pair[i], ends[i], i), 0);
}

struct transfer {
    struct pc_stream *stream;
    uint64_t seed;
    int error;
};

#define PARTS 7

static void *send_much(void *argument)
{
    struct transfer *transfer = argument;
    static const size_t sizes[PARTS] = {40, 4096, 0, 40, 100000, 1, 16384};
    uint8_t *data = malloc(DATA_BYTES);
    struct iovec parts[PARTS];
    size_t at = 0;

    CHECK(data != NULL);
    memset(data, (int)transfer->seed, DATA_BYTES);
    for (int i = 0; i < PARTS; i++) {
        parts[i] = (struct iovec){.iov_base = data + at, .iov_len = sizes[i]};
        at += sizes[i];
    }
    for (int round = 0; round < 20 && !transfer->error; round++) {
        struct iovec again[PARTS];

        memcpy(again, parts, sizeof(parts));
        transfer->error = pc_stream_write_all(transfer->stream, again, PARTS);
    }
    pc_stream_end(transfer->stream);
    free(data);
    return NULL;
}

static void *receive_much(void *argument)
{
    struct transfer *transfer = argument;
    uint8_t data[5000];
    size_t total = 0;

    for (;;) {
        ssize_t got = transfer->stream->read(transfer->stream, data, sizeof(data), true);

        if (got <= 0) {
            transfer->error = (int)got;
            break;
        }
        for (ssize_t i = 0; i < got; i++)
            CHECK_EQ(data[i], transfer->seed);
        total += (size_t)got;
    }
    CHECK_EQ(total, 20 * (40 + 4096 + 40 + 100000 + 1 + 16384));
    return NULL;
}

/* Connections of the same two contexts, each in two threads, in both directions. */
static void many_at_a_time(void)
{
    enum { MANY = 6 };
    struct site site = open_site();
    struct pc_stream streams[MANY][2];
    struct transfer transfers[MANY][2];
    pthread_t threads[MANY][2];

    for (uint64_t i = 0; i < MANY; i++) {
        open_streams(&site, streams[i]);
        for (int j = 0; j < 2; j++) {
            transfers[i][j] = (struct transfer){.stream = &streams[i][j], .seed = i};
            CHECK_EQ(pthread_create(&threads[i][j], NULL, (uint64_t)j == i % 2 ? send_much : receive_much, &transfers[i][j]), 0);
        }
    }
    for (int i = 0; i < MANY; i++)
        for (int j = 0; j < 2; j++) {
            CHECK_EQ(pthread_join(threads[i][j], NULL), 0);
            CHECK_EQ(transfers[i][j].error, 0); /* the end was an orderly one */
            pc_stream_close(&streams[i][j]);
        }
    close_site(&site);
}

static void *read_one(void *argument)
{
    struct transfer *transfer = argument;
    uint8_t byte;

    transfer->error = (int)transfer->stream->read(transfer->stream, &byte, 1, true);
    return NULL;
}

static void *write_until_it_ends(void *argument)
{
    struct transfer *transfer = argument;
    static uint8_t data[DATA_BYTES]; /* more than a connection keeps */
    struct iovec part;

    do {
        part = (struct iovec){.iov_base = data, .iov_len = sizeof(data)};
        transfer->error = pc_stream_write_all(transfer->stream, &part, 1);
    } while (!transfer->error);
    return NULL;
}

/* Another thread ends a read that waits; the peer sees an orderly end. And a write that waits; the peer sees a cut. */
static void waiting_threads_can_be_ended(void)
{
    struct site site = open_site();

    for (int writing = 0; writing < 2; writing++) {
        struct pc_stream streams[2];
        struct transfer transfer = {.stream = &streams[0]};
        pthread_t thread;
        uint8_t *data = malloc(1 << 20);
        ssize_t got;

        CHECK(data != NULL);
        open_streams(&site, streams);
        CHECK_EQ(pthread_create(&thread, NULL, writing ? write_until_it_ends : read_one, &transfer), 0);
        if (writing) /* until it has filled the socket, or is about to: either is to end it */
            CHECK_EQ(pc_stream_read_all(&streams[1], data, 1 << 20), 0);
        pc_stream_shutdown(&streams[0]);
        CHECK_EQ(pthread_join(thread, NULL), 0);
        CHECK_EQ(transfer.error, writing ? -EPIPE : 0);
        pc_stream_close(&streams[0]);
        do
            got = streams[1].read(&streams[1], data, 1 << 20, true);
        while (got > 0);
        if (!writing)
            CHECK_EQ(got, 0);
        pc_stream_close(&streams[1]);
        free(data);
    }
    close_site(&site);
}

static void a_stream_needs_its_handshake(void)
{
    struct site site = open_site();
    struct pc_stream stream;
    struct pc_tls *tls;
    int pair[2];

    tcp_pair(pair);
    CHECK_EQ(pc_tls_new(site.server, pair[0], NULL, NULL, 0, &tls), 0);
    CHECK_EQ(pc_stream_open(&stream, pair[0], tls, false), -ENOTCONN);
    CHECK_EQ(recv(pair[1], &(char){0}, 1, 0), 0); /* it is closed */
    close(pair[1]);
    CHECK_EQ(pc_tls_new(site.server, 0, SERVER_NAME, NULL, 0, &tls), -EINVAL);
    CHECK_EQ(pc_tls_new(site.client, 0, NULL, NULL, 0, &tls), -EINVAL);
    close_site(&site);
}

/* The other process's socket: the same bytes, an orderly end either way. */
static void a_relay_carries_both_ways(void)
{
    struct site site = open_site();

    for (int who_ends = 0; who_ends < 2; who_ends++) {
        struct pc_tls *ends[2];
        struct pc_stream ours[2];
        struct transfer out, in;
        pthread_t threads[2];
        int pair[2], plain;
        uint8_t byte;

        tcp_pair(pair);
        tls_ends(&site, pair, ends);
        plain = pc_tls_relay(pair[0], ends[0], 1);
        CHECK(plain >= 0);
        CHECK_EQ(pc_stream_open(&ours[0], plain, NULL, false), 0);
        CHECK_EQ(pc_stream_open(&ours[1], pair[1], ends[1], false), 0);
        CHECK_EQ(pc_stream_write_all(&ours[who_ends], &(struct iovec){.iov_base = "x", .iov_len = 1}, 1), 0);
        CHECK_EQ(pc_stream_read_all(&ours[!who_ends], &byte, 1), 0);
        CHECK_EQ(byte, 'x');
        out = (struct transfer){.stream = &ours[who_ends], .seed = 5};
        in = (struct transfer){.stream = &ours[!who_ends], .seed = 5};
        CHECK_EQ(pthread_create(&threads[0], NULL, send_much, &out), 0);
        CHECK_EQ(pthread_create(&threads[1], NULL, receive_much, &in), 0);
        for (int i = 0; i < 2; i++)
            CHECK_EQ(pthread_join(threads[i], NULL), 0);
        CHECK_EQ(out.error, 0);
        CHECK_EQ(in.error, 0);
        for (int i = 0; i < 2; i++)
            pc_stream_close(&ours[i]);
    }
    close_site(&site);
}

/* Whether the thread of that name is asleep, as often as one looks: one that turns in a circle is not. */
static bool sleeps(const char *name)
{
    DIR *tasks = opendir("/proc/self/task");
    const struct dirent *entry;
    bool asleep = false;

    CHECK(tasks != NULL);
    while ((entry = readdir(tasks))) {
        char path[PATH_MAX], text[512] = "";
        FILE *file;

        (void)snprintf(path, sizeof(path), "/proc/self/task/%s/stat", entry->d_name);
        file = fopen(path, "re");
        if (file && fgets(text, sizeof(text), file) && strstr(text, name))
            asleep = strstr(text, ") S ") != NULL;
        if (file)
            (void)fclose(file);
    }
    (void)closedir(tasks);
    return asleep;
}

static void wait_until_it_sleeps(const char *name)
{
    for (int times = 0; times < 50; times++) /* the case has a deadline */
        if (!sleeps(name))
            times = 0;
}

/* The process does not read what the peer has sent, and the peer resets the connection: the relay waits for the process. */
static void a_relay_waits_in_peace(void)
{
    struct site site = open_site();
    struct pc_tls *ends[2];
    static uint8_t data[DATA_BYTES];
    int64_t result;
    int pair[2], plain;

    tcp_pair(pair);
    tls_ends(&site, pair, ends);
    plain = pc_tls_relay(pair[0], ends[0], 1);
    CHECK(plain >= 0);
    do {
        while (pc_tls_write(ends[1], data, sizeof(data)) > 0) {
        }
        wait_until_it_sleeps("(pc-relay");
        result = pc_tls_write(ends[1], data, sizeof(data));
    } while (result > 0);
    CHECK_EQ(result, -EAGAIN);
    CHECK_SYS(setsockopt(pair[1], SOL_SOCKET, SO_LINGER, &(struct linger){.l_onoff = 1}, sizeof(struct linger)));
    pc_tls_free(ends[1]);
    close(pair[1]);
    wait_until_it_sleeps("(pc-relay");
    while (recv(plain, data, sizeof(data), 0) > 0) { /* it goes on, and ends */
    }
    close(plain);
    close_site(&site);
}

int main(int argc, char **argv)
{
    char line[PC_ERROR_BYTES];

    test_begin(argc, argv);
    if (pc_tls_available(line, sizeof(line))) /* before the cases: each is a process of its own */
        FAIL("%s", line);
    RUN(both_learn_who_the_other_is);
    RUN(names_that_deceive_are_left_out);
    RUN(who_is_not_let_in);
    RUN(addresses_are_names);
    RUN(a_client_without_a_certificate);
    RUN(plain_bytes_are_told);
    RUN(bad_credentials_are_named);
    RUN(sessions_are_resumed_where_nothing_has_changed);
    RUN(no_session_is_resumed_whose_certificate_has_expired);
    RUN(records_cut_at_every_byte);
    RUN(ends_cut_at_every_byte);
    RUN(damage_is_found);
    RUN(handshakes_cut_anywhere);
    RUN(keys_may_change);
    RUN(a_flood_of_keys_ends_the_connection);
    RUN(a_read_waits_for_no_room);
    RUN(a_write_waits_for_no_bytes);
    RUN(keys_are_renewed_in_time);
    RUN(every_byte_arrives_once);
    RUN(many_at_a_time);
    RUN(waiting_threads_can_be_ended);
    RUN(a_stream_needs_its_handshake);
    RUN(a_relay_carries_both_ways);
    RUN(a_relay_waits_in_peace);
    return test_end();
}
