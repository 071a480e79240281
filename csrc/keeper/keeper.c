/* SPDX-License-Identifier: Apache-2.0
 *
 * The loop, and what is decided in it. keeper.h says how it works.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/clock.h"
#include "keeper/keeper.h"

#define HELLO_NS (60000 * MS) /* in which an engine has imported what it needs, on a busy host */
#define TRIAL_NS (60000 * MS) /* in which one of another version serves */
/* In which one has let go of everything for another one: until then no page is served. One whose image is on a disk that hangs cannot,
 * and is killed, which loses nothing. */
#define LEAVE_NS (3000 * MS)
#define END_NS (30000 * MS)   /* in which one has ended that was told to */
#define CLOSED_NS (1000 * MS) /* in which one has ended that does not talk to the keeper any more */
#define FIRST_DELAY_NS (100 * MS)
#define LONGEST_DELAY_NS (10000 * MS)
#define COOL_MS 2000 /* in which one death is forgotten */
#define TRIAL "POSTCOPY_KEEPER_TRIAL" /* in the environment of an engine of another command */
#define DRAIN 4096   /* messages of an engine that has died: what its socket holds is less */

static struct {
    struct store store;
    struct engine serving, spare;
    char *const *words[2]; /* of the command, and of the one that may replace it */
    char other_text[2][PC_KEEPER_TEXT_BYTES + 1];
    char *other_words[2][WORDS + 1];
    int current;
    bool upgrading, trial; /* the other command is started as a spare; it serves, and has not been READY */
    int32_t upgrade_id;
    bool want_spare, ever_ready;
    int32_t format; /* of the records that are kept */
    uint32_t deaths, burst;
    char reason[256], refusal[256]; /* why the last engine has ended; why a spare is being killed */
    int stop_signal; /* the last one that told an engine to end */
    uint32_t stops;
    uint64_t spare_after_ns, promote_after_ns, accept_after_ns;
    uint32_t spare_failures;
    uint64_t heat_ms, died_ns;
    bool ending;
    int status;
    struct message inbox;
} keeper;

/* `how`: what it ends with. */
static void end(int status, const char *how)
{
    uint32_t vms = 0;

    keeper.ending = true;
    keeper.status = status;
    for (uint32_t i = 0; i < keeper.store.end; i++)
        vms += keeper.store.entries[i].name[0] && !keeper.store.entries[i].listens;
    if (vms && keeper.store.systemd >= 0)
        say(INFO, "%s, and this process with it; systemd keeps what belongs to %u VMs", how, vms);
    else if (vms)
        say(WARNING, "%s, and this process with it: VMs that are still there wait for ever for pages that they lack", how);
}

/* How an engine has ended, for a person. */
static const char *describe(const struct engine *engine)
{
    static char text[160];

    if (engine->pidfd >= 0)
        (void)snprintf(text, sizeof(text), "engine %d has ended", (int)engine->pid);
    else if (WIFSIGNALED(engine->wait_status))
        (void)snprintf(text, sizeof(text), "engine %d was killed by signal %d (%s)", (int)engine->pid, WTERMSIG(engine->wait_status),
                       strsignal(WTERMSIG(engine->wait_status)));
    else
        (void)snprintf(text, sizeof(text), "engine %d has ended with status %d", (int)engine->pid, WEXITSTATUS(engine->wait_status));
    return text;
}

/* As a shell has it. */
static int status_of(const struct engine *engine)
{
    if (engine->pidfd >= 0)
        return engine->end_status;
    return WIFSIGNALED(engine->wait_status) ? 128 + WTERMSIG(engine->wait_status) : WEXITSTATUS(engine->wait_status);
}

static uint64_t delay_ns(uint32_t times)
{
    uint64_t delay = times > 7 ? LONGEST_DELAY_NS : FIRST_DELAY_NS << (times ? times - 1 : 0);

    return times ? (delay < LONGEST_DELAY_NS ? delay : LONGEST_DELAY_NS) : 0;
}

/* ---- what engines say ---- */

static void kill_spare(const char *why)
{
    (void)snprintf(keeper.refusal, sizeof(keeper.refusal), "%s", why);
    engine_signal(&keeper.spare, SIGKILL);
}

static void hear_hello(struct engine *engine, const struct message *message)
{
    char why[160];
    int32_t formats[2];

    if (engine->state == WAITING || (engine->state == SERVING && engine->pidfd < 0))
        return;
    if (message->head.value != PC_KEEPER_PROTOCOL || message->text_bytes != sizeof(formats)) {
        (void)snprintf(why, sizeof(why), "it speaks version %d with its keeper, which is of version %d: start that anew",
                       message->head.value, PC_KEEPER_PROTOCOL);
        if (engine->state == STARTING)
            kill_spare(why);
        return;
    }
    memcpy(formats, message->text, sizeof(formats));
    engine->oldest_format = formats[0];
    engine->format = formats[1];
    if (engine->state == SERVING) {
        keeper.format = engine->format;
        return;
    }
    if (keeper.format && (keeper.format < formats[0] || keeper.format > formats[1])) {
        (void)snprintf(why, sizeof(why), "it reads records of formats %d to %d, and those of the VMs here are of format %d", formats[0],
                       formats[1], keeper.format);
        kill_spare(why);
        return;
    }
    engine->state = WAITING;
    engine->deadline_ns = NEVER;
    keeper.spare_failures = 0;
    if (keeper.upgrading && engine->command != keeper.current && keeper.serving.state == SERVING) {
        answer_with(&keeper.serving.upgrade_answer, keeper.upgrade_id, 0, "");
        keeper.serving.leave = true;
        keeper.serving.deadline_ns = pc_now_ns() + LEAVE_NS;
    }
}

static int hear_upgrade(const struct message *message, char *why, size_t why_bytes)
{
    int other = !keeper.current;
    uint32_t words = 0;

    if (keeper.upgrading || keeper.trial || !keeper.serving.ready || keeper.serving.leave) {
        (void)snprintf(why, why_bytes, "an engine is being replaced already");
        return EBUSY;
    }
    if (keeper.stop_signal) {
        (void)snprintf(why, why_bytes, "it was told to end, by signal %d", keeper.stop_signal);
        return EBUSY;
    }
    if (message->cut || !message->text_bytes || message->text[message->text_bytes - 1] || message->text[0] != '/') {
        (void)snprintf(why, why_bytes, "the command must begin with the absolute path of a program, and have at most %d bytes",
                       PC_KEEPER_TEXT_BYTES);
        return EINVAL;
    }
    memcpy(keeper.other_text[other], message->text, message->text_bytes);
    for (uint32_t at = 0; at < message->text_bytes; at += (uint32_t)strlen(keeper.other_text[other] + at) + 1) {
        if (words == WORDS) {
            (void)snprintf(why, why_bytes, "the command has more than %d words", WORDS);
            return EINVAL;
        }
        keeper.other_words[other][words++] = keeper.other_text[other] + at;
    }
    keeper.other_words[other][words] = NULL;
    keeper.words[other] = keeper.other_words[other];
    keeper.upgrading = true;
    keeper.upgrade_id = message->head.value;
    keeper.spare_after_ns = 0;
    keeper.spare.replaced = true;
    if (keeper.spare.state != NONE)
        engine_signal(&keeper.spare, SIGKILL);
    return 0;
}

static void hear_ready(struct engine *engine)
{
    if (engine->state != SERVING || engine->ready)
        return;
    engine->ready = keeper.ever_ready = true;
    keeper.format = engine->format;
    if (!engine->leave)
        engine->deadline_ns = NEVER;
    if (keeper.trial) {
        keeper.trial = false;
        keeper.current = engine->command;
        say(INFO, "engine %d, of another command, serves", (int)engine->pid);
    }
}

/* `dead`: nobody hears an answer. */
static void hear(struct engine *engine, struct message *message, bool dead)
{
    char why[sizeof(engine->answer.why)] = "";
    int error = 0;
    bool answered = true, serves = engine->state == SERVING;

    switch (message->head.kind) {
    case PC_KEEPER_PUT:
        if (message->cut)
            (void)snprintf(why, sizeof(why), "more than %d descriptors, or too many are open: ulimit -Hn, LimitNOFILE=", PC_KEEPER_FDS);
        error = !serves ? EPERM : message->cut ? EMFILE : strlen(message->text) != message->text_bytes ? EINVAL : 0;
        if (error)
            break;
        error = store_put(&keeper.store, message->text, message->fds, message->fd_count, true, why);
        message->fd_count = 0; /* they are the store's, or closed */
        break;
    case PC_KEEPER_DROP:
        if (!serves)
            error = EPERM;
        else
            store_drop(&keeper.store, message->text);
        break;
    case PC_KEEPER_UPGRADE:
        error = serves && !dead ? hear_upgrade(message, why, sizeof(why)) : EPERM;
        answered = error != 0; /* else when the new one waits */
        break;
    case PC_KEEPER_HELLO:
        hear_hello(engine, message);
        answered = false;
        break;
    case PC_KEEPER_READY:
        hear_ready(engine);
        answered = false;
        break;
    case PC_KEEPER_END:
        engine->ordered = serves;
        engine->end_status = message->head.value & 0xff;
        answered = false;
        break;
    default:
        say(WARNING, "engine %d has sent a message that means nothing here", (int)engine->pid);
        answered = false;
    }
    for (uint32_t i = 0; i < message->fd_count; i++)
        close(message->fds[i]);
    if (answered && !dead)
        answer_with(&engine->answer, message->head.value, error, why);
}

/* One message; false when there is none. */
static bool listen_to(struct engine *engine, bool dead)
{
    int error = engine_receive(engine, &keeper.inbox);

    if (!error) {
        hear(engine, &keeper.inbox, dead);
        return true;
    }
    if (error == ESHUTDOWN && !dead) {
        /* It is on its way to its end, and may want to say why; if it stays, it has lost its senses. */
        bool told = engine->ordered || keeper.stop_signal || !keeper.ever_ready;

        engine->closed = true;
        if (!engine->leave) /* else it has a deadline already */
            engine->deadline_ns = pc_now_ns() + (told ? END_NS : CLOSED_NS);
    }
    return false;
}

/* ---- what they are told ---- */

static bool is_waiting(void)
{
    return keeper.spare.state == WAITING && !keeper.spare.closed && !keeper.spare.replaced && !keeper.spare.ended;
}

static bool has_news(const struct engine *engine)
{
    if (engine->closed || engine->state == NONE)
        return false;
    if (engine->answer.due || engine->upgrade_answer.due)
        return true;
    return engine->state == SERVING && (keeper.store.untold || !engine->go_told || (engine->leave && !engine->leave_told) ||
                                        (engine->ready && engine->spare_told != is_waiting()));
}

/* The next thing, when there is one: 0, or the errno of its sending. */
static int tell_next(struct engine *engine)
{
    struct answer *answer = engine->answer.due ? &engine->answer : &engine->upgrade_answer;
    int error = 0;

    if (answer->due) {
        char text[sizeof(int32_t) + sizeof(answer->why)];
        size_t bytes = strlen(answer->why);

        memcpy(text, &answer->error, sizeof(int32_t));
        memcpy(text + sizeof(int32_t), answer->why, bytes);
        error = engine_send(engine, PC_KEEPER_ANSWER, answer->id, text, sizeof(int32_t) + bytes, NULL, 0);
        answer->due = error != 0;
    } else if (keeper.store.untold) {
        for (uint32_t i = 0; i < keeper.store.end && !error; i++) {
            struct entry *entry = &keeper.store.entries[i];

            if (!entry->name[0] || entry->told)
                continue;
            error = engine_send(engine, PC_KEEPER_ENTRY, 0, entry->name, strlen(entry->name), entry->fds, entry->count);
            if (!error) {
                entry->told = true;
                keeper.store.untold--;
            }
        }
    } else if (!engine->go_told) {
        error = engine_send(engine, PC_KEEPER_GO, (int32_t)keeper.deaths, keeper.reason, strlen(keeper.reason), NULL, 0);
        engine->go_told = !error;
        if (!error && keeper.stop_signal)
            engine_signal(engine, keeper.stop_signal);
    } else if (engine->leave && !engine->leave_told) {
        error = engine_send(engine, PC_KEEPER_LEAVE, 0, NULL, 0, NULL, 0);
        engine->leave_told = !error;
    } else {
        int waiting = is_waiting();

        error = engine_send(engine, PC_KEEPER_SPARE, waiting, NULL, 0, NULL, 0);
        engine->spare_told = error ? engine->spare_told : waiting;
    }
    return error;
}

static void tell(struct engine *engine)
{
    int error = 0;

    while (!error && has_news(engine))
        error = tell_next(engine);
    if (error == EBUSY)
        engine->send_after_ns = pc_now_ns() + 2 * MS;
    else if (error && error != EAGAIN)
        engine->answer.due = false; /* it has ended, as will be seen when its socket is read */
}

/* ---- ends of engines ---- */

static void spare_has_ended(void)
{
    struct engine *spare = &keeper.spare;
    bool upgrade = keeper.upgrading && spare->command != keeper.current;
    const char *how = describe(spare);
    char why[sizeof(keeper.refusal) + 200];

    (void)snprintf(why, sizeof(why), "%s%s%s", how, keeper.refusal[0] ? ": " : " before it could serve", keeper.refusal);
    if (spare->replaced && !upgrade) {
        /* by a command that is to be started now */
    } else if (upgrade) {
        say(WARNING, "not replaced by another command: %s", why);
        if (keeper.serving.state == SERVING && !keeper.serving.leave)
            answer_with(&keeper.serving.upgrade_answer, keeper.upgrade_id, ECHILD, why);
        keeper.upgrading = false;
        keeper.spare_after_ns = 0;
    } else if (!keeper.ever_ready) {
        end(status_of(spare), how); /* it has said why */
    } else {
        keeper.spare_failures++;
        keeper.spare_after_ns = pc_now_ns() + delay_ns(keeper.spare_failures);
        say(WARNING, "a spare engine is lost: %s; the next one is started in %.1f s", why,
            (double)delay_ns(keeper.spare_failures) / 1e9);
    }
    keeper.refusal[0] = '\0';
    engine_forget(spare);
}

/* VMs wait for an engine now, and the other command may never say HELLO. */
static void cancel_upgrade(void)
{
    if (keeper.spare.state == STARTING && keeper.spare.command != keeper.current)
        kill_spare("the engine that it was to replace has died");
    else
        keeper.upgrading = false;
}

/* Sets how long the next engine has to wait, after a death. */
static void count_death(void)
{
    uint64_t now_ns = pc_now_ns(), cooled_ms = (now_ns - keeper.died_ns) / MS;
    uint32_t times;

    keeper.heat_ms = (keeper.heat_ms > cooled_ms ? keeper.heat_ms - cooled_ms : 0) + COOL_MS;
    keeper.died_ns = now_ns;
    keeper.deaths++;
    times = (uint32_t)(keeper.heat_ms / COOL_MS);
    keeper.promote_after_ns = now_ns + (times > keeper.burst ? delay_ns(times - keeper.burst) : 0);
}

/* By a child's wait status: with 0, by the signal that it was told to end by, or with any status when it was told so more than
 * once. One that was told once may go on to serve for hours, and what ends it then is a crash. */
static bool ends_in_order(int status)
{
    if (WIFSIGNALED(status))
        return WTERMSIG(status) == keeper.stop_signal;
    return !WEXITSTATUS(status) || keeper.stops > 1;
}

static void serving_has_ended(void)
{
    struct engine *serving = &keeper.serving;
    bool in_order;

    /* What it had sent counts: it may have served since. */
    for (int i = 0; i < DRAIN && listen_to(serving, true); i++) {
    }
    in_order = !keeper.trial && !serving->leave &&
               (serving->ordered || !keeper.ever_ready || (serving->pidfd < 0 && ends_in_order(serving->wait_status)));
    if (in_order) {
        end(status_of(serving), describe(serving));
    } else if (serving->leave) {
        (void)snprintf(keeper.reason, sizeof(keeper.reason), "engine %d was replaced", (int)serving->pid);
        say(INFO, "%s, another one goes on", keeper.reason);
        keeper.promote_after_ns = 0;
    } else {
        (void)snprintf(keeper.reason, sizeof(keeper.reason), "%s%s", describe(serving), keeper.trial ? " before it served" : "");
        count_death();
        say(WARNING, "%s; %s, with %u names kept%s", keeper.reason,
            keeper.promote_after_ns > pc_now_ns() ? "they die again and again, so the next one waits a while" : "another one goes on",
            keeper.store.used, keeper.trial ? "; back to the command before" : "");
        if (keeper.upgrading && !is_waiting())
            cancel_upgrade();
    }
    keeper.trial = false;
    engine_forget(serving);
}

/* ---- steps ---- */

static void start(void)
{
    int command = keeper.upgrading ? !keeper.current : keeper.current, error;

    (void)(keeper.upgrading ? setenv(TRIAL, "1", 1) : unsetenv(TRIAL));
    error = engine_start(&keeper.spare, (char *const *)keeper.words[command]);
    if (error) {
        say(ERROR, "no engine can be started: %s; it is tried again", strerror(error));
        keeper.spare_after_ns = pc_now_ns() + 1000 * MS;
        return;
    }
    keeper.spare.command = command;
    keeper.spare.deadline_ns = pc_now_ns() + HELLO_NS;
}

static void promote(void)
{
    keeper.serving = keeper.spare;
    keeper.spare = (struct engine){.state = NONE, .pidfd = -1, .socket = -1, .deadline_ns = NEVER};
    keeper.serving.state = SERVING;
    keeper.trial = keeper.serving.command != keeper.current;
    keeper.upgrading = false;
    if (keeper.trial)
        keeper.serving.deadline_ns = pc_now_ns() + TRIAL_NS;
    store_tell_again(&keeper.store);
}

static bool wants_engine(void)
{
    if (keeper.spare.state != NONE)
        return false;
    return keeper.serving.state == NONE ||
           (keeper.serving.ready && (keeper.upgrading || (keeper.want_spare && !keeper.stop_signal)));
}

static bool can_promote(void)
{
    return keeper.serving.state == NONE && is_waiting();
}

static void step(void)
{
    uint64_t now_ns = pc_now_ns();

    if (keeper.spare.state != NONE && keeper.spare.ended)
        spare_has_ended();
    if (keeper.serving.state != NONE && keeper.serving.ended)
        serving_has_ended();
    if (keeper.ending)
        return;
    if (now_ns >= keeper.spare.deadline_ns) {
        kill_spare(keeper.spare.closed ? "it does not talk to its keeper any more" : "it took too long to start");
        keeper.spare.deadline_ns = NEVER;
    }
    if (now_ns >= keeper.serving.deadline_ns) {
        say(WARNING, "engine %d takes too long to %s, and is killed", (int)keeper.serving.pid,
            keeper.serving.leave || keeper.serving.closed ? "end" : "serve");
        engine_signal(&keeper.serving, SIGKILL);
        keeper.serving.deadline_ns = NEVER;
    }
    if (wants_engine() && now_ns >= keeper.spare_after_ns)
        start();
    if (can_promote() && now_ns >= keeper.promote_after_ns)
        promote();
    if (now_ns >= keeper.serving.send_after_ns)
        tell(&keeper.serving);
    if (now_ns >= keeper.spare.send_after_ns)
        tell(&keeper.spare);
}

static uint64_t next_step_ns(void)
{
    uint64_t next = keeper.spare.deadline_ns < keeper.serving.deadline_ns ? keeper.spare.deadline_ns : keeper.serving.deadline_ns;
    uint64_t more[] = {
        wants_engine() ? keeper.spare_after_ns : NEVER,
        can_promote() ? keeper.promote_after_ns : NEVER,
        keeper.accept_after_ns ? keeper.accept_after_ns : NEVER,
        has_news(&keeper.serving) && keeper.serving.send_after_ns ? keeper.serving.send_after_ns : NEVER,
        has_news(&keeper.spare) && keeper.spare.send_after_ns ? keeper.spare.send_after_ns : NEVER,
    };

    for (size_t i = 0; i < sizeof(more) / sizeof(more[0]); i++)
        next = more[i] < next ? more[i] : next;
    return next;
}

static void reap(void)
{
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        struct engine *engine = pid == keeper.serving.pid && keeper.serving.pidfd < 0 ? &keeper.serving
                                : pid == keeper.spare.pid                             ? &keeper.spare
                                                                                      : NULL;
        if (engine) { /* else it was left to us by a process that has ended: as the first process of a container */
            engine->ended = true;
            engine->wait_status = status;
        }
    }
}

static void on_signal(int number)
{
    bool stops = number == SIGTERM || number == SIGINT || number == SIGQUIT;

    if (number == SIGCHLD) {
        reap();
    } else if (keeper.serving.state == SERVING) {
        keeper.stop_signal = stops ? number : keeper.stop_signal;
        keeper.stops += stops;
        if (keeper.serving.go_told) /* else it gets what stops it then */
            engine_signal(&keeper.serving, number);
    } else if (stops && (keeper.stop_signal || !keeper.ever_ready)) {
        end(128 + number, "it was told to end while no engine serves");
    } else if (stops) {
        keeper.stop_signal = number; /* for the next one, which serves at once */
        keeper.stops++;
        keeper.promote_after_ns = keeper.spare_after_ns = 0;
    }
}

static void accept_one(const struct entry *listener, int listening)
{
    char why[256];
    int fd = accept4(listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    int error = fd < 0 ? errno : store_accept(&keeper.store, listener, fd, why);

    if (!error || error == EAGAIN || error == EINTR || error == ECONNABORTED)
        return;
    say(WARNING, "%s: no connection can be accepted: %s; it is tried again", listener->name, fd < 0 ? strerror(error) : why);
    keeper.accept_after_ns = pc_now_ns() + 200 * MS;
}

static bool can_accept(void)
{
    return keeper.store.fresh < FRESH && keeper.store.used < PC_KEEPER_ENTRIES && keeper.store.fds < keeper.store.max_fds;
}

static void watch(struct pollfd *poll_fd, const struct engine *engine)
{
    *poll_fd = (struct pollfd){.fd = -1};
    if (engine->state == NONE || engine->closed)
        return;
    poll_fd->fd = engine->socket;
    poll_fd->events = (short)((engine->answer.due ? 0 : POLLIN) | (has_news(engine) && !engine->send_after_ns ? POLLOUT : 0));
}

/* Sleeps until something has happened, and takes note of it. */
static void turn(int signals)
{
    struct pollfd fds[4 + LISTENERS] = {{.fd = signals, .events = POLLIN}, {.fd = -1}};
    uint32_t entries[LISTENERS], count = 4;
    struct signalfd_siginfo info;
    uint64_t now_ns = pc_now_ns(), next_ns;

    if (keeper.accept_after_ns && now_ns >= keeper.accept_after_ns)
        keeper.accept_after_ns = 0;
    keeper.serving.send_after_ns = now_ns >= keeper.serving.send_after_ns ? 0 : keeper.serving.send_after_ns;
    keeper.spare.send_after_ns = now_ns >= keeper.spare.send_after_ns ? 0 : keeper.spare.send_after_ns;
    if (keeper.serving.state != NONE && keeper.serving.pidfd >= 0)
        fds[1] = (struct pollfd){.fd = keeper.serving.pidfd, .events = POLLIN};
    watch(&fds[2], &keeper.serving);
    watch(&fds[3], &keeper.spare);
    for (uint32_t i = 0; i < keeper.store.end && keeper.store.listeners && !keeper.accept_after_ns && can_accept(); i++) {
        const struct entry *entry = &keeper.store.entries[i];

        for (uint32_t j = 0; entry->name[0] && entry->listens && j < entry->count; j++) {
            entries[count - 4] = i;
            fds[count++] = (struct pollfd){.fd = entry->fds[j], .events = POLLIN};
        }
    }
    next_ns = next_step_ns();
    now_ns = pc_now_ns();
    if (poll(fds, count, next_ns == NEVER ? -1 : next_ns > now_ns ? (int)((next_ns - now_ns + MS - 1) / MS) : 0) <= 0)
        return;
    for (uint32_t i = 4; i < count; i++)
        if (fds[i].revents && can_accept())
            accept_one(&keeper.store.entries[entries[i - 4]], fds[i].fd);
    if (fds[2].revents & (POLLIN | POLLHUP | POLLERR))
        (void)listen_to(&keeper.serving, false);
    if (fds[3].revents & (POLLIN | POLLHUP | POLLERR))
        (void)listen_to(&keeper.spare, false);
    if (fds[1].revents)
        keeper.serving.ended = true;
    while (fds[0].revents && read(signals, &info, sizeof(info)) == (ssize_t)sizeof(info))
        on_signal((int)info.ssi_signo);
}

/* ---- start and end ---- */

static int open_signals(void)
{
    const int numbers[] = {SIGCHLD, SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1, SIGUSR2, SIGWINCH};
    sigset_t set;

    (void)sigemptyset(&set);
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
        (void)sigaddset(&set, numbers[i]);
    (void)signal(SIGCHLD, SIG_DFL); /* where it is ignored, the kernel forgets how children end */
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGTTOU, SIG_IGN); /* it writes to the terminal also from the background; engines inherit this */
    (void)sigprocmask(SIG_SETMASK, &set, NULL);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void allow_files(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit))
        limit.rlim_cur = 1024;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit))
        (void)getrlimit(RLIMIT_NOFILE, &limit);
    keeper.store.max_fds = (uint32_t)((limit.rlim_cur > 1u << 20 ? 1u << 20 : limit.rlim_cur) / ENGINE_FDS);
}

static void adopt(const struct options *options)
{
    struct {
        pid_t pid;
        uid_t uid;
        gid_t gid;
    } peer = {0};

    (void)getsockopt(options->adopt_socket, SOL_SOCKET, SO_PEERCRED, &peer, &(socklen_t){sizeof(peer)});
    keeper.serving.state = SERVING;
    keeper.serving.pid = peer.pid;
    keeper.serving.socket = options->adopt_socket;
    keeper.serving.pidfd = options->adopt_pidfd;
    keeper.serving.ready = keeper.serving.go_told = keeper.ever_ready = true;
    keeper.deaths = (uint32_t)options->deaths;
    say(INFO, "takes the place of a keeper that has ended; engine %d serves", (int)peer.pid);
}

int keeper_run(const struct options *options)
{
    char number[16];
    int signals = open_signals();

    if (signals < 0) {
        say(ERROR, "no signals can be waited for: %s", strerror(errno));
        return 1;
    }
    keeper.serving = keeper.spare = (struct engine){.state = NONE, .pidfd = -1, .socket = -1, .deadline_ns = NEVER, .spare_told = -1};
    keeper.words[0] = options->command;
    keeper.want_spare = options->spare;
    keeper.burst = options->burst;
    allow_files();
    store_connect_systemd(&keeper.store);
    store_import(&keeper.store);
    if (options->adopt_socket >= 0)
        adopt(options);
    (void)snprintf(number, sizeof(number), "%d", PC_KEEPER_FD);
    (void)setenv("POSTCOPY_KEEPER", number, 1);
    for (step(); !keeper.ending; step())
        turn(signals);
    if (keeper.spare.state != NONE && !keeper.spare.ended) {
        engine_signal(&keeper.spare, SIGKILL);
        (void)waitpid(keeper.spare.pid, NULL, 0);
    }
    return keeper.status;
}
