/* SPDX-License-Identifier: Apache-2.0
 *
 * Looks at what a pager or page server counts, at regular times, and keeps that in bounded memory, however long it takes.
 *
 * Nothing is in the way of a fault: counters and maps are read as they are, by one thread for all recorders of the process, which takes no
 * more than a hundredth of a processor: looks that take long put the next ones off, but for those at a recorder whose phase begins, and
 * then all that are due are taken together. While nothing happens it looks less often, 16 periods apart at last, and the last column moves
 * on instead of a new one being kept; a column is kept after an eighth of the phase's time nevertheless, for what the guest does meanwhile.
 *
 * When there is no room for another column, the phase that has most of them gives up every other one; counts are cumulative, so that
 * nothing is lost by that but detail. If it is the phase that goes on, its period doubles. So each phase (what happens from a mark on: the
 * pause, the switchover, a recovery) begins in full detail, whatever came before it.
 *
 * Faults: the fault thread of a shard puts every 2^k-th into a ring, when its thread has been woken (faults.c). From there they come here,
 * and when the sample is full k grows by one, and those that would not have been in it leave.
 *
 * A recorder's `lock` is held for a look, and by callers who copy what there is, or end it. `all.lock`, which may be taken while that is
 * held and never the other way round, is for the list and what wakes the thread, and held for no longer than that: who begins a phase, in
 * the pause, waits for no look. Only the thread takes a recorder from the list.
 */
#include "postcopy/recorder.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "core/clock.h"
#include "core/runtime.h"
#include "core/view.h"
#include "pager/metrics.h"
#include "pageserver/server.h"

#define PHASES_MAX 16       /* after that nothing is begun in full detail */
#define SHARE 100           /* of the time, looking takes one part of so many */
#define QUIET_PERIODS_LOG 4 /* looks are 2^4 periods apart at last, while nothing happens */
#define PHASE_PARTS 8

_Static_assert(sizeof(struct pc_pager_stats) <= sizeof(((struct pc_record_column *)0)->counts), "room for all counters");
_Static_assert(sizeof(struct pc_pageserver_stats) <= sizeof(((struct pc_record_column *)0)->counts), "room for all counters");

struct pc_recorder {
    /* With `all.lock`: */
    struct pc_recorder *next;
    uint64_t due_ns;
    bool listed, ended, phase_began;
    bool freed; /* by the caller: the thread is the last that has it */

    pthread_mutex_t lock; /* for all that follows */

    struct pc_metrics *metrics;       /* of a pager, or */
    struct pc_pageserver *server;     /* a page server */
    struct pc_machine *machine;       /* NULL: none, or none whose guest counts operations */
    const struct pc_view *view;

    uint64_t period_ns, first_period_ns, phase, phase_ns;
    uint32_t quiet; /* looks in a row at which nothing had happened */
    bool floats;    /* the last column moves on while nothing happens */
    uint64_t cost_ns, sample_every;
    uint32_t bins;
    uint32_t column_count, fault_count;
    uint64_t taken[PC_MAX_SHARDS]; /* of each ring */
    struct pc_record_column columns[PC_RECORD_COLUMNS];
    struct pc_record_fault faults[PC_RECORD_FAULTS];
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct pc_recorder *first;
    uint64_t rested_ns; /* when a hundredth of the time has paid for the looks until now */
    bool woken, running; /* there is a thread */
} all;

/* ---- faults ---- */

static void set_sample(struct pc_recorder *recorder, uint64_t every)
{
    recorder->sample_every = every;
    __atomic_store_n(&recorder->metrics->map->sample_every, every, __ATOMIC_RELAXED);
}

static void take_fault(struct pc_recorder *recorder, const struct pc_record_fault *fault)
{
    /* What another process counts is not trusted: 0, which no fault has, would be in every sample, and a number beyond all that can be
     * counted would have the sample grow thinner until nothing is left. */
    if (!fault->number || fault->number >> 48)
        return;
    while (recorder->fault_count == PC_RECORD_FAULTS) {
        uint32_t kept = 0;

        set_sample(recorder, recorder->sample_every * 2);
        for (uint32_t i = 0; i < recorder->fault_count; i++)
            if (!(recorder->faults[i].number & (recorder->sample_every - 1)))
                recorder->faults[kept++] = recorder->faults[i];
        recorder->fault_count = kept;
    }
    if (!(fault->number & (recorder->sample_every - 1)))
        recorder->faults[recorder->fault_count++] = *fault;
}

static void take_faults(struct pc_recorder *recorder)
{
    for (uint32_t shard = 0; shard < PC_MAX_SHARDS; shard++) {
        const struct pc_fault_ring *ring = &recorder->metrics->map->shards[shard].ring;
        uint64_t head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE), from = recorder->taken[shard];

        if (head - from >= PC_FAULT_RING) /* those before were lost */
            from = head - PC_FAULT_RING + 1;
        for (; from < head; from++) {
            const uint64_t *words = (const uint64_t *)&ring->faults[from % PC_FAULT_RING];
            struct pc_record_fault fault;

            for (size_t i = 0; i < sizeof(fault) / sizeof(*words); i++)
                ((uint64_t *)&fault)[i] = __atomic_load_n(&words[i], __ATOMIC_ACQUIRE);
            /* Else it has been overwritten meanwhile, or is being: a word of that is never seen before the head that it followed. */
            if (__atomic_load_n(&ring->head, __ATOMIC_RELAXED) - from < PC_FAULT_RING)
                take_fault(recorder, &fault);
        }
        recorder->taken[shard] = head;
    }
}

/* ---- columns ---- */

static uint64_t blocked_ns(struct pc_metrics *metrics)
{
    uint64_t blocked[PC_MAX_TRACKED_THREADS], sum = 0;
    int slots = pc_metrics_blocktime(metrics, blocked, PC_MAX_TRACKED_THREADS);

    for (int slot = 0; slot < slots; slot++)
        sum += blocked[slot];
    return sum;
}

/* All but the bins. */
static void count(const struct pc_recorder *recorder, struct pc_record_column *column)
{
    *column = (struct pc_record_column){.at_ns = pc_now_ns(), .phase = recorder->phase};
    if (recorder->metrics) {
        struct pc_pager_stats stats;

        (void)pc_metrics_stats(recorder->metrics, &stats);
        column->waiting = stats.pending_faults;
        stats.oldest_pending_ns = 0; /* which changes by itself */
        memcpy(column->counts, &stats, sizeof(stats));
        column->blocked_ns = blocked_ns(recorder->metrics);
    } else if (recorder->server) {
        (void)pc_pageserver_stats(recorder->server, (struct pc_pageserver_stats *)column->counts);
    }
    if (!recorder->machine && recorder->column_count) /* it may have ended */
        column->operations = recorder->columns[recorder->column_count - 1].operations;
    if (recorder->machine) {
        struct pc_machine_stats stats;

        (void)pc_machine_stats(recorder->machine, &stats);
        for (uint32_t vcpu = 0; vcpu < stats.vcpus; vcpu++)
            column->operations += stats.vcpu[vcpu].operations;
    }
}

/* The phase that has most columns gives up every other one, but for its first and last. */
static void halve(struct pc_recorder *recorder)
{
    uint32_t of_phase[PHASES_MAX] = {0}, kept = 0;
    uint64_t most = 0, waiting = 0;

    for (uint32_t i = 0; i < recorder->column_count; i++)
        of_phase[recorder->columns[i].phase]++;
    for (uint64_t phase = 1; phase < PHASES_MAX; phase++)
        if (of_phase[phase] > of_phase[most])
            most = phase;
    if (most == recorder->phase)
        recorder->period_ns *= 2;
    for (uint32_t i = 0, in_phase = 0; i < recorder->column_count; i++) {
        struct pc_record_column *column = &recorder->columns[i];
        bool ends = i + 1 == recorder->column_count || column[1].phase != column->phase;

        if (column->phase == most && in_phase++ % 2 && !ends) {
            waiting = column->waiting;
            continue;
        }
        if (column->waiting < waiting)
            column->waiting = waiting;
        waiting = 0;
        recorder->columns[kept++] = *column;
    }
    recorder->column_count = kept;
}

/* `ends`: the phase does, and the column is kept whatever has happened. */
static void look(struct pc_recorder *recorder, bool ends)
{
    struct pc_record_column now, *last = NULL;
    uint64_t fixed_ns = recorder->phase_ns;
    bool same;

    if (!recorder->view && !recorder->machine)
        return;
    count(recorder, &now);
    if (recorder->metrics)
        take_faults(recorder);
    if (recorder->column_count)
        last = &recorder->columns[recorder->column_count - 1];
    same = last && last->phase == now.phase && !memcmp(last->counts, now.counts, sizeof(now.counts));
    recorder->quiet = same ? recorder->quiet + 1 : 0;
    now.quiet = same;
    if (same && recorder->column_count > 1 && last[-1].phase == now.phase)
        fixed_ns = last[-1].at_ns;
    if (same && recorder->floats && now.at_ns - fixed_ns < (now.at_ns - recorder->phase_ns) / PHASE_PARTS) {
        memcpy(now.bins, last->bins, sizeof(now.bins));
        *last = now;
    } else {
        if (recorder->column_count == PC_RECORD_COLUMNS)
            halve(recorder);
        if (recorder->view)
            recorder->bins = pc_view_bins(recorder->view, now.bins, PC_RECORD_BINS);
        recorder->columns[recorder->column_count++] = now;
    }
    recorder->floats = same && !ends;
}

/* Of this thread. The time on the clock would count what others do meanwhile, and on a busy host put the next look off for long. */
static uint64_t processor_ns(void)
{
    struct timespec now;

    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Looks, and begins the next phase when it is time. How long to wait then. */
static uint64_t take_turn(struct pc_recorder *recorder, bool phase_began)
{
    uint64_t began_ns = pc_now_ns(), before_ns = processor_ns(), wait_ns;

    pthread_mutex_lock(&recorder->lock);
    look(recorder, phase_began);
    if (phase_began && recorder->phase + 1 < PHASES_MAX) {
        recorder->phase++;
        recorder->phase_ns = began_ns;
        recorder->period_ns = recorder->first_period_ns;
        recorder->quiet = 0;
    }
    recorder->cost_ns += processor_ns() - before_ns;
    wait_ns = recorder->period_ns << (recorder->quiet < QUIET_PERIODS_LOG ? recorder->quiet : QUIET_PERIODS_LOG);
    pthread_mutex_unlock(&recorder->lock);
    return wait_ns;
}

static void destroy(struct pc_recorder *recorder)
{
    pthread_mutex_destroy(&recorder->lock);
    pc_buffer_free(recorder, sizeof(*recorder));
}

/* With `all.lock`, but for the looks. When to look next: when one is due, counted from the end of its look, and the looks so far are paid
 * for. Only where a phase begins is not waited for that. */
static uint64_t look_at_all(void)
{
    uint64_t before_ns = processor_ns(), next_ns = UINT64_MAX, now_ns;
    bool rested = all.rested_ns <= pc_now_ns();
    struct pc_recorder *recorder, **at = &all.first;

    while ((recorder = *at)) {
        bool phase_began = recorder->phase_began;

        if (recorder->ended) {
            *at = recorder->next;
            recorder->listed = false;
            if (recorder->freed)
                destroy(recorder);
            continue;
        }
        if (phase_began || (rested && recorder->due_ns <= pc_now_ns())) {
            uint64_t wait_ns;

            recorder->phase_began = false;
            pthread_mutex_unlock(&all.lock);
            wait_ns = take_turn(recorder, phase_began);
            pthread_mutex_lock(&all.lock);
            recorder->due_ns = pc_now_ns() + wait_ns;
        }
        next_ns = recorder->due_ns < next_ns ? recorder->due_ns : next_ns;
        at = &recorder->next;
    }
    now_ns = pc_now_ns();
    all.rested_ns = (all.rested_ns > now_ns ? all.rested_ns : now_ns) + (processor_ns() - before_ns) * SHARE;
    return next_ns > all.rested_ns ? next_ns : all.rested_ns;
}

static void *record(void *unused)
{
    (void)unused;
    pc_thread_name("pc-record", 0);
    pthread_mutex_lock(&all.lock);
    while (all.first) {
        struct timespec until;

        all.woken = false;
        until = pc_timespec(look_at_all());
        while (all.first && !all.woken && pthread_cond_timedwait(&all.wake, &all.lock, &until) != ETIMEDOUT) {
        }
    }
    all.running = false;
    pthread_mutex_unlock(&all.lock);
    return NULL;
}

/* Also in a forked child, which has neither the thread nor the recorders. */
static void begin_all(void)
{
    pthread_condattr_t clock;

    pc_lock_init(&all.lock);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&all.wake, &clock);
    pthread_condattr_destroy(&clock);
    all.first = NULL;
    all.rested_ns = 0;
    all.running = false;
}

static void begin_once(void)
{
    begin_all();
    (void)pthread_atfork(NULL, NULL, begin_all);
}

/* ---- for callers ---- */

int pc_recorder_new(uint64_t period_ns, struct pc_recorder **out)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct pc_recorder *recorder = pc_buffer_new(sizeof(*recorder)); /* memory is taken as far as it is used */

    if (!recorder)
        return -ENOMEM;
    /* A forked child, which may free what it has inherited, has one that was never begun: without what its parent looks at, and with a
     * lock that nobody has. */
    (void)madvise(recorder, sizeof(*recorder), MADV_DOFORK);
    (void)madvise(recorder, sizeof(*recorder), MADV_WIPEONFORK);
    (void)pthread_once(&once, begin_once);
    pc_lock_init(&recorder->lock);
    recorder->period_ns = recorder->first_period_ns = period_ns;
    recorder->phase_ns = pc_now_ns();
    *out = recorder;
    return 0;
}

/* With the recorder's lock. 0, or an error, and then there is nothing to be looked at. */
static int start(struct pc_recorder *recorder)
{
    pthread_t thread;
    int error = 0;

    pthread_mutex_lock(&all.lock);
    if (recorder->ended)
        error = -ECANCELED;
    if (!error && !all.running) {
        error = pc_thread_start(&thread, record, NULL);
        all.running = !error;
        if (!error)
            (void)pthread_detach(thread);
    }
    if (!error && !recorder->listed) {
        recorder->next = all.first;
        all.first = recorder;
        recorder->listed = all.woken = true;
        pthread_cond_signal(&all.wake);
    }
    pthread_mutex_unlock(&all.lock);
    return error;
}

static int record_pager(struct pc_recorder *recorder, struct pc_metrics *metrics)
{
    int error;

    pthread_mutex_lock(&recorder->lock);
    error = start(recorder);
    if (!error) {
        recorder->metrics = metrics;
        recorder->view = &metrics->view;
        for (uint32_t shard = 0; shard < PC_MAX_SHARDS; shard++) /* an earlier pager has counted there */
            recorder->taken[shard] = __atomic_load_n(&metrics->map->shards[shard].ring.head, __ATOMIC_ACQUIRE);
        set_sample(recorder, 1);
    }
    pthread_mutex_unlock(&recorder->lock);
    return error;
}

int pc_recorder_pager(struct pc_recorder *recorder, struct pc_pager *pager)
{
    return record_pager(recorder, pc_pager_metrics(pager));
}

int pc_recorder_metrics(struct pc_recorder *recorder, struct pc_metrics *metrics)
{
    return record_pager(recorder, metrics);
}

int pc_recorder_pageserver(struct pc_recorder *recorder, struct pc_pageserver *server)
{
    int error;

    pthread_mutex_lock(&recorder->lock);
    error = start(recorder);
    if (!error) {
        recorder->server = server;
        recorder->view = pc_pageserver_view(server);
    }
    pthread_mutex_unlock(&recorder->lock);
    return error;
}

int pc_recorder_machine(struct pc_recorder *recorder, struct pc_machine *machine)
{
    int error;

    pthread_mutex_lock(&recorder->lock);
    error = machine ? start(recorder) : 0;
    if (!machine)
        look(recorder, true);
    if (!error)
        recorder->machine = machine;
    pthread_mutex_unlock(&recorder->lock);
    return error;
}

static void wake(bool *why)
{
    pthread_mutex_lock(&all.lock);
    *why = all.woken = true;
    pthread_cond_signal(&all.wake);
    pthread_mutex_unlock(&all.lock);
}

int pc_recorder_phase(struct pc_recorder *recorder)
{
    wake(&recorder->phase_began);
    return 0;
}

int pc_recorder_stop(struct pc_recorder *recorder)
{
    pthread_mutex_lock(&recorder->lock);
    look(recorder, true);
    if (recorder->metrics)
        __atomic_store_n(&recorder->metrics->map->sample_every, 0, __ATOMIC_RELAXED);
    recorder->metrics = NULL;
    recorder->server = NULL;
    recorder->machine = NULL;
    recorder->view = NULL;
    pthread_mutex_unlock(&recorder->lock);
    wake(&recorder->ended);
    return 0;
}

int pc_recorder_read(struct pc_recorder *recorder, struct pc_record_column *columns, struct pc_record_fault *faults,
                     struct pc_record_summary *summary)
{
    pthread_mutex_lock(&recorder->lock);
    memcpy(columns, recorder->columns, recorder->column_count * sizeof(*columns));
    memcpy(faults, recorder->faults, recorder->fault_count * sizeof(*faults));
    *summary = (struct pc_record_summary){.columns = recorder->column_count, .faults = recorder->fault_count,
                                          .bins = recorder->bins, .sample_every = recorder->sample_every,
                                          .period_ns = recorder->period_ns, .cost_ns = recorder->cost_ns};
    pthread_mutex_unlock(&recorder->lock);
    return 0;
}

void pc_recorder_free(struct pc_recorder *recorder)
{
    bool listed;

    (void)pc_recorder_stop(recorder);
    pthread_mutex_lock(&all.lock);
    listed = recorder->freed = recorder->listed;
    pthread_mutex_unlock(&all.lock);
    if (!listed)
        destroy(recorder);
}
