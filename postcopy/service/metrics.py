# SPDX-License-Identifier: Apache-2.0
"""What is counted, for Prometheus (docs/operating.md lists the names).

Base units (seconds, bytes), counters end in ``_total``. The counters of a migration begin at 0 with each migration of a
machine, which Prometheus takes for the restart that it is. Labels are few and bounded: the machine's name, the
direction, and words of this package; a migration's id is not among them, since every one would leave a series behind.

A migration is often shorter than the time between two scrapes. So there is also a file, written when one ends, for the
textfile collector of the node exporter.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import trio
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from postcopy import __version__
from postcopy._blocking import Workers
from postcopy._files import check_new_file, replacing, write_all
from postcopy.errors import ConfigurationError, PostcopyError, ResourceError
from postcopy.machines import Machine
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.statistics import Recoveries, Statistics, figures, shown
from postcopy.service import report
from postcopy.service.report import Migration

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATUSES = (
    "connecting", "setup", "active", "in-doubt", "postcopy-active", "postcopy-paused", "postcopy-recover",
    "postcopy-failed", "completed", "failed", "cancelled", "reclaimed",
)  # fmt: skip
ENDS = ("completed", "failed", "cancelled", "reclaimed", "in-doubt", "postcopy-paused", "postcopy-failed")
"""Those that a migration may have when its process gives it up."""
_FIRST_EXPONENT, _LAST_EXPONENT = 13, 34  # 8 µs to 17 s, doubling

log = logging.getLogger(__name__)

Machines = Callable[[], Iterable[tuple[str, Machine | None, Migration | None]]]


class Metrics(Collector):
    """Looks at the machines whenever it is asked."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._ended: Counter[tuple[str, str]] = Counter()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def ended(self, direction: str, status: str) -> None:
        """Counts a migration that has ended."""
        self._ended[direction, status if status in STATUSES else "failed"] += 1

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        info = GaugeMetricFamily("postcopy_build_info", "Always 1; the version is a label.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        ended = CounterMetricFamily(
            "postcopy_migrations", "Migrations that have ended in this process.", labels=["direction", "status"]
        )
        for direction in ("incoming", "outgoing"):
            for status in ENDS:
                ended.add_metric([direction, status], self._ended[direction, status])
        yield ended
        items = list(self._machines())
        yield from _machines(items)
        yield from _migrations([(name, job) for name, _, job in items if job is not None])


def _machines(items: list[tuple[str, Machine | None, Migration | None]]) -> Iterator[Metric]:
    memory = GaugeMetricFamily("postcopy_machine_memory_bytes", "Memory of a machine.", labels=["machine"])
    operations = CounterMetricFamily(
        "postcopy_guest_operations", "Operations of the guest; the count moves with it.", labels=["machine"]
    )
    failures = CounterMetricFamily("postcopy_guest_failures", "Failures that the guest reported.", labels=["machine"])
    seen = set()
    for name, machine, _ in items:
        if machine is None or name in seen:  # several destinations of one image
            continue
        seen.add(name)
        memory.add_metric([name], machine.memory_bytes)
        if machine.live:
            try:
                statistics = machine.statistics()
            except trio.ClosedResourceError:
                continue
            operations.add_metric([name], statistics.operations)
            failures.add_metric([name], statistics.failures)
    yield from (memory, operations, failures)


def _migrations(jobs: list[tuple[str, Migration]]) -> Iterator[Metric]:
    prefix, labels = "postcopy_migration_", ["machine", "direction"]
    text = "1 for the status that the migration has, 0 for the others."
    status = GaugeMetricFamily(prefix + "status", text, labels=[*labels, "status"])
    text = "How long a vCPU has waited for pages."
    blocked = CounterMetricFamily(prefix + "vcpu_blocked_seconds", text, labels=[*labels, "vcpu"])
    text = "Of demand faults, event read until thread woken."
    latency = HistogramMetricFamily(prefix + "fault_latency_seconds", text, labels=labels)
    counted: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for figure in (*figures(Statistics), *figures(Recoveries)):
        if figure.metric:
            family = CounterMetricFamily if figure.counter else GaugeMetricFamily
            kind = ["kind"] if figure.kind else []
            counted[figure.metric] = family(prefix + figure.metric, figure.help, labels=[*labels, *kind])
    seen = set()
    for name, job in jobs:
        key = [name, report.direction(job)]
        if tuple(key) in seen:  # several destinations of one image
            continue
        seen.add(tuple(key))
        for word in STATUSES:
            status.add_metric([*key, word], word == job.status)
        statistics = job.statistics()
        for figure, value in (*shown(statistics), *shown(job.recoveries)):
            if figure.metric:
                kind = [figure.kind] if figure.kind else []
                seconds = figure.metric.endswith("_seconds")
                counted[figure.metric].add_metric([*key, *kind], value / 1e9 if seconds else value)
        if isinstance(job, DestinationMigration):
            for vcpu, blocked_ns in enumerate(statistics.blocktime_ns):
                blocked.add_metric([*key, str(vcpu)], blocked_ns / 1e9)
            buckets: list[tuple[str, float]] = [
                (f"{(1 << exponent) / 1e9:g}", job.latency.below(exponent))
                for exponent in range(_FIRST_EXPONENT, _LAST_EXPONENT + 1)
            ]
            # The count is that of the buckets: a value may have been added while they were read.
            everything = max(job.latency.count, int(buckets[-1][1]))
            latency.add_metric(key, [*buckets, ("+Inf", everything)], sum_value=job.latency.sum_ns / 1e9)
    yield from (status, *counted.values(), blocked, latency)


def check_file(path: str) -> None:
    """`ConfigurationError` when no metrics could be written there: to be found out at the beginning."""
    if not path.endswith(".prom"):
        raise ConfigurationError(f"--metrics-file {path}: the textfile collector reads names that end in .prom")
    check_new_file("--metrics-file", path)


class MetricsFile:
    """A file with the metrics as they were last. A file system may hang: only one thread waits for it, which
    writes what is the latest when it comes to it."""

    END_S = 5.0
    """How long the end waits for it."""

    def __init__(self, path: str) -> None:
        """`ConfigurationError` when nothing could be written there, `ResourceError` when there is no thread."""
        check_file(path)
        self._path = path
        self._workers = Workers.open(1, "pc-metrics", "writing --metrics-file")
        self._page: bytes | None = None
        self._changed = trio.Event()

    def put(self, page: bytes) -> None:
        """Has it written, soon. Never blocks."""
        self._page = page
        self._changed.set()

    async def run(self) -> None:
        """Writes, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            await self._write()

    async def close(self) -> None:
        """After `run`: what is not written yet, and the end of the thread. Shielded, bounded."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self.END_S) as scope:
            await self._write()
        await self._workers.close(0 if scope.cancelled_caught else 1)
        if scope.cancelled_caught:
            log.error("--metrics-file %s: not written within %g s", self._path, self.END_S)

    async def _write(self) -> None:
        try:
            await self._workers.run(self._write_latest, abandon_on_cancel=True)
        except PostcopyError as error:
            log.error("%s", error)

    def _write_latest(self) -> None:
        """In the thread."""
        page, self._page = self._page, None
        if page is not None:
            write_file(self._path, page)


def write_file(path: str, page: bytes) -> None:
    """The whole file appears or none. Blocks on I/O. `ResourceError` when it cannot."""
    try:
        with replacing(path, 0o644, durable=False) as fd:  # another user's node exporter reads it
            write_all(fd, page)
    except OSError as error:
        raise ResourceError(f"--metrics-file {path}: {error.strerror}") from error
