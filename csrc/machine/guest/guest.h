/* SPDX-License-Identifier: Apache-2.0
 *
 * What the guest programs share: instructions C has no word for, reports, and the checks of live CPU state. */
#ifndef PC_GUEST_H
#define PC_GUEST_H

#include "abi.h"
#if defined(__riscv)
#include "arch_rv64.h"
#else
#include "arch_x86.h"
#endif

#define boot ((volatile struct pcg_boot *)PCG_BOOT_INFO)

/* Each workload's program; called once per vCPU, never returns. */
void workload(struct pcg_vcpu *v) __attribute__((noreturn));

void report_ready(struct pcg_vcpu *v);
void report_count(struct pcg_vcpu *v);
/* Also checks the registers that no instruction of the workload changes. */
void report_progress(struct pcg_vcpu *v);
void report_failure(struct pcg_vcpu *v, uint64_t code, uint64_t where, uint64_t expected, uint64_t found);
/* Every vCPU's initial pass is complete when this returns. */
void wait_for_all(struct pcg_vcpu *v);

/* The architecture's part: arch_x86.c, arch_rv64.c. */
void set_self(struct pcg_vcpu *v);
void set_kept_registers(struct pcg_vcpu *v);
void check_kept_registers(struct pcg_vcpu *v);

#endif
