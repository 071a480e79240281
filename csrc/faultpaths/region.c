/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory of a cell: a mapping of a few pages, of which one is withheld. The others hold content, so that what an operation
 * does at the edge of the page does not fault elsewhere, and that calls can be made on the same mapping while the fault is
 * pending. Before and after it lies memory that cannot be touched.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "faultpaths/cell.h"

#include "uffd/uffd_abi.h"

#include "uffd/guest_memfd_abi.h"

#ifndef MFD_HUGETLB
#define MFD_HUGETLB 4u
#endif

static uint64_t features_of(int mode, uint64_t has, bool handed_over)
{
    /* Who serves the fault elsewhere may know addresses of pages only. */
    uint64_t wanted = UFFD_FEATURE_THREAD_ID | (handed_over ? 0 : UFFD_FEATURE_EXACT_ADDRESS);

    if (mode == PC_FP_SIGBUS)
        wanted |= UFFD_FEATURE_SIGBUS;
    if (mode == PC_FP_WP_ASYNC)
        wanted |= UFFD_FEATURE_WP_ASYNC;
    if (mode == PC_FP_WP || mode == PC_FP_WP_ASYNC)
        wanted |= (UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM) & has;
    if (mode == PC_FP_RWP || mode == PC_FP_RWP_ASYNC)
        wanted |= UFFD_FEATURE_RWP;
    if (mode == PC_FP_RWP_ASYNC)
        wanted |= UFFD_FEATURE_RWP_ASYNC;
    return wanted;
}

/* The features without which a mode cannot be on a backing. No bit says whether it can be on a guest_memfd: registering does. */
static uint64_t needed(int mode, int backing)
{
    bool huge = backing == PC_FP_HUGETLB, guest = backing == PC_FP_GUEST_MEMFD, file = backing != PC_FP_ANON;
    uint64_t missing = huge ? UFFD_FEATURE_MISSING_HUGETLBFS : file && !guest ? UFFD_FEATURE_MISSING_SHMEM : 0;
    uint64_t wp = UFFD_FEATURE_PAGEFAULT_FLAG_WP | (file ? UFFD_FEATURE_WP_HUGETLBFS_SHMEM : 0);

    switch (mode) {
    case PC_FP_MINOR:
        return huge ? UFFD_FEATURE_MINOR_HUGETLBFS : guest ? 0 : UFFD_FEATURE_MINOR_SHMEM;
    case PC_FP_WP:
        return wp;
    case PC_FP_WP_ASYNC:
        return wp | UFFD_FEATURE_WP_ASYNC;
    case PC_FP_SIGBUS:
        return missing | UFFD_FEATURE_SIGBUS;
    case PC_FP_POISON:
        return missing | UFFD_FEATURE_POISON;
    case PC_FP_RWP:
        return UFFD_FEATURE_RWP;
    case PC_FP_RWP_ASYNC:
        return UFFD_FEATURE_RWP | UFFD_FEATURE_RWP_ASYNC;
    default:
        return missing;
    }
}

static bool open_uffd(struct pc_fp_cell *cell)
{
    int mode = cell->spec->mode, how = mode == PC_FP_USER_ONLY ? PC_UFFD_USER_ONLY : PC_UFFD_ANY;
    uint64_t need = needed(mode, cell->spec->backing), features;
    struct pc_uffd_api api = {0};
    int rc = pc_uffd_probe(how, &api);

    if (rc)
        return pc_fp_unavailable(cell, -rc, "userfaultfd");
    if (how == PC_UFFD_ANY && api.how == PC_UFFD_USER_ONLY) {
        pc_fp_unavailable(cell, 0, "this user may open a userfaultfd for faults of user mode only; it takes access to "
                                   "/dev/userfaultfd, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1");
        return false;
    }
    if (need & ~api.features & UFFD_FEATURE_RWP)
        return pc_fp_unavailable(cell, 0, "this kernel's userfaultfd protects no page against reads (UFFD_FEATURE_RWP, Linux 7.3)");
    if (need & ~api.features)
        return pc_fp_unavailable(cell, 0, "this kernel's userfaultfd has not that mode for this memory (feature bits 0x%llx)",
                          (unsigned long long)(need & ~api.features));
    features = features_of(mode, api.features, cell->spec->hand_over_fd >= 0) & (api.features | need);
    cell->uffd = pc_uffd_open(how, features, NULL);
    if (cell->uffd < 0)
        return pc_fp_unavailable(cell, -cell->uffd, "userfaultfd");
    atomic_store(&cell->shared->uffd, cell->uffd);
    return true;
}

/* Of a VM of its own, which lives as long as the file. */
static bool make_guest_memfd(struct pc_fp_cell *cell, uint64_t bytes)
{
    struct kvm_create_guest_memfd wanted = {.size = bytes, .flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED};
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm;

    if (kvm < 0)
        return pc_fp_unavailable(cell, errno, "/dev/kvm, which makes a guest_memfd");
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0)
        return pc_fp_unavailable(cell, errno, "KVM_CREATE_VM, for a guest_memfd");
    cell->memfd = ioctl(vm, KVM_CREATE_GUEST_MEMFD, &wanted);
    if (cell->memfd < 0)
        return pc_fp_unavailable(cell, errno, "a guest_memfd that can be mapped (Linux 6.18, CONFIG_KVM_GUEST_MEMFD)");
    close(vm);
    close(kvm);
    return true;
}

int pc_fp_region_prot(int backing)
{
    return PROT_READ | PROT_WRITE | (backing == PC_FP_GUEST_MEMFD ? 0 : PROT_EXEC);
}

static bool map_region(struct pc_fp_cell *cell)
{
    int backing = cell->spec->backing;
    uint64_t bytes, guard;
    uint8_t *reserved;
    int flags = MAP_FIXED | (backing == PC_FP_ANON || backing == PC_FP_MEMFD_PRIVATE ? MAP_PRIVATE : MAP_SHARED);
    int prot = pc_fp_region_prot(backing);
    uint64_t before = 1; /* pages in front of the page */

    cell->memfd = -1;
    cell->page_bytes = backing == PC_FP_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
    if (!cell->page_bytes)
        return pc_fp_unavailable(cell, 0, "this kernel has no huge pages");
    cell->region_pages = cell->measure == PC_FP_MEASURE_LOCKS ? 4 + PC_FP_LOCK_PAGES : 4;
    if (backing == PC_FP_HUGETLB || cell->spec->hand_over_fd >= 0) {
        cell->region_pages = 1;
        before = 0;
    }
    bytes = cell->region_pages * cell->page_bytes;
    guard = cell->page_bytes;
    if (backing == PC_FP_GUEST_MEMFD) {
        if (!make_guest_memfd(cell, bytes))
            return false;
    } else if (backing != PC_FP_ANON) {
        cell->memfd = memfd_create("postcopy-faultpath", MFD_CLOEXEC | (backing == PC_FP_HUGETLB ? MFD_HUGETLB : 0));
        if (cell->memfd < 0 || ftruncate(cell->memfd, (off_t)bytes))
            return pc_fp_unavailable(cell, errno, "memfd");
    }
    reserved = mmap(NULL, bytes + 3 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return pc_fp_unavailable(cell, errno, "mmap");
    cell->region = (uint8_t *)(((uintptr_t)reserved + 2 * guard - 1) & ~(uintptr_t)(guard - 1));
    if (mmap(cell->region, bytes, prot, flags | (cell->memfd < 0 ? MAP_ANONYMOUS : 0), cell->memfd, 0) == MAP_FAILED) {
        if (backing == PC_FP_HUGETLB && errno == ENOMEM)
            pc_fp_unavailable(cell, 0, "no huge page is free in the pool (/proc/sys/vm/nr_hugepages)");
        else
            pc_fp_unavailable(cell, errno, "mmap");
        return false;
    }
    /* Else a whole huge page comes with the first neighbour. */
    if (backing != PC_FP_HUGETLB)
        (void)madvise(cell->region, bytes, MADV_NOHUGEPAGE);
    cell->page = cell->region + before * cell->page_bytes;
    cell->page_offset = before * cell->page_bytes;
    return true;
}

static bool populate(struct pc_fp_cell *cell, bool page_too)
{
    uint64_t index = (uint64_t)(cell->page - cell->region) / cell->page_bytes;

    /* Made now: the handler shall take no lock for it while the fault is pending. */
    cell->staging = mmap(NULL, cell->page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (cell->staging == MAP_FAILED)
        return pc_fp_unavailable(cell, errno, "mmap");
    pc_fp_content(cell->staging, cell->page_bytes);
    memcpy(cell->content, cell->staging, PC_FP_BYTES);
    for (uint64_t i = 0; i < cell->region_pages; i++)
        if (page_too || i != index)
            memcpy(cell->region + i * cell->page_bytes, cell->staging, cell->page_bytes);
    return true;
}

static bool fill_page_cache(struct pc_fp_cell *cell)
{
    uint8_t *alias = mmap(NULL, cell->page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, cell->memfd, (off_t)cell->page_offset);

    if (alias == MAP_FAILED)
        return pc_fp_unavailable(cell, errno, "mmap");
    memcpy(alias, cell->staging, cell->page_bytes);
    (void)munmap(alias, cell->page_bytes);
    return true;
}

uint64_t pc_fp_register_mode(int mode)
{
    switch (mode) {
    case PC_FP_MINOR:
        return PC_UFFD_MINOR;
    case PC_FP_WP:
    case PC_FP_WP_ASYNC:
        return PC_UFFD_WP;
    case PC_FP_RWP:
    case PC_FP_RWP_ASYNC:
        return PC_UFFD_RWP;
    default:
        return PC_UFFD_MISSING;
    }
}

bool pc_fp_region_open(struct pc_fp_cell *cell)
{
    int mode = cell->spec->mode, rc;
    uint64_t how = pc_fp_register_mode(mode);

    if (mode == PC_FP_MINOR && cell->spec->backing == PC_FP_ANON)
        return pc_fp_unavailable(cell, 0, "anonymous memory has no page cache, thus no minor faults");
    if (!open_uffd(cell) || !map_region(cell))
        return false;
    if (!populate(cell, how == PC_UFFD_WP || how == PC_UFFD_RWP) || (mode == PC_FP_MINOR && !fill_page_cache(cell)))
        return false;
    rc = pc_uffd_register(cell->uffd, (uintptr_t)cell->region, cell->region_pages * cell->page_bytes, how, NULL);
    if (rc == -EINVAL && cell->spec->backing == PC_FP_GUEST_MEMFD)
        return pc_fp_unavailable(cell, 0, "this kernel's userfaultfd does not take a guest_memfd in this mode (Linux 7.1)");
    if (rc)
        return pc_fp_unavailable(cell, -rc, "UFFDIO_REGISTER");
    if (how == PC_UFFD_RWP) {
        rc = pc_uffd_rwprotect(cell->uffd, (uintptr_t)cell->page, cell->page_bytes, PC_UFFD_PROTECT);
        if (rc)
            return pc_fp_unavailable(cell, -rc, "UFFDIO_RWPROTECT");
    }
    if (how == PC_UFFD_WP) {
        rc = pc_uffd_writeprotect(cell->uffd, (uintptr_t)cell->page, cell->page_bytes, PC_UFFD_PROTECT);
        if (rc)
            return pc_fp_unavailable(cell, -rc, "UFFDIO_WRITEPROTECT");
    }
    return true;
}

void pc_fp_region_give(struct pc_fp_cell *cell)
{
    uint64_t address = (uintptr_t)cell->page, bytes = cell->page_bytes, done;
    int rc;

    switch (cell->spec->mode) {
    case PC_FP_MINOR:
        rc = pc_uffd_continue(cell->uffd, address, bytes, 0, &done);
        break;
    case PC_FP_WP:
        rc = pc_uffd_writeprotect(cell->uffd, address, bytes, 0);
        break;
    case PC_FP_RWP:
        rc = pc_uffd_rwprotect(cell->uffd, address, bytes, 0);
        break;
    case PC_FP_POISON:
        rc = pc_uffd_poison(cell->uffd, address, bytes, 0, &done);
        break;
    default:
        rc = pc_uffd_copy(cell->uffd, address, cell->staging, bytes, 0, &done);
        break;
    }
    /* It was there already, or is no longer registered (the operation has unmapped or moved it): a thread that waits shall look
     * again. Also after a success, for a thread that was between its look and its sleep. */
    (void)rc;
    (void)pc_uffd_wake(cell->uffd, address, bytes);
}

bool pc_fp_region_written(const struct pc_fp_cell *cell)
{
    struct pc_pagemap_query query = {.start = (uintptr_t)cell->page,
                                     .end = (uintptr_t)cell->page + cell->page_bytes,
                                     .all_of = PC_PAGE_WRITTEN,
                                     .returned = PC_PAGE_WRITTEN};
    struct pc_pagemap_region region;
    uint64_t walk_end;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    bool written = fd >= 0 && pc_pagemap_scan(fd, &query, &region, 1, &walk_end) == 1;

    if (fd >= 0)
        close(fd);
    return written;
}
