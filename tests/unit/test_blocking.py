# SPDX-License-Identifier: Apache-2.0
"""Blocking calls on threads that are there before they are needed."""

from __future__ import annotations

import contextvars
import threading

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from postcopy import _blocking
from postcopy._blocking import Workers, run_briefly, run_sync, run_to_end
from postcopy.errors import MigrationError, ResourceError

DEADLINE_S = 20.0


class Gate:
    """A blocking call that ends when it is let."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.done = False

    def __call__(self) -> str:
        self.entered.set()
        assert self.opened.wait(DEADLINE_S)
        self.done = True
        return threading.current_thread().name

    async def wait_entered(self) -> None:
        assert await trio.to_thread.run_sync(self.entered.wait, DEADLINE_S)


async def test_threads_exist_from_the_start(no_more_threads: list[str]) -> None:
    workers = Workers.open(2, "test-workers", "a test")
    no_more_threads.append("now")
    assert sum(thread.name == "test-workers" for thread in threading.enumerate()) == 2
    assert await workers.run(lambda a, b: a + b, 3, 4) == 7
    with workers.serving():
        assert await run_sync(lambda: threading.current_thread().name) == "test-workers"
        assert await run_to_end(lambda: threading.current_thread().name, "it") == "test-workers"
    assert await workers.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "test-workers"]


async def test_no_thread_is_a_named_error(no_more_threads: list[str]) -> None:
    before = set(threading.enumerate())
    no_more_threads.append("now")
    with pytest.raises(ResourceError, match=r"no thread can be started for a migration .*pids\.max"):
        Workers.open(2, "pc-test", "a migration")
    assert set(threading.enumerate()) == before


async def test_some_threads_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    _blocking.keep_reserve()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ResourceError):
        Workers.open(3, "pc-test", "a test")
    for thread in started:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


async def test_errors_are_raised_as_they_are() -> None:
    workers = Workers.open(1, "test-workers", "a test")
    for error in (RuntimeError("can't start new thread"), KeyError("x"), SystemExit(3)):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            await workers.run(fail)
        assert caught.value is error
        with pytest.raises(type(error)):
            await run_to_end(fail, "it")
        with pytest.raises(type(error)):
            await run_sync(fail)
    assert workers.idle == 1
    await workers.close()


async def test_cancelling_waits_for_the_call() -> None:
    workers, gate = Workers.open(1, "test-workers", "a test"), Gate()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def release() -> None:
                await gate.wait_entered()
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await wait_all_tasks_blocked(0.01)
                assert not gate.done
                gate.opened.set()

            nursery.start_soon(release)
            assert await workers.run(gate) == "test-workers"
    assert gate.done
    await workers.close()


async def test_abandoned_call_keeps_its_thread() -> None:
    workers, gate = Workers.open(1, "test-workers", "a test"), Gate()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await gate.wait_entered()
                scope.cancel()

            nursery.start_soon(cancel)
            await workers.run(gate, abandon_on_cancel=True)
    assert scope.cancelled_caught
    assert workers.idle == 0
    with trio.move_on_after(0.01) as waiting:
        await workers.run(lambda: None)
    assert waiting.cancelled_caught  # there is no free one
    assert not await workers.close(0.01)
    with pytest.raises(trio.ClosedResourceError):
        await workers.run(lambda: None)
    gate.opened.set()
    assert await workers.close(DEADLINE_S)
    assert gate.done


async def test_close_tells_those_who_wait() -> None:
    workers, gate = Workers.open(1, "test-workers", "a test"), Gate()
    called = []

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await workers.run(lambda: None)
        called.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run, gate)
        await gate.wait_entered()
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        nursery.start_soon(workers.close, DEADLINE_S)
        await wait_all_tasks_blocked()
        gate.opened.set()
    assert called == [True, True]


async def test_an_end_never_waits_for_a_worker(no_more_threads: list[str]) -> None:
    workers, gate = Workers.open(1, "test-workers", "a test"), Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run, gate)
        await gate.wait_entered()
        with workers.serving():
            assert await run_to_end(lambda: threading.current_thread().name, "it") == "pc-end"
            no_more_threads.append("now")
            assert await run_to_end(lambda: threading.current_thread().name, "it") == "pc-reserve"
        gate.opened.set()
    await workers.close()


async def test_an_end_is_bounded_and_shielded() -> None:
    gate = Gate()
    with trio.CancelScope() as scope:
        scope.cancel()
        with pytest.raises(MigrationError, match=r"ending it: not done after 0\.05 s; its memory is kept"):
            await run_to_end(gate, "ending it", 0.05)
    gate.opened.set()


async def test_blocking_call_without_workers(no_more_threads: list[str]) -> None:
    called: list[int] = []
    with pytest.MonkeyPatch.context() as patch:

        async def none_left(*_: object, **__: object) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(trio.to_thread, "run_sync", none_left)
        with pytest.raises(ResourceError, match="no thread can be started"):
            await run_sync(called.append, 1)
    assert not called
    await run_sync(called.append, 1)
    assert called == [1]


async def test_context_and_closed_workers() -> None:
    word = contextvars.ContextVar("word", default="")
    workers = Workers.open(1, "test-workers", "a test")
    word.set("here")
    assert await workers.run(word.get) == "here"
    with workers.serving():
        await workers.close()
        assert await run_sync(word.get) == "here"  # on one of Trio's


async def test_no_task_runs_during_a_brief_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocking, "BRIEF_S", DEADLINE_S)
    workers = Workers.open(2, "test-workers", "a test")
    ran: list[str] = []

    async def other() -> None:
        ran.append("other")

    def fail() -> None:
        raise KeyError("x")

    async with trio.open_nursery() as nursery:
        with workers.serving():
            nursery.start_soon(other)
            assert await run_briefly(lambda: threading.current_thread().name) == "test-workers"
            with pytest.raises(KeyError):
                await run_briefly(fail)
            assert not ran
            assert await run_briefly(lambda: 3) == 3  # both have to be given back first
            assert ran == ["other"]
    with trio.fail_after(DEADLINE_S):
        while workers.idle < 2:  # noqa: ASYNC110  (a counter; they are given back a moment after the result)
            await trio.sleep(0.001)
    assert await workers.close()
    assert await run_briefly(lambda: 4) == 4  # on one of Trio's


async def test_a_brief_call_that_takes_long_is_waited_for_as_any_other() -> None:
    workers, gate, names = Workers.open(1, "test-workers", "a test"), Gate(), list[str]()

    async def call() -> None:
        with workers.serving():
            names.append(await run_briefly(gate))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await gate.wait_entered()
        await wait_all_tasks_blocked()
        assert not names
        gate.opened.set()
    assert names == ["test-workers"]
    assert await workers.close()


async def test_a_brief_call_is_left_to_itself_when_it_is_cancelled() -> None:
    workers, gate = Workers.open(1, "test-workers", "a test"), Gate()
    with workers.serving(), trio.move_on_after(0.05) as scope:
        await run_briefly(gate, abandon_on_cancel=True)
    assert scope.cancelled_caught
    assert not gate.done
    gate.opened.set()
    assert await workers.close(DEADLINE_S)
    assert gate.done
