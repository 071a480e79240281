/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine: the pager at the destination and the page server at the source.
 *
 * Threads: both have threads of their own for faults and channels. A call that says nothing else may be made by any thread, several
 * at once, and does not block. Words for the rest:
 *   "locks"   waits for other callers of the same pager or page server, each of which holds the lock for as long as a call into the
 *             kernel takes
 *   "blocks"  waits for as long as it says
 *   "alone"   no other call on the same pager or page server may run
 * None may be made by a thread that holds what a missing page needs in order to come; none touches registered memory but through
 * the kernel.
 */
#ifndef POSTCOPY_ENGINE_H
#define POSTCOPY_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "postcopy/core.h"
#include "postcopy/memory.h"
#include "postcopy/tls.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
#define PC_MAX_BLOCKS 64          /* RAM blocks of one machine */
#define PC_MAX_TRACKED_THREADS 64 /* threads whose blocktime a pager accounts (vCPUs) */

/* ---- pager ---- */
/* The destination's side: faults in, requests out, pages placed. How it works: csrc/pager/pager.c. */
struct pc_pager;
struct pc_page_run {
    uint64_t first_page;
    uint32_t pages, block;
};
enum pc_stage { PC_STAGE_SENT = 0, PC_STAGE_RECEIVED = 1, PC_STAGE_PLACED = 2, PC_STAGE_TOTAL = 3 };
#define PC_STAGES 4
struct pc_pager_stats {
    uint64_t total_pages, total_bytes;       /* of all blocks; bytes because blocks may differ in page size */
    uint64_t resident_pages, resident_bytes; /* received or known to be zero */
    uint64_t demand_pages;                   /* placed in answer to a request for a thread that waits */
    uint64_t background_pages;               /* placed by push, content not zero */
    uint64_t zero_pages;                     /* known to be zero: never sent as content */
    uint64_t duplicate_pages;                /* arrived again and dropped */
    uint64_t requests;                       /* request frames: exactly one a page unless a channel was replaced */
    uint64_t faults;                         /* fault events read */
    uint64_t repeated_faults;                /* of them, on a page already requested or already there */
    uint64_t event_reads;                    /* read(2) calls on userfaultfds that returned events */
    uint64_t bytes_received;                 /* on data channels, headers included */
    uint64_t bytes_sent;
    uint64_t pending_faults;                 /* threads blocked now, as far as events were read */
    uint64_t oldest_pending_ns;              /* for how long the first of them has been; 0 when there is none */
    uint64_t frames_refused;                 /* bad frames: each ended its channel */
    uint64_t local_pages;                    /* placed from a local source, on demand or before */
    uint64_t prefetched_pages;               /* placed in answer to a request ahead of any fault, and counted nowhere else; and of local pages, and
                                              * of zero pages, those that were placed before a fault asked */
    uint64_t prefetch_hits;                  /* pages requested ahead that a thread has then reached, each once, as far as it is known: it came to wait
                                              * for one, or faulted beyond it in the same stream (pc_pager_set_prefetch) */
    uint64_t set_pages;                      /* of working sets that were asked for (pc_pager_prefetch_runs) and looked at */
    uint64_t set_hits;                       /* of them, placed before a fault asked */
    uint64_t local_waits;                    /* faults whose page a reader had to fetch: it was not in the page cache */
    uint64_t removes, removed_pages;         /* REMOVE and UNMAP events, and pages that they took away */
    uint64_t retries;                        /* placements that the kernel refused for the moment */
    uint64_t first_fault_ns, fault_100_ns, fault_1000_ns, fault_10000_ns; /* when a shard had served so many, by CLOCK_MONOTONIC */
};
struct pc_record_fault { /* one that has ended */
    uint64_t number; /* of its shard, from 1 */
    uint64_t place;  /* block << 40 | page */
    uint64_t event_ns, sent_ns, received_ns, placed_ns; /* CLOCK_MONOTONIC; sent_ns 0: its page did not come in answer to its request */
};
/* `metrics_fd`: where it counts, of struct pc_metrics, and stays the caller's; -1: in memory of its own. Free with pc_pager_free. */
int pc_pager_new(int metrics_fd, struct pc_pager **pager);
/* What a pager has counted, where it outlives the pager: made and read by one process, counted by the pagers of another one, one
 * after the other. Reading takes no lock; pages and bytes of the blocks are 0 in these statistics. */
struct pc_metrics;
int pc_metrics_new(struct pc_metrics **metrics);
void pc_metrics_free(struct pc_metrics *metrics);
int pc_metrics_fd(struct pc_metrics *metrics); /* a memfd, for pc_pager_new; stays the metrics' */
int pc_metrics_track_thread(struct pc_metrics *metrics, uint32_t slot, int32_t tid); /* see pc_pager_track_thread */
int pc_metrics_stats(struct pc_metrics *metrics, struct pc_pager_stats *stats);
int pc_metrics_latency(struct pc_metrics *metrics, int stage, struct pc_histogram *histogram);
int pc_metrics_blocktime(struct pc_metrics *metrics, uint64_t *blocktime_ns, uint32_t slots);
/* The states of the next block of those pagers, for the next call; mapped, the descriptor stays the caller's. One caller at a time. */
int pc_metrics_add_states(struct pc_metrics *metrics, int states_fd, uint64_t pages, uint64_t page_bytes);
int pc_metrics_bins(struct pc_metrics *metrics, uint8_t *bins, uint32_t count); /* see pc_pager_bins */
/* Adds the next RAM block (index returned). The memory stays the caller's and must outlive the pager. memory->base may be NULL: pages
 * of the block are then where pc_pager_arm_at says, once for each part of it. Locks.
 *
 * `states_fd`: states that outlive this pager, or -1. What they say is known is not missing. memory->base may be an address of another
 * process then, of which this one has a userfaultfd (pc_pager_adopt_shard); this pager touches no memory through it. The pager
 * that had them before has ended: its process has been waited for, or its pidfd says so. What it had under way counts as missing where
 * memory->fd is -1 (private memory); else pc_states_settle comes first (-EUCLEAN). What it had read of memory that was taken away is
 * applied by arming; a shard's is in the states of the block that it is armed with first, so arm in the same order. */
int pc_pager_add_block(struct pc_pager *pager, const struct pc_memory *memory, int states_fd);
/* Pages of a block that are zero at the source: a fault on them is answered here. At any time: what has been placed stays. */
int pc_pager_set_zero(struct pc_pager *pager, uint32_t block, const uint64_t *zero_words);
/* Opens a userfaultfd with its fault thread (index returned). busy_poll_us: how long the thread busy-waits after each
 * event before it sleeps. The thread runs from now on, with or without a channel. Locks. */
int pc_pager_add_shard(struct pc_pager *pager, int how, uint32_t busy_poll_us, char *error, size_t error_bytes);
/* The same around a userfaultfd that exists, of this or another process. Its features are asked of /proc; `features` are those that it
 * has where /proc is not there. The descriptor becomes the pager's, also on failure; who made it keeps a copy, or nothing stops zeros when
 * this process dies. With EVENT_REMOVE or EVENT_UNMAP what its process throws away is zero from then on, also when it does so before the
 * memory is armed here. EVENT_FORK, EVENT_REMAP and SIGBUS are refused (-EOPNOTSUPP), as is what is blocking, is no userfaultfd, or has
 * not had its UFFDIO_API (-EINVAL). Of private memory a page that is there already counts as received, and one that has left the
 * userfaultfd as zero. When its process has ended that is PC_EVENT_FATAL with ESRCH, by the first placement that meets it. Locks. */
int pc_pager_adopt_shard(struct pc_pager *pager, int uffd, uint64_t features, uint32_t busy_poll_us, char *error,
                         size_t error_bytes);
/* The features that pc_pager_add_shard asks for, of those `available`. */
uint64_t pc_pager_features(uint64_t available);
/* Registers pages of a block with a shard: from now on they fault. Pages that an earlier pager has registered on the same
 * userfaultfd are taken over: what waits for them faults anew. Locks; where the kernel has no minor faults, it discards what the
 * range has in the page cache, and blocks for that. */
int pc_pager_arm(struct pc_pager *pager, uint32_t shard, uint32_t block, uint64_t first_page, uint64_t pages, char *error,
                 size_t error_bytes);
/* The same at an address of the process whose userfaultfd the shard has, whatever the block's base is: a block may lie in several
 * parts, in any order. Pages that are never armed are never placed. -EBUSY where the pages, or the addresses, are armed already. */
int pc_pager_arm_at(struct pc_pager *pager, uint32_t shard, uint32_t block, uint64_t first_page, uint64_t pages, uint64_t address,
                    char *error, size_t error_bytes);
/* `tls`, here and for bulk channels: NULL for a plain connection, else what has done the handshake on `fd`; the pager's from then on,
 * as the descriptor is, also on failure. Gives a shard its urgent channel (again, after the old one went down: everything pending is requested anew). -EBUSY while
 * pc_pager_disconnect runs, here and for bulk channels. A channel goes down, and no more than that, when a page cannot be placed
 * for want of memory or of its address range (ENOMEM, ENOENT in the event): attach it again. Locks. */
int pc_pager_attach_urgent(struct pc_pager *pager, uint32_t shard, int fd, struct pc_tls *tls);
/* Adds a bulk channel with its own thread. There may be none. Locks, and joins the thread of the channel that was there. */
int pc_pager_attach_bulk(struct pc_pager *pager, uint32_t channel, int fd, struct pc_tls *tls);
/* Which compressed frames may come on bulk channels: a set of enum pc_compression, at first none. Another one ends its channel. -EINVAL,
 * or -ENOENT where a library is not here (pc_compression_available). */
int pc_pager_accept_compression(struct pc_pager *pager, uint32_t accepted);
/* Accounts the faults of kernel thread `tid` to `slot` (a vCPU). */
int pc_pager_track_thread(struct pc_pager *pager, uint32_t slot, int32_t tid);
/* Requests, through the urgent channels, pages that are missing and not requested, at most `limit` of all shards together, in place
 * of what is left of an earlier limit; how many there are, at most `limit`. */
int64_t pc_pager_request_missing(struct pc_pager *pager, uint64_t limit);
/* A request with this bit in its id was made ahead of any fault, by pc_pager_request_missing or one of the next three functions. It is
 * answered as every other: a thread that comes to wait for such a page does not have it requested again, but for pc_pager_ask_again. */
#define PC_PAGER_REQUEST_AHEAD 0x80000000
/* For a source that answers in an order of its own, and first what threads wait for: it is told that a thread has come to wait for a page that was
 * requested ahead, by another request for it with this bit in its id. Only the first one is answered. */
#define PC_PAGER_REQUEST_AGAIN 0x40000000
int pc_pager_ask_again(struct pc_pager *pager);
/* What is requested ahead of faults because of what they were, from now on; at first nothing. FORWARD: `pages` behind each fault. BOTH: so many
 * around it. ADAPTIVE: along strides, forward and backward, that the last faults show; `pages` is 0. -EINVAL. */
enum pc_prefetch { PC_PREFETCH_NONE = 0, PC_PREFETCH_FORWARD = 1, PC_PREFETCH_BOTH = 2, PC_PREFETCH_ADAPTIVE = 3 };
#define PC_PREFETCH_MAX_PAGES 64
int pc_pager_set_prefetch(struct pc_pager *pager, int how, uint32_t pages);
/* Requests those pages of these runs that are armed, missing, not local and not requested, in their order, ahead of what the other two functions
 * request, behind those of earlier calls. -EINVAL for pages that there are not, -ENOMEM. */
int pc_pager_request_runs(struct pc_pager *pager, const struct pc_page_run *runs, uint64_t count);
/* Requests those pages of a range that are armed, missing and not requested, a window at a time beside what threads wait for;
 * sent when there is a channel, and again after a channel was lost. How many pages of the range are not there yet. */
int64_t pc_pager_request_range(struct pc_pager *pager, uint32_t block, uint64_t first_page, uint64_t pages);
/* Adds 1 to an eventfd, once, when every page of a range is there; requests nothing. The fd is duplicated and stays the
 * caller's. A ticket for pc_pager_unwatch, 0 when they are there already (nothing will be written), or -errno. Locks, for microseconds,
 * and so does pc_pager_unwatch. */
int64_t pc_pager_watch(struct pc_pager *pager, uint32_t block, uint64_t first_page, uint64_t pages, int event_fd);
/* From its return on nothing is written any more. Harmless for a ticket that is used up. */
void pc_pager_unwatch(struct pc_pager *pager, int64_t ticket);
/* ---- pages that are here ---- */
/* Pages that are read here and never requested: those of `words`, NULL for all, whose content begins at `offset` of a file. A fault is
 * answered by the fault thread where the page cache has the page, else by a reader thread, so that a slow disk delays only threads that
 * wait for it. Holes of the file are zero, as are pages that hold nothing but zeros. A file that ends too early, now or later, and I/O
 * errors are FATAL events; threads that wait go on waiting, and are served when this is called again, with the same file or a repaired
 * one. The descriptor is duplicated; its file offset moves. At any time. -ENODATA: the file is too short; -EBUSY: the block has
 * pc_pager_stage. Blocks while it looks for holes. */
int pc_pager_set_local(struct pc_pager *pager, uint32_t block, int fd, uint64_t offset, const uint64_t *words, char *error,
                       size_t error_bytes);
/* What arrives for pages of this block that are not armed is written to this memfd, as large as the block, and is a local page from then
 * on: placed, by demand and in the background, once it is armed, and then removed from the memfd. What the memfd holds now, and is not
 * received, is taken as staged: a successor of a pager that died passes the same one. pc_pager_forget clears what is staged. Before the
 * first page arrives. The descriptor is duplicated. -EINVAL: it is too small, -EBUSY: the block has a local source. */
int pc_pager_stage(struct pc_pager *pager, uint32_t block, int fd);
/* How many threads read pages that the page cache does not have and that threads wait for, and how many read and place what is prefetched; at first
 * 2 of each. They start when they are first needed. -EBUSY after that, -EINVAL above PC_MAX_READERS or for 0. */
#define PC_MAX_READERS 16
int pc_pager_set_readers(struct pc_pager *pager, uint32_t demand, uint32_t background);
/* Places all local pages that are armed, in the background: in runs, behind what threads wait for, after the working set. */
int pc_pager_prefetch_all(struct pc_pager *pager);
/* Places the local pages of these runs, in their order and ahead of pc_pager_prefetch_all; zero pages among them are placed too, so
 * that they cost no fault. Pages that are not armed are skipped. In addition to runs that are left of an earlier call. -EINVAL for pages
 * that there are not, -ENOMEM. Locks. */
int pc_pager_prefetch_runs(struct pc_pager *pager, const struct pc_page_run *runs, uint64_t count);
/* Ends both; pages that are staged are placed none the less. */
int pc_pager_prefetch_stop(struct pc_pager *pager);
/* 1 while a background thread has, or will have, something to place; else 0. It ends by itself where the host is short of memory. */
int pc_pager_prefetching(struct pc_pager *pager);
/* A memfd for the order of first touch, that outlives pagers: room for as many pages as all blocks together have. The descriptor or
 * -errno. */
int pc_touches_new(uint64_t pages);
/* Logs there each page at its first demand fault, zero pages too, behind what it holds; what finds no room is not logged. The
 * descriptor stays the caller's. Before memory is armed. -EINVAL: it is something else. */
int pc_pager_record_touches(struct pc_pager *pager, int fd);
/* Copies them in their order, as block << 40 | page, and not more than `capacity`; how many, or -EINVAL. Any process, any time. A page may
 * come twice when a pager died: the first one counts. */
int64_t pc_touches_read(int fd, uint64_t *touches, uint64_t capacity);

int pc_pager_event_fd(struct pc_pager *pager); /* eventfd: readable when pc_pager_next_event has something */
int pc_pager_next_event(struct pc_pager *pager, struct pc_event *event); /* 1, or 0 when there is none. Locks, for microseconds */
/* The next four take no lock and stand in the way of no fault; figures that belong together may be one apart. */
int pc_pager_stats(struct pc_pager *pager, struct pc_pager_stats *stats);
int pc_pager_latency(struct pc_pager *pager, int stage, struct pc_histogram *histogram); /* all shards merged */
/* Blocked time of each tracked slot in ns, a fault still pending counted up to now; returns the number of slots. */
int pc_pager_blocktime(struct pc_pager *pager, uint64_t *blocktime_ns, uint32_t slots);
int pc_pager_received(struct pc_pager *pager, uint32_t block, uint64_t *words); /* copy of the resident bitmap */
/* Which parts of the memory are there: as many bins of equal size as it has pages, at most `count`, in the order of the blocks; each 0 (nothing
 * of it) to 63 (all of it). How many. Above 2 GiB a bin is an even sample of its pages, so that it takes microseconds. */
int pc_pager_bins(struct pc_pager *pager, uint8_t *bins, uint32_t count);
/* Closes every channel; memory stays armed and faults stay blocked. Blocks until the bulk threads have ended and every fault thread
 * has closed its channel: milliseconds. */
int pc_pager_disconnect(struct pc_pager *pager);
/* Precopy, before the machine runs here: these pages have changed at the source. Those that are received are missing again (and COMPLETE
 * will be announced again); the others stay as they are. What they hold is discarded by pc_memory_discard_pages, *after* this, in the
 * process that has the memory. No page of the block may be under way, since it would count as the new one: each bulk channel has ended
 * its push (PC_EVENT_BULK_END), and nothing is requested. -EBUSY while there is a watch, and when a block without an address or a descriptor has
 * been armed: nobody can discard what it holds. What is staged is removed here, and blocks for that. Locks. */
int pc_pager_forget(struct pc_pager *pager, uint32_t block, const uint64_t *stale_words);
/* Another push begins: each bulk channel may end once more. (A second END in one push ends its channel: -EBADMSG in the event.) */
int pc_pager_expect_push(struct pc_pager *pager);
/* Unregisters everything. -EBUSY while a page is missing: unregistering would show zeros. One caller at a time. Locks. */
int pc_pager_disarm(struct pc_pager *pager);
/* Ends all threads and closes the userfaultfds. Where pages are still missing they are poisoned first (or, on kernels
 * without POISON, the userfaultfd is deliberately left open: -EBUSY), since closing it would turn them into zeros. Alone, and last;
 * blocks until the threads have ended. */
int pc_pager_free(struct pc_pager *pager);
/* The same without poisoning or unregistering anything: others hold the userfaultfds, and what waits for a page waits for the next
 * pager that has them. No placement is under way when it returns; states that outlive the pager are settled. Alone, and last; blocks
 * until the threads have ended: at most for one read of a local file. */
int pc_pager_leave(struct pc_pager *pager);

/* ---- page server ---- */
/* The source's side: answers requests, pushes the rest. See csrc/pageserver/server.h. */
struct pc_pageserver;
struct pc_pageserver_stats {
    uint64_t total_pages;
    uint64_t sent_pages;     /* offered at least once, zero pages included */
    uint64_t demand_pages;   /* sent in answer to a request */
    uint64_t background_pages;
    uint64_t zero_pages;     /* sent as a run of zeros, without content */
    uint64_t requests;
    uint64_t repeated_requests; /* asked again after having been answered on demand */
    uint64_t bytes_sent;     /* on data channels, headers included */
    uint64_t bytes_received;
    uint64_t released_bytes; /* content given back to the host, see pc_pageserver_release */
    uint64_t compressed_bytes, uncompressed_bytes; /* payload of frames that were compressed, and what it stands for */
};
/* The limit is for bulk only; 0: none. */
int pc_pageserver_new(uint64_t max_bandwidth_bytes_per_s, struct pc_pageserver **server);
/* Adds the next RAM block (index returned): memory->base is read where it is not NULL, else memory->remote
 * (another process) where that is not, else memory->fd by pread.
 * page_bytes is the unit of transfer; present_words (copied) has a bit for each page that may be non-zero. Locks. */
int pc_pageserver_add_block(struct pc_pageserver *server, const struct pc_memory *memory, uint64_t page_bytes);
/* Locks, as do the next calls and pc_pageserver_set_bandwidth: for as long as a bulk thread looks for its next run. -EBUSY after
 * the first push, and from pc_pageserver_serve on. */
int pc_pageserver_set_present(struct pc_pageserver *server, uint32_t block, const uint64_t *present_words);
/* Descriptor and tls (NULL: a plain connection; else its handshake is done) are the server's from then on, also on failure. -EBUSY while the channel runs or a disconnect does. Locks, and joins
 * the thread of the channel that was there. */
int pc_pageserver_attach_urgent(struct pc_pageserver *server, uint32_t shard, int fd, struct pc_tls *tls, uint32_t busy_poll_us);
int pc_pageserver_attach_bulk(struct pc_pageserver *server, uint32_t channel, int fd, struct pc_tls *tls);
/* Recovery: the destination has these pages and no others; all others are offered again. -EBUSY while a channel is attached,
 * -ENODATA when a page that was released is not among them. Locks. */
int pc_pageserver_set_received(struct pc_pageserver *server, uint32_t block, const uint64_t *received_words);
/* The next push offers these pages again, those that were absent too: they have been written since the last one. -EBUSY during a
 * push, and from pc_pageserver_serve on. */
int pc_pageserver_set_stale(struct pc_pageserver *server, uint32_t block, const uint64_t *stale_words);
/* Each bulk channel pushes what has not been sent, then ends the push (a frame, and PC_EVENT_BULK_END). Before pc_pageserver_serve the
 * memory may be written meanwhile: each run is copied first, and what was written is to be named by pc_pageserver_set_stale before
 * the next push. A channel attached later joins the next push, or this one where the server serves. -EBUSY during a push. */
int pc_pageserver_push(struct pc_pageserver *server);
/* Each bulk channel ends its push after the run that it is sending; what was not sent is left to the next push. No effect when there is
 * no push, and from pc_pageserver_serve on. */
int pc_pageserver_stop_push(struct pc_pageserver *server);
/* The memory does not change any more: requests are answered from here on. Again: no effect. -EBUSY during a push. */
int pc_pageserver_serve(struct pc_pageserver *server);
/* Both: all of postcopy, after the pause. Again: no effect. */
int pc_pageserver_start(struct pc_pageserver *server);
/* The destination has these pages for good: bit i of `words` is page first_page + i. None of them is read again, and their
 * memory is given back, except for those that a channel is sending right now and those that share a larger page of memory
 * with one that is not released: later calls see to them. A request for a released page is never answered with content.
 * -EBUSY before pc_pageserver_serve, -ENOTSUP for memory that is a file or another process's. Blocks for as long as the kernel takes. */
int pc_pageserver_release(struct pc_pageserver *server, uint32_t block, uint64_t first_page, uint64_t pages,
                          const uint64_t *words);
/* Copies of two maps, either of which may be NULL: pages that are released, and those of them whose memory is gone. */
int pc_pageserver_released(struct pc_pageserver *server, uint32_t block, uint64_t *released_words,
                           uint64_t *discarded_words);
int pc_pageserver_set_bandwidth(struct pc_pageserver *server, uint64_t max_bandwidth_bytes_per_s);
/* How pushed pages go from the next run on: `how` is one of enum pc_compression, or 0. With `adaptive` it is a set, and each bulk channel
 * sends in the way, compressed or not, by which most content a second goes out. What does not become smaller is never compressed.
 * -EINVAL, or -ENOENT where a library is not here (pc_compression_available). */
int pc_pageserver_set_compression(struct pc_pageserver *server, uint32_t how, int adaptive);
int pc_pageserver_event_fd(struct pc_pageserver *server);
int pc_pageserver_next_event(struct pc_pageserver *server, struct pc_event *event);
int pc_pageserver_stats(struct pc_pageserver *server, struct pc_pageserver_stats *stats);
int pc_pageserver_bins(struct pc_pageserver *server, uint8_t *bins, uint32_t count); /* see pc_pager_bins; of what was sent */
/* Closes every channel. Blocks until their threads have ended. */
int pc_pageserver_disconnect(struct pc_pageserver *server);
/* Alone, and last; blocks as pc_pageserver_disconnect does. The memory stays the caller's. */
void pc_pageserver_free(struct pc_pageserver *server);
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
