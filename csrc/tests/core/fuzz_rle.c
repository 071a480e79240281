/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: the run-length form of bitmaps. The first two bytes are the number of bits, the rest is taken once for an encoded map
 * and once for a bitmap. Decoding never writes past the map, refuses without a trace, and what it accepts is the one form that
 * encoding makes.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "postcopy/core.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(int condition)
{
    if (!condition)
        abort();
}

static uint8_t *encode(const uint64_t *words, uint64_t bits, int64_t *needed)
{
    uint8_t *out;

    *needed = pc_bitmap_rle_encode(words, bits, NULL, 0);
    require(*needed >= 0);
    out = malloc((size_t)*needed + 1); /* + 1: malloc(0) may be NULL */
    require(out != NULL);
    require(pc_bitmap_rle_encode(words, bits, out, (size_t)*needed) == *needed);
    return out;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    uint64_t bits, count, *words, *back;
    uint8_t *out;
    int64_t needed;
    int result;

    if (bytes < 2)
        return 0;
    bits = (uint64_t)(data[0] | data[1] << 8);
    data += 2;
    bytes -= 2;
    count = pc_bitmap_words(bits);
    words = calloc(count + 1, sizeof(*words));
    back = calloc(count + 1, sizeof(*back));
    require(words && back);

    memset(words, 0xA5, count * sizeof(*words));
    if (bits % 64)
        words[count - 1] &= ((uint64_t)1 << bits % 64) - 1;
    memcpy(back, words, count * sizeof(*words));
    result = pc_bitmap_rle_decode(data, bytes, words, bits);
    require(result == 0 || result == -EBADMSG);
    require(words[count] == 0);
    if (result) {
        require(!memcmp(words, back, count * sizeof(*words)));
    } else {
        require(!(bits % 64) || !(words[count - 1] >> bits % 64));
        out = encode(words, bits, &needed);
        require((size_t)needed == bytes && !memcmp(out, data, bytes));
        free(out);
    }

    memset(words, 0, count * sizeof(*words));
    memcpy(words, data, bytes < count * 8 ? bytes : count * 8);
    if (bits % 64)
        words[count - 1] &= ((uint64_t)1 << bits % 64) - 1;
    out = encode(words, bits, &needed);
    memset(back, 0xFF, count * sizeof(*back));
    pc_bitmap_clear_range(back, 0, bits);
    require(pc_bitmap_rle_decode(out, (size_t)needed, back, bits) == 0);
    pc_bitmap_clear_range(back, bits, count * 64 - bits);
    require(!memcmp(words, back, count * sizeof(*words)));
    free(out);
    free(words);
    free(back);
    return 0;
}
