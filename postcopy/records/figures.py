# SPDX-License-Identifier: Apache-2.0
"""What the annotations of the records say, for `ctl status`, the metrics and the schema.

Looking at them costs some milliseconds; a process that only writes records never does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from msgspec import Meta, structs

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
    required: bool
    text: str
    label: str
    unit: str
    words: tuple[str, ...]  # that it may be, where they are few
    kind: str  # its type, in words
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
    for each in structs.fields(record):
        parts = list(_parts(hints[each.name]))
        meta = next((part for part in parts if isinstance(part, Meta)), Meta())
        extra = meta.extra_json_schema or {}
        found.append(
            Figure(
                name=each.name,
                key=each.encode_name,
                required=each.required,
                text=meta.description or "",
                label=meta.title or "",
                unit=extra.get("unit", ""),
                words=tuple(extra.get("enum", ())),
                kind=_type(get_type_hints(record)[each.name], each.required),
                metric=Metric(**extra["metric"]) if "metric" in extra else None,
                record=next((part for part in parts if isinstance(part, type) and issubclass(part, Record)), None),
            )
        )
    return tuple(found)


def _type(hint: Any, nullable: bool) -> str:
    """`nullable`: whether None is written, as null; else the field is left out then."""
    parts = get_args(hint)
    if get_origin(hint) is list:
        return f"list of {_type(parts[0], nullable)}"
    if get_origin(hint) is dict:
        return f"map of text to {_type(parts[1], nullable)}"
    if get_origin(hint) is Literal:
        return f'"{parts[0]}"'
    if parts:
        names = [_type(part, nullable) for part in parts if part is not NoneType]
        return " or ".join([*names, *(["null"] if nullable and NoneType in parts else [])])
    return _TYPES.get(hint) or str(hint.__name__)


_TYPES = {str: "text", int: "integer", float: "number", bool: "boolean", object: "any", Any: "any"}


def _parts(hint: Any) -> Iterator[Any]:
    """All that an annotation is made of."""
    yield hint
    for part in (*get_args(hint), *getattr(hint, "__metadata__", ())):
        if part is not hint:
            yield from _parts(part)
