/* SPDX-License-Identifier: Apache-2.0
 *
 * Device state as a blob: all that the guest can see of the machine, except its memory.
 *
 *   header    magic[8]  u32 version  u32 CRC32C of all that follows the header  u64 bytes in all  u32 sections  u32 zero
 *   section   u32 tag (four letters)  u32 vCPU (or NO_VCPU)  u64 bytes, then the payload, zero padded to 8 bytes
 *
 * MACH and VCPU are in all machines, NETD in those with a network device, the others are the engine's. Little endian. The blob comes
 * over the network and is read in two passes. The first believes nothing and finds every section; only when all are there, once,
 * with a possible length, and this host can take them, does the second one set anything.
 *
 * What is absent on purpose: the guest's nonce (it lives in guest memory only, as proof that the memory moved) and exits,
 * which are this host's.
 */
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machine/machine.h"
#include "postcopy/core.h"

#define STATE_VERSION 1u
#define STATE_MAGIC   "PCKVMST"
#define NO_VCPU       0xffffffffu

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

#define FIELD(name) uint64_t name;
#define SAVE(name) .name = atomic_load(&machine->name),
#define LOAD(name) atomic_store(&machine->name, from->name);

struct state_machine {
    uint32_t vcpus, workload;
    uint64_t shared_bytes, private_bytes[PC_MACHINE_MAX_VCPUS];
    uint64_t working_set_bytes, seed, disk_size_bytes, disk_skew;
    PC_MACHINE_COUNTERS(FIELD)
};

struct state_vcpu {
    uint64_t reports, operations, failures;
    uint32_t ready, disk_status;
};

/* The network device. Its frames do not move: it is Ethernet, which may lose them. */
struct state_net {
    uint64_t mac;
    uint32_t address, zero;
    PC_NET_COUNTERS(FIELD)
    uint32_t status[PC_MACHINE_MAX_VCPUS];
};

enum { MACHINE, NET, VCPU, OWN_KINDS };
#define KINDS_MAX (OWN_KINDS + PC_ENGINE_SECTIONS_MAX)

static const struct pc_section_kind own_kinds[OWN_KINDS] = {
    [MACHINE] = {"MACH", false, false, sizeof(struct state_machine), sizeof(struct state_machine), 1},
    [NET] = {"NETD", false, false, sizeof(struct state_net), sizeof(struct state_net), 1},
    [VCPU] = {"VCPU", true, false, sizeof(struct state_vcpu), sizeof(struct state_vcpu), 1},
};

/* NULL after the last one. */
static const struct pc_section_kind *kind_number(const struct pc_machine *machine, uint32_t n)
{
    if (n < OWN_KINDS)
        return &own_kinds[n];
    return n - OWN_KINDS < machine->engine->section_count ? &machine->engine->section_kinds[n - OWN_KINDS] : NULL;
}

static bool is_used(const struct pc_machine *machine, uint32_t n)
{
    return n != NET || machine->config.has_net;
}

/* ---- save ---- */

struct pc_state_writer {
    uint8_t *data;
    size_t bytes, cap;
    uint32_t sections;
};

int pc_state_put(struct pc_state_writer *w, const struct pc_section_kind *kind, uint32_t vcpu, const void *payload, size_t bytes)
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
    memcpy(header.tag, kind->tag, sizeof header.tag);
    memcpy(w->data + w->bytes, &header, sizeof header);
    memcpy(w->data + w->bytes + sizeof header, payload, bytes);
    memset(w->data + w->bytes + sizeof header + bytes, 0, padded - bytes);
    w->bytes += sizeof header + padded;
    w->sections++;
    return 0;
}

static int save_vcpu(struct pc_state_writer *w, struct pc_vcpu *vcpu, char *error, size_t error_bytes)
{
    struct state_vcpu own = {
        .reports = atomic_load(&vcpu->reports),
        .operations = atomic_load(&vcpu->operations),
        .failures = atomic_load(&vcpu->failures),
        .ready = atomic_load(&vcpu->ready),
        .disk_status = vcpu->disk_status,
    };
    int rc = pc_state_put(w, &own_kinds[VCPU], vcpu->index, &own, sizeof own);

    return rc ? rc : vcpu->machine->engine->save_vcpu(vcpu, w, error, error_bytes);
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
        .disk_size_bytes = config->disk_fd < 0 ? 0 : config->disk_bytes,
        .disk_skew = machine->disk_skew,
        PC_MACHINE_COUNTERS(SAVE)
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
        PC_NET_COUNTERS(SAVE)
    };

    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        s.status[i] = machine->vcpu[i].net_status;
    return s;
}

int64_t pc_state_save(struct pc_machine *machine, void *buf, size_t cap, char *error, size_t error_bytes)
{
    struct state_header header = { .magic = STATE_MAGIC, .version = STATE_VERSION };
    struct state_machine own = describe(machine);
    struct pc_state_writer w = { .data = malloc(16384), .bytes = sizeof header, .cap = 16384 };
    int64_t result;
    int rc = w.data ? pc_state_put(&w, &own_kinds[MACHINE], NO_VCPU, &own, sizeof own) : -ENOMEM;

    (void)pc_fail(0, error, error_bytes, "%s", "");
    if (!rc && machine->config.has_net) {
        struct state_net net = describe_net(machine);
        rc = pc_state_put(&w, &own_kinds[NET], NO_VCPU, &net, sizeof net);
    }
    for (uint32_t i = 0; !rc && i < machine->vcpu_count; i++)
        rc = save_vcpu(&w, &machine->vcpu[i], error, error_bytes);
    if (rc) {
        free(w.data);
        if (error && error_bytes && !error[0])
            pc_fail(-rc, error, error_bytes, "device state cannot be saved: %s", strerrordesc_np(-rc));
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

struct reader {
    struct pc_section machine[OWN_KINDS];
    struct pc_section vcpu[PC_MACHINE_MAX_VCPUS][KINDS_MAX]; /* the engine's from OWN_KINDS on */
};

static int find_sections(const struct pc_machine *machine, const uint8_t *data, size_t bytes, struct reader *r, char *error,
                         size_t error_bytes)
{
    struct state_header header;
    size_t at = sizeof header;
    uint32_t sections = 0;

    memset(r, 0, sizeof *r);
    if (!data || bytes < sizeof header)
        return pc_fail(EBADMSG, error, error_bytes, "device state is cut short: %zu bytes", bytes);
    memcpy(&header, data, sizeof header);
    if (memcmp(header.magic, STATE_MAGIC, sizeof header.magic))
        return pc_fail(EBADMSG, error, error_bytes, "this is not the device state of a machine");
    if (header.version != STATE_VERSION)
        return pc_fail(EPROTO, error, error_bytes, "device state has version %u, this program reads version %u",
                       header.version, STATE_VERSION);
    if (header.bytes != bytes || header.zero)
        return pc_fail(EBADMSG, error, error_bytes, "device state is damaged: %zu bytes came, it says %llu", bytes,
                       (unsigned long long)header.bytes);
    if (pc_crc32c(0, data + sizeof header, bytes - sizeof header) != header.crc)
        return pc_fail(EBADMSG, error, error_bytes, "device state is damaged: its checksum does not match");
    while (at < bytes) {
        struct section_header section;
        struct pc_section *to;
        uint64_t padded;
        const struct pc_section_kind *kind = NULL;
        uint32_t n;

        if (bytes - at < sizeof section)
            return pc_fail(EBADMSG, error, error_bytes, "device state is cut short within a section header");
        memcpy(&section, data + at, sizeof section);
        at += sizeof section;
        if (section.bytes > bytes - at)
            return pc_fail(EBADMSG, error, error_bytes, "section %.4s is longer than the device state", section.tag);
        padded = (section.bytes + 7) & ~7ull;
        if (padded > bytes - at)
            return pc_fail(EBADMSG, error, error_bytes, "section %.4s is cut short", section.tag);
        for (n = 0; (kind = kind_number(machine, n)); n++)
            if (is_used(machine, n) && memcmp(section.tag, kind->tag, sizeof section.tag) == 0)
                break;
        if (!kind) {
            char tag[5] = { 0 };
            for (int i = 0; i < 4; i++)
                tag[i] = section.tag[i] >= ' ' && section.tag[i] <= '~' ? section.tag[i] : '?';
            return pc_fail(EPROTO, error, error_bytes, "device state has a section \"%s\" that this program does not know",
                           tag);
        }
        if (kind->per_vcpu ? section.vcpu >= PC_MACHINE_MAX_VCPUS : section.vcpu != NO_VCPU)
            return pc_fail(EBADMSG, error, error_bytes, "section %s is for vCPU %u, which cannot be", kind->tag,
                           section.vcpu);
        if (section.bytes < kind->min_bytes || section.bytes > kind->max_bytes ||
            section.bytes % kind->unit_bytes)
            return pc_fail(EBADMSG, error, error_bytes, "section %s has %llu bytes", kind->tag,
                           (unsigned long long)section.bytes);
        to = kind->per_vcpu ? &r->vcpu[section.vcpu][n] : &r->machine[n];
        if (to->payload)
            return pc_fail(EBADMSG, error, error_bytes, "section %s comes twice", kind->tag);
        *to = (struct pc_section){ data + at, section.bytes };
        at += padded;
        sections++;
    }
    if (sections != header.sections)
        return pc_fail(EBADMSG, error, error_bytes, "device state has %u sections, it says %u", sections, header.sections);
    return 0;
}

static int check_complete(const struct pc_machine *machine, const struct reader *r, char *error, size_t error_bytes)
{
    uint32_t vcpus = machine->config.vcpus;
    const struct pc_section_kind *kind;

    for (uint32_t n = 0; (kind = kind_number(machine, n)); n++) {
        for (uint32_t i = vcpus; i < PC_MACHINE_MAX_VCPUS; i++)
            if (r->vcpu[i][n].payload)
                return pc_fail(EBADMSG, error, error_bytes, "section %s is for vCPU %u of %u", kind->tag, i, vcpus);
        if (kind->optional || !is_used(machine, n))
            continue;
        if (!kind->per_vcpu && !r->machine[n].payload)
            return pc_fail(EBADMSG, error, error_bytes, "section %s is missing", kind->tag);
        for (uint32_t i = 0; kind->per_vcpu && i < vcpus; i++)
            if (!r->vcpu[i][n].payload)
                return pc_fail(EBADMSG, error, error_bytes, "section %s of vCPU %u is missing", kind->tag, i);
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
        { "disk bytes", there->disk_size_bytes, here.disk_size_bytes },
    };

    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        if (same[i].there != same[i].here)
            return pc_fail(EINVAL, error, error_bytes, "the machines differ in %s: %llu there, %llu here", same[i].what,
                           (unsigned long long)same[i].there, (unsigned long long)same[i].here);
    for (uint32_t i = 0; i < here.vcpus; i++)
        if (there->private_bytes[i] != here.private_bytes[i])
            return pc_fail(EINVAL, error, error_bytes, "the machines differ in memory of vCPU %u: %llu bytes there, %llu "
                           "here", i, (unsigned long long)there->private_bytes[i],
                           (unsigned long long)here.private_bytes[i]);
    if (there->disk_skew % machine->disk_memory_align)
        return pc_fail(ENOTSUP, error, error_bytes, "the disk here needs O_DIRECT buffers aligned to %llu bytes, the "
                       "guest's are not", (unsigned long long)machine->disk_memory_align);
    return 0;
}

static int check_net(const struct pc_machine *machine, const struct state_net *there, char *error, size_t error_bytes)
{
    const struct pc_machine_config *here = &machine->config;

    if (there->mac != here->net_mac || there->address != here->net_address)
        return pc_fail(EINVAL, error, error_bytes, "the machines differ in the addresses of their network devices: "
                       "0x%llx, 0x%x there, 0x%llx, 0x%x here", (unsigned long long)there->mac, there->address,
                       (unsigned long long)here->net_mac, here->net_address);
    for (uint32_t i = 0; i < PC_MACHINE_MAX_VCPUS; i++) {
        uint32_t status = there->status[i];
        bool possible = status <= PCG_NET_FRAME_MAX || status == PCG_NET_AGAIN || status == PCG_NET_BAD_REQUEST;
        if (!possible || (status && i >= here->vcpus) || there->zero)
            return pc_fail(EBADMSG, error, error_bytes, "section NETD is not a state a network device can be in");
    }
    return 0;
}

/* ---- load, second pass: set ---- */

static int load_vcpu(struct pc_vcpu *vcpu, const struct pc_section *sections, char *error, size_t error_bytes)
{
    struct state_vcpu own;
    int rc = vcpu->machine->engine->load_vcpu(vcpu, sections + OWN_KINDS, error, error_bytes);

    if (rc)
        return rc;
    memcpy(&own, sections[VCPU].payload, sizeof own);
    atomic_store(&vcpu->reports, own.reports);
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
        return pc_fail(ENOMEM, error, error_bytes, "out of memory");
    rc = find_sections(machine, buf, bytes, r, error, error_bytes);
    /* The machine section first: with another number of vCPUs everything else looks damaged. */
    if (!rc && !r->machine[MACHINE].payload)
        rc = pc_fail(EBADMSG, error, error_bytes, "section MACH is missing");
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
        rc = machine->engine->check_vcpu(&machine->vcpu[i], r->vcpu[i] + OWN_KINDS, error, error_bytes);
    for (uint32_t i = 0; !rc && i < machine->vcpu_count; i++)
        rc = load_vcpu(&machine->vcpu[i], r->vcpu[i], error, error_bytes);
    if (!rc) {
        const struct state_machine *from = &own;

        PC_MACHINE_COUNTERS(LOAD)
    }
    if (!rc && machine->config.has_net) {
        const struct state_net *from = &net;

        PC_NET_COUNTERS(LOAD)
        for (uint32_t i = 0; i < machine->vcpu_count; i++)
            machine->vcpu[i].net_status = net.status[i];
    }
    free(r);
    return rc;
}
