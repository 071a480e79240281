/* SPDX-License-Identifier: Apache-2.0
 *
 * The keeper: holds descriptors that must outlive the process which works with them, the *engine*, and sees to it that there is one.
 * `postcopy pager` becomes it. It is the part that nothing replaces while VMs run, so it is small: one thread, one poll loop, no
 * memory of its own beyond one static structure, and it reads nothing but messages of its engine, in a fixed form.
 *
 * What it does not trust. An engine handles what VMMs and networks send, so it may be taken over by one of them. What it sends
 * is checked: lengths, names, kinds of files, the number of names and descriptors (so few that the next engine can have all of them).
 * One message of an engine is read a turn, and only when the answer to the last one has left: a flood fills the engine's own socket.
 * Only one message ends the keeper: END, by which an engine ends in order.
 *
 * The life of an engine. Each one begins as a spare: it is started, imports what it needs, says HELLO and waits. When there is none
 * that serves, it is told all entries, and GO. The first one serves at once; another is started when it is READY. So a death
 * costs no start of a process. What an engine is to be told is kept as flags (`told`, `go_told`, ...) and not in a queue, so the next
 * one is told everything by clearing them.
 *
 *     start() -> STARTING --HELLO--> WAITING --promote()--> SERVING --READY--> (a spare is started)
 *
 * An engine ends in order (exit status 0, END, the signal that it was told to end by), and the keeper with it; or because it was told
 * LEAVE; every other end is a death, and the spare goes on. An end before any engine was READY ends the keeper with its status: that
 * is a wrong option, not a crash. Engines that die again and again wait longer each time.
 */
#ifndef PC_KEEPER_INTERNAL_H
#define PC_KEEPER_INTERNAL_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "postcopy/keeper.h"

#define MS UINT64_C(1000000)
#define NEVER UINT64_MAX
#define LISTENERS 256 /* descriptors that are accepted on */
#define FRESH 256     /* connections that no engine has put anything to */
#define ENGINE_FDS 4  /* descriptors that an engine may need for each one that is kept; its limit is the keeper's */
#define WORDS 256     /* of a command */

/* ---- what is kept (store.c) ---- */
struct entry {
    char name[PC_KEEPER_NAME_BYTES + 1]; /* empty: not in use */
    int fds[PC_KEEPER_FDS];
    uint8_t count;
    bool listens; /* sockets that are accepted on, all of them */
    bool fresh;   /* a connection as it was accepted */
    bool told;    /* to the engine that serves */
};
struct store {
    struct entry entries[PC_KEEPER_ENTRIES];
    uint32_t end; /* entries from here on are not in use */
    uint32_t used, fresh, untold, fds, listeners;
    uint32_t max_fds;
    uint64_t connections; /* the number in the next one's name */
    int systemd;          /* socket of the service manager, which keeps a copy of everything; -1: there is none */
};
/* The descriptors are the store's from then on, or closed when it fails: 0, or an errno with the reason in `why`. */
int store_put(struct store *store, const char *name, const int *fds, uint32_t count, bool told, char *why);
void store_drop(struct store *store, const char *name);
/* A connection that was accepted on a descriptor of a listening entry: 0 or an errno. */
int store_accept(struct store *store, const struct entry *listener, int fd, char *why);
void store_tell_again(struct store *store);
/* What systemd has passed ($LISTEN_FDS, $LISTEN_FDNAMES): listening sockets, and what was kept for a keeper before this one. */
void store_import(struct store *store);
void store_connect_systemd(struct store *store);

/* ---- engines, as processes and sockets (engine.c) ---- */
struct answer {
    bool due; /* has not left */
    int32_t id, error;
    char why[256];
};
enum engine_state { NONE, STARTING, WAITING, SERVING };
struct engine {
    enum engine_state state;
    pid_t pid;
    int pidfd; /* of one that is not our child; else -1 */
    int socket;
    int command;  /* which of the two it was started with */
    bool ready;   /* has said READY */
    bool ordered; /* has said END, with this status: */
    int end_status;
    bool closed;  /* its end of the socket; it is being killed */
    bool ended;   /* the process is no more; wait_status is known unless it was not our child */
    int wait_status;
    bool replaced; /* a spare that another command takes the place of */
    uint64_t deadline_ns; /* by which it must have said HELLO, READY (on trial) or ended (LEAVE); NEVER */
    int32_t oldest_format, format;
    bool go_told, leave, leave_told;
    int spare_told;
    uint64_t send_after_ns;
    struct answer answer, upgrade_answer; /* to its last message, and to UPGRADE, which is answered later than those after it */
};
struct message {
    struct {
        uint32_t kind;
        int32_t value;
    } head;
    char text[PC_KEEPER_TEXT_BYTES + 1]; /* with a NUL */
    uint32_t text_bytes;
    int fds[PC_KEEPER_FDS];
    uint32_t fd_count;
    bool cut; /* more text or more descriptors than fit, or no room for them in this process */
};
int engine_start(struct engine *engine, char *const argv[]);
void engine_signal(const struct engine *engine, int signal_number);
void engine_forget(struct engine *engine);
/* 0 or an errno; EAGAIN when there is none, ESHUTDOWN at the end of the connection. The descriptors are the caller's. */
int engine_receive(struct engine *engine, struct message *message);
/* 0 or an errno: EAGAIN until the socket is writable, EBUSY when it is and that is not enough. */
int engine_send(struct engine *engine, uint32_t kind, int32_t value, const void *text, size_t bytes, const int *fds, uint32_t count);
void answer_with(struct answer *answer, int32_t id, int error, const char *why);

/* ---- messages for people (say.c) ---- */
enum level { INFO, WARNING, ERROR };
void say_as_json(int schema_version);
__attribute__((format(printf, 2, 3))) void say(enum level level, const char *format, ...);

/* ---- the loop (keeper.c) ---- */
struct options {
    char **command; /* ends in NULL */
    bool spare;
    int adopt_socket, adopt_pidfd; /* of an engine that serves and has lost its keeper; else -1 */
    int deaths;
    uint32_t burst; /* deaths in short order before the next engine has to wait */
};
int keeper_run(const struct options *options); /* the exit status */
int keeper_main(int argc, char **argv);

#endif
