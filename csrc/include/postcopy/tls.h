/* SPDX-License-Identifier: Apache-2.0
 *
 * TLS 1.3 on a connected stream socket, both ends authenticated by certificates of one CA.
 *
 * A *context* has a host's credentials for one role, and never changes: renewed certificates make a new one. A connection takes the
 * socket that it is given, blocking or not, and owns it never: whoever closes the socket does so after the connection has been freed.
 * The caller drives the handshake and talks over the connection, or gives it together with its socket to a pager or a page server
 * (engine.h: their attach functions), which own both from then on.
 *
 * OpenSSL 3 does the work. Its library is loaded when it is first needed, by pc_tls_available and pc_tls_context_new; nothing else
 * needs it.
 *
 * Threads: contexts may be shared by any number of threads. A connection is used by one thread at a time. No call below waits, whatever
 * the socket is; loading the library takes a lock and reads its files.
 */
#ifndef POSTCOPY_TLS_H
#define POSTCOPY_TLS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
struct pc_tls_context;
struct pc_tls;

/* 0, or -ENOENT: `error` says what is missing and which Debian package has it. */
int pc_tls_available(char *error, size_t error_bytes);

/* From PEM in memory: certificates of the CAs that are trusted, one or more; the certificate of this host, with those between it and
 * the CA behind it; its private key, not encrypted. Files of a server are for connections that are accepted, those of a client for
 * connections that are made. 0, or -EINVAL: `error` says which of the three does not fit; -ENOENT as above; -ENOMEM. */
int pc_tls_context_new(int server, const void *ca, size_t ca_bytes, const void *certificate, size_t certificate_bytes, const void *key,
                       size_t key_bytes, struct pc_tls_context **context, char *error, size_t error_bytes);
/* When the certificate of this host ends, in seconds since 1970; 0 when that cannot be read. */
int64_t pc_tls_context_not_after(const struct pc_tls_context *context);
/* Its connections may outlive it. */
void pc_tls_context_free(struct pc_tls_context *context);

/* `hostname` (client only; NULL for a server): the name or the IP address that the peer's certificate has to have; a name is also sent
 * (SNI). `session`: what pc_tls_session gave for an earlier connection to this peer, or none; one that does not fit any more, as when
 * credentials have changed, is ignored. */
int pc_tls_new(struct pc_tls_context *context, int fd, const char *hostname, const void *session, size_t session_bytes,
               struct pc_tls **tls);
/* Sends nothing: what is read at the other end was cut, unless pc_tls_close_notify came first. */
void pc_tls_free(struct pc_tls *tls);

enum pc_tls_wants { PC_TLS_READABLE = 1, PC_TLS_WRITABLE = 2 };
/* 0 when it is done; PC_TLS_READABLE or PC_TLS_WRITABLE: call it again when the socket is; -EPROTO, or -errno of the socket, with the
 * reason in pc_tls_why. A server that refuses the client's certificate says so only after the client is done: the client reads it, as
 * -EPROTO. */
int pc_tls_handshake(struct pc_tls *tls);
/* The bytes read, as many as there are; 0 at the orderly end; -EAGAIN: call it again when the socket is readable; -EPIPE when the
 * connection was cut; -EPROTO, or -errno of the socket. */
int64_t pc_tls_read(struct pc_tls *tls, void *buffer, size_t bytes);
/* The bytes written, at least 1 of more than none; -EAGAIN: call it again with the same bytes (more may follow them) when the socket is
 * writable: some of them may be on their way already; -EPROTO, or -errno of the socket. */
int64_t pc_tls_write(struct pc_tls *tls, const void *data, size_t bytes);
/* Whether a read may have bytes although the socket is not readable. */
int pc_tls_pending(const struct pc_tls *tls);
/* Says that nothing follows. 0; -EAGAIN: call it again when the socket is writable; -errno. */
int pc_tls_close_notify(struct pc_tls *tls);
/* One line for a person about the last failure; empty when there was none. */
const char *pc_tls_why(const struct pc_tls *tls);

/* ---- after the handshake ---- */
#define PC_TLS_SUBJECT_BYTES 512
#define PC_TLS_NAMES_BYTES 4096
struct pc_tls_peer {
    char subject[PC_TLS_SUBJECT_BYTES]; /* as in RFC 2253; empty when it does not fit */
    char names[PC_TLS_NAMES_BYTES];     /* each "dns:NAME", "ip:ADDRESS" or "uri:URI", and a newline; what does not fit is left out */
    char cipher[64];
    char fingerprint[65]; /* SHA-256 of the certificate, hexadecimal */
    int64_t not_after_s;  /* of the certificate, since 1970 */
    int resumed;          /* whether the handshake was that of an earlier session */
};
int pc_tls_peer(const struct pc_tls *tls, struct pc_tls_peer *peer);
/* The newest session that the server has given this client: how many bytes, of which `out` gets at most `cap`; 0: none yet (it comes
 * after the handshake, and is found by reading). It has secrets, and may be used for any number of connections. */
size_t pc_tls_session(const struct pc_tls *tls, void *out, size_t cap);

/* A plain socket, one end of a pair, whose other end a thread of its own joins to the connection: for a process that cannot have the
 * connection itself. Owns fd and tls from then on, also on failure. The descriptor, or -errno. What the peer cut looks like an
 * orderly end at that socket. */
int pc_tls_relay(int fd, struct pc_tls *tls, int urgent);
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
