/* SPDX-License-Identifier: Apache-2.0
 *
 * What the toy machine and its guest programs agree on: where things are in guest memory, what the ports mean,
 * and the arithmetic of the check words. Compiled into both, so that they cannot drift apart.
 *
 * Guest-virtual addresses (gva) are linear: the shared RAM block from 0, the private block of vCPU n from
 * PCG_PRIVATE_GVA + n * PCG_PRIVATE_STRIDE. Guest-physical addresses (gpa) have a hole from 3 to 4 GiB, as a PC
 * does; only the page tables and the disk requests speak of those.
 */
#ifndef PC_GUEST_ABI_H
#define PC_GUEST_ABI_H

#ifdef __ASSEMBLER__
#define PCG_U64(n) n
#else
#define PCG_U64(n) n##ull
#endif

#define PCG_PAGE_BYTES      0x1000
#define PCG_VCPUS_MAX       8

/* The boot area: the start of the shared block. */
#define PCG_BOOT_INFO       0x1000 /* struct pcg_boot */
#define PCG_GDT             0x2000
#define PCG_IDT             0x3000
#define PCG_VCPU_PAGES      0x4000 /* struct pcg_vcpu, one page each */
#define PCG_NET_BUFFERS     0xc000 /* echo: PCG_NET_BUFFER_COUNT frames, one page each */
#define PCG_STACKS          0x10000
#define PCG_STACK_BYTES     0x2000
#define PCG_IMAGE           0x20000 /* guest.ld and start.S repeat this number */
#define PCG_IMAGE_END       0x80000
#define PCG_PAGE_TABLES     0x80000

#define PCG_PRIVATE_GVA     PCG_U64(0x400000000000)
#define PCG_PRIVATE_STRIDE  PCG_U64(0x10000000000)
#define PCG_HOLE_BEGIN      PCG_U64(0xc0000000)
#define PCG_HOLE_END        PCG_U64(0x100000000)

#define PCG_CODE_SELECTOR   0x08
#define PCG_DATA_SELECTOR   0x10

/* Ports. Arguments beyond EAX travel in RBX, RCX, RSI, RDI. */
#define PCG_PORT_SERIAL      0x3f8
#define PCG_PORT_REPORT      0x5f0 /* out 32: enum pcg_report */
#define PCG_PORT_ENTROPY     0x5f4 /* in 32: random bits */
#define PCG_PORT_DISK        0x5f8 /* out 32: enum pcg_disk_op; RBX slice offset, RCX gpa, RSI bytes */
#define PCG_PORT_DISK_STATUS 0x5fc /* in 32: enum pcg_disk_status of this vCPU's last request */
#define PCG_PORT_NET         0x600 /* out 32: enum pcg_net_op; RBX gpa, RCX bytes */
#define PCG_PORT_NET_STATUS  0x604 /* in 32: enum pcg_net_status of this vCPU's last request, or the bytes received */
#define PCG_PORT_NET_MAC_LOW 0x608 /* in 32: the last four octets, the first of them in the highest bits */
#define PCG_PORT_NET_MAC_HIGH 0x60c /* in 32: the first two octets */
#define PCG_PORT_NET_ADDRESS 0x610 /* in 32: IPv4 address, its first octet in the highest bits */

/* rv64 has no ports: the same numbers are offsets from here, and the arguments travel in a1, a2, a3, a4. */
#define PCG_MMIO             PCG_U64(0x200000000000)

/* Numbers that start.S needs too. */
#define PCG_REPORT_FAILURE    3
#define PCG_FAILURE_EXCEPTION 1
#define PCG_EXCEPTION_STUBS   0x20040 /* 32 of them, 16 bytes apart */

#ifndef __ASSEMBLER__
#include <stdint.h>

#define PCG_MAGIC 0x746f6f6263706374u

enum pcg_report {
    PCG_READY = 1,   /* RBX nonce: this vCPU's initial pass is complete */
    PCG_PROGRESS = 2, /* RBX operations so far, RCX nonce */
    PCG_FAILURE = PCG_REPORT_FAILURE, /* RBX enum pcg_failure, RCX gva, RSI expected, RDI found */
};

enum pcg_failure {
    PCG_FAIL_EXCEPTION = PCG_FAILURE_EXCEPTION, /* gva = RIP, expected = vector, found = error code or CR2; the vCPU stops */
    PCG_FAIL_BOOT = 2,
    PCG_FAIL_CHECK_WORD = 3,
    PCG_FAIL_COUNT = 4,
    PCG_FAIL_PASS = 5,
    PCG_FAIL_XMM = 6,
    PCG_FAIL_GS_BASE = 7,
    PCG_FAIL_MSR = 8, /* gva = MSR index */
    PCG_FAIL_DEBUGREG = 9,
    PCG_FAIL_CR2 = 10,
    PCG_FAIL_TSC = 11,
    PCG_FAIL_NONCE = 12,
    PCG_FAIL_DISK_STATUS = 13,
    PCG_FAIL_DISK_DATA = 14,
    PCG_FAIL_REQUESTS = 15,
};

enum pcg_disk_op {
    PCG_DISK_READ = 1, /* backing file -> guest memory */
    PCG_DISK_WRITE = 2,
};

enum pcg_disk_status {
    PCG_DISK_OK = 0,
    PCG_DISK_BAD_REQUEST = 1, /* refused unread: outside of RAM or slice, misaligned, too long, unknown op */
    PCG_DISK_IO_ERROR = 2,
};

#define PCG_DISK_REQUEST_MAX 0x40000 /* bytes */

enum pcg_net_op {
    PCG_NET_RECEIVE = 1, /* the next frame, if there is one, into guest memory */
    PCG_NET_SEND = 2,
    PCG_NET_WAIT = 3,    /* as HLT, but at most until there is a frame */
};

enum pcg_net_status {
    PCG_NET_OK = 0,    /* sent; or nothing to receive */
    /* 1 .. PCG_NET_FRAME_MAX: so many bytes were received */
    PCG_NET_AGAIN = 0x10000,       /* the machine was paused meanwhile: nothing was done, ask again */
    PCG_NET_BAD_REQUEST = 0x10001, /* refused: no device, outside of RAM, too short or too long, unknown op */
};

#define PCG_NET_FRAME_MIN 14   /* bytes: an Ethernet header */
#define PCG_NET_FRAME_MAX 1514 /* no VLAN tag, no checksum; a longer one that comes is dropped */

/* Pages of one RAM block that belong to the working set. */
struct pcg_range {
    uint64_t gva;
    uint64_t pages;
};

/* Written by the machine before the first instruction; only `nonce` and `arrived` change later. */
struct pcg_boot {
    uint64_t magic;
    uint32_t vcpus;
    uint32_t workload;
    uint64_t seed;
    struct pcg_range shared;
    struct pcg_range private_[PCG_VCPUS_MAX];
    uint64_t private_gpa[PCG_VCPUS_MAX];
    uint64_t disk_slice_bytes;
    uint64_t disk_buffer_skew; /* where disk slots begin within their page: nonzero, so that they cross pages */
    uint32_t arrived; /* vCPUs that completed their initial pass */
    uint64_t nonce;   /* made by vCPU 0 from the entropy port; nowhere but here */
    uint32_t pattern; /* enum pcg_pattern: which pages the program random visits */
};

enum pcg_phase {
    PCG_PHASE_BOOT,
    PCG_PHASE_INIT, /* `init_done` units of the initial pass are complete */
    PCG_PHASE_WAIT, /* for the other vCPUs' initial pass */
    PCG_PHASE_RUN,
};

enum pcg_flight {
    PCG_FLIGHT_NONE,
    PCG_FLIGHT_FILL,  /* slots get the tags tag, tag + 1, ... */
    PCG_FLIGHT_READ,  /* slots get the tags of the chunks */
    PCG_FLIGHT_WRITE, /* chunks get the tags of the slots */
};

/* One vCPU's own page, pointed to by its GS base. The verifier reads it while the machine is paused. */
struct pcg_vcpu {
    uint64_t self; /* at %gs:0 */
    uint64_t id;
    volatile uint64_t phase;
    volatile uint64_t init_done;
    volatile uint64_t operations; /* completed; raised as the last act of each */
    volatile uint64_t rng;        /* copy of what lives in XMM7 */
    volatile uint64_t failures;
    uint64_t last_tsc;
    /* disk: tables (in the working set) and the request in flight */
    uint64_t slot_tags_gva, slots;
    uint64_t chunk_tags_gva, chunks;
    uint64_t slot_gva[2], range_slots[2];
    volatile uint64_t flight, flight_slot, flight_chunk, flight_count, flight_tag;
    uint64_t next_tag;
    /* echo */
    volatile uint64_t requests; /* answered; raised before the answer leaves */
    uint64_t net_mac;           /* as in a frame, in the six lower bytes */
    uint32_t net_address;       /* as in a frame */
};

/* ---- arithmetic of the workloads, identical inside and outside ---- */

static inline uint64_t pcg_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Seeds of neighbouring vCPUs must not give shifted copies of one sequence: mix, do not add. Never zero. */
static inline uint64_t pcg_rng_seed(uint64_t seed, uint64_t vcpu)
{
    return pcg_mix(seed ^ pcg_mix(vcpu + 1)) | 1;
}

static inline uint64_t pcg_rng_next(uint64_t x)
{
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x;
}

/* [0, n), n < 2^32, without a division. */
static inline uint64_t pcg_rng_below(uint64_t x, uint64_t n)
{
    return ((x >> 32) * n) >> 32;
}

/* The slice of `total` pages or bytes that belongs to one vCPU. */
static inline uint64_t pcg_slice_begin(uint64_t total, uint64_t vcpu, uint64_t vcpus)
{
    return total / vcpus * vcpu + (vcpu < total % vcpus ? vcpu : total % vcpus);
}

/*
 * A page of the `random` workload: a count, per-vCPU counts, and check words spread over the page with its first and
 * last word among them, so that a page torn at any boundary of 512 bytes or more, an older version of it, another page's
 * content and zeros all look wrong. The words in between stay zero.
 */
#define PCG_WORD_LOCK    1
#define PCG_WORD_COUNT   2
#define PCG_WORD_COUNTS  8 /* + vCPU */
#define PCG_CHECK_WORDS  9
#define PCG_CHECK_OFFSETS { 0, 64, 128, 192, 256, 320, 384, 448, 511 }

static inline uint64_t pcg_check_base(uint64_t seed, uint64_t gva, uint64_t count)
{
    uint64_t x = (gva ^ seed) * 0x9e3779b97f4a7c15u + (count + 1) * 0xd1342543de82ef95u;
    return (x ^ (x >> 29)) | 1;
}

/* Odd times odd: never zero. */
static inline uint64_t pcg_check_word(uint64_t base, uint64_t k)
{
    return base + (base << (2 * k + 1));
}

/*
 * Which pages the program of `random` visits. PCG_RANDOM: any, those that all vCPUs share too, and each visit changes its
 * page. The others keep to the vCPU's own part, and most of their visits only read. Visit n, with the generator's value x:
 */
enum pcg_pattern {
    PCG_RANDOM,
    PCG_SEQUENTIAL, /* in address order, again and again */
    PCG_ZIPF,       /* few pages often, most of them seldom */
    PCG_PHASES,     /* within a window of the memory, which is at another place after some time */
};
#define PCG_PHASE_WINDOWS 8  /* a window is one part in so many */
#define PCG_PHASE_VISITS  64 /* to each page of it on average, before the next one */

/* Page r as often as 1 / r, by levels: each level of twice as many pages has the same share of the visits. */
static inline uint64_t pcg_zipf_rank(uint64_t x, uint64_t pages)
{
    uint64_t levels = 1, level, begin;

    while (((uint64_t)2 << levels) - 1 <= pages)
        levels++;
    level = pcg_rng_below(x, levels);
    begin = ((uint64_t)1 << level) - 1;
    return begin + pcg_rng_below(x << 32, level + 1 < levels ? (uint64_t)1 << level : pages - begin);
}

static inline uint64_t pcg_pick(uint32_t pattern, uint64_t n, uint64_t x, uint64_t pages)
{
    uint64_t window = pages / PCG_PHASE_WINDOWS + 1;

    switch (pattern) {
    case PCG_SEQUENTIAL:
        return n % pages;
    case PCG_ZIPF: /* those that are often visited are all over the memory: times a prime that is above any number of pages */
        return pcg_zipf_rank(x, pages) * 0x9e3779b1u % pages;
    case PCG_PHASES:
        return (pcg_rng_below(pcg_mix(n / (window * PCG_PHASE_VISITS)), pages) + pcg_rng_below(x, window)) % pages;
    default:
        return pcg_rng_below(x, pages);
    }
}

static inline int pcg_changes(uint32_t pattern, uint64_t x)
{
    return pattern == PCG_RANDOM || (x & 3) == 0;
}

/* `disk`: memory is cut into slots, the vCPU's disk slice into chunks, both this long. Word i under a tag: */
#define PCG_SLOT_BYTES  0x2000
#define PCG_SLOT_WORDS  (PCG_SLOT_BYTES / 8)
#define PCG_CHUNKS_MAX  2048
#define PCG_FILL_SLOTS  32
#define PCG_TAG_STEP    0x2545f4914f6cdd1du

static inline uint64_t pcg_tag_first(uint64_t seed, uint64_t vcpu, uint64_t tag)
{
    return pcg_mix(seed ^ (vcpu << 56) ^ tag);
}

/* `echo`: each request is followed by a visit to so many pages of the working set. */
#define PCG_ECHO_PAGES       4
#define PCG_NET_BUFFER_COUNT 4
#define PCG_UDP_ECHO         7
/* Echo too, but octets 8 to 15 of the datagram become the number of this answer since boot, 16 to 23 the nonce, both little
 * endian: who asks sees that it is the same machine and that no answer is ever given twice. */
#define PCG_UDP_COUNT        2007
#define PCG_UDP_COUNT_BYTES  24 /* of payload that it needs */

/* What the registers hold that nothing but migration could change. `which` tells them apart. */
static inline uint64_t pcg_register_value(uint64_t nonce, uint64_t vcpu, uint64_t which)
{
    return pcg_mix(nonce + (vcpu << 8) + which);
}

#define PCG_PAT 0x0007010600070106u /* the reset value with entries 1 and 5 made write-through twice over: legal, unused */

#endif /* __ASSEMBLER__ */
#endif
