/* SPDX-License-Identifier: Apache-2.0
 *
 * One cell: its child process, the watchdog, and the verdict.
 *
 * Everything that may hang on a fault is in the child, which is the leader of a process group of its own. The caller waits for
 * it with a deadline, then ends the group by SIGKILL. For as long as that takes the caller is a child subreaper, so that what the
 * child has started (an executed program, a reader of its memory) is reaped too and cannot outlive the cell.
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faultpaths/cell.h"

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

#define REAP_MS 2000

/* ---- the child ---- */

static struct pc_fp_cell *signalled_cell; /* of the child, for its signal handlers, which get no argument */

static void on_fatal(int number, siginfo_t *info, void *context)
{
    struct pc_fp_shared *shared = signalled_cell->shared;

    (void)context;
    if (atomic_load(&shared->began) && !atomic_load(&shared->ended)) {
        shared->result.signal_number = number;
        shared->result.signal_code = info->si_code;
        atomic_store(&shared->end_ns, pc_now_ns());
        atomic_store(&shared->signalled, 1);
        _exit(0);
    }
    (void)signal(number, SIG_DFL); /* comes back and ends the process */
}

static void on_usr1(int number)
{
    (void)number;
    atomic_store(&signalled_cell->shared->handler_ran, 1);
}

static bool take_signals(struct pc_fp_cell *cell)
{
    static const int fatal[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction action = {.sa_sigaction = on_fatal, .sa_flags = SA_SIGINFO | SA_ONSTACK}, usr1 = {.sa_handler = on_usr1};
    stack_t stack = {.ss_size = 0x10000};
    sigset_t none;

    signalled_cell = cell;
    stack.ss_sp = mmap(NULL, stack.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (stack.ss_sp == MAP_FAILED || sigaltstack(&stack, NULL))
        return pc_fp_unavailable(cell, errno, "sigaltstack");
    for (size_t i = 0; i < PC_ARRAY_LENGTH(fatal); i++)
        (void)sigaction(fatal[i], &action, NULL);
    (void)sigaction(SIGUSR1, &usr1, NULL);
    (void)signal(SIGINT, SIG_DFL);
    (void)signal(SIGTERM, SIG_DFL);
    (void)signal(SIGCHLD, SIG_DFL);
    (void)signal(SIGPIPE, SIG_IGN);
    sigemptyset(&none);
    (void)sigprocmask(SIG_SETMASK, &none, NULL);
    return true;
}

static bool hand_over(struct pc_fp_cell *cell)
{
    static const int kinds[] = {[PC_FP_ANON] = PC_MEMORY_ANON, [PC_FP_MEMFD] = PC_MEMORY_MEMFD,
                                [PC_FP_MEMFD_PRIVATE] = PC_MEMORY_ANON, [PC_FP_HUGETLB] = PC_MEMORY_HUGETLB};
    struct pc_fp_hand_over message = {.address = (uintptr_t)cell->page, .bytes = cell->page_bytes,
                                      .page_bytes = cell->page_bytes, .kind = kinds[cell->spec->backing],
                                      .pid = getpid()};
    struct iovec vector = {&message, sizeof(message)};
    union {
        char bytes[CMSG_SPACE(2 * sizeof(int))];
        struct cmsghdr header;
    } control = {.bytes = {0}};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control};
    int fds[2] = {cell->uffd, cell->memfd}, count = message.kind == PC_MEMORY_ANON ? 1 : 2;
    char go;
    ssize_t n;

    header.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    control.header.cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
    memcpy(CMSG_DATA(&control.header), fds, (size_t)count * sizeof(int));
    if (sendmsg(cell->spec->hand_over_fd, &header, MSG_NOSIGNAL) != sizeof(message))
        return pc_fp_unavailable(cell, errno, "the page could not be handed over");
    do
        n = recv(cell->spec->hand_over_fd, &go, 1, 0);
    while (n < 0 && errno == EINTR);
    if (n != 1)
        pc_fp_unavailable(cell, n < 0 ? errno : ENOTCONN, "the page was handed over, but no answer came");
    return n == 1;
}

static void run_operation(struct pc_fp_cell *cell)
{
    struct pc_fp_handler handler;
    int rc;

    cell->tid = (pid_t)syscall(SYS_gettid);
    rc = pc_fp_map_scratch();
    if (rc) {
        pc_fp_unavailable(cell, -rc, "memory at a fixed address");
        return;
    }
    if (!take_signals(cell) || !pc_fp_region_open(cell))
        return;
    if (cell->measure == PC_FP_MEASURE_LOCKS && pc_fp_locks_start(cell, &cell->locks))
        return;
    if (cell->spec->hand_over_fd >= 0 && !hand_over(cell))
        return;
    rc = pc_fp_handler_start(&handler, cell);
    if (rc) {
        pc_fp_unavailable(cell, -rc, "pthread_create");
        return;
    }
    if (pc_fp_make(cell, cell->operation->on, cell->fds))
        cell->operation->run(cell);
    if (cell->spec->mode == PC_FP_WP || cell->spec->mode == PC_FP_WP_ASYNC)
        cell->shared->result.written = pc_fp_region_written(cell);
    pc_fp_handler_stop(&handler);
}

static _Noreturn void be_child(struct pc_fp_cell *cell, pid_t parent)
{
    struct pc_fp_spec spec = *cell->spec;

    (void)setpgid(0, 0);
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    if (spec.hand_over_fd >= 0) /* out of the way of PC_FP_FD, and not for programs */
        spec.hand_over_fd = fcntl(spec.hand_over_fd, F_DUPFD_CLOEXEC, PC_FP_FD + 1);
    cell->spec = &spec;
    run_operation(cell);
    atomic_store(&cell->shared->finished, 1);
    _exit(0);
}

/* ---- the parent ---- */

/* Whether all of the group is gone and reaped. Its leader has ended or was killed and is not reaped yet, so that the number
 * still means this group. */
static bool end_group(pid_t leader, int *status)
{
    uint64_t end = pc_now_ns() + REAP_MS * 1000000ull;

    (void)kill(-leader, SIGKILL); /* nothing of it can fork any more */
    for (;;) {
        int one;
        pid_t pid = waitpid(-leader, &one, WNOHANG | __WALL);

        if (pid == leader) {
            *status = one;
        } else if (pid < 0 && errno == ECHILD) {
            return true;
        } else if (pid == 0) {
            if (pc_now_ns() > end)
                return false;
            (void)usleep(100);
        }
    }
}

/* Waits for the end of the leader without reaping it. False: it has not ended. */
static bool wait_ended(int pidfd, uint64_t end_ns, const _Atomic uint32_t *or_until)
{
    for (;;) {
        struct pollfd polled = {.fd = pidfd, .events = POLLIN};
        uint64_t now = pc_now_ns();
        int ms = now >= end_ns ? 0 : (int)((end_ns - now) / 1000000 + 1);

        if (poll(&polled, 1, or_until && ms > 1 ? 1 : ms) > 0)
            return true;
        if (!ms || (or_until && atomic_load(or_until)))
            return false;
    }
}

/* Kills a child that waits on its page, and tells how long it takes until it and all of its group are reaped. In the meantime
 * the userfaultfd is open here: else its last descriptor would be closed by the dying process, which lets every waiter go. */
static bool measure_kill(int pidfd, pid_t child, struct pc_fp_shared *shared, uint64_t timeout_ns, int *status)
{
    struct pc_fp_result *result = &shared->result;
    int uffd = (int)syscall(SYS_pidfd_getfd, pidfd, atomic_load(&shared->uffd), 0);
    uint64_t begin = pc_now_ns();
    bool gone;

    (void)kill(-child, SIGKILL);
    (void)wait_ended(pidfd, begin + timeout_ns, NULL);
    gone = end_group(child, status);
    if (uffd >= 0) {
        result->kill_ns = pc_now_ns() - begin;
        result->killed = gone;
        result->kill_measured = 1;
        close(uffd);
    }
    return gone || end_group(child, status);
}

static void judge(struct pc_fp_shared *shared, bool late, int status, bool handed_over)
{
    struct pc_fp_result *result = &shared->result;
    uint64_t from = atomic_load(&shared->first_event_ns), end = atomic_load(&shared->end_ns);

    if (!from)
        from = atomic_load(&shared->begin_ns);
    if (from && end > from)
        result->waited_ns = end - from;
    if (atomic_load(&shared->unavailable))
        result->outcome = PC_FP_UNAVAILABLE;
    else if (late) {
        result->outcome = PC_FP_HUNG;
        if (!result->text[0])
            (void)snprintf(result->text, sizeof(result->text), "%s",
                           !atomic_load(&shared->began)   ? "its preparation did not end"
                           : !atomic_load(&shared->ended) ? "it did not return"
                                                          : "it returned, but what followed did not end");
    } else if (atomic_load(&shared->signalled))
        result->outcome = PC_FP_SIGNALLED;
    else if (!atomic_load(&shared->finished)) {
        bool fault = WIFSIGNALED(status) && (WTERMSIG(status) == SIGSEGV || WTERMSIG(status) == SIGBUS);

        result->outcome = PC_FP_CRASHED;
        if (fault && atomic_load(&shared->began) && !atomic_load(&shared->ended)) {
            result->outcome = PC_FP_SIGNALLED; /* the kernel lets no handler have it, as where the signal's frame failed */
            result->signal_number = WTERMSIG(status);
            (void)snprintf(result->text, sizeof(result->text), "the signal ended the process, no handler could run");
        } else if (WIFSIGNALED(status))
            (void)snprintf(result->text, sizeof(result->text), "its process was ended by SIG%s",
                           sigabbrev_np(WTERMSIG(status)));
        else
            (void)snprintf(result->text, sizeof(result->text), "its process ended with status %d", WEXITSTATUS(status));
    } else if (atomic_load(&shared->early)) {
        result->outcome = PC_FP_CRASHED;
        (void)snprintf(result->text, sizeof(result->text), "the page was touched before the operation began");
    } else if (!atomic_load(&shared->ended)) {
        result->outcome = PC_FP_CRASHED;
        (void)snprintf(result->text, sizeof(result->text), "it was never tried");
    } else if (result->error)
        result->outcome = PC_FP_REFUSED;
    else if (atomic_load(&shared->wrong))
        result->outcome = PC_FP_WRONG;
    else if (atomic_load(&shared->retried))
        result->outcome = PC_FP_RETRIED;
    else if (handed_over ? atomic_load(&shared->saw_wait) : atomic_load(&shared->given_in_time))
        result->outcome = PC_FP_BLOCKED;
    else
        result->outcome = PC_FP_PASSED;
}

static int run_child(const struct pc_fp_spec *spec, uint32_t measure, struct pc_fp_result *result)
{
    struct pc_fp_shared *shared =
        mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct pc_fp_cell *cell = calloc(1, sizeof(*cell));
    uint64_t timeout_ns = spec->timeout_ms * 1000000ull;
    pid_t parent = getpid(), child;
    int rc = 0, pidfd, status = 0;
    bool late, gone;
    char path[300];

    if (shared == MAP_FAILED || !cell) {
        if (shared != MAP_FAILED)
            (void)munmap(shared, sizeof(*shared));
        free(cell);
        return -ENOMEM;
    }
    shared->result.event_offset = -1;
    atomic_store(&shared->uffd, -1);
    *cell = (struct pc_fp_cell){.spec = spec, .operation = pc_fp_operation(spec->operation), .shared = shared,
                                .memfd = -1, .uffd = -1, .measure = measure};
    child = fork();
    if (child < 0) {
        rc = -errno;
        goto out;
    }
    if (!child)
        be_child(cell, parent);
    (void)setpgid(child, child); /* here too: the two race */
    pidfd = (int)syscall(SYS_pidfd_open, child, 0);
    if (pidfd < 0) {
        rc = -errno;
        (void)end_group(child, &status);
        goto out;
    }
    late = !wait_ended(pidfd, pc_now_ns() + timeout_ns, measure == PC_FP_MEASURE_KILL ? &shared->blocked : NULL);
    if (late && measure == PC_FP_MEASURE_KILL && atomic_load(&shared->blocked))
        gone = measure_kill(pidfd, child, shared, timeout_ns, &status);
    else
        gone = end_group(child, &status);
    close(pidfd);
    if (cell->operation->about.flags & PC_FP_NEEDS_DIR) {
        /* The child may have been killed before it did. */
        pc_fp_name_direct_file(spec, child, path, sizeof(path));
        (void)unlink(path);
    }
    judge(shared, late, status, spec->hand_over_fd >= 0);
    *result = shared->result;
    if (!gone)
        rc = -EBUSY;
out:
    (void)munmap(shared, sizeof(*shared));
    free(cell);
    return rc;
}

/* The runs that measure. The cell's own result stays, but for the fields that each is for. */
static int measure_more(const struct pc_fp_spec *spec, struct pc_fp_result *result)
{
#define FIELDS(first, behind) offsetof(struct pc_fp_result, first), offsetof(struct pc_fp_result, behind)
    static const struct {
        uint32_t measure;
        size_t from, to;
    } runs[] = {{PC_FP_MEASURE_SIGNAL, FIELDS(signal_measured, kill_measured)},
                {PC_FP_MEASURE_KILL, FIELDS(kill_measured, locks_measured)},
                {PC_FP_MEASURE_LOCKS, FIELDS(locks_measured, text)}};
    int rc = 0;

    for (size_t i = 0; !rc && i < PC_ARRAY_LENGTH(runs); i++) {
        struct pc_fp_result other = {0};

        if (!(spec->measure & runs[i].measure))
            continue;
        rc = run_child(spec, runs[i].measure, &other);
        memcpy((char *)result + runs[i].from, (char *)&other + runs[i].from, runs[i].to - runs[i].from);
    }
    return rc;
}

int pc_faultpath_run(const struct pc_fp_spec *spec, struct pc_fp_result *result)
{
    const struct pc_fp_operation *operation = pc_fp_operation(spec->operation);
    int rc, was_subreaper = 0;

    memset(result, 0, sizeof(*result));
    result->event_offset = -1;
    if (!operation || spec->mode < 0 || spec->mode >= PC_FP_MODES || spec->backing < 0 || spec->backing >= PC_FP_BACKINGS ||
        !spec->timeout_ms || (spec->hand_over_fd >= 0 && (spec->mode != PC_FP_MISSING || spec->backing == PC_FP_GUEST_MEMFD || spec->measure)))
        return -EINVAL;
    if (!(operation->about.modes & 1u << spec->mode) || !(operation->about.backings & 1u << spec->backing)) {
        result->outcome = PC_FP_UNAVAILABLE;
        (void)snprintf(result->text, sizeof(result->text), "the operation makes no sense in this mode on this memory");
        return 0;
    }
    (void)prctl(PR_GET_CHILD_SUBREAPER, &was_subreaper);
    (void)prctl(PR_SET_CHILD_SUBREAPER, 1);
    rc = run_child(spec, 0, result);
    if (!rc && result->events && result->outcome != PC_FP_UNAVAILABLE && result->outcome != PC_FP_HUNG)
        rc = measure_more(spec, result);
    (void)prctl(PR_SET_CHILD_SUBREAPER, (unsigned long)was_subreaper);
    return rc;
}
