/* SPDX-License-Identifier: Apache-2.0
 *
 * The kvm machine: runs, moves by copy and by postcopy, is paused where that is hard, and refuses what it must.
 *
 * Every case runs in a child of its own with a deadline, since the failure to expect here is a hang. Without a usable /dev/kvm
 * the program skips (exit 77) after the cases that need none. `test_kvm NAME` runs the cases whose name contains NAME.
 */
#if !defined(__x86_64__)

#include <errno.h>
#include <stdio.h>

#include "postcopy/core.h"
#include "postcopy/machine.h"

/* Elsewhere there is one thing to show: the refusal says why. */
int main(void)
{
    char error[PC_ERROR_BYTES] = "";
    struct pc_machine_config config = { .vcpus = 1, .disk_fd = -1 };
    struct pc_machine *machine;

    if (pc_machine_open(&config, &machine, error, sizeof error) != -ENOTSUP || !error[0] || machine)
        return 1;
    printf("skipped: %s\n", error);
    return 77;
}

#else

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "machine/machine.h"
#include "postcopy/core.h"
#include "postcopy/engine.h"
#include "postcopy/uffd.h"

#define PAGE     4096ull
#define MIB      (1ull << 20)
#define SKIPPED  77
#define RUN_MS   60000
#define PAUSE_MS 5000

#define CHECK(condition, ...) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s does not hold", __FILE__, __LINE__, #condition); \
            fprintf(stderr, " " __VA_ARGS__); \
            fprintf(stderr, "\n"); \
            _exit(1); \
        } \
    } while (0)

static _Noreturn void skip(const char *why)
{
    printf("  skipped: %s\n", why);
    fflush(stdout);
    _exit(SKIPPED);
}

static char error[PC_ERROR_BYTES];

/* ---- machines to test with ---- */

static int open_disk(uint64_t bytes)
{
    char path[256];
    const char *dir = getenv("TMPDIR");
    int fd;

    snprintf(path, sizeof path, "%s/postcopy-test-disk.%d", dir ? dir : "/var/tmp", (int)getpid());
    fd = pc_disk_open(path, bytes, error, sizeof error);
    unlink(path);
    if (fd == -EINVAL)
        skip(error);
    CHECK(fd >= 0, "%s", error);
    return fd;
}

static struct pc_machine_config make_config(uint32_t workload, uint32_t vcpus, uint64_t bytes, int kind)
{
    struct pc_machine_config config = { .vcpus = vcpus, .workload = workload, .seed = 0x5eed + vcpus, .disk_fd = -1 };
    uint64_t shared_bytes, private_bytes;

    CHECK(pc_machine_split_memory(bytes, vcpus, PAGE, &shared_bytes, &private_bytes, error, sizeof error) == 0, "%s", error);
    CHECK(shared_bytes + vcpus * private_bytes == bytes);
    CHECK(pc_memory_create(kind, shared_bytes, &config.shared, error, sizeof error) == 0, "%s", error);
    for (uint32_t i = 0; i < vcpus; i++)
        CHECK(pc_memory_create(kind, private_bytes, &config.private_[i], error, sizeof error) == 0, "%s", error);
    if (workload == PC_WORKLOAD_DISK) {
        config.disk_bytes = 2 * MIB * vcpus;
        config.disk_fd = open_disk(config.disk_bytes);
    }
    return config;
}

/* The same machine over memory of its own. */
static struct pc_machine_config make_twin(const struct pc_machine_config *of, int kind)
{
    struct pc_machine_config config = *of;

    CHECK(pc_memory_create(kind, of->shared.size_bytes, &config.shared, error, sizeof error) == 0, "%s", error);
    for (uint32_t i = 0; i < of->vcpus; i++)
        CHECK(pc_memory_create(kind, of->private_[i].size_bytes, &config.private_[i], error, sizeof error) == 0, "%s", error);
    return config;
}

static struct pc_memory *block(struct pc_machine_config *config, uint32_t index)
{
    return index ? &config->private_[index - 1] : &config->shared;
}

static void copy_memory(struct pc_machine_config *to, struct pc_machine_config *from)
{
    for (uint32_t i = 0; i <= from->vcpus; i++)
        memcpy(block(to, i)->base, block(from, i)->base, block(from, i)->size_bytes);
}

static struct pc_machine *open_machine(const struct pc_machine_config *config)
{
    struct pc_machine *machine;
    int rc = pc_machine_open(config, &machine, error, sizeof error);

    if (rc == -ENOENT || rc == -EACCES || rc == -EPERM || rc == -ENOTSUP)
        skip(error);
    CHECK(rc == 0, "%d %s", rc, error);
    return machine;
}

static struct pc_machine_stats stats_of(struct pc_machine *machine)
{
    struct pc_machine_stats stats;

    CHECK(pc_machine_stats(machine, &stats) == 0);
    return stats;
}

/* Until every vCPU is ready and has announced `more` operations beyond what `since` knows (NULL: beyond none). */
static struct pc_machine_stats run_until(struct pc_machine *machine, const struct pc_machine_stats *since, uint64_t more)
{
    uint64_t until_ns = pc_now_ns() + RUN_MS * 1000000ull;
    struct pollfd pfd = { .fd = pc_machine_event_fd(machine), .events = POLLIN };

    for (;;) {
        struct pc_machine_stats stats = stats_of(machine);
        bool done = stats.ready && stats.nonce;
        uint64_t count;

        for (uint32_t i = 0; i < stats.vcpus; i++)
            done &= stats.vcpu[i].operations >= (since ? since->vcpu[i].operations : 0) + more;
        CHECK(stats.state == PC_MACHINE_RUNNING, "%s", stats.failure_text);
        CHECK(stats.failures == 0, "%s", stats.failure_text);
        if (done)
            return stats;
        CHECK(pc_now_ns() < until_ns, "the guest makes no progress");
        if (poll(&pfd, 1, 100) > 0)
            CHECK(read(pfd.fd, &count, sizeof count) == sizeof count);
    }
}

static void pause_machine(struct pc_machine *machine)
{
    int rc = pc_machine_pause(machine, PAUSE_MS, error, sizeof error);

    CHECK(rc == 0, "%d %s", rc, error);
}

static struct pc_machine_check verify_ok(struct pc_machine *machine)
{
    struct pc_machine_check check;
    int rc = pc_machine_verify(machine, &check);

    CHECK(rc == 0, "%d", rc);
    CHECK(check.ok, "%s (%u bad)", check.text, check.bad_pages);
    return check;
}

struct blob {
    uint8_t *data;
    size_t bytes;
};

static struct blob save(struct pc_machine *machine)
{
    int64_t need = pc_machine_save_state(machine, NULL, 0, error, sizeof error), n;
    struct blob blob;

    CHECK(need > 0, "%lld %s", (long long)need, error);
    blob.bytes = (size_t)need;
    blob.data = malloc(blob.bytes);
    CHECK(blob.data);
    n = pc_machine_save_state(machine, blob.data, blob.bytes, error, sizeof error);
    CHECK(n == need, "%lld, then %lld: %s", (long long)need, (long long)n, error);
    return blob;
}

static void load(struct pc_machine *machine, struct blob blob)
{
    int rc = pc_machine_load_state(machine, blob.data, blob.bytes, error, sizeof error);

    CHECK(rc == 0, "%d %s", rc, error);
}

static struct pc_machine *boot_and_run(const struct pc_machine_config *config, uint64_t operations)
{
    struct pc_machine *machine = open_machine(config);

    CHECK(pc_machine_boot(machine) == 0);
    CHECK(pc_machine_resume(machine) == 0);
    run_until(machine, NULL, operations);
    return machine;
}

static void not_backwards(const struct pc_machine_stats *before, const struct pc_machine_stats *after)
{
    CHECK(after->serial_bytes >= before->serial_bytes);
    CHECK(after->disk_reads >= before->disk_reads && after->disk_writes >= before->disk_writes);
    for (uint32_t i = 0; i < before->vcpus; i++) {
        CHECK(after->vcpu[i].marks >= before->vcpu[i].marks);
        CHECK(after->vcpu[i].operations >= before->vcpu[i].operations);
    }
}

static const uint64_t some_operations[] = {
    [PC_WORKLOAD_IDLE] = 3, [PC_WORKLOAD_DIRTY] = 10000, [PC_WORKLOAD_RANDOM] = 1024, [PC_WORKLOAD_DISK] = 32,
};

/* ---- cases: life and moves ---- */

/* Boot, pause and resume many times, move to a second machine by copying, run on there, move back. */
static void run_and_move(uint32_t workload, uint32_t vcpus)
{
    struct pc_machine_config here = make_config(workload, vcpus, 16 * MIB, PC_MEMORY_MEMFD), there;
    struct pc_machine *a, *b;
    struct pc_machine_stats before, after;
    struct blob blob;
    uint64_t nonce;

    here.working_set_bytes = 3 * MIB;
    there = make_twin(&here, PC_MEMORY_ANON);
    a = open_machine(&here);
    CHECK(pc_machine_boot(a) == 0);
    CHECK(pc_machine_resume(a) == 0);
    /* The start too is a state to stop in: page by page, in the initial pass, at the barrier. */
    for (int i = 0; i < 20; i++) {
        usleep((useconds_t)(500 * i));
        pause_machine(a);
        verify_ok(a);
        CHECK(pc_machine_resume(a) == 0);
    }
    run_until(a, NULL, some_operations[workload]);
    pause_machine(a);
    before = stats_of(a);
    CHECK(before.state == PC_MACHINE_PAUSED && before.paused_ns > before.first_run_ns);
    nonce = verify_ok(a).nonce;
    CHECK(nonce && nonce == before.nonce);

    for (int hop = 0; hop < 2; hop++) {
        struct pc_machine_config *from = hop ? &there : &here, *to = hop ? &here : &there;
        blob = save(a);
        CHECK(pc_machine_close(a, PAUSE_MS) == 0);
        copy_memory(to, from);
        b = open_machine(to);
        load(b, blob);
        free(blob.data);
        CHECK(stats_of(b).nonce == 0, "the nonce must not be device state");
        CHECK(stats_of(b).ready);
        verify_ok(b);
        CHECK(pc_machine_resume(b) == 0);
        after = run_until(b, &before, some_operations[workload]);
        CHECK(after.nonce == nonce, "the machine has rebooted");
        CHECK(after.first_run_ns);
        not_backwards(&before, &after);
        pause_machine(b);
        CHECK(verify_ok(b).nonce == nonce);
        before = stats_of(b);
        a = b;
    }
    CHECK(workload != PC_WORKLOAD_DIRTY || before.serial_bytes);
    CHECK(workload != PC_WORKLOAD_DISK || (before.disk_reads && before.disk_writes && !before.disk_errors));
    CHECK(pc_machine_close(a, PAUSE_MS) == 0);
}

/* A page server and pager in one: copies a page of `from` to where a fault on `to` asks for it. */
struct server {
    int uffd;
    struct pc_machine_config *from, *to;
    pthread_t thread;
    _Atomic bool stop, hold;
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
            CHECK(rc == 0, "%d", rc);
        if (rc == 0)
            atomic_fetch_add(&server->served, 1);
        return;
    }
    CHECK(0, "fault outside of the machine");
}

static void *serve(void *argument)
{
    struct server *server = argument;

    while (!atomic_load(&server->stop)) {
        struct pollfd pfd = { .fd = server->uffd, .events = POLLIN };
        struct uffd_msg messages[64];
        ssize_t n;

        if (atomic_load(&server->hold)) {
            usleep(1000);
            continue;
        }
        if (poll(&pfd, 1, 20) <= 0)
            continue;
        n = read(server->uffd, messages, sizeof messages);
        for (ssize_t i = 0; i < n / (ssize_t)sizeof *messages; i++) {
            struct pc_machine *machine = atomic_load(&server->machine);
            atomic_fetch_add(&server->events, 1);
            if (machine) {
                struct pc_machine_stats stats = stats_of(machine);
                for (uint32_t k = 0; k < stats.vcpus; k++)
                    atomic_fetch_add(&server->in_disk, stats.vcpu[k].activity == PC_VCPU_DISK);
            }
            serve_page(server, messages[i].arg.pagefault.address & ~(PAGE - 1));
        }
    }
    return NULL;
}

static void arm(struct server *server, struct pc_machine_config *from, struct pc_machine_config *to)
{
    *server = (struct server){ .from = from, .to = to };
    server->uffd = pc_uffd_open(PC_UFFD_ANY, 0, NULL);
    if (server->uffd < 0)
        skip("no userfaultfd");
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
    struct pc_machine_config here = make_config(workload, vcpus, 16 * MIB, PC_MEMORY_MEMFD), there = make_twin(&here, kind);
    struct pc_machine_stats before, after;
    struct server server;
    struct pc_machine *a, *b;

    here.working_set_bytes = there.working_set_bytes = 8 * MIB;
    a = boot_and_run(&here, some_operations[workload]);
    pause_machine(a);
    verify_ok(a);
    before = stats_of(a);

    arm(&server, &here, &there);
    b = open_machine(&there);
    load(b, save(a));
    /* Nobody serves yet: had one of these touched guest memory, it would not have returned. */
    CHECK(!has_event(server.uffd), "opening or loading touched guest memory");
    atomic_store(&server.machine, b);
    start_serving(&server);
    CHECK(pc_machine_resume(b) == 0);
    after = run_until(b, &before, some_operations[workload]);
    CHECK(after.nonce == before.nonce);
    not_backwards(&before, &after);
    CHECK(atomic_load(&server.served) > 0);
    /* Pausing and moving the state once more, in the midst of it. */
    for (int i = 0; i < 5; i++) {
        pause_machine(b);
        free(save(b).data);
        CHECK(pc_machine_resume(b) == 0);
        usleep(20000);
    }
    printf("  %llu pages on demand, %llu fault events, %llu during disk transfers\n",
           (unsigned long long)atomic_load(&server.served), (unsigned long long)atomic_load(&server.events),
           (unsigned long long)atomic_load(&server.in_disk));
    CHECK((workload == PC_WORKLOAD_DISK) == (atomic_load(&server.in_disk) > 0), "O_DIRECT met no missing page");
    serve_the_rest(&server);
    after = run_until(b, &after, some_operations[workload]);
    pause_machine(b);
    CHECK(verify_ok(b).nonce == before.nonce);
    atomic_store(&server.stop, true); /* first of all, as it looks at the machine */
    pthread_join(server.thread, NULL);
    CHECK(pc_machine_close(b, PAUSE_MS) == 0);
    CHECK(pc_machine_close(a, PAUSE_MS) == 0);
    close(server.uffd);
}

/* ---- cases: stopping where it is hard ---- */

/* A vCPU that waits for a page which does not come: pause must return in time, and the machine be whole afterwards. On
 * hardware the pause succeeds; a KVM that emulates the guest cannot be interrupted there and the pause says so. */
static void pause_blocked(uint32_t workload)
{
    struct pc_machine_config here = make_config(workload, 1, 16 * MIB, PC_MEMORY_MEMFD), there;
    struct server server;
    struct pc_machine *a, *b;
    struct pc_machine_stats before;
    uint64_t begin_ns, took_ns;
    int rc;

    here.working_set_bytes = 4 * MIB;
    there = make_twin(&here, PC_MEMORY_ANON);
    a = boot_and_run(&here, some_operations[workload]);
    pause_machine(a);
    before = stats_of(a);
    arm(&server, &here, &there);
    b = open_machine(&there);
    load(b, save(a));
    atomic_store(&server.hold, true);
    start_serving(&server);
    CHECK(pc_machine_resume(b) == 0);
    while (!has_event(server.uffd))
        usleep(1000);
    for (int i = 0; i < 3; i++) {
        begin_ns = pc_now_ns();
        error[0] = 0;
        rc = pc_machine_pause(b, 300, error, sizeof error);
        took_ns = pc_now_ns() - begin_ns;
        CHECK(rc == 0 || rc == -ETIMEDOUT, "%d %s", rc, error);
        CHECK(rc == 0 || strstr(error, "vCPU 0"), "%s", error);
        CHECK(took_ns < 2000000000ull, "%llu ns", (unsigned long long)took_ns);
        CHECK(stats_of(b).state == (rc ? PC_MACHINE_RUNNING : PC_MACHINE_PAUSED));
        CHECK(pc_machine_resume(b) == 0);
    }
    printf("  pause while blocked: %s\n", rc ? error : "done");
    atomic_store(&server.hold, false);
    run_until(b, &before, some_operations[workload]);
    pause_machine(b);
    serve_the_rest(&server);
    verify_ok(b);
    CHECK(pc_machine_close(b, PAUSE_MS) == 0);
    CHECK(pc_machine_close(a, PAUSE_MS) == 0);
    stop_serving(&server);
}

/* Close returns even so; where it could not end a thread, it can once that thread's page has come. */
static void close_blocked(void)
{
    struct pc_machine_config here = make_config(PC_WORKLOAD_RANDOM, 2, 16 * MIB, PC_MEMORY_MEMFD), there;
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
    load(b, save(a));
    CHECK(pc_machine_resume(b) == 0);
    while (!has_event(server.uffd))
        usleep(1000);
    stats = stats_of(b);
    begin_ns = pc_now_ns();
    rc = pc_machine_close(b, 300);
    CHECK(rc == 0 || rc == -ETIMEDOUT, "%d", rc);
    CHECK(pc_now_ns() - begin_ns < 2000000000ull);
    printf("  close while blocked: %s\n", rc ? "a thread does not end" : "done");
    start_serving(&server);
    CHECK(rc == 0 || pc_machine_close(b, RUN_MS) == 0);
    for (uint32_t i = 0; i < stats.vcpus; i++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/task/%d", stats.vcpu[i].tid);
        while (access(path, F_OK) == 0)
            usleep(1000);
    }
    CHECK(pc_machine_close(a, PAUSE_MS) == 0);
    stop_serving(&server);
}

/* Pause and resume as fast as they go, against vCPUs that exit often: a lost kick would end in the deadline. */
static void pause_storm(void)
{
    struct pc_machine_config config = make_config(PC_WORKLOAD_DIRTY, 2, 16 * MIB, PC_MEMORY_ANON);
    struct pc_machine *machine;

    config.working_set_bytes = 8 * PAGE; /* short passes: mostly exits */
    machine = boot_and_run(&config, 100);
    for (int i = 0; i < 2000; i++) {
        pause_machine(machine);
        CHECK(pc_machine_resume(machine) == 0);
    }
    pause_machine(machine);
    verify_ok(machine);
    CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
}

static void *storm_thread(void *argument)
{
    struct pc_machine *machine = argument;

    for (int i = 0; i < 300; i++) {
        int rc = i & 1 ? pc_machine_pause(machine, PAUSE_MS, NULL, 0) : pc_machine_resume(machine);
        CHECK(rc == 0 || rc == -EBUSY, "%d", rc);
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
        configs[i] = make_config(PC_WORKLOAD_RANDOM, 1, 16 * MIB, PC_MEMORY_ANON);
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
        CHECK(pc_machine_close(machines[i], PAUSE_MS) == 0, "running machines close too");
    }
}

/* ---- cases: state ---- */

static int try_load(const struct pc_machine_config *config, const uint8_t *data, size_t bytes)
{
    struct pc_machine *machine = open_machine(config);
    int rc;

    error[0] = 0;
    rc = pc_machine_load_state(machine, data, bytes, error, sizeof error);
    CHECK(rc == 0 || error[0], "a refusal without a reason");
    CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
    return rc;
}

static void refresh_crc(uint8_t *data, size_t bytes)
{
    uint32_t crc = pc_crc32c(0, data + 32, bytes - 32);

    memcpy(data + 12, &crc, sizeof crc);
}

static void damaged_state(void)
{
    struct pc_machine_config config = make_config(PC_WORKLOAD_RANDOM, 2, 16 * MIB, PC_MEMORY_ANON), other;
    struct pc_machine *machine, *fresh;
    struct blob blob;
    uint8_t *copy;
    uint64_t x = 1;
    int accepted = 0;

    config.working_set_bytes = 64 * PAGE;
    machine = boot_and_run(&config, 256);
    CHECK(pc_machine_save_state(machine, NULL, 0, error, sizeof error) == -EBUSY, "saving a running machine");
    pause_machine(machine);
    blob = save(machine);
    copy = malloc(blob.bytes);
    CHECK(copy);

    /* A refused blob sets nothing, so one machine serves for all of them; an accepted one would make the next call fail. */
    fresh = open_machine(&config);
    for (size_t bytes = 0; bytes < blob.bytes; bytes++) {
        memcpy(copy, blob.data, blob.bytes);
        error[0] = 0;
        int rc = pc_machine_load_state(fresh, copy, bytes, error, sizeof error);
        CHECK(rc == -EBADMSG && error[0], "cut to %zu bytes: %d", bytes, rc);
    }
    for (size_t at = 0; at < blob.bytes; at++) {
        memcpy(copy, blob.data, blob.bytes);
        copy[at] ^= (uint8_t)(1u << at % 8);
        int rc = pc_machine_load_state(fresh, copy, blob.bytes, error, sizeof error);
        CHECK(rc == -EBADMSG || (rc == -EPROTO && at >= 8 && at < 12), "byte %zu: %d", at, rc);
    }
    /* With a checksum that fits, the parser stands alone. Truncated at every byte, and every section header damaged. */
    for (size_t bytes = 32; bytes < blob.bytes; bytes++) {
        uint64_t length = bytes;
        memcpy(copy, blob.data, blob.bytes);
        memcpy(copy + 16, &length, sizeof length);
        refresh_crc(copy, bytes);
        int rc = pc_machine_load_state(fresh, copy, bytes, error, sizeof error);
        CHECK(rc == -EBADMSG, "cut to %zu bytes: %d", bytes, rc);
    }
    for (size_t at = 32; at < blob.bytes;) {
        uint64_t length;
        memcpy(&length, blob.data + at + 8, sizeof length);
        for (size_t i = 0; i < 16; i++) {
            memcpy(copy, blob.data, blob.bytes);
            copy[at + i] ^= 0xff;
            refresh_crc(copy, blob.bytes);
            int rc = pc_machine_load_state(fresh, copy, blob.bytes, error, sizeof error);
            CHECK(rc == -EBADMSG || (i < 4 && rc == -EPROTO && strstr(error, "section")), "header at %zu: %d %s", at, rc, error);
        }
        at += 16 + ((length + 7) & ~7ull);
    }
    CHECK(pc_machine_close(fresh, PAUSE_MS) == 0);
    /* Anything at all inside of the sections: KVM and we may take or refuse it, nothing else. */
    for (int i = 0; i < 150; i++) {
        memcpy(copy, blob.data, blob.bytes);
        for (int k = 0; k < 4; k++) {
            x = pcg_rng_next(x);
            copy[32 + x % (blob.bytes - 32)] = (uint8_t)(x >> 40);
        }
        refresh_crc(copy, blob.bytes);
        accepted += try_load(&config, copy, blob.bytes) == 0;
    }
    printf("  %zu bytes; of 150 blobs with random damage under a good checksum %d were loaded\n", blob.bytes, accepted);

    other = config;
    other.seed++;
    CHECK(try_load(&other, blob.data, blob.bytes) == -EINVAL && strstr(error, "seed"), "%s", error);
    other = config;
    other.working_set_bytes += PAGE;
    CHECK(try_load(&other, blob.data, blob.bytes) == -EINVAL && strstr(error, "working set"), "%s", error);
    other = config;
    other.vcpus = 1;
    CHECK(try_load(&other, blob.data, blob.bytes) == -EINVAL && strstr(error, "vCPUs"), "%s", error);
    CHECK(pc_machine_load_state(machine, blob.data, blob.bytes, error, sizeof error) == -EBUSY, "loading over a live machine");
    CHECK(pc_machine_resume(machine) == 0);
    run_until(machine, NULL, 512);
    CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
    free(copy);
    free(blob.data);
}

/* Saved, loaded, saved again: the same bytes, except for the time stamp counter, which runs. */
static void state_round_trip(void)
{
    struct pc_machine_config config = make_config(PC_WORKLOAD_RANDOM, 2, 16 * MIB, PC_MEMORY_ANON);
    struct pc_machine *a, *b;
    struct blob one, two;
    unsigned different = 0;

    config.working_set_bytes = 64 * PAGE;
    a = boot_and_run(&config, 256);
    pause_machine(a);
    one = save(a);
    CHECK(pc_machine_close(a, PAUSE_MS) == 0);
    b = open_machine(&config);
    load(b, one);
    two = save(b);
    CHECK(one.bytes == two.bytes);
    for (size_t at = 32; at < one.bytes;) {
        uint64_t length;
        char tag[5] = { 0 };
        memcpy(tag, one.data + at, 4);
        memcpy(&length, one.data + at + 8, sizeof length);
        CHECK(memcmp(one.data + at, two.data + at, 16) == 0);
        at += 16;
        for (uint64_t i = 0; i < length; i += 8) {
            uint64_t x = 0, y = 0, left = length - i < 8 ? length - i : 8;
            uint32_t index = 0;
            memcpy(&x, one.data + at + i, left);
            memcpy(&y, two.data + at + i, left);
            if (x == y)
                continue;
            if (memcmp(tag, "MSRS", 4) == 0) {
                memcpy(&index, one.data + at + i - 8, 4);
                if (index == 0x10 || index == 0x6e0) { /* the counter, its deadline */
                    CHECK(index != 0x10 || y > x, "the time stamp counter went back");
                    continue;
                }
            }
            different++;
            printf("  %s +%llu (MSR 0x%x): 0x%llx became 0x%llx\n", tag, (unsigned long long)i, index, (unsigned long long)x,
                   (unsigned long long)y);
        }
        at += (length + 7) & ~7ull;
    }
    CHECK(different == 0, "%u words of state did not survive the move", different);
    CHECK(pc_machine_close(b, PAUSE_MS) == 0);
    free(one.data);
    free(two.data);
}

/* ---- cases: damage must be found ---- */

/* Moves a machine with one page damaged; whether from outside (verify) and by the guest (code) it is seen. */
static void find_damage(uint32_t workload, const char *how, uint32_t code)
{
    struct pc_machine_config here = make_config(workload, 1, 16 * MIB, PC_MEMORY_ANON), old, there;
    struct pc_machine_check check;
    struct pc_machine_stats before, after;
    struct pc_machine *a, *b;
    struct blob blob;
    uint8_t *page, *stale;
    uint64_t until_ns;

    here.working_set_bytes = 256 * PAGE;
    old = make_twin(&here, PC_MEMORY_ANON);
    there = make_twin(&here, PC_MEMORY_ANON);
    a = boot_and_run(&here, some_operations[workload]);
    pause_machine(a);
    before = stats_of(a);
    copy_memory(&old, &here);
    CHECK(pc_machine_resume(a) == 0);
    run_until(a, &before, 4 * some_operations[workload]);
    pause_machine(a);
    before = stats_of(a);
    blob = save(a);
    copy_memory(&there, &here);

    /* A page of the private block that changed in between, well away from tables and the operation in flight. */
    page = (uint8_t *)there.private_[0].base + 20 * PAGE;
    stale = (uint8_t *)old.private_[0].base + 20 * PAGE;
    while (memcmp(page, stale, PAGE / 2) == 0) {
        page += PAGE;
        stale += PAGE;
        CHECK(page < (uint8_t *)there.private_[0].base + there.private_[0].size_bytes, "no page changed");
    }
    if (strcmp(how, "stale") == 0)
        memcpy(page, stale, PAGE);
    else if (strcmp(how, "zero") == 0)
        memset(page, 0, PAGE);
    else if (strcmp(how, "torn") == 0)
        memcpy(page, stale, PAGE / 2);
    else
        ((uint8_t *)there.shared.base)[there.shared.size_bytes - 1] = 1; /* where nobody writes */
    b = open_machine(&there);
    load(b, blob);
    CHECK(pc_machine_verify(b, &check) == 0);
    CHECK(!check.ok && check.bad_pages >= 1 && check.text[0]);
    printf("  verify: %s\n", check.text);
    if (code) {
        CHECK(pc_machine_resume(b) == 0);
        until_ns = pc_now_ns() + RUN_MS * 1000000ull;
        do {
            usleep(1000);
            after = stats_of(b);
            CHECK(after.state == PC_MACHINE_RUNNING, "%s", after.failure_text);
            CHECK(pc_now_ns() < until_ns, "the guest does not notice");
        } while (after.failures == 0 || !after.failure_text[0]);
        CHECK(after.failure_code == code, "%s", after.failure_text);
        printf("  guest:  %s\n", after.failure_text);
        pause_machine(b);
        CHECK(pc_machine_verify(b, &check) == 0 && !check.ok && strstr(check.text, "reported"), "%s", check.text);
    }
    CHECK(pc_machine_close(b, PAUSE_MS) == 0);
    CHECK(pc_machine_close(a, PAUSE_MS) == 0);
}

/* Sets 8 bytes in every section of that tag: at an offset, or the value of an MSR. Returns what was there last. */
static uint64_t put_word(struct blob blob, const char *tag, uint64_t offset, uint32_t msr, uint64_t value)
{
    uint64_t old = 0;
    bool found = false;

    for (size_t at = 32; at < blob.bytes;) {
        uint64_t length, where = offset;
        uint32_t index;
        memcpy(&length, blob.data + at + 8, sizeof length);
        if (memcmp(blob.data + at, tag, 4) == 0) {
            for (; msr && where < length; where += 16) {
                memcpy(&index, blob.data + at + 16 + where, sizeof index);
                if (index == msr)
                    break;
            }
            CHECK(where < length);
            where += at + 16 + (msr ? 8 : 0);
            memcpy(&old, blob.data + where, sizeof old);
            memcpy(blob.data + where, &value, sizeof value);
            found = true;
        }
        at += 16 + ((length + 7) & ~7ull);
    }
    CHECK(found);
    refresh_crc(blob.data, blob.bytes);
    return old;
}

static uint64_t put_msr(struct blob blob, uint32_t index, uint64_t value)
{
    return put_word(blob, "MSRS", 0, index, value);
}

/* Every piece of CPU state that the guest keeps an eye on, lost on purpose: it must notice. */
static void find_lost_registers(void)
{
    static const struct {
        const char *tag;
        uint64_t offset;
        uint32_t msr;
        uint32_t code;
    } losses[] = {
        { "XSAV", 160 + 7 * 16, 0, PCG_FAIL_XMM },       /* XMM7 in the FXSAVE layout */
        { "XSAV", 160 + 7 * 16 + 8, 0, PCG_FAIL_XMM },
        { "DREG", 0, 0, PCG_FAIL_DEBUGREG },
        { "DREG", 24, 0, PCG_FAIL_DEBUGREG },
        { "SREG", 8 * sizeof(struct kvm_segment) + 2 * sizeof(struct kvm_dtable) + 8, 0, PCG_FAIL_CR2 },
        { "MSRS", 0, 0x175, PCG_FAIL_MSR },
        { "MSRS", 0, 0x277, PCG_FAIL_MSR },
        { "MSRS", 0, 0xc0000081, PCG_FAIL_MSR },
        { "MSRS", 0, 0xc0000082, PCG_FAIL_MSR },
        { "MSRS", 0, 0xc0000100, PCG_FAIL_MSR },
        { "MSRS", 0, 0xc0000101, PCG_FAIL_GS_BASE },
        { "MSRS", 0, 0xc0000102, PCG_FAIL_MSR },
    };
    struct pc_machine_config config = make_config(PC_WORKLOAD_RANDOM, 1, 16 * MIB, PC_MEMORY_ANON);
    struct pc_machine_config frozen = make_twin(&config, PC_MEMORY_ANON);
    struct pc_machine *machine;

    config.working_set_bytes = 64 * PAGE;
    machine = boot_and_run(&config, 256);
    for (size_t i = 0; i < sizeof losses / sizeof *losses; i++) {
        struct pc_machine_stats stats = stats_of(machine);
        /* XMM7 is dead between being read and being set again; if the machine stopped just there, once more. */
        for (int attempt = 0;; attempt++) {
            uint64_t until_ns;
            struct blob good, bad;

            run_until(machine, &stats, 256);
            pause_machine(machine);
            stats = stats_of(machine);
            good = save(machine);
            bad = save(machine);
            copy_memory(&frozen, &config);
            CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
            put_word(bad, losses[i].tag, losses[i].offset, losses[i].msr, 0);
            machine = open_machine(&config);
            load(machine, bad);
            CHECK(pc_machine_resume(machine) == 0);
            until_ns = pc_now_ns() + 3000000000ull;
            do {
                usleep(1000);
                stats = stats_of(machine);
            } while (stats.state == PC_MACHINE_RUNNING && !stats.failure_text[0] && pc_now_ns() < until_ns);
            CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
            /* Back to the last good moment. */
            copy_memory(&config, &frozen);
            machine = open_machine(&config);
            load(machine, good);
            CHECK(pc_machine_resume(machine) == 0);
            free(good.data);
            free(bad.data);
            if (stats.failure_text[0])
                break;
            CHECK(attempt < 5, "the guest did not notice the loss of %s +%llu 0x%x", losses[i].tag,
                  (unsigned long long)losses[i].offset, losses[i].msr);
        }
        CHECK(stats.failure_code == losses[i].code, "%s", stats.failure_text);
        printf("  %s\n", stats.failure_text);
    }
    run_until(machine, NULL, 0);
    CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
}

/* The time stamp counter never goes back: a KVM that sets it is believed, one that cannot must be behind nothing. */
static void time_stamp_counter(void)
{
    static const uint64_t tscs[] = { 1ull << 20, 1ull << 60 };
    struct pc_machine_config config = make_config(PC_WORKLOAD_RANDOM, 1, 16 * MIB, PC_MEMORY_ANON);
    struct pc_machine *machine;
    struct blob blob;

    config.working_set_bytes = 64 * PAGE;
    machine = boot_and_run(&config, 256);
    pause_machine(machine);
    blob = save(machine);
    CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
    for (size_t i = 0; i < 2; i++) {
        const struct pcg_vcpu *guest = (struct pcg_vcpu *)((uint8_t *)config.shared.base + PCG_VCPU_PAGES);
        uint64_t now, saw = guest->last_tsc;
        struct blob again;
        int rc;

        machine = open_machine(&config);
        put_msr(blob, 0x10, tscs[i]);
        rc = pc_machine_load_state(machine, blob.data, blob.bytes, error, sizeof error);
        CHECK(rc == 0 || (rc == -ENOTSUP && strstr(error, "time stamp")), "%d %s", rc, error);
        if (rc) {
            printf("  %s\n", error);
        } else {
            struct pc_machine_stats stats;
            again = save(machine);
            now = put_msr(again, 0x10, 0);
            CHECK(now >= tscs[i]);
            if (now < saw) { /* it was set: back in time, so the guest must complain */
                CHECK(pc_machine_resume(machine) == 0);
                do {
                    usleep(1000);
                    stats = stats_of(machine);
                } while (!stats.failure_text[0]);
                CHECK(stats.failure_code == PCG_FAIL_TSC, "%s", stats.failure_text);
            }
            free(again.data);
        }
        CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
    }
    free(blob.data);
}

/* The guest reads every word that comes from its disk. */
static void find_bad_disk(void)
{
    struct pc_machine_config config = make_config(PC_WORKLOAD_DISK, 1, 16 * MIB, PC_MEMORY_ANON);
    struct pc_machine *machine;
    struct pc_machine_stats stats;
    struct pc_machine_check check;
    uint64_t until_ns;
    void *zeros;

    config.working_set_bytes = MIB;
    machine = boot_and_run(&config, 16);
    pause_machine(machine);
    CHECK(posix_memalign(&zeros, PAGE, MIB) == 0);
    memset(zeros, 0, MIB);
    CHECK(pwrite(config.disk_fd, zeros, MIB, MIB / 2) == (ssize_t)MIB);
    free(zeros);
    CHECK(pc_machine_verify(machine, &check) == 0 && !check.ok && strstr(check.text, "disk"), "%s", check.text);
    CHECK(pc_machine_resume(machine) == 0);
    until_ns = pc_now_ns() + RUN_MS * 1000000ull;
    do {
        usleep(1000);
        stats = stats_of(machine);
        CHECK(pc_now_ns() < until_ns, "the guest does not notice");
    } while (!stats.failure_text[0]);
    CHECK(stats.failure_code == PCG_FAIL_DISK_DATA, "%s", stats.failure_text);
    printf("  %s\n", stats.failure_text);
    CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
}

/* An exception, an MMIO access: the machine fails with a sentence, and stays failed. */
static void guest_crash(void)
{
    static const struct {
        uint8_t code[16];
        const char *says;
    } crashes[] = {
        { { 0x0f, 0x0b }, "exception" },                                              /* ud2 */
        { { 0xb8, 0, 0, 0, 0xd0, 0x89, 0x00 }, "no memory" },                         /* mov [0xd0000000], eax */
        { { 0x0f, 0x01, 0x1c, 0x25, 0x00, 0x08, 0, 0, 0x0f, 0x0b }, "triple fault" }, /* lidt [0x800]: zeros; ud2 */
    };

    for (size_t i = 0; i < sizeof crashes / sizeof *crashes; i++) {
        struct pc_machine_config config = make_config(PC_WORKLOAD_IDLE, 2, 16 * MIB, PC_MEMORY_ANON);
        struct pc_machine *machine = open_machine(&config);
        struct pc_machine_stats stats;
        struct pc_machine_check check;

        CHECK(pc_machine_boot(machine) == 0);
        memcpy((uint8_t *)config.shared.base + PCG_IMAGE, crashes[i].code, sizeof crashes[i].code);
        /* The second access needs a page table entry that leads to the hole between the slots. */
        ((uint64_t *)((uint8_t *)config.shared.base + PCG_PAGE_TABLES))[512 + 3] = PCG_PAGE_TABLES + 2 * PAGE + 0x23;
        ((uint64_t *)((uint8_t *)config.shared.base + PCG_PAGE_TABLES))[1024 + (0xd0000000 >> 21) % 512] = 0xd00000e3;
        CHECK(pc_machine_resume(machine) == 0);
        do {
            usleep(1000);
            stats = stats_of(machine);
        } while (stats.state == PC_MACHINE_RUNNING);
        CHECK(stats.state == PC_MACHINE_FAILED);
        printf("  %s\n", stats.failure_text);
        CHECK(strstr(stats.failure_text, crashes[i].says), "%s", stats.failure_text);
        CHECK(pc_machine_resume(machine) == -EIO);
        CHECK(pc_machine_pause(machine, PAUSE_MS, error, sizeof error) == -EIO && error[0]);
        CHECK(pc_machine_save_state(machine, NULL, 0, error, sizeof error) == -EIO);
        CHECK(pc_machine_verify(machine, &check) == -EIO);
        CHECK(has_event(pc_machine_event_fd(machine)));
        CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
    }
}

/* ---- cases: refusals ---- */

static void hostile_disk(void)
{
    struct pc_machine_config config = make_config(PC_WORKLOAD_DISK, 2, 16 * MIB, PC_MEMORY_ANON);
    struct pc_machine *machine = open_machine(&config);
    uint64_t slice = config.disk_bytes / 2, ram = config.shared.size_bytes, private_gpa = machine->layout.private_gpa[1];
    const struct {
        uint32_t op;
        uint64_t offset, gpa, bytes;
    } refused[] = {
        { 0, 0, 0x100000, 4096 },                                /* no such operation */
        { 3, 0, 0x100000, 4096 },
        { PCG_DISK_READ, 0, 0x100000, 0 },                       /* nothing */
        { PCG_DISK_READ, 0, 0x100000, PCG_DISK_REQUEST_MAX * 2 },
        { PCG_DISK_READ, 0, 0x100000, UINT64_MAX & ~4095ull },
        { PCG_DISK_READ, slice, 0x100000, 4096 },                /* behind the slice */
        { PCG_DISK_READ, slice - 4096, 0x100000, 8192 },
        { PCG_DISK_WRITE, UINT64_MAX - 4095, 0x100000, 8192 },   /* wraps */
        { PCG_DISK_READ, 0, ram, 4096 },                         /* behind the RAM */
        { PCG_DISK_READ, 0, ram - 4096, 8192 },
        { PCG_DISK_READ, 0, UINT64_MAX - 4095, 8192 },           /* wraps */
        { PCG_DISK_READ, 0, 0xd0000000, 4096 },                  /* in the hole */
        { PCG_DISK_READ, 0, private_gpa + config.private_[1].size_bytes, 4096 },
        { PCG_DISK_READ, 0, private_gpa + config.private_[1].size_bytes - 4096, 8192 },
        { PCG_DISK_READ, 0, 0x100001, 4096 },                    /* crooked */
        { PCG_DISK_READ, 1, 0x100000, 4096 },
        { PCG_DISK_READ, 0, 0x100000, 4095 },
    };
    struct pc_vcpu *vcpu = &machine->vcpu[1];
    uint8_t *buffer = config.shared.base;

    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        CHECK(pc_disk_request(vcpu, refused[i].op, refused[i].offset, refused[i].gpa, refused[i].bytes) == PCG_DISK_BAD_REQUEST,
              "request %zu", i);
    CHECK(stats_of(machine).disk_errors == sizeof refused / sizeof *refused);
    CHECK(stats_of(machine).disk_reads == 0 && stats_of(machine).disk_writes == 0);
    /* And the last possible ones are served, each vCPU in its own slice. */
    memset(buffer + 0x100000, 0xa5, 4096);
    CHECK(pc_disk_request(vcpu, PCG_DISK_WRITE, slice - 4096, 0x100000, 4096) == PCG_DISK_OK);
    CHECK(pc_disk_request(vcpu, PCG_DISK_READ, slice - 4096, ram - 4096, 4096) == PCG_DISK_OK);
    CHECK(memcmp(buffer + 0x100000, buffer + ram - 4096, 4096) == 0);
    CHECK(pc_disk_request(&machine->vcpu[0], PCG_DISK_READ, slice - 4096, ram - 4096, 4096) == PCG_DISK_OK);
    CHECK(pc_is_zero(buffer + ram - 4096, 4096), "one vCPU reads the slice of another");
    /* A file that was cut behind our back is an I/O error, not a hang. */
    CHECK(ftruncate(config.disk_fd, 4096) == 0);
    CHECK(pc_disk_request(vcpu, PCG_DISK_READ, slice - 4096, ram - 4096, 4096) == PCG_DISK_IO_ERROR);
    CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
}

static void bad_configuration(void)
{
    struct pc_machine_config good = make_config(PC_WORKLOAD_RANDOM, 2, 16 * MIB, PC_MEMORY_ANON), config;
    struct pc_machine_check check;
    struct pc_machine *machine;
    uint64_t a, b;

#define REFUSED(change) \
    do { \
        config = good; \
        change; \
        error[0] = 0; \
        machine = (struct pc_machine *)1; \
        CHECK(pc_machine_open(&config, &machine, error, sizeof error) == -EINVAL, "%s", #change); \
        CHECK(error[0] && !machine); \
    } while (0)
    REFUSED(config.vcpus = 0);
    REFUSED(config.vcpus = 9);
    REFUSED(config.workload = 4);
    REFUSED(config.shared.base = NULL);
    REFUSED(config.shared.base = (uint8_t *)good.shared.base + 1);
    REFUSED(config.shared.size_bytes = 4096);
    REFUSED(config.shared.size_bytes += 1);
    REFUSED(config.private_[1].size_bytes = 1ull << 40);
    REFUSED(config.private_[1].base = NULL);
    REFUSED(config.workload = PC_WORKLOAD_DISK);
    REFUSED((config.workload = PC_WORKLOAD_DISK, config.disk_fd = 0, config.disk_bytes = MIB));
    REFUSED(config.working_set_bytes = 1);
#undef REFUSED
    CHECK(pc_machine_open(&(struct pc_machine_config){ 0 }, &machine, NULL, 0) == -EINVAL, "an error buffer may be absent");
    CHECK(pc_machine_split_memory(15 * MIB, 1, PAGE, &a, &b, error, sizeof error) == -EINVAL);
    CHECK(pc_machine_split_memory(1ull << 60, 1, PAGE, &a, &b, error, sizeof error) == -EINVAL);
    CHECK(pc_machine_split_memory(16 * MIB + 1, 1, PAGE, &a, &b, error, sizeof error) == -EINVAL);
    CHECK(pc_machine_split_memory(16 * MIB, 9, PAGE, &a, &b, error, sizeof error) == -EINVAL);
    CHECK(pc_machine_split_memory(16 * MIB, 8, 2 * MIB, &a, &b, error, sizeof error) == -EINVAL);
    CHECK(pc_machine_split_memory(16 * MIB, 1, 0, &a, &b, error, sizeof error) == -EINVAL);
    CHECK(pc_disk_open("/nowhere/at/all", MIB, error, sizeof error) == -ENOENT && error[0]);
    CHECK(pc_disk_open("/dev/null", MIB, error, sizeof error) < 0 && error[0]);

    machine = open_machine(&good);
    CHECK(pc_machine_resume(machine) == -EINVAL);
    CHECK(pc_machine_pause(machine, PAUSE_MS, error, sizeof error) == -EINVAL);
    CHECK(pc_machine_save_state(machine, NULL, 0, error, sizeof error) == -EBUSY);
    CHECK(pc_machine_verify(machine, &check) == -EBUSY);
    CHECK(pc_machine_boot(machine) == 0);
    CHECK(pc_machine_boot(machine) == -EBUSY);
    CHECK(pc_machine_pause(machine, PAUSE_MS, error, sizeof error) == 0, "paused already");
    CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
    CHECK(pc_machine_close(NULL, PAUSE_MS) == 0);
}

/* ---- cases without /dev/kvm ---- */

/* Follows the page tables that boot writes, as the processor would. */
static uint64_t walk(const uint8_t *ram, uint64_t gva)
{
    uint64_t table = PCG_PAGE_TABLES;

    for (int level = 3; level >= 1; level--) {
        uint64_t entry;
        memcpy(&entry, ram + table + (gva >> (12 + 9 * level) & 511) * 8, sizeof entry);
        CHECK(entry & 1, "gva 0x%llx is not mapped", (unsigned long long)gva);
        if (level == 1) {
            CHECK(entry & 0x80);
            return (entry & 0xffffffe00000ull) + (gva & 0x1fffff);
        }
        table = entry & 0xfffffffff000ull;
    }
    return 0;
}

static void large_layouts(void)
{
    static const struct {
        uint64_t shared_bytes, private_bytes;
        uint32_t vcpus;
    } sizes[] = {
        { 8 * MIB, 4 * MIB, 2 },        { 8 * MIB + PAGE, 3 * PAGE, 3 },      { 3072 * MIB, 0, 1 },
        { 3072 * MIB + PAGE, MIB, 8 },  { 5000 * MIB, 1500 * MIB, 2 },        { 1024 * MIB, 600 * 1024 * MIB / 8, 4 },
        { 200 * 1024 * MIB, 39 * 1024 * MIB, 8 },
    };

    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++) {
        struct pc_machine *machine = calloc(1, sizeof *machine);
        struct pc_machine_config *config;
        uint8_t *ram;

        CHECK(machine);
        config = &machine->config;
        machine->engine = &pc_engine_kvm;
        *config = (struct pc_machine_config){ .vcpus = sizes[n].vcpus, .workload = PC_WORKLOAD_RANDOM, .disk_fd = -1 };
        for (uint32_t i = 0; i <= config->vcpus; i++) {
            struct pc_memory *memory = block(config, i);
            memory->size_bytes = i ? sizes[n].private_bytes : sizes[n].shared_bytes;
            if (memory->size_bytes)
                memory->base = mmap(NULL, memory->size_bytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory->base == MAP_FAILED)
                skip("this process may not reserve that much address space");
        }
        CHECK(pc_layout_make(config, &machine->layout, error, sizeof error) == 0, "%s", error);
        ram = config->shared.base;
        CHECK(pc_boot_write(machine, ram) == 0);
        for (uint32_t i = 0; i <= config->vcpus; i++) {
            uint64_t bytes = block(config, i)->size_bytes, first = i ? PCG_PRIVATE_GVA + (i - 1) * PCG_PRIVATE_STRIDE : 0;
            for (uint64_t k = 0; bytes && k <= 1000; k++) {
                uint64_t offset = k == 1000 ? bytes - PAGE : bytes / PAGE * k / 1000 * PAGE, gva = first + offset;
                void *host = (uint8_t *)block(config, i)->base + offset;
                CHECK(pc_layout_gva(config, gva, PAGE) == host);
                CHECK(pc_layout_gpa(&machine->layout, walk(ram, gva), PAGE) == host, "size %zu, block %u, offset 0x%llx", n, i,
                      (unsigned long long)offset);
            }
            CHECK(!pc_layout_gva(config, first + bytes, 1));
            CHECK(!bytes || !pc_layout_gva(config, first + bytes - 8, 9));
        }
        CHECK(!pc_layout_gpa(&machine->layout, PCG_HOLE_BEGIN, 1) && !pc_layout_gpa(&machine->layout, PCG_HOLE_END - 1, 2));
        for (uint32_t i = 0; i < machine->layout.slot_count; i++)
            for (uint32_t k = 0; k < i; k++)
                CHECK(machine->layout.slots[k].gpa + machine->layout.slots[k].bytes <= machine->layout.slots[i].gpa);
        for (uint32_t i = 0; i <= config->vcpus; i++)
            if (block(config, i)->base)
                munmap(block(config, i)->base, block(config, i)->size_bytes);
        free(machine);
    }
}

/* A guest with memory on both sides of the hole, which runs there: the working set ends above 4 GiB. */
static void above_the_hole(void)
{
    struct pc_machine_config config = { .vcpus = 1, .workload = PC_WORKLOAD_DISK, .disk_fd = -1, .seed = 9 };
    struct pc_machine *machine;
    struct pcg_boot *boot;

    CHECK(pc_memory_create(PC_MEMORY_MEMFD, 3074 * MIB, &config.shared, error, sizeof error) == 0, "%s", error);
    config.disk_bytes = 2 * MIB;
    config.disk_fd = open_disk(config.disk_bytes);
    machine = open_machine(&config);
    CHECK(pc_machine_boot(machine) == 0);
    /* The whole block would take the guest minutes: only its last 4 MiB, which lie across the hole. The verifier goes by
     * the layout, so that changes with it. */
    boot = (struct pcg_boot *)((uint8_t *)config.shared.base + PCG_BOOT_INFO);
    boot->shared.gva = machine->layout.shared.gva = 3070 * MIB;
    boot->shared.pages = machine->layout.shared.pages = 4 * MIB / PAGE;
    CHECK(pc_machine_resume(machine) == 0);
    run_until(machine, NULL, 128);
    CHECK(pc_machine_pause(machine, PAUSE_MS, error, sizeof error) == 0, "%s", error);
    CHECK(stats_of(machine).disk_errors == 0);
    CHECK(!pc_is_zero((uint8_t *)config.shared.base + 3073 * MIB, 64 * PAGE));
    machine->layout.shared.gva = machine->layout.boot_bytes; /* what verify takes as the start of the zero pages */
    machine->layout.shared.pages = (3074 * MIB - machine->layout.boot_bytes) / PAGE;
    verify_ok(machine);
    CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
}

/* Nothing to pass or fail: the figures in docs/machines.md. POSTCOPY_TEST_MIB sets the memory of the machine. */
static void speed(void)
{
    static const char *const names[] = { "idle", "dirty", "random", "disk" };
    const char *mib = getenv("POSTCOPY_TEST_MIB");
    uint64_t bytes = (mib ? strtoull(mib, NULL, 0) : 16) * MIB;

    for (uint32_t workload = PC_WORKLOAD_DIRTY; workload <= PC_WORKLOAD_DISK; workload++) {
        struct pc_machine_config config = make_config(workload, 2, bytes, PC_MEMORY_MEMFD);
        uint64_t begin_ns = pc_now_ns(), ready_ns, end_ns;
        struct pc_machine *machine = boot_and_run(&config, 0);
        struct pc_machine_check before, after;

        ready_ns = pc_now_ns();
        pause_machine(machine);
        before = verify_ok(machine);
        begin_ns = ready_ns - begin_ns;
        CHECK(pc_machine_resume(machine) == 0);
        ready_ns = pc_now_ns();
        usleep(1000000);
        pause_machine(machine);
        end_ns = pc_now_ns();
        after = verify_ok(machine);
        printf("  %-6s %llu MiB: ready after %.2f s, %.0f operations/s for each vCPU, verified in %.2f s\n", names[workload],
               (unsigned long long)(bytes / MIB), (double)begin_ns / 1e9,
               (double)(after.operations - before.operations) / 2 / ((double)(end_ns - ready_ns) / 1e9),
               (double)(pc_now_ns() - end_ns) / 1e9);
        CHECK(pc_machine_close(machine, PAUSE_MS) == 0);
    }
}

/* ---- the runner ---- */

static void c_pause_blocked_dirty(void) { pause_blocked(PC_WORKLOAD_DIRTY); }
static void c_pause_blocked_disk(void) { pause_blocked(PC_WORKLOAD_DISK); }
static void c_stale_random(void) { find_damage(PC_WORKLOAD_RANDOM, "stale", 0); }
static void c_zero_random(void) { find_damage(PC_WORKLOAD_RANDOM, "zero", PCG_FAIL_CHECK_WORD); }
static void c_torn_random(void) { find_damage(PC_WORKLOAD_RANDOM, "torn", PCG_FAIL_CHECK_WORD); }
static void c_stale_dirty(void) { find_damage(PC_WORKLOAD_DIRTY, "stale", PCG_FAIL_PASS); }
static void c_stale_disk(void) { find_damage(PC_WORKLOAD_DISK, "stale", 0); }
static void c_zero_disk(void) { find_damage(PC_WORKLOAD_DISK, "zero", 0); }
static void c_stray_dirty(void) { find_damage(PC_WORKLOAD_DIRTY, "stray", 0); }
#define MOVE(name, workload) \
    static void c_move_##name##_1(void) { run_and_move(workload, 1); } \
    static void c_move_##name##_2(void) { run_and_move(workload, 2); } \
    static void c_postcopy_##name##_1(void) { postcopy(workload, 1, PC_MEMORY_ANON); } \
    static void c_postcopy_##name##_2(void) { postcopy(workload, 2, PC_MEMORY_MEMFD); }
MOVE(idle, PC_WORKLOAD_IDLE)
MOVE(dirty, PC_WORKLOAD_DIRTY)
MOVE(random, PC_WORKLOAD_RANDOM)
MOVE(disk, PC_WORKLOAD_DISK)

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    { "large-layouts", large_layouts },
    { "bad-configuration", bad_configuration },
    { "hostile-disk", hostile_disk },
    { "move-idle-1", c_move_idle_1 },
    { "move-idle-2", c_move_idle_2 },
    { "move-dirty-1", c_move_dirty_1 },
    { "move-dirty-2", c_move_dirty_2 },
    { "move-random-1", c_move_random_1 },
    { "move-random-2", c_move_random_2 },
    { "move-disk-1", c_move_disk_1 },
    { "move-disk-2", c_move_disk_2 },
    { "postcopy-idle-1", c_postcopy_idle_1 },
    { "postcopy-idle-2", c_postcopy_idle_2 },
    { "postcopy-dirty-1", c_postcopy_dirty_1 },
    { "postcopy-dirty-2", c_postcopy_dirty_2 },
    { "postcopy-random-1", c_postcopy_random_1 },
    { "postcopy-random-2", c_postcopy_random_2 },
    { "postcopy-disk-1", c_postcopy_disk_1 },
    { "postcopy-disk-2", c_postcopy_disk_2 },
    { "pause-blocked-dirty", c_pause_blocked_dirty },
    { "pause-blocked-disk", c_pause_blocked_disk },
    { "close-blocked", close_blocked },
    { "pause-storm", pause_storm },
    { "side-by-side", side_by_side },
    { "state-round-trip", state_round_trip },
    { "damaged-state", damaged_state },
    { "find-stale-random", c_stale_random },
    { "find-zero-random", c_zero_random },
    { "find-torn-random", c_torn_random },
    { "find-stale-dirty", c_stale_dirty },
    { "find-stale-disk", c_stale_disk },
    { "find-zero-disk", c_zero_disk },
    { "find-stray-dirty", c_stray_dirty },
    { "find-bad-disk", find_bad_disk },
    { "find-lost-registers", find_lost_registers },
    { "time-stamp-counter", time_stamp_counter },
    { "guest-crash", guest_crash },
    { "above-the-hole", above_the_hole },
    { "speed", speed },
};

#define CASE_SECONDS 100

/* Exit status of the child, -1 when it had to be killed. */
static int run_case(void (*run)(void))
{
    pid_t child;
    int status;

    fflush(NULL);
    child = fork();
    if (child == 0) {
        run();
        fflush(NULL);
        _exit(0);
    }
    if (child < 0)
        return -1;
    for (int i = 0; i < CASE_SECONDS * 100; i++) {
        if (waitpid(child, &status, WNOHANG) == child)
            return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
        usleep(10000);
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    fprintf(stderr, "  killed after %d s\n", CASE_SECONDS);
    return -1;
}

int main(int argc, char **argv)
{
    unsigned failed = 0, skipped = 0, passed = 0;

    setvbuf(stdout, NULL, _IOLBF, 0); /* what a case said is there even when it had to be killed */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t begin_ns = pc_now_ns();
        int rc;

        if (argc > 1 && !strstr(cases[i].name, argv[1]))
            continue;
        printf("%s\n", cases[i].name);
        rc = run_case(cases[i].run);
        printf("  %s, %.1f s\n", rc == 0 ? "ok" : rc == SKIPPED ? "skipped" : "FAILED",
               (double)(pc_now_ns() - begin_ns) / 1e9);
        if (rc == 0)
            passed++;
        else if (rc == SKIPPED)
            skipped++;
        else
            failed++;
    }
    printf("%u passed, %u skipped, %u failed\n", passed, skipped, failed);
    if (failed || (passed == 0 && skipped == 0))
        return 1;
    return skipped ? SKIPPED : 0;
}

#endif
