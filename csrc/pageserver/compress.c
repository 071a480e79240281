/* SPDX-License-Identifier: Apache-2.0
 *
 * Compressed runs, and the choice between the ways to send one.
 *
 * What counts is how long a byte of content takes, from end to end, when run follows run in the same way: processor, wire and
 * the destination together, whichever of them is the slowest. A channel measures that for the way it uses, and *tries* the others
 * now and then for a few runs; how often, halves each time that one loses. Bytes that are still queued in the socket have not been
 * sent: without taking them into account a slow wire looks as fast as memory, until the queue is full. A try ends with its first run
 * when the compressor alone took longer than the best way takes, or saved nothing: so that it costs next to nothing where compression
 * is not for the wire or not for the content.
 */
#include "pageserver/server.h"

#define TRY_RUNS 6
#define TRY_IGNORED_RUNS 2 /* of them, the first: what is queued is of another way */
#define WINDOW_RUNS 8      /* after which the way in use is looked at again */
#define INTERVAL_MIN 16
#define INTERVAL_RAW_MIN 128 /* a wire that wants compression pays most for a try without */
#define INTERVAL_MAX 512
#define BETTER 0.95  /* of the best, to take its place */
#define SMALLER(bytes) ((bytes) - (bytes) / 16) /* more than this is not worth the destination's work */

static const struct {
    uint32_t compression;
    uint8_t flag;
} ways[WAYS] = {[WAY_LZ4] = {PC_COMPRESSION_LZ4, PC_FRAME_LZ4}, [WAY_ZSTD] = {PC_COMPRESSION_ZSTD, PC_FRAME_ZSTD}};

static uint32_t interval_min(enum way way)
{
    return way == WAY_RAW ? INTERVAL_RAW_MIN : INTERVAL_MIN;
}

static bool is_allowed(uint32_t compression, enum way way)
{
    return way == WAY_RAW || compression & ways[way].compression;
}

static void take(struct choice *choice, enum way way)
{
    choice->way = way;
    choice->sums = (struct sums){0};
}

/* The way of the next run, when the one before is not in the middle of being tried. */
static void choose(struct choice *choice, uint32_t compression)
{
    if (!(compression & COMPRESSION_ADAPTIVE)) {
        choice->way = compression & PC_COMPRESSION_LZ4 ? WAY_LZ4 : compression & PC_COMPRESSION_ZSTD ? WAY_ZSTD : WAY_RAW;
        return;
    }
    if (!is_allowed(compression, choice->best))
        choice->best = WAY_RAW;
    if (!is_allowed(compression, choice->way))
        take(choice, choice->best);
    if (choice->way != choice->best || choice->ns[choice->best] == 0)
        return;
    for (enum way way = 0; way < WAYS; way++)
        if (way != choice->best && is_allowed(compression, way) && !choice->wait[way]) {
            take(choice, way);
            return;
        }
}

static void end_try(struct choice *choice, bool won)
{
    enum way tried = choice->way;
    uint32_t interval = choice->interval[tried] * 2;

    if (won) {
        choice->interval[choice->best] = choice->wait[choice->best] = interval_min(choice->best);
        choice->best = tried;
    } else {
        interval = interval < interval_min(tried) ? interval_min(tried) : interval < INTERVAL_MAX ? interval : INTERVAL_MAX;
        choice->interval[tried] = choice->wait[tried] = interval;
    }
    take(choice, choice->best);
}

/* Nanoseconds for a byte of content at the rate at which bytes left the socket. */
static double measured(const struct sums *sums)
{
    return (double)sums->ns / (double)(sums->drained_bytes ? sums->drained_bytes : 1) * (double)sums->wire_bytes /
           (double)sums->content_bytes;
}

static void account(struct choice *choice)
{
    bool trying = choice->way != choice->best;
    double ns = (double)choice->run_ns / (double)choice->run_content_bytes;

    for (enum way way = 0; way < WAYS; way++)
        choice->wait[way] -= choice->wait[way] > 0;
    if (trying && choice->way != WAY_RAW &&
        (ns > choice->ns[choice->best] || choice->run_wire_bytes > SMALLER(choice->run_content_bytes))) {
        end_try(choice, false);
        return;
    }
    if (choice->sums.runs < (trying || choice->ns[choice->way] == 0 ? TRY_RUNS : WINDOW_RUNS))
        return;
    ns = measured(&choice->sums);
    if (trying) {
        bool won = ns < choice->ns[choice->best] * BETTER;

        choice->ns[choice->way] = ns;
        end_try(choice, won);
        return;
    }
    if (ns > choice->ns[choice->best] * 1.5) /* other content, or another wire: what was tried before tells little */
        for (enum way way = 0; way < WAYS; way++)
            if (choice->interval[way] > interval_min(way))
                choice->interval[way] = choice->wait[way] = interval_min(way);
    choice->ns[choice->best] = choice->ns[choice->best] == 0 ? ns : (choice->ns[choice->best] + ns) / 2;
    choice->sums = (struct sums){0};
}

void pc_run_begin(struct channel *channel)
{
    struct choice *choice = &channel->choice;

    choose(choice, __atomic_load_n(&channel->server->compression, __ATOMIC_RELAXED));
    choice->out_used = 0;
    choice->run_content_bytes = choice->run_wire_bytes = choice->run_ns = 0;
    if (choice->way == WAY_RAW || choice->out)
        return;
    choice->out = pc_buffer_new(PC_FRAME_MAX_PAYLOAD_BYTES);
    choice->out_bytes = choice->out ? PC_FRAME_MAX_PAYLOAD_BYTES : 0; /* without it: as it is */
}

void pc_run_add(struct channel *channel, struct batch *batch, struct pc_frame frame, const uint8_t *content, uint64_t bytes)
{
    struct choice *choice = &channel->choice;
    uint64_t begin_ns = pc_now_ns(), cap = SMALLER(bytes), done = 0;

    if (choice->way != WAY_RAW && cap <= choice->out_bytes - choice->out_used)
        done = pc_codec_compress(&choice->codec, ways[choice->way].compression, content, bytes, choice->out + choice->out_used, cap);
    choice->run_content_bytes += bytes;
    choice->run_wire_bytes += done ? done : bytes;
    if (done) {
        frame.flags |= ways[choice->way].flag;
        frame.content_bytes = (uint32_t)bytes;
        content = choice->out + choice->out_used;
        choice->out_used += done;
        ADD(channel->server, compressed_bytes, done);
        ADD(channel->server, uncompressed_bytes, bytes);
        bytes = done;
    }
    pc_batch_add(batch, frame, content, bytes);
    choice->run_ns += pc_now_ns() - begin_ns;
}

void pc_run_sent(struct channel *channel)
{
    struct choice *choice = &channel->choice;
    uint64_t now_ns, queued_bytes, drained_bytes, ns;

    if (!(__atomic_load_n(&channel->server->compression, __ATOMIC_RELAXED) & COMPRESSION_ADAPTIVE))
        return;
    now_ns = pc_now_ns();
    queued_bytes = pc_stream_unsent(&channel->stream);
    drained_bytes = choice->run_wire_bytes + choice->queued_bytes;
    drained_bytes -= queued_bytes < drained_bytes ? queued_bytes : drained_bytes;
    ns = now_ns - choice->sent_ns;
    choice->sent_ns = now_ns;
    choice->queued_bytes = queued_bytes;
    if (!choice->run_content_bytes)
        return;
    if (choice->sums.runs++ >= TRY_IGNORED_RUNS || choice->way == choice->best) {
        choice->sums.ns += ns;
        choice->sums.drained_bytes += drained_bytes;
        choice->sums.wire_bytes += choice->run_wire_bytes;
        choice->sums.content_bytes += choice->run_content_bytes;
    }
    account(choice);
}

void pc_choice_free(struct choice *choice)
{
    pc_codec_free(&choice->codec);
    pc_buffer_free(choice->out, choice->out_bytes);
    *choice = (struct choice){0};
}
