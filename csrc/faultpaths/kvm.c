/* SPDX-License-Identifier: Apache-2.0
 *
 * KVM: the page is guest memory, and a guest of a few bytes touches it. Its program lies in a page beside it.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "faultpaths/fp.h"

#if defined(__x86_64__)
#include <linux/kvm.h>

#define LOW_BYTES 0x4000
#define CODE 0x1000       /* guest-physical, of the program */
#define PAGE 0x10000      /* of the page */
#define NOWHERE 0x80000   /* where no memory is */
#define PORT 0x10

struct guest {
    int vcpu;
    uint8_t *low;
    struct kvm_run *run;
    struct kvm_sregs sregs;
    struct kvm_regs regs;
};

/* In real mode, DS being the page, about to run `code`. The caller changes sregs and regs as it needs, then guest_enter. */
static bool guest_make(struct pc_fp_cell *cell, struct guest *guest, const uint8_t *code, size_t bytes)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, run_bytes;
    struct kvm_userspace_memory_region low = {.slot = 0, .memory_size = LOW_BYTES};
    struct kvm_userspace_memory_region page = {.slot = 1, .guest_phys_addr = PAGE, .memory_size = PC_FP_BYTES,
                                               .userspace_addr = (uintptr_t)cell->page};

    if (kvm < 0)
        return pc_fp_unavailable(cell, errno, "/dev/kvm");
    guest->low = mmap(NULL, LOW_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    run_bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (guest->low == MAP_FAILED || vm < 0 || run_bytes < (int)sizeof(struct kvm_run))
        return pc_fp_unavailable(cell, errno, "KVM_CREATE_VM");
    memcpy(guest->low + CODE, code, bytes);
    low.userspace_addr = (uintptr_t)guest->low;
    (void)ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul); /* what real mode needs of older Intel processors */
    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &low) || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &page))
        return pc_fp_unavailable(cell, errno, "KVM_SET_USER_MEMORY_REGION");
    guest->vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    if (guest->vcpu < 0)
        return pc_fp_unavailable(cell, errno, "KVM_CREATE_VCPU");
    guest->run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, guest->vcpu, 0);
    if (guest->run == MAP_FAILED || ioctl(guest->vcpu, KVM_GET_SREGS, &guest->sregs))
        return pc_fp_unavailable(cell, errno, "KVM_GET_SREGS");
    guest->sregs.cs.base = guest->sregs.ss.base = guest->sregs.cs.selector = guest->sregs.ss.selector = 0;
    guest->sregs.ds.base = guest->sregs.es.base = PAGE;
    guest->sregs.ds.selector = guest->sregs.es.selector = PAGE >> 4;
    guest->regs = (struct kvm_regs){.rip = CODE, .rsp = CODE + 0x1000, .rflags = 2};
    return true;
}

static bool guest_set(struct pc_fp_cell *cell, struct guest *guest)
{
    return pc_fp_made(cell, ioctl(guest->vcpu, KVM_SET_SREGS, &guest->sregs), "KVM_SET_SREGS") &&
           pc_fp_made(cell, ioctl(guest->vcpu, KVM_SET_REGS, &guest->regs), "KVM_SET_REGS");
}

/* The exit that means success; any other one is how KVM tells that the access failed. */
static bool exited(struct pc_fp_cell *cell, const struct guest *guest, uint32_t reason)
{
    if (!pc_fp_succeeded(cell))
        return false;
    if (guest->run->exit_reason == reason)
        return true;
    pc_fp_lost(cell, "KVM_RUN came back with exit reason %u, should be %u", guest->run->exit_reason, reason);
    return false;
}

static bool guest_run(struct pc_fp_cell *cell, struct guest *guest, uint32_t reason)
{
    if (!guest_set(cell, guest))
        return false;
    PC_FP_ACT(cell, ioctl(guest->vcpu, KVM_RUN, 0));
    return exited(cell, guest, reason);
}

static uint16_t accumulator(struct guest *guest)
{
    struct kvm_regs regs = {0};

    (void)ioctl(guest->vcpu, KVM_GET_REGS, &regs);
    return (uint16_t)regs.rax;
}

/* Code that comes by way of the page. */
static void run_returning(struct pc_fp_cell *cell, struct guest *guest)
{
    if (guest_run(cell, guest, KVM_EXIT_HLT) && accumulator(guest) != PC_FP_CODE_RETURNS)
        pc_fp_wrong(cell, "the guest ran other code: AX is 0x%04x", accumulator(guest));
}

/* Code that leaves `data` at PC_FP_AT_OUT. */
static void run_storing(struct pc_fp_cell *cell, const uint8_t *code, size_t bytes, uint16_t data)
{
    struct guest guest;

    if (guest_make(cell, &guest, code, bytes) && guest_run(cell, &guest, KVM_EXIT_HLT))
        pc_fp_verify_out(cell, &data, sizeof(data));
}

static void kvm_load(struct pc_fp_cell *cell)
{
    static const uint8_t code[] = {0xa1, 0x00, 0x08, /* mov PC_FP_AT_OUT, %ax */
                                   0xf4};            /* hlt */
    struct guest guest;
    uint16_t got;

    if (!guest_make(cell, &guest, code, sizeof(code)) || !guest_run(cell, &guest, KVM_EXIT_HLT))
        return;
    got = accumulator(&guest);
    pc_fp_verify(cell, &got, PC_FP_AT_OUT, sizeof(got));
}

static void kvm_store(struct pc_fp_cell *cell)
{
    static const uint8_t code[] = {0xb8, 0x34, 0x12, /* mov $0x1234, %ax */
                                   0xa3, 0x00, 0x08, /* mov %ax, PC_FP_AT_OUT */
                                   0xf4};

    run_storing(cell, code, sizeof(code), 0x1234);
}

static void kvm_locked_add(struct pc_fp_cell *cell)
{
    static const uint8_t code[] = {0xf0, 0x83, 0x06, 0x00, 0x08, 0x01, /* lock addw $1, PC_FP_AT_OUT */
                                   0xf4};
    uint16_t data;

    memcpy(&data, cell->content + PC_FP_AT_OUT, sizeof(data));
    run_storing(cell, code, sizeof(code), (uint16_t)(data + 1));
}

static void kvm_fetch(struct pc_fp_cell *cell)
{
    static const uint8_t none[1];
    struct guest guest;

    if (!guest_make(cell, &guest, none, sizeof(none)))
        return;
    guest.sregs.cs.base = PAGE;
    guest.sregs.cs.selector = PAGE >> 4;
    guest.regs.rip = PC_FP_AT_GUEST;
    run_returning(cell, &guest);
}

/* 64-bit mode with the page as page directory: the program's own address is translated by it. */
static void kvm_walk(struct pc_fp_cell *cell)
{
    static const uint8_t code[] = {0xb8, 0x43, 0x50, 0x00, 0x00, /* mov $PC_FP_CODE_RETURNS, %eax */
                                   0xf4};
    struct kvm_segment segment = {.limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    struct guest guest;

    if (!guest_make(cell, &guest, code, sizeof(code)))
        return;
    guest.sregs.cs = segment;
    segment.type = 3;
    segment.selector = 16;
    segment.l = 0;
    segment.db = 1;
    guest.sregs.ds = guest.sregs.es = guest.sregs.ss = guest.sregs.fs = guest.sregs.gs = segment;
    *(uint64_t *)(void *)(guest.low + 0x2000) = 0x3000 | 0x27; /* present, writable, user, accessed */
    *(uint64_t *)(void *)(guest.low + 0x3000) = PAGE | 0x27;
    guest.sregs.cr3 = 0x2000;
    guest.sregs.cr4 |= 0x20;       /* PAE */
    guest.sregs.efer |= 0x500;     /* LMA, LME */
    guest.sregs.cr0 |= 0x80000001; /* PG, PE */
    guest.regs.rip = ((uint64_t)PC_FP_AT_PDE / 8 << 21) + CODE;
    run_returning(cell, &guest);
}

/* KVM itself has to read what a string instruction puts out. */
static void kvm_emulator_outs(struct pc_fp_cell *cell)
{
    static const uint8_t code[] = {0x6e, /* outsb */
                                   0xf4};
    struct guest guest;

    if (!guest_make(cell, &guest, code, sizeof(code)))
        return;
    guest.regs.rsi = PC_FP_AT_OUT;
    guest.regs.rdx = PORT;
    if (guest_run(cell, &guest, KVM_EXIT_IO))
        pc_fp_verify(cell, (uint8_t *)guest.run + guest.run->io.data_offset, PC_FP_AT_OUT, 1);
}

/* The value that user space gives is stored by the KVM_RUN that follows. */
static void kvm_emulator_ins(struct pc_fp_cell *cell)
{
    static const uint8_t code[] = {0x6c, /* insb */
                                   0xf4};
    const uint8_t data = 0x5A;
    struct guest guest;

    if (!guest_make(cell, &guest, code, sizeof(code)))
        return;
    guest.regs.rdi = PC_FP_AT_OUT;
    guest.regs.rdx = PORT;
    if (!guest_set(cell, &guest))
        return;
    if (ioctl(guest.vcpu, KVM_RUN, 0) || guest.run->exit_reason != KVM_EXIT_IO) {
        pc_fp_unavailable(cell, errno, "the guest's input (exit reason %u)", guest.run->exit_reason);
        return;
    }
    memcpy((uint8_t *)guest.run + guest.run->io.data_offset, &data, 1);
    PC_FP_ACT(cell, ioctl(guest.vcpu, KVM_RUN, 0));
    if (exited(cell, &guest, KVM_EXIT_HLT))
        pc_fp_verify_out(cell, &data, 1);
}

/* A copy to where no memory is: KVM reads the source to emulate it. */
static void kvm_emulator_mmio(struct pc_fp_cell *cell)
{
    static const uint8_t code[] = {0xa4, /* movsb */
                                   0xf4};
    struct guest guest;

    if (!guest_make(cell, &guest, code, sizeof(code)))
        return;
    guest.sregs.es.base = NOWHERE;
    guest.sregs.es.selector = NOWHERE >> 4;
    guest.regs.rsi = PC_FP_AT_OUT;
    guest.regs.rdi = 0;
    if (guest_run(cell, &guest, KVM_EXIT_MMIO)) {
        if (!guest.run->mmio.is_write || guest.run->mmio.phys_addr != NOWHERE) {
            pc_fp_lost(cell, "KVM took the page for a place without memory");
            return;
        }
        pc_fp_verify(cell, guest.run->mmio.data, PC_FP_AT_OUT, 1);
    }
}

/* The guest's clock lies in its memory, where KVM writes it. */
static void kvm_clock(struct pc_fp_cell *cell)
{
    static const uint8_t code[] = {0xf4};
    struct { /* struct kvm_msrs with its array */
        uint32_t count, padding;
        struct kvm_msr_entry entry;
    } msrs = {.count = 1, .entry = {.index = 0x4b564d01, .data = (PAGE + PC_FP_AT_OUT) | 1}};
    struct guest guest;

    if (!guest_make(cell, &guest, code, sizeof(code)) || !guest_set(cell, &guest))
        return;
    pc_fp_begin(cell);
    if (ioctl(guest.vcpu, KVM_SET_MSRS, &msrs) != 1) {
        pc_fp_unavailable(cell, errno, "MSR_KVM_SYSTEM_TIME_NEW");
        return;
    }
    pc_fp_end(cell, ioctl(guest.vcpu, KVM_RUN, 0));
    if (!exited(cell, &guest, KVM_EXIT_HLT))
        return;
    if (!memcmp(cell->page + PC_FP_AT_OUT, cell->content + PC_FP_AT_OUT, 32)) {
        pc_fp_lost(cell, "the clock was not written, without an error");
    }
}

static void kvm_pre_fault(struct pc_fp_cell *cell)
{
    static const uint8_t code[] = {0xf4};
    struct { /* struct kvm_pre_fault_memory */
        uint64_t address, bytes, flags, padding[5];
    } range = {.address = PAGE, .bytes = PC_FP_BYTES};
    struct guest guest;

    if (!guest_make(cell, &guest, code, sizeof(code)) || !guest_set(cell, &guest))
        return;
    PC_FP_ACT(cell, ioctl(guest.vcpu, _IOWR(KVMIO, 0xd5, range), &range));
    PC_FP_UNAVAILABLE_IF(cell, "KVM_PRE_FAULT_MEMORY (Linux 6.11, with two-dimensional paging)", ENOTTY, EOPNOTSUPP, EINVAL);
    pc_fp_verify_kept(cell);
}

#else
static void kvm_load(struct pc_fp_cell *cell)
{
    pc_fp_unavailable(cell, 0, "no guest for this processor");
}
#define kvm_store kvm_load
#define kvm_locked_add kvm_load
#define kvm_fetch kvm_load
#define kvm_walk kvm_load
#define kvm_emulator_outs kvm_load
#define kvm_emulator_ins kvm_load
#define kvm_emulator_mmio kvm_load
#define kvm_clock kvm_load
#define kvm_pre_fault kvm_load
#endif

static const struct pc_fp_operation operations[] = {
    PC_FP_ROW(kvm, load, NOTHING, PC_FP_NEEDS_KVM, "a vCPU reads guest memory: get_user_pages in KVM_RUN"),
    PC_FP_ROW(kvm, store, NOTHING, PC_FP_WRITES | PC_FP_NEEDS_KVM, "a vCPU writes guest memory"),
    PC_FP_ROW(kvm, locked_add, NOTHING, PC_FP_WRITES | PC_FP_NEEDS_KVM, "a vCPU's atomic read-modify-write"),
    PC_FP_ROW(kvm, fetch, NOTHING, PC_FP_NEEDS_KVM, "a vCPU fetches an instruction"),
    PC_FP_ROW(kvm, walk, NOTHING, PC_FP_NEEDS_KVM, "a vCPU's page-table walk: the page is its page directory"),
    PC_FP_ROW(kvm, emulator_outs, NOTHING, PC_FP_NEEDS_KVM, "KVM's emulator reads for OUTS: a copy"),
    PC_FP_ROW(kvm, emulator_ins, NOTHING, PC_FP_WRITES | PC_FP_NEEDS_KVM, "KVM's emulator writes for INS: a copy"),
    PC_FP_ROW(kvm, emulator_mmio, NOTHING, PC_FP_NEEDS_KVM, "KVM's emulator reads the source of a MOVS to a device: a copy"),
    PC_FP_ROW_OF(kvm, clock, PC_FP_COMING_MODES, PC_FP_ALL_BACKINGS, NOTHING, PC_FP_WRITES | PC_FP_NEEDS_KVM,
              "KVM writes the guest's clock into guest memory"),
    PC_FP_ROW(kvm, pre_fault, NOTHING, PC_FP_NEEDS_KVM, "KVM_PRE_FAULT_MEMORY brings the page before a vCPU needs it"),
};

const struct pc_fp_class pc_fp_kvm = {operations, PC_ARRAY_LENGTH(operations)};
