# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that need containers, with a Docker daemon and a base image made here where there is none.

    containers.py test [--or-skip] [-- PYTEST-ARGUMENT...]
    containers.py profile [--check]

*The daemon.* One that DOCKER_HOST or the client's default reaches is used. Else, as root, one is started in a mount,
network and process namespace of its own: its mounts, bridges and containers are its own and end with the one
process that is killed here. What outlives a namespace (a directory of files, control groups) is removed; when this
program itself was killed, the next run removes it. Debian's docker.io, debootstrap and iproute2 are installed where
they are missing and POSTCOPY_INSTALL=1 says that this may be done.

*The base image.* Debian's minimal system with Python, by debootstrap from the mirror that apt uses here, and kept in
build/containers. *The wheels*: postcopy's own is built with .venv, those it needs come from pip's index. So no image
registry is needed. The image is the one that docker/Dockerfile describes, every step without a network.

*profile* writes docker/seccomp-userfaultfd.json anew: what this daemon's own default allows a container without
capabilities, and userfaultfd(2) with UFFD_USER_MODE_ONLY.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "containers"
PROFILE = ROOT / "docker" / "seccomp-userfaultfd.json"
PACKAGES = {"dockerd": "docker.io", "docker": "docker.io", "debootstrap": "debootstrap", "ip": "iproute2",
            "unshare": "util-linux", "setpriv": "util-linux"}  # fmt: skip
SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}  # the Debian that has this Python
PREFIX = "postcopy-docker-"
DAEMON_START_S = 60.0
UFFD_USER_MODE_ONLY = 1

# Everything that mounts or starts processes is the first process of namespaces of its own, or below it. It dies with
# `unshare`, which dies with this program, however that ends, and the mounts with them.
NAMESPACE = (
    "setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
)  # fmt: skip


class Failed(Exception):
    """One line for a person: what is missing or went wrong, and the remedy."""


class NotFetched(Failed):
    """A mirror of Debian's does not give what is needed: no fault of what is tested here."""


class Interrupted(Exception):
    """A signal asked for an end."""


def say(text: str) -> None:
    print(f"containers: {text}", flush=True)


def run(command: Sequence[str | os.PathLike[str]], timeout_s: float, what: str, **keywords: Any) -> str:
    """Its standard output; `Failed` with the end of its standard error when it fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
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


# ---- what must be installed


def ensure_installed(commands: Sequence[str]) -> None:
    """Installs from Debian what is missing, as root and when POSTCOPY_INSTALL=1 allows it; `Failed` otherwise."""
    packages = {PACKAGES[command] for command in commands if shutil.which(command) is None}
    if not packages:
        return
    if shutil.which("docker") is None and platform.freedesktop_os_release().get("VERSION_CODENAME") != "bookworm":
        packages.add("docker-cli")  # which Debian 12 has in docker.io
    words = " ".join(sorted(packages))
    install = f"apt-get install --no-install-recommends {words}"
    if os.geteuid() != 0 or os.environ.get("POSTCOPY_INSTALL") != "1":
        raise Failed(
            f"no Docker daemon answers, and to start one, as root, Debian's {words} is missing:"
            f" `{install}`, or say POSTCOPY_INSTALL=1 to have it installed"
        )
    say(f"installing from Debian: {words}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ("apt-get", "--quiet", "--yes", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=60")
    with no_services():
        try:
            run([*apt, "install", *packages], 180, "apt-get install", env=environment)
        except Failed:
            # Lists that are missing, or name versions that the mirror no longer has.
            try:
                run(["apt-get", "--quiet", "update"], 120, "apt-get update", env=environment)
                run([*apt, "install", *packages], 180, "apt-get install", env=environment)
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


# ---- the daemon


def answers(host: str | None) -> bool:
    environment = os.environ if host is None else {**os.environ, "DOCKER_HOST": host}
    with contextlib.suppress(Failed):
        run(["docker", "version", "--format", "{{.Server.Version}}"], 20, "docker version", env=environment)
        return True
    return False


@contextlib.contextmanager
def daemon() -> Iterator[str | None]:
    """DOCKER_HOST of a daemon that answers; None for the client's default."""
    if shutil.which("docker") is not None:
        host = os.environ.get("DOCKER_HOST")
        if answers(host):
            say(f"using the daemon at {host or 'the default address'}")
            yield host
            return
        if host is not None:
            raise Failed(f"no Docker daemon answers at DOCKER_HOST={host}")
    if os.geteuid() != 0:
        raise Failed("no Docker daemon answers: name one by DOCKER_HOST, or run this as root, which starts one")
    ensure_installed(["dockerd", "docker", "ip", "unshare", "setpriv"])
    remove_stale()
    with scratch() as directory:
        process = None
        try:
            process = start(directory)
            yield f"unix://{directory}/docker.sock"
        finally:
            if process is not None:
                stop(process, directory)


def start(directory: Path) -> subprocess.Popen[bytes]:
    # /run: containerd's shims make sockets there that nothing would remove. No bridge but those of networks that are
    # asked for, and no firewall rules: there are no tenants to keep apart, and not every kernel has the tables.
    # The shell stays as the first process, to reap what shims leave.
    script = 'ip link set lo up; mount -t tmpfs tmpfs /run || exit; "$@" & wait "$!"'
    command = [
        *NAMESPACE, "--net", "sh", "-c", script, "sh", "dockerd", "--host", f"unix://{directory}/docker.sock",
        "--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec", "--pidfile", f"{directory}/pid",
        "--bridge", "none", "--iptables=false", "--ip-masq=false", "--cgroup-parent",
        f"/{directory.name}", "--log-level", "warn",
    ]  # fmt: skip
    log = directory / "dockerd.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + DAEMON_START_S
    while not answers(f"unix://{directory}/docker.sock"):
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-1500:]
            stop(process, directory)
            raise Failed(f"dockerd {'ended' if ended else 'did not answer in time'}: {tail}")
        time.sleep(0.1)
    say("started a daemon of our own in namespaces of its own")
    return process


def stop(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Ends the daemon and everything in its namespaces, at once: nothing of it is to be kept."""
    if process.poll() is None:
        process.kill()  # --kill-child: the first process of the namespace goes too, and with it all others
        process.wait()
    deadline = time.monotonic() + 20
    while not remove_cgroups(directory.name) and time.monotonic() < deadline:
        time.sleep(0.05)  # the last processes are on their way


def remove_cgroups(name: str) -> bool:
    """Removes the control groups below `name` in every hierarchy; False when one is still in use."""
    done = True
    for top in {*Path("/sys/fs/cgroup").glob(f"*/{name}"), *Path("/sys/fs/cgroup").glob(name)}:
        for directory, _, _ in os.walk(top, topdown=False):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError:
                done = False
    return done


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A private directory, with a lock that says for how long it is in use. In /tmp: a socket's path must be short."""
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
    try:
        with (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def remove_stale() -> None:
    """What runs that were killed have left."""
    for directory in Path("/tmp").glob(f"{PREFIX}*"):
        if directory.is_symlink() or directory.stat().st_uid != os.geteuid():
            continue
        with contextlib.suppress(OSError), (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            say(f"removing {directory}, left by a run that was killed")
            remove_cgroups(directory.name)
            shutil.rmtree(directory, ignore_errors=True)


class Docker:
    """The client, for one daemon."""

    def __init__(self, host: str | None) -> None:
        # The builder that every daemon has; the newer one would need a plugin of the client.
        self.environment = {**os.environ, "DOCKER_BUILDKIT": "0", **({} if host is None else {"DOCKER_HOST": host})}

    def __call__(self, *arguments: str | os.PathLike[str], timeout_s: float = 60.0) -> str:
        return run(["docker", *arguments], timeout_s, f"docker {arguments[0]}", env=self.environment).strip()

    def has_image(self, name: str) -> bool:
        with contextlib.suppress(Failed):
            self("image", "inspect", name)
            return True
        return False


# ---- the image


def suite() -> str:
    """The Debian release whose Python the wheels of this environment fit."""
    version = sys.version_info[:2]
    release = platform.freedesktop_os_release()
    codename = SUITES.get(version)
    if codename is None or (release.get("ID") == "debian" and release.get("VERSION_CODENAME") != codename):
        raise Failed(
            f"no base image can be made for Python {version[0]}.{version[1]}"
            f" on {release.get('PRETTY_NAME', 'this system')}:"
            " set up with Debian's own Python (make clean; PYTHON=/usr/bin/python3 make test-containers)"
        )
    return codename


def mirror() -> str:
    """Debian's mirror that apt uses here; none where apt does not tell: debootstrap knows one."""
    if shutil.which("apt-get") is None:
        return ""
    listed = run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", f"Codename: {suite()}"],
        20, "apt-get indextargets",
    )  # fmt: skip
    return next(iter(listed.split()), "")


def base_archive() -> Path:
    """The base image as a tar file, made where it is not there yet."""
    release = suite()
    archive = CACHE / f"base-{release}-{platform.machine()}.tar"
    if archive.exists():
        return archive
    if os.geteuid() != 0:
        raise Failed("the base image can be made by root only: run this once as root, or name a base by POSTCOPY_BASE")
    ensure_installed(["debootstrap", "unshare", "setpriv"])
    begin = time.monotonic()
    say(f"making a base image of Debian {release} with debootstrap")
    leave_out = [
        *(f"usr/share/{name}" for name in ("doc", "man", "locale", "info")),
        "var/cache/apt",
        "var/lib/apt/lists",
    ]
    leave_out.append("dev")
    with scratch() as directory:
        log = directory / "debootstrap.log"
        # Package files that apt has here already are not fetched again.
        script = '"$@" >"$0" 2>&1'
        command = ["debootstrap", "--variant=minbase", "--include=python3,python3-venv", release, f"{directory}/base"]
        if where := mirror():
            command.append(where)
        try:
            run([*NAMESPACE, "sh", "-c", script, str(log), *command], 240, "debootstrap")
        except Failed as error:
            tail = log.read_text(errors="replace")[-1000:] if log.exists() else ""
            raise NotFetched(f"{error}{tail}") from None
        excluded = [f"--exclude=./{name}/*" for name in leave_out]
        part = archive.with_suffix(".part")
        run(["tar", "-C", f"{directory}/base", *excluded, "-cf", part, "."], 60, "tar")
        part.replace(archive)
    say(f"base image: {time.monotonic() - begin:.0f} s, {archive.stat().st_size >> 20} MiB")
    return archive


def base_image(docker: Docker) -> str:
    """The name of an image with Python: the one that POSTCOPY_BASE names, or ours."""
    if name := os.environ.get("POSTCOPY_BASE"):
        return name
    archive = base_archive()
    name = f"postcopy-test-base:{archive.stat().st_mtime_ns}"
    if not docker.has_image(name):
        docker("import", archive, name, timeout_s=120)
    return name


def build_image(docker: Docker, name: str) -> None:
    base = base_image(docker)
    wheels = CACHE / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--wheel-dir", str(wheels))
    run([*pip, "--no-build-isolation", "."], 180, "pip wheel", cwd=ROOT)
    with tempfile.TemporaryDirectory(dir=CACHE) as context:
        shutil.copytree(wheels, f"{context}/wheels")
        shutil.copytree(ROOT / "docker", f"{context}/docker")
        docker(
            "build", "--network", "none", "--force-rm", "--build-arg", f"BASE={base}", "--file",
            ROOT / "docker" / "Dockerfile", "--tag", name, context, timeout_s=180,
        )  # fmt: skip
    size = int(docker("image", "inspect", "--format", "{{.Size}}", name))
    say(f"built {name}: {size >> 20} MiB")


# ---- the seccomp profile


def profile_of(docker: Docker, image: str) -> str:
    """What runc is given for a container without capabilities, as a profile for --security-opt, with userfaultfd(2)."""
    # The daemon does not tell its default; the configuration it writes for the runtime does.
    container = docker("create", "--network", "none", "--cap-drop", "ALL", "--entrypoint", "sleep", image, "60")
    try:
        docker("start", container)
        pid = int(docker("inspect", "--format", "{{.State.Pid}}", container))
        if not pid:
            raise Failed("the container from which the profile is read has ended")
        found = sorted(Path("/tmp").glob(f"{PREFIX}*/exec/containerd/daemon/*/moby/{container}/config.json"))
        found += Path("/run/docker/containerd/daemon").glob(f"*/moby/{container}/config.json")
        found += Path("/run/containerd").glob(f"*/moby/{container}/config.json")
        if not found:
            raise Failed("the runtime's configuration cannot be found: only a daemon on this host shows it, to root")
        seccomp = json.loads(found[0].read_text())["linux"]["seccomp"]
    finally:
        docker("rm", "--force", container)
    version = docker("version", "--format", "{{.Server.Version}}")
    rules = [
        {
            "comment": "Added for postcopy: userfaultfd(2) for faults of user code only (UFFD_USER_MODE_ONLY).",
            "names": ["userfaultfd"],
            "action": "SCMP_ACT_ALLOW",
            "args": [
                {"index": 0, "value": UFFD_USER_MODE_ONLY, "valueTwo": UFFD_USER_MODE_ONLY, "op": "SCMP_CMP_MASKED_EQ"}
            ],
        },
        *seccomp["syscalls"],
    ]
    rules[1] = {
        "comment": f"From here on: what Docker {version} allows by default in a container that has no capabilities."
        " Written by tools/containers.py profile.",
        **rules[1],
    }
    return json.dumps({**seccomp, "syscalls": rules}, indent=1) + "\n"


# ---- commands


@contextlib.contextmanager
def prepared() -> Iterator[tuple[Docker, str]]:
    """A daemon with the image, which is removed again."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with daemon() as host:
        docker = Docker(host)
        name = f"postcopy-test:{os.getpid()}"
        try:
            build_image(docker, name)
            yield docker, name
        finally:
            if docker.has_image(name):
                docker("image", "rm", "--force", name)


def test(arguments: list[str]) -> int:
    with prepared() as (docker, image):
        begin = time.monotonic()
        command = [sys.executable, "-m", "pytest", "tests/containers", *arguments]
        environment = {**docker.environment, "POSTCOPY_TEST_IMAGE": image}
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        say(f"tests: {time.monotonic() - begin:.0f} s")
        return status


def profile(check: bool) -> int:
    with prepared() as (docker, image):
        text = profile_of(docker, image)
    if not check:
        PROFILE.write_text(text)
    elif PROFILE.read_text() != text:
        raise Failed(f"{PROFILE.relative_to(ROOT)} is not what this daemon's default gives")
    return 0


def interrupt(signum: int, _frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(signum).name)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tests = commands.add_parser("test", help="make what is needed, and run tests/containers")
    tests.add_argument(
        "--or-skip",
        action="store_true",
        help="status 0 where they cannot run (with POSTCOPY_INSTALL=1: where Debian's mirror does not answer)",
    )
    tests.add_argument("arguments", nargs="*", metavar="PYTEST-ARGUMENT")
    writer = commands.add_parser("profile", help="write the seccomp profile from the daemon's default")
    writer.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, interrupt)
    try:
        return test(args.arguments) if args.command == "test" else profile(args.check)
    except Failed as error:
        strict = os.environ.get("POSTCOPY_INSTALL") == "1" and not isinstance(error, NotFetched)
        if args.command == "test" and args.or_skip and not strict:
            say(f"SKIPPED, no test of containers has run: {error}")
            return 0
        print(f"containers: error: {error}", file=sys.stderr, flush=True)
        return 1
    except Interrupted as reason:
        print(f"containers: interrupted by {reason}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
