/* SPDX-License-Identifier: Apache-2.0
 *
 * Everything at once on one userfaultfd, until the time is up: threads that fault in random order, two handlers that race
 * for the events, a copier in the background that fills pages without waking anybody, a thread that throws away memory beside
 * it and so makes every fill fail with EAGAIN until its event has been read, and between rounds all memory thrown away and
 * filled with new content.
 *
 * A page is a pattern which no page of zeros and no page of another round or place matches, with a counter at a place of its
 * own and a copy of it in the last word. Who increments holds the page's lock and knows what the counter has to be: a page
 * that was placed twice (a lost update), too early (zeros) or from the wrong round is seen by the next who comes by.
 *
 * POSTCOPY_STRESS_SECONDS, for each kind of memory, 2 unless said; POSTCOPY_SEED repeats the choices, not the races.
 */
#include <sys/eventfd.h>

#include "tests/support/huge_pool.h"
#include "tests/support/uffd_kinds.h"

#define TOUCHERS 4
#define HANDLERS 2
#define BATCH 8
#define TOUCHES_PER_PAGE 4
#define MOST_PAGES 512
#define DISCARDS 32 /* a round, of the memory beside */
#define SLACK_S 60 /* a last round on a busy machine, under a sanitizer */

struct page_state {
    pthread_mutex_t lock;
    uint64_t counter; /* what the page must say */
};

struct stress {
    struct area area, beside; /* on one userfaultfd */
    struct page_state pages[MOST_PAGES];
    uint64_t words;  /* in a page */
    uint64_t round;
    uint64_t *image; /* this round's content before anybody has counted */
    /* Held shared around each fill, so that the image and `gap` change between two of them. Never held by the thread which
     * throws memory away while it does so: it waits for a handler to read the event, who would wait for the lock. */
    pthread_rwlock_t filling;
    bool gap;        /* between rounds: nobody waits for a page, and what is filled now would be of the old round */
    bool over;       /* written before a barrier, read behind it */
    pthread_barrier_t begin, end;
    int stop;        /* eventfd: ends the handlers */
    _Atomic uint64_t faults, copied, existed, again, stale, removed_bytes, discards;
};

struct actor {
    pthread_t thread;
    struct stress *stress;
    uint64_t random;
    uint64_t queue[MOST_PAGES]; /* handlers: pages asked for and not answered yet, each once */
    uint32_t queued;
};

/* splitmix64 again, each thread its own. */
static uint64_t next(uint64_t *random)
{
    uint64_t x = *random += 0x9E3779B97F4A7C15;

    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

static uint64_t pattern(const struct stress *stress, uint64_t page, uint64_t word)
{
    uint64_t x = stress->round << 40 ^ page << 20 ^ word;

    x = (x + 1) * 0x9E3779B97F4A7C15;
    return (x ^ x >> 29) | 1; /* never zero */
}

/* The word of the counter: in the first half of the page, another for each page. */
static uint64_t counter_word(const struct stress *stress, uint64_t page)
{
    return page * 37 % (stress->words / 2);
}

static uint64_t *words_of(const struct stress *stress, uint64_t page)
{
    return (uint64_t *)(void *)(stress->area.base + page * stress->area.unit);
}

/* ---- filling ---- */

enum filled { FILLED, EXISTED, TRY_AGAIN, OF_NO_USE };

/* `again`: a page that was filled is filled once more, as after a lost answer: that must find it and leave it alone. Within the
 * same hold of the lock, since the next round begins with pages that are not there. */
static enum filled fill(struct stress *stress, uint64_t page, uint64_t mode, bool again)
{
    const struct area *area = &stress->area;
    enum filled filled = OF_NO_USE;
    int result;

    CHECK_EQ(pthread_rwlock_rdlock(&stress->filling), 0);
    if (!stress->gap) {
        const uint64_t *content = stress->image + page * stress->words;

        result = pc_uffd_copy(area->uffd, address_of(area, page), content, area->unit, mode, NULL);
        CHECK(!result || result == -EEXIST || result == -EAGAIN);
        if (!result && again)
            CHECK(pc_uffd_copy(area->uffd, address_of(area, page), content, area->unit, mode, NULL) != 0);
        filled = !result ? FILLED : result == -EEXIST ? EXISTED : TRY_AGAIN;
    }
    CHECK_EQ(pthread_rwlock_unlock(&stress->filling), 0);
    atomic_fetch_add(filled == FILLED    ? &stress->copied :
                     filled == EXISTED   ? &stress->existed :
                     filled == TRY_AGAIN ? &stress->again :
                                           &stress->stale,
                     1);
    return filled;
}

/* Reads what is there. Faults go into the queue: the thread that throws memory away must not wait for a page to be filled, as no
 * page can be filled before its event has been read. */
static void read_events(struct actor *handler)
{
    struct stress *stress = handler->stress;
    struct pc_uffd_event events[BATCH];
    uint64_t page;
    uint32_t at;
    int count = pc_uffd_read(stress->area.uffd, events, BATCH);

    CHECK(count >= 0);
    for (int i = 0; i < count; i++) {
        if (events[i].type == PC_UFFD_EVENT_REMOVE) {
            if (events[i].address == address_of(&stress->beside, 0))
                atomic_fetch_add(&stress->discards, 1);
            else
                atomic_fetch_add(&stress->removed_bytes, events[i].bytes);
            continue;
        }
        CHECK_EQ(events[i].type, PC_UFFD_EVENT_PAGEFAULT);
        atomic_fetch_add(&stress->faults, 1);
        page = (events[i].address - address_of(&stress->area, 0)) / stress->area.unit;
        CHECK(page < stress->area.pages);
        for (at = 0; at < handler->queued && handler->queue[at] != page; at++) {
        }
        handler->queue[at] = page; /* one answer wakes all who wait for it */
        handler->queued += at == handler->queued;
    }
}

static void answer(struct actor *handler, uint64_t page)
{
    struct stress *stress = handler->stress;
    const struct area *area = &stress->area;

    for (;;) {
        switch (fill(stress, page, 0, next(&handler->random) % 4 == 0)) {
        case TRY_AGAIN:
            read_events(handler);
            (void)sched_yield();
            continue;
        case EXISTED: /* the copier was here and has woken nobody */
            CHECK_EQ(pc_uffd_wake(area->uffd, address_of(area, page), area->unit), 0);
            return;
        case FILLED:
        case OF_NO_USE:
            return;
        }
    }
}

static void *handler_main(void *argument)
{
    struct actor *handler = argument;
    struct pollfd fds[] = {{.fd = handler->stress->area.uffd, .events = POLLIN},
                           {.fd = handler->stress->stop, .events = POLLIN}};

    while (!fds[1].revents) {
        if (poll(fds, PC_ARRAY_LENGTH(fds), -1) < 0)
            CHECK_EQ(errno, EINTR);
        read_events(handler);
        while (handler->queued) { /* any of them: order is nothing to rely on */
            uint32_t chosen = (uint32_t)(next(&handler->random) % handler->queued);
            uint64_t page = handler->queue[chosen];

            handler->queue[chosen] = handler->queue[--handler->queued];
            answer(handler, page);
        }
    }
    return NULL;
}

/* Every page once a round, in random order, half of them without a wake; none, in one round of four. */
static void *copier_main(void *argument)
{
    struct actor *copier = argument;
    struct stress *stress = copier->stress;
    uint32_t order[MOST_PAGES];

    for (;;) {
        uint64_t pages = stress->area.pages;

        (void)pthread_barrier_wait(&stress->begin);
        if (stress->over)
            return NULL;
        if (next(&copier->random) % 4 == 0)
            pages = 0;
        for (uint32_t i = 0; i < pages; i++) {
            uint64_t other = next(&copier->random) % (i + 1);

            order[i] = order[other];
            order[other] = i;
        }
        for (uint64_t i = 0; i < pages; i++)
            while (fill(stress, order[i], next(&copier->random) % 2 ? PC_UFFD_DONTWAKE : 0, false) == TRY_AGAIN)
                (void)sched_yield();
        (void)pthread_barrier_wait(&stress->end);
    }
}

static void *discarder_main(void *argument)
{
    struct actor *discarder = argument;
    struct stress *stress = discarder->stress;

    for (;;) {
        (void)pthread_barrier_wait(&stress->begin);
        if (stress->over)
            return NULL;
        for (int i = 0; i < DISCARDS; i++)
            CHECK_SYS(madvise(stress->beside.base, stress->beside.bytes, MADV_DONTNEED));
        (void)pthread_barrier_wait(&stress->end);
    }
}

/* ---- faulting ---- */

static void check_page(const struct stress *stress, uint64_t page, uint64_t word)
{
    const volatile uint64_t *words = words_of(stress, page);
    uint64_t at = counter_word(stress, page), last = stress->words - 1, has;

    has = words[at];
    if (has != stress->pages[page].counter)
        FAIL("round %" PRIu64 ", page %" PRIu64 ": counter %#" PRIx64 ", should be %#" PRIx64 "%s", stress->round, page, has,
             stress->pages[page].counter, has ? "" : ": a page of zeros");
    CHECK_EQ(words[last], has);
    if (word != at && word != last)
        CHECK_EQ(words[word], pattern(stress, page, word));
}

static void *toucher_main(void *argument)
{
    struct actor *toucher = argument;
    struct stress *stress = toucher->stress;

    for (;;) {
        (void)pthread_barrier_wait(&stress->begin);
        if (stress->over)
            return NULL;
        for (uint64_t i = 0; i < stress->area.pages * TOUCHES_PER_PAGE; i++) {
            uint64_t page = next(&toucher->random) % stress->area.pages;
            volatile uint64_t *words = words_of(stress, page);

            CHECK_EQ(pthread_mutex_lock(&stress->pages[page].lock), 0);
            check_page(stress, page, next(&toucher->random) % stress->words);
            stress->pages[page].counter++;
            words[counter_word(stress, page)]++;
            words[stress->words - 1]++;
            CHECK_EQ(pthread_mutex_unlock(&stress->pages[page].lock), 0);
        }
        (void)pthread_barrier_wait(&stress->end);
    }
}

/* ---- rounds ---- */

static void make_image(struct stress *stress)
{
    for (uint64_t page = 0; page < stress->area.pages; page++) {
        uint64_t *words = stress->image + page * stress->words, counter = pattern(stress, page, counter_word(stress, page));

        for (uint64_t word = 0; word < stress->words; word++)
            words[word] = pattern(stress, page, word);
        words[stress->words - 1] = counter;
        stress->pages[page].counter = counter;
    }
}

static void set_gap(struct stress *stress, bool gap)
{
    CHECK_EQ(pthread_rwlock_wrlock(&stress->filling), 0);
    stress->gap = gap;
    if (!gap) {
        stress->round++;
        make_image(stress);
    }
    CHECK_EQ(pthread_rwlock_unlock(&stress->filling), 0);
}

static void start_actor(struct actor *actor, struct stress *stress, void *(*run)(void *))
{
    actor->stress = stress;
    actor->random = test_random();
    CHECK_EQ(pthread_create(&actor->thread, NULL, run, actor), 0);
}

static uint64_t seconds_wanted(void)
{
    const char *text = getenv("POSTCOPY_STRESS_SECONDS");

    return text ? strtoull(text, NULL, 0) : 2;
}

static void stress_kind(enum kind kind)
{
    static struct stress stress;
    static struct actor handlers[HANDLERS], touchers[TOUCHERS], copier, discarder;
    uint64_t until_ns, rounds = 0;

    stress.area = arm(kind, kind == HUGETLB ? 8 : MOST_PAGES, PC_UFFD_MISSING, UFFD_FEATURE_EVENT_REMOVE);
    stress.beside = make_area(ANON, 1);
    stress.beside.uffd = stress.area.uffd;
    register_area(&stress.beside, PC_UFFD_MISSING);
    until_ns = pc_now_ns() + seconds_wanted() * 1000000000u;
    stress.words = stress.area.unit / sizeof(uint64_t);
    stress.image = CHECK_SYS(
        (uint64_t *)mmap(NULL, stress.area.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    stress.stop = CHECK_SYS(eventfd(0, EFD_CLOEXEC));
    CHECK_EQ(pthread_rwlock_init(&stress.filling, NULL), 0);
    for (uint64_t page = 0; page < stress.area.pages; page++)
        CHECK_EQ(pthread_mutex_init(&stress.pages[page].lock, NULL), 0);
    CHECK_EQ(pthread_barrier_init(&stress.begin, NULL, TOUCHERS + 3), 0);
    CHECK_EQ(pthread_barrier_init(&stress.end, NULL, TOUCHERS + 3), 0);
    for (int i = 0; i < HANDLERS; i++)
        start_actor(&handlers[i], &stress, handler_main);
    for (int i = 0; i < TOUCHERS; i++)
        start_actor(&touchers[i], &stress, toucher_main);
    start_actor(&copier, &stress, copier_main);
    start_actor(&discarder, &stress, discarder_main);

    do {
        set_gap(&stress, false);
        (void)pthread_barrier_wait(&stress.begin);
        (void)pthread_barrier_wait(&stress.end);
        for (uint64_t page = 0; page < stress.area.pages; page++)
            for (uint64_t word = 0; word < stress.words; word++)
                check_page(&stress, page, word);
        set_gap(&stress, true);
        CHECK_SYS(madvise(stress.area.base, stress.area.bytes, kind == ANON ? MADV_DONTNEED : MADV_REMOVE));
        rounds++;
        /* madvise returns when its event has been read, the handler counts a moment later. */
        while (atomic_load(&stress.removed_bytes) != rounds * stress.area.bytes)
            (void)sched_yield();
    } while (rounds < 2 || pc_now_ns() < until_ns);

    stress.over = true;
    (void)pthread_barrier_wait(&stress.begin);
    for (int i = 0; i < TOUCHERS; i++)
        CHECK_EQ(pthread_join(touchers[i].thread, NULL), 0);
    CHECK_EQ(pthread_join(copier.thread, NULL), 0);
    CHECK_EQ(pthread_join(discarder.thread, NULL), 0);
    CHECK_EQ(write(stress.stop, &(uint64_t){1}, sizeof(uint64_t)), sizeof(uint64_t));
    for (int i = 0; i < HANDLERS; i++)
        CHECK_EQ(pthread_join(handlers[i].thread, NULL), 0);
    CHECK_EQ(atomic_load(&stress.discards), rounds * DISCARDS); /* each reported once, none twice */
    CHECK(atomic_load(&stress.copied) >= rounds * stress.area.pages);
    (void)printf("     %" PRIu64 " rounds, %" PRIu64 " faults, %" PRIu64 " pages copied, %" PRIu64 " were there, %" PRIu64
                 " EAGAIN, %" PRIu64 " too late\n",
                 rounds, atomic_load(&stress.faults), atomic_load(&stress.copied), atomic_load(&stress.existed),
                 atomic_load(&stress.again), atomic_load(&stress.stale));
}

static void anon_stress(void)
{
    stress_kind(ANON);
}

static void memfd_stress(void)
{
    stress_kind(MEMFD);
}

static void hugetlb_stress(void)
{
    stress_kind(HUGETLB);
}

int main(int argc, char **argv)
{
    int deadline_s = (int)seconds_wanted() + SLACK_S;

    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_FOR(anon_stress, deadline_s);
    RUN_FOR(memfd_stress, deadline_s);
    RUN_FOR(hugetlb_stress, deadline_s);
    return test_end();
}
