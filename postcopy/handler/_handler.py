# SPDX-License-Identifier: Apache-2.0
"""The owner of a process's virtual machines: who may connect, who is served, what is told.

A connection is taken from the store, checked (who it is, what it says, whether there is room), and becomes a `Vm` in a
task of its own, contained: whatever one virtual machine does, or whatever goes wrong in serving it, affects no other
one. With ``--images`` every image has a socket, and images that appear are found while the process runs.

**The end.** `Stop` asks for it. No virtual machine is taken any more; one of which no page is missing needs nobody, and
is let go. The others are waited for, since nobody would serve them, unless it is insisted on, or the store outlives
this process. When the store says `leave`, all are left as they are at once: another process goes on.

Resource handling: `run` closes everything. Sockets that it has made are removed when it ends, and not when it leaves.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from postcopy._blocking import run_sync
from postcopy._child import python
from postcopy._files import absolute, check_new_file
from postcopy._stop import INSIST_S, Stop
from postcopy.dataplane.ahead import NO_PREFETCH
from postcopy.errors import (
    ConfigurationError,
    ConnectionLost,
    PeerError,
    PostcopyError,
    ProtocolError,
    ResourceError,
)
from postcopy.handler._connect import ConnectSource
from postcopy.handler._image import Image
from postcopy.handler._report import vm_record
from postcopy.handler._source import ImageSource, ProgramSource, Source
from postcopy.handler._store import Store
from postcopy.handler._vm import About, Descriptors, Vm, VmOptions, open_peer
from postcopy.lazy import PageSource
from postcopy.machines.firecracker.handshake import (
    Credentials,
    Handshake,
    consume_handshake,
    peer_credentials,
    receive_handshake,
)
from postcopy.memory import workingset
from postcopy.migration.tasks import first_of
from postcopy.output.words import format_count
from postcopy.records import Record
from postcopy.records import pager as records
from postcopy.records.control import Command, Commands, Done, EndedMachine
from postcopy.records.timeline import VmTimeline
from postcopy.service import schema
from postcopy.service._contain import contained, contained_call
from postcopy.service._socket_file import listen
from postcopy.service.config import PagerConfig
from postcopy.service.options import is_name
from postcopy.service.schema import ControlError
from postcopy.uffd import UffdFeature
from postcopy.units import format_size

if TYPE_CHECKING:
    from postcopy.handler._metrics import VmMetrics

MOST_RECORDED = 64
"""Virtual machines that are recorded over time, at once: each takes some 30 KiB, and the longer a look at all of them
takes, the further apart they are."""
MAX_ARRIVING = 64
"""Connections that are not virtual machines yet."""
SCAN_S = 1.0
"""How often a directory of images is looked at."""
PROGRESS_S = 0.5
TRIAL_S = 10.0
"""How long an engine of another version waits until it serves all that it has taken over."""
END_S = 10.0
"""How long the store may take for what is let go of at an end."""
OWN = "own."
"""What the names begin with that the store has for sockets made here. They end with "@", which no name of a connection
does (NAME.NUMBER): so an image called a.1 does not share one with a connection to the socket of image a."""
IMAGE_SUFFIX, SOCKET_SUFFIX, SET_SUFFIX = ".mem", ".sock", ".ws"
_MAX_STEM_CHARS = 40

_NOT_SERVED = UffdFeature.EVENT_FORK | UffdFeature.EVENT_REMAP | UffdFeature.SIGBUS

log = logging.getLogger(__name__)

MakeSource = Callable[[About], PageSource]


class Teller(Protocol):
    """As much of `Output` as is used here."""

    @property
    def records(self) -> bool: ...
    def say(self, text: str) -> None: ...
    def emit(self, event: str, record: Record) -> None: ...
    def kick(self) -> None: ...


@dataclass(frozen=True)
class _Lost:
    """A virtual machine of a process before this one that is not served here."""

    key: str
    fds: Descriptors
    about: About
    error: str


class Handler:
    """Make it, `run` it."""

    side = "pager"

    def __init__(
        self, config: PagerConfig, output: Teller, store: Store, make_source: MakeSource | None = None
    ) -> None:
        """`make_source`: what gives a virtual machine its pages, where no image does."""
        self.control: str | None = None
        self.protection = config.protection
        self.listens = config.images is None  # else there may be no image yet
        self.stop = Stop()
        self.vms: list[Vm] = []
        self.changes = trio.Event()  # replaced when one has come or gone, or become complete
        self._config = config
        self._output = output
        self._store = store
        self._make_source = make_source
        self._arriving = trio.Semaphore(MAX_ARRIVING)
        self._silent: dict[str, trio.CancelScope] = {}  # those that have said nothing, the longest first
        self._places: dict[str, int] = {}  # by name of a virtual machine, from when it is promised one: its memory
        self._sets = workingset.Sets()
        self._listening: dict[str, str] = {}  # by path: the name in the store
        self._not_listening: set[str] = set()  # images that have no socket, and why, as it was said last
        self._quits = False  # by request: no other process is to go on
        self._unfit: list[str] | None = [] if store.on_trial else None  # what it cannot serve; None: not on trial
        self._refused = self._ended = self._served = self._left = 0

    # ---- its life

    async def run(self, stop: Stop) -> bool:
        """Until `stop`, or the store says `leave`."""
        self.stop = stop
        done = False
        try:
            async with trio.open_nursery() as tasks:
                await self._begin(tasks)
                await self._until_end()
                if self._config.kill_when_lost and not self._leaves():
                    for vm in self.vms:
                        if not vm.complete:
                            vm.kill()
                tasks.cancel_scope.cancel()
            done = True
        finally:
            # (Not after a mistake here: another process goes on where there is a keeper.)
            if (done or trio.current_effective_deadline() == -math.inf) and not self._is_left():
                await _shielded(self._close_sockets)
        if not self._store.leave.is_set():
            self._output.emit(
                "result",
                records.PagerResult(
                    side=self.side, status="completed", error=None, served=self._served, left=self._left
                ),
            )
        return True

    async def _begin(self, tasks: trio.Nursery) -> None:
        lost = [
            failed
            for key, fds in list(self._store.taken.items())
            if (failed := await self._take_over(tasks, key, fds)) is not None
        ]
        if self._unfit is not None:
            await self._pass_trial(self._unfit, lost)
        try:
            if not self.vms:
                check(self._config)
                self._check_working_set()
            await self._open_sockets()
        except PostcopyError as error:
            # Those that are here are served in any case, also when an option makes no sense any more. Where there are
            # none, a keeper ends with this process, which has not said `ready`.
            if not self.vms:
                raise
            log.error("%s", error)
        await self._store.ready()
        for each in lost:  # not before: until then the engine before this one would go on
            await self._give_up(each)
        tasks.start_soon(contained, "watching the directory of images", self._watch_images)
        tasks.start_soon(contained, "telling progress", self._tell_progress)
        tasks.start_soon(self._accept, tasks)

    async def _pass_trial(self, unfit: list[str], lost: list[_Lost]) -> None:
        """Of an engine that replaces one of another version: `ResourceError` when it does not serve what that one does,
        which goes on then. A disk that hangs does not keep it from serving."""
        unfit += [f"{each.about.name}: {each.error}" for each in lost]
        with trio.move_on_after(TRIAL_S):
            while not unfit and not all(vm.served.is_set() for vm in self.vms):  # noqa: ASYNC110 -- or are gone
                await trio.sleep(0.01)
        if unfit:  # still on trial: what fails from here on must not be killed either
            for each in lost:
                each.fds.close()
            raise ResourceError(f"this engine cannot serve what is here, and gives way to the one before: {unfit[0]}")
        self._unfit = None

    async def _until_end(self) -> None:
        async def see_through() -> None:
            await self.stop.wait()
            while (needed := self.needed()) and not self.stop.insisted:
                if not self.stop.has_warned:
                    self.stop.warned()
                    self._output.say(f"{self.side}: Still needed: {needed}. {self._how_to_insist()}")
                await first_of(self.changes.wait, self.stop.changes.wait)
            self.stop.settled()

        await first_of(see_through, self._store.leave.wait)

    def needed(self) -> str:
        """Which virtual machines need this process; empty when none does, or another process goes on with them."""
        return "" if self._leaves() else self._incomplete()

    def _incomplete(self) -> str:
        waiting = [vm.about.name for vm in self.vms if not vm.complete]
        if not waiting:
            return ""
        names = ", ".join(waiting[:5]) + (", ..." if len(waiting) > 5 else "")
        return f"{format_count(len(waiting), 'virtual machine')} with missing pages ({names})"

    def _leaves(self) -> bool:
        """Whether this process leaves its virtual machines as they are, for another one, if it ends now."""
        return self._store.leave.is_set() or (self._store.outlives and not self._quits)

    def _is_left(self) -> bool:
        """Whether what is let go of now is left to another process: also where this one ends by a mistake."""
        return self._leaves() or (self._store.restarts and not self.stop.is_set())

    def _how_to_insist(self) -> str:
        way = f"{self.stop.by} again within {INSIST_S:g} s" if self.stop.by else ""
        if self.control is not None:
            quit = f"`postcopy ctl --control {shlex.quote(self.control)} quit --force`"
            way = f"{way}, or {quit}," if way else quit
        what = "kills them" if self._config.kill_when_lost else "leaves them frozen where they need a page"
        return f"{way} {what}."

    def _changed(self) -> None:
        self._output.kick()
        self.changes.set()
        self.changes = trio.Event()

    # ---- sockets and images

    async def _open_sockets(self) -> None:
        """That of ``--socket``, those that a service manager has given, and those of images."""
        for name, fd in self._store.listeners.items():
            self._listening[_path_of(fd)] = name
        before = list(self._listening)
        if self._config.images is not None:
            await self._look_for_images()
        elif self._config.socket is not None:
            await self._listen("socket", absolute(self._config.socket))
        elif not before:
            raise ConfigurationError("--socket PATH is missing: systemd has given no socket to listen on")
        for path in before:
            if path in self._listening:
                self._announce(path)

    async def _listen(self, name: str, path: str) -> None:
        if path in self._listening:
            return
        name = f"{OWN}{name}@"
        listener = await listen(path, "--socket", 0o666 if self._config.allow_uid else 0o600)
        with listener:
            listener.setblocking(False)
            try:
                await self._store.put(name, [listener.fileno()])
            except PostcopyError:
                _remove_socket(path)
                raise
        self._listening[path] = name
        self._announce(path)

    def _is_own(self, path: str) -> bool:
        """Whether its socket was made by this process, or one before it, and is removed at the end."""
        return self._listening[path].startswith(OWN)

    def _announce(self, path: str) -> None:
        image = self._image_of(path)
        self._output.emit("listening", records.PagerListening(side=self.side, socket=path, image=image))
        source = self._config.connect
        of = image or ("a program" if source is None else f"the source at {source.address}")
        self._output.say(f"{self.side}: listening on {path} for virtual machines with the pages of {of}")

    def _image_of(self, path: str) -> str | None:
        """The image whose pages are served at a socket; None where a host or a program has them."""
        config = self._config
        if config.images is None:
            return None if config.image is None else absolute(config.image)
        name = os.path.basename(path).removesuffix(SOCKET_SUFFIX)
        return os.path.join(absolute(config.images), name + IMAGE_SUFFIX)

    def _file_of(self, directory: str | None, image: str | None) -> str | None:
        """The working set of an image: the file that was named, or with ``--images`` that of its name."""
        if directory is None or self._config.images is None or image is None:
            return directory
        return os.path.join(directory, os.path.basename(image).removesuffix(IMAGE_SUFFIX) + SET_SUFFIX)

    def _check_working_set(self) -> None:
        """At the beginning: a stale one is refused. (It may be replaced later.)"""
        config = self._config
        if config.image is None or config.working_set is None:
            return
        image = Image.open(config.image)
        try:
            with contextlib.suppress(workingset.DamagedError):  # said when it would be used
                self._sets.read(config.working_set, image)
        finally:
            image.close()

    async def _watch_images(self) -> None:
        while self._config.images is not None:
            await trio.sleep(SCAN_S)
            await self._look_for_images()

    async def _look_for_images(self) -> None:
        """Has a socket for each image, as long as there is one. What does not work is tried again the next time."""
        config, failures = self._config, set[str]()
        assert config.images is not None
        directory = absolute(config.socket or config.images)
        try:
            names = await run_sync(_names_in, absolute(config.images))
        except PostcopyError as error:
            failures.add(str(error))
        else:
            paths = {os.path.join(directory, name + SOCKET_SUFFIX): name for name in names}
            for path in [path for path in self._listening if self._is_own(path) and path not in paths]:
                await self._close_socket(path)
            for path, name in sorted(paths.items()):
                try:
                    await self._listen(name, path)
                except PostcopyError as error:
                    failures.add(f"{name}: {error}")
        for failure in sorted(failures - self._not_listening):
            log.error("%s", failure)
        self._not_listening = failures

    async def _close_socket(self, path: str) -> None:
        await self._store.drop(self._listening.pop(path))
        _remove_socket(path)

    async def _close_sockets(self) -> None:
        for path in list(self._listening):
            if self._is_own(path):
                await self._close_socket(path)

    # ---- arrivals

    async def _accept(self, tasks: trio.Nursery) -> None:
        while True:
            key, fd = await self._store.accept()
            connection = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
            try:
                if not self._arriving.value and self._silent:
                    self._silent.pop(next(iter(self._silent))).cancel()
                await self._arriving.acquire()
            except trio.Cancelled:
                connection.close()
                raise
            tasks.start_soon(contained, f"serving {key}", partial(self._arrive, key, connection))

    async def _arrive(self, key: str, connection: trio.socket.SocketType) -> None:
        """A connection, and the virtual machine that it becomes, to its end."""
        handshake: Handshake | None = None
        peer, pidfd, path = Credentials(0, -1, -1), -1, ""
        vm: Vm | None = None
        keep = False
        try:
            with connection:
                try:
                    peer, path = peer_credentials(connection), _path_of(connection.fileno())
                    self._check_peer(peer)
                    pidfd = open_peer(connection, peer)
                    handshake = await self._hear(key, connection)
                finally:
                    self._arriving.release()  # its image may be on a disk that hangs: --max-vms bounds those
                vm = await self._make(key, connection, handshake, peer, pidfd, path)
            await self._serve(vm)
        except PostcopyError as error:
            self._refuse(error, handshake is not None, peer, pidfd, path)
        except trio.Cancelled:
            keep = self._is_left()
            raise
        finally:
            if handshake is not None:
                handshake.close()
            if pidfd >= 0:
                os.close(pidfd)
            if vm is not None:
                await self._drop(vm)
            elif not keep:
                await _shielded(self._store.drop, key)

    async def _hear(self, key: str, connection: trio.socket.SocketType) -> Handshake:
        """What it says. When all places are taken, the one that has been silent for longest makes room."""
        with trio.CancelScope() as silent:
            self._silent[key] = silent
            try:
                return await receive_handshake(connection, peek=True)
            finally:
                self._silent.pop(key, None)
        raise ProtocolError("it had said nothing yet when its place was needed for another one")

    def _check_peer(self, peer: Credentials) -> None:
        if peer.uid not in (0, os.geteuid(), *self._config.allow_uid):
            raise ProtocolError(f"it is of user {peer.uid}, whom --allow-uid does not name")
        if self.stop.is_set() and not self._leaves():
            raise ResourceError("this process is ending")

    async def _make(
        self,
        key: str,
        connection: trio.socket.SocketType,
        handshake: Handshake,
        peer: Credentials,
        pidfd: int,
        path: str,
    ) -> Vm:
        """What the store has all of. It has copies of the descriptors."""
        if len({region.page_bytes for region in handshake.regions}) > 1:
            raise ProtocolError("its regions have pages of different sizes")
        if not_served := UffdFeature(handshake.features) & _NOT_SERVED:
            raise ProtocolError(f"its userfaultfd has {not_served.name}, which cannot be served from outside")
        image = self._image_of(path)
        about = About.of(handshake, peer, self._name(image, peer), path, image, self._store.deaths)
        self._promise(about)
        source: Source | None = None
        try:
            source = await self._open_source(about)
            source.check(about)
            fds = Descriptors.make(
                about,
                uffd=handshake.uffd,
                pidfd=pidfd,
                image=-1 if source.image is None else source.image.fd,
                connection=connection.fileno(),
            )
            try:
                await self._store.put(key, fds.kept)
                consume_handshake(connection)
            except BaseException:
                fds.close()
                raise
        except BaseException:
            del self._places[about.name]
            if source is not None:
                source.close()
            raise
        return self._new(key, fds, about, source)

    async def _open_source(self, about: About) -> Source:
        if about.image is not None:
            # (A limiter of its own: one whose disk hangs takes no thread that another one needs.)
            image = await trio.to_thread.run_sync(
                Image.open, about.image, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True
            )
            return ImageSource(image, self._sets)
        config = self._config
        if config.connect is not None:
            return ConnectSource(
                config.connect,
                config.protection,
                recover_for_s=config.recover_for_s,
                background=config.prefetch == "all",
                policy=config.policy,
            )
        if self._make_source is not None:
            try:
                return ProgramSource(self._make_source(about))
            except PostcopyError:
                raise
            except Exception as error:  # the program's code: whatever it raises is the reason
                raise PeerError(f"its page source cannot be made: {type(error).__name__}: {error}") from error
        raise ConfigurationError("there is nothing to take its pages from")

    def _promise(self, about: About) -> None:
        """A place, and memory, from here on. `ResourceError` where there is no more."""
        config, promised_bytes = self._config, sum(self._places.values())
        if len(self._places) >= config.max_vms:
            raise ResourceError(f"there are {len(self._places)} virtual machines", "allow more: --max-vms")
        limit = math.inf if config.max_memory_bytes is None else config.max_memory_bytes
        if promised_bytes + about.memory_bytes > limit:
            raise ResourceError(
                f"the virtual machines have {format_size(promised_bytes)} of memory, and this one"
                f" {format_size(about.memory_bytes)}",
                "allow more: --max-memory",
            )
        self._places[about.name] = about.memory_bytes

    def _name(self, image: str | None, peer: Credentials) -> str:
        """One that no other one has."""
        stem = os.path.basename(image or "vm").partition(".")[0][:_MAX_STEM_CHARS]
        base = f"{stem if is_name(stem) else 'vm'}-{peer.pid}"
        name, number = base, 1
        while name in self._places:
            number += 1
            name = f"{base}.{number}"
        return name

    def _refuse(self, error: PostcopyError, spoken: bool, peer: Credentials, pidfd: int, path: str) -> None:
        """`spoken`: it has sent its userfaultfd, and may wait for a page."""
        if isinstance(error, ConnectionLost):
            log.info("a connection at %s: %s", path, error)
            return
        killed = False
        if spoken and self._config.kill_when_lost and pidfd >= 0:
            killed = _kill(pidfd)
        self._refused += 1
        self._output.emit("vm-refused", records.VmRefused(pid=peer.pid, socket=path, reason=str(error), killed=killed))
        log.warning("refused process %d at %s: %s%s", peer.pid, path, error, "; killed it" if killed else "")

    # ---- those that are served

    async def _take_over(self, tasks: trio.Nursery, key: str, fds: list[int]) -> _Lost | None:
        """From a process before this one."""
        try:
            descriptors, about = Descriptors.sort(fds)
        except PostcopyError as error:
            log.error("%s: %s; it is left to another version of postcopy", key, error)
            if self._unfit is not None:  # which is there still
                self._unfit.append(f"{key}: {error}")
            return None
        try:
            if descriptors.image >= 0 and about.image is not None:
                image = Image(about.image, os.dup(descriptors.image))
                source: Source = ImageSource(image, self._sets)
            else:
                source = await self._open_source(about)
        except (PostcopyError, OSError) as error:
            return _Lost(key, descriptors, about, str(error))
        self._places[about.name] = about.memory_bytes
        vm = self._new(key, descriptors, about, source)

        async def serve() -> None:
            try:
                await self._serve(vm, taken_over=True)
            finally:
                await self._drop(vm)

        tasks.start_soon(contained, f"serving {about.name}", serve)
        return None

    async def _give_up(self, lost: _Lost) -> None:
        name, pidfd = lost.about.name, lost.fds.pidfd
        killed = self._config.kill_when_lost and pidfd >= 0 and _kill(pidfd)
        lost.fds.close()
        log.error("%s: it is not served: %s%s", name, lost.error, "; killed it" if killed else "")
        self._output.emit("vm-lost", records.VmLost(vm=name, reason=lost.error, killed=killed))
        if killed:
            await self._store.drop(lost.key)

    def _new(self, key: str, fds: Descriptors, about: About, source: Source) -> Vm:
        config = self._config
        working_set = self._file_of(config.working_set, about.image)
        prefetch = config.prefetch or ("none" if working_set is None else "working-set")
        options = VmOptions(
            readers=config.readers,
            busy_poll_us=config.busy_poll_us,
            prefetch_all=prefetch == "all",
            working_set=None if prefetch == "none" else working_set,
            record_to=self._file_of(config.record_working_set, about.image),
            record_for_s=config.record_for_s,
            changed=self._changed,
            lost=self._lost,
            recovered=self._recovered,
            recorded=self._recorded,
            records=self._output.records and sum(vm.is_recorded for vm in self.vms) < MOST_RECORDED,
            leave=self._is_left,
        )
        vm = Vm(key, fds, about, source, options)
        self.vms.append(vm)
        return vm

    async def _serve(self, vm: Vm, *, taken_over: bool = False) -> None:
        about = vm.about
        vm.taken_over = taken_over
        self._served += 1
        self._changed()

        async def announce() -> None:
            await vm.served.wait()
            self._output.emit(
                "vm-connected",
                records.VmConnected(
                    vm=about.name, pid=about.pid, socket=about.socket, memory=about.memory_bytes, taken_over=taken_over
                ),
            )
            what = "taken over" if taken_over else "connected"
            self._output.say(f"{self.side}: {about.name}: {what}, {format_size(about.memory_bytes)}")

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(announce)
                await vm.run()
                nursery.cancel_scope.cancel()
        except Exception:
            vm.lose("a mistake in postcopy, see its log", for_good=True)
            raise
        finally:
            self.vms.remove(vm)
            del self._places[about.name]
            vm.source.close()
            self._finished(vm)
            self._changed()

    async def _drop(self, vm: Vm) -> None:
        """It needs nothing any more, or nobody: one that cannot be served by a mistake in this process is left to the
        next one."""
        if vm.ended or (vm.error is None and not self._is_left()):
            await _shielded(self._store.drop, vm.key)

    def _finished(self, vm: Vm) -> None:
        if not vm.ended and (self._is_left() if vm.error is None else self._leaves()):
            return  # another process goes on
        if vm.ended:
            self._ended += 1
        reason = vm.ended or vm.error or ("it needs nobody any more" if vm.complete else "this process has ended")
        if vm.killed and not vm.ended:  # at this process's end
            reason = "its process was killed"
        elif not vm.ended and not vm.complete:
            self._left += 1
        contained_call(f"telling how {vm.about.name} was served", partial(self._emit_timeline, vm))
        self._output.emit("vm-ended", records.VmEnded(vm=vm.about.name, reason=reason, figures=self._record(vm)))
        self._output.say(f"{self.side}: {vm.about.name}: {reason}")

    def _emit_timeline(self, vm: Vm) -> None:
        if (recorder := vm.recorder) is not None and (recording := recorder.recording()) is not None:
            self._output.emit(
                "timeline",
                VmTimeline(side=self.side, vm=vm.about.name, figures=self._record(vm), recording=recording),
            )

    def _lost(self, vm: Vm) -> None:
        if self._unfit is not None and not vm.lost.is_set():  # for good: in this version
            self._unfit.append(f"{vm.about.name}: {vm.error}")
            return
        killed = False
        if self._config.kill_when_lost:
            why = vm.kill()
            killed = not why
            if why:
                log.error("%s: %s", vm.about.name, why)
        reason = vm.error or ""
        self._output.emit("vm-lost", records.VmLost(vm=vm.about.name, reason=reason, killed=killed))
        done = "killed" if killed else "held where it needs a page"
        log.error("%s: its pages cannot be had: %s; %s", vm.about.name, reason, done)
        self._changed()

    def _recovered(self, vm: Vm) -> None:
        self._output.emit("vm-recovered", records.VmRecovered(vm=vm.about.name))
        log.warning("%s: its pages can be had again", vm.about.name)
        self._changed()

    def _recorded(self, vm: Vm, path: str, pages: int) -> None:
        self._output.emit("working-set", records.WorkingSetRecorded(vm=vm.about.name, path=path, set_pages=pages))
        self._output.say(
            f"{self.side}: {vm.about.name}: {format_count(pages, 'page')} of its working set are in {path}"
        )

    # ---- what is shown

    def _record(self, vm: Vm) -> records.Vm:
        # (a keeper that systemd has started anew counts from 0)
        return vm_record(vm, max(0, self._store.deaths - vm.about.deaths))

    def status(self, name: str | None = None) -> records.PagerStatus:
        """Of the process and all virtual machines, or of the one with this name."""
        store = self._store.status()
        return records.PagerStatus(
            side=self.side,
            pid=os.getpid(),
            listening=sorted(self._listening),
            keeper=records.Keeper(store=str(store["store"]), deaths=self._store.deaths, spare=bool(store.get("spare"))),
            refused=self._refused,
            ended=self._ended,
            vms=[self._record(vm) for vm in self.vms if name in (None, vm.about.name)],
        )

    async def _tell_progress(self) -> None:
        while True:
            began_s = time.monotonic()
            self._output.emit("progress", self.status())
            # A thousand of them are told of less often: it takes a twentieth of a processor at most.
            await trio.sleep(max(PROGRESS_S, 20 * (time.monotonic() - began_s)))

    def make_metrics(self) -> VmMetrics:
        from postcopy.handler._metrics import VmMetrics  # megabytes, where they are not asked for

        return VmMetrics(self.status, lambda: self.vms)

    # ---- what may be asked

    async def execute(self, request: schema.Request) -> Record:
        """For the control socket."""
        await trio.lowlevel.checkpoint()
        arguments = request.arguments
        name = arguments.get("machine")
        if name is not None and all(vm.about.name != name for vm in self.vms):
            raise ControlError("BadArguments", f"there is no virtual machine {name!r} here")
        match request.command:
            case "commands":
                known = ("commands", "status", "events", "end", "upgrade", "quit")
                return Commands(
                    commands=[
                        Command(
                            name=each, help=schema.COMMANDS[each].help, arguments=list(schema.COMMANDS[each].arguments)
                        )
                        for each in known
                    ]
                )
            case "status":
                return self.status(name)
            case "end":
                return self._end(name, bool(arguments.get("force")))
            case "upgrade":
                return await self._upgrade(arguments.get("program"))
            case "quit":
                return self._quit(bool(arguments.get("force")))
        raise ControlError("CommandNotFound", f"{request.command} has no meaning for a pager")

    def _end(self, name: str | None, force: bool) -> Record:
        if name is None and len(self.vms) != 1:
            raise ControlError("BadArguments", "choose a virtual machine with --machine NAME; `ctl status` shows them")
        vm = next(vm for vm in self.vms if name in (None, vm.about.name))
        if not force:
            raise ControlError("NotNow", f"{vm.about.name} would be killed: say --force")
        if why := vm.kill():
            raise ControlError("Failed", why)
        return EndedMachine(machine=vm.about.name)

    async def _upgrade(self, program: str | None) -> Record:
        if program is None:
            command = python(*sys.orig_argv[1:])
        else:
            command = [absolute(program), *sys.argv[1:]]
            if shutil.which(command[0]) is None:
                raise ControlError("BadArguments", f"{command[0]}: there is no program that this user may run")
        await self._store.upgrade(command)
        return Done()

    def _quit(self, force: bool) -> Record:
        if not force and (needed := "" if self._store.leave.is_set() else self._incomplete()):
            raise ControlError("NotNow", f"still needed: {needed}; wait, or say quit --force")
        self._quits = True
        if force:
            self.stop.insist()
        else:
            self.stop.set()
        return Done()


def check(config: PagerConfig) -> None:
    """`ConfigurationError` for what cannot be served, before anything is."""
    if config.image is not None:
        Image.open(config.image).close()
    if config.images is not None:
        _names_in(absolute(config.images))
        if config.socket is not None and not os.path.isdir(config.socket):
            raise ConfigurationError(f"--socket {config.socket}: with --images it is a directory, which must exist")
    for name, path in (("working-set", config.working_set), ("record-working-set", config.record_working_set)):
        if path is None:
            continue
        if config.connect is not None:
            raise ConfigurationError(f"--{name} goes with --image or --images")
        if config.images is not None and not os.path.isdir(path):
            raise ConfigurationError(f"--{name} {path}: with --images it is a directory, which must exist")
    if config.record_working_set is not None and config.images is None:
        check_new_file("--record-working-set", config.record_working_set)
        with contextlib.suppress(FileNotFoundError):
            if config.image is not None and os.path.samefile(config.image, config.record_working_set):
                raise ConfigurationError(
                    f"--record-working-set {config.record_working_set}: that is the image, which would be replaced;"
                    " name another file"
                )
    if config.policy != NO_PREFETCH and config.connect is None:
        raise ConfigurationError(
            f"--prefetch {config.prefetch} goes with --connect: an image is here, use --prefetch all or a working set"
        )
    if config.prefetch == "working-set" and config.working_set is None:
        raise ConfigurationError("--prefetch working-set: say which one with --working-set FILE")
    if not math.isinf(config.record_for_s) and config.record_working_set is None:
        raise ConfigurationError("--record-for goes with --record-working-set")


def _path_of(fd: int) -> str:
    """Where a Unix socket is, or was, bound."""
    sock = socket.socket(fileno=fd)
    try:
        name = sock.getsockname()
    finally:
        sock.detach()
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def _names_in(directory: str) -> set[str]:
    """Those of images. `ConfigurationError` for no directory."""
    try:
        with os.scandir(directory) as entries:
            names = {entry.name.removesuffix(IMAGE_SUFFIX) for entry in entries if entry.name.endswith(IMAGE_SUFFIX)}
    except OSError as error:
        raise ConfigurationError(f"--images {directory}: {error.strerror}") from error
    return {name for name in names if is_name(name) and len(name) <= _MAX_STEM_CHARS}


def _remove_socket(path: str) -> None:
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def _kill(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        return False
    return True


async def _shielded(function: Callable[..., Awaitable[None]], *arguments: object) -> None:
    with trio.move_on_after(END_S, shield=True):  # (a keeper that does not answer)
        await function(*arguments)
