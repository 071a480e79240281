/* SPDX-License-Identifier: Apache-2.0
 *
 * The thread of a cell that reads the events, looks at the thread that waits, and gives the page.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "faultpaths/cell.h"

#define SIGNAL_WINDOW_NS 20000000u
#define SPIN_EVENTS 16 /* so many before the page is given, and no signal pending: that is no waiting */

static ssize_t read_file(const char *path, char *text, size_t bytes)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n;

    if (fd < 0)
        return -1;
    n = read(fd, text, bytes - 1);
    close(fd);
    text[n > 0 ? n : 0] = '\0';
    return n;
}

/* Which thread an event's tid is. Sets pid to its process. */
static uint8_t classify(const struct pc_fp_cell *cell, int tid, int *pid)
{
    char path[64], text[256];
    const char *tail;
    unsigned long flags = 0;

    *pid = getpid();
    if (tid == cell->tid)
        return PC_FP_THREAD_OWN;
    snprintf(path, sizeof(path), "/proc/self/task/%d/comm", tid);
    if (read_file(path, text, sizeof(text)) > 0)
        return !strncmp(text, "iou-", 4) || !strncmp(text, "vhost-", 6) ? PC_FP_THREAD_KERNEL : PC_FP_THREAD_OTHER;
    *pid = tid;
    snprintf(path, sizeof(path), "/proc/%d/stat", tid);
    if (read_file(path, text, sizeof(text)) > 0 && (tail = strrchr(text, ')')) &&
        sscanf(tail + 1, " %*c %*d %*d %*d %*d %*d %lu", &flags) == 1 && flags & 0x00200000 /* PF_KTHREAD */)
        return PC_FP_THREAD_KERNEL;
    return PC_FP_THREAD_PROCESS;
}

/* Whether a thread is in handle_userfault. What is known of it goes to the result if so, or always. */
static bool sample_thread(struct pc_fp_shared *shared, int pid, int tid, bool always)
{
    char path[64], text[512];
    const char *tail;
    bool waits = false, known;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/wchan", pid, tid);
    known = read_file(path, text, sizeof(text)) > 0 && text[0] != '0';
    waits = known && !strncmp(text, "handle_userfault", 16);
    if (known && (waits || always)) {
        text[sizeof(shared->result.wchan) - 1] = '\0';
        memcpy(shared->result.wchan, text, strlen(text) + 1);
    }
    snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, tid);
    if ((waits || always) && read_file(path, text, sizeof(text)) > 0 && (tail = strrchr(text, ')')) && tail[1] == ' ')
        shared->result.state = tail[2];
    return waits;
}

static void sample(struct pc_fp_handler *handler)
{
    if (handler->watched_tid)
        (void)sample_thread(handler->cell->shared, handler->watched_pid, handler->watched_tid, true);
}

/* The thread that waits, whichever it is: the one that runs the operation, in a process of its own perhaps, or a thread that the
 * kernel has made. There was no event to tell. */
static bool find_waiting(struct pc_fp_handler *handler)
{
    struct pc_fp_shared *shared = handler->cell->shared;
    int other = atomic_load(&shared->other_pid), own = (int)syscall(SYS_gettid), found = 0, pid;
    DIR *tasks;

    if (other && sample_thread(shared, other, other, false))
        found = other;
    tasks = found ? NULL : opendir("/proc/self/task");
    for (struct dirent *entry; tasks && !found && (entry = readdir(tasks));) {
        int tid = atoi(entry->d_name);

        if (tid > 0 && tid != own && sample_thread(shared, getpid(), tid, false))
            found = tid;
    }
    if (tasks)
        (void)closedir(tasks);
    if (found)
        shared->result.event_thread = classify(handler->cell, found, &pid);
    return found;
}

/* Processor time of the thread that waits. */
static uint64_t cpu_ns(const struct pc_fp_handler *handler)
{
    clockid_t clock = (clockid_t)((~(unsigned)handler->watched_tid) << 3 | 2 /* CPUCLOCK_SCHED */);
    struct timespec time = {0};

    if (handler->watched_pid == getpid())
        clock |= 4; /* of a thread */
    if (syscall(SYS_clock_gettime, clock, &time))
        return 0;
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void note_event(struct pc_fp_handler *handler, const struct pc_uffd_event *event)
{
    struct pc_fp_cell *cell = handler->cell;
    struct pc_fp_result *result = &cell->shared->result;

    if (result->events++) {
        result->repeated++;
        return;
    }
    atomic_store(&cell->shared->first_event_ns, pc_now_ns());
    result->event_kind = (uint32_t)event->type;
    result->event_flags = event->flags;
    result->event_offset = (int64_t)(event->address - (uintptr_t)cell->page);
    result->event_thread = event->tid ? classify(cell, event->tid, &handler->watched_pid) : PC_FP_THREAD_NONE;
    handler->watched_tid = event->tid;
}

/* Reads what is there, waiting so long at most. Whether there was an event of the operation. */
static bool read_events(struct pc_fp_handler *handler, int timeout_ms, bool *late)
{
    struct pc_fp_shared *shared = handler->cell->shared;
    struct pollfd polled[2] = {{.fd = handler->cell->uffd, .events = POLLIN}, {.fd = handler->stop_fd, .events = POLLIN}};
    struct pc_uffd_event events[64];
    bool counted = false;
    int n;

    (void)poll(polled, 2, timeout_ms);
    n = pc_uffd_read(handler->cell->uffd, events, PC_ARRAY_LENGTH(events));
    for (int i = 0; i < n; i++) {
        if (events[i].type != PC_UFFD_EVENT_PAGEFAULT)
            continue;
        if (atomic_load(&shared->began) && !atomic_load(&shared->ended)) {
            note_event(handler, &events[i]);
            counted = true;
        } else {
            if (!atomic_load(&shared->began))
                atomic_store(&shared->early, 1);
            *late = true;
        }
    }
    return counted;
}

static void wait_for(struct pc_fp_handler *handler, uint64_t ns)
{
    uint64_t end = pc_now_ns() + ns, now;
    bool late;

    do {
        (void)read_events(handler, 1, &late);
        sample(handler);
        now = pc_now_ns();
    } while (now < end);
}

static void measure_signal(struct pc_fp_handler *handler)
{
    struct pc_fp_shared *shared = handler->cell->shared;
    struct pc_fp_result *result = &shared->result;
    uint32_t events = result->events;
    uint64_t cpu, begin;

    if (result->event_thread == PC_FP_THREAD_KERNEL || !handler->watched_tid)
        return; /* takes no signals */
    cpu = cpu_ns(handler);
    begin = pc_now_ns();
    if (syscall(SYS_tgkill, handler->watched_pid, handler->watched_tid, SIGUSR1))
        return;
    wait_for(handler, SIGNAL_WINDOW_NS);
    result->signal_cpu_ns = cpu_ns(handler) - cpu;
    result->signal_window_ns = pc_now_ns() - begin;
    result->signal_events = result->events - events;
    result->handler_before_page = (uint8_t)atomic_load(&shared->handler_ran);
    result->signal_measured = 1;
}

static void answer_first(struct pc_fp_handler *handler)
{
    struct pc_fp_cell *cell = handler->cell;
    struct pc_fp_shared *shared = cell->shared;

    wait_for(handler, (uint64_t)cell->spec->hold_us * 1000);
    if (shared->result.events >= SPIN_EVENTS)
        atomic_store(&shared->retried, 1);
    atomic_store(&shared->blocked, 1);
    if (cell->measure == PC_FP_MEASURE_SIGNAL)
        measure_signal(handler);
    while (cell->measure == PC_FP_MEASURE_KILL) /* the parent kills this process now */
        wait_for(handler, 1000000000);
    if (cell->measure == PC_FP_MEASURE_LOCKS)
        pc_fp_locks_measure(cell->locks, cell->spec->timeout_ms / 2);
    atomic_store(&shared->given, 1);
    pc_fp_region_give(cell);
}

static bool stopped(const struct pc_fp_handler *handler)
{
    struct pollfd polled = {.fd = handler->stop_fd, .events = POLLIN};

    return poll(&polled, 1, 0) > 0;
}

static void *serve(void *argument)
{
    struct pc_fp_handler *handler = argument;
    struct pc_fp_shared *shared = handler->cell->shared;

    while (!stopped(handler)) {
        bool late = false, counted = read_events(handler, 1000, &late);

        if (counted && !atomic_load(&shared->given))
            answer_first(handler);
        else if (counted || late)
            pc_fp_region_give(handler->cell);
    }
    return NULL;
}

/* Another process serves the faults: all that can be seen here is the thread. */
static void *watch(void *argument)
{
    struct pc_fp_handler *handler = argument;
    struct pc_fp_shared *shared = handler->cell->shared;

    while (!stopped(handler)) {
        struct pollfd polled = {.fd = handler->stop_fd, .events = POLLIN};

        (void)poll(&polled, 1, 1);
        if (atomic_load(&shared->began) && !atomic_load(&shared->ended) && !atomic_load(&shared->saw_wait) &&
            find_waiting(handler))
            atomic_store(&shared->saw_wait, 1);
    }
    return NULL;
}

int pc_fp_handler_start(struct pc_fp_handler *handler, struct pc_fp_cell *cell)
{
    sigset_t all, before;
    int rc;

    *handler = (struct pc_fp_handler){.cell = cell};
    handler->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (handler->stop_fd < 0)
        return -errno;
    sigfillset(&all); /* signals are for the thread that runs the operation */
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&handler->thread, NULL, cell->spec->hand_over_fd < 0 ? serve : watch, handler);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -rc;
}

void pc_fp_handler_stop(struct pc_fp_handler *handler)
{
    uint64_t one = 1;

    if (write(handler->stop_fd, &one, sizeof(one)) == sizeof(one))
        (void)pthread_join(handler->thread, NULL);
}
