/* SPDX-License-Identifier: Apache-2.0
 *
 * The state of the kvm machine, and damage: what was changed on its way must be found.
 */
#if defined(__x86_64__)

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/mman.h>

#include "tests/machine/machines.h"

#define CASE_SECONDS 100 /* a guest may run on an emulated /dev/kvm */

/* ---- cases: state ---- */

static void damaged_state(void)
{
    struct pc_machine_config config = make_config(PC_ENGINE_KVM, PC_WORKLOAD_RANDOM, 2, PC_MEMORY_ANON), other;
    static struct saved good, bad;
    struct pc_machine *machine, *fresh;
    int accepted = 0, rc;

    config.working_set_bytes = 64 * PAGE;
    machine = boot_and_run(&config, 256);
    CHECK_THAT(pc_machine_save_state(machine, NULL, 0, error, sizeof error) == -EBUSY, "saving a running machine");
    pause_machine(machine);
    save(machine, &good);

    /* A refused blob sets nothing, so one machine serves for all of them; an accepted one would make the next call fail. */
    fresh = open_machine(&config);
    bad = good;
    for (bad.count = 0; bad.count < good.count; bad.count++)
        CHECK_EQ(try_load_into(fresh, &bad), -EBADMSG);
    for (int64_t at = 0; at < good.count; at++) {
        bad.bytes[at] ^= (uint8_t)(1u << at % 8);
        rc = try_load_into(fresh, &bad);
        bad.bytes[at] = good.bytes[at];
        CHECK_THAT(rc == -EBADMSG || (rc == -EPROTO && at >= 8 && at < 12), "byte %lld: %d", (long long)at, rc);
    }
    /* With a checksum that fits, the parser stands alone. Truncated at every byte, and every section header damaged. */
    for (int64_t count = HEADER_BYTES; count < good.count; count++) {
        bad.count = count;
        seal(&bad);
        CHECK_EQ(try_load_into(fresh, &bad), -EBADMSG);
    }
    for (size_t at = HEADER_BYTES; at < (size_t)good.count; at = next_section(&good, at))
        for (size_t i = 0; i < 16; i++) {
            bad = good;
            bad.bytes[at + i] ^= 0xff;
            seal(&bad);
            rc = try_load_into(fresh, &bad);
            CHECK_THAT(rc == -EBADMSG || (i < 4 && rc == -EPROTO && strstr(error, "section")), "header at %zu: %d %s", at, rc,
                       error);
        }
    close_machine(fresh);
    /* Anything at all inside of the sections: KVM and we may take or refuse it, nothing else. */
    for (int i = 0; i < 150; i++) {
        bad = good;
        for (int k = 0; k < 4; k++)
            bad.bytes[HEADER_BYTES + test_below((uint64_t)good.count - HEADER_BYTES)] = (uint8_t)test_random();
        seal(&bad);
        accepted += try_load(&config, &bad) == 0;
    }
    (void)printf("     %lld bytes; of 150 blobs with random damage under a good checksum %d were loaded\n",
                 (long long)good.count, accepted);

    other = config;
    other.seed++;
    CHECK_THAT(try_load(&other, &good) == -EINVAL && strstr(error, "seed"), "%s", error);
    other = config;
    other.working_set_bytes += PAGE;
    CHECK_THAT(try_load(&other, &good) == -EINVAL && strstr(error, "working set"), "%s", error);
    other = config;
    other.vcpus = 1;
    CHECK_THAT(try_load(&other, &good) == -EINVAL && strstr(error, "vCPUs"), "%s", error);
    CHECK_THAT(try_load_into(machine, &good) == -EBUSY, "loading over a live machine");
    CHECK(pc_machine_resume(machine) == 0);
    run_until_operations(machine, NULL, 512);
    close_machine(machine);
}

/* Saved, loaded, saved again: the same bytes, except for the time stamp counter, which runs. */
static void state_round_trip(void)
{
    struct pc_machine_config config = make_config(PC_ENGINE_KVM, PC_WORKLOAD_RANDOM, 2, PC_MEMORY_ANON);
    struct pc_machine *a, *b;
    static struct saved one, two;
    unsigned different = 0;

    config.working_set_bytes = 64 * PAGE;
    a = boot_and_run(&config, 256);
    pause_machine(a);
    save(a, &one);
    close_machine(a);
    b = open_machine(&config);
    load(b, &one);
    save(b, &two);
    CHECK(one.count == two.count);
    for (size_t at = HEADER_BYTES; at < (size_t)one.count;) {
        uint64_t length;
        char tag[5] = { 0 };
        memcpy(tag, one.bytes + at, 4);
        memcpy(&length, one.bytes + at + 8, sizeof length);
        CHECK(memcmp(one.bytes + at, two.bytes + at, 16) == 0);
        at += 16;
        for (uint64_t i = 0; i < length; i += 8) {
            uint64_t x = 0, y = 0, left = length - i < 8 ? length - i : 8;
            uint32_t index = 0;
            memcpy(&x, one.bytes + at + i, left);
            memcpy(&y, two.bytes + at + i, left);
            if (x == y)
                continue;
            if (memcmp(tag, "MSRS", 4) == 0) {
                memcpy(&index, one.bytes + at + i - 8, 4);
                if (index == 0x10 || index == 0x6e0) { /* the counter, its deadline */
                    CHECK_THAT(index != 0x10 || y > x, "the time stamp counter went back");
                    continue;
                }
            }
            different++;
            (void)printf("     %s +%llu (MSR 0x%x): 0x%llx became 0x%llx\n", tag, (unsigned long long)i, index, (unsigned long long)x,
                   (unsigned long long)y);
        }
        at += (length + 7) & ~7ull;
    }
    CHECK_THAT(different == 0, "%u words of state did not survive the move", different);
    close_machine(b);
}

/* ---- cases: damage must be found ---- */

/* Moves a machine with one page damaged; whether from outside (verify) and by the guest (code) it is seen. */
static void find_damage(uint32_t workload, const char *how, uint32_t code)
{
    struct pc_machine_config here = make_config(PC_ENGINE_KVM, workload, 1, PC_MEMORY_ANON), old, there;
    struct pc_machine_check check;
    struct pc_machine_stats before, after;
    struct pc_machine *a, *b;
    static struct saved blob;
    uint8_t *page, *stale;

    here.working_set_bytes = 128 * PAGE;
    old = make_twin(&here, PC_MEMORY_ANON);
    there = make_twin(&here, PC_MEMORY_ANON);
    a = boot_and_run(&here, some_operations[workload]);
    pause_machine(a);
    before = stats_of(a);
    copy_memory(&old, &here);
    CHECK(pc_machine_resume(a) == 0);
    run_until_operations(a, &before, 4 * some_operations[workload]);
    pause_machine(a);
    before = stats_of(a);
    save(a, &blob);
    copy_memory(&there, &here);

    /* A page of the private block that changed in between, well away from tables and the operation in flight. */
    page = (uint8_t *)there.private_[0].base + 20 * PAGE;
    stale = (uint8_t *)old.private_[0].base + 20 * PAGE;
    while (memcmp(page, stale, PAGE / 2) == 0) {
        page += PAGE;
        stale += PAGE;
        CHECK_THAT(page < (uint8_t *)there.private_[0].base + there.private_[0].size_bytes, "no page changed");
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
    load(b, &blob);
    CHECK(pc_machine_verify(b, &check) == 0);
    CHECK(!check.ok && check.bad_pages >= 1 && check.text[0]);
    (void)printf("     verify: %s\n", check.text);
    if (code) {
        CHECK(pc_machine_resume(b) == 0);
        after = wait_failure(b);
        CHECK_EQ(after.state, PC_MACHINE_RUNNING);
        CHECK_THAT(after.failure_code == code, "%s", after.failure_text);
        (void)printf("     guest:  %s\n", after.failure_text);
        pause_machine(b);
        CHECK_THAT(pc_machine_verify(b, &check) == 0 && !check.ok && strstr(check.text, "reported"), "%s", check.text);
    }
    close_machine(b);
    close_machine(a);
}

/* Sets 8 bytes in every section of that tag: at an offset, or the value of an MSR. Returns what was there last. */
static uint64_t put_word(struct saved *blob, const char *tag, uint64_t offset, uint32_t msr, uint64_t value)
{
    uint64_t old = 0;
    bool found = false;

    for (size_t at = HEADER_BYTES; at < (size_t)blob->count; at = next_section(blob, at)) {
        uint64_t where = offset;
        uint32_t index;

        if (memcmp(blob->bytes + at, tag, 4))
            continue;
        for (; msr; where += 16) {
            CHECK(where < section_bytes(blob, at));
            memcpy(&index, blob->bytes + at + 16 + where, sizeof index);
            if (index == msr)
                break;
        }
        where += at + 16 + (msr ? 8 : 0);
        memcpy(&old, blob->bytes + where, sizeof old);
        memcpy(blob->bytes + where, &value, sizeof value);
        found = true;
    }
    CHECK(found);
    seal(blob);
    return old;
}

static uint64_t put_msr(struct saved *blob, uint32_t index, uint64_t value)
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
    struct pc_machine_config config = make_config(PC_ENGINE_KVM, PC_WORKLOAD_RANDOM, 1, PC_MEMORY_ANON);
    struct pc_machine_config frozen = make_twin(&config, PC_MEMORY_ANON);
    struct pc_machine *machine;

    config.working_set_bytes = 64 * PAGE;
    machine = boot_and_run(&config, 256);
    for (size_t i = 0; i < sizeof losses / sizeof *losses; i++) {
        struct pc_machine_stats stats = stats_of(machine);
        /* XMM7 is dead between being read and being set again; if the machine stopped just there, once more. */
        for (int attempt = 0;; attempt++) {
            static struct saved good, bad;
            uint64_t reports;

            run_until_operations(machine, &stats, 256);
            pause_machine(machine);
            reports = stats_of(machine).vcpu[0].reports;
            save(machine, &good);
            bad = good;
            copy_memory(&frozen, &config);
            close_machine(machine);
            put_word(&bad, losses[i].tag, losses[i].offset, losses[i].msr, 0);
            machine = open_machine(&config);
            load(machine, &bad);
            CHECK(pc_machine_resume(machine) == 0);
            do { /* the guest looks at all of them before each report */
                wait_event(machine);
                stats = stats_of(machine);
            } while (!stats.failure_text[0] && stats.vcpu[0].reports < reports + 2);
            close_machine(machine);
            /* Back to the last good moment. */
            copy_memory(&config, &frozen);
            machine = open_machine(&config);
            load(machine, &good);
            CHECK(pc_machine_resume(machine) == 0);
            if (stats.failure_text[0])
                break;
            CHECK_THAT(attempt < 5, "the guest did not notice the loss of %s +%llu 0x%x", losses[i].tag,
                  (unsigned long long)losses[i].offset, losses[i].msr);
        }
        CHECK_THAT(stats.failure_code == losses[i].code, "%s", stats.failure_text);
        (void)printf("     %s\n", stats.failure_text);
    }
    run_until_operations(machine, NULL, 0);
    close_machine(machine);
}

/* From a host whose processor has less, or was described by an older version: what the vCPU was made with gives way. */
static void another_processor(void)
{
    struct pc_machine_config config = make_config(PC_ENGINE_KVM, PC_WORKLOAD_RANDOM, 1, PC_MEMORY_ANON);
    struct pc_machine *machine;
    static struct saved less, again;
    size_t at;
    uint64_t bytes;

    config.working_set_bytes = 64 * PAGE;
    machine = boot_and_run(&config, 256);
    pause_machine(machine);
    save(machine, &less);
    close_machine(machine);
    at = find_section(&less, "CPID") + 16;
    bytes = section_bytes(&less, at - 16);
    CHECK(bytes > sizeof(struct kvm_cpuid_entry2));
    for (uint64_t i = 0; i < bytes; i += sizeof(struct kvm_cpuid_entry2)) {
        struct kvm_cpuid_entry2 entry;

        memcpy(&entry, less.bytes + at + i, sizeof entry);
        if (entry.function == 7 && entry.index == 0)
            entry.ebx &= ~(1u << 18); /* RDSEED, which no guest of ours asks for */
        if (entry.function == 0x80000002)
            entry.eax = 0x20554350; /* another name */
        memcpy(less.bytes + at + i, &entry, sizeof entry);
    }
    seal(&less);
    machine = open_machine(&config);
    load(machine, &less);
    save(machine, &again);
    CHECK(section_bytes(&again, at - 16) == bytes && memcmp(again.bytes + at, less.bytes + at, (size_t)bytes) == 0);
    CHECK(pc_machine_resume(machine) == 0);
    run_until_operations(machine, NULL, 256);
    close_machine(machine);
}

/* The time stamp counter never goes back: a KVM that sets it is believed, one that cannot must be behind nothing. */
static void time_stamp_counter(void)
{
    static const uint64_t tscs[] = { 1ull << 20, 1ull << 60 };
    struct pc_machine_config config = make_config(PC_ENGINE_KVM, PC_WORKLOAD_RANDOM, 1, PC_MEMORY_ANON);
    struct pc_machine *machine;
    static struct saved blob;

    config.working_set_bytes = 64 * PAGE;
    machine = boot_and_run(&config, 256);
    pause_machine(machine);
    save(machine, &blob);
    close_machine(machine);
    for (size_t i = 0; i < 2; i++) {
        const struct pcg_vcpu *guest = (struct pcg_vcpu *)((uint8_t *)config.shared.base + PCG_VCPU_PAGES);
        uint64_t now, saw = guest->last_tsc;
        static struct saved again;
        int rc;

        machine = open_machine(&config);
        put_msr(&blob, 0x10, tscs[i]);
        rc = try_load_into(machine, &blob);
        CHECK_THAT(rc == 0 || (rc == -ENOTSUP && strstr(error, "time stamp")), "%d %s", rc, error);
        if (rc) {
            (void)printf("     %s\n", error);
        } else {
            struct pc_machine_stats stats;
            save(machine, &again);
            now = put_msr(&again, 0x10, 0);
            CHECK(now >= tscs[i]);
            if (now < saw) { /* it was set: back in time, so the guest must complain */
                CHECK(pc_machine_resume(machine) == 0);
                stats = wait_failure(machine);
                CHECK_THAT(stats.failure_code == PCG_FAIL_TSC, "%s", stats.failure_text);
            }
        }
        close_machine(machine);
    }
}

/* The guest reads every word that comes from its disk. */
static void find_bad_disk(void)
{
    struct pc_machine_config config = make_config(PC_ENGINE_KVM, PC_WORKLOAD_DISK, 1, PC_MEMORY_ANON);
    struct pc_machine *machine;
    struct pc_machine_stats stats;
    struct pc_machine_check check;
    void *zeros;

    config.working_set_bytes = MIB;
    machine = boot_and_run(&config, 16);
    pause_machine(machine);
    CHECK(posix_memalign(&zeros, PAGE, MIB) == 0);
    memset(zeros, 0, MIB);
    CHECK(pwrite(config.disk_fd, zeros, MIB / 2, MIB / 4) == (ssize_t)MIB / 2);
    free(zeros);
    CHECK_THAT(pc_machine_verify(machine, &check) == 0 && !check.ok && strstr(check.text, "disk"), "%s", check.text);
    CHECK(pc_machine_resume(machine) == 0);
    stats = wait_failure(machine);
    CHECK_THAT(stats.failure_code == PCG_FAIL_DISK_DATA, "%s", stats.failure_text);
    (void)printf("     %s\n", stats.failure_text);
    close_machine(machine);
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
        struct pc_machine_config config = make_config(PC_ENGINE_KVM, PC_WORKLOAD_IDLE, 2, PC_MEMORY_ANON);
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
            wait_event(machine);
            stats = stats_of(machine);
        } while (stats.state == PC_MACHINE_RUNNING);
        CHECK(stats.state == PC_MACHINE_FAILED);
        (void)printf("     %s\n", stats.failure_text);
        CHECK_THAT(strstr(stats.failure_text, crashes[i].says), "%s", stats.failure_text);
        CHECK(pc_machine_resume(machine) == -EIO);
        CHECK(pc_machine_pause(machine, PAUSE_MS, error, sizeof error) == -EIO && error[0]);
        CHECK(pc_machine_save_state(machine, NULL, 0, error, sizeof error) == -EIO);
        CHECK(pc_machine_verify(machine, &check) == -EIO);
        close_machine(machine);
    }
}

static void stale_random(void) { find_damage(PC_WORKLOAD_RANDOM, "stale", 0); }
static void zero_random(void) { find_damage(PC_WORKLOAD_RANDOM, "zero", PCG_FAIL_CHECK_WORD); }
static void torn_random(void) { find_damage(PC_WORKLOAD_RANDOM, "torn", PCG_FAIL_CHECK_WORD); }
static void stale_zipf(void) { find_damage(PC_WORKLOAD_ZIPF, "stale", 0); }
static void stale_dirty(void) { find_damage(PC_WORKLOAD_DIRTY, "stale", PCG_FAIL_PASS); }
static void stale_disk(void) { find_damage(PC_WORKLOAD_DISK, "stale", 0); }
static void zero_disk(void) { find_damage(PC_WORKLOAD_DISK, "zero", 0); }
static void stray_dirty(void) { find_damage(PC_WORKLOAD_DIRTY, "stray", 0); }

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN_FOR(state_round_trip, CASE_SECONDS);
    RUN_FOR(damaged_state, CASE_SECONDS);
    RUN_FOR(stale_random, CASE_SECONDS);
    RUN_FOR(zero_random, CASE_SECONDS);
    RUN_FOR(torn_random, CASE_SECONDS);
    RUN_FOR(stale_zipf, CASE_SECONDS);
    RUN_FOR(stale_dirty, CASE_SECONDS);
    RUN_FOR(stale_disk, CASE_SECONDS);
    RUN_FOR(zero_disk, CASE_SECONDS);
    RUN_FOR(stray_dirty, CASE_SECONDS);
    RUN_FOR(find_bad_disk, CASE_SECONDS);
    RUN_FOR(find_lost_registers, CASE_SECONDS);
    RUN_FOR(another_processor, CASE_SECONDS);
    RUN_FOR(time_stamp_counter, CASE_SECONDS);
    RUN_FOR(guest_crash, CASE_SECONDS);
    return test_end();
}

#else

int main(void)
{
    return 77; /* test_kvm says why */
}

#endif
