/* SPDX-License-Identifier: Apache-2.0
 *
 * The ways pc_crc32c and pc_is_zero can go, for the test that compares them. The engine calls the public functions only.
 */
#ifndef PC_CRC32C_H
#define PC_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Best first; the last is the portable one, and an empty entry follows it. */
extern const struct pc_crc32c_path {
    int (*usable)(void); /* on this CPU */
    uint32_t (*function)(uint32_t crc, const void *data, size_t bytes);
} pc_crc32c_paths[];
extern const struct pc_is_zero_path {
    int (*usable)(void);
    int (*function)(const void *data, size_t bytes);
} pc_is_zero_paths[];

#endif
