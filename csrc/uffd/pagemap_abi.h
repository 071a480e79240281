/* SPDX-License-Identifier: Apache-2.0
 *
 * The ABI of PAGEMAP_SCAN, in the kernel's own names: Linux 6.7, Documentation/admin-guide/mm/pagemap.rst. Not from
 * <linux/fs.h>, for the reason that uffd_abi.h gives.
 */
#ifndef PC_PAGEMAP_ABI_H
#define PC_PAGEMAP_ABI_H

#include <stdint.h>
#include <sys/ioctl.h>

struct page_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};
struct pm_scan_arg {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end; /* written by the kernel: where it stopped */
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};
#ifndef PAGE_IS_PRESENT
#define PAGE_IS_WPALLOWED (1u << 0)
#define PAGE_IS_WRITTEN (1u << 1)
#define PAGE_IS_FILE (1u << 2)
#define PAGE_IS_PRESENT (1u << 3)
#define PAGE_IS_SWAPPED (1u << 4)
#define PAGE_IS_PFNZERO (1u << 5)
#define PAGE_IS_HUGE (1u << 6)
#define PAGE_IS_SOFT_DIRTY (1u << 7)
#define PM_SCAN_WP_MATCHING (1u << 0)
#define PM_SCAN_CHECK_WPASYNC (1u << 1)
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#endif
_Static_assert(sizeof(struct page_region) == 24, "page_region");
_Static_assert(sizeof(struct pm_scan_arg) == 96, "pm_scan_arg");
#if _IOC_SIZEBITS == 14
_Static_assert(PAGEMAP_SCAN == 0xC0606610, "PAGEMAP_SCAN");
#endif

#endif
