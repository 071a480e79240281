/* SPDX-License-Identifier: Apache-2.0
 *
 * CRC-32C of pages and headers, and the question whether a page is all zero. Both see every byte that moves, so both use what the
 * CPU at hand can do.
 *
 * x86-64: the crc32 instruction takes a new operand each cycle but needs three to answer. One dependent chain leaves two thirds
 * of it idle; so a buffer is cut into three lanes of equal length, checked side by side. A lane's checksum is then moved past the
 * lanes behind it, which is a multiplication by a power of x modulo the polynomial: PCLMULQDQ multiplies, and the crc32
 * instruction that takes in the buffer's last word reduces the product on the way (J. Gopal et al., "Fast CRC Computation for
 * iSCSI Polynomial Using CRC32 Instruction", Intel 2011).
 * AArch64: the CRC32C instructions, where the kernel says that the processor has them (they are optional in ARMv8.0).
 * Elsewhere: eight tables, eight bytes a step (M. Kounavis and F. Berry, "Slicing-by-8", Intel 2005).
 */
#include "core/crc32c.h"

#include <endian.h>
#include <pthread.h>
#include <string.h>

#include "postcopy/core.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define POLYNOMIAL 0x82F63B78u /* bit-reflected */

static uint32_t table[8][256];
static pthread_once_t table_once = PTHREAD_ONCE_INIT;

static void make_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;

        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
        table[0][i] = crc;
    }
    for (int slice = 1; slice < 8; slice++)
        for (uint32_t i = 0; i < 256; i++)
            table[slice][i] = (table[slice - 1][i] >> 8) ^ table[0][table[slice - 1][i] & 0xff];
}

static inline uint64_t load64(const uint8_t *at)
{
    uint64_t word;

    memcpy(&word, at, sizeof(word));
    return word;
}

uint32_t pc_crc32c_portable(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *at = data;

    (void)pthread_once(&table_once, make_table);
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, at += 8) {
        uint64_t word = le64toh(load64(at));
        uint32_t low = crc ^ (uint32_t)word, high = (uint32_t)(word >> 32);

        crc = table[7][low & 0xff] ^ table[6][low >> 8 & 0xff] ^ table[5][low >> 16 & 0xff] ^ table[4][low >> 24] ^
              table[3][high & 0xff] ^ table[2][high >> 8 & 0xff] ^ table[1][high >> 16 & 0xff] ^ table[0][high >> 24];
    }
    for (; bytes; bytes--)
        crc = (crc >> 8) ^ table[0][(crc ^ *at++) & 0xff];
    return ~crc;
}

#if defined(__x86_64__)
/* Three lanes of 1360 bytes are a 4 KiB page but for two words; three of 168 keep what is left of other lengths fast. */
#define LONG_LANE 1360
#define SHORT_LANE 168
#define CACHE_LINE_BYTES 64
/* x^(8 * bytes - 33) modulo the polynomial, reflected, for the distance a lane's checksum is moved; 33, since a carry-less
 * product of two reflected numbers is one bit off and the crc32 instruction multiplies by x^32. */
#define LONG_BY_TWO 0x5AA1F3CFu
#define LONG_BY_ONE 0x3F70CC6Fu
#define SHORT_BY_TWO 0xA60CE07Bu
#define SHORT_BY_ONE 0x1B3D8F29u

__attribute__((target("sse4.2,pclmul"))) static inline uint64_t multiply(uint64_t crc, uint32_t constant)
{
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)crc), _mm_cvtsi64_si128(constant), 0);

    return (uint64_t)_mm_cvtsi128_si64(product);
}

/* `lane` is a compile-time constant at both calls: the compiler unrolls. */
__attribute__((target("sse4.2,pclmul"), always_inline)) static inline uint64_t
three_lanes(uint64_t a, const uint8_t *at, size_t lane, uint32_t by_two, uint32_t by_one)
{
    const uint8_t *end = at + lane - 8;
    uint64_t b = 0, c = 0;

    for (; at < end; at += 8) {
        a = _mm_crc32_u64(a, load64(at));
        b = _mm_crc32_u64(b, load64(at + lane));
        c = _mm_crc32_u64(c, load64(at + 2 * lane));
    }
    a = _mm_crc32_u64(a, load64(at));
    b = _mm_crc32_u64(b, load64(at + lane));
    return _mm_crc32_u64(c, load64(at + 2 * lane) ^ multiply(a, by_two) ^ multiply(b, by_one));
}

/* Memory that is in no cache is fetched ahead by the processor when it is read in order, not when it is read in three lanes: three times
 * as fast, and what is sent next is copied from the cache. */
static inline void fetch(const uint8_t *at, size_t bytes)
{
    for (size_t line = 0; line < bytes; line += CACHE_LINE_BYTES)
        (void)*(const volatile uint8_t *)(at + line);
}

__attribute__((target("sse4.2,pclmul"))) uint32_t pc_crc32c_by_cpu(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *at = data;
    uint64_t a = ~crc;

    for (; bytes >= 3 * LONG_LANE; bytes -= 3 * LONG_LANE, at += 3 * LONG_LANE) {
        fetch(at, 3 * LONG_LANE);
        a = three_lanes(a, at, LONG_LANE, LONG_BY_TWO, LONG_BY_ONE);
    }
    for (; bytes >= 3 * SHORT_LANE; bytes -= 3 * SHORT_LANE, at += 3 * SHORT_LANE)
        a = three_lanes(a, at, SHORT_LANE, SHORT_BY_TWO, SHORT_BY_ONE);
    for (; bytes >= 8; bytes -= 8, at += 8)
        a = _mm_crc32_u64(a, load64(at));
    for (; bytes; bytes--)
        a = _mm_crc32_u8((uint32_t)a, *at++);
    return ~(uint32_t)a;
}
#endif

#if defined(__aarch64__)
/* Whatever the whole file is compiled for: which of the two paths runs is decided when it does. */
#if defined(__clang__)
#define CRC_TARGET __attribute__((target("crc")))
#define CRC_BYTE __builtin_arm_crc32cb
#define CRC_DOUBLE __builtin_arm_crc32cd
#else
#define CRC_TARGET __attribute__((target("+crc")))
#define CRC_BYTE __builtin_aarch64_crc32cb
#define CRC_DOUBLE __builtin_aarch64_crc32cx
#endif

CRC_TARGET uint32_t pc_crc32c_by_cpu(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *at = data;

    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, at += 8)
        crc = CRC_DOUBLE(crc, le64toh(load64(at)));
    for (; bytes; bytes--)
        crc = CRC_BYTE(crc, *at++);
    return ~crc;
}
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
uint32_t pc_crc32c_by_cpu(uint32_t crc, const void *data, size_t bytes)
{
    return pc_crc32c_portable(crc, data, bytes);
}
#endif

int pc_crc32c_has_cpu(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
#elif defined(__aarch64__)
    return !!(getauxval(AT_HWCAP) & HWCAP_CRC32);
#else
    return 0;
#endif
}

uint32_t pc_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    return pc_crc32c_has_cpu() ? pc_crc32c_by_cpu(crc, data, bytes) : pc_crc32c_portable(crc, data, bytes);
}

int pc_is_zero(const void *data, size_t bytes)
{
    static const uint8_t zeros[64];
    const uint8_t *at = data;
    size_t head = bytes < sizeof(zeros) ? bytes : sizeof(zeros);

    /* The head is zero, and each byte equals the one so far before it. The C library has a loop for the CPU at hand. */
    return !memcmp(at, zeros, head) && !memcmp(at, at + head, bytes - head);
}
