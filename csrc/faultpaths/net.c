/* SPDX-License-Identifier: Apache-2.0
 *
 * TCP over loopback, and AF_XDP.
 */
#include <arpa/inet.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/util.h"
#include "faultpaths/fp.h"

#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#endif
#ifndef MSG_ZEROCOPY
#define MSG_ZEROCOPY 0x4000000
#endif
#ifndef AF_XDP
#define AF_XDP 44
#endif
#define SOL_XDP_ 283
#define XDP_UMEM_REG_ 4

#define EVERYWHERE PC_FP_ALL_MODES, PC_FP_ALL_BACKINGS

bool pc_fp_connected(struct pc_fp_cell *cell, int fds[2])
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t bytes = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    fds[0] = fds[1] = -1;
    if (listener >= 0 && !bind(listener, (struct sockaddr *)&address, bytes) && !listen(listener, 1) &&
        !getsockname(listener, (struct sockaddr *)&address, &bytes)) {
        fds[1] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fds[1] >= 0 && !connect(fds[1], (struct sockaddr *)&address, bytes))
            fds[0] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    }
    if (fds[0] < 0)
        pc_fp_unavailable(cell, errno, "TCP over loopback");
    if (listener >= 0)
        close(listener);
    return fds[0] >= 0;
}

static void verify_sent(struct pc_fp_cell *cell, int fd)
{
    uint8_t got[PC_FP_BYTES];

    if (!pc_fp_succeeded(cell))
        return;
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (recv(fd, got, sizeof(got), MSG_WAITALL) != sizeof(got))
        pc_fp_wrong(cell, "not all has arrived");
    else
        pc_fp_verify(cell, got, 0, sizeof(got));
}

static void tcp_send(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!pc_fp_connected(cell, fds))
        return;
    PC_FP_ACT(cell, syscall(SYS_sendto, fds[1], cell->page, PC_FP_BYTES, 0, NULL, 0));
    verify_sent(cell, fds[0]);
}

static void tcp_recv(struct pc_fp_cell *cell)
{
    uint8_t data[512];
    struct pollfd polled;
    int fds[2];

    memset(data, 0x42, sizeof(data));
    if (!pc_fp_connected(cell, fds) || send(fds[1], data, sizeof(data), MSG_NOSIGNAL) != sizeof(data))
        return;
    polled = (struct pollfd){.fd = fds[0], .events = POLLIN};
    (void)poll(&polled, 1, -1);
    PC_FP_ACT(cell, syscall(SYS_recvfrom, fds[0], cell->page + PC_FP_AT_OUT, sizeof(data), 0, NULL, NULL));
    pc_fp_check_value(cell, sizeof(data));
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, data, PC_FP_AT_OUT, sizeof(data));
}

static void zerocopy_send(struct pc_fp_cell *cell)
{
    int fds[2], one = 1;

    if (!pc_fp_connected(cell, fds))
        return;
    if (setsockopt(fds[1], SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one))) {
        pc_fp_unavailable(cell, errno, "SO_ZEROCOPY");
        return;
    }
    PC_FP_ACT(cell, syscall(SYS_sendto, fds[1], cell->page, PC_FP_BYTES, MSG_ZEROCOPY, NULL, 0));
    if (cell->shared->result.error == ENOBUFS)
        pc_fp_unavailable(cell, ENOBUFS, "MSG_ZEROCOPY (the limit of locked memory)");
    verify_sent(cell, fds[0]);
}

/* An array of chunks that network cards are to write to; the kernel pins it for good. */
static void xdp_umem(struct pc_fp_cell *cell)
{
    struct { /* struct xdp_umem_reg, as it was first */
        uint64_t address, bytes;
        uint32_t chunk_bytes, headroom;
    } registration = {(uintptr_t)cell->page, cell->page_bytes, 2048, 0};
    int fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);

    if (fd < 0) {
        pc_fp_unavailable(cell, errno, "AF_XDP");
        return;
    }
    PC_FP_ACT(cell, syscall(SYS_setsockopt, fd, SOL_XDP_, XDP_UMEM_REG_, &registration, sizeof(registration)));
    if (cell->shared->result.error == ENOBUFS)
        pc_fp_unavailable(cell, ENOBUFS, "XDP_UMEM_REG (the limit of locked memory)");
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, NULL, 0, 0);
}

static const struct pc_fp_operation operations[] = {
    {{"net.tcp_send", "net", "send on a TCP connection: copied into socket buffers, under the socket's lock", EVERYWHERE, 0},
     tcp_send},
    {{"net.tcp_recv", "net", "recv from a TCP connection: copied under the socket's lock", EVERYWHERE, PC_FP_WRITES},
     tcp_recv},
    {{"net.msg_zerocopy", "net", "send with MSG_ZEROCOPY: the socket's queue refers to the page", EVERYWHERE, 0},
     zerocopy_send},
    {{"net.xdp_umem", "net", "XDP_UMEM_REG of AF_XDP pins the page for good", EVERYWHERE, PC_FP_WRITES}, xdp_umem},
};

const struct pc_fp_class pc_fp_net = {operations, PC_ARRAY_LENGTH(operations)};
