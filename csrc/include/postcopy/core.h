/* SPDX-License-Identifier: Apache-2.0
 *
 * The leaves that the other rooms build on: error lines, CRC-32C, bitmaps, histograms, the frame and the events of the data
 * channels.
 *
 * Threads: nothing here keeps state, takes a lock or blocks; any thread may call anything. What a call works on is the
 * caller's, who lets one thread at a time change it (a histogram may be read meanwhile).
 */
#ifndef POSTCOPY_CORE_H
#define POSTCOPY_CORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
#define PC_ERROR_BYTES 256 /* a good size for an `error` buffer */

const char *pc_version(void);

/* ---- checksums ---- */
/* CRC-32C (Castagnoli, reflected, as in RFC 3720); `crc` is 0 to begin and the last result to continue. */
uint32_t pc_crc32c(uint32_t crc, const void *data, size_t bytes);
/* CRC-64 (Jones, reflected), as snapshots of Firecracker have it at their end; begun and continued in the same way. */
uint64_t pc_crc64(uint64_t crc, const void *data, size_t bytes);
/* 1 when every byte is zero. */
int pc_is_zero(const void *data, size_t bytes);

/* ---- bitmap ---- */
/* A bitmap is an array of 64-bit words, bit i of the map = bit (i % 64) of word i / 64; bits past the end are zero.
 * The functions below are not atomic: they work on private copies. */
uint64_t pc_bitmap_words(uint64_t bits);
uint64_t pc_bitmap_count(const uint64_t *words, uint64_t bits);
/* First bit >= from that equals value (0 or 1); `bits` when there is none. */
uint64_t pc_bitmap_next(const uint64_t *words, uint64_t bits, uint64_t from, int value);
void pc_bitmap_set_range(uint64_t *words, uint64_t first, uint64_t count);
void pc_bitmap_clear_range(uint64_t *words, uint64_t first, uint64_t count);
/* Clears the bits that are set in `others`. */
void pc_bitmap_clear_those(uint64_t *words, const uint64_t *others, uint64_t bits);
/* Replaces `count` bits of `to` by those of another map. */
void pc_bitmap_copy(uint64_t *to, uint64_t to_first, const uint64_t *from, uint64_t from_first, uint64_t count);
/* Sets the bit of every page of `to_bytes` that overlaps with a page of `from_bytes` whose bit is set. */
void pc_bitmap_rescale(uint64_t *to, uint64_t to_bytes, const uint64_t *from, uint64_t from_bytes, uint64_t bits);
/* Run-length form: LEB128 lengths of alternating runs, starting with a run of zeros (which may be empty), up to the last
 * set bit. Encode returns the bytes needed (writes at most `cap`, so call it with cap 0 to measure); decode returns 0,
 * or -EBADMSG for a malformed or overlong map, without ever writing past `bits`. */
int64_t pc_bitmap_rle_encode(const uint64_t *words, uint64_t bits, uint8_t *out, size_t cap);
int pc_bitmap_rle_decode(const uint8_t *data, size_t bytes, uint64_t *words, uint64_t bits);

/* ---- histogram ---- */
/* Log-linear histogram of nanoseconds: 32 steps in each power of two, so a value is off by 3 % at most. */
#define PC_HISTOGRAM_BUCKETS 1920
struct pc_histogram {
    uint64_t count;
    uint64_t sum_ns;
    uint64_t max_ns;
    uint64_t buckets[PC_HISTOGRAM_BUCKETS];
};
void pc_histogram_add(struct pc_histogram *h, uint64_t ns); /* one writer at a time; readers may run beside it */
void pc_histogram_merge(struct pc_histogram *into, const struct pc_histogram *from);
/* Leaves those of a snapshot that are not in an earlier one of the same; the maximum stays that of both. */
void pc_histogram_subtract(struct pc_histogram *from, const struct pc_histogram *earlier);
uint64_t pc_histogram_bucket_edge(uint32_t bucket); /* the highest value that it has */
/* Value at a percentile in 0..100 (upper edge of its bucket, never above max_ns); 0 when empty. */
uint64_t pc_histogram_percentile(const struct pc_histogram *h, double percentile);

/* ---- compression ---- */
enum pc_compression { PC_COMPRESSION_LZ4 = 1, PC_COMPRESSION_ZSTD = 2 }; /* bits of a set */
/* Those of the set `wanted` that can be used here; their libraries are loaded now. `error` says what one of the others lacks. Locks while
 * it loads. */
uint32_t pc_compression_available(uint32_t wanted, char *error, size_t error_bytes);

/* ---- frame ---- */
/* The data channels' frame: a fixed header of PC_FRAME_HEADER_BYTES, little endian, then payload_bytes of payload.
 *   0 u32 magic   4 u8 type   5 u8 flags   6 u16 block   8 u64 first_page   16 u32 pages   20 u32 request_id
 *   24 u32 payload_bytes   28 u32 payload_crc   32 u32 content_bytes   36 u32 header_crc (CRC32C of bytes 0..35)
 * payload_crc 0: not checked; over TLS, which authenticates every byte, none is sent.
 * docs/protocol.md says what each type means. */
#define PC_FRAME_HEADER_BYTES 40
#define PC_FRAME_MAGIC 0x46504350 /* "PCPF" */
#define PC_FRAME_MAX_PAYLOAD_BYTES 4194304
enum pc_frame_type {
    PC_FRAME_REQUEST = 1, /* destination -> source: send these pages */
    PC_FRAME_PAGES = 2,   /* source -> destination: their content */
    PC_FRAME_ZERO = 3,    /* source -> destination: these pages are all zero; no payload */
    PC_FRAME_END = 4,     /* source -> destination, bulk: the end of a push, in which every page not sent before was offered */
    PC_FRAME_ERROR = 5    /* source -> destination: these pages cannot be served; payload is the reason, UTF-8 */
};
enum pc_frame_flags {
    PC_FRAME_DEMAND = 1, /* answers a request (as opposed to being pushed) */
    PC_FRAME_LZ4 = 2,    /* pages that were pushed: the payload is an LZ4 block of content_bytes */
    PC_FRAME_ZSTD = 4    /* the same, one Zstandard frame */
};
struct pc_frame {
    uint8_t type;
    uint8_t flags;
    uint16_t block;
    uint32_t pages;
    uint64_t first_page;
    uint32_t request_id;
    uint32_t payload_bytes;
    uint32_t payload_crc;
    uint32_t content_bytes; /* of a payload that is compressed; else 0 */
};
void pc_frame_encode(const struct pc_frame *frame, uint8_t *header);
/* 0, or -EBADMSG with the reason in `error`. Checks magic, type, flags, sizes and header CRC; not the payload. */
int pc_frame_decode(const uint8_t *header, struct pc_frame *frame, char *error, size_t error_bytes);

/* ---- events ---- */
/* What a pager or a page server tells, rarely, through an eventfd: in order, and once when it happens again before it was read
 * (csrc/core/events.h). */
#define PC_MAX_SHARDS 64 /* userfaultfds of one pager, each with an urgent channel */
#define PC_MAX_BULK_CHANNELS 16
enum pc_channel_kind { PC_CHANNEL_URGENT = 1, PC_CHANNEL_BULK = 2 };
enum pc_event_type {
    PC_EVENT_CHANNEL_DOWN = 1, /* a data channel ended: `error` and `text` say why; 0 is an orderly end by the peer */
    PC_EVENT_BULK_END = 2,     /* pager: the source says that this channel has ended its push; page server: it has */
    PC_EVENT_COMPLETE = 3,     /* pager: no page is missing any more */
    PC_EVENT_FATAL = 4         /* this pager or page server cannot go on: `error`, `text` */
};
struct pc_event {
    int type;
    int channel_kind;
    int channel; /* shard or bulk index */
    int error;   /* positive errno, 0 when none */
    char text[200];
};
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
