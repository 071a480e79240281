/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory of machines: made, mapped, given back.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/runtime.h"
#include "memory/internal.h"
#include "memory/states.h"

/* Newer than the C library's headers in use. */
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U /* Linux 6.3 */
#endif

/* A memfd that stays as large as it is: every process that maps it may rely on not getting SIGBUS, whatever other process has it. */
int pc_memfd_new(const char *name, uint64_t size_bytes, unsigned int flags)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_NOEXEC_SEAL | flags);
    int error;

    if (fd < 0 && errno == EINVAL) /* before 6.3 */
        fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | flags);
    if (fd < 0)
        return -errno;
    if (!ftruncate(fd, (off_t)size_bytes) && !fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return fd;
    error = errno;
    close(fd);
    return -error;
}

int pc_memfd_map(int fd, uint64_t bytes, void **base)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW;
    struct stat status;

    /* Sealed, or another process that has it could take the memory away under a fault thread. */
    if (fstat(fd, &status) || (uint64_t)status.st_size != bytes || (fcntl(fd, F_GET_SEALS) & seals) != seals)
        return -EINVAL;
    *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (*base == MAP_FAILED)
        return -errno;
    (void)madvise(*base, bytes, MADV_DONTFORK);
    return 0;
}

int pc_memfd_new_of(const char *name, uint64_t size_bytes, struct pc_memfd_head head)
{
    int fd = pc_memfd_new(name, size_bytes, 0);
    int error = fd < 0 ? fd : pc_pwrite_all(fd, &head, sizeof(head), 0);

    if (error && fd >= 0)
        close(fd);
    return error ? error : fd;
}

int pc_memfd_count(int fd, uint64_t magic, uint64_t *count)
{
    struct pc_memfd_head head;
    int error = pc_pread_all(fd, &head, sizeof(head), 0);

    if (error)
        return error == -ENODATA ? -EINVAL : error;
    *count = head.count;
    return head.magic == magic ? 0 : -EINVAL;
}

/* No transparent huge pages: one page written would install 512, of which 511 have no content yet. And a forked child must not share,
 * nor copy on write, what a userfaultfd of its parent fills. */
static int advise(const struct pc_memory *memory)
{
    if (memory->kind != PC_MEMORY_HUGETLB && madvise(memory->base, memory->size_bytes, MADV_NOHUGEPAGE) && errno != EINVAL)
        return -errno; /* EINVAL: this kernel has none */
    return madvise(memory->base, memory->size_bytes, MADV_DONTFORK) ? -errno : 0;
}

/* Maps memory->fd, or anonymous memory where there is none. After an error nothing is left of either. */
static int map(struct pc_memory *memory)
{
    /* NORESERVE: the size was checked against what is there; the kernel's guess would refuse sparse machines. */
    int flags = memory->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED, error;

    memory->base = mmap(NULL, memory->size_bytes, PROT_READ | PROT_WRITE, flags, memory->fd, 0);
    if (memory->base == MAP_FAILED) {
        error = -errno;
        memory->base = NULL;
    } else {
        error = advise(memory);
    }
    if (error)
        pc_memory_destroy(memory);
    return error;
}

int pc_memory_create(int kind, uint64_t size_bytes, struct pc_memory *memory, char *error, size_t error_bytes)
{
    char size[32];
    int result = pc_memory_check(kind, size_bytes, error, error_bytes);

    *memory = (struct pc_memory){.size_bytes = size_bytes, .kind = kind, .fd = -1};
    if (result)
        return result;
    memory->page_bytes = kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
    if (kind != PC_MEMORY_ANON) {
        result = pc_memfd_new("postcopy", size_bytes, kind == PC_MEMORY_HUGETLB ? MFD_HUGETLB : 0);
        if (result < 0)
            return pc_fail(-result, error, error_bytes, "memory: cannot make a memfd of %s: %s",
                           pc_human(size_bytes, size, sizeof(size)), strerror(-result));
        memory->fd = result;
    }
    /* For huge pages this reserves them all: if others took them since the check, it fails here and not with SIGBUS in the middle
     * of a machine's run. */
    result = map(memory);
    if (result == -ENOMEM && kind == PC_MEMORY_HUGETLB)
        return pc_fail(ENOMEM, error, error_bytes,
                       "hugetlb: cannot reserve %" PRIu64 " huge pages; remedy: a larger sysctl vm.nr_hugepages",
                       size_bytes / memory->page_bytes);
    return result ? pc_fail(-result, error, error_bytes, "memory: cannot map %s: %s", pc_human(size_bytes, size, sizeof(size)),
                            strerror(-result))
                  : 0;
}

void pc_memory_destroy(struct pc_memory *memory)
{
    if (memory->base)
        (void)munmap(memory->base, memory->size_bytes);
    if (memory->fd >= 0)
        close(memory->fd);
    memory->base = NULL;
    memory->fd = -1;
}

int pc_memory_map(int fd, uint64_t size_bytes, uint64_t page_bytes, int kind, struct pc_memory *memory)
{
    *memory = (struct pc_memory){.size_bytes = size_bytes, .page_bytes = page_bytes, .kind = kind};
    memory->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return memory->fd < 0 ? -errno : map(memory);
}

int pc_memory_discard(const struct pc_memory *memory, uint64_t address, uint64_t bytes)
{
    uint64_t offset = address - (uint64_t)(uintptr_t)memory->base;
    int result = memory->fd < 0
                     ? madvise((void *)(uintptr_t)address, bytes, MADV_DONTNEED)
                     : fallocate(memory->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes);

    return result ? -errno : 0;
}

int pc_memory_discard_pages(const struct pc_memory *memory, const uint64_t *words)
{
    uint64_t pages = memory->size_bytes / memory->page_bytes, base = (uint64_t)(uintptr_t)memory->base, end;
    int error = 0;

    for (uint64_t page = 0; !error && (page = pc_bitmap_next(words, pages, page, 1)) < pages; page = end) {
        uint64_t first = page * memory->page_bytes;

        end = pc_bitmap_next(words, pages, page, 0);
        if (memory->kind == PC_MEMORY_MEMFD) { /* punching a hole where there is one costs six times as much as to ask */
            off_t data = lseek(memory->fd, (off_t)first, SEEK_DATA);

            if (data < 0 && errno == ENXIO)
                return 0;
            if (data >= 0 && (uint64_t)data / memory->page_bytes >= end) {
                end = (uint64_t)data / memory->page_bytes;
                continue;
            }
        }
        error = pc_memory_discard(memory, base + first, (end - page) * memory->page_bytes);
    }
    return error;
}

void pc_bytes_copy(uint64_t to_address, uint64_t from_address, uint64_t bytes)
{
    memcpy((void *)(uintptr_t)to_address, (const void *)(uintptr_t)from_address, bytes);
}
