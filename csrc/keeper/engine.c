/* SPDX-License-Identifier: Apache-2.0
 *
 * An engine as a process and as the other end of a socket.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "keeper/keeper.h"

union control {
    char bytes[CMSG_SPACE(sizeof(int) * PC_KEEPER_FDS)];
    struct cmsghdr align;
};

/* In the child: it has a process group of its own, so that what a terminal sends comes through the keeper, once, and not to a spare. */
__attribute__((noreturn)) static void become(int fd, char *const argv[])
{
    sigset_t none;

    (void)setpgid(0, 0);
    (void)signal(SIGPIPE, SIG_DFL);
    (void)sigemptyset(&none);
    (void)sigprocmask(SIG_SETMASK, &none, NULL);
    if (fd == PC_KEEPER_FD ? fcntl(fd, F_SETFD, 0) : dup2(fd, PC_KEEPER_FD) < 0)
        _exit(126);
    (void)execv(argv[0], argv);
    say(ERROR, "cannot run %s: %s", argv[0], strerror(errno));
    _exit(127);
}

int engine_start(struct engine *engine, char *const argv[])
{
    int pair[2], error;
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return errno;
    pid = fork();
    error = errno;
    if (!pid)
        become(pair[1], argv);
    close(pair[1]);
    if (pid < 0) {
        close(pair[0]);
        return error;
    }
    (void)setpgid(pid, pid);
    *engine = (struct engine){.state = STARTING, .pid = pid, .pidfd = -1, .socket = pair[0], .deadline_ns = NEVER, .spare_told = -1};
    return 0;
}

void engine_signal(const struct engine *engine, int signal_number)
{
    /* Our child keeps its number until we wait for it. */
    if (engine->pidfd >= 0)
        (void)syscall(SYS_pidfd_send_signal, engine->pidfd, signal_number, NULL, 0);
    else if (engine->pid > 0 && !engine->ended)
        (void)kill(engine->pid, signal_number);
}

void engine_forget(struct engine *engine)
{
    if (engine->state == NONE)
        return;
    close(engine->socket);
    if (engine->pidfd >= 0)
        close(engine->pidfd);
    *engine = (struct engine){.state = NONE, .pidfd = -1, .socket = -1, .deadline_ns = NEVER};
}

int engine_receive(struct engine *engine, struct message *message)
{
    union control control;
    struct iovec parts[] = {{&message->head, sizeof(message->head)}, {message->text, PC_KEEPER_TEXT_BYTES}};
    struct msghdr header = {.msg_iov = parts, .msg_iovlen = 2, .msg_control = &control, .msg_controllen = sizeof(control)};
    ssize_t bytes;

    message->head.kind = 0;
    message->fd_count = message->text_bytes = 0;
    /* ECONNRESET: it ended with something of ours unread. That is told once, before what it had sent. */
    do
        bytes = recvmsg(engine->socket, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (bytes < 0 && (errno == EINTR || errno == ECONNRESET));
    if (bytes < 0)
        return errno == EAGAIN ? EAGAIN : ESHUTDOWN;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&header); part; part = CMSG_NXTHDR(&header, part)) {
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS || count > PC_KEEPER_FDS)
            continue;
        memcpy(message->fds, CMSG_DATA(part), count * sizeof(int)); /* there is one such part */
        message->fd_count = (uint32_t)count;
    }
    if (!bytes) { /* also an empty message, which an engine of ours does not send */
        for (uint32_t i = 0; i < message->fd_count; i++)
            close(message->fds[i]);
        return ESHUTDOWN;
    }
    message->cut = header.msg_flags & (MSG_TRUNC | MSG_CTRUNC);
    if ((size_t)bytes < sizeof(message->head))
        message->head.kind = 0; /* which is no kind */
    else
        message->text_bytes = (uint32_t)bytes - (uint32_t)sizeof(message->head);
    message->text[message->text_bytes] = '\0';
    return 0;
}

int engine_send(struct engine *engine, uint32_t kind, int32_t value, const void *text, size_t bytes, const int *fds, uint32_t count)
{
    struct {
        uint32_t kind;
        int32_t value;
    } head = {kind, value};
    union control control;
    struct iovec parts[] = {{&head, sizeof(head)}, {(void *)(uintptr_t)text, bytes}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t sent;

    if (count) {
        struct cmsghdr *header = &control.align;

        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        *header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int) * count), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(header), fds, sizeof(int) * count);
    }
    do
        sent = sendmsg(engine->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent >= 0)
        return 0;
    /* ETOOMANYREFS: so many descriptors are on their way that it has to receive some first. */
    return errno == ETOOMANYREFS || errno == ENOBUFS || errno == ENOMEM ? EBUSY : errno;
}

void answer_with(struct answer *answer, int32_t id, int error, const char *why)
{
    *answer = (struct answer){.due = true, .id = id, .error = error};
    (void)snprintf(answer->why, sizeof(answer->why), "%s", why);
}
