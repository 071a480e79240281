/* SPDX-License-Identifier: Apache-2.0
 *
 * Toy machines, whose guest programs check themselves: see docs/machines.md. The engine is KVM (x86-64, /dev/kvm), or an
 * interpreter of RISC-V (RV64IMA, any host, no rights), where a vCPU is a hart. Guest memory is the caller's, must outlive the
 * machine, and is only touched from here by pc_machine_boot, pc_machine_verify, the disk's O_DIRECT transfers, the network
 * device, and rv64's harts as they run.
 *
 * Threads: a machine has one thread for each vCPU. Every function may be called from any thread; two that change the same
 * machine at once: -EBUSY. pc_machine_close waits for the calls that are under way. What else blocks says so.
 */
#ifndef POSTCOPY_MACHINE_H
#define POSTCOPY_MACHINE_H

#include <stddef.h>
#include <stdint.h>

#include "postcopy/memory.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
struct pc_machine;
#define PC_MACHINE_MAX_VCPUS 8
enum pc_engine_kind { PC_ENGINE_KVM = 0, PC_ENGINE_RV64 = 1 };
enum pc_workload { PC_WORKLOAD_IDLE = 0, PC_WORKLOAD_DIRTY = 1, PC_WORKLOAD_RANDOM = 2, PC_WORKLOAD_DISK = 3,
                   PC_WORKLOAD_ECHO = 4, PC_WORKLOAD_SEQUENTIAL = 5, PC_WORKLOAD_ZIPF = 6, PC_WORKLOAD_PHASES = 7 };
struct pc_machine_config {
    uint32_t vcpus;                                  /* 1..PC_MACHINE_MAX_VCPUS */
    uint32_t workload;                               /* enum pc_workload */
    struct pc_memory shared;                         /* RAM block "shared", at guest-physical 0 */
    struct pc_memory private_[PC_MACHINE_MAX_VCPUS]; /* RAM block "vcpuN": touched by that vCPU only; size_bytes may be 0 */
    uint64_t working_set_bytes;                      /* over all blocks; 0 or too much: all memory outside of the boot area */
    uint64_t seed;                                   /* both ends must have the same */
    int disk_fd;                                     /* from pc_disk_open, stays the caller's; -1 when there is none */
    uint64_t disk_bytes;                             /* shared out evenly between the vCPUs */
    uint32_t engine;                                 /* enum pc_engine_kind: what executes the instructions */
    uint32_t has_net;                                /* 0: no network device, and the next three are not looked at */
    int net_fd;                                      /* stays the caller's: O_NONBLOCK; one read or write is one Ethernet frame (a
                                                      * TAP with IFF_NO_PI, a SOCK_SEQPACKET socket) */
    uint64_t net_mac;                                /* first octet in bits 40 to 47; both ends must have the same */
    uint32_t net_address;                            /* IPv4, first octet in the highest bits; likewise */
};
enum pc_machine_state {
    PC_MACHINE_CREATED = 0, /* neither booted nor loaded */
    PC_MACHINE_PAUSED = 1,
    PC_MACHINE_RUNNING = 2,
    PC_MACHINE_FAILED = 3   /* a vCPU stopped for good; failure_text says why */
};
enum pc_vcpu_activity {
    PC_VCPU_PARKED = 0,  /* outside of the guest, waiting for pc_machine_resume */
    PC_VCPU_GUEST = 1,   /* in the engine (KVM_RUN): computing, or blocked on a missing page */
    PC_VCPU_DEVICE = 2,  /* outside of it */
    PC_VCPU_HALTED = 3,  /* executed HLT or WFI, sleeps until the next tick; or stands where pc_rv64_run_until wants it */
    PC_VCPU_DISK = 4,    /* in the disk's pread or pwrite */
    PC_VCPU_GONE = 5,    /* thread ended */
    PC_VCPU_NET = 6      /* in the network device; waiting for a frame counts as HALTED */
};
struct pc_vcpu_stats {
    int32_t tid;         /* kernel thread, for blocktime accounting; known as soon as pc_machine_open returns */
    int32_t activity;    /* enum pc_vcpu_activity */
    uint64_t exits;      /* from KVM_RUN, or rv64: device accesses; on this host */
    uint64_t reports;    /* the counters from here on move with the machine */
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
    struct pc_vcpu_stats vcpu[PC_MACHINE_MAX_VCPUS];
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
/* A split of a machine's memory that pc_machine_open accepts: about half is shared. page_bytes: the memory kind's. */
int pc_machine_split_memory(uint64_t total_bytes, uint32_t vcpus, uint64_t page_bytes, uint64_t *shared_bytes,
                            uint64_t *private_bytes, char *error, size_t error_bytes);
/* Makes the machine with its vCPU threads, parked. -ENOENT/-EACCES/-EPERM: no /dev/kvm or no right to it, -ENOTSUP: a
 * feature is missing or the architecture is another, -EINVAL: a bad configuration. Does not touch guest memory. */
int pc_machine_open(const struct pc_machine_config *config, struct pc_machine **machine, char *error, size_t error_bytes);
/* Source only, once: writes boot area and start state. -EBUSY unless PC_MACHINE_CREATED. */
int pc_machine_boot(struct pc_machine *machine);
/* Lets the vCPUs run. -EINVAL when neither booted nor loaded, -EIO when failed; 0 when running already. */
int pc_machine_resume(struct pc_machine *machine);
/* Returns when every vCPU is outside of the guest and of device emulation. Blocks up to timeout_ms. -ETIMEDOUT: `error`
 * names the vCPU that is stuck and where, and the machine runs on. 0 when paused already; -EIO when failed. */
int pc_machine_pause(struct pc_machine *machine, uint32_t timeout_ms, char *error, size_t error_bytes);
/* Marks in the log what the disk writes to guest memory (O_DIRECT: page tables do not show it), after each request; NULL: does not
 * any more, from its return on. What was written before the call is not marked: set the log before any page is read. Any thread. */
int pc_machine_set_dirty_log(struct pc_machine *machine, struct pc_dirty_log *log);
/* State of a paused machine, without guest memory. The bytes needed (call with cap 0 to measure), or -errno; nothing is
 * written unless cap suffices. */
int64_t pc_machine_save_state(struct pc_machine *machine, void *buf, size_t cap, char *error, size_t error_bytes);
/* Into a machine fresh from pc_machine_open with the same configuration. -EBADMSG: damaged, -EPROTO: another version or an
 * unknown section, -EINVAL: another configuration, -ENOTSUP: this host's CPU or KVM lacks something. Validated in full before
 * anything is set; after an error in setting, close the machine. Does not touch guest memory. */
int pc_machine_load_state(struct pc_machine *machine, const void *buf, size_t bytes, char *error, size_t error_bytes);
/* Takes no lock, never blocks. Each number is current, together they are not one instant unless paused. */
int pc_machine_stats(struct pc_machine *machine, struct pc_machine_stats *stats);
/* Checks all guest memory (and the disk) of a paused machine from outside. All memory must be resident: this thread would
 * block on a missing page. 0 with the verdict in *check, or -errno when there is none. Blocks on I/O; takes seconds. */
int pc_machine_verify(struct pc_machine *machine, struct pc_machine_check *check);
/* eventfd: readable after the first run that follows a resume, ready, report (at most 20/s), guest failure and vCPU failure. Belongs
 * to the machine. */
int pc_machine_event_fd(struct pc_machine *machine);
/* Ends the vCPU threads, waits for calls under way in other threads (a verification is called off: -ECANCELED), and frees the
 * machine. -ETIMEDOUT after timeout_ms: a vCPU, or a load, is blocked where no signal reaches it, on a missing page. Nothing is
 * freed then and guest memory must stay mapped; call again once the page has come, or the userfaultfd is gone. */
int pc_machine_close(struct pc_machine *machine, uint32_t timeout_ms);
/* rv64 only (else -ENOTSUP): lets a paused machine run until each hart has executed `instructions` since its boot, in all, and
 * pauses it there exactly; a hart that has executed more already stands still. Blocks; -ETIMEDOUT after timeout_ms (paused,
 * wherever it was), -EIO when the machine failed (`error`). */
int pc_rv64_run_until(struct pc_machine *machine, uint64_t instructions, uint32_t timeout_ms, char *error,
                      size_t error_bytes);
/* Instructions that a hart has executed since its boot: exact when paused; while it runs, as of its last exit. */
int pc_rv64_instructions(struct pc_machine *machine, uint32_t hart, uint64_t *instructions);
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
