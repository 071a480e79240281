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

#include "core/util.h"
#include "faultpaths/fp.h"

#define EVERYWHERE PC_FP_ALL_MODES, PC_FP_ALL_BACKINGS
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
    if (ring->fd < 0) {
        pc_fp_unavailable(cell, errno, "io_uring_setup");
        return false;
    }
    sq_bytes = params->sq_off.array + params->sq_entries * sizeof(uint32_t);
    cq_bytes = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    ring->sq = mmap(NULL, sq_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
    ring->cq = mmap(NULL, cq_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_CQ_RING);
    ring->sqes = mmap(NULL, params->sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
    if (ring->sq == MAP_FAILED || ring->cq == MAP_FAILED || ring->sqes == MAP_FAILED) {
        pc_fp_unavailable(cell, errno, "mmap of the ring");
        return false;
    }
    return true;
}

static void ring_wait(struct ring *ring)
{
    int rc;

    do
        rc = (int)syscall(SYS_io_uring_enter, ring->fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0);
    while (rc < 0 && errno == EINTR);
}

/* Submits one entry, waits for its completion, and returns that's result. */
static int64_t ring_run(struct ring *ring, const struct io_uring_sqe *sqe)
{
    uint32_t mask = ring->params.sq_entries - 1, tail = atomic_load(at(ring->sq, ring->params.sq_off.tail)), head;
    const struct io_uring_cqe *cqes = (const struct io_uring_cqe *)(void *)(ring->cq + ring->params.cq_off.cqes);
    int64_t result;

    ring->sqes[tail & mask] = *sqe;
    atomic_store(at(ring->sq, ring->params.sq_off.array + 4 * (tail & mask)), tail & mask);
    atomic_store(at(ring->sq, ring->params.sq_off.tail), tail + 1);
    if (ring->flags & IORING_SETUP_SQPOLL) {
        if (atomic_load(at(ring->sq, ring->params.sq_off.flags)) & IORING_SQ_NEED_WAKEUP &&
            syscall(SYS_io_uring_enter, ring->fd, 0, 0, IORING_ENTER_SQ_WAKEUP, NULL, 0) < 0)
            return -errno;
    } else if (syscall(SYS_io_uring_enter, ring->fd, 1, 0, 0, NULL, 0) < 0) {
        return -errno;
    }
    while ((head = atomic_load(at(ring->cq, ring->params.cq_off.head))) ==
           atomic_load(at(ring->cq, ring->params.cq_off.tail)))
        ring_wait(ring);
    result = cqes[head & (ring->params.cq_entries - 1)].res;
    atomic_store(at(ring->cq, ring->params.cq_off.head), head + 1);
    return result;
}

static void other_content(uint8_t *data)
{
    for (uint32_t i = 0; i < PC_FP_BYTES; i++)
        data[i] = (uint8_t)(i * 13 + (i >> 8) + 5);
}

struct transfer {
    unsigned ring_flags;
    uint8_t opcode;
    uint8_t sqe_flags;
    bool direct;
};

static void run_transfer(struct pc_fp_cell *cell, struct transfer transfer)
{
    static uint8_t data[PC_FP_BYTES], got[PC_FP_BYTES] __attribute__((aligned(PC_FP_BYTES)));
    bool to_page = transfer.opcode == IORING_OP_READ || transfer.opcode == IORING_OP_READ_FIXED;
    struct io_uring_sqe sqe = {.opcode = transfer.opcode, .flags = transfer.sqe_flags, .addr = (uintptr_t)cell->page,
                               .len = PC_FP_BYTES};
    struct ring ring;
    int64_t result;

    if (!ring_open(cell, &ring, transfer.ring_flags))
        return;
    other_content(data);
    if (transfer.direct) {
        sqe.fd = pc_fp_direct_file(cell, O_DIRECT, data, 1);
    } else {
        sqe.fd = pc_fp_plain_file(cell);
        if (sqe.fd >= 0 && pwrite(sqe.fd, data, PC_FP_BYTES, 0) != PC_FP_BYTES)
            return;
    }
    if (sqe.fd < 0)
        return;
    pc_fp_begin(cell);
    result = ring_run(&ring, &sqe);
    pc_fp_end_code(cell, result);
    if (transfer.direct && result == -EINVAL)
        pc_fp_unavailable(cell, EINVAL, "a page by O_DIRECT");
    if (!pc_fp_succeeded(cell))
        return;
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (to_page)
        pc_fp_verify_page(cell, data, 0, PC_FP_BYTES);
    else if (pread(sqe.fd, got, PC_FP_BYTES, 0) != PC_FP_BYTES)
        pc_fp_wrong(cell, "the file cannot be read: %s", strerrordesc_np(errno));
    else
        pc_fp_verify(cell, got, 0, PC_FP_BYTES);
}

#define TRANSFER(name, ...)                                                                                             \
    static void name(struct pc_fp_cell *cell)                                                                           \
    {                                                                                                                   \
        run_transfer(cell, (struct transfer){__VA_ARGS__});                                                             \
    }
TRANSFER(direct_read, 0, IORING_OP_READ, 0, true)
TRANSFER(direct_write, 0, IORING_OP_WRITE, 0, true)
TRANSFER(buffered_read, 0, IORING_OP_READ, 0, false)
TRANSFER(buffered_write, 0, IORING_OP_WRITE, 0, false)
TRANSFER(async_read, 0, IORING_OP_READ, IOSQE_ASYNC, false)
TRANSFER(async_write, 0, IORING_OP_WRITE, IOSQE_ASYNC, false)
TRANSFER(async_direct_read, 0, IORING_OP_READ, IOSQE_ASYNC, true)
TRANSFER(async_direct_write, 0, IORING_OP_WRITE, IOSQE_ASYNC, true)
TRANSFER(sqpoll_read, IORING_SETUP_SQPOLL, IORING_OP_READ, 0, false)
TRANSFER(sqpoll_write, IORING_SETUP_SQPOLL, IORING_OP_WRITE, 0, false)
TRANSFER(sqpoll_direct_read, IORING_SETUP_SQPOLL, IORING_OP_READ, 0, true)
TRANSFER(sqpoll_direct_write, IORING_SETUP_SQPOLL, IORING_OP_WRITE, 0, true)

static void send_header(struct pc_fp_cell *cell)
{
    struct io_uring_sqe sqe = {.opcode = IORING_OP_SENDMSG, .addr = (uintptr_t)(cell->page + PC_FP_AT_MSGHDR), .len = 1};
    struct ring ring;
    uint8_t got[64];
    int fds[2];

    if (!ring_open(cell, &ring, 0))
        return;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds)) {
        pc_fp_unavailable(cell, errno, "socketpair");
        return;
    }
    sqe.fd = fds[1];
    pc_fp_begin(cell);
    pc_fp_end_code(cell, ring_run(&ring, &sqe));
    pc_fp_check_value(cell, sizeof(got));
    if (pc_fp_succeeded(cell) && (read(fds[0], got, sizeof(got)) != sizeof(got) ||
                                  memcmp(got, PC_FP_SCRATCH + PC_FP_IN_DATA, sizeof(got)) != 0))
        pc_fp_wrong(cell, "other bytes have been sent");
}

static bool receivable(struct pc_fp_cell *cell, int fds[2], const uint8_t *data, uint32_t bytes)
{
    if (!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) && write(fds[1], data, bytes) == (ssize_t)bytes)
        return true;
    pc_fp_unavailable(cell, errno, "socketpair");
    return false;
}

static void receive(struct pc_fp_cell *cell)
{
    static uint8_t data[PC_FP_BYTES];
    struct io_uring_sqe sqe = {.opcode = IORING_OP_RECV, .addr = (uintptr_t)(cell->page + PC_FP_AT_OUT), .len = 512};
    struct ring ring;
    int fds[2];

    other_content(data);
    if (!ring_open(cell, &ring, 0) || !receivable(cell, fds, data, 512))
        return;
    sqe.fd = fds[0];
    pc_fp_begin(cell);
    pc_fp_end_code(cell, ring_run(&ring, &sqe));
    pc_fp_check_value(cell, 512);
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, data, PC_FP_AT_OUT, 512);
}

/* The armed poll has the task receive it by task work, on its way out of the kernel. */
static void receive_later(struct pc_fp_cell *cell)
{
    static uint8_t data[PC_FP_BYTES];
    struct io_uring_sqe sqe = {.opcode = IORING_OP_RECV, .addr = (uintptr_t)(cell->page + PC_FP_AT_OUT), .len = 512};
    struct ring ring;
    uint32_t head, tail, mask;
    int fds[2];

    other_content(data);
    if (!ring_open(cell, &ring, 0))
        return;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds)) {
        pc_fp_unavailable(cell, errno, "socketpair");
        return;
    }
    sqe.fd = fds[0];
    mask = ring.params.sq_entries - 1;
    tail = atomic_load(at(ring.sq, ring.params.sq_off.tail));
    ring.sqes[tail & mask] = sqe;
    atomic_store(at(ring.sq, ring.params.sq_off.array + 4 * (tail & mask)), tail & mask);
    atomic_store(at(ring.sq, ring.params.sq_off.tail), tail + 1);
    if (syscall(SYS_io_uring_enter, ring.fd, 1, 0, 0, NULL, 0) != 1) {
        pc_fp_unavailable(cell, errno, "io_uring_enter");
        return;
    }
    pc_fp_begin(cell);
    if (write(fds[1], data, 512) == 512)
        while ((head = atomic_load(at(ring.cq, ring.params.cq_off.head))) ==
               atomic_load(at(ring.cq, ring.params.cq_off.tail)))
            ring_wait(&ring);
    else
        head = 0;
    pc_fp_end_code(cell, ((const struct io_uring_cqe *)(void *)(ring.cq + ring.params.cq_off.cqes))[head].res);
    pc_fp_check_value(cell, 512);
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, data, PC_FP_AT_OUT, 512);
}

/* Two completions: of the sending, and later of the page being let go. The first is the result. */
static void send_zerocopy(struct pc_fp_cell *cell)
{
    struct io_uring_sqe sqe = {.opcode = IORING_OP_SEND_ZC_, .addr = (uintptr_t)cell->page, .len = PC_FP_BYTES};
    uint8_t got[PC_FP_BYTES];
    struct ring ring;
    int fds[2];

    if (!ring_open(cell, &ring, 0) || !pc_fp_connected(cell, fds))
        return;
    sqe.fd = fds[1];
    pc_fp_begin(cell);
    pc_fp_end_code(cell, ring_run(&ring, &sqe));
    if (cell->shared->result.error == EINVAL || cell->shared->result.error == EOPNOTSUPP)
        pc_fp_unavailable(cell, cell->shared->result.error, "IORING_OP_SEND_ZC (Linux 6.0)");
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (!pc_fp_succeeded(cell))
        return;
    if (recv(fds[0], got, sizeof(got), MSG_WAITALL) != sizeof(got))
        pc_fp_wrong(cell, "not all has arrived");
    else
        pc_fp_verify(cell, got, 0, sizeof(got));
}

/* ---- registered: pinned for as long as the ring lives ---- */

static bool register_page(struct pc_fp_cell *cell, struct ring *ring)
{
    struct iovec vector = {cell->page, cell->page_bytes};
    int64_t result;

    if (!ring_open(cell, ring, 0))
        return false;
    pc_fp_begin(cell);
    result = syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_BUFFERS, &vector, 1);
    pc_fp_end(cell, result);
    if (cell->shared->result.error == ENOMEM)
        pc_fp_unavailable(cell, ENOMEM, "IORING_REGISTER_BUFFERS (the limit of locked memory)");
    return pc_fp_succeeded(cell);
}

/* And what is then written by way of the ring is the page. */
static void register_buffers(struct pc_fp_cell *cell)
{
    struct io_uring_sqe sqe = {.opcode = IORING_OP_WRITE_FIXED, .addr = (uintptr_t)cell->page, .len = PC_FP_BYTES};
    uint8_t got[PC_FP_BYTES];
    struct ring ring;

    if (!register_page(cell, &ring))
        return;
    sqe.fd = pc_fp_plain_file(cell);
    if (sqe.fd < 0 || ring_run(&ring, &sqe) != PC_FP_BYTES || pread(sqe.fd, got, PC_FP_BYTES, 0) != PC_FP_BYTES)
        pc_fp_wrong(cell, "the registered page cannot be written to a file");
    else
        pc_fp_verify(cell, got, 0, PC_FP_BYTES);
}

static const struct pc_fp_operation operations[] = {
    {{"uring.direct_read", "uring", "IORING_OP_READ, O_DIRECT", EVERYWHERE,
      PC_FP_WRITES | PC_FP_NEEDS_DIR},
     direct_read},
    {{"uring.direct_write", "uring", "IORING_OP_WRITE, O_DIRECT: by a worker where it might wait for the file", EVERYWHERE,
      PC_FP_NEEDS_DIR},
     direct_write},
    {{"uring.buffered_read", "uring", "IORING_OP_READ, buffered: by a worker where the file has no way without waiting",
      EVERYWHERE, PC_FP_WRITES},
     buffered_read},
    {{"uring.buffered_write", "uring", "IORING_OP_WRITE, buffered: by a worker where the file has no way without waiting",
      EVERYWHERE, 0},
     buffered_write},
    {{"uring.async_read", "uring", "IORING_OP_READ with IOSQE_ASYNC, buffered, by a worker", EVERYWHERE, PC_FP_WRITES},
     async_read},
    {{"uring.async_write", "uring", "IORING_OP_WRITE with IOSQE_ASYNC, buffered, by a worker", EVERYWHERE, 0}, async_write},
    {{"uring.async_direct_read", "uring", "IORING_OP_READ with IOSQE_ASYNC, O_DIRECT, by a worker", EVERYWHERE,
      PC_FP_WRITES | PC_FP_NEEDS_DIR},
     async_direct_read},
    {{"uring.async_direct_write", "uring", "IORING_OP_WRITE with IOSQE_ASYNC, O_DIRECT, by a worker", EVERYWHERE,
      PC_FP_NEEDS_DIR},
     async_direct_write},
    {{"uring.sqpoll_read", "uring", "IORING_OP_READ, buffered, by the poller of the submission queue", EVERYWHERE,
      PC_FP_WRITES},
     sqpoll_read},
    {{"uring.sqpoll_write", "uring", "IORING_OP_WRITE, buffered, by the poller of the submission queue", EVERYWHERE, 0},
     sqpoll_write},
    {{"uring.sqpoll_direct_read", "uring", "IORING_OP_READ, O_DIRECT, by the poller of the submission queue", EVERYWHERE,
      PC_FP_WRITES | PC_FP_NEEDS_DIR},
     sqpoll_direct_read},
    {{"uring.sqpoll_direct_write", "uring", "IORING_OP_WRITE, O_DIRECT, by the poller of the submission queue", EVERYWHERE,
      PC_FP_NEEDS_DIR},
     sqpoll_direct_write},
    {{"uring.sendmsg_msghdr", "uring", "IORING_OP_SENDMSG: its struct msghdr", EVERYWHERE, 0}, send_header},
    {{"uring.recv", "uring", "IORING_OP_RECV, in the submitter's call", EVERYWHERE, PC_FP_WRITES}, receive},
    {{"uring.recv_polled", "uring", "IORING_OP_RECV, done later by task work, when the data is there", EVERYWHERE,
      PC_FP_WRITES},
     receive_later},
    {{"uring.send_zc", "uring", "IORING_OP_SEND_ZC: the socket's queue refers to the page", EVERYWHERE, 0}, send_zerocopy},
    {{"uring.register_buffers", "uring", "IORING_REGISTER_BUFFERS pins the page", EVERYWHERE, 0}, register_buffers},
};

const struct pc_fp_class pc_fp_uring = {operations, PC_ARRAY_LENGTH(operations)};
