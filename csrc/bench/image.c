/* SPDX-License-Identifier: Apache-2.0
 *
 * Floors for a VMM whose memory comes from an image file: what the smallest handler does, what the example of
 * Firecracker's documentation does, and how fast UFFDIO_COPY can place a whole image. Nothing of the engine is used.
 */
#include <errno.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/util.h"
#include "postcopy/bench.h"
#include "uffd/uffd_abi.h"

#define PAGE_BYTES UINT64_C(4096)

static int copy_page(int uffd, const uint8_t *image, uint64_t image_bytes, const struct pc_bench_region *regions,
                     unsigned count, uint64_t address)
{
    struct uffdio_copy copy = {.dst = address & ~(PAGE_BYTES - 1), .len = PAGE_BYTES};

    for (unsigned i = 0; i < count; i++) {
        uint64_t offset = regions[i].offset + (copy.dst - regions[i].address);

        if (copy.dst < regions[i].address || copy.dst - regions[i].address >= regions[i].bytes || offset >= image_bytes)
            continue;
        copy.src = (uint64_t)(uintptr_t)(image + offset);
        /* EEXIST: two vCPUs on one page. */
        return ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST ? -errno : 0;
    }
    return -EFAULT;
}

int pc_bench_image_serve(int uffd, int connection, int image_fd, uint64_t image_bytes,
                         const struct pc_bench_region *regions, unsigned count, int example)
{
    struct pollfd waiting[] = {{.fd = uffd, .events = POLLIN}, {.fd = connection, .events = POLLIN}};
    uint8_t *image = mmap(NULL, image_bytes, PROT_READ, MAP_PRIVATE, image_fd, 0);
    int error = image == MAP_FAILED ? -errno : 0;

    while (!error && !waiting[1].revents) {
        struct uffd_msg event;
        ssize_t got;

        if (poll(waiting, 2, -1) < 0) {
            error = errno == EINTR ? 0 : -errno;
            continue;
        }
        if (!waiting[0].revents)
            continue;
        /* The example reads until there is no event, and so once more than there are. */
        do {
            got = read(uffd, &event, sizeof(event));
            if (got < 0 && errno != EAGAIN && errno != EINTR)
                error = -errno;
            if (got == sizeof(event) && event.event == UFFD_EVENT_PAGEFAULT)
                error = copy_page(uffd, image, image_bytes, regions, count, event.arg.pagefault.address);
        } while (!error && example && got > 0);
    }
    if (image != MAP_FAILED)
        munmap(image, image_bytes);
    return error == -ESRCH ? 0 : error; /* the VMM has ended before its connection did */
}

int pc_bench_image_place(int uffd, int image_fd, uint64_t offset, uint64_t address, uint64_t bytes, uint64_t run_bytes)
{
    uint8_t *image = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE | MAP_POPULATE, image_fd, (off_t)offset);
    int error = image == MAP_FAILED ? -errno : 0;

    for (uint64_t done = 0; !error && done < bytes;) {
        struct uffdio_copy copy = {.dst = address + done,
                                   .src = (uint64_t)(uintptr_t)(image + done),
                                   .len = bytes - done < run_bytes ? bytes - done : run_bytes};

        if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EAGAIN)
            error = -errno;
        done += copy.copy > 0 ? (uint64_t)copy.copy : 0;
    }
    if (image != MAP_FAILED)
        munmap(image, bytes);
    return error;
}
