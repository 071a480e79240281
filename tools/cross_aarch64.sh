#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# cross_aarch64.sh DIR      compile and link the C core for AArch64, every warning an error: its tests, its fuzz targets and
#                           the Python extension
#
# Nothing of it is run; of the extension it is looked at what it is and what it needs. Where there is no cross compiler it
# is installed if POSTCOPY_INSTALL=1 says so and this is root on Debian; else this says loudly that it was skipped.
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
# The headers of this system's Python will do: all of the limited API is the same on every 64-bit Linux, but Debian's
# pyconfig.h includes the one of the processor, which is given here.
python=.venv/bin/python
include=$($python -c 'import sysconfig; print(sysconfig.get_path("include"))')
mkdir -p "$dir/python/aarch64-linux-gnu/${include##*/}"
cp "$($python -c 'import sysconfig; print(sysconfig.get_config_h_filename())')" "$dir/python/aarch64-linux-gnu/${include##*/}/"
# (Nothing of it runs, so -O1 and no debugging information will do.)
[ -f "$dir/build.ninja" ] ||
	cmake -S . -B "$dir" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER="$cc" \
		-DCMAKE_BUILD_TYPE=None -DCMAKE_C_FLAGS="-O1 -isystem $PWD/$dir/python" -DPOSTCOPY_WERROR=ON -DPOSTCOPY_BUILD_TESTS=ON \
		-DPOSTCOPY_FUZZ=ON -DPOSTCOPY_BUILD_PYTHON=ON -DPython_EXECUTABLE="$PWD/$python" -DPython_INCLUDE_DIR="$include" \
		>"$dir.log" 2>&1 || { cat "$dir.log"; exit 1; }
ninja -C "$dir" --quiet

# The build has refused symbols that neither Python nor the C library has (csrc/cdef.py check).
module=$dir/csrc/_native.abi3.so
found=$(readelf --file-header --dynamic "$module")
for wanted in 'Machine:  *AArch64' 'Type:  *DYN' '(NEEDED).*\[libc\.so\.6\]'; do
	echo "$found" | grep -q "$wanted" || { echo "cross-aarch64: $module: no '$wanted' in readelf's answer"; exit 1; }
done
if echo "$found" | grep '(NEEDED)' | grep -v 'libc\.so\.6\|ld-linux-aarch64'; then
	echo "cross-aarch64: $module needs more than the C library" && exit 1
fi
echo "cross-aarch64: linked $module"
