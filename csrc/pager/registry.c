/* SPDX-License-Identifier: Apache-2.0
 *
 * The registry: RAM blocks with their maps, shards with their userfaultfds, and which pages of a block which shard guards (arming),
 * until they are disarmed or poisoned.
 *
 * Owns blocks, shards, segments and ranges. Callers only, one at a time by pc_pager.lock; what they add is published by a count, so
 * that fault threads and bulk threads read it without a lock, and is never moved before the pager is freed.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "pager/pager.h"
#include "uffd/uffd_abi.h"

struct shard *pc_find_shard(struct pc_pager *pager, const struct block *block, uint64_t page, uint64_t *pages)
{
    const struct segment *segment = pc_find_segment(block, page, pages);

    return segment ? pager->shards[segment->shard] : NULL;
}

bool pc_has_minor_faults(const struct shard *shard, const struct block *block)
{
    return (block->memory.kind == PC_MEMORY_MEMFD && shard->api.features & UFFD_FEATURE_MINOR_SHMEM) ||
           (block->memory.kind == PC_MEMORY_HUGETLB && shard->api.features & UFFD_FEATURE_MINOR_HUGETLBFS);
}

/* ---- blocks ------------------------------------------------------------------------------------------------------- */

void pc_block_free(struct block *block)
{
    pc_buffer_free(block->requested, block->maps_bytes);
    pc_buffer_free(block->states.base, block->states.bytes);
    pc_local_block_free(block);
    free(block);
}

/* The maps of a block: all its own, or those that are to outlive this pager in states_fd. */
static int make_maps(struct block *block, int states_fd)
{
    uint64_t words = pc_bitmap_words(block->pages);
    int error = states_fd < 0 ? 0 : pc_states_map(states_fd, block->pages, &block->states);

    if (error)
        return error;
    block->maps_bytes = (states_fd < 0 ? 5 : 2) * words * sizeof(uint64_t);
    block->requested = pc_buffer_new(block->maps_bytes);
    if (!block->requested)
        return -ENOMEM;
    block->lost = block->requested + words;
    if (states_fd < 0) {
        block->claimed = block->lost + words;
        block->received = block->claimed + words;
        block->zero = block->received + words;
        return 0;
    }
    block->claimed = block->states.claimed;
    block->received = block->states.received;
    block->zero = block->states.zero;
    if (block->memory.fd < 0)
        pc_states_unclaim(&block->states, block->pages);
    for (uint64_t word = 0; word < words; word++)
        if (block->claimed[word] & ~block->received[word])
            return -EUCLEAN; /* pc_states_settle comes first */
    return 0;
}

int pc_pager_add_block(struct pc_pager *pager, const struct pc_memory *memory, int states_fd)
{
    struct block *block;
    int index = -ENOSPC, error;

    if (!memory->page_bytes || !memory->size_bytes || memory->size_bytes % memory->page_bytes ||
        memory->page_bytes > PC_FRAME_MAX_PAYLOAD_BYTES) /* no frame could ever bring such a page */
        return -EINVAL;
    block = calloc(1, sizeof(*block));
    if (!block)
        return -ENOMEM;
    block->memory = *memory;
    block->pages = memory->size_bytes / memory->page_bytes;
    block->local.fd = -1;
    error = make_maps(block, states_fd);
    if (error) {
        pc_block_free(block);
        return error;
    }
    pthread_mutex_lock(&pager->lock);
    /* Once, and large enough for any: a fault thread may be reading it. */
    if (memory->kind == PC_MEMORY_HUGETLB && !pager->zero_page) {
        pager->zero_page = pc_buffer_new(PC_FRAME_MAX_PAYLOAD_BYTES);
        if (!pager->zero_page)
            index = -ENOMEM;
    }
    if (index == -ENOSPC && pager->block_count < PC_MAX_BLOCKS) {
        index = (int)pager->block_count;
        pager->blocks[index] = block;
        block->missing = block->pages - pc_bits_count(block->received, 0, block->pages);
        (void)__atomic_fetch_add(&pager->missing, block->missing, __ATOMIC_SEQ_CST);
        pc_view_add(&pager->metrics.view, block->received, block->pages, memory->page_bytes);
        __atomic_store_n(&pager->block_count, pager->block_count + 1, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&pager->lock);
    if (index < 0)
        pc_block_free(block);
    return index;
}

/* ---- shards ------------------------------------------------------------------------------------------------------- */

uint64_t pc_pager_features(uint64_t available)
{
    return available & (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS |
                        UFFD_FEATURE_MINOR_HUGETLBFS | UFFD_FEATURE_THREAD_ID);
}

void pc_shard_free(struct shard *shard)
{
    struct command *last = shard->prefetches;

    if (last) { /* cut the ring open */
        shard->prefetches = last->next;
        last->next = NULL;
    }
    pc_commands_free(&shard->prefetches);
    pc_commands_free(&shard->runs);
    pc_commands_free(&shard->commands);
    if (shard->uffd >= 0)
        close(shard->uffd);
    if (shard->control_fd >= 0)
        close(shard->control_fd);
    if (shard->poll_fd >= 0)
        close(shard->poll_fd);
    pc_buffer_free(shard->receive, RECEIVE_BYTES);
    pc_buffer_free(shard->page, PC_FRAME_MAX_PAYLOAD_BYTES);
    pc_buffer_free(shard->send, SEND_BYTES);
    pc_buffer_free(shard->pending, sizeof(*shard->pending));
    pc_buffer_free(shard->ranges, MAX_RANGES * sizeof(*shard->ranges));
    for (int lane = 0; lane < GATE_LANES; lane++)
        pthread_mutex_destroy(&shard->gate[lane]);
    free(shard);
}

/* A shard whose thread does not run yet; the userfaultfd is its own. NULL and errno without memory or descriptors. */
static struct shard *new_shard(struct pc_pager *pager, int uffd, const struct pc_uffd_api *api, uint32_t busy_poll_us)
{
    struct shard *shard = calloc(1, sizeof(*shard));
    int error;

    if (!shard) {
        close(uffd);
        errno = ENOMEM;
        return NULL;
    }
    for (int lane = 0; lane < GATE_LANES; lane++)
        pc_lock_init(&shard->gate[lane]);
    shard->pager = pager;
    shard->uffd = uffd;
    shard->poll_fd = -1;
    shard->journal = &shard->own_journal;
    shard->api = *api;
    shard->stream.fd = -1;
    shard->busy_poll_ns = (uint64_t)busy_poll_us * 1000;
    shard->may_block = pc_is_adopted(shard);
    shard->gated = api->features & (UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP);
    shard->channel = (struct channel){.own = shard, .kind = PC_CHANNEL_URGENT};
    shard->send = pc_buffer_new(SEND_BYTES);
    shard->receive = pc_buffer_new(RECEIVE_BYTES);
    shard->page = pc_buffer_new(PC_FRAME_MAX_PAYLOAD_BYTES); /* memory is taken as far as it is used */
    shard->pending = pc_buffer_new(sizeof(*shard->pending));
    shard->ranges = pc_buffer_new(MAX_RANGES * sizeof(*shard->ranges));
    shard->control_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (shard->send && shard->receive && shard->page && shard->pending && shard->ranges && shard->control_fd >= 0 &&
        pc_loop_init(shard))
        return shard;
    error = errno;
    pc_shard_free(shard);
    errno = error;
    return NULL;
}

/* Starts the fault thread of a userfaultfd, which is the shard's from now on. Its index, or an error with its line. */
static int start_shard(struct pc_pager *pager, int uffd, const struct pc_uffd_api *api, uint32_t busy_poll_us, char *error,
                       size_t error_bytes)
{
    struct shard *shard = new_shard(pager, uffd, api, busy_poll_us);
    int result = shard ? 0 : -errno;

    pthread_mutex_lock(&pager->lock);
    if (!result && pager->shard_count == PC_MAX_SHARDS)
        result = -ENOSPC;
    if (!result) {
        shard->index = shard->channel.index = pager->shard_count;
        shard->metrics = &pager->metrics.map->shards[shard->index];
        result = pc_thread_start(&shard->thread, pc_fault_thread, shard);
    }
    if (!result) {
        pager->shards[shard->index] = shard;
        __atomic_store_n(&pager->shard_count, pager->shard_count + 1, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&pager->lock);
    if (!result)
        return (int)shard->index;
    if (shard)
        pc_shard_free(shard);
    return pc_fail(-result, error, error_bytes, "cannot start a fault thread: %s", strerror(-result));
}

int pc_pager_add_shard(struct pc_pager *pager, int how, uint32_t busy_poll_us, char *error, size_t error_bytes)
{
    struct pc_uffd_api api;
    int result = pc_uffd_probe(how, &api);

    if (!result)
        result = pc_uffd_open(api.how, pc_pager_features(api.features), &api);
    if (result < 0)
        return pc_fail(-result, error, error_bytes, "cannot open a userfaultfd: %s", strerror(-result));
    api.features = pc_pager_features(api.features); /* what it has, not what the kernel could */
    return start_shard(pager, result, &api, busy_poll_us, error, error_bytes);
}

/* What a descriptor must be before a fault thread can live with it. 0, or an error with its line. */
static int check_uffd(int uffd, uint64_t features, char *error, size_t error_bytes)
{
    struct pollfd readable = {.fd = uffd, .events = POLLIN};
    int flags = fcntl(uffd, F_GETFL);

    if (flags < 0)
        return pc_fail(errno, error, error_bytes, "no userfaultfd: %s", strerror(errno));
    if (!(flags & O_NONBLOCK)) /* poll(2) says POLLERR of a blocking one, for ever */
        return pc_fail(EINVAL, error, error_bytes, "the userfaultfd is a blocking one: open it with O_NONBLOCK");
    /* Without UFFDIO_API no other ioctl is taken; nothing but a userfaultfd takes this one. */
    if (pc_uffd_wake(uffd, 0, 0) == -ENOTTY)
        return pc_fail(EINVAL, error, error_bytes, "the descriptor is no userfaultfd");
    if (poll(&readable, 1, 0) == 1 && readable.revents & (POLLERR | POLLNVAL))
        return pc_fail(EINVAL, error, error_bytes, "the userfaultfd has not been set up: UFFDIO_API comes first");
    if (features & (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP))
        return pc_fail(EOPNOTSUPP, error, error_bytes,
                       "the userfaultfd reports %s, which a pager cannot follow: open it without that event",
                       features & UFFD_FEATURE_EVENT_FORK ? "forks" : "memory that moves");
    if (features & UFFD_FEATURE_SIGBUS)
        return pc_fail(EOPNOTSUPP, error, error_bytes, "the userfaultfd raises SIGBUS instead of reporting faults");
    return 0;
}

int pc_pager_adopt_shard(struct pc_pager *pager, int uffd, uint64_t features, uint32_t busy_poll_us, char *error,
                         size_t error_bytes)
{
    struct pc_uffd_api api = {.features = features};
    int result;

    (void)pc_uffd_features(uffd, &api.features); /* those it has, where /proc tells, and not those that the caller says */
    result = check_uffd(uffd, api.features, error, error_bytes);

    if (result) {
        if (result != -EBADF)
            close(uffd);
        return result;
    }
    return start_shard(pager, uffd, &api, busy_poll_us, error, error_bytes);
}

/* ---- arming ------------------------------------------------------------------------------------------------------- */

/* Without minor faults nothing tells of a page that is in the page cache without having been placed: the machine would see it as it
 * is. What is there of pages that were not received was put there by others, and is discarded. (What they put there later is seen; such
 * a kernel, before 5.13, needs memory that is mapped once.) 0 or -errno. */
static int drop_unplaced(const struct block *block, uint64_t first, uint64_t pages)
{
    uint64_t end = first + pages, page = first;

    while (page < end && block->memory.fd >= 0) {
        uint64_t from = pc_bits_next(block->received, end, page, 0);

        if (from >= end)
            break;
        page = pc_bits_next(block->received, end, from, 1);
        if (fallocate(block->memory.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(from * block->memory.page_bytes),
                      (off_t)((page - from) * block->memory.page_bytes)))
            return -errno;
    }
    return 0;
}

/* Registers, then publishes: first the segment, so that what the fault thread finds as a range has an address. The gate is closed: nothing is
 * placed there before what was taken away of it already is in the maps. */
static int register_range(struct shard *shard, struct block *block, const struct range *range, uint64_t mode)
{
    const uint64_t needed = UINT64_C(1) << PC_UFFD_IOCTL_COPY | UINT64_C(1) << PC_UFFD_IOCTL_WAKE;
    uint64_t ioctls = 0;
    int error;

    pc_journal_open(shard, block);
    if (!pc_journal_knows(shard, range)) {
        error = pc_uffd_register(shard->uffd, range->address, range->bytes, mode, &ioctls);
        if (!error && (ioctls & needed) != needed) {
            (void)pc_uffd_unregister(shard->uffd, range->address, range->bytes);
            error = -EOPNOTSUPP;
        }
        if (error)
            return error;
        pc_journal_registered(shard, range);
    }
    pc_gate_close(shard);
    block->segments[block->segment_count] =
        (struct segment){.first_page = range->first_page, .pages = range->pages, .address = range->address, .shard = shard->index};
    __atomic_store_n(&block->segment_count, block->segment_count + 1, __ATOMIC_SEQ_CST); /* see pc_local_staged */
    shard->ranges[shard->range_count] = *range;
    __atomic_store_n(&shard->range_count, shard->range_count + 1, __ATOMIC_RELEASE);
    if (shard->gated)
        pc_journal_apply(shard);
    pc_gate_open(shard);
    /* Faults that an earlier pager has read, those that it has not, and those that came before this: they happen again. */
    (void)pc_uffd_wake(shard->uffd, range->address, range->bytes);
    pc_shard_notify(shard); /* it looks at its userfaultfd from now on */
    return 0;
}

/* With the lock. */
static int arm(struct shard *shard, struct block *block, const struct range *range, char *error, size_t error_bytes)
{
    uint64_t mode = PC_UFFD_MISSING, first = range->first_page;
    int result = 0;

    if (pc_has_minor_faults(shard, block))
        mode |= PC_UFFD_MINOR;
    for (uint32_t i = 0; i < block->segment_count; i++) {
        const struct segment *other = &block->segments[i];

        if (first < other->first_page + other->pages && other->first_page < first + range->pages)
            return pc_fail(EBUSY, error, error_bytes, "pages %llu+%llu of RAM block %u are armed already",
                           (unsigned long long)first, (unsigned long long)range->pages, range->block);
    }
    for (uint32_t i = 0; i < shard->range_count; i++) {
        const struct range *other = &shard->ranges[i];

        if (range->address < other->address + other->bytes && other->address < range->address + range->bytes)
            return pc_fail(EBUSY, error, error_bytes, "the addresses of pages %llu+%llu of RAM block %u are armed already",
                           (unsigned long long)first, (unsigned long long)range->pages, range->block);
    }
    if (block->segment_count == MAX_SEGMENTS || shard->range_count == MAX_RANGES)
        return pc_fail(ENOSPC, error, error_bytes, "RAM block %u is armed in too many parts", range->block);
    if (!(mode & PC_UFFD_MINOR))
        result = drop_unplaced(block, first, range->pages);
    if (result)
        return pc_fail(-result, error, error_bytes, "cannot empty RAM block %u: %s", range->block, strerror(-result));
    result = register_range(shard, block, range, mode);
    if (result)
        return pc_fail(-result, error, error_bytes, "cannot register RAM block %u with a userfaultfd: %s", range->block,
                       strerror(-result));
    return 0;
}

int pc_pager_arm(struct pc_pager *pager, uint32_t shard, uint32_t block, uint64_t first_page, uint64_t pages, char *error,
                 size_t error_bytes)
{
    const struct pc_memory *memory = block < pc_block_count(pager) ? &pager->blocks[block]->memory : NULL;

    if (memory && !memory->base)
        return pc_fail(EINVAL, error, error_bytes, "RAM block %u has no address", block);
    return pc_pager_arm_at(pager, shard, block, first_page, pages,
                           memory ? (uint64_t)(uintptr_t)memory->base + first_page * memory->page_bytes : 0, error, error_bytes);
}

int pc_pager_arm_at(struct pc_pager *pager, uint32_t shard_index, uint32_t block_index, uint64_t first_page, uint64_t pages,
                    uint64_t address, char *error, size_t error_bytes)
{
    struct shard *shard = pc_shard_at(pager, shard_index);
    struct range range = {.address = address, .first_page = first_page, .pages = pages, .block = block_index};
    struct block *block;
    int result;

    if (!shard || block_index >= pc_block_count(pager))
        return pc_fail(EINVAL, error, error_bytes, "there is no such shard or RAM block");
    if (!pages || !pc_block_has(pager, block_index, first_page, pages))
        return pc_fail(EINVAL, error, error_bytes, "RAM block %u has no pages %llu+%llu", block_index,
                       (unsigned long long)first_page, (unsigned long long)pages);
    block = pager->blocks[block_index];
    range.bytes = pages * block->memory.page_bytes;
    if (address > UINT64_MAX - range.bytes || address % block->memory.page_bytes)
        return pc_fail(EINVAL, error, error_bytes, "pages of RAM block %u cannot be at 0x%llx", block_index,
                       (unsigned long long)address);
    pthread_mutex_lock(&pager->lock);
    result = arm(shard, block, &range, error, error_bytes);
    pthread_mutex_unlock(&pager->lock);
    if (!result)
        pc_local_armed(pager, block);
    return result;
}

void pc_shard_unregister(struct pc_pager *pager, struct shard *shard)
{
    pthread_mutex_lock(&pager->lock);
    /* From then on its owner waits for nobody: what was read to be thrown away there has been thrown away before. */
    pc_gate_close(shard);
    for (uint32_t i = 0; i < shard->range_count; i++) {
        if (!shard->ranges[i].bytes)
            continue;
        (void)pc_uffd_unregister(shard->uffd, shard->ranges[i].address, shard->ranges[i].bytes);
        /* The kernel wakes all who wait there, and only then lets the mapping go: a thread that faults in between would wait for ever. */
        (void)pc_uffd_wake(shard->uffd, shard->ranges[i].address, shard->ranges[i].bytes);
        __atomic_store_n(&shard->ranges[i].bytes, 0, __ATOMIC_RELAXED);
    }
    pc_journal_disarmed(shard);
    pc_gate_open(shard);
    pthread_mutex_unlock(&pager->lock);
    pc_shard_notify(shard);
}

int pc_pager_disarm(struct pc_pager *pager)
{
    uint32_t shards = pc_shard_count(pager);

    if (__atomic_load_n(&pager->missing, __ATOMIC_SEQ_CST))
        return -EBUSY;
    for (uint32_t i = 0; i < shards; i++)
        pc_shard_unregister(pager, pager->shards[i]);
    return 0;
}

/* Poisons every page that is missing: touching it is SIGBUS (or EFAULT), and shows no zeros. */
int pc_shard_poison(struct pc_pager *pager, struct shard *shard)
{
    pc_journal_ends(shard); /* as long as an event is not read the kernel refuses to poison */
    for (uint32_t i = 0; i < shard->range_count; i++) {
        const struct range *range = &shard->ranges[i];
        const struct block *block = pager->blocks[range->block];
        uint64_t page = range->first_page, end = page + (range->bytes ? range->pages : 0);

        while (page < end) {
            uint64_t first = pc_bits_next(block->received, end, page, 0), bytes, at = 0;

            if (first >= end)
                break;
            page = pc_bits_next(block->received, end, first, 1);
            bytes = (page - first) * block->memory.page_bytes;
            while (at < bytes) {
                uint64_t address = pc_page_address(block, first) + at, done = 0;
                int error = pc_uffd_poison(shard->uffd, address, bytes - at, 0, &done);

                at += done;
                if (error == -ESRCH)
                    return 0; /* of another process, which has ended: no thread is left to see zeros */
                if (error == -EEXIST)
                    at += block->memory.page_bytes;
                else if (error == -EAGAIN && !done)
                    pc_sleep_ns(RETRY_NS); /* until the fault thread has read the event */
                else if (error && error != -EAGAIN)
                    return error;
            }
        }
        (void)pc_uffd_wake(shard->uffd, range->address, range->bytes);
    }
    return 0;
}
