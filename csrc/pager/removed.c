/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory that is taken away (REMOVE, UNMAP): what was read of it becomes part of the maps.
 *
 * Owns the journal of a shard (memory/states.h). Its userfaultfd is read into it, with the gate closed, and what was taken away is erased
 * there when the maps say so. A pager that is killed at any instruction leaves in it what its successor has to apply, which does so when it
 * arms the memory, before a page of it can be placed. (What it had read of faults need not be known: arming wakes all who wait.)
 * Memory may be taken away that is registered with the userfaultfd already, by its owner or by an earlier pager, and armed here a moment
 * later: that is kept. Where there is no room for it nothing more is read until something is armed, and the owner waits.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <sys/mman.h>

#include "pager/pager.h"
#include "uffd/uffd_abi.h"

#define DRAIN_NS UINT64_C(5000000000) /* for memory that is being taken away while the pager ends */

static pthread_mutex_t *lane_of(struct shard *shard, const struct channel *channel)
{
    return &shard->gate[channel->own == shard ? 0 : 1 + channel->index % (GATE_LANES - 1)];
}

void pc_gate_enter(struct shard *shard, const struct channel *channel)
{
    if (shard->gated)
        pthread_mutex_lock(lane_of(shard, channel));
}

void pc_gate_leave(struct shard *shard, const struct channel *channel)
{
    if (shard->gated)
        pthread_mutex_unlock(lane_of(shard, channel));
}

void pc_gate_close(struct shard *shard)
{
    for (int lane = 0; shard->gated && lane < GATE_LANES; lane++)
        pthread_mutex_lock(&shard->gate[lane]);
}

void pc_gate_open(struct shard *shard)
{
    for (int lane = 0; shard->gated && lane < GATE_LANES; lane++)
        pthread_mutex_unlock(&shard->gate[lane]);
}

/* Whether a thread takes memory away: it has said so, or is about to, and has not run again since that was read. The kernel refuses every
 * change of the memory meanwhile; it looks at that before it looks at the address, where there is nothing to change. */
static bool is_taken_away(const struct shard *shard)
{
    return pc_uffd_writeprotect(shard->uffd, 0, pc_page_bytes(), 0) == -EAGAIN;
}

/* Pages of a range are zero from now on: what is missing of them will never be requested, what is under way for them will be dropped. */
static void remove_pages(struct shard *shard, const struct range *range, uint64_t offset, uint64_t pages)
{
    struct pc_pager *pager = shard->pager;
    struct block *block = pager->blocks[range->block];
    uint64_t first = range->first_page + offset, fresh_pages = 0, page_bytes = block->memory.page_bytes;
    bool waiting = false;

    /* Of a file that is mapped shared it was thrown away by a hole, of which no event tells, before this. A page that was placed in between
     * goes now: whoever has touched it since waits for this thread. */
    if (block->memory.fd >= 0 && pc_has_minor_faults(shard, block))
        (void)fallocate(block->memory.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(first * page_bytes),
                        (off_t)(pages * page_bytes));
    for (uint64_t word = first / 64; word * 64 < first + pages; word++) {
        uint64_t fresh = pc_bits_mask(word, first, pages) & ~pc_bits_word(block->received, word), wanted;

        if (!fresh)
            continue;
        (void)pc_atomic_set(block->claimed, word, fresh);
        (void)pc_atomic_set(block->zero, word, fresh);
        fresh = pc_atomic_set(block->received, word, fresh);
        fresh_pages += pc_bits_popcount(fresh);
        wanted = fresh & pc_bits_word(block->requested, word);
        waiting = waiting || wanted;
        for (; wanted; wanted &= wanted - 1)
            pc_recheck_page(shard, range->block, pc_bits_lowest(word, wanted));
    }
    /* A thread that waits there and has an entry is shown zeros; one that has none faults again. */
    if (waiting)
        (void)pc_uffd_wake(shard->uffd, range->address + offset * page_bytes, pages * page_bytes);
    pc_count_received(block, fresh_pages);
    COUNT(pager, zero_pages, fresh_pages);
    COUNT(pager, removed_pages, pages);
    pc_announce_received(pager, fresh_pages);
}

/* Applies what was taken away to what is armed. True: all of it is. */
static bool apply(struct shard *shard, uint64_t start, uint64_t end)
{
    uint32_t count = pc_range_count(shard);
    uint64_t armed = 0;

    for (uint32_t i = 0; i < count; i++) {
        const struct range *range = &shard->ranges[i];
        uint64_t page_bytes = shard->pager->blocks[range->block]->memory.page_bytes;
        uint64_t low = start > range->address ? start - range->address : 0, high = end - range->address;
        uint64_t bytes = __atomic_load_n(&range->bytes, __ATOMIC_RELAXED);

        if (end <= range->address || low >= bytes)
            continue;
        if (high > bytes)
            high = bytes;
        armed += high - low;
        /* Of a page of which only a part was taken away, as may happen with huge ones, nothing is. */
        low = (low + page_bytes - 1) / page_bytes;
        high /= page_bytes;
        if (low < high)
            remove_pages(shard, range, low, high - low);
    }
    return armed >= end - start;
}

/* Keeps it for what is armed later, as one with what it touches. Each store leaves something that was taken away. False: there is no room. */
static bool keep(struct pc_journal *journal, uint64_t start, uint64_t end)
{
    struct pc_journal_extent *unused = NULL;

    for (size_t i = 0; i < PC_JOURNAL_EXTENTS; i++) {
        struct pc_journal_extent *extent = &journal->early[i];

        if (!extent->end) {
            unused = extent;
        } else if (start <= extent->end && extent->start <= end) {
            if (start < extent->start)
                __atomic_store_n(&extent->start, start, __ATOMIC_SEQ_CST);
            if (end > extent->end)
                __atomic_store_n(&extent->end, end, __ATOMIC_SEQ_CST);
            return true;
        }
    }
    if (!unused)
        return false;
    __atomic_store_n(&unused->start, start, __ATOMIC_SEQ_CST);
    __atomic_store_n(&unused->end, end, __ATOMIC_SEQ_CST);
    return true;
}

static bool tells_removal(const struct uffd_msg *message)
{
    return message->event == UFFD_EVENT_REMOVE || message->event == UFFD_EVENT_UNMAP;
}

/* Applies what `count` events tell, and erases them. */
static void apply_events(struct shard *shard, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        struct uffd_msg *message = &shard->journal->events[i];
        uint64_t start = message->arg.remove.start, end = message->arg.remove.end;

        if (!tells_removal(message))
            continue;
        if (end <= start || apply(shard, start, end) || shard->disarmed || keep(shard->journal, start, end))
            __atomic_store_n(&message->event, 0, __ATOMIC_SEQ_CST);
        else
            __atomic_store_n(&shard->journal_full, true, __ATOMIC_SEQ_CST);
    }
}

size_t pc_apply_removals(struct shard *shard, size_t count)
{
    size_t removals = 0;

    for (size_t i = 0; i < count; i++)
        removals += tells_removal(&shard->journal->events[i]);
    if (removals) {
        COUNT(shard->pager, removes, removals);
        apply_events(shard, count);
    }
    return removals;
}

void pc_journal_open(struct shard *shard, const struct block *block)
{
    if (!shard->gated || shard->range_count || !block->states.base)
        return; /* nothing is taken away; or it has one already, which may be its own, that no other pager reads */
    shard->journal = &block->states.journals[shard->index];
    /* There, and staying there: writing to memory that has to be brought first is what a read(2) of a killed thread gives up. */
    (void)__atomic_fetch_or(&shard->journal->early[0].end, 0, __ATOMIC_SEQ_CST);
    (void)mlock(shard->journal, sizeof(*shard->journal));
}

bool pc_journal_knows(const struct shard *shard, const struct range *range)
{
    for (size_t i = 0; i < PC_JOURNAL_EXTENTS; i++) {
        const struct pc_journal_extent *extent = &shard->journal->registered[i];

        if (extent->start == range->address && extent->end == range->address + range->bytes)
            return true;
    }
    return false;
}

void pc_journal_registered(struct shard *shard, const struct range *range)
{
    for (size_t i = 0; i < PC_JOURNAL_EXTENTS; i++) {
        struct pc_journal_extent *extent = &shard->journal->registered[i];

        if (extent->end)
            continue;
        __atomic_store_n(&extent->start, range->address, __ATOMIC_SEQ_CST);
        __atomic_store_n(&extent->end, range->address + range->bytes, __ATOMIC_SEQ_CST);
        break;
    }
}

/* Nothing is armed from now on: what is taken away of other memory is not kept, for which there may be no room, and all is read. */
static void arms_no_more(struct shard *shard)
{
    shard->disarmed = true;
    __atomic_store_n(&shard->journal_full, false, __ATOMIC_SEQ_CST);
}

void pc_journal_ends(struct shard *shard)
{
    pc_gate_close(shard);
    arms_no_more(shard);
    pc_gate_open(shard);
    pc_shard_notify(shard);
}

void pc_journal_disarmed(struct shard *shard)
{
    arms_no_more(shard);
    for (size_t i = 0; i < PC_JOURNAL_EXTENTS; i++)
        __atomic_store_n(&shard->journal->registered[i].end, 0, __ATOMIC_SEQ_CST);
}

/* A thread that had begun to take memory away when that was unregistered still sends its event, and waits until it is read: that is done here,
 * as no other thread will. As long as there is one the kernel refuses changes. */
void pc_drain_removals(struct shard *shard)
{
    uint64_t end_ns = pc_now_ns() + DRAIN_NS;

    if (!shard->gated || !shard->disarmed)
        return;
    while (is_taken_away(shard) && pc_now_ns() < end_ns)
        if (!pc_read_events(shard))
            pc_sleep_ns(RETRY_NS);
}

void pc_journal_apply(struct shard *shard)
{
    shard->disarmed = false;
    __atomic_store_n(&shard->journal_full, false, __ATOMIC_SEQ_CST);
    for (size_t i = 0; i < PC_JOURNAL_EXTENTS; i++) {
        struct pc_journal_extent *extent = &shard->journal->early[i];

        if (extent->end && (extent->end <= extent->start || apply(shard, extent->start, extent->end)))
            __atomic_store_n(&extent->end, 0, __ATOMIC_SEQ_CST);
    }
    apply_events(shard, PC_JOURNAL_EVENTS);
}
