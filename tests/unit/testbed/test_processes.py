# SPDX-License-Identifier: Apache-2.0
"""Children of the commands of the testbed, whatever ends these commands."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from postcopy.errors import ResourceError
from postcopy.testbed import _linux, _processes

COMMAND = """
import sys, trio
from postcopy.errors import MigrationError
from postcopy.testbed import _processes

async def work():
    async with _processes.open_child(["sleep", "1000"]) as child:
        print(child.pid, flush=True)
        await trio.sleep_forever()

async def fail(why):
    raise MigrationError(why)

try:
    _processes.run(fail, "as it comes")
except MigrationError as error:
    assert str(error) == "as it comes"
try:
    _processes.run(work)
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_command_that_is_ended_ends_its_children(number: signal.Signals) -> None:
    def default() -> None:
        for each in (signal.SIGINT, signal.SIGHUP):  # as from a shell
            signal.signal(each, signal.SIG_DFL)

    command = [sys.executable, "-P", "-c", COMMAND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=default) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        for _ in range(3):  # impatience leaves no child behind
            os.kill(process.pid, number)
        assert process.wait(60) == 7
    assert not Path(f"/proc/{child}").exists()


def test_a_command_may_ignore_all_signals() -> None:
    """As one that was started with `trap "" INT TERM HUP`."""

    async def work() -> int:
        return 3

    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        assert _processes.run(work) == 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_command_that_is_killed_takes_its_children_with_it() -> None:
    """As a demo that was killed before its machine has moved: its destination listened for ever."""
    with subprocess.Popen([sys.executable, "-P", "-c", COMMAND], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        ended = os.pidfd_open(child)
        process.kill()
    try:
        assert _linux.wait_for([ended], 60)
    finally:
        os.close(ended)


async def test_what_a_command_has_written() -> None:
    done = await _processes.run_captured(["sh", "-c", "echo said; echo failed >&2; exit 3"])
    assert (done.returncode, done.stdout, done.stderr) == (3, b"said\n", b"failed\n")


async def test_no_descriptor_is_left_of_a_child() -> None:
    """Of one that had ended before it was to end: there was one for each measurement of `bench`."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async with _processes.open_child(["true"]):
        pass  # what Trio needs is there
    before = descriptors()
    for _ in range(3):
        async with _processes.open_child(["true"]) as child:
            assert not await child.line()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 -- it has closed its output
    assert descriptors() == before


async def test_several_wait_for_a_process() -> None:
    """And one who waits no longer is no harm to the others."""
    async with _processes.open_child(["cat"], stdin=subprocess.PIPE) as child, trio.open_nursery() as nursery:
        with trio.move_on_after(0.01) as scope:
            await child.process.wait()
        assert scope.cancelled_caught
        nursery.start_soon(child.process.wait)
        nursery.start_soon(child.process.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert child.process.stdin is not None
        await child.process.stdin.aclose()
    assert child.process.returncode == 0


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EAGAIN, "no process can be started (remedy: allow"), (errno.EMFILE, "than {limit} open files: ulimit -n ")],
)
async def test_what_a_child_cannot_be_started_for(number: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `ulimit -u` and `ulimit -n`; what is wrong with the command is another error."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(FileNotFoundError):
        async with _processes.open_child(["/none"]):
            pass
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(ResourceError) as caught:
        async with _processes.open_child(["true"]):
            pass
    assert said.format(limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0]) in str(caught.value)
