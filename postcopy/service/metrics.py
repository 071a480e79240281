# SPDX-License-Identifier: Apache-2.0
"""What is counted, for Prometheus. Names, types and help are those of the records (`postcopy.records.figures`).

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
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from postcopy import __version__
from postcopy._blocking import Workers
from postcopy._files import check_new_file, replacing, write_all
from postcopy.dataplane.histogram import Histogram
from postcopy.errors import ConfigurationError, PostcopyError, ResourceError
from postcopy.machines import Machine as AnyMachine
from postcopy.migration.destination import DestinationMigration
from postcopy.records import Record
from postcopy.records.control import Certificate
from postcopy.records.figures import OF_PROCESS, Metric, figures, metrics
from postcopy.records.migration import STATUSES, Machine
from postcopy.records.migration import Migration as MigrationRecord
from postcopy.service import report
from postcopy.service.report import Migration

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ENDS = ("completed", "failed", "cancelled", "reclaimed", "in-doubt", "postcopy-paused", "postcopy-failed")
"""Those that a migration may have when its process gives it up."""
_FIRST_EXPONENT, _LAST_EXPONENT = 13, 34  # 8 µs to 17 s, doubling

log = logging.getLogger(__name__)

Family = CounterMetricFamily | GaugeMetricFamily

Machines = Callable[[], Iterable[tuple[str, AnyMachine | None, Migration | None]]]


class Metrics(Collector):
    """Looks at the machines whenever it is asked."""

    def __init__(
        self,
        machines: Machines,
        certificates: Callable[[], Iterable[Certificate]] = tuple,
        unauthorised: Callable[[], int] = int,
    ) -> None:
        """`certificates`: those of this process; `unauthorised`: how many connections it has refused for that."""
        self._machines = machines
        self._certificates = certificates
        self._unauthorised = unauthorised
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

    def collect(self) -> Iterator[Family | HistogramMetricFamily]:
        """For the registry."""
        info, ended, expiry, unauthorised = map(family_of, OF_PROCESS)
        unauthorised.add_metric([], self._unauthorised())
        info.add_metric([__version__], 1)
        for direction in ("incoming", "outgoing"):
            for status in ENDS:
                ended.add_metric([direction, status], self._ended[direction, status])
        for certificate in self._certificates():
            expiry.add_metric([certificate.role], certificate.expires_at)
        families = _Families()
        for row in self._machines():
            families.fill(*row)
        yield from (info, ended, expiry, unauthorised, *families)


class _Families:
    """The metrics of the records, filled from them. An image may have several destinations: the machine, and its
    migration of either direction, count once, as the first row has them."""

    def __init__(self) -> None:
        named = {metric.name: metric for metric in metrics(Machine)}
        latency = named.pop("postcopy_migration_fault_latency_seconds")
        self._latency = HistogramMetricFamily(latency.name, latency.help, labels=latency.all_labels)
        self._by_name = {name: family_of(metric) for name, metric in named.items()}
        self._seen: set[tuple[str, ...]] = set()

    def __iter__(self) -> Iterator[Family | HistogramMetricFamily]:
        return iter((*self._by_name.values(), self._latency))

    def fill(self, name: str, machine: AnyMachine | None, job: Migration | None) -> None:
        """With the numbers of a machine, and of its migration."""
        status = report.machine_status(name, machine, job)
        if machine is not None and self._is_new(name):
            self._add(status, [name])
            if status.guest is not None:
                self._add(status.guest, [name])
        if status.migration is not None and job is not None and self._is_new(name, direction := report.direction(job)):
            self._add(status.migration, [name, direction])
            if isinstance(job, DestinationMigration):
                self._add_latency([name, direction], job)

    def _is_new(self, *labels: str) -> bool:
        new = labels not in self._seen
        self._seen.add(labels)
        return new

    def _add(self, record: Record, labels: list[str]) -> None:
        for figure in figures(type(record)):
            value = getattr(record, figure.name)
            if isinstance(value, Record):
                if isinstance(record, MigrationRecord):
                    self._add(value, labels)
            elif figure.metric is None or value is None:
                continue
            elif figure.name == "status":
                for word in STATUSES:
                    self._by_name[figure.metric.name].add_metric([*labels, word], word == value)
            elif isinstance(value, list):  # by vCPU
                for number, each in enumerate(value):
                    self._by_name[figure.metric.name].add_metric([*labels, str(number)], figure.base(each))
            else:
                words = figure.metric.labels.values()
                self._by_name[figure.metric.name].add_metric([*labels, *words], figure.base(value))

    def _add_latency(self, labels: list[str], job: DestinationMigration) -> None:
        buckets, everything, sum_s = buckets_of(job.latency)
        self._latency.add_metric(labels, [*buckets, ("+Inf", everything)], sum_value=sum_s)


def buckets_of(latency: Histogram) -> tuple[list[tuple[str, float]], int, float]:
    """Of a Prometheus histogram, without the last one; how many values, and their sum in seconds."""
    buckets: list[tuple[str, float]] = [
        (f"{(1 << exponent) / 1e9:g}", latency.below(exponent))
        for exponent in range(_FIRST_EXPONENT, _LAST_EXPONENT + 1)
    ]
    # The count is that of the buckets: a value may have been added while they were read.
    return buckets, max(latency.count, int(buckets[-1][1])), latency.sum_ns / 1e9


def family_of(metric: Metric) -> Family:
    """Without values."""
    kind = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
    return kind(metric.name.removesuffix("_total"), metric.help, labels=metric.all_labels)


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
