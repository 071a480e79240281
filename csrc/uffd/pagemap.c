/* SPDX-License-Identifier: Apache-2.0
 *
 * PAGEMAP_SCAN: which pages of an address range are there, written to, huge ... and, in the same step, write-protection of
 * those that match. This process or another one, by its /proc/PID/pagemap.
 */
#include <errno.h>
#include <stddef.h>
#include <sys/ioctl.h>

#include "postcopy/uffd.h"
#include "uffd/pagemap_abi.h"

/* The caller's array goes to the kernel as it is. */
_Static_assert(sizeof(struct pc_pagemap_region) == sizeof(struct page_region), "pc_pagemap_region");
_Static_assert(offsetof(struct pc_pagemap_region, categories) == offsetof(struct page_region, categories), "categories");
_Static_assert((unsigned int)PC_PAGE_SOFT_DIRTY == PAGE_IS_SOFT_DIRTY, "PC_PAGE_SOFT_DIRTY");
_Static_assert((unsigned int)PC_SCAN_CHECK_WPASYNC == PM_SCAN_CHECK_WPASYNC, "PC_SCAN_CHECK_WPASYNC");

int64_t pc_pagemap_scan(int pagemap_fd, const struct pc_pagemap_query *query, struct pc_pagemap_region *regions,
                        uint32_t capacity, uint64_t *walk_end)
{
    struct pm_scan_arg argument = {
        .size = sizeof(argument),
        .flags = query->flags,
        .start = query->start,
        .end = query->end,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = capacity,
        .max_pages = query->max_pages,
        .category_inverted = query->inverted,
        .category_mask = query->all_of,
        .category_anyof_mask = query->any_of,
        .return_mask = query->returned,
    };
    int result = ioctl(pagemap_fd, PAGEMAP_SCAN, &argument);

    if (walk_end)
        *walk_end = result < 0 ? query->start : argument.walk_end;
    return result < 0 ? -errno : result;
}
