#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Moves a program that computes, examples/arena.c, from one process to another on this host, while it computes.
# On two hosts: the two halves, each on its own (docs/programs.md). arena_move.sh [MEBIBYTES]
set -eu
postcopy=${POSTCOPY:-postcopy}
work=$(mktemp -d /dev/shm/arena-XXXXXX)
here=$(dirname "$0")
children=
trap 'kill $children 2>/dev/null || :; wait; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

until_there() { # FILE TEXT: until a line with the text is in the file
	tries=0
	until grep -q "$2" "$1" 2>/dev/null; do
		tries=$((tries + 1))
		[ $tries -lt 600 ] || { echo "no '$2' in $1 after 60 s:" && cat "$1"; exit 1; }
		sleep 0.1
	done
}

${CC:-cc} -O2 -o "$work/arena" "$here/arena.c"

"$postcopy" run --socket "$work/a.sock" -- "$work/arena" "$work/a" "${1:-64}" >"$work/a.log" &
children="$children $!"
"$postcopy" run --lazy --socket "$work/b.sock" -- "$work/arena" "$work/b" "${1:-64}" >"$work/b.log" &
children="$children $!"
until_there "$work/a.log" nonce
until_there "$work/b.log" mapped

"$postcopy" dest --machine program --preload "$work/b.sock" --listen 127.0.0.1:0 --control "$work/d.ctl" >"$work/dest.log" 2>&1 &
children="$children $!"
until_there "$work/dest.log" listening
port=$(sed -n 's/.*127\.0\.0\.1:\([0-9]*\).*/\1/p' "$work/dest.log" | head -1)
"$postcopy" source --machine program --preload "$work/a.sock" --connect "127.0.0.1:$port" --control "$work/s.ctl"

until_there "$work/b.log" nonce
echo "there: $(tail -1 "$work/a.log")"
echo "here:  $(head -2 "$work/b.log" | tail -1)"
