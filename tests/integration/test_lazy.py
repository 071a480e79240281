# SPDX-License-Identifier: Apache-2.0
"""Attaching to real processes, and the examples as a reader would run them."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import postcopy
from postcopy.errors import ConfigurationError, PeerError
from postcopy.lazy import blocking
from postcopy.memory import page_bytes_of

PAGE = page_bytes_of("memfd")
EXAMPLES = Path(__file__).parents[2] / "examples"
DEADLINE_S = 60.0


def image_content(pages: int) -> bytes:
    source = random.Random(11)
    return b"".join(source.randbytes(PAGE) if page % 4 else bytes(PAGE) for page in range(pages)) + b"the end"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(image_content(1000))
    return path


def source_of(side: Callable[..., Any], image: Path, *more: str) -> Any:
    return side("source", "--machine", "image", "--image", image, "--listen", "127.0.0.1:0", "--json", *more)


def attach_and_read(address: str) -> int:
    """In a child."""
    warnings.simplefilter("error")
    content = image_content(1000)

    async def main() -> int:
        with trio.fail_after(DEADLINE_S - 5):
            async with postcopy.attach(address) as memory:
                assert memory.size_bytes == len(content)
                assert await memory.read(len(content) - 7) == b"the end"
                requests = memory.statistics().requests
                assert requests == 1
                assert await memory.read() == content
                await memory.wait_complete()
                return memory.statistics().requests

    return trio.run(main)


def attach_and_lose(address: str, pid: int) -> str:
    """In a child: the source is killed."""
    warnings.simplefilter("error")
    content = image_content(1000)
    with blocking.attach(address, recover_for_s=1) as memory:
        assert memory.read(5 * PAGE, 10) == content[5 * PAGE : 5 * PAGE + 10]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerError) as caught:
            memory.ensure()
        assert memory.read(5 * PAGE, 10) == content[5 * PAGE : 5 * PAGE + 10]
        assert memory.failure is not None
    return str(caught.value)


@pytest.mark.needs("uffd")
def test_an_image_is_attached(side: Callable[..., Any], run_in_child: Callable[..., Any], image: Path) -> None:
    source = source_of(side, image)
    result = run_in_child(attach_and_read, source.address, deadline_s=DEADLINE_S)
    assert result.returncode == 0, result.stderr
    # A quarter of the pages are zero, and known to be: they are not asked for.
    assert 0 < result.value <= 1001
    status, report, _ = source.end()
    assert status == 0
    assert report["status"] == "completed"


@pytest.mark.needs("uffd", "uffd-poison")
def test_a_killed_source_is_an_error(side: Callable[..., Any], run_in_child: Callable[..., Any], image: Path) -> None:
    source = source_of(side, image)
    address = source.address
    result = run_in_child(attach_and_lose, address, source._child.pid, deadline_s=DEADLINE_S)
    assert result.returncode == 0, result.stderr
    assert address in result.value
    assert "lost" in result.value


@pytest.mark.needs("uffd", "kvm")
def test_a_running_machine_cannot_be_attached(side: Callable[..., Any]) -> None:
    source = side("source", "--machine", "kvm", "--memory", "16MiB", "--listen", "127.0.0.1:0", "--json")

    async def main() -> None:
        async with postcopy.attach(source.address):
            pass

    with pytest.raises(ConfigurationError, match=r"'kvm'.*--machine image"):
        trio.run(main)


def blocking_program() -> None:
    """In a child."""
    warnings.simplefilter("error")
    content = image_content(300)
    with blocking.serve(content) as server:
        with blocking.attach(server.address) as memory:
            assert memory.read(4, 2 * PAGE) == content[4 : 4 + 2 * PAGE]
            with memory.resident(PAGE, PAGE) as view:
                assert view == content[PAGE : 2 * PAGE]
            assert memory.prefetch() > 0
            memory.ensure()
            assert memory.read() == content
            assert "image" in repr(memory)
            with pytest.raises(IndexError):
                memory.read(len(content), 1)
        with pytest.raises(trio.ClosedResourceError):
            memory.ensure()
        assert memory.statistics().resident_pages == 301
        with pytest.raises(KeyError, match="mine"), blocking.attach(server.address):
            raise KeyError("mine")
        address = server.address
    with pytest.raises(PeerError, match="refused"), blocking.attach(address):
        pass
    with pytest.raises(ConfigurationError), blocking.serve(b""):
        pass

    class Squares:
        blocks = (postcopy.SourceBlock("squares", 8 * 1000),)

        async def fetch(self, block: int, first_page: int, count: int) -> bytes:
            start = first_page * PAGE // 8
            return b"".join((n * n).to_bytes(8, "little") for n in range(start, min(1000, start + count * PAGE // 8)))

    with blocking.attach_source(Squares()) as memory:
        assert int.from_bytes(memory.read(8 * 999, 8), "little") == 999 * 999


@pytest.mark.needs("uffd")
def test_programs_without_trio(run_in_child: Callable[..., Any]) -> None:
    result = run_in_child(blocking_program, deadline_s=DEADLINE_S)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(
    ("name", "needs", "says"),
    [
        ("attach_numpy.py", "numpy", "verified"),
        ("custom_page_source.py", None, "verified"),
        ("fsspec_page_source.py", "fsspec", "verified"),
    ],
)
def test_examples(run_in_child: Callable[..., Any], name: str, needs: str | None, says: str) -> None:
    if needs is not None:
        pytest.importorskip(needs)
    result = run_in_child([sys.executable, "-W", "error", EXAMPLES / name], deadline_s=DEADLINE_S)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout
