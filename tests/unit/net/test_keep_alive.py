# SPDX-License-Identifier: Apache-2.0
"""What the kernel ends by itself, and what it must not."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Iterator

import pytest
import trio

from postcopy import net as c
from postcopy import wire as p
from postcopy._fd import FdHolder
from postcopy.errors import ResourceError
from postcopy.net import calling, connecting


@pytest.fixture
def pair() -> Iterator[tuple[FdHolder, FdHolder]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there = listener.accept()[0]
    fds = FdHolder(here.detach()), FdHolder(there.detach())
    yield fds
    for fd in fds:
        fd.close()


def test_dead_data_connections_are_ended_by_the_kernel(pair: tuple[FdHolder, FdHolder]) -> None:
    c.keep_alive(pair[0], 3.0)
    with socket.socket(fileno=os.dup(pair[0].fd)) as handle:
        for option, value in (("KEEPIDLE", 1), ("KEEPINTVL", 1), ("KEEPCNT", 2), ("USER_TIMEOUT", 3000)):
            assert handle.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}")) == value
        assert handle.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_trouble_of_our_own_is_said() -> None:
    """A descriptor that somebody has closed is no lost connection, and no reason to do without."""
    here, there = socket.socketpair()
    fd = FdHolder(here.detach())
    c.keep_alive(fd, 1.0)  # which has no such options: nothing to be watched over
    os.close(fd.fd)
    with pytest.raises(OSError) as caught:
        c.keep_alive(fd, 1.0)
    assert caught.value.errno == errno.EBADF
    fd.detach()
    there.close()


async def test_no_descriptors_left() -> None:
    """It is this host that has none: the other one is not blamed for it, and one that is lost is looked for on."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = c.Address("127.0.0.1", listener.socket.getsockname()[1])
    reconnector = calling.CallingReconnector(
        c.Route(address), "dest", c.Session(b"m" * 16, b"t" * 16, 0), p.PROTOCOL_VERSION
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 64), hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        with pytest.raises(ResourceError, match=r"cannot connect to 127.0.0.1:.*Too many open files.*ulimit"):
            await connecting.Caller().connect(address, p.Hello("control", "dest", 0, b"", 0))
        with trio.move_on_after(0.2) as scope:
            await reconnector.next_link()
        assert scope.cancelled_caught
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await listener.aclose()
