/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory of another process, read from outside.
 *
 * By process_vm_readv(2): it waits for a page that a userfaultfd of that process guards, as the process itself would, where
 * /proc/PID/mem says EIO. It goes by number, and numbers are given again: so the pidfd is looked at after each read. Is the process
 * alive then, it was the one that was read. What is there is told by its page tables, by a descriptor that stays that process's.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "memory/internal.h"

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

/* Whole pages, in the order of the memory and without a gap, apart from each other there. */
static bool make_up_memory(const struct pc_remote_extent *extents, uint32_t count, uint64_t page_bytes)
{
    uint64_t next = 0;

    for (uint32_t i = 0; i < count; i++) {
        const struct pc_remote_extent *extent = &extents[i];

        if (extent->first_byte != next || !extent->bytes || !extent->address || extent->bytes > INT64_MAX - next ||
            extent->address > INT64_MAX - extent->bytes || (extent->address | extent->bytes) % page_bytes)
            return false;
        for (uint32_t j = 0; j < i; j++)
            if (extents[j].address < extent->address + extent->bytes && extent->address < extents[j].address + extents[j].bytes)
                return false;
        next += extent->bytes;
    }
    return count;
}

bool pc_remote_has_ended(const struct pc_remote *remote)
{
    struct pollfd pidfd = {.fd = remote->pidfd, .events = POLLIN};

    return poll(&pidfd, 1, 0) == 1;
}

int pc_remote_new(int pid, int pidfd, const struct pc_remote_extent *extents, uint32_t count, uint64_t page_bytes,
                  struct pc_remote **out, char *error, size_t error_bytes)
{
    struct pc_remote *remote;
    char path[64];
    int code;

    if (pid <= 0 || count > PC_REMOTE_EXTENTS || !page_bytes || page_bytes % pc_page_bytes() ||
        !make_up_memory(extents, count, page_bytes))
        return pc_fail(EINVAL, error, error_bytes, "memory of process %d: the extents make up no memory", pid);
    remote = calloc(1, sizeof(*remote));
    if (!remote)
        return pc_fail(ENOMEM, error, error_bytes, "memory of process %d: no memory for its description", pid);
    remote->pid = pid;
    remote->count = count;
    remote->page_bytes = page_bytes;
    memcpy(remote->extents, extents, count * sizeof(*extents));
    remote->size_bytes = extents[count - 1].first_byte + extents[count - 1].bytes;
    (void)snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
    remote->pagemap = open(path, O_RDONLY | O_CLOEXEC);
    code = errno;
    remote->pidfd = remote->pagemap < 0 ? -1 : fcntl(pidfd, F_DUPFD_CLOEXEC, 0);
    if (remote->pagemap >= 0 && remote->pidfd < 0)
        code = errno;
    if (remote->pidfd >= 0) { /* it must be alive after the file by its number was opened, and the right to read be there */
        int right = pc_remote_descriptor(remote->pidfd, 0);

        if (right >= 0)
            close(right);
        code = pc_remote_has_ended(remote) ? ESRCH : right == -EPERM ? EPERM : 0;
        if (!code) {
            *out = remote;
            return 0;
        }
    }
    pc_remote_free(remote);
    return pc_fail(code, error, error_bytes, "memory of process %d: %s", pid,
                   code == ESRCH || code == ENOENT ? "the process has ended"
                   : code == EPERM || code == EACCES ? "this user may not look at its memory"
                                                     : strerror(code));
}

void pc_remote_free(struct pc_remote *remote)
{
    if (remote->pagemap >= 0)
        close(remote->pagemap);
    if (remote->pidfd >= 0)
        close(remote->pidfd);
    free(remote);
}

void pc_remote_set_incomplete(struct pc_remote *remote, int incomplete)
{
    remote->incomplete = incomplete;
}

int pc_remote_descriptor(int pidfd, int fd)
{
    int got = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);

    return got < 0 ? -errno : got;
}

uint64_t pc_remote_part(const struct pc_remote *remote, uint64_t first_byte, uint64_t bytes, uint64_t *address)
{
    const struct pc_remote_extent *extent = remote->extents;

    while (first_byte - extent->first_byte >= extent->bytes)
        extent++;
    *address = extent->address + (first_byte - extent->first_byte);
    return pc_least(bytes, extent->first_byte + extent->bytes - first_byte);
}

int pc_remote_read(const struct pc_remote *remote, uint64_t first_byte, void *buffer, uint64_t bytes)
{
    uint8_t *to = buffer;

    if (first_byte > remote->size_bytes || bytes > remote->size_bytes - first_byte)
        return -EINVAL;
    while (bytes) {
        uint64_t address, part = pc_remote_part(remote, first_byte, bytes, &address);
        struct iovec local = {.iov_base = to, .iov_len = part}, there = {.iov_base = (void *)(uintptr_t)address, .iov_len = part};
        ssize_t got = process_vm_readv(remote->pid, &local, 1, &there, 1, 0);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return pc_remote_has_ended(remote) ? -ESRCH : got ? -errno : -EFAULT;
        to += got;
        first_byte += (uint64_t)got;
        bytes -= (uint64_t)got;
    }
    return pc_remote_has_ended(remote) ? -ESRCH : 0;
}

int pc_remote_present(const struct pc_remote *remote, uint64_t *words)
{
    uint64_t first = 0, bytes, address;
    int result = 0;

    if (remote->incomplete)
        pc_bitmap_set_range(words, 0, remote->size_bytes / remote->page_bytes);
    for (; !result && (bytes = pc_unknown_bytes(remote->size_bytes, remote->page_bytes, words, &first, PC_MAPPED_BETWEEN));
         first += bytes) {
        bytes = pc_remote_part(remote, first, bytes, &address);
        result = pc_mapping_present(remote->pagemap, address - first, address, bytes, remote->page_bytes, words);
    }
    return result;
}
