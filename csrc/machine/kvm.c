/* SPDX-License-Identifier: Apache-2.0
 *
 * The kvm machine: vCPU threads, how they are started and stopped, and what their exits mean.
 *
 * Stopping a vCPU. Its thread is inside KVM_RUN, in a device, asleep after HLT, or on its way between these. The pauser
 * raises `leave`, sets immediate_exit in the page shared with KVM, and sends the thread a signal, in this order. A thread
 * that looked at `leave` too early then either enters KVM_RUN, which sees immediate_exit and returns at once, or is inside
 * already, where the signal finds it. Signal without immediate_exit loses the kick when it lands between the look and
 * the ioctl; immediate_exit without signal is only read on entry. The thread clears immediate_exit itself, under the
 * lock, when it may run again, so no clearing can hit a later kick.
 *
 * A vCPU on a missing page: KVM waits for it interruptibly (x86, since 6.2), so the signal brings the thread out with the
 * access not yet done. Two waits are deaf: a disk transfer (disk.c), and copy_from_user inside a KVM that emulates the
 * guest: there the kernel repeats the fault as long as a signal is pending. Then the pause fails after its timeout.
 *
 * Threads block every signal except the kick and those that the kernel raises for what a thread itself did, so that
 * the embedding program's handlers never run on a vCPU thread. SIGBUS is among the latter on purpose: KVM sends it for
 * a poisoned page, and would, if it were blocked, try the same page for ever.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "machine.h"

#define MARK_EVENT_INTERVAL_NS 50000000ull
#define HALT_NS                100000000ull

uint64_t pc_machine_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int pc_machine_error(char *error, size_t error_bytes, int code, const char *format, ...)
{
    va_list arguments;

    if (error && error_bytes) {
        va_start(arguments, format);
        vsnprintf(error, error_bytes, format, arguments);
        va_end(arguments);
    }
    return code;
}

#if defined(__x86_64__)

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

int pc_machine_ioctl(int fd, unsigned long request, void *argument)
{
    int rc;

    do
        rc = ioctl(fd, request, argument);
    while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : rc;
}

/* ---- the kick ---- */

static pthread_once_t kick_once = PTHREAD_ONCE_INIT;
static int kick_signal; /* 0: none was free */

static void on_kick(int signal_number)
{
    (void)signal_number; /* its arrival is all: it makes KVM_RUN return */
}

/* The one thing here that is the process's and not a machine's: a signal has a single handler. Takes the highest
 * realtime signal that nobody uses, so the program's own choices are left alone. */
static void choose_kick_signal(void)
{
    for (int candidate = SIGRTMAX; candidate >= SIGRTMIN; candidate--) {
        struct sigaction old, action = { .sa_handler = on_kick };
        if (sigaction(candidate, NULL, &old) || (old.sa_flags & SA_SIGINFO) || old.sa_handler != SIG_DFL)
            continue;
        sigemptyset(&action.sa_mask); /* no SA_RESTART: it would re-enter KVM_RUN */
        if (sigaction(candidate, &action, NULL) == 0) {
            kick_signal = candidate;
            return;
        }
    }
}

/* Under the lock. Everybody out: see the top of this file for the order. */
static void kick_all(struct pc_kvm *machine)
{
    atomic_store(&machine->leave, true);
    for (uint32_t i = 0; i < machine->vcpu_count; i++) {
        struct pc_vcpu *vcpu = &machine->vcpu[i];
        if (!vcpu->has_thread || vcpu->parked || atomic_load(&vcpu->activity) == PC_VCPU_GONE)
            continue;
        __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        pthread_kill(vcpu->thread, kick_signal);
    }
    pthread_cond_broadcast(&machine->changed);
}

/* ---- reports and failures ---- */

static void tell(struct pc_kvm *machine)
{
    uint64_t one = 1;
    /* EAGAIN means 2^64 - 2 unread events: readable anyway. */
    ssize_t n = write(machine->event_fd, &one, sizeof one);
    (void)n;
}

static const char *failure_name(uint64_t code)
{
    switch (code) {
    case PCG_FAIL_EXCEPTION: return "exception in the guest program (where: RIP, expected: vector)";
    case PCG_FAIL_BOOT: return "boot info is not there";
    case PCG_FAIL_CHECK_WORD: return "page with a wrong check word";
    case PCG_FAIL_PASS: return "page with a wrong pass count";
    case PCG_FAIL_XMM: return "XMM7 changed";
    case PCG_FAIL_GS_BASE: return "GS base changed";
    case PCG_FAIL_MSR: return "MSR changed";
    case PCG_FAIL_DEBUGREG: return "debug register changed";
    case PCG_FAIL_CR2: return "CR2 changed";
    case PCG_FAIL_TSC: return "time stamp counter went back";
    case PCG_FAIL_DISK_STATUS: return "disk request failed";
    case PCG_FAIL_DISK_DATA: return "wrong data from the disk";
    default: return "unknown failure";
    }
}

/* The first failure is kept, whoever reports it; later ones only count. */
static void keep_failure(struct pc_vcpu *vcpu, uint64_t code, uint64_t where, uint64_t expected, uint64_t found,
                         const char *text)
{
    struct pc_kvm *machine = vcpu->machine;

    if (atomic_exchange(&machine->failure_claimed, 1))
        return;
    machine->failure_vcpu = vcpu->index;
    machine->failure_code = (uint32_t)code;
    machine->failure_where = where;
    machine->failure_expected = expected;
    machine->failure_found = found;
    snprintf(machine->failure_text, sizeof machine->failure_text, "%s", text);
    atomic_store_explicit(&machine->failure_published, 1, memory_order_release);
}

static void guest_failure(struct pc_vcpu *vcpu, uint64_t code, uint64_t where, uint64_t expected, uint64_t found)
{
    char text[sizeof vcpu->machine->failure_text];

    snprintf(text, sizeof text, "vCPU %u: %s at 0x%llx: expected 0x%llx, found 0x%llx", vcpu->index, failure_name(code),
             (unsigned long long)where, (unsigned long long)expected, (unsigned long long)found);
    keep_failure(vcpu, code, where, expected, found, text);
    atomic_fetch_add(&vcpu->failures, 1);
}

/* This vCPU cannot go on: the whole machine stops. */
static void vcpu_failed(struct pc_vcpu *vcpu, const char *what)
{
    struct pc_kvm *machine = vcpu->machine;
    struct kvm_regs regs;
    char text[sizeof machine->failure_text];
    uint64_t rip = pc_machine_ioctl(vcpu->fd, KVM_GET_REGS, &regs) ? 0 : regs.rip;

    snprintf(text, sizeof text, "vCPU %u: %s, RIP 0x%llx", vcpu->index, what, (unsigned long long)rip);
    keep_failure(vcpu, 0, rip, 0, 0, text);
    pthread_mutex_lock(&machine->lock);
    atomic_store(&machine->state, PC_MACHINE_FAILED);
    machine->want_run = false;
    kick_all(machine);
    pthread_mutex_unlock(&machine->lock);
    tell(machine);
}

/* ---- exits ---- */

static int guest_registers(struct pc_vcpu *vcpu, struct kvm_regs *regs)
{
    if (vcpu->machine->has_sync_regs) {
        *regs = vcpu->run->s.regs.regs;
        return 0;
    }
    return pc_machine_ioctl(vcpu->fd, KVM_GET_REGS, regs);
}

/* False: the vCPU is to stop. */
static bool report(struct pc_vcpu *vcpu, uint32_t what)
{
    struct pc_kvm *machine = vcpu->machine;
    struct kvm_regs regs;
    uint64_t now_ns;

    if (guest_registers(vcpu, &regs)) {
        vcpu_failed(vcpu, "its registers cannot be read");
        return false;
    }
    switch (what) {
    case PCG_READY:
        atomic_store(&machine->nonce, regs.rbx);
        atomic_store(&vcpu->ready, 1);
        tell(machine);
        return true;
    case PCG_MARK:
        atomic_fetch_add(&vcpu->marks, 1);
        atomic_store(&vcpu->operations, regs.rbx);
        atomic_store(&machine->nonce, regs.rcx);
        /* A fast guest makes 100,000 marks a second; whoever waits for the event need not wake for each. */
        now_ns = pc_machine_now_ns();
        if (now_ns - vcpu->mark_told_ns >= MARK_EVENT_INTERVAL_NS) {
            vcpu->mark_told_ns = now_ns;
            tell(machine);
        }
        return true;
    case PCG_FAILURE:
        guest_failure(vcpu, regs.rbx, regs.rcx, regs.rsi, regs.rdi);
        if (regs.rbx == PCG_FAIL_EXCEPTION) {
            vcpu_failed(vcpu, "stopped by an exception");
            return false;
        }
        tell(machine);
        return true;
    default:
        return true; /* like a write to a port where nothing is */
    }
}

static bool port_out(struct pc_vcpu *vcpu, uint16_t port, uint32_t value)
{
    struct pc_kvm *machine = vcpu->machine;
    struct kvm_regs regs;

    switch (port) {
    case PCG_PORT_SERIAL:
        atomic_fetch_add(&machine->serial_bytes, 1);
        return true;
    case PCG_PORT_REPORT:
        return report(vcpu, value);
    case PCG_PORT_DISK:
        if (guest_registers(vcpu, &regs)) {
            vcpu_failed(vcpu, "its registers cannot be read");
            return false;
        }
        atomic_store(&vcpu->activity, PC_VCPU_DISK);
        vcpu->disk_status = pc_disk_request(vcpu, value, regs.rbx, regs.rcx, regs.rsi);
        atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
        return true;
    default:
        return true;
    }
}

static uint32_t port_in(struct pc_vcpu *vcpu, uint16_t port)
{
    uint32_t value = UINT32_MAX; /* what an empty bus reads as */

    switch (port) {
    case PCG_PORT_SERIAL + 5:
        return 0x60; /* line status: ready to transmit */
    case PCG_PORT_ENTROPY:
        if (getrandom(&value, sizeof value, 0) != sizeof value)
            value = (uint32_t)pc_machine_now_ns();
        return value;
    case PCG_PORT_DISK_STATUS:
        return vcpu->disk_status;
    default:
        return value;
    }
}

static bool handle_io(struct pc_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;

    /* String I/O brings several values at once. */
    for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
        uint32_t value = 0;
        if (run->io.direction == KVM_EXIT_IO_OUT) {
            memcpy(&value, data, run->io.size);
            if (!port_out(vcpu, run->io.port, value))
                return false;
        } else {
            value = port_in(vcpu, run->io.port);
            memcpy(data, &value, run->io.size);
        }
    }
    return true;
}

/* Until the next tick, or until the vCPU must leave. */
static void halt(struct pc_vcpu *vcpu)
{
    struct pc_kvm *machine = vcpu->machine;
    uint64_t until_ns = pc_machine_now_ns() + HALT_NS;
    struct timespec until = { .tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u) };

    atomic_store(&vcpu->activity, PC_VCPU_HALTED);
    pthread_mutex_lock(&machine->lock);
    while (!atomic_load(&machine->leave) && pthread_cond_timedwait(&machine->changed, &machine->lock, &until) == 0)
        ;
    pthread_mutex_unlock(&machine->lock);
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
}

/* One KVM_RUN and what it asks for. False: the vCPU has failed. */
static bool run_once(struct pc_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    char text[128];
    int rc, code;

    atomic_store(&vcpu->activity, PC_VCPU_GUEST);
    rc = ioctl(vcpu->fd, KVM_RUN, 0);
    code = rc < 0 ? errno : 0;
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
    vcpu->io_pending = false;
    if (code == EINTR || code == EAGAIN)
        return true;
    if (code) {
        snprintf(text, sizeof text, code == EFAULT || code == EHWPOISON
                                        ? "guest memory cannot be accessed (%s): poisoned or unmapped"
                                        : "KVM_RUN: %s",
                 strerrordesc_np(code));
        vcpu_failed(vcpu, text);
        return false;
    }
    atomic_fetch_add_explicit(&vcpu->exits, 1, memory_order_relaxed);
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        vcpu->io_pending = true;
        return handle_io(vcpu);
    case KVM_EXIT_HLT:
        halt(vcpu);
        return true;
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
        return true;
    case KVM_EXIT_MMIO:
        snprintf(text, sizeof text, "access to guest-physical 0x%llx, where no memory is",
                 (unsigned long long)run->mmio.phys_addr);
        break;
    case KVM_EXIT_SHUTDOWN:
        snprintf(text, sizeof text, "triple fault");
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        snprintf(text, sizeof text, "KVM cannot run the guest (internal error %u%s)", run->internal.suberror,
                 run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION ? ": instruction not emulated" : "");
        break;
    case KVM_EXIT_FAIL_ENTRY:
        snprintf(text, sizeof text, "the processor refused to enter the guest (0x%llx)",
                 (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
        break;
    default:
        snprintf(text, sizeof text, "unexpected exit %u", run->exit_reason);
        break;
    }
    vcpu_failed(vcpu, text);
    return false;
}

/* An IN or OUT is complete (RIP advanced, result in RAX) only at the next KVM_RUN. Saved before that, the instruction
 * would be repeated or lost on the other host. With immediate_exit set KVM completes it and comes straight back. */
static bool complete_io(struct pc_vcpu *vcpu)
{
    while (vcpu->io_pending) {
        __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        if (!run_once(vcpu))
            return false;
    }
    return true;
}

/* Waits for leave to run; false when the thread is to end. */
static bool park(struct pc_vcpu *vcpu)
{
    struct pc_kvm *machine = vcpu->machine;
    bool go;

    pthread_mutex_lock(&machine->lock);
    vcpu->parked = true;
    atomic_store(&vcpu->activity, PC_VCPU_PARKED);
    pthread_cond_broadcast(&machine->changed);
    while (!machine->want_run && !machine->stop)
        pthread_cond_wait(&machine->changed, &machine->lock);
    go = !machine->stop;
    vcpu->parked = false;
    __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&machine->lock);
    return go;
}

static void release(struct pc_kvm *machine);

static void *vcpu_thread(void *argument)
{
    struct pc_vcpu *vcpu = argument;
    struct pc_kvm *machine = vcpu->machine;
    char name[16];
    sigset_t set;

    snprintf(name, sizeof name, "pc-vcpu%u", vcpu->index);
    pthread_setname_np(pthread_self(), name);
    sigfillset(&set);
    sigdelset(&set, kick_signal);
    sigdelset(&set, SIGBUS);
    sigdelset(&set, SIGSEGV);
    sigdelset(&set, SIGILL);
    sigdelset(&set, SIGFPE);
    pthread_sigmask(SIG_SETMASK, &set, NULL);
    atomic_store(&vcpu->tid, (int32_t)syscall(SYS_gettid));

    while (park(vcpu)) {
        uint64_t never = 0;
        atomic_compare_exchange_strong(&machine->first_run_ns, &never, pc_machine_now_ns());
        while (!atomic_load(&machine->leave))
            if (!run_once(vcpu))
                break;
        complete_io(vcpu);
    }

    pthread_mutex_lock(&machine->lock);
    atomic_store(&vcpu->activity, PC_VCPU_GONE);
    pthread_cond_broadcast(&machine->changed);
    pthread_mutex_unlock(&machine->lock);
    release(machine);
    return NULL;
}

/* ---- open and close ---- */

static void destroy(struct pc_kvm *machine)
{
    for (uint32_t i = 0; i < machine->vcpu_count; i++) {
        if (machine->vcpu[i].run)
            munmap(machine->vcpu[i].run, machine->run_bytes);
        close(machine->vcpu[i].fd);
        free(machine->vcpu[i].cpuid);
    }
    if (machine->vm_fd >= 0)
        close(machine->vm_fd);
    if (machine->kvm_fd >= 0)
        close(machine->kvm_fd);
    if (machine->event_fd >= 0)
        close(machine->event_fd);
    pthread_cond_destroy(&machine->changed);
    pthread_mutex_destroy(&machine->lock);
    free(machine->host_cpuid);
    free(machine);
}

/* Outside of the lock: a thread that still is inside pthread_mutex_unlock must hold its reference. */
static void release(struct pc_kvm *machine)
{
    if (atomic_fetch_sub(&machine->references, 1) == 1)
        destroy(machine);
}

static int open_device(struct pc_kvm *machine, char *error, size_t error_bytes)
{
    int rc;

    machine->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (machine->kvm_fd < 0) {
        rc = -errno;
        if (rc == -ENOENT || rc == -ENXIO || rc == -ENODEV)
            return pc_machine_error(error, error_bytes, -ENOENT,
                                    "no /dev/kvm: load kvm_intel or kvm_amd, enable virtualization in the firmware, or "
                                    "give the container --device /dev/kvm");
        if (rc == -EACCES || rc == -EPERM)
            return pc_machine_error(error, error_bytes, rc,
                                    "no right to use /dev/kvm: become a member of the group that owns it (often \"kvm\")");
        return pc_machine_error(error, error_bytes, rc, "/dev/kvm cannot be opened: %s", strerrordesc_np(-rc));
    }
    rc = pc_machine_ioctl(machine->kvm_fd, KVM_GET_API_VERSION, NULL);
    if (rc != KVM_API_VERSION)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "/dev/kvm speaks API version %d, not %d", rc,
                                KVM_API_VERSION);
    return 0;
}

static int has(const struct pc_kvm *machine, long capability)
{
    int rc = ioctl(machine->vm_fd, KVM_CHECK_EXTENSION, capability);

    return rc < 0 ? 0 : rc;
}

static int check_features(struct pc_kvm *machine, char *error, size_t error_bytes)
{
    static const struct {
        long capability;
        const char *name;
    } needed[] = {
        { KVM_CAP_USER_MEMORY, "USER_MEMORY" },
        { KVM_CAP_SYNC_MMU, "SYNC_MMU" }, /* pages may change under the guest: what postcopy is */
        { KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT" },
        { KVM_CAP_EXT_CPUID, "EXT_CPUID" },
        { KVM_CAP_XSAVE, "XSAVE" },
        { KVM_CAP_VCPU_EVENTS, "VCPU_EVENTS" },
        { KVM_CAP_MP_STATE, "MP_STATE" },
    };
    int xsave_bytes;

    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if (!has(machine, needed[i].capability))
            return pc_machine_error(error, error_bytes, -ENOTSUP, "this KVM lacks KVM_CAP_%s", needed[i].name);
    if ((uint32_t)has(machine, KVM_CAP_NR_MEMSLOTS) < PC_SLOTS_MAX)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "this KVM has too few memory slots");
    machine->has_sync_regs = has(machine, KVM_CAP_SYNC_REGS) & KVM_SYNC_X86_REGS;
    machine->has_xcrs = has(machine, KVM_CAP_XCRS);
    machine->has_debugregs = has(machine, KVM_CAP_DEBUGREGS);
    machine->has_tsc_control = has(machine, KVM_CAP_TSC_CONTROL);
    xsave_bytes = has(machine, KVM_CAP_XSAVE2);
    machine->has_xsave2 = xsave_bytes > 0;
    machine->xsave_bytes = xsave_bytes > (int)sizeof(struct kvm_xsave) ? (uint32_t)xsave_bytes : sizeof(struct kvm_xsave);
    return 0;
}

static int get_host_cpuid(struct pc_kvm *machine, char *error, size_t error_bytes)
{
    uint32_t physical_bits = 36;
    int rc;

    /* E2BIG until there is room: the number of leaves differs between processors. */
    for (uint32_t entries = 64;; entries *= 2) {
        struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + entries * sizeof cpuid->entries[0]);
        if (!cpuid)
            return -ENOMEM;
        cpuid->nent = entries;
        rc = pc_machine_ioctl(machine->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid);
        if (rc == 0) {
            machine->host_cpuid = cpuid;
            break;
        }
        free(cpuid);
        if (rc != -E2BIG || entries > 4096)
            return pc_machine_error(error, error_bytes, rc, "KVM_GET_SUPPORTED_CPUID: %s", strerrordesc_np(-rc));
    }
    for (uint32_t i = 0; i < machine->host_cpuid->nent; i++)
        if (machine->host_cpuid->entries[i].function == 0x80000008)
            physical_bits = machine->host_cpuid->entries[i].eax & 0xff;
    if (physical_bits < 64 && machine->layout.guest_end > 1ull << physical_bits)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "this processor addresses %u bits: too much guest memory",
                                physical_bits);
    return 0;
}

static int make_vcpu(struct pc_kvm *machine, uint32_t index, char *error, size_t error_bytes)
{
    struct pc_vcpu *vcpu = &machine->vcpu[index];
    sigset_t all, old;
    void *run;
    int rc = ioctl(machine->vm_fd, KVM_CREATE_VCPU, (unsigned long)index);

    if (rc < 0)
        return pc_machine_error(error, error_bytes, -errno, "vCPU %u cannot be made: %s", index, strerrordesc_np(errno));
    vcpu->fd = rc;
    vcpu->machine = machine;
    vcpu->index = index;
    machine->vcpu_count++; /* from here on destroy() closes it */
    run = mmap(NULL, machine->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (run == MAP_FAILED)
        return pc_machine_error(error, error_bytes, -errno, "vCPU %u cannot be mapped: %s", index, strerrordesc_np(errno));
    vcpu->run = run;
    if (machine->has_sync_regs)
        vcpu->run->kvm_valid_regs = KVM_SYNC_X86_REGS;

    /* The thread inherits a full mask: no signal reaches it before it has chosen its own. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    atomic_fetch_add(&machine->references, 1);
    rc = pthread_create(&vcpu->thread, NULL, vcpu_thread, vcpu);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc) {
        atomic_fetch_sub(&machine->references, 1);
        return pc_machine_error(error, error_bytes, -rc, "no thread for vCPU %u: %s", index, strerrordesc_np(rc));
    }
    vcpu->has_thread = true;
    pthread_mutex_lock(&machine->lock);
    while (!vcpu->parked)
        pthread_cond_wait(&machine->changed, &machine->lock);
    pthread_mutex_unlock(&machine->lock);
    return 0;
}

static int set_up(struct pc_kvm *machine, char *error, size_t error_bytes)
{
    uint64_t identity_map = 0xfffbc000;
    int rc;

    machine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (machine->event_fd < 0)
        return pc_machine_error(error, error_bytes, -errno, "no eventfd: %s", strerrordesc_np(errno));
    rc = open_device(machine, error, error_bytes);
    if (rc)
        return rc;
    machine->vm_fd = pc_machine_ioctl(machine->kvm_fd, KVM_CREATE_VM, NULL);
    if (machine->vm_fd < 0)
        return pc_machine_error(error, error_bytes, machine->vm_fd, "KVM makes no machine: %s",
                                strerrordesc_np(-machine->vm_fd));
    rc = check_features(machine, error, error_bytes);
    if (!rc)
        rc = get_host_cpuid(machine, error, error_bytes);
    if (rc)
        return rc;
    /* Pages that older Intel processors need for real mode, inside the hole; before the first vCPU. AMD ignores them. */
    rc = pc_machine_ioctl(machine->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
    if (rc == 0 && ioctl(machine->vm_fd, KVM_SET_TSS_ADDR, 0xfffbd000ul))
        rc = -errno;
    if (rc)
        return pc_machine_error(error, error_bytes, rc, "KVM_SET_TSS_ADDR: %s", strerrordesc_np(-rc));
    for (uint32_t i = 0; i < machine->layout.slot_count; i++) {
        const struct pc_slot *slot = &machine->layout.slots[i];
        struct kvm_userspace_memory_region region = {
            .slot = i,
            .guest_phys_addr = slot->gpa,
            .memory_size = slot->bytes,
            .userspace_addr = (uintptr_t)slot->host,
        };
        rc = pc_machine_ioctl(machine->vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
        if (rc)
            return pc_machine_error(error, error_bytes, rc, "KVM refuses %llu bytes of memory at 0x%llx: %s",
                                    (unsigned long long)slot->bytes, (unsigned long long)slot->gpa, strerrordesc_np(-rc));
    }
    rc = pc_machine_ioctl(machine->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, NULL);
    if (rc < (int)sizeof(struct kvm_run))
        return pc_machine_error(error, error_bytes, -ENOTSUP, "KVM_GET_VCPU_MMAP_SIZE: %d", rc);
    machine->run_bytes = (size_t)rc;
    for (uint32_t i = 0; i < machine->config.vcpus; i++) {
        rc = make_vcpu(machine, i, error, error_bytes);
        if (rc)
            return rc;
    }
    return 0;
}

int pc_kvm_open(const struct pc_kvm_config *config, struct pc_kvm **out, char *error, size_t error_bytes)
{
    struct pc_kvm *machine;
    pthread_condattr_t attributes;
    int rc;

    *out = NULL;
    if (config->workload > PC_WORKLOAD_DISK)
        return pc_machine_error(error, error_bytes, -EINVAL, "unknown workload %u", config->workload);
    pthread_once(&kick_once, choose_kick_signal);
    if (!kick_signal)
        return pc_machine_error(error, error_bytes, -EBUSY, "every realtime signal has a handler: none is left for vCPUs");
    machine = calloc(1, sizeof *machine);
    if (!machine)
        return pc_machine_error(error, error_bytes, -ENOMEM, "out of memory");
    machine->config = *config;
    machine->kvm_fd = machine->vm_fd = machine->event_fd = -1;
    atomic_store(&machine->references, 1);
    pthread_mutex_init(&machine->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&machine->changed, &attributes);
    pthread_condattr_destroy(&attributes);

    /* What is wrong with the configuration is said first, on hosts without KVM too. */
    rc = pc_layout_make(config, &machine->layout, error, error_bytes);
    if (!rc)
        rc = pc_disk_geometry(machine, error, error_bytes);
    if (!rc)
        rc = set_up(machine, error, error_bytes);
    if (rc) {
        pc_kvm_close(machine, 1000); /* parked threads leave at once */
        return rc;
    }
    *out = machine;
    return 0;
}

/* Under the lock: true when every thread has ended (`gone`) or is at least parked; false at the deadline. */
static bool wait_for_vcpus(struct pc_kvm *machine, uint32_t timeout_ms, bool gone)
{
    uint64_t until_ns = pc_machine_now_ns() + timeout_ms * 1000000ull;
    struct timespec until = { .tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u) };
    bool late = false;

    for (;;) {
        uint32_t waiting = 0;
        for (uint32_t i = 0; i < machine->vcpu_count; i++) {
            const struct pc_vcpu *vcpu = &machine->vcpu[i];
            bool is_gone = !vcpu->has_thread || atomic_load(&vcpu->activity) == PC_VCPU_GONE;
            waiting += !(is_gone || (!gone && vcpu->parked));
        }
        if (waiting == 0 || late)
            return waiting == 0;
        late = pthread_cond_timedwait(&machine->changed, &machine->lock, &until) == ETIMEDOUT;
    }
}

int pc_kvm_close(struct pc_kvm *machine, uint32_t timeout_ms)
{
    bool in_time;

    if (!machine)
        return 0;
    pthread_mutex_lock(&machine->lock);
    machine->stop = true;
    machine->want_run = false;
    kick_all(machine);
    in_time = wait_for_vcpus(machine, timeout_ms, true);
    pthread_mutex_unlock(&machine->lock);
    for (uint32_t i = 0; i < machine->vcpu_count; i++) {
        struct pc_vcpu *vcpu = &machine->vcpu[i];
        if (!vcpu->has_thread)
            continue;
        if (in_time)
            pthread_join(vcpu->thread, NULL);
        else
            pthread_detach(vcpu->thread);
    }
    release(machine);
    return in_time ? 0 : -ETIMEDOUT;
}

/* ---- run control ---- */

/* Takes the machine for something that needs it at rest, in the given state. */
static int begin(struct pc_kvm *machine, int32_t state)
{
    int32_t now;
    int rc = 0;

    pthread_mutex_lock(&machine->lock);
    now = atomic_load(&machine->state);
    if (machine->transition)
        rc = -EBUSY;
    else if (now != state)
        rc = now == PC_MACHINE_FAILED ? -EIO : -EBUSY;
    else
        machine->transition = true;
    pthread_mutex_unlock(&machine->lock);
    return rc;
}

static void end(struct pc_kvm *machine, int32_t state)
{
    pthread_mutex_lock(&machine->lock);
    atomic_store(&machine->state, state);
    machine->transition = false;
    pthread_mutex_unlock(&machine->lock);
}

int pc_kvm_resume(struct pc_kvm *machine)
{
    int32_t state;
    int rc = 0;

    pthread_mutex_lock(&machine->lock);
    state = atomic_load(&machine->state);
    if (state == PC_MACHINE_RUNNING && !machine->transition) {
        ;
    } else if (machine->transition) {
        rc = -EBUSY;
    } else if (state == PC_MACHINE_FAILED) {
        rc = -EIO;
    } else if (state == PC_MACHINE_CREATED) {
        rc = -EINVAL;
    } else {
        atomic_store(&machine->first_run_ns, 0);
        atomic_store(&machine->leave, false);
        atomic_store(&machine->state, PC_MACHINE_RUNNING);
        machine->want_run = true;
        pthread_cond_broadcast(&machine->changed);
    }
    pthread_mutex_unlock(&machine->lock);
    return rc;
}

static void name_the_stuck(const struct pc_kvm *machine, uint32_t timeout_ms, char *error, size_t error_bytes)
{
    for (uint32_t i = 0; i < machine->vcpu_count; i++) {
        const struct pc_vcpu *vcpu = &machine->vcpu[i];
        int32_t activity = atomic_load(&vcpu->activity);
        if (vcpu->parked)
            continue;
        pc_machine_error(error, error_bytes, 0, "vCPU %u (thread %d) did not stop within %u ms: it is in %s", i,
                         atomic_load(&vcpu->tid), timeout_ms,
                         activity == PC_VCPU_DISK    ? "a disk transfer, probably waiting for a missing page"
                         : activity == PC_VCPU_GUEST ? "KVM_RUN, probably waiting for a missing page"
                                                     : "device emulation");
        return;
    }
}

int pc_kvm_pause(struct pc_kvm *machine, uint32_t timeout_ms, char *error, size_t error_bytes)
{
    int32_t state;
    int rc = 0;

    pthread_mutex_lock(&machine->lock);
    state = atomic_load(&machine->state);
    if (machine->transition)
        rc = pc_machine_error(error, error_bytes, -EBUSY, "another operation on this machine is under way");
    else if (state == PC_MACHINE_CREATED)
        rc = pc_machine_error(error, error_bytes, -EINVAL, "the machine has not been started");
    else if (state != PC_MACHINE_PAUSED) {
        bool want_run = machine->want_run; /* false when failed: its vCPUs are on their way out already */
        machine->transition = true;
        machine->want_run = false;
        kick_all(machine);
        if (!wait_for_vcpus(machine, timeout_ms, false)) {
            name_the_stuck(machine, timeout_ms, error, error_bytes);
            rc = -ETIMEDOUT;
            if (want_run && !machine->stop && atomic_load(&machine->state) != PC_MACHINE_FAILED) {
                /* As if nothing had been: whoever is still inside has immediate_exit set and would otherwise spin. */
                for (uint32_t i = 0; i < machine->vcpu_count; i++)
                    __atomic_store_n(&machine->vcpu[i].run->immediate_exit, 0, __ATOMIC_SEQ_CST);
                atomic_store(&machine->leave, false);
                machine->want_run = true;
                pthread_cond_broadcast(&machine->changed);
            }
        } else if (atomic_load(&machine->state) == PC_MACHINE_FAILED) {
            rc = pc_machine_error(error, error_bytes, -EIO, "%s", machine->failure_text);
        } else {
            atomic_store(&machine->state, PC_MACHINE_PAUSED);
            atomic_store(&machine->paused_ns, pc_machine_now_ns());
        }
        machine->transition = false;
    }
    pthread_mutex_unlock(&machine->lock);
    return rc;
}

/* 64-bit mode with paging on, as a loader would leave it; the vCPU's number in RDI. */
static int set_start_state(struct pc_vcpu *vcpu)
{
    const struct pc_kvm *machine = vcpu->machine;
    struct kvm_segment code = { .limit = 0xffffffff, .selector = PCG_CODE_SELECTOR, .type = 11, .present = 1, .s = 1,
                                .l = 1, .g = 1 };
    struct kvm_segment data = { .limit = 0xffffffff, .selector = PCG_DATA_SELECTOR, .type = 3, .present = 1, .s = 1,
                                .db = 1, .g = 1 };
    struct kvm_regs regs = { .rip = PCG_IMAGE, .rflags = 2, .rdi = vcpu->index,
                             .rsp = PCG_STACKS + (vcpu->index + 1) * PCG_STACK_BYTES };
    struct kvm_sregs sregs;
    struct kvm_xcrs xcrs;
    struct kvm_cpuid2 *cpuid;
    size_t cpuid_bytes = sizeof *cpuid + machine->host_cpuid->nent * sizeof cpuid->entries[0];
    bool has_xsave = false;
    int rc;

    cpuid = malloc(cpuid_bytes);
    if (!cpuid)
        return -ENOMEM;
    memcpy(cpuid, machine->host_cpuid, cpuid_bytes);
    for (uint32_t i = 0; i < cpuid->nent; i++) {
        struct kvm_cpuid_entry2 *entry = &cpuid->entries[i];
        if (entry->function == 1) {
            entry->ebx = (entry->ebx & 0xffff) | vcpu->index << 24 | machine->config.vcpus << 16;
            has_xsave = machine->has_xcrs && (entry->ecx & 1u << 26);
        } else if (entry->function == 0xb || entry->function == 0x1f) {
            entry->edx = vcpu->index;
        }
    }
    free(vcpu->cpuid); /* of a boot that failed half way */
    vcpu->cpuid = cpuid;
    rc = pc_machine_ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid);
    if (!rc)
        rc = pc_machine_ioctl(vcpu->fd, KVM_GET_SREGS, &sregs);
    if (rc)
        return rc;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.gdt.base = PCG_GDT;
    sregs.gdt.limit = 3 * 8 - 1;
    sregs.idt.base = PCG_IDT;
    sregs.idt.limit = 32 * 16 - 1;
    sregs.cr3 = PCG_PAGE_TABLES;
    sregs.cr4 = 0x620 | (has_xsave ? 1u << 18 : 0); /* PAE, OSFXSR, OSXMMEXCPT; OSXSAVE */
    sregs.cr0 = 0x80050033;                         /* PG, AM, WP, NE, ET, MP, PE */
    sregs.efer = 0x500;                             /* LME, LMA */
    rc = pc_machine_ioctl(vcpu->fd, KVM_SET_SREGS, &sregs);
    if (!rc)
        rc = pc_machine_ioctl(vcpu->fd, KVM_SET_REGS, &regs);
    if (!rc && has_xsave) {
        rc = pc_machine_ioctl(vcpu->fd, KVM_GET_XCRS, &xcrs);
        if (!rc && xcrs.nr_xcrs) {
            xcrs.xcrs[0].value |= 3; /* x87 and SSE: not the reset value, so that its move shows */
            rc = pc_machine_ioctl(vcpu->fd, KVM_SET_XCRS, &xcrs);
        }
    }
    return rc;
}

int pc_kvm_boot(struct pc_kvm *machine)
{
    int rc = begin(machine, PC_MACHINE_CREATED);

    if (rc)
        return rc;
    rc = pc_layout_write_boot(machine, machine->config.shared.base);
    for (uint32_t i = 0; !rc && i < machine->vcpu_count; i++)
        rc = set_start_state(&machine->vcpu[i]);
    end(machine, rc ? PC_MACHINE_CREATED : PC_MACHINE_PAUSED);
    return rc;
}

int64_t pc_kvm_save_state(struct pc_kvm *machine, void *buf, size_t cap, char *error, size_t error_bytes)
{
    int64_t n = begin(machine, PC_MACHINE_PAUSED);

    if (n)
        return pc_machine_error(error, error_bytes, (int)n, "the machine is not paused");
    n = pc_state_save(machine, buf, cap, error, error_bytes);
    end(machine, PC_MACHINE_PAUSED);
    return n;
}

int pc_kvm_load_state(struct pc_kvm *machine, const void *buf, size_t bytes, char *error, size_t error_bytes)
{
    int rc = begin(machine, PC_MACHINE_CREATED);

    if (rc)
        return pc_machine_error(error, error_bytes, rc, "state can only be loaded into a new machine");
    rc = pc_state_load(machine, buf, bytes, error, error_bytes);
    end(machine, rc ? PC_MACHINE_CREATED : PC_MACHINE_PAUSED);
    return rc;
}

int pc_kvm_verify(struct pc_kvm *machine, struct pc_machine_check *check)
{
    int rc = begin(machine, PC_MACHINE_PAUSED);

    memset(check, 0, sizeof *check);
    if (rc)
        return rc;
    rc = pc_verify(machine, check);
    end(machine, PC_MACHINE_PAUSED);
    return rc;
}

int pc_kvm_event_fd(struct pc_kvm *machine)
{
    return machine->event_fd;
}

int pc_kvm_stats(struct pc_kvm *machine, struct pc_machine_stats *stats)
{
    uint64_t failures = 0;

    memset(stats, 0, sizeof *stats);
    stats->state = atomic_load(&machine->state);
    stats->vcpus = machine->config.vcpus;
    stats->ready = 1;
    stats->nonce = atomic_load(&machine->nonce);
    stats->first_run_ns = atomic_load(&machine->first_run_ns);
    stats->paused_ns = atomic_load(&machine->paused_ns);
    stats->disk_reads = atomic_load(&machine->disk_reads);
    stats->disk_writes = atomic_load(&machine->disk_writes);
    stats->disk_bytes = atomic_load(&machine->disk_bytes);
    stats->disk_errors = atomic_load(&machine->disk_errors);
    stats->serial_bytes = atomic_load(&machine->serial_bytes);
    for (uint32_t i = 0; i < machine->config.vcpus; i++) {
        struct pc_vcpu *vcpu = &machine->vcpu[i];
        struct pc_vcpu_stats *to = &stats->vcpu[i];
        to->tid = atomic_load(&vcpu->tid);
        to->activity = atomic_load(&vcpu->activity);
        to->exits = atomic_load(&vcpu->exits);
        to->marks = atomic_load(&vcpu->marks);
        to->operations = atomic_load(&vcpu->operations);
        to->failures = atomic_load(&vcpu->failures);
        failures += to->failures;
        stats->ready &= atomic_load(&vcpu->ready);
    }
    stats->failures = failures > UINT32_MAX ? UINT32_MAX : (uint32_t)failures;
    if (atomic_load_explicit(&machine->failure_published, memory_order_acquire)) {
        stats->failure_vcpu = machine->failure_vcpu;
        stats->failure_code = machine->failure_code;
        stats->failure_where = machine->failure_where;
        stats->failure_expected = machine->failure_expected;
        stats->failure_found = machine->failure_found;
        memcpy(stats->failure_text, machine->failure_text, sizeof stats->failure_text);
    }
    return 0;
}

#else /* another architecture: the interface is there, the machine is not */

int pc_kvm_open(const struct pc_kvm_config *config, struct pc_kvm **machine, char *error, size_t error_bytes)
{
    (void)config;
    *machine = NULL;
    return pc_machine_error(error, error_bytes, -ENOTSUP,
                            "the kvm machine is for x86-64 hosts; --machine image works on this one");
}

int pc_kvm_boot(struct pc_kvm *machine)
{
    (void)machine;
    return -ENOTSUP;
}

int pc_kvm_resume(struct pc_kvm *machine)
{
    (void)machine;
    return -ENOTSUP;
}

int pc_kvm_pause(struct pc_kvm *machine, uint32_t timeout_ms, char *error, size_t error_bytes)
{
    (void)machine, (void)timeout_ms, (void)error, (void)error_bytes;
    return -ENOTSUP;
}

int64_t pc_kvm_save_state(struct pc_kvm *machine, void *buf, size_t cap, char *error, size_t error_bytes)
{
    (void)machine, (void)buf, (void)cap, (void)error, (void)error_bytes;
    return -ENOTSUP;
}

int pc_kvm_load_state(struct pc_kvm *machine, const void *buf, size_t bytes, char *error, size_t error_bytes)
{
    (void)machine, (void)buf, (void)bytes, (void)error, (void)error_bytes;
    return -ENOTSUP;
}

int pc_kvm_stats(struct pc_kvm *machine, struct pc_machine_stats *stats)
{
    (void)machine, (void)stats;
    return -ENOTSUP;
}

int pc_kvm_verify(struct pc_kvm *machine, struct pc_machine_check *check)
{
    (void)machine, (void)check;
    return -ENOTSUP;
}

int pc_kvm_event_fd(struct pc_kvm *machine)
{
    (void)machine;
    return -ENOTSUP;
}

int pc_kvm_close(struct pc_kvm *machine, uint32_t timeout_ms)
{
    (void)machine, (void)timeout_ms;
    return 0;
}

#endif
