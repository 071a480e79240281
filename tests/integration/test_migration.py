# SPDX-License-Identifier: Apache-2.0
"""The whole path, as processes on this host."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postcopy.dataplane import compression

MIB = 1 << 20
Start = Callable[..., Any]
KVM = ("source", "--json", "--machine", "kvm", "--memory", "32MiB", "--vcpus", "2")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """64 MiB of which 6 are there, the last page in part."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(64 * MIB + 1234)
        for megabyte in (0, 7, 8, 30, 31):
            file.seek(megabyte * MIB)
            file.write(os.urandom(MIB))
        file.seek(64 * MIB)
        file.write(b"x" * 1234)
    return path


def blocks(path: Path) -> int:
    return path.stat().st_blocks


@pytest.mark.needs("uffd-user")
class TestImage:
    @pytest.mark.parametrize("backing", ["memfd", "anon"])
    def test_pull(self, side: Start, image: Path, tmp_path: Path, backing: str) -> None:
        source = side("source", "--json", "--machine", "image", "--image", image, "--listen", "127.0.0.1:0")
        copy = tmp_path / "copy.raw"
        dest = side("dest", "--json", "--connect", source.address, "--dump", copy, "--backing", backing)
        for one in (dest, source):
            status, result, errors = one.end()
            assert status == 0, errors
            assert result["status"] == "completed"
            assert result["ram"]["remaining"] == 0
            assert 5 * MIB < result["ram"]["transferred"] < 7 * MIB
        assert dest.end()[1]["verified"] is True
        assert copy.read_bytes() == image.read_bytes()
        assert blocks(copy) <= blocks(image) + 8
        assert not list(tmp_path.glob("*.part"))

    @pytest.mark.parametrize("host", ["[::1]", "localhost"])
    def test_hosts_and_several_bulk_channels(
        self, side: Start, image: Path, host: str, require: Callable[..., None]
    ) -> None:
        if host == "[::1]":
            require("ipv6")
        dest = side("dest", "--json", "--listen", f"{host}:0")
        port = dest.address.rpartition(":")[2]
        arguments = ("--machine", "image", "--image", image, "--bulk-channels", "3", "--busy-poll", "20")
        source = side("source", "--json", *arguments, "--connect", f"{host}:{port}")
        assert source.end()[0] == 0
        assert dest.end()[0] == 0

    def test_several_destinations_at_the_same_time(self, side: Start, image: Path, tmp_path: Path) -> None:
        arguments = ("--machine", "image", "--image", image, "--listen", "127.0.0.1:0", "--serve", "3")
        source = side("source", "--json", *arguments, "--max-bandwidth", "8MiB/s")
        address = source.address
        copies = [tmp_path / f"copy{number}" for number in range(3)]
        dests = [side("dest", "--json", "--connect", address, "--dump", copy) for copy in copies]
        for dest, copy in zip(dests, copies, strict=True):
            assert dest.end()[0] == 0
            assert copy.read_bytes() == image.read_bytes()
        status, result, _ = source.end()
        assert status == 0
        assert result["served"] == 3

    def test_image_that_shrinks(self, side: Start, image: Path) -> None:
        source = side("source", "--json", "--machine", "image", "--image", image, "--listen", "127.0.0.1:0")
        address = source.address
        source.wait_for("digest", lambda line: line.get("guest", {}).get("state") == "paused")
        os.truncate(image, MIB)
        dest = side("dest", "--json", "--connect", address)
        status, result, errors = dest.end()
        assert status == 1
        assert "changed" in result["error"]
        assert errors.count("postcopy: error:") == 1
        source.signal(signal.SIGTERM)
        assert source.end()[0] == 1

    def test_destination_lost_then_another(self, side: Start, image: Path, tmp_path: Path) -> None:
        """One that died takes no place, and its source does not wait for it when all has been served."""
        arguments = ("--machine", "image", "--image", image, "--listen", "127.0.0.1:0", "--max-bandwidth", "1MiB/s")
        source = side("source", "--json", *arguments)
        first = side("dest", "--json", "--connect", source.address)
        first.wait_for("pages", lambda line: line.get("ram", {}).get("background-pages", 0) > 0)
        first.signal(signal.SIGKILL)
        source.wait_status("postcopy-paused")
        copy = tmp_path / "copy"
        assert side("dest", "--json", "--connect", source.address, "--dump", copy).end()[0] == 0
        assert copy.read_bytes() == image.read_bytes()
        status, result, errors = source.end()
        assert status == 0, errors
        assert result["served"] == 1

    def test_source_lost_after_commit(self, side: Start, image: Path) -> None:
        """The destination keeps everything, and says so, until a signal ends it."""
        arguments = ("--machine", "image", "--image", image, "--listen", "127.0.0.1:0", "--max-bandwidth", "256KiB/s")
        source = side("source", "--json", *arguments)
        dest = side("dest", "--json", "--connect", source.address)
        dest.wait_for(
            "pages", lambda line: line["event"] == "progress" and line.get("ram", {}).get("background-pages", 0) > 0
        )
        source.signal(signal.SIGKILL)
        paused = dest.wait_status("postcopy-paused")
        assert paused["ram"]["remaining"] > 0
        dest.signal(signal.SIGINT)
        status, result, errors = dest.end()
        assert status == 1
        assert result["status"] == "postcopy-paused"
        assert "PAUSED" in errors


@pytest.mark.needs("uffd", "kvm")
class TestKvm:
    @pytest.mark.parametrize("workload", ["idle", "dirty", "random", "disk"])
    def test_demo(self, side: Start, workload: str) -> None:
        arguments = ("--memory", "32MiB", "--vcpus", "2", "--workload", workload, "--migrate-after", "0.2")
        # (the push is not to be done before the vCPUs have got a processor)
        slowly = () if workload == "idle" else ("--max-bandwidth", "32MiB/s")
        status, result, errors = side("demo", "--json", *arguments, *slowly, "--run-for", "0.5").end(100)
        assert status == 0, errors
        assert result["status"] == "completed"
        assert result["verified"] is True
        assert len(result["verification"]) == 4
        if workload != "idle":  # which touches so little that the push may be faster
            assert result["ram"]["demand-pages"] > 0
            assert result["fault-latency-us"]["count"] > 0
        assert result["ram"]["total"] == 32 * MIB
        assert result["downtime-ms"] > 0
        assert len(result["blocktime-ms"]) == 2
        assert result["dest"]["guest"]["failures"] == 0

    def test_dump_of_a_live_machine(self, side: Start, tmp_path: Path) -> None:
        dump = tmp_path / "memory"
        arguments = ("--memory", "32MiB", "--workload", "idle", "--migrate-after", "0", "--run-for", "0.1")
        status, result, errors = side("demo", "--json", *arguments, "--dump", dump).end(100)
        assert status == 0, errors
        assert result["dump"] == str(dump)
        assert dump.stat().st_size == 32 * MIB
        assert blocks(dump) * 512 < 4 * MIB

    @pytest.mark.parametrize("moment", ["setup", "ready", "switchover"])
    def test_destination_killed_before_commit(self, side: Start, moment: str) -> None:
        """SIGKILL at the destination, whenever: the machine goes on at the source."""
        dest = side("dest", "--json", "--listen", "127.0.0.1:0")
        after = {"setup": "60", "ready": "60", "switchover": "1.5"}[moment]
        given_up = ["--migrate-after", after, "--recover-for", "0"]
        if moment == "switchover":  # the pause is long, since all of the memory is sent in it
            given_up += ["--mode", "stop-and-copy", "--max-bandwidth", "1MiB/s"]
        source = side(*KVM, "--workload", "dirty", "--connect", dest.address, *given_up)
        if moment == "setup":
            dest.wait_for("source", lambda line: line.get("ram") is not None)
        else:
            source.wait_status("active")
        if moment == "switchover":
            source.wait_for("pause", lambda line: line.get("guest", {}).get("state") == "paused")
        dest.signal(signal.SIGKILL)
        if moment == "setup":
            # Which of the two it is depends on who was faster; either way it ends in order, or computes on.
            failed = source.wait_for("failure", lambda line: line["event"] in ("migration-ended", "result"))
            assert failed["status"] == "failed"
            return
        failed = source.wait_for("failure", lambda line: line["event"] == "migration-ended")
        assert "destination" in failed["error"]
        progress = source.wait_for(
            "running",
            lambda line: (
                line["event"] == "progress"
                and line["elapsed-ms"] >= failed["elapsed-ms"]
                and line["guest"]["state"] == "running"
            ),
        )
        source.operations_after(progress)
        source.signal(signal.SIGTERM)
        status, result, errors = source.end()
        assert status == 1
        assert result["status"] == "failed"
        assert result["guest"]["failures"] == 0
        assert errors.count("postcopy: error:") == 1

    def test_begun_again(self, side: Start, operator: Callable[[str], Any], tmp_path: Path) -> None:
        """A destination that dies in the middle of precopy costs nothing but the work done: another one at its address
        gets the machine, which has run on."""
        dest = side("dest", "--json", "--listen", "127.0.0.1:0")
        slowly = ("--precopy", "auto", "--max-bandwidth", "1MiB/s", "--control", tmp_path / "s")
        source = side(*KVM, "--workload", "random", "--connect", dest.address, "--migrate-after", "0", *slowly)
        ram = source.wait_for("rounds", lambda line: (line.get("ram") or {}).get("iteration"))["ram"]
        assert 0 < ram["remaining"] < ram["total"]
        dest.signal(signal.SIGKILL)
        again = source.wait_for("another attempt", lambda line: line.get("attempts", 1) > 1 and "guest" in line)
        source.operations_after(again)
        last = side("dest", "--json", "--listen", dest.address, "--run-for", "0.1")
        source.wait_for("rounds", lambda line: line.get("attempts", 1) > 1 and (line.get("ram") or {}).get("iteration"))
        operator("s").ask("set", "--max-bandwidth", "none")
        for one in (last, source):
            status, result, errors = one.end()
            assert status == 0, errors
            assert result["status"] == "completed"
        assert last.end()[1]["verified"] is True
        assert result["attempts"] > 1
        assert "begun again" in errors
        assert len(source.events("migration-ended")) == 1
        told = source.events("timeline")  # of the one that was lost, and of the one that came about
        assert [(line["attempts"], line["status"]) for line in (told[0], told[-1])] == [
            (1, "failed"),
            (result["attempts"], "completed"),
        ]
        assert all(line["recording"]["series"]["precopied"][-1] for line in (told[0], told[-1]))

    def source_killed_in_a_round(self, side: Start, *options: str) -> tuple[Any, Any]:
        """And a destination that calls it."""
        slowly = ("--precopy", "auto", "--max-bandwidth", "1MiB/s", "--migrate-after", "0")
        source = side(*KVM, "--workload", "random", "--listen", "127.0.0.1:0", *slowly)
        dest = side("dest", "--json", "--connect", source.address, *options)
        source.wait_for("rounds", lambda line: (line.get("ram") or {}).get("iteration"))
        source.signal(signal.SIGKILL)
        return source, dest

    def test_called_again(self, side: Start) -> None:
        """The same by a destination that calls: each attempt is told, and that it has ended only once."""
        source, dest = self.source_killed_in_a_round(side, "--run-for", "0.1")
        dest.wait_for_errors("which is called again")
        last = side(*KVM, "--workload", "random", "--listen", source.address, "--migrate-after", "0")
        for one in (dest, last):
            status, _, errors = one.end()
            assert status == 0, errors
        assert [line["status"] for line in dest.events("migration-ended")] == ["completed"]
        told = dest.events("timeline")
        assert [line["status"] for line in (told[0], told[-1])] == ["failed", "completed"]

    def test_called_in_vain(self, side: Start) -> None:
        """Its source does not come back: the migration has ended all the same."""
        _, dest = self.source_killed_in_a_round(side, "--recover-for", "0.3")
        status, result, errors = dest.end()
        assert (status, result["status"]) == (1, "failed"), errors
        assert "not reached again" in result["error"]
        for event in ("timeline", "migration-ended"):
            assert [line["status"] for line in dest.events(event)] == ["failed"]

    def test_kept_when_it_is_not_reached_again(self, side: Start) -> None:
        """The destination dies for good in the rounds of precopy: when the time is over, the machine runs on."""
        dest = side("dest", "--json", "--listen", "127.0.0.1:0")
        slowly = ("--precopy", "auto", "--max-bandwidth", "1MiB/s", "--recover-for", "0.3", "--migrate-after", "0")
        source = side(*KVM, "--workload", "random", "--connect", dest.address, *slowly)
        source.wait_for("rounds", lambda line: (line.get("ram") or {}).get("iteration"))
        dest.signal(signal.SIGKILL)
        failed = source.wait_for("failure", lambda line: line["event"] == "migration-ended")
        assert failed["attempts"] > 1
        source.wait_for_errors("the machine goes on here until interrupted")
        source.operations_after(source.wait_status("failed"))
        # Between two attempts it had not failed.
        told = [line["status"] for line in source.lines if line["event"] == "progress" and "attempts" in line]
        assert set(told[told.index("failed") :]) == {"failed"}
        source.signal(signal.SIGTERM)
        assert source.end()[0] == 1

    @pytest.mark.parametrize(("mode", "library"), [("precopy", "zstd"), ("stop-and-copy", "lz4")])
    def test_modes_without_postcopy(self, side: Start, mode: str, library: str) -> None:
        """Compressed with one library each, where that is installed."""
        compress = library if library in compression.names(compression.available()) else "off"
        machine = ("--memory", "16MiB", "--workload", "dirty", "--used-memory", "4MiB")
        arguments = (*machine, "--migrate-after", "0.1", "--run-for", "0.1", "--mode", mode, "--compress", compress)
        status, result, errors = side("demo", "--json", *arguments).end(100)
        assert status == 0, errors
        assert (result["verified"], result["mode"]) == (True, mode)
        ram = result["ram"]
        assert ram["postcopy-requests"] == ram["demand-pages"] == 0
        assert ram["background-pages"] * ram["page-size"] > 4 * MIB
        if compress == "off":
            assert ram["precopy-bytes"] > 4 * MIB
        else:
            assert 0 < ram["compressed-bytes"] < ram["precopy-bytes"] < ram["uncompressed-bytes"]
        assert ram["postcopy-bytes"] < ram["page-size"]  # nothing but the end of the push
        assert bool(ram["iteration"]) is (mode == "precopy")
        assert {"stop", "state", "send", "prepared", "commit", "load"} <= result["downtime-breakdown-us"].keys()

    def test_precopy_saves_requests(self, side: Start) -> None:
        """What the machine has written since the last round fits the downtime that is allowed, however slow the host:
        so no page is missing when it goes on. Without precopy it goes on before any has come."""
        machine = ("--memory", "16MiB", "--workload", "dirty", "--used-memory", "4MiB", "--max-bandwidth", "16MiB/s")
        requests = []
        for precopy in (("auto", "--max-downtime", "1min"), ("off",)):
            arguments = (*machine, "--migrate-after", "0.1", "--run-for", "0.1", "--precopy", *precopy)
            status, result, errors = side("demo", "--json", *arguments).end(100)
            assert status == 0, errors
            assert result["verified"] is True
            requests.append(result["ram"]["postcopy-requests"])
        assert requests[0] < requests[1]

    def test_destinations_killed_at_random_instants(self, side: Start) -> None:
        """Whenever its destination dies, the machine is computing at the source, or belongs to the dead and says so."""
        seed = int(os.environ.get("POSTCOPY_SEED", "0"), 0) or secrets.randbits(32)
        print(f"POSTCOPY_SEED={seed}")
        instants = random.Random(seed)
        arguments = (
            "--workload",
            "random",
            "--used-memory",
            "8MiB",
            "--migrate-after",
            "2",
            "--max-bandwidth",
            "1MiB/s",
        )
        source = side(*KVM, *arguments, "--listen", "127.0.0.1:0")
        address = source.address
        for attempt in range(8):
            began = source.lines[-1]["elapsed-ms"]
            victim = side("dest", "--json", "--connect", address)
            if attempt % 2:
                # From here on everything happens within some ten milliseconds: aim at them.
                source.wait_for(
                    "it", lambda line, after=began: line["elapsed-ms"] > after and line.get("status") == "active"
                )
                time.sleep(instants.uniform(0, 0.01))
            else:
                time.sleep(instants.uniform(0, 0.8))
            victim.signal(signal.SIGKILL)
            victim.end()
            now = source.wait_for(
                "what became of it",
                lambda line, after=source.lines[-1]["elapsed-ms"]: (
                    line["elapsed-ms"] >= after  # what does not change is not said again
                    and line["event"] != "migration-status"
                    and line["status"] in ("failed", "setup", "postcopy-paused", "completed")
                ),
            )
            assert now["status"] != "completed"  # which takes eight seconds at this bandwidth
            if now["status"] == "postcopy-paused":
                assert now["guest"]["state"] == "paused"
                source.abandon()
                status, result, errors = source.end()
                assert (status, result["status"]) == (1, "postcopy-paused")
                assert result["guest"]["operations"] == result["guest-at-pause"]["operations"]
                return
            # It was before the point of no return: the source says why, if it had met the destination, and goes on.
            running = source.wait_for(
                "running",
                lambda line, after=now["elapsed-ms"]: (
                    line["event"] == "progress" and line["elapsed-ms"] >= after and line["guest"]["state"] == "running"
                ),
            )
            source.operations_after(running)
            # One for each destination that met it; the end of one may be noticed when the next one is there.
            assert len(source.events("migration-ended")) <= attempt + 1
        last = side("dest", "--json", "--connect", address, "--run-for", "0.1")
        status, result, errors = last.end()
        assert status == 0, errors
        assert result["verified"] is True
        assert source.end()[0] == 0

    def test_interrupted_destination_then_another(self, side: Start) -> None:
        """A destination that gives up says why; the source listens on, and the next one gets the machine."""
        source = side(*KVM, "--workload", "random", "--listen", "127.0.0.1:0", "--migrate-after", "2")
        address = source.address
        first = side("dest", "--json", "--connect", address)
        source.wait_status("active")
        second = side("dest", "--json", "--connect", address)
        status, result, _ = second.end()
        assert status == 1
        assert "busy with another destination" in result["error"]
        first.signal(signal.SIGINT)
        status, result, _ = first.end()
        assert status == 1
        assert result["status"] == "cancelled"
        failed = source.wait_for("failure", lambda line: line["event"] == "migration-ended")
        assert "the destination aborted: interrupted at the destination" in failed["error"]
        third = side("dest", "--json", "--connect", address, "--run-for", "0.2")
        status, result, errors = third.end()
        assert status == 0, errors
        assert result["verified"] is True
        assert source.end()[0] == 0

    def test_interrupted_source_before_commit(self, side: Start) -> None:
        dest = side("dest", "--json", "--listen", "127.0.0.1:0")
        source = side(*KVM, "--connect", dest.address, "--migrate-after", "60")
        source.wait_status("active")
        source.signal(signal.SIGINT)
        status, result, errors = source.end()
        assert status == 1
        assert result["status"] == "cancelled"
        dest.wait_for_errors("waiting for the next one")
        dest.signal(signal.SIGTERM)
        status, result, errors = dest.end()
        assert status == 1
        assert "the source aborted: interrupted at the source" in result["error"]
        assert errors.count("postcopy: error:") == 1

    @pytest.mark.parametrize("victim", ["source", "dest"])
    def test_peer_lost_after_commit(self, side: Start, slow_way: Callable[[str], str], victim: str) -> None:
        """Each side says paused and keeps what it has; the machine never runs at the source again."""
        dest = side("dest", "--json", "--listen", "127.0.0.1:0")
        arguments = ("--workload", "random", "--used-memory", "24MiB")
        source = side(*KVM, *arguments, "--connect", slow_way(dest.address))
        dest.wait_status("postcopy-active")
        source.wait_status("postcopy-active")
        lost, left = (source, dest) if victim == "source" else (dest, source)
        lost.signal(signal.SIGKILL)
        paused = left.wait_status("postcopy-paused")
        if victim == "dest":
            assert paused["guest"]["state"] == "paused"
        left.abandon()
        status, result, errors = left.end()
        assert status == 1
        assert result["status"] == "postcopy-paused"
        assert "PAUSED" in errors
        if victim == "dest":
            assert result["guest"]["operations"] == result["guest-at-pause"]["operations"]

    @pytest.mark.parametrize("victim", ["source", "dest"])
    @pytest.mark.parametrize("listening", ["source", "dest"])
    def test_frozen_peer(self, side: Start, victim: str, listening: str) -> None:
        """One that gives no sign of life is lost, on either side; when it wakes up both go on, and nothing was lost."""
        arguments = ("--workload", "random", "--used-memory", "16MiB", "--max-bandwidth", "2MiB/s")
        calls = {"source": (*KVM, *arguments), "dest": ("dest", "--json", "--run-for", "0.5")}
        calling = "dest" if listening == "source" else "source"
        sides = {listening: side(*calls[listening], "--heartbeat", "0.2", "--listen", "127.0.0.1:0")}
        sides[calling] = side(*calls[calling], "--heartbeat", "0.2", "--connect", sides[listening].address)
        other = "dest" if victim == "source" else "source"
        for one in sides.values():
            one.wait_status("postcopy-active")
        sides[victim].signal(signal.SIGSTOP)
        sides[other].wait_status("postcopy-paused")
        sides[victim].signal(signal.SIGCONT)
        for one in sides.values():
            status, result, errors = one.end()
            assert status == 0, errors
            assert result["status"] == "completed"
            assert result["recoveries"]["count"] >= 1
            assert "PAUSED" in errors
        assert sides["dest"].end()[1]["verified"] is True

    @pytest.mark.parametrize("policy", ["hold", "kill"])
    def test_source_lost_for_good(self, side: Start, slow_way: Callable[[str], str], policy: str) -> None:
        """A machine whose missing pages are nowhere any more is kept for an operator, or ended, as `--on-lost` says."""
        arguments = ("--workload", "random", "--used-memory", "24MiB")
        dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--recover-for", "0.3", "--on-lost", policy)
        source = side(*KVM, *arguments, "--connect", slow_way(dest.address))
        source.wait_status("postcopy-active")
        dest.wait_status("postcopy-active")
        source.signal(signal.SIGKILL)
        if policy == "hold":
            dest.wait_for_errors("the source is lost for good")
            dest.abandon()
        status, result, errors = dest.end()
        assert (status, result["status"]) == (1, "postcopy-paused")
        assert result["ram"]["remaining"] > 0
        assert "the source is lost for good" in errors

    def test_peer_that_never_comes_back(self, side: Start, slow_way: Callable[[str], str]) -> None:
        """Who has been given up is not waited for by a program either, and the machine's memory is kept."""
        arguments = ("--workload", "random", "--used-memory", "24MiB")
        dest = side("dest", "--json", "--listen", "127.0.0.1:0")
        source = side(*KVM, *arguments, "--connect", slow_way(dest.address), "--recover-for", "0.5")
        source.wait_status("postcopy-active")
        dest.signal(signal.SIGKILL)
        source.wait_status("postcopy-paused")
        source.abandon()
        status, result, _ = source.end()
        assert (status, result["status"]) == (1, "postcopy-paused")
        assert result["recoveries"]["count"] == 0


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("garbage", [b"", b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b"postcpy\x02\xff\xff\xff\xff"])
def test_garbage_at_a_listening_port(side: Start, image: Path, garbage: bytes) -> None:
    source = side("source", "--json", "--machine", "image", "--image", image, "--listen", "127.0.0.1:0")
    host, _, port = source.address.rpartition(":")
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=20) as peer:
            peer.sendall(garbage)
            with contextlib.suppress(OSError):  # it may be refused, and reset, at any point from here on
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(1000):
                    pass
    assert side("dest", "--json", "--connect", source.address).end()[0] == 0
    assert source.end()[0] == 0


def test_random_bytes_from_a_listening_port(side: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        dest = side("dest", "--json", "--connect", f"127.0.0.1:{server.getsockname()[1]}")
        peer, _ = server.accept()
        with peer:
            peer.sendall(os.urandom(4096))
            status, result, errors = dest.end()
    assert status == 1
    assert result["status"] == "failed"
    assert "not a postcopy peer" in errors
