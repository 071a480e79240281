/* SPDX-License-Identifier: Apache-2.0
 *
 * The kvm machine: runs, moves by copy and by postcopy, is paused where that is hard.
 */
#if !defined(__x86_64__)

#include "tests/machine/machines.h"

/* Elsewhere there is one thing to show: the refusal says why. */
int main(void)
{
    struct pc_machine_config config = { .vcpus = 1, .disk_fd = -1 };
    struct pc_machine *machine;

    if (pc_machine_open(&config, &machine, error, sizeof error) != -ENOTSUP || !error[0] || machine)
        return 1;
    (void)printf("skipped: %s\n", error);
    return TEST_SKIPPED;
}

#else

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/mman.h>

#include "postcopy/uffd.h"
#include "tests/machine/machines.h"

#define CASE_SECONDS 100 /* a guest may run on an emulated /dev/kvm */

static void not_backwards(const struct pc_machine_stats *before, const struct pc_machine_stats *after)
{
    CHECK(after->serial_bytes >= before->serial_bytes);
    CHECK(after->disk_reads >= before->disk_reads && after->disk_writes >= before->disk_writes);
    for (uint32_t i = 0; i < before->vcpus; i++) {
        CHECK(after->vcpu[i].reports >= before->vcpu[i].reports);
        CHECK(after->vcpu[i].operations >= before->vcpu[i].operations);
    }
}

/* ---- cases: life and moves ---- */

/* Boot, pause and resume many times, move to a second machine by copying, run on there, move back. */
static void run_and_move(uint32_t workload, uint32_t vcpus)
{
    struct pc_machine_config here = make_config(PC_ENGINE_KVM, workload, vcpus, PC_MEMORY_MEMFD), there;
    struct pc_machine *a, *b;
    struct pc_machine_stats before, after;
    static struct saved blob;
    uint64_t nonce;

    here.working_set_bytes = MIB;
    there = make_twin(&here, PC_MEMORY_ANON);
    a = boot_machine(&here);
    CHECK(pc_machine_resume(a) == 0);
    /* The start too is a state to stop in: page by page, in the initial pass, at the barrier. */
    for (int i = 0; i < 20; i++) {
        usleep((useconds_t)(500 * i));
        pause_machine(a);
        verify_ok(a);
        CHECK(pc_machine_resume(a) == 0);
    }
    run_until_operations(a, NULL, some_operations[workload]);
    pause_machine(a);
    before = stats_of(a);
    CHECK(before.state == PC_MACHINE_PAUSED && before.paused_ns > before.first_run_ns);
    nonce = verify_ok(a).nonce;
    CHECK(nonce && nonce == before.nonce);

    for (int hop = 0; hop < 2; hop++) {
        struct pc_machine_config *from = hop ? &there : &here, *to = hop ? &here : &there;
        save(a, &blob);
        close_machine(a);
        copy_memory(to, from);
        b = open_machine(to);
        load(b, &blob);
        CHECK_THAT(stats_of(b).nonce == 0, "the nonce must not be device state");
        CHECK(stats_of(b).ready);
        verify_ok(b);
        CHECK(pc_machine_resume(b) == 0);
        after = run_until_operations(b, &before, some_operations[workload]);
        CHECK_THAT(after.nonce == nonce, "the machine has rebooted");
        CHECK(after.first_run_ns);
        not_backwards(&before, &after);
        pause_machine(b);
        CHECK(verify_ok(b).nonce == nonce);
        before = stats_of(b);
        a = b;
    }
    CHECK(workload != PC_WORKLOAD_DIRTY || before.serial_bytes);
    CHECK(workload != PC_WORKLOAD_DISK || (before.disk_reads && before.disk_writes && !before.disk_errors));
    close_machine(a);
}

/* A page server and pager in one: copies a page of `from` to where a fault on `to` asks for it. */
struct server {
    int uffd;
    struct pc_machine_config *from, *to;
    pthread_t thread;
    _Atomic bool stop, withhold;
    _Atomic uint64_t served;
    _Atomic uint64_t events;
    _Atomic(struct pc_machine *) machine; /* whose vCPUs to look at when a fault comes */
    _Atomic uint64_t in_disk;             /* faults that came while a vCPU was in a disk transfer */
};

static void serve_page(struct server *server, uint64_t address)
{
    for (uint32_t i = 0; i <= server->to->vcpus; i++) {
        uint64_t base = (uintptr_t)block(server->to, i)->base, done, offset = address - base;
        int rc;

        if (offset >= block(server->to, i)->size_bytes)
            continue;
        do
            rc = pc_uffd_copy(server->uffd, address, (uint8_t *)block(server->from, i)->base + offset, PAGE, 0, &done);
        while (rc == -EAGAIN);
        if (rc == -EEXIST)
            CHECK(pc_uffd_wake(server->uffd, address, PAGE) == 0);
        else
            CHECK_THAT(rc == 0, "%d", rc);
        if (rc == 0)
            atomic_fetch_add(&server->served, 1);
        return;
    }
    CHECK_THAT(0, "fault outside of the machine");
}

static void *serve(void *argument)
{
    struct server *server = argument;

    while (!atomic_load(&server->stop)) {
        struct pollfd pfd = { .fd = server->uffd, .events = POLLIN };
        struct pc_uffd_event events[64];
        int n;

        if (atomic_load(&server->withhold)) {
            usleep(1000);
            continue;
        }
        if (poll(&pfd, 1, 20) <= 0)
            continue;
        n = pc_uffd_read(server->uffd, events, 64);
        for (int i = 0; i < n; i++) {
            struct pc_machine *machine = atomic_load(&server->machine);
            atomic_fetch_add(&server->events, 1);
            if (machine) {
                struct pc_machine_stats stats = stats_of(machine);
                for (uint32_t k = 0; k < stats.vcpus; k++)
                    atomic_fetch_add(&server->in_disk, stats.vcpu[k].activity == PC_VCPU_DISK);
            }
            serve_page(server, events[i].address & ~(PAGE - 1));
        }
    }
    return NULL;
}

static void arm(struct server *server, struct pc_machine_config *from, struct pc_machine_config *to)
{
    *server = (struct server){ .from = from, .to = to };
    server->uffd = pc_uffd_open(PC_UFFD_ANY, 0, NULL);
    if (server->uffd < 0)
        SKIP("uffd", "no userfaultfd");
    for (uint32_t i = 0; i <= to->vcpus; i++)
        CHECK(pc_uffd_register(server->uffd, (uintptr_t)block(to, i)->base, block(to, i)->size_bytes, PC_UFFD_MISSING, NULL) ==
              0);
}

static void start_serving(struct server *server)
{
    CHECK(pthread_create(&server->thread, NULL, serve, server) == 0);
}

static void stop_serving(struct server *server)
{
    atomic_store(&server->stop, true);
    pthread_join(server->thread, NULL);
    close(server->uffd);
}

/* What the background stream would do. */
static void serve_the_rest(struct server *server)
{
    for (uint32_t i = 0; i <= server->to->vcpus; i++)
        for (uint64_t offset = 0; offset < block(server->to, i)->size_bytes; offset += PAGE)
            serve_page(server, (uintptr_t)block(server->to, i)->base + offset);
}

static bool has_event(int fd)
{
    struct pollfd pfd = { .fd = fd, .events = POLLIN };

    return poll(&pfd, 1, 0) > 0;
}

static void postcopy(uint32_t workload, uint32_t vcpus, int kind)
{
    struct pc_machine_config here = make_config(PC_ENGINE_KVM, workload, vcpus, PC_MEMORY_MEMFD), there = make_twin(&here, kind);
    struct pc_machine_stats before, after;
    static struct saved blob;
    struct server server;
    struct pc_machine *a, *b;

    here.working_set_bytes = there.working_set_bytes = 2 * MIB;
    a = boot_and_run(&here, some_operations[workload]);
    pause_machine(a);
    verify_ok(a);
    before = stats_of(a);

    arm(&server, &here, &there);
    b = open_machine(&there);
    save(a, &blob);
    load(b, &blob);
    /* Nobody serves yet: had one of these touched guest memory, it would not have returned. */
    CHECK_THAT(!has_event(server.uffd), "opening or loading touched guest memory");
    atomic_store(&server.machine, b);
    start_serving(&server);
    CHECK(pc_machine_resume(b) == 0);
    after = run_until_operations(b, &before, some_operations[workload]);
    CHECK(after.nonce == before.nonce);
    not_backwards(&before, &after);
    CHECK(atomic_load(&server.served) > 0);
    /* Pausing and moving the state once more, in the midst of it. */
    for (int i = 0; i < 5; i++) {
        pause_machine(b);
        save(b, &blob);
        CHECK(pc_machine_resume(b) == 0);
        usleep(20000);
    }
    (void)printf("     %llu pages on demand, %llu fault events, %llu during disk transfers\n",
           (unsigned long long)atomic_load(&server.served), (unsigned long long)atomic_load(&server.events),
           (unsigned long long)atomic_load(&server.in_disk));
    CHECK_THAT((workload == PC_WORKLOAD_DISK) == (atomic_load(&server.in_disk) > 0), "O_DIRECT met no missing page");
    serve_the_rest(&server);
    after = run_until_operations(b, &after, some_operations[workload]);
    pause_machine(b);
    CHECK(verify_ok(b).nonce == before.nonce);
    atomic_store(&server.stop, true); /* first of all, as it looks at the machine */
    pthread_join(server.thread, NULL);
    close_machine(b);
    close_machine(a);
    close(server.uffd);
}

/* ---- cases: stopping where it is hard ---- */

/* A vCPU that waits for a page which does not come: pause must return in time, and the machine be whole afterwards. On
 * hardware the pause succeeds; a KVM that emulates the guest cannot be interrupted there and the pause says so. */
static void pause_blocked(uint32_t workload)
{
    struct pc_machine_config here = make_config(PC_ENGINE_KVM, workload, 1, PC_MEMORY_MEMFD), there;
    static struct saved blob;
    struct server server;
    struct pc_machine *a, *b;
    struct pc_machine_stats before;
    uint64_t begin_ns, took_ns;
    int rc;

    here.working_set_bytes = 2 * MIB;
    there = make_twin(&here, PC_MEMORY_ANON);
    a = boot_and_run(&here, some_operations[workload]);
    pause_machine(a);
    before = stats_of(a);
    arm(&server, &here, &there);
    b = open_machine(&there);
    save(a, &blob);
    load(b, &blob);
    atomic_store(&server.withhold, true);
    start_serving(&server);
    CHECK(pc_machine_resume(b) == 0);
    while (!has_event(server.uffd))
        usleep(1000);
    for (int i = 0; i < 3; i++) {
        begin_ns = pc_now_ns();
        error[0] = 0;
        rc = pc_machine_pause(b, 300, error, sizeof error);
        took_ns = pc_now_ns() - begin_ns;
        CHECK_THAT(rc == 0 || rc == -ETIMEDOUT, "%d %s", rc, error);
        CHECK_THAT(rc == 0 || strstr(error, "vCPU 0"), "%s", error);
        CHECK_THAT(took_ns < 2000000000ull, "%llu ns", (unsigned long long)took_ns);
        CHECK(stats_of(b).state == (rc ? PC_MACHINE_RUNNING : PC_MACHINE_PAUSED));
        CHECK(pc_machine_resume(b) == 0);
    }
    (void)printf("     pause while blocked: %s\n", rc ? error : "done");
    atomic_store(&server.withhold, false);
    run_until_operations(b, &before, some_operations[workload]);
    pause_machine(b);
    serve_the_rest(&server);
    verify_ok(b);
    close_machine(b);
    close_machine(a);
    stop_serving(&server);
}

/* Close returns even so; where it could not end a thread, it can once that thread's page has come. */
static void close_blocked(void)
{
    struct pc_machine_config here = make_config(PC_ENGINE_KVM, PC_WORKLOAD_RANDOM, 2, PC_MEMORY_MEMFD), there;
    static struct saved blob;
    struct server server;
    struct pc_machine *a, *b;
    struct pc_machine_stats stats;
    uint64_t begin_ns;
    int rc;

    here.working_set_bytes = MIB;
    there = make_twin(&here, PC_MEMORY_ANON);
    a = boot_and_run(&here, 256);
    pause_machine(a);
    arm(&server, &here, &there);
    b = open_machine(&there);
    save(a, &blob);
    load(b, &blob);
    CHECK(pc_machine_resume(b) == 0);
    while (!has_event(server.uffd))
        usleep(1000);
    stats = stats_of(b);
    begin_ns = pc_now_ns();
    rc = pc_machine_close(b, 300);
    CHECK_THAT(rc == 0 || rc == -ETIMEDOUT, "%d", rc);
    CHECK(pc_now_ns() - begin_ns < 2000000000ull);
    (void)printf("     close while blocked: %s\n", rc ? "a thread does not end" : "done");
    start_serving(&server);
    CHECK(rc == 0 || pc_machine_close(b, RUN_MS) == 0);
    for (uint32_t i = 0; i < stats.vcpus; i++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/task/%d", stats.vcpu[i].tid);
        while (access(path, F_OK) == 0)
            usleep(1000);
    }
    close_machine(a);
    stop_serving(&server);
}

/* Pause and resume as fast as they go, against vCPUs that exit often: a lost kick would end in the deadline. */
static void pause_storm(void)
{
    struct pc_machine_config config = make_config(PC_ENGINE_KVM, PC_WORKLOAD_DIRTY, 2, PC_MEMORY_ANON);
    struct pc_machine *machine;

    config.working_set_bytes = 8 * PAGE; /* short passes: mostly exits */
    machine = boot_and_run(&config, 100);
    for (int i = 0; i < 2000; i++) {
        pause_machine(machine);
        CHECK(pc_machine_resume(machine) == 0);
    }
    pause_machine(machine);
    verify_ok(machine);
    close_machine(machine);
}

static void *storm_thread(void *argument)
{
    struct pc_machine *machine = argument;

    for (int i = 0; i < 300; i++) {
        int rc = i & 1 ? pc_machine_pause(machine, PAUSE_MS, NULL, 0) : pc_machine_resume(machine);
        CHECK_THAT(rc == 0 || rc == -EBUSY, "%d", rc);
        stats_of(machine);
    }
    return NULL;
}

/* Several machines at once, several callers on each. */
static void side_by_side(void)
{
    struct pc_machine_config configs[3];
    struct pc_machine *machines[3];
    pthread_t threads[3][2];

    for (int i = 0; i < 3; i++) {
        configs[i] = make_config(PC_ENGINE_KVM, PC_WORKLOAD_RANDOM, 1, PC_MEMORY_ANON);
        configs[i].working_set_bytes = 64 * PAGE;
        configs[i].seed = (uint64_t)i;
        machines[i] = boot_and_run(&configs[i], 256);
    }
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < 2; k++)
            CHECK(pthread_create(&threads[i][k], NULL, storm_thread, machines[i]) == 0);
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 2; k++)
            pthread_join(threads[i][k], NULL);
        pause_machine(machines[i]);
        verify_ok(machines[i]);
    }
    CHECK(stats_of(machines[0]).nonce != stats_of(machines[1]).nonce);
    for (int i = 0; i < 3; i++) {
        CHECK(pc_machine_resume(machines[i]) == 0);
        CHECK_THAT(pc_machine_close(machines[i], PAUSE_MS) == 0, "running machines close too");
    }
}

/* ---- all of them ---- */

static void pause_blocked_dirty(void) { pause_blocked(PC_WORKLOAD_DIRTY); }
static void pause_blocked_disk(void) { pause_blocked(PC_WORKLOAD_DISK); }
#define MOVE(name, workload) \
    static void move_##name##_1(void) { run_and_move(workload, 1); } \
    static void move_##name##_2(void) { run_and_move(workload, 2); } \
    static void postcopy_##name##_1(void) { postcopy(workload, 1, PC_MEMORY_ANON); } \
    static void postcopy_##name##_2(void) { postcopy(workload, 2, PC_MEMORY_MEMFD); }
MOVE(idle, PC_WORKLOAD_IDLE)
MOVE(dirty, PC_WORKLOAD_DIRTY)
MOVE(random, PC_WORKLOAD_RANDOM)
MOVE(disk, PC_WORKLOAD_DISK)
static void move_phases_2(void) { run_and_move(PC_WORKLOAD_PHASES, 2); }
static void postcopy_sequential_2(void) { postcopy(PC_WORKLOAD_SEQUENTIAL, 2, PC_MEMORY_MEMFD); }

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN_FOR(move_idle_1, CASE_SECONDS);
    RUN_FOR(move_idle_2, CASE_SECONDS);
    RUN_FOR(move_dirty_1, CASE_SECONDS);
    RUN_FOR(move_dirty_2, CASE_SECONDS);
    RUN_FOR(move_random_1, CASE_SECONDS);
    RUN_FOR(move_random_2, CASE_SECONDS);
    RUN_FOR(move_disk_1, CASE_SECONDS);
    RUN_FOR(move_disk_2, CASE_SECONDS);
    RUN_FOR(move_phases_2, CASE_SECONDS);
    RUN_FOR(postcopy_idle_1, CASE_SECONDS);
    RUN_FOR(postcopy_idle_2, CASE_SECONDS);
    RUN_FOR(postcopy_dirty_1, CASE_SECONDS);
    RUN_FOR(postcopy_dirty_2, CASE_SECONDS);
    RUN_FOR(postcopy_random_1, CASE_SECONDS);
    RUN_FOR(postcopy_random_2, CASE_SECONDS);
    RUN_FOR(postcopy_disk_1, CASE_SECONDS);
    RUN_FOR(postcopy_disk_2, CASE_SECONDS);
    RUN_FOR(postcopy_sequential_2, CASE_SECONDS);
    RUN_FOR(pause_blocked_dirty, CASE_SECONDS);
    RUN_FOR(pause_blocked_disk, CASE_SECONDS);
    RUN_FOR(close_blocked, CASE_SECONDS);
    RUN_FOR(pause_storm, CASE_SECONDS);
    RUN_FOR(side_by_side, CASE_SECONDS);
    return test_end();
}

#endif
