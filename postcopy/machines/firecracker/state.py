# SPDX-License-Identifier: Apache-2.0
"""The state file of a snapshot, as far as it has to be looked into: where disks are.

Firecracker opens disks under the names that are in the state, and has no way to be told others. In the file a name is
its length (64 bits, little endian) and its bytes, and nothing refers to a place behind it: it can be replaced by a
longer one. The file ends in a CRC-64 of all before.
"""

from __future__ import annotations

from collections.abc import Mapping

from postcopy._native import ffi, lib
from postcopy.errors import ProtocolError

_CRC_BYTES = 8


def _crc64(data: bytes) -> int:
    return int(lib.pc_crc64(0, ffi.from_buffer("char[]", data), len(data)))


def with_disks(state: bytes, paths: Mapping[str, str]) -> bytes:
    """The same state, with disks elsewhere: the new path by the old one. `ProtocolError` for a state that is damaged,
    or in which a path is not found once."""
    body = state[:-_CRC_BYTES]
    if _crc64(body).to_bytes(_CRC_BYTES, "little") != state[-_CRC_BYTES:]:
        raise ProtocolError("the state of the microVM is damaged: its checksum is wrong")
    pieces = {_string(old): _string(new) for old, new in paths.items()}
    for old in pieces:
        if (count := body.count(old)) != 1:
            path = old[8:].decode("utf-8", "replace")
            raise ProtocolError(
                f"the state of the microVM names the disk {path} {count} times, and not once as expected"
            )
    # From back to front: a new path may hold an old one.
    for at, old in sorted(((body.index(old), old) for old in pieces), reverse=True):
        body = body[:at] + pieces[old] + body[at + len(old) :]
    return body + _crc64(body).to_bytes(_CRC_BYTES, "little")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return len(raw).to_bytes(8, "little") + raw
