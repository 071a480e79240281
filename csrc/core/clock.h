/* SPDX-License-Identifier: Apache-2.0
 *
 * The one clock: CLOCK_MONOTONIC in nanoseconds. A deadline is a time on it.
 */
#ifndef PC_CLOCK_H
#define PC_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t pc_now_ns(void)
{
    struct timespec now;

    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline struct timespec pc_timespec(uint64_t ns)
{
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
}

/* May be shorter: a signal ends it. */
static inline void pc_sleep_ns(uint64_t ns)
{
    struct timespec time = pc_timespec(ns);

    (void)nanosleep(&time, NULL);
}

#endif
