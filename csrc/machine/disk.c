/* SPDX-License-Identifier: Apache-2.0
 *
 * The block device: O_DIRECT transfers between a backing file and guest memory, in the thread of the vCPU that asked.
 *
 * The kernel pins the guest's pages (get_user_pages) and the block layer moves the data. Where a page is missing that
 * pin faults into userfaultfd and waits, killably but ignoring other signals, so a vCPU in a transfer can only be paused
 * once its pages have come. Nothing here touches guest memory by itself.
 *
 * What a transfer writes to pinned pages no page table shows: the pin has them in a dirty log as written, once, and the data may come
 * after the log was read. So a read marks them, after it, whatever became of it.
 *
 * Every argument comes from the guest and may be hostile: a request is checked whole before any of it is done.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "machine/machine.h"

#define SECTOR_BYTES 512u

int pc_disk_open(const char *path, uint64_t bytes, char *error, size_t error_bytes)
{
    struct stat st;
    int fd, rc;

    if (bytes > INT64_MAX)
        return pc_fail(EFBIG, error, error_bytes, "%s: a disk of that size is impossible", path);
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600);
    if (fd < 0) {
        rc = -errno;
        if (rc == -EINVAL)
            return pc_fail(-rc, error, error_bytes, "%s: its file system refuses O_DIRECT; put the disk on ext4, xfs or "
                           "btrfs", path);
        return pc_fail(-rc, error, error_bytes, "%s: cannot open the disk: %s", path, strerror(-rc));
    }
    if (fstat(fd, &st)) {
        rc = -errno;
    } else if (!S_ISREG(st.st_mode)) {
        close(fd);
        return pc_fail(EINVAL, error, error_bytes, "%s: the disk must be a regular file", path);
    } else if ((uint64_t)st.st_size < bytes && ftruncate(fd, (off_t)bytes)) {
        rc = -errno;
    } else {
        return fd;
    }
    close(fd);
    return pc_fail(-rc, error, error_bytes, "%s: cannot make the disk %llu bytes long: %s", path, (unsigned long long)bytes,
                   strerror(-rc));
}

int pc_disk_geometry(struct pc_machine *machine, char *error, size_t error_bytes)
{
    const struct pc_machine_config *config = &machine->config;
    struct stat st;
    int flags;

    machine->disk_memory_align = machine->disk_offset_align = SECTOR_BYTES;
    if (config->disk_fd < 0) {
        if (config->workload == PC_WORKLOAD_DISK)
            return pc_fail(EINVAL, error, error_bytes, "the disk workload needs a disk");
        return 0;
    }
    flags = fcntl(config->disk_fd, F_GETFL);
    if (flags < 0 || fstat(config->disk_fd, &st))
        return pc_fail(errno, error, error_bytes, "the disk cannot be used: %s", strerror(errno));
    if (!(flags & O_DIRECT) || (flags & O_ACCMODE) != O_RDWR)
        return pc_fail(EINVAL, error, error_bytes, "the disk must be open for reading and writing, O_DIRECT");
    if ((uint64_t)st.st_size < config->disk_bytes)
        return pc_fail(EINVAL, error, error_bytes, "the disk is %llu bytes long, the machine wants %llu",
                       (unsigned long long)st.st_size, (unsigned long long)config->disk_bytes);
    if (config->workload == PC_WORKLOAD_DISK && machine->layout.disk_slice_bytes < 4 * PCG_SLOT_BYTES)
        return pc_fail(EINVAL, error, error_bytes, "the disk is too small: each vCPU needs %d bytes", 4 * PCG_SLOT_BYTES);
#ifdef STATX_DIOALIGN
    struct statx stx;
    if (statx(config->disk_fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 && (stx.stx_mask & STATX_DIOALIGN)) {
        if (stx.stx_dio_mem_align == 0 || stx.stx_dio_offset_align == 0)
            return pc_fail(ENOTSUP, error, error_bytes, "the disk's file system refuses O_DIRECT");
        machine->disk_memory_align = stx.stx_dio_mem_align;
        machine->disk_offset_align = stx.stx_dio_offset_align;
    }
#endif
    if (machine->disk_memory_align > PCG_PAGE_BYTES || machine->disk_offset_align > PCG_SLOT_BYTES)
        return pc_fail(ENOTSUP, error, error_bytes, "the disk wants O_DIRECT in blocks of %llu bytes: too coarse",
                       (unsigned long long)machine->disk_offset_align);
    /* Odd multiple of a sector: requests then cross pages and begin where no page does. */
    machine->disk_skew = machine->disk_memory_align <= SECTOR_BYTES ? 3 * SECTOR_BYTES : 0;
    return 0;
}

int pc_machine_set_dirty_log(struct pc_machine *machine, struct pc_dirty_log *log)
{
    pthread_mutex_lock(&machine->dirty_lock);
    machine->dirty_log = log;
    pthread_mutex_unlock(&machine->dirty_lock);
    return 0;
}

/* From the disk to guest memory. 0 or -errno. */
static int read_disk(struct pc_machine *machine, uint8_t *memory, uint64_t bytes, uint64_t offset)
{
    int error = pc_pread_all(machine->config.disk_fd, memory, bytes, offset);

    pthread_mutex_lock(&machine->dirty_lock);
    if (machine->dirty_log)
        pc_dirty_log_mark(machine->dirty_log, (uint64_t)(uintptr_t)memory, bytes);
    pthread_mutex_unlock(&machine->dirty_lock);
    return error;
}

uint32_t pc_disk_request(struct pc_vcpu *vcpu, uint32_t op, uint64_t slice_offset, uint64_t gpa, uint64_t bytes)
{
    struct pc_machine *machine = vcpu->machine;
    uint64_t slice_bytes = machine->layout.disk_slice_bytes;
    uint8_t *memory = pc_layout_gpa(&machine->layout, gpa, bytes);
    int fd = machine->config.disk_fd;
    uint64_t offset;

    if (fd < 0 || (op != PCG_DISK_READ && op != PCG_DISK_WRITE) || !memory || bytes == 0 ||
        bytes > PCG_DISK_REQUEST_MAX || slice_offset >= slice_bytes || bytes > slice_bytes - slice_offset ||
        (slice_offset | bytes) % machine->disk_offset_align || gpa % machine->disk_memory_align) {
        atomic_fetch_add(&machine->disk_errors, 1);
        return PCG_DISK_BAD_REQUEST;
    }
    offset = vcpu->index * slice_bytes + slice_offset;
    if (op == PCG_DISK_WRITE ? pc_pwrite_all(fd, memory, bytes, offset) : read_disk(machine, memory, bytes, offset)) {
        atomic_fetch_add(&machine->disk_errors, 1);
        return PCG_DISK_IO_ERROR;
    }
    atomic_fetch_add(op == PCG_DISK_WRITE ? &machine->disk_writes : &machine->disk_reads, 1);
    atomic_fetch_add(&machine->disk_bytes, bytes);
    return PCG_DISK_OK;
}

int pc_disk_inspect(const struct pc_machine *machine, uint32_t vcpu, uint64_t slice_offset, void *into, uint64_t bytes)
{
    uint64_t slice_bytes = machine->layout.disk_slice_bytes;

    if (machine->config.disk_fd < 0 || slice_offset >= slice_bytes || bytes > slice_bytes - slice_offset)
        return -EINVAL;
    return pc_pread_all(machine->config.disk_fd, into, bytes, vcpu * slice_bytes + slice_offset);
}
