# SPDX-License-Identifier: Apache-2.0
"""The machine's network moves with it: a bridge with two TAPs in a namespace, and a stream of echoes that watches."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

Json = dict[str, Any]
Start = Callable[..., Any]
Spawn = Callable[..., Any]
Inside = Callable[..., Any]
ADDRESS = "10.9.0.2"
DEADLINE_S = 60.0
# The namespace lasts as long as this process, and with it the bridge and both TAPs.
NETWORK = """
ip link set lo up && ip link add br0 type bridge && ip addr add 10.9.0.1/24 dev br0 && ip link set br0 up || exit 1
for tap in tap-a tap-b; do
    ip tuntap add dev $tap mode tap && ip link set $tap master br0 || exit 1
done
echo there
exec sleep 1000
"""

pytestmark = pytest.mark.needs("root", "netns", "tun")


@pytest.fixture
def inside(spawn_child: Spawn) -> Inside:
    """``inside(command)``: starts it in a network namespace of this test."""
    holder = spawn_child(["unshare", "--net", "sh", "-c", NETWORK])
    deadline = time.monotonic() + DEADLINE_S
    while "there" not in holder.output():
        assert holder.process.poll() is None, holder.errors()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return lambda command: spawn_child(["nsenter", f"--net=/proc/{holder.pid}/ns/net", *command])


@pytest.fixture
def inner_side(side: Start, inside: Inside) -> Start:
    """As `side`, in the namespace."""

    def start(*arguments: Any) -> Any:
        return side(*arguments, spawn=inside)

    return start


class Pings:
    def __init__(self, inside: Inside, interval_s: float = 0.004) -> None:
        self._child = inside(
            [sys.executable, "-m", "postcopy.testbed.pinger", ADDRESS, "--verbose", "--interval", str(interval_s)]
        )

    @property
    def answered(self) -> int:
        whole, _, _ = self._child.output().rpartition("\n")
        return int(json.loads(whole.rpartition("\n")[2])["answered"]) if whole else 0

    def wait_for_more(self, count: int = 50) -> int:
        """So many answers after now; how many there have been then."""
        enough = self.answered + count
        deadline = time.monotonic() + DEADLINE_S
        while (answered := self.answered) < enough:
            assert self._child.process.poll() is None, self._child.errors()
            assert time.monotonic() < deadline, f"no answers after {answered}"
            time.sleep(0.005)
        return answered

    def end(self) -> Json:
        self._child.send_signal(signal.SIGTERM)
        done = self._child.wait(DEADLINE_S)
        assert done.returncode == 0, done.stderr
        figures: Json = json.loads(done.stdout.splitlines()[-1])  # of the pinger, no line of a command
        return figures


def links(inside: Inside) -> dict[str, Json]:
    done = inside(["ip", "-json", "link", "show"]).wait(DEADLINE_S)
    return {link["ifname"]: link for link in json.loads(done.stdout)}


def has_carrier(link: Json) -> bool:
    return {"UP", "LOWER_UP"} <= set(link["flags"])


def machine(kind: str, *more: str) -> tuple[str, ...]:
    size = ("--memory", "32MiB", "--vcpus", "2")
    return ("--machine", kind, *size, "--workload", "echo", "--net", "tap:tap-a", "--net-address", ADDRESS, *more)


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("kind", [pytest.param("kvm", marks=pytest.mark.needs("uffd", "kvm")), "rv64"])
def test_it_answers_on_at_the_destination(inner_side: Start, inside: Inside, kind: str) -> None:
    """Slowly pushed: it answers while most of its memory is at the source, whose cable is out."""
    dest = inner_side("dest", "--json", "--listen", "127.0.0.1:0", "--net", "tap:tap-b")
    source_arguments = machine(kind, "--migrate-after", "1.5", "--max-bandwidth", "16MiB/s")
    source = inner_side("source", "--json", "--connect", dest.address, *source_arguments)
    source.wait_for("accepted", lambda line: line.get("status") == "active")
    before_move = links(inside)
    assert has_carrier(before_move["tap-a"])
    assert not has_carrier(before_move["tap-b"])
    pings = Pings(inside)
    pings.wait_for_more()
    dest.wait_status("postcopy-active")
    moved = dest.wait_for("running", lambda line: line.get("guest", {}).get("state") == "running")
    pings.wait_for_more()
    while_moving = links(inside)
    assert not has_carrier(while_moving["tap-a"])
    assert has_carrier(while_moving["tap-b"])
    assert moved["guest"]["network"]["net"] == "tap:tap-b"
    dest.wait_status("completed")
    pings.wait_for_more()
    figures = pings.end()
    print(json.dumps(figures))
    status, result, errors = source.end()
    assert status == 0, errors
    dest.signal(signal.SIGINT)
    status, received, errors = dest.end()
    assert status == 0, errors
    assert received["verified"] is True
    assert figures["same_machine"]
    assert figures["not_increasing"] == figures["duplicates"] == 0
    assert figures["longest_gap_ms"] > 0
    assert 0 < figures["gap_after"] < figures["answered"]
    network, left = received["guest"]["network"], result["guest-at-pause"]["network"]
    assert network["mac"] == left["mac"]
    assert network["address"] == left["address"] == ADDRESS
    assert network["sent"] >= left["sent"] + 100
    assert network["errors"] == 0
    assert f"{int(received['guest']['nonce'], 16):#018x}" == figures["nonces"][0]


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("kind", [pytest.param("kvm", marks=pytest.mark.needs("uffd", "kvm")), "rv64"])
def test_the_demo_in_the_laboratory(side: Start, kind: str) -> None:
    """Three hosts: the machine goes from one to the second, whose cable is then cut; the third asks it all the time."""
    arguments = ("--machine", kind, "--memory", "32MiB", "--workload", "echo")
    status, result, errors = side("demo", "--json", "--lab", *arguments).end(100)
    assert status == 0, errors
    assert result["verified"] is True
    pings = result["pings"]
    assert 0 < pings["switchover-gap-ms"] <= pings["longest-gap-ms"]
    assert 0 < pings["answered"] < pings["sent"]  # it is asked before it is there, and while the cable is out
    assert pings["not-increasing"] == pings["duplicates"] == 0
    assert any("only increased" in item["what"] for item in result["verification"])


def test_the_demo_needs_a_laboratory(side: Start) -> None:
    status, _, errors = side("demo", "--json", "--machine", "rv64", "--workload", "echo").end()
    assert status == 2
    assert "say --lab" in errors


@pytest.mark.needs("uffd-user")
def test_a_failed_migration_leaves_the_network_as_it_was(inner_side: Start, inside: Inside) -> None:
    """The destination stops before it is prepared: the paused machine goes on at the source, and answers as before. The
    pause is long, since all of the memory is sent in it."""
    dest = inner_side("dest", "--json", "--listen", "127.0.0.1:0", "--net", "tap:tap-b")
    slowly = ("--mode", "stop-and-copy", "--max-bandwidth", "16KiB/s", "--recover-for", "0")
    arguments = machine("rv64", "--migrate-after", "1", "--heartbeat", "0.7", *slowly)
    source = inner_side("source", "--json", "--connect", dest.address, *arguments)
    source.wait_for("accepted", lambda line: line.get("status") == "active")
    pings = Pings(inside)
    pings.wait_for_more(10)
    source.wait_for("pause", lambda line: line.get("guest", {}).get("state") == "paused")
    dest.signal(signal.SIGSTOP)
    source.wait_status("failed")
    pings.wait_for_more()
    now = links(inside)
    assert has_carrier(now["tap-a"])
    assert not has_carrier(now["tap-b"])
    dest.signal(signal.SIGKILL)
    figures = pings.end()
    assert figures["same_machine"]
    assert figures["not_increasing"] == figures["duplicates"] == 0
    assert figures["gap_after"] < figures["answered"]


# ---- what a user can do wrong


def refusal(child: Any) -> str:
    done = child.wait(DEADLINE_S)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr
    return str(lines[0])


def source_with(net: str) -> list[str]:
    arguments = ("--connect", "127.0.0.1:1", "--machine", "rv64", "--workload", "echo", "--memory", "16MiB")
    return [sys.executable, "-m", "postcopy", "source", *arguments, "--net", net]


def test_no_tap(inside: Inside) -> None:
    assert "which is no TAP" in refusal(inside(source_with("tap:br0")))


def test_a_tap_in_use(inside: Inside, inner_side: Start) -> None:
    dest = inner_side("dest", "--json", "--listen", "127.0.0.1:0", "--net", "tap:tap-b")
    source = inner_side("source", "--json", "--connect", dest.address, *machine("rv64", "--migrate-after", "1000"))
    source.wait_for("accepted", lambda line: line.get("status") == "active")
    for name in ("tap-a", "tap-b"):
        assert f"TAP {name} is in use" in refusal(inside(source_with(f"tap:{name}")))


def test_without_rights(inside: Inside) -> None:
    """Not even the device can be opened, by its mode; or it can, and then the interface is another's."""
    line = refusal(inside(["setpriv", "--reuid=65534", "--clear-groups", *source_with("tap:tap-a")]))
    assert "/dev/net/tun" in line or "no right" in line
    assert "remedy" in line
    line = refusal(inside(["setpriv", "--bounding-set=-net_admin", *source_with("tap:other")]))
    assert "no right" in line
    assert "ip tuntap add dev other mode tap" in line


@pytest.mark.needs("uffd-user")
def test_a_tap_that_is_ready_needs_no_rights(inside: Inside, side: Start, inner_side: Start) -> None:
    """A user who may open the device can use a TAP that was made and set up for that user, and switch its link."""

    def without_rights(command: list[str]) -> Any:
        return inside(["setpriv", "--bounding-set=-net_admin", *command])

    def by_root(command: str) -> None:
        done = inside(["sh", "-c", command]).wait(DEADLINE_S)
        assert done.returncode == 0, done.stderr

    by_root("ip link del tap-b && ip tuntap add dev tap-b mode tap user 0 && ip link set tap-b master br0")
    assert "ip link set tap-b up" in refusal(without_rights(source_with("tap:tap-b")))
    by_root("ip link set tap-b up")
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--net", "tap:tap-b", spawn=without_rights)
    source = inner_side("source", "--json", "--connect", dest.address, *machine("rv64", "--migrate-after", "1"))
    source.wait_for("accepted", lambda line: line.get("status") == "active")
    assert not has_carrier(links(inside)["tap-b"])
    pings = Pings(inside)
    pings.wait_for_more(10)
    dest.wait_status("completed")
    pings.wait_for_more()
    figures = pings.end()
    assert figures["same_machine"]
    assert figures["not_increasing"] == figures["duplicates"] == 0


def test_a_destination_without_a_network(inner_side: Start) -> None:
    dest = inner_side("dest", "--json", "--listen", "127.0.0.1:0")
    source = inner_side("source", "--json", "--connect", dest.address, *machine("rv64"), "--on-failure", "exit")
    status, result, _ = source.end()
    assert status == 1
    assert "--net tap:NAME" in result["error"]
    dest.wait_for_errors("waiting for the next one")
    dest.signal(signal.SIGTERM)
    status, _, errors = dest.end()
    assert status == 1
    assert "--net tap:NAME" in errors
