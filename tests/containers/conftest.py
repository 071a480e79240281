# SPDX-License-Identifier: Apache-2.0
"""Sides of a migration in containers, started as docker/compose*.yaml says.

The client has no `compose` everywhere, so the few settings that these files use are translated into arguments of
`docker run` here, and one that is not known is an error: what is tested is what the files say.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import sides

ROOT = Path(__file__).parents[2]
DOCKER_DIR = ROOT / "docker"
IMAGE = os.environ.get("POSTCOPY_TEST_IMAGE", "")
DEVICE_GID = 65011
CLIENT_TIMEOUT_S = 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if IMAGE:
        return
    skip = pytest.mark.skip(reason="needs a Docker daemon and an image of postcopy: `make test-containers` makes both")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


def docker(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The client, at the daemon of DOCKER_HOST."""
    done = subprocess.run(
        ["docker", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=CLIENT_TIMEOUT_S,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done


def substitute(value: Any, variables: dict[str, str]) -> Any:
    """Compose's ${NAME:-default} and ${NAME:?message}, and $$ for a $, in every string."""
    if isinstance(value, dict):
        return {key: substitute(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        assert name in variables or operator == ":-", f"{match[0]} has no value"
        return variables.get(name, rest)

    return re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", replace, value).replace("$$", "$")


class Observer(sides.Side):
    """docker/observer.py: its lines are no output of `postcopy`, and have no schema."""

    parse = staticmethod(lambda text: [json.loads(line) for line in text.splitlines()])


class Stage:
    """A network of its own, and the containers on it; all of it goes when the test ends."""

    def __init__(self, file: str, spawn_child: Callable[..., Any], devices: dict[str, Path], volumes: str) -> None:
        """`volumes`: what the names of volumes begin with."""
        self.file = file
        self._volumes = volumes
        self._spawn_child = spawn_child
        self._devices = devices
        self._name = f"postcopy-test-{secrets.token_hex(4)}"
        self._containers: list[str] = []
        # 4096 of them; one that is taken makes `network create` fail.
        number = secrets.randbelow(4096)
        self._subnet = f"10.{208 + number // 256}.{number % 256}"
        variables = {
            "POSTCOPY_IMAGE": IMAGE,
            "POSTCOPY_SUBNET": self._subnet,
            "DEVICE_GID": str(DEVICE_GID),
        }
        compose = substitute(yaml.safe_load((DOCKER_DIR / file).read_text()), variables)
        self._network, self.services, self.volumes = (
            compose["networks"]["migration"],
            compose["services"],
            compose["volumes"],
        )

    def __enter__(self) -> Stage:
        arguments = []
        network = dict(self._network)
        if network.pop("internal"):
            arguments.append("--internal")
        for config in network.pop("ipam")["config"]:
            arguments += ["--subnet", config["subnet"]]
        assert not network, f"settings that this test does not know: {network}"
        docker("network", "create", *arguments, self._name)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._containers:
            docker("rm", "--force", "--volumes", name, check=False)
        docker("network", "rm", self._name)

    def arguments(self, service: str, seccomp: bool = True) -> list[str]:
        """What `docker run` is to be told, with the image last; without `seccomp` under Docker's own profile."""
        settings = dict(self.services[service])
        image, networks = settings.pop("image"), settings.pop("networks", None)
        if networks is None:
            arguments = ["--network", settings.pop("network_mode")]
        else:
            address = networks["migration"]["ipv4_address"] if isinstance(networks, dict) else None
            arguments = ["--network", self._name, "--network-alias", service, *(["--ip", address] if address else [])]
        for volume in settings.pop("volumes", []):
            arguments += ["--volume", f"{self._volumes}-{volume}"]
        for key in (
            "build",
            "command",
            "depends_on",
            "healthcheck",
            "entrypoint",
        ):  # of no meaning for a single `docker run`
            settings.pop(key, None)
        assert settings.pop("restart") == "no"
        if settings.pop("read_only", False):
            arguments.append("--read-only")
        if grace := settings.pop("stop_grace_period", ""):
            arguments += ["--stop-timeout", grace.removesuffix("s")]
        for device in settings.pop("devices", []):
            if device in self._devices:
                arguments += ["--device", f"{self._devices[device]}:{device}"]
        for option in settings.pop("security_opt"):
            kind, _, value = option.partition(":")
            if kind == "seccomp" and not seccomp:
                continue
            arguments += ["--security-opt", f"{kind}={DOCKER_DIR / value if kind == 'seccomp' else value}"]
        for key, flag in (("cap_drop", "--cap-drop"), ("cap_add", "--cap-add"), ("group_add", "--group-add")):
            for value in settings.pop(key, []):
                arguments += [flag, value]
        assert not settings, f"settings that this test does not know: {settings}"
        return [*arguments, image]

    def name_of(self, service: str) -> str:
        return f"{self._name}-{service}"

    def start(self, service: str, *more: str, seccomp: bool = True, options: tuple[str, ...] = ()) -> Any:
        """`service` as a `Side`: its command, and `more` arguments; `options` are `docker run`'s. A destination runs
        until it is told to end, not as long as the file says: how much a guest does meanwhile nobody promises."""
        name = self.name_of(service)
        self._containers.append(name)
        command = list(self.services[service]["command"])
        if "--run-for" in command:
            at = command.index("--run-for")
            del command[at : at + 2]
        entrypoint = self.services[service].get("entrypoint")
        if entrypoint is not None:
            options, command = (*options, "--entrypoint", entrypoint[0]), [*entrypoint[1:], *command]
        run = ["docker", "run", "--name", name, *options, *self.arguments(service, seccomp)]
        kind = Observer if service == "observer" else sides.Side
        return kind(self._spawn_child, *command, *more, command=run)

    def run(self, service: str, entrypoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another program in a container that is set up as `service`; what it wrote."""
        return docker("run", "--rm", "--entrypoint", entrypoint, *self.arguments(service), *arguments, check=False)

    def exec(self, service: str, *command: str, check: bool = True) -> str:
        """What a command in the running container writes."""
        return docker("exec", self.name_of(service), *command, check=check).stdout

    def kill(self, service: str) -> None:
        docker("kill", "--signal", "KILL", self.name_of(service))

    def terminate(self, service: str) -> None:
        docker("kill", "--signal", "TERM", self.name_of(service), check=False)  # it may have ended meanwhile

    def disconnect(self, service: str) -> None:
        docker("network", "disconnect", self._name, self.name_of(service))

    def connect(self, service: str, address: str) -> None:
        docker("network", "connect", "--alias", service, "--ip", address, self._name, self.name_of(service))

    def address_of(self, service: str) -> str:
        template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return docker("inspect", "--format", template, self.name_of(service)).stdout.strip()


@pytest.fixture
def devices(tmp_path: Path) -> dict[str, Path]:
    """Nodes of this host's devices that a group may open, as a udev rule would make them."""
    nodes = {}
    for device in ("/dev/userfaultfd", "/dev/kvm"):
        path = tmp_path / Path(device).name
        try:
            os.mknod(path, stat.S_IFCHR | 0o660, os.stat(device).st_rdev)
            os.chmod(path, 0o660)
            os.chown(path, 0, DEVICE_GID)
        except FileNotFoundError:
            continue
        nodes[device] = path
    return nodes


@pytest.fixture(scope="session")
def volumes() -> Iterator[str]:
    """What the names of the volumes begin with in which the service `certificates` has made certificates, once."""
    name = f"postcopy-test-{secrets.token_hex(4)}"

    def never(*_: object) -> None:
        raise AssertionError("it is waited for")

    stage = Stage("compose.nodevice.yaml", never, {}, name)
    service = stage.services["certificates"]
    for _ in range(2):  # at the second `up` they are renewed
        done = stage.run("certificates", service["entrypoint"][0], *service["entrypoint"][1:], *service["command"])
        assert done.returncode == 0, done.stderr
    yield name
    for volume in stage.volumes:
        docker("volume", "rm", f"{name}-{volume}", check=False)


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, spawn_child: Callable[..., Any], require: Callable[..., None],
    devices: dict[str, Path], volumes: str,
) -> Iterator[Stage]:  # fmt: skip
    """The stage of a compose file, which the test names by `indirect`; without: kvm, or rv64 where that cannot be."""
    file = getattr(request, "param", None)
    if file is None:
        file = "compose.yaml" if has_devices() else "compose.nodevice.yaml"
    if file == "compose.yaml":
        require("root", "uffd-device", "kvm")
    with Stage(file, spawn_child, devices, volumes) as opened:
        yield opened


def has_devices() -> bool:
    from postcopy.testbed import probe

    return bool(os.geteuid() == 0 and probe.find("uffd-device") and probe.find("kvm"))
