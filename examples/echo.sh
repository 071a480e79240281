#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# A machine whose network moves with it: two TAPs on a bridge, source and destination as two processes, and a stream of
# echoes that watches. As root, in a network namespace that is gone afterwards:
#
#     unshare --net sh examples/echo.sh [kvm|rv64]
#
# $POSTCOPY and $PYTHON say which ones to run (default: those of .venv).
set -eu
here=$(dirname -- "$0")/..
postcopy=${POSTCOPY:-$here/.venv/bin/postcopy} python=${PYTHON:-$here/.venv/bin/python}
machine=${1:-kvm}
if [ "$(ip -o link show up | wc -l)" -ne 0 ]; then
	echo "echo.sh: this is not an empty network namespace; run: unshare --net sh $0" >&2
	exit 2
fi

ip link set lo up
ip link add br0 type bridge
ip address add 10.9.0.1/24 dev br0
ip link set br0 up
for tap in tap-a tap-b; do
	ip tuntap add dev $tap mode tap
	ip link set $tap master br0
done

work=$(mktemp -d)
# Whatever happens nothing is left behind, and the last lines of each side are shown.
trap 'kill $sides 2>/dev/null || true; wait; cat "$work"/*.log >&2; rm -rf "$work"' EXIT
sides=
"$postcopy" dest --listen 127.0.0.1:7777 --net tap:tap-b --run-for 4 2>"$work/dest.log" &
dest=$! sides=$!
until grep -q listening "$work/dest.log"; do
	kill -0 $dest
	sleep 0.05
done
"$postcopy" source --connect 127.0.0.1:7777 --machine "$machine" --memory 64MiB --vcpus 1 --workload echo \
	--net tap:tap-a --net-address 10.9.0.2 --migrate-after 2 2>"$work/source.log" &
sides="$sides $!"
"$python" -m postcopy.testbed.pinger 10.9.0.2 --interval 0.002 --seconds 5
wait $dest
