# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that need containers, with a Docker daemon and a base image made here where there is none.

    containers.py test [--or-skip] -- COMMAND [ARGUMENT...]
    containers.py profile [--check]

*The daemon.* One that DOCKER_HOST or the client's default reaches is used. Else, as root, one is started in a mount,
network and process namespace of its own: its mounts, bridges and containers are seen by no other process and end with
the one that is killed here. What outlives a namespace (a directory of files, control groups) is removed; when this
program itself was killed, the next run removes it. Debian's docker.io, debootstrap and iproute2 are installed where
they are missing and POSTCOPY_INSTALL=1 says that this may be done.

*The base image.* Debian's minimal system with Python (tools/debian.py). *The wheels*: postcopy's own is the one that
POSTCOPY_WHEEL names, or built with .venv; those it needs come from pip's index. So no image registry is needed. The
image is the one that docker/Dockerfile describes, every step without a network.

*profile* writes docker/seccomp-userfaultfd.json anew: what this daemon's own default allows a container without
capabilities, and userfaultfd(2) with UFFD_USER_MODE_ONLY.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from debian import NAMESPACE, PYTHONS, Failed, NotFetched, base_archive, ensure_installed, remove_stale, run, scratch

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "containers"
PROFILE = ROOT / "docker" / "seccomp-userfaultfd.json"
PREFIX = "postcopy-docker-"
DAEMON_START_S = 60.0
UFFD_USER_MODE_ONLY = 1


def say(text: str) -> None:
    print(f"containers: {text}", flush=True)


class Interrupted(Exception):
    """A signal asked for an end."""


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
    remove_stale(PREFIX, remove_cgroups)
    with scratch(PREFIX) as directory:
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
    codename = next((name for name, python in PYTHONS.items() if python == version), None)
    if codename is None or (release.get("ID") == "debian" and release.get("VERSION_CODENAME") != codename):
        raise Failed(
            f"no base image can be made for Python {version[0]}.{version[1]}"
            f" on {release.get('PRETTY_NAME', 'this system')}:"
            " set up with Debian's own Python (make clean; PYTHON=/usr/bin/python3 make test-containers)"
        )
    return codename


def base_image(docker: Docker) -> str:
    """The name of an image with Python: the one that POSTCOPY_BASE names, or ours."""
    if name := os.environ.get("POSTCOPY_BASE"):
        return name
    archive = base_archive(suite())
    name = f"postcopy-test-base:{archive.stat().st_mtime_ns}"
    if not docker.has_image(name):
        docker("import", archive, name, timeout_s=120)
    return name


def build_image(docker: Docker, name: str) -> None:
    base = base_image(docker)
    wheels = CACHE / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--wheel-dir", str(wheels))
    run([*pip, "--no-build-isolation", os.environ.get("POSTCOPY_WHEEL") or "."], 180, "pip wheel", cwd=ROOT)
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


def test(command: list[str]) -> int:
    with prepared() as (docker, image):
        begin = time.monotonic()
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
    tests = commands.add_parser("test", help="make what is needed, and run COMMAND with it: pytest")
    tests.add_argument(
        "--or-skip",
        action="store_true",
        help="status 0 where they cannot run (with POSTCOPY_INSTALL=1: where Debian's mirror does not answer)",
    )
    tests.add_argument("words", nargs="+", metavar="COMMAND")
    writer = commands.add_parser("profile", help="write the seccomp profile from the daemon's default")
    writer.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, interrupt)
    try:
        return test(args.words) if args.command == "test" else profile(args.check)
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
