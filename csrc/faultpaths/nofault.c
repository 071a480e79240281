/* SPDX-License-Identifier: Apache-2.0
 *
 * Calls that work on the mapping or on what is known about the page. None of them needs its content, so none may fault; what the
 * page holds is looked at afterwards, which is another access.
 */
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faultpaths/fp.h"

#ifndef MADV_COLD
#define MADV_COLD 20
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define ON(backing) (1u << PC_FP_##backing)

/* For a call that may drop the page: where it was there, it would rightly be zeros. */
static void verify_dropped(struct pc_fp_cell *cell)
{
    if (cell->spec->mode == PC_FP_MISSING || cell->spec->mode == PC_FP_USER_ONLY)
        pc_fp_verify_kept(cell);
}

static void nofault_fork(struct pc_fp_cell *cell)
{
    pid_t child;

    pc_fp_begin(cell);
    child = fork();
    if (!child)
        _exit(0);
    pc_fp_end(cell, child);
    while (child > 0 && waitpid(child, NULL, 0) < 0 && errno == EINTR) {
    }
    pc_fp_verify_kept(cell);
}

PC_FP_CALL(nofault_mprotect, pc_fp_verify_kept, mprotect, cell->page, cell->page_bytes, PROT_READ)
PC_FP_CALL(nofault_msync, pc_fp_verify_kept, msync, cell->page, cell->page_bytes, MS_SYNC)

/* Without EVENT_REMAP the memory leaves the userfaultfd's care: what was missing is zeros from then on. */
static void nofault_mremap(struct pc_fp_cell *cell)
{
    uint64_t bytes = cell->page_bytes;
    uint8_t *target = mmap(NULL, 2 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (target == MAP_FAILED) {
        pc_fp_unavailable(cell, errno, "mmap");
        return;
    }
    target = (uint8_t *)(((uintptr_t)target + bytes - 1) & ~(uintptr_t)(bytes - 1));
    PC_FP_ACT(cell, syscall(SYS_mremap, cell->page, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, target));
}

static void nofault_munmap(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_munmap, cell->page, cell->page_bytes));
}

static void nofault_mmap_fixed(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_mmap, cell->page, cell->page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
}

static void nofault_mincore(struct pc_fp_cell *cell)
{
    unsigned char vector[512];

    PC_FP_ACT(cell, syscall(SYS_mincore, cell->page, PC_FP_BYTES, vector));
    pc_fp_verify_kept(cell);
}

static void advise(struct pc_fp_cell *cell, int advice, void (*verify)(struct pc_fp_cell *cell))
{
    PC_FP_ACT(cell, syscall(SYS_madvise, cell->page, cell->page_bytes, advice));
    PC_FP_UNAVAILABLE_IF(cell, "madvise", EINVAL); /* of this kernel, or of this memory: not about the page */
    verify(cell);
}
PC_FP_VARIANT(nofault_madv_dontneed, advise, MADV_DONTNEED, verify_dropped)
PC_FP_VARIANT(nofault_madv_free, advise, MADV_FREE, verify_dropped)
PC_FP_VARIANT(nofault_madv_remove, advise, MADV_REMOVE, verify_dropped)
PC_FP_VARIANT(nofault_madv_cold, advise, MADV_COLD, pc_fp_verify_kept)
PC_FP_VARIANT(nofault_madv_pageout, advise, MADV_PAGEOUT, pc_fp_verify_kept)
PC_FP_VARIANT(nofault_madv_willneed, advise, MADV_WILLNEED, pc_fp_verify_kept)
PC_FP_VARIANT(nofault_madv_random, advise, MADV_RANDOM, pc_fp_verify_kept)
PC_FP_VARIANT(nofault_madv_dontfork, advise, MADV_DONTFORK, pc_fp_verify_kept)
PC_FP_VARIANT(nofault_madv_dontdump, advise, MADV_DONTDUMP, pc_fp_verify_kept)
PC_FP_VARIANT(nofault_madv_hugepage, advise, MADV_HUGEPAGE, pc_fp_verify_kept)
PC_FP_VARIANT(nofault_madv_mergeable, advise, MADV_MERGEABLE, pc_fp_verify_kept)

/* Whether there is something to collapse is not the question, but whether it waits: EINVAL is what Linux 6.1 and later say of a
 * range without one whole huge page. */
static void nofault_madv_collapse(struct pc_fp_cell *cell)
{
    PC_FP_ACT_EXPECTING(cell, EINVAL, syscall(SYS_madvise, cell->page, cell->page_bytes, MADV_COLLAPSE));
    pc_fp_verify_kept(cell);
}

/* The status says ENOENT for a page that is not there; the call itself may say so too. */
static void move_pages(struct pc_fp_cell *cell, const int *node)
{
    void *page = cell->page;
    int status = -1;

    PC_FP_ACT_EXPECTING(cell, ENOENT, syscall(SYS_move_pages, 0, 1, &page, node, &status, MPOL_MF_MOVE));
    PC_FP_UNAVAILABLE_IF(cell, "move_pages", ENOSYS);
    pc_fp_verify_kept(cell);
}
PC_FP_VARIANT(nofault_move_pages_ask, move_pages, NULL)
PC_FP_VARIANT(nofault_move_pages, move_pages, &(const int){0})

static void nofault_mbind(struct pc_fp_cell *cell)
{
    unsigned long nodes = 1;

    PC_FP_ACT(cell, syscall(SYS_mbind, cell->page, cell->page_bytes, MPOL_BIND, &nodes, 8 * sizeof(nodes), MPOL_MF_MOVE));
    PC_FP_UNAVAILABLE_IF(cell, "mbind", ENOSYS, EPERM);
    pc_fp_verify_kept(cell);
}

static void nofault_smaps(struct pc_fp_cell *cell)
{
    static char text[65536];
    int fd = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC);
    ssize_t n;

    if (!pc_fp_made(cell, fd, "/proc/self/smaps"))
        return;
    pc_fp_begin(cell);
    do
        n = read(fd, text, sizeof(text));
    while (n > 0);
    pc_fp_end(cell, n);
    pc_fp_verify_kept(cell);
}

static void nofault_pagemap(struct pc_fp_cell *cell)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t entry;

    if (!pc_fp_made(cell, fd, "/proc/self/pagemap"))
        return;
    PC_FP_ACT(cell, pread(fd, &entry, sizeof(entry), (off_t)((uintptr_t)cell->page / pc_page_bytes() * sizeof(entry))));
    pc_fp_check_value(cell, sizeof(entry));
    pc_fp_verify_kept(cell);
}

static void nofault_pagemap_scan(struct pc_fp_cell *cell)
{
    struct pc_pagemap_query query = {.start = (uintptr_t)cell->page, .end = (uintptr_t)cell->page + cell->page_bytes,
                                     .all_of = PC_PAGE_PRESENT, .returned = PC_PAGE_PRESENT};
    struct pc_pagemap_region region;
    uint64_t end;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    if (!pc_fp_made(cell, fd, "/proc/self/pagemap"))
        return;
    PC_FP_ACT_CODE(cell, pc_pagemap_scan(fd, &query, &region, 1, &end));
    PC_FP_UNAVAILABLE_IF(cell, "PAGEMAP_SCAN (Linux 6.7)", ENOTTY);
    pc_fp_verify_kept(cell);
}

static void nofault_mlockall_onfault(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_mlockall, 1 /* MCL_CURRENT */ | 4 /* MCL_ONFAULT */));
    PC_FP_UNAVAILABLE_IF(cell, "mlockall", EPERM, ENOMEM);
    pc_fp_verify_kept(cell);
}

static void nofault_pkey_mprotect(struct pc_fp_cell *cell)
{
    int key = (int)syscall(SYS_pkey_alloc, 0, 0);

    if (!pc_fp_made(cell, key, "pkey_alloc"))
        return;
    PC_FP_ACT(cell, syscall(SYS_pkey_mprotect, cell->page, cell->page_bytes, PROT_READ | PROT_WRITE, key));
    pc_fp_verify_kept(cell);
}

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(nofault, fork, NOTHING, PC_FP_NOFAULT, "fork copies the mapping, not what is missing in it"),
    PC_FP_ROW(nofault, mprotect, NOTHING, PC_FP_NOFAULT, "mprotect of the page"),
    PC_FP_ROW(nofault, pkey_mprotect, NOTHING, PC_FP_NOFAULT, "pkey_mprotect of the page"),
    PC_FP_ROW(nofault, mremap, NOTHING, PC_FP_NOFAULT, "mremap moves the page elsewhere"),
    PC_FP_ROW(nofault, munmap, NOTHING, PC_FP_NOFAULT, "munmap of the page"),
    PC_FP_ROW(nofault, mmap_fixed, NOTHING, PC_FP_NOFAULT, "mmap with MAP_FIXED over the page"),
    PC_FP_ROW(nofault, msync, NOTHING, PC_FP_NOFAULT, "msync of the page"),
    PC_FP_ROW(nofault, mincore, NOTHING, PC_FP_NOFAULT, "mincore asks about the page"),
    PC_FP_ROW(nofault, madv_dontneed, NOTHING, PC_FP_NOFAULT, "MADV_DONTNEED"),
    PC_FP_ROW_OF(nofault, madv_free, PC_FP_ALL_MODES, ON(ANON), NOTHING, PC_FP_NOFAULT, "MADV_FREE"),
    PC_FP_ROW_OF(nofault, madv_remove, PC_FP_ALL_MODES, ON(MEMFD) | ON(HUGETLB), NOTHING, PC_FP_NOFAULT,
              "MADV_REMOVE punches a hole into the memfd"),
    PC_FP_ROW(nofault, madv_cold, NOTHING, PC_FP_NOFAULT, "MADV_COLD"),
    PC_FP_ROW(nofault, madv_pageout, NOTHING, PC_FP_NOFAULT, "MADV_PAGEOUT"),
    PC_FP_ROW(nofault, madv_willneed, NOTHING, PC_FP_NOFAULT, "MADV_WILLNEED"),
    PC_FP_ROW(nofault, madv_random, NOTHING, PC_FP_NOFAULT, "MADV_RANDOM"),
    PC_FP_ROW(nofault, madv_dontfork, NOTHING, PC_FP_NOFAULT, "MADV_DONTFORK"),
    PC_FP_ROW(nofault, madv_dontdump, NOTHING, PC_FP_NOFAULT, "MADV_DONTDUMP"),
    PC_FP_ROW(nofault, madv_hugepage, NOTHING, PC_FP_NOFAULT, "MADV_HUGEPAGE"),
    PC_FP_ROW(nofault, madv_mergeable, NOTHING, PC_FP_NOFAULT, "MADV_MERGEABLE"),
    PC_FP_ROW(nofault, madv_collapse, NOTHING, PC_FP_NOFAULT, "MADV_COLLAPSE around the page"),
    PC_FP_ROW(nofault, move_pages_ask, NOTHING, PC_FP_NOFAULT, "move_pages asks for the page's node"),
    PC_FP_ROW(nofault, move_pages, NOTHING, PC_FP_NOFAULT, "move_pages to node 0"),
    PC_FP_ROW(nofault, mbind, NOTHING, PC_FP_NOFAULT, "mbind to node 0, moving what is there"),
    PC_FP_ROW(nofault, smaps, NOTHING, PC_FP_NOFAULT, "a read of /proc/self/smaps"),
    PC_FP_ROW(nofault, pagemap, NOTHING, PC_FP_NOFAULT, "a read of /proc/self/pagemap"),
    PC_FP_ROW(nofault, pagemap_scan, NOTHING, PC_FP_NOFAULT, "PAGEMAP_SCAN"),
    PC_FP_ROW(nofault, mlockall_onfault, NOTHING, PC_FP_NOFAULT, "mlockall with MCL_ONFAULT"),
};

const struct pc_fp_class pc_fp_nofault = {operations, PC_ARRAY_LENGTH(operations)};
