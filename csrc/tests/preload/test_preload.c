/* SPDX-License-Identifier: Apache-2.0
 *
 * The preload library, called as a program would call it, and asked as hostile and other clients do. (Its code is linked in: under
 * a sanitizer nothing can be preloaded. tests/integration/test_program.py preloads it.)
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "preload/preload.h"
#include "tests/support/test.h"
#include "uffd/uffd_abi.h"

#define PAGE ((size_t)4096)
#define BYTES (16 * PAGE)
#define FEATURES (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM)

static struct sockaddr_un path = {.sun_family = AF_UNIX};
static int got[PRELOAD_MAPPINGS]; /* descriptors of the last reply */

static void begin(uint64_t lazy_features)
{
    char lazy[32];

    (void)unlink(path.sun_path);
    CHECK(!setenv("POSTCOPY_PRELOAD", path.sun_path, 1));
    (void)snprintf(lazy, sizeof(lazy), "%#llx", (unsigned long long)lazy_features);
    CHECK(!setenv("POSTCOPY_PRELOAD_LAZY", lazy_features ? lazy : "", 1));
    CHECK(!setenv("LD_PRELOAD", "/a/libone.so /x/libpostcopy-preload.so:/b/libtwo.so", 1));
    preload_begin();
}

/* The least number of a descriptor of the library. */
static int lowest(void)
{
    struct rlimit limit;

    CHECK_SYS(getrlimit(RLIMIT_NOFILE, &limit));
    return limit.rlim_cur < 2048 ? (int)limit.rlim_cur / 2 : 1024;
}

static int memory_file(size_t bytes)
{
    int fd = CHECK_SYS(memfd_create("arena", MFD_CLOEXEC));

    CHECK_SYS(ftruncate(fd, (off_t)bytes));
    return fd;
}

static char *map_at(void *at, int fd, size_t bytes, off_t offset)
{
    char *mapped = preload_mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (at ? MAP_FIXED : 0), fd, offset);

    CHECK(mapped != MAP_FAILED);
    return mapped;
}

/* A new file, mapped, its descriptor closed: as programs do it. */
static char *map_new(size_t bytes)
{
    int fd = memory_file(bytes);
    char *mapped = map_at(NULL, fd, bytes, 0);

    CHECK_SYS(close(fd));
    return mapped;
}

static int connection(void)
{
    int fd = CHECK_SYS(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));

    CHECK_SYS(connect(fd, (struct sockaddr *)&path, sizeof(path)));
    return fd;
}

/* How many bytes came, and in `*fds` how many descriptors, into `got`. */
static ssize_t receive(int fd, struct preload_reply *reply, size_t *fds)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(got))];
    } control;
    struct iovec part = {reply, sizeof(*reply)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    ssize_t bytes = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = bytes > 0 ? CMSG_FIRSTHDR(&message) : NULL;

    *fds = 0;
    if (header) {
        *fds = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(got, CMSG_DATA(header), *fds * sizeof(int));
    }
    return bytes;
}

static struct preload_reply reply; /* the last one */

static size_t ask_raw(const void *request, size_t bytes)
{
    int fd = connection();
    size_t fds;

    CHECK_EQ(send(fd, request, bytes, MSG_NOSIGNAL), bytes);
    CHECK(receive(fd, &reply, &fds) >= (ssize_t)offsetof(struct preload_reply, mappings));
    CHECK_SYS(close(fd));
    CHECK_EQ(reply.magic, PRELOAD_MAGIC);
    return fds;
}

static size_t ask(enum preload_op op, uint32_t flags, uint64_t features, uint64_t mode, const char *at, size_t bytes)
{
    struct preload_request request = {.magic = PRELOAD_MAGIC, .version = PRELOAD_VERSION, .op = (uint16_t)op, .flags = flags,
                                      .features = features, .mode = mode, .count = at != NULL};

    request.ranges[0] = (struct preload_range){(uint64_t)at, bytes};
    return ask_raw(&request, offsetof(struct preload_request, ranges) + request.count * sizeof(request.ranges[0]));
}

/* Lists; closes what came. Returns the number of mappings. */
static size_t list(void)
{
    size_t fds = ask(PRELOAD_LIST, 0, 0, 0, NULL, 0);

    CHECK_EQ(reply.error, 0);
    CHECK_EQ(fds, reply.count);
    for (size_t i = 0; i < fds; i++) {
        struct stat file;

        CHECK_SYS(fstat(got[i], &file));
        CHECK_EQ(file.st_ino, reply.mappings[i].inode);
        CHECK_SYS(close(got[i]));
    }
    return fds;
}

static size_t arm(uint32_t flags, const char *at, size_t bytes)
{
    return ask(PRELOAD_ARM, flags, FEATURES, UFFDIO_REGISTER_MODE_MISSING, at, bytes);
}

static void unregister(int uffd, const char *at, size_t bytes)
{
    struct uffdio_range range = {(uint64_t)at, bytes};

    CHECK_SYS(ioctl(uffd, UFFDIO_UNREGISTER, &range));
}

static void empty(int fd)
{
    CHECK_SYS(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)BYTES));
}

static void place(int uffd, char *at, int value)
{
    static char page[4096];
    struct uffdio_copy copy = {.dst = (uint64_t)at, .src = (uint64_t)page, .len = PAGE};

    memset(page, value, PAGE);
    CHECK_SYS(ioctl(uffd, UFFDIO_COPY, &copy));
}

struct reader {
    const char *at;
    _Atomic int value; /* -1: it waits */
};

static void *read_it(void *argument)
{
    struct reader *reader = argument;

    reader->value = *(volatile const char *)reader->at;
    return NULL;
}

static pthread_t read_in_thread(struct reader *reader, const char *at)
{
    pthread_t thread;

    *reader = (struct reader){at, -1};
    CHECK(!pthread_create(&thread, NULL, read_it, reader));
    return thread;
}

/* Until a page fault is told, and none else. */
static uint64_t fault(int uffd)
{
    struct pollfd waiting = {.fd = uffd, .events = POLLIN};
    struct uffd_msg message;

    CHECK_EQ(poll(&waiting, 1, -1), 1);
    CHECK_EQ(read(uffd, &message, sizeof(message)), sizeof(message));
    CHECK_EQ(message.event, UFFD_EVENT_PAGEFAULT);
    return message.arg.pagefault.address;
}

/* ---- what is remembered */

static void remembers_shared_writable_mappings_of_files_in_memory(void)
{
    char name[] = "/var/tmp/pc-preload-XXXXXX";
    int fd = memory_file(BYTES), disk = CHECK_SYS(mkstemp(name)), zero = CHECK_SYS(open("/dev/zero", O_RDWR));
    char *first;

    begin(0);
    CHECK_SYS(ftruncate(disk, (off_t)BYTES));
    errno = 4711;
    first = map_at(NULL, fd, BYTES, 0);
    CHECK_EQ(errno, 4711);
    (void)map_at(NULL, fd, BYTES - PAGE, (off_t)PAGE);
    CHECK(preload_mmap(NULL, BYTES, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED);
    CHECK(preload_mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0) != MAP_FAILED);
    CHECK(preload_mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
    CHECK(preload_mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, disk, 0) != MAP_FAILED);
    CHECK(preload_mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, zero, 0) != MAP_FAILED);
    CHECK(preload_mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, 9999, 0) == MAP_FAILED && errno == EBADF);
    CHECK_SYS(unlink(name));
    CHECK_EQ(list(), 2);
    CHECK_EQ(reply.mappings[0].address, (uint64_t)first);
    CHECK_EQ(reply.mappings[0].bytes, BYTES);
    CHECK_EQ(reply.mappings[0].page_bytes, PAGE);
    CHECK(!strcmp(reply.mappings[0].name, "/memfd:arena (deleted)"));
    CHECK_EQ(reply.mappings[1].offset, PAGE);
    CHECK(!strcmp(getenv("LD_PRELOAD"), "/a/libone.so /b/libtwo.so"));
}

static void check_pieces(size_t count, const char *base, const size_t (*pages)[2])
{
    CHECK_EQ(list(), count);
    for (size_t i = 0; i < count; i++) {
        CHECK_EQ(reply.mappings[i].address, (uint64_t)base + pages[i][0] * PAGE);
        CHECK_EQ(reply.mappings[i].offset, pages[i][0] * PAGE);
        CHECK_EQ(reply.mappings[i].bytes, (pages[i][1] - pages[i][0]) * PAGE);
    }
}

static void forgets_what_is_unmapped(void)
{
    char *base = mmap(NULL, 64 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *moved, *second;

    begin(0);
    CHECK(base != MAP_FAILED);
    CHECK(map_at(base, memory_file(BYTES), BYTES, 0) == base);
    CHECK_SYS(preload_munmap(base + 4 * PAGE, 2 * PAGE));
    check_pieces(2, base, (const size_t[][2]){{0, 4}, {6, 16}});
    CHECK_SYS(preload_munmap(base + 14 * PAGE, 9 * PAGE - 1)); /* its end, and what is behind it */
    check_pieces(2, base, (const size_t[][2]){{0, 4}, {6, 14}});
    CHECK(preload_munmap(base + 1, PAGE) < 0 && errno == EINVAL);
    CHECK(preload_mmap(base, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == base);
    check_pieces(2, base, (const size_t[][2]){{1, 4}, {6, 14}});
    moved = preload_mremap(base + 6 * PAGE, 8 * PAGE, 9 * PAGE, MREMAP_MAYMOVE, NULL);
    CHECK(moved != MAP_FAILED);
    CHECK_EQ(list(), 2);
    CHECK_EQ(reply.mappings[1].address, (uint64_t)moved);
    CHECK_EQ(reply.mappings[1].bytes, 9 * PAGE);
    CHECK_EQ(reply.mappings[1].offset, 6 * PAGE);
    CHECK((second = preload_mremap(moved, 0, 4 * PAGE, MREMAP_MAYMOVE, NULL)) != MAP_FAILED); /* once more */
    CHECK_EQ(list(), 3);
    CHECK_EQ(reply.mappings[1].address, (uint64_t)moved);
    CHECK_EQ(reply.mappings[2].address, (uint64_t)second);
    CHECK_EQ(reply.mappings[2].bytes, 4 * PAGE);
    CHECK_SYS(preload_munmap(second, 4 * PAGE));
    CHECK_SYS(preload_munmap(moved, 9 * PAGE));
    CHECK_SYS(preload_munmap(base, 4 * PAGE)); /* not the holes behind it: another thread may have got them */
    CHECK_EQ(list(), 0);
    CHECK_EQ(reply.state, 0);
}

static void forgets_nothing_that_stays(void)
{
    char *base;

    begin(0);
    base = map_new(BYTES);
    CHECK(preload_munmap(base, (size_t)1 << 62) < 0);
    CHECK(preload_mmap(base, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, 9999, 0) == MAP_FAILED && errno == EBADF);
    CHECK(preload_mmap(base, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED);
    CHECK(preload_mremap(base, BYTES, BYTES, MREMAP_FIXED, base + 64 * PAGE) == MAP_FAILED && errno == EINVAL);
    check_pieces(1, base, (const size_t[][2]){{0, 16}});
}

static void keeps_no_file_that_is_unmapped(void)
{
    int fd;

    begin(0);
    (void)map_new(BYTES);
    fd = CHECK_SYS(fcntl(0, F_DUPFD, lowest())); /* the lowest number of ours that is free, before and after */
    CHECK_SYS(close(fd));
    for (int i = 0; i < 1000; i++)
        CHECK_SYS(preload_munmap(map_new(BYTES), BYTES));
    CHECK_EQ(fcntl(0, F_DUPFD, lowest()), fd);
    CHECK_EQ(list(), 1);
}

static void says_that_there_are_more_than_it_knows(void)
{
    char *some[PRELOAD_MAPPINGS + 1];

    begin(0);
    for (size_t i = 0; i <= PRELOAD_MAPPINGS; i++)
        some[i] = map_new(PAGE);
    CHECK_EQ(list(), PRELOAD_MAPPINGS);
    CHECK(reply.state & PRELOAD_LOST);
    for (size_t i = 0; i <= PRELOAD_MAPPINGS; i++)
        CHECK_SYS(preload_munmap(some[i], PAGE));
    CHECK_EQ(list(), 0);
}

static void takes_no_descriptor_of_the_program_for_its_own(void)
{
    int others[64], zero = CHECK_SYS(open("/dev/zero", O_RDWR | O_CLOEXEC));
    char *base;

    begin(0);
    base = map_new(BYTES);
    CHECK_EQ(list(), 1);
    CHECK_SYS(close_range((unsigned)lowest(), ~0U, 0)); /* as a program that closes all it has */
    for (int i = 0; i < 64; i++)
        others[i] = CHECK_SYS(fcntl(zero, F_DUPFD, lowest())); /* and opens others */
    CHECK_SYS(preload_munmap(base, BYTES));
    for (int i = 0; i < 64; i++)
        CHECK(fcntl(others[i], F_GETFD) >= 0);
}

/* ---- requests */

static void guards_and_undoes_it(void)
{
    struct reader reader;
    pthread_t thread;
    int fd = memory_file(BYTES);
    char *base;

    begin(0);
    base = map_at(NULL, fd, BYTES, 0);
    memset(base, 1, BYTES);
    CHECK_EQ(arm(0, base, BYTES), 1);
    empty(fd);
    CHECK_EQ(reply.error, 0);
    CHECK_EQ(reply.features, FEATURES);
    CHECK_EQ(reply.state, 0);
    thread = read_in_thread(&reader, base + 3 * PAGE + 5);
    CHECK_EQ(fault(got[0]), (uint64_t)base + 3 * PAGE);
    place(got[0], base + 3 * PAGE, 9);
    CHECK(!pthread_join(thread, NULL));
    CHECK_EQ(reader.value, 9);
    CHECK_SYS(close(got[0])); /* the end of the asker: nothing is guarded any more */
    CHECK_EQ(base[4 * PAGE], 0);
    CHECK_EQ(ask(PRELOAD_TAKE, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.step, PRELOAD_KEPT);
    CHECK_EQ(arm(0, base, PAGE), 1); /* again */
    CHECK_EQ(ask(PRELOAD_ARM, 0, UFFD_FEATURE_WP_ASYNC, 0, NULL, 0), 1); /* one with nothing registered, beside it */
    CHECK_EQ(list(), 1);
}

static void keeps_a_copy_until_it_is_disarmed(void)
{
    struct reader reader;
    pthread_t thread;
    char *base;

    begin(0);
    (void)map_new(PAGE);
    base = map_new(BYTES);
    CHECK_EQ(arm(PRELOAD_KEEP, base, BYTES), 1);
    CHECK_EQ(reply.state, PRELOAD_IS_KEPT);
    CHECK_SYS(close(got[0])); /* the end of the asker */
    thread = read_in_thread(&reader, base);
    CHECK_EQ(arm(PRELOAD_KEEP, base, BYTES), 0);
    CHECK_EQ(reply.error, EBUSY);
    CHECK_EQ(reply.step, PRELOAD_KEPT);
    CHECK_EQ(ask(PRELOAD_TAKE, 0, 0, 0, NULL, 0), 1);
    CHECK_EQ(reply.features, FEATURES);
    CHECK_EQ(fault(got[0]), (uint64_t)base);
    CHECK_EQ(reader.value, -1);
    place(got[0], base, 5);
    CHECK(!pthread_join(thread, NULL));
    CHECK_EQ(reader.value, 5);
    unregister(got[0], base, 5 * PAGE);
    CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.error, EBUSY); /* what is missing in the rest would read as zeros */
    CHECK_EQ(reply.step, PRELOAD_GUARDED);
    CHECK_EQ(reply.index, 1);
    CHECK_EQ(reply.state, PRELOAD_IS_KEPT);
    unregister(got[0], base + 5 * PAGE, BYTES - 5 * PAGE);
    CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.error, 0);
    CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.error, ENOENT);
    CHECK_EQ(arm(PRELOAD_KEEP, base, BYTES), 1);
    CHECK_EQ(reply.error, 0);
}

static void guards_from_the_first_touch_on(void)
{
    struct reader reader, other;
    pthread_t thread, another;
    char *base;
    int fd;

    begin(FEATURES);
    fd = memory_file(BYTES);
    CHECK_EQ(pwrite(fd, "old", 3, 0), 3);
    base = map_at(NULL, fd, BYTES, 0);
    thread = read_in_thread(&reader, base); /* what is in the file already is not seen */
    another = read_in_thread(&other, base + PAGE);
    CHECK_EQ(list(), 1);
    CHECK_EQ(reply.state, PRELOAD_IS_LAZY);
    CHECK_EQ(ask(PRELOAD_ARM, PRELOAD_KEEP, UFFD_FEATURE_SIGBUS, 1, base, BYTES), 0);
    CHECK_EQ(reply.step, PRELOAD_FEATURES);
    CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.step, PRELOAD_GUARDED);
    empty(fd);
    CHECK_EQ(arm(PRELOAD_KEEP, base, BYTES), 1);
    CHECK_EQ(reply.state, PRELOAD_IS_KEPT);
    place(got[0], base, 'n');
    place(got[0], base + PAGE, 'm');
    CHECK(!pthread_join(thread, NULL));
    CHECK(!pthread_join(another, NULL));
    CHECK_EQ(reader.value, 'n');
    CHECK_EQ(other.value, 'm');
    map_new(PAGE)[0] = 1; /* does not wait any more */
}

/* What the kernel has filled with zeros, or found in the file, before the mapping could be guarded. */
static void guards_what_was_populated(void)
{
    struct reader reader;
    pthread_t thread;
    char *base;
    int fd;

    begin(FEATURES);
    fd = memory_file(BYTES);
    base = preload_mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    CHECK(base != MAP_FAILED);
    CHECK_EQ(ask(PRELOAD_ARM, PRELOAD_KEEP, FEATURES, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR, base, BYTES), 1);
    thread = read_in_thread(&reader, base);
    CHECK_EQ(fault(got[0]), (uint64_t)base);
    empty(fd);
    place(got[0], base, 'n');
    CHECK(!pthread_join(thread, NULL));
    CHECK_EQ(reader.value, 'n');
}

static int map_once_more(int fd, int protection, int flags)
{
    void *mapped = preload_mmap(NULL, BYTES, protection, flags, fd, 0);

    if (mapped == MAP_FAILED)
        return errno;
    CHECK_SYS(preload_munmap(mapped, BYTES));
    return 0;
}

/* It would read zeros there, and they would be its memory. */
static void maps_nothing_once_more_that_waits(void)
{
    int fd = memory_file(BYTES), other = memory_file(BYTES), uffd;
    char *base;

    begin(0);
    base = map_at(NULL, fd, BYTES, 0);
    CHECK_EQ(map_once_more(fd, PROT_READ, MAP_SHARED), 0);
    CHECK_EQ(arm(PRELOAD_KEEP, base, BYTES), 1);
    uffd = got[0];
    CHECK_EQ(map_once_more(fd, PROT_READ | PROT_WRITE, MAP_SHARED), ENOMEM);
    CHECK_EQ(map_once_more(fd, PROT_READ, MAP_SHARED), ENOMEM);
    CHECK_EQ(map_once_more(fd, PROT_READ | PROT_WRITE, MAP_PRIVATE), ENOMEM);
    CHECK(preload_mmap(base, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED && errno == ENOMEM);
    CHECK_EQ(map_once_more(other, PROT_READ, MAP_PRIVATE), 0);
    CHECK_EQ(map_once_more(other, PROT_READ | PROT_WRITE, MAP_SHARED), 0);
    CHECK_EQ(list(), 1);
    unregister(uffd, base, BYTES);
    CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.error, 0);
    CHECK_EQ(map_once_more(fd, PROT_READ, MAP_PRIVATE), 0);
}

static void maps_nothing_once_more_that_will_wait(void)
{
    int fd = memory_file(BYTES);

    begin(FEATURES);
    (void)map_at(NULL, fd, BYTES, 0);
    CHECK_EQ(map_once_more(fd, PROT_READ, MAP_SHARED), ENOMEM);
    CHECK_EQ(map_once_more(fd, PROT_READ, MAP_PRIVATE), ENOMEM);
    CHECK_EQ(map_once_more(fd, PROT_READ | PROT_WRITE, MAP_SHARED), 0); /* which is guarded, too */
}

static void disarms_nothing_unseen(void)
{
    struct preload_request request = {.magic = PRELOAD_MAGIC, .version = PRELOAD_VERSION, .op = PRELOAD_DISARM};
    static int taken[4096];
    size_t count = 0, fds;
    struct rlimit limit, less;
    char *base;
    int fd;

    begin(FEATURES);
    base = map_new(BYTES);
    CHECK_EQ(arm(PRELOAD_KEEP, base, BYTES), 1);
    CHECK_SYS(getrlimit(RLIMIT_NOFILE, &limit));
    less = (struct rlimit){.rlim_cur = 2048, .rlim_max = limit.rlim_max};
    CHECK_SYS(setrlimit(RLIMIT_NOFILE, &less));
    fd = CHECK_SYS(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    while ((taken[count] = dup(fd)) >= 0)
        count++;
    CHECK_SYS(close(taken[--count])); /* for the connection, and none for another userfaultfd */
    CHECK_SYS(connect(fd, (struct sockaddr *)&path, sizeof(path)));
    CHECK_EQ(send(fd, &request, offsetof(struct preload_request, ranges), MSG_NOSIGNAL), offsetof(struct preload_request, ranges));
    CHECK(receive(fd, &reply, &fds) > 0);
    CHECK_EQ(reply.error, EMFILE);
    CHECK_EQ(reply.step, PRELOAD_OPEN);
    CHECK_EQ(reply.state, PRELOAD_IS_KEPT);
    while (count)
        CHECK_SYS(close(taken[--count]));
    CHECK_SYS(setrlimit(RLIMIT_NOFILE, &limit));
    CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.step, PRELOAD_GUARDED);
}

/* What waits, waits for the asker alone then; and when nothing does any more, the program may map its files again. */
static void undoes_what_the_program_has_closed(void)
{
    int file = memory_file(BYTES), kept = lowest() - 1;
    char *base, link[32], what[32] = "";

    begin(0);
    base = map_at(NULL, file, BYTES, 0);
    CHECK_EQ(arm(PRELOAD_KEEP, base, BYTES), 1);
    do
        (void)snprintf(link, sizeof(link), "/proc/self/fd/%d", ++kept);
    while (readlink(link, what, sizeof(what) - 1) < 0 || !strstr(what, "userfaultfd"));
    CHECK_SYS(close(kept));
    CHECK_EQ(ask(PRELOAD_TAKE, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.step, PRELOAD_KEPT);
    CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.step, PRELOAD_GUARDED);
    CHECK(preload_mmap(NULL, BYTES, PROT_READ, MAP_SHARED, file, 0) == MAP_FAILED);
    unregister(got[0], base, BYTES);
    CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.error, 0);
    CHECK_EQ(reply.state, 0);
    CHECK(preload_mmap(NULL, BYTES, PROT_READ, MAP_SHARED, file, 0) != MAP_FAILED);
}

/* Nowhere else would it be guarded. */
static void moves_nothing_that_waits(void)
{
    char *base, *room = mmap(NULL, 4 * BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(room != MAP_FAILED);
    begin(FEATURES);
    base = map_new(BYTES);
    CHECK_EQ(arm(PRELOAD_KEEP, base, BYTES), 1);
    CHECK(preload_mremap(base, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, room) == MAP_FAILED && errno == ENOMEM);
    CHECK(preload_mremap(base, BYTES, 2 * BYTES, MREMAP_MAYMOVE, NULL) == MAP_FAILED && errno == ENOMEM);
    CHECK(preload_mremap(base, 0, BYTES, MREMAP_MAYMOVE, NULL) == MAP_FAILED && errno == ENOMEM);
    CHECK(preload_mremap(base, BYTES, BYTES / 2, MREMAP_MAYMOVE, NULL) == base);
    unregister(got[0], base, BYTES / 2);
    CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
    CHECK_EQ(reply.error, 0);
    CHECK(preload_mremap(base, BYTES / 2, BYTES / 2, MREMAP_MAYMOVE | MREMAP_FIXED, room) == room);
}

static void refuses_what_makes_no_sense(void)
{
    static struct {
        struct preload_request request;
        char more[64];
    } sent;
    struct preload_request *request = &sent.request;
    char *base;

    begin(0);
    base = map_new(BYTES);
    for (int i = 0; i < 2000; i++) { /* of any length, right at the beginning or not */
        size_t bytes = 1 + test_below(i % 2 ? 80 : sizeof(sent));

        for (size_t at = 0; at < sizeof(sent); at += 8)
            *(uint64_t *)(void *)((char *)&sent + at) = test_below(3) ? test_random() : 0;
        if (i % 4) {
            request->magic = PRELOAD_MAGIC;
            request->version = PRELOAD_VERSION;
            request->op = (uint16_t)test_below(6);
            request->count = (uint32_t)test_below(4);
            request->flags = (uint32_t)test_below(8);
            if (i % 3)
                bytes = offsetof(struct preload_request, ranges) + request->count * sizeof(request->ranges[0]);
        }
        for (size_t fds = ask_raw(&sent, bytes); fds > 0; fds--)
            CHECK_SYS(close(got[fds - 1]));
        if (reply.state & PRELOAD_IS_KEPT)
            (void)ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0);
    }
    request->magic = PRELOAD_MAGIC;
    request->version = PRELOAD_VERSION + 1;
    CHECK_EQ(ask_raw(&sent, 32), 0);
    CHECK_EQ(reply.error, EPROTONOSUPPORT);
    CHECK_EQ(arm(0, base + PAGE, BYTES), 0);
    CHECK_EQ(reply.step, PRELOAD_RANGE);
    CHECK_EQ(ask(PRELOAD_ARM, PRELOAD_KEEP, FEATURES, 1, base + 1, PAGE), 0);
    CHECK_EQ(reply.step, PRELOAD_REGISTER);
    CHECK_EQ(reply.state, 0);
    CHECK_EQ(ask(PRELOAD_ARM, 0, (uint64_t)1 << 60, 1, base, PAGE), 0);
    CHECK_EQ(reply.step, PRELOAD_FEATURES);
    base[0] = 1;
    CHECK_EQ(list(), 1);
}

static int in_child(void (*run)(void))
{
    pid_t child = CHECK_SYS(fork());
    int status;

    if (!child) {
        run();
        _exit(0);
    }
    CHECK_EQ(waitpid(child, &status, 0), child);
    return status;
}

static void map_only(void)
{
    (void)map_new(BYTES);
}

static void map_and_end(void)
{
    (void)map_new(BYTES);
    preload_end();
}

static void map_and_answer(void)
{
    (void)map_new(BYTES);
    CHECK_EQ(list(), 1);
    preload_end();
    CHECK(access(path.sun_path, F_OK) < 0);
}

static void takes_the_path_of_one_that_has_ended_and_of_nobody_else(void)
{
    int fd = CHECK_SYS(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));

    begin(0);
    CHECK_SYS(bind(fd, (struct sockaddr *)&path, sizeof(path)));
    CHECK_EQ(listen(fd, 1), 0);
    CHECK_EQ(in_child(map_only), 0); /* the other one runs: its socket is its own */
    CHECK_SYS(close(connection()));
    CHECK_SYS(close(fd));
    CHECK_EQ(in_child(map_and_answer), 0); /* it has left its file behind */
    fd = CHECK_SYS(open(path.sun_path, O_CREAT | O_EXCL | O_WRONLY, 0600));
    CHECK_EQ(in_child(map_only), 0);
    CHECK_SYS(access(path.sun_path, F_OK)); /* no socket */
    CHECK_SYS(close(fd));
}

static void outlives_clients_that_say_nothing(void)
{
    struct preload_request request = {.magic = PRELOAD_MAGIC, .version = PRELOAD_VERSION, .op = PRELOAD_LIST};
    int silent, gone;

    begin(0);
    (void)map_new(BYTES);
    for (int i = 0; i < 100; i++) /* that is gone before it is answered */
        for (int part = 0; part < 2; part++) {
            gone = connection();
            if (part)
                (void)send(gone, &request, offsetof(struct preload_request, ranges), MSG_NOSIGNAL);
            CHECK_SYS(close(gone));
        }
    silent = connection(); /* the next one is served when its time is over */
    CHECK_EQ(list(), 1);
    CHECK_SYS(close(silent));
}

static void answers_its_own_user_only(void)
{
    struct preload_request request = {.magic = PRELOAD_MAGIC, .version = PRELOAD_VERSION, .op = PRELOAD_LIST};
    struct stat file;
    pid_t child;
    int status;

    if (geteuid())
        SKIP("root", "another user cannot be tried by this one");
    begin(0);
    (void)umask(0);
    (void)map_new(BYTES);
    CHECK_SYS(stat(path.sun_path, &file));
    CHECK_EQ(file.st_mode & 07777, 0600);
    CHECK_SYS(chmod(path.sun_path, 0666)); /* so that the question itself is asked */
    child = CHECK_SYS(fork());
    if (!child) {
        CHECK(!setuid(65534));
        CHECK_EQ(ask_raw(&request, offsetof(struct preload_request, ranges)), 0);
        CHECK_EQ(reply.error, EACCES);
        CHECK_EQ(reply.step, PRELOAD_PEER);
        _exit(0);
    }
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    CHECK_EQ(list(), 1);
}

/* ---- processes and threads */

static void serves_a_daemon_and_no_child(void)
{
    pid_t child;

    begin(0);
    CHECK_EQ(in_child(map_and_answer), 0); /* which has forked before anything was mapped */
    (void)map_new(BYTES);
    CHECK_EQ(list(), 1);
    CHECK_EQ(in_child(map_and_end), 0); /* it has not what the parent has, and removes nothing */
    CHECK_EQ(list(), 1);
    child = CHECK_SYS((pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL)); /* one that pthread_atfork(3) does not see */
    if (!child) {
        preload_end();
        _exit(0);
    }
    CHECK_EQ(waitpid(child, NULL, 0), child);
    CHECK_EQ(list(), 1);
    preload_end();
    CHECK(access(path.sun_path, F_OK) < 0);
}

static _Atomic bool enough;

static void *map_and_unmap(void *unused)
{
    while (!enough) {
        char *mapped = map_new(4 * PAGE);

        mapped[0] = 1;
        /* The middle first, then what is left: by then another thread may have got the hole. */
        CHECK_SYS(preload_munmap(mapped + 2 * PAGE, PAGE));
        CHECK_SYS(preload_munmap(mapped, 2 * PAGE));
        CHECK_SYS(preload_munmap(mapped + 3 * PAGE, PAGE));
    }
    return unused;
}

static void nothing(void)
{
}

static void *fork_again_and_again(void *unused)
{
    while (!enough)
        CHECK_EQ(in_child(nothing), 0);
    return unused;
}

/* Of a child that pthread_atfork(3) does not see: whoever has the lock in its parent is not there. */
__attribute__((unused)) static void a_child_finds_no_lock_taken(void)
{
    pthread_t thread;

    begin(0);
    (void)map_new(BYTES);
    CHECK(!pthread_create(&thread, NULL, map_and_unmap, NULL));
    for (int i = 0; i < 300; i++) {
        pid_t child = CHECK_SYS((pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL));
        int status;

        if (!child) {
            (void)preload_munmap(preload_mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory_file(PAGE), 0), PAGE);
            _exit(0);
        }
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK_EQ(status, 0);
    }
    enough = true;
    CHECK(!pthread_join(thread, NULL));
    CHECK_EQ(list(), 1);
}

/* An allocator has a lock, which it takes for a fork too, and gives memory back under it: here between what is remembered. */
static pthread_mutex_t allocator = PTHREAD_MUTEX_INITIALIZER;

static void take_allocator(void)
{
    (void)pthread_mutex_lock(&allocator);
}

static void give_allocator(void)
{
    (void)pthread_mutex_unlock(&allocator);
}

static void *allocate(void *at)
{
    while (!enough) {
        take_allocator();
        CHECK_SYS(preload_munmap(at, PAGE));
        CHECK(preload_mmap(at, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
        give_allocator();
    }
    return NULL;
}

static void forks_beside_an_allocator(void)
{
    char *base = mmap(NULL, 64 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_t thread;

    CHECK(!pthread_atfork(take_allocator, give_allocator, give_allocator)); /* whose lock is taken after that of the library */
    begin(0);
    CHECK(base != MAP_FAILED);
    (void)map_at(base, memory_file(BYTES), BYTES, 0);
    (void)map_at(base + 48 * PAGE, memory_file(BYTES), BYTES, 0);
    CHECK(!pthread_create(&thread, NULL, allocate, base + 32 * PAGE));
    for (int i = 0; i < 300; i++)
        CHECK_EQ(in_child(nothing), 0);
    enough = true;
    CHECK(!pthread_join(thread, NULL));
    CHECK_EQ(list(), 2);
}

static void unmap_in_handler(int number)
{
    int error = errno;

    (void)number;
    CHECK_SYS(preload_munmap(map_new(PAGE), PAGE));
    errno = error;
}

static void *signal_again_and_again(void *target)
{
    while (!enough) {
        (void)pthread_kill(*(pthread_t *)target, SIGUSR1);
        (void)poll(NULL, 0, 1);
    }
    return NULL;
}

static void answers_while_the_program_maps_forks_and_is_signalled(void)
{
    void *(*const runs[])(void *) = {map_and_unmap, map_and_unmap, fork_again_and_again, signal_again_and_again};
    pthread_t threads[4];
    char *base;

    begin(0);
    base = map_new(BYTES);
    (void)signal(SIGUSR1, unmap_in_handler);
    for (size_t i = 0; i < 4; i++)
        CHECK(!pthread_create(&threads[i], NULL, runs[i], &threads[0]));
    for (int i = 0; i < 30; i++) {
        size_t fds = ask(PRELOAD_LIST, 0, 0, 0, NULL, 0);

        while (fds)
            CHECK_SYS(close(got[--fds]));
        CHECK_EQ(reply.mappings[0].address, (uint64_t)base);
        while (!arm(i % 2 ? PRELOAD_KEEP : 0, base, BYTES)) /* a child of ours may still have the last one of the asker's */
            CHECK(reply.error == EBUSY && reply.step == PRELOAD_REGISTER);
        if (i % 2)
            unregister(got[0], base, BYTES);
        CHECK_SYS(close(got[0]));
        if (i % 2)
            CHECK_EQ(ask(PRELOAD_DISARM, 0, 0, 0, NULL, 0), 0);
        CHECK_EQ(reply.error, 0);
    }
    enough = true;
    for (size_t i = 4; i-- > 0;) /* first the one that signals another: none may be joined before */
        CHECK(!pthread_join(threads[i], NULL));
    CHECK_EQ(list(), 1);
}

/* TSan gives a thread that still runs at the end, as the library's does, a second for more reports: for each case. */
__attribute__((visibility("default"))) const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "atexit_sleep_ms=0";
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    (void)snprintf(path.sun_path, sizeof(path.sun_path), "/tmp/pc-preload-%d.sock", (int)getpid());
    RUN(remembers_shared_writable_mappings_of_files_in_memory);
    RUN(forgets_what_is_unmapped);
    RUN(forgets_nothing_that_stays);
    RUN(keeps_no_file_that_is_unmapped);
    RUN(says_that_there_are_more_than_it_knows);
    RUN(takes_no_descriptor_of_the_program_for_its_own);
    RUN(guards_and_undoes_it);
    RUN(keeps_a_copy_until_it_is_disarmed);
    RUN(guards_from_the_first_touch_on);
    RUN(guards_what_was_populated);
    RUN(undoes_what_the_program_has_closed);
    RUN(moves_nothing_that_waits);
    RUN(maps_nothing_once_more_that_waits);
    RUN(maps_nothing_once_more_that_will_wait);
    RUN(disarms_nothing_unseen);
    RUN(refuses_what_makes_no_sense);
    RUN(takes_the_path_of_one_that_has_ended_and_of_nobody_else);
    RUN(outlives_clients_that_say_nothing);
    RUN(answers_its_own_user_only);
    RUN(serves_a_daemon_and_no_child);
#ifndef __SANITIZE_THREAD__ /* which takes such a child for a thread */
    RUN(a_child_finds_no_lock_taken);
#endif
    RUN(forks_beside_an_allocator);
    RUN(answers_while_the_program_maps_forks_and_is_signalled);
    (void)unlink(path.sun_path);
    return test_end();
}
