/* SPDX-License-Identifier: Apache-2.0
 *
 * All operations, class by class, and those that only tests ask for.
 */
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "faultpaths/fp.h"

static const struct pc_fp_class *const classes[] = {&pc_fp_user,  &pc_fp_copy,   &pc_fp_arguments, &pc_fp_process,
                                                   &pc_fp_pin,   &pc_fp_futex,  &pc_fp_uring,     &pc_fp_kvm,
                                                   &pc_fp_remote, &pc_fp_net,   &pc_fp_nofault,   &pc_fp_device};

static void test_hang(struct pc_fp_cell *cell)
{
    /* Two generations of processes that do not end by themselves, one of them not this one's child any more. */
    if (!fork()) {
        if (fork())
            _exit(0);
        for (;;)
            pause();
    }
    pc_fp_begin(cell);
    for (;;)
        pause();
}

static void test_crash(struct pc_fp_cell *cell)
{
    pc_fp_begin(cell);
    (void)raise(SIGKILL);
}

static void test_wrong(struct pc_fp_cell *cell)
{
    uint8_t other = (uint8_t)~cell->content[0];

    PC_FP_ACT(cell, PC_FP_SMALL);
    pc_fp_verify(cell, &other, 0, 1);
    pc_fp_verify_taken(cell); /* does not wait for what was not taken */
}

static const struct pc_fp_operation tests[] = {
    PC_FP_ROW(test, hang, NOTHING, 0, "never ends"),
    PC_FP_ROW(test, crash, NOTHING, 0, "ends its process"),
    PC_FP_ROW(test, wrong, FULL_PIPE, 0, "finds other content, and less than it should"),
};

const struct pc_fp_operation *pc_fp_operation(uint32_t index)
{
    if (index >= PC_FP_TEST_WRONG)
        return &tests[PC_FP_TEST_HANG - index];
    for (size_t i = 0; i < PC_ARRAY_LENGTH(classes); i++) {
        if (index < classes[i]->count)
            return &classes[i]->operations[index];
        index -= classes[i]->count;
    }
    return NULL;
}

uint32_t pc_faultpath_count(void)
{
    uint32_t count = 0;

    for (size_t i = 0; i < PC_ARRAY_LENGTH(classes); i++)
        count += classes[i]->count;
    return count;
}

int pc_faultpath_get(uint32_t index, struct pc_faultpath *out)
{
    const struct pc_fp_operation *operation = index < pc_faultpath_count() ? pc_fp_operation(index) : NULL;

    if (!operation)
        return -EINVAL;
    *out = operation->about;
    return 0;
}
