# SPDX-License-Identifier: Apache-2.0
"""Where the pages of a virtual machine come from: an image on this host, or a page source in Python.

Each virtual machine has a source of its own, which is closed with it.
"""

from __future__ import annotations

import abc
import errno
import logging
import os
import socket
from typing import TYPE_CHECKING

import trio

from postcopy.dataplane.pager import Event, EventType, Pager
from postcopy.errors import ConfigurationError, PostcopyError
from postcopy.handler._image import Image
from postcopy.lazy import PageSource
from postcopy.lazy._bridge import Bridge
from postcopy.lazy._source import check_layout
from postcopy.memory import workingset
from postcopy.units import format_size

if TYPE_CHECKING:
    from postcopy.handler._vm import About, Vm

RETRY_IMAGE_S = 1.0
"""How soon an image that could not be read is looked at again, at first."""
RETRY_IMAGE_MAX_S = 60.0

log = logging.getLogger(__name__)


class Source(abc.ABC):
    """In the order in which a virtual machine calls them."""

    image: Image | None = None

    @abc.abstractmethod
    def check(self, about: About) -> None:
        """`ConfigurationError` when it has not the memory that this virtual machine wants."""

    async def prepare(self, pager: Pager) -> None:  # noqa: B027  # most have nothing to do
        """Before any memory is armed."""

    def attach(self, pager: Pager, shard: int) -> None:  # noqa: B027
        """There is a shard, and still no memory."""

    @abc.abstractmethod
    async def run(self, vm: Vm, pager: Pager) -> None:
        """Until cancelled, beside the virtual machine."""

    async def working_set(self, vm: Vm, path: str) -> workingset.WorkingSet | None:
        """The one in a file, in the pages of the virtual machine; None, and a line in the log, when there is none."""
        return None

    def take(self, event: Event, vm: Vm) -> None:
        """An event of the pager about where its pages come from."""
        if event.type in (EventType.FATAL, EventType.CHANNEL_DOWN):
            # (what the client has registered cannot be served: no source would help)
            vm.lose(event.text or os.strerror(event.error), for_good=event.error == errno.EOPNOTSUPP)

    @abc.abstractmethod
    def prefetch_all(self, pager: Pager) -> None:
        """Behind demand."""

    def close(self) -> None:  # noqa: B027
        """Twice does no harm."""


class ImageSource(Source):
    """A memory file on this host."""

    def __init__(self, image: Image, sets: workingset.Sets) -> None:
        self.image: Image = image
        self._sets = sets

    def check(self, about: About) -> None:
        if about.memory_bytes > self.image.size_bytes:
            raise ConfigurationError(
                f"image {self.image.path} has {format_size(self.image.size_bytes)}, and the virtual machine"
                f" {format_size(about.memory_bytes)}: it is of another snapshot"
            )

    async def prepare(self, pager: Pager) -> None:
        await pager.set_local(0, self.image.fd)

    async def run(self, vm: Vm, pager: Pager) -> None:
        """Looks at an image again that could not be read."""
        pause_s, found_at = RETRY_IMAGE_S, trio.current_time()
        while True:
            await vm.lost.wait()
            if trio.current_time() - found_at > RETRY_IMAGE_MAX_S:
                pause_s = RETRY_IMAGE_S
            while vm.error is not None:
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_IMAGE_MAX_S)
                try:
                    await self.prepare(pager)
                except PostcopyError as error:
                    log.debug("%s: %s", vm.about.name, error)
                else:
                    vm.found_again()
            found_at = trio.current_time()

    async def working_set(self, vm: Vm, path: str) -> workingset.WorkingSet | None:
        try:
            found = await trio.to_thread.run_sync(self._sets.read, path, self.image, limiter=vm.limiter)
        except workingset.DamagedError as error:
            log.warning("%s; it is not used", error)
            return None
        except ConfigurationError as error:
            # (in a directory of them, an image need not have one)
            absent = isinstance(error.__cause__, FileNotFoundError)
            log.log(logging.INFO if absent else logging.ERROR, "%s: %s", vm.about.name, error)
            return None
        return found.in_pages_of(vm.about.page_bytes)

    def prefetch_all(self, pager: Pager) -> None:
        pager.prefetch_all()

    def close(self) -> None:
        self.image.close()


class ProgramSource(Source):
    """A `PageSource`: Python answers each fault. It has one block, which is the memory file."""

    MAX_FETCHES = 8
    MAX_FETCH_PAGES = 256

    def __init__(self, source: PageSource) -> None:
        self._source = source
        self._layout = check_layout(source.blocks)
        self._stream: trio.SocketStream | None = None
        self._pages = 0  # of the virtual machine: the source may have more

    def check(self, about: About) -> None:
        (block, *others) = self._layout
        if others or block.unit_bytes != about.page_bytes or block.pages < about.pages:
            raise ConfigurationError(
                f"the page source must have one block, of at least {about.pages} pages of {about.page_bytes} bytes: it"
                f" has {', '.join(f'{block.pages} of {block.unit_bytes}' for block in self._layout)}"
            )
        self._pages = about.pages

    def attach(self, pager: Pager, shard: int) -> None:
        ours, theirs = socket.socketpair()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        pager.ask_again()
        pager.attach_urgent(shard, theirs.detach())

    async def run(self, vm: Vm, pager: Pager) -> None:
        assert self._stream is not None
        bridge = Bridge(
            self._source,
            self._layout,
            max_fetches=self.MAX_FETCHES,
            max_fetch_pages=self.MAX_FETCH_PAGES,
            fault_around_pages=1,
            asks_again=True,
            on_failure=lambda error: vm.lose(str(error)),
        )
        async with self._stream:
            try:
                await bridge.run(self._stream)
            except PostcopyError as error:
                vm.lose(str(error))

    def prefetch_all(self, pager: Pager) -> None:
        pager.request_range(0, 0, self._pages)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.socket.close()
