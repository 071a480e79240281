/* SPDX-License-Identifier: Apache-2.0
 *
 * What `postcopy bench` measures with; nothing of the engine is used, but by pc_bench_claim. See csrc/bench/.
 *
 * Threads: no locks, no state. Each function may block for as long as a page is missing.
 */
#ifndef POSTCOPY_BENCH_H
#define POSTCOPY_BENCH_H

#include <stdint.h>

#include "postcopy/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
/* Reads one byte of `count` different pages out of `pages`, scattered by `seed`, and adds to `faults` how long each read
 * took that was not shorter than hit_ns (shorter: the page was there). Returns how many. */
int64_t pc_bench_touch(const void *base, uint64_t page_bytes, uint64_t pages, uint64_t count, uint64_t seed,
                       uint64_t hit_ns, struct pc_histogram *faults);
/* Starts a thread for each of so many pages, which reads a byte of it and ends: so many threads wait. 0 or -errno. */
int pc_bench_wait(void *base, uint64_t page_bytes, uint64_t pages);
void pc_bench_fill(void *base, uint64_t bytes, uint64_t seed); /* incompressible content */
/* The floor: 8 byte page number in, page out, until the peer closes. */
int pc_bench_floor_serve(int fd, const void *base, uint64_t page_bytes, uint64_t pages, int spin);
/* The floor's other end: event in, request, reply, UFFDIO_COPY, `count` times. */
int pc_bench_floor_fault(int uffd, int fd, void *base, uint64_t page_bytes, uint64_t count, int spin);
/* The floor of the bulk push: `bytes` into a connection, and out of it by UFFDIO_COPY into pages that are missing. 0 or -errno. */
int pc_bench_floor_push(int fd, const void *base, uint64_t bytes);
int pc_bench_floor_place(int uffd, int fd, void *base, uint64_t bytes);
/* Nanoseconds for each of `claims` runs of a page that a page server finds in a memory of so many pages of which all others are sent,
 * looking from the beginning each time; simulated, no memory is read. -errno where it cannot be. */
int64_t pc_bench_claim(uint64_t pages, uint64_t claims);
/* The least a program can do that serves faults of its own process: poll, read one event, COPY, `count` times. */
int pc_bench_uffd_serve(int uffd, const void *page, uint64_t page_bytes, uint64_t count);
/* A piece of a VMM's memory, as its handshake has it: `offset` in the image file. */
struct pc_bench_region {
    uint64_t address;
    uint64_t bytes;
    uint64_t offset;
};
/* The least that serves a VMM from an image file: mmap, then poll, read one event, COPY of one page, until `connection` says something
 * (it has ended). `example`: reads until there is no event, as the example of Firecracker's documentation. 0 or -errno. */
int pc_bench_image_serve(int uffd, int connection, int image_fd, uint64_t image_bytes, const struct pc_bench_region *regions, unsigned count,
                         int example);
/* How fast a part of an image can be placed: COPY in runs, from a mapping that is populated. 0 or -errno. */
int pc_bench_image_place(int uffd, int image_fd, uint64_t offset, uint64_t address, uint64_t bytes, uint64_t run_bytes);
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
