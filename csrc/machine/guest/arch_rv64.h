/* SPDX-License-Identifier: Apache-2.0
 *
 * rv64: the instructions C has no word for. A device request is a store to the device's address with its further
 * arguments in a1 to a4, which the machine reads from the hart that stores, as the kvm machine reads RBX to RDI. */
#ifndef PC_GUEST_ARCH_H
#define PC_GUEST_ARCH_H

/* Guest-physical addresses are the addresses the program uses. */
#define HAS_HOLE 0

static inline void relax(void)
{
    __asm__ volatile(".insn i 0x0f, 0, x0, x0, 0x010" ::: "memory"); /* pause, a hint; older assemblers do not know it */
}

static inline void halt(void)
{
    __asm__ volatile("wfi" ::: "memory");
}

static inline void release_barrier(void)
{
    __asm__ volatile("fence rw, w" ::: "memory");
}

static inline void out8(uint16_t port, uint8_t value)
{
    *(volatile uint8_t *)(PCG_MMIO + port) = value;
}

static inline void out32(uint16_t port, uint32_t value, uint64_t b, uint64_t c, uint64_t si, uint64_t di)
{
    register uint64_t a1 __asm__("a1") = b, a2 __asm__("a2") = c, a3 __asm__("a3") = si, a4 __asm__("a4") = di;
    __asm__ volatile("sw %0, 0(%1)" ::"r"(value), "r"(PCG_MMIO + port), "r"(a1), "r"(a2), "r"(a3), "r"(a4) : "memory");
}

static inline uint32_t in32(uint16_t port)
{
    return *(volatile uint32_t *)(PCG_MMIO + port);
}

static inline uint32_t exchange32(volatile uint32_t *p, uint32_t value)
{
    uint32_t old;
    __asm__ volatile("amoswap.w.aqrl %0, %2, %1" : "=r"(old), "+A"(*p) : "r"(value) : "memory");
    return old;
}

static inline void increment32(volatile uint32_t *p)
{
    __asm__ volatile("amoadd.w.aqrl zero, %1, %0" : "+A"(*p) : "r"(1) : "memory");
}

/* s10 and s11 belong to the workload: the compiler is told -ffixed-s10 -ffixed-s11, so nothing else touches them, and
 * what they hold exists in no memory that migration could bring in their place. */
static inline void xmm_store(uint64_t out[2])
{
    __asm__ volatile("mv %0, s10\n\tmv %1, s11" : "=&r"(out[0]), "=&r"(out[1]));
}

static inline void xmm_load(const uint64_t in[2])
{
    __asm__ volatile("mv s10, %0\n\tmv s11, %1" ::"r"(in[0]), "r"(in[1]));
}

#endif
