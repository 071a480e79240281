# SPDX-License-Identifier: Apache-2.0
"""An attachment of which no page is touched costs nothing, and stays."""

from __future__ import annotations

import os
import socket
from functools import partial

import pytest
import trio

import postcopy
from postcopy._fd import FdHolder
from postcopy.lazy import Server
from postcopy.migration.connection import data_silence_s
from postcopy.net import keep_alive

HEARTBEAT_S = 0.5  # a busy host must not be taken for one that is silent, which is three of them
HEARTBEATS = 10  # a reader that does not read was taken for a dead one after four
SIZE = 8 << 20


@pytest.mark.slow
async def test_an_idle_attachment_lives_for_ever() -> None:
    """Much longer than a connection may be silent, with more to push than sockets take: not once is it cut. What
    was wanted meanwhile has come, and nothing else."""
    content = os.urandom(SIZE)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(partial(postcopy.serve, content, heartbeat_s=HEARTBEAT_S))
            async with postcopy.attach(server.address, heartbeat_s=HEARTBEAT_S) as memory:
                (migration,) = server._migrations
                for _ in range(HEARTBEATS):
                    await trio.sleep(HEARTBEAT_S)
                    assert migration.status == "postcopy-active"
                    assert migration.recoveries.count == 0
                assert memory.failure is None
                assert memory.statistics().background_pages == 0
                assert await memory.read(SIZE - 9, 9) == content[-9:]
                assert memory.statistics().resident_pages < 10
                statistics = migration.statistics()
                assert statistics is not None
                assert statistics.background_pages == 0
            nursery.cancel_scope.cancel()


async def test_background_brings_all_of_it() -> None:
    content = os.urandom(SIZE)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(partial(postcopy.serve, content, heartbeat_s=HEARTBEAT_S))
            async with postcopy.attach(server.address, background=True, heartbeat_s=HEARTBEAT_S) as memory:
                await memory.ensure()
                assert await memory.read() == content
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("kind", "outlives"), [("urgent", False), ("bulk", True)])
@pytest.mark.slow
async def test_a_slow_reader_of_what_is_pushed_is_waited_for(kind: str, outlives: bool) -> None:
    """The kernel counts the time in which nothing is read as silence: pages that are pushed have more of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    with there, here:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with FdHolder(os.dup(here.fileno())) as fd:
            keep_alive(fd, data_silence_s(kind, 0.1))
        here.setblocking(False)
        written = trio.current_time()
        broken = False
        while trio.current_time() - written < 2 and not broken:
            try:
                here.send(bytes(65536))
            except BlockingIOError:
                await trio.sleep(0.05)
            except OSError:
                broken = True
        assert broken is not outlives
