/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "pager/pager.h"

int pc_pager_arm_at(struct pc_pager *pager, uint32_t shard, uint32_t block, uint64_t first_page, uint64_t pages, uint64_t address,
                    char *error, size_t error_bytes)
{
    (void)pager, (void)shard, (void)block, (void)first_page, (void)pages, (void)address;
    return pc_fail(ENOSYS, error, error_bytes, "not built yet");
}

int pc_pager_set_local(struct pc_pager *pager, uint32_t block, int fd, uint64_t offset, const uint64_t *words, char *error,
                       size_t error_bytes)
{
    (void)pager, (void)block, (void)fd, (void)offset, (void)words;
    return pc_fail(ENOSYS, error, error_bytes, "not built yet");
}

int pc_pager_stage(struct pc_pager *pager, uint32_t block, int fd)
{
    (void)pager, (void)block, (void)fd;
    return -ENOSYS;
}

int pc_pager_set_readers(struct pc_pager *pager, uint32_t demand, uint32_t background)
{
    (void)pager, (void)demand, (void)background;
    return -ENOSYS;
}

int pc_pager_prefetch_all(struct pc_pager *pager)
{
    (void)pager;
    return -ENOSYS;
}

int pc_pager_prefetch_runs(struct pc_pager *pager, const struct pc_page_run *runs, uint64_t count)
{
    (void)pager, (void)runs, (void)count;
    return -ENOSYS;
}

int pc_pager_prefetch_stop(struct pc_pager *pager)
{
    (void)pager;
    return -ENOSYS;
}

int pc_pager_prefetching(struct pc_pager *pager)
{
    (void)pager;
    return -ENOSYS;
}

int pc_touches_new(uint64_t pages)
{
    (void)pages;
    return -ENOSYS;
}

int pc_pager_record_touches(struct pc_pager *pager, int fd)
{
    (void)pager, (void)fd;
    return -ENOSYS;
}

int64_t pc_touches_read(int fd, uint64_t *touches, uint64_t capacity)
{
    (void)fd, (void)touches, (void)capacity;
    return -ENOSYS;
}

int pc_pager_leave(struct pc_pager *pager)
{
    (void)pager;
    return -ENOSYS;
}
