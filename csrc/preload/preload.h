/* SPDX-License-Identifier: Apache-2.0
 *
 * libpostcopy-preload.so: what `postcopy run` puts into a program (LD_PRELOAD) whose memory is to be moved while it runs.
 *
 * Memory of another process can be guarded by a userfaultfd only if that process has opened it. So the library remembers the
 * program's shared, writable mappings of files in memory (tmpfs, hugetlbfs, memfd), and on request opens a userfaultfd in the
 * program, registers mappings with it, and hands it out. It moves no page, and changes nothing else.
 *
 * POSTCOPY_PRELOAD names its socket. Optional: POSTCOPY_PRELOAD_UFFD, the number of an open /dev/userfaultfd; POSTCOPY_PRELOAD_LAZY,
 * the features of a userfaultfd that guards each mapping from its making on; POSTCOPY_PRELOAD_DEBUG, for lines on stderr.
 *
 * Requests come over a Unix socket (SOCK_SEQPACKET, mode 0600) from the program's own user or root: a connection, one
 * struct preload_request, one struct preload_reply with its descriptors, the end. A thread answers, which starts with the first
 * mapping that is remembered: a program that has become a daemon by fork(2) before that is served. One that forks later: the
 * parent is served, the child is not.
 */
#ifndef PRELOAD_H
#define PRELOAD_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PRELOAD_MAGIC 0x52504350u /* "PCPR" */
#define PRELOAD_VERSION 1
#define PRELOAD_MAPPINGS 128 /* that are remembered; a message has at most 253 descriptors */
#define PRELOAD_NAME_BYTES 208

enum preload_op {
    PRELOAD_LIST = 1, /* all mappings in the order of their making, each with a descriptor of its file */
    PRELOAD_ARM = 2, /* a userfaultfd, opened with `features`; the mappings of `ranges`, if any, are registered with it, by `mode` */
    PRELOAD_TAKE = 3, /* the userfaultfd that is kept, once more: its owner has ended */
    PRELOAD_DISARM = 4, /* closes the userfaultfd that is kept, with which nothing is registered any more */
};

enum preload_flag {
    PRELOAD_KEEP = 1, /* of ARM: the program keeps a copy, so that it waits for its pages when the asker dies */
};

/* What an `error` is about. */
enum preload_step {
    PRELOAD_DONE,
    PRELOAD_REQUEST, /* it makes no sense, or is of another version */
    PRELOAD_PEER, /* of another user */
    PRELOAD_RANGE, /* `index` of the ranges is not a mapping that is remembered */
    PRELOAD_KEPT, /* a userfaultfd is kept already; of TAKE and DISARM: there is none */
    PRELOAD_OPEN, /* no way leads to a userfaultfd that stops the kernel's own faults too */
    PRELOAD_FEATURES, /* the kernel lacks one, or the userfaultfd that guards since the start does: `features` has it */
    PRELOAD_REGISTER, /* `index` of the ranges */
    PRELOAD_GUARDED, /* `index` of the mappings is registered with what is kept: without it, its missing pages would read as zeros */
};

/* Of a reply. */
enum preload_state {
    PRELOAD_IS_KEPT = 1,
    PRELOAD_IS_LAZY = 2, /* mappings are guarded from their making on, and nobody has asked for the userfaultfd yet */
    PRELOAD_LOST = 4, /* there were more mappings than can be remembered, or no descriptor for one */
};

struct preload_range {
    uint64_t address;
    uint64_t bytes;
};

struct preload_request {
    uint32_t magic;
    uint16_t version;
    uint16_t op;
    uint32_t flags;
    uint32_t count; /* of ranges; no more are sent */
    uint64_t features;
    uint64_t mode;
    struct preload_range ranges[PRELOAD_MAPPINGS];
};

struct preload_mapping {
    uint64_t address;
    uint64_t bytes;
    uint64_t offset; /* in the file */
    uint64_t device; /* of the file, as in struct stat */
    uint64_t inode;
    uint32_t page_bytes;
    uint32_t reserved;
    char name[PRELOAD_NAME_BYTES]; /* of the file, as /proc has it; cut where it is longer */
};

struct preload_reply {
    uint32_t magic;
    uint16_t version;
    uint16_t op;
    int32_t error; /* errno; 0: done */
    uint32_t step;
    uint32_t index;
    uint32_t count; /* of mappings, and of descriptors; no more are sent. ARM and TAKE: one descriptor, no mapping */
    uint32_t state;
    uint32_t reserved;
    uint64_t features; /* that the userfaultfd was opened with */
    struct preload_mapping mappings[PRELOAD_MAPPINGS];
};

_Static_assert(sizeof(struct preload_mapping) == 256, "preload_mapping");
_Static_assert(offsetof(struct preload_request, ranges) == 32, "preload_request");
_Static_assert(offsetof(struct preload_reply, mappings) == 40, "preload_reply");
_Static_assert(sizeof(long) == 8, "mmap64 is mmap");

/* What the C library's functions of these names become (hooks.c), and what the start and the end of the program do. */
void *preload_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
int preload_munmap(void *address, size_t bytes);
void *preload_mremap(void *address, size_t bytes, size_t new_bytes, int flags, void *new_address);
void preload_begin(void);
void preload_end(void);

#endif
