# SPDX-License-Identifier: Apache-2.0
"""The wire format, written a second time from docs/protocol.md alone.

Nothing here imports `postcopy`: a mistake there would otherwise be made on both sides, and cancel out. Bytes only; the
sockets are in `_peer`.
"""

from __future__ import annotations

import functools
import hmac
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

MAGIC = b"postcpy"
NEWEST, OLDEST = 5, 2
MAX_MESSAGE_BYTES = 16 << 20
FRAME_MAGIC = 0x46504350
FRAME_BYTES = 40
REQUEST, PAGES, ZERO, END, ERROR = 1, 2, 3, 4, 5
ANSWERS, LZ4, ZSTD = 1, 2, 4
"""Flags of a frame: it answers a request; its payload is compressed."""

Fields = dict[str, Any]

# ---- CRC32C, reflected 0x1EDC6F41


def _make_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _make_table()
_TABLE_NP = np.array(_TABLE, dtype=np.uint32)
LANE_BYTES = 1024


def _update(crc: int, data: bytes) -> int:
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


def _make_advance() -> list[list[int]]:
    """What LANE_BYTES zero bytes make of a CRC, by each of its four bytes: it is linear in its bits."""
    bits = np.array([1 << bit for bit in range(32)], dtype=np.uint32)
    for _ in range(LANE_BYTES):
        bits = _TABLE_NP[bits & 0xFF] ^ (bits >> np.uint32(8))
    advance = []
    for byte in range(4):
        row = []
        for value in range(256):
            total = 0
            for bit in range(8):
                if value >> bit & 1:
                    total ^= int(bits[8 * byte + bit])
            row.append(total)
        advance.append(row)
    return advance


_ADVANCE = _make_advance()


def crc32c(data: bytes, crc: int = 0) -> int:
    """Long data in lanes side by side, since a loop over 16 MiB would take seconds."""
    crc ^= 0xFFFFFFFF
    lanes = len(data) // LANE_BYTES
    if lanes >= 4:
        rows = np.frombuffer(data, dtype=np.uint8, count=lanes * LANE_BYTES).reshape(lanes, LANE_BYTES)
        columns = np.ascontiguousarray(rows.T)
        state = np.zeros(lanes, dtype=np.uint32)
        for column in columns:
            state = _TABLE_NP[(state ^ column) & 0xFF] ^ (state >> np.uint32(8))
        a0, a1, a2, a3 = _ADVANCE
        for lane in state.tolist():
            crc = a0[crc & 0xFF] ^ a1[crc >> 8 & 0xFF] ^ a2[crc >> 16 & 0xFF] ^ a3[crc >> 24] ^ lane
        data = data[lanes * LANE_BYTES :]
    return _update(crc, data) ^ 0xFFFFFFFF


# ---- Messages


def preamble(version: int) -> bytes:
    return MAGIC + bytes([version])


def frame_message(body: bytes) -> bytes:
    """A message around any body, also one that makes no sense; its checksum is right."""
    length = struct.pack(">I", len(body))
    return length + struct.pack(">I", crc32c(body, crc32c(length))) + body


def message(kind: str, fields: Fields) -> bytes:
    return frame_message(msgpack.packb({"type": kind, **fields}, use_bin_type=True))


def unpack(body: bytes) -> Fields:
    fields: Fields = msgpack.unpackb(body, raw=False)
    return fields


def hello(
    channel: str,
    side: str,
    *,
    index: int = 0,
    migration: bytes = b"",
    epoch: int = 0,
    token: bytes = b"",
    ended: str = "",
    version: int = NEWEST,
) -> bytes:
    """From version 3 on the token itself never travels after the offer, but a proof of knowing it."""
    fields: Fields = {"channel": channel, "side": side, "index": index, "migration": migration, "epoch": epoch}
    if version < 3:
        fields["token"] = token
    else:
        words = ("hello", channel, side, str(index), migration.hex(), str(epoch), ended)
        fields |= {"ended": ended, "proof": proof(token, *words) if token else b""}
    return message("hello", fields)


def refused(code: str, *, migration: bytes = b"", epoch: int = 0, token: bytes = b"") -> Fields:
    """The fields of a refusal of version 3, proven where the token is known."""
    words = ("refused", code, migration.hex(), str(epoch))
    return {"reason": f"refused: {code}", "code": code, "proof": proof(token, *words) if token else b""}


def welcome(hello: Fields, token: bytes) -> Fields:
    """The fields of a welcome of version 3 to `hello`: proven, where that names a migration."""
    migration = hello["migration"]
    words = ("welcome", hello["channel"], str(hello["index"]), migration.hex(), str(hello["epoch"]))
    return {"proof": proof(token, *words) if migration else b""}


def proof(token: bytes, *words: str) -> bytes:
    return hmac.digest(token, " ".join(words).encode(), "sha256")


# ---- Frames


@dataclass(frozen=True)
class Frame:
    type: int
    block: int = 0
    first_page: int = 0
    pages: int = 1
    request_id: int = 0
    payload: bytes = b""
    flags: int = 0
    content_bytes: int = 0  # of a compressed payload

    def pack(self) -> bytes:
        crc = _crc_of_payload(self.payload) if self.payload else 0
        header = struct.pack(
            "<IBBHQIIIII",
            FRAME_MAGIC,
            self.type,
            self.flags,
            self.block,
            self.first_page,
            self.pages,
            self.request_id,
            len(self.payload),
            crc,
            self.content_bytes,
        )
        return header + struct.pack("<I", crc32c(header)) + self.payload


@functools.lru_cache(maxsize=256)
def _crc_of_payload(payload: bytes) -> int:
    return crc32c(payload)


def unpack_frame(header: bytes) -> tuple[Frame, int]:
    """The frame without its payload, and how many bytes that has. `ValueError` for a damaged header."""
    (crc,) = struct.unpack("<I", header[36:])
    if crc != crc32c(header[:36]):
        raise ValueError(f"a frame header is damaged: {header.hex()}")
    magic, kind, flags, block, first, pages, request_id, size, _, _ = struct.unpack("<IBBHQIIIII", header[:36])
    if magic != FRAME_MAGIC:
        raise ValueError(f"no frame: {header.hex()}")
    return Frame(kind, block, first, pages, request_id, b"", flags), size


def lz4_run(byte: bytes, size: int) -> bytes:
    """The LZ4 block of `size` equal bytes, at least 20."""
    match = size - 1 - 5 - 4 - 15  # what the first token and the last five literals leave
    return b"\x1f" + byte + b"\x01\x00" + b"\xff" * (match // 255) + bytes([match % 255]) + b"\x50" + byte * 5


def zstd_run(byte: bytes, size: int, claimed: int | None = None) -> bytes:
    """The Zstandard frame of `size` equal bytes, whose header says that it has `claimed`."""
    frame = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", size if claimed is None else claimed)
    while size:
        part = min(size, 128 << 10)
        size -= part
        frame += struct.pack("<I", part << 3 | 1 << 1 | (not size))[:3] + byte
    return frame


# ---- Bitmaps: lengths of runs of zeros and ones in turn, LEB128, up to the last one


def encode_runs(bits: Iterable[bool]) -> bytes:
    out = bytearray()
    expected, length = False, 0
    for bit in bits:
        if bit == expected:
            length += 1
            continue
        out += _varint(length)
        expected, length = bit, 1
    if expected:  # the last run is one of ones; what follows is zeros without being said
        out += _varint(length)
    return bytes(out)


def all_pages(pages: int) -> bytes:
    """The runs of a bitmap with every bit set; `b""` are those of an empty one."""
    return _varint(0) + _varint(pages)


def decode_runs(data: bytes, pages: int) -> list[bool]:
    bits: list[bool] = []
    value, at = False, 0
    while at < len(data):
        length = shift = 0
        while True:
            byte = data[at]
            at += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        bits += [value] * length
        value = not value
    return (bits + [False] * pages)[:pages]


def _varint(number: int) -> bytes:
    out = bytearray()
    while True:
        byte = number & 0x7F
        number >>= 7
        out.append(byte | (0x80 if number else 0))
        if not number:
            return bytes(out)
