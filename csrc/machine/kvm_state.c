/* SPDX-License-Identifier: Apache-2.0
 *
 * The kvm engine: a vCPU's state as sections of the blob (state.c), in KVM's own structures, whose layout is x86 ABI.
 */
#include "machine/kvm.h"

#if defined(__x86_64__)

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CPUID_MAX       256u
#define MSRS_MAX        2048u
#define XSAVE_MAX_BYTES 65536u

struct state_msr {
    uint32_t index, zero;
    uint64_t value;
};

/* In the order in which they are saved. */
enum section { REGS, SREGS, XCRS, EVENTS, DEBUGREGS, MP_STATE, CPUID, XSAVE, MSRS, TSC_KHZ };

#define PLAIN(tag, optional, type) {tag, true, optional, sizeof(type), sizeof(type), 1}
const struct pc_section_kind pc_kvm_sections[PC_KVM_SECTIONS] = {
    [REGS] = PLAIN("REGS", false, struct kvm_regs),
    [SREGS] = PLAIN("SREG", false, struct kvm_sregs),
    [XCRS] = PLAIN("XCRS", true, struct kvm_xcrs),
    [EVENTS] = PLAIN("EVNT", false, struct kvm_vcpu_events),
    [DEBUGREGS] = PLAIN("DREG", true, struct kvm_debugregs),
    [MP_STATE] = PLAIN("MPST", false, struct kvm_mp_state),
    [CPUID] = {"CPID", true, false, sizeof(struct kvm_cpuid_entry2), CPUID_MAX * sizeof(struct kvm_cpuid_entry2),
               sizeof(struct kvm_cpuid_entry2)},
    [XSAVE] = {"XSAV", true, false, sizeof(struct kvm_xsave), XSAVE_MAX_BYTES, 8},
    [MSRS] = {"MSRS", true, false, sizeof(struct state_msr), MSRS_MAX * sizeof(struct state_msr), sizeof(struct state_msr)},
    [TSC_KHZ] = PLAIN("TSCK", false, uint64_t),
};

/* Those that are one structure each, with an ioctl to get it and one to set it. */
static const struct {
    unsigned long get, set;
} plain[PC_KVM_SECTIONS] = {
    [REGS] = {KVM_GET_REGS, KVM_SET_REGS},
    [SREGS] = {KVM_GET_SREGS, KVM_SET_SREGS},
    [XCRS] = {KVM_GET_XCRS, KVM_SET_XCRS},
    [EVENTS] = {KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS},
    [DEBUGREGS] = {KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS},
    [MP_STATE] = {KVM_GET_MP_STATE, KVM_SET_MP_STATE},
};
#define PLAIN_MAX_BYTES sizeof(struct kvm_xcrs)
_Static_assert(sizeof(struct kvm_sregs) <= PLAIN_MAX_BYTES && sizeof(struct kvm_regs) <= PLAIN_MAX_BYTES &&
                   sizeof(struct kvm_vcpu_events) <= PLAIN_MAX_BYTES && sizeof(struct kvm_debugregs) <= PLAIN_MAX_BYTES,
               "the largest of them");

/* ---- MSRs ---- */

#define MSR_TSC 0x10u

/* What our guests use: moved or refused, and the only ones that are ever set. Of all others KVM knows a vCPU that has run our
 * programs has the values that it began with. The base registers of FS and GS, and EFER, are in SREG. The time stamp counter
 * first, so that it stops for as short a time as possible. */
static const uint32_t needed_msrs[] = {
    MSR_TSC,
    0x174,      /* SYSENTER_CS */
    0x175,      /* SYSENTER_ESP */
    0x176,      /* SYSENTER_EIP */
    0x277,      /* PAT */
    0xc0000080, /* EFER */
    0xc0000081, /* STAR */
    0xc0000082, /* LSTAR */
    0xc0000083, /* CSTAR */
    0xc0000084, /* SFMASK */
    0xc0000100, /* FS_BASE */
    0xc0000101, /* GS_BASE */
    0xc0000102, /* KERNEL_GS_BASE */
};
#define NEEDED_MSRS PC_ARRAY_LENGTH(needed_msrs)

/* By these a guest tells KVM or Hyper-V where in its memory the host is to write. Some are written to within KVM_SET_MSRS,
 * others when the vCPU is next entered or preempted. */
static const uint32_t msrs_of_memory[] = {
    0x11, 0x4b564d00, /* wall clock */
    0x12, 0x4b564d01, /* system time */
    0x4b564d02,       /* asynchronous page faults */
    0x4b564d03,       /* steal time */
    0x4b564d04,       /* end of interrupt */
    0x40000001,       /* Hyper-V: hypercall page */
    0x40000021,       /* reference time page */
    0x40000073,       /* virtual processor assist page */
    0x40000082,       /* event flags page */
    0x40000083,       /* message page */
};

static bool is_among(uint32_t index, const uint32_t *msrs, size_t count)
{
    while (count && msrs[count - 1] != index)
        count--;
    return count;
}

/* KVM_GET_MSRS or KVM_SET_MSRS: all of them in one call, since each loads the vCPU and puts it away again. How many were done, in
 * their order, up to the first that KVM refuses; or -errno. */
struct msr_list {
    struct kvm_msrs header;
    struct kvm_msr_entry entries[NEEDED_MSRS];
};

static int do_msrs(const struct pc_vcpu *vcpu, unsigned long request, struct msr_list *list, uint32_t count)
{
    list->header = (struct kvm_msrs){.nmsrs = count};
    return pc_kvm_ioctl(pc_kvm_vcpu(vcpu)->fd, request, list);
}

static bool get_msr(const struct pc_vcpu *vcpu, uint32_t index, uint64_t *value)
{
    struct msr_list one = {.entries = {{.index = index}}};
    bool done = do_msrs(vcpu, KVM_GET_MSRS, &one, 1) == 1;

    *value = one.entries[0].data;
    return done;
}

/* ---- save ---- */

static int save_msrs(struct pc_state_writer *writer, const struct pc_vcpu *vcpu, char *error, size_t error_bytes)
{
    struct msr_list list = {0};
    struct state_msr msrs[NEEDED_MSRS];
    int done;

    for (size_t i = 0; i < NEEDED_MSRS; i++)
        list.entries[i].index = needed_msrs[i];
    done = do_msrs(vcpu, KVM_GET_MSRS, &list, NEEDED_MSRS);
    if (done != NEEDED_MSRS)
        return pc_fail(done < 0 ? -done : ENOENT, error, error_bytes, "vCPU %u: MSR 0x%x cannot be read", vcpu->index,
                       needed_msrs[done < 0 ? 0 : done]);
    for (size_t i = 0; i < NEEDED_MSRS; i++)
        msrs[i] = (struct state_msr){.index = needed_msrs[i], .value = list.entries[i].data};
    return pc_state_put(writer, &pc_kvm_sections[MSRS], vcpu->index, msrs, sizeof msrs);
}

static int save_xsave(struct pc_state_writer *writer, const struct pc_vcpu *vcpu)
{
    const struct pc_kvm *kvm = pc_kvm(vcpu->machine);
    void *xsave = calloc(1, kvm->xsave_bytes);
    int rc;

    if (!xsave)
        return -ENOMEM;
    rc = pc_kvm_ioctl(pc_kvm_vcpu(vcpu)->fd, kvm->has_xsave2 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, xsave);
    if (!rc)
        rc = pc_state_put(writer, &pc_kvm_sections[XSAVE], vcpu->index, xsave, kvm->xsave_bytes);
    free(xsave);
    return rc;
}

static bool has_section(const struct pc_kvm *kvm, int kind)
{
    return kind == XCRS ? kvm->has_xcrs : kind == DEBUGREGS ? kvm->has_debugregs : true;
}

/* KVM allows these from any thread while the vCPU is not running, which it is not: its thread is parked. */
int pc_kvm_save_vcpu(struct pc_vcpu *vcpu, struct pc_state_writer *writer, char *error, size_t error_bytes)
{
    const struct pc_kvm_vcpu *own = pc_kvm_vcpu(vcpu);
    uint64_t buffer[PLAIN_MAX_BYTES / sizeof(uint64_t)];
    int rc = 0;

    for (int kind = 0; !rc && kind < PC_KVM_SECTIONS; kind++) {
        const struct pc_section_kind *section = &pc_kvm_sections[kind];

        if (!has_section(pc_kvm(vcpu->machine), kind))
            continue;
        switch (kind) {
        case CPUID:
            /* Not KVM_GET_CPUID2: KVM mixes in bits of its own choice (some that it does not even list as supported), which the
             * next host would then be blamed for lacking. */
            rc = pc_state_put(writer, section, vcpu->index, own->cpuid->entries,
                              own->cpuid->nent * sizeof own->cpuid->entries[0]);
            break;
        case XSAVE:
            rc = save_xsave(writer, vcpu);
            break;
        case MSRS:
            rc = save_msrs(writer, vcpu, error, error_bytes);
            break;
        case TSC_KHZ:
            rc = pc_state_put(writer, section, vcpu->index, &own->tsc_khz, sizeof own->tsc_khz);
            break;
        default:
            memset(buffer, 0, sizeof buffer);
            rc = pc_kvm_ioctl(own->fd, plain[kind].get, buffer);
            if (rc)
                return pc_fail(-rc, error, error_bytes, "vCPU %u: %s cannot be read: %s", vcpu->index, section->tag,
                               strerrordesc_np(-rc));
            rc = pc_state_put(writer, section, vcpu->index, buffer, section->max_bytes);
            break;
        }
    }
    return rc;
}

/* ---- load: can this host take it? ---- */

static const struct kvm_cpuid_entry2 *find_cpuid(const struct kvm_cpuid2 *cpuid, uint32_t function, uint32_t index)
{
    for (uint32_t i = 0; i < cpuid->nent; i++)
        if (cpuid->entries[i].function == function && cpuid->entries[i].index == index)
            return &cpuid->entries[i];
    return NULL;
}

static uint32_t cpuid_register(const struct kvm_cpuid_entry2 *entry, char which)
{
    switch (entry ? which : 0) {
    case 'a': return entry->eax;
    case 'b': return entry->ebx;
    case 'c': return entry->ecx;
    case 'd': return entry->edx;
    default: return 0;
    }
}

/* Every feature bit the guest was shown must be real here. Leaves that hold numbers, names or topology are the guest's
 * own and simply move. */
static int check_cpuid(const struct kvm_cpuid2 *there, const struct kvm_cpuid2 *host, char *error, size_t error_bytes)
{
    static const struct {
        uint32_t function, index;
        char which;
        uint32_t ignore; /* bits that mirror the guest's own CR4, or that KVM adds by itself */
    } features[] = {
        { 1, 0, 'c', 1u << 27 | 1u << 31 | 1u << 3 },
        { 1, 0, 'd', 1u << 9 },
        { 7, 0, 'b', 0 },
        { 7, 0, 'c', 1u << 4 },
        { 7, 0, 'd', 0 },
        { 7, 1, 'a', 0 },
        { 0xd, 0, 'a', 0 },
        { 0xd, 0, 'd', 0 },
        { 0xd, 1, 'a', 0 },
        { 0x80000001, 0, 'c', 0 },
        { 0x80000001, 0, 'd', 1u << 9 },
        { 0x80000008, 0, 'b', 0 },
    };
    const struct kvm_cpuid_entry2 *a = find_cpuid(there, 0, 0), *b = find_cpuid(host, 0, 0);

    if (a && b && (a->ebx != b->ebx || a->ecx != b->ecx || a->edx != b->edx))
        return pc_fail(ENOTSUP, error, error_bytes, "the machine comes from a processor of another vendor (%.4s%.4s%.4s, "
                       "here %.4s%.4s%.4s)", (const char *)&a->ebx, (const char *)&a->edx, (const char *)&a->ecx,
                       (const char *)&b->ebx, (const char *)&b->edx, (const char *)&b->ecx);
    for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
        uint32_t want = cpuid_register(find_cpuid(there, features[i].function, features[i].index), features[i].which);
        uint32_t have = cpuid_register(find_cpuid(host, features[i].function, features[i].index), features[i].which);
        uint32_t missing = want & ~have & ~features[i].ignore;
        if (missing)
            return pc_fail(ENOTSUP, error, error_bytes, "this host's processor or KVM lacks a feature the machine runs "
                           "with: CPUID 0x%x.%u E%cX bit %d", features[i].function, features[i].index,
                           features[i].which - 'a' + 'A', __builtin_ctz(missing));
    }
    return 0;
}

static struct kvm_cpuid2 *copy_cpuid(const struct pc_section *section)
{
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + section->bytes);

    if (cpuid) {
        cpuid->nent = (uint32_t)(section->bytes / sizeof cpuid->entries[0]);
        memcpy(cpuid->entries, section->payload, section->bytes);
    }
    return cpuid;
}

/* Guest memory is missing while a state is loaded. KVM touches it there by the MSRs above, and by the page tables of 32-bit PAE,
 * of which it reads four entries when the registers are set. Neither is a state that our guests can be in. */
static int check_no_memory(const struct pc_section *sections, uint32_t index, char *error, size_t error_bytes)
{
    const uint64_t long_mode = 0x500, paging = 0x80000001, pae = 0x20;
    struct kvm_sregs sregs;
    struct kvm_mp_state mp_state;

    for (uint64_t at = 0; at < sections[MSRS].bytes; at += sizeof(struct state_msr)) {
        struct state_msr msr;

        memcpy(&msr, sections[MSRS].payload + at, sizeof msr);
        if (msr.value && is_among(msr.index, msrs_of_memory, PC_ARRAY_LENGTH(msrs_of_memory)))
            return pc_fail(EBADMSG, error, error_bytes, "vCPU %u: MSR 0x%x = 0x%llx would let the host write to guest "
                           "memory, which no guest of ours does", index, msr.index, (unsigned long long)msr.value);
    }
    memcpy(&sregs, sections[SREGS].payload, sizeof sregs);
    if ((sregs.efer & long_mode) != long_mode || (sregs.cr0 & paging) != paging || !(sregs.cr4 & pae))
        return pc_fail(EBADMSG, error, error_bytes, "vCPU %u: section SREG is not of 64-bit mode with paging, which our "
                       "guests never leave", index);
    memcpy(&mp_state, sections[MP_STATE].payload, sizeof mp_state);
    if (mp_state.mp_state != KVM_MP_STATE_RUNNABLE)
        return pc_fail(EBADMSG, error, error_bytes, "vCPU %u: section MPST says %u: it waits for what never comes", index,
                       mp_state.mp_state);
    return 0;
}

int pc_kvm_check_vcpu(struct pc_vcpu *vcpu, const struct pc_section *sections, char *error, size_t error_bytes)
{
    const struct pc_kvm *kvm = pc_kvm(vcpu->machine);
    struct kvm_cpuid2 *cpuid = copy_cpuid(&sections[CPUID]);
    int rc;

    if (!cpuid)
        return pc_fail(ENOMEM, error, error_bytes, "out of memory");
    rc = check_cpuid(cpuid, kvm->host_cpuid, error, error_bytes);
    free(cpuid);
    if (!rc)
        rc = check_no_memory(sections, vcpu->index, error, error_bytes);
    if (rc)
        return rc;
    /* A larger area is one with components this host has not; empty, they do not matter. */
    for (uint64_t i = kvm->xsave_bytes; i < sections[XSAVE].bytes; i++)
        if (sections[XSAVE].payload[i])
            return pc_fail(ENOTSUP, error, error_bytes, "vCPU %u: this host has no room for %llu bytes of XSAVE state",
                           vcpu->index, (unsigned long long)sections[XSAVE].bytes);
    for (int kind = 0; kind < PC_KVM_SECTIONS; kind++)
        if (sections[kind].payload && !has_section(kvm, kind))
            return pc_fail(ENOTSUP, error, error_bytes, "this host's KVM cannot set %s",
                           kind == XCRS ? "XCR0" : "debug registers");
    return 0;
}

/* ---- load: set ---- */

static int load_msrs(const struct pc_vcpu *vcpu, const struct pc_section *section, char *error, size_t error_bytes)
{
    struct msr_list list = {0};
    uint64_t now, tsc = 0;
    uint32_t count = 0;
    int done;

    /* By our own list, which is as long as there is room: in a blob one may come twice, and older versions sent all that KVM lists. */
    for (size_t i = 0; i < NEEDED_MSRS; i++)
        for (uint64_t at = 0; at < section->bytes; at += sizeof(struct state_msr)) {
            struct state_msr msr;

            memcpy(&msr, section->payload + at, sizeof msr);
            if (msr.index != needed_msrs[i])
                continue;
            list.entries[count++] = (struct kvm_msr_entry){.index = msr.index, .data = msr.value};
            if (msr.index == MSR_TSC)
                tsc = msr.value;
            break;
        }
    while (count) {
        const struct kvm_msr_entry *refused;

        done = do_msrs(vcpu, KVM_SET_MSRS, &list, count);
        if (done < 0)
            return pc_fail(-done, error, error_bytes, "vCPU %u: this host takes no MSRs: %s", vcpu->index, strerrordesc_np(-done));
        if ((uint32_t)done >= count)
            break;
        /* Read-only, but right already? */
        refused = &list.entries[done];
        if (!get_msr(vcpu, refused->index, &now) || now != refused->data)
            return pc_fail(ENOTSUP, error, error_bytes, "vCPU %u: this host refuses MSR 0x%x = 0x%llx", vcpu->index, refused->index,
                           (unsigned long long)refused->data);
        count -= (uint32_t)done + 1;
        memmove(list.entries, refused + 1, count * sizeof *refused);
    }
    /* A KVM that cannot offset the counter takes the value and forgets it. Ahead of the guest's time is well; behind it the guest
     * would see time run backwards. */
    if (get_msr(vcpu, MSR_TSC, &now) && now < tsc)
        return pc_fail(ENOTSUP, error, error_bytes, "vCPU %u: this host's KVM cannot set the time stamp counter, and it is behind the "
                       "machine's", vcpu->index);
    return 0;
}

static int load_xsave(const struct pc_vcpu *vcpu, const struct pc_section *section)
{
    const struct pc_kvm *kvm = pc_kvm(vcpu->machine);
    void *xsave = calloc(1, kvm->xsave_bytes > section->bytes ? kvm->xsave_bytes : (size_t)section->bytes);
    int rc;

    if (!xsave)
        return -ENOMEM;
    memcpy(xsave, section->payload, section->bytes);
    rc = pc_kvm_ioctl(pc_kvm_vcpu(vcpu)->fd, KVM_SET_XSAVE, xsave);
    free(xsave);
    return rc;
}

int pc_kvm_load_vcpu(struct pc_vcpu *vcpu, const struct pc_section *sections, char *error, size_t error_bytes)
{
    /* The order matters: CPUID says which bits of CR4 and EFER are legal, CR4 which of XCR0, and events come last so that
     * nothing set later disturbs what is pending. */
    static const uint8_t order[PC_KVM_SECTIONS] = {CPUID,     SREGS,   REGS, XCRS,   XSAVE,
                                                   DEBUGREGS, TSC_KHZ, MSRS, EVENTS, MP_STATE};
    struct pc_kvm_vcpu *own = pc_kvm_vcpu(vcpu);
    uint64_t buffer[PLAIN_MAX_BYTES / sizeof(uint64_t)], tsc_khz;

    for (size_t i = 0; i < PC_KVM_SECTIONS; i++) {
        const struct pc_section *section = &sections[order[i]];
        struct kvm_cpuid2 *cpuid;
        int rc = 0;

        if (!section->payload)
            continue;
        switch (order[i]) {
        case CPUID:
            /* From a host like this one it is what the vCPU was made with. */
            if (section->bytes == own->cpuid->nent * sizeof own->cpuid->entries[0] &&
                memcmp(section->payload, own->cpuid->entries, section->bytes) == 0)
                break;
            cpuid = copy_cpuid(section);
            if (!cpuid) {
                rc = -ENOMEM;
                break;
            }
            free(own->cpuid);
            own->cpuid = cpuid;
            rc = pc_kvm_ioctl(own->fd, KVM_SET_CPUID2, cpuid);
            break;
        case XSAVE:
            rc = load_xsave(vcpu, section);
            break;
        case MSRS:
            rc = load_msrs(vcpu, section, error, error_bytes);
            if (rc)
                return rc;
            break;
        case TSC_KHZ:
            /* Where the counter cannot be scaled it runs at this host's speed: still monotonic, and the guest programs
             * measure nothing by it. */
            memcpy(&tsc_khz, section->payload, sizeof tsc_khz);
            if (!pc_kvm(vcpu->machine)->has_tsc_control || !tsc_khz || tsc_khz > UINT32_MAX || !own->tsc_khz || own->tsc_khz == tsc_khz)
                break;
            rc = pc_kvm_ioctl(own->fd, KVM_SET_TSC_KHZ, (void *)(uintptr_t)tsc_khz);
            own->tsc_khz = tsc_khz;
            break;
        default:
            memcpy(buffer, section->payload, section->bytes);
            rc = pc_kvm_ioctl(own->fd, plain[order[i]].set, buffer);
            break;
        }
        if (rc)
            return pc_fail(-rc, error, error_bytes, "vCPU %u: this host's KVM refuses section %s: %s", vcpu->index,
                           pc_kvm_sections[order[i]].tag, strerrordesc_np(-rc));
    }
    return 0;
}

#endif
