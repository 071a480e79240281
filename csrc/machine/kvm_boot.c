/* SPDX-License-Identifier: Apache-2.0
 *
 * The kvm engine: guest programs, descriptor and page tables.
 */
#include "machine/kvm.h"

#if defined(__x86_64__)

#include <errno.h>

/* Accessed and dirty are set from the start: a processor that set them itself would change the page tables (and dirty
 * their pages) as the guest runs. */
#define PTE_TABLE 0x23ull /* present, writable, accessed */
#define PTE_LARGE 0xe3ull /* present, writable, accessed, dirty, 2 MiB */

#define IMAGE(NAME, name)                                                 \
    extern const uint8_t pc_guest_##name[] __attribute__((visibility("hidden"))); \
    extern const uint8_t pc_guest_##name##_end[] __attribute__((visibility("hidden")));
PC_PROGRAMS(IMAGE)

#define ROW(NAME, name) [PC_WORKLOAD_##NAME] = {pc_guest_##name, pc_guest_##name##_end},
const struct pc_image pc_kvm_images[] = {PC_WORKLOADS(ROW)};

/* Maps [gva, gva + bytes) to gpa with large pages; gva begins where a top-level entry does. */
static uint64_t map(uint8_t *ram, uint64_t next_table, uint64_t gva, uint64_t gpa, uint64_t bytes, bool has_hole)
{
    uint64_t *top = (uint64_t *)(ram + PCG_PAGE_TABLES), *middle = NULL, *low = NULL;

    for (uint64_t at = 0; at < bytes; at += PC_LARGE_PAGE_BYTES) {
        uint64_t target = gpa + at;
        if (has_hole && target >= PCG_HOLE_BEGIN)
            target += PCG_HOLE_END - PCG_HOLE_BEGIN;
        if (at % (PC_TABLE_ENTRIES * PC_GIB) == 0) {
            top[(gva + at) / (PC_TABLE_ENTRIES * PC_GIB)] = next_table | PTE_TABLE;
            middle = (uint64_t *)(ram + next_table);
            next_table += PCG_PAGE_BYTES;
        }
        if (at % PC_GIB == 0) {
            middle[at / PC_GIB % PC_TABLE_ENTRIES] = next_table | PTE_TABLE;
            low = (uint64_t *)(ram + next_table);
            next_table += PCG_PAGE_BYTES;
        }
        low[at / PC_LARGE_PAGE_BYTES % PC_TABLE_ENTRIES] = target | PTE_LARGE;
    }
    return next_table;
}

int pc_kvm_write_tables(const struct pc_machine *machine, uint8_t *ram)
{
    const struct pc_machine_config *config = &machine->config;
    const struct pc_layout *layout = &machine->layout;
    uint64_t *gdt = (uint64_t *)(ram + PCG_GDT), *idt = (uint64_t *)(ram + PCG_IDT), next_table;

    gdt[PCG_CODE_SELECTOR / 8] = 0x00af9b000000ffffull; /* 64-bit code, accessed */
    gdt[PCG_DATA_SELECTOR / 8] = 0x00cf93000000ffffull; /* data, accessed */
    for (uint64_t vector = 0; vector < 32; vector++) {
        uint64_t stub = PCG_EXCEPTION_STUBS + 16 * vector;
        /* 64-bit interrupt gate, present. The stubs are below 4 GiB, so the upper half stays zero. */
        idt[2 * vector] = (stub & 0xffff) | (uint64_t)PCG_CODE_SELECTOR << 16 | 0x8e0000000000ull | (stub >> 16) << 48;
    }

    next_table = map(ram, PCG_PAGE_TABLES + PCG_PAGE_BYTES, 0, 0, config->shared.size_bytes, true);
    for (uint32_t i = 0; i < config->vcpus; i++)
        next_table = map(ram, next_table, PCG_PRIVATE_GVA + i * PCG_PRIVATE_STRIDE, layout->private_gpa[i],
                         config->private_[i].size_bytes, false);
    return next_table == layout->boot_bytes ? 0 : -EOVERFLOW; /* tables_for() and map() disagree */
}

#endif
