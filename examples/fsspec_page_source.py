# SPDX-License-Identifier: Apache-2.0
"""A file of any filesystem that fsspec knows (an object store, HTTP, a zip file ...) as lazily mapped memory.

Run it: ``python examples/fsspec_page_source.py [URL]``. Without a URL it makes a file in fsspec's ``memory://``.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import fsspec
import trio

import postcopy


class FsspecSource:
    """One file; each fetch is one ranged read. Any filesystem with `info` and `cat_file` will do."""

    def __init__(self, url: str, **storage_options: Any) -> None:
        self._filesystem, self._path = fsspec.core.url_to_fs(url, **storage_options)
        size = self._filesystem.info(self._path)["size"]
        self.blocks = (postcopy.SourceBlock(url, size),)
        self.reads = 0

    async def fetch(self, block: int, first_page: int, count: int) -> bytes:
        start = first_page * self.blocks[0].unit_bytes
        end = start + self.blocks[0].bytes_of(first_page, count)
        self.reads += 1
        # fsspec's own face is synchronous. An error, and a file that has become shorter, end the memory with PeerError.
        content: bytes = await trio.to_thread.run_sync(self._filesystem.cat_file, self._path, start, end)
        return content


async def main() -> None:
    if len(sys.argv) > 1:
        url = sys.argv[1]
    else:
        url = "memory://example/data.bin"
        with fsspec.open(url, "wb") as file:
            file.write(random.Random(1).randbytes(20_000_000))

    source = FsspecSource(url)
    # A store with a long way to it wants fewer, larger reads: 64 pages for each that is touched, up to 1 MiB.
    async with postcopy.attach_source(source, fault_around_pages=64, max_fetch_pages=256) as memory:
        middle = memory.size_bytes // 2
        size = min(100, memory.size_bytes - middle)
        piece = await memory.read(middle, size)
        print(f"{url}: {memory.size_bytes} bytes mapped; {source.reads} read for {size} bytes in the middle")
        whole = await memory.read()
        print(f"all of it: {source.reads} reads")

    with fsspec.open(url, "rb") as file:
        content = file.read()
    assert whole == content
    assert piece == content[middle : middle + size]
    print("verified: memory and file are the same")


if __name__ == "__main__":
    trio.run(main)
