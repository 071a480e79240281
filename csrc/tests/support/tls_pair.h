/* SPDX-License-Identifier: Apache-2.0
 *
 * Certificates that are made when they are needed, and two ends of one TLS connection over loopback, for tests of the data plane.
 */
#ifndef PC_TLS_PAIR_H
#define PC_TLS_PAIR_H

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>
#include <poll.h>

#include "postcopy/core.h"
#include "postcopy/tls.h"
#include "tests/support/tcp_pair.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

struct pem {
    char *text;
    size_t bytes;
};

struct identity { /* a certificate and its key */
    EVP_PKEY *key;
    X509 *certificate;
};

struct wish {
    const char *name, *names, *usage; /* common name; SANs and extended key usage as in openssl.cnf, or NULL; */
    long from_s, until_s;             /* from now; */
    const struct identity *ca;        /* NULL: a CA itself */
};

#define DAY_S 86400L

static void add_extension(X509 *certificate, X509 *issuer, int nid, const char *value)
{
    X509V3_CTX context;
    X509_EXTENSION *extension;

    X509V3_set_ctx(&context, issuer, certificate, NULL, NULL, 0);
    extension = X509V3_EXT_conf_nid(NULL, &context, nid, value);
    CHECK(extension && X509_add_ext(certificate, extension, -1));
    X509_EXTENSION_free(extension);
}

static struct identity make_identity(const struct wish *wish)
{
    struct identity made = {.key = EVP_EC_gen("P-256"), .certificate = X509_new()};
    X509 *certificate = made.certificate, *issuer = wish->ca ? wish->ca->certificate : certificate;
    X509_NAME *subject = X509_get_subject_name(certificate);

    CHECK(made.key && certificate);
    CHECK(X509_set_version(certificate, 2) && ASN1_INTEGER_set_uint64(X509_get_serialNumber(certificate), test_random() >> 1));
    CHECK(X509_gmtime_adj(X509_getm_notBefore(certificate), wish->from_s) && X509_gmtime_adj(X509_getm_notAfter(certificate), wish->until_s));
    CHECK(X509_NAME_add_entry_by_txt(subject, "O", MBSTRING_ASC, (const unsigned char *)"a test, only", -1, -1, 0));
    CHECK(X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, (const unsigned char *)wish->name, -1, -1, 0));
    CHECK(X509_set_issuer_name(certificate, X509_get_subject_name(issuer)) && X509_set_pubkey(certificate, made.key));
    add_extension(certificate, issuer, NID_basic_constraints, wish->ca ? "critical,CA:FALSE" : "critical,CA:TRUE");
    if (wish->names)
        add_extension(certificate, issuer, NID_subject_alt_name, wish->names);
    if (wish->usage)
        add_extension(certificate, issuer, NID_ext_key_usage, wish->usage);
    CHECK(X509_sign(certificate, wish->ca ? wish->ca->key : made.key, EVP_sha256()));
    return made;
}

static void free_identity(struct identity *identity)
{
    X509_free(identity->certificate);
    EVP_PKEY_free(identity->key);
}

static struct pem taken_from(BIO *memory)
{
    struct pem pem;
    char *text;

    pem.bytes = (size_t)BIO_get_mem_data(memory, &text);
    pem.text = malloc(pem.bytes + 1);
    CHECK(pem.text != NULL);
    memcpy(pem.text, text, pem.bytes);
    pem.text[pem.bytes] = '\0';
    BIO_free(memory);
    return pem;
}

static struct pem certificate_pem(const struct identity *identity)
{
    BIO *memory = BIO_new(BIO_s_mem());

    CHECK(PEM_write_bio_X509(memory, identity->certificate));
    return taken_from(memory);
}

static struct pem key_pem(const struct identity *identity, const char *password)
{
    BIO *memory = BIO_new(BIO_s_mem());

    CHECK(PEM_write_bio_PrivateKey(memory, identity->key, password ? EVP_aes_128_cbc() : NULL, NULL, 0, NULL, (void *)(uintptr_t)password));
    return taken_from(memory);
}

static struct pc_tls_context *context_of(int server, const struct identity *ca, const struct identity *own)
{
    struct pem trusted = certificate_pem(ca), certificate = certificate_pem(own), key = key_pem(own, NULL);
    struct pc_tls_context *context;
    char line[PC_ERROR_BYTES];

    if (pc_tls_context_new(server, trusted.text, trusted.bytes, certificate.text, certificate.bytes, key.text, key.bytes, &context, line,
                           sizeof(line)))
        FAIL("%s", line);
    free(trusted.text);
    free(certificate.text);
    free(key.text);
    return context;
}

/* A CA, and what a server and a client of it have. */
struct site {
    struct identity ca, identities[2];
    struct pc_tls_context *server, *client;
};

#define SERVER_NAME "server.example"

static struct site open_site(void)
{
    struct site site = {.ca = make_identity(&(struct wish){.name = "CA", .from_s = -DAY_S, .until_s = DAY_S})};

    site.identities[0] = make_identity(&(struct wish){.name = "the server", .names = "DNS:" SERVER_NAME ",IP:127.0.0.1,IP:::1",
                                                      .usage = "serverAuth", .from_s = -DAY_S, .until_s = DAY_S, .ca = &site.ca});
    site.identities[1] = make_identity(&(struct wish){.name = "the client", .names = "DNS:client.example,URI:postcopy:host/client",
                                                      .usage = "clientAuth", .from_s = -DAY_S, .until_s = DAY_S, .ca = &site.ca});
    site.server = context_of(1, &site.ca, &site.identities[0]);
    site.client = context_of(0, &site.ca, &site.identities[1]);
    return site;
}

static void close_site(struct site *site)
{
    pc_tls_context_free(site->server);
    pc_tls_context_free(site->client);
    free_identity(&site->identities[0]);
    free_identity(&site->identities[1]);
    free_identity(&site->ca);
}

/* Drives a handshake for as long as the socket says that there is something to do; what pc_tls_handshake said last. */
static int handshake(struct pc_tls *ends[2], const int pair[2])
{
    int results[2] = {PC_TLS_READABLE, PC_TLS_READABLE};

    while (results[0] > 0 || results[1] > 0) {
        struct pollfd ready[2];

        for (int i = 0; i < 2; i++)
            if (results[i] > 0)
                results[i] = pc_tls_handshake(ends[i]);
        for (int i = 0; i < 2; i++)
            ready[i] = (struct pollfd){.fd = results[i] > 0 ? pair[i] : -1, .events = results[i] == PC_TLS_WRITABLE ? POLLOUT : POLLIN};
        if (results[0] < 0 || results[1] < 0)
            break;
        if (results[0] > 0 || results[1] > 0)
            CHECK(CHECK_SYS(poll(ready, 2, 10000)) > 0);
    }
    return results[0] < 0 ? results[0] : results[1];
}

/* The first end is the server's. */
static void tls_ends(const struct site *site, const int pair[2], struct pc_tls *ends[2])
{
    CHECK_EQ(pc_tls_new(site->server, pair[0], NULL, NULL, 0, &ends[0]), 0);
    CHECK_EQ(pc_tls_new(site->client, pair[1], SERVER_NAME, NULL, 0, &ends[1]), 0);
    if (handshake(ends, pair))
        FAIL("server: %s; client: %s", pc_tls_why(ends[0]), pc_tls_why(ends[1]));
}

#pragma GCC diagnostic pop

#endif
