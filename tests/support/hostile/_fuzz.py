# SPDX-License-Identifier: Apache-2.0
"""Valid sessions, frames, command lines and requests, and what chance makes of them."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from collections.abc import Sequence
from typing import Any

import msgpack

from hostile import _wire as wire
from hostile._peer import Closed, ControlLine, Line, Machine, Refused, Source
from hostile._wire import Fields, Frame

EDGES = (
    0,
    1,
    -1,
    2,
    63,
    64,
    255,
    256,
    4095,
    4096,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
)
TEXTS = ("", "x", "source", "dest", "\0", "\n", "\u202e", "a" * 70_000, "../../x", "%s%n", "vm1")
OUR_WAIT_S = 0.3
"""How long an answer is waited for that may never come."""

Choice = random.Random
Say = tuple[str, Fields]


def junk(choose: Choice, depth: int = 0) -> Any:
    """A value of any kind that msgpack has."""
    kind = choose.randrange(10 if depth < 3 else 7)
    if kind == 0:
        return choose.choice(EDGES)
    if kind == 1:
        return choose.choice(TEXTS)
    if kind == 2:
        return choose.randbytes(choose.choice((0, 1, 15, 16, 17, 32, 1000)))
    if kind == 3:
        return choose.choice((None, True, False))
    if kind == 4:
        return choose.choice((0.0, -1.5, float("inf"), float("nan"), 1e308))
    if kind == 5:
        return choose.getrandbits(choose.randrange(1, 64))
    if kind == 6:
        return msgpack.ExtType(choose.randrange(128), choose.randbytes(5))
    if kind == 7:
        return [junk(choose, depth + 1) for _ in range(choose.randrange(5))]
    if kind == 8:
        return {choose.choice(TEXTS[:6]): junk(choose, depth + 1) for _ in range(choose.randrange(4))}
    return {choose.choice(EDGES): junk(choose, depth + 1)}


def changed(choose: Choice, value: Any) -> Any:
    """A little beside what it was."""
    if isinstance(value, bool) or value is None or choose.random() < 0.2:
        return junk(choose)
    if isinstance(value, int):
        return choose.choice((value + 1, value - 1, value ^ 1 << choose.randrange(40), value * 2, choose.choice(EDGES)))
    if isinstance(value, bytes):
        return damaged(choose, value)
    if isinstance(value, str):
        return choose.choice((value + "x", value[:-1], value.upper(), choose.choice(TEXTS)))
    if isinstance(value, list):
        items = list(value)
        if items and choose.random() < 0.7:
            at = choose.randrange(len(items))
            items[at] = changed(choose, items[at])
        else:
            items *= choose.choice((0, 2, 65))
        return items
    if isinstance(value, dict):
        return changed_fields(choose, value)
    return junk(choose)


def changed_fields(choose: Choice, fields: Fields) -> Fields:
    fields = dict(fields)
    way = choose.randrange(5)
    if way == 0 and fields:
        del fields[choose.choice(list(fields))]
    elif way == 1:
        fields[choose.choice(TEXTS)] = junk(choose)
    elif fields:
        name = choose.choice(list(fields))
        fields[name] = changed(choose, fields[name])
    return fields


def damaged(choose: Choice, data: bytes) -> bytes:
    """Bits turned, bytes cut out or put in."""
    out = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 8))):
        way = choose.randrange(4)
        at = choose.randrange(len(out) + 1)
        if way == 0 and at < len(out):
            out[at] ^= 1 << choose.randrange(8)
        elif way == 1:
            del out[at : at + choose.choice((1, 4, 100, len(out)))]
        elif way == 2:
            out[at:at] = choose.randbytes(choose.choice((1, 4, 100)))
        else:
            out[at : at + 4] = struct.pack(">I", choose.getrandbits(32))
    return bytes(out)


def packed(choose: Choice, say: Say) -> bytes:
    """A message, now and then with something wrong around or in it."""
    kind, fields = say
    try:
        data = wire.message(kind, fields)
    except (OverflowError, ValueError):
        data = wire.frame_message(b"\x81\xa4type\xa1x")
    way = choose.random()
    if way < 0.1:
        return damaged(choose, data)
    if way < 0.2:
        return wire.frame_message(damaged(choose, data[8:]) or b"\xc0")
    return data


def changed_script(choose: Choice, script: Sequence[Say], others: Sequence[Say]) -> list[Say]:
    """The order of things, and the things, a little wrong."""
    out = list(script)
    for _ in range(choose.choice((0, 1, 1, 2, 4))):
        at = choose.randrange(len(out) + 1)
        way = choose.randrange(6)
        if way == 0 and at < len(out):
            del out[at]
        elif way == 1 and at < len(out):
            out.insert(at, out[at])
        elif way == 2:
            out.insert(at, choose.choice([*script, *others]))
        elif way == 3 and len(out) > 1 and at + 1 < len(out):
            out[at], out[at + 1] = out[at + 1], out[at]
        elif at < len(out):
            out[at] = (out[at][0], changed_fields(choose, out[at][1]))
    return out


OTHERS: list[Say] = [
    ("abort", {"reason": "why not"}),
    ("reject", {"reason": ""}),
    ("ping", {"nonce": 1}),
    ("pong", {"nonce": 1}),
    ("commit", {}),
    ("prepared", {}),
    ("ready", {}),
    ("recovered", {}),
    ("running", {"resume-ns": 0}),
    ("welcome", {}),
    ("complete", {"stats": {}}),
    ("complete-ack", {"stats": {}}),
    ("refused", {"reason": "x"}),
    ("nonsense", {"a": [1]}),
    ("hello", {"channel": "control", "side": "source", "index": 0, "migration": b"", "epoch": 0}),
    ("recover", {"resume-ns": 1, "maps": 1, "digest": 0}),
    ("accept", {"page-bytes": [4096], "shards": 1, "bulk-channels": 1}),
    ("received-map", {"block": 0, "first-page": 0, "pages": 256, "runs": b""}),
    ("placed", {"block": 0, "first-page": 0, "pages": 1, "runs": b"\0\1"}),
    ("stale-map", {"block": 0, "first-page": 0, "pages": 256, "runs": b""}),
    ("round", {"number": 0, "maps": 1, "pushed": True}),
    ("round-done", {"number": 0}),
]


def source_session(choose: Choice, address: tuple[str, int], machine: Machine, version: int) -> None:
    """A source that is wrong somewhere: in its hello, in an order, in a field, in a byte; then it goes."""
    source = Source(address, machine, choose.choice((version, version, wire.OLDEST)))
    offer: Fields = {
        "migration": source.migration,
        "token": source.token,
        "machine": machine.kind,
        "config": machine.config,
        "blocks": machine.blocks,
        "bulk-channels": 1,
        "placed-every-ms": choose.choice((0, 10)),
        "compress": [],
    }
    script: list[Say] = [("offer", offer)]
    script += [("page-map", page_map) for page_map in machine.maps]
    script += [
        ("switchover", {"state": machine.state, "maps": len(machine.maps), "whole": choose.random() < 0.2}),
        ("commit", {}),
        ("complete-ack", {"stats": {}}),
    ]
    script = changed_script(choose, script, OTHERS)
    line = Line.open(address, source.version)
    with contextlib.suppress(Closed, Refused, AssertionError, OSError, ValueError):
        if choose.random() < 0.1:
            hello = wire.preamble(source.version) + wire.hello("control", "source", version=source.version)
            line.send(damaged(choose, hello))
            line.closed_within(OUR_WAIT_S)
            return
        line.greet("control", "source")
        control = source.control = ControlLine(line)
        for kind, fields in script:
            line.send(packed(choose, (kind, fields)))
            if kind == "offer":
                said = control.hear(timeout_s=OUR_WAIT_S)
                if said["type"] != "accept":
                    return
                source.shards, source.bulk_channels = said["shards"], said["bulk-channels"]
                if choose.random() < 0.9:
                    source.open_channels()
            elif kind in ("switchover", "commit"):
                control.hear(timeout_s=OUR_WAIT_S)
        control.wait_closed(OUR_WAIT_S)
    leave(choose, source, line)


def destination_session(choose: Choice, address: tuple[str, int], version: int) -> None:
    """A destination that is wrong somewhere."""
    spoken = choose.choice((version, version, wire.OLDEST))
    line = Line.open(address, spoken)
    data: list[Line] = []
    with contextlib.suppress(Closed, Refused, AssertionError, OSError, ValueError):
        line.greet("control", "dest")
        control = ControlLine(line)
        offer = control.hear("offer", timeout_s=5)
        page_bytes = [block["page-bytes"] for block in offer["blocks"]]
        shards, bulk = len(page_bytes), min(1, offer["bulk-channels"])
        script: list[Say] = [
            ("accept", {"page-bytes": page_bytes, "shards": shards, "bulk-channels": bulk, "compress": []}),
            ("ready", {}),
            *([("round-done", {"number": 0})] if spoken >= 4 else []),
            ("prepared", {}),
            ("running", {"resume-ns": 5}),
            ("complete", {"stats": {}}),
        ]
        for kind, fields in changed_script(choose, script, OTHERS):
            line.send(packed(choose, (kind, fields)))
            if kind == "accept" and choose.random() < 0.9:
                for name, count in (("urgent", shards), ("bulk", bulk)):
                    for index in range(count):
                        channel = Line.open(address, spoken)
                        data.append(channel)
                        channel.greet(name, "dest", index=index, migration=offer["migration"], token=offer["token"])
            elif kind in ("ready", "round-done", "prepared"):
                with contextlib.suppress(AssertionError):
                    while control.hear(timeout_s=OUR_WAIT_S)["type"] in ("page-map", "stale-map"):
                        pass
            elif kind == "running":
                for channel in data:
                    channel.send(b"".join(frame(choose) for _ in range(20)))
        control.wait_closed(OUR_WAIT_S)
    for one in [line, *data]:
        choose.choice((one.close, one.reset))()


def frame(choose: Choice) -> bytes:
    """A frame that could be right, and often is not."""
    kind = choose.choice((wire.REQUEST, wire.PAGES, wire.ZERO, wire.END, wire.ERROR, choose.randrange(256)))
    pages = choose.choice((0, 1, 1, 1, 2, 16, 256, 2**32 - 1))
    size = {wire.PAGES: 4096 * min(pages, 16), wire.ERROR: choose.randrange(200)}.get(kind, 0)
    if choose.random() < 0.1:
        size = choose.randrange(10_000)
    block, first = (
        choose.choice((0, 0, 0, 1, 7, 65535)),
        choose.choice((0, 1, 200, 4096, choose.getrandbits(20), 2**63, 2**64 - 1)),
    )
    data = Frame(
        kind, block, first, pages, choose.getrandbits(4), choose.randbytes(size), choose.choice((0, 1, 1, 255))
    ).pack()
    way = choose.random()
    if way < 0.1:
        return damaged(choose, data)
    if way < 0.3:  # a header that says something else, whose checksum is right
        header = bytearray(data[:36])
        at = choose.randrange(9) * 4
        header[at : at + 4] = struct.pack("<I", choose.choice((0, 1, 2**32 - 1, choose.getrandbits(32))))
        return bytes(header) + struct.pack("<I", wire.crc32c(bytes(header))) + data[40:]
    return data


def frames_session(choose: Choice, source: Source) -> None:
    """To a destination that runs a machine: by every channel, in no order."""
    with contextlib.suppress(Closed, OSError):
        for _ in range(choose.randrange(1, 60)):
            choose.choice([*source.urgent, *source.bulk]).send(frame(choose))
    source.lose()


def leave(choose: Choice, source: Source, line: Line) -> None:
    for one in [line, *source.urgent, *source.bulk]:
        choose.choice((one.close, one.reset))()


# ---- The command line, and the control socket

VALUES = (
    "",
    "0",
    "1",
    "-1",
    "1e999",
    "nan",
    "16MiB",
    "99999999999999999999",
    "127.0.0.1:1",
    "[::1]:0",
    ":0",
    "x",
    "/",
    "null",
    "/nonexistent/x",
    "tap:x",
    "forever",
    "rv64",
    "kvm",
    "image",
    "random",
    "--",
    "\udcff",
    "x" * 300,
    "00:00:00:00:00:01",
)
OPTIONS = (
    "--machine",
    "--memory",
    "--vcpus",
    "--workload",
    "--used-memory",
    "--working-set",
    "--prefetch",
    "--push-after",
    "--seed",
    "--disk",
    "--image",
    "--net",
    "--net-mac",
    "--net-address",
    "--listen",
    "--connect",
    "--peer-file",
    "--backing",
    "--busy-poll",
    "--pager",
    "--bulk-channels",
    "--max-bandwidth",
    "--release-ram",
    "--heartbeat",
    "--recover-for",
    "--salvage",
    "--migrate-after",
    "--serve",
    "--on-failure",
    "--on-lost",
    "--run-for",
    "--dump",
    "--no-verify",
    "--user",
    "--control",
    "--metrics",
    "--metrics-file",
    "--json",
    "--log-level",
    "--log-json",
    "-v",
    "--hold",
    "--output",
    "--from",
    "--reclaim",
    "--name",
    "--help",
)
COMMANDS = ("source", "dest", "daemon", "merge", "ctl", "chaos", "")


def command_line(choose: Choice) -> list[str]:
    """One that may mean something."""
    line = [choose.choice(COMMANDS)]
    if choose.random() < 0.7:
        line += {
            "source": ["--machine", choose.choice(("rv64", "image", "kvm")), "--connect", "127.0.0.1:1"],
            "dest": ["--connect", "127.0.0.1:1"],
            "ctl": ["--control", "/nonexistent/x", choose.choice(("status", "end", "quit", "migrate"))],
            "merge": ["/nonexistent/x", "--output", "/nonexistent/y"],
        }.get(line[0], [])
    for _ in range(choose.randrange(1, 6)):
        line.append(choose.choice(OPTIONS))
        if choose.random() < 0.8:
            line.append(choose.choice(VALUES))
    return line


REQUESTS: dict[str, tuple[str, ...]] = {
    "status": ("machine",),
    "events": ("enable",),
    "commands": (),
    "migrate": ("machine", "to"),
    "migrate-pause": ("machine",),
    "start": ("name", "kind", "memory", "vcpus", "workload", "used-memory", "seed", "backing", "disk", "image"),
    "migrate-recover": ("machine", "to"),
    "set": ("max-bandwidth", "bulk-channels", "recover-for"),
    "migrate-cancel": ("machine",),
    "end": ("machine",),
    "reclaim": ("machine",),
    "nonsense": ("x",),
}
JSON_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**64,
    1.5,
    1e300,
    "",
    "x",
    "rv64",
    "image",
    "16MiB",
    "127.0.0.1:1",
    "forever",
    "none",
    "1MiB/s",
    [],
    {},
    [[]],
    {"a": 1},
    "\ud800",
    "y" * 2000,
)


NAMED = ("end", "migrate-cancel", "migrate-pause", "migrate-recover", "migrate", "reclaim")


def request(choose: Choice) -> bytes:
    """A line for the control socket. None that would end, move or cut a machine but ``x``, ``y`` and ``z``."""
    execute = choose.choice(list(REQUESTS))
    arguments = {name: choose.choice(JSON_VALUES) for name in REQUESTS[execute] if choose.random() < 0.6}
    if execute in NAMED:
        arguments["machine"] = choose.choice("xyz")
    if execute == "start":
        arguments["memory"] = choose.choice(("16MiB", "0", 1, "1GiB", "900TiB", None))
        arguments["name"] = choose.choice(("x", "y", "", "-", "x" * 300, 7))
    asked: Fields = {"execute": execute, "arguments": arguments}
    if choose.random() < 0.2:
        asked["id"] = choose.choice(JSON_VALUES)
    if execute not in NAMED and choose.random() < 0.2:
        asked[choose.choice(("x", "arguments", "execute"))] = choose.choice(JSON_VALUES)
    line = json.dumps(asked).encode()
    return damaged(choose, line) if execute not in NAMED and choose.random() < 0.2 else line
