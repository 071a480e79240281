/* SPDX-License-Identifier: Apache-2.0
 *
 * User mode: the instructions themselves touch the page.
 */
#include <string.h>

#include "faultpaths/fp.h"

/* Here the compiler must not move the access out of the bracket, nor a sanitizer look at it. */
static volatile uint64_t *word_at(const struct pc_fp_cell *cell, uint64_t offset)
{
    return (volatile uint64_t *)(void *)(cell->page + offset);
}

static void user_load(struct pc_fp_cell *cell)
{
    uint64_t got;

    pc_fp_begin(cell);
    got = *word_at(cell, PC_FP_AT_OUT);
    pc_fp_end(cell, 0);
    pc_fp_verify(cell, &got, PC_FP_AT_OUT, sizeof(got));
    pc_fp_verify_kept(cell);
}

static void user_store(struct pc_fp_cell *cell)
{
    const uint64_t data = 0x0123456789abcdef;

    pc_fp_begin(cell);
    *word_at(cell, PC_FP_AT_OUT) = data;
    pc_fp_end(cell, 0);
    pc_fp_verify_out(cell, &data, sizeof(data));
}

static void user_locked_add(struct pc_fp_cell *cell)
{
    uint64_t data;

    memcpy(&data, cell->content + PC_FP_AT_OUT, sizeof(data));
    data++;
    pc_fp_begin(cell);
    (void)__atomic_fetch_add((uint64_t *)(void *)(cell->page + PC_FP_AT_OUT), 1, __ATOMIC_SEQ_CST);
    pc_fp_end(cell, 0);
    pc_fp_verify_out(cell, &data, sizeof(data));
}

#if defined(__x86_64__) || defined(__aarch64__)
static void user_execute(struct pc_fp_cell *cell)
{
    uint32_t (*function)(void) = (uint32_t (*)(void))(uintptr_t)(cell->page + PC_FP_AT_CODE);

    PC_FP_ACT(cell, function());
    pc_fp_check_value(cell, PC_FP_CODE_RETURNS);
    pc_fp_verify_kept(cell);
}
#else
static void user_execute(struct pc_fp_cell *cell)
{
    pc_fp_unavailable(cell, 0, "no code for this processor");
}
#endif

static void user_memcpy(struct pc_fp_cell *cell)
{
    static uint8_t got[PC_FP_BYTES];

    pc_fp_begin(cell);
    memcpy(got, cell->page, sizeof(got));
    pc_fp_end(cell, 0);
    pc_fp_verify(cell, got, 0, sizeof(got));
}

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(user, load, NOTHING, 0, "an instruction reads 8 bytes"),
    PC_FP_ROW(user, store, NOTHING, PC_FP_WRITES, "an instruction writes 8 bytes"),
    PC_FP_ROW(user, locked_add, NOTHING, PC_FP_WRITES, "an atomic read-modify-write instruction"),
    PC_FP_ROW_OF(user, execute, PC_FP_ALL_MODES, PC_FP_ALL_BACKINGS & ~(1u << PC_FP_GUEST_MEMFD), NOTHING, 0,
                 "the processor fetches an instruction"),
    PC_FP_ROW(user, memcpy, NOTHING, 0, "memcpy reads all of the page"),
};

const struct pc_fp_class pc_fp_user = {operations, PC_ARRAY_LENGTH(operations)};
