/* SPDX-License-Identifier: Apache-2.0
 *
 * Copies: a system call reads or writes user memory by copy_from_user, copy_to_user and their relatives. The fault is taken in
 * the middle of the copy, as user mode's would be.
 */
#include <sys/syscall.h>
#include <unistd.h>

#include "faultpaths/fp.h"

PC_FP_CALL(copy_write_pipe, pc_fp_verify_taken, write, cell->fds[1], cell->page, PC_FP_BYTES)
PC_FP_CALL(copy_read_pipe, pc_fp_verify_delivered, read, cell->fds[0], cell->page + PC_FP_AT_OUT, PC_FP_SMALL)
PC_FP_CALL(copy_send_socket, pc_fp_verify_taken, sendto, cell->fds[1], cell->page, PC_FP_BYTES, 0, NULL, 0)
PC_FP_CALL(copy_recv_socket, pc_fp_verify_delivered, recvfrom, cell->fds[0], cell->page + PC_FP_AT_OUT, PC_FP_SMALL, 0, NULL, NULL)

static void copy_write_file(struct pc_fp_cell *cell)
{
    if (!pc_fp_made(cell, ftruncate(cell->fds[0], 0), "ftruncate"))
        return;
    PC_FP_ACT(cell, write(cell->fds[0], cell->page, PC_FP_BYTES));
    pc_fp_verify_taken(cell);
}

static void copy_read_file(struct pc_fp_cell *cell)
{
    if (!pc_fp_made(cell, pwrite(cell->fds[0], pc_fp_other(), PC_FP_SMALL, 0), "pwrite"))
        return;
    PC_FP_ACT(cell, pread(cell->fds[0], cell->page + PC_FP_AT_OUT, PC_FP_SMALL, 0));
    pc_fp_verify_delivered(cell);
}

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(copy, write_pipe, PIPE, 0, "write to a pipe: copy_from_user of all of the page"),
    PC_FP_ROW(copy, read_pipe, FULL_PIPE, PC_FP_WRITES, "read from a pipe: copy_to_user"),
    PC_FP_ROW(copy, send_socket, SOCKETS, 0, "send on a Unix socket: copy_from_iter"),
    PC_FP_ROW(copy, recv_socket, FULL_SOCKETS, PC_FP_WRITES, "recv from a Unix socket: copy_to_iter"),
    PC_FP_ROW(copy, write_file, FILE, 0, "buffered write: copied with page faults off, faulted in, and again"),
    PC_FP_ROW(copy, read_file, FILE, PC_FP_WRITES, "buffered read: from the page cache by copy_to_iter"),
};

const struct pc_fp_class pc_fp_copy = {operations, PC_ARRAY_LENGTH(operations)};
