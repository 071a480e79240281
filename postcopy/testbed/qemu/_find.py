# SPDX-License-Identifier: Apache-2.0
"""Where QEMU and our guest for it are."""

from __future__ import annotations

import re
import shutil
import subprocess

from postcopy.errors import ResourceError
from postcopy.testbed._guest import guest_file

QEMU = "qemu-system-x86_64"
OLDEST = (7, 1)
"""The first one that has postcopy-preempt, beside which we are measured."""
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
    """The kernel (-kernel) of our guest; `ResourceError` where this installation has none."""
    return guest_file("qemu-guest.elf")
