/* SPDX-License-Identifier: Apache-2.0
 *
 * The page server alone, against a destination that is played here: what a fault must not wait for, what a peer must not be
 * able to take, and what is left when something fails on the way. test_engine.c has it work with a pager.
 */
#include "tests/support/test.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "pageserver/server.h"
#include "postcopy/engine.h"

#define PAGE    4096u
#define PAGES   64u
#define WAIT_MS 10000

static char error[PC_ERROR_BYTES];

static struct pc_memory make_memory(uint64_t pages)
{
    struct pc_memory memory;

    CHECK_EQ(pc_memory_create(PC_MEMORY_ANON, pages * PAGE, &memory, error, sizeof error), 0);
    for (uint64_t page = 0; page < pages; page++)
        memset((uint8_t *)memory.base + page * PAGE, (int)(page % 255 + 1), PAGE);
    return memory;
}

static struct pc_pageserver *make_server(const struct pc_memory *memory)
{
    struct pc_pageserver *server;

    CHECK_EQ(pc_pageserver_new(0, &server), 0);
    CHECK_EQ(pc_pageserver_add_block(server, memory, PAGE), 0);
    return server;
}

static void pair_up(int pair[2])
{
    CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
}

/* The destination's end of a new channel. */
static int attach(struct pc_pageserver *server, int kind)
{
    int pair[2];

    pair_up(pair);
    CHECK_EQ(kind == PC_CHANNEL_URGENT ? pc_pageserver_attach_urgent(server, 0, pair[0], NULL, 0)
                                       : pc_pageserver_attach_bulk(server, 0, pair[0], NULL), 0);
    return pair[1];
}

static void read_all(int fd, void *into, size_t bytes)
{
    for (size_t have = 0; have < bytes;) {
        struct pollfd pfd = {.fd = fd, .events = POLLIN};
        ssize_t got;

        CHECK_EQ(poll(&pfd, 1, WAIT_MS), 1);
        got = CHECK_SYS(read(fd, (uint8_t *)into + have, bytes - have));
        CHECK(got > 0);
        have += (size_t)got;
    }
}

static void ask(int fd, uint64_t first_page, uint32_t pages)
{
    struct pc_frame frame = {.type = PC_FRAME_REQUEST, .first_page = first_page, .pages = pages, .request_id = 1};
    uint8_t header[PC_FRAME_HEADER_BYTES];

    pc_frame_encode(&frame, header);
    CHECK_EQ(write(fd, header, sizeof header), (ssize_t)sizeof header);
}

static struct pc_frame next_frame(int fd)
{
    static uint8_t payload[PC_FRAME_MAX_PAYLOAD_BYTES];
    uint8_t header[PC_FRAME_HEADER_BYTES];
    struct pc_frame frame;

    read_all(fd, header, sizeof header);
    CHECK_EQ(pc_frame_decode(header, &frame, error, sizeof error), 0);
    read_all(fd, payload, frame.payload_bytes);
    return frame;
}

/* The thread of this name's start in this process, or 0. */
static pid_t thread_called(const char *name)
{
    for (pid_t tid = getpid(); tid < getpid() + 1000; tid++) {
        char path[64], comm[32] = "";
        int fd;

        (void)snprintf(path, sizeof path, "/proc/self/task/%d/comm", tid);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        (void)!read(fd, comm, sizeof comm - 1);
        close(fd);
        if (!strncmp(comm, name, strlen(name)))
            return tid;
    }
    return 0;
}

/* ---- priorities ---- */

/* Bulk threads search bitmaps, which takes as long as memory is large, at the lowest priority there is. */
static void urgent_answers_beside_the_bulk_path(void)
{
    struct pc_memory memory = make_memory(PAGES);
    struct pc_pageserver *server = make_server(&memory);
    int urgent = attach(server, PC_CHANNEL_URGENT);
    uint64_t words[PAGES / 64];
    struct pc_pageserver_stats stats;

    CHECK_EQ(pc_pageserver_start(server), 0);
    pthread_mutex_lock(&server->push_lock);
    for (uint64_t page = 0; page < PAGES; page++) {
        ask(urgent, page, 1);
        CHECK_EQ(next_frame(urgent).first_page, page);
    }
    /* What Python asks for once a second does not wait either, nor does anything wait for it. */
    CHECK_EQ(pc_pageserver_stats(server, &stats), 0);
    CHECK_EQ(stats.demand_pages, PAGES);
    CHECK_EQ(pc_pageserver_released(server, 0, words, NULL), 0);
    pthread_mutex_unlock(&server->push_lock);
    pc_pageserver_free(server);
    close(urgent);
    pc_memory_destroy(&memory);
}

/* The push goes on behind the last fault, although nobody has waited to tell it. */
static void the_push_follows_the_faults(void)
{
    struct pc_memory memory = make_memory(PAGES);
    struct pc_pageserver *server = make_server(&memory);
    int urgent = attach(server, PC_CHANNEL_URGENT), bulk;
    struct pc_frame frame;

    CHECK_EQ(pc_pageserver_start(server), 0);
    ask(urgent, 40, 1);
    CHECK_EQ(next_frame(urgent).first_page, 40);
    ask(urgent, 0, 1); /* when it is answered, the request before it has been seen to */
    CHECK_EQ(next_frame(urgent).first_page, 0);
    ask(urgent, 40, 1);
    CHECK_EQ(next_frame(urgent).first_page, 40);
    ask(urgent, 50, 1);
    CHECK_EQ(next_frame(urgent).first_page, 50);
    ask(urgent, 50, 2);
    CHECK_EQ(next_frame(urgent).first_page, 50);
    CHECK_EQ(next_frame(urgent).first_page, 51);
    ask(urgent, 50, 1);
    CHECK_EQ(next_frame(urgent).first_page, 50);
    bulk = attach(server, PC_CHANNEL_BULK);
    frame = next_frame(bulk);
    CHECK_EQ(frame.first_page, 52);
    CHECK_EQ(frame.pages, 12);
    frame = next_frame(bulk); /* round the end */
    CHECK_EQ(frame.first_page, 1);
    CHECK_EQ(frame.pages, 39);
    frame = next_frame(bulk);
    CHECK_EQ(frame.first_page, 41);
    CHECK_EQ(frame.pages, 9);
    CHECK_EQ(next_frame(bulk).type, PC_FRAME_END);
    pc_pageserver_free(server);
    close(urgent);
    close(bulk);
    pc_memory_destroy(&memory);
}

/* ---- what a peer can take ---- */

/* A destination that asks for the same again and again gets it, but not at a priority that keeps everybody else from running. */
static void repetitions_are_answered_at_leisure(void)
{
    struct pc_memory memory = make_memory(PAGES);
    struct pc_pageserver *server = make_server(&memory);
    int urgent = attach(server, PC_CHANNEL_URGENT);
    pid_t tid;

    CHECK_EQ(pc_pageserver_start(server), 0);
    ask(urgent, 0, 1);
    (void)next_frame(urgent);
    tid = thread_called("pc-serve");
    CHECK(tid > 0);
    if (sched_getscheduler(tid) != SCHED_FIFO)
        SKIP("root", "no right to real-time priority");
    for (int turn = 0; turn < 20000 && sched_getscheduler(tid) == SCHED_FIFO; turn++) {
        ask(urgent, 0, PAGES);
        for (uint32_t i = 0; i < PAGES; i++)
            (void)next_frame(urgent);
    }
    CHECK_EQ(sched_getscheduler(tid), SCHED_OTHER);
    pc_pageserver_free(server);
    close(urgent);
    pc_memory_destroy(&memory);
}

/* A page that cannot be read is told once, however often it is asked for: events wait for somebody to take them. */
static void one_event_for_all_that_is_unreadable(void)
{
    char path[] = "/tmp/postcopy-test-image.XXXXXX";
    struct pc_memory image = {.size_bytes = PAGES * PAGE, .page_bytes = PAGE};
    struct pc_pageserver *server;
    struct pc_event event;
    int urgent, bulk, fatal = 0, others = 0;

    image.fd = CHECK_SYS(mkstemp(path));
    (void)unlink(path);
    CHECK_EQ(ftruncate(image.fd, PAGES * PAGE), 0);
    server = make_server(&image);
    CHECK_EQ(ftruncate(image.fd, 0), 0);
    CHECK_EQ(pc_pageserver_start(server), 0);
    urgent = attach(server, PC_CHANNEL_URGENT);
    bulk = attach(server, PC_CHANNEL_BULK);
    for (int turn = 0; turn < 100; turn++) {
        ask(urgent, 0, PAGES);
        for (uint32_t i = 0; i < PAGES; i++)
            CHECK_EQ(next_frame(urgent).type, PC_FRAME_ERROR);
    }
    CHECK_EQ(read(bulk, &event, 1), 0); /* it has ended */
    CHECK_EQ(pc_pageserver_disconnect(server), 0);
    while (pc_pageserver_next_event(server, &event) == 1) {
        fatal += event.type == PC_EVENT_FATAL;
        others += event.type != PC_EVENT_FATAL;
        CHECK(event.type != PC_EVENT_FATAL || strstr(event.text, "file"));
    }
    CHECK_EQ(fatal, 1);
    CHECK(others <= 2);
    pc_pageserver_free(server);
    close(urgent);
    close(bulk);
    close(image.fd);
}

/* ---- failures on the way ---- */

static void attaching_without_a_thread(void)
{
    struct pc_memory memory = make_memory(PAGES);
    struct pc_pageserver *server = make_server(&memory);
    pthread_attr_t before, hopeless;
    struct pc_event event;
    int pair[2], urgent, kinds[] = {PC_CHANNEL_URGENT, PC_CHANNEL_BULK};
    char byte;

    CHECK_EQ(pc_pageserver_start(server), 0);
    CHECK_EQ(pthread_getattr_default_np(&before), 0);
    CHECK_EQ(pthread_attr_init(&hopeless), 0);
    CHECK_EQ(pthread_attr_setstacksize(&hopeless, (size_t)1 << 47), 0); /* more than there are addresses */
    CHECK_EQ(pthread_setattr_default_np(&hopeless), 0);
    for (int i = 0; i < 2; i++) {
        int result;

        pair_up(pair);
        result = kinds[i] == PC_CHANNEL_URGENT ? pc_pageserver_attach_urgent(server, 0, pair[0], NULL, 0)
                                               : pc_pageserver_attach_bulk(server, 0, pair[0], NULL);
        CHECK(result == -EAGAIN || result == -ENOMEM);
        CHECK_EQ(read(pair[1], &byte, 1), 0); /* closed */
        close(pair[1]);
    }
    CHECK_EQ(pc_pageserver_next_event(server, &event), 0); /* there was no channel that could have ended */
    CHECK_EQ(pthread_setattr_default_np(&before), 0);
    urgent = attach(server, PC_CHANNEL_URGENT); /* the place is free */
    ask(urgent, 3, 1);
    CHECK_EQ(next_frame(urgent).first_page, 3);
    pc_pageserver_free(server);
    close(urgent);
    pc_memory_destroy(&memory);
}

static void *attach_often(void *argument)
{
    struct pc_pageserver *server = argument;

    for (int i = 0; i < 300; i++) {
        int pair[2], result;

        pair_up(pair);
        result = pc_pageserver_attach_urgent(server, (uint32_t)i % 2, pair[0], NULL, 0);
        CHECK(result == 0 || result == -EBUSY);
        close(pair[1]);
        pair_up(pair);
        result = pc_pageserver_attach_bulk(server, (uint32_t)i % 2, pair[0], NULL);
        CHECK(result == 0 || result == -EBUSY);
        close(pair[1]);
    }
    return NULL;
}

static void *disconnect_often(void *argument)
{
    for (int i = 0; i < 200; i++)
        CHECK_EQ(pc_pageserver_disconnect(argument), 0);
    return NULL;
}

static void attaching_against_disconnecting(void)
{
    struct pc_memory memory = make_memory(PAGES);
    struct pc_pageserver *server = make_server(&memory);
    struct pc_event event;
    pthread_t threads[4];
    int urgent;

    CHECK_EQ(pc_pageserver_start(server), 0);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, i % 2 ? attach_often : disconnect_often, server), 0);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
    CHECK_EQ(pc_pageserver_disconnect(server), 0);
    while (pc_pageserver_next_event(server, &event) == 1) {
    }
    urgent = attach(server, PC_CHANNEL_URGENT);
    ask(urgent, 3, 1);
    CHECK_EQ(next_frame(urgent).first_page, 3);
    pc_pageserver_free(server);
    close(urgent);
    pc_memory_destroy(&memory);
}

static void memory_that_is_not_taken_back_at_once(void)
{
    struct pc_memory memory = make_memory(PAGES);
    struct pc_pageserver *server = make_server(&memory);
    uint64_t all = UINT64_MAX, none = 0, discarded = 0;
    uint8_t *locked = (uint8_t *)memory.base + 20 * PAGE;

    CHECK_EQ(pc_pageserver_start(server), 0);
    if (syscall(SYS_mlock, locked, PAGE)) /* sanitizers make mlock(3) do nothing */
        SKIP("root", "no right to lock memory");
    CHECK(pc_pageserver_release(server, 0, 0, PAGES, &all) < 0); /* the kernel keeps what is locked */
    CHECK_EQ(pc_pageserver_released(server, 0, NULL, &discarded), 0);
    CHECK(!(discarded >> 20 & 1));
    CHECK_SYS(syscall(SYS_munlock, locked, PAGE));
    CHECK_EQ(pc_pageserver_release(server, 0, 0, 1, &none), 0); /* any later call */
    CHECK_EQ(pc_pageserver_released(server, 0, NULL, &discarded), 0);
    CHECK_EQ(discarded, UINT64_MAX);
    pc_pageserver_free(server);
    pc_memory_destroy(&memory);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(urgent_answers_beside_the_bulk_path);
    RUN(the_push_follows_the_faults);
    RUN(repetitions_are_answered_at_leisure);
    RUN(one_event_for_all_that_is_unreadable);
    RUN(attaching_without_a_thread);
    RUN(attaching_against_disconnecting);
    RUN(memory_that_is_not_taken_back_at_once);
    return test_end();
}
