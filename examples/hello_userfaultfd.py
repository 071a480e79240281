# SPDX-License-Identifier: Apache-2.0
"""The smallest handler: memory of which each page is made at its first access."""

from __future__ import annotations

import trio

from postcopy import Memory, Userfaultfd
from postcopy.uffd import PageFault, RegisterMode


async def serve(uffd: Userfaultfd, memory: Memory) -> None:
    async for event in uffd:
        if isinstance(event, PageFault):
            page = (event.address - memory.address) // memory.page_bytes
            uffd.place(memory.address + page * memory.page_bytes, f"page {page} ".encode().ljust(memory.page_bytes))


async def main() -> None:
    with Memory.create("anon", 1024 * 4096 * 16) as memory, Userfaultfd.open() as uffd:
        uffd.register(memory.address, memory.size_bytes, RegisterMode.MISSING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, uffd, memory)
            for page in (0, 7, 1000):
                # In a worker thread: this one must stay free to serve the fault.
                print((await memory.aread(page * memory.page_bytes, 10)).decode())
            nursery.cancel_scope.cancel()
        uffd.unregister(memory.address, memory.size_bytes)


trio.run(main)
