/* SPDX-License-Identifier: Apache-2.0
 *
 * Makes, maps and reads the metrics (metrics.h). Any thread may read; only pc_metrics_none_waits writes, before there are threads.
 */
#include "pager/metrics.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/runtime.h"
#include "memory/states.h"

static uint64_t load(const uint64_t *where)
{
    return __atomic_load_n(where, __ATOMIC_RELAXED);
}

int pc_metrics_map(int fd, struct pc_metrics_map **map)
{
    void *base;
    int error = pc_memfd_map(fd, sizeof(**map), &base);

    if (!error)
        *map = base;
    return error;
}

void pc_metrics_none_waits(struct pc_metrics_map *map)
{
    for (int i = 0; i < PC_MAX_SHARDS; i++) {
        __atomic_store_n(&map->shards[i].pending, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&map->shards[i].oldest_ns, 0, __ATOMIC_RELAXED);
    }
    for (int i = 0; i < PC_MAX_TRACKED_THREADS; i++)
        __atomic_store_n(&map->blocked_since_ns[i], 0, __ATOMIC_RELAXED);
}

/* ---- the public face: of a pager's metrics too, see pager.c ---- */

int pc_metrics_new(struct pc_metrics **out)
{
    struct pc_metrics *metrics = calloc(1, sizeof(*metrics));
    int error;

    if (!metrics)
        return -ENOMEM;
    metrics->fd = pc_memfd_new("postcopy-metrics", sizeof(*metrics->map), 0);
    error = metrics->fd < 0 ? metrics->fd : pc_metrics_map(metrics->fd, &metrics->map);
    if (error) {
        if (metrics->fd >= 0)
            close(metrics->fd);
        free(metrics);
        return error;
    }
    *out = metrics;
    return 0;
}

void pc_metrics_free(struct pc_metrics *metrics)
{
    for (uint32_t i = 0; i < metrics->view.count; i++)
        pc_buffer_free(metrics->states[i].base, metrics->states[i].bytes);
    pc_buffer_free(metrics->map, sizeof(*metrics->map));
    close(metrics->fd);
    free(metrics);
}

int pc_metrics_fd(struct pc_metrics *metrics)
{
    return metrics->fd;
}

int pc_metrics_add_states(struct pc_metrics *metrics, int states_fd, uint64_t pages, uint64_t page_bytes)
{
    uint32_t number = metrics->view.count;
    int error = number < PC_VIEW_MAPS ? pc_states_map(states_fd, pages, &metrics->states[number]) : -ENOSPC;

    if (!error)
        pc_view_add(&metrics->view, metrics->states[number].received, pages, page_bytes);
    return error;
}

int pc_metrics_bins(struct pc_metrics *metrics, uint8_t *bins, uint32_t count)
{
    return (int)pc_view_bins(&metrics->view, bins, count);
}

int pc_metrics_track_thread(struct pc_metrics *metrics, uint32_t slot, int32_t tid)
{
    if (slot >= PC_MAX_TRACKED_THREADS)
        return -EINVAL;
    __atomic_store_n(&metrics->map->tids[slot], tid, __ATOMIC_RELAXED);
    return 0;
}

int pc_metrics_stats(struct pc_metrics *metrics, struct pc_pager_stats *stats)
{
    const struct pc_metrics_map *map = metrics->map;
    uint64_t now_ns = pc_now_ns();

    for (size_t i = 0; i < sizeof(*stats) / sizeof(uint64_t); i++)
        ((uint64_t *)stats)[i] = load(&((const uint64_t *)&map->count)[i]);
    for (int i = 0; i < PC_MAX_SHARDS; i++) {
        uint64_t oldest_ns = load(&map->shards[i].oldest_ns);

        stats->pending_faults += __atomic_load_n(&map->shards[i].pending, __ATOMIC_ACQUIRE);
        if (oldest_ns && now_ns > oldest_ns && now_ns - oldest_ns > stats->oldest_pending_ns)
            stats->oldest_pending_ns = now_ns - oldest_ns;
    }
    return 0;
}

int pc_metrics_latency(struct pc_metrics *metrics, int stage, struct pc_histogram *histogram)
{
    const struct pc_metrics_map *map = metrics->map;

    if (stage < 0 || stage >= PC_STAGES)
        return -EINVAL;
    memset(histogram, 0, sizeof(*histogram));
    for (int i = 0; i < PC_MAX_SHARDS; i++)
        if (load(&map->shards[i].stages[stage].count))
            pc_histogram_merge(histogram, &map->shards[i].stages[stage]);
    return 0;
}

int pc_metrics_blocktime(struct pc_metrics *metrics, uint64_t *blocktime_ns, uint32_t slots)
{
    const struct pc_metrics_map *map = metrics->map;
    uint64_t now_ns = pc_now_ns();

    if (slots > PC_MAX_TRACKED_THREADS)
        slots = PC_MAX_TRACKED_THREADS;
    for (uint32_t slot = 0; slot < slots; slot++) {
        uint64_t since_ns = load(&map->blocked_since_ns[slot]);

        blocktime_ns[slot] = load(&map->blocked_ns[slot]);
        if (since_ns && now_ns > since_ns)
            blocktime_ns[slot] += now_ns - since_ns;
    }
    return (int)slots;
}
