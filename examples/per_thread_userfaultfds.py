# SPDX-License-Identifier: Apache-2.0
"""No Trio: each thread has memory and a userfaultfd of its own, and a second thread that serves it."""

from __future__ import annotations

import threading

from postcopy import Memory, Userfaultfd
from postcopy.uffd import PageFault, RegisterMode

THREADS, PAGES = 16, 32


def serve(uffd: Userfaultfd, memory: Memory, fill: bytes) -> None:
    for _ in range(PAGES):  # each page is missing once, and read by one thread
        uffd.wait()
        for event in uffd.read(max_events=1):
            if isinstance(event, PageFault):
                uffd.place(event.address & -memory.page_bytes, fill * memory.page_bytes)


def work(number: int, sums: list[int]) -> None:
    page_bytes = 4096 * 16  # whole pages on every system
    with Memory.create("anon", PAGES * page_bytes) as memory, Userfaultfd.open() as uffd:
        size_bytes = PAGES * memory.page_bytes
        uffd.register(memory.address, size_bytes, RegisterMode.MISSING)
        server = threading.Thread(target=serve, args=(uffd, memory, bytes([number])))
        server.start()
        sums[number] = sum(memory.read(0, size_bytes)) // size_bytes
        server.join()
        uffd.unregister(memory.address, size_bytes)


sums = [-1] * THREADS
threads = [threading.Thread(target=work, args=(number, sums)) for number in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("each thread has read its own number:", sums)
assert sums == list(range(THREADS))
