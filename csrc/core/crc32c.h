/* SPDX-License-Identifier: Apache-2.0
 *
 * The ways that pc_crc32c can go, for the test that compares them. The engine calls the public function only.
 */
#ifndef PC_CRC32C_H
#define PC_CRC32C_H

#include <stddef.h>
#include <stdint.h>

int pc_crc32c_has_cpu(void); /* whether the next one may be called */
uint32_t pc_crc32c_by_cpu(uint32_t crc, const void *data, size_t bytes);
uint32_t pc_crc32c_portable(uint32_t crc, const void *data, size_t bytes);

#endif
