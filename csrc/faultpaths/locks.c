/* SPDX-License-Identifier: Apache-2.0
 *
 * Is a lock held while a fault waits? A thread makes calls that need the address space's locks, first with no fault pending,
 * then with one: on memory elsewhere (mmap_lock), and in the very mapping of the page (the mapping's own lock too).
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faultpaths/cell.h"

#define ROUNDS 15

struct pc_fp_locks {
    struct pc_fp_cell *cell;
    pthread_t thread;
    int uffd;              /* of its own, for memory elsewhere */
    uint8_t *elsewhere;    /* one page */
    uint64_t pages_left;   /* of the region: its end is what the calls in the same mapping take away */
    uint64_t page_bytes;
    _Atomic uint32_t go, done, abandoned;
    _Atomic uint64_t call_began; /* the call that is being made; 0: none */
    _Atomic(uint64_t *) call_for;
};

static uint8_t *last_page(const struct pc_fp_locks *locks)
{
    return locks->cell->region + (locks->pages_left - 1) * locks->page_bytes;
}

/* One call of a kind. False: it cannot be made. What is taken away before or given back after it does not count. */
static bool call(struct pc_fp_locks *locks, int kind, bool same, uint64_t *ns)
{
    uint64_t bytes = locks->page_bytes;
    uint8_t *at = same ? last_page(locks) : locks->elsewhere;
    int uffd = same ? locks->cell->uffd : locks->uffd;
    uint64_t mode = pc_fp_register_mode(locks->cell->spec->mode);
    bool worked = false, forked = false;
    void *got = NULL;
    uint64_t began;
    pid_t child;

    if (kind == PC_FP_LOCK_MUNMAP && !same) {
        at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED)
            return false;
    }
    began = pc_now_ns();
    atomic_store(&locks->call_began, began);
    switch (kind) {
    case PC_FP_LOCK_MMAP:
        got = mmap(same ? at : NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (same ? MAP_FIXED : 0), -1,
                   0);
        worked = got != MAP_FAILED;
        break;
    case PC_FP_LOCK_MUNMAP:
        worked = !munmap(at, bytes);
        break;
    case PC_FP_LOCK_MPROTECT:
        worked = !mprotect(at, bytes, PROT_READ);
        break;
    case PC_FP_LOCK_FORK:
        child = fork();
        if (!child)
            _exit(0);
        forked = worked = child > 0;
        break;
    case PC_FP_LOCK_REGISTER:
        if (same)
            (void)pc_uffd_unregister(uffd, (uintptr_t)at, bytes);
        worked = !pc_uffd_register(uffd, (uintptr_t)at, bytes, same ? mode : PC_UFFD_MISSING, NULL);
        break;
    default:
        break;
    }
    *ns = pc_now_ns() - began;
    atomic_store(&locks->call_began, 0);
    if (forked)
        while (waitpid(child, NULL, 0) < 0 && errno == EINTR) {
        }
    if (kind == PC_FP_LOCK_MMAP && worked && !same)
        (void)munmap(got, bytes);
    if (same && (kind == PC_FP_LOCK_MMAP || kind == PC_FP_LOCK_MUNMAP))
        locks->pages_left--;
    if (kind == PC_FP_LOCK_MPROTECT)
        (void)mprotect(at, bytes, same ? pc_fp_region_prot(locks->cell->spec->backing) : PROT_READ | PROT_WRITE);
    if (kind == PC_FP_LOCK_REGISTER && !same)
        (void)pc_uffd_unregister(uffd, (uintptr_t)at, bytes);
    return worked;
}

static int by_size(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;

    return *x < *y ? -1 : *x > *y;
}

static void measure(struct pc_fp_locks *locks, bool same, uint64_t *medians)
{
    uint64_t ns[ROUNDS];

    if (same && locks->cell->region_pages < PC_FP_LOCK_PAGES)
        return; /* huge pages: the mapping is the page */
    (void)madvise(locks->cell->region, locks->pages_left * locks->page_bytes, same ? MADV_DOFORK : MADV_DONTFORK);
    for (int kind = 0; kind < PC_FP_LOCKS; kind++) {
        bool worked = true;

        atomic_store(&locks->call_for, &medians[kind]);
        for (int i = 0; worked && i < ROUNDS; i++) {
            worked = call(locks, kind, same, &ns[i]);
            if (atomic_load(&locks->abandoned))
                return;
        }
        if (worked) {
            qsort(ns, ROUNDS, sizeof(ns[0]), by_size);
            medians[kind] = ns[ROUNDS / 2];
        }
    }
}

static void *measurer(void *argument)
{
    struct pc_fp_locks *locks = argument;
    struct pc_fp_result *result = &locks->cell->shared->result;

    while (!atomic_load(&locks->go))
        (void)usleep(200);
    measure(locks, false, result->lock_elsewhere_ns);
    if (!atomic_load(&locks->abandoned))
        measure(locks, true, result->lock_same_ns);
    atomic_store(&locks->done, 1);
    return NULL;
}

int pc_fp_locks_start(struct pc_fp_cell *cell, struct pc_fp_locks **out)
{
    struct pc_fp_locks *locks = calloc(1, sizeof(*locks));
    int rc;

    if (!locks)
        return -ENOMEM;
    locks->cell = cell;
    locks->page_bytes = cell->page_bytes;
    locks->pages_left = cell->region_pages;
    if (cell->page_bytes > pc_page_bytes())
        locks->page_bytes = pc_page_bytes(); /* for memory elsewhere; in the mapping nothing is measured */
    locks->uffd = pc_uffd_open(cell->spec->mode == PC_FP_USER_ONLY ? PC_UFFD_USER_ONLY : PC_UFFD_ANY, 0, NULL);
    locks->elsewhere = mmap(NULL, locks->page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (locks->uffd < 0 || locks->elsewhere == MAP_FAILED) {
        free(locks);
        return -ENOMEM;
    }
    *locks->elsewhere = 1;
    measure(locks, true, cell->shared->result.lock_idle_same_ns);
    measure(locks, false, cell->shared->result.lock_idle_ns);
    rc = pthread_create(&locks->thread, NULL, measurer, locks);
    if (rc) {
        free(locks);
        return -rc;
    }
    (void)pthread_detach(locks->thread);
    *out = locks; /* for the life of the child */
    return 0;
}

void pc_fp_locks_measure(struct pc_fp_locks *locks, uint32_t timeout_ms)
{
    uint64_t end = pc_now_ns() + timeout_ms * 1000000ull, began;

    if (!locks)
        return;
    atomic_store(&locks->go, 1);
    while (!atomic_load(&locks->done) && pc_now_ns() < end)
        (void)usleep(500);
    if (!atomic_load(&locks->done)) {
        atomic_store(&locks->abandoned, 1);
        began = atomic_load(&locks->call_began);
        if (began)
            *atomic_load(&locks->call_for) = pc_now_ns() - began;
    }
    locks->cell->shared->result.locks_measured = 1;
}
