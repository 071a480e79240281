/* SPDX-License-Identifier: Apache-2.0
 *
 * vCPU threads: how they are started, stopped and resumed, whatever executes their instructions.
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
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "machine/machine.h"

#define HALT_NS       100000000ull
#define KICK_AGAIN_NS 5000000ull

/* ---- the kick ---- */

static pthread_once_t kick_once = PTHREAD_ONCE_INIT;
static int kick_signal; /* 0: none was free */

static void on_kick(int signal_number)
{
    (void)signal_number; /* under KVM its arrival is all: it makes KVM_RUN return */
    pc_rv64_kicked();
    pc_vcpu_touch_kicked();
}

/* The one thing here that is the process's and not a machine's: a signal has a single handler. Takes the highest
 * realtime signal that is not in use, so the program's own choices are left alone. */
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
    pthread_once(&kick_once, choose_kick_signal);
    return kick_signal;
}

/* See the top of this file for the order. */
void pc_machine_kick_all(struct pc_machine *machine)
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
        if (atomic_compare_exchange_strong(&machine->first_run_ns, &never, pc_now_ns()))
            pc_machine_raise_event(machine);
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
    pc_machine_release(machine);
    return NULL;
}

int pc_vcpu_start(struct pc_vcpu *vcpu, char *error, size_t error_bytes)
{
    struct pc_machine *machine = vcpu->machine;
    int rc;

    atomic_fetch_add(&machine->references, 1);
    rc = pc_thread_start(&vcpu->thread, vcpu_thread, vcpu); /* no signal reaches it before it has chosen its own */
    if (rc) {
        atomic_fetch_sub(&machine->references, 1);
        return pc_fail(-rc, error, error_bytes, "no thread for vCPU %u: %s", vcpu->index, strerrordesc_np(-rc));
    }
    vcpu->has_thread = true;
    pthread_mutex_lock(&machine->lock);
    while (!vcpu->parked)
        pthread_cond_wait(&machine->changed, &machine->lock);
    pthread_mutex_unlock(&machine->lock);
    return 0;
}

void pc_vcpu_halt(struct pc_vcpu *vcpu)
{
    struct pc_machine *machine = vcpu->machine;
    uint64_t until_ns = pc_now_ns() + HALT_NS;
    struct timespec until = pc_timespec(until_ns);

    atomic_store(&vcpu->activity, PC_VCPU_HALTED);
    pthread_mutex_lock(&machine->lock);
    while (!atomic_load(&machine->leave) && pthread_cond_timedwait(&machine->changed, &machine->lock, &until) == 0)
        ;
    pthread_mutex_unlock(&machine->lock);
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
}

void pc_vcpu_wait_at_limit(struct pc_vcpu *vcpu)
{
    struct pc_machine *machine = vcpu->machine;

    atomic_store(&vcpu->activity, PC_VCPU_HALTED);
    pthread_mutex_lock(&machine->lock);
    vcpu->at_limit = true;
    pthread_cond_broadcast(&machine->changed);
    while (!atomic_load(&machine->leave))
        pthread_cond_wait(&machine->changed, &machine->lock);
    vcpu->at_limit = false;
    pthread_mutex_unlock(&machine->lock);
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
}

bool pc_machine_wait_for_vcpus(struct pc_machine *machine, uint32_t timeout_ms, bool gone)
{
    uint64_t until_ns = pc_now_ns() + timeout_ms * 1000000ull, now_ns, step_ns;
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
        now_ns = pc_now_ns();
        late = now_ns >= until_ns;
        step_ns = machine->engine->kick_again && until_ns > now_ns + KICK_AGAIN_NS ? now_ns + KICK_AGAIN_NS : until_ns;
        step = pc_timespec(step_ns);
        if (pthread_cond_timedwait(&machine->changed, &machine->lock, &step) == ETIMEDOUT && step_ns != until_ns)
            pc_machine_kick_all(machine);
    }
}

/* ---- pause and resume ---- */

/* Under the lock, both. In between the machine is neither freed nor taken for anything else: pc_machine_close waits for that. After
 * the second comes pc_machine_release, outside of the lock. */
static void begin_transition(struct pc_machine *machine)
{
    machine->transition = true;
    atomic_fetch_add(&machine->references, 1);
}

static void end_transition(struct pc_machine *machine)
{
    machine->transition = false;
    pthread_cond_broadcast(&machine->changed);
}

int pc_machine_begin(struct pc_machine *machine, int32_t state)
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
        begin_transition(machine);
    pthread_mutex_unlock(&machine->lock);
    return rc;
}

void pc_machine_end(struct pc_machine *machine, int32_t state)
{
    pthread_mutex_lock(&machine->lock);
    atomic_store(&machine->state, state);
    end_transition(machine);
    pthread_mutex_unlock(&machine->lock);
    pc_machine_release(machine);
}

int pc_machine_resume(struct pc_machine *machine)
{
    int32_t state;
    int rc = 0;

    pthread_mutex_lock(&machine->lock);
    state = atomic_load(&machine->state);
    if (machine->transition) {
        rc = -EBUSY;
    } else if (state == PC_MACHINE_FAILED) {
        rc = -EIO;
    } else if (state == PC_MACHINE_CREATED) {
        rc = -EINVAL;
    } else if (state != PC_MACHINE_RUNNING) {
        atomic_store(&machine->first_run_ns, 0);
        atomic_store(&machine->leave, false);
        atomic_store(&machine->state, PC_MACHINE_RUNNING);
        machine->want_run = true;
        pthread_cond_broadcast(&machine->changed);
    }
    pthread_mutex_unlock(&machine->lock);
    return rc;
}

static void name_stuck_vcpu(const struct pc_machine *machine, uint32_t timeout_ms, char *error, size_t error_bytes)
{
    for (uint32_t i = 0; i < machine->vcpu_count; i++) {
        const struct pc_vcpu *vcpu = &machine->vcpu[i];
        int32_t activity = atomic_load(&vcpu->activity);
        if (vcpu->parked)
            continue;
        (void)pc_fail(0, error, error_bytes, "vCPU %u (thread %d) did not stop within %u ms: it is in %s", i,
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
        rc = pc_fail(EBUSY, error, error_bytes, "another operation on this machine is under way");
    else if (state == PC_MACHINE_CREATED)
        rc = pc_fail(EINVAL, error, error_bytes, "the machine has not been started");
    else if (state != PC_MACHINE_PAUSED) {
        bool want_run = machine->want_run; /* false when failed: its vCPUs are on their way out already */
        begin_transition(machine);
        held = true;
        machine->want_run = false;
        pc_machine_kick_all(machine);
        if (!pc_machine_wait_for_vcpus(machine, timeout_ms, false)) {
            name_stuck_vcpu(machine, timeout_ms, error, error_bytes);
            rc = -ETIMEDOUT;
            if (want_run && !machine->stop && atomic_load(&machine->state) != PC_MACHINE_FAILED) {
                /* The pause is undone: a vCPU that is still inside has been kicked and would otherwise spin. */
                for (uint32_t i = 0; i < machine->vcpu_count; i++)
                    machine->engine->kick(&machine->vcpu[i], false);
                atomic_store(&machine->leave, false);
                machine->want_run = true;
                pthread_cond_broadcast(&machine->changed);
            }
        } else if (atomic_load(&machine->state) == PC_MACHINE_FAILED) {
            rc = pc_fail(EIO, error, error_bytes, "%s", machine->failure_text);
        } else {
            atomic_store(&machine->state, PC_MACHINE_PAUSED);
            atomic_store(&machine->paused_ns, pc_now_ns());
        }
        end_transition(machine);
    }
    pthread_mutex_unlock(&machine->lock);
    if (held)
        pc_machine_release(machine);
    return rc;
}
