# SPDX-License-Identifier: Apache-2.0
"""A numpy array of another process, mapped lazily: one cell of it costs one page, not all of it.

Run it: ``python examples/attach_numpy.py``. A child process plays the other host; `serve` below is all it does.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import trio

import postcopy

ROWS, COLUMNS = 2048, 8192  # of int64: 128 MiB

# C code that knows nothing of lazy memory. ctypes.CDLL calls it without the GIL (ctypes.PyDLL would not).
memcmp = ctypes.CDLL(None).memcmp
memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def make_table() -> np.ndarray:
    return np.arange(ROWS * COLUMNS, dtype=np.int64).reshape(ROWS, COLUMNS) ** 2


async def serve() -> None:
    """The other host: prints its address, serves until its standard input is closed."""
    table = make_table()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(postcopy.serve, table)
        print(server.address, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def attach(address: str) -> None:
    async with postcopy.attach(address) as memory:
        print(f"attached {memory.size_bytes >> 20} MiB; here so far: {memory.statistics().resident_bytes} bytes")

        # One cell. `resident` makes its page resident, then gives a view of it; numpy must never be given more than
        # that, since it would touch a missing page with the GIL held.
        row, column = 1234, 567
        async with memory.resident((row * COLUMNS + column) * 8, 8) as view:
            cell = int(np.frombuffer(view, dtype=np.int64)[0])
        print(f"table[{row}, {column}] = {cell}; here now: {memory.statistics().resident_bytes} bytes")

        # Some rows, as an array without a copy; the next ones are asked for meanwhile.
        row_bytes = COLUMNS * 8
        total = 0
        for first in range(0, 512, 64):
            memory.prefetch((first + 64) * row_bytes, 64 * row_bytes)
            async with memory.resident(first * row_bytes, 64 * row_bytes) as view:
                rows = np.frombuffer(view, dtype=np.int64).reshape(64, COLUMNS)
                total += int(rows.sum() % 1_000_003)
                del rows
        print(f"512 rows summed; here now: {memory.statistics().resident_bytes >> 20} MiB")

        # C code needs no care: it may touch what is missing, in a worker thread, in a call that has released the GIL.
        table = make_table()  # what is expected
        rows = table[1500:1600]
        start, size = memory.address + 1500 * row_bytes, 100 * row_bytes
        difference = await trio.to_thread.run_sync(memcmp, start, rows.ctypes.data, size)
        statistics = memory.statistics()
        print(
            f"100 rows compared by C; {statistics.faults} faults were served, p50 {memory.latency().percentile(50)} ns"
        )

    assert cell == table[row, column]
    assert total == sum(int(table[first : first + 64].sum() % 1_000_003) for first in range(0, 512, 64))
    assert difference == 0
    print("verified: the cell, the rows and what C has read are those of the other process")


def main() -> None:
    if sys.argv[1:] == ["serve"]:
        trio.run(serve)
        return
    with subprocess.Popen([sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        address = child.stdout.readline().decode().strip()
        trio.run(attach, address)


if __name__ == "__main__":
    main()
