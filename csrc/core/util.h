/* SPDX-License-Identifier: Apache-2.0
 *
 * What several C files need and none of them owns.
 */
#ifndef PC_UTIL_H
#define PC_UTIL_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define PC_ARRAY_LENGTH(array) (sizeof(array) / sizeof((array)[0]))

/* Puts one line for a person into an `error` buffer (may be NULL) and returns -code, so that a failing function can end
 * with `return pc_fail(...)`. A line that does not fit is cut, never overrun. */
__attribute__((format(printf, 4, 5))) static inline int pc_fail(int code, char *error, size_t error_bytes,
                                                                const char *format, ...)
{
    va_list arguments;

    if (error && error_bytes) {
        va_start(arguments, format);
        (void)vsnprintf(error, error_bytes, format, arguments);
        va_end(arguments);
    }
    return -code;
}

/* The wire is little endian whatever the host is; byte by byte, which compilers turn into one access where they may. */
static inline void pc_put_le16(uint8_t *out, uint16_t value)
{
    out[0] = (uint8_t)value;
    out[1] = (uint8_t)(value >> 8);
}

static inline void pc_put_le32(uint8_t *out, uint32_t value)
{
    pc_put_le16(out, (uint16_t)value);
    pc_put_le16(out + 2, (uint16_t)(value >> 16));
}

static inline void pc_put_le64(uint8_t *out, uint64_t value)
{
    pc_put_le32(out, (uint32_t)value);
    pc_put_le32(out + 4, (uint32_t)(value >> 32));
}

static inline uint16_t pc_get_le16(const uint8_t *in)
{
    return (uint16_t)(in[0] | in[1] << 8);
}

static inline uint32_t pc_get_le32(const uint8_t *in)
{
    return (uint32_t)pc_get_le16(in) | (uint32_t)pc_get_le16(in + 2) << 16;
}

static inline uint64_t pc_get_le64(const uint8_t *in)
{
    return (uint64_t)pc_get_le32(in) | (uint64_t)pc_get_le32(in + 4) << 32;
}

#endif
