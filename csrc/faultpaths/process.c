/* SPDX-License-Identifier: Apache-2.0
 *
 * Copies at the beginning and at the end of a program: execve, and what the kernel does for a thread that exits. They happen in
 * a process that shares this one's memory, as after vfork: its page is this page.
 */
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faultpaths/fp.h"

#define STACK_BYTES 0x10000

struct sharer {
    struct pc_fp_cell *cell;
    int (*run)(void *argument); /* returns the exit status */
    void *argument;
    pid_t parent;
};

static int begin_sharer(void *argument)
{
    const struct sharer *sharer = argument;

    /* It holds the userfaultfd open too: with no handler left to give the page it would wait for ever. */
    if (syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) || syscall(SYS_getppid) != sharer->parent)
        (void)syscall(SYS_exit_group, 1);
    atomic_store(&sharer->cell->shared->other_pid, (int32_t)syscall(SYS_getpid));
    /* By system call: a sanitizer's _exit would look for this stack's end. */
    (void)syscall(SYS_exit_group, sharer->run(sharer->argument));
    return 0;
}

/* Waits for its end. The wait status, or -1 having said why there is none. CLONE_VFORK, since it has this thread's TLS. */
static int run_sharer(struct pc_fp_cell *cell, int (*run)(void *argument), void *argument, void *clear_tid)
{
    struct sharer sharer = {.cell = cell, .run = run, .argument = argument, .parent = getpid()};
    int flags = CLONE_VM | CLONE_VFORK | SIGCHLD | (clear_tid ? CLONE_CHILD_CLEARTID : 0), status = 0;
    uint8_t *stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pid_t child = -1;

    if (stack != MAP_FAILED)
        child = clone(begin_sharer, stack + STACK_BYTES, flags, &sharer, NULL, NULL, clear_tid);
    if (child < 0) {
        pc_fp_unavailable(cell, errno, "clone");
        return -1;
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return status;
}

/* ---- execve ---- */

struct program {
    const char *path;
    void *argv, *envp;
    int out;
};

static int execute(void *argument)
{
    const struct program *program = argument;

    if (syscall(SYS_dup3, program->out, 1, 0) < 0)
        return 126;
    (void)syscall(SYS_execve, program->path, program->argv, program->envp);
    return errno == EFAULT ? 100 : 127;
}

static void run_program(struct pc_fp_cell *cell, const char *path, void *argv, void *envp, const char *says)
{
    struct program program = {.path = path, .argv = argv, .envp = envp};
    size_t length = strlen(says);
    char got[256] = "";
    int fds[2], status;

    if (access(path, X_OK) || pipe2(fds, O_CLOEXEC)) {
        pc_fp_unavailable(cell, errno, "%s", path);
        return;
    }
    program.out = fds[1];
    pc_fp_begin(cell);
    status = run_sharer(cell, execute, &program, NULL);
    if (status < 0)
        return;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 100)
        pc_fp_end_code(cell, -EFAULT);
    else if (WIFEXITED(status) && WEXITSTATUS(status) >= 126)
        pc_fp_end_code(cell, -ENOEXEC);
    else
        pc_fp_end_code(cell, 0);
    close(fds[1]);
    if (!pc_fp_succeeded(cell))
        return;
    if (WIFSIGNALED(status)) {
        cell->shared->result.signal_number = WTERMSIG(status);
        atomic_store(&cell->shared->signalled, 1);
    } else if (read(fds[0], got, sizeof(got) - 1) < (ssize_t)length || strncmp(got, says, length) != 0)
        pc_fp_wrong(cell, "the program got something else: %.60s", got);
}

static void copy_execve_argv(struct pc_fp_cell *cell)
{
    char *envp[] = {NULL};

    run_program(cell, "/bin/echo", cell->page + PC_FP_AT_ARGV, envp, "NAME=postcopy\n");
}

static void copy_execve_string(struct pc_fp_cell *cell)
{
    char echo[] = "echo", *argv[] = {echo, (char *)cell->page + PC_FP_AT_STRING, NULL}, *envp[] = {NULL};

    run_program(cell, "/bin/echo", argv, envp, "NAME=postcopy\n");
}

static void copy_execve_envp(struct pc_fp_cell *cell)
{
    char env[] = "env", *argv[] = {env, NULL}, *envp[] = {(char *)cell->page + PC_FP_AT_STRING, NULL};

    run_program(cell, "/usr/bin/env", argv, envp, "NAME=postcopy\n");
}

/* ---- exit: the thread that ends cannot return an error ---- */

#define WITHOUT_ERROR ", without an error: a thread that exits does not wait"

static int do_nothing(void *argument)
{
    (void)argument;
    return 0;
}

static void copy_clear_child_tid(struct pc_fp_cell *cell)
{
    int status, word;

    pc_fp_begin(cell);
    status = run_sharer(cell, do_nothing, NULL, cell->page + PC_FP_AT_OUT);
    pc_fp_end_code(cell, status < 0 ? -ECHILD : 0);
    if (!pc_fp_succeeded(cell))
        return;
    memcpy(&word, cell->page + PC_FP_AT_OUT, sizeof(word));
    if (word)
        pc_fp_lost(cell, "the zero was not written" WITHOUT_ERROR);
}

/* A robust list of two locks, of which the first one's entry is in the page: it is the struct iovec there, whose pointer leads
 * to the second one, in the scratch area. That one is marked when the kernel has come past the first. */
#define LOCK_OFFSET 512 /* from an entry to its futex; what is there for the first one does not matter */

static int hold_and_exit(void *argument)
{
    struct robust_list_head *head = argument;
    _Atomic uint32_t *futex = (_Atomic uint32_t *)(void *)(PC_FP_SCRATCH + PC_FP_IN_DATA + LOCK_OFFSET);

    atomic_store(futex, (uint32_t)syscall(SYS_gettid));
    return syscall(SYS_set_robust_list, head, sizeof(*head)) ? errno : 0;
}

static void futex_robust_list(struct pc_fp_cell *cell)
{
    struct robust_list_head *head = (struct robust_list_head *)(void *)(PC_FP_SCRATCH + PC_FP_IN_FREE);
    struct robust_list *second = (struct robust_list *)(void *)(PC_FP_SCRATCH + PC_FP_IN_DATA);
    const _Atomic uint32_t *futex = (const _Atomic uint32_t *)(void *)(PC_FP_SCRATCH + PC_FP_IN_DATA + LOCK_OFFSET);
    int status;

    second->next = &head->list;
    *head = (struct robust_list_head){.list = {.next = (struct robust_list *)(void *)(cell->page + PC_FP_AT_IOVEC)},
                                      .futex_offset = LOCK_OFFSET};
    pc_fp_begin(cell);
    status = run_sharer(cell, hold_and_exit, head, NULL);
    pc_fp_end_code(cell, status < 0 ? -ECHILD : WIFEXITED(status) ? -WEXITSTATUS(status) : 0);
    PC_FP_UNAVAILABLE_IF(cell, "set_robust_list", ENOSYS);
    if (pc_fp_succeeded(cell) && !(atomic_load(futex) & FUTEX_OWNER_DIED))
        pc_fp_lost(cell, "a robust lock stays locked for good" WITHOUT_ERROR);
}

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(copy, execve_argv, NOTHING, 0, "execve: the array of argument pointers"),
    PC_FP_ROW(copy, execve_string, NOTHING, 0, "execve: an argument string, copied to the new stack"),
    PC_FP_ROW(copy, execve_envp, NOTHING, 0, "execve: an environment string"),
    /* No call reports it, only the page shows it: it must be possible to look at the page. */
    PC_FP_ROW_OF(copy, clear_child_tid, PC_FP_COMING_MODES, PC_FP_ALL_BACKINGS, NOTHING, PC_FP_WRITES,
              "exit: the zero at CLONE_CHILD_CLEARTID"),
    PC_FP_ROW(futex, robust_list, NOTHING, 0, "exit: an entry of the list of robust locks"),
};

const struct pc_fp_class pc_fp_process = {operations, PC_ARRAY_LENGTH(operations)};
