# SPDX-License-Identifier: Apache-2.0
"""The image that the handler serves: which of its pages a case can use, and how one is made."""

from __future__ import annotations

import hashlib
import mmap
import os

from postcopy._files import check_new_file, replacing
from postcopy.errors import ConfigurationError
from postcopy.testbed.conformance._client import HUGE_BYTES
from postcopy.testbed.conformance._model import NotApplicable

PAGE = 4096
_ZEROS = bytes(PAGE)
MIN_BYTES = 32 << 20
_HOLE_AT = 0.75


class Image:
    """Pages of 4 KiB: those that are not zero can be told from zeros, so cases use these."""

    def __init__(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                self.bytes = os.fstat(file.fileno()).st_size
                if self.bytes < MIN_BYTES or self.bytes % PAGE:
                    raise ConfigurationError(
                        f"--image: {path!r} has {self.bytes} bytes; it takes at least {MIN_BYTES >> 20} MiB, and whole"
                        " pages (--make-image makes one)"
                    )
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                    self._zero = [view[at : at + PAGE] == _ZEROS for at in range(0, self.bytes, PAGE)]
        except OSError as error:
            raise ConfigurationError(f"--image: cannot read {path!r}: {error.strerror}") from None
        self.path = path
        self.pages = self.bytes // PAGE

    def runs(self, pages: int, count: int = 1, align: int = 1) -> list[int]:
        """First pages of `count` runs without a page of zeros, far from each other where there is room."""
        found: list[int] = []
        page = first = 0
        while page < self.pages and len(found) < count:
            first += -first % align
            page = max(page, first)
            if page >= self.pages:
                break
            if self._zero[page]:
                first = page + 1
            elif page - first + 1 == pages:
                found.append(first)
                first = first + max(pages, min(2048, self.pages // (2 * count)))
            page = max(page + 1, first)
        if len(found) < count:
            raise NotApplicable(f"the image has no {count} runs of {pages} pages that are not zeros")
        return found

    def zero_pages(self, pages: int = 1, align: int = 1) -> int:
        """The first of so many pages of zeros."""
        for first in range(0, self.pages - pages + 1, align):
            if self._zero[first] and all(self._zero[first : first + pages]):
                return first
        raise NotApplicable(f"the image has no {pages} pages of zeros")


def make_image(path: str, size_bytes: int) -> None:
    """Each page another content; a hole of 2 MiB, and a page of zeros here and there."""
    if os.path.lexists(path):
        raise ConfigurationError(f"--make-image: {path!r} is there already")
    check_new_file("--make-image", path)
    hole = int(size_bytes * _HOLE_AT) // HUGE_BYTES * HUGE_BYTES
    with replacing(path, 0o600) as fd:
        os.ftruncate(fd, size_bytes)
        for block in range(0, size_bytes, HUGE_BYTES):
            if block == hole:
                continue
            content = bytearray()
            for page in range(block, min(block + HUGE_BYTES, size_bytes), PAGE):
                zero = page % (8 << 20) == 5 * PAGE
                content += _ZEROS if zero else hashlib.blake2b(page.to_bytes(8, "little")).digest() * (PAGE // 64)
            os.pwrite(fd, content, block)
