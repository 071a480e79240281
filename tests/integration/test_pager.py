# SPDX-License-Identifier: Apache-2.0
"""`postcopy pager` as a user starts it, with a process that is a VMM: its keeper, an upgrade, deaths, its ends."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from lines import Json
from vmm import PAGE, start_vmm

import kept
import postcopy
from postcopy.service.client import ControlClient
from postcopy.service.schema import ControlError

pytestmark = pytest.mark.needs("uffd")

PAGES = 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm.mem"
    path.write_bytes(random.Random(7).randbytes(PAGES * PAGE))
    return path


async def in_thread(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return await trio.to_thread.run_sync(partial(function, *arguments, **keywords), abandon_on_cancel=True)


async def ask(control: Path, request: str, **arguments: Any) -> Json:
    """Without a process in between."""
    async with ControlClient.open(str(control), checks=True) as client:
        return await client.execute(request, arguments)


async def refusal(control: Path, program: str | None) -> str:
    """Why another engine does not go on."""
    with pytest.raises(ControlError) as refused:
        await ask(control, "upgrade", program=program)
    return str(refused.value)


def another_installation(directory: Path) -> Path:
    """The command of a copy of this package; the Python and the other packages are the same."""
    for path in postcopy.__path__:
        shutil.copytree(path, directory / "site" / "postcopy", dirs_exist_ok=True)
    search = [str(directory / "site"), str(Path(trio.__file__).parents[1])]
    program = directory / "postcopy"
    code = f"import sys; sys.path[:0] = {search}; from postcopy.__main__ import main; sys.exit(main())"
    # -S: where this package is installed for editing, its own finder comes before all paths.
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -P -c {shlex.quote(code)} "$@"\n')
    program.chmod(0o755)
    return program


def runs_copy(pid: int, directory: Path) -> bool:
    return f"{directory}/site/postcopy/_native" in Path(f"/proc/{pid}/maps").read_text()


async def test_upgraded_killed_and_ended(side: Callable[..., Any], tmp_path: Path, image: Path) -> None:
    content = image.read_bytes()  # noqa: ASYNC240
    socket, control = tmp_path / "vm.sock", tmp_path / "c"
    pager = side("pager", "--json", "--socket", socket, "--image", image, "--control", control)
    try:
        await in_thread(pager.wait_for, "socket", lambda line: line["event"] == "listening")
        async with start_vmm(socket, PAGES) as vmm:
            assert await vmm.reads(content, 0, 128)
            await vmm.ask("write", 5, 77)
            await vmm.ask("remove", 16, 8)
            os.unlink(image)  # those that run keep it, in each process that comes

            # Another process goes on, of another installation.
            await ask(control, "upgrade", program=str(another_installation(tmp_path)))
            taken = await in_thread(pager.wait_for, "a successor", lambda line: line.get("taken-over") is True)
            assert taken["pid"] == vmm.pid
            assert await vmm.reads(content, 128, 64)
            with pytest.raises(ControlError, match="no program that this user may run"):
                await ask(control, "upgrade", program=str(tmp_path / "nothing"))
            with trio.fail_after(30):
                while "being replaced already" in (why := await refusal(control, shutil.which("true"))):  # noqa: ASYNC110
                    await trio.sleep(0.05)  # the last one may not have ended yet
            assert re.search("no other engine goes on.*status 0 before it could serve", why)

            # It is killed, while the VMM asks for a page.
            status = await ask(control, "status")
            assert runs_copy(status["pid"], tmp_path)
            await vmm.send("read", 192, 64)
            os.kill(status["pid"], signal.SIGKILL)
            assert await vmm.answer()
            assert await vmm.reads(content, 192, 64)
            assert [await vmm.ask("byte", page) for page in (5, 16, 23)] == ["77", "0", "0"]
            after = await ask(control, "status")
            assert after["pid"] != status["pid"]
            assert runs_copy(after["pid"], tmp_path)
            assert after["vms"][0]["engine-deaths"] == 1
            assert after["vms"][0]["faults"] >= 256 - 8

            # It would freeze the VMM to end; unless that has all of its memory.
            with pytest.raises(ControlError, match="1 virtual machine with missing pages"):
                await ask(control, "quit")
            assert await vmm.reads(content, 256, PAGES - 256)
            await vmm.ask("remove", 0, PAGES)  # also what the process that was killed had placed and not counted yet
            with trio.fail_after(30):
                while (await ask(control, "status"))["vms"][0]["status"] != "complete":  # noqa: ASYNC110 -- another process
                    await trio.sleep(0.01)
            await ask(control, "quit")
            code, result, errors = await in_thread(pager.end)
            assert (code, result["left"]) == (0, 0), errors
            assert len(pager.events("run")) == 3  # of the processes that have served, and of no spare
            await vmm.ask("remove", 300, 1)
            assert await vmm.ask("byte", 300) == "0"
    finally:
        await in_thread(kept.kill_all, str(socket))
    assert not socket.exists()


async def test_ended_by_a_signal_while_nobody_needs_it(side: Callable[..., Any], tmp_path: Path, image: Path) -> None:
    pager = side("pager", "--json", "--socket", tmp_path / "s", "--image", image)
    try:
        await in_thread(pager.wait_for, "socket", lambda line: line["event"] == "listening")
        pager.signal(signal.SIGTERM)
        code, result, errors = await in_thread(pager.end)
        assert (code, result["status"]) == (0, "completed"), errors
    finally:
        await in_thread(kept.kill_all, str(tmp_path / "s"))


def test_what_cannot_be_served_is_an_error_at_once(side: Callable[..., Any], tmp_path: Path, image: Path) -> None:
    for more, words in (
        (("--image", tmp_path / "none"), "No such file"),
        (("--image", image, "--socket", "/nowhere/s"), "/nowhere"),
    ):
        code, _, errors = side("pager", "--socket", tmp_path / "s", *more).end()
        assert code == 2, errors
        assert words in errors
        assert errors.count("\n") <= 2, errors
