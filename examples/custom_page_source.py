# SPDX-License-Identifier: Apache-2.0
"""Memory whose pages are computed when they are touched: a table of the Mandelbrot set, 1 GiB of it, of which only
what is looked at is ever computed.

Run it: ``python examples/custom_page_source.py``.
"""

from __future__ import annotations

import trio

import postcopy
from postcopy._native import ffi, lib

WIDTH = 4096  # a page is one row of bytes
HEIGHT = 262144
DEPTH = 255


def compute_row(row: int) -> bytes:
    """How long each point of a row takes to escape."""
    y = 2.4 * row / HEIGHT - 1.2
    out = bytearray(WIDTH)
    for column in range(WIDTH):
        c = complex(3.0 * column / WIDTH - 2.25, y)
        z = 0j
        count = 0
        while count < DEPTH and z.real * z.real + z.imag * z.imag < 4.0:
            z = z * z + c
            count += 1
        out[column] = count
    return bytes(out)


class Mandelbrot:
    """A page source is anything with `blocks` and `fetch`."""

    blocks = (postcopy.SourceBlock("mandelbrot", WIDTH * HEIGHT),)

    def __init__(self) -> None:
        self.computed = 0

    async def fetch(self, block: int, first_page: int, count: int) -> bytes:
        rows = [
            await trio.to_thread.run_sync(compute_row, first_page + page)  # Trio goes on meanwhile
            for page in range(count)
        ]
        self.computed += count
        return b"".join(rows)


async def main() -> None:
    source = Mandelbrot()
    async with postcopy.attach_source(source, max_fetches=4) as memory:
        print(f"{memory.size_bytes >> 20} MiB mapped at {memory.address:#x}, {source.computed} pages computed")

        row = HEIGHT // 3
        content = await memory.read(row * WIDTH, WIDTH)
        print(f"row {row}, read by Python: {source.computed} page computed")

        # C code that knows nothing of it: a checksum over four other rows, with real page faults.
        start = memory.address + (row + 1000) * WIDTH
        crc = await trio.to_thread.run_sync(lambda: lib.pc_crc32c(0, ffi.cast("char *", start), 4 * WIDTH))
        print(f"four more rows, touched by C: {memory.statistics().faults} faults, {source.computed} pages computed")

        assert content == compute_row(row)
        expected = b"".join(compute_row(row + 1000 + number) for number in range(4))
        assert crc == lib.pc_crc32c(0, expected, len(expected))
        assert source.computed == 5
    print("verified: what memory held is what the function computes, and nothing else was computed")


if __name__ == "__main__":
    trio.run(main)
