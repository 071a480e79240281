# SPDX-License-Identifier: Apache-2.0
"""What pages can come from: a protocol of two members, for files, object stores, computations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from postcopy._native import lib
from postcopy.errors import ConfigurationError


@dataclass(frozen=True)
class SourceBlock:
    """One piece of memory that a source can fill."""

    name: str
    size_bytes: int  # need not be whole pages
    page_bytes: int = 0  # the unit of `fetch`; 0: the system's page. With hugetlb memory its huge page.

    @property
    def unit_bytes(self) -> int:
        return self.page_bytes or int(lib.pc_page_bytes())

    @property
    def pages(self) -> int:
        return -(-self.size_bytes // self.unit_bytes)

    def bytes_of(self, first_page: int, count: int) -> int:
        """How many bytes these pages have: the last one of the block may be short."""
        return min(self.size_bytes, (first_page + count) * self.unit_bytes) - first_page * self.unit_bytes


class PageSource(Protocol):
    """Where pages come from. Any object with these two members is one.

    `fetch` is called in a Trio task, several times at once (`attach_source` says how many), for pages that are waited
    for. It must not look at the memory that it fills. It is cancelled when that memory is closed, which waits for it: a
    thread of `trio.to_thread.run_sync` that may take long wants ``abandon_on_cancel=True``.
    """

    @property
    def blocks(self) -> Sequence[SourceBlock]:
        """The layout; read once, when the memory is made."""

    async def fetch(self, block: int, first_page: int, count: int) -> bytes | bytearray | memoryview:
        """The content of `count` pages of block number `block`, ``blocks[block].bytes_of(first_page, count)`` bytes.

        Whatever it raises, and a result of another length, ends the memory: tasks that wait for it get a `PeerError`
        that has the exception as its cause, and no page is ever shown as zeros instead. So a source that can try again
        should do that itself.
        """


def check_layout(blocks: Sequence[SourceBlock]) -> tuple[SourceBlock, ...]:
    """The layout as a tuple. `ConfigurationError` for one that makes no sense."""
    if not 0 < len(blocks) <= lib.PC_MAX_BLOCKS:
        raise ConfigurationError(f"a page source has 1 to {lib.PC_MAX_BLOCKS} blocks, not {len(blocks)}")
    for block in blocks:
        unit = block.unit_bytes
        if unit < 1024 or unit > lib.PC_FRAME_MAX_PAYLOAD_BYTES or unit & (unit - 1):
            raise ConfigurationError(f"block {block.name!r}: {unit} is not a page size")
        if not 0 < block.size_bytes < 1 << 62:
            raise ConfigurationError(f"block {block.name!r} cannot have {block.size_bytes} bytes")
    names = [block.name for block in blocks]
    if len(set(names)) < len(names):
        raise ConfigurationError("two blocks of the page source have the same name")
    return tuple(blocks)
