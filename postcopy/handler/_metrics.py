# SPDX-License-Identifier: Apache-2.0
"""What is counted of virtual machines, for Prometheus: the fields of the records that have a metric's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from postcopy import __version__
from postcopy.handler._vm import Vm
from postcopy.records import Record
from postcopy.records import pager as records
from postcopy.records.figures import OF_PROCESS, figures, metrics
from postcopy.service.metrics import buckets_of, family_of


class VmMetrics(Collector):
    """Looks at the virtual machines whenever it is asked."""

    def __init__(self, status: Callable[[], records.PagerStatus], vms: Callable[[], list[Vm]]) -> None:
        self._status = status
        self._vms = vms
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def ended(self, direction: str, status: str) -> None:
        """There are no migrations."""

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        """For the registry."""
        info = family_of(OF_PROCESS[0])
        info.add_metric([__version__], 1)
        yield info
        named = {metric.name: metric for metric in metrics(records.PagerStatus)}
        latency = named.pop("postcopy_vm_fault_latency_seconds")
        latencies = HistogramMetricFamily(latency.name, latency.help, labels=latency.all_labels)
        families = {name: family_of(metric) for name, metric in named.items()}

        def add(record: Record, labels: list[str]) -> None:
            for figure in figures(type(record)):
                value = getattr(record, figure.name)
                if isinstance(value, Record) and figure.metric is None:
                    add(value, labels)
                elif figure.metric is not None and isinstance(value, int | float):
                    words = figure.metric.labels.values()
                    families[figure.metric.name].add_metric([*labels, *words], figure.base(value))

        status = self._status()
        add(status, [])
        for record in status.vms:
            add(record, [record.name])
        for vm in self._vms():
            buckets, total, sum_s = buckets_of(vm.latency)
            latencies.add_metric([vm.about.name], [*buckets, ("+Inf", total)], sum_value=sum_s)
        yield from families.values()
        yield latencies
