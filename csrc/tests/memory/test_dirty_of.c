/* SPDX-License-Identifier: Apache-2.0
 *
 * The dirty log of memory that another process writes to: a child of the case, which has mapped a file of it.
 */
#include "core/util.h"
#include "postcopy/core.h"
#include "tests/support/huge_pool.h"
#include "tests/support/owner.h"
#include "uffd/uffd_abi.h"

#define PAGES 16
#define MANY 1024
#define WORDS (MANY / 64)
#define FEATURES                                                                                                                \
    (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC)

static char message[PC_ERROR_BYTES];

static struct pc_memory make(int kind, uint64_t pages)
{
    uint64_t page_bytes = kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
    struct pc_memory memory;
    int result = -EINVAL;

    if (page_bytes)
        result = pc_memory_create(kind, pages * page_bytes, &memory, message, sizeof(message));
    if (result && kind == PC_MEMORY_HUGETLB)
        SKIP("hugetlb", "%s", message);
    if (result)
        FAIL("%s", message);
    CHECK_SYS(munmap(memory.base, memory.size_bytes));
    memory.base = NULL;
    return memory;
}

/* As a guest that zeroes what it frees, and gives that back. */
static void zero_and_give_back(const struct owner *owner, uint64_t page)
{
    for (uint64_t i = 0; i < owner->memory.page_bytes / sizeof(uint64_t); i++)
        owner_page(owner, page)[i] = 0;
    owner_punch(owner, page);
    owner_dontneed(owner, page);
}

/* At random, at all of the memory, in each way of writing; sometimes all leaves the page tables, as when memory is short. Some pages of a
 * memfd belong to one thread each, which gives them back. */
static void write_about(struct owner *owner, uint64_t number)
{
    uint64_t x = test_.seed + number, pages = owner->memory.size_bytes / owner->memory.page_bytes;
    bool memfd = owner->memory.kind == PC_MEMORY_MEMFD;

    while (!atomic_load(&owner->stop)) {
        uint64_t page;

        x = x * 6364136223846793005u + 1442695040888963407u;
        page = (x >> 20) % pages;
        if (memfd && page % 8 < OWNER_THREADS && (page % 8 != number || x >> 63)) {
            if (page % 8 == number)
                zero_and_give_back(owner, page);
        } else if (x >> 55 == 1 && memfd) {
            owner_dontneed(owner, page);
        } else if (x >> 56 == 2) {
            owner_write_by_kernel(&owner_page(owner, page)[number], x);
        } else {
            owner_page(owner, page)[number + 8 * (x >> 60)] = x;
        }
        atomic_fetch_add(&owner->steps, 1);
    }
}

static struct pc_dirty_log *new_log(const struct owner *owner)
{
    struct pc_dirty_log *log;
    char path[64];
    int pagemap;

    (void)snprintf(path, sizeof(path), "/proc/%d/pagemap", owner->pid);
    pagemap = CHECK_SYS(open(path, O_RDONLY | O_CLOEXEC));
    if (pc_dirty_log_new_of(owner->uffd, pagemap, &log, message, sizeof(message)))
        FAIL("%s", message);
    close(pagemap);
    return log;
}

static int add(struct pc_dirty_log *log, const struct owner *owner)
{
    return pc_dirty_log_add_at(log, &owner->memory, owner->address, message, sizeof(message));
}

static struct pc_dirty_log *open_log(const struct owner *owner)
{
    struct pc_dirty_log *log = new_log(owner);
    int result = add(log, owner);

    if (result == -EOPNOTSUPP)
        SKIP("wp-async", "%s", message);
    if (result)
        FAIL("%s", message);
    return log;
}

#define CHECK_LOG(log, expected)                                                                                                \
    do {                                                                                                                        \
        uint64_t words_ = 0;                                                                                                    \
        int64_t count_ = pc_dirty_log_collect(log, 0, &words_);                                                                 \
        CHECK_EQ(words_, expected);                                                                                             \
        CHECK_EQ(count_, pc_bitmap_count(&words_, PAGES));                                                                      \
    } while (0)

static void writes_are_logged_once(int kind)
{
    struct pc_memory memory = make(kind, PAGES);
    struct owner *owner = start_owner(&memory, FEATURES, write_about);
    struct pc_dirty_log *log;

    if (kind == PC_MEMORY_MEMFD)
        CHECK_EQ(pwrite(memory.fd, "x", 1, 9 * (off_t)memory.page_bytes), 1); /* is there, and in no page table */
    order_write(owner, WRITE, 1, 1);
    log = open_log(owner);
    CHECK_LOG(log, 0);
    order_write(owner, WRITE, 1, 2);
    order_write(owner, WRITE, 5, 2); /* the first touch of all */
    order_write(owner, WRITE_BY_KERNEL, 6, 2);
    CHECK_LOG(log, 0x62);
    CHECK_LOG(log, 0);
    CHECK_EQ(order(owner, READ, 5), 2);
    (void)order(owner, READ, 9);
    CHECK_LOG(log, kind == PC_MEMORY_MEMFD ? 0 : 0x200); /* the first touch of a huge page counts */
    order_write(owner, WRITE, 9, 3);
    if (kind == PC_MEMORY_MEMFD) { /* written, and then in no page table any more */
        order_write(owner, WRITE, 3, 3);
        (void)order(owner, DONTNEED, 3);
        (void)order(owner, DONTNEED, 5); /* not written */
    }
    pc_dirty_log_mark(log, owner->address + 12 * memory.page_bytes, 1);
    CHECK_LOG(log, kind == PC_MEMORY_MEMFD ? 0x1208 : 0x1200);
    CHECK_LOG(log, 0);
    if (kind == PC_MEMORY_MEMFD) { /* written, and given back: by a guest that expects what it has written, if that is zeros */
        order_write(owner, WRITE, 1, 0);
        (void)order(owner, PUNCH, 1);
        (void)order(owner, DONTNEED, 1);
        (void)order(owner, PUNCH, 6); /* not written */
        CHECK_LOG(log, 2);
        CHECK_LOG(log, 0);
        CHECK_EQ(order(owner, READ, 1), 0);
        order_write(owner, WRITE, 1, 2);
        CHECK_LOG(log, 2);
    }
    pc_dirty_log_free(log);
    order_write(owner, WRITE, 2, 1); /* of no log */
    log = open_log(owner); /* the same userfaultfd once more */
    CHECK_LOG(log, 0);
    order_write(owner, WRITE, 2, 2);
    CHECK_LOG(log, 4);
    pc_dirty_log_free(log);
    end_owner(owner);
}

static void a_copy_follows_the_log(int kind)
{
    struct pc_memory memory = make(kind, kind == PC_MEMORY_HUGETLB ? 3 : MANY);
    struct owner *owner = start_owner(&memory, FEATURES, write_about);
    struct pc_dirty_log *log = open_log(owner);
    uint8_t *copy = calloc(1, memory.size_bytes), *now = malloc(memory.size_bytes);
    uint64_t pages = memory.size_bytes / memory.page_bytes;

    CHECK(copy && now);
    for (uint64_t thread = 0; thread < OWNER_THREADS; thread++)
        give(owner, thread, WORK, 0);
    for (int round = 0, last = 40; round <= last; round++) {
        uint64_t words[WORDS] = {0}, steps = atomic_load(&owner->steps);

        if (round == last) {
            atomic_store(&owner->stop, true);
            for (uint64_t thread = 0; thread < OWNER_THREADS; thread++)
                (void)finish(owner, thread);
        }
        while (round < last && atomic_load(&owner->steps) < steps + 100)
            pc_sleep_ns(50000);
        CHECK(pc_dirty_log_collect(log, 0, words) >= 0);
        for (uint64_t page = 0; (page = pc_bitmap_next(words, pages, page, 1)) < pages; page++)
            CHECK_EQ(pread(memory.fd, copy + page * memory.page_bytes, memory.page_bytes, (off_t)(page * memory.page_bytes)),
                     memory.page_bytes);
    }
    CHECK_EQ(pread(memory.fd, now, memory.size_bytes, 0), memory.size_bytes);
    CHECK(!memcmp(copy, now, memory.size_bytes));
    free(copy);
    free(now);
    pc_dirty_log_free(log);
    end_owner(owner);
}

/* Its page tables are empty then, and nothing written would be the wrong answer: when it ends, and when it is another program. */
static void the_process_ends(bool executes)
{
    struct pc_memory memory = make(PC_MEMORY_MEMFD, PAGES);
    struct owner *owner = start_owner(&memory, FEATURES, write_about);
    struct pc_dirty_log *log = open_log(owner);
    uint64_t words = 0;
    int64_t result;

    CHECK_LOG(log, 0);
    order_write(owner, WRITE, 1, 1);
    if (executes)
        give(owner, 0, EXECUTE, 0);
    else
        CHECK_SYS(kill(owner->pid, SIGKILL));
    while ((result = pc_dirty_log_collect(log, 0, &words)) != -ESRCH) {
        CHECK(result >= 0);
        pc_sleep_ns(50000);
    }
    pc_dirty_log_free(log);
    if (executes) {
        log = new_log(owner);
        CHECK_EQ(add(log, owner), -ESRCH);
        pc_dirty_log_free(log);
    }
    end_owner(owner);
}

static void the_process_is_killed(void)
{
    the_process_ends(false);
}

static void the_process_executes_another_program(void)
{
    the_process_ends(true);
}

static void what_is_refused(void)
{
    struct pc_memory memory = make(PC_MEMORY_MEMFD, PAGES);
    struct owner *owner = start_owner(&memory, FEATURES, write_about);
    struct owner *other = start_owner(&memory, FEATURES | UFFD_FEATURE_EVENT_REMOVE, write_about);
    struct owner *none = start_owner(&memory, UFFD_FEATURE_MISSING_SHMEM, write_about);
    int pagemap = CHECK_SYS(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    struct pc_dirty_log *log, *second;

    CHECK_EQ(pc_dirty_log_new_of(other->uffd, pagemap, &log, message, sizeof(message)), -EINVAL); /* nobody would read events */
    CHECK_EQ(pc_dirty_log_new_of(none->uffd, pagemap, &log, message, sizeof(message)), -EINVAL);
    CHECK_EQ(pc_dirty_log_new_of(pagemap, pagemap, &log, message, sizeof(message)), -EINVAL);
    CHECK_EQ(pc_dirty_log_new_of(owner->uffd, -1, &log, message, sizeof(message)), -EBADF);
    CHECK_EQ(pc_dirty_log_new_of(owner->uffd, pagemap, &log, message, sizeof(message)), 0);
    CHECK_EQ(add(log, owner), -EPERM); /* the page tables of this process */
    pc_dirty_log_free(log);
    log = open_log(owner); /* and nothing was left registered */
    second = new_log(owner);
    CHECK_EQ(pc_dirty_log_add_at(second, &memory, 0, message, sizeof(message)), -EINVAL);
    pc_dirty_log_free(second);
    order_write(owner, WRITE, 7, 1);
    CHECK_LOG(log, 0x80);
    pc_dirty_log_free(log);
    close(pagemap);
    end_owner(owner);
    end_owner(other);
    end_owner(none);
}

#define OF_EACH_FILE(name)                                                                                                      \
    static void name##_memfd(void) { name(PC_MEMORY_MEMFD); }                                                                   \
    static void name##_hugetlb(void) { name(PC_MEMORY_HUGETLB); }
OF_EACH_FILE(writes_are_logged_once)
OF_EACH_FILE(a_copy_follows_the_log)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(PAGES);
    RUN(writes_are_logged_once_memfd);
    RUN(writes_are_logged_once_hugetlb);
    RUN(a_copy_follows_the_log_memfd);
    RUN(a_copy_follows_the_log_hugetlb);
    RUN(the_process_is_killed);
    RUN(the_process_executes_another_program);
    RUN(what_is_refused);
    return test_end();
}
