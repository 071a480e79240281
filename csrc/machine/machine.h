/* SPDX-License-Identifier: Apache-2.0
 *
 * Private to csrc/machine: the parts of a machine, whichever engine executes its instructions.
 *
 *   machine.c    open and close, the public calls
 *   run.c        vCPU threads: started, kicked, parked, resumed
 *   touch.c      a wait for missing pages that a kick ends
 *   ports.c      device registers, and what the guest reports
 *   disk.c       the block device
 *   net.c        the network device
 *   layout.c     where things are in guest memory
 *   boot.c       what is there when the machine starts
 *   state.c      device state as a blob, and back
 *   verify.c     the invariants of each workload, checked from outside
 *   kvm*.c       engine: KVM
 *   rv64*.c      engine: an interpreter of RISC-V
 *
 * Locking. `lock` guards the run control (want_run, stop, transition, each vCPU's parked and at_limit). Counters are atomics, since
 * pc_machine_stats takes no lock. Everything else of a vCPU belongs to its thread while it runs and to the caller that holds
 * `transition` (or the only handle) while it is parked.
 */
#ifndef PC_MACHINE_H
#define PC_MACHINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/clock.h"
#include "core/runtime.h"
#include "core/util.h"
#include "machine/guest/abi.h"
#include "postcopy/machine.h"

_Static_assert(PC_MACHINE_MAX_VCPUS == PCG_VCPUS_MAX, "the guest's limit is the machine's");

/* A piece of guest-physical memory. */
struct pc_slot {
    uint64_t gpa;
    uint64_t bytes;
    uint8_t *host;
};
#define PC_SLOTS_MAX (2 + PC_MACHINE_MAX_VCPUS)

/* Of x86-64 page tables. */
#define PC_LARGE_PAGE_BYTES 0x200000ull
#define PC_GIB              0x40000000ull
#define PC_TABLE_ENTRIES    512u

/* Everything that follows from the configuration alone, so it is the same on both hosts. */
struct pc_layout {
    uint64_t boot_bytes; /* boot area, page tables included */
    uint64_t guest_end;  /* first guest-physical address above all memory */
    struct pc_slot slots[PC_SLOTS_MAX];
    uint32_t slot_count;
    struct pcg_range shared; /* working set */
    struct pcg_range private_[PC_MACHINE_MAX_VCPUS];
    uint64_t private_gpa[PC_MACHINE_MAX_VCPUS];
    uint64_t disk_slice_bytes;
};

/* X(enumerator, name) for each guest program; X(enumerator, program) for each workload. */
#define PC_PROGRAMS(X) X(IDLE, idle) X(DIRTY, dirty) X(RANDOM, random) X(DISK, disk) X(ECHO, echo)
#define PC_WORKLOADS(X) PC_PROGRAMS(X) X(SEQUENTIAL, random) X(ZIPF, random) X(PHASES, random)

/* X(name) for each counter that moves with the machine: those of MACH, those of NETD (state.c). */
#define PC_MACHINE_COUNTERS(X) X(disk_reads) X(disk_writes) X(disk_bytes) X(disk_errors) X(serial_bytes)
#define PC_NET_COUNTERS(X) X(net_received) X(net_sent) X(net_dropped) X(net_errors)

struct pc_engine;

struct pc_vcpu {
    struct pc_machine *machine;
    uint32_t index;
    void *of_engine; /* struct pc_kvm_vcpu, struct pc_hart */
    pthread_t thread;
    bool has_thread;
    bool parked, at_limit;  /* under machine->lock */
    uint32_t disk_status;   /* enum pcg_disk_status, device state */
    uint32_t net_status;    /* enum pcg_net_status, device state */
    uint64_t report_event_ns; /* when a report last raised the eventfd */
    _Atomic int32_t tid;
    _Atomic int32_t activity;
    _Atomic uint64_t exits;
    _Atomic uint64_t reports;
    _Atomic uint64_t operations;
    _Atomic uint64_t failures;
    _Atomic uint32_t ready;
};

struct pc_machine {
    struct pc_machine_config config;
    const struct pc_engine *engine;
    struct pc_layout layout;
    void *of_engine; /* struct pc_kvm */
    int event_fd;
    uint64_t disk_memory_align, disk_offset_align, disk_skew;
    pthread_mutex_t dirty_lock;
    struct pc_dirty_log *dirty_log; /* under dirty_lock; NULL: none */

    pthread_mutex_t lock;
    pthread_cond_t changed; /* want_run, stop, parked, transition */
    bool want_run;
    _Atomic bool stop;    /* written under the lock; read without by what takes long */
    bool transition;      /* a pause, save, load, boot or verify is under way */
    _Atomic uint32_t references; /* the handle, each thread, and the call that has `transition`: the last to drop it frees */
    _Atomic bool leave;   /* vCPU threads must come out: read without the lock on the hot path */
    _Atomic int32_t state;

    _Atomic uint64_t nonce, first_run_ns, paused_ns;
#define COUNTER(name) _Atomic uint64_t name;
    PC_MACHINE_COUNTERS(COUNTER)
    PC_NET_COUNTERS(COUNTER)
#undef COUNTER
    _Atomic uint32_t failure_claimed, failure_published;
    uint32_t failure_vcpu, failure_code;
    uint64_t failure_where, failure_expected, failure_found;
    char failure_text[192];

    uint32_t vcpu_count; /* made so far */
    struct pc_vcpu vcpu[PC_MACHINE_MAX_VCPUS];
};

/* A section of the state blob. */
struct pc_section_kind {
    char tag[5];
    bool per_vcpu, optional;
    uint64_t min_bytes, max_bytes, unit_bytes;
};
struct pc_section {
    const uint8_t *payload; /* not aligned: copy out; NULL: there is none */
    uint64_t bytes;
};
struct pc_state_writer;
#define PC_ENGINE_SECTIONS_MAX 10

struct pc_image {
    const uint8_t *begin, *end;
};

/* What executes instructions. Called by the vCPU's thread where nothing else is said; `error`: as everywhere. */
struct pc_engine {
    const char *program_counter;   /* its name */
    bool kick_again;               /* a kick's signal may be lost: repeat it until the vCPU is out */
    const struct pc_image *images; /* the guest programs, by workload */
    /* By pc_machine_open and pc_machine_close. The first two may be NULL. */
    int (*set_up)(struct pc_machine *machine, char *error, size_t error_bytes);
    void (*destroy)(struct pc_machine *machine); /* also one that is half set up */
    int (*make_vcpu)(struct pc_vcpu *vcpu, char *error, size_t error_bytes);
    void (*destroy_vcpu)(struct pc_vcpu *vcpu); /* also one that is half made */
    /* By pc_machine_boot. */
    int (*write_tables)(const struct pc_machine *machine, uint8_t *ram); /* of the processor, in the boot area; may be NULL */
    int (*set_start_state)(struct pc_vcpu *vcpu);
    /* Executes until something is to be looked at, at the latest when kicked. False: the vCPU has failed. */
    bool (*run)(struct pc_vcpu *vcpu);
    void (*complete)(struct pc_vcpu *vcpu);      /* before it is parked; may be NULL */
    void (*kick)(struct pc_vcpu *vcpu, bool on); /* any thread, under the lock: `run` is to return; or may go on */
    uint64_t (*where)(struct pc_vcpu *vcpu);     /* the program counter */
    uint32_t (*entropy)(struct pc_vcpu *vcpu);   /* NULL: the host's */
    /* Of a vCPU at rest, by pc_machine_save_state and pc_machine_load_state; `sections` as `section_kinds` has them. */
    const struct pc_section_kind *section_kinds;
    uint32_t section_count;
    int (*save_vcpu)(struct pc_vcpu *vcpu, struct pc_state_writer *writer, char *error, size_t error_bytes);
    int (*check_vcpu)(struct pc_vcpu *vcpu, const struct pc_section *sections, char *error, size_t error_bytes); /* sets nothing */
    int (*load_vcpu)(struct pc_vcpu *vcpu, const struct pc_section *sections, char *error, size_t error_bytes);
};
extern const struct pc_engine pc_engine_kvm, pc_engine_rv64;

/* machine.c. Drops a reference, outside of the lock: a thread that still is inside pthread_mutex_unlock must hold one. */
void pc_machine_release(struct pc_machine *machine);

/* run.c. Takes the machine for something that needs it at rest, in the given state, until pc_machine_end. 0, -EBUSY or -EIO. */
int pc_machine_begin(struct pc_machine *machine, int32_t state);
void pc_machine_end(struct pc_machine *machine, int32_t state);
/* The signal of a kick, 0 when there is none. Blocked while the vCPU looks whether it must leave, the signal cannot be lost before
 * a wait: it is opened there. */
int pc_kick_signal(void);
/* Under the lock: every vCPU must leave. */
void pc_machine_kick_all(struct pc_machine *machine);
/* Under the lock: true when every thread has ended, with whatever else was under way (`gone`), or is at least parked; false at the
 * deadline. */
bool pc_machine_wait_for_vcpus(struct pc_machine *machine, uint32_t timeout_ms, bool gone);
/* Starts the vCPU's thread; when this returns it is parked. */
int pc_vcpu_start(struct pc_vcpu *vcpu, char *error, size_t error_bytes);
/* Sleeps until the next tick, or until the vCPU must leave. */
void pc_vcpu_halt(struct pc_vcpu *vcpu);
/* Waits until the vCPU must leave; `at_limit` meanwhile. */
void pc_vcpu_wait_at_limit(struct pc_vcpu *vcpu);

/* touch.c. Every page of the memory is there when this returns true; false: the vCPU must leave, and nothing was done. */
bool pc_vcpu_touch(struct pc_vcpu *vcpu, const uint8_t *memory, uint64_t bytes);
/* In the kick's signal handler. Does not come back when the thread waits in pc_vcpu_touch. */
void pc_vcpu_touch_kicked(void);

/* rv64.c: in the kick's signal handler. Does not come back when the thread waits for a missing page. */
void pc_rv64_kicked(void);

/* ports.c. Something that pc_machine_stats shows has changed. */
void pc_machine_raise_event(struct pc_machine *machine);
/* For engines. This vCPU cannot go on: the whole machine stops. */
void pc_vcpu_failed(struct pc_vcpu *vcpu, const char *what);
/* Device registers; `arguments` are those that travel in registers (guest/abi.h). False: the vCPU is to stop. */
bool pc_device_out(struct pc_vcpu *vcpu, uint16_t port, uint32_t value, const uint64_t arguments[4]);
uint32_t pc_device_in(struct pc_vcpu *vcpu, uint16_t port);

/* layout.c */
/* enum pcg_pattern; of a workload whose program is not `random`, nobody looks at it. */
uint32_t pc_pattern_of(uint32_t workload);
int pc_layout_make(const struct pc_machine_config *config, struct pc_layout *layout, char *error, size_t error_bytes);
/* Host address of guest-physical memory, NULL unless all of it lies within one slot. */
void *pc_layout_gpa(const struct pc_layout *layout, uint64_t gpa, uint64_t bytes);
/* Host address of a guest-virtual address, NULL unless all of it lies within one block. */
void *pc_layout_gva(const struct pc_machine_config *config, uint64_t gva, uint64_t bytes);

/* boot.c: the boot area as it is before the first instruction, into `boot_bytes` zeroed bytes. */
int pc_boot_write(const struct pc_machine *machine, uint8_t *ram);

/* disk.c */
int pc_disk_geometry(struct pc_machine *machine, char *error, size_t error_bytes);
/* One request of vCPU's guest, all of it untrusted. Blocks on I/O and on missing pages. */
uint32_t pc_disk_request(struct pc_vcpu *vcpu, uint32_t op, uint64_t slice_offset, uint64_t gpa, uint64_t bytes);
/* For the verifier: reads part of a vCPU's slice. */
int pc_disk_inspect(const struct pc_machine *machine, uint32_t vcpu, uint64_t slice_offset, void *into, uint64_t bytes);

/* net.c */
int pc_net_check(const struct pc_machine *machine, char *error, size_t error_bytes);
/* One request of vCPU's guest, all of it untrusted. Waits for frames and missing pages, and until the vCPU must leave. */
uint32_t pc_net_request(struct pc_vcpu *vcpu, uint32_t op, uint64_t gpa, uint64_t bytes);
uint32_t pc_net_register(const struct pc_vcpu *vcpu, uint16_t port);

/* state.c */
int64_t pc_state_save(struct pc_machine *machine, void *buf, size_t cap, char *error, size_t error_bytes);
int pc_state_load(struct pc_machine *machine, const void *buf, size_t bytes, char *error, size_t error_bytes);
/* For engines: appends a section. 0 or -ENOMEM. */
int pc_state_put(struct pc_state_writer *writer, const struct pc_section_kind *kind, uint32_t vcpu, const void *payload,
                 size_t bytes);

/* verify.c */
int pc_verify(struct pc_machine *machine, struct pc_machine_check *check);

/* Accesses of guest memory race by the guest's own will; thread sanitizers would report that as ours. */
#if defined(__GNUC__) && !defined(__clang__)
#define PC_RACY __attribute__((no_sanitize_thread))
#else
#define PC_RACY __attribute__((no_sanitize("thread")))
#endif

#endif
