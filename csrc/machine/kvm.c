/* SPDX-License-Identifier: Apache-2.0
 *
 * The kvm engine: what the exits of KVM_RUN mean, and how a machine begins.
 *
 * A kick sets immediate_exit in the page shared with KVM: run.c has the order that makes this safe. A vCPU on a missing
 * page: KVM waits for it interruptibly (x86, since 6.2), so the signal brings the thread out with the access not yet
 * done. Two waits ignore signals: a disk transfer (disk.c), and copy_from_user inside a KVM that emulates the guest: there the
 * kernel repeats the fault as long as a signal is pending. Then the pause fails after its timeout.
 */
#include "machine/kvm.h"
#include "postcopy/devices.h"

#if defined(__x86_64__)

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

int pc_kvm_ioctl(int fd, unsigned long request, void *argument)
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
    if (pc_kvm(vcpu->machine)->has_sync_regs) {
        *regs = pc_kvm_vcpu(vcpu)->run->s.regs.regs;
        return 0;
    }
    return pc_kvm_ioctl(pc_kvm_vcpu(vcpu)->fd, KVM_GET_REGS, regs);
}

static bool handle_io(struct pc_vcpu *vcpu)
{
    struct kvm_run *run = pc_kvm_vcpu(vcpu)->run;
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
    struct kvm_run *run = pc_kvm_vcpu(vcpu)->run;
    char text[128];
    int rc, code;

    atomic_store(&vcpu->activity, PC_VCPU_GUEST);
    rc = ioctl(pc_kvm_vcpu(vcpu)->fd, KVM_RUN, 0);
    code = rc < 0 ? errno : 0;
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
    pc_kvm_vcpu(vcpu)->io_pending = false;
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
        pc_kvm_vcpu(vcpu)->io_pending = true;
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
    while (pc_kvm_vcpu(vcpu)->io_pending) {
        __atomic_store_n(&pc_kvm_vcpu(vcpu)->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        if (!run_once(vcpu))
            return;
    }
}

static void kick(struct pc_vcpu *vcpu, bool on)
{
    __atomic_store_n(&pc_kvm_vcpu(vcpu)->run->immediate_exit, on, __ATOMIC_SEQ_CST);
}

static uint64_t where(struct pc_vcpu *vcpu)
{
    struct kvm_regs regs;

    return pc_kvm_ioctl(pc_kvm_vcpu(vcpu)->fd, KVM_GET_REGS, &regs) ? 0 : regs.rip;
}

/* ---- open and close ---- */

static void destroy_vcpu(struct pc_vcpu *vcpu)
{
    struct pc_kvm_vcpu *own = pc_kvm_vcpu(vcpu);

    if (!own)
        return;
    if (own->run)
        munmap(own->run, pc_kvm(vcpu->machine)->run_bytes);
    if (own->fd >= 0)
        close(own->fd);
    free(own->cpuid);
    free(own);
}

static void destroy(struct pc_machine *machine)
{
    struct pc_kvm *kvm = pc_kvm(machine);

    if (!kvm)
        return;
    if (kvm->vm_fd >= 0)
        close(kvm->vm_fd);
    if (kvm->device_fd >= 0)
        close(kvm->device_fd);
    free(kvm->host_cpuid);
    free(kvm);
}

static int open_device(struct pc_kvm *kvm, char *error, size_t error_bytes)
{
    int rc;

    kvm->device_fd = pc_device_open(PC_DEVICE_KVM);
    if (kvm->device_fd < 0) {
        rc = kvm->device_fd;
        if (rc == -ENOENT || rc == -ENXIO || rc == -ENODEV)
            return pc_fail(ENOENT, error, error_bytes, "no /dev/kvm: load kvm_intel or kvm_amd, enable virtualization in "
                           "the firmware, or give the container --device /dev/kvm");
        if (rc == -EACCES || rc == -EPERM)
            return pc_fail(-rc, error, error_bytes, "no right to use /dev/kvm: become a member of the group that owns it "
                           "(often \"kvm\")");
        return pc_fail(-rc, error, error_bytes, "/dev/kvm cannot be opened: %s", strerrordesc_np(-rc));
    }
    rc = pc_kvm_ioctl(kvm->device_fd, KVM_GET_API_VERSION, NULL);
    if (rc != KVM_API_VERSION)
        return pc_fail(ENOTSUP, error, error_bytes, "/dev/kvm speaks API version %d, not %d", rc, KVM_API_VERSION);
    return 0;
}

static int has(const struct pc_kvm *kvm, long capability)
{
    int rc = ioctl(kvm->vm_fd, KVM_CHECK_EXTENSION, capability);

    return rc < 0 ? 0 : rc;
}

static int check_features(struct pc_kvm *kvm, char *error, size_t error_bytes)
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
        if (!has(kvm, needed[i].capability))
            return pc_fail(ENOTSUP, error, error_bytes, "this KVM lacks KVM_CAP_%s", needed[i].name);
    if ((uint32_t)has(kvm, KVM_CAP_NR_MEMSLOTS) < PC_SLOTS_MAX)
        return pc_fail(ENOTSUP, error, error_bytes, "this KVM has too few memory slots");
    kvm->has_sync_regs = (unsigned long)has(kvm, KVM_CAP_SYNC_REGS) & KVM_SYNC_X86_REGS;
    kvm->has_xcrs = has(kvm, KVM_CAP_XCRS);
    kvm->has_debugregs = has(kvm, KVM_CAP_DEBUGREGS);
    kvm->has_tsc_control = has(kvm, KVM_CAP_TSC_CONTROL);
    xsave_bytes = has(kvm, KVM_CAP_XSAVE2);
    kvm->has_xsave2 = xsave_bytes > 0;
    kvm->xsave_bytes = xsave_bytes > (int)sizeof(struct kvm_xsave) ? (uint32_t)xsave_bytes : sizeof(struct kvm_xsave);
    return 0;
}

static int get_host_cpuid(struct pc_kvm *kvm, uint64_t guest_end, char *error, size_t error_bytes)
{
    uint32_t physical_bits = 36;
    int rc;

    /* E2BIG until there is room: the number of leaves differs between processors. */
    for (uint32_t entries = 64;; entries *= 2) {
        struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + entries * sizeof cpuid->entries[0]);
        if (!cpuid)
            return -ENOMEM;
        cpuid->nent = entries;
        rc = pc_kvm_ioctl(kvm->device_fd, KVM_GET_SUPPORTED_CPUID, cpuid);
        if (rc == 0) {
            kvm->host_cpuid = cpuid;
            break;
        }
        free(cpuid);
        if (rc != -E2BIG || entries > 4096)
            return pc_fail(-rc, error, error_bytes, "KVM_GET_SUPPORTED_CPUID: %s", strerrordesc_np(-rc));
    }
    for (uint32_t i = 0; i < kvm->host_cpuid->nent; i++)
        if (kvm->host_cpuid->entries[i].function == 0x80000008)
            physical_bits = kvm->host_cpuid->entries[i].eax & 0xff;
    if (physical_bits < 64 && guest_end > 1ull << physical_bits)
        return pc_fail(ENOTSUP, error, error_bytes, "this processor addresses %u bits: too much guest memory",
                       physical_bits);
    return 0;
}

/* What the guest sees of the processor: all that the host supports, with its own topology. At creation, since KVM takes its time for
 * it, which a machine that is about to arrive has then. */
static int set_cpuid(struct pc_vcpu *vcpu)
{
    const struct kvm_cpuid2 *host = pc_kvm(vcpu->machine)->host_cpuid;
    struct pc_kvm_vcpu *own = pc_kvm_vcpu(vcpu);
    size_t cpuid_bytes = sizeof *host + host->nent * sizeof host->entries[0];

    own->cpuid = malloc(cpuid_bytes);
    if (!own->cpuid)
        return -ENOMEM;
    memcpy(own->cpuid, host, cpuid_bytes);
    for (uint32_t i = 0; i < own->cpuid->nent; i++) {
        struct kvm_cpuid_entry2 *entry = &own->cpuid->entries[i];
        if (entry->function == 1)
            entry->ebx = (entry->ebx & 0xffff) | vcpu->index << 24 | vcpu->machine->config.vcpus << 16;
        else if (entry->function == 0xb || entry->function == 0x1f)
            entry->edx = vcpu->index;
    }
    return pc_kvm_ioctl(own->fd, KVM_SET_CPUID2, own->cpuid);
}

static int make_vcpu(struct pc_vcpu *vcpu, char *error, size_t error_bytes)
{
    const struct pc_kvm *kvm = pc_kvm(vcpu->machine);
    struct pc_kvm_vcpu *own = calloc(1, sizeof *own);
    void *run;
    int rc;

    if (!own)
        return pc_fail(ENOMEM, error, error_bytes, "out of memory");
    vcpu->of_engine = own;
    own->fd = ioctl(kvm->vm_fd, KVM_CREATE_VCPU, (unsigned long)vcpu->index);
    if (own->fd < 0)
        return pc_fail(errno, error, error_bytes, "vCPU %u cannot be made: %s", vcpu->index, strerrordesc_np(errno));
    run = mmap(NULL, kvm->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, own->fd, 0);
    if (run == MAP_FAILED)
        return pc_fail(errno, error, error_bytes, "vCPU %u cannot be mapped: %s", vcpu->index, strerrordesc_np(errno));
    own->run = run;
    if (kvm->has_sync_regs)
        own->run->kvm_valid_regs = KVM_SYNC_X86_REGS;
    rc = pc_kvm_ioctl(own->fd, KVM_GET_TSC_KHZ, NULL);
    own->tsc_khz = rc > 0 ? (uint64_t)rc : 0;
    rc = set_cpuid(vcpu);
    if (rc)
        return pc_fail(-rc, error, error_bytes, "vCPU %u: KVM_SET_CPUID2: %s", vcpu->index, strerrordesc_np(-rc));
    return 0;
}

static int set_up(struct pc_machine *machine, char *error, size_t error_bytes)
{
    struct pc_kvm *kvm = calloc(1, sizeof *kvm);
    uint64_t identity_map = 0xfffbc000;
    int rc;

    if (!kvm)
        return pc_fail(ENOMEM, error, error_bytes, "out of memory");
    kvm->vm_fd = -1;
    machine->of_engine = kvm;
    rc = open_device(kvm, error, error_bytes);
    if (rc)
        return rc;
    kvm->vm_fd = pc_kvm_ioctl(kvm->device_fd, KVM_CREATE_VM, NULL);
    if (kvm->vm_fd < 0)
        return pc_fail(-kvm->vm_fd, error, error_bytes, "KVM makes no machine: %s", strerrordesc_np(-kvm->vm_fd));
    rc = check_features(kvm, error, error_bytes);
    if (!rc)
        rc = get_host_cpuid(kvm, machine->layout.guest_end, error, error_bytes);
    if (rc)
        return rc;
    /* Pages that older Intel processors need for real mode, inside the hole; before the first vCPU. AMD ignores them. */
    rc = pc_kvm_ioctl(kvm->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
    if (rc == 0 && ioctl(kvm->vm_fd, KVM_SET_TSS_ADDR, 0xfffbd000ul))
        rc = -errno;
    if (rc)
        return pc_fail(-rc, error, error_bytes, "KVM_SET_TSS_ADDR: %s", strerrordesc_np(-rc));
    for (uint32_t i = 0; i < machine->layout.slot_count; i++) {
        const struct pc_slot *slot = &machine->layout.slots[i];
        struct kvm_userspace_memory_region region = {
            .slot = i,
            .guest_phys_addr = slot->gpa,
            .memory_size = slot->bytes,
            .userspace_addr = (uintptr_t)slot->host,
        };
        rc = pc_kvm_ioctl(kvm->vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
        if (rc)
            return pc_fail(-rc, error, error_bytes, "KVM refuses %llu bytes of memory at 0x%llx: %s",
                           (unsigned long long)slot->bytes, (unsigned long long)slot->gpa, strerrordesc_np(-rc));
    }
    rc = pc_kvm_ioctl(kvm->device_fd, KVM_GET_VCPU_MMAP_SIZE, NULL);
    if (rc < (int)sizeof(struct kvm_run))
        return pc_fail(ENOTSUP, error, error_bytes, "KVM_GET_VCPU_MMAP_SIZE: %d", rc);
    kvm->run_bytes = (size_t)rc;
    return 0;
}

/* 64-bit mode with paging on, as a loader would leave it; the vCPU's number in RDI. */
static int set_start_state(struct pc_vcpu *vcpu)
{
    const struct pc_kvm *kvm = pc_kvm(vcpu->machine);
    const struct pc_kvm_vcpu *own = pc_kvm_vcpu(vcpu);
    struct kvm_segment code = { .limit = 0xffffffff, .selector = PCG_CODE_SELECTOR, .type = 11, .present = 1, .s = 1,
                                .l = 1, .g = 1 };
    struct kvm_segment data = { .limit = 0xffffffff, .selector = PCG_DATA_SELECTOR, .type = 3, .present = 1, .s = 1,
                                .db = 1, .g = 1 };
    struct kvm_regs regs = { .rip = PCG_IMAGE, .rflags = 2, .rdi = vcpu->index,
                             .rsp = PCG_STACKS + (vcpu->index + 1) * PCG_STACK_BYTES };
    struct kvm_sregs sregs;
    struct kvm_xcrs xcrs;
    bool has_xsave = false;
    int rc;

    for (uint32_t i = 0; i < own->cpuid->nent; i++)
        if (own->cpuid->entries[i].function == 1)
            has_xsave = kvm->has_xcrs && (own->cpuid->entries[i].ecx & 1u << 26);
    rc = pc_kvm_ioctl(own->fd, KVM_GET_SREGS, &sregs);
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
    rc = pc_kvm_ioctl(own->fd, KVM_SET_SREGS, &sregs);
    if (!rc)
        rc = pc_kvm_ioctl(own->fd, KVM_SET_REGS, &regs);
    if (!rc && has_xsave) {
        rc = pc_kvm_ioctl(own->fd, KVM_GET_XCRS, &xcrs);
        if (!rc && xcrs.nr_xcrs) {
            xcrs.xcrs[0].value |= 3; /* x87 and SSE: not the reset value, so that its move shows */
            rc = pc_kvm_ioctl(own->fd, KVM_SET_XCRS, &xcrs);
        }
    }
    return rc;
}

const struct pc_engine pc_engine_kvm = {
    .program_counter = "RIP",
    .images = pc_kvm_images,
    .set_up = set_up,
    .destroy = destroy,
    .make_vcpu = make_vcpu,
    .destroy_vcpu = destroy_vcpu,
    .write_tables = pc_kvm_write_tables,
    .set_start_state = set_start_state,
    .run = run_once,
    .complete = complete_io,
    .kick = kick,
    .where = where,
    .section_kinds = pc_kvm_sections,
    .section_count = PC_KVM_SECTIONS,
    .save_vcpu = pc_kvm_save_vcpu,
    .check_vcpu = pc_kvm_check_vcpu,
    .load_vcpu = pc_kvm_load_vcpu,
};

#endif
