/* SPDX-License-Identifier: Apache-2.0
 *
 * The first process of a small Linux guest, without a C library: it works on memory of its own as pattern.h has it, and with
 * O_DIRECT on /dev/vda where there is one, and answers on the serial port between two passes:
 *
 *   status     guest: status nonce=... clock_ns=... passes=... errors=... ...       nonce: of this boot, in its memory only
 *   check      guest: check errors=... ...         when it has looked at all of its pages
 *   sh WORDS   what the shell says to that, and    guest: sh exit=...
 *
 * On the kernel's command line besides: work=MIB (32), churn=MIB (in each pass so much is mapped, written, compared and given
 * back to the kernel, which reports it to the balloon: 0).
 */
#include <asm/unistd_64.h>

#include "pattern.h"

#define MIB          ((uint64_t)1 << 20)
#define LINE_BYTES   1024u
#define O_RDWR       2
#define O_DIRECT     040000
#define BLKGETSIZE64 0x80081272
#define POLLIN       1

static long call(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
    register uint64_t r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

#define call1(number, a)          call(number, (uint64_t)(a), 0, 0, 0, 0, 0)
#define call3(number, a, b, c)    call(number, (uint64_t)(a), (uint64_t)(b), (uint64_t)(c), 0, 0, 0)
#define call4(number, a, b, c, d) call(number, (uint64_t)(a), (uint64_t)(b), (uint64_t)(c), (uint64_t)(d), 0, 0)

/* ---- serial port: whole lines */

static char output[LINE_BYTES];
static uint64_t used;

static void say(const char *text)
{
    for (; *text; text++) {
        output[used++] = *text;
        if (*text != '\n' && used < sizeof output)
            continue;
        for (uint64_t done = 0; done < used;) {
            long wrote = call3(__NR_write, 1, output + done, used - done);
            done += wrote > 0 ? (uint64_t)wrote : 0;
        }
        used = 0;
    }
}

/* ---- memory */

static uint64_t memory;

static volatile uint64_t *page_at(uint64_t page)
{
    return (volatile uint64_t *)(memory + page * step * PAGE_BYTES);
}

/* Readable, writable, private, anonymous; a process that gets none cannot say what it finds. */
static uint64_t map(uint64_t bytes)
{
    long address = call(__NR_mmap, 0, bytes, 3, 0x22, (uint64_t)-1, 0);

    if (address < 0) {
        say("guest: wrong memory: the kernel has none\n");
        call1(__NR_exit_group, 1);
    }
    return (uint64_t)address;
}

/* The same, in memory that the kernel has given out before: it must be zero first. */
static void churn(uint64_t bytes)
{
    uint64_t kept_memory = memory, kept_step = step;

    if (!bytes)
        return;
    memory = map(bytes);
    step = 1;
    for (uint64_t page = 0; page < bytes / PAGE_BYTES; page++) {
        volatile uint64_t *words = page_at(page);
        for (unsigned i = 0; i < WORDS; i += WORDS / 2 - 1)
            if (words[i]) {
                wrong("stale", page, i, 0, words[i]);
                stale++;
                break;
            }
        words[0] = content(page);
        words[WORDS - 1] = passes;
    }
    for (uint64_t page = 0; page < bytes / PAGE_BYTES; page++)
        if (page_at(page)[0] != content(page) || page_at(page)[WORDS - 1] != passes) {
            wrong("churned", page, 0, content(page), page_at(page)[0]);
            errors++;
        }
    call3(__NR_munmap, memory, bytes, 0);
    memory = kept_memory;
    step = kept_step;
}

/* ---- disk */

static long disk = -1;

static void transfer(struct request *requests, unsigned count)
{
    for (struct request *r = requests; r < requests + count; r++)
        r->failed = call4(r->load ? __NR_pread64 : __NR_pwrite64, disk, page_at(r->page), PAGE_BYTES, r->page * PAGE_BYTES) !=
                    PAGE_BYTES;
}

static uint64_t open_disk(void)
{
    uint64_t bytes = 0;

    disk = call3(__NR_open, "/dev/vda", O_RDWR | O_DIRECT, 0);
    if (disk < 0 || call3(__NR_ioctl, disk, BLKGETSIZE64, &bytes) < 0)
        return 0;
    return bytes;
}

/* ---- commands */

static uint64_t nonce;

static void run(const char *command)
{
    const char *arguments[] = { "/bin/sh", "-c", command, NULL }, *environment[] = { "PATH=/bin", NULL };
    int status = 0;
    long child = call1(__NR_fork, 0);

    if (child == 0) {
        call3(__NR_execve, arguments[0], arguments, environment);
        call1(__NR_exit_group, 127);
    }
    if (child > 0)
        call4(__NR_wait4, child, &status, 0, 0);
    say_value("guest: sh exit=", (uint64_t)(status >> 8 & 0xff));
    say("\n");
}

static int begins(const char *line, const char *with)
{
    while (*with && *line == *with)
        line++, with++;
    return !*with;
}

static void obey(const char *line)
{
    uint64_t clock[2] = { 0, 0 };

    if (begins(line, "status")) {
        call3(__NR_clock_gettime, 1, clock, 0);
        say_value("guest: status nonce=", nonce);
        say_value(" clock_ns=", clock[0] * 1000000000u + clock[1]);
        say_value(" passes=", passes);
        report("", 0);
    } else if (begins(line, "check")) {
        for (uint64_t page = 0; page < pages; page++)
            touch(page, 0);
        say_value("guest: check passes=", passes);
        report("", 0);
    } else if (begins(line, "sh "))
        run(line + 3);
    else
        say("guest: unknown command: status, check, sh WORDS\n");
}

static void answer(void)
{
    static char line[LINE_BYTES];
    static unsigned have;
    struct {
        int fd;
        short events, found;
    } input = { 0, POLLIN, 0 };

    while (call3(__NR_poll, &input, 1, 0) > 0 && call3(__NR_read, 0, line + have, 1) == 1) {
        if (line[have] == '\n' || have == sizeof line - 1) {
            line[have] = 0;
            have = 0;
            obey(line);
        } else if (line[have] != '\r')
            have++;
    }
}

void linux_main(void) __attribute__((noreturn, used));

void linux_main(void)
{
    static char options[4096];
    long file = call3(__NR_open, "/proc/cmdline", 0, 0);

    call3(__NR_read, file, options, sizeof options - 1);
    call3(__NR_getrandom, &nonce, 4, 4); /* GRND_INSECURE: one that is not there yet is not waited for */
    uint64_t total = option(options, "work=", 32) * MIB / PAGE_BYTES;
    uint64_t churned = option(options, "churn=", 0) * MIB;
    memory = map(total * PAGE_BYTES);
    written = (uint32_t *)map(total * 4);
    kept = (uint32_t *)map(total * 4);
    begin(options, total, open_disk());
    for (;;) {
        answer();
        churn(churned);
        pass(1);
    }
}

__asm__(".globl _start\n_start: and $-16, %rsp\n call linux_main");
