# SPDX-License-Identifier: Apache-2.0
"""The control protocol, without a socket: bytes in, messages out, and who may run the machine.

Nothing here reads, writes or waits. A handshake opens a connection, a `SourceProtocol` or a `DestinationProtocol` then
carries one migration over the control connection. They are fed what arrived (`receive_data`, `receive_eof`), asked
what it meant (`next_message`), and asked for the bytes to send (`send_*`, each of which returns them). So everything
that can go wrong between two hosts can be tried in a unit test: every cut, every order, every byte.

**Who may run the machine.** That is what this module is really about. A migration has one dangerous moment: the
machine has one owner before it, another one after it, and the network may fail in the middle. The rule is as old as
two-phase commit. The destination says `prepared` when nothing can go wrong any more on its side; the source then
*decides*, and its decision is the message `commit`:

- The source may run the machine until it has *decided to send* `commit`: `send_commit` gives the right away before it
  returns the bytes, whether they ever leave the host or not.
- The destination may run it once it has *received* `commit`, and not a byte earlier.

Those two events are ordered by causality, so `may_run` is never true at both ends, whatever the network cuts,
delays or loses. What remains possible is that neither may, for a while: `commit` was sent and has not arrived. No
protocol can exclude that (the two generals); it has names here. The source is `PAUSED`, keeps the machine's memory and
says so aloud. The destination, having said `prepared`, may no longer abort by itself, since an `abort` could meet the
`commit` on its way: it is `IN_DOUBT`, and asks. The source's answer is either `recovered`, which means that it had
decided, or that the migration has ended there, so it had not. One that nobody answers gives up, and never runs it.

**Recovery.** A connection that is lost behind the point of no return ends nothing. The side that had connected connects
again, with the migration's id and token and a higher *epoch*; `reconnected` puts the same protocol object onto the new
connection. The destination tells what it has (`received-map`, a digest over all of them in `recover`), the source
answers `recovered`, and both go on where they were. Whatever else comes on the way (another cut, at any byte) leads
back to where it began, any number of times. An epoch is used once: who brings an old one is refused.

**When it has ended on one side only.** The other one cannot know; so each side, while its connection is lost, can be
told how it has ended over there (`peer_ended`): by somebody who has proven to be the peer, since it may end a machine
here, or start one. What a side has to tell is its `ending`. There is one way to two machines, and it needs an operator:
`reclaim` lets the source go on from the switchover, for which the destination has to be dead. One that is not stops
when it hears of it. What else is left to operators is listed in docs/protocol.md, and an exploration of all states in
the unit tests shows that there is nothing more.

**Giving memory back.** A source that wants to free memory as it goes asks for it in the offer (`placed_every_ms`). The
destination then says in `placed`, while the machine runs there, what has become known since it last said so. That is a
promise: the source may free these pages, and a `received-map` that lacks one of them later is refused. A `placed` that
is lost costs nothing but time, since a recovery tells everything anew; nothing is ever acknowledged twice as a duty.

States of the source (s: it sends, r: it receives)::

    SETUP --s offer--> OFFERED --r accept--> CHANNELS --r ready--> READY
                                                                     | s page-map
      before COMMITTED: s abort, r abort or reject,              SWITCHOVER  (s page-map, again and again)
      or the connection lost --> ABORTED                             | s switchover
      (the machine runs on here)                                  HANDED
                                                                     | r prepared
    - - - - - - - - - - - - - - - - - - - - - - - - - - - -       PREPARED
      from here on never again here                                  | s commit      <- point of no return
                                                                 COMMITTED
      connection lost --> PAUSED                                     | r running
                            |   ^                                POSTCOPY    (r placed, again and again)
                reconnected |   | connection lost                    | r complete
                            v   |                                 CLOSING --s complete-ack--> COMPLETED
                          RECOVER  (r received-map, again and again)
                            | r recover
                       RECOVERING --s recovered--> COMMITTED, or POSTCOPY when `recover` said that the machine runs

The destination's are the same with s and r exchanged, and the line that divides them lies at *r commit*. Its
connection lost in PREPARED means IN_DOUBT, from where *r recovered* is worth a *r commit*. Lost in CLOSING it is PAUSED
too: every page is here, but the source does not know it yet; `give_up` makes COMPLETED of that, and ABORTED of
IN_DOUBT. `reclaim` makes RECLAIMED of the source's PAUSED.

**Trust.** Whoever can connect can send anything. A message is length-prefixed, so its length is checked before its
first byte is kept: against what may come in this state, and against its type as soon as that is there. How deep it is,
and of how many parts, is measured before one of them is made; and it is turned into a frozen dataclass only when each
field is there, has its type and lies in its range. Whatever a peer sends, nothing but `ProtocolError` (or, when it
refused or hung up, `PeerError`) leaves this module, and after that the connection takes no more.

**Versions.** Each field knows the versions that have it; the handshake finds out which one is spoken. From 3 on what a
peer says beyond that is ignored.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar, cast

import msgpack

from postcopy._native import ffi, lib
from postcopy.errors import PeerError, ProtocolError

PROTOCOL_VERSION: Final = 3
OLDEST_VERSION: Final = 2  # that is still spoken
MAGIC: Final = b"postcpy"
PREAMBLE: Final = MAGIC + bytes([PROTOCOL_VERSION])

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024  # of any message; each type has a limit of its own below that
SMALL_MESSAGE_BYTES: Final = 16 * 1024
HEADER_BYTES: Final = 8  # of a message: its length, and the CRC32C of the length and of what follows
MAX_ELEMENTS: Final = 4096  # of one message: whatever becomes a Python object
MAX_DEPTH: Final = 8

PROOF_BYTES: Final = 32

ID_BYTES: Final = 16
MAX_BLOCKS: Final = 64  # PC_MAX_BLOCKS and so on of the core, which has the last word when it is given the numbers
MAX_SHARDS: Final = 64
MAX_BULK_CHANNELS: Final = 16
MAX_REASON_CHARS: Final = 500
MAX_STATE_BYTES: Final = MAX_MESSAGE_BYTES - 4096
MAX_PAGE_BYTES: Final = 4 * 1024 * 1024  # one page must fit into one data frame (PC_FRAME_MAX_PAYLOAD_BYTES)
PAGE_MAP_PAGES: Final = 8 * 1024 * 1024
"""Pages a `page-map` describes at most. A run takes at least a page and, when it is short, one byte: so the worst
map, every other page present, stays below MAX_MESSAGE_BYTES."""
PLACED_PAGES: Final = 1024 * 1024
"""Pages a `placed` describes at most: a megabyte at worst, since pings have to get past it."""

# ---- Messages: each is a frozen dataclass, each field of which knows what the peer may put into it.


class _Invalid(Exception):
    """Why a value is not acceptable; becomes a ProtocolError that names message and field."""


def _number(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        # bool is an int to Python, not to the protocol
        if not isinstance(value, int) or isinstance(value, bool):
            raise _Invalid(f"must be an integer, not {_kind_of(value)}")
        if not low <= value <= high:
            raise _Invalid(f"must be {low} to {high}, not {value}")
        return value

    return parse


def _octets(low: int, high: int, or_empty: bool = False) -> Callable[[object], bytes]:
    def parse(value: object) -> bytes:
        if not isinstance(value, bytes):
            raise _Invalid(f"must be bytes, not {_kind_of(value)}")
        if not low <= len(value) <= high and not (or_empty and not value):
            raise _Invalid(f"must have {low} to {high} bytes, not {len(value)}")
        return value

    return parse


def _text(low: int, high: int) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str):
            raise _Invalid(f"must be text, not {_kind_of(value)}")
        if not low <= len(value) <= high:
            raise _Invalid(f"must have {low} to {high} characters, not {len(value)}")
        return value

    return parse


def _line(value: object) -> str:
    """Text of the peer that we are going to print: one line, nothing that moves a cursor."""
    return one_line(_text(0, 4 * MAX_REASON_CHARS)(value))


def _one_of(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise _Invalid(f"must be one of {', '.join(words)}")
        return value

    return parse


def _table(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Invalid(f"must be a map, not {_kind_of(value)}")
    if not all(isinstance(key, str) for key in value):
        raise _Invalid("must be a map with text keys")
    return MappingProxyType(value)


def _list_of(item: Callable[[object], Any], low: int, high: int) -> Callable[[object], tuple[Any, ...]]:
    def parse(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _Invalid(f"must be a list, not {_kind_of(value)}")
        if not low <= len(value) <= high:
            raise _Invalid(f"must have {low} to {high} entries, not {len(value)}")
        return tuple(item(entry) for entry in value)

    return parse


def _check_runs(runs: bytes, pages: int) -> None:
    if len(runs) > pages + 1:  # at most a byte a page, and one for an empty first run
        raise _Invalid(f"runs must have at most {pages + 1} bytes for {pages} pages, not {len(runs)}")


def _page_size(value: object) -> int:
    size = _number(512, MAX_PAGE_BYTES)(value)
    if size & (size - 1):
        raise _Invalid(f"must be a power of two, not {size}")
    return size


def _kind_of(value: object) -> str:
    return {dict: "a map", list: "a list", str: "text", bytes: "bytes", bool: "a truth value", int: "an integer"}.get(
        type(value), "nothing" if value is None else "a number"
    )


def _wire(parse: Callable[[object], Any], *, since: int = 0, until: int = 255, default: Any = MISSING) -> Any:
    """A field, and the versions of the protocol that have it; in the others it is `default`."""
    return field(default=default, metadata={"parse": parse, "since": since, "until": until})


U32 = 2**32 - 1
U63 = 2**63 - 1


@dataclass(frozen=True)
class Message:
    """What a peer said. `TYPE` is the word on the wire; field `first_page` is `first-page` there."""

    TYPE: ClassVar[str] = ""
    MAX_BYTES: ClassVar[int] = SMALL_MESSAGE_BYTES

    def check(self) -> None:
        """`_Invalid` for fields that do not fit together."""


class Ended(enum.StrEnum):
    """How a migration has ended on one side, as it tells the other one."""

    COMPLETED = "completed"
    ABORTED = "aborted"  # never committed: the machine is the source's
    RECLAIMED = "reclaimed"  # by the operator of the source, who knew that the destination was dead
    LOST = "lost"  # that side has given up what it had of a machine that was committed


@dataclass(frozen=True)
class Hello(Message):
    TYPE: ClassVar[str] = "hello"
    channel: str = _wire(_one_of("control", "urgent", "bulk"))
    side: str = _wire(_one_of("source", "dest"))  # what the connecting host is
    index: int = _wire(_number(0, MAX_SHARDS - 1))
    migration: bytes = _wire(_octets(ID_BYTES, ID_BYTES, or_empty=True))
    epoch: int = _wire(_number(0, U32))
    ended: str = _wire(_one_of("", *Ended), since=3, default="")  # it only comes to say that, and how
    token: bytes = _wire(_octets(ID_BYTES, ID_BYTES, or_empty=True), until=2, default=b"")
    proof: bytes = _wire(_octets(PROOF_BYTES, PROOF_BYTES, or_empty=True), since=3, default=b"")

    def signed(self, token: bytes, version: int) -> Hello:
        """With what shows that we know the token; as it is where there is none."""
        if not token:
            return self
        return replace(self, token=token) if version < 3 else replace(self, proof=self._proof(token))

    def is_signed(self, token: bytes, version: int) -> bool:
        """Whether it comes from somebody who knows the token."""
        return same_secret(token, self.token) if version < 3 else hmac.compare_digest(self._proof(token), self.proof)

    def _proof(self, token: bytes) -> bytes:
        words = (self.channel, self.side, str(self.index), self.migration.hex(), str(self.epoch), self.ended)
        return _proof(token, "hello", *words)


@dataclass(frozen=True)
class Welcome(Message):
    TYPE: ClassVar[str] = "welcome"
    proof: bytes = _wire(_octets(PROOF_BYTES, PROOF_BYTES, or_empty=True), since=3, default=b"")

    def signed(self, token: bytes, hello: Hello) -> Welcome:
        """As an answer to `hello` of somebody who knows the token, too."""
        return replace(self, proof=self._proof(token, hello))

    def is_signed(self, token: bytes, hello: Hello) -> bool:
        return hmac.compare_digest(self._proof(token, hello), self.proof)

    def _proof(self, token: bytes, hello: Hello) -> bytes:
        return _proof(token, "welcome", hello.channel, str(hello.index), hello.migration.hex(), str(hello.epoch))


@dataclass(frozen=True)
class Refused(Message):
    TYPE: ClassVar[str] = "refused"
    reason: str = _wire(_line)
    code: str = _wire(_text(1, 32), since=3, default="other")
    proof: bytes = _wire(_octets(PROOF_BYTES, PROOF_BYTES, or_empty=True), since=3, default=b"")

    def signed(self, token: bytes, hello: Hello) -> Refused:
        """As an answer to `hello` of somebody who knows the token, too."""
        return replace(self, proof=self._proof(token, hello))

    def is_signed(self, token: bytes, hello: Hello) -> bool:
        return bool(token) and hmac.compare_digest(self._proof(token, hello), self.proof)

    def _proof(self, token: bytes, hello: Hello) -> bytes:
        return _proof(token, "refused", self.code, hello.migration.hex(), str(hello.epoch))


def _proof(token: bytes, *words: str) -> bytes:
    """No word has a blank in it, so that two different lists never are the same line."""
    return hmac.digest(token, " ".join(words).encode(), "sha256")


@dataclass(frozen=True)
class Block:
    """A RAM block as the source has it."""

    name: str
    size_bytes: int  # a multiple of page_bytes
    page_bytes: int

    def pages(self, page_bytes: int) -> int:
        """How many pages of that size cover it."""
        return -(-self.size_bytes // page_bytes)


def _block(value: object) -> Block:
    table = _table(value)
    if set(table) != {"name", "size-bytes", "page-bytes"}:
        raise _Invalid("needs name, size-bytes and page-bytes in each entry, and nothing else")
    block = Block(_text(1, 64)(table["name"]), _number(512, U63)(table["size-bytes"]), _page_size(table["page-bytes"]))
    if block.size_bytes % block.page_bytes:
        raise _Invalid(f"has a block of {block.size_bytes} bytes, which is not whole pages of {block.page_bytes}")
    return block


@dataclass(frozen=True)
class Offer(Message):
    TYPE: ClassVar[str] = "offer"
    MAX_BYTES: ClassVar[int] = 64 * 1024
    migration: bytes = _wire(_octets(ID_BYTES, ID_BYTES))
    token: bytes = _wire(_octets(ID_BYTES, ID_BYTES))
    machine: str = _wire(_text(1, 32))
    config: Mapping[str, Any] = _wire(_table)
    blocks: tuple[Block, ...] = _wire(_list_of(_block, 1, MAX_BLOCKS))
    bulk_channels: int = _wire(_number(0, MAX_BULK_CHANNELS))
    placed_every_ms: int = _wire(_number(0, 60_000))  # how often `placed` is wanted, 0: never


@dataclass(frozen=True)
class Accept(Message):
    TYPE: ClassVar[str] = "accept"
    page_bytes: tuple[int, ...] = _wire(_list_of(_page_size, 1, MAX_BLOCKS))
    shards: int = _wire(_number(1, MAX_SHARDS))
    bulk_channels: int = _wire(_number(0, MAX_BULK_CHANNELS))


@dataclass(frozen=True)
class Reject(Message):
    TYPE: ClassVar[str] = "reject"
    reason: str = _wire(_line)


@dataclass(frozen=True)
class Ready(Message):
    TYPE: ClassVar[str] = "ready"


@dataclass(frozen=True)
class PageMap(Message):
    TYPE: ClassVar[str] = "page-map"
    MAX_BYTES: ClassVar[int] = PAGE_MAP_PAGES + SMALL_MESSAGE_BYTES
    block: int = _wire(_number(0, MAX_BLOCKS - 1))
    first_page: int = _wire(_number(0, U63))
    pages: int = _wire(_number(1, PAGE_MAP_PAGES))
    runs: bytes = _wire(_octets(0, PAGE_MAP_PAGES + 1))

    def check(self) -> None:
        _check_runs(self.runs, self.pages)


@dataclass(frozen=True)
class Switchover(Message):
    TYPE: ClassVar[str] = "switchover"
    MAX_BYTES: ClassVar[int] = MAX_MESSAGE_BYTES
    state: bytes = _wire(_octets(0, MAX_STATE_BYTES))
    maps: int = _wire(_number(1, U32))


@dataclass(frozen=True)
class Prepared(Message):
    TYPE: ClassVar[str] = "prepared"


@dataclass(frozen=True)
class Commit(Message):
    TYPE: ClassVar[str] = "commit"


@dataclass(frozen=True)
class Running(Message):
    TYPE: ClassVar[str] = "running"
    resume_ns: int = _wire(_number(0, U63))


@dataclass(frozen=True)
class Placed(Message):
    """Pages that are at the destination for good, and were not told before on this connection."""

    TYPE: ClassVar[str] = "placed"
    MAX_BYTES: ClassVar[int] = PLACED_PAGES + SMALL_MESSAGE_BYTES
    block: int = _wire(_number(0, MAX_BLOCKS - 1))
    first_page: int = _wire(_number(0, U63))
    pages: int = _wire(_number(1, PLACED_PAGES))
    runs: bytes = _wire(_octets(0, PLACED_PAGES + 1))

    def check(self) -> None:
        _check_runs(self.runs, self.pages)


@dataclass(frozen=True)
class Complete(Message):
    TYPE: ClassVar[str] = "complete"
    MAX_BYTES: ClassVar[int] = 64 * 1024
    stats: Mapping[str, Any] = _wire(_table)


@dataclass(frozen=True)
class CompleteAck(Message):
    TYPE: ClassVar[str] = "complete-ack"
    MAX_BYTES: ClassVar[int] = 64 * 1024
    stats: Mapping[str, Any] = _wire(_table)


@dataclass(frozen=True)
class ReceivedMap(Message):
    TYPE: ClassVar[str] = "received-map"
    MAX_BYTES: ClassVar[int] = PAGE_MAP_PAGES + SMALL_MESSAGE_BYTES
    block: int = _wire(_number(0, MAX_BLOCKS - 1))
    first_page: int = _wire(_number(0, U63))
    pages: int = _wire(_number(1, PAGE_MAP_PAGES))
    runs: bytes = _wire(_octets(0, PAGE_MAP_PAGES + 1))

    def check(self) -> None:
        _check_runs(self.runs, self.pages)


@dataclass(frozen=True)
class Recover(Message):
    """Everything the destination has to say after it is back."""

    TYPE: ClassVar[str] = "recover"
    resume_ns: int = _wire(_number(0, U63))  # as in `running`; 0: the machine has not run here yet
    maps: int = _wire(_number(1, U32))
    digest: int = _wire(_number(0, U32))  # CRC32C over the bitmaps of all blocks, in 64-bit little-endian words


@dataclass(frozen=True)
class Recovered(Message):
    TYPE: ClassVar[str] = "recovered"


@dataclass(frozen=True)
class Abort(Message):
    TYPE: ClassVar[str] = "abort"
    reason: str = _wire(_line)


@dataclass(frozen=True)
class Ping(Message):
    TYPE: ClassVar[str] = "ping"
    nonce: int = _wire(_number(0, U63))


@dataclass(frozen=True)
class Pong(Message):
    TYPE: ClassVar[str] = "pong"
    nonce: int = _wire(_number(0, U63))


_MESSAGES: Final[Mapping[str, type[Message]]] = {
    cls.TYPE: cls
    for cls in (
        Hello, Welcome, Refused, Offer, Accept, Reject, Ready, PageMap, Switchover, Prepared, Commit, Running, Placed,
        Complete, CompleteAck, ReceivedMap, Recover, Recovered, Abort, Ping, Pong,
    )
}  # fmt: skip


def one_line(text: str, limit: int = MAX_REASON_CHARS) -> str:
    """`text` made fit to be printed or sent as a reason: one line, printable, not longer than `limit`."""
    line = "".join(char if char.isprintable() else " " for char in text).strip()
    return line if len(line) <= limit else line[: limit - 3] + "..."


def encode(message: Message, version: int = PROTOCOL_VERSION) -> bytes:
    """The message as it goes over the wire. `ProtocolError` when it is longer than its type may be."""
    body: dict[str, Any] = {"type": message.TYPE}  # the first key: see `_type_of`
    for item in _fields(message, version):
        body[_wire_name(item)] = _plain(getattr(message, item.name))
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    if len(packed) > message.MAX_BYTES:
        raise ProtocolError(f"{message.TYPE}: {len(packed)} bytes are more than it may have ({message.MAX_BYTES})")
    length = len(packed).to_bytes(4, "big")
    return length + _crc(length, packed).to_bytes(4, "big") + packed


def _crc(length: bytes, packed: bytes | memoryview) -> int:
    """TCP's checksum lets one damaged segment in some ten thousand pass, and a damaged page map would be believed."""
    return int(lib.pc_crc32c(lib.pc_crc32c(0, length, len(length)), ffi.from_buffer("char[]", packed), len(packed)))


def _check_shape(packed: bytes | memoryview) -> None:
    """`ProtocolError` for what would become too many objects, or too deep ones, *before* one of them is made: 16 MiB of
    empty lists would be a gigabyte of memory and seconds of work. A step an element, at most `MAX_ELEMENTS`."""
    due = [1]  # how many elements are still to come, at each depth
    at = elements = 0
    while due:
        if not due[-1]:
            due.pop()
            continue
        due[-1] -= 1
        elements += 1
        if elements > MAX_ELEMENTS:
            raise ProtocolError(f"a message of more than {MAX_ELEMENTS} elements")
        if at >= len(packed):
            raise ProtocolError("a message is not valid msgpack: it ends too early")
        tag = packed[at]
        at += 1
        count = 0
        if tag < 0x80 or tag >= 0xE0 or tag in (0xC0, 0xC2, 0xC3):  # a small number, nothing, a truth value
            continue
        if tag < 0xA0:  # a short map, a short list
            count = (tag & 0x0F) * (2 if tag < 0x90 else 1)
        elif tag < 0xC0:  # short text
            at += tag & 0x1F
        elif tag in _NUMBER_BYTES:
            at += _NUMBER_BYTES[tag]
        elif tag in _LENGTH_BYTES:
            number = int.from_bytes(packed[at : at + _LENGTH_BYTES[tag]], "big")
            at += _LENGTH_BYTES[tag]
            if tag in (0xDC, 0xDD):  # a list
                count = number
            elif tag in (0xDE, 0xDF):  # a map
                count = 2 * number
            else:  # bytes or text
                at += number
        else:
            raise ProtocolError(f"a message is not valid msgpack: unknown tag {tag:#x}")
        if count:
            if len(due) > MAX_DEPTH:
                raise ProtocolError(f"a message of more than {MAX_DEPTH} levels")
            due.append(count)
    if at != len(packed):
        raise ProtocolError("a message is not valid msgpack: its end is not where it should be")


_NUMBER_BYTES: Final = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_LENGTH_BYTES: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


def decode(packed: bytes | memoryview, version: int = PROTOCOL_VERSION) -> Message:
    """The message in one length-delimited body. `ProtocolError` names what is wrong."""
    _check_shape(packed)
    try:
        body = msgpack.unpackb(packed, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:  # UnicodeDecodeError is a ValueError too
        raise ProtocolError(
            f"a message is not valid msgpack: {one_line(str(error), 120) or type(error).__name__}"
        ) from error
    if not isinstance(body, dict):
        raise ProtocolError(f"a message is {_kind_of(body)}, not a map")
    kind = body.pop("type", None)
    cls = _MESSAGES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(f"unknown message type {_shown(kind)}")
    if len(packed) > cls.MAX_BYTES:
        raise ProtocolError(f"{kind}: {len(packed)} bytes are more than it may have ({cls.MAX_BYTES})")
    values: dict[str, Any] = {}
    for item in _fields(cls, version):
        name = _wire_name(item)
        if name not in body:
            raise ProtocolError(f"{kind}: field {name} is missing")
        try:
            values[item.name] = item.metadata["parse"](body.pop(name))
        except _Invalid as error:
            raise ProtocolError(f"{kind}: field {name} {error}") from error
    if body and version < 3:  # its peers mean something else then; later ones may say more than we know
        raise ProtocolError(f"{kind}: unknown field {_shown(next(iter(body)))}")
    message = cls(**values)
    try:
        message.check()
    except _Invalid as error:
        raise ProtocolError(f"{kind}: field {error}") from error
    return message


def _fields(message: Message | type[Message], version: int) -> list[Field[Any]]:
    return [item for item in fields(message) if item.metadata["since"] <= version <= item.metadata["until"]]


def _wire_name(item: Field[Any]) -> str:
    return item.name.replace("_", "-")


def _plain(value: object) -> object:
    if isinstance(value, Block):
        return {"name": value.name, "size-bytes": value.size_bytes, "page-bytes": value.page_bytes}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _shown(value: object) -> str:
    return one_line(repr(value), 60)


class _MessageBuffer:
    """Cuts a byte stream into messages. Keeps no byte of a message that is longer than what may come now."""

    def __init__(self) -> None:
        self.version = PROTOCOL_VERSION
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def missing(self, kinds: Collection[str]) -> int:
        """How many bytes certainly belong to the message that is being received. At least 1, unless it is complete."""
        if len(self._buffer) < HEADER_BYTES:
            return HEADER_BYTES - len(self._buffer)
        return max(0, HEADER_BYTES + self._length(kinds) - len(self._buffer))

    def take(self, kinds: Collection[str]) -> Message | None:
        """The next message, when it is there. `kinds` are those that may come now: what is longer than any of them, or
        long and of another kind, is refused with its first bytes."""
        if len(self._buffer) < 4:
            return None
        end = HEADER_BYTES + self._length(kinds)
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as whole:
            length, crc = bytes(whole[:4]), int.from_bytes(whole[4:HEADER_BYTES], "big")
            with whole[HEADER_BYTES:end] as body:
                if _crc(length, body) != crc:
                    raise ProtocolError("a message is damaged (CRC32C differs)")
                message = decode(body, self.version)
        del self._buffer[:end]
        return message

    def _length(self, kinds: Collection[str]) -> int:
        length = int.from_bytes(self._buffer[:4], "big")
        limit = max((_MESSAGES[kind].MAX_BYTES for kind in kinds), default=SMALL_MESSAGE_BYTES)
        if not 0 < length <= limit:
            raise ProtocolError(f"a message of {length} bytes; 1 to {limit} are allowed here")
        if length > SMALL_MESSAGE_BYTES and len(self._buffer) >= HEADER_BYTES + _TYPE_WITHIN_BYTES:
            kind = _type_of(bytes(self._buffer[HEADER_BYTES : HEADER_BYTES + _TYPE_WITHIN_BYTES]))
            if kind not in kinds or length > _MESSAGES[kind].MAX_BYTES:
                raise ProtocolError(f"a message of {length} bytes and of type {_shown(kind)}: too long for it, or now")
        return length


_TYPE_WITHIN_BYTES: Final = 5 + 5 + 1 + 31  # the map, the key, the text's length, the text


def _type_of(beginning: bytes) -> str:
    """The type of a long message, whose first key that must be; empty where it is not."""
    at = {0xDE: 3, 0xDF: 5}.get(beginning[0], 1)
    key, tag = beginning[at : at + 5], beginning[at + 5]
    return beginning[at + 6 : at + 6 + (tag & 0x1F)].decode("ascii", "replace") if key == b"\xa4type" else ""


# ---- Opening a connection

NO_SUCH_MIGRATION: Final = "no such migration here"


class RefusedError(PeerError):
    """The peer answered hello with `refused`. Who it was is not known, unless it is `proven`: it knows the token."""

    def __init__(self, text: str, reason: str, code: str = "other", proven: bool = False) -> None:
        super().__init__(text)
        self.reason = reason
        self.code = code
        self.proven = proven

    @property
    def ended(self) -> Ended | None:
        """How the migration has ended there, when the real peer says so."""
        return Ended(self.code) if self.proven and self.code in set(Ended) else None


class EndedElsewhere(PeerError):
    """The peer has proven to be the real one, and says that the migration is over there: see `peer_ended`."""

    def __init__(self, how: Ended, text: str = "") -> None:
        super().__init__(text or f"the peer says that the migration has ended there: {how}")
        self.how = how


class OlderPeerError(PeerError):
    """The listening side speaks an older version that is spoken here too: connect again, with that one."""

    def __init__(self, version: int) -> None:
        super().__init__(f"speaks version {version} of the postcopy protocol")
        self.version = version


class _Handshake:
    """Preamble and one message each way. `wanted()` never asks for a byte that comes after the handshake: on a data
    channel that byte is a frame, and belongs to the core."""

    _KINDS: ClassVar[Collection[str]]

    def __init__(self) -> None:
        self._preamble = bytearray()
        self._messages = _MessageBuffer()
        self._message: Message | None = None

    @property
    def version(self) -> int:
        """What is spoken on this connection; known when the peer's preamble is."""
        return self._messages.version

    def wanted(self) -> int:
        """How many bytes may be read now; 0 when the handshake needs no more."""
        if self._message is not None:
            return 0
        if len(self._preamble) < len(PREAMBLE):
            return len(PREAMBLE) - len(self._preamble)
        return self._messages.missing(self._KINDS)

    def receive_data(self, data: bytes) -> None:
        """Takes up to `wanted()` bytes; b"" is the end of the stream. `ProtocolError` as soon as something is wrong."""
        if not data:
            raise PeerError(
                "closed the connection before saying anything"
                if not self._preamble
                else "closed the connection during the handshake"
            )
        if len(data) > self.wanted():
            raise ValueError("more bytes than were wanted")
        if len(self._preamble) < len(PREAMBLE):
            self._preamble += data
            self._check_preamble()
            return
        self._messages.feed(data)
        self._messages.missing(self._KINDS)  # refuses a bad length before its bytes come
        message = self._messages.take(self._KINDS)
        if message is not None:
            self._check_message(message)
            self._message = message

    def _check_preamble(self) -> None:
        got = bytes(self._preamble)
        if not MAGIC.startswith(got[: len(MAGIC)]):
            raise ProtocolError(f"does not speak postcopy (it sent {_shown(got)})")
        if len(got) == len(PREAMBLE):
            if got[-1] < OLDEST_VERSION:
                self._wrong_version(got[-1])
            self._check_version(got[-1])

    def _wrong_version(self, version: int) -> None:
        raise ProtocolError(
            f"speaks version {version} of the postcopy protocol, this is version {PROTOCOL_VERSION}, which speaks"
            f" {OLDEST_VERSION} too; use releases of postcopy on both hosts that are not that far apart"
        )

    def _check_version(self, version: int) -> None:
        raise NotImplementedError

    def _check_message(self, message: Message) -> None:
        raise NotImplementedError


class ClientHandshake(_Handshake):
    """The connecting side's, which speaks first. `OlderPeerError` when it should have spoken another version.

    A hello that names a migration is for its peer only, and whoever answers it may be anybody: what does not know the
    token, or speaks an older version than that migration does (the oldest would have the token sent in clear), is not
    that peer."""

    _KINDS = frozenset({"welcome", "refused"})

    def __init__(self, hello: Hello, token: bytes = b"", version: int = PROTOCOL_VERSION) -> None:
        """`token` of the migration that `hello` names, if it names one."""
        super().__init__()
        self._messages.version = version
        self._hello = hello.signed(token, version)
        self._token = token

    def send_hello(self) -> bytes:
        return MAGIC + bytes([self.version]) + encode(self._hello, self.version)

    def _check_version(self, version: int) -> None:
        if version > self.version:
            self._wrong_version(version)  # it must not answer with more than it was asked for
        if version < self.version and self._token:
            raise ProtocolError(f"speaks version {version} of the protocol, the migration is of version {self.version}")
        if version < self.version:
            raise OlderPeerError(version)

    def _check_message(self, message: Message) -> None:
        if isinstance(message, Refused):
            proven = self.version >= 3 and message.is_signed(self._token, self._hello)
            text = f"refused the connection: {message.reason}"
            raise RefusedError(text, message.reason, message.code, proven)
        if not isinstance(message, Welcome):
            raise ProtocolError(f"answered hello with {message.TYPE}")
        if self._token and self.version >= 3 and not message.is_signed(self._token, self._hello):
            raise ProtocolError("welcomed us without knowing the token of the migration")


class ServerHandshake(_Handshake):
    """The listening side's, which answers: `send_preamble` when the client's is there, `send_welcome` or `send_refused`
    when `hello` is there and somebody has decided."""

    _KINDS = frozenset({"hello"})

    @property
    def newer(self) -> bool:
        """The client speaks a newer version: it closes when it has seen our preamble, and comes again with ours."""
        return len(self._preamble) == len(PREAMBLE) and self._preamble[-1] > self.version

    @property
    def heard(self) -> bool:
        """The client's preamble is there."""
        return len(self._preamble) == len(PREAMBLE)

    def send_preamble(self) -> bytes:
        return MAGIC + bytes([self.version])

    @property
    def hello(self) -> Hello | None:
        return cast("Hello | None", self._message)

    def send_welcome(self, token: bytes = b"") -> bytes:
        """With `token`, of the migration that the hello names, it is proven to come from the peer."""
        welcome = Welcome()
        if token and self.hello is not None:
            welcome = welcome.signed(token, self.hello)
        return encode(welcome, self.version)

    def send_refused(self, reason: str, code: str = "other", token: bytes = b"") -> bytes:
        """With `token`, of the migration that the hello names, it is proven to come from the peer."""
        refused = Refused(one_line(reason), code)
        if token and self.hello is not None:
            refused = refused.signed(token, self.hello)
        return encode(refused, self.version)

    def _check_version(self, version: int) -> None:
        self._messages.version = min(version, PROTOCOL_VERSION)

    def _check_message(self, message: Message) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError(f"began with {message.TYPE}, not with hello")
        if message.channel == "bulk" and message.index >= MAX_BULK_CHANNELS:
            raise ProtocolError(f"hello: field index must be 0 to {MAX_BULK_CHANNELS - 1}, not {message.index}")
        if message.channel == "control" and message.index:
            raise ProtocolError("hello: field index must be 0 on a control connection")
        if message.ended and (message.channel != "control" or not message.migration):
            raise ProtocolError("hello: field ended must be empty but on the control connection of a migration")


def same_secret(mine: bytes, theirs: bytes) -> bool:
    """Compares tokens in constant time; an empty one is never right."""
    return bool(mine) and hmac.compare_digest(mine, theirs)


# ---- One migration over the control connection


class State(enum.Enum):
    SETUP = "setup"
    OFFERED = "offered"
    CHANNELS = "channels"  # accepted; data channels are being opened
    READY = "ready"  # all is there; the machine still runs at the source
    SWITCHOVER = "switchover"  # paused; the page maps are on their way
    HANDED = "handed"  # the destination has the device state and loads it
    PREPARED = "prepared"
    COMMITTED = "committed"
    POSTCOPY = "postcopy"  # the machine runs at the destination
    CLOSING = "closing"  # every page has come
    COMPLETED = "completed"
    PAUSED = "paused"  # connection lost after commit
    IN_DOUBT = "in-doubt"  # destination: connection lost while it waited for commit
    RECOVER = "recover"  # connected again; the received maps are on their way
    RECOVERING = "recovering"  # the source has them and answers
    ABORTED = "aborted"
    RECLAIMED = "reclaimed"  # source: taken back by its operator, who knows that the destination is dead


Moves = Mapping[str, State]
S = State

_SOURCE_SENDS: Final[Mapping[State, Moves]] = {
    S.SETUP: {"offer": S.OFFERED, "abort": S.ABORTED},
    S.OFFERED: {"abort": S.ABORTED},
    S.CHANNELS: {"abort": S.ABORTED},
    S.READY: {"page-map": S.SWITCHOVER, "abort": S.ABORTED},
    S.SWITCHOVER: {"page-map": S.SWITCHOVER, "switchover": S.HANDED, "abort": S.ABORTED},
    S.HANDED: {"abort": S.ABORTED},
    S.PREPARED: {"commit": S.COMMITTED, "abort": S.ABORTED},
    S.CLOSING: {"complete-ack": S.COMPLETED},
    S.RECOVERING: {"recovered": S.COMMITTED},  # or POSTCOPY, see _move
}
_DESTINATION_SENDS: Final[Mapping[State, Moves]] = {
    S.SETUP: {"abort": S.ABORTED},
    S.OFFERED: {"accept": S.CHANNELS, "reject": S.ABORTED, "abort": S.ABORTED},
    S.CHANNELS: {"ready": S.READY, "abort": S.ABORTED},
    S.READY: {"abort": S.ABORTED},
    S.SWITCHOVER: {"abort": S.ABORTED},
    S.HANDED: {"prepared": S.PREPARED, "abort": S.ABORTED},
    S.COMMITTED: {"running": S.POSTCOPY},
    S.POSTCOPY: {"placed": S.POSTCOPY, "complete": S.CLOSING},  # `placed` only where the offer asked for it
    S.RECOVER: {"received-map": S.RECOVER, "recover": S.RECOVERING},
}
# What a side may receive is what the other one may send in the same state. That one may be further back when it sends:
# an abort crosses messages of ours on its way. But each state in which it could not have sent an abort any more begins
# with something that it has said.
_AFTER_COMMIT: Final = frozenset(
    {S.COMMITTED, S.POSTCOPY, S.CLOSING, S.COMPLETED, S.PAUSED, S.RECOVER, S.RECOVERING}
)  # in the last two a destination may still be in doubt
_LOST: Final = frozenset({S.PAUSED, S.IN_DOUBT})
_ENDED: Final = frozenset({S.COMPLETED, S.ABORTED, S.RECLAIMED}) | _LOST
_ANY_STATE: Final = frozenset({"ping", "pong"})

M = TypeVar("M", bound=Message)


class _ControlProtocol:
    """What both sides share. Not thread-safe."""

    SIDE: ClassVar[str]
    _SENDS: ClassVar[Mapping[State, Moves]]
    _RECEIVES: ClassVar[Mapping[State, Moves]]
    _LOST: ClassVar[Mapping[State, State]]  # where a lost connection leads, when it is not ABORTED

    def __init__(self, version: int = PROTOCOL_VERSION) -> None:
        self.version = version  # as it was spoken in the handshake; may be set until the first message
        self._state = State.SETUP
        self._buffer = _MessageBuffer()
        self._eof = False
        self._error: ProtocolError | None = None
        self._reason = ""
        self._in_doubt = False  # destination: `commit` may have been sent, and has not come
        self._complete_said = False  # destination: every page is here, and `complete` has been sent at least once
        self._placed_wanted = False  # the offer asked for `placed`
        self._machine_runs = False  # at the destination: `running` has been said, or `recover` with it
        self._decided = False  # `commit` has been sent, or heard
        self._no_way_back = False  # the peer has given up, or cannot be gone on with
        self._untold = False

    @property
    def state(self) -> State:
        return self._state

    @property
    def ended(self) -> bool:
        """Nothing more will happen on this connection."""
        return self._state in _ENDED

    @property
    def reason(self) -> str:
        """Why the state is ABORTED, PAUSED or IN_DOUBT, as far as known; one line."""
        return self._reason

    @property
    def committed(self) -> bool:
        """Behind the point of no return, as far as this side knows."""
        return self._state in _AFTER_COMMIT and not self._in_doubt

    @property
    def recoverable(self) -> bool:
        """The connection is lost, and a new one could go on: see `reconnected`."""
        return self._state in _LOST and not self._no_way_back

    @property
    def peer_gone(self) -> bool:
        """PAUSED, and no connection will ever end that: the peer has said that it has given up what it had, or the two
        cannot agree. What is left is up to an operator."""
        return self._state in _LOST and self._no_way_back

    @property
    def may_run(self) -> bool:
        """Whether the machine may run on this side *now*. Never true at both ends."""
        raise NotImplementedError

    # ---- receiving

    def receive_data(self, data: bytes) -> None:
        """Takes what has arrived. Afterwards call `next_message` until it returns None."""
        if data and not self.ended and self._error is None:
            self._buffer.feed(data)

    def receive_eof(self) -> None:
        """The peer closed the connection. Takes effect when `next_message` has returned what came before."""
        self._eof = True

    def next_message(self) -> Message | None:
        """The next message, checked against the state, which it moves; None when more bytes are needed.

        What is malformed or not allowed now is a `ProtocolError`, again on each later call: this connection is then
        no longer understood; say `send_abort` if that `may_abort`, and `connection_lost`. In an ended state
        everything is ignored, since the peer may have sent it before it knew.
        """
        if self.ended:
            return None
        if self._error is not None:
            raise self._error
        try:
            self._buffer.version = self.version
            message = self._buffer.take(self._RECEIVES.get(self._state, {}).keys() | _ANY_STATE)
            if message is not None:
                self._move(message, self._RECEIVES, "received")
                if isinstance(message, Abort | Reject | Complete | CompleteAck):
                    self._untold = False
                if isinstance(message, Abort | Reject):
                    self._reason = (
                        f"{self._peer()} {'aborted' if isinstance(message, Abort) else 'declined'}: {message.reason}"
                    )
        except ProtocolError as error:
            self._error = error
            raise
        if message is None and self._eof:
            cut = " in the middle of a message" if len(self._buffer) else ""
            self.connection_lost(f"{self._peer()} closed the control connection{cut}")
        return message

    def connection_lost(self, reason: str) -> State:
        """The connection has ended, or is given up: where that leaves this side. Harmless in an ended state."""
        if not self.ended:
            self._state = State.IN_DOUBT if self._in_doubt else self._LOST.get(self._state, State.ABORTED)
            self._in_doubt = self._state is State.IN_DOUBT
            self._reason = one_line(reason)
            self._buffer = _MessageBuffer()
        return self._state

    def reconnected(self) -> None:
        """A new connection with the same peer is there; only while `recoverable`. What the old one held is void."""
        if not self.recoverable:
            raise ProtocolError(f"nothing to recover in state {self._state.value}")
        self._state = State.RECOVER
        self._eof = False
        self._error = None

    def give_up(self, reason: str) -> State:
        """Nobody will connect again: what IN_DOUBT comes to is ABORTED, and PAUSED where every page has come COMPLETED.
        A machine that is PAUSED stays so."""
        if self._state is State.IN_DOUBT:
            self._state, self._in_doubt = State.ABORTED, False
            self._reason = one_line(reason)
        elif self._state is State.PAUSED and self._complete_said:
            self._state = State.COMPLETED
        return self._state

    def peer_ended(self, how: Ended) -> State:
        """The peer has said and proven that the migration is over on its side: where that leaves this one. Only while
        the connection is lost (`recoverable` or `peer_gone`). A machine that is the destination's ends nowhere by that,
        unless the source has been told to run it again."""
        if self._state not in _LOST:
            raise ProtocolError(f"nothing to end in state {self._state.value}")
        self._state = self._after_peer(how)
        self._in_doubt = self._untold = False
        self._no_way_back = True
        self._reason = f"{self._peer()} says that the migration has ended there: {how}"
        return self._state

    def beyond_recovery(self, reason: str) -> State:
        """The two sides do not agree about what there is, and no other connection would change that. Only while
        `recoverable`; a destination IN_DOUBT is given up by it."""
        if not self.recoverable:
            raise ProtocolError(f"nothing to recover in state {self._state.value}")
        self.give_up(reason)
        self._no_way_back = True
        self._reason = one_line(reason)
        return self._state

    @property
    def untold(self) -> bool:
        """Whether the peer may believe something else than `ending`, and wait for it, unless it is told."""
        return self._untold

    @property
    def ending(self) -> Ended:
        """What the peer is to be told when it comes back later, if this side leaves the migration as it is now."""
        raise NotImplementedError

    def _after_peer(self, how: Ended) -> State:
        raise NotImplementedError

    # ---- sending

    @property
    def may_abort(self) -> bool:
        return "abort" in self._SENDS.get(self._state, {})

    def send_abort(self, reason: str) -> bytes:
        """Calls the migration off; only while `may_abort`."""
        data = self._send(Abort(one_line(reason)))
        self._reason = one_line(reason)
        return data

    def send_ping(self, nonce: int) -> bytes:
        return self._send(Ping(nonce))

    def send_pong(self, ping: Ping) -> bytes:
        return self._send(Pong(ping.nonce))

    # ---- private

    def _send(self, message: Message) -> bytes:
        data = encode(message, self.version)  # first: what cannot be encoded must not move the state
        self._move(message, self._SENDS, "sent")
        return data

    def _move(self, message: Message, table: Mapping[State, Moves], verb: str) -> None:
        if isinstance(message, Ping | Pong) and not self.ended:
            return
        after = table.get(self._state, {}).get(message.TYPE)
        if after is None:
            raise ProtocolError(f"{message.TYPE} must not be {verb} by the {self.SIDE} in state {self._state.value}")
        if isinstance(message, Placed) and not self._placed_wanted:
            raise ProtocolError(f"placed must not be {verb} by the {self.SIDE}: the offer did not ask for it")
        if isinstance(message, Offer):
            self._placed_wanted = bool(message.placed_every_ms)
        if isinstance(message, Running) or (isinstance(message, Recover) and message.resume_ns):
            self._machine_runs = True
        elif isinstance(message, Recovered):
            self._in_doubt = False
            self._decided = True
            if self._machine_runs:
                after = State.POSTCOPY
        if isinstance(message, Commit):
            self._decided = True
        if isinstance(message, Switchover):
            self._untold = True  # it has been handed over, and may be prepared
        self._state = after

    def _check_bulk_channels(self, bulk_channels: int) -> None:
        if not bulk_channels and self.version < 3:
            raise ProtocolError(f"{self._peer()} speaks version {self.version}, which needs a bulk channel")

    def _peer(self) -> str:
        return "the destination" if self.SIDE == "source" else "the source"


class SourceProtocol(_ControlProtocol):
    """The control connection as the source sees it."""

    SIDE = "source"
    _SENDS = _SOURCE_SENDS
    _RECEIVES = _DESTINATION_SENDS
    _LOST: ClassVar[Mapping[State, State]] = {
        S.COMMITTED: S.PAUSED,
        S.POSTCOPY: S.PAUSED,
        S.RECOVER: S.PAUSED,
        S.RECOVERING: S.PAUSED,
        S.CLOSING: S.COMPLETED,  # the destination has every page: that our acknowledgement is lost changes nothing
    }

    @property
    def may_run(self) -> bool:
        return self._state not in _AFTER_COMMIT

    def reclaim(self) -> State:
        """The operator, who knows that the destination is dead, lets the machine go on here from the switchover.
        Only while PAUSED; final. Should the destination live, there are two machines until it hears of it: it must be
        told, whenever it comes back (`ending`)."""
        if self._state is not State.PAUSED:
            raise ProtocolError(f"nothing to reclaim in state {self._state.value}")
        self._state = State.RECLAIMED
        self._untold = True
        self._reason = "taken back at the source"
        return self._state

    @property
    def ending(self) -> Ended:
        if self._state is State.RECLAIMED:
            return Ended.RECLAIMED
        if self._state is State.COMPLETED:
            return Ended.COMPLETED
        return Ended.ABORTED if self.may_run else Ended.LOST

    def _after_peer(self, how: Ended) -> State:
        if how is Ended.COMPLETED:
            return State.COMPLETED
        if how is Ended.ABORTED and not self._machine_runs:
            return State.ABORTED  # `commit` was never heard, and never will be: the machine goes on here
        return State.PAUSED

    def send_offer(self, offer: Offer) -> bytes:
        """`ProtocolError` for one without bulk channels to a peer that needs one: see `version`."""
        self._check_bulk_channels(offer.bulk_channels)
        return self._send(offer)

    def send_page_map(self, block: int, first_page: int, pages: int, runs: bytes) -> bytes:
        return self._send(PageMap(block, first_page, pages, runs))

    def send_switchover(self, state: bytes, maps: int) -> bytes:
        return self._send(Switchover(state, maps))

    def send_commit(self) -> bytes:
        """The point of no return is the *call*: from its return on `may_run` is false, for ever."""
        return self._send(Commit())

    def send_complete_ack(self, stats: Mapping[str, Any]) -> bytes:
        return self._send(CompleteAck(stats))

    def send_recovered(self) -> bytes:
        return self._send(Recovered())


class DestinationProtocol(_ControlProtocol):
    """The control connection as the destination sees it."""

    SIDE = "destination"
    _SENDS = _DESTINATION_SENDS
    _RECEIVES = _SOURCE_SENDS
    _LOST: ClassVar[Mapping[State, State]] = {
        S.PREPARED: S.IN_DOUBT,
        S.COMMITTED: S.PAUSED,
        S.POSTCOPY: S.PAUSED,
        S.RECOVER: S.PAUSED,
        S.RECOVERING: S.PAUSED,
        S.CLOSING: S.PAUSED,  # every page is here, but the source keeps them until it knows that
    }

    @property
    def may_run(self) -> bool:
        return self.committed

    @property
    def ending(self) -> Ended:
        if self._state is State.COMPLETED:
            return Ended.COMPLETED
        return Ended.LOST if self._decided else Ended.ABORTED

    def _after_peer(self, how: Ended) -> State:
        if self._state is State.IN_DOUBT or how is Ended.RECLAIMED:
            return State.ABORTED  # it has not run here; or it runs at the source again, and must not run here any more
        return State.COMPLETED if self._complete_said else State.PAUSED

    def send_accept(self, page_bytes: tuple[int, ...], shards: int, bulk_channels: int) -> bytes:
        """`ProtocolError` for one without bulk channels to a peer that needs one: see `version`."""
        self._check_bulk_channels(bulk_channels)
        return self._send(Accept(page_bytes, shards, bulk_channels))

    def send_reject(self, reason: str) -> bytes:
        data = self._send(Reject(one_line(reason)))
        self._reason = one_line(reason)
        return data

    def send_ready(self) -> bytes:
        return self._send(Ready())

    def send_prepared(self) -> bytes:
        return self._send(Prepared())

    def send_running(self, resume_ns: int) -> bytes:
        return self._send(Running(resume_ns))

    def send_placed(self, block: int, first_page: int, pages: int, runs: bytes) -> bytes:
        """Only where the offer asked for it. From here on the source may free these pages."""
        return self._send(Placed(block, first_page, pages, runs))

    def send_complete(self, stats: Mapping[str, Any]) -> bytes:
        data = self._send(Complete(stats))
        self._complete_said = True
        return data

    def every_page_is_here(self) -> None:
        """Nothing is missing any more, though the source could not be told yet: `give_up` then means COMPLETED."""
        self._complete_said = True

    def send_received_map(self, block: int, first_page: int, pages: int, runs: bytes) -> bytes:
        return self._send(ReceivedMap(block, first_page, pages, runs))

    def send_recover(self, resume_ns: int, maps: int, digest: int) -> bytes:
        """`resume_ns` as in `running`, at least 1 when the machine runs; see `Recover`."""
        return self._send(Recover(resume_ns, maps, digest))
