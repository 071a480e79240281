/* SPDX-License-Identifier: Apache-2.0
 *
 * A machine from its opening to its end, and the public calls, but for what the vCPU threads do (run.c).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "machine/machine.h"

static const struct pc_engine *const engines[] = { /* NULL: not on this architecture */
#if defined(__x86_64__)
    [PC_ENGINE_KVM] = &pc_engine_kvm,
#endif
    [PC_ENGINE_RV64] = &pc_engine_rv64,
};

static void destroy(struct pc_machine *machine)
{
    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        machine->engine->destroy_vcpu(&machine->vcpu[i]);
    if (machine->engine->destroy)
        machine->engine->destroy(machine);
    if (machine->event_fd >= 0)
        close(machine->event_fd);
    pthread_cond_destroy(&machine->changed);
    pthread_mutex_destroy(&machine->dirty_lock);
    pthread_mutex_destroy(&machine->lock);
    free(machine);
}

void pc_machine_release(struct pc_machine *machine)
{
    if (atomic_fetch_sub(&machine->references, 1) == 1)
        destroy(machine);
}

static int make_vcpu(struct pc_machine *machine, uint32_t index, char *error, size_t error_bytes)
{
    struct pc_vcpu *vcpu = &machine->vcpu[index];
    int rc;

    vcpu->machine = machine;
    vcpu->index = index;
    machine->vcpu_count++; /* from here on destroy() ends it */
    rc = machine->engine->make_vcpu(vcpu, error, error_bytes);
    return rc ? rc : pc_vcpu_start(vcpu, error, error_bytes);
}

static int set_up(struct pc_machine *machine, char *error, size_t error_bytes)
{
    int rc = 0;

    machine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (machine->event_fd < 0)
        return pc_fail(errno, error, error_bytes, "no eventfd: %s", strerrordesc_np(errno));
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
    if (config->workload > PC_WORKLOAD_PHASES)
        return pc_fail(EINVAL, error, error_bytes, "unknown workload %u", config->workload);
    if (config->engine >= PC_ARRAY_LENGTH(engines))
        return pc_fail(EINVAL, error, error_bytes, "unknown engine %u", config->engine);
    engine = engines[config->engine];
    if (!engine)
        return pc_fail(ENOTSUP, error, error_bytes, "the kvm machine is for x86-64 hosts; --machine rv64 works on this one");
    if (!pc_kick_signal())
        return pc_fail(EBUSY, error, error_bytes, "every realtime signal has a handler: none is left for vCPUs");
    machine = calloc(1, sizeof *machine);
    if (!machine)
        return pc_fail(ENOMEM, error, error_bytes, "out of memory");
    machine->config = *config;
    machine->engine = engine;
    machine->event_fd = -1;
    atomic_store(&machine->references, 1);
    pthread_mutex_init(&machine->lock, NULL);
    pthread_mutex_init(&machine->dirty_lock, NULL);
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

int pc_machine_close(struct pc_machine *machine, uint32_t timeout_ms)
{
    bool in_time;

    if (!machine)
        return 0;
    pthread_mutex_lock(&machine->lock);
    machine->stop = true;
    machine->want_run = false;
    pc_machine_kick_all(machine);
    in_time = pc_machine_wait_for_vcpus(machine, timeout_ms, true);
    pthread_mutex_unlock(&machine->lock);
    if (!in_time)
        return -ETIMEDOUT;
    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        if (machine->vcpu[i].has_thread)
            pthread_join(machine->vcpu[i].thread, NULL);
    pc_machine_release(machine);
    return 0;
}

/* ---- at rest ---- */

int pc_machine_boot(struct pc_machine *machine)
{
    int rc = pc_machine_begin(machine, PC_MACHINE_CREATED);

    if (rc)
        return rc;
    rc = pc_boot_write(machine, machine->config.shared.base);
    for (uint32_t i = 0; !rc && i < machine->vcpu_count; i++)
        rc = machine->engine->set_start_state(&machine->vcpu[i]);
    pc_machine_end(machine, rc ? PC_MACHINE_CREATED : PC_MACHINE_PAUSED);
    return rc;
}

int64_t pc_machine_save_state(struct pc_machine *machine, void *buf, size_t cap, char *error, size_t error_bytes)
{
    int64_t n = pc_machine_begin(machine, PC_MACHINE_PAUSED);

    if (n)
        return pc_fail((int)-n, error, error_bytes, "the machine is not paused");
    n = pc_state_save(machine, buf, cap, error, error_bytes);
    pc_machine_end(machine, PC_MACHINE_PAUSED);
    return n;
}

int pc_machine_load_state(struct pc_machine *machine, const void *buf, size_t bytes, char *error, size_t error_bytes)
{
    int rc = pc_machine_begin(machine, PC_MACHINE_CREATED);

    if (rc)
        return pc_fail(-rc, error, error_bytes, "state can only be loaded into a new machine");
    rc = pc_state_load(machine, buf, bytes, error, error_bytes);
    pc_machine_end(machine, rc ? PC_MACHINE_CREATED : PC_MACHINE_PAUSED);
    return rc;
}

int pc_machine_verify(struct pc_machine *machine, struct pc_machine_check *check)
{
    int rc = pc_machine_begin(machine, PC_MACHINE_PAUSED);

    memset(check, 0, sizeof *check);
    if (rc)
        return rc;
    rc = pc_verify(machine, check);
    pc_machine_end(machine, PC_MACHINE_PAUSED);
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
#define TAKE(field) stats->field = atomic_load(&machine->field);
    TAKE(state)
    stats->vcpus = machine->config.vcpus;
    stats->ready = 1;
    TAKE(nonce)
    TAKE(first_run_ns)
    TAKE(paused_ns)
    PC_MACHINE_COUNTERS(TAKE)
    PC_NET_COUNTERS(TAKE)
#undef TAKE
    for (uint32_t i = 0; i < machine->config.vcpus; i++) {
        struct pc_vcpu *vcpu = &machine->vcpu[i];
        struct pc_vcpu_stats *to = &stats->vcpu[i];
        to->tid = atomic_load(&vcpu->tid);
        to->activity = atomic_load(&vcpu->activity);
        to->exits = atomic_load(&vcpu->exits);
        to->reports = atomic_load(&vcpu->reports);
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
