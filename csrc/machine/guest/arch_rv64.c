/* SPDX-License-Identifier: Apache-2.0
 *
 * rv64: the state that no memory holds, set once and compared at each report: tp, s9 (which the compiler is told to leave
 * alone) and mscratch. The machine has no clock; what must not go back is the count of instructions. */
#include "guest.h"

enum { WHICH_S9, WHICH_MSCRATCH };
#define CSR_MSCRATCH 0x340

static uint64_t instructions(void)
{
    uint64_t count;
    __asm__ volatile("csrr %0, instret" : "=r"(count));
    return count;
}

void set_self(struct pcg_vcpu *v)
{
    __asm__ volatile("mv tp, %0" ::"r"(v));
}

void set_kept_registers(struct pcg_vcpu *v)
{
    __asm__ volatile("mv s9, %0" ::"r"(pcg_register_value(boot->nonce, v->id, WHICH_S9)));
    __asm__ volatile("csrw mscratch, %0" ::"r"(pcg_register_value(boot->nonce, v->id, WHICH_MSCRATCH)));
    v->last_tsc = instructions();
}

void check_kept_registers(struct pcg_vcpu *v)
{
    uint64_t found, expected;

    __asm__ volatile("mv %0, tp" : "=r"(found));
    if (found != (uint64_t)v)
        report_failure(v, PCG_FAIL_GS_BASE, 0, (uint64_t)v, found);
    __asm__ volatile("mv %0, s9" : "=r"(found));
    expected = pcg_register_value(boot->nonce, v->id, WHICH_S9);
    if (found != expected)
        report_failure(v, PCG_FAIL_XMM, 9, expected, found);
    __asm__ volatile("csrr %0, mscratch" : "=r"(found));
    expected = pcg_register_value(boot->nonce, v->id, WHICH_MSCRATCH);
    if (found != expected)
        report_failure(v, PCG_FAIL_MSR, CSR_MSCRATCH, expected, found);
    found = instructions();
    if (found < v->last_tsc)
        report_failure(v, PCG_FAIL_TSC, 0, v->last_tsc, found);
    v->last_tsc = found;
}
