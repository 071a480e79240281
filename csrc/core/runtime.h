/* SPDX-License-Identifier: Apache-2.0
 *
 * What the engine's threads need of the system: buffers, threads, whole writes.
 */
#ifndef PC_RUNTIME_H
#define PC_RUNTIME_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Zeroed, page-aligned memory of its own mapping, unpopulated until used and not inherited by fork: an engine's buffer
 * must never lie in memory that a machine, or a forked child, can make missing. NULL without memory. */
void *pc_buffer_new(size_t bytes);
void pc_buffer_free(void *buffer, size_t bytes);

/* A thread with every signal blocked, so that handlers of the host program never run on it. 0 or -errno. */
int pc_thread_start(pthread_t *thread, void *(*body)(void *), void *argument);
void pc_thread_name(const char *name, unsigned index); /* of the calling thread, as top and gdb show it */
/* The calling thread moves bulk: where both want a core, threads that serve a fault go first. */
void pc_thread_background(void);
/* Between two pieces of its work, of some 100 us: gives way, now and then, while urgent work is being done, of which `urgent` is a count.
 * It starts as zeros. */
struct pc_background {
    uint64_t urgent;
    uint32_t quiet; /* pieces since that count has changed */
};
void pc_background_pause(struct pc_background *background, uint64_t urgent);
/* The calling thread serves faults: it runs for microseconds, but at once. `busy_waits`: it looks for a while before it sleeps. */
void pc_thread_prompt(bool busy_waits);

/* A lock that lends its holder the priority of who waits for it: for what a fault thread shares with threads of lower priority and
 * holds for microseconds. */
void pc_lock_init(pthread_mutex_t *lock);

int pc_pwrite_all(int fd, const void *data, size_t bytes, uint64_t offset); /* 0 or -errno */
/* 0, -errno, or -ENODATA when the file ends before `bytes`. */
int pc_pread_all(int fd, void *data, size_t bytes, uint64_t offset);

#endif
