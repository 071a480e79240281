/* SPDX-License-Identifier: Apache-2.0
 *
 * Bitmaps of pages and their form on the wire. Runs are the natural unit everywhere here: memory is touched in runs, holes come in
 * runs, and a gibibyte in which nothing was touched must cost nothing.
 */
#include <errno.h>
#include <stdbool.h>

#include "core/bits.h"
#include "postcopy/core.h"

uint64_t pc_bitmap_words(uint64_t bits)
{
    return bits / 64 + (bits % 64 != 0);
}

uint64_t pc_bitmap_count(const uint64_t *words, uint64_t bits)
{
    return pc_bits_count(words, 0, bits);
}

uint64_t pc_bitmap_next(const uint64_t *words, uint64_t bits, uint64_t from, int value)
{
    return pc_bits_next(words, bits, from, value);
}

void pc_bitmap_set_range(uint64_t *words, uint64_t first, uint64_t count)
{
    for (uint64_t word = first / 64; word * 64 < first + count; word++)
        words[word] |= pc_bits_mask(word, first, count);
}

void pc_bitmap_clear_range(uint64_t *words, uint64_t first, uint64_t count)
{
    for (uint64_t word = first / 64; word * 64 < first + count; word++)
        words[word] &= ~pc_bits_mask(word, first, count);
}

void pc_bitmap_clear_those(uint64_t *words, const uint64_t *others, uint64_t bits)
{
    for (uint64_t word = 0; word < pc_bitmap_words(bits); word++)
        if (words[word] & others[word]) /* where a map is written to, also without a change, it takes memory */
            words[word] &= ~others[word];
}

void pc_bitmap_copy(uint64_t *to, uint64_t to_first, const uint64_t *from, uint64_t from_first, uint64_t count)
{
    const uint64_t end = from_first + count;
    uint64_t stop;

    pc_bitmap_clear_range(to, to_first, count);
    for (uint64_t at = from_first; (at = pc_bits_next(from, end, at, true)) < end; at = stop) {
        stop = pc_bits_next(from, end, at, false);
        pc_bitmap_set_range(to, to_first + at - from_first, stop - at);
    }
}

void pc_bitmap_rescale(uint64_t *to, uint64_t to_bytes, const uint64_t *from, uint64_t from_bytes, uint64_t bits)
{
    uint64_t stop;

    for (uint64_t at = 0; (at = pc_bits_next(from, bits, at, true)) < bits; at = stop) {
        uint64_t first = at * from_bytes / to_bytes;

        stop = pc_bits_next(from, bits, at, false);
        pc_bitmap_set_range(to, first, (stop * from_bytes - 1) / to_bytes - first + 1);
    }
}

struct writer {
    uint8_t *out;
    size_t cap;
    size_t used; /* also counts what did not fit */
};

static void put_run(struct writer *writer, uint64_t length)
{
    do {
        uint8_t byte = length & 0x7f;

        length >>= 7;
        if (length)
            byte |= 0x80;
        if (writer->used < writer->cap)
            writer->out[writer->used] = byte;
        writer->used++;
    } while (length);
}

int64_t pc_bitmap_rle_encode(const uint64_t *words, uint64_t bits, uint8_t *out, size_t cap)
{
    struct writer writer = {.out = out, .cap = cap};
    uint64_t done = 0;

    for (;;) {
        uint64_t set = pc_bitmap_next(words, bits, done, 1), clear;

        if (set == bits)
            return (int64_t)writer.used;
        clear = pc_bitmap_next(words, bits, set, 0);
        put_run(&writer, set - done);
        put_run(&writer, clear - set);
        done = clear;
    }
}

/* Reads one length. False when it is cut off, does not fit 64 bits, or is longer than it must be: each map has one form, so
 * that equal maps have equal bytes and digests. */
static bool get_run(const uint8_t **data, const uint8_t *end, uint64_t *length)
{
    uint64_t value = 0;

    for (unsigned int shift = 0; *data < end; shift += 7) {
        uint8_t byte = *(*data)++;

        if (shift > 63 || (shift == 63 && (byte & 0x7e)) || (!byte && shift))
            return false;
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) {
            *length = value;
            return true;
        }
    }
    return false;
}

/* Walks over an encoded map, and sets its bits in `words` unless that is NULL. */
static int decode_runs(const uint8_t *data, size_t bytes, uint64_t *words, uint64_t bits)
{
    const uint8_t *end = data + bytes, *at = data;
    uint64_t done = 0, zeros, ones;

    while (at < end) {
        bool first = at == data;

        if (!get_run(&at, end, &zeros) || !get_run(&at, end, &ones) || (!zeros && !first) || !ones)
            return -EBADMSG;
        if (zeros > bits - done || ones > bits - done - zeros)
            return -EBADMSG;
        if (words)
            pc_bitmap_set_range(words, done + zeros, ones);
        done += zeros + ones;
    }
    return 0;
}

int pc_bitmap_rle_decode(const uint8_t *data, size_t bytes, uint64_t *words, uint64_t bits)
{
    /* Everything is checked before the first bit is written: what a refused map was to replace stays as it was. */
    int error = decode_runs(data, bytes, NULL, bits);

    if (error)
        return error;
    pc_bitmap_clear_range(words, 0, bits);
    return decode_runs(data, bytes, words, bits);
}
