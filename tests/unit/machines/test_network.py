# SPDX-License-Identifier: Apache-2.0
"""Addresses and TAPs of a machine, and the stream of echoes that watches one."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import struct
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from postcopy.errors import BusyError, ConfigurationError, MigrationError, ProtocolError, ResourceError
from postcopy.machines import BlockLayout
from postcopy.machines.kinds import MachineOptions, create_destination, create_source
from postcopy.machines.toy import tap
from postcopy.testbed import pinger
from postcopy.testbed.pinger import PingStatistics, open_ping_process, ping_stream

CLONE_NEWNET = 0x40000000
MAC, ADDRESS = 0x02_00_00_00_00_05, 0x0A09_0002
RunInChild = Callable[..., Any]


# ---- what users say


@pytest.mark.parametrize("text", ["tap:tap0", "tap:a", "tap:vm-1.net", "tap:" + "x" * 15])
def test_net(text: str) -> None:
    assert f"tap:{tap.parse_net(text)}" == text


@pytest.mark.parametrize(
    "text", ["", "tap", "tap0", "tun:a", "tap:", "tap:a b", "tap:a/b", "tap:..", "tap:%d", "tap:ä"]
)
def test_bad_net(text: str) -> None:
    with pytest.raises(ConfigurationError, match="network"):
        tap.parse_net(text)


def test_mac() -> None:
    assert tap.parse_mac("02:50:43:aB:8b:a5") == 0x025043AB8BA5
    assert tap.format_mac(0x025043AB8BA5) == "02:50:43:ab:8b:a5"
    for text in (
        "",
        "02:50:43:ab:8b",
        "02-50-43-ab-8b-a5",
        "0g:50:43:ab:8b:a5",
        "01:00:5e:00:00:01",
        "00:00:00:00:00:00",
    ):
        with pytest.raises(ConfigurationError, match="MAC"):
            tap.parse_mac(text)


def test_ipv4() -> None:
    assert tap.parse_ipv4("10.9.0.2") == ADDRESS
    assert tap.format_ipv4(ADDRESS) == "10.9.0.2"
    for text in ("", "10.9", "10.9.0.256", "::1", "224.0.0.1", "127.0.0.1", "255.255.255.255", "0.0.0.1"):
        with pytest.raises(ConfigurationError):
            tap.parse_ipv4(text)


def test_addresses_follow_from_the_seed() -> None:
    seeds = [0, 1, 2, 99, 1 << 63, (1 << 64) - 1, *range(1000, 1200)]
    for seed in seeds:
        mac, address = tap.default_mac(seed), tap.default_ipv4(seed)
        assert (mac, address) == (tap.default_mac(seed), tap.default_ipv4(seed))
        assert tap.parse_mac(tap.format_mac(mac)) == mac
        assert mac >> 40 == 2
        assert tap.parse_ipv4(tap.format_ipv4(address)) == address
        assert 0xA9FE0100 <= address < 0xA9FEFF00  # RFC 3927, without the two parts that it reserves
    assert len({tap.default_mac(seed) for seed in seeds}) == len(seeds)
    assert len({tap.default_ipv4(seed) for seed in seeds}) > len(seeds) * 0.9


def test_announcement() -> None:
    frame = tap.announcement(MAC, ADDRESS)
    assert len(frame) == 42
    assert frame[:6] == b"\xff" * 6
    assert frame[6:12] == frame[22:28] == MAC.to_bytes(6, "big")
    assert struct.unpack("!HHHBBH", frame[12:22]) == (0x806, 1, 0x800, 6, 4, 1)
    assert frame[28:32] == frame[38:42] == ADDRESS.to_bytes(4, "big")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (MachineOptions(workload="echo"), "needs --net tap:NAME"),
        (MachineOptions(workload="echo", net="eth0"), "write tap:NAME"),
        (MachineOptions(workload="idle", net="tap:a"), "--net has no meaning"),
        (MachineOptions(workload="idle", net_mac=MAC), "--net has no meaning"),
        (MachineOptions(workload="random", net_address=ADDRESS), "--net has no meaning"),
    ],
)
def test_options(options: MachineOptions, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        create_source("rv64", options)


def test_an_image_has_no_network() -> None:
    with pytest.raises(ConfigurationError, match="--net has no meaning for --machine image"):
        create_source("image", MachineOptions(image="x", net="tap:a"))


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"net-mac": None}, ProtocolError, "net-mac"),
        ({"net-mac": 1 << 48}, ProtocolError, "cannot be"),
        ({"net-address": 1 << 32}, ProtocolError, "cannot be"),
        ({"net-address": "10.9.0.2"}, ProtocolError, "net-address"),
        ({}, ConfigurationError, "say --net tap:NAME"),
    ],
)
def test_offers(change: dict[str, Any], error: type[Exception], match: str) -> None:
    config: dict[str, Any] = {"vcpus": 1, "workload": "echo", "working-set-bytes": 0, "seed": 1}
    config |= {"net-mac": MAC, "net-address": ADDRESS} | change
    layout = [BlockLayout("shared", 8 << 20, 4096), BlockLayout("vcpu0", 8 << 20, 4096)]
    with pytest.raises(error, match=match):
        create_destination("rv64", config, layout)


# ---- TAPs


def a_namespace_of_its_own() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


def read_frame(of: tap.Network) -> bytes | None:
    """The next frame that is not the host's own IPv6 chatter."""
    while True:
        try:
            frame = os.read(of.fd, 65536)
        except BlockingIOError:
            return None
        if frame[12:14] != b"\x86\xdd":
            return frame


def open_close_and_open_again() -> None:
    a_namespace_of_its_own()
    one = tap.Network.open("tap:one", MAC, ADDRESS)
    with pytest.raises(BusyError, match="in use"):
        tap.Network.open("tap:one", MAC, ADDRESS)
    with pytest.raises(ConfigurationError, match="no TAP"):
        tap.Network.open("tap:lo", MAC, ADDRESS)
    one.close()
    one.close()
    with pytest.raises(trio.ClosedResourceError):
        _ = one.fd
    tap.Network.open("tap:one", MAC, ADDRESS).close()


@pytest.mark.needs("root", "netns", "tun")
def test_tap(run_in_child: RunInChild) -> None:
    done = run_in_child(open_close_and_open_again)
    assert done.returncode == 0, done.stderr


def carry_frames() -> None:
    """Between a TAP and an address of the host on it, by ARP: the kernel answers only while the link is up."""
    a_namespace_of_its_own()
    one = tap.Network.open("tap:one", MAC, ADDRESS)
    assert os.system("ip addr add 10.9.0.1/24 dev one") == 0
    question = bytearray(tap.announcement(MAC, ADDRESS))
    question[38:42] = bytes((10, 9, 0, 1))

    def answer(for_s: float) -> bytes | None:
        one.drain()
        deadline = time.monotonic() + for_s
        while time.monotonic() < deadline:
            os.write(one.fd, question)  # again: it takes a moment until the interface sends
            if frame := read_frame(one):
                return frame
            time.sleep(0.001)
        return None

    assert answer(0.2) is None
    one.connect(True)
    reply = answer(10)
    assert reply is not None
    assert reply[:6] == MAC.to_bytes(6, "big")
    assert reply[28:32] == bytes((10, 9, 0, 1))
    os.write(one.fd, question)
    assert one.drain() >= 1
    assert read_frame(one) is None
    one.connect(False)
    one.set_up(False)
    one.set_up(False)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.write(one.fd, question)
    one.announce()  # lost, which is no error
    one.close()


@pytest.mark.needs("root", "netns", "tun")
def test_link(run_in_child: RunInChild) -> None:
    done = run_in_child(carry_frames)
    assert done.returncode == 0, done.stderr


def announce_while_it_is_ours() -> None:
    a_namespace_of_its_own()

    async def main() -> None:
        network = tap.Network.open("tap:one", MAC, ADDRESS)
        assert network.net == "tap:one"
        sent: list[float] = []
        network.announce = lambda: sent.append(trio.current_time())  # type: ignore[method-assign]
        network.claim()
        assert len(sent) == 1
        await trio.sleep(sum(tap.ANNOUNCE_AFTER_S) + 1)
        assert len(sent) == 1 + len(tap.ANNOUNCE_AFTER_S)
        network.claim()
        await trio.sleep(tap.ANNOUNCE_AFTER_S[0] * 1.5)
        assert len(sent) == 1 + len(tap.ANNOUNCE_AFTER_S) + 2
        network.release()
        await trio.sleep(10)
        assert len(sent) == 1 + len(tap.ANNOUNCE_AFTER_S) + 2
        network.claim()
        network.close()
        await trio.sleep(10)
        assert len(sent) == 1 + len(tap.ANNOUNCE_AFTER_S) + 3

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def lose_the_interface() -> None:
    """It is deleted under the machine: errors name it, and the machine runs on."""
    a_namespace_of_its_own()

    async def main() -> None:
        options = MachineOptions(memory_bytes=16 << 20, workload="echo", net="tap:one", net_address=ADDRESS)
        async with create_source("rv64", options) as machine:
            await machine.boot()
            await trio.run_process(["ip", "link", "del", "one"])
            network = machine._network  # type: ignore[attr-defined]
            for act in (network.claim, network.release):
                with pytest.raises(ResourceError, match="one"):
                    act()
            await machine.release_network()
            await machine.claim_network()
            await machine.resume()
            await machine.wait_ready()
            await machine.pause()

    trio.run(main)


@pytest.mark.needs("root", "netns", "tun")
def test_an_interface_that_is_gone(run_in_child: RunInChild) -> None:
    done = run_in_child(lose_the_interface)
    assert done.returncode == 0, done.stderr
    assert "not on the network" in done.stderr


@pytest.mark.needs("root", "netns", "tun")
def test_announcements(run_in_child: RunInChild) -> None:
    done = run_in_child(announce_while_it_is_ours)
    assert done.returncode == 0, done.stderr


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "_open_device", lambda: -errno.ENOENT)
    with pytest.raises(ResourceError, match="load the module tun"):
        tap.Network.open("tap:one", MAC, ADDRESS)


# ---- the stream


class Echo:
    """A machine on loopback, as its guest program would answer."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.port: int = sock.getsockname()[1]
        self.count = 0
        self.nonce = 7
        self.deaf_to = 0  # so many
        self.twice = False

    async def run(self) -> None:
        while True:
            data, sender = await self.sock.recvfrom(2048)
            if self.deaf_to:
                self.deaf_to -= 1
                continue
            self.count += 1
            answer = data[:8] + struct.pack("<QQ", self.count, self.nonce) + data[24:]
            for _ in range(1 + self.twice):
                await self.sock.sendto(answer, sender)
            await self.sock.sendto(b"noise", sender)
            await self.sock.sendto(answer[:-8] + bytes(8), sender)  # of another stream


async def watch(echo_does: Callable[[Echo, PingStatistics], None], answers: int) -> PingStatistics:
    stop = trio.Event()
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        echo = Echo(sock)

        def on_answer(statistics: PingStatistics) -> None:
            echo_does(echo, statistics)
            if statistics.answered >= answers:
                stop.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo.run)
            with trio.fail_after(20):
                result = await ping_stream(
                    "127.0.0.1", port=echo.port, interval_s=0.001, stop=stop, on_answer=on_answer
                )
            nursery.cancel_scope.cancel()
    return result


async def test_a_good_stream() -> None:
    result = await watch(lambda echo, statistics: None, 50)
    assert result.sent == result.answered >= 50
    assert (result.duplicates, result.not_increasing, result.same_machine) == (0, 0, True)
    assert result.nonces == ["0x0000000000000007"]
    assert 0 < result.longest_gap_ms < math.inf
    assert result.as_dict()["same_machine"] is True


async def test_a_gap() -> None:
    """The machine does not hear twenty of them, after its tenth answer."""

    def pause(echo: Echo, statistics: PingStatistics) -> None:
        if statistics.answered == 10:
            echo.deaf_to = 20

    result = await watch(pause, 40)
    assert result.sent - result.answered == 20
    assert result.longest_gap_ms >= 10  # they are sent a millisecond apart, give or take the scheduler
    assert result.not_increasing == 0


@pytest.mark.parametrize(
    ("sent", "answered", "gap", "loss", "after", "unanswered", "silent"),
    [
        ([0, 1, 2], {0: 0.1, 1: 1.2, 2: 2.1}, 1100, 0, 1, 0, 0),
        ([0, 1, 2, 3, 4, 5], {0: 0.1, 1: 1.1, 5: 5.1}, 4000, 4000, 2, 3, 0),
        ([0, 1, 2, 3, 4], {0: 0.1, 3: 3.1, 1: 3.2, 4: 4.1}, 3000, 3000, 1, 1, 0),  # one of the gap is answered late
        ([0, 1, 2, 3, 4], {0: 0.1, 1: 1.1}, 1000, 0, 1, 0, 2900),
        ([0, 1, 2, 3, 9], {0: 0.1, 1: 1.1, 3: 3.1, 4: 9.1}, 6000, 2000, 3, 0, 0),  # late is not lost
        ([0, 1], {1: 1.1}, 0, 0, 0, 0, 0),
        ([0, 1], {}, 0, 0, 0, 0, 0),
    ],
)
async def test_figures(
    sent: list[float], answered: dict[int, float], gap: float, loss: float, after: int, unanswered: int, silent: float
) -> None:
    stream = pinger._Stream()
    stream._sent_at, stream._answered = sent, answered
    stream._counts = {number: number + 1 for number in answered}
    result = stream.figures()
    assert (result.sent, result.answered) == (len(sent), len(answered))
    assert result.longest_gap_ms == pytest.approx(gap)
    assert result.longest_loss_ms == pytest.approx(loss)
    assert (result.gap_after, result.unanswered_in_gap) == (after, unanswered)
    assert result.silent_at_end_ms == pytest.approx(silent)


async def test_a_machine_whose_counts_decrease() -> None:
    def go_back(echo: Echo, statistics: PingStatistics) -> None:
        if statistics.answered == 10:
            echo.count = 5

    assert (await watch(go_back, 20)).not_increasing > 0


async def test_another_machine() -> None:
    def replace(echo: Echo, statistics: PingStatistics) -> None:
        if statistics.answered == 10:
            echo.nonce = 8

    result = await watch(replace, 20)
    assert not result.same_machine
    assert len(result.nonces) == 2


async def test_answers_that_come_twice() -> None:
    def stutter(echo: Echo, statistics: PingStatistics) -> None:
        echo.twice = True

    result = await watch(stutter, 20)
    assert result.duplicates > 0
    assert (result.not_increasing, result.reordered) == (0, 0)


@pytest.mark.parametrize(
    ("answers", "not_increasing", "reordered"),
    [
        ({0: (1, 0.1), 1: (2, 1.1), 2: (3, 2.1)}, 0, 0),
        ({0: (1, 0.1), 2: (3, 2.1), 1: (2, 2.2)}, 0, 1),  # overtaken on its way back
        ({0: (1, 0.1), 2: (2, 2.1), 1: (3, 2.2)}, 0, 1),  # and on its way there
        ({0: (1, 0.1), 1: (2, 1.1), 2: (2, 2.1)}, 1, 0),  # a number twice: two machines, or one that was reset
        ({0: (5, 0.1), 1: (3, 1.1), 2: (4, 2.1)}, 2, 0),  # asked when five had been said already
        ({0: (5, 1.1), 1: (3, 1.2), 2: (4, 2.1)}, 1, 0),  # the first two were under way at the same time
    ],
)
async def test_the_machine_and_not_the_network_is_judged(
    answers: dict[int, tuple[int, float]], not_increasing: int, reordered: int
) -> None:
    stream = pinger._Stream()
    stream._sent_at = [0.0, 1.0, 2.0, 3.0]
    stream._counts = {number: count for number, (count, _) in answers.items()}
    stream._answered = {number: at for number, (_, at) in answers.items()}
    result = stream.figures()
    assert (result.not_increasing, result.reordered) == (not_increasing, reordered)


async def test_a_machine_that_falls_silent() -> None:
    def fall_silent(echo: Echo, statistics: PingStatistics) -> None:
        if statistics.answered == 10:
            echo.deaf_to = 1000

    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        echo = Echo(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo.run)
            result = await ping_stream(
                "127.0.0.1",
                port=echo.port,
                interval_s=0.001,
                seconds=0.5,
                on_answer=lambda statistics: fall_silent(echo, statistics),
            )
            nursery.cancel_scope.cancel()
    assert 10 <= result.answered < result.sent
    assert result.silent_at_end_ms > 0


async def test_a_stream_in_a_process_of_its_own() -> None:
    wrapped: list[str] = []

    def wrap(command: list[str]) -> list[str]:
        wrapped.extend(command)
        return ["env", *command, "--port", str(port)]

    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        echo, port = Echo(sock), sock.getsockname()[1]
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(echo.run)
                async with open_ping_process("127.0.0.1", interval_s=0.002, wrap=wrap) as pings:
                    begin_ns = time.monotonic_ns()
                    assert pings.gap_ms(0, begin_ns) is None
                    await pings.wait_answered(20)
                    assert pings.answered >= 20
                    gap_ms = pings.gap_ms(begin_ns, time.monotonic_ns())
                    assert gap_ms is not None
                    assert gap_ms > 0
                    assert pings.gap_ms(0, begin_ns) is None
                    result = await pings.stop()
                nursery.cancel_scope.cancel()
    assert "127.0.0.1" in wrapped
    assert result.answered >= 20
    assert result.same_machine
    assert msgspec.convert(result.as_dict(), PingStatistics) == result


async def test_a_stream_that_cannot_be_had() -> None:
    with pytest.raises(MigrationError, match="cannot start"):
        async with open_ping_process("127.0.0.1", wrap=lambda command: ["/there/is/none"]):
            pass
    with trio.fail_after(30):
        async with open_ping_process("127.0.0.1", wrap=lambda command: ["true"]) as pings:
            with pytest.raises(MigrationError, match="ended after 0"):
                await pings.wait_answered(1)
            with pytest.raises(MigrationError, match="without its figures"):
                await pings.stop()


async def test_nobody() -> None:
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        result = await ping_stream("127.0.0.1", port=sock.getsockname()[1], interval_s=0.001, seconds=0.02)
    assert result.sent > 0
    assert result.answered == 0
    assert not result.same_machine
    with pytest.raises(ValueError, match="positive"):
        await ping_stream("127.0.0.1", interval_s=0)
