# SPDX-License-Identifier: Apache-2.0
"""A peer of our own: sources and destinations that do what they are told, right or wrong, step by step.

Blocking sockets with deadlines, and a thread for each control connection that gives signs of life, so that a test can
stop in any state for as long as it likes. `Source` and `Destination` know the right order of things; a test that wants
the wrong one takes their `control` and says it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack

from hostile import _tls
from hostile import _wire as wire
from hostile._program import Control, Program, verify
from hostile._wire import Fields, Frame

Address = tuple[str, int]
TIMEOUT_S = 30.0
PAGE = 4096
PUSH_BYTES = 1 << 20
HEARTBEAT_S = 0.5


class Closed(Exception):
    """The other side has closed, or reset, the connection."""


class Refused(Exception):
    """The other side has answered hello with `refused`."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(str(fields.get("reason")))
        self.fields = fields


_open: list[socket.socket] = []


_host: list[str] = []
_under_tls: list[bool] = []


@contextlib.contextmanager
def under_tls() -> Iterator[None]:
    """Whatever is said meanwhile."""
    _under_tls.append(True)
    try:
        yield
    finally:
        _under_tls.pop()


@contextlib.contextmanager
def calling_from(host: str) -> Iterator[None]:
    """As another peer, an address of 127.0.0.0/8: without TLS a peer is its host; under TLS it has a name for each."""
    _host.append(host)
    try:
        yield
    finally:
        _host.pop()


def close_all() -> None:
    """Every connection that was made here: tests end in the middle of things."""
    while _open:
        sock = _open.pop()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # for the thread that reads from it
        sock.close()


class Line:
    """One connection, from its first byte on."""

    def __init__(self, sock: socket.socket, version: int, caller: str | None = None) -> None:
        """`caller`: see `_tls.carried`."""
        if _under_tls:
            sock = _tls.carried(sock, caller)
        sock.settimeout(TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _open.append(sock)
        self.sock = sock
        self.version = version
        self._sending = threading.Lock()
        self._held: bytearray | None = None

    @classmethod
    def open(cls, address: Address, version: int) -> Line:
        host = _host[-1] if _host else ""
        return cls(socket.create_connection(address, TIMEOUT_S, (host, 0) if host else None), version, host)

    def send(self, data: bytes) -> None:
        try:
            with self._sending:
                if self._held is None:
                    self.sock.sendall(data)
                else:
                    self._held += data
        except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError) as error:
            raise Closed(str(error)) from error

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is sent meanwhile goes in one piece: the program has all of it before it can answer the first."""
        with self._sending:
            self._held = bytearray()
        try:
            yield
        finally:
            with self._sending:
                held, self._held = self._held, None
        self.send(bytes(held))

    def say(self, kind: str, **fields: Any) -> None:
        self.send(wire.message(kind, {key.replace("_", "-"): value for key, value in fields.items()}))

    def take(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self.sock.recv(size - len(data))
            except ConnectionResetError as error:
                raise Closed("reset") from error
            if not part:
                raise Closed(f"closed after {len(data)} of {size} bytes")
            data += part
        return bytes(data)

    def hear(self) -> Fields:
        """The next message, whatever it is. The checksum is verified."""
        length = self.take(4)
        (crc,) = struct.unpack(">I", self.take(4))
        body = self.take(struct.unpack(">I", length)[0])
        assert crc == wire.crc32c(body, wire.crc32c(length)), "the program has sent a damaged message"
        return wire.unpack(body)

    def take_frame(self) -> Frame:
        frame, size = wire.unpack_frame(self.take(wire.FRAME_BYTES))
        payload = self.take(size)
        return Frame(frame.type, frame.block, frame.first_page, frame.pages, frame.request_id, payload, frame.flags)

    def greet(self, channel: str, side: str, **fields: Any) -> Fields:
        """The client's handshake: `welcome`, or `Refused`."""
        self.send(wire.preamble(self.version) + wire.hello(channel, side, version=self.version, **fields))
        theirs = self.take(8)
        assert theirs[:7] == wire.MAGIC, theirs
        assert theirs[7] == self.version, f"version {theirs[7]} was answered to {self.version}"
        answer = self.hear()
        if answer["type"] == "refused":
            raise Refused(answer)
        assert answer["type"] == "welcome", answer
        if self.version >= 3 and fields.get("token"):
            hello = {"channel": channel, "index": 0, "migration": b"", "epoch": 0} | fields
            assert answer["proof"] == wire.welcome(hello, fields["token"])["proof"], "a welcome that is not proven"
        return answer

    def closed_within(self, deadline_s: float) -> bool:
        """Whether the other side closes in that time; what it says before is thrown away."""
        deadline = time.monotonic() + deadline_s
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                ready, _, _ = select.select([self.sock], [], [], left)
                if ready and not self.sock.recv(65536):
                    return True
            return False
        return True

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Goes without a goodbye."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class ControlLine:
    """A control connection after its handshake: answers pings and pings itself, unless it is `frozen`."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.frozen = threading.Event()
        self._heard: queue.Queue[Fields | Exception] = queue.Queue()
        self._over = threading.Event()
        line.sock.settimeout(None)
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                fields = self.line.hear()
                if fields["type"] == "ping":
                    if not self.frozen.is_set():
                        self.line.say("pong", nonce=fields["nonce"])
                elif fields["type"] != "pong":
                    self._heard.put(fields)
        except (Closed, OSError, AssertionError) as error:
            self._heard.put(error if isinstance(error, AssertionError) else Closed(str(error)))

    def _beat(self) -> None:
        nonce = 0
        while not self._over.wait(HEARTBEAT_S):
            if not self.frozen.is_set():
                nonce += 1
                try:
                    self.line.say("ping", nonce=nonce)
                except (Closed, OSError):
                    return

    def say(self, kind: str, **fields: Any) -> None:
        self.line.say(kind, **fields)

    def hear(self, *kinds: str, timeout_s: float = TIMEOUT_S) -> Fields:
        """The next message that is no sign of life; `Closed` when there is none any more."""
        try:
            found = self._heard.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"no {' or '.join(kinds) or 'message'} within {timeout_s:g} s") from None
        if isinstance(found, Exception):
            self._heard.put(found)
            raise found
        assert not kinds or found["type"] in kinds, f"{found} instead of {' or '.join(kinds)}"
        return found

    def wait_closed(self, timeout_s: float = TIMEOUT_S) -> list[Fields]:
        """Until the other side has closed it; what it has said before."""
        said: list[Fields] = []
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                said.append(self.hear(timeout_s=max(0.01, deadline - time.monotonic())))
        except Closed:
            return said

    def close(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self.line.sock.shutdown(socket.SHUT_RDWR)
        self.line.close()

    def reset(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self.line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.line.sock.shutdown(socket.SHUT_RD)
        self.line.close()


@dataclass
class Machine:
    """What a source offers: made up, or taken from a real one by `Destination.take_all`."""

    kind: str
    config: Fields
    blocks: list[Fields]
    page_bytes: list[int] = field(default_factory=list)
    state: bytes = b""
    maps: list[Fields] = field(default_factory=list)
    pages: dict[tuple[int, int], bytes] = field(default_factory=dict)

    @classmethod
    def image(cls, size_bytes: int) -> Machine:
        """One that says nothing about its content: the digest is unknown. Every page is present."""
        pages = -(-size_bytes // PAGE)
        block = {"name": "image", "size-bytes": pages * PAGE, "page-bytes": PAGE}
        page_map = {"block": 0, "first-page": 0, "pages": pages, "runs": wire.all_pages(pages)}
        state = msgpack.packb({"digest": None})
        return cls("image", {"file-bytes": size_bytes}, [block], [PAGE], state, [page_map])

    def page(self, block: int, number: int) -> bytes:
        """As it was taken; of a made up one something that is no zeros and tells which page it is."""
        if self.kind == "image" and not self.pages:
            return struct.pack("<QQ", number + 1, block) * (PAGE // 16)
        return self.pages.get((block, number), bytes(self.page_bytes[block]))


class Source:
    """A source that connects, or that a destination has connected to (`Listener.source`)."""

    def __init__(
        self,
        address: Address,
        machine: Machine,
        version: int,
        *,
        bulk_channels: int = 1,
        placed_every_ms: int = 0,
        more: Fields | None = None,
    ) -> None:
        """`more`: fields of the offer that nobody knows."""
        self.address = address
        self.machine = machine
        self.version = version
        self.bulk_channels = bulk_channels
        self.placed_every_ms = placed_every_ms
        self.more = more or {}
        self.migration, self.token = os.urandom(16), os.urandom(16)
        self.epoch = 0
        self.control: ControlLine
        self.urgent: list[Line] = []
        self.bulk: list[Line] = []
        self.delay_s = 0.0  # of each answer
        self.listener: Listener | None = None

    def connect(self) -> Source:
        if self.listener is not None:
            return self  # it was connected to
        line = Line.open(self.address, self.version)
        line.greet("control", "source")
        self.control = ControlLine(line)
        return self

    def offer(self) -> Source:
        if self.version >= 4:
            self.more.setdefault("compress", [])
        self.control.say(
            "offer",
            migration=self.migration,
            token=self.token,
            machine=self.machine.kind,
            config=self.machine.config,
            blocks=self.machine.blocks,
            bulk_channels=self.bulk_channels,
            placed_every_ms=self.placed_every_ms,
            **self.more,
        )
        return self

    def accepted(self) -> Source:
        fields = self.control.hear("accept")
        self.machine.page_bytes = fields["page-bytes"]
        self.shards, self.bulk_channels = fields["shards"], fields["bulk-channels"]
        return self

    def ready(self) -> Source:
        self.open_channels()
        self.control.hear("ready")
        return self

    def open_channels(self) -> None:
        self.urgent = [self.channel("urgent", number) for number in range(self.shards)]
        self.bulk = [self.channel("bulk", number) for number in range(self.bulk_channels)]

    def channel(self, kind: str, index: int) -> Line:
        if self.listener is not None:
            return self.listener.channel(kind, index)
        line = Line.open(self.address, self.version)
        line.greet(kind, "source", index=index, migration=self.migration, epoch=self.epoch, token=self.token)
        return line

    def switch(self) -> Source:
        """As in version 3, which version 4 allows, too: all in the pause."""
        for page_map in self.machine.maps:
            self.control.line.say("page-map", **page_map)
        more = {"whole": False} if self.version >= 4 else {}
        self.control.say("switchover", state=self.machine.state, maps=len(self.machine.maps), **more)
        return self

    def told(self) -> Source:
        """While the machine runs: which pages there are."""
        for page_map in self.machine.maps:
            self.control.line.say("page-map", **page_map)
        self.round(0, pushed=False, maps=len(self.machine.maps))
        return self

    def stale(self, *pages: int) -> Source:
        """These pages of the first block have changed."""
        for block, fields in enumerate(self.machine.blocks):
            count = fields["size-bytes"] // self.machine.page_bytes[block]
            runs = wire.encode_runs(not block and page in pages for page in range(count))
            self.control.say("stale-map", block=block, first_page=0, pages=count, runs=runs)
        return self

    def round(self, number: int, *, pushed: bool, maps: int | None = None) -> None:
        """Which the destination answers."""
        self.control.say("round", number=number, maps=len(self.machine.blocks) if maps is None else maps, pushed=pushed)
        assert self.control.hear("round-done")["number"] == number

    def prepared(self) -> Source:
        self.control.hear("prepared")
        return self

    def commit(self) -> Source:
        self.control.say("commit")
        return self

    def running(self) -> Source:
        self.control.hear("running")
        return self

    def until(self, step: str) -> Source:
        """All steps up to this one: ``connect``, ``offer``, ``accepted``, ... ``running``."""
        for name in STEPS:
            getattr(self, name)()
            if name == step:
                return self
        raise AssertionError(step)

    def serve(self) -> None:
        """Answers requests, in a thread for each urgent channel, until the channel ends."""
        for line in self.urgent:
            threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: Line) -> None:
        line.sock.settimeout(None)
        with contextlib.suppress(Closed, OSError):
            while True:
                asked = line.take_frame()
                time.sleep(self.delay_s)
                for page in range(asked.first_page, asked.first_page + asked.pages):
                    content = self.machine.page(asked.block, page)
                    line.send(Frame(wire.PAGES, asked.block, page, 1, asked.request_id, content, wire.ANSWERS).pack())

    def push_all(self) -> None:
        """By the first bulk channel, then `end` by all of them."""
        for page_map in self.machine.maps:
            self._push(page_map["block"], page_map["first-page"], page_map)
        for line in self.bulk:
            line.send(Frame(wire.END, 0, 0, 0).pack())

    def _push(self, block: int, first: int, page_map: Fields) -> None:
        most = PUSH_BYTES // self.machine.page_bytes[block]
        run: list[int] = []
        for number, present in enumerate([*wire.decode_runs(page_map["runs"], page_map["pages"]), False], first):
            if present and len(run) < most:
                run.append(number)
                continue
            if run:
                content = b"".join(self.machine.page(block, page) for page in run)
                self.bulk[0].send(Frame(wire.PAGES, block, run[0], len(run), 0, content).pack())
            run = [number] if present else []

    def finish(self) -> Fields:
        """The rest of a migration that is past `running`."""
        self.serve()
        if self.bulk:
            self.push_all()
        complete = self.control.hear("complete")
        self.control.say("complete-ack", stats={"downtime-ns": 1, "total-ns": 1})
        return complete

    def come_back(self) -> Source:
        """A connection in a new epoch, instead of the old one, after which the destination tells what it has."""
        if self.listener is not None:
            self.control = ControlLine(self.listener.control())
            return self
        self.epoch += 1
        line = Line.open(self.address, self.version)
        line.greet("control", "source", migration=self.migration, epoch=self.epoch, token=self.token)
        self.control = ControlLine(line)
        return self

    def recovered(self) -> Source:
        while self.control.hear("received-map", "recover")["type"] != "recover":
            pass
        self.control.say("recovered")
        self.open_channels()
        return self

    def lose(self) -> None:
        """All connections at once, without a goodbye."""
        for line in [*self.urgent, *self.bulk]:
            line.reset()
        self.urgent, self.bulk = [], []
        self.control.reset()


STEPS = ("connect", "offer", "accepted", "ready", "switch", "prepared", "commit", "running")


class Destination:
    """A destination that connects, or that a source has connected to (`Listener.destination`)."""

    def __init__(
        self, line: Line, open_channel: Callable[[str, int], Line], tokens: dict[bytes, bytes] | None = None
    ) -> None:
        """`tokens`: where the one of the offer is kept, for those who prove that they know it."""
        self.control = ControlLine(line)
        self.tokens = {} if tokens is None else tokens
        self.shards = 1
        self.bulk_channels = 1
        self._open = open_channel
        self.migration = self.token = b""
        self.epoch = 0
        self.urgent: list[Line] = []
        self.bulk: list[Line] = []

    @classmethod
    def connect(cls, address: Address, version: int) -> Destination:
        line = Line.open(address, version)
        line.greet("control", "dest")

        def channel(kind: str, index: int) -> Line:
            data = Line.open(address, version)
            data.greet(kind, "dest", index=index, migration=dest.migration, epoch=dest.epoch, token=dest.token)
            return data

        dest = cls(line, channel)
        return dest

    def offered(self) -> Destination:
        fields = self.control.hear("offer")
        self.migration, self.token = fields["migration"], fields["token"]
        self.tokens[self.migration] = self.token
        self.offer = fields
        self.machine = Machine(fields["machine"], fields["config"], fields["blocks"])
        self.shards = len(fields["blocks"])  # our own machines have one for each
        return self

    def accept(self) -> Destination:
        self.machine.page_bytes = [block["page-bytes"] for block in self.machine.blocks]
        self.bulk_channels = min(self.bulk_channels, self.offer["bulk-channels"])
        more: dict[str, Any] = {"compress": []} if self.control.line.version >= 4 else {}
        self.control.say(
            "accept", page_bytes=self.machine.page_bytes, shards=self.shards, bulk_channels=self.bulk_channels, **more
        )
        return self

    def ready(self) -> Destination:
        self.urgent = [self._open("urgent", number) for number in range(self.shards)]
        self.bulk = [self._open("bulk", number) for number in range(self.bulk_channels)]
        self.control.say("ready")
        return self

    def handed(self) -> Destination:
        """Takes part in rounds. What is stale was all zeros in the page maps, and is not asked for by itself."""
        kinds = ("page-map", "stale-map", "round", "switchover")
        while (fields := self.control.hear(*kinds))["type"] != "switchover":
            if fields["type"] == "page-map":
                self.machine.maps.append({key: value for key, value in fields.items() if key != "type"})
            elif fields["type"] == "round":
                self.control.say("round-done", number=fields["number"])
        self.machine.state = fields["state"]
        return self

    def prepare(self) -> Destination:
        self.control.say("prepared")
        return self

    def committed(self) -> Destination:
        self.control.hear("commit")
        return self

    def run(self) -> Destination:
        self.control.say("running", resume_ns=1, **({"ago_ns": 0} if self.control.line.version >= 4 else {}))
        return self

    def until(self, step: str) -> Destination:
        """``offered``, ``accept``, ``ready``, ``handed``, ``prepare``, ``committed``, ``run``."""
        for name in ("offered", "accept", "ready", "handed", "prepare", "committed", "run"):
            getattr(self, name)()
            if name == step:
                return self
        raise AssertionError(step)

    def take_all(self) -> Machine:
        """Everything, to the end of the migration: the source has then completed."""
        for line in self.bulk:
            while (frame := line.take_frame()).type != wire.END:
                size = self.machine.page_bytes[frame.block]
                for number in range(frame.pages):
                    content = frame.payload[number * size : (number + 1) * size] or bytes(size)
                    self.machine.pages[frame.block, frame.first_page + number] = content
        self.control.say("complete", stats={})
        self.control.hear("complete-ack")
        return self.machine

    def come_back(self, address: Address, version: int) -> Destination:
        """A connection in a new epoch, to a source that listens."""
        self.epoch += 1
        line = Line.open(address, version)
        line.greet("control", "dest", migration=self.migration, epoch=self.epoch, token=self.token)
        self.control = ControlLine(line)
        return self

    def taken_back(self, line: Line) -> Destination:
        """The source has connected again, by this line (`Listener.control`)."""
        self.control = ControlLine(line)
        return self

    def say_what_is_here(self, *, resume_ns: int = 1, damage: int = 0) -> Destination:
        """Nothing: every page is still to come. `damage`: to the digest."""
        digest = 0
        for number, block in enumerate(self.machine.blocks):
            pages = block["size-bytes"] // self.machine.page_bytes[number]
            digest = wire.crc32c(bytes(-(-pages // 64) * 8), digest)
            self.control.say("received-map", block=number, first_page=0, pages=pages, runs=b"")
        self.control.say("recover", resume_ns=resume_ns, maps=len(self.machine.blocks), digest=digest ^ damage)
        return self

    def recovered(self) -> Destination:
        self.control.hear("recovered")
        self.urgent = [self._open("urgent", number) for number in range(self.shards)]
        self.bulk = [self._open("bulk", number) for number in range(self.bulk_channels)]
        return self

    def request(self, block: int, page: int, request_id: int = 1) -> Frame:
        self.urgent[0].send(Frame(wire.REQUEST, block, page, 1, request_id).pack())
        return self.urgent[0].take_frame()

    def lose(self) -> None:
        for line in [*self.urgent, *self.bulk]:
            line.reset()
        self.urgent, self.bulk = [], []
        self.control.reset()


class Listener:
    """A port of ours, which the program connects to."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.tokens: dict[bytes, bytes] = {}
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._silent: list[Line] = []
        self._connected: list[Line] = []  # that have said nothing yet
        self._channels: dict[tuple[str, int], Line] = {}  # that were welcomed

    @property
    def address(self) -> Address:
        host, port = self._socket.getsockname()
        return str(host), int(port)

    @property
    def where(self) -> str:
        return "{}:{}".format(*self.address)

    def accept(self, timeout_s: float = TIMEOUT_S) -> Line:
        """The connection as it comes, nothing said. `TimeoutError` when there is none."""
        self._socket.settimeout(timeout_s)
        sock, _ = self._socket.accept()
        return Line(sock, self.version)

    def take_what_waits(self) -> None:
        """Takes and closes all connections that have been made already."""
        while self._connected:
            self._connected.pop().close()
        with contextlib.suppress(TimeoutError):
            while True:
                self.accept(0.3).close()

    def keep_silent(self) -> None:
        """Takes every connection from now on, and says nothing."""

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    self._silent.append(self.accept(600))

        threading.Thread(target=take, daemon=True).start()

    def backlog(self) -> bool:
        """Whether there is a connection that was not accepted yet, or one that waits for an answer."""
        if self._silent or select.select([self._socket], [], [], 0)[0]:
            return True
        if line := self._first_to_speak(0):
            self._connected.insert(0, line)
        return line is not None

    def speaker(self, timeout_s: float) -> Line:
        """The first of those that have connected which says something: a caller may connect before it has anything to
        say, and hang up without."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if line := self._first_to_speak(left_s):
                return line
        raise TimeoutError(f"nobody has said anything within {timeout_s:g} s")

    def _first_to_speak(self, timeout_s: float) -> Line | None:
        """None as well when something else has happened: a new connection, or one that has ended without a word."""
        ready = select.select([self._socket, *(line.sock for line in self._connected)], [], [], timeout_s)[0]
        for line in [line for line in self._connected if line.sock in ready]:
            self._connected.remove(line)
            with contextlib.suppress(ConnectionError):
                if line.sock.recv(1, socket.MSG_PEEK):
                    return line
            line.close()
        if self._socket in ready:
            self._connected.append(self.accept())
        return None

    def hello(self, timeout_s: float = TIMEOUT_S) -> tuple[Line, Fields]:
        """The next client that speaks our version, after its hello; one that calls with a newer one calls again."""
        while True:
            line = self.speaker(timeout_s)
            theirs = line.take(8)
            assert theirs[:7] == wire.MAGIC, theirs
            line.send(wire.preamble(min(theirs[7], self.version)))
            if theirs[7] != self.version:
                line.close()
                continue
            return line, line.hear()

    def channel(self, kind: str, index: int) -> Line:
        """They come in any order."""
        while (kind, index) not in self._channels:
            line, fields = self.hello()
            assert fields["channel"] != "control", fields
            self._channels[fields["channel"], fields["index"]] = self.welcome(line, fields)
        return self._channels.pop((kind, index))

    def control(self, timeout_s: float = TIMEOUT_S) -> Line:
        self._channels.clear()
        line, fields = self.hello(timeout_s)
        assert fields["channel"] == "control", fields
        return self.welcome(line, fields)

    def welcome(self, line: Line, hello: Fields) -> Line:
        """As who knows the tokens of the migrations that have begun here."""
        line.say(
            "welcome", **({} if self.version < 3 else wire.welcome(hello, self.tokens.get(hello["migration"], b"")))
        )
        return line

    def destination(self) -> Destination:
        """Takes the next source in."""
        return Destination(self.control(), self.channel, self.tokens)

    def source(self, machine: Machine) -> Source:
        """Takes the next destination in, to which it is this source."""
        source = Source(self.address, machine, self.version)
        self.tokens[source.migration] = source.token
        source.control = ControlLine(self.control())
        source.listener = self
        return source

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class Neighbour:
    """A machine that moves to a daemon meanwhile, slowly, until it is let go. It has nothing to do with the attack, and
    must not notice it."""

    def __init__(self, daemon: Program, control: Control, machine: Machine, version: int) -> None:
        self._control = control
        before = control.machines().keys()
        self.source = Source(daemon.address, machine, version).until("running")
        self.source.delay_s = 0.2
        self.source.serve()
        (self.name,) = control.machines().keys() - before

    def finish(self, start: Callable[..., Program] | None = None) -> None:
        """Its connection has held, all of it comes now; `start`: and all of its memory is verified."""
        self.source.delay_s = 0
        self.source.push_all()
        self.source.control.hear("complete")
        self.source.control.say("complete-ack", stats={})
        migration = self._control.wait_status(self.name, "completed")
        assert migration["recoveries"]["count"] == 0, "the neighbour's connection was lost"
        guest = self._control.machines()[self.name]["guest"]
        assert (guest["state"], guest["failures"]) == ("running", 0), guest
        if start is not None:
            verify(start, self._control, self.name)


def spoken_version(address: Address) -> int:
    """The newest version that a listening program and we both speak."""
    for version in range(wire.NEWEST, wire.OLDEST - 1, -1):
        line = Line.open(address, version)
        with contextlib.closing(line):
            line.send(wire.preamble(version) + wire.hello("control", "source", version=version))
            if line.take(8)[7] == version:
                assert (answer := line.hear())["type"] == "welcome", answer  # no lower one hides that this fails
                return version
    raise AssertionError("no version in common")


@contextlib.contextmanager
def closing(*things: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for thing in things:
            with contextlib.suppress(OSError):
                thing.close()
