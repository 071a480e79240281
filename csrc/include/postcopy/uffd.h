/* SPDX-License-Identifier: Apache-2.0
 *
 * userfaultfd(2) and PAGEMAP_SCAN, one function for each thing that the kernel can be asked.
 *
 * Threads: nothing here takes a lock or keeps state. Any thread may call anything; of
 * several that read the same userfaultfd each event reaches one. Only pc_uffd_read_spinning waits for events. The kernel takes
 * the mmap lock of the process whose memory it is, and pc_uffd_copy can fault on `source`.
 */
#ifndef POSTCOPY_UFFD_H
#define POSTCOPY_UFFD_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
enum pc_uffd_how {
    PC_UFFD_ANY = 0,      /* the first of the following that works */
    PC_UFFD_DEVICE = 1,   /* /dev/userfaultfd */
    PC_UFFD_SYSCALL = 2,  /* userfaultfd(2), all faults */
    PC_UFFD_USER_ONLY = 3 /* userfaultfd(2) with UFFD_USER_MODE_ONLY: faults raised by the kernel get EFAULT */
};
enum pc_uffd_mode { PC_UFFD_MISSING = 1, PC_UFFD_WP = 2, PC_UFFD_MINOR = 4, PC_UFFD_RWP = 8 };
enum pc_uffd_ioctl {
    PC_UFFD_IOCTL_REGISTER = 0,
    PC_UFFD_IOCTL_UNREGISTER = 1,
    PC_UFFD_IOCTL_WAKE = 2,
    PC_UFFD_IOCTL_COPY = 3,
    PC_UFFD_IOCTL_ZEROPAGE = 4,
    PC_UFFD_IOCTL_MOVE = 5,
    PC_UFFD_IOCTL_WRITEPROTECT = 6,
    PC_UFFD_IOCTL_CONTINUE = 7,
    PC_UFFD_IOCTL_POISON = 8,
    PC_UFFD_IOCTL_RWPROTECT = 9
};
enum pc_uffd_fill_mode { /* `mode` of the functions that fill; which one takes which is in ioctl_userfaultfd(2) */
    PC_UFFD_DONTWAKE = 1,
    PC_UFFD_FILL_WP = 2,        /* copy, continue: the page comes write-protected */
    PC_UFFD_ALLOW_SRC_HOLES = 2 /* move: a hole in the source is no error */
};
enum pc_uffd_writeprotect_mode { PC_UFFD_PROTECT = 1, PC_UFFD_PROTECT_DONTWAKE = 2 };
enum pc_uffd_event_type {
    PC_UFFD_EVENT_PAGEFAULT = 0x12,
    PC_UFFD_EVENT_FORK = 0x13,
    PC_UFFD_EVENT_REMAP = 0x14,
    PC_UFFD_EVENT_REMOVE = 0x15,
    PC_UFFD_EVENT_UNMAP = 0x16
};
enum pc_uffd_fault_flags { PC_UFFD_FAULT_WRITE = 1, PC_UFFD_FAULT_WP = 2, PC_UFFD_FAULT_MINOR = 4, PC_UFFD_FAULT_RWP = 8 };
struct pc_uffd_event {
    uint64_t address; /* pagefault: of the page, or exact with EXACT_ADDRESS; remap: from; remove, unmap: start */
    uint64_t end;     /* remove, unmap: end; remap: the new address */
    uint64_t bytes;   /* remap, remove, unmap: length */
    uint64_t flags;   /* pagefault: enum pc_uffd_fault_flags */
    int32_t type;     /* enum pc_uffd_event_type; a number without a name from a newer kernel is passed on */
    int32_t tid;      /* pagefault with THREAD_ID: the thread that faulted; else 0 */
    int32_t uffd;     /* fork: the child's userfaultfd; else -1 */
};
struct pc_uffd_api {
    int how;           /* how it was opened: PC_UFFD_DEVICE, ... */
    uint64_t features; /* bits this kernel has (all of them, whatever was asked) */
    uint64_t ioctls;
};
/* What this kernel and this user may have, asked on a throw-away fd. 0 or -errno. */
int pc_uffd_probe(int how, struct pc_uffd_api *api);
/* A new userfaultfd, non-blocking and close-on-exec, with `features` enabled. The fd, or -errno:
 * -EINVAL when the kernel lacks a feature, -EPERM/-EACCES when the user may not, -ENOSYS/-ENOENT when there is none. */
int pc_uffd_open(int how, uint64_t features, struct pc_uffd_api *api);
/* The features that a userfaultfd of any process was opened with, as /proc tells. 0, -EINVAL when it is none, or -errno. */
int pc_uffd_features(int uffd, uint64_t *features);
/* UFFDIO_REGISTER (*ioctls: what the range allows), UFFDIO_UNREGISTER, UFFDIO_WAKE: 0 or -errno. */
int pc_uffd_register(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *ioctls);
int pc_uffd_unregister(int uffd, uint64_t address, uint64_t bytes);
int pc_uffd_wake(int uffd, uint64_t address, uint64_t bytes);
/* Each of these returns 0 when all `bytes` were done, else -errno with *done_bytes telling how far it came (0 too when the
 * kernel did not say). They neither retry nor wake. */
int pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int pc_uffd_zeropage(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int pc_uffd_continue(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int pc_uffd_poison(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
/* Anonymous pages from `source` to `address`, without a copy. Linux 6.8. */
int pc_uffd_move(int uffd, uint64_t address, uint64_t source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
/* All of it or nothing: the kernel tells no partial count. mode: PC_UFFD_PROTECT, or 0 to lift the protection. */
int pc_uffd_writeprotect(int uffd, uint64_t address, uint64_t bytes, uint64_t mode);
/* The same against reads too, of pages that are there, in a range registered with PC_UFFD_RWP. Linux 7.3. */
int pc_uffd_rwprotect(int uffd, uint64_t address, uint64_t bytes, uint64_t mode);
/* Reads as many events as are there, at most `capacity`, with one system call; never waits. How many (0: none now), or -errno.
 * A fork event's descriptor becomes the caller's. */
int pc_uffd_read(int uffd, struct pc_uffd_event *events, uint32_t capacity);
/* The same again and again until there is one or spin_ns have passed: saves the sleep and the wake-up, costs a processor. */
int pc_uffd_read_spinning(int uffd, struct pc_uffd_event *events, uint32_t capacity, uint64_t spin_ns);

/* ---- pagemap ---- */
enum pc_page_category { /* PAGE_IS_* */
    PC_PAGE_WPALLOWED = 1,
    PC_PAGE_WRITTEN = 2,
    PC_PAGE_FILE = 4,
    PC_PAGE_PRESENT = 8,
    PC_PAGE_SWAPPED = 16,
    PC_PAGE_PFNZERO = 32,
    PC_PAGE_HUGE = 64,
    PC_PAGE_SOFT_DIRTY = 128
};
enum pc_scan_flags {
    PC_SCAN_WP_MATCHING = 1,  /* write-protect what matches, in the same step */
    PC_SCAN_CHECK_WPASYNC = 2 /* -EPERM when a part is not registered for that with WP_ASYNC */
};
struct pc_pagemap_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories; /* of enum pc_page_category, as far as the query's `returned` has them */
};
struct pc_pagemap_query { /* addresses of the process that the pagemap is of */
    uint64_t start;
    uint64_t end;
    uint64_t flags;     /* enum pc_scan_flags */
    uint64_t inverted;  /* categories that count where they are absent, for both of the following */
    uint64_t all_of;    /* a page matches when it has all of these */
    uint64_t any_of;    /* and, unless 0, one of these */
    uint64_t returned;  /* categories that the answer has; neighbours that agree in them are one region */
    uint64_t max_pages; /* stop after so many; 0: no limit */
};
/* How many regions of matching pages, in order, or -errno (-ENOTTY before Linux 6.7). Where the array is full the walk ends
 * early, *walk_end says where to go on. Neither populates nor touches. */
int64_t pc_pagemap_scan(int pagemap_fd, const struct pc_pagemap_query *query, struct pc_pagemap_region *regions,
                        uint32_t capacity, uint64_t *walk_end);
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
