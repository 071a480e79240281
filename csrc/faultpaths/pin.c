/* SPDX-License-Identifier: Apache-2.0
 *
 * get_user_pages: the kernel brings pages by itself, for a device or for a pipe to keep, or only to have them there.
 */
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/mempolicy.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "faultpaths/fp.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif

/* ---- O_DIRECT ---- */

/* A file system that has the flag but refuses the transfer says EINVAL, which is no answer to a missing page. */
static void judge_direct(struct pc_fp_cell *cell, bool to_page)
{
    PC_FP_UNAVAILABLE_IF(cell, "a page by O_DIRECT", EINVAL);
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (to_page)
        pc_fp_verify_page(cell, pc_fp_other(), 0, PC_FP_BYTES);
    else
        pc_fp_verify_taken(cell);
}

static void odirect(struct pc_fp_cell *cell, bool to_page)
{
    PC_FP_ACT(cell, syscall(to_page ? SYS_pread64 : SYS_pwrite64, cell->fds[0], cell->page, PC_FP_BYTES, 0));
    judge_direct(cell, to_page);
}
PC_FP_VARIANT(pin_odirect_read, odirect, true)
PC_FP_VARIANT(pin_odirect_write, odirect, false)

/* ---- aio: the submission pins, the completion comes later ---- */

static void aio(struct pc_fp_cell *cell, bool to_page)
{
    struct iocb iocb = {.aio_lio_opcode = to_page ? IOCB_CMD_PREAD : IOCB_CMD_PWRITE, .aio_fildes = (uint32_t)cell->fds[0],
                        .aio_nbytes = PC_FP_BYTES, .aio_buf = (uintptr_t)cell->page}, *list[] = {&iocb};
    struct io_event event = {0};
    aio_context_t context = 0;

    if (!pc_fp_made(cell, syscall(SYS_io_setup, 4, &context), "io_setup"))
        return;
    pc_fp_begin(cell);
    if (syscall(SYS_io_submit, context, 1, list) == 1 && syscall(SYS_io_getevents, context, 1, 1, &event, NULL) == 1)
        pc_fp_end_code(cell, event.res);
    else
        pc_fp_end(cell, -1);
    judge_direct(cell, to_page);
}
PC_FP_VARIANT(pin_aio_read, aio, true)
PC_FP_VARIANT(pin_aio_write, aio, false)

/* io_submit's own argument, and its result: copies, here since this is where aio is. */
static void copy_aio_iocb(struct pc_fp_cell *cell)
{
    struct iocb *list[] = {(struct iocb *)(void *)(cell->page + PC_FP_AT_IOCB)};
    aio_context_t context = 0;
    struct io_event event = {0};

    if (!pc_fp_made(cell, syscall(SYS_io_setup, 4, &context), "io_setup") ||
        !pc_fp_made(cell, dup3(cell->fds[0], PC_FP_FD, O_CLOEXEC), "dup3"))
        return;
    PC_FP_ACT(cell, syscall(SYS_io_submit, context, 1, list));
    PC_FP_EXPECT(cell, syscall(SYS_io_getevents, context, 1, 1, &event, NULL) == 1 && event.res == 64,
                 "the transfer was not that of the iocb");
    pc_fp_verify(cell, PC_FP_SCRATCH + PC_FP_IN_DATA, 0, 64);
}

static void copy_aio_events(struct pc_fp_cell *cell)
{
    struct iocb iocb = {.aio_data = 4711, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)cell->fds[0],
                        .aio_nbytes = 64, .aio_buf = (uintptr_t)(PC_FP_SCRATCH + PC_FP_IN_DATA)}, *list[] = {&iocb};
    struct io_event expected = {.data = 4711, .obj = (uintptr_t)&iocb, .res = 64};
    aio_context_t context = 0;

    if (!pc_fp_made(cell, syscall(SYS_io_setup, 4, &context), "io_setup") ||
        !pc_fp_made(cell, syscall(SYS_io_submit, context, 1, list), "io_submit"))
        return;
    PC_FP_ACT(cell, syscall(SYS_io_getevents, context, 1, 1, cell->page + PC_FP_AT_OUT, NULL));
    pc_fp_check_value(cell, 1);
    pc_fp_verify_out(cell, &expected, sizeof(expected));
}

/* ---- pipes that take pages ---- */

static void vmsplice_out(struct pc_fp_cell *cell, unsigned flags)
{
    struct iovec vector = {cell->page, PC_FP_BYTES};

    PC_FP_ACT(cell, syscall(SYS_vmsplice, cell->fds[1], &vector, 1, flags));
    pc_fp_verify_taken(cell);
}
PC_FP_VARIANT(pin_vmsplice_to_pipe, vmsplice_out, 0)
PC_FP_VARIANT(pin_vmsplice_gift, vmsplice_out, SPLICE_F_GIFT)

static void pin_vmsplice_from_pipe(struct pc_fp_cell *cell)
{
    struct iovec vector = {cell->page + PC_FP_AT_OUT, PC_FP_SMALL};

    PC_FP_ACT(cell, syscall(SYS_vmsplice, cell->fds[0], &vector, 1, 0));
    pc_fp_verify_delivered(cell);
}

/* ---- only to have them there ---- */

/* Afterwards the page is there, and what it holds is what was given. */
static void verify_present(struct pc_fp_cell *cell)
{
    unsigned char there = 0;

    if (!pc_fp_succeeded(cell))
        return;
    if (!mincore(cell->page, PC_FP_BYTES, &there) && !(there & 1))
        pc_fp_wrong(cell, "the page is not there afterwards");
    pc_fp_verify_kept(cell);
}

PC_FP_CALL(pin_mlock, verify_present, mlock, cell->page, cell->page_bytes)
PC_FP_CALL(pin_mlock_onfault, pc_fp_verify_kept, mlock2, cell->page, cell->page_bytes, MLOCK_ONFAULT)

static void populate(struct pc_fp_cell *cell, int advice)
{
    PC_FP_ACT(cell, syscall(SYS_madvise, cell->page, cell->page_bytes, advice));
    PC_FP_UNAVAILABLE_IF(cell, "MADV_POPULATE (Linux 5.14)", EINVAL);
    verify_present(cell);
}
PC_FP_VARIANT(pin_populate_read, populate, MADV_POPULATE_READ)
PC_FP_VARIANT(pin_populate_write, populate, MADV_POPULATE_WRITE)

static void pin_get_mempolicy(struct pc_fp_cell *cell)
{
    int node = -1;

    PC_FP_ACT(cell, syscall(SYS_get_mempolicy, &node, NULL, 0, cell->page, MPOL_F_NODE | MPOL_F_ADDR));
    PC_FP_UNAVAILABLE_IF(cell, "get_mempolicy", ENOSYS);
    verify_present(cell);
}

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(pin, odirect_read, DIRECT, PC_FP_WRITES | PC_FP_NEEDS_DIR, "pread of an O_DIRECT file into the page"),
    PC_FP_ROW(pin, odirect_write, DIRECT, PC_FP_NEEDS_DIR, "pwrite of the page to an O_DIRECT file"),
    PC_FP_ROW(pin, aio_read, DIRECT, PC_FP_WRITES | PC_FP_NEEDS_DIR, "io_submit of a read by O_DIRECT"),
    PC_FP_ROW(pin, aio_write, DIRECT, PC_FP_NEEDS_DIR, "io_submit of a write by O_DIRECT"),
    PC_FP_ROW(copy, aio_iocb, FILE, PC_FP_WRITES, "io_submit: struct iocb, read and written"),
    PC_FP_ROW(copy, aio_events, FILE, PC_FP_WRITES, "io_getevents: the events"),
    PC_FP_ROW(pin, vmsplice_to_pipe, PIPE, 0, "vmsplice: the pipe refers to the page"),
    PC_FP_ROW(pin, vmsplice_gift, PIPE, 0, "vmsplice with SPLICE_F_GIFT: the pipe gets the page"),
    PC_FP_ROW(pin, vmsplice_from_pipe, FULL_PIPE, PC_FP_WRITES, "vmsplice from a pipe: a copy, for all its name"),
    PC_FP_ROW(pin, mlock, NOTHING, 0, "mlock brings the page"),
    PC_FP_ROW(pin, mlock_onfault, NOTHING, PC_FP_NOFAULT, "mlock2 with MLOCK_ONFAULT waits for others to bring it"),
    PC_FP_ROW(pin, populate_read, NOTHING, 0, "MADV_POPULATE_READ"),
    PC_FP_ROW(pin, populate_write, NOTHING, PC_FP_WRITES, "MADV_POPULATE_WRITE"),
    PC_FP_ROW(pin, get_mempolicy, NOTHING, 0, "get_mempolicy asks for the node of the page, and brings it for that"),
};

const struct pc_fp_class pc_fp_pin = {operations, PC_ARRAY_LENGTH(operations)};
