/* SPDX-License-Identifier: Apache-2.0
 *
 * Where root runs a test there is a pool of huge pages for as long as it takes: borrowed from the host, and given back however
 * the test ends (but for SIGKILL).
 */
#ifndef PC_HUGE_POOL_H
#define PC_HUGE_POOL_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <unistd.h>

#include "postcopy/memory.h"
#include "tests/support/test.h"

static long borrowed_;

/* Changes the pool by so many pages, not to so many: several tests may do this at the same time, and each takes back what it has
 * added and not what it once saw. The lock keeps reading and writing together. By how many it has changed: the kernel may not find all
 * of them. */
static long change_pool_(long by)
{
    int fd = open("/proc/sys/vm/nr_hugepages", O_RDWR | O_CLOEXEC);
    char text[32] = "";
    long before = 0, after = 0;

    if (fd < 0)
        return 0;
    (void)flock(fd, LOCK_EX);
    if (pread(fd, text, sizeof(text) - 1, 0) > 0) {
        int length;

        before = after = strtol(text, NULL, 10);
        length = snprintf(text, sizeof(text), "%ld", before + by > 0 ? before + by : 0);
        if (pwrite(fd, text, (size_t)length, 0) == length && pread(fd, text, sizeof(text) - 1, 0) > 0)
            after = strtol(text, NULL, 10);
    }
    close(fd);
    return after - before;
}

static void return_huge_pages_(void)
{
    if (borrowed_ && !test_.forked)
        (void)change_pool_(-borrowed_);
}

static void return_on_signal_(int number)
{
    if (test_.forked) /* a case has inherited this handler, but not the loan */
        _exit(1);
    return_huge_pages_();
    (void)signal(number, SIG_DFL);
    (void)raise(number);
}

/* For a main(): cases that need more, or run where nothing could be borrowed, skip. */
static void borrow_huge_pages(long pages)
{
    if (geteuid() || pc_huge_page_bytes() != 2 << 20)
        return;
    borrowed_ = change_pool_(pages);
    if (borrowed_ <= 0)
        return;
    (void)atexit(return_huge_pages_);
    (void)signal(SIGINT, return_on_signal_);
    (void)signal(SIGTERM, return_on_signal_);
}

#endif
