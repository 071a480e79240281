/* SPDX-License-Identifier: Apache-2.0
 *
 * userfaultfd by kind of memory and feature: what the kernel that runs here does, a case for each pair. Cases are called
 * kind_feature, so `test_uffd_cases hugetlb_` or `test_uffd_cases _wp` runs a row or a column of the table in
 * docs/kernel-cases.md. Filling, and what goes wrong with it, is here; write protection and events are in
 * test_uffd_cases_wp.c and test_uffd_cases_events.c, the ground rules in test_uffd.c.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/uffd_kinds.h"
#include "tests/support/uffd_table.h"

#define BIT(name) ((uint64_t)1 << PC_UFFD_IOCTL_##name)
#define PAGES 6

/* ---- handshake ---- */

static int raw_uffd(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);

    if (fd < 0)
        SKIP("uffd-syscall", "userfaultfd(2): %s", strerror(errno));
    return fd;
}

static void any_handshake_of_another_api(void)
{
    struct uffdio_api handshake = {.api = UFFD_API + 1, .features = 0, .ioctls = ~(uint64_t)0};
    int fd = raw_uffd();

    CHECK_EQ(ioctl(fd, UFFDIO_API, &handshake), -1);
    CHECK_EQ(errno, EINVAL);
    CHECK_EQ(handshake.api, 0); /* all of it is wiped */
    CHECK_EQ(handshake.ioctls, 0);
    handshake = (struct uffdio_api){.api = UFFD_API}; /* and it may be tried again */
    CHECK_SYS(ioctl(fd, UFFDIO_API, &handshake));
    CHECK(handshake.ioctls >> _UFFDIO_REGISTER & 1);
    CHECK(handshake.ioctls >> _UFFDIO_UNREGISTER & 1);
}

static void any_handshake_of_an_unknown_feature(void)
{
    struct uffdio_api handshake = {.api = UFFD_API, .features = (uint64_t)1 << 63};
    int fd = raw_uffd();

    CHECK_EQ(ioctl(fd, UFFDIO_API, &handshake), -1);
    CHECK_EQ(errno, EINVAL);
    CHECK_EQ(handshake.features, 0);
}

static void any_nothing_before_the_handshake(void)
{
    struct area area = make_area(ANON, PAGES);
    struct uffd_msg message;
    uint64_t done = 99;

    area.uffd = raw_uffd();
    CHECK_EQ(pc_uffd_register(area.uffd, address_of(&area, 0), area.bytes, PC_UFFD_MISSING, &area.ioctls), -EINVAL);
    CHECK_EQ(area.ioctls, 0);
    CHECK_EQ(pc_uffd_unregister(area.uffd, address_of(&area, 0), area.bytes), -EINVAL);
    CHECK_EQ(pc_uffd_wake(area.uffd, address_of(&area, 0), area.bytes), -EINVAL);
    CHECK_EQ(copy(&area, 0, 1, 0), -EINVAL);
    CHECK_EQ(pc_uffd_zeropage(area.uffd, address_of(&area, 0), area.unit, 0, &done), -EINVAL);
    CHECK_EQ(done, 0);
    CHECK_EQ(read(area.uffd, &message, sizeof(message)), -1);
    CHECK_EQ(errno, EINVAL);
    CHECK(!readable(area.uffd, 0)); /* poll says POLLERR */
}

/* ---- registering ---- */

static void register_masks(enum kind kind)
{
    struct area area = make_area(kind, PAGES);
    uint64_t all = features_of(kind, PC_UFFD_WP | (kind == ANON ? 0 : PC_UFFD_MINOR));

    area.uffd = open_uffd(all | UFFD_FEATURE_POISON);
    for (uint64_t mode = 1; mode < 8; mode++) {
        int result = pc_uffd_register(area.uffd, address_of(&area, 0), area.bytes, mode, &area.ioctls);

        if (kind == ANON && mode & PC_UFFD_MINOR) { /* there is nothing a page could be in before it is mapped */
            CHECK_EQ(result, -EINVAL);
            CHECK_EQ(area.ioctls, 0);
            continue;
        }
        CHECK_EQ(result, 0);
        CHECK(area.ioctls & BIT(WAKE));
        CHECK(area.ioctls & BIT(COPY));
        CHECK(area.ioctls & BIT(POISON));
        CHECK_EQ(!(area.ioctls & BIT(ZEROPAGE)), kind == HUGETLB);
        CHECK_EQ(!(area.ioctls & BIT(WRITEPROTECT)), !(mode & PC_UFFD_WP));
        CHECK_EQ(!(area.ioctls & BIT(CONTINUE)), !(mode & PC_UFFD_MINOR));
        if (kind == HUGETLB)
            CHECK(!(area.ioctls & BIT(MOVE)));
        CHECK_EQ(pc_uffd_unregister(area.uffd, address_of(&area, 0), area.bytes), 0);
    }
    CHECK_EQ(pc_uffd_register(area.uffd, address_of(&area, 0), area.bytes, 8, NULL), -EINVAL);
    if (kind == HUGETLB) /* a part of a huge page is no range */
        CHECK_EQ(pc_uffd_register(area.uffd, address_of(&area, 0), pc_page_bytes(), PC_UFFD_MISSING, NULL), -EINVAL);
}

/* ---- filling ---- */

static void copy_answers_a_fault(enum kind kind)
{
    for (int write = 0; write < 2; write++) {
        struct area area = arm(kind, PAGES, PC_UFFD_MISSING, 0);
        struct worker worker = {.area = &area, .page = 2, .write = write, .value = 0xEE};
        uint8_t byte = 0;

        start(&worker, touch);
        CHECK_FAULT(&area, 2, write ? PC_UFFD_FAULT_WRITE : 0);
        CHECK_EQ(copy(&area, 2, 7, 0), 0);
        CHECK_ENDS(&worker);
        CHECK_EQ(worker.value, write ? 0xEE : 7);
        CHECK_EQ(area.base[3 * area.unit - 1], 7);
        if (area.alias) { /* of a private mapping nothing comes into the file, and what was copied is not from there */
            if (kind != HUGETLB)
                CHECK_EQ(pread(area.fd, &byte, 1, (off_t)(3 * area.unit - 1)), 1);
            else
                byte = area.alias[3 * area.unit - 1];
            CHECK_EQ(byte, kind == PRIVATE ? 0 : 7);
        }
        CHECK_EQ(copy(&area, 2, 8, 0), -EEXIST);
        CHECK_EQ(area.base[3 * area.unit - 1], 7);
        CHECK_SYS(munmap(area.base, area.bytes));
        if (area.alias) {
            CHECK_SYS(munmap(area.alias, area.bytes));
            close(area.fd);
        }
    }
}

static void zeropage_answers_a_fault(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, 0);
    struct worker worker = {.area = &area, .page = 1, .value = 0xEE};
    uint64_t done = 99;

    start(&worker, touch);
    CHECK_FAULT(&area, 1, 0);
    if (kind == HUGETLB) {
        CHECK_EQ(pc_uffd_zeropage(area.uffd, address_of(&area, 1), area.unit, 0, &done), -EINVAL);
        CHECK_EQ(done, 0);
        CHECK_BLOCKED(&worker);
        CHECK_EQ(copy(&area, 1, 0, 0), 0); /* zeros can be copied */
    } else {
        CHECK_EQ(pc_uffd_zeropage(area.uffd, address_of(&area, 1), 2 * area.unit, 0, &done), 0);
        CHECK_EQ(done, 2 * area.unit);
        CHECK_PAGE(&area, 2, 0);
    }
    CHECK_ENDS(&worker);
    CHECK_EQ(worker.value, 0);
    CHECK_PAGE(&area, 1, 0);
    area.base[area.unit] = 1; /* the zero page is not the machine's to write into: it gets its own */
    CHECK_EQ(area.base[area.unit], 1);
    CHECK_EQ(copy(&area, 1, 3, 0), -EEXIST);
}

static void dontwake_then_wake(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, 0);
    struct worker near = {.area = &area, .page = 1}, far = {.area = &area, .page = 4};

    start(&near, touch);
    CHECK_FAULT(&area, 1, 0);
    start(&far, touch);
    CHECK_FAULT(&area, 4, 0);
    CHECK_EQ(copy(&area, 1, 5, PC_UFFD_DONTWAKE), 0);
    CHECK_EQ(copy(&area, 4, 6, PC_UFFD_DONTWAKE), 0);
    CHECK_BLOCKED(&near);
    CHECK_EQ(pc_uffd_wake(area.uffd, address_of(&area, 1), area.unit), 0);
    CHECK_ENDS(&near);
    CHECK_EQ(near.value, 5);
    CHECK_BLOCKED(&far); /* a wake is for its range */
    CHECK_EQ(pc_uffd_wake(area.uffd, address_of(&area, 0), area.bytes), 0);
    CHECK_ENDS(&far);
    CHECK_EQ(far.value, 6);
}

/* ---- minor faults ---- */

static void minor(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING | PC_UFFD_MINOR, 0);
    struct worker worker = {.area = &area, .page = 1}, hole = {.area = &area, .page = 3};
    uint64_t done = 99;

    memset(area.alias + area.unit, 0x11, area.unit);
    start(&worker, touch);
    CHECK_FAULT(&area, 1, PC_UFFD_FAULT_MINOR);
    area.alias[area.unit] = 0x22; /* what is in the file at the time of CONTINUE counts */
    CHECK_EQ(pc_uffd_continue(area.uffd, address_of(&area, 1), area.unit, PC_UFFD_DONTWAKE, &done), 0);
    CHECK_EQ(done, area.unit);
    CHECK_BLOCKED(&worker);
    CHECK_EQ(pc_uffd_continue(area.uffd, address_of(&area, 1), area.unit, 0, &done), -EEXIST); /* wakes nobody either */
    CHECK_EQ(done, 0);
    CHECK_BLOCKED(&worker);
    CHECK_EQ(pc_uffd_wake(area.uffd, address_of(&area, 1), area.unit), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(worker.value, 0x22);
    CHECK_EQ(area.base[2 * area.unit - 1], 0x11);
    area.base[area.unit + 1] = 0x33;
    CHECK_EQ(area.alias[area.unit + 1], kind == PRIVATE ? 0x11 : 0x33);
    start(&hole, touch); /* registered for both: a hole is missing, not minor */
    CHECK_FAULT(&area, 3, 0);
    CHECK_EQ(copy(&area, 3, 0x44, 0), 0);
    CHECK_ENDS(&hole);
    CHECK_EQ(hole.value, 0x44);
}

/* ---- SIGBUS ---- */

static _Thread_local sigjmp_buf on_sigbus;
static _Thread_local siginfo_t sigbus;

static void catch_sigbus(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    sigbus = *info;
    siglongjmp(on_sigbus, 1);
}

/* Whether this access ends in SIGBUS; `sigbus` then tells about it. */
static bool bus_error(const struct area *area, uint64_t page, bool write)
{
    const struct sigaction action = {.sa_sigaction = catch_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
    volatile uint8_t *at = area->base + page * area->unit;
    const volatile bool writes = write; /* in memory: what is in a register may be lost with the jump */

    CHECK_SYS(sigaction(SIGBUS, &action, NULL));
    if (sigsetjmp(on_sigbus, 1))
        return true;
    if (writes)
        *at = 0xEE;
    else
        (void)*at;
    return false;
}

#define CHECK_SIGBUS(area, page, write, code)                                                                          \
    do {                                                                                                               \
        CHECK(bus_error(area, page, write));                                                                           \
        CHECK_EQ(sigbus.si_code, code);                                                                                \
        CHECK_EQ((uintptr_t)sigbus.si_addr, address_of(area, page));                                                   \
    } while (0)

static void sigbus_instead_of_events(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_SIGBUS);
    int ends[2];

    CHECK_SIGBUS(&area, 1, false, BUS_ADRERR);
    CHECK_SIGBUS(&area, 2, true, BUS_ADRERR);
    CHECK_SYS(pipe(ends));
    CHECK_EQ(write(ends[1], area.base, 1), -1); /* system calls fail instead */
    CHECK_EQ(errno, EFAULT);
    CHECK(!readable(area.uffd, 0));
    CHECK_EQ(copy(&area, 1, 7, 0), 0);
    CHECK(!bus_error(&area, 1, true));
    CHECK_EQ(area.base[area.unit], 0xEE);
    CHECK_EQ(area.base[area.unit + 1], 7);
}

static void sigbus_wp(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING | PC_UFFD_WP, UFFD_FEATURE_SIGBUS);

    CHECK_EQ(copy(&area, 1, 7, PC_UFFD_FILL_WP), 0);
    CHECK(!bus_error(&area, 1, false));
    CHECK_SIGBUS(&area, 1, true, BUS_ADRERR);
    CHECK_PAGE(&area, 1, 7);
    CHECK_EQ(pc_uffd_writeprotect(area.uffd, address_of(&area, 1), area.unit, 0), 0);
    CHECK(!bus_error(&area, 1, true));
    CHECK_EQ(area.base[area.unit], 0xEE);
    CHECK(!readable(area.uffd, 0));
}

/* A kernel built without CONFIG_MEMORY_FAILURE, whose /proc/meminfo then does not count it, has no code of its own for this. */
static int code_of_poison(void)
{
    char line[128];
    int code = BUS_ADRERR;
    FILE *info = fopen("/proc/meminfo", "re");

    CHECK(info);
    while (fgets(line, sizeof(line), info))
        if (!strncmp(line, "HardwareCorrupted:", 18))
            code = BUS_MCEERR_AR;
    (void)fclose(info);
    return code;
}

static void poison(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_POISON);
    struct worker worker = {.area = &area, .page = 4};
    uint64_t done = 99;

    CHECK_EQ(pc_uffd_poison(area.uffd, address_of(&area, 1), 2 * area.unit, 0, &done), 0);
    CHECK_EQ(done, 2 * area.unit);
    CHECK_SIGBUS(&area, 1, false, code_of_poison()); /* as if the memory were broken: what handles that handles this */
    CHECK_SIGBUS(&area, 2, true, code_of_poison());
    CHECK_EQ(pc_uffd_poison(area.uffd, address_of(&area, 1), area.unit, 0, &done), -EEXIST);
    CHECK_EQ(done, 0);
    CHECK(!readable(area.uffd, 0));
    CHECK_EQ(copy(&area, 3, 3, 0), 0);
    CHECK_EQ(pc_uffd_poison(area.uffd, address_of(&area, 3), area.unit, 0, &done), -EEXIST); /* content is left alone */
    CHECK_PAGE(&area, 3, 3);
    start(&worker, touch);
    CHECK_FAULT(&area, 4, 0);
    CHECK_EQ(pc_uffd_poison(area.uffd, address_of(&area, 4), area.unit, PC_UFFD_DONTWAKE, &done), 0);
    CHECK_BLOCKED(&worker);
    if (kind == ANON || kind == PRIVATE) { /* thrown away, it is a hole again */
        CHECK_SYS(madvise(area.base + 4 * area.unit, area.unit, MADV_DONTNEED));
        CHECK_EQ(copy(&area, 4, 9, 0), 0);
        CHECK_ENDS(&worker);
        CHECK_EQ(worker.value, 9);
    }
}

/* ---- moving ---- */

#define HUGE ((uint64_t)2 << 20)

/* Plain anonymous memory at a multiple of 2 MiB, and, unless it is to be empty, page i full of i + 1. */
static uint8_t *move_source(uint64_t bytes, bool full)
{
    uint8_t *from = CHECK_SYS((uint8_t *)mmap(NULL, bytes + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

    from += (HUGE - (uintptr_t)from % HUGE) % HUGE;
    for (uint64_t at = 0; full && at < bytes; at += pc_page_bytes())
        memset(from + at, (int)(at / pc_page_bytes() % 255) + 1, pc_page_bytes());
    return from;
}

static int move(const struct area *area, uint64_t page, const uint8_t *from, uint64_t bytes, uint64_t mode, uint64_t *done)
{
    return pc_uffd_move(area->uffd, address_of(area, page), (uint64_t)(uintptr_t)from, bytes, mode, done);
}

static void anon_move(void)
{
    struct area area = arm(ANON, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_MOVE);
    struct worker worker = {.area = &area, .page = 1};
    uint8_t *from = move_source(area.bytes, true);
    uint64_t done = 99;

    CHECK(area.ioctls & BIT(MOVE));
    start(&worker, touch);
    CHECK_FAULT(&area, 1, 0);
    CHECK_EQ(move(&area, 1, from + area.unit, 2 * area.unit, 0, &done), 0);
    CHECK_EQ(done, 2 * area.unit);
    CHECK_ENDS(&worker);
    CHECK_EQ(worker.value, 2);
    CHECK_PAGE(&area, 1, 2);
    CHECK_PAGE(&area, 2, 3);
    CHECK(page_is(from, area.unit, 1));
    CHECK(page_is(from + area.unit, area.unit, 0)); /* it is gone from there */
    CHECK_EQ(move(&area, 1, from, area.unit, 0, &done), -EEXIST);
    CHECK_EQ(done, 0);
    CHECK(page_is(from, area.unit, 1)); /* a refused move takes nothing away */
    CHECK_EQ(move(&area, 3, from + 1, area.unit, 0, &done), -EINVAL);
}

static void move_2_mib(int advice)
{
    struct area area = arm(ANON, 2 * HUGE / pc_page_bytes(), PC_UFFD_MISSING, UFFD_FEATURE_MOVE);
    uint64_t first = (HUGE - (uintptr_t)area.base % HUGE) % HUGE / area.unit, done = 99;
    uint8_t *from = move_source(HUGE, false);

    CHECK(!madvise(from, HUGE, advice) || errno == EINVAL);
    CHECK(!madvise(area.base, area.bytes, advice) || errno == EINVAL);
    for (uint64_t page = 0; page < HUGE / area.unit; page++)
        memset(from + page * area.unit, (int)(page % 255) + 1, area.unit);
    CHECK_EQ(move(&area, first, from, HUGE, 0, &done), 0);
    CHECK_EQ(done, HUGE);
    for (uint64_t page = 0; page < HUGE / area.unit; page++)
        CHECK_PAGE(&area, first + page, (int)(page % 255) + 1);
    CHECK(page_is(from, HUGE, 0));
    CHECK_EQ(copy(&area, first ? first - 1 : HUGE / area.unit, 1, 0), 0); /* no more than that */
}

static void anon_move_2_mib_of_small_pages(void)
{
    move_2_mib(MADV_NOHUGEPAGE);
}

static void anon_move_2_mib_of_a_huge_page(void)
{
    move_2_mib(MADV_HUGEPAGE);
}

static void anon_move_holes(void)
{
    struct area area = arm(ANON, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_MOVE);
    uint8_t *from = move_source(area.bytes, true);
    struct worker worker = {.area = &area, .page = 1};
    uint64_t done = 99;

    CHECK_SYS(madvise(from + area.unit, area.unit, MADV_DONTNEED));
    CHECK_EQ(move(&area, 1, from + area.unit, area.unit, 0, &done), -ENOENT);
    CHECK_EQ(done, 0);
    CHECK_EQ(move(&area, 0, from, 3 * area.unit, 0, &done), -EAGAIN); /* up to the hole */
    CHECK_EQ(done, area.unit);
    CHECK_PAGE(&area, 0, 1);
    CHECK_EQ(move(&area, 1, from + area.unit, 3 * area.unit, PC_UFFD_ALLOW_SRC_HOLES, &done), 0);
    CHECK_EQ(done, 3 * area.unit); /* the hole counts */
    CHECK_PAGE(&area, 2, 3);
    CHECK_PAGE(&area, 3, 4);
    start(&worker, touch); /* but is none that was filled */
    CHECK_FAULT(&area, 1, 0);
    CHECK_EQ(copy(&area, 1, 9, 0), 0);
    CHECK_ENDS(&worker);
}

static void move_is_refused(enum kind kind)
{
    struct area area = arm(kind, PAGES, PC_UFFD_MISSING, UFFD_FEATURE_MOVE), anon = make_area(ANON, PAGES);
    uint64_t bytes = kind == HUGETLB ? area.unit : pc_page_bytes(), done = 99;
    uint8_t *from = move_source(bytes, true);

    CHECK_EQ(move(&area, 0, from, bytes, 0, &done), -EINVAL); /* into it */
    CHECK_EQ(done, 0);
    CHECK(page_is(from, pc_page_bytes(), 1));
    anon.uffd = area.uffd;
    register_area(&anon, PC_UFFD_MISSING);
    CHECK_EQ(copy(&area, 1, 7, 0), 0);
    CHECK_EQ(move(&anon, 1, area.base + area.unit, anon.unit, 0, &done), -EINVAL); /* and out of it */
    CHECK_EQ(done, 0);
    CHECK_PAGE(&area, 1, 7);
}

/* ---- the table ---- */

ON_ALL(register_masks)
ON_ALL(copy_answers_a_fault)
ON_ALL(zeropage_answers_a_fault)
ON_ALL(dontwake_then_wake)
ON_FILES(minor)
ON_ALL(sigbus_instead_of_events)
ON_ALL(sigbus_wp)
ON_ALL(poison)
ON_FILES(move_is_refused)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN(any_handshake_of_another_api);
    RUN(any_handshake_of_an_unknown_feature);
    RUN(any_nothing_before_the_handshake);
    RUN_ALL(register_masks);
    RUN_ALL(copy_answers_a_fault);
    RUN_ALL(zeropage_answers_a_fault);
    RUN_ALL(dontwake_then_wake);
    RUN_FILES(minor);
    RUN_ALL(sigbus_instead_of_events);
    RUN_ALL(sigbus_wp);
    RUN_ALL(poison);
    RUN(anon_move);
    RUN(anon_move_2_mib_of_small_pages);
    RUN(anon_move_2_mib_of_a_huge_page);
    RUN(anon_move_holes);
    RUN_FILES(move_is_refused);
    return test_end();
}
