/* SPDX-License-Identifier: Apache-2.0
 *
 * What every machine with vCPUs has, whatever executes its instructions: vCPU threads, how they are started and stopped, the
 * devices, and the public functions. What executes is an engine (machine.h): kvm.c or rv64.c.
 *
 * Stopping a vCPU. Its thread is inside the engine, in a device, asleep after HLT, or on its way between these. The pauser
 * raises `leave`, tells the engine (its `kick`), and sends the thread a signal, in this order. A thread that looked at
 * `leave` too early then either enters the engine, which sees the kick and returns at once, or is inside already, where the
 * signal finds it. Signal without kick is lost when it lands between the look and the entry; a kick without signal is only
 * seen by who is not blocked. The thread clears the kick itself, under the lock, when it may run again, so no clearing can hit
 * a later kick.
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
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "machine/machine.h"


#define MARK_EVENT_INTERVAL_NS 50000000ull
#define HALT_NS                100000000ull
#define KICK_AGAIN_NS          5000000ull

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

/* ---- the kick ---- */

static pthread_once_t kick_once = PTHREAD_ONCE_INIT;
static int kick_signal; /* 0: none was free */

static void on_kick(int signal_number)
{
    (void)signal_number; /* under KVM its arrival is all: it makes KVM_RUN return */
    pc_rv64_kicked();
    pc_net_kicked();
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

int pc_kick_signal(void)
{
    return kick_signal;
}

/* Under the lock. Everybody out: see the top of this file for the order. */
static void kick_all(struct pc_machine *machine)
{
    atomic_store(&machine->leave, true);
    for (uint32_t i = 0; i < machine->vcpu_count; i++) {
        struct pc_vcpu *vcpu = &machine->vcpu[i];
        if (!vcpu->has_thread || vcpu->parked || atomic_load(&vcpu->activity) == PC_VCPU_GONE)
            continue;
        machine->engine->kick(vcpu, true);
        pthread_kill(vcpu->thread, kick_signal);
    }
    pthread_cond_broadcast(&machine->changed);
}

/* ---- reports and failures ---- */

static void tell(struct pc_machine *machine)
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
    case PCG_FAIL_XMM: return "a register changed that nobody wrote (XMM7; rv64: s9, s10, s11)";
    case PCG_FAIL_GS_BASE: return "GS base (rv64: tp) changed";
    case PCG_FAIL_MSR: return "MSR (rv64: CSR) changed";
    case PCG_FAIL_DEBUGREG: return "debug register changed";
    case PCG_FAIL_CR2: return "CR2 changed";
    case PCG_FAIL_TSC: return "time stamp (rv64: instruction) counter went back";
    case PCG_FAIL_DISK_STATUS: return "disk request failed";
    case PCG_FAIL_DISK_DATA: return "wrong data from the disk";
    case PCG_FAIL_REQUESTS: return "number of answered requests in memory is not that in the register";
    default: return "unknown failure";
    }
}

/* The first failure is kept, whoever reports it; later ones only count. */
static void keep_failure(struct pc_vcpu *vcpu, uint64_t code, uint64_t where, uint64_t expected, uint64_t found,
                         const char *text)
{
    struct pc_machine *machine = vcpu->machine;

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

void pc_vcpu_failed(struct pc_vcpu *vcpu, const char *what)
{
    struct pc_machine *machine = vcpu->machine;
    char text[sizeof machine->failure_text];
    uint64_t where = machine->engine->where(vcpu);

    snprintf(text, sizeof text, "vCPU %u: %s, %s 0x%llx", vcpu->index, what, machine->engine->program_counter,
             (unsigned long long)where);
    keep_failure(vcpu, 0, where, 0, 0, text);
    pthread_mutex_lock(&machine->lock);
    atomic_store(&machine->state, PC_MACHINE_FAILED);
    machine->want_run = false;
    kick_all(machine);
    pthread_mutex_unlock(&machine->lock);
    tell(machine);
}

/* ---- devices ---- */

/* False: the vCPU is to stop. */
static bool report(struct pc_vcpu *vcpu, uint32_t what, const uint64_t arguments[4])
{
    struct pc_machine *machine = vcpu->machine;
    uint64_t now_ns;

    switch (what) {
    case PCG_READY:
        atomic_store(&machine->nonce, arguments[0]);
        atomic_store(&vcpu->ready, 1);
        tell(machine);
        return true;
    case PCG_MARK:
        atomic_fetch_add(&vcpu->marks, 1);
        atomic_store(&vcpu->operations, arguments[0]);
        atomic_store(&machine->nonce, arguments[1]);
        /* A fast guest makes 100,000 marks a second; whoever waits for the event need not wake for each. */
        now_ns = pc_machine_now_ns();
        if (now_ns - vcpu->mark_told_ns >= MARK_EVENT_INTERVAL_NS) {
            vcpu->mark_told_ns = now_ns;
            tell(machine);
        }
        return true;
    case PCG_FAILURE:
        guest_failure(vcpu, arguments[0], arguments[1], arguments[2], arguments[3]);
        if (arguments[0] == PCG_FAIL_EXCEPTION) {
            pc_vcpu_failed(vcpu, "stopped by an exception");
            return false;
        }
        tell(machine);
        return true;
    default:
        return true; /* like a write to a port where nothing is */
    }
}

bool pc_device_out(struct pc_vcpu *vcpu, uint16_t port, uint32_t value, const uint64_t arguments[4])
{
    struct pc_machine *machine = vcpu->machine;

    switch (port) {
    case PCG_PORT_SERIAL:
        atomic_fetch_add(&machine->serial_bytes, 1);
        return true;
    case PCG_PORT_REPORT:
        return report(vcpu, value, arguments);
    case PCG_PORT_DISK:
        atomic_store(&vcpu->activity, PC_VCPU_DISK);
        vcpu->disk_status = pc_disk_request(vcpu, value, arguments[0], arguments[1], arguments[2]);
        atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
        return true;
    case PCG_PORT_NET:
        vcpu->net_status = pc_net_request(vcpu, value, arguments[0], arguments[1]);
        return true;
    default:
        return true;
    }
}

uint32_t pc_device_in(struct pc_vcpu *vcpu, uint16_t port)
{
    uint32_t value = UINT32_MAX; /* what an empty bus reads as */

    switch (port) {
    case PCG_PORT_SERIAL + 5:
        return 0x60; /* line status: ready to transmit */
    case PCG_PORT_ENTROPY:
        if (vcpu->machine->engine->entropy)
            return vcpu->machine->engine->entropy(vcpu);
        if (getrandom(&value, sizeof value, 0) != sizeof value)
            value = (uint32_t)pc_machine_now_ns();
        return value;
    case PCG_PORT_DISK_STATUS:
        return vcpu->disk_status;
    case PCG_PORT_NET_STATUS:
    case PCG_PORT_NET_MAC_LOW:
    case PCG_PORT_NET_MAC_HIGH:
    case PCG_PORT_NET_ADDRESS:
        return pc_net_register(vcpu, port);
    default:
        return value;
    }
}

void pc_vcpu_halt(struct pc_vcpu *vcpu)
{
    struct pc_machine *machine = vcpu->machine;
    uint64_t until_ns = pc_machine_now_ns() + HALT_NS;
    struct timespec until = { .tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u) };

    atomic_store(&vcpu->activity, PC_VCPU_HALTED);
    pthread_mutex_lock(&machine->lock);
    while (!atomic_load(&machine->leave) && pthread_cond_timedwait(&machine->changed, &machine->lock, &until) == 0)
        ;
    pthread_mutex_unlock(&machine->lock);
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
}

void pc_vcpu_stand(struct pc_vcpu *vcpu)
{
    struct pc_machine *machine = vcpu->machine;

    atomic_store(&vcpu->activity, PC_VCPU_HALTED);
    pthread_mutex_lock(&machine->lock);
    vcpu->standing = true;
    pthread_cond_broadcast(&machine->changed);
    while (!atomic_load(&machine->leave))
        pthread_cond_wait(&machine->changed, &machine->lock);
    vcpu->standing = false;
    pthread_mutex_unlock(&machine->lock);
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
}

/* ---- vCPU threads ---- */

/* Waits for leave to run; false when the thread is to end. */
static bool park(struct pc_vcpu *vcpu)
{
    struct pc_machine *machine = vcpu->machine;
    bool go;

    pthread_mutex_lock(&machine->lock);
    vcpu->parked = true;
    atomic_store(&vcpu->activity, PC_VCPU_PARKED);
    pthread_cond_broadcast(&machine->changed);
    while (!machine->want_run && !machine->stop)
        pthread_cond_wait(&machine->changed, &machine->lock);
    go = !machine->stop;
    vcpu->parked = false;
    machine->engine->kick(vcpu, false);
    pthread_mutex_unlock(&machine->lock);
    return go;
}

static void release(struct pc_machine *machine);

static void *vcpu_thread(void *argument)
{
    struct pc_vcpu *vcpu = argument;
    struct pc_machine *machine = vcpu->machine;
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
            if (!machine->engine->run(vcpu))
                break;
        if (machine->engine->complete)
            machine->engine->complete(vcpu);
    }

    pthread_mutex_lock(&machine->lock);
    atomic_store(&vcpu->activity, PC_VCPU_GONE);
    pthread_cond_broadcast(&machine->changed);
    pthread_mutex_unlock(&machine->lock);
    release(machine);
    return NULL;
}

/* ---- open and close ---- */

static void destroy(struct pc_machine *machine)
{
    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        machine->engine->destroy_vcpu(&machine->vcpu[i]);
    if (machine->engine->destroy)
        machine->engine->destroy(machine);
    if (machine->event_fd >= 0)
        close(machine->event_fd);
    pthread_cond_destroy(&machine->changed);
    pthread_mutex_destroy(&machine->lock);
    free(machine);
}

/* Outside of the lock: a thread that still is inside pthread_mutex_unlock must hold its reference. */
static void release(struct pc_machine *machine)
{
    if (atomic_fetch_sub(&machine->references, 1) == 1)
        destroy(machine);
}

static int make_vcpu(struct pc_machine *machine, uint32_t index, char *error, size_t error_bytes)
{
    struct pc_vcpu *vcpu = &machine->vcpu[index];
    sigset_t all, old;
    int rc;

    vcpu->machine = machine;
    vcpu->index = index;
    vcpu->fd = -1;
    machine->vcpu_count++; /* from here on destroy() ends it */
    rc = machine->engine->make_vcpu(vcpu, error, error_bytes);
    if (rc)
        return rc;

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

static int set_up(struct pc_machine *machine, char *error, size_t error_bytes)
{
    int rc = 0;

    machine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (machine->event_fd < 0)
        return pc_machine_error(error, error_bytes, -errno, "no eventfd: %s", strerrordesc_np(errno));
    if (machine->engine->set_up)
        rc = machine->engine->set_up(machine, error, error_bytes);
    for (uint32_t i = 0; !rc && i < machine->config.vcpus; i++)
        rc = make_vcpu(machine, i, error, error_bytes);
    return rc;
}

int pc_machine_open(const struct pc_machine_config *config, struct pc_machine **out, char *error, size_t error_bytes)
{
    const struct pc_engine *engine;
    struct pc_machine *machine;
    pthread_condattr_t attributes;
    int rc;

    *out = NULL;
    if (config->workload > PC_WORKLOAD_ECHO)
        return pc_machine_error(error, error_bytes, -EINVAL, "unknown workload %u", config->workload);
    if (config->engine == PC_ENGINE_RV64)
        engine = &pc_engine_rv64;
#if defined(__x86_64__)
    else if (config->engine == PC_ENGINE_KVM)
        engine = &pc_engine_kvm;
#else
    else if (config->engine == PC_ENGINE_KVM)
        return pc_machine_error(error, error_bytes, -ENOTSUP,
                                "the kvm machine is for x86-64 hosts; --machine rv64 works on this one");
#endif
    else
        return pc_machine_error(error, error_bytes, -EINVAL, "unknown engine %u", config->engine);
    pthread_once(&kick_once, choose_kick_signal);
    if (!kick_signal)
        return pc_machine_error(error, error_bytes, -EBUSY, "every realtime signal has a handler: none is left for vCPUs");
    machine = calloc(1, sizeof *machine);
    if (!machine)
        return pc_machine_error(error, error_bytes, -ENOMEM, "out of memory");
    machine->config = *config;
    machine->engine = engine;
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
        rc = pc_net_check(machine, error, error_bytes);
    if (!rc)
        rc = set_up(machine, error, error_bytes);
    if (rc) {
        while (pc_machine_close(machine, 1000)) /* parked threads leave at once, when they get a processor */
            ;
        return rc;
    }
    *out = machine;
    return 0;
}

/* Under the lock: true when every thread has ended, with whatever else was under way (`gone`), or is at least parked; false at
 * the deadline. */
static bool wait_for_vcpus(struct pc_machine *machine, uint32_t timeout_ms, bool gone)
{
    uint64_t until_ns = pc_machine_now_ns() + timeout_ms * 1000000ull, now_ns, step_ns;
    struct timespec step;
    bool late = false;

    for (;;) {
        uint32_t waiting = gone && machine->transition;
        for (uint32_t i = 0; i < machine->vcpu_count; i++) {
            const struct pc_vcpu *vcpu = &machine->vcpu[i];
            bool is_gone = !vcpu->has_thread || atomic_load(&vcpu->activity) == PC_VCPU_GONE;
            waiting += !(is_gone || (!gone && vcpu->parked));
        }
        if (waiting == 0 || late)
            return waiting == 0;
        now_ns = pc_machine_now_ns();
        late = now_ns >= until_ns;
        step_ns = machine->engine->kick_again && until_ns > now_ns + KICK_AGAIN_NS ? now_ns + KICK_AGAIN_NS : until_ns;
        step = (struct timespec){ .tv_sec = (time_t)(step_ns / 1000000000u), .tv_nsec = (long)(step_ns % 1000000000u) };
        if (pthread_cond_timedwait(&machine->changed, &machine->lock, &step) == ETIMEDOUT && step_ns != until_ns)
            kick_all(machine);
    }
}

int pc_machine_close(struct pc_machine *machine, uint32_t timeout_ms)
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
    if (!in_time)
        return -ETIMEDOUT;
    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        if (machine->vcpu[i].has_thread)
            pthread_join(machine->vcpu[i].thread, NULL);
    release(machine);
    return 0;
}

/* ---- run control ---- */

/* Under the lock. Until it is let go the machine is neither freed nor taken for anything else: pc_machine_close waits for that. Who
 * has let it go releases it, outside of the lock. */
static void hold(struct pc_machine *machine)
{
    machine->transition = true;
    atomic_fetch_add(&machine->references, 1);
}

static void let_go(struct pc_machine *machine)
{
    machine->transition = false;
    pthread_cond_broadcast(&machine->changed);
}

/* Takes the machine for something that needs it at rest, in the given state. */
static int begin(struct pc_machine *machine, int32_t state)
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
        hold(machine);
    pthread_mutex_unlock(&machine->lock);
    return rc;
}

static void end(struct pc_machine *machine, int32_t state)
{
    pthread_mutex_lock(&machine->lock);
    atomic_store(&machine->state, state);
    let_go(machine);
    pthread_mutex_unlock(&machine->lock);
    release(machine);
}

int pc_machine_resume(struct pc_machine *machine)
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

static void name_the_stuck(const struct pc_machine *machine, uint32_t timeout_ms, char *error, size_t error_bytes)
{
    for (uint32_t i = 0; i < machine->vcpu_count; i++) {
        const struct pc_vcpu *vcpu = &machine->vcpu[i];
        int32_t activity = atomic_load(&vcpu->activity);
        if (vcpu->parked)
            continue;
        pc_machine_error(error, error_bytes, 0, "vCPU %u (thread %d) did not stop within %u ms: it is in %s", i,
                         atomic_load(&vcpu->tid), timeout_ms,
                         activity == PC_VCPU_DISK    ? "a disk transfer, probably waiting for a missing page"
                         : activity == PC_VCPU_GUEST ? "the guest, probably waiting for a missing page"
                         : activity == PC_VCPU_NET   ? "the network device"
                                                     : "device emulation");
        return;
    }
}

int pc_machine_pause(struct pc_machine *machine, uint32_t timeout_ms, char *error, size_t error_bytes)
{
    bool held = false;
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
        hold(machine);
        held = true;
        machine->want_run = false;
        kick_all(machine);
        if (!wait_for_vcpus(machine, timeout_ms, false)) {
            name_the_stuck(machine, timeout_ms, error, error_bytes);
            rc = -ETIMEDOUT;
            if (want_run && !machine->stop && atomic_load(&machine->state) != PC_MACHINE_FAILED) {
                /* As if nothing had been: whoever is still inside has been kicked and would otherwise spin. */
                for (uint32_t i = 0; i < machine->vcpu_count; i++)
                    machine->engine->kick(&machine->vcpu[i], false);
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
        let_go(machine);
    }
    pthread_mutex_unlock(&machine->lock);
    if (held)
        release(machine);
    return rc;
}

int pc_machine_boot(struct pc_machine *machine)
{
    int rc = begin(machine, PC_MACHINE_CREATED);

    if (rc)
        return rc;
    rc = pc_layout_write_boot(machine, machine->config.shared.base);
    for (uint32_t i = 0; !rc && i < machine->vcpu_count; i++)
        rc = machine->engine->set_start_state(&machine->vcpu[i]);
    end(machine, rc ? PC_MACHINE_CREATED : PC_MACHINE_PAUSED);
    return rc;
}

int64_t pc_machine_save_state(struct pc_machine *machine, void *buf, size_t cap, char *error, size_t error_bytes)
{
    int64_t n = begin(machine, PC_MACHINE_PAUSED);

    if (n)
        return pc_machine_error(error, error_bytes, (int)n, "the machine is not paused");
    n = pc_state_save(machine, buf, cap, error, error_bytes);
    end(machine, PC_MACHINE_PAUSED);
    return n;
}

int pc_machine_load_state(struct pc_machine *machine, const void *buf, size_t bytes, char *error, size_t error_bytes)
{
    int rc = begin(machine, PC_MACHINE_CREATED);

    if (rc)
        return pc_machine_error(error, error_bytes, rc, "state can only be loaded into a new machine");
    rc = pc_state_load(machine, buf, bytes, error, error_bytes);
    end(machine, rc ? PC_MACHINE_CREATED : PC_MACHINE_PAUSED);
    return rc;
}

int pc_machine_verify(struct pc_machine *machine, struct pc_machine_check *check)
{
    int rc = begin(machine, PC_MACHINE_PAUSED);

    memset(check, 0, sizeof *check);
    if (rc)
        return rc;
    rc = pc_verify(machine, check);
    end(machine, PC_MACHINE_PAUSED);
    return rc;
}

int pc_machine_event_fd(struct pc_machine *machine)
{
    return machine->event_fd;
}

int pc_machine_stats(struct pc_machine *machine, struct pc_machine_stats *stats)
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
    stats->net_received = atomic_load(&machine->net_received);
    stats->net_sent = atomic_load(&machine->net_sent);
    stats->net_dropped = atomic_load(&machine->net_dropped);
    stats->net_errors = atomic_load(&machine->net_errors);
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
