/* SPDX-License-Identifier: Apache-2.0
 *
 * TCP over loopback, and AF_XDP.
 */
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

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

PC_FP_CALL(net_tcp_send, pc_fp_verify_taken, sendto, cell->fds[1], cell->page, PC_FP_BYTES, 0, NULL, 0)
PC_FP_CALL(net_tcp_recv, pc_fp_verify_delivered, recvfrom, cell->fds[0], cell->page + PC_FP_AT_OUT, PC_FP_SMALL, 0, NULL, NULL)

static void net_msg_zerocopy(struct pc_fp_cell *cell)
{
    int one = 1;

    if (!pc_fp_made(cell, setsockopt(cell->fds[1], SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one)), "SO_ZEROCOPY"))
        return;
    PC_FP_ACT(cell, syscall(SYS_sendto, cell->fds[1], cell->page, PC_FP_BYTES, MSG_ZEROCOPY, NULL, 0));
    PC_FP_UNAVAILABLE_IF(cell, "MSG_ZEROCOPY (the limit of locked memory)", ENOBUFS);
    pc_fp_verify_taken(cell);
}

/* An array of chunks that network cards are to write to; the kernel pins it for good. */
static void net_xdp_umem(struct pc_fp_cell *cell)
{
    struct { /* struct xdp_umem_reg, as it was first */
        uint64_t address, bytes;
        uint32_t chunk_bytes, headroom;
    } registration = {(uintptr_t)cell->page, cell->page_bytes, 2048, 0};
    int fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);

    if (!pc_fp_made(cell, fd, "AF_XDP"))
        return;
    PC_FP_ACT(cell, syscall(SYS_setsockopt, fd, SOL_XDP_, XDP_UMEM_REG_, &registration, sizeof(registration)));
    PC_FP_UNAVAILABLE_IF(cell, "XDP_UMEM_REG (the limit of locked memory)", ENOBUFS);
    pc_fp_verify_kept(cell);
}

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(net, tcp_send, TCP, 0, "send on a TCP connection: copied into socket buffers, under the socket's lock"),
    PC_FP_ROW(net, tcp_recv, FULL_TCP, PC_FP_WRITES, "recv from a TCP connection: copied under the socket's lock"),
    PC_FP_ROW(net, msg_zerocopy, TCP, 0, "send with MSG_ZEROCOPY: the socket's queue refers to the page"),
    PC_FP_ROW(net, xdp_umem, NOTHING, PC_FP_WRITES, "XDP_UMEM_REG of AF_XDP pins the page for good"),
};

const struct pc_fp_class pc_fp_net = {operations, PC_ARRAY_LENGTH(operations)};
