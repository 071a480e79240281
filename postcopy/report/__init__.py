# SPDX-License-Identifier: Apache-2.0
"""A page about each migration, for people: made from the lines of ``--json``, and from nothing else.

A `Reader` takes the lines, whoever has written them, and keeps what makes sense (`_read`, `_model`). `draw` makes one
HTML file without scripts of it (`_page`, `_article`): words and numbers (`_words`), and pictures by matplotlib
(`_charts`), which take a second of processor time and tens of megabytes. So a process that moves machines and is to
report on them (`--report`) has a `Reporter`: it keeps the lines, and has a child process draw them.

Owns nothing but that child process, for as long as the command around it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postcopy.report._reporter import Reporter, explain_missing

if TYPE_CHECKING:
    from postcopy.report._page import page as draw
    from postcopy.report._page import pictures
    from postcopy.report._read import Reader

__all__ = ["Reader", "Reporter", "draw", "explain_missing", "pictures"]


def __getattr__(name: str) -> Any:
    """What loads matplotlib is loaded when it is used."""
    if name == "Reader":
        from postcopy.report._read import Reader

        return Reader
    if name in ("draw", "pictures"):
        from postcopy.report import _page

        return _page.page if name == "draw" else _page.pictures
    raise AttributeError(name)
