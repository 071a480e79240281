/* SPDX-License-Identifier: Apache-2.0 */
#include "core/codec.h"

#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

#include "core/library.h"
#include "core/util.h"

#define ZSTD_LEVEL 1
#define ZSTD_FRAME_MAGIC 0xFD2FB528u
#define LZ4_ACCELERATION 1

/* The functions of both libraries that are used here, all of them of their stable interface. */
static struct {
    int (*state_bytes)(void);
    int (*compress)(void *state, const char *from, char *to, int bytes, int cap, int acceleration);
    int (*decompress)(const char *from, char *to, int bytes, int cap);
} lz4;

static struct {
    void *(*new_encoder)(void);
    size_t (*free_encoder)(void *);
    void *(*new_decoder)(void);
    size_t (*free_decoder)(void *);
    size_t (*compress)(void *encoder, void *to, size_t cap, const void *from, size_t bytes, int level);
    size_t (*decompress)(void *decoder, void *to, size_t cap, const void *from, size_t bytes);
    size_t (*frame_bytes)(const void *from, size_t bytes);
    unsigned (*is_error)(size_t result);
} zstd;

static const struct library {
    uint32_t bit;
    const char *file, *package;
    struct pc_function functions[9];
} libraries[] = {
    {PC_COMPRESSION_LZ4,
     "liblz4.so.1",
     "liblz4-1",
     {{"LZ4_sizeofState", &lz4.state_bytes},
      {"LZ4_compress_fast_extState", &lz4.compress},
      {"LZ4_decompress_safe", &lz4.decompress}}},
    {PC_COMPRESSION_ZSTD,
     "libzstd.so.1",
     "libzstd1",
     {{"ZSTD_createCCtx", &zstd.new_encoder},
      {"ZSTD_freeCCtx", &zstd.free_encoder},
      {"ZSTD_createDCtx", &zstd.new_decoder},
      {"ZSTD_freeDCtx", &zstd.free_decoder},
      {"ZSTD_compressCCtx", &zstd.compress},
      {"ZSTD_decompressDCtx", &zstd.decompress},
      {"ZSTD_findFrameCompressedSize", &zstd.frame_bytes},
      {"ZSTD_isError", &zstd.is_error}}},
};

static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static uint32_t loaded; /* atomic; set when the functions are */

uint32_t pc_compression_available(uint32_t wanted, char *error, size_t error_bytes)
{
    uint32_t have = __atomic_load_n(&loaded, __ATOMIC_ACQUIRE);

    if (!(wanted & ~have))
        return wanted;
    pthread_mutex_lock(&loading);
    for (size_t i = 0; i < PC_ARRAY_LENGTH(libraries); i++) {
        const struct library *library = &libraries[i];

        if (!(wanted & ~loaded & library->bit))
            continue;
        if (!pc_library_load(library->file, library->functions))
            (void)__atomic_fetch_or(&loaded, library->bit, __ATOMIC_RELEASE);
        else
            (void)pc_fail(ENOENT, error, error_bytes, "%s cannot be loaded; Debian: apt-get install %s", library->file,
                          library->package);
    }
    have = loaded;
    pthread_mutex_unlock(&loading);
    return wanted & have;
}

size_t pc_codec_compress(struct pc_codec *codec, uint32_t how, const void *data, size_t bytes, void *out, size_t cap)
{
    if (how == PC_COMPRESSION_LZ4) {
        int done;

        if (!codec->lz4)
            codec->lz4 = malloc((size_t)lz4.state_bytes());
        done = codec->lz4 ? lz4.compress(codec->lz4, data, out, (int)bytes, (int)cap, LZ4_ACCELERATION) : 0;
        return done > 0 ? (size_t)done : 0;
    } else {
        size_t done;

        if (!codec->zstd)
            codec->zstd = zstd.new_encoder();
        if (!codec->zstd)
            return 0;
        done = zstd.compress(codec->zstd, out, cap, data, bytes, ZSTD_LEVEL);
        return zstd.is_error(done) ? 0 : done;
    }
}

/* Exactly one frame, of the format since 1.0. A library may also decode older formats; data from a peer is not given to those decoders. */
static bool is_one_zstd_frame(const void *data, size_t bytes)
{
    uint32_t magic;

    if (bytes < sizeof(magic))
        return false;
    memcpy(&magic, data, sizeof(magic));
    return le32toh(magic) == ZSTD_FRAME_MAGIC && zstd.frame_bytes(data, bytes) == bytes;
}

int pc_codec_decompress(struct pc_codec *codec, uint32_t how, const void *data, size_t bytes, void *out, size_t out_bytes)
{
    if (bytes > PC_FRAME_MAX_PAYLOAD_BYTES || out_bytes > PC_FRAME_MAX_PAYLOAD_BYTES)
        return -EBADMSG;
    if (how == PC_COMPRESSION_LZ4)
        return lz4.decompress(data, out, (int)bytes, (int)out_bytes) == (int)out_bytes ? 0 : -EBADMSG;
    if (!codec->zstd_decoder)
        codec->zstd_decoder = zstd.new_decoder();
    if (!codec->zstd_decoder)
        return -ENOMEM;
    return is_one_zstd_frame(data, bytes) && zstd.decompress(codec->zstd_decoder, out, out_bytes, data, bytes) == out_bytes ? 0
                                                                                                                       : -EBADMSG;
}

void pc_codec_free(struct pc_codec *codec)
{
    free(codec->lz4);
    if (codec->zstd)
        (void)zstd.free_encoder(codec->zstd);
    if (codec->zstd_decoder)
        (void)zstd.free_decoder(codec->zstd_decoder);
    *codec = (struct pc_codec){0};
}
