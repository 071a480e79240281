/* SPDX-License-Identifier: Apache-2.0
 *
 * Fault paths: that each operation can be tried and ends as it should, and that whatever it does, nothing of it stays behind.
 *
 * What a kernel does is data elsewhere (postcopy/testbed/faultpaths). Here it is asked for only where every kernel with that mode does
 * the same: user mode and copies wait. The others may wait or refuse, but may neither hang nor bring other content.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "postcopy/faultpaths.h"
#include "postcopy/memory.h"
#include "postcopy/uffd.h"
#include "tests/support/huge_pool.h"
#include "tests/support/test.h"

static void need_userfaultfd(void)
{
    struct pc_uffd_api api;
    int rc = pc_uffd_probe(PC_UFFD_ANY, &api);

    if (rc || api.how == PC_UFFD_USER_ONLY)
        SKIP("uffd", "no userfaultfd for faults of the kernel");
}

static const char *const outcomes[] = {"unavailable", "blocked", "passed", "refused", "signalled",
                                       "retried",     "wrong",   "hung",   "crashed"};
static const char *const modes[] = {"missing", "minor", "wp", "wp-async", "user-only", "sigbus", "poison", "rwp", "rwp-async"};
static const char *const backings[] = {"anon", "memfd", "memfd-private", "hugetlb", "guest-memfd"};

static struct pc_fp_spec spec_of(uint32_t operation, int mode, int backing)
{
    struct pc_fp_spec spec = {.operation = operation, .mode = mode, .backing = backing, .hold_us = 1000,
                              .timeout_ms = 10000, .hand_over_fd = -1};
    return spec;
}

static void print_result(const char *name, const struct pc_fp_spec *spec, const struct pc_fp_result *result)
{
    (void)printf("     %-32s %-9s %-13s %-11s value %lld errno %d signal %d/%d events %u flags %llu offset %lld thread %d "
                 "%c %s %s\n",
                 name, modes[spec->mode], backings[spec->backing], outcomes[result->outcome], (long long)result->value,
                 result->error, result->signal_number, result->signal_code, result->events,
                 (unsigned long long)result->event_flags, (long long)result->event_offset, result->event_thread,
                 result->state ? result->state : '-', result->wchan, result->text);
    (void)fflush(stdout); /* before the next fork: a sanitizer flushes once more when the child ends */
}

/* Neither a child nor, since the test adopts them, a child of a child. */
static void check_no_process(void)
{
    CHECK_EQ(waitpid(-1, NULL, WNOHANG | __WALL), -1);
    CHECK_EQ(errno, ECHILD);
}

static void adopt(void)
{
    need_userfaultfd();
    CHECK_SYS(prctl(PR_SET_CHILD_SUBREAPER, 1));
}

static uint32_t find(const char *name)
{
    struct pc_faultpath path;

    for (uint32_t i = 0; i < pc_faultpath_count(); i++) {
        CHECK_EQ(pc_faultpath_get(i, &path), 0);
        if (!strcmp(path.name, name))
            return i;
    }
    FAIL("no operation %s", name);
}

static struct pc_fp_result run_named(const char *name, struct pc_fp_spec spec)
{
    struct pc_fp_result result;

    spec.operation = find(name);
    CHECK_EQ(pc_faultpath_run(&spec, &result), 0);
    print_result(name, &spec, &result);
    return result;
}

#define EXPECT(path, condition)                                                                                         \
    do {                                                                                                                \
        if (!(condition))                                                                                               \
            FAIL("%s: not true: %s", (path)->name, #condition);                                                         \
    } while (0)

/* User mode and copies: the kernel's promise. The one copy that is not kept to it: an exiting thread does not wait. */
static bool promised(const struct pc_faultpath *path)
{
    return (!strcmp(path->group, "user") || !strcmp(path->group, "copy")) && strcmp(path->name, "copy.clear_child_tid") != 0;
}

static void check_promise(const struct pc_faultpath *path, int mode, const struct pc_fp_result *result)
{
    bool user = !strcmp(path->group, "user"), writes = path->flags & PC_FP_WRITES;
    bool frame = !strcmp(path->name, "copy.signal_frame"); /* that cannot be written: the end of the process */

    switch (mode) {
    case PC_FP_MISSING:
    case PC_FP_MINOR:
        EXPECT(path, result->outcome == PC_FP_BLOCKED);
        EXPECT(path, !(result->event_flags & PC_UFFD_FAULT_MINOR) == (mode == PC_FP_MISSING));
        break;
    case PC_FP_WP:
        EXPECT(path, result->outcome == (writes ? PC_FP_BLOCKED : PC_FP_PASSED));
        EXPECT(path, !writes || (result->event_flags & PC_UFFD_FAULT_WP && result->written));
        break;
    case PC_FP_RWP:
        EXPECT(path, result->outcome == PC_FP_BLOCKED && result->event_flags & PC_UFFD_FAULT_RWP);
        break;
    case PC_FP_RWP_ASYNC:
        EXPECT(path, result->outcome == PC_FP_PASSED && !result->events);
        break;
    case PC_FP_WP_ASYNC:
        EXPECT(path, result->outcome == PC_FP_PASSED && !result->events);
        EXPECT(path, result->written == writes);
        break;
    case PC_FP_USER_ONLY:
        EXPECT(path, result->outcome == (user ? PC_FP_BLOCKED : frame ? PC_FP_SIGNALLED : PC_FP_REFUSED));
        EXPECT(path, user || !result->events);
        break;
    default: /* SIGBUS, POISON: the page never comes */
        EXPECT(path, result->outcome == (user || frame ? PC_FP_SIGNALLED : PC_FP_REFUSED));
        EXPECT(path, !user || result->signal_number == SIGBUS);
        EXPECT(path, !result->events == (mode == PC_FP_SIGBUS));
        break;
    }
    if (result->outcome == PC_FP_REFUSED)
        EXPECT(path, result->error == EFAULT);
}

/* Each cell is a process of its own, which takes a sanitizer 20 ms and more to make; what the kernel does in it is the same. There
 * every operation is tried where it is missing from anonymous memory, and in a quarter of the other cells. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define ONE_IN 4
#else
#define ONE_IN 1
#endif

static void all_of(int mode, int backing)
{
    /* Huge pages are slow to make: each operation has one in one of the two modes. */
    uint32_t one_in = mode == PC_FP_MISSING && backing == PC_FP_ANON ? 1 : ONE_IN == 1 && backing == PC_FP_HUGETLB ? 2 : ONE_IN;
    int64_t page_bytes = (int64_t)(backing == PC_FP_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes());
    uint32_t tried = 0;

    adopt();
    for (uint32_t i = (uint32_t)(mode + 2 * backing) % one_in; i < pc_faultpath_count(); i += one_in) {
        struct pc_fp_spec spec = spec_of(i, mode, backing);
        struct pc_fp_result result;
        struct pc_faultpath path;

        CHECK_EQ(pc_faultpath_get(i, &path), 0);
        CHECK_EQ(pc_faultpath_run(&spec, &result), 0);
        print_result(path.name, &spec, &result);
        EXPECT(&path, result.outcome != PC_FP_CRASHED && result.outcome != PC_FP_HUNG && result.outcome != PC_FP_WRONG &&
                          result.outcome != PC_FP_RETRIED);
        EXPECT(&path, result.outcome != PC_FP_UNAVAILABLE || result.text[0]);
        if (result.outcome == PC_FP_UNAVAILABLE)
            continue;
        tried++;
        if (result.outcome == PC_FP_BLOCKED) {
            EXPECT(&path, result.events >= 1 && result.event_kind == PC_UFFD_EVENT_PAGEFAULT);
            EXPECT(&path, result.event_thread != PC_FP_THREAD_NONE && result.waited_ns >= 1000000);
            EXPECT(&path, result.event_offset >= 0 && result.event_offset < page_bytes);
            EXPECT(&path, result.state == 'S' || result.state == 'D');
            EXPECT(&path, !result.wchan[0] || !strncmp(result.wchan, "handle_userfault", 16));
        }
        /* Huge pages: mlock2 with MLOCK_ONFAULT brings them all the same. */
        if (path.flags & PC_FP_NOFAULT && backing != PC_FP_HUGETLB)
            EXPECT(&path, !result.events && result.outcome == PC_FP_PASSED);
        if (promised(&path))
            check_promise(&path, mode, &result);
    }
    check_no_process();
    (void)printf("     %u operations tried\n", tried);
    if (!tried)
        SKIP("uffd", "this userfaultfd has not mode %s for %s", modes[mode], backings[backing]);
    CHECK(tried >= 60 / one_in);
}

#define CASE(mode, backing)                                                                                             \
    static void mode##_on_##backing(void)                                                                               \
    {                                                                                                                   \
        all_of(PC_FP_##mode, PC_FP_##backing);                                                                          \
    }
CASE(MISSING, ANON)
CASE(MISSING, MEMFD)
CASE(MISSING, MEMFD_PRIVATE)
CASE(MISSING, HUGETLB)
CASE(MINOR, MEMFD)
CASE(MINOR, MEMFD_PRIVATE)
CASE(MINOR, HUGETLB)
CASE(WP, ANON)
CASE(WP, MEMFD)
CASE(WP_ASYNC, ANON)
CASE(WP_ASYNC, MEMFD)
CASE(USER_ONLY, ANON)
CASE(USER_ONLY, MEMFD)
CASE(SIGBUS, ANON)
CASE(SIGBUS, MEMFD)
/* Which of these there are is for newer kernels to say: what is not is told as such, and nothing else is tried. */
#define CASE_OF(mode, backing)                                                                                          \
    static void mode##_on_##backing(void)                                                                               \
    {                                                                                                                   \
        struct pc_fp_result first = run_named("user.load", spec_of(0, PC_FP_##mode, PC_FP_##backing));                  \
                                                                                                                        \
        if (first.outcome == PC_FP_UNAVAILABLE && first.text[0])                                                        \
            SKIP("new-kernel", "%s", first.text);                                                                       \
        all_of(PC_FP_##mode, PC_FP_##backing);                                                                          \
    }
CASE_OF(RWP, ANON)
CASE_OF(RWP, MEMFD)
CASE_OF(RWP, HUGETLB)
CASE_OF(RWP_ASYNC, ANON)
CASE_OF(MISSING, GUEST_MEMFD)
CASE_OF(MINOR, GUEST_MEMFD)
CASE(POISON, ANON)
CASE(POISON, MEMFD)

static void the_table_names_each_operation_once(void)
{
    struct pc_faultpath path, other;
    uint32_t count = pc_faultpath_count(), missing = 0;

    for (uint32_t i = 0; i < count; i++) {
        const uint32_t both = 1u << PC_FP_ANON | 1u << PC_FP_MEMFD;

        CHECK_EQ(pc_faultpath_get(i, &path), 0);
        EXPECT(&path, strlen(path.group) && strlen(path.what) && path.modes && path.backings);
        EXPECT(&path, strchr(path.name, '.') == path.name + strlen(path.group));
        EXPECT(&path, !strncmp(path.name, path.group, strlen(path.group)));
        missing += path.modes & 1u << PC_FP_MISSING && (path.backings & both) == both;
        for (uint32_t k = 0; k < i; k++) {
            CHECK_EQ(pc_faultpath_get(k, &other), 0);
            EXPECT(&path, strcmp(path.name, other.name) != 0);
        }
    }
    CHECK(missing >= 60);
    CHECK_EQ(pc_faultpath_get(count, &path), -EINVAL);
    CHECK_EQ(pc_faultpath_get(PC_FP_TEST_HANG, &path), -EINVAL);
}

/* Another host makes the page from the same function: nothing of it may come from wherever the stack has been. */
static __attribute__((noinline)) void soil_the_stack(uint8_t with)
{
    volatile uint8_t soil[8192];

    for (size_t i = 0; i < sizeof(soil); i++)
        soil[i] = with;
}

static void the_content_is_the_same_each_time(void)
{
    static uint8_t pages[3][8192];

    soil_the_stack(0x00);
    pc_fp_content(pages[0], 8192);
    soil_the_stack(0xff);
    pc_fp_content(pages[1], 8192);
    CHECK(!memcmp(pages[0], pages[1], 8192));
    pc_fp_content(pages[2], 4096);
    CHECK(!memcmp(pages[0], pages[2], 4096));
    CHECK_EQ(pages[2][4096], 0);
    pc_fp_content(pages[2] + 4096, 100); /* short: no argument is written past the end */
    CHECK_EQ(pages[2][4096 + 100], 0);
}

static void a_spec_that_cannot_be_is_refused(void)
{
    struct pc_fp_spec spec = spec_of(0, PC_FP_MISSING, PC_FP_ANON);
    struct pc_fp_result result;

    spec.operation = pc_faultpath_count();
    CHECK_EQ(pc_faultpath_run(&spec, &result), -EINVAL);
    spec = spec_of(0, PC_FP_MODES, PC_FP_ANON);
    CHECK_EQ(pc_faultpath_run(&spec, &result), -EINVAL);
    spec = spec_of(0, PC_FP_MISSING, -1);
    CHECK_EQ(pc_faultpath_run(&spec, &result), -EINVAL);
    spec = spec_of(0, PC_FP_MISSING, PC_FP_ANON);
    spec.timeout_ms = 0;
    CHECK_EQ(pc_faultpath_run(&spec, &result), -EINVAL);
    spec = spec_of(0, PC_FP_WP, PC_FP_ANON);
    spec.hand_over_fd = 0;
    CHECK_EQ(pc_faultpath_run(&spec, &result), -EINVAL);
    spec = spec_of(0, PC_FP_MISSING, PC_FP_GUEST_MEMFD);
    spec.hand_over_fd = 0;
    CHECK_EQ(pc_faultpath_run(&spec, &result), -EINVAL);
    check_no_process();
}

static void what_hangs_is_ended_with_all_that_it_started(void)
{
    struct pc_fp_spec spec = spec_of(PC_FP_TEST_HANG, PC_FP_MISSING, PC_FP_ANON);
    struct pc_fp_result result;
    int subreaper = 0;

    adopt();
    spec.timeout_ms = 200;
    CHECK_EQ(pc_faultpath_run(&spec, &result), 0);
    print_result("test.hang", &spec, &result);
    CHECK_EQ(result.outcome, PC_FP_HUNG);
    CHECK(strstr(result.text, "did not return"));
    check_no_process();
    CHECK_SYS(prctl(PR_GET_CHILD_SUBREAPER, &subreaper));
    CHECK_EQ(subreaper, 1); /* as it was */
    CHECK_SYS(prctl(PR_SET_CHILD_SUBREAPER, 0));
    CHECK_EQ(pc_faultpath_run(&spec, &result), 0);
    CHECK_SYS(prctl(PR_GET_CHILD_SUBREAPER, &subreaper));
    CHECK_EQ(subreaper, 0);
    check_no_process();
}

/* A page that is withheld for longer than the watchdog waits: the thread sleeps in the kernel, and goes all the same. */
static void what_waits_too_long_is_ended_in_the_fault(void)
{
    static const char *const names[] = {"user.load", "copy.write_pipe", "pin.vmsplice_to_pipe", "copy.execve_string",
                                        "remote.process_vm_readv", "uring.async_write"};

    adopt();
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        struct pc_fp_spec spec = spec_of(0, PC_FP_MISSING, PC_FP_ANON);
        struct pc_fp_result result;

        spec.hold_us = 60000000;
        spec.timeout_ms = 300;
        result = run_named(names[i], spec);
        if (result.outcome == PC_FP_UNAVAILABLE)
            continue;
        CHECK_EQ(result.outcome, PC_FP_HUNG);
        CHECK(result.events >= 1 && (result.state == 'S' || result.state == 'D')); /* known although it was killed */
        check_no_process();
    }
}

/* The process that runs the cells is killed while a page is withheld, by that page's own process among others: all of them go. */
static void nothing_outlives_a_killed_runner(void)
{
    static const char *const names[] = {"user.load",       "copy.write_pipe",         "copy.execve_string",
                                        "copy.execve_argv", "remote.process_vm_readv", "uring.async_write"};

    adopt();
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        struct pc_fp_spec spec = spec_of(find(names[i]), PC_FP_MISSING, PC_FP_ANON);
        struct pc_fp_result result;
        uint64_t end;
        pid_t runner;

        spec.hold_us = 60000000;
        spec.timeout_ms = 60000;
        runner = CHECK_SYS(fork());
        if (!runner)
            _exit(pc_faultpath_run(&spec, &result) ? 1 : 0);
        (void)poll(NULL, 0, 100); /* for the fault to be reached; were it not, nothing would be there to outlive */
        CHECK_SYS(kill(runner, SIGKILL));
        end = pc_now_ns() + 10000000000;
        while (waitpid(-1, NULL, WNOHANG | __WALL) >= 0) {
            if (pc_now_ns() > end)
                FAIL("%s: a process lives on", names[i]);
            (void)poll(NULL, 0, 1);
        }
        CHECK_EQ(errno, ECHILD);
    }
}

static void a_crash_is_reported(void)
{
    struct pc_fp_spec spec = spec_of(PC_FP_TEST_CRASH, PC_FP_MISSING, PC_FP_ANON);
    struct pc_fp_result result;

    adopt();
    CHECK_EQ(pc_faultpath_run(&spec, &result), 0);
    CHECK_EQ(result.outcome, PC_FP_CRASHED);
    CHECK(strstr(result.text, "SIGKILL"));
    check_no_process();
}

static void other_content_is_reported(void)
{
    struct pc_fp_spec spec = spec_of(PC_FP_TEST_WRONG, PC_FP_MISSING, PC_FP_ANON);
    struct pc_fp_result result;

    adopt();
    CHECK_EQ(pc_faultpath_run(&spec, &result), 0);
    CHECK_EQ(result.outcome, PC_FP_WRONG);
    CHECK(strstr(result.text, "byte 0 of the page"));
}

static void a_directory_that_is_not_there_is_a_reason(void)
{
    struct pc_fp_spec spec = spec_of(0, PC_FP_MISSING, PC_FP_ANON);
    struct pc_fp_result result;

    adopt();
    (void)snprintf(spec.direct_dir, sizeof(spec.direct_dir), "/nonexistent");
    result = run_named("pin.odirect_write", spec);
    CHECK_EQ(result.outcome, PC_FP_UNAVAILABLE);
    CHECK(strstr(result.text, "/nonexistent"));
}

/* Nothing of it is left in the directory, even of a child that was killed. */
static void files_are_removed(void)
{
    struct pc_fp_spec spec = spec_of(0, PC_FP_MISSING, PC_FP_ANON);
    struct pc_fp_result result;
    char dir[] = "/tmp/faultpaths-XXXXXX";

    adopt();
    CHECK(mkdtemp(dir));
    (void)snprintf(spec.direct_dir, sizeof(spec.direct_dir), "%s", dir);
    result = run_named("pin.odirect_write", spec);
    spec.hold_us = 60000000;
    spec.timeout_ms = 300;
    result = run_named("pin.odirect_write", spec);
    CHECK(result.outcome == PC_FP_HUNG || result.outcome == PC_FP_UNAVAILABLE);
    CHECK_SYS(rmdir(dir)); /* which it cannot be unless it is empty */
}

/* ---- measurements ---- */

static void a_signal_is_measured(void)
{
    struct pc_fp_spec spec = spec_of(0, PC_FP_MISSING, PC_FP_ANON);
    struct pc_fp_result result;

    adopt();
    spec.measure = PC_FP_MEASURE_SIGNAL;
    result = run_named("user.load", spec);
    CHECK_EQ(result.outcome, PC_FP_BLOCKED); /* of the run without a signal */
    CHECK(result.signal_measured && result.signal_window_ns >= 20000000);
#ifndef __SANITIZE_THREAD__ /* which keeps signals back until the thread makes a call */
    CHECK_EQ(result.handler_before_page, 1);
#endif
    CHECK(result.signal_events >= 1); /* the access again, after the handler */
    result = run_named("copy.write_pipe", spec);
    CHECK(result.signal_measured && !result.handler_before_page);
    CHECK(result.signal_events > 1 && result.signal_cpu_ns > 0); /* the copy is repeated as long as the signal waits */
    result = run_named("pin.vmsplice_to_pipe", spec);
    CHECK(result.signal_measured && !result.handler_before_page && !result.signal_events);
    check_no_process();
}

static void a_kill_is_measured(void)
{
    static const char *const names[] = {"user.load", "copy.write_pipe", "pin.vmsplice_to_pipe", "futex.wait_shared",
                                        "remote.process_vm_readv"};

    adopt();
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        struct pc_fp_spec spec = spec_of(0, PC_FP_MISSING, PC_FP_ANON);
        struct pc_fp_result result;

        spec.measure = PC_FP_MEASURE_KILL;
        result = run_named(names[i], spec);
        if (result.outcome == PC_FP_UNAVAILABLE)
            continue;
        CHECK_EQ(result.outcome, PC_FP_BLOCKED);
        CHECK(result.kill_measured && result.killed && result.kill_ns);
        check_no_process();
    }
}

static void locks_are_measured(void)
{
    static const int table[][2] = {{PC_FP_MISSING, PC_FP_ANON}, {PC_FP_MINOR, PC_FP_MEMFD}, {PC_FP_WP, PC_FP_ANON}};

    adopt();
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        struct pc_fp_spec spec = spec_of(0, table[i][0], table[i][1]);
        struct pc_fp_result result;

        spec.measure = PC_FP_MEASURE_LOCKS;
        result = run_named("user.store", spec);
        if (result.outcome == PC_FP_UNAVAILABLE)
            continue;
        CHECK_EQ(result.outcome, PC_FP_BLOCKED);
        CHECK_EQ(result.locks_measured, 1);
        for (int k = 0; k < PC_FP_LOCKS; k++) {
            CHECK(result.lock_idle_ns[k] && result.lock_elsewhere_ns[k]);
            CHECK(result.lock_idle_same_ns[k] && result.lock_same_ns[k]);
            /* Not a time, but whether it returned before the page was given, half of the watchdog's time later. */
            CHECK(result.lock_elsewhere_ns[k] < 1000000000 && result.lock_same_ns[k] < 1000000000);
        }
    }
    check_no_process();
}

static void what_does_not_wait_is_not_measured(void)
{
    struct pc_fp_spec spec = spec_of(0, PC_FP_MISSING, PC_FP_ANON);
    struct pc_fp_result result;

    adopt();
    spec.measure = PC_FP_MEASURE_SIGNAL | PC_FP_MEASURE_KILL | PC_FP_MEASURE_LOCKS;
    result = run_named("nofault.mincore", spec);
    CHECK_EQ(result.outcome, PC_FP_PASSED);
    CHECK(!result.events && !result.state && !result.signal_measured && !result.kill_measured && !result.locks_measured);
}

/* ---- a page that another process gives ---- */

static pid_t run_elsewhere(int socket, const char *name, int backing, int *status_pipe)
{
    int fds[2];
    pid_t child;

    CHECK_SYS(pipe2(fds, O_CLOEXEC));
    child = CHECK_SYS(fork());
    if (!child) {
        struct pc_fp_spec spec = spec_of(find(name), PC_FP_MISSING, backing);
        struct pc_fp_result result;

        spec.hand_over_fd = socket;
        if (pc_faultpath_run(&spec, &result) || write(fds[1], &result, sizeof(result)) != sizeof(result))
            _exit(1);
        _exit(0);
    }
    close(fds[1]);
    *status_pipe = fds[0];
    return child;
}

static struct pc_fp_hand_over take_over(int socket, int *fds, int expected)
{
    struct pc_fp_hand_over message;
    struct iovec vector = {&message, sizeof(message)};
    union {
        char bytes[CMSG_SPACE(2 * sizeof(int))];
        struct cmsghdr header;
    } control;
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control,
                            .msg_controllen = sizeof(control)};

    CHECK_EQ(recvmsg(socket, &header, MSG_CMSG_CLOEXEC), sizeof(message));
    CHECK_EQ(control.header.cmsg_len, CMSG_LEN((size_t)expected * sizeof(int)));
    memcpy(fds, CMSG_DATA(&control.header), (size_t)expected * sizeof(int));
    return message;
}

static void hand_over(const char *name, int thread, int backing, int kind)
{
    int sockets[2], status_pipe, fds[2] = {-1, -1}, status;
    struct pc_fp_hand_over message;
    struct pc_fp_result result;
    struct pc_uffd_event event;
    struct pollfd polled;
    uint64_t done;
    uint8_t *page;
    pid_t child;

    CHECK_SYS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets));
    child = run_elsewhere(sockets[1], name, backing, &status_pipe);
    message = take_over(sockets[0], fds, kind == PC_MEMORY_MEMFD ? 2 : 1);
    CHECK_EQ(message.kind, kind);
    CHECK_EQ(message.bytes, message.page_bytes);
    CHECK_EQ(send(sockets[0], "g", 1, MSG_NOSIGNAL), 1);
    polled = (struct pollfd){.fd = fds[0], .events = POLLIN};
    CHECK_EQ(poll(&polled, 1, 10000), 1);
    CHECK_EQ(pc_uffd_read(fds[0], &event, 1), 1);
    CHECK_EQ(event.address, message.address); /* not the exact one: who serves it may know pages only */
    CHECK_EQ(kill(message.pid, 0), 0);
    CHECK(thread != PC_FP_THREAD_OWN || event.tid == message.pid);
    (void)poll(NULL, 0, 20); /* so that the thread is seen to wait; nothing depends on it but that */
    page = CHECK_SYS(mmap(NULL, message.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    pc_fp_content(page, message.bytes);
    CHECK_EQ(pc_uffd_copy(fds[0], message.address, page, message.bytes, 0, &done), 0);
    CHECK_EQ(read(status_pipe, &result, sizeof(result)), sizeof(result));
    CHECK_SYS(waitpid(child, &status, 0));
    CHECK_EQ(status, 0);
    (void)printf("     %s: %s thread %d %c %s\n", name, outcomes[result.outcome], result.event_thread,
                 result.state ? result.state : '-', result.text);
    /* Passed: it was not seen waiting, as that is a sample. */
    CHECK(result.outcome == PC_FP_BLOCKED || result.outcome == PC_FP_PASSED);
    if (result.outcome == PC_FP_BLOCKED)
        CHECK_EQ(result.event_thread, thread);
    CHECK_EQ(result.events, 0);
}

static void another_process_gives_the_page(void)
{
    static const struct {
        const char *name;
        int thread;
    } table[] = {{"user.load", PC_FP_THREAD_OWN},
                 {"copy.write_pipe", PC_FP_THREAD_OWN},
                 {"copy.sendmsg_msghdr", PC_FP_THREAD_OWN},
                 {"pin.vmsplice_to_pipe", PC_FP_THREAD_OWN},
                 {"copy.execve_string", PC_FP_THREAD_PROCESS},
                 {"remote.process_vm_readv", PC_FP_THREAD_PROCESS}};

    adopt();
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        hand_over(table[i].name, table[i].thread, PC_FP_ANON, PC_MEMORY_ANON);
        hand_over(table[i].name, table[i].thread, PC_FP_MEMFD, PC_MEMORY_MEMFD);
    }
    check_no_process();
}

/* A copy that a storm of signals hits while the page is elsewhere raises its event again and again, for one page. */
static void a_storm_of_signals_hits_a_page_that_was_handed_over(void)
{
    int sockets[2], status_pipe, fd, status;
    struct pc_fp_hand_over message;
    struct pc_fp_result result;
    struct pc_uffd_event events[64];
    uint64_t done, end;
    uint32_t count = 0;
    uint8_t *page;
    pid_t child;

    adopt();
    CHECK_SYS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets));
    child = run_elsewhere(sockets[1], "copy.write_pipe", PC_FP_ANON, &status_pipe);
    message = take_over(sockets[0], &fd, 1);
    CHECK_EQ(send(sockets[0], "g", 1, MSG_NOSIGNAL), 1);
    end = pc_now_ns() + 10000000000;
    while (count < 100 && pc_now_ns() < end) {
        struct pollfd polled = {.fd = fd, .events = POLLIN};
        int n;

        (void)poll(&polled, 1, 1);
        n = pc_uffd_read(fd, events, 64);
        for (int i = 0; i < n; i++)
            CHECK_EQ(events[i].address, message.address);
        count += n > 0 ? (uint32_t)n : 0;
        if (count)
            CHECK_SYS(kill(message.pid, SIGUSR1));
    }
    CHECK(count >= 100);
    page = CHECK_SYS(mmap(NULL, message.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    pc_fp_content(page, message.bytes);
    CHECK_EQ(pc_uffd_copy(fd, message.address, page, message.bytes, 0, &done), 0);
    CHECK_EQ(read(status_pipe, &result, sizeof(result)), sizeof(result));
    CHECK_SYS(waitpid(child, &status, 0));
    /* It is not seen waiting, since it runs all the time; but it succeeded, with the right content. */
    CHECK(result.outcome == PC_FP_BLOCKED || result.outcome == PC_FP_PASSED);
    CHECK_EQ(result.value, 4096);
}

static void a_page_that_is_not_taken_over(void)
{
    int sockets[2];
    struct pc_fp_spec spec = spec_of(0, PC_FP_MISSING, PC_FP_ANON);
    struct pc_fp_result result;

    adopt();
    CHECK_SYS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets));
    close(sockets[0]);
    spec.hand_over_fd = sockets[1];
    CHECK_EQ(pc_faultpath_run(&spec, &result), 0);
    CHECK_EQ(result.outcome, PC_FP_UNAVAILABLE);
    CHECK(strstr(result.text, "handed over"));
    check_no_process();
}

static void contention_is_measured(void)
{
    static const uint32_t table[][2] = {{0, 0}, {1, 0}, {10, 0}, {10, 1}};

    adopt();
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        static struct pc_histogram mapped, unmapped;
        char error[PC_ERROR_BYTES] = "";
        int rc;

        memset(&mapped, 0, sizeof(mapped));
        memset(&unmapped, 0, sizeof(unmapped));
        rc = pc_fp_contention(table[i][0], table[i][1], 200, &mapped, &unmapped, error, sizeof(error));
        if (rc)
            FAIL("%u pending: %s", table[i][0], error);
        CHECK_EQ(mapped.count, 200);
        CHECK_EQ(unmapped.count, 200);
        CHECK(mapped.max_ns && unmapped.max_ns);
    }
    check_no_process();
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(4);
    RUN(the_table_names_each_operation_once);
    RUN(the_content_is_the_same_each_time);
    RUN(a_spec_that_cannot_be_is_refused);
    RUN(what_hangs_is_ended_with_all_that_it_started);
    RUN(what_waits_too_long_is_ended_in_the_fault);
    RUN_FOR(nothing_outlives_a_killed_runner, 70);
    RUN(a_crash_is_reported);
    RUN(other_content_is_reported);
    RUN(a_directory_that_is_not_there_is_a_reason);
    RUN(files_are_removed);
    RUN(a_signal_is_measured);
    RUN(a_kill_is_measured);
    RUN_FOR(locks_are_measured, 60);
    RUN(what_does_not_wait_is_not_measured);
    RUN_FOR(another_process_gives_the_page, 60);
    RUN(a_storm_of_signals_hits_a_page_that_was_handed_over);
    RUN(a_page_that_is_not_taken_over);
    RUN_FOR(contention_is_measured, 60);
    RUN_FOR(MISSING_on_ANON, 100);
    RUN_FOR(MISSING_on_MEMFD, 100);
    RUN_FOR(MISSING_on_MEMFD_PRIVATE, 100);
    RUN_FOR(MISSING_on_HUGETLB, 100);
    RUN_FOR(MINOR_on_MEMFD, 100);
    RUN_FOR(MINOR_on_MEMFD_PRIVATE, 100);
    RUN_FOR(MINOR_on_HUGETLB, 100);
    RUN_FOR(WP_on_ANON, 100);
    RUN_FOR(WP_on_MEMFD, 100);
    RUN_FOR(WP_ASYNC_on_ANON, 100);
    RUN_FOR(WP_ASYNC_on_MEMFD, 100);
    RUN_FOR(USER_ONLY_on_ANON, 100);
    RUN_FOR(USER_ONLY_on_MEMFD, 100);
    RUN_FOR(SIGBUS_on_ANON, 100);
    RUN_FOR(SIGBUS_on_MEMFD, 100);
    RUN_FOR(RWP_on_ANON, 100);
    RUN_FOR(RWP_on_MEMFD, 100);
    RUN_FOR(RWP_on_HUGETLB, 100);
    RUN_FOR(RWP_ASYNC_on_ANON, 100);
    RUN_FOR(MISSING_on_GUEST_MEMFD, 100);
    RUN_FOR(MINOR_on_GUEST_MEMFD, 100);
    RUN_FOR(POISON_on_ANON, 100);
    RUN_FOR(POISON_on_MEMFD, 100);
    return test_end();
}
