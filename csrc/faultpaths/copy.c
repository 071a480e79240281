/* SPDX-License-Identifier: Apache-2.0
 *
 * Copies: a system call reads or writes user memory by copy_from_user, copy_to_user and their relatives. The fault is taken in
 * the middle of the copy, as user mode's would be.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core/util.h"
#include "faultpaths/fp.h"

#define EVERYWHERE PC_FP_ALL_MODES, PC_FP_ALL_BACKINGS

static bool make_pipe(struct pc_fp_cell *cell, int fds[2])
{
    if (!pipe2(fds, O_CLOEXEC))
        return true;
    pc_fp_unavailable(cell, errno, "pipe");
    return false;
}

static bool make_sockets(struct pc_fp_cell *cell, int type, int fds[2])
{
    if (!socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, fds))
        return true;
    pc_fp_unavailable(cell, errno, "socketpair");
    return false;
}

/* What a call has taken from all of the page comes out of a descriptor. */
static void verify_taken(struct pc_fp_cell *cell, int fd)
{
    uint8_t got[PC_FP_BYTES];

    if (!pc_fp_succeeded(cell))
        return;
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (read(fd, got, sizeof(got)) != sizeof(got))
        pc_fp_wrong(cell, "what was written cannot be read: %s", strerrordesc_np(errno));
    else
        pc_fp_verify(cell, got, 0, sizeof(got));
}

static void write_pipe(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!make_pipe(cell, fds))
        return;
    PC_FP_ACT(cell, write(fds[1], cell->page, PC_FP_BYTES));
    verify_taken(cell, fds[0]);
}

static const uint8_t delivered[] = "0123456789 a page that is not there 0123456789 a page that is not there";
#define DELIVERED sizeof(delivered)

static void verify_delivered(struct pc_fp_cell *cell)
{
    if (!pc_fp_succeeded(cell))
        return;
    pc_fp_check_value(cell, DELIVERED);
    pc_fp_verify_page(cell, delivered, PC_FP_AT_OUT, DELIVERED);
}

static void read_pipe(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!make_pipe(cell, fds) || write(fds[1], delivered, DELIVERED) != DELIVERED)
        return;
    PC_FP_ACT(cell, read(fds[0], cell->page + PC_FP_AT_OUT, DELIVERED));
    verify_delivered(cell);
}

static void send_socket(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!make_sockets(cell, SOCK_STREAM, fds))
        return;
    PC_FP_ACT(cell, send(fds[1], cell->page, PC_FP_BYTES, 0));
    verify_taken(cell, fds[0]);
}

static void recv_socket(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!make_sockets(cell, SOCK_STREAM, fds) || write(fds[1], delivered, DELIVERED) != DELIVERED)
        return;
    PC_FP_ACT(cell, recv(fds[0], cell->page + PC_FP_AT_OUT, DELIVERED, 0));
    verify_delivered(cell);
}

static void write_file(struct pc_fp_cell *cell)
{
    int fd = pc_fp_plain_file(cell);
    uint8_t got[PC_FP_BYTES];

    if (fd < 0)
        return;
    (void)ftruncate(fd, 0);
    PC_FP_ACT(cell, write(fd, cell->page, PC_FP_BYTES));
    if (!pc_fp_succeeded(cell))
        return;
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (pread(fd, got, sizeof(got), 0) != sizeof(got))
        pc_fp_wrong(cell, "the file has not what was written");
    else
        pc_fp_verify(cell, got, 0, sizeof(got));
}

static void read_file(struct pc_fp_cell *cell)
{
    int fd = pc_fp_plain_file(cell);

    if (fd < 0 || pwrite(fd, delivered, DELIVERED, 0) != DELIVERED)
        return;
    PC_FP_ACT(cell, pread(fd, cell->page + PC_FP_AT_OUT, DELIVERED, 0));
    verify_delivered(cell);
}

static const struct pc_fp_operation operations[] = {
    {{"copy.write_pipe", "copy", "write to a pipe: copy_from_user of all of the page", EVERYWHERE, 0}, write_pipe},
    {{"copy.read_pipe", "copy", "read from a pipe: copy_to_user", EVERYWHERE, PC_FP_WRITES}, read_pipe},
    {{"copy.send_socket", "copy", "send on a Unix socket: copy_from_iter", EVERYWHERE, 0}, send_socket},
    {{"copy.recv_socket", "copy", "recv from a Unix socket: copy_to_iter", EVERYWHERE, PC_FP_WRITES}, recv_socket},
    {{"copy.write_file", "copy", "buffered write: copied with page faults off, faulted in, and again", EVERYWHERE, 0},
     write_file},
    {{"copy.read_file", "copy", "buffered read: from the page cache by copy_to_iter", EVERYWHERE, PC_FP_WRITES}, read_file},
};

const struct pc_fp_class pc_fp_copy = {operations, PC_ARRAY_LENGTH(operations)};
