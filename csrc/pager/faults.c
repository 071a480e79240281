/* SPDX-License-Identifier: Apache-2.0
 *
 * Who waits: faults are read from the userfaultfd, requested once a page, kept in the pending table until their page is there,
 * then accounted.
 *
 * Owns a shard's pending table and the reading of its userfaultfd, which also tells of memory that was taken away. All of it runs on
 * the shard's fault thread, which takes no memory and, but for the gate, no lock on the way; other threads may only ask for a
 * recheck.
 */
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "pager/pager.h"
#include "uffd/uffd_abi.h"

#define LET_RUN_NS 16000
#define UNPOLLABLE_NS 100000000 /* a userfaultfd that cannot be polled is looked at so often */

/* ---- the pending table -------------------------------------------------------------------------------------------- */

/* Entries are found by page and by thread, and are a ring in the order in which they came, which entry 0 closes. Whatever the number
 * of those that wait, a fault costs the same. */

static uint32_t page_bucket(uint32_t block, uint64_t page)
{
    return (uint32_t)((page ^ (uint64_t)block << 48) * UINT64_C(0x9E3779B97F4A7C15) >> (64 - PENDING_BUCKET_BITS));
}

static uint32_t tid_bucket(int32_t tid)
{
    return (uint32_t)tid % PENDING_BUCKETS;
}

/* Before `received` is looked at: who sets it looks here afterwards. */
static void publish_pending(struct shard *shard)
{
    const struct pending *pending = shard->pending;

    __atomic_store_n(&shard->metrics->oldest_ns, pending->count ? pending->faults[pending->faults[0].newer].event_ns : 0,
                     __ATOMIC_RELAXED);
    __atomic_store_n(&shard->metrics->pending, pending->count, __ATOMIC_SEQ_CST);
}

static bool is_for(const struct fault *fault, uint32_t block, uint64_t page)
{
    return fault->page == page && fault->block == block;
}

static struct fault *find_pending(const struct shard *shard, uint32_t block, uint64_t page)
{
    struct pending *pending = shard->pending;

    for (uint16_t i = pending->by_page[page_bucket(block, page)]; i; i = pending->faults[i].next_by_page)
        if (is_for(&pending->faults[i], block, page))
            return &pending->faults[i];
    return NULL;
}

/* The entry of a thread, or where threads are not told apart the one entry of a page. */
static struct fault *find_waiting(const struct shard *shard, uint32_t block, uint64_t page, int32_t tid)
{
    struct pending *pending = shard->pending;

    if (!tid)
        return find_pending(shard, block, page);
    for (uint16_t i = pending->by_tid[tid_bucket(tid)]; i; i = pending->faults[i].next_by_tid)
        if (pending->faults[i].tid == tid)
            return &pending->faults[i];
    return NULL;
}

/* A new entry, the last of all; NULL when there is no room. */
static struct fault *insert_pending(struct pending *pending, uint32_t block, uint64_t page, int32_t tid, uint64_t now_ns)
{
    uint16_t *by_page = &pending->by_page[page_bucket(block, page)], *by_tid = &pending->by_tid[tid_bucket(tid)];
    uint16_t number = pending->free, newest = pending->faults[0].older;
    struct fault *fault;

    if (pending->count == PENDING_MAX)
        return NULL;
    if (number)
        pending->free = pending->faults[number].newer;
    else
        number = ++pending->used;
    fault = &pending->faults[number];
    *fault = (struct fault){.page = page, .event_ns = now_ns, .block = block, .tid = tid, .next_by_page = *by_page,
                            .older = newest};
    *by_page = number;
    if (tid) {
        fault->next_by_tid = *by_tid;
        *by_tid = number;
    }
    pending->faults[newest].newer = number;
    pending->faults[0].older = number;
    pending->count++;
    return fault;
}

static void remove_pending(struct pending *pending, struct fault *fault)
{
    uint16_t number = (uint16_t)(fault - pending->faults), *at = &pending->by_page[page_bucket(fault->block, fault->page)];

    while (*at != number)
        at = &pending->faults[*at].next_by_page;
    *at = fault->next_by_page;
    if (fault->tid) {
        at = &pending->by_tid[tid_bucket(fault->tid)];
        while (*at != number)
            at = &pending->faults[*at].next_by_tid;
        *at = fault->next_by_tid;
    }
    pending->faults[fault->older].newer = fault->newer;
    pending->faults[fault->newer].older = fault->older;
    fault->newer = pending->free;
    pending->free = number;
    pending->count--;
}

static int thread_slot(const struct pc_metrics_map *metrics, int32_t tid)
{
    if (tid > 0)
        for (int slot = 0; slot < PC_MAX_TRACKED_THREADS; slot++)
            if (__atomic_load_n(&metrics->tids[slot], __ATOMIC_RELAXED) == tid)
                return slot;
    return -1;
}

/* A tracked thread waits no longer. */
static void account_blocked(struct shard *shard, const struct fault *fault, uint64_t now_ns)
{
    struct pc_metrics_map *metrics = shard->pager->metrics.map;

    if (fault->slot < 0)
        return;
    __atomic_store_n(&metrics->blocked_since_ns[fault->slot], 0, __ATOMIC_RELAXED);
    (void)__atomic_fetch_add(&metrics->blocked_ns[fault->slot], now_ns - fault->event_ns, __ATOMIC_RELAXED);
}

/* `served` faults are behind a shard. (The first shard to have so many: most pagers have one.) */
static void note_served(struct pc_pager_stats *stats, uint64_t served, uint64_t now_ns)
{
    uint64_t *at = served == 1 ? &stats->first_fault_ns
                   : served == 100 ? &stats->fault_100_ns
                   : served == 1000 ? &stats->fault_1000_ns
                   : served == 10000 ? &stats->fault_10000_ns
                                    : NULL;

    if (at && !__atomic_load_n(at, __ATOMIC_RELAXED))
        __atomic_store_n(at, now_ns, __ATOMIC_RELAXED);
}

/* Puts it where the recorder finds it, when it is one of those that are sampled. Its thread has been woken: this keeps nobody waiting. */
static void sample_fault(struct shard *shard, const struct fault *fault, uint64_t placed_ns, uint64_t received_ns)
{
    uint64_t every = __atomic_load_n(&shard->pager->metrics.map->sample_every, __ATOMIC_RELAXED);
    uint64_t number = shard->metrics->stages[PC_STAGE_TOTAL].count;
    struct pc_fault_ring *ring = &shard->metrics->ring;
    const struct pc_record_fault sample = {.number = number, .place = (uint64_t)fault->block << 40 | fault->page,
                                           .event_ns = fault->event_ns, .sent_ns = received_ns ? fault->sent_ns : 0,
                                           .received_ns = received_ns, .placed_ns = placed_ns};
    uint64_t *to = (uint64_t *)&ring->faults[ring->head % PC_FAULT_RING];

    if (!every || number & (every - 1))
        return;
    for (size_t i = 0; i < sizeof(sample) / sizeof(*to); i++) /* each after the head before it: see take_faults */
        __atomic_store_n(&to[i], ((const uint64_t *)&sample)[i], __ATOMIC_RELEASE);
    __atomic_store_n(&ring->head, ring->head + 1, __ATOMIC_RELEASE);
}

/* A thread that has been woken: accounted and forgotten. received_ns is 0 when its page did not come in answer to a request. */
static void finish_fault(struct shard *shard, struct fault *fault, uint64_t placed_ns, uint64_t received_ns)
{
    struct pc_histogram *stages = shard->metrics->stages;

    pc_histogram_add(&stages[PC_STAGE_TOTAL], placed_ns - fault->event_ns);
    note_served(&shard->pager->metrics.map->count, stages[PC_STAGE_TOTAL].count, placed_ns);
    if (fault->sent_ns && received_ns > fault->sent_ns) {
        pc_histogram_add(&stages[PC_STAGE_SENT], fault->sent_ns - fault->event_ns);
        pc_histogram_add(&stages[PC_STAGE_RECEIVED], received_ns - fault->sent_ns);
        pc_histogram_add(&stages[PC_STAGE_PLACED], placed_ns - received_ns);
    } else {
        received_ns = 0;
    }
    sample_fault(shard, fault, placed_ns, received_ns);
    account_blocked(shard, fault, placed_ns);
    remove_pending(shard->pending, fault);
    if (shard->overflowed && shard->pending->count < PENDING_MAX / 2) {
        uint32_t count = pc_range_count(shard);

        shard->overflowed = false;
        for (uint32_t i = 0; i < count; i++) {
            const struct range *range = &shard->ranges[i];

            pc_wake_pages(shard, shard->pager->blocks[range->block], range->first_page, range->pages);
        }
    }
}

void pc_finish_faults(struct shard *shard, uint32_t block, uint64_t first, uint64_t pages, uint64_t received_ns)
{
    uint64_t placed_ns = pc_now_ns();
    uint32_t before = shard->pending->count;
    struct fault *fault;

    for (uint64_t page = first; page < first + pages && shard->pending->count; page++)
        while ((fault = find_pending(shard, block, page)))
            finish_fault(shard, fault, placed_ns, received_ns);
    if (shard->pending->count != before)
        publish_pending(shard);
}

/* The thread of this entry waits for another page now: it was interrupted. */
static void forget_pending(struct shard *shard, struct fault *fault, uint64_t now_ns)
{
    const struct fault was = *fault;
    struct fault *other;

    account_blocked(shard, fault, now_ns);
    remove_pending(shard->pending, fault);
    other = was.unrequested ? find_pending(shard, was.block, was.page) : NULL;
    if (other)
        other->unrequested = true;
    else if (was.unrequested)
        pc_atomic_clear_bit(shard->pager->blocks[was.block]->requested, was.page); /* it will not be requested */
}

/* The entry of a fault, NULL when there is no room. *again: it was there. */
static struct fault *add_pending(struct shard *shard, uint32_t block, uint64_t page, int32_t tid, uint64_t now_ns, bool *again)
{
    struct pc_metrics_map *metrics = shard->pager->metrics.map;
    struct fault *fault = find_waiting(shard, block, page, tid);

    *again = fault && is_for(fault, block, page);
    if (*again)
        return fault;
    if (fault)
        forget_pending(shard, fault, now_ns); /* a thread waits for one page at a time */
    fault = insert_pending(shard->pending, block, page, tid, now_ns);
    if (!fault) {
        shard->overflowed = true;
        return NULL;
    }
    fault->slot = thread_slot(metrics, tid);
    if (fault->slot >= 0)
        __atomic_store_n(&metrics->blocked_since_ns[fault->slot], now_ns, __ATOMIC_RELAXED);
    publish_pending(shard);
    return fault;
}

/* Threads that wait for pages which other threads have received, or for what can be tried again, are found by *marks*: one for each
 * bucket of pages. */
static void mark_bucket(struct shard *shard, uint32_t bucket)
{
    (void)pc_atomic_test_and_set_bit(shard->pending->marks, bucket);
}

/* ---- requests for those who wait ---------------------------------------------------------------------------------- */

/* Requests the page of a thread that waits, of the readers or of the source, unless it is claimed: then a request would bring it twice. */
static void request_page(struct shard *shard, struct fault *fault)
{
    const struct block *block = shard->pager->blocks[fault->block];
    struct pending *pending = shard->pending;

    fault->unrequested = true;
    if (pc_bits_test(block->claimed, fault->page))
        return;
    if (pc_is_local(block, fault->page)) {
        fault->unrequested = !pc_local_request(shard->pager, fault->block, fault->page);
        if (fault->unrequested) {
            mark_bucket(shard, page_bucket(fault->block, fault->page));
            pc_retry_later(shard);
        }
        return;
    }
    if (shard->stream.fd < 0)
        return;
    if (!pc_queue_request(shard, fault->block, fault->page, 0)) {
        shard->send_full = true;
        return;
    }
    fault->unrequested = false;
    fault->sent_ns = fault->event_ns; /* corrected when the request has left */
    pending->queued[pending->queued_count++] = (uint16_t)(fault - pending->faults);
}

/* What is queued has left. */
void pc_requests_sent(struct shard *shard)
{
    struct pending *pending = shard->pending;
    uint64_t now_ns = pending->queued_count ? pc_now_ns() : 0;

    while (pending->queued_count) {
        struct fault *fault = &pending->faults[pending->queued[--pending->queued_count]];

        if (fault->sent_ns == fault->event_ns)
            fault->sent_ns = now_ns;
    }
}

/* The channel is lost, and with it what was requested by it. */
void pc_requests_lost(struct shard *shard)
{
    struct pending *pending = shard->pending;

    pending->queued_count = 0;
    for (uint16_t i = pending->faults[0].newer; i; i = pending->faults[i].newer)
        pending->faults[i].sent_ns = 0;
}

/* Requests a page once for all who wait for it, of whom `fault` is one. */
static void request_for_all(struct shard *shard, struct fault *fault)
{
    struct block *block = shard->pager->blocks[fault->block];
    struct pending *pending = shard->pending;

    for (uint16_t i = pending->by_page[page_bucket(fault->block, fault->page)]; i; i = pending->faults[i].next_by_page)
        if (is_for(&pending->faults[i], fault->block, fault->page))
            pending->faults[i].unrequested = false;
    (void)pc_atomic_test_and_set_bit(block->requested, fault->page);
    /* A thread that received it while the bit was clear has notified no other. */
    if (pc_bits_test(block->received, fault->page))
        pc_recheck_page(shard, fault->block, fault->page);
    else
        request_page(shard, fault);
}

/* Requests what threads wait for and what could not be requested when they came. */
void pc_request_pending(struct shard *shard)
{
    struct pending *pending = shard->pending;

    shard->send_full = false;
    for (uint16_t i = pending->faults[0].newer; i && !shard->send_full; i = pending->faults[i].newer)
        if (pending->faults[i].unrequested)
            request_for_all(shard, &pending->faults[i]);
}

/* All that was requested and did not come is requested again: at once what threads wait for, the rest, which becomes `lost`, ahead of
 * faults. A few hundred microseconds for 64 GiB, once for each channel that was lost. */
void pc_request_again(struct shard *shard)
{
    struct pending *pending = shard->pending;
    uint32_t count = pc_range_count(shard);

    for (uint32_t i = 0; i < count; i++) {
        const struct range *range = &shard->ranges[i];
        struct block *block = shard->pager->blocks[range->block];
        uint64_t end = range->first_page + range->pages;

        for (uint64_t word = range->first_page / 64; word * 64 < end; word++) {
            uint64_t lost = pc_bits_word(block->requested, word) & pc_bits_mask(word, range->first_page, range->pages);

            if (!lost)
                continue;
            lost &= ~pc_bits_word(block->claimed, word);
            (void)pc_atomic_set(block->lost, word, lost);
            pc_atomic_clear(block->requested, word, lost);
        }
    }
    pc_cursor_restart(shard, &shard->lost);
    for (uint16_t i = pending->faults[0].newer; i; i = pending->faults[i].newer)
        pending->faults[i].unrequested = true;
    pc_request_pending(shard);
}

/* ---- pages that are there ----------------------------------------------------------------------------------------- */

void pc_recheck_page(struct shard *shard, uint32_t block, uint64_t page)
{
    mark_bucket(shard, page_bucket(block, page));
    if (!__atomic_exchange_n(&shard->recheck, true, __ATOMIC_SEQ_CST))
        pc_shard_notify(shard);
}

/* The kernel says that not now: the loop comes back, after the next events or after a moment. */
void pc_retry_later(struct shard *shard)
{
    if (shard->retry_at_ns)
        return;
    shard->retry_ns = !shard->retry_ns ? RETRY_NS : shard->retry_ns < RETRY_MAX_NS ? shard->retry_ns * 2 : RETRY_MAX_NS;
    shard->retry_at_ns = pc_now_ns() + shard->retry_ns;
}

/* Resolves a fault; false when the kernel does not let it now: the loop comes back for it. */
static bool resolve_or_retry(struct shard *shard, uint32_t index, uint64_t page, bool minor)
{
    int error = pc_resolve(shard, shard->pager->blocks[index], page, minor);

    if (pc_is_temporary(error)) {
        COUNT(shard->pager, retries, 1);
        mark_bucket(shard, page_bucket(index, page));
        pc_retry_later(shard);
        return false;
    }
    if (error)
        pc_pager_fatal(shard->pager, error, "cannot resolve a fault on", index, page);
    return true;
}

/* The page is zero: shown to those who wait for it. False: no thread does. */
bool pc_resolve_zero(struct shard *shard, uint32_t index, uint64_t page, uint64_t received_ns)
{
    struct fault *fault = find_pending(shard, index, page);

    if (!fault)
        return false;
    fault->unresolved = !resolve_or_retry(shard, index, page, false);
    if (!fault->unresolved)
        pc_finish_faults(shard, index, page, 1, received_ns);
    return true;
}

/* Those of a bucket whose pages were received by other threads, or whose faults could not be resolved before, are resolved; what may
 * be requested again is. */
static void recheck_bucket(struct shard *shard, uint64_t bucket, uint64_t now_ns)
{
    struct pending *pending = shard->pending;

    for (uint16_t number = pending->by_page[bucket], next; number; number = next) {
        struct fault *fault = &pending->faults[number];
        const struct block *block = shard->pager->blocks[fault->block];

        next = fault->next_by_page;
        if (!pc_bits_test(block->received, fault->page)) {
            if (fault->unrequested)
                request_for_all(shard, fault);
        } else if (!fault->unresolved && !pc_bits_test(block->zero, fault->page)) { /* placed */
            pc_wake_pages(shard, block, fault->page, 1);
            finish_fault(shard, fault, now_ns, 0);
        } else if (resolve_or_retry(shard, fault->block, fault->page, fault->minor)) {
            finish_fault(shard, fault, now_ns, 0);
        } else {
            fault->unresolved = true;
        }
    }
}

void pc_recheck_pending(struct shard *shard)
{
    uint64_t marks[PENDING_BUCKETS / 64], now_ns = pc_now_ns();
    uint32_t before = shard->pending->count;

    __atomic_store_n(&shard->recheck, false, __ATOMIC_SEQ_CST);
    for (uint64_t word = 0; word < PENDING_BUCKETS / 64; word++) {
        marks[word] = pc_bits_word(shard->pending->marks, word);
        if (marks[word])
            marks[word] = __atomic_exchange_n(&shard->pending->marks[word], 0, __ATOMIC_SEQ_CST);
    }
    /* After the marks, which are set later, and before those pages are requested one by one: once. */
    if (__atomic_exchange_n(&shard->answers_dropped, false, __ATOMIC_SEQ_CST))
        pc_request_again(shard);
    for (uint64_t word = 0; word < PENDING_BUCKETS / 64; word++)
        for (; marks[word]; marks[word] &= marks[word] - 1)
            recheck_bucket(shard, pc_bits_lowest(word, marks[word]), now_ns);
    if (shard->pending->count != before)
        publish_pending(shard);
}

/* ---- events ------------------------------------------------------------------------------------------------------- */

static const struct range *find_range(const struct shard *shard, uint64_t address)
{
    uint32_t count = pc_range_count(shard);

    for (uint32_t i = 0; i < count; i++)
        if (address - shard->ranges[i].address < __atomic_load_n(&shard->ranges[i].bytes, __ATOMIC_RELAXED))
            return &shard->ranges[i];
    return NULL;
}

static void handle_fault(struct shard *shard, const struct uffd_msg *message, uint64_t now_ns)
{
    struct pc_pager *pager = shard->pager;
    uint64_t address = message->arg.pagefault.address, page;
    bool minor = message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR, fresh = false, late = false, local, received, again;
    int32_t tid = shard->api.features & UFFD_FEATURE_THREAD_ID ? (int32_t)message->arg.pagefault.feat.ptid : 0;
    const struct range *range = find_range(shard, address);
    struct fault *fault;
    struct block *block;

    COUNT(pager, faults, 1);
    if (!range)
        return; /* not armed yet, or not any more: arming and unregistering wake who waits there */
    block = pager->blocks[range->block];
    page = range->first_page + (address - range->address) / block->memory.page_bytes;
    if (message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) { /* another owner of the descriptor has registered for that: nothing is missing */
        if (pc_uffd_writeprotect(shard->uffd, pc_page_address(block, page), block->memory.page_bytes, 0))
            pc_wake_pages(shard, block, page, 1); /* EAGAIN: an event is unread. It faults anew */
        return;
    }
    if (minor && !(shard->api.features & (UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS))) {
        /* Nor for this; what the page has in it is not ours to say. */
        pc_pager_fatal(pager, -EOPNOTSUPP, "the userfaultfd was not opened for minor faults, of which there is one on", range->block,
                             page);
        return;
    }
    received = pc_bits_test(block->received, page);
    if (!received)
        fresh = !pc_atomic_test_and_set_bit(block->requested, page);
    local = pc_is_local(block, page);
    late = !received && !fresh && !local && !find_pending(shard, range->block, page);
    if (received ? !pc_bits_test(block->zero, page) : !fresh)
        COUNT(pager, repeated_faults, 1);
    if (received ? pc_bits_test(block->zero, page) : fresh || late)
        pc_touch(pager, range->block, page);
    if (late)
        COUNT(pager, prefetch_hits, 1);
    if (!local)
        pc_streams_note(shard, range->block, page, fresh, late);
    if (received && resolve_or_retry(shard, range->block, page, minor))
        return;
    fault = add_pending(shard, range->block, page, tid, now_ns, &again);
    if (!received)
        shard->repeats = again ? shard->repeats + (tid ? PC_REPEAT_WEIGHT : 1) : 0;
    if (!fault) {
        if (fresh) /* it would not be requested; its thread comes back */
            pc_atomic_clear_bit(block->requested, page);
        return;
    }
    fault->minor = minor;
    fault->unresolved = fault->unresolved || received;
    if (fresh && local && pc_local_serve(shard, range->block, page))
        return;
    if (fresh)
        request_page(shard, fault);
    if (late && shard->stream.fd >= 0 && __atomic_load_n(&pager->asks_again, __ATOMIC_RELAXED))
        (void)pc_queue_request(shard, range->block, page, PC_PAGER_REQUEST_AGAIN); /* without room for it the answer comes as it would */
    if (!received && pc_bits_test(block->received, page))
        pc_recheck_page(shard, range->block, page);
}

/* Handles as many events as one read gives; the loop comes back for more. Whether there were any. */
bool pc_read_events(struct shard *shard)
{
    struct pc_journal *journal = shard->journal;
    size_t count, removals;
    uint64_t now_ns;
    ssize_t got;

    pc_gate_close(shard);
    got = shard->may_block ? pc_uffd_read_now(shard->uffd, journal->events, sizeof(journal->events))
                           : read(shard->uffd, journal->events, sizeof(journal->events));
    count = got > 0 ? (size_t)got / sizeof(journal->events[0]) : 0; /* EAGAIN: the fault went away before it was read */
    removals = pc_apply_removals(shard, count); /* the kernel gives faults before events that came first */
    pc_gate_open(shard);
    if (!count)
        return false;
    now_ns = pc_now_ns();
    COUNT(shard->pager, event_reads, 1);
    for (size_t i = 0; i < count; i++)
        if (__atomic_load_n(&journal->events[i].event, __ATOMIC_RELAXED) == UFFD_EVENT_PAGEFAULT)
            handle_fault(shard, &journal->events[i], now_ns);
    /* The kernel refuses placements until the thread that takes memory away has run again after its event was read, and one that takes away
     * page after page begins with the next one microseconds later. So that thread gets time to run; the time varies, or each new try might
     * fall into the next removal. */
    if (removals && shard->retry_at_ns) {
        pc_sleep_ns(LET_RUN_NS / 16 + now_ns * UINT64_C(0x9E3779B97F4A7C15) % LET_RUN_NS);
        shard->retry_at_ns = now_ns;
        shard->retry_ns = 0;
    }
    return true;
}

/* poll(2) says POLLERR of a blocking userfaultfd; another process that has the descriptor may have made it one. */
void pc_uffd_unpollable(struct shard *shard)
{
    int flags = fcntl(shard->uffd, F_GETFL);

    shard->may_block = true;
    if (flags >= 0 && !(flags & O_NONBLOCK) && !fcntl(shard->uffd, F_SETFL, flags | O_NONBLOCK))
        return;
    shard->unpollable_until_ns = pc_now_ns() + UNPOLLABLE_NS;
    if (shard->unpollable_reported)
        return;
    shard->unpollable_reported = true;
    pc_events_push(&shard->pager->events, PC_EVENT_FATAL, 0, 0, EBADF, "the userfaultfd of shard %u cannot be waited for",
                   shard->index);
}
