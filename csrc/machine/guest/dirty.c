/* SPDX-License-Identifier: Apache-2.0
 *
 * dirty: endless passes that add one to the first word of every page of this vCPU's part of the working set, in
 * address order. So at any instant pages before the cursor hold one more than those behind it, and nothing else may
 * differ: a page that comes late, twice or from the past shows.
 */
#include "guest.h"

#define REPORT_PAGES 512

static void pass_over(struct pcg_vcpu *v, uint64_t gva, uint64_t pages, uint64_t pass)
{
    volatile uint64_t *word = (volatile uint64_t *)gva;

    for (uint64_t i = 0; i < pages; i++, word += PCG_PAGE_BYTES / 8) {
        uint64_t found = *word;
        if (found != pass)
            report_failure(v, PCG_FAIL_PASS, (uint64_t)word, pass, found);
        *word = pass + 1; /* from the pass, not from what was found: one bad page is one report */
        v->operations++;
        if (v->operations % REPORT_PAGES == 0) /* of a large memory a pass may take seconds */
            report_count(v);
    }
}

void workload(struct pcg_vcpu *v)
{
    uint64_t begin = pcg_slice_begin(boot->shared.pages, v->id, boot->vcpus);
    uint64_t end = pcg_slice_begin(boot->shared.pages, v->id + 1, boot->vcpus);
    uint64_t shared_gva = boot->shared.gva + begin * PCG_PAGE_BYTES;
    uint64_t private_gva = boot->private_[v->id].gva, private_pages = boot->private_[v->id].pages;

    for (uint64_t pass = 0;; pass++) {
        pass_over(v, private_gva, private_pages, pass);
        pass_over(v, shared_gva, end - begin, pass);
        if (pass == 0) {
            wait_for_all(v);
            report_ready(v);
        }
        out8(PCG_PORT_SERIAL, (uint8_t)('a' + v->id));
        report_progress(v);
    }
}
