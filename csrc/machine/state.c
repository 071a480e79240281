/* SPDX-License-Identifier: Apache-2.0
 *
 * Device state as a blob: all that the guest can see of the machine, except its memory.
 *
 *   header    magic[8]  u32 version  u32 CRC32C of all that follows the header  u64 bytes in all  u32 sections  u32 zero
 *   section   u32 tag (four letters)  u32 vCPU (or NO_VCPU)  u64 bytes, then the payload, zero padded to 8 bytes
 *
 * Which sections there are is the engine's choice: the first one and VCPU are in all machines, NETD in those with a network
 * device, HART is rv64's, the others are kvm's. Little endian, as are KVM's own structures inside, whose layout
 * is x86 ABI. The blob comes over the network: it is read in two passes. The first believes nothing and finds every section; only when all are there, once, with a possible
 * length, and this host can take them, does the second one set anything.
 *
 * What is absent on purpose: the guest's nonce (it lives in guest memory only, as proof that the memory moved) and exits,
 * which are this host's.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machine/machine.h"
#include "machine/rv64.h"
#include "postcopy/core.h"

#if defined(__x86_64__)
#include <linux/kvm.h>
#endif

#define STATE_VERSION   1u
#define STATE_MAGIC     "PCKVMST"
#define NO_VCPU         0xffffffffu
#define CPUID_MAX       256u
#define MSRS_MAX        2048u
#define XSAVE_MAX_BYTES 65536u

struct state_header {
    char magic[8];
    uint32_t version;
    uint32_t crc;
    uint64_t bytes;
    uint32_t sections;
    uint32_t zero;
};

struct section_header {
    char tag[4];
    uint32_t vcpu;
    uint64_t bytes;
};

struct state_machine {
    uint32_t vcpus, workload;
    uint64_t shared_bytes, private_bytes[PC_MACHINE_MAX_VCPUS];
    uint64_t working_set_bytes, seed, disk_bytes, disk_skew;
    uint64_t disk_reads, disk_writes, disk_transferred_bytes, disk_errors, serial_bytes;
};

struct state_vcpu {
    uint64_t marks, operations, failures;
    uint32_t ready, disk_status;
};

/* The network device. Its frames do not move: it is Ethernet, which may lose them. */
struct state_net {
    uint64_t mac;
    uint32_t address, zero;
    uint64_t received, sent, dropped, errors;
    uint32_t status[PC_MACHINE_MAX_VCPUS];
};

struct state_msr {
    uint32_t index, zero;
    uint64_t value;
};

enum section { MACHINE, VCPU, CPUID, REGS, SREGS, XSAVE, XCRS, MSRS, EVENTS, DEBUGREGS, MP_STATE, TSC_KHZ, HART, NET, SECTIONS };

static const struct {
    char tag[5];
    bool per_vcpu, optional;
    uint64_t min_bytes, max_bytes, unit_bytes;
} kinds[SECTIONS] = {
    [MACHINE] = { "MACH", false, false, sizeof(struct state_machine), sizeof(struct state_machine), 1 },
    [NET] = { "NETD", false, false, sizeof(struct state_net), sizeof(struct state_net), 1 },
    [VCPU] = { "VCPU", true, false, sizeof(struct state_vcpu), sizeof(struct state_vcpu), 1 },
    [HART] = { "HART", true, false, sizeof(struct pc_hart_state), sizeof(struct pc_hart_state), 1 },
#if defined(__x86_64__)
    [CPUID] = { "CPID", true, false, sizeof(struct kvm_cpuid_entry2), CPUID_MAX * sizeof(struct kvm_cpuid_entry2),
                sizeof(struct kvm_cpuid_entry2) },
    [REGS] = { "REGS", true, false, sizeof(struct kvm_regs), sizeof(struct kvm_regs), 1 },
    [SREGS] = { "SREG", true, false, sizeof(struct kvm_sregs), sizeof(struct kvm_sregs), 1 },
    [XSAVE] = { "XSAV", true, false, sizeof(struct kvm_xsave), XSAVE_MAX_BYTES, 8 },
    [XCRS] = { "XCRS", true, true, sizeof(struct kvm_xcrs), sizeof(struct kvm_xcrs), 1 },
    [MSRS] = { "MSRS", true, false, sizeof(struct state_msr), MSRS_MAX * sizeof(struct state_msr),
               sizeof(struct state_msr) },
    [EVENTS] = { "EVNT", true, false, sizeof(struct kvm_vcpu_events), sizeof(struct kvm_vcpu_events), 1 },
    [DEBUGREGS] = { "DREG", true, true, sizeof(struct kvm_debugregs), sizeof(struct kvm_debugregs), 1 },
    [MP_STATE] = { "MPST", true, false, sizeof(struct kvm_mp_state), sizeof(struct kvm_mp_state), 1 },
    [TSC_KHZ] = { "TSCK", true, false, sizeof(uint64_t), sizeof(uint64_t), 1 },
#endif
};

static bool of_engine(const struct pc_machine *machine, int kind)
{
    if (kind == MACHINE || kind == VCPU)
        return true;
    if (kind == NET)
        return machine->config.has_net;
    return (kind == HART) == (machine->config.engine == PC_ENGINE_RV64);
}

#if defined(__x86_64__)

#define MSR_TSC 0x10u

/* What our guests use: moved or refused, and the only ones that are ever set. Of all others KVM knows a vCPU that has run our
 * programs has the values that it began with. The base registers of FS and GS, and EFER, are in SREG. The time stamp counter
 * first, so that it stands still between the hosts as briefly as can be. */
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
#define NEEDED_MSRS (sizeof needed_msrs / sizeof *needed_msrs)

static bool is_needed_msr(uint32_t index)
{
    for (size_t i = 0; i < NEEDED_MSRS; i++)
        if (needed_msrs[i] == index)
            return true;
    return false;
}

/* By these a guest tells KVM or Hyper-V where in its memory the host is to write. Some are written to within KVM_SET_MSRS,
 * others when the vCPU is next entered or preempted. */
static bool gives_memory_to_host(uint32_t index)
{
    static const uint32_t msrs[] = {
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

    for (size_t i = 0; i < sizeof msrs / sizeof *msrs; i++)
        if (msrs[i] == index)
            return true;
    return false;
}

#endif

/* ---- save ---- */

struct writer {
    uint8_t *data;
    size_t bytes, cap;
    uint32_t sections;
};

static int put(struct writer *w, enum section kind, uint32_t vcpu, const void *payload, size_t bytes)
{
    struct section_header header = { .vcpu = vcpu, .bytes = bytes };
    size_t padded = (bytes + 7) & ~(size_t)7;

    if (w->cap - w->bytes < sizeof header + padded) {
        size_t cap = w->cap * 2 + sizeof header + padded;
        uint8_t *data = realloc(w->data, cap);
        if (!data)
            return -ENOMEM;
        w->data = data;
        w->cap = cap;
    }
    memcpy(header.tag, kinds[kind].tag, sizeof header.tag);
    memcpy(w->data + w->bytes, &header, sizeof header);
    memcpy(w->data + w->bytes + sizeof header, payload, bytes);
    memset(w->data + w->bytes + sizeof header + bytes, 0, padded - bytes);
    w->bytes += sizeof header + padded;
    w->sections++;
    return 0;
}

#if defined(__x86_64__)

static int get_msr(int fd, uint32_t index, uint64_t *value)
{
    struct {
        struct kvm_msrs header;
        struct kvm_msr_entry entry;
    } one = { .header = { .nmsrs = 1 }, .entry = { .index = index } };
    int rc = pc_machine_ioctl(fd, KVM_GET_MSRS, &one);

    if (rc != 1)
        return rc < 0 ? rc : -ENOENT;
    *value = one.entry.data;
    return 0;
}

static int set_msr(int fd, uint32_t index, uint64_t value)
{
    struct {
        struct kvm_msrs header;
        struct kvm_msr_entry entry;
    } one = { .header = { .nmsrs = 1 }, .entry = { .index = index, .data = value } };
    int rc = pc_machine_ioctl(fd, KVM_SET_MSRS, &one);

    return rc == 1 ? 0 : rc < 0 ? rc : -EINVAL;
}

static int save_msrs(struct writer *w, const struct pc_vcpu *vcpu, char *error, size_t error_bytes)
{
    struct state_msr msrs[NEEDED_MSRS];
    int rc;

    memset(msrs, 0, sizeof msrs);
    for (size_t i = 0; i < NEEDED_MSRS; i++) {
        msrs[i].index = needed_msrs[i];
        rc = get_msr(vcpu->fd, needed_msrs[i], &msrs[i].value);
        if (rc)
            return pc_machine_error(error, error_bytes, rc, "vCPU %u: MSR 0x%x cannot be read", vcpu->index, needed_msrs[i]);
    }
    return put(w, MSRS, vcpu->index, msrs, sizeof msrs);
}

static int save_xsave(struct writer *w, const struct pc_machine *machine, const struct pc_vcpu *vcpu)
{
    void *xsave = calloc(1, machine->xsave_bytes);
    int rc;

    if (!xsave)
        return -ENOMEM;
    rc = pc_machine_ioctl(vcpu->fd, machine->has_xsave2 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, xsave);
    if (!rc)
        rc = put(w, XSAVE, vcpu->index, xsave, machine->xsave_bytes);
    free(xsave);
    return rc;
}

/* KVM allows these from any thread while the vCPU is not running, which it is not: its thread is parked. */
static int save_kvm_vcpu(struct writer *w, const struct pc_machine *machine, struct pc_vcpu *vcpu, char *error,
                         size_t error_bytes)
{
    union {
        struct kvm_regs regs;
        struct kvm_sregs sregs;
        struct kvm_xcrs xcrs;
        struct kvm_vcpu_events events;
        struct kvm_debugregs debugregs;
        struct kvm_mp_state mp_state;
    } u;
    const struct {
        enum section kind;
        bool present;
        unsigned long request;
        size_t bytes;
    } plain[] = {
        { REGS, true, KVM_GET_REGS, sizeof u.regs },
        { SREGS, true, KVM_GET_SREGS, sizeof u.sregs },
        { XCRS, machine->has_xcrs, KVM_GET_XCRS, sizeof u.xcrs },
        { EVENTS, true, KVM_GET_VCPU_EVENTS, sizeof u.events },
        { DEBUGREGS, machine->has_debugregs, KVM_GET_DEBUGREGS, sizeof u.debugregs },
        { MP_STATE, true, KVM_GET_MP_STATE, sizeof u.mp_state },
    };
    uint64_t tsc_khz;
    int rc = 0, khz;

    for (size_t i = 0; !rc && i < sizeof plain / sizeof *plain; i++) {
        if (!plain[i].present)
            continue;
        memset(&u, 0, sizeof u);
        rc = pc_machine_ioctl(vcpu->fd, plain[i].request, &u);
        if (rc)
            return pc_machine_error(error, error_bytes, rc, "vCPU %u: %s cannot be read: %s", vcpu->index,
                                    kinds[plain[i].kind].tag, strerrordesc_np(-rc));
        rc = put(w, plain[i].kind, vcpu->index, &u, plain[i].bytes);
    }
    if (!rc)
        /* Not KVM_GET_CPUID2: KVM mixes in bits of its own choice (some that it does not even list as supported), which the
         * next host would then be blamed for lacking. */
        rc = put(w, CPUID, vcpu->index, vcpu->cpuid->entries, vcpu->cpuid->nent * sizeof vcpu->cpuid->entries[0]);
    if (!rc)
        rc = save_xsave(w, machine, vcpu);
    if (!rc)
        rc = save_msrs(w, vcpu, error, error_bytes);
    khz = pc_machine_ioctl(vcpu->fd, KVM_GET_TSC_KHZ, NULL);
    tsc_khz = khz > 0 ? (uint64_t)khz : 0;
    if (!rc)
        rc = put(w, TSC_KHZ, vcpu->index, &tsc_khz, sizeof tsc_khz);
    return rc;
}

#endif

static int save_vcpu(struct writer *w, const struct pc_machine *machine, struct pc_vcpu *vcpu, char *error,
                     size_t error_bytes)
{
    struct pc_hart_state hart;
    struct state_vcpu own = {
        .marks = atomic_load(&vcpu->marks),
        .operations = atomic_load(&vcpu->operations),
        .failures = atomic_load(&vcpu->failures),
        .ready = atomic_load(&vcpu->ready),
        .disk_status = vcpu->disk_status,
    };
    int rc = put(w, VCPU, vcpu->index, &own, sizeof own);

    if (rc)
        return rc;
    if (machine->config.engine == PC_ENGINE_RV64) {
        pc_rv64_get_state(vcpu, &hart);
        return put(w, HART, vcpu->index, &hart, sizeof hart);
    }
#if defined(__x86_64__)
    return save_kvm_vcpu(w, machine, vcpu, error, error_bytes);
#else
    return pc_machine_error(error, error_bytes, -ENOTSUP, "no kvm on this architecture");
#endif
}

static struct state_machine describe(struct pc_machine *machine)
{
    const struct pc_machine_config *config = &machine->config;
    struct state_machine s = {
        .vcpus = config->vcpus,
        .workload = config->workload,
        .shared_bytes = config->shared.size_bytes,
        .working_set_bytes = config->working_set_bytes,
        .seed = config->seed,
        .disk_bytes = config->disk_fd < 0 ? 0 : config->disk_bytes,
        .disk_skew = machine->disk_skew,
        .disk_reads = atomic_load(&machine->disk_reads),
        .disk_writes = atomic_load(&machine->disk_writes),
        .disk_transferred_bytes = atomic_load(&machine->disk_bytes),
        .disk_errors = atomic_load(&machine->disk_errors),
        .serial_bytes = atomic_load(&machine->serial_bytes),
    };

    for (uint32_t i = 0; i < config->vcpus; i++)
        s.private_bytes[i] = config->private_[i].size_bytes;
    return s;
}

static struct state_net describe_net(struct pc_machine *machine)
{
    struct state_net s = {
        .mac = machine->config.net_mac,
        .address = machine->config.net_address,
        .received = atomic_load(&machine->net_received),
        .sent = atomic_load(&machine->net_sent),
        .dropped = atomic_load(&machine->net_dropped),
        .errors = atomic_load(&machine->net_errors),
    };

    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        s.status[i] = machine->vcpu[i].net_status;
    return s;
}

int64_t pc_state_save(struct pc_machine *machine, void *buf, size_t cap, char *error, size_t error_bytes)
{
    struct state_header header = { .magic = STATE_MAGIC, .version = STATE_VERSION };
    struct state_machine own = describe(machine);
    struct writer w = { .data = malloc(16384), .bytes = sizeof header, .cap = 16384 };
    int64_t result;
    int rc = w.data ? put(&w, MACHINE, NO_VCPU, &own, sizeof own) : -ENOMEM;

    pc_machine_error(error, error_bytes, 0, "%s", "");
    if (!rc && machine->config.has_net) {
        struct state_net net = describe_net(machine);
        rc = put(&w, NET, NO_VCPU, &net, sizeof net);
    }
    for (uint32_t i = 0; !rc && i < machine->vcpu_count; i++)
        rc = save_vcpu(&w, machine, &machine->vcpu[i], error, error_bytes);
    if (rc) {
        free(w.data);
        if (error && error_bytes && !error[0])
            pc_machine_error(error, error_bytes, rc, "device state cannot be saved: %s", strerrordesc_np(-rc));
        return rc;
    }
    header.bytes = w.bytes;
    header.sections = w.sections;
    header.crc = pc_crc32c(0, w.data + sizeof header, w.bytes - sizeof header);
    memcpy(w.data, &header, sizeof header);
    result = (int64_t)w.bytes;
    if (buf && cap >= w.bytes)
        memcpy(buf, w.data, w.bytes);
    free(w.data);
    return result;
}

/* ---- load, first pass: find ---- */

struct found {
    const uint8_t *payload; /* not aligned: copy out */
    uint64_t bytes;
};

struct reader {
    struct found machine[SECTIONS];
    struct found vcpu[PC_MACHINE_MAX_VCPUS][SECTIONS];
};

static int find_sections(const struct pc_machine *machine, const uint8_t *data, size_t bytes, struct reader *r, char *error,
                         size_t error_bytes)
{
    struct state_header header;
    size_t at = sizeof header;
    uint32_t sections = 0;

    memset(r, 0, sizeof *r);
    if (!data || bytes < sizeof header)
        return pc_machine_error(error, error_bytes, -EBADMSG, "device state is cut short: %zu bytes", bytes);
    memcpy(&header, data, sizeof header);
    if (memcmp(header.magic, STATE_MAGIC, sizeof header.magic))
        return pc_machine_error(error, error_bytes, -EBADMSG, "this is not the device state of a machine");
    if (header.version != STATE_VERSION)
        return pc_machine_error(error, error_bytes, -EPROTO, "device state has version %u, this program reads version %u",
                                header.version, STATE_VERSION);
    if (header.bytes != bytes || header.zero)
        return pc_machine_error(error, error_bytes, -EBADMSG, "device state is damaged: %zu bytes came, it says %llu", bytes,
                                (unsigned long long)header.bytes);
    if (pc_crc32c(0, data + sizeof header, bytes - sizeof header) != header.crc)
        return pc_machine_error(error, error_bytes, -EBADMSG, "device state is damaged: its checksum does not match");
    while (at < bytes) {
        struct section_header section;
        struct found *to;
        uint64_t padded;
        int kind;

        if (bytes - at < sizeof section)
            return pc_machine_error(error, error_bytes, -EBADMSG, "device state is cut short within a section header");
        memcpy(&section, data + at, sizeof section);
        at += sizeof section;
        if (section.bytes > bytes - at)
            return pc_machine_error(error, error_bytes, -EBADMSG, "section %.4s is longer than the device state",
                                    section.tag);
        padded = (section.bytes + 7) & ~7ull;
        if (padded > bytes - at)
            return pc_machine_error(error, error_bytes, -EBADMSG, "section %.4s is cut short", section.tag);
        for (kind = 0; kind < SECTIONS; kind++)
            if (of_engine(machine, kind) && memcmp(section.tag, kinds[kind].tag, sizeof section.tag) == 0)
                break;
        if (kind == SECTIONS) {
            char tag[5] = { 0 };
            for (int i = 0; i < 4; i++)
                tag[i] = section.tag[i] >= ' ' && section.tag[i] <= '~' ? section.tag[i] : '?';
            return pc_machine_error(error, error_bytes, -EPROTO, "device state has a section \"%s\" that this program does "
                                    "not know", tag);
        }
        if (kinds[kind].per_vcpu ? section.vcpu >= PC_MACHINE_MAX_VCPUS : section.vcpu != NO_VCPU)
            return pc_machine_error(error, error_bytes, -EBADMSG, "section %s is for vCPU %u, which cannot be",
                                    kinds[kind].tag, section.vcpu);
        if (section.bytes < kinds[kind].min_bytes || section.bytes > kinds[kind].max_bytes ||
            section.bytes % kinds[kind].unit_bytes)
            return pc_machine_error(error, error_bytes, -EBADMSG, "section %s has %llu bytes", kinds[kind].tag,
                                    (unsigned long long)section.bytes);
        to = kinds[kind].per_vcpu ? &r->vcpu[section.vcpu][kind] : &r->machine[kind];
        if (to->payload)
            return pc_machine_error(error, error_bytes, -EBADMSG, "section %s comes twice", kinds[kind].tag);
        *to = (struct found){ data + at, section.bytes };
        at += padded;
        sections++;
    }
    if (sections != header.sections)
        return pc_machine_error(error, error_bytes, -EBADMSG, "device state has %u sections, it says %u", sections,
                                header.sections);
    return 0;
}

static int check_complete(const struct pc_machine *machine, const struct reader *r, char *error, size_t error_bytes)
{
    uint32_t vcpus = machine->config.vcpus;

    for (int kind = 0; kind < SECTIONS; kind++) {
        for (uint32_t i = vcpus; i < PC_MACHINE_MAX_VCPUS; i++)
            if (r->vcpu[i][kind].payload)
                return pc_machine_error(error, error_bytes, -EBADMSG, "section %s is for vCPU %u of %u", kinds[kind].tag, i,
                                        vcpus);
        if (kinds[kind].optional || !of_engine(machine, kind))
            continue;
        if (!kinds[kind].per_vcpu && !r->machine[kind].payload)
            return pc_machine_error(error, error_bytes, -EBADMSG, "section %s is missing", kinds[kind].tag);
        for (uint32_t i = 0; kinds[kind].per_vcpu && i < vcpus; i++)
            if (!r->vcpu[i][kind].payload)
                return pc_machine_error(error, error_bytes, -EBADMSG, "section %s of vCPU %u is missing", kinds[kind].tag,
                                        i);
    }
    return 0;
}

/* ---- load, still first pass: can this host take it? ---- */

static int check_same_machine(struct pc_machine *machine, const struct state_machine *there, char *error, size_t error_bytes)
{
    const struct state_machine here = describe(machine);
    const struct {
        const char *what;
        uint64_t there, here;
    } same[] = {
        { "vCPUs", there->vcpus, here.vcpus },
        { "workload", there->workload, here.workload },
        { "shared memory bytes", there->shared_bytes, here.shared_bytes },
        { "working set bytes", there->working_set_bytes, here.working_set_bytes },
        { "seed", there->seed, here.seed },
        { "disk bytes", there->disk_bytes, here.disk_bytes },
    };

    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        if (same[i].there != same[i].here)
            return pc_machine_error(error, error_bytes, -EINVAL, "the machines differ in %s: %llu there, %llu here",
                                    same[i].what, (unsigned long long)same[i].there, (unsigned long long)same[i].here);
    for (uint32_t i = 0; i < here.vcpus; i++)
        if (there->private_bytes[i] != here.private_bytes[i])
            return pc_machine_error(error, error_bytes, -EINVAL, "the machines differ in memory of vCPU %u: %llu bytes there, "
                                    "%llu here", i, (unsigned long long)there->private_bytes[i],
                                    (unsigned long long)here.private_bytes[i]);
    if (there->disk_skew % machine->disk_memory_align)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "the disk here needs O_DIRECT buffers aligned to %llu bytes, the "
                                "guest's are not", (unsigned long long)machine->disk_memory_align);
    return 0;
}

static int check_net(const struct pc_machine *machine, const struct state_net *there, char *error, size_t error_bytes)
{
    const struct pc_machine_config *here = &machine->config;

    if (there->mac != here->net_mac || there->address != here->net_address)
        return pc_machine_error(error, error_bytes, -EINVAL, "the machines differ in the addresses of their network devices: "
                                "0x%llx, 0x%x there, 0x%llx, 0x%x here", (unsigned long long)there->mac, there->address,
                                (unsigned long long)here->net_mac, here->net_address);
    for (uint32_t i = 0; i < PC_MACHINE_MAX_VCPUS; i++) {
        uint32_t status = there->status[i];
        bool possible = status <= PCG_NET_FRAME_MAX || status == PCG_NET_AGAIN || status == PCG_NET_BAD_REQUEST;
        if (!possible || (status && i >= here->vcpus) || there->zero)
            return pc_machine_error(error, error_bytes, -EBADMSG, "section NETD is not a state a network device can be in");
    }
    return 0;
}

#if defined(__x86_64__)

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
        return pc_machine_error(error, error_bytes, -ENOTSUP, "the machine comes from a processor of another vendor "
                                "(%.4s%.4s%.4s, here %.4s%.4s%.4s)", (const char *)&a->ebx, (const char *)&a->edx,
                                (const char *)&a->ecx, (const char *)&b->ebx, (const char *)&b->edx, (const char *)&b->ecx);
    for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
        uint32_t want = cpuid_register(find_cpuid(there, features[i].function, features[i].index), features[i].which);
        uint32_t have = cpuid_register(find_cpuid(host, features[i].function, features[i].index), features[i].which);
        uint32_t missing = want & ~have & ~features[i].ignore;
        if (missing)
            return pc_machine_error(error, error_bytes, -ENOTSUP, "this host's processor or KVM lacks a feature the machine "
                                    "runs with: CPUID 0x%x.%u E%cX bit %d", features[i].function, features[i].index,
                                    features[i].which - 'a' + 'A', __builtin_ctz(missing));
    }
    return 0;
}

static struct kvm_cpuid2 *copy_cpuid(const struct found *section)
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
static int check_no_memory(const struct found *sections, uint32_t index, char *error, size_t error_bytes)
{
    const uint64_t long_mode = 0x500, paging = 0x80000001, pae = 0x20;
    struct kvm_sregs sregs;
    struct kvm_mp_state mp_state;

    for (uint64_t at = 0; at < sections[MSRS].bytes; at += sizeof(struct state_msr)) {
        struct state_msr msr;

        memcpy(&msr, sections[MSRS].payload + at, sizeof msr);
        if (gives_memory_to_host(msr.index) && msr.value)
            return pc_machine_error(error, error_bytes, -EBADMSG, "vCPU %u: MSR 0x%x = 0x%llx would let the host write to guest "
                                    "memory, which no guest of ours does", index, msr.index, (unsigned long long)msr.value);
    }
    memcpy(&sregs, sections[SREGS].payload, sizeof sregs);
    if ((sregs.efer & long_mode) != long_mode || (sregs.cr0 & paging) != paging || !(sregs.cr4 & pae))
        return pc_machine_error(error, error_bytes, -EBADMSG, "vCPU %u: section SREG is not of 64-bit mode with paging, which our "
                                "guests never leave", index);
    memcpy(&mp_state, sections[MP_STATE].payload, sizeof mp_state);
    if (mp_state.mp_state != KVM_MP_STATE_RUNNABLE)
        return pc_machine_error(error, error_bytes, -EBADMSG, "vCPU %u: section MPST says %u: it waits for what never comes", index,
                                mp_state.mp_state);
    return 0;
}

static int check_kvm_vcpu(const struct pc_machine *machine, const struct found *sections, uint32_t index, char *error,
                          size_t error_bytes)
{
    struct kvm_cpuid2 *cpuid = copy_cpuid(&sections[CPUID]);
    int rc;

    if (!cpuid)
        return pc_machine_error(error, error_bytes, -ENOMEM, "out of memory");
    rc = check_cpuid(cpuid, machine->host_cpuid, error, error_bytes);
    free(cpuid);
    if (!rc)
        rc = check_no_memory(sections, index, error, error_bytes);
    if (rc)
        return rc;
    /* A larger area is one with components this host has not; empty, they do not matter. */
    for (uint64_t i = machine->xsave_bytes; i < sections[XSAVE].bytes; i++)
        if (sections[XSAVE].payload[i])
            return pc_machine_error(error, error_bytes, -ENOTSUP, "vCPU %u: this host has no room for %llu bytes of XSAVE "
                                    "state", index, (unsigned long long)sections[XSAVE].bytes);
    if (sections[XCRS].payload && !machine->has_xcrs)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "this host's KVM cannot set XCR0");
    if (sections[DEBUGREGS].payload && !machine->has_debugregs)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "this host's KVM cannot set debug registers");
    return 0;
}

/* ---- load, second pass: set ---- */

static int load_msrs(const struct pc_vcpu *vcpu, const struct found *section, char *error, size_t error_bytes)
{
    for (uint64_t at = 0; at < section->bytes; at += sizeof(struct state_msr)) {
        struct state_msr msr;
        uint64_t now;

        memcpy(&msr, section->payload + at, sizeof msr);
        if (!is_needed_msr(msr.index))
            continue; /* older versions sent all that KVM lists */
        if (set_msr(vcpu->fd, msr.index, msr.value) == 0) {
            /* A KVM that cannot offset the counter takes the value and forgets it. Ahead of the guest's time is well; behind it
             * the guest would see time run backwards. */
            if (msr.index == MSR_TSC && get_msr(vcpu->fd, MSR_TSC, &now) == 0 && now < msr.value)
                return pc_machine_error(error, error_bytes, -ENOTSUP, "vCPU %u: this host's KVM cannot set the time stamp "
                                        "counter, and it is behind the machine's", vcpu->index);
            continue;
        }
        /* Read-only, but right already? */
        if (get_msr(vcpu->fd, msr.index, &now) || now != msr.value)
            return pc_machine_error(error, error_bytes, -ENOTSUP, "vCPU %u: this host refuses MSR 0x%x = 0x%llx", vcpu->index,
                                    msr.index, (unsigned long long)msr.value);
    }
    return 0;
}

static int load_xsave(const struct pc_machine *machine, const struct pc_vcpu *vcpu, const struct found *section)
{
    size_t bytes = machine->xsave_bytes > section->bytes ? machine->xsave_bytes : (size_t)section->bytes;
    void *xsave = calloc(1, bytes);
    int rc;

    if (!xsave)
        return -ENOMEM;
    memcpy(xsave, section->payload, section->bytes);
    rc = pc_machine_ioctl(vcpu->fd, KVM_SET_XSAVE, xsave);
    free(xsave);
    return rc;
}

static int load_kvm_vcpu(const struct pc_machine *machine, struct pc_vcpu *vcpu, const struct found *sections, char *error,
                         size_t error_bytes)
{
    union {
        struct kvm_regs regs;
        struct kvm_sregs sregs;
        struct kvm_xcrs xcrs;
        struct kvm_vcpu_events events;
        struct kvm_debugregs debugregs;
        struct kvm_mp_state mp_state;
    } u;
    /* The order matters: CPUID says which bits of CR4 and EFER are legal, CR4 which of XCR0, and events come last so that
     * nothing set later disturbs what is pending. */
    static const struct {
        enum section kind;
        unsigned long request;
    } plain[] = {
        { CPUID, KVM_SET_CPUID2 }, { SREGS, KVM_SET_SREGS },         { REGS, KVM_SET_REGS },
        { XCRS, KVM_SET_XCRS },    { XSAVE, KVM_SET_XSAVE },         { DEBUGREGS, KVM_SET_DEBUGREGS },
        { TSC_KHZ, 0 },            { MSRS, KVM_SET_MSRS },           { EVENTS, KVM_SET_VCPU_EVENTS },
        { MP_STATE, KVM_SET_MP_STATE },
    };

    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        const struct found *section = &sections[plain[i].kind];
        struct kvm_cpuid2 *cpuid;
        uint64_t tsc_khz;
        int rc = 0, khz;

        if (!section->payload)
            continue;
        switch (plain[i].kind) {
        case CPUID:
            cpuid = copy_cpuid(section);
            rc = cpuid ? pc_machine_ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) : -ENOMEM;
            free(vcpu->cpuid);
            vcpu->cpuid = cpuid;
            break;
        case XSAVE:
            rc = load_xsave(machine, vcpu, section);
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
            khz = pc_machine_ioctl(vcpu->fd, KVM_GET_TSC_KHZ, NULL);
            if (machine->has_tsc_control && tsc_khz && tsc_khz <= UINT32_MAX && khz > 0 && (uint64_t)khz != tsc_khz)
                rc = pc_machine_ioctl(vcpu->fd, KVM_SET_TSC_KHZ, (void *)(uintptr_t)tsc_khz);
            break;
        default:
            memset(&u, 0, sizeof u);
            memcpy(&u, section->payload, section->bytes);
            rc = pc_machine_ioctl(vcpu->fd, plain[i].request, &u);
            break;
        }
        if (rc)
            return pc_machine_error(error, error_bytes, rc, "vCPU %u: this host's KVM refuses section %s: %s", vcpu->index,
                                    kinds[plain[i].kind].tag, strerrordesc_np(-rc));
    }
    return 0;
}

#endif

static int check_vcpu(const struct pc_machine *machine, const struct found *sections, uint32_t index, char *error,
                      size_t error_bytes)
{
    struct pc_hart_state hart;

    if (machine->config.engine == PC_ENGINE_RV64) {
        memcpy(&hart, sections[HART].payload, sizeof hart);
        return pc_rv64_check_state(&hart, index, error, error_bytes);
    }
#if defined(__x86_64__)
    return check_kvm_vcpu(machine, sections, index, error, error_bytes);
#else
    return pc_machine_error(error, error_bytes, -ENOTSUP, "no kvm on this architecture");
#endif
}

static int load_vcpu(const struct pc_machine *machine, struct pc_vcpu *vcpu, const struct found *sections, char *error,
                     size_t error_bytes)
{
    struct pc_hart_state hart;
    struct state_vcpu own;
    int rc = 0;

    if (machine->config.engine == PC_ENGINE_RV64) {
        memcpy(&hart, sections[HART].payload, sizeof hart);
        pc_rv64_set_state(vcpu, &hart);
    } else {
#if defined(__x86_64__)
        rc = load_kvm_vcpu(machine, vcpu, sections, error, error_bytes);
#else
        rc = pc_machine_error(error, error_bytes, -ENOTSUP, "no kvm on this architecture");
#endif
    }
    if (rc)
        return rc;
    memcpy(&own, sections[VCPU].payload, sizeof own);
    atomic_store(&vcpu->marks, own.marks);
    atomic_store(&vcpu->operations, own.operations);
    atomic_store(&vcpu->failures, own.failures);
    atomic_store(&vcpu->ready, own.ready != 0);
    vcpu->disk_status = own.disk_status;
    return 0;
}

int pc_state_load(struct pc_machine *machine, const void *buf, size_t bytes, char *error, size_t error_bytes)
{
    struct state_machine own;
    struct state_net net;
    struct reader *r = malloc(sizeof *r);
    int rc;

    if (!r)
        return pc_machine_error(error, error_bytes, -ENOMEM, "out of memory");
    rc = find_sections(machine, buf, bytes, r, error, error_bytes);
    /* The machine section first: with another number of vCPUs everything else looks damaged. */
    if (!rc && !r->machine[MACHINE].payload)
        rc = pc_machine_error(error, error_bytes, -EBADMSG, "section MACH is missing");
    if (!rc) {
        memcpy(&own, r->machine[MACHINE].payload, sizeof own);
        rc = check_same_machine(machine, &own, error, error_bytes);
    }
    if (!rc)
        rc = check_complete(machine, r, error, error_bytes);
    if (!rc && machine->config.has_net) {
        memcpy(&net, r->machine[NET].payload, sizeof net);
        rc = check_net(machine, &net, error, error_bytes);
    }
    for (uint32_t i = 0; !rc && i < machine->vcpu_count; i++)
        rc = check_vcpu(machine, r->vcpu[i], i, error, error_bytes);
    for (uint32_t i = 0; !rc && i < machine->vcpu_count; i++)
        rc = load_vcpu(machine, &machine->vcpu[i], r->vcpu[i], error, error_bytes);
    if (!rc) {
        atomic_store(&machine->disk_reads, own.disk_reads);
        atomic_store(&machine->disk_writes, own.disk_writes);
        atomic_store(&machine->disk_bytes, own.disk_transferred_bytes);
        atomic_store(&machine->disk_errors, own.disk_errors);
        atomic_store(&machine->serial_bytes, own.serial_bytes);
    }
    if (!rc && machine->config.has_net) {
        atomic_store(&machine->net_received, net.received);
        atomic_store(&machine->net_sent, net.sent);
        atomic_store(&machine->net_dropped, net.dropped);
        atomic_store(&machine->net_errors, net.errors);
        for (uint32_t i = 0; i < machine->vcpu_count; i++)
            machine->vcpu[i].net_status = net.status[i];
    }
    free(r);
    return rc;
}
