/* SPDX-License-Identifier: Apache-2.0
 *
 * Bitmaps that threads share. A map is an array of 64-bit words, bit i = bit (i % 64) of word i / 64 (postcopy/core.h).
 *
 * Reading takes each word with one atomic load and serves maps that do not change as well. What changes a map is named after
 * how: pc_atomic_* here, for shared maps; pc_bitmap_set_range and pc_bitmap_clear_range, plain, for private ones. All of it is
 * sequentially consistent: the order of two maps is what the pager and the page server rely on, and on x86 only the changes
 * cost anything.
 */
#ifndef PC_BITS_H
#define PC_BITS_H

#include <stdbool.h>
#include <stdint.h>

/* ---- one word ---- */

/* The bits of word `word` that belong to [first, first + count), which reaches into it. */
static inline uint64_t pc_bits_mask(uint64_t word, uint64_t first, uint64_t count)
{
    uint64_t low = word * 64, end = first + count, mask = ~UINT64_C(0);

    if (first > low)
        mask &= ~UINT64_C(0) << (first - low);
    if (end < low + 64)
        mask &= ~UINT64_C(0) >> (low + 64 - end);
    return mask;
}

/* The number in the map of the lowest of `bits`, which are some of word `word`. */
static inline uint64_t pc_bits_lowest(uint64_t word, uint64_t bits)
{
    return word * 64 + (uint64_t)__builtin_ctzll(bits);
}

static inline uint64_t pc_bits_popcount(uint64_t bits)
{
    return (uint64_t)__builtin_popcountll(bits);
}

/* ---- reading ---- */

static inline uint64_t pc_bits_word(const uint64_t *words, uint64_t word)
{
    return __atomic_load_n(&words[word], __ATOMIC_SEQ_CST);
}

static inline bool pc_bits_test(const uint64_t *words, uint64_t bit)
{
    return pc_bits_word(words, bit / 64) >> (bit % 64) & 1;
}

/* How many of [first, first + count) are set. */
static inline uint64_t pc_bits_count(const uint64_t *words, uint64_t first, uint64_t count)
{
    uint64_t set = 0;

    for (uint64_t word = first / 64; word * 64 < first + count; word++)
        set += pc_bits_popcount(pc_bits_word(words, word) & pc_bits_mask(word, first, count));
    return set;
}

/* The first bit of [from, end) that equals `value`; `end` when there is none. */
static inline uint64_t pc_bits_next(const uint64_t *words, uint64_t end, uint64_t from, bool value)
{
    for (uint64_t word = from / 64; from < end; from = ++word * 64) {
        uint64_t bits = pc_bits_word(words, word);
        uint64_t found = (value ? bits : ~bits) & pc_bits_mask(word, from, end - from);

        if (found)
            return pc_bits_lowest(word, found);
    }
    return end;
}

static inline void pc_bits_copy(uint64_t *to, const uint64_t *words, uint64_t count)
{
    for (uint64_t word = 0; word < count; word++)
        to[word] = pc_bits_word(words, word);
}

/* ---- changing what others read and change at the same time ---- */

/* Sets bits of one word; those that this call has set, and no call before. */
static inline uint64_t pc_atomic_set(uint64_t *words, uint64_t word, uint64_t bits)
{
    return bits & ~__atomic_fetch_or(&words[word], bits, __ATOMIC_SEQ_CST);
}

static inline void pc_atomic_clear(uint64_t *words, uint64_t word, uint64_t bits)
{
    (void)__atomic_fetch_and(&words[word], ~bits, __ATOMIC_SEQ_CST);
}

/* Sets a bit; whether it was set before. */
static inline bool pc_atomic_test_and_set_bit(uint64_t *words, uint64_t bit)
{
    return !pc_atomic_set(words, bit / 64, UINT64_C(1) << (bit % 64));
}

static inline void pc_atomic_clear_bit(uint64_t *words, uint64_t bit)
{
    pc_atomic_clear(words, bit / 64, UINT64_C(1) << (bit % 64));
}

#endif
