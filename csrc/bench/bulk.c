/* SPDX-License-Identifier: Apache-2.0
 *
 * The floor of the bulk push: memory of one process over a connection into memory of another one that is registered with a
 * userfaultfd, by the least that can do it. No protocol, no checksum, no bookkeeping; nothing of the engine is used.
 */
#include <errno.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "core/runtime.h"
#include "postcopy/bench.h"
#include "uffd/uffd_abi.h"

#define PIECE_BYTES ((size_t)256 * 1024) /* stays in a second-level cache between the copy out of the socket and the one into the page */

int pc_bench_floor_push(int fd, const void *base, uint64_t bytes)
{
    const uint8_t *at = base, *end = at + bytes;

    while (at < end) {
        size_t left = (size_t)(end - at);
        ssize_t sent = send(fd, at, left < PIECE_BYTES ? left : PIECE_BYTES, MSG_NOSIGNAL);

        if (sent < 0 && errno != EINTR)
            return -errno;
        at += sent > 0 ? sent : 0;
    }
    return 0;
}

int pc_bench_floor_place(int uffd, int fd, void *base, uint64_t bytes)
{
    uint8_t *piece = pc_buffer_new(PIECE_BYTES);
    int error = piece ? 0 : -ENOMEM;

    for (uint64_t at = 0; !error && at < bytes;) {
        size_t want = bytes - at < PIECE_BYTES ? (size_t)(bytes - at) : PIECE_BYTES, have = 0;

        while (!error && have < want) {
            ssize_t got = recv(fd, piece + have, want - have, MSG_WAITALL);

            if (got == 0)
                error = -ENODATA;
            else if (got < 0 && errno != EINTR)
                error = -errno;
            have += got > 0 ? (size_t)got : 0;
        }
        for (size_t done = 0; !error && done < want;) {
            struct uffdio_copy copy = {.dst = (uint64_t)(uintptr_t)base + at + done,
                                       .src = (uint64_t)(uintptr_t)piece + done,
                                       .len = want - done};

            if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EAGAIN)
                error = -errno;
            done += copy.copy > 0 ? (size_t)copy.copy : 0;
        }
        at += want;
    }
    pc_buffer_free(piece, PIECE_BYTES);
    return error;
}
