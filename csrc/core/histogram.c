/* SPDX-License-Identifier: Apache-2.0
 *
 * Log-linear histogram: values below 32 have a bucket each, every power of two above is cut into 32. One writer adds with plain
 * stores (no locked instruction stands in the path of a fault); readers beside it use relaxed loads and take the sum of the
 * buckets they saw for the count, so that what they compute is consistent in itself.
 */
#include "postcopy/core.h"

#define STEP_BITS 5
#define STEPS (1u << STEP_BITS)
_Static_assert(PC_HISTOGRAM_BUCKETS == (64 - STEP_BITS + 1) * STEPS, "every 64-bit value has a bucket");

static uint64_t load(const uint64_t *where)
{
    return __atomic_load_n(where, __ATOMIC_RELAXED);
}

static void store(uint64_t *where, uint64_t value)
{
    __atomic_store_n(where, value, __ATOMIC_RELAXED);
}

static uint32_t bucket_of(uint64_t ns)
{
    uint32_t exponent;

    if (ns < STEPS)
        return (uint32_t)ns;
    exponent = 63u - (uint32_t)__builtin_clzll(ns);
    return (exponent - STEP_BITS + 1) * STEPS + (uint32_t)((ns >> (exponent - STEP_BITS)) & (STEPS - 1));
}

static uint64_t upper_edge(uint32_t bucket)
{
    uint32_t shift;

    if (bucket < STEPS)
        return bucket;
    shift = bucket / STEPS - 1;
    return ((uint64_t)(STEPS + bucket % STEPS) << shift) + (((uint64_t)1 << shift) - 1);
}

void pc_histogram_add(struct pc_histogram *h, uint64_t ns)
{
    uint64_t *bucket = &h->buckets[bucket_of(ns)];

    if (ns > load(&h->max_ns))
        store(&h->max_ns, ns);
    store(&h->sum_ns, load(&h->sum_ns) + ns);
    store(&h->count, load(&h->count) + 1);
    store(bucket, load(bucket) + 1);
}

void pc_histogram_merge(struct pc_histogram *into, const struct pc_histogram *from)
{
    uint64_t added = 0, max_ns, sum_ns = load(&from->sum_ns);

    for (uint32_t i = 0; i < PC_HISTOGRAM_BUCKETS; i++) {
        uint64_t n = load(&from->buckets[i]);

        if (n) {
            store(&into->buckets[i], load(&into->buckets[i]) + n);
            added += n;
        }
    }
    /* After the buckets: the writer raises the maximum before it counts a value. (A reader that overtakes it is off by one
     * value in flight; percentiles are capped by the maximum and stay right.) */
    max_ns = load(&from->max_ns);
    if (max_ns > load(&into->max_ns))
        store(&into->max_ns, max_ns);
    store(&into->sum_ns, load(&into->sum_ns) + sum_ns);
    store(&into->count, load(&into->count) + added);
}

void pc_histogram_subtract(struct pc_histogram *from, const struct pc_histogram *earlier)
{
    from->count = 0;
    from->sum_ns -= earlier->sum_ns < from->sum_ns ? earlier->sum_ns : from->sum_ns;
    for (uint32_t i = 0; i < PC_HISTOGRAM_BUCKETS; i++) {
        from->buckets[i] -= earlier->buckets[i] < from->buckets[i] ? earlier->buckets[i] : from->buckets[i];
        from->count += from->buckets[i];
    }
}

uint64_t pc_histogram_bucket_edge(uint32_t bucket)
{
    return bucket < PC_HISTOGRAM_BUCKETS ? upper_edge(bucket) : UINT64_MAX;
}

uint64_t pc_histogram_percentile(const struct pc_histogram *h, double percentile)
{
    uint64_t total = 0, seen = 0, rank, max_ns;
    double wanted;

    for (uint32_t i = 0; i < PC_HISTOGRAM_BUCKETS; i++)
        total += load(&h->buckets[i]);
    if (!total)
        return 0;
    max_ns = load(&h->max_ns);
    if (!(percentile < 100.0)) /* NaN too: the worst value hides nothing */
        return max_ns;
    /* The rank of the value below or at which the share lies. The product is rounded to 1e-9 first, or 99.9 % of
     * 1000 would be rank 1000 by the last bit of 0.999. */
    wanted = percentile > 0 ? (double)total * (percentile / 100.0) : 0;
    wanted -= 1e-9 * wanted;
    rank = (uint64_t)wanted;
    if ((double)rank < wanted || !rank)
        rank++;
    for (uint32_t i = 0; i < PC_HISTOGRAM_BUCKETS; i++) {
        seen += load(&h->buckets[i]);
        if (seen >= rank) {
            uint64_t edge = upper_edge(i);

            return edge < max_ns ? edge : max_ns;
        }
    }
    return max_ns;
}
