# SPDX-License-Identifier: Apache-2.0
"""Pieces of HTML. What comes from the lines goes through `esc`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

from postcopy.report._model import text_of


def esc(value: object) -> str:
    return html.escape(text_of(value))


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1, most: int = 512
) -> Iterator[str]:
    """Cells are HTML."""
    yield "<div class=scroll><table>"
    if any(header):
        yield f"<thead><tr>{''.join(f'<th scope=col>{name}</th>' for name in header)}</tr></thead>"
    yield "<tbody>"
    for cells in list(rows)[:most]:
        shown = "".join(
            f"<td{' class=n' if number >= numbers_from else ''}>{cell}</td>" for number, cell in enumerate(cells[1:], 1)
        )
        yield f"<tr><th scope=row>{cells[0]}</th>{shown}</tr>"
    yield "</tbody></table></div>"


def figure(svg: str, label: str, caption: str = "", legend: Iterable[tuple[str, str]] = ()) -> Iterator[str]:
    yield "<figure>"
    if shown := "".join(f'<li><i style="background:var(--{colour})"></i>{text}</li>' for colour, text in legend):
        yield f"<ul class=legend>{shown}</ul>"
    yield f'<div class=picture role="img" aria-label="{html.escape(label)}">{svg}</div>'
    if caption:
        yield f"<figcaption>{caption}</figcaption>"
    yield "</figure>"
