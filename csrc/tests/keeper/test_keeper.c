/* SPDX-License-Identifier: Apache-2.0
 *
 * The keeper with toy engines: this program is the keeper (in a child) and, started by it, the engine. A toy engine does what
 * the letter says that a client has sent on a connection, and answers with a struct report.
 */
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "keeper/keeper.h"
#include "tests/support/test.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DEATHS 20 /* a process with a sanitizer takes long to start */
#else
#define DEATHS 100
#endif

/* ---- messages, as an engine sends and receives them ---- */

struct heard {
    struct {
        uint32_t kind;
        int32_t value;
    } head;
    char text[PC_KEEPER_TEXT_BYTES + 1];
    int fds[PC_KEEPER_FDS];
    int fd_count;
};

static ssize_t send_raw(int sock, const void *data, size_t bytes, const int *fds, size_t count, int flags)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int) * 253)];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = bytes};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    if (count) {
        struct cmsghdr *header = &control.align;

        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        *header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int) * count), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(header), fds, sizeof(int) * count);
    }
    return sendmsg(sock, &message, MSG_NOSIGNAL | flags);
}

static ssize_t say_to(int sock, uint32_t kind, int32_t value, const char *text, size_t bytes, const int *fds, size_t count, int flags)
{
    char data[sizeof(uint32_t) + sizeof(int32_t) + PC_KEEPER_TEXT_BYTES + 100];

    memcpy(data, &kind, sizeof(kind));
    memcpy(data + 4, &value, sizeof(value));
    memcpy(data + 8, text, bytes);
    return send_raw(sock, data, 8 + bytes, fds, count, flags);
}

/* False at the end of the connection. Connections that come while an answer is waited for are not lost: see `waiting`. */
static bool hear(int sock, struct heard *heard)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int) * PC_KEEPER_FDS)];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = heard, .iov_len = sizeof(heard->head) + PC_KEEPER_TEXT_BYTES};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    ssize_t bytes = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);

    if (bytes < (ssize_t)sizeof(heard->head))
        return false;
    heard->text[bytes - (ssize_t)sizeof(heard->head)] = '\0';
    heard->fd_count = 0;
    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message); cmsg; cmsg = CMSG_NXTHDR(&message, cmsg)) {
        heard->fd_count = (int)((cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(heard->fds, CMSG_DATA(cmsg), (size_t)heard->fd_count * sizeof(int));
    }
    return true;
}

/* ---- the toy engine ---- */

struct report {
    pid_t pid;
    int32_t deaths, names, fds, error, spare, mode;
    char why[200];
};

static struct {
    struct heard waiting[64]; /* connections that came before they could be looked at */
    int waiting_count;
    struct report report;
    bool leave;
} toy;

static int answer_of(int32_t id)
{
    struct heard heard;

    while (hear(PC_KEEPER_FD, &heard)) {
        if (heard.head.kind == PC_KEEPER_ANSWER && heard.head.value == id) {
            int32_t error;

            memcpy(&error, heard.text, sizeof(error));
            (void)snprintf(toy.report.why, sizeof(toy.report.why), "%.199s", heard.text + sizeof(error));
            return error;
        }
        if (heard.head.kind == PC_KEEPER_ENTRY && toy.waiting_count < 64)
            toy.waiting[toy.waiting_count++] = heard;
        if (heard.head.kind == PC_KEEPER_SPARE)
            toy.report.spare = heard.head.value;
        if (heard.head.kind == PC_KEEPER_LEAVE)
            toy.leave = true;
    }
    _exit(9);
}

static int put(const char *name, int count)
{
    int fds[PC_KEEPER_FDS + 8] = {0}, error; /* count may be 0 */

    for (int i = 0; i < count; i++)
        fds[i] = memfd_create("toy", MFD_CLOEXEC);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 77, name, strlen(name), fds, (size_t)count, 0) > 0);
    error = answer_of(77);
    for (int i = 0; i < count; i++)
        close(fds[i]);
    if (!error) {
        toy.report.names++;
        toy.report.fds += count;
    }
    return error;
}

/* Puts that must not be taken; how many were. */
static int wrongs(void)
{
    char longest[PC_KEEPER_NAME_BYTES + 2], text[PC_KEEPER_TEXT_BYTES + 50];
    int taken = 0, memory = memfd_create("toy", 0), pipes[2], tcp = socket(AF_INET, SOCK_STREAM, 0);
    int many[200];
    const char *names[] = {"", "with space", "with:colon", "new\nline", longest, "umlaut\xc3\xa4"};

    memset(longest, 'n', sizeof(longest) - 1);
    longest[sizeof(longest) - 1] = '\0';
    memset(text, 't', sizeof(text));
    CHECK(!pipe(pipes));
    for (size_t i = 0; i < sizeof(many) / sizeof(many[0]); i++)
        many[i] = memory;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 5, names[i], strlen(names[i]), &memory, 1, 0) > 0);
        taken += !answer_of(5);
    }
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 6, "no\0thing", 8, &memory, 1, 0) > 0);
    taken += !answer_of(6);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 7, "nothing", 7, NULL, 0, 0) > 0);
    taken += !answer_of(7);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 8, "pipe", 4, pipes, 1, 0) > 0);
    taken += !answer_of(8);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 9, "tcp", 3, &tcp, 1, 0) > 0);
    taken += !answer_of(9);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 10, "many", 4, many, PC_KEEPER_FDS + 1, 0) > 0);
    taken += !answer_of(10);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 11, "many", 4, many, 200, 0) > 0);
    taken += !answer_of(11);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 12, text, PC_KEEPER_TEXT_BYTES + 40, &memory, 1, 0) > 0);
    taken += !answer_of(12);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 13, "pager", 5, &memory, 1, 0) > 0); /* the name of the listening socket */
    taken += !answer_of(13);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_UPGRADE, 14, "no NUL", 6, NULL, 0, 0) > 0);
    taken += !answer_of(14);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_UPGRADE, 15, "relative", 9, NULL, 0, 0) > 0);
    taken += !answer_of(15);
    memset(text, 0, sizeof(text)); /* more words than a command may have */
    text[0] = '/';
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_UPGRADE, 16, text, PC_KEEPER_TEXT_BYTES, NULL, 0, 0) > 0);
    taken += !answer_of(16);
    /* Not answered: */
    CHECK(send_raw(PC_KEEPER_FD, "x", 1, many, 3, 0) > 0);
    CHECK(say_to(PC_KEEPER_FD, 12345, 0, text, 100, many, 3, 0) > 0);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_HELLO, 999, text, 100, many, 3, 0) > 0);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_READY, 0, text, 3, many, 3, 0) > 0);
    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_DROP, 17, "nobody", 6, many, 3, 0) > 0);
    CHECK_EQ(answer_of(17), 0);
    close(memory);
    close(tcp);
    close(pipes[0]);
    close(pipes[1]);
    return taken;
}

static void upgrade(const char *word, const char *mode)
{
    char text[300];
    int bytes = snprintf(text, sizeof(text), "%s%cengine%c%s", word, 0, 0, mode) + 1;

    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_UPGRADE, 21, text, (size_t)bytes, NULL, 0, 0) > 0);
    toy.report.error = answer_of(21);
}

/* Everything that is asked while another command is started is answered; how many answers there were. */
static int ask_beside_an_upgrade(void)
{
    const char word[] = "/nonexistent/engine";
    int sent = 0, answers = 0;
    bool refused = false;
    struct heard heard;

    CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_UPGRADE, 21, word, sizeof(word), NULL, 0, 0) > 0);
    while (!refused || answers < sent) {
        for (; !refused && sent - answers < 4; sent++)
            CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_DROP, 100, "nobody", 6, NULL, 0, 0) > 0);
        CHECK(hear(PC_KEEPER_FD, &heard));
        answers += heard.head.kind == PC_KEEPER_ANSWER && heard.head.value == 100;
        refused = refused || (heard.head.kind == PC_KEEPER_ANSWER && heard.head.value == 21);
    }
    return answers;
}

static void act(const struct heard *connection)
{
    int memory = memfd_create("toy", MFD_CLOEXEC);
    char letter = 0, name[100];

    if (recv(connection->fds[0], &letter, 1, 0) < 0 && errno == EAGAIN) {
        struct pollfd readable = {.fd = connection->fds[0], .events = POLLIN};

        (void)poll(&readable, 1, 10000);
        (void)recv(connection->fds[0], &letter, 1, 0);
    }
    toy.report.error = 0;
    switch (letter) {
    case 'p': /* puts two */
        toy.report.error = put(connection->text, 2);
        break;
    case 'd': /* puts, and dies before it hears that this was done */
        CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 1, connection->text, strlen(connection->text), &memory, 1, 0) > 0);
        (void)raise(SIGKILL);
        break;
    case 'w':
        toy.report.error = wrongs();
        break;
    case 'm': /* many descriptors, until there is no room */
        for (int i = 0; !toy.report.error; i++) {
            (void)snprintf(name, sizeof(name), "many-%d", i);
            toy.report.error = put(name, 10);
        }
        break;
    case 'n': /* many names, and none of them afterwards */
        for (int i = 0; !toy.report.error; i++) {
            (void)snprintf(name, sizeof(name), "name-%d", i);
            toy.report.error = put(name, 1);
        }
        for (int i = 0; i < PC_KEEPER_ENTRIES; i++) {
            (void)snprintf(name, sizeof(name), "name-%d", i);
            CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_DROP, 3, name, strlen(name), NULL, 0, 0) > 0);
            CHECK_EQ(answer_of(3), 0);
        }
        break;
    case 'f': /* a flood: sends as long as anything fits, again and again, hears nothing, and dies of it */
        for (int times = 0; times < 50; times++) {
            struct pollfd writable = {.fd = PC_KEEPER_FD, .events = POLLOUT};

            while (say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 1, "flood", 5, &memory, 1, MSG_DONTWAIT) > 0) {
            }
            (void)poll(&writable, 1, 20);
        }
        (void)raise(SIGKILL);
        break;
    case 'c': /* closes its end, and lives on */
        close(PC_KEEPER_FD);
        for (;;)
            pause();
    case 'e': /* an empty message */
        (void)send(PC_KEEPER_FD, "", 0, 0);
        for (;;)
            pause();
    case 'u':
        upgrade("/proc/self/exe", "2");
        break;
    case 'U': /* its program does not exist */
        upgrade("/nonexistent/engine", "2");
        break;
    case 'F': /* it cannot read the records here */
        upgrade("/proc/self/exe", "f");
        break;
    case 'T': /* it dies when it is to serve */
        upgrade("/proc/self/exe", "t");
        break;
    case 'q':
        CHECK(ask_beside_an_upgrade() > 0);
        break;
    case 'b': /* dies while another command is started, which never says HELLO */
        CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_UPGRADE, 21, "/proc/self/exe\0engine\0b", 24, NULL, 0, 0) > 0);
        CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_DROP, 1, "nobody", 6, NULL, 0, 0) > 0);
        CHECK_EQ(answer_of(1), 0);
        (void)raise(SIGKILL);
        break;
    case 'z': /* goes on when it is told to end */
        (void)signal(SIGTERM, SIG_IGN);
        break;
    case 'x':
        _exit(0);
    case 'y':
        _exit(3);
    default:
        break;
    }
    close(memory);
    (void)send(connection->fds[0], &toy.report, sizeof(toy.report), MSG_NOSIGNAL);
    close(connection->fds[0]);
    if (letter != 'p') {
        CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_DROP, 2, connection->text, strlen(connection->text), NULL, 0, 0) > 0);
        CHECK_EQ(answer_of(2), 0);
    }
}

static void stop(int number)
{
    (void)number;
    (void)say_to(PC_KEEPER_FD, PC_KEEPER_END, 5, "", 0, NULL, 0, 0);
    _exit(5);
}

__attribute__((noreturn)) static void be_engine(const char *mode)
{
    int32_t formats[2] = {*mode == 'f' ? 8 : 1, *mode == 'f' ? 9 : 3};
    struct heard heard = {0};

    if (*mode == 'e')
        _exit(4); /* before it has said anything */
    while (*mode == 'b')
        pause();
    (void)signal(SIGTERM, stop);
    toy.report.pid = getpid();
    toy.report.mode = *mode;
    (void)say_to(PC_KEEPER_FD, PC_KEEPER_HELLO, PC_KEEPER_PROTOCOL, (const char *)formats, sizeof(formats), NULL, 0, 0);
    while (heard.head.kind != PC_KEEPER_GO) {
        if (!hear(PC_KEEPER_FD, &heard))
            _exit(9);
        if (heard.head.kind != PC_KEEPER_ENTRY)
            continue;
        if (!strncmp(heard.text, "pager", 5) && heard.text[5] && heard.fd_count == 1)
            toy.waiting[toy.waiting_count++] = heard; /* a connection that was not looked at */
        else if (strcmp(heard.text, "pager"))
            toy.report.names++, toy.report.fds += heard.fd_count;
    }
    toy.report.deaths = heard.head.value;
    (void)snprintf(toy.report.why, sizeof(toy.report.why), "%.199s", heard.text);
    if (*mode == 't' || *mode == 'g')
        (void)raise(SIGKILL);
    (void)say_to(PC_KEEPER_FD, PC_KEEPER_READY, 0, "", 0, NULL, 0, 0);
    if (*mode == 'l')
        (void)raise(SIGABRT);
    while (!toy.leave) {
        if (toy.waiting_count) {
            heard = toy.waiting[--toy.waiting_count];
        } else if (!hear(PC_KEEPER_FD, &heard)) {
            _exit(9);
        } else if (heard.head.kind != PC_KEEPER_ENTRY) {
            toy.leave = heard.head.kind == PC_KEEPER_LEAVE;
            if (heard.head.kind == PC_KEEPER_SPARE)
                toy.report.spare = heard.head.value;
            continue;
        }
        act(&heard);
    }
    if (*mode == 's') /* which has nothing to say any more, and does not come to its end either */
        close(PC_KEEPER_FD);
    while (*mode == 'h' || *mode == 's') /* as one whose disk hangs */
        pause();
    _exit(0);
}

/* ---- the keeper, and its client ---- */

static struct {
    pid_t pid;
    int listener, errors; /* what it says, in a file */
    struct sockaddr_un address;
    socklen_t bytes;
} rig;

static void open_listener(void)
{
    int low = CHECK_SYS(socket(AF_UNIX, SOCK_STREAM, 0));

    rig.listener = CHECK_SYS(fcntl(low, F_DUPFD, 100)); /* where no engine's descriptor has to be */
    close(low);
    rig.address.sun_family = AF_UNIX;
    CHECK_SYS(bind(rig.listener, (struct sockaddr *)&rig.address, sizeof(sa_family_t))); /* a name that the kernel chooses */
    rig.bytes = sizeof(rig.address);
    CHECK_SYS(getsockname(rig.listener, (struct sockaddr *)&rig.address, &rig.bytes));
    CHECK_SYS(listen(rig.listener, 64));
    low = CHECK_SYS(memfd_create("errors", 0));
    rig.errors = CHECK_SYS(fcntl(low, F_DUPFD, 101));
    close(low);
}

/* `passed`: that many descriptors from 3 on are passed as by systemd, with these names; the listening socket alone when it is 0. */
static void run_keeper(const char *mode, const char *burst, bool spare, int passed, const char *names)
{
    char number[16];

    (void)fflush(stdout);
    rig.pid = CHECK_SYS(fork());
    if (rig.pid)
        return;
    CHECK_SYS(dup2(rig.errors, STDERR_FILENO));
    if (!passed)
        CHECK_SYS(dup2(rig.listener, 3));
    (void)snprintf(number, sizeof(number), "%d", getpid());
    setenv("LISTEN_PID", number, 1);
    (void)snprintf(number, sizeof(number), "%d", passed ? passed : 1);
    setenv("LISTEN_FDS", number, 1);
    setenv("LISTEN_FDNAMES", passed ? names : "pager", 1);
    {
        char none[] = "--no-spare", burst_[] = "--burst", burst_n[8], end[] = "--", self[] = "/proc/self/exe", engine[] = "engine", mode_[8], *words[16];
        int count = 1;

        (void)snprintf(burst_n, sizeof(burst_n), "%s", burst);
        (void)snprintf(mode_, sizeof(mode_), "%s", mode);
        words[0] = self;
        words[count++] = burst_;
        words[count++] = burst_n;
        if (!spare)
            words[count++] = none;
        words[count++] = end;
        words[count++] = self;
        words[count++] = engine;
        words[count++] = mode_;
        words[count] = NULL;
        _exit(keeper_main(count, words));
    }
}

static void start(const char *mode, const char *burst, bool spare)
{
    open_listener();
    run_keeper(mode, burst, spare, 0, NULL);
}

static int call(char letter)
{
    int sock = CHECK_SYS(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));

    CHECK_SYS(connect(sock, (struct sockaddr *)&rig.address, rig.bytes));
    CHECK_EQ(send(sock, &letter, 1, 0), 1);
    return sock;
}

/* False when no answer comes, since the keeper has ended. It has the connection too, so the death of an engine does not end it. */
static bool answered(int sock, struct report *report)
{
    ssize_t bytes = recv(sock, report, sizeof(*report), MSG_WAITALL);

    close(sock);
    return bytes == (ssize_t)sizeof(*report);
}

static struct report ask(char letter)
{
    struct report report;

    CHECK(answered(call(letter), &report));
    return report;
}

static int wait_status(void)
{
    int status;

    CHECK_EQ(waitpid(rig.pid, &status, 0), rig.pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static bool has_said(const char *what)
{
    static char text[65536];
    ssize_t bytes = pread(rig.errors, text, sizeof(text) - 1, 0);

    text[bytes > 0 ? bytes : 0] = '\0';
    return strstr(text, what) != NULL;
}

static void wait_said(const char *what)
{
    while (!has_said(what)) /* the case's deadline ends it */
        pc_sleep_ns(5 * MS);
}

static struct report wait_spare(void)
{
    struct report report = ask('i');

    while (!report.spare) {
        pc_sleep_ns(5 * MS);
        report = ask('i');
    }
    return report;
}

/* What the engine says that comes after so many deaths: the ones before may still answer. */
static struct report ask_after(int deaths)
{
    struct report report;

    do
        report = ask('i');
    while (report.deaths < deaths);
    CHECK_EQ(report.deaths, deaths);
    return report;
}

static int open_fds(void)
{
    char path[64], command[128];
    FILE *list;
    int count = 0;

    (void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)rig.pid);
    (void)snprintf(command, sizeof(command), "ls %s | wc -l", path);
    list = popen(command, "r");
    CHECK(list && fscanf(list, "%d", &count) == 1);
    (void)pclose(list);
    return count;
}

/* ---- cases ---- */

static void another_engine_goes_on(void)
{
    struct report first, next;

    start("1", "5", true);
    CHECK_EQ(ask('p').error, 0);
    first = wait_spare();
    CHECK_EQ(first.deaths, 0);
    CHECK_SYS(kill(first.pid, SIGKILL));
    next = ask('i');
    CHECK(next.pid != first.pid);
    CHECK_EQ(next.deaths, 1);
    CHECK_EQ(next.names, 1);
    CHECK_EQ(next.fds, 3); /* with the connection */
    CHECK(strstr(next.why, "killed by signal 9"));
    CHECK(has_said("another one goes on, with"));
}

static void many_deaths(void)
{
    struct report report;

    start("1", "1000", true);
    CHECK_EQ(ask('p').error, 0);
    for (int i = 0; i < DEATHS; i++) {
        report = ask('i');
        CHECK_EQ(report.deaths, i);
        CHECK_EQ(report.fds, i ? 3 : 2); /* with the connection */
        CHECK_SYS(kill(report.pid, i % 3 ? SIGKILL : SIGABRT));
    }
    CHECK_EQ(ask('i').deaths, DEATHS);
    CHECK_SYS(kill(rig.pid, SIGTERM));
    CHECK_EQ(wait_status(), 5);
    CHECK_EQ(waitpid(-1, NULL, WNOHANG), -1); /* nothing of it is left */
}

static void what_was_sent_before_a_death_counts(void)
{
    struct report report;

    start("1", "1000", false);
    CHECK_EQ(ask('i').fds, 0);
    close(call('d'));
    report = ask_after(1);
    CHECK_EQ(report.fds, 2);
}

static void a_connection_that_nobody_looked_at(void)
{
    struct report report;
    int early, killer;

    start("1", "1000", false);
    report = ask('i');
    CHECK_SYS(kill(report.pid, SIGSTOP));
    early = call('i'); /* accepted, and told to an engine that does not look */
    killer = call('i');
    CHECK_SYS(kill(report.pid, SIGKILL));
    CHECK(answered(early, &report));
    CHECK(answered(killer, &report));
    CHECK_EQ(report.deaths, 1);
}

static void wrong_messages(void)
{
    struct report report;
    int before;

    start("1", "5", false);
    (void)ask('i');
    before = open_fds();
    for (int i = 0; i < 10; i++) {
        report = ask('w');
        CHECK_EQ(report.error, 0); /* none was taken */
    }
    CHECK_EQ(ask('i').deaths, 0);
    CHECK(open_fds() <= before + 3); /* the last connections may not have been dropped yet */
    CHECK(has_said("means nothing here"));
}

static void a_flood(void)
{
    struct report report;

    start("1", "1000", true);
    (void)wait_spare();
    close(call('f'));
    report = ask_after(1);
    CHECK(report.fds <= PC_KEEPER_FDS + 1);
}

static void an_engine_without_its_senses(void)
{
    struct report report;
    int calls[2];

    start("1", "1000", true);
    (void)wait_spare();
    calls[0] = call('c'); /* the next engine finds it, and does the same: */
    wait_said("killed by signal 9");
    close(calls[0]);
    calls[1] = call('e');
    close(calls[1]);
    do
        report = ask('i');
    while (report.deaths < 2);
}

static void few_descriptors(void)
{
    struct rlimit limit = {200, 200};
    struct report report;
    int fds;

    CHECK_SYS(setrlimit(RLIMIT_NOFILE, &limit));
    start("1", "1000", true);
    report = ask('m');
    CHECK_EQ(report.error, EMFILE);
    CHECK(strstr(report.why, "ulimit -Hn"));
    fds = report.fds;
    CHECK(fds >= 40); /* a quarter: the next engine has to have them too */
    /* There is room for another engine, if not for a connection. */
    CHECK_SYS(kill(report.pid, SIGKILL));
    report = ask('i');
    CHECK_EQ(report.deaths, 1);
    CHECK_EQ(report.fds, fds);
}

/* What a client has sent, and nobody has received, is closed with its connection. */
static void a_close_that_would_wait(void)
{
    struct linger linger = {.l_onoff = 1, .l_linger = 3600};
    struct sockaddr_in loopback = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof(loopback);
    static char much[65536];
    struct report report;
    int listener, lingers, sock;

    start("1", "5", false);
    listener = CHECK_SYS(socket(AF_INET, SOCK_STREAM, 0)); /* not before: the keeper would have it too */
    lingers = CHECK_SYS(socket(AF_INET, SOCK_STREAM, 0));
    CHECK_SYS(bind(listener, (struct sockaddr *)&loopback, bytes));
    CHECK_SYS(getsockname(listener, (struct sockaddr *)&loopback, &bytes));
    CHECK_SYS(listen(listener, 1));
    CHECK_SYS(connect(lingers, (struct sockaddr *)&loopback, bytes));
    while (send(lingers, much, sizeof(much), MSG_DONTWAIT) > 0) {
    }
    CHECK_SYS(setsockopt(lingers, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)));
    report = ask('i');
    CHECK_SYS(kill(report.pid, SIGSTOP)); /* until all is sent */
    sock = call('i');
    CHECK_EQ(send_raw(sock, "x", 1, &lingers, 1, 0), 1);
    close(lingers);
    CHECK_SYS(kill(report.pid, SIGCONT));
    CHECK(answered(sock, &report));
    CHECK_EQ(ask('i').pid, report.pid);
    CHECK_EQ(ask('i').pid, report.pid);
}

static void no_more_than_systemd_keeps(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int manager = CHECK_SYS(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    size_t bytes;

    (void)snprintf(address.sun_path + 1, sizeof(address.sun_path) - 1, "postcopy-test-%d", getpid());
    bytes = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(address.sun_path + 1);
    CHECK_SYS(bind(manager, (struct sockaddr *)&address, (socklen_t)bytes));
    address.sun_path[0] = '@';
    setenv("NOTIFY_SOCKET", address.sun_path, 1);
    setenv("FDSTORE", "5", 1);
    start("1", "5", false);
    CHECK_EQ(ask('p').error, 0); /* the listening socket, the connection, and two */
    CHECK_EQ(ask('p').error, EMFILE);
}

static void many_names(void)
{
    struct rlimit limit;
    struct report report;

    CHECK_SYS(getrlimit(RLIMIT_NOFILE, &limit));
    if (limit.rlim_max / ENGINE_FDS < PC_KEEPER_ENTRIES + 10)
        SKIP("files", "a process may not have %d open files here", ENGINE_FDS * (PC_KEEPER_ENTRIES + 10));
    start("1", "5", false);
    report = ask('n');
    CHECK_EQ(report.error, ENOSPC);
    CHECK_EQ(ask('p').error, 0);
}

static void ends_in_order(void)
{
    struct report report;

    start("1", "5", true);
    (void)wait_spare();
    (void)answered(call('x'), &report);
    CHECK_EQ(wait_status(), 0);
    run_keeper("e", "5", true, 0, NULL);
    CHECK_EQ(wait_status(), 4); /* a wrong option: not tried again */
    run_keeper("g", "5", true, 0, NULL);
    CHECK_EQ(wait_status(), 128 + SIGKILL);
    run_keeper("1", "5", true, 0, NULL);
    report = wait_spare();
    CHECK_SYS(kill(rig.pid, SIGTERM));
    CHECK_EQ(wait_status(), 5);
    CHECK_EQ(kill(report.pid, 0), -1);
}

static void a_status_that_is_no_order(void)
{
    start("1", "5", true);
    (void)wait_spare();
    close(call('y'));
    (void)ask_after(1);
    CHECK(has_said("has ended with status 3"));
}

/* It was told to end, had something to see through, and crashed: VMs still wait for it. */
static void a_crash_before_the_end(void)
{
    struct report report;

    start("1", "5", true);
    (void)ask('z');
    CHECK_SYS(kill(rig.pid, SIGTERM));
    (void)ask('i');
    report = ask('u');
    CHECK_EQ(report.error, EBUSY);
    CHECK(strstr(report.why, "told to end, by signal 15"));
    close(call('y'));
    CHECK_EQ(wait_status(), 5); /* the next one was told so too */
    CHECK(has_said("has ended with status 3; another one goes on"));
    run_keeper("1", "5", true, 0, NULL);
    (void)ask('z');
    CHECK_SYS(kill(rig.pid, SIGTERM));
    (void)ask('i');
    CHECK_SYS(kill(rig.pid, SIGTERM)); /* once more: somebody insists */
    (void)ask('i');
    close(call('y'));
    CHECK_EQ(wait_status(), 3);
}

static void dies_again_and_again(void)
{
    start("l", "1", true);
    wait_said("they die again and again, so the next one waits a while");
    CHECK_SYS(kill(rig.pid, SIGTERM)); /* ends it, whether an engine serves in this moment or not */
    pc_sleep_ns(10 * MS);
    CHECK_SYS(kill(rig.pid, SIGTERM));
    CHECK(wait_status() > 0);
}

static void another_version(void)
{
    struct report old, report;

    start("1", "5", true);
    CHECK_EQ(ask('p').error, 0);
    old = wait_spare();
    CHECK_EQ(ask('u').error, 0);
    report = ask('i');
    CHECK_EQ(report.mode, '2');
    CHECK_EQ(report.fds, 3);
    CHECK_EQ(report.deaths, 0);
    CHECK(strstr(report.why, "was replaced"));
    CHECK(report.pid != old.pid);
    report = wait_spare(); /* the spare is of that version too */
    CHECK_SYS(kill(report.pid, SIGKILL));
    CHECK_EQ(ask('i').mode, '2');
}

static void cannot_leave(const char *mode)
{
    struct report report;

    start(mode, "5", true);
    CHECK_EQ(ask('p').error, 0);
    (void)wait_spare();
    CHECK_EQ(ask('u').error, 0);
    report = ask('i');
    CHECK(has_said("takes too long to end, and is killed"));
    CHECK_EQ(report.mode, '2');
    CHECK_EQ(report.fds, 3);
    CHECK_EQ(report.deaths, 0);
}

static void an_engine_that_cannot_leave(void)
{
    cannot_leave("h");
}

static void an_engine_that_is_silent_and_cannot_leave(void)
{
    cannot_leave("s");
}

static void a_version_that_does_not_come(void)
{
    struct report old, report;

    start("1", "5", true);
    CHECK_EQ(ask('p').error, 0);
    old = wait_spare();
    report = ask('U');
    CHECK_EQ(report.error, ECHILD);
    CHECK(strstr(report.why, "ended with status 127"));
    report = ask('F');
    CHECK_EQ(report.error, ECHILD);
    CHECK(strstr(report.why, "it reads records of formats 8 to 9, and those of the VMs here are of format 3"));
    CHECK_EQ(ask('i').pid, old.pid);
    (void)wait_spare();
    CHECK_EQ(ask('q').error, 0);
    /* One that says it could serve, and cannot. */
    CHECK_EQ(ask('T').error, 0);
    report = ask('i');
    CHECK_EQ(report.mode, '1');
    CHECK_EQ(report.fds, 3);
    CHECK(strstr(report.why, "before it served"));
    CHECK(has_said("back to the command before"));
    (void)wait_spare();
    close(call('b'));
    report = ask_after(2);
    CHECK_EQ(report.mode, '1');
}

/* This process is the engine, whose keeper has ended. */
static void a_keeper_for_an_engine_that_has_none(void)
{
    char adopt[32], number[] = "--adopt", end[] = "--", self[] = "/proc/self/exe", engine[] = "engine", mode[] = "1";
    struct report report;
    pid_t serving;
    int pair[2];

    open_listener();
    serving = CHECK_SYS(fork());
    if (!serving) {
        int fds[2], pidfd = (int)CHECK_SYS(syscall(SYS_pidfd_open, getpid(), 0));

        CHECK_SYS(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
        rig.pid = CHECK_SYS(fork());
        if (!rig.pid) {
            char *words[] = {self, number, adopt, end, self, engine, mode, NULL};

            (void)snprintf(adopt, sizeof(adopt), "%d,%d", pair[1], pidfd);
            close(pair[0]);
            (void)dup2(rig.errors, STDERR_FILENO);
            (void)setpgid(0, 0);
            _exit(keeper_main(7, words));
        }
        close(pair[1]);
        CHECK_SYS(dup2(pair[0], PC_KEEPER_FD));
        (void)say_to(PC_KEEPER_FD, PC_KEEPER_HELLO, PC_KEEPER_PROTOCOL, "\1\0\0\0\1\0\0", 8, NULL, 0, 0);
        CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 1, "pager", 5, &rig.listener, 1, 0) > 0);
        CHECK_EQ(answer_of(1), 0);
        fds[0] = fds[1] = rig.errors;
        CHECK(say_to(PC_KEEPER_FD, PC_KEEPER_PUT, 2, "vm", 2, fds, 2, 0) > 0);
        CHECK_EQ(answer_of(2), 0);
        _exit(0); /* which its keeper does not see: without END it is a death */
    }
    CHECK_EQ(waitpid(serving, NULL, 0), serving);
    report = ask('i');
    CHECK_EQ(report.deaths, 1);
    CHECK_EQ(report.fds, 2);
    wait_said("takes the place of a keeper that has ended; engine");
    (void)answered(call('x'), &report); /* ends both */
    wait_said("and this process with it: VMs that are still there wait for ever");
}

/* Systemd keeps a copy of everything, and gives it to the next keeper. */
static void with_systemd(void)
{
    char path[64], names[256] = "pager";
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int manager = CHECK_SYS(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)), stored = 0;
    struct report report;

    (void)snprintf(path, sizeof(path), "@postcopy-test-%d", getpid());
    memcpy(address.sun_path + 1, path + 1, strlen(path) - 1);
    CHECK_SYS(bind(manager, (struct sockaddr *)&address, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path))));
    setenv("NOTIFY_SOCKET", path, 1);
    setenv("FDSTORE", "100", 1);
    open_listener();
    manager = CHECK_SYS(fcntl(manager, F_DUPFD_CLOEXEC, 130));
    CHECK_SYS(dup2(rig.listener, 3)); /* the socket of the unit */
    run_keeper("1", "5", true, 1, names);
    CHECK_EQ(ask('p').error, 0);
    report = ask('i');
    CHECK_EQ(report.fds, 2);
    CHECK_SYS(kill(rig.pid, SIGKILL));
    CHECK_EQ(wait_status(), -SIGKILL);
    CHECK_SYS(kill(report.pid, SIGKILL)); /* as the unit's others are */
    for (;;) {
        union {
            char bytes[CMSG_SPACE(sizeof(int) * PC_KEEPER_FDS)];
            struct cmsghdr align;
        } control;
        char text[200];
        struct iovec part = {text, sizeof(text) - 1};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
        ssize_t bytes = recvmsg(manager, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        struct cmsghdr *cmsg = bytes > 0 ? CMSG_FIRSTHDR(&message) : NULL;
        int fds[PC_KEEPER_FDS], count = cmsg ? (int)((cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;

        if (bytes < 0)
            break;
        text[bytes] = '\0';
        CHECK(strstr(text, "FDPOLL=0\nFDNAME=pager."));
        if (strncmp(text, "FDSTORE=1\n", 10))
            continue; /* FDSTOREREMOVE of the second connection */
        memcpy(fds, CMSG_DATA(cmsg), (size_t)count * sizeof(int));
        if (!strstr(text, "pager.1")) {
            close(fds[0]);
            continue;
        }
        for (int i = 0; i < count; i++) {
            int high = CHECK_SYS(fcntl(fds[i], F_DUPFD_CLOEXEC, 140)); /* so that none of 3 to 6 is one of them */

            close(fds[i]);
            CHECK_EQ(high, 140 + stored);
            strcat(names, ":pager.1");
            stored++;
        }
    }
    CHECK_EQ(stored, 3);
    for (int i = 0; i < stored; i++)
        CHECK_SYS(dup2(140 + i, 4 + i));
    run_keeper("1", "5", true, 1 + stored, names);
    report = ask('i');
    CHECK_EQ(report.names, 1);
    CHECK_EQ(report.fds, 3);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "engine"))
        be_engine(argv[2]);
    test_begin(argc, argv);
    RUN(another_engine_goes_on);
    RUN_FOR(many_deaths, 100);
    RUN(what_was_sent_before_a_death_counts);
    RUN(a_connection_that_nobody_looked_at);
    RUN(wrong_messages);
    RUN(a_flood);
    RUN(an_engine_without_its_senses);
    RUN(few_descriptors);
    RUN(a_close_that_would_wait);
    RUN(no_more_than_systemd_keeps);
    RUN_FOR(many_names, 60);
    RUN(ends_in_order);
    RUN(a_status_that_is_no_order);
    RUN(a_crash_before_the_end);
    RUN(dies_again_and_again);
    RUN(another_version);
    RUN(an_engine_that_cannot_leave);
    RUN(an_engine_that_is_silent_and_cannot_leave);
    RUN(a_version_that_does_not_come);
    RUN(a_keeper_for_an_engine_that_has_none);
    RUN(with_systemd);
    return test_end();
}
