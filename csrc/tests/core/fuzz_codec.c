/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: compressed payloads. The first byte says which compression, the next two how much content, the rest is decompressed, and
 * compressed. Decompressing reads no byte behind the payload and writes none behind the content, whatever it is given; what was
 * compressed comes back. The libraries are not instrumented: memory that may not be touched lies behind both.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/codec.h"

#define ROOM ((size_t)1 << 18)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(int condition)
{
    if (!condition)
        abort();
}

/* The end of ROOM bytes behind which nothing may be touched. */
static uint8_t *make_end(void)
{
    uint8_t *memory = mmap(NULL, 2 * ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    require(memory != MAP_FAILED && !mprotect(memory + ROOM, ROOM, PROT_NONE));
    return memory + ROOM;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct pc_codec codec;
    static uint8_t *in_end, *out_end, *packed;
    const uint32_t how = bytes && data[0] & 1 ? PC_COMPRESSION_LZ4 : PC_COMPRESSION_ZSTD;
    size_t out_bytes, length;
    uint8_t *in;
    int result;

    if (bytes < 4 || bytes > ROOM || !pc_compression_available(how, NULL, 0))
        return 0;
    if (!in_end) {
        in_end = make_end();
        out_end = make_end();
        packed = make_end() - ROOM;
    }
    out_bytes = ((size_t)data[1] | (size_t)data[2] << 8) + 1;
    bytes -= 3;
    in = in_end - bytes;
    memcpy(in, data + 3, bytes);
    result = pc_codec_decompress(&codec, how, in, bytes, out_end - out_bytes, out_bytes);
    require(result == 0 || result == -EBADMSG);

    length = pc_codec_compress(&codec, how, in, bytes, packed, ROOM);
    require(length > 0 || bytes > ROOM / 2);
    if (!length)
        return 0;
    memcpy(in_end - length, packed, length); /* over what it was made of, which is in `data` */
    require(!pc_codec_decompress(&codec, how, in_end - length, length, out_end - bytes, bytes));
    require(!memcmp(out_end - bytes, data + 3, bytes));
    require(pc_codec_decompress(&codec, how, in_end - length, length, out_end - bytes - 1, bytes + 1) == -EBADMSG);
    require(bytes == 1 || pc_codec_decompress(&codec, how, in_end - length, length, out_end - bytes + 1, bytes - 1) == -EBADMSG);
    return 0;
}
