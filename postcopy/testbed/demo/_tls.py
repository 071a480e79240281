# SPDX-License-Identifier: Apache-2.0
"""What the demo shows of TLS: certificates that it makes for both sides, strangers that are refused, and what a host on
the network can read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import trio

from postcopy.errors import PostcopyError
from postcopy.output import Output
from postcopy.records.commands import DemoTls, Stranger
from postcopy.records.events import SourceResult
from postcopy.records.migration import Check
from postcopy.testbed.demo._result import check
from postcopy.testbed.demo._side import Side
from postcopy.testbed.lab import Host
from postcopy.units import format_size

LOOPBACK = "127.0.0.1"
STRANGERS = {  # how they connect, and what they have to protect it
    "with a certificate of another authority": ("--tls", "stranger.tls"),
    "without TLS": ("--insecure",),
}
_HEADER_BYTES = 5
_MAX_RECORD_BYTES = (1 << 14) + 256
_ENCRYPTED = 23  # the type of a record (RFC 8446, 5.1); the others (20 to 22) open a connection, or end it


class Watch:
    """Sees what goes over connections, and counts what is in records of TLS, encrypted or not, and what is in none."""

    def __init__(self) -> None:
        self._halves: dict[tuple[int, bool], _Half] = {}
        self.encrypted_bytes = 0
        self.opening_bytes = 0
        self.readable_bytes = 0

    def see(self, connection: int, out: bool, data: bytes) -> None:
        """The next bytes of a connection in one direction."""
        for kind, size in self._halves.setdefault((connection, out), _Half()).split(data):
            if kind is None:
                self.readable_bytes += size
            elif kind == _ENCRYPTED:
                self.encrypted_bytes += size
            else:
                self.opening_bytes += size

    @property
    def connections(self) -> int:
        return len({connection for connection, _ in self._halves})


class _Half:
    """One direction of a connection, divided into records of TLS. From the first byte on that is not part of one, all
    the rest of that direction counts as readable."""

    def __init__(self) -> None:
        self._header = b""
        self._kind: int | None = None
        self._left: float = 0

    def split(self, data: bytes) -> Iterator[tuple[int | None, int]]:
        """Type of record and number of bytes, for each piece of `data`; type None: not TLS. The bytes of a header are
        counted when it is whole."""
        at = 0
        while at < len(data):
            if self._left:
                size = int(min(self._left, len(data) - at))
                self._left -= size
                yield self._kind, size
                at += size
                continue
            size = min(_HEADER_BYTES - len(self._header), len(data) - at)
            self._header += data[at : at + size]
            at += size
            if not self._begins_record():
                self._kind, self._left = None, float("inf")
            elif len(self._header) == _HEADER_BYTES:
                self._kind, self._left = self._header[0], int.from_bytes(self._header[3:])
            else:
                return
            yield self._kind, len(self._header)
            self._header = b""

    def _begins_record(self) -> bool:
        header = self._header.ljust(_HEADER_BYTES, b"\0")
        return (
            20 <= header[0] <= _ENCRYPTED
            and (len(self._header) < 2 or header[1] == 3)
            and (len(self._header) < 3 or header[2] in (1, 3))
            and int.from_bytes(header[3:]) <= _MAX_RECORD_BYTES
        )


def make_certificates(directory: Path, source: Host | None, dest: Host | None) -> dict[str, str]:
    """By side: what ``--tls`` is to name. A stranger's directory is beside them. Blocks."""
    # (a library that no other demo needs)
    from postcopy.tls._authority import issue, new_authority

    for authority, sides in (("ca", {"source": source, "dest": dest}), ("other-ca", {"stranger": None})):
        new_authority(directory / authority, days=1)
        for side, host in sides.items():
            names = [LOOPBACK, *((host.name, host.ipv4) if host is not None else ())]
            issue(directory / authority, names, directory / f"{side}.tls", days=1)
    # The stranger trusts the destination: otherwise it would be the stranger that refuses, and nothing would be shown.
    shutil.copy(directory / "ca" / "ca-cert.pem", directory / "stranger.tls")
    return {side: str(directory / f"{side}.tls") for side in ("source", "dest")}


async def refuse_strangers(directory: Path, address: str, host: Host | None, output: Output) -> list[Stranger]:
    """Tries to send an image to the destination, which waits for its source, with what a stranger has."""
    image = directory / "stranger.img"
    await trio.to_thread.run_sync(image.write_bytes, os.urandom(1 << 16))
    tried = {}
    async with trio.open_nursery() as nursery:
        for how, protection in STRANGERS.items():
            words = [str(directory / word) if word.endswith(".tls") else word for word in protection]
            arguments = ["source", "--json", "--machine", "image", "--image", str(image), "--connect", address, *words]
            tried[how] = Side("stranger", SourceResult, arguments, host)
            nursery.start_soon(tried[how].run, None)
    found = []
    for how, stranger in tried.items():
        try:
            await stranger.good_end()
            said = ""
        except PostcopyError as error:
            if stranger.result is None:
                raise  # it has not come so far as to be refused
            said = str(error).removeprefix("stranger: ")
        found.append(Stranger(how=how, let_in=not said, said=said))
        output.say(f"demo: a stranger {how}: {said or 'NOT REFUSED'}")
    return found


def as_record(strangers: list[Stranger], watch: Watch | None) -> DemoTls:
    tls = DemoTls(strangers=strangers)
    if watch is not None:
        tls.connections = watch.connections
        tls.ciphertext, tls.opening, tls.readable = watch.encrypted_bytes, watch.opening_bytes, watch.readable_bytes
    return tls


def checks(tls: DemoTls) -> Iterator[Check]:
    for one in tls.strangers:
        yield check(
            not one.let_in,
            f"a stranger {one.how} was refused",
            f"a stranger {one.how} was let in",
            "an image was sent to the destination's port before its source came",
        )
    if tls.readable is not None and tls.ciphertext is not None:
        yield check(
            not tls.readable and tls.ciphertext > 0,
            f"all that went over the network was encrypted, {format_size(tls.ciphertext)}",
            f"{format_size(tls.readable)} went over the network in clear",
            "a relay between both sides has divided all of it into records of TLS",
        )
