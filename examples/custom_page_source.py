# SPDX-License-Identifier: Apache-2.0
"""Memory whose pages are computed when they are touched: a table of the Mandelbrot set, 1 GiB of it, of which only
what is looked at is ever computed.

Run it: ``python examples/custom_page_source.py``.
"""

from __future__ import annotations

import ctypes

import trio

import postcopy

WIDTH = 4096  # a page is one row of bytes
HEIGHT = 262144
DEPTH = 255

# C code that knows nothing of lazy memory. ctypes.CDLL calls it without the GIL (ctypes.PyDLL would not).
memcmp = ctypes.CDLL(None).memcmp
memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


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

        # Four other rows, touched by C in a worker thread, with real page faults.
        expected = b"".join(compute_row(row + 1000 + number) for number in range(4))
        address = memory.address + (row + 1000) * WIDTH
        difference = await trio.to_thread.run_sync(memcmp, address, expected, len(expected))
        print(f"four more rows, touched by C: {memory.statistics().faults} faults, {source.computed} pages computed")

        assert content == compute_row(row)
        assert difference == 0
        assert source.computed == 5
    print("verified: what memory held is what the function computes, and nothing else was computed")


if __name__ == "__main__":
    trio.run(main)
