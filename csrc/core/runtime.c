/* SPDX-License-Identifier: Apache-2.0 */
#include "core/runtime.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BACKGROUND_NICE 5
#define SLICE_NS 100000 /* the least the kernel grants */
#define QUIET_PIECES 64 /* without urgent work between them, and that is over */
#define PIECES_A_PAUSE 4 /* less, and bulk gets no processor beside a machine that computes; more, and a fault waits for them */

/* sched_setattr(2) as far as it is used here; glibc has it only since 2.41. */
struct sched_attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
};
_Static_assert(sizeof(struct sched_attributes) == 48, "SCHED_ATTR_SIZE_VER0");

void *pc_buffer_new(size_t bytes)
{
    void *buffer = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (buffer == MAP_FAILED)
        return NULL;
    (void)madvise(buffer, bytes, MADV_DONTFORK);
    return buffer;
}

void pc_buffer_free(void *buffer, size_t bytes)
{
    if (buffer)
        munmap(buffer, bytes);
}

int pc_thread_start(pthread_t *thread, void *(*body)(void *), void *argument)
{
    sigset_t all, before;
    int error;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(thread, NULL, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -error;
}

void pc_thread_name(const char *name, unsigned index)
{
    char text[16];

    (void)snprintf(text, sizeof(text), "%s/%u", name, index);
    (void)pthread_setname_np(pthread_self(), text);
}

void pc_lock_init(pthread_mutex_t *lock)
{
    pthread_mutexattr_t attributes;

    pthread_mutexattr_init(&attributes);
    (void)pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
    /* A kernel without priority inheritance says so here. */
    if (pthread_mutex_init(lock, &attributes))
        pthread_mutex_init(lock, NULL);
    pthread_mutexattr_destroy(&attributes);
}

static int set_scheduling(const struct sched_attributes *attributes)
{
    return syscall(SYS_sched_setattr, 0, attributes, 0) ? -errno : 0;
}

/* Since Linux 6.12 a thread of the fair class may ask for its time slice. Older kernels ignore the value; a sandbox may refuse the call;
 * neither is an error. This one is short, since pc_background_pause forfeits what is left of it: with 20 ms a thread that computes
 * beside it would leave it next to nothing. */
void pc_thread_background(void)
{
    int nice = getpriority(PRIO_PROCESS, 0) + BACKGROUND_NICE;
    struct sched_attributes attributes = {.size = sizeof(attributes),
                                          .policy = SCHED_BATCH,
                                          .nice = nice < 19 ? nice : 19,
                                          .runtime_ns = SLICE_NS};

    (void)set_scheduling(&attributes);
}

/* A thread that wakes up while this one runs, and has used its own share of the processor, waits for the next tick, up to 4 ms, unless this
 * one gives way. It does not do so when nothing is urgent: two bulk threads would only take turns. */
void pc_background_pause(struct pc_background *background, uint64_t urgent)
{
    if (background->urgent != urgent)
        *background = (struct pc_background){.urgent = urgent};
    if (background->quiet == QUIET_PIECES)
        return;
    if (background->quiet++ % PIECES_A_PAUSE == 0) /* the first after urgent work, too */
        (void)sched_yield();
}

/* In the fair class a thread that has just served a fault is over its share of the processor by these microseconds. If it
 * wakes up again before the others have caught up, it is not eligible, and the thread that runs goes on to the next tick, 4 ms
 * later: that, and not the network, was the 99th percentile of a fault under bulk. Only a real-time thread is exempt. It
 * needs CAP_SYS_NICE or RLIMIT_RTPRIO; a thread without that right gets the shortest time slice there is. A thread that busy-waits
 * stays in the fair class: on the machine's own processor it would keep out the very thread that it serves. */
void pc_thread_prompt(bool busy_waits)
{
    struct sched_attributes attributes = {.size = sizeof(attributes), .policy = SCHED_FIFO, .priority = 1};

    if (!busy_waits && !set_scheduling(&attributes))
        return;
    attributes = (struct sched_attributes){.size = sizeof(attributes),
                                           .policy = SCHED_OTHER,
                                           .nice = getpriority(PRIO_PROCESS, 0),
                                           .runtime_ns = SLICE_NS};
    (void)set_scheduling(&attributes);
}

int pc_pwrite_all(int fd, const void *data, size_t bytes, uint64_t offset)
{
    size_t done = 0;

    while (done < bytes) {
        ssize_t put = pwrite(fd, (const uint8_t *)data + done, bytes - done, (off_t)(offset + done));

        if (put < 0 && errno != EINTR)
            return -errno;
        if (put > 0)
            done += (size_t)put;
    }
    return 0;
}

int pc_pread_all(int fd, void *data, size_t bytes, uint64_t offset)
{
    size_t done = 0;

    while (done < bytes) {
        ssize_t got = pread(fd, (uint8_t *)data + done, bytes - done, (off_t)(offset + done));

        if (got < 0 && errno != EINTR)
            return -errno;
        if (got == 0)
            return -ENODATA;
        if (got > 0)
            done += (size_t)got;
    }
    return 0;
}
