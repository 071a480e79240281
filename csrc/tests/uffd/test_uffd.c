/* SPDX-License-Identifier: Apache-2.0
 *
 * What the engine believes about userfaultfd, each belief a test: on a kernel where one of them is wrong, this fails by name
 * instead of a migration losing a page.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "core/util.h"
#include "postcopy/core.h"
#include "postcopy/memory.h"
#include "postcopy/devices.h"
#include "postcopy/uffd.h"
#include "tests/support/test.h"
#include "uffd/uffd_abi.h"

#define PAGES 16
#define STILL_BLOCKED_MS 50 /* waited for what must not happen */

static uint64_t page_bytes;
static uint8_t *source; /* PAGES pages, page i filled with i + 1 */

struct area {
    int uffd;
    int memfd;      /* or -1 */
    uint8_t *base;  /* registered */
    uint8_t *alias; /* second mapping of the memfd, not registered, or NULL */
    uint64_t bytes;
    uint64_t ioctls;
};

static uint64_t address_of(const struct area *area, uint64_t page)
{
    return (uint64_t)(uintptr_t)(area->base + page * page_bytes);
}

static int open_uffd(int how, uint64_t features)
{
    int fd = pc_uffd_open(how, features, NULL);

    if (fd == -EINVAL && features)
        SKIP("uffd-features", "this kernel lacks one of the userfaultfd features %#llx", (unsigned long long)features);
    if (fd < 0)
        SKIP("uffd", "no userfaultfd: %s", strerror(-fd));
    return fd;
}

/* A userfaultfd and PAGES missing pages: of a memfd when `mode` has MINOR or `memfd` is set, else anonymous. */
static struct area arm(bool memfd, uint64_t mode, uint64_t features)
{
    struct area area = {.memfd = -1, .bytes = PAGES * pc_page_bytes()};
    int protection = PROT_READ | PROT_WRITE;

    page_bytes = pc_page_bytes();
    source = CHECK_SYS((uint8_t *)mmap(NULL, area.bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (uint64_t page = 0; page < PAGES; page++)
        memset(source + page * page_bytes, (int)page + 1, page_bytes);
    area.uffd = open_uffd(PC_UFFD_ANY, features);
    if (memfd) {
        area.memfd = CHECK_SYS(memfd_create("test", MFD_CLOEXEC));
        CHECK_SYS(ftruncate(area.memfd, (off_t)area.bytes));
        area.base = CHECK_SYS((uint8_t *)mmap(NULL, area.bytes, protection, MAP_SHARED, area.memfd, 0));
        area.alias = CHECK_SYS((uint8_t *)mmap(NULL, area.bytes, protection, MAP_SHARED, area.memfd, 0));
        CHECK(!madvise(area.alias, area.bytes, MADV_NOHUGEPAGE) || errno == EINVAL);
    } else {
        area.base = CHECK_SYS((uint8_t *)mmap(NULL, area.bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    }
    CHECK(!madvise(area.base, area.bytes, MADV_NOHUGEPAGE) || errno == EINVAL);
    CHECK_EQ(pc_uffd_register(area.uffd, address_of(&area, 0), area.bytes, mode, &area.ioctls), 0);
    return area;
}

static bool readable(int fd, int timeout_ms)
{
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    int n = CHECK_SYS(poll(&poll_fd, 1, timeout_ms));

    return n && poll_fd.revents == POLLIN;
}

static struct uffd_msg next_event(const struct area *area, int event)
{
    struct uffd_msg msg;

    CHECK(readable(area->uffd, 5000));
    CHECK_EQ(read(area->uffd, &msg, sizeof(msg)), sizeof(msg));
    CHECK_EQ(msg.event, event);
    return msg;
}

/* A thread that does one thing which may block. */
struct worker {
    pthread_t thread;
    void (*work)(struct worker *worker);
    const struct area *area;
    uint64_t page;
    bool write;
    uint8_t value;
    _Atomic int tid;
};

static void *worker_main(void *argument)
{
    struct worker *worker = argument;

    atomic_store(&worker->tid, (int)syscall(SYS_gettid));
    worker->work(worker);
    return NULL;
}

static void touch(struct worker *worker)
{
    volatile uint8_t *at = worker->area->base + worker->page * page_bytes;

    if (worker->write)
        *at = 0xAB;
    worker->value = *at;
}

static void start(struct worker *worker, void (*work)(struct worker *))
{
    worker->work = work;
    CHECK_EQ(pthread_create(&worker->thread, NULL, worker_main, worker), 0);
}

static bool ended(struct worker *worker, uint64_t timeout_ms)
{
    struct timespec until;

    CHECK_SYS(clock_gettime(CLOCK_REALTIME, &until));
    until.tv_sec += (time_t)(timeout_ms / 1000);
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    return pthread_timedjoin_np(worker->thread, NULL, &until) == 0;
}

#define CHECK_BLOCKED(worker) CHECK(!ended(worker, STILL_BLOCKED_MS))
#define CHECK_ENDS(worker) CHECK(ended(worker, 5000))

/* ---- opening ---- */

static void opens_in_every_way(void)
{
    static const int ways[] = {PC_UFFD_DEVICE, PC_UFFD_SYSCALL, PC_UFFD_USER_ONLY};
    struct pc_uffd_api any, api;
    int works = 0, result = pc_uffd_probe(PC_UFFD_ANY, &any);

    if (result)
        SKIP("uffd", "no userfaultfd: %s", strerror(-result));
    for (size_t i = 0; i < PC_ARRAY_LENGTH(ways); i++) {
        int fd = pc_uffd_open(ways[i], 0, &api);

        if (fd < 0) {
            CHECK(fd == -ENOENT || fd == -EACCES || fd == -EPERM || fd == -ENOSYS || fd == -EINVAL);
            continue;
        }
        if (!works++)
            CHECK_EQ(any.how, ways[i]); /* the first that works */
        CHECK_EQ(api.how, ways[i]);
        CHECK_EQ(api.features, any.features);
        CHECK(api.ioctls >> PC_UFFD_IOCTL_REGISTER & 1);
        CHECK_EQ(fcntl(fd, F_GETFD), FD_CLOEXEC);
        CHECK(fcntl(fd, F_GETFL) & O_NONBLOCK);
        close(fd);
    }
    CHECK(works);
}

static void features_are_checked(void)
{
    struct pc_uffd_api api;
    int fd;

    fd = open_uffd(PC_UFFD_ANY, 0);
    close(fd);
    CHECK_EQ(pc_uffd_open(PC_UFFD_ANY, (uint64_t)1 << 62, NULL), -EINVAL);
    CHECK_EQ(pc_uffd_open(99, 0, NULL), -EINVAL);
    CHECK_EQ(pc_uffd_open(-1, 0, NULL), -EINVAL);
    fd = pc_uffd_open(PC_UFFD_ANY, UFFD_FEATURE_MISSING_SHMEM, &api);
    CHECK(fd >= 0);
    CHECK(api.features & UFFD_FEATURE_MISSING_SHMEM);
    /* The answer has all the kernel's bits, not the wanted ones only. */
    CHECK(api.features & ~UFFD_FEATURE_MISSING_SHMEM);
}

static void proc_tells_the_features(void)
{
    uint64_t features = 0;
    int uffd = open_uffd(PC_UFFD_ANY, UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_THREAD_ID), other = CHECK_SYS(eventfd(0, EFD_CLOEXEC));

    CHECK_EQ(pc_uffd_features(uffd, &features), 0);
    CHECK_EQ(features, UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_THREAD_ID);
    CHECK_EQ(pc_uffd_features(other, &features), -EINVAL);
    close(other);
    CHECK_EQ(pc_uffd_features(other, &features), -ENOENT);
}

/* Another process that shares it may have made it a blocking one. */
static void a_read_never_waits(void)
{
    struct pc_uffd_event event;
    int uffd = open_uffd(PC_UFFD_ANY, 0);
    struct iovec part = {.iov_base = &event, .iov_len = sizeof(event)};

    if (preadv2(uffd, &part, 1, -1, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP)
        SKIP("uffd-features", "a read of a blocking userfaultfd waits before Linux 6.10");
    CHECK_SYS(fcntl(uffd, F_SETFL, fcntl(uffd, F_GETFL) & ~O_NONBLOCK));
    CHECK_EQ(pc_uffd_read(uffd, &event, 1), 0);
}

static void takes_one_handshake_only(void)
{
    struct uffdio_api again = {.api = UFFD_API};
    int fd = open_uffd(PC_UFFD_ANY, 0);

    CHECK_EQ(ioctl(fd, UFFDIO_API, &again), -1);
    CHECK_EQ(errno, EINVAL);
}

static void poll_needs_nonblocking(void)
{
    struct uffdio_api handshake = {.api = UFFD_API};
    struct pollfd poll_fd = {.events = POLLIN};

    poll_fd.fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (poll_fd.fd < 0)
        SKIP("uffd-syscall", "userfaultfd(2): %s", strerror(errno));
    CHECK_SYS(ioctl(poll_fd.fd, UFFDIO_API, &handshake));
    CHECK_EQ(poll(&poll_fd, 1, 0), 1);
    CHECK_EQ(poll_fd.revents, POLLERR);
}

/* ---- registering ---- */

#define BIT(name) ((uint64_t)1 << PC_UFFD_IOCTL_##name)

static void register_tells_what_anonymous_memory_can(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);

    CHECK_EQ(area.ioctls & (BIT(WAKE) | BIT(COPY) | BIT(ZEROPAGE)), BIT(WAKE) | BIT(COPY) | BIT(ZEROPAGE));
    CHECK(!(area.ioctls & BIT(CONTINUE)));
    CHECK_EQ(pc_uffd_unregister(area.uffd, address_of(&area, 0), area.bytes), 0);
    CHECK_EQ(pc_uffd_register(area.uffd, address_of(&area, 0), area.bytes, PC_UFFD_MINOR, &area.ioctls), -EINVAL);
    CHECK_EQ(area.ioctls, 0);
}

static void register_tells_what_a_memfd_can(void)
{
    struct area area = arm(true, PC_UFFD_MISSING | PC_UFFD_MINOR, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM);

    CHECK_EQ(area.ioctls & (BIT(WAKE) | BIT(COPY) | BIT(ZEROPAGE) | BIT(CONTINUE)),
             BIT(WAKE) | BIT(COPY) | BIT(ZEROPAGE) | BIT(CONTINUE));
}

static void register_refuses(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);
    int other = open_uffd(PC_UFFD_ANY, 0), fd;
    char path[] = "/var/tmp/postcopy-test-XXXXXX";
    void *file;

    CHECK_EQ(pc_uffd_register(other, address_of(&area, 0), area.bytes, PC_UFFD_MISSING, NULL), -EBUSY);
    CHECK_EQ(pc_uffd_register(other, address_of(&area, 0) + 1, page_bytes, PC_UFFD_MISSING, NULL), -EINVAL);
    CHECK_EQ(pc_uffd_register(other, address_of(&area, 0), 0, PC_UFFD_MISSING, NULL), -EINVAL);
    CHECK_EQ(pc_uffd_register(other, address_of(&area, 0), page_bytes, 0, NULL), -EINVAL);
    fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0)
        return;
    (void)unlink(path);
    CHECK_SYS(ftruncate(fd, (off_t)page_bytes));
    file = CHECK_SYS(mmap(NULL, page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    /* Not memory: unless /var/tmp is a tmpfs, which is shmem and may be registered. */
    other = pc_uffd_register(other, (uint64_t)(uintptr_t)file, page_bytes, PC_UFFD_MISSING, NULL);
    CHECK(other == -EINVAL || other == 0);
}

/* ---- filling ---- */

static void copy_tells_how_far_it_came(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);
    uint64_t done = 99;

    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 2), source + 2 * page_bytes, page_bytes, 0, &done), 0);
    CHECK_EQ(done, page_bytes);
    CHECK_EQ(area.base[2 * page_bytes], 3);
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 2), source, page_bytes, 0, &done), -EEXIST);
    CHECK_EQ(done, 0);
    CHECK_EQ(area.base[2 * page_bytes], 3);
    /* Pages 0 and 1 are filled, 2 is there: a partial result is EAGAIN, and what stopped it comes with the next call. */
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 0), source, 4 * page_bytes, 0, &done), -EAGAIN);
    CHECK_EQ(done, 2 * page_bytes);
    CHECK_EQ(area.base[page_bytes], 2);
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 3), source, 2 * page_bytes, 0, NULL), 0);
}

static void bad_ranges_have_their_own_errors(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);
    uint64_t done = 99;
    int result;

    /* These do not write the result field; whatever was in it before must not be taken for progress. */
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 0) + 1, source, page_bytes, 0, &done), -EINVAL);
    CHECK_EQ(done, 0);
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 0), source, page_bytes + 1, 0, &done), -EINVAL);
    CHECK_EQ(pc_uffd_zeropage(area.uffd, address_of(&area, 0), 0, 0, &done), -EINVAL);
    CHECK_EQ(done, 0);
    /* Past the registered range, over its end, and after it was unregistered. */
    CHECK_SYS(munmap(area.base + (PAGES - 1) * page_bytes, page_bytes));
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, PAGES - 1), source, page_bytes, 0, &done), -ENOENT);
    result = pc_uffd_copy(area.uffd, address_of(&area, PAGES - 2), source, 2 * page_bytes, 0, &done);
    CHECK_EQ(result, -ENOENT);
    CHECK_EQ(done, 0);
    CHECK_EQ(pc_uffd_unregister(area.uffd, address_of(&area, 0), 4 * page_bytes), 0);
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 0), source, page_bytes, 0, &done), -ENOENT);
    /* A source that is not there. */
    CHECK_SYS(munmap(source, page_bytes));
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 5), source, page_bytes, 0, &done), -EFAULT);
    CHECK_EQ(done, 0);
}

static void zeropage_fills_both_kinds(void)
{
    for (int memfd = 0; memfd < 2; memfd++) {
        struct area area = arm(memfd, PC_UFFD_MISSING, memfd ? UFFD_FEATURE_MISSING_SHMEM : 0);
        uint64_t done = 0;

        CHECK_EQ(pc_uffd_zeropage(area.uffd, address_of(&area, 0), 8 * page_bytes, 0, &done), 0);
        CHECK_EQ(done, 8 * page_bytes);
        CHECK(pc_is_zero(area.base, 8 * page_bytes));
        CHECK_EQ(pc_uffd_zeropage(area.uffd, address_of(&area, 0), page_bytes, 0, &done), -EEXIST);
        CHECK_EQ(done, 0);
    }
}

static void continue_maps_what_the_alias_has(void)
{
    struct area area = arm(true, PC_UFFD_MISSING | PC_UFFD_MINOR, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM);
    uint64_t done = 99;

    CHECK_EQ(pc_uffd_continue(area.uffd, address_of(&area, 0), page_bytes, 0, &done), -EFAULT); /* nothing there */
    CHECK_EQ(done, 0);
    memcpy(area.alias, source, 4 * page_bytes);
    CHECK_EQ(pc_uffd_continue(area.uffd, address_of(&area, 0), 4 * page_bytes, 0, &done), 0);
    CHECK_EQ(done, 4 * page_bytes);
    CHECK(!memcmp(area.base, source, 4 * page_bytes));
    CHECK_EQ(pc_uffd_continue(area.uffd, address_of(&area, 0), page_bytes, 0, &done), -EEXIST);
    CHECK_EQ(done, 0);
    /* A hole in the middle of a run. */
    memcpy(area.alias + 4 * page_bytes, source, page_bytes);
    CHECK_EQ(pc_uffd_continue(area.uffd, address_of(&area, 4), 2 * page_bytes, 0, &done), -EAGAIN);
    CHECK_EQ(done, page_bytes);
}

static void poison_is_an_error_and_not_zeros(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, UFFD_FEATURE_POISON);
    uint64_t done = 0;
    int ends[2];
    ssize_t wrote;

    CHECK(area.ioctls & BIT(POISON));
    CHECK_EQ(pc_uffd_poison(area.uffd, address_of(&area, 1), 2 * page_bytes, 0, &done), 0);
    CHECK_EQ(done, 2 * page_bytes);
    CHECK_EQ(pc_uffd_poison(area.uffd, address_of(&area, 1), page_bytes, 0, &done), -EEXIST);
    CHECK_EQ(done, 0);
    CHECK_SYS(pipe(ends));
    wrote = write(ends[1], area.base + page_bytes, 1); /* user code would get SIGBUS */
    CHECK_EQ(wrote, -1);
    CHECK(errno == EFAULT || errno == EHWPOISON);
    /* Not for good: a page that comes after all takes the mark's place. */
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 1), source, page_bytes, 0, &done), 0);
    CHECK_EQ(area.base[page_bytes], 1);
    CHECK_EQ(pc_uffd_unregister(area.uffd, address_of(&area, 0), area.bytes), 0);
    close(area.uffd);
    CHECK_EQ(write(ends[1], area.base + 2 * page_bytes, 1), -1); /* stays when the userfaultfd is gone */
}

/* ---- faults ---- */

static void faults_say_who_and_where(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, UFFD_FEATURE_THREAD_ID);
    struct worker worker = {.area = &area, .page = 3, .write = true};
    struct uffd_msg msg;

    start(&worker, touch);
    msg = next_event(&area, UFFD_EVENT_PAGEFAULT);
    CHECK_EQ(msg.arg.pagefault.address & ~(page_bytes - 1), address_of(&area, 3));
    CHECK_EQ(msg.arg.pagefault.flags, UFFD_PAGEFAULT_FLAG_WRITE);
    CHECK_EQ(msg.arg.pagefault.feat.ptid, atomic_load(&worker.tid));
    CHECK_EQ(read(area.uffd, &msg, sizeof(msg)), -1); /* once */
    CHECK_EQ(errno, EAGAIN);
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 3), source, page_bytes, 0, NULL), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(worker.value, 0xAB);
}

static void eexist_wakes_nobody(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);
    struct worker worker = {.area = &area, .page = 1};

    start(&worker, touch);
    (void)next_event(&area, UFFD_EVENT_PAGEFAULT);
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 1), source, page_bytes, UFFDIO_COPY_MODE_DONTWAKE, NULL), 0);
    CHECK_BLOCKED(&worker);
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 1), source, page_bytes, 0, NULL), -EEXIST);
    CHECK_BLOCKED(&worker);
    CHECK_EQ(pc_uffd_wake(area.uffd, address_of(&area, 1), page_bytes), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(worker.value, 1);
}

static void wake_without_a_page_faults_again(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);
    struct worker worker = {.area = &area, .page = 1};

    start(&worker, touch);
    (void)next_event(&area, UFFD_EVENT_PAGEFAULT);
    CHECK_EQ(pc_uffd_wake(area.uffd, address_of(&area, 0), area.bytes), 0);
    (void)next_event(&area, UFFD_EVENT_PAGEFAULT);
    CHECK_EQ(pc_uffd_zeropage(area.uffd, address_of(&area, 1), page_bytes, 0, NULL), 0);
    CHECK_ENDS(&worker);
}

static void closing_shows_zeros(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);
    struct worker worker = {.area = &area, .page = 1, .value = 0xFF};
    int kept = CHECK_SYS(dup(area.uffd));

    start(&worker, touch);
    (void)next_event(&area, UFFD_EVENT_PAGEFAULT);
    close(area.uffd);
    CHECK_BLOCKED(&worker); /* a duplicate keeps the machine safe */
    close(kept);
    CHECK_ENDS(&worker);
    CHECK_EQ(worker.value, 0); /* silent corruption: why an engine must never just close */
}

static void touch_by_system_call(struct worker *worker)
{
    int ends[2];

    CHECK_SYS(pipe(ends));
    worker->value = write(ends[1], worker->area->base + worker->page * page_bytes, 1) == 1 ? 1 : (uint8_t)errno;
}

static void faults_of_the_kernel_are_served(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);
    struct worker worker = {.area = &area, .page = 1};
    struct pc_uffd_api api;

    CHECK_EQ(pc_uffd_probe(PC_UFFD_ANY, &api), 0);
    if (api.how == PC_UFFD_USER_ONLY)
        SKIP("uffd-kernel", "only faults of user code for this user: run as root, or sysctl vm.unprivileged_userfaultfd=1");
    start(&worker, touch_by_system_call);
    (void)next_event(&area, UFFD_EVENT_PAGEFAULT);
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 1), source, page_bytes, 0, NULL), 0);
    CHECK_ENDS(&worker);
    CHECK_EQ(worker.value, 1);
}

static void user_only_gives_the_kernel_efault(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);
    struct worker worker = {.area = &area, .page = 1};
    int fd = open_uffd(PC_UFFD_USER_ONLY, 0);

    CHECK_EQ(pc_uffd_unregister(area.uffd, address_of(&area, 0), area.bytes), 0);
    CHECK_EQ(pc_uffd_register(fd, address_of(&area, 0), area.bytes, PC_UFFD_MISSING, NULL), 0);
    start(&worker, touch_by_system_call);
    CHECK_ENDS(&worker);
    CHECK_EQ(worker.value, EFAULT);
    CHECK(!readable(fd, 0));
}

/* ---- missing and minor ---- */

static uint64_t flags_of_fault(const struct area *area, uint64_t page)
{
    struct worker worker = {.area = area, .page = page};
    struct uffd_msg msg;
    int result;

    start(&worker, touch);
    msg = next_event(area, UFFD_EVENT_PAGEFAULT);
    if (msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR)
        result = pc_uffd_continue(area->uffd, address_of(area, page), page_bytes, 0, NULL);
    else
        result = pc_uffd_copy(area->uffd, address_of(area, page), source, page_bytes, 0, NULL);
    CHECK_EQ(result, 0);
    CHECK_ENDS(&worker);
    return msg.arg.pagefault.flags;
}

static void even_reading_a_hole_by_mapping_fills_it(void)
{
    struct area area = arm(true, PC_UFFD_MISSING | PC_UFFD_MINOR, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM);
    uint8_t byte;

    CHECK_EQ(flags_of_fault(&area, 0), 0);
    area.alias[page_bytes] = 1;
    CHECK_EQ(flags_of_fault(&area, 1), UFFD_PAGEFAULT_FLAG_MINOR);
    CHECK_EQ(*(volatile uint8_t *)(area.alias + 2 * page_bytes), 0);
    CHECK_EQ(flags_of_fault(&area, 2), UFFD_PAGEFAULT_FLAG_MINOR); /* so MINOR does not mean "already received" */
    CHECK_EQ(pread(area.memfd, &byte, 1, 3 * (off_t)page_bytes), 1);
    CHECK_EQ(flags_of_fault(&area, 3), 0); /* pread(2) leaves the hole alone */
}

/* ---- events that block ---- */

static void fork_and_reap(struct worker *worker)
{
    /* The bare system call: fork(3) of TSan's runtime holds locks which the thread needs that reads the event. */
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
    int status;

    (void)worker;
    if (!child)
        _exit(0);
    CHECK(child > 0);
    CHECK_EQ(waitpid(child, &status, 0), child);
}

static void drop_a_page(struct worker *worker)
{
    CHECK_SYS(madvise(worker->area->base + worker->page * page_bytes, page_bytes, MADV_DONTNEED));
}

static void nothing_is_filled_while_a_fork_is_unread(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, 0);
    struct worker worker = {.area = &area};
    uint64_t done = 99;
    struct uffd_msg msg;
    int fd = pc_uffd_open(PC_UFFD_ANY, UFFD_FEATURE_EVENT_FORK, NULL);

    if (fd == -EPERM)
        SKIP("uffd-kernel", "EVENT_FORK needs CAP_SYS_PTRACE");
    CHECK(fd >= 0);
    CHECK_EQ(pc_uffd_unregister(area.uffd, address_of(&area, 0), area.bytes), 0);
    area.uffd = fd;
    CHECK_EQ(pc_uffd_register(fd, address_of(&area, 0), area.bytes, PC_UFFD_MISSING, NULL), 0);
    start(&worker, fork_and_reap);
    CHECK(readable(fd, 5000));
    CHECK_EQ(pc_uffd_copy(fd, address_of(&area, 0), source, page_bytes, 0, &done), -EAGAIN);
    CHECK_EQ(done, 0); /* -EAGAIN in the field, or nothing: no progress either way */
    CHECK_EQ(pc_uffd_zeropage(fd, address_of(&area, 0), page_bytes, 0, &done), -EAGAIN);
    CHECK_EQ(done, 0);
    CHECK_BLOCKED(&worker);
    msg = next_event(&area, UFFD_EVENT_FORK);
    close((int)msg.arg.fork.ufd);
    CHECK_ENDS(&worker);
    CHECK_EQ(pc_uffd_copy(fd, address_of(&area, 0), source, page_bytes, 0, &done), 0);
}

static void dontneed_waits_until_its_event_is_read(void)
{
    struct area area = arm(false, PC_UFFD_MISSING, UFFD_FEATURE_EVENT_REMOVE);
    struct worker worker = {.area = &area, .page = 2};
    struct uffd_msg msg;
    uint64_t done = 99;

    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 2), source, page_bytes, 0, NULL), 0);
    start(&worker, drop_a_page);
    CHECK(readable(area.uffd, 5000));
    CHECK_EQ(pc_uffd_copy(area.uffd, address_of(&area, 3), source, page_bytes, 0, &done), -EAGAIN);
    CHECK_EQ(done, 0);
    CHECK_BLOCKED(&worker);
    msg = next_event(&area, UFFD_EVENT_REMOVE);
    CHECK_EQ(msg.arg.remove.start, address_of(&area, 2));
    CHECK_EQ(msg.arg.remove.end, address_of(&area, 3));
    CHECK_ENDS(&worker);
    CHECK_EQ(flags_of_fault(&area, 2), 0); /* missing again */
}

/* What --user is for: a descriptor that was opened in time serves one who could not open it. */
static void kept_device_serves_without_rights(void)
{
    struct pc_uffd_api api;
    int first, second, kvm;

    CHECK_EQ(pc_device_keep(-1), -EINVAL);
    CHECK_EQ(pc_device_open(3), -EINVAL);
    if (geteuid() != 0)
        SKIP("root", "only root can lose the right to open a device");
    if (pc_device_keep(PC_DEVICE_USERFAULTFD) != 0)
        SKIP("uffd", "no /dev/userfaultfd");
    CHECK_EQ(pc_device_keep(PC_DEVICE_USERFAULTFD), 0); /* in place of the first */
    kvm = pc_device_keep(PC_DEVICE_KVM);
    CHECK_SYS(setresgid(65534, 65534, 65534));
    CHECK_SYS(setresuid(65534, 65534, 65534));
    first = pc_uffd_open(PC_UFFD_ANY, 0, &api);
    CHECK(first >= 0);
    CHECK_EQ(api.how, PC_UFFD_DEVICE);
    second = pc_uffd_open(PC_UFFD_DEVICE, 0, &api);
    CHECK(second >= 0 && second != first);
    if (kvm == 0) {
        kvm = pc_device_open(PC_DEVICE_KVM);
        CHECK(kvm >= 0);
        CHECK_EQ(fcntl(kvm, F_GETFD), FD_CLOEXEC);
    }
    if (access("/dev/net/tun", R_OK | W_OK) != 0)
        CHECK(pc_device_open(PC_DEVICE_TUN) < 0); /* it was not kept */
}

/* The descriptor of a TAP becomes the interface: the second one must be another. */
static void kept_tun_serves_once(void)
{
    int kept, other;

    if (pc_device_keep(PC_DEVICE_TUN) != 0)
        SKIP("tun", "no /dev/net/tun");
    kept = pc_device_open(PC_DEVICE_TUN);
    other = pc_device_open(PC_DEVICE_TUN);
    CHECK(kept >= 0 && other >= 0 && kept != other);
    CHECK_EQ(fcntl(kept, F_GETFD), FD_CLOEXEC);
    /* Zero says that both are one open file; -1, a kernel without kcmp(2). */
    CHECK(syscall(SYS_kcmp, getpid(), getpid(), 0 /* KCMP_FILE */, (unsigned long)kept, (unsigned long)other) != 0);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(opens_in_every_way);
    RUN(features_are_checked);
    RUN(proc_tells_the_features);
    RUN(a_read_never_waits);
    RUN(takes_one_handshake_only);
    RUN(poll_needs_nonblocking);
    RUN(register_tells_what_anonymous_memory_can);
    RUN(register_tells_what_a_memfd_can);
    RUN(register_refuses);
    RUN(copy_tells_how_far_it_came);
    RUN(bad_ranges_have_their_own_errors);
    RUN(zeropage_fills_both_kinds);
    RUN(continue_maps_what_the_alias_has);
    RUN(poison_is_an_error_and_not_zeros);
    RUN(faults_say_who_and_where);
    RUN(eexist_wakes_nobody);
    RUN(wake_without_a_page_faults_again);
    RUN(closing_shows_zeros);
    RUN(faults_of_the_kernel_are_served);
    RUN(user_only_gives_the_kernel_efault);
    RUN(even_reading_a_hole_by_mapping_fills_it);
    RUN(nothing_is_filled_while_a_fork_is_unread);
    RUN(dontneed_waits_until_its_event_is_read);
    RUN(kept_device_serves_without_rights);
    RUN(kept_tun_serves_once);
    return test_end();
}
