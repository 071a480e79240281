/* SPDX-License-Identifier: Apache-2.0
 *
 * Faults that the kernel raises on behalf of the machine: system calls, signals, direct I/O, futexes.
 */
#include <linux/futex.h>

#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

static void on_signal(int number)
{
    (void)number;
}

struct kernel_write {
    const void *from;
    size_t bytes;
    int fd;
    atomic_bool done;
};

static void *write_from_missing(void *argument)
{
    struct kernel_write *job = argument;

    CHECK_EQ(write(job->fd, job->from, job->bytes), (ssize_t)job->bytes);
    atomic_store(&job->done, true);
    return NULL;
}

/* A fault in copy_from_user is started anew by every signal. */
static void signal_storm(int kind)
{
    const uint64_t pages[] = {scaled(kind, 64)};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    struct kernel_write job = {.bytes = pc_page_bytes()};
    uint8_t *arrived = malloc(pc_page_bytes());
    struct timespec ms = {.tv_nsec = 1000000};
    struct pc_frame frame;
    struct rig rig;
    pthread_t thread;
    int fd, pipes[2];

    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    CHECK(arrived != NULL);
    CHECK_SYS(pipe2(pipes, O_CLOEXEC));
    CHECK_SYS(sigaction(SIGUSR1, &action, NULL));
    job.from = dest_page(&rig, 0, 0);
    job.fd = pipes[1];
    CHECK_EQ(pthread_create(&thread, NULL, write_from_missing, &job), 0);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 0);
    for (int i = 0; i < 100; i++) {
        CHECK_EQ(pthread_kill(thread, SIGUSR1), 0);
        (void)nanosleep(&ms, NULL);
    }
    CHECK(!speaks(fd, 0));
    CHECK(!atomic_load(&job.done));
    serve_page(&rig, fd, 0, 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK(receive_bytes(fd, NULL, 0));
    for (size_t have = 0; have < job.bytes;)
        have += (size_t)CHECK_SYS(read(pipes[0], arrived + have, job.bytes - have));
    CHECK(is_page(0, 0, job.bytes, arrived));
    CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
    CHECK_EQ(pager_stats(&rig).requests, 1);
    CHECK_EQ(pager_stats(&rig).pending_faults, 0);
    CHECK_EQ(pager_stats(&rig).repeated_faults, pager_stats(&rig).faults - 1);
    free(arrived);
    close(fd);
    close_rig(&rig);
}
OF_EACH_KIND(signal_storm)

/* Is page `page` the source's but for [at, at + bytes), which is 0xA5? */
static void check_patched(const struct rig *rig, uint64_t page, uint64_t at, uint64_t bytes)
{
    uint8_t *expected = malloc(rig->page_bytes);

    CHECK(expected != NULL);
    make_page(0, page, rig->page_bytes, expected);
    memset(expected + at, 0xA5, bytes);
    CHECK(!memcmp(expected, dest_page(rig, 0, page), rig->page_bytes));
    free(expected);
}

static void kernel_paths(int kind)
{
    const uint64_t pages[] = {kind == PC_MEMORY_HUGETLB ? 28 : 64};
    uint64_t page = UINT64_MAX, system_page = pc_page_bytes();
    uint8_t *buffer = aligned_alloc(system_page, system_page);
    struct timespec soon = {.tv_nsec = 5000000};
    struct iovec local, remote;
    struct pc_pager_stats stats;
    struct rig rig;
    int direct, pipes[2];
    uint8_t *at;

    open_pager(&rig, kind, 1, pages);
    open_server(&rig, 0);
    arm_all(&rig, 0);
    connect_urgent(&rig, 0, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK(buffer != NULL);
    memset(buffer, 0xA5, system_page);

    /* get_user_pages: O_DIRECT into the middle and out of a page that is not there. */
    direct = temporary_file(O_DIRECT);
    if (direct >= 0) {
        CHECK_EQ(pwrite(direct, buffer, system_page, 0), (ssize_t)system_page);
        at = dest_page(&rig, 0, next_data_page(&rig, &page));
        CHECK_EQ(pread(direct, at, system_page, 0), (ssize_t)system_page);
        check_patched(&rig, page, 0, system_page);
        at = dest_page(&rig, 0, next_data_page(&rig, &page));
        if (pread(direct, at + 512, 1024, 512) == 1024)
            check_patched(&rig, page, 512, 1024);
        else
            CHECK_EQ(errno, EINVAL); /* a disk with larger sectors */
        at = dest_page(&rig, 0, next_data_page(&rig, &page));
        CHECK_EQ(pwrite(direct, at, system_page, 0), (ssize_t)system_page);
        CHECK_EQ(pread(direct, buffer, system_page, 0), (ssize_t)system_page);
        CHECK(is_page(0, page, system_page, buffer));
        close(direct);
    } else {
        (void)printf("     no O_DIRECT where temporary files are: %s\n", strerror(errno));
    }
    /* copy_to_user and copy_from_user. */
    memset(buffer, 0xA5, system_page);
    CHECK_SYS(pipe2(pipes, O_CLOEXEC));
    CHECK_EQ(write(pipes[1], buffer, 100), 100);
    at = dest_page(&rig, 0, next_data_page(&rig, &page));
    CHECK_EQ(read(pipes[0], at + 51, 100), 100);
    check_patched(&rig, page, 51, 100);
    at = dest_page(&rig, 0, next_data_page(&rig, &page));
    CHECK_EQ(write(pipes[1], at, system_page), (ssize_t)system_page);
    CHECK_EQ(read(pipes[0], buffer, system_page), (ssize_t)system_page);
    CHECK(is_page(0, page, system_page, buffer));
    close(pipes[0]);
    close(pipes[1]);
    /* A shared futex: were the page zero, the value would differ and there were nothing to wait for. */
    at = dest_page(&rig, 0, next_data_page(&rig, &page));
    CHECK_EQ(syscall(SYS_futex, at, FUTEX_WAIT, (uint32_t)word_of(0, page, 0), &soon, NULL, 0), -1);
    CHECK_EQ(errno, ETIMEDOUT);
    /* get_user_pages_remote, as a debugger does. */
    at = dest_page(&rig, 0, next_data_page(&rig, &page));
    local = (struct iovec){.iov_base = buffer, .iov_len = system_page};
    remote = (struct iovec){.iov_base = at, .iov_len = system_page};
    CHECK_EQ(syscall(SYS_process_vm_readv, getpid(), &local, 1, &remote, 1, 0), (long)system_page);
    CHECK(is_page(0, page, system_page, buffer));
    /* Faults without an access. */
    at = dest_page(&rig, 0, next_data_page(&rig, &page));
    if (madvise(at, system_page, 22 /* MADV_POPULATE_READ */))
        CHECK_EQ(errno, EINVAL); /* before 5.14 */
    CHECK(is_page(0, page, rig.page_bytes, at));

    CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
    stats = pager_stats(&rig);
    CHECK_EQ(stats.requests, stats.demand_pages);
    CHECK_EQ(stats.pending_faults, 0);
    free(buffer);
    close_rig(&rig);
}
OF_EACH_KIND(kernel_paths)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(signal_storm);
    RUN_KINDS(kernel_paths);
    return test_end();
}
