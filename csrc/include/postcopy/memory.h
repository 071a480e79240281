/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory of a machine (made, asked what is in it, written to files, read from files), and the states of its pages.
 *
 * Threads: no function takes a lock; those that block say so. Any thread may call them, several at once; struct pc_memory is the
 * caller's, who calls pc_memory_destroy when nothing else uses it any more. The thread that reads the memory's userfaultfd must
 * not touch or discard pages of it: that would wait for this very thread.
 */
#ifndef POSTCOPY_MEMORY_H
#define POSTCOPY_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
/* ---- memory ---- */
enum pc_memory_kind { PC_MEMORY_MEMFD = 1, PC_MEMORY_ANON = 2, PC_MEMORY_HUGETLB = 3 };
struct pc_remote;
struct pc_memory {
    void *base;          /* mapping the machine uses; NULL when there is none here */
    uint64_t size_bytes; /* multiple of page_bytes */
    uint64_t page_bytes; /* what one fault brings: the system's page, or the huge page */
    int kind;            /* enum pc_memory_kind */
    int fd;              /* memfd, or -1 */
    const struct pc_remote *remote; /* where it lies in another process, from which it is read then; else NULL */
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
/* The same for every page whose bit is set. */
int pc_memory_discard_pages(const struct pc_memory *memory, const uint64_t *words);
/* Sets the bit of every page that may hold something other than zeros, without touching a page: SEEK_DATA on a file or
 * memfd, PAGEMAP_SCAN or /proc/self/pagemap on anonymous memory. Pages whose bit is set already are not looked at: to ask again
 * costs what was absent. Blocks on I/O. */
int pc_memory_present(const struct pc_memory *memory, uint64_t *present_words);
/* The same of a memfd, and sets in `more` what it has added to `present`; it looks at no page again that is known, and at no hole twice. */
int pc_memory_present_more(const struct pc_memory *memory, uint64_t *present, uint64_t *more);
int pc_file_present(int fd, uint64_t size_bytes, uint64_t page_bytes, uint64_t *present_words);
/* Writes the memory to fd at file_offset, leaving a hole for every page that is all zero; reading never populates.
 * Every page must be resident or absent for good: a missing page would block this thread. Blocks on I/O. */
int pc_memory_dump(const struct pc_memory *memory, int fd, uint64_t file_offset);
/* Fills memory (not registered with any userfaultfd) from a file range; holes and zeros stay holes, what was there is
 * gone. The file may end inside the last page; -ENODATA when it is shorter. Blocks on I/O. */
int pc_memory_load(struct pc_memory *memory, int fd, uint64_t file_offset, uint64_t bytes);
/* 64-bit sum over CRC32Cs of 4 KiB blocks (csrc/memory/content.c has the construction): equal sizes and contents give equal
 * digests whatever is populated and whatever the page size; absent memory costs almost nothing. Blocks on I/O. */
int pc_memory_digest(const struct pc_memory *memory, uint64_t *digest);
int pc_file_digest(int fd, uint64_t size_bytes, uint64_t page_bytes, uint64_t *digest);
/* Bytes of the mapping that are populated, without touching any. */
int pc_memory_resident(const struct pc_memory *memory, uint64_t *resident_bytes);
/* memcpy for callers who may not touch memory themselves, since a page of it may be missing; blocks until it is there. */
void pc_bytes_copy(uint64_t to_address, uint64_t from_address, uint64_t bytes);

/* ---- memory of another process ---- */
/* Looked at and read from outside, while that process knows nothing of it (csrc/memory/remote.c). Reading takes the right to trace
 * it. Reading a page that its process waits for too, since another pager has not brought it yet, waits as well. */
struct pc_remote_extent {
    uint64_t address;    /* in that process */
    uint64_t first_byte; /* of the memory */
    uint64_t bytes;
};
#define PC_REMOTE_EXTENTS 64
/* Extents in the order of the memory, which they make up without a gap, in whole pages. pidfd, which is duplicated, is that of `pid`:
 * so that nothing is read of a process that has its number later. 0 or -errno with a line in `error`. */
int pc_remote_new(int pid, int pidfd, const struct pc_remote_extent *extents, uint32_t count, uint64_t page_bytes,
                  struct pc_remote **remote, char *error, size_t error_bytes);
void pc_remote_free(struct pc_remote *remote);
/* Whether pages that are absent there are elsewhere (with another pager that has not brought them, in a file that is mapped): all of
 * them count as present then. At first not. Alone, but for pc_remote_read. */
void pc_remote_set_incomplete(struct pc_remote *remote, int incomplete);
/* 0 when all was read, else -errno: -ESRCH when the process has ended, -EFAULT where it has no memory, -EPERM without the right. Blocks
 * while a page is missing there. */
int pc_remote_read(const struct pc_remote *remote, uint64_t first_byte, void *buffer, uint64_t bytes);
/* A descriptor of another process, duplicated into this one (pidfd_getfd), or -errno. */
int pc_remote_descriptor(int pidfd, int fd);

/* Which pages of it are written while its threads run, by way of its own userfaultfd, with nothing but mode WP (csrc/memory/
 * writelog.c). A thread here answers each first write to a page. */
struct pc_write_log;
/* The memory is registered from here on. Every page of it must have arrived, and no other program may read that userfaultfd: else
 * what is missing would become zeros. The descriptor is duplicated. 0 or -errno with a line in `error`: -EBUSY where another
 * userfaultfd has a part of the memory. Blocks for as long as the kernel walks the page tables. */
int pc_write_log_new(int uffd, const struct pc_remote *remote, struct pc_write_log **log, char *error, size_t error_bytes);
/* Adds to `words` the pages that were written, became present or were given back since the last call, or since the log was made;
 * how many it added, or -errno, after which nothing is known. Never one too few. `stopped`: nobody writes meanwhile, nor after; they
 * are then not protected again. One caller at a time. */
int64_t pc_write_log_collect(struct pc_write_log *log, uint64_t *words, int stopped);
/* Ends the logging: all is as it was before, nobody waits, and writes cost nothing any more. Alone, and last. */
void pc_write_log_free(struct pc_write_log *log);

/* ---- dirty log ---- */
/* Which pages of a machine were written, while it runs: by its threads, by KVM for its vCPUs, by system calls (csrc/memory/dirty.c).
 * It takes no more than the right to a userfaultfd, be it one with UFFD_USER_MODE_ONLY. */
struct pc_dirty_log;
#define PC_DIRTY_LOG_MEMORIES 64
int pc_dirty_log_new(struct pc_dirty_log **log); /* 0, -ENOMEM; free with pc_dirty_log_free */
/* Logs from here on what is written to a memory, through its mapping in this process, which must outlive the log; its index. One
 * caller at a time. -EOPNOTSUPP where the kernel has not what it takes, -EBUSY where another userfaultfd has a part of the
 * memory, with a line in `error`. Blocks for as long as the kernel walks the page tables. */
int pc_dirty_log_add(struct pc_dirty_log *log, const struct pc_memory *memory, char *error, size_t error_bytes);
/* The same of another process, whose memory is a file that it has mapped shared: by a userfaultfd of it, with the features WP_ASYNC,
 * WP_UNPOPULATED, WP_HUGETLBFS_SHMEM and PAGEFAULT_FLAG_WP and no events, with which nothing is registered, and by its
 * /proc/PID/pagemap. Both are duplicated; when the last copy of the userfaultfd is closed, all is as it was before. A page that is given
 * back there, by a hole in the file, is in the log when it had been written since the last call (not on huge pages, where nothing tells);
 * otherwise it counts as having kept its content. 0 or -errno with a line in `error`. */
int pc_dirty_log_new_of(int uffd, int pagemap, struct pc_dirty_log **log, char *error, size_t error_bytes);
/* A memory that lies at `address` of the process that writes; -EPERM: the page tables are those of another process. */
int pc_dirty_log_add_at(struct pc_dirty_log *log, const struct pc_memory *memory, uint64_t address, char *error, size_t error_bytes);
/* Adds to `words`, a map of the memory's pages, those that were written or marked since the last call, or since the memory was added;
 * how many it added, or -errno, after which nothing is known of this memory. Never one too few; one that was read for the first time
 * may be among them. -ESRCH: the process has ended. One caller at a time for each memory. Blocks as pc_dirty_log_add. */
int64_t pc_dirty_log_collect(struct pc_dirty_log *log, uint32_t memory, uint64_t *words);
/* For writes that page tables do not show, after each of them: by the kernel through pages that it had pinned before (O_DIRECT, fixed
 * buffers of io_uring), through another mapping or by write(2) to a memfd; and for memory that was given back. Bytes in no
 * memory of the log are skipped. Any thread, beside all but pc_dirty_log_free. */
void pc_dirty_log_mark(struct pc_dirty_log *log, uint64_t address, uint64_t bytes);
/* Ends the logging: writes cost nothing any more. Alone, and last. */
void pc_dirty_log_free(struct pc_dirty_log *log);

/* ---- page states ---- */
/* What has become of each page of a RAM block, in a sealed memfd that a pager writes and that outlives it: when the pager's process
 * dies, the process that has the machine, or a copy of its userfaultfd, settles what was under way and gives both to the next
 * pager. csrc/memory/states.c says why no page is lost, placed twice or filled with zeros by that. */
int pc_states_new(uint64_t pages); /* the descriptor, or -errno */
/* Copies the map of pages that were received or are known to be zero; -EINVAL when fd is not the states of as many pages. Any process, any time. */
int pc_states_received(int fd, uint64_t pages, uint64_t *words);
/* How many pages of the map are there; the same errors. */
int64_t pc_states_count(int fd, uint64_t pages);
/* For memory with a descriptor: to be called after a pager has died (its process has been waited for), before the next one has the
 * states, in the process that has the memory mapped at memory->base. How many pages were under way, or -errno; then nothing may go on. -ENOTRECOVERABLE: a
 * page of shared memory may have been placed and swapped out; fetching it again would undo what the machine has written to it. */
int64_t pc_states_settle(int fd, const struct pc_memory *memory);
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
