/* SPDX-License-Identifier: Apache-2.0
 *
 * Watches: an eventfd is written to when every page of a range has been received.
 *
 * Owns the watches, under watch_lock, which callers take and every thread by which pages are received, but only while there is a
 * watch. It is held for microseconds, and no memory is allocated under it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "pager/pager.h"

static void remove_watch(struct pc_pager *pager, size_t index)
{
    close(pager->watches[index].fd);
    pager->watches[index] = pager->watches[pager->watch_count - 1];
    __atomic_store_n(&pager->watch_count, pager->watch_count - 1, __ATOMIC_SEQ_CST);
}

/* Moves a watch over what is received; true when nothing is left of it. */
static bool is_over(const struct pc_pager *pager, struct watch *watch)
{
    watch->page = pc_bits_next(pager->blocks[watch->block]->received, watch->end, watch->page, false);
    return watch->page == watch->end;
}

/* Pages have been received. A new watch first counts itself, then looks at `received`; here it is the other way round, so that one
 * of the two sees the other. */
void pc_watches_notify(struct pc_pager *pager)
{
    if (!__atomic_load_n(&pager->watch_count, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&pager->watch_lock);
    for (size_t i = pager->watch_count; i-- > 0;) {
        uint64_t one = 1;

        if (is_over(pager, &pager->watches[i])) {
            (void)!write(pager->watches[i].fd, &one, sizeof(one));
            remove_watch(pager, i);
        }
    }
    pthread_mutex_unlock(&pager->watch_lock);
}

/* Takes the lock with room for one watch more. -ENOMEM: without the lock. */
static int lock_with_room(struct pc_pager *pager)
{
    pthread_mutex_lock(&pager->watch_lock);
    while (pager->watch_count == pager->watch_capacity) {
        size_t capacity = pager->watch_capacity ? pager->watch_capacity * 2 : 16;
        struct watch *larger, *unused;

        pthread_mutex_unlock(&pager->watch_lock);
        unused = larger = calloc(capacity, sizeof(*larger));
        if (!larger)
            return -ENOMEM;
        pthread_mutex_lock(&pager->watch_lock);
        if (capacity > pager->watch_capacity) {
            for (size_t i = 0; i < pager->watch_count; i++)
                larger[i] = pager->watches[i];
            unused = pager->watches;
            pager->watches = larger;
            pager->watch_capacity = capacity;
        }
        pthread_mutex_unlock(&pager->watch_lock);
        free(unused);
        pthread_mutex_lock(&pager->watch_lock);
    }
    return 0;
}

int64_t pc_pager_watch(struct pc_pager *pager, uint32_t block, uint64_t first_page, uint64_t pages, int event_fd)
{
    struct watch *watch;
    int64_t ticket = 0;
    int fd;

    if (!pc_block_has(pager, block, first_page, pages))
        return -EINVAL;
    fd = fcntl(event_fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (lock_with_room(pager)) {
        close(fd);
        return -ENOMEM;
    }
    watch = &pager->watches[pager->watch_count];
    *watch = (struct watch){.page = first_page, .end = first_page + pages, .block = block, .fd = fd};
    __atomic_store_n(&pager->watch_count, pager->watch_count + 1, __ATOMIC_SEQ_CST);
    if (is_over(pager, watch))
        remove_watch(pager, pager->watch_count - 1);
    else
        ticket = watch->ticket = ++pager->last_ticket;
    pthread_mutex_unlock(&pager->watch_lock);
    return ticket;
}

void pc_pager_unwatch(struct pc_pager *pager, int64_t ticket)
{
    pthread_mutex_lock(&pager->watch_lock);
    for (size_t i = 0; i < pager->watch_count; i++)
        if (pager->watches[i].ticket == ticket) {
            remove_watch(pager, i);
            break;
        }
    pthread_mutex_unlock(&pager->watch_lock);
}
