# SPDX-License-Identifier: Apache-2.0
"""One migration on the page: a story, the numbers that matter, pictures, and the circumstances.

A part for which something is missing says what, in a sentence; there is never an empty picture.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from datetime import UTC, datetime

from postcopy._throughput import WINDOW_MS
from postcopy.records import Json
from postcopy.report import _charts, _words
from postcopy.report._html import esc, figure, table
from postcopy.report._model import KINDS, STAGES, Histogram, Migration, number_of, object_of, text_of
from postcopy.report._words import grouped, ms, size_of, unbroken, us

_KIND_WORDS = {
    "demand": "on demand", "prefetched": "prefetched", "background": "in background", "precopied": "precopied",
    "zero": "zero, never sent",
}  # fmt: skip
_STAGE_WORDS = {
    "sent": "until requested", "received": "until received", "placed": "until placed and woken", "total": "in all",
}  # fmt: skip
_STAGE_PLACES = {
    "sent": "until the request was on its way (destination)",
    "received": "until the page was there (network and source)",
    "placed": "until it was in the memory and the thread woken (destination)",
}
_MARK_WORDS = {
    "offer": "the migration began", "round": "precopy began round number",
    "pause": "the source was asked to pause the machine", "switchover": "the destination had the device state to load",
    "prepared": "the destination had loaded it", "commit": "the machine was given to the destination",
    "running": "the machine ran at the destination", "lost": "the connection was lost",
    "recovered": "all channels were there again", "pager-died": "the pager's process died, and another one took over",
    "all-there": "the last page had arrived",
    "ended": "the migration ended",
}  # fmt: skip
_VM_MARK_WORDS = _MARK_WORDS | {
    "lost": "its pages could not be had", "recovered": "its pages could be had again",
    "ended": "it was served no more",
}  # fmt: skip
_SIDE_WORDS = {"source": "the source", "dest": "the destination"}
_HOST_WORDS = {
    "cpu": "processor", "cpus": "processors", "usable-cpus": "of which usable", "thp": "huge pages (THP)",
    "virtual": "virtual machine",
}  # fmt: skip


class Article:
    """What is drawn and said of one migration. `name`: that of no other on the page; `pictures`: how to draw each, by
    what it shows; those that there is something to draw of."""

    def __init__(self, migration: Migration, name: str = "m1") -> None:
        self._migration, self._name = migration, name
        self._timeline = migration.main.timeline
        self._marks = _words.marks_of(migration)
        self._guest = _words.guest_of(migration)
        self._parts = _words.pause_parts(migration)
        self._stages, self._latency = _words.waits(migration), _words.latency_of(migration)
        self._begun_ms = next((mark.at_ms for mark in self._marks if mark.what == "offer"), None)
        self._clock = _charts.Clock(0, 0, None)
        self._spans: list[_charts.Span] = []
        drawn: dict[str, _charts.Draw | None] = {}
        if (timeline := self._timeline) is not None:
            self._clock = _charts.Clock(*_charts.interesting(migration, timeline, self._marks), self._begun_ms)
            spans = _charts.spans(self._marks, self._clock.last_ms)
            self._spans = [span for span in spans if span.kind != "pause" or migration.runs]
            drawn["over-time"] = _charts.over_time(migration, self._clock, self._marks, self._spans)
            drawn["residency"] = _charts.residency(timeline, self._clock, self._spans)
        if self._parts:
            drawn["pause"] = _charts.pause(
                [(part.side, _words.PARTS[part.name], part.begin_us, part.length_us) for part in self._parts]
            )
        drawn["latency"] = _charts.latency(self._stages)
        self.pictures = {picture: draw for picture, draw in drawn.items() if draw is not None}

    def html(self, number: int, differs: str) -> Iterator[str]:
        """`number`: of it among several; 0 where there is no other. `differs`: in what it does from those."""
        yield f'<article id="{self._name}">'
        if number:
            name = html.escape(_words.title(self._migration))
            yield f"<h2 class=name>{name}{f': {esc(differs)}' if differs else ''}</h2>"
        yield f"<p class=about>{self._about()}</p>"
        story = " ".join(map(html.escape, _words.lead(self._migration, self._guest)))
        yield f"<p class=lead>{story.replace(' %', '&nbsp;%') or 'These lines do not say how it went.'}</p>"
        yield from self._cards()
        for section in (
            self._phases, self._over_time, self._pause, self._residency, self._waits, self._what_happened,
            self._circumstances,
        ):  # fmt: skip
            if shown := list(section()):
                yield from ("<section>", *shown, "</section>")
        yield "</article>"

    def _about(self) -> str:
        migration, status = self._migration, _words.status_of(self._migration)
        good = status in _words.GOOD or (migration.is_vm and status != "lost")
        parts = [f"<strong class={'good' if good else 'bad'}>{esc(status)}</strong>"]
        if mode := migration.text("mode"):
            parts.append(f"mode {esc(mode)}")
        unix_ms = next((timeline.unix_ms for _, timeline in migration.timelines if timeline.unix_ms), None)
        if unix_ms is not None:
            parts.append(datetime.fromtimestamp(unix_ms / 1e3, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
        alone = {
            "source": "seen by the source alone",
            "dest": "seen by the destination alone",
            "pager": "seen by a pager",
        }
        parts.append("both sides" if len(migration.sides) > 1 else alone[migration.main.name])
        if migration.key and not migration.is_vm:
            parts.append(f"id {esc(migration.key[:8])}")
        return " <span aria-hidden=true>·</span> ".join(parts)

    def _cards(self) -> Iterator[str]:
        if shown := list(_words.cards(self._migration, self._guest)):
            yield "<dl class=cards>"
            for label, value, note in shown:
                yield f"<div><dt>{esc(label)}</dt><dd><b>{esc(value)}</b><span>{esc(note)}</span></dd></div>"
            yield "</dl>"

    def _phases(self) -> Iterator[str]:
        if not (found := _words.phases(self._migration)):
            return
        yield "<h2>Where the time went</h2>"
        yield from _strip(
            [(f"phase-{kind}", length, ms(length), f"{label}: {what}") for kind, label, length, what in found]
        )
        known = [(stage, self._stages[stage].sum_us) for stage in _STAGE_PLACES if stage in self._stages]
        whole_us = sum(length for _, length in known)
        if len(known) == len(_STAGE_PLACES) and whole_us:
            yield "<h3>Where the time of requested pages went</h3>"
            yield from _strip([
                (stage, length, f"{100 * length / whole_us:.0f} %", _STAGE_PLACES[stage]) for stage, length in known
            ])  # fmt: skip

    def _drawn(self, picture: str, label: str, captions: list[str]) -> Iterator[str]:
        svg = _charts.as_svg(self.pictures[picture], f"{self._name}-{picture}")
        yield from figure(svg, label, " ".join(map(html.escape, captions)), self.legend(picture))

    def legend(self, picture: str) -> list[tuple[str, str]]:
        """What the colours of a picture are."""
        timeline, migration = self._timeline, self._migration
        if picture == "pause":
            there = {part.side for part in self._parts}
            return [(side, word) for side, word in _SIDE_WORDS.items() if side in there]
        if picture == "latency":
            return [(stage, _STAGE_WORDS[stage]) for stage in STAGES if stage in self._stages]
        assert timeline is not None
        if picture == "residency":
            legend = [("raster", self._there)]
            if timeline.faults is not None:
                count = len(timeline.faults.us)
                which = f"the {grouped(count)}" if timeline.every == 1 else f"one of {timeline.every}"
                legend.append(("demand", f"{which} accesses that waited"))
                if count >= 100:
                    legend.append(("slow", "the slowest 1 % of them"))
            return legend
        page_bytes = migration.number("ram", "page-size") or 4096
        words = _KIND_WORDS | ({"zero": "zero, never read"} if migration.is_vm else {})
        counts = {kind: float(timeline.pages[kind][-1]) for kind in reversed(KINDS) if kind in timeline.pages}
        legend = [
            (kind, f"{words[kind]}: {grouped(count)} pages ({size_of(count * page_bytes)})")
            for kind, count in counts.items()
            if count
        ]
        there = {span.kind for span in self._spans}
        return legend + [
            (kind, word)
            for kind, word in (("pause", "the pause"), ("cut", "cut, since it was noticed"))
            if kind in there
        ]

    @property
    def _there(self) -> str:
        return "was there" if self._migration.main.name != "source" else "had been sent"

    def _over_time(self) -> Iterator[str]:
        yield "<h2>Over time</h2>"
        migration, timeline = self._migration, self._timeline
        if timeline is None:
            yield (
                "<p class=missing>No timeline is among these lines, so there are no pictures over time. One is written"
                " at the end of a migration that has reached the other side, by a process that was started with"
                " <code>--json</code> or <code>--report</code>.</p>"
            )
            return
        if "over-time" not in self.pictures:
            few = "one moment only" if len(timeline.at_ms) < 2 else "no page, no byte and no operation of the guest"
            yield f"<p class=missing>The timeline has {few}, so there is nothing to draw over time.</p>"
            return
        captions = []
        total, page_bytes = migration.number("ram", "total"), migration.number("ram", "page-size") or 4096
        pages = sum(float(timeline.pages[kind][-1]) for kind in KINDS if kind in timeline.pages)
        if total and pages * page_bytes > total:
            captions.append(
                f"The dashed line is the memory ({size_of(total)}): pages that were written after they had been sent"
                " came again."
            )
        if "duplicate" in timeline.pages and (twice := timeline.pages["duplicate"][-1]):
            captions.append(f"{grouped(twice)} pages arrived a second time and were dropped.")
        captions.append(_words.speed(migration))
        if self._guest is not None:
            before, least = _charts.si(self._guest.before), _charts.si(self._guest.least)
            captions.append(
                f"The guest did {before} operations a second before, and {least} at its lowest (mean of"
                f" {WINDOW_MS / 1e3:g} s)."
            )
        elif len(migration.sides) == 1 and _charts.operations(migration):
            captions.append("Of the guest's operations only those on this host are known.")
        whole_ms = float(timeline.at_ms[-1] - timeline.at_ms[0])
        if self._clock.length_ms < 0.9 * whole_ms:
            captions.append(
                f"{ms(whole_ms)} were recorded; shown is the part in which pages were transferred, and some time"
                " around it."
            )
        if len(migration.timelines) > 1 and not migration.one_host:
            captions.append("The times of the two sides are aligned by the wall clocks of two hosts, which may differ.")
        if migration.main.name == "source":
            captions.append(
                "Pages and bytes are those that were sent; only the destination knows when they were placed."
            )
        yield from self._drawn("over-time", "Pages, throughput, guest and waiting threads over time", captions)

    def _pause(self) -> Iterator[str]:
        migration, sides = self._migration, {part.side for part in self._parts}
        if migration.is_vm:
            return
        yield "<h2>The pause</h2>"
        if "pause" not in self.pictures:
            why = "The stages of a pause are not among these lines."
            if not migration.runs:
                why = "An image does not run, so nothing was paused."
            elif not migration.number("downtime-ms") and _words.status_of(migration) not in _words.GOOD:
                why = "There was no switchover: the machine did not begin to run at the destination."
            yield f"<p class=missing>{why}</p>"
            return
        captions = ["From the request to pause until the destination said that the machine runs there."]
        if sides == {"dest"}:
            captions = ["What the destination did in it, one after the other; the rest only the source knows."]
        elif len(sides) == 2:
            captions.append(
                "The destination's parts, by its own clock, lie within the source's part above them; their exact place"
                " there is not known."
            )
        yield from self._drawn("pause", "The stages of the pause", captions)

    def _residency(self) -> Iterator[str]:
        timeline = self._timeline
        if timeline is None or "residency" not in self.pictures:
            return
        yield f"<h2>Residency: which part of the memory {self._there}</h2>"
        captions = []
        if len(timeline.blocks) > 1:
            names = ", ".join(f"{label} {size_of(size)}" for label, size, _ in timeline.blocks[:8])
            captions.append(f"Blocks, from below: {names}{', ...' if len(timeline.blocks) > 8 else ''}.")
        yield from self._drawn("residency", "Residency of the memory over time, and faults", captions)

    def _waits(self) -> Iterator[str]:
        stages, latency = self._stages, self._latency
        yield "<h2>Fault latency</h2>"
        if self._migration.dest is None:
            yield "<p class=missing>Only the destination knows it, and its lines are not among these.</p>"
            return
        if not latency.get("count"):
            what = "No access met a missing page" if latency else "These lines have no latencies"
            yield f"<p class=missing>{what}, so there is nothing to draw.</p>"
            return
        known = [stage for stage in STAGES if stage in stages]
        if "latency" in self.pictures:
            yield from self._drawn("latency", "Fault latency by stage, percentiles", [])
        elif latency["count"] == 1:
            yield f"<p class=missing>One access waited, for {us(latency['max'])}: a distribution needs more.</p>"
        if known:
            header = ("stage", "faults", "p50", "p90", "p99", "p99.9", "max")
            yield from table(header, [_row(_STAGE_WORDS[stage], stages[stage]) for stage in known])
        if {"sent", "total"} <= stages.keys() and stages["sent"].count < stages["total"].count:
            yield (
                "<p class=note>A thread whose page came without a request of its own, as by background push, is counted"
                " in the last line only.</p>"
            )
        blocked = _words.blocktimes(self._migration)
        if len(blocked) > 1:
            yield f"<p class=note>Each vCPU waited, in order: {', '.join(map(ms, blocked[:64]))}.</p>"

    def _what_happened(self) -> Iterator[str]:
        if not self._marks:
            return
        yield "<h2>Events</h2>"
        known = _VM_MARK_WORDS if self._migration.is_vm else _MARK_WORDS
        rows = [
            (_moment(mark.at_ms - (self._begun_ms or 0.0)), esc(known.get(mark.what, mark.what)), esc(mark.text))
            for mark in self._marks
        ]
        yield from table(("after", "what", ""), rows, numbers_from=9)

    def _circumstances(self) -> Iterator[str]:
        yield "<h2>Machine, options, versions</h2>"
        yield from table(("", ""), list(self._machine()), numbers_from=9)
        sides = [side for side in _words.sides_of(self._migration) if side.run]
        if not sides:
            yield "<p class=missing>These lines do not say which host and which version it was.</p>"
        together = len(sides) == 2 and sides[0].run == sides[1].run
        for side in sides[:1] if together else sides:
            who = {"source": "Source", "dest": "Destination"}.get(side.name, "Pager")
            yield f"<h3>{'Both sides' if together else who}</h3>"
            yield from table(("", ""), _of_run(side.run), numbers_from=9)

    def _machine(self) -> Iterator[tuple[str, str]]:
        yield "machine", esc(_words.title(self._migration))
        blocks = self._timeline.blocks if self._timeline is not None else []
        if blocks:
            sizes = {page for _, _, page in blocks}
            of = {page: f" in pages of {size_of(page)}" if page else "" for page in sizes}
            shown = [f"{esc(name)} {size_of(size)}{of[page] * (len(sizes) > 1)}" for name, size, page in blocks[:16]]
            yield "memory", ", ".join(shown) + ", ..." * (len(blocks) > 16) + of[blocks[0][2]] * (len(sizes) == 1)
        if peer := self._migration.text("peer"):
            yield "peer", esc(peer)
        facts = self._migration.main.facts
        if isinstance(encrypted := facts.get("encrypted"), bool):
            yield "encrypted", "by TLS" if encrypted else "no"
        if where := text_of(object_of(facts.get("pager")).get("where")):
            yield "pager", "in a process of its own" if where == "process" else f"in a {esc(where)}"


def _strip(parts: list[tuple[str, float, str, str]]) -> Iterator[str]:
    """A bar of parts, and what they are: colour, length, the length in words, what it is."""
    whole = sum(length for _, length, _, _ in parts) or 1.0
    yield "<div class=strip aria-hidden=true>"
    for colour, length, _, _ in parts:
        yield f'<i style="flex-grow:{max(length / whole, 0.004):.4f};background:var(--{colour})"></i>'
    yield "</div><ul class=legend>"
    for colour, _, words, what in parts:
        yield f'<li><i style="background:var(--{colour})"></i><b>{words}</b> {what}</li>'
    yield "</ul>"


def _row(label: str, histogram: Histogram) -> tuple[str, ...]:
    percentiles = (us(histogram.percentile(percent)) for percent in (50, 90, 99, 99.9))
    return (label, grouped(histogram.count), *percentiles, us(histogram.max_us))


def _moment(at_ms: float) -> str:
    """One of several that may be less than a millisecond apart."""
    return unbroken(f"{at_ms / 1e3:,.4f} s" if at_ms < 600e3 else f"{at_ms / 1e3:,.1f} s")


def _of_run(run: Json) -> Iterator[tuple[str, str]]:
    yield "command", esc(f"postcopy {text_of(run.get('command'))}, version {text_of(run.get('version'))}")
    if started := text_of(run.get("started")):
        yield "started", esc(started)
    for name, value in object_of(run.get("options")).items():
        yield f"--{esc(name)}", esc(value)
    host = object_of(run.get("host"))
    for name, value in host.items():
        if isinstance(value, str | int | float):
            yield esc(_HOST_WORDS.get(name, name.replace("-", " "))), esc(_of_host(name, value))


def _of_host(name: str, value: str | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    size = number_of(value) if name in ("memory", "page-size") else None
    return f"{value:.3g}" if isinstance(value, float) else text_of(value) if size is None else size_of(size)
