/* SPDX-License-Identifier: Apache-2.0
 *
 * A userfaultfd of another process, as a VMM hands it over: that process is a child of the case, and does with its memory what it is
 * ordered to, or at random. Pagers come, are killed, and others take over, without any right over the VMM but its userfaultfd.
 *
 * Linked with --wrap: a pager can be killed at the instant at which it has read that memory was taken away, or has placed a page, and
 * has not put it into the maps.
 */
#include "tests/support/huge_pool.h"
#include "tests/support/rig.h"
#include "memory/states.h"
#include "pager/pager.h"

#define EVENT_REMOVE (UINT64_C(1) << 3)
#define MARK UINT64_C(0x5041474557524954)
#define WORKERS 40
#define RANDOM_PAGES 3000
#define RANDOM_WORKERS 3
#define KILLS (200 / SLOW)

/* ---- the VMM ------------------------------------------------------------------------------------------------------ */

enum op { IDLE, READ, WRITE, REMOVE, REMOVE_EACH, REPLACE, PROTECT, MEDDLE, DONE };
enum seen { SEEN_ZERO, SEEN_SOURCE, SEEN_OWN, SEEN_ELSE };

struct order {
    atomic_int op;
    uint64_t page, pages;
    int result;
};

/* Shared by both processes. */
struct vmm {
    uint64_t features, mode, pages, page_bytes;
    bool huge, shared, at_random;
    pid_t pid;
    int uffd_number;
    uint8_t *address;
    atomic_bool ready, stop;
    atomic_ulong steps;
    struct order orders[WORKERS];
};

struct worker {
    struct vmm *vmm;
    uint64_t number;
    pthread_t thread;
};

static uint8_t *vmm_page(const struct vmm *vmm, uint64_t page)
{
    return vmm->address + page * vmm->page_bytes;
}

static int look(const struct vmm *vmm, uint64_t page)
{
    const uint8_t *at = vmm_page(vmm, page);

    if (is_page(0, page, vmm->page_bytes, at) && content_of(0, page) == DATA)
        return SEEN_SOURCE;
    if (*(const volatile uint64_t *)at == MARK + page)
        return SEEN_OWN;
    return pc_is_zero(at, vmm->page_bytes) ? SEEN_ZERO : SEEN_ELSE;
}

static void obey(const struct vmm *vmm, struct order *order)
{
    uint8_t *at = vmm_page(vmm, order->page);
    uint64_t bytes = order->pages * vmm->page_bytes;

    switch (atomic_load(&order->op)) {
    case READ:
        order->result = look(vmm, order->page);
        break;
    case WRITE:
        *(volatile uint64_t *)at = MARK + order->page;
        break;
    case REMOVE:
        CHECK_SYS(madvise(at, bytes, MADV_DONTNEED));
        break;
    case REMOVE_EACH: /* in many system calls */
        for (uint64_t i = 0; i < 100 * order->pages; i++)
            CHECK_SYS(madvise(vmm_page(vmm, order->page + i % order->pages), vmm->page_bytes, MADV_DONTNEED));
        break;
    case REPLACE: /* new memory, that no userfaultfd knows of */
        CHECK(mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
        break;
    case PROTECT: /* two more mappings */
        CHECK_SYS(mprotect(at, bytes, PROT_READ));
        break;
    case MEDDLE:
        for (uint64_t i = 0; i < order->pages; i++)
            CHECK_SYS(fcntl(vmm->uffd_number, F_SETFL, 0));
        break;
    default:
        break;
    }
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct vmm *vmm = worker->vmm;
    struct order *order = &vmm->orders[worker->number];

    for (;;) {
        int op = atomic_load(&order->op);

        if (op == IDLE || op == DONE) {
            pc_sleep_ns(50000);
            continue;
        }
        obey(vmm, order);
        atomic_store(&order->op, DONE);
    }
    return NULL;
}

/* What a page must have in it: `word`, and beside the first word what was there before that was written. */
struct model {
    uint64_t first;
    bool written, zero;
};

static uint64_t expected(const struct model *model, uint64_t page, uint64_t word)
{
    if (word == 0 && model->written)
        return model->first;
    return model->zero ? 0 : word_of(0, page, word);
}

static void *work_at_random(void *argument)
{
    struct worker *worker = argument;
    struct vmm *vmm = worker->vmm;
    uint64_t words = vmm->page_bytes / sizeof(uint64_t), own = vmm->pages / RANDOM_WORKERS;
    struct model *models = calloc(own, sizeof(*models));
    uint64_t random = mix(test_.seed + worker->number);
    bool last;

    CHECK(models != NULL);
    do {
        last = atomic_load(&vmm->stop);
        for (uint64_t i = 0; i < own; i++) {
            uint64_t one, page, word, seen;
            struct model *model;
            volatile uint64_t *at;

            random = mix(random);
            one = last ? i : random % own;
            model = &models[one];
            page = one * RANDOM_WORKERS + worker->number; /* neighbours belong to others */
            at = (volatile uint64_t *)vmm_page(vmm, page);
            word = (random >> 20) % words;
            seen = at[word];
            if (seen != expected(model, page, word))
                FAIL("page %llu has %#llx in word %llu, should be %#llx (%s%s)", (unsigned long long)page, (unsigned long long)seen,
                     (unsigned long long)word, (unsigned long long)expected(model, page, word), model->zero ? "zero" : "source",
                     model->written ? ", written to" : "");
            switch (last ? 0 : random >> 40 & 3) {
            case 1:
                at[0] = model->first = random | 1;
                model->written = true;
                break;
            case 2:
                CHECK_SYS(madvise((void *)(uintptr_t)at, vmm->page_bytes, MADV_DONTNEED));
                *model = (struct model){.zero = true};
                break;
            default:
                break;
            }
            atomic_fetch_add(&vmm->steps, 1);
        }
    } while (!last);
    free(models);
    return NULL;
}

_Noreturn static void be_vmm(struct vmm *vmm)
{
    uint64_t bytes = vmm->pages * vmm->page_bytes, ioctls;
    struct worker workers[WORKERS];
    uint64_t count = vmm->at_random ? RANDOM_WORKERS : WORKERS;
    int fd = vmm->shared ? CHECK_SYS(memfd_create("vmm", MFD_CLOEXEC)) : -1;

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (fd >= 0) {
        CHECK_SYS(ftruncate(fd, (off_t)bytes));
        CHECK_EQ(pwrite(fd, "x", 1, 0), 1); /* page 0 is there before it is mapped */
    }
    vmm->address = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (vmm->huge ? MAP_HUGETLB : 0), fd, 0);
    if (vmm->address == MAP_FAILED)
        test_exit_(TEST_SKIPPED);
    if (!vmm->huge)
        (void)madvise(vmm->address, bytes, MADV_NOHUGEPAGE);
    vmm->uffd_number = pc_uffd_open(PC_UFFD_ANY, vmm->features, NULL);
    if (vmm->uffd_number < 0 ||
        pc_uffd_register(vmm->uffd_number, (uint64_t)(uintptr_t)vmm->address, bytes, vmm->mode, &ioctls))
        test_exit_(TEST_SKIPPED);
    for (uint64_t i = 0; i < count; i++) {
        workers[i] = (struct worker){.vmm = vmm, .number = i};
        CHECK_EQ(pthread_create(&workers[i].thread, NULL, vmm->at_random ? work_at_random : work, &workers[i]), 0);
    }
    atomic_store(&vmm->ready, true);
    for (uint64_t i = 0; i < count; i++)
        CHECK_EQ(pthread_join(workers[i].thread, NULL), 0);
    test_exit_(0);
}

/* ---- the case's side of it ---------------------------------------------------------------------------------------- */

struct guest { /* a VMM, and what a keeper keeps of it */
    struct vmm *vmm;
    struct pc_memory memory; /* of the VMM: no address of this process */
    int uffd, states;
};

static void start_vmm(struct guest *guest, struct vmm wanted)
{
    int pidfd, status;
    pid_t pid;

    need_uffd();
    memset(guest, 0, sizeof(*guest));
    guest->vmm = CHECK_SYS(mmap(NULL, sizeof(wanted), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    wanted.page_bytes = wanted.huge ? pc_huge_page_bytes() : pc_page_bytes();
    wanted.mode = wanted.mode ? wanted.mode : PC_UFFD_MISSING;
    *guest->vmm = wanted;
    pid = CHECK_SYS(fork());
    if (!pid)
        be_vmm(guest->vmm);
    guest->vmm->pid = pid;
    while (!atomic_load(&guest->vmm->ready)) {
        if (waitpid(guest->vmm->pid, &status, WNOHANG) > 0)
            SKIP(wanted.huge ? "hugetlb" : "uffd-features", "no such memory, or no userfaultfd with features %#llx",
                 (unsigned long long)wanted.features);
        pc_sleep_ns(100000);
    }
    pidfd = CHECK_SYS((int)syscall(SYS_pidfd_open, guest->vmm->pid, 0));
    guest->uffd = CHECK_SYS((int)syscall(SYS_pidfd_getfd, pidfd, guest->vmm->uffd_number, 0));
    close(pidfd);
    guest->states = pc_states_new(wanted.pages);
    CHECK(guest->states >= 0);
    guest->memory = (struct pc_memory){.base = guest->vmm->address,
                                       .size_bytes = wanted.pages * wanted.page_bytes,
                                       .page_bytes = wanted.page_bytes,
                                       .kind = wanted.huge ? PC_MEMORY_HUGETLB : wanted.shared ? PC_MEMORY_MEMFD : PC_MEMORY_ANON,
                                       .fd = -1};
}

static void end_vmm(struct guest *guest)
{
    int status;

    (void)kill(guest->vmm->pid, SIGKILL);
    CHECK_SYS(waitpid(guest->vmm->pid, &status, 0));
    close(guest->uffd);
    close(guest->states);
}

static void start_order(struct guest *guest, int worker, enum op op, uint64_t page, uint64_t pages)
{
    struct order *order = &guest->vmm->orders[worker];

    order->page = page;
    order->pages = pages;
    atomic_store(&order->op, op);
}

static bool is_done(struct guest *guest, int worker)
{
    return atomic_load(&guest->vmm->orders[worker].op) == DONE;
}

static int finish_order(struct guest *guest, int worker)
{
    WAIT_UNTIL(is_done(guest, worker));
    atomic_store(&guest->vmm->orders[worker].op, IDLE);
    return guest->vmm->orders[worker].result;
}

static int do_order(struct guest *guest, enum op op, uint64_t page, uint64_t pages)
{
    start_order(guest, 0, op, page, pages);
    return finish_order(guest, 0);
}

/* A pager of this process for it, that is armed with nothing yet. */
static void open_adopted(struct rig *rig, struct guest *guest)
{
    memset(rig, 0, sizeof(*rig));
    rig->kind = guest->memory.kind;
    rig->page_bytes = guest->memory.page_bytes;
    rig->blocks = 1;
    rig->pages[0] = guest->vmm->pages;
    rig->dest[0] = guest->memory;
    CHECK_EQ(pc_pager_new(-1, &rig->pager), 0);
    rig->from_pager = (struct inbox){.owner = rig->pager, .fd = pc_pager_event_fd(rig->pager), .next = next_pager_event};
    CHECK_EQ(pc_pager_add_block(rig->pager, &guest->memory, guest->states), 0);
    if (pc_pager_adopt_shard(rig->pager, CHECK_SYS(fcntl(guest->uffd, F_DUPFD_CLOEXEC, 0)), 0, 0, message, sizeof(message)))
        FAIL("%s", message); /* its features it finds out itself */
}

static void close_adopted(struct rig *rig, struct guest *guest)
{
    CHECK_EQ(pc_pager_free(rig->pager), 0);
    end_vmm(guest);
    CHECK_LEAKS();
}

static void serve_all(struct rig *rig, int fd)
{
    for (uint64_t page = 0; page < rig->pages[0]; page++)
        serve_page(rig, fd, 0, page);
    EXPECT_EVENT(&rig->from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    EXPECT_NO_EVENT(&rig->from_pager, PC_EVENT_FATAL);
}

static uint64_t data_page(const struct rig *rig, uint64_t from)
{
    uint64_t page = from - 1;

    return next_data_page(rig, &page);
}

/* So many faults have not been read, says the kernel. */
static unsigned unread_faults(const struct guest *guest)
{
    char path[64], line[128];
    unsigned count = 0;
    FILE *info;

    (void)snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", guest->uffd);
    info = fopen(path, "re");
    CHECK(info != NULL);
    while (fgets(line, sizeof(line), info))
        (void)sscanf(line, "pending: %u", &count);
    (void)fclose(info);
    return count;
}

/* ---- memory that is taken away ------------------------------------------------------------------------------------ */

/* The kernel gives the fault before the event that came first: nobody is asked, and the thread sees zeros. */
static void fault_and_removal_in_one_read(void)
{
    struct guest guest;
    struct rig rig;
    int fd;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 64});
    open_adopted(&rig, &guest);
    fd = script_urgent(&rig, 0);
    start_order(&guest, 0, REMOVE, 0, 1);
    CHECK(speaks(guest.uffd, PATIENCE_MS)); /* the event, which nobody reads before something is armed */
    start_order(&guest, 1, READ, 0, 1);
    WAIT_UNTIL(unread_faults(&guest) == 1);
    CHECK(!is_done(&guest, 0));
    arm(&rig, 0, 0, 0, 64);
    (void)finish_order(&guest, 0);
    CHECK_EQ(finish_order(&guest, 1), SEEN_ZERO);
    CHECK_EQ(pager_stats(&rig).requests, 0);
    CHECK_EQ(pager_stats(&rig).removes, 1);
    CHECK_EQ(pager_stats(&rig).removed_pages, 1);
    serve_all(&rig, fd);
    CHECK_EQ(do_order(&guest, READ, 0, 1), SEEN_ZERO);
    CHECK_EQ(do_order(&guest, READ, data_page(&rig, 1), 1), SEEN_SOURCE);
    close(fd);
    close_adopted(&rig, &guest);
}

/* More than can be kept of what is not armed yet: then the VMM waits, and nothing is lost. */
static void taken_away_before_it_is_armed(void)
{
    struct guest guest;
    struct rig rig;
    int fd, waiting = 0;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 512});
    open_adopted(&rig, &guest);
    fd = script_urgent(&rig, 0);
    arm(&rig, 0, 0, 0, 64);
    (void)do_order(&guest, REMOVE, 60, 8); /* across the edge of what is armed */
    for (uint64_t i = 0; i < 62; i++) /* each alone */
        (void)do_order(&guest, REMOVE, 100 + 2 * i, 1);
    (void)do_order(&guest, REMOVE, 67, 10); /* as one with the first */
    (void)do_order(&guest, REMOVE, 300, 1); /* the last for which there is room */
    for (int i = 0; i < 8; i++)
        start_order(&guest, i, REMOVE, 310 + 2 * (uint64_t)i, 1);
    WAIT_UNTIL(pager_stats(&rig).removes > 65); /* one more at least was read, and is kept where it was read */
    for (int i = 0; i < 8; i++)
        waiting += !is_done(&guest, i);
    (void)waiting; /* how many of them were read at once is the kernel's affair */
    arm(&rig, 0, 0, 64, 448);
    for (int i = 0; i < 8; i++)
        (void)finish_order(&guest, i);
    serve_all(&rig, fd);
    for (uint64_t page = 60; page < 77; page++)
        CHECK_EQ(do_order(&guest, READ, page, 1), SEEN_ZERO);
    for (uint64_t i = 0; i < 62; i++)
        CHECK_EQ(do_order(&guest, READ, 100 + 2 * i, 1), SEEN_ZERO);
    for (uint64_t i = 0; i < 8; i++)
        CHECK_EQ(do_order(&guest, READ, 310 + 2 * i, 1), SEEN_ZERO);
    CHECK_EQ(do_order(&guest, READ, data_page(&rig, 340), 1), SEEN_SOURCE);
    CHECK_EQ(pager_stats(&rig).requests, 0); /* all of it had come */
    close(fd);
    close_adopted(&rig, &guest);
}

/* There is no room for what was read, and what was not read is refused: a pager that ends then does end, and nobody waits for it. */
static void ends_with_no_room(void)
{
    struct guest guest;
    struct rig rig;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 512});
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 64);
    for (uint64_t i = 0; i < PC_JOURNAL_EXTENTS; i++)
        (void)do_order(&guest, REMOVE, 100 + 2 * i, 1);
    start_order(&guest, 0, REMOVE, 300, 1);
    WAIT_UNTIL(pager_stats(&rig).removes > PC_JOURNAL_EXTENTS);
    start_order(&guest, 1, REMOVE, 310, 1);
    CHECK(speaks(guest.uffd, PATIENCE_MS));
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    for (int i = 0; i < 2; i++)
        (void)finish_order(&guest, i);
    end_vmm(&guest);
}

/* What a dead pager had read is in the journal, here by hand: both ways of keeping it, and a part of a huge page, which stays. */
static void what_a_dead_pager_had_read(bool huge)
{
    struct guest guest;
    struct pc_states states;
    struct pc_journal *journal;
    uint64_t address, page_bytes, edge;
    struct rig rig;
    int fd;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE | (huge ? UINT64_C(1) << 4 : 0), .pages = huge ? 8 : 64, .huge = huge});
    address = (uint64_t)(uintptr_t)guest.memory.base;
    page_bytes = guest.memory.page_bytes;
    edge = huge ? 4096 : 0;
    CHECK_EQ(pc_states_map(guest.states, guest.vmm->pages, &states), 0);
    journal = &states.journals[0];
    journal->events[0].event = UFFD_EVENT_PAGEFAULT;
    journal->events[0].arg.pagefault.address = address;
    journal->events[3].event = UFFD_EVENT_REMOVE;
    journal->events[3].arg.remove.start = address + 2 * page_bytes - edge; /* pages 2 and 3, and not what is around them */
    journal->events[3].arg.remove.end = address + 4 * page_bytes + edge;
    journal->early[7] = (struct pc_journal_extent){.start = address + 6 * page_bytes, .end = address + 7 * page_bytes};
    pc_bitmap_set_range(states.claimed, 5, 3); /* and what was under way: nothing of it had been placed */
    open_adopted(&rig, &guest);
    fd = script_urgent(&rig, 0);
    arm(&rig, 0, 0, 0, guest.vmm->pages);
    CHECK_EQ(journal->events[3].event, 0);
    CHECK_EQ(journal->early[7].end, 0);
    CHECK_EQ(pager_stats(&rig).resident_pages, 3);
    serve_all(&rig, fd);
    for (uint64_t page = 0; page < 8; page++) {
        bool zero = page == 2 || page == 3 || page == 6 || content_of(0, page) != DATA;

        CHECK_EQ(do_order(&guest, READ, page, 1), zero ? SEEN_ZERO : SEEN_SOURCE);
    }
    pc_buffer_free(states.base, states.bytes);
    close(fd);
    close_adopted(&rig, &guest);
}

static void what_a_dead_pager_had_read_small(void)
{
    what_a_dead_pager_had_read(false);
}

static void what_a_dead_pager_had_read_huge(void)
{
    what_a_dead_pager_had_read(true);
}

/* ---- pages that are there, or cannot be there --------------------------------------------------------------------- */

/* Placed by a pager that died before it could say so, and written to since: alone, and inside of a run. */
static void placed_and_not_known(void)
{
    uint8_t *content = malloc(8 * pc_page_bytes());
    struct pc_frame frame = {.type = PC_FRAME_PAGES, .first_page = 8, .pages = 8};
    struct pc_states states;
    struct guest guest;
    struct rig rig;
    uint64_t done;
    int fd;

    CHECK(content != NULL);
    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 64});
    CHECK_EQ(pc_states_map(guest.states, 64, &states), 0);
    for (uint64_t page = 3; page < 12; page += 8) {
        make_page(0, page, pc_page_bytes(), content);
        CHECK_EQ(pc_uffd_copy(guest.uffd, (uint64_t)(uintptr_t)guest.memory.base + page * pc_page_bytes(), content, pc_page_bytes(), 0, &done), 0);
        pc_bitmap_set_range(states.claimed, page, 1);
        (void)do_order(&guest, WRITE, page, 1);
    }
    pc_bitmap_set_range(states.claimed, 20, 2); /* these were not */
    open_adopted(&rig, &guest);
    fd = script_urgent(&rig, 0);
    arm(&rig, 0, 0, 0, 64);
    for (uint64_t page = 8; page < 16; page++)
        make_page(0, page, pc_page_bytes(), content + (page - 8) * pc_page_bytes());
    CHECK(send_frame(fd, frame, content, 8 * pc_page_bytes()));
    serve_all(&rig, fd);
    CHECK_EQ(pager_stats(&rig).duplicate_pages, 8);
    for (uint64_t page = 0; page < 64; page++)
        CHECK_EQ(do_order(&guest, READ, page, 1), page == 3 || page == 11 ? SEEN_OWN : content_of(0, page) == DATA ? SEEN_SOURCE : SEEN_ZERO);
    free(content);
    pc_buffer_free(states.base, states.bytes);
    close(fd);
    close_adopted(&rig, &guest);
}

/* A range leaves the userfaultfd without a word, as with balloons of old: what comes for it is dropped. Another pager does not pull it
 * back; and runs cross the edges of mappings. */
static void left_without_a_word(void)
{
    uint8_t *content = malloc(64 * pc_page_bytes());
    struct pc_frame frame = {.type = PC_FRAME_PAGES, .pages = 64};
    struct guest guest;
    struct rig rig, next;
    int fd;

    CHECK(content != NULL);
    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 128});
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 128);
    (void)do_order(&guest, REPLACE, 20, 4);
    (void)do_order(&guest, REPLACE, 70, 4);
    (void)do_order(&guest, PROTECT, 40, 10);
    fd = script_bulk(&rig, 0);
    for (uint64_t page = 0; page < 64; page++)
        make_page(0, page, pc_page_bytes(), content + page * pc_page_bytes());
    CHECK(send_frame(fd, frame, content, 64 * pc_page_bytes()));
    WAIT_UNTIL(pager_stats(&rig).resident_pages == 64);
    CHECK_EQ(pager_stats(&rig).removed_pages, 4);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    close(fd);
    /* As if it had been killed: the next one begins with what it left. (Freeing it would poison what is missing.) */
    CHECK_EQ(pc_pager_disconnect(rig.pager), 0);
    open_adopted(&next, &guest);
    arm(&next, 0, 0, 0, 128);
    CHECK_EQ(do_order(&guest, READ, 71, 1), SEEN_ZERO); /* by nobody */
    fd = script_bulk(&next, 0);
    serve_all(&next, fd);
    for (uint64_t page = 0; page < 128; page++) {
        bool zero = (page >= 20 && page < 24) || (page >= 70 && page < 74) || content_of(0, page) != DATA;

        CHECK_EQ(do_order(&guest, READ, page, 1), zero ? SEEN_ZERO : SEEN_SOURCE);
    }
    free(content);
    close(fd);
    CHECK_EQ(pc_pager_free(next.pager), 0);
    end_vmm(&guest);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

/* Faults between thousands of removals of one page: what the kernel refuses meanwhile is tried again, and all of it is served. */
static void faults_in_a_flood(void)
{
    struct pc_histogram latency;
    struct pc_frame frame;
    struct guest guest;
    struct rig rig;
    int fd;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 400});
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 400);
    fd = script_urgent(&rig, 0);
    start_order(&guest, 1, REMOVE_EACH, 300, 100);
    for (uint64_t page = 0; page < 200; page++) {
        bool removed = page % 4 == 3;

        start_order(&guest, 0, READ, removed ? 300 + page / 4 : page, 1);
        if (!removed) {
            CHECK(receive_frame(fd, &frame));
            serve_page(&rig, fd, 0, frame.first_page);
        }
        while (removed && !is_done(&guest, 0)) /* it may have been there before it was removed */
            if (speaks(fd, 1)) {
                CHECK(receive_frame(fd, &frame));
                serve_page(&rig, fd, 0, frame.first_page);
            }
        (void)finish_order(&guest, 0);
    }
    (void)finish_order(&guest, 1);
    CHECK_EQ(pager_stats(&rig).removes, 10000);
    CHECK_EQ(pc_pager_latency(rig.pager, PC_STAGE_TOTAL, &latency), 0);
    (void)printf("     slowest fault %llu us, %llu retries\n", (unsigned long long)latency.max_ns / 1000,
                 (unsigned long long)pager_stats(&rig).retries);
    serve_all(&rig, fd);
    close(fd);
    close_adopted(&rig, &guest);
}

static struct guest *gives_back; /* when its pager ends */

void __real_pc_drain_removals(struct shard *shard);
void __wrap_pc_drain_removals(struct shard *shard);

void __wrap_pc_drain_removals(struct shard *shard)
{
    if (gives_back) {
        start_order(gives_back, 1, REMOVE, 100, 1);
        CHECK(speaks(gives_back->uffd, PATIENCE_MS));
    }
    __real_pc_drain_removals(shard);
}

/* The VMM gives memory back all the time, while the pager, which is done, ends: nobody waits for it afterwards. Nor does he who told of
 * it when everything was unregistered already and the thread had read for the last time, as is arranged by memory that was never armed. */
static void taken_away_while_the_pager_ends(void)
{
    uint64_t rest[2] = {0, ~UINT64_C(0)};
    struct guest guest;
    struct rig rig;
    int fd;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 128});
    open_adopted(&rig, &guest);
    CHECK_EQ(pc_pager_set_zero(rig.pager, 0, rest), 0);
    arm(&rig, 0, 0, 0, 64);
    fd = script_urgent(&rig, 0);
    serve_all(&rig, fd);
    close(fd);
    for (int i = 2; i < WORKERS; i++)
        start_order(&guest, i, REMOVE_EACH, (uint64_t)i, 10);
    WAIT_UNTIL(pager_stats(&rig).removes > WORKERS); /* it has begun */
    CHECK_EQ(pc_pager_disarm(rig.pager), 0);
    gives_back = &guest;
    CHECK_EQ(pc_pager_free(rig.pager), 0);
    for (int i = 1; i < WORKERS; i++)
        (void)finish_order(&guest, i);
    end_vmm(&guest);
}

static void ends_before_it_is_armed(void)
{
    struct guest guest;
    struct pc_pager *pager;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 64});
    CHECK_EQ(pc_pager_new(-1, &pager), 0);
    CHECK_EQ(pc_pager_adopt_shard(pager, CHECK_SYS(fcntl(guest.uffd, F_DUPFD_CLOEXEC, 0)), 0, 0, message, sizeof(message)), 0);
    CHECK_EQ(pc_pager_disarm(pager), 0);
    CHECK_EQ(pc_pager_free(pager), 0);
    end_vmm(&guest);
}

static void vmm_ends(void)
{
    struct pc_frame frame;
    struct pc_event event;
    struct guest guest;
    struct rig rig;
    int fd, status;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 64});
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 64);
    fd = script_urgent(&rig, 0);
    start_order(&guest, 0, READ, 5, 1);
    CHECK(receive_frame(fd, &frame));
    (void)kill(guest.vmm->pid, SIGKILL);
    CHECK_SYS(waitpid(guest.vmm->pid, &status, 0));
    serve_page(&rig, fd, 0, 5);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, 0, 0, &event);
    CHECK_EQ(event.error, ESRCH);
    CHECK(strstr(event.text, "has ended") != NULL);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, 0, &event);
    CHECK_EQ(event.error, ESRCH);
    close(fd);
    CHECK_EQ(pc_pager_free(rig.pager), 0); /* 0: nobody is left to see zeros */
    close(guest.uffd);
    close(guest.states);
}

/* ---- what others do with the same userfaultfd --------------------------------------------------------------------- */

static void write_protected_by_its_owner(void)
{
    struct guest guest;
    struct rig rig;
    int fd;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .mode = PC_UFFD_MISSING | PC_UFFD_WP, .pages = 64});
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 64);
    fd = script_urgent(&rig, 0);
    serve_all(&rig, fd);
    CHECK_EQ(pc_uffd_writeprotect(guest.uffd, (uint64_t)(uintptr_t)guest.memory.base, 32 * pc_page_bytes(), PC_UFFD_PROTECT), 0);
    for (uint64_t page = 0; page < 32; page += 3) {
        (void)do_order(&guest, WRITE, page, 1);
        CHECK_EQ(do_order(&guest, READ, page, 1), SEEN_OWN);
    }
    CHECK_EQ(pager_stats(&rig).requests, 0);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    close(fd);
    close_adopted(&rig, &guest);
}

/* Registered for minor faults by its owner, who opened it without that feature: said, and shown to nobody. Others are served. */
static void minor_faults_that_nobody_asked_for(void)
{
    struct pc_event event;
    struct guest guest;
    struct rig rig;
    uint64_t page;
    int fd;

    start_vmm(&guest, (struct vmm){.features = UINT64_C(1) << 5, .mode = PC_UFFD_MISSING | PC_UFFD_MINOR, .pages = 64, .shared = true});
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 64);
    fd = script_urgent(&rig, 0);
    start_order(&guest, 1, READ, 0, 1);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_FATAL, 0, 0, &event);
    CHECK(strstr(event.text, "minor") != NULL);
    page = data_page(&rig, 3);
    serve_page(&rig, fd, 0, page);
    CHECK_EQ(do_order(&guest, READ, page, 1), SEEN_SOURCE);
    CHECK(!is_done(&guest, 1));
    close(fd);
    end_vmm(&guest);
    CHECK_EQ(pc_pager_free(rig.pager), 0);
}

/* The VMM makes the userfaultfd a blocking one, again and again: faults are served all the same, and the pager ends. */
static void made_blocking_all_the_time(void)
{
    struct guest guest;
    struct rig rig;
    int fd;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 200});
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 200);
    fd = script_urgent(&rig, 0);
    start_order(&guest, 1, MEDDLE, 0, 200000);
    for (uint64_t page = 0; page < 200; page++) {
        struct pc_frame frame;

        start_order(&guest, 0, READ, page, 1);
        CHECK(receive_frame(fd, &frame));
        CHECK_EQ(frame.first_page, page);
        serve_page(&rig, fd, 0, page);
        CHECK_EQ(finish_order(&guest, 0), content_of(0, page) == DATA ? SEEN_SOURCE : SEEN_ZERO);
    }
    (void)finish_order(&guest, 1);
    EXPECT_NO_EVENT(&rig.from_pager, PC_EVENT_FATAL);
    close(fd);
    close_adopted(&rig, &guest);
}

/* One page by many threads, and each page by one: a request a page. */
static void many_at_once(void)
{
    struct pc_frame frame;
    struct guest guest;
    struct rig rig;
    int fd;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 128});
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 128);
    fd = script_urgent(&rig, 0);
    for (int i = 0; i < WORKERS; i++)
        start_order(&guest, i, READ, i % 2 ? 0 : (uint64_t)i + 1, 1);
    for (int i = 0; i < WORKERS / 2 + 1; i++) {
        CHECK(receive_frame(fd, &frame));
        serve_page(&rig, fd, 0, frame.first_page);
    }
    for (int i = 0; i < WORKERS; i++)
        (void)finish_order(&guest, i);
    CHECK(!speaks(fd, 0));
    CHECK_EQ(pager_stats(&rig).requests, WORKERS / 2 + 1);
    close(fd);
    close_adopted(&rig, &guest);
}

/* ---- pagers that are killed --------------------------------------------------------------------------------------- */

enum death { AT_ANY_TIME, OF_A_REMOVAL, OF_A_PLACEMENT }; /* when it has read one, when it has done one */

static enum death death;

int __real_pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int __wrap_pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);

int __wrap_pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes)
{
    int result = __real_pc_uffd_copy(uffd, address, source, bytes, mode, done_bytes);

    if (death == OF_A_PLACEMENT)
        (void)raise(SIGKILL);
    return result;
}

size_t __real_pc_apply_removals(struct shard *shard, size_t count);
size_t __wrap_pc_apply_removals(struct shard *shard, size_t count);

size_t __wrap_pc_apply_removals(struct shard *shard, size_t count)
{
    for (size_t i = 0; i < count && death == OF_A_REMOVAL; i++)
        if (shard->journal->events[i].event == UFFD_EVENT_REMOVE)
            (void)raise(SIGKILL);
    return __real_pc_apply_removals(shard, count);
}

static const char *const pager_argument = "--pager";

static int pager_process(char **arguments)
{
    uint64_t number[9];
    struct pc_memory memory;
    struct pc_pager *pager;
    struct pc_event event;

    for (int i = 0; i < 9; i++)
        number[i] = strtoull(arguments[i], NULL, 0);
    memory = (struct pc_memory){.base = (void *)(uintptr_t)number[2],
                                .size_bytes = number[3],
                                .page_bytes = number[4],
                                .kind = (int)number[5],
                                .fd = -1};
    death = (enum death)number[8];
    CHECK_EQ(pc_pager_new(-1, &pager), 0);
    CHECK_EQ(pc_pager_add_block(pager, &memory, (int)number[1]), 0);
    if (pc_pager_adopt_shard(pager, (int)number[0], 0, 0, message, sizeof(message)) ||
        pc_pager_arm(pager, 0, 0, 0, memory.size_bytes / memory.page_bytes, message, sizeof(message)))
        FAIL("%s", message);
    CHECK_EQ(pc_pager_attach_urgent(pager, 0, (int)number[6], NULL), 0);
    CHECK_EQ(pc_pager_attach_bulk(pager, 0, (int)number[7], NULL), 0);
    for (;;) {
        struct pollfd readable = {.fd = pc_pager_event_fd(pager), .events = POLLIN};

        (void)poll(&readable, 1, 20);
        while (pc_pager_next_event(pager, &event) == 1)
            if (event.type == PC_EVENT_FATAL && event.error != ESRCH)
                FAIL("the pager cannot go on: %s", event.text);
    }
}

/* This program again, with nothing of this process but the descriptors: they are the urgent and the bulk connection. */
static pid_t start_pager(const struct guest *guest, int urgent, int bulk, enum death when)
{
    const int fds[] = {guest->uffd, guest->states, urgent, bulk};
    const uint64_t number[] = {(uint64_t)fds[0],
                               (uint64_t)fds[1],
                               (uint64_t)(uintptr_t)guest->memory.base,
                               guest->memory.size_bytes,
                               guest->memory.page_bytes,
                               (uint64_t)guest->memory.kind,
                               (uint64_t)fds[2],
                               (uint64_t)fds[3],
                               when};
    char text[9][24], *arguments[12] = {(char *)(uintptr_t)"test_adopted", (char *)(uintptr_t)pager_argument};
    pid_t child;

    for (int i = 0; i < 9; i++) {
        (void)snprintf(text[i], sizeof(text[i]), "%llu", (unsigned long long)number[i]);
        arguments[2 + i] = text[i];
    }
    child = CHECK_SYS(fork());
    if (!child) {
        for (int i = 0; i < 4; i++)
            (void)fcntl(fds[i], F_SETFD, 0);
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        execv("/proc/self/exe", arguments);
        _exit(127);
    }
    close(urgent);
    close(bulk);
    return child;
}

static void reap_pager(pid_t child)
{
    int status;

    CHECK_SYS(waitpid(child, &status, 0));
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        FAIL("a pager has ended with status %#x", (unsigned)status);
}

/* The VMM goes on as soon as the event is read. What its pager did not live to note is what the next one begins with. */
static void killed_between_the_read_and_the_maps(void)
{
    struct guest guest;
    struct rig rig;
    int urgent[2], bulk[2];

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 64});
    tcp_pair(urgent);
    tcp_pair(bulk);
    start_order(&guest, 0, REMOVE, 8, 16);
    reap_pager(start_pager(&guest, urgent[1], bulk[1], OF_A_REMOVAL));
    close(urgent[0]);
    close(bulk[0]);
    (void)finish_order(&guest, 0);
    CHECK_EQ(pc_states_count(guest.states, 64), 0);
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 64);
    CHECK_EQ(pager_stats(&rig).resident_pages, 16);
    urgent[0] = script_urgent(&rig, 0);
    serve_all(&rig, urgent[0]);
    for (uint64_t page = 0; page < 64; page++)
        CHECK_EQ(do_order(&guest, READ, page, 1),
                 (page >= 8 && page < 24) || content_of(0, page) != DATA ? SEEN_ZERO : SEEN_SOURCE);
    close(urgent[0]);
    close_adopted(&rig, &guest);
}

/* Its last act was to place a page, which the VMM writes to. The next one is given it again. */
static void killed_between_a_placement_and_the_maps(void)
{
    struct guest guest;
    struct rig rig;
    int urgent[2], bulk[2];
    pid_t pager;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = 64});
    tcp_pair(urgent);
    tcp_pair(bulk);
    pager = start_pager(&guest, urgent[1], bulk[1], OF_A_PLACEMENT);
    rig = (struct rig){.page_bytes = guest.memory.page_bytes};
    start_order(&guest, 0, WRITE, 9, 1);
    serve_page(&rig, bulk[0], 0, 9);
    reap_pager(pager);
    close(urgent[0]);
    close(bulk[0]);
    (void)finish_order(&guest, 0);
    CHECK_EQ(pc_states_count(guest.states, 64), 0);
    open_adopted(&rig, &guest);
    arm(&rig, 0, 0, 0, 64);
    urgent[0] = script_urgent(&rig, 0);
    serve_all(&rig, urgent[0]);
    CHECK_EQ(do_order(&guest, READ, 9, 1), SEEN_OWN);
    close(urgent[0]);
    close_adopted(&rig, &guest);
}

/* Pagers are killed at any instant, with reads, writes and removals of other pages under way all the time. */
static void killed_at_random(void)
{
    static uint64_t received[RANDOM_PAGES / 64 + 1];
    struct pc_pageserver *server;
    struct pc_memory source;
    struct guest guest;
    int status;

    start_vmm(&guest, (struct vmm){.features = EVENT_REMOVE, .pages = RANDOM_PAGES, .at_random = true});
    source = make_memory(PC_MEMORY_ANON, RANDOM_PAGES);
    fill_source(&source, 0);
    CHECK_EQ(pc_pageserver_new(8000000, &server), 0);
    CHECK_EQ(pc_pageserver_add_block(server, &source, pc_page_bytes()), 0);
    CHECK_EQ(pc_pageserver_start(server), 0);
    for (int i = 0; i <= KILLS; i++) {
        uint64_t before = atomic_load(&guest.vmm->steps);
        int urgent[2], bulk[2];
        pid_t pager;

        tcp_pair(urgent);
        tcp_pair(bulk);
        CHECK_EQ(pc_pageserver_attach_urgent(server, 0, urgent[0], NULL, 0), 0);
        CHECK_EQ(pc_pageserver_attach_bulk(server, 0, bulk[0], NULL), 0);
        pager = start_pager(&guest, urgent[1], bulk[1], AT_ANY_TIME);
        if (i < KILLS) {
            WAIT_UNTIL(atomic_load(&guest.vmm->steps) > before + RANDOM_WORKERS); /* somebody was served: it has begun */
            pc_sleep_ns(test_below(i % 2 ? 200000 : 3000000));
        } else {
            atomic_store(&guest.vmm->stop, true);
            CHECK_SYS(waitpid(guest.vmm->pid, &status, 0));
            if (!WIFEXITED(status) || WEXITSTATUS(status))
                FAIL("the VMM has ended with status %#x", (unsigned)status);
        }
        if (waitpid(guest.vmm->pid, &status, WNOHANG) > 0)
            FAIL("the VMM has ended with status %#x", (unsigned)status);
        (void)kill(pager, SIGKILL);
        reap_pager(pager);
        CHECK_EQ(pc_pageserver_disconnect(server), 0);
        CHECK_EQ(pc_states_received(guest.states, RANDOM_PAGES, received), 0);
        CHECK_EQ(pc_pageserver_set_received(server, 0, received), 0);
    }
    pc_pageserver_free(server);
    pc_memory_destroy(&source);
    close(guest.uffd);
    close(guest.states);
}

int main(int argc, char **argv)
{
    if (argc == 11 && !strcmp(argv[1], pager_argument))
        return pager_process(argv + 2);
    test_begin(argc, argv);
    borrow_huge_pages(HUGE_POOL_PAGES);
    RUN_CASE(fault_and_removal_in_one_read);
    RUN_CASE(taken_away_before_it_is_armed);
    RUN_CASE(ends_with_no_room);
    RUN_CASE(what_a_dead_pager_had_read_small);
    RUN_CASE(what_a_dead_pager_had_read_huge);
    RUN_CASE(placed_and_not_known);
    RUN_CASE(left_without_a_word);
    RUN_CASE(faults_in_a_flood);
    RUN_CASE(taken_away_while_the_pager_ends);
    RUN_CASE(ends_before_it_is_armed);
    RUN_CASE(vmm_ends);
    RUN_CASE(write_protected_by_its_owner);
    RUN_CASE(minor_faults_that_nobody_asked_for);
    RUN_CASE(made_blocking_all_the_time);
    RUN_CASE(many_at_once);
    RUN_CASE(killed_between_the_read_and_the_maps);
    RUN_CASE(killed_between_a_placement_and_the_maps);
    RUN_FOR(killed_at_random, 60);
    return test_end();
}
