# SPDX-License-Identifier: Apache-2.0
"""Names, kinds of descriptors, and the store of a process that has no keeper."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio

from postcopy.errors import ConfigurationError
from postcopy.handler._keeper import open_store
from postcopy.handler._store import MAX_NAME_BYTES, check_name, is_listening, kind_of


@pytest.mark.parametrize("name", ["a", "pager.1", "postcopy-pager@x.socket", r"a\x2db", "a+b", "n" * MAX_NAME_BYTES])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\n", "a\0", "ä", "n" * (MAX_NAME_BYTES + 1)])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        check_name(name)


def test_kinds(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as sock:
        listener.bind(str(tmp_path / "a"))
        listener.listen()
        fds = [os.memfd_create("postcopy-states"), os.pidfd_open(os.getpid()), os.eventfd(0)]
        fds.append(os.open(tmp_path, os.O_RDONLY))
        try:
            kinds = [kind_of(fd) for fd in (listener.fileno(), sock.fileno(), *fds)]
        finally:
            for fd in fds:
                os.close(fd)
    assert kinds == ["listener", "socket", "memfd:postcopy-states", "pidfd", "eventfd", str(tmp_path)]
    assert not is_listening(0)


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


async def test_without_a_keeper(tmp_path: Path) -> None:
    with _listener(tmp_path / "a") as one, _listener(tmp_path / "b") as two, trio.fail_after(60):
        async with open_store() as store:
            await store.put("one", [one.fileno()])
            await store.put("two", [two.fileno()])
            for path, name in (("a", "one.1"), ("b", "two.2"), ("a", "one.3")):
                async with await trio.open_unix_socket(tmp_path / path) as client:
                    found, fd = await store.accept()
                    await store.put(found, [fd])
                    with socket.socket(fileno=fd) as sock:
                        sock.send(b"x")
                    assert (found, await client.receive_some(1)) == (name, b"x")
            await store.ready()
            await store.drop("two")
            await store.drop("nobody")
            assert (store.taken, store.deaths, store.reason, store.leave.is_set()) == ({}, 0, "", False)
            assert store.status()["store"] == "none"
            with pytest.raises(ConfigurationError, match="has no keeper"):
                await store.upgrade(["/bin/true"])
            # Nobody takes these any more: they are closed with the store.
            left = [await trio.open_unix_socket(tmp_path / "a") for _ in range(3)]
            await trio.testing.wait_all_tasks_blocked()
        assert await left[0].receive_some(1) == b""
        for client in left:
            await client.aclose()
        assert one.fileno() >= 0


async def test_what_the_block_raises_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with open_store():
            raise KeyError
