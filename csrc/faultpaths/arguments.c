/* SPDX-License-Identifier: Apache-2.0
 *
 * Copies: arguments that a system call finds in the page, and small results that it leaves there. All by syscall(), since the
 * wrappers of the C library, and even more those of a sanitizer, look at some of them in user mode.
 */
#include <fcntl.h>
#include <linux/keyctl.h>
#include <linux/mempolicy.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "faultpaths/fp.h"

#ifndef SO_ATTACH_FILTER
#define SO_ATTACH_FILTER 26
#endif

#define IN(name) (cell->page + PC_FP_AT_##name)
#define SYS(name, ...) syscall(SYS_##name, __VA_ARGS__)
/* One system call, and nothing to look at but that it succeeded. */
#define ACT(name, ...) PC_FP_ACT(cell, SYS(name, __VA_ARGS__))
#define CALL(operation, verify, name, ...) PC_FP_CALL(copy_##operation, verify, name, __VA_ARGS__)

static void verify_zero(struct pc_fp_cell *cell)
{
    pc_fp_check_value(cell, 0);
}

/* ---- vectors and message headers ---- */

static void verify_received(struct pc_fp_cell *cell)
{
    pc_fp_check_value(cell, 64);
    PC_FP_EXPECT(cell, !memcmp(pc_fp_other(), PC_FP_SCRATCH + PC_FP_IN_DATA, 64), "other bytes have been received");
}

static struct msghdr *header_of(struct pc_fp_cell *cell)
{
    static struct msghdr header = {.msg_iovlen = 2};

    header.msg_iov = (struct iovec *)(void *)IN(IOVEC);
    return &header;
}

CALL(sendmsg_msghdr, pc_fp_verify_sent, sendmsg, cell->fds[1], IN(MSGHDR), 0)
CALL(recvmsg_msghdr, verify_received, recvmsg, cell->fds[0], IN(MSGHDR), 0)
CALL(sendmsg_iovec, pc_fp_verify_sent, sendmsg, cell->fds[1], header_of(cell), 0)
CALL(recvmsg_iovec, verify_received, recvmsg, cell->fds[0], header_of(cell), 0)
CALL(writev_iovec, pc_fp_verify_sent, writev, cell->fds[1], IN(IOVEC), 2)
CALL(readv_iovec, verify_received, readv, cell->fds[0], IN(IOVEC), 2)

/* ---- names of files ---- */

static void check_null_device(struct pc_fp_cell *cell, const struct stat *got)
{
    struct stat expected;

    PC_FP_EXPECT(cell, !stat("/dev/null", &expected) && got->st_rdev == expected.st_rdev, "that is not /dev/null");
}

static void copy_open_path(struct pc_fp_cell *cell)
{
    struct stat got = {0};

    ACT(openat, AT_FDCWD, IN(PATH), O_RDONLY | O_CLOEXEC);
    if (pc_fp_succeeded(cell))
        (void)fstat((int)cell->shared->result.value, &got);
    check_null_device(cell, &got);
}

static void copy_stat_path(struct pc_fp_cell *cell)
{
    struct stat got = {0};

    ACT(newfstatat, AT_FDCWD, IN(PATH), &got, 0);
    check_null_device(cell, &got);
}

/* The same call's result elsewhere is what the page must have. */
#define RESULT(class, operation, type, name, ...)                              \
    static void class##_##operation(struct pc_fp_cell *cell)                   \
    {                                                                          \
        type expected, *result = &expected;                                    \
                                                                               \
        memset(&expected, 0, sizeof(expected));                                \
        if (!pc_fp_made(cell, SYS(name, __VA_ARGS__), #name))                  \
            return;                                                            \
        result = (void *)IN(OUT);                                              \
        ACT(name, __VA_ARGS__);                                                \
        pc_fp_verify_out(cell, &expected, sizeof(expected));                   \
    }
RESULT(copy, stat_result, struct stat, newfstatat, AT_FDCWD, "/dev/null", result, 0)
RESULT(copy, statx_result, struct statx, statx, AT_FDCWD, "/dev/null", 0, STATX_BASIC_STATS, result)
RESULT(copy, statfs_result, struct statfs, statfs, "/proc", result)
RESULT(copy, uname_result, struct utsname, uname, result)
RESULT(copy, prlimit_old, struct rlimit, prlimit64, 0, RLIMIT_NOFILE, NULL, result)
RESULT(copy, ioctl_out, int, ioctl, cell->fds[0], FIONREAD, result)
RESULT(copy, mincore_vector, uint8_t, mincore, PC_FP_SCRATCH, PC_FP_BYTES, result)

static void copy_readlink_result(struct pc_fp_cell *cell)
{
    char expected[32];
    int64_t n = SYS(readlinkat, AT_FDCWD, "/proc/self", expected, sizeof(expected));

    if (!pc_fp_made(cell, n, "/proc/self"))
        return;
    ACT(readlinkat, AT_FDCWD, "/proc/self", IN(OUT), sizeof(expected));
    pc_fp_verify_out(cell, expected, (uint64_t)n);
}

static void copy_getcwd_result(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, chdir("/") ? -1 : SYS(getcwd, IN(OUT), 1024));
    pc_fp_verify_out(cell, "/", 2);
}

static void copy_getdents_result(struct pc_fp_cell *cell)
{
    static uint8_t expected[1024];
    int fd = open("/proc/self/ns", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int64_t n = SYS(getdents64, fd, expected, sizeof(expected));

    if (!pc_fp_made(cell, n, "/proc/self/ns") || !pc_fp_made(cell, lseek(fd, 0, SEEK_SET), "lseek"))
        return;
    ACT(getdents64, fd, IN(OUT), sizeof(expected));
    pc_fp_check_value(cell, n);
    /* Not its padding: each entry's end, up to 8 bytes, is left as it was. Names and numbers are what counts. */
    if (pc_fp_succeeded(cell) && pc_fp_page_comes(cell))
        for (int64_t at = 0; at < n;) {
            uint16_t length;

            memcpy(&length, expected + at + 16, sizeof(length));
            PC_FP_EXPECT(cell,
                         !memcmp(expected + at, IN(OUT) + at, 19) &&
                             !strcmp((char *)expected + at + 19, (char *)IN(OUT) + at + 19),
                         "another entry at byte %lld of the directory", (long long)at);
            at += length;
        }
}

/* ---- single values ---- */

static void copy_ioctl_in(struct pc_fp_cell *cell)
{
    ACT(ioctl, cell->fds[0], FIONBIO, IN(ONE));
    PC_FP_EXPECT(cell, fcntl(cell->fds[0], F_GETFL) & O_NONBLOCK, "FIONBIO did not take the 1");
}

static void copy_setsockopt_value(struct pc_fp_cell *cell)
{
    int value = 0;
    socklen_t bytes = sizeof(value);

    ACT(setsockopt, cell->fds[0], SOL_SOCKET, SO_BROADCAST, IN(ONE), sizeof(int));
    PC_FP_EXPECT(cell, !getsockopt(cell->fds[0], SOL_SOCKET, SO_BROADCAST, &value, &bytes) && value == 1,
                 "the option was not set");
}

static void copy_getsockopt_value(struct pc_fp_cell *cell)
{
    const int expected = SOCK_DGRAM;
    socklen_t bytes = sizeof(int);

    ACT(getsockopt, cell->fds[0], SOL_SOCKET, SO_TYPE, IN(OUT), &bytes);
    pc_fp_verify_out(cell, &expected, sizeof(expected));
}

CALL(attach_filter, verify_zero, setsockopt, cell->fds[0], SOL_SOCKET, SO_ATTACH_FILTER, IN(FILTER), 16)

static void copy_bind_address(struct pc_fp_cell *cell)
{
    struct sockaddr_in got = {0};
    socklen_t bytes = sizeof(got);

    ACT(bind, cell->fds[0], IN(SOCKADDR), sizeof(struct sockaddr_in));
    PC_FP_EXPECT(cell, !SYS(getsockname, cell->fds[0], &got, &bytes) && ntohl(got.sin_addr.s_addr) == INADDR_LOOPBACK,
                 "bound to another address");
}

static void copy_getsockname_address(struct pc_fp_cell *cell)
{
    struct sockaddr_in expected = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t bytes = sizeof(expected);

    if (!pc_fp_made(cell, bind(cell->fds[0], (struct sockaddr *)&expected, bytes), "bind") ||
        !pc_fp_made(cell, getsockname(cell->fds[0], (struct sockaddr *)&expected, &bytes), "getsockname"))
        return;
    ACT(getsockname, cell->fds[0], IN(OUT), &bytes);
    pc_fp_verify_out(cell, &expected, sizeof(expected));
}

static void copy_sendfile_offset(struct pc_fp_cell *cell)
{
    const int64_t after = 16 + 64;
    uint8_t got[64];
    int fds[2];

    if (!pc_fp_make(cell, PC_FP_ON_SOCKETS, fds))
        return;
    ACT(sendfile, fds[1], cell->fds[0], IN(OFFSET), 64);
    pc_fp_check_value(cell, 64);
    PC_FP_EXPECT(cell, read(fds[0], got, sizeof(got)) == sizeof(got) && !memcmp(got, cell->content + 16, sizeof(got)),
                 "sent from another offset");
    pc_fp_verify_page(cell, &after, PC_FP_AT_OFFSET, sizeof(after));
}

static void copy_pipe_result(struct pc_fp_cell *cell)
{
    close(cell->fds[0]);
    close(cell->fds[1]);
    ACT(pipe2, IN(OUT), O_CLOEXEC); /* the lowest numbers that are free, thus the same ones */
    pc_fp_verify_out(cell, cell->fds, sizeof(cell->fds));
}

static void copy_eventfd_write(struct pc_fp_cell *cell)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    uint64_t got = 0;

    if (!pc_fp_made(cell, fd, "eventfd"))
        return;
    ACT(write, fd, IN(OUT), 8);
    PC_FP_EXPECT(cell, read(fd, &got, sizeof(got)) == sizeof(got) && !memcmp(&got, cell->content + PC_FP_AT_OUT, sizeof(got)),
                 "the counter got another value");
}

static void copy_procfs_read(struct pc_fp_cell *cell)
{
    char expected[32];
    int fd = open("/proc/sys/kernel/ostype", O_RDONLY | O_CLOEXEC);
    ssize_t n = pread(fd, expected, sizeof(expected), 0);

    if (!pc_fp_made(cell, n, "/proc/sys/kernel/ostype"))
        return;
    ACT(read, fd, IN(OUT), sizeof(expected));
    pc_fp_verify_out(cell, expected, (uint64_t)n);
}

static void check_name(struct pc_fp_cell *cell)
{
    char got[16] = "";

    PC_FP_EXPECT(cell, !SYS(prctl, PR_GET_NAME, got, 0, 0, 0) && !strcmp(got, "NAME=postcopy"), "the name is %s", got);
}

static void copy_procfs_write(struct pc_fp_cell *cell)
{
    int fd = open("/proc/thread-self/comm", O_RDWR | O_CLOEXEC);

    if (!pc_fp_made(cell, fd, "/proc/thread-self/comm"))
        return;
    ACT(write, fd, IN(STRING), 13);
    check_name(cell);
}

CALL(prctl_name, check_name, prctl, PR_SET_NAME, IN(STRING), 0, 0, 0)

static void copy_getrandom(struct pc_fp_cell *cell)
{
    ACT(getrandom, IN(OUT), 256, 0);
    pc_fp_check_value(cell, 256);
    /* 256 random bytes that are the pattern would be a wonder; the rest of the page is the pattern. */
    if (!pc_fp_succeeded(cell) || !pc_fp_page_comes(cell))
        return;
    if (!memcmp(IN(OUT), cell->content + PC_FP_AT_OUT, 256))
        pc_fp_wrong(cell, "no random bytes have arrived");
    pc_fp_verify(cell, cell->page, 0, PC_FP_AT_OUT);
    pc_fp_verify(cell, IN(OUT) + 256, PC_FP_AT_OUT + 256, PC_FP_BYTES - PC_FP_AT_OUT - 256);
}

/* There is nothing to mount on: that the kernel says so is how it tells to have got over its data. */
static void copy_mount_data(struct pc_fp_cell *cell)
{
    PC_FP_ACT_EXPECTING(cell, ENOENT, SYS(mount, "none", "/nonexistent/postcopy-faultpath", "tmpfs", 0, cell->page));
    PC_FP_UNAVAILABLE_IF(cell, "mount", EPERM);
}

static void copy_add_key(struct pc_fp_cell *cell)
{
    uint8_t got[1024];

    ACT(add_key, "user", "postcopy-faultpath", IN(OUT), sizeof(got), KEY_SPEC_PROCESS_KEYRING);
    PC_FP_UNAVAILABLE_IF(cell, "add_key", ENOSYS, EPERM, EACCES);
    if (!pc_fp_succeeded(cell))
        return;
    if (SYS(keyctl, KEYCTL_READ, cell->shared->result.value, got, sizeof(got)) != sizeof(got))
        pc_fp_wrong(cell, "the key cannot be read");
    else
        pc_fp_verify(cell, got, PC_FP_AT_OUT, sizeof(got));
    (void)SYS(keyctl, KEYCTL_UNLINK, cell->shared->result.value, KEY_SPEC_PROCESS_KEYRING);
}

/* ---- waiting for descriptors: there is something to read at PC_FP_FD ---- */

static bool at_fixed_number(struct pc_fp_cell *cell)
{
    return pc_fp_made(cell, dup3(cell->fds[0], PC_FP_FD, O_CLOEXEC), "dup3");
}

static void copy_poll_array(struct pc_fp_cell *cell)
{
    const struct pollfd expected = {.fd = PC_FP_FD, .events = POLLIN, .revents = POLLIN};

    if (!at_fixed_number(cell))
        return;
    ACT(ppoll, IN(POLLFD), 1, NULL, NULL, 8);
    pc_fp_check_value(cell, 1);
    pc_fp_verify_page(cell, &expected, PC_FP_AT_POLLFD, sizeof(expected));
}

static void copy_select_set(struct pc_fp_cell *cell)
{
    if (!at_fixed_number(cell))
        return;
    ACT(pselect6, PC_FP_FD + 1, IN(FDSET), NULL, NULL, NULL, NULL);
    pc_fp_check_value(cell, 1);
    pc_fp_verify_kept(cell); /* what is ready is what was asked for */
}

static void copy_epoll_ctl(struct pc_fp_cell *cell)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event got = {0};

    if (!pc_fp_made(cell, epoll, "epoll_create1") || !at_fixed_number(cell))
        return;
    ACT(epoll_ctl, epoll, EPOLL_CTL_ADD, PC_FP_FD, IN(EPOLL));
    PC_FP_EXPECT(cell, epoll_wait(epoll, &got, 1, 0) == 1 && got.data.u64 == PC_FP_EPOLL_DATA,
                 "epoll got another event to wait for");
}

static void copy_epoll_wait(struct pc_fp_cell *cell)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data = {.u64 = PC_FP_EPOLL_DATA}};

    if (!pc_fp_made(cell, epoll, "epoll_create1") ||
        !pc_fp_made(cell, epoll_ctl(epoll, EPOLL_CTL_ADD, cell->fds[0], &event), "epoll_ctl"))
        return;
    ACT(epoll_pwait, epoll, IN(OUT), 1, -1, NULL, 8);
    pc_fp_check_value(cell, 1);
    pc_fp_verify_out(cell, &event, sizeof(event));
}

/* ---- time ---- */

CALL(nanosleep, verify_zero, nanosleep, IN(TIMESPEC), NULL)

static void copy_clock_gettime(struct pc_fp_cell *cell)
{
    int64_t got[2];

    ACT(clock_gettime, CLOCK_MONOTONIC, IN(OUT));
    if (!pc_fp_succeeded(cell) || !pc_fp_page_comes(cell))
        return;
    memcpy(got, IN(OUT), sizeof(got));
    if ((uint64_t)got[0] * 1000000000u + (uint64_t)got[1] - atomic_load(&cell->shared->begin_ns) > 1000000000000u)
        pc_fp_wrong(cell, "that is not the time");
    pc_fp_verify_out(cell, got, sizeof(got));
}

static void copy_timerfd_settime(struct pc_fp_cell *cell)
{
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    uint64_t expirations = 0;

    if (!pc_fp_made(cell, fd, "timerfd_create"))
        return;
    ACT(timerfd_settime, fd, 0, IN(ITIMERSPEC), NULL);
    PC_FP_EXPECT(cell, read(fd, &expirations, sizeof(expirations)) == sizeof(expirations) && expirations == 1,
                 "the timer was set to something else");
}

static void copy_utimensat(struct pc_fp_cell *cell)
{
    struct stat got;

    ACT(utimensat, cell->fds[0], NULL, IN(TIMESPECS), 0);
    PC_FP_EXPECT(cell, !fstat(cell->fds[0], &got) && got.st_atime == 1000 && got.st_mtime == 2000, "other times were set");
}

/* ---- processes and signals ---- */

CALL(sched_setaffinity, verify_zero, sched_setaffinity, 0, 64, IN(CPUS))

static void copy_set_mempolicy(struct pc_fp_cell *cell)
{
    ACT(set_mempolicy, MPOL_BIND, IN(NODES), 64);
    PC_FP_UNAVAILABLE_IF(cell, "set_mempolicy", ENOSYS, EPERM);
}

static void copy_prlimit_new(struct pc_fp_cell *cell)
{
    struct rlimit got;

    ACT(prlimit64, 0, RLIMIT_MSGQUEUE, IN(RLIMIT), NULL);
    PC_FP_EXPECT(cell, !getrlimit(RLIMIT_MSGQUEUE, &got) && got.rlim_cur == 64, "another limit was set");
}

static void copy_sigprocmask(struct pc_fp_cell *cell)
{
    uint64_t got = 0;

    ACT(rt_sigprocmask, SIG_BLOCK, IN(SIGSET), NULL, 8);
    PC_FP_EXPECT(cell, !SYS(rt_sigprocmask, SIG_BLOCK, NULL, &got, 8) && got & 1u << (SIGUSR2 - 1), "another signal was blocked");
}

static void copy_sigaction(struct pc_fp_cell *cell)
{
    struct sigaction got;

    ACT(rt_sigaction, SIGUSR2, IN(SIGACTION), NULL, 8);
    PC_FP_EXPECT(cell, !sigaction(SIGUSR2, NULL, &got) && got.sa_handler == SIG_IGN, "another action was set");
}

static _Atomic int frame_value; /* of this child */

static void on_frame(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    atomic_store(&frame_value, info->si_value.sival_int);
}

static void copy_signal_frame(struct pc_fp_cell *cell)
{
    struct sigaction action = {.sa_sigaction = on_frame, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    /* It grows down from the page's end; where there is a page before it the stack is of two. */
    uint8_t *base = cell->region_pages > 1 ? cell->page - cell->page_bytes : cell->page;
    stack_t stack = {.ss_sp = base, .ss_size = (size_t)(cell->page + cell->page_bytes - base)};
    siginfo_t info = {.si_signo = SIGUSR2, .si_code = SI_QUEUE};

    info.si_value.sival_int = 4711;
    if (!pc_fp_made(cell, sigaction(SIGUSR2, &action, NULL), "sigaction") ||
        !pc_fp_made(cell, sigaltstack(&stack, NULL), "a stack in the page"))
        return;
    ACT(rt_tgsigqueueinfo, getpid(), cell->tid, SIGUSR2, &info);
    PC_FP_EXPECT(cell, atomic_load(&frame_value) == 4711, "the handler was not called with its value");
}

static void copy_wait_status(struct pc_fp_cell *cell)
{
    pid_t child = fork();
    const int expected = 7 << 8;

    if (!child)
        _exit(7);
    if (!pc_fp_made(cell, child, "fork"))
        return;
    ACT(wait4, child, IN(OUT), 0, NULL);
    pc_fp_check_value(cell, child);
    pc_fp_verify_out(cell, &expected, sizeof(expected));
}

CALL(fcntl_lock, verify_zero, fcntl, cell->fds[0], F_SETLK, IN(FLOCK))

/* ---- userfaultfd itself ---- */

/* Another userfaultfd with one missing page. */
static int other_uffd(struct pc_fp_cell *cell, uint8_t **target)
{
    int uffd = pc_uffd_open(cell->spec->mode == PC_FP_USER_ONLY ? PC_UFFD_USER_ONLY : PC_UFFD_ANY, 0, NULL), rc = uffd;
    uint64_t bytes = pc_page_bytes();

    *target = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*target == MAP_FAILED)
        rc = -ENOMEM;
    if (rc >= 0)
        rc = pc_uffd_register(uffd, (uintptr_t)*target, bytes, PC_UFFD_MISSING, NULL);
    if (rc < 0)
        pc_fp_unavailable(cell, -rc, "userfaultfd");
    return rc < 0 ? -1 : uffd;
}

static void copy_uffdio_copy_source(struct pc_fp_cell *cell)
{
    uint8_t *target;
    int uffd = other_uffd(cell, &target);
    uint64_t done;

    if (pc_page_bytes() != PC_FP_BYTES)
        pc_fp_unavailable(cell, 0, "pages are not of %d bytes", PC_FP_BYTES);
    else if (uffd >= 0)
        PC_FP_ACT_CODE(cell, pc_uffd_copy(uffd, (uintptr_t)target, cell->page, PC_FP_BYTES, 0, &done));
    pc_fp_verify(cell, target, 0, PC_FP_BYTES);
}

static void *touch(void *argument)
{
    (void)*(volatile uint8_t *)argument;
    return NULL;
}

/* A handler that reads its events into memory of which a page is missing. (Of its own userfaultfd: it would wait for itself.) */
static void copy_uffd_read(struct pc_fp_cell *cell)
{
    uint64_t done, address = 0;
    uint8_t *target;
    int uffd = other_uffd(cell, &target), rc;
    struct pollfd polled = {.fd = uffd, .events = POLLIN};
    pthread_t thread;

    if (uffd < 0)
        return;
    rc = pthread_create(&thread, NULL, touch, target);
    if (rc) {
        pc_fp_unavailable(cell, rc, "a fault to read");
        return;
    }
    (void)poll(&polled, 1, -1);
    ACT(read, uffd, IN(OUT), 32);
    pc_fp_check_value(cell, 32);
    if (pc_fp_succeeded(cell))
        memcpy(&address, IN(OUT) + 16, sizeof(address));
    PC_FP_EXPECT(cell, address == (uintptr_t)target, "the event is of another address");
    (void)pc_uffd_zeropage(uffd, (uintptr_t)target, pc_page_bytes(), 0, &done);
    (void)pthread_join(thread, NULL);
}

#define ROW(name, on, flags, what) PC_FP_ROW(copy, name, on, flags, what)
#define R 0
#define W PC_FP_WRITES
static const struct pc_fp_operation operations[] = {
    ROW(sendmsg_msghdr, SOCKETS, R, "sendmsg: its struct msghdr"),
    ROW(recvmsg_msghdr, FULL_SOCKETS, W, "recvmsg: its struct msghdr, read and written"),
    ROW(sendmsg_iovec, SOCKETS, R, "sendmsg: the iovec array"),
    ROW(recvmsg_iovec, FULL_SOCKETS, R, "recvmsg: the iovec array"),
    ROW(writev_iovec, PIPE, R, "writev: the iovec array"),
    ROW(readv_iovec, FULL_PIPE, R, "readv: the iovec array"),
    ROW(open_path, NOTHING, R, "openat: the path name, by strncpy_from_user"),
    ROW(stat_path, NOTHING, R, "fstatat: the path name"),
    ROW(stat_result, NOTHING, W, "fstatat: struct stat"),
    ROW(statx_result, NOTHING, W, "statx: struct statx"),
    ROW(statfs_result, NOTHING, W, "statfs: struct statfs"),
    ROW(readlink_result, NOTHING, W, "readlinkat: the target's name"),
    ROW(getcwd_result, NOTHING, W, "getcwd: the directory's name"),
    ROW(getdents_result, NOTHING, W, "getdents64: entries, in the middle of the walk of the directory"),
    ROW(ioctl_in, PIPE, R, "ioctl FIONBIO: an int by get_user"),
    ROW(ioctl_out, FULL_PIPE, W, "ioctl FIONREAD: an int by put_user"),
    ROW(setsockopt_value, UDP, R, "setsockopt: the option's value"),
    ROW(getsockopt_value, UDP, W, "getsockopt: the option's value"),
    ROW(attach_filter, UDP, R, "setsockopt SO_ATTACH_FILTER: struct sock_fprog"),
    ROW(bind_address, UDP, R, "bind: the address"),
    ROW(getsockname_address, UDP, W, "getsockname: the address"),
    ROW(sendfile_offset, FILE, W, "sendfile: the offset, read and written"),
    ROW(pipe_result, PIPE, W, "pipe2: the two descriptors"),
    ROW(eventfd_write, NOTHING, R, "write to an eventfd: 8 bytes"),
    ROW(procfs_read, NOTHING, W, "read from a file of /proc/sys"),
    ROW(procfs_write, NOTHING, R, "write to /proc/thread-self/comm"),
    ROW(prctl_name, NOTHING, R, "prctl PR_SET_NAME: a string"),
    ROW(getrandom, NOTHING, W, "getrandom: 256 bytes"),
    ROW(mount_data, NOTHING, R, "mount: its data, a page at once, which may be shorter"),
    ROW(add_key, NOTHING, R, "add_key: 1 KiB of payload"),
    ROW(mincore_vector, NOTHING, W, "mincore: its vector"),
    ROW(uname_result, NOTHING, W, "uname: struct utsname"),
    ROW(poll_array, FULL_PIPE, W, "ppoll: the array, read, and written when a descriptor is ready"),
    ROW(select_set, FULL_PIPE, W, "pselect: the set, read and written"),
    ROW(epoll_ctl, FULL_PIPE, R, "epoll_ctl: struct epoll_event"),
    ROW(epoll_wait, FULL_PIPE, W, "epoll_pwait: the events, with a lock of the epoll held"),
    ROW(nanosleep, NOTHING, R, "nanosleep: the time"),
    ROW(clock_gettime, NOTHING, W, "clock_gettime as a system call: the time"),
    ROW(timerfd_settime, NOTHING, R, "timerfd_settime: struct itimerspec"),
    ROW(utimensat, FILE, R, "utimensat: the two times"),
    ROW(sched_setaffinity, NOTHING, R, "sched_setaffinity: the mask"),
    ROW(set_mempolicy, NOTHING, R, "set_mempolicy: the mask of nodes"),
    ROW(prlimit_new, NOTHING, R, "prlimit64: the new limit"),
    ROW(prlimit_old, NOTHING, W, "prlimit64: the old limit"),
    ROW(sigprocmask, NOTHING, R, "rt_sigprocmask: the set"),
    ROW(sigaction, NOTHING, R, "rt_sigaction: struct sigaction"),
    ROW(signal_frame, NOTHING, W, "a signal's frame, written to the alternate stack on the way to user mode"),
    ROW(wait_status, NOTHING, W, "wait4: the status"),
    ROW(fcntl_lock, FILE, R, "fcntl F_SETLK: struct flock"),
    ROW(uffdio_copy_source, NOTHING, R, "UFFDIO_COPY on another userfaultfd: its source"),
    ROW(uffd_read, NOTHING, W, "read from another userfaultfd: the event"),
};

const struct pc_fp_class pc_fp_arguments = {operations, PC_ARRAY_LENGTH(operations)};
