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

#include "core/util.h"
#include "faultpaths/fp.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif

#define EVERYWHERE PC_FP_ALL_MODES, PC_FP_ALL_BACKINGS

/* Other bytes than the page has. */
static void other_content(uint8_t *data)
{
    for (uint32_t i = 0; i < PC_FP_BYTES; i++)
        data[i] = (uint8_t)(i * 7 + (i >> 8) + 1);
}

static void verify_file(struct pc_fp_cell *cell, int fd)
{
    static uint8_t got[PC_FP_BYTES] __attribute__((aligned(PC_FP_BYTES)));

    if (!pc_fp_succeeded(cell))
        return;
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (pread(fd, got, sizeof(got), 0) != sizeof(got))
        pc_fp_wrong(cell, "the file cannot be read: %s", strerrordesc_np(errno));
    else
        pc_fp_verify(cell, got, 0, sizeof(got));
}

/* ---- O_DIRECT ---- */

/* A file system that has the flag but refuses the transfer says EINVAL, which is no answer to a missing page. */
static void judge_direct(struct pc_fp_cell *cell, int fd, bool to_page, const uint8_t *data)
{
    if (cell->shared->result.error == EINVAL)
        pc_fp_unavailable(cell, EINVAL, "a page by O_DIRECT");
    if (!to_page) {
        verify_file(cell, fd);
    } else if (pc_fp_succeeded(cell)) {
        pc_fp_check_value(cell, PC_FP_BYTES);
        pc_fp_verify_page(cell, data, 0, PC_FP_BYTES);
    }
}

static void odirect(struct pc_fp_cell *cell, bool to_page)
{
    static uint8_t data[PC_FP_BYTES];
    int fd;

    other_content(data);
    fd = pc_fp_direct_file(cell, O_DIRECT, data, 1);
    if (fd < 0)
        return;
    if (to_page)
        PC_FP_ACT(cell, syscall(SYS_pread64, fd, cell->page, PC_FP_BYTES, 0));
    else
        PC_FP_ACT(cell, syscall(SYS_pwrite64, fd, cell->page, PC_FP_BYTES, 0));
    judge_direct(cell, fd, to_page, data);
}

static void odirect_read(struct pc_fp_cell *cell)
{
    odirect(cell, true);
}

static void odirect_write(struct pc_fp_cell *cell)
{
    odirect(cell, false);
}

/* ---- aio: the submission pins, the completion comes later ---- */

static void aio(struct pc_fp_cell *cell, bool to_page)
{
    static uint8_t data[PC_FP_BYTES];
    struct iocb iocb = {.aio_lio_opcode = to_page ? IOCB_CMD_PREAD : IOCB_CMD_PWRITE, .aio_nbytes = PC_FP_BYTES,
                        .aio_buf = (uintptr_t)cell->page}, *list[] = {&iocb};
    struct io_event event = {0};
    aio_context_t context = 0;
    int64_t value;
    int fd;

    other_content(data);
    if (syscall(SYS_io_setup, 4, &context)) {
        pc_fp_unavailable(cell, errno, "io_setup");
        return;
    }
    fd = pc_fp_direct_file(cell, O_DIRECT, data, 1);
    if (fd < 0)
        return;
    iocb.aio_fildes = (uint32_t)fd;
    pc_fp_begin(cell);
    value = syscall(SYS_io_submit, context, 1, list);
    if (value == 1 && syscall(SYS_io_getevents, context, 1, 1, &event, NULL) == 1)
        pc_fp_end_code(cell, event.res);
    else
        pc_fp_end(cell, -1);
    judge_direct(cell, fd, to_page, data);
}

static void aio_read(struct pc_fp_cell *cell)
{
    aio(cell, true);
}

static void aio_write(struct pc_fp_cell *cell)
{
    aio(cell, false);
}

/* io_submit's own argument, and its result: copies, here since this is where aio is. */
static void aio_iocb(struct pc_fp_cell *cell)
{
    struct iocb *list[] = {(struct iocb *)(void *)(cell->page + PC_FP_AT_IOCB)};
    aio_context_t context = 0;
    struct io_event event = {0};
    int fd = pc_fp_plain_file(cell);

    if (fd < 0)
        return;
    if (syscall(SYS_io_setup, 4, &context) || dup3(fd, PC_FP_FD, O_CLOEXEC) < 0) {
        pc_fp_unavailable(cell, errno, "io_setup");
        return;
    }
    PC_FP_ACT(cell, syscall(SYS_io_submit, context, 1, list));
    if (!pc_fp_succeeded(cell))
        return;
    if (syscall(SYS_io_getevents, context, 1, 1, &event, NULL) != 1 || event.res != 64)
        pc_fp_wrong(cell, "the transfer was not that of the iocb");
    else
        pc_fp_verify(cell, PC_FP_SCRATCH + PC_FP_IN_DATA, 0, 64);
}

static void aio_events(struct pc_fp_cell *cell)
{
    struct iocb iocb = {.aio_data = 4711, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_nbytes = 64,
                        .aio_buf = (uintptr_t)(PC_FP_SCRATCH + PC_FP_IN_DATA)}, *list[] = {&iocb};
    struct io_event expected = {.data = 4711, .obj = (uintptr_t)&iocb, .res = 64};
    aio_context_t context = 0;
    int fd = pc_fp_plain_file(cell);

    if (fd < 0)
        return;
    iocb.aio_fildes = (uint32_t)fd;
    if (syscall(SYS_io_setup, 4, &context) || syscall(SYS_io_submit, context, 1, list) != 1) {
        pc_fp_unavailable(cell, errno, "io_setup");
        return;
    }
    PC_FP_ACT(cell, syscall(SYS_io_getevents, context, 1, 1, cell->page + PC_FP_AT_OUT, NULL));
    pc_fp_check_value(cell, 1);
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, &expected, PC_FP_AT_OUT, sizeof(expected));
}

/* ---- pipes that take pages ---- */

static void vmsplice_out(struct pc_fp_cell *cell, unsigned flags)
{
    struct iovec vector = {cell->page, PC_FP_BYTES};
    uint8_t got[PC_FP_BYTES];
    int fds[2];

    if (pipe2(fds, O_CLOEXEC)) {
        pc_fp_unavailable(cell, errno, "pipe");
        return;
    }
    PC_FP_ACT(cell, syscall(SYS_vmsplice, fds[1], &vector, 1, flags));
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (!pc_fp_succeeded(cell))
        return;
    if (read(fds[0], got, sizeof(got)) != sizeof(got))
        pc_fp_wrong(cell, "the pipe has not the page");
    else
        pc_fp_verify(cell, got, 0, sizeof(got));
}

static void vmsplice_to_pipe(struct pc_fp_cell *cell)
{
    vmsplice_out(cell, 0);
}

static void vmsplice_gift(struct pc_fp_cell *cell)
{
    vmsplice_out(cell, SPLICE_F_GIFT);
}

static void vmsplice_from_pipe(struct pc_fp_cell *cell)
{
    static uint8_t data[PC_FP_BYTES];
    struct iovec vector = {cell->page + PC_FP_AT_OUT, 512};
    int fds[2];

    other_content(data);
    if (pipe2(fds, O_CLOEXEC) || write(fds[1], data, 512) != 512) {
        pc_fp_unavailable(cell, errno, "pipe");
        return;
    }
    PC_FP_ACT(cell, syscall(SYS_vmsplice, fds[0], &vector, 1, 0));
    pc_fp_check_value(cell, 512);
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, data, PC_FP_AT_OUT, 512);
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
    pc_fp_verify_page(cell, NULL, 0, 0);
}

static void lock_page(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_mlock, cell->page, cell->page_bytes));
    verify_present(cell);
}

static void lock_page_on_fault(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, syscall(SYS_mlock2, cell->page, cell->page_bytes, MLOCK_ONFAULT));
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, NULL, 0, 0);
}

static void populate(struct pc_fp_cell *cell, int advice)
{
    PC_FP_ACT(cell, syscall(SYS_madvise, cell->page, cell->page_bytes, advice));
    if (cell->shared->result.error == EINVAL)
        pc_fp_unavailable(cell, EINVAL, "MADV_POPULATE (Linux 5.14)");
    verify_present(cell);
}

static void populate_read(struct pc_fp_cell *cell)
{
    populate(cell, MADV_POPULATE_READ);
}

static void populate_write(struct pc_fp_cell *cell)
{
    populate(cell, MADV_POPULATE_WRITE);
}

static void node_of_page(struct pc_fp_cell *cell)
{
    int node = -1;

    PC_FP_ACT(cell, syscall(SYS_get_mempolicy, &node, NULL, 0, cell->page, MPOL_F_NODE | MPOL_F_ADDR));
    if (cell->shared->result.error == ENOSYS)
        pc_fp_unavailable(cell, ENOSYS, "get_mempolicy");
    verify_present(cell);
}

static const struct pc_fp_operation operations[] = {
    {{"pin.odirect_read", "pin", "pread of an O_DIRECT file into the page", EVERYWHERE, PC_FP_WRITES | PC_FP_NEEDS_DIR},
     odirect_read},
    {{"pin.odirect_write", "pin", "pwrite of the page to an O_DIRECT file", EVERYWHERE, PC_FP_NEEDS_DIR}, odirect_write},
    {{"pin.aio_read", "pin", "io_submit of a read by O_DIRECT", EVERYWHERE, PC_FP_WRITES | PC_FP_NEEDS_DIR}, aio_read},
    {{"pin.aio_write", "pin", "io_submit of a write by O_DIRECT", EVERYWHERE, PC_FP_NEEDS_DIR}, aio_write},
    {{"copy.aio_iocb", "copy", "io_submit: struct iocb, read and written", EVERYWHERE, PC_FP_WRITES}, aio_iocb},
    {{"copy.aio_events", "copy", "io_getevents: the events", EVERYWHERE, PC_FP_WRITES}, aio_events},
    {{"pin.vmsplice_to_pipe", "pin", "vmsplice: the pipe refers to the page", EVERYWHERE, 0}, vmsplice_to_pipe},
    {{"pin.vmsplice_gift", "pin", "vmsplice with SPLICE_F_GIFT: the pipe gets the page", EVERYWHERE, 0}, vmsplice_gift},
    {{"pin.vmsplice_from_pipe", "pin", "vmsplice from a pipe: a copy, for all its name", EVERYWHERE, PC_FP_WRITES},
     vmsplice_from_pipe},
    {{"pin.mlock", "pin", "mlock brings the page", EVERYWHERE, 0}, lock_page},
    {{"pin.mlock_onfault", "pin", "mlock2 with MLOCK_ONFAULT waits for others to bring it", EVERYWHERE, PC_FP_NOFAULT},
     lock_page_on_fault},
    {{"pin.populate_read", "pin", "MADV_POPULATE_READ", EVERYWHERE, 0}, populate_read},
    {{"pin.populate_write", "pin", "MADV_POPULATE_WRITE", EVERYWHERE, PC_FP_WRITES}, populate_write},
    {{"pin.get_mempolicy", "pin", "get_mempolicy asks for the node of the page, and brings it for that", EVERYWHERE, 0},
     node_of_page},
};

const struct pc_fp_class pc_fp_pin = {operations, PC_ARRAY_LENGTH(operations)};
