# SPDX-License-Identifier: Apache-2.0
"""Peers that keep to the form, and lie: about layouts, pages, ends and who they are. Nobody else suffers from it, and
what the program has not been proven it does not believe."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile import _wire as wire
from hostile._peer import (
    PAGE,
    Closed,
    Destination,
    Line,
    Listener,
    Machine,
    Neighbour,
    Refused,
    Source,
)
from hostile._program import MIB, RV64, Asking, Control, Program, Pulse, verify, wait_until
from hostile._wire import Fields, Frame

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
Beside = Callable[[Program, Control], Neighbour]
REFUSED_S = 25.0


def refused(source: Source, *, expected: tuple[str, ...] = ("reject", "abort")) -> None:
    """The destination says that it will not, or hangs up; it has prepared nothing."""
    said = [fields["type"] for fields in source.control.wait_closed(REFUSED_S)]
    assert "prepared" not in said, said
    assert set(said) <= {*expected, "accept", "ready"}, said


# ---- Offers


def block(name: str, size: int, page: int = PAGE) -> Fields:
    return {"name": name, "size-bytes": size, "page-bytes": page}


IMAGE: dict[str, tuple[Fields, list[Fields]]] = {
    "64 blocks of 2^62": ({"file-bytes": 1 << 62}, [block(f"b{number}", 1 << 62) for number in range(64)]),
    "64 blocks of 2^40": ({"file-bytes": 1 << 46}, [block(f"b{number}", 1 << 40) for number in range(64)]),
    "one of 2^62": ({"file-bytes": 1 << 62}, [block("image", 1 << 62)]),
    "one of 2^46": ({"file-bytes": 1 << 46}, [block("image", 1 << 46)]),
    "as large as memory": ({"file-bytes": 1 << 40}, [block("image", 1 << 40)]),
    "one of 2^64 - 4096": ({"file-bytes": 1}, [block("image", (1 << 64) - PAGE)]),
    "more in the file": ({"file-bytes": 2 << 20}, [block("image", 1 << 20)]),
    "nothing in the file": ({"file-bytes": 0}, [block("image", 1 << 20)]),
    "less than nothing": ({"file-bytes": -1}, [block("image", 1 << 20)]),
    "no blocks": ({"file-bytes": 0}, []),
    "an empty block": ({"file-bytes": 0}, [block("image", 0)]),
    "half a page": ({"file-bytes": 2048}, [block("image", 2048)]),
    "a page and a half": ({"file-bytes": 6144}, [block("image", 6144)]),
    "pages of 512": ({"file-bytes": 1 << 20}, [block("image", 1 << 20, 512)]),
    "pages of 3000": ({"file-bytes": 3 << 20}, [block("image", 3000 << 10, 3000)]),
    "pages of 4 MiB": ({"file-bytes": 8 << 20}, [block("image", 8 << 20, 4 << 20)]),
    "pages of 2^62": ({"file-bytes": 8 << 20}, [block("image", 8 << 20, 1 << 62)]),
    "pages of nothing": ({"file-bytes": 8 << 20}, [block("image", 8 << 20, 0)]),
    "two of a name": ({"file-bytes": 1 << 20}, [block("image", 1 << 20), block("image", 1 << 20)]),
    "no name": ({"file-bytes": 1 << 20}, [block("", 1 << 20)]),
    "a path for a name": ({"file-bytes": 1 << 20}, [block("../../../etc/x\0", 1 << 20)]),
}


@pytest.mark.parametrize("what", IMAGE)
def test_absurd_layouts(daemon: Daemon, neighbour: Beside, version: int, what: str) -> None:
    program, control = daemon()
    beside = neighbour(program, control)
    config, blocks = IMAGE[what]
    before = program.forget_peak()
    with Pulse(control) as pulse:
        source = Source(program.address, Machine("image", config, blocks), version).connect().offer()
        refused(source)
    pulse.check(3.0)
    assert program.peak_bytes() - before < 64 * MIB
    beside.finish()
    wait_until("end of what was offered", lambda: list(control.machines()) == [beside.name], 5)


ODD: tuple[Any, ...] = (None, True, "x", b"x", [], -1, 0, 65, 2**31, 2**63, 2**64 - 1, 1.5, "../../etc", "a" * 9000)


def changes(machine: Machine) -> list[tuple[str, Fields]]:
    """Each field of its config: gone, of another kind, at the edges."""
    out: list[tuple[str, Fields]] = [("nothing", {})]
    for name in machine.config:
        rest = {key: value for key, value in machine.config.items() if key != name}
        out.append((f"no {name}", rest))
        for value in ODD:
            if value != machine.config[name]:
                out.append((f"{name}={value!r:.20}", {**rest, name: value}))
    return out


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["rv64", pytest.param("kvm", marks=pytest.mark.needs("kvm"))])
def test_configurations(daemon: Daemon, start: Start, neighbour: Beside, version: int, kind: str) -> None:
    """Accepted, and then the machine is what it says, or refused: never the end of the daemon."""
    real = start("source", "--json", "--machine", kind, *RV64[2:], "--listen", "127.0.0.1:0")
    machine = Destination.connect(real.address, version).until("run").take_all()
    program, control = daemon("d", "--heartbeat", "0.5")
    beside = neighbour(program, control)
    for what, config in changes(machine):
        changed = Machine(kind, config, machine.blocks, [], machine.state, machine.maps, machine.pages)
        source = Source(program.address, changed, version)
        with contextlib.suppress(Closed, Refused, AssertionError):
            source.connect().offer()
            said = source.control.hear(timeout_s=REFUSED_S)
            if said["type"] == "accept":
                machine.page_bytes, source.shards = said["page-bytes"], said["shards"]
                changed.page_bytes, source.bulk_channels = said["page-bytes"], said["bulk-channels"]
                source.ready().switch()
                source.control.hear(timeout_s=REFUSED_S)  # prepared, perhaps; it is never committed
        for line in [*source.urgent, *source.bulk]:
            line.reset()
        source.control.reset()
        assert program.alive(), f"{what}: {program.tail()}"
        program.check()
        for name in control.machines():
            if name != beside.name:
                with contextlib.suppress(Exception):
                    control.ask("end", machine=name, force=True)
    beside.finish(start)


# ---- Page maps


def runs(*numbers: int) -> bytes:
    return b"".join(wire._varint(number) for number in numbers)


MAPS: dict[str, list[Fields]] = {
    "beyond the block": [{"block": 0, "first-page": 0, "pages": 257, "runs": runs(0, 257)}],
    "runs beyond the map": [{"block": 0, "first-page": 0, "pages": 256, "runs": runs(0, 257)}],
    "runs of 2^63": [{"block": 0, "first-page": 0, "pages": 256, "runs": runs(0, 2**63)}],
    "runs that come round": [{"block": 0, "first-page": 0, "pages": 256, "runs": runs(2**64 - 1, 2)}],
    "a number without end": [{"block": 0, "first-page": 0, "pages": 256, "runs": b"\xff" * 30}],
    "a number that is cut": [{"block": 0, "first-page": 0, "pages": 256, "runs": b"\x00\x80"}],
    "a gap": [
        {"block": 0, "first-page": 0, "pages": 100, "runs": b""},
        {"block": 0, "first-page": 101, "pages": 155, "runs": b""},
    ],
    "twice": [{"block": 0, "first-page": 0, "pages": 256, "runs": b""}] * 2,
    "a part": [{"block": 0, "first-page": 0, "pages": 255, "runs": b""}],
    "the last part": [{"block": 0, "first-page": 255, "pages": 1, "runs": b""}],
    "nothing": [{"block": 0, "first-page": 0, "pages": 0, "runs": b""}],
    "no map": [],
    "another block": [{"block": 1, "first-page": 0, "pages": 256, "runs": b""}],
    "block 2^63": [{"block": 2**63, "first-page": 0, "pages": 256, "runs": b""}],
    "page 2^64 - 1": [{"block": 0, "first-page": 2**64 - 1, "pages": 256, "runs": b""}],
    "2^63 pages": [{"block": 0, "first-page": 0, "pages": 2**63, "runs": b""}],
    "less than nothing": [{"block": 0, "first-page": 0, "pages": -1, "runs": b""}],
}


def serves_the_next(dest: Program, version: int) -> None:
    """A source that means well, to the end."""
    dest.check()

    def let_in() -> Source | None:
        with contextlib.suppress(Refused, Closed):
            return Source(dest.address, Machine.image(1 << 20), version).until("running")
        return None

    wait_until("place", let_in, 40).finish()
    assert dest.end() == 0, dest.tail()


@pytest.mark.parametrize("what", MAPS)
def test_page_maps(start: Start, version: int, tmp_path: Path, what: str) -> None:
    """Refused before PREPARED; who comes next is served."""
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0", "--dump", tmp_path / "copy")
    lying = Machine.image(1 << 20)
    lying.maps = MAPS[what]
    source = Source(dest.address, lying, version).until("ready")
    with contextlib.suppress(Closed):
        source.switch()
    refused(source)
    serves_the_next(dest, version)
    assert (tmp_path / "copy").stat().st_size == 1 << 20


@pytest.mark.parametrize("maps", [0, 2, 2**32])
def test_numbers_of_page_maps(start: Start, version: int, maps: int) -> None:
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), version).until("ready")
    for page_map in source.machine.maps:
        source.control.say("page-map", **page_map)
    source.control.say("switchover", state=source.machine.state, maps=maps)
    refused(source)


@pytest.mark.parametrize("what", [what for what in MAPS if what not in ("a part", "no map", "twice")])
def test_received_maps(start: Start, version: int, what: str) -> None:
    """To a source, at a recovery: it keeps the machine's memory, and the next one that makes sense is served."""
    (source := start("source", "--json", *RV64, "--listen", "127.0.0.1:0")).wait_status("setup", "none", "active")
    dest = Destination.connect(source.address, version).until("run")
    dest.lose()
    pages = dest.machine.blocks[0]["size-bytes"] // PAGE
    for received in MAPS[what]:
        changed = {key: pages if key == "pages" and value == 256 else value for key, value in received.items()}
        changed["pages"] = pages + 1 if received["pages"] == 257 else changed["pages"]
        dest.come_back(source.address, version)
        dest.control.say("received-map", **changed)
        with contextlib.suppress(Closed):
            dest.control.say("recover", resume_ns=1, maps=1, digest=0)
        assert "recovered" not in [fields["type"] for fields in dest.control.wait_closed(REFUSED_S)]
    assert source.alive()

    def back() -> bool:
        with contextlib.suppress(Refused, Closed):
            dest.come_back(source.address, version).say_what_is_here().recovered()
            return True
        return False

    wait_until("recovery", back, 30)
    dest.take_all()
    assert source.end() == 0, source.tail()


# ---- Rounds (version 4)


def block_0(pages: int, runs: bytes = b"", first: int = 0) -> Fields:
    return {"block": 0, "first-page": first, "pages": pages, "runs": runs}


def says(kind: str, fields: Fields) -> bytes:
    return wire.message(kind, fields)


STALE, PAGES_256 = says("stale-map", block_0(256)), says("page-map", block_0(256))
ROUNDS: dict[str, list[bytes]] = {
    "number 0 again": [STALE, says("round", {"number": 0, "maps": 1, "pushed": False})],
    "number 2": [STALE, says("round", {"number": 2, "maps": 1, "pushed": False})],
    "number 2^32": [STALE, says("round", {"number": 2**32, "maps": 1, "pushed": False})],
    "no number": [STALE, says("round", {"maps": 1, "pushed": False})],
    "no map": [says("round", {"number": 1, "maps": 1, "pushed": False})],
    "a map too many": [STALE, says("round", {"number": 1, "maps": 2, "pushed": False})],
    "another block": [says("stale-map", block_0(256) | {"block": 1})],
    "a gap": [says("stale-map", block_0(100)), says("stale-map", block_0(155, first=101))],
    "twice": [STALE, STALE],
    "beyond the block": [says("stale-map", block_0(257))],
    "a part": [says("stale-map", block_0(255)), says("round", {"number": 1, "maps": 1, "pushed": False})],
    "runs that come round": [says("stale-map", block_0(256, runs(2**64 - 1, 2)))],
    "a page map": [PAGES_256],
    "a page map among stale ones": [says("stale-map", block_0(100)), says("page-map", block_0(156, first=100))],
    "maps that a switchover does not count": [STALE, says("switchover", {"state": b"", "maps": 0, "whole": False})],
    "commit": [says("commit", {})],
    "a round in a round": [
        *(STALE, says("round", {"number": 1, "maps": 1, "pushed": True})),
        *(STALE, says("round", {"number": 2, "maps": 1, "pushed": True})),
    ],
    "an abort in a round": [says("abort", {"reason": "no"})],
}
BEFORE: dict[str, list[bytes]] = {
    "a round and no map": [says("round", {"number": 0, "maps": 1, "pushed": False})],
    "a stale map first": [STALE, says("round", {"number": 0, "maps": 1, "pushed": False})],
    "a switchover and no map": [says("switchover", {"state": b"", "maps": 0, "whole": False})],
    "round 1 first": [PAGES_256, says("round", {"number": 1, "maps": 1, "pushed": False})],
}


@pytest.mark.parametrize("what", [*ROUNDS, *BEFORE])
def test_rounds(start: Start, version: int, what: str) -> None:
    """Refused before PREPARED; who comes next is served."""
    if version < 4:
        pytest.skip("no rounds before version 4")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), version).until("ready")
    if what in ROUNDS:
        source.told()
    with contextlib.suppress(Closed):
        for message in ROUNDS.get(what) or BEFORE[what]:
            source.control.line.send(message)
    refused(source)
    serves_the_next(dest, version)


def push(source: Source, *pages: int) -> None:
    """These, and no `end`."""
    for page in pages:
        source.bulk[0].send(Frame(wire.PAGES, 0, page, 1, 0, source.machine.page(0, page)).pack())


END = Frame(wire.END, 0, 0, 0).pack()


def test_pages_of_many_rounds(start: Start, version: int, tmp_path: Path) -> None:
    """Written again and again: what arrives is what was sent last, and what was not sent again is asked for."""
    if version < 4:
        pytest.skip("no rounds before version 4")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0", "--dump", tmp_path / "copy")
    source = Source(dest.address, Machine.image(1 << 20), version).until("ready").told()
    machine, unsent = source.machine, range(200)
    machine.pages = {(0, page): machine.page(0, page) for page in range(256)}
    for number in range(1, 100):
        push(source, *unsent)
        source.bulk[0].send(END)
        written = range(number, number + 5)
        for page in written:
            machine.pages[0, page] = bytes([number]) * PAGE
        source.stale(*written).round(number, pushed=True)
        unsent = written[:2]
    source.control.say("switchover", state=machine.state, maps=0, whole=False)
    source.prepared().commit().running().finish()
    assert dest.end() == 0, dest.tail()
    assert (tmp_path / "copy").read_bytes() == b"".join(machine.page(0, page) for page in range(256))


def test_an_end_of_a_push_that_is_said_twice(start: Start, version: int) -> None:
    """The second one would be taken for that of the next push, and an old page for a new one."""
    if version < 4:
        pytest.skip("no rounds before version 4")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), version).until("ready").told()
    source.bulk[0].send(END + END)
    refused(source)
    dest.wait_errors("data channel (bulk 0)")


@pytest.mark.parametrize("what", ["round", "whole"])
def test_an_end_that_never_comes(daemon: Daemon, neighbour: Beside, version: int, rv64: Machine, what: str) -> None:
    """The source lives, and does not push what it has said it has: its place is its own until somebody cancels it."""
    if version < 4:
        pytest.skip("no rounds before version 4")
    program, control = daemon()
    beside = neighbour(program, control)
    source = Source(program.address, rv64, version).until("ready").told()
    push(source, 1, 2, 3)
    if what == "round":
        source.stale()
        source.control.say("round", number=1, maps=len(rv64.blocks), pushed=True)
    else:
        source.control.say("switchover", state=source.machine.state, maps=0, whole=True)
    (name,) = control.machines().keys() - {beside.name}
    with pytest.raises(AssertionError, match="within 1 s"):
        source.control.hear(timeout_s=1.0)
    control.ask("migrate-cancel", machine=name)
    refused(source)
    beside.finish()
    wait_until("end of what was cancelled", lambda: list(control.machines()) == [beside.name], 5)


def test_rounds_without_end(daemon: Daemon, neighbour: Beside, version: int, rv64: Machine) -> None:
    """As fast as they are answered: memory does not grow, nobody else waits, and it can be cancelled."""
    if version < 4:
        pytest.skip("no rounds before version 4")
    program, control = daemon()
    beside = neighbour(program, control)
    source = Source(program.address, rv64, version).until("ready").told()
    before = program.forget_peak()
    with Pulse(control) as pulse:
        for number in range(1, 400):
            push(source, 1, 2, 3)
            source.bulk[0].send(END)
            source.stale(1, 2, 3).round(number, pushed=True)
    pulse.check(3.0)
    assert program.peak_bytes() - before < 32 * MIB
    (name,) = control.machines().keys() - {beside.name}
    control.ask("migrate-cancel", machine=name)
    refused(source)
    beside.finish()


ANSWERS: dict[str, list[tuple[str, Fields]]] = {
    "of another round": [("round-done", {"number": 1})],
    "twice": [("round-done", {"number": 0})] * 2,
    "prepared": [("prepared", {})],
    "complete": [("complete", {"stats": {}})],
    "no number": [("round-done", {})],
}


@pytest.mark.parametrize("what", ANSWERS)
def test_answers_to_a_round(start: Start, version: int, what: str) -> None:
    """The machine has not stopped, and is sent to a destination that answers correctly."""
    if version < 4:
        pytest.skip("no rounds before version 4")
    source = start("source", "--json", *RV64, "--listen", "127.0.0.1:0", "--migrate-after", "0")
    dest = Destination.connect(source.address, version).until("ready")
    while dest.control.hear("page-map", "round")["type"] != "round":
        pass
    with contextlib.suppress(Closed):
        for kind, fields in ANSWERS[what]:
            dest.control.say(kind, **fields)
    dest.control.wait_closed(REFUSED_S)
    assert source.alive()

    def taken() -> Destination | None:
        with contextlib.suppress(Refused, Closed):
            return Destination.connect(source.address, version).until("run")
        return None

    wait_until("another destination", taken, 30).take_all()
    assert source.end() == 0, source.tail()


# ---- What was never true


PLACED: dict[str, tuple[tuple[str, ...], Fields]] = {
    "not asked for": ((), {"block": 0, "first-page": 0, "pages": 16, "runs": runs(0, 16)}),
    "page 2^40": (("--release-ram",), {"block": 0, "first-page": 2**40, "pages": 16, "runs": runs(0, 16)}),
    "block 9": (("--release-ram",), {"block": 9, "first-page": 0, "pages": 16, "runs": runs(0, 16)}),
    "too many": (("--release-ram",), {"block": 0, "first-page": 0, "pages": 2**20 + 1, "runs": b""}),
    "over the end": (("--release-ram",), {"block": 0, "first-page": 2047, "pages": 2, "runs": runs(0, 2)}),
    "runs of 2^62": (("--release-ram",), {"block": 0, "first-page": 0, "pages": 16, "runs": runs(0, 2**62)}),
}


@pytest.mark.parametrize("what", PLACED)
def test_placed_that_never_was(start: Start, version: int, what: str) -> None:
    """Nobody asked for it, or it is out of all bounds: an error of that connection. The machine is not lost."""
    more, placed = PLACED[what]
    source = start("source", "--json", *RV64, *more, "--listen", "127.0.0.1:0")
    dest = Destination.connect(source.address, version).until("run")
    dest.control.say("placed", **placed)
    dest.control.wait_closed(REFUSED_S)
    source.wait_status("postcopy-paused")
    dest.lose()
    wait_until("recovery", lambda: recovers(dest, source, version), 30)
    dest.take_all()
    assert source.end() == 0, source.tail()


def recovers(dest: Destination, source: Program, version: int) -> bool:
    with contextlib.suppress(Refused, Closed):
        dest.come_back(source.address, version).say_what_is_here().recovered()
        return True
    return False


def test_an_end_that_is_none(daemon: Daemon, start: Start, version: int, rv64: Machine) -> None:
    """`complete-ack` when nothing is complete, `end` on every channel and no page: the machine waits for its pages."""
    program, control = daemon()
    source = Source(program.address, rv64, version).until("running")
    (name,) = control.machines()
    for line in source.bulk:
        line.send(Frame(wire.END, 0, 0, 0).pack())
    source.control.say("complete-ack", stats={})
    source.control.wait_closed(REFUSED_S)
    assert control.wait_status(name, "postcopy-paused")
    source.lose()
    wait_until("recovery", lambda: comes_back(source), 30)
    source.finish()
    control.wait_status(name, "completed")
    verify(start, control, name)


def comes_back(source: Source) -> bool:
    with contextlib.suppress(Refused, Closed):
        source.come_back().recovered()
        return True
    return False


ACCEPTS: dict[str, Fields] = {
    "no shards": {"shards": 0},
    "65536 shards": {"shards": 65536},
    "2^63 shards": {"shards": 2**63},
    "less than none": {"shards": -1},
    "more bulk channels than offered": {"bulk-channels": 17},
    "pages of 512": {"page-bytes": [512, 512]},
    "pages of 8 MiB, which fit into no frame": {"page-bytes": [8 << 20, 8 << 20]},
    "pages of 3000": {"page-bytes": [3000, 4096]},
    "pages of nothing": {"page-bytes": [0, 0]},
    "pages of 2^63": {"page-bytes": [2**63, 4096]},
    "pages for no block": {"page-bytes": []},
    "pages for a block too many": {"page-bytes": [4096] * 3},
}


def goes_on(control: Control) -> bool:
    machine = control.machines()["x"]
    return bool(machine["migration"]["status"] == "failed" and machine["guest"]["state"] == "running")


def begun(control: Control, listener: Listener) -> Asking:
    """A migration that has connected, as soon as the one before is quite over."""

    def attempt() -> Asking | None:
        asked = control.begin("migrate", machine="x", to=listener.where)
        wait_until("a connection", lambda: listener.backlog() or not asked.is_alive())
        return asked if listener.backlog() else None

    found: Asking = wait_until("a migration", attempt)
    return found


def test_absurd_answers_to_an_offer(daemon: Daemon, start: Start, version: int) -> None:
    """The machine computes on where it is, and can be sent to a peer that answers correctly."""
    program, control = daemon("d", *RV64, "--name", "x")
    for what, wrong in ACCEPTS.items():
        with Listener(version) as listener:
            asked = begun(control, listener)
            dest = listener.destination().until("offered")
            fields = {"page-bytes": [PAGE] * 2, "shards": 2, "bulk-channels": 1} | wrong
            with contextlib.suppress(Closed):
                dest.control.line.send(wire.message("accept", fields))
            said = [fields["type"] for fields in dest.control.wait_closed(REFUSED_S)]
            assert set(said) <= {"abort"}, f"{what}: {said}"
            asked.answer()  # that it had connected
        wait_until("end", lambda: goes_on(control), 10)
    assert program.alive()
    verify(start, control, "x")


# ---- Connections


def test_wrong_proofs_without_end(start: Start, version: int, tmp_path: Path) -> None:
    """For a migration that there is, with ids and epochs as they should be: no epoch is used up by them, the one who
    has the token does not wait behind them, and the log stays readable."""
    if version < 3:
        pytest.skip("no proofs before version 3")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), version).until("running")
    said = dest.error_bytes()
    count, deadline = 0, time.monotonic() + 3
    while time.monotonic() < deadline:
        line = Line.open(dest.address, version)
        with contextlib.suppress(Refused, Closed):
            line.greet(
                ("control", "urgent", "bulk")[count % 3],
                "source",
                migration=source.migration,
                epoch=(count % 3, 2**32 - 1)[count % 2],
                token=os.urandom(16),
            )
            raise AssertionError("welcome")
        line.reset()
        count += 1
    assert count > 50
    assert dest.error_bytes() - said < 64 << 10
    source.lose()
    source.come_back().recovered().finish()
    assert dest.end() == 0, dest.tail()


@pytest.mark.parametrize("side", ["source", "dest"])
def test_half_open_recoveries(start: Start, version: int, rv64: Machine, side: str) -> None:
    """Who knows the token comes back again and again, under ever higher epochs, says nothing, and stays."""
    if side == "dest":
        program = start("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0", "--heartbeat", "0.5")
        source = Source(program.address, rv64, version).until("running")
    else:
        program = start("source", "--json", *RV64, "--listen", "127.0.0.1:0", "--heartbeat", "0.5")
        dest = Destination.connect(program.address, version).until("run")
    peer: Source | Destination = source if side == "dest" else dest
    before = program.descriptors()
    for epoch in (*range(1, 30), 10**6, 2**31, 2**32 - 1000):
        line = Line.open(program.address, version)
        with contextlib.suppress(Refused, Closed):
            line.greet(
                "control",
                "source" if side == "dest" else "dest",
                migration=peer.migration,
                epoch=epoch,
                token=peer.token,
            )
        peer.epoch = max(peer.epoch, epoch)
    assert program.descriptors() < before + 40
    if side == "dest":
        wait_until("recovery", lambda: comes_back(source), 30)
        source.finish()
    else:
        wait_until("recovery", lambda: recovers(dest, program, version), 30)
        dest.take_all()
    assert program.end() == 0, program.tail()


def test_epochs_that_are_none(daemon: Daemon, neighbour: Beside, version: int) -> None:
    program, control = daemon()
    beside = neighbour(program, control)
    for epoch in (2**32, 2**63, 2**64 - 1, -1):
        line = Line.open(program.address, version)
        with contextlib.suppress(Refused, Closed):
            line.greet(
                "control",
                "source",
                migration=beside.source.migration,
                epoch=epoch,
                token=beside.source.token,
            )
            raise AssertionError(f"welcome in epoch {epoch}")
    beside.finish()


@pytest.mark.parametrize("kind", ["urgent", "bulk"])
def test_two_connections_of_one_channel(daemon: Daemon, start: Start, version: int, rv64: Machine, kind: str) -> None:
    """The second one is refused, or takes its place; the machine is whole in the end."""
    program, control = daemon()
    source = Source(program.address, rv64, version).until("running")
    (name,) = control.machines()
    for index in (0, 0, 1, 2, 63, 2**31):
        with contextlib.suppress(Refused, Closed):
            source.channel(kind, index)
    with contextlib.suppress(Closed, OSError, AssertionError):
        source.control.say("ping", nonce=7)
    if control.migration(name)["status"] != "postcopy-active":
        source.lose()
        wait_until("recovery", lambda: comes_back(source), 30)
    source.finish()
    control.wait_status(name, "completed")
    verify(start, control, name)


def test_channels_that_never_speak(daemon: Daemon, start: Start, version: int, rv64: Machine) -> None:
    """All are there, none ever sends a frame: what is asked for and never comes counts as a lost connection; until
    then nothing is wrong, and when the source is better all comes."""
    program, control = daemon("d", "--heartbeat", "0.5")
    source = Source(program.address, rv64, version).until("running")
    (name,) = control.machines()
    control.wait_status(name, "postcopy-paused")
    source.lose()
    wait_until("recovery", lambda: comes_back(source), 30)
    source.finish()
    control.wait_status(name, "completed")
    verify(start, control, name)


def test_too_few_channels(daemon: Daemon, neighbour: Beside, version: int, rv64: Machine) -> None:
    """Accepted, and then the channels never come: the place is free again, nothing is left of it."""
    program, control = daemon("d", "--heartbeat", "0.5")
    beside = neighbour(program, control)
    before = program.descriptors()
    source = Source(program.address, rv64, version).until("accepted")
    source.urgent = [source.channel("urgent", 0)]
    source.control.wait_closed(60)
    wait_until("end", lambda: list(control.machines()) == [beside.name])
    assert program.descriptors() <= before + 2
    beside.finish()


def test_a_source_of_older_version_comes_back(start: Start, version: int) -> None:
    """A migration keeps the version that it began with: who speaks an older one has no proof, and is not let in."""
    if version < 3:
        pytest.skip("no proofs before version 3")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), version).until("running")
    source.lose()
    line = Line.open(dest.address, 2)
    answer: Any = None
    with contextlib.suppress(Refused, Closed, AssertionError):
        answer = line.greet("control", "source", migration=source.migration, epoch=1, token=source.token)
    assert answer is None
    source.epoch = 1
    wait_until("recovery", lambda: comes_back(source), 30)
    source.finish()
    assert dest.end() == 0, dest.tail()


def test_a_hello_that_is_said_again(start: Start, version: int) -> None:
    """A hello that was recorded on its way: the epoch was used up by its first sender."""
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), version).until("running")
    source.lose()
    wait_until("recovery", lambda: comes_back(source), 30)
    hello = wire.hello(
        "control", "source", migration=source.migration, epoch=source.epoch, token=source.token, version=version
    )
    for _ in range(20):
        line = Line.open(dest.address, version)
        line.send(wire.preamble(version) + hello)
        line.take(8)
        assert line.hear()["type"] == "refused"
    source.finish()
    assert dest.end() == 0, dest.tail()
    assert dest.result()["recoveries"]["count"] == 1


@pytest.mark.parametrize("ended", ["completed", "aborted", "lost"])
def test_an_end_that_cannot_be(start: Start, version: int, ended: str) -> None:
    """The source proves that the migration has ended there, while the machine runs here and lacks pages: it is kept,
    that is said, and the source, which may have nothing to serve any more, gets that answer when it comes back."""
    if version < 3:
        pytest.skip("no such hello before version 3")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), version).until("running")
    line = Line.open(dest.address, version)
    line.greet("control", "source", migration=source.migration, epoch=1, token=source.token, ended=ended)
    source.epoch = 1
    dest.wait_status("postcopy-failed")
    source.lose()
    with pytest.raises(Refused) as refused:
        source.come_back()
    assert "you have said that the migration has ended there" in str(refused.value)
    assert dest.alive()
    assert dest.events("progress")[-1]["status"] == "postcopy-failed"  # what says the same again is left out
