/* SPDX-License-Identifier: Apache-2.0
 *
 * Fault paths: that each operation can be tried and comes to a verdict, and that whatever it does, nothing of it stays behind.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "postcopy.h"
#include "test.h"

static void need_userfaultfd(void)
{
    struct pc_uffd_api api;
    int rc = pc_uffd_probe(PC_UFFD_ANY, &api);

    if (rc || api.how == PC_UFFD_USER_ONLY)
        SKIP("uffd", "no userfaultfd for faults of the kernel");
}

static const char *const outcomes[] = {"unavailable", "blocked", "passed", "refused", "signalled",
                                       "spun",        "wrong",   "hung",   "crashed"};
static const char *const modes[] = {"missing", "minor", "wp", "wp-async", "user-only", "sigbus", "poison"};
static const char *const backings[] = {"anon", "memfd", "memfd-private", "hugetlb"};

static struct pc_fp_spec spec_of(uint32_t operation, int mode, int backing)
{
    struct pc_fp_spec spec = {.operation = operation, .mode = mode, .backing = backing, .hold_us = 1000,
                              .timeout_ms = 5000, .hand_over_fd = -1};
    return spec;
}

static void print_result(const struct pc_faultpath *path, const struct pc_fp_spec *spec, const struct pc_fp_result *result)
{
    (void)printf("     %-32s %-9s %-13s %-11s value %lld errno %d signal %d/%d events %u flags %llu offset %lld thread %d "
                 "%c %s %s\n",
                 path->name, modes[spec->mode], backings[spec->backing], outcomes[result->outcome], (long long)result->value,
                 result->error, result->signal_number, result->signal_code, result->events,
                 (unsigned long long)result->event_flags, (long long)result->event_offset, result->event_thread,
                 result->state ? result->state : '-', result->wchan, result->text);
}

/* No child, whatever state it is in. */
static void check_no_child(void)
{
    CHECK_EQ(waitpid(-1, NULL, WNOHANG | __WALL), -1);
    CHECK_EQ(errno, ECHILD);
}

static void all_of(int mode, int backing, uint32_t flags)
{
    (void)flags;
    need_userfaultfd();
    for (uint32_t i = 0; i < pc_faultpath_count(); i++) {
        struct pc_fp_spec spec = spec_of(i, mode, backing);
        struct pc_fp_result result;
        struct pc_faultpath path;

        CHECK_EQ(pc_faultpath_get(i, &path), 0);
        CHECK_EQ(pc_faultpath_run(&spec, &result), 0);
        print_result(&path, &spec, &result);
    }
    check_no_child();
}

static void missing_on_anonymous_memory(void)
{
    all_of(PC_FP_MISSING, PC_FP_ANON, 0);
}

static void missing_on_a_memfd(void)
{
    all_of(PC_FP_MISSING, PC_FP_MEMFD, 0);
}

#define CASE(mode, backing)                                                                                             \
    static void mode##_on_##backing(void)                                                                               \
    {                                                                                                                   \
        all_of(PC_FP_##mode, PC_FP_##backing, 0);                                                                       \
    }
CASE(MINOR, MEMFD)
CASE(WP, ANON)
CASE(WP, MEMFD)
CASE(WP_ASYNC, ANON)
CASE(USER_ONLY, ANON)
CASE(SIGBUS, ANON)
CASE(POISON, ANON)
CASE(MISSING, MEMFD_PRIVATE)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN_FOR(missing_on_anonymous_memory, 100);
    RUN_FOR(missing_on_a_memfd, 100);
    RUN_FOR(MINOR_on_MEMFD, 100);
    RUN_FOR(WP_on_ANON, 100);
    RUN_FOR(WP_on_MEMFD, 100);
    RUN_FOR(WP_ASYNC_on_ANON, 100);
    RUN_FOR(USER_ONLY_on_ANON, 100);
    RUN_FOR(SIGBUS_on_ANON, 100);
    RUN_FOR(POISON_on_ANON, 100);
    RUN_FOR(MISSING_on_MEMFD_PRIVATE, 100);
    return test_end();
}
