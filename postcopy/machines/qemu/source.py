# SPDX-License-Identifier: Apache-2.0
"""A QEMU of the user's, which runs, as a machine that can leave.

QEMU is driven over its monitor and watched from outside: it is not changed, and not restarted.

**Memory** is the files of its shared backends (`_look`), read by descriptors of our own: QEMU knows nothing of it.

**State.** QEMU migrates to a pipe of ours, and leaves shared memory out of that (capability ``x-ignore-shared``). It
writes what it keeps in memory of its own (ROMs) while the guest runs, stops the guest (event STOP, from which the pause
is counted), waits until its disks have done what they were asked, and then for us (``pause-before-switchover``). What
it has written until then is final, and loading it touches no guest memory: it is the *early* state, which is given away
as it comes. Told to go on, QEMU writes the devices' state and has *completed*; memory is looked at meanwhile, since
nothing changes it any more: QEMU's own migration sends the last of it before the devices, too.

**The way back** is the same from everywhere (`_set_running`), and asks QEMU where it is: a migration that is under way
is cancelled, or, where QEMU was told to go on, left to fail by itself, and a guest that does not run is told to
(``cont``). That only one of the two runs is a matter of the protocol; that QEMU refuses ``cont`` while the destination
has locked a disk is a second guard, where there is one.

**While it runs** (precopy) what it writes is told by the kernel, through the preload library. What a disk writes to
pages that were pinned before (O_DIRECT) shows in no page table: a QEMU with such disks is stopped for each look, which
ends all requests (`settled`).

**The end.** `close` lets go of it and ends nothing. A source that dies while QEMU writes its state fails that, and QEMU
lets the guest run on; one that dies while QEMU waits for it leaves a guest that is stopped, which the user tells to run
(``migrate_cancel``); one that dies later does so too ("postmigrate", ``cont``): if he knows that it does not run
elsewhere. When the guest runs elsewhere, `destroy` ends what is left here.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import outcome
import trio

from postcopy._blocking import run_sync
from postcopy._fd import FdHolder
from postcopy.errors import NO_FILES, BusyError, ConfigurationError, MigrationError, PostcopyError, out_of_files
from postcopy.machines._peer import one_line
from postcopy.machines.base import MachineState, RamBlock, TellEarly
from postcopy.machines.preload.client import Armed, Preload
from postcopy.machines.process import ProcessMachine
from postcopy.machines.qemu._look import Look, look, look_at_disks, ram_blocks
from postcopy.machines.qemu.qmp import REQUEST_TIMEOUT_S, Asked, Event, Monitor, QemuError, QemuRefused
from postcopy.memory import FEATURES_OF_PROCESS, DirtyLog, Memory
from postcopy.units import format_size
from postcopy.wire.messages import MAX_STATE_BYTES

IGNORE_SHARED, EVENTS, WAIT = "x-ignore-shared", "events", "pause-before-switchover"
STOP_TIMEOUT_S = 20.0
"""How long QEMU may take from `migrate` until the guest stands."""
SAVE_TIMEOUT_S = 10.0
"""How long it may take from there until it has saved its devices: some milliseconds."""
WAITS = "pre-switchover"
GO_ON_TIMEOUT_S = 7.0
"""How long it may take until a guest runs that was told to; with `RESTORE_TIMEOUT_S` less than an engine waits."""
READ_WITHIN_NS = 10**9
"""How old an event may be when it is read."""
RESTORE_TIMEOUT_S = 2.0
QUIT_TIMEOUT_S = 2.0
_AGAIN_S = 0.01
PIPE_BYTES = 1 << 20
_NO_LIMIT = 1 << 40  # of bandwidth, bytes/s
_LEFT_MS = 2000  # what may be left of QEMU's own blocks when it stops the guest: some ROMs
_UNDER_WAY = frozenset(
    {"setup", "active", "device", "pre-switchover", "cancelling", "wait-unplug", "colo"}
    | {"postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup", "postcopy-device"}
)
_FINISHING = "finish-migrate"
_DESCRIPTION = re.compile(rb"\x06(?=.{4}\{)", re.DOTALL)
_ASCII = bytes(range(128))
_MOVED = "postmigrate"
_STOPPED_BY_US = frozenset({"paused", _MOVED, _FINISHING})
_STOPPED_FOR_A_LOOK = frozenset({"paused"})

log = logging.getLogger(__name__)


class QemuMachine(ProcessMachine):
    """Made by `create`, at the source; `prepare` finds what it is. Where it arrives a subclass does that (`_connect`,
    `_found`), and from then on it is the same."""

    kind = "qemu"
    program = "QEMU"

    def __init__(self, qmp: str, preload: str | None = None) -> None:
        """`qmp`: path of its monitor. `preload`: of the preload library's socket, where that cannot be found out."""
        super().__init__()
        self._qmp = os.path.abspath(qmp)
        self._preload = preload
        self._token: trio.lowlevel.TrioToken | None = None
        self._monitor: Monitor | None = None
        self._look: Look | None = None
        self._blocks: tuple[RamBlock, ...] = ()
        self._migration = ""  # the status of QEMU's own migration, as it was told last
        self._stopped = False  # the guest, as QEMU has told
        self._settings: dict[str, dict[str, Any]] = {}  # commands, by which what we have set is as it was
        self._stream: _Stream | None = None
        self._going_on: Asked | None = None
        self._asked = False  # it may have been told to migrate
        self._saves = False  # it may have been told to go on
        self._saved: bytes | None = None
        self._looked_at = False  # its guest was stopped for a look, and may still be

    @classmethod
    def create(cls, qmp: str, preload: str | None = None) -> QemuMachine:
        """The one whose monitor is at that path. Nothing is asked yet."""
        return cls(qmp, preload)

    # ---- finding it

    async def prepare(self) -> None:
        """Finds what it is. Changes nothing there. A `PostcopyError` says what it cannot be moved for."""
        monitor = await self._connect()
        _check_runs(await self._status())
        await self._check_migration()
        await self._found(await look(monitor, monitor.process))
        for backend in self._seen.backends:
            if backend.registered:
                raise BusyError(
                    f"memory {backend.name} of {self._name} is not complete yet, or another program has it"
                    f" (a userfaultfd: {', '.join(sorted(backend.registered))}): wait until all of it has arrived"
                )
        self._state = MachineState.RUNNING

    async def _connect(self) -> Monitor:
        """Its monitor, and its process, which are this object's until `close`. `BusyError` when another one has it."""
        self._token = trio.lowlevel.current_trio_token()
        self._monitor = monitor = await Monitor.open(self._qmp)
        monitor.on_event = self._on_event
        self._hold(monitor.process)
        return monitor

    async def _found(self, seen: Look) -> None:
        """What it has, from now on."""
        memories: list[Memory] = []
        try:
            for backend in seen.backends:
                memories.append(await run_sync(backend.open))
        except BaseException:
            for memory in memories:
                memory.close()
            raise
        self._look = seen
        self._blocks = tuple(
            RamBlock(backend.name, memory, 0) for backend, memory in zip(seen.backends, memories, strict=True)
        )

    async def _check_migration(self) -> None:
        """That QEMU does not migrate, and could."""
        said = await self._query_migrate()
        status = said.get("status", "")
        if status in _UNDER_WAY:
            raise BusyError(
                f"{self._name} is being migrated by somebody else ({status}): wait for that, or migrate_cancel"
            )
        if reasons := said.get("blocked-reasons"):
            raise ConfigurationError(f"{self._name} says that it cannot be migrated: {str(reasons)[:300]}")
        await self._check_jobs()
        for capability in sorted({IGNORE_SHARED, EVENTS, WAIT} - (await self._capabilities()).keys(), reverse=True):
            raise ConfigurationError(f"{self._name} cannot be moved: its migration has no capability {capability}")

    async def _check_jobs(self) -> None:
        """A job that copies a disk must copy each write before the guest hears of it, or the last ones are lost; while
        any other one is under way, QEMU may not save its state, or abort when it has."""
        jobs = await self._execute("query-block-jobs")
        for job in jobs if isinstance(jobs, list) else ():
            said = job if isinstance(job, dict) else {}
            if said.get("type") != "mirror" or said.get("ready") is not True or said.get("actively-synced") is not True:
                shown = one_line(f"{said.get('type', '')} {said.get('device', '')}")
                raise ConfigurationError(
                    f"{self._name} has a block job ({shown}): wait for it, or cancel it; only a mirror in copy-mode"
                    " write-blocking that is ready may run (QEMU 8.2)"
                )

    # ---- asking it

    async def _execute(self, command: str, arguments: dict[str, Any] | None = None, **how: Any) -> Any:
        return await (await self._mended()).execute(command, arguments, **how)

    async def _execute_by(self, deadline: float, command: str, arguments: dict[str, Any] | None = None) -> Any:
        left_s = max(_AGAIN_S, deadline - trio.current_time())
        return await self._execute(command, arguments, timeout_s=min(left_s, REQUEST_TIMEOUT_S))

    async def _mended(self) -> Monitor:
        """Its monitor, where that is needed with a new connection."""
        assert self._monitor is not None
        if await self._monitor.mend():
            self._tell()  # so that events are read there, too
        return self._monitor

    async def _status(self, deadline: float = math.inf) -> str:
        """What its guest does: "running", "paused", "inmigrate", "postmigrate", ..."""
        said = await self._execute_by(deadline, "query-status")
        return str(said.get("status", ""))[:40] if isinstance(said, dict) else ""

    async def _capabilities(self) -> dict[str, bool]:
        said = await self._execute("query-migrate-capabilities")
        try:
            return {one["capability"]: bool(one["state"]) for one in said}
        except (TypeError, KeyError):
            raise MigrationError(f"{self._name} does not say what its migration is capable of") from None

    async def _set_up_migration(self, wanted: frozenset[str], parameters: dict[str, Any]) -> None:
        """Has QEMU migrate with these capabilities and no others, until `_restore`: any other one changes what is in
        the stream, or who waits for whom."""
        before = await self._capabilities()
        if missing := wanted - before.keys():
            raise ConfigurationError(f"the migration of {self._name} is not capable of {', '.join(sorted(missing))}")
        changed = {name: name in wanted for name, state in before.items() if state != (name in wanted)}
        if changed:
            self._settings["migrate-set-capabilities"] = _capabilities({name: before[name] for name in changed})
            await self._execute("migrate-set-capabilities", _capabilities(changed))
        if parameters:
            said = await self._execute("query-migrate-parameters")
            said = said if isinstance(said, dict) else {}
            self._settings["migrate-set-parameters"] = {name: said[name] for name in parameters if name in said}
            await self._execute("migrate-set-parameters", parameters)

    async def _restore(self) -> None:
        """What was set for our migration, as it was. QEMU refuses that until it has put its migration away. Bounded in
        time; errors are logged."""
        deadline = trio.current_time() + RESTORE_TIMEOUT_S
        for command, arguments in list(self._settings.items()):
            try:
                while not await self._is_taken(  # noqa: ASYNC110 -- nothing tells when
                    command, arguments, last=trio.current_time() > deadline
                ):
                    await trio.sleep(_AGAIN_S)
                self._settings.pop(command, None)  # what is not taken, or cancelled, is left to the next try
            except QemuError as error:
                log.warning("the settings of QEMU's own migration are not as they were: %s", error)
                return

    async def _is_taken(self, command: str, arguments: dict[str, Any], *, last: bool) -> bool:
        """Whether QEMU does not refuse a command now, or an error where it is the `last` time."""
        try:
            await self._execute(command, arguments, timeout_s=RESTORE_TIMEOUT_S)
        except QemuRefused:
            if last:
                raise
            return False
        return True

    def _on_event(self, event: Event) -> None:
        if event.name == "MIGRATION":
            self._migration = str(event.data.get("status", ""))[:40]
        elif event.name == "STOP":
            # When it was, not when it is read: QEMU goes on meanwhile. A clock that was set in between counts as now.
            ago_ns = time.time_ns() - event.when_ns
            self._paused_ns = time.monotonic_ns() - (ago_ns if 0 <= ago_ns < READ_WITHIN_NS else 0)
            self._stopped = True
        elif event.name == "RESUME":
            self._stopped = False

    # ---- what it is

    @property
    def _seen(self) -> Look:
        assert self._look is not None
        return self._look

    @property
    def blocks(self) -> Sequence[RamBlock]:
        """None before `prepare`."""
        return self._blocks

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = msgspec.to_builtins(self._seen.config)
        return config

    @property
    def process(self) -> tuple[int, str] | None:
        return (self._pid, self._qmp) if self._pid else None

    def vcpu_threads(self) -> list[int]:
        return list(self._look.threads) if self._look is not None else []

    async def wait_changed(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            ended = await outcome.acapture(super().wait_changed)
            nursery.cancel_scope.cancel()
        ended.unwrap()

    async def _listen(self) -> None:
        """Reads what QEMU says while nobody asks, so that it is not kept waiting there."""
        if self._monitor is not None:
            with contextlib.suppress(QemuError, trio.ClosedResourceError):
                await self._monitor.wait_until(lambda: self._closed, math.inf)

    # ---- the pause

    async def before_pause(self, early: TellEarly | None = None) -> None:
        """Has QEMU migrate, until it has stopped the guest and waits for us."""
        if self._looked_at:
            await self._run_after_look()
        if self._state is MachineState.PAUSED:
            return
        await self._check_is_as_found()
        if early is not None:
            early(b"")
        self._asked = False
        try:
            await self._set_up_migration(
                frozenset({IGNORE_SHARED, EVENTS, WAIT}), {"max-bandwidth": _NO_LIMIT, "downtime-limit": _LEFT_MS}
            )
            self._migration, self._stopped = "", False
            self._stream = await self._begin_migration()
            await self._stream_until(lambda: self._migration == WAITS or self._is_over, STOP_TIMEOUT_S, early)
            if self._migration != WAITS or not self._stopped:
                raise MigrationError(await self._why_not())
        except BaseException as error:
            if not self._asked or (self._stream is None and isinstance(error, QemuRefused)):
                # Ours has not begun: one that is under way, or has just completed, is another client's.
                with trio.CancelScope(shield=True):
                    await self._restore()
            else:
                await self._undo(error)
            raise
        self._state = MachineState.PAUSED

    async def _check_is_as_found(self) -> None:
        assert self._monitor is not None
        _check_runs(await self._status())
        await self._check_jobs()
        if await ram_blocks(self._monitor) != self._seen.blocks:
            raise MigrationError(f"{self._name} has other memory than when it was looked at: it was plugged in, or out")

    async def _begin_migration(self) -> _Stream:
        stream, theirs = _Stream.open()
        try:
            with theirs:
                await self._execute("getfd", {"fdname": stream.name}, fd=theirs.fileno())
            self._asked = True
            await self._execute("migrate", {"uri": f"fd:{stream.name}"})
        except BaseException:
            stream.close()
            raise
        return stream

    @property
    def _is_over(self) -> bool:
        return bool(self._migration) and self._migration not in _UNDER_WAY

    async def _stream_until(
        self, done: Callable[[], bool], timeout_s: float, early: TellEarly | None = None, *, hurry: bool = False
    ) -> None:
        """Takes what QEMU writes, until `done`, and then what the pipe holds; gives it to `early`."""
        assert self._stream is not None
        stream = self._stream
        try:
            with trio.fail_after(timeout_s):
                over = False
                while not over:
                    over = await self._stream_some(done, stream.too_long if early is None else stream.full, hurry)
                    stream.take()
                    if stream.too_long():
                        break
                    if early is not None and (piece := stream.cut()):
                        early(piece)
        except trio.TooSlowError:
            raise MigrationError(
                f"{self._name} has not stopped its guest and saved its state within {timeout_s:g} s (its migration is"
                f" {self._migration or 'not begun'}); it may wait for a page of the guest's memory, or for a disk"
            ) from None
        if stream.too_long():
            raise MigrationError(
                f"the state of {self._name} is longer than {format_size(MAX_STATE_BYTES)}, which is all that the pause"
                " can take: a device has much memory of its own, as video memory (-device VGA,vgamem_mb=16)"
            )

    async def _stream_some(self, done: Callable[[], bool], enough: Callable[[], bool], hurry: bool) -> bool:
        """Takes what QEMU writes, until `done` or it is `enough`: whether it is done."""
        assert self._monitor is not None
        assert self._stream is not None
        stream, failed = self._stream, None
        if hurry:
            self._monitor.hurry(done)
            if done():
                return True
        async with trio.open_nursery() as nursery:

            async def take() -> None:
                await stream.take_until(enough)
                if enough():
                    nursery.cancel_scope.cancel()

            nursery.start_soon(take)
            try:
                await self._monitor.wait_until(done, math.inf)
            except QemuError as error:
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
        return done()

    async def pause(self, timeout_s: float = 10.0) -> None:
        """Tells QEMU to go on, which waits with its guest stopped. When that fails the guest is told to run again."""
        with trio.CancelScope(shield=True):
            await self.before_pause()
            if self._stream is None or self._going_on is not None:
                return
            assert self._monitor is not None
            self._saves = True
            try:
                self._going_on = await self._monitor.ask("migrate-continue", {"state": WAITS}, timeout_s=timeout_s)
            except BaseException as error:
                await self._undo(error)
                raise
            self._tell()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _why_not(self) -> str:
        if self._migration in ("completed", WAITS):
            return f"the guest of {self._name} was stopped by somebody else meanwhile"
        why = (await self._query_migrate()).get("error-desc", "")
        return f"{self._name} cannot save its state ({self._migration}){': ' if why else ''}{str(why)[:300]}"

    async def _undo(self, why: BaseException) -> None:
        """The pause has failed: the guest runs on, and QEMU is as it was."""
        with trio.CancelScope(shield=True):
            try:
                await self._set_running()
            except PostcopyError as error:
                self._state = MachineState.PAUSED  # so that `resume` tries it again
                if self._is_alive():
                    log.error("%s; tell it to run (cont), if it does not: %s", why, error)

    async def resume(self) -> None:
        """Only what was paused here."""
        if self._state is not MachineState.PAUSED:
            await trio.lowlevel.checkpoint()
        elif self._looked_at:
            await self._run_after_look()
        else:
            await self._set_running()

    async def _set_running(self) -> None:
        """Whatever has become of the pause, the guest runs. `MigrationError` when that cannot be, with the reason."""
        # A QEMU that is cancelled while it saves its devices may let its guest run on without its disks, and aborts at
        # the next move (seen with 7.2). One that was told to go on comes to an end by itself: its pipe is closed.
        stream, self._stream, self._going_on, self._saved = self._stream, None, None, None
        if stream is not None:
            stream.close()
        deadline = trio.current_time() + GO_ON_TIMEOUT_S
        cancelled = False
        while True:
            try:
                if (status := (await self._query_migrate(deadline)).get("status")) not in _UNDER_WAY:
                    break
                if status == "cancelling" or (status == WAITS and self._saves):
                    # It may not have heard of it; and one that is cancelled just when it begins to wait for us does not
                    # notice, and waits for ever (7.2).
                    await self._execute_by(deadline, "migrate-continue", {"state": status})
                elif not cancelled and not self._saves:
                    cancelled = True
                    await self._execute_by(deadline, "migrate_cancel")
            except QemuRefused:  # it has gone on meanwhile
                pass
            except QemuError as error:
                if not self._is_alive():
                    raise
                status = str(error)
            if trio.current_time() > deadline:
                raise MigrationError(f"the migration of {self._name} does not end ({status}): see to that, and cont")
            await trio.sleep(_AGAIN_S)
        self._saves = False
        await self._run(_STOPPED_BY_US, deadline)
        self._runs()
        await self._restore()

    async def _query_migrate(self, deadline: float = math.inf) -> dict[str, Any]:
        said = await self._execute_by(deadline, "query-migrate")
        return said if isinstance(said, dict) else {}

    async def _run(self, stopped: frozenset[str], deadline: float) -> None:
        """``cont``, until the guest runs, where it is `stopped`. QEMU refuses that for a while: until its migration is
        put away, and while another one has locked a disk of the guest."""
        status, why = "silent", ""
        while True:
            try:
                if (status := await self._status(deadline)) == "running":
                    return
                if status not in stopped:
                    moved = "do so only if it does not run elsewhere: another client has moved it"
                    raise MigrationError(
                        f"the guest of {self._name} cannot go on: it is {status}; see to that, and cont"
                        + (f" ({moved})" if status == _MOVED else "")
                    )
                if status != _FINISHING:
                    await self._execute_by(deadline, "cont")
                    if trio.current_time() <= deadline:
                        continue  # to see whether it runs; one that is stopped again each time comes to an end below
            except QemuRefused as error:
                why = f": {error.description}"
            except QemuError as error:
                if not self._is_alive():
                    raise
                why = f": {error}"
            if trio.current_time() > deadline:
                raise MigrationError(f"the guest of {self._name} cannot go on (it is {status}){why}")
            await trio.sleep(_AGAIN_S)

    async def save_state(self) -> bytes:
        """What was not given away before. When that fails the guest is stopped as before (`resume`)."""
        if self._saved is None:
            if self._going_on is None or self._stream is None:
                raise MigrationError("a QEMU has a state to be sent while its guest is paused")
            assert self._monitor is not None
            await self._stream_until(lambda: self._is_over, SAVE_TIMEOUT_S, hurry=True)
            if self._migration != "completed":
                raise MigrationError(await self._why_not())
            await self._monitor.answer_to(self._going_on, hurry=True)
            self._saved = _without_description(self._stream.cut())
            self._stream.close()
            self._stream = None
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._saved

    async def load_state(self, state: bytes) -> None:
        raise MigrationError("this QEMU runs a guest already")

    # ---- what it writes

    def dirty_log(self) -> DirtyLog:
        """In a worker thread; the library is asked by Trio's."""
        armed = trio.from_thread.run(self._arm_log, trio_token=self._token)
        with armed.uffd as uffd:
            memories = [
                (block.memory, backend.address)
                for block, backend in zip(self._blocks, self._seen.backends, strict=True)
            ]
            assert self._pidfd is not None
            return DirtyLog.of_process(memories, uffd.fileno(), self._pid, self._pidfd.fileno())

    async def _arm_log(self) -> Armed:
        library = await Preload.of_process(self._pid, self._preload)
        try:
            return await library.arm([], features=FEATURES_OF_PROCESS, mode=0, keep=False)
        except BusyError:  # it keeps what guarded it while it arrived: all of its memory is there
            await library.disarm()
        return await library.arm([], features=FEATURES_OF_PROCESS, mode=0, keep=False)

    @contextlib.asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """With disks that write to pages which were pinned before, the guest is stopped: that waits for all of them."""
        if self._looked_at:
            await self._run_after_look()
        pins = (await look_at_disks(await self._mended()))[1] if self._state is MachineState.RUNNING else ()
        if not pins:
            yield
            return
        _check_runs(await self._status())
        try:
            await self._execute("stop")
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._run_after_look()

    async def _run_after_look(self) -> None:
        """The guest runs, or `resume` tries it again. One that is not as it was stopped here, others have moved."""
        try:
            await self._run(_STOPPED_FOR_A_LOOK, trio.current_time() + GO_ON_TIMEOUT_S)
        except PostcopyError as error:
            self._state, self._looked_at = MachineState.PAUSED, True
            self._tell()
            if isinstance(error, QemuError):  # only where it has ended
                raise MigrationError(f"{self._name} has ended while its memory was looked at") from error
            raise
        if self._looked_at:
            self._looked_at = False
            self._runs()

    # ---- the end

    async def _release(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._monitor is not None:
            if self._is_alive():
                await self._restore()
            self._monitor.close()
        for block in self._blocks:
            block.memory.drop()

    async def destroy(self) -> None:
        """Ends it: it runs elsewhere, or nobody wants it any more. The files of its memory stay."""
        if self._monitor is not None and not self._closed and self._is_alive():
            with trio.CancelScope(shield=True), contextlib.suppress(QemuError):
                await self._execute("quit", timeout_s=QUIT_TIMEOUT_S)
                await self._ends_within(QUIT_TIMEOUT_S)
        await super().destroy()


def open_pipe() -> tuple[FdHolder, FdHolder]:
    """For a state: the end to read from, and that to write to."""
    try:
        reader, writer = os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        if error.errno in NO_FILES:
            raise out_of_files(error.errno or 0, "a pipe for QEMU's state") from error
        raise
    with contextlib.suppress(OSError):  # beyond what this user may have in pipes
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return FdHolder(reader), FdHolder(writer)


class _Stream:
    """The end of a pipe into which QEMU writes its state. Until `close`."""

    def __init__(self, name: str, holder: FdHolder) -> None:
        self.name = name  # by which QEMU knows its end
        self._fd = holder
        self._pieces: list[bytes] = []
        self._bytes = 0

    @classmethod
    def open(cls) -> tuple[_Stream, FdHolder]:
        """Ours, and QEMU's end."""
        ours, theirs = open_pipe()
        os.set_blocking(ours.fd, False)
        return cls(f"postcopy-{os.getpid()}-{ours.fd}", ours), theirs

    def too_long(self) -> bool:
        return self._bytes > MAX_STATE_BYTES

    def full(self) -> bool:
        """Whether there is something for `cut`."""
        return bool(self._pieces)

    async def take_until(self, enough: Callable[[], bool]) -> None:
        """Takes what is written, until it ends or is `enough`."""
        while not self.take() and not enough():
            await self._fd.wait_readable()

    def take(self) -> bool:
        """Takes what is there; whether that was the end of it."""
        while not self.too_long():
            try:
                piece = os.read(self._fd.fileno(), PIPE_BYTES)
            except BlockingIOError:
                return False
            if not piece:
                return True
            self._pieces.append(piece)
            self._bytes += len(piece)
        return False

    def cut(self) -> bytes:
        """What was taken since the last call."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)

    def close(self) -> None:
        self._fd.close()


def _without_description(state: bytes) -> bytes:
    """A state ends in a description of itself, for debugging: its length, and so much JSON, a third of it all in a
    small guest. A destination skips it; it is replaced by an empty one."""
    ascii_from = len(state.rstrip(_ASCII))  # looked for once: a guest can have marks without end in its devices
    for mark in _DESCRIPTION.finditer(state, max(0, ascii_from - 5)):
        at = mark.end()
        if int.from_bytes(state[at : at + 4], "big") == len(state) - at - 4 and at + 4 >= ascii_from:
            return state[:at] + bytes(4)
    return state


def _capabilities(states: dict[str, bool]) -> dict[str, Any]:
    return {"capabilities": [{"capability": name, "state": state} for name, state in states.items()]}


def _check_runs(status: str) -> None:
    if status == "running":
        return
    if status in ("paused", _MOVED):
        raise ConfigurationError(
            f"the guest is stopped ({status}); tell it to run first (cont), if you know that it does not run elsewhere:"
            " one that was moved, and whose source has died, is left so"
        )
    if status == _FINISHING:
        raise ConfigurationError(
            "the guest is stopped by a migration that has not ended (finish-migrate); where that is one whose `postcopy"
            " source` has died, migrate_cancel lets it run on"
        )
    if status == "inmigrate":
        raise ConfigurationError("that QEMU waits for a guest (-incoming): name the one that runs it")
    raise ConfigurationError(f"that QEMU has no guest that runs: it is {status!r}")
