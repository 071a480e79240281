/* SPDX-License-Identifier: Apache-2.0
 *
 * What a pager counts. Each number has one writer, or is added to atomically, and readers take no lock, so that none of them is ever
 * in the way of a fault. It may lie in a memfd, where it outlives the pager and is read by another process.
 */
#ifndef PC_PAGER_METRICS_H
#define PC_PAGER_METRICS_H

#include "core/view.h"
#include "memory/states.h"
#include "postcopy/engine.h"

/* Faults that have ended, for who samples them (recorder.c): the newest. */
#define PC_FAULT_RING 128
struct pc_fault_ring {
    uint64_t head; /* how many were put here; the next is at its remainder */
    struct pc_record_fault faults[PC_FAULT_RING];
};

struct pc_shard_metrics { /* written by the shard's fault thread */
    uint64_t pending;   /* threads that wait */
    uint64_t oldest_ns; /* since when the first of them waits; 0: none does */
    struct pc_histogram stages[PC_STAGES];
    struct pc_fault_ring ring;
};

struct pc_metrics_map {
    struct pc_pager_stats count; /* only its counters, each by atomic add; the rest stays 0 */
    uint64_t sample_every; /* faults, a power of two, of which one goes into the ring; 0: none. Written by who samples */
    int32_t tids[PC_MAX_TRACKED_THREADS]; /* whose faults are accounted to a slot; 0: no thread's */
    uint64_t blocked_ns[PC_MAX_TRACKED_THREADS];
    uint64_t blocked_since_ns[PC_MAX_TRACKED_THREADS]; /* 0: not now */
    struct pc_shard_metrics shards[PC_MAX_SHARDS];
};

struct pc_metrics {
    int fd; /* the memfd of `map`; -1: it is not shared */
    struct pc_metrics_map *map;
    struct pc_view view;                        /* of the pages that are received */
    struct pc_states states[PC_VIEW_MAPS];      /* of another process's pager, whose maps `view` has */
};
_Static_assert(PC_VIEW_MAPS == PC_MAX_BLOCKS, "a map for each block");

/* Maps what pc_metrics_new has made; undone by pc_buffer_free. 0, or -EINVAL for something else. */
int pc_metrics_map(int fd, struct pc_metrics_map **map);
struct pc_metrics *pc_pager_metrics(struct pc_pager *pager);
/* No thread waits any more, as far as is known: before the first fault, and for the successor of a pager that died. */
void pc_metrics_none_waits(struct pc_metrics_map *map);

#endif
