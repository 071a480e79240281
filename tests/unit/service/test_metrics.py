# SPDX-License-Identifier: Apache-2.0
"""Metrics: the text, the file, the server that a scrape talks to; and systemd's notifications."""

from __future__ import annotations

import os
import re
import socket
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from postcopy import __version__
from postcopy.dataplane.histogram import Histogram
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.machines import Activity, Machine, MachineState, MachineStatistics, VcpuStatistics
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.engine import STATUS
from postcopy.migration.precopy import Mode
from postcopy.migration.source import SourceMigration
from postcopy.migration.statistics import Breakdown, Recoveries, Statistics
from postcopy.net import Address
from postcopy.records.control import Certificate
from postcopy.records.migration import STATUSES
from postcopy.service import http as http_module
from postcopy.service import metrics as metrics_module
from postcopy.service import report
from postcopy.service.http import HttpServer, parse_metrics_address
from postcopy.service.metrics import CONTENT_TYPE, Metrics, MetricsFile, check_file, write_file
from postcopy.service.notify import Notifier
from postcopy.tls import PeerCertificate
from postcopy.wire import State

MIB = 1 << 20


def _machine() -> Mock:
    machine = Mock(spec=Machine, outlives=False)
    machine.live, machine.kind, machine.network = True, "kvm", None
    machine.memory_bytes = 64 * MIB
    vcpu = VcpuStatistics(tid=1, activity=Activity.GUEST, exits=1, reports=2, operations=700, failures=0)
    machine.statistics.return_value = MachineStatistics(MachineState.RUNNING, vcpus=(vcpu,), failures=0)
    return machine


def _source(machine: Mock) -> Mock:
    job = Mock(spec=SourceMigration)
    job.identity, job.certificate = "192.0.2.7", None
    job.machine, job.migration_id, job.peer, job.failure = machine, "ff", "192.0.2.7:7777", None
    job.started_ns = job.completed_ns = job.ended_ns = 0
    job.status = "postcopy-active"
    job.recoveries, job.attempt, job.mode = Recoveries(), 1, Mode.HYBRID
    job.breakdown = Breakdown(stop_ns=90_000, first_run_ns=4_000)
    job.statistics.return_value = Statistics(
        downtime_ns=12_000_000, total_ns=0, total_bytes=64 * MIB, transferred_bytes=4192, page_bytes=4096,
        demand_pages=10, background_pages=50, zero_pages=40, requests=11, released_bytes=8192,
        iteration=3, dirty_sync_count=4, dirty_pages_rate=500, precopy_bytes=7000, postcopy_bytes=0,
    )  # fmt: skip
    return job


def _dest(machine: Mock) -> Mock:
    job = Mock(spec=DestinationMigration)
    job.identity = "host-a"
    job.certificate = PeerCertificate("CN=host-a", (("dns", "host-a"),), 2_000_000_000, "ab", "AES", True)
    job.machine, job.migration_id, job.peer, job.failure = machine, "ff", "192.0.2.7:7777", None
    job.started_ns = job.completed_ns = job.ended_ns = 0
    job.status = "completed"
    job.recoveries, job.attempt = Recoveries(2, 5, 9, 500_000_000), 1
    job.breakdown = Breakdown()
    job.latency = Histogram()
    for ns in (1000, 20_000, 70_000, 70_000, 2_000_000_000):
        job.latency.add(ns)
    job.statistics.return_value = Statistics(
        downtime_ns=12_000_000, total_ns=3_000_000_000,
        total_bytes=64 * MIB, resident_bytes=63 * MIB, transferred_bytes=9000, page_bytes=4096, demand_pages=5,
        background_pages=7, zero_pages=11, duplicate_pages=1, requests=6, pending_faults=3,
        blocktime_ns=(1, 2_000_000_000),
    )  # fmt: skip
    return job


def _samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """As Prometheus itself would read it; a duplicate fails."""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, key
            samples[key] = sample.value
    return samples


def _key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


class TestText:
    def test_nothing_there(self) -> None:
        samples = _samples(Metrics(list).text())
        assert samples[_key("postcopy_build_info", version=__version__)] == 1
        assert samples[_key("postcopy_migrations_total", direction="incoming", status="completed")] == 0

    def test_certificates_of_the_process(self) -> None:
        certificates = [Certificate(role="server", file="server-cert.pem", expires_at=1_900_000_000)]
        samples = _samples(Metrics(list, lambda: certificates).text())
        assert samples[_key("postcopy_certificate_expiry_timestamp_seconds", role="server")] == 1.9e9

    def test_numbers(self) -> None:
        machine = _machine()
        metrics = Metrics(lambda: [("a", machine, _source(machine)), ("b", machine, _dest(machine)), ("c", None, None)])
        metrics.ended("outgoing", "completed")
        metrics.ended("outgoing", "completed")
        metrics.ended("incoming", "a word that is none")
        samples = _samples(metrics.text())
        out, into = {"machine": "a", "direction": "outgoing"}, {"machine": "b", "direction": "incoming"}
        prefix = "postcopy_migration_"
        for key, value in {
            _key("postcopy_migrations_total", direction="outgoing", status="completed"): 2,
            _key("postcopy_migrations_total", direction="incoming", status="failed"): 1,
            _key("postcopy_machine_memory_bytes", machine="a"): 64 * MIB,
            _key("postcopy_guest_operations_total", machine="b"): 700,
            _key("postcopy_guest_failures_total", machine="b"): 0,
            _key(prefix + "encrypted", **out): 0,
            _key(prefix + "encrypted", **into): 1,
            _key(prefix + "tls_resumed", **into): 1,
            _key(prefix + "peer_certificate_expiry_timestamp_seconds", **into): 2e9,
            _key(prefix + "status", status="postcopy-active", **out): 1,
            _key(prefix + "status", status="completed", **out): 0,
            _key(prefix + "transferred_bytes_total", **out): 4192,
            _key(prefix + "released_bytes", **out): 8192,
            _key(prefix + "precopy_rounds", **out): 3,
            _key(prefix + "dirty_syncs_total", **out): 4,
            _key(prefix + "dirty_pages_per_second", **out): 500,
            _key(prefix + "sent_bytes_total", phase="precopy", **out): 7000,
            _key(prefix + "sent_bytes_total", phase="postcopy", **out): 0,
            _key(prefix + "downtime_part_seconds", part="stop", **out): 90e-6,
            _key(prefix + "downtime_part_seconds", part="first-run", **out): 4e-6,
            _key(prefix + "pages_total", kind="background", **out): 50,
            _key(prefix + "pages_total", kind="duplicate", **into): 1,
            _key(prefix + "remaining_bytes", **into): MIB,
            _key(prefix + "blocked_threads", **into): 3,
            _key(prefix + "vcpu_blocked_seconds_total", vcpu="1", **into): 2,
            _key(prefix + "downtime_seconds", **into): 0.012,
            _key(prefix + "duration_seconds", **into): 3,
            _key(prefix + "recoveries_total", **into): 2,
            _key(prefix + "recovery_seconds_total", **into): 0.5,
            _key(prefix + "fault_latency_seconds_count", **into): 5,
            _key(prefix + "fault_latency_seconds_bucket", le="8.192e-06", **into): 1,
            _key(prefix + "fault_latency_seconds_bucket", le="6.5536e-05", **into): 2,
            _key(prefix + "fault_latency_seconds_bucket", le="0.000131072", **into): 4,
            _key(prefix + "fault_latency_seconds_bucket", le="+Inf", **into): 5,
        }.items():
            assert samples[key] == pytest.approx(value), key
        assert _key(prefix + "remaining_bytes", **out) not in samples  # a source does not know it yet
        for (name, labels), value in samples.items():
            assert value >= 0, name
            if name.startswith("postcopy_"):
                assert re.fullmatch(r"[a-z_]+", name)
                assert not {"id", "migration"} & {label for label, _ in labels}

    def test_closed_machine_and_several_destinations_of_one(self) -> None:
        machine = _machine()
        machine.statistics.side_effect = trio.ClosedResourceError
        text = Metrics(lambda: [("a", machine, _source(machine)), ("a", machine, _source(machine))]).text()
        assert _key("postcopy_guest_operations_total", machine="a") not in _samples(text)

    def test_numbers_of_several_destinations_are_not_mixed(self) -> None:
        """What is said of an image is one of its migrations, whole."""
        machine = _machine()
        running, ended = _source(machine), _source(machine)
        ended.statistics.return_value = Statistics(total_bytes=64 * MIB, resident_bytes=64 * MIB, transferred_bytes=7)
        labels = {"machine": "a", "direction": "outgoing"}
        samples = _samples(Metrics(lambda: [("a", machine, running), ("a", machine, ended)]).text())
        assert samples[_key("postcopy_migration_transferred_bytes_total", **labels)] == 4192
        assert _key("postcopy_migration_remaining_bytes", **labels) not in samples

    def test_elapsed_time_ends_with_the_migration(self) -> None:
        """Also of one that has failed, whose machine stays."""
        job = _source(_machine())
        job.started_ns, job.ended_ns, job.status = 1_000_000, 5_000_000, "failed"
        status = report.machine_status("a", job.machine, job)
        assert status.migration is not None
        assert status.migration.elapsed_ms == 4

    def test_histogram_edges(self) -> None:
        histogram = Histogram()
        for exponent in range(5, 64):
            histogram.add((1 << exponent) - 1)
            histogram.add(1 << exponent)
        assert [histogram.below(exponent) for exponent in range(5, 64)] == [2 * n + 1 for n in range(59)]
        with pytest.raises(ValueError, match="no bucket"):
            histogram.below(4)


class TestFile:
    def test_whole_or_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "postcopy.prom"
        metrics = Metrics(list)
        check_file(str(path))
        write_file(str(path), metrics.text())
        write_file(str(path), metrics.text())
        assert _samples(path.read_bytes())
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert [file.name for file in tmp_path.iterdir()] == ["postcopy.prom"]
        with pytest.raises(ResourceError):
            write_file(str(tmp_path / "no" / "x.prom"), metrics.text())

    async def test_a_file_system_that_hangs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nobody waits for it, and the end only for a time."""
        written: list[bytes] = []
        hanging, begun = threading.Semaphore(0), trio.Event()
        token = trio.lowlevel.current_trio_token()

        def write(path: str, page: bytes) -> None:
            token.run_sync_soon(begun.set)
            assert hanging.acquire(timeout=30)
            written.append(page)

        monkeypatch.setattr(metrics_module, "write_file", write)
        file = MetricsFile(str(tmp_path / "x.prom"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.run)
            file.put(b"1")
            await begun.wait()
            for page in (b"2", b"3"):
                file.put(page)
            nursery.cancel_scope.cancel()
        monkeypatch.setattr(file, "END_S", 0.05)
        await file.close()
        assert "not written within" in caplog.text
        assert not written
        hanging.release()
        hanging.release()

    async def test_the_last_one_is_written_at_the_end(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "x.prom"
        file = MetricsFile(str(path))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.run)
            for number in range(20):
                file.put(b"%d" % number)
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        await file.close()
        assert path.read_bytes() == b"19"
        assert not caplog.text

    @pytest.mark.parametrize("name", ["x.txt", "no/x.prom", "d.prom"])
    def test_what_cannot_be_written(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "d.prom").mkdir()
        with pytest.raises(ConfigurationError, match="--metrics-file"):
            check_file(str(tmp_path / name))


@asynccontextmanager
async def _http() -> AsyncIterator[Address]:
    server = await HttpServer.open(Address("127.0.0.1", 0), "/metrics", CONTENT_TYPE, Metrics(list).text)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve)
        yield server.addresses[0]
        nursery.cancel_scope.cancel()


async def _talk(address: Address, *requests: bytes) -> bytes:
    """All that comes until the server hangs up."""
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        for request in requests:
            await stream.send_all(request)
        answer = b""
        with trio.fail_after(10):
            while data := await stream.receive_some(65536):
                answer += data
        return answer


class TestHttp:
    async def test_scrape(self) -> None:
        async with _http() as address:
            answer = await _talk(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert CONTENT_TYPE.encode() in head
        assert _samples(body)

    @pytest.mark.parametrize(
        ("request_line", "status"),
        [
            (b"GET /metrics?x=1 HTTP/1.1", 200),
            (b"HEAD /metrics HTTP/1.1", 200),
            (b"GET / HTTP/1.1", 404),
            (b"HEAD / HTTP/1.1", 404),
            (b"POST /metrics HTTP/1.1", 405),
            (b"GET /metrics HTTP/1.0", 200),
            (b"nonsense", 400),
        ],
    )
    async def test_requests(self, request_line: bytes, status: int) -> None:
        async with _http() as address:
            answer = await _talk(address, request_line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        if request_line.startswith(b"HEAD"):
            assert answer.endswith(b"\r\n\r\n")

    async def test_one_connection_for_several(self) -> None:
        async with _http() as address:
            request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
            answer = await _talk(address, request, request, request.replace(b"Host", b"Connection: close\r\nHost"))
        assert answer.count(b"HTTP/1.1 200") == 3

    async def test_endless_header(self) -> None:
        async with _http() as address, await trio.open_tcp_stream(address.host, address.port) as stream:
            answer = b""
            with trio.fail_after(10):
                try:
                    await stream.send_all(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 1_000_000)
                    while data := await stream.receive_some(65536):
                        answer += data
                except trio.BrokenResourceError:
                    pass
            assert b" 200 " not in answer
            assert (await _talk(address, b"GET /metrics HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200")

    async def test_idle_connections_take_nobodys_place_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_module, "MAX_CONNECTIONS", 1)
        monkeypatch.setattr(http_module, "IDLE_TIMEOUT_S", 0.05)
        async with _http() as address:
            assert await _talk(address) == b""
            with trio.fail_after(10):
                while not await _talk(address, b"GET /metrics HTTP/1.0\r\n\r\n"):
                    pass

    async def test_port_in_use(self) -> None:
        async with _http() as address:
            with pytest.raises(ResourceError, match="--metrics"):
                await HttpServer.open(address, "/metrics", CONTENT_TYPE, bytes)

    def test_addresses(self) -> None:
        assert parse_metrics_address(":9000") == Address("127.0.0.1", 9000)
        assert parse_metrics_address("*:9000") == Address("", 9000)
        with pytest.raises(ConfigurationError):
            parse_metrics_address("9000")


class TestNotify:
    @pytest.mark.parametrize("abstract", [False, True])
    def test_words(self, tmp_path: Path, abstract: bool) -> None:
        name = f"@postcopy-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(name.replace("@", "\0", 1))
            manager.setblocking(False)
            notifier = Notifier({"NOTIFY_SOCKET": name})
            notifier.ready()
            notifier.ready()
            notifier.status("one\nREADY=0")
            notifier.stopping()
            notifier.close()
            notifier.status("too late")
            words = []
            while True:
                try:
                    words.append(manager.recv(4096))
                except BlockingIOError:
                    break
        assert words == [b"READY=1", b"STATUS=one READY=0", b"STOPPING=1"]

    @pytest.mark.parametrize("value", [None, "", "relative", "/no/such/socket"])
    def test_nobody(self, value: str | None) -> None:
        notifier = Notifier({} if value is None else {"NOTIFY_SOCKET": value})
        notifier.ready()
        notifier.close()

    def test_a_manager_that_does_not_read(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
            for _ in range(10_000):
                notifier.status("x" * 200)
            notifier.close()


def test_every_status_has_a_series() -> None:
    words = {STATUS.get(state, state.value) for state in State} - {State.ABORTED.value}
    assert words | {"connecting", "postcopy-failed", "failed", "cancelled"} == set(STATUSES)
