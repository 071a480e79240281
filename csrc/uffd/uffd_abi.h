/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernel's userfaultfd ABI up to Linux 7.3, in the kernel's own names, without UFFDIO_SET_MODE (7.3). Read-write protection (RWP)
 * has been run on no kernel yet: its numbers are those of include/uapi/linux/userfaultfd.h after commits 6eab8f2cc646 and 2d427bb01639
 * and, for RWP_ASYNC, 45347e3d32c1, all for 7.3.
 *
 * <linux/userfaultfd.h> is not used: distributions ship headers years older than the kernels that run (Debian 12: 6.1, without
 * POISON and MOVE), and what a kernel can do is found out at run time, not where this was compiled. The asserts below hold the
 * layouts to the numbers every kernel has had; they are the reason for which a typing error here cannot reach a kernel.
 */
#ifndef PC_UFFD_ABI_H
#define PC_UFFD_ABI_H

#ifdef _LINUX_USERFAULTFD_H
#error "include uffd_abi.h instead of <linux/userfaultfd.h>"
#endif
#define _LINUX_USERFAULTFD_H /* a later include of the system's header, by whatever route, becomes a no-op */

#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/types.h>

#define UFFD_API ((uint64_t)0xAA)
#define UFFD_USER_MODE_ONLY 1 /* flag of userfaultfd(2), Linux 5.11 */

#define UFFD_FEATURE_PAGEFAULT_FLAG_WP ((uint64_t)1 << 0)
#define UFFD_FEATURE_EVENT_FORK ((uint64_t)1 << 1)
#define UFFD_FEATURE_EVENT_REMAP ((uint64_t)1 << 2)
#define UFFD_FEATURE_EVENT_REMOVE ((uint64_t)1 << 3)
#define UFFD_FEATURE_MISSING_HUGETLBFS ((uint64_t)1 << 4)
#define UFFD_FEATURE_MISSING_SHMEM ((uint64_t)1 << 5)
#define UFFD_FEATURE_EVENT_UNMAP ((uint64_t)1 << 6)
#define UFFD_FEATURE_SIGBUS ((uint64_t)1 << 7)
#define UFFD_FEATURE_THREAD_ID ((uint64_t)1 << 8)
#define UFFD_FEATURE_MINOR_HUGETLBFS ((uint64_t)1 << 9)
#define UFFD_FEATURE_MINOR_SHMEM ((uint64_t)1 << 10)
#define UFFD_FEATURE_EXACT_ADDRESS ((uint64_t)1 << 11)
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM ((uint64_t)1 << 12)
#define UFFD_FEATURE_WP_UNPOPULATED ((uint64_t)1 << 13)
#define UFFD_FEATURE_POISON ((uint64_t)1 << 14)
#define UFFD_FEATURE_WP_ASYNC ((uint64_t)1 << 15)
#define UFFD_FEATURE_MOVE ((uint64_t)1 << 16)
#define UFFD_FEATURE_RWP ((uint64_t)1 << 17)
#define UFFD_FEATURE_RWP_ASYNC ((uint64_t)1 << 18)

#define UFFD_EVENT_PAGEFAULT 0x12
#define UFFD_EVENT_FORK 0x13
#define UFFD_EVENT_REMAP 0x14
#define UFFD_EVENT_REMOVE 0x15
#define UFFD_EVENT_UNMAP 0x16

#define UFFD_PAGEFAULT_FLAG_WRITE ((uint64_t)1 << 0)
#define UFFD_PAGEFAULT_FLAG_WP ((uint64_t)1 << 1)
#define UFFD_PAGEFAULT_FLAG_MINOR ((uint64_t)1 << 2)
#define UFFD_PAGEFAULT_FLAG_RWP ((uint64_t)1 << 3)

/* What read(2) on a userfaultfd returns, one or more of them. */
struct uffd_msg {
    uint8_t event;
    uint8_t reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    union {
        struct {
            uint64_t flags;
            uint64_t address;
            union {
                uint32_t ptid; /* with UFFD_FEATURE_THREAD_ID */
            } feat;
        } pagefault;
        struct {
            uint32_t ufd;
        } fork;
        struct {
            uint64_t from;
            uint64_t to;
            uint64_t len;
        } remap;
        struct {
            uint64_t start;
            uint64_t end;
        } remove; /* and UNMAP */
        struct {
            uint64_t reserved1;
            uint64_t reserved2;
            uint64_t reserved3;
        } reserved;
    } arg;
};

struct uffdio_api {
    uint64_t api;
    uint64_t features;
    uint64_t ioctls;
};

struct uffdio_range {
    uint64_t start;
    uint64_t len;
};

#define UFFDIO_REGISTER_MODE_MISSING ((uint64_t)1 << 0)
#define UFFDIO_REGISTER_MODE_WP ((uint64_t)1 << 1)
#define UFFDIO_REGISTER_MODE_MINOR ((uint64_t)1 << 2)
#define UFFDIO_REGISTER_MODE_RWP ((uint64_t)1 << 3) /* not together with WP: EINVAL */
struct uffdio_register {
    struct uffdio_range range;
    uint64_t mode;
    uint64_t ioctls;
};

#define UFFDIO_COPY_MODE_DONTWAKE ((uint64_t)1 << 0)
#define UFFDIO_COPY_MODE_WP ((uint64_t)1 << 1)
struct uffdio_copy {
    uint64_t dst;
    uint64_t src;
    uint64_t len;
    uint64_t mode;
    int64_t copy; /* written by the kernel: bytes, or a negative errno */
};

#define UFFDIO_ZEROPAGE_MODE_DONTWAKE ((uint64_t)1 << 0)
struct uffdio_zeropage {
    struct uffdio_range range;
    uint64_t mode;
    int64_t zeropage;
};

#define UFFDIO_MOVE_MODE_DONTWAKE ((uint64_t)1 << 0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES ((uint64_t)1 << 1)
struct uffdio_move {
    uint64_t dst;
    uint64_t src;
    uint64_t len;
    uint64_t mode;
    int64_t move;
};

#define UFFDIO_WRITEPROTECT_MODE_WP ((uint64_t)1 << 0)
#define UFFDIO_WRITEPROTECT_MODE_DONTWAKE ((uint64_t)1 << 1)
struct uffdio_writeprotect {
    struct uffdio_range range;
    uint64_t mode;
};

#define UFFDIO_CONTINUE_MODE_DONTWAKE ((uint64_t)1 << 0)
#define UFFDIO_CONTINUE_MODE_WP ((uint64_t)1 << 1)
struct uffdio_continue {
    struct uffdio_range range;
    uint64_t mode;
    int64_t mapped;
};

#define UFFDIO_POISON_MODE_DONTWAKE ((uint64_t)1 << 0)
struct uffdio_poison {
    struct uffdio_range range;
    uint64_t mode;
    int64_t updated;
};

#define UFFDIO_RWPROTECT_MODE_RWP ((uint64_t)1 << 0) /* without it: lift the protection */
#define UFFDIO_RWPROTECT_MODE_DONTWAKE ((uint64_t)1 << 1)
struct uffdio_rwprotect {
    struct uffdio_range range;
    uint64_t mode;
};

#define _UFFDIO_REGISTER 0x00
#define _UFFDIO_UNREGISTER 0x01
#define _UFFDIO_WAKE 0x02
#define _UFFDIO_COPY 0x03
#define _UFFDIO_ZEROPAGE 0x04
#define _UFFDIO_MOVE 0x05
#define _UFFDIO_WRITEPROTECT 0x06
#define _UFFDIO_CONTINUE 0x07
#define _UFFDIO_POISON 0x08
#define _UFFDIO_RWPROTECT 0x09
#define _UFFDIO_API 0x3F

#define UFFDIO 0xAA
#define UFFDIO_API _IOWR(UFFDIO, _UFFDIO_API, struct uffdio_api)
#define UFFDIO_REGISTER _IOWR(UFFDIO, _UFFDIO_REGISTER, struct uffdio_register)
#define UFFDIO_UNREGISTER _IOR(UFFDIO, _UFFDIO_UNREGISTER, struct uffdio_range)
#define UFFDIO_WAKE _IOR(UFFDIO, _UFFDIO_WAKE, struct uffdio_range)
#define UFFDIO_COPY _IOWR(UFFDIO, _UFFDIO_COPY, struct uffdio_copy)
#define UFFDIO_ZEROPAGE _IOWR(UFFDIO, _UFFDIO_ZEROPAGE, struct uffdio_zeropage)
#define UFFDIO_MOVE _IOWR(UFFDIO, _UFFDIO_MOVE, struct uffdio_move)
#define UFFDIO_WRITEPROTECT _IOWR(UFFDIO, _UFFDIO_WRITEPROTECT, struct uffdio_writeprotect)
#define UFFDIO_CONTINUE _IOWR(UFFDIO, _UFFDIO_CONTINUE, struct uffdio_continue)
#define UFFDIO_POISON _IOWR(UFFDIO, _UFFDIO_POISON, struct uffdio_poison)
#define UFFDIO_RWPROTECT _IOWR(UFFDIO, _UFFDIO_RWPROTECT, struct uffdio_rwprotect)

/* ioctl of /dev/userfaultfd; its argument is the flags of userfaultfd(2). Linux 6.1. */
#define USERFAULTFD_IOC_NEW _IO(UFFDIO, 0x00)

_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.address) == 16, "uffd_msg.address");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.feat.ptid) == 24, "uffd_msg.ptid");
_Static_assert(offsetof(struct uffd_msg, arg.remap.len) == 24, "uffd_msg.len");
_Static_assert(sizeof(struct uffdio_api) == 24, "uffdio_api");
_Static_assert(sizeof(struct uffdio_range) == 16, "uffdio_range");
_Static_assert(sizeof(struct uffdio_register) == 32, "uffdio_register");
_Static_assert(sizeof(struct uffdio_copy) == 40, "uffdio_copy");
_Static_assert(sizeof(struct uffdio_zeropage) == 32, "uffdio_zeropage");
_Static_assert(sizeof(struct uffdio_move) == 40, "uffdio_move");
_Static_assert(sizeof(struct uffdio_writeprotect) == 24, "uffdio_writeprotect");
_Static_assert(sizeof(struct uffdio_continue) == 32, "uffdio_continue");
_Static_assert(sizeof(struct uffdio_poison) == 32, "uffdio_poison");
_Static_assert(sizeof(struct uffdio_rwprotect) == 24, "uffdio_rwprotect");

/* _IOC has two layouts: the generic one, and that of powerpc, mips, sparc and alpha, where direction bits differ. */
#if _IOC_SIZEBITS == 14
_Static_assert(UFFDIO_API == 0xC018AA3F, "UFFDIO_API");
_Static_assert(UFFDIO_REGISTER == 0xC020AA00, "UFFDIO_REGISTER");
_Static_assert(UFFDIO_UNREGISTER == 0x8010AA01, "UFFDIO_UNREGISTER");
_Static_assert(UFFDIO_WAKE == 0x8010AA02, "UFFDIO_WAKE");
_Static_assert(UFFDIO_COPY == 0xC028AA03, "UFFDIO_COPY");
_Static_assert(UFFDIO_ZEROPAGE == 0xC020AA04, "UFFDIO_ZEROPAGE");
_Static_assert(UFFDIO_MOVE == 0xC028AA05, "UFFDIO_MOVE");
_Static_assert(UFFDIO_WRITEPROTECT == 0xC018AA06, "UFFDIO_WRITEPROTECT");
_Static_assert(UFFDIO_CONTINUE == 0xC020AA07, "UFFDIO_CONTINUE");
_Static_assert(UFFDIO_POISON == 0xC020AA08, "UFFDIO_POISON");
_Static_assert(UFFDIO_RWPROTECT == 0xC018AA09, "UFFDIO_RWPROTECT");
_Static_assert(USERFAULTFD_IOC_NEW == 0x0000AA00, "USERFAULTFD_IOC_NEW");
#endif

/* uffd.c: as read(2), but it never waits, also where another process has made the userfaultfd that they share a blocking one. (Before Linux
 * 6.10 it does then.) */
ssize_t pc_uffd_read_now(int uffd, void *messages, size_t bytes);

#endif
