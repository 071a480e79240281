# SPDX-License-Identifier: Apache-2.0
"""What the live view shows of progress, in a terminal of a given size: rows of styled words, and no I/O.

Calm: what a row has is decided by the size alone, and each number keeps the width that it had at its widest, so that
nothing moves to the side. What has no room is left out: fields from the end of a row, rows by their weight.

Names, words and numbers may come from another process, or another host: `clean` bounds them, and every row goes through
`fit`, after which it has no control character and is not wider than the terminal.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from rich.cells import cell_len, set_cell_size

from postcopy.output._view import View, count_machines
from postcopy.output._writer import in_encoding
from postcopy.output.tables import GAP, Row, Span, row
from postcopy.output.words import (
    Rate,
    arrived_bytes,
    format_count,
    format_duration,
    format_speed,
    format_whole_seconds,
    in_round,
    phase,
)
from postcopy.records import Json
from postcopy.records.migration import LOST
from postcopy.records.timeline import DIGITS
from postcopy.units import format_size

_LABEL_WIDTH = 8
_LEAST_GRAPH = 8
_MOST_BAR = 48
_MOST_MAP = 128
_HISTORY_PERIOD_S = 0.5
_HISTORY = 120  # of a minute
_NAME_WIDTHS = (8, 24)
_DETAIL_ROWS = 11
_LEAST_LIST = 3
_MOST = 2**62
_MOST_CHARS = 300
_MOST_ITEMS = 1000
_DEPTH = 6
_SIZE_WIDTH, _COUNT_WIDTH, _TIME_WIDTH = 10, 6, 7  # of numbers, as long as none was wider
_LEVELS = {digit: number for number, digit in enumerate(DIGITS)}


@dataclass(frozen=True)
class Glyphs:
    """The characters of pictures; each is one cell wide."""

    encoding: str = "utf-8"
    shades: str = "·░▒▓█"
    heights: str = "▁▂▃▄▅▆▇█"
    cut: str = "…"
    chosen: str = "▸"

    @classmethod
    def of(cls, encoding: str) -> Glyphs:
        """Those that the encoding has, all or none."""
        glyphs = cls(encoding)
        try:
            (glyphs.shades + glyphs.heights + glyphs.cut + glyphs.chosen).encode(encoding)
        except UnicodeEncodeError:
            return cls(encoding, ".-+*#", "_.:-=+*#", "~", ">")
        return glyphs


def clean(value: Any, depth: int = _DEPTH) -> Any:
    """Numbers, texts and lists of a record within bounds, and numbers not negative."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return max(0, min(_MOST, value))
    if isinstance(value, float):
        return max(0.0, min(float(_MOST), value)) if math.isfinite(value) else 0.0
    if isinstance(value, str):
        return value[:_MOST_CHARS]
    if isinstance(value, dict) and depth:
        return {key: clean(part, depth - 1) for key, part in value.items()}
    return [clean(part, depth - 1) for part in value[:_MOST_ITEMS]] if isinstance(value, list) and depth else None


def fit(cells: Row, width: int, glyphs: Glyphs) -> Row:
    """Printable, in the encoding of the terminal, cut at `width`, and with no blanks at the end, which a terminal that
    is made narrower would take to another row."""
    fitted: list[Span] = []
    left = width
    spans = [span for cell in cells for span in cell]
    while spans and not spans[-1].text.strip():
        spans.pop()
    for span in spans:
        text = span.text
        if not text.isprintable():
            text = "".join(char if char.isprintable() else " " for char in text)
        text = in_encoding(text, glyphs.encoding)
        wide = cell_len(text)
        if wide > left:
            text = set_cell_size(text, max(0, left - 1)) + glyphs.cut * (left > 0)
            wide = left
        left -= wide
        if text:
            fitted.append(Span(text, span.kind))
    return (tuple(fitted),)


@dataclass
class _Past:
    """What has to be remembered of one migration."""

    widths: dict[str, int] = field(default_factory=dict)
    rates: dict[str, Rate] = field(default_factory=dict)
    rate: float = 0.0  # bytes a second
    operations: float = 0.0  # of the guest, a second
    history: deque[float | None] = field(default_factory=lambda: deque(maxlen=_HISTORY))  # p99; None: no fault
    sampled_s: float = -math.inf
    latency: Json = field(default_factory=dict)  # of the last moment in which there was a fault

    def look(self, job: Json, now_s: float) -> None:
        ram, guest = job.get("ram") or {}, job.get("guest") or {}
        self.rate = self._rate("bytes", ram.get("transferred") or arrived_bytes(ram) or 0, now_s)
        self.operations = self._rate("operations", guest.get("operations") or 0, now_s)
        if _moves(job) and (recent := job.get("recent")) and now_s - self.sampled_s >= _HISTORY_PERIOD_S:
            self.sampled_s = now_s
            self.history.append(recent["p99"] if recent["count"] else None)
        if (latency := job.get("recent") or {}).get("count"):
            self.latency = latency

    def _rate(self, name: str, value: int, now_s: float) -> float:
        return self.rates.setdefault(name, Rate()).of(value, now_s)

    def wide(self, name: str, text: str, least: int = 0) -> str:
        """On the right of as many cells as it ever had."""
        self.widths[name] = width = max(self.widths.get(name, least), len(text))
        return text.rjust(width)


class _Line(NamedTuple):
    """A row about one thing. Fields that have no room are left out, from the end; a graph takes what is left."""

    weight: int  # the least is shown first
    label: str
    fields: list[Span]
    graph: Callable[[int], Sequence[Span]] | None = None
    label_kind: str = "muted"

    def row(self, width: int) -> Row:
        spans = [Span(self.label.ljust(_LABEL_WIDTH) + " ", self.label_kind)]
        used = _LABEL_WIDTH + 1
        for number, each in enumerate(self.fields):
            wide = cell_len(each.text) + GAP * (number > 0)
            if number and used + wide > width:
                return row(spans)
            spans += [Span(" " * GAP)] * (number > 0) + [each]
            used += wide
        room = width - used - GAP * bool(self.fields)
        if self.graph is not None and room >= _LEAST_GRAPH:
            spans += [Span(" " * GAP)] * bool(self.fields) + list(self.graph(room))
        return row(spans)


class _Item(NamedTuple):
    """A machine of a process, or a virtual machine of a pager."""

    name: str
    memory: int
    state: str
    job: Json  # its migration, as progress has it; with the status "" where it is in none
    hit_rate: float | None = None

    @property
    def moving(self) -> bool:
        return _moves(self.job)

    @property
    def key(self) -> tuple[str, str]:
        return self.name, str(self.job.get("migration-id"))


class _Column(NamedTuple):
    weight: int  # the least is shown first
    header: str
    width: int  # 0: what is left
    text: Callable[[_Item, _Past], str | Span]
    right: bool = True


class Frames:
    """Of one process, one after the other."""

    def __init__(self, view: View, glyphs: Glyphs) -> None:
        self._view = view
        self._glyphs = glyphs
        self._began_s = time.monotonic()
        self._pasts: dict[tuple[str, str], _Past] = {}
        self._name_width = _NAME_WIDTHS[0]
        self._looked_at: Json | None = None
        self._items_of_last: list[_Item] = []
        self._chosen, self._place, self._top = "", 0, 0
        self._names: list[str] = []

    # ---- below the lines of a command

    def below(self, now: Json, width: int, height: int) -> list[Row]:
        """At most `height` rows."""
        fresh, self._looked_at = now is not self._looked_at, now
        if "machines" in now or "vms" in now:
            items = self._items(now, fresh)
            rows = [row(_title(now))]
            room = height - len(rows) - 1
            shown = items if len(items) <= room else sorted(items, key=lambda item: not item.moving)[: max(0, room - 1)]
            if shown:
                rows += self._table(shown, width, vms="vms" in now)
            if len(shown) < len(items):
                rows.append(row(Span(f"and {len(items) - len(shown)} more", "muted")))
        else:
            now = {"elapsed-ms": 1e3 * (time.monotonic() - self._began_s), **clean(now)}
            key = (str(now["side"]), str(now.get("name")))
            past = self._pasts.setdefault(key, _Past())
            if fresh:
                past.look(now, time.monotonic())
            lines = [_Line(0, str(now.get("name", now["side"])), [_phase(now)], label_kind="strong")]
            if self._view.subject:
                lines.append(_Line(9, "machine", [Span(self._view.subject)]))
            rows = _rows(lines + self._lines(now, past), width, height)
        return [fit(cells, width, self._glyphs) for cells in rows[:height]]

    def plain(self, now: Json, width: int) -> list[str]:
        """All machines, as lines of a file."""
        vms = "vms" in now
        items = self._items(now, fresh=now is not self._looked_at)
        self._looked_at = now
        rows = [row(_title(now)), *(self._table(items, width, vms=vms) if items else ())]
        return ["".join(span.text for cell in fit(cells, width, self._glyphs) for span in cell) for cells in rows]

    # ---- a whole terminal

    def whole(self, now: Json, width: int, height: int, note: str = "", keys: bool = True) -> list[Row]:
        """All machines, and what is known of the chosen one. `note`: what is wrong, in a line."""
        fresh, self._looked_at = now is not self._looked_at, now
        items = self._items(now, fresh)
        self._choose(items)
        footer = Span(note, "warn") if note else Span("up, down: choose   q: leave" if keys else "", "muted")
        has_footer = bool(footer.text) and height > 2
        room = max(0, height - 2 - has_footer)
        details = max(0, min(_DETAIL_ROWS, room - min(len(items), max(_LEAST_LIST, room // 2))))
        listed = min(len(items), room - details)
        self._top = max(0, min(max(self._top, self._place - listed + 1), self._place, len(items) - listed))
        shown = items[self._top : self._top + listed]
        side, counted = _title(now)
        if listed < len(items):
            counted = Span(f"  {self._top + 1} to {self._top + listed} of{counted.text[1:]}")
        rows = [row((side, counted))]
        if shown:
            rows += self._table(shown, width, vms="vms" in now, chosen=self._chosen)
        if items and details > 1:
            item = items[self._place]
            said = _phase(item.job) if item.job["status"] else Span(item.state)
            lines = [_Line(0, item.name, [said], label_kind="strong")]
            lines += self._lines(item.job, self._pasts[item.key])
            rows += [row(""), *_rows(lines, width, details - 1)]
        if has_footer:
            rows += [row("")] * (height - 1 - len(rows)) + [row(footer)]
        return [fit(cells, width, self._glyphs) for cells in rows[:height]]

    def press(self, key: str, height: int) -> None:
        """A key that moves the choice."""
        page = max(1, height // 2)
        last = len(self._names) - 1
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -page, "page down": page, "home": -last, "end": last}
        if self._names:
            self._place = max(0, min(last, self._place + steps.get(key, 0)))
            self._chosen = self._names[self._place]

    def _choose(self, items: list[_Item]) -> None:
        """The same one as before, where it is still there, else what is in its place; at first one that migrates."""
        names = self._names = [item.name for item in items]
        if not self._chosen:
            self._chosen = next((item.name for item in items if item.moving), "")
        if self._chosen in names:
            self._place = names.index(self._chosen)
        self._place = max(0, min(self._place, len(names) - 1))
        self._chosen = names[self._place] if names else ""

    # ---- of one migration

    def _lines(self, now: Json, past: _Past) -> list[_Line]:
        """`now` is clean."""
        side, status = str(now["side"]), str(now["status"])
        ram, guest = now.get("ram") or {}, now.get("guest") or {}
        arrived, total = arrived_bytes(ram), ram.get("total") or 0
        lines = []
        if now.get("error"):
            lines.append(_Line(1, "error", [Span(str(now["error"]), "bad")]))
        if arrived is not None:
            share = arrived / total
            sizes = f"{past.wide('arrived', format_size(arrived), _SIZE_WIDTH)} of {format_size(total)}"
            percent = Span(f"{math.floor(100 * share):3d} %", "strong")
            lines.append(_Line(1, "memory", [percent, Span(sizes)], lambda room: self._bar(share, room)))
        if residency := str(ram.get("residency") or ""):
            lines.append(_Line(2, "map", [], lambda room: self._map(residency, room)))
        if ram.get("transferred"):
            fields = [Span(past.wide("transferred", format_size(ram["transferred"]), _SIZE_WIDTH) + " transferred")]
            if past.rate or "rate" in past.widths:
                fields.append(Span(past.wide("rate", format_speed(past.rate), _SIZE_WIDTH + 2)))
            lines.append(_Line(3, "network", fields))
        if now.get("elapsed-ms") is not None:
            elapsed = past.wide("elapsed", format_whole_seconds(now["elapsed-ms"] / 1e3), _TIME_WIDTH)
            fields = [Span(f"{elapsed} elapsed")]
            if past.rate and arrived is not None and arrived < total:
                left = past.wide("left", format_whole_seconds(min(_MOST, (total - arrived) / past.rate)))
                fields.append(Span(f"about {left} remaining"))
            lines.append(_Line(5, "time", fields))
        counts = {name: ram.get(f"{name}-pages") for name in _PAGES}
        if any(counts.values()):
            pages = [
                Span(f"{past.wide(name, str(count), _COUNT_WIDTH)} {words}")
                for name, words in _PAGES.items()
                if (count := counts[name]) is not None and (count or name in ("demand", "background"))
            ]
            lines.append(_Line(6, "pages", pages))
        if fields := self._faults(now, past):
            lines.append(_Line(4, "faults", fields, lambda room: self._heights(past.history, room)))
        gone = side == "source" and status.startswith(("postcopy", "completed"))
        if guest.get("operations") and not gone:
            fields = [Span(past.wide("state", str(guest.get("state"))))]
            if guest.get("failures"):
                fields.append(Span(format_count(guest["failures"], "FAILURE"), "bad"))
            fields.append(Span(past.wide("a second", f"{past.operations:.0f}", _COUNT_WIDTH) + " operations/s"))
            fields.append(Span(past.wide("operations", str(guest["operations"])) + " operations"))
            lines.append(_Line(7, "guest", fields))
        if (recoveries := now.get("recoveries") or {}).get("count"):
            longest = format_duration(recoveries["max-ms"] / 1e3)
            times = format_count(recoveries["count"], "time")
            lines.append(_Line(8, "lost", [Span(f"the connection {times}, for {longest} at most")]))
        return lines

    @staticmethod
    def _faults(now: Json, past: _Past) -> list[Span]:
        fields = []
        latency = past.latency or now.get("fault-latency-us") or {}
        if latency.get("count"):
            fields += [
                Span(f"{name} {past.wide(name, format_duration(latency[key] / 1e6), _TIME_WIDTH)}")
                for name, key in (("median", "p50"), ("99 %", "p99"))
            ]
        waiting = now.get("pending-faults")
        if waiting is not None and (waiting or (latency.get("count") and _moves(now))):
            text = past.wide("waiting", str(waiting), 2) + (" thread waits " if waiting == 1 else " threads wait")
            fields.append(Span(text, "warn" if waiting else "plain"))
        return fields

    # ---- of many

    def _items(self, now: Json, fresh: bool) -> list[_Item]:
        """Those of a process, and what is remembered of them."""
        if not fresh:
            return self._items_of_last
        vms = "vms" in now
        items = [(_vm if vms else _machine)(clean(each)) for each in now["vms" if vms else "machines"]]
        self._items_of_last = items
        self._pasts = {item.key: self._pasts.get(item.key) or _Past() for item in items}
        now_s = time.monotonic()
        for item in items:
            self._pasts[item.key].look(item.job, now_s)
        longest = max((cell_len(item.name) for item in items), default=0)
        self._name_width = max(self._name_width, min(longest, _NAME_WIDTHS[1]))
        return items

    def _table(self, items: list[_Item], width: int, *, vms: bool, chosen: str | None = None) -> list[Row]:
        mark = 2 if chosen is not None else 0
        name_width = min(self._name_width, max(_NAME_WIDTHS[0], width // 3))
        room = width - mark - name_width
        taken = []
        for column in sorted(_OF_VM if vms else _OF_MACHINE, key=lambda column: column.weight):
            need = GAP + (column.width or _LEAST_GRAPH)
            if need <= room:
                taken.append(column)
                room -= need
        columns = [column for column in (_OF_VM if vms else _OF_MACHINE) if column in taken]
        map_width = min(64, _LEAST_GRAPH + room)
        header = " " * mark + set_cell_size("machine", name_width)
        for column in columns:
            size = column.width or map_width
            header += " " * GAP + (column.header.rjust(size) if column.right else column.header.ljust(size))
        rows = [row(Span(header.rstrip(), "muted"))]
        for item in items:
            past = self._pasts[item.key]
            is_chosen = item.name == chosen
            name = self._cell(Span(item.name, "strong" if is_chosen else "plain"), name_width, right=False)
            spans = [Span((self._glyphs.chosen + " " if is_chosen else "  ")[:mark], "strong"), *name]
            for column in columns:
                spans.append(Span(" " * GAP))
                if column.width:
                    said = column.text(item, past)
                    cell = said if isinstance(said, Span) else Span(said)
                    spans += self._cell(cell, column.width, right=column.right)
                else:
                    residency = str((item.job.get("ram") or {}).get("residency") or "")
                    spans += self._map(residency, map_width, padded=True)
            rows.append(row(spans))
        return rows

    def _cell(self, span: Span, width: int, *, right: bool) -> list[Span]:
        (fitted,) = fit(row(span), width, self._glyphs)
        blanks = Span(" " * (width - sum(cell_len(part.text) for part in fitted)))
        return [blanks, *fitted] if right else [*fitted, blanks]

    # ---- graphs

    def _bar(self, share: float, room: int) -> list[Span]:
        cells = min(_MOST_BAR, room)
        full = min(cells, math.floor(cells * share))
        return [Span(self._glyphs.shades[-1] * full, "good"), Span(self._glyphs.shades[0] * (cells - full), "muted")]

    def _map(self, residency: str, room: int, *, padded: bool = False) -> list[Span]:
        """Each bin is as many cells as there is room for, at most two; where there is none, several are one cell."""
        levels = [_LEVELS.get(digit, 0) for digit in residency[:_MOST_MAP]]
        if not levels:
            return [Span(" " * room)] if padded else []
        room, bins = min(room, _MOST_MAP), len(levels)
        count = bins * (room // bins) or room
        edges = [number * bins / count for number in range(count + 1)]
        cells = [
            self._shade(levels[math.floor(first) : max(math.floor(first) + 1, math.floor(last))])
            for first, last in pairwise(edges)
        ]
        spans = [
            Span("".join(same), "muted" if shade == self._glyphs.shades[0] else "good")
            for shade, same in groupby(cells)
        ]
        return [*spans, Span(" " * (room - len(cells)))] if padded else spans

    def _shade(self, levels: list[int]) -> str:
        """Only what is whole looks whole, and only what is empty looks empty."""
        most = len(_LEVELS) - 1
        level, inner = sum(levels) / len(levels), len(self._glyphs.shades) - 2
        if level in (0, most):
            return self._glyphs.shades[0 if level == 0 else -1]
        return self._glyphs.shades[1 + min(inner - 1, math.floor(inner * level / most))]

    def _heights(self, history: deque[float | None], room: int) -> list[Span]:
        """On a logarithmic scale, from and to a power of two, so that it seldom changes."""
        values = [math.log2(max(1.0, value)) for value in history if value is not None]
        if not values:
            return []
        low = math.floor(min(values))
        high = max(low + 3, math.ceil(max(values)))
        steps = len(self._glyphs.heights)

        def height(value: float) -> str:
            share = (math.log2(max(1.0, value)) - low) / (high - low)
            return self._glyphs.heights[min(steps - 1, math.floor(steps * share))]

        return [Span("".join(" " if value is None else height(value) for value in list(history)[-room:]))]


_PAGES = {
    "demand": "on demand",
    "background": "in background",
    "prefetched": "prefetched",
    "zero": "zero",
    "duplicate": "twice",
}


def _rows(lines: list[_Line], width: int, height: int) -> list[Row]:
    """In their order; where there is no room for all, those of the least weight."""
    if len(lines) > height:
        kept = sorted(range(len(lines)), key=lambda number: lines[number].weight)[: max(0, height)]
        lines = [lines[number] for number in sorted(kept)]
    return [line.row(width) for line in lines]


def _title(now: Json) -> tuple[Span, Span]:
    counted = format_count(len(now["vms"]), "virtual machine") if "vms" in now else count_machines(now)
    return Span(str(now["side"]), "strong"), Span(f"  {counted}")


def _phase(now: Json) -> Span:
    return Span(phase(now) if now["side"] != "pager" else str(now["status"]), _kind(str(now["status"])))


def _moves(job: Json) -> bool:
    """Whether it has not ended."""
    return str(job["status"]).startswith(("connecting", "setup", "active", "in-doubt", "postcopy", "serving"))


def _kind(status: str) -> str:
    if status in LOST or status in ("postcopy-recover", "cancelled"):
        return "warn"
    if status in ("failed", "postcopy-failed", "lost"):
        return "bad"
    return "good" if status in ("completed", "complete", "reclaimed") else "plain"


def _machine(machine: Json) -> _Item:
    job, guest = machine.get("migration") or {"side": "", "status": ""}, machine.get("guest") or {}
    name = str(machine["name"])
    return _Item(name, machine.get("memory") or 0, str(guest.get("state", "")), job | {"guest": guest, "name": name})


def _vm(vm: Json) -> _Item:
    memory = vm["memory"]
    counted = {key: vm.get(key) for key in (*(f"{name}-pages" for name in _PAGES), "page-size", "residency")}
    ram = counted | {"total": memory, "remaining": max(0, memory - vm["resident"])}
    job = {"side": "pager", "ram": ram, **{key: vm.get(key) for key in _SAME_IN_VM}}
    return _Item(str(vm["name"]), memory, "", job, (vm.get("working-set") or {}).get("hit-rate"))


_SAME_IN_VM = ("status", "error", "elapsed-ms", "pending-faults", "fault-latency-us", "recent")


def _of_status(item: _Item, past: _Past) -> Span:
    status = str(item.job["status"])
    copying = in_round(status, item.job.get("ram") or {}).partition(":")[0]
    return Span(copying or status, _kind(status)) if status else Span(item.state, "muted")


def _of_arrived(item: _Item, past: _Past) -> str:
    arrived = arrived_bytes(ram := item.job.get("ram") or {})
    return f"{math.floor(100 * arrived / ram['total'])} %" if arrived is not None else ""


def _of_left(item: _Item, past: _Past) -> str:
    arrived = arrived_bytes(ram := item.job.get("ram") or {})
    if not item.moving or arrived is None or not past.rate:
        return ""
    return format_whole_seconds(min(_MOST, (ram["total"] - arrived) / past.rate))


def _of_waiting(item: _Item, past: _Past) -> Span:
    waiting = item.job.get("pending-faults")
    return Span(str(waiting or "" if item.moving else ""), "warn")


def _of_latency(item: _Item, past: _Past) -> str:
    latency = past.latency or item.job.get("fault-latency-us") or {}
    return format_duration(latency["p99"] / 1e6) if latency.get("count") else ""


_MEMORY = _Column(6, "memory", 9, lambda item, _: format_size(item.memory) if item.memory else "")
_STATUS = _Column(0, "status", 16, _of_status, right=False)
_ARRIVED = _Column(1, "arrived", 7, _of_arrived)
_MAP = _Column(4, "map", 0, lambda *_: "", right=False)
_RATE = _Column(2, "rate", 12, lambda item, past: format_speed(past.rate) if item.moving and past.rate else "")
_LEFT = _Column(5, "remaining", 10, _of_left)
_WAITING = _Column(7, "waiting", 7, _of_waiting)
_P99 = _Column(3, "fault p99", 9, _of_latency)
_OF_MACHINE = (
    _MEMORY,
    _STATUS,
    _Column(9, "way", 8, lambda item, _: str(item.job.get("direction") or ""), right=False),
    _ARRIVED, _MAP, _RATE, _LEFT, _WAITING, _P99,
)  # fmt: skip
_OF_VM = (
    _MEMORY, _STATUS, _ARRIVED, _MAP, _RATE, _WAITING, _P99,
    _Column(8, "hit rate", 8, lambda item, _: f"{item.hit_rate:.0f} %" if item.hit_rate is not None else ""),
)  # fmt: skip
