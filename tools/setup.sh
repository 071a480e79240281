#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# setup.sh check            name what this system lacks and the package that has it; installs nothing
# setup.sh extra VENV NAME  install what an extra of pyproject.toml names into it (dist)
# setup.sh install VENV     check, then make or bring up to date the environment VENV with postcopy in it
#
# $PYTHON (python3) and $CC (gcc) say which to use. Needs no root and writes into VENV and build/ only (and pip's cache).
set -eu
cd -- "$(dirname -- "$0")/.."
python=${PYTHON:-python3}
cc=${CC:-gcc}

missing=
packages=
lack() { # what, Debian packages
	missing="$missing
  - $1 (Debian: $2)"
	for package in $2; do
		case " $packages " in *" $package "*) ;; *) packages="$packages $package" ;; esac
	done
}

check() {
	if ! command -v "$python" >/dev/null 2>&1; then
		lack "$python, 3.11 or newer" "python3 python3-venv python3-dev"
	elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		# A package would not help where the system's Python is older, so say what would.
		lack "Python 3.11 or newer: $python is $("$python" -V 2>&1 || true); name another one with PYTHON=..." "python3"
	else
		# A Python that did not come from Debian has its headers and venv from the same place.
		suffix=
		"$python" -c 'import sys; sys.exit(not sys.base_prefix == "/usr")' ||
			suffix="; $python is not Debian's own: its headers come with it, or use PYTHON=/usr/bin/python3"
		"$python" -c 'import venv, ensurepip' 2>/dev/null || lack "the venv module of $python$suffix" "python3-venv"
		"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
			lack "Python.h, the headers of $python$suffix" "python3-dev"
	fi
	if ! command -v "$cc" >/dev/null 2>&1; then
		lack "a C compiler ($cc)" "gcc libc6-dev"
	else
		echo '#include <pthread.h>' | "$cc" -E -x c - >/dev/null 2>&1 || lack "the headers of the C library" "libc6-dev"
		printf '#include <linux/userfaultfd.h>\n#include <linux/kvm.h>\n' | "$cc" -E -x c - >/dev/null 2>&1 ||
			lack "the headers of the Linux kernel" "linux-libc-dev"
	fi
	for tool in ar nm objcopy; do
		command -v "$tool" >/dev/null 2>&1 || lack "$tool" "binutils"
	done
	command -v make >/dev/null 2>&1 || lack "make" "make"
	[ -z "$missing" ] && return 0
	sudo=
	[ "$(id -u)" = 0 ] || sudo="sudo "
	echo "postcopy cannot be built here yet. Missing:$missing" >&2
	echo "On Debian or Ubuntu:  ${sudo}apt-get install --no-install-recommends$packages" >&2
	return 1
}

# TLS is built where OpenSSL's headers are; without them all the rest is.
openssl() {
	headers() { printf '#include <openssl/ssl.h>\n#if OPENSSL_VERSION_MAJOR < 3\n#error\n#endif\n' | "$cc" -E -x c - >/dev/null 2>&1; }
	headers && return 0
	if [ "${POSTCOPY_INSTALL:-0}" = 1 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
		echo "setup: installing libssl-dev"
		get() { DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends libssl-dev; }
		{ get || { apt-get update --quiet && get; }; } >build/libssl-dev.log 2>&1 || cat build/libssl-dev.log >&2
		headers && return 0
	fi
	echo "setup: no openssl/ssl.h of OpenSSL 3: this postcopy will have no TLS. Debian: apt-get install libssl-dev, then make setup" >&2
}

at_least() { # command, major, minor: is there and at least that version
	version=$("$1" --version 2>/dev/null | sed -n '1s/^[^0-9]*\([0-9][0-9]*\.[0-9][0-9]*\).*/\1/p')
	[ -n "$version" ] && [ "${version%.*}" -gt "$2" ] ||
		{ [ -n "$version" ] && [ "${version%.*}" -eq "$2" ] && [ "${version#*.}" -ge "$3" ]; }
}

install() {
	venv=$1
	# Also when it was left half made, or the Python it was made with is gone.
	if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
		echo "setup: making $venv with $("$python" -V)"
		"$python" -m venv --clear "$venv"
	fi
	# No build isolation: the C core is then compiled only where it changed. So what pip would have brought into an
	# environment of its own for the build is installed here: the build backend and, where the system has none that is
	# recent enough, cmake and ninja.
	build=$("$venv/bin/python" -c 'import tomllib
print(*(need.replace(" ", "") for need in tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))')
	PATH=$PWD/$venv/bin:$PATH
	at_least cmake 3 25 || build="$build cmake>=3.25"
	at_least ninja 1 10 || build="$build ninja>=1.10"
	if ! [ "$venv/.dependencies" -nt pyproject.toml ] || ! [ "$venv/.dependencies" -nt tools/setup.sh ]; then
		echo "setup: installing the build tools: $build"
		# shellcheck disable=SC2086
		"$venv/bin/pip" install --quiet --disable-pip-version-check $build
		echo "setup: installing postcopy with what it, its tests and its linters need"
	else
		echo "setup: rebuilding postcopy, its sources have changed"
	fi
	CC=$cc "$venv/bin/pip" install --quiet --disable-pip-version-check --no-build-isolation --editable '.[report,test,dev,docs]'
	touch "$venv/.dependencies"
}

case ${1-} in
check)
	check
	;;
install)
	check
	mkdir -p build
	# Two at a time would write the same build directory.
	if command -v flock >/dev/null 2>&1; then
		exec 9>build/.lock
		flock 9
	fi
	openssl
	install "$2"
	;;
extra)
	echo "setup: installing what pyproject.toml names for $3"
	"$2/bin/python" -c 'import sys, tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")' "$3" |
		"$2/bin/pip" install --quiet --disable-pip-version-check --requirement /dev/stdin
	;;
*)
	echo "usage: setup.sh check | install VENV | extra VENV NAME" >&2
	exit 2
	;;
esac
