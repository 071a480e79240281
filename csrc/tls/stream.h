/* SPDX-License-Identifier: Apache-2.0
 *
 * The stream of a data channel, plain or TLS.
 */
#ifndef PC_TLS_STREAM_H
#define PC_TLS_STREAM_H

#include "core/stream.h"
#include "postcopy/tls.h"

/* pc_stream_tcp, of a plain connection where `tls` is NULL. Owns both from then on, also on failure. */
int pc_stream_open(struct pc_stream *stream, int fd, struct pc_tls *tls, bool urgent);

#endif
