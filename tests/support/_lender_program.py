# SPDX-License-Identifier: Apache-2.0
"""The program of `lender`: it reads orders from standard input, one a line, and answers each with a line.

``address``: where its memory is; ``write PAGE``: to its first word; ``run SEED``: at random from then on; ``crc``: of
all of it; ``uffd FEATURES``: opens a userfaultfd, and answers with its descriptor; ``close``: closes that. (It imports
nothing of the package: that would take longer than the test.)
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import random
import struct
import sys
import threading
import zlib

USERFAULTFD = {"x86_64": 323, "aarch64": 282}[platform.machine()]
UFFDIO_API = 0xC018AA3F


def open_userfaultfd(features: int) -> int:
    fd = ctypes.CDLL(None, use_errno=True).syscall(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    fcntl.ioctl(fd, UFFDIO_API, struct.pack("=QQQ", 0xAA, features, 0))
    return int(fd)


def run(memory: ctypes.Array[ctypes.c_uint64], seed: int) -> None:
    numbers = random.Random(seed)
    while True:
        memory[numbers.randrange(len(memory))] = numbers.getrandbits(64)


def main(fd: int) -> None:
    memory = mmap.mmap(fd, 0)
    words = (ctypes.c_uint64 * (len(memory) // 8)).from_buffer(memory)
    uffd = -1
    for line in sys.stdin:
        order, *arguments = line.split()
        answer = 0
        if order == "address":
            answer = ctypes.addressof(words)
        elif order == "write":
            words[int(arguments[0]) * (mmap.PAGESIZE // 8)] = 1
        elif order == "run":
            threading.Thread(target=run, args=(words, int(arguments[0])), daemon=True).start()
        elif order == "crc":
            answer = zlib.crc32(memory)
        elif order == "uffd":
            answer = uffd = open_userfaultfd(int(arguments[0]))
        elif order == "close" and uffd >= 0:
            os.close(uffd)
            uffd = -1
        print(answer, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
