# SPDX-License-Identifier: Apache-2.0
"""A limit of address space, at whatever moment it is met: an error with a name, and no machine that is nowhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
MIB = 1 << 20


def _limited(mebibytes: int) -> tuple[str, ...]:
    enter = f'ulimit -v {mebibytes * 1024} && exec "$@"'
    return "sh", "-c", enter, "sh", sys.executable, "-P", "-m", "postcopy"


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("mebibytes", range(80, 240, 20))
@pytest.mark.parametrize("limited", ["source", "dest"])
def test_no_traceback(side: Start, tmp_path: Path, limited: str, mebibytes: int) -> None:
    """`Side.end` sees none. One side cannot go on; if the machine was not decided yet, both end."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(4 * MIB))
    commands = {limited: _limited(mebibytes)}
    source = side(
        "source", "--json", "--machine", "image", "--image", image, "--listen", "127.0.0.1:0", "--recover-for", "0",
        **({"command": commands["source"]} if "source" in commands else {}),
    )  # fmt: skip
    try:
        address = source.address
    except AssertionError:
        status, _, errors = source.end()
        assert status == 1
        assert errors.count("postcopy: error:") == 1
        return
    dest = side(
        "dest", "--json", "--connect", address, "--recover-for", "0", "--on-lost", "kill",
        **({"command": commands["dest"]} if "dest" in commands else {}),
    )  # fmt: skip
    status, result, errors = dest.end()
    assert status in (0, 1)
    assert (result.get("verified") is True) == (status == 0)
    source.signal(15)
    source.end()
