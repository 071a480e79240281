/* SPDX-License-Identifier: Apache-2.0
 *
 * The page server alone, the test being the destination: requests, bulk, bandwidth, images, connections.
 */
#include <sys/mman.h>
#include <sys/socket.h>

#include "tests/support/server_rig.h"

static void server_refuses_nonsense(void)
{
    uint8_t noise[4096], header[PC_FRAME_HEADER_BYTES];
    const struct pc_frame bad[] = {
        {.type = PC_FRAME_REQUEST, .first_page = 200, .pages = 1},
        {.type = PC_FRAME_REQUEST, .first_page = 199, .pages = 2},
        {.type = PC_FRAME_REQUEST, .first_page = 1, .pages = UINT32_MAX},
        {.type = PC_FRAME_REQUEST, .first_page = UINT64_MAX - 2, .pages = 1},
        {.type = PC_FRAME_REQUEST, .block = 1, .pages = 1},
        {.type = PC_FRAME_REQUEST, .block = UINT16_MAX, .pages = 1},
        {.type = PC_FRAME_REQUEST, .pages = 0},
        {.type = PC_FRAME_REQUEST, .pages = 1, .payload_bytes = 8},
        {.type = PC_FRAME_PAGES, .pages = 1, .payload_bytes = 4096},
        {.type = PC_FRAME_ZERO, .pages = 1},
        {.type = PC_FRAME_END},
        {.type = PC_FRAME_ERROR, .pages = 1},
    };
    struct pc_frame frame;
    static uint8_t page[PC_FRAME_MAX_PAYLOAD_BYTES];
    struct rig rig;
    int fd, steady;

    open_server_alone(&rig, PC_MEMORY_ANON, 200, 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    steady = client(&rig, PC_CHANNEL_URGENT, 1);
    for (int i = 0; i < 30; i++) {
        size_t bytes = 1 + (size_t)test_below(sizeof(noise));

        for (size_t j = 0; j < bytes; j++)
            noise[j] = (uint8_t)test_random();
        fd = client(&rig, PC_CHANNEL_URGENT, 0);
        (void)send_bytes(fd, noise, bytes);
        if (bytes < PC_FRAME_HEADER_BYTES) {
            CHECK_SYS(shutdown(fd, SHUT_WR));
            expect_server_down(&rig, PC_CHANNEL_URGENT, 0, EPIPE, "inside a frame");
        } else {
            expect_server_down(&rig, PC_CHANNEL_URGENT, 0, EBADMSG, "magic");
        }
        CHECK(speaks(fd, PATIENCE_MS)); /* which is the end of the connection */
        CHECK(recv(fd, noise, 1, 0) <= 0);
        close(fd);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        fd = client(&rig, PC_CHANNEL_URGENT, 0);
        CHECK(request(fd, 0, 0, 1, 7)); /* what came before the nonsense may be answered, but need not be */
        pc_frame_encode(&bad[i], header);
        CHECK(send_bytes(fd, header, sizeof(header)));
        expect_server_down(&rig, PC_CHANNEL_URGENT, 0, EBADMSG, "");
        close(fd);
    }
    for (size_t cut = 0; cut < PC_FRAME_HEADER_BYTES; cut += 13) {
        pc_frame_encode(&(struct pc_frame){.type = PC_FRAME_REQUEST, .pages = 1}, header);
        fd = client(&rig, PC_CHANNEL_URGENT, 0);
        CHECK(send_bytes(fd, header, cut));
        CHECK_SYS(shutdown(fd, SHUT_WR));
        expect_server_down(&rig, PC_CHANNEL_URGENT, 0, cut ? EPIPE : 0, cut ? "inside a frame" : "closed");
        close(fd);
    }
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK(send_bytes(fd, header, 1)); /* nothing is to be said there */
    do {
        CHECK(receive_frame(fd, &frame));
        CHECK(receive_bytes(fd, page, frame.payload_bytes));
    } while (frame.type != PC_FRAME_END);
    expect_server_down(&rig, PC_CHANNEL_BULK, 0, EBADMSG, "spoke");
    close(fd);
    /* One bad client is nobody else's trouble. */
    CHECK(request(steady, 0, 0, 1, 9));
    expect_answer(steady, rig.page_bytes, &frame, page);
    CHECK_EQ(frame.request_id, 9);
    CHECK_EQ(frame.flags, PC_FRAME_DEMAND);
    close(steady);
    EXPECT_NO_EVENT(&rig.from_server, PC_EVENT_FATAL);
    close_server_alone(&rig);
}

/* A request of which the source gets a part is no request. */
static void requests_cut_everywhere(void)
{
    uint8_t bytes[PC_FRAME_HEADER_BYTES], *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    struct pc_frame asks = {.type = PC_FRAME_REQUEST, .pages = 1}, answer;
    struct rig rig;

    CHECK(content != NULL);
    open_server_alone(&rig, PC_MEMORY_ANON, 10, 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    pc_frame_encode(&asks, bytes);
    for (size_t cut = 0; cut <= sizeof(bytes); cut++) {
        int fd = client(&rig, PC_CHANNEL_URGENT, 0);

        CHECK(send_bytes(fd, bytes, cut));
        if (cut == sizeof(bytes))
            expect_answer(fd, rig.page_bytes, &answer, content);
        close(fd);
        expect_server_down(&rig, PC_CHANNEL_URGENT, 0, cut && cut < sizeof(bytes) ? EPIPE : 0, "");
        CHECK_EQ(server_stats(&rig).demand_pages, cut == sizeof(bytes));
    }
    free(content);
    close_server_alone(&rig);
}

struct pipelined {
    int fd;
    uint32_t count;
    uint64_t pages, random;
    uint64_t *asked;
};

static uint64_t pipelined_page(const struct pipelined *job, uint32_t id)
{
    return mix(job->random + id) % job->pages;
}

static void *send_pipelined(void *argument)
{
    struct pipelined *job = argument;
    uint8_t *frames = malloc((size_t)job->count * PC_FRAME_HEADER_BYTES);

    CHECK(frames != NULL);
    for (uint32_t id = 0; id < job->count; id++)
        pc_frame_encode(&(struct pc_frame){.type = PC_FRAME_REQUEST,
                                           .first_page = pipelined_page(job, id),
                                           .pages = 1,
                                           .request_id = id},
                        frames + (size_t)id * PC_FRAME_HEADER_BYTES);
    CHECK(send_bytes(job->fd, frames, (size_t)job->count * PC_FRAME_HEADER_BYTES));
    free(frames);
    return NULL;
}

static void ten_thousand_requests_at_once(void)
{
    struct pipelined job = {.count = 10000, .pages = 1000, .random = test_random()};
    uint64_t words[MAX_PAGES / 64] = {0}, distinct, answered = 0;
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES), *seen = calloc(job.count, 1);
    struct pc_frame frame;
    pthread_t thread;
    struct rig rig;

    CHECK(content && seen);
    open_server_alone(&rig, PC_MEMORY_ANON, job.pages, 0);
    job.fd = client(&rig, PC_CHANNEL_URGENT, 0);
    CHECK_EQ(pthread_create(&thread, NULL, send_pipelined, &job), 0);
    CHECK(!speaks(job.fd, SERVED_MS)); /* nothing before the start: the machine may still change its memory */
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    while (answered < job.count) {
        expect_answer(job.fd, rig.page_bytes, &frame, content);
        CHECK_EQ(frame.pages, 1);
        CHECK(frame.request_id < job.count && !seen[frame.request_id]);
        CHECK_EQ(frame.first_page, pipelined_page(&job, frame.request_id));
        seen[frame.request_id] = 1;
        pc_bitmap_set_range(words, frame.first_page, 1);
        answered++;
    }
    CHECK_EQ(pthread_join(thread, NULL), 0);
    distinct = pc_bitmap_count(words, job.pages);
    CHECK_EQ(server_stats(&rig).requests, job.count);
    CHECK_EQ(server_stats(&rig).repeated_requests, job.count - distinct);
    CHECK_EQ(server_stats(&rig).sent_pages, distinct);
    CHECK(!speaks(job.fd, 0));

    /* All pages with one request, in as many frames as it takes. */
    CHECK(request(job.fd, 0, 0, (uint32_t)job.pages, 77));
    for (uint64_t page = 0; page < job.pages; page += frame.pages) {
        expect_answer(job.fd, rig.page_bytes, &frame, content);
        CHECK_EQ(frame.first_page, page);
        CHECK_EQ(frame.request_id, 77);
    }
    close(job.fd);
    expect_server_down(&rig, PC_CHANNEL_URGENT, 0, 0, "closed");
    free(content);
    free(seen);
    close_server_alone(&rig);
}

/* An image file: the last page is a part of one, and the file becomes shorter while it is served. */
static void image_file(uint64_t page_bytes)
{
    uint64_t pages = 40, size = (pages - 1) * page_bytes + 100;
    struct pc_memory image = {.size_bytes = size, .page_bytes = page_bytes, .fd = temporary_file(0)};
    uint8_t *content = calloc(1, PC_FRAME_MAX_PAYLOAD_BYTES);
    struct pc_frame frame;
    struct pc_event event;
    struct rig rig = {.page_bytes = page_bytes};
    int fd;

    CHECK(content != NULL);
    for (uint64_t page = 0; page < pages; page++) {
        make_page(0, page, page_bytes, content);
        CHECK_EQ(pwrite(image.fd, content, page + 1 < pages ? page_bytes : 100, (off_t)(page * page_bytes)),
                 page + 1 < pages ? (ssize_t)page_bytes : 100);
    }
    CHECK_EQ(pc_pageserver_new(0, &rig.server), 0);
    rig.from_server =
        (struct inbox){.owner = rig.server, .fd = pc_pageserver_event_fd(rig.server), .next = next_server_event};
    CHECK_EQ(pc_pageserver_add_block(rig.server, &image, page_bytes - 1), -EINVAL);
    CHECK_EQ(pc_pageserver_add_block(rig.server, &image, page_bytes), 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK_EQ(pc_pageserver_add_block(rig.server, &image, page_bytes), -EBUSY);
    fd = client(&rig, PC_CHANNEL_URGENT, 0);
    for (uint64_t page = 0; page + 1 < pages; page++) {
        CHECK(request(fd, 0, page, 1, (uint32_t)page));
        expect_answer(fd, page_bytes, &frame, content);
        CHECK_EQ(frame.first_page, page);
    }
    CHECK(request(fd, 0, pages - 1, 1, 0));
    CHECK(receive_frame(fd, &frame));
    if (content_of(0, pages - 1) == DATA) {
        CHECK_EQ(frame.payload_bytes, page_bytes);
        CHECK(receive_bytes(fd, content, page_bytes));
        CHECK(is_page(0, pages - 1, 96, content)); /* 100 bytes are 12 words and a half */
        CHECK(pc_is_zero(content + 100, page_bytes - 100));
    } else {
        CHECK_EQ(frame.type, PC_FRAME_ZERO);
    }
    CHECK(request(fd, 0, 0, (uint32_t)pages, 5)); /* more than the staging buffer holds when pages are large */
    for (uint64_t page = 0; page < pages; page++) {
        CHECK(receive_frame(fd, &frame));
        CHECK_EQ(frame.first_page, page);
        if (frame.payload_bytes)
            CHECK(receive_bytes(fd, content, frame.payload_bytes));
        CHECK(!frame.payload_bytes || page + 1 == pages || is_page(0, page, page_bytes, content));
    }

    CHECK_SYS(ftruncate(image.fd, (off_t)(20 * page_bytes + 1)));
    CHECK(request(fd, 0, 20, 1, 123));
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.type, PC_FRAME_ERROR);
    CHECK_EQ(frame.first_page, 20);
    CHECK_EQ(frame.request_id, 123);
    CHECK(receive_bytes(fd, content, frame.payload_bytes));
    content[frame.payload_bytes] = 0;
    CHECK(strstr((char *)content, "shorter") != NULL);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_FATAL, PC_CHANNEL_URGENT, 0, &event);
    CHECK_EQ(event.error, EIO);
    CHECK(strstr(event.text, "shorter") != NULL);
    CHECK(request(fd, 0, 0, 1, 124)); /* what is there still comes */
    expect_answer(fd, page_bytes, &frame, content);
    close(fd);
    expect_server_down(&rig, PC_CHANNEL_URGENT, 0, 0, "closed");
    pc_pageserver_free(rig.server);

    /* The same by push: no page of a file that is not whole any more is invented. */
    CHECK_EQ(pc_pageserver_new(0, &rig.server), 0);
    rig.from_server =
        (struct inbox){.owner = rig.server, .fd = pc_pageserver_event_fd(rig.server), .next = next_server_event};
    CHECK_EQ(pc_pageserver_add_block(rig.server, &image, page_bytes), 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    while (receive_frame(fd, &frame)) {
        CHECK(frame.type != PC_FRAME_END);
        CHECK(frame.first_page + frame.pages <= 20);
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        for (uint64_t i = 0; i < frame.pages && frame.payload_bytes; i++)
            CHECK(is_page(0, frame.first_page + i, page_bytes, content + i * page_bytes));
    }
    EXPECT_EVENT(&rig.from_server, PC_EVENT_FATAL, PC_CHANNEL_BULK, 0, &event);
    CHECK(strstr(event.text, "shorter") != NULL);
    close(fd);
    pc_pageserver_free(rig.server);
    close(image.fd);
    free(content);
}

/* Memory of another process, a child: the fork has made it a copy of `memory`, the second half of which it has below the first. One
 * page of it is missing there, and the userfaultfd that guards it is ours too. */
struct other {
    pid_t pid;
    int pidfd, uffd;
    struct pc_remote *remote;
    uint64_t base, size_bytes;
};

static uint64_t other_address(const struct other *other, uint64_t offset)
{
    return other->base + (offset + other->size_bytes / 2) % other->size_bytes;
}

static void start_other(struct other *other, const struct pc_memory *memory, uint64_t missing)
{
    uint64_t half = memory->size_bytes / 2;
    uint8_t *there = mmap(NULL, memory->size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct pc_remote_extent extents[2];
    int pair[2], uffd = -1;

    CHECK(there != MAP_FAILED);
    CHECK_SYS(madvise(there, memory->size_bytes, MADV_NOHUGEPAGE));
    for (uint64_t page = 0; page < memory->size_bytes / memory->page_bytes; page++)
        if (content_of(0, page) == DATA && page != missing)
            make_page(0, page, memory->page_bytes, there + (page * memory->page_bytes + half) % memory->size_bytes);
    other->base = (uintptr_t)there;
    other->size_bytes = memory->size_bytes;
    CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    other->pid = fork();
    CHECK(other->pid >= 0);
    if (!other->pid) {
        struct pc_uffd_api api;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        uffd = pc_uffd_open(PC_UFFD_ANY, 0, &api);
        if (uffd >= 0 && pc_uffd_register(uffd, other_address(other, missing * memory->page_bytes), memory->page_bytes,
                                          PC_UFFD_MISSING, NULL))
            uffd = -1;
        (void)!write(pair[1], &uffd, sizeof(uffd));
        for (;;)
            pause();
    }
    CHECK_EQ(read(pair[0], &uffd, sizeof(uffd)), sizeof(uffd));
    close(pair[0]);
    close(pair[1]);
    munmap(there, memory->size_bytes);
    if (uffd < 0)
        SKIP("uffd", "the other process may not have a userfaultfd");
    other->pidfd = (int)syscall(SYS_pidfd_open, other->pid, 0);
    other->uffd = pc_remote_descriptor(other->pidfd, uffd);
    CHECK(other->pidfd >= 0 && other->uffd >= 0);
    extents[0] = (struct pc_remote_extent){other->base + half, 0, half};
    extents[1] = (struct pc_remote_extent){other->base, half, half};
    if (pc_remote_new(other->pid, other->pidfd, extents, 2, memory->page_bytes, &other->remote, message, sizeof(message)))
        FAIL("%s", message);
}

/* Of another process: read from there, in two pieces; a page that is missing there comes when it does, and others meanwhile; and when
 * the process ends, that is said, and nothing invented. */
static void memory_of_another_process(void)
{
    const uint64_t pages = 200, page_bytes = pc_page_bytes();
    struct pc_memory memory = {.size_bytes = pages * page_bytes, .page_bytes = page_bytes, .kind = PC_MEMORY_ANON, .fd = -1};
    uint8_t *content = calloc(1, PC_FRAME_MAX_PAYLOAD_BYTES);
    uint64_t missing = 0, pushed = 0, words[4] = {1};
    struct rig rig = {.page_bytes = page_bytes};
    struct pc_frame frame;
    struct pc_event event;
    struct other other;
    int fd, beside;

    CHECK(content != NULL);
    for (uint64_t page = 10; page < pages; page++)
        missing = content_of(0, page) == DATA ? page : missing;
    start_other(&other, &memory, missing);
    memory.remote = other.remote;
    CHECK_EQ(pc_pageserver_new(0, &rig.server), 0);
    rig.from_server =
        (struct inbox){.owner = rig.server, .fd = pc_pageserver_event_fd(rig.server), .next = next_server_event};
    CHECK_EQ(pc_pageserver_add_block(rig.server, &memory, page_bytes), 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, words), -ENOTSUP);
    fd = client(&rig, PC_CHANNEL_URGENT, 0);
    beside = client(&rig, PC_CHANNEL_URGENT, 1);
    CHECK(request(fd, 0, missing, 1, 99));
    for (uint64_t page = 0; page < pages; page++) {
        if (page == missing)
            continue;
        CHECK(request(beside, 0, page, 1, (uint32_t)page));
        expect_answer(beside, page_bytes, &frame, content);
        CHECK_EQ(frame.first_page, page);
    }
    CHECK(!speaks(fd, 0));
    make_page(0, missing, page_bytes, content);
    CHECK_EQ(pc_uffd_copy(other.uffd, other_address(&other, missing * page_bytes), content, page_bytes, 0, NULL), 0);
    expect_answer(fd, page_bytes, &frame, content);
    CHECK_EQ(frame.request_id, 99);
    CHECK(request(fd, 0, 0, (uint32_t)pages, 5)); /* across the border of the pieces */
    for (uint64_t page = 0; page < pages; page++) {
        expect_answer(fd, page_bytes, &frame, content);
        CHECK_EQ(frame.first_page, page);
    }
    CHECK_SYS(kill(other.pid, SIGKILL));
    CHECK_EQ(waitpid(other.pid, NULL, 0), other.pid);
    CHECK(request(fd, 0, 7, 1, 123));
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.type, PC_FRAME_ERROR);
    CHECK(receive_bytes(fd, content, frame.payload_bytes));
    content[frame.payload_bytes] = 0;
    CHECK(strstr((char *)content, "it has ended") != NULL);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_FATAL, PC_CHANNEL_URGENT, 0, &event);
    CHECK_EQ(event.error, ESRCH);
    close(fd);
    close(beside);
    pc_pageserver_free(rig.server);
    pc_remote_free(other.remote);

    /* By push, while it may be written and after. */
    start_other(&other, &memory, missing);
    CHECK_EQ(pc_uffd_unregister(other.uffd, other_address(&other, missing * page_bytes), page_bytes), 0); /* zeros, then */
    memory.remote = other.remote;
    CHECK_EQ(pc_pageserver_new(0, &rig.server), 0);
    rig.from_server =
        (struct inbox){.owner = rig.server, .fd = pc_pageserver_event_fd(rig.server), .next = next_server_event};
    CHECK_EQ(pc_pageserver_add_block(rig.server, &memory, page_bytes), 0);
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK_EQ(pc_pageserver_push(rig.server), 0);
    while (receive_frame(fd, &frame) && frame.type != PC_FRAME_END) {
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        for (uint64_t i = 0; i < frame.pages && frame.payload_bytes; i++)
            CHECK(is_page(0, frame.first_page + i, page_bytes, content + i * page_bytes));
        for (uint64_t i = 0; i < frame.pages && !frame.payload_bytes; i++)
            CHECK(frame.first_page + i == missing || content_of(0, frame.first_page + i) != DATA);
        pushed += frame.pages;
    }
    CHECK_EQ(pushed, pages);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, &event);
    CHECK_SYS(kill(other.pid, SIGKILL));
    CHECK_EQ(waitpid(other.pid, NULL, 0), other.pid);
    words[0] = 6;
    CHECK_EQ(pc_pageserver_set_stale(rig.server, 0, words), 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_FATAL, PC_CHANNEL_BULK, 0, &event);
    CHECK(strstr(event.text, "it has ended") != NULL);
    close(fd);
    pc_pageserver_free(rig.server);
    pc_remote_free(other.remote);
    free(content);
}

static void image_of_small_pages(void)
{
    image_file(4096);
}

static void image_of_larger_pages(void)
{
    image_file(256 * 1024);
}

/* Reads and forgets until the end; counts. */
struct drain {
    int fd;
    atomic_ullong bytes;
    pthread_t thread;
};

static void *drain_all(void *argument)
{
    struct drain *drain = argument;
    uint8_t *buffer = malloc(1 << 20);
    ssize_t got;

    CHECK(buffer != NULL);
    while ((got = recv(drain->fd, buffer, 1 << 20, 0)) > 0)
        atomic_fetch_add(&drain->bytes, (unsigned long long)got);
    free(buffer);
    return NULL;
}

static void bandwidth_is_kept(void)
{
    const uint64_t rate = 8000000, slow = 20000, run = 256 * 1024 + 4096;
    uint64_t begin_ns, taken_ns;
    struct drain drain = {0};
    struct timespec while_it_sends = {.tv_nsec = 250000000};
    struct rig rig;

    open_server_alone(&rig, PC_MEMORY_ANON, MAX_PAGES, rate);
    drain.fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK_EQ(pthread_create(&drain.thread, NULL, drain_all, &drain), 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    begin_ns = pc_now_ns();
    (void)nanosleep(&while_it_sends, NULL);
    taken_ns = server_stats(&rig).bytes_sent;
    /* What 20 ms of burst, a run and a half and the time that has gone by allow; and not nothing. */
    CHECK(taken_ns > rate / 100);
    CHECK(taken_ns <= (uint64_t)((double)(pc_now_ns() - begin_ns + 20000000) / 1e9 * (double)rate) + 2 * run);
    EXPECT_NO_EVENT(&rig.from_server, PC_EVENT_BULK_END);

    /* A rate at which the next run is 13 s away, and then none. */
    CHECK_EQ(pc_pageserver_set_bandwidth(rig.server, slow), 0);
    CHECK(!find_event(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, SERVED_MS, NULL));
    begin_ns = pc_now_ns();
    CHECK_EQ(pc_pageserver_set_bandwidth(rig.server, 0), 0);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_BULK_END, PC_CHANNEL_BULK, 0, NULL);
    CHECK(pc_now_ns() - begin_ns < UINT64_C(5000000000) * SLOW);

    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    CHECK_EQ(pthread_join(drain.thread, NULL), 0);
    CHECK_EQ(atomic_load(&drain.bytes), server_stats(&rig).bytes_sent);
    close(drain.fd);
    close_server_alone(&rig);
}

/* Senders that wait (for the start, for bandwidth, for a peer that does not read) come back when the server says so, and the server
 * serves again afterwards. */
static void server_disconnects_and_goes_on(void)
{
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    uint64_t offered = 0;
    struct pc_frame frame;
    struct rig rig;
    int urgent, fd, pair[2];

    CHECK(content != NULL);
    open_server_alone(&rig, PC_MEMORY_ANON, MAX_PAGES, 0);
    urgent = client(&rig, PC_CHANNEL_URGENT, 0);
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK(request(urgent, 0, 0, 1, 1));
    CHECK(!speaks(urgent, SERVED_MS)); /* not started */
    tcp_pair(pair);
    CHECK_EQ(pc_pageserver_attach_urgent(rig.server, 0, pair[1], NULL, 0), -EBUSY);
    CHECK_EQ(recv(pair[0], content, 1, 0), 0); /* it was the server's from then on: closed */
    close(pair[0]);
    tcp_pair(pair);
    CHECK_EQ(pc_pageserver_attach_bulk(rig.server, 0, pair[1], NULL), -EBUSY);
    CHECK_EQ(recv(pair[0], content, 1, 0), 0);
    close(pair[0]);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    close(urgent);
    close(fd);
    CHECK_EQ(server_stats(&rig).sent_pages, 0);
    CHECK_EQ(server_stats(&rig).bytes_sent, 0);

    /* Started, slow, and a client that is deaf. */
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK_EQ(pc_pageserver_set_bandwidth(rig.server, 100000), 0);
    fd = client(&rig, PC_CHANNEL_BULK, 5);
    CHECK(speaks(fd, PATIENCE_MS));
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    close(fd);
    CHECK_EQ(pc_pageserver_set_bandwidth(rig.server, 0), 0);
    urgent = client(&rig, PC_CHANNEL_URGENT, 0);
    for (int i = 0; i < 20; i++)
        CHECK(request(urgent, 0, 0, MAX_PAGES, 1)); /* 60 MiB of answers that nobody reads */
    CHECK(speaks(urgent, PATIENCE_MS));
    (void)nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0); /* twice is not once too often */
    close(urgent);

    urgent = client(&rig, PC_CHANNEL_URGENT, 0);
    for (uint64_t page = 0; page < 100; page++) {
        CHECK(request(urgent, 0, page, 1, (uint32_t)page));
        expect_answer(urgent, rig.page_bytes, &frame, content);
        CHECK_EQ(frame.request_id, page);
    }
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    do {
        CHECK(receive_frame(fd, &frame));
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        offered += frame.pages;
    } while (frame.type != PC_FRAME_END);
    CHECK(offered <= MAX_PAGES);
    CHECK_EQ(server_stats(&rig).sent_pages, MAX_PAGES);
    close(urgent);
    close(fd);
    free(content);
    close_server_alone(&rig);
}

/* Where the push goes on that does not go on at *page, which moves on, within three runs; 0: it does. */
static uint64_t next_leap(int fd, uint8_t *content, uint64_t *page)
{
    uint64_t received = 0;
    struct pc_frame frame;

    while (received < 3 * 64) {
        CHECK(receive_frame(fd, &frame));
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        if (frame.first_page != *page)
            return frame.first_page;
        received += frame.pages;
        *page += frame.pages;
    }
    return 0;
}

/* Requests pull the push after them: what follows a faulted page comes next. What was requested ahead of any fault does not: what follows
 * it will be requested, too. */
static void push_follows_the_faults(void)
{
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    uint64_t page = 0;
    struct pc_frame frame;
    struct rig rig;
    int urgent, fd;

    CHECK(content != NULL);
    open_server_alone(&rig, PC_MEMORY_ANON, MAX_PAGES, 2000000); /* one run of 64 pages in 131 ms */
    urgent = client(&rig, PC_CHANNEL_URGENT, 0);
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK(speaks(fd, PATIENCE_MS));
    CHECK(request(urgent, 0, 500, 1, PC_PAGER_REQUEST_AHEAD));
    expect_answer(urgent, rig.page_bytes, &frame, content);
    CHECK_EQ(next_leap(fd, content, &page), 0);
    CHECK(request(urgent, 0, 700, 1, 1));
    expect_answer(urgent, rig.page_bytes, &frame, content);
    CHECK_EQ(next_leap(fd, content, &page), 701); /* behind the run that was claimed already */
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    close(urgent);
    close(fd);
    free(content);
    close_server_alone(&rig);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN_CASE(requests_cut_everywhere);
    RUN_CASE(server_refuses_nonsense);
    RUN_CASE(ten_thousand_requests_at_once);
    RUN_CASE(image_of_small_pages);
    RUN_CASE(image_of_larger_pages);
    RUN_CASE(memory_of_another_process);
    RUN_CASE(bandwidth_is_kept);
    RUN_CASE(server_disconnects_and_goes_on);
    RUN_CASE(push_follows_the_faults);
    return test_end();
}
