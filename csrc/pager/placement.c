/* SPDX-License-Identifier: Apache-2.0
 *
 * Placement: what a frame brought becomes memory, once for each page, and faults on pages that are there already are resolved.
 *
 * Owns the rules by which `claimed`, `received` and `zero` change (head of pager.c). Runs on fault threads, bulk threads and readers at the
 * same time; set_zero brings a caller here too.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pager/pager.h"

#define FRAME_NS 100 /* the cost of a frame, as those in pager.h */

/* So many pages have been received, and are counted in their block: tells watches, and that none is missing any more. */
void pc_announce_received(struct pc_pager *pager, uint64_t pages)
{
    if (!pages)
        return;
    pc_watches_notify(pager);
    if (!__atomic_sub_fetch(&pager->missing, pages, __ATOMIC_SEQ_CST)) /* one thread alone takes the last */
        pc_events_push(&pager->events, PC_EVENT_COMPLETE, 0, 0, 0, "every page is here");
}

/* ---- one page, or a run of them ----------------------------------------------------------------------------------- */

/* Whether what the kernel refused may work later: memory that is short now, an address range that is not armed or not there. */
static bool may_heal(int error)
{
    return error == -ENOMEM || error == -ENOSPC || error == -ENOENT || error == -EAGAIN;
}

int pc_fill_zeros(struct shard *shard, const struct block *block, uint64_t page, uint64_t pages, uint64_t *done)
{
    uint64_t address = pc_page_address(block, page), bytes = block->memory.page_bytes;

    if (block->memory.kind == PC_MEMORY_HUGETLB) /* which has no ZEROPAGE */
        return pc_uffd_copy(shard->uffd, address, shard->pager->zero_page, bytes, 0, done);
    return pc_uffd_zeropage(shard->uffd, address, pages * bytes, 0, done);
}

/* What a fault on a received page means is described at the head of pager.c. */
int pc_resolve(struct shard *shard, const struct block *block, uint64_t page, bool minor)
{
    uint64_t done;
    int error = minor ? pc_uffd_continue(shard->uffd, pc_page_address(block, page), block->memory.page_bytes, 0, &done)
                      : pc_fill_zeros(shard, block, page, 1, &done);

    if (pc_is_temporary(error))
        return error;
    /* Whatever else the kernel says, let the thread look again: if the page still is not there, it faults anew. */
    if (error)
        pc_wake_pages(shard, block, page, 1);
    /* EFAULT from CONTINUE: thrown away again since the fault, which comes back as a missing one. ENOENT: the memory has gone. */
    return error == -EEXIST || (minor && error == -EFAULT) || error == -ENOENT ? 0 : error;
}

/* Changes a page in the page cache without going through the machine's mapping. */
static int overwrite_page(const struct block *block, uint64_t page, const uint8_t *content)
{
    uint64_t bytes = block->memory.page_bytes;
    void *alias;

    if (block->memory.kind != PC_MEMORY_HUGETLB)
        return pc_pwrite_all(block->memory.fd, content, bytes, page * bytes);
    /* hugetlbfs has no write(2). */
    alias = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, block->memory.fd, (off_t)(page * bytes));
    if (alias == MAP_FAILED)
        return -errno;
    memcpy(alias, content, bytes);
    return munmap(alias, bytes) ? -errno : 0;
}

/* The page is in the page cache although no pager has placed it: its content is not ours (zeros, most likely, see
 * the head of pager.c), and no thread has it mapped through the userfaultfd. Overwrite it, then expose it. Until it is exposed
 * this may be repeated. */
static int place_over(struct shard *shard, const struct block *block, uint64_t page, const uint8_t *content)
{
    uint64_t address = pc_page_address(block, page), bytes = block->memory.page_bytes, done;
    /* Private memory is not shared: a page there is a mistake worth stopping for. Unless it is another process's: then an earlier pager may
     * have placed it, or its process, and it has been written to since. */
    int error = pc_is_adopted(shard) ? 0 : -EEXIST;

    if (block->memory.fd >= 0) {
        error = overwrite_page(block, page, content);
        if (!error)
            error = pc_uffd_continue(shard->uffd, address, bytes, 0, &done);
        if (error == -EAGAIN)
            return error;
        if (error == -EEXIST)
            error = 0;
    }
    pc_wake_pages(shard, block, page, 1);
    return error;
}

/* Places claimed pages that all belong to one shard. After an error *placed of them are there, and are not to be placed again:
 * the machine may have written to them. -EAGAIN: not now. */
static int place_run(struct shard *shard, struct block *block, uint64_t first, uint64_t pages, const uint8_t *content,
                     uint64_t *placed)
{
    uint64_t page_bytes = block->memory.page_bytes, bytes = pages * page_bytes, at = 0, most = bytes;
    int error = 0;

    while (at < bytes && !error) {
        uint64_t page = first + at / page_bytes, done = 0;

        error = pc_uffd_copy(shard->uffd, pc_page_address(block, page), content + at, bytes - at < most ? bytes - at : most, 0, &done);
        at += done;
        if (error == -EEXIST && at < bytes) {
            error = place_over(shard, block, first + at / page_bytes, content + at);
            if (!error)
                at += page_bytes;
        } else if (error == -EAGAIN && done) {
            error = 0; /* the kernel stopped half way: go on from where it stopped */
        } else if (error == -ENOENT && most > page_bytes) {
            most = page_bytes; /* it says so of a run with an edge of two mappings in it, too */
            error = 0;
        } else if (error == -ENOENT) { /* the page has left the userfaultfd: threads that waited there look again */
            pc_wake_pages(shard, block, page, 1);
            if (pc_is_adopted(shard)) { /* the kernel answers later faults there itself */
                (void)pc_atomic_set(block->zero, page / 64, UINT64_C(1) << (page % 64));
                COUNT(shard->pager, removed_pages, 1);
                at += page_bytes;
                error = 0;
            }
        }
    }
    *placed = at / page_bytes;
    return at < bytes ? error : 0;
}

/* ---- what a frame brings ------------------------------------------------------------------------------------------ */

/* Pages of a shard, of one word of the maps, have been received by placing: lets those go who wait for them. */
static void after_placing(struct shard *shard, const struct channel *channel, uint32_t index, uint64_t first, uint64_t pages,
                         uint64_t received_ns)
{
    const struct block *block = shard->pager->blocks[index];
    uint64_t word = first / 64, wanted = pc_bits_word(block->requested, word) & pc_bits_mask(word, first, pages);

    if (!wanted)
        return;
    if (shard == channel->own) {
        pc_finish_faults(shard, index, first, pages, received_ns);
        return;
    }
    pc_wake_pages(shard, block, first, pages); /* once more: see the head of pager.c */
    if (__atomic_load_n(&shard->metrics->pending, __ATOMIC_SEQ_CST))
        for (; wanted; wanted &= wanted - 1)
            pc_recheck_page(shard, index, pc_bits_lowest(word, wanted));
}

/* Takes back a claim: another thread may bring what this one could not place. A thread that began to wait meanwhile has not requested
 * it; one that requested it before may have had its answer dropped as a duplicate, unless the content is kept for another try. */
static void unclaim(struct pc_pager *pager, const struct channel *channel, uint32_t index, uint64_t word, uint64_t pages, bool kept)
{
    struct block *block = pager->blocks[index];

    pc_atomic_clear(block->claimed, word, pages);
    for (uint64_t wanted = pages & pc_bits_word(block->requested, word); wanted; wanted &= wanted - 1) {
        uint64_t page = pc_bits_lowest(word, wanted), one = 1;
        struct shard *shard = pc_find_shard(pager, block, page, &one);

        if (!shard)
            continue;
        if (!kept && shard != channel->own) /* its own channel ends by this: all of it is requested again on the next one */
            __atomic_store_n(&shard->answers_dropped, true, __ATOMIC_SEQ_CST);
        pc_recheck_page(shard, index, page);
    }
}

/* Places those pages of one word of the maps that this thread has claimed: *mine, from which what is dealt with is taken. How many
 * were placed in *placed. */
static int place_word(struct pc_pager *pager, const struct channel *channel, const struct pc_frame *frame, const uint8_t *content,
                      uint64_t word, uint64_t *mine, uint64_t received_ns, uint64_t *placed)
{
    struct block *block = pager->blocks[frame->block];
    int error = 0;

    while (*mine && !error) {
        uint64_t first = pc_bits_lowest(word, *mine), shifted = *mine >> (first % 64), done = 0, removed;
        uint64_t count = ~shifted ? (uint64_t)__builtin_ctzll(~shifted) : 64;
        struct shard *shard = pc_find_shard(pager, block, first, &count);

        if (!shard) { /* it has no memory yet: staged, its claim is taken back */
            uint64_t mask = pc_bits_mask(word, first, count);

            error = pc_local_stage(pager, frame->block, first, count, content + (first - frame->first_page) * block->memory.page_bytes);
            if (!error) {
                unclaim(pager, channel, frame->block, word, mask, false);
                pc_local_staged(pager, block);
                *mine &= ~mask;
            }
            continue;
        }
        pc_gate_enter(shard, channel);
        removed = *mine & pc_bits_word(block->received, word); /* taken away since they were claimed: look again at what is left */
        if (!removed)
            error = place_run(shard, block, first, count, content + (first - frame->first_page) * block->memory.page_bytes, &done);
        if (done) {
            (void)pc_atomic_set(block->received, word, pc_bits_mask(word, first, done));
            pc_count_received(block, done);
        }
        pc_gate_leave(shard, channel);
        *mine &= ~removed;
        if (done) {
            after_placing(shard, channel, frame->block, first, done, received_ns);
            *placed += done;
            *mine &= ~pc_bits_mask(word, first, done);
        }
    }
    return error;
}

/* Claims each page of a frame and places those that were not claimed. Goes on at progress->done, and stops there when the turn's work is used
 * up, or at -EAGAIN. Any other error has a line in progress->text. */
static int place_pages(struct pc_pager *pager, const struct channel *channel, const struct pc_frame *frame,
                       const uint8_t *content, uint64_t received_ns, struct progress *progress)
{
    struct block *block = pager->blocks[frame->block];
    uint64_t end = frame->first_page + frame->pages;
    int error = 0;

    while (progress->done < frame->pages && progress->work_ns && !error) {
        uint64_t page = frame->first_page + progress->done, word = page / 64, mask = pc_bits_mask(word, page, end - page);
        uint64_t placed = 0, claimed, mine, duplicates;

        mine = claimed = pc_atomic_set(block->claimed, word, mask);
        error = place_word(pager, channel, frame, content, word, &mine, received_ns, &placed);
        if (error) {
            uint64_t failed = pc_bits_lowest(word, mine);

            unclaim(pager, channel, frame->block, word, mine, error == -EAGAIN);
            mask &= (UINT64_C(1) << (failed % 64)) - 1; /* what is dealt with */
            progress->done = failed - frame->first_page;
            if (error == -EAGAIN) {
                COUNT(pager, retries, 1);
            } else {
                (void)pc_fail(-error, progress->text, sizeof(progress->text), "cannot place page %llu of RAM block %u: %s",
                              (unsigned long long)failed, frame->block, strerror(-error));
                if (!may_heal(error))
                    pc_pager_fatal(pager, error, "cannot place", frame->block, failed);
            }
        } else {
            progress->done = (word + 1) * 64 - frame->first_page;
        }
        /* All counting before the announcement: who reads COMPLETE reads final figures. */
        duplicates = pc_bits_popcount(mask & ~claimed);
        if (duplicates)
            COUNT(pager, duplicate_pages, duplicates);
        if (!(frame->flags & PC_FRAME_DEMAND))
            COUNT(pager, background_pages, placed);
        else if (frame->request_id & REQUEST_AHEAD)
            COUNT(pager, prefetched_pages, placed);
        else
            COUNT(pager, demand_pages, placed);
        if (channel->local)
            COUNT(pager, local_pages, placed);
        if (channel->local && !(frame->flags & PC_FRAME_DEMAND) && !block->local.staging)
            COUNT(pager, prefetched_pages, placed);
        pc_announce_received(pager, placed);
        progress->fresh += placed;
        pc_spend(progress, WORD_NS + placed * (PLACE_NS + block->memory.page_bytes / BYTES_PER_NS));
    }
    return error;
}

/* Pages have become known to be zero: nothing is placed but for those that a thread waits for. */
static void after_zeroing(struct pc_pager *pager, const struct channel *channel, uint32_t index, uint64_t word, uint64_t waiting,
                        uint64_t received_ns)
{
    const struct block *block = pager->blocks[index];

    for (; waiting; waiting &= waiting - 1) {
        uint64_t page = pc_bits_lowest(word, waiting), one = 1;
        struct shard *shard = pc_find_shard(pager, block, page, &one);

        if (!shard || (shard == channel->own && pc_resolve_zero(shard, index, page, received_ns)))
            continue;
        /* Requested, but by no thread of which this one knows: memory that is zero is to cost nothing. Should there be one all the
         * same, it faults anew and finds the page received. */
        pc_wake_pages(shard, block, page, 1);
        if (shard != channel->own && __atomic_load_n(&shard->metrics->pending, __ATOMIC_SEQ_CST))
            pc_recheck_page(shard, index, page);
    }
}

void pc_place_zeros(struct pc_pager *pager, const struct channel *channel, uint32_t index, uint64_t first, uint64_t pages,
                    uint64_t received_ns, struct progress *progress)
{
    struct block *block = pager->blocks[index];
    uint64_t end = first + pages, fresh = 0, duplicates = 0;

    while (progress->done < pages && progress->work_ns) {
        uint64_t page = first + progress->done, word = page / 64, mask = pc_bits_mask(word, page, end - page);
        uint64_t mine = 0, waiting = 0;

        if (mask & ~pc_bits_word(block->claimed, word)) {
            mine = pc_atomic_set(block->claimed, word, mask);
            (void)pc_atomic_set(block->zero, word, mine);
            fresh += pc_bits_popcount(pc_atomic_set(block->received, word, mine));
            waiting = mine & pc_bits_word(block->requested, word);
            after_zeroing(pager, channel, index, word, waiting, received_ns);
        }
        duplicates += pc_bits_popcount(mask & ~mine);
        pc_spend(progress, WORD_NS + pc_bits_popcount(waiting) * PLACE_NS);
        progress->done = (word + 1) * 64 - first;
    }
    pc_count_received(block, fresh);
    COUNT(pager, zero_pages, fresh);
    if (duplicates)
        COUNT(pager, duplicate_pages, duplicates);
    progress->fresh += fresh;
    pc_announce_received(pager, fresh);
}

/* ---- frames ------------------------------------------------------------------------------------------------------- */

#define REFUSE(...) return pc_fail(EBADMSG, progress->text, sizeof(progress->text), __VA_ARGS__)

int pc_decode_header(struct pc_pager *pager, const uint8_t *header, struct pc_frame *frame, struct progress *progress)
{
    int error = pc_frame_decode(header, frame, progress->text, sizeof(progress->text));
    const struct block *block;
    uint32_t content_bytes;

    if (error || frame->type == PC_FRAME_END)
        return error;
    if (frame->type != PC_FRAME_PAGES && frame->type != PC_FRAME_ZERO && frame->type != PC_FRAME_ERROR)
        REFUSE("a frame of type %u does not belong here", frame->type);
    if (frame->block >= pc_block_count(pager))
        REFUSE("a frame names RAM block %u, which there is not", frame->block);
    block = pager->blocks[frame->block];
    if (frame->first_page >= block->pages || frame->pages > block->pages - frame->first_page)
        REFUSE("a frame names pages %llu+%u of RAM block %u, which has %llu", (unsigned long long)frame->first_page, frame->pages,
               frame->block, (unsigned long long)block->pages);
    content_bytes = frame->content_bytes ? frame->content_bytes : frame->payload_bytes;
    if (frame->type == PC_FRAME_PAGES && content_bytes != frame->pages * block->memory.page_bytes)
        REFUSE("a frame of %u pages carries %u bytes", frame->pages, content_bytes);
    return 0;
}

int pc_check_payload(const struct pc_frame *frame, const uint8_t *payload, struct progress *progress)
{
    if (frame->payload_crc && pc_crc32c(0, payload, frame->payload_bytes) != frame->payload_crc)
        REFUSE("the content of a frame of %u pages is damaged (CRC32C differs)", frame->pages);
    return 0;
}

/* The source cannot serve pages. That does not matter when they are here; otherwise it is reported, once for each channel, and the
 * channel, by which other pages still come, goes on. */
static void report_error(struct pc_pager *pager, struct channel *channel, const struct pc_frame *frame, const uint8_t *payload,
                         struct progress *progress)
{
    uint64_t end = frame->first_page + frame->pages;
    uint64_t page = pc_bits_next(pager->blocks[frame->block]->received, end, frame->first_page, false);

    progress->done = frame->pages;
    pc_spend(progress, (page / 64 - frame->first_page / 64 + 1) * WORD_NS);
    if (page == end || channel->error_reported)
        return;
    channel->error_reported = true;
    pc_events_push(&pager->events, PC_EVENT_FATAL, channel->kind, (int)channel->index, EIO,
                   "the source cannot serve page %llu of RAM block %u: %.*s", (unsigned long long)page, frame->block,
                   (int)(frame->payload_bytes < 120 ? frame->payload_bytes : 120), (const char *)payload);
}

int pc_handle_frame(struct pc_pager *pager, struct channel *channel, const struct pc_frame *frame, const uint8_t *payload,
                    struct progress *progress)
{
    uint64_t received_ns = frame->flags & PC_FRAME_DEMAND ? pc_now_ns() : 0;
    uint64_t pushes = __atomic_load_n(&pager->pushes, __ATOMIC_SEQ_CST);

    pc_spend(progress, FRAME_NS);
    switch (frame->type) {
    case PC_FRAME_PAGES:
        if (frame->content_bytes) /* on a bulk channel it has been decompressed; no thread that serves faults does that */
            REFUSE("a compressed frame does not belong here");
        return place_pages(pager, channel, frame, payload, received_ns, progress);
    case PC_FRAME_ZERO:
        pc_place_zeros(pager, channel, frame->block, frame->first_page, frame->pages, received_ns, progress);
        return 0;
    case PC_FRAME_END:
        if (channel->kind != PC_CHANNEL_BULK)
            REFUSE("a frame of type %u does not belong here", frame->type);
        if (channel->ended == pushes)
            REFUSE("the source says a second time that every page was offered");
        channel->ended = pushes;
        pc_events_push(&pager->events, PC_EVENT_BULK_END, channel->kind, (int)channel->index, 0, "every page has been offered");
        return 0;
    default:
        report_error(pager, channel, frame, payload, progress);
        return 0;
    }
}
