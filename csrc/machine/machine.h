/* SPDX-License-Identifier: Apache-2.0
 *
 * Private to csrc/machine: the parts of a machine with vCPUs, whichever engine executes its instructions.
 *
 *   run.c        open, vCPU threads, pause and resume, devices, close: the same for every engine
 *   kvm.c        engine: KVM
 *   rv64.c       engine: an interpreter of RISC-V
 *   layout.c     where things are in guest memory; boot
 *   state.c      device state as a blob, and back
 *   disk.c       the block device
 *   net.c        the network device
 *   verify.c     the invariants of each workload, seen from outside
 *
 * Locking. `lock` guards the run control (want_run, stop, transition, each vCPU's parked). Counters are atomics, since
 * pc_machine_stats takes no lock. Everything else of a vCPU belongs to its thread while it runs and to the caller that holds
 * `transition` (or the only handle) while it is parked.
 */
#ifndef PC_MACHINE_H
#define PC_MACHINE_H

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "machine/guest/abi.h"
#include "postcopy/machine.h"

_Static_assert(PC_MACHINE_MAX_VCPUS == PCG_VCPUS_MAX, "the guest's limit is the machine's");

struct kvm_run;
struct kvm_cpuid2;

/* A piece of guest-physical memory. */
struct pc_slot {
    uint64_t gpa;
    uint64_t bytes;
    uint8_t *host;
};
#define PC_SLOTS_MAX (2 + PC_MACHINE_MAX_VCPUS)

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

struct pc_hart; /* rv64.h */
struct pc_engine;

struct pc_vcpu {
    struct pc_machine *machine;
    uint32_t index;
    struct pc_hart *hart;     /* rv64 only */
    int fd;                   /* this and the next two: kvm only */
    struct kvm_run *run;
    struct kvm_cpuid2 *cpuid; /* as given to KVM, which adds to it what it likes */
    pthread_t thread;
    bool has_thread;
    bool parked, standing; /* under machine->lock */
    bool io_pending;       /* the last exit's instruction is not complete before the next KVM_RUN */
    uint32_t disk_status;  /* enum pcg_disk_status, device state */
    uint32_t net_status;   /* enum pcg_net_status, device state */
    uint64_t mark_told_ns; /* when a mark last raised the eventfd */
    _Atomic int32_t tid;
    _Atomic int32_t activity;
    _Atomic uint64_t exits;
    _Atomic uint64_t marks;
    _Atomic uint64_t operations;
    _Atomic uint64_t failures;
    _Atomic uint32_t ready;
};

struct pc_machine {
    struct pc_machine_config config;
    const struct pc_engine *engine;
    struct pc_layout layout;
    int kvm_fd, vm_fd, event_fd;
    size_t run_bytes;
    uint32_t xsave_bytes;
    bool has_sync_regs, has_xsave2, has_xcrs, has_debugregs, has_tsc_control;
    struct kvm_cpuid2 *host_cpuid; /* what this host supports */
    uint64_t disk_memory_align, disk_offset_align, disk_skew;

    pthread_mutex_t lock;
    pthread_cond_t changed; /* want_run, stop, parked, transition */
    bool want_run;
    _Atomic bool stop;    /* written under the lock; read without by what takes long */
    bool transition;      /* a pause, save, load, boot or verify is under way */
    _Atomic uint32_t references; /* the handle, each thread, and whoever has `transition`: the last one to go frees */
    _Atomic bool leave;   /* vCPU threads must come out: read without the lock on the hot path */
    _Atomic int32_t state;

    _Atomic uint64_t nonce, first_run_ns, paused_ns;
    _Atomic uint64_t disk_reads, disk_writes, disk_bytes, disk_errors, serial_bytes;
    _Atomic uint64_t net_received, net_sent, net_dropped, net_errors;
    _Atomic uint32_t failure_claimed, failure_published;
    uint32_t failure_vcpu, failure_code;
    uint64_t failure_where, failure_expected, failure_found;
    char failure_text[192];

    uint32_t vcpu_count; /* made so far */
    struct pc_vcpu vcpu[PC_MACHINE_MAX_VCPUS];
};

/* What executes instructions. Called by the vCPU's thread where nothing else is said; `error`: as everywhere. */
struct pc_engine {
    const char *program_counter; /* its name */
    bool kick_again;             /* a kick's signal may be lost: repeat it until the vCPU is out */
    int (*set_up)(struct pc_machine *machine, char *error, size_t error_bytes); /* by pc_machine_open, may be NULL */
    int (*make_vcpu)(struct pc_vcpu *vcpu, char *error, size_t error_bytes); /* by pc_machine_open */
    int (*set_start_state)(struct pc_vcpu *vcpu);                            /* by pc_machine_boot */
    /* Executes until something is to be looked at, at the latest when kicked. False: the vCPU has failed. */
    bool (*run)(struct pc_vcpu *vcpu);
    void (*complete)(struct pc_vcpu *vcpu);       /* before it is parked; may be NULL */
    void (*kick)(struct pc_vcpu *vcpu, bool on);  /* any thread, under the lock: `run` is to return; or may go on */
    uint64_t (*where)(struct pc_vcpu *vcpu);      /* the program counter */
    uint32_t (*entropy)(struct pc_vcpu *vcpu);    /* NULL: the host's */
    void (*destroy_vcpu)(struct pc_vcpu *vcpu);   /* also one that is half made */
    void (*destroy)(struct pc_machine *machine);  /* may be NULL */
};
extern const struct pc_engine pc_engine_kvm, pc_engine_rv64;

uint64_t pc_machine_now_ns(void);
/* Formats into an `error` buffer (which may be NULL) and returns `code`. */
int pc_machine_error(char *error, size_t error_bytes, int code, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* ioctl(2) again after EINTR; -errno. Not for KVM_RUN. */
int pc_machine_ioctl(int fd, unsigned long request, void *argument);

/* run.c, for engines. This vCPU cannot go on: the whole machine stops. */
void pc_vcpu_failed(struct pc_vcpu *vcpu, const char *what);
/* Until the next tick, or until the vCPU must leave. */
void pc_vcpu_halt(struct pc_vcpu *vcpu);
/* Until the vCPU must leave; `standing` meanwhile. */
void pc_vcpu_stand(struct pc_vcpu *vcpu);
/* Device registers; `arguments` are those that travel in registers (guest/abi.h). False: the vCPU is to stop. */
bool pc_device_out(struct pc_vcpu *vcpu, uint16_t port, uint32_t value, const uint64_t arguments[4]);
uint32_t pc_device_in(struct pc_vcpu *vcpu, uint16_t port);

/* Blocked while the vCPU looks whether it must leave, the kick's signal cannot be lost before a wait: it is opened there. */
int pc_kick_signal(void);

/* rv64.c: in the kick's signal handler. Does not come back when the thread waits for a missing page. */
void pc_rv64_kicked(void);

/* layout.c */
int pc_layout_make(const struct pc_machine_config *config, struct pc_layout *layout, char *error, size_t error_bytes);
/* Host address of guest-physical memory, NULL unless all of it lies within one slot. */
void *pc_layout_gpa(const struct pc_layout *layout, uint64_t gpa, uint64_t bytes);
/* Host address of a guest-virtual address, NULL unless all of it lies within one block. */
void *pc_layout_gva(const struct pc_machine_config *config, uint64_t gva, uint64_t bytes);
/* The boot area as it is before the first instruction, into `boot_bytes` zeroed bytes. */
int pc_layout_write_boot(const struct pc_machine *machine, uint8_t *ram);

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
/* In the kick's signal handler. Does not come back when the thread waits for a missing page here. */
void pc_net_kicked(void);

/* state.c */
int64_t pc_state_save(struct pc_machine *machine, void *buf, size_t cap, char *error, size_t error_bytes);
int pc_state_load(struct pc_machine *machine, const void *buf, size_t bytes, char *error, size_t error_bytes);

/* verify.c */
int pc_verify(struct pc_machine *machine, struct pc_machine_check *check);

#endif
