/* SPDX-License-Identifier: Apache-2.0 */
#include "core/view.h"

#include "core/bits.h"

#define LINE_WORDS 8u   /* looked at together: a cache line */
#define BUDGET_WORDS 8192u /* looked at in all: exact up to 2 GiB in pages of 4 KiB */

void pc_view_add(struct pc_view *view, const uint64_t *words, uint64_t pages, uint64_t page_bytes)
{
    uint32_t number = view->count;

    view->maps[number] =
        (struct pc_view_map){.words = words, .pages = pages, .page_bytes = page_bytes, .offset = pc_view_bytes(view)};
    __atomic_store_n(&view->count, number + 1, __ATOMIC_RELEASE);
}

uint64_t pc_view_bytes(const struct pc_view *view)
{
    uint32_t count = __atomic_load_n(&view->count, __ATOMIC_ACQUIRE);
    const struct pc_view_map *last = &view->maps[count ? count - 1 : 0];

    return count ? last->offset + last->pages * last->page_bytes : 0;
}

/* The first page that begins at or after a byte of the whole memory. */
static uint64_t page_at(const struct pc_view_map *map, uint64_t byte)
{
    uint64_t page = byte > map->offset ? (byte - map->offset + map->page_bytes - 1) / map->page_bytes : 0;

    return page < map->pages ? page : map->pages;
}

/* How many of [first, end) are there; of more than `words` words of the map, as far as an even sample says. */
static double count_pages(const uint64_t *map, uint64_t first, uint64_t end, uint64_t words)
{
    uint64_t lines = words < LINE_WORDS ? 1 : words / LINE_WORDS, here = 0, looked = 0;

    if ((end - first) / 64 <= words)
        return (double)pc_bits_count(map, first, end - first);
    for (uint64_t line = 0; line < lines; line++) {
        uint64_t from = first + (end - first) / lines * line, to;

        from -= from % (64 * LINE_WORDS);
        to = from + UINT64_C(64) * LINE_WORDS;
        from = from < first ? first : from;
        to = to > end ? end : to;
        here += pc_bits_count(map, from, to - from);
        looked += to - from;
    }
    return (double)here / (double)looked * (double)(end - first);
}

uint32_t pc_view_bins(const struct pc_view *view, uint8_t *bins, uint32_t count)
{
    uint32_t maps = __atomic_load_n(&view->count, __ATOMIC_ACQUIRE);
    uint64_t bytes = pc_view_bytes(view), pages = 0;

    for (uint32_t i = 0; i < maps; i++)
        pages += view->maps[i].pages;
    if (count > pages)
        count = (uint32_t)pages;
    for (uint32_t bin = 0; bin < count; bin++) {
        uint64_t start = bytes / count * bin + bytes % count * bin / count, next = bin + UINT64_C(1);
        uint64_t end = bytes / count * next + bytes % count * next / count;
        double here = 0, all = 0;

        for (uint32_t i = 0; i < maps; i++) {
            const struct pc_view_map *map = &view->maps[i];
            uint64_t first = page_at(map, start), last = page_at(map, end);

            if (first < last) {
                here += count_pages(map->words, first, last, BUDGET_WORDS / count) * (double)map->page_bytes;
                all += (double)(last - first) * (double)map->page_bytes;
            }
        }
        if (all <= 0) /* within a page that began before it: blocks differ in the size of their pages */
            bins[bin] = bin ? bins[bin - 1] : 0;
        else if (here <= 0 || here >= all)
            bins[bin] = here <= 0 ? 0 : PC_VIEW_FULL;
        else
            bins[bin] = (uint8_t)(1 + (uint32_t)(here / all * (PC_VIEW_FULL - 1)));
    }
    return count;
}
