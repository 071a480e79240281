# SPDX-License-Identifier: Apache-2.0
"""Where the binary of Firecracker and our guest for it are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from postcopy.errors import ResourceError
from postcopy.testbed._guest import guest_file

BINARY = "POSTCOPY_FIRECRACKER"
"""The environment variable that names it."""
REMEDY = (
    f"take it from github.com/firecracker-microvm/firecracker/releases and name it with {BINARY}=PATH, or put it into"
    " PATH; in a checkout: .venv/bin/python tools/fetch_firecracker.py"
)


def find() -> str:
    """The path of the binary: what $POSTCOPY_FIRECRACKER says, else in PATH, else beside this Python (where
    tools/fetch_firecracker.py puts it). `ResourceError` where there is none."""
    if named := os.environ.get(BINARY):
        if not os.access(named, os.X_OK) or os.path.isdir(named):
            raise ResourceError(
                f"{BINARY}={named}: no program that can be started", "name Firecracker's binary with it"
            )
        return os.path.abspath(named)
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    if found := shutil.which("firecracker", path=search):
        return os.path.abspath(found)
    raise ResourceError("no firecracker is installed here", REMEDY)


def version_of(binary: str) -> tuple[int, int, int]:
    """What ``firecracker --version`` says; `ResourceError` when that is no version."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"{binary} cannot be started: {error}", REMEDY) from None
    if (match := re.search(r"Firecracker v(\d+)\.(\d+)\.(\d+)", said)) is None:
        raise ResourceError(f"{binary} does not tell its version: {said[:80]!r}", REMEDY)
    return int(match[1]), int(match[2]), int(match[3])


def guest_path() -> str:
    """The kernel that a microVM is to boot; `ResourceError` where this installation has none."""
    return guest_file("firecracker-guest.elf")
