/* SPDX-License-Identifier: Apache-2.0
 *
 * The rv64 engine as the machine calls it: harts, their kicks and their state. How they execute is in rv64.c.
 */
#include "machine/rv64.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct pc_hart *hart_of(const struct pc_vcpu *vcpu)
{
    return vcpu->of_engine;
}

/* Initial-exec: a signal handler reads it, which must not allocate. */
static _Thread_local struct pc_hart *volatile current __attribute__((tls_model("initial-exec")));

void pc_rv64_kicked(void)
{
    struct pc_hart *hart = current;

    if (hart && hart->accessing && atomic_load_explicit(&hart->kicked, memory_order_relaxed))
        siglongjmp(hart->escape, 1);
}

/* ---- running ---- */

static bool run(struct pc_vcpu *vcpu)
{
    struct pc_hart *h = hart_of(vcpu);
    enum pc_rv64_outcome outcome;

    if (sigsetjmp(h->escape, 1)) {
        uint64_t index = (uint64_t)(h->accessing - h->ops);

        h->accessing = NULL;
        current = NULL;
        h->pc = PCG_IMAGE + index * 4;
        atomic_store_explicit(&h->instructions, h->bias + index, memory_order_relaxed);
        atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
        return true;
    }
    current = h;
    atomic_store(&vcpu->activity, PC_VCPU_GUEST);
    outcome = pc_rv64_run(h);
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
    current = NULL;
    switch (outcome) {
    case PC_RV64_FAILED:
        if (h->failure[0])
            pc_vcpu_failed(vcpu, h->failure);
        return false;
    case PC_RV64_SLEEP:
        pc_vcpu_halt(vcpu);
        return true;
    case PC_RV64_AT_LIMIT:
        pc_vcpu_wait_at_limit(vcpu);
        return true;
    case PC_RV64_LEAVE:
    default:
        return true;
    }
}

static void kick(struct pc_vcpu *vcpu, bool on)
{
    atomic_store(&hart_of(vcpu)->kicked, on);
    if (on)
        atomic_store(&hart_of(vcpu)->threshold, 0);
}

static uint64_t where(struct pc_vcpu *vcpu)
{
    return hart_of(vcpu)->pc;
}

static uint32_t entropy(struct pc_vcpu *vcpu)
{
    uint64_t draw = hart_of(vcpu)->entropy_draws++;

    return (uint32_t)(pcg_mix(pcg_mix(vcpu->machine->config.seed) + pcg_mix((uint64_t)vcpu->index << 32) + draw) >> 32);
}

static int make_vcpu(struct pc_vcpu *vcpu, char *error, size_t error_bytes)
{
    const struct pc_machine_config *config = &vcpu->machine->config;
    const struct pc_memory *own = &config->private_[vcpu->index];
    struct pc_hart *h = calloc(1, sizeof *h);

    if (!h)
        return pc_fail(ENOMEM, error, error_bytes, "out of memory");
    vcpu->of_engine = h;
    h->vcpu = vcpu;
    h->ops = calloc(PC_IMAGE_OPS + 1, sizeof *h->ops); /* all DECODE, nearly none of it touched */
    if (!h->ops)
        return pc_fail(ENOMEM, error, error_bytes, "out of memory");
    h->ops[PC_IMAGE_OPS].code = C_FETCH_FAULT;
    atomic_store(&h->limit, PC_NO_LIMIT);
    h->pc = PCG_IMAGE;
    h->shared = config->shared.base;
    h->shared_limit = config->shared.size_bytes - 7;
    h->high_limit = config->shared.size_bytes - 7 - PCG_IMAGE_END;
    h->private_ = own->base;
    h->private_base = PCG_PRIVATE_GVA + vcpu->index * PCG_PRIVATE_STRIDE;
    h->private_limit = own->size_bytes ? own->size_bytes - 7 : 0;
    return 0;
}

static void destroy_vcpu(struct pc_vcpu *vcpu)
{
    struct pc_hart *h = hart_of(vcpu);

    if (h)
        free(h->ops);
    free(h);
}

static int set_start_state(struct pc_vcpu *vcpu)
{
    struct pc_hart_state state = { .pc = PCG_IMAGE };

    state.x[10] = vcpu->index;                                     /* a0 */
    state.x[2] = PCG_STACKS + (vcpu->index + 1) * PCG_STACK_BYTES; /* sp */
    pc_rv64_set_state(vcpu, &state);
    return 0;
}

/* ---- state ---- */

void pc_rv64_get_state(const struct pc_vcpu *vcpu, struct pc_hart_state *state)
{
    const struct pc_hart *h = hart_of(vcpu);

    memset(state, 0, sizeof *state);
    memcpy(state->x, h->x, sizeof state->x);
    state->pc = h->pc;
    state->instructions = atomic_load(&h->instructions);
    state->entropy_draws = h->entropy_draws;
    state->mscratch = h->mscratch;
    state->reservation_bytes = h->reservation_bytes;
    if (h->reservation_bytes) {
        state->reservation_address = h->reservation_address;
        state->reservation_value = h->reservation_value;
    }
}

void pc_rv64_set_state(struct pc_vcpu *vcpu, const struct pc_hart_state *state)
{
    struct pc_hart *h = hart_of(vcpu);

    memcpy(h->x, state->x, sizeof state->x);
    h->pc = state->pc;
    atomic_store(&h->instructions, state->instructions);
    h->entropy_draws = state->entropy_draws;
    h->mscratch = state->mscratch;
    h->reservation_address = state->reservation_address;
    h->reservation_value = state->reservation_value;
    h->reservation_bytes = state->reservation_bytes;
}

static const struct pc_section_kind hart_section = {
    "HART", true, false, sizeof(struct pc_hart_state), sizeof(struct pc_hart_state), 1,
};

static int save_vcpu(struct pc_vcpu *vcpu, struct pc_state_writer *writer, char *error, size_t error_bytes)
{
    struct pc_hart_state state;

    (void)error;
    (void)error_bytes;
    pc_rv64_get_state(vcpu, &state);
    return pc_state_put(writer, &hart_section, vcpu->index, &state, sizeof state);
}

static int check_vcpu(struct pc_vcpu *vcpu, const struct pc_section *sections, char *error, size_t error_bytes)
{
    struct pc_hart_state state;
    bool pc_possible;

    memcpy(&state, sections->payload, sizeof state);
    /* A hart that ran off the area is at its end. */
    pc_possible = state.pc % 4 == 0 && state.pc - PCG_IMAGE <= PC_IMAGE_BYTES;
    /* No hart counts half of what 64 bits can hold; near the end of the numbers it would stop for good. */
    if (!pc_possible || state.x[0] || state.zero || state.instructions > UINT64_MAX / 2 ||
        (state.reservation_bytes != 0 && state.reservation_bytes != 4 && state.reservation_bytes != 8))
        return pc_fail(EBADMSG, error, error_bytes, "section HART of vCPU %u is not a state a hart can be in", vcpu->index);
    return 0;
}

static int load_vcpu(struct pc_vcpu *vcpu, const struct pc_section *sections, char *error, size_t error_bytes)
{
    struct pc_hart_state state;

    (void)error;
    (void)error_bytes;
    memcpy(&state, sections->payload, sizeof state);
    pc_rv64_set_state(vcpu, &state);
    return 0;
}

const struct pc_engine pc_engine_rv64 = {
    .program_counter = "PC",
    .kick_again = true,
    .images = pc_rv64_images,
    .make_vcpu = make_vcpu,
    .destroy_vcpu = destroy_vcpu,
    .set_start_state = set_start_state,
    .run = run,
    .kick = kick,
    .where = where,
    .entropy = entropy,
    .section_kinds = &hart_section,
    .section_count = 1,
    .save_vcpu = save_vcpu,
    .check_vcpu = check_vcpu,
    .load_vcpu = load_vcpu,
};

/* ---- run until ---- */

int pc_rv64_instructions(struct pc_machine *machine, uint32_t hart, uint64_t *instructions)
{
    if (machine->config.engine != PC_ENGINE_RV64)
        return -ENOTSUP;
    if (hart >= machine->vcpu_count)
        return -EINVAL;
    *instructions = atomic_load(&hart_of(&machine->vcpu[hart])->instructions);
    return 0;
}

/* Heeded from the next resume on. */
static void set_limit(struct pc_machine *machine, uint64_t limit)
{
    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        atomic_store(&hart_of(&machine->vcpu[i])->limit, limit);
}

int pc_rv64_run_until(struct pc_machine *machine, uint64_t instructions, uint32_t timeout_ms, char *error,
                      size_t error_bytes)
{
    uint64_t until_ns = pc_now_ns() + timeout_ms * 1000000ull;
    struct timespec until = pc_timespec(until_ns);
    bool late = false, there;
    int rc;

    if (machine->config.engine != PC_ENGINE_RV64)
        return pc_fail(ENOTSUP, error, error_bytes, "only an rv64 machine counts its instructions");
    if (atomic_load(&machine->state) != PC_MACHINE_PAUSED)
        return pc_fail(EBUSY, error, error_bytes, "the machine is not paused");
    set_limit(machine, instructions);
    rc = pc_machine_resume(machine);
    if (rc) {
        set_limit(machine, PC_NO_LIMIT);
        return pc_fail(-rc, error, error_bytes, "the machine cannot be resumed: %s", strerrordesc_np(-rc));
    }
    pthread_mutex_lock(&machine->lock);
    for (;;) {
        there = true;
        for (uint32_t i = 0; i < machine->vcpu_count; i++)
            there = there && machine->vcpu[i].at_limit;
        if (there || late || atomic_load(&machine->state) != PC_MACHINE_RUNNING)
            break;
        late = pthread_cond_timedwait(&machine->changed, &machine->lock, &until) == ETIMEDOUT;
    }
    pthread_mutex_unlock(&machine->lock);
    rc = pc_machine_pause(machine, timeout_ms, error, error_bytes);
    set_limit(machine, PC_NO_LIMIT);
    if (rc == 0 && !there)
        rc = pc_fail(ETIMEDOUT, error, error_bytes, "not every hart came to %llu instructions in %u ms",
                     (unsigned long long)instructions, timeout_ms);
    return rc;
}
