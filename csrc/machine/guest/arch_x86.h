/* SPDX-License-Identifier: Apache-2.0
 *
 * x86-64: the instructions C has no word for. arch_rv64.h has the same for the other architecture. */
#ifndef PC_GUEST_ARCH_H
#define PC_GUEST_ARCH_H

/* Guest-physical memory has a PC's hole. */
#define HAS_HOLE 1

static inline void relax(void)
{
    __asm__ volatile("pause" ::: "memory");
}

static inline void halt(void)
{
    __asm__ volatile("hlt" ::: "memory");
}

/* What was written before is seen by whoever sees what is written after: x86 keeps stores in order, only the compiler
 * must be told. */
static inline void release_barrier(void)
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

static inline void increment32(volatile uint32_t *p)
{
    __asm__ volatile("lock incl %0" : "+m"(*p)::"memory");
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
