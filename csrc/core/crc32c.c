/* SPDX-License-Identifier: Apache-2.0
 *
 * CRC-32C of pages and headers, and the question whether a page is all zero. Both see every byte that moves, so both have
 * a path for the CPU at hand.
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

static uint32_t crc32c_portable(uint32_t crc, const void *data, size_t bytes)
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

static int is_zero_portable(const void *data, size_t bytes)
{
    const uint8_t *at = data;
    uint64_t words[4];

    for (; bytes >= sizeof(words); bytes -= sizeof(words), at += sizeof(words)) {
        memcpy(words, at, sizeof(words));
        if (words[0] | words[1] | words[2] | words[3])
            return 0;
    }
    for (; bytes; bytes--)
        if (*at++)
            return 0;
    return 1;
}

#if defined(__x86_64__)
/* Three lanes of 1360 bytes are a 4 KiB page but for two words; three of 168 keep what is left of other lengths fast. */
#define LONG_LANE 1360
#define SHORT_LANE 168
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

__attribute__((target("sse4.2,pclmul"))) static uint32_t crc32c_sse42(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *at = data;
    uint64_t a = ~crc;

    for (; bytes >= 3 * LONG_LANE; bytes -= 3 * LONG_LANE, at += 3 * LONG_LANE)
        a = three_lanes(a, at, LONG_LANE, LONG_BY_TWO, LONG_BY_ONE);
    for (; bytes >= 3 * SHORT_LANE; bytes -= 3 * SHORT_LANE, at += 3 * SHORT_LANE)
        a = three_lanes(a, at, SHORT_LANE, SHORT_BY_TWO, SHORT_BY_ONE);
    for (; bytes >= 8; bytes -= 8, at += 8)
        a = _mm_crc32_u64(a, load64(at));
    for (; bytes; bytes--)
        a = _mm_crc32_u8((uint32_t)a, *at++);
    return ~(uint32_t)a;
}

__attribute__((target("avx2"))) static int is_zero_avx2(const void *data, size_t bytes)
{
    const uint8_t *at = data;

#define LOAD(offset) _mm256_loadu_si256((const __m256i *)(const void *)(at + (offset)))
    for (; bytes >= 128; bytes -= 128, at += 128) {
        __m256i all = _mm256_or_si256(_mm256_or_si256(LOAD(0), LOAD(32)), _mm256_or_si256(LOAD(64), LOAD(96)));

        if (!_mm256_testz_si256(all, all))
            return 0;
    }
#undef LOAD
    return is_zero_portable(at, bytes);
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

CRC_TARGET static uint32_t crc32c_armv8(uint32_t crc, const void *data, size_t bytes)
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

/* What the compiler's runtime and the C library have read from the CPU at the start: each question costs a load. */
#if defined(__x86_64__)
static int has_crc(void)
{
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2");
}
#elif defined(__aarch64__)
static int has_crc(void)
{
    return !!(getauxval(AT_HWCAP) & HWCAP_CRC32);
}
#endif

static int always(void)
{
    return 1;
}

const struct pc_crc32c_path pc_crc32c_paths[] = {
#if defined(__x86_64__)
    {has_crc, crc32c_sse42},
#elif defined(__aarch64__)
    {has_crc, crc32c_armv8},
#endif
    {always, crc32c_portable},
    {0},
};

const struct pc_is_zero_path pc_is_zero_paths[] = {
#if defined(__x86_64__)
    {has_avx2, is_zero_avx2},
#endif
    {always, is_zero_portable},
    {0},
};

uint32_t pc_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    const struct pc_crc32c_path *path = pc_crc32c_paths;

    while (!path->usable())
        path++;
    return path->function(crc, data, bytes);
}

int pc_is_zero(const void *data, size_t bytes)
{
    const struct pc_is_zero_path *path = pc_is_zero_paths;

    while (!path->usable())
        path++;
    return path->function(data, bytes);
}
