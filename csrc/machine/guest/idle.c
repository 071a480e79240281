/* SPDX-License-Identifier: Apache-2.0
 *
 * idle: halts; the machine lets a halted vCPU sleep for a moment, then the next tick is counted. */
#include "guest.h"

void workload(struct pcg_vcpu *v)
{
    wait_for_all(v);
    report_ready(v);
    for (;;) {
        halt();
        v->operations++;
        report_progress(v);
    }
}
