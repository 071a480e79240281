/* SPDX-License-Identifier: Apache-2.0
 *
 * io_uring, by its three system calls: a transfer is done in the submitter's call, by a worker, or by the poller of the
 * submission queue; the last two are threads that the kernel runs in this process.
 */
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "faultpaths/fp.h"

#define ENTRIES 4
#define IORING_OP_SEND_ZC_ 47 /* newer than some distributions' headers */

struct ring {
    int fd;
    unsigned flags;
    uint8_t *sq, *cq;
    struct io_uring_sqe *sqes;
    struct io_uring_params params;
};

static _Atomic uint32_t *at(uint8_t *base, uint32_t offset)
{
    return (_Atomic uint32_t *)(void *)(base + offset);
}

static bool ring_open(struct pc_fp_cell *cell, struct ring *ring, unsigned flags)
{
    struct io_uring_params *params = &ring->params;
    size_t sq_bytes, cq_bytes;

    memset(ring, 0, sizeof(*ring));
    params->flags = ring->flags = flags;
    params->sq_thread_idle = 2000;
    ring->fd = (int)syscall(SYS_io_uring_setup, ENTRIES, params);
    if (ring->fd < 0)
        return pc_fp_unavailable(cell, errno, "io_uring_setup");
    sq_bytes = params->sq_off.array + params->sq_entries * sizeof(uint32_t);
    cq_bytes = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    ring->sq = mmap(NULL, sq_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
    ring->cq = mmap(NULL, cq_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_CQ_RING);
    ring->sqes = mmap(NULL, params->sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
    if (ring->sq == MAP_FAILED || ring->cq == MAP_FAILED || ring->sqes == MAP_FAILED)
        return pc_fp_unavailable(cell, errno, "mmap of the ring");
    return true;
}

/* Submits one entry. 0, or -1 with errno. */
static int ring_submit(struct ring *ring, const struct io_uring_sqe *sqe)
{
    uint32_t tail = atomic_load(at(ring->sq, ring->params.sq_off.tail)), slot = tail & (ring->params.sq_entries - 1);

    ring->sqes[slot] = *sqe;
    atomic_store(at(ring->sq, ring->params.sq_off.array + 4 * slot), slot);
    atomic_store(at(ring->sq, ring->params.sq_off.tail), tail + 1);
    if (!(ring->flags & IORING_SETUP_SQPOLL))
        return syscall(SYS_io_uring_enter, ring->fd, 1, 0, 0, NULL, 0) < 0 ? -1 : 0;
    if (!(atomic_load(at(ring->sq, ring->params.sq_off.flags)) & IORING_SQ_NEED_WAKEUP))
        return 0;
    return syscall(SYS_io_uring_enter, ring->fd, 0, 0, IORING_ENTER_SQ_WAKEUP, NULL, 0) < 0 ? -1 : 0;
}

/* Waits for a completion, and returns that's result. */
static int64_t ring_result(struct ring *ring)
{
    const struct io_uring_cqe *cqes = (const struct io_uring_cqe *)(void *)(ring->cq + ring->params.cq_off.cqes);
    uint32_t head;
    int64_t result;

    while ((head = atomic_load(at(ring->cq, ring->params.cq_off.head))) ==
           atomic_load(at(ring->cq, ring->params.cq_off.tail)))
        (void)syscall(SYS_io_uring_enter, ring->fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0);
    result = cqes[head & (ring->params.cq_entries - 1)].res;
    atomic_store(at(ring->cq, ring->params.cq_off.head), head + 1);
    return result;
}

static int64_t ring_run(struct ring *ring, const struct io_uring_sqe *sqe)
{
    return ring_submit(ring, sqe) ? -errno : ring_result(ring);
}

/* Between the page and cell->fds[0], as the row says. */
static void transfer(struct pc_fp_cell *cell, unsigned ring_flags, uint8_t opcode, uint8_t sqe_flags)
{
    struct io_uring_sqe sqe = {.opcode = opcode, .flags = sqe_flags, .fd = cell->fds[0], .addr = (uintptr_t)cell->page,
                               .len = PC_FP_BYTES};
    bool direct = cell->operation->on == PC_FP_ON_DIRECT;
    struct ring ring;

    if (!ring_open(cell, &ring, ring_flags) ||
        (!direct && !pc_fp_made(cell, pwrite(sqe.fd, pc_fp_other(), PC_FP_BYTES, 0), "pwrite")))
        return;
    PC_FP_ACT_CODE(cell, ring_run(&ring, &sqe));
    if (direct)
        PC_FP_UNAVAILABLE_IF(cell, "a page by O_DIRECT", EINVAL);
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (opcode == IORING_OP_READ)
        pc_fp_verify_page(cell, pc_fp_other(), 0, PC_FP_BYTES);
    else
        pc_fp_verify_taken(cell);
}

PC_FP_VARIANT(uring_direct_read, transfer, 0, IORING_OP_READ, 0)
PC_FP_VARIANT(uring_direct_write, transfer, 0, IORING_OP_WRITE, 0)
PC_FP_VARIANT(uring_buffered_read, transfer, 0, IORING_OP_READ, 0)
PC_FP_VARIANT(uring_buffered_write, transfer, 0, IORING_OP_WRITE, 0)
PC_FP_VARIANT(uring_async_read, transfer, 0, IORING_OP_READ, IOSQE_ASYNC)
PC_FP_VARIANT(uring_async_write, transfer, 0, IORING_OP_WRITE, IOSQE_ASYNC)
PC_FP_VARIANT(uring_async_direct_read, transfer, 0, IORING_OP_READ, IOSQE_ASYNC)
PC_FP_VARIANT(uring_async_direct_write, transfer, 0, IORING_OP_WRITE, IOSQE_ASYNC)
PC_FP_VARIANT(uring_sqpoll_read, transfer, IORING_SETUP_SQPOLL, IORING_OP_READ, 0)
PC_FP_VARIANT(uring_sqpoll_write, transfer, IORING_SETUP_SQPOLL, IORING_OP_WRITE, 0)
PC_FP_VARIANT(uring_sqpoll_direct_read, transfer, IORING_SETUP_SQPOLL, IORING_OP_READ, 0)
PC_FP_VARIANT(uring_sqpoll_direct_write, transfer, IORING_SETUP_SQPOLL, IORING_OP_WRITE, 0)

static void uring_sendmsg_msghdr(struct pc_fp_cell *cell)
{
    struct io_uring_sqe sqe = {.opcode = IORING_OP_SENDMSG, .fd = cell->fds[1], .len = 1,
                               .addr = (uintptr_t)(cell->page + PC_FP_AT_MSGHDR)};
    struct ring ring;

    if (!ring_open(cell, &ring, 0))
        return;
    PC_FP_ACT_CODE(cell, ring_run(&ring, &sqe));
    pc_fp_verify_sent(cell);
}

static struct io_uring_sqe receiving(const struct pc_fp_cell *cell)
{
    return (struct io_uring_sqe){.opcode = IORING_OP_RECV, .fd = cell->fds[0], .len = PC_FP_SMALL,
                                 .addr = (uintptr_t)(cell->page + PC_FP_AT_OUT)};
}

static void uring_recv(struct pc_fp_cell *cell)
{
    struct io_uring_sqe sqe = receiving(cell);
    struct ring ring;

    if (!ring_open(cell, &ring, 0))
        return;
    PC_FP_ACT_CODE(cell, ring_run(&ring, &sqe));
    pc_fp_verify_delivered(cell);
}

/* The armed poll has the task receive it by task work, on its way out of the kernel. */
static void uring_recv_polled(struct pc_fp_cell *cell)
{
    struct io_uring_sqe sqe = receiving(cell);
    struct ring ring;

    if (!ring_open(cell, &ring, 0) || !pc_fp_made(cell, ring_submit(&ring, &sqe), "io_uring_enter"))
        return;
    pc_fp_begin(cell);
    (void)!write(cell->fds[1], pc_fp_other(), PC_FP_SMALL);
    pc_fp_end_code(cell, ring_result(&ring));
    pc_fp_verify_delivered(cell);
}

/* Two completions: of the sending, and later of the page being let go. The first is the result. */
static void uring_send_zc(struct pc_fp_cell *cell)
{
    struct io_uring_sqe sqe = {.opcode = IORING_OP_SEND_ZC_, .fd = cell->fds[1], .addr = (uintptr_t)cell->page,
                               .len = PC_FP_BYTES};
    struct ring ring;

    if (!ring_open(cell, &ring, 0))
        return;
    PC_FP_ACT_CODE(cell, ring_run(&ring, &sqe));
    PC_FP_UNAVAILABLE_IF(cell, "IORING_OP_SEND_ZC (Linux 6.0)", EINVAL, EOPNOTSUPP);
    pc_fp_verify_taken(cell);
}

/* ---- registered: pinned for as long as the ring lives ---- */

/* And what is then written by way of the ring is the page. */
static void uring_register_buffers(struct pc_fp_cell *cell)
{
    struct io_uring_sqe sqe = {.opcode = IORING_OP_WRITE_FIXED, .fd = cell->fds[0], .addr = (uintptr_t)cell->page,
                               .len = PC_FP_BYTES};
    struct iovec vector = {cell->page, cell->page_bytes};
    uint8_t got[PC_FP_BYTES];
    struct ring ring;

    if (!ring_open(cell, &ring, 0))
        return;
    PC_FP_ACT(cell, syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &vector, 1));
    PC_FP_UNAVAILABLE_IF(cell, "IORING_REGISTER_BUFFERS (the limit of locked memory)", ENOMEM);
    PC_FP_EXPECT(cell, ring_run(&ring, &sqe) == PC_FP_BYTES && pread(sqe.fd, got, PC_FP_BYTES, 0) == PC_FP_BYTES,
                 "the registered page cannot be written to a file");
    pc_fp_verify(cell, got, 0, PC_FP_BYTES);
}

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(uring, direct_read, DIRECT, PC_FP_WRITES | PC_FP_NEEDS_DIR, "IORING_OP_READ, O_DIRECT"),
    PC_FP_ROW(uring, direct_write, DIRECT, PC_FP_NEEDS_DIR,
              "IORING_OP_WRITE, O_DIRECT: by a worker where it might wait for the file"),
    PC_FP_ROW(uring, buffered_read, FILE, PC_FP_WRITES,
              "IORING_OP_READ, buffered: by a worker where the file has no way without waiting"),
    PC_FP_ROW(uring, buffered_write, FILE, 0,
              "IORING_OP_WRITE, buffered: by a worker where the file has no way without waiting"),
    PC_FP_ROW(uring, async_read, FILE, PC_FP_WRITES, "IORING_OP_READ with IOSQE_ASYNC, buffered, by a worker"),
    PC_FP_ROW(uring, async_write, FILE, 0, "IORING_OP_WRITE with IOSQE_ASYNC, buffered, by a worker"),
    PC_FP_ROW(uring, async_direct_read, DIRECT, PC_FP_WRITES | PC_FP_NEEDS_DIR,
              "IORING_OP_READ with IOSQE_ASYNC, O_DIRECT, by a worker"),
    PC_FP_ROW(uring, async_direct_write, DIRECT, PC_FP_NEEDS_DIR, "IORING_OP_WRITE with IOSQE_ASYNC, O_DIRECT, by a worker"),
    PC_FP_ROW(uring, sqpoll_read, FILE, PC_FP_WRITES, "IORING_OP_READ, buffered, by the poller of the submission queue"),
    PC_FP_ROW(uring, sqpoll_write, FILE, 0, "IORING_OP_WRITE, buffered, by the poller of the submission queue"),
    PC_FP_ROW(uring, sqpoll_direct_read, DIRECT, PC_FP_WRITES | PC_FP_NEEDS_DIR,
              "IORING_OP_READ, O_DIRECT, by the poller of the submission queue"),
    PC_FP_ROW(uring, sqpoll_direct_write, DIRECT, PC_FP_NEEDS_DIR,
              "IORING_OP_WRITE, O_DIRECT, by the poller of the submission queue"),
    PC_FP_ROW(uring, sendmsg_msghdr, SOCKETS, 0, "IORING_OP_SENDMSG: its struct msghdr"),
    PC_FP_ROW(uring, recv, FULL_SOCKETS, PC_FP_WRITES, "IORING_OP_RECV, in the submitter's call"),
    PC_FP_ROW(uring, recv_polled, SOCKETS, PC_FP_WRITES, "IORING_OP_RECV, done later by task work, when the data is there"),
    PC_FP_ROW(uring, send_zc, TCP, 0, "IORING_OP_SEND_ZC: the socket's queue refers to the page"),
    PC_FP_ROW(uring, register_buffers, FILE, 0, "IORING_REGISTER_BUFFERS pins the page"),
};

const struct pc_fp_class pc_fp_uring = {operations, PC_ARRAY_LENGTH(operations)};
