# SPDX-License-Identifier: Apache-2.0
"""What all records have, and how a field says what it is."""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta, Struct, to_builtins

Json = dict[str, Any]

VERSION: Final = 3
"""Of the schema: raised when a field, an event, a request or one of the words that a field may be goes away or means
something else, and when such a word is added. Fields, events and requests that are added do not raise it: a reader
ignores those that it does not know."""

Schema = Annotated[int, Meta(description="Version of all that is described here.", ge=VERSION, le=VERSION)]


class Record(Struct, rename="kebab", kw_only=True, omit_defaults=True):
    """One kind of object that is written as JSON.

    A field without a default is always there. One with the default None is left out where its value is not known, or
    does not apply. A reader ignores fields that it does not know.
    """


def as_json(record: object) -> Json:
    """A record as JSON has it."""
    fields: Json = to_builtins(record)
    return fields


def doc(
    text: str, unit: str = "", *, label: str = "", metric: str = "", of: str = "", help: str = "", **labels: str
) -> Meta:
    """What a field means, for its annotation.

    `label`: how `ctl status` calls it. `metric`: Prometheus' name for it, `labels` those that are not the machine and
    the direction, `help` its text where several fields are one metric. `of`: the words that it may be, as `a|b`.
    """
    more: Json = {}
    if unit:
        more["unit"] = unit
    if metric:
        more["metric"] = {"name": metric, "help": help or text, "labels": labels}
    if of:
        more["enum"] = of.split("|")
    return Meta(
        title=label or None,
        description=text,
        pattern=rf"\A(?:{of})\Z" if of else None,
        extra_json_schema=more or None,
    )
