/* SPDX-License-Identifier: Apache-2.0
 *
 * `postcopy faultpaths`: every way in which a page that is not there can be touched, tried on this kernel. Each *cell*
 * (operation x mode x backing) runs in a child process of its own, under a watchdog. A library of its own (csrc/faultpaths),
 * which stands on uffd.h, memory.h and core.h only.
 *
 * Threads: pc_faultpath_run and pc_fp_contention fork, so the caller should have one thread only; both block. The rest is
 * static data.
 */
#ifndef POSTCOPY_FAULTPATHS_H
#define POSTCOPY_FAULTPATHS_H

#include <stddef.h>
#include <stdint.h>

#include "postcopy/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
enum pc_fp_mode {
    PC_FP_MISSING,   /* registered for missing faults; each event is answered with the page (UFFDIO_COPY) */
    PC_FP_MINOR,     /* the page is in the page cache, not in the page table; answered with UFFDIO_CONTINUE */
    PC_FP_WP,        /* the page is there and write-protected; answered by lifting the protection */
    PC_FP_WP_ASYNC,  /* the same with WP_ASYNC: no event, the kernel lifts it and remembers (PAGEMAP_SCAN) */
    PC_FP_USER_ONLY, /* missing, the userfaultfd opened with UFFD_USER_MODE_ONLY */
    PC_FP_SIGBUS,    /* missing, with the SIGBUS feature: no event, a signal or an error */
    PC_FP_POISON,    /* missing; answered with UFFDIO_POISON */
    PC_FP_RWP,       /* the page is there and protected against reads and writes; answered by lifting the protection */
    PC_FP_RWP_ASYNC, /* the same with RWP_ASYNC: no event, the kernel lifts it */
    PC_FP_MODES
};
enum pc_fp_backing {
    PC_FP_ANON,
    PC_FP_MEMFD,
    PC_FP_MEMFD_PRIVATE,
    PC_FP_HUGETLB,
    PC_FP_GUEST_MEMFD, /* KVM's guest_memfd, as the process that has made it maps it: shared, not executable */
    PC_FP_BACKINGS
};
enum pc_fp_outcome {
    PC_FP_UNAVAILABLE, /* not here: `text` says why (no KVM, ENOSYS, EPERM, no pool, no O_DIRECT, mode not for this backing) */
    PC_FP_BLOCKED,     /* an event came, the operation waited, went on when the page was given, and succeeded, content right */
    PC_FP_PASSED,      /* succeeded without waiting for the page; with the right content, where there is any */
    PC_FP_REFUSED,     /* failed: `error` (EFAULT ...), with or without an event */
    PC_FP_SIGNALLED,   /* the thread got a signal: signal_number, signal_code */
    PC_FP_RETRIED,     /* returned, or raised its event, again and again without waiting: progress only by trying again */
    PC_FP_WRONG,       /* content differs after the page was given, a bug of the kernel or of ours: `text` says where */
    PC_FP_HUNG,        /* the watchdog had to kill it */
    PC_FP_CRASHED      /* the child ended otherwise: `text` */
};
enum pc_fp_flags {
    PC_FP_WRITES = 1,    /* the page is written by the operation */
    PC_FP_NEEDS_DIR = 2, /* works on a file in pc_fp_spec.direct_dir */
    PC_FP_NEEDS_KVM = 4,
    PC_FP_NOFAULT = 8    /* must not fault: no event is the good outcome */
};
enum pc_fp_measure { PC_FP_MEASURE_SIGNAL = 1, PC_FP_MEASURE_KILL = 2, PC_FP_MEASURE_LOCKS = 4 };
enum pc_fp_thread { /* who raised the first event */
    PC_FP_THREAD_NONE,
    PC_FP_THREAD_OWN,    /* the one that runs the operation */
    PC_FP_THREAD_OTHER,  /* another thread of its process */
    PC_FP_THREAD_KERNEL, /* a kernel thread, or one that the kernel runs in the process: io_uring worker or poller, vhost */
    PC_FP_THREAD_PROCESS /* another process: a debugger, a reader of /proc/PID/mem */
};
enum pc_fp_lock { PC_FP_LOCK_MMAP, PC_FP_LOCK_MUNMAP, PC_FP_LOCK_MPROTECT, PC_FP_LOCK_FORK, PC_FP_LOCK_REGISTER };
#define PC_FP_LOCKS 5
/* Operations outside of the table, for tests of the machinery: one that never ends (nor does a child of it), one that ends its
 * process, one that finds other content than was given. */
#define PC_FP_TEST_HANG 0xFFFFFFFF
#define PC_FP_TEST_CRASH 0xFFFFFFFE
#define PC_FP_TEST_WRONG 0xFFFFFFFD
struct pc_faultpath {
    const char *name;  /* unique, dotted, class first: "user.load", "copy.write_pipe", "pin.odirect_read" ... */
    const char *group; /* user, copy, pin, futex, uring, kvm, remote, net, nofault, device */
    const char *what;  /* one line for a person: who touches the page, in which system call, by which way of the kernel */
    uint32_t modes;    /* bits 1 << enum pc_fp_mode, where the operation makes sense */
    uint32_t backings; /* bits 1 << enum pc_fp_backing */
    uint32_t flags;    /* enum pc_fp_flags */
};
uint32_t pc_faultpath_count(void);
/* 0, or -EINVAL. Strings are static. */
int pc_faultpath_get(uint32_t index, struct pc_faultpath *out);
struct pc_fp_spec {
    uint32_t operation; /* index, or PC_FP_TEST_* */
    int mode;           /* enum pc_fp_mode */
    int backing;        /* enum pc_fp_backing */
    uint32_t measure;   /* enum pc_fp_measure, or'ed: each is one more run, in a child of its own */
    uint32_t hold_us;   /* how long the page is withheld after the event, so that state and wait channel can be read */
    uint32_t timeout_ms;  /* watchdog of each child */
    char direct_dir[256]; /* directory of files for O_DIRECT; empty: the current one */
    /* -1: the child serves its own fault. Else a connected Unix SOCK_SEQPACKET: it sends one struct pc_fp_hand_over with
     * SCM_RIGHTS {uffd, and the memfd where there is one}, waits for one byte, then runs the operation. PC_FP_MISSING only,
     * without `measure`, and not of a guest_memfd; in the result `events` stays 0, for they go elsewhere, and who waits is found by looking at all threads
     * once a millisecond. Stays the caller's. */
    int hand_over_fd;
};
struct pc_fp_hand_over {
    uint64_t address; /* of the page, in the child; registered for MISSING; it begins at offset 0 of the memfd */
    uint64_t bytes;
    uint64_t page_bytes;
    int32_t kind; /* enum pc_memory_kind */
    int32_t pid;  /* of the child, whose main thread runs the operation; it has a handler for SIGUSR1 */
};
/* What a page must hold: its first `bytes` bytes, the same everywhere and always. */
void pc_fp_content(uint8_t *page, uint64_t bytes);
struct pc_fp_result {
    int outcome; /* enum pc_fp_outcome */
    int error;   /* errno of a refused operation, positive; else 0 */
    int signal_number;
    int signal_code;       /* si_code */
    int64_t value;         /* what the system call returned, or its completion said */
    uint32_t events;       /* page faults read until the operation was over */
    uint32_t repeated;     /* of these, all but the first */
    uint32_t event_kind;   /* enum pc_uffd_event_type of the first; 0: there was none */
    uint64_t event_flags;  /* enum pc_uffd_fault_flags of the first */
    int64_t event_offset;  /* exact, from the page's start; -1: no event */
    uint8_t event_thread;  /* enum pc_fp_thread */
    uint8_t written;       /* WP, WP_ASYNC: afterwards the page counts as written (PAGEMAP_SCAN) */
    char state;            /* of the thread that waits, from /proc: 'S', 'D', 'R'; 0: none ever waited */
    char wchan[64];        /* where in the kernel it waits; "" where /proc does not say */
    uint64_t waited_ns;    /* from the first event (where there is none: from the beginning) to the operation's return */
    /* PC_FP_MEASURE_SIGNAL: a signal, for which there is a handler, comes while the page is withheld */
    uint8_t signal_measured;
    uint8_t handler_before_page; /* its handler ran before the page was given */
    uint32_t signal_events;      /* events between signal and page */
    uint64_t signal_cpu_ns;      /* processor time that the waiting thread burned between signal and page */
    uint64_t signal_window_ns;   /* how long that was */
    /* PC_FP_MEASURE_KILL: the userfaultfd stays open elsewhere, so that its closing is not what ends the wait */
    uint8_t kill_measured;
    uint8_t killed;
    uint64_t kill_ns; /* SIGKILL to reaped */
    /* PC_FP_MEASURE_LOCKS: medians by enum pc_fp_lock, of another thread of the process. 0: not measurable there. A call that
     * did not return while the page was withheld counts as all that time. */
    uint8_t locks_measured;
    uint64_t lock_idle_ns[PC_FP_LOCKS];      /* no fault pending */
    uint64_t lock_elsewhere_ns[PC_FP_LOCKS]; /* pending, the call works on another mapping */
    uint64_t lock_idle_same_ns[PC_FP_LOCKS]; /* no fault pending, in the page's mapping */
    uint64_t lock_same_ns[PC_FP_LOCKS];      /* pending, in the page's mapping */
    char text[200];
};
/* Runs one cell. Forks, so that the caller should have one thread only; blocks up to timeout_ms for each run and 2 s for the
 * reaping. Whatever happens, no process of it is left behind (-EBUSY: one could not be killed). 0, -EINVAL for an impossible
 * spec, or -errno of the machinery itself. */
int pc_faultpath_run(const struct pc_fp_spec *spec, struct pc_fp_result *result);
/* `postcopy bench contention`, in a child of its own: pending_faults threads wait on missing pages, with `bulk` another one
 * places pages by UFFDIO_COPY all the time, and one maps and unmaps a page `rounds` times. Blocks; 0 or -errno. */
int pc_fp_contention(uint32_t pending_faults, uint32_t bulk, uint32_t rounds, struct pc_histogram *mmap_latency,
                     struct pc_histogram *munmap_latency, char *error, size_t error_bytes);
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
