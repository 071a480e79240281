# SPDX-License-Identifier: Apache-2.0
"""Peers that lie in the rounds before the switchover, or end there: no old page is ever seen, nobody else suffers from
it, and the machine goes on where it was."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile import _wire as wire
from hostile._peer import PAGE, Closed, Destination, Listener, Machine, Neighbour, Source
from hostile._program import MIB, RV64, Control, Program, Pulse, verify, wait_until
from hostile._wire import Fields, Frame

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
Beside = Callable[[Program, Control], Neighbour]
END_S = 25.0
PRECOPY = ("--precopy", "60", "--migrate-after", "0")


@pytest.fixture(autouse=True)
def _rounds(version: int) -> None:
    if version < 4:
        pytest.skip("the program knows no rounds")


# ---- Sources


def pages_of(source: Source, block: int) -> int:
    layout = source.machine.blocks[block]
    return int(layout["size-bytes"]) // source.machine.page_bytes[block]


def page_maps(source: Source) -> None:
    for page_map in source.machine.maps:
        source.control.line.say("page-map", **page_map)


def stale_maps(source: Source, runs: Callable[[int], bytes] = wire.all_pages) -> int:
    for block in range(len(source.machine.blocks)):
        pages = pages_of(source, block)
        source.control.say("stale-map", block=block, first_page=0, pages=pages, runs=runs(pages))
    return len(source.machine.blocks)


def none(_: int) -> bytes:
    return b""


def end_round(source: Source, number: int, maps: int, pushed: bool = False) -> None:
    source.control.say("round", number=number, maps=maps, pushed=pushed)
    assert source.control.hear("round-done")["number"] == number


def begun(address: tuple[str, int], machine: Machine, version: int, **more: Any) -> Source:
    """Round 0 has been done."""
    source = Source(address, machine, version, **more).until("ready")
    page_maps(source)
    end_round(source, 0, len(machine.maps))
    return source


def ends(source: Source) -> None:
    for line in source.bulk:
        line.send(Frame(wire.END, 0, 0, 0).pack())


def garbage(source: Source, byte: bytes = b"\xa5") -> None:
    """Wrong content for every page, on the first bulk channel."""
    for block in range(len(source.machine.blocks)):
        unit = source.machine.page_bytes[block]
        most = MIB // unit
        for first in range(0, pages_of(source, block), most):
            count = min(most, pages_of(source, block) - first)
            source.bulk[0].send(Frame(wire.PAGES, block, first, count, 0, byte * (count * unit)).pack())


def refused(source: Source) -> None:
    said = [fields["type"] for fields in source.control.wait_closed(END_S)]
    assert "prepared" not in said, said
    assert set(said) <= {"abort", "round-done"}, said


def finished(source: Source, control: Control, start: Start) -> None:
    """The machine has come, and its memory is what it was at its source."""
    before = source.control
    before.hear("running")
    source.finish()
    (name,) = (name for name, one in control.machines().items() if one["migration"]["status"] != "failed")
    control.wait_status(name, "completed")
    verify(start, control, name)


@pytest.mark.parametrize("whole", [False, True])
def test_rounds_of_garbage(daemon: Daemon, start: Start, version: int, rv64: Machine, whole: bool) -> None:
    """Each page wrong in three rounds, and forgotten; right in the end."""
    program, control = daemon()
    source = begun(program.address, rv64, version, bulk_channels=2)
    for number in range(1, 4):
        garbage(source, bytes([number]))
        ends(source)
        end_round(source, number, stale_maps(source), pushed=True)
    source.serve()
    if whole:
        source.push_all()
    source.control.say("switchover", state=rv64.state, maps=0, whole=whole)
    source.prepared().commit()
    if not whole:
        finished(source, control, start)
        return
    source.control.hear("running")
    source.control.hear("complete")
    source.control.say("complete-ack", stats={})
    (name,) = control.machines()
    control.wait_status(name, "completed")
    verify(start, control, name)


def test_pages_beside_the_forgetting(daemon: Daemon, neighbour: Beside, version: int, rv64: Machine) -> None:
    """Against the protocol: pages keep coming on a bulk channel that has said `end`, while others are forgotten."""
    program, control = daemon()
    beside = neighbour(program, control)
    source = begun(program.address, rv64, version, bulk_channels=2)
    over = threading.Event()

    def flood() -> None:
        with contextlib.suppress(Closed, OSError):
            while not over.is_set():
                garbage(source)

    ends(source)
    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    before = program.forget_peak()
    with Pulse(control) as pulse, contextlib.suppress(Closed):
        for number in range(1, 40):
            source.control.say("round", number=number, maps=stale_maps(source), pushed=number == 1)
            if source.control.hear()["type"] == "abort":  # what the kernel says of a page that is placed and discarded
                break
    pulse.check(3.0)
    over.set()
    source.lose()
    thread.join(END_S)
    assert program.peak_bytes() - before < 128 * MIB
    beside.finish()


def test_rounds_for_ever(daemon: Daemon, neighbour: Beside, version: int, rv64: Machine) -> None:
    """They cost the destination what their maps are long, and end when the operator has had enough."""
    program, control = daemon()
    beside = neighbour(program, control)
    source = begun(program.address, rv64, version)
    (name,) = control.machines().keys() - {beside.name}
    before = program.forget_peak()
    with Pulse(control) as pulse:
        for number in range(1, 400):
            end_round(source, number, stale_maps(source))
    pulse.check(3.0)
    assert program.peak_bytes() - before < 64 * MIB
    control.ask("migrate-cancel", machine=name)
    refused(source)
    beside.finish()


def twice_ended(source: Source) -> None:
    ends(source)
    ends(source)


def a_wrong_number(source: Source) -> None:
    source.control.say("round", number=7, maps=stale_maps(source), pushed=False)


def the_first_round_again(source: Source) -> None:
    page_maps(source)
    source.control.say("round", number=1, maps=len(source.machine.maps), pushed=False)


def no_maps(source: Source) -> None:
    source.control.say("round", number=1, maps=1, pushed=False)


def too_few_maps(source: Source) -> None:
    source.control.say("round", number=1, maps=stale_maps(source) + 1, pushed=False)


def half_a_map(source: Source) -> None:
    pages = pages_of(source, 0)
    source.control.say("stale-map", block=0, first_page=0, pages=pages // 2, runs=b"")
    source.control.say("round", number=1, maps=1, pushed=False)


def a_map_twice(source: Source) -> None:
    source.control.say("round", number=1, maps=stale_maps(source) + stale_maps(source), pushed=False)


def runs_too_long(source: Source) -> None:
    pages = pages_of(source, 0)
    source.control.say("stale-map", block=0, first_page=0, pages=pages, runs=wire.all_pages(pages + 1))


def two_rounds_at_once(source: Source) -> None:
    with source.control.line.at_once():
        for number in (1, 2):
            source.control.say("round", number=number, maps=stale_maps(source), pushed=False)


def commit_at_once(source: Source) -> None:
    source.control.say("commit")


def switchover_in_a_round(source: Source) -> None:
    with source.control.line.at_once():
        source.control.say("round", number=1, maps=stale_maps(source), pushed=False)
        source.control.say("switchover", state=source.machine.state, maps=0, whole=False)


def switchover_with_other_maps(source: Source) -> None:
    page_maps(source)
    source.control.say("switchover", state=source.machine.state, maps=len(source.machine.maps), whole=False)


def switchover_that_counts_wrong(source: Source) -> None:
    stale_maps(source)
    source.control.say("switchover", state=source.machine.state, maps=0, whole=False)


def switchover_without_state(source: Source) -> None:
    source.control.say("switchover", state=b"", maps=0, whole=False)


LIES = [
    twice_ended, a_wrong_number, the_first_round_again, no_maps, too_few_maps, half_a_map, a_map_twice, runs_too_long,
    two_rounds_at_once, commit_at_once, switchover_in_a_round, switchover_with_other_maps, switchover_that_counts_wrong,
    switchover_without_state,
]  # fmt: skip


def test_lies_in_a_round(daemon: Daemon, neighbour: Beside, version: int, rv64: Machine) -> None:
    program, control = daemon("d", "--heartbeat", "0.5")
    beside = neighbour(program, control)
    for lie in LIES:
        source = begun(program.address, rv64, version)
        with contextlib.suppress(Closed):
            lie(source)
        try:
            said = [fields["type"] for fields in source.control.wait_closed(END_S)]
        except AssertionError as error:
            raise AssertionError(lie.__name__) from error
        assert "prepared" not in said, (lie.__name__, said)
    beside.finish()
    wait_until("end of what was offered", lambda: list(control.machines()) == [beside.name], 10)


@pytest.mark.parametrize("what", ["round", "whole"])
def test_a_push_that_never_ends(daemon: Daemon, neighbour: Beside, version: int, rv64: Machine, what: str) -> None:
    """The machine is the source's, so nothing is lost by waiting for it; an operator may end it."""
    program, control = daemon("d", "--heartbeat", "0.2")
    beside = neighbour(program, control)
    source = begun(program.address, rv64, version)
    (name,) = control.machines().keys() - {beside.name}
    if what == "round":
        source.control.say("round", number=1, maps=stale_maps(source), pushed=True)
    else:
        source.control.say("switchover", state=rv64.state, maps=0, whole=True)
    with pytest.raises(AssertionError, match="within"):
        source.control.hear(timeout_s=2)
    control.ask("migrate-cancel", machine=name)
    refused(source)
    beside.finish()


# ---- Compressed frames


def lz4(content: int, payload: bytes, **more: Any) -> Frame:
    return Frame(wire.PAGES, payload=payload, flags=wire.LZ4, content_bytes=content, **more)


def zstd(content: int, payload: bytes, **more: Any) -> Frame:
    return Frame(wire.PAGES, payload=payload, flags=wire.ZSTD, content_bytes=content, **more)


BOMBS: dict[str, Frame] = {
    "lz4: more than it says": lz4(PAGE, wire.lz4_run(b"x", 2 * PAGE)),
    "lz4: less than it says": lz4(PAGE, wire.lz4_run(b"x", PAGE - 1)),
    "lz4: 1 MiB in a page": lz4(PAGE, wire.lz4_run(b"x", 400_000)[: PAGE - 1]),
    "lz4: cut": lz4(PAGE, wire.lz4_run(b"x", PAGE)[:-3]),
    "lz4: zeros": lz4(PAGE, bytes(100)),
    "lz4: a match before its beginning": lz4(PAGE, b"\x0f\xff\xff" + b"\xff" * 16 + b"\x00\x50xxxxx"),
    "lz4: noise": lz4(PAGE, bytes(range(7, 251))),
    "zstd: 1 GiB": zstd(PAGE, wire.zstd_run(b"x", 1 << 30, PAGE)[: PAGE - 1]),
    "zstd: claims 4 GiB": zstd(PAGE, wire.zstd_run(b"x", PAGE, 0xFFFFFFFF)),
    "zstd: claims nothing": zstd(PAGE, wire.zstd_run(b"x", PAGE, 0)),
    "zstd: less than it says": zstd(PAGE, wire.zstd_run(b"x", PAGE - 1)),
    "zstd: more than it says": zstd(PAGE, wire.zstd_run(b"x", PAGE + 1)),
    "zstd: two frames": zstd(2 * PAGE, 2 * wire.zstd_run(b"x", PAGE), pages=2),
    "zstd: something behind it": zstd(PAGE, wire.zstd_run(b"x", PAGE) + b"x"),
    "zstd: skippable": zstd(PAGE, b"\x50\x2a\x4d\x18" + bytes([8, 0, 0, 0]) + bytes(8)),
    "zstd: an old format": zstd(PAGE, b"\x27\xb5\x2f\xfd" + bytes(60)),
    "lz4 in zstd's name": zstd(PAGE, wire.lz4_run(b"x", PAGE)),
    "zstd in lz4's name": lz4(PAGE, wire.zstd_run(b"x", PAGE)),
    "both": Frame(wire.PAGES, payload=b"x" * 8, flags=wire.LZ4 | wire.ZSTD, content_bytes=PAGE),
    "content beyond the limit": lz4(1 << 31, b"x" * 100, pages=1 << 19),
    "content of another size": lz4(2 * PAGE, wire.lz4_run(b"x", 2 * PAGE)),
    "content, no flag": Frame(wire.PAGES, payload=b"x" * PAGE, content_bytes=PAGE),
    "a flag, no content": Frame(wire.PAGES, payload=b"x" * PAGE, flags=wire.LZ4),
    "no payload": lz4(PAGE, b""),
    "as long as its content": lz4(PAGE, b"x" * PAGE),
    "zeros": Frame(wire.ZERO, flags=wire.LZ4, content_bytes=PAGE),
    "an end": Frame(wire.END, 0, 0, 0, flags=wire.ZSTD, content_bytes=PAGE),
    "an answer": Frame(wire.PAGES, payload=wire.lz4_run(b"x", PAGE), flags=wire.LZ4 | wire.ANSWERS, content_bytes=PAGE),
    "unknown flag": Frame(wire.PAGES, payload=b"x" * PAGE, flags=8),
}


def offers_compression(source: Source) -> Source:
    source.more["compress"] = ["lz4", "zstd"]
    return source


def test_compressed_frames_that_lie(daemon: Daemon, neighbour: Beside, version: int, rv64: Machine) -> None:
    """The channel ends, and nothing of it is seen: the machine has not come, and the daemon has lost nothing."""
    program, control = daemon("d", "--heartbeat", "0.5")
    beside = neighbour(program, control)
    before = program.forget_peak()
    for what, frame in BOMBS.items():
        source = offers_compression(Source(program.address, rv64, version)).until("ready")
        page_maps(source)
        end_round(source, 0, len(rv64.maps))
        with contextlib.suppress(Closed):
            source.bulk[0].send(frame.pack())
            ends(source)
            source.control.say("round", number=1, maps=stale_maps(source, none), pushed=True)
        with contextlib.suppress(Closed):
            assert (said := source.control.hear())["type"] == "abort", (what, said)
        source.lose()
    assert program.peak_bytes() - before < 96 * MIB
    beside.finish()


def test_a_compressed_frame_on_an_urgent_channel(
    daemon: Daemon, neighbour: Beside, version: int, rv64: Machine
) -> None:
    """No thread that serves faults decompresses."""
    program, control = daemon()
    beside = neighbour(program, control)
    source = offers_compression(Source(program.address, rv64, version)).until("ready")
    page_maps(source)
    end_round(source, 0, len(rv64.maps))
    source.urgent[0].send(lz4(PAGE, wire.lz4_run(b"x", PAGE)).pack())
    with contextlib.suppress(Closed):
        assert (said := source.control.hear())["type"] == "abort", said
    beside.finish()


def test_compressed_pages_arrive(daemon: Daemon, start: Start, version: int, rv64: Machine) -> None:
    """By a peer of another make: a page of equal bytes each way, forgotten again, and the real ones last."""
    program, control = daemon()
    source = offers_compression(Source(program.address, rv64, version)).until("ready")
    page_maps(source)
    end_round(source, 0, len(rv64.maps))
    source.bulk[0].send(lz4(PAGE, wire.lz4_run(b"x", PAGE), first_page=3).pack())
    source.bulk[0].send(zstd(4 * MIB, wire.zstd_run(b"x", 4 * MIB), pages=1024).pack())
    ends(source)
    end_round(source, 1, stale_maps(source), pushed=True)
    source.control.say("switchover", state=rv64.state, maps=0, whole=False)
    source.serve()
    source.prepared().commit()
    finished(source, control, start)


# ---- Numbers that are none

TABLES: tuple[Any, ...] = (
    None, 5, "x", [], {"stop_ns": -1}, {"stop_ns": "x"}, {"stop_ns": 2**63}, {"stop_ns": 2**64 - 1}, {"load_ns": None},
    {"arm_ns": [1]}, {"no such": 1, "stop_ns": 1.5}, {"commit_ns": True}, {"stop_ns": {"stop_ns": 1}},
)  # fmt: skip


def test_breakdowns_that_are_none(daemon: Daemon, version: int, rv64: Machine) -> None:
    """Of the source: what is no sensible number is not believed, and the machine has come all the same."""
    program, control = daemon()
    for number, table in enumerate(TABLES):
        source = Source(program.address, rv64, version).until("running")
        source.serve()
        source.push_all()
        source.control.hear("complete")
        stats = {"breakdown": table, "downtime_ns": 2**64 - 1, "iteration": -1, "compressed_bytes": table}
        source.control.say("complete-ack", stats=stats)
        wait_until(
            "end",
            lambda: (
                control.machines()
                and all(one["migration"]["status"] == "completed" for one in control.machines().values())
            ),
        )
        assert len(control.machines()) == number + 1


@pytest.mark.parametrize("table", TABLES[3:9], ids=str)
def test_breakdowns_of_a_destination(start: Start, version: int, table: Any) -> None:
    source = start("source", "--json", *RV64, "--listen", "127.0.0.1:0")
    dest = Destination.connect(source.address, version).until("committed")
    dest.control.say("running", resume_ns=2**63 - 1, ago_ns=2**63 - 1)
    for line in dest.bulk:
        while line.take_frame().type != wire.END:
            pass
    dest.control.say("complete", stats={"breakdown": table, "precopy_bytes": -5, "iteration": "x"})
    dest.control.hear("complete-ack")
    assert source.end() == 0
    assert source.result()["downtime-ms"] >= 0


# ---- Destinations


def next_one(listener: Listener) -> Destination:
    """The next attempt; one that only comes to say that the last one has ended is let go."""
    while True:
        with contextlib.suppress(Closed):
            return listener.destination().until("ready")


def drain(dest: Destination) -> None:
    """Takes whatever is pushed, until the channel ends."""

    def take(line: Any) -> None:
        with contextlib.suppress(Closed, OSError, AssertionError):
            line.sock.settimeout(None)
            while line.take_frame():
                pass

    for line in dest.bulk:
        threading.Thread(target=take, args=(line,), daemon=True).start()


def to_round(dest: Destination, number: int) -> Fields:
    """Rounds done up to this one, which is not answered."""
    while True:
        fields = dest.control.hear("page-map", "stale-map", "round", "switchover")
        if fields["type"] == "round":
            if fields["number"] == number:
                return fields
            dest.control.say("round-done", number=fields["number"])


def leaves_nothing_armed(program: Program) -> None:
    """No part of a memory is write-protected, or registered with a userfaultfd."""

    def registered() -> list[str]:
        flags = [line for line in Path(f"/proc/{program.pid}/smaps").read_text().splitlines() if line[:8] == "VmFlags:"]
        return [line for line in flags if {"uw", "um", "ui"} & set(line.split())]

    wait_until("end of the dirty log", lambda: not registered(), 10)


ANSWERS: dict[str, tuple[str, Fields]] = {
    "a round to come": ("round-done", {"number": 2}),
    "a round that was": ("round-done", {"number": 0}),
    "prepared": ("prepared", {}),
    "running": ("running", {"resume_ns": 1, "ago_ns": 0}),
    "complete": ("complete", {"stats": {}}),
    "abort": ("abort", {"reason": "enough"}),
    "ready": ("ready", {}),
    "placed": ("placed", {"block": 0, "first_page": 0, "pages": 8, "runs": wire.all_pages(8)}),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_answers_to_a_round(daemon: Daemon, start: Start, version: int, what: str) -> None:
    """The migration fails, the machine goes on, no dirty log is left, and it can leave by another one."""
    program, control = daemon("d", "--name", "m", *RV64)
    with Listener(version) as listener:
        control.begin("migrate", machine="m", to=listener.where, precopy="60")
        dest = listener.destination().until("ready")
        drain(dest)
        to_round(dest, 1)
        kind, fields = ANSWERS[what]
        dest.control.say(kind, **fields)
        dest.control.wait_closed(END_S)
        control.wait_status("m", "failed")
    leaves_nothing_armed(program)
    verify(start, control, "m")


@pytest.mark.parametrize("state", ["0", "1", "3", "push", "handed", "whole"])
def test_a_destination_that_dies(daemon: Daemon, start: Start, version: int, state: str) -> None:
    """In each round: the machine goes on, and the migration is begun again, without a word of the operator."""
    program, control = daemon("d", "--name", "m", *RV64, "--heartbeat", "0.2")
    with Listener(version) as listener:
        options: Fields = {"mode": "precopy", "precopy": "0.2"} if state == "whole" else {"precopy": "60"}
        if state == "handed":
            options = {"precopy": "0.2"}
        control.begin("migrate", machine="m", to=listener.where, **options)
        for _ in range(3):
            dest = next_one(listener)
            if state == "push":
                to_round(dest, 0)
                dest.control.say("round-done", number=0)
                dest.bulk[0].take(100)
            elif state.isdigit():
                drain(dest)
                to_round(dest, int(state))
            else:
                drain(dest)
                dest.handed()
            dest.lose()
        last = next_one(listener)  # it has come again
        control.ask("migrate-cancel", machine="m")
        last.control.wait_closed(END_S)
        control.wait_status("m", "cancelled")
    leaves_nothing_armed(program)
    verify(start, control, "m")


def test_an_offer_that_is_dropped_for_ever(daemon: Daemon, version: int) -> None:
    """Each attempt ends at once: they become rare, cost nothing, and `migrate-cancel` ends them in their pauses."""
    program, control = daemon("d", "--name", "m", *RV64)
    with Listener(version) as listener:
        control.begin("migrate", machine="m", to=listener.where, precopy="60")
        listener.destination().until("offered").lose()
        wait_until("pause", lambda: control.migration("m").get("status") == "connecting")
        descriptors, errors = program.descriptors(), program.error_bytes()
        for _ in range(9):
            listener.destination().until("offered").lose()
        wait_until("pause", lambda: control.migration("m").get("status") == "connecting")
        assert program.descriptors() <= descriptors + 2
        assert program.error_bytes() - errors < 9 * 400
        control.ask("migrate-cancel", machine="m")
        control.wait_status("m", "cancelled")
        assert not listener.backlog()
    leaves_nothing_armed(program)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_between_attempts(start: Start, version: int, number: signal.Signals) -> None:
    with Listener(version) as listener:
        source = start("source", "--json", *RV64, "--connect", listener.where, *PRECOPY)
        for _ in range(6):
            listener.destination().until("ready").lose()
        source.wait_errors("attempt 7")
        source.signal(number)
        assert source.end(END_S) == 1
        assert source.result()["status"] == "cancelled", source.result()
