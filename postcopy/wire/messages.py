# SPDX-License-Identifier: Apache-2.0
"""The messages: each is a frozen dataclass, each field of which knows what the peer may put into it."""

from __future__ import annotations

import enum
import hmac
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Final

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


class Invalid(Exception):
    """Why a value is not acceptable; becomes a ProtocolError that names message and field."""


def _number(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        # bool is an int to Python, not to the protocol
        if not isinstance(value, int) or isinstance(value, bool):
            raise Invalid(f"must be an integer, not {kind_of(value)}")
        if not low <= value <= high:
            raise Invalid(f"must be {low} to {high}, not {value}")
        return value

    return parse


def _octets(low: int, high: int, or_empty: bool = False) -> Callable[[object], bytes]:
    def parse(value: object) -> bytes:
        if not isinstance(value, bytes):
            raise Invalid(f"must be bytes, not {kind_of(value)}")
        if not low <= len(value) <= high and not (or_empty and not value):
            raise Invalid(f"must have {low} to {high} bytes, not {len(value)}")
        return value

    return parse


def _text(low: int, high: int) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str):
            raise Invalid(f"must be text, not {kind_of(value)}")
        if not low <= len(value) <= high:
            raise Invalid(f"must have {low} to {high} characters, not {len(value)}")
        return value

    return parse


def _line(value: object) -> str:
    """Text of the peer that we are going to print: one line, nothing that moves a cursor."""
    return one_line(_text(0, 4 * MAX_REASON_CHARS)(value))


def _one_of(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise Invalid(f"must be one of {', '.join(words)}")
        return value

    return parse


def _table(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Invalid(f"must be a map, not {kind_of(value)}")
    if not all(isinstance(key, str) for key in value):
        raise Invalid("must be a map with text keys")
    return MappingProxyType(value)


def _list_of(item: Callable[[object], Any], low: int, high: int) -> Callable[[object], tuple[Any, ...]]:
    def parse(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise Invalid(f"must be a list, not {kind_of(value)}")
        if not low <= len(value) <= high:
            raise Invalid(f"must have {low} to {high} entries, not {len(value)}")
        return tuple(item(entry) for entry in value)

    return parse


def _check_runs(runs: bytes, pages: int) -> None:
    if len(runs) > pages + 1:  # at most a byte a page, and one for an empty first run
        raise Invalid(f"runs must have at most {pages + 1} bytes for {pages} pages, not {len(runs)}")


def _page_size(value: object) -> int:
    size = _number(512, MAX_PAGE_BYTES)(value)
    if size & (size - 1):
        raise Invalid(f"must be a power of two, not {size}")
    return size


def kind_of(value: object) -> str:
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
        """`Invalid` for fields that do not fit together."""


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
        raise Invalid("needs name, size-bytes and page-bytes in each entry, and nothing else")
    block = Block(_text(1, 64)(table["name"]), _number(512, U63)(table["size-bytes"]), _page_size(table["page-bytes"]))
    if block.size_bytes % block.page_bytes:
        raise Invalid(f"has a block of {block.size_bytes} bytes, which is not whole pages of {block.page_bytes}")
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", one_line(self.reason))


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", one_line(self.reason))


@dataclass(frozen=True)
class Ping(Message):
    TYPE: ClassVar[str] = "ping"
    nonce: int = _wire(_number(0, U63))


@dataclass(frozen=True)
class Pong(Message):
    TYPE: ClassVar[str] = "pong"
    nonce: int = _wire(_number(0, U63))


MESSAGES: Final[Mapping[str, type[Message]]] = {
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


def shown(value: object) -> str:
    return one_line(repr(value), 60)


def same_secret(mine: bytes, theirs: bytes) -> bool:
    """Compares tokens in constant time; an empty one is never right."""
    return bool(mine) and hmac.compare_digest(mine, theirs)
