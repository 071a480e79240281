/* SPDX-License-Identifier: Apache-2.0
 *
 * x86-64: the state that no memory holds, set once and compared at each report. */
#include "guest.h"

#define MSR_SYSENTER_CS    0x174
#define MSR_SYSENTER_ESP   0x175
#define MSR_SYSENTER_EIP   0x176
#define MSR_PAT            0x277
#define MSR_STAR           0xc0000081
#define MSR_LSTAR          0xc0000082
#define MSR_CSTAR          0xc0000083
#define MSR_SFMASK         0xc0000084
#define MSR_FS_BASE        0xc0000100
#define MSR_GS_BASE        0xc0000101
#define MSR_KERNEL_GS_BASE 0xc0000102

/*
 * MSRs set once and compared at each report, with the bits that every vendor keeps: addresses must be canonical, and
 * AMD keeps 32 bits of the SYSENTER ones.
 */
static const struct {
    uint32_t index;
    uint64_t mask;
} kept_msrs[] = {
    { MSR_SYSENTER_CS, 0xfffc },         { MSR_SYSENTER_ESP, 0x7ffffff8 }, { MSR_SYSENTER_EIP, 0x7fffffff },
    { MSR_STAR, 0xffffffffffffffff },    { MSR_LSTAR, 0x7fffffffffff },    { MSR_CSTAR, 0x7fffffffffff },
    { MSR_SFMASK, 0xffffffff },          { MSR_FS_BASE, 0x7fffffffffff },  { MSR_KERNEL_GS_BASE, 0x7fffffffffff },
};
#define KEPT_MSRS (sizeof kept_msrs / sizeof *kept_msrs)

/* Numbers for pcg_register_value() beyond the table above. */
enum { WHICH_CR2 = 32, WHICH_DR = 40 };

static uint64_t kept_cr2(const struct pcg_vcpu *v)
{
    return pcg_register_value(boot->nonce, v->id, WHICH_CR2) & 0x7fffffffffff;
}

static uint64_t kept_dr(const struct pcg_vcpu *v, uint64_t n)
{
    return pcg_register_value(boot->nonce, v->id, WHICH_DR + n) & 0x7fffffffffff;
}

void set_kept_registers(struct pcg_vcpu *v)
{
    for (uint64_t i = 0; i < KEPT_MSRS; i++)
        wrmsr(kept_msrs[i].index, pcg_register_value(boot->nonce, v->id, i) & kept_msrs[i].mask);
    wrmsr(MSR_PAT, PCG_PAT);
    __asm__ volatile("mov %0, %%cr2" ::"r"(kept_cr2(v)));
    /* DR7 enables none of them, so they only hold a value. */
    __asm__ volatile("mov %0, %%dr0" ::"r"(kept_dr(v, 0)));
    __asm__ volatile("mov %0, %%dr1" ::"r"(kept_dr(v, 1)));
    __asm__ volatile("mov %0, %%dr2" ::"r"(kept_dr(v, 2)));
    __asm__ volatile("mov %0, %%dr3" ::"r"(kept_dr(v, 3)));
    v->last_tsc = rdtsc();
}

void check_kept_registers(struct pcg_vcpu *v)
{
    uint64_t found, expected, tsc;

    __asm__ volatile("movq %%gs:0, %0" : "=r"(found));
    if (found != (uint64_t)v)
        report_failure(v, PCG_FAIL_GS_BASE, 0, (uint64_t)v, found);
    for (uint64_t i = 0; i < KEPT_MSRS; i++) {
        found = rdmsr(kept_msrs[i].index);
        expected = pcg_register_value(boot->nonce, v->id, i) & kept_msrs[i].mask;
        if (found != expected)
            report_failure(v, PCG_FAIL_MSR, kept_msrs[i].index, expected, found);
    }
    found = rdmsr(MSR_PAT);
    if (found != PCG_PAT)
        report_failure(v, PCG_FAIL_MSR, MSR_PAT, PCG_PAT, found);
    __asm__ volatile("mov %%cr2, %0" : "=r"(found));
    if (found != kept_cr2(v))
        report_failure(v, PCG_FAIL_CR2, 0, kept_cr2(v), found);
    __asm__ volatile("mov %%dr0, %0" : "=r"(found));
    if (found != kept_dr(v, 0))
        report_failure(v, PCG_FAIL_DEBUGREG, 0, kept_dr(v, 0), found);
    __asm__ volatile("mov %%dr3, %0" : "=r"(found));
    if (found != kept_dr(v, 3))
        report_failure(v, PCG_FAIL_DEBUGREG, 3, kept_dr(v, 3), found);
    tsc = rdtsc();
    if (tsc < v->last_tsc)
        report_failure(v, PCG_FAIL_TSC, 0, v->last_tsc, tsc);
    v->last_tsc = tsc;
}

void set_self(struct pcg_vcpu *v)
{
    wrmsr(MSR_GS_BASE, (uint64_t)v);
}
