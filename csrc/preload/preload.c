/* SPDX-License-Identifier: Apache-2.0
 *
 * See preload.h. From top to bottom: the descriptors, the mappings, the userfaultfd, the requests, the thread, the calls.
 *
 * Whatever fails in here, the program goes on as without the library: errno is kept, nothing is printed unless
 * POSTCOPY_PRELOAD_DEBUG is set, and no request is served. One thing is different: in a program that was started to wait for
 * its memory (`run --lazy`) a mapping that cannot be guarded fails, since the program would find zeros in it. While pages are missing
 * memory may not be moved, nor its file be mapped once more: only where it was mapped when it was guarded does a touch wait.
 *
 * The lock. It is taken by the thread, and by those calls that change what is remembered; all signals are blocked meanwhile, as
 * a handler may map memory too. No memory of a mapping is touched under it.
 *
 * Children. The lock is in a page that the kernel empties for a child (MADV_WIPEONFORK), however that was made: fork(2), clone(2), or a
 * function that calls no handlers. So a child finds the lock free, whoever had it in the parent, and finds out that it is one. It
 * is not taken for a fork: the allocator of a program may wait for it with a lock of its own, for which fork waits then. A child that
 * shares the memory of its parent (vfork) shares the lock too.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "preload/preload.h"
#include "uffd/uffd_abi.h"

#define LIBRARY "libpostcopy-preload.so"
#define REQUEST_TIMEOUT_MS 1000
#define STACK_BYTES ((size_t)256 << 10)
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

/* A descriptor of ours among the program's. The program may close it, as one does that closes all it has; its number may then be
 * another file's. So each is compared before it is used, or closed. */
struct descriptor {
    int fd; /* -1: none */
    dev_t device;
    ino_t inode;
};

struct record {
    uintptr_t start, end;
    uint64_t offset;
    uint32_t page_bytes;
    struct descriptor file;
    bool lazy;
};

static struct own {
    pthread_mutex_t lock; /* of zeros: free */
    bool started; /* as `self.started`, but false in a child */
} *own;

static struct {
    struct sockaddr_un path; /* sun_path is empty: not started by `postcopy run`, or a child of such a process */
    bool debug;
    bool lazy; /* mappings are guarded from their making on, by `kept` */
    bool started; /* the thread */
    bool lost; /* of the mappings */
    pid_t pid; /* that has the socket */
    struct descriptor device; /* /dev/userfaultfd, open, inherited */
    struct descriptor listener;
    struct descriptor kept; /* userfaultfd */
    uint64_t features; /* of `kept`; where it is none and `lazy`, those that it will have */
    struct record records[PRELOAD_MAPPINGS]; /* in the order of their making */
    size_t count;
    _Atomic uintptr_t low, high; /* all records are between them: a call that is outside of both has nothing to do here */
} self = {.device.fd = -1, .listener.fd = -1, .kept.fd = -1};

/* Of the thread only, which has a small stack. */
static struct preload_request request;
static struct preload_reply reply;

__attribute__((format(printf, 1, 2))) static void debug(const char *format, ...)
{
    va_list arguments;

    if (!self.debug)
        return;
    va_start(arguments, format);
    (void)vdprintf(STDERR_FILENO, format, arguments);
    va_end(arguments);
}

/* ---- descriptors */

static bool is_ours(const struct descriptor *one)
{
    struct stat now;

    return one->fd >= 0 && !fstat(one->fd, &now) && now.st_dev == one->device && now.st_ino == one->inode;
}

static void drop(struct descriptor *one)
{
    if (is_ours(one))
        (void)close(one->fd);
    one->fd = -1;
}

/* A copy with a number so high that the program, which may count on the lowest ones, does not see it. */
static struct descriptor copy_of(int fd)
{
    struct descriptor made = {.fd = -1};
    struct rlimit limit;
    struct stat now;
    int from = 1024;

    if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < 2048)
        from = (int)limit.rlim_cur / 2;
    if (fd < 0 || fstat(fd, &now))
        return made;
    made.device = now.st_dev;
    made.inode = now.st_ino;
    made.fd = fcntl(fd, F_DUPFD_CLOEXEC, from);
    return made;
}

static struct descriptor copy_of_ours(const struct descriptor *one)
{
    return is_ours(one) ? copy_of(one->fd) : (struct descriptor){.fd = -1};
}

static struct descriptor moved_up(int fd)
{
    struct descriptor made = copy_of(fd);
    int error = errno;

    if (fd >= 0)
        (void)close(fd);
    errno = error;
    return made;
}

/* ---- mappings */

/* The size of the pages of a file in memory; 0 for any other file. */
static uint32_t page_bytes_of(int fd)
{
    struct statfs file_system;
    struct stat file;

    if (fstat(fd, &file) || !S_ISREG(file.st_mode) || fstatfs(fd, &file_system))
        return 0;
    if (file_system.f_type == HUGETLBFS_MAGIC)
        return (uint32_t)file_system.f_bsize;
    return file_system.f_type == TMPFS_MAGIC ? (uint32_t)sysconf(_SC_PAGESIZE) : 0;
}

static void set_bounds(void)
{
    uintptr_t low = UINTPTR_MAX, high = 0;

    for (size_t i = 0; i < self.count; i++) {
        low = self.records[i].start < low ? self.records[i].start : low;
        high = self.records[i].end > high ? self.records[i].end : high;
    }
    self.low = low;
    self.high = high;
}

/* Takes its descriptor. */
static struct record *remember(struct record record)
{
    if (self.count == PRELOAD_MAPPINGS || record.file.fd < 0) {
        debug("postcopy: the mapping at %#lx is not remembered: %s\n", record.start,
              record.file.fd < 0 ? strerror(errno) : "there are too many");
        self.lost = true;
        drop(&record.file);
        return NULL;
    }
    self.records[self.count] = record;
    self.count++;
    set_bounds();
    return &self.records[self.count - 1];
}

static void forget(uintptr_t start, uintptr_t end)
{
    for (size_t i = 0; i < self.count;) {
        struct record *one = &self.records[i], tail = *one;

        /* (The kernel does not cut through a page.) */
        if (one->start >= end || one->end <= start || (one->start < start && start % one->page_bytes) ||
            (one->end > end && end % one->page_bytes)) {
            i++;
            continue;
        }
        if (one->end > end && one->start < start) { /* its middle */
            tail.file = copy_of_ours(&one->file);
            tail.offset += end - tail.start;
            tail.start = end;
            one->end = start;
            (void)remember(tail);
        } else if (one->end > end) {
            one->offset += end - one->start;
            one->start = end;
        } else if (one->start < start) {
            one->end = start;
        } else {
            drop(&one->file);
            memmove(one, one + 1, (--self.count - i) * sizeof(*one));
            continue;
        }
        i++;
    }
    set_bounds();
}

static uintptr_t end_of(uintptr_t start, size_t bytes, size_t page_bytes)
{
    return start + ((bytes + page_bytes - 1) & -page_bytes);
}

/* A child of a program that is served has none of it: what it has inherited is closed, and it can be asked nothing. (What another
 * thread of the parent was just changing may be half changed. No descriptor is closed that is not what it was.) */
static void leave_parent(void)
{
    for (size_t i = 0; i < self.count; i++)
        drop(&self.records[i].file);
    self.count = 0;
    set_bounds();
    drop(&self.listener);
    drop(&self.kept);
    drop(&self.device);
    self.started = self.lazy = false;
    self.path.sun_path[0] = '\0';
}

static void lock(sigset_t *signals)
{
    sigset_t all;

    (void)sigfillset(&all);
#ifdef __SANITIZE_ADDRESS__ /* which reports a fault in here only where its signal is not blocked */
    (void)sigdelset(&all, SIGSEGV);
    (void)sigdelset(&all, SIGBUS);
#endif
    (void)pthread_sigmask(SIG_SETMASK, &all, signals);
    (void)pthread_mutex_lock(&own->lock);
    if (self.started && !own->started)
        leave_parent();
}

static void unlock(const sigset_t *signals)
{
    (void)pthread_mutex_unlock(&own->lock);
    (void)pthread_sigmask(SIG_SETMASK, signals, NULL);
}

/* Whether a call that changes this range may change a mapping that is remembered. */
static bool concerns_us(const void *address, size_t bytes)
{
    uintptr_t start = (uintptr_t)address, end = end_of(start, bytes, (size_t)sysconf(_SC_PAGESIZE));

    return start < self.high && (end > self.low || end < start);
}

/* Whether pages of this file may be missing, so that they would be zeros where the file is mapped once more. */
static bool is_waited_for(int fd)
{
    struct stat file;

    if (self.kept.fd < 0 || fstat(fd, &file))
        return false;
    for (size_t i = 0; i < self.count; i++)
        if (self.records[i].file.device == file.st_dev && self.records[i].file.inode == file.st_ino)
            return true;
    return false;
}

/* The mapping that has all of a range. */
static struct record *find(uint64_t start, uint64_t bytes)
{
    for (size_t i = 0; i < self.count; i++)
        if (bytes && self.records[i].start <= start && start < self.records[i].end && bytes <= self.records[i].end - start)
            return &self.records[i];
    return NULL;
}

/* ---- the userfaultfd */

static struct descriptor open_userfaultfd(uint64_t features, enum preload_step *step)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    int fd = -1, device;

    *step = PRELOAD_OPEN;
    if (is_ours(&self.device))
        fd = ioctl(self.device.fd, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && (device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)) >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        (void)close(device);
    }
    if (fd < 0 && errno != EMFILE && errno != ENFILE)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return (struct descriptor){.fd = -1};
    *step = PRELOAD_FEATURES;
    if (ioctl(fd, UFFDIO_API, &api)) {
        int error = errno;

        (void)close(fd);
        errno = error;
        return (struct descriptor){.fd = -1};
    }
    return moved_up(fd);
}

static int guard(int uffd, uint64_t start, uint64_t bytes, uint64_t mode)
{
    struct uffdio_register range = {.range = {start, bytes}, .mode = mode};

    /* Else one page that is placed could bring a huge one, with what is missing of it as zeros. */
    (void)madvise((void *)start, bytes, MADV_NOHUGEPAGE);
    return ioctl(uffd, UFFDIO_REGISTER, &range) ? -1 : 0;
}

/* Of a program that is to wait for its memory. A page that is in the file already makes it wait too (MINOR). */
static int guard_at_once(struct record *record)
{
    enum preload_step step;

    if (self.kept.fd < 0)
        self.kept = open_userfaultfd(self.features, &step);
    if (self.kept.fd < 0)
        return -1;
    if (guard(self.kept.fd, record->start, record->end - record->start,
              UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR))
        return -1;
    /* What the kernel has put into the page tables before (MAP_POPULATE, MAP_LOCKED, mlockall) would not wait. */
    if (madvise((void *)record->start, record->end - record->start, MADV_DONTNEED_LOCKED))
        return -1;
    /* A child would have the memory without the userfaultfd, and find zeros. Now it does not have it. */
    record->lazy = !madvise((void *)record->start, record->end - record->start, MADV_DONTFORK);
    return record->lazy ? 0 : -1;
}

/* ---- requests */

static void fail(enum preload_step step, int error)
{
    reply.step = step;
    reply.error = error;
}

/* Returns how many descriptors go with the reply. */
static size_t list(int *fds)
{
    for (size_t i = 0; i < self.count; i++) {
        const struct record *record = &self.records[i];
        struct preload_mapping *mapping = &reply.mappings[reply.count];
        char link[32];

        if (!is_ours(&record->file)) { /* the program has closed it */
            reply.state |= PRELOAD_LOST;
            continue;
        }
        *mapping = (struct preload_mapping){.address = record->start, .bytes = record->end - record->start, .offset = record->offset,
                                            .device = record->file.device, .inode = record->file.inode, .page_bytes = record->page_bytes};
        (void)snprintf(link, sizeof(link), "/proc/self/fd/%d", record->file.fd);
        (void)!readlink(link, mapping->name, sizeof(mapping->name) - 1);
        fds[reply.count++] = record->file.fd;
    }
    return reply.count;
}

static size_t arm(int *fds)
{
    struct descriptor made = is_ours(&self.kept) ? self.kept : (struct descriptor){.fd = -1};
    uint64_t features = made.fd < 0 ? request.features : self.features;
    enum preload_step step;
    bool opened = false;

    for (reply.index = 0; reply.index < request.count; reply.index++)
        if (!find(request.ranges[reply.index].address, request.ranges[reply.index].bytes))
            return fail(PRELOAD_RANGE, ENOENT), 0;
    if (made.fd >= 0 && !self.lazy)
        return fail(PRELOAD_KEPT, EBUSY), 0;
    reply.features = features;
    if (request.features & ~features)
        return fail(PRELOAD_FEATURES, EINVAL), 0;
    if (made.fd < 0) {
        made = open_userfaultfd(features, &step);
        if (made.fd < 0)
            return fail(step, errno), 0;
        opened = true;
    }
    for (reply.index = 0; reply.index < request.count; reply.index++)
        if (guard(made.fd, request.ranges[reply.index].address, request.ranges[reply.index].bytes, request.mode)) {
            fail(PRELOAD_REGISTER, errno);
            if (opened)
                drop(&made); /* and nothing is registered any more */
            return 0;
        }
    self.lazy = false; /* what the program maps from now on is not waited for */
    self.features = features;
    self.kept = made;
    fds[0] = made.fd;
    return 1;
}

/* Whether the mapping is still registered with the userfaultfd that is kept: then it cannot be with another one. (Where this
 * process has no right to another one this is not known, and DISARM is not refused.) */
static bool is_registered(int other, const struct record *record)
{
    struct uffdio_register range = {.range = {record->start, record->end - record->start}, .mode = UFFDIO_REGISTER_MODE_MISSING};

    return ioctl(other, UFFDIO_REGISTER, &range) && errno == EBUSY;
}

static void disarm(void)
{
    enum preload_step step;
    struct descriptor other = open_userfaultfd(0, &step);

    if (other.fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM))
        return fail(step, errno); /* another time it can be known */
    for (reply.index = 0; reply.index < self.count; reply.index++)
        if (is_registered(other.fd, &self.records[reply.index])) {
            fail(PRELOAD_GUARDED, EBUSY);
            break;
        }
    drop(&other);
    if (reply.error)
        return;
    drop(&self.kept);
    self.lazy = false;
    for (size_t i = 0; i < self.count; i++)
        if (self.records[i].lazy) {
            (void)madvise((void *)self.records[i].start, self.records[i].end - self.records[i].start, MADV_DOFORK);
            self.records[i].lazy = false;
        }
}

static size_t carry_out(ssize_t bytes, int *fds)
{
    if (bytes < (ssize_t)offsetof(struct preload_request, ranges) || request.magic != PRELOAD_MAGIC)
        return fail(PRELOAD_REQUEST, EPROTO), 0;
    reply.op = request.op;
    if (request.version != PRELOAD_VERSION)
        return fail(PRELOAD_REQUEST, EPROTONOSUPPORT), 0;
    if (request.count > PRELOAD_MAPPINGS ||
        (size_t)bytes != offsetof(struct preload_request, ranges) + request.count * sizeof(request.ranges[0]))
        return fail(PRELOAD_REQUEST, EPROTO), 0;
    if (request.op == PRELOAD_LIST)
        return list(fds);
    if (request.op == PRELOAD_ARM && !(request.flags & ~(uint32_t)PRELOAD_KEEP))
        return arm(fds);
    if (request.op != PRELOAD_TAKE && request.op != PRELOAD_DISARM)
        return fail(PRELOAD_REQUEST, EPROTO), 0;
    /* (Of one that the program has closed only what is remembered of it is left to undo.) */
    if (self.kept.fd < 0 || (request.op == PRELOAD_TAKE && (self.lazy || !is_ours(&self.kept))))
        return fail(PRELOAD_KEPT, ENOENT), 0;
    if (request.op == PRELOAD_DISARM)
        return disarm(), 0;
    reply.features = self.features;
    fds[0] = self.kept.fd;
    return 1;
}

static bool is_allowed(int connection)
{
    struct ucred peer;
    socklen_t bytes = sizeof(peer);

    return !getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) && (peer.uid == 0 || peer.uid == geteuid());
}

static void serve(int connection)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(PRELOAD_MAPPINGS * sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = &reply};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    int fds[PRELOAD_MAPPINGS];
    ssize_t bytes = -1;
    sigset_t signals;
    bool closing = false;
    size_t count = 0;

    if (poll(&(struct pollfd){.fd = connection, .events = POLLIN}, 1, REQUEST_TIMEOUT_MS) == 1)
        bytes = recv(connection, &request, sizeof(request), MSG_DONTWAIT | MSG_TRUNC);
    if (bytes <= 0)
        return;
    lock(&signals);
    memset(&reply, 0, sizeof(reply));
    reply.magic = PRELOAD_MAGIC;
    reply.version = PRELOAD_VERSION;
    if (is_allowed(connection))
        count = carry_out(bytes, fds);
    else
        fail(PRELOAD_PEER, EACCES);
    closing = count && request.op == PRELOAD_ARM && !(request.flags & PRELOAD_KEEP);
    reply.state |= (self.kept.fd >= 0 && !self.lazy && !closing ? PRELOAD_IS_KEPT : 0u) | (self.lazy ? PRELOAD_IS_LAZY : 0u) |
                   (self.lost ? PRELOAD_LOST : 0u);
    part.iov_len = offsetof(struct preload_reply, mappings) + reply.count * sizeof(reply.mappings[0]);
    if (count) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(count * sizeof(int))};
        memcpy(CMSG_DATA(&control.header), fds, count * sizeof(int));
    }
    bytes = sendmsg(connection, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    debug("postcopy: request %d: %s (step %u)%s\n", reply.op, strerror(reply.error), reply.step, bytes < 0 ? ", not sent" : "");
    if (closing)
        drop(&self.kept); /* the asker alone has it: its end undoes all */
    unlock(&signals);
}

/* ---- the thread */

static void *answer(void *unused)
{
    struct pollfd waiting = {.fd = self.listener.fd, .events = POLLIN};

    (void)prctl(PR_SET_NAME, "postcopy");
    for (;;) {
        int connection;

        if (poll(&waiting, 1, -1) < 0 && errno != EINTR)
            break;
        if (!is_ours(&self.listener))
            break;
        connection = accept4(waiting.fd, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)
                (void)nanosleep(&(struct timespec){.tv_nsec = 100 * 1000 * 1000}, NULL); /* the program's descriptors are used up */
            else if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR)
                break;
            continue;
        }
        serve(connection);
        (void)close(connection);
    }
    debug("postcopy: the socket was closed: no more requests are answered\n");
    return unused;
}

/* Takes our entry out of LD_PRELOAD, so that what the program starts from now on is without us. In place: other threads may read
 * the environment. (Not at the start: a program may become another one, as a shell does for `exec qemu`, before it maps anything.) */
static void leave_environment(void)
{
    char *at = getenv("LD_PRELOAD");

    while (at && *at) {
        size_t bytes = strcspn(at, " :"), with = bytes + strspn(at + bytes, " :");

        if (bytes >= strlen(LIBRARY) && !strncmp(at + bytes - strlen(LIBRARY), LIBRARY, strlen(LIBRARY)))
            memmove(at, at + with, strlen(at + with) + 1);
        else
            at += with;
    }
}

/* A program that was killed leaves its socket's file behind: the next one with the same path replaces it. */
static bool is_left_behind(void)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct stat file;
    bool is = fd >= 0 && !lstat(self.path.sun_path, &file) && S_ISSOCK(file.st_mode) &&
              connect(fd, (struct sockaddr *)&self.path, sizeof(self.path)) && errno == ECONNREFUSED;

    if (fd >= 0)
        (void)close(fd);
    return is;
}

static bool is_bound(int fd)
{
    return !bind(fd, (struct sockaddr *)&self.path, sizeof(self.path)) ||
           (errno == EADDRINUSE && is_left_behind() && !unlink(self.path.sun_path) &&
            !bind(fd, (struct sockaddr *)&self.path, sizeof(self.path)));
}

/* Signals are blocked, and the thread inherits that. */
static void start(void)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    pthread_attr_t attributes;
    pthread_t thread;
    int error;

    self.pid = getpid();
    leave_environment();
    if (is_ours(&self.device)) /* nor do they have that */
        (void)fcntl(self.device.fd, F_SETFD, FD_CLOEXEC);
    /* A socket's file gets the mode that the socket has when it is bound. (umask is the whole process's.) */
    if (fd < 0 || fchmod(fd, 0600) || !is_bound(fd) || listen(fd, 16)) {
        debug("postcopy: no socket at %s: %s\n", self.path.sun_path, strerror(errno));
        if (fd >= 0)
            (void)close(fd);
        return;
    }
    self.listener = moved_up(fd);
    (void)pthread_attr_init(&attributes);
    (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    (void)pthread_attr_setstacksize(&attributes, STACK_BYTES);
    error = self.listener.fd < 0 ? EMFILE : pthread_create(&thread, &attributes, answer, NULL);
    (void)pthread_attr_destroy(&attributes);
    if (error) {
        debug("postcopy: no thread: %s\n", strerror(error));
        drop(&self.listener);
        (void)unlink(self.path.sun_path);
    }
}

/* ---- what the program calls */

/* Under the lock. Takes the record's descriptor. False: the program must not have this mapping. */
static bool take_note(struct record record)
{
    struct record *made;
    bool may = true, first = !self.started;
    int error;

    self.started = own->started = true;
    made = remember(record);
    if (self.lazy && (!made || guard_at_once(made))) {
        error = made ? errno : EMFILE;
        debug("postcopy: the mapping at %#lx cannot wait for its pages: %s\n", record.start, strerror(error));
        forget(record.start, record.end);
        errno = error;
        may = false;
    }
    error = errno;
    if (first)
        start();
    errno = error;
    return may;
}

/* A mapping is forgotten after the kernel has unmapped it, since the kernel may refuse, and under the same lock, since another thread
 * may get the same addresses next. (No such call waits for a reader of events, unless a client has asked for a userfaultfd with
 * UFFD_FEATURE_EVENT_UNMAP or _REMAP.) */
void *preload_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    bool replaces = flags & MAP_FIXED && concerns_us(address, bytes), writable = flags & MAP_SHARED && protection & PROT_WRITE;
    bool may_matter = self.path.sun_path[0] && fd >= 0 && !(flags & MAP_ANONYMOUS) && (writable || self.high);
    int before = errno, error = ENOMEM;
    struct record record = {.offset = (uint64_t)offset, .page_bytes = may_matter ? page_bytes_of(fd) : 0};
    void *mapped = MAP_FAILED;
    sigset_t signals;

    errno = before;
    if (!replaces && !record.page_bytes)
        return (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
    lock(&signals);
    if (!record.page_bytes || !is_waited_for(fd) || (self.lazy && writable)) {
        errno = before;
        mapped = (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
        error = errno;
    }
    if (mapped != MAP_FAILED && replaces)
        forget((uintptr_t)mapped, end_of((uintptr_t)mapped, bytes, (size_t)sysconf(_SC_PAGESIZE)));
    if (mapped != MAP_FAILED && record.page_bytes && writable && self.path.sun_path[0]) {
        record.start = (uintptr_t)mapped;
        record.end = end_of(record.start, bytes, record.page_bytes);
        record.file = copy_of(fd);
        if (!take_note(record)) {
            error = errno;
            (void)syscall(SYS_munmap, mapped, bytes);
            mapped = MAP_FAILED;
        }
    }
    unlock(&signals);
    errno = error;
    return mapped;
}

int preload_munmap(void *address, size_t bytes)
{
    sigset_t signals;
    int result, error;

    if (!concerns_us(address, bytes))
        return (int)syscall(SYS_munmap, address, bytes);
    lock(&signals);
    result = (int)syscall(SYS_munmap, address, bytes);
    error = errno;
    if (!result)
        forget((uintptr_t)address, end_of((uintptr_t)address, bytes, (size_t)sysconf(_SC_PAGESIZE)));
    unlock(&signals);
    errno = error;
    return result;
}

void *preload_mremap(void *address, size_t bytes, size_t new_bytes, int flags, void *new_address)
{
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = (uintptr_t)address, to;
    struct record record = {.file.fd = -1};
    const struct record *found;
    sigset_t signals;
    void *mapped;
    int error;

    /* (0 bytes: a second mapping of the same.) */
    if (!concerns_us(address, bytes ? bytes : 1) && !(flags & MREMAP_FIXED && concerns_us(new_address, new_bytes)))
        return (void *)syscall(SYS_mremap, address, bytes, new_bytes, flags, new_address);
    lock(&signals);
    found = find(start, bytes ? bytes : 1);
    /* Elsewhere it would not be guarded, and read as zeros what has not come. (Such a call may fail at any time.) */
    if (found && self.kept.fd >= 0 && !self.lazy &&
        (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) || (flags & MREMAP_MAYMOVE && (!bytes || new_bytes > bytes)))) {
        unlock(&signals);
        errno = ENOMEM;
        return MAP_FAILED;
    }
    if (found) {
        record = *found;
        record.offset += start - found->start;
        record.file = copy_of_ours(&found->file);
    }
    mapped = (void *)syscall(SYS_mremap, address, bytes, new_bytes, flags, new_address);
    error = errno;
    to = (uintptr_t)mapped;
    if (mapped != MAP_FAILED) {
        if (bytes && !(flags & MREMAP_DONTUNMAP))
            forget(start, end_of(start, bytes, page_bytes));
        if (flags & MREMAP_FIXED)
            forget(to, end_of(to, new_bytes, page_bytes));
    }
    if (mapped != MAP_FAILED && found) {
        record.start = to;
        record.end = end_of(to, new_bytes, record.page_bytes);
        (void)take_note(record);
    } else {
        drop(&record.file);
    }
    unlock(&signals);
    errno = error;
    return mapped;
}

/* At once, and not when it maps something: else it would keep its parent's socket. */
static void in_child(void)
{
    sigset_t signals;

    lock(&signals);
    unlock(&signals);
}

static bool has_own_page(void)
{
    size_t bytes = (size_t)sysconf(_SC_PAGESIZE);
    void *page = (void *)syscall(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (page == MAP_FAILED || madvise(page, bytes, MADV_WIPEONFORK))
        return false;
    own = page;
    return true;
}

void preload_begin(void)
{
    const char *path = getenv("POSTCOPY_PRELOAD"), *device = getenv("POSTCOPY_PRELOAD_UFFD"), *lazy = getenv("POSTCOPY_PRELOAD_LAZY");
    struct stat status;

    self.debug = getenv("POSTCOPY_PRELOAD_DEBUG") != NULL;
    if (path && *path && strlen(path) < sizeof(self.path.sun_path) && has_own_page() &&
        !pthread_atfork(NULL, NULL, in_child)) {
        if (device && atoi(device) > STDERR_FILENO && !fstat(atoi(device), &status) && S_ISCHR(status.st_mode))
            self.device = (struct descriptor){atoi(device), status.st_dev, status.st_ino};
        if (lazy && *lazy) {
            self.lazy = true;
            self.features = strtoull(lazy, NULL, 0);
        }
        self.path.sun_family = AF_UNIX;
        (void)strcpy(self.path.sun_path, path);
    }
}

void preload_end(void)
{
    if (self.pid == getpid() && is_ours(&self.listener)) /* not of a child that no handler of ours has seen */
        (void)unlink(self.path.sun_path);
}
