/* SPDX-License-Identifier: Apache-2.0
 *
 * A program that is no virtual machine, and can be moved to another host while it computes (docs/programs.md).
 *
 * All that it knows is in one file in memory, the arena, which it has mapped shared: arena FILE MEBIBYTES. It changes page after
 * page of it, at random, and checks each one before. It may be stopped for good at any instruction: a process that maps the same
 * memory afterwards goes on from there. A page that was being changed then is changed once more: `busy` says which one.
 *
 *     cc -O2 -o arena arena.c && postcopy run -- ./arena /dev/shm/arena 64
 */
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define WORDS 512 /* of a page */
#define MAGIC 0x616e657261ull

struct head { /* the first page */
    _Atomic uint64_t magic;
    uint64_t nonce; /* made once, and never again: by that one sees that it is the same arena */
    uint64_t pages;
    _Atomic uint64_t step;
    _Atomic uint64_t errors;
    _Atomic uint64_t busy; /* number of the page that is being changed, which is never 0; 0: none */
    uint64_t busy_version;
};

static uint64_t mixed(uint64_t x) /* splitmix64 */
{
    x += 0x9E3779B97F4A7C15;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

static void fill(uint64_t *page, uint64_t number, uint64_t version)
{
    for (uint64_t i = 1; i < WORDS; i++)
        page[i] = mixed(number << 40 ^ version << 10 ^ i);
    page[0] = version;
}

static int is_right(const uint64_t *page, uint64_t number)
{
    if (!page[0]) /* nobody has written it */
        return !memcmp(page, page + 1, (WORDS - 1) * sizeof(*page));
    for (uint64_t i = 1; i < WORDS; i++)
        if (page[i] != mixed(number << 40 ^ page[0] << 10 ^ i))
            return 0;
    return 1;
}

int main(int argc, char **argv)
{
    uint64_t bytes = argc == 3 ? strtoull(argv[2], NULL, 10) << 20 : 0, last = 0;
    int fd = bytes ? open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    uint64_t(*arena)[WORDS];
    struct head *head;

    if (fd < 0 || ftruncate(fd, (off_t)bytes)) {
        fprintf(stderr, "usage: arena FILE MEBIBYTES (a file in /dev/shm)\n");
        return 2;
    }
    arena = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (arena == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    close(fd);
    printf("mapped\n");
    fflush(stdout);

    head = (struct head *)arena; /* under `run --lazy` the first touch: it waits here for the memory of the other one */
    if (head->magic != MAGIC) {
        head->nonce = mixed((uint64_t)time(NULL) << 20 ^ (uint64_t)getpid());
        head->pages = bytes / sizeof(*arena);
        head->magic = MAGIC;
    }
    if (head->busy)
        fill(arena[head->busy], head->busy, head->busy_version);
    head->busy = 0;
    for (;;) {
        uint64_t number = 1 + mixed(head->nonce ^ head->step) % (head->pages - 1), *page = arena[number];
        uint64_t now = (uint64_t)time(NULL);

        if (!is_right(page, number))
            head->errors++;
        head->busy_version = page[0] + 1;
        head->busy = number;
        fill(page, number, head->busy_version);
        head->busy = 0;
        head->step++;
        if (now != last) {
            printf("nonce %llx step %llu errors %llu\n", (unsigned long long)head->nonce, (unsigned long long)head->step,
                   (unsigned long long)head->errors);
            fflush(stdout);
            last = now;
        }
    }
}
