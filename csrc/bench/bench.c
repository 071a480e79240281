/* SPDX-License-Identifier: Apache-2.0
 *
 * What `postcopy bench` measures with: a thread that touches pages and times it, and the floor, the least a program can
 * do to serve a fault from another host. Nothing of the engine is used here.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/clock.h"
#include "core/util.h"
#include "postcopy/bench.h"
#include "uffd/uffd_abi.h"

#define MAX_FLOOR_PAGE_BYTES 65536
#define WAITER_STACK_BYTES   65536

static uint64_t mix(uint64_t value)
{
    value ^= value >> 31;
    value *= UINT64_C(0x7fb5d329728ea185);
    value ^= value >> 27;
    value *= UINT64_C(0x81dadef4bc2dd44d);
    return value ^ value >> 33;
}

int64_t pc_bench_touch(const void *base, uint64_t page_bytes, uint64_t pages, uint64_t count, uint64_t seed,
                       uint64_t hit_ns, struct pc_histogram *faults)
{
    uint64_t span = 1, index = 0, touched = 0;
    int64_t missed = 0;

    if (!pages || count > pages)
        return -EINVAL;
    while (span < pages)
        span *= 2;
    /* A full-period generator modulo a power of two visits each page once; mixing its steps would not, so the scatter
     * comes from an odd multiplier and increment far from the page size's neighbours. */
    index = mix(seed) & (span - 1);
    while (touched < count) {
        index = (index * UINT64_C(0xd1342543de82ef95) + (mix(seed + 1) | 1)) & (span - 1);
        if (index < pages) {
            const volatile uint8_t *byte = (const volatile uint8_t *)base + index * page_bytes;
            uint64_t before_ns = pc_now_ns(), took_ns;

            (void)*byte;
            took_ns = pc_now_ns() - before_ns;
            touched++;
            if (took_ns >= hit_ns) {
                pc_histogram_add(faults, took_ns);
                missed++;
            }
        }
    }
    return missed;
}

static void *touch_one(void *page)
{
    (void)*(const volatile uint8_t *)page;
    return NULL;
}

int pc_bench_wait(void *base, uint64_t page_bytes, uint64_t pages)
{
    pthread_attr_t attributes;
    int error = pthread_attr_init(&attributes);

    if (error)
        return -error;
    (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    (void)pthread_attr_setstacksize(&attributes, WAITER_STACK_BYTES);
    for (uint64_t i = 0; !error && i < pages; i++) {
        pthread_t thread;

        error = pthread_create(&thread, &attributes, touch_one, (uint8_t *)base + i * page_bytes);
    }
    (void)pthread_attr_destroy(&attributes);
    return -error;
}

void pc_bench_fill(void *base, uint64_t bytes, uint64_t seed)
{
    uint64_t *words = base, state = mix(seed) | 1;

    for (uint64_t i = 0; i < bytes / sizeof(*words); i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words[i] = state;
    }
}

/* recv of exactly `bytes`; 0, or -errno (-ENODATA at the end of the stream). */
static int receive_exactly(int fd, void *buffer, size_t bytes, bool spin)
{
    size_t have = 0;

    while (have < bytes) {
        ssize_t got = recv(fd, (uint8_t *)buffer + have, bytes - have, spin ? MSG_DONTWAIT : 0);

        if (got > 0)
            have += (size_t)got;
        else if (got == 0)
            return -ENODATA;
        else if (errno != EINTR && !(spin && errno == EAGAIN))
            return -errno;
    }
    return 0;
}

static int send_exactly(int fd, const void *buffer, size_t bytes)
{
    size_t done = 0;

    while (done < bytes) {
        ssize_t sent = send(fd, (const uint8_t *)buffer + done, bytes - done, MSG_NOSIGNAL);

        if (sent > 0)
            done += (size_t)sent;
        else if (errno != EINTR)
            return -errno;
    }
    return 0;
}

int pc_bench_floor_serve(int fd, const void *base, uint64_t page_bytes, uint64_t pages, int spin)
{
    for (;;) {
        uint64_t page;
        int error = receive_exactly(fd, &page, sizeof(page), spin);

        if (!error && page >= pages)
            error = -EBADMSG;
        if (!error)
            error = send_exactly(fd, (const uint8_t *)base + page * page_bytes, page_bytes);
        if (error)
            return error == -ENODATA ? 0 : error;
    }
}

int pc_bench_floor_fault(int uffd, int fd, void *base, uint64_t page_bytes, uint64_t count, int spin)
{
    int flags = fcntl(uffd, F_GETFL);
    uint8_t content[MAX_FLOOR_PAGE_BYTES];

    if (page_bytes > sizeof(content))
        return -EINVAL;
    /* Sleeping: a read that blocks is one system call less than a poll before it. */
    if (flags < 0 || fcntl(uffd, F_SETFL, spin ? flags | O_NONBLOCK : flags & ~O_NONBLOCK))
        return -errno;
    for (uint64_t i = 0; i < count; i++) {
        struct uffd_msg event;
        struct uffdio_copy copy;
        uint64_t page;
        ssize_t got;
        int error;

        do
            got = read(uffd, &event, sizeof(event));
        while (got < 0 && (errno == EINTR || (spin && errno == EAGAIN)));
        if (got != sizeof(event))
            return got < 0 ? -errno : -EIO;
        page = (event.arg.pagefault.address - (uint64_t)(uintptr_t)base) / page_bytes;
        error = send_exactly(fd, &page, sizeof(page));
        if (!error)
            error = receive_exactly(fd, content, page_bytes, spin);
        if (error)
            return error;
        copy = (struct uffdio_copy){.dst = (uint64_t)(uintptr_t)base + page * page_bytes,
                                    .src = (uint64_t)(uintptr_t)content,
                                    .len = page_bytes};
        if (ioctl(uffd, UFFDIO_COPY, &copy))
            return -errno;
    }
    return 0;
}

int pc_bench_uffd_serve(int uffd, const void *page, uint64_t page_bytes, uint64_t count)
{
    struct pollfd waiting = {.fd = uffd, .events = POLLIN};

    while (count) {
        struct uffd_msg event;
        struct uffdio_copy copy = {.src = (uint64_t)(uintptr_t)page, .len = page_bytes};

        if (poll(&waiting, 1, -1) < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (read(uffd, &event, sizeof(event)) != sizeof(event)) {
            if (errno == EAGAIN || errno == EINTR)
                continue;
            return -errno;
        }
        copy.dst = event.arg.pagefault.address & ~(page_bytes - 1);
        if (ioctl(uffd, UFFDIO_COPY, &copy))
            return -errno;
        count--;
    }
    return 0;
}
