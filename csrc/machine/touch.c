/* SPDX-License-Identifier: Apache-2.0
 *
 * A wait for missing pages that a kick ends: reads one byte of each page, in user mode, so that a userfaultfd for user-mode faults
 * is enough. No lock is held meanwhile. The kick's signal leaves it by siglongjmp and cannot be lost: `leave` is raised before the
 * signal is sent, and looked at only after the jump's target has been set.
 */
#include <setjmp.h>

#include "machine/machine.h"

/* Where a kick leads while this thread may wait for a page. Initial-exec: a signal handler reads it, which must not
 * allocate. */
static _Thread_local sigjmp_buf *volatile escape __attribute__((tls_model("initial-exec")));

void pc_vcpu_touch_kicked(void)
{
    sigjmp_buf *to = escape;

    if (to)
        siglongjmp(*to, 1);
}

PC_RACY bool pc_vcpu_touch(struct pc_vcpu *vcpu, const uint8_t *memory, uint64_t bytes)
{
    sigjmp_buf out;

    if (sigsetjmp(out, 1)) {
        escape = NULL;
        return false;
    }
    escape = &out;
    atomic_signal_fence(memory_order_seq_cst);
    if (atomic_load(&vcpu->machine->leave)) {
        escape = NULL;
        return false;
    }
    for (uint64_t at = 0; at < bytes; at += PCG_PAGE_BYTES)
        (void)*(const volatile uint8_t *)(memory + at);
    (void)*(const volatile uint8_t *)(memory + bytes - 1);
    atomic_signal_fence(memory_order_seq_cst);
    escape = NULL;
    atomic_signal_fence(memory_order_seq_cst); /* nothing that the caller does is done in between */
    return true;
}
