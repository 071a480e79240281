/* SPDX-License-Identifier: Apache-2.0
 *
 * A process that is to a userfaultfd handler what a restored Firecracker is: it maps memory, registers it, hands the userfaultfd
 * over, and touches the memory in all the ways that go wrong somewhere. It does one thing at a time as it is told on standard input,
 * a SOCK_SEQPACKET: `ID NAME ARGUMENT...` in, `{"id": ID, ...}` out (postcopy/testbed/conformance/_client.py).
 *
 * The main thread never touches memory that may be missing: what does is a thread for each order, whose answer may never come. Who
 * gives the orders has the deadlines, and kills this process. It ends when the socket does.
 *
 * The image is mapped too, so that content is compared here. Pages are numbered as in the image, whatever they are mapped at.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/clock.h"
#include "uffd/uffd_abi.h"

#define COMMAND_BYTES 65536
#define MAX_REGIONS 16
#define MAX_ARGUMENTS 12
#define MAX_THREADS 64
#define HUGE_BYTES ((uint64_t)2 << 20)
#define PM_UFFD_WP ((uint64_t)1 << 57) /* of /proc/PID/pagemap */

enum kind { ANON, HUGE, MEMFD };

struct region {
    uint8_t *address;
    uint64_t size;
    uint64_t offset;
};

struct order {
    uint64_t id;
    int count;
    uint64_t argument[MAX_ARGUMENTS];
    char name[24];
    char text[COMMAND_BYTES]; /* what stands behind the name, as it is */
};

static const uint8_t *image;
static uint64_t image_bytes;
static struct region regions[MAX_REGIONS];
static uint32_t region_count;
static uint64_t page_bytes = 4096;
static int memory_fd = -1;
static int uffd = -1;
static int connection = -1;
static int pipe_end = -1;
static atomic_uint touching; /* threads of `check` that wait for a page, or are about to */
static _Atomic uint64_t progress_page; /* of the order that runs: where a hang is */

/* ---- answers */

static void answer(uint64_t id, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void answer(uint64_t id, const char *format, ...)
{
    char text[2048];
    va_list arguments;
    int length = snprintf(text, sizeof(text), "{\"id\":%" PRIu64 ",", id);

    va_start(arguments, format);
    length += vsnprintf(text + length, sizeof(text) - (size_t)length - 2, format, arguments);
    va_end(arguments);
    text[length++] = '}';
    (void)!send(0, text, (size_t)length, MSG_NOSIGNAL);
}

static void answer_done(uint64_t id)
{
    answer(id, "\"errno\":0");
}

static void answer_error(uint64_t id, int error)
{
    answer(id, "\"error\":\"%s\",\"errno\":%d", strerror(error), error);
}

/* ---- memory */

static uint8_t *at(uint64_t page)
{
    const uint64_t offset = page * page_bytes;

    for (uint32_t i = 0; i < region_count; i++)
        if (offset >= regions[i].offset && offset - regions[i].offset < regions[i].size)
            return regions[i].address + (offset - regions[i].offset);
    fprintf(stderr, "there is no page %" PRIu64 "\n", page);
    abort();
}

/* What this process writes into a page of its own. */
static void own_content(uint64_t *page, uint64_t number)
{
    for (uint64_t i = 0; i < page_bytes / 8; i++)
        page[i] = 0x6f776e0000000000u | number;
}

enum content { IMAGE = 1, ZERO = 2, OWN = 4, OTHER = 8 };

static bool all_zero(const uint8_t *page)
{
    return !page[0] && !memcmp(page, page + 1, page_bytes - 1);
}

/* Which of these it is; IMAGE | ZERO where the image has zeros. Touches the page. */
static int content_of(const uint8_t *page, uint64_t number)
{
    const uint64_t *words = (const uint64_t *)page;
    int found = memcmp(page, image + number * page_bytes, page_bytes) ? 0 : IMAGE;
    bool own = true;

    if (all_zero(page))
        return found | ZERO;
    for (uint64_t i = 0; i < page_bytes / 8 && own; i++)
        own = words[i] == (0x6f776e0000000000u | number);
    return found ? found : own ? OWN : OTHER;
}

static const char *name_of(int content)
{
    return content & IMAGE ? "image" : content & ZERO ? "zeros" : content & OWN ? "own" : "other";
}

static void do_map(const struct order *order)
{
    /* PAGE KIND SHIFT BELOW SIZE...: SHIFT bytes after a 2 MiB boundary; BELOW: each region right below the one before it */
    const uint64_t shift = order->argument[2], below = order->argument[3];
    const enum kind kind = (enum kind)order->argument[1];
    uint64_t total = 0, offset = 0, place;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    uint8_t *base;

    page_bytes = order->argument[0];
    for (int i = 4; i < order->count; i++)
        total += order->argument[i];
    base = mmap(NULL, total + 4 * HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || order->count < 5 || order->count - 4 > MAX_REGIONS) {
        answer_error(order->id, errno);
        return;
    }
    base = (uint8_t *)(((uintptr_t)base / HUGE_BYTES + 2) * HUGE_BYTES + shift);
    if (kind == HUGE)
        flags |= MAP_HUGETLB | (21 << MAP_HUGE_SHIFT);
    if (kind == MEMFD) {
        memory_fd = memfd_create("memory", MFD_CLOEXEC);
        if (memory_fd < 0 || ftruncate(memory_fd, (off_t)total) < 0) {
            answer_error(order->id, errno);
            return;
        }
        flags = MAP_SHARED | MAP_FIXED;
    }
    place = below ? total : 0;
    for (int i = 4; i < order->count; i++) {
        const uint64_t size = order->argument[i];
        uint8_t *address;

        place -= below ? size : 0;
        address = mmap(base + place, size, PROT_READ | PROT_WRITE, flags, kind == MEMFD ? memory_fd : -1,
                       kind == MEMFD ? (off_t)offset : 0);
        if (address == MAP_FAILED) {
            answer_error(order->id, errno);
            return;
        }
        madvise(address, size, MADV_NOHUGEPAGE);
        regions[region_count++] = (struct region){address, size, offset};
        place += below ? 0 : size;
        offset += size;
    }
    answer(order->id, "\"base\":%" PRIu64 ",\"bytes\":%" PRIu64, (uint64_t)(uintptr_t)base, total);
}

static int open_uffd(bool *user_only)
{
    const int flags = O_CLOEXEC | O_NONBLOCK;
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), fd;

    *user_only = false;
    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
        close(device);
        return fd;
    }
    fd = (int)syscall(SYS_userfaultfd, flags);
    if (fd < 0) {
        *user_only = true;
        fd = (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
    }
    return fd;
}

static void do_uffd(const struct order *order)
{
    /* FEATURES MODE */
    struct uffdio_api api = {UFFD_API, order->argument[0], 0};
    bool user_only;

    uffd = open_uffd(&user_only);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0) {
        answer_error(order->id, errno);
        return;
    }
    for (uint32_t i = 0; i < region_count; i++) {
        struct uffdio_register range = {
            {(uint64_t)(uintptr_t)regions[i].address, regions[i].size}, order->argument[1], 0};

        if (ioctl(uffd, UFFDIO_REGISTER, &range) < 0) {
            answer_error(order->id, errno);
            return;
        }
    }
    answer(order->id, "\"user_only\":%s", user_only ? "true" : "false");
}

/* ---- the connection */

static void do_connect(const struct order *order)
{
    /* PATH: who asked tries again while nobody listens there */
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (strlen(order->text) >= sizeof(address.sun_path)) {
        answer_error(order->id, ENAMETOOLONG);
        return;
    }
    memcpy(address.sun_path, order->text, strlen(order->text));
    if (connection < 0)
        connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (connect(connection, (struct sockaddr *)&address, sizeof(address)) < 0)
        answer_error(order->id, errno);
    else
        answer_done(order->id);
}

static void do_send(const struct order *order)
{
    /* FDS TEXT: with a descriptor for each letter of FDS: u(serfaultfd), p(ipe), n(othing: /dev/null); - is none */
    char fds_wanted[16] = "";
    int fds[16], count = 0, start = 0, ends[2];
    char control[CMSG_SPACE(sizeof(fds))];
    struct msghdr message = {0};
    struct iovec iov;
    ssize_t sent;

    sscanf(order->text, "%15s %n", fds_wanted, &start);
    for (const char *letter = fds_wanted; *letter; letter++) {
        if (*letter == 'u') {
            fds[count++] = dup(uffd);
        } else if (*letter == 'p' && pipe2(ends, O_CLOEXEC) == 0) {
            pipe_end = ends[0];
            fds[count++] = ends[1];
        } else if (*letter == 'n') {
            fds[count++] = open("/dev/null", O_RDWR | O_CLOEXEC);
        }
    }
    iov = (struct iovec){(char *)(uintptr_t)order->text + start, strlen(order->text + start)};
    message.msg_iov = &iov;
    message.msg_iovlen = 1;
    if (count) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        CMSG_FIRSTHDR(&message)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&message)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&message)->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), fds, (size_t)count * sizeof(int));
    }
    sent = sendmsg(connection, &message, MSG_NOSIGNAL);
    for (int i = 0; i < count; i++)
        close(fds[i]);
    if (sent < 0)
        answer_error(order->id, errno);
    else
        answer(order->id, "\"sent\":%zd", sent);
}

static void do_hang_up(const struct order *order)
{
    close(connection);
    connection = -1;
    answer_done(order->id);
}

static void do_closed(const struct order *order)
{
    /* MS: whether the handler has closed the connection by then */
    struct pollfd fd = {connection, POLLRDHUP, 0};

    poll(&fd, 1, (int)order->argument[0]);
    answer(order->id, "\"closed\":%s", fd.revents & (POLLRDHUP | POLLHUP | POLLERR) ? "true" : "false");
}

static void do_pipe_closed(const struct order *order)
{
    struct pollfd fd = {pipe_end, 0, 0};

    poll(&fd, 1, (int)order->argument[0]);
    answer(order->id, "\"closed\":%s", fd.revents & POLLHUP ? "true" : "false");
}

static void do_close_uffd(const struct order *order)
{
    close(uffd);
    uffd = -1;
    answer_done(order->id);
}

static void do_block(const struct order *order)
{
    /* clears O_NONBLOCK, also for the handler */
    if (fcntl(uffd, F_SETFL, fcntl(uffd, F_GETFL) & ~O_NONBLOCK) < 0)
        answer_error(order->id, errno);
    else
        answer_done(order->id);
}

static void do_become(const struct order *order)
{
    /* UID DIRECTORY: another user, within a root directory of its own if there is one */
    const char *directory = strchr(order->text, ' ');
    const uid_t uid = (uid_t)order->argument[0];

    if ((directory && (chroot(directory + 1) < 0 || chdir("/") < 0)) || setresgid(uid, uid, uid) < 0 ||
        setresuid(uid, uid, uid) < 0)
        answer_error(order->id, errno);
    else
        answer_done(order->id);
}

/* ---- touching */

struct walk {
    uint64_t first;
    uint64_t count;
    uint64_t stride;
    uint64_t threads;
    bool write;
    bool apart; /* each thread has pages of its own; else each touches all, in an order of its own */
    int expected; /* enum content, or'ed */
    atomic_uint next_thread;
    _Atomic uint64_t done;
    _Atomic uint64_t wrong;
    _Atomic uint64_t wrong_page;
    atomic_int wrong_content;
    _Atomic uint64_t slowest_ns;
};

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
    return b ? common_divisor(b, a % b) : a;
}

static void *walk_thread(void *argument)
{
    struct walk *walk = argument;
    const uint64_t thread = atomic_fetch_add(&walk->next_thread, 1);
    const bool in_order = walk->threads == 1 || walk->apart;
    const uint64_t count = walk->apart ? walk->count / walk->threads : walk->count;
    uint64_t step = in_order ? 1 : 2654435761u % walk->count + 2 * thread + 1;
    uint64_t index = walk->apart ? thread * count : in_order ? 0 : thread * 977 % walk->count;

    while (common_divisor(step, walk->count) != 1)
        step++;
    for (uint64_t i = 0; i < count; i++, index = (index + step) % walk->count) {
        const uint64_t number = walk->first + index * walk->stride;
        uint8_t *page = at(number);
        uint64_t began_ns = pc_now_ns(), ns;
        int found;

        atomic_store(&progress_page, number);
        page += number * 977 % page_bytes; /* not always at its start */
        atomic_fetch_add(&touching, 1);
        if (walk->write)
            __atomic_fetch_or(page, 0, __ATOMIC_SEQ_CST);
        else
            (void)*(volatile uint8_t *)page;
        atomic_fetch_sub(&touching, 1);
        ns = pc_now_ns() - began_ns;
        for (uint64_t slowest = atomic_load(&walk->slowest_ns); ns > slowest;)
            if (atomic_compare_exchange_weak(&walk->slowest_ns, &slowest, ns))
                break;
        found = content_of(at(number), number);
        if (!(found & walk->expected) && atomic_fetch_add(&walk->wrong, 1) == 0) {
            atomic_store(&walk->wrong_page, number);
            atomic_store(&walk->wrong_content, found);
        }
        atomic_fetch_add(&walk->done, 1);
    }
    return NULL;
}

static void do_check(const struct order *order)
{
    /* FIRST COUNT STRIDE THREADS HOW EXPECTED; HOW: 1 write, 2 each thread its own pages */
    const uint64_t *argument = order->argument;
    struct walk walk = {.first = argument[0], .count = argument[1], .stride = argument[2], .threads = argument[3],
                        .write = argument[4] & 1, .apart = argument[4] & 2, .expected = (int)argument[5]};
    pthread_t threads[MAX_THREADS];
    uint64_t began_ns = pc_now_ns(), started = 0;

    while (started < walk.threads && started < MAX_THREADS &&
           pthread_create(&threads[started], NULL, walk_thread, &walk) == 0)
        started++;
    for (uint64_t i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    if (started < walk.threads) {
        answer_error(order->id, EAGAIN);
        return;
    }
    answer(order->id,
           "\"pages\":%" PRIu64 ",\"wrong\":%" PRIu64 ",\"page\":%" PRIu64 ",\"found\":\"%s\",\"slowest_ms\":%.3f,\"ms\":%.3f",
           walk.done, walk.wrong, walk.wrong_page, name_of(walk.wrong_content), (double)walk.slowest_ns / 1e6,
           (double)(pc_now_ns() - began_ns) / 1e6);
}

static void do_fill(const struct order *order)
{
    /* FIRST COUNT: writes its own content */
    for (uint64_t i = 0; i < order->argument[1]; i++) {
        atomic_store(&progress_page, order->argument[0] + i);
        own_content((uint64_t *)at(order->argument[0] + i), order->argument[0] + i);
    }
    answer_done(order->id);
}

static int by_size(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* Sorts them. A thread that is not run for a while makes single calls long: the median does not know. */
static double median_us(uint64_t *took_ns, uint64_t count)
{
    qsort(took_ns, count, sizeof(*took_ns), by_size);
    return count ? (double)took_ns[count / 2] / 1e3 : 0.0;
}

static void do_discard(const struct order *order)
{
    /* FIRST COUNT CHUNK MORE: as a balloon does, CHUNK pages at a time, and MORE bytes. first_us, last_us: the median of the calls of
     * the first and of the last eighth */
    const uint64_t first = order->argument[0], chunk = order->argument[2], calls = (order->argument[1] + chunk - 1) / chunk;
    uint64_t *took_ns = calloc(calls, sizeof(*took_ns));
    uint64_t began_ns = pc_now_ns();
    int error = took_ns ? 0 : ENOMEM;

    for (uint64_t i = 0; i < calls && !error; i++) {
        const uint64_t call_ns = pc_now_ns();

        atomic_store(&progress_page, first + i * chunk);
        if (madvise(at(first + i * chunk), chunk * page_bytes + order->argument[3], MADV_DONTNEED) < 0)
            error = errno;
        took_ns[i] = pc_now_ns() - call_ns;
    }
    if (error)
        answer_error(order->id, error);
    else
        answer(order->id, "\"ms\":%.3f,\"first_us\":%.1f,\"last_us\":%.1f", (double)(pc_now_ns() - began_ns) / 1e6,
               median_us(took_ns, calls / 8), median_us(took_ns + calls - calls / 8, calls / 8));
    free(took_ns);
}

static void do_replace(const struct order *order)
{
    /* FIRST COUNT: new anonymous memory in its place, as Firecracker's balloon did up to 1.10 */
    void *address = mmap(at(order->argument[0]), order->argument[1] * page_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);

    if (address == MAP_FAILED)
        answer_error(order->id, errno);
    else
        answer_done(order->id);
}

static void do_unmap(const struct order *order)
{
    if (munmap(at(order->argument[0]), order->argument[1] * page_bytes) < 0)
        answer_error(order->id, errno);
    else
        answer_done(order->id);
}

static void do_move(const struct order *order)
{
    /* the whole of region 0 to another place */
    struct region *region = &regions[0];
    uint8_t *place = mmap(NULL, region->size + HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint8_t *moved = (uint8_t *)(((uintptr_t)place / HUGE_BYTES + 1) * HUGE_BYTES);

    moved = place == MAP_FAILED ? MAP_FAILED
                                : mremap(region->address, region->size, region->size, MREMAP_MAYMOVE | MREMAP_FIXED, moved);
    if (moved == MAP_FAILED) {
        answer_error(order->id, errno);
        return;
    }
    region->address = moved;
    answer_done(order->id);
}

static void do_protect(const struct order *order)
{
    /* FIRST COUNT: write-protects through its own descriptor */
    struct uffdio_writeprotect range = {
        {(uint64_t)(uintptr_t)at(order->argument[0]), order->argument[1] * page_bytes}, UFFDIO_WRITEPROTECT_MODE_WP};

    if (ioctl(uffd, UFFDIO_WRITEPROTECT, &range) < 0)
        answer_error(order->id, errno);
    else
        answer_done(order->id);
}

static void do_cache(const struct order *order)
{
    /* FIRST: puts a page into the page cache of the memory's file, so that the fault there is a minor one */
    uint64_t page[512];

    own_content(page, order->argument[0]);
    if (pwrite(memory_fd, page, sizeof(page), (off_t)(order->argument[0] * page_bytes)) != (ssize_t)sizeof(page))
        answer_error(order->id, errno);
    else
        answer_done(order->id);
}

static int place_page(uint64_t number, const void *source, uint64_t mode)
{
    struct uffdio_copy copy = {(uint64_t)(uintptr_t)at(number), (uint64_t)(uintptr_t)source, page_bytes, mode, 0};

    return ioctl(uffd, UFFDIO_COPY, &copy) < 0 ? errno : 0;
}

static void wake_page(uint64_t number)
{
    struct uffdio_range range = {(uint64_t)(uintptr_t)at(number), page_bytes};

    ioctl(uffd, UFFDIO_WAKE, &range);
}

static void do_place(const struct order *order)
{
    /* PAGE: its own content, through its own descriptor, as if a push had won */
    uint64_t page[512];
    int error;

    own_content(page, order->argument[0]);
    while ((error = place_page(order->argument[0], page, 0)) == EAGAIN)
        pc_sleep_ns(1000000);
    if (error && error != EEXIST)
        answer_error(order->id, error);
    else
        answer(order->id, "\"placed\":%s", error ? "false" : "true");
}

/* ---- two threads against each other: one touches a page, the other does something when the fault can be seen */

static _Atomic uint64_t touch_order; /* page + 1; 0: none; UINT64_MAX: end */
static _Atomic uint64_t touch_done;
static atomic_int touch_found;

static void *touching_thread(void *argument)
{
    uint64_t last = 0;

    (void)argument;
    for (;;) {
        uint64_t order = atomic_load(&touch_order);

        if (order == UINT64_MAX)
            return NULL;
        if (order == last || !order) {
            sched_yield();
            continue;
        }
        last = order;
        atomic_store(&touch_found, content_of(at(order - 1), order - 1));
        atomic_store(&touch_done, order);
    }
}

static bool fault_seen(void)
{
    const uint64_t until_ns = pc_now_ns() + 2000000;
    struct pollfd fd = {uffd, POLLIN, 0};

    while (poll(&fd, 1, 0) == 0 && pc_now_ns() < until_ns && atomic_load(&touch_done) != atomic_load(&touch_order))
        ;
    return fd.revents & POLLIN;
}

static void await_touch(void)
{
    while (atomic_load(&touch_done) != atomic_load(&touch_order))
        sched_yield();
}

enum race { RACE_PLACE, RACE_PLACE_WAKE, RACE_REPLACE, RACE_STEAL, RACE_DISCARD };

static void do_race(const struct order *order)
{
    /* WHICH FIRST COUNT HITS MS: ends after HITS hits, or MS milliseconds */
    const uint64_t first = order->argument[1], count = order->argument[2];
    const uint64_t until_ns = pc_now_ns() + order->argument[4] * 1000000;
    uint64_t hits = 0, tried = 0, stale = 0, wrong = 0, wrong_page = 0;
    pthread_t thread;

    atomic_store(&touch_order, 0);
    atomic_store(&touch_done, 0);
    if (pthread_create(&thread, NULL, touching_thread, NULL)) {
        answer_error(order->id, EAGAIN);
        return;
    }
    for (; tried < count && hits < order->argument[3] && pc_now_ns() < until_ns; tried++) {
        const uint64_t number = first + tried;
        struct uffd_msg event;
        bool seen, hit = false;
        int found, error;

        atomic_store(&progress_page, number);
        atomic_store(&touch_order, number + 1);
        seen = fault_seen();
        switch ((enum race)order->argument[0]) {
        case RACE_PLACE: /* who waits is not woken: that is the handler's business, who is told EEXIST */
        case RACE_PLACE_WAKE:
            error = seen ? place_page(number, image + number * page_bytes, UFFDIO_COPY_MODE_DONTWAKE) : EEXIST;
            hit = !error;
            if (order->argument[0] == RACE_PLACE_WAKE)
                wake_page(number);
            break;
        case RACE_REPLACE:
            if (seen && mmap(at(number), page_bytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
                wrong++;
            break;
        case RACE_STEAL: /* reads the event a moment later: the handler is awake by then, and finds nothing */
            for (uint64_t spin_ns = pc_now_ns() + tried * 977 % 150 * 1000; seen && pc_now_ns() < spin_ns;)
                ;
            hit = seen && read(uffd, &event, sizeof(event)) == sizeof(event);
            wake_page(number);
            break;
        case RACE_DISCARD:
            madvise(at(number), page_bytes, MADV_DONTNEED);
            break;
        }
        await_touch();
        found = atomic_load(&touch_found);
        if (order->argument[0] == RACE_REPLACE)
            hit = seen && found == ZERO;
        if (order->argument[0] == RACE_DISCARD) {
            hit = seen;
            atomic_store(&progress_page, number);
            stale += !(content_of(at(number), number) & ZERO); /* the madvise is over: zeros only */
            wrong_page = stale == 1 ? number : wrong_page;
        }
        if (found & ~(IMAGE | ZERO) || (!(found & IMAGE) && order->argument[0] < RACE_REPLACE)) {
            wrong_page = wrong ? wrong_page : number;
            wrong++;
        }
        hits += hit;
    }
    atomic_store(&touch_order, UINT64_MAX);
    pthread_join(thread, NULL);
    answer(order->id, "\"hits\":%" PRIu64 ",\"tried\":%" PRIu64 ",\"stale\":%" PRIu64 ",\"wrong\":%" PRIu64 ",\"page\":%" PRIu64,
           hits, tried, stale, wrong, wrong_page);
}

/* ---- a REMOVE that takes long: its event is read, and COPY says EAGAIN all the same, until the remover has run again. So it is
 * kept from running: it has the lowest priority there is, and another thread keeps its processor busy. */

static uint64_t hold_page, hold_ms, hold_at_ns, hold_lead_ns, hold_lasted_ns;
static int hold_cpu;
static atomic_bool hold_spinning, hold_over, hold_cancelled;
static pthread_t hold_threads[2];

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
}

/* It takes the processor by a timer, a moment after the event has been queued. */
static void *spinning_thread(void *argument)
{
    const struct timespec at_time = pc_timespec(hold_at_ns);

    (void)argument;
    pin(hold_cpu);
    prctl(PR_SET_TIMERSLACK, 1);
    (void)setpriority(PRIO_PROCESS, 0, -20); /* of this thread; for root only: it holds longer */
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at_time, NULL) == EINTR)
        ;
    atomic_store(&hold_spinning, true);
    while (pc_now_ns() < hold_at_ns + hold_ms * 1000000 && !atomic_load(&hold_over) && !atomic_load(&hold_cancelled))
        ;
    return NULL;
}

static void *removing_thread(void *argument)
{
    const struct sched_param none = {0};

    (void)argument;
    pin(hold_cpu);
    pc_sleep_ns(1000000);
    while (pc_now_ns() < hold_at_ns - hold_lead_ns)
        ;
    sched_setscheduler(0, SCHED_IDLE, &none);
    madvise(at(hold_page), page_bytes, MADV_DONTNEED);
    hold_lasted_ns = pc_now_ns() - hold_at_ns;
    atomic_store(&hold_over, true);
    return NULL;
}

static void do_hold(const struct order *order)
{
    /* PAGE MS TRY: a page that is there. Answered when the handler has read the event; held: COPY says EAGAIN now. It may take
     * several tries, each with another time between the event and the moment in which the remover loses its processor. */
    struct uffdio_zeropage probe = {{0, page_bytes}, UFFDIO_ZEROPAGE_MODE_DONTWAKE, 0};
    struct pollfd fd = {uffd, POLLIN, 0};
    cpu_set_t set;
    bool held;

    hold_page = order->argument[0];
    hold_ms = order->argument[1];
    hold_lead_ns = 4000 + order->argument[2] % 12 * 3000;
    hold_at_ns = pc_now_ns() + 3000000;
    sched_getaffinity(0, sizeof(set), &set);
    for (int i = 0; i < CPU_SETSIZE; i++) /* the last one that is allowed */
        hold_cpu = CPU_ISSET((size_t)i, &set) ? i : hold_cpu;
    atomic_store(&hold_over, false);
    atomic_store(&hold_spinning, false);
    atomic_store(&hold_cancelled, false);
    if (pthread_create(&hold_threads[0], NULL, spinning_thread, NULL) ||
        pthread_create(&hold_threads[1], NULL, removing_thread, NULL)) {
        answer_error(order->id, EAGAIN);
        return;
    }
    while (!atomic_load(&hold_spinning) && !atomic_load(&hold_over))
        pc_sleep_ns(100000);
    while (poll(&fd, 1, 0) && !atomic_load(&hold_over))
        pc_sleep_ns(100000);
    probe.range.start = (uint64_t)(uintptr_t)at(hold_page);
    held = ioctl(uffd, UFFDIO_ZEROPAGE, &probe) < 0 && errno == EAGAIN && !atomic_load(&hold_over);
    atomic_store(&hold_cancelled, !held);
    answer(order->id, "\"held\":%s", held ? "true" : "false");
}

static void do_hold_end(const struct order *order)
{
    /* Now, where MS has not passed. */
    atomic_store(&hold_cancelled, true);
    pthread_join(hold_threads[0], NULL);
    pthread_join(hold_threads[1], NULL);
    answer(order->id, "\"ms\":%.3f", (double)hold_lasted_ns / 1e6);
}

/* ---- the kernel's own ways to memory */

static void do_snapshot(const struct order *order)
{
    /* COUNT: writes so many pages to a file, as a Full snapshot does, and compares */
    const uint64_t chunk = 64;
    uint8_t *copy = malloc(page_bytes);
    uint64_t wrong = 0, wrong_page = 0, done = 0;
    int fd = memfd_create("snapshot", MFD_CLOEXEC), error = copy && fd >= 0 ? 0 : ENOMEM;

    for (uint64_t i = 0; i < order->argument[0] && !error; i += chunk) {
        const uint64_t pages = order->argument[0] - i < chunk ? order->argument[0] - i : chunk;
        uint64_t left = pages * page_bytes;

        atomic_store(&progress_page, i);
        while (left && !error) { /* within one region: the orders see to that */
            ssize_t wrote = write(fd, at(i) + (pages * page_bytes - left), left);

            error = wrote <= 0 ? errno : 0;
            left -= wrote > 0 ? (uint64_t)wrote : 0;
        }
        for (uint64_t j = i; j < i + pages && !error; j++, done++) {
            if (pread(fd, copy, page_bytes, (off_t)(j * page_bytes)) != (ssize_t)page_bytes)
                error = EIO;
            else if (!(content_of(copy, j) & IMAGE) && !wrong++)
                wrong_page = j;
        }
        (void)!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)((i + pages) * page_bytes));
    }
    free(copy);
    close(fd);
    if (error)
        answer_error(order->id, error);
    else
        answer(order->id, "\"pages\":%" PRIu64 ",\"wrong\":%" PRIu64 ",\"page\":%" PRIu64, done, wrong, wrong_page);
}

static void do_readv(const struct order *order)
{
    /* PID BASE FIRST COUNT: pages of another process, whose page 0 is at BASE */
    uint8_t *copy = malloc(page_bytes);
    uint64_t wrong = 0, wrong_page = 0, done = 0;
    int error = 0;

    for (uint64_t i = order->argument[2]; copy && i < order->argument[2] + order->argument[3] && !error; i++, done++) {
        struct iovec local = {copy, page_bytes}, remote = {(void *)(uintptr_t)(order->argument[1] + i * page_bytes), page_bytes};

        atomic_store(&progress_page, i);
        if (process_vm_readv((pid_t)order->argument[0], &local, 1, &remote, 1, 0) != (ssize_t)page_bytes)
            error = errno;
        else if (!(content_of(copy, i) & IMAGE) && !wrong++)
            wrong_page = i;
    }
    free(copy);
    if (error)
        answer_error(order->id, error);
    else
        answer(order->id, "\"pages\":%" PRIu64 ",\"wrong\":%" PRIu64 ",\"page\":%" PRIu64, done, wrong, wrong_page);
}

static void on_signal(int number)
{
    (void)number; /* it is there to interrupt system calls */
}

static void *signalling_thread(void *argument)
{
    pthread_t *target = argument;

    while (!atomic_load(&touch_done)) {
        pthread_kill(*target, SIGUSR1);
        pc_sleep_ns(50000);
    }
    return NULL;
}

static void do_signals(const struct order *order)
{
    /* FIRST COUNT: system calls that fault while signals come: the same fault again and again */
    pthread_t self = pthread_self(), thread;
    int fd = memfd_create("signals", MFD_CLOEXEC);
    uint64_t wrong = 0, wrong_page = 0;
    uint8_t *copy = malloc(page_bytes);

    atomic_store(&touch_done, 0);
    if (!copy || fd < 0 || pthread_create(&thread, NULL, signalling_thread, &self)) {
        answer_error(order->id, ENOMEM);
        return;
    }
    for (uint64_t i = order->argument[0]; i < order->argument[0] + order->argument[1]; i++) {
        atomic_store(&progress_page, i);
        for (uint64_t done = 0; done < page_bytes;) {
            ssize_t wrote = pwrite(fd, at(i) + done, page_bytes - done, (off_t)done);

            done += wrote > 0 ? (uint64_t)wrote : 0;
        }
        if (pread(fd, copy, page_bytes, 0) != (ssize_t)page_bytes || (!(content_of(copy, i) & IMAGE) && !wrong++))
            wrong_page = i;
    }
    atomic_store(&touch_done, 1);
    pthread_join(thread, NULL);
    free(copy);
    close(fd);
    answer(order->id, "\"wrong\":%" PRIu64 ",\"page\":%" PRIu64, wrong, wrong_page);
}

/* ---- other processes */

static void do_fork(const struct order *order)
{
    /* PAGE: a child that touches it. The first answer, ID + 1, comes when fork has returned */
    const uint64_t number = order->argument[0];
    int status = 0;
    pid_t child;

    atomic_store(&progress_page, number);
    child = fork();
    if (child == 0) {
        close(0);
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* its page may never come */
        _exit(content_of(at(number), number));
    }
    if (child < 0) {
        answer_error(order->id, errno);
        return;
    }
    answer(order->id + 1, "\"pid\":%d", child);
    waitpid(child, &status, 0);
    answer(order->id, "\"found\":\"%s\",\"signal\":%d", WIFEXITED(status) ? name_of(WEXITSTATUS(status)) : "nothing",
           WIFSIGNALED(status) ? WTERMSIG(status) : 0);
}

static void do_clone(const struct order *order)
{
    /* PID: a process with that pid, which does nothing */
    pid_t pid = (pid_t)order->argument[0], child;
    struct { /* struct clone_args of <linux/sched.h> */
        uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size;
    } arguments = {.exit_signal = SIGCHLD, .set_tid = (uint64_t)(uintptr_t)&pid, .set_tid_size = 1};

    child = (pid_t)syscall(SYS_clone3, &arguments, sizeof(arguments));
    if (child == 0) {
        close(0);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    if (child < 0)
        answer_error(order->id, errno);
    else
        answer(order->id, "\"pid\":%d", child);
}

static void do_wait(const struct order *order)
{
    /* PID MS: of a child; what ended it within that time, which is then reaped; else it is killed */
    const pid_t pid = (pid_t)order->argument[0];
    const uint64_t until_ns = pc_now_ns() + order->argument[1] * 1000000;
    int status = 0;
    pid_t ended;

    while ((ended = waitpid(pid, &status, WNOHANG)) == 0 && pc_now_ns() < until_ns)
        pc_sleep_ns(2000000);
    if (!ended) {
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    }
    answer(order->id, "\"ended\":%s,\"signal\":%d", ended ? "true" : "false", WIFSIGNALED(status) ? WTERMSIG(status) : 0);
}

/* ---- what the kernel says of this process's memory */

static void do_protected(const struct order *order)
{
    /* FIRST COUNT: how many of these are write-protected by a userfaultfd, and whether their memory is registered for that */
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t protected_pages = 0, entry;
    bool registered = false, here = false;
    char line[512];
    FILE *maps = fopen("/proc/self/smaps", "re");

    for (uint64_t i = 0; i < order->argument[1]; i++) {
        off_t offset = (off_t)((uintptr_t)at(order->argument[0] + i) / 4096 * 8);

        if (pread(fd, &entry, sizeof(entry), offset) == sizeof(entry))
            protected_pages += (entry & PM_UFFD_WP) != 0;
    }
    close(fd);
    while (maps && fgets(line, sizeof(line), maps)) {
        uint64_t start, end;

        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &start, &end) == 2)
            here = (uint64_t)(uintptr_t)at(order->argument[0]) >= start && (uint64_t)(uintptr_t)at(order->argument[0]) < end;
        else if (here && !strncmp(line, "VmFlags:", 8))
            registered |= strstr(line, " uw") != NULL;
    }
    if (maps)
        fclose(maps);
    answer(order->id, "\"protected\":%" PRIu64 ",\"registered\":%s", protected_pages, registered ? "true" : "false");
}

static void do_pending(const struct order *order)
{
    /* MS: whether there is an event that nobody has read, within that time */
    struct pollfd fd = {uffd, POLLIN, 0};

    poll(&fd, 1, (int)order->argument[0]);
    answer(order->id, "\"pending\":%s", fd.revents & POLLIN ? "true" : "false");
}

static void do_read(const struct order *order)
{
    /* MS THREADS: whether within that time so many threads wait for a page, and their events are read */
    const uint64_t until_ns = pc_now_ns() + order->argument[0] * 1000000;
    struct pollfd fd = {uffd, POLLIN, 0};
    bool pending;

    while (atomic_load(&touching) < order->argument[1] && pc_now_ns() < until_ns)
        pc_sleep_ns(1000000);
    if (atomic_load(&touching) < order->argument[1]) {
        answer(order->id, "\"read\":false,\"held\":%s", atomic_load(&hold_over) ? "false" : "true");
        return;
    }
    pc_sleep_ns(20000000); /* from there to the fault */
    while ((pending = poll(&fd, 1, 0) > 0) && pc_now_ns() < until_ns)
        pc_sleep_ns(200000);
    answer(order->id, "\"read\":%s,\"held\":%s", pending ? "false" : "true", atomic_load(&hold_over) ? "false" : "true");
}

static void do_progress(const struct order *order)
{
    answer(order->id, "\"page\":%" PRIu64, atomic_load(&progress_page));
}

/* ---- orders */

static const struct {
    const char *name;
    void (*function)(const struct order *);
    bool in_main; /* does not touch memory, does not wait */
} orders[] = {
    {"map", do_map, true},           {"uffd", do_uffd, true},         {"connect", do_connect, true},
    {"send", do_send, true},         {"hang-up", do_hang_up, true},   {"closed", do_closed, false},
    {"pipe-closed", do_pipe_closed, false}, {"close-uffd", do_close_uffd, true}, {"block", do_block, true},
    {"become", do_become, true},     {"check", do_check, false},      {"fill", do_fill, false},
    {"discard", do_discard, false},  {"replace", do_replace, false},  {"unmap", do_unmap, false},
    {"move", do_move, false},        {"protect", do_protect, false},  {"cache", do_cache, true},
    {"place", do_place, false},      {"race", do_race, false},        {"hold", do_hold, false},
    {"hold-end", do_hold_end, false}, {"snapshot", do_snapshot, false},
    {"readv", do_readv, false},      {"signals", do_signals, false},  {"fork", do_fork, false},
    {"clone", do_clone, true},       {"wait", do_wait, false},        {"protected", do_protected, false},
    {"pending", do_pending, false},  {"read", do_read, false},        {"progress", do_progress, true},
};

static void *order_thread(void *argument)
{
    struct order *order = argument;

    for (size_t i = 0; i < sizeof(orders) / sizeof(orders[0]); i++)
        if (!strcmp(order->name, orders[i].name))
            orders[i].function(order);
    free(order);
    return NULL;
}

static void run(struct order *order)
{
    const char *text = order->text;
    pthread_t thread;
    bool in_main = true, known = false;

    while (order->count < MAX_ARGUMENTS) {
        char *end;
        uint64_t number = strtoull(text, &end, 10);

        if (end == text)
            break;
        order->argument[order->count++] = number;
        text = end;
    }
    for (size_t i = 0; i < sizeof(orders) / sizeof(orders[0]); i++)
        if (!strcmp(order->name, orders[i].name)) {
            known = true;
            in_main = orders[i].in_main;
        }
    if (!known) {
        answer_error(order->id, ENOSYS);
        free(order);
    } else if (in_main) {
        order_thread(order);
    } else if (pthread_create(&thread, NULL, order_thread, order) == 0) {
        pthread_detach(thread);
    } else {
        answer_error(order->id, EAGAIN);
        free(order);
    }
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = on_signal};
    struct stat about;
    int fd;

    if (argc != 2) {
        fprintf(stderr, "usage: client IMAGE, with orders on standard input\n");
        return 2;
    }
    fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &about) < 0) {
        perror(argv[1]);
        return 1;
    }
    image_bytes = (uint64_t)about.st_size;
    image = mmap(NULL, image_bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (image == MAP_FAILED) {
        perror(argv[1]);
        return 1;
    }
    close(fd);
    sigaction(SIGUSR1, &action, NULL); /* without SA_RESTART */
    for (;;) {
        struct order *order = calloc(1, sizeof(*order));
        int start = 0;
        ssize_t bytes;
        static char text[COMMAND_BYTES];

        do {
            bytes = recv(0, text, sizeof(text) - 1, 0);
        } while (bytes < 0 && errno == EINTR);
        if (bytes <= 0 || !order)
            _exit(0); /* also when threads wait for pages */
        text[bytes] = '\0';
        if (sscanf(text, "%" SCNu64 " %23s %n", &order->id, order->name, &start) < 2) {
            free(order);
            continue;
        }
        memcpy(order->text, text + start, (size_t)bytes + 1 - (size_t)start);
        run(order);
    }
}
