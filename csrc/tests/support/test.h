/* SPDX-License-Identifier: Apache-2.0
 *
 * The harness of the C tests: one header, one program per test file.
 *
 *     static void copies_a_page(void) { CHECK_EQ(pc_uffd_copy(...), 0); }
 *     int main(int argc, char **argv)
 *     {
 *         test_begin(argc, argv);
 *         RUN(copies_a_page);
 *         return test_end();
 *     }
 *
 * Every case runs in a forked child, its own process group, with a deadline: a test of page faults that goes wrong does not
 * fail, it hangs, in a state in which only SIGKILL reaches it. A failed CHECK ends the child, from any of its threads.
 * Arguments choose cases by a part of the name. POSTCOPY_TEST_NOFORK=1 runs them in this process, for a debugger.
 * POSTCOPY_SEED sets the seed of test_random(); it is printed. A case that cannot run here calls SKIP(need, reason);
 * POSTCOPY_TEST_PART=2/3 runs the second of every three cases, so that three processes share a program.
 * POSTCOPY_REQUIRE, a list such as "uffd,kvm", makes skips for these needs failures ("all": every skip).
 * Exit status: 0, 1 when a case failed, 77 when all were skipped.
 */
#ifndef PC_TEST_H
#define PC_TEST_H

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"

#define TEST_SKIPPED 77
#define TEST_DEADLINE_S 20

static struct {
    int passed, failed, skipped;
    int filters;
    char **filter;
    int part, parts, cases; /* 1 of 1: every case */
    bool forked;
    uint64_t seed, random;
} test_;

__attribute__((unused, noreturn)) static void test_exit_(int status)
{
    (void)fflush(stdout);
    (void)fflush(stderr);
    if (test_.forked)
        _exit(status);
    exit(status);
}

#define FAIL(...)                                                                                                       \
    do {                                                                                                                \
        (void)fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                                           \
        (void)fprintf(stderr, __VA_ARGS__);                                                                             \
        (void)fputc('\n', stderr);                                                                                      \
        test_exit_(1);                                                                                                  \
    } while (0)

#define CHECK(condition)                                                                                                \
    do {                                                                                                                \
        if (!(condition))                                                                                               \
            FAIL("not true: %s", #condition);                                                                           \
    } while (0)

/* Integers of any type; what was expected stands second. */
#define CHECK_EQ(actual, expected)                                                                                      \
    do {                                                                                                                \
        long long actual_ = (long long)(actual), expected_ = (long long)(expected);                                     \
        if (actual_ != expected_)                                                                                       \
            FAIL("%s is %lld (0x%llx), should be %s, %lld (0x%llx)", #actual, actual_,                                  \
                 (unsigned long long)actual_, #expected, expected_, (unsigned long long)expected_);                     \
    } while (0)

/* For system calls of the test itself: the value, or the end of the case, with errno. */
#define CHECK_SYS(call)                                                                                                 \
    ({                                                                                                                  \
        __typeof__(call) value_ = (call);                                                                               \
        if (value_ == (__typeof__(call)) - 1)                                                                           \
            FAIL("%s: %s", #call, strerror(errno));                                                                     \
        value_;                                                                                                         \
    })

__attribute__((unused)) static bool test_required_(const char *need)
{
    const char *list = getenv("POSTCOPY_REQUIRE");

    while (list && *list) {
        size_t length = strcspn(list, ", ");

        if ((length == strlen(need) && !strncmp(list, need, length)) || (length == 3 && !strncmp(list, "all", 3)))
            return true;
        list += length + (list[length] != '\0');
    }
    return false;
}

#define SKIP(need, ...)                                                                                                 \
    do {                                                                                                                \
        if (test_required_(need)) {                                                                                     \
            (void)fprintf(stderr, "POSTCOPY_REQUIRE has \"%s\", but: ", need);                                          \
            FAIL(__VA_ARGS__);                                                                                          \
        }                                                                                                               \
        (void)printf("     " __VA_ARGS__);                                                                              \
        (void)putchar('\n');                                                                                            \
        test_exit_(TEST_SKIPPED);                                                                                       \
    } while (0)

/* splitmix64: the same numbers for the same seed everywhere. */
__attribute__((unused)) static uint64_t test_random(void)
{
    uint64_t x = test_.random += 0x9E3779B97F4A7C15;

    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

__attribute__((unused)) static uint64_t test_below(uint64_t limit)
{
    return test_random() % limit;
}

__attribute__((unused)) static void test_begin(int argc, char **argv)
{
    const char *seed = getenv("POSTCOPY_SEED"), *part = getenv("POSTCOPY_TEST_PART");

    if (!part || sscanf(part, "%d/%d", &test_.part, &test_.parts) != 2)
        test_.part = test_.parts = 1;
    test_.filters = argc - 1;
    test_.filter = argv + 1;
    test_.seed = seed ? strtoull(seed, NULL, 0) : pc_now_ns() ^ (uint64_t)getpid() << 40;
    (void)printf("seed %#llx\n", (unsigned long long)test_.seed);
}

/* Waits for the case's process and ends it, with everything it has started, when its time is over. Returns the wait status. */
__attribute__((unused)) static int test_wait_(pid_t child, int deadline_s, bool *late)
{
    int pidfd = (int)syscall(SYS_pidfd_open, child, 0), status = 0;
    struct pollfd ended = {.fd = pidfd, .events = POLLIN};

    *late = false;
    if (pidfd >= 0) {
        int n;

        do
            n = poll(&ended, 1, deadline_s * 1000);
        while (n < 0 && errno == EINTR);
        *late = n == 0;
        close(pidfd);
        if (*late)
            (void)kill(child, SIGKILL);
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    (void)kill(-child, SIGKILL); /* what it left behind */
    return status;
}

__attribute__((unused)) static void test_run_(const char *name, void (*run)(void), int deadline_s)
{
    bool wanted = !test_.filters, late = false;
    uint64_t begin = pc_now_ns();
    int status = 0;

    for (int i = 0; i < test_.filters; i++)
        wanted = wanted || strstr(name, test_.filter[i]);
    if (!wanted || test_.cases++ % test_.parts != test_.part - 1)
        return;
    test_.random = test_.seed;
    (void)fflush(stdout);
    (void)fflush(stderr);
    if (getenv("POSTCOPY_TEST_NOFORK")) {
        (void)printf("run  %s\n", name);
        run();
    } else {
        pid_t parent = getpid(), child = fork();

        if (child < 0) {
            perror("fork");
            exit(1);
        }
        if (!child) {
            test_.forked = true;
            (void)setpgid(0, 0);
            (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent)
                _exit(1);
            run();
            test_exit_(0);
        }
        (void)setpgid(child, child); /* here too: the two race */
        status = test_wait_(child, deadline_s, &late);
    }
    if (late) {
        (void)printf("FAIL %s: not done after %d s\n", name, deadline_s);
        test_.failed++;
    } else if (WIFSIGNALED(status)) {
        (void)printf("FAIL %s: %s\n", name, strsignal(WTERMSIG(status)));
        test_.failed++;
    } else if (WEXITSTATUS(status) == TEST_SKIPPED) {
        (void)printf("skip %s\n", name);
        test_.skipped++;
    } else if (WEXITSTATUS(status)) {
        (void)printf("FAIL %s\n", name);
        test_.failed++;
    } else {
        (void)printf("ok   %s (%llu ms)\n", name, (unsigned long long)(pc_now_ns() - begin) / 1000000);
        test_.passed++;
    }
}

#define RUN(function) test_run_(#function, function, TEST_DEADLINE_S)
#define RUN_FOR(function, seconds) test_run_(#function, function, seconds)

__attribute__((unused)) static int test_end(void)
{
    (void)printf("%d passed, %d failed, %d skipped\n", test_.passed, test_.failed, test_.skipped);
    if (test_.failed)
        return 1;
    return test_.skipped && !test_.passed ? TEST_SKIPPED : 0;
}

#endif
