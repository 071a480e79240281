# SPDX-License-Identifier: Apache-2.0
"""What a case has in its hands: clients, the handler, a slow image, and the words for what went wrong."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from postcopy.testbed.conformance._client import (
    ANON,
    EVENT_REMOVE,
    HUGE,
    MISSING,
    NOT_YET,
    Client,
    Content,
    Gone,
    Pending,
    open_client,
)
from postcopy.testbed.conformance._handler import Handler, HandlerCommands
from postcopy.testbed.conformance._image import Image
from postcopy.testbed.conformance._model import Failed, Json, NotApplicable
from postcopy.testbed.conformance._slow import SlowImage, open_slow_image

IMAGE, ZERO, OWN = Content.IMAGE, Content.ZERO, Content.OWN
START_S = 30.0
"""In which a handler that was started has to listen: many are started at once."""


@dataclass(frozen=True)
class Settings:
    image: Image
    commands: HandlerCommands | None
    socket: str | None
    deadline_s: float
    """Within which a handler does what it has to do."""
    slow_s: float
    """How long a slow source takes for a page."""
    idle_s: float
    silent_s: float
    """Within which a client that says nothing is sent away."""
    jail_uid: int | None

    @property
    def case_s(self) -> float:
        """After which a case is given up, whatever it waits for."""
        return 30 + START_S + 6 * self.deadline_s + self.slow_s + self.idle_s + self.silent_s


class Kit:
    """Of one case."""

    def __init__(self, settings: Settings, handler: Handler, directory: str) -> None:
        self.settings = settings
        self.image = settings.image
        self.handler = handler
        self.directory = directory
        self.deadline_s = settings.deadline_s
        self.seen_handler = handler
        """The one that was tested last, also when it has ended."""

    # ---- handlers

    @asynccontextmanager
    async def own_handler(self, image: str | None = None) -> AsyncIterator[Handler]:
        """One that no other case uses, from here on the one that clients connect to."""
        if self.settings.commands is None:
            raise NotApplicable("needs a handler that it can start: --handler-cmd")
        directory = os.path.join(self.directory, "own")
        make_directory(directory)
        before, self.handler = self.handler, Handler(self.settings.commands, directory, image or self.image.path)
        try:
            self.handler.start()
            self.seen_handler = self.handler
            yield self.handler
        finally:
            await self.handler.end()
            self.handler = before

    @asynccontextmanager
    async def slow_handler(self) -> AsyncIterator[SlowImage]:
        """A handler of its own, whose image answers when the case says so."""
        if self.settings.commands is None or "{image}" not in self.settings.commands.start:
            raise NotApplicable("needs an image that it can slow down: --handler-cmd with {image}")
        mount = os.path.join(self.directory, "mount")
        async with open_slow_image(self.image.path, mount) as slow, self.own_handler(slow.path):
            try:
                yield slow
            finally:
                slow.fail()  # whatever reads there must be able to die

    # ---- clients

    @asynccontextmanager
    async def bare_client(self) -> AsyncIterator[Client]:
        async with open_client(self.image.path) as client:
            yield client

    @asynccontextmanager
    async def mapped_client(
        self,
        sizes: list[int] | None = None,
        *,
        page_bytes: int = 4096,
        kind: int = ANON,
        shift: int = 0,
        below: bool = False,
        features: int = EVENT_REMOVE,
        mode: int = MISSING,
    ) -> AsyncIterator[Client]:
        """With memory that is registered; not connected."""
        async with self.bare_client() as client:
            try:
                await client.map(
                    sizes or [self.image.bytes], page_bytes=page_bytes, kind=kind, shift=shift, below=below
                )
                answer = await client.do("uffd", features, mode)
            except OSError as error:
                raise NotApplicable(f"no such memory, or userfaultfd, here: {error.strerror}") from None
            if answer["user_only"]:
                raise NotApplicable("this user's userfaultfd is for faults of user code only; see `postcopy probe`")
            yield client

    @asynccontextmanager
    async def client(
        self, sizes: list[int] | None = None, *, generation: str = "both", **options: int | bool
    ) -> AsyncIterator[Client]:
        """That the handler serves."""
        async with self.mapped_client(sizes, **options) as client:  # type: ignore[arg-type]
            await self.connect(client)
            await client.send(client.message(generation))
            yield client

    async def connect(self, client: Client) -> None:
        """To a handler that may only just have been started."""
        began_s = trio.current_time()
        while True:
            try:
                return await client.connect(self.handler.path, 0.1)
            except OSError as error:
                starting = self.settings.commands is not None and not self.handler.death
                patience_s = max(self.deadline_s, START_S) if starting else self.deadline_s
                if error.errno not in NOT_YET or trio.current_time() - began_s > patience_s:
                    raise Failed(f"cannot connect to {self.handler.path}: {error.strerror}") from None

    # ---- touching

    async def begin_check(
        self, client: Client, first: int, count: int = 1, expected: Content = IMAGE, *, stride: int = 1,
        threads: int = 1, write: bool = False, apart: bool = False,
    ) -> Pending:  # fmt: skip
        return await client.begin("check", first, count, stride, threads, write | apart << 1, int(expected))

    def judge(self, answer: Json, expected: Content, what: str) -> None:
        if answer["wrong"]:
            meant = " or ".join(part.name.lower() for part in Content if part in expected and part.name)
            raise Failed(
                f"{what}: {answer['wrong']} of {answer['pages']} pages are wrong; page {answer['page']} has"
                f" {answer['found']} instead of {meant}"
            )

    async def finish(self, pending: Pending, expected: Content = IMAGE, what: str = "", within_s: float = 0.0) -> Json:
        answer = await pending.answer(within_s or self.deadline_s, what or "a fault is not answered")
        self.judge(answer, expected, what or "touched")
        return answer

    async def check(
        self, client: Client, first: int, count: int = 1, expected: Content = IMAGE, what: str = "", *,
        stride: int = 1, threads: int = 1, write: bool = False, apart: bool = False, within_s: float = 0.0,
    ) -> Json:  # fmt: skip
        """Touches pages. `Failed` when they do not come within the deadline (and 2 ms for each), or are wrong."""
        pending = await self.begin_check(
            client, first, count, expected, stride=stride, threads=threads, write=write, apart=apart
        )
        return await self.finish(pending, expected, what, within_s or self.deadline_s + count / 500)

    async def discard(
        self, client: Client, first: int, count: int = 1, what: str = "", *, chunk: int = 0, more: int = 0
    ) -> Json:
        """As a balloon does. It ends when the handler has read the event."""
        pending = await client.begin("discard", first, count, chunk or count, more)
        return await pending.answer(
            self.deadline_s + count / 1000, what or "madvise(MADV_DONTNEED), a REMOVE that is not read"
        )

    async def check_others(self, what: str = "nothing has happened yet") -> None:
        """Another client is served."""
        async with self.client() as other:
            try:
                await self.check(other, self.image.runs(4)[0], 4)
            except Failed as error:
                raise Failed(f"{what}, and another client is not served: {error}") from None

    async def hold(self, client: Client, page: int, ms: int) -> None:
        """COPY says EAGAIN from now on for about so long, without an event that anybody could wait for."""
        for number in range(36):
            await self.check(client, page, 1, IMAGE | ZERO)
            pending = await client.begin("hold", page, ms, number)
            answer = await pending.answer(self.deadline_s + 1, "a REMOVE that is not read")
            if answer["held"]:
                return
            await client.do("hold-end")
        raise NotApplicable("the kernel did not say EAGAIN: this host's scheduler did not keep a thread from running")


def make_directory(path: str) -> None:
    """Through which clients of other users get to the socket, whatever the umask is."""
    os.mkdir(path)
    os.chmod(path, 0o755)


__all__ = ["ANON", "HUGE", "IMAGE", "OWN", "ZERO", "Gone", "Kit", "Settings", "make_directory"]
