/* SPDX-License-Identifier: Apache-2.0
 *
 * The library, and contexts: a host's credentials for one role.
 */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "core/library.h"
#include "core/util.h"
#include "postcopy/tls.h"
#include "tls/connection.h"

#define LIBRARY "libssl.so.3"
#define PACKAGE "libssl3"
/* AES-128 first: the fastest where the processor has instructions for it. */
#define CIPHERS "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
/* How long a session may be resumed: a migration that was paused overnight recovers with it. */
#define SESSION_S (24 * 3600)
#define READ_BYTES (64 * 1024) /* asked of the socket at once: some records */

struct pc_openssl pc_openssl;
BIO_METHOD *pc_tls_bio_method;

static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static bool loaded; /* atomic; set when the functions are */

#define PC_OPENSSL_FUNCTION(function) {#function, &pc_openssl.function},
static const struct pc_function functions[] = {PC_OPENSSL_FUNCTIONS(PC_OPENSSL_FUNCTION){NULL, NULL}};

/* Under `loading`. */
static int load(char *error, size_t error_bytes)
{
    const char *missing = pc_library_load(LIBRARY, functions);

    if (missing)
        return pc_fail(ENOENT, error, error_bytes, "no TLS: %s cannot be loaded, or is not OpenSSL 3 (%s); Debian: apt-get install %s",
                       LIBRARY, missing, PACKAGE);
    /* Not cleaned up when the process exits: its threads may still be at work. */
    if (!pc_openssl.OPENSSL_init_ssl(OPENSSL_INIT_NO_ATEXIT, NULL) || !(pc_tls_bio_method = pc_tls_new_bio_method()))
        return pc_fail(ENOENT, error, error_bytes, "no TLS: %s cannot be initialised; look into the openssl.cnf of this host", LIBRARY);
    return 0;
}

int pc_tls_available(char *error, size_t error_bytes)
{
    int result = 0;

    if (__atomic_load_n(&loaded, __ATOMIC_ACQUIRE))
        return 0;
    pthread_mutex_lock(&loading);
    if (!loaded) {
        result = load(error, error_bytes);
        __atomic_store_n(&loaded, !result, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&loading);
    return result;
}

/* ---- credentials ---- */

/* A key that has to be decrypted is refused, rather than asked about at the terminal. */
static int no_password(char *buffer, int bytes, int writing, void *argument)
{
    (void)buffer;
    (void)bytes;
    (void)writing;
    (void)argument;
    return -1;
}

static const char *reason(void)
{
    const char *text = pc_openssl.ERR_reason_error_string(pc_openssl.ERR_peek_last_error());

    return text ? text : "no reason given";
}

/* Each certificate of a PEM text is given to `take`, which owns it and returns whether it took it. How many; -1: one was not. */
static int each_certificate(const void *pem, size_t bytes, SSL_CTX *openssl, bool (*take)(SSL_CTX *openssl, X509 *certificate, int number))
{
    BIO *text = bytes <= INT_MAX ? pc_openssl.BIO_new_mem_buf(pem, (int)bytes) : NULL;
    X509 *certificate;
    int count = 0;

    while (text && count >= 0 && (certificate = pc_openssl.PEM_read_bio_X509(text, NULL, no_password, NULL)))
        count = take(openssl, certificate, count) ? count + 1 : -1;
    if (text)
        pc_openssl.BIO_free(text);
    if (count <= 0) /* and why is in the queue of errors */
        return count;
    if (ERR_GET_REASON(pc_openssl.ERR_peek_last_error()) != PEM_R_NO_START_LINE)
        return -1; /* it ended for another reason than its end */
    pc_openssl.ERR_clear_error();
    return count;
}

static bool take_ca(SSL_CTX *openssl, X509 *certificate, int number)
{
    bool taken = pc_openssl.X509_STORE_add_cert(pc_openssl.SSL_CTX_get_cert_store(openssl), certificate);

    (void)number;
    pc_openssl.X509_free(certificate);
    return taken;
}

static bool take_own(SSL_CTX *openssl, X509 *certificate, int number)
{
    bool taken = number ? pc_openssl.SSL_CTX_ctrl(openssl, SSL_CTRL_CHAIN_CERT, 1, certificate)
                        : pc_openssl.SSL_CTX_use_certificate(openssl, certificate);

    pc_openssl.X509_free(certificate);
    return taken;
}

static bool take_key(SSL_CTX *openssl, const void *pem, size_t bytes)
{
    BIO *text = bytes <= INT_MAX ? pc_openssl.BIO_new_mem_buf(pem, (int)bytes) : NULL;
    EVP_PKEY *key = text ? pc_openssl.PEM_read_bio_PrivateKey(text, NULL, no_password, NULL) : NULL;
    bool taken = key && pc_openssl.SSL_CTX_use_PrivateKey(openssl, key);

    if (key)
        pc_openssl.EVP_PKEY_free(key);
    if (text)
        pc_openssl.BIO_free(text);
    return taken;
}

static int set_credentials(struct pc_tls_context *context, const void *ca, size_t ca_bytes, const void *certificate,
                           size_t certificate_bytes, const void *key, size_t key_bytes, char *error, size_t error_bytes)
{
    SSL_CTX *openssl = context->openssl;

    if (each_certificate(ca, ca_bytes, openssl, take_ca) <= 0)
        return pc_fail(EINVAL, error, error_bytes, "the CA's certificate cannot be read: %s", reason());
    if (each_certificate(certificate, certificate_bytes, openssl, take_own) <= 0)
        return pc_fail(EINVAL, error, error_bytes, "the certificate cannot be used: %s", reason());
    if (!take_key(openssl, key, key_bytes))
        return pc_fail(EINVAL, error, error_bytes, "the private key cannot be used: %s", reason());
    if (!pc_openssl.SSL_CTX_check_private_key(openssl))
        return pc_fail(EINVAL, error, error_bytes, "the private key does not belong to the certificate");
    return 0;
}

/* Tickets of a server hold its sessions, encrypted with a key of the context: nothing is kept for a client that goes away. */
static bool set_rules(struct pc_tls_context *context)
{
    SSL_CTX *openssl = context->openssl;

    pc_openssl.SSL_CTX_set_options(openssl, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_CIPHER_SERVER_PREFERENCE);
    pc_openssl.SSL_CTX_set_verify(openssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, pc_tls_verified);
    pc_openssl.SSL_CTX_ctrl(openssl, SSL_CTRL_CLEAR_MODE, SSL_MODE_AUTO_RETRY, NULL);
    pc_openssl.SSL_CTX_ctrl(openssl, SSL_CTRL_MODE, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, NULL);
    pc_openssl.SSL_CTX_ctrl(openssl, SSL_CTRL_SET_READ_AHEAD, 1, NULL);
    pc_openssl.SSL_CTX_set_default_read_buffer_len(openssl, READ_BYTES);
    pc_openssl.SSL_CTX_set_msg_callback(openssl, pc_tls_count_message);
    pc_openssl.SSL_CTX_set_timeout(openssl, SESSION_S);
    pc_openssl.SSL_CTX_ctrl(openssl, SSL_CTRL_SET_SESS_CACHE_MODE,
                            context->server ? SSL_SESS_CACHE_OFF : SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL, NULL);
    if (!context->server)
        pc_openssl.SSL_CTX_sess_set_new_cb(openssl, pc_tls_keep_session);
    else if (!pc_openssl.SSL_CTX_set_session_ticket_cb(openssl, NULL, pc_tls_use_ticket, NULL))
        return false;
    /* What ca-cert.pem has is trusted, also where it is not the root of its CA. */
    return pc_openssl.X509_STORE_set_flags(pc_openssl.SSL_CTX_get_cert_store(openssl), X509_V_FLAG_PARTIAL_CHAIN) &&
           pc_openssl.SSL_CTX_ctrl(openssl, SSL_CTRL_SET_MIN_PROTO_VERSION, TLS1_3_VERSION, NULL) &&
           pc_openssl.SSL_CTX_ctrl(openssl, SSL_CTRL_SET_MAX_PROTO_VERSION, TLS1_3_VERSION, NULL) &&
           pc_openssl.SSL_CTX_set_ciphersuites(openssl, CIPHERS) && pc_openssl.SSL_CTX_set_num_tickets(openssl, 1) &&
           pc_openssl.SSL_CTX_set_session_id_context(openssl, context->identity, sizeof(context->identity));
}

/* A hash of both hashes: no boundary between the two can be moved. */
static bool set_identity(struct pc_tls_context *context, const void *ca, size_t ca_bytes, const void *certificate, size_t certificate_bytes)
{
    unsigned char both[2][sizeof(context->identity)];

    return pc_openssl.EVP_Digest(ca, ca_bytes, both[0], NULL, pc_openssl.EVP_sha256(), NULL) &&
           pc_openssl.EVP_Digest(certificate, certificate_bytes, both[1], NULL, pc_openssl.EVP_sha256(), NULL) &&
           pc_openssl.EVP_Digest(both, sizeof(both), context->identity, NULL, pc_openssl.EVP_sha256(), NULL);
}

int pc_tls_context_new(int server, const void *ca, size_t ca_bytes, const void *certificate, size_t certificate_bytes, const void *key,
                       size_t key_bytes, struct pc_tls_context **out, char *error, size_t error_bytes)
{
    struct pc_tls_context *context;
    int result = pc_tls_available(error, error_bytes);

    if (result)
        return result;
    context = calloc(1, sizeof(*context));
    if (!context)
        return pc_fail(ENOMEM, error, error_bytes, "no memory for TLS");
    pc_openssl.ERR_clear_error(); /* what others left in this thread */
    context->references = 1;
    context->server = server;
    context->openssl = pc_openssl.SSL_CTX_new(server ? pc_openssl.TLS_server_method() : pc_openssl.TLS_client_method());
    if (!context->openssl || !set_identity(context, ca, ca_bytes, certificate, certificate_bytes) || !set_rules(context))
        result = pc_fail(EINVAL, error, error_bytes, "OpenSSL cannot do what is needed here: %s", reason());
    if (!result)
        result = set_credentials(context, ca, ca_bytes, certificate, certificate_bytes, key, key_bytes, error, error_bytes);
    pc_openssl.ERR_clear_error();
    if (result)
        pc_tls_context_free(context);
    else
        *out = context;
    return result;
}

void pc_tls_context_free(struct pc_tls_context *context)
{
    if (__atomic_sub_fetch(&context->references, 1, __ATOMIC_ACQ_REL))
        return;
    if (context->openssl)
        pc_openssl.SSL_CTX_free(context->openssl);
    free(context);
}
