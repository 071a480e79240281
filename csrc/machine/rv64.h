/* SPDX-License-Identifier: Apache-2.0
 *
 * Private to csrc/machine: what state.c and the tests know of a hart. */
#ifndef PC_RV64_H
#define PC_RV64_H

#include <stdint.h>

#include "machine/machine.h"

/* A hart as it travels: little endian, no padding. */
struct pc_hart_state {
    uint64_t x[32]; /* x[0] is zero */
    uint64_t pc;
    uint64_t instructions;  /* executed since boot */
    uint64_t entropy_draws; /* from the entropy device: the next number follows from it and the seed */
    uint64_t mscratch;
    uint64_t reservation_address, reservation_value; /* of LR */
    uint32_t reservation_bytes;                      /* 4 or 8; 0: none */
    uint32_t zero;
};

/* Of a vCPU at rest. */
void pc_rv64_get_state(const struct pc_vcpu *vcpu, struct pc_hart_state *state);
void pc_rv64_set_state(struct pc_vcpu *vcpu, const struct pc_hart_state *state);
/* Whether a hart can be in that state: 0, or -EBADMSG. */
int pc_rv64_check_state(const struct pc_hart_state *state, uint32_t vcpu, char *error, size_t error_bytes);

#endif
