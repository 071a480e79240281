/* SPDX-License-Identifier: Apache-2.0
 *
 * The dirty log, on each kind of memory: what is written is in it, once; what page tables do not show, and what becomes of that.
 */
#include <fcntl.h>
#include <grp.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "core/util.h"
#include "postcopy/core.h"
#include "postcopy/memory.h"
#include "postcopy/uffd.h"
#include "tests/support/huge_pool.h"
#include "tests/support/test.h"
#include "uffd/uffd_abi.h"

#define PAGES 16
#define WORDS (8192 / 64)

static char message[PC_ERROR_BYTES];

static uint64_t page_bytes_of(int kind)
{
    return kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
}

static struct pc_memory make(int kind, uint64_t pages)
{
    struct pc_memory memory;
    int result;

    if (kind == PC_MEMORY_HUGETLB && pc_huge_page_bytes() != 2 << 20)
        SKIP("hugetlb", "the default huge page is not 2 MiB");
    result = pc_memory_create(kind, pages * page_bytes_of(kind), &memory, message, sizeof(message));
    if (kind == PC_MEMORY_HUGETLB && result == -ENOMEM)
        SKIP("hugetlb", "%s", message);
    if (result)
        FAIL("%s", message);
    return memory;
}

static struct pc_dirty_log *open_log(const struct pc_memory *memory)
{
    struct pc_dirty_log *log;
    int result;

    CHECK_EQ(pc_dirty_log_new(&log), 0);
    result = pc_dirty_log_add(log, memory, message, sizeof(message));
    if (result == -EOPNOTSUPP)
        SKIP("wp-async", "%s", message);
    if (result)
        FAIL("%s", message);
    return log;
}

/* The pages in the log as text: "1 5 6 ". */
static const char *collect(struct pc_dirty_log *log, uint32_t index, uint64_t pages)
{
    static char text[8192];
    uint64_t words[WORDS] = {0};
    int64_t count = pc_dirty_log_collect(log, index, words);
    size_t used = 0;

    CHECK(count >= 0);
    CHECK_EQ(count, pc_bitmap_count(words, pages));
    text[0] = '\0';
    for (uint64_t page = 0; (page = pc_bitmap_next(words, pages, page, 1)) < pages; page++)
        used += (size_t)snprintf(text + used, sizeof(text) - used, "%llu ", (unsigned long long)page);
    return text;
}

#define CHECK_LOG(log, expected)                                                                                        \
    do {                                                                                                                \
        const char *got_ = collect(log, 0, PAGES);                                                                      \
        if (strcmp(got_, expected))                                                                                     \
            FAIL("the log has \"%s\", should be \"%s\"", got_, expected);                                               \
    } while (0)

static volatile uint8_t *at(const struct pc_memory *memory, uint64_t page)
{
    return (volatile uint8_t *)memory->base + page * memory->page_bytes;
}

/* A system call that writes a byte to a page. */
static void write_by_kernel(const struct pc_memory *memory, uint64_t page)
{
    int fds[2];

    CHECK_SYS(pipe(fds));
    CHECK_EQ(write(fds[1], "k", 1), 1);
    CHECK_EQ(read(fds[0], (uint8_t *)memory->base + page * memory->page_bytes + 1, 1), 1);
    close(fds[0]);
    close(fds[1]);
}

#define OF_EACH_KIND(name)                                                                                              \
    static void name##_memfd(void) { name(PC_MEMORY_MEMFD); }                                                           \
    static void name##_anon(void) { name(PC_MEMORY_ANON); }                                                             \
    static void name##_hugetlb(void) { name(PC_MEMORY_HUGETLB); }

/* ---- what is written ---------------------------------------------------------------------------------------------- */

static void writes_are_logged_once(int kind)
{
    struct pc_memory memory = make(kind, PAGES);
    struct pc_dirty_log *log;
    uint64_t words[1] = {UINT64_C(1) << 3};

    *at(&memory, 0) = 1; /* before */
    *at(&memory, 1) = 1;
    log = open_log(&memory);
    CHECK_LOG(log, "");
    *at(&memory, 1) = 2;
    *at(&memory, 5) = 1; /* the first touch of all */
    write_by_kernel(&memory, 0);
    write_by_kernel(&memory, 15);
    CHECK_EQ(*at(&memory, 15), 0);
    CHECK_LOG(log, "0 1 5 15 ");
    CHECK_LOG(log, "");
    CHECK_EQ(*at(&memory, 0) + *at(&memory, 1) + *at(&memory, 5), 4);
    CHECK_LOG(log, ""); /* reading is no writing */
    *at(&memory, 5) = 2;
    *at(&memory, 6) = 2;
    CHECK_EQ(pc_dirty_log_collect(log, 0, words), 2); /* added to what is there */
    CHECK_EQ(words[0], 0x68);
    CHECK_EQ(pc_dirty_log_collect(log, 1, words), -EINVAL);
    pc_dirty_log_free(log);
    *at(&memory, 7) = 1;
    log = open_log(&memory); /* the userfaultfd is gone */
    CHECK_LOG(log, "");
    pc_dirty_log_free(log);
    pc_memory_destroy(&memory);
}
OF_EACH_KIND(writes_are_logged_once)

static void marks_are_logged_once(int kind)
{
    struct pc_memory memory = make(kind, PAGES), other = make(kind, PAGES);
    struct pc_dirty_log *log = open_log(&memory);
    uint64_t base = (uint64_t)(uintptr_t)memory.base, unit = memory.page_bytes;

    CHECK_EQ(pc_dirty_log_add(log, &other, message, sizeof(message)), 1);
    pc_dirty_log_mark(log, base + 2 * unit + 7, unit); /* two pages, for its last bytes */
    pc_dirty_log_mark(log, base + 9 * unit, 0);
    pc_dirty_log_mark(log, unit, unit); /* of none */
    pc_dirty_log_mark(log, (uint64_t)(uintptr_t)other.base + unit, 1);
    *at(&memory, 3) = 1;
    CHECK_LOG(log, "2 3 ");
    CHECK_LOG(log, "");
    CHECK_EQ(strcmp(collect(log, 1, PAGES), "1 "), 0);
    pc_dirty_log_mark(log, unit, UINT64_MAX / 2); /* of both, and more */
    CHECK_LOG(log, "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 ");
    CHECK_LOG(log, "");
    CHECK(!strncmp(collect(log, 1, PAGES), "0 1 2 ", 6));
    pc_dirty_log_free(log);
    pc_memory_destroy(&memory);
    pc_memory_destroy(&other);
}
OF_EACH_KIND(marks_are_logged_once)

/* Threads write while another one keeps a copy by the log; at the end it is one. */
struct writer {
    struct pc_memory *memory;
    atomic_bool end;
    uint64_t seed;
    pthread_t thread;
};

static void *write_about(void *argument)
{
    struct writer *writer = argument;
    uint64_t x = writer->seed, words = writer->memory->size_bytes / sizeof(uint64_t);

    while (!atomic_load(&writer->end)) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        __atomic_store_n((uint64_t *)writer->memory->base + (x >> 16) % words, x, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void copy_logged(struct pc_dirty_log *log, const struct pc_memory *memory, uint64_t *copy)
{
    uint64_t words[WORDS] = {0}, per_page = memory->page_bytes / sizeof(uint64_t);
    uint64_t pages = memory->size_bytes / memory->page_bytes;

    CHECK(pc_dirty_log_collect(log, 0, words) >= 0);
    for (uint64_t page = 0; (page = pc_bitmap_next(words, pages, page, 1)) < pages; page++)
        for (uint64_t i = page * per_page; i < (page + 1) * per_page; i++)
            copy[i] = __atomic_load_n((uint64_t *)memory->base + i, __ATOMIC_RELAXED);
}

static void a_copy_follows_the_log(int kind)
{
    struct pc_memory memory = make(kind, kind == PC_MEMORY_HUGETLB ? 3 : 1024);
    struct writer writers[2];
    struct pc_dirty_log *log = open_log(&memory);
    uint64_t *copy = calloc(1, memory.size_bytes);

    CHECK(copy != NULL);
    for (int i = 0; i < 2; i++) {
        writers[i] = (struct writer){.memory = &memory, .seed = test_random()};
        CHECK_EQ(pthread_create(&writers[i].thread, NULL, write_about, &writers[i]), 0);
    }
    for (int round = 0; round < (kind == PC_MEMORY_HUGETLB ? 8 : 40); round++) {
        copy_logged(log, &memory, copy);
        if (kind == PC_MEMORY_MEMFD && round % 8 == 7) /* out of the page tables, into the page cache: as when memory is short */
            CHECK_SYS(madvise(memory.base, memory.size_bytes, MADV_DONTNEED));
    }
    for (int i = 0; i < 2; i++) {
        atomic_store(&writers[i].end, true);
        CHECK_EQ(pthread_join(writers[i].thread, NULL), 0);
    }
    copy_logged(log, &memory, copy);
    CHECK(!memcmp(copy, memory.base, memory.size_bytes));
    free(copy);
    pc_dirty_log_free(log);
    pc_memory_destroy(&memory);
}
OF_EACH_KIND(a_copy_follows_the_log)

/* ---- page tables -------------------------------------------------------------------------------------------------- */

/* Shared memory leaves the page tables when memory is short, and with it every trace of a write. */
static void a_page_that_was_evicted(void)
{
    struct pc_memory memory = make(PC_MEMORY_MEMFD, PAGES);
    struct pc_dirty_log *log;

    *at(&memory, 2) = 1;
    log = open_log(&memory);
    *at(&memory, 3) = 1;
    CHECK_SYS(madvise(memory.base, memory.size_bytes, MADV_DONTNEED)); /* of shared memory: the entry goes, the page stays */
    CHECK_LOG(log, "3 ");
    CHECK_LOG(log, "");
    CHECK_EQ(*at(&memory, 3), 1);
    CHECK_LOG(log, "");
    *at(&memory, 3) = 2;
    CHECK_LOG(log, "3 ");
    pc_dirty_log_free(log);
    pc_memory_destroy(&memory);
}

static long page_table_kib(void)
{
    FILE *file = fopen("/proc/self/status", "re");
    char line[256];
    long kib = -1;

    CHECK(file != NULL);
    while (kib < 0 && fgets(line, sizeof(line), file))
        (void)sscanf(line, "VmPTE: %ld", &kib);
    (void)fclose(file);
    CHECK(kib >= 0);
    return kib;
}

static void sparse_memory_stays_sparse(int kind)
{
    struct pc_memory memory = make(kind, (UINT64_C(512) << 20) / pc_page_bytes());
    uint64_t pages = memory.size_bytes / memory.page_bytes, resident, *words = calloc(pages / 64, 8), *present = calloc(pages / 64, 8);
    struct pc_dirty_log *log;
    long before;

    CHECK(words != NULL && present != NULL);
    *at(&memory, 7) = 1;
    before = page_table_kib();
    log = open_log(&memory);
    CHECK_EQ(pc_dirty_log_collect(log, 0, words), 0);
    *at(&memory, pages - 9) = 1;
    CHECK_EQ(pc_dirty_log_collect(log, 0, words), 1);
    CHECK_EQ(pc_bitmap_next(words, pages, 0, 1), pages - 9);
    CHECK(page_table_kib() - before < 256); /* 1 MiB for all of it */
    CHECK_EQ(pc_memory_resident(&memory, &resident), 0);
    CHECK_EQ(resident, 2 * memory.page_bytes);
    CHECK_EQ(pc_memory_present(&memory, present), 0); /* what the log has left in the page tables is no content */
    CHECK_EQ(pc_bitmap_count(present, pages), 2);
    pc_dirty_log_free(log);
    free(words);
    free(present);
    pc_memory_destroy(&memory);
}

static void sparse_memory_stays_sparse_memfd(void)
{
    sparse_memory_stays_sparse(PC_MEMORY_MEMFD);
}

static void sparse_memory_stays_sparse_anon(void)
{
    sparse_memory_stays_sparse(PC_MEMORY_ANON);
}

static void transparent_huge_pages(void)
{
    const uint64_t huge = 2 << 20, unit = pc_page_bytes();
    uint8_t *area = CHECK_SYS(mmap(NULL, 3 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    uint8_t *base = area + (huge - (uintptr_t)area % huge) % huge;
    struct pc_memory memory = {.base = base, .size_bytes = 2 * huge, .page_bytes = unit, .kind = PC_MEMORY_ANON, .fd = -1};
    struct pc_dirty_log *log;

    (void)madvise(base, memory.size_bytes, MADV_HUGEPAGE); /* where this kernel has them */
    memset(base, 1, memory.size_bytes);
    log = open_log(&memory);
    CHECK_EQ(strcmp(collect(log, 0, memory.size_bytes / unit), ""), 0);
    base[3 * unit] = 2;
    base[huge + 5 * unit] = 2;
    CHECK_EQ(strcmp(collect(log, 0, memory.size_bytes / unit), "3 517 "), 0);
    CHECK_EQ(strcmp(collect(log, 0, memory.size_bytes / unit), ""), 0);
    pc_dirty_log_free(log);
    CHECK_SYS(munmap(area, 3 * huge));
}

/* ---- rights, and where there is no log --------------------------------------------------------------------------- */

static void memory_of_another_userfaultfd(int kind)
{
    struct pc_memory memory = make(kind, PAGES);
    struct pc_dirty_log *log = open_log(&memory), *second;
    uint64_t half = PAGES / 2 * memory.page_bytes, base = (uint64_t)(uintptr_t)memory.base;
    struct pc_uffd_api api;
    int uffd;

    CHECK_EQ(pc_dirty_log_new(&second), 0);
    CHECK_EQ(pc_dirty_log_add(second, &memory, message, sizeof(message)), -EBUSY);
    CHECK(strstr(message, "another userfaultfd") != NULL);
    *at(&memory, 1) = 1;
    CHECK_LOG(log, "1 "); /* the first one goes on */
    pc_dirty_log_free(log);
    uffd = pc_uffd_open(PC_UFFD_ANY, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS, &api);
    CHECK(uffd >= 0);
    CHECK_EQ(pc_uffd_register(uffd, base + half, half, PC_UFFD_MISSING, NULL), 0);
    CHECK_EQ(pc_dirty_log_add(second, &memory, message, sizeof(message)), -EBUSY);
    CHECK_EQ(pc_uffd_unregister(uffd, base + half, half), 0);
    close(uffd);
    CHECK_EQ(pc_dirty_log_add(second, &memory, message, sizeof(message)), 0);
    *at(&memory, 9) = 1;
    CHECK_LOG(second, "9 ");
    pc_dirty_log_free(second);
    pc_memory_destroy(&memory);
}
OF_EACH_KIND(memory_of_another_userfaultfd)

static void what_is_no_memory(void)
{
    struct pc_memory memory = {.size_bytes = 4096, .page_bytes = 4096, .kind = PC_MEMORY_ANON, .fd = -1};
    struct pc_dirty_log *log;

    CHECK_EQ(pc_dirty_log_new(&log), 0);
    CHECK_EQ(pc_dirty_log_add(log, &memory, message, sizeof(message)), -EINVAL);
    pc_dirty_log_mark(log, 4096, 4096);
    pc_dirty_log_free(log);
}

/* With no right but to UFFD_USER_MODE_ONLY: the writes of system calls are seen all the same, as no fault waits. */
static void an_ordinary_user(int kind)
{
    struct pc_memory memory;
    struct pc_dirty_log *log;

    if (!geteuid()) {
        CHECK_SYS(setgroups(0, NULL));
        CHECK_SYS(setgid(65534));
        CHECK_SYS(setuid(65534));
        CHECK_SYS(prctl(PR_SET_DUMPABLE, 1)); /* or /proc/self would be root's: an exec sees to that otherwise */
    }
    memory = make(kind, PAGES);
    log = open_log(&memory);
    write_by_kernel(&memory, 3);
    *at(&memory, 4) = 1;
    CHECK_LOG(log, "3 4 ");
    write_by_kernel(&memory, 3); /* to a page that is protected now */
    CHECK_LOG(log, "3 ");
    pc_dirty_log_free(log);
    pc_memory_destroy(&memory);
}
OF_EACH_KIND(an_ordinary_user)

/* A child has its own copies; the parent's pages are in the log although fork has made them copy-on-write. */
static void a_fork(void)
{
    struct pc_memory memory = make(PC_MEMORY_ANON, PAGES);
    struct pc_dirty_log *log;
    pid_t child;
    int status;

    for (uint64_t page = 0; page < 8; page++)
        *at(&memory, page) = 1;
    CHECK_SYS(madvise(memory.base, memory.size_bytes, MADV_DOFORK));
    log = open_log(&memory);
    *at(&memory, 1) = 2; /* not protected when it is shared */
    child = CHECK_SYS(fork());
    if (!child) {
        *at(&memory, 2) = 9;
        *at(&memory, 12) = 9;
        _exit(0);
    }
    CHECK_SYS(waitpid(child, &status, 0));
    CHECK_EQ(status, 0);
    CHECK_LOG(log, "1 ");
    *at(&memory, 1) = 3;
    *at(&memory, 3) = 3;
    CHECK_LOG(log, "1 3 ");
    CHECK_EQ(*at(&memory, 2), 1);
    pc_dirty_log_free(log);
    pc_memory_destroy(&memory);
}

/* ---- pinned pages ------------------------------------------------------------------------------------------------- */

/* One io_uring with one buffer registered, that is, pinned. */
struct ring {
    int fd;
    struct io_uring_params params;
    uint8_t *rings;
    struct io_uring_sqe *sqes;
};

static bool ring_open(struct ring *ring, void *buffer, size_t bytes)
{
    struct iovec pinned = {.iov_base = buffer, .iov_len = bytes};

    memset(ring, 0, sizeof(*ring));
    ring->fd = (int)syscall(SYS_io_uring_setup, 1, &ring->params);
    if (ring->fd < 0 || !(ring->params.features & IORING_FEAT_SINGLE_MMAP))
        return false;
    ring->rings = CHECK_SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, IORING_OFF_SQ_RING));
    ring->sqes = CHECK_SYS(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, IORING_OFF_SQES));
    return !syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_BUFFERS, &pinned, 1);
}

static void ring_read(struct ring *ring, int fd, void *buffer, uint32_t bytes)
{
    uint32_t *tail = (uint32_t *)(void *)(ring->rings + ring->params.sq_off.tail);
    uint32_t *array = (uint32_t *)(void *)(ring->rings + ring->params.sq_off.array);
    struct io_uring_cqe *cqe = (struct io_uring_cqe *)(void *)(ring->rings + ring->params.cq_off.cqes);

    ring->sqes[0] = (struct io_uring_sqe){
        .opcode = IORING_OP_READ_FIXED, .fd = fd, .addr = (uint64_t)(uintptr_t)buffer, .len = bytes};
    array[*tail % ring->params.sq_entries] = 0;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    CHECK_EQ(syscall(SYS_io_uring_enter, ring->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0), 1);
    CHECK_EQ(cqe->res, bytes);
}

/* What marks are for: a page that the kernel has pinned changes, and no page table shows it. */
static void a_pinned_page_needs_a_mark(int kind)
{
    struct pc_memory memory = make(kind, PAGES);
    uint8_t *page = (uint8_t *)memory.base + 4 * memory.page_bytes;
    struct pc_dirty_log *log;
    struct ring ring;
    int file = CHECK_SYS(memfd_create("content", MFD_CLOEXEC));

    CHECK_EQ(write(file, "new", 3), 3);
    memcpy(page, "old", 3);
    log = open_log(&memory);
    if (!ring_open(&ring, page, pc_page_bytes()))
        SKIP("io_uring", "io_uring with registered buffers: %s", strerror(errno));
    CHECK_LOG(log, "4 "); /* the pin counts as a write, now */
    ring_read(&ring, file, page, 3);
    CHECK(!memcmp(page, "new", 3));
    CHECK_LOG(log, ""); /* unseen: when a kernel shows it, marks can go */
    pc_dirty_log_mark(log, (uint64_t)(uintptr_t)page, 3);
    CHECK_LOG(log, "4 ");
    close(ring.fd);
    close(file);
    pc_dirty_log_free(log);
    pc_memory_destroy(&memory);
}
OF_EACH_KIND(a_pinned_page_needs_a_mark)

#define RUN_KINDS(name)                                                                                                 \
    do {                                                                                                                \
        RUN(name##_memfd);                                                                                              \
        RUN(name##_anon);                                                                                               \
        RUN(name##_hugetlb);                                                                                            \
    } while (0)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(2 * PAGES);
    RUN_KINDS(writes_are_logged_once);
    RUN_KINDS(marks_are_logged_once);
    RUN_KINDS(a_copy_follows_the_log);
    RUN(a_page_that_was_evicted);
    RUN(sparse_memory_stays_sparse_memfd);
    RUN(sparse_memory_stays_sparse_anon);
    RUN(transparent_huge_pages);
    RUN_KINDS(memory_of_another_userfaultfd);
    RUN(what_is_no_memory);
    RUN_KINDS(an_ordinary_user);
    RUN(a_fork);
    RUN_KINDS(a_pinned_page_needs_a_mark);
    return test_end();
}
