#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds the guest programs as flat binaries: build.sh OUTPUT-DIRECTORY. Needs gcc and binutils for x86-64, nothing
# else; $CC and $OBJCOPY override. The CMake build calls this too, so that there is one set of flags.
#
# -mgeneral-regs-only keeps the compiler out of the XMM registers, which belong to the workload, and lets the guest
# run where KVM emulates it; -mno-red-zone since an exception would overwrite what lies under the stack pointer;
# no jump tables and no builtin memset calls, since there is no library to call.
set -eu
out=$1
src=$(dirname -- "$0")
mkdir -p -- "$out"
flags="-std=gnu11 -O2 -ffreestanding -fno-builtin -nostdlib -static -fno-pic -no-pie -mcmodel=large -mno-red-zone
 -mgeneral-regs-only -march=x86-64 -fcf-protection=none -fno-stack-protector -fno-asynchronous-unwind-tables
 -fno-jump-tables -Wall -Wextra -Wshadow -Wstrict-prototypes -Werror
 -Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,max-page-size=4096 -Wl,--no-warn-rwx-segments"
# gcc's name for what clang's -fno-builtin keeps it from anyhow: turning a loop into a call of memset
case $(${CC:-gcc} --version) in *clang*) flags="$flags -Wno-unused-command-line-argument" ;; *) flags="$flags -fno-tree-loop-distribute-patterns" ;; esac
for name in idle dirty random disk echo; do
	# shellcheck disable=SC2086
	${CC:-gcc} $flags -T "$src/guest.ld" -o "$out/$name.elf" "$src/start.S" "$src/common.c" "$src/arch_x86.c" "$src/$name.c"
	${OBJCOPY:-objcopy} -O binary "$out/$name.elf" "$out/$name.bin"
done
# ELF files, as Firecracker and QEMU take a kernel.
for vmm in firecracker qemu; do
	# shellcheck disable=SC2086
	${CC:-gcc} $flags -Wl,-s -T "$src/vmm.ld" -o "$out/$vmm-guest.elf" "$src/${vmm}_start.S" "$src/vmm.c"
done
# A program of Linux' own, which a guest of QEMU has as its first process.
# shellcheck disable=SC2086
${CC:-gcc} $flags -Wl,-s -o "$out/linux-guest" "$src/linux.c"
