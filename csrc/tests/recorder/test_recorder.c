/* SPDX-License-Identifier: Apache-2.0
 *
 * The recorder: bounded however long it goes on, right in what it keeps, and beside a pager and a page server at work (which is for TSan to
 * look at). Its thread is left out where time would decide what is seen: there the test takes its turns.
 */
#include "recorder/recorder.c" /* for those turns */

#include <dirent.h>

#include "tests/support/rig.h"

/* One of a pager's counters and 1000 pages, which the test changes. */
struct fake {
    struct pc_recorder *recorder;
    struct pc_metrics *metrics;
    uint64_t words[1000 / 64 + 1];
};

static void open_fake(struct fake *fake)
{
    memset(fake, 0, sizeof(*fake));
    CHECK_EQ(pc_metrics_new(&fake->metrics), 0);
    pc_view_add(&fake->metrics->view, fake->words, 1000, 4096);
    CHECK_EQ(pc_recorder_new(1000, &fake->recorder), 0);
    fake->recorder->metrics = fake->metrics;
    fake->recorder->view = &fake->metrics->view;
    set_sample(fake->recorder, 1);
}

static void close_fake(struct fake *fake)
{
    pc_recorder_free(fake->recorder);
    fake->metrics->view.count = 0; /* whose map was never one of states */
    pc_metrics_free(fake->metrics);
}

static uint64_t *demand(const struct fake *fake)
{
    return &fake->metrics->map->count.demand_pages;
}

static uint64_t demand_of(const struct pc_record_column *column)
{
    return ((const struct pc_pager_stats *)column->counts)->demand_pages;
}

/* A page arrives each microsecond, the first period, and it is looked at when it is time. */
static void arrive(const struct fake *fake, uint64_t page)
{
    *demand(fake) = page;
    if (page % (fake->recorder->period_ns / 1000) == 0)
        look(fake->recorder, false);
}

static void it_is_halved(void)
{
    struct pc_record_column columns[PC_RECORD_COLUMNS];
    struct pc_record_fault faults[PC_RECORD_FAULTS];
    struct pc_record_summary summary;
    uint64_t most_waiting = 0, first_ns, last_ns;
    struct fake fake;

    open_fake(&fake);
    first_ns = pc_now_ns();
    for (uint64_t page = 1; page <= 100000; page++) {
        if (page % 100 == 0)
            pc_bitmap_set_range(fake.words, page / 100 - 1, 1);
        fake.metrics->map->shards[3].pending = page / 1000 == 54 ? 7 : 1;
        arrive(&fake, page);
    }
    last_ns = pc_now_ns();
    CHECK_EQ(pc_recorder_stop(fake.recorder), 0);
    CHECK_EQ(pc_recorder_stop(fake.recorder), 0);
    CHECK_EQ(pc_recorder_read(fake.recorder, columns, faults, &summary), 0);
    CHECK(summary.columns > PC_RECORD_COLUMNS / 2 && summary.columns <= PC_RECORD_COLUMNS);
    CHECK_EQ(summary.bins, PC_RECORD_BINS);
    /* Doubled with each halving; by that the columns are evenly apart. */
    CHECK_EQ(summary.period_ns, 512000);
    CHECK_EQ(demand_of(&columns[0]), 1);
    CHECK_EQ(demand_of(&columns[summary.columns - 1]), 100000);
    CHECK(columns[0].at_ns >= first_ns && columns[summary.columns - 2].at_ns <= last_ns);
    for (uint64_t i = 0; i < summary.columns; i++) {
        uint64_t pages = demand_of(&columns[i]), before = i ? demand_of(&columns[i - 1]) : 0;

        CHECK(!i || columns[i].at_ns >= columns[i - 1].at_ns);
        CHECK(i + 1 == summary.columns || pages - before <= summary.period_ns / 1000);
        CHECK_EQ(columns[i].bins[0], pages < 100 ? 0 : pages >= 800 ? PC_VIEW_FULL : columns[i].bins[0]);
        CHECK_EQ(columns[i].bins[PC_RECORD_BINS - 1], pages < 99400 ? 0 : columns[i].bins[PC_RECORD_BINS - 1]);
        most_waiting = columns[i].waiting > most_waiting ? columns[i].waiting : most_waiting;
    }
    CHECK_EQ(columns[summary.columns - 1].bins[PC_RECORD_BINS - 1], PC_VIEW_FULL);
    CHECK_EQ(most_waiting, 7);
    close_fake(&fake);
}

/* What is recorded in detail stays so, whatever is recorded for however long before and after it. */
static void a_phase_is_recorded_in_detail(void)
{
    struct pc_record_column columns[PC_RECORD_COLUMNS];
    struct pc_record_fault faults[PC_RECORD_FAULTS];
    struct pc_record_summary summary;
    uint64_t in_detail = 0, ends = 0;
    struct fake fake;

    open_fake(&fake);
    for (uint64_t page = 1; page <= 30000; page++) {
        if (page == 20000 || page == 20100) {
            *demand(&fake) = page;
            CHECK(page != 20000 || fake.recorder->period_ns > 1000);
            (void)take_turn(fake.recorder, true);
            CHECK_EQ(fake.recorder->period_ns, 1000);
        } else {
            arrive(&fake, page);
        }
    }
    CHECK_EQ(pc_recorder_read(fake.recorder, columns, faults, &summary), 0);
    CHECK(summary.columns <= PC_RECORD_COLUMNS);
    for (uint64_t i = 0; i < summary.columns; i++) {
        uint64_t page = demand_of(&columns[i]);

        CHECK_EQ(columns[i].phase, page <= 20000 ? 0 : page <= 20100 ? 1 : 2);
        in_detail += columns[i].phase == 1;
        ends += page == 20000 || page == 20100;
    }
    CHECK_EQ(in_detail, 100);
    CHECK_EQ(ends, 2);
    for (int phase = 0; phase < 3 * PHASES_MAX; phase++) /* more than there may be */
        (void)take_turn(fake.recorder, true);
    CHECK_EQ(fake.recorder->phase, PHASES_MAX - 1);
    close_fake(&fake);
}

static void nothing_takes_no_room(void)
{
    struct fake fake;
    uint32_t before;
    uint64_t last_ns;

    open_fake(&fake);
    *demand(&fake) = 1;
    for (int i = 0; i < 100000; i++)
        look(fake.recorder, false);
    /* One where something had happened; then at each eighth of the time at most. */
    CHECK(fake.recorder->column_count > 2 && fake.recorder->column_count < 250);
    CHECK_EQ(fake.recorder->period_ns, 1000);
    before = fake.recorder->column_count;
    last_ns = fake.recorder->columns[before - 1].at_ns;
    *demand(&fake) = 2;
    look(fake.recorder, false);
    CHECK_EQ(fake.recorder->column_count, before + 1);
    CHECK_EQ(fake.recorder->columns[before - 1].at_ns, last_ns); /* until then it was 1 */
    CHECK_EQ(demand_of(&fake.recorder->columns[before - 1]), 1);
    CHECK_EQ(demand_of(&fake.recorder->columns[before]), 2);
    close_fake(&fake);
}

/* As a fault thread puts it there (faults.c). */
static void put_fault(const struct fake *fake, uint32_t shard, uint64_t number)
{
    struct pc_metrics_map *map = fake->metrics->map;
    struct pc_fault_ring *ring = &map->shards[shard].ring;

    if (map->sample_every && number % map->sample_every == 0)
        ring->faults[ring->head++ % PC_FAULT_RING] = (struct pc_record_fault){.number = number, .event_ns = number * 1000 + shard};
}

static void faults_are_sampled_evenly(void)
{
    uint64_t seen[2] = {0}, every;
    struct fake fake;

    open_fake(&fake);
    for (uint64_t number = 1; number <= 100000; number++) {
        put_fault(&fake, 0, number);
        put_fault(&fake, 5, number);
        if (number % 50 == 0)
            look(fake.recorder, false);
    }
    every = fake.recorder->sample_every;
    CHECK_EQ(every, 256); /* of 200000, more than 500 and no more than 1000 */
    CHECK(fake.recorder->fault_count > PC_RECORD_FAULTS / 2 && fake.recorder->fault_count <= PC_RECORD_FAULTS);
    for (uint32_t i = 0; i < fake.recorder->fault_count; i++) {
        uint64_t shard = fake.recorder->faults[i].event_ns % 1000 != 0;

        CHECK_EQ(fake.recorder->faults[i].number, seen[shard] + every);
        seen[shard] += every;
    }
    CHECK(seen[0] == seen[1] && seen[0] > 100000 - every);
    /* More at once than the ring has: those that are lost are lost, and no other is made of two. */
    for (uint64_t number = 1; number <= 3 * PC_FAULT_RING; number++)
        put_fault(&fake, 9, number * every);
    fake.recorder->fault_count = 0;
    look(fake.recorder, false);
    CHECK_EQ(fake.recorder->fault_count, PC_FAULT_RING - 1);
    CHECK_EQ(fake.recorder->faults[0].number, (2 * PC_FAULT_RING + 2) * every);
    for (int i = 1; i <= 2 * PC_RECORD_FAULTS; i++) { /* a number that no fault has */
        put_fault(&fake, 9, 0);
        if (i % 100 == 0)
            look(fake.recorder, false);
    }
    CHECK_EQ(fake.recorder->fault_count, PC_FAULT_RING - 1);
    CHECK_EQ(pc_recorder_stop(fake.recorder), 0);
    CHECK_EQ(fake.metrics->map->sample_every, 0); /* and the fault threads put nothing there any more */
    close_fake(&fake);
}

/* ---- the picture of the memory ---- */

static void bins_are_what_is_there(void)
{
    static uint64_t small[8], huge[1 << 15]; /* 8 GiB in pages of 4 KiB */
    struct pc_view view = {0};
    uint8_t bins[64], many[2048];

    CHECK_EQ(pc_view_bins(&view, bins, 64), 0);
    pc_view_add(&view, small, 30, 4096);
    CHECK_EQ(pc_view_bins(&view, bins, 64), 30); /* no more than there are pages */
    pc_view_add(&view, small + 1, 3, 40 * 4096); /* which begins at page 30 of 150 */
    CHECK_EQ(pc_view_bytes(&view), 150 * 4096);
    pc_bitmap_set_range(small, 3, 4);
    pc_bitmap_set_range(small + 1, 1, 1);
    CHECK_EQ(pc_view_bins(&view, bins, 15), 15); /* 10 small pages each, as far as there are small ones */
    CHECK_EQ(bins[0], 1 + 4 * 62 / 10);
    for (uint32_t bin = 1; bin < 15; bin++) /* the large one in the middle covers four bins, and shows in each */
        CHECK_EQ(bins[bin], bin >= 7 && bin < 11 ? 63 : 0);
    memset(&view, 0, sizeof(view));
    pc_view_add(&view, huge, UINT64_C(1) << 21, 4096);
    CHECK_EQ(pc_view_bins(&view, bins, 64), 64);
    for (uint32_t bin = 0; bin < 64; bin++)
        CHECK_EQ(bins[bin], 0);
    memset(huge, 0x0f, sizeof(huge) / 2); /* half of each of the first 32 bins */
    memset(huge + sizeof(huge) / 16, 0xff, sizeof(huge) / 2);
    CHECK_EQ(pc_view_bins(&view, bins, 64), 64);
    for (uint32_t bin = 0; bin < 64; bin++)
        CHECK_EQ(bins[bin], bin < 32 ? 32 : 63);
    CHECK_EQ(pc_view_bins(&view, many, sizeof(many)), sizeof(many)); /* so many that little can be looked at of each */
    CHECK(many[0] == 32 && many[sizeof(many) - 1] == 63);
}

/* ---- beside those at work ---- */

static void beside_a_pager(void)
{
    const uint64_t pages[] = {1000, 700};
    struct pc_record_column columns[PC_RECORD_COLUMNS], *last;
    struct pc_record_fault faults[PC_RECORD_FAULTS];
    struct pc_record_summary summary;
    struct pc_recorder *of_pager, *of_server;
    struct visit visits[2 * MAX_PAGES];
    struct toucher touchers[3];
    struct pc_pager_stats stats;
    struct pc_pageserver_stats served;
    struct pc_histogram total;
    struct rig rig;

    open_pager(&rig, PC_MEMORY_MEMFD, 2, pages);
    open_server(&rig, 0);
    CHECK_EQ(pc_recorder_new(50000, &of_pager), 0);
    CHECK_EQ(pc_recorder_new(50000, &of_server), 0);
    CHECK_EQ(pc_recorder_pager(of_pager, rig.pager), 0);
    CHECK_EQ(pc_recorder_pageserver(of_server, rig.server), 0);
    arm_all(&rig, 0);
    tell_page_map(&rig);
    connect_urgent(&rig, 0, NULL);
    connect_bulk(&rig, 0, NULL);
    for (int t = 0; t < 3; t++)
        start_toucher(&touchers[t], &rig, t, visits, shuffled(&rig, -1, visits));
    CHECK_EQ(pc_pageserver_start(rig.server), 0);
    for (int i = 0; i < 20; i++) {
        CHECK_EQ(pc_recorder_phase(of_pager), 0);
        CHECK_EQ(pc_recorder_read(of_pager, columns, faults, &summary), 0);
        pc_sleep_ns(100000);
    }
    for (int t = 0; t < 3; t++)
        join_toucher(&touchers[t]);
    EXPECT_EVENT(&rig.from_pager, PC_EVENT_COMPLETE, 0, 0, NULL);
    CHECK_EQ(pc_pager_disconnect(rig.pager), 0); /* its threads have done their bookkeeping */
    CHECK_EQ(pc_pageserver_disconnect(rig.server), 0);
    CHECK_EQ(pc_recorder_stop(of_pager), 0);
    CHECK_EQ(pc_recorder_stop(of_server), 0);

    CHECK_EQ(pc_recorder_read(of_pager, columns, faults, &summary), 0);
    stats = pager_stats(&rig);
    last = &columns[summary.columns - 1];
    CHECK(summary.columns > 2 && summary.columns <= PC_RECORD_COLUMNS && summary.cost_ns > 0);
    CHECK_EQ(demand_of(last), stats.demand_pages);
    CHECK_EQ(((struct pc_pager_stats *)last->counts)->background_pages, stats.background_pages);
    CHECK_EQ(((struct pc_pager_stats *)last->counts)->bytes_received, stats.bytes_received);
    CHECK_EQ(last->waiting, 0);
    for (uint64_t bin = 0; bin < summary.bins; bin++)
        CHECK_EQ(last->bins[bin], PC_VIEW_FULL);
    CHECK_EQ(pc_pager_latency(rig.pager, PC_STAGE_TOTAL, &total), 0);
    CHECK(summary.faults <= total.count / summary.sample_every + 1);
    for (uint64_t i = 0; i < summary.faults; i++) {
        const struct pc_record_fault *fault = &faults[i];

        CHECK(fault->number && fault->number <= total.count && fault->number % summary.sample_every == 0);
        CHECK((fault->place >> 40) < 2 && (fault->place & 0xffffffffff) < pages[fault->place >> 40]);
        CHECK(fault->event_ns && fault->event_ns <= fault->placed_ns && fault->placed_ns <= last->at_ns);
        if (fault->sent_ns)
            CHECK(fault->event_ns <= fault->sent_ns && fault->sent_ns < fault->received_ns && fault->received_ns <= fault->placed_ns);
    }
    CHECK_EQ(pc_recorder_read(of_server, columns, faults, &summary), 0);
    served = server_stats(&rig);
    CHECK_EQ(((struct pc_pageserver_stats *)columns[summary.columns - 1].counts)->bytes_sent, served.bytes_sent);
    CHECK_EQ(((struct pc_pageserver_stats *)columns[summary.columns - 1].counts)->demand_pages, served.demand_pages);
    pc_recorder_free(of_pager);
    pc_recorder_free(of_server);
    close_rig(&rig);
}

/* ---- many of them ---- */

/* How many of this process's threads look. */
static int looking_threads(void)
{
    DIR *tasks = opendir("/proc/self/task");
    struct dirent *task;
    int found = 0;

    CHECK(tasks != NULL);
    while ((task = readdir(tasks))) {
        char path[300], name[32] = {0};
        FILE *file;

        (void)snprintf(path, sizeof(path), "/proc/self/task/%s/comm", task->d_name);
        file = fopen(path, "r");
        if (file && fgets(name, sizeof(name), file))
            found += !strncmp(name, "pc-record", 9);
        if (file)
            (void)fclose(file);
    }
    (void)closedir(tasks);
    return found;
}

static uint64_t columns_of(struct pc_recorder *recorder)
{
    struct pc_record_column columns[PC_RECORD_COLUMNS];
    struct pc_record_fault faults[PC_RECORD_FAULTS];
    struct pc_record_summary summary;

    CHECK_EQ(pc_recorder_read(recorder, columns, faults, &summary), 0);
    return summary.columns;
}

/* They have one thread, whoever comes and goes meanwhile, and none when there are none. */
static void many_have_one_thread(void)
{
    struct pc_recorder *recorders[64];
    struct pc_metrics *metrics[64];

    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 64; i++) {
            CHECK_EQ(pc_metrics_new(&metrics[i]), 0);
            CHECK_EQ(pc_recorder_new(1000000, &recorders[i]), 0);
            CHECK_EQ(pc_recorder_metrics(recorders[i], metrics[i]), 0);
        }
        for (int i = 0; i < 64; i += 2)
            pc_recorder_free(recorders[i]);
        for (int i = 1; i < 64; i += 2) {
            uint64_t before = columns_of(recorders[i]);

            CHECK_EQ(pc_recorder_phase(recorders[i]), 0);
            WAIT_UNTIL(columns_of(recorders[i]) > before);
        }
        CHECK_EQ(looking_threads(), 1);
        for (int i = 1; i < 64; i += 2)
            pc_recorder_free(recorders[i]);
        WAIT_UNTIL(looking_threads() == 0);
        for (int i = 0; i < 64; i++)
            pc_metrics_free(metrics[i]);
    }
}

static uint64_t take_all_turns(void)
{
    uint64_t next_ns;

    pthread_mutex_lock(&all.lock);
    next_ns = look_at_all();
    pthread_mutex_unlock(&all.lock);
    return next_ns;
}

/* However often phases begin, only they are looked at before the looks so far are paid for. The thread's turns are the test's. */
static void a_phase_does_not_make_others_look(void)
{
    struct fake fakes[2];
    uint64_t rested_ns = pc_now_ns() + UINT64_C(3600000000000);

    for (int i = 0; i < 2; i++)
        open_fake(&fakes[i]);
    all.running = true;
    all.rested_ns = rested_ns;
    for (int i = 0; i < 2; i++)
        CHECK_EQ(start(fakes[i].recorder), 0);
    for (uint64_t phases = 1; phases < 4; phases++) {
        CHECK_EQ(pc_recorder_phase(fakes[0].recorder), 0);
        CHECK(take_all_turns() > rested_ns);
        CHECK(all.rested_ns > rested_ns);
        CHECK_EQ(columns_of(fakes[0].recorder), phases);
        CHECK_EQ(columns_of(fakes[1].recorder), 0);
    }
    all.rested_ns = 0;
    (void)take_all_turns();
    CHECK_EQ(columns_of(fakes[1].recorder), 1);
    for (int i = 0; i < 2; i++)
        close_fake(&fakes[i]);
    (void)take_all_turns();
    CHECK(!all.first);
    all.running = false;
}

static void one_that_was_stopped_takes_nothing(void)
{
    struct fake fake;

    open_fake(&fake);
    CHECK_EQ(pc_recorder_stop(fake.recorder), 0);
    CHECK_EQ(pc_recorder_metrics(fake.recorder, fake.metrics), -ECANCELED);
    CHECK_EQ(fake.metrics->map->sample_every, 0);
    CHECK(!fake.recorder->metrics && !fake.recorder->listed);
    CHECK_EQ(pc_recorder_machine(fake.recorder, NULL), 0);
    close_fake(&fake);
}

/* The recorder and its lock, which another thread had in the moment of the fork, and the metrics that both share. */
static void a_child_frees_nothing_of_its_parent(void)
{
    struct fake fake;
    pid_t child;
    bool late;

    open_fake(&fake);
    CHECK_EQ(pc_recorder_metrics(fake.recorder, fake.metrics), 0);
    pthread_mutex_lock(&fake.recorder->lock);
    child = CHECK_SYS(fork());
    if (!child) {
        CHECK_EQ(pc_recorder_stop(fake.recorder), 0);
        pc_recorder_free(fake.recorder);
        _exit(0);
    }
    pthread_mutex_unlock(&fake.recorder->lock);
    CHECK_EQ(test_wait_(child, 10, &late), 0);
    CHECK_EQ(fake.metrics->map->sample_every, 1);
    close_fake(&fake);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(it_is_halved);
    RUN(a_phase_is_recorded_in_detail);
    RUN(nothing_takes_no_room);
    RUN(faults_are_sampled_evenly);
    RUN(bins_are_what_is_there);
    RUN_CASE(beside_a_pager);
    RUN(many_have_one_thread);
    RUN(a_phase_does_not_make_others_look);
    RUN(one_that_was_stopped_takes_nothing);
    RUN(a_child_frees_nothing_of_its_parent);
    return test_end();
}
