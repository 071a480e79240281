/* SPDX-License-Identifier: Apache-2.0
 *
 * A process that owns memory: it has mapped a file of it shared, has opened a userfaultfd, and does with the memory what it is ordered
 * to. A child of the case, which has the file and a copy of the userfaultfd. Each of its threads has one order at a time; a case waits
 * for one for as long as test.h lets it.
 */
#ifndef PC_OWNER_H
#define PC_OWNER_H

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "postcopy/memory.h"
#include "postcopy/uffd.h"
#include "tests/support/test.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

#define OWNER_THREADS 3

/* WRITE_BY_KERNEL: what a read(2) brings. PUNCH and DONTNEED: the two halves of what QEMU's balloon does. WORK: what the test defines. */
enum owner_op { IDLE, READ, WRITE, WRITE_BY_KERNEL, PUNCH, DONTNEED, WORK, EXECUTE, DONE };

struct owner { /* shared by both processes */
    struct pc_memory memory; /* without an address */
    uint64_t address, features;
    pid_t pid;
    int number, uffd; /* the userfaultfd there, and here */
    atomic_bool ready, stop;
    atomic_ulong steps;
    struct {
        atomic_int op;
        uint64_t page, value; /* of the page's second word */
    } orders[OWNER_THREADS];
};

struct owner_thread {
    struct owner *owner;
    uint64_t number;
    void (*work)(struct owner *owner, uint64_t number);
    pthread_t thread;
};

static volatile uint64_t *owner_page(const struct owner *owner, uint64_t page)
{
    return (volatile uint64_t *)(uintptr_t)(owner->address + page * owner->memory.page_bytes);
}

static void owner_punch(const struct owner *owner, uint64_t page)
{
    CHECK_SYS(fallocate(owner->memory.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * owner->memory.page_bytes),
                        (off_t)owner->memory.page_bytes));
}

static void owner_dontneed(const struct owner *owner, uint64_t page)
{
    CHECK_SYS(madvise((void *)(uintptr_t)owner_page(owner, page), owner->memory.page_bytes, MADV_DONTNEED));
}

static void owner_write_by_kernel(volatile uint64_t *to, uint64_t value)
{
    int fds[2];

    CHECK_SYS(pipe(fds));
    CHECK_EQ(write(fds[1], &value, sizeof(value)), sizeof(value));
    CHECK_EQ(read(fds[0], (void *)(uintptr_t)to, sizeof(value)), sizeof(value));
    close(fds[0]);
    close(fds[1]);
}

static void *owner_obey(void *argument)
{
    struct owner_thread *thread = argument;
    struct owner *owner = thread->owner;
    uint64_t number = thread->number;

    while (getppid() != 1) {
        int op = atomic_load(&owner->orders[number].op);
        uint64_t page = owner->orders[number].page;

        switch (op) {
        case READ:
            owner->orders[number].value = owner_page(owner, page)[1];
            break;
        case WRITE:
            owner_page(owner, page)[1] = owner->orders[number].value;
            break;
        case WRITE_BY_KERNEL:
            owner_write_by_kernel(&owner_page(owner, page)[1], owner->orders[number].value);
            break;
        case PUNCH:
            owner_punch(owner, page);
            break;
        case DONTNEED:
            owner_dontneed(owner, page);
            break;
        case WORK:
            thread->work(owner, number);
            break;
        case EXECUTE:
            (void)execl("/bin/sleep", "sleep", "1000", (char *)NULL);
            test_exit_(1);
        default:
            pc_sleep_ns(50000);
            continue;
        }
        atomic_store(&owner->orders[number].op, DONE);
    }
    return NULL;
}

_Noreturn static void owner_main(struct owner *owner, void (*work)(struct owner *owner, uint64_t number))
{
    struct owner_thread threads[OWNER_THREADS];
    void *base;

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    base = CHECK_SYS(mmap(NULL, owner->memory.size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, owner->memory.fd, 0));
    owner->address = (uint64_t)(uintptr_t)base;
    (void)madvise(base, owner->memory.size_bytes, MADV_NOHUGEPAGE);
    owner->number = pc_uffd_open(PC_UFFD_ANY, owner->features, NULL);
    if (owner->number < 0)
        test_exit_(TEST_SKIPPED);
    for (uint64_t i = 0; i < OWNER_THREADS; i++) {
        threads[i] = (struct owner_thread){.owner = owner, .number = i, .work = work};
        CHECK_EQ(pthread_create(&threads[i].thread, NULL, owner_obey, &threads[i]), 0);
    }
    atomic_store(&owner->ready, true);
    for (uint64_t i = 0; i < OWNER_THREADS; i++)
        (void)pthread_join(threads[i].thread, NULL);
    test_exit_(0);
}

/* A process of a memory that is not mapped in this one. */
static struct owner *start_owner(const struct pc_memory *memory, uint64_t features, void (*work)(struct owner *owner, uint64_t number))
{
    struct owner *owner = CHECK_SYS(mmap(NULL, sizeof(*owner), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    int pidfd, status;
    pid_t pid;

    owner->memory = *memory;
    owner->features = features;
    pid = CHECK_SYS(fork());
    if (!pid)
        owner_main(owner, work);
    owner->pid = pid;
    while (!atomic_load(&owner->ready)) {
        if (waitpid(pid, &status, WNOHANG) > 0)
            SKIP("uffd-features", "no userfaultfd with features %#llx", (unsigned long long)features);
        pc_sleep_ns(100000);
    }
    pidfd = CHECK_SYS((int)syscall(SYS_pidfd_open, pid, 0));
    owner->uffd = CHECK_SYS((int)syscall(SYS_pidfd_getfd, pidfd, owner->number, 0));
    close(pidfd);
    return owner;
}

static void end_owner(struct owner *owner)
{
    int status;

    (void)kill(owner->pid, SIGKILL);
    CHECK_SYS(waitpid(owner->pid, &status, 0));
    CHECK_SYS(munmap(owner, sizeof(*owner)));
}

static void give(struct owner *owner, uint64_t thread, enum owner_op op, uint64_t page)
{
    owner->orders[thread].page = page;
    atomic_store(&owner->orders[thread].op, op);
}

static bool is_done(const struct owner *owner, uint64_t thread)
{
    return atomic_load(&owner->orders[thread].op) == DONE;
}

static uint64_t finish(const struct owner *owner, uint64_t thread)
{
    while (!is_done(owner, thread))
        pc_sleep_ns(50000);
    return owner->orders[thread].value;
}

static uint64_t order(struct owner *owner, enum owner_op op, uint64_t page)
{
    give(owner, 0, op, page);
    return finish(owner, 0);
}

static void order_write(struct owner *owner, enum owner_op op, uint64_t page, uint64_t value)
{
    owner->orders[0].value = value;
    (void)order(owner, op, page);
}

#pragma GCC diagnostic pop

#endif
