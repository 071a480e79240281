# SPDX-License-Identifier: Apache-2.0
"""Messages to bytes and back: a length, a checksum, msgpack.

Any host that can connect can send anything. So the length of a message is checked before its first byte is kept:
against what may come in this state, and against its type as soon as that is there. How deep it is and of how many parts
is measured before one of them is made. Then each field has to be there, with its type and in its range. Whatever a peer
sends, nothing but `ProtocolError` comes of it.

From version 3 on, fields that are not known are ignored.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection
from typing import Any, Final

import msgspec

from postcopy._native import ffi, lib
from postcopy.errors import ProtocolError
from postcopy.wire.messages import (
    MESSAGES,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    SMALL_MESSAGE_BYTES,
    Commit,
    Message,
    Prepared,
    Running,
    StaleMap,
    Switchover,
    one_line,
)

HEADER_BYTES: Final = 8  # of a message: its length, and the CRC32C of the length and of what follows
MAX_ELEMENTS: Final = 4096  # of one message: whatever becomes a Python object
MAX_DEPTH: Final = 8
_NUMBER_BYTES: Final = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_LENGTH_BYTES: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_KINDS: Final = {
    "str": "text", "bytes": "bytes", "int": "a whole number", "float": "a fraction", "bool": "true or false",
    "array": "a list", "object": "a map", "null": "nothing",
}  # fmt: skip
_PARTS: Final = {"str": "character", "bytes": "byte", "array": "element"}
_TYPE_WITHIN_BYTES: Final = 5 + 5 + 1 + 31  # the map, the key, the text's length, the text


def encode(message: Message, version: int = PROTOCOL_VERSION) -> bytes:
    """The message as it goes over the wire. `ProtocolError` when it is longer than its type may be."""
    body = msgspec.to_builtins(message, builtin_types=(bytes,))
    # The type comes first: see `_type_of`.
    fields = {name: body[name] for name in _fields(message, version)}
    packed = msgspec.msgpack.encode({"type": message.TYPE, **fields})
    _check_length(message, len(packed))
    length = len(packed).to_bytes(4, "big")
    return length + _crc(length, packed).to_bytes(4, "big") + packed


def decode(packed: bytes | memoryview, version: int = PROTOCOL_VERSION) -> Message:
    """The message in one length-delimited body. `ProtocolError` names what is wrong."""
    check_shape(packed)
    try:
        body = msgspec.msgpack.decode(packed, type=dict[str, Any])
    except ValueError as error:  # as UnicodeDecodeError and those of msgspec are
        raise ProtocolError(f"a message is not valid msgpack, or not a map: {one_line(str(error), 120)}") from error
    kind = body.pop("type", None)
    cls = MESSAGES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(f"unknown message type {shown(kind)}")
    _check_length(cls, len(packed))
    names = _fields(cls, version)
    for name in names:
        if name not in body and name not in cls.MAY_LACK:
            raise ProtocolError(f"{kind}: field {name} is missing")
    if version < 3 and len(body) > len(names):  # later versions may say more than we know
        raise ProtocolError(f"{kind}: unknown field {shown(next(name for name in body if name not in names))}")
    try:
        message = msgspec.convert({name: body[name] for name in names if name in body}, cls, builtin_types=(bytes,))
        message.check()
    except msgspec.ValidationError as error:
        what, _, where = str(error).rpartition(" - at ")  # as in: Expected `int`, got `str` - at `$.blocks[0].name`
        field = where.partition("$.")[2].rstrip("`")
        raise ProtocolError(f"{kind}: field {field} {_in_words(what)}") from error
    except ValueError as error:
        raise ProtocolError(f"{kind}: field {error}") from error
    return message


@functools.cache
def prepare() -> None:
    """What msgspec makes of each type at its first message, once and now: it takes 100 to 400 us, and most types come
    for the first time while a machine is paused. And the messages of a pause a few times: code that Python has not run
    before takes three times as long."""
    for cls in MESSAGES.values():
        with contextlib.suppress(msgspec.ValidationError):
            msgspec.convert({}, cls)
    for message in (StaleMap(0, 0, 64, b"\x40"), Switchover(b"state", 1), Prepared(), Commit(), Running(1, 1)):
        for _ in range(16):
            decode(encode(message)[HEADER_BYTES:])


def _in_words(what: str) -> str:
    """What msgspec says about a value, for people."""
    if found := re.fullmatch(r"Expected `(\w+)`, got `(\w+)`", what):
        expected, got = (_KINDS.get(name, name) for name in found.groups())
        return f"must be {expected}, not {got}"
    if found := re.fullmatch(r"Expected `(\w+)`( of length)? (<=|>=) (-?\d+)", what):
        kind, length, sign, limit = found.groups()
        bound = f"{'at most' if sign == '<=' else 'at least'} {limit}"
        part = _PARTS.get(kind, "part") + ("s" if limit != "1" else "")
        return f"must have {bound} {part}" if length else f"must be {bound}"
    if found := re.fullmatch(r"Object missing required field `(.+)`", what):
        return f"has no {found[1]}"
    return f"is wrong: {one_line(what, 120)}"


def check_shape(packed: bytes | memoryview) -> None:
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


class MessageBuffer:
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
        limit = max((MESSAGES[kind].MAX_BYTES for kind in kinds), default=SMALL_MESSAGE_BYTES)
        if not 0 < length <= limit:
            raise ProtocolError(f"a message of {length} bytes; 1 to {limit} are allowed here")
        if length > SMALL_MESSAGE_BYTES and len(self._buffer) >= HEADER_BYTES + _TYPE_WITHIN_BYTES:
            kind = _type_of(bytes(self._buffer[HEADER_BYTES : HEADER_BYTES + _TYPE_WITHIN_BYTES]))
            if kind not in kinds or length > MESSAGES[kind].MAX_BYTES:
                raise ProtocolError(f"a message of {length} bytes and of type {shown(kind)}: too long for it, or now")
        return length


def _type_of(beginning: bytes) -> str:
    """The type of a long message, whose first key that must be; empty where it is not."""
    at = {0xDE: 3, 0xDF: 5}.get(beginning[0], 1)
    key, tag = beginning[at : at + 5], beginning[at + 5]
    return beginning[at + 6 : at + 6 + (tag & 0x1F)].decode("ascii", "replace") if key == b"\xa4type" else ""


def _fields(message: Message | type[Message], version: int) -> list[str]:
    """Those that this version has, by their names on the wire."""
    return [
        name
        for name in message.__struct_encode_fields__
        if message.FIELDS_FROM.get(name, OLDEST_VERSION) <= version <= message.FIELDS_UNTIL.get(name, PROTOCOL_VERSION)
    ]


def _check_length(message: Message | type[Message], length: int) -> None:
    if length > message.MAX_BYTES:
        raise ProtocolError(f"{message.TYPE}: {length} bytes are more than it may have ({message.MAX_BYTES})")


def _crc(length: bytes, packed: bytes | memoryview) -> int:
    """TCP's checksum lets one damaged segment in some ten thousand pass, and a damaged page map would be believed."""
    return int(lib.pc_crc32c(lib.pc_crc32c(0, length, len(length)), ffi.from_buffer("char[]", packed), len(packed)))


def shown(value: object) -> str:
    return one_line(repr(value), 60)
