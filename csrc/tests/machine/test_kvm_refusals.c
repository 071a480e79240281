/* SPDX-License-Identifier: Apache-2.0
 *
 * The kvm machine: configurations and disk requests that are refused, and where guest memory lies. `test_kvm_refusals speed`
 * measures, and is not run otherwise.
 */
#if defined(__x86_64__)

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/mman.h>

#include "tests/machine/machines.h"

#define CASE_SECONDS 100 /* a guest may run on an emulated /dev/kvm */

/* ---- cases: refusals ---- */

static void hostile_disk(void)
{
    struct pc_machine_config config = make_config(PC_ENGINE_KVM, PC_WORKLOAD_DISK, 2, PC_MEMORY_ANON);
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
        CHECK_THAT(pc_disk_request(vcpu, refused[i].op, refused[i].offset, refused[i].gpa, refused[i].bytes) == PCG_DISK_BAD_REQUEST,
              "request %zu", i);
    CHECK(stats_of(machine).disk_errors == sizeof refused / sizeof *refused);
    CHECK(stats_of(machine).disk_reads == 0 && stats_of(machine).disk_writes == 0);
    /* And the last possible ones are served, each vCPU in its own slice. */
    memset(buffer + 0x100000, 0xa5, 4096);
    CHECK(pc_disk_request(vcpu, PCG_DISK_WRITE, slice - 4096, 0x100000, 4096) == PCG_DISK_OK);
    CHECK(pc_disk_request(vcpu, PCG_DISK_READ, slice - 4096, ram - 4096, 4096) == PCG_DISK_OK);
    CHECK(memcmp(buffer + 0x100000, buffer + ram - 4096, 4096) == 0);
    CHECK(pc_disk_request(&machine->vcpu[0], PCG_DISK_READ, slice - 4096, ram - 4096, 4096) == PCG_DISK_OK);
    CHECK_THAT(pc_is_zero(buffer + ram - 4096, 4096), "one vCPU reads the slice of another");
    /* A file that was cut behind our back is an I/O error, not a hang. */
    CHECK(ftruncate(config.disk_fd, 4096) == 0);
    CHECK(pc_disk_request(vcpu, PCG_DISK_READ, slice - 4096, ram - 4096, 4096) == PCG_DISK_IO_ERROR);
    close_machine(machine);
}

static void bad_configuration(void)
{
    struct pc_machine_config good = make_config(PC_ENGINE_KVM, PC_WORKLOAD_RANDOM, 2, PC_MEMORY_ANON), config;
    struct pc_machine_check check;
    struct pc_machine *machine;
    uint64_t a, b;

#define REFUSED(change) \
    do { \
        config = good; \
        change; \
        error[0] = 0; \
        machine = (struct pc_machine *)1; \
        CHECK_THAT(pc_machine_open(&config, &machine, error, sizeof error) == -EINVAL, "%s", #change); \
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
    CHECK_THAT(pc_machine_open(&(struct pc_machine_config){ 0 }, &machine, NULL, 0) == -EINVAL, "an error buffer may be absent");
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
    CHECK_THAT(pc_machine_pause(machine, PAUSE_MS, error, sizeof error) == 0, "paused already");
    close_machine(machine);
    close_machine(NULL);
}

/* ---- cases without /dev/kvm ---- */

/* Follows the page tables that boot writes, as the processor would. */
static uint64_t walk(const uint8_t *ram, uint64_t gva)
{
    uint64_t table = PCG_PAGE_TABLES;

    for (int level = 3; level >= 1; level--) {
        uint64_t entry;
        memcpy(&entry, ram + table + (gva >> (12 + 9 * level) & 511) * 8, sizeof entry);
        CHECK_THAT(entry & 1, "gva 0x%llx is not mapped", (unsigned long long)gva);
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
                SKIP("memory", "this process may not reserve that much address space");
        }
        CHECK_THAT(pc_layout_make(config, &machine->layout, error, sizeof error) == 0, "%s", error);
        ram = config->shared.base;
        CHECK(pc_boot_write(machine, ram) == 0);
        for (uint32_t i = 0; i <= config->vcpus; i++) {
            uint64_t bytes = block(config, i)->size_bytes, first = i ? PCG_PRIVATE_GVA + (i - 1) * PCG_PRIVATE_STRIDE : 0;
            for (uint64_t k = 0; bytes && k <= 1000; k++) {
                uint64_t offset = k == 1000 ? bytes - PAGE : bytes / PAGE * k / 1000 * PAGE, gva = first + offset;
                void *host = (uint8_t *)block(config, i)->base + offset;
                CHECK(pc_layout_gva(config, gva, PAGE) == host);
                CHECK_THAT(pc_layout_gpa(&machine->layout, walk(ram, gva), PAGE) == host, "size %zu, block %u, offset 0x%llx", n, i,
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

    CHECK_THAT(pc_memory_create(PC_MEMORY_MEMFD, 3074 * MIB, &config.shared, error, sizeof error) == 0, "%s", error);
    config.disk_bytes = 2 * MIB;
    config.disk_fd = open_disk(config.disk_bytes);
    machine = boot_machine(&config);
    /* The whole block would take the guest minutes: only its last 4 MiB, which lie across the hole. The verifier goes by
     * the layout, so that changes with it. */
    boot = (struct pcg_boot *)((uint8_t *)config.shared.base + PCG_BOOT_INFO);
    boot->shared.gva = machine->layout.shared.gva = 3070 * MIB;
    boot->shared.pages = machine->layout.shared.pages = 4 * MIB / PAGE;
    CHECK(pc_machine_resume(machine) == 0);
    run_until_operations(machine, NULL, 128);
    CHECK_THAT(pc_machine_pause(machine, PAUSE_MS, error, sizeof error) == 0, "%s", error);
    CHECK(stats_of(machine).disk_errors == 0);
    CHECK(!pc_is_zero((uint8_t *)config.shared.base + 3073 * MIB, 64 * PAGE));
    machine->layout.shared.gva = machine->layout.boot_bytes; /* what verify takes as the start of the zero pages */
    machine->layout.shared.pages = (3074 * MIB - machine->layout.boot_bytes) / PAGE;
    verify_ok(machine);
    close_machine(machine);
}

/* Nothing to pass or fail: the figures in docs/machines.md. POSTCOPY_TEST_MIB sets the memory of the machine. */
static void speed(void)
{
    static const char *const names[] = { "idle", "dirty", "random", "disk" };
    const char *mib = getenv("POSTCOPY_TEST_MIB");
    uint64_t bytes = (mib ? strtoull(mib, NULL, 0) : 16) * MIB;

    for (uint32_t workload = PC_WORKLOAD_DIRTY; workload <= PC_WORKLOAD_DISK; workload++) {
        struct pc_machine_config config = make_config_of(bytes, PC_ENGINE_KVM, workload, 2, PC_MEMORY_MEMFD);
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
        (void)printf("     %-6s %llu MiB: ready after %.2f s, %.0f operations/s for each vCPU, verified in %.2f s\n", names[workload],
               (unsigned long long)(bytes / MIB), (double)begin_ns / 1e9,
               (double)(after.operations - before.operations) / 2 / ((double)(end_ns - ready_ns) / 1e9),
               (double)(pc_now_ns() - end_ns) / 1e9);
        close_machine(machine);
    }
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN_FOR(large_layouts, CASE_SECONDS);
    RUN_FOR(bad_configuration, CASE_SECONDS);
    RUN_FOR(hostile_disk, CASE_SECONDS);
    RUN_FOR(above_the_hole, CASE_SECONDS);
    if (argc > 1)
        RUN_FOR(speed, CASE_SECONDS);
    return test_end();
}

#else

int main(void)
{
    return 77; /* test_kvm says why */
}

#endif
