/* SPDX-License-Identifier: Apache-2.0
 *
 * What a guest of a real VMM does with memory, on the bare machine (vmm.c) or as a process of Linux (linux.c): it fills it,
 * then goes through it in passes without end, and says a line after each. Every page of `pages` holds words that only this
 * page has, and a count of the times that it was written; a table elsewhere in memory has the same count. So a page that
 * comes late, twice, from the past or from another place shows, and so does one that holds old content after the balloon
 * has had it.
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
 * touches=N (pages a pass; all), stride=N (1: in order of address; else scattered, each once),
 * disk=N (requests a pass, where there is a disk; 64).
 *
 * One instruction takes about a microsecond where KVM is emulated: three words of each page are enough.
 */
#ifndef PC_GUEST_PATTERN_H
#define PC_GUEST_PATTERN_H

#include <stddef.h>
#include <stdint.h>

#include "arch_x86.h"

#define PAGE_BYTES 4096u
#define WORDS      (PAGE_BYTES / 8)
#define MAX_SHOWN  8u

/* Of the file that includes this. */
static void say(const char *text);
static volatile uint64_t *page_at(uint64_t page);

static uint32_t *written; /* for each page how often it was written */
static uint64_t pages, step = 1, ballooned, errors, stale, touched;
static uint64_t touches, stride, cursor, passes, requests_a_pass;

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

/* NAME=NUMBER, among words. */
static uint64_t option(const char *line, const char *name, uint64_t otherwise)
{
    for (const char *p = line; *p; p++) {
        const char *a = p, *b = name;
        if (p != line && p[-1] != ' ')
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

/*
 * ---- disk: pages go to it and come from it without the processor having touched them before, so that it is the device that
 * meets those which are not there. A page has its place on the disk. Saving it notes its count; loading it makes that its
 * count again, which the next pass looks for. In an order of its own.
 */

#define REQUESTS 8u
#define NONE     UINT32_MAX

struct request {
    uint64_t page; /* and where it is on the disk */
    int load, failed;
};

/* All of these, and returns when they are done. */
static void transfer(struct request *requests, unsigned count);

static uint32_t *kept; /* for each page the count that is on the disk, NONE: it is not there */
static uint64_t disk_pages, disk_cursor, disk_stride, saved, loaded;

static void use_disk(uint64_t wanted)
{
    struct request requests[REQUESTS];

    while (disk_pages && wanted) {
        unsigned count = 0;
        /* Fewer looks than pages: what is chosen in one batch differs. */
        for (unsigned look = 0; look < 2 * REQUESTS && count < REQUESTS && wanted; look++) {
            disk_cursor = (disk_cursor + disk_stride) % disk_pages;
            if (disk_cursor >= pages - ballooned)
                continue;
            requests[count].page = disk_cursor;
            requests[count].failed = 0;
            requests[count++].load = kept[disk_cursor] != NONE && kept[disk_cursor] != written[disk_cursor];
            wanted--;
        }
        if (!count)
            return;
        transfer(requests, count);
        for (const struct request *r = requests; r < requests + count; r++) {
            if (r->failed) {
                wrong("refused", r->page, (uint64_t)r->load, 0, (uint64_t)r->failed);
                errors++;
            } else if (r->load) {
                written[r->page] = kept[r->page];
                loaded++;
            } else {
                kept[r->page] = written[r->page];
                saved++;
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

/* The first number from `from` on that has no divisor in common with `count`: such strides visit each once. */
static uint64_t stride_over(uint64_t count, uint64_t from)
{
    for (;; from++) {
        uint64_t a = from, b = count;
        while (b) {
            uint64_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1)
            return from;
    }
}

/* Fills pages, of `total` that there are; `line` has the options. */
static void begin(const char *line, uint64_t total, uint64_t disk_bytes)
{
    pages = option(line, "pages=", total);
    if (pages > total || pages < 2)
        pages = total;
    if (option(line, "spread=", 0))
        step = total / pages;
    touches = option(line, "touches=", pages);
    requests_a_pass = option(line, "disk=", 64);
    uint64_t wanted = option(line, "stride=", 0);
    stride = stride_over(pages, wanted ? wanted : pages * 5 / 8);
    disk_pages = disk_bytes / PAGE_BYTES;
    if (disk_pages > pages)
        disk_pages = pages;
    if (disk_pages <= 2 * REQUESTS)
        disk_pages = 0;
    else
        disk_stride = stride_over(disk_pages, disk_pages * 3 / 8);
    for (uint64_t page = 0; page < pages; page++) {
        fill(page);
        kept[page] = NONE;
    }
    report("guest: ready", 0);
}

static void pass(int writes)
{
    uint64_t before = touched;

    for (unsigned i = 0; i < BUCKETS; i++)
        buckets[i] = 0;
    longest = ticks = 0;
    use_disk(requests_a_pass);
    for (uint64_t i = 0; i < touches; i++) {
        cursor += stride;
        while (cursor >= pages)
            cursor -= pages;
        if (cursor < pages - ballooned)
            touch(cursor, writes);
    }
    say_value("guest: pass=", ++passes);
    report("", touched - before);
}

#endif
