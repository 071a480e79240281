/* SPDX-License-Identifier: Apache-2.0
 *
 * Fault paths: what the files that make a cell share, and the operations do not see.
 */
#ifndef PC_FP_CELL_H
#define PC_FP_CELL_H

#include <pthread.h>

#include "faultpaths/fp.h"

/* ---- region.c: the memory of a cell ---- */
/* Maps the region with everything but the page in it, opens the userfaultfd and registers. False: said why it is unavailable. */
bool pc_fp_region_open(struct pc_fp_cell *cell);
/* How the region of a cell is mapped (mmap(2)). */
int pc_fp_region_prot(int backing);
/* The enum pc_uffd_mode that it is registered with. */
uint64_t pc_fp_register_mode(int mode);
/* Answers an event: gives the page as the cell's mode has it. */
void pc_fp_region_give(struct pc_fp_cell *cell);
/* WP modes: whether the page counts as written. */
bool pc_fp_region_written(const struct pc_fp_cell *cell);

/* ---- handler.c: the thread that reads events ---- */
struct pc_fp_handler {
    struct pc_fp_cell *cell;
    pthread_t thread;
    int stop_fd;
    int watched_tid; /* the thread that waits; 0: none yet */
    int watched_pid; /* its process */
};
int pc_fp_handler_start(struct pc_fp_handler *handler, struct pc_fp_cell *cell);
void pc_fp_handler_stop(struct pc_fp_handler *handler);

/* ---- locks.c ---- */
struct pc_fp_locks; /* a thread that measures calls beside a pending fault */
int pc_fp_locks_start(struct pc_fp_cell *cell, struct pc_fp_locks **locks); /* measures the idle times before it returns */
/* The fault is pending: measures again, for so long at most. */
void pc_fp_locks_measure(struct pc_fp_locks *locks, uint32_t timeout_ms);
#define PC_FP_LOCK_PAGES 256 /* of the region, for these measurements */

#endif
