/* SPDX-License-Identifier: Apache-2.0
 *
 * Names and what they have. Under systemd the service manager has a copy of everything (sd_notify(3), FDSTORE): when the keeper is
 * killed, the next one gets all of it back. FDPOLL=0, since systemd would otherwise drop a descriptor that polls as hung up.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "keeper/keeper.h"

#define FIRST_PASSED_FD 3 /* SD_LISTEN_FDS_START */
#define WHY_BYTES sizeof(((struct answer *)NULL)->why)
#define ENTRY_OF_CONNECTION "%.42s.%llu" /* fits into a name */

__attribute__((format(printf, 3, 4))) static int refuse(int error, char *why, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    (void)vsnprintf(why, WHY_BYTES, format, arguments);
    va_end(arguments);
    return error;
}

/* ---- systemd ---- */

void store_connect_systemd(struct store *store)
{
    const char *path = getenv("NOTIFY_SOCKET"), *room = getenv("FDSTORE"); /* since systemd 254; before, the unit says it */
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t bytes = path ? strlen(path) : 0;

    store->systemd = -1;
    if (!room || strtol(room, NULL, 10) <= 0 || !bytes || bytes >= sizeof(address.sun_path) || (path[0] != '/' && path[0] != '@'))
        return;
    memcpy(address.sun_path, path, bytes);
    if (path[0] == '@')
        address.sun_path[0] = '\0';
    store->systemd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (store->systemd < 0)
        return;
    if (strtol(room, NULL, 10) < (long)store->max_fds) /* it would silently forget what is more */
        store->max_fds = (uint32_t)strtol(room, NULL, 10);
    /* A service manager that takes nothing must not stop this process. */
    (void)setsockopt(store->systemd, SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){.tv_usec = 200000}, sizeof(struct timeval));
    if (connect(store->systemd, (struct sockaddr *)&address, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + bytes))) {
        close(store->systemd);
        store->systemd = -1;
    }
}

static void tell_systemd(const struct store *store, const char *what, const char *name, const int *fds, uint32_t count)
{
    char text[PC_KEEPER_NAME_BYTES + 64];
    union {
        char bytes[CMSG_SPACE(sizeof(int) * PC_KEEPER_FDS)];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = text};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    if (store->systemd < 0)
        return;
    part.iov_len = (size_t)snprintf(text, sizeof(text), "%s=1\nFDPOLL=0\nFDNAME=%s", what, name);
    if (count) {
        struct cmsghdr *header = &control.align;

        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        *header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int) * count), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(header), fds, sizeof(int) * count);
    }
    if (sendmsg(store->systemd, &message, MSG_NOSIGNAL) < 0)
        say(WARNING, "systemd does not take %s=1 of %s: %s; it would be lost with this process", what, name, strerror(errno));
}

/* ---- what can be kept ---- */

static bool is_name(const char *name)
{
    size_t bytes = strlen(name);

    for (const char *at = name; *at; at++)
        if (*at <= ' ' || *at > '~' || *at == ':') /* systemd separates names by colons */
            return false;
    return bytes && bytes <= PC_KEEPER_NAME_BYTES;
}

static bool has_option(int fd, int option, int value)
{
    int found = 0;

    return !getsockopt(fd, SOL_SOCKET, option, &found, &(socklen_t){sizeof(found)}) && found == value;
}

/* Local sockets, regular and memory files, and what has no file system (userfaultfd, eventfd, pidfd): others may wait in close(). */
static bool can_be_kept(int fd)
{
    struct stat status;

    if (fstat(fd, &status))
        return false;
    if (S_ISSOCK(status.st_mode))
        return has_option(fd, SO_DOMAIN, AF_UNIX);
    return S_ISREG(status.st_mode) || (status.st_mode & S_IFMT) == 0;
}

/* The last close of a connection also closes what was sent to it and not received. A client may have sent anything, such as a TCP socket
 * whose close waits for its peer (SO_LINGER). An exit does not wait for that: so the last one to have them is a process that exits. */
static void close_all(const int *fds, uint32_t count)
{
    int gate[2] = {-1, -1};
    bool connected = false;

    for (uint32_t i = 0; i < count; i++)
        connected = connected || has_option(fds[i], SO_DOMAIN, AF_UNIX);
    if (connected && !pipe2(gate, O_CLOEXEC) && !fork()) {
        close(gate[1]);
        (void)!read(gate[0], &(char){0}, 1); /* until the keeper has closed them, or has ended */
        _exit(0);
    }
    for (uint32_t i = 0; i < count; i++)
        close(fds[i]);
    for (int i = 0; i < 2 && gate[i] >= 0; i++)
        close(gate[i]);
}

/* ---- entries ---- */

static struct entry *find(struct store *store, const char *name)
{
    for (uint32_t i = 0; i < store->end; i++)
        if (!strcmp(store->entries[i].name, name))
            return &store->entries[i];
    return NULL;
}

static struct entry *unused(struct store *store)
{
    for (uint32_t i = 0; i < store->end; i++)
        if (!store->entries[i].name[0])
            return &store->entries[i];
    return store->end < PC_KEEPER_ENTRIES ? &store->entries[store->end++] : NULL;
}

static void count_untold(struct store *store, struct entry *entry, bool told)
{
    if (entry->told && !told)
        store->untold++;
    if (!entry->told && told)
        store->untold--;
    entry->told = told;
}

void store_tell_again(struct store *store)
{
    for (uint32_t i = 0; i < store->end; i++)
        if (store->entries[i].name[0])
            count_untold(store, &store->entries[i], false);
}

/* `passed`: systemd has it already. */
static int add(struct store *store, const char *name, const int *fds, uint32_t count, bool told, bool passed, char *why)
{
    struct entry *entry;
    uint32_t listening = 0;

    if (!is_name(name))
        return refuse(EINVAL, why, "a name has 1 to %d printable letters and no colon", PC_KEEPER_NAME_BYTES);
    entry = find(store, name);
    if (!count || count + (entry ? entry->count : 0) > PC_KEEPER_FDS)
        return refuse(EINVAL, why, "a name can have 1 to %d descriptors", PC_KEEPER_FDS);
    for (uint32_t i = 0; i < count; i++) {
        if (!can_be_kept(fds[i]))
            return refuse(EBADF, why, "a descriptor is neither a local socket, nor a file, nor an anonymous one");
        listening += has_option(fds[i], SO_ACCEPTCONN, 1);
    }
    if (listening && (listening < count || (entry && !entry->listens)))
        return refuse(EINVAL, why, "a listening socket shares no name with anything else");
    if (!listening && entry && entry->listens)
        return refuse(EINVAL, why, "the name is that of a listening socket");
    if (store->listeners + listening > LISTENERS)
        return refuse(ENOSPC, why, "%d listening sockets are kept already", LISTENERS);
    if (!passed && store->fds + count > store->max_fds)
        return refuse(EMFILE, why, "%u descriptors are kept already; allow more: ulimit -Hn, LimitNOFILE=, FileDescriptorStoreMax=",
                      store->fds);
    if (!entry) {
        entry = unused(store);
        if (!entry)
            return refuse(ENOSPC, why, "%d names are kept already", PC_KEEPER_ENTRIES);
        *entry = (struct entry){.listens = listening != 0, .told = true};
        (void)snprintf(entry->name, sizeof(entry->name), "%s", name);
        store->used++;
        count_untold(store, entry, told);
    }
    for (uint32_t i = 0; i < count; i++) {
        if (listening) /* of every process that has it: accepting must never wait */
            (void)fcntl(fds[i], F_SETFL, fcntl(fds[i], F_GETFL) | O_NONBLOCK);
        entry->fds[entry->count++] = fds[i];
    }
    store->fds += count;
    store->listeners += listening;
    if (entry->fresh) {
        entry->fresh = false;
        store->fresh--;
    }
    if (!passed)
        tell_systemd(store, "FDSTORE", entry->name, fds, count);
    return 0;
}

int store_put(struct store *store, const char *name, const int *fds, uint32_t count, bool told, char *why)
{
    int error = add(store, name, fds, count, told, false, why);

    if (error)
        close_all(fds, count);
    return error;
}

void store_drop(struct store *store, const char *name)
{
    struct entry *entry = name[0] ? find(store, name) : NULL;

    if (!entry)
        return;
    tell_systemd(store, "FDSTOREREMOVE", entry->name, NULL, 0);
    close_all(entry->fds, entry->count);
    store->fds -= entry->count;
    store->listeners -= entry->listens ? entry->count : 0;
    store->fresh -= entry->fresh;
    store->used--;
    count_untold(store, entry, true);
    entry->name[0] = '\0';
    while (store->end && !store->entries[store->end - 1].name[0])
        store->end--;
}

int store_accept(struct store *store, const struct entry *listener, int fd, char *why)
{
    char name[PC_KEEPER_NAME_BYTES + 1];
    int error;

    do
        (void)snprintf(name, sizeof(name), ENTRY_OF_CONNECTION, listener->name, (unsigned long long)++store->connections);
    while (find(store, name));
    error = store_put(store, name, &fd, 1, false, why);
    if (!error) {
        find(store, name)->fresh = true;
        store->fresh++;
    }
    return error;
}

/* ---- what was passed ---- */

void store_import(struct store *store)
{
    const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS"), *names = getenv("LISTEN_FDNAMES");
    long fds = pid && count && strtol(pid, NULL, 10) == getpid() ? strtol(count, NULL, 10) : 0;

    for (int fd = FIRST_PASSED_FD; fd < FIRST_PASSED_FD + fds; fd++) {
        size_t bytes = names ? strcspn(names, ":") : 0;
        char name[PC_KEEPER_NAME_BYTES + 1], why[WHY_BYTES];

        (void)snprintf(name, sizeof(name), "%.*s", bytes ? (int)(bytes < sizeof(name) ? bytes : sizeof(name) - 1) : 7,
                       bytes ? names : "unknown");
        if (names)
            names += bytes + (names[bytes] == ':');
        if (fcntl(fd, F_SETFD, FD_CLOEXEC)) /* there is no such descriptor */
            continue;
        if (add(store, name, &fd, 1, false, true, why)) {
            say(WARNING, "what systemd has passed as %s is not kept: %s", name, why);
            close(fd);
        }
    }
    (void)unsetenv("LISTEN_PID");
    (void)unsetenv("LISTEN_FDS");
    (void)unsetenv("LISTEN_FDNAMES");
}
