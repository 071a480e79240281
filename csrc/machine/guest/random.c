/* SPDX-License-Identifier: Apache-2.0
 *
 * random: read, check, modify, write pages picked by a xorshift sequence. Each vCPU picks from its private pages and
 * from the shared ones, which all vCPUs change under a lock word in the page itself. It is the program of sequential, zipf and
 * phases too, which pick otherwise (abi.h), from the private pages and this vCPU's slice of the shared ones: no lock there, since
 * reading would then write too.
 *
 * The sequence is a function of seed and vCPU only, so the machine can replay it from outside and knows the exact
 * count that every page must have. The generator's state lives in registers that
 * nothing else uses (x86: XMM7, rv64: s10 and s11) while a page is changed, which is most of the time,
 * and therefore when the machine is moved.
 */
#include "guest.h"

static const uint16_t check_offsets[PCG_CHECK_WORDS] = PCG_CHECK_OFFSETS;

static void write_checks(volatile uint64_t *page, uint64_t count)
{
    uint64_t base = pcg_check_base(boot->seed, (uint64_t)page, count);

    for (uint64_t k = 0; k < PCG_CHECK_WORDS; k++)
        page[check_offsets[k]] = pcg_check_word(base, k);
}

static void initialise(struct pcg_vcpu *v, uint64_t gva, uint64_t pages)
{
    for (uint64_t i = 0; i < pages; i++, gva += PCG_PAGE_BYTES) {
        write_checks((volatile uint64_t *)gva, 0);
        v->init_done++;
    }
}

static void visit_page(struct pcg_vcpu *v, uint64_t gva, int shared, int changes)
{
    volatile uint64_t *page = (volatile uint64_t *)gva;
    volatile uint32_t *lock = (volatile uint32_t *)&page[PCG_WORD_LOCK];
    uint64_t count, base;

    if (shared)
        while (exchange32(lock, (uint32_t)v->id + 1))
            relax();
    count = page[PCG_WORD_COUNT];
    base = pcg_check_base(boot->seed, gva, count);
    for (uint64_t k = 0; k < PCG_CHECK_WORDS; k++) {
        uint64_t found = page[check_offsets[k]], expected = pcg_check_word(base, k);
        if (found != expected)
            report_failure(v, PCG_FAIL_CHECK_WORD, (uint64_t)&page[check_offsets[k]], expected, found);
    }
    if (changes) {
        page[PCG_WORD_COUNTS + v->id]++;
        page[PCG_WORD_COUNT] = count + 1;
        write_checks(page, count + 1);
    }
    release_barrier(); /* whoever sees the lock free sees the page */
    if (shared)
        *lock = 0;
}

void workload(struct pcg_vcpu *v)
{
    uint64_t shared_pages = boot->shared.pages, shared_gva = boot->shared.gva;
    uint64_t private_pages = boot->private_[v->id].pages, private_gva = boot->private_[v->id].gva;
    uint64_t begin = pcg_slice_begin(shared_pages, v->id, boot->vcpus);
    uint64_t end = pcg_slice_begin(shared_pages, v->id + 1, boot->vcpus);
    uint64_t state[2] = { pcg_rng_seed(boot->seed, v->id), boot->nonce };
    uint32_t pattern = boot->pattern;
    int is_random = pattern == PCG_RANDOM;
    uint64_t pages = private_pages + (is_random ? shared_pages : end - begin);

    initialise(v, private_gva, private_pages);
    initialise(v, shared_gva + begin * PCG_PAGE_BYTES, end - begin);
    v->rng = state[0];
    wait_for_all(v);
    report_ready(v);
    xmm_load(state);
    for (;;) {
        uint64_t i;
        int changes;

        xmm_store(state);
        if (state[0] != v->rng) {
            report_failure(v, PCG_FAIL_XMM, 0, v->rng, state[0]);
            state[0] = v->rng;
        }
        if (state[1] != boot->nonce) {
            report_failure(v, PCG_FAIL_XMM, 1, boot->nonce, state[1]);
            state[1] = boot->nonce;
        }
        state[0] = pcg_rng_next(state[0]);
        xmm_load(state);
        v->rng = state[0];
        changes = pcg_changes(pattern, state[0]);
        i = pcg_pick(pattern, v->operations, state[0], pages);
        if (i < private_pages)
            visit_page(v, private_gva + i * PCG_PAGE_BYTES, 0, changes);
        else
            visit_page(v, shared_gva + (i - private_pages + (is_random ? 0 : begin)) * PCG_PAGE_BYTES, is_random, changes);
        v->operations++;
        if ((v->operations & 255) == 0)
            report_progress(v);
    }
}
