/* SPDX-License-Identifier: Apache-2.0
 *
 * disk: memory (cut into slots) and this vCPU's slice of the disk (cut into chunks) exchange patterns. A table in
 * guest memory says which pattern every slot and chunk holds. Three things happen, picked at random:
 *
 *   fill   the CPU writes a new pattern into a slot
 *   write  slots go to chunks: the machine reads guest memory that the CPU has not touched for long
 *   read   chunks come to slots: the machine writes guest memory that the CPU has not touched for long,
 *          and only then does the CPU look, at every word
 *
 * On the destination of a migration the last two meet missing pages inside the host kernel's O_DIRECT path. Slots
 * do not begin at page boundaries where the host's block layer allows it, so requests cross pages.
 */
#include "guest.h"

static volatile uint64_t *slot_tags(const struct pcg_vcpu *v)
{
    return (volatile uint64_t *)v->slot_tags_gva;
}

static volatile uint64_t *chunk_tags(const struct pcg_vcpu *v)
{
    return (volatile uint64_t *)v->chunk_tags_gva;
}

static uint64_t slot_gva(const struct pcg_vcpu *v, uint64_t slot)
{
    if (slot < v->range_slots[0])
        return v->slot_gva[0] + slot * PCG_SLOT_BYTES;
    return v->slot_gva[1] + (slot - v->range_slots[0]) * PCG_SLOT_BYTES;
}

static uint64_t to_gpa(const struct pcg_vcpu *v, uint64_t gva)
{
    if (gva >= PCG_PRIVATE_GVA)
        return gva - (PCG_PRIVATE_GVA + v->id * PCG_PRIVATE_STRIDE) + boot->private_gpa[v->id];
    return !HAS_HOLE || gva < PCG_HOLE_BEGIN ? gva : gva + (PCG_HOLE_END - PCG_HOLE_BEGIN);
}

/* How many slots from this one on, at most `count`, are one piece of guest-physical memory. */
static uint64_t contiguous(const struct pcg_vcpu *v, uint64_t slot, uint64_t count)
{
    uint64_t end = slot < v->range_slots[0] ? v->range_slots[0] : v->slots;
    uint64_t gva = slot_gva(v, slot);

    if (count > end - slot)
        count = end - slot;
    if (gva < PCG_HOLE_BEGIN && gva + count * PCG_SLOT_BYTES > PCG_HOLE_BEGIN)
        count = (PCG_HOLE_BEGIN - gva) / PCG_SLOT_BYTES; /* 0: this slot itself lies across the hole */
    return count;
}

static void fill(struct pcg_vcpu *v, uint64_t slot)
{
    volatile uint64_t *word = (volatile uint64_t *)slot_gva(v, slot);
    uint64_t value = pcg_tag_first(boot->seed, v->id, v->next_tag);

    v->flight_slot = slot;
    v->flight_count = 1;
    v->flight_tag = v->next_tag;
    v->flight = PCG_FLIGHT_FILL;
    for (uint64_t i = 0; i < PCG_SLOT_WORDS; i++, value += PCG_TAG_STEP)
        word[i] = value;
    slot_tags(v)[slot] = v->next_tag++;
    v->flight = PCG_FLIGHT_NONE;
}

static void check(struct pcg_vcpu *v, uint64_t slot)
{
    const volatile uint64_t *word = (const volatile uint64_t *)slot_gva(v, slot);
    uint64_t value = pcg_tag_first(boot->seed, v->id, slot_tags(v)[slot]);

    for (uint64_t i = 0; i < PCG_SLOT_WORDS; i++, value += PCG_TAG_STEP)
        if (word[i] != value) {
            report_failure(v, PCG_FAIL_DISK_DATA, (uint64_t)&word[i], value, word[i]);
            fill(v, slot); /* so that one bad page is one report */
            return;
        }
}

static void transfer(struct pcg_vcpu *v, uint32_t op, uint64_t slot, uint64_t chunk, uint64_t count)
{
    volatile uint64_t *slot_tag = slot_tags(v) + slot, *chunk_tag = chunk_tags(v) + chunk;
    uint32_t status;

    v->flight_slot = slot;
    v->flight_chunk = chunk;
    v->flight_count = count;
    v->flight = op == PCG_DISK_READ ? PCG_FLIGHT_READ : PCG_FLIGHT_WRITE;
    out32(PCG_PORT_DISK, op, chunk * PCG_SLOT_BYTES, to_gpa(v, slot_gva(v, slot)), count * PCG_SLOT_BYTES, 0);
    status = in32(PCG_PORT_DISK_STATUS);
    if (status == PCG_DISK_OK) {
        for (uint64_t i = 0; i < count; i++) {
            if (op == PCG_DISK_READ)
                slot_tag[i] = chunk_tag[i];
            else
                chunk_tag[i] = slot_tag[i];
        }
    } else {
        report_failure(v, PCG_FAIL_DISK_STATUS, slot_gva(v, slot), PCG_DISK_OK, status);
    }
    v->flight = PCG_FLIGHT_NONE;
}

/* Cuts the two ranges into slots; the tables go to the front of the larger one. */
static void lay_out(struct pcg_vcpu *v)
{
    uint64_t begin = pcg_slice_begin(boot->shared.pages, v->id, boot->vcpus);
    uint64_t end = pcg_slice_begin(boot->shared.pages, v->id + 1, boot->vcpus);
    uint64_t gva[2] = { boot->private_[v->id].gva, boot->shared.gva + begin * PCG_PAGE_BYTES };
    uint64_t pages[2] = { boot->private_[v->id].pages, end - begin };
    uint64_t home = pages[0] >= pages[1] ? 0 : 1, table_pages;

    v->chunks = boot->disk_slice_bytes / PCG_SLOT_BYTES;
    if (v->chunks > PCG_CHUNKS_MAX)
        v->chunks = PCG_CHUNKS_MAX;
    /* Two pages a slot: at most half a tag word for each page. */
    table_pages = ((pages[0] + pages[1]) / 2 + v->chunks) / (PCG_PAGE_BYTES / 8) + 1;
    v->chunk_tags_gva = gva[home];
    v->slot_tags_gva = gva[home] + v->chunks * 8;
    gva[home] += table_pages * PCG_PAGE_BYTES;
    pages[home] -= table_pages;
    for (int i = 0; i < 2; i++) {
        uint64_t skew_pages = boot->disk_buffer_skew ? 1 : 0;
        v->slot_gva[i] = gva[i] + boot->disk_buffer_skew;
        v->range_slots[i] = pages[i] > skew_pages ? (pages[i] - skew_pages) / 2 : 0;
    }
    v->slots = v->range_slots[0] + v->range_slots[1];
    release_barrier(); /* whoever looks from outside, at any instruction, takes this one for "all of the above is there" */
    v->next_tag = 1;
}

static uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

void workload(struct pcg_vcpu *v)
{
    uint64_t x = pcg_rng_seed(boot->seed, v->id), filled, count;
    uint64_t most = PCG_DISK_REQUEST_MAX / PCG_SLOT_BYTES;

    lay_out(v);
    /* The CPU makes a few patterns; the disk then carries them to all slots and chunks, which is faster. */
    filled = smaller(PCG_FILL_SLOTS, smaller(v->range_slots[v->range_slots[0] ? 0 : 1], v->chunks));
    filled = contiguous(v, 0, filled);
    for (uint64_t slot = 0; slot < filled; slot++)
        fill(v, slot);
    for (uint64_t chunk = 0; chunk < v->chunks; chunk += count) {
        count = smaller(smaller(filled, most), v->chunks - chunk);
        transfer(v, PCG_DISK_WRITE, 0, chunk, count);
    }
    for (uint64_t slot = filled; slot < v->slots; slot += count ? count : 1) {
        count = contiguous(v, slot, smaller(most, v->chunks));
        if (count)
            transfer(v, PCG_DISK_READ, slot, pcg_rng_below(x = pcg_rng_next(x), v->chunks - count + 1), count);
    }
    v->rng = x;
    wait_for_all(v);
    report_ready(v);
    for (;;) {
        uint64_t slot, chunk;

        x = pcg_rng_next(x);
        slot = pcg_rng_below(x, v->slots);
        x = pcg_rng_next(x);
        count = contiguous(v, slot, smaller(1 + (x & 3), v->chunks));
        x = pcg_rng_next(x);
        chunk = pcg_rng_below(x, v->chunks - count + 1);
        v->rng = x;
        if (count == 0)
            continue;
        switch (x & 3) {
        case 0:
            fill(v, slot);
            break;
        case 1:
            transfer(v, PCG_DISK_WRITE, slot, chunk, count);
            break;
        default:
            transfer(v, PCG_DISK_READ, slot, chunk, count);
            for (uint64_t i = 0; i < count; i++)
                check(v, slot + i);
            break;
        }
        v->operations++;
        if ((v->operations & 15) == 0)
            report_progress(v);
    }
}
