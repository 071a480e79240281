/* SPDX-License-Identifier: Apache-2.0
 *
 * The invariants of every workload, checked over all guest memory of a paused machine, from outside.
 *
 * The guest programs already check what they touch; this finds what they have not touched since the move, updates that
 * were lost as a whole, and pages that are not zero where nothing was ever written. It goes by what the guest's bookkeeping
 * says was completed, and allows for exactly the one operation each vCPU may be in the middle of.
 *
 * Guest memory is read, never written, and never believed to be in bounds.
 */
#include "machine/machine.h"
#include "postcopy/core.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_WORDS (PCG_PAGE_BYTES / 8)

struct verify {
    struct pc_machine *machine;
    struct pc_machine_check *check;
    const struct pcg_boot *boot;
};

static void bad(struct verify *v, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void bad(struct verify *v, const char *format, ...)
{
    va_list arguments;

    if (v->check->bad_pages++ == 0) {
        va_start(arguments, format);
        vsnprintf(v->check->text, sizeof v->check->text, format, arguments);
        va_end(arguments);
    }
}

/* pc_machine_close must not wait for a long verification: guest memory says how much there is to recount, and may be wrong. */
static bool called_off(const struct verify *v)
{
    return atomic_load_explicit(&v->machine->stop, memory_order_relaxed);
}

static const struct pcg_vcpu *guest_vcpu(const struct verify *v, uint32_t index)
{
    return (const struct pcg_vcpu *)((const uint8_t *)v->machine->config.shared.base + PCG_VCPU_PAGES +
                                     index * PCG_PAGE_BYTES);
}

static const uint64_t *guest_page(const struct verify *v, uint64_t gva)
{
    return pc_layout_gva(&v->machine->config, gva, PCG_PAGE_BYTES);
}

/* ---- what is never written ---- */

/* Pages of one block outside of [from, to) must be zero. Pages that were never touched are not touched now either: even
 * reading a hole of a memfd fills it. */
static int check_zero(struct verify *v, const struct pc_memory *memory, const char *name, uint64_t from, uint64_t to)
{
    uint64_t units, per_unit = memory->page_bytes / PCG_PAGE_BYTES, pages = memory->size_bytes / PCG_PAGE_BYTES;
    const uint8_t *base = memory->base;
    uint64_t *present;
    int rc;

    if (memory->size_bytes == 0)
        return 0;
    if (per_unit == 0)
        return -EINVAL;
    units = pages / per_unit;
    present = calloc(pc_bitmap_words(units), sizeof *present);
    if (!present)
        return -ENOMEM;
    rc = pc_memory_present(memory, present);
    for (uint64_t page = 0; !rc && page < pages; page++) {
        uint64_t unit = page / per_unit;
        if (page == from) {
            page = to - 1;
            continue;
        }
        v->check->pages_zero++;
        if (called_off(v))
            rc = -ECANCELED;
        if ((present[unit / 64] >> (unit % 64) & 1) && !pc_is_zero(base + page * PCG_PAGE_BYTES, PCG_PAGE_BYTES))
            bad(v, "page %llu of block \"%s\" is not zero although the guest never wrote it", (unsigned long long)page, name);
    }
    free(present);
    return rc;
}

static int check_all_zero(struct verify *v)
{
    const struct pc_machine_config *config = &v->machine->config;
    const struct pc_layout *layout = &v->machine->layout;
    bool idle = config->workload == PC_WORKLOAD_IDLE;
    uint64_t boot_pages = layout->boot_bytes / PCG_PAGE_BYTES;
    int rc = check_zero(v, &config->shared, "shared", 0, boot_pages + (idle ? 0 : layout->shared.pages));

    for (uint32_t i = 0; !rc && i < config->vcpus; i++) {
        char name[16];
        snprintf(name, sizeof name, "vcpu%u", i);
        /* An empty range begins past the end, so that it is never met. */
        uint64_t own = idle ? 0 : layout->private_[i].pages;
        rc = check_zero(v, &config->private_[i], name, own ? 0 : UINT64_MAX, own);
    }
    return rc;
}

/* Descriptor tables, program and page tables do not change as the guest runs. */
static int check_boot_area(struct verify *v)
{
    static const struct {
        uint64_t from, to;
        const char *what;
    } constant[] = {
        { PCG_GDT, PCG_VCPU_PAGES, "descriptor tables" },
        { PCG_IMAGE, PCG_IMAGE_END, "program" },
        { PCG_PAGE_TABLES, 0, "page tables" },
    };
    const struct pc_layout *layout = &v->machine->layout;
    const uint8_t *ram = v->machine->config.shared.base;
    uint8_t *fresh = calloc(1, layout->boot_bytes);
    int rc = fresh ? pc_boot_write(v->machine, fresh) : -ENOMEM;

    for (size_t i = 0; !rc && i < sizeof constant / sizeof *constant; i++) {
        uint64_t to = constant[i].to ? constant[i].to : layout->boot_bytes;
        for (uint64_t at = constant[i].from; at < to; at += PCG_PAGE_BYTES) {
            v->check->pages_checked++;
            if (memcmp(ram + at, fresh + at, PCG_PAGE_BYTES))
                bad(v, "page %llu of block \"shared\" (%s) has changed", (unsigned long long)(at / PCG_PAGE_BYTES),
                    constant[i].what);
        }
    }
    free(fresh);
    return rc;
}

/* ---- dirty ---- */

static void check_dirty(struct verify *v)
{
    const struct pc_layout *layout = &v->machine->layout;
    uint32_t vcpus = v->machine->config.vcpus;

    for (uint32_t i = 0; i < vcpus; i++) {
        uint64_t begin = pcg_slice_begin(layout->shared.pages, i, vcpus);
        uint64_t end = pcg_slice_begin(layout->shared.pages, i + 1, vcpus);
        uint64_t own = layout->private_[i].pages, pages = own + (end - begin);
        uint64_t operations = guest_vcpu(v, i)->operations, pass = operations / pages, cursor = operations % pages;

        v->check->operations += operations;
        for (uint64_t at = 0; at < pages; at++) {
            uint64_t gva = at < own ? layout->private_[i].gva + at * PCG_PAGE_BYTES
                                    : layout->shared.gva + (begin + at - own) * PCG_PAGE_BYTES;
            const uint64_t *page = guest_page(v, gva);
            uint64_t expected = at < cursor ? pass + 1 : pass;

            v->check->pages_checked++;
            if (page[0] != expected && !(at == cursor && page[0] == pass + 1))
                bad(v, "page at 0x%llx of vCPU %u has count %llu, expected %llu", (unsigned long long)gva, i,
                    (unsigned long long)page[0], (unsigned long long)expected);
            else if (!pc_is_zero(page + 1, PCG_PAGE_BYTES - 8))
                bad(v, "page at 0x%llx of vCPU %u holds something beside its count", (unsigned long long)gva, i);
        }
    }
}

/* ---- echo ---- */

/* The visits to pages are those of `dirty`. So many are made after each answered request: the two account for each other. */
static void check_echo(struct verify *v)
{
    const struct pc_layout *layout = &v->machine->layout;
    uint64_t pages = layout->private_[0].pages + pcg_slice_begin(layout->shared.pages, 1, v->machine->config.vcpus);
    const struct pcg_vcpu *guest = guest_vcpu(v, 0);
    uint64_t visits = guest->operations > pages ? guest->operations - pages : 0;

    check_dirty(v);
    if (visits > guest->requests * PCG_ECHO_PAGES || visits + PCG_ECHO_PAGES < guest->requests * PCG_ECHO_PAGES)
        bad(v, "%llu requests were answered and %llu pages visited, %d for each", (unsigned long long)guest->requests,
            (unsigned long long)visits, PCG_ECHO_PAGES);
}

/* ---- random, sequential, zipf, phases ---- */

/* Where one vCPU goes: `pages` of its private ones and then of the shared ones, of these from `skip` on. */
struct visits {
    uint32_t pattern;
    uint64_t own, pages, skip;
};

static struct visits visits_of(const struct verify *v, uint32_t vcpu)
{
    const struct pc_layout *layout = &v->machine->layout;
    uint32_t pattern = pc_pattern_of(v->machine->config.workload), vcpus = v->machine->config.vcpus;
    uint64_t own = layout->private_[vcpu].pages, begin = 0, end = layout->shared.pages;

    if (pattern != PCG_RANDOM) {
        begin = pcg_slice_begin(layout->shared.pages, vcpu, vcpus);
        end = pcg_slice_begin(layout->shared.pages, vcpu + 1, vcpus);
    }
    return (struct visits){ .pattern = pattern, .own = own, .pages = own + (end - begin), .skip = begin };
}

/* The page that visit `n` changes, counted through private and all shared ones; UINT64_MAX: it changes none. */
static uint64_t changed_page(const struct visits *visits, uint64_t n, uint64_t x)
{
    uint64_t at;

    if (!pcg_changes(visits->pattern, x))
        return UINT64_MAX;
    at = pcg_pick(visits->pattern, n, x, visits->pages);
    return at < visits->own ? at : at + visits->skip;
}

/* What a page must hold: how often each vCPU changed it for certain, and which vCPUs may be changing it right now. */
struct expected {
    uint32_t count[PC_MACHINE_MAX_VCPUS];
    uint32_t in_flight; /* bit for each vCPU */
    bool initialised, being_initialised;
};

static void check_random_page(struct verify *v, uint64_t gva, const struct expected *e)
{
    static const uint16_t offsets[PCG_CHECK_WORDS] = PCG_CHECK_OFFSETS;
    uint64_t page[PAGE_WORDS], low = 0, high = 0, seed = v->machine->config.seed;

    memcpy(page, guest_page(v, gva), sizeof page);
    v->check->pages_checked++;
    for (uint32_t i = 0; i < v->machine->config.vcpus; i++) {
        uint64_t found = page[PCG_WORD_COUNTS + i];
        bool flies = e->in_flight >> i & 1;
        if (found != e->count[i] && !(flies && found == e->count[i] + 1ull)) {
            bad(v, "page at 0x%llx: vCPU %u changed it %u times, the page says %llu", (unsigned long long)gva, i,
                e->count[i], (unsigned long long)found);
            return;
        }
        low += e->count[i];
        high += e->count[i] + (flies ? 1ull : 0);
        page[PCG_WORD_COUNTS + i] = 0;
    }
    if (page[PCG_WORD_COUNT] < low || page[PCG_WORD_COUNT] > high) {
        bad(v, "page at 0x%llx has count %llu, expected %llu", (unsigned long long)gva,
            (unsigned long long)page[PCG_WORD_COUNT], (unsigned long long)low);
        return;
    }
    if (page[PCG_WORD_LOCK] && (page[PCG_WORD_LOCK] > PC_MACHINE_MAX_VCPUS || !(e->in_flight >> (page[PCG_WORD_LOCK] - 1) & 1))) {
        bad(v, "page at 0x%llx is locked by a vCPU that is elsewhere", (unsigned long long)gva);
        return;
    }
    page[PCG_WORD_COUNT] = page[PCG_WORD_LOCK] = 0;
    for (uint64_t k = 0; k < PCG_CHECK_WORDS; k++) {
        uint64_t found = page[offsets[k]], expected = 0;
        bool matches = !e->initialised && found == 0;
        if (e->initialised || e->being_initialised)
            for (uint64_t count = low; count <= high && !matches; count++) {
                expected = pcg_check_word(pcg_check_base(seed, gva, count), k);
                matches = found == expected;
            }
        if (!matches) {
            bad(v, "page at 0x%llx has check word %llu = 0x%llx, expected 0x%llx", (unsigned long long)gva,
                (unsigned long long)k, (unsigned long long)found, (unsigned long long)expected);
            return;
        }
        page[offsets[k]] = 0;
    }
    if (!pc_is_zero(page, sizeof page))
        bad(v, "page at 0x%llx holds something between its check words", (unsigned long long)gva);
}

static int check_random(struct verify *v)
{
    const struct pc_layout *layout = &v->machine->layout;
    uint32_t vcpus = v->machine->config.vcpus, *counts[PC_MACHINE_MAX_VCPUS] = { NULL };
    uint64_t in_flight[PC_MACHINE_MAX_VCPUS], shared_pages = layout->shared.pages;
    int rc = 0;

    /* Each vCPU's sequence again: how often it came to each page, its private ones first. */
    for (uint32_t i = 0; i < vcpus; i++) {
        const struct pcg_vcpu *guest = guest_vcpu(v, i);
        struct visits visits = visits_of(v, i);
        uint64_t operations = guest->operations, x = pcg_rng_seed(v->machine->config.seed, i);

        counts[i] = calloc(visits.own + shared_pages, sizeof *counts[i]);
        if (!counts[i]) {
            rc = -ENOMEM;
            goto out;
        }
        v->check->operations += operations;
        for (uint64_t n = 0; n < operations; n++) {
            uint64_t page = changed_page(&visits, n, x = pcg_rng_next(x));

            if (page != UINT64_MAX)
                counts[i][page]++;
            if (n % 65536 == 0 && called_off(v)) {
                rc = -ECANCELED;
                goto out;
            }
        }
        in_flight[i] = UINT64_MAX;
        if (guest->phase == PCG_PHASE_RUN) {
            uint64_t next = pcg_rng_next(x);
            in_flight[i] = changed_page(&visits, operations, next);
            if (guest->rng != x && guest->rng != next)
                bad(v, "vCPU %u: its generator is at 0x%llx, after %llu operations it must be at 0x%llx", i,
                    (unsigned long long)guest->rng, (unsigned long long)operations, (unsigned long long)x);
        }
    }
    for (uint32_t i = 0; i < vcpus; i++) {
        uint64_t own = layout->private_[i].pages, done = guest_vcpu(v, i)->init_done;
        uint64_t begin = pcg_slice_begin(shared_pages, i, vcpus), end = pcg_slice_begin(shared_pages, i + 1, vcpus);

        for (uint64_t at = 0; at < own; at++) {
            struct expected e = { .initialised = at < done, .being_initialised = at == done };
            e.count[i] = counts[i][at];
            e.in_flight = in_flight[i] == at ? 1u << i : 0;
            check_random_page(v, layout->private_[i].gva + at * PCG_PAGE_BYTES, &e);
        }
        for (uint64_t at = begin; at < end; at++) {
            uint64_t turn = own + at - begin;
            struct expected e = { .initialised = turn < done, .being_initialised = turn == done };
            for (uint32_t k = 0; k < vcpus; k++) {
                e.count[k] = counts[k][layout->private_[k].pages + at];
                e.in_flight |= in_flight[k] == layout->private_[k].pages + at ? 1u << k : 0;
            }
            check_random_page(v, layout->shared.gva + at * PCG_PAGE_BYTES, &e);
        }
    }
out:
    for (uint32_t i = 0; i < vcpus; i++)
        free(counts[i]);
    return rc;
}

/* ---- disk ---- */

/* Every word is that of the old or of the new tag; tag 0 is zeros. */
static bool slot_matches(const struct verify *v, uint32_t vcpu, const uint64_t *words, uint64_t old, uint64_t new)
{
    uint64_t seed = v->machine->config.seed;
    uint64_t a = old ? pcg_tag_first(seed, vcpu, old) : 0, b = new ? pcg_tag_first(seed, vcpu, new) : 0;

    for (uint64_t i = 0; i < PCG_SLOT_WORDS; i++) {
        if (words[i] != a && words[i] != b)
            return false;
        a += old ? PCG_TAG_STEP : 0;
        b += new ? PCG_TAG_STEP : 0;
    }
    return true;
}

static int check_disk_vcpu(struct verify *v, uint32_t index, uint8_t *buffer)
{
    const struct pcg_vcpu *guest = guest_vcpu(v, index);
    const uint64_t *slot_tags, *chunk_tags;
    uint64_t pages = v->machine->layout.private_[index].pages + v->machine->layout.shared.pages;

    if (guest->next_tag == 0)
        return 0; /* has not laid out its memory yet; that it wrote nothing else cannot be checked */
    if (guest->slots > pages || guest->chunks > PCG_CHUNKS_MAX || guest->range_slots[0] > guest->slots) {
        bad(v, "vCPU %u: its bookkeeping is damaged", index);
        return 0;
    }
    if ((guest->slot_tags_gva | guest->chunk_tags_gva | guest->slot_gva[0] | guest->slot_gva[1]) % 8) {
        bad(v, "vCPU %u: its tables are where no word can be", index);
        return 0;
    }
    slot_tags = pc_layout_gva(&v->machine->config, guest->slot_tags_gva, guest->slots * 8);
    chunk_tags = pc_layout_gva(&v->machine->config, guest->chunk_tags_gva, guest->chunks * 8);
    if (!slot_tags || !chunk_tags) {
        bad(v, "vCPU %u: its tables are outside of its memory", index);
        return 0;
    }
    v->check->operations += guest->operations;
    for (uint64_t slot = 0; slot < guest->slots; slot++) {
        uint64_t second = slot >= guest->range_slots[0];
        uint64_t gva = guest->slot_gva[second] + (slot - (second ? guest->range_slots[0] : 0)) * PCG_SLOT_BYTES;
        const uint64_t *words = pc_layout_gva(&v->machine->config, gva, PCG_SLOT_BYTES);
        uint64_t old = slot_tags[slot], new = old, offset = slot - guest->flight_slot;

        if (guest->flight == PCG_FLIGHT_FILL && slot == guest->flight_slot)
            new = guest->flight_tag;
        else if (guest->flight == PCG_FLIGHT_READ && offset < guest->flight_count &&
                 guest->flight_chunk + offset < guest->chunks)
            new = chunk_tags[guest->flight_chunk + offset];
        v->check->pages_checked += PCG_SLOT_BYTES / PCG_PAGE_BYTES;
        if (!words || !slot_matches(v, index, words, old, new))
            bad(v, "vCPU %u: the %d bytes at 0x%llx are not pattern %llu", index, PCG_SLOT_BYTES, (unsigned long long)gva,
                (unsigned long long)old);
    }
    for (uint64_t chunk = 0; chunk < guest->chunks; chunk++) {
        uint64_t old = chunk_tags[chunk], new = old, offset = chunk - guest->flight_chunk;
        int rc;

        if (guest->flight == PCG_FLIGHT_WRITE && offset < guest->flight_count &&
            guest->flight_slot + offset < guest->slots)
            new = slot_tags[guest->flight_slot + offset];
        if (called_off(v))
            return -ECANCELED;
        if (old == 0)
            continue; /* whatever an earlier machine left in the file */
        rc = pc_disk_inspect(v->machine, index, chunk * PCG_SLOT_BYTES, buffer, PCG_SLOT_BYTES);
        if (rc)
            return rc;
        v->check->disk_bytes_checked += PCG_SLOT_BYTES;
        if (!slot_matches(v, index, (const uint64_t *)buffer, old, new))
            bad(v, "vCPU %u: the %d bytes at %llu of its part of the disk are not pattern %llu", index, PCG_SLOT_BYTES,
                (unsigned long long)chunk * PCG_SLOT_BYTES, (unsigned long long)old);
    }
    return 0;
}

static int check_disk(struct verify *v)
{
    void *buffer;
    int rc = posix_memalign(&buffer, 65536, PCG_SLOT_BYTES);

    if (rc)
        return -rc;
    for (uint32_t i = 0; !rc && i < v->machine->config.vcpus; i++)
        rc = check_disk_vcpu(v, i, buffer);
    free(buffer);
    return rc;
}

/* ---- all together ---- */

int pc_verify(struct pc_machine *machine, struct pc_machine_check *check)
{
    static const char *const names[] = {
        "idle: every page outside of the boot area is zero",
        "dirty: every page has its exact count",
        "random: every operation replayed, every count and check word right",
        "disk: every word in memory and on the disk right",
        "echo: every page has its exact count, and requests were counted as they were answered",
        "sequential: every visit replayed, every count and check word right",
        "zipf: every visit replayed, every count and check word right",
        "phases: every visit replayed, every count and check word right",
    };
    struct verify v = {
        .machine = machine,
        .check = check,
        .boot = (const struct pcg_boot *)((const uint8_t *)machine->config.shared.base + PCG_BOOT_INFO),
    };
    struct pc_machine_stats stats;
    int rc;

    pc_machine_stats(machine, &stats);
    check->nonce = v.boot->nonce;
    /* What the guest itself saw is the better explanation, so it comes first. */
    if (stats.failures)
        bad(&v, "the guest reported %u failures, first: %s", stats.failures,
            stats.failure_text[0] ? stats.failure_text : "before it came here");
    if (v.boot->magic != PCG_MAGIC || v.boot->seed != machine->config.seed)
        bad(&v, "boot info in guest memory is damaged");
    if (stats.nonce && stats.nonce != check->nonce)
        bad(&v, "the nonce in guest memory is 0x%llx, the guest announced 0x%llx", (unsigned long long)check->nonce,
            (unsigned long long)stats.nonce);
    for (uint32_t i = 0; i < machine->config.vcpus; i++)
        if (guest_vcpu(&v, i)->operations < stats.vcpu[i].operations)
            bad(&v, "vCPU %u has announced %llu operations, guest memory knows of %llu", i,
                (unsigned long long)stats.vcpu[i].operations, (unsigned long long)guest_vcpu(&v, i)->operations);
    rc = check_boot_area(&v);
    if (!rc)
        rc = check_all_zero(&v);
    if (rc)
        return rc;
    switch (machine->config.workload) {
    case PC_WORKLOAD_DIRTY:
        check_dirty(&v);
        break;
    case PC_WORKLOAD_ECHO:
        check_echo(&v);
        break;
    case PC_WORKLOAD_RANDOM:
    case PC_WORKLOAD_SEQUENTIAL:
    case PC_WORKLOAD_ZIPF:
    case PC_WORKLOAD_PHASES:
        rc = check_random(&v);
        break;
    case PC_WORKLOAD_DISK:
        rc = check_disk(&v);
        break;
    default:
        for (uint32_t i = 0; i < machine->config.vcpus; i++)
            check->operations += guest_vcpu(&v, i)->operations;
        break;
    }
    if (rc)
        return rc;
    check->ok = check->bad_pages == 0;
    if (check->ok)
        snprintf(check->text, sizeof check->text, "%s", names[machine->config.workload]);
    return 0;
}
