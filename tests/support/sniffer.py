# SPDX-License-Identifier: Apache-2.0
"""What an attacker on the network sees: every byte that TCP carries over an interface, put together again.

``python sniffer.py INTERFACE FILE`` in the network namespace that is looked at: prints ``ready``, writes what it sees
to the file until SIGTERM, then how many packets were lost. `read` puts the streams together from that file, and fails
where one has a gap: "not seen" has to mean "not there".
"""

from __future__ import annotations

import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ETH_P_IP, ETH_P_ALL = 0x0800, 0x0003
SOL_PACKET, PACKET_STATISTICS = 263, 6
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 256 << 20
MAX_PACKET_BYTES = 1 << 18  # loopback has packets of 64 KiB, and larger ones from segmentation that is put off
SYN = 0x02
_HEAD = struct.Struct("=HHIBI")


class Way(NamedTuple):
    """One direction of a connection: the ports it comes from and goes to."""

    sender: int
    receiver: int


def main(interface: str, path: str) -> None:
    """Writes a record (ports, sequence number, flags, length, payload) for each TCP segment."""
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as packets,
        open(path, "wb") as file,
    ):
        packets.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        packets.bind((interface, ETH_P_ALL))
        packets.settimeout(0.1)
        print("ready", flush=True)
        quiet = False
        while not (ended and quiet):  # what was sent before the signal is read to its end
            try:
                packet, sender = packets.recvfrom(MAX_PACKET_BYTES)
                quiet = False
            except TimeoutError:
                quiet = True
                continue
            if sender[2] == socket.PACKET_OUTGOING or sender[1] != ETH_P_IP:  # on loopback each packet comes twice
                continue
            if record := _segment(packet[14:]):
                file.write(record)
        seen, lost = struct.unpack("II", packets.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    print(f"{seen} packets, {lost} lost", flush=True)


def _segment(packet: bytes) -> bytes:
    """Of an IPv4 packet, the record; nothing where it carries no TCP."""
    head = (packet[0] & 15) * 4
    if packet[9] != socket.IPPROTO_TCP:
        return b""
    # Segments that are put together by the interface may have no total length: then it is what there is.
    whole = int.from_bytes(packet[2:4], "big") or len(packet)
    sender, receiver, number = struct.unpack_from("!HHI", packet, head)
    payload = packet[head + (packet[head + 12] >> 4) * 4 : whole]
    return _HEAD.pack(sender, receiver, number, packet[head + 13], len(payload)) + payload


def _records(data: bytes) -> Iterator[tuple[Way, int, int, bytes]]:
    at = 0
    while at < len(data):
        sender, receiver, number, flags, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        yield Way(sender, receiver), number, flags, data[at : at + size]
        at += size


def read(path: Path) -> dict[Way, bytes]:
    """What went each way of each connection. AssertionError where a part of one was not seen."""
    first: dict[Way, int] = {}
    parts: dict[Way, dict[int, bytes]] = {}
    for way, number, flags, payload in _records(path.read_bytes()):
        if flags & SYN:
            assert first.setdefault(way, number + 1) == number + 1, f"{way}: ports that were used twice"
        elif payload:
            place = (number - first[way]) % 2**32  # KeyError: begun before the capture
            of_way = parts.setdefault(way, {})
            if len(payload) > len(of_way.get(place, b"")):  # sent again
                of_way[place] = payload
    return {way: _joined(way, of_way) for way, of_way in parts.items()}


def _joined(way: Way, parts: dict[int, bytes]) -> bytes:
    whole = bytearray()
    for place, payload in sorted(parts.items()):
        assert place <= len(whole), f"{way}: bytes {len(whole)} to {place} were not seen"
        whole[place : place + len(payload)] = payload
    return bytes(whole)


if __name__ == "__main__":
    main(*sys.argv[1:])
