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
decided, or a refusal: it knows no such migration, so it had not.

**Recovery.** A connection that is lost behind the point of no return ends nothing. The side that had connected connects
again, with the migration's id and token and a higher *epoch*; `reconnected` puts the same protocol object onto the new
connection. The destination tells what it has (`received-map`, a digest over all of them in `recover`), the source
answers `recovered`, and both go on where they were. Whatever else comes on the way (another cut, at any byte) leads
back to where it began, any number of times. An epoch is used once: who brings an old one is refused.

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
IN_DOUBT.

**Trust.** Whoever can connect can send anything. A message is length-prefixed, so its length is checked before its
first byte is kept; unpacked with limits on every size; and turned into a frozen dataclass only when each field is
there, has its type and lies in its range. Whatever a peer sends, nothing but `ProtocolError` (or, when it refused
or hung up, `PeerError`) leaves this module, and after that the connection takes no more.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar, cast

import msgpack

from postcopy._errors import PeerError, ProtocolError
from postcopy._native import lib

PROTOCOL_VERSION: Final = 2
MAGIC: Final = b"postcpy"
PREAMBLE: Final = MAGIC + bytes([PROTOCOL_VERSION])

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
MAX_HANDSHAKE_MESSAGE_BYTES: Final = 64 * 1024
HEADER_BYTES: Final = 8  # of a message: its length, and the CRC32C of the length and of what follows

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


def _page_size(value: object) -> int:
    size = _number(512, MAX_PAGE_BYTES)(value)
    if size & (size - 1):
        raise _Invalid(f"must be a power of two, not {size}")
    return size


def _kind_of(value: object) -> str:
    return {dict: "a map", list: "a list", str: "text", bytes: "bytes", bool: "a truth value", int: "an integer"}.get(
        type(value), "nothing" if value is None else "a number"
    )


def _wire(parse: Callable[[object], Any]) -> Any:
    return field(metadata={"parse": parse})


U32 = 2**32 - 1
U63 = 2**63 - 1


@dataclass(frozen=True)
class Message:
    """What a peer said. `TYPE` is the word on the wire; field `first_page` is `first-page` there."""

    TYPE: ClassVar[str] = ""


@dataclass(frozen=True)
class Hello(Message):
    TYPE: ClassVar[str] = "hello"
    channel: str = _wire(_one_of("control", "urgent", "bulk"))
    side: str = _wire(_one_of("source", "dest"))  # what the connecting host is
    index: int = _wire(_number(0, MAX_SHARDS - 1))
    migration: bytes = _wire(_octets(ID_BYTES, ID_BYTES, or_empty=True))
    epoch: int = _wire(_number(0, U32))
    token: bytes = _wire(_octets(ID_BYTES, ID_BYTES, or_empty=True))


@dataclass(frozen=True)
class Welcome(Message):
    TYPE: ClassVar[str] = "welcome"


@dataclass(frozen=True)
class Refused(Message):
    TYPE: ClassVar[str] = "refused"
    reason: str = _wire(_line)


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
    migration: bytes = _wire(_octets(ID_BYTES, ID_BYTES))
    token: bytes = _wire(_octets(ID_BYTES, ID_BYTES))
    machine: str = _wire(_text(1, 32))
    config: Mapping[str, Any] = _wire(_table)
    blocks: tuple[Block, ...] = _wire(_list_of(_block, 1, MAX_BLOCKS))
    bulk_channels: int = _wire(_number(1, MAX_BULK_CHANNELS))
    placed_every_ms: int = _wire(_number(0, 60_000))  # how often `placed` is wanted, 0: never


@dataclass(frozen=True)
class Accept(Message):
    TYPE: ClassVar[str] = "accept"
    page_bytes: tuple[int, ...] = _wire(_list_of(_page_size, 1, MAX_BLOCKS))
    shards: int = _wire(_number(1, MAX_SHARDS))
    bulk_channels: int = _wire(_number(1, MAX_BULK_CHANNELS))


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
    block: int = _wire(_number(0, MAX_BLOCKS - 1))
    first_page: int = _wire(_number(0, U63))
    pages: int = _wire(_number(1, PAGE_MAP_PAGES))
    runs: bytes = _wire(_octets(0, MAX_STATE_BYTES))


@dataclass(frozen=True)
class Switchover(Message):
    TYPE: ClassVar[str] = "switchover"
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
    block: int = _wire(_number(0, MAX_BLOCKS - 1))
    first_page: int = _wire(_number(0, U63))
    pages: int = _wire(_number(1, PLACED_PAGES))
    runs: bytes = _wire(_octets(0, PLACED_PAGES + 1))  # a byte a run, and one for an empty first run


@dataclass(frozen=True)
class Complete(Message):
    TYPE: ClassVar[str] = "complete"
    stats: Mapping[str, Any] = _wire(_table)


@dataclass(frozen=True)
class CompleteAck(Message):
    TYPE: ClassVar[str] = "complete-ack"
    stats: Mapping[str, Any] = _wire(_table)


@dataclass(frozen=True)
class ReceivedMap(Message):
    TYPE: ClassVar[str] = "received-map"
    block: int = _wire(_number(0, MAX_BLOCKS - 1))
    first_page: int = _wire(_number(0, U63))
    pages: int = _wire(_number(1, PAGE_MAP_PAGES))
    runs: bytes = _wire(_octets(0, MAX_STATE_BYTES))


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


def encode(message: Message, limit: int = MAX_MESSAGE_BYTES) -> bytes:
    """The message as it goes over the wire. `ProtocolError` when it is longer than `limit`."""
    body: dict[str, Any] = {"type": message.TYPE}
    for item in fields(message):
        body[_wire_name(item)] = _plain(getattr(message, item.name))
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    if len(packed) > limit:
        raise ProtocolError(f"{message.TYPE}: {len(packed)} bytes are more than a message may have ({limit})")
    length = len(packed).to_bytes(4, "big")
    return length + _crc(length, packed).to_bytes(4, "big") + packed


def _crc(length: bytes, packed: bytes) -> int:
    """TCP's checksum lets one damaged segment in some ten thousand pass, and a damaged page map would be believed."""
    return int(lib.pc_crc32c(lib.pc_crc32c(0, length, len(length)), packed, len(packed)))


def decode(packed: bytes) -> Message:
    """The message in one length-delimited body. `ProtocolError` names what is wrong."""
    try:
        body = msgpack.unpackb(
            packed,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_str_len=16 * 1024,
            max_bin_len=MAX_MESSAGE_BYTES,
            max_array_len=4096,
            max_map_len=1024,
            max_ext_len=0,
        )
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
    values: dict[str, Any] = {}
    for item in fields(cls):
        name = _wire_name(item)
        if name not in body:
            raise ProtocolError(f"{kind}: field {name} is missing")
        try:
            values[item.name] = item.metadata["parse"](body.pop(name))
        except _Invalid as error:
            raise ProtocolError(f"{kind}: field {name} {error}") from error
    if body:
        # The version byte announces changes; a field nobody knows is a peer that means something else.
        raise ProtocolError(f"{kind}: unknown field {_shown(next(iter(body)))}")
    return cls(**values)


def _wire_name(item: Field[Any]) -> str:
    assert item.default is MISSING  # on the wire every field is there
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
    """Cuts a byte stream into messages. Never holds more than one message's limit beyond what one read brought."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def missing(self) -> int:
        """How many bytes certainly belong to the message that is being received. At least 1, unless it is complete."""
        if len(self._buffer) < HEADER_BYTES:
            return HEADER_BYTES - len(self._buffer)
        return max(0, HEADER_BYTES + self._length() - len(self._buffer))

    def take(self) -> Message | None:
        if len(self._buffer) < 4:
            return None
        end = HEADER_BYTES + self._length()
        if len(self._buffer) < end:
            return None
        length, crc = bytes(self._buffer[:4]), int.from_bytes(self._buffer[4:HEADER_BYTES], "big")
        body = bytes(self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        if _crc(length, body) != crc:
            raise ProtocolError("a message is damaged (CRC32C differs)")
        return decode(body)

    def _length(self) -> int:
        length = int.from_bytes(self._buffer[:4], "big")
        if not 0 < length <= self.limit:
            raise ProtocolError(f"a message of {length} bytes; 1 to {self.limit} are allowed here")
        return length


# ---- Opening a connection

NO_SUCH_MIGRATION: Final = "no such migration here"
"""The reason of a refusal that is an answer: this host has never decided for that migration, or is done with it."""


class RefusedError(PeerError):
    """The peer answered hello with `refused`."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class _Handshake:
    """Preamble and one message each way. `wanted()` never asks for a byte that comes after the handshake: on a data
    channel that byte is a frame, and belongs to the core."""

    def __init__(self) -> None:
        self._preamble = bytearray()
        self._messages = _MessageBuffer(MAX_HANDSHAKE_MESSAGE_BYTES)
        self._message: Message | None = None

    def wanted(self) -> int:
        """How many bytes may be read now; 0 when the handshake needs no more."""
        if self._message is not None:
            return 0
        if len(self._preamble) < len(PREAMBLE):
            return len(PREAMBLE) - len(self._preamble)
        return self._messages.missing()

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
        self._messages.missing()  # refuses a bad length before its bytes come
        message = self._messages.take()
        if message is not None:
            self._check_message(message)
            self._message = message

    def _check_preamble(self) -> None:
        got = bytes(self._preamble)
        if not MAGIC.startswith(got[: len(MAGIC)]):
            raise ProtocolError(f"does not speak postcopy (it sent {_shown(got)})")
        if len(got) == len(PREAMBLE) and got != PREAMBLE:
            raise ProtocolError(
                f"speaks version {got[-1]} of the postcopy protocol, this is version {PROTOCOL_VERSION};"
                " use the same release of postcopy on both hosts"
            )

    def _check_message(self, message: Message) -> None:
        raise NotImplementedError


class ClientHandshake(_Handshake):
    """The connecting side's."""

    def __init__(self, hello: Hello) -> None:
        super().__init__()
        self._hello = hello

    def send_hello(self) -> bytes:
        return PREAMBLE + encode(self._hello, MAX_HANDSHAKE_MESSAGE_BYTES)

    def _check_message(self, message: Message) -> None:
        if isinstance(message, Refused):
            raise RefusedError(f"refused the connection: {message.reason}", message.reason)
        if not isinstance(message, Welcome):
            raise ProtocolError(f"answered hello with {message.TYPE}")


class ServerHandshake(_Handshake):
    """The listening side's: when `hello` is there, somebody decides, then `send_welcome` or `send_refused`."""

    def send_preamble(self) -> bytes:
        return PREAMBLE

    @property
    def hello(self) -> Hello | None:
        return cast("Hello | None", self._message)

    def send_welcome(self) -> bytes:
        return encode(Welcome())

    def send_refused(self, reason: str) -> bytes:
        return encode(Refused(one_line(reason)))

    def _check_message(self, message: Message) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError(f"began with {message.TYPE}, not with hello")
        if message.channel == "bulk" and message.index >= MAX_BULK_CHANNELS:
            raise ProtocolError(f"hello: field index must be 0 to {MAX_BULK_CHANNELS - 1}, not {message.index}")
        if message.channel == "control" and message.index:
            raise ProtocolError("hello: field index must be 0 on a control connection")


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
# What a side may receive is what the other one could send *when it sent it*: an abort crosses messages of ours on its
# way, so it is allowed as long as the peer could have believed that it had the right.
_SOURCE_RECEIVES: Final[Mapping[State, Moves]] = {
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
_DESTINATION_RECEIVES: Final[Mapping[State, Moves]] = {
    S.SETUP: {"offer": S.OFFERED, "abort": S.ABORTED},
    S.OFFERED: {"abort": S.ABORTED},
    S.CHANNELS: {"abort": S.ABORTED},
    S.READY: {"page-map": S.SWITCHOVER, "abort": S.ABORTED},
    S.SWITCHOVER: {"page-map": S.SWITCHOVER, "switchover": S.HANDED, "abort": S.ABORTED},
    S.HANDED: {"abort": S.ABORTED},
    S.PREPARED: {"commit": S.COMMITTED, "abort": S.ABORTED},
    S.CLOSING: {"complete-ack": S.COMPLETED},
    S.RECOVERING: {"recovered": S.COMMITTED},
}
_AFTER_COMMIT: Final = frozenset(
    {S.COMMITTED, S.POSTCOPY, S.CLOSING, S.COMPLETED, S.PAUSED, S.RECOVER, S.RECOVERING}
)  # in the last two a destination may still be in doubt
_LOST: Final = frozenset({S.PAUSED, S.IN_DOUBT})
_ENDED: Final = frozenset({S.COMPLETED, S.ABORTED}) | _LOST

M = TypeVar("M", bound=Message)


class _ControlProtocol:
    """What both sides share. Not thread-safe."""

    SIDE: ClassVar[str]
    _SENDS: ClassVar[Mapping[State, Moves]]
    _RECEIVES: ClassVar[Mapping[State, Moves]]
    _LOST: ClassVar[Mapping[State, State]]  # where a lost connection leads, when it is not ABORTED

    def __init__(self) -> None:
        self._state = State.SETUP
        self._buffer = _MessageBuffer(MAX_MESSAGE_BYTES)
        self._eof = False
        self._error: ProtocolError | None = None
        self._reason = ""
        self._in_doubt = False  # destination: `commit` may have been sent, and has not come
        self._complete_said = False  # destination: every page is here, and `complete` has been sent at least once
        self._placed_wanted = False  # the offer asked for `placed`
        self._machine_runs = False  # at the destination: `running` has been said, or `recover` with it

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
        return self._state in _LOST

    @property
    def may_run(self) -> bool:
        """Whether the machine may run on this side *now*. Never true at both ends."""
        raise NotImplementedError

    # ---- receiving

    def receive_data(self, data: bytes) -> None:
        """Takes what has arrived. Afterwards call `next_message` until it returns None."""
        if data and not self.ended:
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
            message = self._buffer.take()
            if message is not None:
                self._move(message, self._RECEIVES, "received")
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
        return self._state

    def reconnected(self) -> None:
        """A new connection with the same peer is there; only while `recoverable`. What the old one held is void."""
        if not self.recoverable:
            raise ProtocolError(f"nothing to recover in state {self._state.value}")
        self._state = State.RECOVER
        self._buffer = _MessageBuffer(MAX_MESSAGE_BYTES)
        self._eof = False
        self._error = None

    def give_up(self, reason: str) -> State:
        """Nobody will connect again: what IN_DOUBT comes to is ABORTED, and PAUSED where every page has come COMPLETED.
        A machine that is PAUSED stays so. Also what a refusal of the source means to a destination IN_DOUBT."""
        if self._state is State.IN_DOUBT:
            self._state, self._in_doubt = State.ABORTED, False
            self._reason = one_line(reason)
        elif self._state is State.PAUSED and self._complete_said:
            self._state = State.COMPLETED
        return self._state

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
        data = encode(message)  # first: what cannot be encoded must not move the state
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
            if self._machine_runs:
                after = State.POSTCOPY
        self._state = after

    def _peer(self) -> str:
        return "the destination" if self.SIDE == "source" else "the source"


class SourceProtocol(_ControlProtocol):
    """The control connection as the source sees it."""

    SIDE = "source"
    _SENDS = _SOURCE_SENDS
    _RECEIVES = _SOURCE_RECEIVES
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

    def send_offer(self, offer: Offer) -> bytes:
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
    _RECEIVES = _DESTINATION_RECEIVES
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

    def send_accept(self, page_bytes: tuple[int, ...], shards: int, bulk_channels: int) -> bytes:
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

    def send_received_map(self, block: int, first_page: int, pages: int, runs: bytes) -> bytes:
        return self._send(ReceivedMap(block, first_page, pages, runs))

    def send_recover(self, resume_ns: int, maps: int, digest: int) -> bytes:
        """`resume_ns` as in `running`, at least 1 when the machine runs; see `Recover`."""
        return self._send(Recover(resume_ns, maps, digest))
