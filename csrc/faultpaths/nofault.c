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

#include "core/util.h"
#include "faultpaths/fp.h"

#ifndef MADV_COLD
#define MADV_COLD 20
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define EVERYWHERE PC_FP_ALL_MODES, PC_FP_ALL_BACKINGS
#define ON(backing) (1u << PC_FP_##backing)

/* The page is still withheld, or still there, and is what it was. Where the call may drop it, it is asked for in MISSING only:
 * elsewhere it would rightly be zeros. */
static void verify_kept(struct pc_fp_cell *cell)
{
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, NULL, 0, 0);
}

static void verify_dropped(struct pc_fp_cell *cell)
{
    if (cell->spec->mode == PC_FP_MISSING || cell->spec->mode == PC_FP_USER_ONLY)
        verify_kept(cell);
}

static void fork_process(struct pc_fp_cell *cell)
{
    pid_t child;

    pc_fp_begin(cell);
    child = fork();
    if (!child)
        _exit(0);
    pc_fp_end(cell, child);
    while (child > 0 && waitpid(child, NULL, 0) < 0 && errno == EINTR) {
    }
    verify_kept(cell);
}

static void protect(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_mprotect, cell->page, cell->page_bytes, PROT_READ));
    verify_kept(cell);
}

/* Without EVENT_REMAP the memory leaves the userfaultfd's care: what was missing is zeros from then on. */
static void remap(struct pc_fp_cell *cell)
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

static void unmap(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_munmap, cell->page, cell->page_bytes));
}

static void replace(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_mmap, cell->page, cell->page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
}

static void sync_page(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_msync, cell->page, cell->page_bytes, MS_SYNC));
    verify_kept(cell);
}

static void core_of_page(struct pc_fp_cell *cell)
{
    unsigned char vector[512];

    PC_FP_ACT(cell, syscall(SYS_mincore, cell->page, PC_FP_BYTES, vector));
    verify_kept(cell);
}

static void advise(struct pc_fp_cell *cell, int advice)
{
    PC_FP_ACT(cell, syscall(SYS_madvise, cell->page, cell->page_bytes, advice));
    if (cell->shared->result.error == EINVAL)
        pc_fp_unavailable(cell, EINVAL, "madvise"); /* of this kernel, or of this memory: not about the page */
}

#define ADVICE(name, advice, verify)                                                                                    \
    static void name(struct pc_fp_cell *cell)                                                                           \
    {                                                                                                                   \
        advise(cell, advice);                                                                                           \
        verify(cell);                                                                                                   \
    }
ADVICE(advise_dontneed, MADV_DONTNEED, verify_dropped)
ADVICE(advise_free, MADV_FREE, verify_dropped)
ADVICE(advise_remove, MADV_REMOVE, verify_dropped)
ADVICE(advise_cold, MADV_COLD, verify_kept)
ADVICE(advise_pageout, MADV_PAGEOUT, verify_kept)
ADVICE(advise_willneed, MADV_WILLNEED, verify_kept)
ADVICE(advise_random, MADV_RANDOM, verify_kept)
ADVICE(advise_dontfork, MADV_DONTFORK, verify_kept)
ADVICE(advise_dontdump, MADV_DONTDUMP, verify_kept)
ADVICE(advise_hugepage, MADV_HUGEPAGE, verify_kept)
ADVICE(advise_mergeable, MADV_MERGEABLE, verify_kept)

/* Whether there is something to collapse is not the question, but whether it waits. */
static void advise_collapse(struct pc_fp_cell *cell)
{
    int64_t value;

    pc_fp_begin(cell);
    value = syscall(SYS_madvise, cell->page, cell->page_bytes, MADV_COLLAPSE);
    pc_fp_end_code(cell, value == -1 ? -errno : value);
    if (cell->shared->result.error == EINVAL) {
        /* As in Linux 6.1 and later for a range without one whole huge page: looked, found nothing, did nothing. */
        cell->shared->result.error = 0;
    }
    verify_kept(cell);
}

static void move_status(struct pc_fp_cell *cell, const int *node)
{
    void *page = cell->page;
    int status = -1;

    PC_FP_ACT(cell, syscall(SYS_move_pages, 0, 1, &page, node, &status, MPOL_MF_MOVE));
    if (cell->shared->result.error == ENOSYS)
        pc_fp_unavailable(cell, ENOSYS, "move_pages");
    verify_kept(cell);
}

static void ask_node(struct pc_fp_cell *cell)
{
    move_status(cell, NULL);
}

/* The status says ENOENT for a page that is not there; the call itself may say so too. */
static void move_page(struct pc_fp_cell *cell)
{
    const int node = 0;
    void *page = cell->page;
    int status = -1;
    int64_t value;

    pc_fp_begin(cell);
    value = syscall(SYS_move_pages, 0, 1, &page, &node, &status, MPOL_MF_MOVE);
    pc_fp_end_code(cell, value == -1 ? (errno == ENOENT ? 0 : -errno) : value);
    if (cell->shared->result.error == ENOSYS)
        pc_fp_unavailable(cell, ENOSYS, "move_pages");
    verify_kept(cell);
}

static void bind_node(struct pc_fp_cell *cell)
{
    unsigned long nodes = 1;

    PC_FP_ACT(cell, syscall(SYS_mbind, cell->page, cell->page_bytes, MPOL_BIND, &nodes, 8 * sizeof(nodes), MPOL_MF_MOVE));
    if (cell->shared->result.error == ENOSYS || cell->shared->result.error == EPERM)
        pc_fp_unavailable(cell, cell->shared->result.error, "mbind");
    verify_kept(cell);
}

static void read_all(struct pc_fp_cell *cell, const char *path)
{
    static char text[65536];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int64_t n = 0;

    if (fd < 0) {
        pc_fp_unavailable(cell, errno, "%s", path);
        return;
    }
    pc_fp_begin(cell);
    do
        n = read(fd, text, sizeof(text));
    while (n > 0);
    pc_fp_end(cell, n);
    verify_kept(cell);
}

static void read_smaps(struct pc_fp_cell *cell)
{
    read_all(cell, "/proc/self/smaps");
}

static void read_pagemap(struct pc_fp_cell *cell)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t entry;

    if (fd < 0) {
        pc_fp_unavailable(cell, errno, "/proc/self/pagemap");
        return;
    }
    PC_FP_ACT(cell, pread(fd, &entry, sizeof(entry), (off_t)((uintptr_t)cell->page / pc_page_bytes() * sizeof(entry))));
    pc_fp_check_value(cell, sizeof(entry));
    verify_kept(cell);
}

static void scan_pagemap(struct pc_fp_cell *cell)
{
    struct pc_pagemap_query query = {.start = (uintptr_t)cell->page, .end = (uintptr_t)cell->page + cell->page_bytes,
                                     .all_of = PC_PAGE_PRESENT, .returned = PC_PAGE_PRESENT};
    struct pc_pagemap_region region;
    uint64_t end;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    if (fd < 0) {
        pc_fp_unavailable(cell, errno, "/proc/self/pagemap");
        return;
    }
    pc_fp_begin(cell);
    pc_fp_end_code(cell, pc_pagemap_scan(fd, &query, &region, 1, &end));
    if (cell->shared->result.error == ENOTTY)
        pc_fp_unavailable(cell, ENOTTY, "PAGEMAP_SCAN (Linux 6.7)");
    verify_kept(cell);
}

static void lock_all_on_fault(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_mlockall, 1 /* MCL_CURRENT */ | 4 /* MCL_ONFAULT */));
    if (cell->shared->result.error == EPERM || cell->shared->result.error == ENOMEM)
        pc_fp_unavailable(cell, cell->shared->result.error, "mlockall");
    verify_kept(cell);
}

static void protect_with_key(struct pc_fp_cell *cell)
{
    int key = (int)syscall(SYS_pkey_alloc, 0, 0);

    if (key < 0) {
        pc_fp_unavailable(cell, errno, "pkey_alloc");
        return;
    }
    PC_FP_ACT(cell, syscall(SYS_pkey_mprotect, cell->page, cell->page_bytes, PROT_READ | PROT_WRITE, key));
    verify_kept(cell);
}

static const struct pc_fp_operation operations[] = {
    {{"nofault.fork", "nofault", "fork copies the mapping, not what is missing in it", EVERYWHERE, PC_FP_NOFAULT},
     fork_process},
    {{"nofault.mprotect", "nofault", "mprotect of the page", EVERYWHERE, PC_FP_NOFAULT}, protect},
    {{"nofault.pkey_mprotect", "nofault", "pkey_mprotect of the page", EVERYWHERE, PC_FP_NOFAULT}, protect_with_key},
    {{"nofault.mremap", "nofault", "mremap moves the page elsewhere", EVERYWHERE, PC_FP_NOFAULT}, remap},
    {{"nofault.munmap", "nofault", "munmap of the page", EVERYWHERE, PC_FP_NOFAULT}, unmap},
    {{"nofault.mmap_fixed", "nofault", "mmap with MAP_FIXED over the page", EVERYWHERE, PC_FP_NOFAULT}, replace},
    {{"nofault.msync", "nofault", "msync of the page", EVERYWHERE, PC_FP_NOFAULT}, sync_page},
    {{"nofault.mincore", "nofault", "mincore asks about the page", EVERYWHERE, PC_FP_NOFAULT}, core_of_page},
    {{"nofault.madv_dontneed", "nofault", "MADV_DONTNEED", EVERYWHERE, PC_FP_NOFAULT}, advise_dontneed},
    {{"nofault.madv_free", "nofault", "MADV_FREE", PC_FP_ALL_MODES, ON(ANON), PC_FP_NOFAULT}, advise_free},
    {{"nofault.madv_remove", "nofault", "MADV_REMOVE punches a hole into the memfd", PC_FP_ALL_MODES,
      ON(MEMFD) | ON(HUGETLB), PC_FP_NOFAULT},
     advise_remove},
    {{"nofault.madv_cold", "nofault", "MADV_COLD", EVERYWHERE, PC_FP_NOFAULT}, advise_cold},
    {{"nofault.madv_pageout", "nofault", "MADV_PAGEOUT", EVERYWHERE, PC_FP_NOFAULT}, advise_pageout},
    {{"nofault.madv_willneed", "nofault", "MADV_WILLNEED", EVERYWHERE, PC_FP_NOFAULT}, advise_willneed},
    {{"nofault.madv_random", "nofault", "MADV_RANDOM", EVERYWHERE, PC_FP_NOFAULT}, advise_random},
    {{"nofault.madv_dontfork", "nofault", "MADV_DONTFORK", EVERYWHERE, PC_FP_NOFAULT}, advise_dontfork},
    {{"nofault.madv_dontdump", "nofault", "MADV_DONTDUMP", EVERYWHERE, PC_FP_NOFAULT}, advise_dontdump},
    {{"nofault.madv_hugepage", "nofault", "MADV_HUGEPAGE", EVERYWHERE, PC_FP_NOFAULT}, advise_hugepage},
    {{"nofault.madv_mergeable", "nofault", "MADV_MERGEABLE", EVERYWHERE, PC_FP_NOFAULT}, advise_mergeable},
    {{"nofault.madv_collapse", "nofault", "MADV_COLLAPSE around the page", EVERYWHERE, PC_FP_NOFAULT}, advise_collapse},
    {{"nofault.move_pages_ask", "nofault", "move_pages asks for the page's node", EVERYWHERE, PC_FP_NOFAULT}, ask_node},
    {{"nofault.move_pages", "nofault", "move_pages to node 0", EVERYWHERE, PC_FP_NOFAULT}, move_page},
    {{"nofault.mbind", "nofault", "mbind to node 0, moving what is there", EVERYWHERE, PC_FP_NOFAULT}, bind_node},
    {{"nofault.smaps", "nofault", "a read of /proc/self/smaps", EVERYWHERE, PC_FP_NOFAULT}, read_smaps},
    {{"nofault.pagemap", "nofault", "a read of /proc/self/pagemap", EVERYWHERE, PC_FP_NOFAULT}, read_pagemap},
    {{"nofault.pagemap_scan", "nofault", "PAGEMAP_SCAN", EVERYWHERE, PC_FP_NOFAULT}, scan_pagemap},
    {{"nofault.mlockall_onfault", "nofault", "mlockall with MCL_ONFAULT", EVERYWHERE, PC_FP_NOFAULT}, lock_all_on_fault},
};

const struct pc_fp_class pc_fp_nofault = {operations, PC_ARRAY_LENGTH(operations)};
