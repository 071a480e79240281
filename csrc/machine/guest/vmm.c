/* SPDX-License-Identifier: Apache-2.0
 *
 * The guest of a Firecracker or a QEMU: it fills its memory, then goes through it in passes without end, and says a line on the
 * serial port after each. Every page of `pages` holds words that only this page has, and a count of the times that it was
 * written; a table elsewhere in memory has the same count. So a page that comes late, twice, from the past or from
 * another place shows, and so does one that holds old content after the balloon has had it.
 *
 *   guest: ready pages=8192 ballooned=0 ...        memory is filled
 *   guest: pass=1 errors=0 stale=0 touched=8192 ballooned=0 saved=0 loaded=0 tsc=... ticks=... p50=... p99=... max=...
 *   guest: wrong page=17 word=0 expected=... found=...           the first of them only
 *
 * errors: words that were not as they must be, and requests that the disk has refused; stale: pages that came back from the
 * balloon with anything but zeros; saved and loaded: pages that went to the disk and came from it, see there.
 * ticks, p50, p99 and max are of what the first access to a page took in this pass, by the time stamp counter `tsc`.
 *
 * On the kernel's command line: pages=N (to work on; all by default), spread=1 (these are spread over all memory),
 * touches=N (pages a pass; all), stride=N (1: in order of address; else scattered, each once), write=0 (only looks),
 * disk=N (requests a pass, where there is a disk; 64), wait=1 (a pass begins with a byte on the serial port: r looks only,
 * w writes too).
 *
 * One instruction takes about a microsecond where KVM is emulated: three words of each page are enough.
 */
#include <stddef.h>
#include <stdint.h>

#include "arch_x86.h"

#define PAGE_BYTES   4096u
#define WORDS        (PAGE_BYTES / 8)
#define GIB          ((uint64_t)1 << 30)
#define WORK_BEGIN   0x200000u
#define PVH_MAGIC    0x336ec578u
#define COM1         0x3f8
#define MAX_EXTENTS  4
#define MAX_GIB      64u
#define MAX_SHOWN    8u

uint64_t directories[MAX_GIB][WORDS] __attribute__((aligned(PAGE_BYTES)));
static struct {
    uint64_t address, pages;
} extents[MAX_EXTENTS];
static uint32_t *written; /* for each page how often it was written */
static uint64_t pages, step = 1, ballooned, errors, stale, touched;

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

static void say_value(const char *name, uint64_t value)
{
    char digits[24], *p = digits + sizeof digits - 1;

    *p = 0;
    do {
        *--p = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    say(name);
    say(p);
}

/* ---- command line */

static uint64_t option(const char *name, uint64_t otherwise)
{
    for (const char *p = vmm.command_line; *p; p++) {
        const char *a = p, *b = name;
        if (p != vmm.command_line && p[-1] != ' ')
            continue;
        while (*b && *a == *b)
            a++, b++;
        if (*b)
            continue;
        uint64_t value = 0;
        while (*a >= '0' && *a <= '9')
            value = value * 10 + (uint64_t)(*a++ - '0');
        return value;
    }
    return otherwise;
}

/* ---- memory */

/* Who comes here has mapped the first GiB. Devices are above its memory and below 4 GiB: not cached. */
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

static inline uint64_t content(uint64_t page)
{
    return (page + 1) * 0x9e3779b97f4a7c15u;
}

/* Where a page has its word, besides its first and its last one, which have the count too. */
static inline uint64_t middle_of(uint64_t word)
{
    return 1 + (word >> 40) % (WORDS - 2);
}

/* Of a page of zeros. */
static void fill(uint64_t page)
{
    volatile uint64_t *words = page_at(page);
    uint64_t word = content(page);

    words[0] = word;
    words[middle_of(word)] = word;
    words[WORDS - 1] = ~word;
    written[page] = 0;
}

static void wrong(const char *what, uint64_t page, uint64_t word, uint64_t expected, uint64_t found)
{
    if (errors + stale >= MAX_SHOWN)
        return;
    say("guest: ");
    say(what);
    say_value(" page=", page);
    say_value(" word=", word);
    say_value(" expected=", expected);
    say_value(" found=", found);
    say("\n");
}

/* ---- what accesses took: a histogram with 64 buckets for each power of two */

#define STEPS        64u
#define FIRST_POWER  6u
#define BUCKETS      (STEPS * 24u)

static uint32_t buckets[BUCKETS];
static uint64_t longest, ticks;

static void note(uint64_t took)
{
    unsigned power = took < STEPS ? FIRST_POWER : 63 - (unsigned)__builtin_clzll(took);
    unsigned bucket = (power - FIRST_POWER) * STEPS + ((took >> (power - FIRST_POWER)) & (STEPS - 1));

    buckets[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    ticks += took;
    if (took > longest)
        longest = took;
}

static uint64_t percentile(uint64_t of, unsigned percent)
{
    uint64_t seen = 0;

    if (of)
        for (unsigned i = 0; i < BUCKETS; i++) {
            seen += buckets[i];
            if (seen * 100 >= of * percent)
                return (uint64_t)(STEPS + i % STEPS) << (i / STEPS);
        }
    return 0;
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

/*
 * ---- disk: pages go to it and come from it without the processor having touched them before, so that it is the device that
 * meets those which are not there. A page has its place on the disk. Saving it notes its count; loading it makes that its count
 * again, which the next pass looks for. By turns, in an order of its own.
 */

#define REQUESTS 8u
#define NONE     UINT32_MAX

static struct {
    uint32_t type, reserved;
    uint64_t sector;
} headers[REQUESTS];
static volatile uint8_t states[REQUESTS];
static uint32_t *kept; /* for each page the count that is on the disk, NONE: it is not there */
static uint64_t disk_pages, disk_cursor, disk_stride, saved, loaded;

static void use_disk(uint64_t requests)
{
    struct queue *q = &disk.queues[0];
    uint64_t chosen[REQUESTS];

    while (disk_pages && requests) {
        unsigned count = 0;
        /* Fewer looks than pages: what is chosen in one batch differs. */
        for (unsigned look = 0; look < 2 * REQUESTS && count < REQUESTS && requests; look++) {
            disk_cursor = (disk_cursor + disk_stride) % disk_pages;
            if (disk_cursor >= pages - ballooned)
                continue;
            uint64_t page = chosen[count] = disk_cursor;
            int load = kept[page] != NONE && kept[page] != written[page];
            headers[count].type = !load;
            headers[count].sector = page * (PAGE_BYTES / 512);
            states[count] = 0xff;
            for (unsigned i = 0; i < 3; i++) {
                unsigned at = 3 * count + i;
                const volatile void *where[] = { &headers[count], page_at(page), &states[count] };
                static const uint32_t bytes[] = { sizeof headers[0], PAGE_BYTES, 1 };
                q->descriptors[at].address = (uint64_t)where[i];
                q->descriptors[at].bytes = bytes[i];
                q->descriptors[at].flags = (i < 2 ? 1 : 0) | (i == 2 || (i == 1 && load) ? 2 : 0);
                q->descriptors[at].next = (uint16_t)(at + 1);
            }
            count++;
            requests--;
        }
        if (!count)
            return;
        hand_over(&disk, 0, count, 3);
        for (unsigned i = 0; i < count; i++) {
            uint64_t page = chosen[i];
            if (states[i]) {
                wrong("refused", page, headers[i].type, 0, states[i]);
                errors++;
            } else if (headers[i].type) {
                kept[page] = written[page];
                saved++;
            } else {
                written[page] = kept[page];
                loaded++;
            }
        }
    }
}

/* ---- passes */

static void report(const char *what, uint64_t of)
{
    say(what);
    say_value(" errors=", errors);
    say_value(" stale=", stale);
    say_value(" touched=", touched);
    say_value(" ballooned=", ballooned);
    say_value(" saved=", saved);
    say_value(" loaded=", loaded);
    say_value(" pages=", pages);
    say_value(" tsc=", rdtsc());
    say_value(" ticks=", ticks);
    say_value(" p50=", percentile(of, 50));
    say_value(" p99=", percentile(of, 99));
    say_value(" max=", longest);
    say("\n");
}

static void touch(uint64_t page, int writes)
{
    volatile uint64_t *words = page_at(page);
    uint64_t word = content(page), begin = rdtsc(), first = words[0];

    note(rdtsc() - begin);
    uint64_t count = written[page], middle = middle_of(word);
    if (first != word + count) {
        wrong("wrong", page, 0, word + count, first);
        errors++;
    }
    if (words[WORDS - 1] != ~(word + count)) {
        wrong("wrong", page, WORDS - 1, ~(word + count), words[WORDS - 1]);
        errors++;
    }
    if (words[middle] != word) {
        wrong("wrong", page, middle, word, words[middle]);
        errors++;
    }
    touched++;
    if (!writes)
        return;
    written[page] = (uint32_t)++count;
    words[0] = word + count;
    words[WORDS - 1] = ~(word + count);
}

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

void guest_main(const uint8_t *boot) __attribute__((noreturn));

static uint64_t stride_over(uint64_t count, uint64_t stride)
{
    while (common_divisor(stride, count) != 1)
        stride++;
    return stride;
}

void guest_main(const uint8_t *boot)
{
    look_at(boot);
    uint64_t total = find_memory();
    uint64_t table_pages = (total * 4 + PAGE_BYTES - 1) / PAGE_BYTES;

    /* The tables are below the pages; page_at() goes on where they end. */
    written = (uint32_t *)(uintptr_t)extents[0].address;
    kept = (uint32_t *)(uintptr_t)(extents[0].address + table_pages * PAGE_BYTES);
    extents[0].address += 2 * table_pages * PAGE_BYTES;
    extents[0].pages -= 2 * table_pages;
    total -= 2 * table_pages;
    pages = option("pages=", total);
    if (pages > total || pages < 2)
        pages = total;
    if (option("spread=", 0))
        step = total / pages;
    uint64_t touches = option("touches=", pages), stride = option("stride=", 0), requests = option("disk=", 64), cursor = 0;
    int waits = option("wait=", 0) != 0, writes = option("write=", 1) != 0;
    stride = stride_over(pages, stride ? stride : pages * 5 / 8);
    find_device(&balloon, 5, 2);
    find_device(&disk, 2, 1);
    if (disk.address) {
        disk_pages = (get(&disk, 0x100) | (uint64_t)get(&disk, 0x104) << 32) / (PAGE_BYTES / 512);
        if (disk_pages > pages)
            disk_pages = pages;
        if (disk_pages <= 2 * REQUESTS)
            disk_pages = 0;
        else
            disk_stride = stride_over(disk_pages, disk_pages * 3 / 8);
    }
    for (uint64_t page = 0; page < pages; page++) {
        fill(page);
        if (page < disk_pages)
            kept[page] = NONE;
    }
    report("guest: ready", 0);
    for (uint64_t pass = 1;; pass++) {
        uint8_t order = 0;
        do {
            if (waits && in8(COM1 + 5) & 1)
                order = in8(COM1);
            follow_balloon(); /* last: what was wanted before the order came is done when the pass begins */
        } while (waits && order != 'r' && order != 'w');
        for (unsigned i = 0; i < BUCKETS; i++)
            buckets[i] = 0;
        longest = ticks = 0;
        uint64_t before = touched;
        use_disk(requests);
        for (uint64_t i = 0; i < touches; i++) {
            cursor += stride;
            while (cursor >= pages)
                cursor -= pages;
            if (cursor < pages - ballooned)
                touch(cursor, waits ? order == 'w' : writes);
        }
        say_value("guest: pass=", pass);
        report("", touched - before);
    }
}
