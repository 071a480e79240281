/* SPDX-License-Identifier: Apache-2.0
 *
 * The recorder: what a pager or page server counts, and which parts of the memory are there, over time (csrc/recorder/recorder.c).
 *
 * Threads: all recorders of a process have one thread together, for as long as there are any. Any thread may call anything but
 * pc_recorder_free, which is alone and last; calls but pc_recorder_phase wait for each other, and for a look at what is recorded:
 * microseconds.
 */
#ifndef POSTCOPY_RECORDER_H
#define POSTCOPY_RECORDER_H

#include <stdint.h>

#include "postcopy/engine.h"
#include "postcopy/machine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
struct pc_recorder;
#define PC_RECORD_COLUMNS 360
#define PC_RECORD_FAULTS 1000
#define PC_RECORD_BINS 128
#define PC_RECORD_COUNTS 48 /* for struct pc_pager_stats or pc_pageserver_stats */
struct pc_record_column {
    uint64_t at_ns; /* CLOCK_MONOTONIC */
    uint64_t phase; /* that it belongs to, from 0 */
    uint64_t counts[PC_RECORD_COUNTS]; /* the fields of that struct, in order; those of totals and of what is resident are 0 for a pager */
    uint64_t operations, blocked_ns;   /* of the machine's guest; of all tracked threads together */
    uint64_t waiting;                  /* the most threads that have waited since the column before */
    uint64_t quiet;                    /* 1: nothing has happened since that */
    uint8_t bins[PC_RECORD_BINS];
};
struct pc_record_summary {
    uint64_t columns, faults, bins; /* how many there are */
    uint64_t sample_every;          /* of so many faults one is in the sample */
    uint64_t period_ns;             /* of the last phase */
    uint64_t cost_ns;               /* processor time that looking has taken */
};
/* A recorder that looks as often as every `period_ns`, once it has something to look at. 0, -ENOMEM. */
int pc_recorder_new(uint64_t period_ns, struct pc_recorder **recorder);
/* What it looks at from here on: one of the first three, once, and a machine's guest; until pc_recorder_stop, and the guest until it is given
 * NULL. 0, or -errno where no thread could be started, or -ECANCELED after pc_recorder_stop: nothing of it is recorded then. */
int pc_recorder_pager(struct pc_recorder *recorder, struct pc_pager *pager);
int pc_recorder_metrics(struct pc_recorder *recorder, struct pc_metrics *metrics); /* of another process's pager */
int pc_recorder_pageserver(struct pc_recorder *recorder, struct pc_pageserver *server);
int pc_recorder_machine(struct pc_recorder *recorder, struct pc_machine *machine);
/* Another phase begins: a column now, and the next ones as close together as at first. */
int pc_recorder_phase(struct pc_recorder *recorder);
/* A last column. What is recorded is looked at no more. Again: no effect. */
int pc_recorder_stop(struct pc_recorder *recorder);
/* Copies: of as many columns and faults as there are, PC_RECORD_COLUMNS and PC_RECORD_FAULTS at most. */
int pc_recorder_read(struct pc_recorder *recorder, struct pc_record_column *columns, struct pc_record_fault *faults,
                     struct pc_record_summary *summary);
/* Waits for no thread. */
void pc_recorder_free(struct pc_recorder *recorder);
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
