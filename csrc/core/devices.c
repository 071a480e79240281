/* SPDX-License-Identifier: Apache-2.0
 *
 * Devices that are opened while this process may still open them, for later.
 *
 * A process that gives its rights up before it listens to anybody needs /dev/userfaultfd and /dev/kvm afterwards: how often, and
 * whether at all, depends on requests from the network. Both devices make new descriptors (USERFAULTFD_IOC_NEW,
 * KVM_CREATE_VM) and check no rights while they do, so one that was opened in time is enough. A TAP is another
 * matter: the descriptor of /dev/net/tun becomes the interface, and so one that was kept serves once.
 *
 * This is the one state of the whole process in this library, since rights are the process's too.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <unistd.h>

#include "postcopy/devices.h"

static const char *const paths[] = {
    [PC_DEVICE_USERFAULTFD] = "/dev/userfaultfd",
    [PC_DEVICE_KVM] = "/dev/kvm",
    [PC_DEVICE_TUN] = "/dev/net/tun",
};
#define DEVICES (sizeof(paths) / sizeof(paths[0]))

/* The descriptor plus one, so that zero means none. */
static _Atomic int kept[DEVICES];

int pc_device_keep(int device)
{
    int fd, before;

    if (device < 0 || (size_t)device >= DEVICES)
        return -EINVAL;
    fd = open(paths[device], O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    before = atomic_exchange(&kept[device], fd + 1);
    if (before)
        close(before - 1);
    return 0;
}

int pc_device_open(int device)
{
    int fd, mine;

    if (device < 0 || (size_t)device >= DEVICES)
        return -EINVAL;
    if (device == PC_DEVICE_TUN) {
        mine = atomic_exchange(&kept[device], 0);
        if (mine)
            return mine - 1;
    } else if ((mine = atomic_load(&kept[device]))) {
        fd = fcntl(mine - 1, F_DUPFD_CLOEXEC, 0);
        return fd < 0 ? -errno : fd;
    }
    fd = open(paths[device], O_RDWR | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}
