# SPDX-License-Identifier: Apache-2.0
"""The preload library's client against one that lies, and the start of a program with the library in it."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from programs import PAGE, program

from postcopy import _native
from postcopy._fd import FdHolder
from postcopy.cli.run import run as run_command
from postcopy.errors import BusyError, ConfigurationError, MigrationError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines import _peer
from postcopy.machines._maps import Area
from postcopy.machines.preload import client, start
from postcopy.machines.preload.client import Preload, process_at
from postcopy.uffd import RegisterMode, UffdFeature

MAGIC = 0x52504350
LIST, ARM, TAKE, DISARM = range(1, 5)


def reply(
    op: int, *, magic: int = MAGIC, version: int = 1, error: int = 0, step: int = 0, count: int = 0, features: int = 0
) -> bytes:
    return client._REPLY.pack(magic, version, op, error, step, 0, count, 0, 0, features)


def mapping(fd: int, size: int = PAGE, **other: Any) -> bytes:
    status = os.fstat(fd)
    told: dict[str, Any] = {
        "address": 0x10000, "size": size, "offset": 0, "device": status.st_dev, "inode": status.st_ino, "page": PAGE,
    } | other  # fmt: skip
    return client._MAPPING.pack(*told.values(), b"name\n")


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Callable[..., Preload]]:
    """``liar(answer, *descriptors)``: a library that answers so, once for each connection."""
    path = str(tmp_path / "liar.sock")
    stack = contextlib.ExitStack()

    def make(answer: bytes | None, *descriptors: int) -> Preload:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    if answer is not None:
                        socket.send_fds(connection, [answer], list(descriptors))
                    connection.recv(1)  # until it is closed

        thread = threading.Thread(target=serve)
        thread.start()
        stack.callback(thread.join)
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        return Preload(os.getpid(), path)

    with stack:
        yield make


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, PAGE)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # of the listing


@pytest.mark.parametrize(
    "answer",
    [
        b"x",
        reply(LIST, magic=1),
        reply(ARM),
        reply(LIST, count=1),
        reply(LIST, count=129) + bytes(129 * 256),
        reply(LIST, count=1) + bytes(256),
        reply(LIST) + bytes(256),
        bytes(100_000),
    ],
    ids=range(8),
)
async def test_an_answer_that_makes_no_sense(liar: Callable[..., Preload], answer: bytes) -> None:
    with pytest.raises(ProtocolError):
        await liar(answer).mappings()


@pytest.mark.parametrize(
    "lie",
    [{"address": 0x10000}, {"inode": 1}, {"device": 1}, {"page": 0}, {"page": 2 << 20}, {"address": 1}, {"size": 0}],
    ids=str,
)
async def test_a_mapping_that_the_kernel_does_not_confirm(
    liar: Callable[..., Preload], memory: int, lie: dict[str, int]
) -> None:
    with pytest.raises(ProtocolError, match=r"name\?"):
        await liar(reply(LIST, count=1) + mapping(memory, **lie), memory).mappings()


@pytest.mark.parametrize(
    ("areas", "mapped"),
    [
        ([(0x10, 0x30, 0, 7)], True),
        ([(0x10, 0x20, 0, 7), (0x20, 0x30, 0x10, 7), (0x30, 0x40, 0, 8)], True),  # cut in two; another one behind it
        ([(0x0, 0x40, 0, 7)], False),
        ([(0x10, 0x20, 0, 7)], False),
        ([(0x10, 0x20, 0, 7), (0x28, 0x30, 0x18, 7)], False),
        ([(0x10, 0x20, 0, 7), (0x20, 0x30, 0x10, 8)], False),
        ([(0x10, 0x20, 0, 7), (0x20, 0x30, 0, 7)], False),
        ([], False),
    ],
)
def test_what_counts_as_mapped(memory: int, areas: list[tuple[int, int, int, int]], mapped: bool) -> None:
    with FdHolder.duplicate(memory) as fd:
        told = client.Mapping(0x10, 0x20, 0, PAGE, 1, 7, "name", fd)
        seen = [Area(start, end, "rw-s", offset, 1, inode) for start, end, offset, inode in areas]
        assert client._is_mapped(told, seen) is mapped


async def test_a_descriptor_that_is_no_memory(liar: Callable[..., Preload]) -> None:
    with FdHolder(os.open("/proc/self/status", os.O_RDONLY)) as file:
        answer = reply(LIST, count=1) + mapping(file.fd)
        with pytest.raises(ProtocolError, match="no file in memory"):
            await liar(answer, file.fd).mappings()


async def test_a_descriptor_that_is_no_userfaultfd(liar: Callable[..., Preload], memory: int) -> None:
    with pytest.raises(ProtocolError):
        await liar(reply(TAKE), memory).take()


async def test_more_descriptors_than_belong_to_the_answer(liar: Callable[..., Preload], memory: int) -> None:
    with pytest.raises(ProtocolError):
        await liar(reply(LIST), memory, memory).mappings()


@pytest.mark.parametrize(
    ("error", "step", "expected", "text"),
    [
        (71, 1, PostcopyError, "Protocol error"),
        (13, 2, ResourceError, "its own user and root"),
        (2, 3, MigrationError, "not there any more"),
        (16, 4, BusyError, "another migration"),
        (1, 5, ResourceError, "no userfaultfd that stops faults raised inside the kernel"),
        (22, 6, ResourceError, "EVENT_REMOVE"),
        (16, 7, BusyError, "another userfaultfd"),
        (16, 8, BusyError, "may not all be there"),
        (5, 99, PostcopyError, "Input/output"),
    ],
)
async def test_what_is_refused_has_a_name(
    liar: Callable[..., Preload], error: int, step: int, expected: type[Exception], text: str
) -> None:
    with pytest.raises(expected, match=text):
        await liar(reply(ARM, error=error, step=step)).arm(
            (), features=UffdFeature.EVENT_REMOVE, mode=RegisterMode.MISSING, keep=True
        )


async def test_one_of_another_version(liar: Callable[..., Preload]) -> None:
    with pytest.raises(ResourceError, match="another version"):
        await liar(reply(LIST, version=2)).mappings()


async def test_one_that_says_nothing(liar: Callable[..., Preload], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT_S", 0.1)
    with pytest.raises(MigrationError, match="has not answered within"):
        await liar(None).mappings()


async def test_it_waits_while_too_many_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "full.sock")
    refused, stack = threading.Event(), contextlib.ExitStack()

    def connected(connection: socket.socket, path: str) -> bool:
        if not (done := _peer.connected(connection, path)):
            refused.set()
        return done

    def serve(listener: socket.socket) -> None:
        assert refused.wait(30)
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    if connection.recv(4096):  # the others have closed theirs
                        connection.send(reply(LIST))
                        return

    monkeypatch.setattr(client, "connected", connected)
    with stack, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(1)
        with contextlib.suppress(BlockingIOError):
            while True:
                other = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                other.setblocking(False)
                other.connect(path)
        stack.close()
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        assert await Preload(os.getpid(), path).mappings() == []
        thread.join()


async def test_a_path_that_is_no_librarys(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as monitor:
        monitor.bind(str(tmp_path / "qmp"))
        monitor.listen()
        for name, why in (("qmp", "another program's socket"), ("x" * 120, "at most 107 bytes"), ("none", "mapped no")):
            with pytest.raises(PostcopyError, match=why):
                await process_at(str(tmp_path / name))


async def test_a_socket_that_another_process_has(liar: Callable[..., Preload]) -> None:
    path = liar(reply(LIST)).path
    with pytest.raises(MigrationError, match="not of process 1"):
        await Preload.of_process(1, path)


@pytest.mark.needs("uffd")
async def test_it_is_found_by_the_process(tmp_path: Path) -> None:
    with program(tmp_path, "a") as one:
        found = await Preload.of_process(one.pid)
        assert found.path == one.socket
        process = await process_at(one.socket)
        process.pidfd.close()
        assert process.pid == one.pid
    with pytest.raises(MigrationError, match="has ended"):
        await Preload.of_process(one.pid)
    with pytest.raises(ResourceError, match="was not started by `postcopy run`"):
        await Preload.of_process(os.getpid())


@contextlib.contextmanager
def in_huge_blocks(directory: Path, socket: str) -> Iterator[tuple[int, str]]:
    """A program that has mapped a file on a tmpfs mounted with huge=, and what it says of its blocks, if anything."""
    code = (
        "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 1 << 21);"
        " m = mmap.mmap(fd, 1 << 21); print(os.fstat(fd).st_blksize, flush=True); sys.stdin.read()"
    )
    mount = 'mount -t tmpfs -o huge=always none "$0" && exec "$@"'
    with start.environment(socket) as variables:
        process = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", mount, directory, sys.executable, "-I", "-c", code, directory / "file"],
            env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    with process:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().strip()
        process.kill()


@pytest.mark.needs("uffd", "root")
async def test_files_of_huge_blocks_have_pages_all_the_same(tmp_path: Path, tmp_path_factory: Any) -> None:
    socket = str(tmp_path / "s")
    with in_huge_blocks(tmp_path_factory.mktemp("mount"), socket) as (pid, said):
        if not said:
            pytest.skip("no tmpfs can be mounted with huge=always")
        assert int(said) == 1 << 21
        (mapping,) = await Preload(pid, socket).mappings()
        mapping.fd.close()
        assert mapping.page_bytes == PAGE


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("second", ["mmap.PROT_READ", "mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE"])
def test_memory_that_was_mapped_once_more_before(tmp_path: Path, second: str) -> None:
    """The library does not know a mapping that cannot be written to, and what is missing would be zeros there."""
    prot, _, flags = second.partition(", ")
    code = (
        f"import mmap, os, sys; fd = os.memfd_create('a'); os.ftruncate(fd, {PAGE});"
        f" b = mmap.mmap(fd, {PAGE}, flags={flags or 'mmap.MAP_SHARED'}, prot={prot});"
        f" a = mmap.mmap(fd, {PAGE}); print(flush=True); sys.stdin.read()"
    )
    socket = str(tmp_path / "s")

    async def arm(library: Preload) -> None:
        mappings = await library.mappings()
        try:
            await library.arm(mappings, features=0, mode=RegisterMode.MISSING, keep=False)
        finally:
            for mapping in mappings:
                mapping.fd.close()

    with start.environment(socket) as variables:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", code], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConfigurationError, match=r"a second time, at 0x.*it must map it once"):
            trio.run(arm, Preload(process.pid, socket))
        process.kill()


# ---- postcopy run


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "postcopy", "run", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **variables}, stdin=subprocess.DEVNULL
    )


@pytest.mark.needs("uffd")
def test_run_becomes_the_program(tmp_path: Path) -> None:
    """With its status, and what it was given; a program that it becomes then has the library too, its children not."""
    script = (
        "import mmap, os; fd = os.memfd_create('a'); os.ftruncate(fd, 4096); m = mmap.mmap(fd, 4096);"
        " print(os.path.exists(os.environ['POSTCOPY_PRELOAD']), flush=True);"
        " os.system('echo [$LD_PRELOAD]'); raise SystemExit(7)"
    )
    done = run(
        "--socket", str(tmp_path / "s"), "--", "sh", "-c", 'exec "$0" -I -c "$1"', sys.executable, script,
        LD_PRELOAD="libm.so.6",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.split() == ["True", "[libm.so.6]"]
    assert not (tmp_path / "s").exists()


@pytest.mark.needs("uffd")
def test_a_program_that_cannot_be_run(tmp_path: Path) -> None:
    done = run("--socket", str(tmp_path / "s"), "--", "no-such-program")
    assert done.returncode == 2
    assert done.stderr == "postcopy: error: cannot run no-such-program: No such file or directory\n"
    with pytest.raises(ConfigurationError, match="name a program"):
        run_command(argparse.Namespace(command_line=["--"], twin=None))


def test_the_command_of_a_twin(capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        deadline = time.monotonic() + 60.0
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.01)  # the kernel shows it a moment after exec
        assert run_command(argparse.Namespace(command_line=[], lazy=False, socket=None, twin=process.pid)) == 0
        process.kill()
    assert capsys.readouterr().out == "postcopy run -- sleep 60 -incoming defer -S\n"
    with pytest.raises(ConfigurationError, match="--twin runs nothing"):
        run_command(argparse.Namespace(command_line=["--", "true"], lazy=False, socket=None, twin=1))


@pytest.mark.needs("uffd")
def test_a_path_that_cannot_be_its_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with program(tmp_path, "a") as one:
        for path, text in (
            (tmp_path / ("x" * 120), "at most 107 bytes"),
            (tmp_path / "file", "not a socket"),
            (tmp_path / "none" / "s", "none"),
            (one.socket, "has this socket"),
        ):
            with pytest.raises(PostcopyError, match=text), start.environment(str(path)):
                pass
        one.process.kill()
        one.process.wait()
        assert os.path.exists(one.socket)
        with program(tmp_path, "a") as next_one:  # it was left behind
            assert next_one.socket == one.socket
            trio.run(process_at, next_one.socket).pidfd.close()


def test_run_needs_a_userfaultfd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = ResourceError("no userfaultfd", "use root")
    monkeypatch.setattr(start, "explain_unavailable", lambda: error)
    with pytest.raises(ResourceError, match="use root"), start.environment(str(tmp_path / "s")):
        pass


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert os.access(start.library(), os.R_OK)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "x.so"))
    with pytest.raises(ResourceError, match="install postcopy again"):
        start.library()


def test_the_default_socket_is_in_a_directory_of_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="this user alone"):
        start._default_path()
