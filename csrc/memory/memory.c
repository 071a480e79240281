/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory of machines: made, mapped, given back.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory/internal.h"
#include "memory/states.h"

/* Newer than the C library's headers in use. */
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U /* Linux 6.3 */
#endif

/* A memfd that stays as large as it is: every process that maps it may rely on not getting SIGBUS, whoever else holds it. */
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

/* No transparent huge pages: one page written would install 512, of which 511 have no content yet. And a forked child must not share,
 * nor copy on write, what a userfaultfd of its parent fills. */
static int advise(const struct pc_memory *memory)
{
    if (memory->kind != PC_MEMORY_HUGETLB && madvise(memory->base, memory->size_bytes, MADV_NOHUGEPAGE) && errno != EINVAL)
        return -errno; /* EINVAL: this kernel has none */
    return madvise(memory->base, memory->size_bytes, MADV_DONTFORK) ? -errno : 0;
}

int pc_memory_create(int kind, uint64_t size_bytes, struct pc_memory *memory, char *error, size_t error_bytes)
{
    int protection = PROT_READ | PROT_WRITE, code;
    char size[32];
    int result = pc_memory_check(kind, size_bytes, error, error_bytes);

    *memory = (struct pc_memory){.size_bytes = size_bytes, .kind = kind, .fd = -1};
    if (result)
        return result;
    memory->page_bytes = kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
    if (kind == PC_MEMORY_ANON) {
        /* NORESERVE: the size was checked against what is there; the kernel's guess would refuse sparse machines. */
        memory->base = mmap(NULL, size_bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    } else {
        memory->fd = pc_memfd_new("postcopy", size_bytes, kind == PC_MEMORY_HUGETLB ? MFD_HUGETLB : 0);
        if (memory->fd < 0) {
            code = -memory->fd;
            memory->fd = -1;
            return pc_fail(code, error, error_bytes, "memory: cannot make a memfd of %s: %s",
                           pc_human(size_bytes, size, sizeof(size)), strerror(code));
        }
        /* For huge pages this reserves them all: if somebody took them since the check, it fails here and not with
         * SIGBUS in the middle of a machine's run. */
        memory->base = mmap(NULL, size_bytes, protection, MAP_SHARED, memory->fd, 0);
    }
    if (memory->base == MAP_FAILED) {
        code = errno;
        memory->base = NULL;
        pc_memory_destroy(memory);
        if (kind == PC_MEMORY_HUGETLB && code == ENOMEM)
            return pc_fail(code, error, error_bytes,
                           "hugetlb: cannot reserve %" PRIu64 " huge pages; remedy: a larger sysctl vm.nr_hugepages",
                           size_bytes / pc_huge_page_bytes());
        return pc_fail(code, error, error_bytes, "memory: cannot map %s: %s", pc_human(size_bytes, size, sizeof(size)),
                       strerror(code));
    }
    code = -advise(memory);
    if (!code)
        return 0;
    pc_memory_destroy(memory);
    return pc_fail(code, error, error_bytes, "memory: madvise: %s", strerror(code));
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
    int error;

    *memory = (struct pc_memory){.size_bytes = size_bytes, .page_bytes = page_bytes, .kind = kind};
    memory->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (memory->fd < 0)
        return -errno;
    memory->base = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory->fd, 0);
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

int pc_memory_discard(const struct pc_memory *memory, uint64_t address, uint64_t bytes)
{
    uint64_t offset = address - (uint64_t)(uintptr_t)memory->base;
    int result = memory->fd < 0
                     ? madvise((void *)(uintptr_t)address, bytes, MADV_DONTNEED)
                     : fallocate(memory->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes);

    return result ? -errno : 0;
}

void pc_bytes_copy(uint64_t to_address, uint64_t from_address, uint64_t bytes)
{
    memcpy((void *)(uintptr_t)to_address, (const void *)(uintptr_t)from_address, bytes);
}
