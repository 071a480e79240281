# SPDX-License-Identifier: Apache-2.0
"""What the live view shows, whatever the size of the terminal and whatever is in a record."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from postcopy.output import _frame
from postcopy.output._frame import Frames, Glyphs
from postcopy.output._view import View
from postcopy.output.tables import Row
from postcopy.records.timeline import DIGITS

MIB = 1 << 20
RAM = {
    "total": 64 * MIB, "remaining": 16 * MIB, "transferred": 48 * MIB, "page-size": 4096, "demand-pages": 1234,
    "background-pages": 11000, "zero-pages": 54, "duplicate-pages": 0, "residency": "/" * 40 + "gQB" + "A" * 21,
}  # fmt: skip
NOW = {
    "side": "dest", "status": "postcopy-active", "error": None, "ram": RAM, "pending-faults": 2,
    "guest": {"state": "running", "operations": 123456, "failures": 0}, "elapsed-ms": 12000.0,
    "fault-latency-us": {"count": 1234, "p50": 71.0, "p99": 219.0, "p99.9": 1300.0, "max": 4000.0},
    "recent": {"interval-ms": 500.0, "count": 9, "p50": 65.0, "p99": 130.0},
    "recoveries": {"count": 2, "last-ms": 20.0, "max-ms": 412.0, "total-ms": 432.0},
}  # fmt: skip
VM = {
    "name": "db.mem.71", "pid": 71, "status": "serving", "error": None, "image": "db.mem", "socket": "/run/db.sock",
    "elapsed-ms": 900.0, "memory": 64 * MIB, "page-size": 4096, "resident": 16 * MIB, "faults": 512,
    "pending-faults": 1, "demand-pages": 500, "prefetched-pages": 3500, "background-pages": 0, "zero-pages": 96,
    "residency": "/" * 16,
    "fault-latency-us": {"count": 512, "p50": 71.0, "p99": 219.0}, "working-set": {"hit-rate": 87.5},
}  # fmt: skip


def machine(name: str, job: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"name": name, "kind": "rv64", "memory": 64 * MIB, "guest": NOW["guest"], "migration": job}


def process(count: int, moving: int = 0) -> dict[str, Any]:
    job = NOW | {"direction": "incoming", "migration-id": "ff"}
    machines = [machine(f"vm{number}", job if number >= count - moving else None) for number in range(count)]
    return {"side": "daemon", "pid": 7, "listening": [], "settings": {}, "machines": machines}


def pager(*vms: dict[str, Any]) -> dict[str, Any]:
    return {"side": "pager", "pid": 7, "listening": [], "vms": list(vms)}


def frames(encoding: str = "utf-8", subject: str = "") -> Frames:
    return Frames(View(subject), Glyphs.of(encoding))


def written(rows: list[Row]) -> list[str]:
    return ["".join(span.text for cell in cells for span in cell) for cells in rows]


# ---- what is there


def test_one_migration() -> None:
    assert written(frames(subject="rv64, 64 MiB").below(NOW, 79, 22)) == [
        "dest     fetching pages; the machine runs here",
        "machine  rv64, 64 MiB",
        "memory    75 %      48 MiB of 64 MiB  ██████████████████████████████···········",
        "map      ████████████████████████████████████████▒░░·····················",
        "network      48 MiB transferred",
        "time        12 s elapsed",
        "pages      1234 on demand   11000 in background      54 zero",
        "faults   median   65 µs  99 %  130 µs   2 threads wait  ▁",
        "guest    running       0 operations/s  123456 operations",
        "lost     the connection 2 times, for 412 ms at most",
    ]


def test_where_there_is_little_room_what_matters_least_is_left_out() -> None:
    assert written(frames(subject="rv64, 64 MiB").below(NOW, 39, 7)) == [
        "dest     fetching pages; the machine r…",
        "memory    75 %      48 MiB of 64 MiB",
        "map      ███████████████████▒░·········",
        "network      48 MiB transferred",
        "time        12 s elapsed",
        "pages      1234 on demand",
        "faults   median   65 µs  99 %  130 µs",
    ]
    assert written(frames().below(NOW, 10, 1)) == ["dest     …"]


def test_a_terminal_without_unicode() -> None:
    text = "\n".join(written(frames("ascii", "caf\u00e9").below(NOW, 79, 22)))
    assert text.isascii()
    assert "##############################..........." in text
    assert "65 us" in text
    assert "caf\\xe9" in text


def test_a_map_tells_what_is_whole_and_what_is_empty() -> None:
    """Also where a cell stands for several parts, or a part for several cells."""
    of = frames()
    for residency, room, cells in (
        ("/" * 63 + "A", 64, "█" * 63 + "·"),
        ("/" * 63 + "A", 16, "█" * 15 + "▓"),
        ("A" * 63 + "B", 16, "·" * 15 + "░"),
        ("A/" * 32, 128, "··██" * 32),
        (DIGITS, 64, "·" + "░" * 20 + "▒" * 21 + "▓" * 21 + "█"),
        ("", 64, ""),
        ("A/" * 32, 100, "·█" * 32),
        ("/A", 9, "████····"),
    ):
        assert "".join(span.text for span in of._map(residency, room)) == cells


def test_a_whole_is_not_rounded_up() -> None:
    ram = RAM | {"remaining": 1, "residency": None}
    assert "memory    99 %" in "\n".join(written(frames().below(NOW | {"ram": ram}, 79, 22)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its only item is what the clock says."""
    time_s = [1000.0]
    monkeypatch.setattr("postcopy.output._frame.time.monotonic", lambda: time_s[0])
    return time_s


def test_nothing_moves_to_the_side(clock: list[float]) -> None:
    """Numbers that get shorter keep their place, and those that get longer have room."""
    of = frames()
    columns = set()
    for transferred, operations in ((7, 1), (48 * MIB, 999999), (1000 * MIB + 7, 1000000), (5000 * MIB, 1000900)):
        now = NOW | {"ram": RAM | {"transferred": transferred}, "guest": {"state": "running", "operations": operations}}
        text = written(of.below(now, 79, 22))
        columns.add((text[3].index("transferred"), text[-2].index("operations/s")))
        clock[0] += 10
    assert len(columns) == 1


def test_the_history_of_latency_has_an_end(clock: list[float]) -> None:
    of = frames()
    for number in range(200):
        clock[0] += 1
        recent = {"interval-ms": 500.0, "count": number % 5, "p50": 1.0, "p99": float(2 ** (number % 10))}
        text = written(of.below(copy.deepcopy(NOW) | {"recent": recent}, 79, 22))
    assert {len(past.history) for past in of._pasts.values()} == {_frame._HISTORY}
    assert text[6].endswith("  ▇██ ▁▂▃▄ ▆▇██ ▁▂▃▄ ▆▇██")  # no fault: a gap


def test_machines_of_a_process() -> None:
    assert written(frames().below(process(2, 1), 100, 22)) == [
        "daemon  2 machines, 1 migrating",
        "machine      memory  status            arrived  map                      rate   remaining  fault p99",
        "vm0          64 MiB  running",
        "vm1          64 MiB  postcopy-active      75 %  █████████▓░····                               130 µs",
    ]


def test_virtual_machines_of_a_pager() -> None:
    assert written(frames().below(pager(VM), 108, 22)) == [
        "pager  1 virtual machine",
        "machine       memory  status            arrived  map                      rate  waiting  fault p99  hit rate",
        "db.mem.71     64 MiB  serving              25 %  ███████████████                      1     219 µs      88 %",
    ]


def test_a_virtual_machine_without_memory() -> None:
    now = pager(VM | {"memory": 0, "resident": 0})
    assert "db.mem.71" in "\n".join(written(frames().below(now, 108, 22)))


def test_a_table_for_a_file() -> None:
    of, now = frames(), process(2, 1)
    title, header, *rows = of.plain(now, 160)
    assert title == "daemon  2 machines, 1 migrating"
    assert re.sub(" +", " ", header) == "machine memory status way arrived map rate remaining waiting fault p99"
    assert rows[0] == "vm0          64 MiB  running"
    assert re.fullmatch(r"vm1 +64 MiB  postcopy-active   incoming     75 %  [·░▒▓█]+ +2     130 µs", rows[1])
    assert of.plain(now, 160) == [title, header, *rows]
    assert of.plain({"side": "daemon", "machines": []}, 160) == ["daemon  0 machines, 0 migrating"]


def test_machines_that_have_no_room_are_counted() -> None:
    """Those that migrate are seen first."""
    rows = written(frames().below(process(50, 2), 79, 6))
    assert len(rows) == 6
    assert [line.split()[0] for line in rows[2:]] == ["vm48", "vm49", "vm0", "and"]
    assert rows[-1] == "and 47 more"


def test_a_choice_among_many() -> None:
    of = frames()
    now = process(50)

    def chosen() -> str:
        (line,) = (line for line in written(of.whole(now, 79, 24)) if line.startswith("▸"))
        return line.split()[1]

    assert chosen() == "vm0"
    for key, name in (
        ("down", "vm1"), ("j", "vm2"), ("k", "vm1"), ("up", "vm0"), ("up", "vm0"), ("end", "vm49"), ("down", "vm49"),
        ("page up", "vm37"), ("home", "vm0"), ("page down", "vm12"), ("x", "vm12"),
    ):  # fmt: skip
        of.press(key, 24)
        assert chosen() == name
    now = process(50, 2)
    now["machines"] = now["machines"][12:]  # it is the first one now, and still chosen
    assert chosen() == "vm12"
    now = process(50, 2)
    del now["machines"][12]  # what is in its place: it was the first one
    assert chosen() == "vm0"
    now = process(0)
    assert not any(line.startswith("▸") for line in written(of.whole(now, 79, 24)))
    of.press("down", 24)


def test_details_of_the_chosen_one() -> None:
    of = frames()
    now = process(3, 1)
    rows = written(of.whole(now, 79, 24))
    assert rows[6:9] == [
        "vm2      fetching pages; the machine runs here",
        "memory    75 %      48 MiB of 64 MiB  ██████████████████████████████···········",
        "map      ████████████████████████████████████████▒░░·····················",
    ]
    assert rows[-1] == "up, down: choose   q: leave"
    assert len(rows) == 24
    assert written(of.whole(now, 79, 24, "as it was 4 s ago: the process has ended"))[-1].startswith("as it was 4 s")


def test_what_is_chosen_is_always_seen() -> None:
    for height in range(4, 40, 3):
        of = frames()
        now = process(30, 2)
        for _ in range(30):
            rows = written(of.whole(now, 39, height))
            assert len(rows) <= height
            assert any(line.startswith("▸ " + of._chosen) for line in rows), (height, rows)
            of.press("down", height)


# ---- whatever a peer says

numbers = st.one_of(
    st.integers(min_value=-(2**70), max_value=2**70),
    st.sampled_from([10**400, -(10**400), 0, 1, 2**63]),
    st.floats(),
)
integers = st.one_of(st.integers(min_value=-(2**70), max_value=2**70), st.just(10**400), st.just(0))
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["\x1b[2J\x1b]0;title\x07", "\u202eabc", "\u4e2d" * 300, "e\u0301" * 50, "\ud800", "a\tb\r\nc", "\x9b1A"]
    ),
)
statuses = st.one_of(st.sampled_from(["active", "postcopy-active", "completed", "failed", "postcopy-paused"]), texts)


def record(required: dict[str, Any], optional: dict[str, Any]) -> Any:
    return st.fixed_dictionaries(required, optional={key: st.none() | value for key, value in optional.items()})


ram = record(
    {},
    dict.fromkeys(
        ("total", "remaining", "transferred", "page-size", "demand-pages", "background-pages", "zero-pages",
         "duplicate-pages", "prefetched-pages", "iteration", "dirty-sync-count", "dirty-pages-rate"),
        integers,
    )
    | {"residency": st.one_of(texts, st.text(DIGITS, max_size=80))},
)  # fmt: skip
latency = record({"count": integers, "p50": numbers, "p99": numbers}, {})
of_migration = {
    "attempts": integers, "ram": ram, "error": texts, "pending-faults": integers, "fault-latency-us": latency,
    "recent": latency, "recoveries": record({"count": integers, "max-ms": numbers}, {}), "elapsed-ms": numbers,
    "starts-in-ms": integers,
}  # fmt: skip
guest = record({"state": texts}, {"operations": integers, "failures": integers})
side = st.sampled_from(["source", "dest"])
progress = record({"side": side, "status": statuses}, of_migration | {"guest": guest, "name": texts})
job = record({"side": side, "status": statuses, "direction": texts, "migration-id": texts}, of_migration)
machines = st.lists(record({"name": texts, "memory": integers}, {"guest": guest, "migration": job}), max_size=5)
vms = st.lists(
    record(
        {"name": texts, "status": statuses, "memory": integers, "resident": integers, "fault-latency-us": latency},
        {"pending-faults": integers, "page-size": integers, "demand-pages": integers, "prefetched-pages": integers,
         "residency": texts, "recent": latency, "error": texts, "working-set": record({"hit-rate": numbers}, {})},
    ),
    max_size=5,
)  # fmt: skip
processes = st.one_of(
    st.fixed_dictionaries({"side": texts, "machines": machines}),
    st.fixed_dictionaries({"side": st.just("pager"), "vms": vms}),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(progress, processes), min_size=1, max_size=3), st.integers(0, 210), st.integers(0, 70), texts)
@example([NOW, NOW], 199, 58, "\x1b[2J")
@example([process(50, 3)], 39, 9, "\u4e2d" * 300)
def test_no_row_is_wider_than_the_terminal(many: list[Any], width: int, height: int, words: str) -> None:
    for encoding in ("utf-8", "ascii"):
        of = frames(encoding, words)
        for now in many:
            pictures = [of.below(now, width, height)]
            if "machines" in now or "vms" in now:
                pictures.append(of.whole(now, width, height, words))
                of.press("down", height)
            for rows in pictures:
                assert len(rows) <= height
                for line in written(rows):
                    assert cell_len(line) <= width
                    assert line.isprintable()
                    line.encode(encoding)


def test_of_many_machines_half_of_the_rows_are_a_list() -> None:
    """And of few no more than there are."""
    rows = written(frames().whole(process(50, 0), 79, 16))
    assert rows[0] == "daemon  1 to 6 of 50 machines, 0 migrating"
    assert rows[8:10] == ["", "vm0      running"]
    assert written(frames().whole(process(2, 0), 79, 16))[4:6] == ["", "vm0      running"]
