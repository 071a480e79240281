/* SPDX-License-Identifier: Apache-2.0
 *
 * The kvm engine: what the exits of KVM_RUN mean, and how a machine begins.
 *
 * A kick sets immediate_exit in the page shared with KVM: run.c has the order that makes this safe. A vCPU on a missing
 * page: KVM waits for it interruptibly (x86, since 6.2), so the signal brings the thread out with the access not yet
 * done. Two waits are deaf: a disk transfer (disk.c), and copy_from_user inside a KVM that emulates the guest: there the
 * kernel repeats the fault as long as a signal is pending. Then the pause fails after its timeout.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "machine/machine.h"
#include "postcopy/uffd.h"

#if defined(__x86_64__)

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

int pc_machine_ioctl(int fd, unsigned long request, void *argument)
{
    int rc;

    do
        rc = ioctl(fd, request, argument);
    while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : rc;
}

/* ---- exits ---- */

static int guest_registers(struct pc_vcpu *vcpu, struct kvm_regs *regs)
{
    if (vcpu->machine->has_sync_regs) {
        *regs = vcpu->run->s.regs.regs;
        return 0;
    }
    return pc_machine_ioctl(vcpu->fd, KVM_GET_REGS, regs);
}

static bool handle_io(struct pc_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    struct kvm_regs regs;
    uint64_t arguments[4];

    if (guest_registers(vcpu, &regs)) {
        pc_vcpu_failed(vcpu, "its registers cannot be read");
        return false;
    }
    arguments[0] = regs.rbx;
    arguments[1] = regs.rcx;
    arguments[2] = regs.rsi;
    arguments[3] = regs.rdi;

    /* String I/O brings several values at once. */
    for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
        uint32_t value = 0;
        if (run->io.direction == KVM_EXIT_IO_OUT) {
            memcpy(&value, data, run->io.size);
            if (!pc_device_out(vcpu, run->io.port, value, arguments))
                return false;
        } else {
            value = pc_device_in(vcpu, run->io.port);
            memcpy(data, &value, run->io.size);
        }
    }
    return true;
}

/* One KVM_RUN and what it asks for. False: the vCPU has failed. */
static bool run_once(struct pc_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    char text[128];
    int rc, code;

    atomic_store(&vcpu->activity, PC_VCPU_GUEST);
    rc = ioctl(vcpu->fd, KVM_RUN, 0);
    code = rc < 0 ? errno : 0;
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
    vcpu->io_pending = false;
    if (code == EINTR || code == EAGAIN)
        return true;
    if (code) {
        snprintf(text, sizeof text, code == EFAULT || code == EHWPOISON
                                        ? "guest memory cannot be accessed (%s): poisoned or unmapped"
                                        : "KVM_RUN: %s",
                 strerrordesc_np(code));
        pc_vcpu_failed(vcpu, text);
        return false;
    }
    atomic_fetch_add_explicit(&vcpu->exits, 1, memory_order_relaxed);
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        vcpu->io_pending = true;
        return handle_io(vcpu);
    case KVM_EXIT_HLT:
        pc_vcpu_halt(vcpu);
        return true;
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
        return true;
    case KVM_EXIT_MMIO:
        snprintf(text, sizeof text, "access to guest-physical 0x%llx, where no memory is",
                 (unsigned long long)run->mmio.phys_addr);
        break;
    case KVM_EXIT_SHUTDOWN:
        snprintf(text, sizeof text, "triple fault");
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        snprintf(text, sizeof text, "KVM cannot run the guest (internal error %u%s)", run->internal.suberror,
                 run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION ? ": instruction not emulated" : "");
        break;
    case KVM_EXIT_FAIL_ENTRY:
        snprintf(text, sizeof text, "the processor refused to enter the guest (0x%llx)",
                 (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
        break;
    default:
        snprintf(text, sizeof text, "unexpected exit %u", run->exit_reason);
        break;
    }
    pc_vcpu_failed(vcpu, text);
    return false;
}

/* An IN or OUT is complete (RIP advanced, result in RAX) only at the next KVM_RUN. Saved before that, the instruction
 * would be repeated or lost on the other host. With immediate_exit set KVM completes it and comes straight back. */
static void complete_io(struct pc_vcpu *vcpu)
{
    while (vcpu->io_pending) {
        __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        if (!run_once(vcpu))
            return;
    }
}

static void kick(struct pc_vcpu *vcpu, bool on)
{
    __atomic_store_n(&vcpu->run->immediate_exit, on, __ATOMIC_SEQ_CST);
}

static uint64_t where(struct pc_vcpu *vcpu)
{
    struct kvm_regs regs;

    return pc_machine_ioctl(vcpu->fd, KVM_GET_REGS, &regs) ? 0 : regs.rip;
}

/* ---- open and close ---- */

static void destroy_vcpu(struct pc_vcpu *vcpu)
{
    if (vcpu->run)
        munmap(vcpu->run, vcpu->machine->run_bytes);
    if (vcpu->fd >= 0)
        close(vcpu->fd);
    free(vcpu->cpuid);
}

static void destroy(struct pc_machine *machine)
{
    if (machine->vm_fd >= 0)
        close(machine->vm_fd);
    if (machine->kvm_fd >= 0)
        close(machine->kvm_fd);
    free(machine->host_cpuid);
}

static int open_device(struct pc_machine *machine, char *error, size_t error_bytes)
{
    int rc;

    machine->kvm_fd = pc_device_open(PC_DEVICE_KVM);
    if (machine->kvm_fd < 0) {
        rc = machine->kvm_fd;
        if (rc == -ENOENT || rc == -ENXIO || rc == -ENODEV)
            return pc_machine_error(error, error_bytes, -ENOENT,
                                    "no /dev/kvm: load kvm_intel or kvm_amd, enable virtualization in the firmware, or "
                                    "give the container --device /dev/kvm");
        if (rc == -EACCES || rc == -EPERM)
            return pc_machine_error(error, error_bytes, rc,
                                    "no right to use /dev/kvm: become a member of the group that owns it (often \"kvm\")");
        return pc_machine_error(error, error_bytes, rc, "/dev/kvm cannot be opened: %s", strerrordesc_np(-rc));
    }
    rc = pc_machine_ioctl(machine->kvm_fd, KVM_GET_API_VERSION, NULL);
    if (rc != KVM_API_VERSION)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "/dev/kvm speaks API version %d, not %d", rc,
                                KVM_API_VERSION);
    return 0;
}

static int has(const struct pc_machine *machine, long capability)
{
    int rc = ioctl(machine->vm_fd, KVM_CHECK_EXTENSION, capability);

    return rc < 0 ? 0 : rc;
}

static int check_features(struct pc_machine *machine, char *error, size_t error_bytes)
{
    static const struct {
        long capability;
        const char *name;
    } needed[] = {
        { KVM_CAP_USER_MEMORY, "USER_MEMORY" },
        { KVM_CAP_SYNC_MMU, "SYNC_MMU" }, /* pages may change under the guest: what postcopy is */
        { KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT" },
        { KVM_CAP_EXT_CPUID, "EXT_CPUID" },
        { KVM_CAP_XSAVE, "XSAVE" },
        { KVM_CAP_VCPU_EVENTS, "VCPU_EVENTS" },
        { KVM_CAP_MP_STATE, "MP_STATE" },
    };
    int xsave_bytes;

    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if (!has(machine, needed[i].capability))
            return pc_machine_error(error, error_bytes, -ENOTSUP, "this KVM lacks KVM_CAP_%s", needed[i].name);
    if ((uint32_t)has(machine, KVM_CAP_NR_MEMSLOTS) < PC_SLOTS_MAX)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "this KVM has too few memory slots");
    machine->has_sync_regs = (unsigned long)has(machine, KVM_CAP_SYNC_REGS) & KVM_SYNC_X86_REGS;
    machine->has_xcrs = has(machine, KVM_CAP_XCRS);
    machine->has_debugregs = has(machine, KVM_CAP_DEBUGREGS);
    machine->has_tsc_control = has(machine, KVM_CAP_TSC_CONTROL);
    xsave_bytes = has(machine, KVM_CAP_XSAVE2);
    machine->has_xsave2 = xsave_bytes > 0;
    machine->xsave_bytes = xsave_bytes > (int)sizeof(struct kvm_xsave) ? (uint32_t)xsave_bytes : sizeof(struct kvm_xsave);
    return 0;
}

static int get_host_cpuid(struct pc_machine *machine, char *error, size_t error_bytes)
{
    uint32_t physical_bits = 36;
    int rc;

    /* E2BIG until there is room: the number of leaves differs between processors. */
    for (uint32_t entries = 64;; entries *= 2) {
        struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + entries * sizeof cpuid->entries[0]);
        if (!cpuid)
            return -ENOMEM;
        cpuid->nent = entries;
        rc = pc_machine_ioctl(machine->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid);
        if (rc == 0) {
            machine->host_cpuid = cpuid;
            break;
        }
        free(cpuid);
        if (rc != -E2BIG || entries > 4096)
            return pc_machine_error(error, error_bytes, rc, "KVM_GET_SUPPORTED_CPUID: %s", strerrordesc_np(-rc));
    }
    for (uint32_t i = 0; i < machine->host_cpuid->nent; i++)
        if (machine->host_cpuid->entries[i].function == 0x80000008)
            physical_bits = machine->host_cpuid->entries[i].eax & 0xff;
    if (physical_bits < 64 && machine->layout.guest_end > 1ull << physical_bits)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "this processor addresses %u bits: too much guest memory",
                                physical_bits);
    return 0;
}

static int make_vcpu(struct pc_vcpu *vcpu, char *error, size_t error_bytes)
{
    const struct pc_machine *machine = vcpu->machine;
    void *run;
    int rc = ioctl(machine->vm_fd, KVM_CREATE_VCPU, (unsigned long)vcpu->index);

    if (rc < 0)
        return pc_machine_error(error, error_bytes, -errno, "vCPU %u cannot be made: %s", vcpu->index,
                                strerrordesc_np(errno));
    vcpu->fd = rc;
    run = mmap(NULL, machine->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (run == MAP_FAILED)
        return pc_machine_error(error, error_bytes, -errno, "vCPU %u cannot be mapped: %s", vcpu->index,
                                strerrordesc_np(errno));
    vcpu->run = run;
    if (machine->has_sync_regs)
        vcpu->run->kvm_valid_regs = KVM_SYNC_X86_REGS;
    return 0;
}

static int set_up(struct pc_machine *machine, char *error, size_t error_bytes)
{
    uint64_t identity_map = 0xfffbc000;
    int rc;

    rc = open_device(machine, error, error_bytes);
    if (rc)
        return rc;
    machine->vm_fd = pc_machine_ioctl(machine->kvm_fd, KVM_CREATE_VM, NULL);
    if (machine->vm_fd < 0)
        return pc_machine_error(error, error_bytes, machine->vm_fd, "KVM makes no machine: %s",
                                strerrordesc_np(-machine->vm_fd));
    rc = check_features(machine, error, error_bytes);
    if (!rc)
        rc = get_host_cpuid(machine, error, error_bytes);
    if (rc)
        return rc;
    /* Pages that older Intel processors need for real mode, inside the hole; before the first vCPU. AMD ignores them. */
    rc = pc_machine_ioctl(machine->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
    if (rc == 0 && ioctl(machine->vm_fd, KVM_SET_TSS_ADDR, 0xfffbd000ul))
        rc = -errno;
    if (rc)
        return pc_machine_error(error, error_bytes, rc, "KVM_SET_TSS_ADDR: %s", strerrordesc_np(-rc));
    for (uint32_t i = 0; i < machine->layout.slot_count; i++) {
        const struct pc_slot *slot = &machine->layout.slots[i];
        struct kvm_userspace_memory_region region = {
            .slot = i,
            .guest_phys_addr = slot->gpa,
            .memory_size = slot->bytes,
            .userspace_addr = (uintptr_t)slot->host,
        };
        rc = pc_machine_ioctl(machine->vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
        if (rc)
            return pc_machine_error(error, error_bytes, rc, "KVM refuses %llu bytes of memory at 0x%llx: %s",
                                    (unsigned long long)slot->bytes, (unsigned long long)slot->gpa, strerrordesc_np(-rc));
    }
    rc = pc_machine_ioctl(machine->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, NULL);
    if (rc < (int)sizeof(struct kvm_run))
        return pc_machine_error(error, error_bytes, -ENOTSUP, "KVM_GET_VCPU_MMAP_SIZE: %d", rc);
    machine->run_bytes = (size_t)rc;
    return 0;
}

/* 64-bit mode with paging on, as a loader would leave it; the vCPU's number in RDI. */
static int set_start_state(struct pc_vcpu *vcpu)
{
    const struct pc_machine *machine = vcpu->machine;
    struct kvm_segment code = { .limit = 0xffffffff, .selector = PCG_CODE_SELECTOR, .type = 11, .present = 1, .s = 1,
                                .l = 1, .g = 1 };
    struct kvm_segment data = { .limit = 0xffffffff, .selector = PCG_DATA_SELECTOR, .type = 3, .present = 1, .s = 1,
                                .db = 1, .g = 1 };
    struct kvm_regs regs = { .rip = PCG_IMAGE, .rflags = 2, .rdi = vcpu->index,
                             .rsp = PCG_STACKS + (vcpu->index + 1) * PCG_STACK_BYTES };
    struct kvm_sregs sregs;
    struct kvm_xcrs xcrs;
    struct kvm_cpuid2 *cpuid;
    size_t cpuid_bytes = sizeof *cpuid + machine->host_cpuid->nent * sizeof cpuid->entries[0];
    bool has_xsave = false;
    int rc;

    cpuid = malloc(cpuid_bytes);
    if (!cpuid)
        return -ENOMEM;
    memcpy(cpuid, machine->host_cpuid, cpuid_bytes);
    for (uint32_t i = 0; i < cpuid->nent; i++) {
        struct kvm_cpuid_entry2 *entry = &cpuid->entries[i];
        if (entry->function == 1) {
            entry->ebx = (entry->ebx & 0xffff) | vcpu->index << 24 | machine->config.vcpus << 16;
            has_xsave = machine->has_xcrs && (entry->ecx & 1u << 26);
        } else if (entry->function == 0xb || entry->function == 0x1f) {
            entry->edx = vcpu->index;
        }
    }
    free(vcpu->cpuid); /* of a boot that failed half way */
    vcpu->cpuid = cpuid;
    rc = pc_machine_ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid);
    if (!rc)
        rc = pc_machine_ioctl(vcpu->fd, KVM_GET_SREGS, &sregs);
    if (rc)
        return rc;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.gdt.base = PCG_GDT;
    sregs.gdt.limit = 3 * 8 - 1;
    sregs.idt.base = PCG_IDT;
    sregs.idt.limit = 32 * 16 - 1;
    sregs.cr3 = PCG_PAGE_TABLES;
    sregs.cr4 = 0x620 | (has_xsave ? 1u << 18 : 0); /* PAE, OSFXSR, OSXMMEXCPT; OSXSAVE */
    sregs.cr0 = 0x80050033;                         /* PG, AM, WP, NE, ET, MP, PE */
    sregs.efer = 0x500;                             /* LME, LMA */
    rc = pc_machine_ioctl(vcpu->fd, KVM_SET_SREGS, &sregs);
    if (!rc)
        rc = pc_machine_ioctl(vcpu->fd, KVM_SET_REGS, &regs);
    if (!rc && has_xsave) {
        rc = pc_machine_ioctl(vcpu->fd, KVM_GET_XCRS, &xcrs);
        if (!rc && xcrs.nr_xcrs) {
            xcrs.xcrs[0].value |= 3; /* x87 and SSE: not the reset value, so that its move shows */
            rc = pc_machine_ioctl(vcpu->fd, KVM_SET_XCRS, &xcrs);
        }
    }
    return rc;
}

const struct pc_engine pc_engine_kvm = {
    .program_counter = "RIP",
    .set_up = set_up,
    .make_vcpu = make_vcpu,
    .set_start_state = set_start_state,
    .run = run_once,
    .complete = complete_io,
    .kick = kick,
    .where = where,
    .destroy_vcpu = destroy_vcpu,
    .destroy = destroy,
};

#endif
