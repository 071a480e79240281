# SPDX-License-Identifier: Apache-2.0
"""What `postcopy merge` says of pages in doubt."""

from __future__ import annotations

from typing import Any

from postcopy.cli.merge import _in_doubt
from postcopy.migration.salvage import MAX_RANGES


def ranges(block: str, count: int) -> list[dict[str, Any]]:
    return [{"block": block, "first-page": 10 * number, "pages": 3, "page-bytes": 4096} for number in range(count)]


def test_a_line_for_each_block() -> None:
    lines = list(_in_doubt([*ranges("shared", 2000), *ranges("vcpu0", 1)], False))
    assert lines == [
        "block shared, 6000 pages of 4 KiB in 2000 ranges, from page 0 to 19992; --verbose lists them",
        "block vcpu0, pages 0 to 2 of 4 KiB",
    ]


def test_every_range() -> None:
    lines = list(_in_doubt(ranges("shared", 2000), True))
    assert len(lines) == 2000
    assert lines[-1] == "block shared, pages 19990 to 19992 of 4 KiB"


def test_a_list_that_is_not_whole_says_so() -> None:
    assert "at least 30000 pages" in next(_in_doubt(ranges("shared", MAX_RANGES), False))
