# SPDX-License-Identifier: Apache-2.0
"""A small Linux guest out of Debian's packages: its cloud kernel, a shell (busybox), and our first process
(csrc/machine/guest/linux.c), which works on its memory and a disk, checks both, and answers on the serial port.

`build` makes it once, in the user's cache: apt fetches the packages, and checks them as it does any; nothing is
installed, and no right of root's is needed. The kernel stays the one that was fetched until its directory is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import platform
import shutil
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postcopy._files import share_file
from postcopy.errors import ResourceError

KERNEL, SHELL = "linux-image-cloud-amd64", "busybox-static"
"""Debian's packages; the first one depends on the kernel of that time."""
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_blk", "virtio_balloon"),
)
"""In the order in which they can be loaded; one that is not there is built in."""
MEMORY_MIB = 192
"""That it boots in, with room for the memory that it works on."""
PROGRAM = "linux-guest"
FETCH_S = 300.0
UNUSED_S = 86400.0
"""An archive of another installation, which has the same cache, is kept so long after its last use."""
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*; do insmod "$module"; done
stty -F /dev/ttyS0 raw -echo
exec /linux-guest </dev/ttyS0 >/dev/ttyS0 2>&1
"""


@dataclass(frozen=True)
class Linux:
    """`kernel` (-kernel) and `initrd` (-initrd); `version`: of the kernel."""

    kernel: str
    initrd: str
    version: str

    def boot(self, words: str = "") -> dict[str, Any]:
        """What `Qemu.start` needs to boot it, with `MEMORY_MIB` and the machine pc or q35. `words`: options of the
        first process on the command line, as ``work=64`` (MiB that it works on; 32)."""
        append = f"console=ttyS0 quiet mitigations=off panic=-1 {words}".rstrip()
        return {"append": append, "kernel": self.kernel, "initrd": self.initrd}


def cache() -> Path:
    """Where it is kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "postcopy" / "linux-guest"


def build() -> Linux:
    """That guest, made where it is not there yet; may be called by several processes at once. `ResourceError` where it
    cannot be made, with the reason and the remedy."""
    program = Path(share_file(PROGRAM))
    if not program.is_file():
        raise ResourceError(
            f"this installation has no {PROGRAM}",
            "install it with pip, on x86-64; it is in the prefix's share/postcopy",
        )
    home = cache()
    packages = home / "packages"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not packages.exists():
                _fetch(home, packages)
            content = _initrd(packages, program.read_bytes())
            initrd = home / f"initrd-{hashlib.sha256(content).hexdigest()[:16]}"
            for old in home.glob("initrd-*"):
                if time.time() - old.stat().st_mtime > UNUSED_S:
                    old.unlink()
            if not initrd.exists():
                part = home / "part"
                part.write_bytes(content)
                part.rename(initrd)
            os.utime(initrd)
    except OSError as error:
        raise ResourceError(
            f"the Linux guest cannot be kept in {home}: {error}", "name a place by XDG_CACHE_HOME"
        ) from None
    return Linux(str(packages / "vmlinuz"), str(initrd), (packages / "version").read_text())


# ---- packages


def _fetch(home: Path, to: Path) -> None:
    for old in home.glob(".fetch-*"):  # of one that was killed
        shutil.rmtree(old, ignore_errors=True)
    if platform.machine() != "x86_64" or not all(shutil.which(name) for name in ("apt-get", "apt-cache", "dpkg-deb")):
        raise ResourceError("the Linux guest is made of Debian's packages for x86-64, by apt", "make it on a Debian")
    with tempfile.TemporaryDirectory(dir=home, prefix=".fetch-") as name:
        directory = Path(name)
        try:
            kernel = _download(directory, ())
        except ResourceError:
            # apt's lists are missing, or name versions that the mirror no longer has: with lists of our own.
            own = [f"-oDir::State={directory}/state", f"-oDir::Cache={directory}/cache", "-oAPT::Sandbox::User="]
            for part in ("state/lists/partial", "cache/archives/partial"):
                (directory / part).mkdir(parents=True)
            _run(directory, ["apt-get", *own, "--quiet", "update"])
            kernel = _download(directory, own)
        made = directory / "packages"
        (made / "modules").mkdir(parents=True)
        version = kernel.removeprefix("linux-image-")
        (made / "version").write_text(version)
        _take(directory, SHELL, {"bin/busybox": "busybox", "usr/bin/busybox": "busybox"}, made)
        modules = {f"{name}.ko": f"modules/{i:02}-{name}.ko" for i, name in enumerate(MODULES)}
        _take(directory, kernel, {f"boot/vmlinuz-{version}": "vmlinuz", **modules}, made)
        for wanted in ("busybox", "vmlinuz"):
            if not (made / wanted).exists():
                raise ResourceError(
                    f"Debian's packages {kernel} and {SHELL} have no {wanted}", "tell us which they are"
                )
        made.rename(to)


def _download(directory: Path, options: Sequence[str]) -> str:
    """The kernel's package."""
    said = _run(directory, ["apt-cache", *options, "depends", KERNEL])
    found = [line.split()[-1] for line in said.splitlines() if "Depends: linux-image-" in line]
    if len(found) != 1:
        raise ResourceError(
            f"apt knows no kernel that {KERNEL} depends on", "make it on a Debian, with a mirror of Debian's"
        )
    _run(directory, ["apt-get", *options, "-oAPT::Sandbox::User=", "--quiet", "download", found[0], SHELL])
    return found[0]


def _run(directory: Path, command: Sequence[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    what = " ".join(word for word in command if not word.startswith("-"))
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=FETCH_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"{what}: not done after {FETCH_S:g} s", "see to the network, and to apt's mirror"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ResourceError(f"{what}: {last}", "see to the network, and to apt's mirror")
    return done.stdout


def _take(directory: Path, package: str, wanted: dict[str, str], to: Path) -> None:
    """Files out of a package: by path, or by name without a compression's; under these names."""
    archives = list(directory.glob(f"{package}_*.deb"))
    if len(archives) != 1:
        raise ResourceError(f"apt-get has not left the package {package}", "see to the network, and to apt's mirror")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archives[0]], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = member.name.removeprefix("./")
                    plain = path.removesuffix(".xz")
                    name = wanted.get(plain) or wanted.get(plain.rpartition("/")[2])
                    if name is None or not member.isfile():
                        continue
                    file = archive.extractfile(member)
                    assert file is not None
                    content = file.read()
                    (to / name).write_bytes(lzma.decompress(content) if path != plain else content)
        except (tarfile.TarError, lzma.LZMAError) as error:
            raise ResourceError(f"{archives[0].name}: {error}", "see to the network, and to apt's mirror") from None


# ---- the file system that it boots from: a newc archive, as cpio(5) has it


def _initrd(packages: Path, program: bytes) -> bytes:
    modules = {f"modules/{path.name}": path.read_bytes() for path in sorted((packages / "modules").iterdir())}
    files = {"init": INIT.encode(), "linux-guest": program, "bin/busybox": (packages / "busybox").read_bytes()}
    archive = bytearray()
    for name in ("bin", "dev", "modules", "proc", "sys"):
        archive += _entry(name, stat.S_IFDIR | 0o755)
    archive += _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, content in {**files, **modules}.items():
        archive += _entry(name, stat.S_IFREG | 0o755, content)
    return bytes(archive + _entry("TRAILER!!!", 0))


def _entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    padded = name.encode() + b"\0"
    # inode, mode, uid, gid, links, time, size, device of the file system and of the node, length of the name, checksum
    numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(padded), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + padded
    return b"".join(part + bytes(-len(part) % 4) for part in (head, content))
