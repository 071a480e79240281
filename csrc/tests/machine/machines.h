/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of machines share: machines of either engine over memory of their own, made, run, moved and looked at. A call that
 * fails where it must not ends the case, with the reason.
 */
#ifndef PC_TESTS_MACHINES_H
#define PC_TESTS_MACHINES_H

#include "tests/support/test.h"

#include "machine/machine.h"
#include "postcopy/core.h"

#define PAGE     4096ull
#define MIB      (1ull << 20)
#define RUN_MS   60000 /* until a machine has made the progress that a test waits for: a bound, and a busy host is ten times as slow */
#define PAUSE_MS 5000

static char error[PC_ERROR_BYTES];

/* For calls that leave a reason in `error`. */
#define CHECK_OK(call)                                                          \
    do {                                                                        \
        int rc_ = (call);                                                       \
        if (rc_)                                                                \
            FAIL("%s: %d %s", #call, rc_, error);                               \
    } while (0)

/* A condition that says more than itself. */
#define CHECK_THAT(condition, ...)                                              \
    do {                                                                        \
        if (!(condition)) {                                                     \
            (void)fprintf(stderr, "not true: %s; ", #condition);                \
            FAIL(__VA_ARGS__);                                                  \
        }                                                                       \
    } while (0)

__attribute__((unused)) static struct pc_memory *block(struct pc_machine_config *config, uint32_t index)
{
    return index ? &config->private_[index - 1] : &config->shared;
}

/* The same machine over memory of its own. */
__attribute__((unused)) static struct pc_machine_config make_twin(const struct pc_machine_config *of, int kind)
{
    struct pc_machine_config config = *of;

    for (uint32_t i = 0; i <= config.vcpus; i++)
        CHECK_OK(pc_memory_create(kind, block(&config, i)->size_bytes, block(&config, i), error, sizeof error));
    return config;
}

__attribute__((unused)) static int open_disk(uint64_t bytes)
{
    char path[256];
    const char *dir = getenv("TMPDIR");
    int fd;

    (void)snprintf(path, sizeof path, "%s/postcopy-test-disk.%d", dir ? dir : "/var/tmp", (int)getpid());
    fd = pc_disk_open(path, bytes, error, sizeof error);
    (void)unlink(path);
    if (fd == -EINVAL)
        SKIP("odirect", "%s", error);
    CHECK_THAT(fd >= 0, "%s", error);
    return fd;
}

/* With 1 MiB of disk for each vCPU of the disk workload. */
__attribute__((unused)) static struct pc_machine_config make_config_of(uint64_t bytes, uint32_t engine, uint32_t workload,
                                                                       uint32_t vcpus, int kind)
{
    struct pc_machine_config config = {
        .engine = engine, .vcpus = vcpus, .workload = workload, .seed = 0x5eed + vcpus, .disk_fd = -1};
    uint64_t private_bytes = 0;

    CHECK_OK(pc_machine_split_memory(bytes, vcpus, PAGE, &config.shared.size_bytes, &private_bytes, error, sizeof error));
    CHECK_EQ(config.shared.size_bytes + vcpus * private_bytes, bytes);
    for (uint32_t i = 0; i < vcpus; i++)
        config.private_[i].size_bytes = private_bytes;
    config = make_twin(&config, kind);
    if (workload == PC_WORKLOAD_DISK) {
        config.disk_bytes = MIB * vcpus;
        config.disk_fd = open_disk(config.disk_bytes);
    }
    return config;
}

__attribute__((unused)) static struct pc_machine_config make_config(uint32_t engine, uint32_t workload, uint32_t vcpus, int kind)
{
    return make_config_of(16 * MIB, engine, workload, vcpus, kind);
}

__attribute__((unused)) static void copy_memory(struct pc_machine_config *to, struct pc_machine_config *from)
{
    for (uint32_t i = 0; i <= from->vcpus; i++)
        memcpy(block(to, i)->base, block(from, i)->base, block(from, i)->size_bytes);
}

__attribute__((unused)) static void drop_memory(struct pc_machine_config *config)
{
    for (uint32_t i = 0; i <= config->vcpus; i++)
        pc_memory_destroy(block(config, i));
}

__attribute__((unused)) static struct pc_machine *open_machine(const struct pc_machine_config *config)
{
    struct pc_machine *machine;
    int rc = pc_machine_open(config, &machine, error, sizeof error);

    if (config->engine == PC_ENGINE_KVM && (rc == -ENOENT || rc == -EACCES || rc == -EPERM || rc == -ENOTSUP))
        SKIP("kvm", "%s", error);
    CHECK_THAT(rc == 0, "%d %s", rc, error);
    return machine;
}

__attribute__((unused)) static struct pc_machine *boot_machine(const struct pc_machine_config *config)
{
    struct pc_machine *machine = open_machine(config);

    CHECK_EQ(pc_machine_boot(machine), 0);
    return machine;
}

__attribute__((unused)) static void close_machine(struct pc_machine *machine)
{
    CHECK_EQ(pc_machine_close(machine, RUN_MS), 0);
}

__attribute__((unused)) static struct pc_machine_stats stats_of(struct pc_machine *machine)
{
    struct pc_machine_stats stats;

    CHECK_EQ(pc_machine_stats(machine, &stats), 0);
    return stats;
}

/* The same of a machine that has found nothing wrong. */
__attribute__((unused)) static struct pc_machine_stats healthy_stats_of(struct pc_machine *machine)
{
    struct pc_machine_stats stats = stats_of(machine);

    if (stats.state == PC_MACHINE_FAILED || stats.failures)
        FAIL("%s", stats.failure_text);
    return stats;
}

__attribute__((unused)) static void wait_event(struct pc_machine *machine)
{
    struct pollfd event = {.fd = pc_machine_event_fd(machine), .events = POLLIN};
    uint64_t count;

    CHECK_THAT(poll(&event, 1, RUN_MS) == 1, "the guest makes no progress");
    CHECK_SYS(read(event.fd, &count, sizeof count));
}

/* Until every vCPU is ready and has announced `more` operations beyond what `since` knows (NULL: beyond none). */
__attribute__((unused)) static struct pc_machine_stats run_until_operations(struct pc_machine *machine,
                                                                            const struct pc_machine_stats *since, uint64_t more)
{
    for (;;) {
        struct pc_machine_stats stats = healthy_stats_of(machine);
        bool done = stats.ready && stats.nonce;

        CHECK_EQ(stats.state, PC_MACHINE_RUNNING);
        for (uint32_t i = 0; i < stats.vcpus; i++)
            done = done && stats.vcpu[i].operations >= (since ? since->vcpu[i].operations : 0) + more;
        if (done)
            return stats;
        wait_event(machine);
    }
}

__attribute__((unused)) static struct pc_machine *boot_and_run(const struct pc_machine_config *config, uint64_t operations)
{
    struct pc_machine *machine = boot_machine(config);

    CHECK_EQ(pc_machine_resume(machine), 0);
    run_until_operations(machine, NULL, operations);
    return machine;
}

__attribute__((unused)) static void pause_machine(struct pc_machine *machine)
{
    CHECK_OK(pc_machine_pause(machine, RUN_MS, error, sizeof error));
}

__attribute__((unused)) static struct pc_machine_check verify_ok(struct pc_machine *machine)
{
    struct pc_machine_check check;

    CHECK_EQ(pc_machine_verify(machine, &check), 0);
    CHECK_THAT(check.ok, "%s (%u bad)", check.text, check.bad_pages);
    return check;
}

/* Until the machine has reported what it found wrong. */
__attribute__((unused)) static struct pc_machine_stats wait_failure(struct pc_machine *machine)
{
    for (;;) {
        struct pc_machine_stats stats = stats_of(machine);

        if (stats.failure_text[0])
            return stats;
        wait_event(machine);
    }
}

/* How many operations of each workload a test waits for. Few: a guest may run on an emulated KVM, at a million instructions a second. */
__attribute__((unused)) static const uint64_t some_operations[] = {
    [PC_WORKLOAD_IDLE] = 3, [PC_WORKLOAD_DIRTY] = 3000, [PC_WORKLOAD_RANDOM] = 256, [PC_WORKLOAD_DISK] = 16,
    [PC_WORKLOAD_SEQUENTIAL] = 256, [PC_WORKLOAD_ZIPF] = 256, [PC_WORKLOAD_PHASES] = 256,
};

/* ---- state ---- */

#define HEADER_BYTES 32 /* of the blob; 16 of each section's */

struct saved {
    uint8_t bytes[65536];
    int64_t count;
};

__attribute__((unused)) static void save(struct pc_machine *machine, struct saved *to)
{
    int64_t needed = pc_machine_save_state(machine, NULL, 0, error, sizeof error);

    to->count = pc_machine_save_state(machine, to->bytes, sizeof to->bytes, error, sizeof error);
    CHECK_THAT(to->count > HEADER_BYTES && to->count <= (int64_t)sizeof to->bytes, "%s", error);
    CHECK_EQ(to->count, needed);
}

__attribute__((unused)) static int try_load_into(struct pc_machine *machine, const struct saved *from)
{
    int rc;

    error[0] = '\0';
    rc = pc_machine_load_state(machine, from->bytes, (size_t)from->count, error, sizeof error);
    CHECK_THAT(rc == 0 || error[0], "a refusal without a reason");
    return rc;
}

__attribute__((unused)) static void load(struct pc_machine *machine, const struct saved *from)
{
    CHECK_OK(try_load_into(machine, from));
}

/* Into a machine that is made for it and closed. */
__attribute__((unused)) static int try_load(const struct pc_machine_config *config, const struct saved *from)
{
    struct pc_machine *machine = open_machine(config);
    int rc = try_load_into(machine, from);

    close_machine(machine);
    return rc;
}

__attribute__((unused)) static uint64_t section_bytes(const struct saved *saved, size_t at)
{
    uint64_t bytes;

    memcpy(&bytes, saved->bytes + at + 8, sizeof bytes);
    return bytes;
}

/* Where the next section begins. */
__attribute__((unused)) static size_t next_section(const struct saved *saved, size_t at)
{
    return at + 16 + ((section_bytes(saved, at) + 7) & ~7ull);
}

__attribute__((unused)) static size_t find_section(const struct saved *saved, const char *tag)
{
    for (size_t at = HEADER_BYTES; at < (size_t)saved->count; at = next_section(saved, at))
        if (!memcmp(saved->bytes + at, tag, 4))
            return at;
    FAIL("there is no section %s", tag);
}

/* Makes length and checksum fit what the blob has become. */
__attribute__((unused)) static void seal(struct saved *saved)
{
    uint64_t bytes = (uint64_t)saved->count;
    uint32_t crc = pc_crc32c(0, saved->bytes + HEADER_BYTES, (size_t)saved->count - HEADER_BYTES);

    memcpy(saved->bytes + 16, &bytes, sizeof bytes);
    memcpy(saved->bytes + 12, &crc, sizeof crc);
}

#endif
