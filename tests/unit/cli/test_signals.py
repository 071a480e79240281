# SPDX-License-Identifier: Apache-2.0
"""Signals, from before the first thing that is done to after the last one. (What is seen through: test_stopping.)"""

from __future__ import annotations

import io
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

from postcopy import __main__, _stop
from postcopy._stop import Stop
from postcopy.cli import _main
from postcopy.output import Output

Run = Callable[[Stop], Awaitable[bool]]
NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], tuple[int, str]]:
    """Of a command that does this, and what it says."""

    def status(run: Run) -> tuple[int, str]:
        said = io.StringIO()
        output = Output(False, io.StringIO(), said)
        monkeypatch.setattr(_main, "make_output", lambda: output)
        for name in ("basicConfig", "captureWarnings"):  # of the whole process
            monkeypatch.setattr(logging, name, lambda *_, **__: None)
        monkeypatch.setattr(_main, "_command", lambda *_: _main._run(lambda *_: run, {}, output, True))
        try:
            return _main.main(), said.getvalue()
        finally:
            output.close()

    return status


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_one_asks(status: Any, number: signal.Signals) -> None:
    async def run(stop: Stop) -> bool:
        os.kill(os.getpid(), number)
        await stop.wait()
        return stop.by == ("Ctrl-C" if number == signal.SIGINT else "SIGTERM") and not stop.insisted

    assert status(run) == (0, "")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_one_ends_what_has_nothing_to_lose(
    status: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(_stop, "TOGETHER_S", 0)

    async def run(stop: Stop) -> bool:
        os.kill(os.getpid(), number)
        await stop.wait()
        os.kill(os.getpid(), number)
        await trio.sleep_forever()
        return True

    assert status(run) == (1, "postcopy: error: ended at once, since it was asked to end again\n")


@pytest.mark.parametrize("number", [*NUMBERS, signal.SIGHUP])
def test_one_that_comes_when_all_is_done_changes_nothing(
    status: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Neither the status, nor that the result is written: when Trio has ended, too."""
    run_trio = trio.run

    def run_and_signal(*arguments: Any, **keywords: Any) -> Any:
        done = run_trio(*arguments, **keywords)
        os.kill(os.getpid(), number)
        return done

    monkeypatch.setattr(trio, "run", run_and_signal)

    async def run(stop: Stop) -> bool:
        await trio.lowlevel.checkpoint()
        os.kill(os.getpid(), number)  # which is seen when `run` has returned
        return True

    assert status(run) == (0, "")


@pytest.mark.parametrize("ignored", [NUMBERS, [*NUMBERS, signal.SIGHUP]], ids=len)
def test_one_that_is_ignored_stays_ignored(status: Any, ignored: list[signal.Signals]) -> None:
    """As in the background of a script, and under nohup."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)

    async def run(stop: Stop) -> bool:
        for number in ignored:
            os.kill(os.getpid(), number)
        await trio.testing.wait_all_tasks_blocked()
        print("an answer")  # whose reader is waited for
        return not stop.is_set()

    assert status(run) == (0, "")
    assert [signal.getsignal(number) for number in ignored] == [signal.SIG_IGN] * len(ignored)


def test_ctrl_c_before_anything_could_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr("postcopy.cli.main", main)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert __main__.main() == 1
