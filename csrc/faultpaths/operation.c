/* SPDX-License-Identifier: Apache-2.0
 *
 * Fault paths: what operations call, and what they work on.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faultpaths/fp.h"

#ifndef PR_SET_PTRACER
#define PR_SET_PTRACER 0x59616d61
#endif

/* ---- around the operation ---- */

void pc_fp_begin(struct pc_fp_cell *cell)
{
    atomic_store(&cell->shared->begin_ns, pc_now_ns());
    atomic_store(&cell->shared->began, 1);
    errno = 0;
}

void pc_fp_end_code(struct pc_fp_cell *cell, int64_t value)
{
    struct pc_fp_shared *shared = cell->shared;

    atomic_store(&shared->given_in_time, atomic_load(&shared->given));
    atomic_store(&shared->ended, 1);
    atomic_store(&shared->end_ns, pc_now_ns());
    shared->result.value = value;
    shared->result.error = value < 0 && value > -4096 ? (int)-value : 0;
}

void pc_fp_end(struct pc_fp_cell *cell, int64_t value)
{
    int code = errno;

    pc_fp_end_code(cell, value == -1 ? -code : value);
    cell->shared->result.value = value;
}

void pc_fp_end_expecting(struct pc_fp_cell *cell, int64_t value, int expected_errno)
{
    pc_fp_end_code(cell, value != -1 ? value : errno == expected_errno ? 0 : -errno);
}

bool pc_fp_succeeded(const struct pc_fp_cell *cell)
{
    return atomic_load(&cell->shared->ended) && !cell->shared->result.error;
}

/* ---- verdicts ---- */

bool pc_fp_unavailable(struct pc_fp_cell *cell, int code, const char *format, ...)
{
    struct pc_fp_result *result = &cell->shared->result;
    va_list arguments;
    int n;

    if (atomic_exchange(&cell->shared->unavailable, 1))
        return false; /* the first reason is the one */
    va_start(arguments, format);
    n = vsnprintf(result->text, sizeof(result->text), format, arguments);
    va_end(arguments);
    if (code && n >= 0 && (size_t)n < sizeof(result->text))
        (void)snprintf(result->text + n, sizeof(result->text) - (size_t)n, ": %s", strerrordesc_np(code));
    return false;
}

bool pc_fp_made(struct pc_fp_cell *cell, int64_t value, const char *what)
{
    return value >= 0 || pc_fp_unavailable(cell, errno, "%s", what);
}

void pc_fp_unavailable_if(struct pc_fp_cell *cell, const char *what, const int *errors)
{
    for (; *errors; errors++)
        if (cell->shared->result.error == *errors)
            pc_fp_unavailable(cell, *errors, "%s", what);
}

static void say(struct pc_fp_result *result, const char *format, va_list arguments)
{
    (void)vsnprintf(result->text, sizeof(result->text), format, arguments);
}

void pc_fp_lost(struct pc_fp_cell *cell, const char *format, ...)
{
    va_list arguments;

    cell->shared->result.error = EFAULT;
    va_start(arguments, format);
    say(&cell->shared->result, format, arguments);
    va_end(arguments);
}

void pc_fp_wrong(struct pc_fp_cell *cell, const char *format, ...)
{
    va_list arguments;

    if (atomic_exchange(&cell->shared->wrong, 1))
        return;
    va_start(arguments, format);
    say(&cell->shared->result, format, arguments);
    va_end(arguments);
}

/* ---- content ---- */

const uint8_t *pc_fp_other(void)
{
    static uint8_t data[PC_FP_BYTES];

    for (uint32_t i = 0; i < PC_FP_BYTES; i++)
        data[i] = (uint8_t)(i * 7 + (i >> 8) + 1);
    return data;
}

bool pc_fp_page_comes(const struct pc_fp_cell *cell)
{
    return PC_FP_COMING_MODES >> cell->spec->mode & 1;
}

static void compare(struct pc_fp_cell *cell, const uint8_t *got, const uint8_t *expected, uint64_t offset, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++)
        if (got[i] != expected[i]) {
            pc_fp_wrong(cell, "byte %llu of the page is 0x%02x, should be 0x%02x", (unsigned long long)(offset + i), got[i],
                        expected[i]);
            return;
        }
}

void pc_fp_verify(struct pc_fp_cell *cell, const void *got, uint64_t offset, uint64_t bytes)
{
    if (pc_fp_succeeded(cell))
        compare(cell, got, cell->content + offset, offset, bytes);
}

void pc_fp_verify_page(struct pc_fp_cell *cell, const void *data, uint64_t offset, uint64_t bytes)
{
    uint8_t expected[PC_FP_BYTES];

    if (!pc_fp_succeeded(cell) || !pc_fp_page_comes(cell))
        return; /* looking at a page that never comes would be a second access */
    memcpy(expected, cell->content, PC_FP_BYTES);
    if (bytes)
        memcpy(expected + offset, data, bytes);
    compare(cell, cell->page, expected, 0, PC_FP_BYTES);
}

void pc_fp_verify_out(struct pc_fp_cell *cell, const void *data, uint64_t bytes)
{
    pc_fp_verify_page(cell, data, PC_FP_AT_OUT, bytes);
}

void pc_fp_check_value(struct pc_fp_cell *cell, int64_t expected)
{
    PC_FP_EXPECT(cell, cell->shared->result.value == expected, "returned %lld, should be %lld",
                 (long long)cell->shared->result.value, (long long)expected);
}

void pc_fp_verify_kept(struct pc_fp_cell *cell)
{
    pc_fp_verify_page(cell, NULL, 0, 0);
}

void pc_fp_verify_taken(struct pc_fp_cell *cell)
{
    static uint8_t got[PC_FP_BYTES] __attribute__((aligned(PC_FP_BYTES))); /* as O_DIRECT wants it */
    ssize_t n = 1;

    if (!pc_fp_succeeded(cell))
        return;
    pc_fp_check_value(cell, PC_FP_BYTES);
    if (cell->shared->result.value != PC_FP_BYTES)
        return; /* a stream with less in it would be waited for */
    (void)lseek(cell->fds[0], 0, SEEK_SET);
    for (size_t have = 0; have < sizeof(got) && n > 0; have += n > 0 ? (size_t)n : 0)
        n = read(cell->fds[0], got + have, sizeof(got) - have);
    if (n <= 0)
        pc_fp_wrong(cell, "what was taken cannot be read: %s", n ? strerrordesc_np(errno) : "it is too short");
    else
        pc_fp_verify(cell, got, 0, sizeof(got));
}

void pc_fp_verify_delivered(struct pc_fp_cell *cell)
{
    pc_fp_check_value(cell, PC_FP_SMALL);
    pc_fp_verify_out(cell, pc_fp_other(), PC_FP_SMALL);
}

void pc_fp_verify_sent(struct pc_fp_cell *cell)
{
    uint8_t got[64];

    pc_fp_check_value(cell, sizeof(got));
    PC_FP_EXPECT(cell,
                 read(cell->fds[0], got, sizeof(got)) == sizeof(got) &&
                     !memcmp(got, PC_FP_SCRATCH + PC_FP_IN_DATA, sizeof(got)),
                 "other bytes have been sent");
}

/* ---- what operations work on ---- */

void pc_fp_in_process(struct pc_fp_cell *cell, void (*act)(struct pc_fp_cell *cell))
{
    pid_t parent = getpid(), child;
    int status;

    (void)prctl(PR_SET_PTRACER, -1L); /* a yama policy may allow ancestors only */
    child = fork();
    if (child < 0) {
        pc_fp_unavailable(cell, errno, "fork");
        return;
    }
    if (!child) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        atomic_store(&cell->shared->other_pid, getpid());
        if (getppid() == parent)
            act(cell);
        _exit(0);
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
}

/* Not O_TMPFILE, which network file systems do not have. */
void pc_fp_name_direct_file(const struct pc_fp_spec *spec, pid_t child, char *path, size_t bytes)
{
    (void)snprintf(path, bytes, "%s/.postcopy-faultpath-%d", spec->direct_dir[0] ? spec->direct_dir : ".", (int)child);
}

static int direct_file(const struct pc_fp_cell *cell)
{
    char path[300];
    int plain, fd = -1, error;

    pc_fp_name_direct_file(cell->spec, getpid(), path, sizeof(path));
    (void)unlink(path); /* of an earlier process with this number */
    plain = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (plain < 0)
        return -1;
    if (write(plain, pc_fp_other(), PC_FP_BYTES) == PC_FP_BYTES) {
        (void)fdatasync(plain);
        fd = open(path, O_RDWR | O_CLOEXEC | O_DIRECT);
    }
    error = errno;
    /* Where the time of its death is measured, the parent does it: a file system takes long to remove the last of a file. */
    if (cell->measure != PC_FP_MEASURE_KILL)
        (void)unlink(path);
    close(plain);
    errno = error;
    return fd;
}

static int plain_file(const struct pc_fp_cell *cell)
{
    int fd = memfd_create("postcopy-faultpath-file", MFD_CLOEXEC);

    return fd < 0 || write(fd, cell->content, PC_FP_BYTES) != PC_FP_BYTES || lseek(fd, 0, SEEK_SET) ? -1 : fd;
}

static int connection(int fds[2])
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t bytes = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    fds[0] = fds[1] = -1;
    if (listener >= 0 && !bind(listener, (struct sockaddr *)&address, bytes) && !listen(listener, 1) &&
        !getsockname(listener, (struct sockaddr *)&address, &bytes)) {
        fds[1] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fds[1] >= 0 && !connect(fds[1], (struct sockaddr *)&address, bytes))
            fds[0] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    }
    if (listener >= 0)
        close(listener);
    return fds[0];
}

bool pc_fp_make(struct pc_fp_cell *cell, int on, int fds[2])
{
    static const char *const names[PC_FP_ON_KINDS] = {"", "pipe", "socketpair", "TCP over loopback", "socket", "memfd", "a file"};
    int rc = 0;

    switch (on & ~PC_FP_FULL) {
    case PC_FP_ON_PIPE:
        rc = pipe2(fds, O_CLOEXEC);
        break;
    case PC_FP_ON_SOCKETS:
        rc = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds);
        break;
    case PC_FP_ON_TCP:
        rc = connection(fds);
        break;
    case PC_FP_ON_UDP:
        rc = fds[0] = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        break;
    case PC_FP_ON_FILE:
        rc = fds[0] = plain_file(cell);
        break;
    case PC_FP_ON_DIRECT:
        rc = fds[0] = direct_file(cell);
        break;
    default:
        break;
    }
    if (rc >= 0 && on & PC_FP_FULL) {
        struct pollfd filled = {.fd = fds[0], .events = POLLIN};

        rc = write(fds[1], pc_fp_other(), PC_FP_SMALL) == PC_FP_SMALL && poll(&filled, 1, -1) == 1 ? 0 : -1;
    }
    if (rc < 0 && on == PC_FP_ON_DIRECT)
        return pc_fp_unavailable(cell, errno, "a file for O_DIRECT in %s", cell->spec->direct_dir[0] ? cell->spec->direct_dir : ".");
    return pc_fp_made(cell, rc, names[on & ~PC_FP_FULL]);
}
