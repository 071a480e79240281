# SPDX-License-Identifier: Apache-2.0
"""What the annotations of the records say, for `ctl status`, the metrics and the schema.

Looking at them costs some milliseconds; a process that only writes records never does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from msgspec import Meta

from postcopy.records._base import Record


@dataclass(frozen=True)
class Metric:
    """One of Prometheus' names."""

    name: str
    help: str
    labels: dict[str, str]
    """Beside the machine and the direction; a word in capitals stands for what a program puts there."""

    @property
    def all_labels(self) -> list[str]:
        if self.name.startswith("postcopy_vm_"):
            return ["vm", *self.labels]
        if not self.name.startswith(("postcopy_migration_", "postcopy_guest_", "postcopy_machine_")):
            return list(self.labels)
        own = ["machine", "direction"] if self.name.startswith("postcopy_migration_") else ["machine"]
        return [*own, *self.labels]

    @property
    def type(self) -> str:
        if self.name.endswith("_total"):
            return "counter"
        return "histogram" if self.name.endswith("fault_latency_seconds") else "gauge"


@dataclass(frozen=True)
class Figure:
    """A field of a record."""

    name: str  # the attribute
    key: str  # in JSON
    label: str
    unit: str
    metric: Metric | None
    record: type[Record] | None  # that it has, or has a list of

    def base(self, value: float) -> float:
        """A value as a metric has it: in base units."""
        return value / {"ms": 1e3, "us": 1e6, "ns": 1e9}.get(self.unit, 1)


OF_PROCESS = (
    Metric("postcopy_build_info", "Always 1; the version is a label.", {"version": "VERSION"}),
    Metric(
        "postcopy_migrations_total",
        "Migrations that have ended in this process.",
        {"direction": "DIRECTION", "status": "STATUS"},
    ),
    Metric(
        "postcopy_certificate_expiry_timestamp_seconds",
        "When a certificate of this process ends (`--tls`), since the beginning of 1970, UTC.",
        {"role": "ROLE"},
    ),
    Metric(
        "postcopy_unauthorised_total", "Connections that were refused since `--tls-authz` does not allow the peer.", {}
    ),
)
"""Those that no record has."""


def metrics(record: type[Record]) -> list[Metric]:
    """Those of a record and of those that it has, each name once."""
    found: dict[str, Metric] = {}
    for figure in figures(record):
        if figure.metric is not None:
            found[figure.metric.name] = figure.metric
        if figure.record is not None:
            found |= {metric.name: metric for metric in metrics(figure.record) if metric.name not in found}
    return list(found.values())


@functools.cache
def figures(record: type[Record]) -> tuple[Figure, ...]:
    """The fields of a record, in order."""
    hints = get_type_hints(record, include_extras=True)
    found = []
    for name, key in zip(record.__struct_fields__, record.__struct_encode_fields__, strict=True):
        parts = list(_parts(hints[name]))
        meta = next((part for part in parts if isinstance(part, Meta)), Meta())
        extra = meta.extra_json_schema or {}
        found.append(
            Figure(
                name=name,
                key=key,
                label=meta.title or "",
                unit=extra.get("unit", ""),
                metric=Metric(**extra["metric"]) if "metric" in extra else None,
                record=next((part for part in parts if isinstance(part, type) and issubclass(part, Record)), None),
            )
        )
    return tuple(found)


def _parts(hint: Any) -> Iterator[Any]:
    """All that an annotation is made of."""
    yield hint
    for part in get_args(hint):
        yield from _parts(part)
