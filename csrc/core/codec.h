/* SPDX-License-Identifier: Apache-2.0
 *
 * Compression of pages: LZ4 and Zstandard by their libraries, which are loaded when they are first asked for; nothing else needs them.
 *
 * A codec has the contexts of one thread, made at their first use.
 */
#ifndef PC_CODEC_H
#define PC_CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "postcopy/core.h"

struct pc_codec {
    void *lz4, *zstd, *zstd_decoder;
};

/* How many bytes of `out`, at most `cap`; 0 where they would not suffice, or there is no memory. `how` is one of enum pc_compression
 * that is available. `data` does not change meanwhile. */
size_t pc_codec_compress(struct pc_codec *codec, uint32_t how, const void *data, size_t bytes, void *out, size_t cap);
/* Exactly `out_bytes`, or -EBADMSG; -ENOMEM. `how` as above; `data` may be anything. */
int pc_codec_decompress(struct pc_codec *codec, uint32_t how, const void *data, size_t bytes, void *out, size_t out_bytes);
void pc_codec_free(struct pc_codec *codec);

#endif
