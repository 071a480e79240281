/* SPDX-License-Identifier: Apache-2.0
 *
 * What the guest programs share: instructions C has no word for, reports, and the checks of live CPU state. */
#ifndef PC_GUEST_H
#define PC_GUEST_H

#include "abi.h"

#define boot ((volatile struct pcg_boot *)PCG_BOOT_INFO)

/* Each workload's program; called once per vCPU, never returns. */
void workload(struct pcg_vcpu *v) __attribute__((noreturn));

void report_ready(struct pcg_vcpu *v);
/* Also checks the registers that no instruction of the workload changes. */
void report_mark(struct pcg_vcpu *v);
void report_failure(struct pcg_vcpu *v, uint64_t code, uint64_t where, uint64_t expected, uint64_t found);
/* Every vCPU's initial pass is complete when this returns. */
void wait_for_all(struct pcg_vcpu *v);

static inline void relax(void)
{
    __asm__ volatile("pause" ::: "memory");
}

static inline void halt(void)
{
    __asm__ volatile("hlt" ::: "memory");
}

static inline void compiler_barrier(void)
{
    __asm__ volatile("" ::: "memory");
}

static inline void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" ::"a"(value), "d"(port) : "memory");
}

static inline void out32(uint16_t port, uint32_t value, uint64_t b, uint64_t c, uint64_t si, uint64_t di)
{
    __asm__ volatile("outl %0, %1" ::"a"(value), "d"(port), "b"(b), "c"(c), "S"(si), "D"(di) : "memory");
}

static inline uint32_t in32(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "d"(port) : "memory");
    return value;
}

static inline uint32_t exchange32(volatile uint32_t *p, uint32_t value)
{
    __asm__ volatile("xchgl %0, %1" : "+r"(value), "+m"(*p)::"memory");
    return value;
}

static inline uint64_t rdmsr(uint32_t index)
{
    uint32_t low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (uint64_t)high << 32 | low;
}

static inline void wrmsr(uint32_t index, uint64_t value)
{
    __asm__ volatile("wrmsr" ::"c"(index), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

/*
 * XMM7 belongs to the workload: the compiler is told -mgeneral-regs-only, so nothing else touches it, and what it
 * holds exists in no memory that migration could bring in its place. Plain moves only: an emulating KVM knows few
 * SSE instructions.
 */
static inline void xmm_store(uint64_t out[2])
{
    __asm__ volatile("movdqu %%xmm7, %0" : "=m"(*(uint64_t(*)[2])out));
}

static inline void xmm_load(const uint64_t in[2])
{
    __asm__ volatile("movdqu %0, %%xmm7" ::"m"(*(const uint64_t(*)[2])in));
}

#endif
