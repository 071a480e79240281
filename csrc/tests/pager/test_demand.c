/* SPDX-License-Identifier: Apache-2.0
 *
 * What a machine sees of its memory while it comes over TCP, by requests alone and beside bulk channels: the right content once,
 * whatever it writes meanwhile, and every thread and byte accounted.
 */
#include <dirent.h>
#include <sys/epoll.h>

#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

int __real_epoll_ctl(int epoll_fd, int operation, int fd, struct epoll_event *event);
int __wrap_epoll_ctl(int epoll_fd, int operation, int fd, struct epoll_event *event);

static atomic_int epoll_calls, epoll_refused; /* so many, then so many are refused */

int __wrap_epoll_ctl(int epoll_fd, int operation, int fd, struct epoll_event *event)
{
    if (atomic_fetch_sub(&epoll_calls, 1) <= 0 && atomic_load(&epoll_refused) > 0 && atomic_fetch_sub(&epoll_refused, 1) > 0) {
        errno = ENOSPC;
        return -1;
    }
    return __real_epoll_ctl(epoll_fd, operation, fd, event);
}

static struct pc_histogram latency(const struct rig *rig, int stage)
{
    struct pc_histogram histogram;

    CHECK_EQ(pc_pager_latency(rig->pager, stage, &histogram), 0);
    return histogram;
}

static void demand_of(int kind, uint32_t busy_poll_us)
{
    const uint64_t pages[] = {scaled(kind, 1024)};
    uint64_t distinct = 0, data = 0, blocked_ns[5] = {0}, blocked_sum_ns = 0, words[MAX_PAGES / 64] = {0};
    struct toucher touchers[4];
    struct visit visits[MAX_PAGES];
    struct pc_pager_stats stats;
    struct pc_pageserver_stats served;
    struct pc_histogram stages[PC_STAGES];
    struct rig rig;

    open_pager(&rig, kind, 1, pages);
    open_server(&rig, 0);
    arm_all(&rig, busy_poll_us);
    connect_urgent(&rig, 0, NULL);
    for (int t = 0; t < 4; t++) {
        size_t count = shuffled(&rig, -1, visits) * 2 / 5;

        for (size_t i = 0; i < count; i++)
            pc_bitmap_set_range(words, visits[i].page, 1);
        start_toucher(&touchers[t], &rig, t, visits, count);
    }
    wait_pending(&rig, 4); /* or one of them might begin when others have had all its pages brought, and never wait */
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (uint64_t page = 0; page < rig.pages[0]; page++)
        if (words[page / 64] >> (page % 64) & 1) {
            distinct++;
            data += content_of(0, page) == DATA;
        }
    for (int t = 0; t < 4; t++)
        join_toucher(&touchers[t]);
    CHECK_EQ(pc_pager_disconnect(rig.pager), 0); /* the fault thread has done its bookkeeping */

    stats = pager_stats(&rig);
    CHECK_EQ(stats.requests, distinct);
    CHECK_EQ(stats.demand_pages, data);
    CHECK_EQ(stats.zero_pages, distinct - data);
    CHECK_EQ(stats.background_pages, 0);
    CHECK_EQ(stats.duplicate_pages, 0);
    CHECK_EQ(stats.resident_pages, distinct);
    CHECK_EQ(stats.resident_bytes, distinct * rig.page_bytes);
    CHECK_EQ(stats.total_bytes, rig.pages[0] * rig.page_bytes);
    CHECK_EQ(stats.pending_faults, 0);
    CHECK_EQ(stats.frames_refused, 0);
    CHECK(stats.faults >= distinct && stats.repeated_faults <= stats.faults - distinct);
    CHECK(stats.event_reads && stats.event_reads <= stats.faults);
    CHECK_EQ(stats.bytes_sent, distinct * PC_FRAME_HEADER_BYTES);
    CHECK_EQ(stats.bytes_received, distinct * PC_FRAME_HEADER_BYTES + data * rig.page_bytes);
    served = server_stats(&rig);
    CHECK_EQ(served.requests, distinct);
    CHECK_EQ(served.repeated_requests, 0);
    CHECK_EQ(served.demand_pages, data);
    CHECK_EQ(served.bytes_sent, stats.bytes_received);
    CHECK_EQ(served.bytes_received, stats.bytes_sent);

    for (int stage = 0; stage < PC_STAGES; stage++)
        stages[stage] = latency(&rig, stage);
    CHECK_EQ(stages[PC_STAGE_SENT].count, distinct); /* of each page's first fault */
    CHECK_EQ(stages[PC_STAGE_RECEIVED].count, distinct);
    CHECK_EQ(stages[PC_STAGE_PLACED].count, distinct);
    CHECK(stages[PC_STAGE_TOTAL].count >= distinct && stages[PC_STAGE_TOTAL].count <= stats.faults);
    CHECK(stages[PC_STAGE_SENT].sum_ns + stages[PC_STAGE_RECEIVED].sum_ns + stages[PC_STAGE_PLACED].sum_ns <=
          stages[PC_STAGE_TOTAL].sum_ns);
    CHECK(pc_histogram_percentile(&stages[PC_STAGE_TOTAL], 50) > 0);
    CHECK_EQ(pc_pager_latency(rig.pager, PC_STAGES, &stages[0]), -EINVAL);
    CHECK_EQ(pc_pager_latency(rig.pager, -1, &stages[0]), -EINVAL);
    CHECK_EQ(pc_pager_blocktime(rig.pager, blocked_ns, 5), 5);
    for (int slot = 0; slot < 4; slot++) {
        CHECK(blocked_ns[slot] > 0);
        blocked_sum_ns += blocked_ns[slot];
    }
    CHECK_EQ(blocked_ns[4], 0);
    CHECK_EQ(blocked_sum_ns, stages[PC_STAGE_TOTAL].sum_ns);
    CHECK_EQ(pc_pager_disarm(rig.pager), distinct < pages[0] ? -EBUSY : 0); /* few huge pages may all have been touched */
    close_rig(&rig);
}

static void demand(int kind)
{
    demand_of(kind, 0);
}
OF_EACH_KIND(demand)

static void demand_with_busy_poll(void)
{
    demand_of(PC_MEMORY_MEMFD, 200);
}

/* ---- demand and bulk ---------------------------------------------------------------------------------------------- */

static void bulk(int kind, uint32_t channels, bool page_map)
{
    const uint64_t pages[] = {scaled(kind, 1000), scaled(kind, 700), scaled(kind, 333)};
    uint64_t cut = pages[1] / 2 - 1, faults_before, requests_before, data, sent_twice;
    struct visit visits[3 * MAX_PAGES];
    struct pc_pageserver_stats served;
    struct pc_pager_stats stats;
    struct toucher touchers[3];
    struct rig rig;
    size_t count;

    open_pager(&rig, kind, 3, pages);
    open_server(&rig, 0);
    if (page_map)
        tell_page_map(&rig);
    CHECK_EQ(add_shard(&rig, 0), 0);
    CHECK_EQ(add_shard(&rig, 0), 1);
    arm(&rig, 0, 0, 0, pages[0]);
    arm(&rig, 1, 1, cut, pages[1] - cut);
    arm(&rig, 0, 1, 0, cut);
    arm(&rig, 1, 2, 0, pages[2]);
    data = count_content(&rig, DATA);
    for (uint32_t i = 0; i < 2; i++)
        connect_urgent(&rig, i, NULL);
    for (uint32_t i = 0; i < channels; i++)
        connect_bulk(&rig, i, NULL);
    for (int t = 0; t < 3; t++) {
        count = shuffled(&rig, DATA, visits);
        start_toucher(&touchers[t], &rig, t, visits, count / 2);
    }
    CHECK(!speaks(rig.from_pager.fd, 0));
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    for (int t = 0; t < 3; t++)
        join_toucher(&touchers[t]);
    for (uint32_t i = 0; i < channels; i++) {
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_BULK_END, PC_CHANNEL_BULK, (int)i, NULL);
        EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, (int)i, NULL);
    }

    /* Nobody has touched a page without content: none of them may be here. */
    CHECK_EQ(resident_bytes(&rig), data * rig.page_bytes);
    stats = pager_stats(&rig);
    served = server_stats(&rig);
    CHECK_EQ(stats.resident_pages, all_pages(&rig));
    CHECK_EQ(stats.resident_bytes, stats.total_bytes);
    CHECK_EQ(stats.demand_pages + stats.background_pages, data);
    CHECK_EQ(stats.zero_pages, all_pages(&rig) - data);
    /* What was pushed and then asked for comes twice; the second may still be under way. */
    sent_twice = served.demand_pages + served.background_pages - data;
    CHECK(sent_twice >= stats.duplicate_pages && sent_twice <= stats.requests);
    CHECK(served.bytes_sent <= (data + sent_twice) * (rig.page_bytes + PC_FRAME_HEADER_BYTES) +
                                   (all_pages(&rig) - data + channels) * PC_FRAME_HEADER_BYTES);
    if (page_map) /* what was never touched was never spoken of */
        CHECK(served.bytes_sent <= (data + sent_twice) * (rig.page_bytes + PC_FRAME_HEADER_BYTES) +
                                       (count_content(&rig, ZEROED) + channels) * PC_FRAME_HEADER_BYTES);
    for (uint32_t i = 0; i < rig.blocks; i++) {
        uint64_t words[MAX_PAGES / 64] = {0};

        CHECK_EQ(pc_pager_received(rig.pager, i, words), 0);
        CHECK_EQ(pc_bitmap_count(words, rig.pages[i]), rig.pages[i]);
    }
    CHECK_EQ(pc_pager_received(rig.pager, rig.blocks, NULL), -EINVAL);

    /* A fault on a page that is known to be zero asks nobody. */
    requests_before = stats.requests;
    faults_before = stats.faults;
    count = shuffled(&rig, ABSENT, visits);
    start_toucher(&touchers[0], &rig, -1, visits, count / 2);
    join_toucher(&touchers[0]);
    CHECK_EQ(pager_stats(&rig).requests, requests_before);
    CHECK(pager_stats(&rig).faults >= faults_before + count / 2);
    check_content(&rig);
    CHECK_EQ(pager_stats(&rig).requests, requests_before);

    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    EXPECT_NO_EVENT(&rig.from_server, PC_EVENT_FATAL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_COMPLETE); /* once */
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    check_content(&rig);
    close_rig(&rig);
}

static void one_bulk_channel(int kind)
{
    bulk(kind, 1, true);
}
OF_EACH_KIND(one_bulk_channel)

static void three_bulk_channels(int kind)
{
    bulk(kind, 3, false);
}
OF_EACH_KIND(three_bulk_channels)

/* ---- writers ------------------------------------------------------------------------------------------------------ */

#define WRITERS 3
#define MARK UINT64_C(0xfeedfacecafe0000)

/* A thread of the machine that owns every WRITERS-th page and changes each as soon as it is there, twice. */
struct writer {
    struct rig *rig;
    uint64_t own;
    pthread_t thread;
};

static uint64_t marked_word(const struct rig *rig, uint64_t page)
{
    return mix(page) % (rig->page_bytes / sizeof(uint64_t));
}

static void *write_pages(void *argument)
{
    struct writer *writer = argument;
    struct rig *rig = writer->rig;
    uint64_t pages = rig->pages[0], stride = 1 + mix(writer->own + test_.seed) % (pages - 1);

    for (int pass = 0; pass < 2; pass++)
        for (uint64_t i = 0; i < pages; i++) {
            uint64_t page = (i * stride) % pages, word = marked_word(rig, page);
            volatile uint64_t *at = (volatile uint64_t *)(void *)dest_page(rig, 0, page) + word;

            if (page % WRITERS != writer->own)
                continue;
            if (pass == 0) {
                if (page % 2 && *at != word_of(0, page, word)) /* the others are written before they are read */
                    FAIL("page %llu came with something else", (unsigned long long)page);
                *at = MARK + page;
            } else if (*at != MARK + page && *at != MARK + page + 1) {
                FAIL("a write to page %llu was lost", (unsigned long long)page);
            } else {
                *at = MARK + page + 1;
            }
        }
    return NULL;
}

/* A source that answers late, in any order and more than once, and pushes the same pages again and again. */
struct babbler {
    const struct rig *rig;
    int fd;
    bool urgent;
    uint64_t random;
    uint8_t *content;
    atomic_bool *enough;
    pthread_t thread;
};

static uint64_t roll(uint64_t *random, uint64_t limit)
{
    *random = mix(*random);
    return *random % limit;
}

static bool babble_page(struct babbler *babbler, uint64_t first, uint64_t pages, uint8_t flags, uint32_t id)
{
    uint8_t *content = babbler->content;
    struct pc_frame frame = {.type = PC_FRAME_PAGES, .flags = flags, .first_page = first, .request_id = id};
    bool zero = true;

    frame.pages = (uint32_t)pages;
    for (uint64_t i = 0; i < pages; i++) {
        zero = zero && content_of(0, first + i) != DATA;
        make_page(0, first + i, babbler->rig->page_bytes, content + i * babbler->rig->page_bytes);
    }
    if (zero && roll(&babbler->random, 2)) {
        frame.type = PC_FRAME_ZERO;
        return send_frame(babbler->fd, frame, NULL, 0);
    }
    return send_frame(babbler->fd, frame, content, pages * babbler->rig->page_bytes);
}

static void *babble(void *argument)
{
    struct babbler *babbler = argument;
    uint64_t *random = &babbler->random;
    const struct rig *rig = babbler->rig;
    struct pc_frame asked[64];
    size_t count = 0;

    for (;;) {
        bool last = atomic_load(babbler->enough);

        if (babbler->urgent) {
            while (count < 64 && speaks(babbler->fd, count ? 0 : 1)) {
                if (!receive_frame(babbler->fd, &asked[count]))
                    return NULL;
                CHECK_EQ(asked[count].type, PC_FRAME_REQUEST);
                count++;
            }
            while (count && roll(random, 8)) {
                size_t i = (size_t)roll(random, count);

                for (uint64_t times = 1 + roll(random, 2); times; times--)
                    if (!babble_page(babbler, asked[i].first_page, 1, PC_FRAME_DEMAND, asked[i].request_id))
                        return NULL;
                asked[i] = asked[--count];
            }
        }
        if (!babbler->urgent || !roll(random, 4)) {
            uint64_t first = roll(random, rig->pages[0]), pages = 1 + roll(random, rig->kind == PC_MEMORY_HUGETLB ? 1 : 9);

            if (pages > rig->pages[0] - first)
                pages = rig->pages[0] - first;
            if (!babble_page(babbler, first, pages, 0, 0))
                return NULL;
        }
        if (last && !count) {
            /* Everything once more: no write that was ever made may go. */
            for (uint64_t page = 0; page < rig->pages[0]; page++)
                if (!babble_page(babbler, page, 1, 0, 0))
                    return NULL;
            CHECK_SYS(shutdown(babbler->fd, SHUT_WR));
            return NULL;
        }
    }
}

static void no_write_is_lost(int kind)
{
    const uint64_t pages[] = {scaled(kind, 601)}; /* a prime number either way: a stride visits all */
    struct babbler babblers[3];
    struct writer writers[WRITERS];
    atomic_bool enough = false;
    struct rig rig;

    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    for (int i = 0; i < 3; i++) {
        babblers[i] = (struct babbler){.rig = &rig, .urgent = i == 0, .random = test_random(), .enough = &enough};
        CHECK((babblers[i].content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES)) != NULL);
        babblers[i].fd = i ? script_bulk(&rig, (uint32_t)i) : script_urgent(&rig, 0);
    }
    for (int i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){.rig = &rig, .own = (uint64_t)i};
        CHECK_EQ(pthread_create(&writers[i].thread, NULL, write_pages, &writers[i]), 0);
    }
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_create(&babblers[i].thread, NULL, babble, &babblers[i]), 0);
    for (int i = 0; i < WRITERS; i++)
        CHECK_EQ(pthread_join(writers[i].thread, NULL), 0);
    atomic_store(&enough, true);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_join(babblers[i].thread, NULL), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 1, NULL);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 2, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK(pager_stats(&rig).duplicate_pages >= 2 * rig.pages[0]);
    for (uint64_t page = 0; page < rig.pages[0]; page++) {
        uint64_t word = marked_word(&rig, page), *words = (uint64_t *)(void *)dest_page(&rig, 0, page);

        CHECK(words[word] == MARK + page + 1);
        words[word] = word_of(0, page, word);
    }
    check_content(&rig);
    for (int i = 0; i < 3; i++) {
        free(babblers[i].content);
        close(babblers[i].fd);
    }
    close_rig(&rig);
}
OF_EACH_KIND(no_write_is_lost)

/* ---- many who wait ---- */

#define CROWD_PAGES 200

/* Two threads wait for each of many pages: each page is requested once by each channel, whichever channel brings it lets both go. */
static void a_crowd_waits(void)
{
    const uint64_t pages[] = {CROWD_PAGES};
    static struct toucher touchers[2 * CROWD_PAGES];
    struct rig rig;
    int fd = -1, bulk_fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    for (int i = 0; i < 2 * CROWD_PAGES; i++)
        touch_one(&touchers[i], &rig, 0, (uint64_t)i % CROWD_PAGES);
    wait_pending(&rig, 2 * CROWD_PAGES);
    for (int channel = 0; channel < 2; channel++) {
        bool requested[CROWD_PAGES] = {false};

        if (fd >= 0)
            close(fd);
        fd = script_urgent(&rig, 0);
        for (int i = 0; i < CROWD_PAGES; i++) {
            struct pc_frame frame;

            CHECK(receive_frame(fd, &frame));
            CHECK(!requested[frame.first_page]);
            requested[frame.first_page] = true;
        }
        CHECK(!speaks(fd, SERVED_MS));
    }
    bulk_fd = script_bulk(&rig, 0);
    for (uint64_t page = 0; page < CROWD_PAGES; page++)
        serve_page(&rig, page % 3 ? bulk_fd : fd, 0, page);
    for (int i = 0; i < 2 * CROWD_PAGES; i++)
        join_toucher(&touchers[i]);
    wait_pending(&rig, 0);
    CHECK_EQ(pager_stats(&rig).oldest_pending_ns, 0);
    CHECK_EQ(pager_stats(&rig).requests, 2 * CROWD_PAGES);
    CHECK_EQ(pager_stats(&rig).resident_pages, CROWD_PAGES);
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}

/* The state of the one fault thread, as /proc says it; 0: there is none. */
static char fault_thread_state(void)
{
    DIR *tasks = opendir("/proc/self/task");
    char state = 0;

    CHECK(tasks != NULL);
    for (struct dirent *entry; (entry = readdir(tasks));) {
        char path[300], line[300] = "", *end;
        FILE *file;

        (void)snprintf(path, sizeof(path), "/proc/self/task/%s/stat", entry->d_name);
        file = fopen(path, "r");
        if (!file)
            continue;
        end = fgets(line, sizeof(line), file) ? strrchr(line, ')') : NULL;
        (void)fclose(file);
        if (end && strstr(line, "(pc-fault/0)"))
            state = end[2];
    }
    (void)closedir(tasks);
    return state;
}

/* It busy-waits after an event, and then sleeps: also without a channel, and when nothing came at all. */
static void busy_poll_ends(void)
{
    const uint64_t pages[] = {16};
    struct toucher toucher;
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 2000);
    WAIT_UNTIL(fault_thread_state() == 'S');
    touch_one(&toucher, &rig, 0, 0);
    wait_pending(&rig, 1);
    WAIT_UNTIL(fault_thread_state() == 'S');
    fd = script_urgent(&rig, 0);
    serve_page(&rig, fd, 0, 0);
    join_toucher(&toucher);
    WAIT_UNTIL(fault_thread_state() == 'S');
    for (uint64_t page = 1; page < pages[0]; page++)
        serve_page(&rig, fd, 0, page);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    close(fd);
    close_rig(&rig);
}

/* A thread that cannot watch its userfaultfd, or its channel, for want of memory tries again after a moment. */
static void what_cannot_be_watched_is_watched_later(void)
{
    const uint64_t pages[] = {2};
    struct toucher touchers[2];
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    atomic_store(&epoll_calls, 1); /* that of the commands, without which there is no thread */
    atomic_store(&epoll_refused, 3);
    arm_all(&rig, 0);
    touch_one(&touchers[0], &rig, 0, 0);
    wait_pending(&rig, 1);
    CHECK_EQ(atomic_load(&epoll_refused), 0);
    atomic_store(&epoll_refused, 3);
    fd = script_urgent(&rig, 0);
    serve_page(&rig, fd, 0, 0);
    join_toucher(&touchers[0]);
    CHECK(atomic_load(&epoll_refused) <= 0);
    touch_one(&touchers[1], &rig, 0, 1);
    wait_pending(&rig, 1);
    serve_page(&rig, fd, 0, 1);
    join_toucher(&touchers[1]);
    close(fd);
    close_rig(&rig);
}

/* What was forgotten is missing in the counters, of its block and of all. */
static void forgotten_pages_are_counted(void)
{
    const uint64_t pages[] = {80, 16};
    uint64_t stale[2] = {UINT64_C(0xf0), 0x3};
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 2, pages);
    arm_all(&rig, 0);
    fd = script_bulk(&rig, 0);
    for (uint32_t block = 0; block < 2; block++)
        for (uint64_t page = 0; page < pages[block]; page++)
            serve_page(&rig, fd, block, page);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(&rig).resident_pages, 96);
    CHECK_EQ(pc_pager_forget(rig.pager, 0, stale), 0);
    CHECK_EQ(pc_memory_discard_pages(&rig.dest[0], stale), 0);
    CHECK_EQ(pager_stats(&rig).resident_pages, 90);
    CHECK_EQ(pager_stats(&rig).resident_bytes, 90 * rig.page_bytes);
    for (uint64_t page = 0; page < pages[0]; page++)
        serve_page(&rig, fd, 0, page);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(&rig).resident_pages, 96);
    check_content(&rig);
    close(fd);
    close_rig(&rig);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(demand);
    RUN_CASE(demand_with_busy_poll);
    RUN_KINDS(one_bulk_channel);
    RUN_KINDS(three_bulk_channels);
    RUN_KINDS(no_write_is_lost);
    RUN_CASE(a_crowd_waits);
    RUN_CASE(busy_poll_ends);
    RUN_CASE(what_cannot_be_watched_is_watched_later);
    RUN_CASE(forgotten_pages_are_counted);
    return test_end();
}
