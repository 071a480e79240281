/* SPDX-License-Identifier: Apache-2.0
 *
 * Private to the kvm engine (x86-64).
 */
#ifndef PC_KVM_H
#define PC_KVM_H

#include "machine/machine.h"

#if defined(__x86_64__)

#include <linux/kvm.h>

struct pc_kvm {
    int device_fd, vm_fd;
    size_t run_bytes;
    uint32_t xsave_bytes;
    bool has_sync_regs, has_xsave2, has_xcrs, has_debugregs, has_tsc_control;
    struct kvm_cpuid2 *host_cpuid; /* what this host supports */
};

struct pc_kvm_vcpu {
    int fd;
    struct kvm_run *run;
    struct kvm_cpuid2 *cpuid; /* as given to KVM, which adds to it what it likes */
    uint64_t tsc_khz;         /* 0: KVM does not say */
    bool io_pending;          /* the last exit's instruction is not complete before the next KVM_RUN */
};

static inline struct pc_kvm *pc_kvm(const struct pc_machine *machine)
{
    return machine->of_engine;
}

static inline struct pc_kvm_vcpu *pc_kvm_vcpu(const struct pc_vcpu *vcpu)
{
    return vcpu->of_engine;
}

/* ioctl(2) again after EINTR; -errno. Not for KVM_RUN. */
int pc_kvm_ioctl(int fd, unsigned long request, void *argument);

/* kvm_boot.c, kvm_state.c: see struct pc_engine */
extern const struct pc_image pc_kvm_images[];
int pc_kvm_write_tables(const struct pc_machine *machine, uint8_t *ram);
#define PC_KVM_SECTIONS 10
_Static_assert(PC_KVM_SECTIONS <= PC_ENGINE_SECTIONS_MAX, "state.c has room for them");
extern const struct pc_section_kind pc_kvm_sections[PC_KVM_SECTIONS];
int pc_kvm_save_vcpu(struct pc_vcpu *vcpu, struct pc_state_writer *writer, char *error, size_t error_bytes);
int pc_kvm_check_vcpu(struct pc_vcpu *vcpu, const struct pc_section *sections, char *error, size_t error_bytes);
int pc_kvm_load_vcpu(struct pc_vcpu *vcpu, const struct pc_section *sections, char *error, size_t error_bytes);

#endif

#endif
