/* SPDX-License-Identifier: Apache-2.0
 *
 * Where things are in guest memory.
 *
 * guest-virtual                       guest-physical
 * 0            shared block           0 .. 3 GiB, then from 4 GiB on
 *   0x1000       boot info, GDT, IDT, vCPU pages, stacks, image, page tables: the boot area (guest/abi.h)
 *   boot_bytes   working set, then memory that is not used
 * 1 << 46      private block of vCPU 0, the next ones 1 TiB apart
 *                                     each from the next multiple of 2 MiB
 *
 * On rv64 the two are the same, and there are no descriptor and page tables: the boot area ends where they would begin.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "machine/machine.h"

#define MEMORY_MAX_BYTES (512 * PC_GIB)

uint32_t pc_pattern_of(uint32_t workload)
{
    return workload < PC_WORKLOAD_SEQUENTIAL ? PCG_RANDOM : PCG_SEQUENTIAL + (workload - PC_WORKLOAD_SEQUENTIAL);
}

static uint64_t divide_up(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

/* Tables below the top one that map `bytes` from a 512 GiB boundary on. */
static uint64_t tables_for(uint64_t bytes)
{
    return bytes ? divide_up(bytes, PC_GIB) + divide_up(bytes, PC_TABLE_ENTRIES * PC_GIB) : 0;
}

static int check_block(const struct pc_memory *memory, const char *name, char *error, size_t error_bytes)
{
    uint64_t system_page = (uint64_t)sysconf(_SC_PAGESIZE);

    if (memory->size_bytes == 0)
        return 0;
    if (!memory->base)
        return pc_fail(EINVAL, error, error_bytes, "RAM block \"%s\" is not mapped", name);
    if ((uintptr_t)memory->base % system_page || memory->size_bytes % system_page ||
        memory->size_bytes % PCG_PAGE_BYTES)
        return pc_fail(EINVAL, error, error_bytes, "RAM block \"%s\": address and size must be whole pages", name);
    if (memory->size_bytes > MEMORY_MAX_BYTES)
        return pc_fail(EINVAL, error, error_bytes, "RAM block \"%s\" is larger than 512 GiB", name);
    return 0;
}

static void add_slot(struct pc_layout *layout, uint64_t gpa, void *host, uint64_t bytes)
{
    layout->slots[layout->slot_count++] = (struct pc_slot){ .gpa = gpa, .bytes = bytes, .host = host };
    layout->guest_end = gpa + bytes;
}

int pc_layout_make(const struct pc_machine_config *config, struct pc_layout *layout, char *error, size_t error_bytes)
{
    bool is_rv64 = config->engine == PC_ENGINE_RV64; /* no page tables: guest-physical is what the program uses */
    uint64_t tables = 1, free_pages, want_pages, total_bytes, gpa;
    uint64_t shared_bytes = config->shared.size_bytes;
    int rc = check_block(&config->shared, "shared", error, error_bytes);

    memset(layout, 0, sizeof *layout);
    if (rc)
        return rc;
    if (config->vcpus < 1 || config->vcpus > PC_MACHINE_MAX_VCPUS)
        return pc_fail(EINVAL, error, error_bytes, "%u vCPUs: 1 to %d are possible", config->vcpus, PC_MACHINE_MAX_VCPUS);
    total_bytes = shared_bytes;
    tables += tables_for(shared_bytes);
    for (uint32_t i = 0; i < config->vcpus; i++) {
        char name[16];
        snprintf(name, sizeof name, "vcpu%u", i);
        rc = check_block(&config->private_[i], name, error, error_bytes);
        if (rc)
            return rc;
        total_bytes += config->private_[i].size_bytes;
        tables += tables_for(config->private_[i].size_bytes);
    }
    if (total_bytes > MEMORY_MAX_BYTES)
        return pc_fail(EINVAL, error, error_bytes, "more than 512 GiB of memory");
    layout->boot_bytes = PCG_PAGE_TABLES + (is_rv64 ? 0 : tables * PCG_PAGE_BYTES);
    if (shared_bytes < layout->boot_bytes + 16 * PCG_PAGE_BYTES)
        return pc_fail(EINVAL, error, error_bytes, "RAM block \"shared\" is too small: %llu bytes, need %llu",
                       (unsigned long long)shared_bytes, (unsigned long long)layout->boot_bytes + 16 * PCG_PAGE_BYTES);

    if (is_rv64) {
        add_slot(layout, 0, config->shared.base, shared_bytes);
        gpa = 0;
    } else if (shared_bytes <= PCG_HOLE_BEGIN) {
        add_slot(layout, 0, config->shared.base, shared_bytes);
        gpa = PCG_HOLE_END;
    } else {
        add_slot(layout, 0, config->shared.base, PCG_HOLE_BEGIN);
        add_slot(layout, PCG_HOLE_END, (uint8_t *)config->shared.base + PCG_HOLE_BEGIN, shared_bytes - PCG_HOLE_BEGIN);
        gpa = layout->guest_end;
    }
    for (uint32_t i = 0; i < config->vcpus; i++) {
        gpa = is_rv64 ? PCG_PRIVATE_GVA + i * PCG_PRIVATE_STRIDE : divide_up(gpa, PC_LARGE_PAGE_BYTES) * PC_LARGE_PAGE_BYTES;
        layout->private_gpa[i] = gpa;
        if (config->private_[i].size_bytes) {
            add_slot(layout, gpa, config->private_[i].base, config->private_[i].size_bytes);
            gpa = layout->guest_end;
        }
    }

    /* Every block gives the same share of itself, so that each keeps memory that is never touched. */
    free_pages = (total_bytes - layout->boot_bytes) / PCG_PAGE_BYTES;
    want_pages = config->working_set_bytes / PCG_PAGE_BYTES;
    if (config->working_set_bytes == 0 || want_pages > free_pages)
        want_pages = free_pages;
    layout->shared.gva = layout->boot_bytes;
    layout->shared.pages = (shared_bytes - layout->boot_bytes) / PCG_PAGE_BYTES * want_pages / free_pages;
    for (uint32_t i = 0; i < config->vcpus; i++) {
        layout->private_[i].gva = PCG_PRIVATE_GVA + i * PCG_PRIVATE_STRIDE;
        layout->private_[i].pages = config->private_[i].size_bytes / PCG_PAGE_BYTES * want_pages / free_pages;
    }
    for (uint32_t i = 0; i < config->vcpus; i++) {
        uint64_t own = layout->private_[i].pages + layout->shared.pages / config->vcpus;
        uint64_t need = config->workload == PC_WORKLOAD_DISK ? 64 : 1;
        if (config->workload != PC_WORKLOAD_IDLE && own < need)
            return pc_fail(EINVAL, error, error_bytes, "working set too small: %llu pages for vCPU %u, need %llu",
                           (unsigned long long)own, i, (unsigned long long)need);
    }
    /* pcg_rng_below() picks from fewer than 2^32 pages; 512 GiB has 2^27. */
    layout->disk_slice_bytes = config->disk_bytes / config->vcpus / PCG_SLOT_BYTES * PCG_SLOT_BYTES;
    return 0;
}

int pc_machine_split_memory(uint64_t total_bytes, uint32_t vcpus, uint64_t page_bytes, uint64_t *shared_bytes,
                            uint64_t *private_bytes, char *error, size_t error_bytes)
{
    uint64_t unit = page_bytes, share;

    if (vcpus < 1 || vcpus > PC_MACHINE_MAX_VCPUS)
        return pc_fail(EINVAL, error, error_bytes, "%u vCPUs: 1 to %d are possible", vcpus, PC_MACHINE_MAX_VCPUS);
    if (page_bytes < PCG_PAGE_BYTES || (page_bytes & (page_bytes - 1)) || total_bytes % page_bytes)
        return pc_fail(EINVAL, error, error_bytes, "memory size must be a multiple of %llu bytes",
                       (unsigned long long)(page_bytes ? page_bytes : PCG_PAGE_BYTES));
    if (total_bytes < 16 << 20)
        return pc_fail(EINVAL, error, error_bytes, "the machine needs at least 16 MiB of memory");
    if (total_bytes > MEMORY_MAX_BYTES)
        return pc_fail(EINVAL, error, error_bytes, "the machine can have at most 512 GiB of memory");
    /* Whole large pages for each, where that leaves everybody something. */
    if (unit < PC_LARGE_PAGE_BYTES && total_bytes / 2 / vcpus >= 2 * PC_LARGE_PAGE_BYTES)
        unit = PC_LARGE_PAGE_BYTES;
    share = total_bytes / 2 / vcpus / unit * unit;
    if (share == 0)
        return pc_fail(EINVAL, error, error_bytes, "%llu bytes are too few for %u vCPUs in pages of %llu",
                       (unsigned long long)total_bytes, vcpus, (unsigned long long)page_bytes);
    *private_bytes = share;
    *shared_bytes = total_bytes - share * vcpus;
    return 0;
}

void *pc_layout_gpa(const struct pc_layout *layout, uint64_t gpa, uint64_t bytes)
{
    for (uint32_t i = 0; i < layout->slot_count; i++) {
        const struct pc_slot *slot = &layout->slots[i];
        /* Subtractions only: gpa + bytes may wrap, the guest chooses both. */
        if (gpa >= slot->gpa && gpa - slot->gpa < slot->bytes && bytes <= slot->bytes - (gpa - slot->gpa))
            return slot->host + (gpa - slot->gpa);
    }
    return NULL;
}

void *pc_layout_gva(const struct pc_machine_config *config, uint64_t gva, uint64_t bytes)
{
    const struct pc_memory *memory = &config->shared;
    uint64_t offset = gva;

    if (gva >= PCG_PRIVATE_GVA) {
        uint64_t index = (gva - PCG_PRIVATE_GVA) / PCG_PRIVATE_STRIDE;
        if (index >= config->vcpus)
            return NULL;
        memory = &config->private_[index];
        offset = (gva - PCG_PRIVATE_GVA) % PCG_PRIVATE_STRIDE;
    }
    if (offset >= memory->size_bytes || bytes > memory->size_bytes - offset)
        return NULL;
    return (uint8_t *)memory->base + offset;
}
