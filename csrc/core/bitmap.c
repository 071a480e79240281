/* SPDX-License-Identifier: Apache-2.0
 *
 * Bitmaps of pages and their form on the wire. Runs are the natural unit everywhere here: memory is touched in runs, holes come in
 * runs, and a gibibyte in which nothing was touched must cost nothing.
 */
#include <errno.h>
#include <stdbool.h>

#include "postcopy/core.h"

uint64_t pc_bitmap_words(uint64_t bits)
{
    return bits / 64 + (bits % 64 != 0);
}

uint64_t pc_bitmap_count(const uint64_t *words, uint64_t bits)
{
    uint64_t count = 0;

    for (uint64_t i = 0; i < bits / 64; i++)
        count += (uint64_t)__builtin_popcountll(words[i]);
    if (bits % 64)
        count += (uint64_t)__builtin_popcountll(words[bits / 64] & (((uint64_t)1 << bits % 64) - 1));
    return count;
}

uint64_t pc_bitmap_next(const uint64_t *words, uint64_t bits, uint64_t from, int value)
{
    const uint64_t flip = value ? 0 : ~(uint64_t)0; /* look for ones only */
    uint64_t last = pc_bitmap_words(bits), word, i;

    if (from >= bits)
        return bits;
    i = from / 64;
    word = (words[i] ^ flip) & (~(uint64_t)0 << from % 64);
    while (!word) {
        if (++i == last)
            return bits;
        word = words[i] ^ flip;
    }
    i = i * 64 + (uint64_t)__builtin_ctzll(word);
    return i < bits ? i : bits;
}

/* Bits [first, first + count) of one word. */
static uint64_t word_mask(uint64_t first, uint64_t count)
{
    return (count < 64 ? ((uint64_t)1 << count) - 1 : ~(uint64_t)0) << first;
}

void pc_bitmap_set_range(uint64_t *words, uint64_t first, uint64_t count)
{
    while (count) {
        uint64_t shift = first % 64, n = count < 64 - shift ? count : 64 - shift;

        words[first / 64] |= word_mask(shift, n);
        first += n;
        count -= n;
    }
}

void pc_bitmap_clear_range(uint64_t *words, uint64_t first, uint64_t count)
{
    while (count) {
        uint64_t shift = first % 64, n = count < 64 - shift ? count : 64 - shift;

        words[first / 64] &= ~word_mask(shift, n);
        first += n;
        count -= n;
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

int pc_bitmap_rle_decode(const uint8_t *data, size_t bytes, uint64_t *words, uint64_t bits)
{
    const uint8_t *end = data + bytes, *at = data;
    uint64_t done = 0;

    /* Everything is checked before the first bit is written: what a refused map was to replace stays as it was. */
    while (at < end) {
        uint64_t zeros, ones;
        bool first = at == data;

        if (!get_run(&at, end, &zeros) || !get_run(&at, end, &ones))
            return -EBADMSG;
        if ((!zeros && !first) || !ones)
            return -EBADMSG;
        if (zeros > bits - done || ones > bits - done - zeros)
            return -EBADMSG;
        done += zeros + ones;
    }
    pc_bitmap_clear_range(words, 0, bits);
    for (at = data, done = 0; at < end;) {
        uint64_t zeros = 0, ones = 0;

        (void)get_run(&at, end, &zeros);
        (void)get_run(&at, end, &ones);
        pc_bitmap_set_range(words, done + zeros, ones);
        done += zeros + ones;
    }
    return 0;
}
