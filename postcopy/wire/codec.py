# SPDX-License-Identifier: Apache-2.0
"""Bytes to messages and back: framing, limits, checks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import Field, fields
from typing import Any, Final

import msgpack

from postcopy._native import ffi, lib
from postcopy.errors import ProtocolError
from postcopy.wire.messages import (
    HEADER_BYTES,
    MAX_DEPTH,
    MAX_ELEMENTS,
    MESSAGES,
    PROTOCOL_VERSION,
    SMALL_MESSAGE_BYTES,
    Block,
    Invalid,
    Message,
    kind_of,
    one_line,
    shown,
)


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


_NUMBER_BYTES: Final = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_LENGTH_BYTES: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


def decode(packed: bytes | memoryview, version: int = PROTOCOL_VERSION) -> Message:
    """The message in one length-delimited body. `ProtocolError` names what is wrong."""
    check_shape(packed)
    try:
        body = msgpack.unpackb(packed, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:  # UnicodeDecodeError is a ValueError too
        raise ProtocolError(
            f"a message is not valid msgpack: {one_line(str(error), 120) or type(error).__name__}"
        ) from error
    if not isinstance(body, dict):
        raise ProtocolError(f"a message is {kind_of(body)}, not a map")
    kind = body.pop("type", None)
    cls = MESSAGES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(f"unknown message type {shown(kind)}")
    if len(packed) > cls.MAX_BYTES:
        raise ProtocolError(f"{kind}: {len(packed)} bytes are more than it may have ({cls.MAX_BYTES})")
    values: dict[str, Any] = {}
    for item in _fields(cls, version):
        name = _wire_name(item)
        if name not in body:
            raise ProtocolError(f"{kind}: field {name} is missing")
        try:
            values[item.name] = item.metadata["parse"](body.pop(name))
        except Invalid as error:
            raise ProtocolError(f"{kind}: field {name} {error}") from error
    if body and version < 3:  # its peers mean something else then; later ones may say more than we know
        raise ProtocolError(f"{kind}: unknown field {shown(next(iter(body)))}")
    message = cls(**values)
    try:
        message.check()
    except Invalid as error:
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


_TYPE_WITHIN_BYTES: Final = 5 + 5 + 1 + 31  # the map, the key, the text's length, the text


def _type_of(beginning: bytes) -> str:
    """The type of a long message, whose first key that must be; empty where it is not."""
    at = {0xDE: 3, 0xDF: 5}.get(beginning[0], 1)
    key, tag = beginning[at : at + 5], beginning[at + 5]
    return beginning[at + 6 : at + 6 + (tag & 0x1F)].decode("ascii", "replace") if key == b"\xa4type" else ""
