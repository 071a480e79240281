# SPDX-License-Identifier: Apache-2.0
"""The fuzz targets: one function for each parser that another host, process or client reaches.

Each takes any bytes, and raises where the program does what it must not: an exception that no caller expects, a text
that is not fit to be printed, a buffer that grows, a wait without an end, a promise that is broken. `TARGETS` names
them, each with *seeds*: inputs that are valid, made by the program itself, so that they follow the protocol.
"""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import trio

from postcopy import wire as p
from postcopy._native import ffi, lib
from postcopy.errors import PeerError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines import kinds
from postcopy.machines.base import BlockLayout
from postcopy.machines.firecracker import api, handshake, state
from postcopy.machines.firecracker.opened import allows, parse_allowed
from postcopy.machines.image import ImageMachine
from postcopy.machines.preload import client as preload
from postcopy.machines.program import STATE
from postcopy.machines.qemu import qmp
from postcopy.memory import Memory
from postcopy.migration.connection import Control
from postcopy.migration.maps import MapCollector
from postcopy.migration.statistics import Statistics
from postcopy.net.acceptor import Acceptor
from postcopy.net.addresses import Address
from postcopy.net.endings import Endings, Session
from postcopy.net.listening import ListeningChannelSet, ListeningReconnector
from postcopy.net.protection import Protection
from postcopy.records.control import Subscription
from postcopy.service import http, schema
from postcopy.tls._authority import issue, new_authority
from postcopy.tls._connection import Context, TlsStream
from postcopy.tls._credentials import Credentials
from postcopy.tls._names import Authorisation, PeerCertificate
from postcopy.wire import DestinationProtocol, SourceProtocol, State
from postcopy.wire.messages import OLDEST_VERSION
from tests.fuzz.inputs import RAW, Input, Peer, in_virtual_time, pieces, record
from tests.unit.wire import support
from tests.unit.wire.support import SECRET, body

Seeds = Iterator[bytes]
VERSIONS = range(OLDEST_VERSION, p.PROTOCOL_VERSION + 1)
STATES = list(State)
SIZES = (1, 3, 40, 1 << 16)
"""Of the pieces in which bytes arrive."""
MIGRATION = b"m" * 16


@dataclass(frozen=True)
class Target:
    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], Seeds]
    slow: bool = False  # an input takes a millisecond and more


def printable(text: str, limit: int = 600) -> None:
    assert text.isprintable(), f"not fit to be printed: {text!r}"
    assert len(text) <= limit, f"too long to be printed: {len(text)} characters"


# ---- the control connection


def message(data: bytes) -> None:
    """One message: what is taken is the same when it is sent on."""
    given = Input(data)
    version = given.pick(VERSIONS)
    try:
        packed = body(p.decode(given.rest(), version), version)
    except ProtocolError as error:
        printable(str(error))
        return
    again = body(p.decode(packed, version), version)
    assert again == packed


def _messages() -> Iterator[tuple[int, bytes]]:
    """Every message of every version, with the number of its version."""
    for number, version in enumerate(VERSIONS):
        for one in support.MESSAGES:
            if version >= one.SINCE:
                yield number, body(one, version)


def message_seeds() -> Seeds:
    for number, packed in _messages():
        yield bytes([number]) + packed


def session(data: bytes) -> None:
    """A stream of messages, in any state of either side: nobody gets to run the machine by it who may not."""
    given = Input(data)
    version, start, size, flags = given.pick(VERSIONS), given.pick(STATES), given.pick(SIZES), given.number()
    side: SourceProtocol | DestinationProtocol = SourceProtocol(version) if flags & 1 else DestinationProtocol(version)
    in_doubt = not flags & 1 and flags & 2 and start is State.RECOVERING
    support.put(side, start, State.PREPARED if in_doubt else None)
    may_run = side.may_run
    for piece in pieces(given.stream(), size):
        side.receive_data(piece)
        assert len(side._buffer) <= p.MAX_MESSAGE_BYTES + size
        try:
            while (one := side.next_message()) is not None:
                if isinstance(one, p.Commit | p.Recovered) and isinstance(side, DestinationProtocol):
                    may_run = True
                elif isinstance(one, p.Abort | p.Reject) and side.state is State.ABORTED:
                    may_run = isinstance(side, SourceProtocol)
        except ProtocolError as error:
            printable(str(error))
            side.connection_lost(str(error))
        assert side.may_run <= may_run
        printable(side.reason)


_CONVERSATIONS: dict[tuple[State, int], tuple[p.Message, ...]] = {
    (State.SETUP, 0): (
        support.OFFER, p.PageMap(0, 0, 256, b"\x00\x80\x02"), p.PageMap(1, 0, 512, b""), p.Round(0, 2, False),
    ),
    (State.READY, 0): (
        p.EarlyState(b"state"), p.StaleMap(0, 0, 256, b""), p.StaleMap(1, 0, 512, b""), p.Switchover(b"s", 2, True),
    ),
    (State.PREPARED, 0): (p.Ping(1), p.Commit()),
    (State.RECOVERING, 2): (p.Recovered(),),
    (State.CLOSING, 0): (p.CompleteAck({"downtime_ns": 5}),),
    (State.HANDED, 0): (p.Abort("no"),),
    (State.OFFERED, 1): (p.Accept((4096, 4096), 2, 1), p.Ready()),
    (State.ROUND, 1): (p.RoundDone(0),),
    (State.HANDED, 1): (p.Prepared(), p.Pong(1)),
    (State.COMMITTED, 1): (p.Running(1, 2), p.Complete({"demand_pages": 3})),
    (State.RECOVER, 1): (p.ReceivedMap(0, 0, 256, b""), p.ReceivedMap(1, 0, 512, b""), p.Recover(1, 2, 7)),
}  # fmt: skip


def session_seeds() -> Seeds:
    newest = len(VERSIONS) - 1
    for (start, flags), said in _CONVERSATIONS.items():
        for size in (0, 3):
            yield bytes([newest, STATES.index(start), size, flags]) + b"".join(record(body(one)) for one in said)


def control(data: bytes) -> None:
    """The same with tasks around it: `Control` takes what comes, answers, and ends with one of its errors."""
    given = Input(data)
    version, start, size, flags = given.pick(VERSIONS), given.pick(STATES), given.pick(SIZES), given.number()
    side: SourceProtocol | DestinationProtocol = SourceProtocol(version) if flags & 1 else DestinationProtocol(version)
    support.put(side, start)
    peer = Peer(given.stream(), size, stays=bool(flags & 4))

    async def run() -> None:
        connection: Control[Any] = Control(peer, side)

        async def take() -> None:
            with contextlib.suppress(PeerError):
                while True:
                    await connection.receive_any()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            try:
                await connection.run()
            except PostcopyError as error:
                printable(str(error))
                await connection.give_reason(str(error))
            nursery.cancel_scope.cancel()
        await connection.close()

    in_virtual_time(run)
    assert peer.socket.closed


def maps(data: bytes) -> None:
    """Maps of pages in parts: none is taken that does not fit, and no bit is set beyond a block."""
    given = Input(data)
    sizes = (64 + given.number(), 512)
    collector = MapCollector(sizes)
    for _, packed in given.records():
        try:
            one = p.decode(packed)
            if isinstance(one, p.PageMap | p.StaleMap | p.ReceivedMap):
                collector.add(one)
            elif isinstance(one, p.Round | p.Recover | p.Switchover):
                collector.finish(one.TYPE, one.maps)
            elif isinstance(one, p.Complete | p.CompleteAck):
                told = Statistics.from_wire(one.stats).with_source(one.stats)
                assert all(0 <= each < 1 << 64 for each in told.to_wire().values() if isinstance(each, int))
        except ProtocolError as error:
            printable(str(error))
    for bitmap, size in zip(collector.bitmaps, sizes, strict=True):
        assert len(bitmap) == size
        assert bitmap.count() <= size


def map_seeds() -> Seeds:
    runs = b"\x00\x80\x01\x10\x20"
    parts = [p.PageMap(0, 0, 192, runs), p.PageMap(1, 0, 256, b""), p.PageMap(1, 256, 256, b"\x01" * 256)]
    yield b"\x80" + b"".join(record(body(one)) for one in (*parts, p.Round(0, 3, False)))
    yield b"\x80" + b"".join(record(body(p.StaleMap(b, 0, n, runs))) for b, n in ((0, 192), (1, 512)))
    yield b"\x80" + record(body(p.Complete(Statistics().to_wire() | {"demand_pages": 3, "blocktime_ns": [1, 2]})))
    yield b"\x80" + record(body(p.CompleteAck({"downtime_ns": 5, "iteration": 2, "dirty_pages_rate": 2**63})))


# ---- opening a connection

_HELLO = p.Hello("control", "dest", 0, MIGRATION, 3)
_CALLS = {
    "first": p.Hello("control", "source", 0, b"", 0, instance=b"n" * 16),
    "data": p.Hello("urgent", "source", 1, MIGRATION, 3),
    "returning": p.Hello("control", "source", 0, MIGRATION, 4),
    "ended": p.Hello("control", "source", 0, MIGRATION, 4, "completed"),
}


def hello(data: bytes) -> None:
    """Both sides of a handshake: no byte of what comes after it is taken, no more is kept than one small message."""
    given = Input(data)
    version, size, is_client = given.pick(VERSIONS), given.pick(SIZES), given.number() & 1
    one: p.ClientHandshake | p.ServerHandshake = (
        p.ClientHandshake(_HELLO, SECRET, version) if is_client else p.ServerHandshake()
    )
    rest = given.take(len(p.PREAMBLE)) + given.stream()
    try:
        while rest and (wanted := min(one.wanted(), size)):
            one.receive_data(rest[:wanted])
            rest = rest[wanted:]
            assert len(one._messages) <= p.SMALL_MESSAGE_BYTES + p.HEADER_BYTES
    except p.RefusedError as error:
        printable(error.reason)
    except (ProtocolError, PeerError) as error:
        printable(str(error))
    if isinstance(one, p.ServerHandshake):
        one.send_refused("no", "busy", SECRET)
        if one.hello is not None:
            one.send_welcome(SECRET)


def hello_seeds() -> Seeds:
    for number, version in enumerate(VERSIONS):
        preamble = p.MAGIC + bytes([version])
        for call in _CALLS.values():
            yield bytes([number, 3, 0]) + preamble + record(body(call.signed(SECRET, version), version))
        for answer in (p.Welcome(), p.Refused("it is over", "completed"), p.Refused("busy", "busy")):
            yield bytes([number, 0, 1]) + preamble + record(body(answer.signed(SECRET, _HELLO), version))
    yield bytes([0, 1, 0]) + b"GET / HTTP/1.1\r\n\r\n"
    yield bytes([0, 1, 1]) + b"\x15\x03\x01\x00\x02\x02\x28"


def acceptor(data: bytes) -> None:
    """A port that waits for a machine, and for the peer of a migration: whatever connects, the acceptor goes on, keeps
    no place for it, and lets nobody in who does not know the token."""
    given = Input(data)
    size, stays, paused = given.pick(SIZES), given.number() & 1, given.number() & 1
    peer: Any = Peer(given.take(len(p.PREAMBLE)) + given.stream(), size, bool(stays))
    known = Session(MIGRATION, SECRET, 3)

    async def run() -> None:
        endings = Endings()
        endings.remember(Session(b"e" * 16, SECRET, 1), p.Ended.COMPLETED)
        one = Acceptor("dest", [], lambda waiting: "", endings, instance=b"i" * 16)
        channels = one.channel_sets[MIGRATION] = ListeningChannelSet(known, Address("192.0.2.1", 7), 5)
        entered: list[Any] = []
        with mock.patch.object(channels, "enter", lambda key, stream: entered.append(key)):
            reconnector = one.reconnectors[MIGRATION] = ListeningReconnector(known, p.PROTOCOL_VERSION, endings)
            if paused:
                reconnector.pause()
            await one._greet(peer)
        assert not one._half_open
        taken = one._links.statistics().current_buffer_used + len(entered) + (reconnector._arrived is not None)
        assert taken == one.accepted <= 1
        assert peer.socket.closed or taken
        assert len(one._waiting) == one._links.statistics().current_buffer_used
        # The proof is 32 bytes of HMAC: nobody comes by it who was not given it.
        if entered or reconnector._arrived is not None:
            assert any(call.signed(SECRET, 5).proof in data for call in _CALLS.values())

    in_virtual_time(run)


def acceptor_seeds() -> Seeds:
    for size, stays in ((3, 0), (3, 1), (0, 0)):
        for call in _CALLS.values():
            said = record(body(call.signed(SECRET, 5)))
            yield bytes([size, stays, 0]) + p.PREAMBLE + said + (record(body(support.OFFER)) if not call.epoch else b"")
    yield bytes([3, 1, 1]) + p.PREAMBLE + record(body(_CALLS["returning"].signed(SECRET, 5)))
    yield bytes([3, 1, 0]) + p.MAGIC + b"\x09" + record(b"\0" * 100, RAW)


_TLS_CONTEXTS: list[Context] = []


def _tls_contexts() -> tuple[Context, Context]:
    """Of a server and of a client, which trust each other."""
    if not _TLS_CONTEXTS:
        with tempfile.TemporaryDirectory() as place:
            new_authority(f"{place}/ca")
            issue(f"{place}/ca", ["host"], f"{place}/host")
            for role in ("server", "client"):
                names = ("ca-cert.pem", f"{role}-cert.pem", f"{role}-key.pem")
                pems = [Path(place, "host", name).read_bytes() for name in names]
                _TLS_CONTEXTS.append(Context(role == "server", *pems, names=("ca", "certificate", "key")))
    return _TLS_CONTEXTS[0], _TLS_CONTEXTS[1]


def acceptor_tls(data: bytes) -> None:
    """A port with TLS: nothing that was not said inside of TLS, with a certificate, is let in."""
    given = Input(data)
    stays = given.number() & 1
    context, _ = _tls_contexts()

    async def run() -> None:
        credentials = Credentials("/nonexistent")
        one = Acceptor("dest", [], lambda asking: "", protection=Protection(credentials))
        ours, theirs = socket.socketpair()
        with theirs, mock.patch.object(credentials, "context", mock.AsyncMock(return_value=context)):
            theirs.sendall(given.rest())
            if not stays:
                theirs.shutdown(socket.SHUT_WR)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            await one._greet(stream)
        assert stream.socket.fileno() == -1
        assert not one._half_open
        assert one.accepted == 0

    in_virtual_time(run)


def acceptor_tls_seeds() -> Seeds:
    yield b"\x01"
    yield b"\x00" + p.PREAMBLE + record(body(_CALLS["first"]))[3:]
    yield b"\x00\x15\x03\x01\x00\x02\x02\x28"

    async def greet() -> None:
        stream = TlsStream(trio.socket.from_stdlib_socket(ours), _tls_contexts()[1], "host")
        with trio.move_on_after(1):
            await stream.handshake()

    ours, theirs = socket.socketpair()
    with ours, theirs:
        in_virtual_time(greet)
        said = theirs.recv(4096)
    yield b"\x00" + said
    yield b"\x01" + said
    yield b"\x01" + said[:100]


_PATTERNS = ("*", "host", "*.example.org", "a-*-*-*x", "send:*", "CN=*,O=*Example*", "192.0.2.1", "urn:x:*")


def authorisation(data: bytes) -> None:
    """Names in a certificate against the patterns of an operator: a star stays within its part of a name."""
    given = Input(data)
    pattern, kind = given.pick(_PATTERNS), given.pick(("dns", "ip", "uri", "subject"))
    name = given.rest().decode("utf-8", "replace")
    names = ((kind, name),) if kind != "subject" else ()
    peer = PeerCertificate(name if kind == "subject" else "CN=x", names, 0)
    allowed = Authorisation([pattern]).allows("take", peer)
    if kind == "ip" and pattern not in ("*", "192.0.2.1"):
        assert not allowed
    if pattern == "send:*":
        assert not allowed
    if allowed and kind == "dns" and pattern != "*":
        assert name.removesuffix(".").count(".") == pattern.count(".")
    assert len(peer.known_as) >= len(name)


def authorisation_seeds() -> Seeds:
    names = ("host", "a.example.org", "a.b.example.org", "a-b-c-dx", "CN=a,O=My Example", "192.0.2.1", "urn:x:y", "::1")
    for pattern in range(len(_PATTERNS)):
        for kind in range(4):
            yield bytes([pattern, kind]) + names[pattern].encode()
    yield b"\x03\x00a" + b"-" * 3000


# ---- HTTP, and the control socket


def metrics(data: bytes) -> None:
    """The metrics' HTTP server: every answer is HTTP that a client understands."""
    given = Input(data)
    size, stays = given.pick(SIZES), given.number() & 1
    peer: Any = Peer(given.rest(), size, bool(stays))  # as much of a stream as is needed

    async def run() -> None:
        server = http.HttpServer([], "/metrics", "text/plain", lambda: b"postcopy_up 1\n")
        server._waiting[peer] = trio.CancelScope()  # as `serve` does
        await server._connection(peer)
        assert not server._waiting

    in_virtual_time(run)
    assert peer.socket.closed
    rest = bytes(peer.sent)
    while rest:
        head, _, rest = rest.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        assert status.startswith("HTTP/1.1 "), status
        length = int(next(line for line in lines if line.lower().startswith("content-length:")).split(":")[1])
        if rest[:length].startswith(b"HTTP/1.1 "):
            continue  # the answer to HEAD
        rest = rest[length:]


def metrics_seeds() -> Seeds:
    get = b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n"
    yield b"\x03\x00" + get
    yield b"\x00\x01" + get
    yield b"\x03\x00" + get * 3
    yield b"\x02\x00HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
    yield b"\x03\x00HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + get
    yield b"\x03\x00GET /x?y HTTP/1.0\r\n\r\n"
    yield b"\x03\x00POST /metrics HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n"
    yield b"\x03\x00PUT /metrics HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc" + get
    yield b"\x03\x00GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: upgrade, close\r\nUpgrade: h2c\r\n\r\n"
    yield b"\x03\x01" + p.PREAMBLE


def request(data: bytes) -> None:
    """Lines on the control socket: each is a request that makes sense, or is refused in one line of JSON."""
    given = Input(data)
    size = given.pick(SIZES)
    splitter = schema.LineSplitter(4096)
    for piece in pieces(given.rest(), size):
        try:
            lines = splitter.feed(piece)
        except schema.ControlError as error:
            json.loads(schema.refusal(error))
            return
        assert len(splitter._rest) <= 4096
        for line in lines:
            try:
                asked = schema.parse_request(line)
                answer = schema.answer(Subscription(enabled=True), asked.id)
                assert asked.command in schema.COMMANDS
                assert asked.arguments.keys() <= schema.COMMANDS[asked.command].arguments.keys()
            except schema.RequestError as error:
                answer = schema.refusal(error.error, error.id)
            assert answer.count(b"\n") == 1
            json.loads(answer)


def request_seeds() -> Seeds:
    values = ("1", "64MiB", "auto", "127.0.0.1:7", True, 7, 0.5, "kvm", "none", [1], None)
    for name, command in schema.COMMANDS.items():
        yield b"\x03" + json.dumps({"execute": name, "id": name}).encode() + b"\n"
        for start in range(len(values)):
            given = {key: values[(start + at) % len(values)] for at, key in enumerate(command.arguments)}
            if given:
                yield b"\x03" + json.dumps({"execute": name, "arguments": given}).encode() + b"\n"
    yield b'\x00{"execute": "status"}\n\n{"execute": "quit", "id": 1e999}\n'
    yield b"\x03" + b"[" * 3000 + b"\n"


# ---- what a source offers and sends of its machine

_ALLOWED = ("/srv/vm/", "/srv/*/disk-*-*-*.img", "/srv/vm-*/", "tap:vm*", "/")


def allowed(data: bytes) -> None:
    """A path or a TAP in an offer against what the operator allows: never one with a detour, nor beside it."""
    given = Input(data)
    pattern, name = given.pick(_ALLOWED), given.rest().decode("utf-8", "surrogateescape")
    if not allows(parse_allowed(pattern), name):
        return
    assert name.startswith(pattern.partition("*")[0])
    assert name.startswith("tap:") or ".." not in name.split("/")
    if not pattern.endswith("/"):
        assert name.count("/") == pattern.count("/")


def allowed_seeds() -> Seeds:
    names = (
        "/srv/vm/a/b",
        "/srv/x/disk-1-2-3.img",
        "/srv/vm-1/a",
        "tap:vm0",
        "/a/../b",
        "//a",
        "/srv/vm/../../etc/passwd",
    )
    for number in range(len(_ALLOWED)):
        for name in names:
            yield bytes([number]) + name.encode()
    yield b"\x01/srv/x/disk-" + b"-" * 3000


class _Enough(ResourceError):
    """The offer makes sense: its memory would be made now."""


def _no_memory(*_: object, **__: object) -> Memory:
    raise _Enough("memory")


_HOSTS = (
    kinds.HostOptions(),
    kinds.HostOptions(backing="anon", disk="/dev/null", drive="rootfs=/dev/null", api_socket="/nonexistent/a"),
    kinds.HostOptions(qmp="/nonexistent/q", preload="/nonexistent/p"),
)


def offer(data: bytes) -> None:
    """A machine that is offered: `ProtocolError` where it makes no sense, another error of ours where it cannot be
    taken here."""
    given = Input(data)
    host = given.pick(_HOSTS)
    try:
        one = p.decode(given.rest())
        if not isinstance(one, p.Offer):
            return
        layout = [BlockLayout(block.name, block.size_bytes, block.page_bytes) for block in one.blocks]
        with mock.patch.object(Memory, "create", _no_memory):
            kinds.create_destination(one.machine, one.config, layout, host)
    except PostcopyError as error:
        shown = str(error)
    else:
        shown = ""
    assert len(shown) < 5000


def offer_seeds() -> Seeds:
    toy = {"vcpus": 1, "workload": "random", "working-set-bytes": 0, "seed": 1}
    files = [{"device": 1, "inode": 2}]
    qemu = {"version": "7.2.22", "machine": "pc-i440fx-7.2", "accelerator": "kvm", "cpu": "qemu64", "vcpus": 1}
    configs: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        ("rv64", toy, ("shared", "vcpu0")),
        ("kvm", toy | {"workload": "disk", "disk": "/x", "disk-bytes": 4096}, ("shared", "vcpu0")),
        ("rv64", toy | {"workload": "echo", "net-mac": 2**41, "net-address": 2**31}, ("shared", "vcpu0")),
        ("image", {"file-bytes": 4096}, ("image",)),
        ("firecracker", {
            "regions": [4096], "version": "1.12.0", "drives": {"rootfs": {"path": "/x", "read-only": True}},
            "nets": {"eth0": "tap0"}, "vsock": "/v", "vcpus": 2,
        }, ("memory",)),
        ("qemu", qemu | {"boot": "b", "files": files}, ("ram",)),
        ("program", {"boot": "b", "files": [[1, 2]]}, ("x",)),
    ]  # fmt: skip
    for machine, config, names in configs:
        blocks = tuple(p.Block(name, 4096, 4096) for name in names)
        for host in range(len(_HOSTS)):
            yield bytes([host]) + body(p.Offer(MIGRATION, SECRET, machine, config, blocks, 1, 200, ("lz4", "new")))


_image: list[ImageMachine] = []


def machine_state(data: bytes) -> None:
    """The state of a machine, where Python looks into it: an image's, and a microVM's, whose disks are renamed."""
    given = Input(data)
    kind = given.number() % 2
    if kind == 0:
        if not _image:
            _image.append(ImageMachine(Memory.create("anon", 4096), 4096, True, ""))

        async def load() -> None:
            await _image[0].load_state(given.rest())

        with contextlib.suppress(ProtocolError):
            in_virtual_time(load)
        return
    old, new = (given.take(given.number() % 32).decode("utf-8", "surrogateescape") for _ in range(2))
    content = given.rest()
    sealed = content + _crc64(content)
    try:
        changed = state.with_disks(sealed, {old: new})
    except ProtocolError:
        return
    assert changed[-8:] == _crc64(changed[:-8])
    name = new.encode("utf-8", "surrogateescape")
    assert len(name).to_bytes(8, "little") + name in changed
    assert len(changed) - len(sealed) == len(name) - len(old.encode("utf-8", "surrogateescape"))


def _crc64(content: bytes) -> bytes:
    value: int = lib.pc_crc64(0, ffi.from_buffer("char[]", content), len(content))
    return value.to_bytes(8, "little")


def machine_state_seeds() -> Seeds:
    yield b"\x00" + msgspec.msgpack.encode({"digest": 2**63})
    yield b"\x00" + msgspec.msgpack.encode({"digest": None})
    yield b"\x00" + STATE
    yield b"\x00" + b"\x91" * 3000
    yield b"\x01\x02/a\x05/home" + b"head" + (2).to_bytes(8, "little") + b"/a" + b"tail"


# ---- monitors of VMMs, and programs


def firecracker_handshake(data: bytes) -> None:
    """What Firecracker sends to its page fault handler: regions that do not overlap, in whole pages."""
    given = Input(data)
    page_bytes = given.pick((4096, 2 << 20))
    try:
        sent = handshake._decode(given.rest())
        if sent is None:
            return
        regions = handshake.check_regions(
            handshake.Region(one.address, one.size_bytes, one.offset, page_bytes)
            for one in handshake._check_pages(sent)
        )
    except ProtocolError as error:
        printable(str(error))
        return
    assert 0 < len(regions) <= handshake.MAX_REGIONS
    end = 0
    for one in regions:
        assert one.offset >= end
        end = one.offset + one.size_bytes
        assert one.size_bytes % page_bytes == 0 < one.size_bytes


def firecracker_handshake_seeds() -> Seeds:
    regions = [
        {"base_host_virt_addr": 0x7F00_0000_0000 + at, "size": 2 << 20, "offset": at} for at in (0, 2 << 20, 8 << 20)
    ]
    for more in ({}, {"page_size_kib": 4096}, {"page_size": 2 << 20, "page_size_kib": 2 << 20, "new": [[1]]}):
        for page in (b"\0", b"\1"):
            yield page + json.dumps([one | more for one in regions]).encode()


def firecracker_api(data: bytes) -> None:
    """Firecracker's answers over HTTP: each way in which one is wrong has its error."""
    given = Input(data)
    peer = Peer(given.take(0), given.pick(SIZES), bool(given.number() & 1))
    peer._says = given.rest()

    async def connect(*_: object) -> Peer:
        return peer

    async def run() -> None:
        one = api.Api("/nonexistent/socket")
        with mock.patch.object(one, "_connect", connect):
            try:
                said, version = await one.instance()
                printable(said, 5000)
                printable(version, 5000)
            except api.FirecrackerError as error:
                printable(str(error), 5000)

    in_virtual_time(run)
    assert peer.socket.closed


def firecracker_api_seeds() -> Seeds:
    about = b'{"id":"a","state":"Running","vmm_version":"1.12.0","app_name":"Firecracker"}'
    fault = b'{"fault_message":"The requested operation is not supported before starting the microVM."}'
    for status, content in ((200, about), (400, fault), (204, b"")):
        head = f"HTTP/1.1 {status} X\r\nServer: Firecracker API\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        yield b"\x03\x00" + head + content
        yield b"\x00\x01" + head + content
    yield b"\x03\x00HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    yield b"\x03\x00HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}"


def qemu_monitor(data: bytes) -> None:
    """QMP, as the client sees it: events, answers to what was asked, or `QemuAnswer`."""
    given = Input(data)
    size = given.pick(SIZES)
    one = qmp.QmpProtocol()
    for name in ("qmp_capabilities", "query-status", "migrate"):
        one.command(name)
    answered = set()
    try:
        for piece in pieces(given.rest(), size):
            for said in one.receive(piece):
                assert one.version is not None
                if isinstance(said, qmp.Answer):
                    assert 1 <= said.number <= 3
                    assert said.number not in answered
                    answered.add(said.number)
                    for text in said.refusal or ():
                        printable(text, 5000)
                else:
                    assert isinstance(said.when_ns, int)
    except qmp.QemuError as error:
        printable(str(error), 5000)


def qemu_monitor_seeds() -> Seeds:
    greeting = (
        b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\r\n'
    )
    event = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP", "data": {"a": 1}}\r\n'
    refusal = b'{"id": 2, "error": {"class": "GenericError", "desc": "no"}}\r\n'
    for size in (b"\x03", b"\x01"):
        yield size + greeting + b'{"return": {}, "id": 1}\r\n' + event + refusal + b'{"return": [], "id": 3}\r\n'
    yield b"\x03" + greeting + b"[" * 2000 + b"\n"


def preload_answer(data: bytes) -> None:
    """The answers of the library inside of a program that is moved."""
    given = Input(data)
    op = given.pick(list(preload._Op))
    one = preload.Preload(1, "/nonexistent/socket")
    asked = [preload.Mapping(4096, 4096, 0, 4096, 1, 2, "a", None)]  # type: ignore[arg-type]
    descriptors: list[Any] = [None] * (given.number() % 3)
    try:
        reply = one._decode(given.rest(), op, descriptors, asked, given.number())
    except PostcopyError as error:
        printable(str(error), 5000)
        return
    assert len(reply.mappings) <= preload.MAX_MAPPINGS
    for *numbers, name in reply.mappings:
        assert all(isinstance(number, int) for number in numbers)
        printable(preload._name(name))


def preload_seeds() -> Seeds:
    mapping = preload._MAPPING.pack(4096, 4096, 0, 1, 2, 4096, b"/memfd:a (deleted)")
    for number, op in enumerate(preload._Op):
        for count in (0, 1, 2):
            reply = preload._REPLY.pack(preload._MAGIC, preload._VERSION, op, 0, 0, 0, count, 1, 0, 7)
            yield bytes([number, count]) + reply + mapping * count
        for step in preload._Step:
            reply = preload._REPLY.pack(preload._MAGIC, preload._VERSION, op, 16, step, 0, 0, 4, 0, 7)
            yield bytes([number, 0]) + reply


TARGETS = {
    target.name: target
    for target in (
        Target("message", message, message_seeds),
        Target("session", session, session_seeds),
        Target("control", control, session_seeds, slow=True),
        Target("maps", maps, map_seeds),
        Target("hello", hello, hello_seeds),
        Target("acceptor", acceptor, acceptor_seeds, slow=True),
        Target("acceptor_tls", acceptor_tls, acceptor_tls_seeds, slow=True),
        Target("authorisation", authorisation, authorisation_seeds),
        Target("metrics", metrics, metrics_seeds, slow=True),
        Target("request", request, request_seeds),
        Target("allowed", allowed, allowed_seeds),
        Target("offer", offer, offer_seeds),
        Target("machine_state", machine_state, machine_state_seeds, slow=True),
        Target("firecracker_handshake", firecracker_handshake, firecracker_handshake_seeds),
        Target("firecracker_api", firecracker_api, firecracker_api_seeds, slow=True),
        Target("qemu_monitor", qemu_monitor, qemu_monitor_seeds),
        Target("preload_answer", preload_answer, preload_seeds),
    )
}
