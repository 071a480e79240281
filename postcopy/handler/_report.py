# SPDX-License-Identifier: Apache-2.0
"""What is counted of virtual machines, as records."""

from __future__ import annotations

import time

from postcopy.dataplane.histogram import Histogram
from postcopy.handler._vm import Vm
from postcopy.records import pager as records
from postcopy.records.migration import Latency, Recent
from postcopy.records.timeline import residency_text

_SERVED = {"1": "first_fault_ns", "100": "fault_100_ns", "1000": "fault_1000_ns", "10000": "fault_10000_ns"}
LATENCY_BUCKETS = 24
"""As many as QEMU has: the last one begins at 8.4 s."""


def latency_record(latency: Histogram) -> Latency:
    """In microseconds."""
    return Latency(
        count=latency.count,
        p50=latency.percentile(50) / 1e3,
        p99=latency.percentile(99) / 1e3,
        p99_9=latency.percentile(99.9) / 1e3,
        max=latency.max_ns / 1e3,
    )


def latency_distribution(latency: Histogram) -> list[int]:
    """The buckets of QEMU's ``postcopy-latency-dist``."""
    return latency.between([1000 << number for number in range(1, LATENCY_BUCKETS)])


def vm_record(vm: Vm, deaths: int) -> records.Vm:
    """How a virtual machine stands; `deaths`: of engines, while it was served."""
    about, count = vm.about, vm.statistics()
    replayed = None
    if vm.replays and count is not None:
        hit_rate = 100 * count.set_hits / count.set_pages if count.set_pages else None
        replayed = records.WorkingSet(
            set_pages=count.set_pages,
            set_hits=count.set_hits,
            hit_rate=None if hit_rate is None else round(hit_rate, 2),
        )

    def counted(name: str) -> int:
        return 0 if count is None else int(getattr(count, name))

    return records.Vm(
        name=about.name,
        pid=about.pid,
        status=vm.status,
        error=vm.error,
        image=about.image,
        socket=about.socket,
        elapsed_ms=round((time.monotonic_ns() - about.connected_ns) / 1e6, 1),
        memory=sum(size_bytes for _, size_bytes, _ in about.regions),
        page_size=about.page_bytes,
        resident=counted("resident_bytes"),
        faults=counted("faults"),
        pending_faults=counted("pending_faults"),
        demand_pages=counted("demand_pages"),
        prefetched_pages=counted("prefetched_pages"),
        background_pages=counted("background_pages"),
        zero_pages=counted("zero_pages"),
        image_waits=counted("local_waits"),
        removes=counted("removes"),
        removed_pages=counted("removed_pages"),
        retries=counted("retries"),
        fault_latency_us=latency_record(vm.latency),
        recent=None if vm.recent is None else Recent(**vm.recent.fields()),
        residency=residency_text(vm.bins) or None,
        postcopy_latency_dist=latency_distribution(vm.latency),
        faults_served_ms={
            number: round((at_ns - about.connected_ns) / 1e6, 1)
            for number, name in _SERVED.items()
            if (at_ns := counted(name))
        },
        working_set=replayed,
        recoveries_of_source=vm.recoveries,
        encrypted=vm.encrypted,
        engine_deaths=deaths,
    )
