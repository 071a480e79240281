/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory that another process lends: a file that it has mapped shared, with a userfaultfd of it, as QEMU's RAM. The pager has the
 * descriptor of the file and no mapping. That process is a child of the case. It gives pages back as QEMU does, by a hole in the
 * file, of which nothing tells, and then MADV_DONTNEED, of which an event does.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/owner.h"
#include "tests/support/rig.h"

#define MISSING_SHMEM (UINT64_C(1) << 5)
#define MINOR_SHMEM (UINT64_C(1) << 10)
#define MISSING_HUGE (UINT64_C(1) << 4)
#define MINOR_HUGE (UINT64_C(1) << 9)
#define EVENT_REMOVE (UINT64_C(1) << 3)
#define FEATURES (MISSING_SHMEM | MINOR_SHMEM | MISSING_HUGE | MINOR_HUGE | EVENT_REMOVE)
#define PAGES 192
#define ROUNDS (3000 / SLOW)

static void discard(const struct owner *owner, uint64_t page)
{
    owner_punch(owner, page);
    if (owner->memory.kind != PC_MEMORY_HUGETLB) /* of which QEMU tells nothing */
        owner_dontneed(owner, page);
}

/* At random, each worker on pages of its own, of which it knows what must be in them. */
static void work_at_random(struct owner *owner, uint64_t number)
{
    uint64_t words = owner->memory.page_bytes / sizeof(uint64_t);
    uint64_t own = owner->memory.size_bytes / owner->memory.page_bytes / OWNER_THREADS, random = mix(test_.seed + number);
    struct {
        uint64_t first;
        bool written, zero;
    } models[PAGES] = {0};
    bool last, blind;

    do {
        last = atomic_load(&owner->stop);
        for (uint64_t i = 0; i < own; i++) {
            uint64_t one, page, word, seen, expected;
            volatile uint64_t *at;

            random = mix(random);
            one = last ? i : random % own;
            page = one * OWNER_THREADS + number;
            at = owner_page(owner, page);
            word = (random >> 20) % words;
            blind = !last && (random >> 40 & 7) == 2 && owner->memory.kind == PC_MEMORY_MEMFD; /* it may not have come yet */
            expected = word == 0 && models[one].written ? models[one].first : models[one].zero ? 0 : word_of(0, page, word);
            seen = blind ? expected : at[word];
            if (seen != expected)
                FAIL("page %llu has %#llx in word %llu, should be %#llx (%s%s)", (unsigned long long)page, (unsigned long long)seen,
                     (unsigned long long)word, (unsigned long long)expected, models[one].zero ? "zero" : "source",
                     models[one].written ? ", written to" : "");
            switch (last ? 0 : random >> 40 & 3) {
            case 1:
                at[0] = models[one].first = random | 1;
                models[one].written = true;
                break;
            case 2:
                discard(owner, page);
                models[one].written = false;
                models[one].zero = true;
                break;
            default:
                break;
            }
            atomic_fetch_add(&owner->steps, 1);
        }
    } while (!last);
}

/* A pager and a page server (or the test, as a script), and the process that lends memory: nothing is armed yet. */
static struct owner *lend_file(struct rig *rig, int kind, int fd)
{
    struct owner *owner;

    need_uffd();
    memset(rig, 0, sizeof(*rig));
    rig->kind = kind;
    rig->page_bytes = kind_page_bytes(kind);
    rig->blocks = 1;
    rig->pages[0] = kind == PC_MEMORY_HUGETLB ? 2 * OWNER_THREADS : PAGES;
    if (fd < 0) {
        rig->dest[0] = make_memory(kind, rig->pages[0]);
        CHECK_SYS(munmap(rig->dest[0].base, rig->dest[0].size_bytes));
        rig->dest[0].base = NULL;
    } else {
        rig->dest[0] = (struct pc_memory){
            .size_bytes = rig->pages[0] * rig->page_bytes, .page_bytes = rig->page_bytes, .kind = kind, .fd = fd};
        CHECK_SYS(ftruncate(fd, (off_t)rig->dest[0].size_bytes));
    }
    owner = start_owner(&rig->dest[0], FEATURES, work_at_random);
    CHECK_EQ(pc_pager_new(-1, &rig->pager), 0);
    rig->from_pager = (struct inbox){.owner = rig->pager, .fd = pc_pager_event_fd(rig->pager), .next = next_pager_event};
    CHECK_EQ(pc_pager_add_block(rig->pager, &rig->dest[0], -1), 0);
    if (pc_pager_adopt_shard(rig->pager, owner->uffd, FEATURES, 0, message, sizeof(message)))
        FAIL("%s", message);
    return owner;
}

static struct owner *lend(struct rig *rig, int kind)
{
    return lend_file(rig, kind, -1);
}

static void arm_lent(struct rig *rig, const struct owner *owner)
{
    if (pc_pager_arm_at(rig->pager, 0, 0, 0, rig->pages[0], owner->address, message, sizeof(message)))
        FAIL("%s", message);
}

static void end_lent(struct rig *rig, struct owner *owner)
{
    EXPECT_NO_EVENT(&rig->from_pager, PC_EVENT_FATAL);
    end_owner(owner);
    close_rig(rig);
}

/* ---- single pages ------------------------------------------------------------------------------------------------- */

/* By demand, by push, into a hole that somebody has filled by reading: never zeros in its place. */
static void pages_come(int kind)
{
    const uint64_t other = 3; /* beside page 0, the first one that may be of data: there are few huge pages */
    struct rig rig;
    struct owner *owner;
    uint64_t received[MAX_PAGES / 64];
    int urgent, bulk;
    void *peek;

    while (content_of(0, other) != DATA)
        test_.seed++;
    owner = lend(&rig, kind);
    arm_lent(&rig, owner);
    urgent = script_urgent(&rig, 0);
    bulk = script_bulk(&rig, 0);
    peek = CHECK_SYS(mmap(NULL, rig.dest[0].size_bytes, PROT_READ, MAP_SHARED, rig.dest[0].fd, 0));
    CHECK_EQ(*(volatile uint64_t *)peek, 0); /* another program reads a hole: a page of zeros is there */
    give(owner, 0, READ, 0);
    wait_pending(&rig, 1);
    CHECK(!is_done(owner, 0));
    serve_page(&rig, urgent, 0, 0);
    CHECK_EQ(finish(owner, 0), word_of(0, 0, 1));
    CHECK_EQ(((volatile uint64_t *)peek)[1], word_of(0, 0, 1)); /* the same page */
    serve_page(&rig, bulk, 0, other);
    CHECK_EQ(order(owner, READ, other), word_of(0, other, 1));
    order_write(owner, WRITE, other, 77);
    serve_page(&rig, bulk, 0, other); /* again, and too late */
    serve_page(&rig, bulk, 0, 1); /* (zeros, as content) */
    WAIT_UNTIL(pager_stats(&rig).resident_pages == 3);
    CHECK_EQ(order(owner, READ, other), 77);
    CHECK_EQ(pager_stats(&rig).duplicate_pages, 1);
    CHECK_EQ(pc_pager_received(rig.pager, 0, received), 0);
    CHECK_EQ(pc_bitmap_count(received, rig.pages[0]), 3);
    CHECK_SYS(munmap(peek, rig.dest[0].size_bytes));
    close(urgent);
    close(bulk);
    end_lent(&rig, owner);
}

/* Precopy: what has come is forgotten, though this process has no mapping of it, and comes again. */
static void pages_are_forgotten(int kind)
{
    struct rig rig;
    struct owner *owner = lend(&rig, kind);
    uint64_t stale[MAX_PAGES / 64] = {1}, present[MAX_PAGES / 64] = {0};
    int urgent, bulk;

    arm_lent(&rig, owner);
    urgent = script_urgent(&rig, 0);
    bulk = script_bulk(&rig, 0);
    serve_page(&rig, bulk, 0, 0);
    CHECK(send_frame(bulk, (struct pc_frame){.type = PC_FRAME_END}, NULL, 0));
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_BULK_END, 0, 0, NULL);
    CHECK_EQ(pc_pager_forget(rig.pager, 0, stale), 0);
    CHECK_EQ(pc_memory_discard_pages(&rig.dest[0], stale), 0);
    CHECK_EQ(pc_memory_present(&rig.dest[0], present), 0);
    CHECK_EQ(present[0], 0);
    give(owner, 0, READ, 0);
    wait_pending(&rig, 1);
    serve_page(&rig, urgent, 0, 0);
    CHECK_EQ(finish(owner, 0), word_of(0, 0, 1));
    close(urgent);
    close(bulk);
    end_lent(&rig, owner);
}

/* Its owner cuts the file short under the pager: that ends what it is part of, by name, and nothing else. */
static void the_file_is_cut_short(void)
{
    struct rig rig;
    struct owner *owner = lend_file(&rig, PC_MEMORY_MEMFD, CHECK_SYS(memfd_create("unsealed", MFD_CLOEXEC)));
    uint64_t stale[MAX_PAGES / 64] = {1}, present[MAX_PAGES / 64] = {0}, sum;
    struct pc_event event;
    int bulk;

    arm_lent(&rig, owner);
    bulk = script_bulk(&rig, 0);
    serve_page(&rig, bulk, 0, 0);
    WAIT_UNTIL(pager_stats(&rig).resident_pages == 1);
    CHECK_SYS(ftruncate(rig.dest[0].fd, (off_t)rig.page_bytes));
    serve_page(&rig, bulk, 0, next_data_page(&rig, &(uint64_t){2}));
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, 0, 0, &event);
    CHECK(strstr(event.text, "cannot place page") != NULL);
    CHECK_EQ(pc_memory_present(&rig.dest[0], present), -ENODATA);
    CHECK_EQ(pc_memory_digest(&rig.dest[0], &sum), -ENODATA);
    CHECK_EQ(pc_memory_discard_pages(&rig.dest[0], stale), 0);
    CHECK_EQ(order(owner, READ, 0), 0); /* it had come, and was thrown away */
    CHECK_EQ(pc_pager_leave(rig.pager), 0);
    close(bulk);
    close(rig.dest[0].fd);
    end_owner(owner);
    CHECK_LEAKS();
}

/* ---- given back --------------------------------------------------------------------------------------------------- */

/* Before it has come; after; and between the hole and the event, when a page that comes finds nothing that forbids it. */
static void given_back(void)
{
    struct rig rig;
    struct owner *owner = lend(&rig, PC_MEMORY_MEMFD);
    uint64_t before = 2, after, between;
    int urgent, bulk;

    before = next_data_page(&rig, &before);
    after = between = before;
    after = between = next_data_page(&rig, &after);
    between = next_data_page(&rig, &between);
    arm_lent(&rig, owner);
    urgent = script_urgent(&rig, 0);
    bulk = script_bulk(&rig, 0);

    (void)order(owner, PUNCH, before);
    (void)order(owner, DONTNEED, before);
    serve_page(&rig, bulk, 0, before);
    serve_page(&rig, bulk, 0, after);
    WAIT_UNTIL(pager_stats(&rig).background_pages + pager_stats(&rig).demand_pages == 1);
    CHECK_EQ(order(owner, READ, before), 0);
    CHECK_EQ(order(owner, READ, after), word_of(0, after, 1));
    (void)order(owner, PUNCH, after);
    (void)order(owner, DONTNEED, after);
    CHECK_EQ(order(owner, READ, after), 0);

    (void)order(owner, PUNCH, between);
    serve_page(&rig, bulk, 0, between);
    WAIT_UNTIL(pager_stats(&rig).resident_pages == 3);
    CHECK_EQ(order(owner, READ, between), word_of(0, between, 1));
    (void)order(owner, DONTNEED, between);
    CHECK_EQ(order(owner, READ, between), 0);
    CHECK_EQ(pager_stats(&rig).requests, 0);
    CHECK_EQ(pager_stats(&rig).removes, 3);
    close(urgent);
    close(bulk);
    end_lent(&rig, owner);
}

/* Once nothing is registered any more its owner does as it likes, and waits for nobody. */
static void given_back_after_the_end(void)
{
    struct rig rig;
    struct owner *owner = lend(&rig, PC_MEMORY_MEMFD);
    int urgent;

    arm_lent(&rig, owner);
    urgent = script_urgent(&rig, 0);
    for (uint64_t page = 0; page < rig.pages[0]; page++)
        serve_page(&rig, urgent, 0, page);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    for (uint64_t worker = 0; worker < OWNER_THREADS; worker++)
        give(owner, worker, DONTNEED, worker); /* in this moment */
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    for (uint64_t worker = 0; worker < OWNER_THREADS; worker++)
        (void)finish(owner, worker);
    (void)order(owner, PUNCH, 5);
    (void)order(owner, DONTNEED, 5);
    CHECK_EQ(order(owner, READ, 5), 0);
    order_write(owner, WRITE, 5, 5);
    (void)order(owner, DONTNEED, 5); /* which alone changes nothing */
    CHECK_EQ(order(owner, READ, 5), 5);
    close(urgent);
    end_lent(&rig, owner);
}

/* ---- at random ---------------------------------------------------------------------------------------------------- */

static void *peek_about(void *argument)
{
    const struct rig *rig = argument;
    const struct pc_memory *memory = &rig->dest[0];
    uint64_t random = test_.seed, *words = CHECK_SYS(mmap(NULL, memory->size_bytes, PROT_READ, MAP_SHARED, memory->fd, 0));

    while (!atomic_load(&rig->leashed)) { /* (used here as: enough) */
        random = mix(random);
        (void)*(volatile uint64_t *)&words[random % (memory->size_bytes / sizeof(*words))];
        pc_sleep_ns(20000);
    }
    CHECK_SYS(munmap(words, memory->size_bytes));
    return NULL;
}

/* All of it at once: faults, a push, memory that is given back, written to, and filled by a program that reads it meanwhile; then
 * nothing is registered any more, in the middle of that. */
static void at_random(int kind)
{
    struct rig rig;
    struct owner *owner = lend(&rig, kind);
    pthread_t reader;
    uint64_t seen;

    open_server(&rig, (uint64_t)64 << 20);
    tell_page_map(&rig);
    arm_lent(&rig, owner);
    connect_urgent(&rig, 0, NULL);
    connect_bulk(&rig, 0, NULL);
    connect_bulk(&rig, 1, NULL);
    CHECK_EQ(pthread_create(&reader, NULL, peek_about, &rig), 0);
    for (uint64_t worker = 0; worker < OWNER_THREADS; worker++)
        give(owner, worker, WORK, 0);
    WAIT_UNTIL(pager_stats(&rig).faults > 0);
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    atomic_store(&rig.leashed, true);
    CHECK_EQ(pthread_join(reader, NULL), 0);
    seen = atomic_load(&owner->steps);
    WAIT_UNTIL(atomic_load(&owner->steps) > seen + ROUNDS);
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    seen = atomic_load(&owner->steps);
    WAIT_UNTIL(atomic_load(&owner->steps) > seen + ROUNDS);
    atomic_store(&owner->stop, true);
    for (uint64_t worker = 0; worker < OWNER_THREADS; worker++)
        (void)finish(owner, worker);
    end_lent(&rig, owner);
}

#define OF_EACH_FILE(name)                                                                                                      \
    static void name##_memfd(void) { name(PC_MEMORY_MEMFD); }                                                                   \
    static void name##_hugetlb(void) { name(PC_MEMORY_HUGETLB); }
OF_EACH_FILE(pages_come)
OF_EACH_FILE(pages_are_forgotten)
OF_EACH_FILE(at_random)

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_CASE(pages_come_memfd);
    RUN_CASE(pages_come_hugetlb);
    RUN_CASE(pages_are_forgotten_memfd);
    RUN_CASE(pages_are_forgotten_hugetlb);
    RUN_CASE(the_file_is_cut_short);
    RUN_CASE(given_back);
    RUN_CASE(given_back_after_the_end);
    RUN_CASE(at_random_memfd);
    RUN_CASE(at_random_hugetlb);
    return test_end();
}
