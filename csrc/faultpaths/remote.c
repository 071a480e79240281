/* SPDX-License-Identifier: Apache-2.0
 *
 * Access to a process's memory by way of its mm: by /proc/PID/mem, ptrace and process_vm_readv. Whoever asks is the one that
 * waits, while the event goes to the userfaultfd of the process that is asked. That is the cell's child, whose number is cell->tid.
 */
#include <fcntl.h>
#include <linux/prctl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faultpaths/fp.h"

static void not_allowed(struct pc_fp_cell *cell, const char *what)
{
    PC_FP_UNAVAILABLE_IF(cell, what, EPERM, EACCES, ENOSYS);
}

/* ---- /proc/PID/mem ---- */

/* The error of /proc/PID/mem for memory that cannot be had is EIO. */
static void access_mem(struct pc_fp_cell *cell, bool write)
{
    off_t at = (off_t)(uintptr_t)(cell->page + PC_FP_AT_OUT);
    uint8_t got[PC_FP_SMALL];
    char path[32];
    int fd;

    (void)snprintf(path, sizeof(path), "/proc/%d/mem", cell->tid);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (!pc_fp_made(cell, fd, path))
        return;
    PC_FP_ACT(cell, write ? pwrite(fd, pc_fp_other(), PC_FP_SMALL, at) : pread(fd, got, PC_FP_SMALL, at));
    pc_fp_check_value(cell, PC_FP_SMALL);
    if (!write)
        pc_fp_verify(cell, got, PC_FP_AT_OUT, PC_FP_SMALL);
}

PC_FP_VARIANT(read_mem, access_mem, false)
PC_FP_VARIANT(write_mem, access_mem, true)

/* `bytes` of pc_fp_other are at PC_FP_AT_OUT afterwards. */
static void by_itself(struct pc_fp_cell *cell, void (*act)(struct pc_fp_cell *cell), uint64_t bytes)
{
    act(cell);
    if (bytes)
        pc_fp_verify_out(cell, pc_fp_other(), bytes);
}

static void by_another(struct pc_fp_cell *cell, void (*act)(struct pc_fp_cell *cell), uint64_t bytes)
{
    pc_fp_in_process(cell, act);
    if (bytes)
        pc_fp_verify_out(cell, pc_fp_other(), bytes);
}

PC_FP_VARIANT(remote_mem_read_own, by_itself, read_mem, 0)
PC_FP_VARIANT(remote_mem_write_own, by_itself, write_mem, PC_FP_SMALL)
PC_FP_VARIANT(remote_mem_read, by_another, read_mem, 0)
PC_FP_VARIANT(remote_mem_write, by_another, write_mem, PC_FP_SMALL)

/* ---- ptrace: the thread that runs the operation is stopped by its own child, which it waits for ---- */

static void trace(struct pc_fp_cell *cell, bool write)
{
    uint64_t word = 0;
    int status;

    if (ptrace(PTRACE_SEIZE, cell->tid, NULL, NULL) || ptrace(PTRACE_INTERRUPT, cell->tid, NULL, NULL) ||
        waitpid(cell->tid, &status, __WALL) != cell->tid) {
        pc_fp_unavailable(cell, errno, "ptrace");
        return;
    }
    if (write) {
        memcpy(&word, pc_fp_other(), sizeof(word));
        PC_FP_ACT(cell, syscall(SYS_ptrace, PTRACE_POKEDATA, cell->tid, cell->page + PC_FP_AT_OUT, word));
    } else {
        PC_FP_ACT(cell, syscall(SYS_ptrace, PTRACE_PEEKDATA, cell->tid, cell->page + PC_FP_AT_OUT, &word));
        pc_fp_verify(cell, &word, PC_FP_AT_OUT, sizeof(word));
    }
    (void)ptrace(PTRACE_DETACH, cell->tid, NULL, NULL);
}

PC_FP_VARIANT(peek, trace, false)
PC_FP_VARIANT(poke, trace, true)
PC_FP_VARIANT(remote_ptrace_peek, by_another, peek, 0)
PC_FP_VARIANT(remote_ptrace_poke, by_another, poke, sizeof(uint64_t))

/* ---- process_vm_readv, process_vm_writev ---- */

/* The page is the memory that is asked for. */
static void vm_read(struct pc_fp_cell *cell)
{
    uint8_t got[PC_FP_SMALL];
    struct iovec local = {got, PC_FP_SMALL}, remote = {cell->page + PC_FP_AT_OUT, PC_FP_SMALL};

    PC_FP_ACT(cell, syscall(SYS_process_vm_readv, cell->tid, &local, 1, &remote, 1, 0));
    not_allowed(cell, "process_vm_readv");
    pc_fp_check_value(cell, PC_FP_SMALL);
    pc_fp_verify(cell, got, PC_FP_AT_OUT, PC_FP_SMALL);
}

static void vm_write(struct pc_fp_cell *cell)
{
    struct iovec local = {(void *)(uintptr_t)pc_fp_other(), PC_FP_SMALL}, remote = {cell->page + PC_FP_AT_OUT, PC_FP_SMALL};

    PC_FP_ACT(cell, syscall(SYS_process_vm_writev, cell->tid, &local, 1, &remote, 1, 0));
    not_allowed(cell, "process_vm_writev");
    pc_fp_check_value(cell, PC_FP_SMALL);
}

PC_FP_VARIANT(pin_process_vm_readv_remote, by_itself, vm_read, 0)
PC_FP_VARIANT(pin_process_vm_writev_remote, by_itself, vm_write, PC_FP_SMALL)
PC_FP_VARIANT(remote_process_vm_readv, by_another, vm_read, 0)
PC_FP_VARIANT(remote_process_vm_writev, by_another, vm_write, PC_FP_SMALL)

/* The page is the caller's own end. */
static void copy_process_vm_readv_local(struct pc_fp_cell *cell)
{
    struct iovec local = {cell->page + PC_FP_AT_OUT, 64}, remote = {PC_FP_SCRATCH + PC_FP_IN_DATA, 64};

    PC_FP_ACT(cell, syscall(SYS_process_vm_readv, getpid(), &local, 1, &remote, 1, 0));
    not_allowed(cell, "process_vm_readv");
    pc_fp_check_value(cell, 64);
    pc_fp_verify_out(cell, PC_FP_SCRATCH + PC_FP_IN_DATA, 64);
}

static void copy_process_vm_writev_local(struct pc_fp_cell *cell)
{
    struct iovec local = {cell->page + PC_FP_AT_OUT, PC_FP_SMALL}, remote = {PC_FP_SCRATCH + PC_FP_IN_FREE, PC_FP_SMALL};

    PC_FP_ACT(cell, syscall(SYS_process_vm_writev, getpid(), &local, 1, &remote, 1, 0));
    not_allowed(cell, "process_vm_writev");
    pc_fp_check_value(cell, PC_FP_SMALL);
    pc_fp_verify(cell, PC_FP_SCRATCH + PC_FP_IN_FREE, PC_FP_AT_OUT, PC_FP_SMALL);
}

/* ---- /proc/PID/cmdline ---- */

static void read_cmdline(struct pc_fp_cell *cell)
{
    char path[32], got[64];
    int fd;

    (void)snprintf(path, sizeof(path), "/proc/%d/cmdline", cell->tid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (!pc_fp_made(cell, fd, path))
        return;
    PC_FP_ACT(cell, read(fd, got, 14));
    if (pc_fp_succeeded(cell) && !cell->shared->result.value) {
        pc_fp_lost(cell, "the file is empty, without an error");
        cell->shared->result.error = EIO;
        return;
    }
    pc_fp_check_value(cell, 14);
    pc_fp_verify(cell, got, PC_FP_AT_STRING, 14);
}

/* Moves this process's arguments to `at`, for which the kernel wants to have all the other fields too. 0 or -errno. */
static int move_arguments(uintptr_t at, uintptr_t end)
{
    struct prctl_mm_map map = {.exe_fd = (uint32_t)-1, .brk = (uintptr_t)sbrk(0)};
    char text[2048], *field, *rest = NULL;
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    int number = 2; /* of the name, which may have spaces in it */
    const struct {
        int number; /* proc_pid_stat(5) */
        __u64 *to;
    } fields[] = {{26, &map.start_code}, {27, &map.end_code},  {28, &map.start_stack}, {45, &map.start_data},
                  {46, &map.end_data},   {47, &map.start_brk}, {50, &map.env_start},   {51, &map.env_end}};

    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return -ENODATA;
    text[n] = '\0';
    field = strrchr(text, ')');
    if (!field)
        return -ENODATA;
    for (field = strtok_r(field + 1, " \n", &rest); field; field = strtok_r(NULL, " \n", &rest)) {
        number++;
        for (size_t i = 0; i < PC_ARRAY_LENGTH(fields); i++)
            if (fields[i].number == number)
                *fields[i].to = strtoull(field, NULL, 10);
    }
    map.arg_start = at;
    map.arg_end = end;
    return syscall(SYS_prctl, PR_SET_MM, PR_SET_MM_MAP, &map, sizeof(map), 0) ? -errno : 0;
}

/* What `ps` does to everybody. */
static void remote_cmdline(struct pc_fp_cell *cell)
{
    uintptr_t at = (uintptr_t)(cell->page + PC_FP_AT_STRING);
    int rc = move_arguments(at, at + 14);

    if (rc) {
        pc_fp_unavailable(cell, -rc, "PR_SET_MM_MAP");
        return;
    }
    pc_fp_in_process(cell, read_cmdline);
}

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(remote, mem_read_own, NOTHING, 0, "read of /proc/self/mem: access_remote_vm"),
    PC_FP_ROW(remote, mem_write_own, NOTHING, PC_FP_WRITES, "write to /proc/self/mem"),
    PC_FP_ROW(remote, mem_read, NOTHING, 0, "another process reads /proc/PID/mem"),
    PC_FP_ROW(remote, mem_write, NOTHING, PC_FP_WRITES, "another process writes /proc/PID/mem"),
    PC_FP_ROW(remote, ptrace_peek, NOTHING, 0, "a debugger's PTRACE_PEEKDATA"),
    PC_FP_ROW(remote, ptrace_poke, NOTHING, PC_FP_WRITES, "a debugger's PTRACE_POKEDATA"),
    /* Of anonymous memory only: what a file is behind is refused since a FUSE could stop every `ps` (FOLL_ANON, 4.17). */
    PC_FP_ROW_OF(remote, cmdline, PC_FP_ALL_MODES, 1u << PC_FP_ANON, NOTHING, 0,
              "another process (ps) reads /proc/PID/cmdline, the arguments being in the page"),
    PC_FP_ROW(pin, process_vm_readv_remote, NOTHING, 0, "process_vm_readv, the page is the remote end: get_user_pages_remote"),
    PC_FP_ROW(pin, process_vm_writev_remote, NOTHING, PC_FP_WRITES, "process_vm_writev, the page is the remote end"),
    PC_FP_ROW(copy, process_vm_readv_local, NOTHING, PC_FP_WRITES, "process_vm_readv, the page is the local end: a copy"),
    PC_FP_ROW(copy, process_vm_writev_local, NOTHING, 0, "process_vm_writev, the page is the local end: a copy"),
    PC_FP_ROW(remote, process_vm_readv, NOTHING, 0, "process_vm_readv by another process"),
    PC_FP_ROW(remote, process_vm_writev, NOTHING, PC_FP_WRITES, "process_vm_writev by another process"),
};

const struct pc_fp_class pc_fp_remote = {operations, PC_ARRAY_LENGTH(operations)};
