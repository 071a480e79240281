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

#include "faultpaths/fp.h"

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

static uint32_t *word(const struct pc_fp_cell *cell)
{
    return (uint32_t *)(void *)(cell->page + PC_FP_AT_WORD);
}

/* The word is 0 and shall not be: that the kernel says EAGAIN is how it tells to have read it. */
static void wait_on(struct pc_fp_cell *cell, int flags)
{
    PC_FP_ACT_EXPECTING(cell, EAGAIN, syscall(SYS_futex, word(cell), FUTEX_WAIT | flags, 1, NULL, NULL, 0));
}
PC_FP_VARIANT(futex_wait_private, wait_on, FUTEX_PRIVATE_FLAG)
PC_FP_VARIANT(futex_wait_shared, wait_on, 0)

static void wake(struct pc_fp_cell *cell, int flags)
{
    PC_FP_ACT(cell, syscall(SYS_futex, word(cell), FUTEX_WAKE | flags, 1, NULL, NULL, 0));
}
PC_FP_VARIANT(futex_wake_private, wake, FUTEX_PRIVATE_FLAG)
PC_FP_VARIANT(futex_wake_shared, wake, 0)

static void futex_wake_op_private(struct pc_fp_cell *cell)
{
    uint32_t *elsewhere = (uint32_t *)(void *)(PC_FP_SCRATCH + PC_FP_IN_FREE);
    const uint32_t after = 5;

    PC_FP_ACT(cell, syscall(SYS_futex, elsewhere, FUTEX_WAKE_OP_PRIVATE, 1, 1, word(cell),
                            FUTEX_OP(FUTEX_OP_SET, 5, FUTEX_OP_CMP_EQ, 0)));
    pc_fp_verify_page(cell, &after, PC_FP_AT_WORD, sizeof(after));
}

static void futex_requeue_private(struct pc_fp_cell *cell)
{
    uint32_t *elsewhere = (uint32_t *)(void *)(PC_FP_SCRATCH + PC_FP_IN_FREE);

    PC_FP_ACT(cell, syscall(SYS_futex, word(cell), FUTEX_CMP_REQUEUE_PRIVATE, 1, 1, elsewhere, 0));
}

static void try_lock(struct pc_fp_cell *cell, int flags)
{
    const uint32_t owner = (uint32_t)cell->tid;

    PC_FP_ACT(cell, syscall(SYS_futex, word(cell), FUTEX_TRYLOCK_PI | flags, 0, NULL, NULL, 0));
    PC_FP_UNAVAILABLE_IF(cell, "FUTEX_TRYLOCK_PI", ENOSYS);
    pc_fp_verify_page(cell, &owner, PC_FP_AT_WORD, sizeof(owner));
}
PC_FP_VARIANT(futex_trylock_pi_private, try_lock, FUTEX_PRIVATE_FLAG)
PC_FP_VARIANT(futex_trylock_pi_shared, try_lock, 0)

struct waiter { /* struct futex_waitv */
    uint64_t value;
    uint64_t address;
    uint32_t flags;
    uint32_t reserved;
};

static void futex_waitv_private(struct pc_fp_cell *cell)
{
    struct waiter waiter = {.value = 1, .address = (uintptr_t)word(cell), .flags = 2 /* 32 bits */ | FUTEX_PRIVATE_FLAG};
    PC_FP_ACT_EXPECTING(cell, EAGAIN, syscall(SYS_futex_waitv, &waiter, 1, 0, NULL, 0));
    PC_FP_UNAVAILABLE_IF(cell, "futex_waitv", ENOSYS);
}

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(futex, wait_private, NOTHING, 0, "FUTEX_WAIT, private: get_user of the word"),
    PC_FP_ROW(futex, waitv_private, NOTHING, 0, "futex_waitv, private: get_user of the word"),
    PC_FP_ROW(futex, wake_private, NOTHING, PC_FP_NOFAULT, "FUTEX_WAKE, private: the address says it all"),
    PC_FP_ROW(futex, wake_op_private, NOTHING, PC_FP_WRITES,
              "FUTEX_WAKE_OP, private: changes the word; its fixup_user_fault may not wait"),
    PC_FP_ROW(futex, requeue_private, NOTHING, 0, "FUTEX_CMP_REQUEUE, private: get_user of the word"),
    PC_FP_ROW(futex, trylock_pi_private, NOTHING, PC_FP_WRITES,
              "FUTEX_TRYLOCK_PI, private: changes the word; its fixup_user_fault may not wait"),
    PC_FP_ROW(futex, wait_shared, NOTHING, 0, "FUTEX_WAIT, shared: get_user_pages for the key"),
    PC_FP_ROW(futex, wake_shared, NOTHING, 0, "FUTEX_WAKE, shared: get_user_pages for the key"),
    PC_FP_ROW(futex, trylock_pi_shared, NOTHING, PC_FP_WRITES,
              "FUTEX_TRYLOCK_PI, shared: get_user_pages for the key, then the word is changed"),
};

const struct pc_fp_class pc_fp_futex = {operations, PC_ARRAY_LENGTH(operations)};
