/* SPDX-License-Identifier: Apache-2.0
 *
 * The fault thread: one for each shard, which waits for {userfaultfd, commands, urgent channel} and does everything in the path of
 * a fault. Requests leave and answers arrive on the shard's urgent channel; a turn of the loop does a bounded piece of work, then
 * looks at the userfaultfd again.
 *
 * Owns the urgent channel with its buffers, the commands that callers leave, and the loop. It ends with COMMAND_STOP.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "pager/pager.h"

/* A thread with a signal pending does not wait in a fault that a system call raised, but raises it again and again. After so
 * many repetitions in a row the fault thread rests between two reads of the userfaultfd, or it would burn a processor for as
 * long as the page takes; meanwhile a new fault waits so much longer. */
#define REPEATS_BEFORE_REST 64
#define REST_NS 500000
#define BUSY_TURNS 8 /* of a thread that busy-waits: in one of so many it looks at everything */
#define SMALL_RECEIVE_BYTES (64 * 1024)
#define TURN_NS 200000 /* what a turn may do for the channel, as the costs in pager.h estimate it */
/* So much work in a row that brought nothing new, and the channel is read at a sixteenth of the processor's time. */
#define USELESS_NS 5000000
#define USELESS_WEIGHT 16

/* ---- commands ----------------------------------------------------------------------------------------------------- */

void pc_command_push(struct command **stack, struct command *command)
{
    command->next = __atomic_load_n(stack, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(stack, &command->next, command, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
    }
}

void pc_commands_free(struct command **stack)
{
    struct command *command = __atomic_exchange_n(stack, NULL, __ATOMIC_SEQ_CST);

    while (command) {
        struct command *next = command->next;

        if (command->kind == COMMAND_ATTACH)
            pc_stream_close(&command->stream);
        free(command);
        command = next;
    }
}

void pc_shard_notify(struct shard *shard)
{
    uint64_t one = 1;

    (void)!write(shard->control_fd, &one, sizeof(one));
}

void pc_command_send(struct shard *shard, struct command *command)
{
    pc_command_push(&shard->commands, command);
    pc_shard_notify(shard);
}

struct command *pc_command_new(struct pc_pager *pager, enum command_kind kind, uint64_t runs)
{
    struct command *command;

    pc_commands_free(&pager->finished);
    command = calloc(1, sizeof(*command) + runs * sizeof(command->runs[0]));
    if (command) {
        command->kind = kind;
        command->stream.fd = -1;
    }
    return command;
}

int pc_pager_attach_urgent(struct pc_pager *pager, uint32_t shard_index, int fd, struct pc_tls *tls)
{
    struct shard *shard = pc_shard_at(pager, shard_index);
    struct command *command = NULL;
    struct pc_stream stream;
    int error = pc_stream_open(&stream, fd, tls, true);

    if (error)
        return error;
    if (shard)
        command = pc_command_new(pager, COMMAND_ATTACH, 0);
    error = !shard ? -EINVAL : !command ? -ENOMEM : 0;
    if (command)
        command->stream = stream;

    pthread_mutex_lock(&pager->channel_lock);
    if (!error && pager->disconnecting)
        error = -EBUSY;
    if (!error)
        pc_command_send(shard, command);
    pthread_mutex_unlock(&pager->channel_lock);
    if (error) {
        free(command);
        pc_stream_close(&stream);
    }
    return error;
}

/* ---- what is waited for ------------------------------------------------------------------------------------------ */

/* What a turn of the loop looks at, and what of it is ready. */
enum { READY_UFFD = 1, READY_COMMANDS = 2, READY_CHANNEL = 4 };

/* Has one descriptor waited for by the next wait: *watched says for what until now. That is the same from one fault to the next, so
 * that a wait costs one system call, which looks at what is ready only. False: the kernel has no memory for it now. */
static bool watch_fd(const struct shard *shard, int fd, uint32_t ready, uint32_t *watched, uint32_t wanted)
{
    struct epoll_event event = {.events = wanted, .data.u32 = ready};

    if (*watched == wanted)
        return true;
    if (epoll_ctl(shard->poll_fd, !*watched ? EPOLL_CTL_ADD : wanted ? EPOLL_CTL_MOD : EPOLL_CTL_DEL, fd, &event))
        return false;
    *watched = wanted;
    return true;
}

/* ---- the channel -------------------------------------------------------------------------------------------------- */

bool pc_queue_request(struct shard *shard, uint32_t block, uint64_t page, uint32_t id_bits)
{
    struct pc_frame frame = {.type = PC_FRAME_REQUEST,
                             .block = (uint16_t)block,
                             .first_page = page,
                             .pages = 1,
                             .request_id = (shard->next_request++ & ~(REQUEST_AHEAD | PC_PAGER_REQUEST_AGAIN)) | id_bits};

    if (shard->send_bytes + PC_FRAME_HEADER_BYTES > SEND_BYTES)
        return false;
    pc_frame_encode(&frame, shard->send + shard->send_bytes);
    shard->send_bytes += PC_FRAME_HEADER_BYTES;
    COUNT(shard->pager, requests, !(id_bits & PC_PAGER_REQUEST_AGAIN));
    return true;
}

static void close_stream(struct shard *shard, int error, const char *text)
{
    pc_requests_lost(shard);
    (void)watch_fd(shard, shard->stream.fd, 0, &shard->stream_watched, 0); /* others may have the connection open */
    /* Its text may be the stream's; and what comes of the event is a command, which waits for this thread. */
    if (text)
        pc_events_push(&shard->pager->events, PC_EVENT_CHANNEL_DOWN, PC_CHANNEL_URGENT, (int)shard->index, -error, "%s", text);
    pc_stream_close(&shard->stream);
    shard->receive_start = shard->receive_end = 0;
    shard->frame_checked = shard->frames_left = shard->stalled = false;
    shard->useless_ns = shard->read_at_ns = 0;
    shard->send_bytes = shard->send_done = 0;
}

static void flush_requests(struct shard *shard)
{
    size_t queued = shard->send_bytes;

    while (shard->stream.fd >= 0 && shard->send_done < shard->send_bytes) {
        struct iovec part = {.iov_base = shard->send + shard->send_done, .iov_len = shard->send_bytes - shard->send_done};
        ssize_t sent = shard->stream.write(&shard->stream, &part, 1, false);

        if (sent == -EAGAIN)
            return; /* poll tells when there is room */
        if (sent < 0) {
            close_stream(shard, (int)sent, pc_stream_why(&shard->stream, strerror((int)-sent)));
            return;
        }
        COUNT(shard->pager, bytes_sent, sent);
        shard->send_done += (size_t)sent;
    }
    if (queued) {
        shard->send_bytes = shard->send_done = 0;
        pc_requests_sent(shard);
        if (shard->send_full) {
            pc_request_pending(shard);
            shard->ahead_left = true; /* a turn at once: there is something to send */
        }
    }
}

/* Whether there were any. */
static bool receive_bytes(struct shard *shard)
{
    size_t room;
    ssize_t got;

    if (shard->receive_start == shard->receive_end)
        shard->receive_start = shard->receive_end = 0;
    room = RECEIVE_BYTES - shard->receive_end;
    if (room < SMALL_RECEIVE_BYTES && shard->receive_start) {
        memmove(shard->receive, shard->receive + shard->receive_start, shard->receive_end - shard->receive_start);
        shard->receive_end -= shard->receive_start;
        shard->receive_start = 0;
        room = RECEIVE_BYTES - shard->receive_end;
    }
    /* Small reads first: untouched parts of the buffer cost nothing, and 4 KiB pages never need them. */
    if (shard->receive_end - shard->receive_start < SMALL_RECEIVE_BYTES && room > SMALL_RECEIVE_BYTES)
        room = SMALL_RECEIVE_BYTES;
    got = shard->stream.read(&shard->stream, shard->receive + shard->receive_end, room, false);
    if (got == -EAGAIN)
        return false;
    if (got <= 0) {
        if (!got && shard->receive_end > shard->receive_start)
            close_stream(shard, -EPIPE, PC_STREAM_CUT_TEXT);
        else
            close_stream(shard, (int)got, got ? pc_stream_why(&shard->stream, strerror((int)-got)) : "the source closed the connection");
        return false;
    }
    COUNT(shard->pager, bytes_received, got);
    shard->receive_end += (size_t)got;
    return true;
}

/* The first frame that was received, if it is there as a whole. 1, 0, or an error with its line. */
static int next_frame(struct shard *shard, struct pc_frame *frame, const uint8_t **payload)
{
    const uint8_t *at = shard->receive + shard->receive_start;
    size_t have = shard->receive_end - shard->receive_start;
    int error;

    if (have < PC_FRAME_HEADER_BYTES)
        return 0;
    error = pc_decode_header(shard->pager, at, frame, &shard->frame);
    if (error)
        return error;
    *payload = at + PC_FRAME_HEADER_BYTES;
    if (have < PC_FRAME_HEADER_BYTES + (size_t)frame->payload_bytes)
        return 0;
    if (shard->frame_checked)
        return 1;
    error = pc_check_payload(frame, *payload, &shard->frame);
    if (error)
        return error;
    pc_spend(&shard->frame, frame->payload_bytes / BYTES_PER_NS);
    shard->frame.done = 0;
    shard->frame_checked = true;
    return 1;
}

/* Handles the frames that were received, as many as a turn may. */
static void handle_frames(struct shard *shard)
{
    struct progress *progress = &shard->frame;
    uint64_t spent_ns;
    int result = 0;

    progress->work_ns = TURN_NS;
    progress->fresh = 0;
    progress->text[0] = '\0';
    shard->stalled = false;
    while (progress->work_ns) {
        struct pc_frame frame;
        const uint8_t *payload = NULL;

        result = next_frame(shard, &frame, &payload);
        if (result <= 0)
            break;
        result = pc_handle_frame(shard->pager, &shard->channel, &frame, payload, progress);
        if (result || (frame.type != PC_FRAME_END && progress->done < frame.pages))
            break; /* the rest of it later */
        shard->frame_checked = false;
        shard->receive_start += PC_FRAME_HEADER_BYTES + (size_t)frame.payload_bytes;
        if (frame.flags & PC_FRAME_DEMAND && frame.request_id & REQUEST_AHEAD && shard->ahead_in_flight)
            shard->ahead_in_flight--;
    }
    shard->frames_left = !progress->work_ns;
    spent_ns = TURN_NS - progress->work_ns;
    shard->useless_ns = progress->fresh ? 0 : shard->useless_ns + spent_ns;
    if (shard->useless_ns > USELESS_NS)
        shard->read_at_ns = pc_now_ns() + USELESS_WEIGHT * spent_ns;
    if (result == -EAGAIN) {
        shard->stalled = true;
        shard->frames_left = false;
        pc_retry_later(shard);
    } else if (result < 0) {
        if (result == -EBADMSG)
            COUNT(shard->pager, frames_refused, 1);
        close_stream(shard, result, progress->text[0] ? progress->text : strerror(-result));
    } else if (progress->fresh) {
        shard->retry_ns = 0;
    }
}

static void adopt_stream(struct shard *shard, const struct pc_stream *stream)
{
    if (shard->stream.fd >= 0)
        close_stream(shard, 0, NULL);
    shard->stream = *stream;
    shard->channel.error_reported = false;
    pc_local_schedule(shard);
    pc_request_again(shard);
    shard->ahead_in_flight = 0;
    pc_cursor_restart(shard, &shard->sweep);
}

/* ---- the loop ----------------------------------------------------------------------------------------------------- */

static void handle_command(struct shard *shard, struct command *command, bool *go_on)
{
    switch (command->kind) {
    case COMMAND_ATTACH:
        adopt_stream(shard, &command->stream);
        command->stream.fd = -1;
        pc_command_push(&shard->pager->finished, command);
        break;
    case COMMAND_PREFETCH:
        pc_prefetch_add(shard, command);
        break;
    case COMMAND_RUNS:
        pc_prefetch_add_runs(shard, command);
        break;
    case COMMAND_DISCONNECT: /* its caller waits for it, and has it on its stack */
        if (shard->stream.fd >= 0)
            close_stream(shard, 0, NULL);
        (void)sem_post(command->done);
        break;
    default:
        *go_on = false;
    }
}

/* What callers want of this thread. False: stop. */
static bool handle_commands(struct shard *shard)
{
    struct command *command, *first = NULL;
    uint64_t drained;
    bool go_on = true;

    (void)!read(shard->control_fd, &drained, sizeof(drained));
    command = __atomic_exchange_n(&shard->commands, NULL, __ATOMIC_SEQ_CST);
    while (command) { /* the last one came first */
        struct command *next = command->next;

        command->next = first;
        first = command;
        command = next;
    }
    while (first) {
        command = first;
        first = first->next;
        handle_command(shard, command, &go_on);
    }
    if (__atomic_exchange_n(&shard->sweep_again, false, __ATOMIC_SEQ_CST))
        pc_cursor_restart(shard, &shard->sweep);
    return go_on;
}

static void sooner(uint64_t *deadline_ns, uint64_t at_ns)
{
    if (at_ns && (!*deadline_ns || at_ns < *deadline_ns))
        *deadline_ns = at_ns;
}

bool pc_loop_init(struct shard *shard)
{
    uint32_t unwatched = 0;

    shard->poll_fd = epoll_create1(EPOLL_CLOEXEC);
    return shard->poll_fd >= 0 && watch_fd(shard, shard->control_fd, READY_COMMANDS, &unwatched, EPOLLIN);
}

/* Looks with the reads themselves, which are cheaper than to ask before: at the channel while an answer is due, else mostly at the
 * userfaultfd. */
static uint32_t look_busily(struct shard *shard)
{
    uint32_t often = shard->pending->count ? READY_CHANNEL : READY_UFFD, seldom = READY_UFFD | READY_CHANNEL;

    if (__atomic_load_n(&shard->commands, __ATOMIC_RELAXED) || __atomic_load_n(&shard->sweep_again, __ATOMIC_RELAXED))
        seldom |= READY_COMMANDS;
    return ++shard->busy_turns % BUSY_TURNS ? often : seldom;
}

/* Waits for {userfaultfd, commands, channel}: those that are ready, none when a time has come. */
static uint32_t wait_for_work(struct shard *shard, uint64_t spin_until_ns)
{
    uint64_t now_ns = shard->retry_at_ns || shard->read_at_ns || shard->unpollable_until_ns || spin_until_ns ? pc_now_ns() : 0;
    uint64_t deadline_ns = 0;
    struct epoll_event events[3];
    bool reading = !shard->frames_left && !shard->stalled, held, resting, spinning, deaf, watched;
    uint32_t wanted = 0, ready = 0;
    int timeout_ms = -1, count;

    if (shard->read_at_ns && now_ns >= shard->read_at_ns)
        shard->read_at_ns = 0;
    if (shard->unpollable_until_ns && now_ns >= shard->unpollable_until_ns)
        shard->unpollable_until_ns = 0;
    if (reading && !shard->read_at_ns)
        wanted = EPOLLIN;
    held = wanted && shard->stream.fd >= 0 && pc_stream_pending(&shard->stream); /* bytes of which epoll knows nothing */
    if (shard->send_bytes)
        wanted |= EPOLLOUT;
    resting = shard->repeats >= REPEATS_BEFORE_REST * PC_REPEAT_WEIGHT;
    spinning = now_ns < spin_until_ns && !resting;
    if (spinning && shard->api.how) /* opened here: no other process makes a blocking one of it */
        return look_busily(shard);
    deaf = shard->unpollable_until_ns || resting || !pc_range_count(shard) || __atomic_load_n(&shard->journal_full, __ATOMIC_SEQ_CST);
    watched = watch_fd(shard, shard->uffd, READY_UFFD, &shard->uffd_watched, deaf ? 0 : EPOLLIN);
    if (shard->stream.fd >= 0)
        watched = watch_fd(shard, shard->stream.fd, READY_CHANNEL, &shard->stream_watched, wanted) && watched;
    if (!watched) {
        now_ns = pc_now_ns();
        sooner(&deadline_ns, now_ns + RETRY_MAX_NS);
    }
    sooner(&deadline_ns, shard->retry_at_ns);
    sooner(&deadline_ns, shard->read_at_ns);
    sooner(&deadline_ns, shard->unpollable_until_ns);
    if (resting) {
        shard->repeats -= PC_REPEAT_WEIGHT; /* one read, and if that brings another repetition, one more rest */
        now_ns = pc_now_ns();
        sooner(&deadline_ns, now_ns + REST_NS);
    }
    if (spinning || held || (shard->frames_left && !shard->read_at_ns) || shard->ahead_left || __atomic_load_n(&shard->recheck, __ATOMIC_RELAXED)) {
        timeout_ms = 0;
    } else if (deadline_ns) { /* finer than milliseconds */
        struct timespec timeout = pc_timespec(deadline_ns > now_ns ? deadline_ns - now_ns : 0);
        struct pollfd any = {.fd = shard->poll_fd, .events = POLLIN};

        if (ppoll(&any, 1, &timeout, NULL) <= 0)
            return 0;
        timeout_ms = 0;
    }
    if (held)
        ready = READY_CHANNEL;
    count = epoll_wait(shard->poll_fd, events, 3, timeout_ms);
    for (int i = 0; i < count; i++) {
        if (events[i].data.u32 == READY_UFFD && !(events[i].events & EPOLLIN))
            pc_uffd_unpollable(shard);
        else
            ready |= events[i].data.u32;
    }
    return ready;
}

void *pc_fault_thread(void *argument)
{
    struct shard *shard = argument;
    uint64_t spin_until_ns = 0;

    pc_thread_name("pc-fault", shard->index);
    pc_thread_prompt(shard->busy_poll_ns != 0);
    for (;;) {
        uint32_t ready = wait_for_work(shard, spin_until_ns);
        int stream_fd = shard->stream.fd;
        bool due = false, found = false;

        if (ready & READY_COMMANDS && !handle_commands(shard))
            break;
        if (ready & READY_UFFD)
            found = pc_read_events(shard);
        if (shard->retry_at_ns && pc_now_ns() >= shard->retry_at_ns) {
            due = true;
            shard->retry_at_ns = 0;
        }
        if (due || __atomic_load_n(&shard->recheck, __ATOMIC_RELAXED))
            pc_recheck_pending(shard);
        /* A command may have put another stream there, even under the same number; then a read that finds nothing does no harm. */
        if (ready & READY_CHANNEL && stream_fd >= 0 && stream_fd == shard->stream.fd && !shard->frames_left && !shard->stalled &&
            !shard->read_at_ns) {
            found = receive_bytes(shard) || found;
            handle_frames(shard);
        } else if ((shard->frames_left && !shard->read_at_ns) || (shard->stalled && due)) {
            handle_frames(shard);
        }
        pc_request_ahead(shard);
        flush_requests(shard);
        if (!shard->retry_at_ns)
            shard->retry_ns = 0;
        if (shard->busy_poll_ns && found)
            spin_until_ns = pc_now_ns() + shard->busy_poll_ns;
    }
    if (shard->stream.fd >= 0)
        close_stream(shard, 0, NULL);
    pc_drain_removals(shard);
    return NULL;
}
