/* SPDX-License-Identifier: Apache-2.0
 *
 * Device state from a hostile source, and machines whose end comes while something still works on them. A state that KVM takes
 * may make the guest fail; it must not make a host thread touch guest memory, which is missing while a state is loaded, and
 * for which nobody may ever answer.
 */
#include "tests/machine/machines.h"

#include "machine/rv64.h"
#include "postcopy/uffd.h"

#if defined(__x86_64__)
#include <linux/kvm.h>
#endif

static struct pc_machine_config make_small(uint32_t engine, uint32_t workload)
{
    struct pc_machine_config config = make_config(engine, workload, 1, PC_MEMORY_ANON);

    config.working_set_bytes = 16 * PAGE;
    return config;
}

/* The state of a machine that has booted and done nothing yet. */
static struct saved saved_state(const struct pc_machine_config *config)
{
    struct pc_machine *machine = boot_machine(config);
    struct saved saved;

    save(machine, &saved);
    close_machine(machine);
    return saved;
}

#if defined(__x86_64__)

/* A copy with one more MSR. */
static struct saved with_msr(const struct saved *of, uint32_t index, uint64_t value)
{
    size_t at = find_section(of, "MSRS"), end = at + 16 + section_bytes(of, at);
    uint64_t bytes = section_bytes(of, at) + 16;
    struct saved more = *of;

    more.count += 16;
    memset(more.bytes + end, 0, 16);
    memcpy(more.bytes + end, &index, sizeof index);
    memcpy(more.bytes + end + 8, &value, sizeof value);
    memcpy(more.bytes + end + 16, of->bytes + end, (size_t)of->count - end);
    memcpy(more.bytes + at + 8, &bytes, sizeof bytes);
    seal(&more);
    return more;
}

/* Where in the blob the first value of an MSR is. */
static uint8_t *msr_in(struct saved *saved, uint32_t index)
{
    size_t at = find_section(saved, "MSRS"), end = at + 16 + section_bytes(saved, at);

    for (at += 16; at < end; at += 16)
        if (!memcmp(saved->bytes + at, &index, sizeof index))
            return saved->bytes + at + 8;
    FAIL("no MSR 0x%x", index);
}

/* All are set in one call, which ends at the first that KVM refuses: that one is named. Of one that comes twice the first counts. */
static void msrs_that_are_refused_or_come_twice(void)
{
    struct pc_machine_config here = make_small(PC_ENGINE_KVM, PC_WORKLOAD_IDLE);
    struct pc_machine_config there = make_small(PC_ENGINE_KVM, PC_WORKLOAD_IDLE);
    struct saved good = saved_state(&here), other = good, again;
    struct pc_machine *machine = open_machine(&there);

    memset(msr_in(&other, 0xc0000080), 0xff, 8); /* EFER */
    seal(&other);
    CHECK_EQ(try_load_into(machine, &other), -ENOTSUP);
    if (!strstr(error, "MSR 0xc0000080"))
        FAIL("EFER is not in: %s", error);
    close_machine(machine);

    machine = open_machine(&there);
    other = with_msr(&good, 0x175, 0x1234); /* SYSENTER_ESP */
    load(machine, &other);
    save(machine, &again);
    CHECK(!memcmp(msr_in(&again, 0x175), msr_in(&good, 0x175), 8));
    CHECK_EQ(again.count, good.count);
    close_machine(machine);
}

/* A machine over memory that is missing, and that nobody brings. */
static struct pc_machine *open_missing(struct pc_machine_config *config, int *uffd)
{
    *uffd = pc_uffd_open(PC_UFFD_ANY, 0, NULL);
    if (*uffd < 0)
        SKIP("uffd", "no userfaultfd");
    CHECK_EQ(pc_uffd_register(*uffd, (uintptr_t)config->shared.base, config->shared.size_bytes, PC_UFFD_MISSING, NULL), 0);
    CHECK_EQ(pc_uffd_register(*uffd, (uintptr_t)config->private_[0].base, config->private_[0].size_bytes, PC_UFFD_MISSING,
                              NULL), 0);
    return open_machine(config);
}

/* MSRs by which a guest gives KVM a place in its memory. KVM writes there as soon as the first ones are set, and when the vCPU
 * is next entered by the others. None of our guests has ever used them. */
static void msrs_that_write_memory(void)
{
    static const struct {
        uint32_t index;
        uint64_t value;
    } msrs[] = {
        {0x11, 0x100000},             /* MSR_KVM_WALL_CLOCK */
        {0x12, 0x100001},             /* MSR_KVM_SYSTEM_TIME */
        {0x4b564d00, 0x100000},       /* MSR_KVM_WALL_CLOCK_NEW */
        {0x4b564d01, 0x100001},       /* MSR_KVM_SYSTEM_TIME_NEW */
        {0x4b564d02, 0x100001},       /* MSR_KVM_ASYNC_PF_EN */
        {0x4b564d03, 0x100001},       /* MSR_KVM_STEAL_TIME */
        {0x4b564d04, 0x100001},       /* MSR_KVM_PV_EOI_EN */
        {0x40000001, 0x100001},       /* HV_X64_MSR_HYPERCALL */
        {0x40000021, 0x100001},       /* HV_X64_MSR_REFERENCE_TSC */
        {0x40000073, 0x100001},       /* HV_X64_MSR_VP_ASSIST_PAGE */
        {0x40000082, 0x100001},       /* HV_X64_MSR_SIEFP */
        {0x40000083, 0x100001},       /* HV_X64_MSR_SIMP */
    };
    struct pc_machine_config here = make_small(PC_ENGINE_KVM, PC_WORKLOAD_IDLE);
    struct saved good = saved_state(&here);

    for (size_t i = 0; i < sizeof msrs / sizeof *msrs; i++) {
        struct pc_machine_config there = make_small(PC_ENGINE_KVM, PC_WORKLOAD_IDLE);
        struct saved bad = with_msr(&good, msrs[i].index, msrs[i].value);
        char name[32];
        int uffd;
        struct pc_machine *machine = open_missing(&there, &uffd);

        CHECK_EQ(try_load_into(machine, &bad), -EBADMSG);
        (void)snprintf(name, sizeof name, "MSR 0x%x", msrs[i].index);
        if (!strstr(error, name))
            FAIL("%s is not in: %s", name, error);
        bad = with_msr(&good, msrs[i].index, 0); /* as older versions send those that KVM lists */
        CHECK_EQ(try_load_into(machine, &bad), 0);
        close_machine(machine);
        close(uffd);
    }
}

/* With page tables of 32-bit PAE KVM reads four of their entries when the registers are set. */
static void registers_that_read_memory(void)
{
    struct pc_machine_config here = make_small(PC_ENGINE_KVM, PC_WORKLOAD_IDLE);
    struct pc_machine_config there = make_small(PC_ENGINE_KVM, PC_WORKLOAD_IDLE);
    struct saved state = saved_state(&here);
    struct kvm_sregs sregs;
    uint8_t *payload = state.bytes + find_section(&state, "SREG") + 16;
    int uffd;
    struct pc_machine *machine = open_missing(&there, &uffd);

    memcpy(&sregs, payload, sizeof sregs);
    sregs.efer = 0;
    sregs.cs.l = 0;
    sregs.cs.db = 1;
    sregs.cr3 = 0x100000;
    memcpy(payload, &sregs, sizeof sregs);
    seal(&state);
    CHECK_EQ(try_load_into(machine, &state), -EBADMSG);
    CHECK(strstr(error, "SREG") && strstr(error, "64-bit"));
    close_machine(machine);
    close(uffd);
}

#endif

/* What would never end by itself: a hart that has executed nearly all instructions that can be counted stands for ever. */
static void counter_at_its_end(void)
{
    struct pc_machine_config config = make_small(PC_ENGINE_RV64, PC_WORKLOAD_IDLE);
    struct saved state = saved_state(&config);
    struct pc_hart_state hart;
    uint8_t *payload = state.bytes + find_section(&state, "HART") + 16;
    struct pc_machine *machine = open_machine(&config);

    memcpy(&hart, payload, sizeof hart);
    hart.instructions = UINT64_MAX;
    memcpy(payload, &hart, sizeof hart);
    seal(&state);
    CHECK_EQ(try_load_into(machine, &state), -EBADMSG);
    CHECK(strstr(error, "HART"));
    close_machine(machine);
}

/* ---- the end, while something works on it ---- */

/* A load that hangs: the machine stays whole until it has come back, and can then be closed. */
static void close_during_a_load(void)
{
    struct pc_machine_config config = make_small(PC_ENGINE_RV64, PC_WORKLOAD_IDLE);
    struct pc_machine *machine = open_machine(&config);
    struct pc_machine_stats stats;

    pthread_mutex_lock(&machine->lock);
    machine->transition = true; /* as while a load is in the kernel */
    pthread_mutex_unlock(&machine->lock);
    CHECK_EQ(pc_machine_close(machine, 50), -ETIMEDOUT);
    CHECK_EQ(pc_machine_stats(machine, &stats), 0);
    CHECK_EQ(pc_machine_close(machine, 50), -ETIMEDOUT); /* as often as one likes */
    pthread_mutex_lock(&machine->lock);
    machine->transition = false;
    pthread_cond_broadcast(&machine->changed);
    pthread_mutex_unlock(&machine->lock);
    close_machine(machine);
}

struct verification {
    struct pc_machine *machine;
    int result;
    _Atomic bool over;
};

static void *verify_in_thread(void *argument)
{
    struct verification *v = argument;
    struct pc_machine_check check;

    v->result = pc_machine_verify(v->machine, &check);
    atomic_store(&v->over, true);
    return NULL;
}

/* Guest memory says that 2^62 operations were done: a verification that recounts them can be called off. */
static void close_during_a_verification(void)
{
    struct pc_machine_config config = make_small(PC_ENGINE_RV64, PC_WORKLOAD_RANDOM);
    struct pc_machine *machine = open_machine(&config);
    struct verification v = {.machine = machine};
    struct pcg_vcpu *guest = (struct pcg_vcpu *)(void *)((uint8_t *)config.shared.base + PCG_VCPU_PAGES);
    pthread_t thread;
    bool under_way = false;

    CHECK_EQ(pc_machine_boot(machine), 0);
    guest->operations = 1ull << 62;
    CHECK_EQ(pthread_create(&thread, NULL, verify_in_thread, &v), 0);
    while (!under_way && !atomic_load(&v.over)) {
        pthread_mutex_lock(&machine->lock);
        under_way = machine->transition;
        pthread_mutex_unlock(&machine->lock);
    }
    close_machine(machine);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(v.result, -ECANCELED);
}

/* The verifier reads tables whose place the guest says: any number, also one that no word can be at. */
static void tables_at_odd_addresses(void)
{
    struct pc_machine_config config = make_small(PC_ENGINE_RV64, PC_WORKLOAD_IDLE);
    struct pc_machine *machine = open_machine(&config);
    struct pcg_vcpu *guest = (struct pcg_vcpu *)(void *)((uint8_t *)config.shared.base + PCG_VCPU_PAGES);
    struct pc_machine_check check;

    CHECK_EQ(pc_machine_boot(machine), 0);
    machine->config.workload = PC_WORKLOAD_DISK; /* a disk is not needed to read the tables */
    guest->next_tag = 1;
    guest->slots = guest->range_slots[0] = 2;
    guest->chunks = 0;
    guest->slot_tags_gva = PCG_IMAGE + 3;
    guest->chunk_tags_gva = PCG_IMAGE + 5;
    guest->slot_gva[0] = PCG_IMAGE + 1;
    CHECK_EQ(pc_machine_verify(machine, &check), 0);
    CHECK(!check.ok);
    close_machine(machine);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
#if defined(__x86_64__)
    RUN(msrs_that_write_memory);
    RUN(msrs_that_are_refused_or_come_twice);
    RUN(registers_that_read_memory);
#endif
    RUN(counter_at_its_end);
    RUN(close_during_a_load);
    RUN(close_during_a_verification);
    RUN(tables_at_odd_addresses);
    return test_end();
}
