/* SPDX-License-Identifier: Apache-2.0
 *
 * Who is at the other end, and why not.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core/util.h"
#include "tls/connection.h"

#define SHORT_NAMES_BYTES 128

/* ---- certificates as text ---- */

/* Empty when it does not fit: a part of it could be another's. */
static void put_subject(X509 *certificate, char *text, size_t bytes)
{
    BIO *memory = pc_openssl.BIO_new(pc_openssl.BIO_s_mem());
    char *subject = NULL;
    long length = 0;

    text[0] = '\0';
    if (!memory)
        return;
    if (pc_openssl.X509_NAME_print_ex(memory, pc_openssl.X509_get_subject_name(certificate), 0, XN_FLAG_RFC2253 & ~ASN1_STRFLGS_ESC_MSB) >= 0)
        length = pc_openssl.BIO_ctrl(memory, BIO_CTRL_INFO, 0, (void *)&subject);
    if (length > 0 && (size_t)length < bytes && !memchr(subject, '\0', (size_t)length)) {
        memcpy(text, subject, (size_t)length);
        text[length] = '\0';
    }
    pc_openssl.BIO_free(memory);
}

/* Adds "KIND:NAME\n" where there is room. A name with a character that no name has is none. */
static void add_name(char *text, size_t bytes, const char *kind, const char *name, size_t length)
{
    size_t have = strlen(text);

    for (size_t i = 0; i < length; i++)
        if (name[i] <= ' ' || name[i] > '~')
            return;
    if (length && length < bytes && have + strlen(kind) + length + 3 <= bytes)
        (void)snprintf(text + have, bytes - have, "%s:%.*s\n", kind, (int)length, name);
}

static void put_names(const X509 *certificate, char *text, size_t bytes)
{
    GENERAL_NAMES *names = pc_openssl.X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    const OPENSSL_STACK *stack = (const OPENSSL_STACK *)names;

    text[0] = '\0';
    for (int i = 0; names && i < pc_openssl.OPENSSL_sk_num(stack); i++) {
        const GENERAL_NAME *name = pc_openssl.OPENSSL_sk_value(stack, i);
        const unsigned char *data;
        int length;

        if (name->type != GEN_DNS && name->type != GEN_URI && name->type != GEN_IPADD)
            continue;
        data = pc_openssl.ASN1_STRING_get0_data(name->d.ia5);
        length = pc_openssl.ASN1_STRING_length(name->d.ia5);
        if (length <= 0)
            continue;
        if (name->type == GEN_IPADD) {
            char address[INET6_ADDRSTRLEN];

            if ((length == 4 || length == 16) && inet_ntop(length == 4 ? AF_INET : AF_INET6, data, address, sizeof(address)))
                add_name(text, bytes, "ip", address, strlen(address));
        } else {
            add_name(text, bytes, name->type == GEN_DNS ? "dns" : "uri", (const char *)data, (size_t)length);
        }
    }
    if (names)
        pc_openssl.GENERAL_NAMES_free(names);
}

static int64_t seconds(const ASN1_TIME *time)
{
    struct tm parts;

    return pc_openssl.ASN1_TIME_to_tm(time, &parts) ? (int64_t)timegm(&parts) : 0;
}

static void put_date(const ASN1_TIME *time, char *text, size_t bytes)
{
    struct tm parts;

    if (!pc_openssl.ASN1_TIME_to_tm(time, &parts) || !strftime(text, bytes, "%F %T UTC", &parts))
        (void)snprintf(text, bytes, "?");
}

/* ---- why a connection cannot be ---- */

static const char *of_what(const struct pc_tls *tls)
{
    return tls->context->server ? "client" : "server";
}

/* Why this certificate does not do; `subject` says whose it is. */
static void explain_certificate(struct pc_tls *tls, X509 *certificate, int why, const char *subject)
{
    char date[64], names[SHORT_NAMES_BYTES];

    switch (why) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
        put_date(pc_openssl.X509_get0_notAfter(certificate), date, sizeof(date));
        (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), "%s has expired (%s): renew it there", subject, date);
        break;
    case X509_V_ERR_CERT_NOT_YET_VALID:
        put_date(pc_openssl.X509_get0_notBefore(certificate), date, sizeof(date));
        (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), "%s is valid only from %s on: compare the clocks of both hosts", subject, date);
        break;
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
        put_names(certificate, names, sizeof(names));
        for (char *at = names; *at; at++)
            if (*at == '\n')
                *at = at[1] ? ' ' : '\0';
        (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), "%s is not for %.64s%s%s: connect to a name that it has, or give one of them with --tls-hostname",
                      subject, tls->hostname, names[0] ? ", but for " : "", names);
        break;
    case X509_V_ERR_INVALID_PURPOSE:
        (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), "%s is not one of a TLS %s: its extended key usage says so", subject, of_what(tls));
        break;
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
        (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), "%s was not signed by the CA that is trusted here: both hosts need certificates of one CA", subject);
        break;
    default:
        (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), "%s was refused: %s", subject, pc_openssl.X509_verify_cert_error_string(why));
    }
}

int pc_tls_verified(int valid, X509_STORE_CTX *openssl)
{
    SSL *connection = pc_openssl.X509_STORE_CTX_get_ex_data(openssl, pc_openssl.SSL_get_ex_data_X509_STORE_CTX_idx());
    X509 *certificate = pc_openssl.X509_STORE_CTX_get_current_cert(openssl);
    char subject[80], whose[160];

    if (valid || !certificate)
        return valid;
    put_subject(certificate, subject, sizeof(subject));
    (void)snprintf(whose, sizeof(whose), "%s (%s)",
                   pc_openssl.X509_STORE_CTX_get_error_depth(openssl) ? "a CA's certificate behind the peer's" : "the peer's certificate", subject);
    explain_certificate(pc_openssl.SSL_get_ex_data(connection, 0), certificate, pc_openssl.X509_STORE_CTX_get_error(openssl), whose);
    return 0;
}

/* What the peer has said in an alert, as far as there is something to do about it. */
static const char *of_alert(int alert)
{
    switch (alert) {
    case SSL_AD_UNKNOWN_CA:
        return "it does not know the CA of the certificate here: both hosts need certificates of one CA";
    case SSL_AD_CERTIFICATE_EXPIRED:
        return "the certificate here has expired: renew it";
    case SSL_AD_BAD_CERTIFICATE:
    case SSL_AD_UNSUPPORTED_CERTIFICATE:
    case SSL_AD_CERTIFICATE_UNKNOWN:
        return "it does not accept the certificate here: its log says why";
    case SSL_AD_CERTIFICATE_REQUIRED:
        return "it wants a certificate, and none was sent";
    case SSL_AD_PROTOCOL_VERSION:
        return "it does not use TLS 1.3";
    default:
        return NULL;
    }
}

void pc_tls_explain(struct pc_tls *tls)
{
    unsigned long queued = pc_openssl.ERR_peek_error();
    int reason = ERR_GET_REASON(queued);
    const char *text = pc_openssl.ERR_reason_error_string(queued);

    if (tls->why[0]) /* by pc_tls_verified */
        return;
    if (reason > SSL_AD_REASON_OFFSET && reason <= SSL_AD_REASON_OFFSET + 255) {
        const char *words = of_alert(reason - SSL_AD_REASON_OFFSET);

        (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), "the peer has ended the TLS connection: %s",
                      words ? words : pc_openssl.SSL_alert_desc_string_long(reason - SSL_AD_REASON_OFFSET));
    } else if (reason == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE) {
        (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), "the peer has sent no certificate");
    } else {
        (void)pc_fail(EPROTO, tls->why, sizeof(tls->why), tls->established ? "TLS failed: %s" : "the TLS handshake failed: %s",
                      text ? text : "no reason given");
    }
}

bool pc_tls_still_valid(const SSL_SESSION *session)
{
    const X509 *certificate = pc_openssl.SSL_SESSION_get0_peer((SSL_SESSION *)(uintptr_t)session);

    return certificate && pc_openssl.X509_cmp_current_time(pc_openssl.X509_get0_notAfter(certificate)) > 0 &&
           pc_openssl.X509_cmp_current_time(pc_openssl.X509_get0_notBefore(certificate)) < 0;
}

/* ---- for callers ---- */

int pc_tls_peer(const struct pc_tls *tls, struct pc_tls_peer *peer)
{
    X509 *certificate = pc_openssl.SSL_get0_peer_certificate(tls->openssl);
    unsigned char hash[EVP_MAX_MD_SIZE];
    unsigned int bytes = 0;

    memset(peer, 0, sizeof(*peer));
    if (!tls->established || !certificate)
        return -ENOTCONN;
    put_subject(certificate, peer->subject, sizeof(peer->subject));
    put_names(certificate, peer->names, sizeof(peer->names));
    (void)snprintf(peer->cipher, sizeof(peer->cipher), "%s", pc_openssl.SSL_CIPHER_get_name(pc_openssl.SSL_get_current_cipher(tls->openssl)));
    if (pc_openssl.X509_digest(certificate, pc_openssl.EVP_sha256(), hash, &bytes))
        for (unsigned int i = 0; i < bytes && 2 * i + 2 < sizeof(peer->fingerprint); i++)
            (void)snprintf(peer->fingerprint + 2 * i, 3, "%02x", hash[i]);
    peer->not_after_s = seconds(pc_openssl.X509_get0_notAfter(certificate));
    peer->resumed = pc_openssl.SSL_session_reused(tls->openssl);
    pc_openssl.ERR_clear_error();
    return 0;
}

int64_t pc_tls_context_not_after(const struct pc_tls_context *context)
{
    const X509 *own = pc_openssl.SSL_CTX_get0_certificate(context->openssl);

    return own ? seconds(pc_openssl.X509_get0_notAfter(own)) : 0;
}
