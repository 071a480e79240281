/* SPDX-License-Identifier: Apache-2.0
 *
 * Fault paths: what the operations see of a cell.
 *
 * A cell is one operation, tried once on one page. cell.c makes a child process for it with a small *region*, of which one
 * page, the *page*, is withheld. In the child, the main thread runs the operation, and a second one, the handler, reads the
 * events and gives the page. The operation prepares everything without touching the page, does one thing with it between
 * pc_fp_begin and pc_fp_end (mostly by PC_FP_ACT), and then looks at the content: in the page, which by then is there or comes
 * by an event that no longer counts, or wherever the operation has brought it.
 *
 * The page holds the same bytes in every cell, for another host can be the one that gives it: a pattern, and at the
 * PC_FP_AT_* offsets the arguments that system calls are to find there. Since these cannot depend on the child, the pointers
 * among them lead into the *scratch* area, which has the same address in every child, and descriptors are PC_FP_FD.
 */
#ifndef PC_FP_H
#define PC_FP_H

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "core/clock.h"
#include "core/util.h"
#include "postcopy/core.h"
#include "postcopy/faultpaths.h"
#include "postcopy/memory.h"
#include "postcopy/uffd.h"

#define PC_FP_BYTES 4096 /* of the page that operations use, however large it is */
#define PC_FP_FD 100     /* what descriptors in the page are */

/* Below 2 GiB, where neither ASan's nor TSan's shadow memory is. */
#define PC_FP_SCRATCH ((uint8_t *)0x60000000)
#define PC_FP_SCRATCH_BYTES 0x10000

enum { /* offsets in the page */
    PC_FP_AT_CODE = 0x040,      /* a function that returns PC_FP_CODE_RETURNS */
    PC_FP_AT_PATH = 0x080,      /* "/dev/null" */
    PC_FP_AT_STRING = 0x0C0,    /* "NAME=postcopy" */
    PC_FP_AT_IOVEC = 0x100,     /* struct iovec[2], to PC_FP_IN_DATA: 48 and 16 bytes */
    PC_FP_AT_MSGHDR = 0x140,    /* struct msghdr, its iovec at PC_FP_IN_IOVEC */
    PC_FP_AT_TIMESPEC = 0x1C0,  /* 1 ms */
    PC_FP_AT_POLLFD = 0x200,    /* struct pollfd[1]: PC_FP_FD, POLLIN */
    PC_FP_AT_FDSET = 0x240,     /* fd_set with PC_FP_FD */
    PC_FP_AT_WORD = 0x300,      /* 64 bytes of zeros */
    PC_FP_AT_OFFSET = 0x340,    /* int64_t 16 */
    PC_FP_AT_ONE = 0x380,       /* int 1 */
    PC_FP_AT_EPOLL = 0x3C0,     /* struct epoll_event: EPOLLIN, data 0x50435046 */
    PC_FP_AT_ARGV = 0x400,      /* char *[3]: PC_FP_IN_PROGRAM, PC_FP_IN_STRING, NULL */
    PC_FP_AT_SOCKADDR = 0x440,  /* struct sockaddr_in: 127.0.0.1, port 0 */
    PC_FP_AT_SIGSET = 0x480,    /* 64-bit set with SIGUSR2 */
    PC_FP_AT_IOCB = 0x4C0,      /* struct iocb: pread of 64 bytes from PC_FP_FD into PC_FP_IN_DATA */
    PC_FP_AT_RLIMIT = 0x540,    /* struct rlimit64: 64, 64 */
    PC_FP_AT_ITIMERSPEC = 0x580, /* 1 ms, once */
    PC_FP_AT_TIMESPECS = 0x5C0, /* struct timespec[2]: 1000 s, 2000 s */
    PC_FP_AT_FILTER = 0x600,    /* struct sock_fprog, its program at PC_FP_IN_FILTER */
    PC_FP_AT_SIGACTION = 0x640, /* the kernel's struct sigaction with SIG_IGN (x86-64, arm64) */
    PC_FP_AT_FLOCK = 0x680,     /* struct flock64: F_WRLCK, all of the file */
    PC_FP_AT_CPUS = 0x6C0,      /* 64 bytes of ones: a processor mask */
    PC_FP_AT_NODES = 0x700,     /* 64-bit mask: node 0 */
    PC_FP_AT_GUEST = 0x740,     /* x86 code for a guest in real mode: mov $PC_FP_CODE_RETURNS, %ax; hlt */
    PC_FP_AT_PDE = 0x760,       /* an entry of an x86-64 page directory: 2 MiB at physical 0 */
    PC_FP_AT_OUT = 0x800        /* from here on for results */
};
enum { /* offsets in the scratch area */
    PC_FP_IN_DATA = 0x0000,
    PC_FP_IN_IOVEC = 0x1000, /* struct iovec[1], to PC_FP_IN_DATA: 64 bytes */
    PC_FP_IN_PROGRAM = 0x1100,
    PC_FP_IN_STRING = 0x1200,
    PC_FP_IN_FILTER = 0x1300,
    PC_FP_IN_FREE = 0x2000
};
#define PC_FP_CODE_RETURNS 0x5043
#define PC_FP_EPOLL_DATA 0x50435046

#define PC_FP_ALL_MODES ((1u << PC_FP_MODES) - 1)
/* Where the page comes in the end, and can be looked at. */
#define PC_FP_COMING_MODES (PC_FP_ALL_MODES & ~(1u << PC_FP_SIGBUS | 1u << PC_FP_POISON))
#define PC_FP_ALL_BACKINGS ((1u << PC_FP_BACKINGS) - 1)

/* Both processes have it: the parent reads what a killed child has come to. */
struct pc_fp_shared {
    struct pc_fp_result result;
    _Atomic uint32_t began, ended; /* the operation */
    _Atomic uint32_t blocked;      /* an event was read */
    _Atomic uint32_t given;        /* the page was given */
    _Atomic uint32_t given_in_time; /* before the operation ended */
    _Atomic uint32_t saw_wait;     /* a sample found the thread in handle_userfault */
    _Atomic uint32_t early;        /* the page was touched before the operation began */
    _Atomic uint32_t finished;     /* the child is through */
    _Atomic uint32_t unavailable, wrong, retried;
    _Atomic uint32_t signalled;    /* SIGSEGV, SIGBUS ...: in the result */
    _Atomic uint32_t handler_ran;  /* of SIGUSR1, PC_FP_MEASURE_SIGNAL */
    _Atomic uint64_t first_event_ns, begin_ns, end_ns;
    _Atomic int32_t uffd;          /* its number in the child */
    _Atomic int32_t other_pid;     /* the process that runs the operation, where that is not the child */
};

struct pc_fp_cell {
    const struct pc_fp_spec *spec;
    const struct pc_fp_operation *operation;
    struct pc_fp_shared *shared;
    uint8_t *region; /* the registered mapping */
    uint64_t region_pages;
    uint8_t *page; /* the withheld page, in the region */
    uint64_t page_bytes;
    uint8_t *staging;            /* what the page gets; not in the region */
    int memfd;                   /* -1: anonymous */
    int fds[2];                  /* what the operation works on, as its row says */
    uint64_t page_offset;        /* of the page in the memfd */
    uint8_t content[PC_FP_BYTES]; /* how the page begins */
    pid_t tid;                   /* runs the operation */
    int uffd;
    struct pc_fp_locks *locks; /* PC_FP_MEASURE_LOCKS */
    uint32_t measure; /* the one of enum pc_fp_measure that this run is for, or 0 */
};

/* What an operation works on: made before it runs. `fds[0]` is read from, `fds[1]` written to. */
enum pc_fp_on {
    PC_FP_ON_NOTHING,
    PC_FP_ON_PIPE,
    PC_FP_ON_SOCKETS, /* of a Unix stream */
    PC_FP_ON_TCP,     /* over loopback */
    PC_FP_ON_UDP,     /* fds[0] only: a socket */
    PC_FP_ON_FILE,    /* fds[0] only: in memory (another memfd), its first page holds the content of the page */
    PC_FP_ON_DIRECT,  /* fds[0] only: O_DIRECT in spec.direct_dir, has no name any more, one page of pc_fp_other */
    PC_FP_ON_KINDS,
    PC_FP_FULL = 0x10, /* PC_FP_SMALL bytes of pc_fp_other can be read from fds[0] already */
    PC_FP_ON_FULL_PIPE = PC_FP_FULL | PC_FP_ON_PIPE,
    PC_FP_ON_FULL_SOCKETS = PC_FP_FULL | PC_FP_ON_SOCKETS,
    PC_FP_ON_FULL_TCP = PC_FP_FULL | PC_FP_ON_TCP
};
#define PC_FP_SMALL 512

struct pc_fp_operation {
    struct pc_faultpath about;
    void (*run)(struct pc_fp_cell *cell);
    int on;
};

/* A row of a table. The operation "CLASS.NAME" is the function CLASS_NAME. */
#define PC_FP_ROW_OF(class, name, modes, backings, on, flags, what) \
    {{#class "." #name, #class, what, modes, backings, flags}, class##_##name, PC_FP_ON_##on}
#define PC_FP_ROW(class, name, on, flags, what) \
    PC_FP_ROW_OF(class, name, PC_FP_ALL_MODES, PC_FP_ALL_BACKINGS, on, flags, what)

/* The function of a row that is a variant of another function. */
#define PC_FP_VARIANT(name, function, ...)       \
    static void name(struct pc_fp_cell *cell)    \
    {                                            \
        function(cell, __VA_ARGS__);             \
    }

/* The function of a row that is one system call; what is looked at afterwards does not depend on which one. */
#define PC_FP_CALL(function, verify, name, ...)                   \
    static void function(struct pc_fp_cell *cell)                 \
    {                                                             \
        PC_FP_ACT(cell, syscall(SYS_##name, __VA_ARGS__));        \
        verify(cell);                                             \
    }

/* Around the system call or the access itself. pc_fp_end takes the call's value and reads errno where that is -1. */
void pc_fp_begin(struct pc_fp_cell *cell);
void pc_fp_end(struct pc_fp_cell *cell, int64_t value);
/* The same, but that errno is the call's way to say that it got over the page. */
void pc_fp_end_expecting(struct pc_fp_cell *cell, int64_t value, int expected_errno);
/* For calls that return -errno. */
void pc_fp_end_code(struct pc_fp_cell *cell, int64_t value);
#define PC_FP_ACT(cell, call) (pc_fp_begin(cell), pc_fp_end(cell, (int64_t)(call)))
#define PC_FP_ACT_EXPECTING(cell, expected_errno, call) \
    (pc_fp_begin(cell), pc_fp_end_expecting(cell, (int64_t)(call), expected_errno))
#define PC_FP_ACT_CODE(cell, call) (pc_fp_begin(cell), pc_fp_end_code(cell, (int64_t)(call)))
/* Whether the operation succeeded, so that there is content to look at. */
bool pc_fp_succeeded(const struct pc_fp_cell *cell);

/* The operation cannot be tried here. The reason; with a code, its text follows. Always false. */
__attribute__((format(printf, 3, 4))) bool pc_fp_unavailable(struct pc_fp_cell *cell, int code, const char *format, ...);
/* Whether a preparation succeeded; else `what` is unavailable, by errno. */
bool pc_fp_made(struct pc_fp_cell *cell, int64_t value, const char *what);
/* The operation failed with one of these errors: not about the page, but `what` is unavailable here. */
void pc_fp_unavailable_if(struct pc_fp_cell *cell, const char *what, const int *errors);
#define PC_FP_UNAVAILABLE_IF(cell, what, ...) pc_fp_unavailable_if(cell, what, (const int[]){__VA_ARGS__, 0})
/* The operation has lost what it was for, and no system call said so: counts as EFAULT. */
__attribute__((format(printf, 2, 3))) void pc_fp_lost(struct pc_fp_cell *cell, const char *format, ...);

/* What follows looks at an operation that succeeded; after any other it does nothing. */
/* The content is not what it should be. */
__attribute__((format(printf, 2, 3))) void pc_fp_wrong(struct pc_fp_cell *cell, const char *format, ...);
#define PC_FP_EXPECT(cell, condition, ...)                \
    do {                                                  \
        if (pc_fp_succeeded(cell) && !(condition))        \
            pc_fp_wrong(cell, __VA_ARGS__);               \
    } while (0)
/* `got` against the content at an offset of the page. */
void pc_fp_verify(struct pc_fp_cell *cell, const void *got, uint64_t offset, uint64_t bytes);
/* The page against its content with `bytes` of `data` at an offset. Touches the page, whose event no longer counts. */
void pc_fp_verify_page(struct pc_fp_cell *cell, const void *data, uint64_t offset, uint64_t bytes);
/* The same at PC_FP_AT_OUT. */
void pc_fp_verify_out(struct pc_fp_cell *cell, const void *data, uint64_t bytes);
/* The page as it was given. */
void pc_fp_verify_kept(struct pc_fp_cell *cell);
/* The operation has taken all of the page: it returned PC_FP_BYTES, and they can be read from fds[0]. */
void pc_fp_verify_taken(struct pc_fp_cell *cell);
/* The operation has put PC_FP_SMALL bytes of pc_fp_other at PC_FP_AT_OUT, and returned that. */
void pc_fp_verify_delivered(struct pc_fp_cell *cell);
/* The operation has sent what the vectors in the page name. */
void pc_fp_verify_sent(struct pc_fp_cell *cell);
void pc_fp_check_value(struct pc_fp_cell *cell, int64_t expected);
/* Whether the page comes at all, so that it can be looked at. */
bool pc_fp_page_comes(const struct pc_fp_cell *cell);

/* PC_FP_BYTES other bytes than the page has. */
const uint8_t *pc_fp_other(void);
/* Another process, which shares no memory with this one but that of the result, and may look into this one, runs `act` (which calls
 * pc_fp_begin and pc_fp_end). Returns when it is done. */
void pc_fp_in_process(struct pc_fp_cell *cell, void (*act)(struct pc_fp_cell *cell));
/* Makes what an operation works on. False: said why it is unavailable. */
bool pc_fp_make(struct pc_fp_cell *cell, int on, int fds[2]);
/* The name of a child's file for O_DIRECT. */
void pc_fp_name_direct_file(const struct pc_fp_spec *spec, pid_t child, char *path, size_t bytes);

/* The table, a part in each file. */
struct pc_fp_class {
    const struct pc_fp_operation *operations;
    uint32_t count;
};
extern const struct pc_fp_class pc_fp_user, pc_fp_copy, pc_fp_arguments, pc_fp_process, pc_fp_pin, pc_fp_futex;
extern const struct pc_fp_class pc_fp_uring, pc_fp_kvm, pc_fp_remote, pc_fp_net, pc_fp_nofault, pc_fp_device;

const struct pc_fp_operation *pc_fp_operation(uint32_t index);
/* What is at fixed addresses: the scratch area's content. 0 or -errno. */
int pc_fp_map_scratch(void);

#endif
