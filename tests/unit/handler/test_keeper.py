# SPDX-License-Identifier: Apache-2.0
"""The keeper as `postcopy pager` has it: engines in Python that die, are replaced, and lose their keeper."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import kept
from kept import kill_all, processes
from postcopy import _native
from postcopy._files import installed_program
from postcopy._native import lib
from postcopy.errors import ResourceError
from postcopy.handler import _keeper

TOY = Path(__file__).with_name("toy_engine.py")
DEADLINE_S = 60.0
"""For what takes a second on a host that is not busy."""


class Toy:
    """A keeper with toy engines."""

    def __init__(self, child: Any, path: Path) -> None:
        self.child = child
        self.path = path

    def ask(self, do: str, *, path: Path | None = None, **arguments: Any) -> dict[str, Any]:
        """What an engine answers, this one or, where it dies meanwhile, the next."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_S)
            self._connect(sock, path or self.path)
            sock.send(json.dumps({"do": do, **arguments}).encode())
            answer: dict[str, Any] = json.loads(sock.recv(65536))
            return answer

    def _connect(self, sock: socket.socket, path: Path) -> None:
        def connects() -> bool:
            return sock.connect_ex(str(path)) == 0

        self.poll(connects, "nobody listens")

    def poll(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, f"{what}\n{self.child.errors() if self.child else ''}"
            time.sleep(0.01)

    def wait_spare(self) -> dict[str, Any]:
        self.poll(lambda: bool(self.ask("tell")["spare"]), "there is no spare engine")
        return self.ask("tell")


@pytest.fixture
def toy(spawn_child: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Toy]]:
    path = tmp_path / "toy.sock"

    def start(*arguments: str) -> Toy:
        return Toy(spawn_child([sys.executable, "-P", str(TOY), str(path), *arguments]), path)

    yield start
    kill_all(str(path))


def private_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kib) for kib in re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE))


def test_another_engine_goes_on(toy: Callable[..., Toy]) -> None:
    here = toy()
    vm = here.ask("put", count=2)
    assert (vm["error"], vm["deaths"], vm["taken"], vm["listeners"]) == ("", 0, {}, [])
    one = here.wait_spare()
    os.kill(one["pid"], signal.SIGKILL)
    two = here.ask("tell")
    assert two["pid"] != one["pid"]
    assert two["deaths"] == 1
    assert two["reason"] == f"engine {one['pid']} was killed by signal 9 (Killed)"
    assert two["taken"] == {vm["name"]: ["memfd:toy-0", "memfd:toy-1", "socket"]}
    keeper = here.child.pid
    assert two["keeper"] == keeper
    assert private_bytes(keeper) < 1 << 20
    assert os.listdir(f"/proc/{keeper}/task") == [str(keeper)]

    # What is refused changes nothing; what is dropped is gone.
    assert "1 to 16 descriptors" in here.ask("put", count=14, name=vm["name"])["error"]
    here.ask("put", count=1, name="other")
    assert here.ask("drop", name=vm["name"])["error"] == ""
    os.kill(here.ask("tell")["pid"], signal.SIGKILL)
    assert here.ask("tell")["taken"] == {"other": ["memfd:toy-0"]}
    os.kill(keeper, signal.SIGTERM)
    assert here.child.wait(DEADLINE_S).returncode == 0


def test_other_listening_sockets(toy: Callable[..., Toy], tmp_path: Path) -> None:
    here, path = toy("--no-spare"), tmp_path / "other.sock"
    assert here.ask("listen", name="images.a", at=str(path))["error"] == ""
    assert here.ask("tell", path=path)["name"] == "images.a.2"
    os.kill(here.ask("tell")["pid"], signal.SIGKILL)
    assert here.ask("tell", path=path)["listeners"] == ["images.a", "pager"]
    here.ask("drop", name="images.a")

    def refused() -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(path)) == errno.ECONNREFUSED

    here.poll(refused, "it still listens")  # the engine's copies are closed too


def test_the_keeper_is_killed(toy: Callable[..., Toy]) -> None:
    """The engine gives everything to another one, and that one has another engine when this one dies."""
    here = toy("--no-spare")
    vm, first = here.ask("put", count=3), here.child.pid

    def replaced(keeper: int) -> int:
        said = here.child.errors().count("the new keeper has all")
        os.kill(keeper, signal.SIGKILL)
        here.poll(lambda: here.child.errors().count("the new keeper has all") > said, "there is no new keeper")
        return int(re.findall(r"process (\d+) is the keeper now", here.child.errors())[-1])

    second = replaced(first)
    here.child.wait(DEADLINE_S)
    assert here.ask("tell")["pid"] == vm["pid"]
    os.kill(vm["pid"], signal.SIGKILL)
    one = here.ask("tell")
    assert (one["deaths"], one["keeper"]) == (1, second)
    assert len(one["taken"][vm["name"]]) == 4
    third = replaced(second)
    assert here.ask("tell")["pid"] == one["pid"]
    os.kill(third, signal.SIGTERM)
    here.poll(lambda: not processes(str(here.path)), "they do not end")


def test_another_version_goes_on(toy: Callable[..., Toy]) -> None:
    here = toy("--no-spare")
    vm = here.ask("put", count=1)
    command = [sys.executable, "-P", str(TOY), str(here.path), "new"]
    assert (
        "no other engine goes on from here (/bin/false): engine" in here.ask("upgrade", command=["/bin/false"])["error"]
    )
    assert here.ask("tell")["pid"] == vm["pid"]
    assert here.ask("upgrade", command=command)["error"] == ""
    here.poll(lambda: here.ask("tell")["arguments"][-1] == "new", "the other one does not serve")
    new = here.ask("tell")
    assert new["taken"] == {vm["name"]: ["memfd:toy-0", "socket"]}
    assert new["deaths"] == 0
    assert new["reason"] == f"engine {vm['pid']} was replaced"
    os.kill(new["pid"], signal.SIGKILL)
    assert (new["trial"], here.ask("tell")["trial"]) == (True, False)


# ---- without a process


def test_a_keeper_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert os.access(installed_program("keeper"), os.X_OK)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.abi3.so"))
    with pytest.raises(ResourceError, match="postcopy-keeper is not there, or cannot be run"):
        installed_program("keeper")


HEAD = struct.Struct("=Ii")


class FakeKeeper:
    """The keeper's end, of a store in this process."""

    def __init__(self) -> None:
        self.theirs, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send(self, kind: int, text: str = "", fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.sock, [HEAD.pack(kind, 0) + text.encode()], fds)

    async def hear(self, kind: int) -> str:
        """The text of the first message of this kind."""
        sock = trio.socket.from_stdlib_socket(self.sock)
        self.sock.setblocking(False)
        while True:
            data = await sock.recv(4096)
            if HEAD.unpack_from(data)[0] == kind:
                return data[HEAD.size :].decode()

    async def answer_puts(self, count: int) -> list[str]:
        """Their names."""
        names: list[str] = []
        sock = trio.socket.from_stdlib_socket(self.sock)
        self.sock.setblocking(False)
        while len(names) < count:
            data, ancillary, _, _ = await sock.recvmsg(4096, socket.CMSG_SPACE(64))
            for _, _, payload in ancillary:
                for (fd,) in struct.iter_unpack("=i", payload):
                    os.close(fd)
            kind, number = HEAD.unpack_from(data)
            if kind == lib.PC_KEEPER_PUT:
                names.append(data[HEAD.size :].decode())
                await sock.send(HEAD.pack(lib.PC_KEEPER_ANSWER, number) + bytes(4))
        return names


async def _store_of(keeper: FakeKeeper, entries: Sequence[tuple[str, socket.socket]] = ()) -> _keeper.KeeperStore:
    store = _keeper.KeeperStore(keeper.theirs, (1, 1), [])
    for name, sock in entries:
        keeper.send(lib.PC_KEEPER_ENTRY, name, [sock.fileno()])
    keeper.send(lib.PC_KEEPER_GO)
    await store.take()
    return store


async def test_what_a_keeper_has_sent_before_it_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, ends = FakeKeeper(), socket.socketpair()
    store = await _store_of(keeper)
    monkeypatch.setattr(store, "_start_keeper", lambda: None)
    keeper.send(lib.PC_KEEPER_ENTRY, "pager.1", [ends[0].fileno()])
    keeper.sock.close()  # with the engine's HELLO unread
    with contextlib.closing(store), ends[0], ends[1], trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            name, fd = await store.accept()
            os.close(fd)
            nursery.cancel_scope.cancel()
    assert name == "pager.1"


async def test_a_new_keeper_knows_all_names_before_it_accepts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second, ends = FakeKeeper(), FakeKeeper(), socket.socketpair()
    with socket.socket(socket.AF_UNIX) as listener, ends[0], ends[1]:
        listener.bind(str(tmp_path / "pager"))
        listener.listen()
        store = await _store_of(first, [("pager", listener), ("pager.1", ends[0])])
        monkeypatch.setattr(store, "_start_keeper", lambda: second.theirs)
        first.sock.close()
        with contextlib.closing(store), second.sock, trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                names = await second.answer_puts(2)
                nursery.cancel_scope.cancel()
    assert names == ["pager.1", "pager"]


@pytest.mark.parametrize("room", [0, 1])
async def test_one_connection_too_many_ends_nothing(room: int) -> None:
    """Too few descriptors for a new connection, or for the copy of it that is for another keeper."""
    keeper, ends = FakeKeeper(), socket.socketpair()
    store = await _store_of(keeper)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.closing(store), keeper.sock, ends[0], ends[1], trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            await trio.testing.wait_all_tasks_blocked()
            os.close(lowest := os.dup(ends[0].fileno()))
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, limits[1]))
            try:
                keeper.send(lib.PC_KEEPER_ENTRY, "pager.1", [ends[0].fileno()])
                said = await keeper.hear(lib.PC_KEEPER_DROP)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            keeper.send(lib.PC_KEEPER_ENTRY, "pager.2", [ends[0].fileno()])
            name, fd = await store.accept()
            os.close(fd)
            nursery.cancel_scope.cancel()
    assert (said, name) == ("pager.1", "pager.2")


async def test_keepers_that_end_at_once(monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock) -> None:
    keeper, starts = FakeKeeper(), 0

    def start() -> socket.socket:
        nonlocal starts
        starts += 1
        assert starts < 10
        another = FakeKeeper()
        another.sock.close()
        return another.theirs

    store = await _store_of(keeper)
    monkeypatch.setattr(store, "_start_keeper", start)
    keeper.sock.close()
    with contextlib.closing(store):
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            for expected in (1, 2, 3):
                await trio.testing.wait_all_tasks_blocked()
                assert starts == expected
                mock_clock.jump(_keeper.RESTART_S)
            nursery.cancel_scope.cancel()


# ---- systemd


class _Systemd:
    """As much of it as there is for one service: a socket, and what FDSTORE=1 has brought."""

    def __init__(self, path: Path) -> None:
        self.environment = {**os.environ, "NOTIFY_SOCKET": str(path / "notify"), "FDSTORE": "100"}
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(path / "notify"))
        self._notify.setblocking(False)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path / "toy.sock"))
        self.listener.listen()
        self.stored: list[tuple[str, int]] = []

    def hear(self) -> None:
        """All that has been said."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds, _, _ = socket.recv_fds(self._notify, 4096, 16)
                said = dict(line.split("=", 1) for line in data.decode().splitlines())
                if said.get("FDSTORE") == "1":
                    assert said["FDPOLL"] == "0"
                    self.stored += [(said["FDNAME"], fd) for fd in fds]
                elif said.get("FDSTOREREMOVE") == "1":
                    for name, fd in self.stored:
                        if name == said["FDNAME"]:
                            os.close(fd)
                    self.stored = [one for one in self.stored if one[0] != said["FDNAME"]]

    def close(self) -> None:
        self._notify.close()
        self.listener.close()
        for _, fd in self.stored:
            os.close(fd)

    def start(self, marker: str) -> subprocess.Popen[bytes]:
        passed = [("pager.socket", self.listener.fileno()), *self.stored]
        fds, names = [fd for _, fd in passed], ":".join(name for name, _ in passed)
        command = [
            installed_program("keeper"),
            "--no-spare",
            "--",
            sys.executable,
            "-P",
            str(TOY),
            marker,
            "--no-spare",
        ]
        program = f"import sys; sys.path.insert(0, {str(Path(kept.__file__).parent)!r}); import kept; "
        program += f"kept.become({fds}, {names!r}, {command})"
        return subprocess.Popen([sys.executable, "-S", "-c", program], pass_fds=fds, env=self.environment)


def test_systemd_has_everything_when_the_keeper_is_killed(tmp_path: Path) -> None:
    systemd, path = _Systemd(tmp_path), tmp_path / "toy.sock"
    main = systemd.start(str(path))
    try:
        here = Toy(None, path)
        vm = here.ask("put", count=2)
        assert vm["listeners"] == ["pager.socket"]
        assert vm["store"] == "keeper and systemd"
        for signum, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
            main.send_signal(signum)
            assert main.wait(DEADLINE_S) == status
            kill_all(str(path))  # all that is left in the unit's control group
            systemd.hear()
            assert [name for name, _ in systemd.stored] == [vm["name"]] * 3
            main = systemd.start(str(path))
            again = here.ask("tell")
            assert again["taken"] == {vm["name"]: ["memfd:toy-0", "memfd:toy-1", "socket"]}
            assert again["keeper"] == main.pid
        here.ask("drop", name=vm["name"])
        systemd.hear()
        assert vm["name"] not in dict(systemd.stored)
    finally:
        kill_all(str(path))
        main.wait(DEADLINE_S)
        systemd.close()
