/* SPDX-License-Identifier: Apache-2.0
 *
 * The ways pc_crc32c and pc_is_zero can go, for the test that compares them. The engine calls the public functions only.
 */
#ifndef PC_CRC32C_H
#define PC_CRC32C_H

#include <stddef.h>
#include <stdint.h>

struct pc_crc32c_path {
    const char *name;
    int usable; /* on this CPU */
    uint32_t (*function)(uint32_t crc, const void *data, size_t bytes);
};
struct pc_is_zero_path {
    const char *name;
    int usable;
    int (*function)(const void *data, size_t bytes);
};
/* Number of paths compiled in, best first; the last is the portable one. */
size_t pc_crc32c_paths(const struct pc_crc32c_path **paths);
size_t pc_is_zero_paths(const struct pc_is_zero_path **paths);

#endif
