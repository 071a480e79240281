/* SPDX-License-Identifier: Apache-2.0
 *
 * Futexes whose word is in the page. A private one is known by its address, and touched only where its value counts; a shared
 * one is known by the page behind the address, which get_user_pages has to bring first.
 */
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core/util.h"
#include "faultpaths/fp.h"

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

#define EVERYWHERE PC_FP_ALL_MODES, PC_FP_ALL_BACKINGS

static uint32_t *word(const struct pc_fp_cell *cell)
{
    return (uint32_t *)(void *)(cell->page + PC_FP_AT_WORD);
}

/* The word is 0 and shall not be: that the kernel says EAGAIN is how it tells to have read it. */
static void wait_on(struct pc_fp_cell *cell, int flags)
{
    int64_t value;

    pc_fp_begin(cell);
    value = syscall(SYS_futex, word(cell), FUTEX_WAIT | flags, 1, NULL, NULL, 0);
    pc_fp_end_code(cell, value == -1 ? (errno == EAGAIN ? 0 : -errno) : value);
}

static void wait_private(struct pc_fp_cell *cell)
{
    wait_on(cell, FUTEX_PRIVATE_FLAG);
}

static void wait_shared(struct pc_fp_cell *cell)
{
    wait_on(cell, 0);
}

static void wake_private(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_futex, word(cell), FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0));
}

static void wake_shared(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_futex, word(cell), FUTEX_WAKE, 1, NULL, NULL, 0));
}

static void wake_op(struct pc_fp_cell *cell)
{
    uint32_t *elsewhere = (uint32_t *)(void *)(PC_FP_SCRATCH + PC_FP_IN_FREE);
    const uint32_t after = 5;

    PC_FP_ACT(cell, syscall(SYS_futex, elsewhere, FUTEX_WAKE_OP_PRIVATE, 1, 1, word(cell),
                            FUTEX_OP(FUTEX_OP_SET, 5, FUTEX_OP_CMP_EQ, 0)));
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, &after, PC_FP_AT_WORD, sizeof(after));
}

static void requeue(struct pc_fp_cell *cell)
{
    uint32_t *elsewhere = (uint32_t *)(void *)(PC_FP_SCRATCH + PC_FP_IN_FREE);

    PC_FP_ACT(cell, syscall(SYS_futex, word(cell), FUTEX_CMP_REQUEUE_PRIVATE, 1, 1, elsewhere, 0));
}

static void try_lock(struct pc_fp_cell *cell, int flags)
{
    const uint32_t owner = (uint32_t)cell->tid;

    PC_FP_ACT(cell, syscall(SYS_futex, word(cell), FUTEX_TRYLOCK_PI | flags, 0, NULL, NULL, 0));
    if (cell->shared->result.error == ENOSYS)
        pc_fp_unavailable(cell, ENOSYS, "FUTEX_TRYLOCK_PI");
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, &owner, PC_FP_AT_WORD, sizeof(owner));
}

static void try_lock_private(struct pc_fp_cell *cell)
{
    try_lock(cell, FUTEX_PRIVATE_FLAG);
}

static void try_lock_shared(struct pc_fp_cell *cell)
{
    try_lock(cell, 0);
}

struct waiter { /* struct futex_waitv */
    uint64_t value;
    uint64_t address;
    uint32_t flags;
    uint32_t reserved;
};

static void waitv(struct pc_fp_cell *cell)
{
    struct waiter waiter = {.value = 1, .address = (uintptr_t)word(cell), .flags = 2 /* 32 bits */ | FUTEX_PRIVATE_FLAG};
    int64_t value;

    pc_fp_begin(cell);
    value = syscall(SYS_futex_waitv, &waiter, 1, 0, NULL, 0);
    pc_fp_end_code(cell, value == -1 ? (errno == EAGAIN ? 0 : -errno) : value);
    if (cell->shared->result.error == ENOSYS)
        pc_fp_unavailable(cell, ENOSYS, "futex_waitv");
}

static const struct pc_fp_operation operations[] = {
    {{"futex.wait_private", "futex", "FUTEX_WAIT, private: get_user of the word", EVERYWHERE, 0}, wait_private},
    {{"futex.waitv_private", "futex", "futex_waitv, private: get_user of the word", EVERYWHERE, 0}, waitv},
    {{"futex.wake_private", "futex", "FUTEX_WAKE, private: the address says it all", EVERYWHERE, PC_FP_NOFAULT},
     wake_private},
    {{"futex.wake_op_private", "futex", "FUTEX_WAKE_OP, private: changes the word; its fixup_user_fault may not wait",
      EVERYWHERE, PC_FP_WRITES},
     wake_op},
    {{"futex.requeue_private", "futex", "FUTEX_CMP_REQUEUE, private: get_user of the word", EVERYWHERE, 0}, requeue},
    {{"futex.trylock_pi_private", "futex", "FUTEX_TRYLOCK_PI, private: changes the word; its fixup_user_fault may not wait",
      EVERYWHERE, PC_FP_WRITES},
     try_lock_private},
    {{"futex.wait_shared", "futex", "FUTEX_WAIT, shared: get_user_pages for the key", EVERYWHERE, 0}, wait_shared},
    {{"futex.wake_shared", "futex", "FUTEX_WAKE, shared: get_user_pages for the key", EVERYWHERE, 0}, wake_shared},
    {{"futex.trylock_pi_shared", "futex", "FUTEX_TRYLOCK_PI, shared: get_user_pages for the key, then the word is changed",
      EVERYWHERE, PC_FP_WRITES},
     try_lock_shared},
};

const struct pc_fp_class pc_fp_futex = {operations, PC_ARRAY_LENGTH(operations)};
