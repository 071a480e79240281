/* SPDX-License-Identifier: Apache-2.0
 *
 * The life of a pager: blocks and shards that come while faults wait, what is refused, and an end with pages missing.
 */
#include <setjmp.h>

#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

struct armer {
    struct rig *rig;
    uint64_t first;
    atomic_int failures;
    pthread_t thread;
};

/* Arms every other piece of the last block, each with a shard of its own, and touches it at once. */
static void *arm_pieces(void *argument)
{
    struct armer *armer = argument;
    struct rig *rig = armer->rig;
    char error[PC_ERROR_BYTES];

    for (uint64_t piece = armer->first; piece < 12; piece += 2) {
        int pair[2], shard = pc_pager_add_shard(rig->pager, PC_UFFD_ANY, 0, error, sizeof(error));
        uint64_t page = piece * 20;

        if (shard < 0)
            FAIL("%s", error);
        if (pc_pager_arm(rig->pager, (uint32_t)shard, 1, page, 20, error, sizeof(error)))
            FAIL("%s", error);
        tcp_pair(pair);
        CHECK_EQ(pc_pageserver_attach_urgent(rig->server, (uint32_t)shard, pair[0], NULL, 0), 0);
        CHECK_EQ(pc_pager_attach_urgent(rig->pager, (uint32_t)shard, pair[1], NULL), 0);
        for (uint64_t i = 0; i < 20; i += 1 + piece % 3)
            CHECK(is_page(1, page + i, rig->page_bytes, dest_page(rig, 1, page + i)));
    }
    return NULL;
}

static void shards_come_while_faults_wait(int kind)
{
    const uint64_t pages[] = {kind == PC_MEMORY_HUGETLB ? 3 : 100, 240};
    struct armer armers[2];
    struct toucher waiting[3];
    struct rig rig;

    if (kind == PC_MEMORY_HUGETLB)
        SKIP("hugetlb", "as with small pages, and the pool is small");
    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 0);
    CHECK_EQ(add_shard(&rig, 0), 0);
    arm(&rig, 0, 0, 0, 50);
    touch_one(&waiting[0], &rig, 0, 0);
    touch_one(&waiting[1], &rig, 0, 1);
    CHECK_EQ(pc_pager_request_missing(rig.pager, 5), 5); /* for when there is a channel */
    wait_pending(&rig, 2);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (uint64_t i = 0; i < 2; i++) {
        armers[i] = (struct armer){.rig = &rig, .first = i};
        CHECK_EQ(pthread_create(&armers[i].thread, NULL, arm_pieces, &armers[i]), 0);
    }
    arm(&rig, 0, 0, 60, 40);
    touch_one(&waiting[2], &rig, 0, 99);
    for (uint64_t i = 0; i < 2; i++)
        CHECK_EQ(pthread_join(armers[i].thread, NULL), 0);
    CHECK_EQ(atomic_load(&waiting[0].done) + atomic_load(&waiting[1].done) + atomic_load(&waiting[2].done), 0);
    wait_pending(&rig, 3);
    connect_urgent(&rig, 0, NULL);
    for (int i = 0; i < 3; i++)
        join_toucher(&waiting[i]);
    arm(&rig, 0, 0, 50, 10);
    CHECK(pc_pager_request_missing(rig.pager, UINT64_MAX) > 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    check_content(&rig);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    check_content(&rig);
    close_rig(&rig);
}

static void shards_come_while_faults_wait_memfd(void)
{
    shards_come_while_faults_wait(PC_MEMORY_MEMFD);
}

static void shards_come_while_faults_wait_anon(void)
{
    shards_come_while_faults_wait(PC_MEMORY_ANON);
}

/* A RAM block that is complete does not make the pager complete when another is still to come. */
static void blocks_may_come_later(void)
{
    const uint64_t pages[] = {10};
    uint64_t zero[1] = {0x3ff};
    struct pc_memory more;
    struct rig rig;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    more = make_memory(PC_MEMORY_MEMFD, 10);
    CHECK_EQ(pc_pager_add_block(rig.pager, &more, -1), 1);
    CHECK_EQ(pc_pager_disarm(rig.pager), -EBUSY);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 1, zero), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    pc_memory_destroy(&more);
    pc_memory_destroy(&rig.dest[0]);
}

static void misuse_is_refused(void)
{
    const uint64_t pages[] = {200};
    struct pc_memory odd;
    uint64_t blocked_ns[2 * PC_MAX_TRACKED_THREADS];
    struct rig rig;
    int pair[2];
    uint8_t byte;

    open_pager(&rig, PC_MEMORY_ANON, 1, pages);
    odd = rig.dest[0];
    odd.size_bytes -= 1;
    CHECK_EQ(pc_pager_add_block(rig.pager, &odd, -1), -EINVAL);
    odd = rig.dest[0];
    odd.page_bytes = odd.size_bytes = UINT64_C(2) * PC_FRAME_MAX_PAYLOAD_BYTES; /* could never be sent */
    CHECK_EQ(pc_pager_add_block(rig.pager, &odd, -1), -EINVAL);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 0, 1, message, sizeof(message)), -EINVAL);
    CHECK_EQ(add_shard(&rig, 0), 0);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 1, 0, 1, message, sizeof(message)), -EINVAL);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 200, 1, NULL, 0), -EINVAL);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 1, UINT64_MAX, NULL, 0), -EINVAL);
    CHECK_EQ(pc_pager_arm_at(rig.pager, 0, 0, 0, 1, 1, NULL, 0), -EINVAL);
    CHECK_EQ(pc_pager_arm_at(rig.pager, 0, 0, 0, 2, UINT64_MAX - 4095, NULL, 0), -EINVAL);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 0, 0, NULL, 0), -EINVAL);
    arm(&rig, 0, 0, 10, 10);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 0, 11, message, sizeof(message)), -EBUSY);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 19, 1, message, sizeof(message)), -EBUSY);
    for (uint64_t i = 1; i < 64; i++)
        arm(&rig, 0, 0, 20 + 2 * i, 1);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 0, 1, message, sizeof(message)), -ENOSPC);
    CHECK(strstr(message, "too many parts") != NULL);
    CHECK_EQ(pc_pager_add_shard(rig.pager, 17, 0, message, sizeof(message)), -EINVAL);
    CHECK_EQ(pc_pager_track_thread(rig.pager, PC_MAX_TRACKED_THREADS, 1), -EINVAL);
    CHECK_EQ(pc_pager_blocktime(rig.pager, blocked_ns, 2 * PC_MAX_TRACKED_THREADS), PC_MAX_TRACKED_THREADS);

    /* A descriptor is the pager's whatever happens. */
    tcp_pair(pair);
    CHECK_EQ(pc_pager_attach_urgent(rig.pager, 1, pair[1], NULL), -EINVAL);
    CHECK_EQ(recv(pair[0], &byte, 1, 0), 0);
    close(pair[0]);
    tcp_pair(pair);
    CHECK_EQ(pc_pager_attach_bulk(rig.pager, PC_MAX_BULK_CHANNELS, pair[1], NULL), -EINVAL);
    CHECK_EQ(recv(pair[0], &byte, 1, 0), 0);
    close(pair[0]);
    CHECK_EQ(pc_pager_attach_urgent(rig.pager, 0, CHECK_SYS(socket(AF_INET, SOCK_DGRAM, 0)), NULL), -EPROTOTYPE);
    CHECK_EQ(pc_pager_attach_bulk(rig.pager, 0, CHECK_SYS(open("/dev/null", O_RDWR | O_CLOEXEC)), NULL), -ENOTSOCK);
    pair[0] = script_bulk(&rig, 2);
    {
        int second[2];

        tcp_pair(second);
        CHECK_EQ(pc_pager_attach_bulk(rig.pager, 2, second[1], NULL), -EBUSY);
        CHECK_EQ(recv(second[0], &byte, 1, 0), 0);
        close(second[0]);
    }
    /* A second urgent channel takes the place of the first. */
    pair[1] = script_urgent(&rig, 0);
    close(script_urgent(&rig, 0));
    CHECK(speaks(pair[1], PATIENCE_MS) && recv(pair[1], &byte, 1, 0) == 0);
    close(pair[0]);
    close(pair[1]);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    pc_memory_destroy(&rig.dest[0]);
}

/* A frame of which only a part can be placed: that part is the machine's from then on, the rest may come again. */
static void frames_placed_in_part(int kind)
{
    const uint64_t pages[] = {kind == PC_MEMORY_HUGETLB ? 2 : 20};
    uint64_t half = pages[0] / 2;
    struct pc_frame frame = {.type = PC_FRAME_PAGES, .pages = (uint32_t)pages[0]};
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES), *own;
    struct pc_event event;
    struct rig rig;
    int fd;

    CHECK(content != NULL);
    open_pager(&rig, kind, 1, pages);
    CHECK_EQ(add_shard(&rig, 0), 0);
    arm(&rig, 0, 0, 0, half);
    for (uint64_t page = 0; page < pages[0]; page++)
        make_page(0, page, rig.page_bytes, content + page * rig.page_bytes);
    fd = script_bulk(&rig, 0);
    CHECK(send_frame(fd, frame, content, pages[0] * rig.page_bytes));
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 0, &event);
    CHECK_EQ(event.error, ENOENT);
    CHECK(strstr(event.text, "cannot place page") != NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    close(fd);
    CHECK_EQ(pager_stats(&rig).resident_pages, half);
    own = dest_page(&rig, 0, half - 1);
    own[8] ^= 0xff;

    arm(&rig, 0, 0, half, pages[0] - half);
    fd = script_bulk(&rig, 0);
    CHECK(send_frame(fd, frame, content, pages[0] * rig.page_bytes));
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(&rig).background_pages, pages[0]);
    CHECK_EQ(pager_stats(&rig).duplicate_pages, half);
    own[8] ^= 0xff;
    check_content(&rig);
    close(fd);
    free(content);
    close_rig(&rig);
}
OF_EACH_KIND(frames_placed_in_part)

/* Descriptors that come from an event loop are non-blocking. */
static void non_blocking_descriptors_work(void)
{
    const uint64_t pages[] = {400};
    struct rig rig;
    int pair[2];

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    open_server(&rig, 0);
    arm_all(&rig, 0);
    for (int i = 0; i < 2; i++) {
        tcp_pair(pair);
        CHECK_SYS(fcntl(pair[0], F_SETFL, O_NONBLOCK));
        CHECK_SYS(fcntl(pair[1], F_SETFL, O_NONBLOCK));
        CHECK_EQ(i ? pc_pageserver_attach_urgent(rig.server, 0, pair[0], NULL, 0) :
                     pc_pageserver_attach_bulk(rig.server, 0, pair[0], NULL),
                 0);
        CHECK_EQ(i ? pc_pager_attach_urgent(rig.pager, 0, pair[1], NULL) : pc_pager_attach_bulk(rig.pager, 0, pair[1], NULL), 0);
    }
    (void)nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN);
    EXPECT_NO_EVENT(&rig.from_server, PC_EVENT_CHANNEL_DOWN);
    check_content(&rig);
    close_rig(&rig);
}

/* ---- an end with pages missing ------------------------------------------------------------------------------------ */

static _Thread_local sigjmp_buf after_sigbus;
static atomic_int sigbus_code;
static _Atomic(void *) sigbus_address;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    atomic_store(&sigbus_code, info->si_code);
    atomic_store(&sigbus_address, info->si_addr);
    siglongjmp(after_sigbus, 1);
}

struct doomed {
    const volatile uint8_t *at;
    atomic_bool read, killed;
    pthread_t thread;
};

static void *read_doomed(void *argument)
{
    struct doomed *doomed = argument;

    if (!sigsetjmp(after_sigbus, 1)) {
        (void)*doomed->at;
        atomic_store(&doomed->read, true);
    } else {
        atomic_store(&doomed->killed, true);
    }
    return NULL;
}

static void free_with_pages_missing(int kind)
{
    const uint64_t pages[] = {scaled(kind, 256)};
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    uint64_t zero[MAX_PAGES / 64] = {0};
    struct doomed waiting = {0}, later = {0};
    struct pc_uffd_api api;
    struct rig rig;
    int fd, result;

    open_pager(&rig, kind, 1, pages);
    pc_bitmap_set_range(zero, 1, 1);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    serve_page(&rig, fd, 0, 0);
    CHECK(is_page(0, 0, rig.page_bytes, dest_page(&rig, 0, 0)));
    CHECK_EQ(pc_pager_disarm(rig.pager), -EBUSY);
    CHECK_SYS(sigaction(SIGBUS, &action, NULL));
    waiting.at = dest_page(&rig, 0, 3) + 100;
    CHECK_EQ(pthread_create(&waiting.thread, NULL, read_doomed, &waiting), 0);
    while (!pager_stats(&rig).pending_faults)
        (void)sched_yield();
    CHECK_EQ(pc_uffd_probe(PC_UFFD_ANY, &api), 0);
    result = pc_pager_free(rig.pager);
    if (!(api.features >> 14 & 1)) { /* before 6.6: no POISON, the thread must go on waiting */
        CHECK_EQ(result, -EBUSY);
        CHECK(!atomic_load(&waiting.read) && !atomic_load(&waiting.killed));
        return;
    }
    CHECK_EQ(result, 0);
    CHECK_EQ(pthread_join(waiting.thread, NULL), 0);
    CHECK(!atomic_load(&waiting.read) && atomic_load(&waiting.killed));
    /* As a memory error where the kernel knows these, as an impossible access otherwise. */
    CHECK(atomic_load(&sigbus_code) == BUS_MCEERR_AR || atomic_load(&sigbus_code) == BUS_ADRERR);
    CHECK((uintptr_t)atomic_load(&sigbus_address) / rig.page_bytes == (uintptr_t)waiting.at / rig.page_bytes);
    /* And nobody else gets zeros where content should be, by whatever path. */
    later.at = dest_page(&rig, 0, pages[0] - 1);
    CHECK_EQ(pthread_create(&later.thread, NULL, read_doomed, &later), 0);
    CHECK_EQ(pthread_join(later.thread, NULL), 0);
    CHECK(atomic_load(&later.killed));
    CHECK(is_page(0, 0, rig.page_bytes, dest_page(&rig, 0, 0)));
    CHECK(pc_is_zero(dest_page(&rig, 0, 1), rig.page_bytes));
    close(fd);
    pc_memory_destroy(&rig.dest[0]);
}
OF_EACH_KIND(free_with_pages_missing)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(free_with_pages_missing);
    RUN_CASE(shards_come_while_faults_wait_memfd);
    RUN_CASE(shards_come_while_faults_wait_anon);
    RUN_CASE(blocks_may_come_later);
    RUN_KINDS(frames_placed_in_part);
    RUN_CASE(misuse_is_refused);
    RUN_CASE(non_blocking_descriptors_work);
    return test_end();
}
