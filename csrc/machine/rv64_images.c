/* SPDX-License-Identifier: Apache-2.0
 *
 * The rv64 engine: guest programs.
 */
#include "machine/rv64.h"

/* The text of guest/build_rv64.sh: little-endian RISC-V code, on any host. */
static const uint8_t rv64_idle[] = {
#include "machine/guest/rv64/idle.inc"
};
static const uint8_t rv64_dirty[] = {
#include "machine/guest/rv64/dirty.inc"
};
static const uint8_t rv64_random[] = {
#include "machine/guest/rv64/random.inc"
};
static const uint8_t rv64_disk[] = {
#include "machine/guest/rv64/disk.inc"
};
static const uint8_t rv64_echo[] = {
#include "machine/guest/rv64/echo.inc"
};

#define ROW(NAME, name) [PC_WORKLOAD_##NAME] = {rv64_##name, rv64_##name + sizeof rv64_##name},
const struct pc_image pc_rv64_images[] = {PC_WORKLOADS(ROW)};
