/* SPDX-License-Identifier: Apache-2.0
 *
 * The smallest userfaultfd handler for Firecracker that is right, to read; and, with --defect, one that is wrong in one way, for the
 * tests of `postcopy conformance`.
 *
 * A thread for each client reads its events, another one reads the image and places pages. The *gate*, a lock, makes it right: the
 * first takes it before it reads events and until every REMOVE has been applied; the second takes it around "decide and COPY". So no
 * page is placed by a decision that was made before a REMOVE. COPY that says EAGAIN is decided again a little later.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
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
#include <dirent.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "uffd/uffd_abi.h"

#define MESSAGE_BYTES 65536
#define MAX_REGIONS 16
#define MAX_FDS 4
#define EVENTS 64
#define HUGE_BYTES ((uint64_t)2 << 20)
#define SILENT_S 5 /* from a connection to its whole message */

/* Each is one mistake; docs/conformance.md says who made it. */
static const char *const defect_names[] = {
    "none",           "write-ignored",   "wp-copied",       "minor-ignored",   "page-size-kib",      "ends-at-eof",
    "close-is-death", "no-fd-waits",     "two-fds",         "zero-size",       "overlap",            "beyond-image",
    "garbage-waits",  "silent-blocks",   "connection-kept", "any-uid",         "one-base",           "unclipped",
    "huge-small",     "huge-zeropage",   "address-exact",   "small-table",     "repeat-fatal",       "eexist-asleep",
    "run-repeated",   "copy-cast",       "spins-unread",    "waits-for-event", "gives-up",           "prefetch-marks",
    "placed-kept",    "missing-kept",    "batch-order",     "in-flight",       "old-decision",       "rounded-out",
    "quadratic",      "reads-inline",    "removes-lost",    "enoent-asleep",   "death-ignored",      "kills-pid",
    "takeover-asleep", "end-unregisters", "timeout-zeros",   "error-zeros",     "mapped-image",       "pollerr-ends",
    "eagain-ends",    "idle-ends",       "limited",         "serial",          "complete-ends",      "wp-forgotten",
    "own-uid-only",   "fork-kept",       "remap-ignored",   "not-uffd",        "unmap-ends",         "drips-kept",
};
enum defect {
    NONE, WRITE_IGNORED, WP_COPIED, MINOR_IGNORED, PAGE_SIZE_KIB, ENDS_AT_EOF,
    CLOSE_IS_DEATH, NO_FD_WAITS, TWO_FDS, ZERO_SIZE, OVERLAP, BEYOND_IMAGE,
    GARBAGE_WAITS, SILENT_BLOCKS, CONNECTION_KEPT, ANY_UID, ONE_BASE, UNCLIPPED,
    HUGE_SMALL, HUGE_ZEROPAGE, ADDRESS_EXACT, SMALL_TABLE, REPEAT_FATAL, EEXIST_ASLEEP,
    RUN_REPEATED, COPY_CAST, SPINS_UNREAD, WAITS_FOR_EVENT, GIVES_UP, PREFETCH_MARKS,
    PLACED_KEPT, MISSING_KEPT, BATCH_ORDER, IN_FLIGHT, OLD_DECISION, ROUNDED_OUT,
    QUADRATIC, READS_INLINE, REMOVES_LOST, ENOENT_ASLEEP, DEATH_IGNORED, KILLS_PID,
    TAKEOVER_ASLEEP, END_UNREGISTERS, TIMEOUT_ZEROS, ERROR_ZEROS, MAPPED_IMAGE, POLLERR_ENDS,
    EAGAIN_ENDS, IDLE_ENDS, LIMITED, SERIAL, COMPLETE_ENDS, WP_FORGOTTEN,
    OWN_UID_ONLY, FORK_KEPT, REMAP_IGNORED, NOT_UFFD, UNMAP_ENDS, DRIPS_KEPT,
    DEFECTS
};
_Static_assert(sizeof(defect_names) / sizeof(defect_names[0]) == DEFECTS, "a name for each defect");

enum state { QUEUED = 1, PLACED = 2, REMOVED = 4, FORCED = 8 }; /* of a page; FORCED is a defect's */

struct region {
    uint64_t base;
    uint64_t size;
    uint64_t offset;
    uint64_t page;
};

/* What a successor needs: at the start of a file, with a byte for each page of the image behind it. Events are read into it, so that
 * those which were read and not applied when this process was killed are applied by the successor. */
struct kept {
    int32_t pid;
    uint32_t regions;
    uint64_t start_time; /* of the process: its pid may be another's by now */
    struct region region[MAX_REGIONS];
    struct uffd_msg events[EVENTS];
    uint8_t state[];
};

struct client {
    int uffd;
    int connection; /* -1 after a takeover */
    int pidfd;
    int number;
    bool ending;
    bool write_protect;
    uint64_t page;
    uint64_t pages; /* of the image */
    struct kept *kept;
    uint64_t kept_bytes;
    char kept_path[PATH_MAX];
    pthread_mutex_t gate;
    atomic_bool waiting; /* the placer, for the gate: in a flood of events it would hardly ever get it */
    pthread_cond_t work;
    uint32_t *queue; /* page numbers, each at most once: QUEUED */
    uint64_t head;
    uint64_t tail;
    uint8_t *buffer; /* a window of pages */
    uint8_t *zeros;
    pthread_t placer;
    /* for defects */
    uint64_t placed;
    uint64_t deferred_us;
    uint64_t tries;
    bool deferred;
    bool decided_zero;
    int64_t reading; /* page that is being read, or -1 */
    struct timespec since; /* it is read */
    struct timespec deferred_since;
    uint64_t removes;
};

static enum defect defect;
static int image_fd;
static uint64_t image_bytes;
static const uint8_t *image_map;
static uint64_t around = 16;
static bool write_protect;
static const char *state_dir;
static uid_t allowed_uid = (uid_t)-1;
static struct client *clients[256];
static pthread_mutex_t clients_lock = PTHREAD_MUTEX_INITIALIZER;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...)
{
    va_list arguments;
    char text[512];

    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    dprintf(2, "handler: %s\n", text);
}

/* ---- the message */

struct json {
    const char *at;
    const char *end;
    bool bad;
};

static char peek(struct json *json)
{
    while (json->at < json->end && strchr(" \t\r\n", *json->at))
        json->at++;
    return json->at < json->end ? *json->at : '\0';
}

static bool take(struct json *json, char expected)
{
    if (peek(json) != expected)
        return false;
    json->at++;
    return true;
}

static void take_string(struct json *json, char *out, size_t bytes)
{
    size_t length = 0;

    json->bad |= !take(json, '"');
    while (!json->bad && json->at < json->end && *json->at != '"') {
        if (*json->at == '\\' && ++json->at == json->end)
            break;
        if (length + 1 < bytes)
            out[length++] = *json->at;
        json->at++;
    }
    out[length] = '\0';
    json->bad |= json->at == json->end;
    json->at += !json->bad;
}

static uint64_t take_number(struct json *json)
{
    uint64_t number = 0;

    json->bad |= peek(json) < '0' || peek(json) > '9';
    while (!json->bad && json->at < json->end && *json->at >= '0' && *json->at <= '9') {
        json->bad |= __builtin_mul_overflow(number, (uint64_t)10, &number);
        json->bad |= __builtin_add_overflow(number, (uint64_t)(*json->at++ - '0'), &number);
    }
    return number;
}

static void skip(struct json *json, int depth)
{
    char text[2];
    char open = peek(json);

    if (depth > 16 || !open) {
        json->bad = true;
    } else if (open == '"') {
        take_string(json, text, sizeof(text));
    } else if (open == '[' || open == '{') {
        json->at++;
        while (!json->bad && peek(json) != (open == '[' ? ']' : '}')) {
            skip(json, depth + 1);
            if (!take(json, ':') && !take(json, ','))
                break;
        }
        json->bad |= !take(json, open == '[' ? ']' : '}');
    } else {
        while (json->at < json->end && !strchr(",:]} \t\r\n", *json->at))
            json->at++;
    }
}

static const char *parse(const char *text, size_t bytes, struct kept *kept)
{
    struct json json = {text, text + bytes, false};

    kept->regions = 0;
    json.bad = !take(&json, '[');
    while (!json.bad && take(&json, '{')) {
        struct region *region = &kept->region[kept->regions];
        uint64_t size_said = 0, kib_said = 0;
        unsigned seen = 0;

        if (kept->regions++ == MAX_REGIONS)
            return "too many regions";
        while (!json.bad && peek(&json) != '}') {
            char key[32];

            take_string(&json, key, sizeof(key));
            json.bad |= !take(&json, ':');
            if (!strcmp(key, "base_host_virt_addr"))
                region->base = take_number(&json), seen |= 1;
            else if (!strcmp(key, "size"))
                region->size = take_number(&json), seen |= 2;
            else if (!strcmp(key, "offset"))
                region->offset = take_number(&json), seen |= 4;
            else if (!strcmp(key, "page_size"))
                size_said = take_number(&json);
            else if (!strcmp(key, "page_size_kib")) /* bytes: the name is Firecracker's mistake */
                kib_said = take_number(&json);
            else
                skip(&json, 0);
            if (!take(&json, ','))
                break;
        }
        json.bad |= !take(&json, '}') || seen != 7;
        region->page = size_said ? size_said : kib_said ? kib_said : 4096;
        if (defect == PAGE_SIZE_KIB && !size_said && kib_said)
            region->page = kib_said * 1024;
        if (!take(&json, ','))
            break;
    }
    json.bad |= !take(&json, ']') || peek(&json);
    return json.bad ? "this is not an array of memory regions" : !kept->regions ? "there is no memory region" : NULL;
}

static bool overlap(uint64_t a, uint64_t b, const struct region *x, const struct region *y)
{
    return a < b + y->size && b < a + x->size;
}

static const char *check(const struct kept *kept)
{
    for (uint32_t i = 0; i < kept->regions; i++) {
        const struct region *region = &kept->region[i];
        uint64_t end;

        if (!region->size && defect != ZERO_SIZE)
            return "a region of size 0";
        if (defect == PAGE_SIZE_KIB && region->page > HUGE_BYTES)
            continue;
        if (region->page != 4096 && region->page != HUGE_BYTES)
            return "a page size that is neither 4 KiB nor 2 MiB";
        if (region->page != kept->region[0].page)
            return "regions of different page sizes";
        if ((region->base | region->size | region->offset) % region->page)
            return "a region that is not aligned to its pages";
        if (__builtin_add_overflow(region->base, region->size, &end) ||
            __builtin_add_overflow(region->offset, region->size, &end))
            return "a region that ends beyond all addresses";
        if (end > image_bytes && defect != BEYOND_IMAGE)
            return "more memory than the image has";
        for (uint32_t j = 0; j < i && defect != OVERLAP; j++)
            if (overlap(region->base, kept->region[j].base, region, &kept->region[j]) ||
                overlap(region->offset, kept->region[j].offset, region, &kept->region[j]))
                return "regions that overlap";
    }
    return NULL;
}

static bool is_userfaultfd(int dir, const char *name)
{
    char target[64];
    ssize_t length = readlinkat(dir, name, target, sizeof(target) - 1);

    target[length < 0 ? 0 : length] = '\0';
    return !strcmp(target, "anon_inode:[userfaultfd]");
}

static int64_t milliseconds_since(const struct timespec *then)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - then->tv_sec) * 1000 + (now.tv_nsec - then->tv_nsec) / 1000000;
}

/* Reads the message and its descriptor. 1: a client; 0: gone without a message; -1: refused, which has been said. */
static int receive(int connection, struct kept *kept, int *uffd)
{
    static __thread char text[MESSAGE_BYTES];
    const char *wrong = NULL;
    size_t bytes = 0;
    int fds[MAX_FDS], count = 0;
    struct timespec began;
    char path[32];

    clock_gettime(CLOCK_MONOTONIC, &began);
    for (;;) {
        char control[CMSG_SPACE(sizeof(fds))];
        struct iovec iov = {text + bytes, sizeof(text) - bytes};
        struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
        ssize_t got = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);

        if (got == 0 && !bytes && !count)
            return 0;
        if (got <= 0) {
            wrong = got < 0 ? "no message came in time" : "the message has no end";
            break;
        }
        for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
            int here = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));

            for (int i = 0; header->cmsg_type == SCM_RIGHTS && i < here; i++) {
                int fd;

                memcpy(&fd, CMSG_DATA(header) + (size_t)i * sizeof(int), sizeof(int));
                if (count < MAX_FDS)
                    fds[count++] = fd;
                else
                    close(fd);
            }
        }
        if (message.msg_flags & MSG_CTRUNC)
            wrong = "more descriptors than there should be";
        bytes += (size_t)got;
        wrong = wrong ? wrong : parse(text, bytes, kept);
        if (!wrong || bytes == sizeof(text) || text[bytes - 1] == ']' || text[0] != '[')
            break;
        if (milliseconds_since(&began) > SILENT_S * 1000 && defect != DRIPS_KEPT) /* said byte by byte */
            break;
        wrong = NULL;
    }
    if (!wrong && count == 0 && defect == NO_FD_WAITS)
        for (;;)
            pause();
    if (wrong && bytes && defect == GARBAGE_WAITS)
        for (;;)
            pause();
    if (!wrong && (count == 0 || (count > 1 && defect != TWO_FDS)))
        wrong = count ? "more than one descriptor with the message" : "no descriptor with the message";
    if (!wrong)
        wrong = check(kept);
    if (!wrong) {
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fds[0]);
        if (!is_userfaultfd(AT_FDCWD, path) && defect != NOT_UFFD)
            wrong = "a descriptor that is no userfaultfd";
    }
    if (!wrong) {
        *uffd = fds[0];
        return 1;
    }
    for (int i = 0; i < count; i++)
        close(fds[i]);
    say("refused: %s", wrong);
    return -1;
}

/* ---- placing */

static const struct region *region_of_page(const struct client *client, uint64_t number)
{
    for (uint32_t i = 0; i < client->kept->regions; i++) {
        const struct region *region = &client->kept->region[i];

        if (number * client->page - region->offset < region->size && number * client->page >= region->offset)
            return region;
    }
    return NULL;
}

static uint64_t address_of(const struct region *region, const struct client *client, uint64_t number)
{
    return region->base + (number * client->page - region->offset);
}

/* The page of an address, or -1. */
static int64_t page_at(const struct client *client, uint64_t address)
{
    const struct kept *kept = client->kept;

    if (defect == ONE_BASE) {
        uint64_t lowest = UINT64_MAX;

        for (uint32_t i = 0; i < kept->regions; i++)
            lowest = kept->region[i].base < lowest ? kept->region[i].base : lowest;
        return address < lowest || address - lowest >= image_bytes ? -1 : (int64_t)((address - lowest) / client->page);
    }
    for (uint32_t i = 0; i < kept->regions; i++)
        if (address >= kept->region[i].base && address - kept->region[i].base < kept->region[i].size)
            return (int64_t)((address - kept->region[i].base + kept->region[i].offset) / client->page);
    return -1;
}

static void wake(const struct client *client, uint64_t address, uint64_t bytes)
{
    struct uffdio_range range = {address, bytes};

    ioctl(client->uffd, UFFDIO_WAKE, &range);
}

static void protect(const struct client *client, uint64_t address, uint64_t bytes)
{
    struct uffdio_writeprotect range = {{address, bytes}, UFFDIO_WRITEPROTECT_MODE_WP};

    ioctl(client->uffd, UFFDIO_WRITEPROTECT, &range);
}

static int fill(const struct client *client, uint64_t address, const void *source, uint64_t bytes, uint64_t *done)
{
    int error;

    if (!source && (client->page == 4096 || defect == HUGE_ZEROPAGE)) {
        struct uffdio_zeropage zero = {{address, bytes}, 0, 0};

        error = ioctl(client->uffd, UFFDIO_ZEROPAGE, &zero) < 0 ? errno : 0;
        *done = zero.zeropage > 0 ? (uint64_t)zero.zeropage : 0;
        if (*done && client->write_protect)
            protect(client, address, *done);
        return error;
    }
    struct uffdio_copy copy = {address, (uint64_t)(uintptr_t)(source ? source : client->zeros), bytes,
                               client->write_protect ? UFFDIO_COPY_MODE_WP : 0, 0};

    error = ioctl(client->uffd, UFFDIO_COPY, &copy) < 0 ? errno : 0;
    *done = defect == COPY_CAST && copy.copy == -EEXIST ? (uint64_t)copy.copy : copy.copy > 0 ? (uint64_t)copy.copy : 0;
    return error;
}

/* Places a run and tells how it ended: 0, EAGAIN, ENOENT, ESRCH or another errno. Holds the gate. */
static int place_run(struct client *client, const struct region *region, uint64_t first, uint64_t pages, const uint8_t *source)
{
    uint64_t address = address_of(region, client, first), left = pages * client->page;

    if (defect == HUGE_SMALL && client->page == HUGE_BYTES)
        left = 4096;
    while (left) {
        uint64_t done = 0;
        int error = fill(client, address, source, left, &done);

        if (defect == COPY_CAST && error == EEXIST) {
            client->placed += done / client->page; /* -17 as a number of pages */
            done = 0;
        }
        if (defect == RUN_REPEATED && ((error == EAGAIN && done) || (error == EEXIST && left > client->page))) {
            usleep(100);
            continue;
        }
        for (uint64_t i = 0; i < done / client->page; i++)
            client->kept->state[first + i] |= PLACED;
        client->placed += done / client->page;
        if (!error || (client->page == HUGE_BYTES && defect == HUGE_SMALL && error != EINVAL))
            return 0;
        if (defect == SPINS_UNREAD && error == EAGAIN && !done)
            continue;
        if (error == EEXIST) { /* who placed it has woken nobody for us */
            if (client->write_protect && defect != WP_FORGOTTEN)
                protect(client, address, client->page);
            if (defect != EEXIST_ASLEEP)
                wake(client, address, client->page);
            client->kept->state[first] |= PLACED;
            done = client->page;
        } else if (error != EAGAIN || !done) {
            return error;
        }
        first += done / client->page;
        address += done;
        source += source ? done : 0;
        left -= done;
    }
    return 0;
}

/* Reads pages of the image; false when that fails, which has been said. Takes as long as it takes: the gate is not held. */
static bool read_image(uint64_t first, uint64_t pages, uint64_t page_bytes, uint8_t *out)
{
    uint64_t offset = first * page_bytes, bytes = pages * page_bytes;

    if (defect == MAPPED_IMAGE) {
        memcpy(out, image_map + offset, bytes);
        return true;
    }
    while (bytes) {
        ssize_t got = pread(image_fd, out, bytes, (off_t)offset);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            say("cannot read the image at %llu: %s", (unsigned long long)offset, got ? strerror(errno) : "it has become shorter");
            return false;
        }
        out += got;
        offset += (uint64_t)got;
        bytes -= (uint64_t)got;
    }
    return true;
}

static void lock_for_placer(struct client *client)
{
    atomic_store(&client->waiting, true);
    pthread_mutex_lock(&client->gate);
    atomic_store(&client->waiting, false);
}

/* One fault: the pages around it, as far as they are of its region, missing and not removed; zeros where it was removed. */
static int place(struct client *client, uint64_t number)
{
    const struct region *region = region_of_page(client, number);
    uint8_t *state = client->kept->state;
    uint64_t window = client->page == 4096 ? around : 1, first, end, low, high;
    bool removed, readable = true;
    int error = 0, worst = 0;

    if (!region)
        return ENOENT;
    low = region->offset / client->page;
    high = (region->offset + region->size) / client->page;
    first = address_of(region, client, number) / client->page / window * window; /* aligned by address */
    end = first + window - region->base / client->page + low;
    first = first < region->base / client->page ? low : first - region->base / client->page + low;
    if (defect == UNCLIPPED)
        high = end < client->pages ? end : client->pages;
    end = end > high ? high : end;
    removed = state[number] & REMOVED && !(state[number] & FORCED);
    if (defect == OLD_DECISION && client->deferred)
        removed = client->decided_zero;
    client->decided_zero = removed;
    if (!removed) {
        client->reading = (int64_t)number;
        clock_gettime(CLOCK_MONOTONIC, &client->since);
        pthread_mutex_unlock(&client->gate);
        readable = read_image(first, end - first, client->page, client->buffer);
        if (!readable && end - first > 1) /* what is beside the page is not asked for */
            readable = read_image(number, 1, client->page, client->buffer + (number - first) * client->page);
        lock_for_placer(client);
        client->reading = -1;
        if (!readable && defect == ERROR_ZEROS)
            removed = true;
        else if (defect != IN_FLIGHT && defect != OLD_DECISION && !(state[number] & FORCED))
            removed = state[number] & REMOVED; /* meanwhile */
    }
    if (removed)
        return place_run(client, region, number, 1, NULL);
    if (!readable)
        return EIO;
    if (defect == UNCLIPPED)
        return place_run(client, region, first, end - first, client->buffer);
    for (uint64_t i = defect == PREFETCH_MARKS ? first : end; i < end; i++) {
        if (i != number && !(state[i] & (REMOVED | PLACED)))
            place_run(client, region, i, 1, client->buffer + (i - first) * client->page);
        state[i] |= i != number ? PLACED : 0;
    }
    for (uint64_t i = first; i < end; i++) {
        uint64_t run = i;

        while (run < end && (run == number || !(state[run] & (REMOVED | PLACED))))
            run++;
        if (run > i)
            error = place_run(client, region, i, run - i, client->buffer + (i - first) * client->page);
        if (error && (worst == 0 || error == EAGAIN || error == ESRCH))
            worst = error;
        i = run > i ? run - 1 : i;
    }
    if (worst == ENOENT) /* a part of the run has left this userfaultfd, perhaps not the page itself */
        worst = place_run(client, region, number, 1, client->buffer + (number - first) * client->page);
    return worst;
}

static void end_client(struct client *client)
{
    client->ending = true;
    pthread_cond_signal(&client->work);
    if (client->connection >= 0)
        shutdown(client->connection, SHUT_RDWR);
}

static void finish(struct client *client, uint64_t number, int error)
{
    const struct region *region = region_of_page(client, number);
    uint8_t *state = client->kept->state;

    state[number] &= (uint8_t) ~(QUEUED | FORCED);
    if (error == ENOENT) { /* unmapped, or no more of this userfaultfd: the waiter has to look again */
        if (region && defect != ENOENT_ASLEEP)
            wake(client, address_of(region, client, number), client->page);
    } else if (error == ESRCH) {
        if (defect != DEATH_IGNORED)
            client->ending = true;
    } else if (error) {
        say("page %llu of process %d waits for ever: %s", (unsigned long long)number, client->kept->pid, strerror(error));
    }
}

static bool read_events(struct client *client);

/* Takes the pages from the queue. */
static void *placer(void *argument)
{
    struct client *client = argument;

    pthread_mutex_lock(&client->gate);
    while (!client->ending) {
        uint64_t number;
        int error;

        if (client->head == client->tail) {
            pthread_cond_wait(&client->work, &client->gate);
            continue;
        }
        number = client->queue[client->head % client->pages];
        if (defect == PREFETCH_MARKS && client->kept->state[number] & PLACED) {
            client->head++;
            client->kept->state[number] &= (uint8_t)~QUEUED;
            wake(client, address_of(region_of_page(client, number), client, number), client->page);
            continue;
        }
        error = place(client, number);
        if (error == EAGAIN) { /* a REMOVE is under way: decide again when it has been applied */
            const uint64_t wait_us = client->deferred_us < 20 ? 20 : client->deferred_us < 2000 ? client->deferred_us : 2000;
            struct timespec pause = {0, (long)wait_us * 1000};

            client->deferred = true;
            client->deferred_us += wait_us;
            if (client->deferred_us == wait_us)
                clock_gettime(CLOCK_MONOTONIC, &client->deferred_since);
            if (defect != GIVES_UP || milliseconds_since(&client->deferred_since) < 200) {
                if (defect == WAITS_FOR_EVENT) {
                    pthread_cond_wait(&client->work, &client->gate);
                    continue;
                }
                if (client->tries++ < 64) { /* in a flood there are only moments without a REMOVE: read, and be there */
                    read_events(client);
                    continue;
                }
                pthread_mutex_unlock(&client->gate);
                nanosleep(&pause, NULL);
                lock_for_placer(client);
                continue;
            }
        }
        client->deferred = false;
        client->deferred_us = 0;
        client->tries = 0;
        client->head++;
        finish(client, number, error);
        if ((defect == COPY_CAST || defect == COMPLETE_ENDS) && client->placed >= image_bytes / client->page)
            break;
        if (defect == LIMITED && client->placed >= 12000)
            break;
    }
    pthread_mutex_unlock(&client->gate);
    return NULL;
}

/* ---- events */

static void enqueue(struct client *client, uint64_t number)
{
    uint8_t *state = &client->kept->state[number];

    if (*state & QUEUED) {
        if (defect == REPEAT_FATAL)
            end_client(client);
        return;
    }
    if (defect == SMALL_TABLE && client->tail - client->head >= 4)
        return;
    *state |= QUEUED;
    client->queue[client->tail++ % client->pages] = (uint32_t)number;
    pthread_cond_signal(&client->work);
}

static void remove_range(struct client *client, uint64_t start, uint64_t end)
{
    struct kept *kept = client->kept;

    if (defect == ROUNDED_OUT) {
        start = start / HUGE_BYTES * HUGE_BYTES;
        end = (end + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    }
    for (uint32_t i = 0; i < kept->regions; i++) {
        const struct region *region = &kept->region[i];
        uint64_t from = start > region->base ? start : region->base;
        uint64_t to = end < region->base + region->size ? end : region->base + region->size;

        if (from >= to)
            continue;
        from = (from - region->base + region->offset + client->page - 1) / client->page; /* only whole pages */
        to = (to - region->base + region->offset) / client->page;
        for (; from < to; from++) {
            uint8_t *state = &kept->state[from];

            if ((defect == PLACED_KEPT && *state & PLACED) || (defect == MISSING_KEPT && !(*state & PLACED)))
                *state &= (uint8_t)~PLACED;
            else
                *state = (uint8_t)((*state & ~PLACED) | REMOVED);
        }
    }
    if (defect == QUADRATIC) /* a list of ranges that is walked and joined from its start, again and again */
        for (volatile uint64_t i = 0, n = ++client->removes * 60; i < n; i++)
            ;
}

/* True for a page fault that has to be answered by placing. */
static bool is_missing(struct client *client, const struct uffd_msg *event, uint64_t address)
{
    const uint64_t flags = event->arg.pagefault.flags;

    if (flags & UFFD_PAGEFAULT_FLAG_WP && defect != WP_COPIED) {
        struct uffdio_writeprotect range = {{address, client->page}, 0};

        ioctl(client->uffd, UFFDIO_WRITEPROTECT, &range);
        return false;
    }
    if (flags & UFFD_PAGEFAULT_FLAG_MINOR) {
        if (defect != MINOR_IGNORED) {
            say("process %d has minor faults, which nobody asked for: it is given up", client->kept->pid);
            end_client(client);
        }
        return false;
    }
    return !(flags & UFFD_PAGEFAULT_FLAG_WRITE && defect == WRITE_IGNORED);
}

static void apply(struct client *client, const struct uffd_msg *event, bool with_remove)
{
    uint64_t address = event->arg.pagefault.address;
    int64_t number;

    switch (event->event) {
    case UFFD_EVENT_PAGEFAULT:
        if (defect != ADDRESS_EXACT)
            address -= address % client->page;
        else if (address % client->page)
            return; /* EINVAL */
        number = page_at(client, address);
        if (!is_missing(client, event, address))
            return;
        if (number < 0) {
            say("a fault outside of all regions");
            return;
        }
        if (with_remove && defect == BATCH_ORDER)
            client->kept->state[number] |= FORCED;
        enqueue(client, (uint64_t)number);
        break;
    case UFFD_EVENT_REMOVE:
        remove_range(client, event->arg.remove.start, event->arg.remove.end);
        break;
    case UFFD_EVENT_UNMAP: /* who waits there has to look again; COPY there says ENOENT */
        if (defect == UNMAP_ENDS)
            end_client(client);
        break;
    case UFFD_EVENT_FORK:
        if (defect != FORK_KEPT)
            close((int)event->arg.fork.ufd);
        break;
    default:
        if (event->event == UFFD_EVENT_REMAP && defect == REMAP_IGNORED)
            break;
        say("process %d moves its memory, or does something unknown (event %u): it is given up", client->kept->pid, event->event);
        end_client(client);
    }
}

/* All that can be read, at most a few hundred: a flood must not keep the placer from its turn. */
static bool read_events(struct client *client)
{
    struct uffd_msg *events = client->kept->events;

    for (int turn = 0; turn < 8; turn++) {
        bool with_remove = false;
        ssize_t bytes;
        size_t count;

        memset(events, 0, sizeof(client->kept->events));
        bytes = read(client->uffd, events, sizeof(client->kept->events));
        if (bytes < 0)
            return errno == EAGAIN ? turn > 0 || defect != EAGAIN_ENDS : errno == EINTR;
        count = (size_t)bytes / sizeof(events[0]);
        for (size_t i = 0; i < count; i++)
            with_remove |= events[i].event == UFFD_EVENT_REMOVE;
        for (size_t i = 0; i < count; i++)
            if (events[i].event != UFFD_EVENT_PAGEFAULT)
                apply(client, &events[i], with_remove);
        for (size_t i = 0; i < count; i++)
            if (events[i].event == UFFD_EVENT_PAGEFAULT)
                apply(client, &events[i], with_remove);
        if (count < EVENTS)
            break;
    }
    memset(events, 0, sizeof(client->kept->events));
    if (defect == READS_INLINE) {
        while (client->head != client->tail) {
            uint64_t number = client->queue[client->head % client->pages];
            int error = place(client, number);

            if (error == EAGAIN)
                break;
            client->head++;
            finish(client, number, error);
        }
    }
    if (defect == WAITS_FOR_EVENT)
        pthread_cond_signal(&client->work);
    return true;
}

/* Kills what has the pid of a client that has ended. */
static void kill_by_pid(int32_t pid)
{
    for (int i = 0; i < 300 && kill(pid, 0) < 0; i++)
        usleep(10000);
    kill(pid, SIGKILL);
}

/* Until the client has ended. */
static void serve(struct client *client)
{
    pthread_mutex_init(&client->gate, NULL);
    pthread_cond_init(&client->work, NULL);
    client->reading = -1;
    if (defect != READS_INLINE)
        pthread_create(&client->placer, NULL, placer, client);
    while (!client->ending) {
        struct pollfd fds[] = {
            {client->uffd, POLLIN, 0},
            {defect == DEATH_IGNORED ? -1 : client->pidfd, POLLIN, 0},
            {defect == CLOSE_IS_DEATH ? client->connection : -1, POLLRDHUP, 0},
        };
        int timeout_ms = defect == IDLE_ENDS ? 1500 : defect == TIMEOUT_ZEROS || defect == READS_INLINE ? 20 : -1;
        int ready = poll(fds, 3, timeout_ms);

        if (fds[1].revents || fds[2].revents || (ready == 0 && defect == IDLE_ENDS))
            break;
        if (fds[0].revents & POLLERR) { /* not O_NONBLOCK: the flag is shared with the client, who has cleared it */
            if (defect == POLLERR_ENDS)
                break;
            fcntl(client->uffd, F_SETFL, fcntl(client->uffd, F_GETFL) | O_NONBLOCK);
        }
        if (defect == EAGAIN_ENDS)
            usleep(100);
        while (atomic_load(&client->waiting))
            sched_yield();
        pthread_mutex_lock(&client->gate);
        if (!read_events(client))
            client->ending = true;
        if (defect == TIMEOUT_ZEROS && client->reading >= 0) {
            uint64_t done;

            if (milliseconds_since(&client->since) > 1000) {
                const struct region *region = region_of_page(client, (uint64_t)client->reading);

                fill(client, address_of(region, client, (uint64_t)client->reading), NULL, client->page, &done);
            }
        }
        pthread_mutex_unlock(&client->gate);
    }
    pthread_mutex_lock(&client->gate);
    end_client(client);
    pthread_mutex_unlock(&client->gate);
    if (defect != READS_INLINE)
        pthread_join(client->placer, NULL);
    if (defect == KILLS_PID)
        kill_by_pid(client->kept->pid);
}

/* ---- clients */

static uint64_t start_time_of(int32_t pid)
{
    char path[64], text[1024], *at;
    unsigned long long time = 0;
    ssize_t bytes;
    int fd;

    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    bytes = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
    if (fd >= 0)
        close(fd);
    if (bytes <= 0)
        return 0;
    text[bytes] = '\0';
    at = strrchr(text, ')');
    for (int i = 0; at && i < 20; i++)
        at = strchr(at + 1, ' ');
    if (at)
        sscanf(at, " %llu", &time);
    return time;
}

static bool add_client(struct client *client)
{
    bool room = false;

    pthread_mutex_lock(&clients_lock);
    for (int i = 0; i < 256 && !room; i++)
        if (!clients[i]) {
            clients[i] = client;
            client->number = i;
            room = true;
        }
    pthread_mutex_unlock(&clients_lock);
    return room;
}

static void close_if(int fd)
{
    if (fd >= 0)
        close(fd);
}

/* `kept` may be NULL: as after `receive`. Frees all there is. */
static void run_client(struct client *client)
{
    const uint64_t window = client->page == 4096 ? around : 1;

    client->buffer = malloc(window * client->page);
    client->zeros = calloc(1, client->page);
    client->queue = malloc(client->pages * sizeof(uint32_t));
    if (client->buffer && client->zeros && client->queue && add_client(client)) {
        serve(client);
        pthread_mutex_lock(&clients_lock);
        clients[client->number] = NULL;
        pthread_mutex_unlock(&clients_lock);
    }
    if (client->kept_path[0])
        unlink(client->kept_path);
    munmap(client->kept, client->kept_bytes);
    close(client->uffd);
    close_if(client->connection);
    close_if(client->pidfd);
    free(client->buffer);
    free(client->zeros);
    free(client->queue);
    free(client);
}

static struct kept *map_kept(const char *path, uint64_t bytes, int flags)
{
    struct kept *kept;
    int fd = open(path, O_RDWR | O_CLOEXEC | flags, 0600);

    if (fd < 0)
        return NULL;
    kept = ftruncate(fd, (off_t)bytes) < 0 ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return kept == MAP_FAILED ? NULL : kept;
}

static void *connected(void *argument)
{
    struct timeval patience = {SILENT_S, 0};
    struct client *client = calloc(1, sizeof(*client));
    struct ucred peer;
    socklen_t length = sizeof(peer);
    struct kept message;
    int connection = (int)(intptr_t)argument, got;

    if (defect != SILENT_BLOCKS)
        setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    if (!client || getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0)
        goto refused;
    if (defect != ANY_UID && peer.uid != geteuid() && (peer.uid != allowed_uid || defect == OWN_UID_ONLY)) {
        say("refused: a process of user %u", peer.uid);
        goto refused;
    }
    memset(&message, 0, sizeof(message));
    got = receive(connection, &message, &client->uffd);
    if (got == 0 && defect == ENDS_AT_EOF)
        exit(1);
    if (got == 0 && defect == CONNECTION_KEPT)
        for (;;)
            pause();
    if (got <= 0)
        goto refused;
    client->connection = connection;
    client->page = message.region[0].page;
    client->pages = image_bytes / (client->page < HUGE_BYTES ? client->page : HUGE_BYTES) + 1;
    client->kept_bytes = sizeof(struct kept) + client->pages;
    client->pidfd = (int)syscall(SYS_pidfd_open, peer.pid, 0);
    if (state_dir) {
        snprintf(client->kept_path, sizeof(client->kept_path), "%s/%d", state_dir, peer.pid);
        client->kept = map_kept(client->kept_path, client->kept_bytes, O_CREAT | O_TRUNC);
    } else {
        client->kept = mmap(NULL, client->kept_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        client->kept = client->kept == MAP_FAILED ? NULL : client->kept;
    }
    if (!client->kept || client->pidfd < 0) {
        say("refused: %s", strerror(errno));
        if (client->kept)
            munmap(client->kept, client->kept_bytes);
        if (client->kept_path[0])
            unlink(client->kept_path);
        close(client->uffd);
        close_if(client->pidfd);
        goto refused;
    }
    memcpy(client->kept->region, message.region, sizeof(message.region));
    client->kept->regions = message.regions;
    client->kept->start_time = start_time_of(peer.pid);
    client->write_protect = write_protect;
    for (uint32_t i = 0; write_protect && i < message.regions; i++) {
        struct uffdio_register range = {{message.region[i].base, message.region[i].size},
                                        UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP, 0};

        client->write_protect &= ioctl(client->uffd, UFFDIO_REGISTER, &range) == 0;
    }
    client->kept->pid = peer.pid; /* from here on a successor goes on with it */
    run_client(client);
    return NULL;
refused:
    free(client);
    close(connection);
    return NULL;
}

/* The userfaultfd of another process: its first one. */
static int fetch_uffd(int32_t pid, int pidfd)
{
    char path[64];
    struct dirent *entry;
    DIR *dir;
    int found = -1;

    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    dir = opendir(path);
    while (dir && found < 0 && (entry = readdir(dir)))
        if (is_userfaultfd(dirfd(dir), entry->d_name))
            found = (int)syscall(SYS_pidfd_getfd, pidfd, atoi(entry->d_name), 0);
    if (dir)
        closedir(dir);
    return found;
}

/* Goes on with a client of a predecessor that was killed. */
static void *taken_over(void *argument)
{
    struct client *client = argument;
    struct kept *kept = client->kept;

    for (uint64_t i = 0; i < client->pages; i++) /* what was queued is forgotten: those who wait will say so again */
        kept->state[i] &= (uint8_t) ~(QUEUED | (defect == REMOVES_LOST ? REMOVED : 0));
    for (int i = 0; i < EVENTS; i++)
        if (kept->events[i].event == UFFD_EVENT_REMOVE && defect != REMOVES_LOST)
            remove_range(client, kept->events[i].arg.remove.start, kept->events[i].arg.remove.end);
    for (uint32_t i = 0; i < kept->regions && defect != TAKEOVER_ASLEEP; i++)
        wake(client, kept->region[i].base, kept->region[i].size);
    run_client(client);
    return NULL;
}

static void start(void *(*function)(void *), void *argument)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, function, argument) == 0)
        pthread_detach(thread);
}

static void take_over(void)
{
    DIR *dir = opendir(state_dir);
    struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        struct client *client;
        struct stat about;

        if (entry->d_name[0] == '.' || !(client = calloc(1, sizeof(*client))))
            continue;
        snprintf(client->kept_path, sizeof(client->kept_path), "%s/%s", state_dir, entry->d_name);
        client->connection = client->uffd = client->pidfd = -1;
        if (stat(client->kept_path, &about) == 0 && (uint64_t)about.st_size > sizeof(struct kept)) {
            client->kept_bytes = (uint64_t)about.st_size;
            client->kept = map_kept(client->kept_path, client->kept_bytes, 0);
        }
        if (client->kept) {
            client->page = client->kept->region[0].page;
            client->pages = client->kept_bytes - sizeof(struct kept);
            client->pidfd = (int)syscall(SYS_pidfd_open, client->kept->pid, 0);
        }
        if (client->pidfd >= 0 && start_time_of(client->kept->pid) == client->kept->start_time)
            client->uffd = fetch_uffd(client->kept->pid, client->pidfd);
        if (client->uffd >= 0) {
            say("goes on with process %d", client->kept->pid);
            start(taken_over, client);
            continue;
        }
        unlink(client->kept_path);
        if (client->kept)
            munmap(client->kept, client->kept_bytes);
        close_if(client->pidfd);
        free(client);
    }
    if (dir)
        closedir(dir);
}

/* ---- */

static void ended(int number)
{
    for (int i = 0; i < 256 && defect == END_UNREGISTERS; i++)
        for (uint32_t j = 0; clients[i] && j < clients[i]->kept->regions; j++) {
            struct uffdio_range range = {clients[i]->kept->region[j].base, clients[i]->kept->region[j].size};

            ioctl(clients[i]->uffd, UFFDIO_UNREGISTER, &range);
        }
    _exit(number == SIGTERM || number == SIGINT ? 0 : 1);
}

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || strlen(path) >= sizeof(address.sun_path))
        return -1;
    memcpy(address.sun_path, path, strlen(path));
    unlink(path);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || chmod(path, 0666) < 0 || listen(fd, 128) < 0)
        return -1;
    return fd;
}

static int usage(void)
{
    fprintf(stderr, "usage: handler --socket PATH --image FILE [--around PAGES] [--write-protect] [--state DIR]\n"
                    "               [--allow-uid UID] [--defect NAME] [--list-defects]\n");
    return 2;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket", required_argument, NULL, 's'},  {"image", required_argument, NULL, 'i'},
        {"around", required_argument, NULL, 'a'},  {"write-protect", no_argument, NULL, 'w'},
        {"state", required_argument, NULL, 'd'},   {"allow-uid", required_argument, NULL, 'u'},
        {"defect", required_argument, NULL, 'x'},  {"list-defects", no_argument, NULL, 'l'}, {NULL, 0, NULL, 0},
    };
    const char *socket_path = NULL, *image = NULL;
    struct stat about;
    int option, listener;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 's': socket_path = optarg; break;
        case 'i': image = optarg; break;
        case 'a': around = strtoul(optarg, NULL, 10); break;
        case 'w': write_protect = true; break;
        case 'd': state_dir = optarg; break;
        case 'u': allowed_uid = (uid_t)strtoul(optarg, NULL, 10); break;
        case 'x':
            for (int i = 1; i < DEFECTS; i++)
                defect = strcmp(optarg, defect_names[i]) ? defect : (enum defect)i;
            if (defect == NONE)
                return usage();
            break;
        case 'l':
            for (int i = 1; i < DEFECTS; i++)
                puts(defect_names[i]);
            return 0;
        default: return usage();
        }
    }
    if (!socket_path || !image || around < 1 || around > 512)
        return usage();
    image_fd = open(image, O_RDONLY | O_CLOEXEC);
    if (image_fd < 0 || fstat(image_fd, &about) < 0) {
        say("cannot open %s: %s", image, strerror(errno));
        return 1;
    }
    image_bytes = (uint64_t)about.st_size;
    image_map = mmap(NULL, image_bytes, PROT_READ, MAP_SHARED, image_fd, 0);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, ended);
    signal(SIGINT, ended);
    if (image_map == MAP_FAILED || (listener = listen_at(socket_path)) < 0) {
        say("cannot listen at %s: %s", socket_path, strerror(errno));
        return 1;
    }
    if (state_dir) {
        (void)mkdir(state_dir, 0700);
        take_over();
    }
    for (;;) {
        int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

        if (connection < 0)
            continue;
        if (defect == SERIAL || defect == SILENT_BLOCKS)
            connected((void *)(intptr_t)connection);
        else
            start(connected, (void *)(intptr_t)connection);
    }
}
