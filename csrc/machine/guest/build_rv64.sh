#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds the guest programs for the rv64 machine as text: build_rv64.sh OUTPUT-DIRECTORY. Needs a cross compiler
# (Debian: gcc-riscv64-linux-gnu); $RV64 overrides its prefix. What it makes is checked in under rv64/, so that building
# the package needs no cross compiler; tests/unit/test_rv64_guests.py compares the two.
#
# -ffixed: tp, s9, s10 and s11 belong to the workload. The instruction set is what the machine has: no compressed ones.
set -eu
out=$1
src=$(dirname -- "$0")
mkdir -p -- "$out"
cross=${RV64:-riscv64-linux-gnu-}
flags="-std=gnu11 -O2 -ffreestanding -fno-builtin -nostdlib -static -fno-pic -no-pie -mcmodel=medany -march=rv64ima_zicsr
 -mabi=lp64 -mno-relax -msmall-data-limit=0 -ffixed-s9 -ffixed-s10 -ffixed-s11 -ffixed-tp -fno-stack-protector
 -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns -fno-jump-tables -Wall -Wextra -Wshadow
 -Wstrict-prototypes -Werror -Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,max-page-size=4096"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for name in idle dirty random disk echo; do
	# shellcheck disable=SC2086
	"${cross}gcc" $flags -T "$src/guest_rv64.ld" -o "$work/$name.elf" "$src/start_rv64.S" "$src/common.c" \
		"$src/arch_rv64.c" "$src/$name.c"
	"${cross}objcopy" -O binary "$work/$name.elf" "$work/$name.bin"
	od -An -v -tx1 -w16 "$work/$name.bin" | sed 's/ \(..\)/0x\1,/g' >"$out/$name.inc"
done
"${cross}gcc" --version | head -n 1 >"$out/COMPILER"
