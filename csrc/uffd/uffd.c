/* SPDX-License-Identifier: Apache-2.0
 *
 * userfaultfd, one function for each thing the kernel can be asked. No policy: nothing is retried and no thread is woken here.
 *
 * Two properties of the interface shape this file. A descriptor takes one successful UFFDIO_API only, so that asking what a
 * kernel has needs a descriptor to throw away. And the ioctls which fill pages report twice: by their return value and by a
 * result field which holds bytes done, a negative errno, or (after EINVAL and ESRCH, and for -EAGAIN on older kernels) whatever
 * it held before the call.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core/clock.h"
#include "postcopy/devices.h"
#include "postcopy/uffd.h"
#include "uffd/uffd_abi.h"

_Static_assert((int)PC_UFFD_IOCTL_REGISTER == _UFFDIO_REGISTER && (int)PC_UFFD_IOCTL_UNREGISTER == _UFFDIO_UNREGISTER &&
                   (int)PC_UFFD_IOCTL_WAKE == _UFFDIO_WAKE && (int)PC_UFFD_IOCTL_COPY == _UFFDIO_COPY &&
                   (int)PC_UFFD_IOCTL_ZEROPAGE == _UFFDIO_ZEROPAGE && (int)PC_UFFD_IOCTL_MOVE == _UFFDIO_MOVE &&
                   (int)PC_UFFD_IOCTL_WRITEPROTECT == _UFFDIO_WRITEPROTECT &&
                   (int)PC_UFFD_IOCTL_CONTINUE == _UFFDIO_CONTINUE && (int)PC_UFFD_IOCTL_POISON == _UFFDIO_POISON &&
                   (int)PC_UFFD_IOCTL_RWPROTECT == _UFFDIO_RWPROTECT,
               "bits of pc_uffd_ioctl are the kernel's");
_Static_assert(PC_UFFD_MISSING == UFFDIO_REGISTER_MODE_MISSING && PC_UFFD_WP == UFFDIO_REGISTER_MODE_WP &&
                   PC_UFFD_MINOR == UFFDIO_REGISTER_MODE_MINOR && PC_UFFD_RWP == UFFDIO_REGISTER_MODE_RWP,
               "bits of pc_uffd_mode are the kernel's");
_Static_assert((uint64_t)PC_UFFD_DONTWAKE == UFFDIO_COPY_MODE_DONTWAKE &&
                   (uint64_t)PC_UFFD_DONTWAKE == UFFDIO_ZEROPAGE_MODE_DONTWAKE &&
                   (uint64_t)PC_UFFD_DONTWAKE == UFFDIO_CONTINUE_MODE_DONTWAKE &&
                   (uint64_t)PC_UFFD_DONTWAKE == UFFDIO_POISON_MODE_DONTWAKE &&
                   (uint64_t)PC_UFFD_DONTWAKE == UFFDIO_MOVE_MODE_DONTWAKE &&
                   (uint64_t)PC_UFFD_FILL_WP == UFFDIO_COPY_MODE_WP && (uint64_t)PC_UFFD_FILL_WP == UFFDIO_CONTINUE_MODE_WP &&
                   (uint64_t)PC_UFFD_ALLOW_SRC_HOLES == UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES,
               "bits of pc_uffd_fill_mode are the kernel's");
_Static_assert((uint64_t)PC_UFFD_PROTECT == UFFDIO_WRITEPROTECT_MODE_WP &&
                   (uint64_t)PC_UFFD_PROTECT_DONTWAKE == UFFDIO_WRITEPROTECT_MODE_DONTWAKE &&
                   (uint64_t)PC_UFFD_PROTECT == UFFDIO_RWPROTECT_MODE_RWP &&
                   (uint64_t)PC_UFFD_PROTECT_DONTWAKE == UFFDIO_RWPROTECT_MODE_DONTWAKE,
               "bits of pc_uffd_writeprotect_mode are the kernel's");
_Static_assert((int)PC_UFFD_EVENT_PAGEFAULT == UFFD_EVENT_PAGEFAULT && (int)PC_UFFD_EVENT_FORK == UFFD_EVENT_FORK &&
                   (int)PC_UFFD_EVENT_REMAP == UFFD_EVENT_REMAP && (int)PC_UFFD_EVENT_REMOVE == UFFD_EVENT_REMOVE &&
                   (int)PC_UFFD_EVENT_UNMAP == UFFD_EVENT_UNMAP,
               "values of pc_uffd_event_type are the kernel's");
_Static_assert((uint64_t)PC_UFFD_FAULT_WRITE == UFFD_PAGEFAULT_FLAG_WRITE &&
                   (uint64_t)PC_UFFD_FAULT_WP == UFFD_PAGEFAULT_FLAG_WP &&
                   (uint64_t)PC_UFFD_FAULT_MINOR == UFFD_PAGEFAULT_FLAG_MINOR &&
                   (uint64_t)PC_UFFD_FAULT_RWP == UFFD_PAGEFAULT_FLAG_RWP,
               "bits of pc_uffd_fault_flags are the kernel's");

#define EVENTS_PER_READ 64
#define UFFD_INITIALIZED (UINT64_C(1) << 31) /* the kernel keeps it among the features: UFFDIO_API has been called */

static int uffd_ioctl(int uffd, unsigned long request, void *argument)
{
    return ioctl(uffd, request, argument) < 0 ? -errno : 0;
}

/* A descriptor before its handshake. Non-blocking always: poll(2) on a blocking userfaultfd returns POLLERR. */
static int open_raw(int how)
{
    const int flags = O_CLOEXEC | O_NONBLOCK;
    int fd = -1;

    switch (how) {
    case PC_UFFD_DEVICE: {
        int device = pc_device_open(PC_DEVICE_USERFAULTFD);
        int error;

        if (device < 0)
            return device;
        fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
        error = errno;
        close(device);
        return fd < 0 ? -error : fd;
    }
    case PC_UFFD_SYSCALL:
        fd = (int)syscall(SYS_userfaultfd, flags);
        return fd < 0 ? -errno : fd;
    case PC_UFFD_USER_ONLY:
        fd = (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
        return fd < 0 ? -errno : fd;
    default:
        return -EINVAL;
    }
}

/* Enables `features` on a new descriptor, which is closed where that fails. */
static int shake_hands(int fd, int how, uint64_t features, struct pc_uffd_api *api)
{
    /* The kernel answers with everything it has, whatever was asked for, and with EINVAL for a bit it does not know. */
    struct uffdio_api handshake = {.api = UFFD_API, .features = features};
    int result = uffd_ioctl(fd, UFFDIO_API, &handshake);

    if (result) {
        close(fd);
        return result;
    }
    if (api) {
        api->how = how;
        api->features = handshake.features;
        api->ioctls = handshake.ioctls;
    }
    return fd;
}

int pc_uffd_open(int how, uint64_t features, struct pc_uffd_api *api)
{
    static const int order[] = {PC_UFFD_DEVICE, PC_UFFD_SYSCALL, PC_UFFD_USER_ONLY};
    bool refused = false;
    int fd;

    if (how != PC_UFFD_ANY) {
        fd = open_raw(how);
        return fd < 0 ? fd : shake_hands(fd, how, features, api);
    }
    for (size_t i = 0; i < sizeof(order) / sizeof(order[0]); i++) {
        fd = open_raw(order[i]);
        /* A handshake that fails is the answer: no other way has other features. */
        if (fd >= 0)
            return shake_hands(fd, order[i], features, api);
        /* Nor has it more descriptors or memory. */
        if (fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM)
            return fd;
        refused = refused || fd == -EACCES || fd == -EPERM;
    }
    /* "Not allowed" has a remedy and is therefore said rather than what the last attempt happened to meet: a kernel before
     * 5.11, for one, calls UFFD_USER_MODE_ONLY invalid. */
    return refused ? -EPERM : fd;
}

int pc_uffd_probe(int how, struct pc_uffd_api *api)
{
    int fd = pc_uffd_open(how, 0, api);

    if (fd < 0)
        return fd;
    close(fd);
    return 0;
}

int pc_uffd_features(int uffd, uint64_t *features)
{
    char path[32], text[512], *found;
    unsigned long long bits;
    ssize_t got;
    int fd;

    (void)snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", uffd);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    got = read(fd, text, sizeof(text) - 1);
    close(fd);
    text[got > 0 ? got : 0] = '\0';
    found = strstr(text, "API:\t");
    if (!found || sscanf(found, "API:\t%*x:%llx:", &bits) != 1)
        return -EINVAL;
    *features = bits & ~UFFD_INITIALIZED;
    return 0;
}

int pc_uffd_register(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *ioctls)
{
    struct uffdio_register argument = {.range = {.start = address, .len = bytes}, .mode = mode};
    int result = uffd_ioctl(uffd, UFFDIO_REGISTER, &argument);

    if (ioctls)
        *ioctls = result ? 0 : argument.ioctls;
    return result;
}

int pc_uffd_unregister(int uffd, uint64_t address, uint64_t bytes)
{
    struct uffdio_range argument = {.start = address, .len = bytes};

    return uffd_ioctl(uffd, UFFDIO_UNREGISTER, &argument);
}

int pc_uffd_wake(int uffd, uint64_t address, uint64_t bytes)
{
    struct uffdio_range argument = {.start = address, .len = bytes};

    return uffd_ioctl(uffd, UFFDIO_WAKE, &argument);
}

/* Makes one answer of the two which the kernel gave. `field` was zero before the call. */
static int filled(int result, int64_t field, uint64_t bytes, uint64_t *done_bytes)
{
    uint64_t done = field > 0 ? (uint64_t)field : 0;

    if (done_bytes)
        *done_bytes = done;
    return result ? result : done == bytes ? 0 : -EAGAIN;
}

int pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes)
{
    struct uffdio_copy argument = {.dst = address, .src = (uint64_t)(uintptr_t)source, .len = bytes, .mode = mode};
    int result = uffd_ioctl(uffd, UFFDIO_COPY, &argument);

    return filled(result, argument.copy, bytes, done_bytes);
}

int pc_uffd_zeropage(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes)
{
    struct uffdio_zeropage argument = {.range = {.start = address, .len = bytes}, .mode = mode};
    int result = uffd_ioctl(uffd, UFFDIO_ZEROPAGE, &argument);

    return filled(result, argument.zeropage, bytes, done_bytes);
}

int pc_uffd_continue(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes)
{
    struct uffdio_continue argument = {.range = {.start = address, .len = bytes}, .mode = mode};
    int result = uffd_ioctl(uffd, UFFDIO_CONTINUE, &argument);

    return filled(result, argument.mapped, bytes, done_bytes);
}

int pc_uffd_poison(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes)
{
    struct uffdio_poison argument = {.range = {.start = address, .len = bytes}, .mode = mode};
    int result = uffd_ioctl(uffd, UFFDIO_POISON, &argument);

    return filled(result, argument.updated, bytes, done_bytes);
}

int pc_uffd_move(int uffd, uint64_t address, uint64_t source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes)
{
    struct uffdio_move argument = {.dst = address, .src = source, .len = bytes, .mode = mode};
    int result = uffd_ioctl(uffd, UFFDIO_MOVE, &argument);

    return filled(result, argument.move, bytes, done_bytes);
}

int pc_uffd_writeprotect(int uffd, uint64_t address, uint64_t bytes, uint64_t mode)
{
    struct uffdio_writeprotect argument = {.range = {.start = address, .len = bytes}, .mode = mode};

    return uffd_ioctl(uffd, UFFDIO_WRITEPROTECT, &argument);
}

int pc_uffd_rwprotect(int uffd, uint64_t address, uint64_t bytes, uint64_t mode)
{
    struct uffdio_rwprotect argument = {.range = {.start = address, .len = bytes}, .mode = mode};

    return uffd_ioctl(uffd, UFFDIO_RWPROTECT, &argument);
}

static struct pc_uffd_event event_of(const struct uffd_msg *message)
{
    struct pc_uffd_event event = {.type = message->event, .uffd = -1};

    switch (message->event) {
    case UFFD_EVENT_PAGEFAULT:
        event.address = message->arg.pagefault.address;
        event.flags = message->arg.pagefault.flags;
        event.tid = (int32_t)message->arg.pagefault.feat.ptid;
        break;
    case UFFD_EVENT_FORK:
        event.uffd = (int32_t)message->arg.fork.ufd;
        break;
    case UFFD_EVENT_REMAP:
        event.address = message->arg.remap.from;
        event.end = message->arg.remap.to;
        event.bytes = message->arg.remap.len;
        break;
    case UFFD_EVENT_REMOVE:
    case UFFD_EVENT_UNMAP:
        event.address = message->arg.remove.start;
        event.end = message->arg.remove.end;
        event.bytes = event.end - event.address;
        break;
    default: /* of a newer kernel: nothing but its number is known */
        break;
    }
    return event;
}

ssize_t pc_uffd_read_now(int uffd, void *messages, size_t bytes)
{
    struct iovec all = {.iov_base = messages, .iov_len = bytes};
    ssize_t got = preadv2(uffd, &all, 1, -1, RWF_NOWAIT);

    if (got < 0 && errno == EOPNOTSUPP) /* before Linux 6.10 */
        got = read(uffd, messages, bytes);
    return got;
}

int pc_uffd_read(int uffd, struct pc_uffd_event *events, uint32_t capacity)
{
    struct uffd_msg messages[EVENTS_PER_READ];
    ssize_t got;

    if (!capacity)
        return -EINVAL;
    if (capacity > EVENTS_PER_READ)
        capacity = EVENTS_PER_READ;
    do
        got = pc_uffd_read_now(uffd, messages, capacity * sizeof(*messages));
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return errno == EAGAIN ? 0 : -errno;
    for (size_t i = 0; i < (size_t)got / sizeof(*messages); i++)
        events[i] = event_of(&messages[i]);
    return (int)((size_t)got / sizeof(*messages));
}

int pc_uffd_read_spinning(int uffd, struct pc_uffd_event *events, uint32_t capacity, uint64_t spin_ns)
{
    uint64_t begin_ns = pc_now_ns();
    int got;

    do
        got = pc_uffd_read(uffd, events, capacity);
    while (!got && pc_now_ns() - begin_ns < spin_ns);
    return got;
}
