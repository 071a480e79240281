/* SPDX-License-Identifier: Apache-2.0
 *
 * The network device: Ethernet frames between a file descriptor (a TAP) and guest memory, in the thread of the vCPU that asks.
 *
 * There are no rings and no interrupts. The guest names a buffer and gets the next frame into it, or sends one from it, or
 * waits for one. So there is nothing in flight when a vCPU is at rest, and what moves with the machine are its
 * addresses, each vCPU's last status, and counters. Frames that still lie in the TAP are lost with it, as Ethernet may lose them.
 *
 * Frames are copied by this thread, in user mode, between guest memory and a buffer of its own: the kernel never touches guest
 * memory, so that a userfaultfd for user-mode faults is enough. Missing pages are brought by
 * pc_vcpu_touch before anything else is done. Where a kick ends that wait the request is not done at all, and its status says so
 * (PCG_NET_AGAIN): no frame is taken from the TAP before its place is there.
 *
 * Every argument comes from the guest and may be hostile: a request is checked whole before any of it is done.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "machine/machine.h"

#define TICK_NS 100000000l /* as HLT's */

int pc_net_check(const struct pc_machine *machine, char *error, size_t error_bytes)
{
    const struct pc_machine_config *config = &machine->config;
    int flags;

    if (!config->has_net) {
        if (config->workload == PC_WORKLOAD_ECHO)
            return pc_fail(EINVAL, error, error_bytes, "the echo workload needs a network");
        return 0;
    }
    flags = fcntl(config->net_fd, F_GETFL);
    if (flags < 0)
        return pc_fail(errno, error, error_bytes, "the network cannot be used: %s", strerror(errno));
    if (!(flags & O_NONBLOCK) || (flags & O_ACCMODE) != O_RDWR)
        return pc_fail(EINVAL, error, error_bytes, "the network must be open for reading and writing, without blocking");
    if (config->net_mac == 0 || config->net_mac >> 48 || (config->net_mac >> 40 & 1))
        return pc_fail(EINVAL, error, error_bytes, "a network device needs the MAC address of one station");
    if (config->net_address >> 24 == 0 || config->net_address >> 24 == 127 || config->net_address >> 28 >= 14)
        return pc_fail(EINVAL, error, error_bytes, "a network device needs the IPv4 address of one host");
    return 0;
}

static uint32_t receive(struct pc_vcpu *vcpu, uint8_t *memory, uint64_t bytes)
{
    struct pc_machine *machine = vcpu->machine;
    uint8_t frame[PCG_NET_FRAME_MAX + 1]; /* one byte more: a longer frame shows */
    ssize_t n;

    if (!pc_vcpu_touch(vcpu, memory, bytes))
        return PCG_NET_AGAIN;
    do
        n = read(machine->config.net_fd, frame, sizeof frame);
    while (n < 0 && errno == EINTR);
    if (n <= 0)
        return PCG_NET_OK; /* nothing there; or no network (any more), which to the guest is the same */
    if (n < PCG_NET_FRAME_MIN || (uint64_t)n > bytes || n > PCG_NET_FRAME_MAX) {
        atomic_fetch_add(&machine->net_dropped, 1);
        return PCG_NET_OK;
    }
    memcpy(memory, frame, (size_t)n);
    atomic_fetch_add(&machine->net_received, 1);
    return (uint32_t)n;
}

static uint32_t transmit(struct pc_vcpu *vcpu, const uint8_t *memory, uint64_t bytes)
{
    struct pc_machine *machine = vcpu->machine;
    uint8_t frame[PCG_NET_FRAME_MAX];
    ssize_t n;

    if (!pc_vcpu_touch(vcpu, memory, bytes))
        return PCG_NET_AGAIN;
    memcpy(frame, memory, bytes);
    do
        n = write(machine->config.net_fd, frame, bytes);
    while (n < 0 && errno == EINTR);
    atomic_fetch_add((uint64_t)n == bytes ? &machine->net_sent : &machine->net_dropped, 1);
    return PCG_NET_OK;
}

static void wait_for_frame(struct pc_vcpu *vcpu)
{
    struct pollfd network = { .fd = vcpu->machine->config.net_fd, .events = POLLIN };
    struct timespec tick = { .tv_nsec = TICK_NS };
    sigset_t kick, before;
    int rc = 0;

    atomic_store(&vcpu->activity, PC_VCPU_HALTED);
    sigemptyset(&kick);
    sigaddset(&kick, pc_kick_signal());
    pthread_sigmask(SIG_BLOCK, &kick, &before);
    if (!atomic_load(&vcpu->machine->leave))
        rc = ppoll(&network, 1, &tick, &before);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
    if (rc > 0 && (network.revents & (POLLERR | POLLHUP | POLLNVAL)))
        pc_vcpu_halt(vcpu); /* no network at all: poll would come back at once for ever */
}

uint32_t pc_net_request(struct pc_vcpu *vcpu, uint32_t op, uint64_t gpa, uint64_t bytes)
{
    struct pc_machine *machine = vcpu->machine;
    uint8_t *memory = NULL;
    uint32_t status;

    if (machine->config.has_net && op == PCG_NET_WAIT) {
        wait_for_frame(vcpu);
        return PCG_NET_OK;
    }
    if (bytes >= PCG_NET_FRAME_MIN && bytes <= PCG_NET_FRAME_MAX)
        memory = pc_layout_gpa(&machine->layout, gpa, bytes);
    if (!machine->config.has_net || !memory || (op != PCG_NET_RECEIVE && op != PCG_NET_SEND)) {
        atomic_fetch_add(&machine->net_errors, 1);
        return PCG_NET_BAD_REQUEST;
    }
    atomic_store(&vcpu->activity, PC_VCPU_NET);
    status = op == PCG_NET_RECEIVE ? receive(vcpu, memory, bytes) : transmit(vcpu, memory, bytes);
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
    return status;
}

uint32_t pc_net_register(const struct pc_vcpu *vcpu, uint16_t port)
{
    const struct pc_machine_config *config = &vcpu->machine->config;

    if (port == PCG_PORT_NET_STATUS)
        return vcpu->net_status;
    if (!config->has_net)
        return UINT32_MAX; /* an empty bus */
    if (port == PCG_PORT_NET_MAC_LOW)
        return (uint32_t)config->net_mac;
    if (port == PCG_PORT_NET_MAC_HIGH)
        return (uint32_t)(config->net_mac >> 32);
    return config->net_address;
}
