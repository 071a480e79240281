# SPDX-License-Identifier: Apache-2.0
"""`--remote`: the page is on another host, and the engine fetches it while the network fails.

Three parties. The *cell's child* (csrc/faultpaths) registers one page, hands its userfaultfd over a Unix socket, and
runs the operation when it gets a byte. The *destination's engine*, a `Pager` here, serves that userfaultfd, with the
page at an address of the child. The *source* is a `PageServer` behind a TCP port; between the two stands the chaos
proxy of `postcopy.testbed`, with whatever delay its plan has.

What happens to each cell, in order, whatever the plan:

1. The proxy holds everything back; the operation begins, faults, and waits; the engine's request is on its way.
2. All connections are reset. The request is lost with them.
3. As in a recovery, the source learns what the destination has, and the engine gets its new connection, on which it
   asks again for what is pending.
4. The page comes, delayed, is verified and placed; the operation goes on, and the child compares content.

So one request must reach the source, whatever the child's thread did meanwhile. An operation that does not fault, or
does not wait, ends before step 2 and has no cut.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from msgspec.structs import replace

from postcopy._native import ffi, lib
from postcopy.dataplane._events import EventType
from postcopy.dataplane.pager import ForeignMemory, Pager
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import MigrationError, PostcopyError, ResourceError, check
from postcopy.memory import Memory
from postcopy.testbed.chaos import ChaosPlan, ChaosProxy, open_chaos_proxy
from postcopy.testbed.faultpaths import _core
from postcopy.testbed.faultpaths._model import Cell, Outcome, RemoteMeasure, Result
from postcopy.testbed.faultpaths._supervise import Progress, Runner
from postcopy.uffd import UffdFeature

MIN_TIMEOUT_S = 10.0
"""For a cell's child: delays and a cut take their time."""
STEP_S = 5.0
"""For one step of a recovery."""
CUT_AGAIN_S = 0.05
LOOK_S = 0.0005
"""How often the engine is asked whether a fault is pending: it has no event for that, as nothing else needs one."""
_FEATURES = UffdFeature.THREAD_ID | UffdFeature.EXACT_ADDRESS  # as the child opens it

Hook = Callable[[Pager], Awaitable[None]]


class Link:
    """The wire: our sockets, the proxy, and the source's port. Used for one cell after the other."""

    def __init__(self, ours: socket.socket, theirs: socket.socket, listener: trio.SocketListener, proxy: ChaosProxy):
        self.proxy = proxy
        self._ours = ours
        self._theirs = theirs
        self._listener = listener

    def drain(self) -> None:
        """Forgets what a cell that was killed has left in the socket, which would be the next one's."""
        for end in (self._ours, self._theirs):
            with contextlib.suppress(BlockingIOError):
                while True:
                    _, ancillary, _, _ = end.recvmsg(256, 256, socket.MSG_DONTWAIT)
                    for fd in _fds(ancillary):
                        os.close(fd)

    async def hand_over(self) -> tuple[ForeignMemory, int]:
        """What the next child sends: its memory, and its userfaultfd, ours to close."""
        await trio.lowlevel.wait_readable(self._ours)
        data, ancillary, _, _ = self._ours.recvmsg(256, 256, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        fds = _fds(ancillary)
        message: Any = ffi.new("struct pc_fp_hand_over *")
        if len(data) != ffi.sizeof("struct pc_fp_hand_over") or not fds:
            for fd in fds:
                os.close(fd)
            raise MigrationError("a cell's child handed over something else than a page")
        ffi.memmove(message, data, len(data))
        memory = ForeignMemory(
            message.address, message.bytes, message.page_bytes, message.kind, fds[1] if len(fds) > 1 else -1
        )
        return memory, fds[0]

    def go(self) -> None:
        """Has the child begin. Nothing, where it is gone."""
        with contextlib.suppress(OSError):
            self._ours.send(b"g")

    async def connect(self, pager: Pager, shard: int, server: PageServer) -> None:
        """Gives both ends of a new connection to the engines."""
        with trio.fail_after(STEP_S):
            near = await trio.open_tcp_stream(self.proxy.address.host, self.proxy.address.port)
            far = await self._listener.accept()
        server.attach_urgent(0, far.socket.detach())
        pager.attach_urgent(shard, near.socket.detach())


def _fds(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


@asynccontextmanager
async def open_link(plan: ChaosPlan) -> AsyncIterator[tuple[Link, int]]:
    """The wire, and the descriptor for the runner. `ResourceError` without loopback."""
    try:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    except OSError as error:
        raise ResourceError(f"--remote: cannot listen on the loopback interface: {error.strerror}") from None
    async with listener:
        port = listener.socket.getsockname()[1]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            async with open_chaos_proxy(f"127.0.0.1:{port}", plan) as proxy:
                yield Link(ours, theirs, listener, proxy), theirs.fileno()


async def run_cell(runner: Runner, link: Link, cell: Cell, while_pending: Hook | None) -> Result:
    """One cell. `while_pending` is called while the operation waits, before the cut."""
    link.drain()
    results: list[Result] = []
    measures: list[RemoteMeasure] = []
    failures: list[str] = []
    over = trio.Event()

    async with trio.open_nursery() as nursery:

        async def run() -> None:
            try:
                results.append(await runner.run(cell))
            finally:
                over.set()  # also when cancelled: the child is gone then, and what is shielded below must end
            nursery.cancel_scope.cancel()

        nursery.start_soon(run)
        memory, uffd = await link.hand_over()
        # From here on the page's fate is ours. The child's end does not cancel what must be seen through.
        with trio.CancelScope(shield=True):
            try:
                measures.append(await _serve(link, memory, uffd, over, while_pending))
            except (PostcopyError, trio.TooSlowError) as error:
                failures.append(str(error) or "a step of the recovery did not end in time")
            link.proxy.thaw()
        await over.wait()  # at the latest when the child's watchdog ends it
    result = results[0]
    if failures:
        return replace(result, outcome=Outcome.CRASHED, text=f"the engine: {failures[0]}")
    if not measures:
        return result  # it was unavailable before it had a page
    measure = measures[0]
    outcome = result.outcome
    if outcome is Outcome.PASSED and 0 < measure.held_us <= result.waited_us:
        # The child cannot see the thread of another process, or of the kernel, wait for its page.
        outcome = Outcome.BLOCKED
    repeated = max(0, measure.faults - 1)
    return replace(result, outcome=outcome, remote=measure, events=measure.faults, events_repeated=repeated)


async def _serve(
    link: Link, memory: ForeignMemory, uffd: int, over: trio.Event, while_pending: Hook | None
) -> RemoteMeasure:
    """From the hand-over until the child has ended."""
    cuts = held_ns = reconnect_ns = 0
    with contextlib.ExitStack() as stack:
        if memory.fd >= 0:
            stack.callback(os.close, memory.fd)
        # Stays open until the child is gone: closing the last copy would show zeros to a thread that still waits.
        stack.callback(os.close, uffd)
        source = stack.enter_context(Memory.create("memfd", memory.size_bytes))
        source.write(0, _core.content(memory.size_bytes))
        async with _engines(memory, source, uffd) as (pager, shard, server):
            await link.connect(pager, shard, server)
            server.start()
            pager.arm(shard, 0, 0, memory.pages)
            link.proxy.freeze()
            link.go()
            while not over.is_set() and not pager.statistics().pending_faults:  # noqa: ASYNC110 - see LOOK_S
                await trio.sleep(LOOK_S)
            if not over.is_set():
                pending_ns = time.monotonic_ns()
                if while_pending is not None:
                    await while_pending(pager)
                cuts += 1
                await _cut(link.proxy, pager, server)
                link.proxy.thaw()
                began_ns = time.monotonic_ns()
                await _recover(link, pager, shard, server)
                held_ns, reconnect_ns = (time.monotonic_ns() - since_ns for since_ns in (pending_ns, began_ns))
            link.proxy.thaw()
            await over.wait()
            seen, served = pager.statistics(), server.statistics()
            held_us, reconnect_us = (round(ns / 1e3, 1) for ns in (held_ns, reconnect_ns))
            return RemoteMeasure(seen.faults, served.requests, served.demand_pages, cuts, held_us, reconnect_us)


@asynccontextmanager
async def _engines(memory: ForeignMemory, source: Memory, uffd: int) -> AsyncIterator[tuple[Pager, int, PageServer]]:
    """Destination, with a copy of the userfaultfd, and source, with one block."""
    states = check(lib.pc_states_new(memory.pages), "making page states")
    try:
        async with Pager() as pager, PageServer() as server:
            pager.add_block(memory, states)
            shard = pager.adopt_shard(os.dup(uffd), int(_FEATURES))
            server.add_block(source, memory.page_bytes)
            yield pager, shard, server
    finally:
        os.close(states)


async def _cut(proxy: ChaosProxy, pager: Pager, server: PageServer) -> None:
    """Resets every connection, until both sides have noticed."""
    with trio.fail_after(STEP_S):
        for owner in (pager, server):
            noticed = False
            while not noticed:
                # Again and again: the proxy may be about to know a connection that both of its ends know already.
                proxy.cut("reset")
                with trio.move_on_after(CUT_AGAIN_S):
                    noticed = await _channel_down(owner)


async def _channel_down(owner: Pager | PageServer) -> bool:
    async for event in owner.events():
        if event.type is EventType.FATAL:
            raise MigrationError(f"it cannot go on: {event.text}")
        if event.type is EventType.CHANNEL_DOWN:
            return True
    return False


async def _recover(link: Link, pager: Pager, shard: int, server: PageServer) -> None:
    """What the two sides of a migration do when they meet again, without the control connection between them."""
    await pager.disconnect()
    await server.disconnect()
    pager.drain_events()
    server.drain_events()
    server.set_received(0, pager.received(0))
    await link.connect(pager, shard, server)


async def run_cells(
    cells: Sequence[Cell],
    *,
    plan: ChaosPlan,
    timeout_s: float,
    direct_dir: str,
    progress: Progress = lambda number, cell: None,
    while_pending: Hook | None = None,
) -> tuple[dict[Cell, Result], dict[str, int]]:
    """The results, and what the network did."""
    results: dict[Cell, Result] = {}
    async with open_link(plan) as (link, fd):
        async with Runner(timeout_s=max(timeout_s, MIN_TIMEOUT_S), direct_dir=direct_dir, hand_over_fd=fd) as runner:
            for number, cell in enumerate(cells):
                progress(number, cell)
                results[cell] = await run_cell(runner, link, cell, while_pending)
        network = link.proxy.statistics
        return results, {"connections": network.connections, "cuts": network.cuts, "bytes-to-source": network.bytes_out,
                         "bytes-to-destination": network.bytes_back}  # fmt: skip
