/* SPDX-License-Identifier: Apache-2.0
 *
 * What a bulk thread pays for its next run when nearly all of a memory has been sent, and each request has moved the cursor back to
 * the beginning. The page server is the real one; its memory is addresses without anything behind them, which nothing reads.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "pageserver/server.h"
#include "postcopy/bench.h"

#define PAGE_BYTES UINT64_C(4096)

static int64_t claim(struct pc_pageserver *server, uint64_t pages, uint64_t claims)
{
    struct source_block *block = server->blocks[0];
    uint64_t *received = calloc(block->words, sizeof(*received)), begin_ns;
    struct run run;
    int64_t ns = -ENOMEM;

    if (!received)
        return ns;
    pc_bitmap_set_range(received, 0, pages);
    for (uint64_t i = 0; i < claims; i++)
        pc_bitmap_clear_range(received, i * (pages / claims), 1);
    ns = pc_pageserver_set_received(server, 0, received);
    begin_ns = pc_now_ns();
    for (uint64_t i = 0; !ns && i < claims; i++) {
        __atomic_store_n(&server->push_from, PLACE(0, 0), __ATOMIC_RELAXED);
        pthread_mutex_lock(&server->push_lock);
        if (!pc_claim_run(server, &run) || run.first_page != i * (pages / claims))
            ns = -EIO;
        pthread_mutex_unlock(&server->push_lock);
    }
    if (!ns)
        ns = (int64_t)((pc_now_ns() - begin_ns) / claims);
    free(received);
    return ns;
}

int64_t pc_bench_claim(uint64_t pages, uint64_t claims)
{
    struct pc_memory memory = {.size_bytes = pages * PAGE_BYTES, .page_bytes = PAGE_BYTES, .kind = PC_MEMORY_ANON, .fd = -1};
    struct pc_pageserver *server;
    int64_t result;

    if (!claims || pages / claims < 2) /* a run of one page each */
        return -EINVAL;
    memory.base = mmap(NULL, memory.size_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory.base == MAP_FAILED)
        return -errno;
    result = pc_pageserver_new(0, &server);
    if (!result) {
        result = pc_pageserver_add_block(server, &memory, PAGE_BYTES);
        if (!result)
            result = claim(server, pages, claims);
        pc_pageserver_free(server);
    }
    munmap(memory.base, memory.size_bytes);
    return result;
}
