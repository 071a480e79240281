/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory of the three kinds: what is present is found without touching, dumps are exact and sparse, digests depend on content
 * alone.
 */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "core/util.h"
#include "postcopy/core.h"
#include "postcopy/memory.h"
#include "postcopy/uffd.h"
#include "tests/support/huge_pool.h"
#include "tests/support/test.h"

#define PAGES 256

static char message[PC_ERROR_BYTES];

static struct pc_memory make(int kind, uint64_t pages)
{
    struct pc_memory memory;
    uint64_t page_bytes = kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
    int result;

    if (kind == PC_MEMORY_HUGETLB && !page_bytes)
        SKIP("hugetlb", "no huge pages in this kernel");
    result = pc_memory_create(kind, pages * page_bytes, &memory, message, sizeof(message));
    if (kind == PC_MEMORY_HUGETLB && result == -ENOMEM)
        SKIP("hugetlb", "%s", message);
    if (result)
        FAIL("%s", message);
    CHECK_EQ(memory.page_bytes, page_bytes);
    CHECK_EQ(memory.size_bytes, pages * page_bytes);
    return memory;
}

static uint8_t *page_at(const struct pc_memory *memory, uint64_t page)
{
    return (uint8_t *)memory->base + page * memory->page_bytes;
}

static int temporary_file(void)
{
    const char *directory = getenv("TMPDIR");
    char path[4096];
    int fd;

    (void)snprintf(path, sizeof(path), "%s/postcopy-test-XXXXXX", directory ? directory : "/tmp");
    fd = CHECK_SYS(mkostemp(path, O_CLOEXEC));
    CHECK_SYS(unlink(path));
    return fd;
}

static uint64_t resident(const struct pc_memory *memory)
{
    uint64_t bytes = 1;

    CHECK_EQ(pc_memory_resident(memory, &bytes), 0);
    return bytes;
}

static uint64_t digest(const struct pc_memory *memory)
{
    uint64_t value = 0;

    CHECK_EQ(pc_memory_digest(memory, &value), 0);
    return value;
}

static void present_and_resident(int kind, uint64_t pages)
{
    struct pc_memory memory = make(kind, pages);
    uint64_t words[PAGES / 64 + 1] = {0}, expected[PAGES / 64 + 1] = {0}, known[PAGES / 64 + 1] = {0};

    CHECK_EQ(resident(&memory), 0);
    CHECK_EQ(pc_memory_present(&memory, words), 0);
    CHECK_EQ(pc_bitmap_count(words, pages), 0);
    CHECK_EQ(resident(&memory), 0);
    for (int times = 0; times < 2; times++) { /* asked again, it adds what has come since */
        for (uint64_t i = 0; i < pages / 8 + 1; i++) {
            uint64_t page = test_below(pages);

            page_at(&memory, page)[test_below(memory.page_bytes)] = 1;
            pc_bitmap_set_range(expected, page, 1);
        }
        CHECK_EQ(pc_memory_present(&memory, words), 0);
        CHECK(!memcmp(words, expected, sizeof(words)));
        for (int more_times = 0; kind == PC_MEMORY_MEMFD && more_times < 2; more_times++) { /* the second time nothing has come since */
            uint64_t more[PAGES / 64 + 1] = {0}, new = pc_bitmap_count(expected, pages) - pc_bitmap_count(known, pages);

            CHECK_EQ(pc_memory_present_more(&memory, known, more), 0);
            CHECK(!memcmp(known, expected, sizeof(known)));
            CHECK_EQ(pc_bitmap_count(more, pages), new);
            pc_bitmap_clear_those(more, expected, pages);
            CHECK_EQ(pc_bitmap_count(more, pages), 0);
        }
        CHECK_EQ(resident(&memory), pc_bitmap_count(expected, pages) * memory.page_bytes);
        (void)digest(&memory);
        CHECK_EQ(resident(&memory), pc_bitmap_count(expected, pages) * memory.page_bytes);
    }
    pc_memory_destroy(&memory);
    CHECK(!memory.base && memory.fd == -1);
    pc_memory_destroy(&memory); /* again: harmless */
}

static void memfd_present_and_resident(void) { present_and_resident(PC_MEMORY_MEMFD, PAGES); }
static void anon_present_and_resident(void) { present_and_resident(PC_MEMORY_ANON, PAGES); }
static void hugetlb_present_and_resident(void) { present_and_resident(PC_MEMORY_HUGETLB, 4); }

/* A read of anonymous memory maps the zero page: that is neither content nor memory. */
static void anon_reads_are_not_content(void)
{
    struct pc_memory memory = make(PC_MEMORY_ANON, PAGES);
    uint64_t words[PAGES / 64] = {0};

    for (uint64_t page = 0; page < PAGES; page += 2)
        CHECK_EQ(*(volatile uint8_t *)page_at(&memory, page), 0);
    page_at(&memory, 7)[9] = 1;
    CHECK_EQ(pc_memory_present(&memory, words), 0);
    CHECK_EQ(pc_bitmap_count(words, PAGES), 1);
    CHECK_EQ(pc_bitmap_next(words, PAGES, 0, 1), 7);
    CHECK_EQ(resident(&memory), memory.page_bytes);
}

/* Content which came through another mapping or descriptor counts, though this one's page tables do not have it. */
static void written_elsewhere_is_present(int kind, uint64_t pages)
{
    struct pc_memory memory = make(kind, pages);
    uint64_t words[PAGES / 64 + 1] = {0};
    uint8_t *alias = CHECK_SYS((uint8_t *)mmap(NULL, memory.size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, 0));

    page_at(&memory, 1)[0] = 1;
    alias[(pages - 1) * memory.page_bytes + 5] = 1;
    CHECK_EQ(pc_memory_present(&memory, words), 0);
    CHECK_EQ(pc_bitmap_count(words, pages), 2);
    CHECK(words[(pages - 1) / 64] >> (pages - 1) % 64 & 1);
    CHECK_EQ(resident(&memory), 2 * memory.page_bytes);
}

static void memfd_written_elsewhere_is_present(void) { written_elsewhere_is_present(PC_MEMORY_MEMFD, PAGES); }
static void hugetlb_written_elsewhere_is_present(void) { written_elsewhere_is_present(PC_MEMORY_HUGETLB, 4); }

static void dump_and_load(int kind, uint64_t pages)
{
    struct pc_memory memory = make(kind, pages), back;
    int fd = temporary_file();
    uint64_t offset = 3 * 4096, before, value, used;
    uint8_t edge[4096];
    struct stat stat;

    /* Old content around and below: the dump replaces its own range and nothing else. */
    memset(edge, 0xEE, sizeof(edge));
    for (uint64_t at = 0; at < offset + memory.size_bytes + sizeof(edge); at += sizeof(edge))
        CHECK_EQ(pwrite(fd, edge, sizeof(edge), (off_t)at), sizeof(edge));
    for (uint64_t i = 0; i < pages / 8 + 1; i++)
        memset(page_at(&memory, test_below(pages)) + test_below(memory.page_bytes - 8), (int)(1 + i % 255), 8);
    memset(page_at(&memory, pages - 1), 0, memory.page_bytes); /* populated and zero */
    used = resident(&memory);
    before = digest(&memory);
    CHECK_EQ(pc_memory_dump(&memory, fd, offset), 0);
    CHECK_EQ(resident(&memory), used);
    CHECK_EQ(pread(fd, edge, 1, (off_t)offset - 1), 1);
    CHECK_EQ(edge[0], 0xEE);
    CHECK_EQ(pread(fd, edge, 1, (off_t)(offset + memory.size_bytes)), 1);
    CHECK_EQ(edge[0], 0xEE);
    CHECK_SYS(fstat(fd, &stat));
    CHECK_EQ(stat.st_size, offset + memory.size_bytes + sizeof(edge));
    /* As sparse as the content is. (File systems use some blocks for themselves.) */
    CHECK((uint64_t)stat.st_blocks * 512 <= (pages / 8 + 2) * 2 * 4096 + 4 * 4096 + 65536);
    for (uint64_t at = 0; at < memory.size_bytes; at += sizeof(edge)) {
        CHECK_EQ(pread(fd, edge, sizeof(edge), (off_t)(offset + at)), sizeof(edge));
        CHECK(!memcmp(edge, (uint8_t *)memory.base + at, sizeof(edge)));
    }
    pc_memory_destroy(&memory);

    back = make(kind, pages);
    memset(page_at(&back, 0), 0x77, back.page_bytes); /* must go */
    CHECK_EQ(pc_memory_load(&back, fd, offset, back.size_bytes), 0);
    CHECK_EQ(digest(&back), before);
    CHECK(resident(&back) <= used);
    CHECK_EQ(pc_memory_load(&back, fd, offset, back.size_bytes + 1), -EINVAL);

    /* The file alone has the same digest. */
    CHECK_SYS(ftruncate(fd, 0));
    CHECK_EQ(pc_memory_dump(&back, fd, 0), 0);
    CHECK_EQ(pc_file_digest(fd, back.size_bytes, back.page_bytes, &value), 0);
    CHECK_EQ(value, before);
    CHECK_EQ(pc_file_digest(fd, back.size_bytes, 4096, &value), 0);
    CHECK_EQ(value, before);
}

static void memfd_dump_and_load(void) { dump_and_load(PC_MEMORY_MEMFD, PAGES); }
static void anon_dump_and_load(void) { dump_and_load(PC_MEMORY_ANON, PAGES); }
static void hugetlb_dump_and_load(void) { dump_and_load(PC_MEMORY_HUGETLB, 3); }

static void digest_depends_on_content_alone(void)
{
    struct pc_memory one = make(PC_MEMORY_MEMFD, PAGES), two = make(PC_MEMORY_ANON, PAGES), larger;
    uint64_t empty = digest(&one), value;

    CHECK_EQ(digest(&two), empty);
    for (uint64_t page = 0; page < PAGES; page += 3)
        memset(page_at(&two, page), 0, two.page_bytes);
    CHECK_EQ(digest(&two), empty);
    page_at(&one, 5)[100] = 1;
    CHECK((value = digest(&one)) != empty);
    page_at(&two, 5)[100] = 1;
    CHECK_EQ(digest(&two), value);
    /* The same pages in another order, the same content elsewhere, a bit elsewhere: different. */
    page_at(&one, 6)[100] = 2;
    page_at(&two, 5)[100] = 2;
    page_at(&two, 6)[100] = 1;
    CHECK(digest(&one) != digest(&two));
    page_at(&two, 5)[100] = 1;
    page_at(&two, 6)[100] = 2;
    CHECK_EQ(digest(&one), digest(&two));
    page_at(&two, 6)[101] = 1;
    CHECK(digest(&one) != digest(&two));
    larger = make(PC_MEMORY_MEMFD, PAGES + 1);
    CHECK(digest(&larger) != empty);
}

static void a_file_may_end_inside_the_last_page(void)
{
    struct pc_memory memory = make(PC_MEMORY_MEMFD, 3);
    uint64_t words[1] = {0}, from_memory = 0, from_file = 1;
    int fd = temporary_file();

    CHECK_EQ(pwrite(fd, "\x01", 1, (off_t)memory.page_bytes * 2 + 99), 1);
    CHECK_EQ(pc_memory_load(&memory, fd, 0, memory.size_bytes), 0);
    CHECK_EQ(page_at(&memory, 2)[99], 1);
    CHECK_EQ(pc_file_present(fd, memory.size_bytes, memory.page_bytes, words), 0);
    CHECK_EQ(words[0] & 4, 4);
    from_memory = digest(&memory);
    CHECK_EQ(pc_file_digest(fd, memory.size_bytes, memory.page_bytes, &from_file), 0);
    CHECK_EQ(from_file, from_memory);
    /* Also without telling the rounded size. */
    CHECK_EQ(pc_memory_load(&memory, fd, 0, memory.page_bytes * 2 + 100), 0);
    CHECK_EQ(digest(&memory), from_memory);
    CHECK_SYS(ftruncate(fd, (off_t)memory.page_bytes * 2));
    CHECK_EQ(pc_memory_load(&memory, fd, 0, memory.size_bytes), -ENODATA);
    CHECK_EQ(pc_file_present(fd, memory.size_bytes, memory.page_bytes, words), -ENODATA);
    CHECK_EQ(pc_file_digest(fd, memory.size_bytes, memory.page_bytes, &from_file), -ENODATA);
}

static void file_present_sees_holes(void)
{
    uint64_t words[2] = {0}, page = pc_page_bytes();
    int fd = temporary_file();

    CHECK_SYS(ftruncate(fd, (off_t)page * 100));
    CHECK_EQ(pc_file_present(fd, page * 100, page, words), 0);
    if (pc_bitmap_count(words, 100))
        SKIP("holes", "the file system under TMPDIR does not tell holes");
    CHECK_EQ(pwrite(fd, "x", 1, (off_t)page * 70), 1);
    CHECK_EQ(pc_file_present(fd, page * 100, page, words), 0);
    CHECK_EQ(pc_bitmap_next(words, 100, 0, 1), 70);
    CHECK_EQ(pc_bitmap_count(words, 100), 1);
}

static void dump_reports_a_full_disk(void)
{
    struct pc_memory memory = make(PC_MEMORY_MEMFD, 16);
    struct rlimit limit = {memory.page_bytes * 8, memory.page_bytes * 8};
    int fd = temporary_file(), ends[2];

    memset(memory.base, 1, memory.size_bytes);
    CHECK_SYS(pipe(ends));
    CHECK_EQ(pc_memory_dump(&memory, ends[1], 0), -ESPIPE);
    if (signal(SIGXFSZ, SIG_IGN) == SIG_ERR)
        FAIL("signal");
    CHECK_SYS(setrlimit(RLIMIT_FSIZE, &limit));
    CHECK_EQ(pc_memory_dump(&memory, fd, 0), -EFBIG);
    fd = open("/dev/full", O_WRONLY | O_CLOEXEC);
    CHECK(pc_memory_dump(&memory, fd, 0) < 0);
}

static void memfd_cannot_be_cut_off(void)
{
    struct pc_memory memory = make(PC_MEMORY_MEMFD, 4);

    CHECK_EQ(ftruncate(memory.fd, 0), -1);
    CHECK_EQ(errno, EPERM);
    CHECK_EQ(ftruncate(memory.fd, (off_t)memory.size_bytes * 2), -1);
    CHECK_EQ(fcntl(memory.fd, F_GET_SEALS) & (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL),
             F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    CHECK_EQ(fcntl(memory.fd, F_GETFD), FD_CLOEXEC);
}

static void is_not_inherited(void)
{
    struct pc_memory memory = make(PC_MEMORY_ANON, 4);
    int status;
    pid_t child;

    page_at(&memory, 0)[0] = 1;
    child = CHECK_SYS(fork());
    if (!child) {
        unsigned char there;

        _exit(mincore(memory.base, memory.page_bytes, &there) && errno == ENOMEM ? 0 : 1);
    }
    CHECK_SYS(waitpid(child, &status, 0));
    CHECK_EQ(status, 0);
}

static void sizes_are_checked(void)
{
    uint64_t page = pc_page_bytes(), huge = pc_huge_page_bytes();
    struct pc_memory memory;

#define REFUSED(kind, bytes, code, says)                                                                                \
    do {                                                                                                                \
        message[0] = '\0';                                                                                              \
        CHECK_EQ(pc_memory_create(kind, bytes, &memory, message, sizeof(message)), code);                               \
        if (!strstr(message, says) || strchr(message, '\n'))                                                            \
            FAIL("\"%s\" does not say \"%s\" in one line", message, says);                                              \
        CHECK(!memory.base && memory.fd == -1);                                                                         \
    } while (0)
    REFUSED(PC_MEMORY_MEMFD, 0, -EINVAL, "0 bytes");
    REFUSED(PC_MEMORY_ANON, page + 1, -EINVAL, "multiple of the page size");
    REFUSED(PC_MEMORY_MEMFD, (uint64_t)1 << 60, -ENOMEM, "1.0 EiB wanted");
    REFUSED(PC_MEMORY_ANON, (uint64_t)1 << 46, -ENOMEM, "64 TiB wanted");
    REFUSED(99, page, -EINVAL, "unknown kind");
    if (huge) {
        REFUSED(PC_MEMORY_HUGETLB, huge << 24, -ENOMEM, "sysctl vm.nr_hugepages=");
        REFUSED(PC_MEMORY_HUGETLB, page, -EINVAL, "multiple of the page size");
    }
    CHECK_EQ(pc_memory_create(PC_MEMORY_MEMFD, 0, &memory, NULL, 0), -EINVAL);
    CHECK_EQ(pc_memory_check(PC_MEMORY_MEMFD, page, message, sizeof(message)), 0);
#undef REFUSED
}

/* ---- what a binding needs ------------------------------------------------------------------------------------------ */

static void a_mapping_of_somebody_elses_fd_is_the_same_memory(void)
{
    struct pc_memory memory = make(PC_MEMORY_MEMFD, 4), other;

    CHECK_EQ(pc_memory_map(memory.fd, memory.size_bytes, memory.page_bytes, memory.kind, &other), 0);
    CHECK(other.fd != memory.fd && other.base != memory.base);
    memset(page_at(&memory, 2), 7, memory.page_bytes);
    CHECK_EQ(*page_at(&other, 2), 7);
    pc_memory_destroy(&memory); /* the descriptor was duplicated */
    CHECK_EQ(*page_at(&other, 2), 7);
    pc_memory_destroy(&other);
    CHECK_EQ(pc_memory_map(-1, 4096, 4096, PC_MEMORY_MEMFD, &other), -EBADF);
}

static void discarded_pages_are_zero(int kind)
{
    struct pc_memory memory = make(kind, 4);

    memset(memory.base, 9, memory.size_bytes);
    CHECK_EQ(pc_memory_discard(&memory, (uint64_t)(uintptr_t)page_at(&memory, 1), 2 * memory.page_bytes), 0);
    CHECK_EQ(resident(&memory), 2 * memory.page_bytes);
    CHECK_EQ(*page_at(&memory, 0), 9);
    CHECK_EQ(*page_at(&memory, 3), 9);
    CHECK(pc_is_zero(page_at(&memory, 1), 2 * memory.page_bytes));
    pc_memory_destroy(&memory);
}

static void memfd_discarded_pages_are_zero(void)
{
    discarded_pages_are_zero(PC_MEMORY_MEMFD);
}

static void anon_discarded_pages_are_zero(void)
{
    discarded_pages_are_zero(PC_MEMORY_ANON);
}

static void bytes_are_copied(void)
{
    struct pc_memory memory = make(PC_MEMORY_ANON, 2);
    uint8_t before[100], after[100] = {0};

    for (size_t i = 0; i < sizeof(before); i++)
        before[i] = (uint8_t)test_random();
    pc_bytes_copy((uint64_t)(uintptr_t)page_at(&memory, 1) - 50, (uint64_t)(uintptr_t)before, sizeof(before));
    pc_bytes_copy((uint64_t)(uintptr_t)after, (uint64_t)(uintptr_t)page_at(&memory, 1) - 50, sizeof(after));
    CHECK(!memcmp(before, after, sizeof(before)));
    pc_memory_destroy(&memory);
}

/* Regions of pages that are there, an array at a time. */
static void pagemap_scan_tells_regions(void)
{
    struct pc_memory memory = make(PC_MEMORY_ANON, 64);
    struct pc_pagemap_region regions[3];
    uint64_t base = (uint64_t)(uintptr_t)memory.base, page = memory.page_bytes, walk_end = 0, found = 0;
    struct pc_pagemap_query query = {.start = base,
                                     .end = base + memory.size_bytes,
                                     .all_of = PC_PAGE_PRESENT,
                                     .returned = PC_PAGE_PRESENT | PC_PAGE_FILE};
    int pagemap = CHECK_SYS(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));

    for (uint64_t i = 0; i < 64; i += 8) /* two pages, then six that are missing */
        memset(page_at(&memory, i), 1, 2 * page);
    while (query.start < query.end) {
        int64_t got = pc_pagemap_scan(pagemap, &query, regions, 3, &walk_end);

        if (got == -ENOTTY)
            SKIP("pagemap-scan", "no PAGEMAP_SCAN: needs Linux 6.7");
        CHECK(got >= 0);
        for (int64_t i = 0; i < got; i++) {
            CHECK_EQ(regions[i].start, base + found++ * 8 * page);
            CHECK_EQ(regions[i].end, regions[i].start + 2 * page);
            CHECK_EQ(regions[i].categories, PC_PAGE_PRESENT);
        }
        CHECK(walk_end > query.start);
        query.start = walk_end;
    }
    CHECK_EQ(found, 8);
    query = (struct pc_pagemap_query){.start = base + 1, .end = base + page};
    CHECK_EQ(pc_pagemap_scan(pagemap, &query, regions, 3, &walk_end), -EINVAL);
    CHECK_EQ(walk_end, base + 1);
    CHECK_EQ(pc_pagemap_scan(-1, &query, regions, 3, NULL), -EBADF);
    close(pagemap);
    pc_memory_destroy(&memory);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(16);
    RUN(memfd_present_and_resident);
    RUN(anon_present_and_resident);
    RUN(hugetlb_present_and_resident);
    RUN(anon_reads_are_not_content);
    RUN(memfd_written_elsewhere_is_present);
    RUN(hugetlb_written_elsewhere_is_present);
    RUN(memfd_dump_and_load);
    RUN(anon_dump_and_load);
    RUN(hugetlb_dump_and_load);
    RUN(digest_depends_on_content_alone);
    RUN(a_file_may_end_inside_the_last_page);
    RUN(file_present_sees_holes);
    RUN(dump_reports_a_full_disk);
    RUN(memfd_cannot_be_cut_off);
    RUN(is_not_inherited);
    RUN(sizes_are_checked);
    RUN(a_mapping_of_somebody_elses_fd_is_the_same_memory);
    RUN(memfd_discarded_pages_are_zero);
    RUN(anon_discarded_pages_are_zero);
    RUN(bytes_are_copied);
    RUN(pagemap_scan_tells_regions);
    return test_end();
}
