/* SPDX-License-Identifier: Apache-2.0
 *
 * Pager and page server together and apart: what a machine sees of its memory while it comes over a TCP connection that may
 * lose, repeat, reorder, damage and end whatever it carries.
 *
 * Most cases build a *rig*: source memory with content that can be computed from (block, page), a page server on it, a pager
 * with empty memory, connections over 127.0.0.1 between the two, and *touchers*, threads that visit pages of the destination
 * in random order and compare. Where a case needs a source that misbehaves, it plays the source itself on the other end of
 * the pager's socket (a *script*). A toucher that is not served hangs for good; test.h ends such a case by SIGKILL.
 */
#include <linux/futex.h>
#include <setjmp.h>

#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"

/* ---- demand alone ------------------------------------------------------------------------------------------------- */

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

/* Everything after the machine has stopped needing it: memory that is disarmed reads what is there and zeros elsewhere,
 * without anybody having touched the zeros before. */
static void disarmed_zeros(int kind)
{
    const uint64_t pages[] = {scaled(kind, 256)};
    struct rig rig;

    open_pager(&rig, kind, 1, pages);
    open_server(&rig, 0);
    arm_all(&rig, 0);
    connect_bulk(&rig, 0, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    CHECK_EQ(resident_bytes(&rig), count_content(&rig, DATA) * rig.page_bytes);
    check_content(&rig);
    close_rig(&rig);
}
OF_EACH_KIND(disarmed_zeros)

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

/* ---- zero pages --------------------------------------------------------------------------------------------------- */

static void known_zero_needs_nobody(int kind)
{
    const uint64_t pages[] = {scaled(kind, 200)};
    uint64_t zero[MAX_PAGES / 64] = {0}, half = pages[0] / 2;
    struct rig rig;
    int fd;

    open_pager(&rig, kind, 1, pages);
    pc_bitmap_set_range(zero, 0, half);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 1, zero), -EINVAL);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, zero), 0); /* told twice is not two pages */
    CHECK_EQ(pager_stats(&rig).zero_pages, half);
    CHECK_EQ(pager_stats(&rig).resident_pages, half);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    for (uint64_t page = 0; page < half; page++) {
        uint8_t *at = dest_page(&rig, 0, page);

        CHECK(page % 2 || pc_is_zero(at, rig.page_bytes));
        at[page] = 1;
        CHECK_EQ(at[page], 1);
    }
    CHECK(!speaks(fd, SERVED_MS));
    CHECK_EQ(pager_stats(&rig).requests, 0);
    CHECK(pager_stats(&rig).faults >= half);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_COMPLETE);
    /* The last half by a frame, while somebody waits for a page of it. */
    {
        struct pc_frame zeros = {.type = PC_FRAME_ZERO, .first_page = half, .pages = (uint32_t)(pages[0] - half)}, got;
        uint64_t page = pages[0] - 1;

        while (page > half && content_of(0, page) == DATA)
            page--;
        if (content_of(0, page) != DATA) {
            struct toucher toucher;

            touch_one(&toucher, &rig, 0, page);
            CHECK(receive_frame(fd, &got));
            CHECK_EQ(got.first_page, page);
            CHECK(send_frame(fd, zeros, NULL, 0));
            join_toucher(&toucher);
        } else {
            CHECK(send_frame(fd, zeros, NULL, 0));
        }
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    for (uint64_t page = half; page < pages[0]; page++)
        CHECK(pc_is_zero(dest_page(&rig, 0, page), rig.page_bytes));
    close(fd);
    close_rig(&rig);
}
OF_EACH_KIND(known_zero_needs_nobody)

/* ---- a source that cannot be trusted ------------------------------------------------------------------------------ */

enum damage {
    BAD_MAGIC,
    BAD_HEADER_CRC,
    BAD_TYPE,
    BAD_FLAGS,
    BAD_PAYLOAD_CRC,
    NO_SUCH_BLOCK,
    NO_SUCH_PAGES,
    TOO_MANY_PAGES,
    WRONG_SIZE,
    TOO_LONG,
    A_REQUEST,
    AN_END, /* urgent only: on a bulk channel it belongs there */
    CUT_IN_HEADER,
    CUT_AFTER_HEADER,
    CUT_IN_PAYLOAD,
    CLOSED,
    DAMAGES
};

static const struct {
    int error;
    const char *text;
} damages[DAMAGES] = {
    [BAD_MAGIC] = {EBADMSG, "magic"},
    [BAD_HEADER_CRC] = {EBADMSG, "header checksum"},
    [BAD_TYPE] = {EBADMSG, "unknown type"},
    [BAD_FLAGS] = {EBADMSG, "unknown flags"},
    [BAD_PAYLOAD_CRC] = {EBADMSG, "CRC32C"},
    [NO_SUCH_BLOCK] = {EBADMSG, "names RAM block 1,"},
    [NO_SUCH_PAGES] = {EBADMSG, "names pages"},
    [TOO_MANY_PAGES] = {EBADMSG, "names pages"},
    [WRONG_SIZE] = {EBADMSG, "carries"},
    [TOO_LONG] = {EBADMSG, "too long"},
    [A_REQUEST] = {EBADMSG, "type 1 does not belong here"},
    [AN_END] = {EBADMSG, "type 4 does not belong here"},
    [CUT_IN_HEADER] = {EPIPE, "inside a frame"},
    [CUT_AFTER_HEADER] = {EPIPE, "inside a frame"},
    [CUT_IN_PAYLOAD] = {EPIPE, "inside a frame"},
    [CLOSED] = {0, "closed"},
};

/* A frame with the right content of `page`, but for one thing. */
static void send_damaged(const struct rig *rig, int fd, enum damage damage, uint64_t page)
{
    uint8_t *bytes = malloc(PC_FRAME_HEADER_BYTES + rig->page_bytes), *content = bytes + PC_FRAME_HEADER_BYTES;
    size_t length = PC_FRAME_HEADER_BYTES + rig->page_bytes;
    struct pc_frame frame = {.type = PC_FRAME_PAGES,
                             .flags = PC_FRAME_DEMAND,
                             .first_page = page,
                             .pages = 1,
                             .payload_bytes = (uint32_t)rig->page_bytes};
    uint64_t pages = rig->pages[0];

    CHECK(bytes != NULL);
    make_page(0, page, rig->page_bytes, content);
    frame.payload_crc = pc_crc32c(0, content, rig->page_bytes);
    if (damage == BAD_TYPE)
        frame.type = 6;
    else if (damage == BAD_FLAGS)
        frame.flags = 0x82;
    else if (damage == BAD_PAYLOAD_CRC)
        content[test_below(rig->page_bytes)] ^= (uint8_t)(1u << test_below(8));
    else if (damage == NO_SUCH_BLOCK)
        frame.block = 1;
    else if (damage == NO_SUCH_PAGES)
        frame.first_page = pages + test_below(UINT64_C(1) << 62);
    else if (damage == TOO_MANY_PAGES)
        frame = (struct pc_frame){.type = PC_FRAME_ZERO, .first_page = page, .pages = UINT32_MAX};
    else if (damage == WRONG_SIZE)
        frame.payload_bytes /= 2;
    else if (damage == TOO_LONG)
        frame.payload_bytes = PC_FRAME_MAX_PAYLOAD_BYTES + 1;
    else if (damage == A_REQUEST)
        frame = (struct pc_frame){.type = PC_FRAME_REQUEST, .first_page = page, .pages = 1};
    else if (damage == AN_END)
        frame = (struct pc_frame){.type = PC_FRAME_END};
    pc_frame_encode(&frame, bytes);
    if (damage == BAD_MAGIC)
        bytes[0] ^= 0x20;
    else if (damage == BAD_HEADER_CRC)
        bytes[8] ^= 1; /* another page of the same block: only the checksum can tell */
    else if (damage == CUT_IN_HEADER)
        length = 1 + test_below(PC_FRAME_HEADER_BYTES - 1);
    else if (damage == CUT_AFTER_HEADER)
        length = PC_FRAME_HEADER_BYTES;
    else if (damage == CUT_IN_PAYLOAD)
        length = PC_FRAME_HEADER_BYTES + 1 + test_below(rig->page_bytes - 1);
    else if (damage == CLOSED)
        length = 0;
    (void)send_bytes(fd, bytes, length); /* the pager may have had enough before the end */
    if (damage >= CUT_IN_HEADER)
        CHECK_SYS(shutdown(fd, SHUT_WR));
    free(bytes);
}

static void expect_requests(int fd, uint64_t one, uint64_t other)
{
    struct pc_frame first, second;

    CHECK(receive_frame(fd, &first) && receive_frame(fd, &second));
    CHECK_EQ(first.type, PC_FRAME_REQUEST);
    CHECK_EQ(first.pages, 1);
    CHECK((first.first_page == one && second.first_page == other) ||
          (first.first_page == other && second.first_page == one));
}

static void expect_damage(struct rig *rig, enum damage damage, int kind, int channel)
{
    struct pc_event event;

    if (!find_event(&rig->from_pager, PC_EVENT_CHANNEL_DOWN, kind, channel, PATIENCE_MS, &event))
        FAIL("damage %d did not end the channel", damage);
    if (event.error != damages[damage].error || !strstr(event.text, damages[damage].text))
        FAIL("damage %d gave error %d, %s", damage, event.error, event.text);
}

static uint64_t other_data_page(const struct rig *rig)
{
    for (uint64_t page = rig->pages[0] - 1; page; page--)
        if (content_of(0, page) == DATA)
            return page;
    return 2;
}

static void damage_is_never_seen(int kind)
{
    const uint64_t pages[] = {scaled(kind, 256)};
    struct toucher touchers[2];
    struct pc_event event;
    uint64_t other, refused = 0;
    struct rig rig;
    int fd, bulk_fd;

    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    other = other_data_page(&rig);
    touch_one(&touchers[0], &rig, 0, 0);
    touch_one(&touchers[1], &rig, 0, other);
    wait_pending(&rig, 2);
    CHECK_EQ(pager_stats(&rig).requests, 0);
    for (enum damage damage = 0; damage < DAMAGES; damage++) {
        fd = script_urgent(&rig, 0);
        expect_requests(fd, 0, other);
        send_damaged(&rig, fd, damage, 0);
        expect_damage(&rig, damage, PC_CHANNEL_URGENT, 0);
        refused += damages[damage].error == EBADMSG;
        CHECK_EQ(pager_stats(&rig).frames_refused, refused);
        close(fd);
    }
    fd = script_urgent(&rig, 0);
    expect_requests(fd, 0, other);
    for (enum damage damage = 0; damage < DAMAGES; damage++) {
        if (damage == AN_END)
            continue;
        bulk_fd = script_bulk(&rig, 3);
        send_damaged(&rig, bulk_fd, damage, 0);
        expect_damage(&rig, damage, PC_CHANNEL_BULK, 3);
        refused += damages[damage].error == EBADMSG;
        CHECK_EQ(pager_stats(&rig).frames_refused, refused);
        close(bulk_fd);
    }
    CHECK_EQ(atomic_load(&touchers[0].done) + atomic_load(&touchers[1].done), 0);
    CHECK_EQ(resident_bytes(&rig), 0);
    CHECK_EQ(pager_stats(&rig).resident_pages, 0);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);

    /* What the source cannot serve is said, and is not the channel's end. */
    CHECK(send_frame(fd,
                     (struct pc_frame){.type = PC_FRAME_ERROR, .flags = PC_FRAME_DEMAND, .first_page = other, .pages = 1},
                     "the disk is on fire", 19));
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, PC_CHANNEL_URGENT, 0, &event);
    CHECK_EQ(event.error, EIO);
    CHECK(strstr(event.text, "the disk is on fire") != NULL);
    CHECK(!speaks(fd, SERVED_MS));
    CHECK_EQ(atomic_load(&touchers[1].done), 0);
    serve_page(&rig, fd, 0, 0);
    serve_page(&rig, fd, 0, other);
    join_toucher(&touchers[0]);
    join_toucher(&touchers[1]);
    CHECK_EQ(pager_stats(&rig).frames_refused, refused);
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}
OF_EACH_KIND(damage_is_never_seen)

/* Frames that arrive a byte at a time, and many in one piece. */
static void frames_cut_by_tcp(void)
{
    const uint64_t pages[] = {64};
    struct toucher toucher;
    struct pc_frame frame, all = {.type = PC_FRAME_PAGES, .pages = 1};
    uint8_t page[65536], wire[PC_FRAME_HEADER_BYTES];
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK(rig.page_bytes <= sizeof(page));
    arm_all(&rig, 0);
    touch_one(&toucher, &rig, 0, 0);
    fd = script_urgent(&rig, 0);
    CHECK(receive_frame(fd, &frame));
    make_page(0, 0, rig.page_bytes, page);
    frame.type = PC_FRAME_PAGES;
    frame.flags = PC_FRAME_DEMAND;
    frame.payload_bytes = (uint32_t)rig.page_bytes;
    frame.payload_crc = pc_crc32c(0, page, rig.page_bytes);
    pc_frame_encode(&frame, wire);
    for (size_t i = 0; i < sizeof(wire); i++)
        CHECK(send_bytes(fd, wire + i, 1));
    for (size_t i = 0; i < rig.page_bytes; i += 97)
        CHECK(send_bytes(fd, page + i, i + 97 < rig.page_bytes ? 97 : rig.page_bytes - i));
    join_toucher(&toucher);
    for (uint64_t i = 1; i < pages[0]; i++) {
        make_page(0, i, rig.page_bytes, page);
        all.first_page = i;
        CHECK(send_frame(fd, all, page, rig.page_bytes));
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    check_content(&rig);
    close(fd);
    close_rig(&rig);
}

/* ---- connections that break --------------------------------------------------------------------------------------- */

static void reconnect(struct rig *rig, int channel, int *knife)
{
    close(*knife);
    if (channel < 2)
        connect_urgent(rig, (uint32_t)channel, knife);
    else
        connect_bulk(rig, 0, knife);
}

static void cut_again_and_again(int kind, bool with_bulk)
{
    const uint64_t pages[] = {scaled(kind, 1000), scaled(kind, 400)};
    int knives[3], channels = with_bulk ? 3 : 2, cuts = 0;
    struct visit visits[2 * MAX_PAGES];
    struct toucher touchers[4];
    struct rig rig;
    size_t count;

    open_pager(&rig, kind, 2, pages);
    open_server(&rig, with_bulk ? 2000000 : 0);
    /* On a leash, so that a slow cutter (a sanitizer, a busy machine) still finds something to cut. */
    atomic_store(&rig.leashed, true);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(add_shard(&rig, 0), i);
        arm(&rig, i, i, 0, pages[i]);
        connect_urgent(&rig, i, &knives[i]);
    }
    if (with_bulk)
        connect_bulk(&rig, 0, &knives[2]);
    for (int t = 0; t < 4; t++) {
        count = shuffled(&rig, -1, visits);
        start_toucher(&touchers[t], &rig, t, visits, t < 2 ? count : count / 2);
    }
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (;;) {
        uint64_t resident = pager_stats(&rig).resident_pages, until = resident + 1 + test_below(all_pages(&rig) / 40 + 1);
        int channel = (int)test_below((uint64_t)channels), kind_of = channel < 2 ? PC_CHANNEL_URGENT : PC_CHANNEL_BULK;

        if (until > all_pages(&rig))
            break;
        while (pager_stats(&rig).resident_pages < until) {
            if (atomic_load(&rig.allowance) <= 0)
                atomic_fetch_add(&rig.allowance, 1);
            (void)sched_yield();
        }
        cuts++;
        if (test_below(4)) {
            CHECK_SYS(shutdown(knives[channel], SHUT_RDWR));
            EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, kind_of, channel % 2, NULL);
            EXPECT_EVENT(&rig.from_server, PC_EVENT_CHANNEL_DOWN, kind_of, channel % 2, NULL);
            reconnect(&rig, channel, &knives[channel]);
        } else {
            if (test_below(2))
                CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
            CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
            CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
            while (find_event(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
            }
            while (find_event(&rig.from_server, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
            }
            for (int i = 0; i < channels; i++)
                reconnect(&rig, i, &knives[i]);
        }
    }
    atomic_store(&rig.leashed, false);
    for (int t = 0; t < 4; t++)
        join_toucher(&touchers[t]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    EXPECT_NO_EVENT(&rig.from_server, PC_EVENT_FATAL);
    CHECK(cuts > 3);
    CHECK_EQ(pager_stats(&rig).frames_refused, 0);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    check_content(&rig);
    for (int i = 0; i < channels; i++)
        close(knives[i]);
    close_rig(&rig);
}

static void urgent_cuts(int kind)
{
    cut_again_and_again(kind, false);
}
OF_EACH_KIND(urgent_cuts)

static void cuts_with_bulk(int kind)
{
    cut_again_and_again(kind, true);
}
OF_EACH_KIND(cuts_with_bulk)

/* Runs that were in flight when a connection broke are offered again, since the source hears what has arrived: nobody touches
 * anything here, nothing is asked for, and everything comes. */
static void push_again_what_was_lost(int kind)
{
    const uint64_t pages[] = {scaled(kind, 1000), scaled(kind, 400)};
    uint64_t *received[2];
    int knives[3], cuts = 0;
    struct rig rig;

    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 20000000);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(add_shard(&rig, 0), i);
        arm(&rig, i, i, 0, pages[i]);
        connect_urgent(&rig, i, &knives[i]);
        received[i] = calloc(pc_bitmap_words(pages[i]), sizeof(uint64_t));
        CHECK(received[i] != NULL);
    }
    connect_bulk(&rig, 0, &knives[2]);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK_EQ(pc_pageserver_set_received(rig.server, 0, received[0]), -EBUSY);
    while (cuts < 5) {
        uint64_t resident = pager_stats(&rig).resident_pages, until = resident + 1 + test_below(all_pages(&rig) / 20 + 1);

        if (until >= all_pages(&rig))
            break;
        while (pager_stats(&rig).resident_pages < until)
            (void)sched_yield();
        cuts++;
        CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
        CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
        while (find_event(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
        }
        while (find_event(&rig.from_server, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
        }
        for (uint32_t i = 0; i < 2; i++) {
            CHECK_EQ(pc_pager_received(rig.pager, i, received[i]), 0);
            CHECK_EQ(pc_pageserver_set_received(rig.server, i, received[i]), 0);
        }
        CHECK_EQ(pc_pageserver_set_received(rig.server, 2, received[0]), -EINVAL);
        for (int i = 0; i < 3; i++)
            reconnect(&rig, i, &knives[i]);
    }
    CHECK(cuts > 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK_EQ(pager_stats(&rig).requests, 0);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    check_content(&rig);
    for (int i = 0; i < 3; i++)
        close(knives[i]);
    for (int i = 0; i < 2; i++)
        free(received[i]);
    close_rig(&rig);
}
OF_EACH_KIND(push_again_what_was_lost)

/* The next page with content, for a test that needs a missing one again and again. */
static uint64_t next_data_page(const struct rig *rig, uint64_t *page)
{
    do
        ++*page;
    while (*page < rig->pages[0] && content_of(0, *page) != DATA);
    CHECK(*page < rig->pages[0]);
    return *page;
}

/* A data connection that ends after `cut` bytes of a frame: nothing of the frame is seen, what was asked for is asked for again,
 * and a page that came whole is never asked for again. */
#define CUT_BYTES (PC_FRAME_HEADER_BYTES + pc_page_bytes())

static void answers_cut_everywhere(void)
{
    const uint64_t pages[] = {12000};
    uint8_t *frame = malloc(CUT_BYTES);
    uint64_t page = 0;
    struct rig rig;

    CHECK(frame != NULL);
    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK_EQ(add_shard(&rig, 0), 0);
    arm(&rig, 0, 0, 0, pages[0]);
    for (uint64_t cut = 0; cut <= CUT_BYTES; cut++) {
        struct pc_frame header = {.type = PC_FRAME_PAGES, .flags = PC_FRAME_DEMAND, .pages = 1}, asked;
        int fd = script_urgent(&rig, 0);
        struct toucher toucher;
        struct pc_event event;

        page = next_data_page(&rig, &page);
        touch_one(&toucher, &rig, 0, page);
        CHECK(receive_frame(fd, &asked) && asked.first_page == page);
        make_page(0, page, rig.page_bytes, frame + PC_FRAME_HEADER_BYTES);
        header.first_page = page;
        header.request_id = asked.request_id;
        header.payload_bytes = (uint32_t)rig.page_bytes;
        header.payload_crc = pc_crc32c(0, frame + PC_FRAME_HEADER_BYTES, rig.page_bytes);
        pc_frame_encode(&header, frame);
        CHECK(send_bytes(fd, frame, cut));
        close(fd);
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, &event);
        if (cut < CUT_BYTES) {
            CHECK_EQ(atomic_load(&toucher.done), 0);
            if (cut)
                CHECK_EQ(event.error, EPIPE);
            fd = script_urgent(&rig, 0);
            CHECK(receive_frame(fd, &asked) && asked.first_page == page);
            serve_page(&rig, fd, 0, page);
            join_toucher(&toucher);
            close(fd);
            EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
        } else {
            join_toucher(&toucher);
        }
        CHECK_EQ(pager_stats(&rig).duplicate_pages, 0);
    }
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK_EQ(pager_stats(&rig).frames_refused, 0);
    free(frame);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    pc_memory_destroy(&rig.dest[0]);
}

static void pushes_cut_everywhere(void)
{
    const uint64_t pages[] = {12000};
    uint8_t *frame = malloc(CUT_BYTES);
    uint64_t page = 0, whole = 0;
    struct rig rig;

    CHECK(frame != NULL);
    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    CHECK_EQ(add_shard(&rig, 0), 0);
    arm(&rig, 0, 0, 0, pages[0]);
    for (uint64_t cut = 0; cut <= CUT_BYTES; cut++) {
        struct pc_frame header = {.type = PC_FRAME_PAGES, .pages = 1};
        int fd = script_bulk(&rig, 0);
        struct pc_event event;

        page = next_data_page(&rig, &page);
        make_page(0, page, rig.page_bytes, frame + PC_FRAME_HEADER_BYTES);
        header.first_page = page;
        header.payload_bytes = (uint32_t)rig.page_bytes;
        header.payload_crc = pc_crc32c(0, frame + PC_FRAME_HEADER_BYTES, rig.page_bytes);
        pc_frame_encode(&header, frame);
        CHECK(send_bytes(fd, frame, cut));
        close(fd);
        EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_BULK, 0, &event);
        CHECK_EQ(event.error, cut && cut < CUT_BYTES ? EPIPE : 0);
        whole += cut == CUT_BYTES;
        CHECK_EQ(pager_stats(&rig).resident_pages, whole);
    }
    CHECK_EQ(whole, 1);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    free(frame);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    pc_memory_destroy(&rig.dest[0]);
}

/* ---- holes that somebody else has filled -------------------------------------------------------------------------- */

static void hole_filled_elsewhere(int kind)
{
    const uint64_t pages[] = {scaled(kind, 256)};
    struct toucher touchers[2];
    struct pc_frame frame;
    struct rig rig;
    volatile uint8_t *alias;
    uint64_t page;
    int fd, bulk_fd;

    open_pager(&rig, kind, 1, pages);
    arm_all(&rig, 0);
    alias = CHECK_SYS(mmap(NULL, rig.dest[0].size_bytes, PROT_READ, MAP_SHARED, rig.dest[0].fd, 0));
    for (page = 0; page < pages[0]; page++)
        CHECK_EQ(alias[page * rig.page_bytes], 0); /* the page cache has a page of zeros now */
    CHECK_EQ(resident_bytes(&rig), rig.dest[0].size_bytes);
    fd = script_urgent(&rig, 0);
    touch_one(&touchers[0], &rig, 0, 0);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 0);
    touch_one(&touchers[1], &rig, 0, 0);
    wait_pending(&rig, 2);
    CHECK(!speaks(fd, SERVED_MS));
    CHECK_EQ(atomic_load(&touchers[0].done), 0);
    serve_page(&rig, fd, 0, 0);
    join_toucher(&touchers[0]);
    join_toucher(&touchers[1]);
    CHECK_EQ(pager_stats(&rig).requests, 1);

    /* By push, with a thread waiting for a page which turns out to be zero. */
    page = pages[0] - 1;
    while (page > 1 && content_of(0, page) == DATA)
        page--;
    touch_one(&touchers[0], &rig, 0, page);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, page);
    bulk_fd = script_bulk(&rig, 0);
    for (page = 1; page < pages[0]; page++) {
        if (content_of(0, page) == DATA)
            serve_page(&rig, bulk_fd, 0, page);
        else
            CHECK(send_frame(bulk_fd, (struct pc_frame){.type = PC_FRAME_ZERO, .first_page = page, .pages = 1}, NULL, 0));
    }
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    join_toucher(&touchers[0]);
    check_content(&rig);
    for (page = 0; page < pages[0]; page++)
        CHECK(is_page(0, page, rig.page_bytes, (const uint8_t *)(uintptr_t)alias + page * rig.page_bytes));
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    CHECK_SYS(munmap((void *)(uintptr_t)alias, rig.dest[0].size_bytes));
    close(fd);
    close(bulk_fd);
    close_rig(&rig);
}

static void hole_filled_elsewhere_memfd(void)
{
    hole_filled_elsewhere(PC_MEMORY_MEMFD);
}

static void hole_filled_elsewhere_hugetlb(void)
{
    hole_filled_elsewhere(PC_MEMORY_HUGETLB);
}

/* A page thrown away after it had come is zero from then on (a balloon), not missing and not old. */
static void thrown_away_pages_are_zero(int kind)
{
    const uint64_t pages[] = {scaled(kind, 64)};
    struct rig rig;

    open_pager(&rig, kind, 1, pages);
    open_server(&rig, 0);
    arm_all(&rig, 0);
    connect_urgent(&rig, 0, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    check_content(&rig);
    CHECK_SYS(madvise(rig.dest[0].base, rig.dest[0].size_bytes, kind == PC_MEMORY_ANON ? MADV_DONTNEED : MADV_REMOVE));
    for (uint64_t page = 0; page < pages[0]; page++) {
        CHECK(page % 2 || pc_is_zero(dest_page(&rig, 0, page), rig.page_bytes));
        *dest_page(&rig, 0, page) = 1;
        CHECK_EQ(*dest_page(&rig, 0, page), 1);
    }
    CHECK_EQ(pager_stats(&rig).requests, pages[0]);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    close_rig(&rig);
}
OF_EACH_KIND(thrown_away_pages_are_zero)

/* ---- faults from inside the kernel -------------------------------------------------------------------------------- */

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
    const uint64_t pages[] = {kind == PC_MEMORY_HUGETLB ? 20 : 64};
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

/* ---- pages that nobody touches ------------------------------------------------------------------------------------ */

static void request_missing(int kind)
{
    const uint64_t pages[] = {scaled(kind, 900), scaled(kind, 300)};
    uint64_t few = kind == PC_MEMORY_HUGETLB ? 2 : 10, end_ns;
    struct rig rig;
    int knives[2];

    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 0);
    CHECK_EQ(add_shard(&rig, 0), 0);
    CHECK_EQ(add_shard(&rig, 0), 1);
    arm(&rig, 0, 0, 0, pages[0]);
    arm(&rig, 1, 1, 0, pages[1]);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    connect_urgent(&rig, 0, &knives[0]);
    CHECK_EQ(pc_pager_request_missing(rig.pager, 0), 0);
    /* As many as one asks for. */
    CHECK_EQ(pc_pager_request_missing(rig.pager, few), (int64_t)few);
    end_ns = pc_now_ns() + (uint64_t)PATIENCE_MS * 1000000;
    while (pager_stats(&rig).resident_pages < few)
        CHECK(pc_now_ns() < end_ns);
    /* The rest; the second shard gets its channel only now, the first one loses its own. */
    CHECK(pc_pager_request_missing(rig.pager, UINT64_MAX) >= (int64_t)(all_pages(&rig) - few));
    while (pager_stats(&rig).resident_pages < pages[0] / 2)
        CHECK(pc_now_ns() < end_ns);
    CHECK_SYS(shutdown(knives[0], SHUT_RDWR));
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
    EXPECT_EVENT(&rig.from_server, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
    connect_urgent(&rig, 1, &knives[1]);
    reconnect(&rig, 0, &knives[0]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(&rig).faults, 0);
    CHECK_EQ(pager_stats(&rig).resident_pages, all_pages(&rig));
    CHECK(pager_stats(&rig).requests >= all_pages(&rig));
    CHECK_EQ(resident_bytes(&rig), count_content(&rig, DATA) * rig.page_bytes);
    check_content(&rig);
    CHECK_EQ(pc_pager_request_missing(rig.pager, UINT64_MAX), 0);
    close(knives[0]);
    close(knives[1]);
    close_rig(&rig);
}
OF_EACH_KIND(request_missing)

/* No more than a window of requests is under way without a fault, however many faults are served meanwhile. */
static void filling_leaves_room_for_faults(void)
{
    const uint64_t pages[] = {1000};
    uint64_t asked = 0, faulted = 0;
    struct toucher toucher;
    struct pc_frame frame;
    struct rig rig;
    int fd;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    arm_all(&rig, 0);
    fd = script_urgent(&rig, 0);
    CHECK_EQ(pc_pager_request_missing(rig.pager, UINT64_MAX), 1000);
    while (speaks(fd, SERVED_MS)) {
        CHECK(receive_frame(fd, &frame));
        CHECK_EQ(frame.first_page, asked); /* in order */
        asked++;
    }
    CHECK(asked > 1 && asked < 500);
    for (uint64_t page = 999; page > 800; page--) {
        if (content_of(0, page) != DATA)
            continue;
        touch_one(&toucher, &rig, 0, page);
        CHECK(receive_frame(fd, &frame));
        CHECK_EQ(frame.first_page, page);
        frame.type = PC_FRAME_PAGES;
        frame.flags = PC_FRAME_DEMAND;
        {
            uint8_t *content = malloc(rig.page_bytes);

            CHECK(content != NULL);
            make_page(0, page, rig.page_bytes, content);
            CHECK(send_frame(fd, frame, content, rig.page_bytes));
            free(content);
        }
        join_toucher(&toucher);
        faulted++;
    }
    CHECK(faulted > 20);
    if (speaks(fd, SERVED_MS)) {
        CHECK(receive_frame(fd, &frame));
        FAIL("page %llu was asked for although %llu answers are due", (unsigned long long)frame.first_page,
             (unsigned long long)asked);
    }
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

/* ---- ranges ahead of the faults ------------------------------------------------------------------------------------ */

static int new_eventfd(void)
{
    return CHECK_SYS(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
}

static void expect_told(int fd)
{
    uint64_t count = 0;

    CHECK(speaks(fd, PATIENCE_MS));
    CHECK_EQ(read(fd, &count, sizeof(count)), sizeof(count));
    CHECK_EQ(count, 1);
}

/* Ranges that overlap, from several threads, beside faults: each page once, and everyone who waits is told. */
struct ranger {
    struct rig *rig;
    uint32_t block;
    uint64_t first, pages;
    pthread_t thread;
};

static void *want_range(void *argument)
{
    struct ranger *ranger = argument;
    struct pc_pager *pager = ranger->rig->pager;
    uint64_t known[MAX_PAGES / 64];
    int fd = new_eventfd();
    int64_t ticket;

    CHECK(pc_pager_request_range(pager, ranger->block, ranger->first, ranger->pages) >= 0);
    ticket = pc_pager_watch(pager, ranger->block, ranger->first, ranger->pages, fd);
    CHECK(ticket >= 0);
    if (ticket)
        expect_told(fd);
    CHECK_EQ(pc_pager_received(pager, ranger->block, known), 0);
    CHECK(pc_bitmap_next(known, ranger->first + ranger->pages, ranger->first, 0) >= ranger->first + ranger->pages);
    CHECK_EQ(pc_pager_request_range(pager, ranger->block, ranger->first, ranger->pages), 0);
    CHECK_EQ(pc_pager_watch(pager, ranger->block, ranger->first, ranger->pages, fd), 0);
    CHECK(!speaks(fd, 0));
    close(fd);
    return NULL;
}

static void ranges(int kind)
{
    const uint64_t pages[] = {scaled(kind, 900), scaled(kind, 300)};
    struct visit *visits = malloc((pages[0] + pages[1]) * sizeof(*visits));
    struct ranger rangers[12];
    struct toucher toucher;
    struct rig rig;

    CHECK(visits != NULL);
    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 0);
    CHECK_EQ(add_shard(&rig, 0), 0);
    CHECK_EQ(add_shard(&rig, 0), 1);
    /* A block of two shards: a range may lie on both sides of the border. */
    arm(&rig, 0, 0, 0, pages[0] / 2);
    arm(&rig, 1, 0, pages[0] / 2, pages[0] - pages[0] / 2);
    arm(&rig, 1, 1, 0, pages[1]);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (size_t i = 0; i < 12; i++) {
        struct ranger *ranger = &rangers[i];

        ranger->rig = &rig;
        ranger->block = i % 3 == 2;
        ranger->first = test_below(pages[ranger->block]);
        ranger->pages = 1 + test_below(pages[ranger->block] - ranger->first);
        CHECK_EQ(pthread_create(&ranger->thread, NULL, want_range, ranger), 0);
    }
    start_toucher(&toucher, &rig, -1, visits, shuffled(&rig, -1, visits));
    free(visits);
    connect_urgent(&rig, 0, NULL);
    connect_urgent(&rig, 1, NULL);
    for (size_t i = 0; i < 12; i++)
        CHECK_EQ(pthread_join(rangers[i].thread, NULL), 0);
    join_toucher(&toucher);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pager_stats(&rig).requests, all_pages(&rig));
    CHECK_EQ(pager_stats(&rig).duplicate_pages, 0);
    check_content(&rig);
    close_rig(&rig);
}
OF_EACH_KIND(ranges)

/* With the test as the source: what is asked for, how much at a time, in what order, and again after a lost channel. */
static void ranges_leave_room_for_faults(void)
{
    const uint64_t pages[] = {1000};
    uint8_t asked[1000] = {0};
    uint64_t count = 0, known = 0;
    struct toucher toucher;
    struct pc_frame frame;
    struct rig rig;
    int fd, told = new_eventfd();
    int64_t ticket;

    open_pager(&rig, PC_MEMORY_MEMFD, 1, pages);
    (void)add_shard(&rig, 0);
    arm(&rig, 0, 0, 0, 900);
    CHECK_EQ(pc_pager_request_range(rig.pager, 1, 0, 1), -EINVAL);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 0, 1001), -EINVAL);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 1001, 0), -EINVAL);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, UINT64_MAX, 2), -EINVAL);
    CHECK_EQ(pc_pager_watch(rig.pager, 0, 999, 2, told), -EINVAL);
    CHECK_EQ(pc_pager_watch(rig.pager, 0, 0, 1, -1), -EBADF);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 1000, 0), 0);
    CHECK_EQ(pc_pager_watch(rig.pager, 0, 1000, 0, told), 0);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 950, 10), 10); /* not armed: not there, and not to be asked for */
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 100, 500), 500); /* no channel yet */
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 650, 50), 50);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 300, 400), 400);
    CHECK_EQ(pc_pager_request_range(rig.pager, 0, 310, 20), 20);
    ticket = pc_pager_watch(rig.pager, 0, 698, 2, told);
    CHECK(ticket > 0);
    pc_pager_unwatch(rig.pager, ticket); /* nobody is told */
    pc_pager_unwatch(rig.pager, ticket);
    fd = script_urgent(&rig, 0);
    while (speaks(fd, SERVED_MS)) {
        CHECK(receive_frame(fd, &frame));
        CHECK(frame.request_id & PC_PAGER_REQUEST_AHEAD);
        CHECK(frame.first_page >= 100 && frame.first_page < 700);
        CHECK_EQ(frame.pages, 1);
        CHECK(!asked[frame.first_page]++);
        count++;
    }
    CHECK(count > 1 && count < 300);
    CHECK(asked[100] && asked[300] && asked[650]); /* none of them waits for the others */
    /* A fault beside a full window goes at once. */
    touch_one(&toucher, &rig, 0, 850);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 850);
    CHECK(!(frame.request_id & PC_PAGER_REQUEST_AHEAD));
    /* The channel is lost: the fault first, then all of the ranges, each page once. */
    close(fd);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, NULL);
    memset(asked, 0, sizeof(asked));
    fd = script_urgent(&rig, 0);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 850);
    serve_page(&rig, fd, 0, 850);
    join_toucher(&toucher);
    ticket = pc_pager_watch(rig.pager, 0, 100, 600, told);
    CHECK(ticket > 0);
    while (known < 600) {
        uint8_t *content = malloc(rig.page_bytes);

        CHECK(content != NULL);
        CHECK(!speaks(told, 0));
        CHECK(receive_frame(fd, &frame));
        CHECK(frame.first_page >= 100 && frame.first_page < 700);
        CHECK(!asked[frame.first_page]++);
        frame.flags = PC_FRAME_DEMAND;
        make_page(0, frame.first_page, rig.page_bytes, content);
        frame.type = content_of(0, frame.first_page) == DATA ? PC_FRAME_PAGES : PC_FRAME_ZERO;
        CHECK(send_frame(fd, frame, content, frame.type == PC_FRAME_PAGES ? rig.page_bytes : 0));
        free(content);
        known++;
    }
    expect_told(told);
    CHECK(!speaks(fd, SERVED_MS));
    ticket = pc_pager_watch(rig.pager, 0, 0, 1000, told); /* left behind */
    CHECK(ticket > 0);
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    CHECK(!speaks(told, 0));
    close(told);
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

/* ---- the page server alone ---------------------------------------------------------------------------------------- */

/* A server with one block of memory and nobody connected. */
static void open_server_of(struct rig *rig, int kind, uint64_t pages, uint64_t bandwidth)
{
    memset(rig, 0, sizeof(*rig));
    rig->kind = kind;
    rig->page_bytes = kind_page_bytes(kind);
    rig->blocks = 1;
    rig->pages[0] = pages;
    open_server(rig, bandwidth);
}

static void open_server_alone(struct rig *rig, uint64_t pages, uint64_t bandwidth)
{
    open_server_of(rig, PC_MEMORY_ANON, pages, bandwidth);
}

static void close_server_alone(struct rig *rig)
{
    pc_pageserver_free(rig->server);
    pc_memory_destroy(&rig->source[0]);
    CHECK_LEAKS();
}

/* The destination's end of an urgent or a bulk channel. */
static int client(struct rig *rig, int kind, uint32_t channel)
{
    int pair[2];

    tcp_pair(pair);
    be_patient(pair[0]);
    CHECK_EQ(kind == PC_CHANNEL_URGENT ? pc_pageserver_attach_urgent(rig->server, channel, pair[1], 0)
                                       : pc_pageserver_attach_bulk(rig->server, channel, pair[1]),
             0);
    return pair[0];
}

static bool request(int fd, uint32_t block, uint64_t first, uint32_t pages, uint32_t id)
{
    return send_frame(
        fd,
        (struct pc_frame){
            .type = PC_FRAME_REQUEST, .block = (uint16_t)block, .first_page = first, .pages = pages, .request_id = id},
        NULL, 0);
}

/* One answer, checked against what the block holds. */
static void expect_answer(int fd, uint64_t page_bytes, struct pc_frame *frame, uint8_t *content)
{
    CHECK(receive_frame(fd, frame));
    CHECK(frame->type == PC_FRAME_PAGES || frame->type == PC_FRAME_ZERO);
    CHECK_EQ(frame->type == PC_FRAME_PAGES, content_of(0, frame->first_page) == DATA);
    if (frame->type == PC_FRAME_PAGES) {
        CHECK_EQ(frame->payload_bytes, frame->pages * page_bytes);
        CHECK(receive_bytes(fd, content, frame->payload_bytes));
        CHECK_EQ(pc_crc32c(0, content, frame->payload_bytes), frame->payload_crc);
        for (uint64_t i = 0; i < frame->pages; i++)
            CHECK(is_page(0, frame->first_page + i, page_bytes, content + i * page_bytes));
    }
}

static void expect_server_down(struct rig *rig, int kind, int channel, int error, const char *text)
{
    struct pc_event event;

    EXPECT_EVENT(&rig->from_server, PC_EVENT_CHANNEL_DOWN, kind, channel, &event);
    if (event.error != error || !strstr(event.text, text))
        FAIL("error %d, %s; should be %d, %s", event.error, event.text, error, text);
}

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

    open_server_alone(&rig, 200, 0);
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
    open_server_alone(&rig, 10, 0);
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
    open_server_alone(&rig, job.pages, 0);
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

    open_server_alone(&rig, MAX_PAGES, rate);
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

/* Senders that wait (for the start, for bandwidth, for a peer that does not read) come back when told to, and the server
 * serves again afterwards. */
static void server_disconnects_and_goes_on(void)
{
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    uint64_t offered = 0;
    struct pc_frame frame;
    struct rig rig;
    int urgent, fd, pair[2];

    CHECK(content != NULL);
    open_server_alone(&rig, MAX_PAGES, 0);
    urgent = client(&rig, PC_CHANNEL_URGENT, 0);
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK(request(urgent, 0, 0, 1, 1));
    CHECK(!speaks(urgent, SERVED_MS)); /* not started */
    tcp_pair(pair);
    CHECK_EQ(pc_pageserver_attach_urgent(rig.server, 0, pair[1], 0), -EBUSY);
    CHECK_EQ(recv(pair[0], content, 1, 0), 0); /* it was the server's from then on: closed */
    close(pair[0]);
    tcp_pair(pair);
    CHECK_EQ(pc_pageserver_attach_bulk(rig.server, 0, pair[1]), -EBUSY);
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

/* Requests pull the push after them: what follows a faulted page comes next. */
static void push_follows_the_faults(void)
{
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    uint64_t last = 0, next = UINT64_MAX, received = 0;
    struct pc_frame frame;
    struct rig rig;
    int urgent, fd;

    CHECK(content != NULL);
    open_server_alone(&rig, MAX_PAGES, 2000000); /* one run of 64 pages in 131 ms */
    urgent = client(&rig, PC_CHANNEL_URGENT, 0);
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.first_page, 0);
    CHECK(receive_bytes(fd, content, frame.payload_bytes));
    CHECK(request(urgent, 0, 700, 1, 1));
    expect_answer(urgent, rig.page_bytes, &frame, content);
    /* The run that was claimed already comes first. */
    while (last < 700 && received < 400) {
        CHECK(receive_frame(fd, &frame));
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        received += frame.pages;
        last = next = frame.first_page;
    }
    CHECK_EQ(next, 701);
    CHECK(received <= 3 * 64);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    close(urgent);
    close(fd);
    free(content);
    close_server_alone(&rig);
}

/* ---- memory given back -------------------------------------------------------------------------------------------- */

static uint64_t source_resident(const struct rig *rig)
{
    uint64_t sum = 0, bytes;

    for (uint32_t i = 0; i < rig->blocks; i++) {
        CHECK_EQ(pc_memory_resident(&rig->source[i], &bytes), 0);
        sum += bytes;
    }
    return sum;
}

static uint64_t discarded_pages(const struct rig *rig)
{
    uint64_t words[MAX_PAGES / 64] = {0};

    CHECK_EQ(pc_pageserver_released(rig->server, 0, NULL, words), 0);
    return pc_bitmap_count(words, MAX_PAGES);
}

/* The first half is released: its memory is gone, nobody gets it any more, and everybody gets the rest. */
static void released_memory_is_given_back(int kind)
{
    uint64_t present[MAX_PAGES / 64] = {0}, half[MAX_PAGES / 64] = {0}, words[MAX_PAGES / 64] = {0}, pages = scaled(kind, 900);
    uint64_t first = pages / 2, before, page, seen = 0;
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    struct pc_frame frame;
    struct rig rig;
    int fd;

    CHECK(content != NULL);
    open_server_of(&rig, kind, pages, 0);
    pc_bitmap_set_range(half, 0, first);
    CHECK_EQ(pc_memory_present(&rig.source[0], present), 0);
    CHECK_EQ(pc_pageserver_set_present(rig.server, 0, present), 0);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, half), -EBUSY); /* the machine still runs */
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    CHECK_EQ(pc_pageserver_release(rig.server, 1, 0, 1, half), -EINVAL);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages + 1, half), -EINVAL);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, pages + 1, 0, half), -EINVAL);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, UINT64_MAX, 2, half), -EINVAL);
    before = source_resident(&rig);
    CHECK_EQ(before, pc_bitmap_count(present, pages) * rig.page_bytes);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, half), 0);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, half), 0); /* twice is once */
    for (page = 0; page < first; page++)
        seen += present[page / 64] >> (page % 64) & 1;
    CHECK(seen > 0);
    CHECK_EQ(source_resident(&rig), before - seen * rig.page_bytes);
    CHECK_EQ(server_stats(&rig).released_bytes, seen * rig.page_bytes);
    CHECK_EQ(pc_pageserver_released(rig.server, 0, words, NULL), 0);
    CHECK(!memcmp(words, half, sizeof(half)));
    CHECK_EQ(discarded_pages(&rig), first);

    /* A request that crossed the acknowledgement ends its connection. */
    fd = client(&rig, PC_CHANNEL_URGENT, 0);
    CHECK(request(fd, 0, 0, 1, 5));
    expect_server_down(&rig, PC_CHANNEL_URGENT, 0, ESTALE, "page 0 of RAM block 0 was asked for and acknowledged");
    CHECK(!receive_frame(fd, &frame));
    close(fd);

    /* The next one begins with the received map, which has to have what was released. */
    memset(words, 0, sizeof(words));
    pc_bitmap_set_range(words, 1, pages - 1);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    CHECK_EQ(pc_pageserver_set_received(rig.server, 0, words), -ENODATA);
    CHECK_EQ(pc_pageserver_set_received(rig.server, 0, half), 0);
    fd = client(&rig, PC_CHANNEL_URGENT, 0);
    CHECK(request(fd, 0, 0, 1, 6)); /* from a destination that does not keep its word */
    CHECK(receive_frame(fd, &frame));
    CHECK_EQ(frame.type, PC_FRAME_ERROR);
    CHECK_EQ(frame.flags, PC_FRAME_DEMAND);
    CHECK_EQ(frame.first_page, 0);
    CHECK_EQ(frame.request_id, 6);
    CHECK(receive_bytes(fd, content, frame.payload_bytes));
    CHECK(frame.payload_bytes < PC_ERROR_BYTES);
    content[frame.payload_bytes] = 0;
    CHECK(strstr((char *)content, "given back"));
    for (page = first; content_of(0, page) != DATA; page++) {
    }
    CHECK(request(fd, 0, page, 1, 7));
    expect_answer(fd, rig.page_bytes, &frame, content);
    CHECK_EQ(frame.first_page, page);
    close(fd);
    seen = 1;
    fd = client(&rig, PC_CHANNEL_BULK, 0);
    for (;;) {
        CHECK(receive_frame(fd, &frame));
        if (frame.type == PC_FRAME_END)
            break;
        CHECK(frame.first_page >= first);
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        for (uint64_t i = 0; i < frame.pages; i++)
            CHECK(frame.type == PC_FRAME_ZERO ? content_of(0, frame.first_page + i) != DATA
                                              : is_page(0, frame.first_page + i, rig.page_bytes, content + i * rig.page_bytes));
        seen += frame.pages;
    }
    for (page = 0; page < first; page++)
        before -= (present[page / 64] >> (page % 64) & 1) * rig.page_bytes;
    CHECK_EQ(seen, before / rig.page_bytes);
    close(fd);
    free(content);
    close_server_alone(&rig);
}
OF_EACH_KIND(released_memory_is_given_back)

/* Pages of transfer that are a part of a page of memory, or several: only whole pages of memory can go. */
static void released_pages_of_other_sizes(void)
{
    struct pc_memory memory = make_memory(PC_MEMORY_MEMFD, 8);
    uint64_t map[1] = {7}, gone[1] = {0}, bytes;
    struct pc_pageserver *server;

    for (int large = 0; large < 2; large++) {
        memset(memory.base, 1, memory.size_bytes);
        CHECK_EQ(pc_pageserver_new(0, &server), 0);
        CHECK_EQ(pc_pageserver_add_block(server, &memory, large ? 4 * pc_page_bytes() : pc_page_bytes() / 4), 0);
        CHECK_EQ(pc_pageserver_start(server), 0);
        if (large) {
            map[0] = 2;
            CHECK_EQ(pc_pageserver_release(server, 0, 0, 2, map), 0);
            CHECK_EQ(pc_memory_resident(&memory, &bytes), 0);
            CHECK_EQ(bytes, 4 * pc_page_bytes());
            CHECK_EQ(((uint8_t *)memory.base)[4 * pc_page_bytes() - 1], 1);
            CHECK_EQ(((uint8_t *)memory.base)[4 * pc_page_bytes()], 0);
        } else {
            CHECK_EQ(pc_pageserver_release(server, 0, 0, 3, map), 0); /* three quarters */
            CHECK_EQ(pc_memory_resident(&memory, &bytes), 0);
            CHECK_EQ(bytes, memory.size_bytes);
            map[0] = 1;
            CHECK_EQ(pc_pageserver_release(server, 0, 3, 1, map), 0); /* and the last one */
            CHECK_EQ(pc_memory_resident(&memory, &bytes), 0);
            CHECK_EQ(bytes, memory.size_bytes - pc_page_bytes());
            map[0] = 0x7ff; /* of pages 5 to 15 the last eight are whole */
            CHECK_EQ(pc_pageserver_release(server, 0, 5, 11, map), 0);
            CHECK_EQ(pc_memory_resident(&memory, &bytes), 0);
            CHECK_EQ(bytes, memory.size_bytes - 3 * pc_page_bytes());
            CHECK_EQ(pc_pageserver_released(server, 0, NULL, gone), 0);
            CHECK_EQ(gone[0], 0xff0f);
            CHECK_EQ(((uint8_t *)memory.base)[2 * pc_page_bytes() - 1], 1);
        }
        pc_pageserver_free(server);
    }
    pc_memory_destroy(&memory);
    CHECK_LEAKS();
}

/* As `client`, with sockets that hold little. */
static int narrow_client(struct rig *rig, int kind)
{
    int pair[2], bytes = 16384;

    tcp_pair(pair);
    be_patient(pair[0]);
    CHECK_SYS(setsockopt(pair[0], SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes)));
    CHECK_SYS(setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)));
    CHECK_EQ(kind == PC_CHANNEL_URGENT ? pc_pageserver_attach_urgent(rig->server, 0, pair[1], 0)
                                       : pc_pageserver_attach_bulk(rig->server, 0, pair[1]),
             0);
    return pair[0];
}

/* Until nothing moves any more: the peer is deaf, and the socket is full. */
static void wait_stalled(const struct rig *rig)
{
    uint64_t before;

    do {
        before = server_stats(rig).sent_pages;
        (void)nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    } while (!before || server_stats(rig).sent_pages != before);
}

/* What stands in a send when it is released arrives whole, and its memory goes afterwards. */
static void what_is_under_way_is_kept(int kind)
{
    uint64_t all[MAX_PAGES / 64], pages = scaled(kind, MAX_PAGES), answers = 0;
    uint8_t *content = malloc(PC_FRAME_MAX_PAYLOAD_BYTES);
    struct pc_frame frame;
    struct rig rig;
    int fd;

    CHECK(content != NULL);
    memset(all, 0, sizeof(all));
    pc_bitmap_set_range(all, 0, pages);
    open_server_of(&rig, kind, pages, 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    fd = narrow_client(&rig, PC_CHANNEL_BULK);
    wait_stalled(&rig);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, all), 0);
    CHECK(discarded_pages(&rig) < pages);
    CHECK(source_resident(&rig) > 0);
    for (;;) {
        CHECK(receive_frame(fd, &frame));
        if (frame.type == PC_FRAME_END)
            break;
        if (frame.type == PC_FRAME_PAGES) {
            CHECK(receive_bytes(fd, content, frame.payload_bytes));
            for (uint64_t i = 0; i < frame.pages; i++)
                CHECK(is_page(0, frame.first_page + i, rig.page_bytes, content + i * rig.page_bytes));
        }
    }
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, 0, all), 0); /* nothing new, but what was late */
    CHECK_EQ(discarded_pages(&rig), pages);
    CHECK_EQ(source_resident(&rig), 0);
    close(fd);
    close_server_alone(&rig);

    open_server_of(&rig, kind, pages, 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    fd = narrow_client(&rig, PC_CHANNEL_URGENT);
    CHECK(request(fd, 0, 0, (uint32_t)pages, 1));
    wait_stalled(&rig);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, pages, all), 0);
    CHECK(discarded_pages(&rig) < pages);
    /* Huge pages are so few that all of them stand in one send; of the others, what was not looked at ends the connection. */
    while ((kind != PC_MEMORY_HUGETLB || answers < pages) && receive_frame(fd, &frame)) {
        CHECK_EQ(frame.first_page, answers);
        CHECK(frame.type == PC_FRAME_PAGES || frame.type == PC_FRAME_ZERO);
        CHECK(receive_bytes(fd, content, frame.payload_bytes));
        CHECK_EQ(frame.type == PC_FRAME_PAGES, content_of(0, frame.first_page) == DATA);
        CHECK(frame.type == PC_FRAME_ZERO || is_page(0, frame.first_page, rig.page_bytes, content));
        answers++;
    }
    CHECK(kind == PC_MEMORY_HUGETLB ? answers == pages : answers > 0 && answers < pages);
    if (kind != PC_MEMORY_HUGETLB)
        expect_server_down(&rig, PC_CHANNEL_URGENT, 0, ESTALE, "acknowledged");
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    CHECK_EQ(pc_pageserver_release(rig.server, 0, 0, 0, all), 0);
    CHECK_EQ(discarded_pages(&rig), pages);
    close(fd);
    free(content);
    close_server_alone(&rig);
}
OF_EACH_KIND(what_is_under_way_is_kept)

static void recover_both(struct rig *rig, int knives[3])
{
    CHECK_EQ(pc_pager_disconnect(rig->pager), 0);
    CHECK_EQ(pc_pageserver_disconnect(rig->server), 0);
    while (find_event(&rig->from_pager, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
    }
    while (find_event(&rig->from_server, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL)) {
    }
    for (uint32_t i = 0; i < rig->blocks; i++) {
        uint64_t received[MAX_PAGES / 64] = {0};

        CHECK_EQ(pc_pager_received(rig->pager, i, received), 0);
        CHECK_EQ(pc_pageserver_set_received(rig->server, i, received), 0);
    }
    for (int i = 0; i < 3; i++)
        reconnect(rig, i, &knives[i]);
}

/* Faults, push, acknowledgements a moment later and cuts, all at once: every page is right, and at the end the source is empty. */
static void released_as_it_arrives(int kind)
{
    const uint64_t pages[] = {scaled(kind, 1000), scaled(kind, 400)};
    uint64_t before[2][MAX_PAGES / 64] = {{0}}, now[MAX_PAGES / 64];
    struct visit visits[2 * MAX_PAGES];
    struct toucher touchers[4];
    int knives[3], rounds = 0, recoveries = 0;
    struct rig rig;

    open_pager(&rig, kind, 2, pages);
    open_server(&rig, 8000000);
    tell_page_map(&rig);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(add_shard(&rig, 0), i);
        arm(&rig, i, i, 0, pages[i]);
        connect_urgent(&rig, i, &knives[i]);
    }
    connect_bulk(&rig, 0, &knives[2]);
    atomic_store(&rig.leashed, true);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (int t = 0; t < 4; t++) {
        size_t count = shuffled(&rig, -1, visits);

        start_toucher(&touchers[t], &rig, t, visits, count);
    }
    while (pager_stats(&rig).resident_pages < all_pages(&rig)) {
        if (atomic_load(&rig.allowance) < 4)
            atomic_fetch_add(&rig.allowance, 4);
        for (uint32_t i = 0; i < 2; i++) {
            memset(now, 0, sizeof(now));
            CHECK_EQ(pc_pager_received(rig.pager, i, now), 0);
            CHECK_EQ(pc_pageserver_release(rig.server, i, 0, pages[i], before[i]), 0);
            memcpy(before[i], now, sizeof(now));
        }
        /* Without the moment that an engine waits requests do cross; and the network fails too. */
        if (find_event(&rig.from_server, PC_EVENT_CHANNEL_DOWN, 0, 0, 0, NULL) || ++rounds % 40 == 1) {
            recover_both(&rig, knives);
            recoveries++;
        }
        (void)sched_yield();
    }
    atomic_store(&rig.leashed, false);
    for (int t = 0; t < 4; t++)
        join_toucher(&touchers[t]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    EXPECT_NO_EVENT(&rig.from_server, PC_EVENT_FATAL);
    CHECK_EQ(pager_stats(&rig).frames_refused, 0);
    CHECK(recoveries > 0);
    CHECK(kind == PC_MEMORY_HUGETLB || server_stats(&rig).released_bytes > 0); /* those are few, and may all come at once */
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    check_content(&rig);
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    for (uint32_t i = 0; i < 2; i++) {
        pc_bitmap_set_range(before[i], 0, pages[i]);
        CHECK_EQ(pc_pageserver_release(rig.server, i, 0, pages[i], before[i]), 0);
    }
    CHECK_EQ(source_resident(&rig), 0);
    for (int i = 0; i < 3; i++)
        close(knives[i]);
    close_rig(&rig);
}
OF_EACH_KIND(released_as_it_arrives)

/* ---- things that come and go -------------------------------------------------------------------------------------- */

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
        CHECK_EQ(pc_pageserver_attach_urgent(rig->server, (uint32_t)shard, pair[0], 0), 0);
        CHECK_EQ(pc_pager_attach_urgent(rig->pager, (uint32_t)shard, pair[1]), 0);
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
    CHECK_EQ(pc_pager_add_block(rig.pager, &more), 1);
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
    CHECK_EQ(pc_pager_add_block(rig.pager, &odd), -EINVAL);
    odd = (struct pc_memory){.size_bytes = 4096, .page_bytes = 4096, .fd = -1};
    CHECK_EQ(pc_pager_add_block(rig.pager, &odd), -EINVAL);
    odd = rig.dest[0];
    odd.page_bytes = odd.size_bytes = UINT64_C(2) * PC_FRAME_MAX_PAYLOAD_BYTES; /* could never be sent */
    CHECK_EQ(pc_pager_add_block(rig.pager, &odd), -EINVAL);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 0, 1, message, sizeof(message)), -EINVAL);
    CHECK_EQ(add_shard(&rig, 0), 0);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 1, 0, 1, message, sizeof(message)), -EINVAL);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 200, 1, NULL, 0), -EINVAL);
    CHECK_EQ(pc_pager_arm(rig.pager, 0, 0, 1, UINT64_MAX, NULL, 0), -EINVAL);
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
    CHECK_EQ(pc_pager_attach_urgent(rig.pager, 1, pair[1]), -EINVAL);
    CHECK_EQ(recv(pair[0], &byte, 1, 0), 0);
    close(pair[0]);
    tcp_pair(pair);
    CHECK_EQ(pc_pager_attach_bulk(rig.pager, PC_MAX_BULK_CHANNELS, pair[1]), -EINVAL);
    CHECK_EQ(recv(pair[0], &byte, 1, 0), 0);
    close(pair[0]);
    CHECK_EQ(pc_pager_attach_urgent(rig.pager, 0, CHECK_SYS(socket(AF_INET, SOCK_DGRAM, 0))), -EPROTOTYPE);
    CHECK_EQ(pc_pager_attach_bulk(rig.pager, 0, CHECK_SYS(open("/dev/null", O_RDWR | O_CLOEXEC))), -ENOTSOCK);
    pair[0] = script_bulk(&rig, 2);
    {
        int second[2];

        tcp_pair(second);
        CHECK_EQ(pc_pager_attach_bulk(rig.pager, 2, second[1]), -EBUSY);
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
        CHECK_EQ(i ? pc_pageserver_attach_urgent(rig.server, 0, pair[0], 0) :
                     pc_pageserver_attach_bulk(rig.server, 0, pair[0]),
                 0);
        CHECK_EQ(i ? pc_pager_attach_urgent(rig.pager, 0, pair[1]) : pc_pager_attach_bulk(rig.pager, 0, pair[1]), 0);
    }
    (void)nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN);
    EXPECT_NO_EVENT(&rig.from_server, PC_EVENT_CHANNEL_DOWN);
    check_content(&rig);
    close_rig(&rig);
}

/* ---- all of them ------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_KINDS(demand);
    RUN_CASE(demand_with_busy_poll);
    RUN_KINDS(one_bulk_channel);
    RUN_KINDS(three_bulk_channels);
    RUN_KINDS(disarmed_zeros);
    RUN_KINDS(no_write_is_lost);
    RUN_KINDS(known_zero_needs_nobody);
    RUN_KINDS(damage_is_never_seen);
    RUN_CASE(frames_cut_by_tcp);
    RUN_KINDS(urgent_cuts);
    RUN_KINDS(cuts_with_bulk);
    RUN_KINDS(push_again_what_was_lost);
    RUN_CASE(answers_cut_everywhere);
    RUN_CASE(pushes_cut_everywhere);
    RUN_CASE(requests_cut_everywhere);
    RUN_CASE(hole_filled_elsewhere_memfd);
    RUN_CASE(hole_filled_elsewhere_hugetlb);
    RUN_KINDS(thrown_away_pages_are_zero);
    RUN_KINDS(signal_storm);
    RUN_KINDS(kernel_paths);
    RUN_KINDS(request_missing);
    RUN_CASE(filling_leaves_room_for_faults);
    RUN_KINDS(ranges);
    RUN_CASE(ranges_leave_room_for_faults);
    RUN_KINDS(free_with_pages_missing);
    RUN_CASE(server_refuses_nonsense);
    RUN_CASE(ten_thousand_requests_at_once);
    RUN_CASE(image_of_small_pages);
    RUN_CASE(image_of_larger_pages);
    RUN_CASE(bandwidth_is_kept);
    RUN_CASE(server_disconnects_and_goes_on);
    RUN_CASE(push_follows_the_faults);
    RUN_KINDS(released_memory_is_given_back);
    RUN_CASE(released_pages_of_other_sizes);
    RUN_KINDS(what_is_under_way_is_kept);
    RUN_KINDS(released_as_it_arrives);
    RUN_CASE(shards_come_while_faults_wait_memfd);
    RUN_CASE(shards_come_while_faults_wait_anon);
    RUN_CASE(blocks_may_come_later);
    RUN_KINDS(frames_placed_in_part);
    RUN_CASE(misuse_is_refused);
    RUN_CASE(non_blocking_descriptors_work);
    return test_end();
}
