/* SPDX-License-Identifier: Apache-2.0
 *
 * The functions of OpenSSL that are used, each with the type that OpenSSL's headers give it.
 */
#ifndef PC_TLS_LIBRARY_H
#define PC_TLS_LIBRARY_H

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>
#include <stddef.h>

#define PC_OPENSSL_FUNCTIONS(X)                                                                                         \
    X(ASN1_STRING_get0_data)                                                                                            \
    X(ASN1_STRING_length)                                                                                               \
    X(ASN1_TIME_to_tm)                                                                                                  \
    X(BIO_clear_flags)                                                                                                  \
    X(BIO_ctrl)                                                                                                         \
    X(BIO_free)                                                                                                         \
    X(BIO_get_data)                                                                                                     \
    X(BIO_meth_new)                                                                                                     \
    X(BIO_meth_set_ctrl)                                                                                                \
    X(BIO_meth_set_read_ex)                                                                                             \
    X(BIO_meth_set_write_ex)                                                                                            \
    X(BIO_new)                                                                                                          \
    X(BIO_new_mem_buf)                                                                                                  \
    X(BIO_s_mem)                                                                                                        \
    X(BIO_set_data)                                                                                                     \
    X(BIO_set_flags)                                                                                                    \
    X(BIO_set_init)                                                                                                     \
    X(d2i_SSL_SESSION)                                                                                                  \
    X(ERR_clear_error)                                                                                                  \
    X(ERR_peek_error)                                                                                                   \
    X(ERR_peek_last_error)                                                                                              \
    X(ERR_reason_error_string)                                                                                          \
    X(EVP_Digest)                                                                                                       \
    X(EVP_PKEY_free)                                                                                                    \
    X(EVP_sha256)                                                                                                       \
    X(GENERAL_NAMES_free)                                                                                               \
    X(i2d_SSL_SESSION)                                                                                                  \
    X(OPENSSL_init_ssl)                                                                                                 \
    X(OPENSSL_sk_num)                                                                                                   \
    X(OPENSSL_sk_value)                                                                                                 \
    X(PEM_read_bio_PrivateKey)                                                                                          \
    X(PEM_read_bio_X509)                                                                                                \
    X(SSL_alert_desc_string_long)                                                                                       \
    X(SSL_CIPHER_get_name)                                                                                              \
    X(SSL_ctrl)                                                                                                         \
    X(SSL_CTX_check_private_key)                                                                                        \
    X(SSL_CTX_ctrl)                                                                                                     \
    X(SSL_CTX_free)                                                                                                     \
    X(SSL_CTX_get0_certificate)                                                                                         \
    X(SSL_CTX_get_cert_store)                                                                                           \
    X(SSL_CTX_new)                                                                                                      \
    X(SSL_CTX_sess_set_new_cb)                                                                                          \
    X(SSL_CTX_set_ciphersuites)                                                                                         \
    X(SSL_CTX_set_default_read_buffer_len)                                                                              \
    X(SSL_CTX_set_msg_callback)                                                                                         \
    X(SSL_CTX_set_num_tickets)                                                                                          \
    X(SSL_CTX_set_options)                                                                                              \
    X(SSL_CTX_set_session_id_context)                                                                                   \
    X(SSL_CTX_set_session_ticket_cb)                                                                                    \
    X(SSL_CTX_set_timeout)                                                                                              \
    X(SSL_CTX_set_verify)                                                                                               \
    X(SSL_CTX_use_certificate)                                                                                          \
    X(SSL_CTX_use_PrivateKey)                                                                                           \
    X(SSL_do_handshake)                                                                                                 \
    X(SSL_free)                                                                                                         \
    X(SSL_get0_param)                                                                                                   \
    X(SSL_get0_peer_certificate)                                                                                        \
    X(SSL_get_current_cipher)                                                                                           \
    X(SSL_get_error)                                                                                                    \
    X(SSL_get_ex_data)                                                                                                  \
    X(SSL_get_ex_data_X509_STORE_CTX_idx)                                                                               \
    X(SSL_has_pending)                                                                                                  \
    X(SSL_key_update)                                                                                                   \
    X(SSL_new)                                                                                                          \
    X(SSL_read_ex)                                                                                                      \
    X(SSL_SESSION_free)                                                                                                 \
    X(SSL_SESSION_get0_peer)                                                                                            \
    X(SSL_session_reused)                                                                                               \
    X(SSL_set1_host)                                                                                                    \
    X(SSL_set_accept_state)                                                                                             \
    X(SSL_set_bio)                                                                                                      \
    X(SSL_set_connect_state)                                                                                            \
    X(SSL_set_ex_data)                                                                                                  \
    X(SSL_set_hostflags)                                                                                                \
    X(SSL_set_session)                                                                                                  \
    X(SSL_set_shutdown)                                                                                                 \
    X(SSL_shutdown)                                                                                                     \
    X(SSL_write_ex)                                                                                                     \
    X(TLS_client_method)                                                                                                \
    X(TLS_server_method)                                                                                                \
    X(X509_cmp_current_time)                                                                                            \
    X(X509_digest)                                                                                                      \
    X(X509_free)                                                                                                        \
    X(X509_get0_notAfter)                                                                                               \
    X(X509_get0_notBefore)                                                                                              \
    X(X509_get_ext_d2i)                                                                                                 \
    X(X509_get_subject_name)                                                                                            \
    X(X509_NAME_print_ex)                                                                                               \
    X(X509_STORE_add_cert)                                                                                              \
    X(X509_STORE_CTX_get_current_cert)                                                                                  \
    X(X509_STORE_CTX_get_error)                                                                                         \
    X(X509_STORE_CTX_get_error_depth)                                                                                   \
    X(X509_STORE_CTX_get_ex_data)                                                                                       \
    X(X509_STORE_set_flags)                                                                                             \
    X(X509_verify_cert_error_string)                                                                                    \
    X(X509_VERIFY_PARAM_set1_ip_asc)

#define PC_OPENSSL_MEMBER(name) __typeof__(name) *name;
/* Filled by pc_tls_available; OpenSSL's macros are written out. */
extern struct pc_openssl {
    PC_OPENSSL_FUNCTIONS(PC_OPENSSL_MEMBER)
} pc_openssl;

struct pc_tls_context {
    SSL_CTX *openssl;
    unsigned references; /* atomic */
    int server;
    unsigned char identity[32]; /* a hash of the credentials: sessions belong to them */
};

extern BIO_METHOD *pc_tls_bio_method;     /* made when the library is loaded: connection.c */
BIO_METHOD *pc_tls_new_bio_method(void);
int pc_tls_keep_session(SSL *openssl, SSL_SESSION *session);
SSL_TICKET_RETURN pc_tls_use_ticket(SSL *openssl, SSL_SESSION *session, const unsigned char *key_name, size_t key_name_bytes,
                                    SSL_TICKET_STATUS status, void *argument);
void pc_tls_count_message(int sent, int version, int type, const void *data, size_t bytes, SSL *openssl, void *argument);

#endif
