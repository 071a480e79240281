/* SPDX-License-Identifier: Apache-2.0
 *
 * Start of day and the reports, the same in every guest program. */
#include "guest.h"

void report_failure(struct pcg_vcpu *v, uint64_t code, uint64_t where, uint64_t expected, uint64_t found)
{
    v->failures++;
    out32(PCG_PORT_REPORT, PCG_FAILURE, code, where, expected, found);
}

void report_ready(struct pcg_vcpu *v)
{
    (void)v;
    out32(PCG_PORT_REPORT, PCG_READY, boot->nonce, 0, 0, 0);
}

void report_count(struct pcg_vcpu *v)
{
    out32(PCG_PORT_REPORT, PCG_PROGRESS, v->operations, boot->nonce, 0, 0);
}

void report_progress(struct pcg_vcpu *v)
{
    check_kept_registers(v);
    report_count(v);
}

void wait_for_all(struct pcg_vcpu *v)
{
    v->phase = PCG_PHASE_WAIT;
    increment32(&boot->arrived);
    while (boot->arrived < boot->vcpus)
        relax();
    v->phase = PCG_PHASE_RUN;
}

void guest_main(uint64_t id) __attribute__((noreturn));

void guest_main(uint64_t id)
{
    struct pcg_vcpu *v = (struct pcg_vcpu *)(PCG_VCPU_PAGES + id * PCG_PAGE_BYTES);

    v->self = (uint64_t)v;
    v->id = id;
    if (boot->magic != PCG_MAGIC)
        report_failure(v, PCG_FAIL_BOOT, PCG_BOOT_INFO, PCG_MAGIC, boot->magic);
    set_self(v);
    if (id == 0) {
        uint64_t nonce = (uint64_t)in32(PCG_PORT_ENTROPY) << 32;
        nonce |= in32(PCG_PORT_ENTROPY) | 1u; /* zero means: not made yet */
        boot->nonce = nonce;
    }
    while (!boot->nonce)
        relax();
    set_kept_registers(v);
    v->phase = PCG_PHASE_INIT;
    workload(v);
}
