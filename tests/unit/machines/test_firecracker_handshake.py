# SPDX-License-Identifier: Apache-2.0
"""What comes on the socket of a page fault handler: each generation of Firecracker's message, and whatever else."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from postcopy import Memory, Userfaultfd
from postcopy._native import lib
from postcopy.errors import ConnectionLost, PeerError, PostcopyError, ProtocolError
from postcopy.machines.firecracker import handshake
from postcopy.machines.firecracker.handshake import (
    MAX_MESSAGE_BYTES,
    MAX_REGIONS,
    Handshake,
    Region,
    check_regions,
    consume_handshake,
    peer_credentials,
    receive_handshake,
)
from postcopy.uffd import How, RegisterMode, UffdFeature

PAGE = int(lib.pc_page_bytes())
PAGES = 64
IN_TIME_S = 20.0


class Peer:
    """The VMM's end of a connection, and memory that it may tell of."""

    def __init__(self, kind: str = "anon", size_bytes: int = PAGES * PAGE) -> None:
        self.memory = Memory.create(kind, size_bytes)
        self.address = self.memory.address
        self.uffd = Userfaultfd.open(How.ANY, UffdFeature.EVENT_REMOVE)
        self.uffd.register(self.address, size_bytes, RegisterMode.MISSING)
        ours, theirs = socket.socketpair()
        self.socket, self.connection = theirs, trio.socket.from_stdlib_socket(ours)

    def region(self, **fields: Any) -> dict[str, Any]:
        return {"base_host_virt_addr": self.address, "size": PAGES * PAGE, "offset": 0, **fields}

    def send(self, message: object, *fds: int) -> None:
        text = message if isinstance(message, bytes) else json.dumps(message).encode()
        socket.send_fds(self.socket, [text], fds)

    def close(self) -> None:
        self.uffd.close(abandon=True)
        self.memory.close()
        self.socket.close()
        self.connection.close()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"page_size_kib": 4096},
        {"page_size": 4096, "page_size_kib": 4096},
        {"page_size": 2 << 20},  # said, not mapped
        {"page_size": 4096, "guest_phys_addr": 0, "name": {"of": ["any", None]}},
    ],
)
async def test_each_generation_is_understood(peer: Peer, fields: dict[str, Any]) -> None:
    peer.send([peer.region(**fields)], peer.uffd.fileno())
    for _ in range(2):  # it stays for another process
        (await receive_handshake(peer.connection, IN_TIME_S, peek=True)).close()
    with await receive_handshake(peer.connection, IN_TIME_S) as received:
        assert received.regions == (Region(peer.address, PAGES * PAGE, 0, PAGE),)
        assert received.features == UffdFeature.EVENT_REMOVE
        assert received.memory_bytes == PAGES * PAGE
        assert received.uffd != peer.uffd.fileno()
        assert not os.get_inheritable(received.uffd)


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("peek", [False, True])
async def test_a_message_in_parts_is_put_together(peer: Peer, peek: bool) -> None:
    text = json.dumps([peer.region(page_size=4096)]).encode()
    received: list[Handshake] = []

    async def receive() -> None:
        received.append(await receive_handshake(peer.connection, IN_TIME_S, peek=peek))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        socket.send_fds(peer.socket, [text[:1]], [peer.uffd.fileno()])
        for at in range(1, len(text)):
            if not peek:
                await trio.testing.wait_all_tasks_blocked()
            peer.socket.send(text[at : at + 1])
    assert received[0].regions[0].address == peer.address
    received[0].close()
    before = open_descriptors()
    consume_handshake(peer.connection)
    assert open_descriptors() == before
    with pytest.raises(PeerError, match="no handshake"):
        await receive_handshake(peer.connection, 0.01)


@pytest.mark.needs("uffd")
async def test_the_second_region_may_lie_below_the_first(peer: Peer) -> None:
    half = PAGES // 2 * PAGE
    first = peer.region(base_host_virt_addr=peer.address + half, size=half)
    second = peer.region(size=half, offset=half)
    peer.send([second, first], peer.uffd.fileno())
    with await receive_handshake(peer.connection, IN_TIME_S) as received:
        assert [(region.address, region.offset) for region in received.regions] == [
            (peer.address + half, 0),
            (peer.address, half),
        ]


@pytest.mark.needs("uffd", "hugetlb")
async def test_huge_pages_are_found_whatever_is_said() -> None:
    peer = Peer("hugetlb", 4 << 20)
    try:
        peer.send([peer.region(size=4 << 20, page_size=4096)], peer.uffd.fileno())
        with await receive_handshake(peer.connection, IN_TIME_S) as received:
            assert received.regions[0].page_bytes == 2 << 20
    finally:
        peer.close()


def _wrong(peer: Peer) -> dict[str, tuple[Any, str]]:
    base, size = peer.address, PAGES * PAGE
    overlapping = [peer.region(), peer.region(offset=size)]
    return {
        "no region": ([], "0 regions"),
        "many regions": ([peer.region()] * (MAX_REGIONS + 1), f"{MAX_REGIONS + 1} regions"),
        "size 0": ([peer.region(size=0)], "impossible numbers"),
        "negative": ([peer.region(offset=-PAGE)], "impossible numbers"),
        "past the end": ([peer.region(size=1 << 62)], "no process can have"),
        "page size in KiB": ([peer.region(page_size=4)], "page size of 4 bytes"),
        "no whole page": ([peer.region(size=size - 1)], "not whole pages"),
        "offset of no page": ([peer.region(offset=7)], "not whole pages"),
        "overlap in memory": (overlapping, "overlap in memory"),
        "overlap in the file": (
            [peer.region(size=size // 2), peer.region(base_host_virt_addr=base + size // 2, size=size // 2)],
            "overlap in the memory file",
        ),
        "a field is missing": ([{"size": size, "offset": 0}], "base_host_virt_addr"),
        "a field of another type": ([peer.region(size="64")], "Expected"),
        "a number too large": ([peer.region(size=1 << 70)], "handshake"),
        "an object": (peer.region(), "Expected"),
        "nothing mapped": ([peer.region(base_host_virt_addr=PAGE)], "no memory at"),
        "more than is mapped": ([peer.region(size=1 << 40)], "no memory at"),
        "no JSON": (b"hello there", "not the JSON"),
        "more than one": (b"[] []", "not the JSON"),
        "no UTF-8": (b'[{"\xff": 1}]', "handshake"),
        "nested deep": (b'[{"new": ' + 4000 * b"[", "nested too deep"),
    }


WRONG = (
    "no region", "many regions", "size 0", "negative", "past the end", "page size in KiB", "no whole page",
    "offset of no page", "overlap in memory", "overlap in the file", "a field is missing", "a field of another type",
    "a number too large", "an object", "nothing mapped", "more than is mapped", "no JSON", "more than one", "no UTF-8",
    "nested deep",
)  # fmt: skip


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_is_refused_by_name(peer: Peer, what: str) -> None:
    message, words = _wrong(peer)[what]
    before = open_descriptors()
    peer.send(message, peer.uffd.fileno())
    with pytest.raises(ProtocolError, match=words):
        await receive_handshake(peer.connection, IN_TIME_S)
    assert open_descriptors() == before


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("count", [0, 2, 40])
async def test_the_descriptors_are_counted(peer: Peer, count: int) -> None:
    before = open_descriptors()
    peer.send([peer.region()], *[peer.uffd.fileno()] * count)
    with pytest.raises(ProtocolError, match="descriptors came with the handshake"):
        await receive_handshake(peer.connection, IN_TIME_S)
    assert open_descriptors() == before


@pytest.mark.needs("uffd")
async def test_any_other_descriptor_is_refused(peer: Peer) -> None:
    before = open_descriptors()
    peer.send([peer.region()], peer.socket.fileno())
    with pytest.raises(ProtocolError, match="not a userfaultfd"):
        await receive_handshake(peer.connection, IN_TIME_S)
    assert open_descriptors() == before


@pytest.mark.needs("uffd")
async def test_a_connection_that_is_closed_and_one_that_says_nothing(peer: Peer) -> None:
    with pytest.raises(PeerError, match=r"no handshake has come within 0\.01 s"):
        await receive_handshake(peer.connection, 0.01)
    peer.send(b"[")
    with pytest.raises(PeerError, match="no handshake has come"):
        await receive_handshake(peer.connection, 0.01)
    peer.socket.close()
    with pytest.raises(ConnectionLost, match="closed before the handshake"):
        await receive_handshake(peer.connection, IN_TIME_S)


@pytest.mark.needs("uffd")
async def test_a_message_without_an_end_is_bounded(peer: Peer) -> None:
    before = open_descriptors()

    async def send() -> None:
        with trio.socket.from_stdlib_socket(peer.socket.dup()) as stream, contextlib.suppress(OSError):
            while True:
                await stream.send(b"[" * 4096)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        with pytest.raises(ProtocolError, match="handshake"):
            await receive_handshake(peer.connection, IN_TIME_S)
        peer.connection.close()
    assert open_descriptors() == before - 1
    assert MAX_MESSAGE_BYTES < 1 << 20


async def test_who_connects_is_told_by_the_kernel() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_credentials(ours) == (os.getpid(), os.getuid(), os.getgid())


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_named_error(data: bytes) -> None:
    with contextlib.suppress(PostcopyError):
        handshake._decode(data)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8), st.integers(0, 40)), max_size=5))
def test_regions_that_are_taken_never_overlap(drawn: list[tuple[int, int, int]]) -> None:
    regions = [Region(address * PAGE, size * PAGE, offset * PAGE, PAGE) for address, size, offset in drawn]

    def disjoint(starts: list[tuple[int, int]]) -> bool:
        pages = [page for start, size in starts for page in range(start, start + size)]
        return len(pages) == len(set(pages))

    wanted = disjoint([(address, size) for address, size, _ in drawn]) and disjoint(
        [(offset, size) for _, size, offset in drawn]
    )
    try:
        taken = check_regions(regions)
    except ProtocolError:
        assert not wanted
    else:
        assert wanted
        assert sorted(taken, key=lambda region: region.offset) == list(taken)
