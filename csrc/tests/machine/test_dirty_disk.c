/* SPDX-License-Identifier: Apache-2.0
 *
 * What the disk writes to guest memory is in the machine's dirty log, also where no page table shows it; and a copy that follows the
 * log of a machine that runs is the machine's memory when it stands.
 */
#include "tests/machine/machines.h"

#include <sys/mman.h>

int __real_pc_pread_all(int fd, void *data, size_t bytes, uint64_t offset);
int __wrap_pc_pread_all(int fd, void *data, size_t bytes, uint64_t offset);

/* A transfer of which the log is read when the pages are pinned and nothing has come yet. */
static struct {
    struct pc_dirty_log *log;
    const struct pc_memory *memory;
    uint8_t *alias; /* the same memory where no log looks, as a device sees it */
    uint64_t pinned;
    int result;
} transfer;

static uint64_t collect(struct pc_dirty_log *log, uint64_t *words)
{
    int64_t count = pc_dirty_log_collect(log, 0, words);

    CHECK(count >= 0);
    return (uint64_t)count;
}

int __wrap_pc_pread_all(int fd, void *data, size_t bytes, uint64_t offset)
{
    uint64_t words[64] = {0};

    if (!transfer.log)
        return __real_pc_pread_all(fd, data, bytes, offset);
    for (size_t i = 0; i < bytes; i += PAGE) /* as a pin does, that is for writing */
        *(volatile uint8_t *)((uint8_t *)data + i) = 0;
    transfer.pinned = collect(transfer.log, words);
    memset(transfer.alias + ((uint8_t *)data - (uint8_t *)transfer.memory->base), 0xda, bytes);
    return transfer.result;
}

static void what_a_transfer_brings_is_marked(int result)
{
    struct pc_machine_config config = make_config(PC_ENGINE_RV64, PC_WORKLOAD_DISK, 1, PC_MEMORY_MEMFD);
    struct pc_machine *machine = open_machine(&config);
    uint64_t words[64] = {0}, gpa = 40 * PAGE;
    uint8_t *memory = pc_layout_gpa(&machine->layout, gpa, 3 * PAGE);
    struct pc_dirty_log *log;
    int rc;

    CHECK(memory != NULL);
    memset(memory, 1, 3 * PAGE);
    CHECK_EQ(pc_dirty_log_new(&log), 0);
    rc = pc_dirty_log_add(log, &config.shared, error, sizeof error);
    if (rc == -EOPNOTSUPP)
        SKIP("wp-async", "%s", error);
    CHECK_OK(rc);
    CHECK_EQ(pc_machine_set_dirty_log(machine, log), 0);
    transfer.memory = &config.shared;
    transfer.alias = CHECK_SYS(mmap(NULL, config.shared.size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, config.shared.fd, 0));
    transfer.result = result;
    transfer.log = log;
    CHECK_EQ(pc_disk_request(&machine->vcpu[0], PCG_DISK_READ, 0, gpa, 3 * PAGE), result ? PCG_DISK_IO_ERROR : PCG_DISK_OK);
    transfer.log = NULL;
    CHECK_EQ(transfer.pinned, 3);
    CHECK_EQ(memory[2 * PAGE], 0xda);
    CHECK_EQ(collect(log, words), 3);
    CHECK_EQ(pc_bitmap_next(words, 64, 0, 1), (uint64_t)(memory - (uint8_t *)config.shared.base) / PAGE);
    memset(words, 0, sizeof words);
    CHECK_EQ(pc_disk_request(&machine->vcpu[0], PCG_DISK_WRITE, 0, gpa, 3 * PAGE), PCG_DISK_OK);
    CHECK_EQ(collect(log, words), 0); /* the other direction writes nothing here */
    CHECK_EQ(pc_machine_set_dirty_log(machine, NULL), 0);
    pc_dirty_log_free(log);
    CHECK_EQ(pc_disk_request(&machine->vcpu[0], PCG_DISK_READ, 0, gpa, 3 * PAGE), PCG_DISK_OK); /* without one */
    CHECK_SYS(munmap(transfer.alias, config.shared.size_bytes));
    close_machine(machine);
    drop_memory(&config);
}

static void a_transfer_is_marked(void) { what_a_transfer_brings_is_marked(0); }
static void a_transfer_that_failed_is_marked(void) { what_a_transfer_brings_is_marked(-EIO); }

/* ---- a machine that runs ---- */

/* What a device writes meanwhile may be copied in part: the log names it, and it is copied again. */
PC_RACY static void follow(struct pc_dirty_log *log, struct pc_machine_config *config, struct pc_machine_config *copy)
{
    for (uint32_t i = 0; i <= config->vcpus; i++) {
        const struct pc_memory *memory = block(config, i);
        uint64_t pages = memory->size_bytes / PAGE, *words = calloc(pc_bitmap_words(pages), sizeof *words);

        CHECK(words != NULL);
        CHECK(pc_dirty_log_collect(log, i, words) >= 0);
        for (uint64_t page = 0; (page = pc_bitmap_next(words, pages, page, 1)) < pages; page++) {
            const uint64_t *from = (const uint64_t *)((uint8_t *)memory->base + page * PAGE);
            uint64_t *to = (uint64_t *)((uint8_t *)block(copy, i)->base + page * PAGE);

            for (uint64_t word = 0; word < PAGE / sizeof *to; word++)
                to[word] = __atomic_load_n(&from[word], __ATOMIC_RELAXED);
        }
        free(words);
    }
}

static void a_copy_follows(uint32_t engine, uint32_t workload)
{
    struct pc_machine_config config = make_config(engine, workload, 2, PC_MEMORY_MEMFD);
    struct pc_machine_config copy = make_twin(&config, PC_MEMORY_ANON);
    struct pc_machine *machine = boot_machine(&config);
    struct pc_machine_stats stats;
    struct pc_dirty_log *log;

    CHECK_EQ(pc_dirty_log_new(&log), 0);
    for (uint32_t i = 0; i <= config.vcpus; i++) {
        int rc = pc_dirty_log_add(log, block(&config, i), error, sizeof error);

        if (rc == -EOPNOTSUPP)
            SKIP("wp-async", "%s", error);
        CHECK_EQ(rc, i);
    }
    CHECK_EQ(pc_machine_set_dirty_log(machine, log), 0);
    copy_memory(&copy, &config);
    CHECK_EQ(pc_machine_resume(machine), 0);
    stats = run_until_operations(machine, NULL, some_operations[workload]);
    for (int round = 0; round < 10; round++) {
        follow(log, &config, &copy);
        stats = run_until_operations(machine, &stats, 1 + some_operations[workload] / 16);
    }
    pause_machine(machine);
    follow(log, &config, &copy);
    for (uint32_t i = 0; i <= config.vcpus; i++)
        CHECK(!memcmp(block(&copy, i)->base, block(&config, i)->base, block(&config, i)->size_bytes));
    CHECK_EQ(pc_machine_set_dirty_log(machine, NULL), 0);
    pc_dirty_log_free(log);
    close_machine(machine);
    drop_memory(&config);
    drop_memory(&copy);
}

#define FOLLOWS(engine, workload, ENGINE, WORKLOAD)                                                                     \
    static void a_copy_follows_##engine##_##workload(void) { a_copy_follows(ENGINE, WORKLOAD); }
FOLLOWS(rv64, dirty, PC_ENGINE_RV64, PC_WORKLOAD_DIRTY)
FOLLOWS(rv64, disk, PC_ENGINE_RV64, PC_WORKLOAD_DISK)
FOLLOWS(kvm, dirty, PC_ENGINE_KVM, PC_WORKLOAD_DIRTY)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(a_transfer_is_marked);
    RUN(a_transfer_that_failed_is_marked);
    RUN_FOR(a_copy_follows_rv64_dirty, 60);
    RUN_FOR(a_copy_follows_rv64_disk, 60);
    RUN_FOR(a_copy_follows_kvm_dirty, 60);
    return test_end();
}
