# SPDX-License-Identifier: Apache-2.0
"""The page: one file that needs nothing beside it, no script and no network, on a screen, a telephone or paper.

All that comes from the lines goes through `esc`, or is a number that was formatted here. The page forbids itself
everything else by a content security policy.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources

from postcopy import __version__
from postcopy.output.words import format_count
from postcopy.records import Json
from postcopy.report import _charts, _words
from postcopy.report._model import KINDS, STAGES, Histogram, Mark, Migration, number_of, object_of, text_of
from postcopy.report._read import Reader
from postcopy.report._words import grouped, ms, size_of, unbroken, us

MOST_DRAWN = 16
"""Migrations with pictures; of the others there is a row in the table only."""
MOST_ROWS = 80  # of a table
_KIND_WORDS = {
    "demand": "on demand", "prefetched": "prefetched", "background": "in background", "precopied": "precopied",
    "zero": "zero, never sent", "duplicate": "came twice",
}  # fmt: skip
_STAGE_WORDS = {
    "sent": "until requested", "received": "until received", "placed": "until placed and woken", "total": "all of it",
}  # fmt: skip
_MARK_WORDS = {
    "offer": "the migration began", "round": "a round of precopy began", "pause": "the source was asked to pause the machine",
    "switchover": "the destination had the device state to load", "prepared": "the destination had loaded it",
    "commit": "the machine was given to the destination", "running": "the machine ran at the destination",
    "lost": "the connection was lost", "recovered": "all channels were there again",
    "pager-died": "the pager's process died, and another one took over",
    "policy": "pages were fetched in another way", "all-there": "the last page had arrived", "ended": "the migration ended",
}  # fmt: skip
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def esc(value: object) -> str:
    return html.escape(text_of(value))


def page(reader: Reader) -> str:
    """The whole page."""
    migrations = reader.migrations
    drawn = migrations[-MOST_DRAWN:]
    heading = f"Migration of {_words.title(drawn[0])}" if len(migrations) == 1 else f"{len(migrations)} migrations"
    if len(migrations) == 1 and drawn[0].main.name == "pager":
        heading = f"Virtual machine {_words.title(drawn[0])}"
    if not migrations:
        heading = "No migration"
    body = [*_problems(reader)]
    if not migrations:
        body.append(
            "<p class=lead>The lines that were read tell of no migration. A report is made of what <code>postcopy source</code>,"
            " <code>dest</code>, <code>daemon</code>, <code>pager</code> or <code>demo</code> writes with <code>--json</code>.</p>"
        )
    if len(migrations) > 1:
        body += _overview(migrations, drawn, reader.forgotten)
    differences = _words.differences(drawn) if len(migrations) > 1 else {}
    for number, migration in enumerate(drawn, 1):
        body += _article(migration, number if len(migrations) > 1 else 0, differences.get(migration.key, ""))
    style = resources.files("postcopy.report").joinpath("style.css").read_text(encoding="utf-8")
    return "\n".join((
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">', f"<title>postcopy: {html.escape(heading)}</title>",
        f"<style>\n{style}</style>", "</head>", "<body>", "<main>",
        f"<header><p class=kicker>postcopy report</p><h1>{html.escape(heading)}</h1></header>", *body,
        f"<footer><p>Made by postcopy {esc(__version__)} from its <code>--json</code> lines: <code>postcopy report FILE.jsonl</code>."
        " What each number means: <code>postcopy schema --markdown</code>.</p></footer>",
        "</main>", "</body>", "</html>", "",
    ))  # fmt: skip


def _problems(reader: Reader) -> Iterator[str]:
    found = list(reader.problems.texts)
    if found:
        more = f"<li>and {reader.problems.more} more</li>" if reader.problems.more else ""
        yield "<section class=problems><h2>Not all that was read makes sense</h2><ul>"
        yield from (f"<li>{esc(text)}</li>" for text in found)
        yield f"{more}</ul></section>"


def _overview(migrations: Sequence[Migration], drawn: Sequence[Migration], forgotten: int) -> Iterator[str]:
    if forgotten:
        yield f"<p>There were {format_count(forgotten, 'migration')} before these; only the last {len(migrations)} are kept.</p>"
    differences = _words.differences(migrations)
    header: tuple[str, ...] = (
        "machine",
        "options",
        "status",
        "downtime",
        "all there",
        "waits",
        "p50",
        "p99",
        "longest",
        "sent / memory",
    )
    rows: list[tuple[str, ...]] = []
    first = len(migrations) - len(drawn)
    for number, migration in enumerate(migrations):
        latency = _words.latency_of(migration)
        downtime, total = migration.number("downtime-ms"), migration.number("total-ms")
        moved, size = migration.number("ram", "transferred"), migration.number("ram", "total")
        name = html.escape(_words.title(migration))
        rows.append((
            f'<a href="#m{number - first + 1}">{name}</a>' if number >= first else name,
            esc(differences[migration.key]), esc(_words.status_of(migration)), ms(downtime) if downtime else "", ms(total) if total else "",
            grouped(latency["count"]) if "count" in latency else "",
            *(us(latency[key]) if latency.get("count") and key in latency else "" for key in ("p50", "p99", "max")),
            f"{moved / size:.2f}" if moved and size else "",
        ))  # fmt: skip
    yield "<section><h2>All of them</h2>"
    if not any(differences.values()):  # that column says nothing
        header, rows = (header[0], *header[2:]), [(cells[0], *cells[2:]) for cells in rows]
    yield from _table(header, rows, numbers_from=2)
    if first:
        yield f"<p>Pictures of the last {len(drawn)} follow.</p>"
    yield "</section>"


def _table(
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


# ---- one migration


def _article(migration: Migration, number: int, differs: str) -> Iterator[str]:
    """`number`: of it among several; 0 where there is no other. `differs`: in what it does from those."""
    timeline, marks = migration.main.timeline, _words.marks_of(migration)
    rates = _charts.operations(migration)
    guest = _words.guest_of(migration, rates)
    name = f"m{number or 1}"
    yield f'<article id="{name}">'
    if number:
        yield f"<h2 class=name>{html.escape(_words.title(migration))}{f': {esc(differs)}' if differs else ''}</h2>"
    yield f"<p class=about>{_about(migration)}</p>"
    yield f"<p class=lead>{' '.join(html.escape(text) for text in _words.lead(migration, guest)) or 'Nothing is known of how it went.'}</p>"
    if shown := list(_words.cards(migration, guest)):
        yield "<dl class=cards>"
        for label, value, note in shown:
            yield f"<div><dt>{esc(label)}</dt><dd><b>{esc(value)}</b><span>{esc(note)}</span></dd></div>"
        yield "</dl>"
    yield from _phases(migration)
    if timeline is None:
        yield (
            "<section><h2>Over time</h2><p class=missing>No timeline is among these lines, so there are no pictures over"
            " time. A process that was started with <code>--json</code> or <code>--report</code> writes one when the"
            " migration ends.</p></section>"
        )
    else:
        first_ms, last_ms = _charts.interesting(migration, timeline, marks)
        begun = next((mark.at_ms for mark in marks if mark.what == "offer"), None)
        clock = _charts.Clock(first_ms, last_ms, begun)
        found = _charts.spans(marks, last_ms)
        yield from _over_time(migration, clock, marks, found, guest, name)
    yield from _pause(migration, name)
    if timeline is not None:
        yield from _residency(migration, clock, found, name)
    yield from _latency(migration, name)
    yield from _marks(migration)
    yield from _circumstances(migration)
    yield from _numbers(migration)
    yield "</article>"


def _about(migration: Migration) -> str:
    status = _words.status_of(migration)
    parts = [f"<strong class={'good' if status in _words.GOOD else 'bad'}>{esc(status)}</strong>"]
    if migration.text("mode"):
        parts.append(f"mode {esc(migration.text('mode'))}")
    begun_ms = next((timeline.unix_ms for _, timeline in migration.timelines if timeline.unix_ms), None)
    if begun_ms is not None:
        parts.append(datetime.fromtimestamp(begun_ms / 1e3, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
    sides = [side.name for side in _words.sides_of(migration)]
    if len(sides) == 2:
        parts.append("both sides")
    else:
        parts.append(
            {"source": "seen by the source alone", "dest": "seen by the destination alone"}.get(sides[0], "a pager")
        )
    if migration.key and migration.main.name != "pager":
        parts.append(f"id {esc(migration.key[:8])}")
    return " <span aria-hidden=true>·</span> ".join(parts)


def _phases(migration: Migration) -> Iterator[str]:
    found = _words.phases(migration)
    if not found:
        return
    whole = sum(length for _, _, length, _ in found)
    yield "<section><h2>Where the time went</h2><div class=strip aria-hidden=true>"
    for kind, _, length, _ in found:
        yield f'<i class="{kind}" style="flex-grow:{max(length / whole, 0.004):.4f}"></i>'
    yield "</div><ul class=legend>"
    for kind, label, length, what in found:
        yield f"<li><i class={kind}></i><b>{ms(length)}</b> {label}: {what}</li>"
    yield "</ul>"
    stages = _words.waits(migration)
    known = [(stage, stages[stage].sum_us) for stage in STAGES[:3] if stage in stages and stages[stage].sum_us > 0]
    if len(known) == 3:
        whole_us = sum(length for _, length in known)
        yield "<h3>Of all that accesses waited for pages</h3><div class=strip aria-hidden=true>"
        for stage, length in known:
            yield f'<i style="flex-grow:{max(length / whole_us, 0.004):.4f};background:var(--{stage})"></i>'
        yield "</div><ul class=legend>"
        where = {"sent": "until the request was on its way (destination)", "received": "until the page was there (network and source)",
                 "placed": "until it was in the memory and the thread woken (destination)"}  # fmt: skip
        for stage, length in known:
            yield f'<li><i style="background:var(--{stage})"></i><b>{100 * length / whole_us:.0f} %</b> {where[stage]}</li>'
        yield "</ul>"
    yield "</section>"


def _figure(svg: str, label: str, caption: str = "", legend: Iterable[tuple[str, str]] = ()) -> Iterator[str]:
    yield "<figure>"
    if shown := "".join(f'<li><i style="background:var(--{colour})"></i>{text}</li>' for colour, text in legend):
        yield f"<ul class=legend>{shown}</ul>"
    yield f'<div class=picture role="img" aria-label="{html.escape(label)}">{svg}</div>'
    if caption:
        yield f"<figcaption>{caption}</figcaption>"
    yield "</figure>"


def _over_time(
    migration: Migration, clock: _charts.Clock, marks: Sequence[Mark], found: Sequence[_charts.Span],
    guest: _words.Guest | None, name: str,
) -> Iterator[str]:  # fmt: skip
    timeline = migration.main.timeline
    assert timeline is not None
    yield "<section><h2>Over time</h2>"
    draw = _charts.over_time(migration, clock, marks, found)
    if draw is None:
        few = "one moment only" if len(timeline.at_ms) < 2 else "nothing that moved"
        yield f"<p class=missing>The timeline has {few}, so there is nothing to draw over time.</p></section>"
        return
    page_bytes = migration.number("ram", "page-size") or 4096
    counts = {kind: float(values[-1]) for kind, values in timeline.pages.items() if values[-1]}
    legend = [
        (kind, f"{_KIND_WORDS[kind]}: {grouped(counts[kind])} pages ({size_of(counts[kind] * page_bytes)})")
        for kind in reversed(KINDS) if kind in counts
    ]  # fmt: skip
    legend += [
        (kind, word)
        for kind, word in (("pause", "the pause"), ("cut", "cut off"))
        if any(span.kind == kind for span in found)
    ]
    captions = []
    if counts.get("duplicate"):
        captions.append(f"{grouped(counts['duplicate'])} pages arrived again and were dropped.")
    if speed := _words.speed(migration):
        captions.append(f"{speed[0].upper()}{speed[1:]}.")
    if guest is not None:
        captions.append(
            f"The guest made {_charts.si(guest.before)} operations a second before the switchover, and {_charts.si(guest.after)} at its slowest after it."
        )
    elif _charts.operations(migration) and len(migration.sides) == 1:
        captions.append("Of the guest only this host's part is known.")
    whole_ms = float(timeline.at_ms[-1] - timeline.at_ms[0])
    if clock.length_ms < 0.9 * whole_ms:
        captions.append(
            f"Of {ms(whole_ms)} that were recorded those are shown in which pages moved, and some before and after."
        )
    if len(list(migration.timelines)) > 1 and not migration.one_host:
        captions.append("The two sides are put together by the wall clocks of two hosts, which may differ.")
    if migration.main.name == "source":
        captions.append("These are pages and bytes that were sent: when they were placed only the destination knows.")
    yield from _figure(
        _charts.as_svg(draw, f"{name}t"),
        "Pages, throughput, guest and waiting threads over time",
        " ".join(map(html.escape, captions)),
        legend,
    )
    yield "</section>"


def _pause(migration: Migration, name: str) -> Iterator[str]:
    parts, downtime = _words.pause_parts(migration), migration.number("downtime-ms")
    if migration.main.name == "pager":
        return
    yield "<section><h2>The pause</h2>"
    if not parts:
        kind = (
            "an image does not run, so nothing was paused"
            if migration.text("kind") == "image"
            else "the stages of a pause are not among these lines"
        )
        if not downtime and _words.status_of(migration) not in _words.GOOD:
            kind = "the migration came to no end of a pause: the machine did not begin to run at the destination"
        yield f"<p class=missing>{kind[0].upper()}{kind[1:]}.</p></section>"
        return
    sides = {part.side for part in parts}
    draw = _charts.pause([(part.side, _words.PARTS[part.name], part.begin_us, part.length_us) for part in parts])
    caption = (
        "From the request to pause until the destination said that the machine runs there."
        if "source" in sides
        else ("What the destination did in it, one after the other; the rest only the source knows.")
    )
    if len(sides) == 2:
        caption += " The destination's parts, by its own clock, lie within the source's part above them; their exact place there is not known."
    legend = [
        (side, {"source": "the source", "dest": "the destination"}[side])
        for side in ("source", "dest")
        if side in sides
    ]
    yield from _figure(_charts.as_svg(draw, f"{name}p"), "The stages of the pause", caption, legend)
    yield "</section>"


def _residency(migration: Migration, clock: _charts.Clock, found: Sequence[_charts.Span], name: str) -> Iterator[str]:
    timeline = migration.main.timeline
    assert timeline is not None
    draw = _charts.residency(timeline, clock, found)
    if draw is None:
        return
    there = "was there" if migration.main.name != "source" else "had been sent"
    yield f"<section><h2>What of the memory {there}, and when</h2>"
    legend = [("raster", there)]
    captions = []
    if timeline.faults is not None:
        count = len(timeline.faults.us)
        shown = (
            f"the {grouped(count)} accesses that waited"
            if timeline.every == 1
            else f"one of {timeline.every} accesses that waited"
        )
        legend.append(("demand", shown))
        if count >= 100:
            legend.append(("slow", "the slowest 1 % of them"))
    if len(timeline.blocks) > 1:
        names = ", ".join(f"{label} {size_of(size)}" for label, size, _ in timeline.blocks[:8])
        captions.append(f"Blocks, from below: {names}{', ...' if len(timeline.blocks) > 8 else ''}.")
    yield from _figure(
        _charts.as_svg(draw, f"{name}r"),
        "Residency of the memory over time, and faults",
        " ".join(map(html.escape, captions)),
        legend,
    )
    yield "</section>"


def _latency(migration: Migration, name: str) -> Iterator[str]:
    if migration.dest is None:
        yield "<section><h2>How long a missing page took</h2><p class=missing>Only the destination knows that, and its lines are not here.</p></section>"
        return
    stages, latency = _words.waits(migration), _words.latency_of(migration)
    yield "<section><h2>How long a missing page took</h2>"
    if not latency.get("count"):
        what = "No access met a missing page" if latency else "Nothing is known of it"
        yield f"<p class=missing>{what}, so there is nothing to draw.</p></section>"
        return
    if (draw := _charts.latency(stages)) is not None:
        legend = [(stage, _STAGE_WORDS[stage]) for stage in STAGES if stage in stages]
        yield from _figure(_charts.as_svg(draw, f"{name}l"), "Fault latency by stage, percentiles", "", legend)
    elif latency["count"] == 1:
        yield f"<p class=missing>One access waited, for {us(latency['max'])}: a distribution needs more.</p>"
    if stages:
        yield from _table(
            ("stage", "count", "p50", "p90", "p99", "p99.9", "longest"),
            [_row(_STAGE_WORDS[stage], stages[stage]) for stage in STAGES if stage in stages],
        )
    if all(stage in stages for stage in ("sent", "total")) and stages["sent"].count < stages["total"].count:
        yield "<p class=note>A thread whose page came without its own request, as by background push, is in the last line only.</p>"
    blocked = _words.blocktimes(migration)
    if len(blocked) > 1:
        shown = ", ".join(f"{ms(one)}" for one in blocked[:64])
        yield f"<p class=note>Each vCPU waited, in order: {shown}.</p>"
    yield "</section>"


def _row(label: str, histogram: Histogram) -> tuple[str, ...]:
    percentiles = (us(histogram.percentile(percent)) for percent in (50, 90, 99, 99.9))
    return (label, grouped(histogram.count), *percentiles, us(histogram.max_us))


def _marks(migration: Migration) -> Iterator[str]:
    marks = _words.marks_of(migration)
    if not marks:
        return
    yield "<section><h2>What happened, and when</h2>"
    begun_ms = next((mark.at_ms for mark in marks if mark.what == "offer"), 0.0)
    yield from _table(
        ("after", "what", ""),
        [
            (_moment(mark.at_ms - begun_ms), html.escape(_MARK_WORDS.get(mark.what, mark.what)), esc(mark.text))
            for mark in marks
        ],
        numbers_from=9,
    )
    yield "</section>"


def _moment(at_ms: float) -> str:
    """One of several that may be less than a millisecond apart."""
    return unbroken(f"{at_ms / 1e3:,.4f} s" if at_ms < 600e3 else f"{at_ms / 1e3:,.1f} s")


# ---- circumstances


def _circumstances(migration: Migration) -> Iterator[str]:
    sides = [side for side in _words.sides_of(migration) if side.run]
    yield "<section><h2>Machine, options, versions</h2>"
    rows = list(_machine(migration))
    yield from _table(("", ""), rows, numbers_from=9)
    if not sides:
        yield "<p class=missing>Which host and which version this was is not among these lines.</p></section>"
        return
    same = len(sides) == 2 and sides[0].run == sides[1].run
    for side in sides[:1] if same else sides:
        what = {"source": "Source", "dest": "Destination"}.get(side.name, "Pager") if not same else "Both sides"
        yield f"<h3>{what}</h3>"
        yield from _table(("", ""), list(_of_run(side.run))[:MOST_ROWS], numbers_from=9)
    yield "</section>"


def _machine(migration: Migration) -> Iterator[tuple[str, str]]:
    yield "machine", html.escape(_words.title(migration))
    timeline = migration.main.timeline
    if timeline is not None and timeline.blocks:
        blocks = [
            f"{esc(name)} {size_of(size)}" + (f" in pages of {size_of(page)}" if page else "")
            for name, size, page in timeline.blocks[:16]
        ]
        yield "memory", ", ".join(blocks) + (", ..." if len(timeline.blocks) > 16 else "")
    if peer := migration.text("peer"):
        yield "peer", esc(peer)
    encrypted = migration.main.facts.get("encrypted")
    if isinstance(encrypted, bool):
        yield "encrypted", "by TLS" if encrypted else "no"
    if where := text_of(object_of(migration.main.facts.get("pager")).get("where")):
        yield "pager", esc(f"in a {where}" + (" of its own" if where == "process" else ""))


def _of_run(run: Json) -> Iterator[tuple[str, str]]:
    command, version = text_of(run.get("command")), text_of(run.get("version"))
    yield "command", esc(f"postcopy {command}, version {version}")
    if started := text_of(run.get("started")):
        yield "started", esc(started)
    for key, value in object_of(run.get("options")).items():
        yield f"--{esc(key)}", esc(value)
    yield from _host(object_of(run.get("host")))


def _host(host: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    words = {
        "cpu": "processor",
        "cpus": "processors",
        "usable-cpus": "of which usable",
        "thp": "huge pages (THP)",
        "virtual": "virtual machine",
    }
    for key, value in host.items():
        if value is None or isinstance(value, dict | list):
            continue
        size = number_of(value) if key in ("memory", "page-size") else None
        shown = (
            size_of(size)
            if size is not None
            else {True: "yes", False: "no"}.get(value, "")
            if isinstance(value, bool)
            else text_of(value)
        )
        yield esc(words.get(key, str(key).replace("-", " "))), esc(shown)


def _numbers(migration: Migration) -> Iterator[str]:
    """All that was counted, for those who look for one number."""
    sides = _words.sides_of(migration)
    names: dict[str, None] = {}
    flat = [dict(_flat(side.facts)) for side in sides]
    for each in flat:
        names.update(dict.fromkeys(each))
    if not names:
        return
    yield "<section><details><summary>All numbers</summary>"
    rows = [(html.escape(name), *(esc(each.get(name, "")) for each in flat)) for name in sorted(names)[: 3 * MOST_ROWS]]
    yield from _table(("field", *(side.name for side in sides)), rows)
    yield "</details></section>"


def _flat(facts: Mapping[str, object], above: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    for key, value in list(facts.items())[:MOST_ROWS]:
        name = f"{above}{text_of(key, 60)}"
        if isinstance(value, dict):
            if depth < 2:
                yield from _flat(value, f"{name}.", depth + 1)
        elif isinstance(value, bool | str | int | float):
            yield name, str(value).lower() if isinstance(value, bool) else text_of(value, 120)
        elif isinstance(value, list) and value and all(isinstance(one, int | float) for one in value):
            yield name, text_of(", ".join(map(str, value[:16])), 120)
