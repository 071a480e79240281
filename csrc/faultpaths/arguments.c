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

#include "core/util.h"
#include "faultpaths/fp.h"

#ifndef SO_ATTACH_FILTER
#define SO_ATTACH_FILTER 26
#endif

#define EVERYWHERE PC_FP_ALL_MODES, PC_FP_ALL_BACKINGS
#define IN(cell, name) ((cell)->page + PC_FP_AT_##name)
#define SYS(name, ...) syscall(SYS_##name, __VA_ARGS__)

static bool made(struct pc_fp_cell *cell, int64_t value, const char *what)
{
    if (value >= 0)
        return true;
    pc_fp_unavailable(cell, errno, "%s", what);
    return false;
}

/* A result of a system call, in the page, against the same call's result elsewhere. */
static void verify_out(struct pc_fp_cell *cell, const void *data, uint64_t bytes)
{
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, data, PC_FP_AT_OUT, bytes);
}

/* ---- vectors and message headers ---- */

static void verify_scratch_sent(struct pc_fp_cell *cell, int fd)
{
    uint8_t got[64];

    if (!pc_fp_succeeded(cell))
        return;
    pc_fp_check_value(cell, sizeof(got));
    if (read(fd, got, sizeof(got)) != sizeof(got) || memcmp(got, PC_FP_SCRATCH + PC_FP_IN_DATA, sizeof(got)) != 0)
        pc_fp_wrong(cell, "other bytes have been sent");
}

static const uint8_t message[64] = "a message for the scratch area";

static void verify_scratch_received(struct pc_fp_cell *cell)
{
    if (!pc_fp_succeeded(cell))
        return;
    pc_fp_check_value(cell, sizeof(message));
    if (memcmp(message, PC_FP_SCRATCH + PC_FP_IN_DATA, sizeof(message)) != 0)
        pc_fp_wrong(cell, "other bytes have been received");
}

static bool sockets(struct pc_fp_cell *cell, int fds[2])
{
    return made(cell, socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), "socketpair");
}

static void sendmsg_header(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!sockets(cell, fds))
        return;
    PC_FP_ACT(cell, SYS(sendmsg, fds[1], IN(cell, MSGHDR), 0));
    verify_scratch_sent(cell, fds[0]);
}

static void recvmsg_header(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!sockets(cell, fds) || !made(cell, write(fds[1], message, sizeof(message)), "write"))
        return;
    PC_FP_ACT(cell, SYS(recvmsg, fds[0], IN(cell, MSGHDR), 0));
    verify_scratch_received(cell);
}

static void sendmsg_iovec(struct pc_fp_cell *cell)
{
    struct msghdr header = {.msg_iov = (struct iovec *)(void *)IN(cell, IOVEC), .msg_iovlen = 2};
    int fds[2];

    if (!sockets(cell, fds))
        return;
    PC_FP_ACT(cell, SYS(sendmsg, fds[1], &header, 0));
    verify_scratch_sent(cell, fds[0]);
}

static void recvmsg_iovec(struct pc_fp_cell *cell)
{
    struct msghdr header = {.msg_iov = (struct iovec *)(void *)IN(cell, IOVEC), .msg_iovlen = 2};
    int fds[2];

    if (!sockets(cell, fds) || !made(cell, write(fds[1], message, sizeof(message)), "write"))
        return;
    PC_FP_ACT(cell, SYS(recvmsg, fds[0], &header, 0));
    verify_scratch_received(cell);
}

static void writev_iovec(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!made(cell, pipe2(fds, O_CLOEXEC), "pipe"))
        return;
    PC_FP_ACT(cell, SYS(writev, fds[1], IN(cell, IOVEC), 2));
    verify_scratch_sent(cell, fds[0]);
}

static void readv_iovec(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!made(cell, pipe2(fds, O_CLOEXEC), "pipe") || !made(cell, write(fds[1], message, sizeof(message)), "write"))
        return;
    PC_FP_ACT(cell, SYS(readv, fds[0], IN(cell, IOVEC), 2));
    verify_scratch_received(cell);
}

/* ---- names of files ---- */

static void check_null_device(struct pc_fp_cell *cell, const struct stat *got)
{
    struct stat expected;

    if (pc_fp_succeeded(cell) && (stat("/dev/null", &expected) || got->st_rdev != expected.st_rdev))
        pc_fp_wrong(cell, "that is not /dev/null");
}

static void open_path(struct pc_fp_cell *cell)
{
    struct stat got = {0};

    PC_FP_ACT(cell, SYS(openat, AT_FDCWD, IN(cell, PATH), O_RDONLY | O_CLOEXEC));
    if (pc_fp_succeeded(cell))
        (void)fstat((int)cell->shared->result.value, &got);
    check_null_device(cell, &got);
}

static void stat_path(struct pc_fp_cell *cell)
{
    struct stat got = {0};

    PC_FP_ACT(cell, SYS(newfstatat, AT_FDCWD, IN(cell, PATH), &got, 0));
    check_null_device(cell, &got);
}

static void stat_result(struct pc_fp_cell *cell)
{
    struct stat expected;

    (void)SYS(newfstatat, AT_FDCWD, "/dev/null", &expected, 0);
    PC_FP_ACT(cell, SYS(newfstatat, AT_FDCWD, "/dev/null", IN(cell, OUT), 0));
    verify_out(cell, &expected, sizeof(expected));
}

static void statx_result(struct pc_fp_cell *cell)
{
    struct statx expected;

    if (!made(cell, SYS(statx, AT_FDCWD, "/dev/null", 0, STATX_BASIC_STATS, &expected), "statx"))
        return;
    PC_FP_ACT(cell, SYS(statx, AT_FDCWD, "/dev/null", 0, STATX_BASIC_STATS, IN(cell, OUT)));
    verify_out(cell, &expected, sizeof(expected));
}

static void statfs_result(struct pc_fp_cell *cell)
{
    struct statfs expected;

    (void)SYS(statfs, "/proc", &expected);
    PC_FP_ACT(cell, SYS(statfs, "/proc", IN(cell, OUT)));
    verify_out(cell, &expected, sizeof(expected));
}

static void readlink_result(struct pc_fp_cell *cell)
{
    char expected[32];
    int64_t n = SYS(readlinkat, AT_FDCWD, "/proc/self", expected, sizeof(expected));

    if (!made(cell, n, "/proc/self"))
        return;
    PC_FP_ACT(cell, SYS(readlinkat, AT_FDCWD, "/proc/self", IN(cell, OUT), sizeof(expected)));
    verify_out(cell, expected, (uint64_t)n);
}

static void getcwd_result(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, chdir("/") ? -1 : SYS(getcwd, IN(cell, OUT), 1024));
    verify_out(cell, "/", 2);
}

static void getdents_result(struct pc_fp_cell *cell)
{
    static uint8_t expected[1024];
    int fd = open("/proc/self/ns", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int64_t n = SYS(getdents64, fd, expected, sizeof(expected));

    if (!made(cell, n, "/proc/self/ns") || !made(cell, lseek(fd, 0, SEEK_SET), "lseek"))
        return;
    PC_FP_ACT(cell, SYS(getdents64, fd, IN(cell, OUT), sizeof(expected)));
    pc_fp_check_value(cell, n);
    /* Not its padding: each entry's end, up to 8 bytes, is left as it was. Names and numbers are what counts. */
    if (pc_fp_succeeded(cell) && cell->spec->mode != PC_FP_POISON && cell->spec->mode != PC_FP_SIGBUS)
        for (int64_t at = 0; at < n;) {
            uint16_t length;

            memcpy(&length, expected + at + 16, sizeof(length));
            if (memcmp(expected + at, IN(cell, OUT) + at, 19) != 0 ||
                strcmp((char *)expected + at + 19, (char *)IN(cell, OUT) + at + 19) != 0) {
                pc_fp_wrong(cell, "another entry at byte %lld of the directory", (long long)at);
                return;
            }
            at += length;
        }
}

/* ---- single values ---- */

static void ioctl_in(struct pc_fp_cell *cell)
{
    int fds[2];

    if (!made(cell, pipe2(fds, O_CLOEXEC), "pipe"))
        return;
    PC_FP_ACT(cell, SYS(ioctl, fds[0], FIONBIO, IN(cell, ONE)));
    if (pc_fp_succeeded(cell) && !(fcntl(fds[0], F_GETFL) & O_NONBLOCK))
        pc_fp_wrong(cell, "FIONBIO did not take the 1");
}

static void ioctl_out(struct pc_fp_cell *cell)
{
    int fds[2], expected = sizeof(message);

    if (!made(cell, pipe2(fds, O_CLOEXEC), "pipe") || !made(cell, write(fds[1], message, sizeof(message)), "write"))
        return;
    PC_FP_ACT(cell, SYS(ioctl, fds[0], FIONREAD, IN(cell, OUT)));
    verify_out(cell, &expected, sizeof(expected));
}

static void setsockopt_value(struct pc_fp_cell *cell)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), value = 0;
    socklen_t bytes = sizeof(value);

    if (!made(cell, fd, "socket"))
        return;
    PC_FP_ACT(cell, SYS(setsockopt, fd, SOL_SOCKET, SO_BROADCAST, IN(cell, ONE), sizeof(int)));
    if (pc_fp_succeeded(cell) && (getsockopt(fd, SOL_SOCKET, SO_BROADCAST, &value, &bytes) || value != 1))
        pc_fp_wrong(cell, "the option was not set");
}

static void getsockopt_value(struct pc_fp_cell *cell)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), expected = SOCK_DGRAM;
    socklen_t bytes = sizeof(int);

    if (!made(cell, fd, "socket"))
        return;
    PC_FP_ACT(cell, SYS(getsockopt, fd, SOL_SOCKET, SO_TYPE, IN(cell, OUT), &bytes));
    verify_out(cell, &expected, sizeof(expected));
}

static void attach_filter(struct pc_fp_cell *cell)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (!made(cell, fd, "socket"))
        return;
    PC_FP_ACT(cell, SYS(setsockopt, fd, SOL_SOCKET, SO_ATTACH_FILTER, IN(cell, FILTER), 16));
    pc_fp_check_value(cell, 0);
}

static void bind_address(struct pc_fp_cell *cell)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in got = {0};
    socklen_t bytes = sizeof(got);

    if (!made(cell, fd, "socket"))
        return;
    PC_FP_ACT(cell, SYS(bind, fd, IN(cell, SOCKADDR), sizeof(struct sockaddr_in)));
    if (pc_fp_succeeded(cell) && (SYS(getsockname, fd, &got, &bytes) || ntohl(got.sin_addr.s_addr) != INADDR_LOOPBACK))
        pc_fp_wrong(cell, "bound to another address");
}

static void getsockname_address(struct pc_fp_cell *cell)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in expected = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t bytes = sizeof(expected);

    if (!made(cell, fd, "socket") || !made(cell, bind(fd, (struct sockaddr *)&expected, bytes), "bind") ||
        !made(cell, getsockname(fd, (struct sockaddr *)&expected, &bytes), "getsockname"))
        return;
    PC_FP_ACT(cell, SYS(getsockname, fd, IN(cell, OUT), &bytes));
    verify_out(cell, &expected, sizeof(expected));
}

static void sendfile_offset(struct pc_fp_cell *cell)
{
    int from = pc_fp_plain_file(cell), fds[2];
    uint8_t got[64];
    const int64_t after = 16 + 64;

    if (from < 0 || !sockets(cell, fds))
        return;
    PC_FP_ACT(cell, SYS(sendfile, fds[1], from, IN(cell, OFFSET), 64));
    pc_fp_check_value(cell, 64);
    if (!pc_fp_succeeded(cell))
        return;
    if (read(fds[0], got, sizeof(got)) != sizeof(got) || memcmp(got, cell->content + 16, sizeof(got)) != 0)
        pc_fp_wrong(cell, "sent from another offset");
    pc_fp_verify_page(cell, &after, PC_FP_AT_OFFSET, sizeof(after));
}

static void pipe_result(struct pc_fp_cell *cell)
{
    int expected[2];

    if (!made(cell, pipe2(expected, O_CLOEXEC), "pipe"))
        return;
    close(expected[0]);
    close(expected[1]);
    PC_FP_ACT(cell, SYS(pipe2, IN(cell, OUT), O_CLOEXEC)); /* the lowest numbers that are free, thus the same ones */
    verify_out(cell, expected, sizeof(expected));
}

static void write_eventfd(struct pc_fp_cell *cell)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    uint64_t got = 0, expected;

    if (!made(cell, fd, "eventfd"))
        return;
    memcpy(&expected, IN(cell, OUT) - cell->page + cell->content, sizeof(expected));
    PC_FP_ACT(cell, SYS(write, fd, IN(cell, OUT), 8));
    if (pc_fp_succeeded(cell) && (read(fd, &got, sizeof(got)) != sizeof(got) || got != expected))
        pc_fp_wrong(cell, "the counter got another value");
}

static void procfs_read(struct pc_fp_cell *cell)
{
    char expected[32];
    int fd = open("/proc/sys/kernel/ostype", O_RDONLY | O_CLOEXEC);
    ssize_t n = pread(fd, expected, sizeof(expected), 0);

    if (!made(cell, n, "/proc/sys/kernel/ostype"))
        return;
    PC_FP_ACT(cell, SYS(read, fd, IN(cell, OUT), sizeof(expected)));
    verify_out(cell, expected, (uint64_t)n);
}

static void procfs_write(struct pc_fp_cell *cell)
{
    int fd = open("/proc/thread-self/comm", O_RDWR | O_CLOEXEC);
    char got[16] = "";

    if (!made(cell, fd, "/proc/thread-self/comm"))
        return;
    PC_FP_ACT(cell, SYS(write, fd, IN(cell, STRING), 13));
    if (pc_fp_succeeded(cell) && (prctl(PR_GET_NAME, got) || strcmp(got, "NAME=postcopy") != 0))
        pc_fp_wrong(cell, "the name is %s", got);
}

static void set_name(struct pc_fp_cell *cell)
{
    char got[16] = "";

    PC_FP_ACT(cell, SYS(prctl, PR_SET_NAME, IN(cell, STRING), 0, 0, 0));
    if (pc_fp_succeeded(cell) && (SYS(prctl, PR_GET_NAME, got, 0, 0, 0) || strcmp(got, "NAME=postcopy") != 0))
        pc_fp_wrong(cell, "the name is %s", got);
}

static void getrandom_result(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, SYS(getrandom, IN(cell, OUT), 256, 0));
    pc_fp_check_value(cell, 256);
    /* 256 random bytes that are the pattern would be a wonder; the rest of the page is the pattern. */
    if (!pc_fp_succeeded(cell) || cell->spec->mode == PC_FP_POISON || cell->spec->mode == PC_FP_SIGBUS)
        return;
    if (!memcmp(IN(cell, OUT), cell->content + PC_FP_AT_OUT, 256))
        pc_fp_wrong(cell, "no random bytes have arrived");
    pc_fp_verify(cell, cell->page, 0, PC_FP_AT_OUT);
    pc_fp_verify(cell, IN(cell, OUT) + 256, PC_FP_AT_OUT + 256, PC_FP_BYTES - PC_FP_AT_OUT - 256);
}

/* There is nothing to mount on: that the kernel says so is how it tells to have got over its data. */
static void mount_data(struct pc_fp_cell *cell)
{
    int64_t value;

    pc_fp_begin(cell);
    value = SYS(mount, "none", "/nonexistent/postcopy-faultpath", "tmpfs", 0, cell->page);
    pc_fp_end_code(cell, value == -1 ? (errno == ENOENT ? 0 : -errno) : value);
    if (cell->shared->result.error == EPERM)
        pc_fp_unavailable(cell, EPERM, "mount");
}

static void add_key_payload(struct pc_fp_cell *cell)
{
    uint8_t got[1024];

    PC_FP_ACT(cell, SYS(add_key, "user", "postcopy-faultpath", IN(cell, OUT), sizeof(got), KEY_SPEC_PROCESS_KEYRING));
    if (cell->shared->result.error == ENOSYS || cell->shared->result.error == EPERM || cell->shared->result.error == EACCES)
        pc_fp_unavailable(cell, cell->shared->result.error, "add_key");
    if (!pc_fp_succeeded(cell))
        return;
    if (SYS(keyctl, KEYCTL_READ, cell->shared->result.value, got, sizeof(got)) != sizeof(got))
        pc_fp_wrong(cell, "the key cannot be read");
    else
        pc_fp_verify(cell, got, PC_FP_AT_OUT, sizeof(got));
    (void)SYS(keyctl, KEYCTL_UNLINK, cell->shared->result.value, KEY_SPEC_PROCESS_KEYRING);
}

static void mincore_vector(struct pc_fp_cell *cell)
{
    const uint8_t expected = 1;

    PC_FP_ACT(cell, SYS(mincore, PC_FP_SCRATCH, PC_FP_BYTES, IN(cell, OUT)));
    verify_out(cell, &expected, 1);
}

static void uname_result(struct pc_fp_cell *cell)
{
    struct utsname expected;

    (void)SYS(uname, &expected);
    PC_FP_ACT(cell, SYS(uname, IN(cell, OUT)));
    verify_out(cell, &expected, sizeof(expected));
}

/* ---- waiting for descriptors ---- */

/* Puts the readable end of a pipe, with something to read, at PC_FP_FD. */
static bool readable(struct pc_fp_cell *cell)
{
    int fds[2];

    return made(cell, pipe2(fds, O_CLOEXEC), "pipe") && made(cell, write(fds[1], message, sizeof(message)), "write") &&
           made(cell, dup3(fds[0], PC_FP_FD, O_CLOEXEC), "dup3");
}

static void poll_array(struct pc_fp_cell *cell)
{
    const struct pollfd expected = {.fd = PC_FP_FD, .events = POLLIN, .revents = POLLIN};

    if (!readable(cell))
        return;
    PC_FP_ACT(cell, SYS(ppoll, IN(cell, POLLFD), 1, NULL, NULL, 8));
    pc_fp_check_value(cell, 1);
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, &expected, PC_FP_AT_POLLFD, sizeof(expected));
}

static void select_set(struct pc_fp_cell *cell)
{
    if (!readable(cell))
        return;
    PC_FP_ACT(cell, SYS(pselect6, PC_FP_FD + 1, IN(cell, FDSET), NULL, NULL, NULL, NULL));
    pc_fp_check_value(cell, 1);
    if (pc_fp_succeeded(cell))
        pc_fp_verify_page(cell, NULL, 0, 0); /* what is ready is what was asked for */
}

static void epoll_ctl_event(struct pc_fp_cell *cell)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event got = {0};

    if (!made(cell, epoll, "epoll_create1") || !readable(cell))
        return;
    PC_FP_ACT(cell, SYS(epoll_ctl, epoll, EPOLL_CTL_ADD, PC_FP_FD, IN(cell, EPOLL)));
    if (pc_fp_succeeded(cell) && (epoll_wait(epoll, &got, 1, 0) != 1 || got.data.u64 != PC_FP_EPOLL_DATA))
        pc_fp_wrong(cell, "epoll got another event to wait for");
}

static void epoll_wait_events(struct pc_fp_cell *cell)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data = {.u64 = PC_FP_EPOLL_DATA}};

    if (!made(cell, epoll, "epoll_create1") || !readable(cell) ||
        !made(cell, epoll_ctl(epoll, EPOLL_CTL_ADD, PC_FP_FD, &event), "epoll_ctl"))
        return;
    PC_FP_ACT(cell, SYS(epoll_pwait, epoll, IN(cell, OUT), 1, -1, NULL, 8));
    pc_fp_check_value(cell, 1);
    verify_out(cell, &event, sizeof(event));
}

/* ---- time ---- */

static void nanosleep_time(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, SYS(nanosleep, IN(cell, TIMESPEC), NULL));
}

static void clock_gettime_result(struct pc_fp_cell *cell)
{
    int64_t got[2];

    PC_FP_ACT(cell, SYS(clock_gettime, CLOCK_MONOTONIC, IN(cell, OUT)));
    if (!pc_fp_succeeded(cell) || cell->spec->mode == PC_FP_POISON || cell->spec->mode == PC_FP_SIGBUS)
        return;
    memcpy(got, IN(cell, OUT), sizeof(got));
    if ((uint64_t)got[0] * 1000000000u + (uint64_t)got[1] - atomic_load(&cell->shared->begin_ns) > 1000000000000u)
        pc_fp_wrong(cell, "that is not the time");
    pc_fp_verify_page(cell, got, PC_FP_AT_OUT, sizeof(got));
}

static void timerfd_time(struct pc_fp_cell *cell)
{
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    uint64_t expirations = 0;

    if (!made(cell, fd, "timerfd_create"))
        return;
    PC_FP_ACT(cell, SYS(timerfd_settime, fd, 0, IN(cell, ITIMERSPEC), NULL));
    if (pc_fp_succeeded(cell) && (read(fd, &expirations, sizeof(expirations)) != sizeof(expirations) || expirations != 1))
        pc_fp_wrong(cell, "the timer was set to something else");
}

static void utimensat_times(struct pc_fp_cell *cell)
{
    int fd = pc_fp_plain_file(cell);
    struct stat got;

    if (fd < 0)
        return;
    PC_FP_ACT(cell, SYS(utimensat, fd, NULL, IN(cell, TIMESPECS), 0));
    if (pc_fp_succeeded(cell) && (fstat(fd, &got) || got.st_atime != 1000 || got.st_mtime != 2000))
        pc_fp_wrong(cell, "other times were set");
}

/* ---- processes and signals ---- */

static void affinity_mask(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, SYS(sched_setaffinity, 0, 64, IN(cell, CPUS)));
}

static void policy_nodes(struct pc_fp_cell *cell)
{
    PC_FP_ACT(cell, SYS(set_mempolicy, MPOL_BIND, IN(cell, NODES), 64));
    if (cell->shared->result.error == ENOSYS || cell->shared->result.error == EPERM)
        pc_fp_unavailable(cell, cell->shared->result.error, "set_mempolicy");
}

static void prlimit_new(struct pc_fp_cell *cell)
{
    struct rlimit got;

    PC_FP_ACT(cell, SYS(prlimit64, 0, RLIMIT_MSGQUEUE, IN(cell, RLIMIT), NULL));
    if (pc_fp_succeeded(cell) && (getrlimit(RLIMIT_MSGQUEUE, &got) || got.rlim_cur != 64))
        pc_fp_wrong(cell, "another limit was set");
}

static void prlimit_old(struct pc_fp_cell *cell)
{
    struct rlimit expected;

    (void)SYS(prlimit64, 0, RLIMIT_NOFILE, NULL, &expected);
    PC_FP_ACT(cell, SYS(prlimit64, 0, RLIMIT_NOFILE, NULL, IN(cell, OUT)));
    verify_out(cell, &expected, sizeof(expected));
}

static void signal_mask(struct pc_fp_cell *cell)
{
    uint64_t got = 0;

    PC_FP_ACT(cell, SYS(rt_sigprocmask, SIG_BLOCK, IN(cell, SIGSET), NULL, 8));
    if (pc_fp_succeeded(cell) && (SYS(rt_sigprocmask, SIG_BLOCK, NULL, &got, 8) || !(got & 1u << (SIGUSR2 - 1))))
        pc_fp_wrong(cell, "another signal was blocked");
}

static void signal_action(struct pc_fp_cell *cell)
{
    struct sigaction got;

    PC_FP_ACT(cell, SYS(rt_sigaction, SIGUSR2, IN(cell, SIGACTION), NULL, 8));
    if (pc_fp_succeeded(cell) && (sigaction(SIGUSR2, NULL, &got) || got.sa_handler != SIG_IGN))
        pc_fp_wrong(cell, "another action was set");
}

static _Atomic int frame_value; /* of this child */

static void on_frame(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    atomic_store(&frame_value, info->si_value.sival_int);
}

static void signal_frame(struct pc_fp_cell *cell)
{
    struct sigaction action = {.sa_sigaction = on_frame, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    /* It grows down from the page's end; where there is a page before it the stack is of two. */
    uint8_t *base = cell->region_pages > 1 ? cell->page - cell->page_bytes : cell->page;
    stack_t stack = {.ss_sp = base, .ss_size = (size_t)(cell->page + cell->page_bytes - base)};
    siginfo_t info = {.si_signo = SIGUSR2, .si_code = SI_QUEUE};

    info.si_value.sival_int = 4711;
    if (!made(cell, sigaction(SIGUSR2, &action, NULL), "sigaction"))
        return;
    if (sigaltstack(&stack, NULL)) {
        pc_fp_unavailable(cell, errno, "a stack in the page");
        return;
    }
    PC_FP_ACT(cell, SYS(rt_tgsigqueueinfo, getpid(), cell->tid, SIGUSR2, &info));
    if (atomic_load(&frame_value) != 4711)
        pc_fp_wrong(cell, "the handler was not called with its value");
}

static void wait_status(struct pc_fp_cell *cell)
{
    pid_t child = fork();
    const int expected = 7 << 8;

    if (!child)
        _exit(7);
    if (!made(cell, child, "fork"))
        return;
    PC_FP_ACT(cell, SYS(wait4, child, IN(cell, OUT), 0, NULL));
    pc_fp_check_value(cell, child);
    verify_out(cell, &expected, sizeof(expected));
}

static void lock_file(struct pc_fp_cell *cell)
{
    int fd = pc_fp_plain_file(cell);

    if (fd < 0)
        return;
    PC_FP_ACT(cell, SYS(fcntl, fd, F_SETLK, IN(cell, FLOCK)));
    pc_fp_check_value(cell, 0);
}

/* ---- userfaultfd itself ---- */

static void uffdio_copy_source(struct pc_fp_cell *cell)
{
    int uffd = pc_uffd_open(cell->spec->mode == PC_FP_USER_ONLY ? PC_UFFD_USER_ONLY : PC_UFFD_ANY, 0, NULL);
    uint8_t *target = mmap(NULL, PC_FP_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t done;

    if (pc_page_bytes() != PC_FP_BYTES) {
        pc_fp_unavailable(cell, 0, "pages are not of %d bytes", PC_FP_BYTES);
        return;
    }
    if (target == MAP_FAILED || !made(cell, uffd, "userfaultfd") ||
        !made(cell, pc_uffd_register(uffd, (uintptr_t)target, PC_FP_BYTES, PC_UFFD_MISSING, NULL), "UFFDIO_REGISTER"))
        return;
    pc_fp_begin(cell);
    pc_fp_end_code(cell, pc_uffd_copy(uffd, (uintptr_t)target, cell->page, PC_FP_BYTES, 0, &done));
    if (pc_fp_succeeded(cell))
        pc_fp_verify(cell, target, 0, PC_FP_BYTES);
}

static void *touch(void *argument)
{
    (void)*(volatile uint8_t *)argument;
    return NULL;
}

/* A handler that reads its events into memory of which a page is missing. (Of its own userfaultfd: it would wait for itself.) */
static void uffd_read(struct pc_fp_cell *cell)
{
    int uffd = pc_uffd_open(PC_UFFD_ANY, 0, NULL);
    uint64_t bytes = pc_page_bytes(), done, address = 0;
    uint8_t *target = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct pollfd polled = {.fd = uffd, .events = POLLIN};
    pthread_t thread;
    int rc;

    if (target == MAP_FAILED || uffd < 0) {
        pc_fp_unavailable(cell, uffd < 0 ? -uffd : ENOMEM, "userfaultfd");
        return;
    }
    rc = pc_uffd_register(uffd, (uintptr_t)target, bytes, PC_UFFD_MISSING, NULL);
    if (!rc)
        rc = -pthread_create(&thread, NULL, touch, target);
    if (rc) {
        pc_fp_unavailable(cell, -rc, "a fault to read");
        return;
    }
    (void)poll(&polled, 1, -1);
    PC_FP_ACT(cell, SYS(read, uffd, IN(cell, OUT), 32));
    pc_fp_check_value(cell, 32);
    if (pc_fp_succeeded(cell))
        memcpy(&address, IN(cell, OUT) + 16, sizeof(address));
    if (pc_fp_succeeded(cell) && address != (uintptr_t)target)
        pc_fp_wrong(cell, "the event is of another address");
    (void)pc_uffd_zeropage(uffd, (uintptr_t)target, bytes, 0, &done);
    (void)pthread_join(thread, NULL);
}

static const struct pc_fp_operation operations[] = {
    {{"copy.sendmsg_msghdr", "copy", "sendmsg: its struct msghdr", EVERYWHERE, 0}, sendmsg_header},
    {{"copy.recvmsg_msghdr", "copy", "recvmsg: its struct msghdr, read and written", EVERYWHERE, PC_FP_WRITES},
     recvmsg_header},
    {{"copy.sendmsg_iovec", "copy", "sendmsg: the iovec array", EVERYWHERE, 0}, sendmsg_iovec},
    {{"copy.recvmsg_iovec", "copy", "recvmsg: the iovec array", EVERYWHERE, 0}, recvmsg_iovec},
    {{"copy.writev_iovec", "copy", "writev: the iovec array", EVERYWHERE, 0}, writev_iovec},
    {{"copy.readv_iovec", "copy", "readv: the iovec array", EVERYWHERE, 0}, readv_iovec},
    {{"copy.open_path", "copy", "openat: the path name, by strncpy_from_user", EVERYWHERE, 0}, open_path},
    {{"copy.stat_path", "copy", "fstatat: the path name", EVERYWHERE, 0}, stat_path},
    {{"copy.stat_result", "copy", "fstatat: struct stat", EVERYWHERE, PC_FP_WRITES}, stat_result},
    {{"copy.statx_result", "copy", "statx: struct statx", EVERYWHERE, PC_FP_WRITES}, statx_result},
    {{"copy.statfs_result", "copy", "statfs: struct statfs", EVERYWHERE, PC_FP_WRITES}, statfs_result},
    {{"copy.readlink_result", "copy", "readlinkat: the target's name", EVERYWHERE, PC_FP_WRITES}, readlink_result},
    {{"copy.getcwd_result", "copy", "getcwd: the directory's name", EVERYWHERE, PC_FP_WRITES}, getcwd_result},
    {{"copy.getdents_result", "copy", "getdents64: entries, in the middle of the walk of the directory", EVERYWHERE,
      PC_FP_WRITES},
     getdents_result},
    {{"copy.ioctl_in", "copy", "ioctl FIONBIO: an int by get_user", EVERYWHERE, 0}, ioctl_in},
    {{"copy.ioctl_out", "copy", "ioctl FIONREAD: an int by put_user", EVERYWHERE, PC_FP_WRITES}, ioctl_out},
    {{"copy.setsockopt_value", "copy", "setsockopt: the option's value", EVERYWHERE, 0}, setsockopt_value},
    {{"copy.getsockopt_value", "copy", "getsockopt: the option's value", EVERYWHERE, PC_FP_WRITES}, getsockopt_value},
    {{"copy.attach_filter", "copy", "setsockopt SO_ATTACH_FILTER: struct sock_fprog", EVERYWHERE, 0}, attach_filter},
    {{"copy.bind_address", "copy", "bind: the address", EVERYWHERE, 0}, bind_address},
    {{"copy.getsockname_address", "copy", "getsockname: the address", EVERYWHERE, PC_FP_WRITES}, getsockname_address},
    {{"copy.sendfile_offset", "copy", "sendfile: the offset, read and written", EVERYWHERE, PC_FP_WRITES}, sendfile_offset},
    {{"copy.pipe_result", "copy", "pipe2: the two descriptors", EVERYWHERE, PC_FP_WRITES}, pipe_result},
    {{"copy.eventfd_write", "copy", "write to an eventfd: 8 bytes", EVERYWHERE, 0}, write_eventfd},
    {{"copy.procfs_read", "copy", "read from a file of /proc/sys", EVERYWHERE, PC_FP_WRITES}, procfs_read},
    {{"copy.procfs_write", "copy", "write to /proc/thread-self/comm", EVERYWHERE, 0}, procfs_write},
    {{"copy.prctl_name", "copy", "prctl PR_SET_NAME: a string", EVERYWHERE, 0}, set_name},
    {{"copy.getrandom", "copy", "getrandom: 256 bytes", EVERYWHERE, PC_FP_WRITES}, getrandom_result},
    {{"copy.mount_data", "copy", "mount: its data, a page at once, which may be shorter", EVERYWHERE, 0}, mount_data},
    {{"copy.add_key", "copy", "add_key: 1 KiB of payload", EVERYWHERE, 0}, add_key_payload},
    {{"copy.mincore_vector", "copy", "mincore: its vector", EVERYWHERE, PC_FP_WRITES}, mincore_vector},
    {{"copy.uname_result", "copy", "uname: struct utsname", EVERYWHERE, PC_FP_WRITES}, uname_result},
    {{"copy.poll_array", "copy", "ppoll: the array, read, and written when a descriptor is ready", EVERYWHERE, PC_FP_WRITES},
     poll_array},
    {{"copy.select_set", "copy", "pselect: the set, read and written", EVERYWHERE, PC_FP_WRITES}, select_set},
    {{"copy.epoll_ctl", "copy", "epoll_ctl: struct epoll_event", EVERYWHERE, 0}, epoll_ctl_event},
    {{"copy.epoll_wait", "copy", "epoll_pwait: the events, with a lock of the epoll held", EVERYWHERE, PC_FP_WRITES},
     epoll_wait_events},
    {{"copy.nanosleep", "copy", "nanosleep: the time", EVERYWHERE, 0}, nanosleep_time},
    {{"copy.clock_gettime", "copy", "clock_gettime as a system call: the time", EVERYWHERE, PC_FP_WRITES},
     clock_gettime_result},
    {{"copy.timerfd_settime", "copy", "timerfd_settime: struct itimerspec", EVERYWHERE, 0}, timerfd_time},
    {{"copy.utimensat", "copy", "utimensat: the two times", EVERYWHERE, 0}, utimensat_times},
    {{"copy.sched_setaffinity", "copy", "sched_setaffinity: the mask", EVERYWHERE, 0}, affinity_mask},
    {{"copy.set_mempolicy", "copy", "set_mempolicy: the mask of nodes", EVERYWHERE, 0}, policy_nodes},
    {{"copy.prlimit_new", "copy", "prlimit64: the new limit", EVERYWHERE, 0}, prlimit_new},
    {{"copy.prlimit_old", "copy", "prlimit64: the old limit", EVERYWHERE, PC_FP_WRITES}, prlimit_old},
    {{"copy.sigprocmask", "copy", "rt_sigprocmask: the set", EVERYWHERE, 0}, signal_mask},
    {{"copy.sigaction", "copy", "rt_sigaction: struct sigaction", EVERYWHERE, 0}, signal_action},
    {{"copy.signal_frame", "copy", "a signal's frame, written to the alternate stack on the way to user mode", EVERYWHERE,
      PC_FP_WRITES},
     signal_frame},
    {{"copy.wait_status", "copy", "wait4: the status", EVERYWHERE, PC_FP_WRITES}, wait_status},
    {{"copy.fcntl_lock", "copy", "fcntl F_SETLK: struct flock", EVERYWHERE, 0}, lock_file},
    {{"copy.uffdio_copy_source", "copy", "UFFDIO_COPY on another userfaultfd: its source", EVERYWHERE, 0},
     uffdio_copy_source},
    {{"copy.uffd_read", "copy", "read from another userfaultfd: the event", EVERYWHERE, PC_FP_WRITES}, uffd_read},
};

const struct pc_fp_class pc_fp_arguments = {operations, PC_ARRAY_LENGTH(operations)};
