# SPDX-License-Identifier: Apache-2.0
"""A page about each migration, for people: made from the lines of ``--json``, and from nothing else.

`read` takes the lines, whoever has written them, and keeps what makes sense (`_model`). `page` draws it: words and
numbers (`_words`), pictures by matplotlib (`_charts`), one HTML file without scripts (`_page`). Both load matplotlib, so
a process that only wants a report of its own migrations (`--report`) uses a `Reporter`: it keeps the lines, and has a
child process draw them.

Owns nothing but that child process, for as long as the block of `Reporter.running` lasts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from postcopy.report._reporter import Reporter, explain_missing

if TYPE_CHECKING:
    from postcopy.report._read import Reader

__all__ = ["Reporter", "draw", "explain_missing"]


def draw(reader: Reader) -> str:
    """The page. Loads matplotlib."""
    from postcopy.report._page import page

    return page(reader)
