# SPDX-License-Identifier: Apache-2.0
"""Where QEMU and our guest for it are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from postcopy._files import share_file
from postcopy.errors import ResourceError

QEMU = "qemu-system-x86_64"
OLDEST = (7, 1)
"""The first one that has postcopy-preempt, beside which we are measured."""
GUEST = "qemu-guest.elf"
REMEDY = "apt-get install --no-install-recommends qemu-system-x86"


def check() -> None:
    """`ResourceError` when QEMU is not here, or too old."""
    if shutil.which(QEMU) is None:
        raise ResourceError(f"QEMU is not installed: no {QEMU}", REMEDY)
    try:
        said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"{QEMU} cannot be started: {error}", REMEDY) from None
    version = re.search(r"version (\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < OLDEST:
        words = version[0] if version else "it does not tell its version"
        oldest = ".".join(map(str, OLDEST))
        raise ResourceError(f"{shutil.which(QEMU)} is too old: {words}", f"QEMU {oldest} or newer; Debian 12: {REMEDY}")


def guest_path() -> str:
    """The kernel (-kernel) of our guest; `ResourceError` where this installation has none (it is for x86-64)."""
    path = share_file(GUEST)
    if not os.path.isfile(path):
        raise ResourceError(
            f"this installation has no {GUEST}", "install it with pip, on x86-64; it is in the prefix's share/postcopy"
        )
    return path
