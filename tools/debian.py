# SPDX-License-Identifier: Apache-2.0
"""Minimal Debian systems for tests, made here: no registry of images is needed; and what tests lack of Debian's.

    debian.py install COMMAND...

`base_archive` is Debian's minimal system with Python, by debootstrap from the mirror that apt uses here, as a tar file
that is kept in build/debian. `Root` is a directory with such a system in which commands run, in namespaces of their
own. For root; what is missing of Debian's is installed where POSTCOPY_INSTALL=1 says that this may be done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "debian"
PACKAGES = {"dockerd": "docker.io", "docker": "docker.io", "debootstrap": "debootstrap", "ip": "iproute2",
            "unshare": "util-linux", "setpriv": "util-linux", "chroot": "coreutils",
            "zsh": "zsh", "fish": "fish", "man": "man-db", "qemu-system-x86_64": "qemu-system-x86",
            "chromium": "chromium"}  # fmt: skip
PYTHONS = {"bookworm": (3, 11), "trixie": (3, 13)}  # that the releases have
PREFIX = "postcopy-debian-"

# Everything that mounts or starts processes is the first process of namespaces of its own, or below it. It dies with
# `unshare`, which dies with this program, however that ends, and the mounts with them.
NAMESPACE = (
    "setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
)  # fmt: skip


class Failed(Exception):
    """One line for a person: what is missing or went wrong, and the remedy."""


class NotFetched(Failed):
    """A mirror of Debian's does not give what is needed: no fault of what is tested here."""


def say(text: str) -> None:
    print(f"debian: {text}", flush=True)


def run(command: Sequence[str | os.PathLike[str]], timeout_s: float, what: str, **keywords: Any) -> str:
    """Its standard output; `Failed` with the end of its standard error when it fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            **keywords,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{what}: not done after {timeout_s:g} s") from None
    except OSError as error:
        raise Failed(f"{what}: {error}") from None
    if done.returncode:
        tail = f"{done.stdout.strip()[-1000:]}\n{done.stderr.strip()[-1000:]}".strip()
        raise Failed(f"{what}: exit status {done.returncode}: {tail}")
    return str(done.stdout)


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A private directory, with a lock that says for how long it is in use. In /tmp: a socket's path must be short."""
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    try:
        with (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def remove_stale(prefix: str, before: Callable[[str], object] = str) -> None:
    """What runs that were killed have left of `scratch`; `before` is called with the name of each directory."""
    for directory in Path("/tmp").glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # as where another run removes its own meanwhile
            if directory.is_symlink() or directory.stat().st_uid != os.geteuid():
                continue
            with (directory / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                say(f"removing {directory}, left by a run that was killed")
                before(directory.name)
                shutil.rmtree(directory, ignore_errors=True)


# ---- what must be installed


def ensure_installed(commands: Sequence[str]) -> None:
    """Installs from Debian what is missing, as root and when POSTCOPY_INSTALL=1 allows it; `Failed` otherwise."""
    packages = {PACKAGES[command] for command in commands if shutil.which(command) is None}
    if not packages:
        return
    if "docker.io" in packages and platform.freedesktop_os_release().get("VERSION_CODENAME") != "bookworm":
        packages.add("docker-cli")  # which Debian 12 has in docker.io
    words = " ".join(sorted(packages))
    install = f"apt-get install --no-install-recommends {words}"
    if os.geteuid() != 0 or os.environ.get("POSTCOPY_INSTALL") != "1":
        raise Failed(
            f"Debian's {words} is missing: `{install}` as root, or say POSTCOPY_INSTALL=1 to have it installed"
        )
    say(f"installing from Debian: {words}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ("apt-get", "--quiet", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=60")
    with no_services():
        try:
            run([*apt, "install", *packages], 300, "apt-get install", env=environment)
        except Failed:
            # Lists that are missing, or name versions that the mirror no longer has.
            try:
                run(["apt-get", "--quiet", "update"], 120, "apt-get update", env=environment)
                run([*apt, "install", *packages], 300, "apt-get install", env=environment)
            except Failed as error:
                raise NotFetched(str(error)) from None


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """A package that is installed meanwhile starts no daemon of its own (invoke-rc.d(8): status 101 of policy-rc.d)."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


# ---- a system


def mirror() -> str:
    """Debian's mirror that apt uses here; none where apt does not tell: debootstrap knows one."""
    if shutil.which("apt-get") is None or platform.freedesktop_os_release().get("ID") != "debian":
        return ""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", f"Codename: {release}"]
    return next(iter(run(command, 20, "apt-get indextargets").split()), "")


def base_archive(release: str) -> Path:
    """The system of a release (``bookworm``) as a tar file, made where it is not there yet."""
    archive = CACHE / f"base-{release}-{platform.machine()}.tar"
    if archive.exists():
        return archive
    if os.geteuid() != 0:
        raise Failed("a Debian system can be made by root only: run this once as root")
    ensure_installed(["debootstrap", "unshare", "setpriv"])
    CACHE.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    say(f"making Debian {release} with debootstrap")
    leave_out = [
        *(f"usr/share/{name}" for name in ("doc", "man", "locale", "info")),
        "var/cache/apt",
        "var/lib/apt/lists",
        "dev",
    ]
    part = archive.with_suffix(".part")
    with (CACHE / f"lock-{release}").open("w") as lock, scratch(PREFIX) as directory:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if archive.exists():  # another run has made it meanwhile
            return archive
        log = directory / "debootstrap.log"
        # In memory: dpkg syncs every file. (Package files that apt has here already are not fetched again.)
        script = (
            'mkdir "$0/base" && mount -t tmpfs tmpfs "$0/base" && exec >"$0/debootstrap.log" 2>&1 &&'
            ' debootstrap --variant=minbase --include=python3,python3-venv,pipx "$1" "$0/base" $2 &&'
            ' tar -C "$0/base" $3 -cf "$4" .'
        )
        excluded = " ".join(f"--exclude=./{name}/*" for name in leave_out)
        command = ["sh", "-fc", script, str(directory), release, mirror(), excluded, str(part)]
        try:
            run([*NAMESPACE, *command], 300, "debootstrap")
        except Failed as error:
            tail = log.read_text(errors="replace")[-1000:] if log.exists() else ""
            raise NotFetched(f"{error}{tail}") from None
        part.replace(archive)
    say(f"Debian {release}: {time.monotonic() - begin:.0f} s, {archive.stat().st_size >> 20} MiB")
    return archive


class Root:
    """A directory with a system; what runs in it sees the devices of the host, its own processes and no others."""

    UID = 1000

    def __init__(self, path: Path) -> None:
        self.path = path

    PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

    def __call__(self, command: str, *, user: bool = False, timeout_s: float = 60.0) -> str:
        """What a command of the shell writes, standard error too, as root or as an ordinary user; `Failed`."""
        script = (
            'mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot ${1:+--userspec="$1"} "$0"'
            ' env -i HOME="$2" PATH="$3" LANG=C.UTF-8 sh -c "$4"'
        )
        ids, home = (f"{self.UID}:{self.UID}", "/home/user") if user else ("", "/root")
        words = ["sh", "-c", script, str(self.path), ids, home, self.PATH, f"cd; exec 2>&1; {command}"]
        return run([*NAMESPACE, *words], timeout_s, command)


@contextlib.contextmanager
def system(release: str) -> Iterator[Root]:
    """A fresh system of a release, with an ordinary user, for as long as the block lasts."""
    if os.geteuid() != 0:
        raise Failed("a Debian system can be run by root only: run this as root")
    archive = base_archive(release)
    ensure_installed(["unshare", "setpriv", "chroot"])
    remove_stale(PREFIX)
    with scratch(PREFIX) as directory:
        path = directory / "root"
        path.mkdir()
        run(["tar", "-C", path, "-xpf", archive], 60, "tar")
        root = Root(path)
        root(f"useradd --create-home --uid {Root.UID} user")
        yield root


def main(arguments: Sequence[str]) -> int:
    """Installs the packages of commands that are missing, or says why not and that tests of them will skip."""
    try:
        ensure_installed(arguments)
    except Failed as error:
        say(str(error))
        return int(os.environ.get("POSTCOPY_INSTALL") == "1")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] != ["install"]:
        sys.exit("usage: debian.py install COMMAND...")
    sys.exit(main(sys.argv[2:]))
