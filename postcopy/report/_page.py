# SPDX-License-Identifier: Apache-2.0
"""The page: one file that needs nothing beside it, no script and no network, on a screen, a telephone or paper.

All that comes from the lines goes through `esc`, or is a number that was formatted here. The page forbids itself
everything else by a content security policy.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from importlib import resources

from postcopy import __version__
from postcopy.output.words import format_count
from postcopy.report import _charts, _words
from postcopy.report._article import Article
from postcopy.report._html import esc, figure, table
from postcopy.report._model import Cell, Migration
from postcopy.report._read import Reader
from postcopy.report._words import grouped, ms, us

MOST_DRAWN = 16
"""Migrations with pictures; of the others there is a row in the table only."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(reader: Reader) -> str:
    """The whole page, of at least one migration or comparison."""
    migrations = reader.migrations
    drawn = migrations[-MOST_DRAWN:]
    vms = all(one.is_vm for one in migrations)
    heading = f"{len(migrations)} {'virtual machines' if vms else 'migrations'}"
    if len(migrations) == 1:
        heading = f"{'Virtual machine' if vms else 'Migration of'} {_words.title(drawn[0])}"
    elif migrations and [one.number("attempts") for one in migrations] == list(range(1, len(migrations) + 1)):
        heading = f"Migration of {_words.title(migrations[0])}, {len(migrations)} attempts"
    cells = list(reader.cells.values())
    if cells:
        heading = "Ways to migrate, compared"
    body = [*_problems(reader), *_comparison(cells, reader.conditions)]
    if len(migrations) > 1:
        body += _overview(migrations, drawn, reader.forgotten)
    differences = _words.differences(drawn) if len(migrations) > 1 else {}
    for number, migration in enumerate(drawn, 1):
        article = Article(migration, f"m{number}")
        body += article.html(number if len(migrations) > 1 else 0, differences.get(migration.key, ""))
    return "\n".join((
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">', f"<title>postcopy: {html.escape(heading)}</title>",
        f"<style>\n{style()}</style>", "</head>", "<body>", "<main>",
        f"<header><p class=kicker>postcopy report</p><h1>{html.escape(heading)}</h1></header>", *body,
        f"<footer><p>Made by postcopy {esc(__version__)} from its <code>--json</code> lines: <code>postcopy report"
        " FILE.jsonl</code>. What each number means: <code>postcopy schema --markdown</code>.</p></footer>",
        "</main>", "</body>", "</html>", "",
    ))  # fmt: skip


def _problems(reader: Reader) -> Iterator[str]:
    found = list(reader.problems.texts)
    if found:
        more = f"<li>and {reader.problems.more} more</li>" if reader.problems.more else ""
        yield "<section class=problems><h2>What is wrong with the input</h2><ul>"
        yield from (f"<li>{esc(text)}</li>" for text in found)
        yield f"{more}</ul></section>"


def _comparison(cells: Sequence[Cell], conditions: str) -> Iterator[str]:
    """Of `bench migrate`: the page begins with what it was run for."""
    if not cells:
        return
    yield "<section><h2>By workload and policy</h2>"
    rounds = max(cell.rounds for cell in cells)
    caption = (
        f"{'One round' if rounds == 1 else f'Medians of {rounds} rounds'}. Bars of one quantity have one scale; shorter"
        " is better. Faults are those that waited for the network. The dip is the part of the guest's throughput that"
        " was lost at its lowest: 100 % is a standstill."
    )
    picture = _charts.as_svg(_charts.policies(cells), "policies")
    yield from figure(picture, "Downtime, total time, faults and dip of throughput, by workload and policy", caption)
    if conditions:
        yield f"<p class=note>{html.escape(conditions)}</p>"
    failures = [cell for cell in cells if cell.failure]
    if failures:
        yield "<ul>"
        yield from (
            f"<li class=bad>{esc(cell.workload)}, {esc(cell.policy)}: {esc(cell.failure)}</li>" for cell in failures
        )
        yield "</ul>"
    yield "</section>"


def _overview(migrations: Sequence[Migration], drawn: Sequence[Migration], forgotten: int) -> Iterator[str]:
    if forgotten:
        before = format_count(forgotten, "migration")
        yield f"<p>There were {before} before these; only the last {len(migrations)} are kept.</p>"
    differences = _words.differences(migrations)
    header = (
        "machine", "options", "status", "downtime", "total time", "faults", "p50", "p99", "max", "sent / memory",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    first = len(migrations) - len(drawn)
    for number, migration in enumerate(migrations):
        latency = _words.latency_of(migration)
        downtime, total = migration.number("downtime-ms"), migration.number("total-ms")
        moved, size = migration.number("ram", "transferred"), migration.number("ram", "total")
        name = html.escape(_words.title(migration))
        rows.append((
            f'<a href="#m{number - first + 1}">{name}</a>' if number >= first else name,
            esc(differences[migration.key]), esc(_words.status_of(migration)),
            ms(downtime) if downtime else "", ms(total) if total else "",
            grouped(latency["count"]) if "count" in latency else "",
            *(us(latency[key]) if latency.get("count") and key in latency else "" for key in ("p50", "p99", "max")),
            f"{moved / size:.2f}" if moved and size else "",
        ))  # fmt: skip
    yield "<section><h2>All of them</h2>"
    said = [number for number in range(len(header)) if any(cells[number] for cells in rows)]
    yield from table([header[n] for n in said], [[cells[n] for n in said] for cells in rows], numbers_from=2)
    if first:
        yield f"<p>Pictures of the last {len(drawn)} follow.</p>"
    yield "</section>"


def style() -> str:
    return resources.files("postcopy.report").joinpath("style.css").read_text(encoding="utf-8")


def pictures(reader: Reader) -> dict[str, str]:
    """Of the last migration, and of a comparison, as files of their own, by what they show: SVG, which is light or dark
    as what shows it."""
    colours = style().partition("* {")[0].replace("color-scheme: light dark;", "")
    found = {}
    for migration in reader.migrations[-1:]:
        article = Article(migration)
        for name, draw in article.pictures.items():
            found[name] = _charts.as_file(draw, colours, article.legend(name))
    if reader.cells:
        found["policies"] = _charts.as_file(_charts.policies(list(reader.cells.values())), colours, ())
    return found
