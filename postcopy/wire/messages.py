# SPDX-License-Identifier: Apache-2.0
"""What two hosts say to each other on the control connection: one frozen struct for each message.

A field's type says what a peer may put into it; msgspec checks that when a message is decoded (see `codec`). `check` is
for rules that no type can express. Messages that are made on this side are not checked.
"""

from __future__ import annotations

import enum
import hmac
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Final, Self

from msgspec import Meta, Struct
from msgspec.structs import force_setattr, replace

PROTOCOL_VERSION: Final = 5
OLDEST_VERSION: Final = 2  # that is still spoken
MAGIC: Final = b"postcpy"
PREAMBLE: Final = MAGIC + bytes([PROTOCOL_VERSION])

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024  # of any message; each type has a limit of its own below that
SMALL_MESSAGE_BYTES: Final = 16 * 1024

PROOF_BYTES: Final = 32
ID_BYTES: Final = 16
MAX_BLOCKS: Final = 64  # PC_MAX_BLOCKS and so on of the core, which checks the numbers again when it is given them
MAX_SHARDS: Final = 64
MAX_BULK_CHANNELS: Final = 16
MAX_REASON_CHARS: Final = 500
MAX_STATE_BYTES: Final = MAX_MESSAGE_BYTES - 4096
EARLY_STATE_BYTES: Final = 1024 * 1024
"""What one `early-state` holds at most; all of a state together, with that of `switchover`: MAX_STATE_BYTES."""
MAX_PAGE_BYTES: Final = 4 * 1024 * 1024  # one page must fit into one data frame (PC_FRAME_MAX_PAYLOAD_BYTES)
PAGE_MAP_PAGES: Final = 8 * 1024 * 1024
"""Pages a `page-map` describes at most. A run takes at least a page and, when it is short, one byte: so the worst
map, every other page present, stays below MAX_MESSAGE_BYTES."""
PLACED_PAGES: Final = 1024 * 1024
"""Pages a `placed` describes at most: a megabyte at worst, since pings have to get past it."""

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**32 - 1)]
BlockNumber = Annotated[int, Meta(ge=0, le=MAX_BLOCKS - 1)]
Pages = Annotated[int, Meta(ge=1, le=PAGE_MAP_PAGES)]
PageBytes = Annotated[int, Meta(ge=512, le=MAX_PAGE_BYTES)]  # and a power of two, see `_check_page_bytes`
BulkChannels = Annotated[int, Meta(ge=0, le=MAX_BULK_CHANNELS)]
Id = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
IdOrEmpty = Annotated[bytes, Meta(max_length=ID_BYTES)]  # see `_check_empty_or`
ProofOrEmpty = Annotated[bytes, Meta(max_length=PROOF_BYTES)]
Reason = Annotated[str, Meta(max_length=4 * MAX_REASON_CHARS)]  # made one line: see `_make_printable`
Text32 = Annotated[str, Meta(min_length=1, max_length=32)]
Compressions = Annotated[tuple[Text32, ...], Meta(max_length=8)]  # names; one that is not known is ignored


MESSAGES: Final[dict[str, type[Message]]] = {}  # by type


class Message(Struct, frozen=True, rename="kebab"):
    """What a peer said. Class `PageMap` is of type `page-map` on the wire, field `first_page` is `first-page` there."""

    TYPE: ClassVar[str] = ""
    MAX_BYTES: ClassVar[int] = SMALL_MESSAGE_BYTES
    FIELDS_FROM: ClassVar[Mapping[str, int]] = {}  # by its name on the wire, the version that has brought a field
    FIELDS_UNTIL: ClassVar[Mapping[str, int]] = {}  # and the last version that has it, where a later one does not
    MAY_LACK: ClassVar[Collection[str]] = ()  # the fields that were added to a version that was spoken already
    SINCE: ClassVar[int] = OLDEST_VERSION  # the version that has brought it

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.__name__.startswith("_"):
            cls.TYPE = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
            MESSAGES[cls.TYPE] = cls

    def check(self) -> None:
        """`ValueError`, which begins with the name of a field, for one that no peer may say."""


class Ended(enum.StrEnum):
    """How a migration has ended on one side, as it tells the other one."""

    COMPLETED = "completed"
    ABORTED = "aborted"  # the machine is the source's: never committed, or reclaimed
    RECLAIMED = "reclaimed"  # by the operator of the source, who knew that the destination was dead
    LOST = "lost"  # that side has given up what it had of a machine that was committed


class Hello(Message, frozen=True):
    FIELDS_FROM: ClassVar[Mapping[str, int]] = {"ended": 3, "proof": 3, "instance": 3}
    FIELDS_UNTIL: ClassVar[Mapping[str, int]] = {"token": 2}
    MAY_LACK: ClassVar[Collection[str]] = ("instance",)
    channel: str
    side: str  # what the connecting host is
    index: Annotated[int, Meta(ge=0, le=MAX_SHARDS - 1)]
    migration: IdOrEmpty
    epoch: U32
    ended: str = ""  # the caller only comes to say that
    token: IdOrEmpty = b""
    proof: ProofOrEmpty = b""
    instance: IdOrEmpty = b""  # of a caller that listens too: it knows by that when it has called itself

    def check(self) -> None:
        _check_one_of(("control", "urgent", "bulk"), channel=self.channel)
        _check_one_of(("source", "dest"), side=self.side)
        _check_one_of(("", *Ended), ended=self.ended)
        _check_empty_or(ID_BYTES, migration=self.migration, token=self.token, instance=self.instance)
        _check_empty_or(PROOF_BYTES, proof=self.proof)
        if self.channel == "bulk" and self.index >= MAX_BULK_CHANNELS:
            raise ValueError(f"index must be 0 to {MAX_BULK_CHANNELS - 1}, not {self.index}")
        if self.channel == "control" and self.index:
            raise ValueError("index must be 0 on a control connection")
        if self.ended and (self.channel != "control" or not self.migration):
            raise ValueError("ended must be empty but on the control connection of a migration")

    def signed(self, token: bytes, version: int) -> Hello:
        """With what shows that we know the token; as it is where there is none."""
        if not token:
            return self
        return replace(self, token=token) if version < 3 else replace(self, proof=self._proof(token))

    def is_signed(self, token: bytes, version: int) -> bool:
        """Whether the sender knows the token."""
        return same_secret(token, self.token) if version < 3 else hmac.compare_digest(self._proof(token), self.proof)

    def _proof(self, token: bytes) -> bytes:
        words = (self.channel, self.side, str(self.index), self.migration.hex(), str(self.epoch), self.ended)
        return _proof(token, "hello", *words)


class _Answer(Message, frozen=True, kw_only=True):
    """To a hello. Its proof shows that the answering side knows the token, too."""

    FIELDS_FROM: ClassVar[Mapping[str, int]] = {"proof": 3}
    proof: ProofOrEmpty = b""

    def check(self) -> None:
        _check_empty_or(PROOF_BYTES, proof=self.proof)

    def signed(self, token: bytes, hello: Hello) -> Self:
        return replace(self, proof=self._proof(token, hello)) if token else self

    def is_signed(self, token: bytes, hello: Hello) -> bool:
        return bool(token) and hmac.compare_digest(self._proof(token, hello), self.proof)

    def _proof(self, token: bytes, hello: Hello) -> bytes:
        raise NotImplementedError


class Welcome(_Answer, frozen=True):
    def _proof(self, token: bytes, hello: Hello) -> bytes:
        return _proof(token, "welcome", hello.channel, str(hello.index), hello.migration.hex(), str(hello.epoch))


class Refused(_Answer, frozen=True):
    FIELDS_FROM: ClassVar[Mapping[str, int]] = {"code": 3, "proof": 3}
    reason: Reason
    code: Text32 = "other"

    def __post_init__(self) -> None:
        _make_printable(self)

    def _proof(self, token: bytes, hello: Hello) -> bytes:
        return _proof(token, "refused", self.code, hello.migration.hex(), str(hello.epoch))


class _Ending(Message, frozen=True):
    reason: Reason

    def __post_init__(self) -> None:
        _make_printable(self)


class Block(Struct, frozen=True, rename="kebab"):
    """A RAM block as the source has it."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    size_bytes: Annotated[int, Meta(ge=512, le=2**63 - 1)]  # a multiple of page_bytes
    page_bytes: PageBytes

    def pages(self, page_bytes: int) -> int:
        """How many pages of that size cover it."""
        return -(-self.size_bytes // page_bytes)


class Offer(Message, frozen=True):
    MAX_BYTES: ClassVar[int] = 64 * 1024
    FIELDS_FROM: ClassVar[Mapping[str, int]] = {"compress": 4}
    migration: Id
    token: Id
    machine: Text32
    config: Mapping[str, Any]
    blocks: Annotated[tuple[Block, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    bulk_channels: BulkChannels
    placed_every_ms: Annotated[int, Meta(ge=0, le=60_000)]  # how often `placed` is wanted, 0: never
    compress: Compressions = ()  # how pages may be compressed that are pushed

    def check(self) -> None:
        for block in self.blocks:
            _check_page_bytes("blocks", block.page_bytes)
            if block.size_bytes % block.page_bytes:
                raise ValueError(f"blocks has one of {block.size_bytes} bytes: not whole pages of {block.page_bytes}")


class Accept(Message, frozen=True):
    FIELDS_FROM: ClassVar[Mapping[str, int]] = {"compress": 4}
    page_bytes: Annotated[tuple[PageBytes, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    shards: Annotated[int, Meta(ge=1, le=MAX_SHARDS)]
    bulk_channels: BulkChannels
    compress: Compressions = ()  # those of the offer that can be taken here

    def check(self) -> None:
        for size in self.page_bytes:
            _check_page_bytes("page-bytes", size)


class Reject(_Ending, frozen=True):
    pass


class Ready(Message, frozen=True):
    pass


class _Map(Message, frozen=True):
    """Which pages of a part of a block are there, in the run-length form of `Bitmap`."""

    MAX_BYTES: ClassVar[int] = PAGE_MAP_PAGES + SMALL_MESSAGE_BYTES
    MAX_PAGES: ClassVar[int] = PAGE_MAP_PAGES
    block: BlockNumber
    first_page: U63
    pages: Pages
    runs: bytes

    def check(self) -> None:
        if self.pages > self.MAX_PAGES:
            raise ValueError(f"pages must be 1 to {self.MAX_PAGES}, not {self.pages}")
        if len(self.runs) > self.pages + 1:  # at most a byte a page, and one for an empty first run
            most = self.pages + 1
            raise ValueError(f"runs must have at most {most} bytes for {self.pages} pages, not {len(self.runs)}")


class PageMap(_Map, frozen=True):
    """What the source has; all else is zeros."""


class StaleMap(_Map, frozen=True):
    """Pages that have changed since the destination was told of them, or got them: it has none of them any more."""

    SINCE: ClassVar[int] = 4


class Round(Message, frozen=True):
    """Ends what the source says while the machine runs there."""

    SINCE: ClassVar[int] = 4
    number: U32
    maps: Positive
    pushed: bool  # on each bulk channel an `end` was sent since the last round, which is to be waited for


class RoundDone(Message, frozen=True):
    SINCE: ClassVar[int] = 4
    number: U32


class EarlyState(Message, frozen=True):
    """The beginning of the state, or what follows that: it is final, and the machine may load it at once. An empty one
    says that some will come."""

    SINCE: ClassVar[int] = 5
    MAX_BYTES: ClassVar[int] = EARLY_STATE_BYTES + SMALL_MESSAGE_BYTES
    state: Annotated[bytes, Meta(max_length=EARLY_STATE_BYTES)]


class Switchover(Message, frozen=True):
    MAX_BYTES: ClassVar[int] = MAX_MESSAGE_BYTES
    FIELDS_FROM: ClassVar[Mapping[str, int]] = {"whole": 4}
    state: Annotated[bytes, Meta(max_length=MAX_STATE_BYTES)]
    maps: U32
    whole: bool = False  # every page is to be here before `prepared`


class Prepared(Message, frozen=True):
    pass


class Commit(Message, frozen=True):
    pass


class Running(Message, frozen=True):
    FIELDS_FROM: ClassVar[Mapping[str, int]] = {"ago-ns": 4}
    resume_ns: U63
    ago_ns: U63 = 0  # when that was, as this was sent


class Placed(_Map, frozen=True):
    """Pages that are at the destination for good, and were not acknowledged before on this connection."""

    MAX_BYTES: ClassVar[int] = PLACED_PAGES + SMALL_MESSAGE_BYTES
    MAX_PAGES: ClassVar[int] = PLACED_PAGES


class Complete(Message, frozen=True):
    MAX_BYTES: ClassVar[int] = 64 * 1024
    stats: Mapping[str, Any]


class CompleteAck(Message, frozen=True):
    MAX_BYTES: ClassVar[int] = 64 * 1024
    stats: Mapping[str, Any]


class ReceivedMap(_Map, frozen=True):
    """What the destination has, after it was lost."""


class Recover(Message, frozen=True):
    """Ends what the destination says after it was lost."""

    resume_ns: U63  # as in `running`; 0: the machine has not run there yet
    maps: Positive
    digest: U32  # CRC32C over the bitmaps of all blocks, in 64-bit little-endian words


class Recovered(Message, frozen=True):
    pass


class Abort(_Ending, frozen=True):
    pass


class Ping(Message, frozen=True):
    nonce: U63


class Pong(Message, frozen=True):
    nonce: U63


def one_line(text: str, limit: int = MAX_REASON_CHARS) -> str:
    """`text` made fit to be printed or sent as a reason: one line, printable, not longer than `limit`."""
    line = "".join(char if char.isprintable() else " " for char in text).strip()
    return line if len(line) <= limit else line[: limit - 3] + "..."


def same_secret(mine: bytes, theirs: bytes) -> bool:
    """Compares tokens in constant time; an empty one is never right."""
    return bool(mine) and hmac.compare_digest(mine, theirs)


def _proof(token: bytes, *words: str) -> bytes:
    """No word has a blank in it, so that two different lists never are the same line."""
    return hmac.digest(token, " ".join(words).encode(), "sha256")


def _make_printable(message: Refused | _Ending) -> None:
    """It will be printed, here or at the peer: one line, and nothing that moves a cursor."""
    force_setattr(message, "reason", one_line(message.reason))


def _check_one_of(allowed: Collection[str], **fields: str) -> None:
    for name, value in fields.items():
        if value not in allowed:
            named = [each or "empty" for each in allowed]
            shown = one_line(repr(value), 60)
            raise ValueError(f"{name} must be {', '.join(named[:-1])} or {named[-1]}, not {shown}")


def _check_empty_or(size: int, **fields: bytes) -> None:
    for name, value in fields.items():
        if len(value) not in (0, size):
            raise ValueError(f"{name} must have {size} bytes or none, not {len(value)}")


def _check_page_bytes(name: str, size: int) -> None:
    if size & (size - 1):
        raise ValueError(f"{name} must be a power of two, not {size}")
