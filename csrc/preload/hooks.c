/* SPDX-License-Identifier: Apache-2.0
 *
 * The names under which the program finds the library: those of the C library. (Not in preload.c, so that a test links with it.)
 */
#include <stdarg.h>
#include <sys/mman.h>

#include "preload/preload.h"

#define EXPORTED __attribute__((visibility("default")))

EXPORTED void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    return preload_mmap(address, bytes, protection, flags, fd, offset);
}

EXPORTED void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off64_t offset)
{
    return preload_mmap(address, bytes, protection, flags, fd, offset);
}

EXPORTED int munmap(void *address, size_t bytes)
{
    return preload_munmap(address, bytes);
}

EXPORTED void *mremap(void *address, size_t bytes, size_t new_bytes, int flags, ...)
{
    void *new_address = NULL;
    va_list arguments;

    if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) { /* else there is no fifth argument */
        va_start(arguments, flags);
        new_address = va_arg(arguments, void *);
        va_end(arguments);
    }
    return preload_mremap(address, bytes, new_bytes, flags, new_address);
}

__attribute__((constructor)) static void begin(void)
{
    preload_begin();
}

__attribute__((destructor)) static void end(void)
{
    preload_end();
}
