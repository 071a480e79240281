/* SPDX-License-Identifier: Apache-2.0
 *
 * Pagers that die: the userfaultfd, the memory and the page states outlive them, and the next pager goes on.
 *
 * The machine is this process: its threads write to missing memory. The pagers are processes of their own (this program again,
 * executed), killed at random instants. No write may be lost, no page may come twice, and none may ever be seen as zeros.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>

#include "postcopy/engine.h"
#include "postcopy/uffd.h"
#include "tests/support/huge_pool.h"
#include "tests/support/tcp_pair.h"
#include "tests/support/test.h"

#define PAGES 8000
#define HUGE_PAGES 12
#define WRITERS 3
#define KILLS 40
#define LINE 256
#define MARK UINT64_C(0x5041474557524954)
#define DEADLINE_S 60

static char line[LINE];

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * UINT64_C(0xBF58476D1CE4E5B9) + UINT64_C(0x9E3779B97F4A7C15);
    return x ^ x >> 31;
}

/* Every fourth page is zero at the source. */
static uint64_t word_of(uint64_t page, uint64_t word)
{
    return page % 4 == 1 ? 0 : mix(page << 20 | word) | 1;
}

static void fill(const struct pc_memory *memory)
{
    uint64_t words = memory->page_bytes / sizeof(uint64_t);

    for (uint64_t page = 0; page < memory->size_bytes / memory->page_bytes; page++)
        for (uint64_t word = 0; word < words && page % 4 != 1; word++)
            ((uint64_t *)memory->base)[page * words + word] = word_of(page, word);
}

/* ---- the pager's process ---- */

/* Arguments: uffd, features, states, memory's descriptor, address, bytes, bytes of a page, kind, urgent, bulk. */
static int pager_process(char **arguments)
{
    uint64_t number[10];
    struct pc_pager *pager;
    struct pc_memory memory;
    struct pc_event event;

    for (int i = 0; i < 10; i++)
        number[i] = strtoull(arguments[i], NULL, 0);
    memory = (struct pc_memory){.base = (void *)(uintptr_t)number[4],
                                .size_bytes = number[5],
                                .page_bytes = number[6],
                                .kind = (int)number[7],
                                .fd = (int)number[3]};
    CHECK_EQ(pc_pager_new(-1, &pager), 0);
    CHECK_EQ(pc_pager_add_block(pager, &memory, (int)number[2]), 0);
    if (pc_pager_adopt_shard(pager, (int)number[0], number[1], 0, line, LINE) ||
        pc_pager_arm(pager, 0, 0, 0, memory.size_bytes / memory.page_bytes, line, LINE))
        FAIL("%s", line);
    CHECK_EQ(pc_pager_attach_urgent(pager, 0, (int)number[8], NULL), 0);
    CHECK_EQ(pc_pager_attach_bulk(pager, 0, (int)number[9], NULL), 0);
    for (;;) {
        struct pollfd readable = {.fd = pc_pager_event_fd(pager), .events = POLLIN};

        (void)poll(&readable, 1, 20);
        while (pc_pager_next_event(pager, &event) == 1)
            if (event.type == PC_EVENT_FATAL)
                FAIL("the pager cannot go on: %s", event.text);
    }
}

/* ---- the machine ---- */

struct machine {
    struct pc_memory memory, source;
    struct pc_pageserver *server;
    uint64_t pages, features;
    int uffd, states;
};

struct writer {
    struct machine *machine;
    uint64_t own;
    pthread_t thread;
};

/* Each page twice, by one thread: what the first pass wrote must be there in the second. */
static void *write_pages(void *argument)
{
    struct writer *writer = argument;
    struct machine *machine = writer->machine;
    uint64_t words = machine->memory.page_bytes / sizeof(uint64_t), stride = 1 + mix(test_.seed + writer->own) % 97;

    for (uint64_t pass = 0; pass < 2; pass++)
        for (uint64_t i = 0; i < machine->pages; i++) {
            uint64_t page = i * stride % machine->pages, word = mix(page) % (words - 1);
            volatile uint64_t *at = (volatile uint64_t *)machine->memory.base + page * words + word;

            if (page % WRITERS != writer->own)
                continue;
            if (pass == 0) {
                /* A page is visited again where the stride divides their number. */
                if (*at != word_of(page, word) && *at != MARK + page)
                    FAIL("page %llu came with something else", (unsigned long long)page);
                *at = MARK + page;
            } else if (*at != MARK + page && *at != word_of(page, word)) {
                FAIL("a write to page %llu was lost", (unsigned long long)page);
            }
        }
    return NULL;
}

static pid_t start_pager(struct machine *machine)
{
    int urgent[2], bulk[2], fds[5];
    char text[10][24], *arguments[13] = {(char *)(uintptr_t)"test_states", (char *)(uintptr_t)"--pager"};
    uint64_t number[10];
    pid_t child;

    tcp_pair(urgent);
    tcp_pair(bulk);
    CHECK_EQ(pc_pageserver_attach_urgent(machine->server, 0, urgent[0], NULL, 0), 0);
    CHECK_EQ(pc_pageserver_attach_bulk(machine->server, 0, bulk[0], NULL), 0);
    fds[0] = machine->uffd;
    fds[1] = machine->states;
    fds[2] = machine->memory.fd;
    fds[3] = urgent[1];
    fds[4] = bulk[1];
    number[0] = (uint64_t)fds[0];
    number[1] = machine->features;
    number[2] = (uint64_t)fds[1];
    number[3] = (uint64_t)fds[2]; /* -1 comes back as -1 */
    number[4] = (uint64_t)(uintptr_t)machine->memory.base;
    number[5] = machine->memory.size_bytes;
    number[6] = machine->memory.page_bytes;
    number[7] = (uint64_t)machine->memory.kind;
    number[8] = (uint64_t)fds[3];
    number[9] = (uint64_t)fds[4];
    for (int i = 0; i < 10; i++) {
        (void)snprintf(text[i], sizeof(text[i]), "%llu", (unsigned long long)number[i]);
        arguments[2 + i] = text[i];
    }
    child = CHECK_SYS(fork());
    if (!child) {
        for (int i = 0; i < 5; i++)
            (void)fcntl(fds[i], F_SETFD, 0);
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        execv("/proc/self/exe", arguments);
        _exit(127);
    }
    close(urgent[1]);
    close(bulk[1]);
    return child;
}

/* A pager is gone: its threads and what they had in the kernel as well, once it has been waited for. */
static void end_pager(struct machine *machine, pid_t child)
{
    int status;

    (void)kill(child, SIGKILL);
    CHECK_SYS(waitpid(child, &status, 0));
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        FAIL("a pager has ended with status %#x", (unsigned)status);
    CHECK_EQ(pc_pageserver_disconnect(machine->server), 0);
}

static uint64_t *known_words(const struct machine *machine, uint64_t *known)
{
    static uint64_t words[PAGES / 64 + 1];

    CHECK_EQ(pc_states_received(machine->states, machine->pages, words), 0);
    *known = 0;
    for (uint64_t word = 0; word < pc_bitmap_words(machine->pages); word++)
        *known += (uint64_t)__builtin_popcountll(words[word]);
    return words;
}

static void check_pages(const struct machine *machine)
{
    uint64_t words = machine->memory.page_bytes / sizeof(uint64_t);
    const uint64_t *at = machine->memory.base;

    for (uint64_t page = 0; page < machine->pages; page++)
        for (uint64_t word = 0; word < words; word++)
            if (at[page * words + word] != word_of(page, word) && at[page * words + word] != MARK + page)
                FAIL("page %llu is wrong", (unsigned long long)page);
}

static void open_machine(struct machine *machine, int kind)
{
    struct pc_uffd_api api;
    uint64_t ioctls;
    int result = pc_uffd_probe(PC_UFFD_ANY, &api);

    if (result || api.how == PC_UFFD_USER_ONLY)
        SKIP("uffd", "no userfaultfd: %s", strerror(result ? -result : EPERM));
    memset(machine, 0, sizeof(*machine));
    machine->pages = kind == PC_MEMORY_HUGETLB ? HUGE_PAGES : PAGES;
    for (int i = 0; i < 2; i++) {
        uint64_t page_bytes = kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();

        result = pc_memory_create(kind, machine->pages * page_bytes, i ? &machine->source : &machine->memory, line, LINE);
        if (result == -ENOMEM && kind == PC_MEMORY_HUGETLB)
            SKIP("hugetlb", "%s", line);
        if (result)
            FAIL("%s", line);
    }
    fill(&machine->source);
    machine->features = pc_pager_features(api.features);
    machine->uffd = pc_uffd_open(api.how, machine->features, &api);
    CHECK(machine->uffd >= 0);
    CHECK_EQ(pc_uffd_register(machine->uffd, (uint64_t)(uintptr_t)machine->memory.base, machine->memory.size_bytes,
                              PC_UFFD_MISSING | (kind == PC_MEMORY_ANON ? 0 : PC_UFFD_MINOR), &ioctls),
             0);
    machine->states = pc_states_new(machine->pages);
    CHECK(machine->states >= 0);
    CHECK_EQ(pc_pageserver_new(kind == PC_MEMORY_HUGETLB ? 400000000 : 20000000, &machine->server), 0);
    CHECK_EQ(pc_pageserver_add_block(machine->server, &machine->source, machine->memory.page_bytes), 0);
}

static void close_machine(struct machine *machine)
{
    pc_pageserver_free(machine->server);
    close(machine->uffd);
    close(machine->states);
    pc_memory_destroy(&machine->memory);
    pc_memory_destroy(&machine->source);
}

static void killed_at_random(int kind)
{
    struct writer writers[WRITERS];
    struct machine machine;
    uint64_t known, *words;
    int kills = 0;
    pid_t last;

    open_machine(&machine, kind);
    for (int i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){.machine = &machine, .own = (uint64_t)i};
        CHECK_EQ(pthread_create(&writers[i].thread, NULL, write_pages, &writers[i]), 0);
    }
    CHECK_EQ(pc_pageserver_start(machine.server), 0);
    for (words = known_words(&machine, &known); known < machine.pages; words = known_words(&machine, &known)) {
        pid_t pager = start_pager(&machine);
        uint64_t before = known;

        if (kills < KILLS) {
            /* Not before it has done something, or a slow build would only ever kill what is about to begin. */
            while (known == before) {
                (void)known_words(&machine, &known);
                (void)nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL); /* or this takes the processor from the pager */
            }
            (void)nanosleep(&(struct timespec){.tv_nsec = (long)test_below(1500000)}, NULL);
            kills++;
        }
        while (kills == KILLS && known < machine.pages)
            (void)known_words(&machine, &known);
        end_pager(&machine, pager);
        CHECK(pc_states_settle(machine.states, &machine.memory) >= 0);
        CHECK_EQ(pc_states_settle(machine.states, &machine.memory), 0);
        words = known_words(&machine, &known);
        CHECK_EQ(pc_pageserver_set_received(machine.server, 0, words), 0);
    }
    /* Who faulted on a page just before it was known to be zero, or threw it away, still needs a pager. */
    last = start_pager(&machine);
    for (int i = 0; i < WRITERS; i++)
        CHECK_EQ(pthread_join(writers[i].thread, NULL), 0);
    end_pager(&machine, last);
    CHECK(kills > (kind == PC_MEMORY_HUGETLB ? 0 : 5));
    CHECK_EQ(pc_uffd_unregister(machine.uffd, (uint64_t)(uintptr_t)machine.memory.base, machine.memory.size_bytes), 0);
    check_pages(&machine);
    close_machine(&machine);
}

static void killed_at_random_memfd(void)
{
    killed_at_random(PC_MEMORY_MEMFD);
}

static void killed_at_random_anon(void)
{
    killed_at_random(PC_MEMORY_ANON);
}

static void killed_at_random_hugetlb(void)
{
    killed_at_random(PC_MEMORY_HUGETLB);
}

/* What was under way is settled by the page table: here made by hand, one page of each fate. */
static void under_way(void)
{
    struct machine machine;
    uint64_t *claimed, known, done, *words;

    open_machine(&machine, PC_MEMORY_MEMFD);
    claimed = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, machine.states, 0);
    CHECK(claimed != MAP_FAILED);
    claimed += 4096 / sizeof(*claimed); /* the first map after the header */
    CHECK_EQ(pc_uffd_copy(machine.uffd, (uint64_t)(uintptr_t)machine.memory.base + 70 * pc_page_bytes(),
                          machine.source.base, pc_page_bytes(), 0, &done),
             0);
    claimed[0] = 1 << 7;  /* never placed */
    claimed[1] = 1 << 6;  /* placed: page 70 */
    CHECK_EQ(pwrite(machine.memory.fd, "x", 1, 133 * (off_t)pc_page_bytes()), 1); /* somebody else's, and not under way */
    CHECK_EQ(pc_states_settle(machine.states, &machine.memory), 2);
    CHECK_EQ(claimed[0], 0);
    CHECK_EQ(claimed[1], 1 << 6);
    words = known_words(&machine, &known);
    CHECK_EQ(known, 1);
    CHECK_EQ(words[1], 1 << 6);
    CHECK_EQ(pc_states_settle(machine.states, &machine.memory), 0);
    close_machine(&machine);
}

/* A page that was placed, written to by the machine, and then taken out of its page table, as swapping shared memory does: nothing
 * tells it from a hole that somebody else has filled. It is never fetched again. */
static void swapped_out_before_it_was_settled(void)
{
    struct machine machine;
    struct pc_pager *pager;
    uint64_t *claimed, known, done, *words;
    uint8_t byte;

    open_machine(&machine, PC_MEMORY_MEMFD);
    claimed = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, machine.states, 0);
    CHECK(claimed != MAP_FAILED);
    claimed += 4096 / sizeof(*claimed);
    for (uint64_t page = 2; page < 4; page++)
        CHECK_EQ(pc_uffd_copy(machine.uffd, (uint64_t)(uintptr_t)machine.memory.base + page * pc_page_bytes(), machine.source.base,
                              pc_page_bytes(), 0, &done),
                 0);
    ((volatile uint8_t *)machine.memory.base)[2 * pc_page_bytes()] = 77;
    CHECK_SYS(madvise((uint8_t *)machine.memory.base + 2 * pc_page_bytes(), pc_page_bytes(), MADV_DONTNEED));
    claimed[0] = 1 << 2 | 1 << 3 | 1 << 4;
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(pc_states_settle(machine.states, &machine.memory), -ENOTRECOVERABLE);
        CHECK_EQ(claimed[0], 1 << 2 | 1 << 3); /* the others are settled all the same */
        words = known_words(&machine, &known);
        CHECK_EQ(known, 1);
        CHECK_EQ(words[0], 1 << 3);
    }
    CHECK_EQ(pc_pager_new(-1, &pager), 0);
    CHECK_EQ(pc_pager_add_block(pager, &machine.memory, machine.states), -EUCLEAN);
    CHECK_EQ(pc_pager_free(pager), 0);
    CHECK_EQ(pread(machine.memory.fd, &byte, 1, 2 * (off_t)pc_page_bytes()), 1);
    CHECK_EQ(byte, 77);
    close_machine(&machine);
}

/* What is counted outlives who counted it. */
static void counted_across_pagers(void)
{
    struct pc_metrics *metrics;
    struct pc_memory memory;
    struct pc_pager_stats stats;
    struct pc_histogram histogram;
    struct pc_pager *pager;
    uint64_t zero = 0xff, blocked_ns[2];

    CHECK_EQ(pc_metrics_new(&metrics), 0);
    CHECK_EQ(pc_memory_create(PC_MEMORY_MEMFD, 64 * pc_page_bytes(), &memory, line, LINE), 0);
    for (uint64_t i = 1; i <= 2; i++) {
        CHECK_EQ(pc_pager_new(pc_metrics_fd(metrics), &pager), 0);
        CHECK_EQ(pc_pager_add_block(pager, &memory, -1), 0);
        CHECK_EQ(pc_pager_set_zero(pager, 0, &zero), 0);
        CHECK_EQ(pc_metrics_stats(metrics, &stats), 0);
        CHECK_EQ(stats.zero_pages, 8 * i);
        CHECK_EQ(stats.total_pages + stats.pending_faults, 0);
        CHECK_EQ(pc_pager_stats(pager, &stats), 0);
        CHECK_EQ(stats.zero_pages, 8 * i);
        CHECK_EQ(stats.resident_pages, 8);
        CHECK_EQ(pc_pager_free(pager), 0);
    }
    CHECK_EQ(pc_metrics_latency(metrics, PC_STAGE_TOTAL, &histogram), 0);
    CHECK_EQ(pc_metrics_latency(metrics, PC_STAGES, &histogram), -EINVAL);
    CHECK_EQ(pc_metrics_blocktime(metrics, blocked_ns, 2), 2);
    CHECK_EQ(pc_pager_new(memory.fd, &pager), -EINVAL);
    pc_memory_destroy(&memory);
    pc_metrics_free(metrics);
}

static void strangers_are_refused(void)
{
    uint64_t word[2];
    struct pc_memory memory;
    struct pc_pager *pager;
    int fd = pc_states_new(100), other = CHECK_SYS(memfd_create("other", MFD_CLOEXEC));
    uint64_t *claimed;

    CHECK(fd >= 0);
    CHECK_EQ(pc_states_new(0), -EINVAL);
    CHECK_EQ(pc_states_received(fd, 100, word), 0);
    CHECK_EQ(pc_states_received(fd, 101, word), -EINVAL);
    CHECK_EQ(pc_states_received(other, 100, word), -EINVAL); /* empty */
    CHECK_SYS(ftruncate(other, 8192));
    CHECK_EQ(pc_states_received(other, 100, word), -EINVAL); /* zeros */
    CHECK_EQ(pwrite(other, "pstates2d\0\0\0\0\0\0", 16, 0), 16);
    CHECK_EQ(pc_states_received(other, 100, word), -EINVAL); /* another size, and not sealed */
    CHECK_EQ(pc_states_received(-1, 100, word), -EBADF);

    CHECK_EQ(pc_memory_create(PC_MEMORY_MEMFD, 100 * pc_page_bytes(), &memory, line, LINE), 0);
    CHECK_EQ(pc_pager_new(-1, &pager), 0);
    CHECK_EQ(pc_pager_add_block(pager, &memory, other), -EINVAL);
    claimed = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(claimed != MAP_FAILED);
    claimed[4096 / sizeof(*claimed)] = 4;
    CHECK_EQ(pc_pager_add_block(pager, &memory, fd), -EUCLEAN); /* nobody has settled them */
    CHECK_EQ(pc_pager_adopt_shard(pager, -1, 0, 0, line, LINE), -EBADF);
    CHECK_EQ(pc_pager_free(pager), 0);
    pc_memory_destroy(&memory);
    close(fd);
    close(other);
}

int main(int argc, char **argv)
{
    if (argc == 12 && !strcmp(argv[1], "--pager"))
        return pager_process(argv + 2);
    test_begin(argc, argv);
    borrow_huge_pages(2 * HUGE_PAGES + 2);
    RUN_FOR(killed_at_random_memfd, DEADLINE_S);
    RUN_FOR(killed_at_random_anon, DEADLINE_S);
    RUN_FOR(killed_at_random_hugetlb, DEADLINE_S);
    RUN(under_way);
    RUN(swapped_out_before_it_was_settled);
    RUN(counted_across_pagers);
    RUN(strangers_are_refused);
    return test_end();
}
