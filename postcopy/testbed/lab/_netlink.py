# SPDX-License-Identifier: Apache-2.0
"""The process that talks rtnetlink, through pyroute2, until its standard input ends.

``python -m postcopy.testbed.lab._netlink``: on each line of standard input a JSON object, ``{"user": FILE or null,
"actions": [[VERB, ARGUMENT...], ...]}``, for which it writes one to standard output: ``{"results": [...]}``, or
``{"doing", "errno", "error"}`` of the action that failed; what came before it has been done.

A process of its own, since pyroute2 runs an asyncio event loop in the thread that calls it, where Trio's would be;
since its own way into a namespace is a fork of its caller, which a process with threads and a userfaultfd must
not be exposed to; and since a user namespace can be entered by a process with a single thread only. Here the process
enters a namespace and opens its socket there, which then belongs to that namespace whatever the process enters next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import TC_H_ROOT

from postcopy.testbed._linux import enter_network, enter_user
from postcopy.testbed.lab._plan import PREFIX4, PREFIX6

SWITCH = "switch"  # the bridge in the middle; its ports have the names of their hosts
BRIDGE, CABLE = "br0", "eth0"  # in every host: what has the addresses, and its port that leads to the switch
IFA_F_NODAD = 2  # if_addr.h: usable at once, nobody else has it
TBF_LATENCY = "50ms"  # how much may wait; the rest is lost, which is how TCP learns
CARRIER_S = 10.0
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB  # if_tun.h
IFF_TAP, IFF_NO_PI = 0x2, 0x1000


@contextlib.contextmanager
def network(path: str) -> Iterator[IPRoute]:
    enter_network(path)
    with IPRoute() as route:
        yield route


def _index(route: IPRoute, name: str) -> int:
    found = route.link_lookup(ifname=name)
    if not found:
        raise OSError(errno.ENODEV, f"there is no {name}")
    return int(found[0])


def make_switch(path: str, mtu: int) -> None:
    with network(path) as route:
        route.link("set", index=_index(route, "lo"), state="up")
        # No spanning tree, so that a port forwards as soon as it has a carrier.
        route.link("add", ifname=SWITCH, kind="bridge", br_stp_state=0, br_mcast_snooping=0)
        route.link("set", index=_index(route, SWITCH), mtu=mtu, state="up")


def make_host(switch: str, path: str, name: str, ipv4: str, ipv6: str | None, mac: str, mtu: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with network(switch) as route:
            # The other end is born where it belongs: there is no moment at which it could be left elsewhere.
            route.link("add", ifname=name, kind="veth", mtu=mtu, peer={"ifname": CABLE, "mtu": mtu, "net_ns_fd": fd})
            route.link("set", index=_index(route, name), master=_index(route, SWITCH), state="up")
    finally:
        os.close(fd)
    with network(path) as route:
        route.link("set", index=_index(route, "lo"), state="up")
        # A bridge with an address of its own, so that it stays the same when a TAP becomes a port.
        route.link("add", ifname=BRIDGE, kind="bridge", address=mac, br_stp_state=0, br_mcast_snooping=0)
        bridge, cable = _index(route, BRIDGE), _index(route, CABLE)
        route.link("set", index=cable, master=bridge, state="up")
        route.link("set", index=bridge, mtu=mtu, state="up")
        route.addr("add", index=bridge, address=ipv4, prefixlen=PREFIX4)
        if ipv6 is not None:
            route.addr("add", index=bridge, address=ipv6, prefixlen=PREFIX6, flags=IFA_F_NODAD)


def set_link(path: str, name: str, up: bool) -> None:
    with network(path) as route:
        route.link("set", index=_index(route, name), state="up" if up else "down")


def wait_for_carrier(path: str) -> None:
    """Until the host's cable and bridge work: the kernel tells a bridge of its ports' carriers within a second or so
    (net/core/link_watch.c), and what is sent until then is lost."""
    until = time.monotonic() + CARRIER_S
    with network(path) as route:
        indices = _index(route, CABLE), _index(route, BRIDGE)
        while any(route.get_links(index)[0].get("operstate") != "UP" for index in indices):
            if time.monotonic() > until:
                raise OSError(errno.ENETDOWN, "the cable has no carrier")
            time.sleep(0.01)


def cables(switch: str) -> dict[str, bool]:
    """Whether each cable is whole."""
    with network(switch) as route:
        return {str(link.get("ifname")): bool(link["flags"] & 1) for link in route.get_links()}


def has_qdisc(path: str, kind: str) -> bool:
    """Whether the kernel has a queueing discipline: tried on a loopback interface that nothing uses."""
    arguments: dict[str, dict[str, Any]] = {
        "netem": {"delay": 1000},
        "tbf": {"rate": "1mbit", "burst": 2000, "latency": TBF_LATENCY},
        "htb": {},
    }
    with network(path) as route:
        index = _index(route, "lo")
        try:
            route.tc("add", kind, index, handle=0x10000, **arguments[kind])
        except NetlinkError as error:
            if error.code == errno.ENOENT:
                return False
            if error.code != errno.EEXIST:  # another process is trying one at this moment
                raise
        with contextlib.suppress(NetlinkError):
            route.tc("del", index=index, parent=TC_H_ROOT)
        return True


def shape(
    path: str, name: str, rate: int | None, delay_us: int, mtu: int, kinds: Sequence[str] = ("tbf", "htb")
) -> str:
    """What leaves by this interface, from now on; which discipline, the first that the kernel has, limits its rate."""
    with network(path) as route:
        index = _index(route, name)
        try:
            route.tc("del", index=index, parent=TC_H_ROOT)
        except NetlinkError as error:
            if error.code != errno.ENOENT:  # there was none
                raise
        parent = {}
        if delay_us:
            route.tc("add", "netem", index, handle=0x10000, delay=delay_us, limit=10_000)
            parent = {"parent": 0x10001}
        if rate is None:
            return ""
        # A burst of at least two packets, and of what may leave between two ticks of a slow clock (100 Hz).
        burst = max(2 * (mtu + 14), rate // 100)
        limit: dict[str, Any] = {"rate": f"{rate * 8}bit", "burst": burst}
        for kind in kinds:
            try:
                if kind == "tbf":
                    route.tc("add", "tbf", index, handle=0x100000, latency=TBF_LATENCY, **limit, **parent)
                else:
                    route.tc("add", "htb", index, handle=0x100000, default=1, **parent)
                    route.tc("add-class", "htb", index, 0x100001, parent=0x100000, mtu=mtu + 14, **limit)
            except NetlinkError as error:
                if error.code != errno.ENOENT:
                    raise
            else:
                return kind
        raise OSError(errno.ENOENT, f"this kernel has no {' and no '.join(kinds)}")


def attach_tap(path: str, name: str) -> None:
    enter_network(path)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)  # it makes its interface in the namespace of this moment
    try:
        request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
        try:
            fcntl.ioctl(fd, TUNSETIFF, request)
            fcntl.ioctl(fd, TUNSETPERSIST, 1)
        except OSError as error:
            # Another program has it open: then it is there, and stays until that program closes it.
            if error.errno != errno.EBUSY:
                raise
    finally:
        os.close(fd)
    with network(path) as route:
        bridge, tap = _index(route, BRIDGE), _index(route, name)
        mtu = route.get_links(bridge)[0].get("mtu")
        route.link("set", index=tap, mtu=mtu, master=bridge, state="up")


def remove_tap(path: str, name: str) -> None:
    with network(path) as route:
        route.link("del", index=_index(route, name))


VERBS: dict[str, Callable[..., Any]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        make_switch,
        make_host,
        set_link,
        wait_for_carrier,
        cables,
        has_qdisc,
        shape,
        attach_tap,
        remove_tap,
    )
}


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    results: list[Any] = []
    doing = "entering the user namespace"
    try:
        if request["user"] is not None:
            enter_user(request["user"])
        for verb, *arguments in request["actions"]:
            doing = verb
            results.append(VERBS[verb](*arguments))
    except NetlinkError as error:
        return {"doing": doing, "errno": error.code, "error": str(error.args[1])}
    except OSError as error:
        return {"doing": doing, "errno": error.errno, "error": error.strerror or str(error)}
    return {"results": results}


def main() -> int:
    with contextlib.suppress(BrokenPipeError):  # the process that asked was killed meanwhile
        for line in sys.stdin:
            # (print would keep the answer, and try again at the end of the interpreter)
            os.write(sys.stdout.fileno(), json.dumps(answer_to(json.loads(line))).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
