#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# cross_aarch64.sh DIR      compile and link the C core, its tests and fuzz targets for AArch64, every warning an error
#
# Nothing of it is run. Where there is no cross compiler it is installed if POSTCOPY_INSTALL=1 says so and this is root on
# Debian; else this says loudly that it was skipped.
set -eu
cd -- "$(dirname -- "$0")/.."
dir=$1
cc=aarch64-linux-gnu-gcc
packages="gcc-aarch64-linux-gnu libc6-dev-arm64-cross"

works() { # it compiles and links a program
	command -v "$cc" >/dev/null 2>&1 && mkdir -p "$dir" &&
		echo '#include <stdio.h>
int main(void) { return puts("") < 0; }' | "$cc" -x c - -o "$dir/hello" 2>/dev/null
}

if ! works && [ "${POSTCOPY_INSTALL:-0}" = 1 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
	echo "cross-aarch64: installing $packages"
	install() { DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends $packages; }
	{ install || { apt-get update --quiet && install; }; } >"$dir.apt.log" 2>&1 || cat "$dir.apt.log"
fi
if ! works; then
	echo "cross-aarch64: SKIPPED: there is no $cc (Debian: $packages); nothing is known of AArch64 here" >&2
	[ "${POSTCOPY_INSTALL:-0}" = 1 ] && exit 1 # it was to be there
	exit 0
fi
[ -f "$dir/build.ninja" ] ||
	cmake -S . -B "$dir" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER="$cc" \
		-DPOSTCOPY_WERROR=ON -DPOSTCOPY_BUILD_TESTS=ON -DPOSTCOPY_FUZZ=ON >"$dir.log" 2>&1 || { cat "$dir.log"; exit 1; }
ninja -C "$dir" --quiet
