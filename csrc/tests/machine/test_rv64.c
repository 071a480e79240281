/* SPDX-License-Identifier: Apache-2.0
 *
 * The rv64 machine: that it is the same to the bit whether or not it was moved on the way, that it moves by postcopy without any
 * right, and that it is stopped where it waits for a page.
 */
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "postcopy/engine.h"
#include "postcopy/uffd.h"
#include "tests/machine/harts.h"

/* Runs freely until every hart is ready and has done some more. */
static void run_past_ready(struct pc_machine *machine, uint64_t more)
{
    CHECK_EQ(pc_machine_resume(machine), 0);
    run_until_operations(machine, NULL, more);
    pause_machine(machine);
}

static void check_worked(struct pc_machine *machine)
{
    struct pc_machine_check check = verify_ok(machine);

    CHECK(check.operations > 0 && check.nonce != 0);
}

/* ---- workloads ---- */

static void workload(uint32_t kind, uint32_t harts, uint64_t more)
{
    struct pc_machine_config config = make_config(PC_ENGINE_RV64, kind, harts, PC_MEMORY_MEMFD);
    struct pc_machine *machine = boot_machine(&config);

    run_past_ready(machine, more);
    check_worked(machine);
    run_past_ready(machine, more * 2);
    check_worked(machine);
    close_machine(machine);
    drop_memory(&config);
}

static void workload_idle(void) { workload(PC_WORKLOAD_IDLE, 2, 1); }
static void workload_dirty(void) { workload(PC_WORKLOAD_DIRTY, 2, 5000); }
static void workload_random(void) { workload(PC_WORKLOAD_RANDOM, 1, 5000); }
static void workload_random_eight_harts(void) { workload(PC_WORKLOAD_RANDOM, 8, 2000); }
static void workload_disk(void) { workload(PC_WORKLOAD_DISK, 2, 100); }
static void workload_sequential(void) { workload(PC_WORKLOAD_SEQUENTIAL, 3, 5000); }
static void workload_zipf(void) { workload(PC_WORKLOAD_ZIPF, 1, 5000); }
static void workload_phases(void) { workload(PC_WORKLOAD_PHASES, 2, 50000); } /* more than one window */

/* ---- patterns ---- */

#define MOST_PAGES 16387

static void count_visits(uint32_t pattern, uint64_t pages, uint64_t visits, uint32_t counts[MOST_PAGES])
{
    uint64_t x = pcg_rng_seed(7, 0);

    memset(counts, 0, MOST_PAGES * sizeof *counts);
    for (uint64_t n = 0; n < visits; n++) {
        uint64_t page = pcg_pick(pattern, n, x = pcg_rng_next(x), pages);

        CHECK(page < pages);
        counts[page]++;
    }
}

static int by_count(const void *a, const void *b)
{
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;

    return (left < right) - (left > right);
}

static uint64_t visited(const uint32_t *counts, uint64_t pages)
{
    uint64_t found = 0;

    for (uint64_t page = 0; page < pages; page++)
        found += counts[page] != 0;
    return found;
}

static void patterns_are_what_they_are_called(void)
{
    static uint32_t counts[MOST_PAGES];
    static const uint64_t sizes[] = { 1, 2, 3, 8, 4096, 5000, MOST_PAGES };

    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uint64_t pages = sizes[i], window = pages / PCG_PHASE_WINDOWS + 1, hot = 0;

        count_visits(PCG_SEQUENTIAL, pages, 2 * pages, counts);
        for (uint64_t page = 0; page < pages; page++)
            CHECK_EQ(counts[page], 2);
        count_visits(PCG_PHASES, pages, window * PCG_PHASE_VISITS, counts);
        CHECK_EQ(visited(counts, pages), window);
        count_visits(PCG_PHASES, pages, 100 * window * PCG_PHASE_VISITS, counts);
        CHECK_EQ(visited(counts, pages), pages);
        if (pages < 4096)
            continue;
        count_visits(PCG_ZIPF, pages, 100 * pages, counts);
        CHECK_EQ(visited(counts, pages), pages); /* the last ones, too */
        /* Neighbours in rank are not neighbours in memory: no eighth of the memory has most of the visits. */
        for (uint64_t first = 0; first + pages / 8 <= pages; first += pages / 8) {
            uint64_t here = 0;
            for (uint64_t page = first; page < first + pages / 8; page++)
                here += counts[page];
            CHECK(here < 40 * pages);
        }
        qsort(counts, pages, sizeof *counts, by_count);
        for (uint64_t page = 0; page < pages / 32; page++)
            hot += counts[page];
        CHECK(hot > 50 * pages && hot < 80 * pages); /* ln(n / 32) / ln n of all: 58 to 64 %, in levels some more */
    }
}

/* ---- determinism ---- */

struct fingerprint {
    uint64_t digest[2];
    struct saved state;
};

static void take(struct pc_machine *machine, struct pc_machine_config *config, struct fingerprint *to)
{
    for (uint32_t i = 0; i < 2; i++)
        CHECK_EQ(pc_memory_digest(block(config, i), &to->digest[i]), 0);
    save(machine, &to->state);
}

static void check_same(const struct fingerprint *a, const struct fingerprint *b)
{
    CHECK_EQ(a->digest[0], b->digest[0]);
    CHECK_EQ(a->digest[1], b->digest[1]);
    CHECK_EQ(a->state.count, b->state.count);
    CHECK_EQ(memcmp(a->state.bytes, b->state.bytes, (size_t)a->state.count), 0);
}

#define TOTAL 4000000

static void reference(const struct pc_machine_config *config, struct fingerprint *to)
{
    struct pc_machine_config twin = make_twin(config, PC_MEMORY_MEMFD);
    struct pc_machine *machine = boot_machine(&twin);

    run_until(machine, TOTAL);
    take(machine, &twin, to);
    close_machine(machine);
    drop_memory(&twin);
}

/* The same after so many instructions, however often it was moved on the way, and at whatever instruction. */
static void moved_often(uint32_t kind)
{
    struct pc_machine_config config = make_config(PC_ENGINE_RV64, kind, 1, PC_MEMORY_MEMFD);
    static struct fingerprint expected, found;
    static struct saved state;
    struct pc_machine *machine = boot_machine(&config);
    uint64_t at = 0;

    reference(&config, &expected);
    for (int moves = 0; moves < 12; moves++) {
        struct pc_machine_config twin = make_twin(&config, PC_MEMORY_MEMFD);
        struct pc_machine *next = open_machine(&twin);

        at += 1 + test_below(TOTAL / 13);
        run_until(machine, at);
        save(machine, &state);
        copy_memory(&twin, &config);
        load(next, &state);
        close_machine(machine);
        drop_memory(&config);
        config = twin;
        machine = next;
    }
    run_until(machine, TOTAL);
    take(machine, &config, &found);
    check_same(&found, &expected);
    check_worked(machine);
    close_machine(machine);
    drop_memory(&config);
}

static void the_same_however_often_moved_dirty(void) { moved_often(PC_WORKLOAD_DIRTY); }
static void the_same_however_often_moved_random(void) { moved_often(PC_WORKLOAD_RANDOM); }

static void the_same_however_often_moved_phases(void) { moved_often(PC_WORKLOAD_PHASES); }
static void the_same_however_often_moved_disk(void) { moved_often(PC_WORKLOAD_DISK); }

static void another_seed_is_another_machine(void)
{
    struct pc_machine_config config = make_config(PC_ENGINE_RV64, PC_WORKLOAD_RANDOM, 1, PC_MEMORY_MEMFD);
    static struct fingerprint one, other;

    reference(&config, &one);
    config.seed++;
    reference(&config, &other);
    CHECK(one.digest[0] != other.digest[0]);
    drop_memory(&config);
}

/* ---- postcopy ---- */

static void user_uffd_or_skip(void)
{
    struct pc_uffd_api api;

    if (pc_uffd_probe(PC_UFFD_USER_ONLY, &api))
        SKIP("uffd-user", "no userfaultfd, not even for user-mode faults");
}

/* Moves a paused machine with the real engine, over a userfaultfd that nobody needs rights for; every page on demand or by
 * push. Returns the machine at the destination, running or not yet resumed. */
struct move {
    struct pc_pager *pager;
    struct pc_pageserver *server;
};

static struct move begin_move(struct pc_machine_config *from, struct pc_machine_config *to, bool bulk)
{
    struct move m;
    uint32_t shards = from->vcpus + 1;

    CHECK_EQ(pc_pager_new(-1, &m.pager), 0);
    CHECK_EQ(pc_pageserver_new(0, &m.server), 0);
    for (uint32_t i = 0; i < shards; i++) {
        uint64_t pages = block(to, i)->size_bytes / 4096, words = pc_bitmap_words(pages);
        uint64_t *present = calloc(words, 8), *zero = calloc(words, 8);
        int pair[2];

        CHECK(present && zero);
        CHECK_EQ(pc_memory_present(block(from, i), present), 0);
        for (uint64_t page = 0; page < pages; page++)
            if (!(present[page / 64] >> page % 64 & 1))
                zero[page / 64] |= 1ull << page % 64;
        CHECK_EQ(pc_pager_add_block(m.pager, block(to, i), -1), i);
        CHECK_EQ(pc_pager_set_zero(m.pager, i, zero), 0);
        CHECK_EQ(pc_pager_add_shard(m.pager, PC_UFFD_USER_ONLY, 0, error, sizeof error), i);
        CHECK_EQ(pc_pager_arm(m.pager, i, i, 0, pages, error, sizeof error), 0);
        CHECK_EQ(pc_pageserver_add_block(m.server, block(from, i), 4096), i);
        CHECK_EQ(pc_pageserver_set_present(m.server, i, present), 0);
        CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
        CHECK_EQ(pc_pager_attach_urgent(m.pager, i, pair[0], NULL), 0);
        CHECK_EQ(pc_pageserver_attach_urgent(m.server, i, pair[1], NULL, 0), 0);
        free(present);
        free(zero);
    }
    if (bulk) {
        int pair[2];

        CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
        CHECK_EQ(pc_pager_attach_bulk(m.pager, 0, pair[0], NULL), 0);
        CHECK_EQ(pc_pageserver_attach_bulk(m.server, 0, pair[1], NULL), 0);
    }
    return m;
}

static void wait_complete(struct pc_pager *pager)
{
    struct pollfd ring = { .fd = pc_pager_event_fd(pager), .events = POLLIN };
    struct pc_event event;
    uint64_t count;

    for (;;) {
        while (pc_pager_next_event(pager, &event) == 1) {
            if (event.type == PC_EVENT_COMPLETE)
                return;
            if (event.type == PC_EVENT_FATAL || event.type == PC_EVENT_CHANNEL_DOWN)
                FAIL("%s", event.text);
        }
        CHECK(poll(&ring, 1, RUN_MS) == 1);
        (void)!read(ring.fd, &count, sizeof count);
    }
}

static void end_move(struct move *m)
{
    CHECK_EQ(pc_pager_disarm(m->pager), 0);
    CHECK_EQ(pc_pager_free(m->pager), 0);
    pc_pageserver_free(m->server);
}

/* One move in the middle through the engine, the same bits in the end: each page comes because the guest touched it, and
 * then the rest on request. */
static void the_same_when_moved_by_postcopy(void)
{
    struct pc_machine_config config = make_config(PC_ENGINE_RV64, PC_WORKLOAD_RANDOM, 1, PC_MEMORY_MEMFD), twin = make_twin(&config, PC_MEMORY_MEMFD);
    static struct fingerprint expected, found;
    static struct saved state;
    struct pc_machine *source, *dest;
    struct pc_pager_stats stats;
    struct move m;

    user_uffd_or_skip();
    reference(&config, &expected);
    source = boot_machine(&config);
    run_until(source, TOTAL / 2 + test_below(1000));
    save(source, &state);
    m = begin_move(&config, &twin, false);
    CHECK_EQ(pc_pageserver_start(m.server), 0);
    dest = open_machine(&twin);
    load(dest, &state);
    run_until(dest, TOTAL);
    CHECK_EQ(pc_pager_stats(m.pager, &stats), 0);
    CHECK(stats.demand_pages > 100);
    CHECK(stats.resident_pages < stats.total_pages);
    while (stats.resident_pages < stats.total_pages) {
        CHECK(pc_pager_request_missing(m.pager, 256) >= 0);
        CHECK_EQ(pc_pager_stats(m.pager, &stats), 0);
    }
    wait_complete(m.pager);
    end_move(&m);
    take(dest, &twin, &found);
    check_same(&found, &expected);
    check_worked(dest);
    close_machine(dest);
    close_machine(source);
    drop_memory(&config);
    drop_memory(&twin);
}

static void moves_live(uint32_t kind, uint32_t harts, uint64_t more)
{
    struct pc_machine_config config = make_config(PC_ENGINE_RV64, kind, harts, PC_MEMORY_MEMFD), twin = make_twin(&config, PC_MEMORY_MEMFD);
    static struct saved state;
    struct pc_machine *source, *dest;
    struct pc_machine_stats before;
    struct move m;

    user_uffd_or_skip();
    source = boot_machine(&config);
    run_past_ready(source, more);
    before = stats_of(source);
    save(source, &state);
    m = begin_move(&config, &twin, true);
    dest = open_machine(&twin);
    load(dest, &state);
    CHECK_EQ(pc_machine_resume(dest), 0);
    CHECK_EQ(pc_pageserver_start(m.server), 0); /* only now: everything the guest touches first is missing */
    wait_complete(m.pager);
    run_past_ready(dest, before.vcpu[0].operations + more);
    end_move(&m);
    check_worked(dest);
    CHECK_EQ(stats_of(dest).nonce, before.nonce);
    CHECK_EQ(stats_of(dest).disk_errors, 0);
    close_machine(dest);
    close_machine(source);
    drop_memory(&config);
    drop_memory(&twin);
}

static void moves_dirty(void) { moves_live(PC_WORKLOAD_DIRTY, 2, 5000); }
static void moves_random(void) { moves_live(PC_WORKLOAD_RANDOM, 4, 1000); }
static void moves_zipf(void) { moves_live(PC_WORKLOAD_ZIPF, 4, 1000); }
static void moves_disk(void) { moves_live(PC_WORKLOAD_DISK, 2, 100); }

#if defined(__SANITIZE_THREAD__)
#define SIGNALS_WAIT "TSan delivers a signal only when its thread makes a call, which a thread in a page fault does not"
#endif

/* Each kind of access waits for its page, is stopped there with its instruction not done, and is done once the page has
 * come. Misaligned ones wait for their second page. */
static void every_access_can_be_paused(void)
{
    static const struct {
        const char *name;
        uint64_t x5;      /* address */
        uint64_t missing; /* the page that is */
        uint32_t word;    /* index in `kinds` */
    } cases[] = {
        { "load", DATA + 8, DATA, 0 },
        { "store", DATA + 8, DATA, 1 },
        { "byte store", DATA + 4095, DATA, 2 },
        { "load across pages", DATA - 4, DATA, 0 },
        { "store across pages", DATA - 4, DATA, 1 },
        { "add", DATA + 16, DATA, 3 },
        { "load reserved", DATA + 16, DATA, 4 },
        { "store in the low area", PCG_STACKS + 8, PCG_STACKS, 1 },
        { "private store", PCG_PRIVATE_GVA + 8, PCG_PRIVATE_GVA, 1 },
        { "disk write from its first page", PCG_MMIO + PCG_PORT_DISK, DATA, 5 },
        { "disk write from its last page", PCG_MMIO + PCG_PORT_DISK, DATA + 8192, 5 },
        { "fetch", PCG_IMAGE + 4096, PCG_IMAGE + 4096, 6 },
    };
    const uint32_t kinds[] = { i_type(0, 5, 3, 7, 0x03), s_type(0, 6, 5, 3), s_type(0, 6, 5, 0), amo(0, 6, 3),
                               amo(2, 0, 3),             s_type(0, 6, 5, 2), i_type(0, 5, 0, 0, 0x67) };

#ifdef SIGNALS_WAIT
    SKIP("signals", SIGNALS_WAIT);
#endif
    user_uffd_or_skip();
    for (size_t i = 0; i < COUNT(cases); i++) {
        const uint32_t words[1024] = { NOP, kinds[cases[i].word], NOP };
        struct bench b = { .config = make_config(PC_ENGINE_RV64, PC_WORKLOAD_IDLE, 1, PC_MEMORY_MEMFD) };
        struct pc_hart_state before, after;
        struct pc_uffd_api api;
        struct pc_uffd_event event;
        uint8_t *page = pc_layout_gva(&b.config, cases[i].missing, 4096);
        uint64_t ioctls, done, fetch = cases[i].word == 6;
        int uffd = pc_uffd_open(PC_UFFD_USER_ONLY, 0, &api), n;
        struct pollfd fault = { .fd = uffd, .events = POLLIN };

        CHECK(uffd >= 0);
        b.machine = open_machine(&b.config);
        CHECK_EQ(pc_machine_boot(b.machine), 0); /* writes low memory and the program, so that the rest comes after it */
        memcpy((uint8_t *)b.config.shared.base + PCG_IMAGE, words, 3 * sizeof *words);
        if (fetch)
            CHECK_SYS(madvise(page, 4096, MADV_REMOVE));
        CHECK_EQ(pc_uffd_register(uffd, (uint64_t)(uintptr_t)page, 4096, PC_UFFD_MISSING, &ioctls), 0);
        before = (struct pc_hart_state){ .pc = PCG_IMAGE };
        before.x[5] = cases[i].x5;
        before.x[6] = 2;
        before.x[7] = 77;
        before.x[12] = DATA;
        before.x[13] = 12288;
        pc_rv64_set_state(&b.machine->vcpu[0], &before);
        CHECK_EQ(pc_machine_resume(b.machine), 0);
        CHECK(poll(&fault, 1, RUN_MS) == 1);
        while ((n = pc_uffd_read(uffd, &event, 1)) == 0)
            ;
        CHECK_EQ(n, 1);
        CHECK_EQ(event.address & ~4095ull, (uintptr_t)page);
        if (pc_machine_pause(b.machine, RUN_MS, error, sizeof error))
            FAIL("%s: %s", cases[i].name, error);
        pc_rv64_get_state(&b.machine->vcpu[0], &after);
        before.pc = fetch ? PCG_IMAGE + 4096 : PCG_IMAGE + 4;
        before.instructions = 1 + fetch;
        if (memcmp(&before, &after, sizeof after))
            FAIL("%s: stopped at 0x%llx after %llu instructions", cases[i].name, (unsigned long long)after.pc,
                 (unsigned long long)after.instructions);
        if (fetch)
            CHECK_EQ(pc_uffd_copy(uffd, (uint64_t)(uintptr_t)page, words, 4096, 0, &done), 0);
        else
            CHECK_EQ(pc_uffd_zeropage(uffd, (uint64_t)(uintptr_t)page, 4096, 0, &done), 0);
        run_until(b.machine, 3);
        pc_rv64_get_state(&b.machine->vcpu[0], &after);
        CHECK_EQ(after.pc, fetch ? PCG_IMAGE + 4096 + 4 : PCG_IMAGE + 12);
        if (cases[i].word == 1)
            CHECK_EQ(*(uint8_t *)pc_layout_gva(&b.config, cases[i].x5, 1), 2);
        if (cases[i].word == 0 || cases[i].word == 3)
            CHECK_EQ(after.x[7], 0);
        close(uffd);
        close_bench(&b);
    }
}

/* A hart that waits for a page is stopped with its instruction not done, its state moves on, and the twin does it. */
static void pauses_on_a_missing_page(uint32_t kind)
{
    struct pc_machine_config config = make_config(PC_ENGINE_RV64, kind, 1, PC_MEMORY_MEMFD), twin = make_twin(&config, PC_MEMORY_MEMFD), third = make_twin(&config, PC_MEMORY_MEMFD);
    static struct fingerprint expected, found;
    static struct saved state, again;
    struct pc_machine *source, *dest, *last;
    struct pc_pager_stats stats;
    struct move m;

#ifdef SIGNALS_WAIT
    SKIP("signals", SIGNALS_WAIT);
#endif
    user_uffd_or_skip();
    source = boot_machine(&config);
    if (kind == PC_WORKLOAD_DISK) {
        run_past_ready(source, 64);
    } else {
        reference(&config, &expected);
        run_until(source, TOTAL / 2);
    }
    save(source, &state);
    m = begin_move(&config, &twin, true); /* not started: no page comes */
    dest = open_machine(&twin);
    load(dest, &state);
    CHECK_EQ(pc_machine_resume(dest), 0);
    do {
        CHECK_EQ(pc_pager_stats(m.pager, &stats), 0);
        (void)sched_yield();
    } while (stats.faults == 0);
    pause_machine(dest);
    save(dest, &again);
    /* It had not even its first instruction. */
    CHECK_EQ(again.count, state.count);
    CHECK_EQ(memcmp(again.bytes, state.bytes, (size_t)state.count), 0);
    CHECK_EQ(pc_machine_resume(dest), 0);
    pause_machine(dest);
    close_machine(dest);
    CHECK_EQ(pc_pageserver_start(m.server), 0);
    wait_complete(m.pager);
    end_move(&m);
    copy_memory(&third, &twin);
    last = open_machine(&third);
    load(last, &again);
    if (kind == PC_WORKLOAD_DISK) {
        run_past_ready(last, 300);
    } else {
        run_until(last, TOTAL);
        take(last, &third, &found);
        check_same(&found, &expected);
    }
    check_worked(last);
    close_machine(last);
    close_machine(source);
}

static void pauses_random_on_a_missing_page(void) { pauses_on_a_missing_page(PC_WORKLOAD_RANDOM); }
static void pauses_disk_on_a_missing_page(void) { pauses_on_a_missing_page(PC_WORKLOAD_DISK); }

/* Stopped again and again while pages trickle in, each at another kind of access: loads, stores, atomics, requests. */
static void survives_many_pauses(uint32_t kind)
{
    struct pc_machine_config config = make_config(PC_ENGINE_RV64, kind, 2, PC_MEMORY_MEMFD), twin = make_twin(&config, PC_MEMORY_MEMFD);
    static struct saved state;
    struct pc_machine *source, *dest;
    struct pc_pager_stats stats;
    struct move m;

#ifdef SIGNALS_WAIT
    SKIP("signals", SIGNALS_WAIT);
#endif
    user_uffd_or_skip();
    source = boot_machine(&config);
    run_past_ready(source, 100);
    save(source, &state);
    m = begin_move(&config, &twin, false);
    CHECK_EQ(pc_pageserver_start(m.server), 0);
    dest = open_machine(&twin);
    load(dest, &state);
    for (int i = 0; i < 200; i++) {
        CHECK_EQ(pc_machine_resume(dest), 0);
        pause_machine(dest);
    }
    run_past_ready(dest, 3000);
    do {
        CHECK(pc_pager_request_missing(m.pager, 256) >= 0);
        CHECK_EQ(pc_pager_stats(m.pager, &stats), 0);
    } while (stats.resident_pages < stats.total_pages);
    wait_complete(m.pager);
    end_move(&m);
    check_worked(dest);
    close_machine(dest);
    close_machine(source);
}

static void survives_many_pauses_random(void) { survives_many_pauses(PC_WORKLOAD_RANDOM); }
static void survives_many_pauses_disk(void) { survives_many_pauses(PC_WORKLOAD_DISK); }

/* ---- state from elsewhere ---- */

static void refuses_a_damaged_state(void)
{
    struct pc_machine_config config = make_config(PC_ENGINE_RV64, PC_WORKLOAD_RANDOM, 1, PC_MEMORY_MEMFD), twin = make_twin(&config, PC_MEMORY_MEMFD);
    static struct saved good, bad;
    struct pc_machine *machine = boot_machine(&config), *other;
    struct pc_hart_state hart;

    run_until(machine, 1000);
    save(machine, &good);
    other = open_machine(&twin);
    for (int64_t at = 0; at < good.count; at += 1 + (int64_t)test_below(7)) {
        bad = good;
        bad.bytes[at] ^= (uint8_t)(1 + test_below(255));
        CHECK(pc_machine_load_state(other, bad.bytes, (size_t)bad.count, error, sizeof error) < 0);
    }
    for (int64_t cut = 0; cut < good.count; cut += 5)
        CHECK(pc_machine_load_state(other, good.bytes, (size_t)cut, error, sizeof error) < 0);
    /* A whole blob that says something impossible. */
    pc_rv64_get_state(&machine->vcpu[0], &hart);
    hart.pc = DATA;
    pc_rv64_set_state(&machine->vcpu[0], &hart);
    save(machine, &bad);
    CHECK_EQ(pc_machine_load_state(other, bad.bytes, (size_t)bad.count, error, sizeof error), -EBADMSG);
    CHECK(strstr(error, "HART"));
    load(other, &good);
    run_until(other, 1000);
    close_machine(other);
    twin.seed++;
    other = open_machine(&twin);
    CHECK_EQ(pc_machine_load_state(other, good.bytes, (size_t)good.count, error, sizeof error), -EINVAL);
    CHECK(strstr(error, "seed"));
    close_machine(other);
    close_machine(machine);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(workload_idle);
    RUN(workload_dirty);
    RUN(workload_random);
    RUN(workload_random_eight_harts);
    RUN(workload_disk);
    RUN(workload_sequential);
    RUN(workload_zipf);
    RUN(workload_phases);
    RUN(patterns_are_what_they_are_called);
    RUN(the_same_however_often_moved_dirty);
    RUN(the_same_however_often_moved_random);
    RUN(the_same_however_often_moved_phases);
    RUN(the_same_however_often_moved_disk);
    RUN(another_seed_is_another_machine);
    RUN(the_same_when_moved_by_postcopy);
    RUN(moves_dirty);
    RUN(moves_random);
    RUN(moves_zipf);
    RUN(moves_disk);
    RUN(every_access_can_be_paused);
    RUN(pauses_random_on_a_missing_page);
    RUN(pauses_disk_on_a_missing_page);
    RUN(survives_many_pauses_random);
    RUN(survives_many_pauses_disk);
    RUN(refuses_a_damaged_state);
    return test_end();
}
