/* SPDX-License-Identifier: Apache-2.0
 *
 * The guest of a Firecracker or a QEMU, without an operating system: it works on its memory as pattern.h has it, and on a
 * virtio disk and balloon where there are any (not on PCI), and says what it finds on the serial port. Besides, on the
 * command line: write=0 (only looks), wait=1 (a pass begins with a byte on the serial port: r looks only, w writes too).
 */
#include "pattern.h"

#define GIB          ((uint64_t)1 << 30)
#define WORK_BEGIN   0x200000u
#define PVH_MAGIC    0x336ec578u
#define COM1         0x3f8
#define MAX_EXTENTS  4
#define MAX_GIB      64u

uint64_t directories[MAX_GIB][WORDS] __attribute__((aligned(PAGE_BYTES)));
static struct {
    uint64_t address, pages;
} extents[MAX_EXTENTS];

/* What the VMM says: Firecracker in Linux' boot_params, QEMU in the start info of PVH. */
static struct {
    const char *command_line;
    const uint8_t *entries; /* of e820: address, bytes, and 32 bits of type */
    unsigned count, entry_bytes;
} vmm;

/* ---- serial port */

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "d"(port) : "memory");
    return value;
}

static void say(const char *text)
{
    while (*text)
        out8(COM1, (uint8_t)*text++);
}

/* ---- memory */

/* The code at the entry has mapped the first GiB. Devices are above its memory and below 4 GiB: not cached. */
static void map_gib(uint64_t gib, uint64_t uncached_from)
{
    uint64_t cr3;
    __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
    uint64_t *pointers = (uint64_t *)(*(uint64_t *)(cr3 & ~(uint64_t)0xfff) & ~(uint64_t)0xfff);

    for (uint64_t i = 0; i < WORDS; i++) {
        uint64_t address = gib * GIB + (i << 21);
        directories[gib][i] = address | 0x83 | (address >= uncached_from && gib == 3 ? 0x18 : 0);
    }
    pointers[gib] = (uint64_t)directories[gib] | 3;
    __asm__ volatile("mov %0, %%cr3" ::"r"(cr3) : "memory");
}

static void look_at(const uint8_t *boot)
{
    if (*(const uint32_t *)boot == PVH_MAGIC) {
        vmm.command_line = *(const char *const *)(boot + 24);
        vmm.entries = *(const uint8_t *const *)(boot + 40);
        vmm.count = *(const uint32_t *)(boot + 48);
        vmm.entry_bytes = 24;
    } else {
        vmm.command_line = (const char *)(uintptr_t)*(const uint32_t *)(boot + 0x228);
        vmm.entries = boot + 0x2d0;
        vmm.count = boot[0x1e8];
        vmm.entry_bytes = 20;
    }
}

/* All memory from WORK_BEGIN on, with what is above the hole below 4 GiB. */
static uint64_t find_memory(void)
{
    uint64_t total = 0, below = 0, used = 0;

    for (unsigned i = 0; i < vmm.count; i++) {
        const uint8_t *entry = vmm.entries + (size_t)vmm.entry_bytes * i;
        uint64_t address = *(const uint64_t *)entry, end = address + *(const uint64_t *)(entry + 8);
        if (*(const uint32_t *)(entry + 16) != 1 || end <= WORK_BEGIN || used == MAX_EXTENTS)
            continue;
        if (address < WORK_BEGIN)
            address = WORK_BEGIN;
        if (end > MAX_GIB * GIB)
            end = MAX_GIB * GIB;
        if (address >= end)
            continue;
        extents[used].address = address;
        extents[used++].pages = (end - address) / PAGE_BYTES;
        total += (end - address) / PAGE_BYTES;
        if (address < 4 * GIB)
            below = end;
        for (uint64_t gib = address / GIB; gib * GIB < end; gib++)
            if (gib != 0 && gib != 3)
                map_gib(gib, 0);
    }
    map_gib(3, below);
    return total;
}

static volatile uint64_t *page_at(uint64_t page)
{
    unsigned i = 0;

    page *= step;
    while (page >= extents[i].pages)
        page -= extents[i++].pages;
    return (volatile uint64_t *)(extents[i].address + page * PAGE_BYTES);
}

/* ---- virtio-mmio, by drivers that poll */

#define QUEUE_SIZE 32u
#define QUEUES     2u

struct queue {
    struct {
        uint64_t address;
        uint32_t bytes;
        uint16_t flags, next;
    } descriptors[QUEUE_SIZE];
    uint16_t flags, available, ring[QUEUE_SIZE];
    volatile uint16_t used_flags __attribute__((aligned(4))), used;
    struct {
        uint32_t id, bytes;
    } used_ring[QUEUE_SIZE];
} __attribute__((aligned(64)));

struct device {
    uint64_t address; /* 0: there is none */
    struct queue queues[QUEUES];
};

static struct device balloon, disk;

static inline uint32_t get(const struct device *d, unsigned offset)
{
    uint32_t value;
    __asm__ volatile("movl (%1), %0" : "=r"(value) : "r"(d->address + offset) : "memory");
    return value;
}

static inline void put(const struct device *d, unsigned offset, uint32_t value)
{
    __asm__ volatile("movl %0, (%1)" ::"r"(value), "r"(d->address + offset) : "memory");
}

static void find_device(struct device *d, uint32_t id, unsigned queues)
{
    /* From where each version of Firecracker has begun, and QEMU's microvm. */
    static const struct {
        uint64_t begin;
        unsigned bytes, count;
    } places[] = { { 0xd0000000, 4096, 8 }, { 0xc0001000, 4096, 8 }, { 0xfeb00000, 512, 24 } };

    for (unsigned place = 0; place < 3; place++)
        for (unsigned i = 0; i < places[place].count; i++) {
            d->address = places[place].begin + (uint64_t)i * places[place].bytes;
            if (d->address >= extents[0].address && d->address < extents[0].address + extents[0].pages * PAGE_BYTES)
                continue; /* memory */
            if (get(d, 0) == 0x74726976 && get(d, 4) == 2 && get(d, 8) == id)
                goto found;
        }
    d->address = 0;
    return;
found:
    put(d, 0x70, 0);
    put(d, 0x70, 1);
    put(d, 0x70, 3);
    put(d, 0x24, 0);
    put(d, 0x20, 0);
    put(d, 0x24, 1);
    put(d, 0x20, 1); /* VERSION_1, nothing else */
    put(d, 0x70, 11);
    for (unsigned i = 0; i < queues; i++) {
        struct queue *q = &d->queues[i];
        q->flags = 1; /* no interrupts */
        put(d, 0x30, i);
        put(d, 0x38, QUEUE_SIZE);
        put(d, 0x80, (uint32_t)(uint64_t)q->descriptors);
        put(d, 0x84, 0);
        put(d, 0x90, (uint32_t)(uint64_t)&q->flags);
        put(d, 0x94, 0);
        put(d, 0xa0, (uint32_t)(uint64_t)&q->used_flags);
        put(d, 0xa4, 0);
        put(d, 0x44, 1);
    }
    put(d, 0x70, 15);
}

/* The device is given this many chains of so many descriptors each, from the first one on; returns when all are done. */
static void hand_over(struct device *d, unsigned which, unsigned chains, unsigned length)
{
    struct queue *q = &d->queues[which];

    for (unsigned i = 0; i < chains; i++)
        q->ring[(uint16_t)(q->available + i) % QUEUE_SIZE] = (uint16_t)(i * length);
    release_barrier();
    q->available = (uint16_t)(q->available + chains);
    release_barrier();
    put(d, 0x50, which);
    while (q->used != q->available)
        relax();
}

/* ---- balloon: it takes pages from the end of those that are worked on */

#define BATCH 256u

static uint32_t frames[BATCH];

static void follow_balloon(void)
{
    if (!balloon.address)
        return;
    uint64_t wanted = get(&balloon, 0x100);
    if (wanted > pages - 1)
        wanted = pages - 1;
    if (wanted == ballooned)
        return;
    while (ballooned != wanted) {
        unsigned inflate = wanted > ballooned, count = 0;
        uint64_t first = pages - ballooned;
        while (ballooned != wanted && count < BATCH) {
            uint64_t page = inflate ? pages - ++ballooned : pages - ballooned--;
            frames[count++] = (uint32_t)((uint64_t)page_at(page) / PAGE_BYTES);
        }
        unsigned which = inflate ? 0 : 1;
        balloon.queues[which].descriptors[0].address = (uint64_t)frames;
        balloon.queues[which].descriptors[0].bytes = count * 4;
        hand_over(&balloon, which, 1, 1);
        for (uint64_t page = first; !inflate && page < first + count; page++) {
            volatile uint64_t *words = page_at(page);
            for (unsigned i = 0; i < WORDS; i += WORDS / 2 - 1)
                if (words[i]) {
                    wrong("stale", page, i, 0, words[i]);
                    stale++;
                    break;
                }
            fill(page);
        }
    }
    put(&balloon, 0x104, (uint32_t)ballooned);
}

/* ---- disk */

static struct {
    uint32_t type, reserved;
    uint64_t sector;
} headers[REQUESTS];
static volatile uint8_t states[REQUESTS];

static void transfer(struct request *requests, unsigned count)
{
    static const uint32_t bytes[] = { sizeof headers[0], PAGE_BYTES, 1 };
    struct queue *q = &disk.queues[0];

    for (unsigned i = 0; i < count; i++) {
        const volatile void *where[] = { &headers[i], page_at(requests[i].page), &states[i] };
        headers[i].type = !requests[i].load;
        headers[i].sector = requests[i].page * (PAGE_BYTES / 512);
        states[i] = 0xff;
        for (unsigned part = 0; part < 3; part++) {
            unsigned at = 3 * i + part, to_memory = part == 2 || (part == 1 && requests[i].load);
            q->descriptors[at].address = (uint64_t)where[part];
            q->descriptors[at].bytes = bytes[part];
            q->descriptors[at].flags = (uint16_t)((part < 2) | to_memory << 1);
            q->descriptors[at].next = (uint16_t)(at + 1);
        }
    }
    hand_over(&disk, 0, count, 3);
    for (unsigned i = 0; i < count; i++)
        requests[i].failed = states[i];
}

void guest_main(const uint8_t *boot) __attribute__((noreturn));

void guest_main(const uint8_t *boot)
{
    look_at(boot);
    uint64_t total = find_memory();
    uint64_t table_pages = (total * 4 + PAGE_BYTES - 1) / PAGE_BYTES;
    int waits = option(vmm.command_line, "wait=", 0) != 0, writes = option(vmm.command_line, "write=", 1) != 0;

    /* The tables are below the pages; page_at() goes on where they end. */
    written = (uint32_t *)(uintptr_t)extents[0].address;
    kept = (uint32_t *)(uintptr_t)(extents[0].address + table_pages * PAGE_BYTES);
    extents[0].address += 2 * table_pages * PAGE_BYTES;
    extents[0].pages -= 2 * table_pages;
    find_device(&balloon, 5, 2);
    find_device(&disk, 2, 1);
    begin(vmm.command_line, total - 2 * table_pages,
        disk.address ? (get(&disk, 0x100) | (uint64_t)get(&disk, 0x104) << 32) * 512 : 0);
    for (;;) {
        uint8_t order = 0;
        do {
            if (waits && in8(COM1 + 5) & 1)
                order = in8(COM1);
            follow_balloon(); /* last: what was wanted before the order came is done when the pass begins */
        } while (waits && order != 'r' && order != 'w');
        pass(waits ? order == 'w' : writes);
    }
}
