/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of the pager share: source memory with content that can be computed from (block, page), a pager with empty memory,
 * a page server or the test itself (a *script*) at the other end of its connections, and *touchers*, threads that visit pages of
 * the destination and compare. A toucher that is not served hangs for good; test.h ends such a case by SIGKILL.
 */
#ifndef PC_RIG_H
#define PC_RIG_H

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "postcopy/engine.h"
#include "postcopy/uffd.h"
#include "tests/support/tcp_pair.h"
#ifdef RIG_TLS
#include "tests/support/tls_pair.h"
#endif
#include "tests/support/test.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" /* no test needs all of it */

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SLOW 4
#else
#define SLOW 1
#endif
#define PATIENCE_MS (6000 * SLOW) /* for something that must happen */
#define DEADLINE_S (20 * SLOW)
#define SERVED_MS 30 /* how long something that must not happen is given to happen */
#define MAX_BLOCKS 4
#define MAX_PAGES 1024
#define HUGE_POOL_PAGES 48

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#define CHECK_LEAKS() CHECK_EQ(__lsan_do_recoverable_leak_check(), 0) /* a case ends by _exit, which does not look */
#else
#define CHECK_LEAKS() ((void)0)
#endif

static char message[PC_ERROR_BYTES];

#define WAIT_UNTIL(condition)                                                                                           \
    do {                                                                                                                \
        for (uint64_t end_ns_ = pc_now_ns() + (uint64_t)PATIENCE_MS * 1000000; !(condition); pc_sleep_ns(50000))        \
            if (pc_now_ns() > end_ns_)                                                                                  \
                FAIL("still not true: %s", #condition);                                                                 \
    } while (0)

/* ---- content ------------------------------------------------------------------------------------------------------ */

enum content { ABSENT, ZEROED, DATA };

static uint64_t mix(uint64_t x)
{
    x += 0x9E3779B97F4A7C15;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

/* Never touched at the source, touched but zero there, or random. Runs of several pages and lone pages of each; a memory of less than 32
 * pages, as of huge ones, has no run of absent pages: three quarters of it are data, or nearly so. */
static enum content content_of(uint32_t block, uint64_t page)
{
    uint64_t h = mix(test_.seed ^ (uint64_t)block << 48 ^ page);

    if (page < 3)
        return page == 0 ? DATA : page == 1 ? ZEROED : ABSENT;
    if (page >= 32 && mix(test_.seed ^ (uint64_t)block << 48 ^ page / 16 ^ UINT64_C(1) << 40) % 6 == 0)
        return ABSENT;
    return h % 8 == 0 ? ABSENT : h % 8 == 1 ? ZEROED : DATA;
}

static uint64_t word_of(uint32_t block, uint64_t page, uint64_t word)
{
    uint64_t base = mix(test_.seed + ((uint64_t)block << 48 | page << 1));

    return content_of(block, page) == DATA ? (base ^ word * 0xD6E8FEB86659FD93) | 1 : 0;
}

static void make_page(uint32_t block, uint64_t page, uint64_t page_bytes, void *out)
{
    uint64_t *words = out;

    for (uint64_t i = 0; i < page_bytes / sizeof(*words); i++)
        words[i] = word_of(block, page, i);
}

static bool is_page(uint32_t block, uint64_t page, uint64_t page_bytes, const void *at)
{
    uint64_t base = mix(test_.seed + ((uint64_t)block << 48 | page << 1)), wrong = 0;
    const uint64_t *words = at;
    bool data = content_of(block, page) == DATA;

    for (uint64_t i = 0; i < page_bytes / sizeof(*words); i++)
        wrong |= words[i] ^ (data ? (base ^ i * 0xD6E8FEB86659FD93) | 1 : 0);
    return !wrong;
}

/* An unlinked file; with open(2) flags, opened once more with them. -1 with errno: they are refused. */
static int temporary_file(int flags)
{
    const char *directory = getenv("TMPDIR");
    char path[4096];
    int fd;

    (void)snprintf(path, sizeof(path), "%s/postcopy-test-XXXXXX", directory ? directory : "/tmp");
    fd = CHECK_SYS(mkostemp(path, O_CLOEXEC));
    if (flags) {
        close(fd);
        fd = open(path, O_RDWR | O_CLOEXEC | flags);
    }
    (void)unlink(path);
    return fd;
}

/* ---- sockets ------------------------------------------------------------------------------------------------------ */

/* A read by the test never waits for ever. */
static void be_patient(int fd)
{
    struct timeval patience = {.tv_sec = PATIENCE_MS / 1000};

    CHECK_SYS(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)));
}

static bool send_bytes(int fd, const void *data, size_t bytes)
{
    const uint8_t *at = data;

    while (bytes) {
        ssize_t sent = send(fd, at, bytes, MSG_NOSIGNAL);

        if (sent <= 0)
            return false;
        at += sent;
        bytes -= (size_t)sent;
    }
    return true;
}

/* False at the end of the stream. */
static bool receive_bytes(int fd, void *data, size_t bytes)
{
    uint8_t *at = data;

    while (bytes) {
        ssize_t got = recv(fd, at, bytes, 0);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            FAIL("the peer said nothing for %d ms", PATIENCE_MS);
        if (got <= 0)
            return false;
        at += got;
        bytes -= (size_t)got;
    }
    return true;
}

/* Whether anything arrives, or the stream ends, within a time. */
static bool speaks(int fd, int ms)
{
    struct pollfd pollfd = {.fd = fd, .events = POLLIN};

    return poll(&pollfd, 1, ms) > 0;
}

static bool send_frame(int fd, struct pc_frame frame, const void *payload, uint64_t bytes)
{
    uint8_t header[PC_FRAME_HEADER_BYTES];

    frame.payload_bytes = (uint32_t)bytes;
    frame.payload_crc = bytes ? pc_crc32c(0, payload, bytes) : 0;
    pc_frame_encode(&frame, header);
    return send_bytes(fd, header, sizeof(header)) && send_bytes(fd, payload, bytes);
}

static bool receive_frame(int fd, struct pc_frame *frame)
{
    uint8_t header[PC_FRAME_HEADER_BYTES];

    if (!receive_bytes(fd, header, sizeof(header)))
        return false;
    if (pc_frame_decode(header, frame, message, sizeof(message)))
        FAIL("%s", message);
    return true;
}

/* ---- events ------------------------------------------------------------------------------------------------------- */

/* What a pager or a page server said and nobody has asked for yet. */
struct inbox {
    void *owner;
    int fd;
    int (*next)(void *owner, struct pc_event *event);
    struct pc_event seen[512];
    size_t count;
};

static int next_pager_event(void *owner, struct pc_event *event)
{
    return pc_pager_next_event(owner, event);
}

static int next_server_event(void *owner, struct pc_event *event)
{
    return pc_pageserver_next_event(owner, event);
}

static void collect(struct inbox *inbox)
{
    while (inbox->count < 512 && inbox->next(inbox->owner, &inbox->seen[inbox->count]) == 1)
        inbox->count++;
}

/* The first event of a type (and of a channel, when kind is not 0), removed. False when there is none in time. */
static bool find_event(struct inbox *inbox, int type, int kind, int channel, int ms, struct pc_event *event)
{
    uint64_t end_ns = pc_now_ns() + (uint64_t)ms * 1000000;

    for (;;) {
        struct pollfd readable = {.fd = inbox->fd, .events = POLLIN};
        uint64_t now_ns;

        collect(inbox);
        for (size_t i = 0; i < inbox->count; i++) {
            if (inbox->seen[i].type != type ||
                (kind && (inbox->seen[i].channel_kind != kind || inbox->seen[i].channel != channel)))
                continue;
            if (event)
                *event = inbox->seen[i];
            memmove(&inbox->seen[i], &inbox->seen[i + 1], (inbox->count - i - 1) * sizeof(inbox->seen[0]));
            inbox->count--;
            return true;
        }
        now_ns = pc_now_ns();
        if (now_ns >= end_ns)
            return false;
        (void)poll(&readable, 1, (int)((end_ns - now_ns) / 1000000) + 1);
    }
}

#define EXPECT_EVENT(inbox, type, kind, channel, event)                                                                \
    do {                                                                                                               \
        if (!find_event(inbox, type, kind, channel, PATIENCE_MS, event))                                               \
            FAIL("no event %s", #type);                                                                                \
    } while (0)

#define EXPECT_NO_EVENT(inbox, type)                                                                                   \
    do {                                                                                                               \
        struct pc_event event_;                                                                                        \
        if (find_event(inbox, type, 0, 0, 0, &event_))                                                                 \
            FAIL("unexpected %s: error %d, %s", #type, event_.error, event_.text);                                     \
    } while (0)

/* ---- the rig ------------------------------------------------------------------------------------------------------ */

struct rig {
    int kind;
    uint64_t page_bytes;
    uint32_t blocks;
    uint64_t pages[MAX_BLOCKS];
    struct pc_memory source[MAX_BLOCKS], dest[MAX_BLOCKS];
    struct pc_pageserver *server;
    struct pc_pager *pager;
    struct inbox from_pager, from_server;
    atomic_bool leashed;    /* touchers touch only as many pages as `allowance` says */
    atomic_long allowance;
};

static uint64_t kind_page_bytes(int kind)
{
    return kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
}

/* Huge pages are few: a sixteenth of a sixteenth of the pages, at least five. */
static uint64_t scaled(int kind, uint64_t pages)
{
    return kind != PC_MEMORY_HUGETLB ? pages : pages / 128 > 5 ? pages / 128 : 5;
}

static struct pc_memory make_memory(int kind, uint64_t pages)
{
    struct pc_memory memory;
    int result;

    if (kind == PC_MEMORY_HUGETLB && pc_huge_page_bytes() != 2 << 20)
        SKIP("hugetlb", "the default huge page is not 2 MiB");
    result = pc_memory_create(kind, pages * kind_page_bytes(kind), &memory, message, sizeof(message));
    if (kind == PC_MEMORY_HUGETLB && result == -ENOMEM)
        SKIP("hugetlb", "%s", message);
    if (result)
        FAIL("%s", message);
    return memory;
}

static void need_uffd(void)
{
    struct pc_uffd_api api;
    int error = pc_uffd_probe(PC_UFFD_ANY, &api);

    if (error || api.how == PC_UFFD_USER_ONLY)
        SKIP("uffd", "no userfaultfd that takes the kernel's own faults: %s", strerror(error ? -error : EPERM));
}

static void fill_source(const struct pc_memory *memory, uint32_t block)
{
    uint64_t pages = memory->size_bytes / memory->page_bytes;

    for (uint64_t page = 0; page < pages; page++) {
        uint8_t *at = (uint8_t *)memory->base + page * memory->page_bytes;

        if (content_of(block, page) == ZEROED)
            *(volatile uint8_t *)at = 0;
        else if (content_of(block, page) == DATA)
            make_page(block, page, memory->page_bytes, at);
    }
}

/* A pager with memory but without shards. */
static void open_pager(struct rig *rig, int kind, uint32_t blocks, const uint64_t *pages)
{
    need_uffd();
    memset(rig, 0, sizeof(*rig));
    rig->kind = kind;
    rig->page_bytes = kind_page_bytes(kind);
    rig->blocks = blocks;
    CHECK_EQ(pc_pager_new(-1, &rig->pager), 0);
    rig->from_pager = (struct inbox){.owner = rig->pager, .fd = pc_pager_event_fd(rig->pager), .next = next_pager_event};
    for (uint32_t i = 0; i < blocks; i++) {
        rig->pages[i] = pages[i];
        rig->dest[i] = make_memory(kind, pages[i]);
        CHECK_EQ(pc_pager_add_block(rig->pager, &rig->dest[i], -1), i);
    }
}

static void open_server(struct rig *rig, uint64_t bandwidth)
{
    CHECK_EQ(pc_pageserver_new(bandwidth, &rig->server), 0);
    rig->from_server =
        (struct inbox){.owner = rig->server, .fd = pc_pageserver_event_fd(rig->server), .next = next_server_event};
    for (uint32_t i = 0; i < rig->blocks; i++) {
        rig->source[i] = make_memory(rig->kind, rig->pages[i]);
        fill_source(&rig->source[i], i);
        CHECK_EQ(pc_pageserver_add_block(rig->server, &rig->source[i], rig->page_bytes), i);
    }
}

/* What a migration does: both sides learn which pages were never touched. */
static void tell_page_map(struct rig *rig)
{
    for (uint32_t i = 0; i < rig->blocks; i++) {
        uint64_t present[MAX_PAGES / 64] = {0}, zero[MAX_PAGES / 64] = {0};

        CHECK_EQ(pc_memory_present(&rig->source[i], present), 0);
        for (uint64_t page = 0; page < rig->pages[i]; page++)
            if (!(present[page / 64] >> (page % 64) & 1))
                pc_bitmap_set_range(zero, page, 1);
        CHECK_EQ(pc_pageserver_set_present(rig->server, i, present), 0);
        CHECK_EQ(pc_pager_set_zero(rig->pager, i, zero), 0);
    }
}

static uint32_t add_shard(struct rig *rig, uint32_t busy_poll_us)
{
    int index = pc_pager_add_shard(rig->pager, PC_UFFD_ANY, busy_poll_us, message, sizeof(message));

    if (index < 0)
        FAIL("%s", message);
    return (uint32_t)index;
}

static void arm(struct rig *rig, uint32_t shard, uint32_t block, uint64_t first, uint64_t pages)
{
    if (pc_pager_arm(rig->pager, shard, block, first, pages, message, sizeof(message)))
        FAIL("%s", message);
}

/* One shard for everything. */
static void arm_all(struct rig *rig, uint32_t busy_poll_us)
{
    uint32_t shard = add_shard(rig, busy_poll_us);

    for (uint32_t i = 0; i < rig->blocks; i++)
        arm(rig, shard, i, 0, rig->pages[i]);
}

/* What is given with the two ends of a connection: source, destination. A test that defines RIG_TLS has all of them encrypted; the
 * destination has accepted them, as the server. */
#ifdef RIG_TLS
static void protect(const int pair[2], struct pc_tls *tls[2])
{
    static struct site site; /* of this case, which is a process of its own */
    const int sockets[2] = {pair[1], pair[0]};
    struct pc_tls *ends[2];

    if (!site.server)
        site = open_site();
    tls_ends(&site, sockets, ends);
    tls[0] = ends[1];
    tls[1] = ends[0];
}
#else
static void protect(const int pair[2], struct pc_tls *tls[2])
{
    (void)pair;
    tls[0] = tls[1] = NULL;
}
#endif

/* Connects the two; where `knife` is not NULL it becomes a descriptor by which the connection can be cut. */
static void connect_urgent(struct rig *rig, uint32_t shard, int *knife)
{
    struct pc_tls *tls[2];
    int pair[2];

    tcp_pair(pair);
    if (knife)
        *knife = CHECK_SYS(fcntl(pair[0], F_DUPFD_CLOEXEC, 0));
    protect(pair, tls);
    CHECK_EQ(pc_pageserver_attach_urgent(rig->server, shard, pair[0], tls[0], 0), 0);
    CHECK_EQ(pc_pager_attach_urgent(rig->pager, shard, pair[1], tls[1]), 0);
}

static void connect_bulk(struct rig *rig, uint32_t channel, int *knife)
{
    struct pc_tls *tls[2];
    int pair[2];

    tcp_pair(pair);
    if (knife)
        *knife = CHECK_SYS(fcntl(pair[0], F_DUPFD_CLOEXEC, 0));
    protect(pair, tls);
    CHECK_EQ(pc_pageserver_attach_bulk(rig->server, channel, pair[0], tls[0]), 0);
    CHECK_EQ(pc_pager_attach_bulk(rig->pager, channel, pair[1], tls[1]), 0);
}

/* Channel 0 and 1 are urgent, 2 is bulk. */
static void reconnect(struct rig *rig, int channel, int *knife)
{
    close(*knife);
    if (channel < 2)
        connect_urgent(rig, (uint32_t)channel, knife);
    else
        connect_bulk(rig, 0, knife);
}

/* The pager's connections with the test as the source. */
static int script_urgent(struct rig *rig, uint32_t shard)
{
    int pair[2];

    tcp_pair(pair);
    be_patient(pair[0]);
    CHECK_EQ(pc_pager_attach_urgent(rig->pager, shard, pair[1], NULL), 0);
    return pair[0];
}

static int script_bulk(struct rig *rig, uint32_t channel)
{
    int pair[2];

    tcp_pair(pair);
    be_patient(pair[0]);
    CHECK_EQ(pc_pager_attach_bulk(rig->pager, channel, pair[1], NULL), 0);
    return pair[0];
}

static struct pc_pager_stats pager_stats(const struct rig *rig)
{
    struct pc_pager_stats stats;

    CHECK_EQ(pc_pager_stats(rig->pager, &stats), 0);
    return stats;
}

static struct pc_pageserver_stats server_stats(const struct rig *rig)
{
    struct pc_pageserver_stats stats;

    CHECK_EQ(pc_pageserver_stats(rig->server, &stats), 0);
    return stats;
}

static uint8_t *dest_page(const struct rig *rig, uint32_t block, uint64_t page)
{
    return (uint8_t *)rig->dest[block].base + page * rig->page_bytes;
}

static uint64_t all_pages(const struct rig *rig)
{
    uint64_t pages = 0;

    for (uint32_t i = 0; i < rig->blocks; i++)
        pages += rig->pages[i];
    return pages;
}

static uint64_t count_content(const struct rig *rig, enum content content)
{
    uint64_t count = 0;

    for (uint32_t i = 0; i < rig->blocks; i++)
        for (uint64_t page = 0; page < rig->pages[i]; page++)
            count += content_of(i, page) == content;
    return count;
}

/* The next page with content, for a test that needs a missing one again and again. */
static uint64_t next_data_page(const struct rig *rig, uint64_t *page)
{
    do
        ++*page;
    while (*page < rig->pages[0] && content_of(0, *page) != DATA);
    CHECK(*page < rig->pages[0]);
    return *page;
}

static uint64_t resident_bytes(const struct rig *rig)
{
    uint64_t sum = 0, bytes;

    for (uint32_t i = 0; i < rig->blocks; i++) {
        CHECK_EQ(pc_memory_resident(&rig->dest[i], &bytes), 0);
        sum += bytes;
    }
    return sum;
}

/* Every page of the destination is the source's, whether armed or not any more. */
static void check_content(const struct rig *rig)
{
    for (uint32_t i = 0; i < rig->blocks; i++)
        for (uint64_t page = 0; page < rig->pages[i]; page++)
            if (!is_page(i, page, rig->page_bytes, dest_page(rig, i, page)))
                FAIL("page %llu of block %u differs", (unsigned long long)page, i);
}

/* Both sides closed and freed, which is where address and leak sanitizers look. The pager must be complete. */
static void close_rig(struct rig *rig)
{
    CHECK_EQ(pc_pager_free(rig->pager), 0);
    if (rig->server)
        pc_pageserver_free(rig->server);
    for (uint32_t i = 0; i < rig->blocks; i++) {
        pc_memory_destroy(&rig->dest[i]);
        if (rig->server)
            pc_memory_destroy(&rig->source[i]);
    }
    CHECK_LEAKS();
}

/* ---- touchers ----------------------------------------------------------------------------------------------------- */

struct visit {
    uint32_t block;
    uint64_t page;
};

struct toucher {
    struct rig *rig;
    struct visit *visits;
    size_t count;
    int slot;          /* tracked when not negative */
    atomic_uint tid;   /* 0 until it runs */
    atomic_size_t done;
    pthread_t thread;
};

static void *touch(void *argument)
{
    struct toucher *toucher = argument;
    struct rig *rig = toucher->rig;
    pid_t tid = (pid_t)syscall(SYS_gettid);

    if (toucher->slot >= 0)
        CHECK_EQ(pc_pager_track_thread(rig->pager, (uint32_t)toucher->slot, tid), 0);
    atomic_store(&toucher->tid, (unsigned)tid);
    for (size_t i = 0; i < toucher->count; i++) {
        const struct visit *visit = &toucher->visits[i];

        while (atomic_load(&rig->leashed) && atomic_fetch_sub(&rig->allowance, 1) <= 0) {
            atomic_fetch_add(&rig->allowance, 1);
            (void)sched_yield();
        }
        if (!is_page(visit->block, visit->page, rig->page_bytes, dest_page(rig, visit->block, visit->page)))
            FAIL("a toucher sees something else on page %llu of block %u", (unsigned long long)visit->page, visit->block);
        atomic_fetch_add(&toucher->done, 1);
    }
    return NULL;
}

static void start_toucher(struct toucher *toucher, struct rig *rig, int slot, const struct visit *visits, size_t count)
{
    memset(toucher, 0, sizeof(*toucher));
    toucher->rig = rig;
    toucher->slot = slot;
    toucher->count = count;
    toucher->visits = malloc(count * sizeof(*visits) + 1);
    CHECK(toucher->visits != NULL);
    memcpy(toucher->visits, visits, count * sizeof(*visits));
    CHECK_EQ(pthread_create(&toucher->thread, NULL, touch, toucher), 0);
}

static void touch_one(struct toucher *toucher, struct rig *rig, uint32_t block, uint64_t page)
{
    struct visit visit = {.block = block, .page = page};

    start_toucher(toucher, rig, -1, &visit, 1);
}

static void join_toucher(struct toucher *toucher)
{
    CHECK_EQ(pthread_join(toucher->thread, NULL), 0);
    CHECK_EQ(atomic_load(&toucher->done), toucher->count);
    free(toucher->visits);
}

/* Every page of a content (or of all: -1) once, in random order. */
static size_t shuffled(const struct rig *rig, int content, struct visit *visits)
{
    size_t count = 0;

    for (uint32_t i = 0; i < rig->blocks; i++)
        for (uint64_t page = 0; page < rig->pages[i]; page++)
            if (content < 0 || content_of(i, page) == (enum content)content)
                visits[count++] = (struct visit){.block = i, .page = page};
    for (size_t i = count; i > 1; i--) {
        size_t j = (size_t)test_below(i);
        struct visit other = visits[j];

        visits[j] = visits[i - 1];
        visits[i - 1] = other;
    }
    return count;
}

/* Until so many threads wait, as far as the pager has seen. */
static void wait_pending(const struct rig *rig, uint64_t pending)
{
    WAIT_UNTIL(pager_stats(rig).pending_faults == pending);
}

static void serve_page(const struct rig *rig, int fd, uint32_t block, uint64_t page)
{
    struct pc_frame frame = {.type = PC_FRAME_PAGES,
                             .flags = PC_FRAME_DEMAND,
                             .block = (uint16_t)block,
                             .first_page = page,
                             .pages = 1};
    uint8_t *content = malloc(rig->page_bytes);

    CHECK(content != NULL);
    make_page(block, page, rig->page_bytes, content);
    CHECK(send_frame(fd, frame, content, rig->page_bytes));
    free(content);
}

#define OF_EACH_KIND(name)                                                                                              \
    static void name##_memfd(void)                                                                                      \
    {                                                                                                                   \
        name(PC_MEMORY_MEMFD);                                                                                          \
    }                                                                                                                   \
    static void name##_anon(void)                                                                                       \
    {                                                                                                                   \
        name(PC_MEMORY_ANON);                                                                                           \
    }                                                                                                                   \
    static void name##_hugetlb(void)                                                                                    \
    {                                                                                                                   \
        name(PC_MEMORY_HUGETLB);                                                                                        \
    }

#define RUN_CASE(name) RUN_FOR(name, DEADLINE_S)
#define RUN_KINDS(name)                                                                                                 \
    do {                                                                                                                \
        RUN_CASE(name##_memfd);                                                                                         \
        RUN_CASE(name##_anon);                                                                                          \
        RUN_CASE(name##_hugetlb);                                                                                       \
    } while (0)

#pragma GCC diagnostic pop

#endif
