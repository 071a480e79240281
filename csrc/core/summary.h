/* SPDX-License-Identifier: Apache-2.0
 *
 * Which words of a shared bitmap are full, in levels: a bit of a level stands for a word of the one below it, the first level for the
 * words of the map. So the next bit that is clear is found in a number of steps that does not depend on how far it is away.
 *
 * Any thread may set bits of the map meanwhile; the one that sets the last of a word calls pc_summary_fill. A full word for which that has
 * not happened yet costs a step. Bits are cleared, and the levels made anew, only while no thread sets any.
 */
#ifndef PC_SUMMARY_H
#define PC_SUMMARY_H

#include "core/bits.h"

#define PC_SUMMARY_LEVELS 8 /* of 64 each: enough for any number of bits */

struct pc_summary {
    uint32_t count;
    uint64_t *words[PC_SUMMARY_LEVELS];
    uint64_t bits[PC_SUMMARY_LEVELS];
};

/* How many words the levels above a map of so many words take. */
static inline uint64_t pc_summary_size(uint64_t map_words)
{
    uint64_t size = 0;

    do {
        map_words = (map_words + 63) / 64;
        size += map_words;
    } while (map_words > 1);
    return size;
}

/* `buffer`: pc_summary_size words, zero, the caller's. */
static inline void pc_summary_init(struct pc_summary *summary, uint64_t map_words, uint64_t *buffer)
{
    summary->count = 0;
    do {
        summary->words[summary->count] = buffer;
        summary->bits[summary->count++] = map_words;
        map_words = (map_words + 63) / 64;
        buffer += map_words;
    } while (map_words > 1);
}

/* Word `word` of the map is full. */
static inline void pc_summary_fill(struct pc_summary *summary, uint64_t word)
{
    for (uint32_t level = 0; level < summary->count; level++) {
        uint64_t bit = word;

        word /= 64;
        (void)pc_atomic_set(summary->words[level], word, UINT64_C(1) << (bit % 64));
        if (pc_bits_word(summary->words[level], word) != pc_bits_mask(word, 0, summary->bits[level]))
            return;
    }
}

/* Word `word` of the map is not full any more. */
static inline void pc_summary_clear(struct pc_summary *summary, uint64_t word)
{
    for (uint32_t level = 0; level < summary->count; level++, word /= 64)
        summary->words[level][word / 64] &= ~(UINT64_C(1) << word % 64);
}

/* The first word from `from` on that is not known to be full; as many as the map has when there is none. */
static inline uint64_t pc_summary_next(const struct pc_summary *summary, uint64_t from)
{
    uint32_t level = 0;

    /* Up as long as the rest of a word is full, then down to the first that is not. */
    for (;;) {
        uint64_t word = from / 64, clear;

        if (from >= summary->bits[level])
            return summary->bits[0];
        clear = ~pc_bits_word(summary->words[level], word) & pc_bits_mask(word, from, summary->bits[level] - from);
        if (clear && !level)
            return pc_bits_lowest(word, clear);
        if (clear) {
            from = pc_bits_lowest(word, clear) * 64;
            level--;
        } else if (level + 1 < summary->count) {
            from = word + 1;
            level++;
        } else {
            return summary->bits[0];
        }
    }
}

/* Anew, from a map of so many bits, which does not change meanwhile. */
static inline void pc_summary_make(struct pc_summary *summary, const uint64_t *map, uint64_t map_bits)
{
    for (uint32_t level = 0; level < summary->count; level++)
        for (uint64_t word = 0; word < (summary->bits[level] + 63) / 64; word++)
            summary->words[level][word] = 0;
    for (uint64_t word = 0; word < summary->bits[0]; word++)
        if (map[word] == pc_bits_mask(word, 0, map_bits))
            pc_summary_fill(summary, word);
}

#endif
