/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory of another process: read, looked at, and what is written to it while it runs. The other process is a child that does what
 * it is told, with a userfaultfd as a virtual machine monitor opens one: EVENT_REMOVE and nothing else.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "core/util.h"
#include "postcopy/core.h"
#include "postcopy/memory.h"
#include "postcopy/uffd.h"
#include "tests/support/test.h"
#include "uffd/uffd_abi.h"

#define PAGES UINT64_C(2048) /* of several chunks in which the write log looks */
#define WORDS (PAGES / 64)
#define WRITERS 3

static char message[PC_ERROR_BYTES];

/* Shared with the other process. */
struct shared {
    _Atomic(uint64_t) writes, removals;
    atomic_bool stop;
    atomic_int uffd, running;
};

struct other {
    pid_t pid;
    int pidfd, uffd, orders;
    struct shared *shared;
    uint8_t *base; /* its memory, at this address there: PAGES pages */
    struct pc_remote *remote;
    struct pc_memory memory; /* for who reads it here */
};

enum order { WRITE = 'w', READ = 'r', REMOVE = 'm', WRITE_ALL_THE_TIME = 'a', REMOVE_TOO = 'b', STOP = 's' };

struct instruction {
    enum order order;
    uint64_t page, pages;
};

/* ---- the other process ---- */

static struct {
    struct shared *shared;
    uint8_t *base;
} mine;

static void *write_all_the_time(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument * 7919 + 1, page_bytes = pc_page_bytes();

    while (!atomic_load(&mine.shared->stop)) {
        uint64_t *at;

        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        at = (uint64_t *)(void *)(mine.base + state % PAGES * page_bytes + (uintptr_t)argument * 64);
        (*at)++;
        atomic_fetch_add(&mine.shared->writes, 1);
    }
    return NULL;
}

static void *remove_all_the_time(void *argument)
{
    uint64_t state = 4711, page_bytes = pc_page_bytes();

    (void)argument;
    while (!atomic_load(&mine.shared->stop)) {
        uint64_t page, pages;

        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        page = state % PAGES;
        pages = 1 + (state >> 32) % 8;
        if (page + pages <= PAGES && madvise(mine.base + page * page_bytes, pages * page_bytes, MADV_DONTNEED))
            _exit(3);
        atomic_fetch_add(&mine.shared->removals, 1);
        pc_sleep_ns(200000);
    }
    return NULL;
}

static void obey(int orders)
{
    uint64_t page_bytes = pc_page_bytes();
    pthread_t threads[WRITERS + 1];
    struct instruction instruction;
    uint64_t sum = 0;
    int count = 0;

    while (read(orders, &instruction, sizeof(instruction)) == sizeof(instruction)) {
        for (uint64_t page = instruction.page; page < instruction.page + instruction.pages; page++) {
            volatile uint8_t *at = mine.base + page * page_bytes;

            if (instruction.order == WRITE)
                (*at)++;
            else if (instruction.order == READ)
                sum += *at;
        }
        if (instruction.order == REMOVE)
            (void)madvise(mine.base + instruction.page * page_bytes, instruction.pages * page_bytes, MADV_DONTNEED);
        while (instruction.order == WRITE_ALL_THE_TIME && count < WRITERS) {
            if (pthread_create(&threads[count], NULL, write_all_the_time, (void *)(uintptr_t)count))
                _exit(4);
            count++;
        }
        if (instruction.order == REMOVE_TOO && pthread_create(&threads[count++], NULL, remove_all_the_time, NULL))
            _exit(4);
        if (instruction.order == STOP) {
            atomic_store(&mine.shared->stop, true);
            while (count)
                pthread_join(threads[--count], NULL);
        }
        if (write(orders, &sum, 1) != 1)
            break;
    }
    _exit(0);
}

/* ---- here ---- */

static void begin(struct other *other, enum order order, uint64_t page, uint64_t pages)
{
    struct instruction instruction = {.order = order, .page = page, .pages = pages};

    CHECK_EQ(write(other->orders, &instruction, sizeof(instruction)), sizeof(instruction));
}

static void finish(struct other *other)
{
    uint8_t done;

    CHECK_EQ(read(other->orders, &done, 1), 1);
}

static void tell(struct other *other, enum order order, uint64_t page, uint64_t pages)
{
    begin(other, order, page, pages);
    finish(other);
}

/* Two extents, of which the second lies below the first, and a userfaultfd that guards nothing. */
static void start(struct other *other)
{
    uint64_t bytes = PAGES * pc_page_bytes();
    struct pc_remote_extent extents[2];
    int pair[2], fd;

    other->shared = mmap(NULL, sizeof(*other->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(other->shared != MAP_FAILED);
    atomic_store(&other->shared->uffd, -1);
    other->base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(other->base != MAP_FAILED);
    CHECK_SYS(madvise(other->base, bytes, MADV_NOHUGEPAGE));
    CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    other->pid = fork();
    CHECK(other->pid >= 0);
    if (!other->pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(pair[0]);
        mine.shared = other->shared;
        mine.base = other->base;
        fd = pc_uffd_open(PC_UFFD_ANY, UFFD_FEATURE_EVENT_REMOVE, &(struct pc_uffd_api){0});
        atomic_store(&other->shared->uffd, fd < 0 ? -2 : fd);
        atomic_store(&other->shared->running, 1);
        obey(pair[1]);
    }
    close(pair[1]);
    other->orders = pair[0];
    other->pidfd = (int)syscall(SYS_pidfd_open, other->pid, 0);
    CHECK_SYS(other->pidfd);
    while (!atomic_load(&other->shared->running))
        pc_sleep_ns(100000);
    if (atomic_load(&other->shared->uffd) < 0)
        SKIP("uffd", "the other process may not have a userfaultfd");
    other->uffd = pc_remote_descriptor(other->pidfd, atomic_load(&other->shared->uffd));
    CHECK_SYS(other->uffd);
    extents[0] = (struct pc_remote_extent){(uintptr_t)other->base + bytes / 4, 0, bytes / 4 * 3};
    extents[1] = (struct pc_remote_extent){(uintptr_t)other->base, bytes / 4 * 3, bytes / 4};
    if (pc_remote_new(other->pid, other->pidfd, extents, 2, pc_page_bytes(), &other->remote, message, sizeof(message)))
        FAIL("%s", message);
    other->memory = (struct pc_memory){
        .size_bytes = bytes, .page_bytes = pc_page_bytes(), .kind = PC_MEMORY_ANON, .fd = -1, .remote = other->remote};
}

/* Leaves it as a zombie, whose number is still its own. */
static void kill_and_leave(struct other *other)
{
    siginfo_t info;

    CHECK_SYS(kill(other->pid, SIGKILL));
    CHECK_SYS(waitid(P_PID, (id_t)other->pid, &info, WEXITED | WNOWAIT));
}

/* Where a page of the memory is in the mapping. */
static uint64_t mapped(uint64_t page)
{
    return page < PAGES / 4 * 3 ? page + PAGES / 4 : page - PAGES / 4 * 3;
}

static void end(struct other *other)
{
    int status;

    CHECK_SYS(kill(other->pid, SIGKILL));
    CHECK_EQ(waitpid(other->pid, &status, 0), other->pid);
    CHECK_EQ(WIFSIGNALED(status), 1); /* and not by itself before */
    pc_remote_free(other->remote);
    close(other->pidfd);
    close(other->uffd);
    close(other->orders);
}

static struct pc_write_log *open_log(struct other *other)
{
    struct pc_write_log *log;
    int result = pc_write_log_new(other->uffd, other->remote, &log, message, sizeof(message));

    if (result)
        FAIL("%s", message);
    return log;
}

static const char *text_of(const uint64_t *words)
{
    static char text[8192];
    size_t used = 0;

    text[0] = '\0';
    for (uint64_t page = 0; (page = pc_bitmap_next(words, PAGES, page, 1)) < PAGES; page++)
        used += (size_t)snprintf(text + used, sizeof(text) - used, "%llu ", (unsigned long long)page);
    return text;
}

#define CHECK_PAGES(words, expected)                                                                                    \
    do {                                                                                                                \
        const char *got_ = text_of(words);                                                                              \
        if (strcmp(got_, expected))                                                                                     \
            FAIL("there are \"%s\", should be \"%s\"", got_, expected);                                                 \
    } while (0)
#define CHECK_LOG(log, stopped, expected)                                                                               \
    do {                                                                                                                \
        uint64_t found_[WORDS] = {0};                                                                                   \
        int64_t count_ = pc_write_log_collect(log, found_, stopped);                                                    \
        CHECK_EQ(count_, pc_bitmap_count(found_, PAGES));                                                               \
        CHECK_PAGES(found_, expected);                                                                                  \
    } while (0)

/* ---- reading ------------------------------------------------------------------------------------------------------- */

static void extents_must_make_up_the_memory(void)
{
    const uint64_t page = pc_page_bytes();
    const struct {
        struct pc_remote_extent extents[2];
        uint32_t count;
    } bad[] = {
        {{{page, 0, 0}}, 1},
        {{{0, 0, page}}, 1},
        {{{page, 0, page + 1}}, 1},
        {{{page + 1, 0, page}}, 1},
        {{{page, page, page}}, 1},
        {{{page, 0, page}, {4 * page, 2 * page, page}}, 2},
        {{{page, 0, 2 * page}, {2 * page, 2 * page, page}}, 2},
        {{{page, 0, UINT64_MAX - page + 1}}, 1},
        {{{UINT64_MAX - page + 1, 0, 2 * page}}, 1},
        {{{page, 0, page}}, 0},
    };
    struct pc_remote *remote;
    int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        CHECK_EQ(pc_remote_new(getpid(), pidfd, bad[i].extents, bad[i].count, page, &remote, message, sizeof(message)), -EINVAL);
    CHECK_EQ(pc_remote_new(0, pidfd, &(struct pc_remote_extent){page, 0, page}, 1, page, &remote, message, sizeof(message)), -EINVAL);
    CHECK_EQ(pc_remote_new(getpid(), pidfd, &(struct pc_remote_extent){page, 0, page}, 1, 0, &remote, message, sizeof(message)), -EINVAL);
    close(pidfd);
}

static void what_is_there_is_read(void)
{
    const uint64_t page = pc_page_bytes();
    uint8_t *content = malloc(PAGES * page);
    uint64_t words[WORDS] = {0};
    struct other other;

    start(&other);
    CHECK_EQ(pc_memory_present(&other.memory, words), 0);
    CHECK_PAGES(words, "");
    tell(&other, READ, mapped(3), 1); /* the zero page */
    tell(&other, WRITE, mapped(0), 1);
    tell(&other, WRITE, mapped(PAGES / 4 * 3 - 1), 1); /* the last of one, the first of the other */
    tell(&other, WRITE, mapped(1536), 1);
    tell(&other, WRITE, mapped(2047), 1);
    CHECK_EQ(pc_memory_present(&other.memory, words), 0);
    CHECK_PAGES(words, "0 1535 1536 2047 ");
    pc_remote_set_incomplete(other.remote, 1);
    CHECK_EQ(pc_memory_present(&other.memory, words), 0);
    CHECK_EQ(pc_bitmap_count(words, PAGES), PAGES);
    CHECK_EQ(pc_remote_read(other.remote, 0, content, PAGES * page), 0);
    for (uint64_t i = 0; i < PAGES * page; i++)
        CHECK_EQ(content[i], i % page == 0 && (i / page == 0 || i / page == 1535 || i / page == 1536 || i / page == 2047));
    CHECK_EQ(pc_remote_read(other.remote, 1535 * page, content, 2 * page), 0);
    CHECK_EQ(content[0] + content[page], 2);
    CHECK_EQ(pc_remote_read(other.remote, 1, content, PAGES * page), -EINVAL);
    CHECK_EQ(pc_remote_read(other.remote, UINT64_MAX, content, 2), -EINVAL);
    end(&other);
    free(content);
}

static void a_copy_on_disk_is_that_of_the_memory(void)
{
    char path[] = "/tmp/postcopy-remote-XXXXXX";
    int fd = mkstemp(path);
    uint64_t remote_digest, file_digest;
    struct other other;

    CHECK_SYS(fd);
    unlink(path);
    start(&other);
    for (uint64_t i = 0; i < PAGES; i += 7)
        tell(&other, WRITE, i, 1);
    CHECK_EQ(pc_memory_dump(&other.memory, fd, 0), 0);
    CHECK_EQ(pc_memory_digest(&other.memory, &remote_digest), 0);
    CHECK_EQ(pc_file_digest(fd, PAGES * pc_page_bytes(), pc_page_bytes(), &file_digest), 0);
    CHECK_EQ(remote_digest, file_digest);
    end(&other);
    close(fd);
}

static void a_process_that_has_ended_is_not_read(void)
{
    uint64_t words[WORDS] = {0};
    uint8_t byte;
    struct pc_remote_extent extent = {pc_page_bytes(), 0, pc_page_bytes()};
    struct pc_remote *remote;
    struct other other;

    start(&other);
    tell(&other, WRITE, 0, PAGES);
    kill_and_leave(&other);
    CHECK_EQ(pc_remote_read(other.remote, 0, &byte, 1), -ESRCH);
    CHECK_EQ(pc_memory_present(&other.memory, words), -ESRCH);
    CHECK_EQ(pc_remote_new(other.pid, other.pidfd, &extent, 1, pc_page_bytes(), &remote, message, sizeof(message)), -ESRCH);
    end(&other);
}

static void a_hole_in_its_memory_is_an_error(void)
{
    const uint64_t page = pc_page_bytes();
    uint8_t content[4 * 65536];
    struct pc_remote_extent extent;
    struct pc_remote *remote;
    struct other other;

    start(&other);
    tell(&other, WRITE, 0, 8);
    /* Beyond what it has mapped: nothing is behind the last page but what is not to be read. */
    extent = (struct pc_remote_extent){(UINT64_C(1) << 46), 0, 2 * page};
    CHECK_EQ(pc_remote_new(other.pid, other.pidfd, &extent, 1, page, &remote, message, sizeof(message)), 0);
    CHECK_EQ(pc_remote_read(remote, 0, content, page), -EFAULT);
    pc_remote_free(remote);
    end(&other);
}

/* ---- the write log ------------------------------------------------------------------------------------------------- */

static void writes_are_logged_once(void)
{
    struct pc_write_log *log;
    struct other other;

    start(&other);
    tell(&other, WRITE, mapped(0), 1);
    tell(&other, WRITE, mapped(1), 1);
    tell(&other, WRITE, mapped(500), 1);
    log = open_log(&other);
    CHECK_LOG(log, 0, "");
    tell(&other, WRITE, mapped(1), 1);
    tell(&other, WRITE, mapped(500), 1);
    tell(&other, WRITE, mapped(7), 1); /* the first touch of all */
    tell(&other, READ, mapped(0), 1);
    tell(&other, READ, mapped(9), 1);
    CHECK_LOG(log, 0, "1 7 500 ");
    CHECK_LOG(log, 0, "");
    tell(&other, WRITE, mapped(9), 1); /* the zero page becomes one of its own */
    tell(&other, WRITE, mapped(7), 1);
    CHECK_LOG(log, 0, "7 9 ");
    tell(&other, WRITE, mapped(7), 1);
    tell(&other, WRITE, mapped(7), 1);
    CHECK_LOG(log, 1, "7 ");
    pc_write_log_free(log);
    tell(&other, WRITE, 0, PAGES); /* nobody answers any more, and nobody need to */
    end(&other);
}

static void what_is_given_back_is_logged(void)
{
    struct pc_write_log *log;
    struct other other;

    start(&other);
    tell(&other, WRITE, mapped(0), 16);
    log = open_log(&other);
    tell(&other, REMOVE, mapped(3), 2);
    CHECK_LOG(log, 0, "3 4 ");
    CHECK_LOG(log, 0, "");
    tell(&other, REMOVE, mapped(5), 2);
    tell(&other, WRITE, mapped(5), 1); /* again */
    CHECK_LOG(log, 0, "5 6 ");
    tell(&other, WRITE, mapped(5), 1);
    CHECK_LOG(log, 0, "5 ");
    tell(&other, REMOVE, mapped(5), 1);
    tell(&other, READ, mapped(5), 1); /* the zero page is there then */
    CHECK_LOG(log, 0, "5 ");
    tell(&other, WRITE, mapped(5), 1); /* it may be read now, */
    tell(&other, REMOVE, mapped(5), 1);
    CHECK_LOG(log, 0, "5 "); /* and is not what was read any more */
    CHECK_LOG(log, 1, "");
    pc_write_log_free(log);
    end(&other);
}

/* The kernel tells of it before it does it. Here it has told, and cannot go on. */
static void what_is_about_to_be_given_back_is_not_forgotten(void)
{
    struct pc_write_log *log;
    uint64_t words[WORDS] = {0};
    struct other other;

    start(&other);
    tell(&other, WRITE, 0, PAGES);
    for (int i = 0; i < 100; i++) {
        log = open_log(&other);
        begin(&other, REMOVE, mapped(3), 1);
        (void)pc_write_log_collect(log, words, 0); /* at whatever moment */
        finish(&other);
        CHECK(pc_write_log_collect(log, words, 1) >= 0);
        CHECK_PAGES(words, "3 ");
        words[0] = 0;
        tell(&other, WRITE, mapped(3), 1);
        pc_write_log_free(log);
    }
    end(&other);
}

/* Chunks of which nothing has changed are not looked at: what changes in them is seen all the same. */
static void what_changes_in_memory_that_is_all_there_is_logged(void)
{
    struct pc_write_log *log;
    struct other other;

    start(&other);
    tell(&other, WRITE, 0, PAGES);
    log = open_log(&other);
    for (int i = 0; i < 3; i++) {
        CHECK_LOG(log, 0, "");
        tell(&other, WRITE, mapped(0), 1);
        tell(&other, WRITE, mapped(1535), 1);
        tell(&other, WRITE, mapped(1536), 1);
        tell(&other, WRITE, mapped(2047), 1);
        CHECK_LOG(log, 0, "0 1535 1536 2047 ");
    }
    tell(&other, REMOVE, mapped(600), 1);
    CHECK_LOG(log, 0, "600 ");
    tell(&other, WRITE, mapped(600), 1);
    CHECK_LOG(log, 0, "600 ");
    tell(&other, WRITE, mapped(1023), 2);
    CHECK_LOG(log, 1, "1023 1024 ");
    CHECK_LOG(log, 1, "1023 1024 "); /* stopped: they were not protected again */
    CHECK_LOG(log, 0, "1023 1024 ");
    CHECK_LOG(log, 0, "");
    pc_write_log_free(log);
    end(&other);
}

static void its_end_leaves_nobody_waiting(void)
{
    struct other other;

    start(&other);
    tell(&other, WRITE, 0, PAGES);
    tell(&other, WRITE_ALL_THE_TIME, 0, 0);
    tell(&other, REMOVE_TOO, 0, 0);
    for (int i = 0; i < 40; i++) {
        uint64_t words[WORDS] = {0};
        struct pc_write_log *log = open_log(&other);

        CHECK(pc_write_log_collect(log, words, 0) >= 0);
        pc_write_log_free(log);
    }
    tell(&other, STOP, 0, 0); /* which waits for its threads */
    end(&other);
}

static void a_process_that_ends_ends_the_log(void)
{
    uint64_t words[WORDS] = {0};
    struct pc_write_log *log;
    struct other other;

    start(&other);
    tell(&other, WRITE, 0, PAGES);
    log = open_log(&other);
    tell(&other, WRITE_ALL_THE_TIME, 0, 0);
    kill_and_leave(&other);
    CHECK_EQ(pc_write_log_collect(log, words, 0), -ESRCH);
    pc_write_log_free(log);
    end(&other);
}

/* Precopy as fast as it can be, of memory that is written and given back as fast as it can be: what is named is copied, until all is
 * stopped. Then the copy must be the memory. */
static void nothing_is_lost(bool removals)
{
    const uint64_t page_bytes = pc_page_bytes(), until_ns = pc_now_ns() + UINT64_C(1000000000);
    uint8_t *copy = calloc(PAGES, page_bytes), *content = malloc(PAGES * page_bytes);
    uint64_t rounds = 0, copied = 0;
    struct pc_write_log *log;
    struct other other;
    bool stopped = false;

    start(&other);
    tell(&other, WRITE, 0, removals ? PAGES / 2 : PAGES);
    log = open_log(&other);
    CHECK_EQ(pc_remote_read(other.remote, 0, copy, PAGES * page_bytes), 0);
    tell(&other, WRITE_ALL_THE_TIME, 0, 0);
    if (removals)
        tell(&other, REMOVE_TOO, 0, 0);
    while (!stopped) {
        uint64_t words[WORDS] = {0};
        int64_t count;

        stopped = pc_now_ns() > until_ns && rounds > 2 && copied && (!removals || atomic_load(&other.shared->removals));
        if (stopped)
            tell(&other, STOP, 0, 0);
        count = pc_write_log_collect(log, words, stopped);
        CHECK(count >= 0);
        CHECK_EQ(count, pc_bitmap_count(words, PAGES));
        for (uint64_t page = 0; (page = pc_bitmap_next(words, PAGES, page, 1)) < PAGES; page++)
            CHECK_EQ(pc_remote_read(other.remote, page * page_bytes, copy + page * page_bytes, page_bytes), 0);
        copied += (uint64_t)count;
        rounds++;
    }
    CHECK_EQ(pc_remote_read(other.remote, 0, content, PAGES * page_bytes), 0);
    for (uint64_t page = 0; page < PAGES; page++)
        if (memcmp(copy + page * page_bytes, content + page * page_bytes, page_bytes))
            FAIL("page %llu is not what the log made of it (%llu rounds, %llu pages)", (unsigned long long)page,
                 (unsigned long long)rounds, (unsigned long long)copied);
    (void)printf("  %llu rounds, %llu pages copied, %llu writes, %llu removals\n", (unsigned long long)rounds, (unsigned long long)copied,
                 (unsigned long long)atomic_load(&other.shared->writes), (unsigned long long)atomic_load(&other.shared->removals));
    pc_write_log_free(log);
    end(&other);
    free(copy);
    free(content);
}

static void nothing_is_lost_while_all_is_written(void)
{
    nothing_is_lost(false);
}

static void nothing_is_lost_while_memory_is_given_back_too(void)
{
    nothing_is_lost(true);
}

static void memory_of_another_userfaultfd_is_refused(void)
{
    struct pc_write_log *log;
    struct other other;
    int elsewhere;

    start(&other);
    elsewhere = pc_uffd_open(PC_UFFD_ANY, 0, &(struct pc_uffd_api){0}); /* of this process: none of its memory is there */
    CHECK_SYS(elsewhere);
    munmap(other.base, PAGES * pc_page_bytes());
    CHECK(pc_write_log_new(elsewhere, other.remote, &log, message, sizeof(message)) < 0);
    CHECK(strstr(message, "cannot be registered") != NULL);
    tell(&other, WRITE, 0, PAGES);
    close(elsewhere);
    end(&other);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(extents_must_make_up_the_memory);
    RUN(what_is_there_is_read);
    RUN(a_copy_on_disk_is_that_of_the_memory);
    RUN(a_process_that_has_ended_is_not_read);
    RUN(a_hole_in_its_memory_is_an_error);
    RUN(writes_are_logged_once);
    RUN(what_is_given_back_is_logged);
    RUN(what_is_about_to_be_given_back_is_not_forgotten);
    RUN(what_changes_in_memory_that_is_all_there_is_logged);
    RUN(its_end_leaves_nobody_waiting);
    RUN(a_process_that_ends_ends_the_log);
    RUN(nothing_is_lost_while_all_is_written);
    RUN(nothing_is_lost_while_memory_is_given_back_too);
    RUN(memory_of_another_userfaultfd_is_refused);
    return test_end();
}
