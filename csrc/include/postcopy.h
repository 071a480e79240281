/* SPDX-License-Identifier: Apache-2.0
 *
 * postcopy: the data plane's one public header.
 *
 * Everything between the two cffi markers is plain C that both a compiler and CFFI's cdef parser read; the Python
 * extension is generated from it, so what Python sees cannot drift from what C offers.
 *
 * Conventions
 *   - Functions return 0 (or a count) on success and -errno on failure; nothing sets errno for the caller, nothing is
 *     global (but pc_device_keep): any number of pagers, page servers and machines live side by side in one process.
 *   - Numbers say what they are: *_bytes, *_pages, *_ns. An *address* is a pointer value in this process, an *offset*
 *     counts bytes from the start of a RAM block, a *page* counts pages of that block; they never share a name.
 *   - Functions that may block or take a lock are marked so. None of them needs Python's GIL, all are called without it.
 *   - A file descriptor handed to an `attach` function belongs to the callee from then on, even when it fails.
 *   - An `error` buffer receives one line for a person, without a newline, always terminated; it may be NULL.
 */
#ifndef POSTCOPY_H
#define POSTCOPY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */

#define PC_MAX_BLOCKS 64          /* RAM blocks of one machine */
#define PC_MAX_SHARDS 64          /* userfaultfds of one pager */
#define PC_MAX_BULK_CHANNELS 16
#define PC_MAX_TRACKED_THREADS 64 /* threads whose blocktime a pager accounts (vCPUs) */
#define PC_ERROR_BYTES 256        /* a good size for an `error` buffer */

const char *pc_version(void);

/* ==== begin crc32c ==== */
/* CRC-32C (Castagnoli, reflected, as in RFC 3720); `crc` is 0 to begin and the last result to continue. */
uint32_t pc_crc32c(uint32_t crc, const void *data, size_t bytes);
/* 1 when every byte is zero. */
int pc_is_zero(const void *data, size_t bytes);
/* ==== end crc32c ==== */

/* ==== begin bitmap ==== */
/* A bitmap is an array of 64-bit words, bit i of the map = bit (i % 64) of word i / 64; bits past the end are zero.
 * The functions below are not atomic: they work on private copies. */
uint64_t pc_bitmap_words(uint64_t bits);
uint64_t pc_bitmap_count(const uint64_t *words, uint64_t bits);
/* First bit >= from that equals value (0 or 1); `bits` when there is none. */
uint64_t pc_bitmap_next(const uint64_t *words, uint64_t bits, uint64_t from, int value);
void pc_bitmap_set_range(uint64_t *words, uint64_t first, uint64_t count);
void pc_bitmap_clear_range(uint64_t *words, uint64_t first, uint64_t count);
/* Run-length form: LEB128 lengths of alternating runs, starting with a run of zeros (which may be empty), up to the last
 * set bit. Encode returns the bytes needed (writes at most `cap`, so call it with cap 0 to measure); decode returns 0,
 * or -EBADMSG for a malformed or overlong map, without ever writing past `bits`. */
int64_t pc_bitmap_rle_encode(const uint64_t *words, uint64_t bits, uint8_t *out, size_t cap);
int pc_bitmap_rle_decode(const uint8_t *data, size_t bytes, uint64_t *words, uint64_t bits);
/* ==== end bitmap ==== */

/* ==== begin histogram ==== */
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
/* Value at a percentile in 0..100 (upper edge of its bucket, never above max_ns); 0 when empty. */
uint64_t pc_histogram_percentile(const struct pc_histogram *h, double percentile);
/* ==== end histogram ==== */

/* ==== begin frame ==== */
/* The data channels' frame: a fixed header of PC_FRAME_HEADER_BYTES, little endian, then payload_bytes of payload.
 *   0 u32 magic   4 u8 type   5 u8 flags   6 u16 block   8 u64 first_page   16 u32 pages   20 u32 request_id
 *   24 u32 payload_bytes   28 u32 payload_crc   32 u32 reserved (zero)   36 u32 header_crc (CRC32C of bytes 0..35)
 * docs/protocol.md says what each type means. */
#define PC_FRAME_HEADER_BYTES 40
#define PC_FRAME_MAGIC 0x46504350 /* "PCPF" */
#define PC_FRAME_MAX_PAYLOAD_BYTES 4194304
enum pc_frame_type {
    PC_FRAME_REQUEST = 1, /* destination -> source: send these pages */
    PC_FRAME_PAGES = 2,   /* source -> destination: their content */
    PC_FRAME_ZERO = 3,    /* source -> destination: these pages are all zero; no payload */
    PC_FRAME_END = 4,     /* source -> destination, bulk: every page has been offered once */
    PC_FRAME_ERROR = 5    /* source -> destination: these pages cannot be served; payload is the reason, UTF-8 */
};
enum pc_frame_flags {
    PC_FRAME_DEMAND = 1 /* answers a request (as opposed to being pushed) */
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
};
void pc_frame_encode(const struct pc_frame *frame, uint8_t *header);
/* 0, or -EBADMSG with the reason in `error`. Checks magic, type, flags, sizes and header CRC; not the payload. */
int pc_frame_decode(const uint8_t *header, struct pc_frame *frame, char *error, size_t error_bytes);
/* ==== end frame ==== */

/* ==== begin devices ==== */
enum pc_device { PC_DEVICE_USERFAULTFD = 0, PC_DEVICE_KVM = 1, PC_DEVICE_TUN = 2 };
/* Opens the device now and keeps it, for pc_device_open after this process has given up its rights. For the whole process and
 * as long as it lives; not while another thread opens that device. 0 or -errno of open(2). */
int pc_device_keep(int device);
/* A descriptor of the device, close-on-exec, the caller's: of the one that is kept (PC_DEVICE_TUN: that very one, once), else
 * by open(2). Or -errno. */
int pc_device_open(int device);
/* ==== end devices ==== */

/* ==== begin uffd ==== */
enum pc_uffd_how {
    PC_UFFD_ANY = 0,      /* the first of the following that works */
    PC_UFFD_DEVICE = 1,   /* /dev/userfaultfd */
    PC_UFFD_SYSCALL = 2,  /* userfaultfd(2), all faults */
    PC_UFFD_USER_ONLY = 3 /* userfaultfd(2) with UFFD_USER_MODE_ONLY: faults raised by the kernel get EFAULT */
};
enum pc_uffd_mode { PC_UFFD_MISSING = 1, PC_UFFD_WP = 2, PC_UFFD_MINOR = 4 };
enum pc_uffd_ioctl {
    PC_UFFD_IOCTL_REGISTER = 0,
    PC_UFFD_IOCTL_UNREGISTER = 1,
    PC_UFFD_IOCTL_WAKE = 2,
    PC_UFFD_IOCTL_COPY = 3,
    PC_UFFD_IOCTL_ZEROPAGE = 4,
    PC_UFFD_IOCTL_MOVE = 5,
    PC_UFFD_IOCTL_WRITEPROTECT = 6,
    PC_UFFD_IOCTL_CONTINUE = 7,
    PC_UFFD_IOCTL_POISON = 8
};
enum pc_uffd_fill_mode { /* `mode` of the functions that fill; which one takes which is in ioctl_userfaultfd(2) */
    PC_UFFD_DONTWAKE = 1,
    PC_UFFD_FILL_WP = 2,        /* copy, continue: the page comes write-protected */
    PC_UFFD_ALLOW_SRC_HOLES = 2 /* move: a hole in the source is no error */
};
enum pc_uffd_writeprotect_mode { PC_UFFD_PROTECT = 1, PC_UFFD_PROTECT_DONTWAKE = 2 };
enum pc_uffd_event_type {
    PC_UFFD_EVENT_PAGEFAULT = 0x12,
    PC_UFFD_EVENT_FORK = 0x13,
    PC_UFFD_EVENT_REMAP = 0x14,
    PC_UFFD_EVENT_REMOVE = 0x15,
    PC_UFFD_EVENT_UNMAP = 0x16
};
enum pc_uffd_fault_flags { PC_UFFD_FAULT_WRITE = 1, PC_UFFD_FAULT_WP = 2, PC_UFFD_FAULT_MINOR = 4 };
struct pc_uffd_event {
    uint64_t address; /* pagefault: of the page, or exact with EXACT_ADDRESS; remap: from; remove, unmap: start */
    uint64_t end;     /* remove, unmap: end; remap: the new address */
    uint64_t bytes;   /* remap, remove, unmap: length */
    uint64_t flags;   /* pagefault: enum pc_uffd_fault_flags */
    int32_t type;     /* enum pc_uffd_event_type; a number without a name from a newer kernel is passed on */
    int32_t tid;      /* pagefault with THREAD_ID: the thread that faulted; else 0 */
    int32_t uffd;     /* fork: the child's userfaultfd; else -1 */
};
struct pc_uffd_api {
    int how;           /* how it was opened: PC_UFFD_DEVICE, ... */
    uint64_t features; /* bits this kernel has (all of them, whatever was asked) */
    uint64_t ioctls;
};
/* What this kernel and this user may have, asked on a throw-away fd. 0 or -errno. */
int pc_uffd_probe(int how, struct pc_uffd_api *api);
/* A new userfaultfd, non-blocking and close-on-exec, with `features` enabled. The fd, or -errno:
 * -EINVAL when the kernel lacks a feature, -EPERM/-EACCES when the user may not, -ENOSYS/-ENOENT when there is none. */
int pc_uffd_open(int how, uint64_t features, struct pc_uffd_api *api);
int pc_uffd_register(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *ioctls);
int pc_uffd_unregister(int uffd, uint64_t address, uint64_t bytes);
int pc_uffd_wake(int uffd, uint64_t address, uint64_t bytes);
/* Each of these returns 0 when all `bytes` were done, else -errno with *done_bytes telling how far it came (0 too when the
 * kernel did not say). They neither retry nor wake. */
int pc_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int pc_uffd_zeropage(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int pc_uffd_continue(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
int pc_uffd_poison(int uffd, uint64_t address, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
/* Anonymous pages from `source` to `address`, without a copy. Linux 6.8. */
int pc_uffd_move(int uffd, uint64_t address, uint64_t source, uint64_t bytes, uint64_t mode, uint64_t *done_bytes);
/* All of it or nothing: the kernel tells no partial count. mode: PC_UFFD_PROTECT, or 0 to lift the protection. */
int pc_uffd_writeprotect(int uffd, uint64_t address, uint64_t bytes, uint64_t mode);
/* Reads as many events as are there, at most `capacity`, with one system call; never waits. How many (0: none now), or -errno.
 * A fork event's descriptor becomes the caller's. */
int pc_uffd_read(int uffd, struct pc_uffd_event *events, uint32_t capacity);
/* The same again and again until there is one or spin_ns have passed: saves the sleep and the wake-up, costs a processor. */
int pc_uffd_read_spinning(int uffd, struct pc_uffd_event *events, uint32_t capacity, uint64_t spin_ns);
/* ==== end uffd ==== */

/* ==== begin memory ==== */
enum pc_memory_kind { PC_MEMORY_MEMFD = 1, PC_MEMORY_ANON = 2, PC_MEMORY_HUGETLB = 3 };
struct pc_memory {
    void *base;          /* mapping the machine uses; NULL when there is none */
    uint64_t size_bytes; /* multiple of page_bytes */
    uint64_t page_bytes; /* what one fault brings: the system's page, or the huge page */
    int kind;            /* enum pc_memory_kind */
    int fd;              /* memfd, or -1 */
};
uint64_t pc_page_bytes(void);
uint64_t pc_huge_page_bytes(void); /* default huge page size, 0 when the kernel has none */
/* Whether this host could hold so much memory of a kind (all blocks of a machine together) now: 0, or -EINVAL (0, not whole
 * pages) or -ENOMEM with the reason and the remedy in `error`. Reserves nothing. */
int pc_memory_check(int kind, uint64_t total_bytes, char *error, size_t error_bytes);
/* Maps new zeroed memory, MADV_NOHUGEPAGE and MADV_DONTFORK, nothing populated. 0 or -errno with a line in `error`. */
int pc_memory_create(int kind, uint64_t size_bytes, struct pc_memory *memory, char *error, size_t error_bytes);
void pc_memory_destroy(struct pc_memory *memory);
/* Maps a memfd, shared, as pc_memory_create does; the descriptor is duplicated. 0 or -errno. */
int pc_memory_map(int fd, uint64_t size_bytes, uint64_t page_bytes, int kind, struct pc_memory *memory);
/* Gives back pages from `address` on: punches holes in a file, MADV_DONTNEED where there is none. Blocks until a REMOVE event of
 * it was read where such are enabled. */
int pc_memory_discard(const struct pc_memory *memory, uint64_t address, uint64_t bytes);
/* Sets the bit of every page that may hold something other than zeros, without touching a page: SEEK_DATA on a file or
 * memfd, PAGEMAP_SCAN or /proc/self/pagemap on anonymous memory. The map must be zeroed. Blocks on I/O. */
int pc_memory_present(const struct pc_memory *memory, uint64_t *present_words);
int pc_file_present(int fd, uint64_t size_bytes, uint64_t page_bytes, uint64_t *present_words);
/* Writes the memory to fd at file_offset, leaving a hole for every page that is all zero; reading never populates.
 * Every page must be resident or absent for good: a missing page would block this thread. Blocks on I/O. */
int pc_memory_dump(const struct pc_memory *memory, int fd, uint64_t file_offset);
/* Fills memory (not registered with any userfaultfd) from a file range; holes and zeros stay holes, what was there is
 * gone. The file may end inside the last page; -ENODATA when it is shorter. Blocks on I/O. */
int pc_memory_load(struct pc_memory *memory, int fd, uint64_t file_offset, uint64_t bytes);
/* 64-bit sum over CRC32Cs of 4 KiB blocks (csrc/memory.c has the construction): equal sizes and contents give equal
 * digests whatever is populated and whatever the page size; absent memory costs almost nothing. Blocks on I/O. */
int pc_memory_digest(const struct pc_memory *memory, uint64_t *digest);
int pc_file_digest(int fd, uint64_t size_bytes, uint64_t page_bytes, uint64_t *digest);
/* Bytes of the mapping that are populated, without touching any. */
int pc_memory_resident(const struct pc_memory *memory, uint64_t *resident_bytes);
/* memcpy for callers who may not touch memory themselves, since a page of it may be missing; blocks until it is there. */
void pc_bytes_copy(uint64_t to_address, uint64_t from_address, uint64_t bytes);
/* ==== end memory ==== */

/* ==== begin pagemap ==== */
enum pc_page_category { /* PAGE_IS_* */
    PC_PAGE_WPALLOWED = 1,
    PC_PAGE_WRITTEN = 2,
    PC_PAGE_FILE = 4,
    PC_PAGE_PRESENT = 8,
    PC_PAGE_SWAPPED = 16,
    PC_PAGE_PFNZERO = 32,
    PC_PAGE_HUGE = 64,
    PC_PAGE_SOFT_DIRTY = 128
};
enum pc_scan_flags {
    PC_SCAN_WP_MATCHING = 1,  /* write-protect what matches, in the same step */
    PC_SCAN_CHECK_WPASYNC = 2 /* -EPERM when a part is not registered for that with WP_ASYNC */
};
struct pc_pagemap_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories; /* of enum pc_page_category, as far as the query's `returned` has them */
};
struct pc_pagemap_query { /* addresses of the process that the pagemap is of */
    uint64_t start;
    uint64_t end;
    uint64_t flags;     /* enum pc_scan_flags */
    uint64_t inverted;  /* categories that count where they are absent, for both of the following */
    uint64_t all_of;    /* a page matches when it has all of these */
    uint64_t any_of;    /* and, unless 0, one of these */
    uint64_t returned;  /* categories told in the answer; neighbours that agree in them are one region */
    uint64_t max_pages; /* stop after so many; 0: no limit */
};
/* How many regions of matching pages, in order, or -errno (-ENOTTY before Linux 6.7). Where the array is full the walk ends
 * early, *walk_end says where to go on. Neither populates nor touches. */
int64_t pc_pagemap_scan(int pagemap_fd, const struct pc_pagemap_query *query, struct pc_pagemap_region *regions,
                        uint32_t capacity, uint64_t *walk_end);
/* ==== end pagemap ==== */

/* ==== begin states ==== */
/* What has become of each page of a RAM block, in a sealed memfd that a pager writes and that outlives it: when the pager's process
 * dies, the process that has the machine (and a copy of the userfaultfd) settles what was under way and gives both to the next
 * pager. csrc/states.c says why no page is lost, placed twice or filled with zeros by that. */
int pc_states_new(uint64_t pages); /* the descriptor, or -errno */
/* Copies the map of pages that are there; -EINVAL when fd is not the states of as many pages. Any process, any time. */
int pc_states_known(int fd, uint64_t pages, uint64_t *words);
/* How many pages of the map are there; the same errors. */
int64_t pc_states_count(int fd, uint64_t pages);
/* To be called after a pager has died (its process has been waited for), before the next one has the states, in the process
 * that has the memory mapped at memory->base. How many pages were under way, or -errno; then nothing may go on. -ENOTRECOVERABLE: a
 * page of shared memory may have been placed and swapped out; fetching it again would undo what the machine has written to it. */
int64_t pc_states_settle(int fd, const struct pc_memory *memory);
/* ==== end states ==== */

/* ==== begin pager ==== */
/* The destination's side: faults in, requests out, pages placed. See csrc/pager.c for how it works. */
struct pc_pager;
enum pc_stage { PC_STAGE_SENT = 0, PC_STAGE_RECEIVED = 1, PC_STAGE_PLACED = 2, PC_STAGE_TOTAL = 3 };
#define PC_STAGES 4
enum pc_channel_kind { PC_CHANNEL_URGENT = 1, PC_CHANNEL_BULK = 2 };
enum pc_event_type {
    PC_EVENT_CHANNEL_DOWN = 1, /* a data channel ended: `error` and `text` say why; 0 is an orderly end by the peer */
    PC_EVENT_BULK_END = 2,     /* pager: the source says it has offered every page on this channel; page server: it has */
    PC_EVENT_COMPLETE = 3,     /* pager: no page is missing any more */
    PC_EVENT_FATAL = 4         /* this pager or page server cannot go on: `error`, `text` */
};
/* Events are told in order; what happens again before it was read is told once (csrc/events.h). */
struct pc_event {
    int type;
    int channel_kind;
    int channel; /* shard or bulk index */
    int error;   /* positive errno, 0 when none */
    char text[200];
};
struct pc_pager_stats {
    uint64_t total_pages, total_bytes;       /* of all blocks; bytes because blocks may differ in page size */
    uint64_t resident_pages, resident_bytes; /* received or known to be zero */
    uint64_t demand_pages;                   /* placed in answer to a fault */
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
};
int pc_pager_new(struct pc_pager **pager);
/* What a pager has counted, where it outlives the pager: made and read by one process, counted by the pagers of another one, one
 * after the other. Reading takes no lock; pages and bytes of the blocks are 0 in these statistics. */
struct pc_metrics;
int pc_metrics_new(struct pc_metrics **metrics);
void pc_metrics_free(struct pc_metrics *metrics);
int pc_metrics_fd(struct pc_metrics *metrics); /* a memfd, for pc_pager_new_with_metrics; stays the metrics' */
int pc_metrics_track_thread(struct pc_metrics *metrics, uint32_t slot, int32_t tid); /* see pc_pager_track_thread */
int pc_metrics_stats(struct pc_metrics *metrics, struct pc_pager_stats *stats);
int pc_metrics_latency(struct pc_metrics *metrics, int stage, struct pc_histogram *histogram);
int pc_metrics_blocktime(struct pc_metrics *metrics, uint64_t *blocktime_ns, uint32_t slots);
/* A pager that counts there. The descriptor stays the caller's. */
int pc_pager_new_with_metrics(int metrics_fd, struct pc_pager **pager);
/* Adds the next RAM block (index returned). The memory stays the caller's and must outlive the pager. */
int pc_pager_add_block(struct pc_pager *pager, const struct pc_memory *memory);
/* The same with states that outlive this pager: what they say is known is not missing. memory->base may be an address of
 * another process then, of which this one has a userfaultfd (pc_pager_adopt_shard); this pager touches no memory through it. */
int pc_pager_add_block_with_states(struct pc_pager *pager, const struct pc_memory *memory, int states_fd);
/* Pages of a block that are zero at the source: a fault on them is answered here. Before arming only. */
int pc_pager_set_zero(struct pc_pager *pager, uint32_t block, const uint64_t *zero_words);
/* Opens a userfaultfd with its fault thread (index returned). busy_poll_us: how long the thread spins after each
 * event before it sleeps. The thread runs from now on, with or without a channel. */
int pc_pager_add_shard(struct pc_pager *pager, int how, uint32_t busy_poll_us, char *error, size_t error_bytes);
/* The same around a userfaultfd that exists, of this or another process, with the features that it was opened with. The
 * descriptor becomes the pager's, also on failure; who made it keeps a copy, or nothing stops zeros when this process dies.
 * With EVENT_REMOVE or EVENT_UNMAP what its process throws away is zero from then on. EVENT_FORK, EVENT_REMAP and SIGBUS are
 * refused (-EOPNOTSUPP), as is what is blocking, is no userfaultfd, or has not had its UFFDIO_API (-EINVAL). */
int pc_pager_adopt_shard(struct pc_pager *pager, int uffd, uint64_t features, uint32_t busy_poll_us, char *error,
                         size_t error_bytes);
/* The features that pc_pager_add_shard asks for, of those `available`. */
uint64_t pc_pager_features(uint64_t available);
/* Registers pages of a block with a shard: from now on they fault. Pages that an earlier pager has registered on the same
 * userfaultfd are taken over: what waits for them faults anew. */
int pc_pager_arm(struct pc_pager *pager, uint32_t shard, uint32_t block, uint64_t first_page, uint64_t pages, char *error,
                 size_t error_bytes);
/* Gives a shard its urgent channel (again, after the old one went down: everything pending is requested anew). -EBUSY while
 * pc_pager_disconnect runs, here and for bulk channels. A channel goes down, and no more than that, when a page cannot be placed for want
 * of memory or of its address range (ENOMEM, ENOENT in the event): attach it again. */
int pc_pager_attach_urgent(struct pc_pager *pager, uint32_t shard, int fd);
/* Adds a bulk channel with its own thread. There may be none. */
int pc_pager_attach_bulk(struct pc_pager *pager, uint32_t channel, int fd);
/* Accounts the faults of kernel thread `tid` to `slot` (a vCPU). */
int pc_pager_track_thread(struct pc_pager *pager, uint32_t slot, int32_t tid);
/* Requests, through the urgent channels, pages that are missing and not requested, at most `limit` of all shards together, in place
 * of what is left of an earlier limit; how many there are, at most `limit`. */
int64_t pc_pager_request_missing(struct pc_pager *pager, uint64_t limit);
/* A request with this bit in its id was made ahead of any fault, by one of these two functions. */
#define PC_PAGER_REQUEST_AHEAD 0x80000000
/* Requests those pages of a range that are armed, missing and not requested, a window at a time beside what threads wait for;
 * sent when there is a channel, and again after a channel was lost. How many pages of the range are not there yet. */
int64_t pc_pager_request_range(struct pc_pager *pager, uint32_t block, uint64_t first_page, uint64_t pages);
/* Adds 1 to an eventfd, once, when every page of a range is there; requests nothing. The fd is duplicated and stays the
 * caller's. A ticket for pc_pager_unwatch, 0 when they are there already (nothing will be written), or -errno. */
int64_t pc_pager_watch(struct pc_pager *pager, uint32_t block, uint64_t first_page, uint64_t pages, int event_fd);
/* From its return on nothing is written any more. Harmless for a ticket that is used up. */
void pc_pager_unwatch(struct pc_pager *pager, int64_t ticket);
int pc_pager_event_fd(struct pc_pager *pager); /* eventfd: readable when pc_pager_next_event has something */
int pc_pager_next_event(struct pc_pager *pager, struct pc_event *event); /* 1, or 0 when there is none */
int pc_pager_stats(struct pc_pager *pager, struct pc_pager_stats *stats);
int pc_pager_latency(struct pc_pager *pager, int stage, struct pc_histogram *histogram); /* all shards merged */
/* Blocked time of each tracked slot in ns, a fault still pending counted up to now; returns the number of slots. */
int pc_pager_blocktime(struct pc_pager *pager, uint64_t *blocktime_ns, uint32_t slots);
int pc_pager_received(struct pc_pager *pager, uint32_t block, uint64_t *words); /* copy of the resident bitmap */
/* Closes every channel and waits for their threads; memory stays armed and faults stay blocked. */
int pc_pager_disconnect(struct pc_pager *pager);
/* Unregisters everything. -EBUSY while a page is missing: unregistering would show zeros. */
int pc_pager_disarm(struct pc_pager *pager);
/* Ends all threads and closes the userfaultfds. Where pages are still missing they are poisoned first (or, on kernels
 * without POISON, the userfaultfd is deliberately left open: -EBUSY), since closing it would turn them into zeros. */
int pc_pager_free(struct pc_pager *pager);
/* ==== end pager ==== */

/* ==== begin pageserver ==== */
/* The source's side: answers requests, pushes the rest. See csrc/pageserver.c. */
struct pc_pageserver;
struct pc_pageserver_stats {
    uint64_t total_pages;
    uint64_t sent_pages;     /* offered at least once, zero pages included */
    uint64_t demand_pages;   /* sent in answer to a request */
    uint64_t background_pages;
    uint64_t zero_pages;     /* told as a run of nothing */
    uint64_t requests;
    uint64_t repeated_requests; /* asked again after having been answered on demand */
    uint64_t bytes_sent;     /* on data channels, headers included */
    uint64_t bytes_received;
    uint64_t released_bytes; /* content given back to the host, see pc_pageserver_release */
};
int pc_pageserver_new(uint64_t max_bandwidth_bytes_per_s, struct pc_pageserver **server); /* 0: no limit; bulk only */
/* Adds the next RAM block (index returned): memory->base is read where it is not NULL, else memory->fd by pread.
 * page_bytes is the unit of transfer; present_words (copied) has a bit for each page that may be non-zero. */
int pc_pageserver_add_block(struct pc_pageserver *server, const struct pc_memory *memory, uint64_t page_bytes);
int pc_pageserver_set_present(struct pc_pageserver *server, uint32_t block, const uint64_t *present_words);
int pc_pageserver_attach_urgent(struct pc_pageserver *server, uint32_t shard, int fd, uint32_t busy_poll_us);
int pc_pageserver_attach_bulk(struct pc_pageserver *server, uint32_t channel, int fd);
/* Recovery: the destination has these pages and no others; all others are offered again. -EBUSY while a channel is attached,
 * -ENODATA when a page that was released is not among them. */
int pc_pageserver_set_received(struct pc_pageserver *server, uint32_t block, const uint64_t *received_words);
/* Urgent requests are answered and bulk is pushed only from here on (until then the machine may still change). */
int pc_pageserver_start(struct pc_pageserver *server);
/* The destination has these pages for good: bit i of `words` is page first_page + i. None of them is read again, and their
 * memory is given back, except for those that a channel is sending right now and those that share a larger page of memory
 * with one that is not released: later calls see to them. A request for a released page is never answered with content.
 * -EBUSY before the start, -ENOTSUP for memory that is a file. Blocks for as long as the kernel takes. */
int pc_pageserver_release(struct pc_pageserver *server, uint32_t block, uint64_t first_page, uint64_t pages,
                          const uint64_t *words);
/* Copies of two maps, either of which may be NULL: pages that are released, and those of them whose memory is gone. */
int pc_pageserver_released(struct pc_pageserver *server, uint32_t block, uint64_t *released_words,
                           uint64_t *discarded_words);
int pc_pageserver_set_bandwidth(struct pc_pageserver *server, uint64_t max_bandwidth_bytes_per_s);
int pc_pageserver_event_fd(struct pc_pageserver *server);
int pc_pageserver_next_event(struct pc_pageserver *server, struct pc_event *event);
int pc_pageserver_stats(struct pc_pageserver *server, struct pc_pageserver_stats *stats);
int pc_pageserver_disconnect(struct pc_pageserver *server);
void pc_pageserver_free(struct pc_pageserver *server);
/* ==== end pageserver ==== */

/* ==== begin bench ==== */
/* What `postcopy bench` measures with; see csrc/bench.c. Each may block for as long as a page is missing. */
/* Reads one byte of `count` different pages out of `pages`, scattered by `seed`, and adds to `faults` how long each read
 * took that was not shorter than hit_ns (shorter: the page was there). Returns how many. */
int64_t pc_bench_touch(const void *base, uint64_t page_bytes, uint64_t pages, uint64_t count, uint64_t seed,
                       uint64_t hit_ns, struct pc_histogram *faults);
void pc_bench_fill(void *base, uint64_t bytes, uint64_t seed); /* incompressible content */
/* The floor: 8 byte page number in, page out, until the peer closes. */
int pc_bench_floor_serve(int fd, const void *base, uint64_t page_bytes, uint64_t pages, int spin);
/* The floor's other end: event in, request, reply, UFFDIO_COPY, `count` times. */
int pc_bench_floor_fault(int uffd, int fd, void *base, uint64_t page_bytes, uint64_t count, int spin);
/* The least a program can do that serves faults of its own process: poll, read one event, COPY, `count` times. */
int pc_bench_uffd_serve(int uffd, const void *page, uint64_t page_bytes, uint64_t count);
/* ==== end bench ==== */

/* ==== begin machine: kvm ==== */
/* A small machine whose guest programs check themselves, see docs/machines.md. Its engine is KVM (x86-64, /dev/kvm), or an
 * interpreter of RISC-V (RV64IMA, any host, no rights), where a vCPU is a hart. Guest memory is the caller's, must outlive
 * the machine, and is only touched from here by pc_kvm_boot, pc_kvm_verify, the disk's O_DIRECT transfers, the network device, and
 * rv64's harts as they run. Every function may be called from any thread; two that change the same machine at once: -EBUSY. */
struct pc_kvm;
#define PC_KVM_MAX_VCPUS 8
enum pc_engine_kind { PC_ENGINE_KVM = 0, PC_ENGINE_RV64 = 1 };
enum pc_workload { PC_WORKLOAD_IDLE = 0, PC_WORKLOAD_DIRTY = 1, PC_WORKLOAD_RANDOM = 2, PC_WORKLOAD_DISK = 3,
                   PC_WORKLOAD_ECHO = 4 };
struct pc_kvm_config {
    uint32_t vcpus;                              /* 1..PC_KVM_MAX_VCPUS */
    uint32_t workload;                           /* enum pc_workload */
    struct pc_memory shared;                     /* RAM block "shared", at guest-physical 0 */
    struct pc_memory private_[PC_KVM_MAX_VCPUS]; /* RAM block "vcpuN": touched by that vCPU only; size_bytes may be 0 */
    uint64_t working_set_bytes;                  /* over all blocks; 0 or too much: all memory outside of the boot area */
    uint64_t seed;                               /* both ends must have the same */
    int disk_fd;                                 /* from pc_disk_open, stays the caller's; -1 when there is none */
    uint64_t disk_bytes;                         /* shared out evenly between the vCPUs */
    uint32_t engine;                             /* enum pc_engine_kind: what executes the instructions */
    uint32_t has_net;                            /* 0: no network device, and the next three are not looked at */
    int net_fd;                                  /* stays the caller's: O_NONBLOCK; one read or write is one Ethernet frame (a TAP
                                                  * with IFF_NO_PI, a SOCK_SEQPACKET socket) */
    uint64_t net_mac;                            /* first octet in bits 40 to 47; both ends must have the same */
    uint32_t net_address;                        /* IPv4, first octet in the highest bits; likewise */
};
enum pc_machine_state {
    PC_MACHINE_CREATED = 0, /* neither booted nor loaded */
    PC_MACHINE_PAUSED = 1,
    PC_MACHINE_RUNNING = 2,
    PC_MACHINE_FAILED = 3   /* a vCPU stopped for good; failure_text says why */
};
enum pc_vcpu_activity {
    PC_VCPU_PARKED = 0,  /* outside of the guest, waiting for pc_kvm_resume */
    PC_VCPU_GUEST = 1,   /* in the engine (KVM_RUN): computing, or blocked on a missing page */
    PC_VCPU_DEVICE = 2,  /* outside of it */
    PC_VCPU_HALTED = 3,  /* executed HLT or WFI, sleeps until the next tick; or stands where pc_rv64_run_until wants it */
    PC_VCPU_DISK = 4,    /* in the disk's pread or pwrite */
    PC_VCPU_GONE = 5,    /* thread ended */
    PC_VCPU_NET = 6      /* in the network device; waiting for a frame counts as HALTED */
};
struct pc_vcpu_stats {
    int32_t tid;         /* kernel thread, for blocktime accounting; known as soon as pc_kvm_open returns */
    int32_t activity;    /* enum pc_vcpu_activity */
    uint64_t exits;      /* from KVM_RUN, or rv64: device accesses; on this host */
    uint64_t marks;      /* the counters from here on move with the machine */
    uint64_t operations; /* as last announced by the guest */
    uint64_t failures;   /* reported by the guest */
};
struct pc_machine_stats {
    int32_t state;         /* enum pc_machine_state */
    uint32_t vcpus;
    uint32_t ready;        /* 1: every vCPU has completed its initial pass */
    uint32_t failures;     /* reported by the guest, all vCPUs */
    uint64_t nonce;        /* as last announced by the guest on this host; 0: not yet */
    uint64_t first_run_ns; /* CLOCK_MONOTONIC when the first vCPU entered the guest after the last resume; 0: not yet */
    uint64_t paused_ns;    /* CLOCK_MONOTONIC when the last pause was complete; 0: never */
    uint64_t disk_reads;
    uint64_t disk_writes;
    uint64_t disk_bytes;
    uint64_t disk_errors;  /* requests refused or failed */
    uint64_t serial_bytes; /* written by the guest */
    uint64_t net_received; /* frames given to the guest */
    uint64_t net_sent;     /* frames that left */
    uint64_t net_dropped;  /* frames that were too long, or that the host did not take */
    uint64_t net_errors;   /* requests refused */
    uint32_t failure_vcpu; /* of the first failure, valid when failure_text is not empty */
    uint32_t failure_code;
    uint64_t failure_where; /* guest-virtual address, MSR index ... as failure_text says */
    uint64_t failure_expected;
    uint64_t failure_found;
    char failure_text[192];
    struct pc_vcpu_stats vcpu[PC_KVM_MAX_VCPUS];
};
struct pc_machine_check {
    uint32_t ok;                /* 1: every invariant holds; else `text` says the first that does not */
    uint32_t bad_pages;         /* how many pages are wrong */
    uint64_t pages_checked;     /* working set, by content */
    uint64_t pages_zero;        /* the rest, seen to be zero or never touched */
    uint64_t operations;        /* accounted for, all vCPUs */
    uint64_t disk_bytes_checked;
    uint64_t nonce;             /* read from guest memory */
    char text[192];             /* what was verified, or what is wrong */
};
/* Backing file for `disk`: created or extended to `bytes` (never shrunk), opened O_DIRECT. The fd or -errno. Blocks on I/O. */
int pc_disk_open(const char *path, uint64_t bytes, char *error, size_t error_bytes);
/* A split of a machine's memory that pc_kvm_open accepts: about half is shared. page_bytes: the memory kind's. */
int pc_kvm_split_memory(uint64_t total_bytes, uint32_t vcpus, uint64_t page_bytes, uint64_t *shared_bytes,
                        uint64_t *private_bytes, char *error, size_t error_bytes);
/* Makes the machine with its vCPU threads, parked. -ENOENT/-EACCES/-EPERM: no /dev/kvm or no right to it, -ENOTSUP: a
 * feature is missing or the architecture is another, -EINVAL: a bad configuration. Does not touch guest memory. */
int pc_kvm_open(const struct pc_kvm_config *config, struct pc_kvm **machine, char *error, size_t error_bytes);
/* Source only, once: writes boot area and start state. -EBUSY unless PC_MACHINE_CREATED. */
int pc_kvm_boot(struct pc_kvm *machine);
/* Lets the vCPUs run. -EINVAL when neither booted nor loaded, -EIO when failed; 0 when running already. */
int pc_kvm_resume(struct pc_kvm *machine);
/* Returns when every vCPU is outside of the guest and of device emulation. Blocks up to timeout_ms. -ETIMEDOUT: `error`
 * names the vCPU that is stuck and where, and the machine runs on. 0 when paused already; -EIO when failed. */
int pc_kvm_pause(struct pc_kvm *machine, uint32_t timeout_ms, char *error, size_t error_bytes);
/* State of a paused machine, without guest memory. The bytes needed (call with cap 0 to measure), or -errno; nothing is
 * written unless cap suffices. */
int64_t pc_kvm_save_state(struct pc_kvm *machine, void *buf, size_t cap, char *error, size_t error_bytes);
/* Into a machine fresh from pc_kvm_open with the same configuration. -EBADMSG: damaged, -EPROTO: another version or an
 * unknown section, -EINVAL: another configuration, -ENOTSUP: this host's CPU or KVM lacks something. Validated in full before
 * anything is set; after an error in setting, close the machine. Does not touch guest memory. */
int pc_kvm_load_state(struct pc_kvm *machine, const void *buf, size_t bytes, char *error, size_t error_bytes);
/* Takes no lock, never blocks. Each number is current, together they are not one instant unless paused. */
int pc_kvm_stats(struct pc_kvm *machine, struct pc_machine_stats *stats);
/* Checks all guest memory (and the disk) of a paused machine from outside. All memory must be resident: this thread would
 * block on a missing page. 0 with the verdict in *check, or -errno when there is none. Blocks on I/O; takes seconds. */
int pc_kvm_verify(struct pc_kvm *machine, struct pc_machine_check *check);
/* eventfd: readable after ready, mark (at most 20/s), guest failure and vCPU failure. Belongs to the machine. */
int pc_kvm_event_fd(struct pc_kvm *machine);
/* Ends the vCPU threads, waits for calls under way in other threads (a verification is called off: -ECANCELED), and frees the
 * machine. -ETIMEDOUT after timeout_ms: a vCPU, or a load, is blocked where no signal reaches it, on a missing page. Nothing is
 * freed then and guest memory must stay mapped; call again once the page has come, or the userfaultfd is gone. */
int pc_kvm_close(struct pc_kvm *machine, uint32_t timeout_ms);
/* rv64 only (else -ENOTSUP): lets a paused machine run until each hart has executed `instructions` since its boot, in all, and
 * pauses it there exactly; a hart that has executed more already stands still. Blocks; -ETIMEDOUT after timeout_ms (paused,
 * wherever it was), -EIO when the machine failed (`error`). */
int pc_rv64_run_until(struct pc_kvm *machine, uint64_t instructions, uint32_t timeout_ms, char *error,
                      size_t error_bytes);
/* Instructions that a hart has executed since its boot: exact when paused; while it runs, as of its last exit. */
int pc_rv64_instructions(struct pc_kvm *machine, uint32_t hart, uint64_t *instructions);
/* ==== end machine: kvm ==== */

/* ==== begin faultpaths ==== */
/* `postcopy faultpaths`: every way in which a page that is not there can be touched, tried on this kernel. Implemented in
 * csrc/faultpaths/: each *cell* (operation x mode x backing) runs in a child process of its own, under a watchdog. */
enum pc_fp_mode {
    PC_FP_MISSING,   /* registered for missing faults; each event is answered with the page (UFFDIO_COPY) */
    PC_FP_MINOR,     /* the page is in the page cache, not in the page table; answered with UFFDIO_CONTINUE */
    PC_FP_WP,        /* the page is there and write-protected; answered by lifting the protection */
    PC_FP_WP_ASYNC,  /* the same with WP_ASYNC: no event, the kernel lifts it and remembers (PAGEMAP_SCAN) */
    PC_FP_USER_ONLY, /* missing, the userfaultfd opened with UFFD_USER_MODE_ONLY */
    PC_FP_SIGBUS,    /* missing, with the SIGBUS feature: no event, a signal or an error */
    PC_FP_POISON,    /* missing; answered with UFFDIO_POISON */
    PC_FP_MODES
};
enum pc_fp_backing { PC_FP_ANON, PC_FP_MEMFD, PC_FP_MEMFD_PRIVATE, PC_FP_HUGETLB, PC_FP_BACKINGS };
enum pc_fp_outcome {
    PC_FP_UNAVAILABLE, /* not here: `text` says why (no KVM, ENOSYS, EPERM, no pool, no O_DIRECT, mode not for this backing) */
    PC_FP_BLOCKED,     /* an event came, the operation waited, went on when the page was given, and succeeded, content right */
    PC_FP_PASSED,      /* succeeded without waiting for the page; with the right content, where there is any */
    PC_FP_REFUSED,     /* failed: `error` (EFAULT ...), with or without an event */
    PC_FP_SIGNALLED,   /* the thread got a signal: signal_number, signal_code */
    PC_FP_SPUN,        /* returned, or raised its event, again and again without waiting: progress only by spinning */
    PC_FP_WRONG,       /* content differs after the page was given, a bug of the kernel or of ours: `text` says where */
    PC_FP_HUNG,        /* the watchdog had to kill it */
    PC_FP_CRASHED      /* the child ended otherwise: `text` */
};
enum pc_fp_flags {
    PC_FP_WRITES = 1,    /* the page is written by the operation */
    PC_FP_NEEDS_DIR = 2, /* works on a file in pc_fp_spec.direct_dir */
    PC_FP_NEEDS_KVM = 4,
    PC_FP_NOFAULT = 8    /* must not fault: no event is the good outcome */
};
enum pc_fp_measure { PC_FP_MEASURE_SIGNAL = 1, PC_FP_MEASURE_KILL = 2, PC_FP_MEASURE_LOCKS = 4 };
enum pc_fp_thread { /* who raised the first event */
    PC_FP_THREAD_NONE,
    PC_FP_THREAD_OWN,    /* the one that runs the operation */
    PC_FP_THREAD_OTHER,  /* another thread of its process */
    PC_FP_THREAD_KERNEL, /* a kernel thread, or one that the kernel runs in the process: io_uring worker or poller, vhost */
    PC_FP_THREAD_PROCESS /* another process: a debugger, a reader of /proc/PID/mem */
};
enum pc_fp_lock { PC_FP_LOCK_MMAP, PC_FP_LOCK_MUNMAP, PC_FP_LOCK_MPROTECT, PC_FP_LOCK_FORK, PC_FP_LOCK_REGISTER };
#define PC_FP_LOCKS 5
/* Operations outside of the table, for tests of the machinery: one that never ends (nor does a child of it), one that ends its
 * process, one that finds other content than was given. */
#define PC_FP_TEST_HANG 0xFFFFFFFF
#define PC_FP_TEST_CRASH 0xFFFFFFFE
#define PC_FP_TEST_WRONG 0xFFFFFFFD
struct pc_faultpath {
    const char *name;  /* unique, dotted, class first: "user.load", "copy.write_pipe", "pin.odirect_read" ... */
    const char *group; /* user, copy, pin, futex, uring, kvm, remote, net, nofault, device */
    const char *what;  /* one line for a person: who touches the page, in which system call, by which way of the kernel */
    uint32_t modes;    /* bits 1 << enum pc_fp_mode, where the operation makes sense */
    uint32_t backings; /* bits 1 << enum pc_fp_backing */
    uint32_t flags;    /* enum pc_fp_flags */
};
uint32_t pc_faultpath_count(void);
/* 0, or -EINVAL. Strings are static. */
int pc_faultpath_get(uint32_t index, struct pc_faultpath *out);
struct pc_fp_spec {
    uint32_t operation; /* index, or PC_FP_TEST_* */
    int mode;           /* enum pc_fp_mode */
    int backing;        /* enum pc_fp_backing */
    uint32_t measure;   /* enum pc_fp_measure, or'ed: each is one more run, in a child of its own */
    uint32_t hold_us;   /* how long the page is withheld after the event, so that state and wait channel can be read */
    uint32_t timeout_ms;  /* watchdog of each child */
    char direct_dir[256]; /* directory of files for O_DIRECT; empty: the current one */
    /* -1: the child serves its own fault. Else a connected Unix SOCK_SEQPACKET: it sends one struct pc_fp_hand_over with
     * SCM_RIGHTS {uffd, and the memfd where there is one}, waits for one byte, then runs the operation. PC_FP_MISSING only,
     * without `measure`; in the result `events` stays 0, for they go elsewhere, and who waits is found by looking at all threads
     * once a millisecond. Stays the caller's. */
    int hand_over_fd;
};
struct pc_fp_hand_over {
    uint64_t address; /* of the page, in the child; registered for MISSING; it begins at offset 0 of the memfd */
    uint64_t bytes;
    uint64_t page_bytes;
    int32_t kind; /* enum pc_memory_kind */
    int32_t pid;  /* of the child, whose main thread runs the operation; it has a handler for SIGUSR1 */
};
/* What a page must hold: its first `bytes` bytes, the same everywhere and always. */
void pc_fp_content(uint8_t *page, uint64_t bytes);
struct pc_fp_result {
    int outcome; /* enum pc_fp_outcome */
    int error;   /* errno of a refused operation, positive; else 0 */
    int signal_number;
    int signal_code;       /* si_code */
    int64_t value;         /* what the system call returned, or its completion said */
    uint32_t events;       /* page faults read until the operation was over */
    uint32_t repeated;     /* of these, all but the first */
    uint32_t event_kind;   /* enum pc_uffd_event_type of the first; 0: there was none */
    uint64_t event_flags;  /* enum pc_uffd_fault_flags of the first */
    int64_t event_offset;  /* exact, from the page's start; -1: no event */
    uint8_t event_thread;  /* enum pc_fp_thread */
    uint8_t written;       /* WP, WP_ASYNC: afterwards the page counts as written (PAGEMAP_SCAN) */
    char state;            /* of the thread that waits, from /proc: 'S', 'D', 'R'; 0: none ever waited */
    char wchan[64];        /* where in the kernel it waits; "" where /proc does not say */
    uint64_t waited_ns;    /* from the first event (where there is none: from the beginning) to the operation's return */
    /* PC_FP_MEASURE_SIGNAL: a signal, for which there is a handler, comes while the page is withheld */
    uint8_t signal_measured;
    uint8_t handler_before_page; /* its handler ran before the page was given */
    uint32_t signal_events;      /* events between signal and page */
    uint64_t signal_cpu_ns;      /* processor time that the waiting thread burned between signal and page */
    uint64_t signal_window_ns;   /* how long that was */
    /* PC_FP_MEASURE_KILL: the userfaultfd stays open elsewhere, so that its closing is not what ends the wait */
    uint8_t kill_measured;
    uint8_t killed;
    uint64_t kill_ns; /* SIGKILL to reaped */
    /* PC_FP_MEASURE_LOCKS: medians by enum pc_fp_lock, of another thread of the process. 0: not measurable there. A call that
     * did not return while the page was withheld counts as all that time. */
    uint8_t locks_measured;
    uint64_t lock_idle_ns[PC_FP_LOCKS];      /* no fault pending */
    uint64_t lock_elsewhere_ns[PC_FP_LOCKS]; /* pending, the call works on another mapping */
    uint64_t lock_idle_same_ns[PC_FP_LOCKS]; /* no fault pending, in the page's mapping */
    uint64_t lock_same_ns[PC_FP_LOCKS];      /* pending, in the page's mapping */
    char text[200];
};
/* Runs one cell. Forks, so that the caller should have one thread only; blocks up to timeout_ms for each run and 2 s for the
 * reaping. Whatever happens, no process of it is left behind (-EBUSY: one could not be killed). 0, -EINVAL for an impossible
 * spec, or -errno of the machinery itself. */
int pc_faultpath_run(const struct pc_fp_spec *spec, struct pc_fp_result *result);
/* `postcopy bench contention`, in a child of its own: pending_faults threads wait on missing pages, with `bulk` another one
 * places pages by UFFDIO_COPY all the time, and one maps and unmaps a page `rounds` times. Blocks; 0 or -errno. */
int pc_fp_contention(uint32_t pending_faults, uint32_t bulk, uint32_t rounds, struct pc_histogram *mmap_latency,
                     struct pc_histogram *munmap_latency, char *error, size_t error_bytes);
/* ==== end faultpaths ==== */

/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
