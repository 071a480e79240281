/* SPDX-License-Identifier: Apache-2.0 */
#include "runtime.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BACKGROUND_NICE 5

uint64_t pc_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

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

void pc_thread_background(void)
{
    (void)setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), getpriority(PRIO_PROCESS, 0) + BACKGROUND_NICE);
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
