/* SPDX-License-Identifier: Apache-2.0
 *
 * What the page and the scratch area hold; fp.h says why it is always the same.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <time.h>

#include "faultpaths/fp.h"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

static const uint8_t code[] = {
#if defined(__x86_64__)
    0xb8, 0x43, 0x50, 0x00, 0x00, /* mov $PC_FP_CODE_RETURNS, %eax */
    0xc3,                         /* ret */
#elif defined(__aarch64__)
    0x60, 0x08, 0x8a, 0x52, /* mov w0, #PC_FP_CODE_RETURNS */
    0xc0, 0x03, 0x5f, 0xd6, /* ret */
#else
    0x00,
#endif
};

static const uint8_t guest_code[] = {0xb8, 0x43, 0x50, 0xf4};
/* Present, writable, user, accessed, dirty, large: with nothing left for a processor to write. */
static const uint8_t page_directory_entry[8] = {0xe7};

/* Accepts every packet. */
static const struct sock_filter accept_all[] = {{.code = BPF_RET | BPF_K, .k = 0xffff}};

struct piece {
    uint32_t offset;
    const void *data;
    size_t bytes;
};

/* Structures with padding are static, so that it is zero. */
static void put_arguments(uint8_t *page, uint64_t limit)
{
    static const uint8_t zeros[64];
    static const struct iovec vector[2] = {{PC_FP_SCRATCH + PC_FP_IN_DATA, 48}, {PC_FP_SCRATCH + PC_FP_IN_DATA + 48, 16}};
    static const struct msghdr message = {.msg_iov = (struct iovec *)(PC_FP_SCRATCH + PC_FP_IN_IOVEC), .msg_iovlen = 1};
    int64_t millisecond[2] = {0, 1000000}, offset = 16, timer[4] = {0, 0, 0, 1000000}, times[4] = {1000, 0, 2000, 0};
    uint64_t limits[2] = {64, 64}, node = 1, usr2 = 1u << (SIGUSR2 - 1), ignore[4] = {1, 0, 0, 0};
    struct pollfd polled = {.fd = PC_FP_FD, .events = POLLIN};
    static const struct epoll_event epoll = {.events = EPOLLIN, .data = {.u64 = PC_FP_EPOLL_DATA}};
    const uint8_t *argv[3] = {PC_FP_SCRATCH + PC_FP_IN_PROGRAM, PC_FP_SCRATCH + PC_FP_IN_STRING, NULL};
    struct sockaddr_in loopback = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    static const struct iocb iocb = {.aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = PC_FP_FD, .aio_nbytes = 64,
                        .aio_buf = (uintptr_t)(PC_FP_SCRATCH + PC_FP_IN_DATA)};
    static const struct sock_fprog program = {.len = 1, .filter = (struct sock_filter *)(PC_FP_SCRATCH + PC_FP_IN_FILTER)};
    static const struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    uint8_t cpus[64];
    fd_set set;
    int one = 1;
    const struct piece pieces[] = {
        {PC_FP_AT_CODE, code, sizeof(code)},
        {PC_FP_AT_PATH, "/dev/null", 10},
        {PC_FP_AT_STRING, "NAME=postcopy", 14},
        {PC_FP_AT_IOVEC, vector, sizeof(vector)},
        {PC_FP_AT_MSGHDR, &message, sizeof(message)},
        {PC_FP_AT_TIMESPEC, millisecond, sizeof(millisecond)},
        {PC_FP_AT_POLLFD, &polled, sizeof(polled)},
        {PC_FP_AT_FDSET, &set, sizeof(set)},
        {PC_FP_AT_WORD, zeros, sizeof(zeros)},
        {PC_FP_AT_OFFSET, &offset, sizeof(offset)},
        {PC_FP_AT_ONE, &one, sizeof(one)},
        {PC_FP_AT_EPOLL, &epoll, sizeof(epoll)},
        {PC_FP_AT_ARGV, argv, sizeof(argv)},
        {PC_FP_AT_SOCKADDR, &loopback, sizeof(loopback)},
        {PC_FP_AT_SIGSET, &usr2, sizeof(usr2)},
        {PC_FP_AT_IOCB, &iocb, sizeof(iocb)},
        {PC_FP_AT_RLIMIT, limits, sizeof(limits)},
        {PC_FP_AT_ITIMERSPEC, timer, sizeof(timer)},
        {PC_FP_AT_TIMESPECS, times, sizeof(times)},
        {PC_FP_AT_FILTER, &program, sizeof(program)},
        {PC_FP_AT_SIGACTION, ignore, sizeof(ignore)},
        {PC_FP_AT_FLOCK, &lock, sizeof(lock)},
        {PC_FP_AT_CPUS, cpus, sizeof(cpus)},
        {PC_FP_AT_NODES, &node, sizeof(node)},
        {PC_FP_AT_GUEST, guest_code, sizeof(guest_code)},
        {PC_FP_AT_PDE, page_directory_entry, sizeof(page_directory_entry)},
    };

    memset(cpus, 0xff, sizeof(cpus));
    FD_ZERO(&set);
    FD_SET(PC_FP_FD, &set);
    for (size_t i = 0; i < sizeof(pieces) / sizeof(pieces[0]); i++)
        if (pieces[i].offset + pieces[i].bytes <= limit)
            memcpy(page + pieces[i].offset, pieces[i].data, pieces[i].bytes);
}

void pc_fp_content(uint8_t *page, uint64_t bytes)
{
    uint64_t state = 0x706f7374636f7079;

    for (uint64_t i = 0; i < bytes; i += 8) {
        uint8_t word[8];

        state = state * 6364136223846793005u + 1442695040888963407u;
        pc_put_le64(word, state | 0x0101010101010101); /* no byte is zero: zeros are what a lost page reads as */
        memcpy(page + i, word, bytes - i < 8 ? bytes - i : 8);
    }
    put_arguments(page, bytes);
}

int pc_fp_map_scratch(void)
{
    uint8_t *scratch = mmap(PC_FP_SCRATCH, PC_FP_SCRATCH_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_POPULATE, -1, 0);
    struct iovec vector = {PC_FP_SCRATCH + PC_FP_IN_DATA, 64};

    if (scratch == MAP_FAILED)
        return -errno;
    if (scratch != PC_FP_SCRATCH) { /* before Linux 4.17 the flag is a hint */
        (void)munmap(scratch, PC_FP_SCRATCH_BYTES);
        return -EEXIST;
    }
    memset(scratch + PC_FP_IN_DATA, 0xA5, 64);
    memcpy(scratch + PC_FP_IN_IOVEC, &vector, sizeof(vector));
    memcpy(scratch + PC_FP_IN_PROGRAM, "echo", 5);
    memcpy(scratch + PC_FP_IN_STRING, "NAME=postcopy", 14);
    memcpy(scratch + PC_FP_IN_FILTER, accept_all, sizeof(accept_all));
    return 0;
}
