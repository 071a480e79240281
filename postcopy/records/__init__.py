# SPDX-License-Identifier: Apache-2.0
"""All that is written as JSON, one record for each kind of object: the lines of `--json` (`events`), of `--log-json`
(`log`), the answers of the control socket (`control`), and what they are about (`migration`).

A field's annotation says what it means, in which unit, how `ctl status` calls it and which metric it is. That is the
only place: the schema (`postcopy schema`), docs/schema.md and the metrics are made from it (`document`, `figures`). The
program that writes records never looks at the annotations, and does not check what it writes: the tests check every
line that they see (`tests/support/lines.py`).

Owns nothing; imports msgspec only.
"""

from __future__ import annotations

from postcopy.records._base import VERSION, Json, Record, Schema, as_json, doc

__all__ = ["VERSION", "Json", "Record", "Schema", "as_json", "doc"]
