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

#endif
