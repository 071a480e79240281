/* SPDX-License-Identifier: Apache-2.0
 *
 * `postcopy bench contention`: what mapping and unmapping costs while faults are pending and while pages are placed in bulk.
 *
 * All of it happens in a child, since threads that wait on missing pages end with their process only.
 */
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faultpaths/fp.h"

#define BULK_PAGES 64    /* of one UFFDIO_COPY */
#define BULK_RUNS 64     /* as many of them until the memory is full, and is given back to begin again */
#define START_MS 10000
#define ROUND_MS 5 /* a bound for the whole, not an expectation */

struct bench {
    _Atomic uint32_t placed; /* calls of the bulk thread */
    _Atomic int failed;      /* errno of its last one */
    struct pc_histogram mmap_latency, munmap_latency;
    char error[PC_ERROR_BYTES];
};
struct placing {
    struct bench *bench;
    int uffd;
    uint8_t *target, *source;
    uint64_t bytes;
};

static void *touch(void *argument)
{
    (void)*(volatile uint8_t *)argument;
    return NULL;
}

static void *place(void *argument)
{
    struct placing *placing = argument;
    uint64_t done;
    uint32_t run = 0;

    for (;;) { /* to the end of the process */
        int rc = pc_uffd_copy(placing->uffd, (uintptr_t)placing->target + run * placing->bytes, placing->source,
                              placing->bytes, 0, &done);

        if (rc) {
            atomic_store(&placing->bench->failed, -rc);
            return NULL;
        }
        atomic_fetch_add(&placing->bench->placed, 1);
        run = (run + 1) % BULK_RUNS;
        if (!run)
            (void)madvise(placing->target, BULK_RUNS * placing->bytes, MADV_DONTNEED);
    }
}

static void *sleep_for_ever(void *argument)
{
    for (;;)
        pause();
    return argument;
}

static bool start_thread(void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_t thread;
    int rc;

    (void)pthread_attr_init(&attributes);
    (void)pthread_attr_setstacksize(&attributes, 128 << 10);
    (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    rc = pthread_create(&thread, &attributes, run, argument);
    (void)pthread_attr_destroy(&attributes);
    return !rc;
}

static uint8_t *missing_memory(int uffd, uint64_t bytes)
{
    uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED)
        return NULL;
    (void)madvise(memory, bytes, MADV_NOHUGEPAGE);
    if (pc_uffd_register(uffd, (uintptr_t)memory, bytes, PC_UFFD_MISSING, NULL)) {
        (void)munmap(memory, bytes);
        return NULL;
    }
    return memory;
}

/* Until all faults have been seen: then their threads wait. */
static bool await_faults(int uffd, uint32_t expected)
{
    uint64_t end = pc_now_ns() + START_MS * 1000000ull;
    uint32_t seen = 0;

    while (seen < expected && pc_now_ns() < end) {
        struct pollfd polled = {.fd = uffd, .events = POLLIN};
        struct pc_uffd_event events[64];
        int n;

        (void)poll(&polled, 1, 100);
        n = pc_uffd_read(uffd, events, PC_ARRAY_LENGTH(events));
        seen += n > 0 ? (uint32_t)n : 0;
    }
    return seen >= expected;
}

static int run_bench(struct bench *bench, uint32_t pending_faults, uint32_t bulk, uint32_t rounds)
{
    uint64_t page = pc_page_bytes();
    int uffd = pc_uffd_open(PC_UFFD_ANY, 0, NULL);
    struct placing *placing = calloc(1, sizeof(*placing)); /* outlives this function, as its thread does */
    uint8_t *withheld;
    int rc;

    if (!placing)
        return pc_fail(ENOMEM, bench->error, sizeof(bench->error), "no memory");
    *placing = (struct placing){.bench = bench, .uffd = uffd, .bytes = BULK_PAGES * page};
    if (uffd < 0)
        return pc_fail(-uffd, bench->error, sizeof(bench->error), "no userfaultfd: %s", strerrordesc_np(-uffd));
    /* Never a process of one thread, which the kernel serves faster: that would be no measure for the others. */
    if (!start_thread(sleep_for_ever, NULL))
        return pc_fail(EAGAIN, bench->error, sizeof(bench->error), "no thread can be had");
    if (pending_faults) {
        withheld = missing_memory(uffd, pending_faults * page);
        if (!withheld)
            return pc_fail(ENOMEM, bench->error, sizeof(bench->error), "no memory to wait on");
        for (uint32_t i = 0; i < pending_faults; i++)
            if (!start_thread(touch, withheld + i * page))
                return pc_fail(EAGAIN, bench->error, sizeof(bench->error), "only %u of %u threads can be had", i,
                               pending_faults);
        if (!await_faults(uffd, pending_faults))
            return pc_fail(ETIMEDOUT, bench->error, sizeof(bench->error), "not all of the %u faults came within %d s",
                           pending_faults, START_MS / 1000);
    }
    if (bulk) {
        placing->target = missing_memory(uffd, BULK_RUNS * placing->bytes);
        placing->source =
            mmap(NULL, placing->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (!placing->target || placing->source == MAP_FAILED || !start_thread(place, placing))
            return pc_fail(ENOMEM, bench->error, sizeof(bench->error), "no memory to place pages in");
        while (!atomic_load(&bench->placed) && !atomic_load(&bench->failed)) /* until it is at work */
            (void)poll(NULL, 0, 1);
    }
    for (uint32_t i = 0; i < rounds; i++) {
        uint64_t begin = pc_now_ns(), mapped;
        uint8_t *memory = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (memory == MAP_FAILED)
            return pc_fail(ENOMEM, bench->error, sizeof(bench->error), "mmap: %s", strerrordesc_np(errno));
        mapped = pc_now_ns();
        pc_histogram_add(&bench->mmap_latency, mapped - begin);
        begin = pc_now_ns();
        (void)munmap(memory, page);
        pc_histogram_add(&bench->munmap_latency, pc_now_ns() - begin);
    }
    rc = atomic_load(&bench->failed);
    if (rc)
        return pc_fail(rc, bench->error, sizeof(bench->error), "UFFDIO_COPY: %s", strerrordesc_np(rc));
    return 0;
}

int pc_fp_contention(uint32_t pending_faults, uint32_t bulk, uint32_t rounds, struct pc_histogram *mmap_latency,
                     struct pc_histogram *munmap_latency, char *error, size_t error_bytes)
{
    struct bench *bench = mmap(NULL, sizeof(*bench), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t parent = getpid(), child;
    int status = 0, rc;
    struct pollfd ended;

    if (bench == MAP_FAILED)
        return pc_fail(errno, error, error_bytes, "mmap: %s", strerrordesc_np(errno));
    child = fork();
    if (child < 0) {
        rc = pc_fail(errno, error, error_bytes, "fork: %s", strerrordesc_np(errno));
        (void)munmap(bench, sizeof(*bench));
        return rc;
    }
    if (!child) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
        rc = run_bench(bench, pending_faults, bulk, rounds);
        _exit(rc ? -rc : 0); /* with threads that wait for ever: exit_group ends them */
    }
    ended = (struct pollfd){.fd = (int)syscall(SYS_pidfd_open, child, 0), .events = POLLIN};
    if (ended.fd >= 0) {
        uint64_t limit = START_MS + 2000 + (uint64_t)rounds * ROUND_MS;

        if (poll(&ended, 1, limit > INT32_MAX ? INT32_MAX : (int)limit) <= 0)
            (void)kill(child, SIGKILL);
        close(ended.fd);
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    if (WIFEXITED(status) && !WEXITSTATUS(status)) {
        pc_histogram_merge(mmap_latency, &bench->mmap_latency);
        pc_histogram_merge(munmap_latency, &bench->munmap_latency);
        rc = 0;
    } else if (WIFEXITED(status))
        rc = pc_fail(WEXITSTATUS(status), error, error_bytes, "%s", bench->error);
    else
        rc = pc_fail(ETIMEDOUT, error, error_bytes, "it did not end, or was killed");
    (void)munmap(bench, sizeof(*bench));
    return rc;
}
