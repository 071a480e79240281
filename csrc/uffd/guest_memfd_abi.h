/* SPDX-License-Identifier: Apache-2.0
 *
 * The ABI of KVM's guest_memfd that a process can map (Linux 6.18, include/uapi/linux/kvm.h), in the kernel's own names. Not from
 * <linux/kvm.h>, for the reason that uffd_abi.h gives: a newer header of the system has the same names, so include this one after it.
 */
#ifndef PC_GUEST_MEMFD_ABI_H
#define PC_GUEST_MEMFD_ABI_H

#include <stdint.h>
#include <sys/ioctl.h>

#ifndef KVM_CREATE_VM
#define KVMIO 0xAE
#define KVM_CREATE_VM _IO(KVMIO, 0x01)
#endif
#ifndef KVM_CREATE_GUEST_MEMFD /* Linux 6.8 */
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
struct kvm_create_guest_memfd {
    uint64_t size;
    uint64_t flags;
    uint64_t reserved[6];
};
#endif
#ifndef GUEST_MEMFD_FLAG_MMAP
#define GUEST_MEMFD_FLAG_MMAP ((uint64_t)1 << 0)
#endif
#ifndef GUEST_MEMFD_FLAG_INIT_SHARED
#define GUEST_MEMFD_FLAG_INIT_SHARED ((uint64_t)1 << 1)
#endif
_Static_assert(sizeof(struct kvm_create_guest_memfd) == 64, "kvm_create_guest_memfd");
#if _IOC_SIZEBITS == 14
_Static_assert(KVM_CREATE_GUEST_MEMFD == 0xC040AED4, "KVM_CREATE_GUEST_MEMFD");
#endif

#endif
